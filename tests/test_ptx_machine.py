"""The PTX machine (tests/ptx) against plain statements of the ISA, and against kernels with one defect each."""

import math
import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch

import ptx
from ptx import native

pytestmark = pytest.mark.skipif(native.compiler() is None,
                                reason="the PTX machine needs a C++ compiler: neither $CXX nor g++ nor c++ is there")

HEADER = ".version 8.8\n.target sm_90\n.address_size 64\n"
WIDTHS = {"pred": 4, **{t: bits // 8 for t, bits in ptx.program.BITS.items() if t != "pred"}}
LANES = np.arange(32)


def module(body, registers="", parameters=("u64",), name="k", before=""):
    """A kernel of this body; ``p0``, ``p1``, ... are its parameters, ``%p<8>``, ``%h<16>``, ``%r<32>``, ``%rd<32>``, ``%f<32>`` and
    ``%d<8>`` its registers."""
    declared = ".reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .f32 %f<32>; .reg .f64 %d<8>;"
    formal = ", ".join(f".param .{t} p{i}" for i, t in enumerate(parameters))
    return ptx.Module(f"{HEADER}{before}\n.visible .entry {name}({formal})\n{{\n{declared}\n{registers}\n{body}\nret;\n}}\n").kernels[name]


def run(kernel, *arrays, grid=1, block=32, inputs=(), **options):
    """Launches with the addresses of numpy arrays; those in ``inputs`` (positions) are initialised, the others are results."""
    memory = ptx.Memory()
    arguments = []
    for i, a in enumerate(arrays):
        if isinstance(a, np.ndarray):
            memory.add(a, initialised=i in inputs, writable=i not in inputs, name=f"array {i}")
            arguments.append(a.ctypes.data)
        else:
            arguments.append(a)
    return ptx.launch(kernel, grid, block, arguments, memory, **options)


def elementwise(instruction, results, sources, values):
    """Runs ``instruction`` on each column of ``values``, arrays of raw bits for each of the types ``sources``.

    ``$0``, ``$1``, ... in it are first the results, then the sources. Raw bits of the results, one array for each.
    """
    count = len(values[0])
    registers, body = [], ["mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.s32 %r3, %r0, %r1, %r2;",
                           f"setp.ge.u32 %p0, %r3, {count}; @%p0 exit;"]
    names = []
    for i, t in enumerate([*results, *sources]):
        register = "pred" if t == "pred" else f"b{max(WIDTHS[t], 2) * 8}"
        registers.append(f".reg .{register} %x{i};")
        names.append(f"%x{i}")
        if i >= len(results):
            width = WIDTHS[t]
            body.append(f"ld.param.u64 %rd0, [p{i}]; mul.wide.u32 %rd1, %r3, {width}; add.s64 %rd2, %rd0, %rd1;")
            if t == "pred":
                body.append(f"ld.global.u32 %r4, [%rd2]; setp.ne.u32 %x{i}, %r4, 0;")
            else:
                body.append(f"ld.global.b{width * 8} %x{i}, [%rd2];")
    for i in reversed(range(len(names))):
        instruction = instruction.replace(f"${i}", names[i])
    body.append(instruction)
    for i, t in enumerate(results):
        width = WIDTHS[t]
        body.append(f"ld.param.u64 %rd0, [p{i}]; mul.wide.u32 %rd1, %r3, {width}; add.s64 %rd2, %rd0, %rd1;")
        if t == "pred":
            body.append(f"selp.u32 %r4, 1, 0, %x{i}; st.global.u32 [%rd2], %r4;")
        else:
            body.append(f"st.global.b{width * 8} [%rd2], %x{i};")
    kernel = module("\n".join(body), "\n".join(registers), ["u64"] * len(names))
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
    outputs = [np.zeros(count, unsigned[WIDTHS[t]]) for t in results]
    given = [np.ascontiguousarray(v, unsigned[WIDTHS[t]]) for t, v in zip(sources, values)]
    run(kernel, *outputs, *given, grid=-(-count // 128), block=128, inputs=range(len(results), len(names)))
    return outputs


# ---- whole numbers ------------------------------------------------------------------------------------------------------------------

def signed(x, bits):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def as_type(x, t):
    """Python's number for the raw bits of a whole number."""
    bits = int(t[1:])
    return signed(int(x), bits) if t[0] == "s" else int(x) & ((1 << bits) - 1)


def integers(t, count, rng):
    """Raw bits: special ones first, then random ones of every length."""
    bits = WIDTHS[t] * 8
    special = [0, 1, 2, 3, 7, 31, 32, 33, 63, 64, 255, 256, (1 << bits) - 1, (1 << bits) - 2, 1 << (bits - 1), (1 << (bits - 1)) - 1,
               0x55, 0xAA]
    values = [rng.integers(0, 2**63, dtype=np.uint64) * 2 + rng.integers(0, 2, dtype=np.uint64) for _ in range(count)]
    values = [int(v) >> int(rng.integers(0, bits)) for v in values]
    special = [s & ((1 << bits) - 1) for s in special]
    return special, [v & ((1 << bits) - 1) for v in values]


def cases(types, rng, count=512):
    """A column for each of the types: every pair of special values among the first two, then random ones."""
    pools = [integers(t, count, rng) if t != "pred" else ([0, 1], [int(x) for x in rng.integers(0, 2, count)]) for t in types]
    columns = [[] for _ in types]
    n = len(pools[0][0])
    for i in range(n):
        for j in range(n if len(types) > 1 else 1):
            for k, (special, values) in enumerate(pools):
                columns[k].append(special[i % len(special)] if k == 0 else special[j % len(special)] if k == 1
                                  else special[(i * 7 + j * 3) % len(special)])
    for k, (_, values) in enumerate(pools):
        columns[k] += values
    return [np.array(c, np.uint64) for c in columns]


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def popc(x):
    return bin(x).count("1")


def leading(x, bits, distance):
    x = ~x if x < 0 else x
    if not x:
        return 0xFFFFFFFF
    return bits - x.bit_length() if distance else x.bit_length() - 1


def bit_field(a, b, c, t):
    bits = int(t[1:])
    position, length = b & 255, c & 255
    raw = a & ((1 << bits) - 1)
    sign = 0 if t[0] == "u" or not length else raw >> min(position + length - 1, bits - 1) & 1
    return sum((raw >> position + i & 1 if i < length and position + i < bits else sign) << i for i in range(bits))


def insert_field(a, b, c, d, bits):
    position, length = c & 255, d & 255
    for i in range(length):
        if position + i < bits:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def permuted(a, b, c, mode):
    source = list(struct.pack("<II", a, b))
    s = c & 3
    pick = {"": None, ".f4e": [s, s + 1, s + 2, s + 3], ".b4e": [s % 8, (s - 1) % 8, (s - 2) % 8, (s - 3) % 8], ".rc8": [s] * 4,
            ".ecl": [max(s, i) for i in range(4)], ".ecr": [min(s, i) for i in range(4)], ".rc16": [s % 2 * 2, s % 2 * 2 + 1] * 2}[mode]
    if pick:
        return sum(source[k] << 8 * i for i, k in enumerate(pick))
    out = 0
    for i in range(4):
        selector = c >> 4 * i & 15
        byte = source[selector & 7]
        out |= (255 if byte & 128 else 0) << 8 * i if selector & 8 else byte << 8 * i
    return out


def funnel(a, b, c, left, clamp):
    n = min(c, 32) if clamp else c & 31
    return (b << 32 | a) << n >> 32 if left else (b << 32 | a) >> n


def nth_set(mask, base, offset):
    if base > 31:
        return None  # undefined
    if offset == 0:
        return base if mask >> base & 1 else 0xFFFFFFFF
    places = [k for k in (range(base, 32) if offset > 0 else range(base, -1, -1)) if mask >> k & 1]
    return places[abs(offset) - 1] if abs(offset) <= len(places) else 0xFFFFFFFF


def dot(a, b, c, types, half=None):
    pa, pb = ("<4B" if types[0] == "u" else "<4b"), ("<4B" if types[1] == "u" else "<4b")
    if half is None:
        return c + sum(x * y for x, y in zip(struct.unpack(pa, struct.pack("<I", a)), struct.unpack(pb, struct.pack("<I", b))))
    wide = struct.unpack("<2H" if types[0] == "u" else "<2h", struct.pack("<I", a))
    return c + sum(x * y for x, y in zip(wide, struct.unpack(pb, struct.pack("<I", b))[2 * half:]))


INTEGER = []
for _t in ("u16", "s16", "u32", "s32", "u64", "s64"):
    _bits, _double = int(_t[1:]), _t[0] + str(2 * int(_t[1:]))
    INTEGER += [
        (f"add.{_t}", _t, [_t, _t], lambda a, b: a + b),
        (f"sub.{_t}", _t, [_t, _t], lambda a, b: a - b),
        (f"mul.lo.{_t}", _t, [_t, _t], lambda a, b: a * b),
        (f"mul.hi.{_t}", _t, [_t, _t], lambda a, b, n=_bits: a * b >> n),
        (f"mad.lo.{_t}", _t, [_t, _t, _t], lambda a, b, c: a * b + c),
        (f"mad.hi.{_t}", _t, [_t, _t, _t], lambda a, b, c, n=_bits: (a * b >> n) + c),
        (f"div.{_t}", _t, [_t, _t], lambda a, b: truncated(a, b) if b else None),
        (f"rem.{_t}", _t, [_t, _t], lambda a, b: a - b * truncated(a, b) if b else None),
        (f"min.{_t}", _t, [_t, _t], min), (f"max.{_t}", _t, [_t, _t], max),
        (f"sad.{_t}", _t, [_t, _t, _t], lambda a, b, c: c + abs(a - b)),
        (f"shr.{_t}", _t, [_t, "u32"], lambda a, b: a >> b),
        *([(f"abs.{_t}", _t, [_t], abs), (f"neg.{_t}", _t, [_t], lambda a: -a)] if _t[0] == "s" else []),
        *([(f"mul.wide.{_t}", _double, [_t, _t], lambda a, b: a * b),
           (f"mad.wide.{_t}", _double, [_t, _t, _double], lambda a, b, c: a * b + c)] if _bits < 64 else []),
        *([(f"bfe.{_t}", _t, [_t, "u32", "u32"], lambda a, b, c, t=_t: bit_field(a, b, c, t)),
           (f"bfind.{_t}", "u32", [_t], lambda a, n=_bits: leading(a, n, False)),
           (f"bfind.shiftamt.{_t}", "u32", [_t], lambda a, n=_bits: leading(a, n, True))] if _bits > 16 else []),
    ]
for _t in ("b16", "b32", "b64"):
    _n = int(_t[1:])
    INTEGER += [
        (f"and.{_t}", _t, [_t, _t], lambda a, b: a & b), (f"or.{_t}", _t, [_t, _t], lambda a, b: a | b),
        (f"xor.{_t}", _t, [_t, _t], lambda a, b: a ^ b), (f"not.{_t}", _t, [_t], lambda a: ~a), (f"cnot.{_t}", _t, [_t], lambda a: a == 0),
        (f"shl.{_t}", _t, [_t, "u32"], lambda a, b: a << min(b, 64)), (f"shr.{_t}", _t, [_t, "u32"], lambda a, b: a >> b),
        (f"mov.{_t}", _t, [_t], lambda a: a), (f"selp.{_t}", _t, [_t, _t, "pred"], lambda a, b, p: a if p else b),
        (f"slct.{_t}.s32", _t, [_t, _t, "s32"], lambda a, b, c: a if c >= 0 else b),
        *([(f"popc.{_t}", "u32", [_t], popc), (f"clz.{_t}", "u32", [_t], lambda a, n=_n: n - a.bit_length()),
           (f"brev.{_t}", _t, [_t], lambda a, n=_n: int(f"{a:0{n}b}"[::-1], 2)),
           (f"bfi.{_t}", _t, [_t, _t, "u32", "u32"], lambda a, b, c, d, n=_n: insert_field(a, b, c, d, n))] if _n > 16 else []),
    ]
_clamp32 = lambda x: max(-2**31, min(2**31 - 1, x))  # noqa: E731
INTEGER += [
    ("add.sat.s32", "s32", ["s32", "s32"], lambda a, b: _clamp32(a + b)), ("sub.sat.s32", "s32", ["s32", "s32"],
                                                                           lambda a, b: _clamp32(a - b)),
    ("mul24.lo.u32", "u32", ["u32", "u32"], lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF)),
    ("mul24.hi.s32", "s32", ["s32", "s32"], lambda a, b: signed(a, 24) * signed(b, 24) >> 16),
    ("mul24.lo.s32", "s32", ["s32", "s32"], lambda a, b: signed(a, 24) * signed(b, 24)),
    ("mad24.lo.u32", "u32", ["u32", "u32", "u32"], lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c),
    *((f"lop3.b32 $0, $1, $2, $3, {lut};", "b32", ["b32", "b32", "b32"],
       lambda a, b, c, lut=lut: sum((lut >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i
                                    for i in range(32))) for lut in (0x80, 0x96, 0xE8, 0x1B)),
    *((f"prmt.b32{mode} $0, $1, $2, $3;", "b32", ["b32", "b32", "b32"], lambda a, b, c, mode=mode: permuted(a, b, c, mode))
      for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16")),
    *((f"shf.{side}.{mode}.b32", "b32", ["b32", "b32", "u32"], lambda a, b, c, side=side, mode=mode: funnel(a, b, c, side == "l",
        mode == "clamp"))
      for side in "lr" for mode in ("wrap", "clamp")),
    ("fns.b32", "b32", ["b32", "b32", "s32"], lambda a, b, c: nth_set(a, b, c)),
    *((f"dp4a.{x}32.{y}32", "b32", ["b32", "b32", "b32"], lambda a, b, c, x=x, y=y: dot(a, b, c, x + y)) for x in "us" for y in "us"),
    *((f"dp2a.{h}.{x}32.{y}32", "b32", ["b32", "b32", "b32"], lambda a, b, c, x=x, y=y, h=h: dot(a, b, c, x + y, h == "hi")) for x in "us"
      for y in "us" for h in ("lo", "hi")),
    ("szext.wrap.s32", "s32", ["s32", "u32"], lambda a, b: signed(a, b & 31) if b & 31 else 0),
    ("szext.clamp.u32", "u32", ["u32", "u32"], lambda a, b: a & ((1 << min(b, 32)) - 1)),
    ("bmsk.clamp.b32", "b32", ["u32", "u32"], lambda a, b: ((1 << min(b, 32)) - 1) << min(a, 64)),
    ("add.cc.u32 $0, $2, $3; addc.u32 $1, 0, 0;", ["u32", "u32"], ["u32", "u32"], lambda a, b: (a + b, a + b >> 32)),
    ("sub.cc.u32 $0, $2, $3; subc.u32 $1, 0, 0;", ["u32", "u32"], ["u32", "u32"], lambda a, b: (a - b, -(a < b))),
    ("add.cc.u64 $0, $2, $3; addc.u64 $1, $2, $3;", ["u64", "u64"], ["u64", "u64"], lambda a, b: (a + b, a + b + (a + b >> 64))),
    ("mad.lo.cc.u32 $0, $2, $3, $4; madc.hi.u32 $1, $2, $3, 5;", ["u32", "u32"], ["u32", "u32", "u32"],
     lambda a, b, c: (a * b + c, (a * b >> 32) + 5 + (((a * b & 0xFFFFFFFF) + c) >> 32))),
    ("mov.b64 $0, {$1, $2};", "b64", ["b32", "b32"], lambda a, b: b << 32 | a), ("mov.b64 {$0, $1}, $2;", ["b32", "b32"], ["b64"],
                                                                                 lambda a: (a, a >> 32)),
    ("mov.b32 $0, {$1, $2};", "b32", ["b16", "b16"], lambda a, b: b << 16 | a), ("mov.b32 {$0, $1}, $2;", ["b16", "b16"], ["b32"],
                                                                                 lambda a: (a, a >> 16)),
    ("mov.b64 {_, $0}, $1;", "b32", ["b64"], lambda a: a >> 32),
    *((f"{op}.pred $0, $1, $2;", "pred", ["pred", "pred"], f) for op, f in (("and", lambda a, b: a & b), ("or", lambda a, b: a | b),
                                                                            ("xor", lambda a, b: a ^ b))),
    ("not.pred $0, $1;", "pred", ["pred"], lambda a: 1 - a),
    *((f"cvt{sat}.{d}.{s}", d, [s], lambda a, d=d, sat=sat: a if not sat else max(-(1 << int(d[1:]) - 1) if d[0] == "s" else 0,
                                                                               min((1 << int(d[1:]) - (d[0] == "s")) - 1, a)))
      for sat in ("", ".sat") for d in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64") for s in ("u8", "s8", "u16", "s16", "u32",
          "s32", "u64", "s64") if d != s),
]


@pytest.mark.parametrize("text, result, sources, expected", INTEGER, ids=[i[0].split(" $")[0] for i in INTEGER])
def test_integer_instruction(text, result, sources, expected):
    rng = np.random.default_rng(1)
    columns = cases(sources, rng, 200)
    results = result if isinstance(result, list) else [result]
    if "$" not in text:
        text = text + " " + ", ".join(f"${i}" for i in range(len(results) + len(sources))) + ";"
    outputs = elementwise(text, results, sources, columns)
    for i, row in enumerate(zip(*columns)):
        want = expected(*(as_type(x, t) if t != "pred" else int(x) for x, t in zip(row, sources)))
        if want is None:
            continue
        for output, w, t in zip(outputs, want if isinstance(want, tuple) else (want,), results):
            assert int(output[i]) == int(w) & ((1 << WIDTHS[t] * 8) - 1), (text, [hex(int(x)) for x in row])


# ---- floating point -----------------------------------------------------------------------------------------------------------------
# The expected results are computed as fractions and rounded once.

FORMATS = {"f16": (11, -14, 16, 5), "bf16": (8, -126, 16, 8), "f32": (24, -126, 32, 8), "f64": (53, -1022, 64, 11),
           "tf32": (11, -126, 32, 8)}
NAN = float("nan")


def sign_of(x):
    """1.0 or -1.0, of a float or Fraction."""
    return math.copysign(1.0, x) if isinstance(x, float) else -1.0 if x < 0 else 1.0


def decoded(raw, t):
    """The number that bits mean: a Fraction, or an infinity, NaN or a zero with its sign, as a float."""
    precision, least, bits, exponent_bits = FORMATS[t]
    raw = int(raw)
    sign = -1 if raw >> (bits - 1) & 1 else 1
    mantissa_bits = bits - 1 - exponent_bits
    exponent, mantissa = raw >> mantissa_bits & ((1 << exponent_bits) - 1), raw & ((1 << mantissa_bits) - 1)
    if exponent == (1 << exponent_bits) - 1:
        return NAN if mantissa else sign * math.inf
    if not exponent and not mantissa:
        return sign * 0.0
    value = Fraction(mantissa, 1 << mantissa_bits) + (1 if exponent else 0)
    return sign * value * Fraction(2) ** (max(exponent - (1 << exponent_bits - 1) + 1, least) if exponent else least)


def encoded(x, t):
    """The bits of a number that the format holds exactly; the NaN of the ISA."""
    precision, least, bits, exponent_bits = FORMATS[t]
    mantissa_bits = bits - 1 - exponent_bits
    if x != x:
        return {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "tf32": 0x7FFFFFFF, "f64": None}[t]
    sign = (1 if sign_of(x) < 0 else 0) << bits - 1
    if x in (math.inf, -math.inf):
        return sign | ((1 << exponent_bits) - 1) << mantissa_bits
    x = abs(Fraction(x))
    if not x:
        return sign
    exponent = max(magnitude(x), least)
    mantissa = x / Fraction(2) ** exponent * (1 << mantissa_bits)
    assert mantissa.denominator == 1
    return sign | (int(mantissa) + ((exponent - least) << mantissa_bits))


def magnitude(x):
    """floor(log2(x))"""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def rounded(x, t, mode="rn", zero=0.0, flush=False):
    """A Fraction to a format. ``zero``: what an exact zero is."""
    if isinstance(x, float):
        return x
    if not x:
        return zero
    precision, least, bits, _ = FORMATS[t]
    quantum = Fraction(2) ** (max(magnitude(abs(x)), least) - precision + 1)
    y = x / quantum
    down, up = math.floor(y), math.ceil(y)
    toward_zero = down if x > 0 else up
    n = {"rn": round(y), "rz": toward_zero, "rm": down, "rp": up,
         "rna": int(sign_of(x)) * math.floor(abs(y) + Fraction(1, 2))}[mode]
    r, largest = n * quantum, (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** (1 - least)
    if not r:
        return sign_of(x) * 0.0
    if abs(r) > largest:
        beyond = mode in ("rn", "rna") or mode == ("rp" if x > 0 else "rm")
        return sign_of(x) * math.inf if beyond else int(sign_of(x)) * largest
    if flush and abs(r) < Fraction(2) ** least:
        return sign_of(x) * 0.0
    return r


def plus(a, b, mode):
    """The exact sum, and the zero that an exact zero is."""
    if isinstance(a, float) and a or isinstance(b, float) and b:  # infinities and NaN
        return float(a if isinstance(a, float) and a else 0.0) + float(b if isinstance(b, float) and b else 0.0), 0.0
    both = sign_of(a) < 0 and sign_of(b) < 0 and not a and not b
    either = -0.0 if both or (mode == "rm" and not (a == 0 and b == 0 and sign_of(a) > 0 and sign_of(b) > 0)) else 0.0
    return Fraction(a) + Fraction(b), either


def times(a, b):
    sign = sign_of(a) * sign_of(b)
    if any(isinstance(x, float) and x for x in (a, b)):
        return NAN if a == 0 or b == 0 or a != a or b != b else sign * math.inf
    return Fraction(a) * Fraction(b) or sign * 0.0


def over(a, b):
    sign = sign_of(a) * sign_of(b)
    if a != a or b != b or (a == 0 and b == 0) or (abs(a) == math.inf and abs(b) == math.inf):
        return NAN
    if abs(a) == math.inf or b == 0:
        return sign * math.inf
    if abs(b) == math.inf or a == 0:
        return sign * 0.0
    return Fraction(a) / Fraction(b)


def root(a):
    if a != a or a < 0:
        return NAN
    if isinstance(a, float):
        return a
    shift = 400
    n = math.isqrt((a.numerator << 2 * shift + 2400) // a.denominator)
    exact = n * n * a.denominator == a.numerator << 2 * shift + 2400
    return Fraction(2 * n + (0 if exact else 1), 1 << shift + 1201)  # a bit below every rounding stands for the rest


def smaller(a, b, nan, sign):
    if a != a or b != b:
        return NAN if nan or (a != a and b != b) else b if a != a else a
    if a == 0 and b == 0:
        return a if (sign_of(a) < 0) == (sign > 0) else b
    return a if sign * a <= sign * b else b


def floats(t, rng, count):
    precision, least, bits, exponent_bits = FORMATS[t]
    m = bits - 1 - exponent_bits
    one = ((1 << exponent_bits - 1) - 1) << m
    infinite = (1 << exponent_bits) - 1 << m
    special = [0, one, one + 1, one - 1, one + (1 << m), one + 3, 1, (1 << m) - 1, 1 << m, (1 << m) + 1, infinite - 1, infinite,
               infinite | 1 << m - 1, one + (m << m), one - (m << m)]
    special += [s | 1 << bits - 1 for s in special]
    random = []
    for _ in range(count):
        exponent = int(rng.integers(0, 1 << exponent_bits))
        if rng.random() < 0.7:  # mostly near 1, where results are neither huge nor tiny
            exponent = int(np.clip(rng.normal((1 << exponent_bits - 1) - 1, 6), 0, (1 << exponent_bits) - 2))
        random.append(int(rng.integers(0, 2)) << bits - 1 | exponent << m | int(rng.integers(0, 1 << m)))
    return special, random


def float_cases(types, rng, count=256):
    pools = [floats(t, rng, count) for t in types]
    columns = [[] for _ in types]
    n = len(pools[0][0])
    for i in range(n):
        for j in range(n if len(types) > 1 else 1):
            for k, (special, _) in enumerate(pools):
                columns[k].append(special[(i, j, i * 7 + j * 3)[k] % len(special)])
    for k, (_, values) in enumerate(pools):
        columns[k] += values
    return [np.array(c, np.uint64) for c in columns]


def flushed(x, flush, t="f32"):
    return sign_of(x) * 0.0 if flush and not isinstance(x, float) and abs(x) < Fraction(2) ** FORMATS[t][1] else x


def operation(name, t, mode, flush, arguments):
    """The exact result of an instruction, rounded once."""
    a, *rest = [flushed(x, flush, t) for x in arguments]
    if name in ("add", "sub"):
        x, zero = plus(a, rest[0] if name == "add" else -rest[0], mode)
        return rounded(x, t, mode, zero, flush)
    if name == "mul":
        return rounded(times(a, rest[0]), t, mode, flush=flush)
    if name == "fma":
        x, zero = plus(times(a, rest[0]), rest[1], mode)
        return rounded(x, t, mode, zero, flush)
    if name == "div":
        return rounded(over(a, rest[0]), t, mode, flush=flush)
    if name == "rcp":
        return rounded(over(1.0, a) if isinstance(a, float) else over(Fraction(1), a), t, mode, flush=flush)
    return rounded(root(a), t, mode, flush=flush)


FLOAT = [(name, t, mode, flush) for t in ("f32", "f64") for name in ("add", "sub", "mul", "fma", "div", "rcp", "sqrt") for mode in ("rn",
    "rz", "rm", "rp")
         for flush in ((False, True) if t == "f32" and mode in ("rn", "rz") else (False,))]
FLOAT += [(name, t, "rn", flush) for t in ("f16", "bf16") for name in ("add", "sub", "mul", "fma")
          for flush in ((False, True) if t == "f16" else (False,))]


def check(outputs, columns, sources, t, expected, text):
    for i, row in enumerate(zip(*columns)):
        given = [decoded(x, s) for x, s in zip(row, sources)]
        want = expected(*given)
        got = int(outputs[i])
        if want != want and t == "f64":
            assert decoded(got, t) != decoded(got, t), (text, [hex(int(x)) for x in row])
        else:
            assert got == encoded(want, t), (text, [hex(int(x)) for x in row], hex(got), hex(encoded(want, t)))


@pytest.mark.parametrize("name, t, mode, flush", FLOAT, ids=[f"{n}.{m}{'.ftz' if f else ''}.{t}" for n, t, m, f in FLOAT])
def test_float_instruction(name, t, mode, flush):
    count = {"fma": 3, "rcp": 1, "sqrt": 1}.get(name, 2)
    columns = float_cases([t] * count, np.random.default_rng(2))
    text = f"{name}.{mode}{'.ftz' if flush else ''}.{t} " + ", ".join(f"${i}" for i in range(count + 1)) + ";"
    output, = elementwise(text, [t], [t] * count, columns)
    check(output, columns, [t] * count, t, lambda *x: operation(name, t, mode, flush, x), text)


@pytest.mark.parametrize("t", ["f16", "bf16"])
@pytest.mark.parametrize("name, count", [("add", 2), ("mul", 2), ("fma", 3)])
def test_two_halves_in_a_register(name, count, t):
    rng = np.random.default_rng(3)
    low, high = float_cases([t] * count, rng), float_cases([t] * count, rng)
    high = [h[::-1] for h in high]
    output, = elementwise(f"{name}.rn.{t}x2 " + ", ".join(f"${i}" for i in range(count + 1)) + ";", ["b32"], ["b32"] * count,
                          [a | b << np.uint64(16) for a, b in zip(low, high)])
    for half, columns in ((output & 0xFFFF, low), (output >> 16, high)):
        check(half, columns, [t] * count, t, lambda *x: operation(name, t, "rn", False, x), name)


@pytest.mark.parametrize("name", ["add", "mul", "fma"])
def test_two_floats_in_a_register(name):
    count, rng = 3 if name == "fma" else 2, np.random.default_rng(3)
    low, high = float_cases(["f32"] * count, rng), float_cases(["f32"] * count, rng)
    output, = elementwise(f"{name}.rn.f32x2 " + ", ".join(f"${i}" for i in range(count + 1)) + ";", ["b64"], ["b64"] * count,
                          [a | b << np.uint64(32) for a, b in zip(low, high)])
    for half, columns in ((output & np.uint64(0xFFFFFFFF), low), (output >> np.uint64(32), high)):
        check(half, columns, ["f32"] * count, "f32", lambda *x: operation(name, "f32", "rn", False, x), name)


@pytest.mark.parametrize("t, nan", [("f64", ""), *((t, nan) for t in ("f32", "f16", "bf16") for nan in ("", ".NaN"))])
def test_min_and_max(t, nan):
    columns = float_cases([t, t], np.random.default_rng(4))
    for name, sign in (("min", 1), ("max", -1)):
        output, = elementwise(f"{name}{nan}.{t} $0, $1, $2;", [t], [t, t], columns)
        check(output, columns, [t, t], t, lambda a, b: smaller(a, b, nan, sign), name)
    if t == "f32":
        columns = float_cases([t, t, t], np.random.default_rng(4))
        output, = elementwise(f"max{nan}.f32 $0, $1, $2, $3;", [t], [t, t, t], columns)
        check(output, columns, [t, t, t], t, lambda a, b, c: smaller(smaller(a, b, nan, -1), c, nan, -1), "max of three")


def test_signs_and_saturation():
    columns = float_cases(["f32", "f32"], np.random.default_rng(5))
    a, b = (c.astype(np.uint32) for c in columns)
    output, = elementwise("copysign.f32 $0, $1, $2;", ["f32"], ["f32"] * 2, columns)
    assert np.array_equal(output, a & 0x80000000 | b & 0x7FFFFFFF)
    for text, want in (("abs.f32", lambda x: x if x != x else abs(x)), ("neg.f32", lambda x: x if x != x else -x)):
        output, = elementwise(text + " $0, $1;", ["f32"], ["f32"], columns[:1])
        check(output, columns[:1], ["f32"], "f32", want, text)
    saturated = lambda x: 0.0 if x != x or x <= 0 else min(x, Fraction(1))  # noqa: E731
    output, = elementwise("add.sat.f32 $0, $1, $2;", ["f32"], ["f32"] * 2, columns)
    check(output, columns, ["f32"] * 2, "f32", lambda x, y: saturated(operation("add", "f32", "rn", False, (x, y))), "add.sat")
    columns = float_cases(["f16"] * 3, np.random.default_rng(5))
    output, = elementwise("fma.rn.relu.f16 $0, $1, $2, $3;", ["f16"], ["f16"] * 3, columns)
    relu = lambda x: x if x != x or x > 0 else 0.0  # noqa: E731
    check(output, columns, ["f16"] * 3, "f16", lambda *x: relu(operation("fma", "f16", "rn", False, x)), "fma.relu")


@pytest.mark.parametrize("t", ["f16", "bf16"])
@pytest.mark.parametrize("name, count", [("add", 2), ("sub", 2), ("fma", 3)])
def test_mixed_precision(name, count, t):
    sources = [t] * (count - 1) + ["f32"]
    columns = float_cases(sources, np.random.default_rng(6))
    output, = elementwise(f"{name}.rn.f32.{t} " + ", ".join(f"${i}" for i in range(count + 1)) + ";", ["f32"], sources, columns)
    check(output, columns, sources, "f32", lambda *x: operation(name, "f32", "rn", False, x), name)


APPROXIMATE = {"rcp": lambda x: 1 / x, "sqrt": np.sqrt, "rsqrt": lambda x: 1 / np.sqrt(x), "sin": np.sin, "cos": np.cos, "lg2": np.log2,
               "ex2": np.exp2, "tanh": np.tanh}


@pytest.mark.parametrize("name, flush", [(name, flush) for name in APPROXIMATE for flush in (False, True) if (name, flush) != ("tanh", True)])
def test_approximate_function(name, flush):
    columns = float_cases(["f32"], np.random.default_rng(7), 2000)
    tiny = 2.0**-126
    with np.errstate(all="ignore"):
        x = columns[0].astype(np.uint32).view(np.float32).astype(np.float64)
        want = APPROXIMATE[name](np.where(flush & (np.abs(x) < tiny), np.copysign(0.0, x), x)).astype(np.float32)
        want = np.where(flush & (np.abs(want) < tiny), np.copysign(np.float32(0), want), want)
    output, = elementwise(f"{name}.approx{'.ftz' if flush else ''}.f32 $0, $1;", ["f32"], ["f32"], columns)
    got = output.view(np.float32)
    number = ~np.isnan(want)
    assert np.array_equal(~np.isnan(got), number) and np.array_equal(np.signbit(got[number]), np.signbit(want[number]))
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite & ~np.isnan(want)], want[~finite & ~np.isnan(want)])
    # NumPy's functions may be off by one.
    assert np.all(np.abs(got[finite].astype(np.float64) - want[finite]) <= np.spacing(np.abs(want[finite])))


def test_division_approximate():
    a = np.array([1, 6, 3e38, 1, np.inf, 5], np.float32)
    b = np.array([3, 4, 1e-3, 1.5e38, 1.5e38, np.inf], np.float32)
    raw = [x.view(np.uint32).astype(np.uint64) for x in (a, b)]
    with np.errstate(all="ignore"):
        exact = a / b
    full, = elementwise("div.full.f32 $0, $1, $2;", ["f32"], ["f32"] * 2, raw)
    assert np.array_equal(full.view(np.float32), exact)
    approximate, = elementwise("div.approx.f32 $0, $1, $2;", ["f32"], ["f32"] * 2, raw)
    assert np.array_equal(approximate.view(np.float32), [exact[0], exact[1], exact[2], 0, np.nan, 0], equal_nan=True)
    x = np.array([3.0, 0.1, -7e100, 2.0**-1030, 0.0])
    y = elementwise("rcp.approx.ftz.f64 $0, $1;", ["f64"], ["f64"], [x.view(np.uint64)])[0]
    assert np.all(y & np.uint64(0xFFFFFFFF) == 0)
    assert np.allclose(y.view(np.float64)[:3], 1 / x[:3], rtol=2e-6) and np.all(np.isinf(y.view(np.float64)[3:]))


COMPARISONS = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b, "lt": lambda a, b: a < b,
               "le": lambda a, b: a <= b,
               "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "num": lambda a, b: a == a and b == b,
               "nan": lambda a, b: a != a or b != b}
for _c in ("eq", "lt", "le", "gt", "ge"):
    COMPARISONS[_c + "u"] = lambda a, b, f=COMPARISONS[_c]: f(a, b) or a != a or b != b
COMPARISONS["neu"] = lambda a, b: a != b


@pytest.mark.parametrize("t", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_float_comparison(comparison, t):
    columns = float_cases([t, t], np.random.default_rng(8), 64)
    p, q = elementwise(f"setp.{comparison}.{t} $0|$1, $2, $3;", ["pred", "pred"], [t, t], columns)
    want = np.array([COMPARISONS[comparison](decoded(a, t), decoded(b, t)) for a, b in zip(*columns)])
    assert np.array_equal(p, want) and np.array_equal(q, ~want)
    if t in ("f32", "f64"):
        ones, = elementwise(f"set.{comparison}.u32.{t} $0, $1, $2;", ["u32"], [t, t], columns)
        assert np.array_equal(ones, np.where(want, 0xFFFFFFFF, 0))
    if t in ("f16", "bf16"):
        swapped = [a | b << np.uint64(16) for a, b in zip(columns, columns[::-1])]
        p, q = elementwise(f"setp.{comparison}.{t}x2 $0|$1, $2, $3;", ["pred", "pred"], ["b32", "b32"], swapped)
        exchanged = [COMPARISONS[comparison](decoded(b, t), decoded(a, t)) for a, b in zip(*columns)]
        assert np.array_equal(p, want) and np.array_equal(q, exchanged)
        pair, = elementwise(f"set.{comparison}.{t}x2.{t}x2 $0, $1, $2;", ["b32"], ["b32", "b32"], swapped)
        one = encoded(Fraction(1), t)
        assert np.array_equal(pair & 0xFFFF, np.where(want, one, 0)) and np.array_equal(pair >> 16, np.where(q, one, 0))


@pytest.mark.parametrize("t", ["u16", "s16", "u32", "s32", "u64", "s64", "b32"])
def test_integer_comparison(t):
    columns = cases([t, t, "pred"], np.random.default_rng(9))
    numbers = [[as_type(x, t) for x in c] for c in columns[:2]]
    for comparison in {"b": ("eq", "ne"), "s": ("eq", "ne", "lt", "le", "gt", "ge")}.get(t[0], ("eq", "ne", "lt", "ge", "lo", "ls", "hi",
        "hs")):
        plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(comparison, comparison)
        want = np.array([COMPARISONS[plain](a, b) for a, b in zip(*numbers)])
        c = columns[2].astype(bool)
        for boolean, combine in (("", lambda r: r), (".and", lambda r: r & c), (".or", lambda r: r | c), (".xor", lambda r: r ^ c)):
            extra = ", $4" if boolean else ""
            p, q = elementwise(f"setp.{comparison}{boolean}.{t} $0|$1, $2, $3{extra};", ["pred", "pred"], [t, t, "pred"], columns)
            assert np.array_equal(p, combine(want)) and np.array_equal(q, combine(~want)), (comparison, boolean)
        p, = elementwise(f"setp.{comparison}.and.{t} $0, $1, $2, !$3;", ["pred"], [t, t, "pred"], columns)
        assert np.array_equal(p, want & ~c)


@pytest.mark.parametrize("t", ["f32", "f64"])
def test_testp(t):
    columns = float_cases([t], np.random.default_rng(10))
    tests = {"finite": lambda x: abs(x) < math.inf, "infinite": lambda x: abs(x) == math.inf, "number": lambda x: x == x,
             "notanumber": lambda x: x != x,
             "normal": lambda x: x == x and abs(x) < math.inf and abs(x) >= Fraction(2) ** FORMATS[t][1],
             "subnormal": lambda x: 0 < abs(x) < Fraction(2) ** FORMATS[t][1]}
    for name, test in tests.items():
        p, = elementwise(f"testp.{name}.{t} $0, $1;", ["pred"], [t], columns)
        assert np.array_equal(p, [test(decoded(x, t)) for x in columns[0]]), name


TO_FLOAT = [(d, s, m) for d in ("f32", "f64", "f16", "bf16") for s in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
            for m in ("rn", "rz", "rm", "rp")]
NARROW = [("f32", "f64", m) for m in ("rn", "rz", "rm", "rp")] + [("tf32", "f32", "rna"), ("tf32", "f32", "rn")]
NARROW += [(d, s, m) for d in ("f16", "bf16") for s in ("f32", "f64") for m in ("rn", "rz")]
WIDEN = [("f64", "f32", ""), ("f32", "f16", ""), ("f32", "bf16", ""), ("f64", "f16", ""), ("f64", "bf16", "")]


@pytest.mark.parametrize("d, s, mode", TO_FLOAT)
def test_integer_to_float(d, s, mode):
    columns = cases([s], np.random.default_rng(11), 300)
    output, = elementwise(f"cvt.{mode}.{d}.{s} $0, $1;", [d], [s], columns)
    for raw, got in zip(columns[0], output):
        assert int(got) == encoded(rounded(Fraction(as_type(raw, s)), d, mode), d), hex(int(raw))


@pytest.mark.parametrize("d, s, mode", NARROW + WIDEN)
def test_float_to_float(d, s, mode):
    columns = float_cases([s], np.random.default_rng(12), 500)
    # Values halfway between two numbers of the target, and next to those.
    if mode and d != "f32":
        shift = {"f16": 13, "bf16": 16, "tf32": 13}[d] if s == "f32" else {"f16": 42, "bf16": 45}[d]
        middle = (columns[0] >> np.uint64(shift)) << np.uint64(shift) | np.uint64(1 << shift - 1)
        columns = [np.concatenate([columns[0], middle, middle + np.uint64(1), middle - np.uint64(1)])]
    output, = elementwise(f"cvt{'.' if mode else ''}{mode}.{d}.{s} $0, $1;", [d], [s], columns)
    check(output, columns, [s], d, lambda x: rounded(x, d, mode or "rn"), (d, s, mode))


@pytest.mark.parametrize("s", ["f32", "f64", "f16", "bf16"])
@pytest.mark.parametrize("d", ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"])
def test_float_to_integer(d, s):
    columns = float_cases([s], np.random.default_rng(13), 300)
    bits = int(d[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if d[0] == "s" else (0, (1 << bits) - 1)
    for mode, f in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)):
        output, = elementwise(f"cvt.{mode}.{d}.{s} $0, $1;", [d], [s], columns)
        for raw, got in zip(columns[0], output):
            x = decoded(raw, s)
            if x != x:
                want = 1 << bits - 1 if s == "f64" or bits == 64 else 0
            else:
                want = low if x == -math.inf else high if x == math.inf else max(low, min(high, f(x)))
            assert int(got) == want & (1 << bits) - 1, (mode, hex(int(raw)))


def test_other_conversions():
    columns = float_cases(["f32", "f32"], np.random.default_rng(14))
    for mode, f in (("rni", round), ("rzi", math.trunc), ("rmi", math.floor), ("rpi", math.ceil)):
        output, = elementwise(f"cvt.{mode}.f32.f32 $0, $1;", ["f32"], ["f32"], columns[:1])
        check(output, columns[:1], ["f32"], "f32", lambda x: x if isinstance(x, float) else Fraction(f(x)) or math.copysign(0.0, x), mode)
    output, = elementwise("cvt.sat.f32.f32 $0, $1;", ["f32"], ["f32"], columns[:1])
    check(output, columns[:1], ["f32"], "f32", lambda x: 0.0 if x != x or x <= 0 else min(x, Fraction(1)), "sat")
    for t in ("f16", "bf16"):
        output, = elementwise(f"cvt.rn.{t}x2.f32 $0, $1, $2;", ["b32"], ["f32", "f32"], columns)
        check(output >> 16, columns[:1], ["f32"], t, lambda x: rounded(x, t), "upper")
        check(output & 0xFFFF, columns[1:], ["f32"], t, lambda x: rounded(x, t), "lower")


def test_registers_wider_than_the_type():
    kernel = module("""ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
        ld.global.s8 %r0, [%rd0]; ld.global.u8 %rd2, [%rd0]; ld.global.s16 %rd3, [%rd0]; ld.global.s32 %rd4, [%rd0]; cvt.s8.s32 %r1, 200;
        st.global.u32 [%rd1], %r0; st.global.u64 [%rd1+8], %rd2; st.global.u64 [%rd1+16], %rd3; st.global.u64 [%rd1+24], %rd4;
        st.global.u32 [%rd1+4], %r1;
        st.global.u8 [%rd1+32], %r0; mov.b16 %h0, -2; st.global.u16 [%rd1+34], %h0;
        st.global.u32 [%rd1+36], -1;""", parameters=["u64", "u64"])
    given, out = np.array([-3], np.int32), np.zeros(40, np.uint8)
    run(kernel, given, out, block=1, inputs=[0])
    assert out[:8].view(np.int32).tolist() == [-3, -56] and out[8:32].view(np.int64).tolist() == [253, -3, -3]
    assert out[32] == 253 and out[34:36].view(np.int16)[0] == -2


# ---- across lanes -------------------------------------------------------------------------------------------------------------------

def lanes_apply(body, parameters, *arrays, inputs, **options):
    """A kernel of one warp: ``%r0`` is the lane, ``%rd0``, ``%rd1``, ... the addresses of its 8-byte element of each array."""
    prologue = ["mov.u32 %r0, %laneid;"]
    for i in range(len(arrays)):
        prologue.append(f"ld.param.u64 %rd{i}, [p{i}]; mad.wide.u32 %rd{i}, %r0, 8, %rd{i};")
    kernel = module("\n".join(prologue) + body, parameters=["u64"] * len(arrays))
    return run(kernel, *arrays, inputs=inputs, **options)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode):
    rng = np.random.default_rng(20)
    for trial in range(20):
        a = rng.integers(0, 2**32, 32, dtype=np.uint64)
        width = int(rng.choice([1, 2, 4, 8, 16, 32]))
        c = np.full(32, (32 - width) << 8 | (0 if mode == "up" else 31), np.uint64)
        b = rng.integers(0, 40, 32, dtype=np.uint64)
        out, inside = np.zeros(32, np.uint64), np.zeros(32, np.uint64)
        lanes_apply(f"""ld.global.u32 %r1, [%rd0]; ld.global.u32 %r2, [%rd1]; ld.global.u32 %r3, [%rd2];
            shfl.sync.{mode}.b32 %r4|%p0, %r1, %r2, %r3, 0xffffffff; selp.u32 %r5, 1, 0, %p0; cvt.u64.u32 %rd10, %r4;
            cvt.u64.u32 %rd11, %r5;
            st.global.u64 [%rd3], %rd10; st.global.u64 [%rd4], %rd11;""", 5, a, b, c, out, inside, inputs=[0, 1, 2])
        for lane in range(32):
            by, clamp, segment = int(b[lane]) & 31, int(c[lane]) & 31, int(c[lane]) >> 8 & 31
            last, first = (lane & segment) | (clamp & ~segment), lane & segment
            j = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[mode]
            good = j >= last if mode == "up" else j <= last
            assert inside[lane] == good and out[lane] == a[j if good else lane], (mode, width, lane)


def test_votes_matches_and_reductions():
    rng = np.random.default_rng(21)
    for trial in range(10):
        a = rng.integers(0, 4 if trial else 1, 32, dtype=np.uint64)
        out = [np.zeros(32, np.uint64) for _ in range(12)]
        half = trial % 2 == 1  # two halves of the warp vote apart
        body = f"""ld.global.u32 %r1, [%rd0]; ld.global.u64 %rd20, [%rd0]; setp.ne.u32 %p0, %r1, 0; mov.u32 %r2, 0xffffffff;
            {"setp.lt.u32 %p7, %r0, 16; selp.u32 %r2, 0xffff, 0xffff0000, %p7;" if half else ""}
            vote.sync.ballot.b32 %r3, %p0, %r2; vote.sync.all.pred %p1, %p0, %r2; vote.sync.any.pred %p2, !%p0, %r2;
            vote.sync.uni.pred %p3, %p0, %r2;
            selp.u32 %r4, 1, 0, %p1; selp.u32 %r5, 1, 0, %p2; selp.u32 %r6, 1, 0, %p3;
            match.any.sync.b32 %r7, %r1, %r2; match.all.sync.b64 %r8|%p4, %rd20, %r2; selp.u32 %r9, 1, 0, %p4;
            redux.sync.add.u32 %r10, %r1, %r2; sub.s32 %r20, %r1, 2; redux.sync.min.s32 %r11, %r20, %r2;
            redux.sync.max.u32 %r12, %r20, %r2; redux.sync.xor.b32 %r13, %r1, %r2;
            elect.sync %r14|%p5, %r2; selp.u32 %r15, 1, 0, %p5;"""
        for i, r in enumerate([3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 15]):
            body += f"cvt.u64.u32 %rd21, %r{r}; st.global.u64 [%rd{i + 1}], %rd21;"
        lanes_apply(body, 13, a, *out, inputs=[0])
        for group in ([range(16), range(16, 32)] if half else [range(32)]):
            x = [int(v) for v in a[list(group)]]
            bit = lambda f: sum(1 << lane for lane in group if f(int(a[lane])))  # noqa: E731
            less = [(v - 2) & 0xFFFFFFFF for v in x]
            for lane in group:
                same = bit(lambda v: v == int(a[lane]))
                one = all(v == x[0] for v in x)
                want = [bit(lambda v: v), all(x), not all(x), all(x) or not any(x), same, same if one else 0, one, sum(x),
                        min(v - 2 for v in x) & 0xFFFFFFFF, max(less), np.bitwise_xor.reduce(x), lane == group[0]]
                assert [int(o[lane]) for o in out] == [int(w) for w in want], lane


def test_lanes_that_diverge_come_together():
    out = np.zeros(32, np.uint64)
    lanes_apply("""mov.u32 %r1, 0; mov.u32 %r2, 0;
        LOOP: add.u32 %r1, %r1, 1; activemask.b32 %r3; popc.b32 %r4, %r3; add.u32 %r2, %r2, %r4; setp.lt.u32 %p0, %r1, %r0; @%p0 bra LOOP;
        setp.lt.u32 %p1, %r0, 7; @!%p1 bra OTHER; add.u32 %r2, %r2, 1000; bra.uni JOIN;
        OTHER: add.u32 %r2, %r2, 2000;
        JOIN: activemask.b32 %r3; popc.b32 %r4, %r3; mad.lo.u32 %r2, %r4, 10000, %r2; cvt.u64.u32 %rd1, %r2;
        st.global.u64 [%rd0], %rd1;""", 1, out, inputs=[])
    trips = np.maximum(LANES, 1)
    want = [320000 + (1000 if lane < 7 else 2000) + sum(int((trips >= k).sum()) for k in range(1, trips[lane] + 1)) for lane in range(32)]
    assert out.tolist() == want


def test_branch_table_and_function():
    before = """.func (.param .b32 result) twice(.param .b32 x, .param .align 4 .b8 y[8])
        { .reg .b32 %a<4>; .reg .pred %q; ld.param.u32 %a0, [x]; ld.param.u32 %a1, [y+4]; setp.gt.u32 %q, %a0, 20; @%q bra BIG;
          add.u32 %a2, %a0, %a0; add.u32 %a2, %a2, %a1; st.param.b32 [result], %a2; ret; BIG: st.param.b32 [result], 7; ret; }"""
    body = """ld.param.u64 %rd0, [p0]; mov.u32 %r0, %laneid; rem.u32 %r1, %r0, 3; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd0, %rd0, %rd1;
        TARGETS: .branchtargets A, B, C;
        brx.idx %r1, TARGETS;
        A: mov.u32 %r2, 100; bra JOIN; B: mov.u32 %r2, 200; bra JOIN; C: mov.u32 %r2, 300;
        JOIN: { .param .b32 param0; st.param.b32 [param0], %r0; .param .align 4 .b8 param1[8]; st.param.b32 [param1+4], %r2;
        .param .b32 back;
        call.uni (back), twice, (param0, param1); ld.param.b32 %r3, [back]; }
        st.global.u32 [%rd0], %r3;"""
    out = np.zeros(32, np.uint32)
    run(module(body, before=before), out)
    assert out.tolist() == [7 if lane > 20 else 2 * lane + (100, 200, 300)[lane % 3] for lane in range(32)]


# ---- memory -------------------------------------------------------------------------------------------------------------------------

def test_vectors_spaces_and_generic_addresses():
    before = """.const .align 4 .b32 table[4] = {10, 20, 30, 40}; .global .align 8 .u64 pointer = generic(word);
        .global .align 4 .u32 word = 77;
        .global .align 4 .f32 real[2] = {0f3F800000, 0f40000000};"""
    body = """.shared .align 16 .b8 tile[512]; .local .align 16 .b8 mine[32];
        ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 16; add.s64 %rd3, %rd0, %rd2;
        add.s64 %rd4, %rd1, %rd2;
        ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%r1, %r2, %r3, %r4}, [%rd3];
        mov.u64 %rd5, tile; add.s64 %rd6, %rd5, %rd2; st.shared.v2.b32 [%rd6], {%r4, %r3}; cvt.u32.u64 %r5, %rd6;
        st.shared::cta.v2.b32 [%r5+8], {%r2, %r1};
        bar.warp.sync 0xffffffff; cvta.shared.u64 %rd7, %rd6; ld.v4.b32 {%r6, %r7, %r8, %r9}, [%rd7];
        mov.u64 %rd8, mine; st.local.v4.u32 [%rd8], {%r6, %r7, %r8, %r9}; cvta.local.u64 %rd9, %rd8; ld.u32 %r10, [%rd9+4];
        cvta.to.local.u64 %rd10, %rd9; ld.local.v2.u64 {%rd11, %rd12}, [%rd10];
        cvt.u32.u64 %r11, %rd12; and.b32 %r12, %r0, 3; mul.wide.u32 %rd13, %r12, 4; mov.u64 %rd14, table; add.s64 %rd14, %rd14, %rd13;
        ld.const.u32 %r13, [%rd14]; ld.const.u32 %r14, [table+8];
        ld.global.u64 %rd15, [pointer]; ld.u32 %r15, [%rd15]; ld.global.f32 %f0, [real+4]; cvt.rzi.u32.f32 %r16, %f0;
        isspacep.shared %p0, %rd7; isspacep.local %p1, %rd9; isspacep.global %p2, %rd0; and.pred %p3, %p0, %p1; and.pred %p3, %p3, %p2;
        selp.u32 %r17, 1000, 0, %p3;
        add.u32 %r13, %r13, %r14; add.u32 %r13, %r13, %r15; add.u32 %r13, %r13, %r16; add.u32 %r13, %r13, %r17;
        st.global.v4.u32 [%rd4], {%r6, %r10, %r11, %r13};"""
    given, out = np.arange(128, dtype=np.uint32).reshape(32, 4), np.zeros((32, 4), np.uint32)
    run(module(body, parameters=["u64", "u64"], before=before), given, out, inputs=[0])
    want = np.stack([given[:, 3], given[:, 2], given[:, 1], np.array([10, 20, 30, 40])[LANES % 4] + 30 + 77 + 2 + 1000], 1)
    assert np.array_equal(out, want)


def test_parameters():
    kernel = module("""ld.param.u64 %rd0, [p0]; ld.param.u8 %h0, [p1]; ld.param.f32 %f0, [p2]; ld.param.f64 %d0, [p3];
        ld.param.s16 %r1, [p4]; mov.b64 %rd1, p3; ld.param.u32 %r2, [%rd1+4];
        cvt.u32.u16 %r0, %h0; st.global.u32 [%rd0], %r0; st.global.f32 [%rd0+4], %f0; st.global.f64 [%rd0+8], %d0;
        st.global.u32 [%rd0+16], %r1; st.global.u32 [%rd0+20], %r2;""",
                    parameters=["u64", "u8", "f32", "f64", "s16"])
    assert kernel.parameters == [(0, 8), (8, 1), (12, 4), (16, 8), (24, 2)] and kernel.parameter_bytes == 26
    out = np.zeros(6, np.uint32)
    run(kernel, out, 200, 1.5, 2.25, -3, block=1)
    assert out[0] == 200 and out[1:2].view(np.float32)[0] == 1.5 and out[2:4].view(np.float64)[0] == 2.25
    assert out[4:5].view(np.int32)[0] == -3 and out[5] == out[3]
    with pytest.raises(ValueError, match="takes 5 arguments, got 1"):
        run(kernel, out)


def test_special_registers():
    kernel = module("""ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %ctaid.x; mov.u32 %r3, %ctaid.z;
        mov.u32 %r4, %ntid.x; mov.u32 %r5, %nctaid.y;
        mad.lo.u32 %r6, %r1, %r4, %r0; mov.u32 %r9, %ntid.y; mul.lo.u32 %r10, %r4, %r9; mad.lo.u32 %r11, %r3, 2, %r2;
        mad.lo.u32 %r6, %r11, %r10, %r6; mul.wide.u32 %rd1, %r6, 4; add.s64 %rd0, %rd0, %rd1;
        mov.u32 %r12, %warpid; mov.u32 %r13, %laneid; mad.lo.u32 %r13, %r12, 100, %r13; mad.lo.u32 %r13, %r5, 10000, %r13;
        mov.u64 %rd5, %clock64; mov.u32 %r15, %lanemask_lt; popc.b32 %r16, %r15; mad.lo.u32 %r13, %r16, 100000, %r13;
        mov.u32 %r17, %ctaid.y; setp.eq.u32 %p0, %r17, 0; @%p0 st.global.u32 [%rd0], %r13;""")
    out = np.zeros(2 * 3 * 50, np.uint32)
    run(kernel, out, grid=(2, 4, 3), block=(10, 5), seed=3)
    thread = np.arange(50)
    assert np.array_equal(out.reshape(6, 50), np.tile(thread // 32 * 100 + thread % 32 * 100001 + 40000, (6, 1)))


ATOMIC = [("add", "u32", lambda a, b: a + b), ("add", "u64", lambda a, b: a + b), ("min", "s32", min), ("max", "s32", max),
          ("min", "u64", min), ("max", "u32", max),
          ("and", "b32", lambda a, b: a & b), ("or", "b64", lambda a, b: a | b), ("xor", "b32", lambda a, b: a ^ b),
          ("inc", "u32", lambda a, b: 0 if a >= b else a + 1), ("dec", "u32", lambda a, b: b if a == 0 or a > b else a - 1)]


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize("operation, t, f", ATOMIC, ids=[f"{o}.{t}" for o, t, _ in ATOMIC])
def test_atomic(operation, t, f, space):
    width = WIDTHS[t]
    given = np.random.default_rng(22).integers(0, 2**31, 32).astype(np.uint32 if width == 4 else np.uint64)
    total, old = np.zeros(1, given.dtype), np.zeros(32, given.dtype)
    r = "r" if width == 4 else "rd"
    bits = width * 8
    place = "%rd1" if space == "global" else "cell"
    kernel = module(f""".shared .align 8 .b64 cell; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2];
        mov.u32 %r0, %tid.x; mul.wide.u32 %rd3, %r0, {width};
        add.s64 %rd4, %rd0, %rd3; add.s64 %rd5, %rd2, %rd3; ld.global.b{bits} %{r}10, [%rd4]; setp.eq.u32 %p0, %r0, 0;
        {"@%p0 st.shared.b64 [cell], 0; bar.sync 0;" if space == "shared" else ""}
        atom.{space}.{operation}.{t} %{r}11, [{place}], %{r}10; st.global.b{bits} [%rd5], %{r}11;
        {f"bar.sync 0; ld.shared.b{bits} %{r}12, [cell]; @%p0 st.global.b{bits} [%rd1], %{r}12;" if space == "shared" else ""}""", parameters=["u64"] * 3)
    run_writable(kernel, given, total, old)
    value = 0
    for lane in range(32):
        assert int(old[lane]) == value & (1 << bits) - 1
        value = f(as_type(value, t) if t[0] in "us" else value, as_type(given[lane], t) if t[0] in "us" else int(given[lane]))
    assert int(total[0]) == value & (1 << bits) - 1


def run_writable(kernel, *arrays):
    memory = ptx.Memory()
    for a in arrays:
        memory.add(a)
    return ptx.launch(kernel, 1, 32, [a.ctypes.data for a in arrays], memory)


def test_other_atomics():
    f, h, c = np.zeros(2, np.float32), np.zeros(2, np.float16), np.zeros(4, np.uint32)
    kernel = module("""ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd2, [p2]; mov.u32 %r0, %laneid;
        cvt.rn.f32.u32 %f0, %r0; red.relaxed.gpu.global.add.f32 [%rd0], %f0;
        mov.b32 %r1, 0x3C003800; red.global.add.noftz.f16x2 [%rd1], %r1; atom.global.cas.b32 %r2, [%rd2], %r0, 5;
        atom.exch.b32 %r3, [%rd2+4], %r0; st.volatile.global.u32 [%rd2+8], %r0;
        fence.acq_rel.gpu; ld.acquire.gpu.global.u32 %r4, [%rd2+8]; membar.gl;""", parameters=["u64"] * 3)
    run_writable(kernel, f, h, c)
    assert f[0] == 496 and h.tolist() == [16, 32] and c.tolist() == [5, 31, 31, 0]


def test_asynchronous_copies():
    body = """.shared .align 16 .b8 tile[1024]; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; mov.u32 %r0, %tid.x;
        mul.wide.u32 %rd2, %r0, 16; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
        mov.u32 %r1, tile; shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; and.b32 %r4, %r0, 3; shl.b32 %r4, %r4, 2; setp.eq.u32 %p0, %r0, 9;
        cp.async.cg.shared.global.L2::128B [%r3], [%rd3], 16, %r4; cp.async.commit_group;
        cp.async.ca.shared.global [%r3+512], [%rd3+4], 4; cp.async.ca.shared.global [%r3+516], [%rd3], 4, %p0;
        cp.async.ca.shared.global [%r3+520], [%rd3+8], 8; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r3]; cp.async.wait_all;
        ld.shared.v4.u32 {%r14, %r15, %r16, %r17}, [%r3+512];
        xor.b32 %r10, %r10, %r14; xor.b32 %r11, %r11, %r15; xor.b32 %r12, %r12, %r16; xor.b32 %r13, %r13, %r17;
        st.global.v4.u32 [%rd4], {%r10, %r11, %r12, %r13};"""
    given, out = np.random.default_rng(23).integers(0, 2**32, (32, 4)).astype(np.uint32), np.zeros((32, 4), np.uint32)
    run(module(body, parameters=["u64", "u64"]), given, out, inputs=[0])
    first = given * (np.arange(4)[None] < (LANES % 4)[:, None])
    second = np.stack([given[:, 1], np.where(LANES == 9, 0, given[:, 0]), given[:, 2], given[:, 3]], 1)
    assert np.array_equal(out, first ^ second)


# ---- barriers -----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(4))
def test_barriers(seed):
    """Warps 0 and 1 produce for 2 and 3 through barriers of 128 threads, two of which only arrive; then a reduction over all."""
    body = """.shared .align 4 .b8 tile[256]; ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 63; shl.b32 %r2, %r1, 2;
        mov.u32 %r3, tile; add.u32 %r4, %r3, %r2; mov.u32 %r9, 0;
        mul.wide.u32 %rd1, %r0, 4; add.s64 %rd0, %rd0, %rd1; setp.lt.u32 %p0, %r0, 64; @!%p0 bra CONSUME;
        mul.lo.u32 %r5, %r1, 3; st.shared.u32 [%r4], %r5; bar.arrive 1, 128; bar.sync 2, 128; st.shared.u32 [%r4], %r1;
        bar.arrive 1, 128; bra DONE;
        CONSUME: xor.b32 %r6, %r2, 128; add.u32 %r6, %r3, %r6; bar.sync 1, 128; ld.shared.u32 %r7, [%r6]; bar.arrive 2, 128;
        bar.sync 1, 128; ld.shared.u32 %r8, [%r6]; mad.lo.u32 %r9, %r7, 1000, %r8;
        DONE: setp.ge.u32 %p1, %r0, 100; barrier.cta.red.popc.aligned.u32 %r10, 0, %p1; bar.red.and.pred %p2, 0, %p1;
        bar.red.or.pred %p3, 3, !%p1; selp.u32 %r11, 1, 0, %p2; selp.u32 %r12, 2, 0, %p3;
        add.u32 %r11, %r11, %r12; mad.lo.u32 %r9, %r10, 1000000, %r9; mad.lo.u32 %r9, %r11, 100000000, %r9; st.global.u32 [%rd0], %r9;"""
    out = np.zeros(128, np.uint32)
    run(module(body), out, block=128, seed=seed)
    other = np.arange(64) ^ 32
    want = 28 * 1000000 + 200000000 + np.concatenate([np.zeros(64, int), other * 3 * 1000 + other])
    assert np.array_equal(out, want)


# ---- matrices -----------------------------------------------------------------------------------------------------------------------

MMA = [("m16n8k16", "f32", "f16", 16), ("m16n8k8", "f32", "f16", 8), ("m16n8k16", "f32", "bf16", 16), ("m16n8k8", "f32", "bf16", 8),
       ("m16n8k8", "f32", "tf32", 8),
       ("m16n8k4", "f32", "tf32", 4), ("m16n8k16", "f16", "f16", 16), ("m16n8k8", "f16", "f16", 8), ("m16n8k32", "s32", "s8", 32),
       ("m16n8k16", "s32", "u8", 16),
       ("m8n8k4", "f64", "f64", 4), ("m16n8k8", "f64", "f64", 8), ("m16n8k16", "f64", "f64", 16)]


@pytest.mark.parametrize("shape, accumulator, t, depth", MMA)
def test_mma(shape, accumulator, t, depth):
    rng = np.random.default_rng(24)
    rows = 8 if shape.startswith("m8") else 16
    per = {"f16": 2, "bf16": 2, "tf32": 1, "s8": 4, "u8": 4, "f64": 1}[t]
    if t in ("s8", "u8"):
        a, b = (rng.integers(-128 if t == "s8" else 0, 128 if t == "s8" else 256, s) for s in ((rows, depth), (depth, 8)))
        c = rng.integers(-1000, 1000, (rows, 8))
    else:  # small whole numbers: every order of summation gives the same
        a, b, c = (rng.integers(-8, 9, s).astype(np.float64) for s in ((rows, depth), (depth, 8), (rows, 8)))
    raw = {"f16": lambda x: x.astype(np.float16).view(np.uint16), "bf16": lambda x: (x.astype(np.float32).view(np.uint32) >> 16),
           "tf32": lambda x: x.astype(np.float32).view(np.uint32) | 0x1FFF, "s8": lambda x: x.astype(np.int64) & 255, "u8": lambda x: x,
           "f64": lambda x: x.view(np.uint64)}[t]
    packed = lambda values: sum(int(v) << (64 if per == 1 else 32 // per) * i for i, v in enumerate(values))  # noqa: E731
    g, q = LANES // 4, LANES % 4
    blocks = rows // 8
    # The layouts of the ISA: row and column of each element of each register of each lane.
    a_registers = [[packed([raw(a)[g[n] + 8 * (r % blocks), q[n] * per + e + 4 * per * (r // blocks)] for e in range(per)])
                    for n in LANES] for r in range(rows * depth // 32 // per)]
    b_registers = [[packed([raw(b)[q[n] * per + e + 4 * per * r, g[n]] for e in range(per)]) for n in LANES]
                   for r in range(depth // 4 // per)]
    c_at = [[(g[n] + 8 * (i // 2), 2 * q[n] + i % 2) for n in LANES] for i in range(rows // 4)]
    if accumulator == "f16":
        c_raw = c.astype(np.float16).view(np.uint16)
        c_registers = [[int(c_raw[c_at[2 * r][n]]) | int(c_raw[c_at[2 * r + 1][n]]) << 16 for n in LANES] for r in range(2)]
    else:
        c_raw = {"f32": lambda: c.astype(np.float32).view(np.uint32), "s32": lambda: c.astype(np.int64) & 0xFFFFFFFF,
                 "f64": lambda: c.view(np.uint64)}[accumulator]()
        c_registers = [[int(c_raw[c_at[i][n]]) for n in LANES] for i in range(rows // 4)]
    wide = t == "f64"
    sizes = [len(c_registers), len(a_registers), len(b_registers), len(c_registers)]
    bits = 64 if wide else 32
    given = np.array([*a_registers, *b_registers, *c_registers], np.uint64).astype(np.uint64 if wide else np.uint32)
    out = np.zeros((len(c_registers), 32), given.dtype)
    body = [f".reg .b{bits} %m<{sum(sizes)}>; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; mov.u32 %r0, %laneid;",
            f"mul.wide.u32 %rd2, %r0, {bits // 8}; add.s64 %rd0, %rd0, %rd2; add.s64 %rd1, %rd1, %rd2;"]
    body += [f"ld.global.b{bits} %m{sizes[0] + i}, [%rd0+{i * 32 * bits // 8}];" for i in range(sum(sizes[1:]))]
    names, at = [], 0
    for size in sizes:
        names.append("{" + ", ".join(f"%m{at + i}" for i in range(size)) + "}")
        at += size
    body.append(f"mma.sync.aligned.{shape}.row.col.{accumulator}.{t}.{t}.{accumulator} {', '.join(names)};")
    body += [f"st.global.b{bits} [%rd1+{i * 32 * bits // 8}], %m{i};" for i in range(sizes[0])]
    run(module("\n".join(body), parameters=["u64", "u64"]), given, out, inputs=[0])
    want = a @ b + c
    for i in range(rows // 4):
        for n in LANES:
            if accumulator == "f16":
                got = np.array([out[i // 2, n] >> 16 * (i % 2) & 0xFFFF], np.uint16).view(np.float16)[0]
            else:
                got = out[i, n:n + 1].view({"f32": np.float32, "s32": np.int32, "f64": np.float64}[accumulator])[0]
            assert got == want[c_at[i][n]]


def test_mma_rounds_toward_zero():
    """1 + 2^-24 + ... in float32: nearest would stay or go up, the machine's sums only lose."""
    body = """ld.param.u64 %rd0, [p0]; mov.b32 %r1, 0x3F800000; mov.b32 %r2, 0x34000000; mov.f32 %f0, 0f3F800000; neg.f32 %f1, %f0;
        mov.b32 %r3, 0x33000000;
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f4, %f5, %f6, %f7}, {%r1, %r1, %r1, %r1}, {%r3, %r3}, {%f0, %f0, %f1, %f1};
        mov.u32 %r0, %laneid; mul.wide.u32 %rd1, %r0, 16; add.s64 %rd0, %rd0, %rd1; st.global.v4.f32 [%rd0], {%f4, %f5, %f6, %f7};"""
    out = np.zeros((32, 4), np.float32)
    run(module(body), out)
    below = np.nextafter(np.float32(1), np.float32(0))  # -1 + 2^-25 rounds toward zero at once, eight times
    assert np.all(out[:, :2] == 1) and np.all(out[:, 2:] > -1) and np.all(out[:, 2:] == -1 + 8 * (np.float32(1) - below))


@pytest.mark.parametrize("transposed", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    registers = "{" + ", ".join(f"%r{10 + i}" for i in range(count)) + "}"
    body = f""".shared .align 16 .b8 tile[2048]; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1]; ld.param.u64 %rd9, [p2];
        mov.u32 %r0, %laneid; mul.wide.u32 %rd2, %r0, 16; add.s64 %rd0, %rd0, %rd2; add.s64 %rd1, %rd1, %rd2; add.s64 %rd9, %rd9, %rd2;
        ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd0]; mov.u32 %r5, tile; shl.b32 %r6, %r0, 4; add.u32 %r7, %r5, %r6;
        st.shared.v4.u32 [%r7], {{%r1, %r2, %r3, %r4}}; bar.warp.sync -1;
        mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;
        ldmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 {registers}, [%r7];
        st.global.v4.u32 [%rd1], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1; stmatrix.sync.aligned.m8n8.x{count}{transposed}.shared.b16 [%r7+1024], {registers}; bar.warp.sync -1;
        setp.lt.u32 %p0, %r0, {8 * count};
        @%p0 ld.shared.v4.u32 {{%r1, %r2, %r3, %r4}}, [%r7+1024]; @%p0 st.global.v4.u32 [%rd9], {{%r1, %r2, %r3, %r4}};"""
    given = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    out, back = np.zeros((32, 4, 2), np.uint16), np.zeros((4, 8, 8), np.uint16)
    run(module(body, parameters=["u64"] * 3), given, out, back, inputs=[0])
    for k in range(count):
        matrix = given[k].T if transposed else given[k]
        assert np.array_equal(out[:, k], matrix.reshape(32, 2))
    assert np.array_equal(back[:count], given[:count])


# ---- defects ------------------------------------------------------------------------------------------------------------------------
# Each with its clean twin: "bad" stands where "good" does in the kernel. 64 threads; p0: 64 words to read, p1: 64 words to write.

START = """.shared .align 16 .b8 tile[512]; .local .align 16 .b8 mine[16]; ld.param.u64 %rd0, [p0]; ld.param.u64 %rd1, [p1];
        mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
    mov.u32 %r1, tile; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; xor.b32 %r4, %r2, 128; add.u32 %r4, %r1, %r4;
    setp.lt.u32 %p0, %r0, 32; setp.lt.u32 %p1, %r0, 8; setp.eq.u32 %p2, %r0, 0;
"""
SHUFFLE = "shfl.sync.bfly.b32 %r5, %r0, 1, 31, {};"
STORE = "st.global.u32 [%rd4], %r5;"
EXCHANGE = "st.shared.u32 [%r3], %r0; {} ld.shared.u32 %r5, [%r4]; " + STORE
DEFECTS = {
    "reads past the end": ("out-of-bounds", "ld.global.u32 %r5, [%rd3+{}]; " + STORE, "0", "4", "ld.global"),
    "writes before the beginning": ("out-of-bounds", "mov.u32 %r5, 1; st.global.u32 [%rd4{}], %r5;", "", "+-4", "st.global"),
    "a null pointer": ("out-of-bounds", "ld.global.u32 %r5, [{}]; " + STORE, "%rd3", "0", "ld.global"),
    "shared memory past its end": ("out-of-bounds", "st.shared.u32 [%r3+{}], %r0;", "256", "260", "st.shared"),
    "shared memory before its beginning": ("out-of-bounds", "st.shared.u32 [%r3+{}], %r0;", "0", "-4", "st.shared"),
    "local memory past its end": ("out-of-bounds", "mov.u64 %rd5, mine; st.local.u32 [%rd5+{}], %r0;", "12", "16", "st.local"),
    "a vector across the end": (
        "out-of-bounds", "and.b64 %rd6, %rd3, -8; ld.global.v2.u32 {{%r5, %r6}}, [%rd6+{}]; " + STORE,
        "0", "8", "ld.global.v2"),
    "a misaligned load": ("misaligned", "@%p1 ld.global.u32 %r5, [%rd3+{}];", "4", "2", "ld.global"),
    "a misaligned vector": ("misaligned", "@%p2 ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd0+{}];", "16", "8", "ld.global.v4"),
    "a misaligned store to shared memory": ("misaligned", "@%p2 st.shared.v2.u32 [tile+{}], {{%r5, %r6}};", "8", "4", "st.shared"),
    "a write to what is read-only": ("read-only", "mov.u32 %r5, 1; st.global.u32 [{}], %r5;", "%rd4", "%rd3", "st.global"),
    "global memory that nobody wrote": ("uninitialised", "ld.global.u32 %r5, [{}]; " + STORE, "%rd3", "%rd4", "ld.global"),
    "shared memory that nobody wrote": (
        "uninitialised", "@%p0 st.shared.u32 [%r3], %r0; @{} ld.shared.u32 %r5, [%r3];",
        "%p0", "!%p0", "ld.shared"),
    "local memory that nobody wrote": (
        "uninitialised", "mov.u64 %rd5, mine; st.local.u32 [%rd5], %r0; ld.local.u32 %r5, [%rd5+{}];",
        "0", "4", "ld.local"),
    "a partly written word": (
        "uninitialised", "st.shared.u16 [%r3], %r0; {} ld.shared.u32 %r5, [%r3];",
        "st.shared.u16 [%r3+2], %r0;", "", "ld.shared"),
    "an uninitialised value that a select discards": (
        "uninitialised", "{}ld.shared.u32 %r5, [%r3]; selp.b32 %r5, %r5, 0, %p1;",
        "st.shared.u32 [%r3], 0; ", "", "ld.shared"),
    "a missing barrier": ("shared-race", EXCHANGE, "bar.sync 0;", "", ("ld.shared", "st.shared")),
    "a barrier of a warp where one of the block is needed": (
        "shared-race", EXCHANGE,
        "bar.sync 0;", "bar.warp.sync -1;", ("ld.shared", "st.shared")),
    "a write after a read without a barrier": (
        "shared-race", "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r5, [%r4]; {} st.shared.u32 [%r3], %r5;",
        "bar.sync 0;", "", ("st.shared", "ld.shared")),
    "a second reader hides the first": (
        "shared-race", "@%p2 st.shared.u32 [tile], 1; bar.sync 0; ld.shared.u32 %r5, [tile]; {} @%p2 st.shared.u32 [tile], 2;",
        "bar.sync 0;", "", ("st.shared", "ld.shared")),
    "different values of two warps": (
        "shared-race", "and.b32 %r6, %r2, 124; add.u32 %r6, %r1, %r6; mov.u32 %r7, {}; st.shared.u32 [%r6], %r7;",
        "5", "%r0", "st.shared"),
    "readers of two equal writes": (
        "shared-race", "and.b32 %r6, %r2, 124; add.u32 %r6, %r1, %r6; st.shared.u32 [%r6], 5; {} ld.shared.u32 %r5, [%r6];",
        "bar.sync 0;", "", ("ld.shared", "st.shared")),
    "an atomic and a plain write": (
        "shared-race", "@%p2 st.shared.u32 [tile], 0; bar.sync 0; red.shared.add.u32 [tile], 1; {} @%p2 st.shared.u32 [tile], 2;",
        "bar.sync 0;", "", ("st.shared", "red.shared")),
    "a barrier that too few threads make wait": (
        "shared-race", "st.shared.u32 [%r3], %r0; bar.sync 1, {}; ld.shared.u32 %r5, [%r4];",
        "64", "32", ("ld.shared", "st.shared")),
    "arriving before writing": (
        "shared-race", "@%p0 bra A; {} bra.uni B; A: bar.sync 1, 64; ld.shared.u32 %r5, [%r4]; B:",
        "st.shared.u32 [%r3], 1; bar.arrive 1, 64;", "bar.arrive 1, 64; st.shared.u32 [%r3], 1;", ("ld.shared", "st.shared")),
    "two warps at one word": ("global-race", "{} st.global.u32 [%rd1], %r0;", "@%p2", "", "st.global"),
    "reading what another warp wrote": (
        "global-race",
        "xor.b32 %r6, %r2, 128; cvt.u64.u32 %rd6, %r6; add.s64 %rd6, %rd1, %rd6; st.global.u32 [%rd4], %r0; "
        "{} ld.global.u32 %r5, [%rd6];",
        "bar.sync 0;", "", ("ld.global", "st.global")),
    "a barrier in half a warp": (
        "divergent-barrier", "setp.lt.u32 %p3, %r0, {}; @%p3 bra A; bar.sync 0; bra B; A: bar.sync 0; B:",
        "32", "16", "bar.sync"),
    "a barrier that some lanes leave out": (
        "divergent-barrier", "setp.lt.u32 %p3, %r0, {}; @!%p3 bra A; bar.sync 0; A: bar.warp.sync -1;",
        "64", "40", "bar.sync"),
    "a shuffle after lanes have left": ("shuffle-absent-lane", "{}" + SHUFFLE.format("-1"), "", "@%p1 exit; ", "shfl.sync"),
    "a shuffle that some lanes go around": (
        "shuffle-absent-lane", "setp.lt.u32 %p3, %r0, {}; @!%p3 bra A; " + SHUFFLE.format("-1") + " A: bar.sync 0;",
        "64", "40", "shfl.sync"),
    "a mask without the lane itself": ("shuffle-absent-lane", SHUFFLE.replace("{}", "{}"), "-1", "0x7fffffff", "shfl.sync"),
    "a source that the mask does not name": (
        "shuffle-absent-lane", "@%p1 shfl.sync.idx.b32 %r5, %r0, {}, 31, 0xff;",
        "7", "8", "shfl.sync"),
    "a vote after lanes have left": ("absent-lane", "{}vote.sync.ballot.b32 %r5, %p0, -1;", "", "@%p1 exit; ", "vote.sync"),
    "a matrix product in part of a warp": (
        "absent-lane",
        "st.shared.v4.u32 [tile], {{1, 2, 3, 4}}; bar.sync 0; {} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [tile];",
        "", "@%p1 exit;", "ldmatrix"),
    "a copy that is not waited for": (
        "async-copy-unwaited", "cp.async.ca.shared.global [%r3], [%rd3], 4; {} ld.shared.u32 %r5, [%r3];",
        "cp.async.wait_all;", "", "ld.shared"),
    "a copy whose wait is one group short": (
        "async-copy-unwaited",
        "cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.commit_group; cp.async.wait_group {}; ld.shared.u32 %r5, [%r3];",
        "0", "1", "ld.shared"),
    "a wait for copies that were not committed": (
        "async-copy-unwaited", "cp.async.ca.shared.global [%r3], [%rd3], 4; {} cp.async.wait_group 0; ld.shared.u32 %r5, [%r3];",
        "cp.async.commit_group;", "", "ld.shared"),
    "a copy into what another warp reads": (
        "shared-race", "st.shared.u32 [%r3], 1; bar.sync 0; ld.shared.u32 %r5, [%r4]; {} cp.async.ca.shared.global [%r3], [%rd3], 4;",
        "bar.sync 0;", "", ("cp.async", "ld.shared", "async")),
    "another warp's copy without a barrier": (
        "shared-race", "cp.async.ca.shared.global [%r3], [%rd3], 4; cp.async.wait_all; {} ld.shared.u32 %r5, [%r4];",
        "bar.sync 0;", "", "ld.shared"),
    "a barrier that nobody comes to": ("deadlock", "@%p0 bar.sync 1, {};", "32", "64", "bar.sync"),
    "two warps at two barriers": ("deadlock", "@%p0 bra A; bar.sync {}; bra B; A: bar.sync 1; B:", "1", "2", "bar.sync"),
    "a trap": ("trap", "@{} trap;", "!%p6", "%p6", "trap"),
    "an endless loop": ("step-limit", "mov.u32 %r5, 3; A: sub.u32 %r5, %r5, {}; setp.ne.u32 %p3, %r5, 0; @%p3 bra A;", "1", "0", ""),
}


def launch_defect(body, seed):
    given, out = torch.arange(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    memory = ptx.Memory()
    memory.add(given, writable=False, name="given")
    memory.add(out, initialised=False, name="out")
    kernel = module(START + "setp.eq.u32 %p6, %r0, %r0;\n" + body, parameters=["u64", "u64"])
    return ptx.launch(kernel, 1, 64, [given, out], memory, seed=seed, step_limit=10**7)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name, seed):
    kind, body, good, bad, instructions = DEFECTS[name]
    launch_defect(body.format(good), seed)
    with pytest.raises(ptx.Finding) as caught:
        launch_defect(body.format(bad), seed)
    finding = caught.value
    # Either of two accesses that are not ordered may come second, and a racing read may come before the first write.
    others = {"shared-race": ("uninitialised",), "global-race": ("uninitialised",)}.get(kind, ())
    if name == "a copy into what another warp reads":
        others = ("async-copy-unwaited",)
    assert finding.kind in (kind, *others)
    assert any(i in finding.instruction for i in ([instructions] if isinstance(instructions, str) else instructions))
    assert finding.instruction in str(finding) and f"line {finding.line}" in str(finding) and finding.kind in str(finding)
    assert finding.block == (0, 0, 0) and 0 <= finding.warp < 2 and -1 <= finding.lane < 32


def test_equal_writes_are_counted():
    _, body, good, *_ = DEFECTS["different values of two warps"]
    assert launch_defect(body.format(good), 0).redundant_writes == 32 * 4
    # Eight lanes of each warp, and each of them twice.
    body = "and.b32 %r6, %r2, 12; add.u32 %r6, %r1, %r6; st.shared.u32 [%r6], 5; mov.u32 %r7, {}; st.shared.u32 [%r6], %r7;"
    for seed in range(3):
        launch_defect(body.format(5), seed)
        with pytest.raises(ptx.Finding, match="shared-race"):
            launch_defect(body.format(6), seed)


def test_a_warp_that_waits_for_another():
    launch_defect("""@%p2 st.shared.u32 [tile], 0; bar.sync 0; @%p0 bra A; fence.acq_rel.cta; st.volatile.shared.u32 [tile], 1; bra B;
        A: ld.volatile.shared.u32 %r5, [tile]; setp.eq.u32 %p3, %r5, 0; @%p3 bra A; B:""", 0)


def test_finding_names_the_place():
    with pytest.raises(ptx.Finding) as caught:
        launch_defect("\n\nld.global.u32 %r5, [%rd3+128];", 0)
    finding = caught.value
    assert (finding.kind, finding.instruction, finding.warp, finding.lane) == ("out-of-bounds", "ld.global.u32 %r5, [%rd3+128];", 1, 0)
    assert str(finding) == ("out-of-bounds in k: read of 4 bytes 0 bytes past the end of 'given': 'ld.global.u32 %r5, [%rd3+128];' "
                            f"(line {finding.line}), block (0, 0, 0), warp 1, lane 0")


def test_races_between_blocks():
    body = "ld.param.u64 %rd0, [p0]; mov.u32 %r0, %ctaid.x; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1; {}"
    for good, bad in (("st.global.u32 [%rd2], %r0;", "st.global.u32 [%rd0], %r0;"),
                      ("ld.global.u32 %r1, [%rd0];", "ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd2], %r1;"),
                      ("red.global.add.u32 [%rd0], 1;", "red.global.add.u32 [%rd0], 1; ld.global.u32 %r1, [%rd0];")):
        for seed in range(3):
            data = torch.zeros(4, dtype=torch.int32)
            memory = ptx.Memory()
            memory.add(data)
            ptx.launch(module(body.format(good)), 4, 1, [data], memory, seed=seed)
            with pytest.raises(ptx.Finding, match="global-race"):
                ptx.launch(module(body.format(bad)), 4, 1, [data], memory, seed=seed)


def test_views_of_a_storage():
    """Gaps between the elements of a view are neither read nor written; several views add up."""
    kernel = module("""ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd0, %rd0, %rd1;
        ld.global.u32 %r1, [%rd0]; add.u32 %r1, %r1, 1; st.global.u32 [%rd0], %r1;""")
    write = module("ld.param.u64 %rd0, [p0]; st.global.u32 [%rd0+8], 1;")
    storage = torch.zeros(4, 4, dtype=torch.int32)
    memory = ptx.Memory()
    memory.add(storage[:, :2], name="left")
    ptx.launch(kernel, 1, 2, [storage], memory)
    with pytest.raises(ptx.Finding, match="uninitialised"):
        ptx.launch(kernel, 1, 3, [storage], memory)
    with pytest.raises(ptx.Finding, match="out-of-bounds.*no element of the tensor"):
        ptx.launch(write, 1, 1, [storage], memory)
    memory.add(storage[:, 2:].t(), initialised=False)
    ptx.launch(write, 1, 1, [storage], memory)
    ptx.launch(kernel, 1, 3, [storage], memory)  # what a launch wrote is initialised for the next one
    assert memory.initialised(storage)[0].all(-1).tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="overlap"):
        memory.allocate(storage.data_ptr() + 8, 4)


def test_memory_that_is_given_again():
    """What an allocator gave may be freed, and part of it given for something else: nobody wrote there yet."""
    kernel = module("ld.param.u64 %rd0, [p0]; ld.global.u32 %r1, [%rd0]; st.global.u32 [%rd0+4], %r1;")
    storage = torch.zeros(8, dtype=torch.int32)
    memory = ptx.Memory()
    memory.allocate(storage.data_ptr(), 32, initialised=True)
    ptx.launch(kernel, 1, 1, [storage], memory)
    memory.allocate(storage.data_ptr() + 8, 8)
    with pytest.raises(ptx.Finding, match="uninitialised"):
        ptx.launch(kernel, 1, 1, [storage[2:]], memory)
    with pytest.raises(ptx.Finding, match="out-of-bounds"):
        ptx.launch(kernel, 1, 1, [storage], memory)


# ---- order, limits, errors ----------------------------------------------------------------------------------------------------------

def test_seeds_choose_the_order_and_nothing_else():
    kernel = module("""ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 128, %r0;
        mul.wide.u32 %rd1, %r2, 4; add.s64 %rd2, %rd0, %rd1; mov.u32 %r4, 3;
        A: atom.global.add.u32 %r3, [%rd0+4096], 1; sub.u32 %r4, %r4, 1; setp.ne.u32 %p0, %r4, 0; @%p0 bra A;
        st.global.u32 [%rd2], %r3;""")

    def order(seed):
        data = torch.zeros(1025, dtype=torch.int32)
        memory = ptx.Memory()
        memory.add(data)
        ptx.launch(kernel, 8, 128, [data], memory, seed=seed)
        assert data[1024] == 3 * 1024
        return tuple(data[:1024].tolist())

    assert all(order(seed) == order(seed) for seed in range(4)) and len({order(seed) for seed in range(4)}) == 4
    in_order = order(0)
    assert sorted(in_order) == list(in_order)


@pytest.mark.parametrize("text, message", [
    ("tcgen05.alloc.sync.b32 [%r0], 32;", "^line 9: .*tcgen05"), ("wgmma.fence.sync.aligned;", "wgmma"),
    ("add.u32.odd %r0, %r0, %r0;", "add.u32.odd"), ("add.foo.f32 %f0, %f0, %f0;", "modifier .foo"),
    ("ld.global.b128 %r0, [%rd0];", "b128"), ("ld.global.u64 %r0, [%rd0];", "expected 64"),
    ("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32 {%r0}, {%r0}, {%r0}, {%r0};", "mma"),
    ("cp.async.bulk.commit_group;", "cp.async.bulk"), ("add.s32 %r0, %r0, %nothing;", "operand '%nothing'"),
    ("bra NOWHERE;", "no label NOWHERE"), ("call.uni stranger, ();", "a call of this kind"),
    ("mov.u32 %r0, %cluster_ctaid.x;", "cluster_ctaid"), ("cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;", "e4m3x2"),
    ("min.u32 %r0, %r1;", "2 operands, expected 3"), ("div.f32 %f0, %f0, %f0;", "rounding")])
def test_unknown_instruction(text, message):
    with pytest.raises(ptx.UnknownInstruction, match=message):
        module(text)


def test_what_no_device_accepts():
    kernel = ptx.Module(HEADER + ".visible .entry k() .maxntid 64, 1, 1 { ret; } .visible .entry j() .reqntid 32 { ret; }").kernels
    assert (kernel["k"].max_threads, kernel["j"].max_threads) == (64, 32)
    ptx.launch(kernel["k"], 1, 64, b"", ptx.Memory())
    for k, grid, block in (("k", 1, 65), ("j", 1, 31), ("k", 0, 1), ("k", (1, 65536), 1), ("k", 1, 2000)):
        with pytest.raises(ValueError):
            ptx.launch(kernel[k], grid, block, b"", ptx.Memory())


# ---- counters -----------------------------------------------------------------------------------------------------------------------

def count(body, block=32, grid=1, elements=4096, **options):
    data = torch.zeros(elements + 8, dtype=torch.int32)
    skew = -data.data_ptr() % 32 // 4
    data = data[skew:skew + elements]
    memory = ptx.Memory()
    memory.add(data, name="data")
    kernel = module("ld.param.u64 %rd0, [p0]; mov.u32 %r0, %tid.x;" + body)
    return ptx.launch(kernel, grid, block, [data], memory, **options)


@pytest.mark.parametrize("stride, offset, bytes, sectors, ideal, unique", [
    (4, 0, 4, 4, 4, 128), (4, 4, 4, 5, 4, 128), (8, 0, 4, 8, 4, 128), (32, 0, 4, 32, 4, 128), (128, 0, 4, 32, 4, 128), (0, 0, 4, 1, 1, 4),
    (16, 0, 16, 16, 16, 512), (2, 0, 2, 2, 2, 64), (12, 0, 4, 12, 4, 128)])
def test_sectors(stride, offset, bytes, sectors, ideal, unique):
    registers = {2: "%h0", 4: "%r2", 16: "{%r2, %r3, %r4, %r5}"}[bytes]
    kind = {2: "b16", 4: "b32", 16: "v4.b32"}[bytes]
    report = count(f"mul.wide.u32 %rd1, %r0, {stride}; add.s64 %rd2, %rd0, %rd1; ld.global.{kind} {registers}, [%rd2+{offset}];")
    assert (report.sectors_read, report.ideal_sectors_read, report.requests_read) == (sectors, ideal, 1)
    assert (report.global_read, report.unique_read) == (32 * bytes, unique)
    assert report.unique_sectors_read == sectors and report.global_written == report.sectors_written == 0
    assert report.buffers["data"].sectors_read == sectors


def test_unique_bytes_of_a_launch():
    report = count("""mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1; ld.global.u32 %r1, [%rd2]; ld.global.u32 %r2, [%rd0];
        mov.u32 %r3, %ctaid.x; mul.wide.u32 %rd3, %r3, 128; add.s64 %rd2, %rd2, %rd3; st.global.u32 [%rd2+1024], %r1;""", grid=3)
    assert (report.global_read, report.unique_read, report.sectors_read) == (3 * 256, 128, 3 * 5)
    assert (report.global_written, report.unique_written, report.unique_sectors_written, report.requests_written) == (384, 384, 12, 3)


@pytest.mark.parametrize("stride, bytes, transactions, fewest", [
    (4, 4, 1, 1), (8, 4, 2, 1), (128, 4, 32, 1), (132, 4, 1, 1), (12, 4, 1, 1), (0, 4, 1, 1), (2, 2, 1, 1), (64, 4, 16, 1), (8, 8, 2, 2),
    (16, 8, 4, 2), (16, 16, 4, 4), (32, 16, 8, 4), (0, 16, 4, 4), (144, 16, 4, 4)])
def test_bank_conflicts(stride, bytes, transactions, fewest):
    registers = {2: "%h0", 4: "%r2", 8: "{%r2, %r3}", 16: "{%r2, %r3, %r4, %r5}"}[bytes]
    kind = {2: "b16", 4: "b32", 8: "v2.b32", 16: "v4.b32"}[bytes]
    report = count(f""".shared .align 16 .b8 tile[8192]; mov.u32 %r10, tile; mad.lo.u32 %r10, %r0, {stride}, %r10; mov.u32 %r2, 1;
        mov.u32 %r3, 1; mov.u32 %r4, 1; mov.u32 %r5, 1; mov.b16 %h0, 1; st.shared.{kind} [%r10], {registers};""")
    assert (report.shared_requests, report.shared_transactions, report.shared_ideal_transactions) == (1, transactions, fewest)
    assert report.bank_conflicts == transactions - fewest and report.shared_written == 32 * bytes


def test_instructions():
    report = count("""mov.u32 %r1, 0; setp.lt.u32 %p0, %r0, 5; @%p0 add.u32 %r1, %r1, 1; A: add.u32 %r1, %r1, 1;
        setp.lt.u32 %p1, %r1, 4; @%p1 bra A; fma.rn.f32 %f0, %f0, %f0, %f0; bar.sync 0;""", block=64)
    # Lanes 0 to 4 go round three times, the others four; the last branch is the ret.
    adds = 5 + 5 * 3 + 59 * 4
    assert report.by_class == {"parameter_load": 64, "move": 128, "integer": adds, "predicate": 64 + adds - 5,
                               "branch": (adds - 5 - 64) + 64, "fma": 64, "barrier": 64}
    assert report.instructions == sum(report.by_class.values()) and report.barriers == 2
    assert "bra A" in report.hottest()


# ---- kernels that nvcc and Triton compile -------------------------------------------------------------------------------------------

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <mma.h>
extern "C" __global__ void add(const float* a, const float* b, float* c, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}
extern "C" __global__ void block_sum(const double* a, double* out, int n) {
  __shared__ double parts[32];
  double sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += exp(a[i]) / sqrt(a[i]);
  for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0;
    for (int k = 16; k; k >>= 1) sum += __shfl_down_sync(~0u, sum, k);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}
extern "C" __global__ void __launch_bounds__(256) matmul(const float* a, const float* b, float* c, int n) {
  __shared__ float x[2][16][64], y[2][16][64];
  float sums[4][4] = {};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, row = blockIdx.y * 64, column = blockIdx.x * 64;
  auto fetch = [&](int k, int stage) {
    for (int i = threadIdx.x; i < 1024; i += 256) x[stage][i % 16][i / 16] = a[(row + i / 16) * n + k + i % 16];
    __pipeline_memcpy_async(&y[stage][threadIdx.x / 16][threadIdx.x % 16 * 4], &b[(k + threadIdx.x / 16) * n + column + threadIdx.x % 16 * 4], 16);
    __pipeline_commit();
  };
  fetch(0, 0);
  for (int k = 0; k < n; k += 16) {
    const int stage = k / 16 % 2;
    __pipeline_wait_prior(0);
    __syncthreads();
    if (k + 16 < n) fetch(k + 16, !stage);
    for (int d = 0; d < 16; ++d)
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sums[i][j] += x[stage][d][ty * 4 + i] * y[stage][d][tx * 4 + j];
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) c[(row + ty * 4 + i) * n + column + tx * 4 + j] = sums[i][j];
}
template <typename T, typename U> __device__ void tile(const T* a, const T* b, U* c) {
  using namespace nvcuda::wmma;
  fragment<matrix_a, 16, 16, 16, T, row_major> x;
  fragment<matrix_b, 16, 16, 16, T, col_major> y;
  fragment<accumulator, 16, 16, 16, U> z;
  fill_fragment(z, U(0));
  load_matrix_sync(x, a, 16), load_matrix_sync(y, b, 16);
  mma_sync(z, x, y, z), mma_sync(z, x, y, z);
  store_matrix_sync(c, z, 16, mem_row_major);
}
extern "C" __global__ void wmma_half(const __half* a, const __half* b, float* c) { tile(a, b, c); }
extern "C" __global__ void wmma_bfloat(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) { tile(a, b, c); }
extern "C" __global__ void softmax(const __half* x, __nv_bfloat16* out, int n) {
  extern __shared__ float row[];
  float m = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) m = fmaxf(m, row[i] = __half2float(x[blockIdx.x * n + i]));
  m = __reduce_max_sync(~0u, __float_as_int(m + 1000.f)) ? m : m;
  for (int k = 16; k; k >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, k));
  for (int i = threadIdx.x; i < n; i += 32) sum += row[i] = expf(row[i] - m);
  for (int k = 16; k; k >>= 1) sum += __shfl_xor_sync(~0u, sum, k);
  for (int i = threadIdx.x; i < n; i += 32) out[blockIdx.x * n + i] = __float2bfloat16(row[i] / sum);
}
struct Box { float scale; short shift[3]; const int* from; };
extern "C" __global__ void box(Box b, long long* out, int n) {
  long long local[8];
  for (int i = 0; i < 8; ++i) local[i] = (long long)b.from[(threadIdx.x + i) % n] * b.from[i] / (b.shift[i % 3] + 7);
  const long long wave = (long long)(sin(1e9 * (threadIdx.x + 1)) * 1e6);  // an argument that needs the slow reduction
  out[threadIdx.x] = local[(threadIdx.x * 5 + n) % 8] % 1000003 + (long long)floorf(b.scale * threadIdx.x) + wave;
}
"""


@pytest.fixture(scope="module", params=["sm_80", "sm_90", "sm_120"])
def compiled(request, tmp_path_factory):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "kernels.cu").write_text(SOURCE)
    subprocess.run(["nvcc", "-ptx", "-std=c++17", f"-arch={request.param}", "kernels.cu", "-o", "kernels.ptx"], cwd=folder, check=True)
    return ptx.Module((folder / "kernels.ptx").read_text()).kernels


def run_torch(kernel, grid, block, arguments, results, **options):
    """Launches with tensors, of which ``results`` are written and the others are read-only."""
    memory = ptx.Memory()
    for a in arguments:
        if isinstance(a, torch.Tensor):
            memory.add(a, initialised=not any(a is r for r in results), writable=any(a is r for r in results))
    return ptx.launch(kernel, grid, block, arguments, memory, **options)


@pytest.mark.parametrize("seed", [0, 1])
def test_kernels_of_nvcc(compiled, seed):
    a, b, c = torch.randn(1000), torch.randn(1000), torch.empty(1000)
    report = run_torch(compiled["add"], 8, 128, [a, b, c, 1000], [c], seed=seed)
    assert torch.equal(c, a + b)
    assert (report.global_read, report.global_written, report.sectors_read, report.ideal_sectors_read) == (8000, 4000, 250, 250)

    x, sums = torch.rand(777, dtype=torch.float64) + 0.1, torch.empty(2, dtype=torch.float64)
    run_torch(compiled["block_sum"], 2, 256, [x, sums, 777], [sums], seed=seed)
    assert torch.allclose(sums, (x.exp() / x.sqrt()).sum().expand(2), rtol=1e-13)

    a, b, c = torch.randn(128, 128), torch.randn(128, 128), torch.empty(128, 128)
    run_torch(compiled["matmul"], (2, 2), 256, [a, b, c, 128], [c], seed=seed)
    assert torch.allclose(c.double(), a.double() @ b.double(), atol=1e-4)

    for name, dtype in (("wmma_half", torch.float16), ("wmma_bfloat", torch.bfloat16)):
        a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.empty(16, 16)
        run_torch(compiled[name], 1, 32, [a, b, c], [c], seed=seed)
        assert torch.allclose(c.double(), 2 * a.double() @ b.double().T, atol=1e-4)

    x, out = torch.randn(5, 90).half(), torch.empty(5, 90, dtype=torch.bfloat16)
    run_torch(compiled["softmax"], 5, 32, [x, out, 90], [out], dynamic_shared=360, seed=seed)
    assert torch.allclose(out.double(), x.double().softmax(-1), rtol=2.0**-8)

    source, out, shift = torch.randint(-10**9, 10**9, (40,), dtype=torch.int32), torch.empty(64, dtype=torch.int64), [3, -2, 9]
    memory = ptx.Memory()
    memory.add(source, writable=False)
    memory.add(out, initialised=False)
    ptx.launch(compiled["box"], 1, 64, [struct.pack("<fhhh6xQ", 1.75, *shift, source.data_ptr()), out, 40], memory, seed=seed)
    for t in range(64):
        k = (t * 5 + 40) % 8
        value = truncated(int(source[(t + k) % 40]) * int(source[k]), shift[k % 3] + 7)
        want = value - 1000003 * truncated(value, 1000003) + math.floor(1.75 * t)
        assert abs(int(out[t]) - want - math.sin(1e9 * (t + 1)) * 1e6) <= 1


def test_a_device_assertion_is_found(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    (tmp_path / "k.cu").write_text("""#include <cassert>
        #include <cstdio>
        extern "C" __global__ void k(int n) { if (n == 3) printf("%d", n); assert(threadIdx.x < n); }""")
    subprocess.run(["nvcc", "-ptx", "-arch=sm_80", "k.cu", "-o", "k.ptx"], cwd=tmp_path, check=True)
    kernel = ptx.Module((tmp_path / "k.ptx").read_text()).kernels["k"]
    ptx.launch(kernel, 1, 3, [3], ptx.Memory())
    with pytest.raises(ptx.Finding) as caught:
        ptx.launch(kernel, 1, 4, [3], ptx.Memory())
    assert caught.value.kind == "assert" and caught.value.lane == 3


TRITON = {}
try:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
except ImportError:
    triton = None
else:
    @triton.jit
    def triton_matmul(a, b, c, M, N, K, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
        i, j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), c.dtype.element_ty)
        for start in range(0, K, BLOCK):
            k = start + tl.arange(0, BLOCK)
            x = tl.load(a + i[:, None] * K + k[None, :], mask=(i[:, None] < M) & (k[None, :] < K), other=0.0)
            y = tl.load(b + k[:, None] * N + j[None, :], mask=(k[:, None] < K) & (j[None, :] < N), other=0.0)
            total = tl.dot(x, y, total, input_precision=PRECISION, out_dtype=c.dtype.element_ty)
        tl.store(c + i[:, None] * N + j[None, :], total, mask=(i[:, None] < M) & (j[None, :] < N))

    @triton.jit
    def triton_softmax(x, out, n, BLOCK: tl.constexpr):
        j = tl.arange(0, BLOCK)
        v = tl.load(x + tl.program_id(0) * n + j, mask=j < n, other=-float("inf"))
        if v.dtype != tl.float64:
            v = v.to(tl.float32)
        v = tl.exp(v - tl.max(v, 0))
        tl.store(out + tl.program_id(0) * n + j, v / tl.sum(v, 0), mask=j < n)

    @triton.jit
    def triton_steps(x, index, out, n, BLOCK: tl.constexpr):
        j = tl.arange(0, BLOCK)
        v, k = tl.load(x + j, mask=j < n, other=0), 0
        while k < n:
            v = tl.sqrt(v) + 1
            k += 40
        tl.store(out + tl.load(index + j, mask=j < n, other=0), v + tl.cumsum(v, 0) * tl.argmax(v, 0), mask=j < n)


def run_triton(function, signature, constants, capability, grid, arguments, results, seed):
    if triton is None:
        pytest.skip("Triton is not installed")
    if function not in TRITON or (tuple(signature.items()), tuple(constants.items()), capability) not in TRITON[function]:
        source = ASTSource(function, {**signature, **dict.fromkeys(constants, "constexpr")}, constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        kernel, = ptx.Module(built.asm["ptx"]).kernels.values()
        TRITON.setdefault(function, {})[tuple(signature.items()), tuple(constants.items()), capability] = kernel, built.metadata.shared
    kernel, shared = TRITON[function][tuple(signature.items()), tuple(constants.items()), capability]
    arguments = [*arguments, *[0] * (len(kernel.parameters) - len(arguments))]  # Triton appends pointers to scratch memory
    return run_torch(kernel, grid, 128, arguments, results, dynamic_shared=shared, seed=seed)


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 120])
@pytest.mark.parametrize("t, precision, tolerance", [("fp32", "ieee", 3e-5), ("fp32", "tf32", 5e-2), ("fp32", "tf32x3", 3e-5),
                                                     ("fp16", "ieee", 1e-4), ("bf16", "ieee", 1e-4), ("fp64", "ieee", 1e-13)])
def test_matmul_of_triton(t, precision, tolerance, capability):
    result = "fp64" if t == "fp64" else "fp32"
    a, b, c = torch.randn(37, 50).to(DTYPES[t]), torch.randn(50, 41).to(DTYPES[t]), torch.empty(37, 41, dtype=DTYPES[result])
    signature = {"a": "*" + t, "b": "*" + t, "c": "*" + result, "M": "i32", "N": "i32", "K": "i32"}
    run_triton(triton_matmul, signature, {"PRECISION": precision, "BLOCK": 32}, capability, (2, 2), [a, b, c, 37, 41, 50], [c], seed=1)
    want = a.double() @ b.double()
    error = (c - want).abs().max().item()
    assert error < tolerance and (precision != "tf32" or error > 1e-4)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("t", DTYPES)
def test_softmax_of_triton(t, capability):
    x, out = torch.randn(3, 300).to(DTYPES[t]), torch.empty(3, 300, dtype=DTYPES[t])
    run_triton(triton_softmax, {"x": "*" + t, "out": "*" + t, "n": "i32"}, {"BLOCK": 512}, capability, 3, [x, out, 300], [out], seed=2)
    assert torch.allclose(out.double(), x.double().softmax(-1), rtol={"fp32": 1e-5, "fp16": 1e-3, "bf16": 8e-3, "fp64": 1e-7}[t], atol=1e-6)


@pytest.mark.skipif(triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("t", ["fp32", "fp64"])
def test_steps_of_triton(t):
    x, index, out = torch.rand(200).to(DTYPES[t]), torch.randperm(200), torch.empty(200, dtype=DTYPES[t])
    run_triton(triton_steps, {"x": "*" + t, "index": "*i64", "out": "*" + t, "n": "i32"}, {"BLOCK": 256}, 80, 1, [x, index, out, 200],
               [out], seed=3)
    v = torch.cat([x.double(), torch.zeros(56, dtype=torch.float64)])
    for _ in range(5):
        v = v.sqrt() + 1
    assert torch.allclose(out.double()[index], (v + v.cumsum(0) * v.argmax())[:200], rtol=1e-4)
