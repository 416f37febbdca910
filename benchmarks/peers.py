"""Hadal beside transformers and llama.cpp on the same random weights: tokens per CPU-second of one thread.

    python benchmarks/peers.py                                   # every cell that takes seconds
    python benchmarks/peers.py decode-small prefill-small-8k --rounds 5 --json
    python benchmarks/peers.py --llama DIR --models DIR          # DIR of libllama.so; DIR that keeps the models

Every system lives in its own process, and the processes work in turn, A, B, C, A, B, C, so that a round of all of them
falls in the same seconds of a shared machine. A figure is the median of its rounds; a ratio or a fraction is the median
of the ratios within the rounds. Memory reads are compared with a read of the bytes that a token needs in the official
layout, products with a BF16 product of 1,024 by 1,024. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peer_models import SIZES, config_of, prefill_flops, provide
from peer_sides import MARGIN

from hadal.plan import active_bytes

TRANSFORMERS = ("transformers-bf16", "transformers-f32")
LLAMA = ("llama-bf16", "llama-q8_0", "llama-mxfp4")
WARM_LIMIT = 2048  # cells up to this many tokens begin with a round that does not count


@dataclass(frozen=True)
class Cell:
    """One row of the table: `tokens` is the context of a decode and the length of a prefill.

    `slow` systems are asked only with --slow. `base` is the context whose rate the row is compared with.
    """

    work: str
    size: str
    tokens: int
    systems: tuple[str, ...] = ()
    slow: tuple[str, ...] = ()
    base: int | None = None
    threads: tuple[int, ...] = (1,)
    usual: bool = True
    batch: int = 1  # sequences that decode at once


CELLS = {
    "decode-small": Cell("decode", "small", 512, TRANSFORMERS + LLAMA),
    "decode-medium": Cell("decode", "medium", 512, TRANSFORMERS + LLAMA),
    "batch-small": Cell("decode", "small", 512, TRANSFORMERS + LLAMA, batch=8),
    "batch-small-32": Cell("decode", "small", 512, batch=32),
    "decode-small-8k": Cell("decode", "small", 8192, slow=("llama-bf16",), base=512),
    "decode-small-32k": Cell("decode", "small", 32768, base=512),
    "prefill-small": Cell("prefill", "small", 512, TRANSFORMERS + LLAMA),
    "prefill-small-8k": Cell("prefill", "small", 8192, TRANSFORMERS[:1], slow=("llama-bf16",)),
    "prefill-small-32k": Cell("prefill", "small", 32768, slow=TRANSFORMERS[:1]),
    "prefill-medium": Cell("prefill", "medium", 512, TRANSFORMERS + LLAMA, usual=False),
    "threads-decode": Cell("decode", "medium", 512, threads=(1, 2)),
    "threads-prefill": Cell("prefill", "small", 2048, threads=(1, 2)),
    "memory": Cell("memory", "small", 32768, usual=False),
    "first-token": Cell("first-token", "", 1),
}


class Process:
    """A system in a process of its own. `reason` says why it cannot work, `missing` that it is not installed."""

    def __init__(self, name: str, path: Path, threads: int) -> None:
        command = [sys.executable, str(Path(__file__).with_name("peer_sides.py")), name, str(path), str(threads)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GGML_NO_BACKTRACE": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        answer = self._answer()
        self.missing: str | None = answer.get("absent")
        self.reason = self.missing if answer else "its process ended while it started"

    def ask(self, **request: Any) -> dict[str, float]:
        """Let it work; seconds, amount and peak memory."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        if not answer:
            raise SystemExit(f"a system ended in the middle of its work: {request}")
        return answer

    def end(self) -> None:
        """Close it; a process ends with its input."""
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer


