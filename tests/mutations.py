"""Deliberate faults in the kernels of the GPU, one at a time; a case of test_gpu_kernels.py must catch each.

    python tests/mutations.py [--backend cuda | triton] [--only NAME]

A fault is one piece of source in place of another. The kernels with it are compiled and run on the PTX machine, case after case, until one
fails: the machine finds something, a number is wrong, or another order gives other bits. Prints a Markdown table. The exit status is 1 if a
fault survives, which is a hole in the tests, and 2 if one does not fit the source any more, where nothing is run.
"""

import argparse
import contextlib
import functools
import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import emulation
import numpy as np
import ptx
from test_gpu_kernels import CASES, check, inputs


class Fault(NamedTuple):
    name: str
    what: str
    old: str  # in the source exactly once
    new: str


# ---- the faults ------------------------------------------------------------------------------------------------------------------------

CUDA = [  # FAULT is whether the fault is in force
    # barriers
    Fault("stage-over-readers", "the next features are staged while others still read the last",
          "first += S::kChunk) {\n    __syncthreads();", "first += S::kChunk) {\n    if (!FAULT) __syncthreads();"),
    Fault("read-unstaged", "products begin before all features are staged",
          "__syncthreads();\n    staged(stage);", "if (!FAULT) __syncthreads();\n    staged(stage);"),
    Fault("product-over-rows", "a product is stored over the rows that others still multiply",
          "__syncthreads();\n    sums.store(stage, S::kColumns);", "if (!FAULT) __syncthreads();\n    sums.store(stage, S::kColumns);"),
    Fault("stream-over-readers", "the next rows are chosen while others still use the last",
          "streamed += others;\n      __syncthreads();", "streamed += others;\n      if (!FAULT) __syncthreads();"),
    Fault("classes-unstaged", "slopes are made before the classes of all queries are staged",
          "= grad_at(i, c);\n        }\n        __syncthreads();", "= grad_at(i, c);\n        }\n        if (!FAULT) __syncthreads();"),
    Fault("rank-unread", "labels are ranked before all are there",
          "to.keys[t] = key;\n  }\n  __syncthreads();", "to.keys[t] = key;\n  }\n  if (!FAULT) __syncthreads();"),
    Fault("divide-unmeasured", "rows are divided before their norms are there",
          "finish_row(p, divided, squares, rows, t);\n  }\n  __syncthreads();",
          "finish_row(p, divided, squares, rows, t);\n  }\n  if (!FAULT) __syncthreads();"),
    Fault("sum-unfinished", "the warps' sums are added before all are there",
          "__syncthreads();\n  T sum = 0;\n  for (int w", "if (!FAULT) __syncthreads();\n  T sum = 0;\n  for (int w"),
    Fault("merge-unfinished", "parts are weighted before all have their largest score",
          "largest + log(all);\n    }\n    __syncthreads();", "largest + log(all);\n    }\n    if (!FAULT) __syncthreads();"),
    Fault("barrier-in-a-branch", "one lane of each warp goes to a barrier of its own",
          "if (lane() == 0) across[warp()] = x;", "if (lane() == 0) {\n    across[warp()] = x;\n    if (FAULT) __syncthreads();\n  }"),
    # what is there, and what is not
    Fault("past-the-row", "a row is read one feature past its end",
          "i >= 0 && first + c < length ?", "i >= 0 && first + c < length + FAULT ?"),
    Fault("skipped-tail", "products leave out the last rows, fewer than eight",
          "return (count + 7) / 8 * 8;", "return (count + (FAULT ? 0 : 7)) / 8 * 8;"),
    Fault("one-query-more", "a tile has one query more than there is",
          "count = min(S::kOwn, p.queries - first);\n  if (t < S::kOwn) {",
          "count = min(S::kOwn, p.queries - first + FAULT);\n  if (t < S::kOwn) {"),
    Fault("no-mask", "padding takes part", "(!p.mask.data || ", "(!p.mask.data || FAULT || "),
    Fault("mask-stride", "the mask is read as if it were contiguous", "s * p.mask.strides[1]", "s * (FAULT ? 1 : p.mask.strides[1])"),
    Fault("scales-stride", "the scales are read as if they were contiguous", "b * p.scales_stride", "b * (FAULT ? 1 : p.scales_stride)"),
    Fault("result-stride", "the result is read as if it had the strides of its gradient",
          "result + c * p.result.strides[2]", "result + c * (FAULT ? p.grad : p.result).strides[2]"),
    Fault("other-episode", "the labels of another episode", "[b * p.third.strides[0]", "[(FAULT ? 0 : b) * p.third.strides[0]"),
    Fault("swapped-label", "a class goes by its rank, not by its label",
          "to.label[segment] = key;", "to.label[segment] = FAULT ? segment : key;"),
    Fault("short-class", "the last class of a tile loses a support",
          "to.first[segment + 1] = t + 1;", "to.first[segment + 1] = t + !FAULT;"),
    Fault("uninitialised-classes", "the sums of the classes begin with whatever was there",
          "classes.peak[e] = -infinity<T>(), classes.sum[e] = T(0);",
          "classes.peak[e] = -infinity<T>(), FAULT ? T(0) : classes.sum[e] = T(0);"),
    Fault("scales-not-wanted", "the gradient of scales is written where none is wanted",
          "if (p.to_scales) {\n    scale_sum", "if (p.to_scales || FAULT) {\n    scale_sum"),
    Fault("query-not-wanted", "an episode writes the gradient of queries where none is wanted",
          "if (p.of_query.to) {\n      __syncthreads();", "if (p.of_query.to || FAULT) {\n      __syncthreads();"),
    # softmax
    Fault("no-guard", "-infinity less -infinity, where nothing was summed yet",
          "return x == shift ? T(1) :", "return x == shift && !FAULT ? T(1) :"),
    Fault("no-support", "zero over zero, where all supports are padding",
          "sum[row] == T(0) ? T(0) : x / sum[row]", "sum[row] == T(0) && !FAULT ? T(0) : x / sum[row]"),
    Fault("no-support-episode", "zero over zero, where all supports of an episode are padding",
          "real ? T(1) / sum : T(0)", "real || FAULT ? T(1) / sum : T(0)"),
    Fault("lost-rescale", "the weighted values keep the scale of a smaller largest score",
          "x += *gathered * shrink[row];", "x += *gathered * (FAULT ? T(1) : shrink[row]);"),
    Fault("lost-class-rescale", "the sum of a class keeps the scale of a smaller largest score",
          "class_sum = class_sum * exp_about(class_peak, now)", "class_sum = class_sum * (FAULT ? T(1) : exp_about(class_peak, now))"),
    Fault("lost-merge-rescale", "parts are added as if all had the same largest score",
          "state[i * each + kOwn * p.columns + q], top[q]);", "FAULT ? top[q] : state[i * each + kOwn * p.columns + q], top[q]);"),
    Fault("part-of-another", "a part begins with the sums of the part before", "bool begun = false;", "bool begun = FAULT && part > 0;"),
    # gradients
    Fault("missing-scale", "the slope lacks the scale",
          "out = scale * ds * u * other.unit[j];", "out = (FAULT ? T(1) : scale) * ds * u * other.unit[j];"),
    Fault("missing-u", "an episode's slope lacks u", "out = scale * ds * u;", "out = scale * ds * (FAULT ? T(1) : u);"),
    Fault("lost-norm", "the gradient lacks the part along the row",
          "(sum - radial[row] * own.active[row] * unit)", "(sum - (FAULT ? T(0) : radial[row]) * own.active[row] * unit)"),
    Fault("lost-norm-episode", "an episode's gradient of supports lacks the part along the row",
          "radial[row] * own.active[row] * at)", "(FAULT ? T(0) : radial[row]) * own.active[row] * at)"),
    Fault("wrong-radial", "the part along the row is that of eps_mode clamp",
          "along_row += scale * ds * (separable(p) ?", "along_row += scale * ds * (separable(p) || FAULT ?"),
    Fault("wrong-total", "the slope of a label lacks the other classes",
          "* grad - exp(score - log) * total;", "* grad - exp(score - log) * (FAULT ? T(0) : total);"),
    Fault("added-twice", "the first part of a gradient is added twice",
          "T x = 0;\n      for (int64_t i = 0; i < sum.count",
          "T x = FAULT ? sum.parts[e] : T(0);\n      for (int64_t i = 0; i < sum.count"),
    Fault("lost-strip", "a gradient loses all but its last strip", "if (!begins) x += *sum;", "if (!begins && !FAULT) x += *sum;"),
    Fault("lost-scale-part", "the first part of the gradient of scales is left out",
          "for (int64_t i = 0; i < p.scale_parts; ++i)", "for (int64_t i = FAULT; i < p.scale_parts; ++i)"),
    # numbers
    Fault("lost-low", "weights enter the tensor cores as one tf32 number",
          "multiply_add(at[j], low, b);\n", "if (!FAULT) multiply_add(at[j], low, b);\n"),
    Fault("out-of-range", "rows whose squares overflow or vanish are left as they are",
          "const bool repeat = !again &&", "const bool repeat = !FAULT && !again &&"),
    Fault("out-of-range-episode", "an episode's rows whose squares overflow or vanish are left as they are",
          "if (out_of_range(squares, largest)) {", "if (out_of_range(squares, largest) && !FAULT) {"),
]

