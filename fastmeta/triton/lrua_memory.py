"""memory_read, lrua_write and lrua_step, forward and backward. The mathematics is in ``reference/lrua_memory.py``, the contract of the
operations in ``schemas/lrua_memory.py``.

A program has an episode, and goes through its memory a tile of slots and columns at a time. A memory of the paper's size is one tile: it is
loaded once, stays in registers, and the loops over tiles are no loops; but in the backward of a read before the write, where it would
spill registers, it is two, which come from the caches. Heads are a loop, so their number has no bound and is nothing that
a kernel is compiled for. What all threads of a program need of each other beyond a sum goes through device memory and a barrier: the
chosen slots, the weights, the products of slots and keys, and in the backward the slopes of the scores. There are no atomics: the same bits on every run.

Slots and keys are multiplied by powers of two that bring their largest element near 1, m' = t m and k' = s k, so that squares stay in
range and nothing is rounded. With d = k'.m' and g as ``eps_mode`` has it for the scaled vectors, c = d / g, and with q the gradient of the
loss by c,
    dm = t (sum_j q / g k'  -  m' sum_j q c h)
and the same for k; h is what the derivative of g along m' leaves.

``_tile`` and the loops in these functions take ``ON_CHIP``: whether the memory is one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as device
from .cosine_attention import _divide, _kernel, _sqrt

# Gradients of the backward kernel, bits of its ``needs``: positions in the gradients of lrua_step.
MEMORY, READ_WEIGHTS, KEYS, ADD, GATE, STRENGTHS = map(tl.constexpr, range(6))


# ---- pieces of an episode ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _integer(dtype):
    return tl.int64 if dtype == tl.float64 else tl.int32


@triton.jit
def _tiles(count, ON_CHIP: tl.constexpr, BLOCK: tl.constexpr):
    return 1 if ON_CHIP else tl.cdiv(count, BLOCK)


@triton.jit
def _load_tile(base, i, k, N, M, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    n, m = i * BLOCK_N + tl.arange(0, BLOCK_N), k * BLOCK_M + tl.arange(0, BLOCK_M)
    return tl.load(base + n[:, None] * M + m[None, :], mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def _store_tile(base, i, k, N, M, values, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    n, m = i * BLOCK_N + tl.arange(0, BLOCK_N), k * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(base + n[:, None] * M + m[None, :], values, mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _tile(tile, base, i, k, N, M, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Slots ``i * BLOCK_N`` on, columns ``k * BLOCK_M`` on of the memory at ``base``, zeros past its end; ``tile`` if that is all of it."""
    return tile if ON_CHIP else _load_tile(base, i, k, N, M, BLOCK_N, BLOCK_M)


@triton.jit
def _load(base, j, i, count, BLOCK: tl.constexpr):
    """``BLOCK`` numbers from ``i * BLOCK`` on of row j of rows of ``count``, zeros past its end."""
    at = i * BLOCK + tl.arange(0, BLOCK)
    return tl.load(base + j * count + at, mask=at < count, other=0.0)


@triton.jit
def _store(base, j, i, count, values, wanted, BLOCK: tl.constexpr):
    at = i * BLOCK + tl.arange(0, BLOCK)
    tl.store(base + j * count + at, values, mask=(at < count) & wanted)


# ---- write -------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _order(usage):
    """Integers in the order of the numbers. NaN is the largest, and -0 is 0."""
    LARGEST: tl.constexpr = 2**63 - 1 if usage.dtype == tl.float64 else 2**31 - 1
    bits = tl.where(usage == 0, 0.0, usage).to(_integer(usage.dtype), bitcast=True)
    return tl.where(usage != usage, LARGEST, tl.where(bits < 0, bits ^ LARGEST, bits))


