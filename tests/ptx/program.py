"""PTX text to programs of the machine.

``parse`` reads a module into functions of statements; ``lower`` turns an entry into a ``Program``: rows of handler, guard, operands, for
machine.cpp. Functions that a kernel calls become part of it. What is not known here is an ``UnknownInstruction``, never a guess.
"""

import bisect
import ctypes
import re
import struct
from dataclasses import dataclass, field

import numpy as np

from . import native

SHARED_BASE = 1024  # kSharedBase, and the windows, of machine.cpp
WINDOWS = {"shared": 1 << 50, "local": 1 << 51, "param": 1 << 52}
SPACES = {"global": 0, "shared": 1, "local": 2, "const": 3, "param": 4, "generic": 5}
BITS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32, "s32": 32,
        "f32": 32, "tf32": 32, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64, "f32x2": 64}
FLOATS = {"f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"}
FLAGS = {"rn": 0, "rz": 1, "rm": 2, "rp": 3, "rna": 4, "rni": 8, "rzi": 9, "rmi": 10, "rpi": 11, "ftz": 16, "sat": 32, "relu": 64,
         "NaN": 128, "satfinite": 256, "xorsign": 512}
CACHE = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "unified", "cta", "cluster", "gpu", "sys"}
STRONG = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}
SPECIALS = {f"%{name}.{axis}": 4 * i + j for i, name in enumerate(("tid", "ntid", "ctaid", "nctaid")) for j, axis in enumerate("xyzw")}
SPECIALS |= {"%laneid": 16, "%warpid": 17, "%nwarpid": 18, "%smid": 19, "%lanemask_eq": 20, "%lanemask_lt": 21, "%lanemask_le": 22,
             "%lanemask_gt": 23, "%lanemask_ge": 24, "%nsmid": 25, "%dynamic_smem_size": 26, "%total_smem_size": 27}
CLOCKS = {"%clock": 0, "%clock64": 1, "%globaltimer": 1, "%globaltimer_lo": 0, "%clock_hi": None, "%globaltimer_hi": None}


class UnknownInstruction(NotImplementedError):
    """An instruction, or a form of one, that the machine does not execute; the message has its text and line."""


# ---- syntax -------------------------------------------------------------------------------------------------------------------------

@dataclass
class Variable:
    name: str
    space: str
    bytes: int
    align: int
    kind: str  # type of an element
    initial: str = ""
    dynamic: bool = False
    offset: int = 0


@dataclass
class Function:
    name: str
    entry: bool
    line: int
    parameters: list
    results: list
    body: list | None = None
    max_threads: int | None = None
    required_threads: tuple | None = None


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_SPACE = re.compile(r"[\s;]*")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|loc|file|minnctapersm|maxnctapersm|maxnreg|noreturn|explicitcluster"
                             r"|blocksareclusters|maxclusterrank|abi_preserve|abi_preserve_control)\b[^\n;{]*")
_LINKAGE = re.compile(r"(?:\.(?:visible|extern|weak|common)\s+)*")
_THREADS = re.compile(r"\.(maxntid|reqntid|reqnctapercluster)\s+(\d+(?:\s*,\s*\d+)*)")
_VARIABLE = re.compile(r"\.(\w+(?:::\w+)?)\s+((?:\.\w+(?:\s+\d+)?\s+)*?)(?:\.(v2|v4)\s+)?\.([bsuf]\w+|pred)\s+"
                       r"(?:\.ptr\s*(?:\.\w+\s*(?:\d+\s*)?)*)?([\w$%]+)\s*((?:\[\s*\d*\s*\])*)")


def _declaration(text, line):
    """``.shared .align 16 .b8 name[64] = {...}``"""
    head, _, initial = text.partition("=")
    match = _VARIABLE.fullmatch(head.strip() + " ") or _VARIABLE.fullmatch(head.strip())
    if not match:
        raise UnknownInstruction(f"line {line}: declaration {text.strip()[:120]!r}")
    space, attributes, vector, kind, name, dimensions = match.groups()
    size = BITS.get(kind, 0) // 8
    if not size:
        raise UnknownInstruction(f"line {line}: type .{kind} in {text.strip()[:120]!r}")
    align = re.search(r"\.align\s+(\d+)", attributes)
    dynamic = bool(re.search(r"\[\s*\]", dimensions))
    size *= int(vector[1]) if vector else 1
    for extent in re.findall(r"\d+", dimensions):
        size *= int(extent)
    return Variable(name, space, 0 if dynamic else size, int(align[1]) if align else BITS[kind] // 8, kind, initial.strip(), dynamic)


def _split(text):
    """Operands between the commas that no bracket encloses."""
    if not any(c in text for c in "{[("):
        return [p for p in map(str.strip, text.split(",")) if p]
    parts, depth, start = [], 0, 0
    for at, c in enumerate(text):
        if c in "{[(":
            depth += 1
        elif c in "}])":
            depth -= 1
        elif c == "," and not depth:
            parts.append(text[start:at].strip())
            start = at + 1
    parts.append(text[start:].strip())
    return [p for p in parts if p]


def _close(text, at):
    """The place after the brace that closes the one at ``at``."""
    depth = 0
    for m in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if m[0] == "{" else -1
        if not depth:
            return m.end()
    raise ValueError("PTX: a brace is not closed")


def parse(text):
    """``{name: Function}, {name: Variable}`` of a module."""
    text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)
    functions, variables = {}, {}
    starts = [m.start() for m in re.finditer("\n", text)]

    def line_of(at):
        return bisect.bisect_left(starts, at) + 1

    at, end = 0, len(text)
    while (at := _SPACE.match(text, at).end()) < end:
        if m := _LINE_DIRECTIVE.match(text, at):
            at = m.end()
            continue
        if text.startswith(".section", at):
            at = _close(text, text.index("{", at))
            continue
        if text.startswith(".pragma", at) or text.startswith(".alias", at):
            at = text.index(";", at)
            continue
        start = at
        at = _LINKAGE.match(text, at).end()
        m = re.compile(r"\.(entry|func)\b").match(text, at)
        if not m:
            stop = at
            while text[stop] != ";":
                stop = _close(text, stop) if text[stop] == "{" else stop + 1
            variable = _declaration(text[at:stop], line_of(start))
            variables[variable.name] = variable
            at = stop
            continue
        entry = m[1] == "entry"
        head = re.compile(r"\s*(?:\.noreturn\s*)?(?:\(([^)]*)\)\s*)?([\w$%]+)\s*(?:\(([^)]*)\))?").match(text, m.end())
        results, parameters = [[_declaration(p, line_of(at)) for p in _split(part or "")] for part in (head[1], head[3])]
        function = Function(head[2], entry, line_of(at), parameters, results)
        at = head.end()
        while True:
            at = re.compile(r"\s*").match(text, at).end()
            if t := _THREADS.match(text, at):
                numbers = tuple(int(n) for n in t[2].split(","))
                if t[1] != "reqnctapercluster":
                    function.max_threads = int(np.prod(numbers))
                if t[1] == "reqntid":
                    function.required_threads = numbers + (1,) * (3 - len(numbers))
                at = t.end()
            elif d := _LINE_DIRECTIVE.match(text, at):
                at = d.end()
            elif text.startswith(".pragma", at):
                at = text.index(";", at) + 1
            else:
                break
        if text[at] == "{":
            stop = _close(text, at)
            function.body = _statements(text, at + 1, stop - 1, line_of)
            at = stop
        if function.body is not None or function.name not in functions:
            functions[function.name] = function
    return functions, variables