TRITON = [
    # what is there, and what is not
    Fault("past-the-row", "a row is read past its end",
          "(column < (count - first) // UNIT * UNIT)", "(column < (count - first) // UNIT * UNIT + UNIT)"),
    Fault("one-query-more", "a tile has one query more than there is", "tl.arange(0, BLOCK_Q) < Q\n", "tl.arange(0, BLOCK_Q) <= Q\n"),
    Fault("skipped-tail", "the last supports of a part are left out",
          "    end = tl.minimum(start + part, S)\n", "    end = tl.minimum(start + part, S) // 8 * 8\n"),
    Fault("no-mask", "padding takes part", "return real & (masked != 0)", "return real"),
    Fault("mask-stride", "the mask is read as if it were contiguous",
          "row * mask_row, mask=real & (has_mask != 0)", "row, mask=real & (has_mask != 0)"),
    Fault("column-stride", "columns are read as if they were contiguous", "(column if ALIGNED else column * column_stride)", "column"),
    Fault("other-episode", "the labels or values of another episode",
          "    third += b * third_batch\n    mask += b * mask_batch\n    q_real",
          "    mask += b * mask_batch\n    q_real"),
    Fault("swapped-label", "a support counts for the class before its own",
          "[:, None] == columns[None, :]).to(A)", "[:, None] - 1 == columns[None, :]).to(A)"),
    Fault("scales-not-wanted", "the gradient of scales is written where none is wanted",
          " & (needs_scales != 0):", ":"),
    Fault("query-not-wanted", "the gradient of queries is written where only that of scales is wanted",
          "& ((role > 0) | (needs_query != 0))", ""),
    # softmax
    Fault("lost-rescale", "the weighted values keep the scale of a smaller largest score", "sums * fade[:, None]", "sums"),
    Fault("lost-total-rescale", "the sum of exponentials keeps the scale of a smaller largest score",
          "total = total * fade + tl.sum(weights, 1)", "total = total + tl.sum(weights, 1)"),
    Fault("lost-class-rescale", "the sum of a class keeps the scale of a smaller largest score",
          "sums * tl.exp(peaks - new_peaks) + some", "sums + some"),
    Fault("one-round", "classes with far smaller scores are summed about the largest of all",
          "waits = scores < peak[:, None] - 60", "waits = scores != scores"),
    Fault("lost-merge-weight", "parts are added as if all had the same log-sum",
          'weight = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))', "weight = tl.exp(x - x)"),
    Fault("no-guard", "-infinity less -infinity, where a class has no support in a part",
          'base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)', "base = new_peaks"),
    Fault("no-support", "zero over zero, where all supports are padding",
          "sums / tl.where(total == 0, 1.0, total)[:, None]", "sums / total[:, None]"),
    # gradients
    Fault("missing-scale", "the slope lacks the scale", "ds *= factor", "pass"),
    Fault("lost-norm", "the gradient lacks the part along the row", "(sums - back[:, None] * unit)", "sums"),
    Fault("wrong-radial", "the part along the row of eps_mode sqrt is that of add", " * tl.where(eps_mode == 2, u, 1.0)", ""),
    Fault("wrong-role", "the last program of supports computes values",
          "(job >= query_jobs + support_jobs)", "(job >= query_jobs + support_jobs - 1)"),
    Fault("wrong-total", "the slope of a label lacks the other classes",
          "* g - tl.exp(scores - _across(log_total, of_query)) * _across(total, of_query)", "* g"),
    Fault("part-over-part", "parts of a gradient of supports are written over each other",
          "to_support + ((part * B + b) * S", "to_support + (b * S"),
    Fault("added-twice", "the first part of a gradient is added twice",
          "total = tl.zeros([BLOCK], parts.dtype.element_ty)", "total = tl.load(parts + i * element_stride, mask=i < count, other=0.0)"),
    # numbers
    Fault("rounded", "products round float32 to tf32", 'y, sums, input_precision="ieee"', 'y, sums, input_precision="tf32"'),
    Fault("out-of-range", "rows whose squares overflow or vanish are left as they are",
          "factor = tl.where(squares > LARGE, DOWN, tl.where(squares < 1 / LARGE, 1 / DOWN, 1.0))",
          "factor = tl.full(squares.shape, 1.0, squares.dtype)"),
]


