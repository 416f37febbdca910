"""The grammar of tool calls: functions with their parameter schemas -> the DSML block that may carry their arguments.

`hadal.llm.grammar` compiles the Lark text written here. Strings stand in a block as they are, so a schema is split into
the texts that it admits, which become regular expressions, and the other values, which stay a JSON schema (spec 7.4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import llguidance

from hadal.text.tokens import DSML

Bound = tuple[Mapping[str, Any], bool]  # a function, and whether it is held to its schema

# Models write arguments as Python's json does.
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_BITS = 64  # of the number in which a grammar keeps what has come

_TYPES = ("string", "object", "array", "number", "integer", "boolean", "null")
_DEFINITIONS = ("$defs", "$def", "definitions")
_ANNOTATIONS = {"title", "description", "default", "examples", "deprecated", "$comment", *_DEFINITIONS}
_NO_TEXT = {"properties", "additionalProperties", "items", "prefixItems", "minimum", "maximum", "multipleOf"}
_ROOT_KEYS = {"type", "properties", "required", "additionalProperties", "$schema", "$id", "strict"} | _ANNOTATIONS
_STRICT_KEYS = {"oneOf", "allOf", "not", "if", "then", "else", "patternProperties", "propertyNames", "prefixItems"}

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,28}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL}){{0,6}}"  # 253 characters at most; limits of labels and of all do not multiply thus
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_DATE = "[0-9]{4}-(?:0[1-9]|1[0-2])-(?:0[1-9]|[12][0-9]|3[01])"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]+)?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_WORD = "[0-9A-Fa-f]{1,4}"
_SHORTENED = [f"(?:{_WORD}:){{1,{7 - n}}}(?::{_WORD}){{1,{n}}}" for n in range(1, 7)]
_STRICT_FORMATS = {
    "email": rf"[A-Za-z0-9_%+-]{{1,20}}(?:\.[A-Za-z0-9_%+-]{{1,20}}){{0,2}}@{_LABEL}\.{_HOST}",
    "hostname": _HOST,
    "ipv4": rf"{_BYTE}(?:\.{_BYTE}){{3}}",
    "ipv6": "|".join(
        [f"(?:{_WORD}:){{7}}{_WORD}", f"(?:{_WORD}:){{1,7}}:", f":(?::{_WORD}){{1,7}}", "::", *_SHORTENED]
    ),
    "uuid": "[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
}
_FORMATS = _STRICT_FORMATS | {"date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}"}


class SchemaError(ValueError):
    """A function that a grammar cannot hold to its schema; the message says why."""


def write_calls(functions: Sequence[Bound], dsml_id: int, *, single: bool, forced: bool) -> str:
    """The Lark grammar of a block behind `<` and its first DSML token: one call if `single`, else one or more.

    Arguments of `forced` calls and of `strict` functions come in the schema's order. Others come in any order, unlisted
    ones too unless the schema forbids them; that an unlisted one, or one after the 64th, comes twice is not prevented,
    and such a call is none. A function that is not bound to its schema takes any. One that is not strict is held to its
    schema without the keywords that no grammar can express. Raises SchemaError.
    """
    block = _Block(f"<[{dsml_id}]>", forced)
    rules = [block.write_function(f"f{i}", function, bound) for i, (function, bound) in enumerate(functions)]
    d = block.dsml
    head = [
        f'start: "tool_calls>\\n" call{"" if single else "+"} "</" {d} "tool_calls>"',
        f'call: "<" {d} ({" | ".join(rules)}) "</" {d} "invoke>\\n"',
        # A text ends where a DSML token follows `</`; spelled with other tokens, its marker must not be in the text.
        f"TEXT: /(?s:.*)<\\// & ~/(?s:.*){DSML}(?s:.*)/",
    ]
    return "\n".join(head + block.lines)


def check_strict(schema: Any, place: str = "the schema") -> None:
    """Raise SchemaError where a schema breaks DeepSeek's rules for strict functions."""
    if not isinstance(schema, Mapping):
        raise SchemaError(f"{place} is no object; give a JSON schema")
    if wrong := sorted(_STRICT_KEYS & schema.keys()):
        raise SchemaError(f"{place} has {wrong[0]}, which strict functions do not know; use anyOf or leave it out")
    kind = schema.get("type")
    for each in kind if isinstance(kind, list) else [kind] * ("type" in schema):
        if each not in _TYPES:
            raise SchemaError(f"{place} has the type {each!r}; take one of {', '.join(_TYPES)}")
    form = schema.get("format")
    if form is not None and form not in _STRICT_FORMATS:
        raise SchemaError(f"{place} has the format {form!r}; strict functions know {', '.join(_STRICT_FORMATS)}")
    properties = schema.get("properties", {})
    if kind == "object" or properties:
        if schema.get("additionalProperties") is not False:
            raise SchemaError(f"{place} does not set additionalProperties to false; strict functions need it")
        if missing := [name for name in properties if name not in schema.get("required", ())]:
            raise SchemaError(f"{place} has the optional property {missing[0]!r}; strict functions require all")
    for name, inner in properties.items():
        check_strict(inner, f"{place}.properties.{name}")
    for i, inner in enumerate(schema.get("anyOf", ())):
        check_strict(inner, f"{place}.anyOf[{i}]")
    if "items" in schema:
        check_strict(schema["items"], f"{place}.items")
    for key in _DEFINITIONS:
        for name, inner in schema.get(key, {}).items():
            check_strict(inner, f"{place}.{key}.{name}")


