"""Modules, memory, launches and what they report."""

import ctypes
import re
import struct
from collections import Counter
from dataclasses import dataclass

import numpy as np

from . import native
from .program import BITS, WINDOWS, Lowering, UnknownInstruction, Variable, _integer, _split, parse

INITIALISED, WRITABLE, MEMBER = 1, 2, 4  # ByteState of machine.cpp


class Finding(AssertionError):
    """A kernel did what it must not do.

    ``kind`` is a slug such as "out-of-bounds"; ``instruction`` and ``line`` are of the PTX text;
    ``block`` is (x, y, z), ``warp`` its number in
    the block, ``lane`` a lane of that warp, -1 where no lane is to blame.
    """

    def __init__(self, kind, detail, kernel, instruction, line, block, warp, lane):
        super().__init__(f"{kind} in {kernel}: {detail}: {instruction!r} (line {line}), block {block}, warp {warp}, lane {lane}")
        self.kind, self.detail, self.kernel, self.instruction, self.line = kind, detail, kernel, instruction, line
        self.block, self.warp, self.lane = block, warp, lane


@dataclass
class Kernel:
    """An entry of a module.

    ``parameters`` are (offset, bytes) in the block of ``parameter_bytes``; ``static_shared`` is in bytes;
    ``max_threads`` is the .maxntid or
    .reqntid of a block, or None.
    """

    name: str
    parameters: list
    parameter_types: list
    parameter_bytes: int
    static_shared: int
    max_threads: int | None
    required_threads: tuple | None
    program: object
    dynamic_base: int
    module: object

    def pack(self, arguments) -> bytes:
        """The parameter block of ints, floats, tensors (their address) and bytes, one for each parameter."""
        if len(arguments) != len(self.parameters):
            raise ValueError(f"{self.name} takes {len(self.parameters)} arguments, got {len(arguments)}")
        block = bytearray(self.parameter_bytes)
        for (offset, size), kind, value in zip(self.parameters, self.parameter_types, arguments):
            if isinstance(value, (bytes, bytearray)):
                packed = bytes(value)
            elif hasattr(value, "data_ptr"):
                packed = struct.pack("<Q", value.data_ptr())
            elif isinstance(value, np.ndarray):
                packed = struct.pack("<Q", value.ctypes.data)
            elif isinstance(value, float) or kind in ("f32", "f64"):
                packed = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
            else:
                packed = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
            if len(packed) != size:
                raise ValueError(f"parameter {offset} of {self.name} has {size} bytes, got {len(packed)}")
            block[offset:offset + size] = packed
        return bytes(block)


