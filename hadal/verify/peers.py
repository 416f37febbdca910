"""Hugging Face transformers as an oracle: same weights, same tokens, FP32, prefill, decode and gradients.

transformers computes V4 without quantisers and, on a left-padded batch, wrongly; that error is measured too, as a fact
about the peer, beside the same batch computed here.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.checkpoint import load_model
from hadal.model import Model
from hadal.verify.report import Check, skipped, within, worst

GROUP = "transformers f32"
LIMIT = 2e-5
PROMPTS = (200, 137, 61)


def check_transformers(seed: int = 0) -> list[Check]:
    """Compare with a random model built by transformers; skipped when transformers is not installed."""
    try:
        from transformers import DeepseekV4ForCausalLM
    except ImportError:
        return [skipped(GROUP, "prefill, decode, gradients", "transformers with DeepSeek-V4 is not installed")]
    torch.manual_seed(seed)
    peer = _random_peer(DeepseekV4ForCausalLM)
    ids = torch.randint(3, peer.config.vocab_size, (401,), generator=torch.Generator().manual_seed(seed))
    with tempfile.TemporaryDirectory() as scratch:
        model = _reload(peer, Path(scratch) / "weights")
        with torch.no_grad():
            wanted = peer(ids[None, :400], use_cache=False).logits[0]
        prefill = _gap(model.logits(ids[:400]), wanted)
        state = model.new_state()
        model.logits(ids[:300], state)
        steps = [model.logits(ids[i : i + 1], state) for i in range(300, 400)]
        decode = _gap(torch.cat(steps), wanted[300:])
        ours, theirs = _padded_batch(peer, model, ids)
        gradients = _gradient_gap(peer, model, ids, Path(scratch) / "gradients")  # last: it spends the peer's weights
    return [
        within(GROUP, "prefill of 400", prefill, LIMIT),
        within(GROUP, "prefill of 300, 100 decode steps", decode, LIMIT),
        within(GROUP, "gradients", gradients, LIMIT, "largest difference over the largest gradient, any parameter"),
        within(
            GROUP, "ragged batch of 200, 137, 61", ours, LIMIT, f"transformers with left padding is off by {theirs:.2g}"
        ),
    ]


def _random_peer(build: Any) -> Any:
    """A 5-layer model with window, CSA and HCA layers, hash layers, and no constant left at its initial value.

    Sixteen indexer heads, because with few of them many scores are exactly zero and transformers leaves ties open.
    """
    import transformers

    make_config: Any = transformers.DeepseekV4Config  # its signature hides the keys it passes on
    config = make_config(
        vocab_size=512, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, qk_rope_head_dim=16, q_lora_rank=64, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, o_groups=2, o_lora_rank=32, index_n_heads=16, index_head_dim=32, index_topk=16,
        hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, sliding_window=32, scoring_func="sqrtsoftplus",
        norm_topk_prob=True, routed_scaling_factor=1.5, swiglu_limit=2.5, num_hash_layers=2,
        num_nextn_predict_layers=0, rms_norm_eps=1e-6, rope_theta=10000.0, compress_rope_theta=160000.0,
        max_position_embeddings=1048576, compress_ratios=[0, 128, 4, 128, 4],
        rope_parameters={"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 65536},
        bos_token_id=0, eos_token_id=1, pad_token_id=2, attn_implementation="eager",
    )  # fmt: skip
    peer = build(config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in [*peer.named_parameters(), *peer.named_buffers()]:
            if name.endswith("tid2eid"):
                order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(-1)
                value.copy_(order[:, : config.num_experts_per_tok])
            elif name.endswith(("sinks", "position_bias", "e_score_correction_bias", ".base", "hc_base")):
                value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
            elif name.endswith("norm.weight"):
                value.copy_(1 + 0.1 * torch.randn(value.shape, generator=generator))
            elif value.dim() >= 2 and "inv_freq" not in name and "embed" not in name:
                value.mul_(value.shape[-1] ** -0.5 / config.initializer_range)
    return peer


def _reload(peer: Any, directory: Path) -> Model:
    peer.save_pretrained(directory)
    return load_model(directory, device="cpu", dtype="float32", fake_quant=False)


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max())


def _gradient_gap(peer: Any, model: Model, ids_T: Tensor, directory: Path) -> float:
    """Largest relative difference of any parameter's gradient of the mean next-token loss.

    The peer's gradients travel as a checkpoint of their own, so that the import code pairs the names.
    """
    peer.zero_grad()
    F.cross_entropy(peer(ids_T[None, :400], use_cache=False).logits[0], ids_T[1:401]).backward()
    out = model.training_forward(ids_T[:400], [0, 400], indexer_loss=False)
    F.cross_entropy(out.logits_TV, ids_T[1:401]).backward()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        wanted = dict(_reload(peer, directory).named_parameters())
    gaps = []
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        target = wanted[name].detach()
        scale, gap = float(target.abs().max()), _gap(found, target)
        gaps.append(gap / scale if scale > 1e-9 else gap)
    return worst(gaps)


@torch.no_grad()
def _padded_batch(peer: Any, model: Model, ids_T: Tensor) -> tuple[float, float]:
    """Error of a ragged batch against each prompt alone: packed here, left-padded in transformers."""
    starts = (0, 100, 250)
    prompts = [ids_T[s : s + n] for s, n in zip(starts, PROMPTS, strict=True)]
    alone = [model.logits(p) for p in prompts]
    lengths = list(PROMPTS)
    packed = model.logits_ragged(torch.cat(prompts), lengths, [model.new_state() for _ in prompts], last_only=False)
    ours = worst(_gap(f, w) for f, w in zip(packed.split(lengths), alone, strict=True))
    longest = max(lengths)
    padded = torch.full((len(prompts), longest), 2)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    logits = peer(padded, attention_mask=mask, use_cache=False).logits
    theirs = worst(_gap(logits[i, longest - len(p) :], alone[i]) for i, p in enumerate(prompts))
    return ours, theirs
