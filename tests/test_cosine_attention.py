import itertools
import math
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (BROADCASTS, NAMES, OPTIONS, assert_as_exact_as_eager, example, in_dtype, leaves, numpy_scores, numpy_softmax,
                     result_and_gradients, run_both, spawn_python)
from torch.autograd import gradcheck, gradgradcheck

import fastmeta
from fastmeta import functional, reference
from fastmeta.functional import cosine_attention, matching_log_probs

HAS_GPU_KERNELS = True  # conftest.py
KERNELS_OF_THE_GPU = ("cuda", "triton", "cuda-gpu", "triton-gpu")

inf, nan = math.inf, math.nan


# ---- values ------------------------------------------------------------------------------------------------------------------------

def test_by_hand(backend):
    # cosines with (3, 4): 3/5, 4/5, 1; as dot products with the supports of norm 2, 1, 10: 6, 4, 50
    query, support = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [6.0, 8.0]])
    values = torch.tensor([[1.0, 0.0], [0.0, 1.0], [10.0, 20.0]])
    e = [math.exp(x) for x in (0.6, 0.8, 1.0)]
    expected = torch.tensor([[(e[0] + 10 * e[2]) / sum(e), (e[1] + 20 * e[2]) / sum(e)]])
    torch.testing.assert_close(cosine_attention(query, support, values), expected)
    torch.testing.assert_close(matching_log_probs(query, support, torch.tensor([1, 0, 1]), 3),
                               torch.tensor([[math.log(e[1] / sum(e)), math.log((e[0] + e[2]) / sum(e)), -inf]]))
    # only the support divided by its norm: 3, 4, 5
    e = [math.exp(x) for x in (3, 4, 5)]
    torch.testing.assert_close(matching_log_probs(query, support, torch.tensor([0, 1, 2]), 3, normalize="support"),
                               torch.tensor([[math.log(x / sum(e)) for x in e]]))
    # dot products times a half: 3, 2, 25
    e = [math.exp(x) for x in (3, 2, 25)]
    torch.testing.assert_close(matching_log_probs(query, support, torch.tensor([0, 1, 2]), 3, normalize="none", scale=0.5),
                               torch.tensor([[math.log(x / sum(e)) for x in e]]))


def test_epsilon_by_hand(backend):
    # |q| = 5, |k| = 2, q.k = 6; the second support is orthogonal, so that log p_0 - log p_1 is the score itself
    query, support, labels = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0], [-4.0, 3.0]]), torch.tensor([0, 1])
    for eps_mode, normalize, eps, g in [("clamp", "both", 3.0, 15), ("clamp", "support", 3.0, 3), ("add", "both", 2.0, 12),
                                        ("add", "support", 2.0, 4), ("sqrt", "both", 44.0, 12), ("sqrt", "support", 21.0, 5)]:
        log_p = matching_log_probs(query, support, labels, 2, normalize=normalize, eps=eps, eps_mode=eps_mode)
        torch.testing.assert_close(log_p[0, 0] - log_p[0, 1], torch.tensor(6.0 / g), msg=f"{eps_mode} {normalize}")


