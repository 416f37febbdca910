"""Parameters, cache bytes and weight traffic that follow from a configuration alone.

Legend: d hidden, D head dim, R rotary dims, E experts, I expert width, r source tokens per compressed entry.
"""

from __future__ import annotations

from dataclasses import dataclass

from hadal.config import LayerSpec, ModelConfig, WeightFormat

_SCALE_GROUP = 64  # dims of a cached KV entry per FP8 scale byte
_INDEX_GROUP = 32  # dims of a cached index key per FP4 scale byte
_F32 = 4
_FP4_GROUP = 32  # columns of an FP4 row per scale byte
_FP8_BLOCK = 128  # rows and columns of an FP8 matrix per scale byte


@dataclass(frozen=True)
class Count:
    """What a model is made of. Parameters leave the draft head out, as the published totals do."""

    parameters: int
    active_parameters: int  # routed and shared experts of one token, head included, embedding not
    draft_parameters: int
    kv_bytes_per_token: float  # compressed entries and index keys, which grow with the context
    state_bytes: int  # windows and compressor states of one sequence, whatever its length


def count(config: ModelConfig) -> Count:
    """Count `config`; source: spec architecture 1.1, 2.10, 6.1."""
    vocabulary = config.vocab_size * config.hidden_size
    closing = config.hidden_size + _collapse(config)
    shared = sum(_block(config, layer) for layer in config.layers)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    routed = config.num_hidden_layers * expert
    draft_experts = config.draft_stages * config.n_routed_experts * expert
    return Count(
        parameters=2 * vocabulary + closing + shared + routed * config.n_routed_experts,
        active_parameters=vocabulary + closing + shared + routed * config.num_experts_per_tok,
        draft_parameters=sum(_block(config, layer) for layer in config.draft_layers) + draft_experts + _draft(config),
        kv_bytes_per_token=sum(_cached(config, layer) for layer in config.layers),
        state_bytes=sum(_state(config, layer) for layer in config.layers),
    )


def active_bytes(config: ModelConfig, rows: int = 1) -> float:
    """Bytes of weights that a step of `rows` tokens reads, in the formats that the configuration announces.

    Head included, embedding and draft head not. Of the routed experts it counts as many as `rows` tokens are expected
    to touch when each takes its share at random. Source: spec architecture 6.1, 6.2.
    """
    wide, narrow = config.moe_intermediate_size, config.hidden_size
    share = config.num_experts_per_tok / config.n_routed_experts
    touched = config.n_routed_experts * (1 - (1 - share) ** rows)
    expert = 2 * _stored(wide, narrow, config.expert_format) + _stored(narrow, wide, config.expert_format)
    closing = 2 * config.vocab_size * narrow + 2 * narrow + _F32 * _collapse(config)
    return closing + touched * expert * config.num_hidden_layers + sum(_read(config, x) for x in config.layers)


def kv_entry_bytes(config: ModelConfig) -> int:
    """Bytes of one cached KV entry: E4M3 for the dims without rotation, BF16 for the R others, scales padded to 8."""
    plain = config.head_dim - config.qk_rope_head_dim
    return plain + 2 * config.qk_rope_head_dim + -(-plain // _SCALE_GROUP // 8) * 8


def index_key_bytes(config: ModelConfig) -> int:
    """Bytes of one cached index key in FP4 with its scales."""
    return config.index_head_dim // 2 + -(-config.index_head_dim // _INDEX_GROUP)


def _cached(c: ModelConfig, layer: LayerSpec) -> float:
    if layer.attention == "swa":
        return 0.0
    return (kv_entry_bytes(c) + (index_key_bytes(c) if layer.attention == "csa" else 0)) / layer.ratio


def _state(c: ModelConfig, layer: LayerSpec) -> int:
    window = c.sliding_window * kv_entry_bytes(c)
    if layer.attention == "swa":
        return window
    series = 2 if layer.attention == "csa" else 1
    widths = c.head_dim + (c.index_head_dim if layer.attention == "csa" else 0)
    return window + 2 * _F32 * (series * layer.ratio) * (series * widths)


def _block(c: ModelConfig, layer: LayerSpec) -> int:
    """Everything of a block but its routed experts."""
    d, heads, low = c.hidden_size, c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    mixes = (2 + c.hc_mult) * c.hc_mult
    total = 2 * (d + mixes * c.hc_mult * d + mixes + 3)  # two norms, two mHC sites
    total += c.num_attention_heads + c.q_lora_rank * (d + 1 + heads) + c.head_dim * (d + 1)
    total += c.o_lora_rank * heads + d * low
    if layer.attention != "swa":
        total += _compressor(c, layer, c.head_dim)
    if layer.attention == "csa":
        total += c.index_n_heads * (c.index_head_dim * c.q_lora_rank + d) + _compressor(c, layer, c.index_head_dim)
    total += c.n_routed_experts * d + (c.n_routed_experts if layer.routing == "learned" else 0)
    return total + c.n_shared_experts * 3 * d * c.moe_intermediate_size


def _read(c: ModelConfig, layer: LayerSpec) -> float:
    """Bytes of a block but its routed experts: quantisable matrices, a few FP32 vectors, everything else in BF16."""
    d, heads, low = c.hidden_size, c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
    matrices = [(c.q_lora_rank, d), (heads, c.q_lora_rank), (c.head_dim, d), (low, heads // c.o_groups), (d, low)]
    matrices += [(c.n_shared_experts * c.moe_intermediate_size, d)] * 2
    matrices += [(d, c.n_shared_experts * c.moe_intermediate_size)]
    mixes = (2 + c.hc_mult) * c.hc_mult
    single = 2 * (mixes * c.hc_mult * d + mixes + 3) + c.num_attention_heads
    single += c.n_routed_experts if layer.routing == "learned" else 0
    if layer.attention == "csa":
        matrices += [(c.index_n_heads * c.index_head_dim, c.q_lora_rank)]
        single += layer.ratio * 2 * (c.head_dim + c.index_head_dim)
    elif layer.attention == "hca":
        single += layer.ratio * c.head_dim
    rest = _block(c, layer) - single - sum(rows * columns for rows, columns in matrices)
    return sum(_stored(*shape, c.dense_format) for shape in matrices) + _F32 * single + 2 * rest


def _stored(rows: int, columns: int, form: WeightFormat) -> float:
    """Bytes of a matrix with its scales."""
    if form == "fp4":
        return rows * (columns / 2 + columns / _FP4_GROUP)
    return rows * columns + -(-rows // _FP8_BLOCK) * -(-columns // _FP8_BLOCK) if form == "fp8" else 2 * rows * columns


def _compressor(c: ModelConfig, layer: LayerSpec, width: int) -> int:
    both = width * (2 if layer.attention == "csa" else 1)
    return 2 * both * c.hidden_size + layer.ratio * both + width


def _collapse(c: ModelConfig) -> int:
    return c.hc_mult * c.hc_mult * c.hidden_size + c.hc_mult + 1


def _draft(c: ModelConfig) -> int:
    d = c.hidden_size
    if c.draft == "mtp":
        return c.draft_stages * (2 * d * d + 3 * d + _collapse(c))
    if c.draft == "none":
        return 0
    rank = c.dspark_markov_rank or 0
    entry = len(c.dspark_target_layer_ids) * d * d + d
    return entry + d + _collapse(c) + 2 * c.vocab_size * rank + d + rank
