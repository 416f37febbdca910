"""Routing and experts.

Legend: T tokens, E experts, K experts per token, d hidden, I expert width. Source: report 2.1, spec architecture 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.numerics import Numerics
from hadal.kernels.reference.dense import Weight, linear, linear_f32


def affinities(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """Expert affinities sqrt(softplus(x W^T)) [T, E] in FP32."""
    return roots_of_softplus(linear_f32(x_TD, weight_ED))


def roots_of_softplus(logits: Tensor) -> Tensor:
    """sqrt(softplus(x)) of FP32 values."""
    # The floor is far below any affinity that matters; without it an underflow to 0 has an infinite slope.
    # The root by rsqrt, because a CPU's vector library now and then answers torch.sqrt with 1e-4 of error.
    soft = F.softplus(logits).clamp_min(1e-30)
    return soft * torch.rsqrt(soft)


def choose_experts(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """The k experts [T, k] with the largest biased affinity, best first; ties go to the lower index."""
    return torch.sort(scores_TE + bias_E, dim=-1, descending=True, stable=True).indices[:, :k]


def routing_weights(scores_TE: Tensor, ids_TK: Tensor, scale: float) -> Tensor:
    """Mixing weights [T, K]: unbiased affinities of the chosen experts, normalised, times the routed scale."""
    chosen = scores_TE.gather(1, ids_TK)
    return chosen / chosen.sum(-1, keepdim=True) * scale


def swiglu(
    x: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    num: Numerics,
    *,
    limit: float,
    quantise_input: bool,
    weight: Tensor | None,
) -> Tensor:
    """One clamped SwiGLU expert [rows, d] -> [rows, d]; `weight` [rows, 1] multiplies before w2, in FP32."""
    gate = linear(x, w1, num, quantise_input=quantise_input).float().clamp(max=limit)
    up = linear(x, w3, num, quantise_input=quantise_input).float().clamp(-limit, limit)
    h = F.silu(gate) * up
    if weight is not None:
        h = h * weight
    return linear(h.to(x.dtype), w2, num, quantise_input=quantise_input)


def routed_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w1: Sequence[Weight] | Tensor,
    w2: Sequence[Weight] | Tensor,
    w3: Sequence[Weight] | Tensor,
    num: Numerics,
    limit: float,
) -> Tensor:
    """Sum of the chosen experts' outputs [T, d] in FP32, experts added in index order."""
    k = ids_TK.shape[1]
    flat = ids_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=len(w1)).tolist()
    tokens = order // k
    mixing = weights_TK.reshape(-1)[order].unsqueeze(-1)
    outputs = []
    begin = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        x_expert = x_TD[tokens[begin : begin + count]]
        y = swiglu(
            x_expert, w1[expert], w2[expert], w3[expert], num,
            limit=limit, quantise_input=num.expert_inputs, weight=mixing[begin : begin + count],
        )  # fmt: skip
        outputs.append(y.float())
        begin += count
    out = torch.zeros(x_TD.shape, dtype=torch.float32, device=x_TD.device)
    return out.index_add(0, tokens, torch.cat(outputs))
