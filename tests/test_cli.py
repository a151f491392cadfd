"""The command line: what it prints, and that a mistake of the user's is one clear line and status 2."""

import subprocess

import pytest
from helpers import spawn_python

from fastmeta import __version__, _backend, data
from fastmeta.cli import main
from fastmeta.training import MatchingConfig, load_checkpoint, train

TINY = ["--way", "5", "--queries", "2", "--channels", "8", "--steps", "2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(MatchingConfig(way=5, queries=2, channels=8, steps=2), data.load("glyphs"), folder)
    return folder


def test_train_then_evaluate(tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert main(["train", "matching", *TINY, "--no-learn-scale", "--scale", "12", "--normalize", "support", "--out", str(out)]) == 0
    assert f"now: fastmeta evaluate {out}" in capsys.readouterr().out
    config = load_checkpoint(out)["config"]
    assert (config["scale"], config["normalize"], config["rotations"], config["steps"]) == (12, "support", False, 2)
    task = ["--way", "4", "--queries", "3", "--episodes", "10"]
    assert main(["evaluate", str(out), *task, "--baseline"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("4-way 1-shot, 3 queries a class, ") and "unseen classes, seed 0" in lines[0]
    assert lines[1].startswith("matching network ") and lines[2].startswith("nearest in pixels ") and "% (10 episodes)" in lines[2]
    classes = int(lines[0].split(", ")[2].split()[0])
    assert main(["evaluate", str(out / "checkpoint.pt"), *task, "--test-rotations", "--layers", "reference"]) == 0
    assert f" {4 * classes} unseen classes" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, message", [
    (["evaluate", "nowhere"], "no checkpoint nowhere"),
    (["evaluate", __file__], "is not a checkpoint"),
    (["evaluate", "RUN", "--way", "5000"], "5000-way episodes need 5000 classes, the set has"),
    (["evaluate", "RUN", "--shot", "5", "--queries", "16"], "need 21 images a class, class 0 has 20"),
    (["evaluate", "RUN", "--episodes", "0"], "length must be at least 1, got 0"),
    (["evaluate", "RUN", "--data", "omniglot", "--data-root", "nowhere"], "in nowhere; name their folder with --data-root"),
    (["train", "matching", *TINY, "--out", "RUN"], "holds a run already: go on with --resume"),
    (["train", "matching", "--resume", "--seed", "5", "--out", "RUN"], "holds another run: seed is 0 there, 5 here"),
    (["train", "matching", *TINY, "--fce-steps", "3", "--out", "NEW"], "fce_steps has no meaning without fce"),
    (["train", "matching", *TINY, "--eval-every", "3", "--out", "NEW"], "eval_every needs classes to evaluate on"),
    (["train", "matching", *TINY, "--checkpoint-every", "0", "--out", "NEW"], "checkpoint_every must be at least 1, got 0"),
    (["train", "matching", *TINY, "--validation-classes", "800", "--out", "NEW"], "800 training classes, 800 of them for validation"),
    (["train", "matching", "--steps", "0", "--out", "NEW"], "steps must be at least 1, got 0"),
    (["train", "matching", *TINY, "--out", __file__], "Not a directory"),
    (["bench-report", "nowhere.json"], "nowhere.json"),
    (["demo", "--out", "picture.xyz"], "picture.xyz: a picture ends in .png, .pdf or .svg")])
def test_mistakes(run, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([{"RUN": str(run), "NEW": "new"}.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmeta: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "required: COMMAND"), (["train", "resnet"], "invalid choice: 'resnet'"), (["train", "matching"], "required: --out"),
    (["train", "matching", "--layers", "quick", "--out", "x"], "--layers: invalid choice: 'quick'"),
    (["train", "matching", "--seed", "-1", "--out", "x"], "--seed: must not be negative"),
    (["evaluate", "x", "--way", "five"], "--way: invalid int value: 'five'")])
def test_words_it_does_not_know(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_download_and_rotations_go_with_omniglot(tmp_path, monkeypatch, capsys):
    """Omniglot is not here: what is asked of it shows."""
    asked = []
    monkeypatch.setattr(data.omniglot, "download", lambda root: asked.append(root) or root)
    monkeypatch.setattr(data.omniglot, "load", lambda root: asked.append(root) or data.glyphs.load())
    monkeypatch.setattr(data, "TRAIN_CLASSES", {"omniglot": 40})
    out = tmp_path / "run"
    assert main(["train", "matching", *TINY, "--data", "omniglot", "--data-root", "here", "--download", "--out", str(out)]) == 0
    assert [str(root) for root in asked] == ["here", "here"]
    assert load_checkpoint(out)["config"]["rotations"] is True
    assert f"now: fastmeta evaluate {out} --data-root here" in capsys.readouterr().out


def test_info_and_version(capsys):
    assert main(["info"]) == 0
    assert "torch" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"fastmeta {__version__}\n"


def test_as_a_module():
    process = spawn_python("-m", "fastmeta", "evaluate", "nowhere", stderr=subprocess.PIPE)
    assert (process.communicate()[1], process.returncode) == ("fastmeta: no checkpoint nowhere\n", 2)


@pytest.mark.parametrize("missing", [None, "ImportError: not built"])
def test_demo(tmp_path, monkeypatch, capsys, missing):
    """The whole of it, with little training; how long it really takes is in the README."""
    from PIL import Image

    from fastmeta.training import demo
    monkeypatch.setattr(demo, "CONFIG", MatchingConfig(way=5, queries=2, channels=8, steps=20, validation_classes=100, eval_every=10))
    monkeypatch.setattr(demo, "TESTS", ((5, 20), (20, 5)))
    monkeypatch.setattr(_backend, "missing", missing)
    picture = tmp_path / "deep" / "demo.png"
    assert main(["demo", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    for part in ("700 characters to train on, 100 to watch", " 5-way 1-shot", "20-way 1-shot", "nearest in pixels", "32x 5-way, 10 queries",
                 " ms", "written"):
        assert part in output
    assert ("so fast is the reference too: ImportError: not built" in output) == (missing is not None)
    with Image.open(picture) as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(2 ** 20)) > 50
