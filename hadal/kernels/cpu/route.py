"""Routing: affinities, the choice of experts, and the grouping of rows by expert for the grouped products.

Legend: E experts, K experts per row. A slot is a row of the grouped buffers; every expert's slots begin at a multiple
of 16, because a tile register holds 16 rows. Source: spec architecture 3.
"""

from __future__ import annotations

from hadal.kernels.cpu.ir import F32, I32, I64, Function, Value, vec
from hadal.kernels.cpu.layout import Shapes
from hadal.kernels.cpu.numbers import softplus
from hadal.kernels.cpu.program import WORD, KernelModule

ROUTE = "logits logits_stride bias table ids weights scale"
GROUP = "ids groups slots"
GATHER = "slots weights rows row_stride out out_stride mixing lines"
SLOT_STEP = 16
_V, _I = vec(16, F32), vec(16, I32)


def grouped_rows(rows: int, experts: int, active: int) -> int:
    """Slots that `rows` rows can need."""
    return rows * active + min(experts, rows * active) * (SLOT_STEP - 1) + SLOT_STEP


def emit_route(module: KernelModule, shapes: Shapes) -> None:
    """K expert ids per row in ascending order, and their weights; `table` (token id -> ids) is 0 in learned layers."""
    experts, active = shapes.experts, shapes.active
    chunks = -(-experts // 16)
    with module.kernel("route", ROUTE) as k:
        f = k.f
        affinity, biased = f.scratch(chunks * 64), f.scratch(chunks * 64)
        chosen = f.scratch(active * WORD)
        for row in k.share(k.step("rows")):
            logits = f.at(k.ptr("logits"), row * k.arg("logits_stride"))
            for c in f.range(chunks):
                soft = softplus(f, f.load(_V, logits, c * 64)).max(1e-30)
                f.store(f.unary("sqrt", soft), affinity, c * 64)
            by_hash = k.arg("table").differs(0)
            with f.when(by_hash):
                source = f.at(k.ptr("table"), k.row("ids", row) * (active * WORD))
                for i in range(active):
                    f.store(f.load(I64, source, WORD * i), chosen, WORD * i)
            with f.when(by_hash.equals(0)):
                lane = f.const(_I, list(range(16)))
                for c in f.range(chunks):
                    score = f.load(_V, affinity, c * 64) + f.load(_V, k.ptr("bias"), c * 64)
                    score = score.max(float("-inf"))  # a NaN is chosen last
                    real = (lane + (c * 16).trunc(I32).spread(16)) < experts
                    f.store(real.choose(score, f.const(_V, float("-inf"))), biased, c * 64)
                for i in range(active):
                    best = _argmax(f, biased, chunks)
                    f.store(best, chosen, WORD * i)
                    f.store(f.const(F32, float("-inf")), biased, best * 4)
            ids = [f.load(I64, chosen, WORD * i) for i in range(active)]
            for end in range(active - 1, 0, -1):  # ascending: outputs are added in the experts' order
                for i in range(end):
                    swap = ids[i] > ids[i + 1]
                    ids[i], ids[i + 1] = swap.choose(ids[i + 1], ids[i]), swap.choose(ids[i], ids[i + 1])
            values = [f.load(F32, affinity, i * 4) for i in ids]
            total = values[0]
            for value in values[1:]:
                total = total + value
            scale = k.real("scale")
            for i, (expert, value) in enumerate(zip(ids, values, strict=True)):
                f.store(expert, k.ptr("ids"), (row * active + i) * WORD)
                f.store(value / total * scale, k.ptr("weights"), (row * active + i) * 4)


def _argmax(f: Function, values: Value, chunks: int) -> Value:
    """Index of the largest of 16 * chunks floats; the lower index wins a tie."""
    best, where = f.var(f.load(_V, values)), f.var(f.const(_I, 0))
    for c in f.range(chunks, 1):
        value = f.load(_V, values, c * 64)
        above = value > best.get()
        best.set(above.choose(value, best.get()))
        where.set(above.choose(c.trunc(I32).spread(16), where.get()))
    top = best.get().reduce("max")
    index = (where.get() << 4) + f.const(_I, list(range(16)))
    largest = f.const(_I, 0x7FFFFFFF)
    found = best.get().equals(top.spread(16)).choose(index, largest).reduce("min").sext(I64)
    return found.min(16 * chunks - 1)


def emit_group(module: KernelModule, shapes: Shapes) -> None:
    """Groups of one matrix each for the products, and every (row, choice)'s slot; the first thread does it alone."""
    experts, active = shapes.experts, shapes.active
    with module.kernel("group", GROUP) as k:
        f = k.f
        counts = f.scratch(experts * WORD)
        with f.when(f["thread"].equals(0)):
            for e in f.range(experts):
                f.store(f.const(I64, 0), counts, e * WORD)
            total = k.step("rows") * active
            for i in f.range(total):
                expert = f.load(I64, k.ptr("ids"), i * WORD)
                f.store(f.load(I64, counts, expert * WORD) + 1, counts, expert * WORD)
            groups, found, first = k.ptr("groups"), f.var(f.const(I64, 0)), f.var(f.const(I64, 0))
            for e in f.range(experts):
                count = f.load(I64, counts, e * WORD)
                f.store(first.get(), counts, e * WORD)
                with f.when(count > 0):
                    group = f.at(groups, found.get() * (3 * WORD) + WORD)
                    for j, word in enumerate((e, first.get(), count)):
                        f.store(word, group, WORD * j)
                    found.set(found.get() + 1)
                    first.set(first.get() + ((count + (SLOT_STEP - 1)) & -SLOT_STEP))
            f.store(found.get(), groups)
            for i in f.range(total):
                expert = f.load(I64, k.ptr("ids"), i * WORD)
                slot = f.load(I64, counts, expert * WORD)
                f.store(slot, k.ptr("slots"), i * WORD)
                f.store(slot + 1, counts, expert * WORD)


def emit_gather(module: KernelModule, shapes: Shapes) -> None:
    """Copy every row to its slots, with the weight that its expert's hidden values are multiplied by."""
    with module.kernel("gather", GATHER) as k:
        f = k.f
        for i in k.share(k.step("rows") * shapes.active):
            slot = f.load(I64, k.ptr("slots"), i * WORD)
            f.store(f.load(F32, k.ptr("weights"), i * 4), k.ptr("mixing"), slot * 4)
            source = f.at(k.ptr("rows"), i / shapes.active * k.arg("row_stride"))
            target = f.at(k.ptr("out"), slot * k.arg("out_stride"))
            for c in f.range(k.arg("lines")):
                f.store(f.load(_I, source, c * 64), target, c * 64)
