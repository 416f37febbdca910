"""Numerics: the precision contract that every operator receives."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Numerics:
    """Where values are rounded.

    `dtype` is the carrier of activations. `fake_quant` switches every quantiser of the official code on: FP8 inputs of
    quantised projections, FP8 KV, FP4 indexer with its Hadamard rotation. `quantised_dense` and `quantised_experts` say
    whether those weights come from FP8/FP4, because only then their inputs are quantised. `matmul` computes the large
    products in another type than the carrier (mixed-precision training).
    """

    dtype: torch.dtype = torch.float32
    fake_quant: bool = False
    quantised_dense: bool = False
    quantised_experts: bool = False
    matmul: torch.dtype | None = None

    @property
    def faithful(self) -> bool:
        """Whether values are rounded exactly where the official code rounds them."""
        return self.fake_quant and self.dtype == torch.bfloat16

    @property
    def dense_inputs(self) -> bool:
        """Whether the inputs of dense projections are rounded to FP8."""
        return self.fake_quant and self.quantised_dense

    @property
    def expert_inputs(self) -> bool:
        """Whether the inputs of routed experts are rounded to FP8."""
        return self.fake_quant and self.quantised_experts
