"""Rows in pages: how compressed entries and index keys are packed into bytes, written to pages and read back.

  plain  the carrier's values
  fp8    E4M3 codes of all but the last R dims, these R in the carrier, one E8M0 byte per 64 codes padded to 8 bytes:
         584 bytes for an entry of V4 in BF16
  fp4    E2M1 codes, two to a byte, and one E8M0 byte per 32: 68 bytes for an index key of V4

The packed forms hold values that were fake-quantised, so packing loses nothing: a group's scale follows from its
largest value again, or is half of what it was, under which every code has its double.

Legend: n rows, D dim, R rotary dims, G scale groups. Source: spec architecture 2.9 and 2.10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.pages import PAGE_TOKENS, Page
from hadal.quant import ceil_pow2_scale, decode_e2m1, encode_e2m1, pack_fp4, unpack_fp4
from hadal.quant.formats import E2M1_RECIPROCAL, E4M3_RECIPROCAL

FP8_GROUP, FP4_GROUP = 64, 32


@dataclass(frozen=True)
class RowForm:
    """How one row becomes bytes."""

    kind: Literal["plain", "fp8", "fp4"]
    dim: int
    dtype: torch.dtype
    rotary: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        if self.kind == "plain":
            return self.dim * self.dtype.itemsize
        if self.kind == "fp4":
            return self.dim // 2 + -(-self.dim // FP4_GROUP)
        codes = self.dim - self.rotary
        return codes + self.rotary * self.dtype.itemsize + -(-codes // (8 * FP8_GROUP)) * 8

    def pack(self, rows_nD: Tensor) -> Tensor:
        """Bytes [n, nbytes]."""
        if self.kind == "plain":
            return rows_nD.contiguous().view(torch.uint8)
        if self.kind == "fp4":
            scaled_nD, scale_nG = _scaled(rows_nD, FP4_GROUP, E2M1_RECIPROCAL)
            return torch.cat((pack_fp4(encode_e2m1(scaled_nD)), _exponents(scale_nG)), dim=1)
        codes_nD, turned_nR = rows_nD.split((self.dim - self.rotary, self.rotary), dim=1)
        scaled_nD, scale_nG = _scaled(codes_nD, FP8_GROUP, E4M3_RECIPROCAL)
        parts = (scaled_nD.to(torch.float8_e4m3fn), turned_nR.contiguous(), _exponents(scale_nG))
        packed = torch.cat([part.view(torch.uint8) for part in parts], dim=1)
        return F.pad(packed, (0, self.nbytes - packed.shape[1]))

    def unpack(self, bytes_nB: Tensor) -> Tensor:
        """Rows [n, D]; inverse of `pack`."""
        if self.kind == "plain":
            return bytes_nB.contiguous().view(self.dtype)
        if self.kind == "fp4":
            codes, scales = bytes_nB.split((self.dim // 2, -(-self.dim // FP4_GROUP)), dim=1)
            return _times(decode_e2m1(unpack_fp4(codes)), scales, FP4_GROUP).to(self.dtype)
        codes = self.dim - self.rotary
        sizes = (codes, self.rotary * self.dtype.itemsize)
        coded, turned, scales = bytes_nB.split((*sizes, self.nbytes - sum(sizes)), dim=1)
        values = coded.contiguous().view(torch.float8_e4m3fn).float()
        values = _times(values, scales[:, : -(-codes // FP8_GROUP)], FP8_GROUP).to(self.dtype)
        return torch.cat((values, turned.contiguous().view(self.dtype)), dim=1)


def _scaled(rows_nD: Tensor, group: int, reciprocal: float) -> tuple[Tensor, Tensor]:
    """Rows [n, D] divided by the scales [n, G] of their groups, FP32; the last group may be shorter."""
    wide = F.pad(rows_nD.float(), (0, -rows_nD.shape[1] % group)).unflatten(1, (-1, group))
    # The smallest scale of both quantisers that a normal number can be told by is 2^-126.
    scale_nG = ceil_pow2_scale(wide.abs().amax(-1), reciprocal).clamp_min(2.0**-126)
    return (wide / scale_nG.unsqueeze(-1)).flatten(1)[:, : rows_nD.shape[1]], scale_nG


def _exponents(scale_nG: Tensor) -> Tensor:
    return (scale_nG.view(torch.int32) >> 23).to(torch.uint8)


def _times(values_nD: Tensor, scales_nG: Tensor, group: int) -> Tensor:
    scale = (scales_nG.int() << 23).view(torch.float32)
    return values_nD * scale.repeat_interleave(group, dim=1)[:, : values_nD.shape[1]]


@dataclass(frozen=True)
class Shelf:
    """Where the rows of one kind lie in every page: from byte `offset` on, one for each `ratio` source tokens.

    A row lies in the page of the token that completes it.
    """

    form: RowForm
    offset: int
    ratio: int

    @property
    def nbytes(self) -> int:
        """Bytes that the rows of a page take."""
        return -(-PAGE_TOKENS // self.ratio) * self.form.nbytes

    def before(self, page: int) -> int:
        """Rows in all pages before page number `page`."""
        return page * PAGE_TOKENS // self.ratio

    def rows(self, page: Page, begin: int, end: int) -> Tensor:
        """The packed rows `begin` to `end` of a page [end - begin, bytes]."""
        size = self.form.nbytes
        return page.bytes[self.offset + begin * size : self.offset + end * size].view(end - begin, size)


@dataclass(frozen=True)
class StoredRows:
    """The first `count` rows of a sequence on a shelf of its pages."""

    pages: Sequence[Page]
    shelf: Shelf
    count: int

    def append(self, rows_nD: Tensor) -> StoredRows:
        """Write rows behind those there are; returns all."""
        whole = StoredRows(self.pages, self.shelf, self.count + len(rows_nD))
        if len(rows_nD):
            packed = self.shelf.form.pack(rows_nD)
            for part in whole._parts(self.count):
                part.copy_(packed[: len(part)])
                packed = packed[len(part) :]
        return whole

    def read(self) -> Tensor:
        """All rows [count, D], unpacked."""
        form = self.shelf.form
        parts = self._parts(0)
        if not parts:
            return torch.empty(0, form.dim, dtype=form.dtype, device=self.pages[0].bytes.device)
        return form.unpack(torch.cat(parts))

    def _parts(self, first: int) -> list[Tensor]:
        """The packed rows from `first` on, page by page."""
        parts, row = [], first
        while row < self.count:
            page = ((row + 1) * self.shelf.ratio - 1) // PAGE_TOKENS
            before, end = self.shelf.before(page), min(self.shelf.before(page + 1), self.count)
            parts.append(self.shelf.rows(self.pages[page], row - before, end - before))
            row = end
        return parts
