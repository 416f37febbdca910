from __future__ import annotations

import json
import re
import time
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import RequestError, SamplingParams, StructuredOutput
from hadal.llm import LLM, CompletionOutput
from hadal.llm.grammar import Grammars
from hadal.text.tokens import CONTROL_TOKENS, DSML, THINK_CLOSE
from tests.fakes import scripted_llm, small_tokenizer
from tests.llm.dice import DiceModel, schemas

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CALL = (
    f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="weather">\n<{DSML}parameter name="city" string="true">Ulm'
    f'</{DSML}parameter>\n<{DSML}parameter name="days" string="false">3</{DSML}parameter>\n'
    f"</{DSML}invoke>\n</{DSML}tool_calls>"
)
SCRIPT: dict[str, str | None] = {
    "PONDER": 'perhaps {"a": 1}</think>no JSON at all',
    "MUTE": "",
    "CALL": "I must look</think>Let me see." + CALL,
    "EARLY": "now" + CALL,
    "WRONG": "</think>Well." + CALL.replace("Ulm", "Ulm</b> <p>").replace('"false">3', '"false">"soon"'),
    "QUIET": "hm</think>No call.",
    "EMPTY": "</think>" + re.sub(rf"\n<{DSML}parameter.*/{DSML}parameter>", "", CALL),
    "TWICE": re.sub(rf"(<{DSML}invoke.*/{DSML}invoke>\n)", r"\1\1", CALL, flags=re.DOTALL),
}


def function(name: str, parameters: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


TOOLS = [function("weather", WEATHER), function("now")]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return scripted_llm(SCRIPT)


@pytest.fixture(scope="module")
def dice() -> LLM:
    return scripted_llm({}, model=DiceModel)


@pytest.fixture(scope="module")
def plain_nano() -> LLM:
    return LLM("nano", speculation=0)


@pytest.fixture(scope="module")
def nano() -> LLM:
    return LLM("nano")


def roll(llm: LLM, seed: int, count: int = 1, **structured: Any) -> list[CompletionOutput]:
    """Answers of a model to which all tokens are alike."""
    wanted = StructuredOutput(**structured)
    params = SamplingParams(n=count, seed=seed, max_tokens=3000, structured=wanted)
    return llm.generate("x", params)[0].outputs


def chat(llm: LLM, text: str, thinking: bool = True, **options: Any) -> CompletionOutput:
    given = {name: options.pop(name) for name in list(options) if name in SamplingParams.__slots__}
    params = SamplingParams(**{"seed": 7, "max_tokens": 600} | given)
    return llm.chat([{"role": "user", "content": text}], params, thinking=thinking, **options)[0].outputs[0]


def arguments(answer: CompletionOutput) -> list[tuple[str, Any]]:
    assert answer.finish_reason == "tool_calls" and answer.error is None
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


@settings(max_examples=40, deadline=None)
@given(schemas(), st.integers(0, 2**32))
def test_whatever_a_model_wants_json_fits_its_schema(dice: LLM, schema: dict[str, Any], seed: int) -> None:
    (answer,) = roll(dice, seed, json_schema=schema)
    assert answer.finish_reason == "stop", (answer.error, answer.text)
    assert jsonschema_rs.is_valid(schema, json.loads(answer.text)), answer.text
    control = len(CONTROL_TOKENS)
    assert all(i >= control for i in answer.token_ids[:-1]) and answer.token_ids[-1] == dice.tokenizer.eos_id


@pytest.mark.parametrize(
    ("structured", "pattern"),
    [
        ({"regex": r"[0-9]{2}(/x|\.y)?#"}, r"[0-9]{2}(/x|\.y)?#"),
        ({"choice": ["yes", 'no "', "line\n"]}, 'yes|no "|line\n'),
        ({"grammar": 'start: "(" start ")" | word\nword: /[ab]/ "c"?'}, r"\(*[ab]c?\)*"),
        ({"json_schema": {"type": "object"}}, r"\{.*\}"),
        ({"json_object": True}, r"\{.*\}"),
    ],
    ids=str,
)
def test_each_kind_of_form_is_kept(dice: LLM, structured: dict[str, Any], pattern: str) -> None:
    ended = 0
    for seed in range(6):
        (answer,) = roll(dice, seed, **structured)
        if answer.finish_reason == "stop":  # a text within an object may go on for ever
            ended += 1
            assert re.fullmatch(pattern, answer.text, re.DOTALL), answer.text
    assert ended


def test_samples_of_one_prompt_go_their_own_ways(dice: LLM) -> None:
    answers = roll(dice, 5, 4, json_schema=WEATHER)
    assert all(jsonschema_rs.is_valid(WEATHER, json.loads(a.text)) for a in answers)
    assert len({a.text for a in answers}) > 1


def test_a_form_begins_where_thinking_ends(llm: LLM) -> None:
    answer = chat(llm, "PONDER", structured=StructuredOutput(json_schema=WEATHER))
    assert answer.reasoning == 'perhaps {"a": 1}'
    assert jsonschema_rs.is_valid(WEATHER, json.loads(answer.text)) and answer.finish_reason == "stop"


def test_thinking_does_not_end_the_answer_when_a_form_is_due(llm: LLM) -> None:
    answer = chat(llm, "MUTE", structured=StructuredOutput(choice=("a", "b")), max_tokens=3000)
    close = answer.token_ids.index(llm.tokenizer.token_id(THINK_CLOSE))
    assert llm.tokenizer.eos_id not in answer.token_ids[:close] and answer.text in ("a", "b")
    assert chat(llm, "MUTE").token_ids == [llm.tokenizer.eos_id]


def test_limits_and_stop_strings_cut_a_form_short(llm: LLM) -> None:
    wanted = StructuredOutput(regex="(abc){20}")
    cut = chat(llm, "QUIET", thinking=False, structured=wanted, max_tokens=30)
    assert ("abc" * 20).startswith(cut.text) and cut.finish_reason == "length" and cut.text
    stopped = chat(llm, "QUIET", thinking=False, structured=wanted, stop=["ca"])
    assert (stopped.text, stopped.finish_reason) == ("ab", "stop")


def test_whoever_ignores_the_end_goes_on_freely(llm: LLM) -> None:
    wanted = StructuredOutput(choice=("ab",))
    answer = chat(llm, "QUIET", thinking=False, structured=wanted, ignore_eos=True, max_tokens=20)
    assert answer.finish_reason == "length" and answer.text.startswith("ab") and answer.error is None


def test_a_json_schema_is_told_to_the_model_and_json_object_is_not(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}]
    told, plain, bare = (
        llm.prepare_chat(messages, SamplingParams(structured=wanted))[0].prompt or ""
        for wanted in (StructuredOutput(json_schema=WEATHER), StructuredOutput(json_object=True), None)
    )
    assert json.dumps(WEATHER) in told and plain == bare


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=str)
@pytest.mark.parametrize("text", ["PONDER", "CALL", "EARLY", "WRONG", "QUIET", "EMPTY", "MUTE"])
def test_a_forced_call_comes_after_thinking(llm: LLM, text: str, choice: Any) -> None:
    for thinking in (True, False):
        answer = chat(llm, text, thinking, tools=TOOLS, tool_choice=choice, max_tokens=3000)
        assert answer.text == ""
        for name, given_arguments in arguments(answer):
            assert name == "weather" or (isinstance(choice, str) and given_arguments == {})
            assert name == "now" or jsonschema_rs.is_valid(WEATHER, given_arguments)


