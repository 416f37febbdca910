"""Kernels that treat each row on its own: embedding, hyper-connections with norms, the query and window paths.

Legend: N residual streams, d hidden, H heads, D head dim, R rotary dims. Source: spec architecture 2.2, 4.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hadal.kernels.cpu.attention import store_key
from hadal.kernels.cpu.ir import F32, I16, I32, I64, Function, Value, vec
from hadal.kernels.cpu.layout import HEADS, KEYS, QUANT_GROUP, Shapes
from hadal.kernels.cpu.numbers import cosine_sine, exp, fake_quant_e4m3, join_bf16, round_bf16, sigmoid, widen_bf16
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.tiles import transpose_pairs
from hadal.kernels.pages import SLACK

EMBED = "table streams stream_stride"
ANGLES = "plain scaled"
SITE = (
    "streams stream_stride maps maps_stride norm fn base scale out out_stride "
    "value value_stride shared shared_stride slots"
)
COLLAPSE = "streams stream_stride norm fn base scale out out_stride"
LATENT = "query query_stride query_norm query_width query_out query_out_stride kv kv_stride kv_norm ring regime"
HEAD = "query query_stride out out_stride regime"
MAPS = 32  # floats per row: pre 0-3, post 4-7, comb 16-31 with comb[j, k] at 16 + 4j + k
_TOGETHER = 4  # rows whose maps are computed at once
_V, _I = vec(16, F32), vec(16, I32)


def emit_rows(module: KernelModule, shapes: Shapes) -> None:
    """All kernels of this file."""
    emit_embed(module, shapes)
    emit_angles(module, shapes)
    emit_site(module, shapes, "site_first", after="none", before=True)
    emit_site(module, shapes, "site_experts", after="attention", before=True)
    emit_site(module, shapes, "site_attention", after="experts", before=True)
    emit_site(module, shapes, "site_last", after="experts", before=False)
    emit_collapse(module, shapes)
    emit_latent(module, shapes)
    emit_window_copies(module, shapes)
    emit_heads(module, shapes)


def emit_embed(module: KernelModule, shapes: Shapes) -> None:
    """Every stream of a row begins as the token's embedding."""
    with module.kernel("embed", EMBED) as k:
        f = k.f
        for row in k.share(k.step("rows")):
            source = f.at(k.ptr("table"), k.row("ids", row) * (2 * shapes.hidden))
            target = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
            for c in f.range(shapes.hidden // 16):
                value = widen_bf16(f, f.load(vec(16, I16), source, c * 32))
                for n in range(shapes.streams):
                    f.store(value, target, c * 64 + n * shapes.hidden * 4)


def emit_angles(module: KernelModule, shapes: Shapes) -> None:
    """cos and sin of every row's position in both rotary regimes; the words are the regimes' frequencies."""
    half = shapes.rotary // 2
    lanes = 16 if half % 16 == 0 else 8
    with module.kernel("angles", ANGLES) as k:
        f = k.f
        for row in k.share(k.step("rows")):
            position = k.row("positions", row).to_float(F32).spread(lanes)
            for regime, name in enumerate(ANGLES.split()):
                target = f.at(k.step_ptr("angles"), (row * 2 + regime) * (shapes.rotary * 4))
                for c in range(0, half, lanes):
                    angle = position * f.load(vec(lanes, F32), k.ptr(name), 4 * c)
                    cosine, sine = cosine_sine(f, angle)
                    f.store(cosine, target, 4 * c)
                    f.store(sine, target, 4 * (half + c))


def emit_site(module: KernelModule, shapes: Shapes, name: str, *, after: str, before: bool) -> None:
    """`name`: write a sublayer's output into the streams and read the next sublayer's input from them.

    `after` says whose output it is: "attention" (rows of `value`), "experts" (the row's `slots` of `value`, added in
    order, then `shared`) or "none". With `before` the maps of the next site are computed, and its normed input is
    left in BF16 at `out`.
    """
    with module.kernel(name, SITE) as k:
        f = k.f
        total = k.step("rows")
        space = f.scratch(_TOGETHER * MAPS * 4)
        mixed = f.scratch(shapes.hidden * 4)
        for unit in k.share((total + _TOGETHER - 1) / _TOGETHER):
            first = unit * _TOGETHER
            count = (total - first).min(_TOGETHER)
            if after != "none":
                for i in f.range(count):
                    _write(k, shapes, first + i, after)
            if before:
                with f.when(count.equals(_TOGETHER)):
                    _maps(k, shapes, first, _TOGETHER, space)
                with f.when(count < _TOGETHER):
                    for i in f.range(count):
                        _maps(k, shapes, first + i, 1, space)
                for i in f.range(count):
                    row = first + i
                    maps = f.at(k.ptr("maps"), row * k.arg("maps_stride"))
                    _read(k, shapes, row, maps, mixed, f.at(k.ptr("out"), row * k.arg("out_stride")))


def _write(k: Kernel, shapes: Shapes, row: Value, after: str) -> None:
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]."""
    f, n = k.f, shapes.streams
    streams = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
    maps = f.at(k.ptr("maps"), row * k.arg("maps_stride"))
    post = [f.broadcast(_V, maps, 4 * (n + i)) for i in range(n)]
    comb = [[f.broadcast(_V, maps, 4 * (16 + n * j + i)) for i in range(n)] for j in range(n)]
    if after == "attention":
        source = f.at(k.ptr("value"), row * k.arg("value_stride"))
    else:
        slots = [
            f.at(k.ptr("value"), f.load(I64, k.ptr("slots"), (row * shapes.active + i) * WORD) * k.arg("value_stride"))
            for i in range(shapes.active)
        ]
        shared = f.at(k.ptr("shared"), row * k.arg("shared_stride"))
    for c in f.range(shapes.hidden // 16):
        if after == "attention":
            y = f.load(_V, source, c * 64)
        else:
            y = f.load(_V, slots[0], c * 64)
            for slot in slots[1:]:
                y = y + f.load(_V, slot, c * 64)
            y = y + f.load(_V, shared, c * 64)
        x = [f.load(_V, streams, c * 64 + 4 * shapes.hidden * j) for j in range(n)]
        for i in range(n):
            value = post[i] * y
            for j in range(n):
                value = f.fma(comb[j][i], x[j], value)
            f.store(value, streams, c * 64 + 4 * shapes.hidden * i)


def _products(k: Kernel, shapes: Shapes, first: Value, rows: int, outputs: int, space: Value) -> None:
    """space[r][o] = fn[o] . x[r] / rms(x[r]) for `rows` rows, in passes that keep every sum in a register."""
    f, width = k.f, shapes.streams * shapes.hidden
    x = [f.at(k.ptr("streams"), (first + r) * k.arg("stream_stride")) for r in range(rows)]
    step = 24 // rows
    inverse: list[Value] = []
    for begin in range(0, outputs, step):
        chosen = range(begin, min(begin + step, outputs))
        sums = [[f.var(f.const(_V, 0)) for _ in chosen] for _ in range(rows)]
        squares = [f.var(f.const(_V, 0)) for _ in range(rows)] if begin == 0 else []
        for c in f.range(width // 16):
            values = [f.load(_V, row, c * 64) for row in x]
            for r, total in enumerate(squares):
                total.set(f.fma(values[r], values[r], total.get()))
            for i, o in enumerate(chosen):
                weight = f.load(_V, k.ptr("fn"), c * 64 + o * width * 4)
                for r in range(rows):
                    sums[r][i].set(f.fma(values[r], weight, sums[r][i].get()))
        for total in squares:
            mean = total.get().reduce("add") * (1 / width) + shapes.norm_eps
            inverse.append(1.0 / f.unary("sqrt", mean))
        for r in range(rows):
            for i, o in enumerate(chosen):
                f.store(sums[r][i].get().reduce("add") * inverse[r], space, 4 * (MAPS * r + o))


def _maps(k: Kernel, shapes: Shapes, first: Value, rows: int, space: Value) -> None:
    """The maps of `rows` rows, Sinkhorn included, into `maps`."""
    f = k.f
    n, eps = shapes.streams, shapes.hc_eps
    _products(k, shapes, first, rows, n * (n + 2), space)
    scale, base = k.ptr("scale"), k.ptr("base")
    gains = [f.load(F32, scale, 4 * i) for i in range(3)]
    lane = f.const(_I, list(range(16)))
    gate_gain = (lane < n).choose(gains[0].spread(16), gains[1].spread(16))
    squares = []
    for r in range(rows):
        at = f.at(space, 4 * MAPS * r)
        gate = sigmoid(f, f.load(_V, at) * gate_gain + f.load(_V, base))
        gate = (lane < n).choose(gate + eps, gate * 2.0)
        maps = f.at(k.ptr("maps"), (first + r) * k.arg("maps_stride"))
        f.store(gate, maps)
        logits = f.load(_V, at, 4 * 2 * n) * gains[2].spread(16) + f.load(_V, base, 4 * 2 * n)
        top = _fold(logits, (1, 2), "max")
        power = exp(f, logits - top)
        c = power / _fold(power, (1, 2), "add") + eps
        squares.append(f.var(c / (_fold(c, (4, 8), "add") + eps)))
    for _ in f.range(shapes.sinkhorn - 1):
        for square in squares:
            c = square.get()
            c = c / (_fold(c, (1, 2), "add") + eps)
            square.set(c / (_fold(c, (4, 8), "add") + eps))
    for r, square in enumerate(squares):
        f.store(square.get(), f.at(k.ptr("maps"), (first + r) * k.arg("maps_stride")), 4 * 16)


def _fold(value: Value, distances: tuple[int, int], operation: str) -> Value:
    """Every lane combined with those whose index differs in the given bits: sums over rows or columns of 4 x 4."""
    for distance in distances:
        other = value.pick([lane ^ distance for lane in range(16)])
        value = value + other if operation == "add" else value.max(other)
    return value


def _read(k: Kernel, shapes: Shapes, row: Value, weights: Value, mixed: Value, out: Value) -> None:
    """The streams weighted by the first lanes of `weights`, normed, in BF16."""
    f = k.f
    streams = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
    pre = [f.broadcast(_V, weights, 4 * j) for j in range(shapes.streams)]
    squares = f.var(f.const(_V, 0))
    for c in f.range(shapes.hidden // 16):
        y = pre[0] * f.load(_V, streams, c * 64)
        for j in range(1, shapes.streams):
            y = f.fma(pre[j], f.load(_V, streams, c * 64 + 4 * shapes.hidden * j), y)
        squares.set(f.fma(y, y, squares.get()))
        f.store(y, mixed, c * 64)
    normed_row(f, mixed, squares.get(), shapes.hidden, shapes.norm_eps, k.ptr("norm"), out)


def normed_row(
    f: Function, source: Value, squares: Value, width: Value | int, eps: float, weight: Value, out: Value
) -> None:
    """BF16 of source / rms * weight, given the lanes' sums of squares."""
    count = width.to_float(F32) if isinstance(width, Value) else f.const(F32, width)
    inverse = (1.0 / f.unary("sqrt", squares.reduce("add") / count + eps)).spread(16)
    chunks = width / 16 if isinstance(width, Value) else width // 16
    for c in f.range(chunks):
        f.store(round_bf16(f, f.load(_V, source, c * 64) * inverse * f.load(_V, weight, c * 64)), out, c * 32)