def test_epsilon_of_a_fresh_memory(backend):
    # equations.md, section 1: a slot of 1e-6 everywhere, width 40, against a key of positive mean. With sqrt and with add it differs 70-fold.
    slot, key = torch.full((1, 40), 1e-6, dtype=torch.float64), torch.full((1, 40), 0.25, dtype=torch.float64)
    support = torch.cat([slot, torch.zeros_like(slot)])
    labels = torch.tensor([0, 1])
    norm, dot = 1e-6 * 40**0.5 * 0.25 * 40**0.5, 40 * 0.25e-6
    for eps_mode, eps, expected in [("sqrt", 1e-6, dot / math.sqrt(norm**2 + 1e-6)), ("add", 1e-8, dot / (norm + 1e-8))]:
        log_p = matching_log_probs(key, support, labels, 2, eps=eps, eps_mode=eps_mode)
        torch.testing.assert_close((log_p[0, 0] - log_p[0, 1]).item(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
def test_equations_in_numpy(backend, normalize, eps_mode):
    (query, support, values), _ = example("cosine_attention", queries=4, supports=7, features=5)
    labels = torch.tensor([2, 0, 0, 3, 2, 2, 0])
    options = dict(normalize=normalize, eps_mode=eps_mode, eps=0.3, scale=1.7)
    scores = numpy_scores(query.tolist(), support.tolist(), 1.7, normalize, 0.3, eps_mode)
    attention = np.stack([numpy_softmax(row) for row in scores])
    np.testing.assert_allclose(cosine_attention(query, support, values, **options).detach().cpu(), attention @ values.detach().cpu().numpy(), rtol=1e-12)
    probabilities = np.stack([attention[:, labels.cpu().numpy() == c].sum(1) for c in range(5)], 1)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(matching_log_probs(query, support, labels, 5, **options).detach().cpu(), np.log(probabilities), rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_against_float64(backend, name, normalize, eps_mode, broadcast):
    for dtype, mask, scale in itertools.product((torch.float64, torch.float32), (False, True), ("number", "tensor", "episode")):
        if broadcast == "scale only" and scale != "episode":
            continue
        args, keywords = example(name, broadcast, dtype=dtype, mask=mask, scale=scale)
        ours, eager, exact = run_both(name, args, keywords, normalize=normalize, eps_mode=eps_mode, eps=1e-3)
        assert_as_exact_as_eager(ours, eager, exact, f"{dtype} mask={mask} scale={scale}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
def test_low_precision_accumulates_in_float32(backend, name, normalize, eps_mode, dtype):
    """The error is the one rounding of each number, even over a thousand features, where sums in half precision have lost their digits."""
    for mask, scale in itertools.product((False, True), ("number", "episode")):
        args, keywords = example(name, "batch", queries=9, supports=40, features=1000, dtype=dtype, mask=mask, scale=scale)
        if normalize == "none":
            args = (args[0].detach().div(32).requires_grad_(), *args[1:])
        ours, _, exact = run_both(name, args, keywords, normalize=normalize, eps_mode=eps_mode)
        assert_as_exact_as_eager(ours, [x.to(o.dtype) for o, x in zip(ours, exact)], exact, f"mask={mask} scale={scale}")


def test_float16_norms_do_not_overflow(backend):
    # |x|^2 = 64 * 300^2 is far above 65504
    query = torch.full((1, 64), 300.0, dtype=torch.float16)
    support = torch.stack([torch.full((64,), 300.0), torch.full((64,), -300.0)]).half()
    log_p = matching_log_probs(query, support, torch.tensor([0, 1]), 2)
    torch.testing.assert_close(log_p, torch.tensor([[1.0, -1.0]]).log_softmax(-1).half(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("queries, supports, features, classes", [
    (1, 1, 1, 1), (1, 7, 3, 2), (7, 1, 3, 2), (17, 33, 65, 5), (16, 32, 64, 8), (15, 31, 63, 9), (8, 9, 127, 17), (3, 5, 2048, 3), (3, 5, 1601, 70),
    (129, 257, 31, 33), (3000, 41, 19, 5), (41, 5003, 19, 7), (1500, 1300, 5, 3)])
def test_sizes(backend, name, queries, supports, features, classes):
    for mask in (False, True):
        args, keywords = example(name, queries=queries, supports=supports, features=features, classes=classes, dtype=torch.float32,
                                 mask=mask, scale="tensor")
        assert_as_exact_as_eager(*run_both(name, args, keywords), f"mask={mask}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("empty", ["batch", "queries", "supports", "features", "classes"])
def test_size_zero(backend, name, empty):
    sizes = dict(batch=2, queries=3, supports=4, features=5, classes=2)
    sizes[empty] = 0
    b, q, s, d, c = sizes.values()
    if name == "matching_log_probs" and not c:
        pytest.skip("at least one class is needed, see test_wrong_input")
    query, support, scale = torch.randn(b, q, d).requires_grad_(), torch.randn(b, s, d).requires_grad_(), torch.ones(b).requires_grad_()
    for mask in (None, torch.ones(b, s, dtype=torch.bool)):
        if name == "cosine_attention":
            third = torch.randn(b, s, c).requires_grad_()
            result = cosine_attention(query, support, third, support_mask=mask, scale=scale)
            expected = torch.zeros(b, q, c) if not s else third.mean(1, keepdim=True).expand(b, q, c) if not d else None
        else:
            third = torch.zeros(b, s, dtype=torch.long)
            result = matching_log_probs(query, support, third, c, support_mask=mask, scale=scale)
            expected = torch.full((b, q, c), -inf) if not s else torch.tensor([0.0, -inf]).expand(b, q, c)
        assert result.shape == (b, q, c)
        if expected is not None:
            torch.testing.assert_close(result, expected)
        wanted = [t for t in (query, support, third, scale) if t.requires_grad]
        grads = torch.autograd.grad(torch.where(result == -inf, 0.0, result).sum(), wanted)
        for t, g in zip(wanted, grads):
            assert g.shape == t.shape and g.isfinite().all()


def test_strides(backend):
    def forms(x):
        n = x.dim()
        padded = x.new_full([2 * k + 1 for k in x.shape], 77)
        steps = padded[tuple(slice(1, None, 2) for _ in range(n))]
        steps.copy_(x)
        offset = x.new_full((x.numel() + 3,), 77)
        offset[3:] = x.flatten()
        yield "every second", steps
        yield "offset", offset[3:].view(x.shape)
        yield "transposed", x.transpose(0, -1).contiguous().transpose(0, -1)
        yield "first two swapped", x.transpose(0, 1).contiguous().transpose(0, 1)
    for name in NAMES:
        args, keywords = example(name, "batch", mask=True, scale="episode")
        keywords = {k: v.detach() for k, v in keywords.items()}
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        tensors = [*args, *keywords.values()]
        function = getattr(functional, name)
        weight = torch.randn(function(*args, **keywords).shape, dtype=torch.float64)
        expected = result_and_gradients(function, [t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
                                                   for t in args], keywords, weight)
        tried = 0
        for position, tensor in enumerate(tensors):
            for form, other in forms(tensor) if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 else ():
                assert torch.equal(tensor, other)
                changed = tensors[:position] + [other] + tensors[position + 1:]
                changed = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() and i < 3 else t
                           for i, t in enumerate(changed)]
                got = result_and_gradients(function, changed[:len(args)], dict(zip(keywords, changed[len(args):])), weight)
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name} {position} {form}: {m}")
                tried += 1
        assert tried == 16
        # a gradient with strides of its own, and with stride 0, as sum() gives it
        leaf = [t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
        result = function(*leaf, **keywords)
        for grad in (weight.transpose(0, -1).contiguous().transpose(0, -1), torch.ones((), dtype=torch.float64).expand(result.shape)):
            got = torch.autograd.grad(result, [t for t in leaf if isinstance(t, torch.Tensor) and t.requires_grad], grad, retain_graph=True)
            want = torch.autograd.grad(result, [t for t in leaf if isinstance(t, torch.Tensor) and t.requires_grad], grad.contiguous(),
                                       retain_graph=True)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_stride_zero(backend):
    row, labels = torch.randn(1, 4), torch.tensor([1])
    query = torch.randn(3, 4)
    log_p = matching_log_probs(query.expand(2, 3, 4), row.expand(2, 5, 4), labels.expand(2, 5), 2, support_mask=torch.tensor([True]).expand(2, 5))
    torch.testing.assert_close(log_p, torch.tensor([-inf, 0.0]).expand(2, 3, 2))
    values = torch.randn(1, 6)
    torch.testing.assert_close(cosine_attention(query, row.expand(5, 4), values.expand(5, 6)), values.expand(3, 6))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_label_dtypes(backend, dtype):
    query, support, labels = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 2, 1, 1, 0])
    assert torch.equal(matching_log_probs(query, support, labels.to(dtype), 3), matching_log_probs(query, support, labels, 3))


def test_attention_of_one_hot_values_is_the_readout(backend):
    query, support, labels = torch.randn(2, 6, 8), torch.randn(2, 9, 8), torch.randint(4, (2, 9))
    torch.testing.assert_close(cosine_attention(query, support, F.one_hot(labels, 4).float(), scale=10).log(),
                               matching_log_probs(query, support, labels, 4, scale=10))


def test_duplicate_supports(backend):
    query, row, other = torch.randn(4, 6).double(), torch.randn(1, 6).double().requires_grad_(), torch.randn(2, 6).double()
    log_p = matching_log_probs(query, torch.cat([row, row, row, other]), torch.tensor([0, 1, 1, 2, 3]), 4)
    torch.testing.assert_close(log_p[:, 1] - log_p[:, 0], torch.full((4,), math.log(2), dtype=torch.float64))
    single = matching_log_probs(query, torch.cat([row, other]), torch.tensor([0, 2, 3]), 4)
    torch.testing.assert_close(log_p[:, 3] - log_p[:, 2], single[:, 3] - single[:, 2])


def test_order_of_supports_means_nothing(backend):
    query, support, labels, order = torch.randn(4, 6).double(), torch.randn(50, 6).double(), torch.randint(3, (50,)), torch.randperm(50)
    torch.testing.assert_close(matching_log_probs(query, support, labels, 3), matching_log_probs(query, support[order], labels[order], 3))


# ---- zeros, large numbers, NaN -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_rows_of_zeros(backend, name, normalize, eps_mode, dtype):
    for mask in (False, True):
        args, keywords = example(name, "batch", dtype=dtype, mask=mask)
        query, support = args[0].detach(), args[1].detach()
        query[:, 1], support[:, 2] = 0, 0
        args = (query.requires_grad_(), support.requires_grad_(), *args[2:])
        ours, eager, exact = run_both(name, args, keywords, normalize=normalize, eps_mode=eps_mode)
        for g in ours[1:]:
            # The slope at a row of zeros is 1 / eps: beyond float16. The kernels give its largest number, PyTorch infinity.
            assert g.isfinite().all() or backend == "reference" and dtype == torch.float16 and not g.isnan().any()
        if dtype == torch.float64:
            assert_as_exact_as_eager(ours, eager, exact, f"mask={mask}")
        # similarity 0 with everything: the attention of that query is even, or the cosine of that support 0
        real = keywords.get("support_mask", torch.ones(3, 6, dtype=torch.bool))
        if name == "cosine_attention":
            even = torch.stack([args[2][b, real[b]].mean(0) for b in range(3)])
            torch.testing.assert_close(ours[0][:, 1], even.to(dtype), rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-3 if dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("normalize, eps_mode", OPTIONS[1:])
def test_extreme_values(backend, normalize, eps_mode):
    """Nothing but finite numbers out of finite numbers in float32, and the right ones, where their squares overflow or vanish."""
    support = torch.tensor([[1e30, 1e30, 1e30], [-1e30, 0, 2e30], [1e-30, 0, 2e-30], [1, 0, 2.0], [0, 0, 0], [1e-20, 1e20, 3e38]])
    rows = [[1, 2, 3.0], [-1, 0.5, 0], [0, 0, 0], [1e-30, 2e-30, 0]] + [[1e30, -2e30, 3e30], [-3e38, 3e38, 3e38]] * (normalize == "both")
    query = torch.tensor(rows)
    for args in ((query, support, torch.randn(6, 4)), (query, support, torch.tensor([0, 1, 2, 3, 0, 1]), 4)):
        name = NAMES[len(args) - 3]
        result = getattr(functional, name)(*args, normalize=normalize, eps_mode=eps_mode)
        assert result.isfinite().all()
        wide, _ = in_dtype(args, {}, torch.float64)
        expected = getattr(reference, name)(*wide, normalize=normalize, eps_mode=eps_mode)
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("eps_mode", ["clamp", "add", "sqrt"])
def test_extreme_gradients(backend, name, eps_mode):
    args, keywords = example(name, dtype=torch.float32, scale="tensor")
    size = torch.tensor([1e30, 1, 1e-3, 1e15, 1e-10]).unsqueeze(-1)
    args = ((args[0].detach() * size).requires_grad_(), (args[1].detach() * torch.cat([size.flip(0), size[:1]])).requires_grad_(), *args[2:])
    ours, _, exact = run_both(name, args, keywords, eps_mode=eps_mode)
    for i, (a, x) in enumerate(zip(ours, exact)):
        assert a.isfinite().all()
        if a.dim() == 2:  # row by row: gradients of different rows are 1e40 apart
            error = (a.double() - x).abs().amax(-1) / x.abs().amax(-1).clamp_min(1e-35)
            assert error.max() < 1e-3, f"tensor {i}: {error.tolist()}"


@pytest.mark.parametrize("dtype, other", [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float16, torch.float16),
                                          (torch.bfloat16, torch.float32)])
def test_scale_has_a_dtype_of_its_own(backend, dtype, other):
    query, support = torch.randn(2, 3, 4, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
    labels = torch.arange(5).remainder(3).expand(2, 5)
    scale = torch.tensor([2.0, 0.5], dtype=other, requires_grad=True)
    result = matching_log_probs(query, support, labels, 3, scale=scale)
    each = [matching_log_probs(query[b], support[b], labels[b], 3, scale=scale[b].item()) for b in range(2)]
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.stack(each))
    (grad,) = torch.autograd.grad(result[..., 0].sum(), scale)
    assert grad.dtype == other and grad.isfinite().all() and grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_scale_does_not_underflow(backend, dtype):
    # cosines 1, 0, -1: at scale 1000 the last class has log-probability -2000, where exp() is 0
    query = torch.tensor([[1.0, 0.0]], dtype=dtype, requires_grad=True)
    support = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=dtype, requires_grad=True)
    log_p = matching_log_probs(query, support, torch.tensor([0, 1, 2]), 3, scale=1000.0)
    torch.testing.assert_close(log_p, torch.tensor([[0.0, -1000.0, -2000.0]], dtype=dtype))
    # d log p_2 / d k_1 = 0 - p_1 ..., d log p_1 / d q: scale * (k_1 / |k_1| - k_0 / |k_0|), orthogonal to q
    (grad,) = torch.autograd.grad(log_p[0, 1], query, retain_graph=True)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 1000.0]], dtype=dtype))
    (grad,) = torch.autograd.grad(log_p[0, 1], support)
    # d s_1 / d k_1 = 1000 (q - 0) / 3; the part of s_0 has no tangential component
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.0], [1000 / 3, 0.0], [0.0, 0.0]], dtype=dtype))


