"""memory_read, lrua_write, lrua_step and mann_episode as operations: precision, derivatives, transforms, wrong input."""

import itertools

import pytest
import torch
from helpers import assert_as_exact_as_eager
from torch.autograd import gradcheck, gradgradcheck

from fastmeta import _backend, functional, nn, reference, schemas
from fastmeta.functional import lrua_step, lrua_write, mann_episode, memory_read

HAS_GPU_KERNELS = True
NAMES = ("memory_read", "lrua_write", "lrua_step", "mann_episode")
STEP_OPTIONS = list(itertools.product(("per_head", "shared"), (False, True), ("clamp", "add", "sqrt")))


def step_example(name, batch=2, slots=5, width=3, heads=2, dtype=torch.float64, strength=None):
    """Tensors by name, and the options, of one of the step functions."""
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()
    tensors = {"memory": leaf(batch, slots, width)}
    if name != "memory_read":
        # Distances between usages far above the step of a numerical derivative.
        tensors |= {"usage": torch.rand(batch, slots, dtype=torch.float64).argsort(-1).to(dtype),
                    "read_weights": torch.randn(batch, heads, slots, dtype=dtype).softmax(-1).requires_grad_()}
    if name != "lrua_write":
        tensors["keys"] = leaf(batch, heads, width)
    if name != "memory_read":
        tensors |= {"add": leaf(batch, heads, width), "gate": torch.rand(batch, heads, dtype=dtype).requires_grad_()}
    if name != "lrua_write" and strength == "tensor":
        tensors["strength"] = (torch.rand(batch, heads, dtype=dtype) * 3 + 0.5).requires_grad_()
    elif strength == "number" and name != "lrua_write":
        return tensors, {"strength": 1.7}
    return tensors, {}


def episode_example(steps=4, batch=2, features=3, hidden=3, slots=4, width=2, heads=2, dtype=torch.float64, own_add=True, strength=None):
    def leaf(*shape, scale=1.0):
        return (torch.randn(*shape, dtype=dtype) * scale).requires_grad_()
    reads = heads * width
    rows = reads * (1 + own_add) + heads * (2 if strength == "learned" else 1)
    tensors = {"inputs": leaf(steps, batch, features), "hidden": leaf(batch, hidden), "cell": leaf(batch, hidden), "read": leaf(batch, heads, width),
               "read_weights": torch.randn(batch, heads, slots, dtype=dtype).softmax(-1).requires_grad_(),
               "usage": torch.rand(batch, slots, dtype=torch.float64).argsort(-1).to(dtype) * 3, "memory": leaf(batch, slots, width),
               "weight_ih": leaf(4 * hidden, features + reads, scale=0.3), "weight_hh": leaf(4 * hidden, hidden, scale=0.3),
               "bias": leaf(4 * hidden), "head_weight": leaf(rows, hidden, scale=0.4), "head_bias": leaf(rows)}
    return tensors, {"own_add": own_add, "strength": strength}


def episode(functions, inputs, hidden, cell, read, read_weights, usage, memory, *weights, **options):
    outputs, state = functions.mann_episode(inputs, reference.MANNState(hidden, cell, read, read_weights, usage, memory), *weights, **options)
    return outputs, *state


def example(name, **changes):
    return episode_example(**changes) if name == "mann_episode" else step_example(name, **changes)


def call(functions, name, tensors, options):
    """The results of a function of this module; ``tensors`` by name, in the order of the arguments."""
    tensors = dict(tensors)
    if name == "mann_episode":
        return episode(functions, *tensors.values(), **options)
    keywords = {key: tensors.pop(key) for key in ("strength",) if key in tensors}
    results = getattr(functions, name)(*tensors.values(), **keywords, **options)
    return (results,) if isinstance(results, torch.Tensor) else results


def differentiable_results(name, results):
    """Without the usage, which has no gradient."""
    skip = {"lrua_step": 2, "mann_episode": 5}.get(name)
    return [r for i, r in enumerate(results) if i != skip]


