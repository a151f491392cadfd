import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_exact_as_eager, numpy_scores, numpy_softmax
from torch.autograd import gradcheck, gradgradcheck

import fastmeta
from fastmeta import nn, reference
from test_full_context import numpy_full_context

inf, nan = math.inf, math.nan


def pair(*args, dtype=torch.float64, std=0.5, **options):
    """A fast and a reference network with the same weights."""
    slow = reference.MatchingNetwork(*args, **options).to(dtype)
    fast = nn.MatchingNetwork(*args, **options).to(dtype)
    with torch.no_grad():
        for n, p in slow.named_parameters():
            if "encoder" in n:
                p.normal_(std=std)
    fast.load_state_dict(slow.state_dict())
    return fast, slow


def episode(batch=(2,), supports=6, queries=5, features=4, classes=3, dtype=torch.float64, masked=False):
    support = torch.randn(*batch, supports, features, dtype=dtype, requires_grad=True)
    query = torch.randn(*batch, queries, features, dtype=dtype, requires_grad=True)
    mask = None
    if masked:
        mask = torch.rand(*batch, supports) > 0.4
        mask[..., 1] = True
    return support, torch.randint(classes, (*batch, supports)), query, mask


def run(network, support, labels, query, mask, classes=3):
    result = network(support, labels, query, mask, classes)
    finite = torch.where(result == -inf, 0.0, result)
    wanted = [support, query, *network.parameters()]
    return [result, *torch.autograd.grad(finite.sin().sum(), wanted, materialize_grads=True)]


CONFIGURATIONS = {"paper": {}, "fce": dict(feature_dim=4, fce=True), "fce steps": dict(feature_dim=4, fce=True, fce_steps=2, scale=5.0),
                  "learned scale": dict(learn_scale=True, scale=3.0, eps_mode="add", eps=1e-3),
                  "easyfsl": dict(feature_dim=4, fce=True, normalize="support", probability_eps=1e-6)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_equal_to_reference(backend, configuration, batch, masked, dtype):
    fast, slow = pair(dtype=dtype, **CONFIGURATIONS[configuration])
    data = episode(batch, dtype=dtype, masked=masked)
    ours, eager = run(fast, *data), run(slow, *data)
    if dtype == torch.float64:
        torch.testing.assert_close(ours, eager, rtol=1e-8, atol=1e-9)
    else:
        wide = [t.detach().double().requires_grad_() if t is not None and t.is_floating_point() else t for t in data]
        assert_as_exact_as_eager(ours, eager, run(slow.double(), *wide), configuration)


@pytest.mark.parametrize("layers", [nn, reference])
def test_by_hand(backend, layers):
    # without an embedding: cosines of (1, 0) with (2, 0), (0, 1), (3, 4) are 1, 0, 0.6
    support, query = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    log_p = layers.MatchingNetwork(scale=10.0)(support, torch.tensor([0, 1, 1]), query)
    total = math.exp(10) + 1 + math.exp(6)
    torch.testing.assert_close(log_p, torch.tensor([[math.log(math.exp(10) / total), math.log((1 + math.exp(6)) / total)]]))
    log_p = layers.MatchingNetwork(probability_eps=0.5)(support, torch.tensor([0, 1, 1]), query, num_classes=3)
    p = math.e / (math.e + 1 + math.exp(0.6))
    torch.testing.assert_close(log_p, torch.tensor([[math.log(p + 0.5), math.log(1.5 - p), math.log(0.5)]]))


@pytest.mark.parametrize("layers", [nn, reference])
def test_equations_in_numpy(backend, layers):
    network = pair(feature_dim=2, fce=True, scale=2.0)[layers is reference]
    support, labels, query = torch.randn(4, 2).double(), torch.tensor([1, 0, 2, 1]), torch.randn(3, 2).double()
    g, f = numpy_full_context(support.numpy(), query.numpy(), *({k: v.numpy() for k, v in m.state_dict().items()}
                                                                for m in (network.support_encoder, network.query_encoder)), 4)
    attention = [numpy_softmax(row) for row in numpy_scores(f, g, 2.0, "both", 1e-8, "clamp")]
    expected = np.log([[a[labels.numpy() == c].sum() for c in range(3)] for a in attention])
    np.testing.assert_allclose(network(support, labels, query).detach(), expected, rtol=1e-9)


# ---- easyfsl -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("shots", [1, 5])
def test_easyfsl(backend, layers, shots):
    """The installed package with the same weights: K = S, only the support divided by its norm, log(p + 1e-6); also its gradients."""
    methods = pytest.importorskip("easyfsl.methods", reason="easyfsl is not installed")
    torch.manual_seed(5)
    way, d = 5, 16
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(36, d), torch.nn.ReLU())
    theirs = methods.MatchingNetworks(backbone, feature_dimension=d)
    ours = layers.MatchingNetwork(backbone, d, fce=True, normalize="support", eps=1e-12, probability_eps=1e-6)
    names = {"embedding": "backbone", "support_encoder.lstm": "support_features_encoder", "query_encoder.cell": "query_features_encoding_cell"}
    state = theirs.state_dict()
    ours.load_state_dict({k: state[next(v + k[len(p):] for p, v in names.items() if k.startswith(p))] for k in ours.state_dict()})
    support, labels = torch.randn(way * shots, 1, 6, 6), torch.arange(way).repeat(shots)[torch.randperm(way * shots)]
    query, targets = torch.randn(20, 1, 6, 6), torch.randint(way, (20,))

    def easyfsl(support, query):
        theirs.process_support_set(support, labels)
        return theirs(query)
    results = []
    for network, module in ((easyfsl, theirs), (lambda s, q: ours(s, labels, q), ours)):
        module.zero_grad()
        log_p = network(support, query)
        F.nll_loss(log_p, targets).backward()
        grads = {names_k: p.grad.clone() for names_k, p in module.named_parameters()}
        results.append((log_p, grads))
    (want, want_grads), (got, got_grads) = results
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert got.exp().sum() > 1 and len(got_grads) == len(want_grads) == 14
    for k, g in got_grads.items():
        other = next(v + k[len(p):] for p, v in names.items() if k.startswith(p))
        torch.testing.assert_close(g, want_grads[other], rtol=1e-3, atol=1e-5)
    assert got_grads["support_encoder.lstm.weight_hh_l0"].abs().max() > 1e-5


