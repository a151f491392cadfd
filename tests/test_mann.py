"""MANN as a layer: each preset against its source's equations, the label offset, state, lengths, and the LSTM baseline."""

import numpy as np
import pytest
import torch
from helpers import numpy_lrua_step, numpy_lstm_step, sigmoid
from torch.testing import assert_close

from fastmeta import nn, reference

LAYERS = pytest.mark.parametrize("layers", [nn, reference], ids=["fast", "reference"])
PRESETS = ("tristandeleu", "snowkylin", "paper")


def small(layers, preset="snowkylin", **options):
    return layers.MANN(5, 3, hidden_size=6, memory_slots=7, memory_width=4, read_heads=2, preset=preset, **options).double()


def inputs(steps=20, batch=3, features=5, classes=3):
    return torch.randn(steps, batch, features, dtype=torch.float64), torch.randint(classes, (steps, batch))


def numpy_mann(p, x, labels, preset, decay=0.95):
    """Logits of one episode, step by step; ``p`` are the parameters by name. What the sources differ in is spelled out here for each."""
    least_used, own_add, read_before_write, eps_mode, eps = {
        "tristandeleu": ("per_head", True, False, "sqrt", 1e-6),  # head j writes to the j-th least used slot
        "snowkylin": ("shared", True, True, "add", 1e-8),         # all heads write to all R, wr is that of the memory before
        "paper": ("shared", False, False, "sqrt", 1e-6)}[preset]  # the keys are what is written
    heads, width, slots = 2, 4, 7
    memory, usage, weights = np.full((slots, width), 1e-6), np.eye(slots)[0], np.tile(np.eye(slots)[0], (heads, 1))
    h, c, read, seen, logits = np.zeros(6), np.zeros(6), np.zeros((heads, width)), np.zeros(3), []
    for image, label in zip(x, labels):
        h, c = numpy_lstm_step(np.concatenate([image, seen, read.ravel()]), h, c, *(p[f"controller.{name}"] for name in (
            "weight_ih", "weight_hh", "bias_ih", "bias_hh")))
        key = np.tanh(p["key.weight"] @ h + p["key.bias"]).reshape(heads, width)
        add = np.tanh(p["add.weight"] @ h + p["add.bias"]).reshape(heads, width) if own_add else key
        gate = sigmoid(p["gate.weight"] @ h + p["gate.bias"])
        read, memory, usage, weights = numpy_lrua_step(memory, usage, weights, key, add, gate, np.ones(heads), least_used, read_before_write,
                                                       eps_mode, eps, decay)
        logits.append(p["output.weight"] @ np.concatenate([h, read.ravel()]) + p["output.bias"])
        seen = np.eye(3)[label]  # shown at the next step
    return np.stack(logits), memory, usage


@LAYERS
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_against_numpy(layers, preset):
    """20 steps of 2 heads over 7 slots: the memory is full after 4 and wraps around several times."""
    model = small(layers, preset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from the linear range
    x, y = inputs()
    logits, (_, state) = model(x, y)
    for b in range(3):
        expected, memory, usage = numpy_mann({k: v.numpy() for k, v in model.state_dict().items()}, x[:, b].numpy(), y[:, b].numpy(), preset)
        assert_close(logits[:, b], torch.from_numpy(expected))
        assert_close(state.memory[b], torch.from_numpy(memory))
        assert_close(state.usage[b], torch.from_numpy(usage))


@pytest.mark.parametrize("strength", [None, 3.0, "learned"])
@pytest.mark.parametrize("preset", PRESETS)
def test_fast_is_reference_weight_for_weight(preset, strength):
    theirs, ours = small(reference, preset, strength=strength), small(nn, preset, strength=strength)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in theirs.state_dict().items()]
    ours.load_state_dict(theirs.state_dict())
    x, y = inputs()
    results = []
    for model in (ours, theirs):
        logits, _ = model(x, y)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))])
    for a, b in zip(*results):
        assert_close(a, b)


