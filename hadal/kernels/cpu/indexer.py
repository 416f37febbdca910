"""Lightning indexer of `fast`: int8 queries against the key groups of all pages, then the exact top-k of each row.

  query record   [P][Di] int8 codes of the P heads (padded to 16), then P FP32 factors, 0 for padded heads; with
                 `vpdpbusd` the codes are stored with 128 added, and the keys' sums times 128 are taken off again

score[j] = scale[j] sum_h factor[h] relu(q[h] . k[j]): the products are exact integers, the heads are added in one order
everywhere, so every instruction set gives the same scores. Rows that see no more entries than the indexer keeps need
neither scores nor a choice. Source: report 2.3, spec architecture 2.6.
"""

from __future__ import annotations

from hadal.kernels.cpu.compress import GROUP_KEYS, int8_codes, int8_scale, rotary_lanes, rotate_pairs
from hadal.kernels.cpu.ir import F32, I8, I32, I64, PTR, Function, Value, vec
from hadal.kernels.cpu.layout import HEADS, Shapes
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.tiles import dot_int8
from hadal.kernels.cpu.topk import write_topk
from hadal.kernels.pages import PAGE_TOKENS

# q [heads * Di] and weights [heads]: FP32 rows; out: query records; regime: 0 plain angles, 1 scaled ones.
QUERY = "q q_stride weights weights_stride out out_stride regime"
# keys: bytes into a page; scores: FP32 rows with room for the visible entries, rounded up to 64.
SCORE = "queries query_stride keys ratio scores scores_stride"
# selected: int32 rows with room for topk + 16; selected_count: one int64 per row. The scores are overwritten.
SELECT = "ratio scores scores_stride selected selected_stride selected_count"
CHUNK_PAGES = 32  # pages of keys that a unit of work scores
AHEAD = 4  # pages that are fetched before they are used

_CHAINS = 4  # sums of heads that run side by side
_TILE_GROUPS = 4  # groups of heads whose products are held in tile registers
_VECTOR, _WORDS, _BYTES = vec(16, F32), vec(16, I32), vec(64, I8)


