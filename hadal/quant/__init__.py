"""Number formats of V4 checkpoints and the fake quantisers of its activations; part of the ground, below every room."""

from hadal.quant.formats import (
    ceil_pow2_scale,
    decode_e2m1,
    e8m0_to_float,
    encode_e2m1,
    fake_quant_fp4,
    fake_quant_fp8,
    float_to_e8m0,
    pack_fp4,
    round_e2m1,
    round_e4m3,
    unpack_fp4,
)
from hadal.quant.weights import PackedWeight, QuantError, fp4_to_fp8, quantise_fp4, quantise_fp8

__all__ = [
    "PackedWeight",
    "QuantError",
    "ceil_pow2_scale",
    "decode_e2m1",
    "e8m0_to_float",
    "encode_e2m1",
    "fake_quant_fp4",
    "fake_quant_fp8",
    "float_to_e8m0",
    "fp4_to_fp8",
    "pack_fp4",
    "quantise_fp4",
    "quantise_fp8",
    "round_e2m1",
    "round_e4m3",
    "unpack_fp4",
]