# ---- padding -------------------------------------------------------------------------------------------------------------------------

class Embedding(torch.nn.Module):
    """Images to features, with batch statistics."""

    def __init__(self, features=4):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(1, features, 3), torch.nn.BatchNorm2d(features), torch.nn.ReLU(),
                                          torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    def forward(self, x):
        return self.layers(x)


@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("fce", [False, True])
def test_padding_changes_nothing(backend, layers, fce):
    """Three episodes of different size in one call; against the same call with every row real, where all episodes are equally long,
    and one by one. Padding holds NaN and labels out of range, and stays out of the batch statistics."""
    def network():
        torch.manual_seed(1)
        return layers.MatchingNetwork(Embedding(), 4, fce=fce, learn_scale=True).double()
    images, query = torch.randn(2, 4, 1, 6, 6).double(), torch.randn(2, 3, 1, 6, 6).double()
    labels = torch.tensor([[0, 1, 2, 1], [2, 1, 0, 0]])
    plain = network()
    expected = plain(images, labels, query, num_classes=3)
    F.nll_loss(expected.flatten(0, 1), torch.tensor([0, 1, 2, 0, 1, 2])).backward()

    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 0, 1]]).bool()
    padded, padded_labels = torch.full((2, 7, 1, 6, 6), nan).double(), torch.full((2, 7), 99)
    padded[mask], padded_labels[mask] = images.flatten(0, 1), labels.flatten()
    padded_labels[1, 0] = -5
    padded.requires_grad_()
    with_padding = network()
    result = with_padding(padded, padded_labels, query, mask)  # the number of classes is that of the real labels
    torch.testing.assert_close(result, expected)
    F.nll_loss(result.flatten(0, 1), torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    assert (padded.grad[~mask] == 0).all() and (padded.grad[mask] != 0).any()
    for (name, a), b in zip(plain.named_parameters(), with_padding.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-10, msg=name)
        assert a.grad.abs().max() > 0, name
    for (name, a), b in zip(plain.named_buffers(), with_padding.buffers()):
        torch.testing.assert_close(b, a, msg=name)
    assert plain.embedding.layers[1].running_mean.abs().max() > 0


@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("fce", [False, True])
def test_episodes_of_different_size(backend, layers, fce):
    network = pair(feature_dim=4, fce=fce)[layers is reference]
    support, labels, query, _ = episode((4,), supports=7)
    mask = torch.tensor([[1] * 7, [0, 1, 0, 1, 1, 0, 0], [0] * 7, [0, 0, 0, 0, 0, 0, 1]]).bool()
    support, labels = support.detach(), labels.clone()
    support[~mask], labels[~mask] = nan, 1000
    support.requires_grad_()
    result = network(support, labels, query, mask, num_classes=3)
    assert (result[2] == -inf).all()
    loss, alone = torch.where(result == -inf, 0.0, result).sin().sum(), 0
    for b in (0, 1, 3):
        one = network(support[b, mask[b]], labels[b, mask[b]], query[b], num_classes=3)
        torch.testing.assert_close(result[b], one)
        alone = alone + torch.where(one == -inf, 0.0, one).sin().sum()
    wanted = [support, query, *network.parameters()]
    grads = torch.autograd.grad(loss, wanted)
    torch.testing.assert_close(grads, torch.autograd.grad(alone, wanted), rtol=1e-8, atol=1e-10)
    assert (grads[0][~mask] == 0).all() and (grads[1][2] == 0).all()


# ---- the rest ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_second_derivative(backend, configuration):
    network = pair(**CONFIGURATIONS[configuration])[0]
    support, labels, query, mask = episode(supports=3, queries=2, masked=True)
    names, weights = zip(*network.named_parameters()) if list(network.parameters()) else ((), ())

    def function(support, query, *weights):
        result = torch.func.functional_call(network, dict(zip(names, weights)), (support, labels, query, mask, 3))
        return torch.where(result == -inf, 0.0, result)
    arguments = [support, query, *(w.detach().requires_grad_() for w in weights)]
    assert gradcheck(function, arguments, fast_mode=True)
    assert gradgradcheck(function, arguments, fast_mode=True)


def test_meta_gradient(backend):
    """An inner step of gradient descent on the embedding, and the gradient through it: what meta-learning does with a layer."""
    support, labels, query, _ = episode((), features=6)
    targets = torch.tensor([0, 1, 2, 0, 1])
    grads = []
    for network in pair(torch.nn.Linear(6, 4), 4, fce=True, learn_scale=True):
        parameters = dict(network.named_parameters())

        def loss(parameters):
            return F.nll_loss(torch.func.functional_call(network, parameters, (support, labels % 3, query), {"num_classes": 3}).clamp_min(-50), targets)
        inner = torch.autograd.grad(loss(parameters), list(parameters.values()), create_graph=True)
        stepped = {k: p - 0.5 * g for (k, p), g in zip(parameters.items(), inner)}
        grads.append(torch.autograd.grad(loss(stepped), list(parameters.values())))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("layers", [nn, reference])
def test_number_of_classes(backend, layers):
    network = layers.MatchingNetwork()
    support, query = torch.randn(4, 3), torch.randn(2, 3)
    assert network(support, torch.tensor([0, 4, 2, 2]), query).shape == (2, 5)
    assert network(support, torch.tensor([0, 4, 2, 9]), query, torch.tensor([True, True, True, False])).shape == (2, 5)
    assert network(support, torch.tensor([0, 1, 1, 0]), query, num_classes=7).shape == (2, 7)
    assert network(torch.randn(3, 4, 3), torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [3, 0, 0, 0]]), torch.randn(3, 2, 3)).shape == (3, 2, 4)


