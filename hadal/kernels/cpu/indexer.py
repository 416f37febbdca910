"""Lightning indexer of `fast`: int8 queries against the key groups of all pages, then the exact top-k of each row.

  query record   [P][Di] int8 codes of the P heads (padded to 16), then P FP32 factors, 0 for padded heads; with
                 `vpdpbusd` the codes are stored with 128 added, and the keys' sums times 128 are taken off again
  expanded       a key group as int8 [Di/4][16 keys][4], in sixteenths of the largest scale of each key, then that scale
                 as FP32: exact down to scales of an eighth of the largest, what lies lower is cut off towards zero

score[j] = scale[j] sum_h factor[h] relu(q[h] . k[j]): the products are exact integers, the heads are added in one order
everywhere, so every instruction set gives the same scores. Rows that see no more entries than the indexer keeps need
neither scores nor a choice. Source: report 2.3, spec architecture 2.6.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from hadal.config import CSA_RATIO
from hadal.kernels.cpu.compress import GROUP_KEYS, hadamard, rotary_lanes, rotate_pairs
from hadal.kernels.cpu.ir import F32, I8, I16, I32, I64, PTR, Function, Value, vec
from hadal.kernels.cpu.layout import HEADS, Shapes
from hadal.kernels.cpu.numbers import largest
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.tiles import dot_int8
from hadal.kernels.cpu.topk import write_topk
from hadal.kernels.pages import PAGE_TOKENS

# q [heads * Di] and weights [heads]: FP32 rows; out: query records; regime: 0 plain angles, 1 scaled ones.
QUERY = "q q_stride weights weights_stride out out_stride regime"
# keys: bytes into a page; scores: FP32 rows with room for the visible entries, rounded up to 64.
SCORE = "queries query_stride keys scores scores_stride"
# selected: int32 rows with room for topk + 16; selected_count: one int64 per row. The scores are overwritten.
SELECT = "scores scores_stride selected selected_stride selected_count"
CHUNK_GROUPS = 64  # groups of keys that a unit of work scores
AHEAD = 8  # groups that are fetched before they are used

_CHAINS = 4  # sums of heads that run side by side
_TURNS = 4  # places of expanded groups that take turns
_VECTOR, _WORDS, _BYTES = vec(16, F32), vec(16, I32), vec(64, I8)
_SMALLEST_NORMAL = 2.0**-126
_SIXTEENTHS = [0, 8, 16, 24, 32, 48, 64, 96]  # E2M1 values under the largest scale


def padded_heads(shapes: Shapes) -> int:
    """Heads of a query record."""
    return -(-shapes.index_heads // HEADS) * HEADS


def record_bytes(shapes: Shapes) -> int:
    """Bytes of a query record."""
    return padded_heads(shapes) * (shapes.index_dim + 4)


def emit_index_query(module: KernelModule, shapes: Shapes) -> None:
    """The kernel `index_query`: rotated, transformed, quantised heads and their factors; words as in `QUERY`."""
    dim, rotary, padded = shapes.index_dim, shapes.rotary, padded_heads(shapes)
    offset = 128 if _unsigned_queries(module.isa) else 0
    constant = dim**-0.5 * shapes.index_heads**-0.5 / 16
    with module.kernel("index_query", QUERY) as k:
        f = k.f
        space = f.scratch(dim * 4)
        for unit in k.share(k.step("rows") * padded):
            row, head = unit / padded, unit % padded
            out = f.at(k.ptr("out"), row * k.arg("out_stride"))
            codes, factor = f.at(out, head * dim), f.at(out, head * 4 + padded * dim)
            with f.when(head >= shapes.index_heads):
                for c in f.range(dim, 0, 16):
                    f.store(f.const(vec(16, I8), offset), codes, c)
                f.store(f.const(F32, 0), factor)
            with f.when(head < shapes.index_heads):
                source = f.at(k.ptr("q"), row * k.arg("q_stride") + head * (dim * 4))
                for c in f.range(dim * 4, 0, 64):
                    f.store(f.load(_VECTOR, source, c), space, c)
                angles = k.angles(row, rotary)
                count = rotary_lanes(shapes)
                for c in f.range(rotary * 2, 0, count * 4):
                    turn = [f.load(vec(count, F32), f.at(angles, c), part * rotary * 2) for part in range(2)]
                    rotate_pairs(f, f.at(space, c * 2 + (dim - rotary) * 4), *turn)
                values = hadamard(f, space, dim)
                amax = largest(f, values)
                scale = amax / 127.0
                inverse = (scale < _SMALLEST_NORMAL).choose(f.const(F32, 0), 127.0 / amax).spread(16)
                for i, value in enumerate(values):
                    code = f.unary("rint", value * inverse).to_int(_WORDS).trunc(vec(16, I8))
                    f.store(code + offset, codes, 16 * i)
                weight = f.load(F32, k.ptr("weights"), row * k.arg("weights_stride") + head * 4)
                f.store(weight * constant * scale, factor)


def emit_index_score(module: KernelModule, shapes: Shapes) -> None:
    """The kernel `index_score`: scores of all visible entries of rows that see more than topk; words as in `SCORE`."""
    size = GROUP_KEYS * (shapes.index_dim + 4)
    # With tiles a group is multiplied a turn after it is expanded, and its heads are added another turn later.
    lag = 2 if module.isa.amx else 0
    with module.kernel("index_score", SCORE) as k:
        f = k.f
        _configure(k, shapes)
        chunk, squares = f.scratch(CHUNK_GROUPS * size), f.scratch(2 * padded_heads(shapes) * 64)
        longest = f.var(f.const(I64, 0))
        for span in f.range(k.step("spans")):
            longest.set(longest.get().max(k.span(span, "start") + k.span(span, "length")))
        chunks = longest.get() / (CHUNK_GROUPS * GROUP_KEYS * CSA_RATIO) + 1
        rows = k.step("rows")
        held, expanded = f.var(f.const(I64, -1)), f.var(f.const(I64, 0))
        # A chunk of keys stays in the cache for all rows; threads take alternate rows of it, or alternate chunks.
        for unit in f.range(rows * chunks, f["thread"], f["threads"]):
            row, first = unit % rows, unit / rows * CHUNK_GROUPS
            span = k.row("span_of", row)
            visible = _visible(k, row)
            groups = (visible + (GROUP_KEYS - 1)) / GROUP_KEYS
            count = (visible > shapes.topk).choose((groups - first).min(CHUNK_GROUPS), f.const(I64, 0))
            pages = f.pointer(k.span(span, "pages"))
            record = f.at(k.ptr("queries"), row * k.arg("query_stride"))
            scores = f.at(k.ptr("scores"), row * k.arg("scores_stride") + first * (GROUP_KEYS * 4))
            source = first * k.step("spans") + span
            expanded.set(source.equals(held.get()).choose(expanded.get(), f.const(I64, 0)))
            held.set(source)
            # A span's first row to need a group expands it. A row that is alone needs each once, in the first cache.
            mask = k.span(span, "length").equals(1).choose(f.const(I64, _TURNS - 1), -1)
            for i in f.range((count > 0).choose(count + lag, count)):
                with f.when((i >= expanded.get()) & (i < count)):
                    now, later = (_group(k, shapes, pages, g) for g in (first + i, (first + i + AHEAD).min(groups - 1)))
                    _expand(k, shapes, now, later, f.at(chunk, (i & mask) * size))
                    expanded.set(i + 1)
                fresh, done = (
                    f.at(chunk, (j & mask) * size) for j in ((i - 1).max(0).min(count - 1), (i - lag).max(0))
                )
                if lag:
                    halves = [f.at(squares, ((i + side) & 1) * (padded_heads(shapes) * 64)) for side in range(2)]
                    total = _score_tiles(k, shapes, record, fresh, *halves)
                else:
                    total = _score_vectors(k, shapes, record, done)
                # adding 0 makes -0 a plain 0, so that equal scores have equal bits
                scaled = total * f.load(_VECTOR, done, GROUP_KEYS * shapes.index_dim) + 0.0
                f.store(scaled, scores, (i - lag).max(0) * (GROUP_KEYS * 4))
        if lag:
            f.do("llvm.x86.tilerelease")


def _group(k: Kernel, shapes: Shapes, pages: Value, group: Value) -> Value:
    """Where a key group lies, given by its number in the sequence."""
    per_page = PAGE_TOKENS // CSA_RATIO // GROUP_KEYS
    page = k.f.at(k.f.load(PTR, pages, group / per_page * WORD), k.arg("keys"))
    return k.f.at(page, group % per_page * shapes.group_bytes)


def _expand(k: Kernel, shapes: Shapes, group: Value, later: Value, to: Value) -> None:
    """Expand a key group; `later` is one to fetch meanwhile."""
    f, dim, narrow = k.f, shapes.index_dim, vec(GROUP_KEYS, I8)
    for line in range(0, shapes.group_bytes, 64):
        f.prefetch(later, line)
    scales = [f.load(narrow, group, 8 * dim + 16 * part) for part in range(dim // 32)]
    top = functools.reduce(functools.partial(f.call, narrow, "llvm.umax.v16i8"), scales)
    bottom = functools.reduce(functools.partial(f.call, narrow, "llvm.umin.v16i8"), scales)
    f.store((top.zext(_WORDS) << 23).bits(_VECTOR), to, GROUP_KEYS * dim)

    def write(integers: Callable[[Function, Value, Value], Value]) -> None:
        for part, scale in enumerate(scales):
            for i in range(4 * part, 4 * part + 4):
                codes = f.load(_BYTES, group, 64 * i)
                for half in range(2):
                    f.store(integers(f, codes >> 4 * half, top - scale), to, 128 * i + 64 * half)

    if not k.isa.avx512:
        write(_shift)
        return
    near = ((top - bottom) & -4).equals(0).bits(I16).equals(-1)
    with f.when(near):
        write(_look_up)
    with f.when(near.equals(0)):
        write(_shift)


def _shift(f: Function, codes: Value, down: Value) -> Value:
    """Integers of the E2M1 codes in low nibbles, of 16 keys whose scale is down by so many powers of two."""
    magnitude, negative = codes & 7, -((codes >> 3) & 1)
    above = [f.call(_BYTES, "llvm.usub.sat.v64i8", magnitude, f.const(_BYTES, code)) for code in (4, 6)]
    words = (magnitude + above[0] + above[1] + above[1]).bits(_WORDS) << 3
    by = down.zext(_WORDS).min(7)
    words = (words >> by) & ((f.const(_WORDS, 127) >> by) * 0x01010101)  # without bits of the byte above
    return (words.bits(_BYTES) ^ negative) - negative


def _look_up(f: Function, codes: Value, down: Value) -> Value:
    """The same where all scales are down by 3 at most."""
    table = f.const(_BYTES, [(v >> d) * sign for d in range(4) for sign in (1, -1) for v in _SIXTEENTHS])
    index = (codes & 15) | (down << 4).pick([lane // 4 for lane in range(64)])
    return f.call(_BYTES, "llvm.x86.avx512.permvar.qi.512", table, index)


def _visible(k: Kernel, row: Value) -> Value:
    return (k.row("positions", row) + 1) / CSA_RATIO


def _unsigned_queries(isa: Isa) -> bool:
    return isa.avx512 and not isa.amx


def _tile_step(shapes: Shapes) -> int:
    """Channels of a tile."""
    return 64 if shapes.index_dim % 64 == 0 else 32


def _configure(k: Kernel, shapes: Shapes) -> None:
    """Tiles 0-3 hold products, 4 and 5 queries [16 heads][step], 6 and 7 keys [step / 4][16 keys][4]."""
    if not k.isa.amx:
        return
    step = _tile_step(shapes)
    widths = [w for tile in range(8) for w in (step if tile in (4, 5) else 64, 0)]
    heights = [step // 4 if tile > 5 else 16 for tile in range(8)]
    shape = k.f.scratch(64)
    k.f.store(k.f.const(_BYTES, [1] + 15 * [0] + widths + 16 * [0] + heights + 8 * [0]), shape)
    k.f.do("llvm.x86.ldtilecfg", shape)


class _Sum:
    """score = sum_h factor[h] relu(dots[h]) of 16 keys, head by head."""

    def __init__(self, f: Function, factors: Value) -> None:
        self.f, self.factors = f, factors
        self.sums = [f.const(_VECTOR, 0) for _ in range(_CHAINS)]

    def add(self, head: int, dots: Value) -> None:
        factor = self.f.broadcast(_VECTOR, self.factors, head * 4)
        self.sums[head % _CHAINS] = self.f.fma(dots.max(0).to_float(_VECTOR), factor, self.sums[head % _CHAINS])

    def total(self) -> Value:
        return (self.sums[0] + self.sums[1]) + (self.sums[2] + self.sums[3])


def _score_tiles(k: Kernel, shapes: Shapes, record: Value, group: Value, square: Value, before: Value) -> Value:
    """Products of a group into `square`, [P][16 keys], and in turns with them the sums of those in `before`."""
    f, dim, step = k.f, shapes.index_dim, _tile_step(shapes)
    stride, line, tile = f.const(I64, dim), f.const(I64, 64), [f.const(I8, i) for i in range(8)]
    result = _Sum(f, f.at(record, padded_heads(shapes) * dim))
    for m in range(padded_heads(shapes) // HEADS):
        f.do("llvm.x86.tilezero", tile[m % 4])
        for i, c in enumerate(range(0, dim, step)):
            keys, queries = tile[6 + i % 2], tile[4 + i % 2]
            if m == 0 or dim > 2 * step:
                f.do("llvm.x86.tileloadd64", keys, f.at(group, c * GROUP_KEYS), line)
            f.do("llvm.x86.tileloadd64", queries, f.at(record, m * HEADS * dim + c), stride)
            f.do("llvm.x86.tdpbssd", tile[m % 4], queries, keys)
        f.do("llvm.x86.tilestored64", tile[m % 4], f.at(square, m * HEADS * 64), line)
        for head in range(m * HEADS, min((m + 1) * HEADS, shapes.index_heads)):
            result.add(head, f.load(_WORDS, before, head * 64))
    return result.total()


def _score_vectors(k: Kernel, shapes: Shapes, record: Value, group: Value) -> Value:
    """The same without tiles, for one group."""
    heads, together = shapes.index_heads, 16 if k.isa.avx512 else 4
    result = _Sum(k.f, k.f.at(record, padded_heads(shapes) * shapes.index_dim))
    for first in range(0, heads, together):
        for head, dots in _multiply_vectors(k, shapes, record, group, range(first, min(first + together, heads))):
            result.add(head, dots)
    return result.total()


def _multiply_vectors(k: Kernel, shapes: Shapes, record: Value, group: Value, heads: range) -> list[tuple[int, Value]]:
    """Products of some heads with 16 keys, one key per lane."""
    f, dim = k.f, shapes.index_dim
    sums = {head: f.var(f.const(_WORDS, 0)) for head in heads}
    keys_sum = f.var(f.const(_WORDS, 0))
    for c in f.range(dim, 0, 4):
        keys = f.load(_BYTES, group, c * GROUP_KEYS)
        if _unsigned_queries(k.isa):
            keys_sum.set(dot_int8(f, k.isa, keys_sum.get(), f.const(_BYTES, 1), keys))
        for head, total in sums.items():
            query = f.broadcast(_WORDS, record, c + head * dim).bits(_BYTES)
            total.set(dot_int8(f, k.isa, total.get(), query, keys))
    return [(head, total.get() - (keys_sum.get() << 7)) for head, total in sums.items()]


def emit_index_select(module: KernelModule, shapes: Shapes) -> None:
    """The kernel `index_select`: indices of the topk best entries, rising; words as in `SELECT`.

    Equal scores go to the lower index. Rows that see no more than topk entries get their count and no list.
    """
    with module.kernel("index_select", SELECT) as k:
        f = k.f
        for row in f.range(k.step("rows"), f["thread"], f["threads"]):
            visible = _visible(k, row)
            f.store(visible.min(shapes.topk), k.ptr("selected_count"), row * WORD)
            with f.when(visible > shapes.topk):
                scores = f.at(k.ptr("scores"), row * k.arg("scores_stride"))
                write_topk(f, scores, visible, shapes.topk, f.at(k.ptr("selected"), row * k.arg("selected_stride")))
