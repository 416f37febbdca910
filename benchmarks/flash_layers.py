"""One layer of each kind at V4-Flash's real widths, and what a whole model of them would do.

    python benchmarks/flash_layers.py                  # about 4 GB of memory per layer, one after the other
    python benchmarks/flash_layers.py --threads 2 --context 8192

Weights are random bytes in the official FP4/FP8/BF16 layout; every routed expert of a layer has the same values at
addresses of its own, so memory traffic is the real one. Tokens per second of the whole model follow from the layers'
times, each taken as often as its kind occurs, and the head's; embedding and sampling are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hadal.config import ModelConfig, preset
from hadal.kernels.cpu import runner as cpu_runner
from hadal.kernels.cpu.packed import Packing
from hadal.kernels.cpu.target import detect
from hadal.kernels.cpu.weights import Plan, plan_packing
from hadal.model import Model
from hadal.model.rope import frequencies
from hadal.quant import PackedWeight

FLASH = preset("flash").without_draft()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--context", type=int, default=2048, help="tokens before the measured ones")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the measured prefill")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    counts = Counter(layer.attention for layer in FLASH.layers)
    decode = prefill = 0.0
    for kind, count in counts.items():
        row = measure(kind, arguments)
        print(json.dumps({"layer": kind, "layers of this kind": count, **row}), flush=True)
        decode += count * row["decode_ms"]
        prefill += count * row["prefill_ms"]
        head = row["head_ms"]
    whole = {
        "model": "V4-Flash, extrapolated", "threads": arguments.threads, "context": arguments.context,
        "decode_seconds_per_token": round((decode + head) / 1e3, 3),
        "prefill_tokens_per_second": round(arguments.prompt / (prefill + head) * 1e3, 1),
        "arithmetic": " + ".join(f"{n} x {k}" for k, n in counts.items()) + " + head",
    }  # fmt: skip
    print(json.dumps(whole))


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of one layer in decode and prefill, and of the head; medians of wall time."""
    runner = build(kind)
    generator = torch.Generator().manual_seed(0)
    state = runner.new_state()
    ids = torch.randint(0, runner.config.vocab_size, (arguments.context,), generator=generator)
    runner.streams(ids.tolist(), [len(ids)], [state])
    prompt = torch.randint(0, runner.config.vocab_size, (arguments.prompt,), generator=generator)

    def prefill() -> None:
        copy = state.clone()
        runner.streams(prompt.tolist(), [len(prompt)], [copy])

    def decode() -> None:
        runner.streams(prompt[:1].tolist(), [1], [state])

    def with_head() -> None:
        runner.advance(prompt[:1].tolist(), [1], [state], [1])

    times = {name: [] for name in ("prefill", "decode", "with_head")}
    for _ in range(arguments.repeats):
        for name, work, count in (("decode", decode, 10), ("with_head", with_head, 10), ("prefill", prefill, 1)):
            times[name].append(timed(work, count))
    median = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    return {
        "decode_ms": round(median["decode"], 3), "prefill_ms": round(median["prefill"], 1),
        "head_ms": round(median["with_head"] - median["decode"], 3),
    }  # fmt: skip


def timed(work: Callable[[], None], count: int) -> float:
    """Seconds of one of `count` runs after a warm one."""
    work()
    began = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - began) / count


def build(kind: str, **changes: Any) -> cpu_runner.CpuRunner:
    """A runner of one layer of the kind, and the head; `changes` to the configuration, fewer experts for instance."""
    ratio = next(layer.ratio for layer in FLASH.layers if layer.attention == kind)
    config = FLASH.replace(num_hidden_layers=1, compress_ratios=(ratio,), num_hash_layers=0, **changes)
    isa, reason = detect()
    assert isa is not None, reason
    layer = config.layers[0]
    original = cpu_runner.plan_packing
    cpu_runner.plan_packing = _repeat_experts  # packing every one of 256 equal experts would take minutes
    try:
        regime = frequencies(config, layer)
        return cpu_runner.CpuRunner(config, isa, _RandomWeights(config), [regime, regime], None)
    finally:
        cpu_runner.plan_packing = original


def _repeat_experts(config: ModelConfig, lookup: Any) -> Plan:
    """The packing of a layer whose experts are all the first one, copied."""
    first = plan_packing(config, lambda path: lookup(path)[:1] if ".experts." in path else lookup(path))
    single = {item.name: item for item in first.items}
    plan = plan_packing(config, lookup)
    return Plan(plan.matrices, [_repeated(item, single[item.name]) for item in plan.items])


def _repeated(item: Packing, single: Packing) -> Packing:
    made = torch.empty(0, dtype=torch.uint8)

    def write(out: Tensor, part: int) -> None:
        nonlocal made
        if not part:
            single.write(out, 0)
            made = out
        else:
            out[:] = made

    return dataclasses.replace(item, write=write)


class _RandomWeights:
    """Random parameters in the official layout, by attribute path."""

    def __init__(self, config: ModelConfig) -> None:
        with torch.device("meta"):
            self._model = Model(config, backend="reference")
        self._generator = torch.Generator().manual_seed(0)
        self._made: dict[str, Any] = {}

    def __call__(self, path: str) -> Any:
        if path not in self._made:
            self._made[path] = self._make(path)
        return self._made[path]

    def _make(self, path: str) -> Any:
        owner, _, name = path.rpartition(".")
        shape = tuple(getattr(self._model.get_submodule(owner), name).shape)
        if ".experts." in path:
            return [self._quantised("fp4", shape[1:])] * shape[0]
        if ".shared." in path or (name in ("wq_a", "wq_b", "wkv", "wo_a", "wo_b") and "compressor" not in path):
            return self._quantised("fp8", shape)
        values = torch.randn(shape, generator=self._generator)
        return values.bfloat16() * shape[-1] ** -0.5 if len(shape) == 2 else 1 + 0.1 * values

    def _quantised(self, form: Any, shape: tuple[int, ...]) -> PackedWeight:
        rows, columns = shape
        high, block = (255, (1, 32)) if form == "fp4" else (119, (128, 128))
        codes = torch.randint(0, high, (rows, columns // (2 if form == "fp4" else 1)), generator=self._generator)
        scales = torch.full((-(-rows // block[0]), -(-columns // block[1])), 127 - 6, dtype=torch.uint8)
        bytes_ = codes.to(torch.uint8)
        kept = bytes_ if form == "fp4" else bytes_.view(torch.float8_e4m3fn)
        return PackedWeight(form, kept, scales.view(torch.float8_e8m0fnu), (rows, columns))


if __name__ == "__main__":
    main()
