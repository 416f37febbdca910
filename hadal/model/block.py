"""Block: one layer of the model, attention site then expert site, on N residual streams.

Legend: T packed tokens, N streams, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import KernelTable, Numerics
from hadal.model.attention import Attention, TrainingTrace
from hadal.model.mhc import HyperConnection
from hadal.model.moe import MoE, Routing
from hadal.model.spans import Batch
from hadal.model.state import LayerState


class Block(nn.Module):
    """Attention and experts, each behind its hyper-connection and norm; there is no other residual path."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable) -> None:
        super().__init__()
        self.hc_attn = HyperConnection(config, ops)
        self.attn_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.attn = Attention(config, layer, num, ops)
        self.hc_ffn = HyperConnection(config, ops)
        self.ffn_norm = nn.Parameter(torch.empty(config.hidden_size))
        self.ffn = MoE(config, layer, num, ops)
        self._eps, self._ops = config.rms_norm_eps, ops

    def forward(
        self,
        x_TND: Tensor,
        token_ids_T: Tensor,
        batch: Batch,
        states: list[LayerState | None],
        trace: TrainingTrace | None = None,
    ) -> tuple[Tensor, Routing]:
        """Advance the streams [T, N, d] through both sites; `states` are advanced in place."""
        x_TND = self.attend(x_TND, lambda y: self.attn(y, batch, states, trace))
        return self.feed_forward(x_TND, token_ids_T)

    def attend(self, x_TND: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        """The attention site around any function from its normed input [T, d] to its output."""
        pre, post, comb = self.hc_attn.maps(x_TND)
        y = self._ops.rms_norm(self._ops.mix_in(x_TND, pre), self.attn_norm, self._eps)
        out: Tensor = self._ops.mix_out(x_TND, attention(y), post, comb)
        return out

    def feed_forward(self, x_TND: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Routing]:
        """The expert site alone."""
        pre, post, comb = self.hc_ffn.maps(x_TND)
        y = self._ops.rms_norm(self._ops.mix_in(x_TND, pre), self.ffn_norm, self._eps)
        out, routing = self.ffn(y, token_ids_T)
        return self._ops.mix_out(x_TND, out, post, comb), routing
