"""Bodies: what request bodies share, and what chat and completions ask of sampling in the same words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hadal.engine import RequestError, StructuredOutput
from hadal.server.errors import APIError
from hadal.server.settings import Settings

MOST_TOKENS = 393_216  # of one answer, as at DeepSeek
USER_ID = r"^[a-zA-Z0-9_-]{1,512}$"


class Body(BaseModel):
    """An object of a request: types are not bent, unknown fields are errors, and null counts as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # Client libraries replay messages with every optional field of their own types as null.
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data


class Habits(Body):
    """Parameters of other vendors that clients send by habit; they are accepted and have no effect."""

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    metadata: Any = None
    modalities: list[Literal["text"]] | None = None
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
    choice: list[str] | None = None
    grammar: str | None = None


class Structured(Body):
    """Spellings of structured output beyond `response_format`."""

    regex: str | None = None
    grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def structured(self, settings: Settings, **more: tuple[str, Any]) -> StructuredOutput | None:
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
            check_size(path, value, settings.schema_limit)
        try:
            return StructuredOutput(**{form: value})
        except RequestError as error:
            raise APIError(422, f"`{path}`: {error}", param=path) from None


class SamplingBody(Habits, Neutral, Structured):
    """How chat and completions choose tokens; absent is the model's own default. A smaller `priority` runs sooner."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]],
        BeforeValidator(lambda v: [v] if isinstance(v, str) else v, json_schema_input_type=str | list[str]),
    ] = Field([])
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([])
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

    def sampling(self, settings: Settings) -> dict[str, Any]:
        """The fields of SamplingParams that are the same in both APIs; APIError for what does not go together."""
        if len(self.stop) > settings.max_stops:
            raise APIError(
                422, f"`stop` has {len(self.stop)} strings; at most {settings.max_stops} are accepted", param="stop"
            )
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


def check_size(path: str, value: Any, limit: int) -> None:
    """APIError for a value of more than `limit` bytes as JSON."""
    if (size := len(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > limit:
        raise APIError(422, f"`{path}` takes {size} bytes; at most {limit} are accepted, make it smaller", param=path)


def _read_schema(path: str, value: Mapping[str, Any] | str) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise APIError(422, f"`{path}` is not JSON ({error}); send a JSON schema", param=path) from None
    if not isinstance(value, Mapping):
        raise APIError(422, f"`{path}` is no JSON schema; send an object", param=path)
    return value
