"""ChatWire: a chat response in DeepSeek's shape, as chunks of a stream or in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import hadal
from hadal.llm import CompletionOutput, Delta
from hadal.server.errors import APIError
from hadal.server.logprobs import chat_logprobs, prompt_logprobs
from hadal.server.thinking import Thinking
from hadal.server.wire import COMMENT, Context, Event, Usage

FINGERPRINT = f"fp_hadal_{hadal.__version__}"


class ChatWire:
    """One response. Chunks carry either reasoning, or content, or calls; each answer ends with a chunk of its own.

    That last chunk has the finish reason and, for the last answer, the usage. With `shown` False reasoning is left out,
    with `token_ids` those of prompt and answers are told, as vLLM does.
    """

    done: str | None = "[DONE]"
    keep_alive = COMMENT

    def __init__(self, context: Context, *, shown: bool = True, token_ids: bool = False) -> None:
        self._context = context
        self._ask = context.ask
        self._shown = shown
        self._token_ids = token_ids
        self._thinking = Thinking(context.ask.thinking, context.ask.effort).to_dict()
        self._calls = [0] * len(context.generations)
        self._logprobs: int | None = context.ask.sampling.get("logprobs")

    def opening(self) -> list[Event]:
        """A chunk for each answer that names the role; the first one also echoes the thinking in effect."""
        events = [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._calls))]
        extra: dict[str, Any] = {"thinking": self._thinking}
        if self._token_ids:
            extra["prompt_token_ids"] = self._prompt_ids()
        assert isinstance(events[0].data, dict)
        events[0].data.update(extra)
        return events

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        """The chunks of a delta."""
        told = (self._reasoning(delta), self._content(delta), self._called(index, delta))
        fields = [part for part in told if part is not None]
        logprobs = self._logprobs_of(delta)
        if not fields and (logprobs or (self._token_ids and delta.token_ids)) and not delta.finish_reason:
            fields = [{"content": ""}]
        if delta.finish_reason is not None:
            fields.append({"content": ""})
        events = []
        for i, part in enumerate(fields):
            last = i == len(fields) - 1
            events.append(
                self._chunk(
                    index,
                    part,
                    logprobs=logprobs if i == 0 else None,
                    finish_reason=delta.finish_reason if last else None,
                    usage=usage if last else None,
                    token_ids=list(delta.token_ids) if i == 0 else [],
                )
            )
        return events

    def failed(self, error: APIError) -> list[Event]:
        """The error in place of a chunk."""
        return [Event(error.body)]

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        """The finished response."""
        body = self._head("chat.completion") | {
            "choices": [self._choice(i, output) for i, output in enumerate(outputs)],
            "usage": usage.to_openai(),
            "thinking": self._thinking,
        }
        if self._ask.sampling.get("prompt_logprobs") is not None:
            scores = self._context.generations[0].request.prompt_logprobs or []
            body["prompt_logprobs"] = prompt_logprobs(scores, self._context.tokenizer)
        if self._token_ids:
            body["prompt_token_ids"] = self._prompt_ids()
        return body

    def _choice(self, index: int, output: CompletionOutput) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": output.text}
        if self._shown and output.reasoning is not None:
            message["reasoning_content"] = output.reasoning
        if output.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in output.tool_calls]
        choice = {"index": index, "message": message, "logprobs": None, "finish_reason": output.finish_reason}
        if output.logprobs is not None:
            thought = self._context.generations[index].reasoning_tokens
            choice["logprobs"] = self._both(output.logprobs[:thought], output.logprobs[thought:])
        if self._token_ids:
            choice["token_ids"] = output.token_ids
        return choice

    def _reasoning(self, delta: Delta) -> dict[str, Any] | None:
        return {"content": None, "reasoning_content": delta.reasoning} if delta.reasoning and self._shown else None

    def _content(self, delta: Delta) -> dict[str, Any] | None:
        silent = {"reasoning_content": None} if self._ask.thinking and self._shown else {}
        return {"content": delta.text} | silent if delta.text else None

    def _called(self, index: int, delta: Delta) -> dict[str, Any] | None:
        first = self._calls[index]
        self._calls[index] += len(delta.tool_calls)
        calls = [{"index": first + i} | call.to_dict() for i, call in enumerate(delta.tool_calls)]
        return {"tool_calls": calls} if calls else None

    def _logprobs_of(self, delta: Delta) -> dict[str, Any] | None:
        thought, said = delta.logprobs[: delta.reasons], delta.logprobs[delta.reasons :]
        if self._logprobs is None or not (said or (thought and self._shown)):
            return None
        return self._both(thought, said)

    def _both(self, thought: Sequence[Any], said: Sequence[Any]) -> dict[str, Any]:
        top, tokenizer = self._logprobs or 0, self._context.tokenizer
        content = chat_logprobs(said, top, tokenizer)
        reasoning = chat_logprobs(thought, top, tokenizer) if self._shown and (self._ask.thinking or thought) else None
        return {"content": content, "reasoning_content": reasoning}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        usage: Usage | None = None,
        token_ids: Sequence[int] = (),
    ) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        if self._token_ids and token_ids:
            choice["token_ids"] = token_ids
        head = self._head("chat.completion.chunk")
        return Event(head | {"choices": [choice], "usage": None if usage is None else usage.to_openai()})

    def _head(self, kind: str) -> dict[str, Any]:
        context = self._context
        return {
            "id": f"chatcmpl-{context.id}",
            "object": kind,
            "created": context.created,
            "model": self._ask.model,
            "system_fingerprint": FINGERPRINT,
        }

    def _prompt_ids(self) -> list[int]:
        return list(self._context.generations[0].request.prompt_ids)
