"""Packing moves every code to its place and changes none; scales whose products leave BF16 are refused."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu.matmul import panel_bytes
from hadal.kernels.cpu.pack import PackError, Weight, form_of, pack, pack_pair, packed_bytes
from hadal.quant import PackedWeight, quantise_fp4, quantise_fp8

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def weight_of(form: str, rows: int, columns: int, seed: int = 3) -> Weight:
    w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if form == "bf16":
        return w.bfloat16()
    return quantise_fp8(w) if form == "fp8" else quantise_fp4(w)


def dense(weight: Weight) -> Tensor:
    return weight.dense(torch.float32) if isinstance(weight, PackedWeight) else weight.float()


def unpacked(packed: Tensor, form: str, n: int, columns: int) -> Tensor:
    """Values by the description of the format, one by one: [panels, 32, K rounded up to blocks]."""
    panels, blocks = -(-n // 32), -(-columns // 32)
    raw = packed.view(panels, -1).tolist()
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    out = torch.zeros(panels, 32, blocks * 32)
    head = -(-blocks // 64) * 64 if form == "fp8" else 0
    size = {"bf16": 2048, "fp8": 1024, "fp4": 544}[form]
    for p, panel in enumerate(raw):
        for i in range(blocks):
            block = panel[head + i * size : head + (i + 1) * size]
            for tile in range(2):
                for column in range(16):
                    for k in range(32):
                        pair, odd = divmod(k, 2)
                        word = 2 * column + odd  # of the 32 words of a pair of k
                        if form == "bf16":
                            at = 1024 * tile + 64 * pair + 2 * word
                            bits = (block[at] | block[at + 1] << 8) << 16
                            value = float(torch.tensor([bits], dtype=torch.int64).to(torch.uint32).view(torch.float32))
                        elif form == "fp8":
                            part, half = divmod(pair, 2)
                            code = block[512 * tile + 64 * part + 2 * word + half]
                            value = codes[code] * 2.0 ** (panel[4 * (i // 4) + tile] - 127)
                        else:
                            q, nibble = divmod(pair, 4)
                            at = 272 * tile + 16 + 64 * q + 2 * word + nibble // 2
                            code = block[at] >> (4 * (nibble % 2)) & 15
                            value = E2M1[code] * 2.0 ** (block[272 * tile + column] - 127)
                        out[p, 16 * tile + column, 32 * i + k] = value
    return out


@pytest.mark.parametrize(
    ("form", "n", "columns"), [("bf16", 40, 70), ("fp8", 150, 160), ("fp8", 20, 40), ("fp4", 70, 64), ("fp4", 16, 32)]
)
def test_every_value_keeps_its_bits_and_padding_is_zero(form: str, n: int, columns: int) -> None:
    weight = weight_of(form, n, columns)
    packed = pack(weight)
    assert form_of(weight) == form and packed.numel() == packed_bytes(form_of(weight), n, columns)
    found = unpacked(packed, form, n, columns).flatten(0, 1)
    assert torch.equal(found[:n, :columns], dense(weight))
    assert not found[n:].any() and not found[:, columns:].any()


def test_blocks_of_a_tile_with_zeros_or_subnormals_are_marked() -> None:
    weight = torch.empty(32, 384).uniform_(1, 2, generator=torch.Generator().manual_seed(4))
    weight[3, 130], weight[20, 300] = 0, 2.0**-8 * 2 / 448
    marks = pack(quantise_fp8(weight)).view(-1)[:12].view(3, 4)[:, 2:]
    assert marks.tolist() == [[0, 0], [1 << 0, 0], [0, 1 << 1]]  # columns 130 and 300 lie in blocks 0 and 1 of theirs


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp4"])
def test_a_pair_shares_its_panels(form: str) -> None:
    gate, up = weight_of(form, 160, 64, 1), weight_of(form, 160, 64, 2)
    found = unpacked(pack_pair(gate, up), form, 320, 64)
    assert torch.equal(found[:, :16].flatten(0, 1), dense(gate)) and torch.equal(found[:, 16:].flatten(0, 1), dense(up))


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp4"])
def test_packing_into_a_given_place(form: str) -> None:
    weight = weight_of(form, 64, 64)
    place = torch.full((2 * panel_bytes(form_of(weight), 2),), 0xEE, dtype=torch.uint8)
    assert pack(weight, place).data_ptr() == place.data_ptr()
    body = unpacked(place, form, 64, 64).flatten(0, 1)
    assert torch.equal(body, dense(weight))


def scaled(form: Literal["fp4", "fp8"], exponent: int) -> PackedWeight:
    weight = weight_of(form, 32, 32)
    assert isinstance(weight, PackedWeight)
    scales = torch.full(weight.scales.shape, exponent, dtype=torch.uint8)
    return PackedWeight(form, weight.codes, scales.view(torch.float8_e8m0fnu), weight.shape)


@pytest.mark.parametrize(("form", "low", "high"), [("fp4", 2, 252), ("fp8", 10, 245)])
def test_scales_out_of_range_are_refused(form: Literal["fp4", "fp8"], low: int, high: int) -> None:
    for exponent in (low, high):
        found = unpacked(pack(scaled(form, exponent)), form, 32, 32)[0]
        assert torch.equal(found, scaled(form, exponent).dense(torch.float32)) and found.isfinite().all()
    for exponent in (low - 1, high + 1):
        with pytest.raises(PackError, match=rf"a scale of an {form.upper()} weight lies outside 2\^-\d+ to 2\^\d+"):
            pack(scaled(form, exponent))


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_groups_of_zeros_may_have_any_scale(form: str) -> None:
    weight = torch.randn(160, 288, generator=torch.Generator().manual_seed(5))
    weight[:, 64:96] = 0  # groups of FP4
    weight[128:, 256:] = 0  # a block of FP8
    quantised = quantise_fp8(weight) if form == "fp8" else quantise_fp4(weight)
    assert int(quantised.scales.view(torch.uint8).min()) == 1  # what the quantisers give such a group
    found = unpacked(pack(quantised), form, 160, 288).flatten(0, 1)
    assert torch.equal(found[:160, :288], quantised.dense(torch.float32))
    scales = quantised.scales.view(torch.uint8)
    scales[scales == 1] = 255  # NaN
    with pytest.raises(PackError, match="lies outside"):
        pack(quantised)
