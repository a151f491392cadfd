"""Meta Networks: numbers worked out by hand, the algorithm once more in numpy, and the fast layers against the reference."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import numpy_lstm_step, numpy_scores, numpy_softmax
from torch.testing import assert_close

import fastmeta.nn.meta_network as fast_module
from fastmeta import functional, nn, reference

LAYERS = pytest.mark.parametrize("layers", [nn, reference], ids=["fast", "reference"])
SMALL = dict(num_classes=3, in_channels=2, image_size=5, channels=4, blocks=2, hidden=6, generator_width=5)


def network(layers, dtype=torch.float64, **options):
    torch.manual_seed(7)
    model = layers.MetaNetwork(**{**SMALL, **options}).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "_generator." in name and name.endswith(("layers.4.weight", "output.weight")):
                parameter.mul_(100)  # fast weights as large as the slow ones
    return model


def episode(batch=(2,), supports=3, queries=4, dtype=torch.float64):
    images = (torch.randn(*batch, n, 2, 5, 5, dtype=dtype, requires_grad=True) for n in (supports, queries))
    return next(images), torch.arange(supports).remainder(3).expand(*batch, -1), next(images)


def run(model, support, labels, query):
    logits = model(support, labels, query)
    wanted = [support, query, *model.parameters()]
    return [logits, *torch.autograd.grad(logits.sin().sum(), wanted, materialize_grads=True)]


# ---- by hand -------------------------------------------------------------------------------------------------------------------------

def test_preprocessing_by_hand():
    """p = 7: e^-7 = 0.000912 divides the two ranges."""
    gradient = torch.tensor([0.0, math.exp(-7) / 2, -math.exp(-7) / 4, math.exp(-3.5), -1.0, math.exp(7)], dtype=torch.float64)
    expected = torch.tensor([[-1, -1, -1, -0.5, 0, 1], [0, 0.5, -0.25, 1, -1, 1]], dtype=torch.float64).mT
    # 2^-23 beside |D| in the logarithm is 4e-6 of e^-3.5, and a seventh of that in the channel
    assert_close(reference.preprocess_gradient(gradient), expected, rtol=0, atol=1e-6)
    assert_close(reference.preprocess_gradient(gradient[3])[0] + 0.5, torch.tensor(2.0**-23 * math.exp(3.5) / 7).double(), rtol=1e-5, atol=0)


@LAYERS
def test_mlp_by_hand(layers):
    """One hidden unit: relu(size + 2 sign + 0.5), then relu(3 h - 1), then -2 h + 4; of e^-3.5 the channels are -0.5 and 1."""
    generator = layers.CoordinateMLP(1).double()
    values = [[[1.0, 2.0]], [0.5], [[3.0]], [-1.0], [[-2.0]], [4.0]]
    with torch.no_grad():
        for parameter, value in zip(generator.parameters(), values):
            parameter.copy_(torch.tensor(value))
    # e^-3.5: h = 2, 5, so -6. -1: relu(0 - 2 + 0.5) = 0, relu(-1) = 0, so 4. 0: the same.
    result = generator(torch.tensor([[math.exp(-3.5), -1.0, 0.0]]).double())
    assert_close(result, torch.tensor([[-6.0, 4.0, 4.0]]).double(), rtol=0, atol=1e-4)


@LAYERS
def test_lstm_against_numpy(layers):
    generator = layers.CoordinateLSTM(3).double()
    gradients = torch.randn(4, 2, 3).double() * 1e-3
    p = {k: v.numpy() for k, v in generator.state_dict().items()}
    channels = reference.preprocess_gradient(gradients).numpy()
    expected = np.empty((2, 3))
    for i, j in np.ndindex(2, 3):
        h = c = np.zeros(3)
        for t in range(4):
            h, c = numpy_lstm_step(channels[t, i, j], h, c, *(p["cell." + n] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
        expected[i, j] = (p["output.weight"] @ h + p["output.bias"])[0]
    assert_close(generator(gradients), torch.from_numpy(expected))


def test_augmented_layers_by_hand():
    """A pixel, one channel: the centre of a kernel is all that is seen. W = 2, W* = -3 on x = 1.5 and on x = -1."""
    learner = reference.AugmentedLearner(num_classes=1, in_channels=1, image_size=1, channels=1, blocks=1, hidden=1)
    with torch.no_grad():
        learner.convs[0].weight.fill_(9)[0, 0, 1, 1] = 2.0
        learner.hidden.weight.fill_(0.5)
        learner.output.weight.fill_(4.0)
    kernel = torch.full((1, 1, 3, 3), 9.0)
    kernel[0, 0, 1, 1] = -3.0
    fast = {"convs.0.weight": kernel, "hidden.weight": torch.tensor([[-1.0]]), "output.weight": torch.tensor([[-6.0]])}
    x = torch.tensor([1.5, -1.0]).view(2, 1, 1, 1)
    # relu(2 x) + relu(-3 x) is 3 and 3; then relu(1.5) + relu(-3) = 1.5; then 4 * 1.5 - 6 * 1.5 = -3
    assert_close(learner.augment("convs.0", x, fast).flatten(), torch.tensor([3.0, 3.0]))
    assert_close(learner(x, fast), torch.tensor([[-3.0], [-3.0]]))
    # as the last layer, hidden is not rectified: 0.5 * 3 - 1 * 3
    assert_close(learner.key(x, fast), torch.tensor([[-1.5], [-1.5]]))
    # the slow weights alone: relu(2 x) = 3 and 0, then 1.5 and 0, then 6 and 0
    assert_close(learner(x), torch.tensor([[6.0], [0.0]]))


# ---- the algorithm in numpy ----------------------------------------------------------------------------------------------------------

def numpy_channels(gradient):
    return np.stack([np.maximum(np.log(np.abs(gradient) + 2.0**-23) / 7, -1), np.clip(np.exp(7) * gradient, -1, 1)])


def numpy_linear_gradients(hidden, output, xs, labels):
    """By hand, of the mean cross entropy of ``output relu(hidden x)``."""
    of_hidden, of_output = np.zeros_like(hidden), np.zeros_like(output)
    for x, label in zip(xs, labels):
        z = hidden @ x
        error = numpy_softmax(output @ np.maximum(z, 0)) - np.eye(len(output))[label]
        of_output += np.outer(error, np.maximum(z, 0)) / len(xs)
        of_hidden += np.outer((output.T @ error) * (z > 0), x) / len(xs)
    return of_hidden, of_output


@LAYERS
def test_algorithm_in_numpy(backend, layers):
    """Without convolutions, seven supports in five groups of 2, 2, 1, 1 and 1."""
    model = network(layers, in_channels=1, image_size=2, blocks=0)
    support, labels, query = torch.randn(7, 1, 2, 2).double(), torch.tensor([0, 2, 1, 1, 0, 2, 0]), torch.randn(3, 1, 2, 2).double()
    p = {k: v.numpy() for k, v in model.state_dict().items()}
    xs, ys, qs = support.flatten(1).numpy(), labels.numpy(), query.flatten(1).numpy()

    groups = [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6), slice(6, 7)]
    gradients = [numpy_linear_gradients(p["embedding.hidden.weight"], p["embedding.output.weight"], xs[g], ys[g])[0] for g in groups]
    lstm = [p["embedding_generator.linear.cell." + n] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    q_star = np.empty((6, 4))
    for i, j in np.ndindex(6, 4):
        h = c = np.zeros(5)
        for gradient in gradients:
            h, c = numpy_lstm_step(numpy_channels(gradient)[:, i, j], h, c, *lstm)
        q_star[i, j] = (p["embedding_generator.linear.output.weight"] @ h + p["embedding_generator.linear.output.bias"])[0]

    def generate(gradient):
        h = numpy_channels(gradient).reshape(2, -1)
        for k in (0, 2, 4):
            h = p[f"base_generator.linear.layers.{k}.weight"] @ h + p[f"base_generator.linear.layers.{k}.bias"][:, None]
            h = np.maximum(h, 0) if k < 4 else h
        return h.reshape(gradient.shape)
    hidden, output = p["base.hidden.weight"], p["base.output.weight"]
    memory = [[generate(g) for g in numpy_linear_gradients(hidden, output, [x], [y])] for x, y in zip(xs, ys)]
    keys, reads = ([(p["embedding.hidden.weight"] + q_star) @ x for x in rows] for rows in (xs, qs))
    expected = []
    for x, scores in zip(qs, numpy_scores(reads, keys, 1.0, "both", 1e-6, "sqrt")):
        a = numpy_softmax(scores)
        hidden_star, output_star = (sum(w * row[k] for w, row in zip(a, memory)) for k in (0, 1))
        h = np.maximum(hidden @ x, 0) + np.maximum(hidden_star @ x, 0)
        expected.append(output @ h + output_star @ h)
    assert_close(model(support, labels, query), torch.from_numpy(np.stack(expected)))


# ---- fast is reference ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("second_order", [False, True], ids=["first order", "second order"])
@pytest.mark.parametrize("supports", [3, 15, 7, 1], ids=["1 shot", "5 shots", "unequal groups", "one support"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_equal_to_reference(backend, batch, supports, second_order, dtype):
    fast, slow = (network(layers, dtype, second_order=second_order) for layers in (nn, reference))
    data = episode(batch, supports, dtype=dtype)
    ours, eager = run(fast, *data), run(slow, *data)
    if dtype == torch.float64:
        assert_close(ours, eager, rtol=1e-9, atol=1e-10)
    else:
        support, labels, query = data
        wide = [t.detach().double().requires_grad_() for t in (support, query)]
        exact = run(slow.double(), wide[0], labels, wide[1])
        # A rounding of D enters a generator e^7 times as large, and which tensor it reaches is chance: the worst of all is compared.
        worst = [max(((t - x).norm() / x.norm().clamp_min(1e-30)).item() for t, x in zip(results, exact)) for results in (ours, eager)]
        assert worst[0] <= 4 * worst[1] + 8 * math.exp(7) * torch.finfo(dtype).eps


@pytest.mark.parametrize("traffic", [-10**9, 10**9], ids=["weights of each query", "shared products"])
def test_both_ways_of_reading(monkeypatch, traffic):
    monkeypatch.setattr(fast_module, "TRAFFIC", traffic)
    data = episode(supports=5)
    assert_close(run(network(nn), *data), run(network(reference), *data), rtol=1e-9, atol=1e-10)


@LAYERS
def test_order_of_the_gradient(layers):
    """To first order the embedding's own classifier, which only the D know, has no gradient; to second order it has."""
    for second_order in (False, True):
        grads = run(network(layers, second_order=second_order), *episode())[3:]
        names = [name for name, _ in network(layers).named_parameters()]
        assert bool(grads[names.index("embedding.output.weight")].any()) == second_order
        assert all(grad.any() for name, grad in zip(names, grads) if name != "embedding.output.weight")


