"""Races of MANN: the memory's step operations, and whole episodes of the paper's size (memory 128 x 40, 4 heads, H = 200, I = 400).

* eager: the same mathematics with as few PyTorch operations as we could: inputs projected for all steps at once, the heads as one product.
* reference: ``fastmeta.reference``, which is written to be read.
* compile: the eager step compiled, in the same loop over time.
* floor: the products with the weights alone, each as large as the recurrence allows (a step's inputs at once, the weights'
  gradients at the end). Not a peer: what is left when everything else, the memory too, costs nothing.

In an episode gradients are those of the weights, as in training; in a step those of everything.
"""

import fastmeta.functional
import fastmeta.nn
import fastmeta.reference
import torch
import torch.nn.functional as F
from race import Entry, Race

EPISODES = [(50, 16, 5), (75, 16, 15), (50, 1, 5)]  # T, B, C
STEPS = [(16, 128, 40, 4), (1, 128, 40, 4)]  # B, N, M, R
STEP_PEERS = ("fastmeta", "eager", "compile", "reference")


def eager_read(memory, keys, addressed):
    """With the options of the default preset: cosine with ``add`` 1e-8."""
    norms = keys.norm(dim=-1).unsqueeze(-1) * addressed.norm(dim=-1).unsqueeze(-2)
    weights = (keys @ addressed.mT / (norms + 1e-8)).softmax(-1)
    return weights @ memory, weights


def eager_write(memory, usage, read_weights, add, gate):
    least = usage.argsort(dim=-1, stable=True)[:, :add.shape[1]]
    marks = torch.zeros_like(usage).scatter_(1, least, 1.0).unsqueeze(1)  # every head's are the same
    write_weights = gate * read_weights + (1 - gate) * marks
    kept = memory.scatter(1, least[:, :1, None].expand(-1, -1, memory.shape[2]), 0.0)
    return torch.baddbmm(kept, write_weights.mT, add), write_weights


def eager_lrua_step(memory, usage, read_weights, keys, add, gate):
    written, write_weights = eager_write(memory, usage, read_weights, add, gate)
    read, weights = eager_read(written, keys, memory)
    return read, written, 0.95 * usage + (weights.sum(1) + write_weights.sum(1)).detach(), weights


