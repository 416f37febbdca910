"""ModelConfig: one frozen description of a DeepSeek-V4 model, read from either official configuration form.

Field names are the keys of the Hugging Face `config.json`; `inference/config.json` uses other names for some of them and
is translated here. The layer plan says for every layer which attention, routing and RoPE base it has; rooms above read
the plan and never `compress_ratios` itself.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

CSA_RATIO = 4  # the only ratio with overlapping blocks and an indexer; every other non-zero ratio is HCA

Attention = Literal["swa", "csa", "hca"]
Routing = Literal["hash", "learned"]
WeightFormat = Literal["fp4", "fp8", "bf16"]


class ConfigError(ValueError):
    """A configuration that cannot describe a V4 model; the message names the key and the remedy."""


@dataclass(frozen=True)
class RopeScaling:
    """YaRN as used by the compressed layers."""

    factor: float = 16
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32
    beta_slow: float = 1
    type: str = "yarn"


@dataclass(frozen=True)
class LayerSpec:
    """What one block is made of. `ratio` counts source tokens per compressed entry, 0 for window-only layers."""

    index: int
    attention: Attention
    ratio: int
    routing: Routing
    rope_theta: float
    yarn: bool


@dataclass(frozen=True)
class ModelConfig:
    """A V4 model in official key names; raises ConfigError for impossible values when constructed."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    n_shared_experts: int = 1
    num_key_value_heads: int = 1
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 0
    scoring_func: str = "sqrtsoftplus"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    initializer_range: float = 0.02
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    quantization: bool = True  # dense projections in FP8 E4M3 with 128x128 UE8M0 scales
    expert_dtype: str | None = "fp4"
    dspark_block_size: int | None = None
    dspark_noise_token_id: int | None = None
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int | None = None

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def draft_stages(self) -> int:
        """Number of `mtp.*` blocks: the entries of `compress_ratios` after the main layers."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def draft(self) -> Literal["none", "mtp", "dspark"]:
        """Which draft head the model carries."""
        if not self.draft_stages:
            return "none"
        return "dspark" if self.dspark_block_size is not None else "mtp"

    @property
    def expert_format(self) -> WeightFormat:
        """Format of routed experts that the configuration announces; a checkpoint's own tensors decide over it."""
        if self.expert_dtype in ("fp4", "fp8"):
            return self.expert_dtype  # type: ignore[return-value]
        return "fp8" if self.quantization else "bf16"

    @property
    def dense_format(self) -> WeightFormat:
        """Format of the attention, shared-expert and draft projections."""
        return "fp8" if self.quantization else "bf16"

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The main layers in order."""
        return tuple(self._layer(i) for i in range(self.num_hidden_layers))

    @property
    def draft_layers(self) -> tuple[LayerSpec, ...]:
        """The blocks of the draft head in order; always window-only with learned routing."""
        return tuple(self._layer(self.num_hidden_layers + i) for i in range(self.draft_stages))

    def _layer(self, i: int) -> LayerSpec:
        ratio = self.compress_ratios[i]
        attention: Attention = "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"
        return LayerSpec(
            index=i,
            attention=attention,
            ratio=ratio,
            routing="hash" if i < self.num_hash_layers else "learned",
            rope_theta=self.compress_rope_theta if ratio else self.rope_theta,
            yarn=ratio > 0,
        )

    def replace(self, **changes: Any) -> ModelConfig:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)

    def without_draft(self) -> ModelConfig:
        """The same model without its draft head."""
        return self.replace(
            compress_ratios=self.compress_ratios[: self.num_hidden_layers],
            num_nextn_predict_layers=0,
            dspark_block_size=None,
            dspark_noise_token_id=None,
            dspark_target_layer_ids=(),
            dspark_markov_rank=None,
        )

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> ModelConfig:
        """Read either official form (recognised by `hidden_size` or `dim`); ConfigError names any offending key."""
        if "hidden_size" not in raw and "dim" not in raw:
            raise ConfigError("config has neither `hidden_size` nor `dim`; is this a DeepSeek-V4 config.json?")
        return cls(**(_read_inference_form(raw) if "dim" in raw else _read_hf_form(raw)))

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read a JSON file in either official form."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist; a model directory needs the official config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not valid JSON ({error}); fetch the file again") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path} holds a JSON {type(raw).__name__}, not an object; fetch the file again")
        return cls.from_dict(raw)

    def to_dict(self) -> dict[str, Any]:
        """The Hugging Face form, ready for `config.json`."""
        out: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
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
# Keys that describe other software's run-time behaviour and do not change the function computed here.
_IGNORED = {
    "architectures", "model_type", "transformers_version", "use_cache", "auto_map", "pad_token_id", "mlp_bias",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "rope_parameters", "layer_types",
    "mlp_layer_types", "dtype", "_name_or_path", "return_dict", "output_hidden_states", "is_encoder_decoder",
    "output_attentions", "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "n_group", "topk_group",
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
    known = _field_names() - {"quantization"} | _IGNORED | _FIXED.keys() | {"quantization_config"}
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown config key `{key}`; remove it or check the spelling against config.json of V4")
    for key, value in _FIXED.items():
        if raw.get(key, value) != value:
            raise ConfigError(f"`{key}` is {raw[key]!r}, but V4 models are only defined for {value!r}")
    _require(raw, {})
    out = {k: v for k, v in raw.items() if k in _field_names()}
    out["rope_scaling"] = _read_rope_scaling(raw)
    out["quantization"] = _read_quantization(raw.get("quantization_config"))
    out["expert_dtype"] = _read_expert_dtype(raw.get("expert_dtype"))
    return _tuples(out)


def _read_expert_dtype(value: Any) -> str | None:
    if value in ("none", "bf16", "bfloat16"):
        return None
    return value


def _read_rope_scaling(raw: dict[str, Any]) -> RopeScaling:
    scaling = raw.get("rope_scaling") or _hf5_rope(raw.get("rope_parameters"))
    if not scaling:
        raise ConfigError("config lacks `rope_scaling`; V4 needs the YaRN parameters (factor 16, original 65536)")
    scaling = dict(scaling)
    kind = scaling.pop("rope_type", scaling.get("type", "yarn"))
    scaling.setdefault("type", kind)
    for key in ("rope_theta", "partial_rotary_factor", "attention_factor", "truncate"):
        scaling.pop(key, None)
    unknown = scaling.keys() - {f.name for f in dataclasses.fields(RopeScaling)}
    if unknown:
        raise ConfigError(f"unknown key `{sorted(unknown)[0]}` in `rope_scaling`; only YaRN's keys are defined for V4")
    if scaling["type"] != "yarn":
        raise ConfigError(f"`rope_scaling.type` is {scaling['type']!r}; V4's compressed layers use 'yarn'")
    return RopeScaling(**scaling)


def _hf5_rope(parameters: Any) -> dict[str, Any] | None:
    """transformers 5 nests RoPE parameters per layer kind ("main" and "compress"); only the latter has YaRN."""
    if not isinstance(parameters, dict):
        return None
    return parameters.get("compress", parameters if "factor" in parameters else None)


def _read_quantization(raw: Any) -> bool:
    if raw is None:
        return False
    for key, value in _QUANTIZATION_CONFIG.items():
        if raw.get(key, value) != value:
            raise ConfigError(f"`quantization_config.{key}` is {raw[key]!r}; V4 checkpoints use {value!r}")
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
            raise ConfigError(f"unknown key `{key}` in an inference config; check it against V4's inference/config.json")
    for key in ("compress_rope_theta", "rope_factor", "original_seq_len", "route_scale"):
        if key not in raw:  # the official code's defaults for these are not the released values
            raise ConfigError(f"inference config lacks `{key}`; copy it from the release's inference/config.json")
    _require(raw, {v: k for k, v in _INFERENCE_NAMES.items()})
    out = {k: raw[k] for k in same if k in raw}
    out |= {v: raw[k] for k, v in _INFERENCE_NAMES.items() if k in raw}
    out["rope_scaling"] = RopeScaling(**{v: raw[k] for k, v in rope_keys.items() if k in raw})
    out["quantization"] = raw.get("dtype", "bf16") == "fp8"
    out["expert_dtype"] = _read_expert_dtype(raw.get("expert_dtype"))
    trailing = len(raw["compress_ratios"]) - raw["n_layers"]
    stages = raw.get("n_mtp_layers", trailing)
    if stages != trailing:
        raise ConfigError(f"`n_mtp_layers` is {stages} but `compress_ratios` has {trailing} entries after the main layers")
    out["num_nextn_predict_layers"] = min(stages, 1)
    return _tuples(out)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def _validate(c: ModelConfig) -> None:
    def need(ok: bool, message: str) -> None:
        if not ok:
            raise ConfigError(message)

    for field in dataclasses.fields(c):
        value = getattr(c, field.name)
        if field.type == "int":
            need(isinstance(value, int) and not isinstance(value, bool), f"`{field.name}` is {value!r}, not an integer")
            zero_ok = field.name in ("num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id")
            need(value >= (0 if zero_ok else 1), f"`{field.name}` is {value}; it must be {'0 or more' if zero_ok else 'positive'}")
        elif field.type == "float":
            need(isinstance(value, (int, float)) and value > 0, f"`{field.name}` is {value!r}; it must be a positive number")
    need(len(c.compress_ratios) >= c.num_hidden_layers,
         f"`compress_ratios` has {len(c.compress_ratios)} entries for {c.num_hidden_layers} layers; give one per layer")
    need(all(isinstance(r, int) and r >= 0 for r in c.compress_ratios), "`compress_ratios` must hold integers >= 0")
    need(not any(c.compress_ratios[c.num_hidden_layers :]),
         "`compress_ratios` entries after the main layers belong to the draft head and must be 0")
    need(c.qk_rope_head_dim % 2 == 0 and c.qk_rope_head_dim <= c.head_dim,
         f"`qk_rope_head_dim` {c.qk_rope_head_dim} must be even and at most `head_dim` {c.head_dim}")
    need(c.qk_rope_head_dim <= c.index_head_dim,
         f"`qk_rope_head_dim` {c.qk_rope_head_dim} exceeds `index_head_dim` {c.index_head_dim}")
    need(c.index_head_dim & (c.index_head_dim - 1) == 0,
         f"`index_head_dim` {c.index_head_dim} must be a power of two for the Hadamard transform")
    need((c.num_attention_heads * c.head_dim) % c.o_groups == 0 and c.num_attention_heads % c.o_groups == 0,
         f"`num_attention_heads` {c.num_attention_heads} must be a multiple of `o_groups` {c.o_groups}")
    need(c.num_experts_per_tok <= c.n_routed_experts,
         f"`num_experts_per_tok` {c.num_experts_per_tok} exceeds `n_routed_experts` {c.n_routed_experts}")
    need(c.num_key_value_heads == 1, f"`num_key_value_heads` is {c.num_key_value_heads}; V4 shares one KV head")
    need(c.n_shared_experts == 1, f"`n_shared_experts` is {c.n_shared_experts}; V4 has one shared expert")
    need(c.scoring_func == "sqrtsoftplus", f"`scoring_func` is {c.scoring_func!r}; V4 uses 'sqrtsoftplus'")
    need(c.topk_method == "noaux_tc", f"`topk_method` is {c.topk_method!r}; V4 uses 'noaux_tc'")
    need(c.norm_topk_prob, "`norm_topk_prob` is false; V4 normalises the selected routing weights")
    need(c.expert_dtype in (None, "fp4", "fp8"), f"`expert_dtype` is {c.expert_dtype!r}; use 'fp4', 'fp8' or leave it out")
    need(c.num_hash_layers <= c.num_hidden_layers,
         f"`num_hash_layers` {c.num_hash_layers} exceeds `num_hidden_layers` {c.num_hidden_layers}")
    if c.dspark_block_size is not None:
        need(c.dspark_markov_rank is not None and c.dspark_noise_token_id is not None and bool(c.dspark_target_layer_ids),
             "`dspark_block_size` needs `dspark_markov_rank`, `dspark_noise_token_id` and `dspark_target_layer_ids` too")
        need(c.draft_stages > 0, "`dspark_block_size` is set but `compress_ratios` has no entries for the draft stages")
        need(all(0 <= i < c.num_hidden_layers for i in c.dspark_target_layer_ids),
             f"`dspark_target_layer_ids` {list(c.dspark_target_layer_ids)} name layers the model does not have")
        need(0 <= (c.dspark_noise_token_id or 0) < c.vocab_size, "`dspark_noise_token_id` lies outside the vocabulary")
    elif c.draft_stages:
        need(c.draft_stages == c.num_nextn_predict_layers,
             f"`compress_ratios` has {c.draft_stages} entries after the main layers but `num_nextn_predict_layers` is "
             f"{c.num_nextn_predict_layers}; give one 0 per MTP block")


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
        compress_ratios=c.compress_ratios + (0, 0), dspark_block_size=5, dspark_noise_token_id=128799,
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
