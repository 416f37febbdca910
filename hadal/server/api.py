"""The HTTP face: chat completions in DeepSeek's shape over one Service, streamed as events or in one piece."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from hadal.llm import LLM, Delta, Generation
from hadal.server.protocol import APIError, ChatRequest, validation_error
from hadal.server.service import Service, Ticket

KEEP_ALIVE_SECONDS = 10.0
_POLL_SECONDS = 0.5  # how soon a client that left is noticed while nothing is sent
_CLIENT_GONE = 499


def create_app(llm: LLM, *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS) -> FastAPI:
    """The application that serves `llm`; its lifespan starts and stops the engine's thread.

    Raises PromptTextError when the model's directory lacks the sentences that conversations need.
    """
    efforts = llm.efforts
    service = Service(llm)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(title="Hadal", lifespan=lifespan)
    app.state.service = service
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unforeseen)

    @app.post("/v1/chat/completions")
    @app.post("/chat/completions", include_in_schema=False)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """One answer to a conversation; raises APIError 400 for what cannot be served."""
        if body.model != llm.name:
            raise APIError(
                400,
                f"model {body.model!r} does not exist; this server has {llm.name!r}",
                param="model",
                code="model_not_found",
            )
        generation = await asyncio.to_thread(_prepare, llm, body, efforts)
        answer = _Answer(generation, llm)
        if service.full:
            raise APIError(429, "too many requests run and wait here; send this one again later", code="queue_full")
        if body.stream:
            events = _stream(service, answer, request, keep_alive_seconds)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        whole = asyncio.ensure_future(_whole(service, answer, request))
        try:
            await asyncio.wait({whole}, timeout=keep_alive_seconds)
        except asyncio.CancelledError:
            whole.cancel()
            raise
        if whole.done():
            return JSONResponse(whole.result())
        return StreamingResponse(_patient(whole, keep_alive_seconds), media_type="application/json")

    @app.get("/v1/models")
    @app.get("/models", include_in_schema=False)
    async def models() -> dict[str, Any]:
        """The one model that is loaded."""
        card = {"id": llm.name, "object": "model", "created": created, "owned_by": "hadal"}
        return {"object": "list", "data": [card | {"context_length": llm.engine.max_context}]}

    @app.get("/livez")
    async def livez() -> dict[str, Any]:
        """Whether the process answers."""
        return {"status": "ok", "active_requests": service.active}

    return app


def _prepare(llm: LLM, body: ChatRequest, efforts: tuple[str, ...]) -> Generation:
    messages = [message.plain() for message in body.messages]
    effort = body.effort if body.effort in efforts else "high"  # rules without "low" start at "high"
    try:
        params, tools = llm.default_params(**body.sampling()), body.tool_schemas()
        (generation,) = llm.prepare_chat(messages, params, thinking=body.thinks, reasoning_effort=effort, tools=tools)
    except ValueError as error:
        raise APIError(400, str(error), param=getattr(error, "param", None)) from error
    return generation


class _Answer:
    """One chat completion in wire shape, chunk by chunk and whole."""

    def __init__(self, generation: Generation, llm: LLM) -> None:
        self.generation = generation
        self._tokenizer = llm.tokenizer
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": llm.name}
        self._calls = 0
        self._logprobs: dict[str, list[Any]] = {"content": [], "reasoning_content": []}

    def opening(self) -> dict[str, Any]:
        """The stream's first chunk, which names the role."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return self._head | {"object": "chat.completion.chunk", "choices": [choice]}

    def chunk(self, delta: Delta) -> dict[str, Any] | None:
        """The stream's chunk for `delta`, or None when there is nothing to tell yet."""
        fields: dict[str, Any] = {}
        choice: dict[str, Any] = {"index": 0, "delta": fields, "logprobs": None, "finish_reason": None}
        out = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        if delta.reasoning:
            fields["reasoning_content"] = delta.reasoning
        if delta.text:
            fields["content"] = delta.text
        if delta.tool_calls:
            fields["tool_calls"] = [
                {"index": self._calls + i} | call.to_dict() for i, call in enumerate(delta.tool_calls)
            ]
            self._calls += len(delta.tool_calls)
        choice["logprobs"] = self._logprobs_of(delta)
        if delta.finish_reason is not None:
            choice["finish_reason"] = delta.finish_reason
            out["usage"] = self._usage()
        return out if fields or delta.logprobs or delta.finish_reason else None

    def add(self, delta: Delta) -> None:
        """Gather what `whole` needs and the generation does not keep in wire shape."""
        for key, tokens in (self._logprobs_of(delta) or {}).items():
            self._logprobs[key] += tokens

    def whole(self) -> dict[str, Any]:
        """The completed answer, once every delta was added."""
        made = self.generation.output()
        message: dict[str, Any] = {"role": "assistant", "content": made.text}
        if made.reasoning is not None:
            message["reasoning_content"] = made.reasoning
        if made.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in made.tool_calls]
        logprobs = None if self.generation.request.params.logprobs is None else self._logprobs
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": made.finish_reason}
        return self._head | {"object": "chat.completion", "choices": [choice], "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        request = self.generation.request
        prompt, made, hit = len(request.prompt_ids), len(request.output_ids), request.cached_tokens or 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": made,
            "total_tokens": prompt + made,
            "prompt_cache_hit_tokens": hit,
            "prompt_cache_miss_tokens": prompt - hit,
            "prompt_tokens_details": {"cached_tokens": hit},
            "completion_tokens_details": {"reasoning_tokens": self.generation.reasoning_tokens},
        }

    def _logprobs_of(self, delta: Delta) -> dict[str, list[Any]] | None:
        """OpenAI's shape; tokens of the reasoning stand under DeepSeek's `reasoning_content`."""
        top = self.generation.request.params.logprobs
        if top is None or not delta.logprobs:
            return None
        out: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        for entry in delta.logprobs:
            shown = {
                i: {"token": p.decoded_token, "logprob": p.logprob, "bytes": list(self._tokenizer.token_bytes(i))}
                for i, p in entry.items()
            }
            best = sorted((p.rank, i) for i, p in entry.items() if p.rank <= top)
            chosen = shown[next(iter(entry))] | {"top_logprobs": [shown[i] for _, i in best]}
            out["reasoning_content" if delta.reasons else "content"].append(chosen)
        return out


