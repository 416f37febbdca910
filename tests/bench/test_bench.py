"""What a benchmark counts and refuses; how fast a machine is, is not tested."""

import pytest
import torch

from hadal.bench import BenchError, run
from hadal.bench.phases import Figure, active_bytes, measure_decode
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


def test_every_phase_gives_a_rate_below_infinity_and_a_limit(model: Model) -> None:
    figures = run(model, ["prefill", "decode", "batch", "train"], [24])
    assert [f.phase for f in figures] == ["prefill", "decode", "decode, 8 at once", "training step"]
    for figure in figures:
        assert 0 < figure.tokens_per_second < 1e9
        assert figure.limit > 0
        assert figure.fraction == pytest.approx(figure.tokens_per_second / figure.limit)
    assert all(p.grad is None for p in model.parameters())


def test_a_token_reads_its_own_experts_only(model: Model) -> None:
    expert = 3 * 32 * 32 * 4
    more = Model(CONFIG.replace(num_experts_per_tok=4), Numerics())
    assert active_bytes(more) - active_bytes(model) == CONFIG.num_hidden_layers * 2 * expert
    assert active_bytes(model) < sum(p.nbytes for p in model.parameters())


def test_decode_leaves_the_model_as_it_was(model: Model) -> None:
    before = {n: p.clone() for n, p in model.named_parameters()}
    figure = measure_decode(model, 20, batch=2)
    assert isinstance(figure, Figure)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_unknown_phases_and_impossible_lengths_are_refused(model: Model) -> None:
    with pytest.raises(BenchError, match="prefill"):
        run(model, ["flight"], [24])
    with pytest.raises(BenchError, match="1 tokens"):
        run(model, ["decode"], [1])