def test_class_without_support(backend):
    query, support = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    log_p = matching_log_probs(query, support, torch.tensor([0, 2, 2, 0, 0]), 4)
    assert (log_p[:, [1, 3]] == -inf).all() and log_p[:, [0, 2]].isfinite().all()
    for g in torch.autograd.grad(log_p[:, [1, 3]].sum(), (query, support), retain_graph=True):
        assert torch.equal(g, torch.zeros_like(g))
    # and a gradient into -inf, whatever it is, leaves that of the others as it was
    weight = torch.randn(3, 4)
    loud = weight.clone()
    loud[:, 1], loud[:, 3] = inf, nan
    quiet = weight.clone()
    quiet[:, [1, 3]] = 0
    for a, b in zip(torch.autograd.grad(log_p, (query, support), loud, retain_graph=True), torch.autograd.grad(log_p, (query, support), quiet)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
def test_padding_changes_nothing(backend, name, normalize, eps_mode):
    """Against the call without the padded rows; they hold NaN, infinity and labels out of range."""
    (query, support, third, *rest), keywords = example(name, "batch", supports=9, scale="episode")
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 0], [1] * 9]).bool()
    support, third = support.detach(), third.detach()
    support[0, 1], support[0, 4], support[1, :3], support[1, 8] = nan, inf, -nan, 1e38
    if name == "cosine_attention":
        third[0, 1], third[0, 7:], third[1, 2] = nan, -inf, inf
        third.requires_grad_()
    else:
        third[0, 1], third[0, 7:], third[1, 2] = -1, 10**15, -2**63
    support.requires_grad_()
    function, options = getattr(functional, name), dict(normalize=normalize, eps_mode=eps_mode)
    wanted = [t for t in (query, support, third, keywords["scale"]) if t.requires_grad]
    result = function(query, support, third, *rest, support_mask=mask, **keywords, **options)
    loss = torch.where(result == -inf, 0.0, result).sin().sum()
    grads = torch.autograd.grad(loss, wanted)
    one_by_one = [function(query[b], support[b, mask[b]], third[b, mask[b]], *rest, scale=keywords["scale"][b], **options) for b in range(3)]
    torch.testing.assert_close(result, torch.stack(one_by_one), rtol=1e-12, atol=1e-12)
    loss = sum(torch.where(y == -inf, 0.0, y).sin().sum() for y in one_by_one)
    torch.testing.assert_close(grads, torch.autograd.grad(loss, wanted), rtol=1e-10, atol=1e-12)
    assert (grads[1][~mask] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_all_padding(backend, name):
    (query, support, third, *rest), keywords = example(name, "batch", scale="episode", mask=True)
    keywords["support_mask"][1] = False
    support = support.detach()
    support[1] = nan
    support.requires_grad_()
    result = getattr(functional, name)(query, support, third, *rest, **keywords)
    assert (result[1] == (0 if name == "cosine_attention" else -inf)).all()
    wanted = [t for t in (query, support, third, keywords["scale"]) if t.requires_grad]
    for g in torch.autograd.grad(result, wanted, torch.randn_like(result)):
        assert g.isfinite().all() and (g[1] == 0).all() and (g[0] != 0).any()


@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
@pytest.mark.parametrize("bad", [nan, inf])
def test_nan_stays_in_its_row(backend, normalize, eps_mode, bad):
    options = dict(normalize=normalize, eps_mode=eps_mode)
    query, support, values, labels = torch.randn(2, 20, 5), torch.randn(2, 30, 5), torch.randn(2, 30, 3), torch.randint(3, (2, 30))
    sick = query.clone()
    sick[1, 7, 2] = bad
    for function, third in ((cosine_attention, (values,)), (matching_log_probs, (labels, 3))):
        healthy = function(query, support, *third, **options)
        result = function(sick, support, *third, **options)
        assert not result[1, 7].isfinite().any()
        rest = torch.ones(2, 20, dtype=torch.bool)
        rest[1, 7] = False
        torch.testing.assert_close(result[rest], healthy[rest])
        ill = support.clone()
        ill[0, 11, 0] = nan
        result = function(query, ill, *third, **options)
        assert result[0].isnan().all()
        torch.testing.assert_close(result[1], healthy[1])


# ---- derivatives -------------------------------------------------------------------------------------------------------------------

def closure(name, args, keywords, **options):
    """The function of its floating leaves alone, -inf replaced (it has no derivative and no numerical difference either)."""
    wanted = leaves(args, keywords)

    def function(*tensors):
        swap = dict(zip(map(id, wanted), tensors))
        result = getattr(functional, name)(*(swap.get(id(a), a) for a in args), **{k: swap.get(id(v), v) for k, v in keywords.items()},
                                           **options)
        return torch.where(result == -inf, 0.0, result)
    return function, wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_gradcheck(backend, name, normalize, eps_mode, broadcast):
    for mask, scale in itertools.product((False, True), ("number", "tensor", "episode")):
        if broadcast == "scale only" and scale != "episode":
            continue
        args, keywords = example(name, broadcast, queries=2, supports=3, features=2, classes=2, mask=mask, scale=scale)
        function, wanted = closure(name, args, keywords, normalize=normalize, eps_mode=eps_mode, eps=0.05)
        assert gradcheck(function, wanted, fast_mode=True)
        assert backend in KERNELS_OF_THE_GPU or gradgradcheck(function, wanted, fast_mode=True)  # that differentiates the reference, on every backend


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("normalize, eps_mode", OPTIONS)
def test_gradcheck_every_entry(backend, name, normalize, eps_mode):
    args, keywords = example(name, "batch", queries=2, supports=3, features=2, classes=2, mask=True, scale="episode")
    function, wanted = closure(name, args, keywords, normalize=normalize, eps_mode=eps_mode, eps=0.05)
    assert gradcheck(function, wanted)
    assert backend in KERNELS_OF_THE_GPU or gradgradcheck(function, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_third_derivative(backend, name):
    args, keywords = example(name, queries=2, supports=3, features=2, classes=2)

    def third(function):
        x = args[0].detach().requires_grad_()
        y = torch.where((r := function(x, *args[1:], **keywords)) == -inf, 0.0, r)
        for _ in range(3):
            (y,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        return y
    torch.testing.assert_close(third(getattr(functional, name)), third(getattr(reference, name)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_only_where_wanted(backend, name):
    args, keywords = example(name, "batch", mask=True, scale="episode")
    wanted = leaves(args, keywords)
    function, _ = closure(name, args, keywords)
    full = torch.autograd.grad(function(*wanted).sin().sum(), wanted)
    for choice in itertools.product((False, True), repeat=len(wanted)):
        some = [t.detach().requires_grad_(c) for t, c in zip(wanted, choice)]
        result = function(*some)
        assert result.requires_grad == any(choice)
        if any(choice):
            got = iter(torch.autograd.grad(result.sin().sum(), [t for t in some if t.requires_grad]))
            for c, g in zip(choice, full):
                if c:
                    torch.testing.assert_close(next(got), g)


@pytest.mark.parametrize("name", NAMES)
def test_func_transforms(backend, name):
    args, keywords = example(name, "batch", mask=True, scale="episode")
    args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    keywords = {k: v.detach() for k, v in keywords.items()}
    rest = args[3:]
    tensors = [*args[:3], keywords["scale"], keywords["support_mask"]]

    def function(query, support, third, scale, mask):
        result = getattr(functional, name)(query, support, third, *rest, scale=scale, support_mask=mask)
        return torch.where(result == -inf, 0.0, result)

    def loss(*tensors):
        return function(*tensors).sin().sum()
    expected = function(*tensors)
    number = tuple(i for i in range(4) if tensors[i].is_floating_point())
    leaf = [t.clone().requires_grad_(i in number) for i, t in enumerate(tensors)]
    grads = torch.autograd.grad(loss(*leaf), [leaf[i] for i in number])
    torch.testing.assert_close(torch.func.grad(loss, number)(*tensors), grads)
    torch.testing.assert_close(torch.func.vmap(function)(*tensors), expected)
    # vmap of grad: one gradient an episode, here with everything of its own
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss, number))(*tensors), grads)
    # other positions of the mapped dimension, and inputs that have none
    moved = [tensors[0].movedim(0, 1), tensors[1].movedim(0, -1), *tensors[2:]]
    torch.testing.assert_close(torch.func.vmap(function, in_dims=(1, 2, 0, 0, 0), out_dims=1)(*moved), expected.movedim(0, 1))
    alone = [tensors[0], *(t[0] for t in tensors[1:])]
    want = torch.stack([function(q, *alone[1:]) for q in tensors[0]])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=(0, None, None, None, None))(*alone), want)
    # per-sample gradients of a shared support
    got = torch.func.vmap(torch.func.grad(loss, 1), in_dims=(0, None, None, None, None))(*alone)
    for q, g in zip(tensors[0], got):
        support = alone[1].clone().requires_grad_()
        torch.testing.assert_close(g, torch.autograd.grad(loss(q, support, *alone[2:]), support)[0])
    # Hessian-vector product: forward of backward of backward
    direction = torch.randn_like(tensors[0])
    hvp = torch.func.grad(lambda q: (torch.func.grad(loss)(q, *tensors[1:]) * direction).sum())(tensors[0])
    (first,) = torch.autograd.grad(loss(*leaf), leaf[0], create_graph=True)
    torch.testing.assert_close(hvp, torch.autograd.grad((first * direction).sum(), leaf[0])[0])