def sum_squares(f: Function, source: Value, chunks: Value | int) -> Value:
    """Lane-wise sums of squares over chunks of 16."""
    total = f.var(f.const(_V, 0))
    for c in f.range(chunks):
        value = f.load(_V, source, c * 64)
        total.set(f.fma(value, value, total.get()))
    return total.get()


def emit_collapse(module: KernelModule, shapes: Shapes) -> None:
    """The head's input: the wanted rows' streams collapsed and normed."""
    with module.kernel("collapse", COLLAPSE) as k:
        f = k.f
        mixed, space = f.scratch(shapes.hidden * 4), f.scratch(MAPS * 4)
        for i in k.share(k.step("wanted_rows")):
            row = k.row("wanted", i)
            _products(k, shapes, row, 1, shapes.streams, space)
            gain = f.broadcast(_V, k.ptr("scale"))
            weights = sigmoid(f, f.load(_V, space) * gain + f.load(_V, k.ptr("base"))) + shapes.hc_eps
            f.store(weights, space)
            _read(k, shapes, row, space, mixed, f.at(k.ptr("out"), i * k.arg("out_stride")))


def rotated(f: Function, value: Value, angles: Value, rotary: int, chunk: int) -> Value:
    """16 channels, from 16 * chunk of the rotary ones on, turned in interleaved pairs."""
    pairs = [i // 2 for i in range(16)]
    cosine = f.load(vec(8, F32), angles, 32 * chunk).pick(pairs)
    sine = f.load(vec(8, F32), angles, 2 * rotary + 32 * chunk).pick(pairs)
    signed = sine * f.const(_V, [-1.0, 1.0] * 8)
    return f.fma(value.pick([i ^ 1 for i in range(16)]), signed, value * cosine)


def _turn_half(f: Function, angles: Value, rotary: int, first: int, value: Value, half: int) -> Value:
    return rotated(f, value, angles, rotary, first + half)


def emit_latent(module: KernelModule, shapes: Shapes) -> None:
    """The query latent normed to BF16, and the window entry normed, rotated, quantised and appended."""
    with module.kernel("latent", LATENT) as k:
        f = k.f
        normed = f.scratch(shapes.dim * 4)
        for row in k.share(k.step("rows")):
            query = f.at(k.ptr("query"), row * k.arg("query_stride"))
            width = k.arg("query_width")
            squares = sum_squares(f, query, width / 16)
            out = f.at(k.ptr("query_out"), row * k.arg("query_out_stride"))
            normed_row(f, query, squares, width, shapes.norm_eps, k.ptr("query_norm"), out)
            kv = f.at(k.ptr("kv"), row * k.arg("kv_stride"))
            mean = sum_squares(f, kv, shapes.dim // 16).reduce("add") * (1 / shapes.dim)
            inverse = (1.0 / f.unary("sqrt", mean + shapes.norm_eps)).spread(16)
            words = []
            codes = shapes.dim - shapes.rotary
            for begin in range(0, codes, QUANT_GROUP):
                values = [
                    f.load(_V, kv, 4 * c) * inverse * f.load(_V, k.ptr("kv_norm"), 4 * c)
                    for c in range(begin, begin + QUANT_GROUP, 16)
                ]
                words += [round_bf16(f, v) for v in fake_quant_e4m3(f, values)[0]]
            angles = k.angles(row, shapes.rotary)
            for chunk, c in enumerate(range(codes, shapes.dim, 16)):
                value = f.load(_V, kv, 4 * c) * inverse * f.load(_V, k.ptr("kv_norm"), 4 * c)
                words.append(round_bf16(f, rotated(f, value, angles, shapes.rotary, chunk)))
            for i, word in enumerate(words):
                f.store(word, normed, 32 * i)
            block, slot = window_place(k, shapes, row)
            store_key(f, shapes, block, slot, lambda i: f.load(vec(16, I16), normed, 32 * i))


def window_place(k: Kernel, shapes: Shapes, row: Value) -> tuple[Value, Value]:
    """The key block and slot of a row's own position."""
    f = k.f
    span = k.row("span_of", row)
    position = k.row("positions", row)
    region = k.span(span, "window")
    inside = region.equals(0)
    ring = k.span(span, "home") + k.arg("ring")
    count = inside.choose(f.const(I64, shapes.ring_blocks), k.span(span, "window_blocks"))
    base = f.pointer(inside.choose(ring, region))
    return f.at(base, (position / KEYS) % count * shapes.block_bytes), position % KEYS


def emit_window_copies(module: KernelModule, shapes: Shapes) -> None:
    """`window_open` brings a long span's history from the ring into its window, `window_close` the last keys back."""
    for name, opening in (("window_open", True), ("window_close", False)):
        with module.kernel(name, "ring") as k:
            f = k.f
            for span in f.range(k.step("spans")):
                region = k.span(span, "window")
                with f.when(region.differs(0)):
                    start, length = (k.span(span, w) for w in ("start", "length"))
                    end = start if opening else start + length
                    last = (end - 1) / KEYS
                    first = (end - shapes.window + 1 - (0 if opening else SLACK)).max(0) / KEYS
                    ring = f.pointer(k.span(span, "home") + k.arg("ring"))
                    window, count = f.pointer(region), k.span(span, "window_blocks")
                    with f.when(end > 0):
                        for i in k.share(last - first + 1):
                            block = first + i
                            near = f.at(ring, block % shapes.ring_blocks * shapes.block_bytes)
                            far = f.at(window, block % count * shapes.block_bytes)
                            source, target = (near, far) if opening else (far, near)
                            for c in f.range(shapes.block_bytes // 64):
                                f.store(f.load(vec(16, I32), source, c * 64), target, c * 64)


def emit_heads(module: KernelModule, shapes: Shapes) -> None:
    """Query heads normed, rotated, scaled by D^-0.5 and laid out as tiles [D/32][16 pairs of d][16 heads][2]."""
    with module.kernel("heads", HEAD) as k:
        f = k.f
        for unit in k.share(k.step("rows") * shapes.head_groups):
            row, group = unit / shapes.head_groups, unit % shapes.head_groups
            query = f.at(k.ptr("query"), row * k.arg("query_stride") + group * (HEADS * shapes.dim * 4))
            out = f.at(k.ptr("out"), row * k.arg("out_stride") + group * (shapes.dim * 32))
            valid = (f.const(I64, shapes.heads) - group * HEADS).min(HEADS)
            inverse = f.scratch(HEADS * 4)
            f.store(f.const(_V, 0), inverse)
            for h in f.range(valid):
                squares = sum_squares(f, f.at(query, h * (shapes.dim * 4)), shapes.dim // 16)
                mean = squares.reduce("add") * (1 / shapes.dim) + shapes.norm_eps
                f.store(f.const(F32, shapes.dim**-0.5) / f.unary("sqrt", mean), inverse, h * 4)
            real = HEADS if shapes.head_groups > 1 else shapes.heads
            gains = [f.broadcast(_V, inverse, 4 * h) for h in range(real)]
            # A padded head of a last group has gain 0; it reads the last real one, which is finite.
            sources = [f.at(query, f.const(I64, h).min(valid - 1) * (shapes.dim * 4)) for h in range(real)]
            plain = (shapes.dim - shapes.rotary) // 32
            for chunk in f.range(plain):
                _head_tile(f, sources, gains, chunk, out, lambda value, _: value)
            angles = k.angles(row, shapes.rotary)
            for c in range(shapes.rotary // 32):
                turned = partial(_turn_half, f, angles, shapes.rotary, 2 * c)
                _head_tile(f, sources, gains, f.const(I64, plain + c), out, turned)


def _head_tile(
    f: Function, sources: list[Value], gains: list[Value], chunk: Value, out: Value,
    finish: Callable[[Value, int], Value],
) -> None:  # fmt: skip
    """32 channels of 16 heads as one tile; `finish` sees each half of them."""
    rows = []
    for source, gain in zip(sources, gains, strict=True):
        at = f.at(source, chunk * 128)
        halves = [finish(f.load(_V, at, 64 * i) * gain, i) for i in range(2)]
        rows.append(join_bf16(f, *halves).bits(_I))
    rows += [f.const(_I, 0)] * (HEADS - len(rows))
    tile = f.at(out, chunk * 1024)
    for i, pair in enumerate(transpose_pairs(f, rows)):
        f.store(pair, tile, 64 * i)
