"""Single kernels at V4-Flash's widths: products beside a read of the same bytes, attention, the indexer at 1M tokens.

    python benchmarks/operators.py                       # everything, one thread
    HADAL_CPU=avx512 python benchmarks/operators.py products

Medians of CPU time, candidates in turn within each round. A product's weights come from memory: 100 MB of different
matrices take turns; the read beside it sums as many bytes. torch multiplies the same values as dense BF16.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from flash_layers import build
from torch import Tensor

from hadal.kernels.cpu import int8, matmul
from hadal.kernels.cpu.joblist import JobList, Space
from hadal.kernels.cpu.memory import address, buffer
from hadal.kernels.cpu.pack import pack
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, Library, detect
from hadal.kernels.cpu.team import team
from hadal.quant import quantise_fp4, quantise_fp8

ROWS = (1, 2, 4, 8, 16, 64, 512)
MEMORY = 100 << 20
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["products", "attention", "indexer", "team"])
    torch.set_num_threads(1)
    isa, reason = detect()
    assert isa is not None, reason
    print(json.dumps({"kernels": reason}))
    measures: dict[str, Callable[[Isa], Iterator[dict[str, Any]]]] = {
        "products": products, "attention": attention, "indexer": indexer, "team": hand_over,
    }  # fmt: skip
    for what in parser.parse_args().what:
        for row in measures[what](isa):
            print(json.dumps(row), flush=True)


def products(isa: Isa, n: int = 2048, k: int = 4096) -> Iterator[dict[str, Any]]:
    """Microseconds and rates of [M, 4096] x [4096, 2048] for each form of weights."""
    weight = torch.randn(n, k) * 0.02
    forms = {"bf16": weight.bfloat16(), "fp8": quantise_fp8(weight), "fp4": quantise_fp4(weight)}
    kernels = list(forms) if isa.amx else [*forms, "int8"]
    library = _library(isa, kernels)
    for rows in ROWS:
        work: dict[str, Callable[[], object]] = {}
        nbytes = {}
        for kernel in kernels:
            packed = pack(forms["fp4" if kernel == "int8" else kernel])
            nbytes[kernel] = packed.numel()
            work[kernel] = _product(isa, library, kernel, packed, rows, n, k)
            stretch = torch.ones(max(1, MEMORY // packed.numel()) * packed.numel() // 4)
            work[f"read {kernel}"] = _in_turn([lambda p=p: p.sum() for p in stretch.split(packed.numel() // 4)])
        x, dense = torch.randn(rows, k).bfloat16(), [weight.bfloat16() for _ in range(MEMORY // (2 * n * k))]
        work["torch"] = _in_turn([lambda w=w, x=x: torch.mm(x, w.T) for w in dense])
        seconds = paired(work)
        row: dict[str, Any] = {"product": f"{rows} x {k} x {n}"}
        for kernel in [*kernels, "torch"]:
            taken = seconds[kernel]
            row[kernel] = {"us": round(taken * 1e6, 1), "gflops": round(2 * rows * n * k / taken / 1e9)}
            if kernel in nbytes:
                row[kernel]["share of read"] = round(seconds[f"read {kernel}"] / taken, 2)
        yield row


def attention(isa: Isa) -> Iterator[dict[str, Any]]:
    """One token, 64 heads of 512, 128 window keys and 512 chosen entries."""
    runner = build("csa", n_routed_experts=8, vocab_size=4096)
    state = runner.new_state()
    ids = torch.randint(0, 4096, (4096,), generator=torch.Generator().manual_seed(0))
    runner.advance(ids.tolist(), [4096], [state], [1])
    runner.advance(ids[:1].tolist(), [1], [state], [1])
    seconds = paired({"attend": _job(runner, ["attend"])})
    yield {"attention": "64 heads x 512, 640 entries", "us": round(seconds["attend"] * 1e6, 1)}


def indexer(isa: Isa) -> Iterator[dict[str, Any]]:
    """Scores of 262,144 keys by 64 heads of 128, and the exact best 512, for one token at position 1,048,575."""
    runner = build("csa", n_routed_experts=8, vocab_size=4096)
    state = runner.new_state()
    state.extend(1 << 20)
    place, random = runner.places.layers[0], np.random.default_rng(0)
    groups, width, codes = 2, runner.shapes.group_bytes, 8 * runner.shapes.index_dim
    for page in state.pages:
        for g in range(groups):
            group = page.bytes.numpy()[place.keys + g * width : place.keys + (g + 1) * width]
            group[:codes] = random.integers(0, 256, codes, np.uint8)
            group[codes:] = random.integers(118, 120, width - codes, np.uint8)
    state.position = (1 << 20) - 1
    runner.advance([1], [1], [state], [1])
    seconds = paired({"both": _job(runner, ["index_score", "index_select"])})
    yield {"indexer": "262,144 keys, 64 x 128, best 512", "ms": round(seconds["both"] * 1e3, 2)}


def hand_over(isa: Isa) -> Iterator[dict[str, Any]]:
    """Microseconds of an empty job with its barrier, inside one call, and of a call with one job."""
    module = KernelModule(isa, ["nothing"])
    with module.kernel("nothing", "nothing"):
        pass
    library = Library(module.text(), isa)
    words, step, runs = np.zeros(1, np.int64), np.zeros(1, np.int64), team(isa)
    for threads in (1, 2):
        for count in (1, 1000):
            table = np.array([[library.address("nothing"), address(words), 1]] * count, np.int64)
            took, taken = [], []
            for _ in range(300):
                began = time.perf_counter()
                part = runs.run(table, count, step, threads)
                took.append((time.perf_counter() - began) / count * 1e6)
                taken.append(part)
            clean = [t for t, part in zip(took, taken, strict=True) if part == threads]
            median = round(statistics.median(clean), 2) if clean else None
            yield {"threads": threads, "jobs in a call": count, "us per job": median, "runs": len(clean)}


def paired(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median CPU seconds of each candidate, all of them in turn in every round."""
    counts = {}
    for name, run in work.items():
        run()
        counts[name] = max(1, int(0.01 / max(_cost(run, 2), 1e-7)))
    found: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, run in work.items():
            found[name].append(_cost(run, counts[name]))
    return {name: statistics.median(values) for name, values in found.items()}


