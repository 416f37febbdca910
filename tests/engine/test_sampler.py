"""Chosen tokens against an FP64 oracle and exact probabilities, for torch and the kernels of each instruction set."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.engine import sampler
from hadal.engine.request import SamplingParams
from hadal.engine.sampler import Choice, Draw, Sampler, noise_key
from hadal.kernels.cpu.target import Isa
from tests.kernels.cpu.harness import instruction_sets

INF = math.inf
WAYS = [*instruction_sets(), "torch", "torch, many rows at once"]
WAY = pytest.mark.parametrize("way", WAYS)
FAST_WAY = pytest.mark.parametrize("way", [way for way in WAYS if way != "torch"])  # which only loops over rows
GREEDY = SamplingParams(temperature=0.0)


def make(way: str, vocabulary: int) -> Sampler:
    """A sampler that works in one way; the last one is how it works on accelerators."""
    isa = Isa(way) if way in instruction_sets() else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "detect", lambda: (isa, ""))
        made = Sampler(vocabulary)
    if way.endswith("once"):
        made._find = lambda logits_RV, asked: sampler.find(logits_RV[:, :vocabulary], asked)
    return made


def draw(position: int = 0, *, seed: int = 5, stream: int = 0, **params: Any) -> Draw:
    return Draw(SamplingParams(**params), seed, stream, position, params.get("logprobs") is not None)


def tokens(way: str, logits_V: Tensor, count: int, **params: Any) -> list[int]:
    """What is chosen from one row at positions 0 .. count."""
    made, found = make(way, len(logits_V)), []
    for first in range(0, count, 500):
        draws = [draw(p, **params) for p in range(first, min(first + 500, count))]
        found += [c.token_id for c in made.choose(logits_V.expand(len(draws), -1), draws)]
    return found


def exact_gumbel(seed: int, stream: int, position: int, count: int) -> np.ndarray:
    """Gumbel noise in FP64."""

    def mixed(x: np.ndarray) -> np.ndarray:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    key, ids = noise_key(seed, stream, position), np.arange(count, dtype=np.uint64)
    bits = mixed(mixed((ids + key % 2**32) % 2**32) ^ (key >> 32))
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities of the tokens that the filters keep, 0 for others."""
    scaled = (logits - logits.max()) / params.temperature
    order = np.argsort(-logits, kind="stable")[: params.top_k or None]
    p = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
    ahead = np.cumsum(p) - p
    inside = ahead < params.top_p if params.top_p < 1 else np.ones(len(p), bool)
    out = np.zeros(len(logits))
    out[order[inside]] = p[inside] / p[inside].sum()
    return out


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 3, "top_p": 0.99},
    {"top_k": 100000},
]


@WAY
@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 100, 3001])
def test_every_token_is_the_oracles(way: str, size: int) -> None:
    print("seed 1")
    rng = np.random.default_rng(1)
    made = make(way, size)
    draws, rows = [], []
    for n in range(300):
        params = FILTERS[n % len(FILTERS)] | {"temperature": float(rng.choice([0.5, 1.0, 1.7]))}
        draws.append(draw(int(rng.integers(1000)), seed=int(rng.integers(2**63)), stream=n % 3, **params))
        rows.append((rng.standard_normal(size + 5) * rng.choice([0.01, 1, 8])).astype(np.float32))
    found = made.choose(torch.from_numpy(np.stack(rows)), draws)
    for d, row, choice in zip(draws, rows, found, strict=True):
        logits = row[:size].astype(np.float64)
        inside = kept(logits, d.params) > 0
        scores = logits / d.params.temperature + exact_gumbel(d.seed, d.stream, d.position, size)
        best = np.argmax(np.where(inside, scores, -INF))
        close = 4e-6 * max(1.0, float(np.abs(logits).max()))
        assert choice.token_id == best or scores[best] - scores[choice.token_id] < close, (d, choice, best)
        assert inside[choice.token_id], (d, choice)


def chi_square(found: list[int], p: np.ndarray) -> tuple[float, float]:
    """The statistic over groups of about equal probability, and a bound that chance passes once in a million times."""
    order = np.argsort(-p)
    group = np.zeros(len(p), int)
    group[order] = np.minimum((np.cumsum(p[order]) - p[order] / 2) * 30, 29).astype(int)
    group[order[np.cumsum(p[order]) - p[order] > 1 - 20 / len(found)]] = 29  # the rarest together
    expected = np.bincount(group, p, 30) * len(found)
    seen = np.bincount(group[found], minlength=30)
    some = expected > 0
    assert not seen[~some].any() and not (p[found] == 0).any()
    freedom = max(int(some.sum()) - 1, 1)
    return float(((seen - expected)[some] ** 2 / expected[some]).sum()), freedom + 5 * math.sqrt(2 * freedom) + 12


