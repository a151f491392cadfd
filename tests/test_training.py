"""Training runs: what they learn, that a kill changes nothing, that processes share the work, and what evaluation counts."""

import json
import math
import signal
import time

import pytest
import torch
from helpers import assert_equal_state, finish, log_of, spawn_cli
from torch import nn

from fastmeta import data
from fastmeta import nn as fast
from fastmeta.data import Episodes, LabelledImages, Split
from fastmeta.training import (MatchingConfig, build, evaluate, evaluate_pixels, load_checkpoint, load_model, run,
                               save_checkpoint, train)
from fastmeta.training.evaluation import _accuracy

TINY = dict(way=5, queries=2, channels=8, steps=60)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_and_interrupted_run_ends_like_an_uninterrupted_one(tmp_path):
    config = MatchingConfig(**TINY, fce=True, fce_steps=2, learn_scale=True, episodes_per_batch=2, distortion=1.0, seed=3)
    assert train(config, data.load("glyphs"), tmp_path / "whole") == 0

    cut = tmp_path / "cut"
    command = ["train", "matching", "--way", 5, "--queries", 2, "--channels", 8, "--steps", 60, "--fce", "--fce-steps", 2, "--learn-scale",
               "--episodes-per-batch", 2, "--distortion", 1, "--seed", 3, "--checkpoint-every", 7, "--out", cut]

    torn = '{"step": 60, "lo'

    def wait_for(step, process):
        log = cut / "log.jsonl"
        while not log.exists() or torn in log.read_text() or log.read_text().count("\n") < step:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(.002)

    process = spawn_cli(*command)
    wait_for(10, process)
    process.kill()
    finish(process, -signal.SIGKILL)
    killed_at = load_checkpoint(cut)["step"]
    assert 7 <= killed_at < 50
    with open(cut / "log.jsonl", "a") as log:
        log.write('{"step": 59, "loss": 0.1}\n' + torn)  # lines of steps that no checkpoint has, the last one torn

    process = spawn_cli("train", "matching", "--resume", "--out", cut)  # the settings come from the checkpoint
    wait_for(killed_at + 4, process)
    process.send_signal(signal.SIGINT)
    output = finish(process, 128 + signal.SIGINT)
    stopped_at = load_checkpoint(cut)["step"]
    assert killed_at < stopped_at < 60
    assert f"stopped after step {stopped_at} of 60" in output and f"--out {cut} --resume" in output

    finish(spawn_cli(*command, "--resume"), 0)
    whole, resumed = load_checkpoint(tmp_path / "whole"), load_checkpoint(cut)
    assert resumed["step"] == whole["step"] == 60
    assert_equal_state(resumed["model"], whole["model"])
    assert log_of(cut) == log_of(tmp_path / "whole") and [line["step"] for line in log_of(cut)] == list(range(1, 61))


def test_two_processes_do_what_one_does(tmp_path):
    config = MatchingConfig(**{**TINY, "steps": 8}, episodes_per_batch=4, lr=1e-3)
    train(config, data.load("glyphs"), tmp_path / "one")
    arguments = ["train", "matching", "--way", 5, "--queries", 2, "--channels", 8, "--steps", 8, "--lr", 1e-3, "--episodes-per-batch", 4]
    finish(spawn_cli("--standalone", "--nproc-per-node", 2, "-m", "fastmeta", *arguments, "--out", tmp_path / "two",
                 module=("torch.distributed.run",)), 0)
    one, two = load_checkpoint(tmp_path / "one")["model"], load_checkpoint(tmp_path / "two")["model"]
    start = build(config).state_dict()
    for key in one:  # running statistics too
        assert (one[key] - start[key]).abs().max() > 1e-3, key
        torch.testing.assert_close(two[key], one[key], atol=2e-5, rtol=1e-4, msg=lambda text: f"{key}: {text}")
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert a == pytest.approx(b, abs=2e-4)
    assert len(log_of(tmp_path / "two")) == 8


def test_a_step_is_adam_on_the_mean_over_its_episodes(tmp_path):
    """Written out with autograd alone: each episode normalised by itself, the running statistics the mean of one update each."""
    split = data.load("glyphs")
    config = MatchingConfig(**{**TINY, "steps": 1}, episodes_per_batch=3, seed=2)
    train(config, split, tmp_path)
    model = build(config).train()
    episodes = Episodes(split.train.images, split.train.labels, way=5, shot=1, queries=2, seed=2)
    losses, means = [], []
    for number in range(3):
        norm = model.embedding[0][1]
        norm.reset_running_stats()
        episode = episodes[number]
        loss = nn.functional.nll_loss(model(episode.support, episode.support_labels, episode.query), episode.query_labels)
        (loss / 3).backward()
        losses.append(loss.item())
        means.append(norm.running_mean.clone())
    torch.optim.Adam(model.parameters(), config.lr).step()
    trained = load_checkpoint(tmp_path)["model"]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(trained["embedding.0.1.running_mean"], torch.stack(means).mean(0))
    assert trained["embedding.0.1.num_batches_tracked"] == 1
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(sum(losses) / 3, abs=1e-4)


