from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import Engine, EngineBusy, Request, RequestError, SamplingParams
from tests.engine.fake_model import FakeModel

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


def add(engine: Engine, prompt: list[int], params: SamplingParams) -> Request:
    request = engine.prepare(prompt, params)
    engine.submit(request)
    return request


def run(engine: Engine) -> None:
    for _ in range(10_000):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine did not come to an end")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), concurrent=st.integers(1, 5), budget=st.integers(1, 25))
def test_any_mix_of_requests_gives_each_its_own_answer(seed: int, concurrent: int, budget: int) -> None:
    rng = random.Random(seed)
    model = FakeModel()
    engine = Engine(model, max_concurrent=concurrent, token_budget=budget)
    requests: list[Request] = []
    for _ in range(8):
        prompt = [rng.randrange(2, 50) for _ in range(rng.randrange(1, 30))]
        requests.append(add(engine, prompt, SamplingParams(max_tokens=rng.randrange(1, 12), temperature=0.0)))
        for _ in range(rng.randrange(4)):
            engine.step()
    run(engine)
    for r in requests:
        assert r.output_ids == model.greedy(list(r.prompt_ids), r.limit), f"seed {seed}"
        assert r.finish_reason == ("stop" if r.output_ids[-1] == 1 else "length")
        assert r.state is None
    assert all(sum(lengths) <= max(concurrent, budget) and len(lengths) <= concurrent for lengths in model.steps)


def test_sampled_answers_do_not_depend_on_the_batch() -> None:
    params = [SamplingParams(max_tokens=10, seed=i, top_p=0.95, logprobs=2) for i in range(4)]
    together, alone = Engine(FakeModel(), token_budget=16), []
    batch = [add(together, [5, 6, 7 + i], p) for i, p in enumerate(params)]
    run(together)
    for i, p in enumerate(params):
        engine = Engine(FakeModel())
        alone.append(add(engine, [5, 6, 7 + i], p))
        run(engine)
    assert [r.output_ids for r in batch] == [r.output_ids for r in alone]
    assert [r.logprobs for r in batch] == [r.logprobs for r in alone]


def test_requests_without_a_seed_differ() -> None:
    engine = Engine(FakeModel(vocab_size=5000))
    first, second = (add(engine, [2, 3], SamplingParams(max_tokens=10)) for _ in range(2))
    run(engine)
    assert first.output_ids != second.output_ids


def test_decodes_go_before_prompt_chunks() -> None:
    model = FakeModel()
    engine = Engine(model, max_concurrent=4, token_budget=4)
    add(engine, [2, 3], GREEDY)
    engine.step()
    add(engine, list(range(2, 12)), GREEDY)
    engine.step()
    assert model.steps == [[2], [1, 3]]


def test_a_nan_fails_its_own_request_and_no_other() -> None:
    model = FakeModel(nan_after=(7, 7))
    engine = Engine(model)
    bad, good = add(engine, [7, 7], GREEDY), add(engine, [7, 8], GREEDY)
    run(engine)
    assert bad.finish_reason == "error" and "not finite" in (bad.error or "")
    assert good.output_ids == model.greedy([7, 8], 8)


def test_abort_frees_a_running_and_a_waiting_request() -> None:
    engine = Engine(FakeModel(), max_concurrent=1)
    running, waiting = add(engine, [2], GREEDY), add(engine, [3], GREEDY)
    engine.step()
    engine.abort(waiting)
    engine.abort(running)
    engine.abort(running)
    assert not engine.busy and running.state is None
    assert [running.finish_reason, waiting.finish_reason] == ["abort", "abort"]


