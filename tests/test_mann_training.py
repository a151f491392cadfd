"""Sequences, and the training and evaluation of MANN on them."""

import signal

import numpy as np
import pytest
import torch
from helpers import assert_equal_state, finish, log_of, spawn_cli
from torch.nn.functional import cross_entropy

from fastmeta import data, nn
from fastmeta.cli import main
from fastmeta.data import LabelledImages, Sequences, Split
from fastmeta.data.sequences import label_vectors
from fastmeta.training import (MANNConfig, MatchingConfig, build, evaluate_presentations, evaluate_presentations_pixels, load_checkpoint,
                               load_model, train)
from fastmeta.training.evaluation import by_presentation

TINY = dict(classes=3, presentations=4, episodes_per_batch=4, hidden_size=12, memory_slots=8, memory_width=5, read_heads=2, side=7, steps=20)
ARGUMENTS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


pytestmark = pytest.mark.usefixtures("one_thread")


def toy(classes=7, each=6, side=8):
    """Each image says what it is: the class in the first pixel, its number in the second."""
    images = torch.zeros(classes * each, 1, side, side, dtype=torch.uint8)
    labels = torch.arange(classes).repeat_interleave(each)[torch.randperm(classes * each)]
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    for c in range(classes):
        images[labels == c, 0, 0, 1] = torch.arange(each, dtype=torch.uint8)
    return LabelledImages(images, labels, tuple(map(str, range(classes))))


# ---- sequences -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", ["one-hot", "strings"])
def test_what_a_sequence_holds(labels):
    sequences = Sequences(toy(), classes=4, presentations=5, labels=labels, side=8, seed=3, length=50)
    bindings, orders = set(), set()
    for sequence in sequences:
        classes, numbers = (255 * sequence.inputs[:, :2]).round().long().T
        assert sequence.inputs.shape == (20, 64) and sequence.inputs.dtype == torch.float32
        assert len(set(zip(classes.tolist(), numbers.tolist()))) == 20  # no image twice
        symbols = [tuple(s) for s in sequence.symbols.tolist()]
        pairs = set(zip(classes.tolist(), symbols))
        assert len(pairs) == len(set(symbols)) == len(set(classes.tolist())) == 4  # a label for each class, and no other has it
        assert all(len(s) == (1 if labels == "one-hot" else 5) and max(s) < (4 if labels == "one-hot" else 5) for s in symbols)
        seen = dict.fromkeys(classes.tolist(), 0)
        for c, k in zip(classes.tolist(), sequence.presentation.tolist()):
            assert seen[c] == k
            seen[c] += 1
        bindings.add(tuple(sorted(pairs)))
        orders.add(tuple(symbols))
    assert len(bindings) > 45 and len(orders) == 50


def test_sequences_follow_from_seed_and_number():
    def draw(seed, number):
        return Sequences(toy_data, classes=3, presentations=4, side=8, seed=seed, length=10, distortion=0.5)[number]
    toy_data = toy()
    first = draw(1, 4)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(1, 4)))
    assert not torch.equal(first.inputs, draw(1, 5).inputs) and not torch.equal(first.inputs, draw(2, 4).inputs)
    batch = Sequences(toy_data, classes=3, presentations=4, side=8, seed=1, length=10, distortion=0.5).batch([2, 4])
    assert all(torch.equal(a[:, 1], b) for a, b in zip(batch, first))
    assert batch.inputs.shape == (12, 2, 64) and batch.symbols.shape == (12, 2, 1) and batch.presentation.shape == (12, 2)


def test_classes_of_different_size():
    """The classes with few images are drawn as often, and lend no image of another class."""
    full = toy(classes=4, each=6)
    keep = ~((full.labels == 2) & (full.images[:, 0, 0, 1] > 2))
    small = LabelledImages(full.images[keep], full.labels[keep], full.names)
    for sequence in Sequences(small, classes=4, presentations=3, side=8, length=30):
        classes, numbers = (255 * sequence.inputs[:, :2]).round().long().T
        assert torch.bincount(classes).tolist() == [3] * 4
        assert set(numbers[classes == 2].tolist()) == {0, 1, 2}


