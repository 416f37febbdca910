"""Hadal and transformers in turn on the same random model: prefill and decode tokens per CPU-second, one thread.

    python benchmarks/transformers_pair.py --rounds 3
    python benchmarks/transformers_pair.py --long 32768      # Hadal alone: a long prefill and its peak memory

The model is `small` (6 layers, width 512, 67 M parameters). Both sides run in the type that suits them best out of
float32 and bfloat16; every round measures A, B, A, B in the same minutes; the ratio of medians is what to quote.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

SMALL = dict(
    vocab_size=8192, hidden_size=512, moe_intermediate_size=256, num_hidden_layers=6, num_attention_heads=8,
    head_dim=512, qk_rope_head_dim=64, q_lora_rank=256, n_routed_experts=16, num_experts_per_tok=4, o_groups=4,
    o_lora_rank=128, index_n_heads=8, index_head_dim=128, index_topk=512, num_key_value_heads=1, n_shared_experts=1,
    hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, sliding_window=128, scoring_func="sqrtsoftplus", norm_topk_prob=True,
    routed_scaling_factor=1.5, swiglu_limit=10.0, num_hash_layers=3, num_nextn_predict_layers=0, rms_norm_eps=1e-6,
    rope_theta=10000.0, compress_rope_theta=160000.0, max_position_embeddings=1048576,
    compress_ratios=[0, 0, 4, 128, 4, 128],
)  # fmt: skip
YARN = {"factor": 16, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 65536}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill and of context before decode")
    parser.add_argument("--steps", type=int, default=16, help="decode steps per measurement")
    parser.add_argument("--long", type=int, help="only prefill this many tokens with Hadal and print the peak memory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.long:
        print(json.dumps(measure_long(arguments.long)))
        return
    rows: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        peer = build_peer()
        peer.save_pretrained(folder)
        sides = {
            (name, dtype): make(dtype, folder)
            for dtype in DTYPES
            for name, make in (("hadal", make_hadal), ("transformers", make_transformers))
        }
        ids = torch.randint(3, SMALL["vocab_size"], (arguments.prompt + 1,), generator=torch.Generator().manual_seed(0))
        for _ in range(arguments.rounds):
            for (name, dtype), (prefill, decode) in sides.items():
                rows.setdefault((name, dtype, "prefill"), []).append(prefill(ids[:-1]))
                rows.setdefault((name, dtype, "decode"), []).append(decode(ids, arguments.steps))
    report(rows)


def report(rows: dict[tuple[str, str, str], list[float]]) -> None:
    """One JSON line per cell, then the ratio of each side's best type."""
    median = {key: statistics.median(values) for key, values in rows.items()}
    for (name, dtype, phase), values in rows.items():
        cell = {
            "system": name,
            "dtype": dtype,
            "phase": phase,
            "tokens_per_cpu_second": round(median[name, dtype, phase], 1),
        }
        print(json.dumps(cell | {"rounds": [round(v, 1) for v in values]}))
    for phase in ("prefill", "decode"):
        best = {name: max(median[name, d, phase] for d in DTYPES) for name in ("hadal", "transformers")}
        print(json.dumps({"phase": phase, "hadal_over_transformers": round(best["hadal"] / best["transformers"], 2)}))


def build_peer() -> Any:
    """The random model, with no constant left where the default initialisation has one."""
    import transformers

    make_config: Any = transformers.DeepseekV4Config
    torch.manual_seed(0)
    peer = transformers.DeepseekV4ForCausalLM(make_config(**SMALL, rope_parameters={"rope_type": "yarn", **YARN}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in [*peer.named_parameters(), *peer.named_buffers()]:
            if name.endswith("tid2eid"):
                value.copy_(torch.rand(value.shape[0], 16, generator=generator).argsort(-1)[:, : value.shape[1]])
            elif value.dim() >= 2 and "inv_freq" not in name and "embed" not in name:
                value.mul_(value.shape[-1] ** -0.5 / 0.02)
    return peer


Side = tuple[Callable[[torch.Tensor], float], Callable[[torch.Tensor, int], float]]


def make_hadal(dtype: str, folder: str) -> Side:
    """Prefill and decode of Hadal, in tokens per CPU-second."""
    from hadal import load_model

    model = load_model(folder, device="cpu", dtype=dtype, fake_quant=False)

    def prefill(ids: torch.Tensor) -> float:
        return rate(len(ids), lambda: model.logits_ragged(ids, [len(ids)], [model.new_state()]))

    def decode(ids: torch.Tensor, steps: int) -> float:
        state = model.new_state()
        model.logits_ragged(ids[:-1], [len(ids) - 1], [state])
        return rate(steps, lambda: [model.logits_ragged(ids[-1:], [1], [state]) for _ in range(steps)])

    return prefill, decode


def make_transformers(dtype: str, folder: str) -> Side:
    """The same with transformers' own cache."""
    from transformers import DeepseekV4ForCausalLM, DynamicCache

    model = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()

    @torch.no_grad()
    def run(ids: torch.Tensor, cache: Any) -> None:
        model(ids[None], past_key_values=cache, use_cache=True, logits_to_keep=1)

    def prefill(ids: torch.Tensor) -> float:
        return rate(len(ids), lambda: run(ids, DynamicCache(config=model.config)))

    def decode(ids: torch.Tensor, steps: int) -> float:
        cache = DynamicCache(config=model.config)
        run(ids[:-1], cache)
        return rate(steps, lambda: [run(ids[-1:], cache) for _ in range(steps)])

    return prefill, decode


def rate(tokens: int, work: Callable[[], object], repeats: int = 3) -> float:
    """Tokens per CPU-second, median of `repeats` after one warm run."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return tokens / statistics.median(seconds)


def measure_long(tokens: int) -> dict[str, Any]:
    """Prefill in chunks of 2,048 in bfloat16; peak memory of the whole process, the model's included."""
    from hadal.config import ModelConfig, RopeScaling
    from hadal.model import Model, Numerics

    names = {k: tuple(v) if isinstance(v, list) else v for k, v in SMALL.items()}
    config = ModelConfig(**names, rope_scaling=RopeScaling(**YARN), quantization=False, expert_dtype=None)
    model = Model(config, Numerics(dtype=torch.bfloat16))
    model.init_weights(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if not name.endswith(
            ("head", "norm", "fn", "base", "scale", "sink", "ape", "gate.weight", "compressor.wkv", "compressor.wgate")
        ):
            parameter.data = parameter.data.bfloat16()
    ids = torch.randint(0, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
    state = model.new_state()
    began = time.process_time()
    for part in ids.split(2048):
        model.logits_ragged(part, [len(part)], [state])
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tokens": tokens, "tokens_per_cpu_second": round(tokens / seconds, 1), "peak_gib": round(peak, 2),
        "state_mib": round(state.nbytes() / 2**20, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
