"""SequenceState: everything a sequence carries from one forward pass to the next.

Per layer: the last window-1 KV entries, the compressed entries, the indexer's keys, and the open tails of the
compressors (projections of the tokens that have not completed a block, FP32). No tensor here is a view of a prompt's
activations.

Legend: K window rows, C entries, R tail rows, D head dim, E compressor width (2D where blocks overlap).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig


class EntryBuffer:
    """Rows appended at the end, in storage that doubles, so that a sequence of appends costs linear time."""

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._rows = torch.empty(0, dim, dtype=dtype, device=device)
        self.count = 0

    def append(self, rows: Tensor) -> None:
        """Add rows [n, dim]."""
        need = self.count + len(rows)
        if need > len(self._rows):
            grown = self._rows.new_empty(max(need, 2 * len(self._rows), 16), self._rows.shape[1])
            grown[: self.count] = self._rows[: self.count]
            self._rows = grown
        self._rows[self.count : need] = rows
        self.count = need

    @property
    def rows(self) -> Tensor:
        """The rows so far [count, dim]; valid until the next append."""
        return self._rows[: self.count]

    def clone(self) -> EntryBuffer:
        """An independent copy without spare room."""
        copy = EntryBuffer.__new__(EntryBuffer)
        copy._rows, copy.count = self.rows.clone(), self.count
        return copy

    def nbytes(self) -> int:
        """Bytes of storage held."""
        return self._rows.nbytes


@dataclass
class Tail:
    """Projections and scores (position bias added) of the tokens a compressor still needs, [R, E] each."""

    kv_RE: Tensor
    score_RE: Tensor

    def clone(self) -> Tail:
        """An independent copy."""
        return Tail(self.kv_RE.clone(), self.score_RE.clone())

    def nbytes(self) -> int:
        """Bytes held."""
        return self.kv_RE.nbytes + self.score_RE.nbytes


@dataclass
class LayerState:
    """One layer's share of the state; the compressed parts exist only where the layer compresses."""

    window_KD: Tensor
    entries: EntryBuffer | None = None
    tail: Tail | None = None
    index_keys: EntryBuffer | None = None
    index_tail: Tail | None = None

    def parts(self) -> list[Tensor | EntryBuffer | Tail]:
        """The parts that exist."""
        return [p for p in (self.window_KD, self.entries, self.tail, self.index_keys, self.index_tail) if p is not None]

    def clone(self) -> LayerState:
        """An independent copy."""
        return LayerState(
            self.window_KD.clone(),
            self.entries and self.entries.clone(),
            self.tail and self.tail.clone(),
            self.index_keys and self.index_keys.clone(),
            self.index_tail and self.index_tail.clone(),
        )


@dataclass
class SequenceState:
    """State of one sequence after `position` tokens; `draft` belongs to the MTP or DSpark blocks."""

    layers: list[LayerState]
    draft: list[LayerState] = field(default_factory=list)
    position: int = 0
    draft_position: int = 0  # tokens the draft head has seen; it must be fed after every pass or not at all

    def clone(self) -> SequenceState:
        """An independent copy: continuing one leaves the other as it is."""
        layers, draft = [s.clone() for s in self.layers], [s.clone() for s in self.draft]
        return SequenceState(layers, draft, self.position, self.draft_position)

    def nbytes(self) -> int:
        """Bytes held for this sequence."""
        parts = [p for s in (*self.layers, *self.draft) for p in s.parts()]
        return sum(p.nbytes if isinstance(p, Tensor) else p.nbytes() for p in parts)


def fresh_state(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> SequenceState:
    """The state of a sequence before its first token."""
    layers = [_fresh_layer(config, layer, dtype, device) for layer in config.layers]
    return SequenceState(layers, fresh_draft(config, dtype, device))


def fresh_draft(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> list[LayerState]:
    """The states of the draft blocks before a sequence's first token."""
    return [_fresh_layer(config, layer, dtype, device) for layer in config.draft_layers]


def _fresh_layer(config: ModelConfig, layer: LayerSpec, dtype: torch.dtype, device: torch.device) -> LayerState:
    state = LayerState(torch.empty(0, config.head_dim, dtype=dtype, device=device))
    width = 2 if layer.attention == "csa" else 1
    if layer.ratio:
        state.entries = EntryBuffer(config.head_dim, dtype, device)
        state.tail = _fresh_tail(width * config.head_dim, device)
    if layer.attention == "csa":
        state.index_keys = EntryBuffer(config.index_head_dim, dtype, device)
        state.index_tail = _fresh_tail(width * config.index_head_dim, device)
    return state


def _fresh_tail(width: int, device: torch.device) -> Tail:
    return Tail(torch.empty(0, width, device=device), torch.empty(0, width, device=device))
