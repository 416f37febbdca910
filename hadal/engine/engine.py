"""The step loop: requests join and leave between steps, and each step is one ragged forward without padding.

Above it stands `hadal.llm`, which turns text into ids and back; below it the model with its per-request states. No
token depends on how the loop went: a row's result has the same bits in any company, so prompts may be cut, states kept,
found again, rewound and dropped as suits memory and speed.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hadal.device import memory_available
from hadal.engine.check import find_faults
from hadal.engine.choosing import Choosing, Work
from hadal.engine.constraint import Constraint
from hadal.engine.disk import DiskStore
from hadal.engine.drafting import Drafting
from hadal.engine.memory import MemoryPlan, plan_memory
from hadal.engine.model import LanguageModel
from hadal.engine.options import EngineOptions, engine_options
from hadal.engine.prefix import PrefixStore
from hadal.engine.request import Request, RequestError, SamplingParams, check_prompt
from hadal.engine.sampler import Sampler
from hadal.engine.scheduler import Item, Limits, Plan, plan_step
from hadal.engine.stats import EngineStats
from hadal.kernels.pages import PAGE_TOKENS

_SCORED = 64 << 20  # bytes of a step's logits that only tell the log-probabilities of prompts
_LEAST_KEPT = 32  # tokens below which a prefix is computed sooner than kept
_log = logging.getLogger("hadal.engine")


class EngineBusy(RequestError):
    """The queue is full; the caller may try again."""


class Engine:
    """Runs many requests at once; not thread-safe: one thread calls every method but `prepare`.

    Token ids from `vocabulary` on, which a model may have as padding, are neither accepted nor chosen. `weights` bytes
    of the model are still to be read into memory. `plan` says how memory is divided, `stats` what happened so far;
    `options` are those of `EngineOptions`.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        device: torch.device | str = "cpu",
        vocabulary: int | None = None,
        weights: int = 0,
        **options: Any,
    ) -> None:
        self.options = engine_options(options)
        longest = model.config.max_position_embeddings
        self.max_context = self.options.max_context or longest
        if self.max_context > longest:
            raise RequestError(f"`max_context` is {self.max_context}; this model allows 2 to {longest}", "max_context")
        self.vocabulary = vocabulary or model.config.vocab_size
        if not 1 <= self.vocabulary <= model.config.vocab_size:
            raise RequestError(
                f"the tokenizer has {self.vocabulary} ids and the model only {model.config.vocab_size}; "
                "they do not belong together",
                "vocabulary",
            )
        self.device = torch.device(device)
        free = memory_available(self.device)
        self.plan = plan_memory(
            self.options, free=free, weights=weights, home=model.home_bytes, page=model.pool.page_bytes
        )
        self.stats = EngineStats()
        self.store = _open_store(model, self.options, self.plan) if self.options.prefix_cache else None
        self._model = model
        sampler, config = Sampler(self.vocabulary, self.device), model.config
        self._choosing = Choosing(sampler, config.eos_token_id, self.stats)
        self._drafting: Drafting | None = None
        drafter, wanted = model.drafter, self.options.speculation
        if drafter is not None and wanted != 0:
            most = drafter.most if wanted is None else min(drafter.most, wanted)
            self._drafting = Drafting(drafter, sampler, most, config.sliding_window)
        self._scored_rows = max(_SCORED // (4 * config.vocab_size), 1)
        self._ids = itertools.count()
        self._turn = 0
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    def close(self) -> None:
        """Write what waits to be kept on disk; the engine is of no use afterwards."""
        for request in [*self._running, *self._waiting]:
            self.abort(request)
        if self.store is not None:
            self.store.close()

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """Requests that hold no state."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that hold a state."""
        return len(self._running)

    @property
    def pages_in_use(self) -> int:
        """Pages that requests and kept prefixes hold, each counted once."""
        return self._model.pool.live

    def prepare(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: int = 0,
        priority: int = 0,
        tenant: str = "",
        leader: Request | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """A checked Request that is not queued yet; it leaves the queues alone, so any thread may call it.

        `stream` tells apart samples that share a seed. A request waits while its `leader` computes the same prompt,
        and takes only the tokens that its own `constraint` allows.
        Raises RequestError for an empty prompt, a prompt or stop id outside the vocabulary, a prompt that fills the
        context, or one that can never fit into memory.
        """
        check_prompt(prompt_ids, params, self.vocabulary, self.max_context)
        length = len(prompt_ids)
        self.plan.check(length)
        room = min(self.max_context, self.plan.tokens) - length
        limit = room if params.max_tokens is None else min(params.max_tokens, room)
        return Request(next(self._ids), tuple(prompt_ids), params, limit, stream, priority, tenant, leader, constraint)

    def submit(self, request: Request) -> None:
        """Queue a prepared request, to join the batch at a following step. Raises EngineBusy when the queue is full."""
        assert request.state is None and not request.finished
        most = self.options.max_waiting
        if most is not None and self.waiting + self.running >= most + self.options.max_concurrent:
            raise EngineBusy(f"{most} requests wait already; try again later")
        self._waiting.append(request)

    def abort(self, request: Request) -> None:
        """End a request now and free its state; nothing happens if it has ended already."""
        if not request.finished:
            request.finish_reason = "abort"
            self._leave(request, spoilt=False)

    def step(self) -> list[Request]:
        """Compute one ragged forward and return the requests that gained tokens or ended with an error."""
        began = time.perf_counter()
        with torch.inference_mode():
            work = self._begin(self._schedule())
            try:
                ready = self._compute(work, began) if work else []
            except BaseException as error:
                self._break_off(work, error)
                raise
        if not self.busy:
            self._check_idle()
        return ready

    def _compute(self, work: Sequence[Work], began: float) -> list[Request]:
        ready = self._choosing.choose(work, self._forward(work))
        if self._drafting is not None:
            self._drafting.draft(work, began)
        self._keep(work)
        for request in [r for r in ready if r.finished]:
            self._leave(request, spoilt=request.error is not None)
        return ready

    def _break_off(self, work: Sequence[Work], error: BaseException) -> None:
        """A step that fails leaves states nobody can trust; its requests fail, or begin anew after an interrupt."""
        for request in (w.request for w in work):
            if request.state is not None:
                if isinstance(error, Exception) and not request.finished:
                    request.error = f"the engine failed on this request ({type(error).__name__}); see its log"
                    request.finish_reason = "error"
                self._leave(request, spoilt=True)
                if not request.finished:
                    self._waiting.appendleft(request)

    def check(self) -> list[str]:
        """What is wrong with pages, references and queues; nothing, unless there is a mistake in the program."""
        held = self.store.states() if self.store is not None else []
        return find_faults(self._model.pool, self._running, self._waiting, held)

    def _schedule(self) -> Plan:
        self._turn += 1
        items = [self._item(r) for r in self._running]
        items += [self._item(r) for r in self._waiting if not r.follows]
        if not items:
            return Plan((), (), ())
        # The longest context decides how many rows one native step takes.
        longest = max(item.position if item.running else item.position + item.todo for item in items)
        longest += self.options.token_budget
        rows = max(min(self.options.token_budget, self._model.step_rows(longest)), 1)
        # What only the prefix store holds counts as free: it gives up what the plan needs.
        held = min(sum(len(r.state.pages) for r in self._running), self._model.pool.live)
        pages = max(self.plan.pages - held, 0)
        plan = plan_step(items, Limits(self.options.max_concurrent, rows, pages, chunk=rows), self._turn)
        self._make_room(len(plan.admit) + sum(1 + (count + drafts) // PAGE_TOKENS for _, count, drafts in plan.spans))
        return plan

    def _make_room(self, pages: int) -> None:
        """Have the prefix store give up what it must for so many new pages; its homes take the room of pages."""
        if self.store is not None:
            homes = self.store.home_bytes // max(self.plan.page, 1)
            short = pages + homes - (self.plan.pages - self._model.pool.live)
            if short > 0:
                self.store.shrink(short)

    def _item(self, request: Request) -> Item:
        known, state = len(request.token_ids), request.state
        if state is None:
            return Item(request.id, request.priority, request.tenant, 0, known, bool(request.output_ids), 0, False, 0)
        position = state.position
        todo, decoding = known - position, bool(request.output_ids)
        room = min(len(request.drafts), request.limit - len(request.output_ids) - 1) if todo == 1 else 0
        return Item(
            request.id, request.priority, request.tenant, position, todo, decoding, room, True, len(state.pages),
            request.stops,
        )  # fmt: skip

    def _begin(self, plan: Plan) -> list[Work]:
        """Move states as the plan says, and collect what the forward is to compute."""
        requests = {r.id: r for r in (*self._running, *self._waiting)}
        for key in plan.preempt:
            self._preempt(requests[key])
        for key in plan.admit:
            self._admit(requests[key])
        work, left = [], self._scored_rows
        for key, count, drafts in plan.spans:
            request = requests[key]
            begin = request.computed  # a prefix that was found makes it more than the plan knew
            end = begin + min(count, len(request.token_ids) - begin)
            end = min([end, *(stop for stop in request.stops if stop > begin)])
            scored = 0
            if request.unscored is not None:
                first, last = max(begin, request.unscored), len(request.prompt_ids) - 1
                end = min(end, first + left)
                if end == begin:
                    continue  # others take all the logits of this step
                scored = max(min(end, last) - first, 0)
                left -= scored
            ids = request.token_ids[begin:end] + request.drafts[:drafts]
            rows = 1 + drafts if end == len(request.token_ids) else 0
            work.append(Work(request, ids, end - begin, rows, scored, end - begin))
        return work

    def _admit(self, request: Request) -> None:
        tokens, found = request.token_ids, None
        if self.store is not None:
            limit = len(tokens) - 1 if request.unscored is None else request.unscored
            found = self.store.lookup(tokens, request.tenant, limit)
            request.stops = self.options.stops(found.length, found.shared, len(tokens))
        state = found.state if found is not None and found.state is not None else self._model.new_state()
        if request.cached_tokens is None:
            request.admitted = time.monotonic()
            request.cached_tokens, request.cache_reason = state.position, "off" if found is None else found.reason
            self.stats.count_admission(len(request.prompt_ids), state.position, request.cache_reason)
            if self.store is not None:
                self.store.observe(request.prompt_ids, request.tenant)
        self._waiting.remove(request)
        self._running.append(request)
        request.state = state

    def _preempt(self, request: Request) -> None:
        self.stats.preemptions += 1
        self._running.remove(request)
        self._waiting.appendleft(request)
        pages = len(request.state.pages)
        self._hand_over(request, "preempted")
        self._make_room(pages)

    def _forward(self, work: Sequence[Work]) -> Tensor:
        ids = [i for w in work for i in w.ids]
        self.stats.count_step(len(ids), sum(w.count for w in work if not w.rows))
        states = [w.request.state for w in work]
        return self._model.advance(ids, [len(w.ids) for w in work], states, [w.scored + w.rows for w in work])

    def _keep(self, work: Sequence[Work]) -> None:
        """Take the snapshots that are due: at the end of a prompt, of a shared prefix, and every so many tokens."""
        if self.store is None:
            return
        for w in work:
            request, end = w.request, w.request.computed
            at_stop = end in request.stops and request.error is None
            if w.rows and len(request.output_ids) == 1 and not request.finished:
                kind = "turn"
            elif at_stop:
                kind = "interval" if end % self.options.snapshot_every == 0 else "common"
            else:
                continue
            if end >= _LEAST_KEPT:
                self.store.put(request.token_ids[:end], request.state.clone(), request.tenant, kind)

    def _leave(self, request: Request, spoilt: bool) -> None:
        """Take an ended request out of the queues; its state is kept unless it is `spoilt`."""
        for queue in (self._running, self._waiting):
            if request in queue:
                queue.remove(request)
        if spoilt:
            request.state = None
            request.drafts.clear()
        elif request.state is not None:
            self._hand_over(request, "output")

    def _hand_over(self, request: Request, kind: str) -> None:
        state, request.state = request.state, None
        request.drafts.clear()
        if self.store is not None and state.position >= _LEAST_KEPT:
            self.store.put(request.token_ids[: state.position], state, request.tenant, kind)

    def _check_idle(self) -> None:
        if faults := self.check():
            _log.error("integrity: %s", "; ".join(faults))
            self.stats.faults += len(faults)
            if self.store is not None:
                self.store.clear()  # what cannot be trusted must not be found


def _open_store(model: LanguageModel, options: EngineOptions, plan: MemoryPlan) -> PrefixStore:
    folder, disk = options.prefix_folder, None
    if folder is not None:
        disk = DiskStore(folder, model.state_key, options.prefix_disk)
    return PrefixStore(memory_bytes=plan.cache // 2, pool=model.pool, restore=model.restore_state, disk=disk)