@triton.jit
def _choose_least_used(usage, slots, N, R, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr):
    """To ``slots`` the R of least usage, the least first, ties by the lowest index: each the first of all that come after the one before."""
    LARGEST: tl.constexpr = 2**63 - 1 if usage.dtype.element_ty == tl.float64 else 2**31 - 1
    INTEGER: tl.constexpr = _integer(usage.dtype.element_ty)
    last, last_slot = tl.full([], -LARGEST - 1, INTEGER), tl.full([], -1, tl.int32)
    for j in range(R):
        least = tl.full([BLOCK_N], LARGEST, INTEGER)
        slot = tl.zeros([BLOCK_N], tl.int32) + N  # none yet
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            order = _order(_load(usage, 0, i, N, BLOCK_N))
            left = (n < N) & ((order > last) | ((order == last) & (n > last_slot)))
            better = left & ((order < least) | (slot == N))
            least, slot = tl.where(better, order, least), tl.where(better, n, slot)
        last = tl.min(least, 0)
        last_slot = tl.min(tl.where(least == last, slot, N), 0)
        tl.store(slots + j, last_slot)
    tl.debug_barrier()


@triton.jit
def _is_least_used(slots, j, i, R, shared, BLOCK_N: tl.constexpr):
    """wlu of head j: its own slot, or with ``shared`` those of all."""
    n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    marked = n < 0
    for u in range(tl.where(shared != 0, 0, j), tl.where(shared != 0, R, j + 1)):
        marked |= n == tl.load(slots + u)
    return marked


@triton.jit
def _write_weights(before, gate, slots, j, i, N, R, shared, BLOCK_N: tl.constexpr):
    s = tl.load(gate + j)
    return s * _load(before, j, i, N, BLOCK_N) + tl.where(_is_least_used(slots, j, i, R, shared, BLOCK_N), 1 - s, 0.0)


# ---- content addressing ------------------------------------------------------------------------------------------------------------


@triton.jit
def _scale_of(largest):
    """The power of two that brings ``largest`` to [1, 2), as far as it is a normal number; 1 of 0."""
    DIGITS: tl.constexpr = 52 if largest.dtype == tl.float64 else 23
    TOP: tl.constexpr = 2046 if largest.dtype == tl.float64 else 254
    exponent = largest.to(_integer(largest.dtype), bitcast=True) >> DIGITS
    exponent = tl.minimum(tl.maximum(exponent, 1), TOP - 1)
    return tl.where(largest > 0, ((TOP - exponent) << DIGITS).to(largest.dtype, bitcast=True), 1.0)


@triton.jit
def _scale_of_key(keys, j, M, ON_CHIP: tl.constexpr, BLOCK_M: tl.constexpr):
    """``s`` and the square of ``s k^j``."""
    largest, squares = tl.zeros([BLOCK_M], keys.dtype.element_ty), tl.zeros([BLOCK_M], keys.dtype.element_ty)
    for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
        largest = tl.maximum(largest, tl.abs(_load(keys, j, k, M, BLOCK_M)))
    scale = _scale_of(tl.max(largest, 0))
    for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
        key = scale * _load(keys, j, k, M, BLOCK_M)
        squares += key * key
    return scale, tl.sum(squares, 0)


