"""The official tensor list of any configuration: names, dtypes, shapes, shards, and the parameter each one fills.

This is the only module that spells official tensor names; Hugging Face names are derived from them in `hf`.
Legend of shapes: d hidden, H heads, D head dim, E experts, I expert width, r tokens per compressed entry.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from hadal.config import LayerSpec, ModelConfig, WeightFormat
from hadal.quant.weights import FP4_GROUP, FP8_BLOCK

DTYPE_BYTES = {
    "BOOL": 1, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
EXPERT_PROBE = "layers.0.ffn.experts.0.w1.weight"  # its dtype tells the format of every routed expert
DENSE_PROBE = "layers.0.attn.wq_a.weight"  # its dtype tells the format of every other quantisable matrix
DRAFT_PREFIX = "mtp."
# Third-party exports repeat the embedding and the head inside the draft stages; the official converter skips them too.
IGNORABLE = re.compile(r"mtp\.\d+\.(emb\.tok_emb|embed|head)\.weight")

# Neighbouring shard groups share a file below this size; the released models have one group per file under this rule.
SHARD_BYTES = 4 * 2**30

Family = Literal["plain", "dense", "expert"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint in official naming.

    `parameter` is the attribute path in `hadal.model.Model`, `expert` the row of a stacked expert parameter. `family`
    says which format setting governs the tensor. `group` is its place in the official shard order: embedding, one per
    layer, head, one per draft stage.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: str
    expert: int | None
    role: Literal["weight", "scale"]
    family: Family
    group: int

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def scale_name(self) -> str:
        """Name of the scale that belongs to a quantised weight."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Logical [out, in] shape of a matrix; FP4 stores two columns in a byte."""
        rows, columns = self.shape
        return rows, columns * 2 if self.dtype == "I8" else columns


def tensor_table(
    config: ModelConfig, *, expert_format: WeightFormat | None = None, dense_format: WeightFormat | None = None
) -> Iterator[TensorSpec]:
    """Every tensor of an official checkpoint of `config`, in shard order; formats default to the announced ones.

    Source: spec architecture 6.1; the totals of the four releases follow from it exactly.
    """
    build = _Builder(config, expert_format or config.expert_format, dense_format or config.dense_format)
    vocabulary = (config.vocab_size, config.hidden_size)
    yield build.plain("embed.weight", vocabulary, 0)
    for layer in config.layers:
        yield from build.block(f"layers.{layer.index}.", layer, layer.index + 1)
    group = config.num_hidden_layers + 1
    yield build.plain("head.weight", vocabulary, group)
    yield build.plain("norm.weight", (config.hidden_size,), group)
    yield from build.collapse("", group)
    for stage, layer in enumerate(config.draft_layers):
        yield from build.block(f"mtp.{stage}.", layer, group + 1 + stage)
        yield from build.draft_extras(stage, group + 1 + stage)


def shard_plan(specs: Iterable[TensorSpec]) -> list[list[str]]:
    """Tensor names per file, as the releases are sharded; small models fit into one file (spec architecture 6.1)."""
    shards: list[list[str]] = []
    held = 0
    for _, members in groupby(specs, key=lambda spec: spec.group):
        group = list(members)
        size = sum(spec.nbytes for spec in group)
        if not shards or held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1] += [spec.name for spec in group]
        held += size
    return shards


