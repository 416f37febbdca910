"""The random model `small` as transformers builds it (6 layers, width 512, 67 M parameters), and the clock for it."""

from __future__ import annotations

import statistics
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


def rate(tokens: int, work: Callable[[], object], repeats: int = 3) -> float:
    """Tokens per CPU-second, median of `repeats` after one warm run."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return tokens / statistics.median(seconds)
