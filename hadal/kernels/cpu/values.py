"""Types of the emitted code and `Value`, one value in it; the ground of `ir`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    from hadal.kernels.cpu.ir import Function

I1, I8, I16, I32, I64, PTR = "i1", "i8", "i16", "i32", "i64", "ptr"
F32, F64, BF16 = "float", "double", "bfloat"
_FLOATS = (F32, F64, BF16)
_BITS = {I1: 1, I8: 8, I16: 16, I32: 32, I64: 64, F32: 32, F64: 64, BF16: 16, PTR: 64}


def vec(lanes: int, element: str) -> str:
    """The type of a vector; one lane is the element itself."""
    return f"<{lanes} x {element}>" if lanes > 1 else element


def lanes(kind: str) -> int:
    """Number of lanes of a type."""
    return int(kind[1:].split(" x ")[0]) if kind[0] == "<" else 1


def element(kind: str) -> str:
    """Element type of a vector, or the type itself."""
    return kind[1:-1].split(" x ")[1] if kind[0] == "<" else kind


def size(kind: str) -> int:
    """Bytes of a type in memory."""
    return lanes(kind) * _BITS[element(kind)] // 8


Operand = Union["Value", int, float]


@dataclass(frozen=True, eq=False)
class Value:
    """One SSA value."""

    f: Function
    kind: str
    name: str

    @property
    def is_float(self) -> bool:
        """Whether its elements are floating-point numbers."""
        return element(self.kind) in _FLOATS

    def _binary(self, integer: str, real: str, other: Operand) -> Value:
        operation = real if self.is_float else integer
        return self.f.emit(self.kind, f"{operation} {self.kind} {self.name}, {self.f.const(self.kind, other).name}")

    def __add__(self, other: Operand) -> Value:
        return self._binary("add", "fadd", other)

    def __sub__(self, other: Operand) -> Value:
        return self._binary("sub", "fsub", other)

    def __rsub__(self, other: Operand) -> Value:
        return self.f.const(self.kind, other) - self

    def __mul__(self, other: Operand) -> Value:
        return self._binary("mul", "fmul", other)

    def __truediv__(self, other: Operand) -> Value:
        return self._binary("sdiv", "fdiv", other)

    def __rtruediv__(self, other: Operand) -> Value:
        return self.f.const(self.kind, other) / self

    def __mod__(self, other: Operand) -> Value:
        return self._binary("srem", "frem", other)

    def __and__(self, other: Operand) -> Value:
        return self._binary("and", "and", other)

    def __or__(self, other: Operand) -> Value:
        return self._binary("or", "or", other)

    def __xor__(self, other: Operand) -> Value:
        return self._binary("xor", "xor", other)

    def __lshift__(self, other: Operand) -> Value:
        return self._binary("shl", "shl", other)

    def __rshift__(self, other: Operand) -> Value:
        """Logical shift; `sar` is the arithmetic one."""
        return self._binary("lshr", "lshr", other)

    def sar(self, other: Operand) -> Value:
        """Arithmetic shift right."""
        return self._binary("ashr", "ashr", other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Value:
        return self.f.emit(self.kind, f"fneg {self.kind} {self.name}") if self.is_float else 0 - self

    def _compare(self, integer: str, real: str, other: Operand) -> Value:
        kind = vec(lanes(self.kind), I1)
        test = f"fcmp {real}" if self.is_float else f"icmp {integer}"
        return self.f.emit(kind, f"{test} {self.kind} {self.name}, {self.f.const(self.kind, other).name}")

    def __lt__(self, other: Operand) -> Value:
        return self._compare("slt", "olt", other)

    def __le__(self, other: Operand) -> Value:
        return self._compare("sle", "ole", other)

    def __gt__(self, other: Operand) -> Value:
        return self._compare("sgt", "ogt", other)

    def __ge__(self, other: Operand) -> Value:
        return self._compare("sge", "oge", other)

    def equals(self, other: Operand) -> Value:
        """Lane-wise equality."""
        return self._compare("eq", "oeq", other)

    def differs(self, other: Operand) -> Value:
        """Lane-wise inequality; NaN differs from all."""
        return self._compare("ne", "une", other)

    def choose(self, yes: Operand, no: Operand) -> Value:
        """`yes` where this condition holds, else `no`; at least one of them is a Value."""
        kind = yes.kind if isinstance(yes, Value) else no.kind  # type: ignore[union-attr]
        a, b = self.f.const(kind, yes), self.f.const(kind, no)
        return self.f.emit(kind, f"select {self.kind} {self.name}, {kind} {a.name}, {kind} {b.name}")

    def _as(self, operation: str, kind: str) -> Value:
        return self if kind == self.kind else self.f.emit(kind, f"{operation} {self.kind} {self.name} to {kind}")

    def bits(self, kind: str) -> Value:
        """The same bits as another type."""
        return self._as("bitcast", kind)

    def zext(self, kind: str) -> Value:
        """Widened without sign."""
        return self._as("zext", kind)

    def sext(self, kind: str) -> Value:
        """Widened with sign."""
        return self._as("sext", kind)

    def trunc(self, kind: str) -> Value:
        """The low bits."""
        return self._as("trunc", kind)

    def to_float(self, kind: str) -> Value:
        """Signed integers as floating-point numbers."""
        return self._as("sitofp", kind)

    def to_int(self, kind: str) -> Value:
        """Truncated towards zero."""
        return self._as("fptosi", kind)

    def widen(self, kind: str) -> Value:
        """A floating-point number with more bits."""
        return self._as("fpext", kind)

    def narrow(self, kind: str) -> Value:
        """A floating-point number rounded to fewer bits."""
        return self._as("fptrunc", kind)

    def pick(self, indices: Sequence[int], other: Value | None = None) -> Value:
        """Lanes by constant index, counting on into `other`."""
        kind = vec(len(indices), element(self.kind))
        mask = f"<{len(indices)} x i32> <{', '.join(f'i32 {i}' for i in indices)}>"
        second = other.name if other is not None else "poison"
        if kind == element(self.kind):
            return self.lane(indices[0])
        return self.f.emit(kind, f"shufflevector {self.kind} {self.name}, {self.kind} {second}, {mask}")

    def lane(self, index: int) -> Value:
        """One lane as a scalar."""
        return self.f.emit(element(self.kind), f"extractelement {self.kind} {self.name}, i32 {index}")

    def spread(self, count: int) -> Value:
        """A scalar in every lane."""
        kind = vec(count, self.kind)
        first = self.f.emit(kind, f"insertelement {kind} poison, {self.kind} {self.name}, i32 0")
        return self.f.emit(kind, f"shufflevector {kind} {first.name}, {kind} poison, <{count} x i32> zeroinitializer")

    def reduce(self, operation: str) -> Value:
        """All lanes folded by "add", "max" or "min" in a fixed tree: halves onto halves."""
        value = self
        while lanes(value.kind) > 1:
            half = lanes(value.kind) // 2
            low, high = value.pick(range(half)), value.pick(range(half, 2 * half))
            value = {"add": low.__add__, "max": low.max, "min": low.min}[operation](high)
        return value

    def max(self, other: Operand) -> Value:
        """Lane-wise larger of two numbers; a NaN in `self` gives `other`."""
        other = self.f.const(self.kind, other)
        return (self > other).choose(self, other)

    def min(self, other: Operand) -> Value:
        """Lane-wise smaller of two numbers; a NaN in `self` gives `other`."""
        other = self.f.const(self.kind, other)
        return (self < other).choose(self, other)


def literal(kind: str, value: float) -> str:
    """A constant of an element type as LLVM writes it."""
    if kind == F32:  # LLVM writes a float as the bits of the double that equals it
        rounded = struct.unpack("<f", struct.pack("<f", value))[0]
        return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016x}"
    if kind == F64:
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016x}"
    if kind == BF16:
        return f"0xR{struct.unpack('<I', struct.pack('<f', value))[0] >> 16:04x}"
    return str(int(value))