@FAST_WAY
@pytest.mark.parametrize("params", FILTERS[:-1], ids=str)
def test_frequencies_follow_the_softmax_of_what_is_kept(way: str, params: dict[str, Any]) -> None:
    print("seed 2")
    rng = np.random.default_rng(2)
    for size, scale, temperature in ((7, 1.0, 1.0), (300, 1.5, 0.7)):
        logits = (rng.standard_normal(size) * scale).astype(np.float32)
        found = tokens(way, torch.from_numpy(logits), 8000, temperature=temperature, **params)
        p = kept(logits.astype(np.float64), SamplingParams(temperature=temperature, **params))
        statistic, bound = chi_square(found, p)
        assert statistic < bound, (statistic, bound)


@FAST_WAY
def test_neighbours_in_position_stream_and_seed_are_independent(way: str) -> None:
    made, flat = make(way, 4), torch.zeros(2000, 4)
    first = made.guess(flat, [draw(p) for p in range(2000)])
    others: list[dict[str, int]] = [{"position": 1}, {"stream": 1}, {"seed": 6}]
    for other in others:
        shift = other.pop("position", 0)
        second = made.guess(flat, [draw(p + shift, **other) for p in range(2000)])
        pairs = Counter(zip(first, second, strict=True))
        assert sum((pairs[a, b] - 125) ** 2 / 125 for a in range(4) for b in range(4)) < 15 + 5 * math.sqrt(30), other
    assert made.guess(flat[:1], [draw(seed=-1)]) == made.guess(flat[:1], [draw(seed=2**64 - 1)])
    assert len({noise_key(s, t, p) for s in range(10) for t in range(10) for p in range(10)}) == 1000


@FAST_WAY
@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
def test_the_noise_couples_rows_that_are_alike(way: str, scale: float) -> None:
    print("seed 3")
    g = torch.Generator().manual_seed(3)
    target = torch.randn(50, generator=g) * 2
    guess = target + scale * torch.randn(50, generator=g)
    distance = float((target.softmax(0) - guess.softmax(0)).abs().sum()) / 2
    count = 2000
    agree = sum(a == b for a, b in zip(tokens(way, target, count), tokens(way, guess, count), strict=True)) / count
    least = (1 - distance) / (1 + distance)
    assert agree > least - 4 * math.sqrt(least * (1 - least) / count), (distance, agree, least)


@WAY
def test_greedy_and_filters_prefer_the_lower_index_among_equals(way: str) -> None:
    logits = torch.full((3, 300), -1.0)
    logits[0, [17, 40, 299]] = 2.0
    logits[2, 1:] = -0.0
    logits[2, 0] = 0.0
    made = make(way, 300)
    assert [c.token_id for c in made.choose(logits, [Draw(GREEDY, 0, 0, 0, False)] * 3)] == [17, 0, 0]
    ties = torch.tensor([0.0, *[1.0] * 30])
    assert set(tokens(way, ties, 300, top_k=2)) == {1, 2}
    assert set(tokens(way, ties, 300, top_p=0.08)) == {1, 2, 3}
    assert set(tokens(way, ties, 300, top_k=10, top_p=0.25)) == {1, 2, 3}
    assert set(tokens(way, torch.zeros(20), 100, top_p=0.25)) == {0, 1, 2, 3, 4}  # which reach it exactly
    assert set(tokens(way, ties, 50, top_p=1e-9)) == set(tokens(way, ties, 50, top_k=1)) == {1}


@WAY
def test_top_p_keeps_the_smallest_set_that_reaches_it(way: str) -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    assert set(tokens(way, logits, 200, top_p=0.65)) == {1, 3}
    assert set(tokens(way, logits, 200, top_p=0.75)) == {1, 2, 3}
    assert set(tokens(way, logits, 200, top_p=0.75, top_k=3)) == {1, 3}  # of 0.9
    assert set(tokens(way, logits, 200, top_p=0.75, temperature=0.2)) == {1}  # temperature comes first


@WAY
def test_a_masked_token_is_never_chosen_nor_listed(way: str) -> None:
    logits = torch.full((40,), -INF)
    logits[[7, 21]] = torch.tensor([-3.0, -2.0])
    for params in ({}, {"top_k": 5}, {"top_p": 0.999999}, {"top_k": 30, "top_p": 0.999999}, {"temperature": 1e9}):
        assert set(tokens(way, logits, 100, **params)) == {7, 21}, params
    choice = make(way, 40).choose(logits[None], [draw(logprobs=5, temperature=0.0)])[0]
    assert list(choice.logprobs) == [21, 7] and choice.logprobs[7].rank == 2
    assert math.isclose(choice.logprobs[21].logprob, -math.log(1 + math.exp(-1)), rel_tol=1e-5)


@WAY
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_fails_alone(way: str, temperature: float) -> None:
    logits = torch.zeros(5, 20)
    logits[0, 2], logits[2, 19], logits[3], logits[4, 3] = math.nan, INF, -INF, -math.nan
    logits[1, 4] = 90.0
    made = make(way, 20)
    draws = [draw(7, temperature=temperature, logprobs=2, top_p=0.9)] * 5
    choices = made.choose(logits, draws)
    assert choices[1].token_id == 4 and choices[1].error is None and next(iter(choices[1].logprobs)) == 4
    failed = [choices[i] for i in (0, 2, 3, 4)]
    assert all(c == Choice(error=c.error) and "token 7 are not finite" in str(c.error) for c in failed)
    assert made.guess(logits, draws) == [0, 4, 0, 0, 0]