def test_second_order_by_differences():
    """A step along each weight of the base learner's classifier, to which the D answer."""
    model = network(reference, second_order=True)
    support, labels, query = episode(())
    weight = model.base.output.weight
    gradient, = torch.autograd.grad(model(support, labels, query).sin().sum(), weight)
    with torch.no_grad():
        for i in range(weight.numel()):
            ends = []
            for step in (1e-6, -2e-6, 1e-6):
                weight.view(-1)[i] += step
                ends.append(model(support, labels, query).sin().sum().item())
            assert math.isclose((ends[0] - ends[1]) / 2e-6, gradient.view(-1)[i].item(), rel_tol=1e-5, abs_tol=1e-5)


# ---- the rest ------------------------------------------------------------------------------------------------------------------------

@LAYERS
def test_published_sizes(layers):
    model = layers.MetaNetwork(5)
    sizes = {name: tuple(parameter.shape) for name, parameter in model.base.named_parameters()}
    assert sizes == {"convs.0.weight": (64, 1, 3, 3), **{f"convs.{i}.weight": (64, 64, 3, 3) for i in range(1, 5)},
                     "hidden.weight": (64, 64), "output.weight": (5, 64)}
    assert sum(math.prod(shape) for shape in sizes.values()) == 152_448
    assert {n.split(".", 1)[1] for n in model.state_dict() if n.startswith("base_generator.conv")} == {
        f"conv.layers.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}


def test_state_dict_is_the_reference_one():
    fast, slow = (network(layers).state_dict() for layers in (nn, reference))
    assert list(fast) == list(slow) and all(torch.equal(fast[k], slow[k]) for k in slow)


@LAYERS
def test_episodes_are_independent(layers):
    model = network(layers)
    support, labels, query = episode((2, 2))
    logits = model(support, labels, query)
    assert_close(logits[1, 0], model(support[1, 0], labels[1, 0], query[1, 0]))
    assert_close(logits[0, 1, 2:3], model(support[0, 1], labels[0, 1], query[0, 1, 2:3]))


@LAYERS
@pytest.mark.parametrize("batch, queries", [((0,), 4), ((2,), 0)])
def test_empty(layers, batch, queries):
    assert network(layers)(*episode(batch, queries=queries)).shape == (*batch, queries, 3)


@LAYERS
def test_without_gradients(layers):
    """The D are needed where nothing asks for a gradient of the result."""
    model, data = network(layers), episode()
    with torch.no_grad():
        logits = model(*data)
    assert not logits.requires_grad
    assert_close(logits, model(*data))


@LAYERS
def test_wrong_input(layers):
    model = network(layers)
    support, labels, query = episode()
    wrong = [((None, labels, query), TypeError, "support must be a tensor, got NoneType"),
             ((support.float(), labels, query), TypeError, "support must have the dtype of the parameters, torch.float64, got torch.float32"),
             ((support, labels, query[..., :4]), ValueError, r"query must be \[\*, Q, 2, 5, 5\], got shape \[2, 4, 2, 5, 4\]"),
             ((support, labels.double(), query), TypeError, "support_labels must have an integer dtype, got torch.float64"),
             ((support, labels[:, :2], query), ValueError, r"support_labels must be \[2, 3\], as support is, got shape \[2, 2\]"),
             ((support, labels, query[0]), ValueError, r"the same episode dimensions, got \[2\] and \[\]"),
             ((support[:, :0], labels[:, :0], query), ValueError, "at least one support, got none"),
             ((support, labels + 1, query), ValueError, r"support_labels must be in \[0, 3\), got 3")]
    for arguments, error, message in wrong:
        with pytest.raises(error, match="MetaNetwork: .*" + message):
            model(*arguments)
    for name, value in (("channels", 0), ("blocks", -1), ("hidden", 2.0), ("embedding_steps", True)):
        with pytest.raises(ValueError, match=rf"MetaNetwork: {name} must be an integer of at least \d, got {value}"):
            layers.MetaNetwork(**{**SMALL, name: value})


def test_reference_uses_no_kernel(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the reference called fastmeta.functional")
    monkeypatch.setattr(functional, "cosine_attention", refuse)
    network(reference)(*episode())
    with pytest.raises(AssertionError, match="called"):
        network(nn)(*episode())


def test_inside_torch_func():
    """The gradient of a loss over the fast layer, as a function: that of autograd."""
    model, data = network(nn, second_order=True), episode()
    parameters = dict(model.named_parameters())
    functional_gradient = torch.func.grad(lambda p: torch.func.functional_call(model, p, data).sin().sum())(parameters)
    assert_close(list(functional_gradient.values()), run(model, *data)[3:], rtol=1e-9, atol=1e-10)


def test_it_learns():
    """Three prototypes under random labels: what a class is called can only be known from the supports."""
    torch.manual_seed(0)
    model = nn.MetaNetwork(3, 1, 2, blocks=0, hidden=16)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    prototypes = torch.tensor([[3.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]]).view(3, 1, 2, 2)
    for _ in range(150):
        names = torch.stack([torch.randperm(3) for _ in range(16)])
        support, query = (prototypes + 0.3 * torch.randn(16, 3, 1, 2, 2) for _ in range(2))
        logits = model(support, names, query)
        optimizer.zero_grad()
        F.cross_entropy(logits.flatten(0, 1), names.flatten()).backward()
        optimizer.step()
    assert (logits.argmax(-1) == names).float().mean() > 0.9
