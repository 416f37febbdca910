"""POST /v1/messages: bodies in the shape of Anthropic's Messages API, and what they ask for.

Thinking is on unless the request or the model's name says otherwise, as at DeepSeek; Anthropic's own is off by default.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, SkipValidation

from hadal.engine import MAX_STOPS
from hadal.server.anthropic_wire import AnthropicWire
from hadal.server.ask import Ask
from hadal.server.body import MOST_TOKENS, Body, FirstFault, List, Many, ModelName, Structured, read
from hadal.server.errors import APIError
from hadal.server.parts import (
    Part,
    check_tools,
    join_texts,
    make_ask,
    plain_call,
    plain_choice,
    plain_tool,
    read_text_as,
)
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import decide
from hadal.server.wire import Context

# Claude Code starts its system prompt with a block of its own accounting that differs in every request: with it, no
# prompt would have a prefix in common with another.
_ATTRIBUTION = "x-anthropic-billing-header:"
# It also names the session within the user, and prefixes are to be shared between the sessions of one.
_SESSION = re.compile(r'(_session_|,?\s*"session_id":\s*")[0-9a-fA-F-]{36}"?')


class Text(Part):
    """A text of the system prompt."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {"text": ("text", "cache_control citations")}
    remedy: ClassVar[str] = "DeepSeek-V4 reads text only; send the content as text"
    text: str = ""
    cache_control: Any = None
    citations: Any = None


class Result(Text):
    """A part of a tool's result. The model is told of a picture, for a conversation that has one is to go on."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        **Text.kinds,
        "image": ("source", "cache_control"),
        "document": ("source", "title context citations cache_control"),
    }
    source: Any = None
    title: Any = None
    context: Any = None

    @property
    def said(self) -> str:
        """What the model reads."""
        return self.text if self.type == "text" else f"[{self.type} omitted: this model reads only text]"


class Block(Text):
    """A part of a message."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        **Text.kinds,
        "thinking": ("thinking", "signature cache_control"),
        "tool_use": ("id name input", "cache_control caller"),
        "tool_result": ("tool_use_id", "content is_error cache_control"),
    }
    remedy: ClassVar[str] = "DeepSeek-V4 reads text, thinking, tool_use and tool_result; leave other blocks out"
    thinking: str = ""
    signature: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field({})
    caller: Any = None
    tool_use_id: str = ""
    content: Annotated[List[Result], BeforeValidator(read_text_as("text"))] = Field([])
    is_error: bool = False


class Message(Body):
    """One message; a later system message is told with the user's words."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[List[Block], BeforeValidator(read_text_as("text"))]


class Tool(Part):
    """A function that the client runs."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "custom": (
            "name input_schema",
            "description strict cache_control allowed_callers defer_loading eager_input_streaming input_examples",
        )
    }
    remedy: ClassVar[str] = (
        "this server has no web or sandbox; leave the tool out, or give one of your own with `input_schema`"
    )
    type: str = "custom"
    name: str = Field("", pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any] = Field({})
    strict: bool = False
    cache_control: Any = None
    allowed_callers: Any = None
    defer_loading: bool = False
    eager_input_streaming: bool = False
    input_examples: Any = None

    @property
    def plain(self) -> dict[str, Any]:
        """The tool in the chat API's shape."""
        return plain_tool(self.name, self.input_schema, self.description, self.strict)


class Choice(Part):
    """Whether tools are to be called."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "auto": ("", "disable_parallel_tool_use"),
        "any": ("", "disable_parallel_tool_use"),
        "tool": ("name", "disable_parallel_tool_use"),
        "none": ("", ""),
    }
    remedy: ClassVar[str] = f"choose from {', '.join(kinds)}"
    name: str = ""
    disable_parallel_tool_use: bool = False

    @property
    def plain(self) -> str | dict[str, Any]:
        """The choice in the chat API's shape."""
        return plain_choice(self.name) if self.type == "tool" else {"any": "required"}.get(self.type, self.type)