@pytest.mark.parametrize("name", NAMES)
def test_compile(backend, name):
    args, keywords = example(name, "batch", mask=True, scale="episode", dtype=torch.float32)
    function, wanted = closure(name, args, keywords)
    compiled = torch.compile(lambda *t: function(*t) * 2, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*wanted), function(*wanted) * 2
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted))


def test_compile_inductor(backend):
    query, support, labels = torch.randn(2, 7, 5, requires_grad=True), torch.randn(2, 9, 5, requires_grad=True), torch.randint(3, (2, 9))

    def loss(query, support):
        return F.nll_loss(matching_log_probs(query * 2, support, labels, 3, scale=5.0).flatten(0, 1), torch.zeros(14, dtype=torch.long))
    got, expected = torch.compile(loss, fullgraph=True)(query, support), loss(query, support)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, (query, support)), torch.autograd.grad(expected, (query, support)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, name, dtype):
    args, keywords = example(name, "batch", dtype=torch.float32, scale="episode")
    low, _ = in_dtype(args, {}, dtype)
    function = getattr(functional, name)
    with torch.autocast("cpu", dtype):
        same = function(*args, **keywords)
        mixed = function(low[0], *args[1:], **keywords)
        from_low = function(*low, **keywords)
    assert torch.equal(same, function(*args, **keywords))
    rounded, _ = in_dtype(low, {}, torch.float32)
    assert mixed.dtype == from_low.dtype == torch.float32
    assert torch.equal(from_low, function(*rounded, **keywords))
    (g,) = torch.autograd.grad(torch.where(from_low == -inf, 0.0, from_low).sum(), low[0])
    assert g.dtype == dtype and g.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("scale", [False, True])
