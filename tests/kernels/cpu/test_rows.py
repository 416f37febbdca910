"""Kernels of single rows against the reference operators in FP32, and each row alone against itself in company."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu import rows as kernels
from hadal.kernels.cpu.layout import HEADS, KEYS, SPAN, STEP, Shapes
from hadal.kernels.reference.dense import head_norm, quantise_kv, rms_norm, rotate
from hadal.kernels.reference.mhc import collapse_map, mix_in, mix_out, stream_maps
from tests.kernels.cpu.harness import Kernels, Sequence, Step, address, buffer, instruction_sets, shapes

ISAS = pytest.mark.parametrize("isa", instruction_sets())
NANO = shapes(hidden=160, heads=6, sinkhorn=20, active=3, vocabulary=50)
WIDE = shapes(hidden=512, heads=20, dim=512, rotary=64, window=128, sinkhorn=20)
SIZES = pytest.mark.parametrize("sizes", [NANO, WIDE], ids=["nano", "wide"])
SEED = 21
RING = 64  # offset of the ring in a home
Case = dict[str, Tensor]


@functools.cache
def compiled(isa: str, sizes: Shapes) -> Kernels:
    return Kernels(isa, lambda module: kernels.emit_rows(module, sizes))


def random(*shape: int, seed: int = SEED) -> Tensor:
    """Normal values; the last dimension has room behind it for whole vectors."""
    print(f"seed {seed}")
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_of(count: int, angles: Tensor | None = None, **arrays: np.ndarray) -> Step:
    """A step of rows without sequences."""
    step = Step([], [], angles)
    for name, word in dict(rows=count, **{name: address(array) for name, array in arrays.items()}).items():
        step.words[STEP.index(name)] = word
    return step


def close_to_bf16(found: Tensor, exact: Tensor) -> None:
    """Equal to the exact value rounded to BF16, or next to it where that is a matter of FP32 rounding."""
    rounded = exact.bfloat16().float()
    torch.testing.assert_close(found.float(), rounded, rtol=2**-7, atol=1e-6)
    assert (found.float() != rounded).float().mean() < 0.01


@ISAS
def test_every_stream_begins_as_the_embedding(isa: str) -> None:
    table, ids = random(50, NANO.hidden).bfloat16(), np.array([3, 49, 0, 3, 17])
    streams = torch.zeros(5, NANO.streams * NANO.hidden + 16)
    compiled(isa, NANO).run(
        "embed", step_of(5, ids=ids).words, 2, table=address(table), streams=address(streams),
        stream_stride=streams.stride(0) * 4,
    )  # fmt: skip
    wanted = table[torch.from_numpy(ids)].float().repeat(1, NANO.streams)
    assert torch.equal(streams[:, :-16], wanted) and not streams[:, -16:].any()


@ISAS
@SIZES
def test_angles_of_both_regimes(isa: str, sizes: Shapes) -> None:
    half = sizes.rotary // 2
    positions = np.array([0, 1, 2, 63, 4096, 131071, 1048575])
    frequencies = [b ** (-torch.arange(half) / half) for b in (10000.0, 160000.0)]
    angles = torch.zeros(len(positions), 2, 2, half)
    step = step_of(len(positions), angles, positions=positions)
    compiled(isa, sizes).run(
        "angles", step.words, 3, plain=address(frequencies[0]), scaled=address(frequencies[1])
    )  # fmt: skip
    for regime, frequency in enumerate(frequencies):
        exact = (torch.from_numpy(positions).float()[:, None] * frequency).double()
        torch.testing.assert_close(angles[:, regime, 0].double(), exact.cos(), rtol=0, atol=6e-8)
        torch.testing.assert_close(angles[:, regime, 1].double(), exact.sin(), rtol=0, atol=6e-8)


class Site:
    """Weights of a site, streams of some rows, and what its kernels leave."""

    def __init__(self, isa: str, sizes: Shapes, count: int) -> None:
        n, d = sizes.streams, sizes.hidden
        self.isa, self.sizes, self.count = isa, sizes, count
        self.streams = random(count, n * d)
        self.fn = random(n * (n + 2) + 1, n * d, seed=1) * 0.05
        self.base, self.scale = random(64, seed=2) * 0.3, torch.tensor([0.7, 1.3, 0.9, 0.0])
        self.norm = 1 + 0.1 * random(d, seed=3)
        self.maps, self.out = torch.zeros(count, kernels.MAPS), torch.zeros(count, d + 32, dtype=torch.bfloat16)
        self.value, self.shared = random(3 * count + 40, d + 16, seed=4), random(count, d + 16, seed=5)
        order = torch.randperm(len(self.value), generator=torch.Generator().manual_seed(6))
        self.slots = order[: count * sizes.active].contiguous()

    def run(self, name: str, first: int = 0, count: int | None = None, threads: int = 1) -> None:
        """Run a kernel on some of the rows."""

        def at(rows: Tensor) -> int:
            return address(rows[first:])

        attention = name == "site_experts"
        slots = self.slots[first * self.sizes.active :]
        value = at(self.value) if attention else address(self.value)
        compiled(self.isa, self.sizes).run(
            name, step_of(self.count if count is None else count).words, threads, streams=at(self.streams),
            stream_stride=self.streams.stride(0) * 4, maps=at(self.maps), maps_stride=kernels.MAPS * 4,
            norm=address(self.norm), fn=address(self.fn), base=address(self.base), scale=address(self.scale),
            out=at(self.out), out_stride=self.out.stride(0) * 2, value=value, value_stride=self.value.stride(0) * 4,
            shared=at(self.shared), shared_stride=self.shared.stride(0) * 4, slots=address(slots),
        )  # fmt: skip

    def reference_maps(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, s = self.sizes.streams, self.sizes
        return stream_maps(
            streams.view(-1, n, s.hidden), self.fn[: n * (n + 2)], self.base[: n * (n + 2)], self.scale,
            iterations=s.sinkhorn, eps=s.hc_eps, norm_eps=s.norm_eps,
        )  # fmt: skip

    def output(self, name: str) -> Tensor:
        """The sublayer's output that a kernel takes in."""
        d, active = self.sizes.hidden, self.sizes.active
        if name == "site_experts":
            return self.value[: self.count, :d]
        return self.value[self.slots.view(-1, active), :d].sum(1) + self.shared[:, :d]


