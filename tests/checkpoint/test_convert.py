from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hadal.checkpoint import CheckpointError, convert, inspect, load_model, open_checkpoint
from hadal.quant import QuantError, quantise_fp4, quantise_fp8
from tests.checkpoint.test_load import IDS, stored
from tests.checkpoint.test_save import differing
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint


def test_without_options_a_checkpoint_is_copied_byte_for_byte(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "out")
    assert differing(official, tmp_path / "out") == []


@pytest.mark.parametrize("form", ["fp4", "fp8"])
def test_bf16_becomes_official_formats(plain: Path, tmp_path: Path, form: str) -> None:
    convert(plain, tmp_path / "out", form)  # type: ignore[arg-type]
    found = inspect(tmp_path / "out")
    assert (found.expert_format, found.dense_format, found.draft) == (form, "fp8", "none")
    source, out = stored(plain), stored(tmp_path / "out")
    expert, dense = "layers.2.ffn.experts.1.w2", "layers.2.attn.wo_a"
    packed = (quantise_fp4 if form == "fp4" else quantise_fp8)(source[f"{expert}.weight"])
    assert torch.equal(out[f"{expert}.weight"].view(torch.uint8), packed.codes.view(torch.uint8))
    assert torch.equal(out[f"{dense}.weight"].float(), quantise_fp8(source[f"{dense}.weight"]).codes.float())
    assert torch.equal(out["layers.2.ffn.gate.weight"], source["layers.2.ffn.gate.weight"])
    assert load_model(tmp_path / "out", device="cpu").logits(IDS).isfinite().all()


def test_quantising_rounds_the_rest_to_official_types(tmp_path: Path) -> None:
    config = tiny_config(quantization=False, expert_dtype=None)
    tensors = random_tensors(config, "bf16", "bf16")
    wide = {name: t.float() if t.dtype == torch.bfloat16 else t for name, t in tensors.items()}
    wide["embed.weight"][0, 0] = 1 / 3
    write_checkpoint(tmp_path / "f32", config, wide)
    convert(tmp_path / "f32", tmp_path / "kept")
    convert(tmp_path / "f32", tmp_path / "fp4", "fp4")
    assert stored(tmp_path / "kept")["embed.weight"].dtype == torch.float32
    assert torch.equal(stored(tmp_path / "kept")["embed.weight"], wide["embed.weight"])
    assert stored(tmp_path / "fp4")["embed.weight"].dtype == torch.bfloat16
    assert open_checkpoint(tmp_path / "fp4").config == config.replace(quantization=True, expert_dtype="fp4")


def test_fp4_experts_become_fp8_without_loss(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "out", "fp8")
    assert inspect(tmp_path / "out").expert_format == "fp8"
    before = load_model(official, device="cpu", dtype="float32").logits(IDS)
    assert torch.equal(load_model(tmp_path / "out", device="cpu", dtype="float32").logits(IDS), before)


def test_experts_that_do_not_fit_fp8_are_an_error_and_leave_no_file(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config)
    tensors["layers.1.ffn.experts.0.w1.weight"].fill_(0x11)
    scales = tensors["layers.1.ffn.experts.0.w1.scale"].view(torch.uint8)
    scales.fill_(100)
    scales[0, 0] = 130
    write_checkpoint(tmp_path / "wide", config, tensors)
    with pytest.raises(QuantError, match="keep these experts in FP4"):
        convert(tmp_path / "wide", tmp_path / "out", "fp8")
    assert list((tmp_path / "out").iterdir()) == []


def test_options_that_make_no_sense_are_errors(official: Path, tmp_path: Path) -> None:
    for options in ({"quantize": "int4"}, {"names": "gguf"}, {"quantize": "fp4", "names": "hf"}):
        with pytest.raises(CheckpointError):
            convert(official, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert(official, official)
