"""Compressors of `fast`: completed blocks of tokens become entries or index keys, unfinished ones wait in tails.

A token's projected row is [kv | score] of `width` floats each, the position bias not yet added. `width` is the pooled
dim, or twice that where blocks overlap: the first half then serves the block after the token's own. A block is pooled
channel by channel with a softmax over its tokens, normed, rotated at its first position and quantised. Its tokens
from before the span lie in the home's tail. Source: report 2.3, spec architecture 2.4.
"""

from __future__ import annotations

import math
from typing import Literal

from hadal.kernels.cpu.ir import F32, I8, I32, I64, PTR, Function, Value, lanes, vec
from hadal.kernels.cpu.layout import QUANT_GROUP, Shapes
from hadal.kernels.cpu.numbers import cosine_sine, exp, largest, round_bf16
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.rows import sum_squares
from hadal.kernels.pages import PAGE_TOKENS
from hadal.quant.formats import E2M1_RECIPROCAL, E4M3_RECIPROCAL

Form = Literal["entries", "keys"]
GROUP_KEYS = 16  # index keys of a group
# projected: FP32 rows of this step; ape [ratio, width], norm [dim], frequencies [R/2]: FP32; tail: bytes into a home;
# slots: rows of the tail; overlap: 0 or 1; target: bytes into a page.
COMPRESS = "projected projected_stride ape norm tail slots ratio overlap frequencies target"
KEEP = "projected projected_stride tail slots width"

_VECTOR, _WORDS = vec(16, F32), vec(16, I32)
_MIN_ENTRY_AMAX, _MIN_KEY_AMAX = 1e-4, 6 * 2.0**-126


def emit_compress(module: KernelModule, shapes: Shapes, form: Form) -> None:
    """The kernel `compress_<form>`: every block that a span completes, words as in `COMPRESS`.

    It reads the tails that `keep_tail` then overwrites.
    """
    dim = shapes.dim if form == "entries" else shapes.index_dim
    with module.kernel(f"compress_{form}", COMPRESS) as k:
        f = k.f
        pooled = f.scratch(dim * 4)
        table = f.scratch(PAGE_TOKENS * 2 * WORD)
        ratio = k.arg("ratio")
        for span in f.range(k.step("spans")):
            start = k.span(span, "start")
            first = start / ratio
            # Spans take turns in which thread they begin with: in decode each completes one block at most.
            turn = (f["thread"] + span) % f["threads"]
            for block in f.range((start + k.span(span, "length")) / ratio, first + turn, f["threads"]):
                begin, end = _find_rows(k, dim, span, start, block, table)
                _pool(f, dim, table, (k.arg("overlap") + 1) * (dim * 4), begin, end, pooled)
                _norm(f, dim, pooled, k.ptr("norm"), shapes.norm_eps)
                position = block * ratio
                _rotate_at(f, shapes, position, k.ptr("frequencies"), f.at(pooled, (dim - shapes.rotary) * 4))
                pages = f.pointer(k.span(span, "pages"))
                part = f.at(f.load(PTR, pages, position / PAGE_TOKENS * WORD), k.arg("target"))
                inside = position % PAGE_TOKENS / ratio
                if form == "entries":
                    store_entry(f, shapes, pooled, f.at(part, inside * shapes.entry_bytes))
                else:
                    group = f.at(part, inside / GROUP_KEYS * shapes.group_bytes)
                    store_key(f, shapes, pooled, group, inside % GROUP_KEYS)


def emit_keep_tail(module: KernelModule) -> None:
    """The kernel `keep_tail`: the last rows of every span go to its home's tail; words as in `KEEP`."""
    with module.kernel("keep_tail", KEEP) as k:
        f = k.f
        slots, nbytes = k.arg("slots"), k.arg("width") * 8
        for span in f.range(k.step("spans")):
            length = k.span(span, "length")
            tail = f.at(f.pointer(k.span(span, "home")), k.arg("tail"))
            begin = (length - slots).max(0)
            for i in f.range(length, begin + (f["thread"] + span) % f["threads"], f["threads"]):
                source = f.at(k.ptr("projected"), (k.span(span, "row") + i) * k.arg("projected_stride"))
                target = f.at(tail, (k.span(span, "start") + i) % slots * nbytes)
                for c in f.range(nbytes, 0, 64):
                    f.store(f.load(_VECTOR, source, c), target, c)


