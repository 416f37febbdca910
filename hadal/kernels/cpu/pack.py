"""Weights from the checkpoint's bytes into the panels that `matmul` reads; every value stays exactly what it was."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hadal.kernels.cpu.matmul import BLOCK, BLOCK_BYTES, PANEL, Format, head_bytes, panel_bytes
from hadal.quant import PackedWeight

Weight = Tensor | PackedWeight
_TILE = 16  # columns of a tile
# Exponents of E8M0 scales for which every product of code and scale is a normal BF16 number.
_SCALES = {"fp4": (2, 252), "fp8": (10, 245)}


class PackError(ValueError):
    """A weight that has no packed form; the plain operators compute it."""


def form_of(weight: Weight) -> Format:
    """The packed form of a weight; unquantised ones are held in BF16."""
    return weight.format if isinstance(weight, PackedWeight) else "bf16"


def packed_bytes(form: Format, rows: int, columns: int) -> int:
    """Bytes of one packed matrix."""
    return -(-rows // PANEL) * panel_bytes(form, -(-columns // BLOCK))


def pack(weight: Weight, out: Tensor | None = None) -> Tensor:
    """One matrix [N, K] as bytes; `out` receives them where given."""
    return _pack([weight], out)


def pack_pair(gate: Weight, up: Weight, out: Tensor | None = None) -> Tensor:
    """Two matrices [I, K] as one whose panels hold 16 columns of each, for a SwiGLU."""
    return _pack([gate, up], out)


def _pack(parts: Sequence[Weight], out: Tensor | None) -> Tensor:
    form = form_of(parts[0])
    assert all(form_of(p) == form and p.shape == parts[0].shape for p in parts)
    rows, columns = parts[0].shape
    per_part = PANEL // len(parts)
    panels, blocks = -(-rows // per_part), -(-columns // BLOCK)
    packed = out if out is not None else torch.empty(panels * panel_bytes(form, blocks), dtype=torch.uint8)
    by_panel = packed.view(panels, panel_bytes(form, blocks))
    head = head_bytes(form, blocks)
    body = by_panel[:, head:].view(panels, blocks, BLOCK_BYTES[form])
    fill = {"bf16": _fill_bf16, "fp8": _fill_fp8, "fp4": _fill_fp4}[form]
    for tile in range(PANEL // _TILE):
        weight, first = (parts[tile], 0) if len(parts) == 2 else (parts[0], tile)
        step = 1 if len(parts) == 2 else 2
        fill(weight, by_panel, body, tile, first, step, panels, blocks)
    return packed


def _tiles(matrix: Tensor, first: int, step: int, panels: int, columns: int) -> Tensor:
    """Rows of tiles first, first + step, ... of a [N, K'] matrix, zero-padded: [panels, 16, columns]."""
    rows = panels * step * _TILE
    if matrix.shape != (rows, columns):
        padded = matrix.new_zeros(rows, columns)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        matrix = padded
    return matrix.view(panels, step, _TILE, columns)[:, first]


def _fill_bf16(
    weight: Weight, _: Tensor, body: Tensor, tile: int, first: int, step: int, panels: int, blocks: int
) -> None:
    assert isinstance(weight, Tensor)
    words = weight.detach().to(torch.bfloat16).contiguous().view(torch.int16)
    values = _tiles(words, first, step, panels, blocks * BLOCK).reshape(panels, _TILE, blocks, BLOCK // 2, 2)
    target = body.view(torch.int16).view(panels, blocks, 2, BLOCK // 2, _TILE, 2)
    target[:, :, tile] = values.permute(0, 2, 3, 1, 4)


def _fill_fp8(
    weight: Weight, panels_bytes: Tensor, body: Tensor, tile: int, first: int, step: int, panels: int, blocks: int
) -> None:
    assert isinstance(weight, PackedWeight)
    codes = _tiles(weight.codes.view(torch.uint8), first, step, panels, blocks * BLOCK)
    # k = (8 parts, 2 pairs, 2); a part's bytes are (column, parity, pair)
    values = codes.reshape(panels, _TILE, blocks, 8, 2, 2)
    target = body.view(panels, blocks, 2, 8, _TILE, 2, 2)
    target[:, :, tile] = values.permute(0, 2, 3, 1, 5, 4)
    scales = _checked(weight, (128, 128), 0x7F)
    row = (torch.arange(panels) * step + first) * _TILE // 128
    groups = scales.shape[1]
    head = panels_bytes[:, : 4 * groups].view(panels, groups, 4)
    head[:, :, tile] = scales[row.clamp(max=scales.shape[0] - 1)]
    special = torch.nn.functional.pad((codes & 0x78) == 0, (0, groups * 128 - codes.shape[2]))
    by_block = special.view(panels, _TILE, groups, 4, BLOCK).any(4).any(1)
    head[:, :, 2 + tile] = (by_block * torch.tensor([1, 2, 4, 8])).sum(2).to(torch.uint8)


def _fill_fp4(
    weight: Weight, _: Tensor, body: Tensor, tile: int, first: int, step: int, panels: int, blocks: int
) -> None:
    assert isinstance(weight, PackedWeight)
    codes = _tiles(weight.codes, first, step, panels, blocks * BLOCK // 2)
    # byte 4q + i of a block holds k = 8q + 2i (low nibble) and the next one
    pairs = codes.reshape(panels, _TILE, blocks, 4, 4)
    words = torch.empty(panels, blocks, 4, _TILE, 2, 2, dtype=torch.uint8)
    for parity in range(2):
        nibbles = (pairs & 15) if parity == 0 else (pairs >> 4)
        low, high = nibbles[..., 0] | nibbles[..., 1] << 4, nibbles[..., 2] | nibbles[..., 3] << 4
        words[..., parity, 0] = low.permute(0, 2, 3, 1)
        words[..., parity, 1] = high.permute(0, 2, 3, 1)
    tiles = body.view(panels, blocks, 2, 272)[:, :, tile]
    tiles[:, :, 16:] = words.view(panels, blocks, 256)
    scales = _checked(weight, (1, 16), 0x77)
    tiles[:, :, :16] = _tiles(scales, first, step, panels, blocks).transpose(1, 2)


def _checked(weight: PackedWeight, group: tuple[int, int], magnitude: int) -> Tensor:
    """Scale bytes of groups of [rows, code bytes]; where a group is all zeros, any other becomes that of 1.

    Raises PackError for another scale that would take a value out of BF16's normal numbers, and for NaN.
    """
    low, high = _SCALES[weight.format]
    scales = weight.scales.view(torch.uint8)
    outside = (scales < low) | (scales > high)
    if not outside.any():
        return scales
    filled = (weight.codes.view(torch.uint8) & magnitude) != 0
    padded = torch.nn.functional.pad(filled, (0, -filled.shape[1] % group[1], 0, -filled.shape[0] % group[0]))
    used = padded.view(scales.shape[0], group[0], scales.shape[1], group[1]).any(3).any(1)
    if (outside & used).any() or (scales == 255).any():
        raise PackError(f"a scale of an {weight.format.upper()} weight lies outside 2^{low - 127} to 2^{high - 127}")
    return scales.masked_fill(outside, 127)