def closure(name, tensors, options):
    """A function of the leaves alone, which gives all results that have gradients."""
    names = [key for key, t in tensors.items() if t.requires_grad]

    def function(*leaves):
        return tuple(differentiable_results(name, call(functional, name, {**tensors, **dict(zip(names, leaves))}, options)))
    return function, [tensors[key] for key in names]


def values_and_gradients(functions, name, tensors, options, weights):
    results = call(functions, name, tensors, options)
    total = sum((r * w.to(r.dtype)).sum() for r, w in zip(differentiable_results(name, results), weights))
    return [*results, *torch.autograd.grad(total, [t for t in tensors.values() if t.requires_grad])]


def compare(name, tensors, options):
    """The fast function in this dtype against the reference in float64, and in this dtype."""
    wide = {key: t.detach().double().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    weights = [torch.randn_like(r) for r in differentiable_results(name, call(reference, name, wide, options))]
    runs = [values_and_gradients(f, name, t, options, weights) for f, t in ((functional, tensors), (reference, tensors), (reference, wide))]
    assert all(r.dtype == next(iter(tensors.values())).dtype for r in runs[0])
    assert_as_exact_as_eager(*runs, what=f"{name} {options}")


def step_options(name, least_used, read_before_write, eps_mode, eps=0.05):
    return {"memory_read": dict(eps_mode=eps_mode, eps=eps), "lrua_write": dict(least_used=least_used)}.get(
        name, dict(least_used=least_used, read_before_write=read_before_write, eps_mode=eps_mode, eps=eps, usage_decay=0.9))


# ---- precision ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least_used, read_before_write, eps_mode", STEP_OPTIONS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_steps_against_float64(name, least_used, read_before_write, eps_mode, dtype):
    options = step_options(name, least_used, read_before_write, eps_mode, 1e-6)
    for (batch, slots, width, heads), strength in itertools.product(
            ((1, 1, 1, 1), (3, 7, 5, 2), (2, 128, 40, 4), (1, 33, 17, 5), (5, 16, 8, 1), (0, 4, 3, 2)), (None, "number", "tensor")):
        tensors, more = step_example(name, batch, slots, width, heads, dtype, strength)
        if batch:
            compare(name, tensors, {**options, **more})
        else:
            assert [r.shape for r in call(functional, name, tensors, {**options, **more})] == \
                [r.shape for r in call(reference, name, tensors, {**options, **more})]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least_used, read_before_write, eps_mode", STEP_OPTIONS)
@pytest.mark.parametrize("own_add, strength", [(True, None), (False, 2.5), (True, "learned"), (False, "learned")])
def test_episodes_against_float64(own_add, strength, least_used, read_before_write, eps_mode, dtype):
    options = step_options("mann_episode", least_used, read_before_write, eps_mode, 1e-3)
    for shape in (dict(steps=1, batch=1, features=1, hidden=1, slots=1, width=1, heads=1), dict(steps=9, batch=3, features=5, hidden=7, slots=6, width=3),
                  dict(steps=17, batch=2, features=4, hidden=16, slots=20, width=9, heads=5)):
        tensors, more = episode_example(**shape, dtype=dtype, own_add=own_add, strength=strength)
        compare("mann_episode", tensors, {**options, **more})
        lengths = torch.tensor([shape["steps"], 0, 8][:shape["batch"]])
        compare("mann_episode", tensors, {**options, **more, "lengths": lengths})


def test_episode_of_the_papers_size():
    """In float32 and T = 50, where roundings could choose another least used slot: compared with float64 up to that."""
    tensors, more = episode_example(steps=12, batch=16, features=405, hidden=200, slots=128, width=40, heads=4, dtype=torch.float32)
    for key, scale in dict(weight_ih=0.05, weight_hh=0.1, head_weight=0.1).items():
        tensors[key] = (tensors[key].detach() * scale).requires_grad_()
    compare("mann_episode", tensors, more)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(backend, name, dtype):
    """Computed in float32, rounded once at the end."""
    tensors, options = example(name, dtype=torch.float32)
    low = {key: t.detach().to(dtype).requires_grad_(t.requires_grad) for key, t in tensors.items()}
    rounded = {key: t.detach().float().requires_grad_(t.requires_grad) for key, t in low.items()}
    got, expected = (call(functional, name, t, options) for t in (low, rounded))
    for g, e in zip(got, expected):
        assert g.dtype == dtype and torch.equal(g, e.to(dtype))
    for key, g in zip([k for k, t in low.items() if t.requires_grad],
                      torch.autograd.grad(sum(r.float().sum() for r in differentiable_results(name, got)),
                                          [t for t in low.values() if t.requires_grad])):
        assert g.dtype == dtype and g.isfinite().all(), key


@pytest.mark.parametrize("name", NAMES)
def test_strides(backend, name):
    """Strided and expanded tensors give the results of contiguous ones; from the kernels, the same bits."""
    tensors, options = example(name)
    by_kernels = not backend.startswith("reference") and (name != "mann_episode" or not backend.startswith("triton"))
    exact = {"rtol": 0, "atol": 0} if by_kernels else {}

    def strided(t):
        wide = torch.stack([t.detach(), torch.full_like(t, torch.nan)], -1).movedim(0, -2).contiguous().movedim(-2, 0)[..., 0]
        assert torch.equal(wide, t) and not wide.is_contiguous()
        return wide
    other = {key: strided(t).requires_grad_(t.requires_grad) for key, t in tensors.items()}
    weights = [torch.randn_like(r) for r in differentiable_results(name, call(functional, name, tensors, options))]
    for a, b in zip(values_and_gradients(functional, name, tensors, options, weights), values_and_gradients(functional, name, other, options, weights)):
        torch.testing.assert_close(a, b, **exact)
    expanded = {key: t.detach()[:1].expand_as(t) for key, t in tensors.items()}
    for a, b in zip(call(functional, name, expanded, options), call(functional, name, {k: t.contiguous() for k, t in expanded.items()}, options)):
        torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_extreme_values(backend, name, size):
    """Memory and keys near the ends of float32's range: finite, and the float64 result where that is finite in float32."""
    tensors, options = example(name, dtype=torch.float32)
    tensors = {key: (t.detach() * size if key in ("memory", "keys", "add") else t.detach()) for key, t in tensors.items()}
    got = call(functional, name, tensors, options)
    expected = call(reference, name, {key: t.double() for key, t in tensors.items()}, options)
    for g, e in zip(got, expected):
        torch.testing.assert_close(g, e.float(), rtol=1e-4, atol=1e-5 * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("name", NAMES)
def test_nan_stays_in_its_episode(backend, name):
    tensors, options = example(name)
    tensors = {key: t.detach() for key, t in tensors.items()}
    clean = call(functional, name, tensors, options)
    dirty = {key: t.clone() for key, t in tensors.items()}
    dirty["memory"][0, 1] = torch.nan
    for i, (g, e) in enumerate(zip(call(functional, name, dirty, options), clean)):
        axis = 1 if name == "mann_episode" and i == 0 else 0  # the outputs are [T, B, ...]
        assert torch.equal(g.select(axis, 1), e.select(axis, 1))
        assert g.select(axis, 0).isnan().any() or i > 0


# ---- state and lengths -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 16, 20])
def test_cut_and_continue(backend, cut):
    """An episode in two parts: the same results and the same gradients, those of the initial state included."""
    tensors, options = episode_example(steps=20, slots=6, own_add=False, strength="learned")
    weights = [torch.randn_like(r) for r in differentiable_results("mann_episode", call(functional, "mann_episode", tensors, options))]
    whole = values_and_gradients(functional, "mann_episode", tensors, options, weights)

    class Halves:
        @staticmethod
        def mann_episode(inputs, state, *weights, **options):
            first, state = functional.mann_episode(inputs[:cut], state, *weights, **options)
            second, state = functional.mann_episode(inputs[cut:], state, *weights, **options)
            return torch.cat([first, second]), state
    for a, b in zip(whole, values_and_gradients(Halves, "mann_episode", tensors, options, weights)):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_padding_changes_nothing(backend):
    """With lengths, an episode has the results and gradients that it has alone; NaN in the padding reaches nothing."""
    lengths = torch.tensor([0, 3, 12, 8], dtype=torch.int32)
    tensors, options = episode_example(steps=12, batch=4, slots=6)
    padded = {key: t.detach().clone().requires_grad_(t.requires_grad) for key, t in tensors.items()}
    with torch.no_grad():
        for b, length in enumerate(lengths):
            padded["inputs"][length:, b] = torch.nan
    results = call(functional, "mann_episode", padded, {**options, "lengths": lengths})
    loss = sum(r.sin().sum() for r in differentiable_results("mann_episode", results))
    grads = dict(zip([k for k, t in padded.items() if t.requires_grad], torch.autograd.grad(loss, [t for t in padded.values() if t.requires_grad])))
    total = {key: torch.zeros_like(g) for key, g in grads.items()}
    for b, length in enumerate(lengths.tolist()):
        axis = {key: 1 if key == "inputs" else 0 for key in ("inputs", "hidden", "cell", "read", "read_weights", "usage", "memory")}
        alone = {key: (t.narrow(axis[key], b, 1) if key in axis else t) for key, t in tensors.items()}
        alone["inputs"] = alone["inputs"][:length]
        alone = {key: t.detach().requires_grad_(t.requires_grad) for key, t in alone.items()}
        mine = call(functional, "mann_episode", alone, options)
        torch.testing.assert_close(results[0][:length, b], mine[0][:, 0])
        assert not results[0][length:, b].any()
        for r, m in zip(results[1:], mine[1:]):
            torch.testing.assert_close(r[b], m[0])
        leaves = {k: t for k, t in alone.items() if t.requires_grad}
        for key, g in zip(leaves, torch.autograd.grad(sum(r.sin().sum() for r in differentiable_results("mann_episode", mine)),
                                                      list(leaves.values()), allow_unused=True)):
            g = torch.zeros_like(leaves[key]) if g is None else g
            if key == "inputs":
                total[key][:length, b] = g[:, 0]
            elif key in axis:
                total[key][b] = g[0]
            else:
                total[key] += g
    for key, g in grads.items():
        torch.testing.assert_close(g, total[key], msg=key)


def test_no_steps(backend):
    tensors, options = episode_example(steps=0)
    outputs, *state = call(functional, "mann_episode", tensors, options)
    assert outputs.shape == (0, 2, 3 + 4)
    for key, t in zip(("hidden", "cell", "read", "read_weights", "usage", "memory"), state):
        assert torch.equal(t, tensors[key])


def test_same_bits():
    """On every run and for every number of threads."""
    if _backend._C is None:
        pytest.skip("a promise of the kernels; the extension is not loaded")
    tensors, options = episode_example(steps=10, batch=7, features=20, hidden=32, slots=20, width=9, heads=3, dtype=torch.float32)
    weights = [torch.randn_like(r) for r in differentiable_results("mann_episode", call(functional, "mann_episode", tensors, options))]
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            seen.append(values_and_gradients(functional, "mann_episode", tensors, options, weights)[:7])
    finally:
        torch.set_num_threads(threads)
    for other in seen[1:]:
        for a, b in zip(seen[0], other):
            assert torch.equal(a, b)


# ---- derivatives ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("least_used, read_before_write, eps_mode", STEP_OPTIONS)
@pytest.mark.parametrize("name", NAMES[:3])
def test_gradcheck_steps(name, least_used, read_before_write, eps_mode):
    for strength in (None, "tensor"):
        tensors, more = step_example(name, 2, 3, 2, 2, strength=strength)
        function, leaves = closure(name, tensors, {**step_options(name, least_used, read_before_write, eps_mode), **more})
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("least_used, read_before_write", itertools.product(("per_head", "shared"), (False, True)))
@pytest.mark.parametrize("own_add, strength", [(True, None), (False, "learned")])
def test_gradcheck_episodes(own_add, strength, least_used, read_before_write):
    tensors, more = episode_example(steps=3, hidden=2, own_add=own_add, strength=strength)
    options = {**step_options("mann_episode", least_used, read_before_write, "sqrt"), **more}
    for lengths in (None, torch.tensor([3, 1])):
        function, leaves = closure("mann_episode", tensors, {**options, "lengths": lengths})
        assert gradcheck(function, leaves, fast_mode=lengths is not None)
        assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_only_where_wanted(backend, name):
    tensors, options = example(name)
    function, leaves = closure(name, tensors, options)

    def gradients(leaves):
        return torch.autograd.grad(sum(r.sin().sum() for r in function(*leaves)), [t for t in leaves if t.requires_grad])
    full = gradients(leaves)
    for chosen in [{i} for i in range(len(leaves))] + [set(range(len(leaves))) - {i} for i in range(len(leaves))]:
        got = iter(gradients([t.detach().requires_grad_(i in chosen) for i, t in enumerate(leaves)]))
        for i, g in enumerate(full):
            if i in chosen:
                torch.testing.assert_close(next(got), g)
    assert not any(r.requires_grad for r in function(*(t.detach() for t in leaves)))


@pytest.mark.parametrize("name", ["lrua_step", "mann_episode"])
def test_usage_has_no_gradient(backend, name):
    tensors, options = example(name)
    tensors["usage"] = tensors["usage"].requires_grad_()
    results = call(functional, name, tensors, options)
    assert not results[{"lrua_step": 2, "mann_episode": 5}[name]].requires_grad
    grad, = torch.autograd.grad(results[0].sum(), tensors["usage"], allow_unused=True)
    assert grad is None or not grad.any()


# ---- transforms ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [None, "tensor"])
def test_opcheck(name, strength):
    if name == "mann_episode":
        tensors, _ = episode_example(dtype=torch.float32, strength="learned" if strength else None)
        t = {key: x.detach() for key, x in tensors.items()}
        state = [t[key] for key in ("hidden", "cell", "read", "read_weights", "usage", "memory")]
        arguments = (t["inputs"], torch.cat([t["weight_ih"], t["weight_hh"]], 1), t["bias"], t["head_weight"], t["head_bias"], *state,
                     torch.tensor([4, 2]) if strength else None, True, strength is not None, 1.0, 0, False, 2, 1e-6, 0.95)
        forward = (*arguments, True)
        torch.library.opcheck(torch.ops.fastmeta.mann_episode.default, (*arguments, False))
    else:
        tensors, _ = step_example(name, dtype=torch.float32, strength=strength)
        t = {key: x.detach() for key, x in tensors.items()}
        strengths = t.pop("strength", None)
        numbers = {"memory_read": (strengths, 2.0, 1, 1e-6), "lrua_write": (1,), "lrua_step": (strengths, 2.0, 1, True, 1, 1e-6, 0.9)}[name]
        arguments = forward = (*t.values(), *numbers)
    op = getattr(torch.ops.fastmeta, name).default
    torch.library.opcheck(op, forward)
    operation = getattr(schemas, name)
    results = op(*forward)
    grads = [torch.randn_like(results[i]) for i in operation.differentiable]
    bits = [k for k, position in enumerate(operation.gradients) if arguments[position] is not None]
    for needs in (sum(1 << k for k in bits), *(1 << k for k in bits)):
        torch.library.opcheck(getattr(torch.ops.fastmeta, name + "_backward").default, (*grads, needs, *arguments, *results))


@pytest.mark.parametrize("name", NAMES)
def test_fallback_of_the_operations(name):
    """What the operations do where no kernel is built: called through the dispatcher's fallback."""
    operation = getattr(schemas, name)
    tensors, options = example(name)
    if name == "mann_episode":
        t = {key: x.detach() for key, x in tensors.items()}
        state = [t[key] for key in ("hidden", "cell", "read", "read_weights", "usage", "memory")]
        arguments = (t["inputs"], torch.cat([t["weight_ih"], t["weight_hh"]], 1), t["bias"], t["head_weight"], t["head_bias"], *state,
                     None, True, False, 1.0, 0, False, 2, 1e-6, 0.95)
        forward = (*arguments, True)
    else:
        numbers = {"memory_read": (None, 2.0, 1, 1e-6), "lrua_write": (1,), "lrua_step": (None, 2.0, 1, True, 1, 1e-6, 0.9)}[name]
        arguments = forward = (*(x.detach() for x in tensors.values()), *numbers)
    op, backward = (getattr(torch.ops.fastmeta, name + end).default for end in ("", "_backward"))
    ours, theirs = op(*forward), operation._fallback(*forward)
    for a, b in list(zip(ours, theirs))[:operation.visible]:
        torch.testing.assert_close(a, b)
    assert [(a.shape, a.dtype) for a in ours] == [(b.shape, b.dtype) for b in theirs]
    grads = [torch.randn_like(ours[i]) for i in operation.differentiable]
    needs = sum(1 << k for k, position in enumerate(operation.gradients) if arguments[position] is not None)
    for a, b in zip(backward(*grads, needs, *arguments, *ours), operation._fallback_backward(*grads, needs, *arguments, *theirs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_func_transforms(backend, name):
    tensors, options = example(name)
    tensors = {key: t.detach() for key, t in tensors.items()}
    names = [key for key in tensors if key != "usage"]

    def loss(*leaves):
        results = call(functional, name, {**tensors, **dict(zip(names, leaves))}, options)
        return sum(r.sin().sum() for r in differentiable_results(name, results))
    leaves = [tensors[key] for key in names]
    grads = torch.func.grad(loss, tuple(range(len(leaves))))(*leaves)
    with_grad = [t.clone().requires_grad_() for t in leaves]
    torch.testing.assert_close(grads, torch.autograd.grad(loss(*with_grad), with_grad))

    # vmap over a new dimension: of everything, and of the first tensor alone
    many = [torch.randn_like(torch.stack([t] * 3)) if key not in ("gate", "read_weights") else torch.rand(3, *t.shape, dtype=t.dtype)
            for key, t in zip(names, leaves)]
    torch.testing.assert_close(torch.func.vmap(loss)(*many), torch.stack([loss(*each) for each in zip(*many)]))
    alone = (0, *(None,) * (len(leaves) - 1))
    torch.testing.assert_close(torch.func.vmap(loss, alone)(many[0], *leaves[1:]), torch.stack([loss(x, *leaves[1:]) for x in many[0]]))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), alone)(many[0], *leaves[1:]),
                               torch.stack([torch.func.grad(loss)(x, *leaves[1:]) for x in many[0]]))
    # Hessian-vector product
    direction = torch.randn_like(leaves[0])
    product = torch.func.grad(lambda x: (torch.func.grad(loss)(x, *leaves[1:]) * direction).sum())(leaves[0])
    first, = torch.autograd.grad(loss(*with_grad), with_grad[0], create_graph=True)
    torch.testing.assert_close(product, torch.autograd.grad((first * direction).sum(), with_grad[0])[0])


@pytest.mark.parametrize("name", NAMES)
def test_compile(backend, name):
    torch.compiler.reset()  # it compiles the same code only so often
    tensors, options = example(name, dtype=torch.float32)
    function, leaves = closure(name, tensors, options)
    compiled = torch.compile(lambda *t: [r * 2 for r in function(*t)], fullgraph=True, backend="aot_eager")
    got, expected = compiled(*leaves), [r * 2 for r in function(*leaves)]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(sum(r.sin().sum() for r in got), leaves),
                               torch.autograd.grad(sum(r.sin().sum() for r in expected), leaves))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend, name, dtype):
    """Inside autocast it computes, and answers, in float32."""
    tensors, options = example(name, dtype=torch.float32)
    tensors = {key: t.detach() for key, t in tensors.items()}
    first = next(iter(tensors))
    low = {**tensors, first: tensors[first].to(dtype)}
    with torch.autocast(tensors[first].device.type, dtype):
        same, mixed = call(functional, name, tensors, options), call(functional, name, low, options)
    for a, b in zip(same, call(functional, name, tensors, options)):
        assert torch.equal(a, b)
    for a, b in zip(mixed, call(functional, name, {**tensors, first: low[first].float()}, options)):
        assert a.dtype == torch.float32 and torch.equal(a, b)