def _cost(run: Callable[[], object], count: int) -> float:
    began = time.thread_time()
    for _ in range(count):
        run()
    return (time.thread_time() - began) / count


def _in_turn(work: list[Callable[[], object]]) -> Callable[[], object]:
    place = iter(range(1 << 60))
    return lambda: work[next(place) % len(work)]()


def _job(runner: Any, names: list[str]) -> Callable[[], object]:
    """The jobs of these kernels, as the last step left them."""
    jobs = runner._jobs
    chosen = np.array([row for row, (name, _, _) in zip(jobs.table, jobs._jobs, strict=True) if name in names])
    return lambda: runner._team.run(chosen, len(chosen), runner._step, 1)


def _library(isa: Isa, kernels: list[str]) -> tuple[KernelModule, Library]:
    module = KernelModule(isa, ["nothing"])
    for kernel in kernels:
        if kernel == "int8":
            int8.emit_products_int8(module, "f32")
            int8.emit_quantise(module)
        else:
            matmul.emit_products(module, kernel, "f32")
    return module, Library(module.text(), isa)


def _product(
    isa: Isa, emitted: tuple[KernelModule, Library], kernel: str, packed: Tensor, rows: int, n: int, k: int
) -> Callable[[], object]:
    """Multiply by one of many copies of a matrix; the copies take turns."""
    module, library = emitted
    copies = [buffer(packed.numel()) for _ in range(max(1, MEMORY // packed.numel()))]
    for copy in copies:
        copy[:] = packed.numpy()
    given = Space(2 * k, rows + matmul.ROW_PADDING)
    records = Space(int8.record_bytes(k), rows + matmul.ROW_PADDING)
    out = Space(4 * n, rows + matmul.ROW_PADDING)
    given.rows(rows, k // 2)[:] = torch.randn(rows, k).bfloat16().view(torch.float32)
    groups, scratch = np.array([1, 0, 0, rows], np.int64), buffer(k // 32 * matmul.EXPANDED)
    step, runs = np.zeros(1, np.int64), team(isa)
    tables = []
    for copy in copies:
        jobs = JobList.__new__(JobList)
        jobs.words, jobs._jobs, jobs._dynamic = module.arguments, [], {}
        jobs._held = [copy, given, records, out, groups, scratch]
        source = given
        if kernel == "int8":
            source = records
            jobs.add("quantise", rows=given.address, row_stride=given.stride, out=records.address,
                     out_stride=records.stride, blocks=k // 32, groups=address(groups))  # fmt: skip
        jobs.add(
            f"product_{kernel}_f32", weight=address(copy), weight_step=0, rows=source.address,
            row_stride=source.stride, row_step=0, out=out.address, out_stride=out.stride, out_step=0, panels=n // 32,
            blocks=k // 32, groups=address(groups), scratch=address(scratch), scratch_step=0, mixing=0, limit=0.0,
        )  # fmt: skip
        jobs.finish(library)
        tables.append(jobs)
    return _in_turn([lambda t=t: runs.run(t.table, len(t.table), step, 1) for t in tables])


if __name__ == "__main__":
    main()
