"""The step loop: requests join and leave between steps, and each step is one ragged forward without padding.

Above it stands `hadal.llm`, which turns text into ids and back; below it the model with its per-request states.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hadal.config import ModelConfig
from hadal.engine.request import Request, RequestError, SamplingParams
from hadal.engine.sampler import Choice, sample


class LanguageModel(Protocol):
    """What the engine needs of `hadal.model.Model`."""

    @property
    def config(self) -> ModelConfig:
        """Vocabulary size, context length and end-of-sequence id are read from it."""

    def new_state(self) -> Any:
        """A fresh sequence state with `.position`."""

    def logits_ragged(self, ids_T: Tensor, lengths: list[int], states: list[Any], last_only: bool = True) -> Tensor:
        """Logits [B, V] after each packed span; advances the states."""


def plan_step(running: Sequence[Request], token_budget: int) -> list[tuple[Request, int]]:
    """Token spans for one step: every decode, then prompt chunks in order of arrival until the budget is spent."""
    decoding = [(r, 1) for r in running if r.computed >= len(r.prompt_ids)]
    left = token_budget - len(decoding)
    spans = list(decoding)
    for request in running:
        todo = len(request.prompt_ids) - request.computed
        if todo > 0 and left > 0:
            spans.append((request, min(todo, left)))
            left -= min(todo, left)
    return spans


class Engine:
    """Runs many requests at once; not thread-safe: one thread calls every method.

    At most `max_concurrent` requests run, the others wait in order. A step computes at most `token_budget` tokens, or
    one for each request where that is more, so a long prompt holds up the others for one chunk at a time. Token ids
    from `vocabulary` on, which a model may have as padding, are neither accepted nor chosen.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        device: torch.device | str = "cpu",
        max_concurrent: int = 16,
        token_budget: int = 512,
        max_context: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        if max_concurrent < 1:
            raise RequestError(f"`max_concurrent` is {max_concurrent}; at least one request must run", "max_concurrent")
        longest = model.config.max_position_embeddings
        if max_context is not None and not 2 <= max_context <= longest:
            raise RequestError(f"`max_context` is {max_context}; this model allows 2 to {longest}", "max_context")
        self.max_context = max_context or longest
        self.vocabulary = vocabulary or model.config.vocab_size
        if not 1 <= self.vocabulary <= model.config.vocab_size:
            raise RequestError(
                f"the tokenizer has {self.vocabulary} ids and the model only {model.config.vocab_size}; "
                "they do not belong together",
                "vocabulary",
            )
        self._model = model
        self.device = device
        self._max_concurrent = max_concurrent
        self._token_budget = max(token_budget, max_concurrent)
        self._ids = itertools.count()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    def prepare(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: int = 0) -> Request:
        """A checked Request that is not queued yet; it leaves the queues alone, so any thread may call it.

        `stream` tells apart samples that share a seed. Raises RequestError for an empty prompt, a prompt or stop id
        outside the vocabulary, or a prompt that fills the context.
        """
        if not prompt_ids:
            raise RequestError("the prompt is empty; give at least one token", "prompt")
        for i in (min(prompt_ids), max(prompt_ids)):
            if not 0 <= i < self.vocabulary:
                raise RequestError(f"token id {i} lies outside the vocabulary of {self.vocabulary}", "prompt")
        for i in params.stop_token_ids or ():
            if i >= self.vocabulary:
                raise RequestError(
                    f"stop token id {i} lies outside the vocabulary of {self.vocabulary}", "stop_token_ids"
                )
        room = self.max_context - len(prompt_ids)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds {self.max_context} including the "
                "answer; shorten the prompt",
                "prompt",
            )
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        return Request(next(self._ids), tuple(prompt_ids), params, limit, stream)

    def submit(self, request: Request) -> None:
        """Queue a prepared request; it joins the batch at a following step."""
        assert request.state is None and not request.finished
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request now and free its state; nothing happens if it has ended already."""
        if not request.finished:
            self._finish(request, "abort")

    def step(self) -> list[Request]:
        """Compute one ragged forward and return the requests that gained a token or ended with an error."""
        with torch.inference_mode():
            self._admit()
            spans = plan_step(self._running, self._token_budget)
            if not spans:
                return []
            packed = [request.pending(count) for request, count in spans]
            ids_T = torch.tensor([i for ids in packed for i in ids], dtype=torch.long, device=self.device)
            states = [request.state for request, _ in spans]
            logits_BV = self._model.logits_ragged(ids_T, [len(ids) for ids in packed], states, last_only=True)
            ready = [(b, r) for b, (r, _) in enumerate(spans) if r.computed >= len(r.prompt_ids)]
            if not ready:
                return []
            rows_BV = logits_BV[[b for b, _ in ready], : self.vocabulary].float().cpu()
            choices = sample(rows_BV, [r for _, r in ready])
        for (_, request), choice in zip(ready, choices, strict=True):
            self._accept(request, choice)
        return [request for _, request in ready]

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self._max_concurrent:
            self._waiting[0].state = self._model.new_state()  # it may fail, and then nobody gets lost
            self._running.append(self._waiting.popleft())

    def _accept(self, request: Request, choice: Choice) -> None:
        if choice.error is not None:
            request.error = choice.error
            return self._finish(request, "error")
        request.output_ids.append(choice.token_id)
        if request.params.logprobs is not None:
            request.logprobs.append(choice.logprobs)
        is_eos = choice.token_id == self._model.config.eos_token_id and not request.params.ignore_eos
        if is_eos or choice.token_id in (request.params.stop_token_ids or ()):
            self._finish(request, "stop")
        elif len(request.output_ids) >= request.limit:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: Any) -> None:
        request.finish_reason = reason
        request.state = None
        if request in self._running:
            self._running.remove(request)
        elif request in self._waiting:
            self._waiting.remove(request)