class _Block:
    """Lark rules in the making; `_root` is the schema of the function being written, whose references it resolves."""

    def __init__(self, dsml: str, forced: bool) -> None:
        self.dsml = dsml
        self._forced = forced
        self.lines: list[str] = []
        self._root: Mapping[str, Any] = {}
        self._strict = False

    def write_function(self, rule: str, function: Mapping[str, Any], bound: bool) -> str:
        name, schema = function["name"], function.get("parameters")
        self._strict = function.get("strict") is True
        if self._strict and schema is not None:
            check_strict(schema)
        body = [_literal(f'invoke name="{_checked(name)}">\n')]
        self._root = schema if isinstance(schema, Mapping) and bound else {}
        if not bound:
            body.append(f"{self._write_parameter(rule + 'x', None, True)}*")
        elif schema:
            root = self._flatten(schema)
            if wrong := sorted(root.keys() - _ROOT_KEYS):
                raise SchemaError(f"{wrong[0]} stands at its top, where only properties can be; move it into them")
            if root.get("type", "object") != "object":
                raise SchemaError(f"its type is {root['type']!r}; arguments are an object")
            properties, required = root.get("properties", {}), root.get("required", [])
            if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
                raise SchemaError("properties must be an object and required a list")
            listed = {**properties, **{key: True for key in required if key not in properties}}
            parts = [self._write_parameter(f"{rule}p{i}", key, inner) for i, (key, inner) in enumerate(listed.items())]
            ordered = self._forced or self._strict
            others = root.get("additionalProperties", not ordered or "properties" not in root)
            more = [] if others is False else [self._write_parameter(rule + "x", None, others, tuple(listed))]
            if ordered:
                body += [part + "?" * (key not in required) for key, part in zip(listed, parts, strict=True)]
                body += [f"{part}*" for part in more]
            elif parts or more:
                body.append(self._write_set(rule + "s", dict(zip(listed, parts, strict=True)), required, more))
        self.lines.append(f"{rule}: {' '.join(body)}")
        return rule

    def _write_set(self, rule: str, parts: Mapping[str, str], required: Sequence[str], more: Sequence[str]) -> str:
        """Each of the `parts` once at most, the required ones surely, and any number of `more`, in any order."""
        needed = [part for name, part in parts.items() if name in required]
        once = (needed + [part for name, part in parts.items() if name not in required])[:_BITS]
        bits = min(len(needed), _BITS)
        ways = [f'"" %if is_ones([0:{bits}])' if bits else '""']
        ways += [f"{part} {rule}::set_bit({i}) %if bit_clear({i})" for i, part in enumerate(once)]
        ways += [f"{part} {rule}::_" for part in (*parts.values(), *more) if part not in once]
        self.lines.append(f"{rule}::_: {' | '.join(ways)}")
        return f"{rule}::0x0"

    def _write_parameter(self, rule: str, name: str | None, schema: Any, taken: tuple[str, ...] = ()) -> str:
        """One parameter, or one of any name that is not `taken`."""
        texts, others = self._split(schema)
        values = [f'"true\\">" {text}' for text in texts]
        if others:
            one = others[0] if len(others) == 1 else {"anyOf": others}
            guidance = _STYLE if self._strict else _STYLE | {"lenient": True, "coerce_one_of": True}
            definitions = {key: self._root[key] for key in _DEFINITIONS if key in self._root}
            self.lines.append(f"{rule}j: %json {json.dumps({**definitions, **one, 'x-guidance': guidance})}")
            values.append(f'"false\\">" {rule}j "</"')
        if not values:
            raise SchemaError(f"the parameter {name!r} admits no value")
        if name is None:
            # One word with its tag: cut into pieces, no name could begin as a listed one does.
            but = f' & ~/parameter name="(?:{"|".join(map(_escape, taken))})" string="/' if taken else ""
            label = rule.upper()
            self.lines.append(f'{label}: /parameter name="[^"\\n]+" string="/{but}')
        else:
            label = _literal(f'parameter name="{_checked(name)}" string="')
        self.lines.append(f'{rule}: "<" {self.dsml} {label} ({" | ".join(values)}) {self.dsml} "parameter>\\n"')
        return rule

    def _split(self, schema: Any, depth: int = 0) -> tuple[list[str], list[dict[str, Any]]]:
        """The texts that a schema admits, as Lark expressions with the `</` behind them, and schemas of the rest."""
        if schema is False:
            return [], []
        schema = self._flatten({} if schema is True else schema, depth)
        for key in ("anyOf", "oneOf"):
            if key in schema:
                rest = {k: v for k, v in schema.items() if k != key}
                halves = [self._split(_merge(branch, rest), depth + 1) for branch in schema[key]]
                others = [other for half in halves for other in half[1]]
                return [text for half in halves for text in half[0]], [{key: others}] if len(others) > 1 else others
        types = schema.get("type", _TYPES)
        types = [types] if isinstance(types, str) else list(types)
        if wrong := [each for each in types if each not in _TYPES]:
            raise SchemaError(f"the type {wrong[0]!r} is none of {', '.join(_TYPES)}")
        is_text = "string" in types and ("type" in schema or not _NO_TEXT & schema.keys())
        schema = {**schema, "type": [each for each in types if each != "string"]}
        values = schema.pop("enum", None)
        values = [schema.pop("const")] if "const" in schema else values
        if values is not None:
            texts = [_literal(f"{value}</") for value in values if isinstance(value, str)] if is_text else []
            left = [value for value in values if not isinstance(value, str)]
            return texts, [{**schema, "enum": left}] if left and schema["type"] else []
        return [self._text(schema)] * is_text, [schema] * bool(schema["type"])

    def _text(self, schema: Mapping[str, Any]) -> str:
        limits = []
        if "pattern" in schema:
            limits.append(_search(schema["pattern"]))
        if schema.keys() & {"minLength", "maxLength"}:
            limits.append(f"(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})")
        if schema.get("format") in _FORMATS:
            limits.append(_FORMATS[schema["format"]])
        if not limits:
            return "TEXT"
        name = f"TEXT{len(self.lines)}"
        limits = [rf"/(?:{limit})<\//" for limit in limits]
        self.lines.append(f"{name}: {' & '.join([*limits, 'TEXT'])}")
        return name

    def _flatten(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        """A schema without a reference or allOf at its top."""
        if not isinstance(schema, Mapping):
            raise SchemaError(f"{schema!r} stands where a schema is due")
        while "$ref" in schema or "allOf" in schema:
            depth += 1
            if depth > 32:
                raise SchemaError("its references go in circles")
            schema = dict(schema)
            parts = schema.pop("allOf", [])
            if "$ref" in schema:
                parts = [self._resolve(schema.pop("$ref")), *parts]
            for part in parts:
                schema = _merge(part, schema)
        if depth > 32:
            raise SchemaError("its references go in circles")
        return dict(schema)

    def _resolve(self, reference: Any) -> Any:
        node: Any = self._root
        for word in str(reference).split("/")[1:]:
            word = word.replace("~1", "/").replace("~0", "~")
            node = node.get(word) if isinstance(node, Mapping) else None
        if not str(reference).startswith("#/") or node is None:
            raise SchemaError(f"the reference {reference!r} leads nowhere; keep definitions in $defs of the schema")
        return node


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _checked(name: Any) -> str:
    if not isinstance(name, str) or not name or '"' in name or "\n" in name:
        raise SchemaError(f"the name {name!r} does not fit into a DSML tag; use no quotes or line ends")
    return name


def _merge(part: Any, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Both schemas in one."""
    part = {} if part is True else part
    if not isinstance(part, Mapping):
        raise SchemaError(f"{part!r} stands where a schema is due")
    merged = {**rest, **part}
    for key in part.keys() & rest.keys() - _ANNOTATIONS:
        if key == "properties":
            merged[key] = {**rest[key], **part[key]}
        elif key in ("required", "allOf"):
            merged[key] = [*rest[key], *part[key]]
        elif part[key] != rest[key]:
            raise SchemaError(f"{key} stands both inside and outside of a combination; write it into one place")
    return merged


def _search(pattern: Any) -> str:
    """A regular expression of the whole text for a pattern that may stand anywhere in it."""
    if not isinstance(pattern, str):
        raise SchemaError(f"the pattern {pattern!r} is no string")
    begins, ends = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    try:
        body = llguidance.regex_to_lark(pattern[begins : len(pattern) - ends], "dw")
    except ValueError as error:
        raise SchemaError(f"the pattern {pattern!r} is not understood ({error})") from None
    return f"{'' if begins else '(?s:.*)'}(?:{body}){'' if ends else '(?s:.*)'}"


def _escape(word: str) -> str:
    return "".join(c if c.isalnum() or c in "_- " else f"\\x{{{ord(c):x}}}" for c in word)
