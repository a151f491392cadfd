"""Episodes, the two data sets and their cache."""

import functools
import http.server
import io
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmeta import data
from fastmeta.data import Episodes, LabelledImages, cache, distort, glyphs, omniglot


def labelled(counts):
    """Items [N, 2] that say which class and which item of it they are, shuffled, and their labels (not 0, 1, 2, …)."""
    rows = [(10 * c, i) for c, count in enumerate(counts) for i in range(count)]
    items = torch.tensor(rows)[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return items, items[:, 0]


@pytest.mark.parametrize("counts, way, shot, queries", [([20] * 30, 5, 1, 15), ([6] * 5, 5, 5, 1), ([3, 9, 4, 30, 7], 3, 1, 2),
                                                        ([2], 1, 1, 1)])
def test_episode_has_distinct_classes_and_disjoint_items(counts, way, shot, queries):
    items, labels = labelled(counts)
    for episode in Episodes(items, labels, way=way, shot=shot, queries=queries, length=50):
        assert episode.support_labels.bincount().tolist() == [shot] * way
        assert episode.query_labels.bincount().tolist() == [queries] * way
        rows = torch.cat([episode.support, episode.query])
        assert len(rows.unique(dim=0)) == way * (shot + queries)
        for label in range(way):
            classes = torch.cat([episode.support[episode.support_labels == label], episode.query[episode.query_labels == label]])[:, 0]
            assert len(classes.unique()) == 1
        assert len(episode.support[:, 0].unique()) == way


def test_every_class_item_and_order_occurs():
    items, labels = labelled([4, 5, 6, 7])
    episodes = list(Episodes(items, labels, way=2, shot=1, queries=1, length=300))
    for part in ("support", "query"):
        assert len(torch.cat([getattr(episode, part) for episode in episodes]).unique(dim=0)) == 22
    assert {tuple(episode.support_labels.tolist()) for episode in episodes} == {(0, 1), (1, 0)}


def test_episode_follows_from_seed_and_number():
    items, labels = labelled([20] * 30)
    make = functools.partial(Episodes, items, labels, way=5, shot=1, queries=3)
    first, again = make(seed=3), make(seed=3, length=9)
    list(again)  # what was drawn before has no influence
    for number in (8, 0):
        assert all(torch.equal(a, b) for a, b in zip(first[number], again[number]))
    assert not torch.equal(first[0].support, first[1].support)
    assert not torch.equal(first[0].support, make(seed=4)[0].support)
    assert not torch.equal(make(seed=0)[1].support, make(seed=1)[0].support)
    with pytest.raises(IndexError):
        again[9]


def test_workers_and_batches_see_the_same_episodes():
    images = torch.rand(60, 1, 16, 16)
    episodes = Episodes(images, torch.arange(60) // 6, way=3, shot=2, queries=2, length=8, distortion=1.0)
    alone = list(torch.utils.data.DataLoader(episodes, batch_size=4))
    workers = list(torch.utils.data.DataLoader(episodes, batch_size=4, num_workers=2))
    batches = [episodes.batch(range(4)), episodes.batch(range(4, 8))]
    assert alone[0].support.shape == (4, 6, 1, 16, 16)
    for a, b, c in zip(alone, workers, batches):
        assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(a, b, c))


def test_uint8_becomes_float_in_0_1():
    episode = Episodes(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), way=2, shot=1, queries=1)[0]
    assert episode.support.dtype == torch.float32 and (episode.query == 1).all()


@pytest.mark.parametrize("change, message", [
    (dict(way=7), "7-way episodes need 7 classes, the set has 5"),
    (dict(queries=6), "1 supports and 6 queries of each class need 7 images a class, class 40 has 4"),
    (dict(shot=0), "shot must be at least 1, got 0"), (dict(way=-1), "way must be at least 1"), (dict(seed=-1), "seed must not be negative"),
    (dict(labels=torch.zeros(3)), "34 items with 3 labels")])
def test_impossible_episodes_are_refused(change, message):
    items, labels = labelled([9, 8, 7, 6, 4])
    with pytest.raises(ValueError, match=message):
        Episodes(items, **{**dict(labels=labels, way=5, shot=1, queries=2), **change})


def test_distort_moves_a_little_and_by_the_seed():
    image = torch.zeros(50, 1, 28, 28)
    image[:, :, 8:20, 12:16] = 1
    assert torch.allclose(distort(image, np.random.default_rng(0), 0.0), image, atol=1e-5)
    out = distort(image, np.random.default_rng(0), 1.0)
    assert torch.equal(out, distort(image, np.random.default_rng(0), 1.0))
    assert not torch.equal(out[0], out[1])
    assert out.min() >= 0 and out.max() <= 1 + 1e-6
    overlap = (out * image).sum((1, 2, 3)) / image.sum((1, 2, 3))
    assert overlap.min() > .3 and overlap.mean() < .95


