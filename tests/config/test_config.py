"""Reading both official forms, the layer plan, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.config import PRESETS, ConfigError, ModelConfig, RopeScaling, preset

INFERENCE_FLASH = {
    "vocab_size": 129280, "dim": 4096, "moe_inter_dim": 2048, "n_layers": 43, "n_hash_layers": 3, "n_heads": 64,
    "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 6, "score_func": "sqrtsoftplus",
    "route_scale": 1.5, "swiglu_limit": 10.0, "q_lora_rank": 1024, "head_dim": 512, "rope_head_dim": 64, "o_groups": 8,
    "o_lora_rank": 1024, "window_size": 128, "original_seq_len": 65536, "rope_theta": 10000, "rope_factor": 16,
    "beta_fast": 32, "beta_slow": 1, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 512, "hc_mult": 4,
    "hc_sinkhorn_iters": 20, "dtype": "fp8", "scale_fmt": "ue8m0", "expert_dtype": "fp4",
    "compress_rope_theta": 160000, "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_own_json(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_inference_form_gives_the_flash_preset() -> None:
    assert ModelConfig.from_dict(INFERENCE_FLASH) == preset("flash")


def test_layer_plans_follow_the_report() -> None:
    flash, pro = preset("flash").layers, preset("pro").layers
    assert [i for i, s in enumerate(flash) if s.attention == "swa"] == [0, 1]
    assert [i for i, s in enumerate(flash) if s.attention == "csa"] == list(range(2, 43, 2))
    assert [i for i, s in enumerate(pro) if s.attention == "csa"] == list(range(2, 61, 2))
    assert [s.attention for s in pro].count("hca") == 31
    for plan in (flash, pro):
        assert [s.routing for s in plan[:4]] == ["hash", "hash", "hash", "learned"]
        assert all((s.rope_theta == 160000) == s.yarn == (s.ratio > 0) for s in plan)


def test_draft_heads_are_told_apart() -> None:
    assert (preset("flash").draft, preset("flash").draft_stages) == ("mtp", 1)
    assert (preset("pro-0813").draft, preset("pro-0813").draft_stages) == ("dspark", 3)
    assert preset("flash-0731").without_draft().draft == "none"
    assert all(s.attention == "swa" and s.routing == "learned" for s in preset("flash-0731").draft_layers)


def test_base_models_announce_fp8_experts() -> None:
    assert preset("flash-base").expert_format == "fp8"
    assert preset("flash").expert_format == "fp4"


@pytest.mark.parametrize("key", ["compress_ratios", "hidden_size", "index_topk", "routed_scaling_factor"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = preset("flash").to_dict()
    del raw[key]
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(raw)


@given(st.text(min_size=1, max_size=12))
def test_an_unknown_key_is_named(key: str) -> None:
    raw = preset("nano").to_dict()
    if key in raw:
        return
    raw["x" + key] = 1
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_dict(raw)
    assert f"`x{key}`" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"compress_ratios": (0, 0, 4)}, "compress_ratios"),
        ({"compress_ratios": (0, 0, 4, 16, 8)}, "compress_ratios"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim"),
        ({"index_head_dim": 48}, "index_head_dim"),
        ({"index_head_dim": 16}, "qk_rope_head_dim"),
        ({"num_attention_heads": 3}, "o_groups"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": 2.5}, "hidden_size"),
        ({"swiglu_limit": 0.0}, "swiglu_limit"),
        ({"expert_dtype": "int3"}, "expert_dtype"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"dspark_block_size": 5}, "dspark_block_size"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"num_hash_layers": 9}, "num_hash_layers"),
        ({"hc_mult": 1}, "hc_mult"),
        ({"eos_token_id": 7168}, "eos_token_id"),
        ({"moe_intermediate_size": 100}, "moe_intermediate_size"),
        ({"compress_ratios": (0, 0, 4, 16, 0, 0), "num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"torch_dtype": 7}, "torch_dtype"),
    ],
)
def test_impossible_values_are_refused_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        preset("nano").replace(**change)


def test_other_models_rope_and_quantisation_are_refused() -> None:
    raw = preset("nano").to_dict()
    with pytest.raises(ConfigError, match="yarn"):
        ModelConfig.from_dict(raw | {"rope_scaling": {"type": "linear", "factor": 2}})
    with pytest.raises(ConfigError, match="weight_block_size"):
        ModelConfig.from_dict(raw | {"quantization_config": {"weight_block_size": [64, 64]}})
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        ModelConfig.from_dict(raw | {"tie_word_embeddings": True})


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("compress_ratios", 5, "compress_ratios"),
        ("rope_scaling", [1], "rope_scaling"),
        ("rope_scaling", {"factor": 0}, "factor"),
        ("rope_scaling", {"factor": 16, "attention_factor": 1.2}, "attention_factor"),
        ("quantization_config", "fp8", "quantization_config"),
        ("quantization_config", {"modules_to_not_convert": ["head"]}, "modules_to_not_convert"),
        ("dspark_target_layer_ids", 3, "dspark_target_layer_ids"),
        ("mlp_bias", True, "mlp_bias"),
        ("model_type", "llama", "model_type"),
        ("n_group", 8, "n_group"),
        ("rope_parameters", {"main": {"rope_theta": 5000.0}}, "rope_theta"),
    ],
)
def test_values_of_another_kind_or_meaning_are_refused_by_name(key: str, value: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ModelConfig.from_dict(preset("nano").to_dict() | {key: value})


def test_nested_rope_bases_count_when_the_top_level_has_none() -> None:
    raw = preset("nano").to_dict()
    del raw["rope_theta"], raw["compress_rope_theta"]
    raw["rope_parameters"] = {"main": {"rope_theta": 5000.0}, "compress": {"rope_theta": 80000.0}}
    config = ModelConfig.from_dict(raw)
    assert (config.rope_theta, config.compress_rope_theta) == (5000.0, 80000.0)


def test_the_inference_form_needs_the_values_its_code_defaults_wrongly() -> None:
    for key in ("compress_rope_theta", "rope_factor", "route_scale", "original_seq_len"):
        raw = {k: v for k, v in INFERENCE_FLASH.items() if k != key}
        with pytest.raises(ConfigError, match=key):
            ModelConfig.from_dict(raw)


def test_rope_parameters_of_transformers_five_are_read() -> None:
    raw = preset("nano").to_dict()
    del raw["rope_scaling"]
    raw["rope_parameters"] = {
        "main": {"rope_type": "default", "rope_theta": 10000.0},
        "compress": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 65536, "rope_theta": 160000.0},
    }  # fmt: skip
    assert ModelConfig.from_dict(raw).rope_scaling == RopeScaling()


def test_files_that_are_no_config_say_so(tmp_path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        ModelConfig.from_file(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="list"):
        ModelConfig.from_file(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="preset"):
        preset("flash-9000")
