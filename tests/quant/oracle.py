"""Number formats written down from their definition, value by value; shares no code with `hadal.quant`."""

from __future__ import annotations

import math

import numpy as np


def minifloat(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """Value of a sign-exponent-mantissa code without infinities."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


E2M1 = [minifloat(code, 2, 1, 1) for code in range(16)]
E4M3 = [math.nan if code & 0x7F == 0x7F else minifloat(code, 4, 3, 7) for code in range(256)]


def nearest(values: np.ndarray, table: list[float]) -> np.ndarray:
    """Nearest value of a format, ties to the even code, saturating; the sign is kept, of zero too."""
    positive = np.array([v for v in table[: len(table) // 2] if not math.isnan(v)])
    magnitude = np.minimum(np.abs(values.astype(np.float64)), positive[-1])
    upper = np.clip(np.searchsorted(positive, magnitude), 0, len(positive) - 1)
    lower = np.maximum(upper - 1, 0)
    down, up = magnitude - positive[lower], positive[upper] - magnitude
    take_lower = (down < up) | ((down == up) & (lower % 2 == 0))
    rounded: np.ndarray = np.copysign(np.where(take_lower, positive[lower], positive[upper]), values)
    return rounded


def scale(amax: float, reciprocal: np.float32) -> float:
    """Smallest power of two not below the FP32 product."""
    mantissa, exponent = math.frexp(float(np.float32(amax) * reciprocal))
    return math.ldexp(1.0, exponent - 1 if mantissa == 0.5 else exponent)


def fake_quant(x: np.ndarray, group: int, table: list[float], floor: float, divisor: float) -> np.ndarray:
    """Quantise and dequantise [rows, K] by groups of columns; float64 result."""
    out = np.empty(x.shape)
    for row in range(x.shape[0]):
        for begin in range(0, x.shape[1], group):
            values = x[row, begin : begin + group]
            s = scale(max(float(np.abs(values).max()), floor), np.float32(1 / divisor))
            out[row, begin : begin + group] = nearest(values.astype(np.float64) / s, table) * s
    return out
