"""Emitted compressors against plain torch: pooled values, the bytes of entries and keys, tails, any cut into steps."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu.compress import Form, emit_compress, emit_keep_tail, store_entry, store_key
from hadal.kernels.cpu.layout import PAGE_TOKENS, Shapes
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.reference.dense import hadamard
from hadal.quant.formats import fake_quant_fp4, fake_quant_fp8
from tests.kernels.cpu.harness import (
    FLASH,
    NANO,
    SMALL,
    Kernels,
    Sequence,
    Step,
    address,
    instruction_sets,
    shapes,
    walsh,
)

TAIL, TARGET = 128, 192  # offsets that are not 0, as other layers have
ISAS = pytest.mark.parametrize("isa", instruction_sets())
Layer = tuple[Shapes, Form, int, bool]
SIXTEEN = shapes(dim=80, rotary=16)


@dataclass(frozen=True)
class Case:
    """A compressor's weights and the projected rows of some sequences."""

    shapes: Shapes
    form: Form
    ratio: int
    overlap: bool
    ape: Tensor
    norm: Tensor
    frequencies: Tensor
    rows: list[Tensor]

    @property
    def dim(self) -> int:
        return self.shapes.dim if self.form == "entries" else self.shapes.index_dim

    @property
    def slots(self) -> int:
        return self.ratio * (2 if self.overlap else 1)


def case(seed: int, sizes: Shapes, form: Form, ratio: int, overlap: bool, lengths: list[int]) -> Case:
    print(f"seed {seed}")
    g = torch.Generator().manual_seed(seed)
    dim = sizes.dim if form == "entries" else sizes.index_dim
    width = dim * (2 if overlap else 1)
    return Case(
        sizes, form, ratio, overlap, torch.randn(ratio, width, generator=g), 1 + 0.2 * torch.randn(dim, generator=g),
        10000.0 ** (-torch.arange(0, sizes.rotary, 2) / sizes.rotary),
        [torch.randn(n, 2 * width, generator=g) * 2 for n in lengths],
    )  # fmt: skip


@functools.cache
def compiled(isa: str, sizes: Shapes) -> Kernels:
    def emit(module: KernelModule) -> None:
        emit_compress(module, sizes, "entries")
        emit_compress(module, sizes, "keys")
        emit_keep_tail(module)
        with module.kernel("encode", "row out count") as k:
            for i in k.f.range(k.arg("count")):
                row, out = k.f.at(k.ptr("row"), i * sizes.dim * 4), k.f.at(k.ptr("out"), i * sizes.entry_bytes)
                store_entry(k.f, sizes, row, out)
        with module.kernel("encode_keys", "row out count") as k:
            for i in k.f.range(k.arg("count")):
                out = k.f.at(k.ptr("out"), i / 16 * sizes.group_bytes)
                store_key(k.f, sizes, k.f.at(k.ptr("row"), i * sizes.index_dim * 4), out, i % 16)

    return Kernels(isa, emit)


def feed(c: Case, isa: str, steps: list[list[int]], threads: int = 1, fill: int = 0) -> list[Sequence]:
    """Run the steps; each names the new tokens of every sequence."""
    kernels, width = compiled(isa, c.shapes), c.rows[0].shape[1] // 2
    page = TARGET + PAGE_TOKENS // c.ratio * c.shapes.entry_bytes + PAGE_TOKENS * c.shapes.group_bytes
    sequences = [Sequence(TAIL + c.slots * width * 8, page, len(r), fill) for r in c.rows]
    for lengths in steps:
        spans = [r[s.position : s.position + n] for r, s, n in zip(c.rows, sequences, lengths, strict=True)]
        step = Step(sequences, lengths)
        projected = torch.zeros(len(step.positions), 2 * width + 16)  # rows further apart than they are long
        projected[:, : 2 * width] = torch.cat(spans)
        common: dict[str, int] = dict(
            projected=address(projected), projected_stride=projected.stride(0) * 4, tail=TAIL, slots=c.slots
        )
        kernels.run(
            f"compress_{c.form}", step.words, threads, **common, ape=address(c.ape), norm=address(c.norm),
            ratio=c.ratio, overlap=int(c.overlap), frequencies=address(c.frequencies), target=TARGET,
        )  # fmt: skip
        kernels.run("keep_tail", step.words, threads, **common, width=width)
    return sequences


