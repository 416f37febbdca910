"""Attention: shared-KV multi-query attention over a window and compressed entries, with grouped output projection.

Legend: T packed tokens, H heads, D head dim, K window rows, C entries, G output groups, d hidden.
Source: report 2.3, spec architecture 2.2-2.8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import Attended, IndexerLoss, IndexQuery, KernelTable, Numerics
from hadal.kernels.stored import StoredRows
from hadal.model.compress import Compressor
from hadal.model.spans import Batch, BlockPlan, Span
from hadal.model.state import LayerState


@dataclass
class TrainingTrace:
    """What a training pass collects on its way; `dense` attends to every entry instead of the indexer's choice."""

    dense: bool = False
    indexer_loss: IndexerLoss | None = None


class Indexer(nn.Module):
    """Lightning indexer: scores compressed entries for each token with few, small, FP4-rounded heads."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable) -> None:
        super().__init__()
        heads, dim = config.index_n_heads, config.index_head_dim
        self.wq_b = nn.Parameter(torch.empty(heads * dim, config.q_lora_rank))
        self.weights_proj = nn.Parameter(torch.empty(heads, config.hidden_size))
        self.compressor = Compressor(config, layer, dim, ops)
        self._config, self._layer, self._num, self._ops = config, layer, num, ops

    def forward(
        self, x_TD: Tensor, qr_TQ: Tensor, rope_TR: tuple[Tensor, Tensor], batch: Batch, states: list[LayerState | None]
    ) -> list[IndexQuery]:
        """Per span: queries from the attention's latent, weights from the hidden state, keys of the own compressor."""
        heads, dim = self._config.index_n_heads, self._config.index_head_dim
        q = self._ops.linear(qr_TQ, self.wq_b, self._num, quantise_input=self._num.dense_inputs)
        q = self._ops.encode_index(self._ops.rotate(q.view(-1, heads, dim), *rope_TR), self._num)
        weight = self._ops.linear(x_TD, self.weights_proj, self._num, quantise_input=False) * (dim**-0.5 * heads**-0.5)
        new, plan = self.compressor(x_TD, batch, [s.index_tail if s else None for s in states])
        keys = _stored(
            self._ops.encode_index(new, self._num), batch, plan, [s.index_keys if s else None for s in states]
        )
        lengths = [span.length for span in batch.spans]
        parts = zip(q.split(lengths), weight.split(lengths), keys, strict=True)
        return [IndexQuery(*part, self._config.index_topk) for part in parts]


