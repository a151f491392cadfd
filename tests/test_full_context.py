import numpy as np
import pytest
import torch
from helpers import assert_as_exact_as_eager, numpy_lstm_step, numpy_softmax
from torch.autograd import gradcheck, gradgradcheck

from fastmeta import nn, reference

nan = float("nan")
ENCODERS = ["SupportEncoder", "QueryEncoder"]


def pair(name, features, dtype=torch.float64, **options):
    """A fast layer and the reference layer, same weights; weights large enough to leave the linear part of the LSTM."""
    slow, fast = getattr(reference, name)(features, **options).to(dtype), getattr(nn, name)(features, **options).to(dtype)
    with torch.no_grad():
        for p in slow.parameters():
            p.normal_(std=0.6)
    fast.load_state_dict(slow.state_dict())
    return fast, slow


def run(layer, args, weight, floats=None):
    floats = [a for a in args if a is not None and a.requires_grad] if floats is None else floats
    result = layer(*args)
    return [result, *torch.autograd.grad((result * weight.to(result.dtype)).sum(), [*floats, *layer.parameters()],
                                         materialize_grads=True)]


def compare(name, fast, slow, *args):
    """Values and all gradients; in float32 against float64, by the error that the reference layer has."""
    weight = torch.randn(slow(*args).shape, dtype=args[0].dtype).double()
    ours, eager = run(fast, args, weight), run(slow, args, weight)
    if args[0].dtype == torch.float64:
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        return ours
    wide = [a.detach().double().requires_grad_(a.requires_grad) if a is not None and a.is_floating_point() else a for a in args]
    assert_as_exact_as_eager(ours, eager, run(slow.double(), wide, weight), name)
    slow.to(args[0].dtype)
    return ours


@pytest.mark.parametrize("steps", [None, 0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_equal_to_reference(batch, masked, dtype, steps):
    support = torch.randn(*batch, 7, 5, dtype=dtype, requires_grad=True)
    query = torch.randn(*batch, 4, 5, dtype=dtype, requires_grad=True)
    mask = torch.rand(*batch, 7) > 0.4 if masked else None
    fast, slow = pair("QueryEncoder", 5, dtype, steps=steps)
    if steps == 0:
        assert torch.equal(fast(query, support, mask), query) and torch.equal(slow(query, support, mask), query)
        return
    compare("QueryEncoder", fast, slow, query, support, mask)
    if steps is None:
        compare("SupportEncoder", *pair("SupportEncoder", 5, dtype), support, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 5, 75, 64), (4, 25, 30, 32), (2, 1, 9, 3), (2, 130, 3, 4)])
def test_sizes(sizes, masked):
    b, s, q, d = sizes
    support, query = torch.randn(b, s, d, requires_grad=True), torch.randn(b, q, d, requires_grad=True)
    mask = torch.rand(b, s) > 0.3 if masked else None
    for name, args, options in (("SupportEncoder", (support, mask), {}), ("QueryEncoder", (query, support, mask), {"steps": min(s, 5)})):
        fast, slow = (getattr(layers, name)(d, **options) for layers in (nn, reference))
        fast.load_state_dict(slow.state_dict())
        compare(name, fast, slow, *args)


@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("b, s, q, d", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)])
def test_size_zero(layers, b, s, q, d):
    support, query = torch.randn(b, s, d, requires_grad=True), torch.randn(b, q, d, requires_grad=True)
    for mask in (None, torch.ones(b, s, dtype=torch.bool)):
        encoder = layers.SupportEncoder(d)
        encoded = encoder(support, mask)
        assert encoded.shape == support.shape
        assert torch.equal(layers.QueryEncoder(d)(query, support[:, :0], None if mask is None else mask[:, :0]), query)
        for steps in (None, 2):
            encoded = encoder(support, mask)
            result = layers.QueryEncoder(d, steps)(query, encoded, mask)
            assert result.shape == query.shape and result.isfinite().all()
            torch.autograd.grad(result.sum() + encoded.sum(), (query, support), allow_unused=True)


def test_no_support_but_steps():
    """f without anything to read: an LSTM on [f'(x), 0]."""
    fast, slow = pair("QueryEncoder", 3, steps=2)
    query = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    compare("QueryEncoder", fast, slow, query, nothing, None)
    padding = torch.full((2, 3), nan, dtype=torch.float64)
    torch.testing.assert_close(fast(query, padding, torch.zeros(2, dtype=torch.bool)), slow(query, nothing))


def test_broadcast():
    fast, slow = pair("QueryEncoder", 3)
    one, many = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, 4, 3, dtype=torch.float64, requires_grad=True)
    for query, support in ((one, many), (many, one), (many[:, :1], many[0])):
        for mask in (None, torch.tensor([True, False, True, True])):
            torch.testing.assert_close(fast(query, support, mask), slow(query, support, mask))
    compare("QueryEncoder", fast, slow, one, many, None)
    fast, slow = pair("SupportEncoder", 3)
    compare("SupportEncoder", fast, slow, many, torch.tensor([True, False, True, True]))


