"""Races of Meta Networks: a training step of the published sizes, and its operations alone.

* reference: ``fastmeta.reference``, which is written to be read; the network loops over supports and queries.
* eager: the same mathematics with as few and as large PyTorch operations as we could: a unit of the generator a row, a coordinate a column.
* compile: eager compiled.

Gradients are those of the weights, as in training to first order; of the pooling, those of its arguments.
"""

import fastmeta.functional
import fastmeta.nn
import fastmeta.reference
import torch
import torch.nn.functional as F
from fastmeta.reference import preprocess_gradient
from race import Absent, Entry, Race

NETWORKS = [(5, 1, 50), (5, 5, 50)]  # way, shot, queries
GENERATORS = [("coordinate_mlp", (1, 5 * 152_448, 20)), ("coordinate_lstm", (5, 152_128, 20)),  # T, M, W: what 5-way 1-shot takes
              ("coordinate_mlp", (1, 4096, 20)), ("coordinate_lstm", (5, 4096, 20))]
POOL = (55, 64, 28, 28)


def build_network(operation, shape, peer, dtype):
    way, shot, queries = shape
    torch.manual_seed(0)
    model = (fastmeta.reference if peer == "reference" else fastmeta.nn).MetaNetwork(way).to(dtype)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(way * shot + queries, 1, 28, 28, generator=generator, device="cpu")
    images = (F.avg_pool2d(noise, 5, 1, 2) > 0.53).to(torch.get_default_device(), dtype)  # blots of ink
    labels = torch.arange(way * shot) % way
    parameters = tuple(p for name, p in model.named_parameters() if name != "embedding.output.weight")  # which has no gradient
    return Entry(lambda: model(images[:way * shot], labels, images[way * shot:]), (), parameters)


def eager_mlp(gradients, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3):
    hidden = torch.addmm(bias_1.unsqueeze(1), weight_1, preprocess_gradient(gradients).mT).relu()
    hidden = torch.addmm(bias_2.unsqueeze(1), weight_2, hidden).relu()
    return torch.addmm(bias_3.unsqueeze(1), weight_3, hidden)[0]


def eager_lstm(gradients, weight_ih, weight_hh, bias, output_weight, output_bias):
    width, h, c = weight_hh.shape[1], None, None
    for channels in preprocess_gradient(gradients).mT.unbind(0):
        gates = torch.addmm(bias.unsqueeze(1), weight_ih, channels)
        input_forget, g, o = (gates if h is None else torch.addmm(gates, weight_hh, h)).split([2 * width, width, width])
        i, f = input_forget.sigmoid().chunk(2)
        c = i * g.tanh() if c is None else torch.addcmul(i * g.tanh(), f, c)
        h = o.sigmoid() * c.tanh()
    return torch.addmm(output_bias.unsqueeze(1), output_weight, h)[0]


EAGER = {"coordinate_mlp": eager_mlp, "coordinate_lstm": eager_lstm, "augmented_pool": fastmeta.reference.augmented_pool}


def build_operation(operation, shape, peer, dtype):
    generator = torch.Generator().manual_seed(0)
    device = torch.get_default_device()

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator, device="cpu").to(device, dtype)
    if operation == "augmented_pool":
        inputs, parameters = (draw(*shape), draw(*shape)), ()
    else:
        T, M, W = shape
        lstm = operation == "coordinate_lstm"
        inputs, gradients = (), 1e-3 * (draw(T, M) if lstm else draw(M))
        shapes = ((4 * W, 2), (4 * W, W), (4 * W,), (1, W), (1,)) if lstm else ((W, 2), (W,), (W, W), (W,), (1, W), (1,))
        parameters = tuple((W**-0.5 * draw(*sizes)).requires_grad_() for sizes in shapes)
    if operation == "augmented_pool" and peer == "fastmeta" and device.type != "cpu":
        raise Absent("it has a kernel for the CPU alone")
    function = {"fastmeta": getattr(fastmeta.functional, operation), "reference": getattr(fastmeta.reference, operation)}.get(peer, EAGER[operation])
    if peer == "compile":
        function = torch.compile(function, dynamic=False, fullgraph=True)
    return Entry(function if inputs else lambda: function(gradients, *parameters), inputs, parameters)


def truth(peer):
    return "reference"


RACES = []
for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
    # A rounding of a gradient enters a generator e^7 times as large.
    RACES += [Race("meta_network", "NKQ", shape, True, ("fastmeta", "reference"), build_network, truth,
                   size=shape[0] * shape[1] * 152_448 * 460 + shape[2] * 30_000_000, mark=4.0, device=device, tolerance=0.005) for shape in NETWORKS]
    RACES += [Race(operation, "TMW", shape, backward, ("fastmeta", "eager", "compile", "reference"), build_operation, truth,
                   size=shape[0] * shape[1] * (2080 if operation == "coordinate_lstm" else 460), device=device) for operation, shape in GENERATORS for backward in (False, True)]
    RACES += [Race("augmented_pool", "NCHW", POOL, backward, ("fastmeta", "compile", "reference"), build_operation, truth,
                   size=10 * 55 * 64 * 28 * 28, device=device) for backward in (False, True)]


def test_race(enter, race, peer):
    enter(race, peer)


def test_one_network():
    """Both are the same network on the same episode: in float64, logits and gradients."""
    ours, theirs = (build_network("meta_network", (2, 1, 2), peer, torch.float64).call(True)() for peer in ("fastmeta", "reference"))
    torch.testing.assert_close(ours, theirs)
