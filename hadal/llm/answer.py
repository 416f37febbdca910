"""Generation: one answer under way, and the values it gives, deltas while it runs and an output when it is done.

It turns the engine's tokens into text, reasoning and tool calls as they come, so finished outputs, the terminal's
iterator and the server's stream are all made of the same deltas.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from hadal.engine import Logprob, Request
from hadal.text import (
    Content,
    IncrementalDecoder,
    OutputParser,
    Prompt,
    Reasoning,
    SampledTurn,
    StopStrings,
    Tokenizer,
    find_sampled,
)
from hadal.text import ToolCall as WrittenCall
from hadal.text.tokens import THINK_CLOSE

FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call that the model made; `arguments` is the JSON text of an object."""

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape, which a later request can carry back."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to an answer; the last one has a finish reason. `logprobs` has one entry per token."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    reasons: int = 0  # how many of the tokens, the first ones, belong to the reasoning
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `text` is the content alone; `reasoning` is None when the model was not asked to think.

    `logprobs` holds per token a dict of id -> Logprob, the chosen token first; `token_ids` include the token that ended
    the answer. `error` explains finish reason "error".
    """

    index: int
    text: str
    token_ids: list[int]
    reasoning: str | None
    tool_calls: list[ToolCall]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The answers to one prompt, `n` of them; `prompt` is None when token ids were given.

    `num_cached_tokens` of the prompt were found in the prefix store. `prompt_logprobs` has an entry for each prompt
    token, the token itself first; nothing foretells the first one, whose entry is None.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


class Generation:
    """One answer under way: the engine's request and the text made of it so far."""

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None, chat: Prompt | None) -> None:
        self.request = request
        self.prompt = prompt
        self.reasoning_tokens = 0
        self.malformed = 0  # as OutputParser counts it
        self.finish_reason: FinishReason | None = None
        self.inbox: deque[Delta] | None = None  # deltas that a stream has yet to hand out
        self._tokenizer = tokenizer
        self._decoder = IncrementalDecoder(tokenizer)
        self._thinks = chat is not None and chat.end == "thinking"
        self._parser = None if chat is None else OutputParser(thinking=self._thinks)
        self._close = None if chat is None else tokenizer.token_id(THINK_CLOSE)
        self._stops = StopStrings(request.params.stop or ())
        self._seen = 0
        self._text = ""
        self._reasoning = ""
        self._tool_calls: list[ToolCall] = []

    def advance(self) -> Delta:
        """Turn the tokens that the engine added since the last call into a delta.

        A step with drafts may have added tokens behind a stop string or on both sides of the thinking's end, so such
        tokens are taken one by one: what counts does not depend on how many came at once. An end of thinking that ends
        none is not shown; the same words written out are text.
        """
        request, begin = self.request, self._seen
        new = request.output_ids[begin:]
        thinks = self._parser is not None and self._parser.thinks
        careful = len(new) > 1 and (bool(request.params.stop) or thinks or self._close in new)
        groups = [[i] for i in new] if careful else [new]
        told: list[tuple[str, str, list[ToolCall]]] = []
        reasons = 0
        for n, group in enumerate(groups, 1):
            reasons += len(group) * (self._parser is not None and self._parser.thinks)
            told.append(self._take(group, request.finished and n == len(groups)))
            if self._stops.matched is not None:
                break
        texts, reasonings, calls = zip(*told, strict=True)
        self.reasoning_tokens += reasons
        self.finish_reason = "stop" if self._stops.matched is not None else request.finish_reason
        if self.finish_reason == "stop" and self._tool_calls:
            self.finish_reason = "tool_calls"
        ids = tuple(request.output_ids[begin : self._seen])
        logprobs = tuple(self._named(entry) for entry in request.logprobs[begin : self._seen])
        made = tuple(call for some in calls for call in some)
        return Delta(
            "".join(texts), "".join(reasonings), made, ids, logprobs, reasons, self.finish_reason, request.error
        )

    def _take(self, ids: list[int], last: bool) -> tuple[str, str, list[ToolCall]]:
        """Text, reasoning and calls that became certain with these tokens."""
        self._seen += len(ids)
        # The token that ended the answer is not part of its text; neither is an end-of-sequence that was to be ignored.
        shown = ids[:-1] if last and self.request.finish_reason == "stop" else ids
        hidden = (self._tokenizer.eos_id, None if self._parser is None or self._parser.thinks else self._close)
        piece = self._decoder.feed([i for i in shown if i not in hidden])
        if last:
            piece += self._decoder.finish()
        reasoning, content, calls = self._parse(piece, last)
        text = self._stops.feed(content)
        if last:
            text += self._stops.finish()
        self._text += text
        self._reasoning += reasoning
        self._tool_calls += calls
        return text, reasoning, calls

    @property
    def tokens(self) -> int:
        """Tokens of the answer so far; those that a step computed behind a stop string are none."""
        return self._seen

    def output(self) -> CompletionOutput:
        """The answer so far."""
        request = self.request
        logprobs = None if request.params.logprobs is None else [self._named(e) for e in request.logprobs[: self._seen]]
        return CompletionOutput(
            index=request.stream,
            text=self._text,
            token_ids=request.output_ids[: self._seen],
            reasoning=self._reasoning if self._thinks or self._reasoning else None,
            tool_calls=list(self._tool_calls),
            logprobs=logprobs,
            finish_reason=self.finish_reason,
            error=request.error,
        )

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched

    @property
    def sampled(self) -> SampledTurn | None:
        """The answer for a later prompt to repeat; None unless it ended by itself or its limit, all of it shown."""
        request = self.request
        if self._parser is None or self._stops.matched is not None or request.finish_reason not in ("stop", "length"):
            return None
        ids = request.output_ids[:-1] if request.finish_reason == "stop" else request.output_ids
        return find_sampled(
            ids,
            self._tokenizer,
            thinking=self._thinks,
            reasoning=self._reasoning,
            content=self._text,
            calls=bool(self._tool_calls),
        )

    def prompt_logprobs(self) -> list[dict[int, Logprob] | None] | None:
        """Log-probabilities of the prompt's tokens as far as it is computed; None unless they were asked for."""
        entries = self.request.prompt_logprobs
        return None if entries is None else [entry and self._named(entry) for entry in entries]

    def _parse(self, piece: str, last: bool) -> tuple[str, str, list[ToolCall]]:
        if self._parser is None:
            return "", piece, []
        events = self._parser.feed(piece) + (self._parser.finish() if last else [])
        self.malformed = self._parser.malformed
        reasoning = "".join(e.text for e in events if isinstance(e, Reasoning))
        content = "".join(e.text for e in events if isinstance(e, Content))
        calls = [e for e in events if isinstance(e, WrittenCall)]
        return reasoning, content, [ToolCall(f"call_{uuid.uuid4().hex}", call.name, call.arguments) for call in calls]

    def _named(self, entry: dict[int, Logprob]) -> dict[int, Logprob]:
        return {i: dataclasses.replace(p, decoded_token=self._tokenizer.decode([i])) for i, p in entry.items()}