_INSTRUCTION = re.compile(r"(?:@(!?)\s*([\w$%]+)\s+)?([a-z_][\w.:]*)\s*([^;]*?)\s*;", re.S)


def _statements(text, at, end, line_of):
    """``(kind, line, ...)``: "{", "}", "label" name, "reg" text, "variable" Variable, "targets" labels, "instruction" negated, guard,
    opcode, operands, text."""
    out = []
    while (at := _SPACE.match(text, at).end()) < end:
        c = text[at]
        if c in "{}":
            out.append((c, 0))
            at += 1
        elif c == ".":
            if m := _LINE_DIRECTIVE.match(text, at):
                at = m.end()
                continue
            if text.startswith(".section", at):
                at = _close(text, text.index("{", at))
                continue
            stop = text.index(";", at)
            statement, line = text[at:stop], line_of(at)
            if statement.startswith(".reg"):
                out.append(("reg", line, statement[4:]))
            elif statement.startswith((".branchtargets", ".calltargets")):
                out.append(("targets", line, _split(statement.split(None, 1)[1])))
            elif not statement.startswith(".pragma"):
                out.append(("variable", line, _declaration(statement, line)))
            at = stop
        elif m := _LABEL.match(text, at):
            out.append(("label", line_of(at), m[1]))
            at = m.end()
        elif m := _INSTRUCTION.match(text, at):
            out.append(("instruction", line_of(m.start(3)), m[1] == "!", m[2], m[3], _split(m[4]), " ".join(m[0].split())))
            at = m.end()
        else:
            raise UnknownInstruction(f"line {line_of(at)}: {text[at:at + 80].strip()!r}")
    return out


# ---- lowering -----------------------------------------------------------------------------------------------------------------------

@dataclass
class Register:
    number: int
    bits: int


@dataclass
class Label:
    at: int | None = None


@dataclass
class Row:
    handler: str
    guard: int
    negate: bool
    operands: list  # (kind, what): see Lowering.resolve
    a: object = 0
    b: int = 0
    line: int = 0
    text: str = ""
    group: str = "other"


class Program:
    """A kernel that the machine can run, with the text, line and class of each of its instructions."""

    def __init__(self, rows, handle):
        self.text = [r.text for r in rows]
        self.line = [r.line for r in rows]
        self.groups = [r.group for r in rows]
        self.handle = handle

    def __del__(self):
        if getattr(self, "handle", None):
            native.library().ptx_free(self.handle)


_NUMBER = re.compile(r"-?\s*(?:0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")
_HEXFLOAT = re.compile(r"-?0([fFdD])([0-9a-fA-F]+)$")
_DECIMAL = re.compile(r"-?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][-+]?\d+)?$")


def _integer(text):
    """The value of an integer literal, or None."""
    if not _NUMBER.match(text):
        return None
    text = text.replace(" ", "").rstrip("U")
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text)
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return sign * int(digits, 8 if octal else 0)


