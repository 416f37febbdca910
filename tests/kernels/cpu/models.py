"""Models that the runner's tests share: the embedded one and small random checkpoints, on any instruction set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from hadal.checkpoint import load_model
from hadal.kernels.cpu.target import Isa
from hadal.model import Model
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint

# Widths that are odd multiples of a panel, a group of heads that is not full, experts not a multiple of 16.
SIZES = dict(
    vocab_size=200, hidden_size=160, num_attention_heads=6, head_dim=96, qk_rope_head_dim=32, q_lora_rank=64,
    o_lora_rank=32, o_groups=3, sliding_window=32, compress_ratios=(4, 0, 8, 128, 0), index_n_heads=3,
    index_head_dim=32, index_topk=8, n_routed_experts=7, num_experts_per_tok=3, moe_intermediate_size=96,
    swiglu_limit=1.5,
)  # fmt: skip
DRAFT = dict(
    compress_ratios=(0, 4, 8, 0, 0, 0), num_hidden_layers=3, dspark_block_size=3, dspark_noise_token_id=5,
    dspark_target_layer_ids=(0, 2), dspark_markov_rank=8, num_nextn_predict_layers=3,
)  # fmt: skip


def write_tiny(path: Path, kind: str) -> Path:
    """A random checkpoint: "fp4" experts and FP8, "fp8" alone with a DSpark head, or "bf16" alone."""
    if kind == "bf16":
        config = tiny_config(**SIZES, quantization=False, expert_dtype=None)
        return write_checkpoint(path, config, random_tensors(config, "bf16", "bf16"))
    if kind == "fp8":
        config = tiny_config(**(SIZES | DRAFT)).replace(expert_dtype="fp8")
        return write_checkpoint(path, config, random_tensors(config, "fp8", "fp8"))
    config = tiny_config(**SIZES)
    return write_checkpoint(path, config, random_tensors(config))


def model_on(isa: str, path: str | Path) -> Model:
    """A model whose runner uses one instruction set."""
    with patch("hadal.model.runner.detect", lambda: (Isa(isa), "chosen by the test")):
        model = load_model(path, device="cpu")
    assert model.runner is not None and model.runner.isa == Isa(isa)
    return model


def lookup_of(model: Model) -> Callable[[str], Any]:
    """The parameter at an attribute path."""

    def lookup(path: str) -> Any:
        owner, _, name = path.rpartition(".")
        return getattr(model.get_submodule(owner), name)

    return lookup


def tokens(model: Model, seed: int, count: int) -> Tensor:
    """Random token ids, with stretches of one repeated token, whose index keys tie."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, model.config.vocab_size, (count,), generator=g)
    for begin in range(0, count, 150):
        ids[begin : begin + 40] = ids[begin]
    return ids


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit, and finite."""
    return a.shape == b.shape and bool(a.isfinite().all()) and torch.equal(a.view(torch.int32), b.view(torch.int32))
