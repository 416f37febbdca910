"""The loop on a tiny real model: schedules, phases, finite check, learning, exact resume."""

from pathlib import Path

import pytest
import torch

from hadal.config import ModelConfig, preset
from hadal.model import Model
from hadal.text import Tokenizer, train_tokenizer
from hadal.train.corpus import generate_documents
from hadal.train.data import Batch, Mix, Sampler, build_store
from hadal.train.loop import LoopConfig, TrainingError, evaluate, train
from hadal.train.losses import IGNORED, shifted_targets
from hadal.train.optim import OptimConfig, Optimizer, is_indexer
from hadal.train.pretrain import render_ids

CONTEXT = 96


def tiny() -> ModelConfig:
    return preset("nano").replace(
        vocab_size=420, hidden_size=64, num_attention_heads=2, head_dim=32, qk_rope_head_dim=16, q_lora_rank=32,
        o_lora_rank=16, sliding_window=16, index_n_heads=2, index_head_dim=16, index_topk=8, n_routed_experts=4,
        moe_intermediate_size=32, compress_ratios=(0, 0, 4, 8, 0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = generate_documents(80, 200, 7)
    texts = [d.text for d in made["made-stories"]] + [str(m["content"]) for d in made["made-chats"] for m in d.messages]
    return train_tokenizer(texts, 420)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def setup(
    tokenizer: Tokenizer, folder: Path, seed: int = 0
) -> tuple[Model, Optimizer, Sampler, dict[str, list[Batch]]]:
    made = generate_documents(40, 80, 3)
    stores = {
        name: build_store(folder / name, docs, tokenizer, lambda d: render_ids(d, tokenizer), context=CONTEXT)
        for name, docs in made.items()
    }
    model = Model(tiny())
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = Optimizer(model.named_parameters(), OptimConfig(), {"wo_a": 2})
    sampler = Sampler(stores, (Mix(0.0, {"made-stories": 1.0}), Mix(0.5, {"made-chats": 1.0})), CONTEXT, seed)
    return model, optimizer, sampler, {"made-stories": [Sampler(stores, sampler.mixes, CONTEXT, 9).draw(0, 2)]}


def config(steps: int, **changes: object) -> LoopConfig:
    values = {"packs_per_micro_batch": 2, "micro_batches": 1, "lr": 2e-3, "log_every": 1, "evaluations": 2} | changes
    return LoopConfig(steps=steps, **values)  # type: ignore[arg-type]


def quiet(_: str) -> None:
    return None


def test_schedules_follow_the_report():
    c = LoopConfig(steps=100, lr=1.0, warmup=0.1, decay_from=0.5, lr_floor=0.1, dense_until=0.3, indexer_until=0.4)
    assert c.lr_at(0.05) == pytest.approx(0.5) and c.lr_at(0.1) == c.lr_at(0.49) == 1.0
    assert c.lr_at(0.75) == pytest.approx(0.55) and c.lr_at(1.0) == pytest.approx(0.1)
    assert (c.mtp_weight_at(0.49), c.mtp_weight_at(0.5)) == (0.3, 0.1)
    assert [c.phase_at(p) for p in (0.0, 0.29, 0.3, 0.39, 0.4, 1.0)] == ["dense"] * 2 + ["indexer"] * 2 + ["sparse"] * 2


def test_a_length_is_given_once():
    with pytest.raises(TrainingError, match="steps"):
        LoopConfig(steps=5, minutes=1.0)
    assert (LoopConfig().steps, LoopConfig().minutes, LoopConfig(steps=3).minutes) == (None, 55, None)


def test_evaluation_is_the_mean_loss_over_counted_tokens(tokenizer, tmp_path):
    model, _, _, held_out = setup(tokenizer, tmp_path)
    [batch] = held_out["made-stories"]
    logits = model.training_forward(batch.ids_T, batch.cu_seqlens, dense=False, indexer_loss=False).logits_TV.detach()
    targets = shifted_targets(batch.ids_T, batch.counted_T, batch.cu_seqlens, 1).tolist()
    rows = [-torch.log_softmax(logits[i].double(), -1)[t] for i, t in enumerate(targets) if t != IGNORED]
    assert evaluate(model, held_out, dense=False)["made-stories"] == pytest.approx(
        float(torch.stack(rows).mean()), rel=1e-5
    )


def test_the_loss_falls_through_all_three_phases(tokenizer, tmp_path):
    model, optimizer, sampler, held_out = setup(tokenizer, tmp_path)
    before = evaluate(model, held_out, dense=True)["made-stories"]
    said: list[str] = []
    report = train(model, optimizer, sampler, held_out, config(30, lr=5e-3), tmp_path / "run", say=said.append)
    assert report.steps == 30 and report.tokens > 30 * CONTEXT
    assert report.held_out["made-stories"] < before - 1.0
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert all(f'"phase": "{phase}"' in text for phase in ("dense", "indexer", "sparse"))
    assert '"indexer_kl"' in text and '"captured"' in text and '"held_out"' in text


def test_only_indexers_move_in_their_warm_up_and_never_before(tokenizer, tmp_path):
    model, optimizer, sampler, held_out = setup(tokenizer, tmp_path)

    def snapshot() -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in (*model.named_parameters(), *model.named_buffers())}

    c = config(20, dense_until=0.1, indexer_until=0.2)
    start = snapshot()
    train(model, optimizer, sampler, held_out, c, tmp_path / "run", stop_after=2, say=quiet)
    dense = snapshot()
    train(model, optimizer, sampler, held_out, c, tmp_path / "run", stop_after=2, resume=True, say=quiet)
    warm = snapshot()
    train(model, optimizer, sampler, held_out, c, tmp_path / "run", stop_after=1, resume=True, say=quiet)
    sparse = snapshot()
    for name in start:
        if name.endswith("tid2eid"):
            assert torch.equal(start[name], sparse[name])
        elif is_indexer(name):
            assert torch.equal(start[name], dense[name]) and not torch.equal(dense[name], warm[name]), name
        else:
            assert not torch.equal(start[name], dense[name]) and torch.equal(dense[name], warm[name]), name
            assert not torch.equal(warm[name], sparse[name]), name


def test_the_indexer_objective_leaves_the_backbone_s_gradients_alone(tokenizer, tmp_path):
    model, _, sampler, _ = setup(tokenizer, tmp_path)
    batch = sampler.draw(0, 2)
    grads = []
    for with_loss in (False, True):
        model.zero_grad()
        out = model.training_forward(batch.ids_T, batch.cu_seqlens, indexer_loss=with_loss)
        total = out.logits_TV.float().logsumexp(-1).mean()
        (total + out.indexer_kl if with_loss else total).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert all(torch.allclose(g, grads[1][n], atol=1e-7) for n, g in grads[0].items() if not is_indexer(n))
    assert any(is_indexer(n) and g.any() for n, g in grads[1].items())


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tokenizer, tmp_path):
    c = config(12, fp4_from=0.6, dense_until=0.2, indexer_until=0.4, micro_batches=2)
    model, optimizer, sampler, held_out = setup(tokenizer, tmp_path)
    whole = train(model, optimizer, sampler, held_out, c, tmp_path / "whole", say=quiet)
    want = {n: t.clone() for n, t in model.state_dict().items()}
    report = None
    for session in range(3):
        model, optimizer, sampler, held_out = setup(tokenizer, tmp_path)
        report = train(
            model, optimizer, sampler, held_out, c, tmp_path / "parts", resume=session > 0, stop_after=5, say=quiet
        )
    assert report is not None and report.steps == 12 and report.tokens == whole.tokens
    assert report.held_out == whole.held_out
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, want[name]), name


