from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hadal.checkpoint import CheckpointError, load_model, locate_model, source_of
from hadal.kernels.cpu.target import detect
from hadal.model import Model
from hadal.quant import PackedWeight
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint
from tests.quant import oracle

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4, 6, 2, 6]
MODES = [("float32", False), ("float32", True), ("bfloat16", True), ("bfloat16", False)]
RUNS = [(*mode, "fused") for mode in MODES] + ([(*mode, "cpu") for mode in MODES[2:]] if detect()[0] else [])


def stored(path: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def dequantised(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Values by definition, from what the reference library reads."""
    weight = tensors[f"{name}.weight"]
    exponents = tensors[f"{name}.scale"].view(torch.uint8).numpy().astype(int) - 127
    if weight.dtype == torch.int8:
        raw = weight.view(torch.uint8).numpy()
        codes = np.stack((raw % 16, raw // 16), axis=-1).reshape(raw.shape[0], -1)
        values, exponents = np.array(oracle.E2M1)[codes], np.repeat(exponents, 32, axis=1)
    else:
        values = np.array(oracle.E4M3)[weight.view(torch.uint8).numpy()]
        rows, columns = values.shape
        exponents = exponents.repeat(128, axis=0)[:rows].repeat(128, axis=1)[:, :columns]
    return torch.from_numpy(np.ldexp(values, exponents))


def held(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def test_dense_weights_are_the_stored_values(official: Path) -> None:
    tensors = stored(official)
    model: Any = load_model(official, device="cpu", dtype="float32", weights="dense")
    layer = model.layers[2]
    assert torch.equal(layer.attn.wo_a.double(), dequantised(tensors, "layers.2.attn.wo_a"))
    assert torch.equal(layer.ffn.shared.w2.double(), dequantised(tensors, "layers.2.ffn.shared_experts.w2"))
    for expert in range(4):
        expected = dequantised(tensors, f"layers.2.ffn.experts.{expert}.w3")
        assert torch.equal(layer.ffn.experts.w3[expert].double(), expected)
    assert torch.equal(model.draft[0].e_proj.double(), dequantised(tensors, "mtp.0.e_proj"))
    assert torch.equal(model.hc_head.fn, tensors["hc_head_fn"])
    assert torch.equal(layer.attn.indexer.compressor.ape, tensors["layers.2.attn.indexer.compressor.ape"])
    assert torch.equal(layer.ffn.gate.bias, tensors["layers.2.ffn.gate.bias"])
    assert torch.equal(model.layers[0].ffn.gate.tid2eid, tensors["layers.0.ffn.gate.tid2eid"])


def test_packed_weights_are_the_stored_bytes_without_a_copy(official: Path) -> None:
    tensors = stored(official)
    model: Any = load_model(official, device="cpu", weights="packed")
    experts = model.layers[1].ffn.experts.w1
    assert isinstance(experts, list) and all(isinstance(e, PackedWeight) for e in experts)
    assert torch.equal(experts[2].codes, tensors["layers.1.ffn.experts.2.w1.weight"].view(torch.uint8))
    source = source_of(model)
    assert source is not None
    again = source.weight(next(s for s in source.table if s.name == "layers.1.ffn.experts.2.w1.weight"))
    assert isinstance(again, PackedWeight) and again.codes.data_ptr() == experts[2].codes.data_ptr()


@pytest.mark.parametrize("name", ["official", "plain", "dspark"])
@pytest.mark.parametrize(("dtype", "fake_quant", "backend"), RUNS)
def test_packed_and_dense_compute_the_same(
    request: pytest.FixtureRequest, name: str, dtype: str, fake_quant: bool, backend: str
) -> None:
    path = request.getfixturevalue(name)
    logits = [
        load_model(path, device="cpu", dtype=dtype, fake_quant=fake_quant, backend=backend, weights=weights).logits(IDS)
        for weights in ("packed", "dense", "auto")
    ]
    assert logits[0].isfinite().all() and logits[0].std() > 0.01
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("name", ["flash_a", "pro_a", "bf16_a", "dspark_a"])
@pytest.mark.parametrize(("dtype", "fake_quant", "backend"), RUNS)
def test_golden_checkpoints_load_in_every_combination(
    shared_dir: Path, name: str, dtype: str, fake_quant: bool, backend: str
) -> None:
    path = shared_dir / "golden" / name / "checkpoint"
    packed, dense = (
        load_model(path, device="cpu", dtype=dtype, fake_quant=fake_quant, backend=backend, weights=weights).logits(IDS)
        for weights in ("packed", "dense")
    )
    assert packed.isfinite().all() and torch.equal(packed, dense)


def test_parameters_have_the_types_the_model_computes_with(official: Path, dspark: Path) -> None:
    for path in (official, dspark):
        for name, tensor in held(load_model(path, device="cpu", dtype="bfloat16", weights="dense")):
            leaf = name.rpartition(".")[2]
            wide = leaf in ("attn_sink", "ape", "fn", "base", "scale", "wgate", "bias", "head") or leaf.endswith("norm")
            wide |= ".gate." in name or ("compressor" in name and leaf == "wkv")
            expected = torch.int64 if leaf == "tid2eid" else torch.float32 if wide else torch.bfloat16
            assert tensor.dtype == expected, name


def test_automatic_choices(official: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_model(official, device="cpu")
    assert model.numerics.dtype == torch.float32 and not model.numerics.fake_quant
    assert model.numerics.quantised_dense and model.numerics.quantised_experts
    assert isinstance(model.layers[0].attn.wq_a, torch.Tensor)
    assert load_model(official, device="cpu", dtype=torch.bfloat16).numerics.fake_quant
    monkeypatch.setattr("hadal.device.memory_available", lambda device: 1000)
    model = load_model(official, device="cpu")
    assert isinstance(model.layers[0].attn.wq_a, PackedWeight)


def test_unquantised_weights_ask_for_no_quantised_inputs(plain: Path) -> None:
    numerics = load_model(plain, device="cpu", fake_quant=True).numerics
    assert not numerics.quantised_dense and not numerics.quantised_experts


def test_models_are_found_by_directory_name_or_repository(
    official: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append((repository, allow_patterns))
        return str(official)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate_model(official) == official and locate_model(str(official)) == official
    assert locate_model("nano").parts[-3:] == ("hadal", "assets", "nano")
    assert locate_model("deepseek-ai/DeepSeek-V4-Flash") == official
    repository, patterns = asked[0]
    assert repository == "deepseek-ai/DeepSeek-V4-Flash"
    assert [p for p in patterns if p.endswith((".py", "*"))] == ["encoding/encoding_dsv4.py"]
    (tmp_path / "file").touch()
    bad: list[tuple[str | Path, str]] = [
        (tmp_path / "file", "is a file"),
        ("no-such-model", "no model 'no-such-model'"),
        ("a/b/c", "no model"),
    ]
    for name, words in bad:
        with pytest.raises(CheckpointError, match=words):
            locate_model(name)


def test_a_repository_that_cannot_be_fetched_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(repository: str, allow_patterns: list[str]) -> str:
        raise OSError("no network\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=r"'a/b' is no directory here .*\(no network\)"):
        locate_model("a/b")


@pytest.mark.parametrize(
    ("option", "value"), [("dtype", "float16"), ("weights", "int4"), ("fake_quant", "yes"), ("device", "abacus")]
)
def test_unknown_options_are_errors(official: Path, option: str, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        load_model(official, **{option: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a--b/c", "a/" + "b" * 100])
def test_names_the_hub_refuses_are_one_sentence(name: str) -> None:
    with pytest.raises(CheckpointError, match="could not be fetched"):
        locate_model(name)


@pytest.mark.parametrize("expert", [-1, 4, 99])
def test_a_hash_table_that_names_no_expert_is_refused(tmp_path: Path, expert: int) -> None:
    tensors = random_tensors(tiny_config())
    tensors["layers.0.ffn.gate.tid2eid"][7, 1] = expert
    path = write_checkpoint(tmp_path / "m", tiny_config(), tensors)
    with pytest.raises(
        CheckpointError, match=rf"safetensors: tensor layers\.0\.ffn\.gate\.tid2eid names expert {expert},"
    ):
        load_model(path, device="cpu")
