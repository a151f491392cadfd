"""What several tests share: options, inputs of every batch form, comparison with float64, and the equations once more in numpy."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import fastmeta
from fastmeta import functional, reference

# normalize and eps_mode; without a norm the mode means nothing
OPTIONS = [("none", "clamp"), *itertools.product(("support", "both"), ("clamp", "add", "sqrt"))]
NAMES = ("cosine_attention", "matching_log_probs")

# batch dimensions of query, support, values or labels, mask; the shape of a scale tensor that fits
BROADCASTS = {"no batch": ((), (), (), (), ()),
              "batch": ((3,), (3,), (3,), (3,), (3,)),
              "support shared": ((3,), (), (), (), (3,)),
              "query shared": ((), (3,), (3,), (3,), (3,)),
              "values only": ((), (), (3,), (), ()),
              "two": ((2, 3), (2, 3), (2, 3), (3,), (2, 1)),
              "ones": ((2, 1), (1, 3), (3,), (2, 1), (1, 1)),
              "scale only": ((), (), (), (), (3,))}


def example(name, broadcast="no batch", queries=5, supports=6, features=4, classes=3, dtype=torch.float64, mask=False, scale="number"):
    """Positional arguments and keywords for one of the two functions, floating leaves with requires_grad."""
    q, s, v, m, t = BROADCASTS[broadcast]
    leaf = dict(dtype=dtype, requires_grad=True)
    third = (torch.randn(*v, supports, classes, **leaf),) if name == "cosine_attention" else \
        (torch.randint(classes, (*v, supports)), classes)
    keywords = {}
    if mask:
        keywords["support_mask"] = torch.rand(*m, supports) > 0.4
        keywords["support_mask"][..., supports // 2:supports // 2 + 1] = True
    wide = torch.promote_types(dtype, torch.float32)
    keywords["scale"] = {"number": 2.5, "tensor": torch.tensor(2.5, dtype=wide, requires_grad=True),
                         "episode": (torch.rand(t, dtype=wide) * 3 + 1).requires_grad_()}[scale]
    return (torch.randn(*q, queries, features, **leaf), torch.randn(*s, supports, features, **leaf), *third), keywords


def leaves(args, keywords):
    return [t for t in (*args, *keywords.values()) if isinstance(t, torch.Tensor) and t.requires_grad]


def in_dtype(args, keywords, dtype):
    """The same numbers as leaves of another dtype."""
    def cast(t):
        return t.detach().to(dtype).requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
    return tuple(map(cast, args)), {k: cast(v) for k, v in keywords.items()}


def result_and_gradients(function, args, keywords, weight):
    """Function value and the gradients of ``sum(weight * finite values)`` by every leaf."""
    result = function(*args, **keywords)
    finite = torch.where(result == -torch.inf, 0.0, result)
    wanted = leaves(args, keywords)
    return [result, *torch.autograd.grad((finite * weight.to(result.dtype)).sum(), wanted)] if wanted else [result]


def run_both(name, args, keywords, **options):
    """fastmeta.functional in the dtype given, the reference in that dtype and the reference in float64: lists of result and gradients."""
    reference_function = getattr(reference, name)
    wide = in_dtype(args, keywords, torch.float64)
    weight = torch.randn(reference_function(*wide[0], **wide[1], **options).shape, dtype=args[0].dtype).double()
    run = [result_and_gradients(f, a, {**k, **options}, weight)
           for f, (a, k) in ((getattr(functional, name), (args, keywords)), (reference_function, (args, keywords)), (reference_function, wide))]
    assert run[0][0].dtype == args[0].dtype
    return run


def assert_as_exact_as_eager(ours, eager, exact, what=""):
    """Error against float64 at most twice that of eager PyTorch in the same precision, plus a floor of a few roundings."""
    for i, (a, e, x) in enumerate(zip(ours, eager, exact, strict=True)):
        assert a.shape == x.shape, f"{what} tensor {i}: shape {list(a.shape)}, expected {list(x.shape)}"
        a, e, finite = a.detach().double(), e.detach().double(), x.isfinite()
        torch.testing.assert_close(a[~finite], x[~finite].detach(), rtol=0, atol=0, equal_nan=True, msg=f"{what} tensor {i}")
        if not finite.any():
            continue
        a, e, x = a[finite], e[finite], x.detach()[finite]
        # A gradient that cancels to nothing still has the roundings of its terms, which are of the size of the others.
        dtype = ours[0].dtype  # not that of tensor i: the float32 gradient of a scale comes from a result rounded to half precision
        roundings = {torch.float64: 1000, torch.float32: 32}.get(dtype, 2 if ours[i].dtype == dtype else 8)
        floor = roundings * torch.finfo(dtype).eps * max(1.0, x.abs().max().item())
        error, allowed = (a - x).abs().max().item(), 2 * (e - x).abs().max().item() + floor
        assert error <= allowed, f"{what} tensor {i}: error {error:.3g}, allowed {allowed:.3g}"


# ---- the equations in numpy, one number at a time ---------------------------------------------------------------------------------

def numpy_scores(query, support, scale, normalize, eps, eps_mode):
    scores = np.empty((len(query), len(support)))
    for i, q in enumerate(query):
        for j, k in enumerate(support):
            dot = sum(x * y for x, y in zip(q, k))
            a = sum(x * x for x in q)**0.5 if normalize == "both" else 1.0
            b = sum(x * x for x in k)**0.5
            g = {"clamp": max(a, eps if normalize == "both" else 0) * max(b, eps), "add": a * b + eps,
                 "sqrt": (a * a * b * b + eps)**0.5}[eps_mode] if normalize != "none" else 1.0
            scores[i, j] = scale * dot / g
    return scores


def numpy_softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_lstm_step(x, h, c, w_ih, w_hh, b_ih, b_hh):
    i, f, g, o = np.split(w_ih @ x + b_ih + w_hh @ h + b_hh, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def numpy_lrua_step(memory, usage, read_weights, keys, add, gate, strength, least_used, read_before_write, eps_mode, eps, decay):
    """One episode: ``(read, memory, usage, read_weights)`` from equations.md, section 3, slot by slot."""
    heads, slots = read_weights.shape
    order = sorted(range(slots), key=lambda i: (usage[i], i))
    write_weights = np.empty((heads, slots))
    for j in range(heads):
        for i in range(slots):
            chosen = i == order[j] if least_used == "per_head" else i in order[:heads]
            write_weights[j, i] = gate[j] * read_weights[j, i] + (1 - gate[j]) * chosen
    written = memory.copy()
    written[order[0]] = 0
    for i in range(slots):
        for j in range(heads):
            written[i] += write_weights[j, i] * add[j]
    scores = numpy_scores(keys, memory if read_before_write else written, 1.0, "both", eps, eps_mode)
    weights = np.stack([numpy_softmax(strength[j] * scores[j]) for j in range(heads)])
    read = np.stack([sum(weights[j, i] * written[i] for i in range(slots)) for j in range(heads)])
    return read, written, decay * usage + weights.sum(0) + write_weights.sum(0), weights


def spawn_python(*arguments, environment=None, **options) -> subprocess.Popen:
    """A Python process with the fastmeta of this one: its folder comes before a checkout, without the extension, that pytest runs in."""
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=Path(fastmeta.__file__).parents[1], text=True,
                            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}, **options)


def spawn_cli(*arguments, module=("fastmeta",), **options):
    """The command line in a process with one thread."""
    return spawn_python("-m", *module, *arguments, environment={"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        **options)


def finish(process, status):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def assert_equal_state(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
