"""Both forms of attention against a naive per-query oracle, and the indexer's choice under ties."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.kernels import Numerics
from hadal.kernels.keys import Attended, IndexerLoss, IndexQuery
from hadal.kernels.reference import attention
from hadal.kernels.reference.compress import order_topk, select_topk


def naive(q, window, entries, start, history, length, ratio, sink, chosen=None, full=False):
    """One query and head at a time, in float64, straight from the definition."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        position = start + t
        keys = [row for row in range(len(window)) if full or position - length < start - history + row <= position]
        rows = [window[row].double() for row in keys]
        visible = (position + 1) // ratio if ratio else 0
        rows += [entries[j].double() for j in range(visible) if chosen is None or j in chosen[t]]
        kv = torch.stack(rows)
        for h in range(q.shape[1]):
            logits = kv @ q[t, h].double() / math.sqrt(q.shape[2])
            weights = logits.exp()
            out[t, h] = weights @ kv / (weights.sum() + math.exp(sink[h]))
    return out


def case(seed, tokens, start, ratio, length=8, heads=3, dim=16):
    g = torch.Generator().manual_seed(seed)
    history = min(start, length - 1)
    q = torch.randn(tokens, heads, dim, generator=g)
    window = torch.randn(history + tokens, dim, generator=g)
    count = (start + tokens) // ratio if ratio else 0
    entries = torch.randn(count, dim, generator=g) if ratio else None
    sink = torch.randn(heads, generator=g)
    index = IndexQuery(
        torch.randn(tokens, 2, 8, generator=g),
        torch.randn(tokens, 2, generator=g),
        torch.randn(count, 8, generator=g),
        4,
    )
    return q, Attended(window, entries, start, history, length, ratio), sink, index


def chosen_sets(index, start, ratio):
    """The oracle's choice: score every visible entry in float64 and sort, lower index first on ties."""
    sets = []
    for t in range(index.q_THD.shape[0]):
        scores = []
        for j in range((start + t + 1) // ratio):
            dots = (index.q_THD[t].detach().double() @ index.keys_CD[j].double()).clamp(min=0)
            scores.append((-float(dots @ index.weight_TH[t].double()), j))
        sets.append({j for _, j in sorted(scores)[: index.topk]})
    return sets


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 60), st.sampled_from([0, 4, 7, 16]))
def test_both_forms_equal_the_definition(seed, tokens, start, ratio):
    q, keys, sink, _ = case(seed, tokens, start, ratio)
    want = naive(q, keys.window_KD, keys.entries_CD, start, keys.history, keys.window, ratio, sink)
    torch.testing.assert_close(attention.attend(q, keys, sink, Numerics()).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attention.attend_listed(q, keys, sink).double(), want, atol=2e-5, rtol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(0, 120))
def test_selected_attention_equals_the_definition_on_all_three_paths(seed, tokens, start):
    """Few entries: all of them; more: masked; many: gathered."""
    q, keys, sink, index = case(seed, tokens, start, 4)
    keys = Attended(keys.window_KD, keys.entries_CD, start, keys.history, keys.window, 4, index)
    chosen = chosen_sets(index, start, 4)
    want = naive(q, keys.window_KD, keys.entries_CD, start, keys.history, keys.window, 4, sink, chosen)
    torch.testing.assert_close(attention.attend(q, keys, sink, Numerics()).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attention.attend_listed(q, keys, sink).double(), want, atol=2e-5, rtol=1e-4)


def test_chunks_of_any_size_give_the_same_rows(monkeypatch):
    q, keys, sink, index = case(3, 100, 37, 4)
    keys = Attended(keys.window_KD, keys.entries_CD, 37, keys.history, keys.window, 4, index)
    want = attention.attend(q, keys, sink, Numerics())
    for size in (1, 3, 64):
        monkeypatch.setattr(attention, "CHUNK", size)
        torch.testing.assert_close(attention.attend(q, keys, sink, Numerics()), want, atol=1e-5, rtol=1e-4)