def test_workers_change_the_speed_and_not_a_bit_of_the_result(tokenizer, tmp_path):
    results = []
    for workers in (1, 3):
        model, optimizer, sampler, _ = setup(tokenizer, tmp_path)
        c = config(6, micro_batches=3, workers=workers, dense_until=0.2, indexer_until=0.4)
        train(model, optimizer, sampler, {}, c, tmp_path / f"run{workers}", say=quiet)
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


def test_experts_compute_with_fp4_values_late_but_keep_full_precision(tokenizer, tmp_path):
    model, optimizer, sampler, _ = setup(tokenizer, tmp_path)
    seen: list[int] = []
    forward = model.training_forward

    def spy(*args: object, **options: object) -> object:
        weight = model.layers[0].ffn.experts.w1.detach()
        seen.append(len(torch.unique((weight / weight.abs().max()).abs())))
        return forward(*args, **options)  # type: ignore[arg-type]

    model.training_forward = spy  # type: ignore[method-assign]
    train(model, optimizer, sampler, {}, config(4, fp4_from=0.5), tmp_path / "run", say=quiet)
    assert min(seen[:2]) > 1000 and max(seen[2:]) < 100  # eight magnitudes times a few powers of two
    assert len(torch.unique(model.layers[0].ffn.experts.w1.detach())) > 1000


