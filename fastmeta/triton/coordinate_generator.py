"""coordinate_mlp and coordinate_lstm, forward and backward. The mathematics is in ``reference/coordinate_generator.py``, the contract of the
operations in ``schemas/coordinate_generator.py``.

A program takes one block of coordinates after the other. What it has of a layer is a tile ``[coordinates, units]`` in registers, of which a thread has
one unit of all coordinates: the layout that Triton gives a tile that nothing else asks for. A layer is then a sum of outer products: a unit of the layer
below, of all coordinates, and that unit's weights, of all units above. It needs no sum across threads, no tensor cores, so no TF32, and no padding of the
units below. A tile goes through scratch, that of its program, to be read unit by unit.

The backward computes the layers of a block again, those of an LSTM with h and c before each step on a tape in scratch. The gradient of a weight is a sum over
coordinates, which are a thread's own. Every program has a sum for each weight, which all its blocks add to, and a second kernel adds those of all programs,
always in the same order. There are no atomics: the same bits on every run. As programs are not more than ``PROGRAMS``, scratch and sums do not grow with M.

The sums of a program are rows, one for each unit below: the two channels of a gradient, the bias, the W hidden units; then one for the output's weights, one
for its bias, and for the perceptron one for the second bias. A row has W numbers, or of an LSTM 4W, its gates.

Any W is right. A tile is padded to 32 units or a power of two; a thread has one unit of 64 bytes of coordinates up to W = 256, then more units of fewer
coordinates, and from W = 8192 on so many that they spill.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..reference.coordinate_generator import PREPROCESSING_EPS, PREPROCESSING_P
from . import launch as device
from .cosine_attention import _divide, _kernel
from .lrua_memory import _bits, _load, _load_tile, _store_tile

P, EPS, EXP_P = map(tl.constexpr, (PREPROCESSING_P, PREPROCESSING_EPS, math.exp(PREPROCESSING_P)))
PROGRAMS = 1024  # at most: 8 warps, as many as have room, for each of 128 processors; their sums for an LSTM of width 20 are 8 MB
SUMMED = ("to_input", "to_bias", "to_hidden", "to_output", "to_output_bias", "to_hidden_bias")  # the order of sum_kernel


# ---- pieces ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _channels(gradient):
    """The two channels of a gradient, and the first one before its clamp, by which it has a derivative or none."""
    size = _divide(tl.log(tl.abs(gradient) + EPS), tl.full(gradient.shape, P, gradient.dtype))
    scaled = gradient * EXP_P
    return tl.where(size < -1, -1.0, size), tl.where(scaled < -1, -1.0, tl.where(scaled > 1, 1.0, scaled)), size


@triton.jit
def _channels_backward(gradient, of_size, of_scaled):
    """As torch has it: what lies on the border of a clamp passes, NaN does not."""
    _, _, size = _channels(gradient)
    sign = tl.where(gradient > 0, 1.0, tl.where(gradient < 0, -1.0, 0.0))
    of_size = tl.where(size >= -1, of_size, 0.0) / P / (tl.abs(gradient) + EPS) * sign
    return of_size + tl.where(tl.abs(gradient * EXP_P) <= 1, of_scaled, 0.0) * EXP_P


@triton.jit
def _load_block(base, start, M, BLOCK: tl.constexpr):
    """``BLOCK`` of M coordinates from ``start`` on, zeros past the end."""
    m = tl.arange(0, BLOCK)
    return tl.load(base + start + m, mask=m < M - start, other=0.0)


@triton.jit
def _store_block(base, start, M, values, BLOCK: tl.constexpr):
    m = tl.arange(0, BLOCK)
    tl.store(base + start + m, values, mask=m < M - start)


@triton.jit
def _row(base, j, W, BLOCK_W: tl.constexpr):
    """Row j of rows of W numbers, across a tile."""
    return _load(base, j, 0, W, BLOCK_W)[None, :]


@triton.jit
def _unit(tile, j, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Unit j of a tile in scratch, down a tile."""
    return tl.load(tile + j + tl.arange(0, BLOCK) * BLOCK_W)[:, None]


