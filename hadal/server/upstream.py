"""Upstream: tokens from a vLLM, SGLang or Hadal server at a URL, through its /v1/completions on token ids."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any, NoReturn

import httpx2 as httpx

from hadal.engine import Logprob, RequestError, StructuredOutput
from hadal.server.ask import Ask
from hadal.server.errors import APIError
from hadal.server.remote import Job, Piece
from hadal.text.tokens import DSML

_CONNECT_SECONDS = 5.0
_DOWN_SECONDS = 2.0  # that nobody is sent to a server which did not answer
_LONGEST_LINE = 64 << 20
_TOKEN = re.compile(r"token_id:(\d+)")
# How each kind of server is told whose prefixes a request may share.
_TENANT = {"vllm": "cache_salt", "sglang": "extra_key", "hadal": "user_id"}


class UpstreamError(ValueError):
    """A server that cannot be used as an upstream; the message names the cause and the remedy."""


class Upstream:
    """A Source. `model` is the server's name for its model, by default the first that it lists; `key` is sent to it.

    Where the server tells no token ids, its text is encoded. Raises UpstreamError when it is no such server.
    """

    def __init__(self, url: str, *, model: str | None = None, key: str | None = None) -> None:
        self._url = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        card = self._card(model)
        self._model: str = card["id"]
        owner = str(card.get("owned_by"))
        self._kind = owner if owner in _TENANT else "vllm"
        self.max_context = int(card.get("max_model_len") or card.get("context_length") or 0)
        if self.max_context < 2:
            raise UpstreamError(f"{self._url} does not say how long the context of {self._model!r} is; update it")
        self._client: httpx.AsyncClient | None = None
        self._down_until, self._down_cause = 0.0, ""

    def _card(self, model: str | None) -> dict[str, Any]:
        try:
            response = httpx.get(f"{self._url}/models", headers=self._headers, timeout=_CONNECT_SECONDS)
            response.raise_for_status()
            cards = {card["id"]: card for card in response.json()["data"]}
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            raise UpstreamError(f"{self._url}/models cannot be read ({error}); check address, key and server") from None
        if not cards or model not in (None, *cards):
            raise UpstreamError(f"{self._url} has no model {model!r}; it has {', '.join(cards) or 'none'}")
        card = cards[model] if model is not None else next(iter(cards.values()))
        assert isinstance(card, dict)
        return card

    def check(self, ask: Ask) -> None:
        """RequestError for what needs a grammar within an answer, which no server takes by this way."""
        structured = ask.sampling.get("structured")
        choice = ask.tool_choice if ask.tools else "auto"
        if choice not in ("auto", "none"):
            _refuse("a call of a tool cannot be forced", "leave out `tool_choice`", "tool_choice")
        if choice == "none" and self._kind == "hadal":
            _refuse("calls of tools cannot be forbidden", "leave out `tools`", "tool_choice")
        if ask.tools and choice == "auto" and not ask.parallel_tool_calls:
            _refuse("calls of tools cannot be limited to one", "allow parallel calls", "parallel_tool_calls")
        if any(tool["function"].get("strict") for tool in ask.tools):
            _refuse("strict tools cannot be held to their schemas", "leave out `strict`", "tools")
        if structured is not None and (ask.thinking or ask.tools):
            remedy = "switch thinking off and leave out tools"
            _refuse("structured output cannot begin after thinking or beside tools", remedy, "response_format")
        if structured is not None and not self._grammar(structured):
            _refuse(f"structured output by {structured.kind} is not understood", "use a JSON schema", "structured")
        if self._kind == "sglang" and ask.sampling.get("prompt_logprobs") is not None:
            _refuse("log-probabilities of prompts are not told", "leave them out", "prompt_logprobs")

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The job's answers; APIError when they cannot come."""
        body = self._body(job)
        reader = _Reader(job)
        async with self._post(body) as response:
            chunks = _events(response) if body["stream"] else _whole(response)
            async for chunk in chunks:
                for piece in reader.read(chunk):
                    yield piece

    async def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    @asynccontextmanager
    async def _post(self, body: Mapping[str, Any]) -> AsyncIterator[httpx.Response]:
        """The response under way. Leaving it early closes the connection, by which the server notices."""
        if self._client is None:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
            timeout = httpx.Timeout(None, connect=_CONNECT_SECONDS)
            self._client = httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout)
        if time.monotonic() < self._down_until:
            raise _unavailable(self._down_cause)
        try:
            async with self._client.stream("POST", f"{self._url}/completions", json=body) as response:
                if response.status_code != 200:
                    raise _failure(response, await response.aread())
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            self._down_until, self._down_cause = time.monotonic() + _DOWN_SECONDS, str(error)
            raise _unavailable(error) from error
        except httpx.HTTPError as error:
            raise _unavailable(error) from error

    def _body(self, job: Job) -> dict[str, Any]:
        request, params, hadal = job.request, job.request.params, self._kind == "hadal"
        body: dict[str, Any] = {
            "model": self._model, "prompt": list(request.prompt_ids), "max_tokens": request.limit, "n": params.n,
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k or -1,
            "ignore_eos": params.ignore_eos, "return_token_ids": True, "stream": params.prompt_logprobs is None,
        }  # fmt: skip
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if not hadal:
            body |= {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        if params.seed is not None:
            body["seed"] = params.seed
        if params.stop_token_ids:
            body["stop_token_ids"] = list(params.stop_token_ids)
        if params.logprobs is not None:
            body |= {"logprobs": params.logprobs, "return_tokens_as_token_ids": True}
        if params.prompt_logprobs is not None:
            body["prompt_logprobs"] = params.prompt_logprobs
        if params.structured is not None:
            body |= self._grammar(params.structured)
        if job.ask.tools and job.ask.tool_choice == "none":
            body["logit_bias"] = {str(job.tokenizer.token_id(DSML)): -100}
        if hadal:  # others refuse a priority unless they are told to heed it
            body["priority"] = -max(min(request.priority, 8), -8)
        if job.tenant.strip("/"):
            body[_TENANT[self._kind]] = blake2b(job.tenant.encode(), digest_size=16).hexdigest()
        return body

    def _grammar(self, structured: StructuredOutput) -> dict[str, Any]:
        """Structured output in the server's words; empty when it has none for it."""
        kind = structured.kind
        value = getattr(structured, kind)
        if self._kind != "sglang":
            return {"structured_outputs": {"json" if kind == "json_schema" else kind: value}}
        if kind == "choice":
            return {"regex": "|".join(f"({re.escape(word)})" for word in value)}
        schema = {"type": "object"} if kind == "json_object" else value
        forms = {"regex": ("regex", value)} | dict.fromkeys(("json_schema", "json_object"), ("json_schema", schema))
        name, found = forms.get(kind, ("", None))
        return {name: found if isinstance(found, str) else json.dumps(found)} if name else {}


class _Reader:
    """Makes pieces of what the server sends about one job."""

    def __init__(self, job: Job) -> None:
        self._tokenizer, self._job = job.tokenizer, job

    def read(self, data: bytes) -> list[Piece]:
        """The pieces of a chunk, or of a whole response; APIError for the server's error or what is no answer."""
        try:
            chunk = json.loads(data)
            if error := chunk.get("error"):
                raise _broken(error)
            pieces = [self._piece(choice) for choice in chunk.get("choices") or ()]
            if usage := chunk.get("usage"):
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                pieces.append(Piece(cached=min(int(cached), len(self._job.request.prompt_ids))))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise _failed(f"the server elsewhere sent what is no completion ({error})") from error
        return pieces

    def _piece(self, choice: Mapping[str, Any]) -> Piece:
        index, reason = int(choice["index"]), choice.get("finish_reason")
        params = self._job.generations[index].request.params  # which also says that there is such an answer
        lists = choice.get("logprobs") or {}
        tokens = lists.get("tokens") or []
        ids = choice.get("token_ids")
        if ids is None:
            ids = [self._id(token) for token in tokens] if tokens else self._tokenizer.encode(choice["text"])
        entries: list[dict[int, Logprob]] = []
        if params.logprobs is not None and ids:
            if len(tokens) != len(ids):
                raise ValueError("a token has no log-probability")
            tops = lists.get("top_logprobs") or [None] * len(ids)
            values = lists["token_logprobs"]
            found = zip(ids, values, tops, strict=True)
            entries = [self._entry(i, value, top, params.logprobs) for i, value, top in found]
        if reason == "stop" and not self._ended(ids, params.stop_token_ids):
            stopped = choice.get("stop_reason")
            ids = [*ids, stopped if isinstance(stopped, int) else self._tokenizer.eos_id]
            entries += [{ids[-1]: Logprob(0.0, 1)}] * (params.logprobs is not None)
        for i in ids:
            self._tokenizer.token_bytes(i)  # raises for an id that is none
        if reason not in (None, "stop", "length"):
            raise _failed(f"the server elsewhere ended the answer with {reason!r}")
        return Piece(index, tuple(ids), tuple(entries), reason, prompt_logprobs=self._scores(choice))

    def _ended(self, ids: list[int], stops: Any) -> bool:
        return bool(ids) and (ids[-1] == self._tokenizer.eos_id or ids[-1] in (stops or ()))

    def _entry(self, chosen: int, value: float, top: Mapping[str, float] | None, most: int) -> dict[int, Logprob]:
        best = sorted(((self._id(token), p) for token, p in (top or {}).items()), key=lambda pair: -pair[1])[:most]
        ranks = {i: Logprob(float(p), rank) for rank, (i, p) in enumerate(best, 1)}
        return {chosen: Logprob(float(value), ranks[chosen].rank if chosen in ranks else most + 1)} | ranks

    def _id(self, token: str) -> int:
        """The id of a token as the server spells it."""
        if found := _TOKEN.fullmatch(token):
            return int(found[1])
        ids = self._tokenizer.encode(token)
        if len(ids) != 1:
            raise ValueError(f"{token!r} is no token")
        return ids[0]

    def _scores(self, choice: Mapping[str, Any]) -> list[dict[int, Logprob] | None] | None:
        prompt = self._job.request.prompt_ids
        if self._job.request.params.prompt_logprobs is None:
            return None
        scores = [
            p and {int(i): Logprob(float(e["logprob"]), int(e["rank"])) for i, e in p.items()}
            for p in choice["prompt_logprobs"]
        ]
        if len(scores) != len(prompt):
            raise ValueError("a token of the prompt has no log-probability")
        return [p and {i: p[i]} | p for i, p in zip(prompt, scores, strict=True)]


async def _whole(response: httpx.Response) -> AsyncIterator[bytes]:
    yield await response.aread()


async def _events(response: httpx.Response) -> AsyncIterator[bytes]:
    """The data of each event up to the sentinel. Only line feeds end a line: JSON may hold other separators."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            field, _, data = line.partition(b":")
            if field == b"data":
                if data.strip() == b"[DONE]":
                    return
                yield data
        if len(rest) > _LONGEST_LINE:
            raise _failed("the server elsewhere sent a line without an end")


def _failed(cause: str) -> APIError:
    return APIError(500, f"{cause}; see its log", code="upstream_failed")


def _unavailable(cause: object) -> APIError:
    told = f"the server elsewhere does not answer ({cause}); send the request again"
    return APIError(503, told, code="upstream_unavailable", retry_after=_DOWN_SECONDS)


def _broken(error: Any) -> APIError:
    """What an error in the middle of a stream means."""
    overloaded = isinstance(error, Mapping) and (error.get("type") == "overloaded_error" or error.get("code") == 503)
    told = _told({"error": error})
    if isinstance(error, Mapping) and error.get("code") == "grammar_failed":
        return APIError(400, told, code="grammar_failed")
    return _unavailable(told) if overloaded else _failed(f"the server elsewhere failed: {told}")


def _failure(response: httpx.Response, body: bytes) -> APIError:
    """What a refusal means to our client: its own mistakes and full queues are told, our key and model are not his."""
    status = response.status_code
    try:
        told = _told(json.loads(body))
    except (ValueError, AttributeError):
        told = f"status {status}"
    if status in (429, 503):
        wait = response.headers.get("retry-after", "")
        code = "queue_full" if status == 429 else "upstream_unavailable"
        seconds = float(wait) if wait.isdigit() else _DOWN_SECONDS
        return APIError(status, f"the server elsewhere has no room: {told}", code=code, retry_after=seconds)
    if status in (400, 413, 422):
        return APIError(400, f"the server elsewhere refuses this request: {told}", code="upstream_refused")
    return _failed(f"the server elsewhere answers with status {status}: {told}")


def _told(body: Mapping[str, Any]) -> str:
    error = body.get("error", body)
    return str(error.get("message") if isinstance(error, Mapping) else error)[:500]


def _refuse(what: str, remedy: str, param: str) -> NoReturn:
    raise RequestError(f"{what} at the server elsewhere that answers here; {remedy}", param)