# ---- wrong input ---------------------------------------------------------------------------------------------------------------------

def wrong(name, error, message, **changes):
    return pytest.param(name, error, message, changes, id=message.split(": ", 1)[1][:60])


@pytest.mark.parametrize("name, error, message, changes", [
    wrong("memory_read", TypeError, "memory_read: memory must be a tensor, got list", memory=[1.0]),
    wrong("memory_read", TypeError, "memory_read: memory must be a tensor, got NoneType", memory=None),
    wrong("memory_read", TypeError, "memory_read: keys must be a tensor, got NoneType", keys=None),
    wrong("memory_read", TypeError, "memory_read: memory must be float32, float64, float16 or bfloat16, got torch.int64",
          memory=torch.ones(2, 5, 3, dtype=torch.int64)),
    wrong("memory_read", TypeError, "memory_read: memory must be a dense (strided) tensor, got torch.sparse_coo", memory=torch.ones(2, 5, 3).to_sparse()),
    wrong("memory_read", TypeError, "memory_read: keys must have the dtype of memory, torch.float64, got torch.float32", keys=torch.ones(2, 2, 3)),
    wrong("memory_read", ValueError, "memory_read: memory must be [B, N, M], got shape [5, 3]", memory=torch.ones(5, 3).double()),
    wrong("memory_read", ValueError, "memory_read: keys must be [B, R, M] with B = 2, R = 2, M = 3, got shape [2, 2, 4]",
          keys=torch.ones(2, 2, 4).double()),
    wrong("memory_read", ValueError, "memory_read: strength must be [B, R] with B = 2, R = 2, got shape [2, 3]", strength=torch.ones(2, 3).double()),
    wrong("memory_read", TypeError, "memory_read: strength must be a number, a tensor or None, got str", strength="learned"),
    wrong("memory_read", ValueError, "memory_read: strength must be finite, got nan", strength=float("nan")),
    wrong("memory_read", ValueError, "memory_read: eps_mode must be one of 'clamp', 'add', 'sqrt', got 'max'", eps_mode="max"),
    wrong("memory_read", ValueError, "memory_read: eps must be positive and finite, got 0", eps=0),
    wrong("memory_read", TypeError, "memory_read: eps must be a number, got str", eps="small"),
    wrong("memory_read", ValueError, "memory_read: keys must be on the device of memory, cpu, got meta", keys=torch.ones(2, 2, 3, device="meta").double()),
    wrong("memory_read", ValueError, "memory_read: unknown backend 'cuda', expected one of 'cpp', 'triton', 'reference'", backend="cuda"),
    wrong("lrua_write", ValueError, "lrua_write: usage must be [B, N] with B = 2, N = 5, got shape [2, 4]", usage=torch.ones(2, 4).double()),
    wrong("lrua_write", ValueError, "lrua_write: read_weights must be [B, R, N] with B = 2, R = 2, N = 5, got shape [2, 2, 3]",
          read_weights=torch.ones(2, 2, 3).double()),
    wrong("lrua_write", ValueError, "lrua_write: gate must be [B, R], got shape [2, 2, 1]", gate=torch.ones(2, 2, 1).double()),
    wrong("lrua_write", ValueError, "lrua_write: least_used must be one of 'per_head', 'shared', got 'each'", least_used="each"),
    wrong("lrua_step", TypeError, "lrua_step: read_before_write must be a bool, got int", read_before_write=1),
    wrong("lrua_step", ValueError, "lrua_step: usage_decay must be in [0, 1], got 1.5", usage_decay=1.5),
    wrong("lrua_step", TypeError, "lrua_step: usage_decay must be a number, got NoneType", usage_decay=None),
    wrong("mann_episode", TypeError, "mann_episode: inputs must be a tensor, got int", inputs=1),
    wrong("mann_episode", ValueError, "mann_episode: inputs must be [T, B, I], got shape [4, 3]", inputs=torch.ones(4, 3).double()),
    wrong("mann_episode", ValueError, "mann_episode: hidden must be [B, H] with B = 2, got shape [3, 3]", hidden=torch.ones(3, 3).double()),
    wrong("mann_episode", ValueError, "mann_episode: weight_ih must be [4H, I+RM] with 4H = 12, I+RM = 7, got shape [12, 6]",
          weight_ih=torch.ones(12, 6).double()),
    wrong("mann_episode", ValueError, "mann_episode: head_weight must be [P, H] with P = 10, H = 3, got shape [9, 3]", head_weight=torch.ones(9, 3).double()),
    wrong("mann_episode", TypeError, "mann_episode: bias must have the dtype of inputs, torch.float64, got torch.float32", bias=torch.ones(12)),
    wrong("mann_episode", ValueError, "mann_episode: strength must be None, a number or 'learned', got 'fixed'", strength="fixed"),
    wrong("mann_episode", TypeError, "mann_episode: strength must be None, a number or 'learned', got a tensor", strength=torch.ones(2, 2).double()),
    wrong("mann_episode", TypeError, "mann_episode: own_add must be a bool, got int", own_add=1),
    wrong("mann_episode", TypeError, "mann_episode: lengths must be an integer tensor, got torch.float32", lengths=torch.ones(2)),
    wrong("mann_episode", TypeError, "mann_episode: lengths must be an integer tensor, got list", lengths=[1, 2]),
    wrong("mann_episode", ValueError, "mann_episode: lengths must be [B] with B = 2, got shape [3]", lengths=torch.tensor([1, 2, 3]))])