class Bench:
    """Runs cells and keeps the processes of one size of model between them."""

    def __init__(self, folder: Path, rounds: int, steps: int, slow: bool) -> None:
        self.folder, self.rounds, self.steps, self.slow = folder, rounds, steps, slow
        self.processes: dict[str, Process] = {}
        self.absent: dict[str, str] = {}
        self.size = ""

    def run(self, name: str) -> dict[str, Any]:
        """Measure one cell."""
        cell = CELLS[name]
        if cell.work == "first-token":
            return {"cell": name, "wall_seconds": self._rounds_of(measure_first_token, name)}
        if cell.size != self.size or cell.work == "memory":  # a peak of memory needs a fresh process
            self.end()
            self.size = cell.size
        if cell.work == "memory":
            taken = self._system("hadal").ask(work="prefill", tokens=cell.tokens)
            return {"cell": name, "tokens": cell.tokens, "peak_gib": round(taken["peak_mib"] / 1024, 2)}
        if len(cell.threads) > 1:
            return {"cell": name, "unit": "tokens per wall second"} | self._compare_threads(name, cell)
        return {"cell": name, "unit": "tokens per CPU-second"} | self._compare_systems(name, cell)

    def end(self) -> None:
        """Close every process."""
        for process in self.processes.values():
            process.end()
        self.processes = {}

    def _compare_systems(self, name: str, cell: Cell) -> dict[str, Any]:
        wanted = ["hadal", *cell.systems, *(cell.slow if self.slow else ())]
        systems = [s for s in wanted if self._system(s).reason is None]
        rates: dict[str, list[float]] = {s: [] for s in [*systems, "limit", *(["base"] if cell.base else [])]}
        machine = self._system("machine")
        # Sequences that decode at once share a read of the weights.
        nbytes, flops = int(active_bytes(config_of(cell.size), cell.batch) / cell.batch), prefill_flops(cell.size)
        for number in range(0 if cell.tokens > WARM_LIMIT else -1, self.rounds):
            say(f"{name}: round {number + 1} of {self.rounds}")
            if number == 0:  # what came before was to warm every process
                rates = {system: [] for system in rates}
            if cell.work == "decode":
                rates["limit"].append(_rate(machine.ask(work="read", nbytes=nbytes), "cpu") / nbytes)
            else:
                rates["limit"].append(_rate(machine.ask(work="gemm"), "cpu") / flops)
            for system in systems:
                rates[system].append(_rate(self._ask(system, cell, cell.tokens), "cpu"))
                if system == "hadal" and cell.base:
                    rates["base"].append(_rate(self._ask(system, cell, cell.base), "cpu"))
        limit, base = rates.pop("limit"), rates.pop("base", None)
        scale = nbytes / 1e9 if cell.work == "decode" else flops / 1e9
        kind = f"reads of {nbytes / 1e6:.0f} MB, GB/s" if cell.work == "decode" else "BF16 products, GFLOP/s"
        out: dict[str, Any] = {"systems": {s: _summary(r) for s, r in rates.items()}}
        out["fraction_of_limit"] = {s: _summary(_paired(r, limit), 3) for s, r in rates.items()}
        out["limit"] = {"kind": kind} | _summary([value * scale for value in limit])
        if base:
            out["base"] = {"tokens": cell.base} | _summary(base)
            out["hadal_over_base"] = _summary(_paired(rates["hadal"], base), 3)
        for peer in ("transformers", "llama"):
            types = [s for s in systems if s.startswith(peer)]
            if types:
                best = max(types, key=lambda s: statistics.median(rates[s]))
                out[f"hadal_over_{peer}"] = {"type": best} | _summary(_paired(rates["hadal"], rates[best]), 2)
        return out

    def _compare_threads(self, name: str, cell: Cell) -> dict[str, Any]:
        rates: dict[int, list[float]] = {count: [] for count in cell.threads}
        shares: dict[int, list[float]] = {count: [] for count in cell.threads}
        for number in range(self.rounds):
            say(f"{name}: round {number + 1} of {self.rounds}")
            for count in cell.threads:
                taken = self._ask("hadal" if count == 1 else f"hadal-{count}", cell, cell.tokens)
                rates[count].append(_rate(taken, "wall"))
                shares[count].append(taken["cpu"] / taken["wall"] / count)
        first, last = cell.threads[0], cell.threads[-1]
        return {
            "threads": {str(count): _summary(taken) for count, taken in rates.items()},
            "more_over_one": _summary(_paired(rates[last], rates[first]), 2),
            # Wall time means something only where the threads had their cores to themselves.
            **{f"busy_with_{count}": _summary(taken, 2) for count, taken in shares.items()},
        }

    def _ask(self, system: str, cell: Cell, tokens: int) -> dict[str, float]:
        process = self._system(system)
        if cell.batch > 1:
            return process.ask(work="batch", context=tokens, steps=self.steps, count=cell.batch)
        if cell.work == "decode":
            return process.ask(work="decode", context=tokens, steps=self.steps)
        return process.ask(work="prefill", tokens=tokens)

    def _system(self, name: str) -> Process:
        """The process of a system, started when it is first needed."""
        if name not in self.processes:
            kind, _, variant = name.partition("-")
            form = {"hadal": "official", "machine": "official", "llama": variant}.get(kind, kind)
            threads = int(variant) if kind == "hadal" and variant else 1
            process = Process(kind if kind == "hadal" else name, provide(self.folder, self.size, form, say), threads)
            if process.reason and kind not in self.absent:
                self.absent[kind if process.missing else name] = process.reason
                say(f"{kind if process.missing else name} is left out: {process.reason}")
            self.processes[name] = process
        return self.processes[name]

    def _rounds_of(self, measure: Any, name: str) -> dict[str, Any]:
        taken = []
        for number in range(self.rounds):
            say(f"{name}: round {number + 1} of {self.rounds}")
            taken.append(measure())
        return _summary(taken, 2)


