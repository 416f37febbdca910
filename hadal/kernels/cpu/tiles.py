"""The one inner product of all BF16 kernels: C[rows, 32] += A[rows, k] B[k, 32], block by block of 32 k.

A is row-major BF16; a block of B is two tiles of [16 pairs of k][16 columns][2]. With tile registers a block of C is
four of them; without, it is a few vectors and each pair of A is broadcast. Both walk k in the same order for every
number of rows, so a row's bits depend on nothing but its own values.
"""

from __future__ import annotations

from collections.abc import Callable

from hadal.kernels.cpu.ir import BF16, F32, I8, I16, I32, I64, Function, Operand, Value, vec
from hadal.kernels.cpu.target import Isa

TILE = 1024  # bytes of a full tile: 16 rows of 64 bytes
_VECTOR = vec(16, F32)


def configure(f: Function, isa: Isa, rows: Value | None = None) -> None:
    """Give this thread eight tiles; a kernel that multiplies begins with it and ends with `release`.

    All are full, or with `rows` of at most 16 those of A and C have so many.
    """
    if not isa.amx:
        return
    shape = f.scratch(64)
    f.store(f.const(vec(64, I8), [1] + 15 * [0] + 8 * [64, 0] + 16 * [0] + 8 * [16] + 8 * [0]), shape)
    if rows is not None:
        f.store(rows.trunc(I8).spread(4), shape, 48)
        f.store(rows.trunc(I8).spread(2), shape, 52)
    f.do("llvm.x86.ldtilecfg", shape)


def release(f: Function, isa: Isa) -> None:
    """Hand the tile registers back, so that a switch of threads need not save them."""
    if isa.amx:
        f.do("llvm.x86.tilerelease")


def row_blocks(isa: Isa) -> tuple[int, ...]:
    """Row counts for which a block of C is emitted, largest first; the last one serves any remainder."""
    return (32, 16) if isa.amx else tuple(n for n in (8, 4, 2, 1) if n <= isa.rows)


def multiply(
    f: Function,
    isa: Isa,
    rows: int,
    a: Value,
    a_stride: Operand,
    b: Callable[[Value], Value],
    blocks: Operand,
    out: Value,
    out_stride: Operand,
    ahead: Callable[[Value], None] | None = None,
) -> None:
    """C = A B over `blocks` blocks into FP32 `out`; strides in bytes.

    `b(i)` is the address of block i of B; `ahead(i)` is emitted before block i is used.

    With tile registers all 16 or 32 rows of A are read and all rows of `out` are written.
    """
    a_stride, out_stride = f.const(I64, a_stride), f.const(I64, out_stride)
    if isa.amx:
        _multiply_tiles(f, rows // 16, a, a_stride, b, blocks, out, out_stride, ahead)
    else:
        _multiply_vectors(f, isa, rows, a, a_stride, b, blocks, out, out_stride, ahead)


def _multiply_tiles(
    f: Function, high: int, a: Value, a_stride: Value, b: Callable[[Value], Value], blocks: Operand, out: Value,
    out_stride: Value, ahead: Callable[[Value], None] | None,
) -> None:  # fmt: skip
    tile = [f.const(I8, i) for i in range(8)]
    width = f.const(I64, 64)
    for c in range(2 * high):
        f.do("llvm.x86.tilezero", tile[c])
    for i in f.range(blocks):
        if ahead is not None:
            ahead(i)
        for r in range(high):
            f.do("llvm.x86.tileloadd64", tile[4 + r], f.at(a, i * 64 + a_stride * (16 * r)), a_stride)
        for c in range(2):
            f.do("llvm.x86.tileloadd64", tile[6 + c], f.at(b(i), TILE * c), width)
        for r in range(high):
            for c in range(2):
                f.do("llvm.x86.tdpbf16ps", tile[2 * r + c], tile[4 + r], tile[6 + c])
    for r in range(high):
        for c in range(2):
            f.do("llvm.x86.tilestored64", tile[2 * r + c], f.at(out, out_stride * (16 * r) + 64 * c), out_stride)


def _multiply_vectors(
    f: Function, isa: Isa, rows: int, a: Value, a_stride: Value, b: Callable[[Value], Value], blocks: Operand,
    out: Value, out_stride: Value, ahead: Callable[[Value], None] | None,
) -> None:  # fmt: skip
    sums = [[f.var(f.const(_VECTOR, 0)) for _ in range(2)] for _ in range(rows)]
    row = [f.at(a, a_stride * r) for r in range(rows)]
    for i in f.range(blocks):
        if ahead is not None:
            ahead(i)
        block = b(i)
        for pair in f.range(16):
            columns = [f.load(vec(16, I32), f.at(block, pair * 64), TILE * c) for c in range(2)]
            for r in range(rows):
                x = f.broadcast(vec(16, I32), row[r], i * 64 + pair * 4)
                for c in range(2):
                    sums[r][c].set(dot_bf16(f, isa, sums[r][c].get(), columns[c], x))
    for r in range(rows):
        for c in range(2):
            f.store(sums[r][c].get(), f.at(out, out_stride * r), 64 * c)


def dot_bf16(f: Function, isa: Isa, total: Value, a: Value, b: Value) -> Value:
    """total + a0 b0 + a1 b1 in each of 16 lanes, whose 32 bits hold a pair of BF16."""
    if isa.avx512:
        pairs = vec(32, BF16)
        return f.call(_VECTOR, "llvm.x86.avx512bf16.dpbf16ps.512", total, a.bits(pairs), b.bits(pairs))
    for half in (lambda v: v << 16, lambda v: v & -65536):
        total = f.fma(half(a).bits(_VECTOR), half(b).bits(_VECTOR), total)
    return total


def dot_int8(f: Function, isa: Isa, total: Value, a: Value, b: Value) -> Value:
    """total plus the product of four bytes in each of 16 lanes; `a` counts as unsigned where it is below 128 anyway."""
    kind = vec(16, I32)
    if isa.avx512:
        return f.call(kind, "llvm.x86.avx512.vpdpbusd.512", total, a, b)
    pairs = vec(32, I16)
    for part in (lambda v: (v.bits(pairs) << 8).sar(8), lambda v: v.bits(pairs).sar(8)):
        product = part(a).sext(vec(32, I32)) * part(b).sext(vec(32, I32))
        total = total + (product.pick(range(0, 32, 2)) + product.pick(range(1, 32, 2)))
    return total


def transpose_pairs(_: Function, rows: list[Value]) -> list[Value]:
    """A 16 x 16 square of 32-bit lanes, turned: result i holds lane i of every row."""
    step = 1
    while step < 16:
        turned = list(rows)
        for i in range(16):
            if i & step:
                continue
            a, b = rows[i], rows[i + step]
            low = [lane if not lane & step else 16 + (lane - step) for lane in range(16)]
            high = [lane + step if not lane & step else 16 + lane for lane in range(16)]
            turned[i], turned[i + step] = a.pick(low, b), a.pick(high, b)
        rows = turned
        step *= 2
    return rows
