"""Functions of vectors that kernels share: exponential, logarithm, sine, rounding to BF16 and its inverse.

They use no library, so that every lane, thread and row count gives the same bits. Errors against exact values are a
few units in the last place of FP32 (tested).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from hadal.kernels.cpu.ir import BF16, F32, F64, I16, I32, I64, Function, Value, element, lanes, vec

_LOG2E = 1 / math.log(2)
_LN2_HIGH = 0.693359375
_LN2_LOW = math.log(2) - _LN2_HIGH
_SQRT_HALF = 0x3F3504F3  # the bits of 2^-1/2
_HALF_PI_HIGH = 1.5707963267948966
_HALF_PI_LOW = 6.123233995736766e-17


def polynomial(f: Function, x: Value, coefficients: Sequence[float]) -> Value:
    """sum_i c_i x^i by Horner's rule."""
    value = f.const(x.kind, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        value = f.fma(value, x, c)
    return value


def exp(f: Function, x: Value) -> Value:
    """e^x in FP32; 0 below -87.3, and the largest normal power above 88."""
    n = f.unary("rint", x.max(-104.0).min(88.0) * _LOG2E)
    r = f.fma(n, -_LN2_LOW, f.fma(n, -_LN2_HIGH, x.max(-104.0).min(88.0)))
    power = polynomial(f, r, [1 / math.factorial(i) for i in range(8)])
    integers = vec(lanes(x.kind), I32)
    scaled = (power.bits(integers) + (n.to_int(integers) << 23)).bits(x.kind)
    return (x < -87.3).choose(f.const(x.kind, 0), scaled)


def log1p_unit(f: Function, u: Value) -> Value:
    """log(1 + u) for -1/2 <= u <= 1 with a small relative error, as 2 atanh(u / (2 + u))."""
    s = u / (u + 2.0)
    return s * 2.0 * polynomial(f, s * s, [1 / (2 * i + 1) for i in range(10)])


def log(f: Function, x: Value) -> Value:
    """log x of positive normal numbers, with a small relative error also beside 1."""
    integers = vec(lanes(x.kind), I32)
    exponent = (x.bits(integers) - _SQRT_HALF).sar(23)
    u = (x.bits(integers) - (exponent << 23)).bits(x.kind) - 1.0
    n = exponent.to_float(x.kind)
    return f.fma(n, _LN2_HIGH, f.fma(n, _LN2_LOW, log1p_unit(f, u)))


def softplus(f: Function, x: Value) -> Value:
    """log(1 + e^x)."""
    magnitude = f.unary("fabs", x)
    return x.max(0.0) + log1p_unit(f, exp(f, -magnitude))


def sigmoid(f: Function, x: Value) -> Value:
    """1 / (1 + e^-x)."""
    return 1.0 / (exp(f, -x) + 1.0)


def silu(f: Function, x: Value) -> Value:
    """x sigmoid(x)."""
    return x / (exp(f, -x) + 1.0)


def cosine_sine(f: Function, angle: Value) -> tuple[Value, Value]:
    """cos and sin of FP32 angles up to 2^31, computed in FP64 and rounded once."""
    wide, whole = vec(lanes(angle.kind), F64), vec(lanes(angle.kind), I64)
    x = angle.widen(wide)
    quarter = f.unary("rint", x * (1 / _HALF_PI_HIGH))
    r = f.fma(quarter, -_HALF_PI_LOW, f.fma(quarter, -_HALF_PI_HIGH, x))
    z = r * r
    sine = r * polynomial(f, z, [(-1) ** i / math.factorial(2 * i + 1) for i in range(7)])
    cosine = polynomial(f, z, [(-1) ** i / math.factorial(2 * i) for i in range(8)])
    turns = quarter.to_int(whole)
    odd = (turns & 1).differs(0)
    flip_sine, flip_cosine = (turns & 2).differs(0), ((turns + 1) & 2).differs(0)
    s, c = odd.choose(cosine, sine), odd.choose(sine, cosine)
    return flip_cosine.choose(-c, c).narrow(angle.kind), flip_sine.choose(-s, s).narrow(angle.kind)


def round_bf16(f: Function, x: Value) -> Value:
    """FP32 rounded to the nearest BF16, ties to even, as 16-bit integers; subnormals may become 0."""
    words, wide = vec(lanes(x.kind), I16), vec(lanes(x.kind), I32)
    if f.module.native_bf16:
        return x.narrow(vec(lanes(x.kind), BF16)).bits(words)
    bits = x.bits(wide)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).trunc(words)


def join_bf16(f: Function, low: Value, high: Value) -> Value:
    """Two times 16 FP32 values rounded to BF16, as 32 integers of 16 bits."""
    if f.module.native_bf16:
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        return f.call(vec(32, BF16), name, high, low).bits(vec(32, I16))
    return round_bf16(f, low).pick(range(32), round_bf16(f, high))


def widen_bf16(f: Function, words: Value) -> Value:
    """BF16 values, given as 16-bit integers, in FP32."""
    assert element(words.kind) in (I16, BF16)
    count = lanes(words.kind)
    return (words.bits(vec(count, I16)).zext(vec(count, I32)) << 16).bits(vec(count, F32))


def through_bf16(f: Function, x: Value) -> Value:
    """FP32 values rounded to BF16, as FP32."""
    return widen_bf16(f, round_bf16(f, x))


def largest(f: Function, values: Sequence[Value]) -> Value:
    """The largest magnitude in any lane of some vectors."""
    top = f.unary("fabs", values[0])
    for value in values[1:]:
        top = top.max(f.unary("fabs", value))
    return top.reduce("max")


def fake_quant_e4m3(f: Function, groups: list[Value]) -> tuple[list[Value], Value]:
    """Values rounded to E4M3 under one power-of-two scale for all of them, and that scale (spec architecture 2.9)."""
    kind, bits = groups[0].kind, vec(lanes(groups[0].kind), I32)
    amax = largest(f, groups).max(1e-4) * (1 / 448)
    scale = ((amax.bits(I32) + 0x7FFFFF) & 0x7F800000).bits(F32)
    floor = (scale * 2.0**-6).spread(lanes(kind))
    rounded = []
    for value in groups:
        step = (value.bits(bits) & 0x7F800000).bits(kind).max(floor) * 2.0**-3
        rounded.append(f.unary("rint", value / step) * step)
    return rounded, scale
