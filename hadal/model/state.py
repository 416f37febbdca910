"""SequenceState: everything a sequence carries from one forward pass to the next, for models that run in torch.

A *home* of fixed size holds per layer the last KV entries of the window and the open tails of the compressors, in rings
by position; pages of 128 tokens hold the compressed entries and index keys. Rings keep a few rows more than the
mathematics needs, so that a sequence can forget its last tokens.

Legend: K window rows, R tail rows, D head dim, E compressor width (2D where blocks overlap).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import Numerics
from hadal.kernels.cpu.emission import source_digest
from hadal.kernels.cpu.target import detect
from hadal.kernels.pages import PAGE_TOKENS, SLACK, Page, PagedState, PagePool
from hadal.kernels.stored import RowForm, Shelf, StoredRows

LAYOUT_VERSION = 1  # of homes and pages; a change makes states kept on disk unfit
_HEAD = 3  # int64 before a dumped home: position, draft position, peak


class Ring:
    """The last rows of a sequence, that of position p in row p % slots."""

    def __init__(self, rows_SW: Tensor) -> None:
        self._rows = rows_SW

    def read(self, end: int, count: int) -> list[Tensor]:
        """The rows of the `count` positions before `end`, in at most two pieces of the ring itself."""
        slots = len(self._rows)
        first = (end - count) % slots
        near = min(count, slots - first)
        pieces = (self._rows[first : first + near], self._rows[: count - near])
        return [piece for piece in pieces if len(piece)]

    def write(self, end: int, rows_nW: Tensor) -> None:
        """Keep the rows of the positions before `end`, as many of the last as there is room for."""
        rows_nW = rows_nW[-len(self._rows) :]
        for piece in self.read(end, len(rows_nW)):
            piece.copy_(rows_nW[: len(piece)])
            rows_nW = rows_nW[len(piece) :]


@dataclass(frozen=True)
class RingPlan:
    """Where a ring lies in a layer's share of a home."""

    offset: int
    slots: int
    width: int
    dtype: torch.dtype

    @property
    def end(self) -> int:
        """The byte behind it."""
        return self.offset + self.slots * self.width * self.dtype.itemsize

    def of(self, home: Tensor) -> Ring:
        """The ring in a home."""
        return Ring(home[self.offset : self.end].view(self.dtype).view(self.slots, self.width))


@dataclass(frozen=True)
class LayerPlan:
    """Where one layer's parts lie in its share of a home and in a page."""

    window: RingPlan
    tail: RingPlan | None = None
    index_tail: RingPlan | None = None
    entries: Shelf | None = None
    index_keys: Shelf | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the layer's share of a home."""
        return (self.index_tail or self.tail or self.window).end


@dataclass(frozen=True)
class StatePlan:
    """The layout of a model's states, the same for all of them; draft layers come after the main ones."""

    layers: tuple[LayerPlan, ...]
    main: int  # layers that are not draft layers
    page_bytes: int

    @property
    def home_bytes(self) -> int:
        """Bytes of a home."""
        return sum(layer.nbytes for layer in self.layers)


