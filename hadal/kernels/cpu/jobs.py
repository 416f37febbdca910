"""The job list of a model: which kernel runs with which addresses, in which order, and where a barrier is needed.

One layer, in order: maps and input of the attention site · projections of it · latent, compressors · tails, unpacked
entries, query heads · index choice · attention · output projections · maps and input of the expert site · gate and
shared expert · routing · experts · their sum, which the next layer's first job takes into the streams.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels.cpu import attention, compress, indexer, int8, matmul, route, rows
from hadal.kernels.cpu.layout import STEP, LayerPlace, Places, Shapes, tail_shape
from hadal.kernels.cpu.memory import Scratch, address, buffer
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, Library
from hadal.kernels.cpu.weights import Lookup, Plan

_LINE = 64


def row_stride(nbytes: int) -> int:
    """Bytes from row to row: an odd number of cache lines, so that rows do not fall on the same sets."""
    lines = -(-nbytes // _LINE)
    return (lines + 1 - lines % 2) * _LINE


class Space:
    """Rows of a step's intermediate values."""

    def __init__(self, width: int, count: int) -> None:
        self.stride = row_stride(width)
        self._bytes = buffer(self.stride * count)
        self.address = address(self._bytes)

    def rows(self, count: int, width: int) -> Tensor:
        """The first rows as FP32 [count, width]."""
        whole = self._bytes.view(np.float32).reshape(-1, self.stride // 4)
        return torch.from_numpy(whole[:count, :width])


class JobList:
    """Jobs being collected, then the table that a team runs.

    Words that change from step to step are named in `_dynamic` and set by `set`; group tables hold (matrix, first row,
    rows) and are filled by the runner.
    """

    def __init__(self, isa: Isa, config: ModelConfig, shapes: Shapes, max_rows: int) -> None:
        self.isa, self.config, self.shapes, self.max_rows = isa, config, shapes, max_rows
        self.space: dict[str, Space] = {}
        self.plain_group = np.array([1, 0, 0, 0], np.int64)
        self.head_group = np.array([1, 0, 0, 0], np.int64)
        groups = [word for g in range(config.o_groups) for word in (g, 0, 0)]
        self.output_groups = np.array([config.o_groups, *groups], np.int64)
        self.sites: dict[tuple[int, str], tuple[int, int]] = {}  # jobs from a site's input to its output
        self.after_layer: list[int] = []  # jobs after which the streams are a layer's output
        self.before_head = 0
        self.logits_width = 0
        self._expander_bytes = 0
        self._held: list[Any] = []
        self._jobs: list[tuple[str, np.ndarray, bool]] = []
        self._dynamic: dict[str, list[tuple[np.ndarray, int]]] = {}
        self._arguments: dict[str, list[str]] = {}

    @property
    def count(self) -> int:
        """Number of jobs."""
        return len(self._jobs)

    def rows(self, name: str, width: int, count: int | None = None) -> Space:
        """The space of that name, made when first asked for; it has room behind the last row."""
        if name not in self.space:
            self.space[name] = Space(width, (count or self.max_rows) + matmul.ROW_PADDING)
        assert self.space[name].stride >= width, name
        return self.space[name]

    def hold(self, values: Tensor) -> int:
        """The address of a constant, copied so that kernels may read past its end."""
        data = values.detach().contiguous().view(-1).view(torch.uint8).numpy()
        copy = buffer(len(data))
        copy[:] = data
        self._held.append(copy)
        return address(copy)

    def add(self, kernel: str, *, barrier: bool = True, **words: int | float | str) -> None:
        """Append a job; a word that is a text is dynamic and set later under that name."""
        names = self._arguments[kernel]
        assert sorted(words) == sorted(names), (kernel, sorted(words), sorted(names))
        array = np.zeros(max(len(names), 1), np.int64)
        for i, name in enumerate(names):
            value = words[name]
            if isinstance(value, str):
                self._dynamic.setdefault(value, []).append((array, i))
            else:
                array[i] = struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else value
        self._jobs.append((kernel, array, barrier))

    def set(self, name: str, value: int) -> None:
        """Give a dynamic word its value in every job that has it."""
        for array, i in self._dynamic.get(name, ()):
            array[i] = value

    def finish(self, library: Library) -> None:
        """Look up the kernels' addresses."""
        self._held.append(library)
        self.table = np.array(
            [[library.address(name), address(array), barrier] for name, array, barrier in self._jobs], np.int64
        )

    def note_product(self, blocks: int) -> None:
        """Remember the widest product, whose expanded panel must fit into a thread's scratch."""
        self._expander_bytes = max(self._expander_bytes, blocks * matmul.EXPANDED)

    def thread_bytes(self, end: int) -> int:
        """Scratch that one thread needs when the longest sequence ends at position `end`."""
        return max(self._expander_bytes, attention.scratch_bytes(self.shapes, self._most_entries(end)))

    def entry_bytes(self, end: int) -> int:
        """Bytes into which one sequence's visible entries are unpacked."""
        return attention.entries_bytes(self.shapes, self._most_entries(end))

    def _most_entries(self, end: int) -> int:
        counts = [0]
        for layer in self.config.layers:
            if layer.ratio:
                visible = end // layer.ratio
                counts.append(min(visible, self.shapes.topk) if layer.attention == "csa" else visible)
        return max(counts)

    def set_scores(self, scratch: Scratch, rows: int, end: int) -> None:
        """Make room for index scores of `rows` rows."""
        ratios = [layer.ratio for layer in self.config.layers if layer.attention == "csa"]
        if ratios:
            stride = (end // min(ratios) + 64) // 64 * 256
            self.set("scores", scratch.reserve(rows * stride))
            self.set("scores_stride", stride)


def emit_kernels(isa: Isa, shapes: Shapes, plan: Plan) -> KernelModule:
    """All kernels that a model of these shapes and matrices needs."""
    module = KernelModule(isa, STEP)
    rows.emit_embed(module, shapes)
    rows.emit_angles(module, shapes)
    for name, after, before in (
        ("site_first", "none", True),
        ("site_experts", "attention", True),
        ("site_attention", "experts", True),
        ("site_last", "experts", False),
    ):
        rows.emit_site(module, shapes, name, after=after, before=before)
    rows.emit_collapse(module, shapes)
    rows.emit_latent(module, shapes)
    rows.emit_window_copies(module, shapes)
    rows.emit_heads(module, shapes)
    route.emit_route(module, shapes)
    route.emit_group(module, shapes)
    route.emit_gather(module, shapes)
    attention.emit_attention(module, shapes)
    if any(".compressor" in name for name in plan.matrices):
        compress.emit_compress(module, shapes, "entries")
        compress.emit_keep_tail(module)
    if any(".indexer." in name for name in plan.matrices):
        compress.emit_compress(module, shapes, "keys")
        indexer.emit_index_query(module, shapes)
        indexer.emit_index_score(module, shapes)
        indexer.emit_index_select(module, shapes)
    for form, epilogue in sorted({(m.form, _epilogue(m.name)) for m in plan.matrices.values()}):
        matmul.emit_products(module, form, epilogue)
        if form == "fp4" and not isa.amx:
            int8.emit_products_int8(module, epilogue)
    if "product_int8_f32" in module.arguments:
        int8.emit_quantise(module)
    return module


def _epilogue(name: str) -> matmul.Epilogue:
    return "swiglu" if name.endswith(".in") else "bf16" if name.endswith("wo_a") else "f32"


class _Builder:
    """Appends the jobs of each part of the model."""

    def __init__(
        self, jobs: JobList, plan: Plan, packed: dict[str, int], lookup: Lookup, frequencies: Sequence[Tensor]
    ) -> None:
        self.jobs, self.plan, self.packed, self.lookup = jobs, plan, packed, lookup
        self.config, self.shapes = jobs.config, jobs.shapes
        self.frequencies = [jobs.hold(f.float()) for f in frequencies]
        s = self.shapes
        self.streams = jobs.rows("streams", s.streams * s.hidden * 4)
        self.maps = jobs.rows("maps", rows.MAPS * 4)
        self.input = jobs.rows("input", s.hidden * 2)
        jobs.rows("angles", 2 * s.rotary * 4)
        self.slot_rows = route.grouped_rows(jobs.max_rows, s.experts, s.active)
        self.slots = self._table(jobs.max_rows * s.active * 8)
        self.ids = self._table(jobs.max_rows * s.active * 8)
        self.weights = self._table(jobs.max_rows * s.active * 4)
        self.mixing = self._table(self.slot_rows * 4)
        self.ones = jobs.hold(torch.ones(jobs.max_rows + 64))
        self.counts = self._table(jobs.max_rows * 8)
        self.groups = self._table((1 + 3 * s.experts) * 8)

    def _table(self, nbytes: int) -> int:
        return self.jobs.hold(torch.zeros(nbytes, dtype=torch.uint8))

    def constant(self, name: str) -> int:
        """The address of a small FP32 parameter."""
        value = self.lookup(name)
        assert isinstance(value, Tensor)
        return self.jobs.hold(value.float())

    def product(
        self, name: str, source: Space, out: Space, groups: np.ndarray | int, *, barrier: bool = True,
        row_step: int = 0, out_step: int = 0, panels: int | None = None, mixing: int = 0, integers: bool = False,
    ) -> None:  # fmt: skip
        """rows x matrix; with `integers` the rows are int8 records."""
        matrix = self.plan.matrices[name]
        self.jobs.note_product(matrix.blocks)
        panels = panels or matrix.panels
        self.jobs.add(
            f"product_{'int8' if integers else matrix.form}_{_epilogue(name)}", barrier=barrier, weight=self.packed[name],
            weight_step=panels * matrix.nbytes // matrix.panels, rows=source.address, row_stride=source.stride,
            row_step=row_step, out=out.address, out_stride=out.stride, out_step=out_step, panels=panels,
            blocks=matrix.blocks, groups=groups if isinstance(groups, int) else address(groups), scratch="scratch",
            scratch_step="scratch_step", mixing=mixing, limit=float(self.config.swiglu_limit),
        )  # fmt: skip

    def output(self, name: str, matrix: str) -> Space:
        """FP32 rows that take a matrix's product."""
        return self.jobs.rows(name, self.plan.matrices[matrix].panels * 128)

    def site(self, kernel: str, norm: str | None, hyper: str | None) -> None:
        """A site job: take a sublayer's output in, compute the next one's maps and input."""
        slot_values, shared = self.jobs.space.get("expert_out"), self.jobs.space.get("shared_out")
        value = self.jobs.space.get("site_value") if kernel == "site_experts" else slot_values
        at = (lambda name: self.constant(f"{hyper}.{name}")) if hyper else (lambda name: 0)
        self.jobs.add(
            kernel, streams=self.streams.address, stream_stride=self.streams.stride, maps=self.maps.address,
            maps_stride=self.maps.stride, norm=self.constant(norm) if norm else 0, fn=at("fn"), base=at("base"),
            scale=at("scale"), out=self.input.address, out_stride=self.input.stride,
            value=value.address if value else 0, value_stride=value.stride if value else 0,
            shared=shared.address if shared else 0, shared_stride=shared.stride if shared else 0, slots=self.slots,
        )  # fmt: skip

    def start(self) -> None:
        """Embedding and angles."""
        table = self.lookup("embed")
        assert isinstance(table, Tensor)
        words = table.detach().to(torch.bfloat16).contiguous()
        self.jobs._held.append(words)
        plain, scaled = self.frequencies
        self.jobs.add("angles", barrier=False, plain=plain, scaled=scaled)
        self.jobs.add("embed", table=words.data_ptr(), streams=self.streams.address, stream_stride=self.streams.stride)

    def layer(self, i: int, layer: LayerSpec, place: LayerPlace) -> None:
        """One layer."""
        at = f"layers.{i}."
        self.site("site_attention" if i else "site_first", f"{at}attn_norm", f"{at}hc_attn")
        if i:
            self.jobs.after_layer.append(self.jobs.count)
        begun = self.jobs.count
        self._projections(at, layer, place)
        self._compress(at, layer, place)
        self._attend(at, layer, place)
        self.jobs.sites[i, "attention"] = begun, self.jobs.count
        self.site("site_experts", f"{at}ffn_norm", f"{at}hc_ffn")
        begun = self.jobs.count
        self._experts(at, layer)
        self.jobs.sites[i, "experts"] = begun, self.jobs.count

    def _projections(self, at: str, layer: LayerSpec, place: LayerPlace) -> None:
        self.jobs.add("window_open", barrier=False, ring=place.ring)
        names = ["wq_a", "wkv"]
        if layer.ratio:
            names.append("compressor")
        if layer.attention == "csa":
            names += ["indexer.compressor", "indexer.weights_proj"]
        for name in names:
            out = self.output(name, f"{at}attn.{name}")
            self.product(f"{at}attn.{name}", self.input, out, self.jobs.plain_group, barrier=name == names[-1])

    def _compress(self, at: str, layer: LayerSpec, place: LayerPlace) -> None:
        jobs, space = self.jobs, self.jobs.space
        width = self.plan.matrices[f"{at}attn.wq_b"].columns
        query = jobs.rows("latent", width * 2)
        jobs.add(
            "latent", query=space["wq_a"].address, query_stride=space["wq_a"].stride,
            query_norm=self.constant(f"{at}attn.q_norm"), query_width=width, query_out=query.address,
            query_out_stride=query.stride, kv=space["wkv"].address, kv_stride=space["wkv"].stride,
            kv_norm=self.constant(f"{at}attn.kv_norm"), ring=place.ring, regime=int(bool(layer.ratio)),
            barrier=not layer.ratio,
        )  # fmt: skip
        parts = []
        if layer.ratio:
            parts.append(("compress_entries", "compressor", self.shapes.dim, place.tail, place.entries))
        if layer.attention == "csa":
            parts.append(("compress_keys", "indexer.compressor", self.shapes.index_dim, place.index_tail, place.keys))
        for kernel, name, dim, tail, target in parts:
            slots, _ = tail_shape(layer, dim)
            jobs.add(
                kernel, projected=space[name].address, projected_stride=space[name].stride,
                ape=self.constant(f"{at}attn.{name}.ape"), norm=self.constant(f"{at}attn.{name}.norm"), tail=tail,
                slots=slots, ratio=layer.ratio, overlap=int(layer.attention == "csa"), frequencies=self.frequencies[1],
                target=target, barrier=kernel == parts[-1][0],
            )  # fmt: skip
        for _, name, dim, tail, _ in parts:
            slots, half = tail_shape(layer, dim)
            jobs.add("keep_tail", projected=space[name].address, projected_stride=space[name].stride, tail=tail,
                     slots=slots, width=half, barrier=False)  # fmt: skip

    def _attend(self, at: str, layer: LayerSpec, place: LayerPlace) -> None:
        jobs, space, s = self.jobs, self.jobs.space, self.shapes
        csa = layer.attention == "csa"
        topk = s.topk if csa else 0
        latent = space["latent"]
        heads = self.output("wq_b", f"{at}attn.wq_b")
        if layer.ratio:
            jobs.add("unpack_entries", entries=place.entries, ratio=layer.ratio, topk=topk, barrier=False)
        if csa:
            index = self.output("indexer.wq_b", f"{at}attn.indexer.wq_b")
            self.product(f"{at}attn.indexer.wq_b", latent, index, jobs.plain_group, barrier=False)
        self.product(f"{at}attn.wq_b", latent, heads, jobs.plain_group)
        tiles = jobs.rows("query_tiles", s.head_groups * s.dim * 32)
        regime = int(bool(layer.ratio))
        if csa:
            self._index(layer)
        jobs.add("heads", query=heads.address, query_stride=heads.stride, out=tiles.address, out_stride=tiles.stride,
                 regime=regime)  # fmt: skip
        if csa:
            self._select(layer, place)
        out = jobs.rows("attended", s.heads * s.dim * 2)
        selected = space.get("selected")
        jobs.add(
            "attend", q=tiles.address, q_stride=tiles.stride, out=out.address, out_stride=out.stride,
            sink=self.constant(f"{at}attn.attn_sink"), ring=place.ring, entries=place.entries, ratio=layer.ratio,
            topk=topk, selected=selected.address if csa and selected else 0,
            selected_stride=selected.stride if csa and selected else 0,
            selected_count=self.counts if csa else 0, scratch="scratch",
            scratch_step="scratch_step", regime=regime,
        )  # fmt: skip
        jobs.add("window_close", barrier=False, ring=place.ring)
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        joined = jobs.rows("joined", groups * rank * 2)
        self.product(
            f"{at}attn.wo_a", out, joined, jobs.output_groups, row_step=s.heads * s.dim // groups * 2,
            out_step=rank * 2, panels=rank // matmul.PANEL,
        )  # fmt: skip
        self.product(f"{at}attn.wo_b", joined, self.output("site_value", f"{at}attn.wo_b"), jobs.plain_group)

    def _index(self, layer: LayerSpec) -> None:
        jobs, space, s = self.jobs, self.jobs.space, self.shapes
        records = jobs.rows("index_queries", indexer.record_bytes(s))
        jobs.add(
            "index_query", q=space["indexer.wq_b"].address, q_stride=space["indexer.wq_b"].stride,
            weights=space["indexer.weights_proj"].address, weights_stride=space["indexer.weights_proj"].stride,
            out=records.address, out_stride=records.stride, regime=1, barrier=False,
        )  # fmt: skip

    def _select(self, layer: LayerSpec, place: LayerPlace) -> None:
        jobs, s = self.jobs, self.shapes
        records, selected = jobs.space["index_queries"], jobs.rows("selected", (s.topk + 16) * 4)
        jobs.add("index_score", queries=records.address, query_stride=records.stride, keys=place.keys,
                 ratio=layer.ratio, scores="scores", scores_stride="scores_stride")  # fmt: skip
        jobs.add("index_select", ratio=layer.ratio, scores="scores", scores_stride="scores_stride",
                 selected=selected.address, selected_stride=selected.stride, selected_count=self.counts)  # fmt: skip

    def _experts(self, at: str, layer: LayerSpec) -> None:
        jobs, s = self.jobs, self.shapes
        gate = self.output("gate", f"{at}ffn.gate")
        self.product(f"{at}ffn.gate", self.input, gate, jobs.plain_group, barrier=False)
        width = self.plan.matrices[f"{at}ffn.shared.w2"].columns
        shared = jobs.rows("shared_hidden", -(-width // 32) * 64)
        self.product(f"{at}ffn.shared.in", self.input, shared, jobs.plain_group, mixing=self.ones)
        hashed = layer.routing == "hash"
        table = self.lookup(f"{at}ffn.gate.tid2eid") if hashed else None
        if isinstance(table, Tensor):
            assert table.dtype == torch.int64 and table.is_contiguous()
            jobs._held.append(table)
        jobs.add(
            "route", logits=gate.address, logits_stride=gate.stride,
            bias=0 if hashed else self.constant(f"{at}ffn.gate.bias"),
            table=table.data_ptr() if isinstance(table, Tensor) else 0, ids=self.ids, weights=self.weights,
            scale=float(self.config.routed_scaling_factor),
        )  # fmt: skip
        jobs.add("group", ids=self.ids, groups=self.groups, slots=self.slots)
        into, back = f"{at}ffn.experts.in", f"{at}ffn.experts.w2"
        integers = self.plan.matrices[into].form == "fp4" and not jobs.isa.amx
        rows_in = int8.record_bytes(s.hidden) if integers else s.hidden * 2
        source = self.records("input_records", self.input, into) if integers else self.input
        gathered = jobs.rows("gathered", rows_in, self.slot_rows)
        jobs.add("gather", slots=self.slots, weights=self.weights, rows=source.address, row_stride=source.stride,
                 out=gathered.address, out_stride=gathered.stride, mixing=self.mixing,
                 lines=-(-rows_in // _LINE))  # fmt: skip
        hidden = jobs.rows("expert_hidden", -(-width // 32) * 64, self.slot_rows)
        self.product(into, gathered, hidden, self.groups, mixing=self.mixing, integers=integers)
        out = jobs.rows("expert_out", self.plan.matrices[back].panels * 128, self.slot_rows)
        self.product(f"{at}ffn.shared.w2", shared, self.output("shared_out", f"{at}ffn.shared.w2"),
                     jobs.plain_group, barrier=False)  # fmt: skip
        if integers:
            hidden = self.records("hidden_records", hidden, back, self.groups, self.slot_rows)
        self.product(back, hidden, out, self.groups, integers=integers)

    def records(
        self, name: str, source: Space, matrix: str, groups: int | None = None, count: int | None = None
    ) -> Space:
        """BF16 rows as int8 records, for the matrix that they are multiplied by."""
        jobs, blocks = self.jobs, self.plan.matrices[matrix].blocks
        space = jobs.rows(name, int8.record_bytes(blocks * matmul.BLOCK), count)
        jobs.add(
            "quantise", rows=source.address, row_stride=source.stride, out=space.address, out_stride=space.stride,
            blocks=blocks, groups=groups or address(jobs.plain_group),
        )  # fmt: skip
        return space

    def head(self) -> None:
        """The last sum, then collapse, norm and logits of the wanted rows."""
        jobs = self.jobs
        self.site("site_last", None, None)
        jobs.before_head = jobs.count
        jobs.after_layer.append(jobs.count)
        final = jobs.rows("final", self.shapes.hidden * 2)
        jobs.add(
            "collapse", streams=self.streams.address, stream_stride=self.streams.stride, norm=self.constant("norm"),
            fn=self.constant("hc_head.fn"), base=self.constant("hc_head.base"), scale=self.constant("hc_head.scale"),
            out=final.address, out_stride=final.stride,
        )  # fmt: skip
        matrix = self.plan.matrices["head"]
        jobs.logits_width = matrix.panels * matmul.PANEL
        jobs.note_product(matrix.blocks)
        jobs.add(
            f"product_{matrix.form}_f32", weight=self.packed["head"], weight_step=0, rows=final.address,
            row_stride=final.stride, row_step=0, out="logits", out_stride=jobs.logits_width * 4, out_step=0,
            panels=matrix.panels, blocks=matrix.blocks, groups=address(jobs.head_group), scratch="scratch",
            scratch_step="scratch_step", mixing=0, limit=0.0,
        )  # fmt: skip


def build_jobs(
    config: ModelConfig, isa: Isa, shapes: Shapes, places: Places, plan: Plan, packed: dict[str, int], lookup: Lookup,
    frequencies: Sequence[Tensor], max_rows: int,
) -> JobList:  # fmt: skip
    """The compiled job list of a model; `packed` are the addresses of its packed matrices."""
    jobs = JobList(isa, config, shapes, max_rows)
    module = emit_kernels(isa, shapes, plan)
    jobs._arguments = module.arguments
    builder = _Builder(jobs, plan, packed, lookup, frequencies)
    builder.start()
    for i, (layer, place) in enumerate(zip(config.layers, places.layers, strict=True)):
        builder.layer(i, layer, place)
    builder.head()
    jobs.finish(Library(module.text(), isa))
    return jobs
