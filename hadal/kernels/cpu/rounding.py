"""Rows between the products of `faithful` mode: gathered, rounded to FP8, through the SwiGLU, summed over experts.

Every value is rounded where the official code rounds it. Rows are BF16 with a multiple of 32 columns; rows written for
a product have room up to the next multiple of 128. Source: spec architecture 2.9 and 3.
"""

from __future__ import annotations

from collections.abc import Iterator

from hadal.kernels.cpu.ir import F32, I16, I64, Function, Value, vec
from hadal.kernels.cpu.numbers import fake_quant_e4m3, round_bf16, silu, widen_bf16
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule

TAKE = "rows row_stride index out out_stride columns count"
GATE = "rows row_stride out out_stride columns count mixing limit"
SUM = "rows row_stride slots active out out_stride columns count"
GROUP = 128  # columns per FP8 scale
_LANES = 16
_WORDS, _VECTOR = vec(_LANES, I16), vec(_LANES, F32)


def emit_take(module: KernelModule, *, quantised: bool) -> None:
    """`take` or `take_fp8`: row index[i] of the source, or row i where `index` is 0, becomes row i."""
    with module.kernel("take_fp8" if quantised else "take", TAKE) as k:
        f = k.f
        for i in k.share(k.arg("count")):
            row = f.var(i)
            with f.when(k.arg("index").differs(0)):
                row.set(f.load(I64, k.ptr("index"), i * WORD))
            source = f.at(k.ptr("rows"), row.get() * k.arg("row_stride"))
            to = f.at(k.ptr("out"), i * k.arg("out_stride"))
            for group, places in _groups(k):
                words = [f.load(_WORDS, source, place * 32) for place in places]
                if quantised:
                    words = _rounded(f, [widen_bf16(f, w) for w in words])
                _store(f, words, to, group)


def emit_gate(module: KernelModule, *, quantised: bool) -> None:
    """`gate` or `gate_fp8`: silu(gate) * up of clamped branches, times the row's word of `mixing` unless that is 0.

    A source row holds 16 columns of the gate, then the same of the linear branch, and so on.
    """
    with module.kernel("gate_fp8" if quantised else "gate", GATE) as k:
        f = k.f
        limit = k.real("limit")
        for i in k.share(k.arg("count")):
            weight = f.var(f.const(F32, 1))
            with f.when(k.arg("mixing").differs(0)):
                weight.set(f.load(F32, k.ptr("mixing"), i * 4))
            source = f.at(k.ptr("rows"), i * k.arg("row_stride"))
            to = f.at(k.ptr("out"), i * k.arg("out_stride"))
            for group, places in _groups(k):
                values = []
                for place in places:
                    gate, up = (widen_bf16(f, f.load(_WORDS, source, place * 64 + 32 * b)) for b in range(2))
                    gate = gate.min(limit.spread(_LANES))
                    up = up.min(limit.spread(_LANES)).max((-limit).spread(_LANES))
                    values.append(round_bf16(f, silu(f, gate) * up * weight.get().spread(_LANES)))
                if quantised:
                    values = _rounded(f, [widen_bf16(f, v) for v in values])
                _store(f, values, to, group)


def emit_sum(module: KernelModule) -> None:
    """`sum`: the rows that a row's slots name, added in FP32 in the slots' order."""
    with module.kernel("sum", SUM) as k:
        f = k.f
        for i in k.share(k.arg("count")):
            slots = f.at(k.ptr("slots"), i * k.arg("active") * WORD)
            to = f.at(k.ptr("out"), i * k.arg("out_stride"))
            for c in f.range(k.arg("columns") / _LANES):
                total = f.var(f.const(_VECTOR, 0))
                for j in f.range(k.arg("active")):
                    row = f.at(k.ptr("rows"), f.load(I64, slots, j * WORD) * k.arg("row_stride"))
                    total.set(total.get() + widen_bf16(f, f.load(_WORDS, row, c * 32)))
                f.store(total.get(), to, c * 64)


def _groups(k: Kernel) -> Iterator[tuple[Value, list[Value]]]:
    """Loop over the groups of a row: (group, its 16-column chunks); chunks behind the last one repeat it."""
    chunks = k.arg("columns") / _LANES
    for group in k.f.range((k.arg("columns") + (GROUP - 1)) / GROUP):
        yield group, [(group * (GROUP // _LANES) + c).min(chunks - 1) for c in range(GROUP // _LANES)]


def _rounded(f: Function, values: list[Value]) -> list[Value]:
    """One group in FP8 and back, as BF16 words; nothing is lost on the way back."""
    return [round_bf16(f, value) for value in fake_quant_e4m3(f, values)[0]]


def _store(f: Function, words: list[Value], to: Value, group: Value) -> None:
    for c, word in enumerate(words):
        f.store(word, to, group * (2 * GROUP) + 32 * c)