class Lowering:
    """One kernel on its way from statements to rows."""

    def __init__(self, functions, symbols, shared_variables):
        self.functions, self.symbols, self.shared_variables = functions, symbols, shared_variables
        self.rows, self.constants, self.specials = [], {}, {}
        self.predicate_count = 2  # 0: true; 1: a sink
        self.widths = []                          # of registers
        self.shared = {}
        self.shared_end = SHARED_BASE
        self.dynamic_align = 16
        self.local_end = 0
        self.targets = []
        self.depth = 0
        self.line, self.text = 0, ""

    # -- scopes

    def look_up(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def unknown(self, why):
        return UnknownInstruction(f"line {self.line}: {self.text!r}: {why}")

    def register(self, bits):
        if bits == 1:
            self.predicate_count += 1
            return Register(self.predicate_count - 1, 1)
        self.widths.append(64 if bits == 64 else 32)
        return Register(len(self.widths) - 1, bits)

    def declare(self, text):
        words = text.split(None, 1)
        kind = words[0][1:]
        if kind not in BITS:
            raise self.unknown(f"registers of type .{kind}")
        for name in _split(words[1]):
            m = re.fullmatch(r"([\w$%]+)<(\d+)>", name)
            for full in [m[1] + str(i) for i in range(int(m[2]))] if m else [name]:
                self.scopes[-1][full] = (kind,)  # a register once it is used

    def label(self, name):
        for scope in reversed(self.scopes):
            if ":" + name in scope:
                return scope[":" + name]
        raise self.unknown(f"no label {name}")

    # -- operands

    def constant(self, value, wide):
        return "c", self.constants.setdefault((value, wide), len(self.constants))

    def find(self, name):
        """The Register of a name, or None."""
        found = self.look_up(name)
        if isinstance(found, tuple):
            found = self.register(BITS[found[0]])
            for scope in reversed(self.scopes):
                if name in scope:
                    scope[name] = found
                    break
        return found if isinstance(found, Register) else None

    def address_of(self, name):
        """``(space, value)`` of a variable; the value of a dynamic shared one is known at the end."""
        found = self.look_up(name)
        if not isinstance(found, Variable):
            found = self.symbols.get(name) or self.shared_variables.get(name)
        if found is None:
            return None
        if found.space.startswith("shared"):
            if found.dynamic:
                self.dynamic_align = max(self.dynamic_align, found.align)
                return "shared", ("dynamic", 0)
            return "shared", self.place_shared(found)
        return found.space, found.offset

    def place_shared(self, variable):
        if id(variable) not in self.shared:
            start = -(-self.shared_end // variable.align) * variable.align
            self.shared[id(variable)] = start
            self.shared_end = start + variable.bytes
        return self.shared[id(variable)]

    def place_local(self, variable):
        variable.offset = -(-self.local_end // max(variable.align, 1)) * max(variable.align, 1)
        self.local_end = variable.offset + variable.bytes

    def use(self, text, kind):
        """An operand that is read as type ``kind``."""
        bits = BITS[kind]
        if bits == 1:
            raise self.unknown(f"predicate {text} where a value is expected")
        if (register := self.find(text)) is not None:
            if register.bits == 1 or (register.bits == 64) != (bits == 64):
                raise self.unknown(f"{text} has {register.bits} bits, expected {bits}")
            return "u", register.number
        if text in SPECIALS:
            if bits == 64:
                raise self.unknown(f"{text} has 32 bits, expected 64")
            if text not in self.specials:
                self.specials[text] = self.register(32).number
            return "u", self.specials[text]
        return self.constant(self.value(text, kind), bits == 64)

    def value(self, text, kind):
        """The bits of a literal, or the address of a symbol."""
        bits = BITS[kind]
        mask = (1 << bits) - 1
        if text == "WARP_SZ":
            return 32
        if m := _HEXFLOAT.match(text):
            negative = text[0] == "-"
            raw = int(m[2], 16)
            number = struct.unpack("<f", struct.pack("<I", raw))[0] if m[1] in "fF" else struct.unpack("<d", struct.pack("<Q", raw))[0]
            if bits == (32 if m[1] in "fF" else 64):
                return raw ^ (1 << (bits - 1) if negative else 0)
            number = -number if negative else number
            return int.from_bytes(struct.pack({32: "<f", 64: "<d"}[bits], number), "little")
        if (number := _integer(text)) is not None and kind not in ("f32", "f64"):
            return number & mask
        if kind in ("f32", "f64") and _DECIMAL.match(text):
            return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", float(text)), "little")
        m = re.fullmatch(r"(generic\()?([\w$%.]+)\)?\s*(?:([+-])\s*(-?\w+))?", text)
        if m and (found := self.address_of(m[2])):
            extra = (_integer(m[4]) or 0) * (-1 if m[3] == "-" else 1) if m[4] else 0
            space, base = found
            if isinstance(base, tuple):
                return "dynamic", base[1] + extra
            return base + extra + (WINDOWS.get(space, 0) if m[1] else 0) & mask
        raise self.unknown(f"operand {text!r}")

    def define(self, text, kind):
        """An operand that is written as type ``kind``."""
        bits = BITS[kind]
        if text == "_":
            return ("d", self.register(bits).number) if bits > 1 else ("p", 1)
        register = self.find(text)
        if register is None:
            raise self.unknown(f"{text!r} is no register")
        if bits == 1 or register.bits == 1:
            if bits != register.bits:
                raise self.unknown(f"{text} has {register.bits} bits, expected {bits}")
            return "pd", register.number
        if (register.bits == 64) != (bits == 64) or register.bits < bits:
            raise self.unknown(f"{text} has {register.bits} bits, expected {bits}")
        return "d", register.number

    def predicate(self, text):
        """``(operand, negated)``"""
        negated = text.startswith("!")
        name = text.lstrip("! ")
        register = self.find(name)
        if register is None or register.bits != 1:
            if name in ("1", "-1", "0"):  # nvcc writes true as -1
                return ("p", 0), negated != (name == "0")
            raise self.unknown(f"{text!r} is no predicate")
        return ("pu", register.number), negated

    def address(self, text):
        """``(operand, offset, whether it has 64 bits, space of a named variable or None)`` of ``[...]``"""
        if not (text.startswith("[") and text.endswith("]")):
            raise self.unknown(f"{text!r} is no address")
        inner = text[1:-1].strip()
        m = re.fullmatch(r"([\w$%.]+)\s*(?:([+-])\s*(-?\s*\w+))?", inner)
        if not m:
            raise self.unknown(f"address {text!r}")
        offset = 0
        if m[3]:
            offset = _integer(m[3])
            if offset is None:
                raise self.unknown(f"address {text!r}")
            offset *= -1 if m[2] == "-" else 1
        if (register := self.find(m[1])) is not None:
            if register.bits not in (32, 64):
                raise self.unknown(f"address {text!r}")
            return ("u", register.number), offset, register.bits == 64, None
        if found := self.address_of(m[1]):
            return self.constant(found[1], True), offset, True, found[0]
        if (number := _integer(m[1])) is not None:
            return self.constant(number, True), offset, True, None
        raise self.unknown(f"address {text!r}")

    # -- rows

    def emit(self, handler, operands, a=0, b=0, group="other"):
        if not native.handler(handler):
            raise self.unknown(f"no handler {handler}")
        self.rows.append(Row(handler, *self.guard, list(operands), a, b, self.line, self.text, group))

    def function(self, function, scope):
        if function.body is None:
            raise self.unknown(f"function {function.name} has no body here")
        if self.depth > 16:
            raise self.unknown("recursion")
        self.depth += 1
        outer = getattr(self, "scopes", None), getattr(self, "end", None), getattr(self, "guard", (0, False))
        self.scopes, self.end, self.guard = [scope], Label(), (0, False)
        is_entry = self.depth == 1
        body = function.body

        # Labels first: a branch may come before its label. Every pair of braces is a scope, in the order in which they open.
        stack, openings = [scope], []
        for statement in body:
            if statement[0] == "{":
                openings.append({})
                stack.append(openings[-1])
            elif statement[0] == "}":
                stack.pop()
            elif statement[0] == "label":
                stack[-1][":" + statement[2]] = Label()
        opened = iter(openings)
        last_label = None
        for statement in body:
            kind, self.line = statement[0], statement[1] or self.line
            if kind == "{":
                self.scopes.append(next(opened))
            elif kind == "}":
                self.scopes.pop()
            elif kind == "label":
                last_label = statement[2]
                self.scopes[-1][":" + statement[2]].at = len(self.rows)
            elif kind == "targets":
                self.scopes[-1][":" + last_label] = [self.label(name) for name in statement[2]]
            elif kind == "reg":
                self.text = ".reg" + statement[2]
                self.declare(statement[2])
            elif kind == "variable":
                variable = statement[2]
                if variable.space in ("local", "param"):
                    variable = Variable(variable.name, "local", variable.bytes, variable.align, variable.kind)
                    self.place_local(variable)
                elif not variable.space.startswith("shared"):
                    variable = self.symbols[function.name, variable.name]
                self.scopes[-1][variable.name] = variable
            else:
                _, _, negated, guard, opcode, operands, self.text = statement
                self.guard = (0, False)
                if guard:
                    (_, number), _ = self.predicate(guard)
                    self.guard = (number, negated)
                self.instruction(opcode, operands)
        self.end.at = len(self.rows)
        if is_entry:
            self.text, self.guard = "ret;", (0, False)
            self.emit("exit", [], group="branch")
        self.scopes, self.end, self.guard = outer
        self.depth -= 1

    def instruction(self, opcode, operands):
        name, *parts = opcode.split(".")
        method = INSTRUCTIONS.get(name)
        if method is None:
            raise self.unknown("the machine does not know it")
        method(self, name, parts, operands)

    def expect(self, operands, *counts):
        if len(operands) not in counts:
            raise self.unknown(f"{len(operands)} operands, expected {' or '.join(map(str, counts))}")

    def flags(self, parts, allowed):
        """The flags of the modifiers, all of which must be among ``allowed``."""
        value = 0
        for part in parts:
            if part not in allowed:
                raise self.unknown(f"modifier .{part}")
            value |= FLAGS[part]
        return value

    # -- the end

    def finish(self):
        """``(Program, bytes of static shared memory, where dynamic shared memory begins)``"""
        dynamic = -(-self.shared_end // self.dynamic_align) * self.dynamic_align
        places = _allocate(self)
        frame = places.pop()
        constants = np.zeros(max(len(self.constants), 1), np.uint64)
        wide = np.zeros(len(constants), np.uint8)
        constant_at, at = [], 0
        for (value, is_wide), index in self.constants.items():
            if isinstance(value, tuple):
                value = dynamic + value[1]
            constants[index] = value & (0xFFFFFFFFFFFFFFFF if is_wide else 0xFFFFFFFF)
            wide[index] = is_wide
            constant_at.append(at)
            at += 256 if is_wide else 128

        def resolve(operand):
            kind, what = operand
            if kind in ("u", "d"):
                return places[what]
            return 0x80000000 | constant_at[what] if kind == "c" else what

        rows, operands = [], []
        for r in self.rows:
            a = r.a.at if isinstance(r.a, Label) else r.a
            rows.append((native.handler(r.handler), a, r.b, r.guard, r.negate, len(operands), len(r.operands)))
            operands += [resolve(o) for o in r.operands]
        rows = np.array(rows, native.ROW)
        operands = np.array(operands or [0], np.uint32)
        specials = np.array([[SPECIALS[name], places[number]] for name, number in self.specials.items()] or [[0, 0]], np.int32)
        targets = np.array([t.at for t in self.targets] or [0], np.int32)
        pointer = lambda array: array.ctypes.data_as(ctypes.c_void_p)  # noqa: E731
        handle = native.library().ptx_program(
            pointer(rows), len(rows), pointer(operands), len(operands), pointer(constants), pointer(wide), len(self.constants),
            pointer(specials), len(self.specials), pointer(targets), len(targets), frame, self.predicate_count, self.local_end)
        return Program(self.rows, handle), self.shared_end - SHARED_BASE, dynamic - SHARED_BASE


def _allocate(lowering):
    """The place of each register in the frame, and at the end the bytes of the frame."""
    places, at = [], 0
    for width in lowering.widths:
        places.append(at)
        at += width * 4
    return places + [at]


def _unsigned(kind):
    return "u" + kind[1:] if kind[0] in "bsu" else kind


# ---- instructions -------------------------------------------------------------------------------------------------------------------

INSTRUCTIONS = {}


def instruction(*names):
    def register(method):
        INSTRUCTIONS.update(dict.fromkeys(names, method))
        return method
    return register


def _class_of(kind):
    return {"f64": "double", "f16": "half", "bf16": "half", "f16x2": "half", "bf16x2": "half"}.get(kind, "float")


def _type(L, parts):
    if not parts or parts[-1] not in BITS:
        raise L.unknown("no type")
    return parts[-1], parts[:-1]


@instruction("add", "sub", "mul", "mad", "fma", "div", "min", "max", "rem", "abs", "neg", "sad", "mul24", "mad24", "ex2", "tanh", "rcp",
             "sqrt", "rsqrt", "sin", "cos", "lg2", "copysign", "addc", "subc", "madc")
def _arithmetic(L, name, parts, operands):
    kind, parts = _type(L, parts)
    if name in ("addc", "subc", "madc") or "cc" in parts:
        return _carry(L, name, kind, parts, operands)
    if kind in FLOATS:
        return _floating(L, name, kind, parts, operands)
    count = {"mad": 3, "sad": 3, "mad24": 3, "abs": 1, "neg": 1}.get(name, 2)
    L.expect(operands, count + 1)
    if kind[0] == "b" or name in ("fma", "ex2", "tanh", "rcp", "sqrt", "rsqrt", "sin", "cos", "lg2", "copysign"):
        raise L.unknown(f"type .{kind}")
    result = kind
    if parts == ["wide"] and name in ("mul", "mad"):
        result = kind[0] + str(2 * BITS[kind])
    elif parts == ["sat"] and name in ("add", "sub") or parts == ["hi", "sat"] and name == "mad":
        pass
    elif name in ("mul", "mad", "mul24", "mad24"):
        if parts not in (["lo"], ["hi"]):
            raise L.unknown("expected .lo, .hi or .wide")
    elif parts:
        raise L.unknown(f"modifier .{parts[0]}")
    kinds = [kind, kind, result][:count] if name in ("mad", "mad24") else [kind] * count
    sources = [L.use(o, k) for o, k in zip(operands[1:], kinds)]
    L.emit(".".join([name, *parts, kind]), [L.define(operands[0], result), *sources], group="integer")


def _floating(L, name, kind, parts, operands):
    allowed = {"rn", "ftz"}
    group = _class_of(kind)
    if name in ("add", "sub", "fma") and len(parts) and parts[-1] == "f32" and kind in ("f16", "bf16"):
        count = 3 if name == "fma" else 2
        L.expect(operands, count + 1)
        flags = L.flags(parts[:-1], {"rn", "rz", "rm", "rp", "sat"})
        kinds = [kind] * (count - 1) + ["f32"]
        return L.emit(f"{name}.f32.{kind}", [L.define(operands[0], "f32"), *map(L.use, operands[1:], kinds)], b=flags, group="float")
    handler = name
    count = {"fma": 3, "mad": 3, "add": 2, "sub": 2, "mul": 2, "div": 2, "min": 2, "max": 2, "copysign": 2}.get(name, 1)
    if name == "mad":
        handler = "fma"
    if name in ("add", "sub", "mul", "fma", "mad"):
        allowed |= {"sat", "rz", "rm", "rp"} if kind[0] == "f" and kind != "f16x2" and kind != "f16" else {"sat", "relu"}
        if name in ("fma", "mad") and kind == "f32":
            group = "fma"
    elif name in ("min", "max"):
        if parts[-2:] == ["xorsign", "abs"]:
            parts = parts[:-1]
        allowed = {"ftz", "NaN", "xorsign"}
        if kind == "f32" and len(operands) == 4:
            handler, count, allowed = name + "3", 3, {"ftz", "NaN"}
    elif name in ("abs", "neg"):
        allowed = {"ftz"}
        if kind != "f32":
            parts = [p for p in parts if p != "ftz" or kind == "f64"]
    elif name == "copysign":
        allowed = set()
    elif name == "div":
        group = "special" if kind == "f32" else group
        if "full" in parts or "approx" in parts:
            handler += ".full" if "full" in parts else ".approx"
            parts = [p for p in parts if p not in ("full", "approx")]
            allowed = {"ftz"}
        else:
            if not set(parts) & {"rn", "rz", "rm", "rp"}:
                raise L.unknown("division needs a rounding")
            allowed |= {"rz", "rm", "rp"}
    else:
        group = "special" if kind != "f64" else group
        if "approx" in parts:
            parts = [p for p in parts if p != "approx"]
            allowed = {"ftz"}
            if name not in ("ex2", "tanh"):
                handler += ".approx"
            if kind == "f64" and name in ("rcp", "rsqrt") and parts == ["ftz"]:
                handler += ".ftz"
                parts = []
        elif name in ("rcp", "sqrt") and set(parts) & {"rn", "rz", "rm", "rp"}:
            allowed |= {"rz", "rm", "rp"}
        else:
            raise L.unknown("neither .approx nor a rounding")
    L.expect(operands, count + 1)
    flags = L.flags(parts, allowed)
    L.emit(f"{handler}.{kind}", [L.define(operands[0], kind), *(L.use(o, kind) for o in operands[1:])], b=flags, group=group)


def _carry(L, name, kind, parts, operands):
    operation = {"add": 0, "sub": 1, "mad": 2}[name[:3]] + ("hi" in parts)
    if kind[1:] not in ("32", "64") or set(parts) - {"cc", "lo", "hi"} or (name[:3] == "mad") != bool({"lo", "hi"} & set(parts)):
        raise L.unknown("a form with carry")
    L.expect(operands, 4 if operation > 1 else 3)
    a = operation | (8 if name.endswith("c") else 0) | (16 if "cc" in parts else 0) | (32 if kind[0] == "s" else 0)
    L.emit("carrying.u" + kind[1:], [L.define(operands[0], kind), *(L.use(o, kind) for o in operands[1:])], a=a, group="integer")


@instruction("and", "or", "xor", "not", "cnot", "shl", "shr")
def _bitwise(L, name, parts, operands):
    kind, parts = _type(L, parts)
    count = 1 if name in ("not", "cnot") else 2
    L.expect(operands, count + 1)
    if parts:
        raise L.unknown(f"modifier .{parts[0]}")
    if kind == "pred":
        sources = [L.predicate(o) for o in operands[1:]]
        a = {"not": 1, "and": 2, "or": 3, "xor": 4}[name] | sum(8 << k for k, (_, negated) in enumerate(sources) if negated)
        return L.emit("logic", [L.define(operands[0], kind), *(s for s, _ in sources)], a=a, group="predicate")
    full = kind if name == "shr" and kind[0] == "s" else _unsigned(kind)
    kinds = [kind, "u32"] if name in ("shl", "shr") else [kind] * count
    L.emit(f"{name}.{full}", [L.define(operands[0], kind), *map(L.use, operands[1:], kinds)], group="integer")


@instruction("popc", "clz", "brev", "bfind", "bfe", "bfi", "lop3", "prmt", "fns", "shf", "szext", "bmsk", "dp4a", "dp2a")
def _bits(L, name, parts, operands):
    if name in ("dp4a", "dp2a"):
        types = parts[-2:]
        if set(types) - {"u32", "s32"} or (name == "dp2a") != (len(parts) == 3):
            raise L.unknown("types")
        L.expect(operands, 4)
        return L.emit(f"{name}.{'.'.join(types)}", [L.define(operands[0], "b32"), *(L.use(o, "b32") for o in operands[1:])],
                      a=parts[0] == "hi", group="integer")
    if name == "prmt":
        modes = ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"]
        if parts[0] != "b32" or len(parts) > 2 or (len(parts) == 2 and parts[1] not in modes):
            raise L.unknown("mode")
        L.expect(operands, 4)
        return L.emit("prmt.b32", [L.define(operands[0], "b32"), *(L.use(o, "b32") for o in operands[1:])],
                      a=modes.index(parts[1]) + 1 if len(parts) == 2 else 0, group="integer")
    kind, parts = _type(L, parts)
    handler = ".".join([name, *parts, kind])
    if name == "lop3":
        L.expect(operands, 5)
        return L.emit(handler, [L.define(operands[0], kind), *(L.use(o, kind) for o in operands[1:4])], a=_integer(operands[4]),
                      group="integer")
    result = "u32" if name in ("popc", "clz", "bfind") else kind
    kinds = {"bfe": [kind, "u32", "u32"], "bfi": [kind, kind, "u32", "u32"], "fns": ["b32"] * 3, "shf": ["b32"] * 3, "szext": [kind, "u32"],
             "bmsk": ["u32", "u32"]}.get(name, [kind])
    L.expect(operands, len(kinds) + 1)
    L.emit(handler, [L.define(operands[0], result), *map(L.use, operands[1:], kinds)], group="integer")


@instruction("setp", "set")
def _compare(L, name, parts, operands):
    comparison, *parts = parts
    kind, parts = _type(L, parts)
    base = kind[:-2] if kind in ("f16x2", "bf16x2") else kind
    if comparison in ("lo", "ls", "hi", "hs"):
        comparison, base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[comparison], _unsigned(kind)
    elif base not in FLOATS and comparison in ("eq", "ne") or kind[0] == "b" and base not in FLOATS:
        base = _unsigned(kind)
    flags, a, result = 0, 0, None
    for part in parts:
        if part == "ftz":
            flags = FLAGS["ftz"] if kind == "f32" else 0
        elif part in ("and", "or", "xor"):
            a = ("and", "or", "xor").index(part) + 1
        elif name == "set" and result is None and part in BITS:
            result = part
        else:
            raise L.unknown(f"modifier .{part}")
    L.expect(operands, 4 if a else 3)
    combine = []
    if a:
        operand, negated = L.predicate(operands[3])
        a |= 4 if negated else 0
        combine = [operand]
    sources = [L.use(o, kind) for o in operands[1:3]]
    handler = f"{name}.{comparison}.{base}{'x2' if kind.endswith('x2') else ''}"
    if name == "setp":
        targets = [t.strip() for t in operands[0].split("|")] + ["_"]
        return L.emit(handler, [L.define(targets[0], "pred"), L.define(targets[1], "pred"), *sources, *combine], a=a, b=flags,
                      group="predicate")
    yes = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80,
           "u16": 0xFFFF, "s16": 0xFFFF}.get(result)
    if yes is None or kind.endswith("x2") != result.endswith("x2"):
        raise L.unknown(f"result .{result}")
    L.emit(handler, [L.define(operands[0], result), ("p", 0), *sources, *combine], a=a | yes << 8, b=flags, group="integer")


@instruction("testp")
def _testp(L, name, parts, operands):
    tests = ["finite", "infinite", "number", "notanumber", "normal", "subnormal"]
    if len(parts) != 2 or parts[0] not in tests:
        raise L.unknown("a test")
    L.emit("testp." + parts[1], [L.define(operands[0], "pred"), L.use(operands[1], parts[1])], a=tests.index(parts[0]), group="predicate")


@instruction("selp", "slct")
def _select(L, name, parts, operands):
    if name == "slct":
        kind, selector = parts[-2:]
        flags = L.flags(parts[:-2], {"ftz"})
        L.expect(operands, 4)
        return L.emit(f"slct.{'b64' if BITS[kind] == 64 else 'b32'}.{selector}",
                      [L.define(operands[0], kind), L.use(operands[1], kind), L.use(operands[2], kind), L.use(operands[3], selector)],
                      b=flags, group="move")
    kind, rest = _type(L, parts)
    if rest:
        raise L.unknown(f"modifier .{rest[0]}")
    L.expect(operands, 4)
    predicate, negated = L.predicate(operands[3])
    sources = [L.use(operands[1], kind), L.use(operands[2], kind), predicate]
    L.emit("selp.b64" if BITS[kind] == 64 else "selp.b32", [L.define(operands[0], kind), *sources], a=negated, group="move")


def _vector(text):
    return _split(text[1:-1]) if text.startswith("{") else [text]


@instruction("mov")
def _mov(L, name, parts, operands):
    kind, rest = _type(L, parts)
    L.expect(operands, 2)
    if rest:
        raise L.unknown(f"modifier .{rest[0]}")
    to, source = operands
    if kind == "pred":
        operand, negated = L.predicate(source)
        return L.emit("logic", [L.define(to, kind), operand], a=8 if negated else 0, group="predicate")
    if source.startswith("{") or to.startswith("{"):
        elements = _vector(source if source.startswith("{") else to)
        size = BITS[kind] // len(elements)
        if len(elements) not in (2, 4) or size not in (8, 16, 32):
            raise L.unknown("a vector")
        part = f"b{size}"
        if source.startswith("{"):
            return L.emit("pack", [L.define(to, kind), *(L.use(e, part) for e in elements)], a=len(elements) | size << 8, group="move")
        return L.emit("unpack", [*(L.define(e, part) for e in elements), L.use(source, kind)], a=len(elements) | size << 8, group="move")
    if source in CLOCKS:
        if CLOCKS[source] is None or (CLOCKS[source] == 1) != (BITS[kind] == 64):
            raise L.unknown(source)
        return L.emit("clock", [L.define(to, kind)], a=CLOCKS[source], group="move")
    L.emit("mov.b64" if BITS[kind] == 64 else "mov.b32", [L.define(to, kind), L.use(source, kind)], group="move")


@instruction("cvt")
def _cvt(L, name, parts, operands):
    source, parts = parts[-1], parts[:-1]
    result, parts = _type(L, parts)
    if source not in BITS:
        raise L.unknown(f"type .{source}")
    if result in ("f16x2", "bf16x2") and source == "f32":
        L.expect(operands, 3)
        flags = L.flags(parts, {"rn", "rz", "relu", "satfinite"})
        return L.emit(f"cvt.{result}.f32", [L.define(operands[0], result), L.use(operands[1], "f32"), L.use(operands[2], "f32")], b=flags,
                      group="convert")
    L.expect(operands, 2)
    flags = L.flags(parts, {"rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "ftz", "sat", "relu", "satfinite"}
                    | ({"rna"} if result == "tf32" else set()))
    if result[0] in "us" and source in FLOATS and not {"rni", "rzi", "rmi", "rpi"} & set(parts):
        raise L.unknown("a conversion to an integer needs a rounding")
    if result == source == "f32" and not {"rni", "rzi", "rmi", "rpi"} & set(parts):
        flags &= ~7
    register = L.find(operands[1])
    if register is not None and register.bits == 64 and BITS[source] < 64:  # the source may be wider than its type: its low bits count
        narrow = L.register(32).number
        L.emit("cvt.u32.u64", [("d", narrow), ("u", register.number)], group="convert")
        use = "u", narrow
    else:
        use = L.use(operands[1], source)
    L.emit(f"cvt.{result}.{source}", [L.define(operands[0], result), use], b=flags, group="convert")


@instruction("cvta")
def _cvta(L, name, parts, operands):
    to = parts[0] == "to"
    space, kind = parts[-2].partition("::")[0], parts[-1]
    L.expect(operands, 2)
    if kind != "u64" or len(parts) != 2 + to or space not in SPACES:
        raise L.unknown("an address of this kind")
    window = WINDOWS.get(space, 0)
    L.emit("offset64", [L.define(operands[0], kind), L.use(operands[1], kind)], a=-window if to else window, group="move")


@instruction("isspacep")
def _isspacep(L, name, parts, operands):
    space = parts[0].partition("::")[0]
    if len(parts) != 1 or space not in ("global", "shared", "local", "param"):
        raise L.unknown("a space")
    L.emit("isspacep", [L.define(operands[0], "pred"), L.use(operands[1], "u64")], a=SPACES[space], group="predicate")


@dataclass
class Access:
    space: str = "generic"
    kind: str = ""
    vector: int = 1
    strong: bool = False
    hint: bool = False
    rest: list = field(default_factory=list)


def _access(L, parts):
    """What the modifiers of an instruction that accesses memory say."""
    found = Access()
    for part in parts:
        base = part.partition("::")[0]
        if base in SPACES and base != "generic":
            found.space = base
        elif part in BITS:
            found.kind = part
        elif part in ("v2", "v4", "v8"):
            found.vector = int(part[1])
        elif part in STRONG:
            found.strong = True
        elif base in ("L1", "L2"):
            found.hint |= part == "L2::cache_hint"
        elif part not in CACHE:
            found.rest.append(part)
    return found


def _layout(L, access, address, wide):
    operand, offset, wide_address, named = address
    space = access.space
    if space == "param":
        space = "local" if named == "local" else "param"
    return (BITS[access.kind] // 8 | access.vector << 8 | wide << 16 | (access.kind[0] == "s") << 17
            | (access.strong and space in ("global", "shared", "generic")) << 18
            | wide_address << 19 | SPACES[space] << 20)


@instruction("ld", "ldu", "st")
def _memory(L, name, parts, operands):
    access = _access(L, parts)
    if access.rest or access.kind in ("", "pred") or access.vector * BITS[access.kind] > 256:
        raise L.unknown("modifier ." + ".".join(access.rest or parts))
    L.expect(operands, 3 if access.hint else 2)
    address_text, value = (operands[1], operands[0]) if name != "st" else operands[:2]
    elements = _vector(value)
    if len(elements) != access.vector:
        raise L.unknown(f"{len(elements)} registers, expected {access.vector}")
    address = L.address(address_text)
    group = {"generic": "global", "param": "parameter"}.get(access.space, access.space)
    group += "_store" if name == "st" else "_load"
    registers = [L.find(e) for e in elements]
    wide = any(r is not None and r.bits == 64 for r in registers) or (all(r is None for r in registers) and BITS[access.kind] == 64)
    if any(r is not None and (r.bits == 1 or (r.bits == 64) != wide) for r in registers):
        raise L.unknown("registers of one size")
    if name == "st":
        values = [L.use(e, access.kind if r is None else "b64" if wide else "b32") for e, r in zip(elements, registers)]
        return L.emit("st", [address[0], *values], a=address[1], b=_layout(L, access, address, wide), group=group)
    values = [L.define(e, "b64" if wide else access.kind) for e in elements]
    L.emit("ld", [*values, address[0]], a=address[1], b=_layout(L, access, address, wide), group=group)


OPERATIONS = ["add", "min", "max", "inc", "dec", "and", "or", "xor", "exch", "cas"]
ATOMIC_TYPES = {"u32": 0, "s32": 1, "u64": 2, "s64": 3, "f32": 4, "f64": 5, "f16": 6, "bf16": 7, "f16x2": 8, "bf16x2": 9, "b16": 10,
                "b32": 0, "b64": 2}


@instruction("atom", "red")
def _atomic(L, name, parts, operands):
    access = _access(L, [p for p in parts if p != "noftz"])
    if len(access.rest) != 1 or access.rest[0] not in OPERATIONS or access.kind not in ATOMIC_TYPES or access.vector > 1:
        raise L.unknown("an operation")
    operation, kind = OPERATIONS.index(access.rest[0]), access.kind
    if kind in FLOATS and operation > 2:
        raise L.unknown(f"type .{kind}")
    if access.hint:
        operands = operands[:-1]
    result = [operands[0]] if name == "atom" else ["_"]
    rest = operands[1:] if name == "atom" else operands
    L.expect(rest, 3 if OPERATIONS[operation] == "cas" else 2)
    address = L.address(rest[0])
    wide = BITS[kind] == 64
    b = _layout(L, access, address, wide) | 1 << 24 | operation << 28 | ATOMIC_TYPES[kind] << 32
    L.emit("atom", [L.define(result[0], kind), address[0], *(L.use(o, kind) for o in rest[1:])], a=address[1], b=b,
           group="shared_atomic" if access.space == "shared" else "global_atomic")


@instruction("cp")
def _copy(L, name, parts, operands):
    if parts[:1] != ["async"]:
        raise L.unknown("the machine does not know it")
    if parts[1:] in (["commit_group"],):
        return L.emit("cp.async.commit_group", [], group="async_copy")
    if parts[1:] in (["wait_group"], ["wait_all"]):
        return L.emit("cp.async.wait_group", [], a=_integer(operands[0]) if operands else -1, group="async_copy")
    access = _access(L, parts[1:])
    if access.rest or parts[1] not in ("ca", "cg") or not any(p.startswith("shared") for p in parts) or "global" not in parts:
        raise L.unknown("the machine does not know it")
    if access.hint:
        operands = operands[:-1]
    L.expect(operands, 3, 4)
    to, source, size = L.address(operands[0]), L.address(operands[1]), _integer(operands[2])
    if size not in (4, 8, 16) or parts[1] == "cg" and size != 16:
        raise L.unknown("4, 8 or 16 bytes (.cg: 16)")
    b = size | 1 << 8 | to[2] << 19 | SPACES["shared"] << 20 | source[2] << 24
    last = []
    if len(operands) == 4:
        register = L.find(operands[3])
        if register is not None and register.bits == 1:
            last, b = [L.predicate(operands[3])[0]], b | 1 << 26
        else:
            last, b = [L.use(operands[3], "u32")], b | 1 << 25
    L.emit("cp.async", [to[0], source[0], L.constant(source[1], True), *last], a=to[1], b=b, group="async_copy")


@instruction("bra", "brx", "exit", "ret", "call", "trap", "brkpt")
def _flow(L, name, parts, operands):
    parts = [p for p in parts if p != "uni"]
    if name == "bra" and not parts:
        return L.emit("bra", [], a=L.label(operands[0]), group="branch")
    if name == "brx" and parts == ["idx"]:
        labels = L.label(operands[1])
        first = len(L.targets)
        L.targets += labels
        return L.emit("brx.idx", [L.use(operands[0], "u32")], a=first, b=len(labels), group="branch")
    if name == "exit" or (name == "ret" and L.depth == 1):
        return L.emit("exit", [], group="branch")
    if name == "ret":
        return L.emit("bra", [], a=L.end, group="branch")
    if name in ("trap", "brkpt"):
        return L.emit("trap", [], group="branch")
    if name == "call" and not parts:
        return _call(L, operands)
    raise L.unknown("the machine does not know it")


def _call(L, operands):
    results = [o.strip() for o in _split(operands.pop(0)[1:-1])] if operands[0].startswith("(") else []
    target = operands[0]
    arguments = _split(operands[1][1:-1]) if len(operands) > 1 else []
    if target == "vprintf":  # prints nothing
        variable = L.look_up(results[0])
        return L.emit("st", [L.constant(variable.offset, True), L.constant(0, False)], b=4 | 1 << 8 | 1 << 19 | SPACES["local"] << 20)
    if target == "__assertfail":
        return L.emit("trap", [], a=1, group="branch")
    function = L.functions.get(target)
    if function is None or len(operands) > 2 or L.guard[0]:
        raise L.unknown("a call of this kind")
    scope = {}
    for formal, actual in zip([*function.results, *function.parameters], [*results, *arguments]):
        variable = L.look_up(actual)
        if not isinstance(variable, Variable) or variable.space != "local":
            raise L.unknown(f"argument {actual!r}")
        scope[formal.name] = variable
    line, text = L.line, L.text
    L.function(function, scope)
    L.line, L.text = line, text


@instruction("bar", "barrier")
def _barrier(L, name, parts, operands):
    if name == "bar" and parts == ["warp", "sync"]:
        return L.emit("bar.warp.sync", [L.use(operands[0], "b32")], group="warp")
    parts = [p for p in parts if p != "cta"]
    aligned = name == "bar" or "aligned" in parts
    handler = "bar" if aligned else "barrier"
    parts = [p for p in parts if p != "aligned"]
    if parts and parts[0] in ("sync", "arrive") and len(parts) == 1:
        L.expect(operands, *((1, 2) if parts[0] == "sync" else (2,)))
        operands = operands + ["0"] * (2 - len(operands))
        return L.emit(handler, [L.use(o, "u32") for o in operands], b=parts[0] == "arrive", group="barrier")
    if parts[:1] == ["red"] and parts[1:] in (["popc", "u32"], ["and", "pred"], ["or", "pred"]):
        L.expect(operands, 3, 4)
        predicate, negated = L.predicate(operands[-1])
        count = operands[2] if len(operands) == 4 else "0"
        b = (["popc", "and", "or"].index(parts[1]) + 1) << 8 | negated << 16
        return L.emit(handler, [L.use(operands[1], "u32"), L.use(count, "u32"), L.define(operands[0], parts[2]), predicate], b=b,
                      group="barrier")
    raise L.unknown("the machine does not know it")


def _pair(text):
    return [t.strip() for t in text.split("|")] + ["_"]


@instruction("shfl", "vote", "match", "redux", "elect", "activemask")
def _across(L, name, parts, operands):
    if name == "activemask" and parts == ["b32"]:
        return L.emit("activemask", [L.define(operands[0], "b32")], group="warp")
    if name == "shfl" and parts[:1] == ["sync"] and parts[1] in ("up", "down", "bfly", "idx") and parts[2:] == ["b32"]:
        L.expect(operands, 5)
        to = _pair(operands[0])
        sources = [L.use(o, "b32") for o in operands[1:4]]
        return L.emit("shfl.sync", [L.use(operands[4], "b32"), L.define(to[0], "b32"), L.define(to[1], "pred"), *sources],
                      a=("up", "down", "bfly", "idx").index(parts[1]), b=1 << 40, group="shuffle")
    if name == "vote" and parts[:1] == ["sync"] and parts[1:] in (["all", "pred"], ["any", "pred"], ["uni", "pred"], ["ballot", "b32"]):
        L.expect(operands, 3)
        predicate, negated = L.predicate(operands[1])
        a = ("all", "any", "uni", "ballot").index(parts[1]) | negated << 2
        return L.emit("vote.sync", [L.use(operands[2], "b32"), L.define(operands[0], parts[2]), predicate], a=a, group="warp")
    if name == "match" and len(parts) == 3 and parts[0] in ("any", "all") and parts[1] == "sync" and parts[2] in ("b32", "b64"):
        L.expect(operands, 3)
        to = _pair(operands[0])
        source = L.use(operands[1], parts[2])
        return L.emit("match.sync." + parts[2], [L.use(operands[2], "b32"), L.define(to[0], "b32"), L.define(to[1], "pred"), source],
                      a=parts[0] == "all", group="warp")
    if name == "redux" and len(parts) == 3 and parts[0] == "sync" and parts[2] in ("u32", "s32", "b32"):
        L.expect(operands, 3)
        handler = "redux.sync." + parts[1] + ("." + parts[2] if parts[1] in ("min", "max") else "")
        return L.emit(handler, [L.use(operands[2], "b32"), L.define(operands[0], "b32"), L.use(operands[1], "b32")], group="warp")
    if name == "elect" and parts == ["sync"]:
        L.expect(operands, 2)
        to = _pair(operands[0])
        return L.emit("elect.sync", [L.use(operands[1], "b32"), L.define(to[0], "b32"), L.define(to[1], "pred")], group="warp")
    raise L.unknown("the machine does not know it")


ALL = 0xFFFFFFFF
MATRIX_TYPES = {"f16": 0, "bf16": 1, "tf32": 2, "s8": 3, "u8": 4}


@instruction("ldmatrix", "stmatrix")
def _matrix_memory(L, name, parts, operands):
    parts = [p.partition("::")[0] for p in parts]
    transposed = "trans" in parts
    rest = [p for p in parts if p not in ("trans", "shared")]
    if rest[:3] != ["sync", "aligned", "m8n8"] or rest[4:] != ["b16"] or rest[3] not in ("x1", "x2", "x4"):
        raise L.unknown("a shape")
    L.expect(operands, 2)
    address_text, value = operands if name == "stmatrix" else operands[::-1]
    address, count, registers = L.address(address_text), int(rest[3][1]), _vector(value)
    if len(registers) != count:
        raise L.unknown(f"{len(registers)} registers, expected {count}")
    b = 2 | count << 8 | address[2] << 19 | SPACES["shared" if "shared" in parts else "generic"] << 20 | transposed << 24
    values = [(L.use if name == "stmatrix" else L.define)(r, "b32") for r in registers]
    L.emit(name, [L.constant(ALL, False), address[0], *values], a=address[1], b=b,
           group="shared_store" if name == "stmatrix" else "shared_load")


@instruction("mma")
def _mma(L, name, parts, operands):
    satfinite = "satfinite" in parts
    parts = [p for p in parts if p != "satfinite"]
    m = re.fullmatch(r"sync\.aligned\.m(\d+)n8k(\d+)\.row\.col", ".".join(parts[:5]))
    if not m or len(parts) != 9:
        raise L.unknown("a shape")
    rows, depth = int(m[1]), int(m[2])
    d, a, b, c = parts[5:]
    L.expect(operands, 4)
    vectors = [_vector(o) for o in operands]
    if (d, a, b, c) == ("f64",) * 4 and (rows, depth) in ((8, 4), (16, 4), (16, 8), (16, 16)):
        counts, kinds, handler, code = (rows // 4, rows * depth // 32, depth // 4, rows // 4), ("f64",) * 4, "mma.f64", rows | depth << 8
    else:
        shapes = {"f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "s8": (16, 32), "u8": (16, 32)}
        whole = a in ("s8", "u8")
        accumulators = ("s32",) if whole else ("f16", "f32") if a == "f16" else ("f32",)
        known = rows == 16 and depth in shapes.get(a, ()) and (b in ("s8", "u8") if whole else a == b) and d == c and d in accumulators
        if not known or (satfinite and not whole):
            raise L.unknown("these types")
        per = {"f16": 2, "bf16": 2, "tf32": 1}.get(a, 4)
        size = 2 if d == "f16" else 4
        counts, kinds, handler = (size, depth // per // 2, depth // per // 4, size), ("b32",) * 4, "mma"
        code = MATRIX_TYPES[a] | MATRIX_TYPES[b] << 4 | depth << 8 | (d == "f16") << 16 | whole << 17 | satfinite << 18
    if tuple(map(len, vectors)) != counts:
        raise L.unknown(f"{tuple(map(len, vectors))} registers, expected {counts}")
    sources = [L.use(e, k) for v, k in zip(vectors[1:], kinds[1:]) for e in v]
    L.emit(handler, [L.constant(ALL, False), *(L.define(e, kinds[0]) for e in vectors[0]), *sources], a=code, group="mma")


@instruction("wmma")
def _wmma(L, name, parts, operands):
    shapes = {"m16n16k16": (16, 16, 16), "m32n8k16": (32, 8, 16), "m8n32k16": (8, 32, 16)}
    if parts[0] in ("load", "store"):
        which, layout, shape = parts[1], parts[4], parts[5]
        access = _access(L, parts[6:])
        if parts[2:4] != ["sync", "aligned"] or shape not in shapes or access.rest or access.kind not in ("f16", "bf16", "f32") \
                or layout not in ("row", "col"):
            raise L.unknown("a shape")
        rows, columns, depth = shapes[shape]
        rows, columns = {"a": (rows, depth), "b": (depth, columns)}.get(which, (rows, columns))
        address_text, value = operands[:2] if parts[0] == "store" else operands[1::-1]
        address, registers = L.address(address_text), _vector(value)
        stride = operands[2] if len(operands) == 3 else str(rows if layout == "col" else columns)
        values = [(L.use if parts[0] == "store" else L.define)(r, "b32") for r in registers]
        a = rows | columns << 8 | (layout == "col") << 20 | (which in "cd") << 21
        access.vector = len(registers)
        space = "global" if access.space == "generic" else access.space
        return L.emit("wmma." + parts[0], [L.constant(ALL, False), address[0], L.use(stride, "u32"), *values], a=a,
                      b=_layout(L, access, address, False) | address[1] << 32, group=f"{space}_{parts[0]}")
    if parts[:3] != ["mma", "sync", "aligned"] or parts[5] not in shapes:
        raise L.unknown("a shape")
    rows, columns, depth = shapes[parts[5]]
    kinds = parts[6:]
    if len(kinds) == 2:
        d, c, kind = *kinds, "f16"
    elif len(kinds) == 4 and kinds[1] == kinds[2] == "bf16":
        d, kind, _, c = kinds
    else:
        raise L.unknown("these types")
    if d not in ("f16", "f32") or c not in ("f16", "f32"):
        raise L.unknown("these types")
    vectors = [_vector(o) for o in operands]
    a = (rows | columns << 8 | depth << 16 | MATRIX_TYPES[kind] << 24 | (parts[3] == "col") << 28 | (parts[4] == "col") << 29
         | (d == "f16") << 30 | (c == "f16") << 31)
    b = len(vectors[0]) | len(vectors[1]) << 8 | len(vectors[2]) << 16
    sources = [L.use(e, "b32") for v in vectors[1:] for e in v]
    L.emit("wmma.mma", [L.constant(ALL, False), *(L.define(e, "b32") for e in vectors[0]), *sources], a=a, b=b, group="mma")


@instruction("membar", "fence", "nanosleep", "griddepcontrol", "setmaxnreg", "prefetch", "prefetchu", "pmevent", "applypriority")
def _ignored(L, name, parts, operands):
    L.emit("nothing", [], group="fence" if name in ("membar", "fence") else "other")


@instruction("createpolicy")
def _policy(L, name, parts, operands):
    L.emit("mov.b64", [L.define(operands[0], "b64"), L.constant(0, True)], group="move")