def test_a_draft_block_sees_all_of_itself():
    q, keys, sink, _ = case(5, 5, 20, 0)
    keys = Attended(keys.window_KD, None, 20, keys.history, keys.window, 0, full_block=True)
    want = naive(q, keys.window_KD, None, 20, keys.history, keys.window, 0, sink, full=True)
    torch.testing.assert_close(attention.attend(q, keys, sink, Numerics()).double(), want, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(attention.attend_listed(q, keys, sink).double(), want, atol=2e-5, rtol=1e-4)


def test_a_large_sink_does_not_overflow():
    q, keys, _, _ = case(6, 4, 0, 0)
    out = attention.attend(q, keys, torch.full((3,), 500.0), Numerics())
    assert torch.equal(out, torch.zeros_like(out))


@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 12), st.integers(1, 4))
def test_topk_is_exact_and_ties_go_to_the_lower_index(seed, count, k, levels):
    """Scores of few levels are nearly all ties; hidden entries (-inf) are never chosen."""
    order = random.Random(seed)
    rows = [
        [float("-inf") if order.random() < 0.3 else float(order.randrange(levels)) for _ in range(count)]
        for _ in range(5)
    ]
    scores = torch.tensor(rows)
    mask, listed = select_topk(scores, k), order_topk(scores, k)
    for t, values in enumerate(rows):
        want = [j for j in sorted(range(count), key=lambda j: (-values[j], j)) if values[j] > float("-inf")][:k]
        assert mask[t].nonzero().flatten().tolist() == sorted(want)
        assert [j for j in listed[t].tolist() if j >= 0] == want


def test_indexer_objective_is_the_kl_over_the_chosen_entries():
    """Per query; the teacher is the attention mass summed over heads, window keys and sink in its denominator."""
    q, keys, sink, index = case(8, 30, 0, 4)
    index = IndexQuery(index.q_THD.requires_grad_(), index.weight_TH, index.keys_CD, 4)
    keys = Attended(keys.window_KD, keys.entries_CD, 0, 0, keys.window, 4, index)
    loss = IndexerLoss()
    attention.attend(q, keys, sink, Numerics(), loss)
    chosen = chosen_sets(index, 0, 4)
    want, queries = 0.0, 0
    for t in range(30):
        picks = sorted(chosen[t])
        if not picks:
            continue
        mass = torch.zeros(len(picks), dtype=torch.float64)
        rows = [keys.window_KD[r].double() for r in range(max(0, t - keys.window + 1), t + 1)]
        kv = torch.stack(rows + [keys.entries_CD[j].double() for j in picks])
        for h in range(3):
            weights = (kv @ q[t, h].double() / 4).exp()
            mass += (weights / (weights.sum() + math.exp(sink[h])))[len(rows) :]
        teacher = mass / mass.sum()
        scores = [
            (index.q_THD[t].detach().double() @ index.keys_CD[j].double()).clamp(min=0) @ index.weight_TH[t].double()
            for j in picks
        ]
        student = torch.stack(scores).log_softmax(0)
        want += float((teacher * (teacher.log() - student)).sum())
        queries += 1
    assert loss.queries == queries
    assert torch.stack(loss.kl).sum().item() == pytest.approx(want, rel=1e-4)
    torch.stack(loss.kl).sum().backward()
    assert index.q_THD.grad is not None
    assert torch.isfinite(index.q_THD.grad).all()
    assert index.q_THD.grad.abs().max() > 0


def test_queries_without_any_complete_block_leave_finite_gradients():
    q, keys, sink, index = case(9, 3, 0, 4)
    index = IndexQuery(index.q_THD.requires_grad_(), index.weight_TH, index.keys_CD, 4)
    loss = IndexerLoss()
    q.requires_grad_()
    out = attention.attend(q, Attended(keys.window_KD, keys.entries_CD, 0, 0, 8, 4, index), sink, Numerics(), loss)
    out.sum().backward()
    assert loss.queries == 0
    assert torch.isfinite(q.grad).all()