class Attention(nn.Module):
    """One layer's attention, for window-only, CSA and HCA layers alike."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable) -> None:
        super().__init__()
        c, groups = config, config.o_groups
        self.wq_a = nn.Parameter(torch.empty(c.q_lora_rank, c.hidden_size))
        self.q_norm = nn.Parameter(torch.empty(c.q_lora_rank))
        self.wq_b = nn.Parameter(torch.empty(c.num_attention_heads * c.head_dim, c.q_lora_rank))
        self.wkv = nn.Parameter(torch.empty(c.head_dim, c.hidden_size))
        self.kv_norm = nn.Parameter(torch.empty(c.head_dim))
        self.attn_sink = nn.Parameter(torch.empty(c.num_attention_heads))
        self.wo_a = nn.Parameter(torch.empty(groups * c.o_lora_rank, c.num_attention_heads * c.head_dim // groups))
        self.wo_b = nn.Parameter(torch.empty(c.hidden_size, groups * c.o_lora_rank))
        self.compressor = Compressor(c, layer, c.head_dim, ops) if layer.ratio else None
        self.indexer = Indexer(c, layer, num, ops) if layer.attention == "csa" else None
        self._config, self._layer, self._num, self._ops = config, layer, num, ops

    def forward(
        self, x_TD: Tensor, batch: Batch, states: list[LayerState | None], trace: TrainingTrace | None = None
    ) -> Tensor:
        """Attention output [T, d] of packed tokens; `states` (one per span, or None) are advanced in place."""
        rope_TR = self.rotary(batch)
        qr_TQ, q_THD = self.queries(x_TD, rope_TR)
        kv_TD = self.window_kv(x_TD, rope_TR)
        index = self._index(x_TD, qr_TQ, rope_TR, batch, states, trace)
        entries = self._entries(x_TD, batch, states)
        # split, not slices: its gradient is one concatenation, whatever the number of documents
        lengths = [span.length for span in batch.spans]
        parts = []
        single = len(lengths) == 1
        q_parts, kv_parts = ((x,) if single else x.split(lengths) for x in (q_THD, kv_TD))
        for i, (span, q, kv) in enumerate(zip(batch.spans, q_parts, kv_parts, strict=True)):
            window, history = self._window(kv, span, states[i])
            keys = Attended(
                window, entries[i] if entries else None, span.start, history, self._config.sliding_window,
                self._layer.ratio, index[i] if index else None,
            )  # fmt: skip
            parts.append(self.attend(q, keys, trace.indexer_loss if trace else None))
        o_THD = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.project_out(o_THD, rope_TR)

    def rotary(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """cos and sin of the batch's positions in this layer's RoPE regime."""
        return batch.angles(self._config, self._layer)

    def queries(self, x_TD: Tensor, rope_TR: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The query latent [T, Q] and the normed, rotated heads [T, H, D]."""
        quantise = self._num.dense_inputs
        qr = self._ops.linear(x_TD, self.wq_a, self._num, quantise_input=quantise)
        qr = self._ops.rms_norm(qr, self.q_norm, self._config.rms_norm_eps)
        q = self._ops.linear(qr, self.wq_b, self._num, quantise_input=quantise)
        q = self._ops.head_norm(
            q.view(-1, self._config.num_attention_heads, self._config.head_dim), self._config.rms_norm_eps
        )
        return qr, self._ops.rotate(q, *rope_TR)

    def window_kv(self, x_TD: Tensor, rope_TR: tuple[Tensor, Tensor]) -> Tensor:
        """Window entries [T, D]: one head that serves as key and value."""
        kv = self._ops.linear(x_TD, self.wkv, self._num, quantise_input=self._num.dense_inputs)
        kv = self._ops.rotate(self._ops.rms_norm(kv, self.kv_norm, self._config.rms_norm_eps), *rope_TR)
        return self._quantise_kv(kv)

    def attend(self, q_THD: Tensor, keys: Attended, loss: IndexerLoss | None = None) -> Tensor:
        """Attention of one span, in the form the numerics ask for."""
        if self._num.faithful:
            out: Tensor = self._ops.attend_listed(q_THD, keys, self.attn_sink)
            return out
        out = self._ops.attend(q_THD, keys, self.attn_sink, self._num, loss)
        return out

    def project_out(self, o_THD: Tensor, rope_TR: tuple[Tensor, Tensor]) -> Tensor:
        """Undo the rotation at the query position, then project per group of heads and jointly [T, d]."""
        o = self._ops.rotate(o_THD, *rope_TR, inverse=True).reshape(o_THD.shape[0], self._config.o_groups, -1)
        u = self._ops.linear_groups(o, self.wo_a, self._num)
        out: Tensor = self._ops.linear(u, self.wo_b, self._num, quantise_input=self._num.dense_inputs)
        return out

    def _quantise_kv(self, kv: Tensor) -> Tensor:
        return self._ops.quantise_kv(kv, self._config.qk_rope_head_dim) if self._num.fake_quant else kv

    def _index(
        self, x_TD: Tensor, qr_TQ: Tensor, rope_TR: tuple[Tensor, Tensor], batch: Batch,
        states: list[LayerState | None], trace: TrainingTrace | None,
    ) -> list[IndexQuery] | None:  # fmt: skip
        dense = trace is not None and trace.dense
        if self.indexer is None or (dense and trace is not None and trace.indexer_loss is None):
            return None
        # The indexer learns from its own objective alone, so nothing flows back through its inputs.
        queries: list[IndexQuery] = self.indexer(x_TD.detach(), qr_TQ.detach(), rope_TR, batch, states)
        return [replace(q, topk=q.keys_CD.shape[0]) for q in queries] if dense else queries

    def _entries(
        self, x_TD: Tensor, batch: Batch, states: list[LayerState | None]
    ) -> Sequence[Tensor | StoredRows] | None:
        if self.compressor is None:
            return None
        new, plan = self.compressor(x_TD, batch, [s.tail if s else None for s in states])
        return _stored(self._quantise_kv(new), batch, plan, [s.entries if s else None for s in states])

    def _window(self, kv_TD: Tensor, span: Span, state: LayerState | None) -> tuple[Tensor, int]:
        """Window rows [history | span] of one span, and how many of them are history."""
        if state is None:
            return kv_TD, 0
        history = min(span.start, self._config.sliding_window - 1)
        rows = torch.cat((*state.window.read(span.start, history), kv_TD)) if history else kv_TD
        state.window.write(span.end, kv_TD)
        return rows, history


def _stored(
    new_BD: Tensor, batch: Batch, plan: BlockPlan, shelves: Sequence[Callable[[int], StoredRows] | None]
) -> Sequence[Tensor | StoredRows]:
    """Per span its newly completed rows, behind those its state has stored if it has one."""
    parts = new_BD.split(plan.count)
    return [
        part if shelf is None else shelf(span.start).append(part)
        for span, part, shelf in zip(batch.spans, parts, shelves, strict=True)
    ]
