"""Attention and index scores of the table `cpu`: each query by its own list of keys, rounded as the official code does.

A query's list is its window in order, then its entries, in slots; a block is 64 slots. The softmax walks over blocks
with a running maximum, and weights are rounded to BF16 against it. Keys of a block lie as rows, which are multiplied
with 32 heads of the query, and as pairs, which the weights are multiplied with; a slot without a key weighs exactly
nothing. Nothing depends on what else is computed.

Source: spec architecture 2.6 and 2.7; golden/README for the order of rounding.
"""

from __future__ import annotations

from collections.abc import Callable

from hadal.kernels.cpu.ir import F32, I8, I16, I32, I64, PTR, Function, Value, vec
from hadal.kernels.cpu.numbers import exp, round_bf16, through_bf16
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.tiles import TILE, configure, multiply, release, row_blocks, transpose_pairs
from hadal.kernels.stored import FP8_GROUP

BLOCK = 64  # slots of a step of the softmax
HEADS = 32  # query heads that are multiplied at once
KEYS = 32  # keys of a block of pairs, and keys that are scored at once
# `table`: ROW words per query; dim: a multiple of 32; codes, rotary: columns of a stored entry, FP8 and BF16; pages:
# addresses of pages with 2^shift rows of `row_bytes` each from `offset` on. Strides in bytes.
ATTEND = (
    "q q_stride table count split slots key_stride dim codes rotary pages offset shift row_bytes "
    "sink heads out out_stride scale scratch scratch_step"
)
ROW = ["keys", "near", "list", "far"]  # address of the first window key, keys; address of int32 entries or 0, entries
# q: rows of `dim` columns, `heads` of them per query; weights: BF16 [queries, heads]; scores: FP32 rows
SCORE = (
    "q q_stride weights weight_stride heads dim start count ratio total pages offset shift row_bytes "
    "scores score_stride scratch scratch_step"
)
_V, _I, _WORDS = vec(16, F32), vec(16, I32), vec(32, I16)
_HIDDEN = -1e30  # a score whose weight is exactly zero


