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
    walsh,
)

KEYS = 64  # offset of the keys in a page
RATIO = 4
GROUPS = PAGE_TOKENS // RATIO // 16  # of a page
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
ODD = shapes(index_heads=21, index_dim=256, topk=40)
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
    """Sequences with random keys and one step's queries; the keys also as the values that scores are made of."""

    def __init__(self, seed: int, sizes: Shapes, lengths: list[int], fresh: list[int], depth: int = 4) -> None:
        """Scales of a key's channel groups differ by less than 2^depth."""
        print(f"seed {seed}")
        self.sizes = sizes
        random, dim = np.random.default_rng(seed), sizes.index_dim
        self.sequences, self.keys = [], []
        for length in lengths:
            groups = -(-length // PAGE_TOKENS) * GROUPS
            codes = random.integers(0, 16, (groups, 16, dim), np.uint8)
            codes[random.random((groups, 16)) < 0.1] = 3  # keys that tie
            scales = random.integers(120, 120 + depth, (groups, 16, dim // 32)).astype(np.uint8)
            scales += random.integers(0, 9, (groups, 16, 1)).astype(np.uint8)
            eights = codes.reshape(groups, 16, dim // 8, 8)
            nibbles = (eights[..., :4] | eights[..., 4:] << 4).transpose(0, 2, 1, 3).reshape(groups, -1)
            packed = np.concatenate((nibbles, scales.transpose(0, 2, 1).reshape(groups, -1)), axis=1)
            assert packed.shape[1] == sizes.group_bytes == 16 * (dim // 2 + dim // 32)
            sequence = Sequence(64, KEYS + GROUPS * sizes.group_bytes, length)
            for i, page in enumerate(sequence.pages):
                page[KEYS:] = packed[i * GROUPS : (i + 1) * GROUPS].reshape(-1)
            self.sequences.append(sequence)
            # What lies below a sixteenth of a key's largest scale is cut off.
            unit = 2.0 ** (scales.max(-1, keepdims=True) - 127.0) / 16
            values = E2M1[codes] * np.repeat(2.0 ** (scales - 127.0), 32, axis=-1)
            self.keys.append((np.trunc(values / unit) * unit).reshape(-1, dim))
            assert depth > 4 or np.array_equal(self.keys[-1], values.reshape(-1, dim))
        g = torch.Generator().manual_seed(seed)
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
        """Codes before they are rounded [T, H, Di] and the scores' factors [T, H], in float64."""
        heads, dim, rotary = self.sizes.index_heads, self.sizes.index_dim, self.sizes.rotary
        q = self.q[:, : heads * dim].view(-1, heads, dim).double()
        turn = torch.view_as_complex(self.angles[:, regime].double().view(-1, 2, rotary // 2).mT.contiguous())
        pairs = torch.view_as_complex(q[..., -rotary:].reshape(-1, heads, rotary // 2, 2)) * turn[:, None]
        q = torch.cat((q[..., :-rotary], torch.view_as_real(pairs).flatten(-2)), dim=-1)
        q = q @ torch.from_numpy(walsh(dim))
        amax = q.abs().amax(-1)
        return q * (127 / amax)[..., None], self.weights[:, :heads] * (dim * heads) ** -0.5 * (amax / 127)


class Result:
    """What the three kernels leave behind."""

    def __init__(self, setup: Setup, isa: str, threads: int = 1, regime: int = 1) -> None:
        sizes, kernels, step = setup.sizes, compiled(isa, setup.sizes), setup.step()
        rows, size = len(step.positions), indexer.record_bytes(sizes)
        self.visible = [(int(t) + 1) // RATIO for t in step.positions]
        self.records = buffer(rows * (size + 64), 0xEE)
        kernels.run(
            "index_query", step.words, threads, q=address(setup.q), q_stride=setup.q.stride(0) * 4, regime=regime,
            weights=address(setup.weights), weights_stride=setup.weights.stride(0) * 4, out=address(self.records),
            out_stride=size + 64,
        )  # fmt: skip
        room = -(-max(self.visible) // 64) * 64 + 64
        scores, listed = buffer(rows * room * 4, 0xEE), sizes.topk + 16
        common = dict(scores=address(scores), scores_stride=room * 4)
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
        padded, records = indexer.padded_heads(sizes), self.records.reshape(rows, -1)[:, :size]
        codes = records[:, : padded * sizes.index_dim].reshape(rows, padded, -1)
        self.codes = (codes + 128 if isa == "avx512" else codes).view(np.int8).astype(np.float64)
        self.factors = records[:, padded * sizes.index_dim :].copy().view(np.float32).astype(np.float64)

    def wanted(self, setup: Setup, row: int, span: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's scores by the definition, from its record, and the sums of the magnitudes in them."""
        dots = np.maximum(self.codes[row] @ setup.keys[span][: self.visible[row]].T, 0) * 16
        return self.factors[row] @ dots, np.abs(self.factors[row]) @ dots


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
    heads = sizes.index_heads
    assert np.abs(result.codes[:, :heads] - codes.numpy()).max() < 0.5001
    np.testing.assert_allclose(result.factors[:, :heads] * 16, factors, rtol=1e-5)
    assert not result.codes[:, heads:].any() and not result.factors[:, heads:].any()


@ISAS
@SIZES
@pytest.mark.parametrize("depth", [4, 60])
def test_scores_and_choice_follow_the_definition(isa: str, sizes: Shapes, depth: int) -> None:
    tokens = sizes.topk * RATIO
    setup = Setup(2, sizes, [tokens * 2 + 77, 40, tokens + 9, tokens + 700], [7, 3, 9, 1], depth)
    result = Result(setup, isa)
    span = [0] * 7 + [1] * 3 + [2] * 9 + [3]
    scored = 0
    for row, visible in enumerate(result.visible):
        if visible > sizes.topk:
            wanted, size = result.wanted(setup, row, span[row])
            assert (np.abs(result.scores[row, :visible] - wanted) <= size * 1e-6).all()
            scored += 1
    assert scored >= 10
    check_choice(setup, result)


@pytest.mark.parametrize("isa", instruction_sets()[1:])
@SIZES
def test_every_instruction_set_gives_the_same_scores(isa: str, sizes: Shapes) -> None:
    tokens = sizes.topk * RATIO
    setup = Setup(3, sizes, [tokens * 2 + 130, tokens + 50], [3, 1], depth=9)
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
def test_a_row_alone_has_the_scores_it_has_in_company(isa: str) -> None:
    setup = Setup(5, NANO, [9000], [3], depth=9)
    together = Result(setup, isa)
    for row in range(3):
        alone = Setup(5, NANO, [9000], [1], depth=9)
        alone.q, alone.weights, alone.angles = (x[row : row + 1] for x in (setup.q, setup.weights, setup.angles))
        alone.lengths = [8998 + row]
        found, visible = Result(alone, isa), together.visible[row]
        assert found.visible == [visible]
        assert np.array_equal(found.scores[0, :visible], together.scores[row, :visible])