def test_opcheck(name, mask, scale):
    (query, support, third, *classes), keywords = example(name, "batch", dtype=torch.float32, mask=mask, scale="episode")
    query, support, third = (t.detach() for t in (query, support, third))
    options = (keywords.get("support_mask"), keywords["scale"].detach() if scale else None, 2.0, 2, 0, 1e-8)
    op = getattr(torch.ops.fastmeta, name).default
    torch.library.opcheck(op, (query, support, third, *options, *classes))
    result, log_sums = op(query, support, third, *options, *classes)
    grad = torch.randn_like(result)
    for needs in (7, 1, 2):
        torch.library.opcheck(getattr(torch.ops.fastmeta, name + "_backward").default,
                              (grad, needs, query, support, third, *options, *classes, result, log_sums))


# ---- determinism and memory --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broadcast, queries, supports, features", [("batch", 75, 100, 65), ("no batch", 700, 3000, 33), ("no batch", 3, 20000, 64)])
def test_same_bits(name, broadcast, queries, supports, features):
    """On every run and for every number of threads, forward and backward."""
    if fastmeta._backend._C is None:
        pytest.skip("a promise of the kernels; the extension is not loaded")
    args, keywords = example(name, broadcast, queries, supports, features, 7, torch.float32, mask=True, scale="tensor")
    function = getattr(functional, name)
    threads, seen = torch.get_num_threads(), []
    weight = torch.randn(function(*args, **keywords).shape)
    try:
        for n in (1, 2, 3, 2, 1):
            torch.set_num_threads(n)
            seen.append(result_and_gradients(function, args, keywords, weight))
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        for a, b in zip(seen[0], other):
            assert torch.equal(a, b)


