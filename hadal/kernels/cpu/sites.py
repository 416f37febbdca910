"""Kernels of the table `cpu` for what lies between products: norms, hyper-connections, pooling, affinities.

Every value is rounded where the official code rounds it, and every sum has one order, whatever else is computed: 16
lanes, each over every 16th column, folded as a tree. Rows are BF16 and have a multiple of 16 columns.

Legend: N residual streams, M = N (N + 2) maps, T tokens, D pooled dim. Source: spec architecture 2.2, 2.4 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from hadal.kernels.cpu.ir import F32, I16, I64, Function, Value, vec
from hadal.kernels.cpu.numbers import exp, round_bf16, sigmoid, softplus, through_bf16, widen_bf16
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule

NORM = "rows row_stride weight out out_stride columns count eps"
# out[t, o] = x[t] . weight[o]; x[t] . x[t] comes after the last o where `squares` is 1. Strides in bytes.
DOTS = "rows row_stride weight columns outputs squares out out_row out_column count"
# products [M + 1 or N + 1][lines * 16 tokens] as of DOTS, replaced by the maps; `width` values per token;
# `whole` 0: only the N maps of a collapse
MAPS = "products stride base scale streams whole iterations width lines eps norm_eps"
# out[t, k] = sum_s weights[t, s, k] x[t, s] + extra_weights[t, k] extra[t], BF16; strides in bytes, `extra` may be 0
MIX = (
    "streams stream_stride sources weights weight_row weight_source weight_target "
    "extra extra_stride extra_weights extra_row extra_target targets out out_stride columns count"
)
# slots: int64 rows of kv and score per block, -1: none; the first `split` read from byte 0 on, others from `shift` on
POOL = "kv score stride slots count split shift columns out out_stride blocks"
AFFINITY = "values chunks"
_TOGETHER, _OUTPUTS = 4, 6  # rows and outputs whose sums are kept in registers
_V, _WORDS = vec(16, F32), vec(16, I16)


def emit_sites(module: KernelModule) -> None:
    """All kernels of this file."""
    _emit_norm(module)
    _emit_head_norm(module)
    _emit_dots(module)
    _emit_maps(module)
    _emit_mix(module)
    _emit_pool(module)
    with module.kernel("affinity", AFFINITY) as k:
        for c in k.share(k.arg("chunks")):
            soft = softplus(k.f, k.f.load(_V, k.ptr("values"), c * 64)).max(1e-30)
            k.f.store(k.f.unary("sqrt", soft), k.ptr("values"), c * 64)


def _load(f: Function, place: Value, chunk: Value) -> Value:
    return widen_bf16(f, f.load(_WORDS, place, chunk * 32))


def _emit_norm(module: KernelModule) -> None:
    """`norm`: x / rms * weight in FP32, rounded once."""
    with module.kernel("norm", NORM) as k:
        f = k.f
        chunks = k.arg("columns") / 16
        for row, out in _rows(k):
            total = f.var(f.const(_V, 0))
            for c in f.range(chunks):
                x = _load(f, row, c)
                total.set(f.fma(x, x, total.get()))
            mean = total.get().reduce("add") / k.arg("columns").to_float(F32)
            inverse = (1.0 / f.unary("sqrt", mean + k.real("eps"))).spread(16)
            for c in f.range(chunks):
                f.store(round_bf16(f, _load(f, row, c) * inverse * f.load(_V, k.ptr("weight"), c * 64)), out, c * 32)


def _emit_head_norm(module: KernelModule) -> None:
    """`head_norm`: x / rms with every step in BF16, as the official code does."""
    with module.kernel("head_norm", NORM) as k:
        f = k.f
        chunks = k.arg("columns") / 16
        for row, out in _rows(k):
            total = f.var(f.const(_V, 0))
            for c in f.range(chunks):
                x = _load(f, row, c)
                total.set(total.get() + through_bf16(f, x * x))
            mean = through_bf16(f, (total.get().reduce("add") / k.arg("columns").to_float(F32)).spread(16))
            # The carrier's eps, as in a sum of a BF16 tensor and a number.
            eps = through_bf16(f, k.real("eps").spread(16))
            inverse = through_bf16(f, 1.0 / f.unary("sqrt", through_bf16(f, mean + eps)))
            for c in f.range(chunks):
                f.store(round_bf16(f, _load(f, row, c) * inverse), out, c * 32)


def _rows(k: Kernel) -> Iterator[tuple[Value, Value]]:
    """This thread's rows and where they go."""
    for i in k.share(k.arg("count")):
        yield k.f.at(k.ptr("rows"), i * k.arg("row_stride")), k.f.at(k.ptr("out"), i * k.arg("out_stride"))


