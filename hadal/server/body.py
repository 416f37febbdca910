"""Bodies: what request bodies share, and what chat and completions ask of sampling in the same words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, model_validator
from starlette.requests import Request

from hadal.engine import MAX_STOP_IDS, MAX_STOPS, RequestError, StructuredOutput
from hadal.server.ask import Ask
from hadal.server.errors import APIError, validation_error
from hadal.server.service import Service
from hadal.server.settings import Settings

MOST_TOKENS = 393_216  # of one answer, as at DeepSeek
MOST_IDS = 1 << 22  # of all prompts of a request
MOST_VALUES = 500_000  # a body's fields, and its objects in lists; a conversation of 1M tokens has far fewer
USER_ID = r"^[a-zA-Z0-9_-]{1,512}$"
_MOST_FIELDS = 100  # of one object
_LARGE = 128 << 10  # bytes of a body whose checks take a while
_T = TypeVar("_T")


class FirstFault(FailFast):
    """A list tells its first fault and not all of them, for a body can hold a million."""

    __hash__ = object.__hash__  # unions of annotated types need one


Many = Annotated[list[_T], FirstFault(), Field(max_length=50_000)]
List = Annotated[list[_T], FirstFault(), Field(max_length=10_000)]
ModelName = Annotated[str, Field(max_length=256)]


class Body(BaseModel):
    """An object of a request: types are not bent, unknown fields are errors, and null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # Client libraries replay messages with every optional field of their own types as null.
        if not isinstance(data, dict):
            return data
        if len(data) > _MOST_FIELDS:
            raise ValueError(f"the object has {len(data)} fields, more than there are; leave the unknown ones out")
        return {k: v for k, v in data.items() if v is not None}


class Habits(Body):
    """Parameters of other vendors that clients send by habit; they are accepted and have no effect."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    metadata: Any = None
    modalities: List[Literal["text"]] | None = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    user: Any = None
    verbosity: Any = None

    @property
    def habits(self) -> tuple[str, ...]:
        """Those that were sent."""
        return tuple(name for name in Habits.model_fields if name in self.model_fields_set)


class Neutral(Body):
    """Parameters of other engines that are accepted with the one value that changes nothing."""

    repetition_penalty: float | None = Field(None, ge=1, le=1)
    min_p: float | None = Field(None, ge=0, le=0)
    min_tokens: int | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)


class StreamOptions(Body):
    """Usage rides on the last chunk whether it is asked for or not; chunks are not padded."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class StructuredOutputs(Body):
    """vLLM's object for structured output."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: Literal[True] | None = None
    regex: str | None = None
    choice: List[str] | None = None
    grammar: str | None = None


class Structured(Body):
    """Spellings of structured output beyond `response_format`."""

    regex: str | None = None
    grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: List[str] | None = None
    guided_grammar: str | None = None

    def structured(self, **more: tuple[str, Any]) -> StructuredOutput | None:
        """What the answer must be; `more` maps other fields to a form and its value. APIError for two of them."""
        nested = self.structured_outputs.model_dump(by_alias=True) if self.structured_outputs else {}
        given = {
            "regex": ("regex", self.regex),
            "grammar": ("grammar", self.grammar),
            "guided_json": ("json_schema", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "guided_grammar": ("grammar", self.guided_grammar),
            **{f"structured_outputs.{k}": ("json_schema" if k == "json" else k, v) for k, v in nested.items()},
            **more,
        }
        paths = [path for path, (_, value) in given.items() if value is not None]
        if len(paths) > 1:
            both = f"`{paths[0]}` and `{paths[1]}`"
            raise APIError(422, f"{both} both say what the answer must be; send one of them", param=paths[1])
        if not paths:
            return None
        (path,) = paths
        form, value = given[path]
        if form == "json_schema":
            value = _read_schema(path, value)
        try:
            return StructuredOutput(**{form: value})
        except RequestError as error:
            raise APIError(422, f"`{path}`: {error}", param=path) from None


class SamplingBody(Habits, Neutral, Structured):
    """How chat and completions choose tokens; absent is the model's own default. A smaller `priority` runs sooner."""

    model: ModelName
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        FirstFault(),
        Field(max_length=MAX_STOPS),
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=str | list[str]),
    ] = Field([])
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], FirstFault()] = Field([], max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    prompt_logprobs: int | None = Field(None, ge=0, le=20)
    return_token_ids: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user_id: str | None = Field(None, pattern=USER_ID)
    priority: int = Field(0, ge=-8, le=8)

    @model_validator(mode="after")
    def _scores_come_whole(self) -> SamplingBody:
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("`prompt_logprobs` come with a whole answer; set `stream` to false")
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields of SamplingParams that are the same in both APIs; APIError for what does not go together."""
        if self.stream_options is not None and not self.stream:
            raise APIError(400, "`stream_options` needs `stream` to be true", param="stream_options")
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "n": self.n,
            "seed": self.seed,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids),
            "ignore_eos": self.ignore_eos,
            "prompt_logprobs": self.prompt_logprobs,
        }


class Asking(Protocol):
    """A body that asks for answers."""

    @classmethod
    def model_validate(cls, obj: Any) -> Self:
        """The checked body; ValidationError says what is wrong."""

    def ask(self, settings: Settings) -> Ask:
        """The neutral form; APIError for what the settings do not admit."""


_B = TypeVar("_B", bound=Asking)


async def read(service: Service, request: Request, kind: type[_B], given: Any) -> tuple[_B, Ask]:
    """The body of a request, given as parsed JSON, and what it asks for; APIError says what is wrong with it.

    FastAPI's own check would hold up everybody: a large body is checked in a worker thread.
    """
    settings = service.settings

    def check() -> tuple[_B, Ask]:
        try:
            body = kind.model_validate(given)
        except ValidationError as error:
            raise validation_error(error.errors(include_url=False)) from None
        return body, body.ask(settings)

    def check_large() -> tuple[_B, Ask]:
        _check_count(given)
        return check()

    return check() if len(await request.body()) < _LARGE else await service.work(check_large)


def _check_count(given: Any) -> None:
    count, open_ = 0, [given] if isinstance(given, dict | list) else []
    while open_:
        value = open_.pop()
        count += len(value) if isinstance(value, dict) else 1
        if count > MOST_VALUES:
            raise APIError(422, f"the body has more than {MOST_VALUES:,} fields and objects; send fewer")
        inner = value.values() if isinstance(value, dict) else value
        open_ += [part for part in inner if isinstance(part, dict | list)]


def _read_schema(path: str, value: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise APIError(422, f"`{path}` is not JSON ({error}); send a JSON schema", param=path) from None
    if not isinstance(value, Mapping):
        raise APIError(422, f"`{path}` is no JSON schema; send an object", param=path)
    return value
