"""Choosing tokens from rows of logits: the likeliest, or the winner of a race whose noise a hash gives to each token.

A token of weight p = e^((logit - highest) / T) with exponential noise E arrives after E / p. The first to arrive
follows the softmax and is the argmax of logit / T - log E, which is Gumbel noise. Filters keep tokens that come first
in order (logit falling, index rising), so a winner outside them bars itself and all behind it from the next race;
about log(vocabulary) races do at worst. Legend: R rows, V logits of a row.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hadal.kernels.cpu.ir import F32, F64, I1, I16, I32, I64, Function, Value, lanes, vec
from hadal.kernels.cpu.memory import Scratch, address, buffer
from hadal.kernels.cpu.numbers import exp, log, log1p_unit
from hadal.kernels.cpu.program import WORD, Kernel, KernelModule
from hadal.kernels.cpu.target import Isa, Library
from hadal.kernels.cpu.team import team

_REALS, _DOUBLES, _IDS = vec(16, F32), vec(16, F64), vec(16, I32)
_LAST = 2**31 - 1
_INF = math.inf
_NO_STEP = np.zeros(1, np.int64)  # the kernel reads no word of a step


class Asked(NamedTuple):
    """What a row is to give; `rate` = 1 / T, 0 for the likeliest token. `top` -1 asks for no log-probabilities."""

    key: int  # 64 bits
    rate: float
    top_k: int
    top_p: float
    top: int


class Found(NamedTuple):
    """A row's token, -1 where logits are NaN or +inf or all -inf, and what its log-probabilities are made of.

    `ahead` tokens are likelier; `mass` is the sum of e^(logit - highest); `likeliest` ids and logits in order.
    """

    token: int
    ahead: int
    logit: float
    highest: float
    mass: float
    likeliest: tuple[tuple[int, float], ...]


_ASKED, _FOUND = struct.Struct("<Qdqdq"), struct.Struct("<qqddd")
_RECORD = ("key", "rate", "top_k", "top_p", "top", "token", "ahead", "logit", "highest", "mass", "likeliest")
_TOKEN, _LIKELIEST = WORD * _RECORD.index("token"), WORD * _RECORD.index("likeliest")


class Chooser:
    """Chooses for rows whose first `vocabulary` logits count, with at most `most` likeliest tokens each."""

    def __init__(self, isa: Isa, vocabulary: int, most: int) -> None:
        self._team = team(isa)
        self._scratch = Scratch()
        self._each = -(-vocabulary // 16) * 128 + 64  # bytes of a thread; odd in lines, so that sets differ
        self._record = _LIKELIEST + 2 * WORD * most
        self._words = np.array([0, 0, vocabulary, 0, self._record, 0, self._each, 0], np.int64)
        self._job = np.array([[_compiled(isa).address("choose"), address(self._words), 1]], np.int64)
        self._records = buffer(0)

    def find(self, logits_RV: Tensor, asked: Sequence[Asked]) -> list[Found]:
        """One result for each row of float32 logits on the CPU."""
        if logits_RV.stride(1) != 1:
            logits_RV = logits_RV.contiguous()
        words, size, count = self._words, self._record, len(asked)
        assert logits_RV.dtype == torch.float32 and len(logits_RV) == count and logits_RV.shape[1] >= words[2]
        if count * size > len(self._records):
            self._records = buffer(count * size)
            words[3] = address(self._records)
        records = memoryview(self._records)  # type: ignore[arg-type]
        for r, row in enumerate(asked):
            _ASKED.pack_into(records, r * size, *row)
        words[0], words[1], words[7] = logits_RV.data_ptr(), logits_RV.stride(0) * 4, count
        words[5] = self._scratch.reserve(torch.get_num_threads() * self._each)
        self._team.run(self._job, 1, _NO_STEP, 1 if count == 1 else None)
        return [self._read(records, r * size, row.top) for r, row in enumerate(asked)]

    def _read(self, records: memoryview, place: int, top: int) -> Found:
        token, ahead, logit, highest, mass = _FOUND.unpack_from(records, place + _TOKEN)
        likeliest: tuple[tuple[int, float], ...] = ()
        if top > 0 and token >= 0:
            pairs = struct.iter_unpack("<qd", records[place + _LIKELIEST : place + _LIKELIEST + 2 * WORD * top])
            likeliest = tuple((i, logit) for i, logit in pairs if logit > -_INF)
        return Found(token, ahead, logit, highest, mass, likeliest)


@cache
def _compiled(isa: Isa) -> Library:
    module = KernelModule(isa, ["none"])
    emit_choose(module)
    return Library(module.text(), isa)


@dataclass(frozen=True)
class _Row:
    """One row in a thread's scratch: its logits and their weights, filled up with -inf to `width`."""

    f: Function
    logits: Value
    weights: Value
    width: Value

    def ids(self, i: Value) -> Value:
        return self.f.const(_IDS, list(range(16))) + i.trunc(I32).spread(16)

    def logit(self, i: Value) -> Value:
        return self.f.load(_REALS, self.logits, i * 4)

    def weight(self, i: Value) -> Value:
        return self.f.load(_REALS, self.weights, i * 4)

    def before(self, i: Value, logit: Value, token: Value) -> Value:
        """Which tokens come before a given one in order."""
        x = self.logit(i)
        level = logit.spread(16)
        return (x > level) | (x.equals(level) & (self.ids(i) < token.spread(16)))


