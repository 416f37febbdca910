from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.engine import RequestError, SamplingParams
from hadal.llm import LLM
from hadal.text.tokens import DSML
from tests.fakes import scripted_llm
from tests.llm.dice import DiceModel, objects, schemas
from tests.llm.test_grammar import function


@pytest.fixture(scope="module")
def llm() -> LLM:
    return scripted_llm({}, model=DiceModel)


NAMED = {"type": "function", "function": {"name": "f"}}


def roll(llm: LLM, tools: list[dict[str, Any]], seed: int, choice: Any = "required") -> list[tuple[str, Any]]:
    """The calls of a model to which all tokens are alike."""
    params = SamplingParams(seed=seed, max_tokens=3000)
    messages = [{"role": "user", "content": "x"}]
    answer = llm.chat(messages, params, thinking=False, tools=tools, tool_choice=choice)[0].outputs[0]
    assert answer.finish_reason == "tool_calls", answer
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


def admits(llm: LLM, schema: Any, text: str, choice: Any = "required", **more: Any) -> bool:
    """Whether a call may have the parameters that `text` writes, as (name, type, value) in short form."""
    body = "".join(
        f'<{DSML}parameter name="{name}" string="{kind}">{value}</{DSML}parameter>\n'
        for name, kind, value in (line.split("|") for line in text.split("\n") if line)
    )
    call = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{body}</{DSML}invoke>\n</{DSML}tool_calls>'
    tools = [function("f", schema, **more)]
    messages = [{"role": "user", "content": "x"}]
    (generation,) = llm.prepare_chat(messages, SamplingParams(), thinking=False, tools=tools, tool_choice=choice)
    ids, constraint = llm.tokenizer.encode(call), generation.request.constraint
    assert constraint is not None
    if constraint.allowed([], ids) < len(ids):
        return False
    mask = constraint.masks(ids, [])[0]
    return mask is not None and bool(mask[0] & 2)  # end-of-sequence has id 1


@settings(max_examples=20, deadline=None)
@given(st.lists(objects(schemas()), min_size=1, max_size=2), st.integers(0, 2**32))
def test_arguments_fit_any_schema(llm: LLM, parameters: list[dict[str, Any]], seed: int) -> None:
    tools = [function(f"f{i}", schema) for i, schema in enumerate(parameters)]
    for name, arguments in roll(llm, tools, seed):
        assert jsonschema_rs.is_valid(parameters[int(name[1:])], arguments), arguments


@pytest.mark.parametrize("form", ["email", "hostname", "ipv4", "ipv6", "uuid", "date", "time", "date-time"])
def test_texts_of_a_format_have_it(llm: LLM, form: str) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": form}}, "required": ["a"]}
    valid = jsonschema_rs.validator_for({"type": "string", "format": form}, validate_formats=True)
    for seed in range(3):
        ((_, arguments),) = roll(llm, [function("f", schema)], seed, NAMED)
        # The grammar knows no calendar: a day 31 may be in any month.
        assert valid.is_valid(arguments["a"]) or "date" in form, arguments


WIDE = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "mixed": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/word"}, {"type": "null"}]},
        "any": {},
        "all": {"allOf": [{"$ref": "#/$defs/point"}], "description": "where"},
        "one": {"oneOf": [{"const": "x"}, {"const": 1}]},
        "part": {"type": "string", "pattern": "b+$", "maxLength": 4},
    },
    "required": ["text"],
    "$defs": {
        "word": {"enum": ["on", "off", 7]},
        "point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
}


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("text|true|a</b> & <c>", True),
        ("text|true|", True),
        ("text|false|3", False),
        ("text|true|a\ntext|true|b", False),
        ("any|true|a", False),
        ("text|true|a\nmixed|true|on", True),
        ("text|true|a\nmixed|true|maybe", False),
        ("text|true|a\nmixed|false|null", True),
        ("text|true|a\nmixed|false|7", True),
        ("text|true|a\nmixed|false|7.5", False),
        ("text|true|a\nany|true|b", True),
        ('text|true|a\nany|false|{"x": [1, null]}', True),
        ('text|true|a\nany|false|"b"', False),
        ('text|true|a\nall|false|{"x": 1.5}', True),
        ('text|true|a\nall|false|{"y": 1}', False),
        ("text|true|a\none|true|x", True),
        ("text|true|a\none|false|1", True),
        ("text|true|a\none|false|2", False),
        ("text|true|a\npart|true|xabb", True),
        ("text|true|a\npart|true|xaabb", False),
        ("text|true|a\npart|true|abc", False),
        ("text|true|a\nother|true|b", False),
    ],
)
def test_a_schema_says_what_parameters_there_may_be(llm: LLM, text: str, fits: bool) -> None:
    assert admits(llm, WIDE, text) is fits


