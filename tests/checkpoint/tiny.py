"""Small random checkpoints in the official layout, written with the safetensors library from random codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hadal.checkpoint import TensorSpec, tensor_table
from hadal.config import ModelConfig, RopeScaling, WeightFormat


def tiny_config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = dict(
        vocab_size=96, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=48, qk_rope_head_dim=16,
        q_lora_rank=32, o_lora_rank=16, o_groups=2, sliding_window=8, compress_ratios=(0, 8, 4, 8, 0), index_n_heads=8,
        index_head_dim=32, index_topk=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        num_hash_layers=1, routed_scaling_factor=1.5, swiglu_limit=10.0, num_nextn_predict_layers=1,
        rope_scaling=RopeScaling(factor=4, original_max_position_embeddings=64), max_position_embeddings=4096,
    )  # fmt: skip
    return ModelConfig(**(values | changes))


def dspark_config() -> ModelConfig:
    return tiny_config(
        compress_ratios=(0, 8, 4, 8, 0, 0, 0), dspark_block_size=3, dspark_noise_token_id=5,
        dspark_target_layer_ids=(1, 2, 3), dspark_markov_rank=8,
    )  # fmt: skip


def random_tensor(spec: TensorSpec, config: ModelConfig, generator: torch.Generator) -> Tensor:
    """A plausible stored tensor: weights of unit output variance, distinct experts per hash row, no NaN codes."""
    shape = spec.shape
    if spec.dtype == "I64":
        order = torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(-1)
        return order[:, : shape[1]].contiguous()
    if spec.dtype == "I8":
        return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    if spec.dtype == "F8_E4M3":
        return torch.randn(shape, generator=generator).mul(64).clamp(-448, 448).to(torch.float8_e4m3fn)
    if spec.dtype == "F8_E8M0":
        low = 121 if spec.family == "expert" else 116
        exponents = torch.randint(low, low + 3, shape, generator=generator, dtype=torch.uint8)
        return exponents.view(torch.float8_e8m0fnu)
    values = torch.randn(shape, generator=generator)
    if spec.name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    elif len(shape) == 2:
        values = values * shape[1] ** -0.5
    return values.bfloat16() if spec.dtype == "BF16" else values


def random_tensors(
    config: ModelConfig, expert: WeightFormat = "fp4", dense: WeightFormat = "fp8", seed: int = 0
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    table = tensor_table(config, expert_format=expert, dense_format=dense)
    return {spec.name: random_tensor(spec, config, generator) for spec in table}


def write_checkpoint(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, Tensor],
    *,
    shards: int = 1,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Shards cut by name order, an index and config.json."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, path / file, metadata=metadata)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=0))
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    return path