def test_wrong_input(backend, name, error, message, changes):
    tensors, options = example(name)
    options = {**options, **{key: value for key, value in changes.items() if key not in tensors}}
    with pytest.raises(error) as raised:
        call(functional, name, {**tensors, **{key: value for key, value in changes.items() if key in tensors}}, options)
    assert str(raised.value) == message


@pytest.mark.parametrize("length", [5, -1])
def test_lengths_out_of_range(backend, length):
    """An error; from a GPU, which cannot tell in time, NaN in that episode."""
    tensors, options = episode_example()
    options["lengths"] = torch.tensor([2, length])
    if not backend.startswith("cuda"):  # those in CUDA C++
        with pytest.raises(ValueError) as raised:
            call(functional, "mann_episode", tensors, options)
        assert str(raised.value) == f"mann_episode: lengths must be in [0, 4], got {length}"
        return
    outputs, *state = call(functional, "mann_episode", tensors, options)
    good, *good_state = call(functional, "mann_episode", tensors, {**options, "lengths": torch.tensor([2, 4])})
    assert outputs[:, 1].isnan().all() and torch.equal(outputs[:, 0], good[:, 0])
    for name, t, expected in zip(("hidden", "cell", "read"), state, good_state):
        assert t[1].isnan().all() and torch.equal(t[0], expected[0]), name