def test_memory_of_a_million_supports():
    """Peak memory beyond the inputs, measured: the 128 x 1e6 score matrix would be 512 MB."""
    if fastmeta._backend._C is None:
        pytest.skip("a promise of the kernels; the extension is not loaded")
    code = """
import resource, sys, torch
from fastmeta.functional import cosine_attention, matching_log_probs
torch.set_num_threads(2)
def run(supports):
    query, support = torch.randn(128, 8, requires_grad=True), torch.randn(supports, 8)
    values, labels = torch.randn(supports, 4), torch.randint(50, (supports,))
    for function, third in ((matching_log_probs, (labels, 50)), (cosine_attention, (values,))):
        function(query.detach(), support, *third, backend="cpp")
        result = function(query, support, *third, backend="cpp")
        torch.autograd.grad(result, query, torch.ones_like(result))
        if supports > 10000:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 - before)
run(1000)
before = 0
query, support = torch.randn(128, 8), torch.randn(10**6, 8)
values, labels = torch.randn(10**6, 4), torch.randint(50, (10**6,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
del query, support, values, labels
run(10**6)
"""
    process = spawn_python("-c", code, stdout=subprocess.PIPE)
    increases = list(map(int, process.communicate()[0].split()))
    assert len(increases) == 2 and max(increases) < 100, f"MB: {increases}"


# ---- the layer ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("layers", [fastmeta.nn, fastmeta.reference])
def test_layer(backend, layers):
    layer = layers.CosineAttention(scale=3.0, learn_scale=True, normalize="support", eps=0.1, eps_mode="add").double()
    assert [n for n, _ in layer.named_parameters()] == ["scale"] and layer.scale.dim() == 0
    (query, support, values), keywords = example("cosine_attention", "batch", mask=True)
    mask = keywords["support_mask"]
    result = layer(query, support, values, mask)
    torch.testing.assert_close(result, cosine_attention(query, support, values, scale=3.0, normalize="support", eps=0.1, eps_mode="add",
                                                        support_mask=mask))
    result.sin().sum().backward()
    assert layer.scale.grad.abs() > 0 and gradcheck(lambda s: layer(query, s, values, mask), support, fast_mode=True)
    other = layers.CosineAttention(learn_scale=True)
    other.load_state_dict(layer.float().state_dict())
    assert other.scale.item() == 3.0
    assert not list(layers.CosineAttention(scale=3.0).parameters())
    assert repr(layers.CosineAttention(scale=2)) == "CosineAttention(scale=2.0, normalize='both', eps=1e-08, eps_mode='clamp')"


