"""Attention kernels against float64 on the same BF16 keys; bits that do not depend on company or threads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu import attention
from hadal.kernels.cpu.ir import I16, vec
from hadal.kernels.cpu.layout import PAGE_TOKENS, SPAN, STEP, Shapes
from hadal.kernels.cpu.program import KernelModule
from tests.kernels.cpu.harness import NANO, SMALL, Kernels, address, buffer, instruction_sets, shapes

TWENTY = shapes(heads=20, dim=128, rotary=64, topk=64)
SHAPES = {"nano": NANO, "small": SMALL, "twenty": TWENTY}
SEED = 20


@dataclass(frozen=True)
class Span:
    """A sequence: its new tokens, and whether its window lies in a region of its own."""

    start: int
    length: int
    region: bool = False


def put(into: np.ndarray, offset: int, values: Tensor) -> None:
    data = values.contiguous().view(torch.uint8).numpy().reshape(-1)
    into[offset : offset + data.size] = data


def key_block(keys: Tensor) -> Tensor:
    """32 BF16 keys [32, D] in both forms of a block."""
    dim = keys.shape[1]
    rows = keys.view(2, 16, dim // 32, 32).transpose(1, 2)
    pairs = keys.view(16, 2, dim // 16, 16).permute(2, 0, 3, 1)
    return torch.cat((rows.reshape(-1), pairs.reshape(-1)))


class Case:
    """Random keys, queries and choices of several sequences, laid out in memory, and their exact attention."""

    def __init__(self, shapes: Shapes, spans: list[Span], ratio: int, topk: int, junk: float = 0.0) -> None:
        self.shapes, self.spans, self.ratio, self.topk, self.junk = shapes, spans, ratio, topk, junk
        self.keep: list[np.ndarray] = []
        self.rows = [(s, span.start + i) for s, span in enumerate(spans) for i in range(span.length)]
        self.sink = torch.empty(shapes.heads).uniform_(-1, 1, generator=self.random(0))
        table = np.zeros((len(spans), len(SPAN)), np.int64)
        self.keys: list[Tensor] = []
        self.entries: list[Tensor] = []
        first = 0
        for s, span in enumerate(spans):
            table[s] = self.lay_out(s, span, first)
            first += span.length
        self.queries = torch.stack([self.query(s, p) for s, p in self.rows])
        self.chosen = [self.choice(s, p) for s, p in self.rows]
        self.angle = torch.stack([self.random_angles(p) for _, p in self.rows])
        self.step = np.zeros(len(STEP), np.int64)
        words: dict[str, Any] = {
            "positions": np.array([p for _, p in self.rows], np.int64),
            "span_of": np.array([s for s, _ in self.rows], np.int64),
            "span_table": table,
            "angles": self.lay_out_angles(),
        }
        self.keep += words.values()
        for name, array in words.items():
            self.step[STEP.index(name)] = address(array)
        self.step[STEP.index("rows")], self.step[STEP.index("spans")] = len(self.rows), len(spans)

    def random(self, *path: int) -> torch.Generator:
        return torch.Generator().manual_seed(hash((SEED, *path)) % (1 << 31))

    def visible(self, position: int) -> int:
        return (position + 1) // self.ratio if self.ratio else 0

    def query(self, s: int, position: int) -> Tensor:
        shape = self.shapes
        q = torch.randn(shape.heads, shape.dim, generator=self.random(1, self.spans[s].start, position)) * 2
        return torch.mul(q, shape.dim**-0.5).bfloat16()

    def choice(self, s: int, position: int) -> Tensor:
        count = self.visible(position)
        if not self.topk or count <= self.topk:
            return torch.arange(count)
        order = torch.randperm(count, generator=self.random(2, self.spans[s].start, position))
        return order[: self.topk].sort().values

    def random_angles(self, position: int) -> Tensor:
        return torch.rand(2, self.shapes.rotary // 2, generator=self.random(3, position)) * 6

    def lay_out_angles(self) -> np.ndarray:
        result: np.ndarray = torch.cat((self.angle.cos(), self.angle.sin()), dim=-1).numpy()
        return result

    def lay_out(self, s: int, span: Span, row: int) -> list[int]:
        """Words of a span; fills a home's ring (behind 64 other bytes), pages, and a window region."""
        shape, end = self.shapes, span.start + span.length
        generator = self.random(4, span.start)
        keys = torch.randn(end, shape.dim, generator=generator).bfloat16()
        self.keys.append(keys)
        blocks = -(-end // 32)
        padded = torch.full((blocks * 32, shape.dim), self.junk).bfloat16()
        padded[:end] = keys
        count = shape.ring_blocks if not span.region else blocks + 3
        home = buffer(64 + count * shape.block_bytes)
        put(home, 64, torch.full((count * shape.block_bytes // 2,), self.junk).bfloat16())
        needed = range(max(0, span.start - shape.window + 1) // 32, blocks)
        assert len(needed) <= count
        for b in needed:
            put(home, 64 + b % count * shape.block_bytes, key_block(padded[32 * b : 32 * b + 32]))
        pages = self.fill_pages(generator, end)
        room = attention.entries_bytes(shape, max(self.visible(end - 1), 1))
        entries = buffer(room)
        entries[:] = 255  # NaN wherever nothing is written
        self.keep += [home, pages, entries]
        region = address(home) + 64 if span.region else 0
        at_home = 0 if span.region else address(home)
        return [span.start, span.length, row, at_home, address(pages), region, count, address(entries)]

    def fill_pages(self, generator: torch.Generator, end: int) -> np.ndarray:
        shape, count = self.shapes, self.visible(end - 1)
        codes = shape.dim - shape.rotary
        value = torch.randn(count, codes, generator=generator) * 200
        value = torch.where(torch.rand(value.shape, generator=generator) < 0.1, value * 1e-4, value)  # subnormals too
        code = value.clamp(-448, 448).to(torch.float8_e4m3fn)
        scale = torch.randint(117, 123, (count, codes // 64), generator=generator, dtype=torch.uint8)
        rotary = torch.randn(count, shape.rotary, generator=generator).bfloat16()
        factor = torch.pow(2.0, scale.double() - 127).repeat_interleave(64, dim=1)
        self.entries.append(torch.cat((code.double() * factor, rotary.double()), dim=1))
        if not self.ratio:
            return np.zeros(1, np.int64)
        per_page = PAGE_TOKENS // self.ratio
        addresses = np.zeros(-(-end // PAGE_TOKENS), np.int64)
        for p in range(len(addresses)):
            page = buffer(128 + per_page * shape.entry_bytes)
            page[:] = 255
            for j in range(p * per_page, min(count, (p + 1) * per_page)):
                at = 128 + j % per_page * shape.entry_bytes
                put(page, at, code[j])
                put(page, at + codes, rotary[j])
                put(page, at + codes + 2 * shape.rotary, scale[j])
            self.keep.append(page)
            addresses[p] = address(page)
        return addresses

    def exact(self) -> Tensor:
        """[T, H, D] in float64."""
        out = []
        for (s, position), q, chosen, angle in zip(self.rows, self.queries, self.chosen, self.angle, strict=True):
            window = self.keys[s][max(0, position - self.shapes.window + 1) : position + 1].double()
            keys = torch.cat((window, self.entries[s][chosen]))
            logits = torch.cat((q.double() @ keys.T, self.sink.double().unsqueeze(1)), dim=1)
            y = torch.softmax(logits, dim=1)[:, :-1] @ keys
            turned = torch.view_as_complex(y[:, -self.shapes.rotary :].reshape(len(y), -1, 2))
            turned = turned * torch.polar(torch.ones_like(angle[1]).double(), -angle[1].double())
            out.append(torch.cat((y[:, : -self.shapes.rotary], torch.view_as_real(turned).flatten(1)), dim=1))
        return torch.stack(out)

    def arguments(self, threads: int) -> dict[str, int]:
        """The words of both kernels."""
        shape, rows = self.shapes, len(self.rows)
        size = shape.head_groups * shape.dim * 32
        q = buffer(rows * size)
        padded = torch.zeros(rows, shape.head_groups * 16, shape.dim, dtype=torch.bfloat16)
        padded[:, : shape.heads] = self.queries
        put(q, 0, padded.view(rows, shape.head_groups, 16, shape.dim // 32, 16, 2).permute(0, 1, 3, 4, 2, 5))
        self.stride = shape.heads * shape.dim * 2 + 32
        self.out = buffer(rows * self.stride)
        most = self.topk or max(self.visible(s.start + s.length - 1) for s in self.spans)
        step = attention.scratch_bytes(shape, most)
        scratch = buffer(threads * step, 255)
        chosen = np.zeros((rows, max(most, 1)), np.int32)
        counts = np.array([len(c) for c in self.chosen], np.int64)
        for r, c in enumerate(self.chosen):
            if self.topk and self.visible(self.rows[r][1]) > self.topk:
                chosen[r, : len(c)] = c.numpy()
        sink = buffer(4 * shape.heads)
        put(sink, 0, self.sink)
        self.keep += [q, scratch, chosen, counts, sink]
        return {
            "q": address(q), "q_stride": size, "out": address(self.out), "out_stride": self.stride,
            "sink": address(sink), "ring": 64, "ratio": self.ratio, "entries": 128, "topk": self.topk,
            "selected": address(chosen) if self.topk else 0, "selected_stride": chosen.strides[0],
            "selected_count": address(counts) if self.topk else 0, "scratch": address(scratch),
            "scratch_step": step, "regime": 1,
        }  # fmt: skip

    def run(self, kernels: Kernels, threads: int = 1) -> Tensor:
        """[T, H, D] BF16."""
        words, shape = self.arguments(threads), self.shapes
        for name, names in (("unpack_entries", attention.UNPACK), ("attend", attention.ATTEND)):
            kernels.run(name, self.step, threads, **{n: words[n] for n in names.split()})
        out = torch.from_numpy(self.out).view(len(self.rows), self.stride)
        assert not bool(out[:, -32:].any())
        return out[:, :-32].contiguous().view(torch.bfloat16).view(len(self.rows), shape.heads, shape.dim)


@cache
def compiled(isa: str, shape: Shapes) -> Kernels:
    return Kernels(isa, lambda module: attention.emit_attention(module, shape))


@pytest.fixture(params=["amx", "avx512", "avx2"])
def isa(request: pytest.FixtureRequest) -> str:
    if request.param not in instruction_sets():
        pytest.skip(f"this processor runs {instruction_sets()}")
    name: str = request.param
    return name


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm(dim=-1).div(exact.norm(dim=-1)).max())


def modes(shapes: Shapes) -> list[tuple[int, int]]:
    """(ratio, topk) of window-only, HCA and CSA layers."""
    return [(0, 0), (16 if shapes.window == 64 else 128, 0), (4, shapes.topk)]


def ragged(shapes: Shapes) -> list[Span]:
    """A window not yet full, one that just wraps, several lengths; the last sees more entries than are selected."""
    late = 4 * shapes.topk + 27
    return [Span(0, 5), Span(shapes.window - 2, 4), Span(3, 40, True), Span(shapes.window * 2 + 31, 1), Span(late, 3)]


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_attention_in_float64(isa: str, name: str, mode: int) -> None:
    shape = SHAPES[name]
    case = Case(shape, ragged(shape), *modes(shape)[mode])
    assert error(case.run(compiled(isa, shape)), case.exact()) < 1e-2, f"seed {SEED}"


@pytest.mark.parametrize("name", SHAPES)
def test_the_border_of_selection_lies_at_topk_visible_entries(isa: str, name: str) -> None:
    shape = SHAPES[name]
    case = Case(shape, [Span(4 * shape.topk - 3, 9, True)], 4, shape.topk)
    assert error(case.run(compiled(isa, shape)), case.exact()) < 1e-2, f"seed {SEED}"


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_bits_do_not_depend_on_company_or_threads(isa: str, mode: int) -> None:
    shape = TWENTY
    spans = ragged(shape)
    together = Case(shape, spans, *modes(shape)[mode]).run(compiled(isa, shape))
    in_pairs = Case(shape, spans, *modes(shape)[mode]).run(compiled(isa, shape), 2)
    assert torch.equal(together, in_pairs), f"seed {SEED}"
    first = 0
    for span in spans:
        alone = Case(shape, [span], *modes(shape)[mode])
        for threads in (1, 2):
            got = alone.run(compiled(isa, shape), threads)
            assert torch.equal(got, together[first : first + span.length]), (span, threads, SEED)
        first += span.length


@pytest.mark.parametrize("mode", [0, 2])
def test_hidden_keys_weigh_exactly_nothing(isa: str, mode: int) -> None:
    shape = NANO
    clean = Case(shape, ragged(shape), *modes(shape)[mode]).run(compiled(isa, shape))
    soiled = Case(shape, ragged(shape), *modes(shape)[mode], junk=3e38).run(compiled(isa, shape))
    assert torch.equal(clean, soiled), f"seed {SEED}"
    assert bool(clean.isfinite().all())


def test_a_sink_takes_weight_and_adds_nothing(isa: str) -> None:
    shape = NANO
    case = Case(shape, [Span(70, 3)], 0, 0)
    case.sink.fill_(200.0)
    assert float(case.run(compiled(isa, shape)).float().abs().max()) == 0.0


@pytest.mark.parametrize("name", SHAPES)
def test_a_stored_key_lies_in_both_forms_and_touches_no_other(isa: str, name: str) -> None:
    shape = SHAPES[name]
    kernels = Kernels(isa, lambda module: _emit_store(module, shape))
    keys = torch.randn(32, shape.dim, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    block = buffer(shape.block_bytes)
    for slot in (7, 6, 31, 0, *range(1, 6), *range(8, 31)):
        before, key = block.copy(), buffer(shape.dim * 2)
        put(key, 0, keys[slot])
        kernels.run("store", np.zeros(len(STEP), np.int64), block=address(block), key=address(key), slot=slot)
        assert int((before != block).sum()) <= 4 * shape.dim
    assert torch.equal(torch.from_numpy(block).view(torch.bfloat16), key_block(keys)), f"seed {SEED}"


def _emit_store(module: KernelModule, shape: Shapes) -> None:
    with module.kernel("store", "block key slot") as k:
        f, key = k.f, k.ptr("key")
        attention.store_key(f, shape, k.ptr("block"), k.arg("slot"), lambda i: f.load(vec(16, I16), key, 32 * i))
