"""Newton-Schulz against the table of singular values, and both optimisers against formulas written out in float64."""

import pytest
import torch
from torch import nn

from hadal.train.optim import HYBRID, QUINTIC, OptimConfig, Optimizer, clip_gradients, orthogonalise, rule_for


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heavy_tailed(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(gaussian(rows, columns, seed), full_matrices=False)
    s = torch.arange(1, min(rows, columns) + 1, dtype=torch.float64) ** -1.0
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("make", [gaussian, heavy_tailed])
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (256, 1024)])
def test_hybrid_schedule_brings_singular_values_to_one(make, rows, columns):
    factor = orthogonalise(make(rows, columns)[None], HYBRID, torch.float64)[0]
    values = torch.linalg.svdvals(factor)
    # the smallest of a square Gaussian's may still be on its way up; a thousandth of them is
    assert values.kthvalue(2).values > 0.995 and values.max() < 1.003
    rms = factor.square().mean().sqrt() * max(rows, columns) ** 0.5
    assert rms == pytest.approx(1.0, abs=0.003)


def test_five_quintic_steps_stay_below_one_as_in_the_usual_muon():
    factor = orthogonalise(gaussian(256, 256)[None], (QUINTIC,) * 5, torch.float64)[0]
    rms = float(factor.square().mean().sqrt() * 16)
    assert 0.85 < rms < 0.96
    assert torch.linalg.svdvals(factor).max() < 1.21


def test_eight_quintic_steps_are_the_middle_row_of_the_table():
    values = torch.linalg.svdvals(orthogonalise(gaussian(256, 1024)[None], (QUINTIC,) * 8, torch.float64)[0])
    assert values.min() > 0.5 and values.max() < 1.21


def test_bfloat16_products_stay_close_to_orthogonal():
    factor = orthogonalise(gaussian(128, 256).float()[None])[0]
    assert factor.dtype == torch.float32
    rms = float(factor.square().mean().sqrt() * 16)
    assert rms == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (3, 24, 40)])
def test_muon_step_equals_the_written_out_algorithm(shape):
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    grads = [torch.randn(shape, generator=generator) for _ in range(2)]
    parameter = nn.Parameter(start.clone())
    optimizer = Optimizer([("layers.0.attn.wq_a", parameter)], OptimConfig(ns_dtype=torch.float32))
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step(0.01)

    weight, momentum = start.double(), torch.zeros(shape, dtype=torch.float64)
    for grad in grads:
        momentum = 0.95 * momentum + grad.double()
        look_ahead = 0.95 * momentum + grad.double()
        u, _, vh = torch.linalg.svd(look_ahead, full_matrices=False)
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * 0.18 * max(shape[-2:]) ** 0.5 * (u @ vh)
    step = (weight - start).abs().max()
    assert (
        parameter.detach() - weight
    ).abs().max() < 0.03 * step  # the hybrid iteration ends within a few per mille of 1


def test_stacked_groups_are_orthogonalised_apart():
    parameter = nn.Parameter(torch.zeros(32, 48))
    optimizer = Optimizer([("layers.0.attn.wo_a", parameter)], OptimConfig(ns_dtype=torch.float32), {"wo_a": 2})
    parameter.grad = torch.cat((gaussian(16, 48), 100 * gaussian(16, 48, 5))).float()
    optimizer.step(1.0)
    for half in parameter.detach().split(16):
        assert torch.linalg.svdvals(half).mean() == pytest.approx(0.18 * 48**0.5, rel=0.01)


def test_same_shapes_are_batched_without_mixing():
    grads = [gaussian(16, 48, s).float() for s in (1, 2)] + [gaussian(48, 16, 3).float()]
    together = [nn.Parameter(torch.zeros_like(g)) for g in grads]
    names = [f"layers.{i}.attn.wq_a" for i in range(3)]
    optimizer = Optimizer(zip(names, together, strict=True), OptimConfig(ns_dtype=torch.float32))
    for parameter, grad in zip(together, grads, strict=True):
        parameter.grad = grad
    optimizer.step(0.1)
    for name, parameter, grad in zip(names, together, grads, strict=True):
        alone = nn.Parameter(torch.zeros_like(grad))
        alone.grad = grad
        Optimizer([(name, alone)], OptimConfig(ns_dtype=torch.float32)).step(0.1)
        assert torch.allclose(parameter, alone, atol=1e-6)