def test_a_named_function_is_called_once(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "now"}}
    for seed in range(5):
        assert arguments(chat(llm, "PONDER", tools=TOOLS, tool_choice=choice, seed=seed)) == [("now", {})]


@pytest.mark.parametrize("strict", [True, False])
def test_calls_that_come_of_themselves_fit_their_schemas(llm: LLM, strict: bool) -> None:
    tools = [function("weather", WEATHER, strict=strict)]
    assert arguments(chat(llm, "CALL", tools=tools)) == [("weather", {"city": "Ulm", "days": 3})]
    for text in ("WRONG", "EMPTY"):
        answer = chat(llm, text, tools=tools)
        assert answer.text == ("Well." if text == "WRONG" else "")
        assert all(jsonschema_rs.is_valid(WEATHER, given) for _, given in arguments(answer))


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_that_may_not_be_parallel_are_single(llm: LLM, choice: str) -> None:
    for parallel, count in ((True, 2), (False, 1)):
        answer = chat(llm, "TWICE", False, tools=TOOLS, tool_choice=choice, parallel_tool_calls=parallel)
        assert arguments(answer) == [("weather", {"city": "Ulm", "days": 3})] * count, answer
        assert (answer.text, answer.finish_reason) == ("", "tool_calls")


def test_tools_leave_other_text_alone(llm: LLM) -> None:
    answer = chat(llm, "QUIET", tools=TOOLS)
    assert (answer.reasoning, answer.text, answer.finish_reason) == ("hm", "No call.", "stop")
    (generation,) = llm.prepare_chat([{"role": "user", "content": "QUIET"}], SamplingParams(), tools=TOOLS)
    assert generation.request.constraint is not None
    assert generation.request.constraint.masks([100, 101, 102], [103]) == [None, None]


