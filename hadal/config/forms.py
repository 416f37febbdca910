"""The two official forms of a configuration: Hugging Face `config.json` and `inference/config.json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from hadal.config.model import ConfigError, ModelConfig, RopeScaling

_QUANTIZATION_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
# Keys whose only supported value is the released one.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Likewise, but not written: other software adds them.
_FIXED_IF_PRESENT: dict[str, Any] = {"model_type": "deepseek_v4", "mlp_bias": False}
# Keys that describe other software's run-time behaviour and do not change the function computed here.
_IGNORED = {
    "architectures", "transformers_version", "use_cache", "auto_map", "pad_token_id", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "rope_parameters", "layer_types",
    "mlp_layer_types", "dtype", "_name_or_path", "return_dict", "output_hidden_states", "is_encoder_decoder",
    "output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id",
}  # fmt: skip
_INFERENCE_NAMES = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "rope_head_dim": "qk_rope_head_dim", "window_size": "sliding_window", "moe_inter_dim": "moe_intermediate_size",
    "n_activated_experts": "num_experts_per_tok", "n_hash_layers": "num_hash_layers", "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor", "norm_eps": "rms_norm_eps",
}  # fmt: skip


def _field_names() -> set[str]:
    return {f.name for f in dataclasses.fields(ModelConfig)}


def _require(raw: dict[str, Any], names: dict[str, str]) -> None:
    """Every field without a default must be present; `names` maps field name to the key the form uses."""
    for field in dataclasses.fields(ModelConfig):
        key = names.get(field.name, field.name)
        if field.default is dataclasses.MISSING and raw.get(key) is None:
            if field.name == "compress_ratios":
                raise ConfigError(
                    "config lacks `compress_ratios`, without which the layer schedule is ambiguous; add one ratio per "
                    "layer (0 window, 4 CSA, 128 HCA), for V4-Flash [0, 0, 4, 128, 4, 128, ..., 4]"
                )
            raise ConfigError(f"config lacks `{key}`; copy it from the checkpoint's official config.json")


def _read_hf_form(raw: dict[str, Any]) -> dict[str, Any]:
    known = (
        _field_names() - {"quantization"}
        | _IGNORED
        | _FIXED.keys()
        | _FIXED_IF_PRESENT.keys()
        | {"quantization_config"}
    )
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown config key `{key}`; remove it or check the spelling against config.json of V4")
    for key, value in (_FIXED | _FIXED_IF_PRESENT).items():
        if raw.get(key, value) != value:
            raise ConfigError(f"`{key}` is {raw[key]!r}, but V4 models are only defined for {value!r}")
    _require(raw, {})
    out = {k: v for k, v in raw.items() if k in _field_names()}
    out["rope_scaling"] = _read_rope_scaling(raw)
    out |= _read_nested_thetas(raw)
    out["quantization"] = _read_quantization(raw.get("quantization_config"))
    out["expert_dtype"] = _read_expert_dtype(raw.get("expert_dtype"))
    return _tuples(out)


def _read_expert_dtype(value: Any) -> str | None:
    return None if value in (None, "none", "bf16", "bfloat16") else str(value)


def _read_rope_scaling(raw: dict[str, Any]) -> RopeScaling:
    scaling = raw.get("rope_scaling") or _hf5_rope(raw.get("rope_parameters"))
    if not scaling:
        raise ConfigError("config lacks `rope_scaling`; V4 needs the YaRN parameters (factor 16, original 65536)")
    if not isinstance(scaling, dict):
        raise ConfigError(f"`rope_scaling` is {scaling!r}; V4 needs an object with the YaRN parameters")
    scaling = dict(scaling)
    if scaling.get("attention_factor") not in (None, 1, 1.0) or scaling.get("truncate") is False:
        raise ConfigError(
            "`rope_scaling` sets `attention_factor` or `truncate`; V4's YaRN rescales nothing and truncates"
        )
    kind = scaling.pop("rope_type", scaling.get("type", "yarn"))
    scaling.setdefault("type", kind)
    for key in ("rope_theta", "partial_rotary_factor", "attention_factor", "truncate"):
        scaling.pop(key, None)
    unknown = scaling.keys() - {f.name for f in dataclasses.fields(RopeScaling)}
    if unknown:
        raise ConfigError(f"unknown key `{sorted(unknown)[0]}` in `rope_scaling`; only YaRN's keys are defined for V4")
    return RopeScaling(**scaling)


def _read_nested_thetas(raw: dict[str, Any]) -> dict[str, float]:
    """RoPE bases that transformers 5 nests in `rope_parameters`; the top-level ones must not contradict them."""
    out = {}
    parameters = raw.get("rope_parameters") or {}
    for kind, key in (("main", "rope_theta"), ("compress", "compress_rope_theta")):
        nested = (parameters.get(kind) or {}).get("rope_theta") if isinstance(parameters, dict) else None
        if nested is None:
            continue
        if raw.get(key, nested) != nested:
            raise ConfigError(
                f"`{key}` is {raw[key]!r} but `rope_parameters.{kind}.rope_theta` is {nested!r}; keep one"
            )
        out[key] = nested
    return out


def _hf5_rope(parameters: Any) -> dict[str, Any] | None:
    """transformers 5 nests RoPE parameters per layer kind ("main" and "compress"); only the latter has YaRN."""
    if not isinstance(parameters, dict):
        return None
    return parameters.get("compress", parameters if "factor" in parameters else None)


def _read_quantization(raw: Any) -> bool:
    if raw is None:
        return False
    if not isinstance(raw, dict):
        raise ConfigError(f"`quantization_config` is {raw!r}; V4 checkpoints have an object with `quant_method` fp8")
    for key, value in raw.items():
        wanted = _QUANTIZATION_CONFIG.get(key, "no such key")
        if value != wanted:
            raise ConfigError(f"`quantization_config.{key}` is {value!r}; V4 checkpoints use {wanted!r}")
    return True


def _read_inference_form(raw: dict[str, Any]) -> dict[str, Any]:
    rope_keys = {"original_seq_len": "original_max_position_embeddings", "rope_factor": "factor",
                 "beta_fast": "beta_fast", "beta_slow": "beta_slow"}  # fmt: skip
    same = {
        "vocab_size", "q_lora_rank", "head_dim", "o_groups", "o_lora_rank", "rope_theta", "compress_rope_theta",
        "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts", "n_shared_experts", "swiglu_limit",
        "hc_mult", "hc_sinkhorn_iters", "hc_eps", "compress_ratios", "dspark_block_size", "dspark_noise_token_id",
        "dspark_target_layer_ids", "dspark_markov_rank", "expert_dtype",
    }  # fmt: skip
    other = {"dtype", "scale_fmt", "scale_dtype", "n_mtp_layers", "max_seq_len", "max_batch_size"}
    for key in raw:
        if key not in same | other | rope_keys.keys() | _INFERENCE_NAMES.keys():
            raise ConfigError(
                f"unknown key `{key}` in an inference config; check it against V4's inference/config.json"
            )
    for key in ("compress_rope_theta", "rope_factor", "original_seq_len", "route_scale"):
        if key not in raw:  # the official code's defaults for these are not the released values
            raise ConfigError(f"inference config lacks `{key}`; copy it from the release's inference/config.json")
    _require(raw, {v: k for k, v in _INFERENCE_NAMES.items()})
    out = {k: raw[k] for k in same if k in raw}
    out |= {v: raw[k] for k, v in _INFERENCE_NAMES.items() if k in raw}
    out["rope_scaling"] = RopeScaling(**{v: raw[k] for k, v in rope_keys.items() if k in raw})
    out["quantization"] = raw.get("dtype", "bf16") == "fp8"
    out["expert_dtype"] = _read_expert_dtype(raw.get("expert_dtype"))
    if raw.get("scale_fmt", "ue8m0") != "ue8m0" or raw.get("dtype", "bf16") not in ("fp8", "bf16"):
        raise ConfigError("`dtype` must be fp8 or bf16 and `scale_fmt` ue8m0; V4 has no other formats")
    trailing = max(len(raw["compress_ratios"]) - raw["n_layers"], 0)
    stages = raw.get("n_mtp_layers", trailing)
    if stages != trailing:
        raise ConfigError(
            f"`n_mtp_layers` is {stages} but `compress_ratios` has {trailing} entries after the main layers"
        )
    out["num_nextn_predict_layers"] = min(stages, 1)
    return _tuples(out)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def read_form(raw: dict[str, Any]) -> dict[str, Any]:
    """Field values of a ModelConfig from either form; ConfigError names any offending key."""
    if "hidden_size" not in raw and "dim" not in raw:
        raise ConfigError("config has neither `hidden_size` nor `dim`; is this a DeepSeek-V4 config.json?")
    return _read_inference_form(raw) if "dim" in raw else _read_hf_form(raw)


def write_hf_form(config: ModelConfig) -> dict[str, Any]:
    """The Hugging Face form of a configuration, ready for `config.json`."""
    out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "quantization":
            if value:
                out["quantization_config"] = dict(_QUANTIZATION_CONFIG)
        elif field.name == "rope_scaling":
            out["rope_scaling"] = dataclasses.asdict(value)
        elif isinstance(value, tuple):
            if value:
                out[field.name] = list(value)
        elif value is not None:
            out[field.name] = value
    return out | dict(_FIXED)
