"""A checkpoint as a GGUF file that llama.cpp runs as `deepseek4`; the draft head has no place there.

Layout: magic and version, counts, key/value pairs, tensor infos with innermost dimension first, then data in blocks of
32 bytes. Norms, mHC, gate and position tables stay FP32; matrices are BF16, Q8_0, or ("mxfp4") Q8_0 with the routed
experts in their own FP4 codes.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hadal.checkpoint import Checkpoint, TensorSpec, open_checkpoint
from hadal.config import ModelConfig
from hadal.quant import PackedWeight

TYPES = ("bf16", "q8_0", "mxfp4")
_GGML = {"f32": 0, "q8_0": 8, "i32": 26, "bf16": 30, "mxfp4": 39}
_U32, _F32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_ALIGNMENT = 32
_GROUP = 32  # columns per scale, of Q8_0 and MXFP4 alike
_SQRT_SOFTPLUS = 4

_EXPERT = re.compile(r"\.experts\.\d+\.")
_NAMES = {
    "embed": "token_embd", "head": "output", "norm": "output_norm", "attn.wq_a": "attn_q_a", "attn.wq_b": "attn_q_b",
    "attn.q_norm": "attn_q_a_norm", "attn.wkv": "attn_kv", "attn.kv_norm": "attn_kv_a_norm",
    "attn.wo_a": "attn_output_a", "attn.wo_b": "attn_output_b", "attn.attn_sink": "attn_sinks",
    "attn.compressor.wkv": "attn_compressor_kv", "attn.compressor.wgate": "attn_compressor_gate",
    "attn.compressor.ape": "attn_compressor_ape", "attn.compressor.norm": "attn_compressor_norm",
    "attn.indexer.wq_b": "indexer.attn_q_b", "attn.indexer.weights_proj": "indexer.proj",
    "attn.indexer.compressor.wkv": "indexer_compressor_kv", "attn.indexer.compressor.wgate": "indexer_compressor_gate",
    "attn.indexer.compressor.ape": "indexer_compressor_ape", "attn.indexer.compressor.norm": "indexer_compressor_norm",
    "ffn.gate": "ffn_gate_inp", "ffn.gate.tid2eid": "ffn_gate_tid2eid", "ffn.gate.bias": "exp_probs_b",
    "ffn.experts.w1": "ffn_gate_exps", "ffn.experts.w2": "ffn_down_exps", "ffn.experts.w3": "ffn_up_exps",
    "ffn.shared_experts.w1": "ffn_gate_shexp", "ffn.shared_experts.w2": "ffn_down_shexp",
    "ffn.shared_experts.w3": "ffn_up_shexp",
}  # fmt: skip
_WIDE = re.compile(r"(embed|head|\.w[a-z0-9_]+|weights_proj)$")  # matrices that take the file's type


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: official tensors stacked, since an expert is a slice there."""

    name: str
    type: str
    parts: tuple[TensorSpec, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0]
        matrix = first.matrix_shape if len(first.shape) == 2 else first.shape
        return (len(self.parts), *matrix) if first.expert is not None else matrix

    @property
    def nbytes(self) -> int:
        bits = {"f32": 32, "i32": 32, "bf16": 16, "q8_0": 8.5, "mxfp4": 4.25}[self.type]
        return int(np.prod(self.shape) * bits / 8)


def write_gguf(path: Path, source: Path, form: str) -> None:
    """Write the official checkpoint `source` as a GGUF whose matrices have type `form`."""
    checkpoint = open_checkpoint(source)
    entries = list(_entries(checkpoint, form))
    pairs = list(_pairs(checkpoint.config))
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(pairs)))
        for key, kind, value in pairs:
            file.write(_text(key) + struct.pack("<I", kind) + _packed(kind, value))
        offset = 0
        for entry in entries:
            dims = entry.shape[::-1]
            info = struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, _GGML[entry.type], offset)
            file.write(_text(entry.name) + info)
            offset += entry.nbytes + -entry.nbytes % _ALIGNMENT
        _align(file)
        for entry in entries:
            for part in entry.parts:
                file.write(_encode(checkpoint.weight(part), entry.type))
            _align(file)


