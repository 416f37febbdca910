"""POST /responses: bodies in the shape of OpenAI's Responses API, and what they ask for.

Stateless, as DeepSeek's: nothing is stored, so whatever refers to something stored is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, SkipValidation, model_validator

from hadal.engine import StructuredOutput
from hadal.server.ask import Ask
from hadal.server.body import Body, FirstFault, List, Many, ModelName, Structured, read
from hadal.server.items import NOTHING_STORED, Item, conversation, prompt_name
from hadal.server.parts import (
    Part,
    check_tools,
    join_texts,
    make_ask,
    plain_choice,
    plain_tool,
)
from hadal.server.responses_wire import ResponsesWire
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import decide
from hadal.server.wire import Context

_NO_TOOL = (
    "this server has no web, file store, or sandbox; leave it out, or give a tool that the client runs, as type "
    "'function' or 'custom'"
)
# Tools that OpenAI runs itself, and clients offer without being asked: they are taken and not shown to the model.
_BUILT_IN = (
    "web_search", "web_search_preview", "image_generation", "code_interpreter", "file_search", "local_shell",
    "computer_use_preview", "mcp",
)  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Tool(Part):
    """A function, or a tool that takes free text."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "function": ("name", "description parameters strict output_schema allowed_callers"),
        "custom": ("name", "description format allowed_callers"),
    }
    remedy: ClassVar[str] = _NO_TOOL
    name: Name = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool = False
    format: dict[str, Any] = Field({})
    output_schema: Any = None
    allowed_callers: Any = None

    def plain(self, name: str, heading: str) -> dict[str, Any]:
        """The tool in the chat API's shape. The grammar of a free text is told to the model and not enforced."""
        description = join_texts([text for text in (heading, self.description) if text]) or None
        if self.type == "function":
            return plain_tool(name, self.parameters, description, self.strict)
        definition = self.format.get("definition")
        grammar = f", in this grammar:\n{definition}" if definition else ""
        text = {"type": "string", "description": f"The whole input as free text{grammar}"}
        parameters = {"type": "object", "properties": {"input": text}, "required": ["input"]}
        return plain_tool(name, parameters, description, False)


class Entry(Tool):
    """One entry of `tools`: a tool, several under a namespace (Codex: those of an MCP server), or one of OpenAI's."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        **Tool.kinds,
        "namespace": ("name tools", "description"),
        **dict.fromkeys(_BUILT_IN, ("", "")),
    }
    tools: List[Tool] = Field([])

    @model_validator(mode="before")
    @classmethod
    def _built_in_by_type(cls, given: Any) -> Any:
        kind = given.get("type") if isinstance(given, dict) else None
        return {"type": kind} if kind in _BUILT_IN else given

    @property
    def named(self) -> list[tuple[str, Tool, str]]:
        """Its tools with namespace, and with what is to be said before the description: the namespace's own, once."""
        if self.type != "namespace":
            return [] if self.type in _BUILT_IN else [("", self, "")]
        return [(self.name, tool, "" if i else self.description or "") for i, tool in enumerate(self.tools)]


class Choice(Part):
    """A tool that must be called, or the tools among which to choose."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "function": ("name", ""),
        "custom": ("name", ""),
        "allowed_tools": ("mode tools", ""),
    }
    remedy: ClassVar[str] = _NO_TOOL
    name: str = ""
    mode: Literal["auto", "required"] = "auto"
    tools: List[dict[str, Any]] = Field([])


class Format(Part):
    """What the text of the answer must be."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "text": ("", ""),
        "json_object": ("", ""),
        "json_schema": ("name schema", "description strict"),
    }
    remedy: ClassVar[str] = f"choose from {', '.join(kinds)}"
    name: str = ""
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    description: str = ""
    strict: bool = True