def padded_heads(shapes: Shapes) -> int:
    """Heads of a query record."""
    return -(-shapes.index_heads // HEADS) * HEADS


def record_bytes(shapes: Shapes) -> int:
    """Bytes of a query record."""
    return padded_heads(shapes) * (shapes.index_dim + 4)


def emit_index_query(module: KernelModule, shapes: Shapes) -> None:
    """The kernel `index_query`: rotated, quantised heads and their factors; words as in `QUERY`."""
    dim, rotary, padded = shapes.index_dim, shapes.rotary, padded_heads(shapes)
    offset = 128 if _unsigned_queries(module.isa) else 0
    constant = dim**-0.5 * shapes.index_heads**-0.5
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
                scale, inverse = int8_scale(f, space, dim)
                for c in f.range(dim, 0, 16):
                    f.store(int8_codes(f, f.load(_VECTOR, space, c * 4), inverse) + offset, codes, c)
                weight = f.load(F32, k.ptr("weights"), row * k.arg("weights_stride") + head * 4)
                f.store(weight * constant * scale, factor)


def emit_index_score(module: KernelModule, shapes: Shapes) -> None:
    """The kernel `index_score`: scores of all visible entries of rows that see more than topk; words as in `SCORE`."""
    with module.kernel("index_score", SCORE) as k:
        f = k.f
        _configure(k, shapes)
        page_keys = PAGE_TOKENS / k.arg("ratio")
        square = f.scratch(padded_heads(shapes) * 64)
        longest = f.var(f.const(I64, 0))
        for span in f.range(k.step("spans")):
            longest.set(longest.get().max(k.span(span, "start") + k.span(span, "length")))
        chunks = longest.get() / (PAGE_TOKENS * CHUNK_PAGES) + 1
        rows = k.step("rows")
        # A chunk of keys stays in the cache for all rows; threads take alternate rows of it, or alternate chunks.
        for unit in f.range(rows * chunks, f["thread"], f["threads"]):
            row, first = unit % rows, unit / rows * CHUNK_PAGES
            visible = _visible(k, row)
            pages = (visible + page_keys - 1) / page_keys
            last = (visible > shapes.topk).choose(pages.min(first + CHUNK_PAGES), f.const(I64, 0))
            table = f.pointer(k.span(k.row("span_of", row), "pages"))
            record = f.at(k.ptr("queries"), row * k.arg("query_stride"))
            scores = f.at(k.ptr("scores"), row * k.arg("scores_stride"))
            for page in f.range(last, first):
                here = f.at(f.load(PTR, table, page * WORD), k.arg("keys"))
                later = f.at(f.load(PTR, table, (page + AHEAD).min(pages - 1) * WORD), k.arg("keys"))
                for group in f.range(page_keys / GROUP_KEYS):
                    now, next_up = (f.at(place, group * shapes.group_bytes) for place in (here, later))
                    to = f.at(scores, (page * page_keys + group * GROUP_KEYS) * 4)
                    _score_group(k, shapes, record, now, next_up, square, to)
        if k.isa.amx:
            f.do("llvm.x86.tilerelease")


def _visible(k: Kernel, row: Value) -> Value:
    return (k.row("positions", row) + 1) / k.arg("ratio")


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


def _score_group(
    k: Kernel, shapes: Shapes, record: Value, group: Value, later: Value, square: Value, to: Value
) -> None:
    """Scores of 16 keys; `later` is the group to fetch meanwhile, a line now and then so that no load waits for it."""
    f, heads = k.f, shapes.index_heads
    factors = f.at(record, padded_heads(shapes) * shapes.index_dim)
    sums = [f.const(_VECTOR, 0) for _ in range(_CHAINS)]
    lines = shapes.group_bytes // 64

    def add(head: int, dots: Value) -> None:
        for line in range(head * lines // heads, (head + 1) * lines // heads):
            f.prefetch(later, line * 64)
        positive = dots.max(0).to_float(_VECTOR)
        sums[head % _CHAINS] = f.fma(positive, f.broadcast(_VECTOR, factors, head * 4), sums[head % _CHAINS])

    if k.isa.amx:
        _multiply_tiles(f, shapes, record, group, square)
        for head in range(heads):
            add(head, f.load(_WORDS, square, head * 64))
    else:
        together = 16 if k.isa.avx512 else 4
        for first in range(0, heads, together):
            for head, dots in _multiply_vectors(k, shapes, record, group, range(first, min(first + together, heads))):
                add(head, dots)
    total = (sums[0] + sums[1]) + (sums[2] + sums[3])
    # adding 0 makes -0 a plain 0, so that equal scores have equal bits
    f.store(total * f.load(_VECTOR, group, GROUP_KEYS * shapes.index_dim) + 0.0, to)


def _multiply_tiles(f: Function, shapes: Shapes, record: Value, group: Value, square: Value) -> None:
    """Products [P][16 keys] of all heads, into memory."""
    dim, step = shapes.index_dim, _tile_step(shapes)
    stride, line, tile = f.const(I64, dim), f.const(I64, 64), [f.const(I8, i) for i in range(8)]
    groups = padded_heads(shapes) // HEADS
    for first in range(0, groups, _TILE_GROUPS):
        members = range(min(_TILE_GROUPS, groups - first))
        for m in members:
            f.do("llvm.x86.tilezero", tile[m])
        for c in range(0, dim, step):
            keys = tile[6 + c // step % 2]
            f.do("llvm.x86.tileloadd64", keys, f.at(group, c * GROUP_KEYS), line)
            for m in members:
                queries = tile[4 + m % 2]
                f.do("llvm.x86.tileloadd64", queries, f.at(record, (first + m) * HEADS * dim + c), stride)
                f.do("llvm.x86.tdpbssd", tile[m], queries, keys)
        for m in members:
            f.do("llvm.x86.tilestored64", tile[m], f.at(square, (first + m) * HEADS * 64), line)


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
