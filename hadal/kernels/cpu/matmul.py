"""Matrix products on packed weights: y[m, n] = sum_k x[m, k] w[n, k], BF16 operands, FP32 sums.

A weight lies in panels of 32 output columns, a panel in blocks of 32 k. A block expands to the two B tiles of
`tiles.multiply`, 2,048 bytes:
  bf16  these tiles as they are
  fp8   the panel begins with four bytes per 128 k, an E8M0 byte for each tile and, for each, a bit per block that has
        a zero or a subnormal, padded to 64 bytes; a block is 1,024 E4M3 codes, 64 bytes for two pairs of k, byte
        2w + h being word w of pair h
  fp4   per tile 16 E8M0 bytes, one per column, then 4 x 64 bytes: nibble i of word (column, parity) of vector q is
        the code of k = 2 (4q + i) + parity
The expansion is exact: scales are powers of two. The first block of rows expands a panel into scratch while it
multiplies, the others find it there. Threads split panels, never k.

A job multiplies groups of rows, each by its own matrix of a stack: (matrix, first row, rows) for experts, one group
for a plain product, one per output group for `wo_a`.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from hadal.kernels.cpu.ir import F32, I1, I8, I16, I32, I64, Function, Value, vec
from hadal.kernels.cpu.numbers import round_bf16, silu
from hadal.kernels.cpu.program import Kernel, KernelModule
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.tiles import TILE, configure, multiply, release, row_blocks

Format = Literal["bf16", "fp8", "fp4"]
Epilogue = Literal["f32", "bf16", "swiglu"]
PANEL = BLOCK = 32
EXPANDED = 2 * TILE
BLOCK_BYTES = {"bf16": EXPANDED, "fp8": 1024, "fp4": 544}
GROUP_WORDS = 3
AHEAD = 2  # blocks that are expanded before they are used
RING = 4
FETCH_AHEAD = 4096  # bytes
CHUNK_BYTES = 1 << 20  # of rows that all panels are multiplied with before the next ones: they stay in the second cache
ROW_PADDING = 32  # rows that a product may write behind the last one it was asked for
JOB = (
    "weight weight_step rows row_stride row_step out out_stride out_step panels blocks groups "
    "scratch scratch_step mixing limit"
)

_BYTES, _WORDS, _VECTOR = vec(64, I8), vec(32, I16), vec(16, F32)
_LIFT = 0x3F00  # added to BF16 bits below 0x40c0 it stays clear of the sign
_E2M1_BF16 = [0x0000, 0x3F00, 0x3F80, 0x3FC0, 0x4000, 0x4040, 0x4080, 0x40C0]


def head_bytes(form: Format, blocks: int) -> int:
    """Bytes of a panel before its first block."""
    return -(-blocks // 64) * 64 if form == "fp8" else 0


def panel_bytes(form: Format, blocks: int) -> int:
    """Bytes of a panel."""
    return head_bytes(form, blocks) + blocks * BLOCK_BYTES[form]


def e4m3_words() -> np.ndarray:
    """BF16 bits of the 128 E4M3 codes without a sign; the code that means NaN is never used."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(exponent > 0, (1 + mantissa / 8) * 2.0 ** (exponent - 7), mantissa / 8 * 2.0**-6)
    words: np.ndarray = value.astype(np.float32).view(np.uint32) >> 16
    return words