class Module:
    """A PTX module. Raises UnknownInstruction where it has an instruction that the machine does not execute."""

    def __init__(self, text: str):
        functions, variables = parse(text)
        self.buffers = []  # (name, array, space): the module's own variables
        symbols, shared = {}, {}
        for name, variable in variables.items():
            if variable.space.startswith("shared"):
                shared[name] = variable
            else:
                symbols[name] = self._place(variable)
        for function in functions.values():
            for statement in function.body or []:
                if statement[0] == "variable" and statement[2].space in ("global", "const"):
                    symbols[function.name, statement[2].name] = self._place(statement[2])
        for name, variable in symbols.items():
            if variable.initial:
                self._initialise(variable, symbols)
        self.kernels = {f.name: self._kernel(f, functions, symbols, shared) for f in functions.values() if f.entry and f.body is not None}

    def _place(self, variable):
        if variable.dynamic or variable.space not in ("global", "const"):
            raise UnknownInstruction(f"variable {variable.name} in .{variable.space}")
        array = np.zeros(variable.bytes + 256, np.uint8)
        start = -array.ctypes.data % 256
        array = array[start:start + variable.bytes]
        self.buffers.append((variable.name, array, variable.space))
        placed = Variable(variable.name, variable.space, variable.bytes, variable.align, variable.kind, variable.initial, False,
                          array.ctypes.data)
        placed.array = array
        return placed

    def _initialise(self, variable, symbols):
        size = BITS[variable.kind] // 8
        text = variable.initial.replace("{", " ").replace("}", " ")
        for k, item in enumerate(_split(text)):
            lowering = Lowering({}, symbols, {})
            lowering.scopes, lowering.text = [{}], f".{variable.space} {variable.name}"
            value = _integer(item) if _integer(item) is not None and variable.kind not in ("f32", "f64") else lowering.value(item,
                variable.kind)
            variable.array[k * size:(k + 1) * size] = np.frombuffer((value & (1 << 8 * size) - 1).to_bytes(size, "little"), np.uint8)

    def _kernel(self, function, functions, symbols, shared):
        scope, parameters, end = {}, [], 0
        for p in function.parameters:
            offset = -(-end // p.align) * p.align
            end = offset + p.bytes
            parameters.append((offset, p.bytes))
            scope[p.name] = Variable(p.name, "param", p.bytes, p.align, p.kind, offset=offset)
        lowering = Lowering(functions, symbols, shared)
        lowering.line = function.line
        lowering.function(function, scope)
        program, static, base = lowering.finish()
        return Kernel(function.name, parameters, [p.kind for p in function.parameters], end, static, function.max_threads,
                      function.required_threads,
                      program, base, self)


class Memory:
    """What a kernel may touch: everything outside of it is out of bounds.

    Which bytes are initialised is remembered from launch to launch.
    """

    def __init__(self):
        self._buffers = {}  # base: (bytes, state of each byte, name, what keeps the memory alive)

    def add(self, tensor, initialised=True, writable=True, name=None):
        """Registers the storage of a CPU tensor or numpy array, at its own address.

        Only the elements of the view may be accessed; they count as written before if ``initialised``. Views of one storage add up.
        """
        if isinstance(tensor, np.ndarray):
            owner = tensor
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            low, high = np.lib.array_utils.byte_bounds(owner) if hasattr(np.lib, "array_utils") else np.byte_bounds(owner)
            base, size = low, high - low
            start, shape, strides, item = tensor.ctypes.data - base, tensor.shape, tensor.strides, tensor.itemsize
        else:
            if tensor.device.type != "cpu":
                raise ValueError(f"the machine's memory is this process's: expected a CPU tensor, got one on {tensor.device}")
            storage = tensor.untyped_storage()
            base, size, item = storage.data_ptr(), storage.nbytes(), tensor.element_size()
            start, shape, strides = tensor.storage_offset() * item, tuple(tensor.shape), tuple(s * item for s in tensor.stride())
        if not size:
            return
        state = self._state(base, size, name, tensor)
        view = np.lib.stride_tricks.as_strided(state[start:], (*shape, item), (*strides, 1))
        view |= MEMBER | (INITIALISED if initialised else 0) | (WRITABLE if writable else 0)

    def allocate(self, pointer, bytes, name=None, initialised=False):
        """Registers ``bytes`` bytes at an address that an allocator gave; what it had given there before is no more."""
        if bytes:
            for base in [b for b, (size, _, _, keep) in self._buffers.items() if b < pointer + bytes and pointer < b + size and not any(
                    owner is not None for owner in keep)]:
                del self._buffers[base]
            self._state(pointer, bytes, name, None)[:] |= MEMBER | WRITABLE | (INITIALISED if initialised else 0)

    def _state(self, base, size, name, keep):
        if base not in self._buffers:
            for other, (length, *_) in self._buffers.items():
                if other < base + size and base < other + length:
                    raise ValueError(f"{size} bytes at 0x{base:x} overlap {length} bytes at 0x{other:x}: register the whole of them first")
            self._buffers[base] = (size, np.zeros(size, np.uint8), name or f"buffer {len(self._buffers)}", [keep])
        found = self._buffers[base]
        if found[0] != size:
            raise ValueError(f"0x{base:x} is registered with {found[0]} bytes, got {size}")
        found[3].append(keep)
        return found[1]

    def initialised(self, tensor) -> np.ndarray:
        """Which bytes of the elements of a tensor were ever written, of shape ``(*tensor.shape, bytes of an element)``, bool."""
        storage, item = tensor.untyped_storage(), tensor.element_size()
        state = self._buffers[storage.data_ptr()][1]
        return np.lib.stride_tricks.as_strided(state[tensor.storage_offset() * item:], (*tensor.shape, item),
                                               (*(s * item for s in tensor.stride()), 1)) & INITIALISED > 0


@dataclass
class Traffic:
    """Of one buffer, or of all: bytes that lanes asked for; requests of warps;
        32-byte sectors of these, and the fewest that could hold the distinct
    bytes of each; distinct bytes and sectors touched in the whole launch."""

    read: int
    written: int
    sectors_read: int
    sectors_written: int
    ideal_sectors_read: int
    ideal_sectors_written: int
    requests_read: int
    requests_written: int
    unique_read: int
    unique_written: int
    unique_sectors_read: int
    unique_sectors_written: int


class Report:
    """What a launch did.

    ``instructions``: of threads, without those that a predicate switched off; ``warp_instructions``;
    ``by_class``: instructions of threads;
    ``barriers``: arrivals of warps. Global memory: ``global_read``, ``global_written``, and all of :class:`Traffic` but ``read`` and
    ``written``; ``buffers`` has a Traffic for each name. Shared memory: ``shared_requests`` of warps, ``shared_transactions`` they took, of
    which ``bank_conflicts`` were more than the fewest for their width; ``redundant_writes``: bytes to which two warps wrote the same value;
    ``shared_read``, ``shared_written``, ``local_read``, ``local_written``: bytes. ``lanes`` and ``warps`` count each instruction.
    """

    def __init__(self, program, lanes, warps, counters, buffers):
        self.lanes, self.warps, self.program, self.buffers = lanes, warps, program, buffers
        self.instructions, self.warp_instructions = int(lanes.sum()), int(warps.sum())
        self.by_class = Counter()
        for group, n in zip(program.groups, lanes):
            if n:
                self.by_class[group] += int(n)
        for name, value in zip(native.COUNTERS, counters):
            if name not in ("steps", "clock"):
                setattr(self, name, int(value))
        for name in native.TRAFFIC:
            setattr(self, {"read": "global_read", "written": "global_written"}.get(name, name),
                    sum(getattr(b, name) for b in buffers.values()))

    @property
    def bank_conflicts(self) -> int:
        return self.shared_transactions - self.shared_ideal_transactions

    def hottest(self, count=20) -> str:
        """The instructions that most warps issued."""
        order = np.argsort(-self.warps.astype(np.int64), kind="stable")[:count]
        return "\n".join(f"{self.warps[k]:>12} line {self.program.line[k]:>5}  {self.program.text[k]}" for k in order)

    def __repr__(self):
        return (f"Report({self.instructions} instructions, {self.global_read} + {self.global_written} bytes of global memory, "
                f"{self.bank_conflicts} bank conflicts, {dict(self.by_class)})")


def launch(kernel, grid, block, arguments, memory, dynamic_shared=0, seed=0, step_limit=10**10) -> Report:
    """Runs a kernel to its end.

    Args:
        grid, block: (x, y, z), or fewer, or one int.
        arguments: the parameter block as bytes, or a list for :meth:`Kernel.pack`.
        dynamic_shared: bytes.
        seed: order of blocks and warps; 0: in order, each warp up to its next barrier.
        step_limit: instructions of threads.

    Raises Finding at the first violation, ValueError for a launch that no device accepts.
    """
    grid, block = [tuple(n if isinstance(n, (tuple, list)) else (n,)) for n in (grid, block)]
    grid, block = [n + (1,) * (3 - len(n)) for n in (grid, block)]
    threads = int(np.prod(block))
    if min(grid) < 1 or min(block) < 1 or threads > 1024 or block[2] > 64 or grid[0] >= 2**31 or max(grid[1:]) > 65535:
        raise ValueError(f"no device accepts grid {grid} of blocks {block}")
    if kernel.required_threads and block != kernel.required_threads:
        raise ValueError(f"{kernel.name} needs blocks of {kernel.required_threads}, got {block}")
    if kernel.max_threads and threads > kernel.max_threads:
        raise ValueError(f"{kernel.name} takes blocks of at most {kernel.max_threads} threads, got {threads}")
    parameters = arguments if isinstance(arguments, (bytes, bytearray)) else kernel.pack(arguments)
    if len(parameters) != kernel.parameter_bytes:
        raise ValueError(f"{kernel.name} has {kernel.parameter_bytes} bytes of parameters, got {len(parameters)}")

    entries = [(base, size, state, name) for base, (size, state, name, _) in memory._buffers.items()]
    for name, array, space in kernel.module.buffers:
        state = np.full(array.size, INITIALISED | MEMBER | (WRITABLE if space == "global" else 0), np.uint8)
        entries.append((array.ctypes.data, array.size, state, name))
    entries = sorted((e for e in entries if e[1]), key=lambda e: e[0])
    rows = (native.BufferRow * max(len(entries), 1))()
    for row, (base, size, state, _) in zip(rows, entries):
        row.base, row.size, row.state = base, size, state.ctypes.data
    count = len(kernel.program.text)
    lanes, warps = np.zeros(count, np.uint64), np.zeros(count, np.uint64)
    row = native.LaunchRow(grid=grid, block=block, parameters=bytes(parameters), parameter_bytes=len(parameters),
                           static_shared=kernel.dynamic_base,
                           dynamic_shared=dynamic_shared, seed=seed, step_limit=step_limit, buffers=rows, buffer_count=len(entries),
                           lanes=lanes.ctypes.data, warps=warps.ctypes.data)
    native.library().ptx_launch(kernel.program.handle, ctypes.byref(row))
    if row.pc >= 0:
        number, pc = row.block_number, row.pc
        detail = row.detail.decode()
        detail = re.sub(r"buffer #(\d+)", lambda m: repr(entries[int(m[1])][3]), detail)
        raise Finding(row.kind.decode(), detail, kernel.name, kernel.program.text[pc], kernel.program.line[pc],
                      (number % grid[0], number // grid[0] % grid[1], number // grid[0] // grid[1]), row.warp, row.lane)
    buffers = {}
    for b, (base, _, _, name) in zip(rows, entries):
        values = dict(zip(native.TRAFFIC, map(int, b.traffic)))
        if base not in memory._buffers and not any(values.values()):
            continue  # a variable of the module that this kernel does not touch
        if name in buffers:
            values = {key: value + getattr(buffers[name], key) for key, value in values.items()}
        buffers[name] = Traffic(**values)
    return Report(kernel.program, lanes, warps, row.counters, buffers)
