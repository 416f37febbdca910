from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from hadal.checkpoint import shard_plan, tensor_table
from hadal.config import ModelConfig, preset
from hadal.model import Model
from tests.checkpoint.tiny import dspark_config, tiny_config


@pytest.mark.parametrize(
    ("release", "tensors", "nbytes", "shards"),
    [
        ("flash", 69_187, 159_609_485_896, 46),
        ("flash-0731", 72_317, 166_878_536_440, 48),
        ("pro", 145_116, 864_704_792_696, 64),
        ("pro-0813", 149_782, 892_727_580_904, 66),
    ],
)
def test_the_tensor_list_has_the_published_size(release: str, tensors: int, nbytes: int, shards: int) -> None:
    table = list(tensor_table(preset(release)))
    assert (len(table), sum(spec.nbytes for spec in table)) == (tensors, nbytes)
    assert len({spec.name for spec in table}) == tensors
    plan = shard_plan(table)
    assert len(plan) == shards
    assert plan[0] == ["embed.weight"]
    head = 1 + preset(release).num_hidden_layers
    assert set(plan[head]) == {"head.weight", "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"}


def test_the_preview_flash_has_the_published_dtypes() -> None:
    census = Counter(spec.dtype for spec in tensor_table(preset("flash")))
    assert census == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}


def test_base_experts_are_fp8_in_blocks() -> None:
    table = {spec.name: spec for spec in tensor_table(preset("flash-base"))}
    weight, scale = (table[f"layers.5.ffn.experts.7.w1.{role}"] for role in ("weight", "scale"))
    assert (weight.dtype, weight.shape) == ("F8_E4M3", (2048, 4096))
    assert (scale.dtype, scale.shape) == ("F8_E8M0", (16, 32))


def test_a_small_model_fits_into_one_shard() -> None:
    assert len(shard_plan(tensor_table(preset("nano")))) == 1


@pytest.mark.parametrize("config", [tiny_config(), dspark_config(), preset("flash-0731"), preset("pro")], ids=str)
def test_every_model_parameter_is_filled_by_exactly_one_entry(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Model(config)
    shapes = {name: tuple(t.shape) for name, t in [*model.named_parameters(), *model.named_buffers()]}
    filled: dict[str, list[int | None]] = {}
    for spec in tensor_table(config, expert_format="bf16", dense_format="bf16"):
        expert = () if spec.expert is None else (config.n_routed_experts,)
        assert shapes[spec.parameter] == (*expert, *spec.shape), spec.name
        filled.setdefault(spec.parameter, []).append(spec.expert)
    assert filled.keys() == shapes.keys()
    assert all(rows in ([None], list(range(config.n_routed_experts))) for rows in filled.values())


@pytest.mark.parametrize("name", ["flash_a", "pro_a", "bf16_a", "dspark_a"])
def test_names_dtypes_and_shapes_equal_the_golden_headers(shared_dir: Path, name: str) -> None:
    folder = shared_dir / "golden" / name / "checkpoint"
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored |= {key: (value["dtype"], tuple(value["shape"])) for key, value in header.items()}
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config = config.replace(expert_dtype=None if name == "bf16_a" else "fp4")
    assert {spec.name: (spec.dtype, spec.shape) for spec in tensor_table(config)} == stored
