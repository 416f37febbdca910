"""Kernels for processors, emitted as LLVM IR from Python: the main layers and the head of a model in `fast` mode."""

from __future__ import annotations

from hadal.config import ModelConfig
from hadal.kernels.cpu.target import CpuError, detect

__all__ = ["CpuError", "chosen_kernels", "unsupported"]

_HOW = {
    "amx": ("BF16 tiles", "int8 tiles", "16-lane vectors"),
    "avx512": ("BF16 dot products", "int8 dot products", "16-lane vectors"),
    "avx2": ("FP32 fused products", "widened int8 products", "8-lane vectors"),
    "neon": ("FP32 fused products", "widened int8 products", "4-lane vectors"),
}


def unsupported(config: ModelConfig) -> str | None:
    """Why the emitted kernels cannot run this model on this machine, in words; None when they can."""
    isa, reason = detect()
    if isa is None:
        return reason
    c = config
    codes = c.head_dim - c.qk_rope_head_dim
    rules = {
        f"hidden_size {c.hidden_size} and q_lora_rank {c.q_lora_rank} must be multiples of 32": (
            c.hidden_size % 32 == 0 and c.q_lora_rank % 32 == 0
        ),
        f"head_dim {c.head_dim} and index_head_dim {c.index_head_dim} must be multiples of 32": (
            c.head_dim % 32 == 0 and c.index_head_dim % 32 == 0
        ),
        f"head_dim - qk_rope_head_dim is {codes}, not a multiple of 64": codes % 64 == 0,
        f"qk_rope_head_dim {c.qk_rope_head_dim} is not a multiple of 32": c.qk_rope_head_dim % 32 == 0,
        f"sliding_window {c.sliding_window} is not a multiple of 32": c.sliding_window % 32 == 0,
        f"hc_mult is {c.hc_mult}, not 4": c.hc_mult == 4,
        f"o_lora_rank {c.o_lora_rank} is not a multiple of 32": c.o_lora_rank % 32 == 0,
        "the heads of an output group are not a multiple of 32 wide": (
            c.num_attention_heads * c.head_dim // c.o_groups % 32 == 0
        ),
        "a compression ratio does not divide 128": all(128 % r == 0 for r in c.compress_ratios if r),
    }
    return next((words for words, holds in rules.items() if not holds), None)


def chosen_kernels() -> dict[str, str]:
    """What computes each part of a model in `fast` mode on this processor, and why."""
    isa, reason = detect()
    parts = ("products with FP8 and BF16 weights, attention", "lightning indexer", "norms, rotations, mixing, routing")
    how = ("plain torch",) * 3 if isa is None else _HOW[isa.name]
    chosen = dict(zip(parts, how, strict=True))
    whole = isa is None or isa.amx  # tile registers make BF16 as fast as int8, and exact
    chosen["products with FP4 weights"] = how[0] if whole else "integer dot products, activations in int8"
    return {part: f"{name} ({reason})" for part, name in chosen.items()}