def test_rotated_and_classes():
    images = torch.arange(6 * 4, dtype=torch.uint8).view(6, 1, 2, 2)
    three = LabelledImages(images, torch.tensor([0, 1, 2, 0, 1, 2]), ("a", "b", "c"))
    turned = three.rotated()
    assert len(turned.names) == 12 and turned.names[3] == "a @90" and turned.labels.tolist()[6:9] == [3, 4, 5]
    assert torch.equal(turned.images[6 + 1, 0], images[1, 0].rot90()) and torch.equal(turned.images[18 + 1, 0].rot90(), images[1, 0])
    chosen = three.classes([2, 0])
    assert chosen.names == ("c", "a") and chosen.labels.tolist() == [1, 0, 1, 0] and torch.equal(chosen.images, images[[0, 2, 3, 5]])


def test_split_is_disjoint_and_always_the_same():
    def numbers(count):
        return LabelledImages(torch.arange(count, dtype=torch.int32).view(-1, 1, 1, 1), torch.arange(count), tuple(map(str, range(count))))
    train, validation, test = data.split(numbers(1623), 1200, 100)
    names = [set(part.names) for part in (train, validation, test)]
    assert [len(part) for part in names] == [1100, 100, 423] and len(set.union(*names)) == 1623
    assert set(data.split(numbers(1623), 1200).test.names) == names[2]
    # If these change, a test class of one release is a training class of another: published accuracies and checkpoints are void.
    assert test.names[:5] == ("334", "1577", "1356", "842", "148")
    for wrong in ((1623, 0), (10, 10), (10, -1)):
        with pytest.raises(ValueError, match="do not fit a set of 1623"):
            data.split(numbers(1623), *wrong)


def test_unknown_set():
    with pytest.raises(ValueError, match="unknown data set 'mnist', expected one of glyphs, omniglot"):
        data.load("mnist")


def test_glyphs():
    letters = glyphs.load()
    count = len(letters.names)
    assert 1000 < count < 1500 and len(set(letters.names)) == count and "LATIN CAPITAL LETTER A" in letters.names
    assert letters.images.shape == (20 * count, 1, 28, 28) and letters.images.dtype == torch.uint8
    assert letters.labels.bincount().tolist() == [20] * count
    ink = letters.images.view(count, 20, -1).float().mean(-1) / 255
    assert ink.min() > .005 and ink.max() < .7
    flat = letters.images.view(count, 20, -1)
    assert (flat[:, 0] != flat[:, 6]).any(-1).all()  # the same face, another distortion
    assert not any(name.split()[0] == "COMBINING" for name in letters.names)
    assert [len(part.names) for part in data.load("glyphs", validation_classes=50)] == [750, 50, count - 800]


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def png(value):
    image = np.full((105, 105), 255, np.uint8)
    image[value:value + 30, 20:80] = 0
    out = io.BytesIO()
    Image.fromarray(image).convert("1").save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Two archives in Omniglot's layout with 3 + 2 characters of 4 drawings, their entries in disorder as in the real ones."""
    monkeypatch.setattr(omniglot, "CHARACTERS", 5)
    monkeypatch.setattr(omniglot, "DRAWINGS", 4)
    folder = tmp_path / "archives"
    folder.mkdir()
    for name, alphabet, ids in (("images_background", "Greek", (1, 2, 3)), ("images_evaluation", "Atlantean", (4, 5))):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for drawing in (3, 1, 4, 2):
                for i in reversed(ids):
                    archive.writestr(f"{name}/{alphabet}/character{i:02}/{i:04}_{drawing:02}.png", png(10 * i + drawing))
    return folder


def test_omniglot_from_archives_folders_and_cache(archives, cache_folder, tmp_path, monkeypatch):
    zipped = omniglot.load(archives)
    assert zipped.images.shape == (20, 1, 28, 28) and zipped.labels.tolist() == [c for c in range(5) for _ in range(4)]
    assert zipped.names == tuple(f"{'Greek' if i < 4 else 'Atlantean'}/character0{i}" for i in range(1, 6))
    rows = torch.arange(28.) @ (zipped.images[:, 0].float().mean(2) / 255).T  # ink is 255, and lower for later drawings and characters
    assert (rows.diff() > 0).all() and zipped.images[0, 0, 0, 0] == 0 and zipped.images.max() == 255

    unpacked = tmp_path / "unpacked"
    for file in archives.iterdir():
        zipfile.ZipFile(file).extractall(unpacked)
    monkeypatch.setenv("FASTMETA_DATA", str(unpacked))
    assert torch.equal(omniglot.load().images, zipped.images)

    assert len(list(cache_folder.glob("*.npz"))) == 2
    monkeypatch.setattr(omniglot, "_decode", lambda sources: pytest.fail("decoded again"))
    assert torch.equal(omniglot.load(archives).images, zipped.images)
    os.utime(archives / "images_background.zip")  # another file, perhaps
    with pytest.raises(pytest.fail.Exception):
        omniglot.load(archives)


