"""Configurations of the published releases and of the embedded model, by name."""

from __future__ import annotations

from hadal.config.model import ConfigError, ModelConfig


def _hybrid(layers: int, first_two: int, draft: int) -> tuple[int, ...]:
    body = [4 if i % 2 == 0 else 128 for i in range(layers - 2)]
    return (first_two, first_two, *body, *[0] * draft)


def _flash() -> ModelConfig:
    return ModelConfig(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64, head_dim=512,
        qk_rope_head_dim=64, q_lora_rank=1024, o_lora_rank=1024, o_groups=8, sliding_window=128,
        compress_ratios=_hybrid(43, 0, 1), index_n_heads=64, index_head_dim=128, index_topk=512, n_routed_experts=256,
        num_experts_per_tok=6, moe_intermediate_size=2048, num_hash_layers=3, routed_scaling_factor=1.5,
        swiglu_limit=10.0, num_nextn_predict_layers=1,
    )  # fmt: skip


def _pro() -> ModelConfig:
    return ModelConfig(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, num_attention_heads=128, head_dim=512,
        qk_rope_head_dim=64, q_lora_rank=1536, o_lora_rank=1024, o_groups=16, sliding_window=128,
        compress_ratios=_hybrid(61, 128, 1), index_n_heads=64, index_head_dim=128, index_topk=1024,
        n_routed_experts=384, num_experts_per_tok=6, moe_intermediate_size=3072, num_hash_layers=3,
        routed_scaling_factor=2.5, swiglu_limit=10.0, num_nextn_predict_layers=1,
    )  # fmt: skip


def _with_dspark(c: ModelConfig, targets: tuple[int, ...], rank: int) -> ModelConfig:
    return c.replace(
        compress_ratios=(*c.compress_ratios, 0, 0), dspark_block_size=5, dspark_noise_token_id=128799,
        dspark_target_layer_ids=targets, dspark_markov_rank=rank,
    )  # fmt: skip


def _nano() -> ModelConfig:
    # Sized so that every V4 part is exercised within a 1K context and the packed file stays under 12 MB.
    return ModelConfig(
        vocab_size=7168, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, head_dim=96,
        qk_rope_head_dim=32, q_lora_rank=128, o_lora_rank=64, o_groups=2, sliding_window=64,
        compress_ratios=(0, 0, 4, 16, 0), index_n_heads=2, index_head_dim=64, index_topk=32, n_routed_experts=6,
        num_experts_per_tok=2, moe_intermediate_size=128, num_hash_layers=1, routed_scaling_factor=1.5,
        swiglu_limit=10.0, num_nextn_predict_layers=1,
    )  # fmt: skip


_PRESETS = {
    "flash": _flash,
    "flash-base": lambda: _flash().replace(expert_dtype=None),
    "flash-0731": lambda: _with_dspark(_flash(), (40, 41, 42), 256),
    "pro": _pro,
    "pro-base": lambda: _pro().replace(expert_dtype=None),
    "pro-0813": lambda: _with_dspark(_pro(), (58, 59, 60), 512),
    "nano": _nano,
}
PRESETS = tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """The configuration of a named release; ConfigError lists the names when there is none of that name."""
    if name not in _PRESETS:
        raise ConfigError(f"no preset {name!r}; choose one of {', '.join(PRESETS)}")
    return _PRESETS[name]()
