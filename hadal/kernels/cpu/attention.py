"""Attention over [window | compressed entries] with a sink on key blocks: unpack entries, score, weigh, mix, turn back.

A row's keys are a list of key blocks: those of its window by position, then its entries, all visible ones in order or
the selected ones gathered from the pages. Scores are held as S^T [key, 16 heads] for the whole list, so the softmax
needs no rescaling and a row's sums follow its own list alone.

  queries   per row and group of 16 heads D/32 tiles [16 pairs of d][16 heads][2] BF16, multiplied by D^-0.5
  selected  int32 indices of a row's entries, ascending; `selected_count` int64 per row
  out       BF16 [heads, D] per row, the last R dims rotated backwards

Every slot of a key block that is read must hold finite numbers; hidden ones weigh exactly nothing.
Source: report 2.3.3, spec architecture 2.5-2.7.
"""

from __future__ import annotations

from collections.abc import Callable

from hadal.kernels.cpu.entries import Entries, unpack_entries, zero_entry
from hadal.kernels.cpu.ir import F32, I8, I32, I64, PTR, Function, Value, vec
from hadal.kernels.cpu.layout import HEADS, KEYS, Shapes
from hadal.kernels.cpu.numbers import exp, round_bf16
from hadal.kernels.cpu.program import Kernel, KernelModule
from hadal.kernels.cpu.tiles import TILE, configure, dot_bf16, multiply, release, row_blocks, transpose_pairs

# Of one layer: `entries` is its byte offset in a page, `ratio` 0 a layer without entries, `topk` 0 without selection.
UNPACK = "entries ratio topk"
# Strides in bytes per row, `scratch_step` per thread; `ring` is the byte offset in a home, `regime` chooses the angles.
ATTEND = (
    "q q_stride out out_stride sink ring ratio entries topk selected selected_stride selected_count "
    "scratch scratch_step regime"
)

_VECTOR, _INTS = vec(16, F32), vec(16, I32)
_HIDDEN = -1e30  # a score whose weight is exactly zero


