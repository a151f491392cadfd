"""cosine_attention and matching_log_probs, forward and backward. The mathematics is in ``reference/cosine_attention.py``, the
contract of the operations in ``schemas/cosine_attention.py``.

A program has a tile of rows of one side, queries or supports, and streams the rows of the other side past it, a tile at a time. The
product of two tiles runs over the features in pieces, and the squares of both sides are summed in the same pass: D has no bound, and no
norm is stored. The scores of two tiles are consumed at once. There are no atomics, and partial results are added in a fixed order: the
same bits on every run.

With x^ = x / a' and a' about the norm of x, c = u (q^ . k^), where u is 1 but for eps_mode ``add`` and ``sqrt``; and with ds the gradient
of the loss by a score,
    dq_i = scale / a'_i (sum_j ds_ij u_ij k^_j  -  q^_i sum_j ds_ij v_ij (q^_i . k^_j))
and the same for k_j with the sums over i; v is 1, u^2 or u^3 for ``clamp``, ``add``, ``sqrt``, and 0 for a side that is not divided by
its norm.

Options are numbers at run time, and neither sizes nor strides are specialised on: a kernel is compiled for a dtype and a choice of tiles,
not for a shape.
"""

import functools
import inspect
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as device

SLICE = tl.constexpr(8)  # rows of a tile that one product of the backward reads


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels compute in tensors of this dtype."""
    return dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _kernel(function):
    """``triton.jit`` of a kernel that is compiled for types and constants alone, not for values or alignments of its arguments."""
    names = [name for name, p in inspect.signature(function).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


# ---- rows and their norms ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _accumulation(dtype):
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def _dot(x, y, sums):
    """``sums + x @ y``, in the type of ``sums``. "ieee": the float32 of the default would be TF32, with 11 bits."""
    if sums.dtype == tl.float64:  # Triton 3.8 does not compile its product in float64
        return sums + tl.sum(x[:, None, :] * tl.trans(y)[None, :, :], 2)
    else:
        return tl.dot(x, y, sums, input_precision="ieee")


@triton.jit
def _load_rows(base, real, row_stride, first, count, column_stride, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """``[rows, WIDTH]``: rows from ``base`` on, columns from ``first`` on; zeros where a row is not ``real`` or a column not < ``count``.

    ALIGNED: ``base`` and the rows begin at multiples of 16 bytes, the columns are contiguous, and ``count`` of them are a multiple of 16
    bytes. Divided and multiplied by it, the numbers are multiples for the compiler too, which then moves 16 bytes at a time.
    """
    offsets, inside = _tile(base.dtype.element_ty, real, row_stride, first, count, column_stride, ALIGNED, WIDTH)
    at = base + (first if ALIGNED else first * column_stride.to(tl.int64))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return tl.load(at + offsets, mask=inside, other=0.0)


@triton.jit
def _store_rows(base, real, row_stride, first, count, values, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """The same to rows with contiguous columns."""
    offsets, inside = _tile(base.dtype.element_ty, real, row_stride, first, count, 1, ALIGNED, WIDTH)
    at = base + first
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    tl.store(at + offsets, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _tile(dtype: tl.constexpr, real, row_stride, first, count, column_stride, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of a tile from its first element, and what of it exists. 32 bits: the pointers of a tile take half the registers."""
    UNIT: tl.constexpr = 128 // dtype.primitive_bitwidth if ALIGNED else 1
    row = tl.arange(0, real.shape[0]) * (row_stride // UNIT * UNIT)
    column = tl.arange(0, WIDTH)
    offsets = row[:, None] + (column if ALIGNED else column * column_stride)[None, :]
    return offsets, real[:, None] & (column < (count - first) // UNIT * UNIT)[None, :]


@triton.jit
def _products(own, own_real, own_row, own_column, own_factor, other, other_real, other_row, other_column, other_factor, D,
              RESCALE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of own rows and others, and the squares of both; with RESCALE of rows times their factors."""
    A: tl.constexpr = _accumulation(own.dtype.element_ty)
    dots = tl.zeros([own_real.shape[0], other_real.shape[0]], A)
    own_squares = tl.zeros([own_real.shape[0]], A)
    other_squares = tl.zeros([other_real.shape[0]], A)
    for d in range(0, D, BLOCK_D):
        x = _load_rows(own, own_real, own_row, d, D, own_column, ALIGNED, BLOCK_D)
        y = _load_rows(other, other_real, other_row, d, D, other_column, ALIGNED, BLOCK_D)
        if RESCALE:
            x = (x.to(A) * own_factor[:, None]).to(x.dtype)
            y = (y.to(A) * other_factor[:, None]).to(y.dtype)
        own_squares += tl.sum(x.to(A) * x.to(A), 1)
        other_squares += tl.sum(y.to(A) * y.to(A), 1)
        dots = _dot(x, tl.trans(y), dots)
    return dots, own_squares, other_squares


@triton.jit
def _range_factor(squares, real):
    """A power of two for each row that brings it into range, 1 where its squares neither overflow nor vanish."""
    DOUBLE: tl.constexpr = squares.dtype == tl.float64
    LARGE: tl.constexpr = 1e280 if DOUBLE else 1e30
    DOWN: tl.constexpr = 2.0**-500 if DOUBLE else 2.0**-80
    factor = tl.where(squares > LARGE, DOWN, tl.where(squares < 1 / LARGE, 1 / DOWN, 1.0))
    return tl.where(real, factor, 1.0).to(squares.dtype)


@triton.jit
def _sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _divide(x, y):
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _scaling(squares, factor, divided, eps_mode, eps):
    """Of rows times ``factor``, ``squares`` being theirs: ``(multiplier, inverse, norm, active)``.

    What takes them to x^; 1 / a'; \\|x^\\|; and 0 where the norm has no derivative. A side that is not ``divided`` has a' = 1 and norm 1.
    """
    TINY: tl.constexpr = 1e-150 if squares.dtype == tl.float64 else 1e-15  # its square is a normal number
    least = tl.where(eps_mode == 0, eps, TINY).to(squares.dtype) * factor
    size = _sqrt(squares)
    divisor = tl.where(size < least, least, size)  # not maximum(), which loses NaN
    multiplier = _divide(tl.full(squares.shape, 1.0, squares.dtype), tl.where(divided, divisor, factor))
    norm = tl.where(divided, _divide(size, divisor), 1.0)
    active = tl.where(divided & (size >= least), 1.0, 0.0)
    return multiplier, multiplier * factor, norm, active


@triton.jit
def _cosines(own, own_real, own_row, own_column, own_divided, other, other_real, other_row, other_column, other_divided, D, eps_mode, eps,
             ALIGNED: tl.constexpr, BLOCK_D: tl.constexpr):
    """``c``, ``u`` of own rows and others; factor, multiplier, inverse and active of the own rows; factor and multiplier of the others."""
    A: tl.constexpr = _accumulation(own.dtype.element_ty)
    own_factor = tl.full([own_real.shape[0]], 1.0, A)
    other_factor = tl.full([other_real.shape[0]], 1.0, A)
    dots, own_squares, other_squares = _products(own, own_real, own_row, own_column, own_factor, other, other_real, other_row,
                                                 other_column, other_factor, D, False, ALIGNED, BLOCK_D)
    divided = own_divided | other_divided
    if own.dtype.element_ty != tl.float16:  # whose squares float32 holds
        # Squares of some row overflow or vanish, or it is all zeros: rare, and worth the pass again.
        own_new, other_new = _range_factor(own_squares, own_real), _range_factor(other_squares, other_real)
        if divided & ((tl.max((own_new != 1.0).to(tl.int32), 0) | tl.max((other_new != 1.0).to(tl.int32), 0)) > 0):
            own_factor, other_factor = own_new, other_new
            dots, own_squares, other_squares = _products(own, own_real, own_row, own_column, own_factor, other, other_real, other_row,
                                                         other_column, other_factor, D, True, ALIGNED, BLOCK_D)
    own_multiplier, own_inverse, own_norm, own_active = _scaling(own_squares, own_factor, own_divided, eps_mode, eps)
    other_multiplier, other_inverse, other_norm, _ = _scaling(other_squares, other_factor, other_divided, eps_mode, eps)
    dots = dots * own_multiplier[:, None] * other_multiplier[None, :]
    u = tl.full(dots.shape, 1.0, A)
    if divided & (eps_mode > 0):
        norms, inverses = own_norm[:, None] * other_norm[None, :], own_inverse[:, None] * other_inverse[None, :]
        if eps_mode == 1:
            g = norms + eps * inverses
        else:
            g = tl.sqrt(norms * norms + eps * inverses * inverses)
        u = 1.0 / tl.where(g < 1.2e-38, 1.2e-38, g)
    return u * dots, u, own_factor, own_multiplier, own_inverse, own_active, other_factor, other_multiplier


@triton.jit
def _is_real(mask, mask_row, has_mask, first, end, ROWS: tl.constexpr):
    """Which rows from ``first`` on are neither past the end nor padding."""
    row = tl.arange(0, ROWS)
    real = row < end - first
    masked = tl.load(mask + first * mask_row.to(tl.int64) + row * mask_row, mask=real & (has_mask != 0), other=1)
    return real & (masked != 0)


@triton.jit
def _load_labels(labels, labels_row, real, C):
    """A label out of range becomes -1: of class 0, with a score of NaN. Nobody can be told from here."""
    label = tl.load(labels + tl.arange(0, real.shape[0]) * labels_row, mask=real, other=0)
    return tl.where((label < 0) | (label >= C), -1, label).to(tl.int32)


# ---- forward -----------------------------------------------------------------------------------------------------------------------

@_kernel
def forward_kernel(query, support, third, mask, scales, result, log_sums, query_batch: tl.int64, query_row: tl.int32,
                   query_column: tl.int32, support_batch: tl.int64, support_row: tl.int32, support_column: tl.int32, third_batch: tl.int64,
                   third_row: tl.int32, third_column: tl.int32, mask_batch: tl.int64, mask_row: tl.int32, scales_batch: tl.int64,
                   B: tl.int32, Q: tl.int32, S: tl.int32, D: tl.int32, C: tl.int32, tiles: tl.int32, chunks: tl.int32, part: tl.int32,
                   scale: tl.float64, normalize: tl.int32, eps_mode: tl.int32, eps: tl.float64, has_mask: tl.int32, has_scales: tl.int32,
                   LABELS: tl.constexpr, ALIGNED: tl.constexpr, THIRD_ALIGNED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr,
                   BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of queries, a chunk of the columns and a part of the supports, ``part`` rows, of an episode.

    Chunks compute the scores anew: the state of a few columns stays in registers, and no program waits for another. The result and
    log_sums have the shape ``[parts, B, Q, C]``; of several parts each is the result of its own supports, and :func:`merge_kernel` follows.
    """
    A: tl.constexpr = _accumulation(query.dtype.element_ty)
    pid = tl.program_id(0)
    tile, chunk, batch = pid % tiles, pid // tiles % chunks, (pid // tiles // chunks).to(tl.int64)
    b = batch % B
    start = (batch // B).to(tl.int32) * part
    end = tl.minimum(start + part, S)
    first = chunk * BLOCK_C
    columns = first + tl.arange(0, BLOCK_C)
    factor = tl.cast(scale, A) * tl.load(scales + b * scales_batch, mask=has_scales != 0, other=1.0).to(A)
    epsilon = tl.cast(eps, A)

    query += b * query_batch + tile * BLOCK_Q * query_row.to(tl.int64)
    support += b * support_batch
    third += b * third_batch
    mask += b * mask_batch
    q_real = tile * BLOCK_Q + tl.arange(0, BLOCK_Q) < Q
    # Over all supports so far: the largest score, and the sum of exponentials about it.
    top = tl.full([BLOCK_Q], float("-inf"), A)
    total = tl.zeros([BLOCK_Q], A)
    # Over those of each class; or the values weighted with the exponentials.
    peaks = tl.full([BLOCK_Q, BLOCK_C], float("-inf"), A)
    sums = tl.zeros([BLOCK_Q, BLOCK_C], A)
    for s in range(start, end, BLOCK_S):
        s_real = _is_real(mask, mask_row, has_mask, s, end, BLOCK_S)
        cosine, _, _, _, _, _, _, _ = _cosines(
            query, q_real, query_row, query_column, normalize == 2, support + s * support_row.to(tl.int64), s_real, support_row,
            support_column, normalize > 0, D, eps_mode, epsilon, ALIGNED, BLOCK_D)
        scores = tl.where(s_real[None, :], factor * cosine, float("-inf"))
        if LABELS:
            label = _load_labels(third + s * third_row.to(tl.int64), third_row, s_real, C)
            scores = tl.where((label < 0)[None, :], float("nan"), scores)
            one_hot = (tl.maximum(label, 0)[:, None] == columns[None, :]).to(A)
            # One product with the exponentials about the largest score gives the sums of all classes, as exact as about the largest
            # of each class, as long as none underflows. Scores that are smaller by more than 60 wait for the next round.
            left = tl.max((scores != float("-inf")).to(tl.int32)) > 0
            while left:
                peak = tl.max(scores, 1)
                waits = scores < peak[:, None] - 60
                shift = tl.where(peak == float("-inf"), 0.0, peak)
                weights = tl.where(waits, 0.0, tl.exp(scores - shift[:, None]))
                new_top = tl.maximum(top, peak)
                base = tl.where(new_top == float("-inf"), 0.0, new_top)
                total = total * tl.exp(top - base) + tl.sum(weights, 1) * tl.exp(shift - base)
                top = new_top
                some = _dot(weights, one_hot, tl.zeros([BLOCK_Q, BLOCK_C], A))
                new_peaks = tl.maximum(peaks, shift[:, None])
                sums = tl.where(some != 0, sums * tl.exp(peaks - new_peaks) + some * tl.exp(shift[:, None] - new_peaks), sums)
                peaks = tl.where(some != 0, new_peaks, peaks)
                scores = tl.where(waits, scores, float("-inf"))
                left = tl.max((scores != float("-inf")).to(tl.int32)) > 0
        else:
            new_top = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            weights = tl.exp(scores - base[:, None])
            fade = tl.exp(top - base)
            total = total * fade + tl.sum(weights, 1)
            top = new_top
            values = _load_rows(third + s * third_row.to(tl.int64), s_real, third_row, first, C, third_column, THIRD_ALIGNED, BLOCK_C)
            sums = _dot(weights, values.to(A), sums * fade[:, None])

    log_total = tl.log(total)
    row = batch * Q + tile * BLOCK_Q
    result += row * C
    if LABELS:
        log = tl.log(sums)
        of_class = tl.where((total == 0)[:, None], float("-inf"), (peaks - top[:, None]) + (log - log_total[:, None]))
        _store_rows(result, q_real & (part >= S), C, first, C, of_class, False, BLOCK_C)
        _store_rows(log_sums + row * C, q_real, C, first, C, peaks + log, False, BLOCK_C)
    else:
        attention = sums / tl.where(total == 0, 1.0, total)[:, None]  # no support: 0
        _store_rows(result, q_real, C, first, C, attention, THIRD_ALIGNED, BLOCK_C)
        tl.store(log_sums + row + tl.arange(0, BLOCK_Q), top + log_total, mask=q_real & (chunk == 0))


@_kernel
def merge_kernel(parts_result, parts_log_sums, result, log_sums, rows: tl.int32, C: tl.int32, parts: tl.int32, LABELS: tl.constexpr,
                 BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Results of parts of the supports, ``[parts, rows, C]`` and log_sums ``[parts, rows(, C)]``, to that of all of them."""
    A: tl.constexpr = parts_log_sums.dtype.element_ty
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    real = row < rows
    width = C if LABELS else 1
    top = tl.full([BLOCK_Q], float("-inf"), A)
    total = tl.zeros([BLOCK_Q], A)
    for p in range(parts):
        for first in range(0, width, BLOCK_C):
            columns = first + tl.arange(0, BLOCK_C)
            x = tl.load(parts_log_sums + (p * rows.to(tl.int64) + row)[:, None] * width + columns[None, :],
                        mask=real[:, None] & (columns < width)[None, :], other=float("-inf"))
            new_top = tl.maximum(top, tl.max(x, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
            top = new_top
    log_total = tl.log(total)
    for first in range(0, C, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        here = real[:, None] & (columns < C)[None, :]
        peaks = tl.full([BLOCK_Q, BLOCK_C], float("-inf"), A)
        sums = tl.zeros([BLOCK_Q, BLOCK_C], A)
        for p in range(parts):
            at = p * rows.to(tl.int64) + row
            if LABELS:
                x = tl.load(parts_log_sums + at[:, None] * C + columns[None, :], mask=here, other=float("-inf"))
                new_peaks = tl.maximum(peaks, x)
                base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
                sums = sums * tl.exp(peaks - base) + tl.exp(x - base)
                peaks = new_peaks
            else:
                x = tl.load(parts_log_sums + at, mask=real, other=float("-inf"))
                weight = tl.exp(x - tl.where(top == float("-inf"), 0.0, top)) / tl.where(total == 0, 1.0, total)
                sums += weight[:, None] * tl.load(parts_result + at[:, None] * C + columns[None, :], mask=here, other=0.0)
        if LABELS:
            log = tl.log(sums)
            sums = tl.where((total == 0)[:, None], float("-inf"), (peaks - top[:, None]) + (log - log_total[:, None]))
            tl.store(log_sums + row.to(tl.int64)[:, None] * C + columns[None, :], peaks + log, mask=here)
        tl.store(result + row.to(tl.int64)[:, None] * C + columns[None, :], sums.to(result.dtype.element_ty), mask=here)
    if not LABELS:
        tl.store(log_sums + row, top + log_total, mask=real)


# ---- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _pick(x, label, of_query):
    """Of ``x [queries, classes]`` the column of the label, for each pair of own rows and others."""
    if of_query:
        picked = tl.gather(x, label, 1)
    else:
        picked = tl.gather(tl.trans(x), label, 0)
    return picked


@triton.jit
def _incoming_of_classes(grad, log_sums, real, grad_row, grad_column, label, of_query, C, BLOCK_C: tl.constexpr):
    """For each pair the log-sum and the gradient of its class; for each query the log-sum of all classes, and the sum of the gradients of
    those that have supports."""
    A: tl.constexpr = log_sums.dtype.element_ty
    of_class = tl.zeros(label.shape, A)
    grad_of_class = tl.zeros(label.shape, A)
    top = tl.full([real.shape[0]], float("-inf"), A)
    sums = tl.zeros([real.shape[0]], A)
    total = tl.zeros([real.shape[0]], A)
    for c in tl.range(0, C, BLOCK_C, num_stages=1, disable_licm=True):
        offsets, inside = _tile(A, real, C, c, C, 1, False, BLOCK_C)
        x = tl.load(log_sums + c + offsets, mask=inside, other=float("-inf"))
        g = _load_rows(grad, real, grad_row, c, C, grad_column, False, BLOCK_C).to(A)
        here = (label >= c) & (label < c + BLOCK_C)
        position = tl.where(here, label - c, 0)
        of_class = tl.where(here, _pick(x, position, of_query), of_class)
        grad_of_class = tl.where(here, _pick(g, position, of_query), grad_of_class)
        total += tl.sum(tl.where(x == float("-inf"), 0.0, g), 1)
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        sums = sums * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        top = new_top
    return of_class, grad_of_class, top + tl.log(sums), total


@triton.jit
def _incoming_of_values(own, own_real, own_row, own_column, other, other_real, other_row, other_column, result, of_query, C,
                        ALIGNED: tl.constexpr, BLOCK_C: tl.constexpr):
    """Products of the gradients of the queries and the values of the supports, own by others, and ``grad . result`` of each query."""
    A: tl.constexpr = _accumulation(own.dtype.element_ty)
    products = tl.zeros([own_real.shape[0], other_real.shape[0]], A)
    total = tl.zeros([own_real.shape[0]], A)
    for c in tl.range(0, C, BLOCK_C, num_stages=1):
        x = _load_rows(own, own_real, own_row, c, C, own_column, ALIGNED, BLOCK_C)
        y = _load_rows(other, other_real, other_row, c, C, other_column, ALIGNED, BLOCK_C)
        offsets, inside = _tile(result.dtype.element_ty, tl.where(of_query, own_real, other_real), C, c, C, 1, ALIGNED, BLOCK_C)
        r = tl.load(tl.multiple_of(result + c, 16 if ALIGNED else 1) + offsets, mask=inside, other=0.0)
        total += tl.sum(tl.where(of_query, x, y).to(A) * r.to(A), 1)
        products = _dot(x, tl.trans(y), products)
    return products, total


@triton.jit
def _across(x, of_query):
    """What is known of each query, for each pair of own rows and others; ``~of_query``: of each support."""
    return tl.where(of_query, x[:, None], x[None, :])


@triton.jit
def _store_gradient(base, real, first, count, gradient, ALIGNED: tl.constexpr, WIDTH: tl.constexpr):
    if base.dtype.element_ty == tl.float16:
        # The slope of a row of zeros is 1 / eps, and infinity must not come out of finite input.
        gradient = tl.where(gradient > 65504, 65504.0, tl.where(gradient < -65504, -65504.0, gradient))
    _store_rows(base, real, count, first, count, gradient, ALIGNED, WIDTH)


@_kernel
def backward_kernel(grad, query, support, third, mask, scales, result, log_sums, to_query, to_support, to_values, to_scales,
                    grad_batch: tl.int64, grad_row: tl.int32, grad_column: tl.int32, query_batch: tl.int64, query_row: tl.int32,
                    query_column: tl.int32, support_batch: tl.int64, support_row: tl.int32, support_column: tl.int32,
                    third_batch: tl.int64, third_row: tl.int32, third_column: tl.int32, mask_batch: tl.int64, mask_row: tl.int32,
                    scales_batch: tl.int64, B: tl.int32, Q: tl.int32, S: tl.int32, D: tl.int32, C: tl.int32, query_tiles: tl.int32,
                    query_spans: tl.int32, query_parts: tl.int32, query_span: tl.int32, support_tiles: tl.int32, support_spans: tl.int32,
                    support_parts: tl.int32, support_span: tl.int32, values_spans: tl.int32, values_span: tl.int32, scale: tl.float64,
                    normalize: tl.int32, eps_mode: tl.int32, eps: tl.float64, has_mask: tl.int32, has_scales: tl.int32,
                    needs_query: tl.int32, needs_scales: tl.int32,
                    LABELS: tl.constexpr, ALIGNED: tl.constexpr, THIRD_ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
                    BLOCK_C: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of own rows, a span of the columns of their gradient, and a part of the others.

    A program has one of three roles: the gradients of queries (0), of supports (1) or of values (2). It adds up products of a matrix, own
    rows by others, and the rows of the others. Where these are one tile the matrix is computed once, and a span is all columns. Else it
    is WIDTH columns, whose sums stay in registers, and the programs of the other spans compute the matrix again.
    """
    A: tl.constexpr = _accumulation(query.dtype.element_ty)
    query_jobs = query_tiles * query_spans * query_parts
    support_jobs = support_tiles * support_spans * support_parts
    jobs = query_jobs + support_jobs + support_tiles * values_spans * support_parts
    pid = tl.program_id(0)
    b, job = (pid // jobs).to(tl.int64), pid % jobs
    role = (job >= query_jobs).to(tl.int32) + (job >= query_jobs + support_jobs).to(tl.int32)
    of_query = role == 0
    job -= tl.where(of_query, 0, tl.where(role == 1, query_jobs, query_jobs + support_jobs))
    tiles = tl.where(of_query, query_tiles, support_tiles)
    spans = tl.where(of_query, query_spans, tl.where(role == 1, support_spans, values_spans))
    span = tl.where(of_query, query_span, tl.where(role == 1, support_span, values_span))
    tile, first_column, part = job % tiles, job // tiles % spans * span, job // tiles // spans
    factor = tl.cast(scale, A) * tl.load(scales + b * scales_batch, mask=has_scales != 0, other=1.0).to(A)
    epsilon = tl.cast(eps, A)

    query += b * query_batch
    support += b * support_batch
    grad += b * grad_batch
    third += b * third_batch
    mask += b * mask_batch
    own_first = tile * BLOCK
    own, own_row, own_column = support, support_row, support_column
    other, other_row, other_column = query, query_row, query_column
    if of_query:
        own, own_row, own_column = query, query_row, query_column
        other, other_row, other_column = support, support_row, support_column
    own += own_first * own_row.to(tl.int64)
    # What the matrix is multiplied with, and the gradient of the own rows.
    rows, rows_row, rows_column, width = other, other_row, other_column, D
    to = to_support + ((part * B + b) * S + own_first) * D
    if of_query:
        to = to_query + ((part * B + b) * Q + own_first) * D
    elif role == 2:
        rows, rows_row, rows_column, width = grad, grad_row, grad_column, C
        to = to_values + ((part * B + b) * S + own_first) * C

    own_count = tl.where(of_query, Q, S)
    own_real = _is_real(mask, mask_row, has_mask * (role > 0), own_first, own_count, BLOCK)
    others = tl.where(of_query, S, Q)
    share = tl.cdiv(tl.cdiv(others, BLOCK), tl.where(of_query, query_parts, support_parts)) * BLOCK
    others_end = tl.minimum(others, part * share + share)

    matrix = tl.zeros([BLOCK, BLOCK], A)
    other_factor = tl.full([BLOCK], 1.0, A)
    own_scale = tl.zeros([BLOCK], A)  # takes own rows to x^
    own_inverse = tl.zeros([BLOCK], A)
    back = tl.zeros([BLOCK], A)
    scale_sum = tl.zeros([BLOCK], A)
    for column in tl.range(first_column, tl.minimum(first_column + span, tl.maximum(width, 1)), WIDTH, disable_licm=True):
        sums = tl.zeros([BLOCK, WIDTH], A)
        for start in tl.range(part * share, others_end, BLOCK, disable_licm=True):
            other_real = _is_real(mask, mask_row, has_mask * (role == 0), start, others_end, BLOCK)
            if column == first_column:
                pair = own_real[:, None] & other_real[None, :]
                q_real = tl.where(of_query, own_real, other_real)
                q_first = tl.where(of_query, own_first, start).to(tl.int64)
                s_first = tl.where(of_query, start, own_first).to(tl.int64)
                q_grad = grad + q_first * grad_row
                q_log_sums = log_sums + (b * Q + q_first) * (C if LABELS else 1)
                s_third = third + s_first * third_row
                cosine, u, own_factor, own_multiplier, own_inverse, own_active, other_factor, other_multiplier = _cosines(
                    own, own_real, own_row, own_column, normalize > of_query.to(tl.int32), other + start * other_row.to(tl.int64),
                    other_real, other_row, other_column, normalize > 1 - of_query.to(tl.int32), D, eps_mode, epsilon, ALIGNED, BLOCK_D)
                own_scale = own_multiplier * own_factor
                scores = factor * cosine
                if LABELS:
                    label = _across(_load_labels(s_third, third_row, tl.where(of_query, other_real, own_real), C), ~of_query)
                    scores = tl.where(label < 0, float("nan"), scores)
                    of_class, g, log_total, total = _incoming_of_classes(q_grad, q_log_sums, q_real, grad_row, grad_column,
                                                                         tl.maximum(label, 0), of_query, C, BLOCK_C)
                    ds = tl.exp(scores - of_class) * g - tl.exp(scores - _across(log_total, of_query)) * _across(total, of_query)
                    matrix = ds
                else:
                    log_sum = tl.load(q_log_sums + tl.arange(0, BLOCK), mask=q_real, other=0.0)
                    matrix = tl.where(pair, tl.exp(scores - _across(log_sum, of_query)), 0.0)
                    x, x_row, x_column, y, y_row, y_column = s_third, third_row, third_column, q_grad, grad_row, grad_column
                    if of_query:
                        x, x_row, x_column, y, y_row, y_column = q_grad, grad_row, grad_column, s_third, third_row, third_column
                    products, total = _incoming_of_values(x, own_real, x_row, x_column, y, other_real, y_row, y_column,
                                                          result + (b * Q + q_first) * C, of_query, tl.where(role == 2, 0, C),
                                                          THIRD_ALIGNED, BLOCK_C)
                    ds = matrix * (products - _across(total, of_query))
                if role < 2:
                    ds = tl.where(pair, ds, 0.0)
                    scale_sum += tl.sum(ds * cosine, 1)
                    ds *= factor
                    # v / u one factor after the other: a row of zeros has a cosine of 0, and a u whose square may be infinite.
                    along = ds * cosine * tl.where(eps_mode > 0, u, 1.0) * tl.where(eps_mode == 2, u, 1.0)
                    back += tl.sum(along, 1) * own_active
                    matrix = ds * u * other_multiplier[None, :]
                else:
                    other_factor = tl.full([BLOCK], 1.0, A)
            # In the accumulation type on both sides: the matrix has float32's range, which float16 lacks. A few of the others at a time,
            # for the compiler keeps all that a product reads in registers.
            slices = tl.reshape(matrix, [BLOCK, BLOCK // SLICE, SLICE])
            factors = tl.reshape(other_factor, [BLOCK // SLICE, SLICE])
            for i in tl.range(0, BLOCK // SLICE, num_stages=1, disable_licm=True):
                here = tl.arange(0, BLOCK // SLICE) == i
                first = start + i * SLICE
                slice_real = _is_real(mask, mask_row, has_mask * (role == 0), first, others_end, SLICE)
                right = _load_rows(rows + first * rows_row.to(tl.int64), slice_real, rows_row, column, width, rows_column,
                                   ALIGNED and THIRD_ALIGNED, WIDTH).to(A)
                right *= tl.sum(tl.where(here[:, None], factors, 0.0), 0)[:, None]
                left = tl.sum(tl.where(here[None, :, None], slices, 0.0), 1)
                sums = _dot(left, right, sums)
        if role < 2:
            unit = _load_rows(own, own_real, own_row, column, D, own_column, ALIGNED, WIDTH).to(A) * own_scale[:, None]
            sums = own_inverse[:, None] * (sums - back[:, None] * unit)
        wanted = (tl.arange(0, BLOCK) < own_count - own_first) & ((role > 0) | (needs_query != 0))
        _store_gradient(to, wanted, column, width, sums, ALIGNED and THIRD_ALIGNED, WIDTH)
    if of_query & (first_column == 0) & (needs_scales != 0):
        tl.store(to_scales + (b * query_parts + part) * query_tiles + tile, tl.cast(scale, A) * tl.sum(scale_sum))


@triton.jit
def _add_parts(parts, to, block, count, number, part_stride, element_stride, BLOCK: tl.constexpr):
    """``to[i] = sum_p parts[p, i]`` for a block of the ``count`` elements, p from 0 on."""
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], parts.dtype.element_ty)
    for p in range(number):
        total += tl.load(parts + p * part_stride + i * element_stride, mask=i < count, other=0.0)
    if to.dtype.element_ty == tl.float16:
        total = tl.where(total > 65504, 65504.0, tl.where(total < -65504, -65504.0, total))
    tl.store(to + i, total.to(to.dtype.element_ty), mask=i < count)


@_kernel
def add_kernel(query_parts, support_parts, values_parts, scales_parts, to_query, to_support, to_values, to_scales, query_count: tl.int64,
               support_count: tl.int64, values_count: tl.int64, scales_count: tl.int64, of_query: tl.int32, of_support: tl.int32,
               of_scales: tl.int32, BLOCK: tl.constexpr):
    """The sum of the parts of each gradient; a count is 0 where there is nothing to add."""
    block = tl.program_id(0).to(tl.int64)
    query_blocks, support_blocks, values_blocks = tl.cdiv(query_count, BLOCK), tl.cdiv(support_count, BLOCK), tl.cdiv(values_count, BLOCK)
    if block < query_blocks:
        _add_parts(query_parts, to_query, block, query_count, of_query, query_count, 1, BLOCK)
    elif block < query_blocks + support_blocks:
        _add_parts(support_parts, to_support, block - query_blocks, support_count, of_support, support_count, 1, BLOCK)
    elif block < query_blocks + support_blocks + values_blocks:
        _add_parts(values_parts, to_values, block - query_blocks - support_blocks, values_count, of_support, values_count, 1, BLOCK)
    else:
        block -= query_blocks + support_blocks + values_blocks
        _add_parts(scales_parts, to_scales, block, scales_count, of_scales, 1, of_scales, BLOCK)


# ---- how a problem is cut ------------------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """How a kernel cuts its problem."""

    block_q: int  # queries in a tile
    block_s: int  # supports; in the backward as many as queries
    block_d: int  # features at a time
    block_c: int  # columns of the values, or classes, at a time
    width: int  # columns of a gradient that stay in registers
    num_warps: int
    num_stages: int


def configurations(backward: bool, queries: int, supports: int, features: int, columns: int, dtype: torch.dtype) -> list[Configuration]:
    """What is worth trying for a problem of this size, the best guess first.

    Few choices, as each is compiled. In float32 a product keeps what it reads in registers: larger tiles, or longer pieces of features,
    would spill.
    """
    if dtype == torch.float64:
        return [Configuration(16, 16, 16, 16, 16, 4, 1)]
    block_c = 16 if columns <= 16 else 32 if columns <= 32 or backward else 64
    width = 64 if features <= 64 else 128
    pieces = ((16, 2), (32, 2), (32, 3), (16, 3)) if dtype == torch.float32 else ((32, 2), (32, 3), (64, 2), (64, 3))
    return [Configuration(32, 32, block_d, block_c, width, 8, stages) for block_d, stages in pieces]


_ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100; not of the device at hand, so that every device adds in the same order
_ENOUGH_ROWS = 512


def _parts(programs: int, rows: int, block: int) -> tuple[int, int]:
    """``(parts, rows of a part)`` of what a program streams, multiples of ``block`` rows; more than one if programs are few, rows many."""
    parts = max(1, min(triton.cdiv(_ENOUGH_PROGRAMS, max(programs, 1)), rows // _ENOUGH_ROWS))
    part = max(triton.cdiv(triton.cdiv(rows, block), parts), 1) * block
    return max(triton.cdiv(rows, part), 1), part


_tuned = {}


def _choose(backward: bool, problem: "_Problem", run) -> Configuration:
    """The best guess; with ``FASTMETA_AUTOTUNE=1`` the fastest of all, measured once for problems of about this size."""
    sizes = problem.queries, problem.supports, problem.features, problem.columns
    tried = configurations(backward, *sizes, problem.dtype)
    if os.environ.get("FASTMETA_AUTOTUNE") != "1":
        return tried[0]
    about = tuple(triton.next_power_of_2(n) for n in (problem.batch, *sizes))
    key = backward, problem.labels, problem.dtype, problem.device, about
    if key not in _tuned:
        _tuned[key] = min(tried, key=lambda c: triton.testing.do_bench(functools.partial(run, c)))
    return _tuned[key]


# ---- the operations ------------------------------------------------------------------------------------------------------------------


def _aligned(*tensors: Tensor) -> bool:
    """Whether the rows of all can be moved 16 bytes at a time."""
    def aligned(t):
        unit = 16 // t.element_size()
        return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and not any(n % unit for n in (t.shape[-1], *t.stride()[:-1]))
    return all(map(aligned, tensors))


def _strides(name: str, t: Tensor | None, dimensions=("batch", "row", "column")) -> dict[str, int]:
    strides = t.stride() if t is not None else ()
    return dict(zip((f"{name}_{d}" for d in dimensions), (*strides, 0, 0, 0)))


def _within_reach(t: Tensor) -> Tensor:
    """The tensor, or a copy where the offsets in a tile need more than 32 bits."""
    return t.contiguous() if any(stride >= 2**23 for stride in t.stride()[1:]) else t


class _Problem:
    """What forward and backward have in common: sizes, and arguments of the kernels."""

    def __init__(self, query, support, third, mask, scales, scale, normalize, eps_mode, eps, columns, labels):
        self.device, self.dtype, self.labels = query.device, query.dtype, labels
        self.accumulation = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.batch, self.queries, self.features = query.shape
        self.supports, self.columns = support.shape[1], columns
        query, support, third = map(_within_reach, (query, support, third))
        # In place of an absent tensor an empty one of its type, for which nothing is compiled anew.
        self.tensors = dict(query=query, support=support, third=third,
                            mask=self.empty(0, dtype=torch.uint8) if mask is None else _within_reach(mask).view(torch.uint8),
                            scales=self.empty(0) if scales is None else scales)
        self.numbers = {**_strides("query", query), **_strides("support", support), **_strides("third", third),
                        **_strides("mask", mask, ("batch", "row")), **_strides("scales", scales, ("batch",)),
                        "B": self.batch, "Q": self.queries, "S": self.supports, "D": self.features, "C": columns}
        self.options = dict(scale=scale, normalize=normalize, eps_mode=eps_mode, eps=max(eps, torch.finfo(self.accumulation).tiny),
                            has_mask=int(mask is not None), has_scales=int(scales is not None))
        self.constants = dict(LABELS=labels, ALIGNED=_aligned(query, support), THIRD_ALIGNED=labels or _aligned(third))

    def empty(self, *shape, dtype=None) -> Tensor:
        return device.empty(shape, dtype or self.accumulation, self.device)


def _forward(p: _Problem) -> tuple[Tensor, Tensor]:
    shape = (p.batch, p.queries, p.columns)
    log_shape = shape if p.labels else shape[:2]
    result, log_sums = p.empty(*shape, dtype=p.dtype), p.empty(*log_shape)

    def run(c: Configuration):
        tiles, chunks = triton.cdiv(p.queries, c.block_q), max(triton.cdiv(p.columns, c.block_c), 1)
        parts, part = _parts(p.batch * tiles * chunks, p.supports, c.block_s)
        to, log_to = result, log_sums
        if parts > 1:
            # Many supports for few queries, the one case of two launches. Of labels, the log-sums of the parts are enough.
            to, log_to = p.empty(0) if p.labels else p.empty(parts, *shape), p.empty(parts, *log_shape)
        device.launch(forward_kernel, p.batch * tiles * chunks * parts,
                      {**p.tensors, "result": to, "log_sums": log_to, **p.numbers, "tiles": tiles, "chunks": chunks, "part": part,
                       **p.options},
                      {**p.constants, "BLOCK_Q": c.block_q, "BLOCK_S": c.block_s, "BLOCK_D": c.block_d, "BLOCK_C": c.block_c},
                      c.num_warps, c.num_stages)
        if parts > 1:
            rows = p.batch * p.queries
            device.launch(merge_kernel, triton.cdiv(rows, 4),
                          dict(parts_result=to, parts_log_sums=log_to, result=result, log_sums=log_sums, rows=rows, C=p.columns,
                               parts=parts),
                          dict(LABELS=p.labels, BLOCK_Q=4, BLOCK_C=32), 4, 1)

    run(_choose(False, p, run))
    return result, log_sums


def _backward(p: _Problem, grad, needs, result, log_sums) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    needs_query, needs_support, needs_values, needs_scales = (bool(needs >> k & 1) for k in range(4))
    needs_values = needs_values and not p.labels
    grad = _within_reach(grad)

    def run(c: Configuration):
        block, width = c.block_q, c.width
        query_tiles, support_tiles = triton.cdiv(p.queries, block), triton.cdiv(p.supports, block)

        def spans(needed: bool, columns: int, others: int) -> tuple[int, int]:
            """``(spans, columns of a span)``; one even without columns, for the gradient of the scale."""
            pieces = max(triton.cdiv(columns, width), 1)
            return (int(needed), pieces * width) if others <= block else (needed * pieces, width)

        query_spans, query_span = spans(needs_query or needs_scales, p.features * needs_query, p.supports)
        support_spans, support_span = spans(needs_support, p.features, p.queries)
        values_spans, values_span = spans(needs_values, p.columns, p.queries)
        query_jobs, support_jobs = query_tiles * query_spans, support_tiles * (support_spans + values_spans)
        query_parts, _ = _parts(p.batch * query_jobs, p.supports, block)
        support_parts, _ = _parts(p.batch * support_jobs, p.queries, block)

        def target(needed: bool, parts: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
            """The gradient and what the programs write: itself, or copies in the accumulation type, one for each part."""
            to = p.empty(*((p.batch, rows, columns) if needed else (0,)), dtype=p.dtype)
            if max(query_parts, support_parts) == 1 or parts == 1 and p.dtype == p.accumulation:
                return to, to
            return to, p.empty(*((parts, *to.shape) if needed else (0,)))

        targets = [target(needs_query, query_parts, p.queries, p.features), target(needs_support, support_parts, p.supports, p.features),
                   target(needs_values, support_parts, p.supports, p.columns)]
        scale_parts = query_parts * query_tiles
        scales = p.empty(p.batch if needs_scales else 0)
        targets.append((scales, p.empty(p.batch, scale_parts) if needs_scales else scales))

        names = ("query", "support", "values", "scales")
        device.launch(
            backward_kernel, p.batch * (query_jobs * query_parts + support_jobs * support_parts),
            {"grad": grad, **p.tensors, "result": result, "log_sums": log_sums,
             **{f"to_{name}": copies for name, (_, copies) in zip(names, targets)}, **_strides("grad", grad), **p.numbers,
             "query_tiles": query_tiles, "query_spans": query_spans, "query_parts": query_parts,
             "query_span": query_span, "support_tiles": support_tiles, "support_spans": support_spans, "support_parts": support_parts,
             "support_span": support_span, "values_spans": values_spans, "values_span": values_span, **p.options,
             "needs_query": int(needs_query), "needs_scales": int(needs_scales)},
            {**p.constants, "THIRD_ALIGNED": p.labels or p.constants["THIRD_ALIGNED"] and _aligned(grad, result), "BLOCK": block,
             "BLOCK_D": c.block_d, "BLOCK_C": c.block_c, "WIDTH": width}, c.num_warps, c.num_stages)
        counts = [0 if copies is to else to.numel() for to, copies in targets]
        if any(counts):
            device.launch(add_kernel, sum(triton.cdiv(n, 256) for n in counts),
                          {**{f"{name}_parts": copies for name, (_, copies) in zip(names, targets)},
                           **{f"to_{name}": to for name, (to, _) in zip(names, targets)},
                           **{f"{name}_count": count for name, count in zip(names, counts)},
                           "of_query": query_parts, "of_support": support_parts, "of_scales": scale_parts}, dict(BLOCK=256), 4, 1)
        return tuple(to for to, _ in targets)

    return run(_choose(True, p, run))


def cosine_attention(query, support, values, support_mask, scales, scale, normalize, eps_mode, eps):
    """``(result [B, Q, C], log_sums [B, Q])``"""
    return _forward(_Problem(query, support, values, support_mask, scales, scale, normalize, eps_mode, eps, values.shape[2], False))


def cosine_attention_backward(grad, needs, query, support, values, support_mask, scales, scale, normalize, eps_mode, eps, result, log_sums):
    """The gradients of query, support, values and scales, without elements where ``needs`` does not ask for them."""
    problem = _Problem(query, support, values, support_mask, scales, scale, normalize, eps_mode, eps, values.shape[2], False)
    return _backward(problem, grad, needs, result.contiguous(), log_sums.contiguous())


def matching_log_probs(query, support, labels, support_mask, scales, scale, normalize, eps_mode, eps, num_classes):
    """``(result [B, Q, C], log_sums [B, Q, C])``"""
    return _forward(_Problem(query, support, labels, support_mask, scales, scale, normalize, eps_mode, eps, num_classes, True))


def matching_log_probs_backward(grad, needs, query, support, labels, support_mask, scales, scale, normalize, eps_mode, eps, num_classes,
                                result, log_sums):
    """The gradients of query, support, labels (none) and scales, without elements where ``needs`` does not ask for them."""
    problem = _Problem(query, support, labels, support_mask, scales, scale, normalize, eps_mode, eps, num_classes, True)
    return _backward(problem, grad, needs, result, log_sums.contiguous())
