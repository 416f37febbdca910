"""The random models of the peer benchmarks, with the same weights for every system.

The official FP4/FP8 layout is the original. transformers gets it dequantised, llama.cpp as GGUF in three types.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from llama_file import TYPES, write_gguf
from transformers_pair import SMALL, YARN

from hadal import save_model
from hadal.checkpoint import convert
from hadal.config import ModelConfig, RopeScaling
from hadal.model import Model
from hadal.plan import count

MEDIUM = SMALL | dict(
    vocab_size=16384, hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, q_lora_rank=512,
    n_routed_experts=48, num_experts_per_tok=6, o_groups=8, index_n_heads=16,
    compress_ratios=[0, 0, 4, 128, 4, 128, 4, 128],
)  # fmt: skip
SIZES = {"small": SMALL, "medium": MEDIUM}


def config_of(size: str) -> ModelConfig:
    """The configuration of `small` (67 M parameters) or `medium` (417 M), announcing the official formats."""
    values: Any = {key: tuple(v) if isinstance(v, list) else v for key, v in SIZES[size].items()}
    yarn: Any = YARN
    return ModelConfig(**values, rope_scaling=RopeScaling(**yarn), quantization=True, expert_dtype="fp4")


def prefill_flops(size: str) -> int:
    """Operations of a prompt token: two per active weight, the head left out because it sees the last token only."""
    config = config_of(size)
    return 2 * (count(config).active_parameters - config.vocab_size * config.hidden_size)


def path_of(folder: Path, size: str, form: str) -> Path:
    """Where a form of the model lies: "official", "transformers", or a type of GGUF."""
    return folder / size / (f"{form}.gguf" if form in TYPES else form)


def provide(folder: Path, size: str, form: str, progress: Callable[[str], None]) -> Path:
    """The path of a form of the model, written first when it is missing."""
    path = path_of(folder, size, form)
    if path.exists():
        return path
    source = path if form == "official" else provide(folder, size, "official", progress)
    progress(f"writing {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    if form == "official":
        save_model(_random_model(size), unfinished, quantize="fp4")
    elif form == "transformers":
        convert(source, unfinished, names="hf")
    else:
        write_gguf(unfinished, source, form)
    return unfinished.rename(path)


@torch.no_grad()
def _random_model(size: str) -> Model:
    """Random weights, with no constant left where the initialisation for training has one."""
    model = Model(config_of(size))
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("norm", "attn_sink", ".ape", ".base", ".bias")):
            value += 0.1 * torch.randn(value.shape, generator=generator)
    return model