def test_functions_without_parameters_and_with_any(llm: LLM) -> None:
    assert admits(llm, None, "") and not admits(llm, None, "a|true|b")
    assert admits(llm, {"type": "object", "properties": {}}, "") and not admits(llm, {"properties": {}}, "a|true|b")
    assert admits(llm, {"type": "object"}, "a|true|b\nc|false|1")
    numbers = {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "number"}}
    assert admits(llm, numbers, "a|true|b\nc|false|1") and admits(llm, numbers, "c|false|1\nd|false|2")
    assert not admits(llm, numbers, "a|false|1") and not admits(llm, numbers, "c|true|x")


CITY = {
    "properties": {"unit": {"enum": ["C", "F"]}, "city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["days", "city", "then"],
}


@pytest.mark.parametrize(
    ("text", "ordered", "free", "closed"),
    [
        ("unit|true|C\ncity|true|Ulm\ndays|false|3\nthen|false|1", True, True, True),
        ("city|true|Ulm\ndays|false|3\nthen|false|1", True, True, True),
        ("days|false|3\ncity|true|Ulm\nthen|false|1", False, True, True),
        ("then|true|x\ncity|true|Ulm\nunit|true|F\ndays|false|3", False, True, True),
        ("city|true|Ulm", False, False, False),
        ("city|true|Ulm\ndays|false|3\ncity|true|Bonn\nthen|false|1", False, False, False),
        ("", False, False, False),
        ("days|true|3", False, False, False),
        ("unit|true|K\ncity|true|Ulm\ndays|false|3\nthen|false|1", False, False, False),
        ("city|true|Ulm\ndays|false|3\nthen|false|1\nzone|true|CET", False, True, False),
        ("zone|true|CET\nthen|true|\ndays|false|3\ncity|true|Ulm", False, True, False),
        ("cit|true|U\nthen|true|\ndays|false|3\ncities|true|D\nd|true|\ncity|true|a\nTHEN|true|a", False, True, False),
    ],
)
def test_calls_that_nothing_forces_have_their_parameters_in_any_order(
    llm: LLM, text: str, ordered: bool, free: bool, closed: bool
) -> None:
    assert [admits(llm, CITY, text, choice) for choice in ("required", NAMED, "auto")] == [ordered, ordered, free]
    assert admits(llm, CITY | {"additionalProperties": False}, text, "auto") is closed


def test_strict_functions_keep_the_order_of_their_schema(llm: LLM) -> None:
    both = {"a": {"type": "string"}, "b": {"type": "string"}}
    schema = {"type": "object", "properties": both, "required": ["b", "a"], "additionalProperties": False}
    for choice in ("auto", "required"):
        assert admits(llm, schema, "a|true|1\nb|true|2", choice, strict=True)
        assert not admits(llm, schema, "b|true|2\na|true|1", choice, strict=True)
        assert not admits(llm, schema, "a|true|1", choice, strict=True)


def test_optional_and_missing_schemas_leave_calls_empty_or_free(llm: LLM) -> None:
    assert admits(llm, {"properties": {"a": {}}}, "", "auto") and admits(llm, {"properties": {}}, "z|true|1", "auto")
    assert admits(llm, None, "", "auto") and not admits(llm, None, "a|true|b", "auto")
    shut = {"type": "object", "properties": {}, "additionalProperties": False}
    assert admits(llm, shut, "", "auto") and not admits(llm, shut, "a|true|b", "auto")
    numbers = {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "number"}}
    assert admits(llm, numbers, "ab|false|1\na|true|1", "auto") and not admits(llm, numbers, "ab|true|1", "auto")


