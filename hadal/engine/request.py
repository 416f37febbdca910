"""What a caller asks of the engine (SamplingParams) and how far it has come (Request)."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from hadal.engine.constraint import Constraint
from hadal.engine.speculation import DraftDepth

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_IDS = 128
MAX_SCORES = 1 << 20  # log-probabilities of a prompt, some 200 bytes each
MAX_SCHEMA = 256 * 1024  # bytes of a JSON schema, or of all tools together
MAX_GRAMMAR = 64 * 1024  # bytes of a regular expression, of a Lark grammar, or of all choices together


class RequestError(ValueError):
    """A request that cannot be served; the message names the cause and the remedy, `param` the offending parameter."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """What an answer must be, as exactly one of five; RequestError for none, several, or one beyond the size limits.

    `json_schema` asks for JSON of a schema, `json_object` for any JSON object, `regex` (Rust's syntax) and `grammar`
    (Lark, in llguidance's dialect) for text that matches as a whole, `choice` for one of several texts. It is compiled
    where text exists, above the engine.
    """

    json_schema: Mapping[str, Any] | None = None
    json_object: bool = False
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__slots__ if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured output has {' and '.join(given) or 'nothing'}; give exactly one of "
                f"{', '.join(self.__slots__)}",
                "structured",
            )
        name = self.kind
        value, limit = getattr(self, name), MAX_GRAMMAR
        if name == "json_schema":
            _check(name, value, isinstance(value, Mapping), "an object")
            value, limit = _as_json(value), MAX_SCHEMA
        elif name == "json_object":
            _check(name, value, value is True, "True or False")
            return
        elif name == "choice":
            ok = isinstance(value, list | tuple) and bool(value) and all(isinstance(c, str) and c for c in value)
            _check(name, value, ok, "a list of non-empty strings")
            object.__setattr__(self, name, tuple(value))
            value = "".join(value)
        else:
            _check(name, value, isinstance(value, str) and bool(value), "a non-empty string")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise RequestError(f"`{name}` holds half of a surrogate pair, which is no character", name) from None
        if size > limit:
            raise RequestError(f"`{name}` takes {size} bytes; at most {limit} are accepted, make it smaller", name)

    @property
    def kind(self) -> str:
        """The name of the one that is given."""
        return next(name for name in self.__slots__ if getattr(self, name) not in (None, False))


def _as_json(value: Mapping[str, Any]) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"`json_schema` is not JSON ({error})", "json_schema") from None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens and when to end, in vLLM's names; RequestError for a value out of range.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 switch those filters off. `max_tokens` None means up to the end
    of the context. `seed` None draws a fresh one for each request. `logprobs` N asks for the chosen token and the N
    likeliest, `prompt_logprobs` N for the same of each prompt token but the first. `stop` strings end the text in front
    of them; they are matched where text exists, above the engine. `structured` says what the answer must be;
    log-probabilities are then those among the tokens that it allows.
    """

    n: int = 1
    max_tokens: int | None = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | list[str] | tuple[str, ...] | None = ()
    stop_token_ids: list[int] | tuple[int, ...] | None = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    prompt_logprobs: int | None = None
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        stop = _as_tuple("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids))
        _check("n", self.n, _is_int(self.n) and 1 <= self.n <= 128, "an integer from 1 to 128")
        _check(
            "max_tokens",
            self.max_tokens,
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "a positive integer or None for the whole context",
        )
        _check("temperature", self.temperature, _is_real(self.temperature) and self.temperature >= 0, "a number >= 0")
        _check("top_p", self.top_p, _is_real(self.top_p) and 0 < self.top_p <= 1, "a number above 0 and at most 1")
        _check("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "0 (off) or a positive integer")
        in_range = self.seed is None or (_is_int(self.seed) and -(2**63) <= self.seed < 2**64)
        _check("seed", self.seed, in_range, "a 64-bit integer")
        stops_ok = len(stop) <= MAX_STOPS and all(isinstance(s, str) and s for s in stop)
        _check("stop", self.stop, stops_ok, f"at most {MAX_STOPS} non-empty strings")
        ids = self.stop_token_ids or ()
        ids_ok = len(ids) <= MAX_STOP_IDS and all(_is_int(i) and i >= 0 for i in ids)
        _check("stop_token_ids", self.stop_token_ids, ids_ok, f"at most {MAX_STOP_IDS} token ids >= 0")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            count_ok = count is None or (_is_int(count) and 0 <= count <= MAX_TOP_LOGPROBS)
            _check(name, count, count_ok, f"None or an integer from 0 to {MAX_TOP_LOGPROBS}")
        _check("ignore_eos", self.ignore_eos, isinstance(self.ignore_eos, bool), "True or False")
        known = self.structured is None or isinstance(self.structured, StructuredOutput)
        _check("structured", self.structured, known, "a StructuredOutput or None")


def _check(name: str, value: Any, ok: bool, wanted: str) -> None:
    if not ok:
        raise RequestError(f"`{name}` is {value!r}; it must be {wanted}", name)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    _check(name, value, value is None or isinstance(value, list | tuple), "a list")
    return tuple(value or ())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_prompt(prompt_ids: Sequence[int], params: SamplingParams, vocabulary: int, max_context: int) -> None:
    """Raise RequestError for an empty prompt, ids outside the vocabulary, or a prompt that fills the context."""
    if not prompt_ids:
        raise RequestError("the prompt is empty; give at least one token", "prompt")
    for i in (min(prompt_ids), max(prompt_ids)):
        if not 0 <= i < vocabulary:
            raise RequestError(f"token id {i} lies outside the vocabulary of {vocabulary}", "prompt")
    if params.prompt_logprobs is not None and len(prompt_ids) * (params.prompt_logprobs + 1) > MAX_SCORES:
        raise RequestError(
            f"`prompt_logprobs` asks for more than {MAX_SCORES} log-probabilities; ask for fewer or shorten the prompt",
            "prompt_logprobs",
        )
    for i in params.stop_token_ids or ():
        if i >= vocabulary:
            raise RequestError(f"stop token id {i} lies outside the vocabulary of {vocabulary}", "stop_token_ids")
    if len(prompt_ids) >= max_context:
        raise RequestError(
            f"the prompt has {len(prompt_ids)} tokens and the context holds {max_context} including the answer; "
            "shorten the prompt",
            "prompt",
        )


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token before temperature and filters, and its rank (1 = likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(eq=False, slots=True)
class Request:
    """One sequence in the engine. `stream` tells apart the samples of one prompt that share a seed."""

    id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    limit: int  # tokens that may be generated: max_tokens, cut at the end of the context
    stream: int = 0
    priority: int = 0  # higher runs first
    tenant: str = ""  # who asks: prefixes are shared within a tenant only, and tenants of one priority take turns
    leader: Request | None = None  # a request of the same prompt that computes it first
    constraint: Constraint | None = None
    seed: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    token_ids: list[int] = field(init=False)  # prompt, then output
    output_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # of the prompt's tokens as far as it is computed
    finish_reason: FinishReason | None = None
    error: str | None = None
    stuck: bool = False  # the error is of its constraint, which lets no token follow, and not of the engine
    state: Any = None  # the model's state of this sequence while it runs
    admitted: float | None = None  # when it first got a state, by time.monotonic
    cached_tokens: int | None = None  # prompt tokens found in the prefix store when it first ran
    cache_reason: str = ""  # "hit", or why no prefix was found
    drafts: list[int] = field(default_factory=list)  # guesses of the tokens after the last one
    depth: DraftDepth = field(default_factory=DraftDepth)
    stops: tuple[int, ...] = ()  # positions at which a snapshot is due

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed
        self.stop_ids = frozenset(self.params.stop_token_ids or ())
        self.token_ids = list(self.prompt_ids)
        if self.params.prompt_logprobs is not None and self.leader is None:
            self.prompt_logprobs = [None]  # nothing foretells the first token

    @property
    def finished(self) -> bool:
        """Whether no further token will come."""
        return self.finish_reason is not None

    @property
    def follows(self) -> bool:
        """Whether it still waits for another request to compute their prompt."""
        leader = self.leader
        return leader is not None and not leader.finished and not leader.output_ids

    @property
    def unscored(self) -> int | None:
        """The first position whose logits the prompt's log-probabilities still need; None when no position does."""
        scores = self.prompt_logprobs
        return None if scores is None or len(scores) == len(self.prompt_ids) else len(scores) - 1

    @property
    def computed(self) -> int:
        """Tokens that the model has seen."""
        return 0 if self.state is None else int(self.state.position)

    def append(self, token_id: int, logprobs: dict[int, Logprob], eos_id: int | None) -> None:
        """Take the next token of the answer; the request ends with its last one."""
        self.output_ids.append(token_id)
        self.token_ids.append(token_id)
        if self.params.logprobs is not None:
            self.logprobs.append(logprobs)
        is_eos = token_id == eos_id and not self.params.ignore_eos
        if is_eos or token_id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.output_ids) >= self.limit:
            self.finish_reason = "length"
