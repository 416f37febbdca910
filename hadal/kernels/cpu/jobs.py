"""The job list of a model: which kernel runs with which addresses, in which order, and where a barrier is needed.

One layer, in order: maps and input of the attention site · projections of it · latent, compressors · tails, unpacked
entries, query heads · index choice · attention · output projections · maps and input of the expert site · gate and
shared expert · routing · experts · their sum, which the next layer's first job takes into the streams.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hadal.config import LayerSpec, ModelConfig
from hadal.kernels.cpu import indexer, int8, matmul, route, rows
from hadal.kernels.cpu.emission import compiled_kernels, epilogue_of
from hadal.kernels.cpu.joblist import LINE, ExpertJobs, JobList, Part, Place, Space
from hadal.kernels.cpu.layout import LayerPlace, Places, Shapes, tail_shape
from hadal.kernels.cpu.memory import address
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.weights import Lookup, Plan


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
        self.selected = jobs.rows("selected", (s.topk + 16) * 4)
        self.counts = self._table(jobs.max_rows * 8)
        self.groups = address(jobs.expert_groups)

    def _table(self, nbytes: int) -> int:
        return self.jobs.hold(torch.zeros(nbytes, dtype=torch.uint8))

    def constant(self, name: str) -> int:
        """The address of a small FP32 parameter."""
        value = self.lookup(name)
        assert isinstance(value, Tensor)
        return self.jobs.hold(value.float())

    def product(
        self, name: str, source: Space, out: Space | Place, groups: np.ndarray | int, *, barrier: bool = True,
        row_step: int = 0, out_step: int = 0, panels: int | None = None, mixing: int = 0, integers: bool = False,
    ) -> None:  # fmt: skip
        """rows x matrix; with `integers` the rows are int8 records."""
        matrix = self.plan.matrices[name]
        self.jobs.note_product(matrix.blocks)
        panels = panels or matrix.panels
        form = "int8" if integers else matrix.form
        self.jobs.add(
            f"product_{form}_{epilogue_of(name)}", barrier=barrier,
            weight=self.packed[matrix.place or name] + matrix.offset,
            weight_step=matrix.step or panels * matrix.nbytes // matrix.panels, rows=source.address,
            row_stride=source.stride, row_step=row_step, out=out.address, out_stride=out.stride, out_step=out_step,
            panels=panels, blocks=matrix.blocks, groups=groups if isinstance(groups, int) else address(groups),
            scratch="scratch", scratch_step="scratch_step", mixing=mixing, limit=float(self.config.swiglu_limit),
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
        self.table = table.detach().to(torch.bfloat16).contiguous()
        self.jobs._held.append(self.table)
        self._angles()
        streams = self.streams
        self.jobs.add("embed", table=self.table.data_ptr(), streams=streams.address, stream_stride=streams.stride)

    def _angles(self) -> None:
        plain, scaled = self.frequencies
        self.jobs.add("angles", barrier=False, plain=plain, scaled=scaled)

    def layer(self, i: int, at: str, layer: LayerSpec, place: LayerPlace) -> None:
        """One layer, whose parameters begin with `at`."""
        first = i in (0, len(self.config.layers))
        self.site("site_first" if first else "site_attention", f"{at}attn_norm", f"{at}hc_attn")
        if not first:
            self._tap(i - 1)
        begun = self.jobs.count
        self._projections(at, layer, place)
        self._compress(at, layer, place)
        self._attend(at, layer, place)
        self.jobs.sites[i, "attention"] = begun, self.jobs.count
        self.site("site_experts", f"{at}ffn_norm", f"{at}hc_ffn")
        begun = self.jobs.count
        self._experts(at, layer)
        self.jobs.sites[i, "experts"] = begun, self.jobs.count

    def _tap(self, i: int) -> None:
        """Keep the means of a layer's output streams where the draft head asks for them."""
        taps, d = self.config.dspark_target_layer_ids, self.shapes.hidden
        if i in taps:
            kept = self.jobs.rows("taps", len(taps) * d * 4)
            self.jobs.add(
                "tap", streams=self.streams.address, stream_stride=self.streams.stride,
                out=kept.address + taps.index(i) * d * 4, out_stride=kept.stride,
            )  # fmt: skip

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
            self._index()
        jobs.add("heads", query=heads.address, query_stride=heads.stride, out=tiles.address, out_stride=tiles.stride,
                 regime=regime)  # fmt: skip
        if csa:
            self._select(place)
        out = jobs.rows("attended", s.heads * s.dim * 2)
        selected = self.selected  # not looked at where topk is 0
        jobs.add(
            "attend", q=tiles.address, q_stride=tiles.stride, out=out.address, out_stride=out.stride,
            sink=self.constant(f"{at}attn.attn_sink"), ring=place.ring, entries=place.entries, ratio=layer.ratio,
            topk=topk, selected=selected.address, selected_stride=selected.stride, selected_count=self.counts,
            scratch="scratch", scratch_step="scratch_step", regime=regime,
        )  # fmt: skip
        jobs.add("window_close", barrier=False, ring=place.ring)
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        joined = jobs.rows("joined", groups * rank * 2)
        self.product(
            f"{at}attn.wo_a", out, joined, jobs.output_groups, row_step=s.heads * s.dim // groups * 2,
            out_step=rank * 2, panels=rank // matmul.PANEL,
        )  # fmt: skip
        self.product(f"{at}attn.wo_b", joined, self.output("site_value", f"{at}attn.wo_b"), jobs.plain_group)

    def _index(self) -> None:
        jobs, space, s = self.jobs, self.jobs.space, self.shapes
        records = jobs.rows("index_queries", indexer.record_bytes(s))
        jobs.add(
            "index_query", q=space["indexer.wq_b"].address, q_stride=space["indexer.wq_b"].stride,
            weights=space["indexer.weights_proj"].address, weights_stride=space["indexer.weights_proj"].stride,
            out=records.address, out_stride=records.stride, regime=1, barrier=False,
        )  # fmt: skip

    def _select(self, place: LayerPlace) -> None:
        jobs = self.jobs
        records, selected = jobs.space["index_queries"], self.selected
        jobs.add("index_score", queries=records.address, query_stride=records.stride, keys=place.keys,
                 scores="scores", scores_stride="scores_stride")  # fmt: skip
        jobs.add("index_select", scores="scores", scores_stride="scores_stride", selected=selected.address,
                 selected_stride=selected.stride, selected_count=self.counts)  # fmt: skip

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
        grouped = jobs.count
        into, back = f"{at}ffn.experts.in", f"{at}ffn.experts.w2"
        integers = self.plan.matrices[into].form == "fp4" and not jobs.isa.amx
        rows_in = int8.record_bytes(s.hidden) if integers else s.hidden * 2
        source = self.records("input_records", self.input, into) if integers else self.input
        gathered = jobs.rows("gathered", rows_in, self.slot_rows)
        jobs.add("gather", slots=self.slots, weights=self.weights, rows=source.address, row_stride=source.stride,
                 out=gathered.address, out_stride=gathered.stride, mixing=self.mixing,
                 lines=-(-rows_in // LINE))  # fmt: skip
        hidden = jobs.rows("expert_hidden", -(-width // 32) * 64, self.slot_rows)
        begin = jobs.count
        self.product(into, gathered, hidden, self.groups, mixing=self.mixing, integers=integers)
        out = jobs.rows("expert_out", self.plan.matrices[back].panels * 128, self.slot_rows)
        self.product(f"{at}ffn.shared.w2", shared, self.output("shared_out", f"{at}ffn.shared.w2"),
                     jobs.plain_group, barrier=False)  # fmt: skip
        if integers:
            hidden = self.records("hidden_records", hidden, back, self.groups, self.slot_rows)
        self.product(back, hidden, out, self.groups, integers=integers)
        jobs.experts.append(ExpertJobs(grouped, begin, jobs.count))

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

    def head(self, begin: int, at: str = "") -> Part:
        """The last sum, then collapse, norm and logits of the wanted rows, for the jobs from `begin` on."""
        jobs, hyper = self.jobs, f"{at}hc_head"
        self.site("site_last", None, None)
        if not at:
            jobs.sites[len(self.config.layers), "sum"] = jobs.count - 1, jobs.count
            self._tap(len(self.config.layers) - 1)
        streams = jobs.count
        final = jobs.rows("final", self.shapes.hidden * 2)
        jobs.add(
            "collapse", streams=self.streams.address, stream_stride=self.streams.stride,
            norm=self.constant(f"{at}norm"), fn=self.constant(f"{hyper}.fn"), base=self.constant(f"{hyper}.base"),
            scale=self.constant(f"{hyper}.scale"), out=final.address, out_stride=final.stride,
        )  # fmt: skip
        matrix = self.plan.matrices[f"{at}head"]
        jobs.logits_width = matrix.panels * matmul.PANEL
        integers = matrix.form == "fp4" and not jobs.isa.amx
        source = self.records("final_records", final, matrix.name, address(jobs.head_group)) if integers else final
        logits = Place("logits", jobs.logits_width * 4)
        self.product(matrix.name, source, logits, jobs.head_group, integers=integers)
        return Part(begin, streams, jobs.count)

    def draft_inputs(self, at: str) -> None:
        """The streams of the rows that `sources` names and the next token's embedding become the streams."""
        jobs, streams, d = self.jobs, self.streams, self.shapes.hidden
        count = self.shapes.streams * jobs.max_rows
        normed, embedded = jobs.rows("normed_streams", d * 2, count), jobs.rows("next_embedding", d * 2)
        self._angles()
        jobs.add(
            "draft_inputs", streams=streams.address, stream_stride=streams.stride, hnorm=self.constant(f"{at}hnorm"),
            out=normed.address, out_stride=normed.stride, table=self.table.data_ptr(),
            enorm=self.constant(f"{at}enorm"), embedded=embedded.address, embedded_stride=embedded.stride,
        )  # fmt: skip
        token = self.output("embedding_value", f"{at}e_proj")
        values = jobs.rows("stream_values", self.plan.matrices[f"{at}h_proj"].panels * 128, count)
        self.product(f"{at}e_proj", embedded, token, jobs.plain_group, barrier=False)
        self.product(f"{at}h_proj", normed, values, address(jobs.stream_group))
        jobs.add(
            "draft_join", streams=streams.address, stream_stride=streams.stride, values=values.address,
            value_stride=values.stride, embedded=token.address, embedded_stride=token.stride,
        )  # fmt: skip


def build_jobs(
    config: ModelConfig, isa: Isa, shapes: Shapes, places: Places, plan: Plan, packed: dict[str, int], lookup: Lookup,
    frequencies: Sequence[Tensor], max_rows: int,
) -> JobList:  # fmt: skip
    """The compiled job list of a model; `packed` are the addresses of its packed matrices."""
    jobs = JobList(isa, config, shapes, max_rows)
    jobs.words, library = compiled_kernels(isa, shapes, plan)
    builder = _Builder(jobs, plan, packed, lookup, frequencies)
    builder.start()
    for i, layer in enumerate(config.layers):
        builder.layer(i, f"layers.{i}.", layer, places.layers[i])
    jobs.main = builder.head(0)
    if config.draft == "mtp":
        begun = jobs.count
        builder.draft_inputs("draft.0.")
        builder.layer(len(config.layers), "draft.0.", config.draft_layers[0], places.layers[-1])
        jobs.draft = builder.head(begun, "draft.0.")
    jobs.finish(library)
    ends = [*(end for _, end in jobs.sites.values()), *jobs.main[1:], *jobs.draft[1:]]
    assert all(jobs.table[end - 1, 2] for end in ends), "behind an end without a barrier a helper may still be at work"
    return jobs
