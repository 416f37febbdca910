"""Products of FP4 weights with int8 activations, for processors whose integer dot products beat their BF16 ones.

Activations are rounded to int8 with one scale per 128 columns; what follows is exact but for FP32 sums. A record holds
128 columns of a row: 128 codes, in the order of the packed weights' nibbles (per 8 columns 0 4 1 5 2 6 3 7),
4 int32 corrections, one per 32 columns, and half the scale. A weight v is used as the unsigned byte 2v + 12, which the
correction of -12 times the codes' sum takes off again; the integer product of a block of 32 is exact, and

  part = fma(block product, weight scale, part) over the four blocks; sum = fma(part, activation scale, sum)

is the order for every number of rows. Source: spec cpu-kernels 2 and 8.
"""

from __future__ import annotations

from collections.abc import Sequence

from hadal.kernels.cpu.ir import F32, I8, I16, I32, I64, Function, Value, Variable, lanes, vec
from hadal.kernels.cpu.matmul import BLOCK_BYTES, FETCH_AHEAD, GROUP_WORDS, JOB, PANEL, Epilogue, finish_rows
from hadal.kernels.cpu.numbers import largest, widen_bf16
from hadal.kernels.cpu.program import Kernel, KernelModule
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.tiles import dot_int8

QUANTISE = "rows row_stride out out_stride blocks groups"
RECORD = 160
GROUP = 128  # columns per activation scale
_BYTES, _VECTOR, _WORDS = vec(64, I8), vec(16, F32), vec(16, I32)
_DOUBLED = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def record_bytes(columns: int) -> int:
    """Bytes of a row of records."""
    return -(-columns // GROUP) * RECORD


def emit_quantise(module: KernelModule) -> None:
    """BF16 rows of all groups to records; words as in `QUANTISE`."""
    with module.kernel("quantise", QUANTISE) as k:
        f = k.f
        chunks = k.arg("blocks") * 2
        records = (k.arg("blocks") + 3) / 4
        for group in f.range(f.load(I64, k.ptr("groups"))):
            words = f.at(k.ptr("groups"), group * (8 * GROUP_WORDS) + 8)
            first = f.load(I64, words, 8)
            for unit in k.share(f.load(I64, words, 16) * records):
                row, record = first + unit / records, unit % records
                source = f.at(k.ptr("rows"), row * k.arg("row_stride") + record * (2 * GROUP))
                to = f.at(k.ptr("out"), row * k.arg("out_stride") + record * RECORD)
                values = []
                for c in range(GROUP // 16):
                    value = widen_bf16(f, f.load(vec(16, I16), source, 32 * c))
                    values.append((record * (GROUP // 16) + c < chunks).choose(value, f.const(_VECTOR, 0)))
                _record(f, values, to)


def _record(f: Function, values: Sequence[Value], to: Value) -> None:
    amax = largest(f, values).max(1e-12)
    factor = (f.const(F32, 127) / amax).spread(16)
    f.store(amax * (1 / 254), to, GROUP + 16)
    codes = [f.unary("rint", value * factor).to_int(_WORDS) for value in values]
    for c, code in enumerate(codes):
        order = [8 * half + i for half in range(2) for i in _ORDER]
        f.store(code.trunc(vec(16, I8)).pick(order), to, 16 * c)
    for b in range(4):
        total = (codes[2 * b] + codes[2 * b + 1]).reduce("add")
        f.store(total * -12, to, GROUP + 4 * b)


def row_blocks(isa: Isa) -> tuple[int, ...]:
    """Row counts for which a block is emitted."""
    return (4, 2, 1) if isa.avx512 else (1,)


def emit_products_int8(module: KernelModule, epilogue: Epilogue) -> None:
    """The kernel `product_int8_<epilogue>`: as `matmul.emit_products` for FP4 weights, on rows of records."""
    with module.kernel(f"product_int8_{epilogue}", JOB) as k:
        f = k.f
        panels, blocks = k.arg("panels"), k.arg("blocks")
        square = f.scratch(PANEL * 4 * 4)
        width = {"f32": 128, "bf16": 64, "swiglu": 32}[epilogue]
        for unit in k.share(f.load(I64, k.ptr("groups")) * panels):
            group = f.at(k.ptr("groups"), unit / panels * (8 * GROUP_WORDS) + 8)
            matrix, first, rows = (f.load(I64, group, 8 * i) for i in range(3))
            panel = unit % panels
            weight = f.at(k.ptr("weight"), matrix * k.arg("weight_step") + panel * blocks * BLOCK_BYTES["fp4"])
            source = f.at(k.ptr("rows"), first * k.arg("row_stride"))
            out = f.at(k.ptr("out"), first * k.arg("out_stride") + panel * width)
            done = f.var(f.const(I64, 0))
            for size in row_blocks(k.isa):
                for loop in f.repeat_while():
                    loop.leave_unless(rows - done.get() >= size)
                    here = [f.at(source, (done.get() + r) * k.arg("row_stride")) for r in range(size)]
                    _block(k, here, weight, blocks, square)
                    stride = k.arg("out_stride")
                    target = f.at(out, done.get() * stride)
                    finish_rows(k, epilogue, square, f.const(I64, size), target, stride, first + done.get())
                    done.set(done.get() + size)


def _block(k: Kernel, rows: Sequence[Value], weight: Value, blocks: Value, square: Value) -> None:
    """square[r, 32 columns] = rows x panel."""
    f = k.f
    sums = [[f.var(f.const(_VECTOR, 0)) for _ in range(2)] for _ in rows]
    for record in f.range((blocks + 3) / 4):
        here = [f.at(row, record * RECORD) for row in rows]
        parts = [[f.var(f.const(_VECTOR, 0)) for _ in range(2)] for _ in rows]
        for b in f.range((blocks - record * 4).min(4)):
            place = f.at(weight, (record * 4 + b) * BLOCK_BYTES["fp4"])
            for line in range(0, BLOCK_BYTES["fp4"], 64):
                f.prefetch(place, FETCH_AHEAD + line)
            _dot_block(k, here, place, b, parts)
        for r, row in enumerate(here):
            scale = f.broadcast(_VECTOR, row, GROUP + 16)
            for tile in range(2):
                sums[r][tile].set(f.fma(parts[r][tile].get(), scale, sums[r][tile].get()))
    for r in range(len(rows)):
        for tile in range(2):
            f.store(sums[r][tile].get(), square, 128 * r + 64 * tile)


def _dot_block(k: Kernel, rows: Sequence[Value], place: Value, b: Value, parts: list[list[Variable]]) -> None:
    """One block of 32 columns: the exact integer product, scaled into the parts."""
    f = k.f
    for tile in range(2):
        at = f.at(place, 272 * tile)
        totals = [f.broadcast(_WORDS, row, b * 4 + GROUP) for row in rows]
        for q in range(4):
            codes = f.load(_BYTES, at, 16 + 64 * q)
            for half, nibbles in enumerate((codes & 15, codes >> 4)):
                weights = _lookup(f, k.isa, nibbles)
                for r, row in enumerate(rows):
                    activation = f.broadcast(_WORDS, row, b * 32 + (8 * q + 4 * half)).bits(_BYTES)
                    totals[r] = dot_int8(f, k.isa, totals[r], weights, activation)
        scale = (f.load(vec(16, I8), at).zext(_WORDS) << 23).bits(_VECTOR)
        for r, total in enumerate(totals):
            parts[r][tile].set(f.fma(total.to_float(_VECTOR), scale, parts[r][tile].get()))


def _lookup(f: Function, isa: Isa, nibbles: Value) -> Value:
    """2v + 12 of the E2M1 codes in 64 bytes."""
    table = [v + 12 for v in _DOUBLED]
    name, width = {
        "amx": ("llvm.x86.avx512.pshuf.b.512", 64),
        "avx512": ("llvm.x86.avx512.pshuf.b.512", 64),
        "avx2": ("llvm.x86.avx2.pshuf.b", 32),
        "neon": ("llvm.aarch64.neon.tbl1.v16i8", 16),
    }[isa.name]
    kind = vec(width, I8)
    parts = []
    for begin in range(0, 64, width):
        part = nibbles if width == 64 else nibbles.pick(range(begin, begin + width))
        parts.append(f.call(kind, name, f.const(kind, table * (width // 16)), part))
    while len(parts) > 1:
        parts = [a.pick(range(2 * lanes(a.kind)), b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]
