"""Models without weights: their logits depend on nothing but the ids fed so far, so every token can be foretold."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from hadal.config import ModelConfig, preset
from hadal.model.drafter import DraftSpan
from tests.engine.fake_state import PAGE_BYTES, FakeState, make_pool, restorer

MiB = 1 << 20


class PagedModel:
    """The engine's side of a model over `FakeState`; `row` gives the logits after some ids.

    Every state is checked against its pages before it goes on, so wrong, shared or stale pages fail at once.
    """

    def __init__(self, vocab_size: int, context: int) -> None:
        self.config: ModelConfig = preset("nano").replace(vocab_size=vocab_size, max_position_embeddings=context)
        self.pool = make_pool()
        self.home_bytes = 1024
        self.state_key = "fake"
        self.drafter: FakeDrafter | None = None
        self.restore_state = restorer(self.pool)
        self.fed: list[tuple[Callable[[], Any], int]] = []  # states of the last advance, and where they stood

    def row(self, ids: list[int]) -> Tensor:
        """Logits [V] after `ids`."""
        raise NotImplementedError

    def new_state(self) -> FakeState:
        return FakeState(self.pool, [])

    def step_rows(self, longest: int) -> int:
        return 1 << 20

    def advance(
        self, ids: Sequence[int], lengths: Sequence[int], states: Sequence[Any], wanted: Sequence[int]
    ) -> Tensor:
        assert sum(lengths) == len(ids) and min(lengths) > 0 and len(lengths) == len(states) == len(wanted)
        assert len({id(state) for state in states}) == len(states), "a state is given twice"
        left, rows = list(ids), []
        self.fed = [(ref(state), state.position) for state in states]
        for length, state, count in zip(lengths, states, wanted, strict=True):
            assert 0 <= count <= length and state.position + length <= self.config.max_position_embeddings
            state.check()
            state.extend(left[:length])
            del left[:length]
            rows += [self.row(state.ids[: state.position - n]) for n in reversed(range(count))]
        return torch.stack(rows) if rows else torch.empty(0, self.config.vocab_size)

    def limit_pages(self, pages: int, slots: int) -> dict[str, int]:
        """Options with which an engine may hold so many pages and requests."""
        self.home_bytes = MiB // slots + 1
        return {"cache_memory": slots * self.home_bytes + pages * PAGE_BYTES, "max_concurrent": slots}


class FakeModel(PagedModel):
    """Logits are normal noise seeded by a checksum of the sequence; `nan_after` ids make the next row NaN."""

    def __init__(self, vocab_size: int = 50, context: int = 64, nan_after: tuple[int, ...] | None = None) -> None:
        super().__init__(vocab_size, context)
        self.nan_after = nan_after
        self.steps: list[list[int]] = []

    def row(self, ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(ids).encode()))
        row = torch.randn(self.config.vocab_size, generator=generator)
        if self.nan_after is not None and tuple(ids[: len(self.nan_after)]) == self.nan_after:
            row[3] = float("nan")
        return row

    def advance(
        self, ids: Sequence[int], lengths: Sequence[int], states: Sequence[Any], wanted: Sequence[int]
    ) -> Tensor:
        self.steps.append(list(lengths))
        return super().advance(ids, lengths, states, wanted)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The continuation that greedy decoding must give, found without the engine."""
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            row = self.row(ids).tolist()
            ids.append(row.index(max(row)))
            if ids[-1] == self.config.eos_token_id:
                break
        return ids[len(prompt) :]


class FakeDrafter:
    """Drafts the model's own next tokens, but wrong ones after some ids; checks what it is told of every span."""

    def __init__(self, model: PagedModel, most: int, wrong_in: int = 3) -> None:
        self.model, self.most, self.wrong_in = model, most, wrong_in

    def draft(
        self, spans: Sequence[DraftSpan], choose: Callable[[Tensor, list[int], int], list[int]]
    ) -> list[list[int]]:
        known: list[list[int]] = []
        for span in spans:
            held, start = self.model.fed[span.span]
            state = held()
            assert state is not None and state.position == start + span.rows and 0 <= span.depth <= self.most
            assert 0 < len(span.next_ids) <= span.rows
            assert state.ids[state.position + 1 - len(span.next_ids) :] == span.next_ids[:-1]
            known.append(state.ids + span.next_ids[-1:])
        drafts: list[list[int]] = [[] for _ in spans]
        for ahead in range(max((span.depth for span in spans), default=0)):
            asked = [n for n, span in enumerate(spans) if span.depth > ahead]
            rows = torch.stack([self._row(known[n] + drafts[n]) for n in asked])
            for n, token in zip(asked, choose(rows, [spans[n].span for n in asked], ahead), strict=True):
                drafts[n].append(token)
        return drafts

    def _row(self, ids: list[int]) -> Tensor:
        row = self.model.row(ids)
        return row.flip(0) if zlib.crc32(repr(ids).encode()) % self.wrong_in == 0 else row
