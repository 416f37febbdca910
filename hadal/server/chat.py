"""POST /chat/completions: bodies in DeepSeek's shape, with what clients of OpenAI, vLLM and SGLang send beyond it."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, SkipValidation, model_validator

from hadal.server.ask import Ask
from hadal.server.body import MOST_TOKENS, Body, List, Many, ModelName, SamplingBody, read
from hadal.server.chat_wire import ChatWire
from hadal.server.parts import check_tools, make_ask
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import Switch
from hadal.server.wire import MakeWire


class Message(Body):
    """One message; the chat codec judges content and keys.

    `reasoning` is another name of `reasoning_content`; name, refusal and annotations have no place in the format.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | List[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: List[Any] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: List[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_old_form(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("function_call"):
            raise ValueError("`function_call` is the old form of `tool_calls`; send that")
        return {k: v for k, v in data.items() if k != "function_call"} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _names_its_call(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs `tool_call_id`")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as the text room reads it: absent fields left out, OpenAI's developer as what it stands for."""
        plain = self.model_dump(exclude_none=True, exclude={"name", "refusal", "annotations", "reasoning"})
        if self.reasoning is not None:
            plain.setdefault("reasoning_content", self.reasoning)
        return plain | {"role": "system"} if self.role == "developer" else plain


class Function(Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """One entry of `tools`."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """The function of a named choice."""

    name: str


class NamedChoice(Body):
    """A `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: FunctionName


class JSONSchema(Body):
    """OpenAI's wrapping of a schema; answers keep to it whether `strict` or not."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What the content must be; it begins after the reasoning."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type 'json_schema' and the field `json_schema` belong together; send both or none")
        return self


class Conversation(Switch):
    """The part of a chat request that makes its prompt."""

    model: ModelName
    messages: Many[Message] = Field(min_length=1)
    tools: List[Tool] = Field([])
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None

    def plain_messages(self) -> tuple[dict[str, Any], ...]:
        """The messages for the chat codec, which has system messages at the front alone: later ones become the user's.

        So does the last of a conversation that has no others, for there must be something to answer.
        """
        plain = [message.plain() for message in self.messages]
        front = next((i for i, message in enumerate(plain) if message["role"] != "system"), len(plain) - 1)
        return tuple(
            {**message, "role": "user"} if i >= front and message["role"] == "system" else message
            for i, message in enumerate(plain)
        )


class ChatBody(Conversation, SamplingBody):
    """A chat request. `functions` and `function_call` are OpenAI's old forms and are refused by name."""

    parallel_tool_calls: bool = True
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    response_format: ResponseFormat | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="before")
    @classmethod
    def _no_old_forms(cls, data: Any) -> Any:
        for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if isinstance(data, dict) and data.get(old) is not None:
                raise ValueError(f"`{old}` is the old form of `{new}`; send that")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs` to be true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; give one of them")
        return self

    def ask(self, settings: Settings) -> Ask:
        """The neutral form; APIError for what the settings do not admit."""
        thinking = self.decide(settings, self.model)
        tools = tuple(tool.model_dump(exclude_none=True) for tool in self.tools)
        named = self.tool_choice or "auto"
        choice = named if isinstance(named, str) else named.model_dump()
        check_tools(settings, tools, choice)
        limit = self.max_tokens or self.max_completion_tokens
        return make_ask(
            settings,
            thinking,
            self.sampling()
            | {
                "max_tokens": limit or settings.default_max_tokens.of(thinking.enabled, thinking.effort),
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
                "structured": self.structured(**self._formats()),
            },
            model=self.model,
            messages=self.plain_messages(),
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            stream=self.stream,
            user_id=self.user_id,
            priority=-self.priority,
            ignored=self.habits + self.without_effect(thinking),
        )

    @property
    def wire(self) -> MakeWire:
        """What tells the answer as this request wants it."""
        return partial(ChatWire, shown=self.shown, token_ids=self.return_token_ids)

    def _formats(self) -> dict[str, tuple[str, Any]]:
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return {}
        if wanted.json_schema is None:
            return {"response_format": ("json_object", True)}
        return {"response_format.json_schema.schema": ("json_schema", wanted.json_schema.schema_)}


def router(service: Service) -> APIRouter:
    """The routes of chat."""
    routes = APIRouter(tags=["chat"])

    @routes.post("/v1/chat/completions")
    @routes.post("/chat/completions", include_in_schema=False)
    @routes.post("/beta/chat/completions", include_in_schema=False)
    @routes.post("/beta/v1/chat/completions", include_in_schema=False)
    async def chat_completions(body: SkipValidation[ChatBody], request: Request) -> Response:
        """Answers to a conversation, whole or as a stream of events."""
        body, ask = await read(service, request, ChatBody, body)
        return await service.respond(request, "chat", ask, body.wire)

    return routes
