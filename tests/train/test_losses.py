"""Losses against naive loops over tokens."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hadal.train.losses import (
    IGNORED,
    balance_loss,
    count_targets,
    expert_load,
    head_loss_sum,
    shifted_targets,
    update_router_bias,
)


def naive_loss(hidden: torch.Tensor, head: torch.Tensor, targets: list[int]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(hidden.double(), targets, strict=True):
        if target != IGNORED:
            logits = head.double() @ row
            total = total + torch.log(torch.exp(logits).sum()) - logits[target]
    return total


def test_head_loss_and_gradients_equal_the_naive_ones_for_any_chunk():
    generator = torch.Generator().manual_seed(0)
    hidden0, head0 = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    targets = [3, IGNORED, 10, 0, IGNORED, 3, 7]
    want_hidden, want_head = hidden0.double().requires_grad_(), head0.double().requires_grad_()
    want = naive_loss(want_hidden, want_head, targets)
    want.backward()
    for chunk in (1, 2, 100):
        hidden, head = hidden0.clone().requires_grad_(), head0.clone().requires_grad_()
        loss = head_loss_sum(hidden, head, torch.tensor(targets), chunk)
        (3 * loss).backward()
        assert float(loss.detach()) == pytest.approx(float(want.detach()), rel=1e-6)
        assert torch.allclose(hidden.grad.double(), 3 * want_hidden.grad, atol=1e-5)
        assert torch.allclose(head.grad.double(), 3 * want_head.grad, atol=1e-5)


def test_head_loss_without_targets_is_zero_with_zero_gradients():
    hidden, head = torch.randn(2, 4).requires_grad_(), torch.randn(6, 4).requires_grad_()
    loss = head_loss_sum(hidden, head, torch.full((2,), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0 and not hidden.grad.any() and not head.grad.any()


def test_narrow_products_change_gradients_by_rounding_only():
    generator = torch.Generator().manual_seed(2)
    hidden0, head0 = torch.randn(32, 16, generator=generator), torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (32,), generator=generator)
    results = []
    for product in (None, torch.bfloat16):
        hidden, head = hidden0.clone().requires_grad_(), head0.clone().requires_grad_()
        head_loss_sum(hidden, head, targets, product=product).backward()
        results.append((hidden.grad, head.grad))
    for exact, narrow in zip(*results, strict=True):
        assert (narrow - exact).norm() < 0.02 * exact.norm()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 2), st.integers(0, 2**20))
def test_targets_stay_inside_their_document_and_honour_the_flags(lengths, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    ids = torch.randint(100, (total,), generator=generator)
    counted = torch.rand(total, generator=generator) < 0.7
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    targets = shifted_targets(ids, counted, borders, shift).tolist()
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    for i, target in enumerate(targets):
        j = i + shift
        inside = j < total and document[j] == document[i] and bool(counted[j])
        assert target == (int(ids[j]) if inside else IGNORED)
    assert count_targets(torch.tensor(targets)) == sum(t != IGNORED for t in targets)


def test_balance_loss_equals_the_formula_per_document():
    generator = torch.Generator().manual_seed(4)
    scores = torch.rand(9, 4, generator=generator) + 0.1
    ids = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    borders = [0, 2, 9]
    want = 0.0
    for start, end in itertools.pairwise(borders):
        length = end - start
        for expert in range(4):
            routed = sum(int(expert in ids[t].tolist()) for t in range(start, end))
            share = sum(float(scores[t, expert] / scores[t].sum()) for t in range(start, end)) / length
            want += length / 9 * (4 / (2 * length) * routed) * share
    assert float(balance_loss(scores, ids, borders)) == pytest.approx(want, rel=1e-5)


def test_balance_loss_is_one_when_even_and_grows_when_not():
    even = torch.tensor([[0, 1], [2, 3]])
    assert float(balance_loss(torch.ones(2, 4), even, [0, 2])) == pytest.approx(1.0)
    scores = torch.tensor([[4.0, 4.0, 1.0, 1.0]] * 2, requires_grad=True)
    loss = balance_loss(scores, torch.tensor([[0, 1], [0, 1]]), [0, 2])
    loss.backward()
    assert float(loss.detach()) > 1.5
    assert (scores.grad[:, :2] > 0).all() and (scores.grad[:, 2:] < 0).all()


def test_router_bias_moves_by_the_sign_only():
    bias = torch.zeros(3)
    load = expert_load(torch.tensor([[0, 1], [0, 1], [0, 2], [0, 1]]), 3)
    assert load.tolist() == [4, 3, 1]
    update_router_bias(bias, load, 0.001)
    assert bias.tolist() == pytest.approx([-0.001, -0.001, 0.001])
    update_router_bias(bias, torch.tensor([2.0, 2.0, 2.0]), 0.001)
    assert bias.tolist() == pytest.approx([-0.001, -0.001, 0.001])
