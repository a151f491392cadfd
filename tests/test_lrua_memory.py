"""memory_read, lrua_write and lrua_step: values worked out by hand, and the module."""

import itertools
import math

import pytest
import torch
from helpers import numpy_lrua_step
from torch.testing import assert_close

from fastmeta import functional, nn, reference
from fastmeta.functional import lrua_step, lrua_write, memory_read

HAS_GPU_KERNELS = True


def tensor(*rows):
    """One episode of float64."""
    return torch.tensor([rows], dtype=torch.float64)


def test_three_steps_by_hand(backend):
    """One head, three slots of width 2, usage decay 1/2, an epsilon that changes nothing. e = 2.718281828459."""
    memory, usage, weights = torch.zeros(1, 3, 2, dtype=torch.float64), tensor(1, 0, 0), tensor((1, 0, 0))
    options = dict(usage_decay=0.5, eps_mode="add", eps=1e-15)

    # Gate 0: all is written to the least used slot. Slots 1 and 2 tie, so 1: row (2, 0), which has cosine 1 with the key, zeros have 0.
    # wr = (1, e, 1) / (e + 2); read = 2 * 0.57612; usage = (0.5, 0, 0) + wr + (0, 1, 0).
    read, memory, usage, weights = lrua_step(memory, usage, weights, tensor((1, 0)), tensor((2, 0)), tensor(0), **options)
    assert_close(memory, tensor((0, 0), (2, 0), (0, 0)))
    assert_close(weights, tensor((0.211941557617, 0.576116884766, 0.211941557617)))
    assert_close(read, tensor((1.152233769532, 0)))
    assert_close(usage, tensor(0.711941557617, 1.576116884766, 0.211941557617))

    # Gate 1/2: half to where was read, half to slot 2: ww = wr / 2 + (0, 0, 1/2). To each row ww * (0, 3) is added.
    # Cosines with (0, 1): 1, 0.86418 / sqrt(4 + 0.74680) = 0.39664, 1.
    read, memory, usage, weights = lrua_step(memory, usage, weights, tensor((0, 1)), tensor((0, 3)), tensor(0.5), **options)
    assert_close(memory, tensor((0, 0.317912336426), (2, 0.864175327149), (0, 1.817912336426)))
    assert_close(weights, tensor((0.392622900364, 0.214754199272, 0.392622900364)))
    assert_close(read, tensor((0.429508398544, 1.024158958136)))
    assert_close(usage, tensor(0.854564457981, 1.290871084038, 1.104564457981))

    # Gate 1: all to where was read; slot 0 is the least used and set to 0 all the same, then written to: 0.39262 * (5, 5).
    # Cosines with (1, 1): 1, 5.01172 / (sqrt 2 * 3.63366) = 0.97527, 5.74414 / (sqrt 2 * 4.26027) = 0.95339.
    read, memory, usage, weights = lrua_step(memory, usage, weights, tensor((1, 1)), tensor((5, 5)), tensor(1), **options)
    assert_close(memory, tensor((1.963114501820, 1.963114501820), (3.073770996360, 1.937946323509), (1.963114501820, 3.781026838246)))
    assert_close(weights, tensor((0.341293058304, 0.332955501022, 0.325751440674)))
    assert_close(read, tensor((2.332913691423, 2.546922181011)))
    assert_close(usage, tensor(1.161198187658, 1.193145242313, 1.270656570029))


def test_read_before_write_by_hand(backend):
    # The key has cosine 1 with the slot that is about to be erased: its weight is e / (e + 1), what is read there is the new row.
    memory, usage, weights = tensor((0, 1), (1, 0)), tensor(1, 0), tensor((1, 0))
    e = math.e
    for before, first, read in ((True, 1 / (e + 1), (0, 1 / (e + 1) + 5 * e / (e + 1))), (False, 0.5, (0, 3))):
        got = lrua_step(memory, usage, weights, tensor((1, 0)), tensor((0, 5)), tensor(0), read_before_write=before, eps_mode="add", eps=1e-15)
        assert_close(got[3], tensor((first, 1 - first)))  # after the write the cosines with (0, 1) and (0, 5) are 0
        assert_close(got[0], tensor(read))
        assert_close(got[1], tensor((0, 1), (0, 5)))


