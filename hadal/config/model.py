"""ModelConfig: one frozen description of a DeepSeek-V4 model, read from either official configuration form.

Field names are the keys of the Hugging Face `config.json`; `inference/config.json` uses other names for some of them
and is translated here. The layer plan says for every layer which attention, routing and RoPE base it has; rooms above
read the plan and never `compress_ratios` itself.
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

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise ConfigError(f"`rope_scaling.{name}` is {value!r}; it must be a positive number")
        if self.type != "yarn":
            raise ConfigError(f"`rope_scaling.type` is {self.type!r}; V4's compressed layers use 'yarn'")


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
        from hadal.config.forms import read_form

        return cls(**read_form(raw))

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
        from hadal.config.forms import write_hf_form

        return write_hf_form(self)


_MAY_BE_ZERO = ("num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "dspark_noise_token_id")


def _validate(c: ModelConfig) -> None:
    for field in dataclasses.fields(c):
        _validate_type(field.name, str(field.type), getattr(c, field.name))
    ratios, layers = c.compress_ratios, c.num_hidden_layers
    draft_ratios = ratios[layers:]
    rules = [
        (len(ratios) >= layers, f"`compress_ratios` has {len(ratios)} entries for {layers} layers; give one per layer"),
        (not any(draft_ratios), "`compress_ratios` after the main layers belong to the draft head and must be 0"),
        (
            c.qk_rope_head_dim % 2 == 0 and c.qk_rope_head_dim <= c.head_dim,
            f"`qk_rope_head_dim` {c.qk_rope_head_dim} must be even and at most `head_dim` {c.head_dim}",
        ),
        (
            c.qk_rope_head_dim <= c.index_head_dim,
            f"`qk_rope_head_dim` {c.qk_rope_head_dim} exceeds `index_head_dim` {c.index_head_dim}",
        ),
        (
            c.index_head_dim & (c.index_head_dim - 1) == 0,
            f"`index_head_dim` {c.index_head_dim} must be a power of two for the Hadamard transform",
        ),
        (
            c.num_attention_heads % c.o_groups == 0,
            f"`num_attention_heads` {c.num_attention_heads} must be a multiple of `o_groups` {c.o_groups}",
        ),
        (
            c.num_experts_per_tok <= c.n_routed_experts,
            f"`num_experts_per_tok` {c.num_experts_per_tok} exceeds `n_routed_experts` {c.n_routed_experts}",
        ),
        (c.hc_mult > 1, f"`hc_mult` is {c.hc_mult}; hyper-connections need at least 2 streams"),
        (c.num_key_value_heads == 1, f"`num_key_value_heads` is {c.num_key_value_heads}; V4 shares one KV head"),
        (c.n_shared_experts == 1, f"`n_shared_experts` is {c.n_shared_experts}; V4 has one shared expert"),
        (c.scoring_func == "sqrtsoftplus", f"`scoring_func` is {c.scoring_func!r}; V4 uses 'sqrtsoftplus'"),
        (c.topk_method == "noaux_tc", f"`topk_method` is {c.topk_method!r}; V4 uses 'noaux_tc'"),
        (c.norm_topk_prob, "`norm_topk_prob` is false; V4 normalises the selected routing weights"),
        (c.expert_dtype in (None, "fp4", "fp8"), f"`expert_dtype` is {c.expert_dtype!r}; use 'fp4', 'fp8' or nothing"),
        (c.num_hash_layers <= layers, f"`num_hash_layers` {c.num_hash_layers} exceeds `num_hidden_layers` {layers}"),
        (c.bos_token_id < c.vocab_size, f"`bos_token_id` {c.bos_token_id} lies outside the vocabulary"),
        (c.eos_token_id < c.vocab_size, f"`eos_token_id` {c.eos_token_id} lies outside the vocabulary"),
    ]
    if c.expert_format == "fp4":
        for name in ("hidden_size", "moe_intermediate_size"):
            rules.append((getattr(c, name) % 32 == 0, f"`{name}` must be a multiple of 32 for FP4 experts"))
    if c.dspark_block_size is not None:
        targets = c.dspark_target_layer_ids
        rules += [
            (
                c.dspark_markov_rank is not None and c.dspark_noise_token_id is not None and bool(targets),
                "`dspark_block_size` needs `dspark_markov_rank`, `dspark_noise_token_id` and `dspark_target_layer_ids`",
            ),
            (
                bool(draft_ratios),
                "`dspark_block_size` is set but `compress_ratios` has no entries for the draft stages",
            ),
            (
                list(targets) == sorted(set(targets)),
                f"`dspark_target_layer_ids` {list(targets)} must rise, each layer once",
            ),
            (
                all(isinstance(i, int) and 0 <= i < layers for i in targets),
                f"`dspark_target_layer_ids` {list(targets)} name layers the model does not have",
            ),
            ((c.dspark_noise_token_id or 0) < c.vocab_size, "`dspark_noise_token_id` lies outside the vocabulary"),
        ]
    elif draft_ratios:
        stages = len(draft_ratios)
        rules += [
            (
                stages == c.num_nextn_predict_layers,
                f"`compress_ratios` has {stages} entries after the main layers but `num_nextn_predict_layers` is "
                f"{c.num_nextn_predict_layers}; give one 0 per MTP block",
            ),
            (stages == 1, f"`num_nextn_predict_layers` is {stages}; V4 has one MTP block"),
        ]
    for ok, message in rules:
        if not ok:
            raise ConfigError(message)


def _validate_type(name: str, kind: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "int" or (kind == "int | None" and value is not None):
        least = int(name not in _MAY_BE_ZERO)
        if not number or not isinstance(value, int) or value < least:
            raise ConfigError(f"`{name}` is {value!r}; it must be an integer of at least {least}")
    elif kind == "float" and not (number and value > 0):
        raise ConfigError(f"`{name}` is {value!r}; it must be a positive number")
    elif kind.startswith("tuple"):
        if not isinstance(value, tuple) or not all(isinstance(v, int) and v >= 0 for v in value):
            raise ConfigError(f"`{name}` is {value!r}; it must be a list of integers of 0 or more")
    elif kind == "str" and not isinstance(value, str):
        raise ConfigError(f"`{name}` is {value!r}; it must be text")
    elif kind == "bool" and not isinstance(value, bool):
        raise ConfigError(f"`{name}` is {value!r}; it must be true or false")