# ---- the equations once more ---------------------------------------------------------------------------------------------------------

def numpy_full_context(support, queries, lstm, cell, steps):
    d = support.shape[1]
    directions = []
    for rows, suffix in ((support, ""), (support[::-1], "_reverse")):
        w = [lstm[f"lstm.{n}_l0{suffix}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        h, c, out = np.zeros(d), np.zeros(d), []
        for x in rows:
            h, c = numpy_lstm_step(x, h, c, *w)
            out.append(h)
        directions.append(np.array(out if not suffix else out[::-1]))
    g = directions[0] + directions[1] + support
    f = []
    for x in queries:
        h, c = x, np.zeros(d)
        for _ in range(steps):
            read = numpy_softmax(np.array([h @ row for row in g])) @ g
            h, c = numpy_lstm_step(np.concatenate([x, read]), h, c, *(cell[f"cell.{n}"] for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")))
            h = h + x
        f.append(h)
    return g, np.array(f)


@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("steps", [None, 1, 2, 5])
def test_equations_in_numpy(layers, steps):
    g, f = pair("SupportEncoder", 2)[layers is reference], pair("QueryEncoder", 2, steps=steps)[layers is reference]
    support, query = torch.randn(3, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    want_g, want_f = numpy_full_context(support.numpy(), query.numpy(), {k: v.numpy() for k, v in g.state_dict().items()},
                                        {k: v.numpy() for k, v in f.state_dict().items()}, 3 if steps is None else steps)
    encoded = g(support)
    np.testing.assert_allclose(encoded.detach(), want_g, rtol=1e-10)
    np.testing.assert_allclose(f(query, encoded).detach(), want_f, rtol=1e-10)


@pytest.mark.parametrize("layers", [nn, reference])
def test_by_hand(layers):
    """One feature, one support, one step, weights that make each gate a known number."""
    g, f = layers.SupportEncoder(1).double(), layers.QueryEncoder(1, 1).double()
    with torch.no_grad():
        for p in (*g.parameters(), *f.parameters()):
            p.zero_()
        # candidate tanh(x) forwards and tanh(2 x) backwards, the other gates sigmoid(0) = 1/2: h = tanh(tanh(..) / 2) / 2
        g.lstm.weight_ih_l0[2], g.lstm.weight_ih_l0_reverse[2] = 1.0, 2.0
        # candidate tanh(r + h): with one support r = g(s), and h_0 = f'(x)
        f.cell.weight_ih[2, 1], f.cell.weight_hh[2, 0] = 1.0, 1.0
    s, x, tanh = 0.3, -0.7, np.tanh
    want_g = s + tanh(tanh(s) / 2) / 2 + tanh(tanh(2 * s) / 2) / 2
    want_f = x + tanh(tanh(want_g + x) / 2) / 2
    encoded = g(torch.tensor([[s]]).double())
    assert abs(encoded.item() - want_g) < 1e-7 and abs(f(torch.tensor([[x]]).double(), encoded).item() - want_f) < 1e-7


# ---- padding -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [nn, reference])
@pytest.mark.parametrize("steps", [None, 3])
def test_padding_changes_nothing(layers, steps):
    """Padding at the front, between and behind, holding NaN; one episode without padding, one of a single support, one of none."""
    g, f = pair("SupportEncoder", 3)[layers is reference], pair("QueryEncoder", 3, steps=steps)[layers is reference]
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1] * 6, [0, 0, 0, 0, 1, 0], [0] * 6, [1, 1, 1, 0, 0, 0]]).bool()
    support = torch.randn(5, 6, 3, dtype=torch.float64)
    support[~mask] = nan
    support.requires_grad_()
    query = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    encoded = g(support, mask)
    result = f(query, encoded, mask)
    assert encoded[~mask].isnan().all()  # given back as they came
    wanted = [query, support, *g.parameters(), *f.parameters()]
    grads = torch.autograd.grad(result.sin().sum() + encoded[mask].cos().sum(), wanted)
    alone, loss = [], 0
    for b in range(5):
        rows = support[b, mask[b]]
        e = g(rows) if len(rows) else rows
        alone.append(f(query[b], e))
        torch.testing.assert_close(encoded[b, mask[b]], e)
        loss = loss + alone[-1].sin().sum() + e.cos().sum()
    torch.testing.assert_close(result, torch.stack(alone))
    torch.testing.assert_close(grads, torch.autograd.grad(loss, wanted), rtol=1e-9, atol=1e-9)
    assert (grads[1][~mask] == 0).all()
    assert torch.equal(result[3], query[3]) == (steps is None)


@pytest.mark.parametrize("layers", [nn, reference])
def test_order(layers):
    """g depends on the order of the support and f, given g, does not."""
    g, f = pair("SupportEncoder", 4)[layers is reference], pair("QueryEncoder", 4, steps=3)[layers is reference]
    support, query, order = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.tensor([3, 0, 4, 2, 1])
    encoded = g(support)
    assert (g(support[order]) - encoded[order]).abs().max() > 1e-2
    torch.testing.assert_close(f(query, encoded[order]), f(query, encoded))
    # queries know nothing of each other
    torch.testing.assert_close(f(query[1:2], encoded), f(query, encoded)[1:2])
    # reading backwards is the same with the directions exchanged
    swapped = layers.SupportEncoder(4).double()
    swapped.load_state_dict({k.removesuffix("_reverse") if k.endswith("_reverse") else k + "_reverse": v for k, v in g.state_dict().items()})
    torch.testing.assert_close(swapped(support.flip(0)), encoded.flip(0))


# ---- derivatives, dtypes, transforms -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_second_derivative(name, masked):
    layer = pair(name, 2)[0]
    support = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    inputs = [support] if name == "SupportEncoder" else [torch.randn(2, 2, 2, dtype=torch.float64, requires_grad=True), support]
    names, weights = zip(*layer.named_parameters())

    def function(*tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors[len(inputs):])), (*tensors[:len(inputs)], mask))
    arguments = [*inputs, *(w.detach().requires_grad_() for w in weights)]
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_func_grad(name, masked):
    fast, slow = pair(name, 4)
    mask = torch.tensor([[True, False, True], [True, True, True]]) if masked else None
    args = [torch.randn(2, 5, 4).double(), torch.randn(2, 3, 4).double()][name == "SupportEncoder":]
    got, want = (torch.func.grad(lambda x: layer(x, *args[1:], mask).sin().sum())(args[0]) for layer in (fast, slow))
    torch.testing.assert_close(got, want)


