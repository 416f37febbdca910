"""Routing against the reference operators: affinities, choices with ties, and slots that hold every row once."""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu import route
from hadal.kernels.cpu.layout import STEP, Shapes
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.reference.moe import choose_experts, routing_weights
from tests.kernels.cpu.harness import Kernels, address, instruction_sets, shapes

ISAS = pytest.mark.parametrize("isa", instruction_sets())
NANO = shapes(hidden=96, experts=6, active=2)
ODD = shapes(hidden=96, experts=37, active=5)
FLASH = shapes(hidden=96, experts=256, active=6)
SIZES = pytest.mark.parametrize("sizes", [NANO, ODD, FLASH], ids=["nano", "odd", "flash"])
SEED, SCALE = 31, 1.5


@functools.cache
def compiled(isa: str, sizes: Shapes) -> Kernels:
    def emit(module: KernelModule) -> None:
        route.emit_route(module, sizes)
        route.emit_group(module, sizes)
        route.emit_gather(module, sizes)

    return Kernels(isa, emit)


def step_of(rows: int, ids: np.ndarray | None = None) -> np.ndarray:
    step = np.zeros(len(STEP), np.int64)
    step[STEP.index("rows")] = rows
    step[STEP.index("ids")] = 0 if ids is None else address(ids)
    return step