@LAYERS
def test_parameters(layers):
    """The names and shapes that the documentation promises."""
    shapes = {k: tuple(v.shape) for k, v in layers.MANN(400, 5, strength="learned").state_dict().items()}
    assert shapes == {"controller.weight_ih": (800, 565), "controller.weight_hh": (800, 200), "controller.bias_ih": (800,),
                      "controller.bias_hh": (800,), "key.weight": (160, 200), "key.bias": (160,), "add.weight": (160, 200), "add.bias": (160,),
                      "gate.weight": (4, 200), "gate.bias": (4,), "strength.weight": (4, 200), "strength.bias": (4,), "output.weight": (5, 360),
                      "output.bias": (5,)}
    keys = set(layers.MANN(400, 5, preset="paper").state_dict())
    assert keys == {k for k in shapes if not k.startswith(("add", "strength"))}
    assert set(layers.MANNCell(400).state_dict()) == {k for k in shapes if not k.startswith(("output", "strength"))}


@LAYERS
def test_forget_bias_is_an_initial_value(layers):
    """Of the parameter, in the forget gate's quarter; the forward pass adds nothing."""
    torch.manual_seed(3)
    plain = layers.MANN(4, 2, 5, 6, 3, 2, forget_bias=0.0)
    torch.manual_seed(3)
    biased = layers.MANN(4, 2, 5, 6, 3, 2, forget_bias=1.5)
    difference = biased.controller.bias_ih - plain.controller.bias_ih
    assert_close(difference, torch.tensor([0.0] * 5 + [1.5] * 5 + [0.0] * 10), rtol=0, atol=1e-6)
    plain.load_state_dict(biased.state_dict())
    x, y = torch.randn(6, 2, 4), torch.randint(2, (6, 2))
    assert torch.equal(plain(x, y)[0], biased(x, y)[0])


@LAYERS
def test_a_step_sees_the_label_of_the_step_before(layers):
    """Changing the label of step 3 changes nothing up to step 3, and something after it; nothing depends on the last one."""
    for model in (small(layers), layers.LSTMBaseline(5, 3, 6).double()):
        x, y = inputs(steps=6)
        other = y.clone()
        other[3] = (y[3] + 1) % 3
        a, b = model(x, y)[0], model(x, other)[0]
        assert torch.equal(a[:4], b[:4])
        assert (a[4] != b[4]).any(-1).all()
        last = y.clone()
        last[5] = (y[5] + 1) % 3
        assert torch.equal(a, model(x, last)[0])


@LAYERS
def test_integer_targets_are_one_hot_vectors(layers):
    model = small(layers)
    x, y = inputs()
    vectors = torch.nn.functional.one_hot(y, 3)
    for a, b in zip(model(x, y), model(x, vectors.double())):
        assert_close(a, b)
    assert_close(model(x, y)[0], model(x, vectors)[0])
    assert_close(model(x, y)[0], model(x, y.int())[0])


@LAYERS
@pytest.mark.parametrize("cut", [0, 1, 9, 20])
def test_cut_and_continue(layers, cut):
    """The state holds the last label too: the first step of the second part sees it."""
    x, y = inputs()
    for model in (small(layers, strength="learned"), layers.LSTMBaseline(5, 3, 6).double()):
        if cut in (0, 20) and isinstance(model, reference.LSTMBaseline):
            continue  # torch's LSTM wants a step
        whole, end = model(x, y)
        first, state = model(x[:cut], y[:cut])
        second, state = model(x[cut:], y[cut:], state)
        assert_close(torch.cat([first, second]), whole)
        assert_close(state, end)


@LAYERS
def test_cell_steps_are_the_episode(layers):
    torch.manual_seed(0)
    cell = layers.MANNCell(5, 6, 7, 4, 2).double()
    x = torch.randn(9, 3, 5, dtype=torch.float64)
    whole, end = cell.run(x)
    state, outputs = None, []
    for each in x:
        output, state = cell(each, state)
        outputs.append(output)
    assert_close(torch.stack(outputs), whole)
    assert_close(state, end)


