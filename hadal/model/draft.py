"""Draft heads: the MTP block of the preview checkpoints and the DSpark stages of 0731 and 0813.

Legend: T packed tokens, N streams, d hidden, V vocabulary, Q draft block length, M Markov rank, K window rows.
Source: spec architecture 5; golden/README for the order of operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import Attended, KernelTable, Numerics
from hadal.model.block import Block
from hadal.model.mhc import StreamCollapse
from hadal.model.spans import Batch, Span
from hadal.model.state import LayerState


class MtpBlock(Block):
    """Predicts token i+2 from the streams at i and the embedding of token i+1."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable) -> None:
        super().__init__(config, layer, num, ops)
        d = config.hidden_size
        self.e_proj = nn.Parameter(torch.empty(d, d))
        self.h_proj = nn.Parameter(torch.empty(d, d))
        self.enorm = nn.Parameter(torch.empty(d))
        self.hnorm = nn.Parameter(torch.empty(d))
        self.norm = nn.Parameter(torch.empty(d))
        self.hc_head = StreamCollapse(config, ops)
        self._num = num

    def join(self, x_TND: Tensor, next_embedding_TD: Tensor) -> Tensor:
        """The block's input streams: both sources normed, projected and added, each rounded to the carrier."""
        ops, num = self._ops, self._num
        e = ops.linear(
            ops.rms_norm(next_embedding_TD, self.enorm, self._eps), self.e_proj, num, quantise_input=num.dense_inputs
        )
        h = ops.linear(ops.rms_norm(x_TND, self.hnorm, self._eps), self.h_proj, num, quantise_input=num.dense_inputs)
        joined: Tensor = e.unsqueeze(1) + h
        return joined


class DsparkStage(Block):
    """One of the DSpark stages; the first projects the target's hidden states, the last carries the heads."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable, stage: int) -> None:
        super().__init__(config, layer, num, ops)
        d, taps = config.hidden_size, len(config.dspark_target_layer_ids)
        rank = config.dspark_markov_rank or 0
        if stage == 0:
            self.main_proj = nn.Parameter(torch.empty(d, taps * d))
            self.main_norm = nn.Parameter(torch.empty(d))
        if stage == config.draft_stages - 1:
            self.norm = nn.Parameter(torch.empty(d))
            self.hc_head = StreamCollapse(config, ops)
            self.markov_w1 = nn.Parameter(torch.empty(config.vocab_size, rank))
            self.markov_w2 = nn.Parameter(torch.empty(config.vocab_size, rank))
            self.confidence = nn.Parameter(torch.empty(1, d + rank))
        self._num, self._window, self._layer = num, config.sliding_window, layer

    def main_hidden(self, taps_TD: Tensor) -> Tensor:
        """Stage 0 only: the tapped hidden states [T, taps*d] as the stages' common context [T, d]."""
        h = self._ops.linear(taps_TD, self.main_proj, self._num, quantise_input=self._num.dense_inputs)
        out: Tensor = self._ops.rms_norm(h, self.main_norm, self._eps)
        return out

    def remember(self, main_TD: Tensor, batch: Batch, states: list[LayerState]) -> None:
        """Append the KV of committed positions to each sequence's window of at most `sliding_window` entries."""
        kv = self.attn.window_kv(main_TD, self.attn.rotary(batch))
        for span, state in zip(batch.spans, states, strict=True):
            state.window.write(span.end, kv[span.row : span.row + span.length])

    def draft(self, x_QND: Tensor, token_ids_Q: Tensor, position: int, state: LayerState) -> Tensor:
        """Advance the draft block's streams; its tokens stand at `position` and after and all see each other."""
        batch = Batch([Span(position, len(token_ids_Q), 0, None)], x_QND.device)
        rope = self.attn.rotary(batch)

        def attention(y_QD: Tensor) -> Tensor:
            _, q = self.attn.queries(y_QD, rope)
            history = min(position, self._window)
            window = torch.cat((*state.window.read(position, history), self.attn.window_kv(y_QD, rope)))
            keys = Attended(window, None, position, history, self._window, 0, full_block=True)
            return self.attn.project_out(self.attn.attend(q, keys), rope)

        return self.feed_forward(self.attend(x_QND, attention), token_ids_Q)[0]

    def markov_bias(self, token_id: Tensor) -> Tensor:
        """Last stage only: logit bias [V] that follows from the previous draft token."""
        out: Tensor = self._ops.linear_f32(self.markov_w1[token_id], self.markov_w2)
        return out

    def confidence_logit(self, hidden_D: Tensor, token_id: Tensor) -> Tensor:
        """Last stage only: logit of the draft token being accepted; `hidden` is taken before the final norm."""
        joined = torch.cat((hidden_D, self.markov_w1[token_id].to(hidden_D.dtype)), dim=-1)
        out: Tensor = self._ops.linear_f32(joined, self.confidence)
        return out.squeeze(-1)