async def _next(ticket: Ticket, request: Request, patience: float) -> Delta | None:
    """The next delta, or None after `patience` seconds; APIError when the client has left or the engine failed."""
    end = time.monotonic() + patience
    while True:
        delta = await ticket.next(min(patience, _POLL_SECONDS))
        if await request.is_disconnected():
            raise APIError(_CLIENT_GONE, "the client closed the connection")
        if delta is None:
            if time.monotonic() >= end:
                return None
        elif delta.finish_reason == "error":
            raise APIError(500, delta.error or "the engine failed on this request", code="engine_error")
        elif delta.finish_reason == "abort":
            raise APIError(503, "the server is shutting down; send the request again later", code="shutting_down")
        else:
            return delta


async def _stream(service: Service, answer: _Answer, request: Request, patience: float) -> AsyncIterator[str]:
    try:
        with service.open(answer.generation) as ticket:
            yield _event(answer.opening())
            sent = time.monotonic()
            delta = None
            while delta is None or delta.finish_reason is None:
                delta = await _next(ticket, request, patience)
                if delta is not None and (chunk := answer.chunk(delta)):
                    yield _event(chunk)
                elif time.monotonic() < sent + patience:
                    continue  # the model writes, but nothing that can be told yet
                else:
                    yield ": keep-alive\n\n"
                sent = time.monotonic()
    except APIError as error:  # the status line is long gone: the error travels as an event
        if error.status == _CLIENT_GONE:
            return
        yield _event(error.body)
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _whole(service: Service, answer: _Answer, request: Request) -> dict[str, Any]:
    with service.open(answer.generation) as ticket:
        finished = False
        while not finished:
            delta = await _next(ticket, request, _POLL_SECONDS)
            if delta is not None:
                answer.add(delta)
                finished = delta.finish_reason is not None
    return answer.whole()


async def _patient(whole: asyncio.Future[dict[str, Any]], patience: float) -> AsyncIterator[str]:
    """Blank lines, which JSON ignores, until the answer is there; an error breaks the body off, for 200 was sent."""
    try:
        while not whole.done():
            yield "\n"
            await asyncio.wait({whole}, timeout=patience)
        yield json.dumps(whole.result(), ensure_ascii=False)
    except APIError as error:
        if error.status != _CLIENT_GONE:  # nobody is there to be told
            raise
    finally:
        whole.cancel()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JSONResponse(error.body, status_code=error.status)


async def _invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _api_error(request, validation_error(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = (
        f"there is no {request.method} {request.url.path} here" if error.status_code in (404, 405) else error.detail
    )
    return await _api_error(request, APIError(error.status_code, message))


async def _unforeseen(request: Request, error: Exception) -> Response:
    return await _api_error(request, APIError(500, "the server failed on this request; see its log"))