def eager_cell(projected, hidden, cell, read, read_weights, usage, memory, recurrent, head_weight, head_bias):
    """One step; ``projected`` is the inputs' part of the gates, with the biases."""
    heads, width = read.shape[1:]
    i, f, g, o = torch.addmm(projected, torch.cat([read.flatten(1), hidden], 1), recurrent.mT).chunk(4, 1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    key, add, gate = F.linear(hidden, head_weight, head_bias).split([heads * width, heads * width, heads], 1)
    read, memory, usage, read_weights = eager_lrua_step(memory, usage, read_weights, key.tanh().view_as(read), add.tanh().view_as(read),
                                                        gate.sigmoid().unsqueeze(-1))
    return torch.cat([hidden, read.flatten(1)], 1), hidden, cell, read, read_weights, usage, memory


def eager_episode(inputs, state, weight_x, recurrent, bias, head_weight, head_bias, step=eager_cell):
    """The outputs ``[T, B, H + R M]``."""
    outputs = []
    for projected in F.linear(inputs, weight_x, bias):
        output, *state = step(projected, *state, recurrent, head_weight, head_bias)
        outputs.append(output)
    return torch.stack(outputs)


class Products(torch.autograd.Function):
    """The weights' products of an episode and of its backward, on numbers that mean nothing."""

    @staticmethod
    def forward(ctx, inputs, carried, weight_x, recurrent, heads):
        hidden = heads.shape[1]
        projected = inputs.flatten(0, 1) @ weight_x.mT
        outputs = []
        for step in carried:
            step @ recurrent.mT
            outputs.append(step[:, -hidden:] @ heads.mT)
        ctx.save_for_backward(inputs, carried, recurrent, heads, projected)
        return torch.stack(outputs)

    @staticmethod
    def backward(ctx, grad):
        inputs, carried, recurrent, heads, of_gates = ctx.saved_tensors
        hidden, by_step = heads.shape[1], of_gates.unflatten(0, carried.shape[:2])
        for t in range(len(grad) - 1, -1, -1):
            grad[t] @ heads
            by_step[t] @ recurrent
        rows = carried.flatten(0, 1)
        return None, None, of_gates.mT @ inputs.flatten(0, 1), of_gates.mT @ rows, grad.flatten(0, 1).mT @ rows[:, -hidden:]


def build_episode(operation, shape, peer, dtype):
    T, B, C = shape
    torch.manual_seed(0)
    model = (fastmeta.reference if peer == "reference" else fastmeta.nn).MANNCell(400 + C).to(dtype)
    generator = torch.Generator().manual_seed(0)
    device = torch.get_default_device()
    inputs = torch.rand(T, B, 400 + C, generator=generator, device="cpu").to(device, dtype)
    state, parameters = model.initial_state(B), tuple(model.parameters())
    if peer in ("fastmeta", "reference"):
        return Entry(lambda: model.run(inputs, state)[0], (), parameters)

    reads = state.read[0].numel()
    heads = [torch.cat([getattr(layer, name) for layer in (model.key, model.add, model.gate)]).detach().requires_grad_()
             for name in ("weight", "bias")]
    weight_ih, weight_hh, bias = (w.detach() for w in (model.controller.weight_ih, model.controller.weight_hh,
                                                       model.controller.bias_ih + model.controller.bias_hh))
    weight_x = weight_ih[:, :400 + C].clone().requires_grad_()
    recurrent = torch.cat([weight_ih[:, 400 + C:], weight_hh], 1).requires_grad_()
    bias.requires_grad_()
    if peer == "floor":
        carried = torch.rand(T, B, reads + 200, generator=generator, device="cpu").to(inputs)
        return Entry(lambda: Products.apply(inputs, carried, weight_x, recurrent, heads[0]), (), (weight_x, recurrent, heads[0]))

    cell = torch.compile(eager_cell, dynamic=False, fullgraph=True) if peer == "compile" else eager_cell
    return Entry(lambda: eager_episode(inputs, state, weight_x, recurrent, bias, *heads, step=cell), (), (weight_x, recurrent, bias, *heads))


def build_step(operation, shape, peer, dtype):
    B, N, M, R = shape
    generator = torch.Generator().manual_seed(0)
    device = torch.get_default_device()
    memory, keys, add = (torch.randn(B, n, M, generator=generator, device="cpu").to(device, dtype) for n in (N, R, R))
    usage, gate = (torch.rand(B, n, generator=generator, device="cpu").to(device, dtype) for n in (N, R))
    read_weights = torch.rand(B, R, N, generator=generator, device="cpu").softmax(-1).to(device, dtype)
    if peer in ("fastmeta", "reference"):
        room = fastmeta.functional if peer == "fastmeta" else fastmeta.reference
        cosine, shared = dict(eps_mode="add", eps=1e-8), dict(least_used="shared")
        functions = {"memory_read": lambda memory, keys: room.memory_read(memory, keys, **cosine)[0],
                     "lrua_write": lambda memory, weights, add, gate: room.lrua_write(memory, usage, weights, add, gate, **shared)[0],
                     "lrua_step": lambda memory, weights, keys, add, gate: room.lrua_step(
                         memory, usage, weights, keys, add, gate, read_before_write=True, **shared, **cosine)[0]}
    else:
        functions = {"memory_read": lambda memory, keys: eager_read(memory, keys, memory)[0],
                     "lrua_write": lambda memory, weights, add, gate: eager_write(memory, usage, weights, add, gate.unsqueeze(-1))[0],
                     "lrua_step": lambda memory, weights, keys, add, gate: eager_lrua_step(memory, usage, weights, keys, add,
                                                                                          gate.unsqueeze(-1))[0]}
    inputs = {"memory_read": (memory, keys), "lrua_write": (memory, read_weights, add, gate),
              "lrua_step": (memory, read_weights, keys, add, gate)}[operation]
    function = functions[operation]
    return Entry(torch.compile(function, dynamic=False, fullgraph=True) if peer == "compile" else function, inputs)


def truth(peer):
    return "reference"


def truth_of_an_episode(peer):
    """The reference has its weights in other pieces; the eager loop and its compiled form are checked against eager in float64."""
    return {"fastmeta": "reference", "compile": "eager"}.get(peer, peer)


RACES = []
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    RACES += [Race("mann_episode", "TBC", shape, backward, ("fastmeta", "eager", "compile", "reference", "floor"), build_episode, truth_of_an_episode,
                   size=shape[0] * shape[1] * 800 * 765, device=device)
              for shape in EPISODES for backward in (False, True)]
    RACES += [Race(operation, "BNMR", shape, backward, STEP_PEERS, build_step, truth, size=shape[0] * shape[1] * shape[2] * shape[3], device=device)
              for operation in ("memory_read", "lrua_write", "lrua_step") for shape in STEPS for backward in (False, True)]


def test_race(enter, race, peer):
    enter(race, peer)


def test_eager_is_mann():
    """The eager loop raced here computes what the layer computes: in float64, outputs and the gradient of the recurrent weights."""
    ours, eager = (build_episode("mann_episode", (6, 2, 5), peer, torch.float64) for peer in ("reference", "eager"))
    a, b = ours.function(), eager.function()
    torch.testing.assert_close(a, b)
    controller = torch.autograd.grad(a.sin().sum(), ours.parameters[:2])
    recurrent, = torch.autograd.grad(b.sin().sum(), eager.parameters[1:2])
    torch.testing.assert_close(torch.cat([controller[0][:, 405:], controller[1]], 1), recurrent)
