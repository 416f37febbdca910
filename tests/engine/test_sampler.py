from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch

from hadal.engine import sampler
from hadal.engine.request import Request, SamplingParams
from hadal.engine.sampler import sample, uniform


def request(position: int = 0, stream: int = 0, **params: Any) -> Request:
    made = Request(0, (1,), SamplingParams(**params), 100, stream)
    made.output_ids = [0] * position
    return made


def test_greedy_takes_the_lowest_index_on_ties() -> None:
    logits = torch.full((2, 300), -1.0)
    logits[0, [17, 40, 299]] = 2.0
    assert [c.token_id for c in sample(logits, [request(temperature=0.0)] * 2)] == [17, 0]


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = [math.exp(x / 0.7) for x in logits.tolist()]
    drawn = Counter(sample(logits[None], [request(p, temperature=0.7, seed=5)])[0].token_id for p in range(4000))
    for token, weight in enumerate(expected):
        p = weight / sum(expected)
        assert abs(drawn[token] - 4000 * p) < 5 * math.sqrt(4000 * p * (1 - p)) + 1


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3]))
    drawn = {sample(logits[None], [request(p, top_p=0.65, seed=1)])[0].token_id for p in range(300)}
    assert drawn == {1, 3}
    drawn = {sample(logits[None], [request(p, top_p=1e-9, seed=1)])[0].token_id for p in range(50)}
    assert drawn == {1}


def test_top_k_prefers_the_lower_index_among_equals() -> None:
    logits = torch.tensor([0.0, 1.0, 1.0, 1.0])
    drawn = {sample(logits[None], [request(p, top_k=2, seed=2)])[0].token_id for p in range(100)}
    assert drawn == {1, 2}


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([-1e9, 0.0, -1e9, 0.0, -1e9])
    assert {sample(logits[None], [request(p, seed=3)])[0].token_id for p in range(200)} == {1, 3}


def test_a_sampled_token_does_not_depend_on_its_company() -> None:
    logits = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    requests = [request(p, seed=p, logprobs=3, top_p=0.9) for p in range(5)]
    together = sample(logits, requests)
    assert together == [sample(logits[i : i + 1], [requests[i]])[0] for i in range(5)]
    assert together[::-1] == sample(logits.flip(0), requests[::-1])


def test_seed_stream_and_position_each_change_the_number() -> None:
    numbers = {uniform(s, t, p) for s in range(10) for t in range(10) for p in range(10)}
    assert len(numbers) == 1000
    assert all(0 < x < 1 for x in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.05
    assert uniform(-1, 0, 0) == uniform(2**64 - 1, 0, 0)


@pytest.mark.parametrize("hashed", [0, 2**64 - 1])
def test_no_hash_reaches_zero_or_one(monkeypatch: pytest.MonkeyPatch, hashed: int) -> None:
    monkeypatch.setattr(sampler, "_mix", lambda x: hashed)
    assert 0 < uniform(0, 0, 0) < 1


def test_a_row_that_is_not_finite_fails_alone() -> None:
    logits = torch.zeros(3, 8)
    logits[0, 2], logits[2, 1] = float("nan"), float("inf")
    logits[1, 4] = 1.0
    choices = sample(logits, [request(temperature=0.0)] * 3)
    assert choices[1].token_id == 4 and choices[1].error is None
    assert all("not finite" in (choices[i].error or "") for i in (0, 2))


def test_logprobs_name_the_chosen_token_and_the_likeliest() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.2, 0.5])
    choice = sample(torch.log(probabilities)[None], [request(temperature=0.0, logprobs=2)])[0]
    assert list(choice.logprobs) == [3, 1]
    assert [x.rank for x in choice.logprobs.values()] == [1, 2]
    assert math.isclose(choice.logprobs[1].logprob, math.log(0.2), rel_tol=1e-5)
    unlikely = [
        c.logprobs
        for p in range(60)
        if (c := sample(torch.log(probabilities)[None], [request(p, logprobs=1, seed=1)])[0]).token_id == 0
    ]
    assert unlikely and all(list(x) == [0, 3] and x[0].rank == 4 for x in unlikely)
