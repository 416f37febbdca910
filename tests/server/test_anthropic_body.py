"""What bodies of POST /v1/messages ask for, without a server; and a server that no body breaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hadal.server.anthropic import Block, MessagesRequest
from hadal.server.settings import Settings
from tests.server.conftest import Running

SETTINGS = Settings(model="m")
USE = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": "ü"}}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def ask(**body: Any) -> Any:
    given = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **body}
    return MessagesRequest.model_validate(given).ask(SETTINGS)


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ([("user", [text("a"), text("b")])], [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]),
        (
            [("user", "a"), ("assistant", [{"type": "thinking", "thinking": "t", "signature": "s"}, text("x"), USE])],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "x", "reasoning_content": "t", "tool_calls": [CALL]},
            ],
        ),
        (
            [("user", [{"type": "tool_result", "tool_use_id": "c", "content": "r", "is_error": True}, text("b")])],
            [{"role": "tool", "tool_call_id": "c", "content": "r"}, {"role": "user", "content": "b"}],
        ),
        (
            [("user", [{"type": "tool_result", "tool_use_id": "c"}])],
            [{"role": "tool", "tool_call_id": "c", "content": ""}],
        ),
        (
            [("user", "a"), ("system", "s"), ("assistant", "x")],
            [
                {"role": "user", "content": "a"},
                {"role": "user", "content": "s"},
                {"role": "assistant", "content": "x", "prefix": True},
            ],
        ),
    ],
)
def test_blocks_become_turns(given: Any, messages: list[dict[str, Any]]) -> None:
    assert list(ask(messages=[{"role": role, "content": content} for role, content in given]).messages) == messages


@pytest.mark.parametrize(
    ("more", "thinking"),
    [
        ({}, "high"),
        ({"thinking": {"type": "disabled"}}, None),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "high"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max"),
        ({"output_config": {"effort": "low"}}, "low"),
        ({"model": "deepseek-chat"}, None),
        ({"model": "deepseek-chat", "thinking": {"type": "enabled"}}, "high"),
    ],
)
def test_thinking_is_on_unless_it_is_switched_off(more: dict[str, Any], thinking: str | None) -> None:
    made = ask(**more)
    assert (made.effort if made.thinking else None) == thinking


@pytest.mark.parametrize(
    ("choice", "meant"),
    [
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto"),
        ({"type": "none"}, "none"),
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "f"}, {"type": "function", "function": {"name": "f"}}),
    ],
)
def test_tools_and_their_choice_are_taken_over(choice: dict[str, Any], meant: Any) -> None:
    tool = {"type": "custom", "name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}
    made = ask(tools=[tool], tool_choice=choice)
    assert made.parallel_tool_calls is ("disable_parallel_tool_use" not in choice) and made.ignored == ()
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}
    assert made.tools == ({"type": "function", "function": function},) and made.tool_choice == meant


def test_sampling_and_form_are_taken_over() -> None:
    schema = {"type": "object"}
    form = {"format": {"type": "json_schema", "schema": schema}}
    made = ask(temperature=0.5, top_p=0.9, top_k=7, stop_sequences=["a"], output_config=form)
    assert made.sampling.pop("structured").json_schema == schema
    assert made.sampling == {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "top_k": 7, "stop": ("a",)}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("me", "me"),
        ("user_ab_account_cd_session_0a1b2c3d-0000-1111-2222-333344445555", "user_ab_account_cd"),
        ('{"device_id":"d","session_id":"0a1b2c3d-0000-1111-2222-333344445555"}', '{"device_id":"d"}'),
    ],
)
def test_a_user_is_the_same_in_every_session(sent: str, kept: str) -> None:
    assert ask(metadata={"user_id": sent}).user_id == kept


def test_what_has_no_effect_is_named() -> None:
    made = ask(
        system=[text("x-anthropic-billing-header: a") | {"cache_control": {"type": "ephemeral"}}, text("be")],
        service_tier="auto", mcp_servers=[], thinking={"type": "enabled", "budget_tokens": 5},
        messages=[{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "is_error": True}]}],
    )  # fmt: skip
    assert set(made.ignored) == {
        "service_tier", "mcp_servers", "thinking.budget_tokens", "system[0]", "cache_control", "is_error",
    }  # fmt: skip
    assert made.messages[0] == {"role": "system", "content": "be"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "text"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KIND = st.sampled_from([*Block.kinds, "custom", "auto", "tool", "enabled", "json_schema", "image"])
FIELDS = [name for name in Block.model_fields if name != "type"] + ["input_schema", "schema", "effort", "format"]
PART = st.builds(
    lambda kind, part: {"type": kind, **part}, KIND, st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)
)
PARTS = st.lists(PART, max_size=3)
ROLE = st.sampled_from(["user", "assistant", "system"])
TURNS = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLE, st.text() | PARTS), max_size=3
)
BODY = st.dictionaries(st.sampled_from([*MessagesRequest.model_fields]), JSON | PARTS | PART | TURNS, max_size=4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODY, turns=TURNS)
def test_no_body_breaks_the_server(server: Running, body: dict[str, Any], turns: list[Any]) -> None:
    status, answer = server.call(
        "/v1/messages", {"model": "scripted", "messages": turns, **body, "stream": False, "max_tokens": 4}
    )
    assert status in (200, 400, 422), answer
    assert answer["type"] == ("message" if status == 200 else "error")


def test_a_picture_in_a_tool_result_is_told_as_left_out_and_ends_no_conversation() -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    paper = {
        "type": "document",
        "title": "a",
        "source": {"type": "base64", "media_type": "application/pdf", "data": ""},
    }
    result = {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "read"}, picture, paper]}
    made = ask(messages=[{"role": "user", "content": [result]}])
    assert made.messages is not None and made.messages[0]["content"] == (
        "read\n\n[image omitted: this model reads only text]\n\n[document omitted: this model reads only text]"
    )
    assert made.ignored == ("tool_result.image", "tool_result.document")
