"""Listed attention and index scores of the table `cpu` against the reference, and each query against itself alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.kernels import Numerics, kernel_table
from hadal.kernels.cpu import table_rows
from hadal.kernels.keys import Attended, IndexQuery
from hadal.kernels.pages import PAGE_TOKENS, PagePool
from hadal.kernels.reference.compress import encode_index, index_scores, order_topk
from hadal.kernels.stored import RowForm, Shelf, StoredRows
from tests.kernels.cpu.harness import instruction_sets, random

REFERENCE = kernel_table("reference")
EXAMPLES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS, STARTS, LENGTHS = st.integers(0, 10**6), st.integers(0, 400), st.sampled_from([1, 2, 3, 8, 40])

if not instruction_sets():
    pytest.skip("no emitted kernels for this processor", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("isa")
CPU = kernel_table("cpu")


@dataclass(frozen=True)
class Sizes:
    heads: int = 4
    dim: int = 96
    rotary: int = 32
    window: int = 32
    index_heads: int = 3
    index_dim: int = 64
    topk: int = 16


SIZES = [
    Sizes(),
    Sizes(heads=37, dim=48, rotary=16, window=8),
    Sizes(heads=64, dim=128, rotary=64, window=128, topk=70),
]


class Case:
    """A sequence's keys up to `end`, of which any span can be attended from."""

    def __init__(self, sizes: Sizes, seed: int, end: int, ratio: int, indexed: bool, ties: bool = False) -> None:
        self.sizes, self.ratio, self.end = sizes, ratio, end
        s, pool = sizes, PagePool(60_000)
        self.pages = [pool.take() for _ in range(-(-end // PAGE_TOKENS))]
        self.q = (random(seed, end, s.heads, s.dim) * 2).bfloat16()
        self.window = random(seed + 1, end, s.dim).bfloat16()
        self.sink = random(seed + 2, s.heads)
        self.entries = self.index = None
        count = end // ratio if ratio else 0
        if ratio:
            shelf = Shelf(RowForm("fp8", s.dim, torch.bfloat16, s.rotary), 0, ratio)
            rows = REFERENCE.quantise_kv(random(seed + 3, count, s.dim).bfloat16(), s.rotary)
            self.entries = StoredRows(self.pages, shelf, 0).append(rows)
        if indexed:
            shelf = Shelf(RowForm("fp4", s.index_dim, torch.bfloat16), 40_000, ratio)
            numerics = Numerics(torch.bfloat16, fake_quant=True)
            # Few different keys: many exactly equal scores.
            keys = encode_index(random(seed + 4, 3 if ties else count, s.index_dim).bfloat16(), numerics)
            keys = keys[torch.arange(count) % 3] if ties else keys
            q = encode_index(random(seed + 5, end, s.index_heads, s.index_dim).bfloat16(), numerics)
            weights = (random(seed + 6, end, s.index_heads) * 0.1).bfloat16()
            self.index = IndexQuery(q, weights, StoredRows(self.pages, shelf, 0).append(keys), s.topk)

    def span(self, start: int, end: int) -> tuple[Tensor, Attended, Tensor]:
        history = min(start, self.sizes.window - 1)
        entries, index = self.entries, self.index
        if entries is not None:
            entries = replace(entries, count=end // self.ratio)
        if index is not None:
            assert isinstance(index.keys, StoredRows)
            keys = replace(index.keys, count=end // self.ratio)
            index = IndexQuery(index.q_THD[start:end], index.weight_TH[start:end], keys, index.topk)
        window = self.window[start - history : end]
        return (
            self.q[start:end],
            Attended(window, entries, start, history, self.sizes.window, self.ratio, index),
            self.sink,
        )


def assert_near(found: Tensor, want: Tensor) -> None:
    """But for the order of sums and a last bit of exp, which may move a value by a step or two of BF16."""
    assert found.shape == want.shape and found.dtype == want.dtype == torch.bfloat16
    gap = (found.double() - want.double()).abs()
    assert float((gap > 0).double().mean()) < 0.005
    assert (gap <= 0.02 * want.double().abs() + 0.02 * want.double().std()).all()


@EXAMPLES
@given(SEEDS, STARTS, LENGTHS, st.sampled_from(SIZES), st.sampled_from([0, 4, 16, 128]))
def test_attention_to_all_entries_is_the_reference_s(
    seed: int, start: int, length: int, sizes: Sizes, ratio: int
) -> None:
    span = Case(sizes, seed, start + length, ratio, indexed=False).span(start, start + length)
    assert_near(CPU.attend_listed(*span), REFERENCE.attend_listed(*span))


@EXAMPLES
@given(SEEDS, STARTS, LENGTHS, st.sampled_from(SIZES))
def test_index_scores_and_the_choice_are_the_reference_s(seed: int, start: int, length: int, sizes: Sizes) -> None:
    _, keys, _ = Case(sizes, seed, start + length, 4, indexed=True).span(start, start + length)
    chosen = table_rows._select(keys, 0, length)
    index = keys.index
    assert index is not None
    if not len(index.keys_CD):
        assert chosen is None
        return
    visible = (torch.arange(start, start + length) + 1) // 4
    scores = index_scores(index.q_THD, index.weight_TH, index.keys_CD, visible)
    want = order_topk(scores, sizes.topk)
    assert chosen is not None and chosen.shape == want.shape
    assert float((chosen != want).double().mean()) < 0.01  # a score between two BF16 numbers may round otherwise


@EXAMPLES
@given(SEEDS, st.integers(100, 400), LENGTHS, st.sampled_from(SIZES), st.booleans())
def test_a_query_s_bits_depend_on_no_company(seed: int, start: int, length: int, sizes: Sizes, ties: bool) -> None:
    """Nor on how the sequence is cut, on threads, or on how many scores fit at once; also where scores tie."""
    case = Case(sizes, seed, start + length, 4, indexed=True, ties=ties)
    whole = CPU.attend_listed(*case.span(start, start + length))
    assert whole.isfinite().all()
    for t in range(0, length, 3):
        assert torch.equal(CPU.attend_listed(*case.span(start + t, start + t + 1))[0], whole[t])
    early = CPU.attend_listed(*case.span(start // 2, start + length))
    assert torch.equal(early[start - start // 2 :], whole)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(CPU.attend_listed(*case.span(start, start + length)), whole)
        with patch.object(table_rows, "_SCORES", 100):
            assert torch.equal(CPU.attend_listed(*case.span(start, start + length)), whole)
    finally:
        torch.set_num_threads(threads)


def test_tied_scores_go_to_the_lower_entry_by_falling_score() -> None:
    _, keys, _ = Case(SIZES[0], 3, 300, 4, indexed=True, ties=True).span(290, 300)
    chosen = table_rows._select(keys, 0, 10)
    assert chosen is not None
    for row in chosen:  # equal keys in rising order, one kind after the other
        kinds = row % 3
        assert all(a < b for a, b, same in zip(row, row[1:], kinds[1:] == kinds[:-1], strict=False) if same)
        assert int((kinds[1:] != kinds[:-1]).sum()) <= 2


def test_a_block_in_which_all_see_all() -> None:
    case = Case(SIZES[0], 5, 70, 0, indexed=False)
    keys = Attended(case.window, None, 65, 65, 32, 0, full_block=True)
    found, want = (table.attend_listed(case.q[65:], keys, case.sink) for table in (CPU, REFERENCE))
    assert_near(found, want)


def test_other_rows_go_to_the_reference() -> None:
    case = Case(SIZES[0], 6, 90, 4, indexed=True)
    q, keys, sink = case.span(80, 90)
    plain = replace(keys, entries=keys.entries_CD)
    assert torch.equal(CPU.attend_listed(q, plain, sink), REFERENCE.attend_listed(q, plain, sink))
    wide = replace(keys, window_KD=keys.window_KD.float())
    assert torch.equal(CPU.attend_listed(q.float(), wide, sink), REFERENCE.attend_listed(q.float(), wide, sink))
