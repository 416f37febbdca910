"""Compressor: turns every completed block of tokens into one entry (CSA, HCA and the indexer's keys).

Legend: T packed tokens, R buffer rows, B completed blocks, D entry dim, E = 2D where blocks overlap else D.
Source: report 2.3, spec architecture 2.4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import KernelTable
from hadal.model.rope import angles
from hadal.model.spans import Batch, BlockPlan
from hadal.model.state import Tail


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

    def forward(self, x_TD: Tensor, batch: Batch, tails: list[Tail | None]) -> tuple[Tensor, BlockPlan]:
        """Entries [B, D] of all blocks the batch completes, in span order; `tails` are advanced in place."""
        plan = batch.blocks(self._layer.ratio, self.overlap)
        kv = self._ops.linear_f32(x_TD, self.wkv)
        score = self._ops.linear_f32(x_TD, self.wgate) + self.ape[batch.positions_T % self._layer.ratio]
        kv, score = _join_tails(kv, score, batch, plan, tails)
        pooled = self._ops.pool_blocks(kv, score, plan.rows_Br, plan.previous_Br, plan.has_previous_B)
        entries = self._ops.rms_norm(pooled.to(x_TD.dtype), self.norm, self._config.rms_norm_eps)
        return self._ops.rotate(entries, *angles(self._config, self._layer, plan.position_B)), plan


def _join_tails(
    kv_TE: Tensor, score_TE: Tensor, batch: Batch, plan: BlockPlan, tails: list[Tail | None]
) -> tuple[Tensor, Tensor]:
    """Put each span's carried rows before its new ones and store what the next pass will need."""
    if not any(tails):
        return kv_TE, score_TE  # whole documents: nothing is carried and nothing is kept
    kv_parts, score_parts = [], []
    for span, tail, carry, keep in zip(batch.spans, tails, plan.carry, plan.keep, strict=True):
        assert tail is not None and len(tail.kv_RE) == carry
        rows = slice(span.row, span.row + span.length)
        kv = torch.cat((tail.kv_RE, kv_TE[rows])) if carry else kv_TE[rows]
        score = torch.cat((tail.score_RE, score_TE[rows])) if carry else score_TE[rows]
        first = carry + span.length - keep
        tail.kv_RE, tail.score_RE = kv[first:].detach().clone(), score[first:].detach().clone()
        kv_parts.append(kv)
        score_parts.append(score)
    return torch.cat(kv_parts), torch.cat(score_parts)
