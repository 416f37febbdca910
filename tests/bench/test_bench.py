"""What a benchmark measures and refuses; how fast a machine is, is not tested."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hadal.bench import PHASES, BenchError, run
from hadal.bench.phases import GROWTH, Figure, measure_decode
from hadal.config import preset
from hadal.model import Model, Numerics

CONFIG = preset("nano").replace(
    vocab_size=64, hidden_size=32, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16, q_lora_rank=16,
    o_lora_rank=8, index_head_dim=16, moe_intermediate_size=32, sliding_window=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Model:
    model = Model(CONFIG, Numerics())
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_every_phase_gives_a_rate_and_a_share_of_a_limit(model: Model) -> None:
    figures = run(lambda **options: model, PHASES, [24, 520])
    expected = [("prefill", 24), ("prefill", 520), ("decode", 24), ("decode", 520), ("decode, 8 at once", 24)]
    expected += [("decode, 8 at once", 520), ("decode, long", 520), ("training step", 24), ("training step", 520)]
    assert [(f.phase, f.tokens) for f in figures] == expected
    for figure in figures:
        assert 0 < figure.tokens_per_second < 1e9
        assert 0 < figure.fraction < 1
        assert figure.limit > figure.tokens_per_second
        assert (figure.over_short is not None) == (figure.phase == "decode, long")
        assert figure.bound == ("reads" if figure.phase.startswith("decode") else "products")
    assert all(p.grad is None for p in model.parameters())


def test_only_training_asks_for_dense_weights(model: Model) -> None:
    asked: list[dict[str, Any]] = []

    def load(**options: Any) -> Model:
        asked.append(options)
        return model

    run(load, ["decode"], [24])
    assert asked == [{}]
    run(load, ["train"], [24])
    assert asked == [{}, {"weights": "dense"}]


def test_lengths_left_out_are_the_usual_ones_within_the_models_reach(model: Model) -> None:
    short = Model(CONFIG.replace(max_position_embeddings=600), Numerics())
    short.load_state_dict(model.state_dict())
    figures = run(lambda **options: short, ["decode"])
    assert [f.tokens for f in figures] == [600 - GROWTH]


def test_decode_leaves_the_model_as_it_was(model: Model) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    figure = measure_decode(model, 20, batch=2)
    assert isinstance(figure, Figure)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_unknown_phases_and_impossible_lengths_are_refused(model: Model) -> None:
    for phases, lengths, message in (
        (["flight"], [24], "prefill"),
        (["decode"], [1], "1 tokens"),
        (["decode"], [CONFIG.max_position_embeddings], "this model takes 2 to"),
        (["long"], [512], "above that"),
    ):
        with pytest.raises(BenchError, match=message):
            run(lambda **options: model, phases, lengths)


def test_a_phase_left_out_unasked_is_announced(model: Model) -> None:
    said: list[str] = []
    figures = run(lambda **options: model, None, [24], said.append)
    assert "decode, long" not in [f.phase for f in figures]
    assert any(line.startswith("long is left out") for line in said)