def _emit_dots(module: KernelModule) -> None:
    with module.kernel("dots", DOTS) as k:
        f = k.f
        count, outputs = k.arg("count"), k.arg("outputs")
        blocks = (outputs + (_OUTPUTS - 1)) / _OUTPUTS
        for unit in k.share((count + (_TOGETHER - 1)) / _TOGETHER * blocks):
            first, output = unit / blocks * _TOGETHER, unit % blocks * _OUTPUTS
            here = (count - first).min(_TOGETHER)
            with f.when(here.equals(_TOGETHER)):
                _dot_block(k, first, output, _TOGETHER)
            with f.when(here < _TOGETHER):
                for i in f.range(here):
                    _dot_block(k, first + i, output, 1)
        with f.when(k.arg("squares").differs(0)):
            for i in k.share(count):
                row, total = f.at(k.ptr("rows"), i * k.arg("row_stride")), f.var(f.const(_V, 0))
                for c in f.range(k.arg("columns") / 16):
                    x = _load(f, row, c)
                    total.set(f.fma(x, x, total.get()))
                f.store(total.get().reduce("add"), _product(k, i, outputs))


def _product(k: Kernel, row: Value, output: Value) -> Value:
    return k.f.at(k.ptr("out"), row * k.arg("out_row") + output * k.arg("out_column"))


def _dot_block(k: Kernel, first: Value, output: Value, count: int) -> None:
    """Products of `count` rows; outputs behind the last one repeat it."""
    f = k.f
    rows = [f.at(k.ptr("rows"), (first + i) * k.arg("row_stride")) for i in range(count)]
    chosen = [(output + i).min(k.arg("outputs") - 1) for i in range(_OUTPUTS)]
    weights = [f.at(k.ptr("weight"), o * k.arg("columns") * 4) for o in chosen]
    sums = [[f.var(f.const(_V, 0)) for _ in chosen] for _ in rows]
    for c in f.range(k.arg("columns") / 16):
        values = [_load(f, row, c) for row in rows]
        for i, weight in enumerate(weights):
            w = f.load(_V, weight, c * 64)
            for r, value in enumerate(values):
                sums[r][i].set(f.fma(value, w, sums[r][i].get()))
    for r in range(count):
        for i, o in enumerate(chosen):
            f.store(sums[r][i].get().reduce("add"), _product(k, first + r, o))


def _emit_maps(module: KernelModule) -> None:
    """`maps`, 16 tokens in the lanes: pre, post and Sinkhorn's near doubly stochastic comb [j, k] (contract j)."""
    with module.kernel("maps", MAPS) as k:
        for line in k.share(k.arg("lines")):
            maps = _Maps(k, line)
            n = maps.n
            for i in k.f.range(n):
                maps.put(i, sigmoid(k.f, maps.logit(i, 0)) + maps.eps)
            with k.f.when(k.arg("whole").differs(0)):
                for i in k.f.range(n * 2, n):
                    maps.put(i, sigmoid(k.f, maps.logit(i, 1)) * 2.0)
                for j in k.f.range(n):
                    maps.soften(n * 2 + j * n)
                maps.divide(1, n)
                for _ in k.f.range(k.arg("iterations") - 1):
                    maps.divide(n, 1)
                    maps.divide(1, n)


