"""Hugging Face names against transformers itself: its live state dict, what it saves, and what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hadal.checkpoint import CheckpointError, convert, inspect, load_model, open_checkpoint, save_model, tensor_table
from hadal.checkpoint.hf import hf_config, hf_place, official_config, saved_name
from hadal.config import ModelConfig
from tests.checkpoint.test_load import IDS, stored
from tests.checkpoint.tiny import tiny_config

transformers = pytest.importorskip("transformers")


def reference_model(config: ModelConfig, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**hf_config(config)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                order = torch.rand(buffer.shape[0], config.n_routed_experts, generator=generator).argsort(-1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([IDS])).logits[0].float()
    return logits


def unquantised(config: ModelConfig) -> list[Any]:
    return list(tensor_table(config.without_draft(), expert_format="bf16", dense_format="bf16"))


def test_every_name_of_the_live_state_dict_is_covered_exactly() -> None:
    config = tiny_config().without_draft()
    live = {name: tuple(t.shape) for name, t in reference_model(config).state_dict().items()}
    covered: dict[str, list[tuple[int, int]]] = {}
    for spec in unquantised(config):
        place = hf_place(spec, config)
        assert live[place.name] == place.shape, (spec.name, place)
        size = torch.Size(spec.shape).numel()
        covered.setdefault(place.name, []).append((place.element, place.element + size))
    assert covered.keys() == live.keys()
    for name, parts in covered.items():  # the parts of a stack tile it without gap or overlap
        borders = [0, *[end for _, end in sorted(parts)]]
        assert [begin for begin, _ in sorted(parts)] == borders[:-1]
        assert borders[-1] == torch.Size(live[name]).numel()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = reference_model(tiny_config().without_draft(), seed=7)
    path = tmp_path_factory.mktemp("hf") / "saved"
    model.save_pretrained(path, max_shard_size="200KB")
    return model, path


def test_every_name_that_save_pretrained_writes_is_known(saved: tuple[Any, Path]) -> None:
    known = {saved_name(spec.name) for spec in unquantised(tiny_config())}
    assert known == stored(saved[1]).keys()


def test_what_transformers_saves_loads_and_computes_the_same(saved: tuple[Any, Path]) -> None:
    model, path = saved
    checkpoint = open_checkpoint(path)
    assert checkpoint.naming == "hf-saved" and len(checkpoint.headers) > 1
    assert checkpoint.config.compress_ratios == (0, 8, 4, 8) and checkpoint.config.num_hash_layers == 1
    ours = load_model(path, device="cpu", dtype="float32").logits(IDS)
    assert (ours - logits_of(model)).abs().max() < 2e-5


def test_a_live_state_dict_loads_and_computes_the_same(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    state = {name: t.clone() for name, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    assert open_checkpoint(tmp_path).naming == "hf"
    ours: Any = load_model(tmp_path, device="cpu", dtype="float32")
    assert torch.equal(ours.logits(IDS), load_model(path, device="cpu", dtype="float32").logits(IDS))
    assert torch.equal(ours.layers[2].ffn.experts.w3[1], state["model.layers.2.mlp.experts.gate_up_proj"][1, 32:])


def test_transformers_names_become_official_ones_and_come_back(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    convert(path, tmp_path / "official")
    assert stored(tmp_path / "official").keys() == {spec.name for spec in unquantised(tiny_config())}
    convert(tmp_path / "official", tmp_path / "hf", names="hf")
    state = model.state_dict()
    returned = stored(tmp_path / "hf")
    assert returned.keys() == state.keys()
    assert all(torch.equal(returned[name].to(t.dtype), t) for name, t in state.items())


def test_a_quantised_checkpoint_exports_to_what_transformers_computes(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "hf", names="hf")
    assert open_checkpoint(tmp_path / "hf").config.draft == "none"
    theirs = transformers.DeepseekV4ForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    ours = load_model(official, device="cpu", dtype="float32", fake_quant=False).logits(IDS)
    assert ours.std() > 0.1
    assert (ours - logits_of(theirs)).abs().max() < 2e-5 * max(1.0, float(ours.std()))


def test_exported_files_load_back_the_same(official: Path, tmp_path: Path) -> None:
    convert(official, tmp_path / "hf", names="hf")
    ours = load_model(official, device="cpu", dtype="float32")
    again = load_model(tmp_path / "hf", device="cpu", dtype="float32")
    assert torch.equal(again.logits(IDS), ours.logits(IDS))
    assert inspect(tmp_path / "hf").expert_format == "bf16"
    save_model(again, tmp_path / "official")
    assert load_model(tmp_path / "official", device="cpu", dtype="float32").logits(IDS).equal(ours.logits(IDS))


def test_a_missing_stack_is_named(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    name = "model.layers.1.mlp.experts.down_proj"
    state = {key: t.clone() for key, t in model.state_dict().items() if key != name}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_checkpoint(tmp_path)
    save_file(state | {name: torch.zeros(4, 64, 33)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"shape \[4, 64, 33\]"):
        open_checkpoint(tmp_path)


def test_layer_lists_of_transformers_become_ratios() -> None:
    raw = json.loads(json.dumps(transformers.DeepseekV4Config(**hf_config(tiny_config())).to_dict()))
    assert "compress_ratios" not in raw and "num_hash_layers" not in raw
    config = ModelConfig.from_dict(official_config(raw))
    assert config == tiny_config(quantization=False, expert_dtype=None).without_draft().replace(
        torch_dtype=config.torch_dtype
    )


def test_hash_layers_after_learned_ones_are_refused() -> None:
    raw = hf_config(tiny_config())
    raw.pop("num_hash_layers")
    raw["mlp_layer_types"] = ["moe", "hash_moe", "moe", "moe"]
    with pytest.raises(CheckpointError, match="hash layer after"):
        official_config(raw)


def test_models_with_several_hca_ratios_have_no_transformers_form() -> None:
    with pytest.raises(CheckpointError, match=r"\[8, 16\]"):
        hf_config(tiny_config(compress_ratios=(0, 8, 4, 16, 0)))