@triton.jit
def _keep(scratch, tile, real, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """A tile to scratch; zeros for coordinates past the end, which take part in sums."""
    _store_tile(scratch, 0, 0, BLOCK, BLOCK_W, tl.where(real[:, None], tile, 0.0), BLOCK, BLOCK_W)


@triton.jit
def _of_channels(size, scaled, weight, bias, gate, GATES: tl.constexpr, W, BLOCK_W: tl.constexpr):
    """``weight x + bias`` of the units of a gate; ``weight [2, GATES W]``."""
    return size[:, None] * _row(weight, gate, W, BLOCK_W) + scaled[:, None] * _row(weight, GATES + gate, W, BLOCK_W) + _row(bias, gate, W, BLOCK_W)


@triton.jit
def _over_units(tile, W, BLOCK_W: tl.constexpr):
    """The sum over the units of each coordinate. Past the last unit a tile may be NaN."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_W)[None, :] < W, tile, 0.0), 1)


@triton.jit
def _add(sums, j, values, W, begins, BLOCK_W: tl.constexpr):
    """Adds ``values``, across a tile, to row j of the sums, which begin with them where ``begins``."""
    unit = tl.arange(0, BLOCK_W)
    at = sums + j * W + unit
    tl.store(at, tl.load(at, mask=(unit < W) & ~begins, other=0.0) + values, mask=unit < W)


@triton.jit
def _relu(x):
    return tl.where(x <= 0, 0.0, x)  # not maximum(), which loses NaN


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return libdevice.tanh(x)


# ---- the perceptron ------------------------------------------------------------------------------------------------------------------


@triton.jit
def _perceptron(size, scaled, real, weight_1, bias_1, weight_2, bias_2, hidden, W, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Both hidden layers; the first one is in ``hidden``, too. ``weight_1 [2, W]``, ``weight_2 [W, W]``, a row for each unit below."""
    first = _relu(_of_channels(size, scaled, weight_1, bias_1, 0, 1, W, BLOCK_W))
    tl.debug_barrier()  # others may still read the block before
    _keep(hidden, first, real, BLOCK, BLOCK_W)
    tl.debug_barrier()
    second = tl.zeros([BLOCK, BLOCK_W], first.dtype) + _row(bias_2, 0, W, BLOCK_W)
    for j in range(W):
        second += _unit(hidden, j, BLOCK, BLOCK_W) * _row(weight_2, j, W, BLOCK_W)
    return first, _relu(second)


@_kernel
def mlp_forward_kernel(gradients, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, result, hidden, M: tl.int64, W: tl.int32, blocks: tl.int32,
                       programs: tl.int32, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Every ``programs``-th block of coordinates."""
    program = tl.program_id(0)
    hidden += program.to(tl.int64) * BLOCK * BLOCK_W
    for block in range(program, blocks, programs):
        start = tl.cast(block, tl.int64) * BLOCK
        size, scaled, _ = _channels(_load_block(gradients, start, M, BLOCK))
        _, second = _perceptron(size, scaled, tl.arange(0, BLOCK) < M - start, weight_1, bias_1, weight_2, bias_2, hidden, W, BLOCK, BLOCK_W)
        _store_block(result, start, M, _over_units(second * _row(weight_3, 0, W, BLOCK_W), W, BLOCK_W) + tl.load(bias_3), BLOCK)


@_kernel
def mlp_backward_kernel(of_result, gradients, weight_1, bias_1, weight_2, bias_2, weight_3, by_unit, to_gradients, sums, hidden, flow, M: tl.int64,
                        W: tl.int32, blocks: tl.int32, programs: tl.int32, needs: tl.int32, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """The same backward. ``by_unit``: weight_2 again, a row for each unit above; ``needs``: bit 0 of the gradients, the others of sums."""
    program = tl.program_id(0)
    hidden += program.to(tl.int64) * BLOCK * BLOCK_W
    flow += program.to(tl.int64) * BLOCK * BLOCK_W
    sums += program.to(tl.int64) * (W + 6) * W
    for block in range(program, blocks, programs):
        begins = block == program
        start = tl.cast(block, tl.int64) * BLOCK
        real = tl.arange(0, BLOCK) < M - start
        gradient = _load_block(gradients, start, M, BLOCK)
        slope = _load_block(of_result, start, M, BLOCK)
        size, scaled, _ = _channels(gradient)
        first, second = _perceptron(size, scaled, real, weight_1, bias_1, weight_2, bias_2, hidden, W, BLOCK, BLOCK_W)
        of_second = tl.where(real[:, None] & ~(second <= 0), slope[:, None] * _row(weight_3, 0, W, BLOCK_W), 0.0)
        _keep(flow, of_second, real, BLOCK, BLOCK_W)
        tl.debug_barrier()
        of_first = tl.zeros([BLOCK, BLOCK_W], gradient.dtype)
        for j in range(W):
            of_first += _unit(flow, j, BLOCK, BLOCK_W) * _row(by_unit, j, W, BLOCK_W)
            if needs > 1:
                _add(sums, 3 + j, tl.sum(_unit(hidden, j, BLOCK, BLOCK_W) * of_second, 0), W, begins, BLOCK_W)
        of_first = tl.where(real[:, None] & ~(first <= 0), of_first, 0.0)
        if needs > 1:
            _add(sums, 0, tl.sum(of_first * size[:, None], 0), W, begins, BLOCK_W)
            _add(sums, 1, tl.sum(of_first * scaled[:, None], 0), W, begins, BLOCK_W)
            _add(sums, 2, tl.sum(of_first, 0), W, begins, BLOCK_W)
            _add(sums, 3 + W, tl.sum(tl.where(real[:, None], slope[:, None] * second, 0.0), 0), W, begins, BLOCK_W)
            _add(sums, 4 + W, tl.sum(slope, 0), W, begins, BLOCK_W)
            _add(sums, 5 + W, tl.sum(of_second, 0), W, begins, BLOCK_W)
        if needs & 1:
            of_size = _over_units(of_first * _row(weight_1, 0, W, BLOCK_W), W, BLOCK_W)
            of_scaled = _over_units(of_first * _row(weight_1, 1, W, BLOCK_W), W, BLOCK_W)
            _store_block(to_gradients, start, M, _channels_backward(gradient, of_size, of_scaled), BLOCK)


# ---- the LSTM ------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _gates(size, scaled, hidden, weight_ih, weight_hh, bias, W, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """i, f, g, o. ``weight_ih [2, 4W]``, ``weight_hh [W, 4W]``, a row for each unit below; ``hidden``: h_{t-1} in scratch."""
    i = _of_channels(size, scaled, weight_ih, bias, 0, 4, W, BLOCK_W)
    f = _of_channels(size, scaled, weight_ih, bias, 1, 4, W, BLOCK_W)
    g = _of_channels(size, scaled, weight_ih, bias, 2, 4, W, BLOCK_W)
    o = _of_channels(size, scaled, weight_ih, bias, 3, 4, W, BLOCK_W)
    for j in range(W):
        h = _unit(hidden, j, BLOCK, BLOCK_W)
        i += h * _row(weight_hh, 4 * j, W, BLOCK_W)
        f += h * _row(weight_hh, 4 * j + 1, W, BLOCK_W)
        g += h * _row(weight_hh, 4 * j + 2, W, BLOCK_W)
        o += h * _row(weight_hh, 4 * j + 3, W, BLOCK_W)
    return _sigmoid(i), _sigmoid(f), _tanh(g), _sigmoid(o)


@triton.jit
def _steps(gradients, weight_ih, weight_hh, bias, tape, start, M, T, W, KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """h_T; with KEEP, h and c before each step are on the tape afterwards, which otherwise has room for one step."""
    TILE: tl.constexpr = BLOCK * BLOCK_W
    real = tl.arange(0, BLOCK) < M - start
    h = tl.zeros([BLOCK, BLOCK_W], gradients.dtype.element_ty)
    c = tl.zeros([BLOCK, BLOCK_W], gradients.dtype.element_ty)
    for t in range(T):
        size, scaled, _ = _channels(_load_block(gradients + t * M, start, M, BLOCK))
        before = tape + (t * 2 * TILE if KEEP else 0)
        tl.debug_barrier()  # others may still read the step, or the block, before
        _keep(before, h, real, BLOCK, BLOCK_W)
        if KEEP:
            _keep(before + TILE, c, real, BLOCK, BLOCK_W)
        tl.debug_barrier()
        i, f, g, o = _gates(size, scaled, before, weight_ih, weight_hh, bias, W, BLOCK, BLOCK_W)
        c = f * c + i * g
        h = o * _tanh(c)
    return h


@_kernel
def lstm_forward_kernel(gradients, weight_ih, weight_hh, bias, output_weight, output_bias, result, hidden, M: tl.int64, T: tl.int32, W: tl.int32,
                        blocks: tl.int32, programs: tl.int32, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """Every ``programs``-th block of coordinates."""
    program = tl.program_id(0)
    hidden += program.to(tl.int64) * BLOCK * BLOCK_W
    for block in range(program, blocks, programs):
        start = tl.cast(block, tl.int64) * BLOCK
        h = _steps(gradients, weight_ih, weight_hh, bias, hidden, start, M, T, W, False, BLOCK, BLOCK_W)
        _store_block(result, start, M, _over_units(h * _row(output_weight, 0, W, BLOCK_W), W, BLOCK_W) + tl.load(output_bias), BLOCK)


@triton.jit
def _add_gate(sums, gate, flow, size, scaled, W, begins, BLOCK_W: tl.constexpr):
    """What a gate adds to the rows of the channels and of the bias."""
    _add(sums, gate, tl.sum(flow * size[:, None], 0), W, begins, BLOCK_W)
    _add(sums, 4 + gate, tl.sum(flow * scaled[:, None], 0), W, begins, BLOCK_W)
    _add(sums, 8 + gate, tl.sum(flow, 0), W, begins, BLOCK_W)


@triton.jit
def _over_gates(of_i, of_f, of_g, of_o, weight_ih, channel, W, BLOCK_W: tl.constexpr):
    """The gradient of a channel of each coordinate."""
    return _over_units(of_i * _row(weight_ih, 4 * channel, W, BLOCK_W) + of_f * _row(weight_ih, 4 * channel + 1, W, BLOCK_W) +
                       of_g * _row(weight_ih, 4 * channel + 2, W, BLOCK_W) + of_o * _row(weight_ih, 4 * channel + 3, W, BLOCK_W), W, BLOCK_W)


@_kernel
def lstm_backward_kernel(of_result, gradients, weight_ih, weight_hh, bias, output_weight, by_gate, to_gradients, sums, tape, flow, M: tl.int64,
                         T: tl.int32, W: tl.int32, blocks: tl.int32, programs: tl.int32, needs: tl.int32, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr):
    """The same backward. ``by_gate [4W, W]``: weight_hh again, a row for each gate of each unit above; ``needs`` as in :func:`mlp_backward_kernel`."""
    TILE: tl.constexpr = BLOCK * BLOCK_W
    program = tl.program_id(0)
    tape += program.to(tl.int64) * T * 2 * TILE
    flow += program.to(tl.int64) * 4 * TILE
    sums += program.to(tl.int64) * (W + 5) * 4 * W
    for block in range(program, blocks, programs):
        start = tl.cast(block, tl.int64) * BLOCK
        real = tl.arange(0, BLOCK) < M - start
        h = _steps(gradients, weight_ih, weight_hh, bias, tape, start, M, T, W, True, BLOCK, BLOCK_W)
        slope = _load_block(of_result, start, M, BLOCK)
        if needs > 1:
            _add(sums, (3 + W) * 4, tl.sum(tl.where(real[:, None], slope[:, None] * h, 0.0), 0), W, block == program, BLOCK_W)
            _add(sums, (4 + W) * 4, tl.sum(slope, 0), W, block == program, BLOCK_W)
        of_h = slope[:, None] * _row(output_weight, 0, W, BLOCK_W)
        of_c = tl.zeros([BLOCK, BLOCK_W], gradients.dtype.element_ty)
        for step in range(T):
            t = T - 1 - step
            begins = (block == program) & (step == 0)
            size, scaled, _ = _channels(_load_block(gradients + t * M, start, M, BLOCK))
            before = tape + t * 2 * TILE
            i, f, g, o = _gates(size, scaled, before, weight_ih, weight_hh, bias, W, BLOCK, BLOCK_W)
            c = _load_tile(before + TILE, 0, 0, BLOCK, BLOCK_W, BLOCK, BLOCK_W)
            squashed = _tanh(f * c + i * g)
            of_c += of_h * o * (1 - squashed * squashed)
            of_i = tl.where(real[:, None], of_c * g * i * (1 - i), 0.0)
            of_f = tl.where(real[:, None], of_c * c * f * (1 - f), 0.0)
            of_g = tl.where(real[:, None], of_c * i * (1 - g * g), 0.0)
            of_o = tl.where(real[:, None], of_h * squashed * o * (1 - o), 0.0)
            of_c *= f
            tl.debug_barrier()  # others may still read the step after
            _keep(flow, of_i, real, BLOCK, BLOCK_W)
            _keep(flow + TILE, of_f, real, BLOCK, BLOCK_W)
            _keep(flow + 2 * TILE, of_g, real, BLOCK, BLOCK_W)
            _keep(flow + 3 * TILE, of_o, real, BLOCK, BLOCK_W)
            tl.debug_barrier()
            if needs > 1:
                _add_gate(sums, 0, of_i, size, scaled, W, begins, BLOCK_W)
                _add_gate(sums, 1, of_f, size, scaled, W, begins, BLOCK_W)
                _add_gate(sums, 2, of_g, size, scaled, W, begins, BLOCK_W)
                _add_gate(sums, 3, of_o, size, scaled, W, begins, BLOCK_W)
            of_h = tl.zeros([BLOCK, BLOCK_W], of_c.dtype)
            for j in range(W):
                of_h += _unit(flow, j, BLOCK, BLOCK_W) * _row(by_gate, j, W, BLOCK_W)
                of_h += _unit(flow + TILE, j, BLOCK, BLOCK_W) * _row(by_gate, W + j, W, BLOCK_W)
                of_h += _unit(flow + 2 * TILE, j, BLOCK, BLOCK_W) * _row(by_gate, 2 * W + j, W, BLOCK_W)
                of_h += _unit(flow + 3 * TILE, j, BLOCK, BLOCK_W) * _row(by_gate, 3 * W + j, W, BLOCK_W)
                if needs > 1:
                    below = _unit(before, j, BLOCK, BLOCK_W)
                    _add(sums, (3 + j) * 4, tl.sum(below * of_i, 0), W, begins, BLOCK_W)
                    _add(sums, (3 + j) * 4 + 1, tl.sum(below * of_f, 0), W, begins, BLOCK_W)
                    _add(sums, (3 + j) * 4 + 2, tl.sum(below * of_g, 0), W, begins, BLOCK_W)
                    _add(sums, (3 + j) * 4 + 3, tl.sum(below * of_o, 0), W, begins, BLOCK_W)
            if needs & 1:
                of_size = _over_gates(of_i, of_f, of_g, of_o, weight_ih, 0, W, BLOCK_W)
                of_scaled = _over_gates(of_i, of_f, of_g, of_o, weight_ih, 1, W, BLOCK_W)
                gradient = _load_block(gradients + t * M, start, M, BLOCK)  # again, or it would take registers all the time
                _store_block(to_gradients + t * M, start, M, _channels_backward(gradient, of_size, of_scaled), BLOCK)


# ---- sums ------------------------------------------------------------------------------------------------------------------------------


@triton.jit
def _give(to, total, unit, row, rows, units, wanted):
    """To row ``row``, of ``rows`` that ``to [units, rows]`` has transposed; nothing if it is another one's."""
    tl.store(to + unit * rows + row, total, mask=(unit < units) & (row >= 0) & (row < rows) & (wanted != 0))


@_kernel
def sum_kernel(sums, to_input, to_bias, to_hidden, to_output, to_output_bias, to_hidden_bias, programs: tl.int32, rows: tl.int32, units: tl.int32,
               W: tl.int32, needs: tl.int32, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    """``BLOCK`` units of a row of the sums, added over programs, to the gradient that it belongs to, if its bit of ``needs`` says so."""
    row, block = tl.program_id(0) % rows, tl.program_id(0) // rows
    unit = block * BLOCK + tl.arange(0, BLOCK)
    real = unit < tl.where(row < 3 + W, units, W)  # which have been written
    total = tl.zeros([BLOCK_P, BLOCK], sums.dtype.element_ty)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        at = sums + (p.to(tl.int64)[:, None] * rows + row) * units + unit[None, :]
        total += tl.load(at, mask=(p < programs)[:, None] & real[None, :], other=0.0)
    total = tl.sum(total, 0)
    _give(to_input, total, unit, row, 2, units, needs & 1)
    _give(to_bias, total, unit, row - 2, 1, units, needs & 2)
    _give(to_hidden, total, unit, row - 3, W, units, needs & 4)
    _give(to_output, total, unit, row - 3 - W, 1, W, needs & 8)
    _give(to_output_bias, total, unit, row - 4 - W, 1, 1, needs & 16)
    _give(to_hidden_bias, total, unit, row - 5 - W, 1, W, needs & 32)


# ---- the operations ------------------------------------------------------------------------------------------------------------------


class _Problem:
    """What forward and backward have in common: sizes, tiles, scratch."""

    def __init__(self, gradients: Tensor, width: int):
        self.device, self.dtype, self.width = gradients.device, gradients.dtype, width
        block_w = max(32, triton.next_power_of_2(width))
        self.warps = min(block_w // 32, 8)
        # Fewer coordinates than threads: Triton then has each thread load what it needs of a unit, instead of passing it on.
        self.block = max(min(64 // self.dtype.itemsize, 4096 // block_w), 1)
        blocks = triton.cdiv(gradients.shape[-1], self.block)
        self.programs = min(blocks, PROGRAMS)
        steps = {"T": gradients.shape[0]} if gradients.dim() == 2 else {}
        self.sizes = {"M": gradients.shape[-1], **steps, "W": width, "blocks": blocks, "programs": self.programs}
        self.constants = dict(BLOCK=self.block, BLOCK_W=block_w)

    def empty(self, *shape) -> Tensor:
        return device.empty(shape, self.dtype, self.device)

    def tiles(self, count: int = 1) -> Tensor:
        """Scratch of each program."""
        return self.empty(self.programs, count, *self.constants.values())

    def launch(self, kernel, arguments: dict) -> None:
        device.launch(kernel, self.programs, arguments, self.constants, self.warps, 1)

    def backward(self, kernel, gates: int, arguments: dict, scratch: dict, needs: int, shapes: dict) -> tuple[Tensor, ...]:
        """The gradients, of ``shapes`` by name in the order of ``needs``."""
        wanted = dict(zip(shapes, _bits(needs, len(shapes))))
        found = {name: self.empty(*(shape if wanted[name] else (0,))) for name, shape in shapes.items()}
        units, rows = gates * self.width, self.width + len(shapes) - 1
        sums = self.empty(self.programs if needs > 1 else 0, rows, units)
        self.launch(kernel, {**arguments, "to_gradients": found["to_gradients"], "sums": sums, **scratch, **self.sizes, "needs": needs})
        if needs > 1:
            block = 16
            to = {name: found.get(name, self.empty(0)) for name in SUMMED}
            device.launch(sum_kernel, rows * triton.cdiv(units, block),
                          {"sums": sums, **to, "programs": self.programs, "rows": rows, "units": units, "W": self.width,
                           "needs": sum(1 << k for k, name in enumerate(SUMMED) if wanted.get(name))}, dict(BLOCK=block, BLOCK_P=128), 4, 1)
        return tuple(found.values())


def _transposed(weight: Tensor) -> Tensor:
    """A row for each unit below."""
    return device.contiguous(weight.mT)


def _mlp(weight_1, bias_1, weight_2, bias_2) -> dict[str, Tensor]:
    return {"weight_1": _transposed(weight_1), "bias_1": device.contiguous(bias_1), "weight_2": _transposed(weight_2), "bias_2": device.contiguous(bias_2)}


def _lstm(weight_ih, weight_hh, bias) -> dict[str, Tensor]:
    return {"weight_ih": _transposed(weight_ih), "weight_hh": _transposed(weight_hh), "bias": device.contiguous(bias)}


def coordinate_mlp(gradients, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3):
    """result ``[M]``"""
    p = _Problem(gradients, weight_2.shape[0])
    result = p.empty(*gradients.shape)
    p.launch(mlp_forward_kernel, {"gradients": device.contiguous(gradients), **_mlp(weight_1, bias_1, weight_2, bias_2),
                                  "weight_3": device.contiguous(weight_3), "bias_3": bias_3, "result": result, "hidden": p.tiles(), **p.sizes})
    return result


def coordinate_mlp_backward(grad, needs, gradients, weight_1, bias_1, weight_2, bias_2, weight_3, bias_3, result):
    """The gradients of all arguments, without elements where ``needs`` does not ask for them."""
    p = _Problem(gradients, weight_2.shape[0])
    return p.backward(
        mlp_backward_kernel, 1,
        {"of_result": device.contiguous(grad), "gradients": device.contiguous(gradients), **_mlp(weight_1, bias_1, weight_2, bias_2),
         "weight_3": device.contiguous(weight_3), "by_unit": device.contiguous(weight_2)}, {"hidden": p.tiles(), "flow": p.tiles()}, needs,
        {"to_gradients": gradients.shape, "to_input": weight_1.shape, "to_bias": bias_1.shape, "to_hidden": weight_2.shape,
         "to_hidden_bias": bias_2.shape, "to_output": weight_3.shape, "to_output_bias": bias_3.shape})


def coordinate_lstm(gradients, weight_ih, weight_hh, bias, output_weight, output_bias):
    """result ``[M]``"""
    p = _Problem(gradients, weight_hh.shape[1])
    result = p.empty(gradients.shape[1])
    p.launch(lstm_forward_kernel, {"gradients": device.contiguous(gradients), **_lstm(weight_ih, weight_hh, bias),
                                   "output_weight": device.contiguous(output_weight), "output_bias": output_bias, "result": result,
                                   "hidden": p.tiles(), **p.sizes})
    return result


def coordinate_lstm_backward(grad, needs, gradients, weight_ih, weight_hh, bias, output_weight, output_bias, result):
    """The gradients of all arguments, without elements where ``needs`` does not ask for them."""
    p = _Problem(gradients, weight_hh.shape[1])
    return p.backward(
        lstm_backward_kernel, 4,
        {"of_result": device.contiguous(grad), "gradients": device.contiguous(gradients), **_lstm(weight_ih, weight_hh, bias),
         "output_weight": device.contiguous(output_weight), "by_gate": device.contiguous(weight_hh)},
        {"tape": p.tiles(2 * gradients.shape[0]), "flow": p.tiles(4)}, needs,
        {"to_gradients": gradients.shape, "to_input": weight_ih.shape, "to_hidden": weight_hh.shape, "to_bias": bias.shape,
         "to_output": output_weight.shape, "to_output_bias": output_bias.shape})
