"""A small builder of LLVM IR: a kernel is a Python function that writes values, loops and conditions as they run.

`Value` carries its type, so operators pick the instruction; a Python number beside a Value becomes a constant of that
type. `for i in f.range(n)` and `with f.when(condition)` emit control flow, `f.var` a variable that may be set inside
it (promoted to a register when the module is optimised). Addresses are `ptr` values; offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from hadal.kernels.cpu.values import (
    BF16,
    F32,
    F64,
    I1,
    I8,
    I16,
    I32,
    I64,
    PTR,
    Operand,
    Value,
    element,
    lanes,
    literal,
    size,
    vec,
)  # fmt: skip

__all__ = [
    "BF16",
    "F32",
    "F64",
    "I1",
    "I8",
    "I16",
    "I32",
    "I64",
    "PTR",
    "Function",
    "Module",
    "Operand",
    "Value",
    "Variable",
    "WhileLoop",
    "element",
    "lanes",
    "size",
    "vec",
]  # fmt: skip


@dataclass(frozen=True)
class Variable:
    """A place on the stack that loops and conditions may set."""

    f: Function
    kind: str
    place: Value

    def get(self) -> Value:
        """Its value here."""
        return self.f.load(self.kind, self.place)

    def set(self, value: Operand) -> None:
        """Give it a new value."""
        self.f.store(self.f.const(self.kind, value), self.place)


class Function:
    """One function under construction: `arguments` maps names to types, `f["x"]` is the argument x."""

    def __init__(self, module: Module, name: str, arguments: dict[str, str], *, exported: bool = True) -> None:
        self.module, self.name, self.exported = module, name, exported
        self.signature = dict(arguments)
        self._entry: list[str] = []
        self._body: list[str] = []
        self._count = 0

    def __getitem__(self, name: str) -> Value:
        return Value(self, self.signature[name], f"%{name}")

    def text(self) -> str:
        """The finished function."""
        arguments = ", ".join(f"{kind} %{name}" for name, kind in self.signature.items())
        lines = ["entry:", *self._entry, *self._body, "  ret void"]
        linkage = "" if self.exported else "internal "
        return f"define {linkage}void @{self.name}({arguments}) #0 {{\n" + "\n".join(lines) + "\n}"

    def line(self, text: str) -> None:
        """An instruction without a result."""
        self._body.append("  " + text)

    def emit(self, kind: str, text: str) -> Value:
        """An instruction with a result."""
        self._count += 1
        name = f"%v{self._count}"
        self._body.append(f"  {name} = {text}")
        return Value(self, kind, name)

    def const(self, kind: str, value: Operand | Sequence[float]) -> Value:
        """A constant: a number in every lane, or one number per lane; a Value is returned as it is."""
        if isinstance(value, Value):
            assert value.kind == kind, (value.kind, kind)
            return value
        if isinstance(value, Sequence):
            inner = ", ".join(f"{element(kind)} {literal(element(kind), v)}" for v in value)
            return Value(self, kind, f"<{inner}>")
        text = literal(element(kind), value)
        return Value(self, kind, text if lanes(kind) == 1 else f"splat ({element(kind)} {text})")

    def at(self, pointer: Value, offset: Operand = 0) -> Value:
        """The address `offset` bytes further."""
        if isinstance(offset, int) and offset == 0:
            return pointer
        return self.emit(PTR, f"getelementptr i8, ptr {pointer.name}, i64 {self.const(I64, offset).name}")

    def load(self, kind: str, pointer: Value, offset: Operand = 0, align: int = 1) -> Value:
        """A value from memory."""
        return self.emit(kind, f"load {kind}, ptr {self.at(pointer, offset).name}, align {align}")

    def store(self, value: Value, pointer: Value, offset: Operand = 0, align: int = 1) -> None:
        """A value into memory."""
        self.line(f"store {value.kind} {value.name}, ptr {self.at(pointer, offset).name}, align {align}")

    def broadcast(self, kind: str, pointer: Value, offset: Operand = 0) -> Value:
        """One element from memory in every lane."""
        return self.load(element(kind), pointer, offset).spread(lanes(kind))

    def pointer(self, address: Value) -> Value:
        """An integer as an address."""
        return self.emit(PTR, f"inttoptr i64 {address.name} to ptr")

    def var(self, value: Value) -> Variable:
        """A variable with its first value."""
        variable = Variable(self, value.kind, self.scratch(size(value.kind)))
        variable.set(value)
        return variable

    def scratch(self, nbytes: int) -> Value:
        """Bytes on the stack, aligned to a cache line."""
        self._count += 1
        name = f"%s{self._count}"
        self._entry.append(f"  {name} = alloca i8, i64 {nbytes}, align 64")
        return Value(self, PTR, name)

    def call(self, kind: str, name: str, *arguments: Value) -> Value:
        """Call an LLVM intrinsic or an external function; `kind` is the result's type."""
        declared = ", ".join(a.kind for a in arguments)
        self.module.declare(name, f"declare {kind} @{name}({declared})")
        return self.emit(kind, self._invocation(kind, name, arguments))

    def do(self, name: str, *arguments: Value) -> None:
        """As `call` for a function without a result; functions of this module need no declaration."""
        if name not in self.module.functions:
            self.module.declare(name, f"declare void @{name}({', '.join(a.kind for a in arguments)})")
        self.line(self._invocation("void", name, arguments))

    def _invocation(self, kind: str, name: str, arguments: Sequence[Value]) -> str:
        return f"call {kind} @{name}({', '.join(f'{a.kind} {a.name}' for a in arguments)})"

    def prefetch(self, pointer: Value, offset: Operand = 0) -> None:
        """Ask for a cache line to be brought into the second cache."""
        hints = [self.const(I32, i) for i in (0, 2, 1)]  # read, keep in the second cache, data
        self.do("llvm.prefetch.p0", self.at(pointer, offset), *hints)

    def fma(self, a: Value, b: Operand, c: Operand) -> Value:
        """a * b + c with one rounding."""
        suffix = ("" if lanes(a.kind) == 1 else f"v{lanes(a.kind)}") + f"f{8 * size(element(a.kind))}"
        return self.call(a.kind, f"llvm.fma.{suffix}", a, self.const(a.kind, b), self.const(a.kind, c))

    def unary(self, name: str, value: Value) -> Value:
        """An LLVM intrinsic with one operand: sqrt, rint, fabs, floor."""
        count, kind = lanes(value.kind), {F32: "f32", F64: "f64", I32: "i32"}[element(value.kind)]
        return self.call(value.kind, f"llvm.{name}.v{count}{kind}" if count > 1 else f"llvm.{name}.{kind}", value)

    def range(self, stop: Operand, start: Operand = 0, step: Operand = 1) -> Iterator[Value]:
        """`for i in f.range(n):` emits a loop; the body is written once and runs for each i."""
        first, stop, step = self.const(I64, start), self.const(I64, stop), self.const(I64, step)
        head, body, done = self._labels("head", "body", "done")
        counter = self.var(first)
        self._branch(head)
        self._label(head)
        i = counter.get()
        self._fork(i < stop, body, done)
        self._label(body)
        yield i
        counter.set(i + step)
        self._branch(head)
        self._label(done)

    def repeat_while(self) -> Iterator[WhileLoop]:
        """`for loop in f.repeat_while():` emits an endless loop that `loop.leave_unless(condition)` ends."""
        body, done = self._labels("again", "left")
        self._branch(body)
        self._label(body)
        yield WhileLoop(self, done)
        self._branch(body)
        self._label(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body only where a scalar condition holds."""
        yes, done = self._labels("yes", "end")
        self._fork(condition, yes, done)
        self._label(yes)
        yield
        self._branch(done)
        self._label(done)

    def _labels(self, *stems: str) -> list[str]:
        self._count += 1
        return [f"{stem}{self._count}" for stem in stems]

    def _label(self, name: str) -> None:
        self._body.append(f"{name}:")

    def _branch(self, label: str) -> None:
        self.line(f"br label %{label}")

    def _fork(self, condition: Value, yes: str, no: str) -> None:
        self.line(f"br i1 {condition.name}, label %{yes}, label %{no}")


@dataclass(frozen=True)
class WhileLoop:
    """Inside `Function.repeat_while`."""

    f: Function
    done: str

    def leave_unless(self, condition: Value) -> None:
        """End the loop here unless the condition holds."""
        (further,) = self.f._labels("further")
        self.f._fork(condition, further, self.done)
        self.f._label(further)


class Module:
    """Functions and declarations that are compiled together; `native_bf16`: the processor rounds to BF16 itself."""

    native_bf16 = False

    def __init__(self) -> None:
        self.functions: dict[str, Function] = {}
        self._declared: dict[str, str] = {}

    @contextmanager
    def function(self, name: str, arguments: dict[str, str], *, exported: bool = True) -> Iterator[Function]:
        """Write one function; it returns nothing."""
        assert name not in self.functions, name
        function = Function(self, name, arguments, exported=exported)
        self.functions[name] = function
        yield function

    def declare(self, name: str, text: str) -> None:
        """Declare a function that is defined elsewhere."""
        assert self._declared.setdefault(name, text) == text, (self._declared[name], text)

    def text(self, attributes: str = "nounwind") -> str:
        """The whole module as LLVM assembly."""
        parts = [*self._declared.values(), *(f.text() for f in self.functions.values())]
        return "\n".join([*parts, f"attributes #0 = {{ {attributes} }}"])