def test_resized_to_the_mean_over_areas():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    sequences = Sequences(LabelledImages(images, torch.zeros(1, dtype=torch.long), ("a",)), classes=1, presentations=1, side=4)
    expected = images.float().view(4, 2, 4, 2).mean((1, 3)).round() / 255
    torch.testing.assert_close(sequences[0].inputs, expected.view(1, 16))


def test_label_vectors():
    assert label_vectors(torch.tensor([[1], [0]]), 3).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert label_vectors(torch.tensor([[1, 0]]), 2).tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("settings, message", [
    (dict(classes=0), "sequences: classes must be at least 1, got 0"),
    (dict(presentations=7), "sequences: 7 presentations need as many images a class, class 0 has 6"),
    (dict(classes=8), "sequences: 8 classes in a sequence, the set has 7"), (dict(seed=-1), "sequences: the seed must not be negative, got -1"),
    (dict(labels="words"), "sequences: labels must be one of 'one-hot', 'strings', got 'words'")])
def test_impossible_sequences(settings, message):
    with pytest.raises(ValueError) as error:
        Sequences(toy(), **{"classes": 3, "presentations": 4, **settings})
    assert str(error.value) == message


# ---- training ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("labels", ["one-hot", "strings"])
def test_a_step_is_adam_on_the_mean_cross_entropy(tmp_path, labels):
    """Written out with autograd alone, the clipping included."""
    split = data.load("glyphs")
    config = MANNConfig(**{**TINY, "steps": 1}, labels=labels, clip=0.1)
    train(config, split, tmp_path)
    model = build(config)
    batch = Sequences(split.train, classes=3, presentations=4, labels=labels, side=7).batch(range(4))
    kinds, groups = (3, 1) if labels == "one-hot" else (5, 5)
    logits, _ = model(batch.inputs, label_vectors(batch.symbols, kinds))
    loss = sum(cross_entropy(logits[t, b, kinds * g:kinds * (g + 1)], batch.symbols[t, b, g]) for t in range(12) for b in range(4)
               for g in range(groups)) / 48
    loss.backward()
    norm = sum((p.grad**2).sum() for p in model.parameters())**0.5
    assert norm > 0.1
    for parameter in model.parameters():
        parameter.grad *= 0.1 / norm
    torch.optim.Adam(model.parameters(), config.lr).step()
    trained = load_checkpoint(tmp_path)["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=2e-5, rtol=1e-3)
    line, = log_of(tmp_path)
    assert line["loss"] == pytest.approx(loss.item(), abs=1e-4)
    right = (logits.unflatten(-1, (groups, kinds)).argmax(-1) == batch.symbols).all(-1)
    assert line["accuracy"] == pytest.approx(right.double().mean().item(), abs=1e-4)
    assert line["presentations"] == pytest.approx([right[batch.presentation == k].double().mean().item() for k in range(4)], abs=1e-4)


def test_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    assert main(["train", "mann", *ARGUMENTS, "--strength", "learned", "--out", str(tmp_path / "whole")]) == 0
    cut = tmp_path / "cut"
    process = spawn_cli("train", "mann", *ARGUMENTS, "--steps", 2000, "--strength", "learned", "--out", tmp_path / "long")
    while not (tmp_path / "long" / "log.jsonl").exists() or not log_of(tmp_path / "long"):
        assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGINT)
    output = finish(process, 128 + signal.SIGINT)
    assert f"go on with: fastmeta train mann --out {tmp_path / 'long'} --resume" in output
    # A stop in the middle of the very same run, from inside.
    config = MANNConfig(**TINY, strength="learned")
    split = data.load("glyphs")
    drawn = Sequences.batch

    def interrupt(sequences, numbers):
        if numbers[0] == 4 * 6:
            signal.raise_signal(signal.SIGINT)
        return drawn(sequences, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sequences, "batch", interrupt)
        assert train(config, split, cut) == signal.SIGINT
    assert 7 <= load_checkpoint(cut)["step"] < 10
    assert train(config, split, cut, resume=True) == 0
    whole, resumed = load_checkpoint(tmp_path / "whole"), load_checkpoint(cut)
    assert_equal_state(resumed["model"], whole["model"])
    assert log_of(cut) == log_of(tmp_path / "whole")


