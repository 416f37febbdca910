"""The whole stage on a toy corpus, and what it writes."""

import json
import lzma
from pathlib import Path
from random import Random

import pytest
import torch

from hadal import load_model
from hadal.config import ModelConfig, preset
from hadal.text import Tokenizer
from hadal.train import pretrain
from hadal.train.loop import LoopConfig, TrainingError
from hadal.train.pretrain import PretrainConfig, run, scaled_config
from hadal.train.stories import generate_story
from tests.train.test_loop import tiny


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    records = []
    for seed in range(60):
        story = generate_story(Random(seed))
        records.append(
            {"title": f"{story.title} {seed}", "text": story.text, "source": "S", "attribution": f"by {seed}"}
        )
    text = "\n".join(json.dumps(r) for r in records)
    (folder / "stories-simple.jsonl.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def small(scale: int) -> ModelConfig:
    return tiny().replace(vocab_size=600)


def test_a_run_leaves_a_model_that_loads_with_card_and_credits(corpus, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "scaled_config", small)
    loop = LoopConfig(steps=6, packs_per_micro_batch=2, evaluations=1, log_every=2)
    config = PretrainConfig(
        corpus, tmp_path / "out", loop, device="cpu", context=128, held_out=0.2, made_stories=60, made_chats=150
    )
    said: list[str] = []
    report = run(config, said.append)
    assert report.steps == 6
    model = load_model(tmp_path / "out", device="cpu", dtype="float32", fake_quant=False)
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.vocab_size == model.config.vocab_size == 600
    assert model.logits(tokenizer.encode("Once upon a time")).shape[-1] == 600
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "CC-BY" in card and "held-out" in card and "official quantisers" in card and "6 steps" in card
    assert (tmp_path / "out" / "CREDITS.md").read_text().count(": by ") == 60
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_dtype"] == "fp4"
    with pytest.raises(TrainingError, match="--resume"):
        run(config, said.append)


def test_scale_one_is_nano_and_larger_ones_are_valid_and_larger():
    assert scaled_config(1) == preset("nano")
    sizes = []
    for scale in (1, 2, 3, 4):
        c = scaled_config(scale)
        assert (
            c.hidden_size % 128 == 0 and c.moe_intermediate_size % 128 == 0 and c.num_attention_heads % c.o_groups == 0
        )
        assert {layer.attention for layer in c.layers} == {"swa", "csa", "hca"}
        sizes.append(c.hidden_size * c.num_hidden_layers)
    assert sizes == sorted(set(sizes))
    with pytest.raises(TrainingError, match="scale"):
        scaled_config(0)


def test_the_default_mix_names_only_sources_that_exist():
    known = {"books-children", "stories", "stories-chat", "tldr-pages-en", "gsm8k", "persona", "tools", "made-stories",
             "made-chats"}  # fmt: skip
    assert {n for mix in pretrain.DEFAULT_MIXES for n in mix.weights} == known