@WAY
def test_padding_is_neither_chosen_nor_counted(way: str) -> None:
    logits = torch.full((30, 50), 100.0)
    logits[::2, 37:] = math.nan
    logits[:, :37] = torch.randn(37, generator=torch.Generator().manual_seed(4))
    choices = make(way, 37).choose(logits, [draw(p, logprobs=20, temperature=3.0) for p in range(30)])
    wanted = torch.log_softmax(logits[0, :37], 0)
    for choice in choices:
        assert choice.error is None and max(choice.logprobs) < 37 and len(choice.logprobs) in (20, 21)
        assert all(math.isclose(x.logprob, float(wanted[i]), abs_tol=2e-6) for i, x in choice.logprobs.items())


@WAY
def test_temperatures_from_nearly_greedy_to_nearly_flat(way: str) -> None:
    logits = torch.tensor([1.0, 3.0, 2.999, -1e9, 3.0, 0.0])
    cold = Counter(tokens(way, logits, 1000, temperature=1e-6))
    assert set(cold) == {1, 4} and abs(cold[1] - 500) < 80
    assert set(tokens(way, logits, 100, temperature=5e-324)) == {1, 4}
    warm = tokens(way, logits, 1500, temperature=2.0)
    statistic, bound = chi_square(warm, kept(logits.double().numpy(), SamplingParams(temperature=2.0)))
    assert statistic < bound
    assert set(tokens(way, logits, 300, temperature=1e300)) == set(range(6))
    wide = torch.tensor([3e38, -3e38, 2.9e38])
    assert set(tokens(way, wide, 50, temperature=0.5)) == {0}


@WAY
def test_a_choice_does_not_depend_on_its_company(way: str) -> None:
    logits = torch.randn(64, 203, generator=torch.Generator().manual_seed(0))
    logits[9, 3] = math.nan
    draws = [draw(p, seed=p * p, **FILTERS[p % 6], logprobs=p % 4, temperature=(p % 3) * 0.7) for p in range(64)]
    made = make(way, 201)
    together = made.choose(logits, draws)
    assert together == [made.choose(logits[i : i + 1], [draws[i]])[0] for i in range(64)]
    assert together[::-1] == made.choose(logits.flip(0), draws[::-1])
    spread = torch.zeros(64, 203, 2)
    spread[..., 1] = logits
    assert together == made.choose(spread[..., 1], draws)
    drafts = made.guess(logits, draws)
    assert drafts == [max(c.token_id, 0) for c in together]


@pytest.mark.parametrize("way", instruction_sets())
def test_threads_do_not_meet_in_each_others_rows(way: str) -> None:
    logits = torch.randn(12, 20000, generator=torch.Generator().manual_seed(8))
    draws = [draw(p, top_p=0.7, logprobs=1) for p in range(12)]
    made, before = make(way, 20000), torch.get_num_threads()
    alone = [made.choose(logits[i : i + 1], [draws[i]])[0] for i in range(12)]
    try:
        torch.set_num_threads(2)
        for _ in range(8):  # a helper wakes up after the first
            assert made.choose(logits, draws) == alone
    finally:
        torch.set_num_threads(before)


@WAY
def test_logprobs_name_the_chosen_token_and_the_likeliest(way: str) -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.2, 0.5]))
    made = make(way, 4)
    choice = made.choose(logits[None], [draw(temperature=0.0, logprobs=2)])[0]
    assert list(choice.logprobs) == [3, 1]
    assert [x.rank for x in choice.logprobs.values()] == [1, 2]
    assert math.isclose(choice.logprobs[1].logprob, math.log(0.2), rel_tol=1e-5)
    draws = [draw(p, logprobs=1, temperature=0.8) for p in range(60)]  # the temperature leaves log-probabilities alone
    unlikely = [c.logprobs for c in made.choose(logits.expand(60, 4), draws) if c.token_id == 0]
    assert unlikely and all(list(x) == [0, 3] and x[0].rank == 4 for x in unlikely)
    assert all(math.isclose(x[0].logprob, math.log(0.1), rel_tol=1e-5) for x in unlikely)
    only = made.choose(logits[None], [draw(logprobs=0)])[0]
    assert list(only.logprobs) == [only.token_id]
    assert made.choose(logits[None], [Draw(SamplingParams(logprobs=2), 0, 0, 0, False)])[0].logprobs == {}


@pytest.mark.parametrize("way", WAYS[:-2])
def test_kernels_and_torch_choose_the_same_tokens(way: str) -> None:
    """Only where two scores, or a filter's border, are a rounding apart may they differ; these rows have no such."""
    logits = torch.randn(100, 1000, generator=torch.Generator().manual_seed(6)) * 3
    draws = [draw(p, **FILTERS[p % 7]) for p in range(100)]
    assert make(way, 1000).guess(logits, draws) == make(WAYS[-1], 1000).guess(logits, draws)
