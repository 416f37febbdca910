"""What bodies of POST /responses ask for, without a server; and a server that no body breaks."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hadal.server.items import Item
from hadal.server.responses import ResponsesRequest
from hadal.server.settings import Settings
from tests.server.conftest import Running

SETTINGS = Settings(model="m")
CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c", "output": "r"}


def ask(**body: Any) -> Any:
    return ResponsesRequest.model_validate({"model": "m", "input": "hi", **body}).ask(SETTINGS)


def called(**call: str) -> dict[str, Any]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"} | call}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        (
            [
                {"role": "developer", "content": "a"},
                {"role": "user", "content": "b"},
                {"role": "system", "content": "c"},
            ],
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "user", "content": "c"}],
        ),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}],
            [{"role": "user", "content": "a\n\nb"}],
        ),
        (
            [
                {"role": "user", "content": "a"},
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "t"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
                CALL,
                RESULT | {"output": [{"type": "input_text", "text": "r"}]},
            ],
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "x", "reasoning_content": "t", "tool_calls": [called()]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
        ),
        (
            [
                CALL,
                CALL,
                RESULT,
                RESULT,
                CALL,
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]},
            ],
            [
                {"role": "assistant", "content": "", "tool_calls": [called(), called()]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
                {"role": "assistant", "content": "", "tool_calls": [called()], "reasoning_content": "s"},
            ],
        ),
        (
            [CALL, RESULT, {"type": "function_call_output", "namespace": "agent", "name": "goal", "output": "win"}],
            [
                {"role": "assistant", "content": "", "tool_calls": [called()]},
                {"role": "tool", "tool_call_id": "c", "content": "r"},
                {"role": "user", "content": "agent__goal:\nwin"},
            ],
        ),
        (
            [{"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "ü"}],
            [{"role": "assistant", "content": "", "tool_calls": [called(arguments='{"input": "ü"}')]}],
        ),
    ],
)
def test_items_become_turns(items: Any, messages: list[dict[str, Any]]) -> None:
    assert list(ask(input=items).messages) == messages


def test_instructions_come_first_and_are_one_system_message() -> None:
    made = ask(instructions="be", input=[{"role": "system", "content": "so"}, {"role": "user", "content": "hi"}])
    assert made.messages[0] == {"role": "system", "content": "be\n\nso"}


@pytest.mark.parametrize(
    ("effort", "thinking"),
    [(None, "high"), ("none", None), ("minimal", "low"), ("low", "low"), ("medium", "high"), ("max", "max")],
)
def test_effort_switches_thinking(effort: str | None, thinking: str | None) -> None:
    made = ask(reasoning={"effort": effort})
    assert (made.effort if made.thinking else None) == thinking


def test_the_form_of_the_text_is_asked_for() -> None:
    schema = {"type": "object"}
    made = ask(text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}})
    assert made.sampling["structured"].json_schema == schema
    assert ask(text={"format": {"type": "json_object"}}).sampling["structured"].json_object
    assert "structured" not in ask(text={"format": {"type": "text"}}).sampling


def test_allowed_tools_are_those_that_the_model_sees() -> None:
    tools = [{"type": "function", "name": name, "parameters": {}} for name in "ab"]
    made = ask(tools=tools, tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"name": "b"}]})
    assert [tool["function"]["name"] for tool in made.tools] == ["b"] and made.tool_choice == "required"


def test_a_namespace_names_its_tools_and_heads_the_first() -> None:
    members = [{"type": "function", "name": name, "description": f"does {name}"} for name in "ab"]
    tools = [{"type": "namespace", "name": "lab", "description": "ours", "tools": members}, members[0]]
    told = [(tool["function"]["name"], tool["function"]["description"]) for tool in ask(tools=tools).tools]
    assert told == [("lab__a", "ours\n\ndoes a"), ("lab__b", "does b"), ("a", "does a")]
    some = ask(tools=tools, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"name": "lab"}]})
    assert [tool["function"]["name"] for tool in some.tools] == ["lab__a", "lab__b"]
    with pytest.raises(ValueError, match="type 'namespace' is not served"):
        ask(tools=[{"type": "namespace", "name": "outer", "tools": tools}])


def test_the_grammar_of_a_custom_tool_is_told() -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": "start: LINE"}
    (tool,) = ask(tools=[{"type": "custom", "name": "f", "format": grammar}]).tools
    assert "start: LINE" in tool["function"]["parameters"]["properties"]["input"]["description"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "name", "text"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KIND = st.sampled_from(
    ["message", "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom", "function",
     "namespace", "input_text", "output_text", "allowed_tools", "json_schema", "json_object", "summary_text"]
)  # fmt: skip
FIELDS = [name for name in Item.model_fields if name != "type"] + [
    "schema",
    "parameters",
    "format",
    "mode",
    "text",
    "tools",
]
PART = st.dictionaries(st.sampled_from(FIELDS), JSON | st.lists(JSON, max_size=2), max_size=5)
PARTS = st.lists(st.builds(lambda kind, part: {"type": kind, **part}, KIND, PART), max_size=3)
BODY = st.dictionaries(st.sampled_from([*ResponsesRequest.model_fields]), JSON | PARTS | PART, max_size=4)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODY)
def test_no_body_breaks_the_server(server: Running, body: dict[str, Any]) -> None:
    status, answer = server.call(
        "/responses", {"model": "scripted", "input": "plain", **body, "stream": False, "max_output_tokens": 4}
    )
    assert status in (200, 400, 422), answer
    assert answer["object"] == "response" if status == 200 else answer["error"]["message"]