def _find_rows(k: Kernel, dim: int, span: Value, start: Value, block: Value, table: Value) -> tuple[Value, Value]:
    """For each token of a block the addresses of its kv channels and of its position bias, and the range of them.

    The first block has no predecessor; its range begins later.
    """
    f = k.f
    ratio, slots, overlap = k.arg("ratio"), k.arg("slots"), k.arg("overlap")
    width = (overlap + 1) * (dim * 4)
    before = overlap * ratio
    begin, end = block.equals(0).choose(before, f.const(I64, 0)), before + ratio
    tail = f.at(f.pointer(k.span(span, "home")), k.arg("tail"))
    for i in f.range(end, begin):
        position = block * ratio - before + i
        half = (i >= before).choose(overlap * (dim * 4), 0)
        fresh = f.at(k.ptr("projected"), (position - start + k.span(span, "row")) * k.arg("projected_stride"))
        row = (position >= start).choose(fresh, f.at(tail, position % slots * width * 2))
        f.store(f.at(row, half), table, i * (2 * WORD))
        f.store(f.at(k.ptr("ape"), i % ratio * width + half), table, i * (2 * WORD) + WORD)
    return begin, end


def _pool(f: Function, dim: int, table: Value, width: Value, begin: Value, end: Value, out: Value) -> None:
    """Softmax-weighted sum over the tokens of the table, per channel."""
    for c in f.range(dim * 4, 0, 64):

        def read(i: Value, c: Value = c) -> tuple[Value, Value]:
            row, bias = (f.load(PTR, table, i * (2 * WORD) + WORD * j) for j in range(2))
            return f.load(_VECTOR, row, c), f.load(_VECTOR, row, c + width) + f.load(_VECTOR, bias, c)

        peak = f.var(f.const(_VECTOR, -math.inf))
        for i in f.range(end, begin):
            peak.set(peak.get().max(read(i)[1]))
        total, mixed = f.var(f.const(_VECTOR, 0)), f.var(f.const(_VECTOR, 0))
        for i in f.range(end, begin):
            kv, score = read(i)
            power = exp(f, score - peak.get())
            total.set(total.get() + power)
            mixed.set(f.fma(power, kv, mixed.get()))
        f.store(mixed.get() / total.get(), out, c)