def test_two_processes_do_what_one_does(tmp_path):
    train(MANNConfig(**TINY), data.load("glyphs"), tmp_path / "one")
    finish(spawn_cli("--standalone", "--nproc-per-node", 2, "-m", "fastmeta", "train", "mann", *ARGUMENTS, "--out", tmp_path / "two",
                     module=("torch.distributed.run",)), 0)
    one, two = load_checkpoint(tmp_path / "one")["model"], load_checkpoint(tmp_path / "two")["model"]
    for key in one:
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-3, msg=lambda text: f"{key}: {text}")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-4)


def test_it_learns(tmp_path):
    """Four classes, each with ink in a corner of its own, two of them in an episode with labels bound at random: known once shown."""
    labels = torch.arange(4).repeat_interleave(8)
    images = torch.randint(60, (32, 1, 4, 4)).byte()
    for c in range(4):
        images[labels == c, :, 2 * (c // 2):2 * (c // 2) + 2, 2 * (c % 2):2 * (c % 2) + 2] += 180
    corners = LabelledImages(images, labels, tuple("abcd"))
    config = MANNConfig(classes=2, presentations=5, hidden_size=32, memory_slots=16, memory_width=8, read_heads=2, steps=800, lr=1e-2, side=4,
                        validation_classes=1, eval_every=400)
    assert train(config, Split(corners, corners, corners), tmp_path) == 0
    model, _ = load_model(tmp_path)
    each = evaluate_presentations(model, corners, config, episodes=200)
    assert len(each) == 5 and 0.4 < each[0].mean < 0.8 and min(a.mean for a in each[1:]) > 0.9
    watched = [line["validation"] for line in log_of(tmp_path) if "validation" in line]
    assert len(watched) == 2 and len(watched[0]) == 5


def test_configurations_are_not_mixed(tmp_path):
    split = data.load("glyphs")
    train(MANNConfig(**{**TINY, "steps": 1}), split, tmp_path)
    with pytest.raises(ValueError, match="holds another run: it trains mann"):
        train(MatchingConfig(), split, tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds another run: preset is 'snowkylin' there, 'paper' here"):
        train(MANNConfig(**{**TINY, "steps": 1}, preset="paper"), split, tmp_path, resume=True)


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps must be at least 1, got 0"), (dict(network="gru"), "network must be one of 'mann', 'lstm', got 'gru'"),
    (dict(clip=-1), "clip must not be negative, got -1"), (dict(eval_every=5), "eval_every needs classes to evaluate on")])
def test_senseless_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        MANNConfig(**settings)


# ---- evaluation ----------------------------------------------------------------------------------------------------------------------

class Knows(torch.nn.Module):
    """Reads the class from the first pixel, and knows a label from the second presentation on; says 0 at the first."""

    def forward(self, inputs, vectors):
        kinds = vectors.shape[-1]
        logits = torch.zeros(*inputs.shape[:2], kinds)
        classes = (255 * inputs[..., 0]).round().long()
        for b in range(inputs.shape[1]):
            known = {}
            for t in range(len(inputs)):
                c = classes[t, b].item()
                logits[t, b, known.get(c, 0)] = 1
                known[c] = vectors[t, b].argmax().item()
        return logits, None


def test_accuracy_by_presentation():
    config = MANNConfig(**{**TINY, "side": 8})
    each = evaluate_presentations(Knows(), toy(), config, episodes=40)
    assert [a.mean for a in each] == pytest.approx([1 / 3, 1, 1, 1]) and all(a.episodes == 40 for a in each)
    assert each[0].interval == 0  # in each episode one class of three has label 0


def test_pixels_baseline():
    """Images that are alike within a class alone: right whenever the class was shown before."""
    images = torch.zeros(21, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(7).repeat_interleave(3)
    images[torch.arange(21), 0, 0, labels] = 200
    each = evaluate_presentations_pixels(LabelledImages(images, labels, tuple("abcdefg")), MANNConfig(**{**TINY, "presentations": 3, "side": 8}),
                                         episodes=20)
    assert [a.mean for a in each] == [0, 1, 1]


def test_by_presentation():
    right = torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)
    presentation = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    assert by_presentation(right, presentation, 2).int().tolist() == [[[1, 0], [1, 1]], [[0, 1], [0, 0]]]


def test_train_and_evaluate_on_the_command_line(tmp_path, capsys):
    for name, more in (("first", ["--preset", "tristandeleu"]), ("second", ["--network", "lstm"])):
        assert main(["train", "mann", *ARGUMENTS, *more, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    picture = tmp_path / "deep" / "curves.png"
    assert main(["evaluate", str(tmp_path / "first"), str(tmp_path / "second" / "checkpoint.pt"), "--episodes", "20", "--baseline", "--plot",
                 str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("3 classes, 4 presentations of each, one-hot labels, ") and lines[1].endswith("unseen classes, seed 0, 20 episodes")
    assert lines[2].split() == ["presentation", "mann", "pixels"] and lines[9].split() == ["presentation", "lstm", "pixels"]
    assert [line.split()[0] for line in lines[3:7]] == ["1", "2", "3", "4"]
    assert lines[-1] == f"{picture} written" and picture.stat().st_size > 10000
    assert isinstance(load_model(tmp_path / "second")[0], nn.LSTMBaseline)
    # Strings have a label of the same size for any number of classes.
    assert main(["train", "mann", *ARGUMENTS, "--labels", "strings", "--out", str(tmp_path / "strings")]) == 0
    assert main(["evaluate", str(tmp_path / "strings"), "--episodes", "5", "--classes", "6", "--presentations", "2", "--layers", "reference"]) == 0
    assert "6 classes, 2 presentations of each, strings labels" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["evaluate", "RUN", "--way", "5"], "--way has no meaning for RUN: it holds mann"),
    (["evaluate", "RUN", "--classes", "4"], "--classes must be 3, as in training: one-hot labels have a place for each class"),
    (["evaluate", "RUN", "--presentations", "30"], "sequences: 30 presentations need as many images a class, class 0 has 20"),
    (["evaluate", "RUN", "--plot", "x.txt"], "x.txt: a picture ends in .png, .pdf or .svg"),
    (["train", "matching", "--out", "RUN", "--resume"], "RUN holds another run: it trains mann"),
    (["train", "mann", "--read-heads", "200", "--out", "new"], "read_heads must be at most memory_slots = 128, got 200")])
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    train(MANNConfig(**{**TINY, "steps": 1}), data.load("glyphs"), tmp_path / "RUN")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmeta: ") and error.count("\n") == 1 and message in error


def test_demo(tmp_path, monkeypatch, capsys):
    """The whole of it, with little training; how long it really takes is in the README."""
    from fastmeta.training import demo
    monkeypatch.setattr(demo, "MANN_CONFIG", MANNConfig(**TINY))
    monkeypatch.setattr(demo, "MANN_EPISODES", 10)
    picture = tmp_path / "demo.png"
    assert main(["demo", "mann", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    for part in ("episodes of 3 classes and 12 images", "presentation 4", "nearest in pixels so far", "4x 12 steps", " ms", "written"):
        assert part in output
    assert picture.stat().st_size > 10000


def test_omniglot_split_is_where_the_data_is():
    """The real data, where it is: 20 x 20 pixels, ink 1 on 0."""
    try:
        split = data.load("omniglot")
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    assert isinstance(split, Split)
    sequence = Sequences(split.test, classes=5)[0]
    assert sequence.inputs.shape == (50, 400)
    assert 0.02 < sequence.inputs.mean() < 0.3 and np.isclose(sequence.inputs.min(), 0)
