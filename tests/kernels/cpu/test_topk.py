"""The exact choice of the k best against a stable sort, where scores are equal, infinite or no numbers."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.topk import write_topk
from tests.kernels.cpu.harness import Kernels, address, buffer, instruction_sets

ISAS = pytest.mark.parametrize("isa", instruction_sets())


@functools.cache
def compiled(isa: str, topk: int) -> Kernels:
    def emit(module: KernelModule) -> None:
        with module.kernel("choose", "scores count to") as k:
            write_topk(k.f, k.ptr("scores"), k.arg("count"), topk, k.ptr("to"))

    return Kernels(isa, emit)


def choose(isa: str, k: int, scores: np.ndarray) -> np.ndarray:
    """Run the choice on one row of scores."""
    space, out = buffer(-(-len(scores) // 64) * 256, 0x7F), buffer((k + 16) * 4)
    space.view(np.float32)[: len(scores)] = scores
    compiled(isa, k).run("choose", np.zeros(1, np.int64), scores=address(space), count=len(scores), to=address(out))
    return out.view(np.int32)[:k]


def best(scores: np.ndarray, k: int) -> np.ndarray:
    """The k largest, ties to the lower index, rising."""
    return np.sort(np.argsort(-scores, kind="stable")[:k])


@ISAS
@pytest.mark.parametrize("k", [32, 512])
def test_ties_go_to_the_lower_index(isa: str, k: int) -> None:
    print("seed 6")
    rng = np.random.default_rng(6)
    for count in (k + 1, k + 15, 2 * k + 7, 5000):
        rows = [
            np.zeros(count), np.full(count, -3.5), rng.integers(0, 3, count), rng.integers(-2, 2, count) * 1e-30,
            np.arange(count), -np.arange(count), rng.standard_normal(count), rng.standard_normal(count) * 1e30,
            np.where(np.arange(count) % 2, np.inf, -np.inf), np.where(np.arange(count) == count - 1, 1.0, 0.0),
            rng.standard_normal(count).astype(np.float16), np.arange(count) // k,
        ]  # fmt: skip
        for number, row in enumerate(rows):
            scores = row.astype(np.float32) + np.float32(0)
            assert np.array_equal(choose(isa, k, scores), best(scores, k)), (count, number)


@ISAS
def test_scores_that_are_no_numbers_still_give_a_whole_list(isa: str) -> None:
    scores = np.full(500, np.nan, np.float32)
    scores[::3] = -scores[::3]
    chosen = choose(isa, 32, scores)
    assert len(set(chosen.tolist())) == 32 and chosen.max() < 500 and chosen.min() >= 0