@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("fce", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
@pytest.mark.parametrize("b, s, q", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(backend, layers, fce, embedding, b, s, q):
    network = layers.MatchingNetwork(torch.nn.Linear(4, 4) if embedding else None, 4, fce=fce)
    for mask in (None, torch.ones(b, s, dtype=torch.bool)):
        log_p = network(torch.randn(b, s, 4), torch.zeros(b, s, dtype=torch.long), torch.randn(b, q, 4), mask, 2)
        assert log_p.shape == (b, q, 2) and (log_p == (torch.tensor([0.0, -inf]) if s else -inf)).all()


@pytest.mark.parametrize("layers", [nn, reference])
def test_order(backend, layers):
    """Without FCE the order of the supports means nothing; with FCE it does. That of queries and of classes never does."""
    support, labels, query, _ = episode((), classes=6)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    order, names = torch.tensor([2, 0, 5, 1, 4, 3]), torch.tensor([2, 0, 1])
    for fce in (False, True):
        network = pair(feature_dim=4, fce=fce)[layers is reference]
        log_p = network(support, labels, query)
        changed = (network(support[order], labels[order], query) - log_p).abs().max()
        assert changed > 1e-3 if fce else changed < 1e-12
        torch.testing.assert_close(network(support, labels, query.flip(0)), log_p.flip(0))
        torch.testing.assert_close(network(support, names[labels], query)[:, names], log_p)


@pytest.mark.parametrize("layers", [nn, reference])
def test_conv4(backend, layers):
    embedding = layers.Conv4(1, 8)
    assert embedding(torch.randn(2, 1, 28, 28)).shape == (2, 8) and layers.Conv4(3, 16)(torch.randn(2, 3, 84, 84)).shape == (2, 400)
    network = layers.MatchingNetwork(embedding, 8, fce=True)
    log_p = network(torch.randn(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5), torch.randn(2, 7, 1, 28, 28))
    assert log_p.shape == (2, 7, 5)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 7))
    log_p.mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_state_dict_is_the_reference_one():
    for options in CONFIGURATIONS.values():
        networks = []
        for layers in (nn, reference):
            torch.manual_seed(2)
            networks.append(layers.MatchingNetwork(Embedding(), **{"feature_dim": 4, **options}))
        fast, slow = (n.state_dict() for n in networks)
        assert list(fast) == list(slow) and all(torch.equal(fast[k], slow[k]) for k in slow)


