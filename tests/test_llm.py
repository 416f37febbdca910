from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hadal.engine import RequestError, SamplingParams
from hadal.llm import LLM, RequestOutput
from hadal.text import ChatError, TokenizerError
from hadal.text.tokens import BOS, DSML, USER
from tests.fakes import scripted_llm, small_tokenizer, write_tiny_model

GREEDY = SamplingParams(max_tokens=300, temperature=0.0)
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">Zürich'
    f'</{DSML}parameter>\n<{DSML}parameter name="days" string="false">[1, 2]</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
SCRIPT: dict[str, str | None] = {
    "greet": "because they met</think>Grüße, 世界 👋!",
    "plain": "one. two. three.",
    "call": "I must look</think>Let me see." + CALL,
    "broken": None,
}


@pytest.fixture
def llm() -> LLM:
    return scripted_llm(SCRIPT)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def answer(output: RequestOutput) -> Any:
    assert len(output.outputs) == 1
    return output.outputs[0]


def test_generate_takes_text_ids_and_lists_of_both(llm: LLM) -> None:
    ids = llm.tokenizer.encode(BOS + "plain ")
    both: list[Any] = ["plain ", ids]
    single, by_ids, (first, second) = (
        llm.generate("plain ", GREEDY),
        llm.generate(ids, GREEDY),
        llm.generate(both, GREEDY),
    )
    for output in (*single, *by_ids, first, second):
        assert answer(output).text == "one. two. three." and answer(output).finish_reason == "stop"
        assert output.prompt_token_ids == ids
        assert answer(output).token_ids[-1] == llm.tokenizer.eos_id
        assert answer(output).reasoning is None and answer(output).logprobs is None
    assert (first.prompt, second.prompt) == ("plain ", None)


def test_a_ragged_batch_answers_each_prompt_as_if_alone(llm: LLM) -> None:
    prompts = ["plain", "nothing known", "the long " * 40 + "plain"]
    params = [SamplingParams(max_tokens=n, seed=n, temperature=3.0) for n in (9, 30, 17)]
    together = llm.generate(prompts, params)
    alone = [llm.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [answer(o).token_ids for o in together] == [answer(o).token_ids for o in alone]


def test_chat_separates_reasoning_from_content(llm: LLM) -> None:
    made = answer(llm.chat(ask("greet"), GREEDY)[0])
    assert (made.reasoning, made.text, made.finish_reason) == ("because they met", "Grüße, 世界 👋!", "stop")


def test_chat_without_thinking_has_no_reasoning(llm: LLM) -> None:
    made = answer(llm.chat(ask("plain"), GREEDY, thinking=False)[0])
    assert (made.reasoning, made.text) == (None, "one. two. three.")


def test_reasoning_tokens_are_those_of_the_reasoning_text() -> None:
    llm = scripted_llm({"open": "<think>hm</think>ok"})
    (generation,) = llm.prepare_chat(ask("open"), GREEDY, thinking=False)
    llm.submit(generation)
    while llm.busy:
        llm.step()
    made = generation.output()
    assert (made.reasoning, made.text, generation.reasoning_tokens) == ("hm", "ok", len(["h", "m", "</think>"]))


def test_chat_answers_several_conversations(llm: LLM) -> None:
    texts = [answer(o).text for o in llm.chat([ask("greet"), ask("plain")], GREEDY, thinking=False)]
    assert texts[1] == "one. two. three."


def test_tool_calls_come_out_as_json_and_end_the_turn(llm: LLM) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    made = answer(llm.chat(ask("call"), GREEDY, tools=tools)[0])
    assert (made.text, made.reasoning, made.finish_reason) == ("Let me see.", "I must look", "tool_calls")
    assert [call.name for call in made.tool_calls] == ["weather"]
    assert json.loads(made.tool_calls[0].arguments) == {"city": "Zürich", "days": [1, 2]}
    reply = {"role": "assistant", "content": made.text, "tool_calls": [made.tool_calls[0].to_dict()]}
    result = {"role": "tool", "tool_call_id": made.tool_calls[0].id, "content": "greet"}
    assert answer(llm.chat([*ask("call"), reply, result], GREEDY, tools=tools)[0]).text == "Grüße, 世界 👋!"


@pytest.mark.parametrize(
    ("stop", "text"),
    [("two", "one. "), ([". th", "three"], "one. two"), ("absent", "one. two. three."), ("three.", "one. two. ")],
)
def test_stop_strings_end_the_text_in_front_of_them(llm: LLM, stop: Any, text: str) -> None:
    made = answer(llm.generate("plain ", SamplingParams(max_tokens=300, temperature=0.0, stop=stop))[0])
    assert (made.text, made.finish_reason) == (text, "stop")
    assert not llm.busy


def test_stop_strings_do_not_look_into_the_reasoning(llm: LLM) -> None:
    made = answer(llm.chat(ask("greet"), SamplingParams(max_tokens=300, temperature=0.0, stop=["they", "界"]))[0])
    assert (made.reasoning, made.text) == ("because they met", "Grüße, 世")


def test_a_stop_string_that_never_completes_is_shown_at_the_limit(llm: LLM) -> None:
    made = answer(llm.generate("unknown ", SamplingParams(max_tokens=5, temperature=0.0, stop="aaaaaaaa"))[0])
    assert (made.text, made.finish_reason) == ("aaaaa", "length")


def test_seeds_repeat_an_answer_and_samples_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=20, temperature=20.0, seed=7)
    first, second = llm.generate("unknown", params)[0], llm.generate(["plain", "unknown"], params)[1]
    assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
    assert len({tuple(o.token_ids) for o in first.outputs}) == 3
    assert [o.index for o in first.outputs] == [0, 1, 2]