def test_parameters_beyond_the_64th_are_in_any_order_too(llm: LLM) -> None:
    names = [f"p{i}" for i in range(70)]
    schema = {"properties": {name: {"type": "integer"} for name in names}, "required": ["p69", "p0"]}
    lines = [f"{name}|false|1" for name in reversed(names)]
    assert admits(llm, schema, "\n".join(lines), "auto")
    assert not admits(llm, schema, "\n".join(lines[1:]), "auto") and not admits(llm, schema, "p69|false|1", "auto")


BAD: list[tuple[Any, str]] = [
    ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "look-around"),
    ({"properties": {"a": {"type": "array", "items": {"type": "str"}}}}, "Invalid type: str"),
    ({"properties": {"a": {"type": "str"}}}, "the type 'str' is none of"),
    ({"properties": {'a"': {}}}, "does not fit into a DSML tag"),
    ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "leads nowhere"),
    ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}, "circles"),
    ({"properties": {"a": {"anyOf": [{"type": "null"}], "type": "string"}}}, "inside and outside"),
    ({"properties": {"a": False}, "required": ["a"]}, "admits no value"),
    ({"properties": {"a": 3}}, "stands where a schema is due"),
    ({"properties": []}, "must be an object"),
    ({"anyOf": [{"properties": {}}]}, "anyOf stands at its top"),
    ({"type": "array"}, "arguments are an object"),
    ([1], "stands where a schema is due"),
]


@pytest.mark.parametrize(("schema", "words"), BAD, ids=[words for _, words in BAD])
def test_a_schema_beyond_the_grammar_is_refused_for_forced_calls_alone(llm: LLM, schema: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        roll(llm, [function("good"), function("f", schema)], 0)
    assert caught.value.param == "tools[1].function.parameters" and "'f'" in str(caught.value)
    messages = [{"role": "user", "content": "x"}]
    tools = [function("good"), function("f", schema)]
    (generation,) = llm.prepare_chat(messages, SamplingParams(), thinking=False, tools=tools)
    call = f'<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="z" string="false">[1'
    ids, constraint = llm.tokenizer.encode(call), generation.request.constraint
    assert constraint is not None and constraint.allowed([], ids) == len(ids)


STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"additionalProperties": True}, "additionalProperties to false"),
        ({"required": []}, "the optional property 'a'"),
        ({"properties": {"a": {"type": "string", "format": "date"}}}, "properties.a has the format 'date'"),
        ({"properties": {"a": {"oneOf": [{"type": "null"}]}}}, "oneOf, which strict functions do not know"),
        ({"properties": {"a": {"anyOf": [{"type": "object"}]}}}, r"a\.anyOf\[0\] does not set"),
        ({"properties": {"a": {"type": "array", "items": {"type": "text"}}}}, "a.items has the type 'text'"),
        ({"$defs": {"x": {"properties": {"b": {}}}}}, r"\$defs\.x does not set"),
        ({"properties": {"a": {"type": "string", "pattern": "(?=x)"}}}, "look-around"),
    ],
    ids=str,
)
def test_strict_functions_keep_the_vendors_rules(llm: LLM, change: dict[str, Any], words: str) -> None:
    assert admits(llm, STRICT, "a|true|b", strict=True)
    with pytest.raises(RequestError, match=words) as caught:
        roll(llm, [function("f", {**STRICT, **change}, strict=True)], 0, "auto")
    assert caught.value.param == "tools[0].function.parameters"
