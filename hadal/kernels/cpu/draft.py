"""Kernels of draft heads: what leads into the MTP block, and the streams' means that DSpark taps.

Legend: N residual streams, d hidden. Source: spec architecture 5.1.
"""

from __future__ import annotations

from hadal.kernels.cpu.ir import F32, I16, vec
from hadal.kernels.cpu.layout import Shapes
from hadal.kernels.cpu.numbers import widen_bf16
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.rows import normed_row, sum_squares

INPUTS = "streams stream_stride hnorm out out_stride table enorm embedded embedded_stride"
TAP = "streams stream_stride out out_stride"
JOIN = "streams stream_stride values value_stride embedded embedded_stride"
_V = vec(16, F32)


def emit_tap(module: KernelModule, shapes: Shapes) -> None:
    """`tap`: the mean of each row's streams."""
    with module.kernel("tap", TAP) as k:
        f = k.f
        for row in k.share(k.step("rows")):
            streams = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
            out = f.at(k.ptr("out"), row * k.arg("out_stride"))
            for c in f.range(shapes.hidden // 16):
                total = f.load(_V, streams, c * 64)
                for n in range(1, shapes.streams):
                    total = total + f.load(_V, streams, c * 64 + n * shapes.hidden * 4)
                f.store(total * (1 / shapes.streams), out, c * 64)


def emit_draft(module: KernelModule, shapes: Shapes) -> None:
    """`draft_inputs`: N rows of `out` and one of `embedded`, BF16; `draft_join`: their projections into the streams."""
    chunks, line = shapes.hidden // 16, shapes.hidden * 4
    with module.kernel("draft_inputs", INPUTS) as k:
        f = k.f
        wide = f.scratch(line)
        for row in k.share(k.step("rows")):
            source = f.at(k.ptr("streams"), k.row("sources", row) * k.arg("stream_stride"))
            for n in f.range(shapes.streams):
                stream = f.at(source, n * line)
                out = f.at(k.ptr("out"), (row * shapes.streams + n) * k.arg("out_stride"))
                squares = sum_squares(f, stream, chunks)
                normed_row(f, stream, squares, shapes.hidden, shapes.norm_eps, k.ptr("hnorm"), out)
            words = f.at(k.ptr("table"), k.row("ids", row) * (2 * shapes.hidden))
            for c in f.range(chunks):
                f.store(widen_bf16(f, f.load(vec(16, I16), words, c * 32)), wide, c * 64)
            out = f.at(k.ptr("embedded"), row * k.arg("embedded_stride"))
            squares = sum_squares(f, wide, chunks)
            normed_row(f, wide, squares, shapes.hidden, shapes.norm_eps, k.ptr("enorm"), out)
    with module.kernel("draft_join", JOIN) as k:
        f = k.f
        for row in k.share(k.step("rows")):
            embedded = f.at(k.ptr("embedded"), row * k.arg("embedded_stride"))
            target = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
            for n in f.range(shapes.streams):
                values = f.at(k.ptr("values"), (row * shapes.streams + n) * k.arg("value_stride"))
                for c in f.range(chunks):
                    joined = f.load(_V, embedded, c * 64) + f.load(_V, values, c * 64)
                    f.store(joined, f.at(target, n * line), c * 64)
