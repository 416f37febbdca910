"""Compressed entries out of the pages into key blocks: all visible ones of a span, or those a row has selected.

A code times its scale is exact in BF16. Source: spec architecture 2.9.
"""

from __future__ import annotations

from collections.abc import Callable

from hadal.kernels.cpu.ir import F32, I1, I8, I16, I32, I64, PTR, Function, Value, vec
from hadal.kernels.cpu.layout import KEYS, QUANT_GROUP, Shapes
from hadal.kernels.cpu.program import Kernel
from hadal.kernels.cpu.tiles import TILE
from hadal.kernels.pages import PAGE_TOKENS

_VECTOR, _INTS, _WORDS = vec(16, F32), vec(16, I32), vec(32, I16)
# BF16 bits of the E4M3 codes 0..7 (m 2^-9), short of the scale's exponent
_SUBNORMAL = [0] + [(e << 7) + m for e, m in ((-9, 0), (-8, 0), (-8, 64), (-7, 0), (-7, 32), (-7, 64), (-7, 96))]


class Entries:
    """A layer's compressed entries of one span, by index; those from `count` on are zero."""

    def __init__(self, k: Kernel, shapes: Shapes, pages: Value, zero: Value) -> None:
        self.f, self.isa, self.shapes, self.pages, self.zero = k.f, k.isa, shapes, pages, zero
        self.offset = k.arg("entries")
        self.per_page = k.f.const(I64, PAGE_TOKENS) / k.arg("ratio").max(1)  # a power of two
        self.shift = k.f.call(I64, "llvm.cttz.i64", self.per_page, k.f.const(I1, 1))

    def at(self, j: Value) -> Value:
        """The address of entry j."""
        page = self.f.load(PTR, self.pages, (j >> self.shift) * 8)
        return self.f.at(page, self.offset + (j & (self.per_page - 1)) * self.shapes.entry_bytes)

    def fetch(self, j: Value) -> None:
        """Ask for entry j to be brought near."""
        place = self.at(j)
        for line in range(0, self.shapes.entry_bytes, 64):
            self.f.prefetch(place, line)

    def unpack(self, first: Value, count: Value, index: Callable[[Value], Value], rows: Value, pairs: Value) -> None:
        """A block of keys in both forms: entries index(first), index(first + 1), ... below `count`, then zeros."""
        f, codes = self.f, self.shapes.dim - self.shapes.rotary
        for pair in f.range(KEYS // 2):
            places = []
            for side in range(2):
                i = first + pair * 2 + side
                places.append((i < count).choose(self.at(index(i.min(count - 1))), self.zero))
            row = f.at(rows, (pair >> 3) * (self.shapes.dim // 32 * TILE) + (pair & 7) * 128)
            line = f.at(pairs, pair * 64)
            for g in f.range(codes // QUANT_GROUP):
                scales = [f.load(I8, p, g + (codes + 2 * self.shapes.rotary)) for p in places]
                a, b = (self._decode(f.at(p, g * QUANT_GROUP), s) for p, s in zip(places, scales, strict=True))
                for half in range(2):
                    _store_pair(f, row, line, g * 2 + half, a[half], b[half])
            for c in range(self.shapes.rotary // 32):
                x, y = (f.load(_WORDS, p, codes + 64 * c) for p in places)
                _store_pair(f, row, line, codes // 32 + c, x, y)

    def _decode(self, place: Value, scale: Value) -> list[Value]:
        """64 E4M3 codes times 2^(scale - 127) as BF16 words, exactly."""
        f = self.f
        if not self.isa.avx512:
            return [self._decode_float(f.at(place, 32 * half), scale) for half in range(2)]
        exponent = (scale.zext(I16) << 7).spread(32)
        table = f.const(_WORDS, _SUBNORMAL * 4) + (exponent & f.const(_WORDS, [0, *7 * [-1]] * 4))
        words = []
        for half in range(2):
            code = f.load(vec(32, I8), place, 32 * half).zext(_WORDS)
            normal = ((code & 0x7F) << 4) + (exponent - (7 << 7))
            small = f.call(_WORDS, "llvm.x86.avx512.permvar.hi.512", table, code)
            words.append((code & 0x78).equals(0).choose(small, normal) | ((code & 0x80) << 8))
        return words

    def _decode_float(self, place: Value, scale: Value) -> Value:
        """32 codes by way of FP32, without FP32 subnormals, which processors are slow at."""
        f, halves = self.f, []
        factor = (scale.zext(I32) << 23).bits(F32).spread(16)
        for half in range(2):
            code = f.load(vec(16, I8), place, 16 * half).zext(_INTS)
            normal = (((code & 0x7F) << 20) + (120 << 23)).bits(_VECTOR)
            value = (code & 0x78).equals(0).choose(normal + normal - 2.0**-6, normal) * factor
            halves.append(((value.bits(_INTS) | ((code & 0x80) << 24)) >> 16).trunc(vec(16, I16)))
        return halves[0].pick(range(32), halves[1])


def _store_pair(f: Function, row: Value, line: Value, chunk: Value | int, a: Value, b: Value) -> None:
    """32 channels of two neighbouring keys in both forms."""
    f.store(a, row, chunk * TILE)
    f.store(b, row, chunk * TILE + 64)
    for half in range(2):
        order = [16 * half + i // 2 + 32 * (i & 1) for i in range(32)]
        f.store(a.pick(order, b), line, chunk * (2 * TILE) + TILE * half)


def zero_entry(f: Function, shapes: Shapes) -> Value:
    """An entry on the stack whose values are all zero."""
    zero = f.scratch(shapes.entry_bytes + 64)
    for line in range(0, shapes.entry_bytes, 64):
        f.store(f.const(vec(64, I8), 0), zero, line)
    return zero


def unpack_entries(k: Kernel, shapes: Shapes) -> None:
    """Spans whose first row still sees all entries: blocks of all spans are counted through and dealt to threads."""
    f, ratio, topk = k.f, k.arg("ratio").max(1), k.arg("topk")
    zero = zero_entry(f, shapes)
    dealt = f.var(f.const(I64, 0))
    with f.when(k.arg("ratio") > 0):
        for span in f.range(k.step("spans")):
            start = k.span(span, "start")
            visible = (start + k.span(span, "length")) / ratio
            past = topk.differs(0) & ((start + 1) / ratio > topk)
            count = past.choose(0, topk.equals(0).choose(visible, visible.min(topk)))
            blocks = (count + (KEYS - 1)) >> 5
            turn = (f["thread"] + f["threads"] - dealt.get() % f["threads"]) % f["threads"]
            dealt.set(dealt.get() + blocks)
            entries = Entries(k, shapes, f.pointer(k.span(span, "pages")), zero)
            for b in f.range(blocks, turn, f["threads"]):
                rows = f.pointer(k.span(span, "entries") + b * shapes.block_bytes)
                entries.unpack(b * KEYS, count, lambda i: i, rows, f.at(rows, shapes.block_bytes // 2))
