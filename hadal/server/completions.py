"""POST /completions: texts and token ids continued, or a middle filled in, in OpenAI's shape; nothing thinks here."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, SkipValidation, model_validator

from hadal.llm import CompletionOutput, Delta
from hadal.server.ask import Ask
from hadal.server.body import MOST_IDS, MOST_TOKENS, SamplingBody, read
from hadal.server.chat_wire import FINGERPRINT
from hadal.server.errors import APIError
from hadal.server.logprobs import CompletionLogprobs, join_lists, prompt_logprobs
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import decide
from hadal.server.wire import COMMENT, Context, Event, MakeWire, Usage

DEFAULT_MAX_TOKENS = 4096
MOST_PROMPTS = 128

Prompt = str | tuple[int, ...]


def _read_prompts(value: Any) -> tuple[Prompt, ...]:
    """One text or list of ids, or a list of these."""
    if isinstance(value, str) or _are_ids(value):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_PROMPTS:
        raise ValueError(f"give a text, token ids, or a list of 1 to {MOST_PROMPTS} of these")
    if sum(len(part) for part in value if isinstance(part, list)) > MOST_IDS:
        raise ValueError(f"give at most {MOST_IDS} token ids in all")
    return tuple(_read_prompt(part) for part in value)


def _read_prompt(value: Any) -> Prompt:
    if isinstance(value, str):
        return value
    if not _are_ids(value):
        raise ValueError("each prompt must be a text or a list of token ids")
    return tuple(value)


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and {*map(type, value)} == {int}


class CompletionBody(SamplingBody):
    """A completion request. With `max_tokens` 0, which needs `echo`, a token is computed and not told."""

    prompt: Annotated[
        tuple[Prompt, ...],
        BeforeValidator(_read_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=MOST_TOKENS)
    best_of: int | None = Field(None, ge=1)
    return_tokens_as_token_ids: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("`best_of` is not offered beyond `n`; leave it out")
        if not self.max_tokens and not self.echo:
            raise ValueError("`max_tokens` 0 needs `echo`; ask for at least one token")
        if self.suffix is not None and (self.echo or not all(isinstance(prompt, str) for prompt in self.prompt)):
            raise ValueError("`suffix` needs prompts that are texts, and no `echo`")
        return self

    def ask(self, settings: Settings) -> Ask:
        """The neutral form; APIError for what the settings do not admit."""
        decide(settings, self.model, [])
        scored = self.logprobs if self.echo else None
        wanted = [count for count in (scored, self.prompt_logprobs) if count is not None]
        return Ask(
            model=self.model,
            prompts=self.prompt,
            suffix=self.suffix,
            sampling=self.sampling()
            | {
                "max_tokens": max(self.max_tokens, 1),
                "logprobs": self.logprobs,
                "prompt_logprobs": max(wanted, default=None),
                "structured": self.structured(),
            },
            stream=self.stream,
            user_id=self.user_id,
            priority=-self.priority,
            ignored=self.habits,
        )

    @property
    def wire(self) -> MakeWire:
        """What tells the answer as this request wants it."""
        return partial(CompletionWire, body=self)


class CompletionWire:
    """One response in OpenAI's shape; an echoed prompt is the start of its answer's first piece."""

    done: str | None = "[DONE]"
    keep_alive = COMMENT

    def __init__(self, context: Context, *, body: CompletionBody) -> None:
        self._context = context
        self._body = body
        self._begun = [False] * len(context.generations)
        as_ids = body.return_tokens_as_token_ids
        self._logprobs = [
            CompletionLogprobs(body.logprobs or 0, context.tokenizer, as_ids) for _ in context.generations
        ]

    def opening(self) -> list[Event]:
        """Nothing: every chunk has text, or an end."""
        return []

    def feed(self, index: int, delta: Delta, usage: Usage | None) -> list[Event]:
        """A chunk for what can be told."""
        first, self._begun[index] = not self._begun[index], True
        choice = self._choice(index, delta.text, delta.token_ids, delta.logprobs, first=first)
        choice["finish_reason"] = delta.finish_reason
        told = choice["text"] or choice["logprobs"] or delta.finish_reason or self._body.return_token_ids
        return [Event(self._head([choice], usage))] if told else []

    def failed(self, error: APIError) -> list[Event]:
        """The error in place of a chunk."""
        return [Event(error.body)]

    def whole(self, outputs: Sequence[CompletionOutput], usage: Usage) -> dict[str, Any]:
        """The finished response."""
        choices = []
        for i, output in enumerate(outputs):
            choice = self._choice(i, output.text, output.token_ids, output.logprobs or (), first=True)
            choices.append(choice | {"finish_reason": output.finish_reason})
            if self._body.prompt_logprobs is not None:
                choices[-1]["prompt_logprobs"] = prompt_logprobs(self._scores(i), self._context.tokenizer)
        return self._head(choices, usage)

    def _choice(
        self, index: int, text: str, ids: Sequence[int], entries: Sequence[Any], *, first: bool
    ) -> dict[str, Any]:
        body, prompt = self._body, self._context.generations[index].request.prompt_ids
        lists = []
        if not body.max_tokens:
            text, ids, entries = "", (), ()
        if first and body.echo:
            given = self._given(index)
            text = self._echo(index) + text
            if body.logprobs is not None:
                lists.append(self._logprobs[index].lists(prompt[given:], self._scores(index)[given:]))
        if body.logprobs is not None and ids:
            lists.append(self._logprobs[index].lists(ids, entries))
        choice = {"index": index, "text": text, "logprobs": join_lists(lists) if lists else None}
        if body.return_token_ids:
            choice |= {"token_ids": list(ids)} | ({"prompt_token_ids": list(prompt)} if first else {})
        return choice

    def _given(self, index: int) -> int:
        """How many tokens in front of the prompt the client did not write: the begin-of-sentence of a text."""
        prompt = self._body.prompt[index // self._body.n]
        ids = self._context.generations[index].request.prompt_ids
        return int(isinstance(prompt, str) and len(ids) > len(self._context.tokenizer.encode(prompt)))

    def _echo(self, index: int) -> str:
        prompt = self._body.prompt[index // self._body.n]
        return prompt if isinstance(prompt, str) else self._context.tokenizer.decode(prompt)

    def _scores(self, index: int) -> Sequence[Any]:
        """Of the prompt's tokens; the first of its samples has them."""
        leader = self._context.generations[index - index % self._body.n]
        return leader.request.prompt_logprobs or ()

    def _head(self, choices: list[dict[str, Any]], usage: Usage | None) -> dict[str, Any]:
        context = self._context
        return {
            "id": f"cmpl-{context.id}",
            "object": "text_completion",
            "created": context.created,
            "model": context.ask.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": None if usage is None else usage.to_openai(),
        }


def router(service: Service) -> APIRouter:
    """The routes of completions."""
    routes = APIRouter(tags=["completions"])

    @routes.post("/v1/completions")
    @routes.post("/completions", include_in_schema=False)
    @routes.post("/beta/completions", include_in_schema=False)
    @routes.post("/beta/v1/completions", include_in_schema=False)
    async def completions(body: SkipValidation[CompletionBody], request: Request) -> Response:
        """Continuations of texts or token ids, or what belongs between a prompt and a suffix."""
        body, ask = await read(service, request, CompletionBody, body)
        return await service.respond(request, "completions", ask, body.wire)

    return routes