@triton.jit
def _scale_of_slots(tile, memory, i, N, M, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """``t`` and the squares of ``t m`` of a tile of slots."""
    largest, squares = tl.zeros([BLOCK_N], memory.dtype.element_ty), tl.zeros([BLOCK_N], memory.dtype.element_ty)
    for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
        x = _tile(tile, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    scale = _scale_of(largest)
    for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
        x = scale[:, None] * _tile(tile, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
        squares += tl.sum(x * x, 1)
    return scale, squares


@triton.jit
def _dots(tile, memory, vectors, j, i, N, M, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, slot_scale, scale):
    """Products of slots and row j of ``vectors``, both scaled."""
    dots = tl.zeros([BLOCK_N], memory.dtype.element_ty)
    for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
        x = slot_scale[:, None] * _tile(tile, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
        dots += tl.sum(x * (scale * _load(vectors, j, k, M, BLOCK_M))[None, :], 1)
    return dots


@triton.jit
def _weighted_sum(tile, memory, weights, j, k, N, M, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """``sum_n weights[j, n] memory[n]`` for a tile of columns."""
    sums = tl.zeros([BLOCK_M], memory.dtype.element_ty)
    for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
        sums += tl.sum(_load(weights, j, i, N, BLOCK_N)[:, None] * _tile(tile, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M), 0)
    return sums


@triton.jit
def _multiply_keys(tile, memory, keys, products, slot_stats, N, M, R, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """To ``products`` ``[R, N]`` those of scaled keys and slots, to ``slot_stats`` ``t`` and the squares of each slot.

    By way of memory: beside a tile, in which a thread has a part of many slots, it would have the numbers of all of them too. From there on,
    a thread has its own slots.
    """
    for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
        scale, squares = _scale_of_slots(tile, memory, i, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
        _store(slot_stats, 0, i, N, scale, True, BLOCK_N)
        _store(slot_stats, 1, i, N, squares, True, BLOCK_N)
        for j in range(R):
            key_scale, _ = _scale_of_key(keys, j, M, ON_CHIP, BLOCK_M)
            _store(products, j, i, N, _dots(tile, memory, keys, j, i, N, M, ON_CHIP, BLOCK_N, BLOCK_M, scale, key_scale), True, BLOCK_N)
    tl.debug_barrier()


@triton.jit
def _cosines(dots, squares, scale, key_square, key_scale, eps_mode, eps):
    """``c`` and ``1 / g`` of scaled slots and a scaled key."""
    TINY: tl.constexpr = 2.3e-308 if dots.dtype == tl.float64 else 1.2e-38
    a, b = _sqrt(key_square), _sqrt(squares)
    if eps_mode == 0:
        g = tl.maximum(a, eps * key_scale) * tl.maximum(b, eps * scale)
    elif eps_mode == 1:
        g = a * b + eps * key_scale * scale
    else:
        # sqrt(x^2 + y^2) without the squares, of which those of large scales overflow.
        x, y = a * b, _sqrt(eps) * key_scale * scale
        larger = tl.maximum(x, y)
        ratio = _divide(tl.minimum(x, y), larger)
        g = larger * _sqrt(1 + ratio * ratio)
    inverse = _divide(tl.full(g.shape, 1.0, g.dtype), tl.maximum(g, TINY))
    return dots * inverse, inverse


@triton.jit
def _strength(strengths, strength, has_strengths, j):
    return tl.cast(strength, strengths.dtype.element_ty) * tl.load(strengths + j, mask=has_strengths != 0, other=1.0)


@triton.jit
def _address(tile, memory, keys, strengths, weights, slot_stats, N, M, R, strength, has_strengths, eps_mode, eps, ON_CHIP: tl.constexpr,
             BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """To ``weights`` the softmax of the scores; the products, and the scores of several tiles, stand there in between."""
    A: tl.constexpr = memory.dtype.element_ty
    _multiply_keys(tile, memory, keys, weights, slot_stats, N, M, R, ON_CHIP, BLOCK_N, BLOCK_M)
    for j in range(R):
        key_scale, key_square = _scale_of_key(keys, j, M, ON_CHIP, BLOCK_M)
        scores = tl.zeros([BLOCK_N], A)
        top = tl.full([BLOCK_N], float("-inf"), A)
        total = tl.zeros([BLOCK_N], A)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            real = i * BLOCK_N + tl.arange(0, BLOCK_N) < N
            scale, squares = _load(slot_stats, 0, i, N, BLOCK_N), _load(slot_stats, 1, i, N, BLOCK_N)
            cosines, _ = _cosines(_load(weights, j, i, N, BLOCK_N), squares, scale, key_square, key_scale, eps_mode, eps)
            scores = _strength(strengths, strength, has_strengths, j) * cosines
            top = tl.maximum(top, tl.where(real, scores, float("-inf")))
            if not ON_CHIP:
                tl.debug_barrier()
                _store(weights, j, i, N, scores, True, BLOCK_N)
        if not ON_CHIP:
            tl.debug_barrier()
        largest = tl.max(top, 0)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            real = i * BLOCK_N + tl.arange(0, BLOCK_N) < N
            scores = scores if ON_CHIP else _load(weights, j, i, N, BLOCK_N)
            total += tl.where(real, tl.exp(scores - largest), 0.0)
        inverse = _divide(tl.full([], 1.0, A), tl.sum(total, 0))
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            scores = scores if ON_CHIP else _load(weights, j, i, N, BLOCK_N)
            tl.debug_barrier()  # threads beyond the slots of a tile have the same numbers as others
            _store(weights, j, i, N, inverse * tl.exp(scores - largest), True, BLOCK_N)
    tl.debug_barrier()


# ---- forward -----------------------------------------------------------------------------------------------------------------------


@_kernel
def forward_kernel(memory, usage, before, keys, add, gate, strengths, read, written, new_usage, weights, slots, slot_stats, N: tl.int32,
                   M: tl.int32, R: tl.int32, strength: tl.float64, has_strengths: tl.int32, shared: tl.int32, eps_mode: tl.int32, eps: tl.float64,
                   usage_decay: tl.float64, READS: tl.constexpr, WRITES: tl.constexpr, BEFORE: tl.constexpr, ON_CHIP: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """An episode of memory_read (READS), lrua_write (WRITES) or lrua_step (both; BEFORE: the weights are of the memory before the write).

    ``weights``: wr if it reads, else ww. ``slots`` ``[B, R]``, scratch: the least used ones.
    """
    A: tl.constexpr = memory.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    memory, written = memory + b * N * M, written + b * N * M
    usage, new_usage = usage + b * N, new_usage + b * N
    before, weights = before + b * R * N, weights + b * R * N
    keys, add, read = keys + b * R * M, add + b * R * M, read + b * R * M
    gate, strengths, slots = gate + b * R, strengths + b * R, slots + b * R
    slot_stats += b * 3 * N
    epsilon = tl.cast(eps, A)

    x = _load_tile(memory, 0, 0, N, M, BLOCK_N, BLOCK_M)
    if READS and (BEFORE or not WRITES):
        _address(x, memory, keys, strengths, weights, slot_stats, N, M, R, strength, has_strengths, eps_mode, epsilon, ON_CHIP, BLOCK_N, BLOCK_M)
    if WRITES:
        _choose_least_used(usage, slots, N, R, ON_CHIP, BLOCK_N)
        erased = tl.load(slots)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
                x = _tile(x, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
                x = tl.where((n == erased)[:, None], 0.0, x)
                for j in range(R):
                    x += _write_weights(before, gate, slots, j, i, N, R, shared, BLOCK_N)[:, None] * _load(add, j, k, M, BLOCK_M)[None, :]
                _store_tile(written, i, k, N, M, x, BLOCK_N, BLOCK_M)
        tl.debug_barrier()
    memory = written if WRITES else memory
    if READS and WRITES and not BEFORE:
        _address(x, memory, keys, strengths, weights, slot_stats, N, M, R, strength, has_strengths, eps_mode, epsilon, ON_CHIP, BLOCK_N, BLOCK_M)
    if READS:
        for j in range(R):
            for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
                sums = _weighted_sum(x, memory, weights, j, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
                _store(read, j, k, M, sums, True, BLOCK_M)
    if WRITES:
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            if READS:
                used = tl.cast(usage_decay, A) * _load(usage, 0, i, N, BLOCK_N)
            for j in range(R):
                write_weights = _write_weights(before, gate, slots, j, i, N, R, shared, BLOCK_N)
                if READS:
                    used += _load(weights, j, i, N, BLOCK_N) + write_weights
                else:
                    _store(weights, j, i, N, write_weights, True, BLOCK_N)
            if READS:
                _store(new_usage, 0, i, N, used, True, BLOCK_N)


# ---- backward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _address_backward(of_memory, to_memory, tile, memory, keys, strengths, weights, slopes, flow, by_keys, slot_stats, to_keys,
                      to_strengths, N, M, R, strength, has_strengths, eps_mode, eps, needs, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_M: tl.constexpr):
    """``of_memory``, or what of it is in ``to_memory``, with the gradient of the cosines of ``memory``; those of keys and strengths.

    ``slopes`` ``[R, N]``: the gradient by wr. Scratch: ``flow`` ``[R, N]`` for ``q t / g``, ``by_keys`` ``[R]``, ``slot_stats`` ``[3, N]``.
    """
    A: tl.constexpr = memory.dtype.element_ty
    _multiply_keys(tile, memory, keys, flow, slot_stats, N, M, R, ON_CHIP, BLOCK_N, BLOCK_M)
    for j in range(R):
        key_scale, key_square = _scale_of_key(keys, j, M, ON_CHIP, BLOCK_M)
        a = _sqrt(key_square)
        means = tl.zeros([BLOCK_N], A)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            means += _load(weights, j, i, N, BLOCK_N) * _load(slopes, j, i, N, BLOCK_N)
        mean = tl.sum(means, 0)
        by_key, by_strength = tl.zeros([BLOCK_N], A), tl.zeros([BLOCK_N], A)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            scale, squares = _load(slot_stats, 0, i, N, BLOCK_N), _load(slot_stats, 1, i, N, BLOCK_N)
            radial = tl.load(slot_stats + 2 * N + n, mask=(n < N) & (j > 0), other=0.0)
            slope = _load(slopes, j, i, N, BLOCK_N)
            by_score = _load(weights, j, i, N, BLOCK_N) * (slope - mean)
            cosines, inverse = _cosines(_load(flow, j, i, N, BLOCK_N), squares, scale, key_square, key_scale, eps_mode, eps)
            q = _strength(strengths, strength, has_strengths, j) * by_score
            along, b = q * cosines, _sqrt(squares)
            if eps_mode == 0:
                by_key += tl.where(a > eps * key_scale, along / key_square, 0.0)
                radial += tl.where(b > eps * scale, along / squares, 0.0)
            elif eps_mode == 1:
                by_key += tl.where(a > 0, along * inverse * b / a, 0.0)
                radial += tl.where(b > 0, along * inverse * a / b, 0.0)
            else:
                by_key += along * inverse * inverse * squares
                radial += along * inverse * inverse * key_square
            by_strength += by_score * cosines
            tl.debug_barrier()
            _store(flow, j, i, N, q * inverse * scale, True, BLOCK_N)
            _store(slot_stats, 2, i, N, radial, True, BLOCK_N)
        tl.store(by_keys + j, tl.sum(by_key, 0))
        tl.store(to_strengths + j, tl.cast(strength, A) * tl.sum(by_strength, 0), mask=(needs >> STRENGTHS & 1) != 0)
        tl.debug_barrier()
    for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
        scale, radial = _load(slot_stats, 0, i, N, BLOCK_N), _load(slot_stats, 2, i, N, BLOCK_N)
        for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
            of_memory = _tile(of_memory, to_memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
            x = scale[:, None] * _tile(tile, memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
            of_memory -= (radial * scale)[:, None] * x
            for j in range(R):
                key_scale, _ = _scale_of_key(keys, j, M, ON_CHIP, BLOCK_M)
                of_memory += _load(flow, j, i, N, BLOCK_N)[:, None] * (key_scale * _load(keys, j, k, M, BLOCK_M))[None, :]
            if not ON_CHIP:
                tl.debug_barrier()
                _store_tile(to_memory, i, k, N, M, of_memory, BLOCK_N, BLOCK_M)
    for j in range(R):
        by_key = tl.load(by_keys + j)
        key_scale, _ = _scale_of_key(keys, j, M, ON_CHIP, BLOCK_M)
        for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
            sums = _weighted_sum(tile, memory, flow, j, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
            sums = key_scale * (sums - by_key * (key_scale * _load(keys, j, k, M, BLOCK_M)))
            _store(to_keys, j, k, M, sums, (needs >> KEYS & 1) != 0, BLOCK_M)
    return of_memory


@_kernel
def backward_kernel(memory, usage, before, keys, add, gate, strengths, written, weights, of_read, of_written, of_weights, to_memory,
                    to_before, to_keys, to_add, to_gate, to_strengths, slots, slopes, flow, by_keys, slot_stats, N: tl.int32, M: tl.int32, R: tl.int32,
                    strength: tl.float64, has_strengths: tl.int32, shared: tl.int32, eps_mode: tl.int32, eps: tl.float64, needs: tl.int32,
                    READS: tl.constexpr, WRITES: tl.constexpr, BEFORE: tl.constexpr, ON_CHIP: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_M: tl.constexpr):
    """An episode of the backward of what :func:`forward_kernel` does.

    ``of_weights``: by wr if it reads, else by ww. A memory of several tiles has its gradient in ``to_memory`` from the beginning on.
    """
    A: tl.constexpr = memory.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    memory, written, of_written, to_memory = memory + b * N * M, written + b * N * M, of_written + b * N * M, to_memory + b * N * M
    usage = usage + b * N
    before, weights, of_weights = before + b * R * N, weights + b * R * N, of_weights + b * R * N
    to_before, slopes, flow = to_before + b * R * N, slopes + b * R * N, flow + b * R * N
    keys, add, of_read = keys + b * R * M, add + b * R * M, of_read + b * R * M
    to_keys, to_add = to_keys + b * R * M, to_add + b * R * M
    gate, strengths, slots = gate + b * R, strengths + b * R, slots + b * R
    to_gate, to_strengths = to_gate + b * R, to_strengths + b * R
    by_keys, slot_stats = by_keys + b * R, slot_stats + b * 3 * N
    epsilon = tl.cast(eps, A)
    read_from = written if WRITES else memory

    ones = tl.full([BLOCK_N], 1.0, A)
    if READS:  # the barrier is that of the products
        x = _load_tile(read_from, 0, 0, N, M, BLOCK_N, BLOCK_M)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            for j in range(R):
                slope = _dots(x, read_from, of_read, j, i, N, M, ON_CHIP, BLOCK_N, BLOCK_M, ones, 1.0) + _load(of_weights, j, i, N, BLOCK_N)
                _store(slopes, j, i, N, slope, True, BLOCK_N)
    # By M_t: what comes in, and through the read.
    g = tl.zeros([BLOCK_N, BLOCK_M], A)
    for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
        for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
            if WRITES:
                g = _load_tile(of_written, i, k, N, M, BLOCK_N, BLOCK_M)
            else:
                g = tl.zeros([BLOCK_N, BLOCK_M], A)
            if READS:
                for j in range(R):
                    g += _load(weights, j, i, N, BLOCK_N)[:, None] * _load(of_read, j, k, M, BLOCK_M)[None, :]
            if not ON_CHIP:
                _store_tile(to_memory, i, k, N, M, g, BLOCK_N, BLOCK_M)
    if not ON_CHIP:
        tl.debug_barrier()
    if READS and not BEFORE:
        g = _address_backward(g, to_memory, x, read_from, keys, strengths, weights, slopes, flow, by_keys, slot_stats, to_keys, to_strengths,
                              N, M, R, strength, has_strengths, eps_mode, epsilon, needs, ON_CHIP, BLOCK_N, BLOCK_M)
        if not ON_CHIP:
            tl.debug_barrier()
    if WRITES:
        _choose_least_used(usage, slots, N, R, ON_CHIP, BLOCK_N)
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            for j in range(R):
                _store(flow, j, i, N, _dots(g, to_memory, add, j, i, N, M, ON_CHIP, BLOCK_N, BLOCK_M, ones, 1.0), True, BLOCK_N)
        tl.debug_barrier()
        for j in range(R):
            by_gate = tl.zeros([BLOCK_N], A)
            for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
                slope = _load(flow, j, i, N, BLOCK_N)
                if not READS:
                    slope += _load(of_weights, j, i, N, BLOCK_N)
                least = _is_least_used(slots, j, i, R, shared, BLOCK_N)
                by_gate += slope * (_load(before, j, i, N, BLOCK_N) - tl.where(least, 1.0, 0.0))
                _store(to_before, j, i, N, tl.load(gate + j) * slope, (needs >> READ_WEIGHTS & 1) != 0, BLOCK_N)
            tl.store(to_gate + j, tl.sum(by_gate, 0), mask=(needs >> GATE & 1) != 0)
            for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
                sums = tl.zeros([BLOCK_M], A)
                for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
                    write_weights = _write_weights(before, gate, slots, j, i, N, R, shared, BLOCK_N)
                    sums += tl.sum(write_weights[:, None] * _tile(g, to_memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M), 0)
                _store(to_add, j, k, M, sums, (needs >> ADD & 1) != 0, BLOCK_M)
        erased = tl.load(slots)
        if not ON_CHIP:
            tl.debug_barrier()
        for i in range(_tiles(N, ON_CHIP, BLOCK_N)):
            n = i * BLOCK_N + tl.arange(0, BLOCK_N)
            for k in range(_tiles(M, ON_CHIP, BLOCK_M)):
                g = _tile(g, to_memory, i, k, N, M, ON_CHIP, BLOCK_N, BLOCK_M)
                g = tl.where((n == erased)[:, None], 0.0, g)
                if not ON_CHIP:
                    tl.debug_barrier()
                    _store_tile(to_memory, i, k, N, M, g, BLOCK_N, BLOCK_M)
    if READS and BEFORE:
        tl.debug_barrier()
        x = _load_tile(memory, 0, 0, N, M, BLOCK_N, BLOCK_M)
        g = _address_backward(g, to_memory, x, memory, keys, strengths, weights, slopes, flow, by_keys, slot_stats, to_keys, to_strengths,
                              N, M, R, strength, has_strengths, eps_mode, epsilon, needs, ON_CHIP, BLOCK_N, BLOCK_M)
    if ON_CHIP and needs >> MEMORY & 1:
        _store_tile(to_memory, 0, 0, N, M, g, BLOCK_N, BLOCK_M)


# ---- the operations ------------------------------------------------------------------------------------------------------------------


class _Problem:
    """What forward and backward have in common: sizes, tiles, and arguments of the kernels. Absent tensors are None."""

    def __init__(self, memory, usage, before, keys, add, gate, strengths, strength, least_used, read_before_write, eps_mode, eps):
        self.device, self.dtype = memory.device, memory.dtype
        self.batch, self.slots, self.width = memory.shape
        self.heads = (add if keys is None else keys).shape[1]
        self.reads, self.writes = keys is not None, gate is not None
        self.none = self.empty(0)
        self.tensors = {name: self.none if t is None else device.contiguous(t) for name, t in dict(
            memory=memory, usage=usage, before=before, keys=keys, add=add, gate=gate, strengths=strengths).items()}
        self.options = {"N": self.slots, "M": self.width, "R": self.heads, "strength": strength, "has_strengths": int(strengths is not None),
                        "shared": int(least_used), "eps_mode": eps_mode, "eps": max(eps, torch.finfo(self.dtype).tiny)}
        self.constants = dict(READS=self.reads, WRITES=self.writes, BEFORE=bool(read_before_write))

    def tiles(self, room: int) -> dict:
        """Constants of a kernel that has registers for a memory of ``room`` float32 as one tile: of a larger one ptxas would spill some."""
        block_n, block_m = (max(16, triton.next_power_of_2(n)) for n in (self.slots, self.width))
        on_chip = block_n * block_m * self.dtype.itemsize <= room * 4
        if not on_chip:
            block_n, block_m = (64 if self.dtype == torch.float32 else 32), 64
        return dict(ON_CHIP=on_chip, BLOCK_N=block_n, BLOCK_M=block_m)

    def launch(self, kernel, arguments: dict, tiles: dict) -> None:
        warps = 8 if tiles["BLOCK_N"] * tiles["BLOCK_M"] > 2048 else 4
        device.launch(kernel, self.batch, arguments, {**self.constants, **tiles}, warps, 1)

    def empty(self, *shape, dtype=None) -> Tensor:
        return device.empty(shape, dtype or self.dtype, self.device)

    def memory(self) -> Tensor:
        return self.empty(self.batch, self.slots, self.width)

    def vectors(self) -> Tensor:
        return self.empty(self.batch, self.heads, self.width)

    def weights(self) -> Tensor:
        return self.empty(self.batch, self.heads, self.slots)

    def slot_stats(self) -> Tensor:
        """Scratch: three numbers of each slot."""
        return self.empty(self.batch, 3, self.slots)

    def numbers(self, dtype=None) -> Tensor:
        """One of each head."""
        return self.empty(self.batch, self.heads, dtype=dtype)


def _forward(p: _Problem, usage_decay: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(read, memory, usage, weights)``, without elements where there is none."""
    results = dict(read=p.vectors() if p.reads else p.none, written=p.memory() if p.writes else p.none,
                   new_usage=p.empty(p.batch, p.slots) if p.reads and p.writes else p.none, weights=p.weights())
    p.launch(forward_kernel, {**p.tensors, **results, "slots": p.numbers(torch.int32), "slot_stats": p.slot_stats(), **p.options,
                              "usage_decay": usage_decay}, p.tiles(8192))
    return tuple(results.values())


def _backward(p: _Problem, wanted: list, written, weights, of_read, of_written, of_weights) -> list[Tensor]:
    """The gradients of memory, read_weights, keys, add, gate and strengths of which ``wanted`` says so, the others without elements."""
    gradients = [make() if want else p.none for want, make in zip(wanted, (p.memory, p.weights, p.vectors, p.vectors, p.numbers, p.numbers))]
    names = ("to_memory", "to_before", "to_keys", "to_add", "to_gate", "to_strengths")
    to = dict(zip(names, gradients))
    tiles = p.tiles(4096 if p.constants["BEFORE"] else 8192)
    if not tiles["ON_CHIP"] and not wanted[0]:
        to["to_memory"] = p.memory()
    given = dict(written=written, weights=weights, of_read=of_read, of_written=of_written, of_weights=of_weights)
    p.launch(backward_kernel, {**p.tensors, **{name: p.none if t is None else device.contiguous(t) for name, t in given.items()}, **to,
                               "slots": p.numbers(torch.int32), "slopes": p.weights(), "flow": p.weights(), "by_keys": p.numbers(),
                               "slot_stats": p.slot_stats(), **p.options,
                               "needs": sum(1 << k for k, want in enumerate(wanted) if want)}, tiles)
    return gradients


def _bits(needs: int, count: int) -> list[bool]:
    return [bool(needs >> k & 1) for k in range(count)]


def memory_read(memory, keys, strengths, strength, eps_mode, eps):
    """``(read [B, R, M], weights [B, R, N])``"""
    read, _, _, weights = _forward(_Problem(memory, None, None, keys, None, None, strengths, strength, 0, False, eps_mode, eps))
    return read, weights


def memory_read_backward(grad_read, grad_weights, needs, memory, keys, strengths, strength, eps_mode, eps, read, weights):
    """The gradients of memory, keys and strengths, without elements where ``needs`` does not ask for them."""
    p = _Problem(memory, None, None, keys, None, None, strengths, strength, 0, False, eps_mode, eps)
    of_memory, of_keys, of_strengths = _bits(needs, 3)
    found = _backward(p, [of_memory, False, of_keys, False, False, of_strengths], None, weights, grad_read, None, grad_weights)
    return found[0], found[2], found[5]


def lrua_write(memory, usage, read_weights, add, gate, least_used):
    """``(memory [B, N, M], write_weights [B, R, N])``"""
    _, written, _, weights = _forward(_Problem(memory, usage, read_weights, None, add, gate, None, 1.0, least_used, False, 0, 1.0))
    return written, weights


def lrua_write_backward(grad_memory, grad_weights, needs, memory, usage, read_weights, add, gate, least_used, written, weights):
    """The gradients of memory, read_weights, add and gate, without elements where ``needs`` does not ask for them."""
    p = _Problem(memory, usage, read_weights, None, add, gate, None, 1.0, least_used, False, 0, 1.0)
    of_memory, of_before, of_add, of_gate = _bits(needs, 4)
    found = _backward(p, [of_memory, of_before, False, of_add, of_gate, False], None, None, None, grad_memory, grad_weights)
    return found[0], found[1], found[3], found[4]


def lrua_step(memory, usage, read_weights, keys, add, gate, strengths, strength, least_used, read_before_write, eps_mode, eps, usage_decay):
    """``(read [B, R, M], memory [B, N, M], usage [B, N], read_weights [B, R, N])``"""
    return _forward(_Problem(memory, usage, read_weights, keys, add, gate, strengths, strength, least_used, read_before_write, eps_mode, eps),
                    usage_decay)


def lrua_step_backward(grad_read, grad_memory, grad_weights, needs, memory, usage, read_weights, keys, add, gate, strengths, strength,
                       least_used, read_before_write, eps_mode, eps, usage_decay, read, written, new_usage, weights):
    """The gradients of memory, read_weights, keys, add, gate and strengths, without elements where ``needs`` does not ask for them."""
    p = _Problem(memory, usage, read_weights, keys, add, gate, strengths, strength, least_used, read_before_write, eps_mode, eps)
    return tuple(_backward(p, _bits(needs, 6), written, weights, grad_read, grad_memory, grad_weights))
