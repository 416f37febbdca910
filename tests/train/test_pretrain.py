"""The whole stage on a toy corpus, and what it writes."""

import json
import lzma
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from typer.testing import CliRunner

from hadal import load_model
from hadal.cli import app
from hadal.config import ModelConfig, preset
from hadal.text import Tokenizer
from hadal.train import pretrain
from hadal.train.data import Mix, Store
from hadal.train.loop import LoopConfig, Report, TrainingError
from hadal.train.optim import OptimConfig
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
    lines = (json.dumps({"text": f"My own text number {i}. " * 40}) for i in range(60))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return folder


def small(scale: int) -> ModelConfig:
    return tiny().replace(vocab_size=600)


CHANGES = {
    "seed": 1,
    "scale": 2,
    "context": 64,
    "fim_rate": 0.5,
    "made_chats": 3,
    "optim": OptimConfig(weight_decay=0.5),
}


def toy(corpus: Path, folder: Path) -> PretrainConfig:
    loop = LoopConfig(steps=6, packs_per_micro_batch=2, evaluations=1, log_every=2)
    return PretrainConfig(
        corpus, folder / "out", loop, device="cpu", context=128, held_out=0.2, made_stories=60, made_chats=150
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_leaves_a_model_that_loads_with_card_and_credits(corpus, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(pretrain, "scaled_config", small)
    config = toy(corpus, tmp_path)
    said: list[str] = []
    report = run(config, said.append)
    assert report.steps == 6
    model = load_model(tmp_path / "out", device="cpu", dtype="float32", fake_quant=False)
    tokenizer = Tokenizer.from_directory(tmp_path / "out")
    assert tokenizer.vocab_size == model.config.vocab_size == 600
    assert model.logits(tokenizer.encode("Once upon a time")).shape[-1] == 600
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "CC-BY" in card and "held-out" in card and "official quantisers" in card and "6 steps" in card
    assert "| mine |" in card and "gsm8k" not in card and "Passes over each source: made-chats" in card
    assert report.epochs["mine"] > 0
    assert (tmp_path / "out" / "CREDITS.md").read_text().count(": by ") == 60
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_id
    assert json.loads((tmp_path / "out" / "config.json").read_text())["expert_dtype"] == "fp4"
    before = contents(tmp_path / "out.run")
    said.clear()
    refused = [(config, "--resume"), *((replace(config, resume=True, **{k: v}), f"`{k}`") for k, v in CHANGES.items())]
    for wrong, words in refused:
        with pytest.raises(TrainingError, match=words):
            run(wrong, said.append)
    (corpus / "mine.jsonl").write_text('{"text": "other"}')
    with pytest.raises(TrainingError, match="`corpus`"):
        run(replace(config, resume=True), said.append)
    assert said == [] and contents(tmp_path / "out.run") == before


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


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["/x/recipes/nano.py", "--out", "a b", "--resume"], "python recipes/nano.py --out 'a b'"),
        (["/x/bin/hadal", "train", "out", "--seed", "1"], "hadal train out --seed 1"),
    ],
)
def test_the_card_s_command_starts_the_run_again(monkeypatch, argv, words):
    monkeypatch.setattr(sys, "argv", argv)
    assert pretrain._command() == words


def test_sources_in_no_mix_are_trained_on_by_their_share_of_the_tokens(tmp_path):
    def store(tokens: int) -> Store:
        return Store(torch.zeros(tokens, dtype=torch.int32), torch.ones(tokens, dtype=torch.uint8), [0, tokens])

    stores = {"a": store(100), "b": store(200), "mine": store(100), "none": Store(torch.zeros(0), torch.zeros(0), [0])}
    [first, second] = pretrain._mixes((Mix(0.0, {"a": 0.5, "b": 0.25, "gone": 9.0}), Mix(0.5, {"none": 1.0})), stores)
    assert first.weights == {"a": 0.5, "b": 0.25, "mine": pytest.approx(0.25)}
    assert second.weights == {"mine": 100}
    with pytest.raises(TrainingError, match="from 50%"):
        pretrain._mixes((Mix(0.5, {"gone": 1.0}),), {})


@pytest.mark.parametrize("options", ["", "--steps 7 --lr 0.001 --packs 3 --micro-batches 4 --seed 5 --resume"])
def test_the_command_and_the_recipe_start_the_same_run(monkeypatch, options):
    seen: list[PretrainConfig] = []

    def run_recorded(config: PretrainConfig, say: object = print) -> Report:
        seen.append(config)
        return Report(1, 1, 1.0, {}, {})

    monkeypatch.setattr(pretrain, "run", run_recorded)
    monkeypatch.setattr(sys, "argv", ["nano.py", "--out", "there", *options.split()])
    runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "nano.py"), run_name="__main__")
    assert CliRunner().invoke(app, ["train", "there", *options.split()]).exit_code == 0
    assert seen[0] == seen[1] and (seen[0].seed == 5) == bool(options)
