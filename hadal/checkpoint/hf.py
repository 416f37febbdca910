"""Hugging Face names and configuration of the same model, derived from the official ones.

transformers holds experts stacked, so an official expert tensor is a slice of a larger one. It also writes a third
naming when it saves (official leaf names, unstacked, under `model.`), which is read here as well.
Source: spec architecture 6.3, 9.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from hadal.checkpoint.names import TensorSpec
from hadal.checkpoint.safetensors import CheckpointError
from hadal.config import CSA_RATIO, ModelConfig

HF_PROBE = re.compile(r"model\.layers\.\d+\.self_attn\.")
SAVED_PROBE = re.compile(r"model\.layers\.\d+\.attn\.")

_LAYER_TYPES = {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.w([123])\.weight")
_RENAMES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"^embed\.", "model.embed_tokens."),
        (r"^head\.", "lm_head."),
        (r"^(norm\.|layers\.)", r"model.\1"),
        (r"^hc_head_", "model.hc_head.hc_"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.hc_(attn|ffn)_", r".\1_hc."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.compressor\.norm\.", ".compressor.kv_norm."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
        (r"\.self_attn\.indexer\.wq_b\.", ".self_attn.compressor.indexer.q_b_proj."),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_([ab])\.", r".o_\1_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    ]
]


@dataclass(frozen=True)
class Place:
    """Where an official tensor lies in Hugging Face naming: a whole tensor, or the part from flat `element` on."""

    name: str
    shape: tuple[int, ...]
    element: int = 0


def hf_place(spec: TensorSpec, config: ModelConfig) -> Place:
    """The place of an unquantised official tensor in transformers' state dict."""
    match = _EXPERT.fullmatch(spec.name)
    if match:
        prefix, expert, matrix = match[1], int(match[2]), match[3]
        width, hidden, count = config.moe_intermediate_size, config.hidden_size, config.n_routed_experts
        stack = _rename(prefix + ".")
        if matrix == "2":
            return Place(stack + "down_proj", (count, hidden, width), expert * hidden * width)
        half = 0 if matrix == "1" else 1
        return Place(stack + "gate_up_proj", (count, 2 * width, hidden), (2 * expert + half) * width * hidden)
    return Place(_rename(spec.name), spec.shape)


def saved_name(name: str) -> str:
    """The name that transformers' `save_pretrained` gives to an official tensor."""
    if name == "embed.weight":
        return "model.embed_tokens.weight"
    name = re.sub(r"^hc_head_", "hc_head.hc_", name)
    name = name.replace(".attn.kv_norm.", ".attn.norm.")
    return name if name.startswith("head.") else "model." + name


def official_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 5 writes it, with the keys it drops restored; other configs pass unchanged.

    transformers replaces `compress_ratios` and `num_hash_layers` by per-layer lists and carries no draft head.
    """
    if "compress_rates" not in raw and "mlp_layer_types" not in raw:
        return raw
    out = {key: value for key, value in raw.items() if key not in ("compress_rates", "partial_rotary_factor")}
    if "compress_ratios" not in out and "layer_types" in raw:
        ratio = {"sliding_attention": 0, **raw.get("compress_rates", {})}
        unknown = [kind for kind in raw["layer_types"] if kind not in ratio]
        if unknown:
            raise CheckpointError(
                f"config.json has a layer of type {unknown[0]!r} without a rate in `compress_rates`; add it"
            )
        out["compress_ratios"] = [ratio[kind] for kind in raw["layer_types"]]
        out["num_nextn_predict_layers"] = 0
    if "num_hash_layers" not in out and "mlp_layer_types" in raw:
        kinds = raw["mlp_layer_types"]
        out["num_hash_layers"] = kinds.count("hash_moe")
        if "hash_moe" in kinds[out["num_hash_layers"] :]:
            raise CheckpointError(
                "config.json puts a hash layer after a learned one in `mlp_layer_types`; V4 has them first"
            )
    if "partial_rotary_factor" in raw:
        out.setdefault("qk_rope_head_dim", int(raw["head_dim"] * raw["partial_rotary_factor"]))
    out.setdefault("topk_method", "noaux_tc")
    compress = (raw.get("rope_parameters") or {}).get("compress", {})
    if not raw.get("rope_scaling") and compress.get("rope_type") == "default":
        # YaRN by a factor of one is plain RoPE.
        out["rope_scaling"] = {"factor": 1, "original_max_position_embeddings": raw["max_position_embeddings"]}
    return out


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json that transformers reads for the exported, unquantised model without its draft head."""
    trunk = config.without_draft().replace(quantization=False, expert_dtype=None)
    rates = {layer.ratio for layer in trunk.layers if layer.attention == "hca"}
    if len(rates) > 1:
        raise CheckpointError(
            f"transformers knows one HCA ratio per model, not {sorted(rates)}; keep the official layout"
        )
    return trunk.to_dict() | {
        "layer_types": [_LAYER_TYPES[layer.attention] for layer in trunk.layers],
        "compress_rates": {_LAYER_TYPES["csa"]: CSA_RATIO, _LAYER_TYPES["hca"]: rates.pop() if rates else 128},
        "mlp_layer_types": ["hash_moe" if layer.routing == "hash" else "moe" for layer in trunk.layers],
    }


@cache
def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name
