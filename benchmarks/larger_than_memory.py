"""A checkpoint larger than a process's memory limit: packed, prefilled and decoded from disk, with the same bits.

    python benchmarks/larger_than_memory.py                       # 3 GB on disk, 1 GiB of memory
    python benchmarks/larger_than_memory.py --gigabytes 20 --limit 4 --folder DIR

Writes a random checkpoint in the official layout, 256 experts per layer and 6 per token as in V4-Flash, and runs it in
two processes: one may use as much private memory (RLIMIT_DATA: heap, stacks and experts) as the limit says, and packs
the weights under it; the other has no limit. Token ids are random and so are the weights, which leaves little to keep.
Both print tokens per second, peak memory and a digest of all logits.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hadal import load_model
from hadal.checkpoint import tensor_table
from hadal.checkpoint.names import TensorSpec
from hadal.checkpoint.safetensors import FileWriter
from hadal.config import ModelConfig

LAYER_GB = 0.225  # on disk
PROMPT, DECODED = 64, 64
_TAGS = {
    "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16,
    "F32": torch.float32,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=float, default=1.0, help="GiB of private memory for the limited process")
    parser.add_argument("--experts", type=float, help="GiB of that for experts (default: half)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="a disk's folder for the files (default: temporary files')")
    parser.add_argument("--child", choices=("limited", "free"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(run(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = write_checkpoint(Path(folder) / "model", round(arguments.gigabytes / LAYER_GB))
        size = sum(file.stat().st_size for file in path.iterdir())
        print(json.dumps({"checkpoint_gb": round(size / 1e9, 2), "limit_gib": arguments.limit}), flush=True)
        found = [child(kind, path) for kind in ("limited", "free")]
    same = found[0]["digest"] == found[1]["digest"]
    print(json.dumps({"logits equal bit for bit": same}))
    sys.exit(not same)


def child(kind: str, path: Path) -> dict[str, Any]:
    """Run this program again with the same options, as the process that does the work."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", kind, "--folder", str(path)]
    environment = os.environ | {"HADAL_CACHE": str(path.parent / "cache")}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model, continue a random prompt with random tokens, and tell what that took."""
    torch.set_num_threads(arguments.threads)
    memory = None
    if arguments.child == "limited":
        limit = int(arguments.limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        memory = int((arguments.experts or arguments.limit / 2) * 2**30)
    began = time.perf_counter()
    model = load_model(arguments.folder, "cpu", expert_memory=memory)
    loaded = time.perf_counter() - began
    assert model.runner is not None
    residency = model.runner.residency
    after_load = peak()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (PROMPT + DECODED,), generator=generator)
    state, rows = model.new_state(), []
    began = time.perf_counter()
    rows.append(model.logits(ids[:PROMPT], state))
    prefilled = time.perf_counter() - began
    slots = None if residency is None else residency.slots
    if slots is not None:
        slots.asked = slots.hits = slots.bytes_read = 0
    began = time.perf_counter()
    rows += [model.logits(ids[i : i + 1], state) for i in range(PROMPT, len(ids))]
    decoded = time.perf_counter() - began
    facts = {"process": arguments.child, "load_s": round(loaded, 1), "peak_mb_after_load": after_load}
    if residency is not None and slots is not None:
        facts |= {
            "estimate": str(residency.estimate), "expert_hits": round(residency.hit_rate, 3),
            "read_mb_per_token": round(slots.bytes_read / DECODED / 1e6, 1),
            "expert_mb": slots.count * slots.nbytes >> 20,
        }  # fmt: skip
    return facts | {
        "prefill_tokens_per_s": round(PROMPT / prefilled, 1), "decode_tokens_per_s": round(DECODED / decoded, 2),
        "peak_mb": peak(), "now_mb": {name: status(name) for name in ("VmRSS", "RssAnon", "RssFile")},
        "digest": hashlib.sha256(torch.cat(rows).numpy().tobytes()).hexdigest()[:16],
    }  # fmt: skip


def peak() -> int:
    """Most resident megabytes so far."""
    return status("VmHWM")


def status(name: str) -> int:
    """A figure of the kernel about this process, in megabytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) // 1024


def write_checkpoint(path: Path, layers: int) -> Path:
    """A random model of V4-Flash's kind, a quarter as wide, one file per layer."""
    config = ModelConfig(
        vocab_size=8192, hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, head_dim=256,
        qk_rope_head_dim=64, q_lora_rank=256, o_lora_rank=256, o_groups=4, n_routed_experts=256, num_experts_per_tok=6,
        moe_intermediate_size=512, num_hash_layers=3, compress_ratios=(0, 0, *(4, 128) * layers)[:layers],
        index_n_heads=8, index_head_dim=128, index_topk=128, num_nextn_predict_layers=0,
        sliding_window=128, routed_scaling_factor=1.5, swiglu_limit=10.0,
    )  # fmt: skip
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    specs: dict[int, list[TensorSpec]] = {}
    for spec in tensor_table(config):
        specs.setdefault(spec.group, []).append(spec)
    weight_map = {}
    for group, part in specs.items():
        file = f"model-{group:05d}.safetensors"
        with FileWriter(path / file, [(s.name, s.dtype, s.shape) for s in part]) as writer:
            for spec in part:
                writer.write(spec.name, random_tensor(spec, config, generator))
        weight_map |= dict.fromkeys((s.name for s in part), file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path


def random_tensor(spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> torch.Tensor:
    """Values that keep activations near 1 and tokens apart, so that they choose different experts."""
    shape = spec.shape
    if spec.dtype == "I64":
        return (
            torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(-1)[:, : shape[1]].contiguous()
        )
    if spec.dtype == "I8":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if spec.dtype == "F8_E4M3":
        return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    if spec.dtype == "F8_E8M0":
        return torch.full(shape, 120 if spec.family == "expert" else 122, dtype=torch.uint8).view(_TAGS["F8_E8M0"])
    values = torch.randn(shape, generator=generator)
    if spec.name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    elif spec.name != "embed.weight":
        values *= shape[-1] ** -0.5
    return values.to(_TAGS[spec.dtype])


if __name__ == "__main__":
    main()