class LayerState:
    """One layer's share of a sequence's state; `pages` is the sequence's own list."""

    def __init__(self, plan: LayerPlan, home: Tensor, pages: list[Page]) -> None:
        self.plan, self.home, self._pages = plan, home, pages
        self.window = plan.window.of(home)
        self.tail = plan.tail.of(home) if plan.tail else None
        self.index_tail = plan.index_tail.of(home) if plan.index_tail else None

    def entries(self, end: int) -> StoredRows:
        """The compressed entries of all blocks complete at position `end`."""
        assert self.plan.entries is not None
        return StoredRows(self._pages, self.plan.entries, end // self.plan.entries.ratio)

    def index_keys(self, end: int) -> StoredRows:
        """The index keys of all blocks complete at position `end`."""
        assert self.plan.index_keys is not None
        return StoredRows(self._pages, self.plan.index_keys, end // self.plan.index_keys.ratio)

    def clone(self, pages: list[Page] | None = None) -> LayerState:
        """An independent copy, of a sequence with these pages."""
        with torch.inference_mode(False):  # or nothing outside that mode could write to it
            return LayerState(self.plan, self.home.clone(), [] if pages is None else pages)

    def nbytes(self) -> int:
        """Bytes held, pages aside."""
        return self.home.nbytes


@dataclass
class SequenceState(PagedState):
    """State of one sequence after `position` tokens; `draft` belongs to the MTP or DSpark blocks.

    Full pages never change again, so copies share them.
    """

    plan: StatePlan
    pool: PagePool
    layers: list[LayerState]
    draft: list[LayerState]
    pages: list[Page] = field(default_factory=list)
    position: int = 0
    draft_position: int = 0  # tokens the draft head has seen
    peak: int = 0

    def clone(self) -> SequenceState:
        """An independent copy: continuing one leaves the other as it is."""
        pages = list(self.pages)
        layers, draft = [s.clone(pages) for s in self.layers], [s.clone() for s in self.draft]
        copy = SequenceState(self.plan, self.pool, layers, draft, pages, self.position, self.draft_position, self.peak)
        copy._part()
        return copy

    def rewind(self, tokens: int) -> None:
        """Forget the last `tokens`, at most `rewindable`."""
        super().rewind(tokens)
        self.draft_position = min(self.draft_position, self.position)

    def dump(self) -> bytes:
        """All but the pages, for `restore_state`."""
        head = np.array([self.position, self.draft_position, self.peak])
        return head.tobytes() + torch.cat([s.home for s in (*self.layers, *self.draft)]).cpu().numpy().tobytes()

    def nbytes(self) -> int:
        """Bytes held for this sequence, shared pages included."""
        return self.plan.home_bytes + len(self.pages) * self.pool.page_bytes


def state_key(*facts: object) -> str:
    """A name for states that depend on these facts, computed by this machine's torch and these kernels."""
    here = (LAYOUT_VERSION, torch.__version__, torch.backends.cpu.get_cpu_capability(), detect()[1], source_digest())
    return hashlib.sha256(repr((here, facts)).encode()).hexdigest()


def fresh_state(plan: StatePlan, pool: PagePool, device: torch.device) -> SequenceState:
    """The state of a sequence before its first token."""
    pages: list[Page] = []
    layers = _fresh_layers(plan.layers, pages, device)
    return SequenceState(plan, pool, layers[: plan.main], layers[plan.main :], pages)


def restore_state(
    plan: StatePlan, pool: PagePool, device: torch.device, home: bytes, pages: Sequence[Page]
) -> SequenceState:
    """The state that `SequenceState.dump` wrote; it reads full pages and takes the open one for its own."""
    state = fresh_state(plan, pool, device)
    state.position, state.draft_position, state.peak = map(int, np.frombuffer(home, np.int64, _HEAD))
    assert len(home) == 8 * _HEAD + plan.home_bytes and len(pages) == -(-state.position // PAGE_TOKENS)
    state.pages.extend(pages)
    content = torch.from_numpy(np.frombuffer(home, np.uint8, offset=8 * _HEAD).copy())
    for layer, part in zip((*state.layers, *state.draft), content.split([p.nbytes for p in plan.layers]), strict=True):
        layer.home.copy_(part)
    return state


def fresh_draft(config: ModelConfig, num: Numerics, device: torch.device) -> list[LayerState]:
    """The states of the draft blocks before a sequence's first token."""
    plan = plan_state(config, num)
    return _fresh_layers(plan.layers[plan.main :], [], device)


def _fresh_layers(plans: Sequence[LayerPlan], pages: list[Page], device: torch.device) -> list[LayerState]:
    with torch.inference_mode(False):  # or nothing outside that mode could write to them
        return [LayerState(p, torch.zeros(p.nbytes, dtype=torch.uint8, device=device), pages) for p in plans]


def plan_state(config: ModelConfig, num: Numerics) -> StatePlan:
    """The layout of a model's states: with fake quantisation in the bytes of the official cache, else as computed."""
    page, plans = 0, []
    for layer in (*config.layers, *config.draft_layers):
        plan, page = _plan_layer(config, layer, num, page)
        plans.append(plan)
    return StatePlan(tuple(plans), len(config.layers), max(page, 8))


def _plan_layer(config: ModelConfig, layer: LayerSpec, num: Numerics, page: int) -> tuple[LayerPlan, int]:
    """One layer's plan, and the bytes of a page up to behind its parts."""
    window = RingPlan(0, config.sliding_window + SLACK, config.head_dim, num.dtype)
    if not layer.ratio:
        return LayerPlan(window), page
    # A tail holds an open block, and where blocks overlap the one before it; [kv | score] of one or two entries each.
    overlap = layer.attention == "csa"
    slots, widths = layer.ratio * (1 + overlap) + SLACK, 2 * (1 + overlap)
    tail = RingPlan(_whole(window.end), slots, widths * config.head_dim, torch.float32)
    form = RowForm("fp8" if num.fake_quant else "plain", config.head_dim, num.dtype, config.qk_rope_head_dim)
    entries = Shelf(form, page, layer.ratio)
    page = _whole(page + entries.nbytes)
    if not overlap:
        return LayerPlan(window, tail, entries=entries), page
    index_tail = RingPlan(tail.end, slots, widths * config.index_head_dim, torch.float32)
    form = RowForm("fp4" if num.fake_quant else "plain", config.index_head_dim, num.dtype)
    index_keys = Shelf(form, page, layer.ratio)
    return LayerPlan(window, tail, index_tail, entries, index_keys), _whole(page + index_keys.nbytes)


def _whole(nbytes: int) -> int:
    """Rounded up to where any type may begin."""
    return -(-nbytes // 8) * 8
