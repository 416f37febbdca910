"""Rotary angles of the two RoPE regimes of the model.

Source: spec architecture 2.3. Window-only layers use `rope_theta` without scaling; compressed layers use
`compress_rope_theta` with YaRN, for queries, window KV, compressed entries, indexer and output alike.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig


@cache
def frequencies(config: ModelConfig, layer: LayerSpec) -> Tensor:
    """Angular frequencies [R/2] in FP32 for a layer."""
    rotary = config.qk_rope_head_dim
    freq = 1.0 / (layer.rope_theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary))
    scaling = config.rope_scaling
    if not layer.yarn or scaling.original_max_position_embeddings <= 0:
        return freq

    def correction(turns: float) -> float:
        length = scaling.original_max_position_embeddings
        return rotary * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(layer.rope_theta))

    low = max(math.floor(correction(scaling.beta_fast)), 0)
    high = min(math.ceil(correction(scaling.beta_slow)), rotary - 1)
    span = high - low if high != low else 0.001  # the official code avoids a zero-width ramp the same way
    ramp = ((torch.arange(rotary // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return freq / scaling.factor * ramp + freq * (1 - ramp)


def angles(config: ModelConfig, layer: LayerSpec, position_T: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [T, R/2] in FP32 of a layer's rotation at the given positions."""
    angle = torch.outer(position_T.float(), frequencies(config, layer).to(position_T.device))
    # polar, not cos and sin: on a CPU those go through a vector library that now and then answers a second thread with
    # 1e-4 of error, which moves every later position.
    turn = torch.polar(torch.ones_like(angle), angle)
    return turn.real, turn.imag