class _Expander:
    """Emits the expansion of block i of a panel."""

    def __init__(self, f: Function, isa: Isa, form: Format, panel: Value, blocks: Value) -> None:
        self.f, self.isa, self.form, self.panel, self.blocks = f, isa, form, panel, blocks

    def block(self, i: Value, to: Value) -> None:
        """Expand block i into 2,048 bytes; one in BF16 is only fetched."""
        f, start = self.f, i * BLOCK_BYTES[self.form]
        place = f.at(self.panel, start + _head(self.blocks) if self.form == "fp8" else start)
        for line in range(0, BLOCK_BYTES[self.form], 64):  # the hardware's own prefetcher stops at every page
            f.prefetch(place, FETCH_AHEAD + line)
        if self.form == "bf16":
            return
        if self.form == "fp4":
            self._fp4(place, to)
        else:
            for tile in range(2):
                head = f.at(self.panel, (i >> 2) * 4 + tile)
                special = ((f.load(I8, head, 2).zext(I64) >> (i & 3)) & 1).differs(0)
                self._fp8(head, special, f.at(place, 512 * tile), f.at(to, TILE * tile))

    def _fp4(self, place: Value, to: Value) -> None:
        f = self.f
        for tile in range(2):
            at = f.at(place, tile * 272)
            # A value's bits are lifted by _LIFT in the table and lowered by (_LIFT - scale) here; the subtraction stops
            # at 0, which is where the lifted bits of zero begin.
            scale = (f.load(vec(16, I8), at).zext(vec(16, I16)) - 127) << 7
            lower = (f.const(vec(16, I16), _LIFT) - scale).pick([i // 2 for i in range(32)])
            for q in range(4):
                codes = f.load(_WORDS, at, 16 + 64 * q)
                for i in range(4):
                    value = f.call(_WORDS, "llvm.usub.sat.v32i16", self._e2m1(codes >> (4 * i)), lower)
                    f.store(value, to, TILE * tile + 64 * (4 * q + i))

    def _e2m1(self, codes: Value) -> Value:
        """Lifted BF16 words of the E2M1 codes in the low nibbles, 0 for both zeros."""
        f = self.f
        if self.isa.avx512:
            words = [w + _LIFT if w else 0 for w in _E2M1_BF16]
            table = f.const(_WORDS, (words + [w + 0x8000 if w else 0 for w in words]) * 2)
            return f.call(_WORDS, "llvm.x86.avx512.permvar.hi.512", table, codes)
        magnitude, sign = codes & 7, (codes & 8) << 12
        normal = (magnitude << 6) + ((126 << 7) + _LIFT)
        half = magnitude.equals(1).choose(f.const(_WORDS, (126 << 7) + _LIFT), normal)
        return magnitude.equals(0).choose(f.const(_WORDS, 0), half | sign)

    def _fp8(self, head: Value, special: Value, codes: Value, to: Value) -> None:
        """A tile: without zeros and subnormals a code's bits need only be moved and their exponent raised."""
        f = self.f
        if not self.isa.avx512:
            return self._fp8_wide(head, codes, to)
        scale = (f.load(I8, head).zext(I16) - 127) << 7
        with f.when(special):
            self._fp8_lookup(scale.spread(64), codes, to)
        with f.when(special.equals(0)):
            bias = (scale + (120 << 7)).spread(32)
            for part in range(8):
                pairs = f.load(_WORDS, codes, 64 * part)
                for half, words in enumerate((pairs << 8, pairs)):
                    f.store((words.sar(4) & -0x7810) + bias, to, 128 * part + 64 * half)

    def _fp8_lookup(self, scale: Value, codes: Value, to: Value) -> None:
        """All codes by two look-ups, of the low and of the high byte, in tables with the scale folded in."""
        f, wide, words = self.f, vec(64, I16), e4m3_words()
        tables = []
        for half in (words[:64], words[64:]):
            keep = f.const(wide, [-1 if w else 0 for w in half])
            tables.append(f.const(wide, [int(w) for w in half]) + (scale & keep))
        for part in range(8):
            given = f.load(_BYTES, codes, 64 * part)
            low, high = (
                f.call(_BYTES, "llvm.x86.avx512.vpermi2var.qi.512", t[0], given, t[1]).bits(_WORDS)
                for t in ([table.trunc(_BYTES) for table in tables], [(table >> 8).trunc(_BYTES) for table in tables])
            )
            high = high | (given.bits(_WORDS) & -0x7F80)
            f.store((low & 0xFF) | (high << 8), to, 128 * part)
            f.store((low >> 8) | (high & -0x100), to, 128 * part + 64)

    def _fp8_wide(self, head: Value, codes: Value, to: Value) -> None:
        """As FP32: the code's bits moved into place are the value times 2^-120, subnormals included."""
        f, wide = self.f, vec(16, I32)
        factor = (f.load(I8, head).zext(I32) << 23).bits(F32).spread(16)
        for part in range(8):
            pairs = f.load(_WORDS, codes, 64 * part)
            for half, words in enumerate((pairs & 0xFF, pairs >> 8)):
                for side in range(2):
                    code = words.pick(range(16 * side, 16 * side + 16)).zext(wide)
                    value = ((code & 0x7F) << 20).bits(_VECTOR) * 2.0**120 * factor
                    bits = value.bits(wide) | ((code & 0x80) << 24)
                    f.store((bits >> 16).trunc(vec(16, I16)), to, 128 * part + 64 * half + 32 * side)


def emit_products(module: KernelModule, form: Format, epilogue: Epilogue) -> None:
    """The kernel `product_<form>_<epilogue>`: all groups of a job; words as in `JOB`."""
    with module.kernel(f"product_{form}_{epilogue}", JOB) as k:
        f = k.f
        panels, blocks = k.arg("panels"), k.arg("blocks")
        count = f.load(I64, k.ptr("groups"))
        scratch = f.at(k.ptr("scratch"), k.arg("scratch_step") * f["thread"])
        most = f.var(f.const(I64, 0))
        for i in f.range(count):
            most.set(most.get().max(f.load(I64, k.ptr("groups"), i * (8 * GROUP_WORDS) + 8 * GROUP_WORDS)))
        tall = most.get().min(16).max(1)
        configure(f, k.isa, tall)
        chunk = (f.const(I64, CHUNK_BYTES) / k.arg("row_stride") & -ROW_PADDING).max(ROW_PADDING)
        for begin in f.range(most.get(), 0, chunk):
            for unit in k.share(count * panels):
                group = f.at(k.ptr("groups"), unit / panels * (8 * GROUP_WORDS) + 8)
                matrix, first, rows = (f.load(I64, group, 8 * i) for i in range(3))
                panel, here = unit % panels, first + begin
                weight = f.at(k.ptr("weight"), matrix * k.arg("weight_step") + panel * _panel_size(blocks, form))
                a = f.at(k.ptr("rows"), here * k.arg("row_stride") + matrix * k.arg("row_step"))
                left = (rows - begin).min(chunk)
                with f.when(left > 0):
                    _panel(k, form, epilogue, weight, a, here, left, panel, blocks, scratch, matrix, tall)
        release(f, k.isa)


def _head(blocks: Value) -> Value:
    return (blocks + 63) & -64


def _panel_size(blocks: Value, form: Format) -> Value:
    body = blocks * BLOCK_BYTES[form]
    return body + _head(blocks) if form == "fp8" else body


def _panel(
    k: Kernel, form: Format, epilogue: Epilogue, weight: Value, a: Value, first: Value, rows: Value, panel: Value,
    blocks: Value, scratch: Value, matrix: Value, tall: Value,
) -> None:  # fmt: skip
    """All rows of a group by one panel, in blocks of rows; the first one expands the panel. Tiles have `tall` rows."""
    f, isa = k.f, k.isa
    sizes = row_blocks(isa)
    stride = k.arg("row_stride")
    out_stride = k.arg("out_stride")
    width = {"f32": 128, "bf16": 64, "swiglu": 32}[epilogue]
    out = f.at(k.ptr("out"), first * out_stride + panel * width + matrix * k.arg("out_step"))
    done = f.var(f.const(I64, 0))
    square = f.scratch(ROW_PADDING * 128)

    def rows_block(size: int, expander: _Expander | None) -> None:
        here = f.at(out, done.get() * out_stride)
        ahead = None
        # One block of rows needs each expanded block once, so a few places in turn, which stay in the first cache, do.
        turns = expander is not None and form != "bf16"
        mask = (rows > size).choose(f.const(I64, -1), RING - 1) if turns else f.const(I64, -1)

        def place(i: Value) -> Value:
            return f.at(weight if form == "bf16" else scratch, (i & mask) * EXPANDED)

        if expander is not None:
            for i in range(AHEAD):
                first_blocks = f.const(I64, i).min(blocks - 1)
                expander.block(first_blocks, place(first_blocks))

            def ahead(i: Value) -> None:
                with f.when(i + AHEAD < blocks):
                    expander.block(i + AHEAD, place(i + AHEAD))

        valid = (rows - done.get()).min(size)
        # Tiles are as high as the largest group, up to 16: what they hold beyond a smaller one is not stored.
        whole = tall if isa.amx and size == 16 else f.const(I64, size)
        direct = valid.equals(whole) if epilogue == "f32" else f.const(I1, 0)
        target, target_stride = direct.choose(here, square), direct.choose(out_stride, f.const(I64, 128))
        a_stride = valid.equals(1).choose(f.const(I64, 0), stride)
        multiply(f, isa, size, f.at(a, done.get() * stride), a_stride, place, blocks, target, target_stride, ahead)
        with f.when(direct.equals(0)):
            finish_rows(k, epilogue, square, valid, here, out_stride, first + done.get())
        done.set(done.get() + size)

    for fresh in (True, False):
        for position, size in enumerate(sizes):
            left = rows - done.get()
            last = position == len(sizes) - 1
            fits = left > 0 if last else (left > size - 1 if not isa.amx else left > 16)
            if fresh:
                with f.when(fits if position == 0 else fits & done.get().equals(0)):
                    rows_block(size, _Expander(f, isa, form, weight, blocks))
            else:
                for loop in f.repeat_while():
                    left = rows - done.get()
                    loop.leave_unless(left > 0 if last else (left > size - 1 if not isa.amx else left > 16))
                    rows_block(size, None)


def finish_rows(
    k: Kernel, epilogue: Epilogue, square: Value, rows: Value, out: Value, out_stride: Value, first: Value
) -> None:
    """Rows of a finished block [rows, 32] as they are, in BF16, or gate and up columns as one clamped SwiGLU."""
    f = k.f
    for r in f.range(rows):
        left, right = (f.load(_VECTOR, square, r * 128 + 64 * c) for c in range(2))
        here = f.at(out, r * out_stride)
        if epilogue == "f32":
            f.store(left, here)
            f.store(right, here, 64)
        elif epilogue == "bf16":
            f.store(round_bf16(f, left), here)
            f.store(round_bf16(f, right), here, 32)
        else:
            limit = k.real("limit")
            gate = left.min(limit.spread(16))
            up = right.min(limit.spread(16)).max((-limit).spread(16))
            weight = f.load(F32, k.ptr("mixing"), (first + r) * 4).spread(16)
            f.store(round_bf16(f, silu(f, gate) * up * weight), here)