# ---- running them ----------------------------------------------------------------------------------------------------------------------

def cuda_kernels(source: str):
    """With which fault, or None -> the context in which ``emulator(seed)`` runs the kernels. One build has all, and a variable chooses."""
    for number, fault in enumerate(CUDA, 1):
        assert source.count(fault.old) == 1, f"{fault.name} is in the way of another fault"
        source = source.replace(fault.old, fault.new.replace("FAULT", f"(fault == {number})"))
    module = ptx.Module(emulation.compile_cuda('extern "C" { __device__ volatile int fault; }\n' + source))
    chosen, = (array for name, array, _ in module.buffers if name == "fault")

    @contextlib.contextmanager
    def kernels(fault: Fault | None):
        chosen.view(np.int32)[0] = CUDA.index(fault) + 1 if fault else 0
        yield lambda seed: emulation.CudaEmulator(seed, module.kernels.__getitem__)
    return kernels


def triton_kernels(source: str):
    """The same. A fault is a module of the same name: what it does not touch is not compiled again."""
    import fastmeta.triton

    @contextlib.contextmanager
    def kernels(fault: Fault | None):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "cosine_attention.py")
            path.write_text(source.replace(fault.old, fault.new) if fault else source)
            spec = importlib.util.spec_from_file_location("fastmeta.triton.cosine_attention", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            with mock.patch.multiple(fastmeta.triton, **{name: getattr(module, name) for name in fastmeta.triton.__all__}):
                yield emulation.TritonEmulator
    return kernels


class Backend(NamedTuple):
    name: str  # fastmeta's
    faults: list[Fault]
    path: Path
    missing: Callable
    kernels: Callable


BACKENDS = {
    "cuda": Backend("cpp", CUDA, emulation.ROOT / "csrc/cuda/cosine_attention.cu", emulation.cuda_is_missing, cuda_kernels),
    "triton": Backend("triton", TRITON, emulation.ROOT / "fastmeta/triton/cosine_attention.py", emulation.triton_is_missing,
                      triton_kernels)}


def failure(case, emulator, backend: str) -> str | None:
    """How the kernels fail a case: the machine's finding, or which tensor is wrong."""
    try:
        check(case, emulator, backend)
    except ptx.Finding as finding:
        return f"`{finding.kind}` in {finding.kernel}"
    except AssertionError as error:
        if tensor := re.search(r" tensor (\d+)", str(error)):
            args, keywords = inputs(case)
            arguments = [*zip(("query", "support", "values"), args), *keywords.items()]
            gradients = [f"gradient of {name}" for name, x in arguments if getattr(x, "requires_grad", False)]
            return "wrong numbers: " + ["result", *gradients][int(tensor[1])]
        return str(error).partition(": ")[2]
    return None


def run(backend: Backend, source: str, faults: list[Fault]):
    """Of each fault how it is caught, and by which case; None for both if it survives."""
    kernels = backend.kernels(source)

    @functools.cache
    def without_a_fault(case):
        with kernels(None) as emulator:
            return failure(case, emulator, backend.name)

    for fault in faults:
        with kernels(fault) as emulator:
            how, case = next(((how, case) for case in CASES if (how := failure(case, emulator, backend.name))), (None, None))
        if case and (wrong := without_a_fault(case)):
            raise RuntimeError(f"{case} fails without a fault, too, and catches nothing: {wrong}")
        yield fault, how, case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS, help="default: both")
    parser.add_argument("--only", metavar="NAME", help="one fault")
    arguments = parser.parse_args()

    chosen = {name: [fault for fault in backend.faults if arguments.only in (None, fault.name)] for name, backend in BACKENDS.items()
              if arguments.backend in (None, name)}
    if not any(chosen.values()):
        parser.error(f"--only {arguments.only}: expected one of {', '.join(f.name for name in chosen for f in BACKENDS[name].faults)}")
    sources = {name: BACKENDS[name].path.read_text() for name in chosen}
    stale = [f"{name} {fault.name}: its text is {count} times in {BACKENDS[name].path}, expected once: {fault.old!r}"
             for name in chosen for fault in BACKENDS[name].faults if (count := sources[name].count(fault.old)) != 1]
    missing = [reason for name in chosen if (reason := BACKENDS[name].missing())]
    if stale or missing:
        print(*stale, *missing, sep="\n", file=sys.stderr)
        return 2

    print("| kernels | fault | | caught by | case |\n|---|---|---|---|---|")
    survivors = 0
    for name, faults in chosen.items():
        for fault, how, case in run(BACKENDS[name], sources[name], faults):
            survivors += case is None
            print(f"| {name} | {fault.name} | {fault.what} | {how or '**nothing**'} | {case or ''} |", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
