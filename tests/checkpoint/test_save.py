from __future__ import annotations

import filecmp
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from hadal.checkpoint import inspect, load_model, open_checkpoint, save_model
from hadal.model import Model, Numerics
from hadal.quant import QuantError
from tests.checkpoint.test_load import IDS, stored
from tests.checkpoint.tiny import tiny_config


def differing(a: Path, b: Path) -> list[str]:
    names = {f.name for f in a.iterdir() if f.name != "inference_config.json"}
    assert names == {f.name for f in b.iterdir()}
    return [name for name in sorted(names) if not filecmp.cmp(a / name, b / name, shallow=False)]


@pytest.mark.parametrize("name", ["official", "dspark"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_load_and_save_give_the_same_bytes(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, dtype: str, weights: str
) -> None:
    path = request.getfixturevalue(name)
    save_model(load_model(path, device="cpu", dtype=dtype, weights=weights), tmp_path / "out")  # type: ignore[arg-type]
    assert differing(path, tmp_path / "out") == []


@pytest.mark.parametrize("name", ["flash_a", "pro_a", "bf16_a", "dspark_a"])
def test_golden_shards_are_reproduced(shared_dir: Path, tmp_path: Path, name: str) -> None:
    path = shared_dir / "golden" / name / "checkpoint"
    for dtype, weights in [("bfloat16", "dense"), ("float32", "packed")]:
        save_model(load_model(path, device="cpu", dtype=dtype, weights=weights), tmp_path / "out")  # type: ignore[arg-type]
        assert set(differing(path, tmp_path / "out")) <= {"config.json"}  # the format of the experts is added to it
        assert open_checkpoint(tmp_path / "out").config == open_checkpoint(path).config


def test_values_at_the_end_of_the_range_keep_their_bytes_too(official: Path, tmp_path: Path) -> None:
    shutil.copytree(official, tmp_path / "odd")
    checkpoint = open_checkpoint(tmp_path / "odd")
    spec = next(s for s in checkpoint.table if s.name == "layers.1.attn.wq_a.scale")
    entry = checkpoint.entries[spec.name]
    data = bytearray(entry.file.read_bytes())
    data[entry.offset : entry.offset + entry.nbytes] = bytes(entry.nbytes)  # 2^-127, below what bfloat16 resolves
    entry.file.write_bytes(data)
    save_model(load_model(tmp_path / "odd", device="cpu", dtype="bfloat16", weights="dense"), tmp_path / "out")
    assert differing(tmp_path / "odd", tmp_path / "out") == []


@pytest.mark.parametrize("weights", ["packed", "dense"])
def test_only_changed_weights_are_quantised_anew(official: Path, tmp_path: Path, weights: str) -> None:
    model: Any = load_model(official, device="cpu", weights=weights)  # type: ignore[arg-type]
    with torch.no_grad():
        model.norm.mul_(2)
        if weights == "dense":
            model.layers[2].ffn.experts.w1[3] *= 4
    save_model(model, tmp_path / "out")
    before, after = stored(official), stored(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n].view(torch.uint8), after[n].view(torch.uint8))}
    expert = {"layers.2.ffn.experts.3.w1.scale"} if weights == "dense" else set()
    assert changed - {"layers.2.ffn.experts.3.w1.weight"} == {"norm.weight"} | expert
    reloaded: Any = load_model(tmp_path / "out", device="cpu", weights="dense")
    if weights == "dense":
        assert torch.equal(reloaded.layers[2].ffn.experts.w1, model.layers[2].ffn.experts.w1)
    assert torch.equal(reloaded.norm, model.norm)


def trained(dtype: torch.dtype = torch.float32) -> Model:
    model = Model(tiny_config(), Numerics(dtype=dtype))
    model.init_weights(torch.Generator().manual_seed(4))
    return model


def test_a_model_without_a_source_loses_nothing(tmp_path: Path) -> None:
    model: Any = trained()
    save_model(model, tmp_path / "out")
    again: Any = load_model(tmp_path / "out", device="cpu", dtype="float32")
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert open_checkpoint(tmp_path / "out").config.expert_format == "bf16"
    assert stored(tmp_path / "out")["norm.weight"].dtype == torch.bfloat16  # ones fit; random matrices do not
    assert stored(tmp_path / "out")["embed.weight"].dtype == torch.float32


@pytest.mark.parametrize(("quantize", "expert"), [("fp4", "I8"), ("fp8", "F8_E4M3")])
def test_quantised_saving_gives_the_official_types(tmp_path: Path, quantize: str, expert: str) -> None:
    model: Any = trained()
    save_model(model, tmp_path / "out", quantize=quantize)  # type: ignore[arg-type]
    config = model.config.replace(expert_dtype=quantize)
    found = inspect(tmp_path / "out")
    assert (found.expert_format, found.dense_format, found.shards) == (quantize, "fp8", 1)
    census = Counter(str(t.dtype) for t in stored(tmp_path / "out").values())
    assert census["torch.float8_e8m0fnu"] == census["torch.int8"] + census["torch.float8_e4m3fn"]
    assert found.dtypes is not None and found.dtypes[expert] >= 3 * 4 * 5
    assert open_checkpoint(tmp_path / "out").config == config
    again: Any = load_model(tmp_path / "out", device="cpu", dtype="float32")
    error = (again.layers[1].ffn.experts.w1 - model.layers[1].ffn.experts.w1).abs().max()
    assert 0 < error < model.layers[1].ffn.experts.w1.abs().max() * (0.17 if quantize == "fp4" else 0.04)
    save_model(again, tmp_path / "again")
    assert differing(tmp_path / "out", tmp_path / "again") == []


def test_a_checkpoint_can_be_saved_over_itself(official: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(official, tmp_path / "own"))
    model: Any = load_model(path, device="cpu", weights="packed")
    before = model.logits(IDS)
    save_model(model, path)
    assert differing(official, path) == []
    assert torch.equal(model.logits(IDS), before)


def test_companion_files_go_along(official: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(official, tmp_path / "with"))
    (path / "encoding").mkdir()
    for name in (
        "tokenizer.json",
        "generation_config.json",
        "encoding/encoding_dsv4.py",
        "MODEL_CARD.md",
        "CREDITS.md",
    ):
        (path / name).write_text(json.dumps(name))
    (path / "model_code.py").write_text("raise SystemExit")
    save_model(load_model(path, device="cpu"), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "encoding" / "encoding_dsv4.py").read_text()) == "encoding/encoding_dsv4.py"
    assert (tmp_path / "out" / "MODEL_CARD.md").exists() and (tmp_path / "out" / "CREDITS.md").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists() and not (tmp_path / "out" / "model_code.py").exists()


def test_weights_that_are_not_finite_leave_no_file(tmp_path: Path) -> None:
    model: Any = trained()
    with torch.no_grad():
        model.layers[0].attn.wkv[0, 0] = float("nan")
    with pytest.raises(QuantError):
        save_model(model, tmp_path / "out", quantize="fp4")
    assert list((tmp_path / "out").glob("*.safetensors*")) == []
