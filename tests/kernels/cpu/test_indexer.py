"""The emitted indexer against plain torch: query records, scores equal on every instruction set, the exact choice."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu import indexer
from hadal.kernels.cpu.layout import PAGE_TOKENS, Shapes
from hadal.kernels.cpu.program import KernelModule
from tests.kernels.cpu.harness import (
    FLASH,
    NANO,
    SMALL,
    Kernels,
    Sequence,
    Step,
    address,
    buffer,
    instruction_sets,
    shapes,
)

KEYS = 64  # offset of the keys in a page
RATIO = 4
ODD = shapes(index_heads=21, index_dim=96, topk=40)
MANY = shapes(index_heads=70, index_dim=32, topk=16)
ISAS = pytest.mark.parametrize("isa", instruction_sets())
SIZES = pytest.mark.parametrize("sizes", [NANO, SMALL, FLASH, ODD, MANY], ids=["nano", "small", "flash", "odd", "many"])


@functools.cache
def compiled(isa: str, sizes: Shapes) -> Kernels:
    def emit(module: KernelModule) -> None:
        indexer.emit_index_query(module, sizes)
        indexer.emit_index_score(module, sizes)
        indexer.emit_index_select(module, sizes)

    return Kernels(isa, emit)


class Setup:
    """Sequences with random keys and one step's queries, as FP32 and as codes the oracle made."""

    def __init__(self, seed: int, sizes: Shapes, lengths: list[int], fresh: list[int], ratio: int = RATIO) -> None:
        print(f"seed {seed}")
        self.sizes, self.ratio = sizes, ratio
        g = torch.Generator().manual_seed(seed)
        per_page = PAGE_TOKENS // ratio
        self.sequences, self.codes, self.scales = [], [], []
        for length in lengths:
            groups = -(-length // PAGE_TOKENS) * per_page // 16
            codes = torch.randint(-127, 128, (groups, 16, sizes.index_dim), generator=g, dtype=torch.int8)
            scales = torch.rand(groups, 16, generator=g) + 0.1
            sequence = Sequence(64, KEYS + per_page // 16 * sizes.group_bytes, length)
            packed = codes.view(groups, 16, -1, 4).transpose(1, 2).reshape(groups, -1).numpy().view(np.uint8)
            packed = np.concatenate((packed, scales.numpy().view(np.uint8)), axis=1)
            for i, page in enumerate(sequence.pages):
                page[KEYS:] = packed[i * per_page // 16 : (i + 1) * per_page // 16].reshape(-1)
            self.sequences.append(sequence)
            self.codes.append(codes.flatten(0, 1))
            self.scales.append(scales.flatten())
        self.lengths, self.fresh = lengths, fresh
        rows = sum(fresh)
        self.q = torch.randn(rows, sizes.index_heads * sizes.index_dim + 8, generator=g)
        self.weights = torch.randn(rows, sizes.index_heads + 3, generator=g)
        turn = torch.polar(torch.ones(rows, 2, sizes.rotary // 2), torch.rand(rows, 2, sizes.rotary // 2, generator=g))
        self.angles = torch.cat((turn.real, turn.imag), dim=-1).contiguous()

    def step(self) -> Step:
        for sequence, length, fresh in zip(self.sequences, self.lengths, self.fresh, strict=True):
            sequence.position = length - fresh
        return Step(self.sequences, self.fresh, self.angles)

    def encoded(self, regime: int) -> tuple[Tensor, Tensor]:
        """int8 codes [T, H, Di] and factors [T, H] by plain torch."""
        heads, dim, rotary = self.sizes.index_heads, self.sizes.index_dim, self.sizes.rotary
        q = self.q[:, : heads * dim].view(-1, heads, dim).clone()
        cosine, sine = self.angles[:, regime, : rotary // 2], self.angles[:, regime, rotary // 2 :]
        pairs = q[..., -rotary:].view(*q.shape[:2], -1, 2)
        even, odd = pairs[..., 0].clone(), pairs[..., 1].clone()
        pairs[..., 0] = even * cosine[:, None] - odd * sine[:, None]
        pairs[..., 1] = even * sine[:, None] + odd * cosine[:, None]
        amax = q.abs().amax(-1)
        codes = (q * (127 / amax)[..., None]).round().to(torch.int8)
        constant = torch.tensor(dim**-0.5 * heads**-0.5)
        return codes, self.weights[:, :heads] * constant * (amax / 127)


class Result:
    """What the three kernels leave behind."""

    def __init__(self, setup: Setup, isa: str, threads: int = 1, regime: int = 1) -> None:
        sizes, kernels, step = setup.sizes, compiled(isa, setup.sizes), setup.step()
        rows, size = len(step.positions), indexer.record_bytes(sizes)
        self.visible = [(int(t) + 1) // setup.ratio for t in step.positions]
        self.records = buffer(rows * (size + 64), 0xEE)
        kernels.run(
            "index_query", step.words, threads, q=address(setup.q), q_stride=setup.q.stride(0) * 4, regime=regime,
            weights=address(setup.weights), weights_stride=setup.weights.stride(0) * 4, out=address(self.records),
            out_stride=size + 64,
        )  # fmt: skip
        room = -(-max(self.visible) // 64) * 64 + 64
        scores, listed = buffer(rows * room * 4, 0xEE), sizes.topk + 16
        common = dict(ratio=setup.ratio, scores=address(scores), scores_stride=room * 4)
        kernels.run(
            "index_score", step.words, threads, queries=address(self.records), query_stride=size + 64, keys=KEYS,
            **common,
        )  # fmt: skip
        self.scores = scores.view(np.float32).reshape(rows, room).copy()
        selected, count = buffer(rows * listed * 4), np.zeros(rows, np.int64)
        kernels.run(
            "index_select", step.words, threads, selected=address(selected), selected_stride=listed * 4,
            selected_count=address(count), **common,
        )  # fmt: skip
        self.count, self.selected = count, selected.view(np.int32).reshape(rows, listed)[:, : sizes.topk]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest, ties to the lower index, rising."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


def check_choice(setup: Setup, result: Result) -> None:
    k = setup.sizes.topk
    assert result.count.tolist() == [min(v, k) for v in result.visible]
    for row, visible in enumerate(result.visible):
        if visible > k:
            assert np.array_equal(result.selected[row], best(result.scores[row, :visible], k))


@ISAS
@SIZES
def test_queries_are_rotated_and_rounded(isa: str, sizes: Shapes) -> None:
    setup = Setup(1, sizes, [30], [5])
    result = Result(setup, isa, regime=0)
    codes, factors = setup.encoded(0)
    heads, padded = sizes.index_heads, indexer.padded_heads(sizes)
    records = result.records.reshape(5, -1)[:, : indexer.record_bytes(sizes)]
    found = records[:, : padded * sizes.index_dim].reshape(5, padded, -1)
    found = (found + 128 if isa == "avx512" else found).view(np.int8)
    assert np.array_equal(found[:, :heads], codes.numpy()) and not found[:, heads:].any()
    found_factors = records[:, padded * sizes.index_dim :].copy().view(np.float32)
    assert np.array_equal(found_factors[:, :heads], factors.numpy()) and not found_factors[:, heads:].any()


@ISAS
@SIZES
def test_scores_and_choice_follow_the_definition(isa: str, sizes: Shapes) -> None:
    tokens = sizes.topk * RATIO
    setup = Setup(2, sizes, [tokens * 2 + 77, 40, tokens + 9], [7, 3, 9])
    result = Result(setup, isa)
    codes, factors = setup.encoded(1)
    span = [0] * 7 + [1] * 3 + [2] * 9
    scored = 0
    for row, visible in enumerate(result.visible):
        if visible <= sizes.topk:
            continue
        keys, scales = setup.codes[span[row]][:visible].double(), setup.scales[span[row]][:visible].double()
        dots = (codes[row].double() @ keys.T).relu()
        wanted = (factors[row].double()[:, None] * dots).sum(0) * scales
        size = (factors[row].double().abs()[:, None] * dots).sum(0) * scales
        error = (torch.from_numpy(result.scores[row, :visible]) - wanted).abs()
        assert (error <= size * 1e-6).all()
        scored += 1
    assert scored >= 10
    check_choice(setup, result)


@pytest.mark.parametrize("isa", instruction_sets()[1:])
@SIZES
def test_every_instruction_set_gives_the_same_scores(isa: str, sizes: Shapes) -> None:
    tokens = sizes.topk * RATIO
    setup = Setup(3, sizes, [tokens * 2 + 130, tokens + 50], [3, 2])
    first, other = Result(setup, instruction_sets()[0]), Result(setup, isa)
    for row, visible in enumerate(first.visible):
        assert np.array_equal(first.scores[row, :visible].view(np.int32), other.scores[row, :visible].view(np.int32))
    assert np.array_equal(first.selected, other.selected)


@ISAS
def test_rows_do_not_depend_on_threads_or_company(isa: str) -> None:
    setup = Setup(4, NANO, [5000, 300, 90, 9000], [3, 20, 2, 30])
    one = Result(setup, isa)
    for threads in (2, 3):
        more = Result(setup, isa, threads)
        assert np.array_equal(one.selected, more.selected) and np.array_equal(one.count, more.count)
        assert all(np.array_equal(a[:v], b[:v]) for a, b, v in zip(one.scores, more.scores, one.visible, strict=True))
    alone = Setup(4, NANO, [5000], [3])
    alone.q, alone.weights, alone.angles = setup.q[:3], setup.weights[:3], setup.angles[:3]
    assert np.array_equal(Result(alone, isa).scores[:, :1240], one.scores[:3, :1240])


@ISAS
def test_other_ratios_have_other_pages(isa: str) -> None:
    setup = Setup(5, NANO, [777], [9], ratio=8)
    result = Result(setup, isa)
    codes, factors = setup.encoded(1)
    dots = (codes[8].double() @ setup.codes[0][:97].double().T).relu()
    wanted = (factors[8].double()[:, None] * dots).sum(0) * setup.scales[0][:97]
    torch.testing.assert_close(torch.from_numpy(result.scores[8, :97]).double(), wanted, rtol=1e-5, atol=1e-4)
    check_choice(setup, result)