def test_omniglot_that_is_not_whole(archives, cache_folder, tmp_path):
    with zipfile.ZipFile(archives / "images_evaluation.zip", "a") as archive:
        archive.writestr("images_evaluation/Atlantean/character06/0006_01.png", png(1))
    with pytest.raises(ValueError, match="hold 21 drawings of 6 characters, not 4 of each of 5"):
        omniglot.load(archives)
    (archives / "images_evaluation.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="cannot read .*images_evaluation.zip: File is not a zip file"):
        omniglot.load(archives)
    with pytest.raises(FileNotFoundError, match=f"in {tmp_path / 'nothing'}; name their folder with --data-root"):
        omniglot.load(tmp_path / "nothing")
    assert not list(cache_folder.glob("*.npz"))


@pytest.fixture
def server(archives):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archives)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_download(archives, server, cache_folder, monkeypatch):
    monkeypatch.delenv("FASTMETA_DATA", raising=False)
    folder = omniglot.download(address=server)
    assert folder == cache_folder / "omniglot"
    for name in ("images_background.zip", "images_evaluation.zip"):
        assert (folder / name).read_bytes() == (archives / name).read_bytes()
    omniglot.download(address="http://127.0.0.1:9/")  # all there: nothing is asked


def test_failed_downloads_leave_nothing(archives, server, tmp_path):
    (archives / "images_evaluation.zip").write_bytes(b"<html>rate limit</html>")
    with pytest.raises(ValueError, match="images_evaluation.zip sent is not a zip archive"):
        omniglot.download(tmp_path / "data", server)
    with pytest.raises(ConnectionError, match="cannot download .*images_evaluation.zip: HTTP Error 404"):
        (archives / "images_evaluation.zip").unlink()
        omniglot.download(tmp_path / "data", server)
    with pytest.raises(ConnectionError, match="cannot download"):
        omniglot.download(tmp_path / "data", "http://127.0.0.1:9/")
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["images_background.zip"]


def test_real_omniglot():
    try:
        root = omniglot.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    drawings = omniglot.load(root)
    assert drawings.images.shape == (32460, 1, 28, 28) and drawings.labels.bincount().tolist() == [20] * 1623
    assert len(set(drawings.names)) == 1623 and len({name.split("/")[0] for name in drawings.names}) == 50
    assert drawings.images.view(32460, -1).amax(1).min() > 50  # no drawing is blank
    assert .02 < drawings.images.float().mean() / 255 < .2  # and ink is the small part


def test_atomic_write_keeps_the_old_file_until_the_new_is_whole(tmp_path):
    path = tmp_path / "deep" / "file"
    with cache.atomic_write(path) as file:
        file.write(b"old")
    with pytest.raises(KeyboardInterrupt):
        with cache.atomic_write(path) as file:
            file.write(b"half of the n")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]
    with cache.atomic_write(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(path.parent.iterdir()) == [path]
    probe = tmp_path / "probe"
    probe.touch()
    assert path.stat().st_mode == probe.stat().st_mode


@pytest.mark.parametrize("damage", [lambda whole: whole[:-20], lambda whole: b"", lambda whole: b"rubbish",
                                    lambda whole: whole[:60] + bytes(40) + whole[100:]])
def test_damaged_cache_is_built_again(cache_folder, damage):
    built = []

    def build():
        built.append(1)
        return {"x": np.arange(1000)}

    for _ in range(2):
        assert (cache.cached("name", build)["x"] == np.arange(1000)).all()
    assert len(built) == 1
    file = cache_folder / "name.npz"
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert (cache.cached("name", build)["x"] == np.arange(1000)).all()
    assert len(built) == 2


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTMETA_CACHE", str(tmp_path / "file"))
    assert cache.cached("name", lambda: {"x": np.ones(2)})["x"].sum() == 2


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("FASTMETA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_dir() == Path("/x/fastmeta")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_dir() == Path.home() / ".cache" / "fastmeta"
