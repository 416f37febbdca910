"""Which requests compute how many tokens in the next step: a pure function of what waits and runs, and of the limits.

The engine describes every request by an `Item` and does what the `Plan` says. Decodes come first, then prompts by
priority; tenants of equal priority share slots and tokens evenly; within a tenant every prompt moves a little and what
is left goes to the oldest and to the shortest in turn, so that neither waits for the other's whole length.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

PAGE_TOKENS = 128  # as in `hadal.kernels.pages`, which loads torch
USEFUL = 32  # tokens of a prompt that are worth computing in one step
PASSED_BY = 64  # keys behind that of the oldest request of a priority which may go before it while it waits for pages


@dataclass(frozen=True, slots=True)
class Item:
    """What the scheduler knows of one request.

    `key` is its order of arrival. `position` counts the tokens computed, or those of the stored prefix that a request
    without a state would begin with. `todo` >= 1 known tokens follow it; `decoding` says that outputs are among them.
    `drafts` tokens can be verified behind a decode's one. `running` requests hold a state, whose preemption gives back
    `freed` pages. No span passes over one of the ascending positions `stops`.
    """

    key: int
    priority: int
    tenant: str
    position: int
    todo: int
    decoding: bool
    drafts: int
    running: bool
    freed: int
    stops: tuple[int, ...] = ()

    @property
    def decodes(self) -> bool:
        """Whether its step is a decode; every other one is a prompt's."""
        return self.running and self.decoding and self.todo == 1

    @property
    def held(self) -> int:
        """Pages that it has and keeps; a request without a state copies the open page of its prefix."""
        return -(-self.position // PAGE_TOKENS) if self.running else self.position // PAGE_TOKENS

    @property
    def reserve(self) -> int:
        """Pages that it is going to need: for all its known tokens, and one to grow into."""
        return self.new_pages(self.todo) + 1

    def new_pages(self, tokens: int) -> int:
        """Pages that `tokens` more tokens take."""
        begin = self.position + PAGE_TOKENS - 1 if self.running else self.position
        return (self.position + tokens + PAGE_TOKENS - 1) // PAGE_TOKENS - begin // PAGE_TOKENS if tokens else 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Requests that may hold a state, rows in one step, free pages, and rows of a prompt that is not alone."""

    slots: int
    tokens: int
    pages: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Keys that get a state, keys that lose theirs first, and spans (key, tokens, drafts verified behind them)."""

    admit: tuple[int, ...]
    preempt: tuple[int, ...]
    spans: tuple[tuple[int, int, int], ...]


def plan_step(items: Sequence[Item], limits: Limits, turn: int) -> Plan:
    """The next step's plan; `turn` counts steps and only decides between equals.

    Every plan keeps the limits. Requests are preempted for those of higher priority that lack a slot or pages, and the
    youngest of the lowest priority for decodes that lack pages; the oldest running one of the highest never is.
    """
    return _plan_decodes(items, limits) or _Step(items, limits, turn).plan()


def _turned(tenants: Iterable[str], by: int) -> list[str]:
    names = sorted(tenants)
    return names[by % len(names) :] + names[: by % len(names)]


def _fairly(waiting: Sequence[Item], states: Counter[str], turn: int) -> Iterator[Item]:
    """By tenants with the fewest `states`, which the caller keeps up to date, and of a tenant the oldest first."""
    queues: dict[str, list[Item]] = {}
    for item in reversed(waiting):
        queues.setdefault(item.tenant, []).append(item)
    scattered = (turn * 0x9E3779B1 & 0xFFFFFFFF) >> 8  # requests of equal length must not keep step with it
    order = sorted((states[tenant], place, tenant) for place, tenant in enumerate(_turned(queues, scattered)))
    while order:
        _, place, tenant = heapq.heappop(order)
        yield queues[tenant].pop()
        if queues[tenant]:
            heapq.heappush(order, (states[tenant], place, tenant))


def _plan_decodes(items: Sequence[Item], limits: Limits) -> Plan | None:
    """The plan where all decode and nothing is short, which is the usual case; None in any other."""
    spans = []
    rows, pages = 0, len(items)
    for item in items:
        position, drafts = item.position, item.drafts
        if not (item.running and item.decoding and item.todo == 1) or (item.stops and item.stops[-1] > position):
            return None
        rows += 1 + drafts
        pages += (position + drafts + PAGE_TOKENS) // PAGE_TOKENS - (position + PAGE_TOKENS - 1) // PAGE_TOKENS
        spans.append((item.key, 1, drafts))
    fits = rows <= limits.tokens and pages <= limits.pages and len(items) <= limits.slots
    return Plan((), (), tuple(sorted(spans))) if fits else None


class _Step:
    """One step in the making: who has a state (`running`, best first, then `admitted`), and what they were given."""

    def __init__(self, items: Sequence[Item], limits: Limits, turn: int) -> None:
        self.limits, self.turn = limits, turn
        self.items = sorted(items, key=lambda i: (-i.priority, i.key))
        self.running = [i for i in self.items if i.running]
        self.decodes = [i for i in self.running if i.decodes]
        self.prompts = [i for i in self.running if not i.decodes]
        self.admitted: list[Item] = []
        self.preempted: list[Item] = []
        self.free, self.tokens = limits.pages, limits.tokens
        self.room = self.free - sum(i.reserve for i in self.running)  # pages that nobody is going to need
        self.spare = self.free - sum(i.new_pages(1) for i in self.decodes)  # pages that no decode needs now
        self.longest = limits.tokens if len(items) == 1 else min(limits.chunk, limits.tokens)
        self.given: dict[int, int] = {}

    def plan(self) -> Plan:
        self._let_the_running_go_on()
        waiting = [i for i in self.items if not i.running]
        all(self._admit(list(level)) for _, level in groupby(waiting, attrgetter("priority")))
        prompts = sorted(self.prompts + self.admitted, key=lambda i: (-i.priority, i.key))
        decodes = [i for i in self.decodes if self._give(i, 1)]
        self._share_drafts(decodes, self.tokens // 2 if prompts else self.tokens)
        for _, level in groupby(prompts, attrgetter("priority")):
            self._share_tokens(list(level))
        spans = sorted((i.key, 1, self.given[i.key] - 1) for i in decodes)
        spans += [(i.key, self.given[i.key], 0) for i in prompts if i.key in self.given]
        return Plan(tuple(i.key for i in self.admitted), tuple(i.key for i in self.preempted), tuple(spans))

    def _preempt_last(self) -> None:
        last = self.running.pop()
        (self.decodes if last.decodes else self.prompts).pop()
        self.preempted.append(last)
        self.free += last.freed
        self.room += last.freed + last.reserve
        self.spare += last.freed + (last.new_pages(1) if last.decodes else 0)

    def _let_the_running_go_on(self) -> None:
        """Preempt the last until there are pages for all decodes, for prompts above others, and for one at least."""
        while len(self.running) > 1 and (self.spare < 0 or len(self.running) > self.limits.slots):
            self._preempt_last()
        for item in list(self.prompts):
            while item.new_pages(1) > self.spare and (last := self.running[-1]) not in (item, self.running[0]):
                stuck = all(i.new_pages(1) > self.free for i in self.running)
                if last.priority >= item.priority and not stuck:
                    break
                self._preempt_last()

    def _admit(self, waiting: list[Item]) -> bool:
        """Give states to those of one priority that wait; whether all got one, so that the next may be asked."""
        oldest, before = waiting[0], len(self.admitted)
        states = Counter(i.tenant for i in self.running + self.admitted)
        above = sum(self._most(i) for i in self.prompts + self.admitted if i.priority > oldest.priority)
        last_key = oldest.key + PASSED_BY if self._victims(oldest, above) is None else waiting[-1].key
        for item in _fairly(waiting, states, self.turn):
            full = len(self.running) + len(self.admitted) >= self.limits.slots
            if full and not (self.running and self.running[-1].priority < item.priority):
                break
            victims = self._victims(item, above) if item.key <= last_key else None
            if victims is not None:
                for _ in range(victims):
                    self._preempt_last()
                self.admitted.append(item)
                self.room -= item.reserve
                states[item.tenant] += 1
        return len(self.admitted) - before == len(waiting)

    def _victims(self, item: Item, above: int) -> int | None:
        """How many of lower priority must go for one more, beside `above` tokens of higher; None if all do not do."""
        others, room, free = len(self.running) + len(self.admitted), self.room, self.free
        rows = self.limits.tokens - len(self.decodes) - above
        for count, last in enumerate((*reversed(self.running), item)):
            pages = room >= item.reserve or (not others and free >= item.new_pages(1))
            if pages and rows > 0 and others < self.limits.slots:
                return count
            if last.priority >= item.priority:
                return None
            others, rows = others - 1, rows + last.decodes
            room, free = room + last.freed + last.reserve, free + last.freed
        return None

    def _most(self, item: Item) -> int:
        most = min(item.todo, self.longest)
        if item.decodes:
            here = PAGE_TOKENS if self.room >= 0 else -item.position % PAGE_TOKENS or PAGE_TOKENS
            most = min(1 + item.drafts, here)
        if item.stops and item.stops[-1] > item.position:
            return min(most, next(stop for stop in item.stops if stop > item.position) - item.position)
        return most

    def _give(self, item: Item, tokens: int) -> int:
        """Give an item up to so many more tokens, as it has use and there are pages for; how many it got."""
        before = self.given.get(item.key, 0)
        held = item.new_pages(before)
        reach = (item.held + held + self.free) * PAGE_TOKENS - item.position
        more = max(0, min(tokens, self.tokens, self._most(item) - before, reach - before))
        if more:
            self.given[item.key] = before + more
            self.tokens -= more
            self.free -= item.new_pages(before + more) - held
        return more

    def _share_drafts(self, decodes: list[Item], rows: int) -> None:
        """Drafts for those that decode, evenly: who wants few gets them, the others the same."""
        decodes = sorted(sorted(decodes, key=lambda i: (i.key + self.turn) % len(decodes)), key=self._most)
        for place, item in enumerate(decodes):
            rows -= self._give(item, min(item.drafts, rows // (len(decodes) - place)))

    def _share_tokens(self, prompts: list[Item]) -> None:
        """Tokens for the prompts of one priority, evenly to their tenants."""
        tenants = _turned({i.tenant for i in prompts}, self.turn)
        queues = {tenant: [i for i in prompts if i.tenant == tenant] for tenant in tenants}
        while self.tokens and tenants:
            share = max(1, self.tokens // len(tenants))
            tenants = [tenant for tenant in tenants if self._spend(queues[tenant], share) == share]

    def _spend(self, prompts: list[Item], tokens: int) -> int:
        """Spend a tenant's share: something for each prompt and then all, the oldest or the shortest first in turn."""
        left = tokens
        order = sorted(prompts, key=lambda i: i.todo) if self.turn % 2 else prompts
        for item, most in [(i, USEFUL) for i in order] + [(i, tokens) for i in order]:
            left -= self._give(item, min(most, left)) if left else 0
        return tokens - left
