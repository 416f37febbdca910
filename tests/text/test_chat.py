"""The chat codec against the four official vectors and against vectors in other words that run anywhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.text import (
    ChatError,
    Content,
    OutputParser,
    Prompt,
    PromptTexts,
    Reasoning,
    ToolCall,
    encode_fim,
    encode_messages,
    own_prompt_texts,
    train_tokenizer,
)
from hadal.text.tokens import CONTROL_TOKENS
from hadal.verify.chat import check_chat

TEXTS = PromptTexts(
    {"low": "", "high": "[HIGH]", "max": "[MAX]"}, "low", "[TOOLS {dsml_token} {tool_schemas}]\n", "[FORMAT {schema}]"
)
PREVIEW = PromptTexts({"high": "", "max": "[MAX]"}, "high", TEXTS.tools, TEXTS.response_format)
B, E, U, A = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
D = "｜DSML｜"


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def call(name: str, arguments: Any, call_id: str | None = None) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **keys}}


def render(messages: list[dict[str, Any]], texts: PromptTexts = TEXTS, **options: Any) -> str:
    return encode_messages(messages, texts, **options).text


def test_official_vectors_pass_byte_for_byte(shared_dir: Path) -> None:
    checks = check_chat(shared_dir / "data" / "v4-format" / "tests")
    assert [(check.passed, check.detail) for check in checks if not check.passed] == [] and len(checks) == 4


def test_one_question_in_each_mode() -> None:
    chat = [{"role": "system", "content": "S"}, user("Q")]
    cases: list[tuple[PromptTexts, dict[str, Any], str, str]] = [
        (TEXTS, {"thinking": False}, f"{B}S{U}Q{A}</think>", "content"),
        (TEXTS, {"thinking": False, "effort": "max"}, f"{B}S{U}Q{A}</think>", "content"),
        (TEXTS, {}, f"{B}S{U}Q{A}<think>", "thinking"),
        (TEXTS, {"effort": "low"}, f"{B}S{U}Q{A}<think>", "thinking"),
        (TEXTS, {"effort": "high"}, f"{B}[HIGH]S{U}Q{A}<think>", "thinking"),
        (TEXTS, {"effort": "max"}, f"{B}[MAX]S{U}Q{A}<think>", "thinking"),
        (PREVIEW, {}, f"{B}S{U}Q{A}<think>", "thinking"),
        (PREVIEW, {"effort": "high"}, f"{B}S{U}Q{A}<think>", "thinking"),
        (PREVIEW, {"effort": "max"}, f"{B}[MAX]S{U}Q{A}<think>", "thinking"),
    ]
    for texts, options, expected, end in cases:
        prompt = encode_messages(chat, texts, **options)
        assert (prompt.text, prompt.end) == (expected, end)


def test_reasoning_before_the_last_user_turn_is_dropped_unless_kept_or_tools_are_there() -> None:
    chat = [user("1"), assistant("a", reasoning_content="r"), user("2"), assistant("b", reasoning_content="s")]
    old = f"{B}{U}1{A}</think>a{E}{U}2{A}<think>s</think>b{E}"
    kept = f"{U}1{A}<think>r</think>a{E}{U}2{A}<think>s</think>b{E}"
    assert render(chat) == old
    assert render(chat, drop_thinking=False) == B + kept
    assert render(chat, tools=[tool("f")]) == f'{B}\n\n[TOOLS {D} {{"name": "f"}}]\n{kept}'
    assert render(chat, thinking=False) == f"{B}{U}1{A}</think>a{E}{U}2{A}</think>b{E}"
    assert render([user("1"), assistant("a")], drop_thinking=False) == f"{B}{U}1{A}<think></think>a{E}"


def test_earlier_developer_messages_vanish_only_when_thinking_is_dropped() -> None:
    chat = [{"role": "developer", "content": "D"}, assistant("a"), user("Q")]
    assert render(chat) == f"{B}a{E}{U}Q{A}<think>"
    assert render(chat, drop_thinking=False) == f"{B}{U}D{A}<think></think>a{E}{U}Q{A}<think>"
    assert render(chat[:1]) == f"{B}{U}D{A}<think>"
    assert render(chat, thinking=False) == f"{B}{U}D{A}</think>a{E}{U}Q{A}</think>"


def test_system_sections_and_text_parts() -> None:
    system = {"role": "system", "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "T"}]}
    expected = (
        f'{B}S\n\nT\n\n[TOOLS {D} {{"name": "f", "d": "é"}}\n{{"name": "g"}}]\n\n\n[FORMAT {{"x": 1}}]{U}Q{A}<think>'
    )
    tools = [tool("f", d="é"), tool("g")]
    assert render([system, user("Q")], tools=tools, response_format={"x": 1}) == expected
    assert render([{**system, "tools": tools, "response_format": {"x": 1}}, user("Q")]) == expected
    developer = {"role": "developer", "content": "D", "tools": [tool("f")]}
    assert render([developer]) == f'{B}{U}D\n\n[TOOLS {D} {{"name": "f"}}]\n{A}<think>'


def test_calls_and_results_are_fused_and_ordered() -> None:
    calls = [call("f", '{"a": "x\\"y", "n": [1, null]}', "one"), call("g", "", "two")]
    chat = [
        user("Q"),
        assistant("see", tool_calls=calls),
        {"role": "tool", "tool_call_id": "two", "content": "R2"},
        user("and?"),
        {"role": "tool", "tool_call_id": "one", "content": "R1"},
        {"role": "tool", "tool_call_id": "unknown", "content": "R0"},
        user("more"),
    ]
    block = (
        f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="a" string="true">x"y</{D}parameter>\n'
        f'<{D}parameter name="n" string="false">[1, null]</{D}parameter>\n</{D}invoke>\n'
        f'<{D}invoke name="g">\n</{D}invoke>\n</{D}tool_calls>'
    )
    r0, r1, r2 = (f"<tool_result>R{i}</tool_result>" for i in range(3))
    results = f"{r0}\n\nand?\n\n{r1}\n\n{r2}\n\nmore"
    assert render(chat, thinking=False) == f"{B}{U}Q{A}</think>see{block}{E}{U}{results}{A}</think>"


def test_latest_reminder_stands_where_it_was_put() -> None:
    reminder = {"role": "latest_reminder", "content": "today"}
    assert render([reminder, user("Q")], thinking=False) == f"{B}<｜latest_reminder｜>today{U}Q{A}</think>"


@pytest.mark.parametrize("thinking", [True, False])
def test_tasks(thinking: bool) -> None:
    think = "<think>" if thinking else "</think>"
    cases = {name: f"{B}{U}Q<｜{name}｜>" for name in ("query", "authority", "domain", "read_url")}
    cases["action"] = f"{B}{U}Q{A}{think}<｜action｜>"
    for name, expected in cases.items():
        prompt = encode_messages([user("Q", task=name)], TEXTS, thinking=thinking)
        assert (prompt.text, prompt.end) == (expected, "task")
        assert render([user("Q", task=name), assistant("yes")], thinking=thinking) == f"{expected}yes{E}"
    chat = [user("Q"), assistant("a", task="title")]
    middle = "<think></think>" if thinking else "</think>"
    expected = f"{B}{U}Q{A}{middle}a{E}<｜title｜>"
    assert encode_messages(chat, TEXTS, thinking=thinking).end == "task"
    assert render(chat, thinking=thinking) == expected
    assert render([*chat, assistant("Title")], thinking=thinking) == f"{expected}Title{E}"


def test_users_do_not_fuse_after_a_task() -> None:
    with pytest.raises(ChatError, match=r"messages\[0\] has a task but is followed by user"):
        render([user("Q", task="query"), user("R")])
    assert render([user("P"), user("Q", task="query")]) == f"{B}{U}P\n\nQ<｜query｜>"


def test_prefix_is_continued() -> None:
    cases = [
        (assistant("Sure", prefix=True), True, "<think></think>Sure", "content"),
        (assistant("Sure", prefix=True, reasoning_content="r"), True, "<think>r</think>Sure", "content"),
        (assistant("", prefix=True, reasoning_content="so far"), True, "<think>so far", "thinking"),
        (assistant(None, prefix=True), True, "<think>", "thinking"),
        (assistant("Sure", prefix=True), False, "</think>Sure", "content"),
    ]
    for last, thinking, expected, end in cases:
        prompt = encode_messages([user("Q"), last], TEXTS, thinking=thinking)
        assert (prompt.text, prompt.end) == (f"{B}{U}Q{A}{expected}", end)


def test_fill_in_the_middle() -> None:
    prompt = encode_fim("a(", ")b")
    assert prompt.text == f"{B}<｜fim▁begin｜>a(<｜fim▁hole｜>)b<｜fim▁end｜>"
    assert prompt.end == "content"


def test_keys_that_say_nothing_are_accepted() -> None:
    message = {**assistant("a"), "refusal": None, "audio": None, "tool_calls": None, "name": "bot", "mask": 1}
    assert render([user("Q"), message], thinking=False) == f"{B}{U}Q{A}</think>a{E}"


@pytest.mark.parametrize(
    ("messages", "options", "words"),
    [
        ([], {}, "messages is empty"),
        ([user("Q")], {"effort": "ultra"}, "unknown effort 'ultra'.*low, high, max"),
        ([user("Q"), {"role": "bot", "content": ""}], {}, r"messages\[1\] has role 'bot'.*take one of"),
        (["Q"], {}, r"messages\[0\] has role None"),
        ([user("Q", temperature=1)], {}, r"messages\[0\] \(user\) has the key 'temperature'.*leave it out"),
        ([user(None)], {}, r"messages\[0\] \(user\) has no content"),
        ([user(3)], {}, r"messages\[0\] has content of type int"),
        ([user([{"type": "image_url", "image_url": {}}])], {}, r"messages\[0\]\.content\[0\] is not a text part"),
        ([user("Q", task="title")], {}, r"messages\[0\] \(user\) has the task 'title'.*action"),
        ([user("Q"), assistant("", tool_calls=[call("f", "{")])], {}, r"messages\[1\]\.tool_calls\[0\].*not JSON"),
        ([user("Q"), assistant("", tool_calls=[call("f", '{"a": NaN}')])], {}, r"tool_calls\[0\].*NaN"),
        ([user("Q"), assistant("", tool_calls=[call("f", "[1]")])], {}, r"tool_calls\[0\].*no JSON object"),
        ([user("Q"), assistant("", tool_calls=[call("f", '{"a\\"": 1}')])], {}, "a DSML tag cannot hold"),
        ([user("Q"), assistant("", tool_calls=[{"name": "f"}])], {}, r"tool_calls\[0\] is not a function call"),
        ([user("Q"), assistant("", tool_calls=3)], {}, r"messages\[1\] has a tool_calls of type int; give a list"),
        ([user("Q"), assistant("", reasoning_content=3)], {}, "reasoning_content of type int; give a string"),
        ([user("Q"), assistant("", prefix=True), user("R")], {}, r"messages\[1\] has prefix but"),
        ([user("Q")], {"tools": [{"type": "web_search"}]}, r"the request\.tools\[0\] is not a function tool"),
        ([{"role": "system", "tools": [tool("f")]}], {"tools": [tool("f")]}, "give tools in one place"),
        ([user("ok"), assistant("a"), user("\ud800")], {}, r"messages\[2\] holds half of a surrogate"),
    ],
)
def test_errors_name_the_place_and_the_remedy(messages: list[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ChatError, match=words):
        encode_messages(messages, TEXTS, **options)


def control_ids(prompt: Prompt) -> list[int]:
    tokenizer = train_tokenizer(["some text to learn from"] * 3, 280)
    known = {tokenizer.token_id(token) for token in CONTROL_TOKENS}
    return [token_id for token_id in tokenizer.encode_pieces(prompt.pieces) if token_id in known]


def test_no_part_of_a_request_can_inject_a_control_token() -> None:
    def conversation(word: str) -> Prompt:
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": word, "tools": [tool(word, note=word)], "response_format": {word: word}},
            {"role": "latest_reminder", "content": word},
            user(word),
            assistant(word, reasoning_content=word, tool_calls=[call(word, {word: word, "n": [word]}, "1")]),
            {"role": "tool", "tool_call_id": "1", "content": word},
        ]
        return encode_messages(messages, own_prompt_texts(), effort="max")

    attack = "".join(CONTROL_TOKENS)
    assert attack in conversation(attack).text
    assert control_ids(conversation(attack)) == control_ids(conversation("plain"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
names = st.text(alphabet=st.characters(exclude_characters='"\n', exclude_categories=["Cs"]), min_size=1, max_size=8)
words = st.text(alphabet=st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=20)
calls = st.lists(st.tuples(names, st.dictionaries(names, json_values, max_size=3)), max_size=3)


@settings(deadline=None)
@given(reasoning=words, content=words, wanted=calls, thinking=st.booleans())
def test_the_parser_reads_back_what_the_codec_writes(
    reasoning: str, content: str, wanted: list[tuple[str, dict[str, Any]]], thinking: bool
) -> None:
    question = [user("Q")]
    answer = assistant(content, reasoning_content=reasoning, tool_calls=[call(name, args) for name, args in wanted])
    prompt = encode_messages(question, TEXTS, thinking=thinking)
    whole = encode_messages([*question, answer], TEXTS, thinking=thinking)
    assert whole.text.startswith(prompt.text)
    parser = OutputParser(thinking=prompt.end == "thinking")
    events = parser.feed(whole.text[len(prompt.text) :]) + parser.finish()
    assert "".join(e.text for e in events if isinstance(e, Reasoning)) == (reasoning if thinking else "")
    assert "".join(e.text for e in events if isinstance(e, Content)) == content
    assert [(e.name, json.loads(e.arguments)) for e in events if isinstance(e, ToolCall)] == wanted


def test_many_messages_of_one_side_are_joined_in_time_that_grows_with_them() -> None:
    began = time.monotonic()
    prompt = encode_messages([user("a")] * 40_000, own_prompt_texts())
    assert prompt.text.count("a\n\n") == 39_999 and time.monotonic() - began < 5  # of squared growth, 12