def attend_scratch(heads: int, dim: int) -> int:
    """Bytes of a thread's scratch of `attend_listed`."""
    panels = -(-heads // HEADS)
    keys = BLOCK * (dim * 2 + 64) + BLOCK * dim * 2
    return keys + panels * HEADS * (dim * 2 + dim * 4 + 3 * 4) + BLOCK * HEADS * 4 + HEADS * (BLOCK * 2 + dim * 4)


def score_scratch(heads: int, dim: int) -> int:
    """Bytes of a thread's scratch of `index_scores`."""
    return KEYS * dim * 2 + (heads + 32) * KEYS * 4


def emit_listed(module: KernelModule) -> None:
    """The kernels `attend_listed` and `index_scores`."""
    with module.kernel("attend_listed", ATTEND) as k:
        f = k.f
        configure(f, k.isa)
        panels, split = (k.arg("heads") + (HEADS - 1)) / HEADS, k.arg("split")
        # Few queries are shared by their panels of heads.
        for unit in f.range(k.arg("count") * split, f["thread"], f["threads"]):
            low = unit % split
            high = split.equals(1).choose(panels, low + 1)
            _Query(k, unit / split).attend(low, high)
        release(f, k.isa)
    with module.kernel("index_scores", SCORE) as k:
        _score(k)


def _stored_row(k: Kernel, j: Value) -> Value:
    """The address of a sequence's stored row j."""
    f, shift = k.f, k.arg("shift")
    page = f.load(PTR, k.ptr("pages"), (j >> shift) * WORD)
    return f.at(page, k.arg("offset") + (j - ((j >> shift) << shift)) * k.arg("row_bytes"))


def _blocks_of_rows(f: Function, isa: Isa, rows: Value, block: Callable[[Value, int], None]) -> None:
    """block(first, size) for all rows; with tile registers the last one may reach behind them."""
    done = f.var(f.const(I64, 0))
    for size in row_blocks(isa):
        for loop in f.repeat_while():
            loop.leave_unless(rows - done.get() > (0 if size == row_blocks(isa)[-1] else size - 1))
            block(done.get(), size)
            done.set(done.get() + size)


class _Query:
    """One query while it is computed, and the places of its thread's scratch."""

    def __init__(self, k: Kernel, row: Value) -> None:
        f = self.f = k.f
        self.k, self.isa, self.row, self.dim = k, k.isa, row, k.arg("dim")
        place = f.at(k.ptr("table"), row * (len(ROW) * WORD))
        self.keys, self.near, self.list, self.far = (f.load(I64, place, i * WORD) for i in range(len(ROW)))
        self.row_stride, self.wide_stride = self.dim * 2 + 64, self.dim * 4
        heads = (k.arg("heads") + (HEADS - 1)) / HEADS * HEADS
        sizes = {
            "scores": f.const(I64, BLOCK * HEADS * 4), "weights": f.const(I64, HEADS * BLOCK * 2),
            "peaks": heads * 4, "totals": heads * 4, "shrinks": heads * 4,
            "pairs": self.dim * (BLOCK * 2), "queries": heads * self.dim * 2, "product": self.wide_stride * HEADS,
            "sums": heads * self.wide_stride, "rows": self.row_stride * BLOCK,
        }  # fmt: skip
        at = f.at(k.ptr("scratch"), k.arg("scratch_step") * f["thread"])
        self.part: dict[str, Value] = {}
        for name, size in sizes.items():
            self.part[name], at = at, f.at(at, size)

    def attend(self, low: Value, high: Value) -> None:
        """The panels low .. high of 32 heads."""
        f, slots = self.f, self.k.arg("slots")
        for panel in f.range(high, low):
            self._begin(panel)
        blocks = ((self.far > 0).choose(slots + self.far, self.near) + (BLOCK - 1)) / BLOCK
        for b in f.range(blocks):
            first = b * BLOCK
            near = (self.near - first).min(BLOCK).max(0)
            begin = (first - slots).max(0)
            far = ((first + BLOCK - slots).min(self.far) - begin).max(0)
            with f.when(near + far > 0):
                self._gather(first, near, begin, far)
                count = near + far
                whole = (count + (KEYS - 1)) & -KEYS
                self._pair(whole)
                for panel in f.range(high, low):
                    self._multiply_queries(panel, whole)
                    for half in range(2):
                        self._weigh(panel, half, count, whole)
                    self._mix(panel, whole / KEYS)
        for panel in f.range(high, low):
            self._finish(panel)

    def _real(self, panel: Value) -> Value:
        return (self.k.arg("heads") - panel * HEADS).min(HEADS)

    def _begin(self, panel: Value) -> None:
        """Sums at zero, and a panel's queries as tiles [16 pairs of d][16 heads][2]."""
        f = self.f
        sums = f.at(self.part["sums"], panel * self.wide_stride * HEADS)
        for c in f.range(self.dim * (HEADS * 4), 0, 64):
            f.store(f.const(_V, 0), sums, c)
        tiles = f.at(self.part["queries"], panel * self.dim * (HEADS * 2))
        source = f.at(self.k.ptr("q"), self.row * self.k.arg("q_stride"))
        for half in range(2):
            f.store(f.const(_V, float("-inf")), self.part["peaks"], panel * (HEADS * 4) + 64 * half)
            f.store(f.const(_V, 0), self.part["totals"], panel * (HEADS * 4) + 64 * half)
            heads = [(panel * HEADS + 16 * half + i).min(self.k.arg("heads") - 1) for i in range(16)]
            rows = [f.at(source, head * self.dim * 2) for head in heads]
            for i in f.range(self.dim / 32):
                for pair, line in enumerate(transpose_pairs(f, [f.load(_I, row, i * 64) for row in rows])):
                    f.store(line, tiles, i * (2 * TILE) + (half * TILE + pair * 64))

    def _gather(self, first: Value, near: Value, begin: Value, far: Value) -> None:
        """The block's keys as rows: window keys from slot `first` on, entries from `begin` on, then zeros."""
        f, k, rows, stride = self.f, self.k, self.part["rows"], self.row_stride
        window = f.at(f.pointer(self.keys), first * k.arg("key_stride"))
        for i in f.range(near):
            source, to = f.at(window, i * k.arg("key_stride")), f.at(rows, i * stride)
            for c in f.range(self.dim * 2, 0, 64):
                f.store(f.load(_I, source, c), to, c)
        for i in f.range(far):
            j = f.var(begin + i)
            with f.when(self.list.differs(0)):
                j.set(f.load(I32, f.pointer(self.list), j.get() * 4).zext(I64))
            self._unpack(_stored_row(k, j.get()), f.at(rows, (near + i) * stride))
        count = near + far
        for i in f.range((count + (KEYS - 1)) & -KEYS, count):
            for c in f.range(self.dim * 2, 0, 64):
                f.store(f.const(_I, 0), f.at(rows, i * stride), c)

    def _unpack(self, place: Value, to: Value) -> None:
        """An entry's bytes as BF16; a code times its scale is exact. Columns behind its own are zero."""
        f, codes, rotary = self.f, self.k.arg("codes"), self.k.arg("rotary")
        for c in f.range(codes / 16):
            scale = f.load(I8, place, c / (FP8_GROUP // 16) + codes + rotary * 2)
            factor = (scale.zext(I32) << 23).bits(F32).spread(16)
            code = f.load(vec(16, I8), place, c * 16).zext(_I)
            normal = (((code & 0x7F) << 20) + (120 << 23)).bits(_V)
            value = (code & 0x78).equals(0).choose(normal + normal - 2.0**-6, normal) * factor
            bits = value.bits(_I) | ((code & 0x80) << 24)
            f.store((bits >> 16).trunc(vec(16, I16)), to, c * 32)
        for c in f.range(rotary * 2, 0, 32):
            f.store(f.load(vec(16, I16), place, c + codes), to, c + codes * 2)
        for c in f.range(self.dim * 2, (codes + rotary) * 2, 32):
            f.store(f.const(vec(16, I16), 0), to, c)

    def _pair(self, whole: Value) -> None:
        """The rows as pairs [block of 32 keys][dim / 16][16 pairs of keys][16 d][2]."""
        f = self.f
        for pair in f.range(whole / 2):
            row = f.at(self.part["rows"], pair * 2 * self.row_stride)
            to = f.at(self.part["pairs"], pair / 16 * self.dim * (KEYS * 2) + pair % 16 * 64)
            for c in f.range(self.dim / 32):
                a, b = (f.load(_WORDS, f.at(row, self.row_stride * side), c * 64) for side in range(2))
                for half in range(2):
                    order = [16 * half + i // 2 + 32 * (i & 1) for i in range(32)]
                    f.store(a.pick(order, b), to, c * (2 * TILE) + half * TILE)

    def _multiply_queries(self, panel: Value, whole: Value) -> None:
        """Keys x queries of a panel into the scores [keys, 32 heads]."""
        f = self.f
        queries = f.at(self.part["queries"], panel * self.dim * (HEADS * 2))
        size = row_blocks(self.isa)[0]
        for first in f.range(whole, 0, size):
            rows = f.at(self.part["rows"], first * self.row_stride)
            out = f.at(self.part["scores"], first * (HEADS * 4))
            multiply(f, self.isa, size, rows, self.row_stride, _tiles(f, queries), self.dim / 32, out, HEADS * 4)

    def _weigh(self, panel: Value, half: int, count: Value, whole: Value) -> None:
        """16 heads: scores to BF16 weights [head, keys] against the running maximum, and what it did to the sums."""
        f = self.f
        scores, scale = f.at(self.part["scores"], 64 * half), self.k.real("scale").spread(16)
        here = panel * (HEADS * 4) + 64 * half
        old = f.load(_V, self.part["peaks"], here)
        peak = f.var(old)
        for i in f.range(count):
            score = f.load(_V, scores, i * (HEADS * 4)) * scale
            peak.set(peak.get().max(score))
            f.store(score, scores, i * (HEADS * 4))
        for i in f.range(whole, count):
            f.store(f.const(_V, _HIDDEN), scores, i * (HEADS * 4))
        sums = [f.var(f.const(_V, 0)) for _ in range(4)]
        for block in f.range(whole / KEYS):
            pairs = []
            for key in range(0, KEYS, 2):
                words = []
                for side in range(2):
                    place = block * (KEYS * HEADS * 4) + (key + side) * (HEADS * 4)
                    weight = exp(f, f.load(_V, scores, place) - peak.get())
                    total = sums[(key + side) % 4]
                    total.set(total.get() + weight)
                    words.append(round_bf16(f, weight).zext(_I))
                pairs.append(words[0] | (words[1] << 16))
            for head, line in enumerate(transpose_pairs(f, pairs)):
                f.store(line, self.part["weights"], block * (KEYS * 2) + (16 * half + head) * (BLOCK * 2))
        shrink = exp(f, old - peak.get())
        a, b, c, d = (s.get() for s in sums)
        f.store(f.load(_V, self.part["totals"], here) * shrink + ((a + b) + (c + d)), self.part["totals"], here)
        f.store(peak.get(), self.part["peaks"], here)
        f.store(shrink, self.part["shrinks"], here)

    def _mix(self, panel: Value, blocks: Value) -> None:
        """Weights x keys, added to the panel's shrunk sums."""
        f, stride, pairs = self.f, self.wide_stride, self.part["pairs"]
        for columns in f.range(self.dim / 32):

            def block(first: Value, size: int, columns: Value = columns) -> None:
                weights = f.at(self.part["weights"], first * (BLOCK * 2))
                out = f.at(self.part["product"], first * stride + columns * 128)
                multiply(
                    f, self.isa, size, weights, BLOCK * 2,
                    lambda i: f.at(pairs, i * self.dim * (KEYS * 2) + columns * (2 * TILE)), blocks, out, stride,
                )  # fmt: skip

            _blocks_of_rows(f, self.isa, self._real(panel), block)
        for head in f.range(self._real(panel)):
            number = panel * HEADS + head
            sums, product = f.at(self.part["sums"], number * stride), f.at(self.part["product"], head * stride)
            shrink = f.broadcast(_V, self.part["shrinks"], number * 4)
            for c in f.range(stride, 0, 64):
                f.store(f.fma(f.load(_V, sums, c), shrink, f.load(_V, product, c)), sums, c)

    def _finish(self, panel: Value) -> None:
        """Divide by the weights' sum and the sink's."""
        f, k = self.f, self.k
        for half in range(2):
            here = panel * (HEADS * 4) + 64 * half
            sink = exp(f, f.load(_V, k.ptr("sink"), here) - f.load(_V, self.part["peaks"], here))
            f.store(f.load(_V, self.part["totals"], here) + sink, self.part["totals"], here)
        for head in f.range(self._real(panel)):
            number = panel * HEADS + head
            total = f.broadcast(_V, self.part["totals"], number * 4)
            sums = f.at(self.part["sums"], number * self.wide_stride)
            out = f.at(k.ptr("out"), self.row * k.arg("out_stride") + number * self.dim * 2)
            for c in f.range(self.dim / 16):
                f.store(round_bf16(f, f.load(_V, sums, c * 64) / total), out, c * 32)


def _score(k: Kernel) -> None:
    """Threads share blocks of 32 keys, each unpacked once and scored for all queries that may see it."""
    f, heads, dim = k.f, k.arg("heads"), k.arg("dim")
    configure(f, k.isa)
    tiles = f.at(k.ptr("scratch"), k.arg("scratch_step") * f["thread"])
    square = f.at(tiles, dim * (KEYS * 2))
    for unit in f.range((k.arg("total") + (KEYS - 1)) / KEYS, f["thread"], f["threads"]):
        first = unit * KEYS
        for half in range(2):
            places = [_stored_row(k, (first + 16 * half + i).min(k.arg("total") - 1)) for i in range(16)]
            for i in f.range(dim / 32):
                rows = [_e2m1(f, f.load(vec(16, I8), p, i * 16), f.load(I8, p, i + dim / 2)) for p in places]
                for pair, line in enumerate(transpose_pairs(f, rows)):
                    f.store(line, tiles, i * (2 * TILE) + (half * TILE + pair * 64))
        for t in f.range(k.arg("count")):
            visible = (k.arg("start") + t + 1) / k.arg("ratio") - first
            out = f.at(k.ptr("scores"), t * k.arg("score_stride") + first * 4)
            with f.when(visible > 0):
                queries = f.at(k.ptr("q"), t * heads * k.arg("q_stride"))

                def block(begin: Value, size: int, queries: Value = queries) -> None:
                    a, to = f.at(queries, begin * k.arg("q_stride")), f.at(square, begin * (KEYS * 4))
                    multiply(f, k.isa, size, a, k.arg("q_stride"), _tiles(f, tiles), dim / 32, to, KEYS * 4)

                _blocks_of_rows(f, k.isa, heads, block)
                weights = f.at(k.ptr("weights"), t * k.arg("weight_stride"))
                totals = [f.var(f.const(_V, 0)) for _ in range(2)]
                for head in f.range(heads):
                    weight = (f.load(I16, weights, head * 2).zext(I32) << 16).bits(F32).spread(16)
                    for half, total in enumerate(totals):
                        dot = through_bf16(f, f.load(_V, square, head * (KEYS * 4) + 64 * half)).max(0.0)
                        total.set(total.get() + through_bf16(f, dot * weight))
                lane = f.const(_I, list(range(16)))
                for half, total in enumerate(totals):
                    seen = lane < (visible - 16 * half).min(16).max(0).trunc(I32).spread(16)
                    f.store(seen.choose(through_bf16(f, total.get()), float("-inf")), out, 64 * half)
            with f.when(visible < 1):
                for half in range(2):
                    f.store(f.const(_V, float("-inf")), out, 64 * half)
    release(f, k.isa)


def _tiles(f: Function, place: Value) -> Callable[[Value], Value]:
    """Where the pairs of tiles lie that begin at a place."""
    return lambda i: f.at(place, i * (2 * TILE))


def _e2m1(f: Function, codes: Value, scale: Value) -> Value:
    """16 bytes of two E2M1 codes each under one scale as 16 pairs of BF16 words."""
    pairs, raised = codes.zext(_I), ((scale.zext(I32) - 127) << 7).spread(16)
    words = []
    for nibble in (pairs & 0xF, pairs >> 4):
        magnitude = nibble & 7
        normal = (magnitude.equals(1).choose(f.const(_I, 126 << 7), (magnitude << 6) + (126 << 7))) + raised
        words.append(magnitude.equals(0).choose(f.const(_I, 0), normal) | ((nibble & 8) << 12))
    return words[0] | (words[1] << 16)
