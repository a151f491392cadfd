"""Training and evaluation of Meta Networks."""

import io
import math
import signal
import time
from dataclasses import replace

import pytest
import torch
from helpers import assert_equal_state, finish, log_of, spawn_cli
from torch.nn.functional import cross_entropy

from fastmeta import data
from fastmeta.cli import main
from fastmeta.data import Episodes, LabelledImages, Split
from fastmeta.training import (MatchingConfig, MetaNetConfig, build, evaluate, evaluation, load_checkpoint, load_model, train)
from fastmeta.training.matching import MatchingRun
from fastmeta.training.metanet import MetaNetRun
from fastmeta.training.progress import Progress

TINY = dict(way=3, shot=2, queries=2, episodes_per_batch=2, steps=12, channels=2, blocks=2, hidden=5, generator_width=3, embedding_steps=4)
ARGUMENTS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


pytestmark = pytest.mark.usefixtures("one_thread")


def squares(classes=6, each=8):
    """A class is where its white square lies, in noise."""
    images = torch.randint(60, (classes * each, 1, 28, 28)).byte()
    labels = torch.arange(classes).repeat_interleave(each)
    for c in range(classes):
        images[labels == c, :, 9 * (c // 3):9 * (c // 3) + 9, 9 * (c % 3):9 * (c % 3) + 9] += 180
    return LabelledImages(images, labels, tuple(map(str, range(classes))))


# ---- training ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
def test_steps_are_adam_on_the_clipped_cross_entropy(tmp_path, second_order):
    """Two steps written out with autograd alone, of which the first is clipped."""
    split = data.load("glyphs")
    config = MetaNetConfig(**{**TINY, "steps": 2}, clip=4, second_order=second_order)
    train(config, split, tmp_path)
    model = build(config)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    episodes = Episodes(split.train.images, split.train.labels, way=3, shot=2, queries=2)
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    norms = []
    for step, rate in ((1, 1e-3), (2, 0.5e-3)):  # half a cosine
        logits = [model(e.support, e.support_labels, e.query) for e in (episodes[2 * step - 2], episodes[2 * step - 1])]
        loss = sum(cross_entropy(each[q], torch.tensor(q // 2)) for each in logits for q in range(6)) / 12
        model.zero_grad()
        (6 * loss).backward()  # the sum over the queries of an episode
        norms.append(math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None)))
        for name, p in model.named_parameters():
            if p.grad is None:
                assert name == "embedding.output.weight" and not second_order
                continue
            gradient = p.grad * min(1, 4 / norms[-1])
            first, second = moments[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            p.data -= rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        line = log_of(tmp_path)[step - 1]
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-5)
        right = sum((each.argmax(-1) == torch.arange(3).repeat_interleave(2)).sum().item() for each in logits)
        assert line["accuracy"] == pytest.approx(right / 12, abs=1e-5)
    assert norms[0] > 4.2 and norms[1] < 3.8  # so that clipping at 4 shows, and so does the mean instead of the sum
    checkpoint = load_checkpoint(tmp_path)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        trained, first = checkpoint["model"][name], moments[name][0]
        if not second_order and name == "embedding.output.weight":
            assert torch.equal(trained, start[name])
            continue
        torch.testing.assert_close(checkpoint["optimizer"]["state"][index]["exp_avg"], first, atol=1e-4 * first.abs().max().item() + 1e-7, rtol=0,
                                   msg=lambda text: f"{name}: {text}")
        clear = first.abs() > 1e-5  # Adam makes a step even of a gradient that is nothing but rounding
        torch.testing.assert_close(trained[clear], parameter.detach()[clear], atol=1e-5, rtol=0, msg=lambda text: f"{name}: {text}")


def test_killed_and_interrupted_run_ends_like_an_uninterrupted_one(tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = ["--steps", "36"]
    assert main(["train", "metanet", *ARGUMENTS, *steps, "--distortion", "0.5", "--out", str(whole)]) == 0
    process = spawn_cli("train", "metanet", *ARGUMENTS, *steps, "--distortion", 0.5, "--checkpoint-every", 7, "--out", cut)
    while not (cut / "log.jsonl").exists() or (cut / "log.jsonl").read_text().count("\n") < 10:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(.002)
    process.kill()
    finish(process, -signal.SIGKILL)
    killed_at = load_checkpoint(cut)["step"]
    assert 7 <= killed_at < 30
    drawn = Episodes.batch

    def interrupt(episodes, numbers):
        if numbers[0] == 2 * (killed_at + 4):
            signal.raise_signal(signal.SIGINT)
        return drawn(episodes, numbers)

    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Episodes, "batch", interrupt)
        assert main(["train", "metanet", "--resume", "--out", str(cut)]) == 128 + signal.SIGINT
    output = capsys.readouterr().out
    assert f"stopped after step {killed_at + 5} of 36" in output or f"stopped after step {killed_at + 6} of 36" in output
    assert f"go on with: fastmeta train metanet --out {cut} --resume" in output
    assert main(["train", "metanet", "--resume", "--out", str(cut)]) == 0
    assert f"now: fastmeta evaluate {cut}" in capsys.readouterr().out
    assert_equal_state(load_checkpoint(cut)["model"], load_checkpoint(whole)["model"])
    assert log_of(cut) == log_of(whole) and [line["step"] for line in log_of(cut)] == list(range(1, 37))


def test_two_processes_do_what_one_does(tmp_path):
    """To first order: the embedding's classifier has no gradient, for which DistributedDataParallel must not wait."""
    train(MetaNetConfig(**{**TINY, "steps": 3, "episodes_per_batch": 4}), data.load("glyphs"), tmp_path / "one")
    finish(spawn_cli("--standalone", "--nproc-per-node", 2, "-m", "fastmeta", "train", "metanet", *ARGUMENTS, "--steps", 3,
                     "--episodes-per-batch", 4, "--out", tmp_path / "two", module=("torch.distributed.run",)), 0)
    one, two = load_checkpoint(tmp_path / "one"), load_checkpoint(tmp_path / "two")
    # Adam's mean of the gradients: a weight whose gradient is nothing but rounding moves anywhere.
    means = [{key: state["exp_avg"] for key, state in run["optimizer"]["state"].items()} for run in (one, two)]
    assert means[0].keys() == means[1].keys() and len(means[0]) == len(one["model"]) - 1
    for key, mean in means[0].items():
        assert mean.any()
        torch.testing.assert_close(means[1][key], mean, atol=1e-4 * mean.abs().max().item() + 1e-8, rtol=0, msg=lambda text: f"{key}: {text}")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, abs=2e-4)


def test_it_learns_and_tells(tmp_path, capsys):
    images = squares()
    config = MetaNetConfig(way=2, queries=4, episodes_per_batch=4, steps=60, lr=1e-2, channels=4, blocks=3, hidden=16, generator_width=8,
                           validation_classes=1, eval_every=60)
    assert train(config, Split(images, images, images), tmp_path) == 0
    model, stored = load_model(tmp_path)
    after = evaluate(model, images, way=2, shot=1, queries=4, episodes=50)
    assert stored == config and not model.training
    assert after.mean > 0.9
    watched = [line["validation"] for line in log_of(tmp_path) if "validation" in line]
    assert watched == [pytest.approx(after.mean, abs=0.05)]
    assert "step 60/60  loss" in (output := capsys.readouterr().out) and "held-out classes" in output


def test_reference_and_fast_layers_train_alike(tmp_path):
    for layers in ("fast", "reference"):
        train(MetaNetConfig(**{**TINY, "steps": 2}, layers=layers), data.load("glyphs"), tmp_path / layers)
    for a, b in zip(log_of(tmp_path / "fast"), log_of(tmp_path / "reference"), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert type(load_model(tmp_path / "reference")[0]) is not type(load_model(tmp_path / "reference", "fast")[0])


def test_runs_are_not_mixed(tmp_path):
    split = data.load("glyphs")
    train(MetaNetConfig(**{**TINY, "steps": 1}), split, tmp_path)
    with pytest.raises(ValueError, match="holds another run: it trains metanet"):
        train(MatchingConfig(), split, tmp_path, resume=True)
    with pytest.raises(ValueError, match="holds another run: second_order is False there, True here"):
        train(MetaNetConfig(**{**TINY, "steps": 1}, second_order=True), split, tmp_path, resume=True)


@pytest.mark.parametrize("settings, message", [
    (dict(way=0), "way must be at least 1, got 0"), (dict(shot=-1), "shot must be at least 1, got -1"),
    (dict(queries=0), "queries must be at least 1, got 0"), (dict(episodes_per_batch=0), "episodes_per_batch must be at least 1, got 0"),
    (dict(steps=0), "steps must be at least 1, got 0"), (dict(clip=-1), "clip must not be negative, got -1"),
    (dict(eval_every=5), "eval_every needs classes to evaluate on")])
def test_senseless_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        MetaNetConfig(**settings)


# ---- evaluation ----------------------------------------------------------------------------------------------------------------------

def test_evaluation_counts_the_queries_of_single_episodes():
    images, model = squares(), build(MetaNetConfig(**TINY))
    shares = []
    for episode in Episodes(images.images, images.labels, way=3, shot=1, queries=5, seed=7, length=8):
        predicted = model(episode.support, episode.support_labels, episode.query).argmax(-1).tolist()
        shares.append(sum(p == q // 5 for q, p in enumerate(predicted)) / 15)
    mean = sum(shares) / 8
    deviation = math.sqrt(sum((share - mean)**2 for share in shares) / 7)
    assert 0.1 < mean < 0.9 and deviation > 0
    accuracy = evaluate(model, images, way=3, shot=1, queries=5, episodes=8, seed=7)
    assert accuracy == pytest.approx((mean, 1.96 * deviation / math.sqrt(8), 8)) and model.training


def test_way_is_that_of_the_training():
    with pytest.raises(ValueError, match="^way must be 3, as in training, got 4: a Meta Network has an output for each class$"):
        evaluate(build(MetaNetConfig(**TINY)), squares(), way=4, shot=1, queries=1, episodes=1)


def test_attention_is_what_the_networks_attend_with():
    """It gives back their answers: of a Meta Network by fast weights read with it, of a Matching Network by labels."""
    images = squares()
    episode = Episodes(images.images.double() / 255, images.labels, way=3, shot=2, queries=1)[0]
    model = build(MetaNetConfig(**TINY, layers="reference")).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # the start has hardly any fast weights
    weights = MetaNetRun.attention(model, episode)
    assert weights.shape == (3, 6) and (weights.max(1).values - weights.min(1).values).min() > 1e-3
    memory = [model.base_generator(model.gradient(model.base, *each)) for each in zip(episode.support.split(1), episode.support_labels.split(1))]
    logits = [model.base(image, {name: sum(a * row[name] for a, row in zip(line, memory)) for name in memory[0]})
              for image, line in zip(episode.query.split(1), weights)]
    torch.testing.assert_close(torch.cat(logits), model(episode.support, episode.support_labels, episode.query))

    matching = build(MatchingConfig(channels=4, scale=3, layers="reference")).double().eval()
    weights = MatchingRun.attention(matching, episode)
    torch.testing.assert_close((weights @ torch.eye(3, dtype=torch.float64)[episode.support_labels]).log(),
                               matching(episode.support, episode.support_labels, episode.query))


# ---- progress ------------------------------------------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def shown(file, **options):
        now[0] = 100.0
        progress = Progress("episode", 100, file=file, **options)
        for done in range(1, 101):
            now[0] += 0.5
            progress.show(done, "so far")
        progress.end()
        return file.getvalue()

    lines = shown(io.StringIO()).splitlines()
    assert len(lines) == 25 and lines[0] == "episode 4/100  so far  2.0 episodes/s  0:48 left "
    assert lines[-1] == "episode 100/100  so far  2.0 episodes/s  0:00 left "
    assert shown(io.StringIO(), quiet=45).splitlines()[0].startswith("episode 90/100")
    assert shown(io.StringIO(), quiet=51) == shown(Terminal(), quiet=51) == shown(Terminal(), enabled=False) == ""
    written = shown(Terminal(), quiet=10)
    assert written.count("\r") == 81 and written.endswith("left \n") and written.count("\n") == 1
    assert "16.0 episodes/s" in shown(io.StringIO(), episodes=8)


# ---- the command line ----------------------------------------------------------------------------------------------------------------

def test_train_and_evaluate_on_the_command_line(tmp_path, capsys, monkeypatch):
    run, picture = tmp_path / "run", tmp_path / "deep" / "picture.png"
    assert main(["train", "metanet", *ARGUMENTS, "--second-order", "--steps", "4", "--out", str(run)]) == 0
    assert load_checkpoint(run)["config"] == vars(MetaNetConfig(**{**TINY, "steps": 4}, second_order=True))
    capsys.readouterr()
    monkeypatch.setattr(evaluation, "Progress", lambda *arguments, quiet, **options: Progress(*arguments, **options))
    assert main(["evaluate", str(run), "--episodes", "20", "--baseline", "--plot", str(picture)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0].startswith("3-way 2-shot, 15 queries a class, ") and lines[0].endswith(" unseen classes, seed 0")
    assert lines[1].startswith("meta network       ") and lines[2].startswith("nearest in pixels  ") and "% (20 episodes)" in lines[2]
    assert lines[3:] == [f"{picture} written"] and picture.stat().st_size > 10000
    assert printed.err.splitlines()[-1].startswith(f"episode 20/20  accuracy {float(lines[1].split()[2][:-1]):5.1f}%  ")
    task = ["--way", "3", "--shot", "1", "--queries", "3", "--episodes", "4"]
    results = []
    for layers in ("fast", "reference"):
        assert main(["evaluate", str(run), *task, "--test-rotations", "--layers", layers]) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1] and "3-way 1-shot, 3 queries a class, " in results[0]


@pytest.mark.parametrize("arguments, message", [
    (["evaluate", "RUN", "--way", "5"], "way must be 3, as in training, got 5: a Meta Network has an output for each class"),
    (["evaluate", "RUN", "--classes", "3"], "--classes has no meaning for RUN: it holds metanet"),
    (["evaluate", "RUN", "--shot", "19"], "19 supports and 15 queries of each class need 34 images a class"),
    (["evaluate", "RUN", "--plot", "x.txt"], "x.txt: a picture ends in .png, .pdf or .svg"),
    (["evaluate", "RUN", "RUN", "--plot", "x.png"], "--plot draws one run, or several of mann; got metanet, metanet"),
    (["train", "mann", "--out", "RUN", "--resume"], "RUN holds another run: it trains metanet"),
    (["train", "metanet", "--out", "RUN"], "RUN holds a run already: go on with --resume"),
    (["train", "metanet", "--out", "RUN", "--resume", "--hidden", "9"], "RUN holds another run: hidden is 5 there, 9 here"),
    (["train", "metanet", "--hidden", "0", "--out", "new"], "MetaNetwork: hidden must be an integer of at least 1, got 0")])
def test_mistakes(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    train(MetaNetConfig(**{**TINY, "steps": 1}), data.load("glyphs"), tmp_path / "RUN")
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastmeta: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "new").exists()


def test_demo(tmp_path, monkeypatch, capsys):
    """The whole of it, with little training; how long it really takes is in the README."""
    from fastmeta.training import demo
    monkeypatch.setattr(demo, "METANET_CONFIG", replace(MetaNetConfig(**TINY), steps=6, validation_classes=50, eval_every=6))
    monkeypatch.setattr(demo, "METANET_TESTS", ((3, 10),))
    picture = tmp_path / "demo.png"
    assert main(["demo", "metanet", "--out", str(picture)]) == 0
    output = capsys.readouterr().out
    for part in ("3-way 2-shot episodes", "50 to watch", "meta network", "nearest in pixels", "3-way 2-shot, 6 queries, 2 channels", " ms",
                 "written"):
        assert part in output
    assert picture.stat().st_size > 10000