@pytest.mark.parametrize("options", [{}, dict(layers="reference"), dict(precision="bfloat16")], ids=["fast", "reference", "bfloat16"])
def test_it_learns_and_tells(tmp_path, capsys, options):
    split = data.load("glyphs", validation_classes=50)
    config = MatchingConfig(**{**TINY, "channels": 16, "way": 10}, validation_classes=50, eval_every=30, **options)
    task = dict(way=5, shot=1, queries=5, episodes=100)
    before = evaluate(build(config), split.test, **task)
    assert train(config, split, tmp_path, checkpoint_every=25) == 0
    model, stored = load_model(tmp_path)
    after = evaluate(model, split.test, **task)
    assert stored == config and not model.training
    assert after.mean > before.mean + .15 and after.mean > .65
    log = log_of(tmp_path)
    assert [line["step"] for line in log if "validation" in line] == [30, 60]
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 61))
    assert sum(line["loss"] for line in log[-11:-1]) < sum(line["loss"] for line in log[:10])
    output = capsys.readouterr().out
    assert "step 60/60  loss" in output and "episodes/s" in output and "held-out classes" in output and "0:00 left" in output


def test_reference_and_fast_layers_train_alike(tmp_path):
    for layers in ("fast", "reference"):
        train(MatchingConfig(**{**TINY, "steps": 5}, layers=layers, fce=True, lr=1e-3), data.load("glyphs"), tmp_path / layers)
    fast_state, reference_state = (load_checkpoint(tmp_path / layers)["model"] for layers in ("fast", "reference"))
    for key in fast_state:
        torch.testing.assert_close(fast_state[key], reference_state[key], atol=1e-4, rtol=1e-3)
    assert type(load_model(tmp_path / "reference")[0]) is not type(load_model(tmp_path / "reference", "fast")[0])


def test_evaluation_is_that_of_single_episodes_on_images():
    test = data.load("glyphs").test
    model = build(MatchingConfig(**TINY, precision="bfloat16"))
    with torch.no_grad():  # statistics unlike those of any batch, so that forgetting eval() shows
        model.embedding[0][1].running_var.fill_(.05)
    task = dict(way=4, shot=2, queries=3, seed=5)
    each = []
    model.eval()
    with torch.no_grad():
        for episode in Episodes(test.images, test.labels, length=20, **task):
            log_probs = model(episode.support, episode.support_labels, episode.query)
            each.append((log_probs.argmax(-1) == episode.query_labels).double().mean().item())
    model.train()
    accuracy = evaluate(model, test, episodes=20, **task)
    assert accuracy.mean == pytest.approx(sum(each) / 20, abs=.01) and accuracy.episodes == 20
    assert model.training and isinstance(model.embedding, fast.Conv4)


def test_interval_by_hand():
    accuracy = _accuracy(torch.tensor([[True, True, False, False], [True, True, True, True], [False, False, False, True]]))
    mean = (.5 + 1 + .25) / 3
    deviation = math.sqrt(((.5 - mean) ** 2 + (1 - mean) ** 2 + (.25 - mean) ** 2) / 2)
    assert accuracy == pytest.approx((mean, 1.96 * deviation / math.sqrt(3), 3))
    assert str(accuracy) == "58.33% ± 43.21% (3 episodes)"


def test_pixel_baseline():
    pattern = torch.randint(0, 256, (10, 1, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    same = LabelledImages(pattern.repeat_interleave(4, 0), torch.arange(10).repeat_interleave(4), tuple("abcdefghij"))
    noise = same._replace(images=torch.randint(0, 256, (40, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8))
    task = dict(way=5, shot=1, queries=3, episodes=100)
    assert evaluate_pixels(same, **task)[:2] == (1, 0)
    assert abs(evaluate_pixels(noise, **task).mean - .2) < .05


def test_a_run_is_not_overwritten_nor_mixed(tmp_path):
    split = data.load("glyphs")
    config = MatchingConfig(**{**TINY, "steps": 2})
    train(config, split, tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already: go on with --resume"):
        train(config, split, tmp_path)
    with pytest.raises(ValueError, match="holds another run: lr is 0.003 there, 0.1 here"):
        train(MatchingConfig(**{**TINY, "steps": 2}, lr=.1), split, tmp_path, resume=True)
    assert train(config, split, tmp_path, resume=True) == 0
    assert (tmp_path / "checkpoint.pt").read_bytes() == whole and len(log_of(tmp_path)) == 2


def test_uneven_shares_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_processes", lambda: run.contextlib.nullcontext((0, 2)))
    with pytest.raises(ValueError, match="3 episodes a step cannot be shared evenly by 2 processes"):
        train(MatchingConfig(**TINY, episodes_per_batch=3), Split(None, None, None), tmp_path)


@pytest.mark.parametrize("settings, message", [
    (dict(steps=0), "steps must be at least 1, got 0"), (dict(fce_steps=3), "fce_steps has no meaning without fce"),
    (dict(eval_every=5), "eval_every needs classes to evaluate on")])
def test_senseless_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        MatchingConfig(**settings)


def test_checkpoint_of_something_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path)
    for content in (b"", b"rubbish", b"PK\x03\x04" + bytes(100)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a checkpoint"):
            load_checkpoint(path)
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a fastmeta checkpoint of format 1"):
        load_checkpoint(path)
    save_checkpoint(path, {"x": torch.ones(2)})
    assert load_checkpoint(tmp_path)["x"].sum() == 2
