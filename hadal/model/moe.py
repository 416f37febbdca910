"""Mixture of experts: hash or learned routing, clamped SwiGLU experts, one shared expert.

Legend: T tokens, E experts, K experts per token, d hidden, I expert width. Source: spec architecture 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels import KernelTable, Numerics


@dataclass(frozen=True)
class Routing:
    """One layer's routing of a batch; `layer` counts draft blocks after the main ones."""

    layer: int
    is_hash: bool
    scores_TE: Tensor
    ids_TK: Tensor


class Gate(nn.Module):
    """Chooses experts by token id (hash layers) or by biased affinity (learned layers)."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, ops: KernelTable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.bias: Tensor
        self.tid2eid: Tensor
        if layer.routing == "hash":
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("tid2eid", torch.zeros(shape, dtype=torch.int64))
        else:
            self.register_buffer("bias", torch.zeros(config.n_routed_experts))
        self._config, self._layer, self._ops = config, layer, ops

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Routing]:
        """Mixing weights [T, K] and the routing they belong to."""
        scores = self._ops.affinities(x_TD, self.weight)
        is_hash = self._layer.routing == "hash"
        if is_hash:
            ids = self.tid2eid[token_ids_T]
        else:
            ids = self._ops.choose_experts(scores.detach(), self.bias, self._config.num_experts_per_tok)
        weights = self._ops.routing_weights(scores, ids, self._config.routed_scaling_factor)
        return weights, Routing(self._layer.index, is_hash, scores, ids)


class Expert(nn.Module):
    """Weights of one clamped SwiGLU, or of E stacked ones; w1 is the gate, w3 the linear branch, w2 projects back."""

    def __init__(self, hidden: int, width: int, count: int | None = None) -> None:
        super().__init__()
        stack = () if count is None else (count,)
        self.w1 = nn.Parameter(torch.empty(*stack, width, hidden))
        self.w2 = nn.Parameter(torch.empty(*stack, hidden, width))
        self.w3 = nn.Parameter(torch.empty(*stack, width, hidden))


class MoE(nn.Module):
    """Routed experts plus the shared one."""

    def __init__(self, config: ModelConfig, layer: LayerSpec, num: Numerics, ops: KernelTable) -> None:
        super().__init__()
        self.gate = Gate(config, layer, ops)
        self.experts = Expert(config.hidden_size, config.moe_intermediate_size, config.n_routed_experts)
        self.shared = Expert(config.hidden_size, config.moe_intermediate_size)
        self._config, self._num, self._ops = config, num, ops

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Routing]:
        """Output [T, d] and the routing; routed experts are summed in FP32, the shared expert is added last."""
        weights, routing = self.gate(x_TD, token_ids_T)
        limit = self._config.swiglu_limit
        e, s = self.experts, self.shared
        y = self._ops.routed_experts(x_TD, routing.ids_TK, weights, e.w1, e.w2, e.w3, self._num, limit)
        quantise = self._num.dense_inputs
        shared = self._ops.swiglu(x_TD, s.w1, s.w2, s.w3, self._num, limit=limit, quantise_input=quantise, weight=None)
        return (y + shared.float()).to(x_TD.dtype), routing
