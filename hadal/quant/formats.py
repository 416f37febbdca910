"""E2M1, E4M3 and E8M0: round, encode, pack, unpack and fake-quantise in plain torch; the lowest layer of `quant`.

Every value here is FP32 on the way through. Scales are powers of two, so multiplying and dividing by them is exact.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

E2M1_MAX = 6.0
E4M3_MAX = 448.0
# The official kernels multiply by these FP32 reciprocals instead of dividing.
E2M1_RECIPROCAL = torch.tensor(1 / E2M1_MAX, dtype=torch.float32).item()
E4M3_RECIPROCAL = torch.tensor(1 / E4M3_MAX, dtype=torch.float32).item()
_MIN_AMAX_FP4 = E2M1_MAX * 2.0**-126
_MIN_AMAX_FP8 = 1e-4
_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF

_E2M1_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_E2M1_CODE_OF_DOUBLED = torch.tensor([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], dtype=torch.uint8)


def round_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6}, ties to the even code, beyond 6 to 6; FP32, any shape."""
    return _round(x.float().clamp(-E2M1_MAX, E2M1_MAX), mantissa=1, smallest_binade=1.0)


def round_e4m3(x: Tensor) -> Tensor:
    """Round to the nearest E4M3 value, ties to even, beyond 448 to 448; FP32, any shape."""
    return _round(x.float().clamp(-E4M3_MAX, E4M3_MAX), mantissa=3, smallest_binade=2.0**-6)


def encode_e2m1(x: Tensor) -> Tensor:
    """E2M1 codes (sign, two exponent bits, one mantissa bit) of x rounded by `round_e2m1`; uint8 of x's shape."""
    rounded = round_e2m1(x)
    doubled = (rounded.abs() * 2).to(torch.int32)
    codes = _E2M1_CODE_OF_DOUBLED.to(x.device).index_select(0, doubled.flatten()).view(x.shape)
    return codes | (torch.signbit(rounded).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """FP32 values of E2M1 codes 0..15."""
    return _E2M1_VALUES.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def pack_fp4(codes: Tensor) -> Tensor:
    """Codes uint8 [..., K] in 0..15 -> bytes uint8 [..., K/2], the even column in the low nibble.

    Raises ValueError when K is odd. Source: spec architecture 6.2.
    """
    if codes.shape[-1] % 2:
        raise ValueError(
            f"{codes.shape[-1]} columns cannot be packed two to a byte; pad the last dimension to an even size"
        )
    assert codes.dtype == torch.uint8, codes.dtype
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """Bytes [..., K/2] (uint8, or int8 as checkpoints declare them) -> codes uint8 [..., K]; inverse of `pack_fp4`."""
    packed = packed.view(torch.uint8)
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def e8m0_to_float(scales: Tensor) -> Tensor:
    """FP32 values 2^(e-127) of E8M0 bytes (uint8 or float8_e8m0fnu); byte 255 is NaN."""
    return scales.view(torch.float8_e8m0fnu).float()


def float_to_e8m0(x: Tensor) -> Tensor:
    """E8M0 of exact powers of two 2^-127..2^127; NaN becomes byte 255.

    Raises ValueError when some value is not such a power, because E8M0 cannot hold it.
    """
    codes = x.float().to(torch.float8_e8m0fnu)
    if not torch.equal(torch.nan_to_num(codes.float()), torch.nan_to_num(x.float())):
        raise ValueError(
            "E8M0 holds powers of two from 2^-127 to 2^127 only; round the scales with ceil_pow2_scale first"
        )
    return codes


def ceil_pow2_scale(amax: Tensor, reciprocal: float) -> Tensor:
    """amax * reciprocal rounded up to a power of two on the FP32 bits, as the official kernels round scales.

    `reciprocal` is `E4M3_RECIPROCAL` or `E2M1_RECIPROCAL`; source: spec architecture 2.9.
    """
    bits = (amax.float() * reciprocal).view(torch.int32)
    return ((bits + _MANTISSA_BITS) & _EXPONENT_BITS).view(torch.float32)


def fake_quant_fp8(x: Tensor, group: int) -> Tensor:
    """Round x [..., K] to E4M3 with one power-of-two scale per `group` columns and scale back; same shape and dtype.

    The last group may be shorter. Source: spec architecture 2.9 (`act_quant`).
    """
    return _by_group(x, group, _fake_fp8)


def fake_quant_fp4(x: Tensor, group: int = 32) -> Tensor:
    """Round x [..., K] to E2M1 with one power-of-two scale per `group` columns and scale back; same shape and dtype.

    The last group may be shorter. Source: spec architecture 2.9 (`fp4_act_quant`).
    """
    return _by_group(x, group, _fake_fp4)


def _by_group(x: Tensor, group: int, quantise: Callable[[Tensor], Tensor]) -> Tensor:
    assert not (torch.is_grad_enabled() and x.requires_grad), "fake quantisers carry no gradient"
    columns = x.shape[-1]
    whole = columns - columns % group
    if whole == columns:
        return quantise(x.reshape(*x.shape[:-1], columns // group, group)).flatten(-2)
    parts = [_by_group(x[..., :whole], group, quantise)] if whole else []
    return torch.cat((*parts, quantise(x[..., whole:])), dim=-1)


def _fake_fp8(x: Tensor) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True).float().clamp_min_(_MIN_AMAX_FP8)
    scale = ceil_pow2_scale(amax, E4M3_RECIPROCAL)
    # Rounding x to multiples of the scaled E4M3 step saves two passes over x and equals e4m3(x / scale) * scale: no
    # group holds a value that would round above 448, since |x| / scale exceeds it by a few FP32 ulps at most.
    return _round(x.float(), mantissa=3, smallest_binade=scale * 2.0**-6).to(x.dtype)


def _fake_fp4(x: Tensor) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True).float().clamp_min_(_MIN_AMAX_FP4)
    scale = ceil_pow2_scale(amax, E2M1_RECIPROCAL)
    return (round_e2m1(x.float() / scale) * scale).to(x.dtype)


def _round(x: Tensor, *, mantissa: int, smallest_binade: Tensor | float) -> Tensor:
    """Round FP32 x to `mantissa` bits, half to even, with the fixed step of `smallest_binade` below it (subnormals)."""
    step = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    if isinstance(smallest_binade, Tensor):
        step = torch.maximum(step, smallest_binade, out=step)
    else:
        step.clamp_min_(smallest_binade)
    step.mul_(2.0**-mantissa)
    return (x / step).round_().mul_(step)
