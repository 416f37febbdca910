from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hadal.checkpoint import CheckpointError, load_model, open_checkpoint
from hadal.config import ConfigError
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint

EXPERT = "layers.2.ffn.experts.3.w2"


def damaged(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    config = tiny_config()
    tensors = random_tensors(config)
    change(tensors)
    return write_checkpoint(tmp_path / "model", config, tensors)


def test_an_official_directory_opens(official: Path) -> None:
    checkpoint = open_checkpoint(official)
    assert (checkpoint.naming, checkpoint.expert_format, checkpoint.dense_format) == ("official", "fp4", "fp8")
    index = json.loads((official / "model.safetensors.index.json").read_text())
    assert sum(entry.nbytes for entry in checkpoint.entries.values()) == index["metadata"]["total_size"]


@pytest.mark.parametrize("announced", [None, "fp8", "fp4"])
def test_the_tensors_decide_the_expert_format_whatever_the_config_says(tmp_path: Path, announced: str | None) -> None:
    for stored in ("fp4", "fp8"):
        tensors = random_tensors(tiny_config(), stored)
        path = write_checkpoint(tmp_path / stored, tiny_config(expert_dtype=announced), tensors)
        checkpoint = open_checkpoint(path)
        assert checkpoint.expert_format == stored == checkpoint.config.expert_format


def test_a_draft_head_that_is_not_stored_is_left_out(plain: Path) -> None:
    checkpoint = open_checkpoint(plain)
    assert checkpoint.config.draft == "none" and checkpoint.config.num_nextn_predict_layers == 0


def test_more_draft_stages_than_announced_are_an_error(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", tiny_config().without_draft(), random_tensors(tiny_config()))
    with pytest.raises(CheckpointError, match=r"1 draft stages \(mtp\.\*\), its config announces 0"):
        open_checkpoint(path)


def test_the_inference_config_serves_where_config_json_is_absent(shared_dir: Path, tmp_path: Path) -> None:
    golden = shared_dir / "golden" / "bf16_a" / "checkpoint"
    for file in golden.glob("model*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "inference").mkdir()
    shutil.copy(golden / "inference_config.json", tmp_path / "inference" / "config.json")
    assert open_checkpoint(tmp_path).config.compress_ratios == open_checkpoint(golden).config.compress_ratios


def remove(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def replace(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(name, make(tensors[name]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove(f"{EXPERT}.scale"), [f"{EXPERT}.scale", "missing"]),
        (remove("norm.weight"), ["norm.weight", "missing"]),
        (remove("layers.0.attn.wq_a.weight"), ["layers.0.attn.wq_a.weight", "missing"]),
        (
            replace(f"{EXPERT}.weight", lambda t: t[:, :8].contiguous()),
            [f"{EXPERT}.weight", "shape [64, 8]", "[64, 16]"],
        ),
        (
            replace("layers.1.attn.wkv.weight", lambda t: t.float()),
            ["layers.1.attn.wkv.weight", "dtype F32", "F8_E4M3"],
        ),
        (replace("layers.0.ffn.gate.tid2eid", lambda t: t.float()), ["gate.tid2eid", "dtype F32", "I64 or I32"]),
        (replace("head.weight", lambda t: t.half()), ["head.weight", "dtype F16", "BF16 or F32"]),
        (replace("layers.0.attn.wq_a.weight", lambda t: t.float().half()), ["wq_a.weight", "F16", "F8_E4M3"]),
        (replace("embed.weight", lambda t: t[:-1].contiguous()), ["embed.weight", "shape [95, 64]", "[96, 64]"]),
        (lambda tensors: tensors.__setitem__("layers.9.extra", torch.ones(1)), ["layers.9.extra", "does not have"]),
    ],
)
def test_bad_tensors_are_named_before_any_weight_is_read(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], words: list[str]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(damaged(tmp_path, change))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and message.count(". ") == 0 and ";" in message  # one sentence with its remedy


def test_a_nan_scale_is_an_error_before_the_model_exists(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERT}.scale"].view(torch.uint8)[3, 0] = 255

    path = damaged(tmp_path, spoil)
    for weights in ("packed", "dense"):
        with pytest.raises(CheckpointError, match=rf"model-00001.*{EXPERT}\.scale holds NaN.*fetch"):
            load_model(path, device="cpu", weights=weights)


def test_repeated_embeddings_of_other_exporters_are_passed_over(tmp_path: Path) -> None:
    path = damaged(tmp_path, lambda tensors: tensors.__setitem__("mtp.0.head.weight", tensors["head.weight"].clone()))
    assert open_checkpoint(path).config.draft == "mtp"


@pytest.fixture
def copy(official: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(official, tmp_path / "copy"))


def test_a_missing_shard_is_named_with_a_tensor_in_it(copy: Path) -> None:
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shard .*model-00002-of-00002\.safetensors with tensor .* is missing"):
        open_checkpoint(copy)


def test_a_truncated_shard_is_named(copy: Path) -> None:
    shard = copy / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is truncated: tensor"):
        open_checkpoint(copy)


def test_a_tensor_that_is_not_where_the_index_says_is_named(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["embed.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"00002-of-00002\.safetensors lacks tensor embed\.weight"):
        open_checkpoint(copy)


def test_an_index_cannot_lead_out_of_the_directory(copy: Path) -> None:
    index = copy / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["embed.weight"] = "../model/model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="missing"):
        open_checkpoint(copy)


def test_a_tensor_stored_twice_is_an_error(copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    shutil.copy(copy / "model-00001-of-00002.safetensors", copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(copy)


def test_an_index_is_not_needed(copy: Path) -> None:
    (copy / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(copy).headers) == 2


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "\0"])
def test_a_damaged_index_is_named(copy: Path, content: str) -> None:
    (copy / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(copy)


def test_directories_without_a_model_say_what_is_missing(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        open_checkpoint(tmp_path / "nothing")
    for file in copy.glob("model*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors files"):
        open_checkpoint(copy)
    (copy / "config.json").write_text('{"hidden_size": 4}')
    with pytest.raises(ConfigError, match="vocab_size"):
        open_checkpoint(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(copy)
