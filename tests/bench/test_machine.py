"""The timers of the machine's limits count what they claim."""

from __future__ import annotations

import pytest
import torch

from hadal.bench import machine


def test_a_read_is_that_of_the_bytes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    taken: list[int] = []

    def read(self: torch.Tensor, *others: torch.Tensor) -> None:
        taken.append(self.nbytes)
        now[0] += self.nbytes / 1e9

    monkeypatch.setattr(torch.Tensor, "sum", read)
    monkeypatch.setattr(torch, "dot", read)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    for nbytes in (4096, 10**8, 3 * 10**9):
        monkeypatch.setattr(machine, "LARGEST_READ", 2**28)
        taken.clear()
        assert machine.reader(nbytes)() == pytest.approx(nbytes / 1e9, rel=1e-3)
        assert max(taken) <= 2**28


def test_the_rate_of_products_counts_a_product_and_a_sum_per_element(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    products: list[int] = []

    def multiply(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.dtype == b.dtype == torch.bfloat16
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        now[0] += 0.01

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    assert machine.multiplier()() == pytest.approx(products[0] / 0.01)