def emit_choose(module: KernelModule) -> None:
    """`choose`: fill the second part of each row's record, as `_RECORD` has it."""
    with module.kernel("choose", "logits stride vocabulary records record_bytes scratch scratch_step count") as k:
        f = k.f
        width = (k.arg("vocabulary") + 15) & -16
        logits = f.at(k.ptr("scratch"), f["thread"] * k.arg("scratch_step"))
        row = _Row(f, logits, f.at(logits, width * 4), width)
        for r in k.share(k.arg("count")):
            record = {n: f.at(k.ptr("records"), r * k.arg("record_bytes") + WORD * i) for i, n in enumerate(_RECORD)}
            f.store(f.const(I64, -1), record["token"])
            sound = _take(k, row, f.at(k.ptr("logits"), r * k.arg("stride")))
            highest, likeliest = _next(row, f.const(F32, _INF), f.const(I32, 0))
            with f.when(sound & (highest > -_INF)):
                _choose(k, row, record, highest, likeliest)


def _take(k: Kernel, row: _Row, logits: Value) -> Value:
    """Copy a row's logits; whether none of them is NaN or +inf."""
    f = row.f
    f.store(f.const(_REALS, -_INF), row.logits, row.width * 4 - 64)
    f.do("llvm.memcpy.p0.p0.i64", row.logits, logits, k.arg("vocabulary") * 4, f.const(I1, 0))
    sound = f.var(f.const(_IDS, 1))
    for i in f.range(row.width, 0, 16):
        sound.set((row.logit(i) < _INF).choose(sound.get(), 0))
    return sound.get().reduce("min").differs(0)


def _next(row: _Row, logit: Value, token: Value) -> tuple[Value, Value]:
    """Logit and id of the token that follows a given one in order; -inf where there is none."""
    f = row.f
    level, last = logit.spread(16), token.spread(16)
    best, ids = f.var(f.const(_REALS, -_INF)), f.var(f.const(_IDS, _LAST))
    for i in f.range(row.width, 0, 16):
        x, here = row.logit(i), row.ids(i)
        better = ((x < level) | (x.equals(level) & (here > last))) & (x > best.get())
        best.set(better.choose(x, best.get()))
        ids.set(better.choose(here, ids.get()))
    highest = best.get().reduce("max")
    return highest, best.get().equals(highest.spread(16)).choose(ids.get(), _LAST).reduce("min")


def _choose(k: Kernel, row: _Row, record: dict[str, Value], highest: Value, likeliest: Value) -> None:
    f = row.f
    token, logit, ahead = f.var(likeliest), f.var(highest), f.var(f.const(I64, 0))
    rate, top = f.load(F64, record["rate"]).narrow(F32), f.load(I64, record["top"])
    with f.when(rate > 0):
        total = _weigh(row, highest, rate)
        top_k, top_p = f.load(I64, record["top_k"]), f.load(F64, record["top_p"])
        limit = f.var((top_p < 1).choose(top_p * total, _INF))
        both = (top_k < k.arg("vocabulary")) & (top_p < 1)
        loose = f.var(both.choose(f.const(I64, 1), 0))  # top_k makes the limit lower, which is found if it matters
        token.set(0)
        logit.set(-_INF)
        for loop in f.repeat_while():
            token.set(_race(row, f.load(I64, record["key"]), likeliest, logit.get(), token.get()))
            logit.set(f.load(F32, row.logits, token.get().zext(I64) * 4))
            count, mass = _ahead(row, logit.get(), token.get())
            ahead.set(count)
            with f.when(loose.get().differs(0) & (count > 0) & (count < top_k) & (mass < limit.get())):
                limit.set(top_p * _mass_of_first(row, top_k, highest, rate, total))
                loose.set(0)
            loop.leave_unless((count >= top_k) | (mass >= limit.get()))
    f.store(token.get().zext(I64), record["token"])
    f.store(ahead.get(), record["ahead"])
    f.store(logit.get().widen(F64), record["logit"])
    f.store(highest.widen(F64), record["highest"])
    with f.when(top >= 0):
        f.store(_weigh(row, highest, f.const(F32, 1)), record["mass"])
        token.set(0)
        logit.set(_INF)
        for n in f.range(top):
            following, its = _next(row, logit.get(), token.get())
            token.set(its)
            logit.set(following)
            f.store(its.zext(I64), record["likeliest"], n * (2 * WORD))
            f.store(following.widen(F64), record["likeliest"], n * (2 * WORD) + WORD)