@ISAS
@SIZES
def test_maps_and_input_of_a_site(isa: str, sizes: Shapes) -> None:
    site = Site(isa, sizes, 11)
    site.run("site_first")
    pre, post, comb = site.reference_maps(site.streams)
    torch.testing.assert_close(site.maps[:, :4], pre, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(site.maps[:, 4:8], post, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(site.maps[:, 16:].view(-1, 4, 4), comb, rtol=5e-6, atol=1e-6)
    torch.testing.assert_close(site.maps[:, 16:].view(-1, 4, 4).sum(2), torch.ones(11, 4), rtol=0, atol=0.02)
    mixed = mix_in(site.streams.view(11, 4, -1), pre)
    close_to_bf16(site.out[:, : sizes.hidden], rms_norm(mixed, site.norm, sizes.norm_eps))
    assert not site.out[:, sizes.hidden :].any()


@ISAS
@SIZES
@pytest.mark.parametrize("name", ["site_experts", "site_attention", "site_last"])
def test_a_sublayers_output_enters_the_streams(isa: str, sizes: Shapes, name: str) -> None:
    site = Site(isa, sizes, 9)
    site.run("site_first")
    before, maps = site.streams.view(9, 4, -1).clone(), site.maps.clone()
    site.run(name)
    _, post, comb = site.reference_maps(before)
    exact = mix_out(before, site.output(name), post, comb)
    torch.testing.assert_close(site.streams.view(9, 4, -1), exact, rtol=1e-5, atol=1e-5)
    if name == "site_last":
        assert torch.equal(site.maps, maps)
        return
    pre, _, comb = site.reference_maps(site.streams)
    torch.testing.assert_close(site.maps[:, 16:].view(-1, 4, 4), comb, rtol=5e-6, atol=1e-6)
    mixed = mix_in(site.streams.view(9, 4, -1), pre)
    close_to_bf16(site.out[:, : sizes.hidden], rms_norm(mixed, site.norm, sizes.norm_eps))


@ISAS
@pytest.mark.parametrize("name", ["site_experts", "site_attention", "site_last"])
def test_a_site_treats_every_row_as_if_alone(isa: str, name: str) -> None:
    whole = Site(isa, NANO, 23)
    whole.run("site_first")
    whole.run(name)
    for cuts, threads in (([1] * 23, 1), ([23], 3), ([5, 4, 3, 2, 8, 1], 2)):
        other, first = Site(isa, NANO, 23), 0
        for count in cuts:
            other.run("site_first", first, count, threads)
            other.run(name, first, count, threads)
            first += count
        for a, b in ((whole.streams, other.streams), (whole.maps, other.maps), (whole.out.float(), other.out.float())):
            assert torch.equal(a.view(torch.int32), b.view(torch.int32)), cuts


@ISAS
@SIZES
def test_wanted_rows_collapse(isa: str, sizes: Shapes) -> None:
    site, wanted = Site(isa, sizes, 12), np.array([0, 5, 11, 4])
    n, d = sizes.streams, sizes.hidden

    def collapse(rows: np.ndarray, threads: int) -> Tensor:
        out = torch.zeros(len(rows), d + 32, dtype=torch.bfloat16)
        step = step_of(12, wanted=rows)
        step.words[STEP.index("wanted_rows")] = len(rows)
        compiled(isa, sizes).run(
            "collapse", step.words, threads, streams=address(site.streams), stream_stride=n * d * 4,
            norm=address(site.norm), fn=address(site.fn), base=address(site.base), scale=address(site.scale),
            out=address(out), out_stride=out.stride(0) * 2,
        )  # fmt: skip
        return out[:, :d]

    found = collapse(wanted, 2)
    x = site.streams[torch.from_numpy(wanted)].view(4, n, d)
    pre = collapse_map(x, site.fn[:n], site.base[:n], site.scale[0], eps=sizes.hc_eps, norm_eps=sizes.norm_eps)
    close_to_bf16(found, rms_norm(mix_in(x, pre), site.norm, sizes.norm_eps))
    assert torch.equal(torch.cat([collapse(wanted[i : i + 1], 1) for i in range(4)]), found)


def key_of(sizes: Shapes, block: np.ndarray, slot: int) -> tuple[Tensor, Tensor]:
    """A key of a block, from its rows and from its pairs."""
    words, d = block.view(np.int16), sizes.dim
    row = words[: KEYS * d].reshape(2, d // 32, 16, 32)[slot // 16, :, slot % 16].reshape(-1)
    pair = words[KEYS * d :].reshape(d // 16, 16, 16, 2)[:, slot // 2, :, slot % 2].reshape(-1)
    return tuple(torch.from_numpy(x.copy()).view(torch.bfloat16).float() for x in (row, pair))  # type: ignore[return-value]


class Latents:
    """Projected rows of sequences: what `latent` makes of them, cut into steps in any way."""

    def __init__(self, isa: str, sizes: Shapes, lengths: list[int]) -> None:
        self.isa, self.sizes, self.width = isa, sizes, 96
        self.query = [random(n, self.width + 16, seed=30 + i) for i, n in enumerate(lengths)]
        self.kv = [random(n, sizes.dim + 16, seed=40 + i) * 3 for i, n in enumerate(lengths)]
        self.query_norm, self.kv_norm = 1 + 0.1 * random(self.width, seed=50), 1 + 0.1 * random(sizes.dim, seed=51)
        turn = [
            torch.polar(torch.ones(n, 2, sizes.rotary // 2), random(n, 2, sizes.rotary // 2, seed=60)) for n in lengths
        ]
        self.angles = [torch.cat((t.real, t.imag), dim=-1).contiguous() for t in turn]
        self.lengths = lengths

    def run(self, steps: list[list[int]], threads: int = 1, regime: int = 1) -> tuple[list[Sequence], list[Tensor]]:
        """The sequences, and the query latents of each."""
        home = RING + self.sizes.ring_blocks * self.sizes.block_bytes
        sequences = [Sequence(home, 64, n) for n in self.lengths]
        outs: list[list[Tensor]] = [[] for _ in sequences]
        for counts in steps:
            spans = [slice(s.position, s.position + n) for s, n in zip(sequences, counts, strict=True)]
            angles = torch.cat([a[span] for a, span in zip(self.angles, spans, strict=True)])
            query = torch.cat([q[span] for q, span in zip(self.query, spans, strict=True)])
            kv = torch.cat([x[span] for x, span in zip(self.kv, spans, strict=True)])
            step = Step(sequences, counts, angles)
            out = torch.zeros(len(query), self.width + 32, dtype=torch.bfloat16)
            compiled(self.isa, self.sizes).run(
                "latent", step.words, threads, query=address(query), query_stride=query.stride(0) * 4,
                query_norm=address(self.query_norm), query_width=self.width, query_out=address(out),
                query_out_stride=out.stride(0) * 2, kv=address(kv), kv_stride=kv.stride(0) * 4,
                kv_norm=address(self.kv_norm), ring=RING, regime=regime,
            )  # fmt: skip
            for part, collected in zip(out[:, : self.width].split(counts), outs, strict=True):
                collected.append(part)
        return sequences, [torch.cat(parts) for parts in outs]


@ISAS
@SIZES
@pytest.mark.parametrize("regime", [0, 1])
def test_latents_are_normed_and_window_entries_quantised(isa: str, sizes: Shapes, regime: int) -> None:
    case = Latents(isa, sizes, [70, 9])
    sequences, outs = case.run([[30, 9], [30, 0], [10, 0]], regime=regime)
    differing = total = 0
    for i, sequence in enumerate(sequences):
        exact = rms_norm(case.query[i][:, : case.width], case.query_norm, sizes.norm_eps)
        close_to_bf16(outs[i], exact)
        cosine, sine = case.angles[i][:, regime].chunk(2, dim=-1)
        kv = rms_norm(case.kv[i][:, : sizes.dim], case.kv_norm, sizes.norm_eps)
        wanted = quantise_kv(rotate(kv, cosine, sine), sizes.rotary).bfloat16().float()
        ring = sequence.home[RING:].reshape(sizes.ring_blocks, -1)
        for position in range(max(0, case.lengths[i] - sizes.window), case.lengths[i]):
            row, pair = key_of(sizes, ring[position // KEYS % sizes.ring_blocks], position % KEYS)
            assert torch.equal(row, pair)
            torch.testing.assert_close(row, wanted[position], rtol=2**-3, atol=1e-3)
            differing += int((row != wanted[position]).sum())
            total += sizes.dim
    assert differing < total / 500


@ISAS
def test_latents_do_not_depend_on_steps_or_threads(isa: str) -> None:
    case = Latents(isa, NANO, [50, 20])
    sequences, outs = case.run([[50, 20]])
    for steps, threads in (([[1, 0]] * 30 + [[20, 20]], 2), ([[7, 5]] * 4 + [[22, 0]], 3)):
        others, other_outs = case.run(steps, threads)
        assert all(torch.equal(a, b) for a, b in zip(outs, other_outs, strict=True))
        assert all(np.array_equal(a.home, b.home) for a, b in zip(sequences, others, strict=True))


@ISAS
@SIZES
def test_heads_are_normed_rotated_scaled_and_laid_out(isa: str, sizes: Shapes) -> None:
    count, regime, h, d = 5, 1, sizes.heads, sizes.dim
    q = random(count, h * d + 16)
    turn = torch.polar(torch.ones(count, 2, sizes.rotary // 2), random(count, 2, sizes.rotary // 2, seed=2))
    angles = torch.cat((turn.real, turn.imag), dim=-1).contiguous()

    def heads(rows: slice, threads: int) -> Tensor:
        own, own_angles = q[rows].contiguous(), angles[rows].contiguous()
        out = torch.full((len(own), sizes.head_groups * d * HEADS + 32), 7, dtype=torch.bfloat16)
        compiled(isa, sizes).run(
            "heads", step_of(len(own), own_angles).words, threads, query=address(own), query_stride=own.stride(0) * 4,
            out=address(out), out_stride=out.stride(0) * 2, regime=regime,
        )  # fmt: skip
        assert (out[:, -32:] == 7).all()
        return out[:, :-32]

    tiles = heads(slice(0, count), 3)
    found = tiles.view(count, sizes.head_groups, d // 32, 16, HEADS, 2).permute(0, 1, 4, 2, 3, 5).reshape(count, -1, d)
    cosine, sine = angles[:, regime].chunk(2, dim=-1)
    exact = rotate(head_norm(q[:, : h * d].reshape(count, h, d), sizes.norm_eps), cosine, sine) * d**-0.5
    close_to_bf16(found[:, :h], exact)
    assert not found[:, h:].any()
    assert torch.equal(torch.cat([heads(slice(i, i + 1), 1) for i in range(count)]), tiles)


@ISAS
@pytest.mark.parametrize(("start", "length"), [(0, 40), (20, 33), (31, 70), (32, 300), (500, 64), (1000, 33), (95, 97)])
def test_long_spans_take_their_window_out_and_bring_it_back(isa: str, start: int, length: int) -> None:
    sizes, size = NANO, NANO.block_bytes
    count = (sizes.window + length) // KEYS + 2
    rng = np.random.default_rng(SEED)
    sequences = [Sequence(RING + sizes.ring_blocks * size, 64, 64) for _ in range(2)]
    for sequence in sequences:
        sequence.home[:] = rng.integers(0, 256, len(sequence.home))
        sequence.position = start
    before = [s.home.copy() for s in sequences]
    region = buffer(count * size, 0xEE)
    step = Step(sequences, [length, 3])
    step.spans[0, SPAN.index("window")], step.spans[0, SPAN.index("window_blocks")] = address(region), count
    compiled(isa, sizes).run("window_open", step.words, 2, ring=RING)
    blocks, ring = region.reshape(count, size), before[0][RING:].reshape(sizes.ring_blocks, size)
    for position in range(max(0, start - sizes.window + 1), start):
        assert np.array_equal(blocks[position // KEYS % count], ring[position // KEYS % sizes.ring_blocks])
    assert all(np.array_equal(s.home, b) for s, b in zip(sequences, before, strict=True))
    region[:] = rng.integers(0, 256, len(region))
    compiled(isa, sizes).run("window_close", step.words, 3, ring=RING)
    ring, end = sequences[0].home[RING:].reshape(sizes.ring_blocks, size), start + length
    for position in range(max(0, end - sizes.window + 1), end):
        assert np.array_equal(ring[position // KEYS % sizes.ring_blocks], blocks[position // KEYS % count])
    assert np.array_equal(sequences[0].home[:RING], before[0][:RING])
    assert np.array_equal(sequences[1].home, before[1])  # a short span keeps its keys in the ring
