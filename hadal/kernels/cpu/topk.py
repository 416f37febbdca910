"""Exact top-k of one row of scores: their bits as integers of the same order, bisected until k of them remain.

A pass over the scores counts those above a bound; between the smallest and the largest score it takes one pass per bit
in which they differ, less once a bound cuts off exactly k. Equal scores go to the lower index.
"""

from __future__ import annotations

from hadal.kernels.cpu.ir import I1, I16, I32, I64, Function, Value, vec

_WORDS = vec(16, I32)
_UNROLL = 4
SMALLEST, LARGEST = -(2**31), 2**31 - 1


def write_topk(f: Function, scores: Value, count: Value, topk: int, to: Value) -> None:
    """Write the rising int32 indices of the topk best of `count` FP32 scores, count > topk.

    The scores are overwritten; both buffers are used in whole vectors: 64 scores, 16 indices past the last.
    """
    low, high = _order(f, scores, count)
    floor, room = _bisect(f, scores, count, low, high, topk)
    _collect(f, scores, floor, room, topk, to)


def _order(f: Function, scores: Value, count: Value) -> tuple[Value, Value]:
    """Turn scores into integers of the same order, and find the smallest and largest; what follows becomes smallest."""
    low, high = f.var(f.const(_WORDS, LARGEST)), f.var(f.const(_WORDS, SMALLEST))
    lane = f.const(_WORDS, list(range(16)))
    for i in f.range((count + 63) & -64, 0, 16):
        bits = f.load(_WORDS, scores, i * 4)
        valid = lane < (count - i).min(16).trunc(I32).spread(16)
        value = bits ^ (bits.sar(31) & 0x7FFFFFFF)
        low.set(low.get().min(valid.choose(value, LARGEST)))
        value = valid.choose(value, SMALLEST)
        high.set(high.get().max(value))
        f.store(value, scores, i * 4)
    return low.get().reduce("min").sext(I64), high.get().reduce("max").sext(I64)


def _bisect(f: Function, scores: Value, count: Value, low: Value, high: Value, topk: int) -> tuple[Value, Value]:
    """The value that topk scores reach, and how many of those that equal it are chosen."""
    bottom, top, above = f.var(low), f.var(high + 1), f.var(f.const(I64, 0))
    for loop in f.repeat_while():
        loop.leave_unless(top.get() - bottom.get() > 1)
        middle = (bottom.get() + top.get()).sar(1)
        reached = _count_from(f, scores, count, middle)
        enough, exact = reached >= topk, reached.equals(topk)
        bottom.set(enough.choose(middle, bottom.get()))
        top.set(enough.choose(exact.choose(middle + 1, top.get()), middle))
        above.set(enough.choose(above.get(), reached))
    return bottom.get(), topk - above.get()


def _count_from(f: Function, scores: Value, count: Value, least: Value) -> Value:
    """How many scores are at least `least`."""
    bound = least.trunc(I32).spread(16)
    sums = [f.var(f.const(_WORDS, 0)) for _ in range(_UNROLL)]
    for i in f.range(count * 4, 0, 64 * _UNROLL):
        for part, total in enumerate(sums):
            reached = f.load(_WORDS, f.at(scores, i), 64 * part) >= bound
            total.set(total.get() - reached.sext(_WORDS))
    values = [total.get() for total in sums]
    return ((values[0] + values[1]) + (values[2] + values[3])).reduce("add").zext(I64)


def _collect(f: Function, scores: Value, floor: Value, room: Value, topk: int, to: Value) -> None:
    """Write the indices of the scores above `floor` and of the first `room` that equal it."""
    bound = floor.trunc(I32).spread(16)
    place, written, left = f.var(f.const(I64, 0)), f.var(f.const(I64, 0)), f.var(room)
    for loop in f.repeat_while():
        i = place.get()
        loop.leave_unless(written.get() < topk)
        values = f.load(_WORDS, scores, i * 4)
        with f.when((values >= bound).bits(I16).differs(0)):
            equal = f.var(values.equals(bound).bits(I16).zext(I32))
            chosen = f.var((values > bound).bits(I16).zext(I32))
            ties = f.unary("ctpop", equal.get()).zext(I64).min(left.get())
            for _ in f.range(ties):
                lowest = equal.get() & -equal.get()
                equal.set(equal.get() - lowest)
                chosen.set(chosen.get() | lowest)
            left.set(left.get() - ties)
            index = f.const(_WORDS, list(range(16))) + i.trunc(I32).spread(16)
            mask = chosen.get().trunc(I16).bits(vec(16, I1))
            packed = f.call(_WORDS, "llvm.experimental.vector.compress.v16i32", index, mask, f.const(_WORDS, 0))
            f.store(packed, to, written.get() * 4)
            written.set(written.get() + f.unary("ctpop", chosen.get()).zext(I64))
        place.set(i + 16)