def test_adamw_equals_torch_adamw():
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = Optimizer([("embed", mine)], OptimConfig())
    oracle = torch.optim.AdamW([theirs], lr=0.02, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        grad = torch.randn(7, 5, generator=generator)
        mine.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step(0.02)
        oracle.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_rows_without_gradient_stay_finite_at_the_tiny_eps():
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = Optimizer([("embed", parameter)], OptimConfig())
    parameter.grad = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1e-22, 0.0]])
    optimizer.step(0.01)
    assert torch.isfinite(parameter).all()


@pytest.mark.parametrize(
    ("name", "shape", "rule"),
    [
        ("embed", (8, 4), "adamw"), ("head", (8, 4), "adamw"), ("norm", (4,), "adamw"),
        ("layers.0.hc_attn.fn", (24, 16), "muon"), ("layers.0.hc_attn.base", (24,), "adamw"),
        ("layers.0.hc_attn.scale", (3,), "adamw"), ("layers.2.attn.compressor.ape", (4, 8), "muon"),
        ("layers.0.attn.attn_sink", (4,), "adamw"), ("layers.0.ffn.gate.weight", (6, 4), "muon"),
        ("layers.0.ffn.experts.w1", (6, 8, 4), "muon"), ("draft.0.e_proj", (4, 4), "muon"),
    ],
)  # fmt: skip
def test_parameters_go_to_the_paper_s_optimiser(name, shape, rule):
    assert rule_for(name, torch.zeros(shape)) == rule


def test_parameters_without_gradient_are_left_alone():
    parameter = nn.Parameter(torch.ones(4, 4))
    optimizer = Optimizer([("layers.2.attn.indexer.wq_b", parameter)], OptimConfig())
    optimizer.step(1.0)
    assert torch.equal(parameter, torch.ones(4, 4))


def test_the_indexer_is_clipped_apart_from_the_backbone():
    backbone, indexer = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    backbone.grad, indexer.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    optimizer = Optimizer([("norm", backbone), ("layers.2.attn.indexer.norm", indexer)], OptimConfig())
    norms = optimizer.clip()
    assert norms == pytest.approx((0.5, 50.0))
    assert torch.allclose(backbone.grad, torch.tensor([0.3, 0.4]))
    assert torch.allclose(indexer.grad, torch.tensor([0.6, 0.8]))


def test_clipping_a_group_without_gradients_gives_zero():
    assert clip_gradients([[nn.Parameter(torch.zeros(2))]], 1.0) == [0.0]


def test_state_round_trip_continues_bit_equal():
    def make() -> tuple[nn.Parameter, nn.Parameter, Optimizer]:
        a, b = nn.Parameter(gaussian(8, 6).float()), nn.Parameter(gaussian(5, 4).float())
        return a, b, Optimizer([("layers.0.attn.wkv", a), ("head", b)], OptimConfig())

    def steps(a: nn.Parameter, b: nn.Parameter, optimizer: Optimizer, seeds: range) -> None:
        for seed in seeds:
            a.grad, b.grad = gaussian(8, 6, seed).float(), gaussian(5, 4, seed).float()
            optimizer.step(0.01)

    a, b, whole = make()
    steps(a, b, whole, range(6))
    c, d, first = make()
    steps(c, d, first, range(3))
    e, f, second = make()
    e.data, f.data = c.data.clone(), d.data.clone()
    second.load_state_dict(first.state_dict())
    steps(e, f, second, range(3, 6))
    assert torch.equal(a, e) and torch.equal(b, f)
