"""POST /responses: bodies in the shape of OpenAI's Responses API, and what they ask for.

Stateless, as DeepSeek's: nothing is stored, so whatever refers to something stored is refused.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, model_validator

from hadal.engine import StructuredOutput
from hadal.server.ask import Ask
from hadal.server.body import Body, Structured
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
from hadal.server.responses_wire import SEALED, ResponsesWire
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import decide
from hadal.server.wire import Context

_TEXT_ONLY = "DeepSeek-V4 reads text only; send the content as text"
_NO_TOOL = (
    'this server has no web, file store, or sandbox; leave the tool out (Codex: `web_search = "disabled"`), '
    "or give one that the client runs, as type 'function' or 'custom'"
)
_NOTHING_STORED = "nothing is stored here; send the whole conversation as `input`"
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class Text(Part):
    """A part of the content of an item."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "input_text": ("text", "prompt_cache_breakpoint"),
        "output_text": ("text", "annotations logprobs parsed"),
        "reasoning_text": ("text", ""),
        "summary_text": ("text", ""),
        "refusal": ("refusal", ""),
    }
    remedy: ClassVar[str] = _TEXT_ONLY
    text: str = ""
    refusal: str = ""
    annotations: Any = None
    logprobs: Any = None
    parsed: Any = None
    prompt_cache_breakpoint: Any = None


Texts = Annotated[list[Text], BeforeValidator(read_text_as("input_text"))]


class Item(Part):
    """One entry of `input`. Answers of this server can be sent back as they came."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {
        "message": ("role content", "id status phase"),
        "reasoning": ("", "id status content summary encrypted_content"),
        "function_call": ("call_id name arguments", "id status parsed_arguments namespace"),
        "function_call_output": ("output", "call_id name namespace id status"),
        "custom_tool_call": ("call_id name input", "id status namespace"),
        "custom_tool_call_output": ("call_id output", "id status"),
    }
    remedy: ClassVar[str] = f"what an item refers to is not here, for {_NOTHING_STORED}"
    type: str = "message"
    id: Any = None
    status: Any = None
    phase: Any = None
    role: Literal["user", "assistant", "system", "developer"] = "user"
    content: Texts = Field([])
    summary: list[Text] = Field([])
    encrypted_content: str = ""
    call_id: str = ""
    name: str = ""
    namespace: str = ""
    arguments: str = ""
    parsed_arguments: Any = None
    input: str = ""
    output: Texts = Field([])

    @property
    def said(self) -> str:
        """The text of a message or of a tool's result."""
        return join_texts([part.text or part.refusal for part in self.content or self.output])

    @property
    def result(self) -> dict[str, Any]:
        """A tool's result in the chat API's shape; one that nobody called (Codex: a goal) is told as the user's."""
        if self.call_id:
            return {"role": "tool", "tool_call_id": self.call_id, "content": self.said}
        name = _prompt_name(self.namespace, self.name)
        return {"role": "user", "content": f"{name}:\n{self.said}" if name else self.said}

    @property
    def thought(self) -> str:
        """The reasoning that an item carries, openly or sealed by this server; else what another one summed up."""
        if self.content:
            return "".join(part.text for part in self.content)
        if self.encrypted_content.startswith(SEALED):
            try:
                return base64.b64decode(self.encrypted_content[len(SEALED) :], validate=True).decode()
            except ValueError:
                return ""
        return join_texts([part.text for part in self.summary])

    @property
    def call(self) -> dict[str, Any]:
        """A call in the chat API's shape; free text is the one argument `input`."""
        free = self.type == "custom_tool_call"
        arguments = json.dumps({"input": self.input}, ensure_ascii=False) if free else self.arguments
        return plain_call(self.call_id, _prompt_name(self.namespace, self.name), arguments)