def test_a_loss_that_is_not_finite_stops_before_the_step(tokenizer, tmp_path):
    model, optimizer, sampler, held_out = setup(tokenizer, tmp_path)
    train(model, optimizer, sampler, held_out, config(10), tmp_path / "run", stop_after=3, say=quiet)
    with torch.no_grad():
        model.norm[0] = float("nan")
    before = model.embed.detach().clone()
    c = config(10)
    torch.save(torch.load(tmp_path / "run" / "state.pt", weights_only=True) | {"model": model.state_dict()},
               tmp_path / "run" / "state.pt")  # fmt: skip
    with pytest.raises(TrainingError, match=r"step 3.* lower learning rate"):
        train(model, optimizer, sampler, held_out, c, tmp_path / "run", resume=True, say=quiet)
    assert torch.equal(model.embed, before)


def test_resume_and_restart_are_told_apart(tokenizer, tmp_path):
    parts = setup(tokenizer, tmp_path)
    with pytest.raises(TrainingError, match="nothing to resume"):
        train(*parts, config(3), tmp_path / "run", resume=True, say=quiet)
    train(*parts, config(3), tmp_path / "run", stop_after=1, say=quiet)
    with pytest.raises(TrainingError, match="--resume"):
        train(*parts, config(3), tmp_path / "run", say=quiet)
    with pytest.raises(TrainingError, match="`lr`"):
        train(*parts, config(3, lr=1.0), tmp_path / "run", resume=True, say=quiet)
    with pytest.raises(TrainingError, match="`data`"):
        train(*parts, config(3), tmp_path / "run", resume=True, further={"data": "other"}, say=quiet)


def test_what_changes_no_bit_may_change_on_resume(tokenizer, tmp_path):
    parts = setup(tokenizer, tmp_path)
    train(*parts, config(2), tmp_path / "run", stop_after=1, say=quiet)
    free = config(2, workers=2, evaluations=1, checkpoint_minutes=9.0, log_every=7)
    assert train(*parts, free, tmp_path / "run", resume=True, say=quiet).steps == 2


def test_router_biases_follow_the_load_in_learned_layers_only(tokenizer, tmp_path):
    model, optimizer, sampler, _ = setup(tokenizer, tmp_path)
    train(model, optimizer, sampler, {}, config(1), tmp_path / "run", say=quiet)
    gates = [block.ffn.gate for block in (*model.layers, *model.draft)]
    assert not hasattr(gates[0], "bias")
    for gate in gates[1:]:
        assert set(gate.bias.abs().mul(1e4).round().tolist()) <= {0.0, 10.0} and gate.bias.any()
