"""Parts: objects of a body that say by `type` which fields they have; and what all bodies with such parts check."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import model_validator

from hadal.engine import MAX_SCHEMA
from hadal.server.ask import Ask
from hadal.server.body import Body
from hadal.server.errors import APIError
from hadal.server.settings import Settings
from hadal.server.thinking import Thinking

UNHEEDED = ("temperature", "top_p")  # what DeepSeek's models do not heed while they think


class Part(Body):
    """One of several kinds of object. `type` has a default where clients may leave it out.

    `kinds` maps each kind to the fields it needs and those it may have besides; `remedy` is for any other kind.
    """

    kinds: ClassVar[Mapping[str, tuple[str, str]]]
    remedy: ClassVar[str]
    type: str

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        kind = given.get("type", cls.model_fields["type"].default)
        if not isinstance(kind, str):
            return given
        if kind not in cls.kinds:
            raise ValueError(f"type {kind!r} is not served; {cls.remedy}")
        needed, allowed = (names.split() for names in cls.kinds[kind])
        for name in needed:
            if name not in given:
                raise ValueError(f"type {kind!r} needs `{name}`")
        for name in given:
            if name in cls.model_fields and name not in ("type", *needed, *allowed):
                raise ValueError(f"type {kind!r} takes no `{name}`; remove it")
        return given


def read_text_as(kind: str) -> Any:
    """A validator that reads a plain text as a list of one part of that kind."""
    return lambda given: [{"type": kind, "text": given}] if isinstance(given, str) else given


def join_texts(texts: Sequence[str]) -> str:
    """Texts of one message, as the chat format joins its parts."""
    return "\n\n".join(texts)


def plain_tool(
    name: str, parameters: Mapping[str, Any] | None, description: str | None, strict: bool
) -> dict[str, Any]:
    """A function as the chat API's `tools` have it."""
    given = {"name": name, "description": description, "parameters": parameters, "strict": strict or None}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def plain_call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call as the chat API's `tool_calls` have it."""
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def plain_choice(name: str) -> dict[str, Any]:
    """A named choice as the chat API's `tool_choice` has it."""
    return {"type": "function", "function": {"name": name}}


def check_tools(settings: Settings, tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any]) -> None:
    """APIError for tools (in the chat API's shape, as `choice`) that are too many, too large, or not there."""
    if len(tools) > settings.max_tools:
        raise APIError(
            422, f"`tools` has {len(tools)} entries; at most {settings.max_tools} are accepted", param="tools"
        )
    if (size := len(json.dumps(tools, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > MAX_SCHEMA:
        raise APIError(422, f"`tools` take {size} bytes; at most {MAX_SCHEMA} are accepted, send fewer", param="tools")
    if isinstance(choice, str):
        if choice == "required" and not tools:
            raise APIError(
                422, "`tool_choice` demands a call and there are no `tools` to call; send some", param="tool_choice"
            )
    elif (name := choice["function"]["name"]) not in [tool["function"]["name"] for tool in tools]:
        raise APIError(422, f"`tool_choice` names {name!r}, which `tools` does not have", param="tool_choice")


def make_ask(settings: Settings, thinking: Thinking, sampling: Mapping[str, Any], **fields: Any) -> Ask:
    """An Ask of a conversation; strict settings heed a thinking request's sampling as little as DeepSeek."""
    strict = settings.history == "strict"
    heedless = UNHEEDED if strict and thinking.enabled else ()
    unheeded = tuple(name for name in heedless if sampling[name] is not None)
    return Ask(
        thinking=thinking.enabled,
        effort=thinking.effort,
        sampling={name: value for name, value in sampling.items() if value is not None and name not in unheeded},
        strict_history=strict,
        **fields | {"ignored": (*fields["ignored"], *unheeded)},
    )
