from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from hadal.checkpoint import CheckpointError, inspect, shard_plan, tensor_table
from hadal.checkpoint.hf import hf_config
from hadal.config import ConfigError, ModelConfig, preset


def write_index(path: Path, config: ModelConfig) -> Path:
    table = list(tensor_table(config))
    plan = shard_plan(table)
    weight_map = {n: f"model-{i:05d}-of-{len(plan):05d}.safetensors" for i, names in enumerate(plan, 1) for n in names}
    content = {"metadata": {"total_size": sum(spec.nbytes for spec in table)}, "weight_map": weight_map}
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "kinds", "total", "active", "kv", "nbytes", "shards"),
    [
        ("flash", (2, 21, 20), 284.33, 13.27, 3514.25, 159_609_485_896, 46),
        ("pro", (0, 30, 31), 1572.99, 48.85, 5031.4375, 864_704_792_696, 64),
    ],
)
def test_a_bare_config_or_index_of_a_release_tells_everything(
    tmp_path: Path, name: str, kinds: tuple[int, ...], total: float, active: float, kv: float, nbytes: int, shards: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset(name).to_dict()))
    index = write_index(tmp_path / "elsewhere.index.json", preset(name))
    by_config = inspect(tmp_path / "config.json")
    (tmp_path / "config.json").unlink()
    for found, source in [(by_config, "config"), (inspect(index), "index")]:
        assert (found.source, found.release) == (source, name)
        assert tuple(found.layers.values()) == kinds and found.hash_layers == 3
        assert found.parameters is not None and found.active_parameters is not None
        assert found.parameters / 1e9 == pytest.approx(total, abs=0.01)
        assert found.active_parameters / 1e9 == pytest.approx(active, abs=0.005)
        assert (found.kv_bytes_per_token, found.bytes, found.shards) == (kv, nbytes, shards)
        assert (found.expert_format, found.dense_format, found.draft) == ("fp4", "fp8", "mtp")
        assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_directory_is_described_from_its_headers(official: Path, dspark: Path, plain: Path) -> None:
    found = inspect(official)
    assert found.source == "headers" and found.release is None and found.shards == 2
    assert found.layers == {"swa": 1, "csa": 1, "hca": 2} and found.tensors == sum((found.dtypes or {}).values())
    assert found.bytes == json.loads((official / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert (inspect(dspark).draft, inspect(dspark).draft_stages) == ("dspark", 3)
    assert (inspect(plain).draft, inspect(plain).expert_format, inspect(plain).dense_format) == ("none", "bf16", "bf16")


def test_a_directory_without_shards_is_described_from_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(preset("flash-0731").to_dict()))
    assert inspect(tmp_path).source == "config"
    write_index(tmp_path / "model.safetensors.index.json", preset("flash-0731"))
    found = inspect(tmp_path)
    assert (found.source, found.release, found.draft_stages) == ("index", "flash-0731", 3)


def test_an_index_of_an_unknown_model_tells_what_its_names_tell(official: Path, tmp_path: Path) -> None:
    shutil.copy(official / "model.safetensors.index.json", tmp_path / "index.json")
    found = inspect(tmp_path / "index.json")
    assert found.layers == {"swa": 1, "csa": 1, "hca": 2} and (found.hash_layers, found.draft) == (1, "mtp")
    assert found.shards == 2 and found.bytes is not None
    assert found.parameters is None and found.dtypes is None and found.kv_bytes_per_token is None


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"weight_map": {"a": "b"}}')
    with pytest.raises(CheckpointError, match="no official V4 index"):
        inspect(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="not an object"):
        inspect(tmp_path / "x.json")


@pytest.mark.parametrize("metadata", [[], 7, {"total_size": "x"}, {"total_size": 1.5}])
def test_an_index_with_wrong_metadata_is_one_sentence(official: Path, tmp_path: Path, metadata: object) -> None:
    raw = json.loads((official / "model.safetensors.index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(raw | {"metadata": metadata}))
    with pytest.raises(CheckpointError, match=r"index\.json gives its `metadata`"):
        inspect(tmp_path / "index.json")
    (tmp_path / "index.json").write_text(json.dumps(raw | {"metadata": None}))
    assert inspect(tmp_path / "index.json").bytes is None


@pytest.mark.parametrize(
    "key", ["compress_rates", "layer_types", "mlp_layer_types", "partial_rotary_factor", "rope_parameters"]
)
@pytest.mark.parametrize("value", [None, 3, "x", ["x"], [[]], {"compress": 3}])
def test_configs_with_values_of_the_wrong_kind_are_one_sentence(tmp_path: Path, key: str, value: object) -> None:
    raw = hf_config(preset("nano"))
    for gone in ("compress_ratios", "num_hash_layers", "rope_scaling"):
        raw.pop(gone)
    raw["rope_parameters"] = {"compress": {"rope_type": "default"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert inspect(tmp_path / "config.json").source == "config"
    (tmp_path / "config.json").write_text(json.dumps(raw | {key: value}))
    for path in (tmp_path, tmp_path / "config.json"):
        with contextlib.suppress(CheckpointError, ConfigError):  # some values mean something; none may escape
            inspect(path)