def measure_first_token() -> float:
    """Wall seconds from the command `hadal generate` on the embedded model to its first token."""
    code = "from hadal.cli import main; main()"
    command = [sys.executable, "-c", code, "generate", "Once upon a time", "--max-tokens", "16", "--seed", "0"]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout
        if not process.stdout.read(1):
            raise SystemExit("`hadal generate` wrote nothing; run it alone to see why")
        return time.perf_counter() - began


def print_table(results: list[dict[str, Any]], absent: dict[str, str]) -> None:
    """The cells for a person: a line per figure, with its rounds."""
    for result in results:
        print(f"\n{result['cell']}" + (f" ({result['unit']})" if "unit" in result else ""))
        for key, value in result.items():
            if key in ("systems", "threads"):
                fractions = result.get("fraction_of_limit", {})
                for system, figure in value.items():
                    share = f"  {fractions[system]['median']:7.1%} of limit" if fractions else ""
                    print(f"  {system:20}{figure['median']:12,.1f}{share}   {figure['rounds']}")
            elif isinstance(value, dict) and "median" in value:
                note = " ".join(str(v) for k, v in value.items() if k not in ("median", "rounds"))
                print(f"  {key:20}{value['median']:12,.2f}  {note}   {value['rounds']}")
            elif key not in ("cell", "unit", "fraction_of_limit"):
                print(f"  {key:20}{value:12,}")
    for name, reason in absent.items():
        print(f"\n{name} left out: {reason}")


def say(line: str) -> None:
    """Progress, which is no result."""
    print(line, file=sys.stderr, flush=True)


def _rate(taken: dict[str, float], clock: str) -> float:
    return taken["amount"] / taken[clock]


def _paired(ours: list[float], theirs: list[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _summary(values: list[float], digits: int = 1) -> dict[str, Any]:
    return {"median": round(statistics.median(values), digits), "rounds": [round(v, digits) for v in values]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"one or more of {', '.join(CELLS)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps per measurement")
    parser.add_argument("--slow", action="store_true", help="also ask peers that need minutes per figure")
    parser.add_argument("--llama", type=Path, help="folder of libllama.so; LLAMA_CPP_LIB_PATH if left out")
    parser.add_argument("--models", type=Path, help="keep the models in this folder, which otherwise is temporary")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cells if name not in CELLS]
    if unknown:
        parser.error(f"no cell {unknown[0]!r}; choose from {', '.join(CELLS)}")
    if arguments.rounds < 1 or arguments.steps < 1 or arguments.rounds * arguments.steps > MARGIN - 8:
        parser.error(f"rounds and steps start at 1, and their product ends at {MARGIN - 8}")
    if arguments.llama:
        os.environ["LLAMA_CPP_LIB_PATH"] = str(arguments.llama.resolve())
    torch.set_num_threads(1)
    names = arguments.cells or [name for name, cell in CELLS.items() if cell.usual]
    names.sort(key=lambda name: [*SIZES, ""].index(CELLS[name].size))  # one size of model in memory at a time
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(arguments.models or Path(temporary), arguments.rounds, arguments.steps, arguments.slow)
        results = [bench.run(name) for name in names]
        bench.end()
    if arguments.json:
        print(json.dumps({"rounds": arguments.rounds, "cells": results, "absent": bench.absent}))
    else:
        print_table(results, bench.absent)


if __name__ == "__main__":
    main()
