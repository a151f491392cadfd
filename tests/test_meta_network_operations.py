"""coordinate_mlp, coordinate_lstm and augmented_pool as operations: precision, derivatives, transforms, wrong input."""

import math

import pytest
import torch
from helpers import assert_as_exact_as_eager
from test_mann_operations import values_and_gradients
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from fastmeta import _backend, functional, reference, schemas
from fastmeta.functional import augmented_pool, coordinate_lstm, coordinate_mlp

MLP, LSTM, POOL = NAMES = ("coordinate_mlp", "coordinate_lstm", "augmented_pool")
BORDER = math.exp(-7)  # of the preprocessing: what is smaller than it enters a generator linearly
BLOCK = 1024  # coordinates of a task of the C++ kernels; their tiles are 64 of float32, 32 of float64


def leaf(*shape, scale=1.0, dtype=torch.float64):
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype).requires_grad_()


def example(name, size=None, width=3, steps=2, dtype=torch.float64):
    """Tensors by name; ``size``: coordinates, or [N, C, H, W]."""
    def leaves(*shapes):
        return (leaf(*shape, scale=0.5, dtype=dtype) for shape in shapes)
    if name == POOL:
        return dict(zip(("slow", "fast"), leaves(*[size or (2, 3, 5, 4)] * 2)))
    size = 6 if size is None else size
    if name == MLP:
        return {"gradients": leaf(size, scale=2 * BORDER, dtype=dtype)} | dict(zip(
            ("weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3"),
            leaves((width, 2), (width,), (width, width), (width,), (1, width), (1,))))
    return {"gradients": leaf(steps, size, scale=2 * BORDER, dtype=dtype)} | dict(zip(
        ("weight_ih", "weight_hh", "bias", "output_weight", "output_bias"), leaves((4 * width, 2), (4 * width, width), (4 * width,), (1, width), (1,))))


def smooth_example(name):
    """Far from the kinks: on both sides of e^-7, and no two numbers of a window alike."""
    tensors = example(name)
    with torch.no_grad():
        if name == POOL:
            for t in tensors.values():
                t.copy_((torch.randperm(t.numel()) - t.numel() / 2 + 0.3).view(t.shape) / 10)
        else:
            tensors["gradients"].copy_(torch.tensor([0.3, -0.4, 3, -5, 0.1, 2.5]) * BORDER)
    return tensors


