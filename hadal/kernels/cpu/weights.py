"""Which matrices of a model are packed, and how: products that read the same rows become one matrix.

Legend: d hidden, E experts, I expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels.cpu.matmul import BLOCK, PANEL, Format, panel_bytes
from hadal.kernels.cpu.pack import Weight, form_of, pack, pack_pair, packed_bytes
from hadal.kernels.cpu.packed import PAGE, Packing
from hadal.quant import quantise_fp4

Lookup = Callable[[str], Any]  # a Tensor, a PackedWeight, or a list of them for experts


@dataclass(frozen=True)
class Matrix:
    """A packed matrix, or a stack of equal ones: form, output columns, input columns.

    It lies `offset` bytes into the packing `place`, its own by default, those of a stack `step` bytes apart.
    """

    name: str
    form: Format
    rows: int
    columns: int
    place: str = ""
    offset: int = 0
    step: int = 0

    @property
    def panels(self) -> int:
        """Panels of one matrix."""
        return -(-self.rows // PANEL)

    @property
    def blocks(self) -> int:
        """Blocks of 32 k."""
        return -(-self.columns // BLOCK)

    @property
    def nbytes(self) -> int:
        """Bytes of one matrix."""
        return self.panels * panel_bytes(self.form, self.blocks)


@dataclass(frozen=True)
class Plan:
    """What is to be packed: matrices by name, and what writes them."""

    matrices: dict[str, Matrix]
    items: list[Packing]


def plan_packing(config: ModelConfig, lookup: Lookup) -> Plan:
    """Every matrix of the main layers, the head and an MTP block."""
    plan = Plan({}, [])
    for i, layer in enumerate(config.layers):
        _add_layer(plan, config, layer, f"layers.{i}.", lookup)
    _add(plan, "head", [lookup("head")])
    if config.draft == "mtp":
        _add_layer(plan, config, config.draft_layers[0], "draft.0.", lookup)
        for name in ("draft.0.e_proj", "draft.0.h_proj"):
            _add(plan, name, [lookup(name)])
        # Drafts need not be exact, and reading the head is most of what a draft costs.
        head, shape = lookup("head"), Matrix("draft.0.head", "fp4", config.vocab_size, config.hidden_size)
        plan.matrices[shape.name] = shape
        plan.items.append(Packing(shape.name, shape.nbytes, lambda out, _: pack(quantise_fp4(head), out)))
    return plan


def _add_layer(plan: Plan, config: ModelConfig, layer: LayerSpec, at: str, lookup: Lookup) -> None:
    for name, parts in _layer_matrices(config, layer, at, lookup):
        _add(plan, name, parts)
    _add_experts(plan, f"{at}ffn.experts", lookup)
    _add_pair(plan, f"{at}ffn.shared", lookup)


def _layer_matrices(
    config: ModelConfig, layer: LayerSpec, at: str, lookup: Lookup
) -> Iterator[tuple[str, list[Weight]]]:
    for name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b"):
        yield f"{at}attn.{name}", [lookup(f"{at}attn.{name}")]
    yield f"{at}ffn.gate", [lookup(f"{at}ffn.gate.weight")]
    if layer.ratio:
        parts = [lookup(f"{at}attn.compressor.{name}") for name in ("wkv", "wgate")]
        yield f"{at}attn.compressor", parts
    if layer.attention == "csa":
        inner = f"{at}attn.indexer."
        yield f"{at}attn.indexer.wq_b", [lookup(f"{inner}wq_b")]
        yield f"{at}attn.indexer.compressor", [lookup(f"{inner}compressor.{name}") for name in ("wkv", "wgate")]
        yield f"{at}attn.indexer.weights_proj", [lookup(f"{inner}weights_proj")]


def _add(plan: Plan, name: str, parts: Sequence[Weight]) -> None:
    form = form_of(parts[0])
    rows, columns = sum(p.shape[0] for p in parts), parts[0].shape[1]

    def write(out: Tensor, _: int) -> None:
        dense = [p.to(torch.bfloat16) for p in parts if isinstance(p, Tensor)]
        pack(torch.cat(dense) if len(parts) > 1 else parts[0], out)

    plan.matrices[name] = Matrix(name, form, rows, columns)
    plan.items.append(Packing(name, packed_bytes(form, rows, columns), write))


def _add_pair(plan: Plan, name: str, lookup: Lookup) -> None:
    w1, w2, w3 = (lookup(f"{name}.{w}") for w in ("w1", "w2", "w3"))
    form, (width, hidden) = form_of(w1), w1.shape
    into = Matrix(f"{name}.in", form, 2 * width, hidden)
    plan.matrices[into.name] = into
    plan.items.append(Packing(into.name, into.nbytes, lambda out, _: pack_pair(w1, w3, out)))
    _add(plan, f"{name}.w2", [w2])


def _add_experts(plan: Plan, name: str, lookup: Lookup) -> None:
    """Both matrices of an expert lie together, so that one read fetches it."""
    w1, w2, w3 = (lookup(f"{name}.{w}") for w in ("w1", "w2", "w3"))
    form, (width, hidden) = form_of(w1[0]), w1[0].shape
    into, back = -(-packed_bytes(form, 2 * width, hidden) // 64) * 64, packed_bytes(form, hidden, width)
    step = -(-(into + back) // PAGE) * PAGE
    plan.matrices[f"{name}.in"] = Matrix(f"{name}.in", form, 2 * width, hidden, name, 0, step)
    plan.matrices[f"{name}.w2"] = Matrix(f"{name}.w2", form, hidden, width, name, into, step)

    def write(out: Tensor, e: int) -> None:
        pack_pair(w1[e], w3[e], out[:into])
        pack(w2[e], out[into : into + back])

    plan.items.append(Packing(name, step, write, len(w1)))