def test_backend_choice(monkeypatch):
    query, support, labels = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    called = []
    monkeypatch.setattr(reference, "matching_log_probs", lambda *a, **k: called.append(1) or torch.zeros(2, 2))
    matching_log_probs(query, support, labels, 2, backend="reference")
    with fastmeta.use_backend("reference"):
        matching_log_probs(query, support, labels, 2)
        assert len(called) == 2
        if fastmeta._backend._C is not None:
            matching_log_probs(query, support, labels, 2, backend="cpp")
            with fastmeta.use_backend(None):
                matching_log_probs(query, support, labels, 2)
            assert len(called) == 2
    monkeypatch.setattr(fastmeta._backend, "_kernels", {})
    matching_log_probs(query, support, labels, 2)
    assert len(called) == 3
    with pytest.raises(RuntimeError, match="backend 'cpp' cannot run on cpu tensors: the extension is not loaded"):
        matching_log_probs(query, support, labels, 2, backend="cpp")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run on cpu tensors: it has kernels for CUDA tensors only"):
        matching_log_probs(query, support, labels, 2, backend="triton")


# ---- wrong input -------------------------------------------------------------------------------------------------------------------

def good():
    return dict(query=torch.randn(2, 3, 4), support=torch.randn(2, 5, 4), labels=torch.randint(3, (2, 5)), num_classes=3)


def good_attention():
    return dict(query=torch.randn(2, 3, 4), support=torch.randn(2, 5, 4), values=torch.randn(2, 5, 3))


M = "matching_log_probs: "
A = "cosine_attention: "
sparse = torch.eye(4).to_sparse()
WRONG = [
    (dict(query=[[1.0]]), TypeError, M + "query must be a tensor, got list"),
    (dict(support=None), TypeError, M + "support must be a tensor, got NoneType"),
    (dict(labels=[0, 1]), TypeError, M + "labels must be a tensor, got list"),
    (dict(query=sparse), TypeError, M + "query must be a dense (strided) tensor, got torch.sparse_coo"),
    (dict(support=sparse), TypeError, M + "support must be a dense (strided) tensor, got torch.sparse_coo"),
    (dict(query=torch.randn(2, 3, 4, dtype=torch.complex64)), TypeError,
     M + "query must be float32, float64, float16 or bfloat16, got torch.complex64"),
    (dict(query=torch.ones(2, 3, 4, dtype=torch.long)), TypeError, M + "query must be float32, float64, float16 or bfloat16, got torch.int64"),
    (dict(support=torch.randn(2, 5, 4, dtype=torch.float64)), TypeError,
     M + "support must have the dtype of query, torch.float32, got torch.float64"),
    (dict(query=torch.randn(4)), ValueError, M + "query must be [*, Q, D], got shape [4]"),
    (dict(support=torch.randn(4)), ValueError, M + "support must be [*, S, D] with the D = 4 of query, got shape [4]"),
    (dict(support=torch.randn(2, 5, 6)), ValueError, M + "support must be [*, S, D] with the D = 4 of query, got shape [2, 5, 6]"),
    (dict(labels=torch.rand(2, 5)), TypeError, M + "labels must have an integer dtype, got torch.float32"),
    (dict(labels=torch.ones(2, 5, dtype=torch.bool)), TypeError, M + "labels must have an integer dtype, got torch.bool"),
    (dict(labels=torch.zeros(2, 6, dtype=torch.long)), ValueError, M + "labels must be [*, S] with the S = 5 of support, got shape [2, 6]"),
    (dict(labels=torch.tensor(1)), ValueError, M + "labels must be [*, S] with the S = 5 of support, got shape []"),
    (dict(labels=torch.full((2, 5), 3)), ValueError, M + "labels must be in [0, 3), got 3"),
    (dict(labels=torch.full((2, 5), -1)), ValueError, M + "labels must be in [0, 3), got -1"),
    (dict(labels=torch.full((2, 5), 200, dtype=torch.uint8)), ValueError, M + "labels must be in [0, 3), got 200"),
    (dict(labels=torch.full((2, 5), 2**62)), ValueError, M + f"labels must be in [0, 3), got {2**62}"),
    (dict(labels=torch.tensor([[0] * 5, [0, 0, 7, 0, 0]]), support_mask=torch.tensor([[True] * 5, [False, True, True, True, True]])), ValueError,
     M + "labels must be in [0, 3), got 7"),
    (dict(num_classes=0), ValueError, M + "num_classes must be at least 1, got 0"),
    (dict(num_classes=-5), ValueError, M + "num_classes must be at least 1, got -5"),
    (dict(num_classes=3.0), TypeError, M + "num_classes must be an integer, got float"),
    (dict(num_classes=True), TypeError, M + "num_classes must be an integer, got bool"),
    (dict(num_classes=None), TypeError, M + "num_classes must be an integer, got NoneType"),
    (dict(support=torch.randn(2, 5, 4, device="meta")), ValueError,
     M + "all tensors must be on one device, got query on cpu, support on meta, labels on cpu"),
    (dict(labels=torch.zeros(2, 5, dtype=torch.long, device="meta")), ValueError,
     M + "all tensors must be on one device, got query on cpu, support on cpu, labels on meta"),
    (dict(support_mask=torch.ones(2, 5)), TypeError, M + "support_mask must be a bool tensor, True for real rows, got torch.float32"),
    (dict(support_mask=[True] * 5), TypeError, M + "support_mask must be a bool tensor, True for real rows, got list"),
    (dict(support_mask=torch.ones(2, 4, dtype=torch.bool)), ValueError,
     M + "support_mask must be [*, S] with the S = 5 of support, got shape [2, 4]"),
    (dict(support_mask=torch.tensor(True)), ValueError, M + "support_mask must be [*, S] with the S = 5 of support, got shape []"),
    (dict(support_mask=torch.ones(2, 5, dtype=torch.bool, device="meta")), ValueError,
     M + "support_mask must be on the device of query, cpu, got meta"),
    (dict(support=torch.randn(3, 5, 4)), ValueError, M + "the batch dimensions of query, support, labels, support_mask and scale must broadcast, "
     "got [2], [3], [2]"),
    (dict(scale=torch.ones(3)), ValueError, M + "the batch dimensions of query, support, labels, support_mask and scale must broadcast, "
     "got [2], [2], [2], [3]"),
    (dict(scale="10"), TypeError, M + "scale must be a number or a floating tensor, got str"),
    (dict(scale=None), TypeError, M + "scale must be a number or a floating tensor, got NoneType"),
    (dict(scale=True), TypeError, M + "scale must be a number or a floating tensor, got bool"),
    (dict(scale=torch.tensor(3)), TypeError, M + "scale must be a number or a floating tensor, got a tensor of torch.int64"),
    (dict(scale=torch.ones((), device="meta")), ValueError, M + "scale must be on the device of query, cpu, got meta"),
    (dict(normalize="query"), ValueError, M + "normalize must be one of 'none', 'support', 'both', got 'query'"),
    (dict(normalize=None), ValueError, M + "normalize must be one of 'none', 'support', 'both', got None"),
    (dict(eps_mode="max"), ValueError, M + "eps_mode must be one of 'clamp', 'add', 'sqrt', got 'max'"),
    (dict(eps=0), ValueError, M + "eps must be positive and finite, got 0"),
    (dict(eps=-1e-8), ValueError, M + "eps must be positive and finite, got -1e-08"),
    (dict(eps=nan), ValueError, M + "eps must be positive and finite, got nan"),
    (dict(eps=inf), ValueError, M + "eps must be positive and finite, got inf"),
    (dict(eps="1e-8"), TypeError, M + "eps must be a number, got str"),
    (dict(backend="gpu"), ValueError, M + "unknown backend 'gpu', expected one of 'cpp', 'triton', 'reference'"),
]
WRONG_ATTENTION = [
    (dict(values=None), TypeError, A + "values must be a tensor, got NoneType"),
    (dict(values=torch.randn(2, 5, 3, dtype=torch.float64)), TypeError, A + "values must have the dtype of query, torch.float32, got torch.float64"),
    (dict(values=torch.zeros(2, 5, 3, dtype=torch.long)), TypeError, A + "values must have the dtype of query, torch.float32, got torch.int64"),
    (dict(values=torch.randn(2, 4, 3)), ValueError, A + "values must be [*, S, C] with the S = 5 of support, got shape [2, 4, 3]"),
    (dict(values=torch.randn(5)), ValueError, A + "values must be [*, S, C] with the S = 5 of support, got shape [5]"),
    (dict(values=sparse), TypeError, A + "values must be a dense (strided) tensor, got torch.sparse_coo"),
    (dict(values=torch.randn(3, 5, 3)), ValueError, A + "the batch dimensions of query, support, values, support_mask and scale must broadcast, "
     "got [2], [2], [3]"),
    (dict(query=torch.randn(2, 3, 4).half()), TypeError, A + "support must have the dtype of query, torch.float16, got torch.float32"),
]