def test_stop_token_ids_and_ignore_eos() -> None:
    model = FakeModel(vocab_size=4)  # so small that end-of-sequence (1) comes soon
    prompt = next([i] for i in (2, 3) if 1 in model.greedy([i], 20))
    answer = model.greedy(prompt, 20)
    engine = Engine(model)
    ends = add(engine, prompt, SamplingParams(max_tokens=20, temperature=0.0))
    ignores = add(engine, prompt, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    stops = add(engine, prompt, SamplingParams(max_tokens=20, temperature=0.0, stop_token_ids=[answer[0]]))
    run(engine)
    assert ends.output_ids == answer and ends.finish_reason == "stop"
    assert len(ignores.output_ids) == 20 and ignores.finish_reason == "length"
    assert stops.output_ids == answer[:1] and stops.finish_reason == "stop"


def test_generation_ends_at_the_end_of_the_context() -> None:
    engine = Engine(FakeModel(), max_context=10)
    request = add(engine, [2] * 7, SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True))
    run(engine)
    assert len(request.output_ids) == 3 and request.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([50], "outside the vocabulary"), ([-1, 3], "outside the vocabulary"), ([2] * 64, "64 tokens")],
)
def test_impossible_prompts_are_refused(prompt: list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        add(Engine(FakeModel()), prompt, GREEDY)


def test_impossible_limits_are_refused() -> None:
    with pytest.raises(RequestError, match="max_concurrent"):
        Engine(FakeModel(), max_concurrent=0)
    with pytest.raises(RequestError, match="max_context"):
        Engine(FakeModel(), max_context=65)


def test_a_full_queue_refuses_and_keeps_what_waits() -> None:
    engine = Engine(FakeModel(), max_concurrent=1, max_waiting=2)
    made = [add(engine, [2, i], GREEDY) for i in (3, 4, 5)]
    with pytest.raises(EngineBusy, match="2 requests wait"):
        add(engine, [2, 6], GREEDY)
    while not any(r.finished for r in made):
        engine.step()
    made.append(add(engine, [2, 6], GREEDY))
    run(engine)
    assert all(r.finish_reason in ("stop", "length") for r in made)


def test_samples_of_one_prompt_compute_it_once() -> None:
    model = FakeModel(context=400)
    engine = Engine(model, token_budget=64)
    prompt, params = [5 + i % 40 for i in range(200)], SamplingParams(max_tokens=5, seed=3)
    first = engine.prepare(prompt, params)
    group = [first, *(engine.prepare(prompt, params, stream=i, leader=first) for i in (1, 2, 3))]
    for request in group:
        engine.submit(request)
    run(engine)
    assert [r.cached_tokens for r in group] == [0, 199, 199, 199]
    assert engine.stats.rows < 200 + 4 * 8 and len({tuple(r.output_ids) for r in group}) > 1


def test_a_higher_priority_takes_the_place_of_a_lower() -> None:
    engine = Engine(FakeModel(context=400), max_concurrent=1)
    low = engine.prepare([5] * 50, SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    engine.submit(low)
    for _ in range(10):
        engine.step()
    high = engine.prepare([6] * 50, GREEDY, priority=1)
    engine.submit(high)
    run(engine)
    assert engine.stats.preemptions == 1 and low.finish_reason == "length"
    alone = engine.prepare([5] * 50, low.params)
    engine.submit(alone)
    run(engine)
    assert alone.output_ids == low.output_ids


class Failing(FakeModel):
    """Fails on demand, in the middle of a forward."""

    failure: type[BaseException] | None = None

    def advance(self, *args: Any) -> Any:
        logits = super().advance(*args)
        if self.failure is not None:
            kind, self.failure = self.failure, None
            raise kind
        return logits


def test_a_step_that_fails_leaves_no_state_that_could_be_found_again() -> None:
    model = Failing(context=400)
    engine = Engine(model, token_budget=64)
    prompt = [5 + i % 40 for i in range(200)]
    request = add(engine, prompt, GREEDY)
    engine.step()
    model.failure = RuntimeError
    with pytest.raises(RuntimeError):
        engine.step()
    assert request.finish_reason == "error" and "RuntimeError" in (request.error or "")
    assert not engine.busy and engine.check() == []
    again = add(engine, prompt, GREEDY)
    run(engine)
    assert again.cached_tokens == 0 and again.output_ids == model.greedy(prompt, 8)


def test_an_interrupted_step_begins_anew() -> None:
    model = Failing(context=400)
    engine = Engine(model, token_budget=64)
    requests = [add(engine, [5 + i] * 100, GREEDY) for i in range(3)]
    for _ in range(7):
        engine.step()
        model.failure = KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        assert engine.check() == []
    run(engine)
    for r in requests:
        assert r.output_ids == model.greedy(list(r.prompt_ids), 8)


def test_a_hit_far_behind_a_context_keeps_the_step_as_short_as_the_model_can() -> None:
    model = FakeModel(context=4000)
    model.step_rows = lambda longest: max(1, 20_000 // longest)  # type: ignore[method-assign]
    engine = Engine(model, token_budget=512)
    prompt = [5 + i % 40 for i in range(1500)]
    add(engine, prompt, GREEDY)
    run(engine)
    model.steps.clear()
    add(engine, prompt + [7] * 300, GREEDY)
    run(engine)
    assert max(map(sum, model.steps)) <= 20_000 // 1500