def test_feature_dim_is_needed_for_fce():
    for layers in (nn, reference):
        with pytest.raises(ValueError, match="MatchingNetwork: fce=True needs feature_dim"):
            layers.MatchingNetwork(torch.nn.Linear(2, 2), fce=True)


def test_compile(backend):
    network = nn.MatchingNetwork(feature_dim=4, fce=True, fce_steps=2)
    support, labels, query, _ = episode(dtype=torch.float32)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    got, expected = compiled(support, labels, query, None, 3), network(support, labels, query, None, 3)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(torch.where(y == -inf, 0.0, y).sum(), [support, query, *network.parameters()]) for y in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("layers", [nn, reference])
def test_autocast(backend, layers):
    network = layers.MatchingNetwork(torch.nn.Linear(4, 8), 8, fce=True)
    support, labels, query, mask = episode(dtype=torch.float32, masked=True)
    for m in (None, mask):
        with torch.autocast("cpu", torch.bfloat16):
            log_p = network(support, labels, query, m, 3)
        assert log_p.dtype == torch.float32 or layers is reference
        torch.testing.assert_close(log_p.float(), network(support, labels, query, m, 3), rtol=0.05, atol=0.05)
        torch.where(log_p == -inf, 0.0, log_p).sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_reference_network_uses_no_kernel(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the reference called fastmeta.functional")
    monkeypatch.setattr(fastmeta.functional, "matching_log_probs", refuse)
    monkeypatch.setattr(nn.MatchingNetwork, "matching_log_probs", refuse)
    data = episode()
    reference.MatchingNetwork(feature_dim=4, fce=True).double()(*data)
    with pytest.raises(AssertionError, match="called"):
        nn.MatchingNetwork(feature_dim=4, fce=True).double()(*data)
