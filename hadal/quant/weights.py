"""PackedWeight: a matrix as the official checkpoints store it, and the quantisers that make one; above `formats`.

Legend: O output rows, K input columns; weights are [O, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hadal.quant.formats import (
    E2M1_MAX,
    E2M1_RECIPROCAL,
    E4M3_MAX,
    E4M3_RECIPROCAL,
    ceil_pow2_scale,
    decode_e2m1,
    e8m0_to_float,
    encode_e2m1,
    float_to_e8m0,
    pack_fp4,
)

FP4_GROUP = 32  # columns per E8M0 scale of an FP4 row
FP8_BLOCK = 128  # rows and columns per E8M0 scale of an FP8 matrix
_SMALLEST_NORMAL = 2.0**-126

_tables: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}


class QuantError(ValueError):
    """A weight that cannot be brought into the asked format; the message names the cause and the remedy."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantised matrix [O, K] and its scales, usually views of a memory-mapped file.

    fp4: `codes` uint8 [O, K/2], `scales` float8_e8m0fnu [O, K/32]; fp8: `codes` float8_e4m3fn [O, K], `scales`
    float8_e8m0fnu [ceil(O/128), ceil(K/128)]. Source: spec architecture 6.2.
    """

    format: Literal["fp4", "fp8"]
    codes: Tensor
    scales: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if self.format == "fp4":
            assert self.codes.dtype == torch.uint8 and self.codes.shape == (rows, columns // 2), self.codes.shape
            assert self.scales.shape == (rows, columns // FP4_GROUP), self.scales.shape
        else:
            assert self.codes.dtype == torch.float8_e4m3fn and self.codes.shape == (rows, columns), self.codes.shape
            assert self.scales.shape == (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), self.scales.shape
        assert self.scales.dtype == torch.float8_e8m0fnu, self.scales.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        return self.codes.nbytes + self.scales.nbytes

    @property
    def device(self) -> torch.device:
        """Where the codes lie."""
        return self.codes.device

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight on another device."""
        return PackedWeight(self.format, self.codes.to(device), self.scales.to(device), self.shape)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [O, K]; exact in float32, and in bfloat16 unless a value falls below bfloat16's range."""
        return _dense_fp4(self, dtype) if self.format == "fp4" else _dense_fp8(self, dtype)


def quantise_fp4(weight: Tensor) -> PackedWeight:
    """E2M1 codes with one power-of-two scale per 32 columns of a row; QuantError on K % 32 or values not finite."""
    rows, columns = weight.shape
    if columns % FP4_GROUP:
        raise QuantError(
            f"a weight with {columns} columns has no FP4 form; its columns must be a multiple of {FP4_GROUP}"
        )
    groups = _finite(weight).view(rows, columns // FP4_GROUP, FP4_GROUP)
    amax = groups.abs().amax(-1, keepdim=True).clamp_min_(E2M1_MAX * _SMALLEST_NORMAL)
    scale = ceil_pow2_scale(amax, E2M1_RECIPROCAL)
    codes = pack_fp4(encode_e2m1(groups / scale).view(rows, columns))
    return PackedWeight("fp4", codes, float_to_e8m0(scale.squeeze(-1)), (rows, columns))


def quantise_fp8(weight: Tensor) -> PackedWeight:
    """E4M3 codes with one power-of-two scale per 128x128 block, less at the edges; QuantError on values not finite."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(_finite(weight), (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.view(-(-rows // FP8_BLOCK), FP8_BLOCK, -(-columns // FP8_BLOCK), FP8_BLOCK)
    amax = blocks.abs().amax((1, 3)).clamp_min_(E4M3_MAX * _SMALLEST_NORMAL)
    scale = ceil_pow2_scale(amax, E4M3_RECIPROCAL)
    codes = (blocks / scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return PackedWeight(
        "fp8", codes.view(padded.shape)[:rows, :columns].contiguous(), float_to_e8m0(scale), (rows, columns)
    )


def fp4_to_fp8(weight: PackedWeight) -> PackedWeight:
    """The same values in FP8: per 128x128 block, scale = (largest FP4 scale) / 2^6 (spec architecture 6.2).

    Raises QuantError when some value of a block lies too far below its largest scale for E4M3, because then the
    conversion would not be lossless.
    """
    assert weight.format == "fp4", weight.format
    rows, columns = weight.shape
    exponents = weight.scales.view(torch.uint8).int()
    per_block = FP8_BLOCK // FP4_GROUP
    padded = torch.nn.functional.pad(exponents, (0, -exponents.shape[1] % per_block, 0, -rows % FP8_BLOCK))
    blocks = padded.view(-(-rows // FP8_BLOCK), FP8_BLOCK, -1, per_block)
    scales = (blocks.amax((1, 3)) - 6).clamp_min_(0).to(torch.uint8).view(torch.float8_e8m0fnu)
    values = weight.dense(torch.float32)
    spread = _spread(e8m0_to_float(scales), rows, columns)
    codes = (values / spread).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    out = PackedWeight("fp8", codes, scales, (rows, columns))
    lost = (out.dense(torch.float32) != values).nonzero()
    if len(lost):
        row, column = lost[0].tolist()
        raise QuantError(
            f"FP4 to FP8 would change the value at row {row}, column {column}: the scales of its 128x128 block differ "
            "too much for E4M3; keep these experts in FP4"
        )
    return out


def _finite(weight: Tensor) -> Tensor:
    weight = weight.detach().float().contiguous()
    if not torch.isfinite(weight).all():
        raise QuantError("a weight holds NaN or infinity, which has no quantised form; repair it first")
    return weight


def _dense_fp4(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    rows, columns = weight.shape
    # One gather per byte: the table holds both nibbles' values as one integer of twice the element's width.
    wide = {torch.float32: torch.int64, torch.bfloat16: torch.int32}[dtype]
    key = ("fp4", dtype, weight.device)
    if key not in _tables:
        byte = torch.arange(256, dtype=torch.uint8)
        pairs = torch.stack((decode_e2m1(byte & 0xF), decode_e2m1(byte >> 4)), dim=-1).to(dtype)
        _tables[key] = pairs.view(wide).flatten().to(weight.device)
    values = _tables[key].index_select(0, weight.codes.flatten().int()).view(dtype)
    scales = weight.scales.to(dtype)
    return values.view(rows, columns // FP4_GROUP, FP4_GROUP).mul_(scales[..., None]).view(rows, columns)


def _dense_fp8(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    rows, columns = weight.shape
    key = ("fp8", dtype, weight.device)
    if key not in _tables:  # a gather is several times faster than torch's own cast on a CPU
        _tables[key] = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype).to(weight.device)
    values = _tables[key].index_select(0, weight.codes.view(torch.uint8).flatten().int()).view(rows, columns)
    scales = weight.scales.to(dtype).repeat_interleave(FP8_BLOCK, dim=1)[:, :columns]
    for block in range(scales.shape[0]):
        values[block * FP8_BLOCK : (block + 1) * FP8_BLOCK].mul_(scales[block])
    return values


def _spread(scales: Tensor, rows: int, columns: int) -> Tensor:
    return scales.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, :columns]