def expected(c: Case, rows: Tensor) -> Tensor:
    """Normed and rotated blocks [B, D] in float64, one at a time."""
    dim, blocks, width = c.dim, [], rows.shape[1] // 2
    kv, score = rows[:, :width].double(), rows[:, width:].double()
    score = score + c.ape.double()[torch.arange(len(rows)) % c.ratio]
    for b in range(len(rows) // c.ratio):
        own = slice(b * c.ratio, (b + 1) * c.ratio)
        kvs, scores = [kv[own, width - dim :]], [score[own, width - dim :]]
        if c.overlap and b:
            before = slice((b - 1) * c.ratio, b * c.ratio)
            kvs, scores = [kv[before, :dim], *kvs], [score[before, :dim], *scores]
        pooled = (torch.cat(scores).softmax(0) * torch.cat(kvs)).sum(0)
        pooled = pooled / (pooled.square().mean() + c.shapes.norm_eps).sqrt() * c.norm.double()
        turn = torch.polar(torch.ones(len(c.frequencies)).double(), (b * c.ratio * c.frequencies).double())
        tail = torch.view_as_complex(pooled[-c.shapes.rotary :].view(-1, 2)) * turn
        blocks.append(torch.cat((pooled[: -c.shapes.rotary], torch.view_as_real(tail).flatten())))
    return torch.stack(blocks) if blocks else torch.zeros(0, dim).double()


def decode_entry(sizes: Shapes, entry: np.ndarray) -> Tensor:
    codes, rotary = sizes.dim - sizes.rotary, sizes.rotary
    values = torch.from_numpy(entry[:codes].copy()).view(torch.float8_e4m3fn).float()
    scales = torch.from_numpy(entry[codes + 2 * rotary :].copy()).float()
    values = values * (2.0 ** (scales[: codes // 64] - 127)).repeat_interleave(64)
    turned = torch.from_numpy(entry[codes : codes + 2 * rotary].copy()).view(torch.bfloat16).float()
    return torch.cat((values, turned))


def decode_key(sizes: Shapes, group: np.ndarray, key: int) -> Tensor:
    dim = sizes.index_dim
    nibbles = group[: 8 * dim].reshape(dim // 8, 16, 4)[:, key]
    codes = np.stack((nibbles & 15, nibbles >> 4), axis=1).reshape(-1)
    scales = group[8 * dim :].reshape(dim // 32, 16)[:, key].astype(np.float64)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.repeat(2.0 ** (scales - 127), 32)
    return torch.from_numpy(np.copysign(values, 7.5 - codes)).float()


def decode(c: Case, sequence: Sequence, block: int) -> Tensor:
    """Values of an entry or key."""
    page = sequence.pages[block * c.ratio // PAGE_TOKENS][TARGET:]
    inside = block % (PAGE_TOKENS // c.ratio)
    if c.form == "entries":
        size = c.shapes.entry_bytes
        return decode_entry(c.shapes, page[inside * size : (inside + 1) * size])
    return decode_key(c.shapes, page[inside // 16 * c.shapes.group_bytes :][: c.shapes.group_bytes], inside % 16)


def same(a: list[Sequence], b: list[Sequence]) -> bool:
    return all(
        np.array_equal(x.home, y.home) and all(map(np.array_equal, x.pages, y.pages)) for x, y in zip(a, b, strict=True)
    )


def whole(c: Case) -> list[list[int]]:
    return [[len(r) for r in c.rows]]


LAYERS: list[Layer] = [
    (NANO, "entries", 4, True), (NANO, "entries", 16, False), (NANO, "keys", 4, True), (SMALL, "entries", 4, True),
    (SMALL, "entries", 128, False), (SMALL, "keys", 4, True), (FLASH, "entries", 128, False), (FLASH, "keys", 4, True),
    (SIXTEEN, "entries", 8, True), (SIXTEEN, "keys", 8, True),
]  # fmt: skip


@ISAS
@pytest.mark.parametrize("layer", LAYERS)
def test_blocks_are_pooled_normed_rotated_and_rounded(isa: str, layer: Layer) -> None:
    c = case(1, *layer, [300, 2, 131])
    sequences = feed(c, isa, whole(c))
    differing = total = 0
    for rows, sequence in zip(c.rows, sequences, strict=True):
        for b, exact in enumerate(expected(c, rows)):
            found, plain = decode(c, sequence, b), exact.float()
            if c.form == "keys":
                turned = torch.from_numpy(walsh(c.dim)) @ exact
                wanted = fake_quant_fp4(turned.float())
                # Next to a bound between codes a value may fall to either side.
                assert ((found - turned).abs() <= 1.0001 * (wanted - turned).abs() + 1e-5 * turned.abs().max()).all()
            else:
                parts = fake_quant_fp8(plain[: -c.shapes.rotary], 64), plain[-c.shapes.rotary :].bfloat16()
                wanted = torch.cat(parts)
                torch.testing.assert_close(found, wanted, rtol=2**-3, atol=1e-3)
            differing += int((found != wanted).sum())
            total += len(wanted)
    assert differing <= total / 1000


@ISAS
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[2], LAYERS[4]])
def test_any_cut_into_steps_leaves_the_same_bytes(isa: str, layer: Layer) -> None:
    c = case(2, *layer, [401, 130])
    at_once = feed(c, isa, whole(c))
    assert any(page[TARGET:].any() for page in at_once[0].pages)
    for size in (1, 3, 5, 128, 400):
        steps = [[max(0, min(size, len(r) - first)) for r in c.rows] for first in range(0, max(map(len, c.rows)), size)]
        assert same(feed(c, isa, steps), at_once), size


@ISAS
def test_ragged_spans_do_not_touch_each_other(isa: str) -> None:
    c = case(3, *LAYERS[0], [70, 33, 5, 129])
    rng = random.Random(3)
    steps, left = [], [len(r) for r in c.rows]
    while any(left):
        steps.append([min(n, rng.choice((0, 1, 2, 7, 40))) for n in left])
        left = [n - taken for n, taken in zip(left, steps[-1], strict=True)]
    steps = [s for s in steps if any(s)]
    assert same(feed(c, isa, steps), feed(c, isa, whole(c)))


@ISAS
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[1], LAYERS[2]])
def test_threads_share_the_blocks(isa: str, layer: Layer) -> None:
    c = case(4, *layer, [140, 9, 64])
    one = feed(c, isa, whole(c))
    for threads in (2, 3, 7):
        assert same(feed(c, isa, whole(c), threads), one)


@ISAS
def test_the_first_block_ignores_what_lies_in_a_fresh_home(isa: str) -> None:
    c = case(5, *LAYERS[0], [9])
    clean, dirty = feed(c, isa, [[1]] * 9), feed(c, isa, [[1]] * 9, fill=0xFF)
    assert torch.equal(decode(c, clean[0], 0), decode(c, dirty[0], 0))
    assert torch.equal(decode(c, clean[0], 1), decode(c, dirty[0], 1))
    assert clean[0].pages[0][TARGET:].any()


@ISAS
def test_tails_hold_the_last_rows_by_position(isa: str) -> None:
    c = case(6, *LAYERS[0], [29])
    (sequence,) = feed(c, isa, [[20], [2], [7]])
    tail = sequence.home[TAIL:].view(np.float32).reshape(c.slots, -1)
    for position in range(29 - c.slots, 29):
        assert np.array_equal(tail[position % c.slots], c.rows[0][position].numpy())


@ISAS
@pytest.mark.parametrize("sizes", [NANO, SMALL])
def test_entries_are_the_values_of_the_official_rounding(isa: str, sizes: Shapes) -> None:
    g = torch.Generator().manual_seed(7)
    rows = torch.randn(200, sizes.dim, generator=g) * 10.0 ** torch.randint(-6, 4, (200, 1), generator=g)
    rows[10:20] *= 10.0 ** -torch.rand(10, sizes.dim, generator=g).mul(9)
    halfway = 1 + torch.tensor([2**-4, -(2**-5)]).repeat(20)[:, None]
    rows[20:60] = rows[20:60].clamp(-448, 448).to(torch.float8_e4m3fn).float() * halfway
    rows[60] = 0
    rows[61] = 448
    rows[62, ::3] = -0.0
    out = np.zeros((200, sizes.entry_bytes), np.uint8)
    step = np.zeros(16, np.int64)
    compiled(isa, sizes).run("encode", step, row=address(rows), out=address(out), count=200)
    for row, entry in zip(rows, out, strict=True):
        wanted = torch.cat((fake_quant_fp8(row[: -sizes.rotary], 64), row[-sizes.rotary :].bfloat16()))
        found = decode_entry(sizes, entry)
        assert torch.equal(found.view(torch.int32), wanted.float().view(torch.int32))


@ISAS
@pytest.mark.parametrize("sizes", [NANO, SMALL, shapes(index_dim=32)])
def test_keys_are_the_values_of_the_official_rounding(isa: str, sizes: Shapes) -> None:
    g, dim = torch.Generator().manual_seed(9), sizes.index_dim
    rows = torch.randn(203, dim, generator=g) * 10.0 ** torch.randint(-6, 4, (203, 1), generator=g)
    rows[10:20] *= 10.0 ** -torch.rand(10, dim, generator=g).mul(9)
    # Quarters lie on the codes and halfway between them; where the transform's factor is a power of two, exactly.
    rows[20:60] = hadamard(torch.randint(-24, 25, (40, dim), generator=g) / 4)
    rows[60] = 0
    rows[61, ::3] = -0.0
    rows[62] *= 1e-38
    out = np.zeros((13, sizes.group_bytes), np.uint8)
    step = np.zeros(16, np.int64)
    compiled(isa, sizes).run("encode_keys", step, row=address(rows), out=address(out), count=203)
    for i, wanted in enumerate(fake_quant_fp4(hadamard(rows))):
        assert torch.equal(decode_key(sizes, out[i // 16], i % 16).view(torch.int32), wanted.view(torch.int32)), i


@ISAS
def test_a_row_of_zeros_becomes_a_key_of_zeros(isa: str) -> None:
    c = case(8, *LAYERS[2], [8])
    c.rows[0].zero_()
    (sequence,) = feed(c, isa, whole(c))
    assert torch.equal(decode(c, sequence, 1), torch.zeros(c.dim))