def _entries(checkpoint: Checkpoint, form: str) -> Iterator[_Entry]:
    weights = [s for s in checkpoint.table if s.role == "weight" and not s.name.startswith("mtp.")]
    weights.sort(key=lambda s: (s.group, _EXPERT.sub(".experts.", s.name), s.expert or 0))
    for name, parts in groupby(weights, key=lambda s: _EXPERT.sub(".experts.", s.name)):
        stack = tuple(parts)
        prefix, stem = re.match(r"(layers\.\d+\.)?(.*)", name.removesuffix(".weight")).groups()  # type: ignore[union-attr]
        kind = "i32" if stack[0].dtype == "I64" else form if _WIDE.search(stem) else "f32"
        kind = "q8_0" if kind == "mxfp4" and stack[0].expert is None else kind
        short = _NAMES.get(stem, stem if prefix else stem.replace("hc_head", "output_hc"))
        ending = ".bias" if short == "exp_probs_b" else ".weight"
        yield _Entry((prefix or "").replace("layers", "blk") + short + ending, kind, stack)


def _pairs(c: ModelConfig) -> Iterator[tuple[str, int, Any]]:
    yarn = c.rope_scaling
    yield "general.architecture", _STRING, "deepseek4"
    yield "tokenizer.ggml.model", _STRING, "none"
    numbers = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings, "vocab_size": c.vocab_size,
        "embedding_length": c.hidden_size, "embedding_length_out": c.hc_mult * c.hidden_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": 1,
        "attention.key_length": c.head_dim, "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps, "attention.q_lora_rank": c.q_lora_rank,
        "attention.sliding_window": c.sliding_window, "attention.output_group_count": c.o_groups,
        "attention.output_lora_rank": c.o_lora_rank, "attention.indexer.head_count": c.index_n_heads,
        "attention.indexer.key_length": c.index_head_dim, "attention.indexer.top_k": c.index_topk,
        "attention.compress_ratios": c.compress_ratios, "attention.compress_rope_freq_base": c.compress_rope_theta,
        "rope.dimension_count": c.qk_rope_head_dim, "rope.freq_base": c.rope_theta, "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor), "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        "expert_count": c.n_routed_experts, "expert_used_count": c.num_experts_per_tok,
        "expert_feed_forward_length": c.moe_intermediate_size, "feed_forward_length": c.moe_intermediate_size,
        "expert_shared_count": c.n_shared_experts, "expert_weights_scale": c.routed_scaling_factor,
        "expert_weights_norm": c.norm_topk_prob, "expert_gating_func": _SQRT_SOFTPLUS,
        "swiglu_clamp_exp": (c.swiglu_limit,) * c.num_hidden_layers,
        "swiglu_clamp_shexp": (c.swiglu_limit,) * c.num_hidden_layers, "hash_layer_count": c.num_hash_layers,
        "hyper_connection.count": c.hc_mult, "hyper_connection.sinkhorn_iterations": c.hc_sinkhorn_iters,
        "hyper_connection.epsilon": c.hc_eps,
    }  # fmt: skip
    for key, value in numbers.items():
        yield f"deepseek4.{key}", _kind(value), value


def _kind(value: Any) -> int:
    return {bool: _BOOL, int: _U32, float: _F32, str: _STRING, tuple: _ARRAY}[type(value)]


def _packed(kind: int, value: Any) -> bytes:
    if kind == _ARRAY:
        inner = _kind(value[0])
        return struct.pack("<IQ", inner, len(value)) + b"".join(_packed(inner, v) for v in value)
    return _text(value) if kind == _STRING else struct.pack({_U32: "<I", _F32: "<f", _BOOL: "<?"}[kind], value)


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _encode(weight: torch.Tensor | PackedWeight, kind: str) -> bytes:
    if kind == "mxfp4":
        assert isinstance(weight, PackedWeight) and weight.format == "fp4"
        return _mxfp4(weight)
    values = weight.dense() if isinstance(weight, PackedWeight) else weight
    if kind == "q8_0":
        return _q8_0(values)
    dtype = {"f32": torch.float32, "i32": torch.int32, "bf16": torch.bfloat16}[kind]
    return values.to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _q8_0(values: torch.Tensor) -> bytes:
    """Groups of 32 signed bytes behind an FP16 scale."""
    groups = values.float().reshape(-1, _GROUP).numpy()
    scale = np.abs(groups).max(1, keepdims=True) / 127
    codes = np.rint(groups / np.where(scale == 0, 1, scale)).astype(np.int8)
    return np.concatenate([scale.astype("<f2").view(np.int8), codes], axis=1).tobytes()


def _mxfp4(weight: PackedWeight) -> bytes:
    """Groups of an E8M0 byte and 16 bytes, each holding columns j (low half) and j + 16; no value changes."""
    pairs = weight.codes.numpy().reshape(-1, _GROUP // 2)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, _GROUP)
    scales = weight.scales.contiguous().view(torch.uint8).numpy().reshape(-1, 1)
    return np.concatenate([scales, codes[:, :16] | codes[:, 16:] << 4], axis=1).tobytes()