def logits_of(rows: int, sizes: Shapes) -> Tensor:
    """Random logits; what lies behind the last expert is larger than all of them."""
    print(f"seed {SEED}")
    wide = torch.full((rows, -(-sizes.experts // 16) * 16 + 32), 1e9)
    wide[:, : sizes.experts] = torch.randn(rows, sizes.experts, generator=torch.Generator().manual_seed(SEED)) * 3
    return wide


def choose(
    isa: str, sizes: Shapes, logits: Tensor, bias: Tensor, table: Tensor | None = None,
    ids: np.ndarray | None = None, threads: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Expert ids [T, K] and weights [T, K]."""
    rows = len(logits)
    chosen, weights = torch.full((rows, sizes.active), -1), torch.zeros(rows, sizes.active)
    padded = torch.cat((bias, torch.full((32,), 1e9)))
    compiled(isa, sizes).run(
        "route", step_of(rows, ids), threads, logits=address(logits), logits_stride=logits.stride(0) * 4,
        bias=address(padded), table=0 if table is None else address(table), ids=address(chosen),
        weights=address(weights), scale=struct.unpack("<i", struct.pack("<f", SCALE))[0],
    )  # fmt: skip
    return chosen, weights


def expected(sizes: Shapes, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.nn.functional.softplus(logits[:, : sizes.experts].double()).clamp_min(1e-30).sqrt()
    chosen = choose_experts(scores.float(), bias, sizes.active).sort(dim=-1).values
    return chosen, routing_weights(scores, chosen, SCALE)


@ISAS
@SIZES
def test_the_best_experts_are_chosen_by_biased_and_mixed_by_unbiased_affinity(isa: str, sizes: Shapes) -> None:
    logits = logits_of(50, sizes)
    bias = torch.linspace(-0.5, 0.5, sizes.experts)
    chosen, weights = choose(isa, sizes, logits, bias)
    wanted, wanted_weights = expected(sizes, logits, bias)
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(weights.double(), wanted_weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), SCALE), rtol=1e-6, atol=0)
    without, _ = choose(isa, sizes, logits, torch.zeros(sizes.experts))
    assert not torch.equal(without, chosen)


@ISAS
@SIZES
def test_ties_go_to_the_lower_index(isa: str, sizes: Shapes) -> None:
    logits = logits_of(6, sizes)
    logits[0, : sizes.experts] = 0.5
    logits[1, : sizes.experts] = -200  # every affinity at its floor
    logits[2, : sizes.experts] = torch.arange(sizes.experts) % 2 * 1.0
    logits[3, : sizes.experts] = torch.arange(sizes.experts) // 4 * 1.0
    logits[4, : sizes.experts] = 0
    logits[4, sizes.experts - 1] = 1
    logits[5, : sizes.experts] = 100.0 + torch.arange(sizes.experts) % 3
    chosen, weights = choose(isa, sizes, logits, torch.zeros(sizes.experts))
    wanted, wanted_weights = expected(sizes, logits, torch.zeros(sizes.experts))
    assert torch.equal(chosen, wanted) and weights.isfinite().all()
    torch.testing.assert_close(weights.double(), wanted_weights, rtol=1e-6, atol=0)
    assert chosen[0].tolist() == list(range(sizes.active))


@ISAS
@SIZES
def test_hash_layers_look_their_experts_up(isa: str, sizes: Shapes) -> None:
    g = torch.Generator().manual_seed(SEED)
    table = torch.rand(40, sizes.experts, generator=g).argsort(-1)[:, : sizes.active].contiguous()
    ids = np.array([39, 0, 7, 7, 12])
    logits = logits_of(5, sizes)
    chosen, weights = choose(isa, sizes, logits, torch.full((sizes.experts,), 9.0), table, ids)
    wanted = table[torch.from_numpy(ids)].sort(dim=-1).values
    scores = torch.nn.functional.softplus(logits[:, : sizes.experts].double()).sqrt()
    assert torch.equal(chosen, wanted)
    torch.testing.assert_close(weights.double(), routing_weights(scores, wanted, SCALE), rtol=1e-6, atol=0)


@ISAS
def test_a_row_is_routed_as_if_alone(isa: str) -> None:
    logits, bias = logits_of(17, ODD), torch.linspace(-1, 1, ODD.experts)
    chosen, weights = choose(isa, ODD, logits, bias, threads=3)
    for row in range(17):
        alone = choose(isa, ODD, logits[row : row + 1], bias)
        assert torch.equal(alone[0][0], chosen[row]) and torch.equal(alone[1][0], weights[row])


def assignments(kind: str, rows: int, sizes: Shapes) -> Tensor:
    """Expert ids [T, K], rising in every row."""
    first = torch.arange(sizes.active)
    if kind == "same":
        return first.repeat(rows, 1)
    if kind == "last":
        return (sizes.experts - sizes.active + first).repeat(rows, 1)
    order = torch.rand(rows, sizes.experts, generator=torch.Generator().manual_seed(SEED)).argsort(-1)
    return order[:, : sizes.active].sort(dim=-1).values.contiguous()


@ISAS
@SIZES
@pytest.mark.parametrize("kind", ["same", "last", "random"])
@pytest.mark.parametrize("rows", [1, 15, 100])
def test_rows_are_grouped_by_expert_and_gathered(isa: str, sizes: Shapes, kind: str, rows: int) -> None:
    ids, room = assignments(kind, rows, sizes), route.grouped_rows(rows, sizes.experts, sizes.active)
    groups, slots = np.full(1 + 3 * sizes.experts, -1), torch.full((rows, sizes.active), -1)
    kernels, step = compiled(isa, sizes), step_of(rows)
    for threads in (3, 1):
        kernels.run("group", step, threads, ids=address(ids), groups=address(groups), slots=address(slots))
    found = groups[1 : 1 + 3 * groups[0]].reshape(-1, 3).tolist()
    assert [e for e, _, _ in found] == ids.unique().tolist()
    assert all(first % route.SLOT_STEP == 0 for _, first, _ in found)
    places: dict[int, int] = {}
    for expert, first, count in found:
        assert count == int((ids == expert).sum())
        for slot in range(first, first + count):
            assert places.setdefault(slot, expert) == expert
    assert max(places) < room and len(places) == rows * sizes.active
    assert [places[s] for s in slots.flatten().tolist()] == ids.flatten().tolist()
    assert len(set(slots.flatten().tolist())) == slots.numel()
    for expert in ids.unique().tolist():
        own = slots[ids == expert]
        assert torch.equal(own, own.sort().values)  # rows keep their order

    source = torch.randn(rows, sizes.hidden + 32).bfloat16()
    weights, mixing = torch.rand(rows, sizes.active), torch.full((room,), -1.0)
    gathered = torch.zeros(room, sizes.hidden + 32, dtype=torch.bfloat16)
    for threads in (1, 4):
        gathered.zero_()
        kernels.run(
            "gather", step, threads, slots=address(slots), weights=address(weights), rows=address(source),
            row_stride=source.stride(0) * 2, out=address(gathered), out_stride=gathered.stride(0) * 2,
            mixing=address(mixing), lines=sizes.hidden * 2 // 64,
        )  # fmt: skip
        for k in range(sizes.active):
            assert torch.equal(gathered[slots[:, k], : sizes.hidden], source[:, : sizes.hidden])
        assert torch.equal(mixing[slots], weights)
    assert not gathered[:, sizes.hidden :].any() and int((mixing >= 0).sum()) == rows * sizes.active


@ISAS
@SIZES
def test_a_nan_never_leads_out_of_the_experts(isa: str, sizes: Shapes) -> None:
    logits, bias = logits_of(9, sizes), torch.zeros(sizes.experts)
    bias[sizes.experts - 1] = float("nan")
    logits[4, 0] = float("nan")
    chosen, _ = choose(isa, sizes, logits, bias)
    assert ((chosen >= 0) & (chosen < sizes.experts)).all()
    usable = torch.arange(9) != 4
    wanted, _ = expected(sizes, logits, bias.nan_to_num(-1e9))
    assert torch.equal(chosen[usable], wanted[usable])