def test_more_heads_than_slots(backend):
    for function in (lrua_write, lrua_step):
        tensors, _ = step_example(function.__name__, slots=2, heads=3)
        with pytest.raises(ValueError, match=f"{function.__name__}: there must be at least one head, and a slot for each, got R = 3 heads, N = 2 slots"):
            function(*tensors.values())


def test_state_must_be_a_state(backend):
    tensors, options = episode_example()
    with pytest.raises(TypeError, match="mann_episode: state must be a MANNState of six tensors, got tuple"):
        mann_episode(tensors["inputs"], (tensors["hidden"], tensors["cell"]), *list(tensors.values())[7:], **options)


def test_modules_say_what_is_wrong():
    for layers in (nn, reference):
        for options, message in ((dict(preset="ours"), "MANN: preset must be one of 'tristandeleu', 'snowkylin', 'paper', got 'ours'"),
                                 (dict(write_vector="value"), "MANN: write_vector must be one of 'add', 'key', got 'value'"),
                                 (dict(strength="fixed"), "MANN: strength must be None, a number or 'learned', got 'fixed'"),
                                 (dict(read_heads=200), "LRUAMemory: read_heads must be at most memory_slots = 128, got 200")):
            with pytest.raises(ValueError) as error:
                layers.MANN(5, 3, **options)
            assert str(error.value) == message
    assert memory_read.__doc__ and lrua_write.__doc__ and lrua_step.__doc__ and mann_episode.__doc__