class _Maps:
    """The products of 16 tokens, in memory by number, while they become maps."""

    def __init__(self, k: Kernel, line: Value) -> None:
        f = self.f = k.f
        self.k, self.n, self.eps = k, k.arg("streams"), k.real("eps").spread(16)
        self.place = f.at(k.ptr("products"), line * 64)
        last = (k.arg("whole").differs(0)).choose(self.n * (self.n + 2), self.n)
        mean = self.get(last) / k.arg("width").to_float(F32).spread(16)
        self.inverse = 1.0 / f.unary("sqrt", mean + k.real("norm_eps").spread(16))

    def get(self, i: Value) -> Value:
        return self.f.load(_V, self.place, i * self.k.arg("stride"))

    def put(self, i: Value, value: Value) -> None:
        self.f.store(value, self.place, i * self.k.arg("stride"))

    def logit(self, i: Value, kind: int) -> Value:
        scale = self.f.broadcast(_V, self.k.ptr("scale"), 4 * kind)
        return self.get(i) * self.inverse * scale + self.f.broadcast(_V, self.k.ptr("base"), i * 4)

    def soften(self, first: Value) -> None:
        """A row of comb from `first` on becomes its softmax plus eps."""
        f, end = self.f, first + self.n
        peak, total = f.var(f.const(_V, -math.inf)), f.var(f.const(_V, 0))
        for i in f.range(end, first):
            value = self.logit(i, 2)
            peak.set(peak.get().max(value))
            self.put(i, value)
        for i in f.range(end, first):
            power = exp(f, self.get(i) - peak.get())
            total.set(total.get() + power)
            self.put(i, power)
        for i in f.range(end, first):
            self.put(i, self.get(i) / total.get() + self.eps)

    def divide(self, outer: Value | int, inner: Value | int) -> None:
        """Divide comb by its sums along one axis; `outer` and `inner` are steps of its axes."""
        f = self.f
        for i in f.range(self.n):
            first, total = self.n * 2 + i * outer, f.var(f.const(_V, 0))
            for j in f.range(self.n):
                total.set(total.get() + self.get(first + j * inner))
            for j in f.range(self.n):
                self.put(first + j * inner, self.get(first + j * inner) / (total.get() + self.eps))


def _emit_mix(module: KernelModule) -> None:
    with module.kernel("mix", MIX) as k:
        f = k.f
        columns = k.arg("columns")
        for row in k.share(k.arg("count")):
            streams = f.at(k.ptr("streams"), row * k.arg("stream_stride"))
            extra = f.at(k.ptr("extra"), row * k.arg("extra_stride"))
            weights = f.at(k.ptr("weights"), row * k.arg("weight_row"))
            for target in f.range(k.arg("targets")):
                out = f.at(k.ptr("out"), row * k.arg("out_stride") + target * columns * 2)
                weight = f.at(weights, target * k.arg("weight_target"))
                own = f.var(f.const(F32, 0))
                with f.when(k.arg("extra").differs(0)):
                    place = row * k.arg("extra_row") + target * k.arg("extra_target")
                    own.set(f.load(F32, k.ptr("extra_weights"), place))
                for c in f.range(columns / 16):
                    total = f.var(f.const(_V, 0))
                    for s in f.range(k.arg("sources")):
                        x = _load(f, f.at(streams, s * columns * 2), c)
                        total.set(f.fma(f.broadcast(_V, weight, s * k.arg("weight_source")), x, total.get()))
                    with f.when(k.arg("extra").differs(0)):
                        total.set(f.fma(own.get().spread(16), _load(f, extra, c), total.get()))
                    f.store(round_bf16(f, total.get()), out, c * 32)


def _emit_pool(module: KernelModule) -> None:
    """`pool`: each block by a softmax over its slots, channel by channel, in FP32."""
    with module.kernel("pool", POOL) as k:
        f = k.f
        chunks = k.arg("columns") / 16
        for unit in k.share(k.arg("blocks") * chunks):
            block, c = unit / chunks, unit % chunks
            slots = f.at(k.ptr("slots"), block * k.arg("count") * WORD)

            def read(i: Value, name: str, slots: Value = slots, c: Value = c) -> Value:
                side = (i < k.arg("split")).choose(0, k.arg("shift"))
                row = f.load(I64, slots, i * WORD).max(0)
                return f.load(_V, k.ptr(name), row * k.arg("stride") + side + c * 64)

            def score(i: Value, slots: Value = slots, read: Callable[[Value, str], Value] = read) -> Value:
                there = (f.load(I64, slots, i * WORD) > -1).choose(f.const(F32, 0), -math.inf)
                return read(i, "score") + there.spread(16)

            peak, total, mixed = f.var(f.const(_V, -math.inf)), f.var(f.const(_V, 0)), f.var(f.const(_V, 0))
            for i in f.range(k.arg("count")):
                peak.set(peak.get().max(score(i)))
            for i in f.range(k.arg("count")):
                power = exp(f, score(i) - peak.get())
                total.set(total.get() + power)
                mixed.set(f.fma(power, read(i, "kv"), mixed.get()))
            f.store(mixed.get() / total.get(), f.at(k.ptr("out"), block * k.arg("out_stride")), c * 64)