def _norm(f: Function, dim: int, row: Value, weight: Value, eps: float) -> None:
    mean = sum_squares(f, row, dim // 16).reduce("add") * (1 / dim)
    factor = (1.0 / f.unary("sqrt", mean + eps)).spread(16)
    for c in f.range(dim * 4, 0, 64):
        f.store(f.load(_VECTOR, row, c) * factor * f.load(_VECTOR, weight, c), row, c)


def _rotate_at(f: Function, shapes: Shapes, position: Value, frequencies: Value, row: Value) -> None:
    count = rotary_lanes(shapes)
    for c in f.range(shapes.rotary * 2, 0, count * 4):
        angle = position.to_float(F32).spread(count) * f.load(vec(count, F32), frequencies, c)
        rotate_pairs(f, f.at(row, c * 2), *cosine_sine(f, angle))


def rotary_lanes(shapes: Shapes) -> int:
    """Pairs that are rotated at once."""
    return 16 if shapes.rotary % 32 == 0 else 8


def rotate_pairs(f: Function, place: Value, cosine: Value, sine: Value) -> None:
    """Rotate interleaved pairs in memory, one per lane of the cosine."""
    count = lanes(cosine.kind)
    low, high = (f.load(cosine.kind, place, i * 4 * count) for i in range(2))
    even = low.pick(range(0, 2 * count, 2), high)
    odd = low.pick(range(1, 2 * count, 2), high)
    x, y = even * cosine - odd * sine, even * sine + odd * cosine
    for i in range(2):
        order = [lane // 2 + count * (lane % 2) for lane in range(i * count, (i + 1) * count)]
        f.store(x.pick(order, y), place, i * 4 * count)


def hadamard(f: Function, row: Value, dim: int) -> list[Value]:
    """An FP32 row through the Walsh-Hadamard transform, 16 channels per value, with the sums of the plain butterfly."""
    values = [f.load(_VECTOR, row, c) for c in range(0, dim * 4, 64)]
    for step in (1, 2, 4, 8):
        signs = f.const(_VECTOR, [-1 if lane & step else 1 for lane in range(16)])
        values = [f.fma(v, signs, v.pick([lane ^ step for lane in range(16)])) for v in values]
    for step in (1 << i for i in range((len(values) - 1).bit_length())):
        values = [values[i ^ step] - v if i & step else v + values[i ^ step] for i, v in enumerate(values)]
    return [v * dim**-0.5 for v in values]


def store_entry(f: Function, shapes: Shapes, row: Value, to: Value) -> None:
    """A pooled row as the bytes of an entry, the values that `hadal.quant` rounds it to (spec architecture 2.9)."""
    codes = shapes.dim - shapes.rotary
    groups = codes // QUANT_GROUP
    scales = f.at(to, codes + 2 * shapes.rotary)
    for eight in range(0, groups, 8):
        f.store(f.const(I64, 0), scales, eight)
    for group in f.range(groups):
        values = [f.load(_VECTOR, row, (group * 4 + i) * 64) for i in range(4)]
        inverse = _store_scale(f, largest(f, values).max(_MIN_ENTRY_AMAX) * E4M3_RECIPROCAL, f.at(scales, group))
        for i, value in enumerate(values):
            f.store(_codes(f, value * inverse, 4, 3), to, group * QUANT_GROUP + 16 * i)
    for c in f.range(shapes.rotary, 0, 16):
        f.store(round_bf16(f, f.load(_VECTOR, row, (c + codes) * 4)), to, c * 2 + codes)


def store_key(f: Function, shapes: Shapes, row: Value, group: Value, key: Value) -> None:
    """A pooled row as one key of a key group, the values that `hadal.quant` rounds its transform to."""
    dim = shapes.index_dim
    values = hadamard(f, row, dim)
    for i, value in enumerate(values):
        if i % 2 == 0:
            amax = largest(f, values[i : i + 2]).max(_MIN_KEY_AMAX) * E2M1_RECIPROCAL
            inverse = _store_scale(f, amax, f.at(group, key + (8 * dim + 8 * i)))
        words = _codes(f, value * inverse, 2, 1).bits(vec(4, I32))
        for half in range(2):
            pair = words.lane(2 * half) | (words.lane(2 * half + 1) << 4)
            f.store(pair, f.at(group, key * 4), (2 * i + half) * 64)


def _store_scale(f: Function, least: Value, to: Value) -> Value:
    """Store the E8M0 byte of the smallest power of two that is at least `least`; its reciprocal in 16 lanes."""
    exponent = (least.bits(I32) + 0x7FFFFF) >> 23
    f.store(exponent.trunc(I8), to)
    return ((254 - exponent) << 23).bits(F32).spread(16)


def _codes(f: Function, x: Value, exponent: int, mantissa: int) -> Value:
    """Codes of 16 values, no larger than the format's largest, in sign, exponent and mantissa bits; ties to even."""
    shift, bias = 23 - mantissa, 128 - (1 << (exponent - 1))
    sign, magnitude = (x.bits(_WORDS) >> 31) << (exponent + mantissa), f.unary("fabs", x)
    bits = magnitude.bits(_WORDS)
    normal = ((bits + (((bits >> shift) & 1) + ((1 << (shift - 1)) - 1))) >> shift) - (bias << mantissa)
    smallest = 2.0 ** (bias - 126)
    # A number whose last bit is the step of the subnormal codes: adding it rounds to them.
    subnormal = (magnitude + smallest * 2.0**shift).bits(_WORDS) & ((2 << mantissa) - 1)
    return ((magnitude < smallest).choose(subnormal, normal) | sign).trunc(vec(16, I8))
