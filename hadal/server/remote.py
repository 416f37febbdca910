"""RemoteBackend: prompts are rendered and answers read here, exactly as for a local model; tokens come from elsewhere.

A Source brings them: a server at a URL (`upstream`), or replicas of this engine on other machines (`ray`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import WeakKeyDictionary

from hadal.engine import EngineBusy, Logprob, Request, SamplingParams
from hadal.engine.request import check_prompt
from hadal.llm import LLM, Delta, Generation
from hadal.server.ask import Ask
from hadal.server.backend import Load, Ticket, prepare
from hadal.server.errors import APIError
from hadal.text import Tokenizer

_log = logging.getLogger("hadal.server")


@dataclass(frozen=True, slots=True)
class Piece:
    """What a source tells of a job: tokens of its answer `index`, why that ended, and what became of the prompt.

    `logprobs` has an entry for each token when they were asked for, `prompt_logprobs` for each of the prompt's.
    """

    index: int = 0
    ids: tuple[int, ...] = ()
    logprobs: tuple[dict[int, Logprob], ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    cached: int | None = None  # prompt tokens that need not be computed
    cache_reason: str = "elsewhere"  # why there are none, if there are none
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """The samples of one prompt."""

    ask: Ask
    tenant: str
    tokenizer: Tokenizer
    generations: Sequence[Generation]

    @property
    def request(self) -> Request:
        """What is the same for all samples."""
        return self.generations[0].request


class Source(Protocol):
    """An engine elsewhere. All but `check` is called in the event loop's thread."""

    max_context: int

    def check(self, ask: Ask) -> None:
        """RequestError for what it cannot do."""

    def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The job's answers; APIError when they cannot come. Closing it makes the engine stop within a step."""

    async def close(self) -> None:
        """Let go of it."""