def test_logprobs_name_each_token(llm: LLM) -> None:
    made = answer(llm.generate("plain ", SamplingParams(max_tokens=4, temperature=0.0, logprobs=2))[0])
    assert len(made.logprobs) == len(made.token_ids) == 4
    for token, entry in zip(made.token_ids, made.logprobs, strict=True):
        chosen = entry[token]
        assert next(iter(entry)) == token and len(entry) == 2
        assert chosen.rank == 1 and math.isclose(chosen.logprob, 0.0, abs_tol=1e-5)
        assert chosen.decoded_token == llm.tokenizer.decode([token])


def test_deltas_join_to_the_whole_answer(llm: LLM) -> None:
    deltas = list(llm.stream_chat(ask("call"), GREEDY))
    whole = answer(llm.chat(ask("call"), GREEDY)[0])
    assert "".join(d.text for d in deltas) == whole.text
    assert "".join(d.reasoning for d in deltas) == whole.reasoning
    assert [c.arguments for d in deltas for c in d.tool_calls] == [c.arguments for c in whole.tool_calls]
    assert [i for d in deltas for i in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert not any("\ufffd" in d.text for d in llm.stream_chat(ask("greet"), GREEDY))


def test_closing_a_stream_ends_its_request(llm: LLM) -> None:
    stream = llm.stream("unknown", SamplingParams(max_tokens=1000))
    next(stream)
    assert llm.busy
    stream.close()  # type: ignore[attr-defined]
    assert not llm.busy


def test_streams_and_whole_answers_side_by_side_lose_nothing(llm: LLM) -> None:
    first, second = llm.stream_chat(ask("greet"), GREEDY), llm.stream("plain ", GREEDY)
    parts = [next(first), next(first)]
    others = [next(second)]
    whole = answer(llm.generate("plain ", GREEDY)[0])
    parts.append(next(first))
    others += second
    parts += first
    assert "".join(d.reasoning for d in parts) == "because they met"
    assert "".join(d.text for d in parts) == "Grüße, 世界 👋!"
    assert "".join(d.text for d in others) == whole.text == "one. two. three."
    assert [parts[-1].finish_reason, others[-1].finish_reason] == ["stop", "stop"] and not llm.busy


def test_a_failed_request_says_so_and_leaves_its_neighbours(llm: LLM) -> None:
    bad, good = llm.generate(["broken", "plain "], GREEDY)
    assert answer(bad).finish_reason == "error" and "not finite" in answer(bad).error
    assert answer(good).text == "one. two. three."


def test_a_crash_leaves_no_request_behind(llm: LLM) -> None:
    with pytest.raises(RuntimeError, match="script crashes"):
        llm.generate(["plain", "<crash>"], GREEDY)
    assert not llm.busy
    assert answer(llm.generate("plain ", GREEDY)[0]).text == "one. two. three."


def test_what_cannot_be_served_is_refused_before_anything_runs(llm: LLM) -> None:
    nothing: list[Any] = ["plain", []]
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(nothing, GREEDY)
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate("plain", [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="`n` is more than 1"):
        llm.stream("plain", SamplingParams(n=2))
    with pytest.raises(RequestError, match="nothing to answer"):
        llm.chat([*ask("plain"), {"role": "assistant", "content": "done"}], GREEDY)
    with pytest.raises(ChatError, match="unknown effort"):
        llm.chat(ask("plain"), GREEDY, reasoning_effort="furious")
    with pytest.raises(ChatError, match="messages is empty"):
        llm.chat([], GREEDY)
    assert not llm.busy


def test_unknown_mode_and_device_are_refused() -> None:
    with pytest.raises(RequestError, match="unknown mode 'exact'"):
        LLM("nano", mode="exact")
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        LLM("nano", device="abacus")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("llm") / "tiny")


def test_a_real_model_answers_a_ragged_batch_as_each_prompt_alone(tiny: str) -> None:
    llm = LLM(tiny, device="cpu", token_budget=24)
    assert llm.name == "tiny"
    prompts = ["the cat", "x", "the dog sat on the mat and then ran away " * 3]
    params = [
        SamplingParams(max_tokens=n, seed=n, ignore_eos=True, temperature=t)
        for n, t in ((30, 0.0), (9, 0.9), (20, 0.0))
    ]
    together = llm.generate(prompts, params)
    alone = [llm.generate(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert [answer(o).token_ids for o in together] == [answer(o).token_ids for o in alone]
    assert [len(answer(o).token_ids) for o in together] == [30, 9, 20]
    assert together[0].prompt_token_ids[0] == llm.tokenizer.bos_id


def test_the_faithful_mode_rounds_where_the_fast_one_does_not(tiny: str) -> None:
    params = SamplingParams(max_tokens=3, temperature=0.0, logprobs=0, ignore_eos=True)
    fast, first, second = (answer(LLM(tiny, mode=m, device="cpu").generate("the cat", params)[0])
                           for m in ("fast", "faithful", "faithful"))  # fmt: skip
    assert first == second
    one, other = fast.logprobs[0][fast.token_ids[0]].logprob, first.logprobs[0][first.token_ids[0]].logprob
    assert one != other and abs(one - other) < 0.2


def test_a_real_model_streams_a_chat_as_it_answers_it_whole(tiny: str) -> None:
    llm = LLM(tiny, device="cpu")
    params = SamplingParams(max_tokens=24, temperature=0.0)
    whole = answer(llm.chat(ask("the cat"), params)[0])
    deltas = list(llm.stream_chat(ask("the cat"), params))
    assert "".join(d.reasoning for d in deltas) == whole.reasoning
    assert [i for d in deltas for i in d.token_ids] == whole.token_ids


def test_ids_without_a_token_are_never_chosen(tiny: str) -> None:
    llm = LLM(tiny, device="cpu")
    hot = SamplingParams(n=8, max_tokens=25, temperature=50.0, seed=1, ignore_eos=True)
    ids = [i for o in llm.generate("x", hot)[0].outputs for i in o.token_ids]
    assert max(ids) < llm.tokenizer.vocab_size == llm.engine.vocabulary
    with pytest.raises(RequestError, match="outside the vocabulary"):
        llm.generate([[llm.tokenizer.vocab_size]])


def test_a_tokenizer_of_another_model_is_refused(tiny: str, tmp_path: Path) -> None:
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    with pytest.raises(TokenizerError, match="ends answers with id 1 and the model with 5"):
        LLM(str(tmp_path), device="cpu")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        LLM(str(tmp_path), device="cpu")
    assert small_tokenizer().eos_id == 1


def test_a_model_with_the_vendors_vocabulary_needs_the_vendors_sentences(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hadal.llm import llm as module

    llm = LLM(tiny, device="cpu")
    monkeypatch.setattr(module, "_OFFICIAL_USER_ID", llm.tokenizer.token_id(USER))
    assert answer(llm.generate("x", SamplingParams(max_tokens=2))[0]).token_ids
    with pytest.raises(ValueError, match=r"encoding_dsv4\.py does not exist"):
        llm.chat(ask("x"))


def test_the_models_own_sampling_counts_where_none_is_given(tiny: str, tmp_path: Path) -> None:
    for file in Path(tiny).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    own = tmp_path / "generation_config.json"
    own.write_text('{"temperature": 0.3, "top_p": 0.9, "do_sample": true}')
    params = LLM(tmp_path, device="cpu").default_params(top_p=0.5, temperature=None, max_tokens=3)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.3, 0.5, 3)
    own.write_text('{"temperature": 0.3, "do_sample": false}')
    assert LLM(tmp_path, device="cpu").default_params().temperature == 0.0
    own.write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config\.json is no JSON object"):
        LLM(tmp_path, device="cpu")


def test_a_conversation_keeps_its_prefix_between_turns() -> None:
    llm = scripted_llm({"greet": "fine</think>yes"})
    turn = [{"role": "user", "content": "greet " + "the cat sat " * 20}]
    (first,) = llm.chat(turn)
    said = {"role": "assistant", "content": first.outputs[0].text, "reasoning_content": first.outputs[0].reasoning}
    (second,) = llm.chat([*turn, said, {"role": "user", "content": "and greet again"}])
    assert first.num_cached_tokens == 0
    assert len(first.prompt_token_ids) - 8 <= second.num_cached_tokens < len(second.prompt_token_ids)


def test_samples_of_one_prompt_are_told_apart_and_repeat() -> None:
    llm = scripted_llm({})
    params = SamplingParams(n=3, max_tokens=6, seed=5)
    (once,), (again,) = (llm.generate("<dice> " + "the dog ran " * 20, params) for _ in range(2))
    ids = [out.token_ids for out in once.outputs]
    assert len({tuple(i) for i in ids}) == 3
    assert ids == [out.token_ids for out in again.outputs]


def test_prompts_that_find_the_queue_full_leave_nothing_behind() -> None:
    llm = scripted_llm({}, max_concurrent=1, max_waiting=1)
    with pytest.raises(RequestError, match="wait already"):
        llm.generate(["a b", "c d", "e f"], SamplingParams(max_tokens=2))
    assert not llm.busy
    assert len(llm.generate(["a b", "c d"], SamplingParams(max_tokens=2))) == 2


def test_outputs_have_the_log_probabilities_of_their_prompt(llm: LLM) -> None:
    params = SamplingParams(n=2, max_tokens=1, prompt_logprobs=2)
    (output,) = llm.generate("plain ", params)
    entries, tokens = output.prompt_logprobs, output.prompt_token_ids
    assert entries is not None and entries[0] is None and len(entries) == len(tokens)
    for token, entry in zip(tokens[1:], entries[1:], strict=True):
        assert entry is not None and next(iter(entry)) == token and 2 <= len(entry) <= 3
        assert entry[token].decoded_token == llm.tokenizer.decode([token])
    assert llm.generate("plain ", GREEDY)[0].prompt_logprobs is None


def test_requests_know_whose_they_are_and_how_urgent(llm: LLM) -> None:
    made = llm.prepare_prompt("plain", SamplingParams(n=2), tenant="a", priority=3)
    made += llm.prepare_chat(ask("plain"), GREEDY, tenant="a", priority=3)
    assert [(g.request.tenant, g.request.priority) for g in made] == [("a", 3)] * 3