def compare(name, tensors):
    """The fast function in this dtype against the reference in float64, and in this dtype."""
    wide = {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    weight = torch.rand_like(getattr(reference, name)(*wide.values())) + 0.5  # of one sign: thousands of coordinates that cancel are noise
    runs = [values_and_gradients(f, name, t, {}, [weight]) for f, t in ((functional, tensors), (reference, tensors), (reference, wide))]
    assert all(r.dtype == next(iter(tensors.values())).dtype for r in runs[0])
    assert_as_exact_as_eager(*runs, what=f"{name} {[list(t.shape) for t in tensors.values()]}")


# ---- by hand -------------------------------------------------------------------------------------------------------------------------

def test_lstm_by_hand(backend):
    """One unit; of the channels only the sign enters, which is 1 here; the output is 2 h + 3.

    Step 1: i = f = o = sigmoid(1), g = tanh(1): c = 0.731059 * 0.761594 = 0.556770, h = 0.731059 * tanh(0.556770) = 0.369606.
    Step 2: the gates are of 1 + h: sigmoid = 0.797317, tanh = 0.878602: c = 0.797317 * (0.556770 + 0.878602) = 1.144446,
    h = 0.797317 * tanh(1.144446) = 0.650535.
    """
    result = coordinate_lstm(torch.full((2, 1), 2000.0).double(), torch.tensor([[0.0, 1.0]] * 4).double(), torch.ones(4, 1).double(),
                             torch.zeros(4).double(), torch.tensor([[2.0]]).double(), torch.tensor([3.0]).double())
    assert_close(result, torch.tensor([2 * 0.650535 + 3]).double(), rtol=0, atol=1e-5)


def test_pool_by_hand(backend):
    """Three by three: a window of four, two of two, and one alone. relu(slow) + relu(fast)."""
    slow = torch.tensor([[[[1.0, -2, 3], [0, 5, -1], [-1, -1, 4]]]], dtype=torch.float64, requires_grad=True)
    fast = torch.tensor([[[[4.0, -2, -3], [0, 0, 3], [2, 2, 1]]]], dtype=torch.float64, requires_grad=True)
    # sums: 5 0 3 / 0 5 3 / 2 2 5. Of 5 and 5, of 3 and 3, of 2 and 2, the first has the gradient; a half below 0 passes none on.
    result = augmented_pool(slow, fast)
    assert_close(result, torch.tensor([[[[5.0, 3], [2, 5]]]]).double())
    of_slow, of_fast = torch.autograd.grad(result, (slow, fast), torch.tensor([[[[10.0, 20], [30, 40]]]]).double())
    assert_close(of_slow, torch.tensor([[[[10.0, 0, 20], [0, 0, 0], [0, 0, 40]]]]).double())
    assert_close(of_fast, torch.tensor([[[[10.0, 0, 0], [0, 0, 0], [30, 0, 40]]]]).double())


# ---- precision -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 5, 20, 33])
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 63, 64, 65, BLOCK + 1])
@pytest.mark.parametrize("name, steps", [(MLP, 1), (LSTM, 1), (LSTM, 2), (LSTM, 5)])
def test_generators_against_float64(name, steps, size, width, dtype):
    compare(name, example(name, size, width, steps, dtype))


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("zeros", ["none but one", "a third", "half of the steps", "all"])
@pytest.mark.parametrize("size", [5, 3 * BLOCK + 5])
@pytest.mark.parametrize("name", [MLP, LSTM])
def test_gradients_of_zero(name, size, zeros, second_order):
    """Coordinates that all have the same result, in tiles and blocks with many, few or nothing else."""
    tensors = example(name, size)
    with torch.no_grad():
        gradients = tensors["gradients"]
        if zeros == "none but one":
            gradients[..., size // 2] = 0
        elif zeros == "a third":
            gradients[..., torch.rand(size) < 1 / 3] = 0
        elif zeros == "half of the steps":
            gradients[torch.rand(gradients.shape) < 0.5] = -0.0
        else:
            gradients.zero_()
    gradients.requires_grad_(second_order)
    compare(name, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (2, 3, 2, 2), (2, 3, 7, 7), (1, 2, 5, 28), (3, 2, 28, 5), (2, 2, 1, 9), (2, 2, 9, 1), (0, 3, 4, 4),
                                  (3, 64, 14, 14), (2, 64, 28, 28)])