def test_vmap_of_the_query_encoder():
    """The support encoder cannot: aten::lstm has no batching rule. It takes any number of batch dimensions instead."""
    fast, _ = pair("QueryEncoder", 4)
    query, support = torch.randn(3, 5, 4).double(), torch.randn(3, 6, 4).double()
    torch.testing.assert_close(torch.func.vmap(fast)(query, support), fast(query, support))
    torch.testing.assert_close(torch.func.vmap(fast, in_dims=(0, None))(query, support[0]), fast(query, support[0]))
    grads = torch.func.vmap(torch.func.grad(lambda q, s: fast(q, s).sin().sum()))(query, support)
    torch.testing.assert_close(grads, torch.func.grad(lambda q: fast(q, support).sin().sum())(query))


@pytest.mark.parametrize("name", ENCODERS)
def test_autocast(name):
    fast, slow = pair(name, 16, torch.float32)
    args = [torch.randn(2, 9, 16), torch.randn(2, 6, 16)][name == "SupportEncoder":]
    exact = slow.double()(*(a.double() for a in args))
    slow.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours = fast(*args)
        try:
            eager = slow(*args)
        except RuntimeError:  # PyTorch's own LSTM, on a processor without instructions for bfloat16
            eager = exact
        ours.float().sum().backward()
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, eager))
    assert error <= 2 * allowed + 2 * torch.finfo(torch.bfloat16).eps
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in fast.parameters())


@pytest.mark.parametrize("name", ENCODERS)
def test_compile(name):
    fast, _ = pair(name, 4, torch.float32)
    args = [torch.randn(2, 5, 4), torch.randn(2, 3, 4, requires_grad=True)][name == "SupportEncoder":]
    got, expected = torch.compile(fast, fullgraph=True, backend="aot_eager")(*args), fast(*args)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), args[-1]), torch.autograd.grad(expected.sin().sum(), args[-1]))


@pytest.mark.parametrize("name", ENCODERS)
def test_strides(name):
    fast, slow = pair(name, 4)
    args = [torch.randn(4, 5, 3).double().mT.transpose(0, 1), torch.randn(2, 3, 4).double()[..., ::2].repeat(1, 1, 2).transpose(0, 1)[:, :, :4]]
    args = [args[0][:3], args[1][:3, :2]][name == "SupportEncoder":]
    if name == "QueryEncoder":
        args[0] = torch.randn(5, 3, 4).double().transpose(0, 1)
    torch.testing.assert_close(fast(*args), slow(*args))


@pytest.mark.parametrize("name", ENCODERS)
def test_state_dict_is_the_reference_one(name):
    fast, slow = getattr(nn, name)(6), getattr(reference, name)(6)
    assert {k: v.shape for k, v in fast.state_dict().items()} == {k: v.shape for k, v in slow.state_dict().items()}
    torch.manual_seed(3)
    fast = getattr(nn, name)(6)
    torch.manual_seed(3)
    slow = getattr(reference, name)(6)
    for a, b in zip(fast.parameters(), slow.parameters()):
        assert torch.equal(a, b)
