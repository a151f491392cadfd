"""Deliberate faults in the kernels of the GPU, one at a time; a case of test_gpu_kernels.py, test_gpu_lrua_memory.py, test_gpu_mann.py or
test_gpu_coordinate_generator.py must catch each.

    python tests/mutations.py [--kernels cuda | triton | mann | lrua-triton | coordinate-triton] [--only NAME]

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
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import emulation
import numpy as np
import ptx
import test_gpu_coordinate_generator
import test_gpu_kernels
import test_gpu_lrua_memory
import test_gpu_mann

from fastmeta import reference


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


MANN = [  # of mann_episode.cu and the lrua_memory.h it includes
    # barriers
    Fault("gates-unread", "the cell begins before all gates are there",
          "row.gates[i] = x; });\n    __syncthreads();", "row.gates[i] = x; });\n    if (!FAULT) __syncthreads();"),
    Fault("hidden-unread", "the heads begin before the whole hidden state is there",
          "line[e.cell_at() + h] = cell;\n      }\n    }\n    __syncthreads();", "line[e.cell_at() + h] = cell;\n      }\n    }\n    if (!FAULT) __syncthreads();"),
    Fault("scores-unfinished", "weights are normalised before all warps have left their sums",
          "__syncthreads();\n    normalise(", "if (!FAULT) __syncthreads();\n    normalise("),
    Fault("read-unnormalised", "the memory is read before all weights are there",
          "row.written, row.usage, row.usage);\n    __syncthreads();", "row.written, row.usage, row.usage);\n    if (!FAULT) __syncthreads();"),
    Fault("next-step-early", "a step begins before what was read is there",
          "next_weights = swap;\n    __syncthreads();", "next_weights = swap;\n    if (!FAULT) __syncthreads();"),
    Fault("rows-early", "sums over slots begin before the gradients of all slots are there",
          "row.of_weights, row.sums);\n    __syncthreads();\n    T* grad_heads", "row.of_weights, row.sums);\n    if (!FAULT) __syncthreads();\n    T* grad_heads"),
    Fault("parts-unread", "parts of a sum are added before all are there",
          "row.of_heads, row.parts);\n    __syncthreads();", "row.of_heads, row.parts);\n    if (!FAULT) __syncthreads();"),
    # the steps
    Fault("stale-weights", "a step writes to where the step before the last had read",
          "weights = next_weights, next_weights = swap;", "if (!FAULT) weights = next_weights, next_weights = swap;"),
    Fault("late-checkpoint", "a checkpoint is that of a step later", "(line && t % kSegment == 0)", "(line && t % kSegment == (FAULT ? 1 : 0))"),
    Fault("short-replay", "the memory of the backward lacks the last write", "segment.replay(checkpoint, s + 1);", "segment.replay(checkpoint, s + !FAULT);"),
    Fault("no-second-replay", "cosines of the memory before the write are of that after it",
          "if (p.read_before_write) segment.replay(checkpoint, s);", "if (p.read_before_write && !FAULT) segment.replay(checkpoint, s);"),
    Fault("first-cell", "the first step has the cell of no step before it",
          "const T cell_before = t ?", "const T cell_before = FAULT && !t ? T(0) : t ?"),
    Fault("unfilled-padding", "outputs after the end of an episode are left as they are",
          "fill(e.outputs + at * carried, carried, T(0));", "if (!FAULT) fill(e.outputs + at * carried, carried, T(0));"),
    Fault("length-of-all", "every episode is as long as the longest", "if (!e.lengths) return e.steps;", "if (!e.lengths || FAULT) return e.steps;"),
    Fault("other-row", "a row has the outputs' gradient of the row before", "e.grad_outputs[at * carried +", "e.grad_outputs[(FAULT && b ? at - 1 : at) * carried +"),
    # products
    Fault("short-tail", "a row of weights lacks its last number", "if (k + u * 32 < depth)", "if (k + u * 32 < depth - int(FAULT))"),
    Fault("lost-part", "the last part of a sum down the columns is left out", "s < splits_of(columns);", "s < splits_of(columns) - int(FAULT);"),
    Fault("short-bias", "the gradient of a bias lacks the last row", "i < p.rows;", "i < p.rows - int(FAULT);"),
    # memory
    Fault("tie-by-the-highest", "of slots of equal usage the last one is chosen",
          "(other == least && other_slot < slot)", "(other == least && (other_slot < slot) != FAULT)"),
    Fault("not-erased", "the least used slot keeps what it held", "const bool erased = j == 0 &&", "const bool erased = !FAULT && j == 0 &&"),
    Fault("erased-gradient", "what was erased has a gradient", "T grad = n == chosen[0] ?", "T grad = n == chosen[0] && !FAULT ?"),
    Fault("one-mark", "shared marks lack the least used slot", "for (int i = 0; i < p.heads; ++i) any", "for (int i = FAULT; i < p.heads; ++i) any"),
    Fault("unused-writes", "usage does not count what was written", "sum += written[j * p.padded() + n];", "if (!FAULT) sum += written[j * p.padded() + n];"),
    Fault("past-the-slots", "a walk has one slot more than there is", "body(n, n < p.slots);", "body(n, n < p.slots + int(FAULT));"),
    Fault("largest-of-a-warp", "weights are relative to the largest score of one warp",
          "top = fmax(top, sums.tops[w * p.heads + head]);", "top = FAULT && w ? top : fmax(top, sums.tops[w * p.heads + head]);"),
    # gradients
    Fault("no-mean", "the softmax's derivative lacks the mean", "(of_weights[at] - mean)", "(of_weights[at] - (FAULT ? T(0) : mean))"),
    Fault("wrong-radial", "the part of the gradient along a row is that of another eps_mode",
          "const T along = q * c * inverse * inverse;", "const T along = q * c * inverse * (FAULT ? T(1) : inverse);"),
    Fault("lost-radial-add", "eps_mode add: no gradient along the row", "radial = b > 0 ?", "radial = b > 0 && !FAULT ?"),
    Fault("lost-radial-clamp", "eps_mode clamp: no gradient along the row", "radial = squares > least * least ?", "radial = squares > least * least && !FAULT ?"),
    Fault("gate-without-marks", "the gradient of a gate lacks the least used slots",
          "if (is_least_used(p, chosen, head, n)) by_gate", "if (is_least_used(p, chosen, head, n) && !FAULT) by_gate"),
    Fault("lost-cosines", "the memory before a write has no gradient of its cosines", "if (kReads && after)", "if (kReads && after && !FAULT)"),
    Fault("wrong-strength", "the derivative of softplus is 1", "-expm1(1 - strengths[j])", "(FAULT ? T(1) : -expm1(1 - strengths[j]))"),
    # numbers
    Fault("out-of-range", "rows whose squares overflow or vanish are left as they are", "if (scaled && largest > 0)", "if (scaled && largest > 0 && !FAULT)"),
]


LRUA_TRITON = [
    Fault("chosen-unseen", "slots are used before all threads see which were chosen",
          "tl.store(slots + j, last_slot)\n    tl.debug_barrier()", "tl.store(slots + j, last_slot)"),
    Fault("scores-unseen", "cosines begin before all products are there", "key_scale), True, BLOCK_N)\n    tl.debug_barrier()", "key_scale), True, BLOCK_N)"),
    Fault("softmax-over-readers", "weights are stored over scores that others still read",
          "            tl.debug_barrier()  # threads beyond the slots of a tile have the same numbers as others\n", ""),
    Fault("flow-over-readers", "slopes are stored over products that others still read",
          "            by_strength += by_score * cosines\n            tl.debug_barrier()\n", "            by_strength += by_score * cosines\n"),
    Fault("slopes-unseen", "the gradient by the write weights is used before all of it is there",
          "True, BLOCK_N)\n        tl.debug_barrier()\n        for j in range(R):\n            by_gate", "True, BLOCK_N)\n        for j in range(R):\n            by_gate"),
    Fault("radial-of-one-head", "the part along a slot is that of the last head alone", "mask=(n < N) & (j > 0)", "mask=(n < N) & (j > R)"),
    Fault("tie-by-the-highest", "of slots of equal usage the last one is chosen",
          "last_slot = tl.min(tl.where(least == last, slot, N), 0)", "last_slot = tl.max(tl.where(least == last, slot % N, -1), 0)"),
    Fault("negative-zero", "-0 comes before 0", "tl.where(usage == 0, 0.0, usage)", "usage"),
    Fault("one-mark", "with shared marks a head has its own slot only", "tl.where(shared != 0, R, j + 1)", "tl.where(shared != 0, j + 1, j + 1)"),
    Fault("not-erased", "the least used slot keeps what it held", "x = tl.where((n == erased)[:, None], 0.0, x)", "x = x + 0"),
    Fault("erased-gradient", "what was erased has a gradient", "g = tl.where((n == erased)[:, None], 0.0, g)", "g = g + 0"),
    Fault("unused-writes", "usage does not count what was written", "used += _load(weights, j, i, N, BLOCK_N) + write_weights", "used += _load(weights, j, i, N, BLOCK_N)"),
    Fault("no-mean", "the softmax's derivative lacks the mean", "* (slope - mean)", "* slope"),
    Fault("wrong-radial", "the part of the gradient along a row is that of another eps_mode",
          "radial += along * inverse * inverse * key_square", "radial += along * inverse * key_square"),
    Fault("lost-radial", "the memory's gradient lacks the part along a row", "of_memory -= (radial * scale)[:, None] * x", "of_memory += 0 * x"),
    Fault("gate-without-marks", "the gradient of a gate lacks the least used slots", " - tl.where(least, 1.0, 0.0)", ""),
    Fault("out-of-range", "rows whose squares overflow or vanish are left as they are",
          "tl.where(largest > 0, ((TOP - exponent) << DIGITS).to(largest.dtype, bitcast=True), 1.0)", "tl.where(largest > 0, 1.0, 1.0).to(largest.dtype)"),
    Fault("unscaled-key", "the gradient of a scaled key lacks its scale", "sums = key_scale * (sums - by_key", "sums = (sums - by_key"),
]

COORDINATE_TRITON = [
    # barriers, which several warps need
    Fault("layer-over-readers", "a layer is stored over the one that others still read",
          "tl.debug_barrier()  # others may still read the block before", "pass"),
    Fault("layer-unseen", "a layer is read before all of it is there",
          "_keep(hidden, first, real, BLOCK, BLOCK_W)\n    tl.debug_barrier()", "_keep(hidden, first, real, BLOCK, BLOCK_W)"),
    Fault("slopes-unseen", "the gradient of the layer above is read before all of it is there",
          "_keep(flow, of_second, real, BLOCK, BLOCK_W)\n        tl.debug_barrier()", "_keep(flow, of_second, real, BLOCK, BLOCK_W)"),
    Fault("step-over-readers", "h is stored over that of the step before, which others still read",
          "tl.debug_barrier()  # others may still read the step, or the block, before", "pass"),
    Fault("gates-over-readers", "gradients of gates are stored over those of the step after, which others still read",
          "tl.debug_barrier()  # others may still read the step after", "pass"),
    Fault("gates-unseen", "gradients of gates are read before all of them are there",
          "_keep(flow + 3 * TILE, of_o, real, BLOCK, BLOCK_W)\n            tl.debug_barrier()", "_keep(flow + 3 * TILE, of_o, real, BLOCK, BLOCK_W)"),
    # what is there, and what is not
    Fault("one-coordinate-more", "a block has one coordinate more than there is",
          "mask=m < M - start, other=0.0)", "mask=m <= M - start, other=0.0)"),
    Fault("one-unit-more", "sums have one unit more than there is", "tl.store(at, tl.load(at, mask=(unit < W) & ~begins", "tl.store(at, tl.load(at, mask=(unit <= W) & ~begins"),
    Fault("gradients-not-wanted", "the gradient of the gradients is written where none is wanted",
          "if needs & 1:\n            of_size", "if needs >= 0:\n            of_size"),
    Fault("sums-not-wanted", "sums are made where no gradient of a weight is wanted",
          "if needs > 1:\n                    below", "if needs >= 0:\n                    below"),
    Fault("bias-not-wanted", "the gradient of a bias is written where none is wanted", "units, needs & 2)", "units, 1)"),
    # sums
    Fault("begins-again", "the sum of a program is that of its last block", "begins = block == program", "begins = block >= program"),
    Fault("begins-each-block", "the sum of a program is that of its last block, but for the output", "(block == program) & (step == 0)", "(step == 0)"),
    Fault("begins-each-step", "the sum of a program's first block is that of the first step", "(block == program) & (step == 0)", "(block == program)"),
    Fault("never-begins", "the sum of a program begins with whatever was there", "~begins, other=0.0)", "(begins | ~begins), other=0.0)"),
    Fault("one-program", "the gradient is the sum of the first program", "(p < programs)[:, None]", "(p < 1)[:, None]"),
    Fault("untransposed", "rows of the sums are rows of the gradient", "to + unit * rows + row", "to + row * units + unit"),
    # mathematics
    Fault("second-channel-alone", "units of the first layer have the second channel's weights for both", "size[:, None] * _row(weight, gate, W", "size[:, None] * _row(weight, GATES + gate, W"),
    Fault("no-relu", "a unit that is 0 passes its gradient", "tl.where(real[:, None] & ~(first <= 0), of_first", "tl.where(real[:, None], of_first"),
    Fault("no-relu-above", "a unit of the second layer that is 0 passes its gradient", "real[:, None] & ~(second <= 0)", "real[:, None]"),
    Fault("unclamped-size", "the first channel has a derivative below its clamp", "tl.where(size >= -1, of_size, 0.0)", "of_size"),
    Fault("unclamped-scaled", "the second channel has a derivative outside of its clamp", "tl.where(tl.abs(gradient * EXP_P) <= 1, of_scaled, 0.0)", "of_scaled"),
    Fault("lost-sign", "the size of a negative gradient grows with it", "(tl.abs(gradient) + EPS) * sign", "(tl.abs(gradient) + EPS)"),
    Fault("swapped-gates", "the input gate's weights are the forget gate's", "i += h * _row(weight_hh, 4 * j, W", "i += h * _row(weight_hh, 4 * j + 1, W"),
    Fault("lost-cell", "the gradient of a cell is that by its own output", "of_c += of_h * o *", "of_c = of_h * o *"),
    Fault("not-forgotten", "the gradient of the cell before does not pass the forget gate", "of_c *= f", "of_c *= 1.0"),
    Fault("cell-after", "the forget gate's gradient has the cell after the step", "of_c * c * f * (1 - f)", "of_c * squashed * f * (1 - f)"),
    Fault("one-gate-back", "h has no gradient by the output gate", "of_h += _unit(flow + 3 * TILE, j", "of_h += 0.0 * _unit(flow + 3 * TILE, j"),
    Fault("other-gate", "the recurrent weights of a gate have another one's gradient", "tl.sum(below * of_f, 0)", "tl.sum(below * of_g, 0)"),
    Fault("steps-forward", "the backward goes through the steps from the first to the last", "t = T - 1 - step", "t = step"),
]


# ---- running them ----------------------------------------------------------------------------------------------------------------------

def with_headers(path: Path) -> str:
    """A file of csrc/cuda with what it includes of there in the place of the includes."""
    return re.sub(r'#include "(cuda/.*)"\n', lambda include: with_headers(emulation.ROOT / "csrc" / include[1]), path.read_text()).replace("#pragma once\n", "")


def cuda_kernels(source: str, faults: list[Fault]):
    """With which fault, or None -> the context in which ``emulator(seed)`` runs the kernels. One build has all, and a variable chooses."""
    for number, fault in enumerate(faults, 1):
        assert source.count(fault.old) == 1, f"{fault.name} is in the way of another fault"
        source = source.replace(fault.old, fault.new.replace("FAULT", f"(fault == {number})"))
    module = ptx.Module(emulation.compile_cuda('extern "C" { __device__ volatile int fault; }\n' + source))
    chosen, = (array for name, array, _ in module.buffers if name == "fault")

    @contextlib.contextmanager
    def kernels(fault: Fault | None):
        chosen.view(np.int32)[0] = faults.index(fault) + 1 if fault else 0
        yield lambda seed: emulation.CudaEmulator(seed, module.kernels.__getitem__)
    return kernels


def triton_kernels(name: str, source: str, faults: list[Fault]):
    """The same, of the module ``name``. A fault is a module of the same name: what it does not touch is not compiled again."""
    import fastmeta.triton

    @contextlib.contextmanager
    def kernels(fault: Fault | None):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.py")
            path.write_text(source.replace(fault.old, fault.new) if fault else source)
            spec = importlib.util.spec_from_file_location(f"fastmeta.triton.{name}", path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            with mock.patch.multiple(fastmeta.triton, **{name: getattr(module, name) for name in fastmeta.triton.__all__ if hasattr(module, name)}):
                yield emulation.TritonEmulator
    return kernels


def tensors_of_attention(case) -> list[str]:
    args, keywords = test_gpu_kernels.inputs(case)
    arguments = [*zip(("query", "support", "values"), args), *keywords.items()]
    return ["result", *(f"gradient of {name}" for name, x in arguments if getattr(x, "requires_grad", False))]


def tensors_of_mann(case) -> list[str]:
    return ["outputs", *reference.MANNState._fields, *(f"gradient of {name}" for name, x in test_gpu_mann.inputs(case)[0].items() if x.requires_grad)]


def tensors_of_lrua(case) -> list[str]:
    results = {"memory_read": ("read", "weights"), "lrua_write": ("memory", "write weights"), "lrua_step": ("read", "memory", "usage", "weights")}
    return [*results[case.name], *(f"gradient of {name}" for name, x in test_gpu_lrua_memory.inputs(case)[0].items() if x.requires_grad)]


def tensors_of_coordinates(case) -> list[str]:
    return ["result", *(f"gradient of {name}" for name, x in test_gpu_coordinate_generator.inputs(case)[0].items() if x.requires_grad)]


class Kernels(NamedTuple):
    backend: str
    faults: list[Fault]
    source: Callable[[], str]
    missing: Callable
    build: Callable
    tests: ModuleType  # with CASES and check
    tensors: Callable  # case -> what test compares, in order


KERNELS = {
    "cuda": Kernels("cpp", CUDA, (emulation.ROOT / "csrc/cuda/cosine_attention.cu").read_text, emulation.cuda_is_missing, cuda_kernels,
                    test_gpu_kernels, tensors_of_attention),
    "triton": Kernels("triton", TRITON, (emulation.ROOT / "fastmeta/triton/cosine_attention.py").read_text, emulation.triton_is_missing,
                      functools.partial(triton_kernels, "cosine_attention"), test_gpu_kernels, tensors_of_attention),
    "lrua-triton": Kernels("triton", LRUA_TRITON, (emulation.ROOT / "fastmeta/triton/lrua_memory.py").read_text, emulation.triton_is_missing,
                           functools.partial(triton_kernels, "lrua_memory"), test_gpu_lrua_memory, tensors_of_lrua),
    "coordinate-triton": Kernels("triton", COORDINATE_TRITON, (emulation.ROOT / "fastmeta/triton/coordinate_generator.py").read_text, emulation.triton_is_missing,
                                 functools.partial(triton_kernels, "coordinate_generator"), test_gpu_coordinate_generator, tensors_of_coordinates),
    "mann": Kernels("cpp", MANN, functools.partial(with_headers, emulation.ROOT / "csrc/cuda/mann_episode.cu"), emulation.cuda_is_missing, cuda_kernels,
                    test_gpu_mann, tensors_of_mann)}


def failure(case, emulator, kernels: Kernels) -> str | None:
    """How the kernels fail a case: the machine's finding, or which tensor is wrong."""
    try:
        kernels.tests.check(case, emulator, kernels.backend)
    except ptx.Finding as finding:
        return f"`{finding.kind}` in {finding.kernel}"
    except AssertionError as error:
        if tensor := re.search(r" tensor (\d+)", str(error)):
            return "wrong numbers: " + kernels.tensors(case)[int(tensor[1])]
        return str(error).partition(": ")[2]
    return None


