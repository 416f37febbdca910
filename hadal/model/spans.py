"""Spans: how tokens of many sequences lie end to end in one ragged forward pass, and which blocks they complete.

Legend: T packed tokens, S spans, r block length, R buffer rows (carried tail then new tokens per span), B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig
from hadal.model.rope import angles
from hadal.model.state import SequenceState


@dataclass(frozen=True)
class Span:
    """`length` consecutive tokens of one sequence, beginning at position `start`, in packed rows `row` and after."""

    start: int
    length: int
    row: int
    state: SequenceState | None

    @property
    def end(self) -> int:
        """Position after the span's last token."""
        return self.start + self.length


@dataclass(frozen=True)
class BlockPlan:
    """Where the compressor finds its blocks: in the packed rows of documents, or in a buffer of [carried tail | new
    tokens] of each span that continues a state and completes a block.
    """

    carry: tuple[int, ...]  # carried rows per span
    count: tuple[int, ...]  # blocks each span completes
    rows_Br: Tensor
    previous_Br: Tensor | None
    has_previous_B: Tensor | None
    position_B: Tensor  # position of each block's first token


class Batch:
    """One ragged forward pass: spans, positions and the block plans they imply, each made once for all layers."""

    def __init__(self, spans: Sequence[Span], device: torch.device) -> None:
        self.spans = tuple(spans)
        self.device = device
        self._plans: dict[tuple[int, bool], BlockPlan] = {}
        self._angles: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_states(cls, lengths: Sequence[int], states: Sequence[SequenceState], device: torch.device) -> Batch:
        """Spans that continue `states`, which get the pages they need."""
        for state, length in zip(states, lengths, strict=True):
            state.extend(state.position + length)
        return cls(_spans(lengths, states, [s.position for s in states]), device)

    @classmethod
    def from_documents(cls, cu_seqlens: Sequence[int], device: torch.device) -> Batch:
        """Whole documents that begin at position 0 and keep no state; `cu_seqlens` are their borders, 0 first."""
        return cls([Span(0, b - a, a, None) for a, b in pairwise(cu_seqlens)], device)

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of every packed token in its own sequence."""
        return torch.cat([torch.arange(s.start, s.end, device=self.device) for s in self.spans])

    @classmethod
    def at(
        cls, starts: Sequence[int], lengths: Sequence[int], states: Sequence[SequenceState], device: torch.device
    ) -> Batch:
        """Spans from given positions on, for the draft head that follows the main layers."""
        return cls(_spans(lengths, states, starts), device)

    def angles(self, config: ModelConfig, layer: LayerSpec) -> tuple[Tensor, Tensor]:
        """cos and sin [T, R/2] of the packed positions in the layer's RoPE regime."""
        regime = (layer.rope_theta, layer.yarn)
        if regime not in self._angles:
            self._angles[regime] = angles(config, layer, self.positions_T)
        return self._angles[regime]

    def blocks(self, ratio: int, overlap: bool) -> BlockPlan:
        """The block plan for one compression ratio."""
        key = (ratio, overlap)
        if key not in self._plans:
            self._plans[key] = _plan_blocks(self.spans, ratio, overlap, self.device)
        return self._plans[key]


def _spans(lengths: Sequence[int], states: Sequence[SequenceState], starts: Sequence[int]) -> list[Span]:
    rows = accumulate(lengths, initial=0)
    return [Span(*values) for values in zip(starts, lengths, rows, states, strict=False)]


def carried_rows(position: int, ratio: int, overlap: bool) -> int:
    """How many tokens before `position` a compressor still needs: the open block, and with overlap the one before."""
    return position % ratio + (ratio if overlap and position >= ratio else 0)


def _plan_blocks(spans: Sequence[Span], ratio: int, overlap: bool, device: torch.device) -> BlockPlan:
    carry, count, firsts, positions = [], [], [], []
    offset = 0
    for span in spans:
        block = torch.arange(span.start // ratio, span.end // ratio, device=device) * ratio
        carried = 0 if span.state is None else carried_rows(span.start, ratio, overlap)
        carry.append(carried)
        count.append(len(block))
        firsts.append(block - (span.start - carried) + (span.row if span.state is None else offset))
        positions.append(block)
        if len(block):
            offset += carried + span.length
    first_B, position_B = torch.cat(firsts), torch.cat(positions)
    rows = first_B.unsqueeze(1) + torch.arange(ratio, device=device)
    if not overlap:
        return BlockPlan(tuple(carry), tuple(count), rows, None, None, position_B)
    has_previous = position_B > 0
    previous = torch.where(has_previous.unsqueeze(1), rows - ratio, rows)
    return BlockPlan(tuple(carry), tuple(count), rows, previous, has_previous, position_B)