@pytest.mark.parametrize("usage, slots", [([3, 1, 2, 0], [3, 1]), ([0, 0, 0, 0], [0, 1]), ([1, 0, 1, 0], [1, 3]), ([2, 2, 1, 1], [2, 3]),
                                          ([-1, math.inf, -math.inf, 0], [2, 0]), ([0.0, -0.0, 1, 1], [0, 1])])
def test_least_used_slots(backend, usage, slots):
    """Ties by the lowest index; the least used slot alone is erased."""
    memory = torch.full((1, 4, 1), 7.0, dtype=torch.float64)
    previous = torch.zeros(1, 2, 4, dtype=torch.float64)
    for least_used in ("per_head", "shared"):
        written, weights = lrua_write(memory, tensor(*usage), previous, tensor((10,), (100,)), tensor(0, 0), least_used=least_used)
        expected_weights = torch.zeros(1, 2, 4, dtype=torch.float64)
        expected = memory.clone()
        expected[0, slots[0]] = 0
        for head, amount in enumerate((10, 100)):
            for slot in ([slots[head]] if least_used == "per_head" else slots):
                expected_weights[0, head, slot] = 1
                expected[0, slot] += amount
        assert_close(weights, expected_weights, rtol=0, atol=0)
        assert_close(written, expected, rtol=0, atol=0)


@pytest.mark.parametrize("slots", [1, 2, 7, 16, 17, 40])
def test_ties_at_every_size(backend, slots):
    """Equal usage everywhere but in two slots, for every number of lanes that a kernel may work with."""
    for high in range(slots):
        usage = torch.ones(1, slots)
        usage[0, high] = 2
        heads = min(slots, 3)
        _, weights = lrua_write(torch.zeros(1, slots, 2), usage, torch.zeros(1, heads, slots), torch.zeros(1, heads, 2), torch.zeros(1, heads))
        expected = [n for n in range(slots) if n != high] + [high]
        assert weights[0].argmax(-1).tolist() == expected[:heads]