class RemoteBackend:
    """A Backend around a source; `model` has the tokenizer, prompt sentences and habits, and needs no weights.

    At most `max_waiting` answers wait for their first token.
    """

    def __init__(self, source: Source, model: str | Path, *, max_waiting: int | None = 1024) -> None:
        self._source, self._max_waiting = source, max_waiting
        self._llm = LLM.without_weights(model, lambda tokenizer: _Engine(source.max_context, tokenizer.vocab_size))
        self.name, self.tokenizer, self.max_context = self._llm.name, self._llm.tokenizer, source.max_context
        self._asks: WeakKeyDictionary[Generation, tuple[Ask, str]] = WeakKeyDictionary()
        self._live: dict[Ticket, list[asyncio.Task[None]]] = {}
        self._first_seconds = 0.0  # moving average of the time to the first token

    @property
    def efforts(self) -> tuple[str, ...]:
        """The reasoning efforts that the model's prompt rules know."""
        return self._llm.efforts

    @property
    def load(self) -> Load:
        """An engine elsewhere does not tell its queue: the wait is what others waited of late, while somebody waits."""
        under_way = [g for ticket in self._live for g in ticket.generations if g.finish_reason is None]
        waiting = sum(not g.request.output_ids for g in under_way)
        full = self._max_waiting is not None and waiting >= self._max_waiting
        return Load(len(under_way) - waiting, waiting, self._first_seconds if waiting else 0.0, full)

    def prepare(self, ask: Ask, tenant: str) -> list[Generation]:
        """The answers-to-be; a ValueError of the room concerned says what cannot be served."""
        self._source.check(ask)
        generations = prepare(self._llm, ask, tenant)
        self._asks.update(dict.fromkeys(generations, (ask, tenant)))
        return generations

    def open(self, generations: Sequence[Generation]) -> Ticket:
        """Ask for prepared answers. Raises EngineBusy when as many wait as may."""
        most = self._max_waiting
        if most is not None and self.load.waiting + len(generations) > most:
            raise EngineBusy(f"{most} answers wait already; try again later")
        ticket = Ticket(generations, self._leave)
        self._live[ticket] = tasks = []
        for first, _ in enumerate(generations):
            if generations[first].request.leader is None:
                size = generations[first].request.params.n
                job = Job(*self._asks[generations[first]], self.tokenizer, generations[first : first + size])
                tasks.append(asyncio.ensure_future(self._follow(ticket, first, job)))
        return ticket

    def start(self) -> None:
        """Begin to work for the running event loop."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Stop; answers under way end with finish reason "abort". Called from another thread than the loop's."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()

    async def _close(self) -> None:
        for ticket in list(self._live):
            self._leave(ticket)
            for index, generation in enumerate(ticket.generations):
                if generation.finish_reason is None:
                    ticket.put(index, Delta(finish_reason="abort"))
        await self._source.close()

    def _leave(self, ticket: Ticket) -> None:
        for task in self._live.pop(ticket, []):
            task.cancel()

    async def _follow(self, ticket: Ticket, first: int, job: Job) -> None:
        """Read one job's answers into its ticket, where they begin at index `first`."""
        try:
            await self._read(ticket, first, job)
            return
        except APIError as error:
            failure = error
        except Exception:
            _log.exception("an answer from elsewhere could not be read")
            failure = APIError(500, "the answer of the engine elsewhere makes no sense", code="upstream_failed")
        ticket.failure = failure
        for index, generation in enumerate(job.generations):
            if generation.finish_reason is None:
                ticket.put(first + index, Delta(finish_reason="error", error=failure.message))

    async def _read(self, ticket: Ticket, first: int, job: Job) -> None:
        began, request = time.monotonic(), job.request

        def tell(index: int) -> None:
            generation = job.generations[index]
            ended = generation.request.finished
            # The end waits for what the prompt cost, which some servers tell behind it.
            if generation.finish_reason is None and not (ended and request.cached_tokens is None):
                ticket.put(first + index, generation.advance())

        async with aclosing(self._source.stream(job)) as pieces:
            async for piece in pieces:
                if request.admitted is None:
                    request.admitted = now = time.monotonic()
                    self._first_seconds += (now - began - self._first_seconds) / 8
                if piece.prompt_logprobs is not None:
                    request.prompt_logprobs = piece.prompt_logprobs
                generation = job.generations[piece.index]
                answer = generation.request
                # Token by token, as they are sampled: which of them are reasoning depends on those before.
                for token, entry in zip(piece.ids, piece.logprobs or [{}] * len(piece.ids), strict=True):
                    if not answer.finished and generation.finish_reason is None:
                        answer.append(token, entry, self.tokenizer.eos_id)
                        tell(piece.index)
                if piece.finish_reason is not None and not answer.finished:
                    answer.finish_reason = piece.finish_reason
                    tell(piece.index)
                if piece.cached is not None:
                    self._cost(request, piece.cached, piece.cache_reason)
                    for index, generation in enumerate(job.generations):
                        if generation.request.finished:
                            tell(index)
                if all(generation.finish_reason is not None for generation in job.generations):
                    break
        if request.cached_tokens is None:
            self._cost(request, 0, "elsewhere")
        for index, generation in enumerate(job.generations):
            if generation.finish_reason is None and not generation.request.finished:
                raise APIError(
                    503, "the engine elsewhere broke off its answer; send the request again",
                    code="upstream_unavailable", retry_after=1,
                )  # fmt: skip
            tell(index)

    def _cost(self, request: Request, cached: int, reason: str) -> None:
        request.cached_tokens, request.cache_reason = cached, "hit" if cached else reason


class _Engine:
    """What an LLM asks of its engine before anything is computed."""

    def __init__(self, max_context: int, vocabulary: int) -> None:
        self.max_context, self.vocabulary = max_context, vocabulary
        self._ids = itertools.count()

    def prepare(self, prompt_ids: Sequence[int], params: SamplingParams, **options: Any) -> Request:
        """A checked Request."""
        check_prompt(prompt_ids, params, self.vocabulary, self.max_context)
        room = self.max_context - len(prompt_ids)
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        return Request(next(self._ids), tuple(prompt_ids), params, limit, **options)