def entries_bytes(shapes: Shapes, entries: int) -> int:
    """Bytes of the key blocks for a span that attends to `entries` unselected entries."""
    return -(-entries // KEYS) * shapes.block_bytes


def scratch_bytes(shapes: Shapes, entries: int) -> int:
    """Bytes of a thread's scratch when a row attends to at most `entries` entries, selected or not."""
    blocks = shapes.window // KEYS + 1 + -(-entries // KEYS)
    scores = shapes.head_groups * blocks * KEYS * HEADS * 4
    fixed = sum(size for _, size in _parts(shapes))
    return fixed + scores + HEADS * (blocks | 1) * 2 * KEYS + -(-blocks // 8) * 64


def _parts(shapes: Shapes) -> list[tuple[str, int]]:
    """The parts of a thread's scratch whose size does not depend on the row."""
    form = shapes.block_bytes // 2
    return [
        ("square", 2 * KEYS * HEADS * 4),  # scores of a block, two partial sums
        ("peaks", shapes.head_groups * 64),
        ("rows", form),  # gathered keys as rows, one block
        ("pairs", -(-shapes.topk // KEYS) * form),  # gathered keys as pairs, all of them
        ("mixed", HEADS * _mixed_stride(shapes)),
    ]


def _mixed_stride(shapes: Shapes) -> int:
    return shapes.dim * 4 + 64


def store_key(f: Function, shapes: Shapes, block: Value, slot: Value, words: Callable[[int], Value]) -> None:
    """Write key `slot` of a block in both forms; `words(i)` is channels 16i.. as 16 BF16 words.

    Only this key's own bytes are written, so other threads may store its neighbours.
    """
    row = f.at(block, (slot >> 4) * (shapes.dim // 32 * TILE) + (slot & 15) * 64)
    pair = f.at(block, (slot >> 1) * 64 + (slot & 1) * 2 + shapes.block_bytes // 2)
    for i in range(shapes.dim // 16):
        value = words(i)
        f.store(value, row, i // 2 * TILE + i % 2 * 32)
        for lane in range(16):
            f.store(value.lane(lane), pair, i * TILE + 4 * lane)


def emit_attention(module: KernelModule, shapes: Shapes) -> None:
    """The kernels `unpack_entries` (words as in `UNPACK`) and, after it, `attend` (words as in `ATTEND`)."""
    with module.kernel("unpack_entries", UNPACK) as k:
        unpack_entries(k, shapes)
    with module.kernel("attend", ATTEND) as k:
        f, groups = k.f, shapes.head_groups
        configure(f, k.isa)
        zero = zero_entry(f, shapes)
        rows, threads = k.step("rows"), f["threads"]
        first, last = (rows * groups * (f["thread"] + i) / threads for i in range(2))
        # Later rows have more keys, so threads take turns; a few rows are shared by their groups of heads instead.
        many = rows >= threads * 4
        begin = many.choose(f["thread"], first / groups)
        for row in f.range(many.choose(rows, (last + (groups - 1)) / groups), begin, many.choose(threads, 1)):
            low, high = (first - row * groups).max(0), (last - row * groups).min(groups)
            _Row(k, shapes, row, zero).attend(many.choose(0, low), many.choose(groups, high))
        release(f, k.isa)


class _Row:
    """One row while it is computed: its list of key blocks and the places of its scratch."""

    def __init__(self, k: Kernel, shapes: Shapes, row: Value, zero: Value) -> None:
        f = self.f = k.f
        self.k, self.isa, self.shapes, self.row = k, k.isa, shapes, row
        self.position = f.load(I64, k.step_ptr("positions"), row * 8)
        self.span = k.row("span_of", row)
        self.pool = Entries(k, shapes, f.pointer(self.k.span(self.span, "pages")), zero)
        ratio, topk = k.arg("ratio"), k.arg("topk")
        visible = (ratio > 0).choose((self.position + 1) / ratio.max(1), 0)
        self.selecting = (topk > 0) & (visible > topk)
        count = f.var(visible)
        with f.when(self.selecting):
            count.set(f.load(I64, k.ptr("selected_count"), row * 8))
        self.count = count.get()
        self.low = (self.position - (shapes.window - 1)).max(0)
        self.near = (self.position >> 5) - (self.low >> 5) + 1
        self.blocks = self.near + ((self.count + (KEYS - 1)) >> 5)
        place = f.at(k.ptr("scratch"), k.arg("scratch_step") * f["thread"])
        self.part: dict[str, Value] = {}
        for name, size in _parts(shapes):
            self.part[name], place = place, f.at(place, size)
        self.scores, place = place, f.at(place, self.blocks * (shapes.head_groups * KEYS * HEADS * 4))
        self.weight_stride = (self.blocks | 1) * (2 * KEYS)
        self.weights, self.table = place, f.at(place, self.weight_stride * HEADS)

    def attend(self, low: Value, high: Value) -> None:
        """Head groups low..high of the row."""
        f = self.f
        for g in f.range(high, low):
            f.store(f.load(_VECTOR, self.k.ptr("sink"), g * 64), self.part["peaks"], g * 64)
        with f.when(self.selecting):
            for i in f.range(self.count.min(KEYS)):
                self.pool.fetch(self._selected(i))
        for i in f.range(self.blocks):
            rows, begin, end = self._place_block(i)
            for g in f.range(high, low):
                query = f.at(self.k.ptr("q"), self.row * self.k.arg("q_stride") + g * (self.shapes.dim * 32))
                self._products(rows, query)
                self._keep_scores(self._scores_at(g, i), f.at(self.part["peaks"], g * 64), begin, end)
        for g in f.range(high, low):
            inverse = self._weigh(g)
            self._mix(g)
            self._finish(g, inverse)

    def _selected(self, i: Value) -> Value:
        k = self.k
        here = self.row * k.arg("selected_stride") + i.min(self.count - 1) * 4
        return self.f.load(I32, k.ptr("selected"), here).zext(I64)

    def _place_block(self, i: Value) -> tuple[Value, Value, Value]:
        """Block i of the list: its rows, and its visible keys as a range; the place of its pairs goes to the table."""
        f, shapes, form = self.f, self.shapes, self.shapes.block_bytes // 2
        number = (self.low >> 5) + i
        window = self.k.span(self.span, "window")
        ring = self.k.span(self.span, "home") + self.k.arg("ring")
        base = window.equals(0).choose(ring, window)
        length = window.equals(0).choose(shapes.ring_blocks, self.k.span(self.span, "window_blocks"))
        rows = f.var(f.pointer(base + number % length * shapes.block_bytes))
        begin = f.var((self.low - number * KEYS).max(0))
        end = f.var((self.position + 1 - number * KEYS).min(KEYS))
        pairs = f.var(f.at(rows.get(), form))
        far = i - self.near
        with f.when(far > -1):
            begin.set(0)
            end.set((self.count - far * KEYS).min(KEYS))
            rows.set(f.pointer(self.k.span(self.span, "entries") + far * shapes.block_bytes))
            pairs.set(f.at(rows.get(), form))
            with f.when(self.selecting):
                rows.set(self.part["rows"])
                pairs.set(f.at(self.part["pairs"], far * form))
                for next_one in f.range((self.count - (far + 1) * KEYS).min(KEYS)):
                    self.pool.fetch(self._selected((far + 1) * KEYS + next_one))
                self.pool.unpack(far * KEYS, self.count, self._selected, rows.get(), pairs.get())
        f.store(pairs.get(), self.table, i * 8)
        return rows.get(), begin.get(), end.get()

    def _scores_at(self, g: Value, i: Value) -> Value:
        return self.f.at(self.scores, (g * self.blocks + i) * (KEYS * HEADS * 4))

    def _products(self, rows: Value, query: Value) -> None:
        """Keys x queries of one block into the square; tiles keep even and odd 32 channels apart, for more chains."""
        f, depth, square = self.f, self.shapes.dim // 32, self.part["square"]
        half_bytes = depth * TILE
        if self.isa.amx:
            tile, width = [f.const(I8, i) for i in range(8)], f.const(I64, 64)

            def step(place: Value, side: int) -> None:
                f.do("llvm.x86.tileloadd64", tile[6 + side], f.at(query, place), width)
                for half in range(2):
                    f.do("llvm.x86.tileloadd64", tile[4 + half], f.at(rows, place + half * half_bytes), width)
                    f.do("llvm.x86.tdpbf16ps", tile[2 * side + half], tile[4 + half], tile[6 + side])

            for c in range(4):
                f.do("llvm.x86.tilezero", tile[c])
            for i in f.range(depth // 2):
                for side in range(2):
                    step(i * (2 * TILE) + side * TILE, side)
            if depth % 2:
                step(f.const(I64, (depth - 1) * TILE), 0)
            for c in range(4):
                f.do("llvm.x86.tilestored64", tile[c], f.at(square, c * TILE), width)
            return
        keys = 2 * self.isa.rows
        for first in f.range(KEYS, 0, keys):
            sums = [f.var(f.const(_VECTOR, 0)) for _ in range(keys)]
            row = f.at(rows, (first >> 4) * half_bytes + (first & 15) * 64)
            for i in f.range(depth):
                for pair in f.range(16):
                    q = f.load(_INTS, query, i * TILE + pair * 64)
                    for r in range(keys):
                        x = f.broadcast(_INTS, f.at(row, 64 * r), i * TILE + pair * 4)
                        sums[r].set(dot_bf16(f, self.isa, sums[r].get(), q, x))
            for r in range(keys):
                f.store(sums[r].get(), f.at(square, first * 64), 64 * r)

    def _keep_scores(self, to: Value, peak_place: Value, begin: Value, end: Value) -> None:
        f, square = self.f, self.part["square"]
        peak = f.var(f.load(_VECTOR, peak_place))
        for key in f.range(end, begin):
            score = f.load(_VECTOR, square, key * 64)
            if self.isa.amx:
                score = score + f.load(_VECTOR, f.at(square, 2 * TILE), key * 64)
            peak.set(peak.get().max(score))
            f.store(score, to, key * 64)
        f.store(peak.get(), peak_place)
        for hidden in (f.range(begin), f.range(KEYS, end)):
            for key in hidden:
                f.store(f.const(_VECTOR, _HIDDEN), to, key * 64)

    def _weigh(self, g: Value) -> Value:
        """Scores to BF16 weights [16 heads, keys]; returns one over the denominators of the 16 heads."""
        f = self.f
        peak = f.load(_VECTOR, self.part["peaks"], g * 64)
        sums = [f.var(f.const(_VECTOR, 0)) for _ in range(4)]
        for i in f.range(self.blocks):
            scores = self._scores_at(g, i)
            pairs = []
            for key in range(0, KEYS, 2):
                words = []
                for side in range(2):
                    weight = exp(f, f.load(_VECTOR, scores, (key + side) * 64) - peak)
                    total = sums[(key + side) % 4]
                    total.set(total.get() + weight)
                    words.append(round_bf16(f, weight).zext(_INTS))
                pairs.append(words[0] | (words[1] << 16))
            for head, line in enumerate(transpose_pairs(f, pairs)):
                f.store(line, f.at(self.weights, self.weight_stride * head), i * (2 * KEYS))
        sink = exp(f, f.load(_VECTOR, self.k.ptr("sink"), g * 64) - peak)
        a, b, c, d = (s.get() for s in sums)
        return 1.0 / (((a + b) + (c + d)) + sink)

    def _heads(self, g: Value) -> Value:
        """Real heads of a group."""
        return (self.shapes.heads - g * HEADS).min(HEADS)

    def _mix(self, g: Value) -> None:
        """Weights x keys, FP32 [16 heads, dim], block after block."""
        f, count, stride = self.f, self.shapes.dim // 16, self.f.const(I64, _mixed_stride(self.shapes))
        if self.isa.amx:
            for first in f.range(count // 4 * 4, 0, 4):
                self._mix_tiles(first, 4, stride)
            if count % 4:
                self._mix_tiles(f.const(I64, count // 4 * 4), count % 4, stride)
            return
        for panel in f.range(count // 2):
            done = f.var(f.const(I64, 0))
            for size in row_blocks(self.isa):
                for loop in f.repeat_while():
                    loop.leave_unless(self._heads(g) - done.get() > size - 1)
                    a = f.at(self.weights, done.get() * self.weight_stride)
                    out = f.at(self.part["mixed"], done.get() * stride + panel * 128)

                    def keys(i: Value, panel: Value = panel) -> Value:
                        return f.at(f.load(PTR, self.table, i * 8), panel * (2 * TILE))

                    multiply(f, self.isa, size, a, self.weight_stride, keys, self.blocks, out, stride)
                    done.set(done.get() + size)

    def _mix_tiles(self, first: Value, count: int, stride: Value) -> None:
        f = self.f
        tile, width = [f.const(I8, i) for i in range(8)], f.const(I64, 64)
        for c in range(count):
            f.do("llvm.x86.tilezero", tile[c])
        for i in f.range(self.blocks):
            keys = f.at(f.load(PTR, self.table, i * 8), first * TILE)
            f.do("llvm.x86.tileloadd64", tile[4], f.at(self.weights, i * 64), self.weight_stride)
            for c in range(count):
                f.do("llvm.x86.tileloadd64", tile[5 + c % 3], f.at(keys, c * TILE), width)
                f.do("llvm.x86.tdpbf16ps", tile[c], tile[4], tile[5 + c % 3])
        for c in range(count):
            f.do("llvm.x86.tilestored64", tile[c], f.at(self.part["mixed"], first * 64 + c * 64), stride)

    def _finish(self, g: Value, inverse: Value) -> None:
        """Divide, rotate the last dims backwards, store BF16."""
        f, shapes, k = self.f, self.shapes, self.k
        plain = shapes.dim - shapes.rotary
        angles = k.angles(self.row, shapes.rotary)
        f.store(inverse, self.part["square"])
        twice = [i // 2 for i in range(16)]
        sign = f.const(_VECTOR, [1.0, -1.0] * 8)
        turns = []
        for i in range(0, shapes.rotary, 16):
            cosine, sine = (f.load(vec(8, F32), angles, 2 * i + part) for part in (0, 2 * shapes.rotary))
            turns.append((cosine.pick(twice), sine.pick(twice) * sign))
        for head in f.range(self._heads(g)):
            mixed = f.at(self.part["mixed"], head * _mixed_stride(shapes))
            out = f.at(k.ptr("out"), self.row * k.arg("out_stride") + (g * HEADS + head) * (shapes.dim * 2))
            factor = f.broadcast(_VECTOR, self.part["square"], head * 4)
            for c in f.range(plain // 16):
                f.store(round_bf16(f, f.load(_VECTOR, mixed, c * 64) * factor), out, c * 32)
            for i, (cosine, sine) in enumerate(turns):
                x = f.load(_VECTOR, mixed, plain * 4 + 64 * i) * factor
                turned = f.fma(x.pick([lane ^ 1 for lane in range(16)]), sine, x * cosine)
                f.store(round_bf16(f, turned), out, plain * 2 + 32 * i)