@LAYERS
def test_lengths(layers):
    """Each episode as if it were alone, whatever stands in the padding; the state is that at its end."""
    x, y = inputs(steps=10, batch=4)
    lengths = torch.tensor([10, 0, 3, 8])
    for model in (small(layers), layers.LSTMBaseline(5, 3, 6).double()):
        dirty_x, dirty_y = x.clone(), y.clone()
        for b, length in enumerate(lengths):
            dirty_x[length:, b] = 1e30 if isinstance(model, reference.LSTMBaseline) else torch.nan
            dirty_y[length:, b] = 2
        logits, (label, state) = model(dirty_x, dirty_y, lengths=lengths)
        for b, length in enumerate(lengths.tolist()):
            assert_close(logits[length:, b], model.output.bias.expand(10 - length, -1))
            if length:
                alone, (alone_label, alone_state) = model(x[:length, b:b + 1], y[:length, b:b + 1])
                assert_close(logits[:length, b], alone[:, 0])
                assert_close(label[b], alone_label[0])
                axis = 1 if isinstance(model, reference.LSTMBaseline) else 0  # torch's state is [layers, B, H]
                for whole, part in zip(state, alone_state):
                    assert_close(whole.select(axis, b), part.select(axis, 0))
        # Further: all of them go on from where they ended.
        more_x, more_y = inputs(steps=4, batch=4)
        onward, _ = model(more_x, more_y, (label, state))
        for b, length in enumerate(lengths.tolist()):
            joined, _ = model(torch.cat([x[:length, b:b + 1], more_x[:, b:b + 1]]), torch.cat([y[:length, b:b + 1], more_y[:, b:b + 1]]))
            assert_close(onward[:, b], joined[length:, 0])


@LAYERS
def test_gradients_into_the_initial_state(layers):
    """A learned initial state is possible: every part of it but the usage has a gradient."""
    model = small(layers)
    state = model.initial_state(2)
    leaves = [t.clone().requires_grad_() for t in state]
    x, y = inputs(batch=2)
    logits, _ = model(x, y, (torch.zeros(2, 3, dtype=torch.float64), type(state)(*leaves)))
    grads = dict(zip(state._fields, torch.autograd.grad(logits.sum(), leaves, allow_unused=True)))
    for name, grad in grads.items():
        assert (grad is None or not grad.any()) if name == "usage" else grad.any(), name


@LAYERS
def test_initial_state_follows_the_parameters(layers):
    state = small(layers).initial_state(2)
    assert all(t.dtype == torch.float64 for t in state)
    assert_close(state.memory, torch.full((2, 7, 4), 1e-6, dtype=torch.float64))


def test_the_baseline_is_an_lstm():
    model = nn.LSTMBaseline(5, 3, 6).double()
    x, y = inputs(steps=4, batch=1)
    seen = np.concatenate([np.zeros((1, 3)), np.eye(3)[y[:-1, 0].numpy()]])
    p = {k: v.numpy() for k, v in model.state_dict().items()}
    h = c = np.zeros(6)
    for t in range(4):
        h, c = numpy_lstm_step(np.concatenate([x[t, 0].numpy(), seen[t]]), h, c, p["lstm.weight_ih_l0"], p["lstm.weight_hh_l0"],
                               p["lstm.bias_ih_l0"], p["lstm.bias_hh_l0"])
        assert_close(model(x, y)[0][t, 0], torch.from_numpy(p["output.weight"] @ h + p["output.bias"]))


def test_it_learns_to_bind_labels():
    """Two fixed images with labels that are swapped at random: MANN must remember which is which from the first presentations."""
    torch.manual_seed(0)
    model = nn.MANN(4, 2, 32, 16, 8, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images = torch.eye(4)[:2]
    for _ in range(400):
        which = torch.randint(2, (12, 32))
        y = which ^ torch.randint(2, (1, 32))
        logits, _ = model(images[which], y)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = (logits.argmax(-1) == y).float()
    assert right[1:].mean() > 0.95
    assert right[0].mean() < 0.8  # nothing can be known at the first step