def run(kernels: Kernels, source: str, faults: list[Fault]):
    """Of each fault how it is caught, and by which case; None for both if it survives."""
    with_fault = kernels.build(source, kernels.faults)

    @functools.cache
    def without_a_fault(case):
        with with_fault(None) as emulator:
            return failure(case, emulator, kernels)

    for fault in faults:
        with with_fault(fault) as emulator:
            how, case = next(((how, case) for case in kernels.tests.CASES if (how := failure(case, emulator, kernels))), (None, None))
        if case and (wrong := without_a_fault(case)):
            raise RuntimeError(f"{case} fails without a fault, too, and catches nothing: {wrong}")
        yield fault, how, case


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=KERNELS, help="default: all")
    parser.add_argument("--only", metavar="NAME", help="one fault")
    arguments = parser.parse_args()

    chosen = {name: [fault for fault in kernels.faults if arguments.only in (None, fault.name)] for name, kernels in KERNELS.items()
              if arguments.kernels in (None, name)}
    if not any(chosen.values()):
        parser.error(f"--only {arguments.only}: expected one of {', '.join(f.name for name in chosen for f in KERNELS[name].faults)}")
    sources = {name: KERNELS[name].source() for name in chosen}
    stale = [f"{name} {fault.name}: its text is {count} times in the source, expected once: {fault.old!r}"
             for name in chosen for fault in KERNELS[name].faults if (count := sources[name].count(fault.old)) != 1]
    missing = [reason for name in chosen if (reason := KERNELS[name].missing())]
    if stale or missing:
        print(*stale, *missing, sep="\n", file=sys.stderr)
        return 2

    print("| kernels | fault | | caught by | case |\n|---|---|---|---|---|")
    survivors = 0
    for name, faults in chosen.items():
        for fault, how, case in run(KERNELS[name], sources[name], faults):
            survivors += case is None
            print(f"| {name} | {fault.name} | {fault.what} | {how or '**nothing**'} | {case or ''} |", flush=True)
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