def _weigh(row: _Row, highest: Value, rate: Value) -> Value:
    """Fill the weights e^((logit - highest) rate); returns their sum in FP64."""
    f = row.f
    total = f.var(f.const(_DOUBLES, 0))
    for i in f.range(row.width, 0, 16):
        p = exp(f, (row.logit(i) - highest.spread(16)) * rate.spread(16))
        f.store(p, row.weights, i * 4)
        total.set(total.get() + p.widen(_DOUBLES))
    return total.get().reduce("add")


def _race(row: _Row, key: Value, likeliest: Value, logit: Value, token: Value) -> Value:
    """The first to arrive among the tokens before a given one in order and the likeliest, whose weight is 1."""
    f = row.f
    low, high = key.trunc(I32), (key >> 32).trunc(I32)
    winner = f.var(likeliest)
    first = f.var(_exponential(f, _noise(likeliest, low, high)))
    for i in f.range(row.width, 0, 16):
        p, bits = row.weight(i), _noise(row.ids(i), low.spread(16), high.spread(16))
        # E > v, so most tokens are seen to be late without a logarithm.
        early = (bits >> 8).to_float(_REALS) < p * (first.get() * 2.0**24).spread(16)
        early = early & row.before(i, logit, token)
        with f.when(early.bits(I16).differs(0)):
            time = early.choose(_exponential(f, bits) / p, _INF)
            least = time.reduce("min")
            with f.when(least < first.get()):
                first.set(least)
                winner.set(time.equals(least.spread(16)).choose(row.ids(i), _LAST).reduce("min"))
    return winner.get()


def _noise(ids: Value, low: Value, high: Value) -> Value:
    """32 random bits of a token id under a key."""
    return _mix(_mix(ids + low) ^ high)


def _mix(x: Value) -> Value:
    """MurmurHash3's finaliser."""
    x = (x ^ (x >> 16)) * (0x85EBCA6B - 2**32)
    x = (x ^ (x >> 13)) * (0xC2B2AE35 - 2**32)
    return x ^ (x >> 16)


def _exponential(f: Function, bits: Value) -> Value:
    """-log(1 - v) for v = (bits + 1/2) / 2^32, with a small relative error towards either end."""
    smaller = ((bits ^ bits.sar(31)).to_float(vec(lanes(bits.kind), F32)) + 0.5) * 2.0**-32  # of v and 1 - v
    return -(bits >= 0).choose(log1p_unit(f, -smaller), log(f, smaller))


def _ahead(row: _Row, logit: Value, token: Value) -> tuple[Value, Value]:
    """Number and weight of the tokens that come before a given one in order."""
    f = row.f
    count, mass = f.var(f.const(_IDS, 0)), f.var(f.const(_DOUBLES, 0))
    for i in f.range(row.width, 0, 16):
        before = row.before(i, logit, token)
        count.set(count.get() - before.sext(_IDS))
        mass.set(mass.get() + before.choose(row.weight(i), 0).widen(_DOUBLES))
    return count.get().reduce("add").zext(I64), mass.get().reduce("add")


def _mass_of_first(row: _Row, count: Value, highest: Value, rate: Value, total: Value) -> Value:
    """Weight of the `count` tokens that come first: logits as integers of the same order, bisected."""
    f = row.f
    bottom, top = (f.var(_ordered(x.bits(I32)).sext(I64)) for x in (f.const(F32, -_INF), highest))
    top.set(top.get() + 1)
    surplus, mass = f.var(row.width - count), f.var(total)
    for loop in f.repeat_while():
        loop.leave_unless((top.get() - bottom.get() > 1) & surplus.get().differs(0))
        middle = (bottom.get() + top.get()).sar(1)
        reached, theirs = _ahead(row, _ordered(middle.trunc(I32)).bits(F32), f.const(I32, _LAST))
        enough = reached >= count
        surplus.set(enough.choose(reached - count, surplus.get()))
        mass.set(enough.choose(theirs, mass.get()))
        bottom.set(enough.choose(middle, bottom.get()))
        top.set(enough.choose(top.get(), middle))
    level = _ordered(bottom.get().trunc(I32)).bits(F32)
    return mass.get() - surplus.get().to_float(F64) * exp(f, (level - highest) * rate).widen(F64)


def _ordered(bits: Value) -> Value:
    """A float's bits as an integer of the same order, and back."""
    return bits ^ (bits.sar(31) & _LAST)