class TextConfig(Body):
    """How the text is to be; `verbosity` has no effect."""

    format: Format = Format.model_construct(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """How hard to think; summaries are not made, the reasoning itself is told."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None


class ResponsesRequest(Body):
    """The body of POST /responses."""

    model: ModelName
    input: Annotated[
        Many[Item], BeforeValidator(lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v)
    ]
    instructions: str | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: List[Entry] = Field([])
    tool_choice: Literal["none", "auto", "required"] | Choice = "auto"
    reasoning: Reasoning = Reasoning()
    text: TextConfig = TextConfig()
    include: Annotated[list[str], FirstFault()] = Field([], max_length=64)
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, Any] = Field({})
    background: bool = False
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    store: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    parallel_tool_calls: bool = True
    max_tool_calls: int | None = None
    service_tier: str | None = None
    stream_options: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: Any = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    client_metadata: dict[str, Any] | None = None
    context_management: Any = None

    @model_validator(mode="after")
    def _possible(self) -> ResponsesRequest:
        for name in ("previous_response_id", "conversation", "prompt"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` names something stored, and {NOTHING_STORED}")
        if self.background:
            raise ValueError("`background` is not served, for nothing is stored; stream the response instead")
        return self

    @property
    def calls(self) -> dict[str, dict[str, str]]:
        """What the item of a call says of its tool, by the tool's name in the prompt."""
        return {
            prompt_name(namespace, tool.name): {
                "type": "function_call" if tool.type == "function" else "custom_tool_call",
                "name": tool.name,
            }
            | ({"namespace": namespace} if namespace else {})
            for entry in self.tools
            for namespace, tool, _ in entry.named
        }

    def ask(self, settings: Settings) -> Ask:
        """What the body asks for; APIError for what the settings do not allow."""
        effort = self.reasoning.effort
        thinking = decide(settings, self.model, [], [] if effort is None else [("reasoning.effort", effort)])
        tools, choice = self._tools()
        check_tools(settings, tools, choice)
        sampling = {
            "max_tokens": self.max_output_tokens or settings.default_max_tokens.of(thinking.enabled, thinking.effort),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.top_logprobs,
            "structured": self._structured(),
        }
        if self.top_logprobs is None and "message.output_text.logprobs" in self.include:
            sampling["logprobs"] = 0
        return make_ask(
            settings,
            thinking,
            sampling,
            model=self.model,
            messages=tuple(conversation(self.instructions, self.input)),
            tools=tuple(tools),
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            stream=self.stream,
            user_id=self.user,
            ignored=tuple(self._ignored()),
        )

    def wire(self, context: Context) -> ResponsesWire:
        """The response in this API's shape."""
        shown = self.model_dump(
            include={"instructions", "metadata", "tools", "tool_choice", "text", "reasoning", "top_logprobs", "user"},
            exclude_unset=True,
            by_alias=True,
        )
        if "tools" in shown:
            shown["tools"] = [tool for tool in shown["tools"] if tool["type"] not in _BUILT_IN]
        return ResponsesWire(context, shown, self.calls, seal="reasoning.encrypted_content" in self.include)

    def _tools(self) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
        choice, tools = self.tool_choice, [tool for entry in self.tools for tool in entry.named]
        if isinstance(choice, Choice) and choice.type == "allowed_tools":
            allowed = {tool.get("name") for tool in choice.tools}
            tools = [(space, tool, heading) for space, tool, heading in tools if {space, tool.name} & allowed]
            choice = choice.mode
        named = choice if isinstance(choice, str) else plain_choice(choice.name)
        return [tool.plain(prompt_name(space, tool.name), heading) for space, tool, heading in tools], named

    def _structured(self) -> StructuredOutput | None:
        form = self.text.format
        forms = {"json_object": (form.type, True), "json_schema": (form.type, form.json_schema)}
        path = "text.format.schema" if form.type == "json_schema" else "text.format"
        return Structured().structured(**{path: forms.get(form.type, ("", None))})

    def _ignored(self) -> Iterable[str]:
        for name in (
            "metadata", "truncation", "max_tool_calls", "service_tier", "stream_options",
            "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
            "client_metadata", "context_management",
        ):  # fmt: skip
            if name in self.model_fields_set:
                yield name
        if self.store:
            yield "store"
        if self.text.verbosity:
            yield "text.verbosity"
        yield from (f"tools.{kind}" for kind in _BUILT_IN if any(tool.type == kind for tool in self.tools))
        yield from (f"reasoning.{name}" for name in sorted(self.reasoning.model_fields_set - {"effort"}))
        known = ("message.output_text.logprobs", "reasoning.encrypted_content")
        yield from (f"include[{i}]" for i, name in enumerate(self.include) if name not in known)


def router(service: Service) -> APIRouter:
    """The endpoint, with and without /v1."""
    routes = APIRouter(tags=["responses"])

    @routes.post("/v1/responses")
    @routes.post("/responses", include_in_schema=False)
    async def responses(body: SkipValidation[ResponsesRequest], request: Request) -> Response:
        """An answer to a list of items, whole or as a stream of events."""
        body, ask = await read(service, request, ResponsesRequest, body)
        return await service.respond(request, "responses", ask, body.wire)

    return routes