def test_gate_saturated(backend):
    """At 0 and 1 the other source of the write weights counts for nothing, not even as infinity times 0."""
    memory, usage = torch.randn(2, 5, 3), torch.tensor([[0., 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    weights, add = torch.rand(2, 2, 5).softmax(-1), torch.randn(2, 2, 3)
    for gate in (0.0, 1.0):
        _, got = lrua_write(memory, usage, weights, add, torch.full((2, 2), gate))
        least = torch.zeros(2, 2, 5)
        least[0, 0, 0] = least[0, 1, 1] = least[1, 0, 4] = least[1, 1, 3] = 1
        assert_close(got, weights if gate else least, rtol=0, atol=0)


def test_zero_rows(backend):
    """A slot or a key of zeros has cosine 0, and finite gradients."""
    for eps_mode in ("clamp", "add", "sqrt"):
        memory, keys = torch.zeros(1, 4, 3, requires_grad=True), torch.zeros(1, 2, 3, requires_grad=True)
        read, weights = memory_read(memory, keys, eps_mode=eps_mode)
        assert_close(weights, torch.full((1, 2, 4), 0.25))
        grads = torch.autograd.grad((read + weights[..., :3] * torch.arange(3)).sum(), (memory, keys))
        assert all(g.isfinite().all() for g in grads)


def test_strength(backend):
    """A factor on the cosine: 0 reads the mean, a large one the best slot, a tensor is one factor a head."""
    memory, keys = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    _, weights = memory_read(memory, keys, strength=0)
    assert_close(weights, torch.full_like(weights, 1 / 6))
    read, weights = memory_read(memory, keys, strength=1e4)
    best = torch.nn.functional.cosine_similarity(keys.unsqueeze(2), memory.unsqueeze(1), dim=-1).argmax(-1)
    assert (weights.argmax(-1) == best).all()
    assert_close(read, memory.gather(1, best.unsqueeze(-1).expand_as(keys)))
    strength = torch.rand(2, 3, dtype=torch.float64) * 5
    for j in range(3):
        assert_close(memory_read(memory[:1], keys[:1, j:j + 1], strength=strength[0, j].item())[1][0, 0],
                     memory_read(memory, keys, strength=strength)[1][0, j])


def test_memory_read_is_attention(backend):
    """The content addressing is cosine attention over the slots."""
    memory, keys = torch.randn(3, 9, 5, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    for eps_mode in ("clamp", "add", "sqrt"):
        read, _ = memory_read(memory, keys, strength=2.5, eps_mode=eps_mode, eps=0.1)
        assert_close(read, functional.cosine_attention(keys, memory, memory, scale=2.5, eps_mode=eps_mode, eps=0.1))


@pytest.mark.parametrize("least_used, read_before_write, eps_mode", itertools.product(("per_head", "shared"), (False, True), ("clamp", "add", "sqrt")))
def test_against_numpy(backend, least_used, read_before_write, eps_mode):
    """Twelve steps of two heads over five slots: the memory is full after three and wraps around."""
    rng = torch.Generator().manual_seed(1)
    module = nn.LRUAMemory(5, 3, 2, least_used=least_used, read_before_write=read_before_write, eps_mode=eps_mode, eps=0.01, usage_decay=0.9)
    state = module.initial_state(2, dtype=torch.float64)
    mine = [[x[b].numpy() for x in state] for b in range(2)]
    for _ in range(12):
        keys, add = torch.randn(2, 2, 2, 3, dtype=torch.float64, generator=rng)
        gate, strength = torch.rand(2, 2, 2, dtype=torch.float64, generator=rng)
        read, state = module(keys, add, gate, state, strength=strength)
        for b in range(2):
            expected, *mine[b] = numpy_lrua_step(*mine[b], keys[b].numpy(), add[b].numpy(), gate[b].numpy(), strength[b].numpy(), least_used,
                                                 read_before_write, eps_mode, 0.01, 0.9)
            for got, want in zip((read, *state), (expected, *mine[b])):
                assert_close(got[b], torch.from_numpy(want))


def test_initial_state():
    state = nn.LRUAMemory(4, 2, 3).initial_state(2, dtype=torch.float64)
    assert_close(state.memory, torch.full((2, 4, 2), 1e-6, dtype=torch.float64))
    assert state.usage.tolist() == [[1, 0, 0, 0]] * 2 and state.read_weights.tolist() == [[[1, 0, 0, 0]] * 3] * 2
    assert not list(nn.LRUAMemory().parameters())


def test_module_starts_from_the_initial_state(backend):
    module = nn.LRUAMemory(6, 4, 2)
    inputs = torch.randn(3, 2, 4), torch.randn(3, 2, 4), torch.rand(3, 2)
    for got, expected in zip(module(*inputs), module(*inputs, module.initial_state(3))):
        assert_close(got, expected)


@pytest.mark.parametrize("options, message", [
    (dict(memory_slots=0), "LRUAMemory: memory_slots must be at least 1, got 0"),
    (dict(memory_width=0), "LRUAMemory: memory_width must be at least 1, got 0"),
    (dict(memory_slots=3), "LRUAMemory: read_heads must be at most memory_slots = 3, got 4"),
    (dict(least_used="both"), "LRUAMemory: least_used must be one of 'per_head', 'shared', got 'both'")])
def test_wrong_options(options, message):
    for layers in (nn, reference):
        with pytest.raises(ValueError) as error:
            layers.LRUAMemory(**options)
        assert str(error.value) == message


def test_nothing_that_is_passed_changes(backend):
    given = [torch.rand(2, 5, 3), torch.rand(2, 5), torch.rand(2, 2, 5), torch.rand(2, 2, 3), torch.rand(2, 2, 3), torch.rand(2, 2)]
    kept = [t.clone() for t in given]
    results = lrua_step(*given)
    for t, k in zip(given, kept):
        assert torch.equal(t, k)
        assert all(t.data_ptr() != r.data_ptr() for r in results)
