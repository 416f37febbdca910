"""Emitted functions compute what Python computes: operators, loops, conditions, variables, vectors, constants."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.kernels.cpu import ir
from hadal.kernels.cpu.ir import BF16, F32, F64, I1, I8, I16, I32, I64, Function, Value, element, lanes, size, vec
from hadal.kernels.cpu.program import KernelModule
from tests.kernels.cpu.harness import Kernels, address, buffer, instruction_sets
from tests.kernels.cpu.vectors import VectorFunctions

ISA = instruction_sets()[0]
WORDS = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-20, 20)
FLOATS = st.floats(width=32, allow_nan=False, allow_subnormal=False) | st.integers(-9, 9).map(float)


def wrap(value: int) -> int:
    """Two's complement of 64 bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


Both = Callable[[Value, Value], Value]
INTEGER: dict[str, tuple[Both, Callable[[int, int], int]]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b, lambda a, b: a - b),
    "rsub": (lambda a, b: 7 - a, lambda a, b: 7 - a),
    "radd": (lambda a, b: 7 + a, lambda a, b: 7 + a),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "rmul": (lambda a, b: -3 * a, lambda a, b: -3 * a),
    "div": (lambda a, b: a.sar(1) / (b | 1), lambda a, b: quotient(a >> 1, b | 1)),
    "mod": (lambda a, b: a.sar(1) % (b | 1), lambda a, b: (a >> 1) - quotient(a >> 1, b | 1) * (b | 1)),
    "and": (lambda a, b: a & b, lambda a, b: a & b),
    "or": (lambda a, b: a | b, lambda a, b: a | b),
    "xor": (lambda a, b: a ^ b, lambda a, b: a ^ b),
    "shl": (lambda a, b: a << (b & 63), lambda a, b: a << (b & 63)),
    "shr": (lambda a, b: a >> (b & 63), lambda a, b: (a % (1 << 64)) >> (b & 63)),
    "sar": (lambda a, b: a.sar(b & 63), lambda a, b: a >> (b & 63)),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "lt": (lambda a, b: (a < b).zext(I64), lambda a, b: int(a < b)),
    "le": (lambda a, b: (a <= b).zext(I64), lambda a, b: int(a <= b)),
    "gt": (lambda a, b: (a > b).sext(I64), lambda a, b: -int(a > b)),
    "ge": (lambda a, b: (a >= b).zext(I64), lambda a, b: int(a >= b)),
    "eq": (lambda a, b: a.equals(b).zext(I64), lambda a, b: int(a == b)),
    "ne": (lambda a, b: a.differs(b).zext(I64), lambda a, b: int(a != b)),
    "max": (lambda a, b: a.max(b), max),
    "min": (lambda a, b: a.min(b), min),
    "choose": (lambda a, b: (a > 0).choose(b, 5), lambda a, b: b if a > 0 else 5),
    "byte": (lambda a, b: a.trunc(I8).sext(I64), lambda a, b: (a + 128) % 256 - 128),
    "half": (lambda a, b: a.trunc(I16).zext(I64), lambda a, b: a % 65536),
}
REAL: dict[str, tuple[Both, Callable[[np.float32, np.float32], Any]]] = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "sub": (lambda a, b: a - b, lambda a, b: a - b),
    "rsub": (lambda a, b: 1.5 - a, lambda a, b: np.float32(1.5) - a),
    "mul": (lambda a, b: a * b, lambda a, b: a * b),
    "div": (lambda a, b: a / (b * b + 1.0), lambda a, b: a / (b * b + np.float32(1))),
    "rdiv": (lambda a, b: 2.0 / (a * a + 1.0), lambda a, b: np.float32(2) / (a * a + np.float32(1))),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "max": (lambda a, b: a.max(b), lambda a, b: a if a > b else b),
    "min": (lambda a, b: a.min(0.25), lambda a, b: a if a < 0.25 else np.float32(0.25)),
    "choose": (lambda a, b: (a <= b).choose(a, b), lambda a, b: a if a <= b else b),
    "lt": (lambda a, b: (a < b).choose(a.f.const(F32, 1), 0.0), lambda a, b: float(a < b)),
    "ge": (lambda a, b: (a >= b).choose(a.f.const(F32, 1), 0.0), lambda a, b: float(a >= b)),
    "eq": (lambda a, b: a.equals(b).choose(a.f.const(F32, 1), 0.0), lambda a, b: float(a == b)),
    "ne": (lambda a, b: a.differs(b).choose(a.f.const(F32, 1), 0.0), lambda a, b: float(a != b)),
    "fma": (lambda a, b: a.f.fma(a, b, 1.0), lambda a, b: fused(float(a), float(b))),
    "sqrt": (lambda a, b: a.f.unary("sqrt", a.f.unary("fabs", a)), lambda a, b: np.sqrt(np.abs(a))),
    "rint": (lambda a, b: a.f.unary("rint", a), lambda a, b: np.rint(a)),
    "floor": (lambda a, b: a.f.unary("floor", a), lambda a, b: np.floor(a)),
    "wide": (lambda a, b: (a.widen(F64) * b.widen(F64)).narrow(F32), lambda a, b: np.float32(float(a) * float(b))),
    "bits": (lambda a, b: (a.bits(I32) ^ (1 << 31)).bits(F32), lambda a, b: -a),
    "whole": (
        lambda a, b: a.max(-9e6).min(9e6).to_int(I64).to_float(F32),
        lambda a, b: np.trunc(np.clip(a, -9e6, 9e6)),
    ),
}