class Thinking(Body):
    """The switch; neither a budget nor a display has an effect, and a model that may think does."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: str | None = None


class Format(Body):
    """What the text of the answer must be."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """How hard to think, and the form of the answer."""

    effort: str | None = None
    format: Format | None = None


class Metadata(Body):
    """Who asks."""

    user_id: str | None = Field(None, max_length=512)


class CountRequest(Body):
    """The body of POST /v1/messages/count_tokens: what makes the prompt."""

    model: ModelName
    messages: Many[Message] = Field(min_length=1)
    system: Annotated[List[Text], BeforeValidator(read_text_as("text"))] = Field([])
    thinking: Thinking | None = None
    output_config: OutputConfig = OutputConfig()
    output_format: Format | None = None
    tools: List[Tool] = Field([])
    tool_choice: Choice = Choice.model_construct(type="auto")
    metadata: Metadata | None = None
    max_tokens: int = Field(1, ge=1, le=MOST_TOKENS)
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], FirstFault()] = Field([], max_length=MAX_STOPS)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    cache_control: Any = None
    container: Any = None
    context_management: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    mcp_servers: Any = None
    service_tier: Any = None
    speed: Any = None

    def ask(self, settings: Settings) -> Ask:
        """What the body asks for; APIError for what the settings do not allow."""
        switch = [("thinking.type", self.thinking.type != "disabled")] if self.thinking else []
        effort = self.output_config.effort
        thinking = decide(settings, self.model, switch, [("output_config.effort", effort)] if effort else [])
        tools, choice = tuple(tool.plain for tool in self.tools), self.tool_choice.plain
        check_tools(settings, tools, choice)
        sampling = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": tuple(self.stop_sequences),
            "structured": Structured().structured(**self._formats()),
        }
        return make_ask(
            settings,
            thinking,
            sampling,
            model=self.model,
            messages=tuple(self._conversation()),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=not self.tool_choice.disable_parallel_tool_use,
            stream=self.stream,
            user_id=_SESSION.sub("", (self.metadata and self.metadata.user_id) or "") or None,
            ignored=tuple(dict.fromkeys(self._ignored())),
        )

    def _formats(self) -> dict[str, tuple[str, Any]]:
        forms = {"output_config.format.schema": self.output_config.format, "output_format.schema": self.output_format}
        return {path: ("json_schema", form.json_schema) for path, form in forms.items() if form is not None}

    @property
    def _is_attributed(self) -> bool:
        return bool(self.system) and self.system[0].text.startswith(_ATTRIBUTION)

    def _conversation(self) -> Iterator[dict[str, Any]]:
        """The messages in the chat API's shape; the last one is a start to go on from when the assistant has it."""
        if system := join_texts([part.text for part in self.system[self._is_attributed :]]):
            yield {"role": "system", "content": system}
        for message in self.messages:
            if message.role != "assistant":
                yield from _user_turn(message)
            else:
                turn = _assistant_turn(message)
                yield turn | {"prefix": True} if message is self.messages[-1] and "tool_calls" not in turn else turn

    def _ignored(self) -> Iterator[str]:
        for name in (
            "cache_control", "container", "context_management", "diagnostics", "inference_geo", "mcp_servers",
            "service_tier", "speed",
        ):  # fmt: skip
            if name in self.model_fields_set:
                yield name
        if self.thinking is not None:
            yield from (f"thinking.{name}" for name in sorted(self.thinking.model_fields_set - {"type"}))
        if self._is_attributed:
            yield "system[0]"
        blocks = [block for message in self.messages for block in message.content]
        if any(getattr(part, "cache_control", None) for part in (*self.system, *blocks, *self.tools)):
            yield "cache_control"
        if any(block.is_error for block in blocks):
            yield "is_error"
        yield from (f"tool_result.{part.type}" for block in blocks for part in block.content if part.type != "text")
        for name in ("allowed_callers", "defer_loading", "eager_input_streaming", "input_examples"):
            if any(getattr(tool, name) for tool in self.tools):
                yield f"tools.{name}"


class MessagesRequest(CountRequest):
    """The body of POST /v1/messages."""

    max_tokens: int = Field(ge=1, le=MOST_TOKENS)

    def wire(self, context: Context) -> AnthropicWire:
        """The message in this API's shape."""
        return AnthropicWire(context)


def _user_turn(message: Message) -> Iterator[dict[str, Any]]:
    for block in message.content:
        if block.type == "tool_result":
            said = join_texts([part.said for part in block.content])
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": said}
        elif block.type == "text":
            yield {"role": "user", "content": block.text}
        else:
            raise APIError(422, f"a {message.role} message holds a {block.type} block; only assistant messages may")


def _assistant_turn(message: Message) -> dict[str, Any]:
    blocks = message.content
    if any(block.type == "tool_result" for block in blocks):
        raise APIError(422, "an assistant message holds a tool_result block; put it into a user message")
    turn: dict[str, Any] = {
        "role": "assistant",
        "content": join_texts([block.text for block in blocks if block.type == "text"]),
    }
    if any(block.type == "thinking" for block in blocks):
        turn["reasoning_content"] = "".join(block.thinking for block in blocks)
    calls = [
        plain_call(block.id, block.name, json.dumps(block.input, ensure_ascii=False))
        for block in blocks
        if block.type == "tool_use"
    ]
    return turn | {"tool_calls": calls} if calls else turn


def router(service: Service) -> APIRouter:
    """The endpoints, under DeepSeek's prefix and for clients whose base URL is this server's root."""
    routes = APIRouter(tags=["messages"])

    @routes.post("/anthropic/v1/messages")
    @routes.post("/v1/messages", include_in_schema=False)
    async def messages(body: SkipValidation[MessagesRequest], request: Request) -> Response:
        """An answer to a conversation, whole or as a stream of events."""
        body, ask = await read(service, request, MessagesRequest, body)
        return await service.respond(request, "messages", ask, body.wire)

    @routes.post("/anthropic/v1/messages/count_tokens")
    @routes.post("/v1/messages/count_tokens", include_in_schema=False)
    async def count_tokens(body: SkipValidation[CountRequest], request: Request) -> dict[str, int]:
        """The tokens of the prompt that a conversation makes."""
        _, ask = await read(service, request, CountRequest, body)
        ids = await service.count(request, lambda: service.render(request, "messages", ask))
        return {"input_tokens": len(ids)}

    return routes