def test_no_tool_is_called_when_none_may_be(llm: LLM) -> None:
    answer = chat(llm, "CALL", tools=TOOLS, tool_choice="none")
    assert not answer.tool_calls and llm.tokenizer.token_id(DSML) not in answer.token_ids


def test_a_form_and_tools_leave_the_choice_to_the_model(llm: LLM) -> None:
    wanted = StructuredOutput(json_schema=WEATHER)
    answer = chat(llm, "EMPTY", tools=TOOLS, structured=wanted)
    assert arguments(answer)[0][0] == "weather" and not answer.text
    answer = chat(llm, "PONDER", tools=TOOLS, structured=wanted, max_tokens=3000)
    assert answer.tool_calls or jsonschema_rs.is_valid(WEATHER, json.loads(answer.text))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_no_token_of_a_form_on_nano(nano: LLM, plain_nano: LLM, temperature: float) -> None:
    ids: list[list[list[int]]] = []
    for llm in (plain_nano, nano):
        made = []
        for text in ("What is the weather in Oslo?", "Write JSON.", "Tell me a story."):
            for options in ({"tool_choice": "required"}, {"structured": StructuredOutput(json_schema=WEATHER)}, {}):
                answer = chat(llm, text, tools=TOOLS, temperature=temperature, **options)
                if "structured" in options and answer.finish_reason == "stop":
                    assert jsonschema_rs.is_valid(WEATHER, json.loads(answer.text))
                assert answer.error is None and not ("tool_choice" in options and answer.finish_reason == "stop")
                made.append(answer.token_ids)
        ids.append(made)
    assert ids[0] == ids[1]
    assert nano.engine.stats.accepted > 0 == plain_nano.engine.stats.drafted


@pytest.mark.parametrize(
    ("structured", "param", "words"),
    [
        ({"json_schema": {"not": {}}}, "response_format", 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"type": "string", "pattern": "(?=x)"}}, "response_format", "look-around"),
        ({"json_schema": {"enum": []}}, "response_format", "Unsatisfiable"),
        ({"regex": "("}, "regex", "unclosed group"),
        ({"regex": r"[^\s\S]"}, "regex", "admits nothing"),
        ({"grammar": "start: x"}, "grammar", "unknown name"),
    ],
    ids=str,
)
def test_a_form_that_cannot_be_compiled_is_refused(llm: LLM, structured: Any, param: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        llm.generate("x", SamplingParams(structured=StructuredOutput(**structured)))
    assert caught.value.param == param


def test_effort_and_room_for_a_form_are_bounded(llm: LLM) -> None:
    began = time.thread_time()
    (generation,) = llm.prepare_prompt("x", SamplingParams(structured=StructuredOutput(regex="(a{995}){1000}")))
    while generation.finish_reason is None:
        if not llm.busy:
            llm.submit(generation)
        llm.step()
    assert time.thread_time() - began < 0.6
    assert generation.finish_reason == "error" and generation.request.stuck
    assert "too many expressions" in (generation.output().error or "")


def test_few_forms_are_kept_and_none_that_cannot_be_used() -> None:
    grammars = Grammars(small_tokenizer())
    for wrong in (r"[^\s\S]", "["):
        with pytest.raises(RequestError):
            grammars.for_text(StructuredOutput(regex=wrong))
    assert grammars._compile.cache_info().currsize == 0
    for i in range(1, 40):
        assert grammars.for_text(StructuredOutput(regex=f"a{{{i}}}")) is not None
    assert grammars._compile.cache_info().currsize <= 16


@pytest.mark.parametrize("choice", ["maybe", {"type": "function"}, {"type": "function", "function": {"name": "x"}}, 3])
def test_a_choice_of_no_tool_is_refused(llm: LLM, choice: Any) -> None:
    with pytest.raises(RequestError, match="`tool_choice`") as caught:
        chat(llm, "CALL", tools=TOOLS, tool_choice=choice)
    assert caught.value.param == "tool_choice"
    with pytest.raises(RequestError, match="`tools` has none"):
        chat(llm, "CALL", tool_choice="required")


def test_a_prefix_is_no_part_of_a_form(llm: LLM) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "{", "prefix": True}]
    with pytest.raises(RequestError, match="`prefix`"):
        llm.prepare_chat(messages, SamplingParams(structured=StructuredOutput(json_object=True)))


def test_control_tokens_match_no_text() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.encode(DSML, control=False) != [tokenizer.token_id(DSML)]
    llm = scripted_llm({"copy": DSML})
    answer = chat(llm, "copy", thinking=False, structured=StructuredOutput(regex=f".?{DSML}"))
    assert tokenizer.token_id(DSML) not in answer.token_ids and answer.text.endswith(DSML)
