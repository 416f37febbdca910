"""Request bodies of the chat API in DeepSeek's shape, validated to one clear error each, and OpenAI's error shape."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max", "ultra"]
# The vendor's folding of other vendors' effort names onto its three.
_EFFORTS = {"minimal": "low", "medium": "high", "xhigh": "high", "ultra": "max"}
DEFAULT_MAX_TOKENS = {False: 8192, True: 65536}  # by whether the model thinks


class APIError(Exception):
    """An error as the client sees it: HTTP status and OpenAI's `{"error": {message, type, param, code}}`."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code or kind}}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # Client libraries replay messages with every optional field of their own types as null.
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Message(_Body):
    """One message of the conversation; the chat codec judges content and keys. `name` has no place in the format."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Any = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    prefix: bool | None = None

    @model_validator(mode="after")
    def _names_its_call(self) -> Message:
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a tool message needs `tool_call_id`")
        return self

    def plain(self) -> dict[str, Any]:
        """The message as the text room reads it: absent fields left out."""
        return self.model_dump(exclude_none=True, exclude={"name"})


class Thinking(_Body):
    """DeepSeek's switch."""

    type: Literal["enabled", "disabled"]


class StreamOptions(_Body):
    """Usage rides on the last chunk whether asked for or not."""

    include_usage: bool = False


class ResponseFormat(_Body):
    """Only plain text."""

    type: str

    @model_validator(mode="after")
    def _text_only(self) -> ResponseFormat:
        if self.type != "text":
            raise ValueError(f"type {self.type!r} is not supported; use 'text'")
        return self


class ToolFunction(_Body):
    """A function that the model may call; `parameters` is a JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(_Body):
    """One entry of `tools`."""

    type: Literal["function"]
    function: ToolFunction


class ChatRequest(_Body):
    """POST /chat/completions. The two penalties are accepted and have no effect, as at DeepSeek."""

    model: str
    messages: list[Message] = Field(min_length=1)
    thinking: Thinking = Thinking(type="enabled")
    reasoning_effort: Effort = "high"
    max_tokens: int | None = Field(None, ge=1, le=393216)
    max_completion_tokens: int | None = Field(None, ge=1, le=393216)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = Field([], max_length=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto"] = "auto"
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    user: str | None = None
    user_id: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,512}$")

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` needs `stream` to be true")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs` to be true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("`max_tokens` and `max_completion_tokens` differ; give one of them")
        return self

    @property
    def thinks(self) -> bool:
        """Whether the answer starts with reasoning."""
        return self.thinking.type == "enabled"

    @property
    def effort(self) -> str:
        """low, high or max."""
        return _EFFORTS.get(self.reasoning_effort, self.reasoning_effort)

    def tool_schemas(self) -> list[dict[str, Any]] | None:
        """The tools that the prompt presents, or None."""
        if self.tool_choice == "none" or not self.tools:
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def sampling(self) -> dict[str, Any]:
        """The same wishes in the engine's terms, None where the model's own default counts."""
        return {
            "max_tokens": self.max_tokens or self.max_completion_tokens or DEFAULT_MAX_TOKENS[self.thinks],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
            "stop": self.stop,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }


def validation_error(errors: Sequence[Any]) -> APIError:
    """One sentence about the first of pydantic's errors, naming the field by its path in the body."""
    first = errors[0]
    path = ""
    for part in first["loc"][1:] if first["loc"][:1] == ("body",) else first["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    kind = first["type"]
    if kind == "json_invalid":
        return APIError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if kind == "extra_forbidden":
        return APIError(400, f"unknown field `{path}`; remove it", param=path, code="unknown_parameter")
    if kind == "missing" and path:
        return APIError(400, f"field `{path}` is missing", param=path, code="missing_required_parameter")
    message = str(first["msg"]).removeprefix("Value error, ")
    given = json.dumps(first.get("input"), default=str)
    shown = f" (given {given})" if kind != "value_error" and len(given) <= 60 else ""
    prefix = f"`{path}`: " if path else ""
    return APIError(400, f"{prefix}{message[:1].lower()}{message[1:]}{shown}", param=path or None)
