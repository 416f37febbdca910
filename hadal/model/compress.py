"""Compressor: turns every completed block of tokens into one entry (CSA, HCA and the indexer's keys).

Legend: T packed tokens, R buffer rows, B completed blocks, D entry dim, E = 2D where blocks overlap else D.
Source: report 2.3, spec architecture 2.4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import KernelTable
from hadal.model.rope import angles
from hadal.model.spans import Batch, BlockPlan
from hadal.model.state import Ring


class Compressor(nn.Module):
    """Weights of one compressor and the rule from hidden states to rotated, not yet quantised, entries."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, dim: int, ops: KernelTable) -> None:
        super().__init__()
        self.overlap = layer.attention == "csa"
        width = dim * (2 if self.overlap else 1)
        self.wkv = nn.Parameter(torch.empty(width, config.hidden_size))
        self.wgate = nn.Parameter(torch.empty(width, config.hidden_size))
        self.ape = nn.Parameter(torch.empty(layer.ratio, width))
        self.norm = nn.Parameter(torch.empty(dim))
        self._config, self._layer, self._ops = config, layer, ops

    def forward(self, x_TD: Tensor, batch: Batch, tails: Sequence[Ring | None]) -> tuple[Tensor, BlockPlan]:
        """Entries [B, D] of all blocks the batch completes, in span order; `tails` are advanced in place."""
        plan = batch.blocks(self._layer.ratio, self.overlap)
        kv = self._ops.linear_f32(x_TD, self.wkv)
        score = self._ops.linear_f32(x_TD, self.wgate) + self.ape[batch.positions_T % self._layer.ratio]
        kv, score = _join_tails(kv, score, batch, plan, tails)
        if not len(kv):
            return x_TD.new_empty(0, len(self.norm)), plan
        pooled = self._ops.pool_blocks(kv, score, plan.rows_Br, plan.previous_Br, plan.has_previous_B)
        entries = self._ops.rms_norm(pooled.to(x_TD.dtype), self.norm, self._config.rms_norm_eps)
        return self._ops.rotate(entries, *angles(self._config, self._layer, plan.position_B)), plan


def _join_tails(
    kv_TE: Tensor, score_TE: Tensor, batch: Batch, plan: BlockPlan, tails: Sequence[Ring | None]
) -> tuple[Tensor, Tensor]:
    """For each span that completes a block its carried rows before its new ones; tails keep what comes next."""
    if None in tails:
        return kv_TE, score_TE  # whole documents: nothing is carried and nothing is kept
    both, width = torch.cat((kv_TE, score_TE), dim=1), kv_TE.shape[1]
    parts = [both[:0]]
    for span, tail, carry, count in zip(batch.spans, tails, plan.carry, plan.count, strict=True):
        assert tail is not None
        if count:
            parts += [*tail.read(span.start, carry), both[span.row : span.row + span.length]]
    joined = torch.cat(parts)
    for span, tail in zip(batch.spans, tails, strict=True):
        assert tail is not None
        tail.write(span.end, both[span.row : span.row + span.length])
    return joined[:, :width], joined[:, width:]