@pytest.mark.parametrize("change, error, message", WRONG, ids=[f"{'-'.join(w[0])}-{i}" for i, w in enumerate(WRONG)])
def test_wrong_input(backend, change, error, message):
    if backend in KERNELS_OF_THE_GPU and "labels must be in" in message:
        assert not matching_log_probs(**{**good(), **change}).isfinite().all()  # see test_wrong_label_on_a_gpu
        return
    message = message.replace("cpu", str(torch.randn(()).device))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        matching_log_probs(**{**good(), **change})
    assert (type(caught.value), str(caught.value)) == (error, message)


@pytest.mark.parametrize("change, error, message", WRONG_ATTENTION, ids=[f"{'-'.join(w[0])}-{i}" for i, w in enumerate(WRONG_ATTENTION)])
def test_wrong_input_attention(backend, change, error, message):
    message = message.replace("cpu", str(torch.randn(()).device))
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        cosine_attention(**{**good_attention(), **change})
    assert (type(caught.value), str(caught.value)) == (error, message)


def test_wrong_input_table_starts_from_right_input(backend):
    assert matching_log_probs(**good()).shape == cosine_attention(**good_attention()).shape == (2, 3, 3)


def test_wrong_label_on_a_gpu(backend):
    """Nothing waits for the device to look: every log-probability of that episode is NaN, those of others are as they were."""
    if backend not in KERNELS_OF_THE_GPU:
        pytest.skip("elsewhere it is an error, see test_wrong_input")
    query, support, labels = torch.randn(3, 40, 5), torch.randn(3, 90, 5), torch.randint(4, (3, 90))
    right = matching_log_probs(query, support, labels, 6)
    for wrong in (-1, 6, 10**15, -2**63):
        labels[1, 77] = wrong
        for used in (slice(60, 90), slice(0, 90)):  # a few supports, many supports
            result = matching_log_probs(query, support[:, used], labels[:, used], 6)
            assert result[1, :, :4].isnan().all()
            expected = matching_log_probs(query, support[:, used], labels[:, used].clamp(0, 5), 6)
            assert torch.equal(result[::2], expected[::2])
    assert torch.equal(right[::2], result[::2])


def test_wrong_label_deep_in_a_large_set(backend):
    if backend in KERNELS_OF_THE_GPU:
        pytest.skip("see test_wrong_label_on_a_gpu")
    labels = torch.zeros(50000, dtype=torch.long)
    labels[33333] = 5
    with pytest.raises(ValueError, match=r"labels must be in \[0, 5\), got 5"):
        matching_log_probs(torch.randn(70, 3), torch.randn(50000, 3), labels, 5)


def test_meta_tensors_have_shapes():
    query, support = torch.randn(2, 1, 3, 4, device="meta"), torch.randn(7, 5, 4, device="meta")
    assert cosine_attention(query, support, torch.randn(5, 6, device="meta")).shape == (2, 7, 3, 6)
    assert matching_log_probs(query, support, torch.zeros(5, dtype=torch.long, device="meta"), 9).shape == (2, 7, 3, 9)