def fused(a: float, b: float) -> np.float32:
    """a * b + 1 with one rounding; exact in rationals."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return np.float32(a * b + 1)
    exact = Fraction(a) * Fraction(b) + 1
    nearest = np.float32(float(exact))
    if not np.isfinite(nearest):
        return nearest
    around = [nearest, np.nextafter(nearest, np.float32(np.inf)), np.nextafter(nearest, np.float32(-np.inf))]
    finite = [x for x in around if np.isfinite(x)]
    return min(finite, key=lambda x: (abs(Fraction(float(x)) - exact), x.view(np.uint32) & 1))


@functools.cache
def operators() -> Kernels:
    def emit(module: KernelModule) -> None:
        with module.kernel("integer", "a b out") as k:
            for i, (emitted, _) in enumerate(INTEGER.values()):
                k.f.store(emitted(k.arg("a"), k.arg("b")), k.ptr("out"), 8 * i)
        with module.kernel("real", "a b out") as k:
            for i, (emitted, _) in enumerate(REAL.values()):
                k.f.store(emitted(k.real("a"), k.real("b")), k.ptr("out"), 4 * i)

    return Kernels(ISA, emit)


@settings(deadline=None)
@given(a=WORDS, b=WORDS)
def test_integer_operators(a: int, b: int) -> None:
    out = np.zeros(len(INTEGER), np.int64)
    operators().run("integer", np.zeros(1, np.int64), a=a, b=b, out=address(out))
    expected = {name: wrap(python(a, b)) for name, (_, python) in INTEGER.items()}
    assert dict(zip(INTEGER, out.tolist(), strict=True)) == expected


@settings(deadline=None)
@given(a=FLOATS, b=FLOATS)
def test_floating_point_operators(a: float, b: float) -> None:
    out = np.zeros(len(REAL), np.float32)
    words = [struct.unpack("<i", struct.pack("<f", x))[0] for x in (a, b)]
    operators().run("real", np.zeros(1, np.int64), a=words[0], b=words[1], out=address(out))
    with np.errstate(all="ignore"):
        expected = np.array([python(np.float32(a), np.float32(b)) for _, python in REAL.values()], np.float32)
    for name, found, wanted in zip(REAL, out, expected, strict=True):
        assert np.array_equal(found, wanted, equal_nan=True), (name, found, wanted)


def run(write: Callable[[Function, Value], None], words: int = 16, **arguments: int) -> list[int]:
    """What a function leaves in `words` words, whose other arguments are integers."""

    def emit(module: KernelModule) -> None:
        with module.kernel("one", " ".join(["out", *arguments])) as k:
            for name in arguments:
                given_words[name] = k.arg(name)
            write(k.f, k.ptr("out"))

    given_words.clear()
    out = np.zeros(words, np.int64)
    Kernels(ISA, emit).run("one", np.zeros(1, np.int64), out=address(out), **arguments)
    found: list[int] = out.tolist()
    return found


given_words: dict[str, Value] = {}


def test_loops_nest_and_may_be_empty() -> None:
    def write(f: Function, out: Value) -> None:
        total, empty = f.var(f.const(I64, 0)), f.var(f.const(I64, 0))
        for i in f.range(given_words["n"]):
            for j in f.range(i, 1, 2):
                total.set(total.get() + i * j)
            for _ in f.range(3, 5):
                empty.set(1)
        f.store(total.get(), out)
        f.store(empty.get(), out, 8)

    wanted = sum(i * j for i in range(13) for j in range(1, i, 2))
    assert run(write, 2, n=13) == [wanted, 0]
    assert run(write, 2, n=0) == run(write, 2, n=-4) == [0, 0]


def test_conditions_nest() -> None:
    def write(f: Function, out: Value) -> None:
        for i in f.range(6):
            with f.when(i > 1):
                f.store(f.const(I64, 1), out, i * 8)
                with f.when((i % 2).equals(0)):
                    f.store(i * 10, out, i * 8)

    assert run(write, 6) == [0, 0, 20, 1, 40, 1]


def test_an_endless_loop_ends_where_it_is_told_to() -> None:
    def write(f: Function, out: Value) -> None:
        value, turns = f.var(given_words["n"]), f.var(f.const(I64, 0))
        for loop in f.repeat_while():
            loop.leave_unless(value.get() > 1)
            turns.set(turns.get() + 1)
            odd = (value.get() & 1).differs(0)
            value.set(odd.choose(value.get() * 3 + 1, value.get() / 2))
        f.store(turns.get(), out)

    assert [run(write, 1, n=n)[0] for n in (1, 6, 27)] == [0, 8, 111]


def test_a_variable_in_a_loop_starts_anew() -> None:
    def write(f: Function, out: Value) -> None:
        for i in f.range(4):
            inner = f.var(i)
            with f.when(i.equals(2)):
                inner.set(100)
            f.store(inner.get(), out, i * 8)

    assert run(write, 4) == [0, 1, 100, 3]


def test_scratch_begins_on_a_cache_line_also_inside_a_loop() -> None:
    def write(f: Function, out: Value) -> None:
        for i in f.range(2):
            for n in (1, 64):
                place = f.scratch(n)
                f.store(f.emit(I64, f"ptrtoint ptr {place.name} to i64") & 63, out, i * 8)

    assert run(write, 2) == [0, 0]


def test_functions_call_each_other_and_shares_cover_everything_once() -> None:
    counts = np.zeros(50, np.int64)

    def emit(module: KernelModule) -> None:
        with module.function("add_one", {"place": "ptr"}, exported=False) as f:
            f.store(f.load(I64, f["place"]) + 1, f["place"])
        with module.kernel("share", "counts total") as k:
            for i in k.share(k.arg("total")):
                k.f.do("add_one", k.f.at(k.ptr("counts"), i * 8))

    kernels = Kernels(ISA, emit)
    for threads in (1, 2, 3, 7, 64):
        for total in (0, 1, 5, 50):
            counts[:] = 0
            kernels.run("share", np.zeros(1, np.int64), threads, counts=address(counts), total=total)
            assert counts.tolist() == [1] * total + [0] * (50 - total)


@functools.cache
def vectors(isa: str) -> VectorFunctions:
    return VectorFunctions(
        isa,
        {
            "pick": lambda f, x: x.pick([15 - i for i in range(16)]),
            "both": lambda f, x: x.pick([0, 17, 2, 19] * 4, x * 2.0),
            "lane": lambda f, x: x.lane(3).spread(16),
            "one": lambda f, x: x.pick([5]).spread(16),
            "sum": lambda f, x: x.reduce("add").spread(16),
            "largest": lambda f, x: x.reduce("max").spread(16),
            "smallest": lambda f, x: x.reduce("min").spread(16),
            "constant": lambda f, x: x * f.const(x.kind, [float(i) for i in range(16)]),
            "bytes": lambda f, x: x.to_int(vec(16, I32)).trunc(vec(16, I8)).sext(vec(16, I32)),
            "bf16": lambda f, x: (x.bits(vec(16, I32)) >> 16).trunc(vec(16, I16)).bits(vec(16, BF16)).widen(x.kind),
        },
    )


@pytest.mark.parametrize("isa", instruction_sets())
def test_vectors_are_picked_folded_and_converted(isa: str) -> None:
    x = np.random.default_rng(3).uniform(-300, 300, 160).astype(np.float32)
    rows = x.reshape(-1, 16)

    def found(name: str) -> np.ndarray:
        return vectors(isa)(name, x, np.float32).reshape(-1, 16)

    assert np.array_equal(found("pick"), rows[:, ::-1])
    assert np.array_equal(found("both"), np.where(np.arange(16) % 2, rows * 2, rows)[:, [0, 1, 2, 3] * 4])
    assert np.array_equal(found("lane"), np.repeat(rows[:, 3:4], 16, 1))
    assert np.array_equal(found("one"), np.repeat(rows[:, 5:6], 16, 1))
    assert np.array_equal(found("largest")[:, 0], rows.max(1)) and np.array_equal(found("smallest")[:, 9], rows.min(1))
    tree = rows
    while tree.shape[1] > 1:
        tree = tree[:, : tree.shape[1] // 2] + tree[:, tree.shape[1] // 2 :]
    assert np.array_equal(found("sum")[:, :1], tree)
    assert np.array_equal(found("constant"), rows * np.arange(16, dtype=np.float32))
    assert np.array_equal(found("bytes").view(np.int32), rows.astype(np.int32).astype(np.int8).astype(np.int32))
    assert np.array_equal(found("bf16"), (rows.view(np.uint32) & 0xFFFF0000).view(np.float32))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -2.5, 0.1, 1e-42, 3.4e38, float("inf"), float("-inf"), 2**-126])
def test_constants_have_the_bits_of_their_type(value: float) -> None:
    place = buffer(64)

    def emit(module: KernelModule) -> None:
        with module.kernel("constants", "out") as k:
            f, out = k.f, k.ptr("out")
            f.store(f.const(F64, value), out)
            f.store(f.const(F32, value), out, 8)
            f.store(f.const(BF16, value), out, 12)
            f.store(f.const(vec(2, F32), [value, -value]), out, 16)
            f.store(f.const(vec(4, F32), value), out, 32)

    Kernels(ISA, emit).run("constants", np.zeros(1, np.int64), out=address(place))
    single = np.float32(value)
    assert place[:8].view(np.int64)[0] == np.float64(value).view(np.int64)
    assert place[8:12].view(np.int32)[0] == single.view(np.int32)
    assert place[12:14].view(np.uint16)[0] == single.view(np.uint32) >> 16
    assert place[16:24].view(np.int32).tolist() == [x.view(np.int32) for x in (single, -single)]
    assert place[32:48].view(np.int32).tolist() == [single.view(np.int32)] * 4


def test_types_know_their_sizes() -> None:
    assert [size(k) for k in (I8, I16, I32, I64, F32, F64, BF16, ir.PTR)] == [1, 2, 4, 8, 4, 8, 2, 8]
    assert vec(1, F32) == F32 and size(vec(16, F32)) == 64 and lanes(vec(8, I16)) == 8 and lanes(I64) == 1
    assert element(vec(8, BF16)) == BF16 and element(I1) == I1


def test_kinds_do_not_mix_and_names_are_given_once() -> None:
    module = ir.Module()
    with module.function("f", {"x": I64}) as f, pytest.raises(AssertionError):
        f["x"] + f.const(I32, 1)
    with pytest.raises(AssertionError), module.function("f", {}):
        pass
    module.declare("g", "declare void @g()")
    with pytest.raises(AssertionError):
        module.declare("g", "declare i32 @g()")