def _prompt_name(namespace: str, name: str) -> str:
    """What the model knows a tool by: DeepSeek-V4's format has no namespaces."""
    return f"{namespace}__{name}" if namespace else name


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
    """One entry of `tools`: a tool, or several under a namespace (Codex: those of an MCP server)."""

    kinds: ClassVar[Mapping[str, tuple[str, str]]] = {**Tool.kinds, "namespace": ("name tools", "description")}
    tools: list[Tool] = Field([])

    @property
    def named(self) -> list[tuple[str, Tool, str]]:
        """Its tools with namespace, and with what is to be said before the description: the namespace's own, once."""
        if self.type != "namespace":
            return [("", self, "")]
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
    tools: list[dict[str, Any]] = Field([])


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

    model: str
    input: Annotated[
        list[Item], BeforeValidator(lambda v: [{"role": "user", "content": v}] if isinstance(v, str) else v)
    ]
    instructions: str | None = None
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Entry] = Field([])
    tool_choice: Literal["none", "auto", "required"] | Choice = "auto"
    reasoning: Reasoning = Reasoning()
    text: TextConfig = TextConfig()
    include: list[str] = Field([])
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
                raise ValueError(f"`{name}` names something stored, and {_NOTHING_STORED}")
        if self.background:
            raise ValueError("`background` is not served, for nothing is stored; stream the response instead")
        return self

    @property
    def calls(self) -> dict[str, dict[str, str]]:
        """What the item of a call says of its tool, by the tool's name in the prompt."""
        return {
            _prompt_name(namespace, tool.name): {
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
            "structured": self._structured(settings),
        }
        if self.top_logprobs is None and "message.output_text.logprobs" in self.include:
            sampling["logprobs"] = 0
        return make_ask(
            settings,
            thinking,
            sampling,
            model=self.model,
            messages=tuple(_conversation(self.instructions, self.input)),
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
        return ResponsesWire(context, shown, self.calls, seal="reasoning.encrypted_content" in self.include)

    def _tools(self) -> tuple[list[dict[str, Any]], str | dict[str, Any]]:
        choice, tools = self.tool_choice, [tool for entry in self.tools for tool in entry.named]
        if isinstance(choice, Choice) and choice.type == "allowed_tools":
            allowed = {tool.get("name") for tool in choice.tools}
            tools = [(space, tool, heading) for space, tool, heading in tools if {space, tool.name} & allowed]
            choice = choice.mode
        named = choice if isinstance(choice, str) else plain_choice(choice.name)
        return [tool.plain(_prompt_name(space, tool.name), heading) for space, tool, heading in tools], named

    def _structured(self, settings: Settings) -> StructuredOutput | None:
        form = self.text.format
        forms = {"json_object": (form.type, True), "json_schema": (form.type, form.json_schema)}
        path = "text.format.schema" if form.type == "json_schema" else "text.format"
        return Structured().structured(settings, **{path: forms.get(form.type, ("", None))})

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
        yield from (f"reasoning.{name}" for name in sorted(self.reasoning.model_fields_set - {"effort"}))
        known = ("message.output_text.logprobs", "reasoning.encrypted_content")
        yield from (f"include[{i}]" for i, name in enumerate(self.include) if name not in known)


def _conversation(instructions: str | None, items: Iterable[Item]) -> list[dict[str, Any]]:
    """The items as chat messages.

    Reasoning, text and calls that follow one another are one turn. System messages at the start are one; DeepSeek-V4's
    format has no place for later ones, so they are told with the user's words.
    """
    system = [instructions] if instructions else []
    said: list[dict[str, Any]] = []
    for item in items:
        if item.type == "message" and item.role != "assistant":
            if item.role != "user" and not said:
                system.append(item.said)
            else:
                said.append({"role": "user", "content": item.said})
        elif item.type.endswith("_output"):
            said.append(item.result)
        else:
            if not said or said[-1]["role"] != "assistant":
                said.append({"role": "assistant", "content": ""})
            _add_to_turn(said[-1], item)
    return [*([{"role": "system", "content": join_texts(system)}] if system else []), *said]


def _add_to_turn(turn: dict[str, Any], item: Item) -> None:
    if item.type == "message":
        turn["content"] = join_texts([turn["content"], item.said]) if turn["content"] else item.said
    elif item.type != "reasoning":
        turn.setdefault("tool_calls", []).append(item.call)
    elif thought := item.thought:
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thought


def router(service: Service) -> APIRouter:
    """The endpoint, with and without /v1."""
    routes = APIRouter(tags=["responses"])

    @routes.post("/v1/responses")
    @routes.post("/responses", include_in_schema=False)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """An answer to a list of items, whole or as a stream of events."""
        return await service.respond(request, "responses", body.ask(service.settings), body.wire)

    return routes
