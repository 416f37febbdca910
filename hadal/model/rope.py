"""Rotary angles: one frequency table per RoPE regime of the model.

Source: spec architecture 2.3. Window-only layers use `rope_theta` without scaling; compressed layers use
`compress_rope_theta` with YaRN, for queries, window KV, compressed entries, indexer and output alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig


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


class RopeTable:
    """cos and sin per regime, extended on demand; tables are FP32 and shared by all layers of a regime."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple[float, bool, torch.device], tuple[Tensor, Tensor]] = {}

    def at(self, layer: LayerSpec, position_T: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """cos, sin [T, R/2] at the given positions, all below `end`."""
        key = (layer.rope_theta, layer.yarn, position_T.device)
        table = self._tables.get(key)
        if table is None or len(table[0]) < end:
            table = self._build(layer, max(end, 2 * len(table[0]) if table else 1024), position_T.device)
            self._tables[key] = table
        return table[0][position_T], table[1][position_T]

    def _build(self, layer: LayerSpec, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        angle = torch.outer(torch.arange(length, dtype=torch.float32), frequencies(self._config, layer))
        return angle.cos().to(device), angle.sin().to(device)
