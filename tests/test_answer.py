"""What a Generation keeps of an answer: its tokens for a later prompt, and how well its calls were formed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.engine import Logprob, SamplingParams
from hadal.llm import LLM, Generation
from hadal.text.tokens import DSML
from tests.fakes import scripted_llm
from tests.test_llm import CALL, SCRIPT, ask


@pytest.fixture(scope="module")
def llm() -> LLM:
    return scripted_llm(SCRIPT)


def answer(llm: LLM, question: str, **params: Any) -> Generation:
    (generation,) = llm.prepare_chat(ask(question), SamplingParams(**{"max_tokens": 300, "temperature": 0.0} | params))
    llm.submit(generation)
    while llm.busy:
        assert generation.sampled is None, "nothing is told before the end"
        llm.step()
    return generation


@pytest.mark.parametrize("params", [{}, {"max_tokens": 20}, {"max_tokens": 3}, {"max_tokens": 24}])
def test_an_answer_is_kept_as_sampled_whether_it_ended_or_was_cut(llm: LLM, params: dict[str, Any]) -> None:
    generation = answer(llm, "greet", **params)
    made, sampled = generation.output(), generation.sampled
    assert sampled is not None and (sampled.reasoning, sampled.answer) == (made.reasoning, made.text)
    ids = [*sampled.reasoning_ids, *llm.tokenizer.encode("</think>"), *sampled.answer_ids]
    ended = made.token_ids[-1] == llm.tokenizer.eos_id
    assert ids[: len(made.token_ids)] == made.token_ids[: -1 if ended else None]
    assert ended == (made.finish_reason == "stop")


def test_a_token_that_stopped_the_answer_is_no_part_of_it(llm: LLM) -> None:
    (stop,) = llm.tokenizer.encode("ü")[:1]
    generation = answer(llm, "greet", stop_token_ids=[stop])
    assert generation.sampled is not None and generation.sampled.answer == generation.output().text == "Gr"


def test_an_answer_cut_at_a_stop_string_is_not_kept(llm: LLM) -> None:
    assert answer(llm, "greet", stop=["世"]).sampled is None


def test_calls_are_kept_as_they_were_spelled(llm: LLM) -> None:
    sampled = answer(llm, "call").sampled
    assert sampled is not None and sampled.answer == "Let me see." + CALL


@pytest.mark.parametrize(
    ("written", "malformed"),
    [
        (f"hm</think>so{CALL}", 0),
        (f"hm</think>so\n\n<{DSML}tool_calls>\noops", 1),
        (f"hm</think>so</{DSML}invoke>", 0),
        (f"I must look{CALL}", 0),
    ],
)
def test_damage_to_calls_is_counted(written: str, malformed: int) -> None:
    generation = answer(scripted_llm({"question": written}), "question")
    assert generation.malformed == malformed
    made = generation.output()
    assert bool(made.tool_calls) == (CALL in written)
    assert made.finish_reason == ("tool_calls" if made.tool_calls else "stop")
    assert "".join((made.reasoning or "", made.text)) == written.replace("</think>", "").replace(CALL, "")


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("sizes", [[1], [3], [500]])
def test_an_end_of_thinking_that_ends_none_is_not_shown(llm: LLM, thinking: bool, sizes: list[int]) -> None:
    spelled = llm.tokenizer.encode("</think>", control=False)
    for block in ("", CALL):
        (generation,) = llm.prepare_chat(ask("greet"), SamplingParams(max_tokens=500), thinking=thinking)
        ids = llm.tokenizer.encode("hm</think>" if thinking else "") + llm.tokenizer.encode("</think>one </think>")
        ids += [*spelled, *llm.tokenizer.encode(f" two</think>{block}</think>"), llm.tokenizer.eos_id]
        request, shown = generation.request, 0
        while generation.finish_reason is None:
            for token in ids[len(request.output_ids) :][: sizes[shown % len(sizes)]]:
                request.append(token, {}, llm.tokenizer.eos_id)
            generation.advance()
            shown += 1
        made = generation.output()
        assert made.text == "one </think> two" and made.reasoning == ("hm" if thinking else None)
        assert len(made.tool_calls) == bool(block) and generation.malformed == 0 and made.token_ids == ids
        assert generation.reasoning_tokens == len(llm.tokenizer.encode("hm</think>")) * thinking
        assert generation.sampled is None


def test_the_end_of_thinking_written_out_is_text(llm: LLM) -> None:
    (generation,) = llm.prepare_chat(ask("greet"), SamplingParams(max_tokens=500), thinking=False)
    ids = llm.tokenizer.encode("split at </think>", control=False)
    for token in (*ids, llm.tokenizer.eos_id):
        generation.request.append(token, {}, llm.tokenizer.eos_id)
    generation.advance()
    sampled = generation.sampled
    assert generation.output().text == "split at </think>" and sampled is not None
    assert (sampled.answer, list(sampled.answer_ids)) == ("split at </think>", ids)


@pytest.mark.parametrize("stop", [[], ["two"]])
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=30))
def test_what_an_answer_counts_does_not_depend_on_how_many_tokens_come_at_once(
    llm: LLM, stop: list[str], sizes: list[int]
) -> None:
    written = [*llm.tokenizer.encode("I think so</think>one. two. three."), llm.tokenizer.eos_id]

    def tell(sizes: list[int]) -> tuple[Any, ...]:
        params = SamplingParams(max_tokens=300, stop=stop, logprobs=0)
        (generation,) = llm.prepare_chat(ask("greet"), params)
        request, reasons, shown = generation.request, 0, 0
        while generation.finish_reason is None:
            for _ in range(sizes[shown % len(sizes)]):
                if not request.finished:
                    token = written[len(request.output_ids)]
                    request.append(token, {token: Logprob(-1.0, 1)}, llm.tokenizer.eos_id)
            delta = generation.advance()
            shown, reasons = shown + 1, reasons + delta.reasons
            assert len(delta.logprobs) == len(delta.token_ids)
        made = generation.output()
        assert reasons == generation.reasoning_tokens and generation.tokens == len(made.token_ids) == len(made.logprobs)
        return made.text, made.reasoning, made.token_ids, reasons, made.finish_reason

    alone = tell([1])
    assert alone[3] == len(llm.tokenizer.encode("I think so</think>"))
    assert tell(sizes) == alone