def test_pool_is_pytorchs(size, dtype):
    """To the bit, with ties and with NaN and infinities in the windows."""
    for change in ("nothing", "ties", "nan"):
        tensors = example(POOL, size, dtype=dtype)
        with torch.no_grad():
            for i, t in enumerate(tensors.values()):
                if change == "ties":
                    t.copy_((2 * t).round())
                if change == "nan":
                    t.view(-1)[i::5] = (torch.nan, torch.inf)[i]
        weight = torch.randn_like(reference.augmented_pool(*tensors.values()))
        ours, theirs = (values_and_gradients(f, POOL, tensors, {}, [weight]) for f in (functional, reference))
        assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, name, dtype):
    """Computed in float32, rounded once."""
    tensors = {key: t.detach() for key, t in example(name, dtype=dtype).items()}
    result = getattr(functional, name)(*tensors.values())
    assert result.dtype == dtype
    assert torch.equal(result, getattr(functional, name)(*(t.float() for t in tensors.values())).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_strides(backend, name):
    """Every tensor as every second column of a transposed one."""
    tensors = example(name)
    odd = {}
    for key, t in tensors.items():
        holder = torch.full((*t.shape[::-1], 2), torch.nan, dtype=t.dtype)
        view = holder[..., 0].permute(*range(t.dim() - 1, -1, -1))
        odd[key] = view.copy_(t.detach()).requires_grad_()
        assert t.numel() < 2 or not odd[key].is_contiguous()
    weight = torch.randn_like(getattr(reference, name)(*tensors.values()))
    assert_close(values_and_gradients(functional, name, odd, {}, [weight]), values_and_gradients(functional, name, tensors, {}, [weight]))


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 0, 3), (4, 1, 3, 3)])
@pytest.mark.parametrize("name", [MLP, LSTM])
def test_shapes(backend, name, shape):
    """A gradient of any shape: coordinate by coordinate."""
    gradients, *weights = example(name, math.prod(shape)).values()
    given = gradients.detach().reshape(((2,) if name == LSTM else ()) + shape)
    result = getattr(functional, name)(given, *weights)
    assert result.shape == shape
    assert_close(result.flatten(), getattr(functional, name)(gradients, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [MLP, LSTM])
def test_extreme_gradients(name, dtype):
    """Nothing, the smallest and the largest numbers, infinities and NaN: what PyTorch gives, and no other coordinate is touched."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, 1e30, -1e30, info.max, -info.max, info.tiny, -info.tiny / 8, BORDER, -BORDER, 1.0, torch.inf, -torch.inf, torch.nan, 0.5]
    tensors = example(name, len(values), 5, dtype=dtype)
    with torch.no_grad():
        tensors["gradients"].copy_(torch.tensor(values, dtype=dtype))
    ours, theirs = (getattr(f, name)(*tensors.values()) for f in (functional, reference))
    assert_close(ours, theirs, rtol=0, atol=64 * info.eps, equal_nan=True)
    assert ours[:11].isfinite().all() and ours[14].isfinite()
    # The gradient by the finite ones. What depends on the logarithm of another library may differ at the border itself.
    wanted = [i for i, v in enumerate(values) if math.isfinite(v) and abs(v) != BORDER]
    grads = [torch.autograd.grad(r[wanted].sum(), tensors["gradients"])[0][..., wanted] for r in (ours, theirs)]
    assert_close(*grads, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=1e-3 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("name", [MLP, LSTM])
def test_nan_in_a_weight(name):
    """Nothing is lost."""
    for changed in list(example(name))[1:]:
        tensors = example(name, 5, 5)
        with torch.no_grad():
            tensors[changed].view(-1)[-1] = torch.nan
        ours, theirs = (values_and_gradients(f, name, tensors, {}, [torch.ones(5)]) for f in (functional, reference))
        # Before h_0 = 0 the recurrent weights are not multiplied: less is NaN than there, where 0 times NaN is.
        checked = 1 if changed == "weight_hh" else len(theirs)
        assert_close(ours[:checked], theirs[:checked], equal_nan=True)


def test_overflow_elsewhere():
    """A unit that overflows for a gradient of 0, but for none of those there are: nothing comes from lanes without a coordinate."""
    weights = [torch.tensor(w) for w in ([[-1e30, 0.0]], [0.0], [[1e30]], [0.0], [[1.0]], [0.0])]
    tensors = dict(zip(example(MLP), [t.requires_grad_() for t in (torch.full((3,), 2.0), *weights)]))
    ours, theirs = (values_and_gradients(f, MLP, tensors, {}, [torch.ones(3)]) for f in (functional, reference))
    assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert all(t.isfinite().all() for t in ours)


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 100.0), (torch.float64, 750.0)])
def test_gates_far_from_zero(dtype, largest):
    """Sums of gates to beyond where exp() overflows, in small steps."""
    gradients = (torch.linspace(-1, 1, 20001, dtype=dtype) * BORDER).unsqueeze(0)
    weights = [torch.tensor([[0, largest]] * 4, dtype=dtype), torch.zeros(4, 1, dtype=dtype), torch.zeros(4, dtype=dtype),
               torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)]
    assert_close(coordinate_lstm(gradients, *weights), reference.coordinate_lstm(gradients, *weights), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name, size", [(MLP, 3 * BLOCK + 5), (LSTM, 3 * BLOCK + 5), (POOL, (9, 40, 14, 14))])
def test_same_bits(name, size):
    """On every run and for every number of threads."""
    if _backend._C is None:
        pytest.skip("a promise of the kernels; the extension is not loaded")
    tensors = example(name, size, 20, dtype=torch.float32)
    weight = torch.randn_like(getattr(functional, name)(*tensors.values()))
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            seen.append(values_and_gradients(functional, name, tensors, {}, [weight]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))


# ---- derivatives ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(backend, name):
    function, leaves = getattr(functional, name), tuple(smooth_example(name).values())
    # A step of 1e-8 is a hundred thousandth of e^-7.
    assert gradcheck(function, leaves, eps=1e-8, atol=1e-4, rtol=1e-3)
    assert gradgradcheck(function, leaves, eps=1e-8, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_only_where_wanted(backend, name):
    function, leaves = getattr(functional, name), list(example(name).values())

    def gradients(leaves):
        return torch.autograd.grad(function(*leaves).sin().sum(), [t for t in leaves if t.requires_grad])
    full = gradients(leaves)
    for chosen in [{i} for i in range(len(leaves))] + [set(range(len(leaves))) - {i} for i in range(len(leaves))]:
        got = gradients([t.detach().requires_grad_(i in chosen) for i, t in enumerate(leaves)])
        assert_close(list(got), [g for i, g in enumerate(full) if i in chosen])
    assert not function(*(t.detach() for t in leaves)).requires_grad


# ---- transforms ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    arguments = tuple(t.detach() for t in example(name, dtype=torch.float32).values())
    op, backward = (getattr(torch.ops.fastmeta, name + end).default for end in ("", "_backward"))
    torch.library.opcheck(op, arguments)
    result = op(*arguments)
    for needs in (2**len(arguments) - 1, *(1 << k for k in range(len(arguments)))):
        torch.library.opcheck(backward, (torch.randn_like(result), needs, *arguments, result))


@pytest.mark.parametrize("name", NAMES)
def test_fallback_of_the_operations(name):
    """What the operations do where no kernel is built: called through the dispatcher's fallback."""
    operation, arguments = getattr(schemas, name), tuple(t.detach() for t in example(name).values())
    op, backward = (getattr(torch.ops.fastmeta, name + end).default for end in ("", "_backward"))
    ours, theirs = op(*arguments), operation._fallback(*arguments)
    assert_close(ours, theirs)
    given = (torch.randn_like(ours), 2**len(arguments) - 1, *arguments, ours)
    assert_close(backward(*given), operation._fallback_backward(*given))


@pytest.mark.parametrize("name", NAMES)
def test_func_transforms(backend, name):
    leaves = [t.detach() for t in smooth_example(name).values()]

    def loss(*leaves):
        return getattr(functional, name)(*leaves).sin().sum()
    with_grad = [t.clone().requires_grad_() for t in leaves]
    assert_close(torch.func.grad(loss, tuple(range(len(leaves))))(*leaves), torch.autograd.grad(loss(*with_grad), with_grad))
    many = [torch.stack([t, t.flip(-1), -t]) for t in leaves]
    assert_close(torch.func.vmap(loss)(*many), torch.stack([loss(*each) for each in zip(*many)]))
    alone = (0, *(None,) * (len(leaves) - 1))
    assert_close(torch.func.vmap(torch.func.grad(loss), alone)(many[0], *leaves[1:]),
                 torch.stack([torch.func.grad(loss)(x, *leaves[1:]) for x in many[0]]))


@pytest.mark.parametrize("name", NAMES)
def test_compile(backend, name):
    torch.compiler.reset()  # it compiles the same code only so often
    function, leaves = getattr(functional, name), list(example(name, dtype=torch.float32).values())
    compiled = torch.compile(lambda *t: function(*t) * 2, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), function(*leaves) * 2
    assert_close(got, expected)
    assert_close(torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, name, dtype):
    """Inside autocast it computes, and answers, in float32."""
    function, tensors = getattr(functional, name), [t.detach() for t in example(name, dtype=torch.float32).values()]
    low = [tensors[0].to(dtype), *tensors[1:]]
    with torch.autocast("cpu", dtype):
        same, mixed = function(*tensors), function(*low)
    assert torch.equal(same, function(*tensors))
    assert mixed.dtype == torch.float32 and torch.equal(mixed, function(low[0].float(), *tensors[1:]))


# ---- wrong input ---------------------------------------------------------------------------------------------------------------------

def ones(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize("name, error, message, changes", [pytest.param(name, error, f"{name}: {message}", changes, id=f"{name} {message[:50]}")
                                                           for name, error, message, changes in [
    (MLP, TypeError, "gradients must be a tensor, got list", {"gradients": [1.0]}),
    (MLP, TypeError, "gradients must be float32, float64, float16 or bfloat16, got torch.int64", {"gradients": torch.ones(6, dtype=torch.int64)}),
    (MLP, TypeError, "gradients must be a dense (strided) tensor, got torch.sparse_coo", {"gradients": ones(6).to_sparse()}),
    (MLP, TypeError, "bias_1 must be a tensor, got NoneType", {"bias_1": None}),
    (MLP, TypeError, "weight_2 must have the dtype of gradients, torch.float64, got torch.float32", {"weight_2": torch.ones(3, 3)}),
    (MLP, ValueError, "weight_1 must be [W, 2] with W = 3, got shape [3, 3]", {"weight_1": ones(3, 3)}),
    (MLP, ValueError, "bias_1 must be [W] with W = 3, got shape [4]", {"bias_1": ones(4)}),
    (MLP, ValueError, "weight_2 must be [W, W] with W = 3, got shape [3, 2]", {"weight_2": ones(3, 2)}),
    (MLP, ValueError, "weight_3 must be [1, W] with W = 3, got shape [2, 3]", {"weight_3": ones(2, 3)}),
    (MLP, ValueError, "bias_3 must be [1], got shape []", {"bias_3": ones()}),
    (MLP, ValueError, "weight_1 must be on the device of gradients, cpu, got meta", {"weight_1": torch.ones(3, 2, device="meta").double()}),
    (MLP, ValueError, "the width W must be at least 1, got 0",
     {"weight_1": ones(0, 2), "bias_1": ones(0), "weight_2": ones(0, 0), "bias_2": ones(0), "weight_3": ones(1, 0)}),
    (LSTM, TypeError, "gradients must be a tensor, got NoneType", {"gradients": None}),
    (LSTM, ValueError, "gradients must be [T, *] with T >= 1, got shape [0, 6]", {"gradients": ones(0, 6)}),
    (LSTM, ValueError, "gradients must be [T, *] with T >= 1, got shape []", {"gradients": ones()}),
    (LSTM, ValueError, "weight_ih must be [4W, 2] with 4W = 4, got shape [3, 2]", {"weight_ih": ones(3, 2)}),
    (LSTM, ValueError, "weight_hh must be [4W, W] with 4W = 12, W = 3, got shape [9, 3]", {"weight_hh": ones(9, 3)}),
    (LSTM, ValueError, "weight_hh must be [4W, W] with 4W = 12, W = 3, got shape [12, 4]", {"weight_hh": ones(12, 4)}),
    (LSTM, TypeError, "weight_hh must be a tensor, got int", {"weight_hh": 1}),
    (LSTM, ValueError, "bias must be [4W] with 4W = 12, got shape [3]", {"bias": ones(3)}),
    (LSTM, ValueError, "output_weight must be [1, W], got shape [3]", {"output_weight": ones(3)}),
    (LSTM, TypeError, "output_bias must have the dtype of gradients, torch.float64, got torch.float16", {"output_bias": torch.ones(1).half()}),
    (POOL, TypeError, "slow must be a tensor, got int", {"slow": 1}),
    (POOL, ValueError, "slow must be [N, C, H, W], got shape [3, 5, 4]", {"slow": ones(3, 5, 4)}),
    (POOL, ValueError, "fast must be [N, C, H, W] with N = 2, C = 3, H = 5, W = 4, got shape [2, 3, 4, 5]", {"fast": ones(2, 3, 4, 5)}),
    (POOL, TypeError, "fast must have the dtype of slow, torch.float64, got torch.float32", {"fast": torch.ones(2, 3, 5, 4)}),
    (POOL, ValueError, "an image must have at least one pixel, got H = 0, W = 4", {"slow": ones(2, 3, 0, 4), "fast": ones(2, 3, 0, 4)})]])
def test_wrong_input(backend, name, error, message, changes):
    with pytest.raises(error) as raised:
        getattr(functional, name)(*{**example(name), **changes}.values())
    assert message in str(raised.value)


@pytest.mark.parametrize("name", NAMES)
def test_backend_that_cannot_run(name):
    tensors = example(name).values()
    with pytest.raises(ValueError, match=f"{name}: unknown backend 'cuda'"):
        getattr(functional, name)(*tensors, backend="cuda")
    with pytest.raises(RuntimeError, match=f"{name}: backend 'triton' cannot run on cpu tensors"):
        getattr(functional, name)(*tensors, backend="triton")