@dataclass(frozen=True)
class _Builder:
    config: ModelConfig
    expert_format: WeightFormat
    dense_format: WeightFormat

    def plain(self, name: str, shape: tuple[int, ...], group: int, dtype: str = "BF16") -> TensorSpec:
        return TensorSpec(name, dtype, shape, _parameter(name), None, "weight", "plain", group)

    def matrix(
        self, name: str, rows: int, columns: int, group: int, *, parameter: str | None = None, expert: int | None = None
    ) -> Iterator[TensorSpec]:
        family: Family = "dense" if expert is None else "expert"
        form = self.dense_format if expert is None else self.expert_format
        parameter = parameter or _parameter(name + ".weight")
        dtype, stored, scales = "BF16", (rows, columns), (0, 0)
        if form == "fp4":
            dtype, stored, scales = "I8", (rows, columns // 2), (rows, columns // FP4_GROUP)
        elif form == "fp8":
            dtype, scales = "F8_E4M3", (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
        yield TensorSpec(name + ".weight", dtype, stored, parameter, expert, "weight", family, group)
        if form != "bf16":
            yield TensorSpec(name + ".scale", "F8_E8M0", scales, parameter, expert, "scale", family, group)

    def block(self, prefix: str, layer: LayerSpec, group: int) -> Iterator[TensorSpec]:
        c = self.config
        mixes = (2 + c.hc_mult) * c.hc_mult
        for site in ("attn", "ffn"):
            yield self.plain(f"{prefix}{site}_norm.weight", (c.hidden_size,), group)
            yield self.plain(f"{prefix}hc_{site}_fn", (mixes, c.hc_mult * c.hidden_size), group, "F32")
            yield self.plain(f"{prefix}hc_{site}_base", (mixes,), group, "F32")
            yield self.plain(f"{prefix}hc_{site}_scale", (3,), group, "F32")
        yield from self.attention(f"{prefix}attn.", layer, group)
        yield from self.mixture(f"{prefix}ffn.", layer, group)

    def attention(self, prefix: str, layer: LayerSpec, group: int) -> Iterator[TensorSpec]:
        c = self.config
        heads = c.num_attention_heads * c.head_dim
        yield self.plain(f"{prefix}attn_sink", (c.num_attention_heads,), group, "F32")
        yield from self.matrix(f"{prefix}wq_a", c.q_lora_rank, c.hidden_size, group)
        yield self.plain(f"{prefix}q_norm.weight", (c.q_lora_rank,), group)
        yield from self.matrix(f"{prefix}wq_b", heads, c.q_lora_rank, group)
        yield from self.matrix(f"{prefix}wkv", c.head_dim, c.hidden_size, group)
        yield self.plain(f"{prefix}kv_norm.weight", (c.head_dim,), group)
        yield from self.matrix(f"{prefix}wo_a", c.o_groups * c.o_lora_rank, heads // c.o_groups, group)
        yield from self.matrix(f"{prefix}wo_b", c.hidden_size, c.o_groups * c.o_lora_rank, group)
        if layer.attention != "swa":
            yield from self.compressor(f"{prefix}compressor.", layer, c.head_dim, group)
        if layer.attention == "csa":
            index = f"{prefix}indexer."
            yield from self.matrix(f"{index}wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank, group)
            yield self.plain(f"{index}weights_proj.weight", (c.index_n_heads, c.hidden_size), group)
            yield from self.compressor(f"{index}compressor.", layer, c.index_head_dim, group)

    def compressor(self, prefix: str, layer: LayerSpec, width: int, group: int) -> Iterator[TensorSpec]:
        both = width * (2 if layer.attention == "csa" else 1)
        yield self.plain(f"{prefix}wkv.weight", (both, self.config.hidden_size), group)
        yield self.plain(f"{prefix}wgate.weight", (both, self.config.hidden_size), group)
        yield self.plain(f"{prefix}ape", (layer.ratio, both), group, "F32")
        yield self.plain(f"{prefix}norm.weight", (width,), group)

    def mixture(self, prefix: str, layer: LayerSpec, group: int) -> Iterator[TensorSpec]:
        c = self.config
        yield self.plain(f"{prefix}gate.weight", (c.n_routed_experts, c.hidden_size), group)
        if layer.routing == "hash":
            yield self.plain(f"{prefix}gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), group, "I64")
        else:
            yield self.plain(f"{prefix}gate.bias", (c.n_routed_experts,), group, "F32")
        wide, narrow = (c.moe_intermediate_size, c.hidden_size), (c.hidden_size, c.moe_intermediate_size)
        shapes = {"w1": wide, "w2": narrow, "w3": wide}
        for matrix, (rows, columns) in shapes.items():
            yield from self.matrix(f"{prefix}shared_experts.{matrix}", rows, columns, group)
        stacked = {matrix: _parameter(f"{prefix}experts.{matrix}.weight") for matrix in shapes}
        for expert in range(c.n_routed_experts):
            for matrix, (rows, columns) in shapes.items():
                name = f"{prefix}experts.{expert}.{matrix}"
                yield from self.matrix(name, rows, columns, group, parameter=stacked[matrix], expert=expert)

    def collapse(self, prefix: str, group: int) -> Iterator[TensorSpec]:
        c = self.config
        yield self.plain(f"{prefix}hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size), group, "F32")
        yield self.plain(f"{prefix}hc_head_base", (c.hc_mult,), group, "F32")
        yield self.plain(f"{prefix}hc_head_scale", (1,), group, "F32")

    def draft_extras(self, stage: int, group: int) -> Iterator[TensorSpec]:
        c, prefix, d = self.config, f"mtp.{stage}.", self.config.hidden_size
        if c.draft == "mtp":
            for name in ("e_proj", "h_proj"):
                yield from self.matrix(prefix + name, d, d, group)
            for name in ("enorm", "hnorm"):
                yield self.plain(f"{prefix}{name}.weight", (d,), group)
        elif stage == 0:
            yield from self.matrix(f"{prefix}main_proj", d, len(c.dspark_target_layer_ids) * d, group)
            yield self.plain(f"{prefix}main_norm.weight", (d,), group)
        if c.draft == "mtp" or stage == c.draft_stages - 1:
            yield self.plain(f"{prefix}norm.weight", (d,), group)
            yield from self.collapse(prefix, group)
        if c.draft == "dspark" and stage == c.draft_stages - 1:
            assert c.dspark_markov_rank is not None
            for name in ("markov_w1", "markov_w2"):
                yield self.plain(f"{prefix}markov_head.{name}.weight", (c.vocab_size, c.dspark_markov_rank), group)
            yield self.plain(f"{prefix}confidence_head.proj.weight", (1, d + c.dspark_markov_rank), group)


def _parameter(name: str) -> str:
    """Attribute path of the model parameter that an official weight name fills."""
    path = re.sub(r"^mtp\.", "draft.", name)
    path = re.sub(r"hc_(attn|ffn|head)_(fn|base|scale)$", r"hc_\1.\2", path)
    path = path.replace("shared_experts.", "shared.").replace("markov_head.", "")
    path = path.replace("confidence_head.proj", "confidence")
    return path if path.endswith("gate.weight") and ".ffn." in path else path.removesuffix(".weight")
