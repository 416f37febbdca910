from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.checkpoint import load_model
from hadal.engine import Engine, Logprob, Request, SamplingParams
from tests.engine.fake_model import FakeModel
from tests.engine.test_engine import run


def ask(engine: Engine, prompt: list[int], top: int | None, leader: Request | None = None) -> Request:
    params = SamplingParams(max_tokens=3, temperature=0.0, prompt_logprobs=top)
    request = engine.prepare(prompt, params, leader=leader)
    engine.submit(request)
    return request


def check(entry: dict[int, Logprob] | None, row: Tensor, token: int, top: int, tolerance: float) -> None:
    scores = row.double().log_softmax(0)
    order = scores.argsort(descending=True, stable=True).tolist()
    assert entry is not None and list(entry) == list(dict.fromkeys([token, *order[:top]]))
    for i, found in entry.items():
        assert found.rank == order.index(i) + 1
        assert found.logprob == pytest.approx(float(scores[i]), abs=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32))
def test_every_prompt_token_gets_its_log_probability_however_steps_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    model = FakeModel(context=400)
    engine = Engine(model, token_budget=rng.choice([1, 7, 300]), **model.limit_pages(rng.choice([3, 5]), 3))
    engine._scored_rows = rng.choice([1, 5, 1000])
    common = [rng.randrange(2, 50) for _ in range(150)]
    requests = []
    for _ in range(4):
        prompt = common[: rng.randrange(1, 150)] + [rng.randrange(2, 50) for _ in range(rng.randrange(1, 60))]
        requests.append(ask(engine, prompt, rng.choice([None, 0, 1, 20])))
        for _ in range(rng.randrange(6)):
            engine.step()
    run(engine)
    for r in requests:
        prompt, top = list(r.prompt_ids), r.params.prompt_logprobs
        assert r.output_ids == model.greedy(prompt, 3), f"seed {seed}"
        if top is None:
            assert r.prompt_logprobs is None
            continue
        assert r.prompt_logprobs is not None and len(r.prompt_logprobs) == len(prompt)
        assert r.prompt_logprobs[0] is None and r.cached_tokens == 0
        for i in range(1, len(prompt)):
            check(r.prompt_logprobs[i], model.row(prompt[:i]), prompt[i], top, 1e-5)


def test_one_step_computes_no_more_rows_of_prompt_logits_than_memory_is_meant_for() -> None:
    model = FakeModel(context=400)
    asked: list[int] = []
    advance = model.advance
    model.advance = lambda *args: (asked.append(sum(args[3])), advance(*args))[1]  # type: ignore[method-assign]
    engine = Engine(model)
    engine._scored_rows = 10
    requests = [ask(engine, list(range(2, 40)), 0) for _ in range(3)]
    run(engine)
    assert max(asked) <= 10 + 3 and all(len(r.prompt_logprobs or ()) == 38 for r in requests)


def test_the_first_of_several_samples_has_the_log_probabilities_of_the_prompt() -> None:
    engine = Engine(FakeModel(context=400))
    first = ask(engine, [5, 6, 7], 1)
    second = ask(engine, [5, 6, 7], 1, leader=first)
    run(engine)
    assert len(first.prompt_logprobs or ()) == 3 and second.prompt_logprobs is None


def test_a_prompt_with_logits_that_are_not_finite_fails_alone() -> None:
    engine = Engine(FakeModel(context=400, nan_after=(9,)))
    broken, sound = ask(engine, [9, 10, 11, 12], 1), ask(engine, [8, 10, 11, 12], 1)
    run(engine)
    assert broken.finish_reason == "error" and broken.error == "the logits of the prompt are not finite"
    assert sound.finish_reason == "length" and engine.check() == []


def test_on_nano_they_are_the_log_softmax_of_the_models_logits() -> None:
    model = load_model("nano", device="cpu")
    rng = random.Random(3)
    prompt = [rng.randrange(2, 7000) for _ in range(300)]
    engine = Engine(model, token_budget=128)
    request = ask(engine, prompt, 5)
    run(engine)
    logits = model.logits(torch.tensor(prompt))
    assert request.prompt_logprobs is not None
    for i in range(1, len(prompt)):
        check(request.prompt_logprobs[i], logits[i - 1, :7168], prompt[i], 5, 1e-4)
    engine.close()
