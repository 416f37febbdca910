"""The table `cpu` against the reference operators: values, rounding, company, empty experts, ties, what is kept."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.checkpoint import CheckpointError, load_model
from hadal.kernels import KernelError, Numerics, kernel_table
from hadal.kernels.cpu import call, panels
from hadal.kernels.cpu.pack import Weight
from hadal.kernels.cpu.target import detect
from hadal.quant import PackedWeight, fake_quant_fp8, quantise_fp4, quantise_fp8
from tests.kernels.cpu.harness import instruction_sets, random
from tests.kernels.cpu.models import tokens, write_tiny

REFERENCE = kernel_table("reference")
FAITHFUL = Numerics(torch.bfloat16, fake_quant=True, quantised_dense=True, quantised_experts=True)
PLAIN = Numerics(torch.bfloat16, fake_quant=True)
FORMS = ["bf16", "fp8", "fp4"]
SEEDS = st.integers(0, 10**6)
LIMIT = 2.0

if not instruction_sets():
    pytest.skip("no emitted kernels for this processor", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("isa")
CPU = kernel_table("cpu")


def weight(form: str, seed: int, rows: int, columns: int) -> Weight:
    dense = random(seed, rows, columns) * columns**-0.5
    return {"bf16": torch.Tensor.bfloat16, "fp8": quantise_fp8, "fp4": quantise_fp4}[form](dense)  # type: ignore


def wide(value: Weight) -> Tensor:
    """The values in FP64."""
    return value.dense().double() if isinstance(value, PackedWeight) else value.double()


def ulp(x: Tensor) -> Tensor:
    """Distance of neighbouring BF16 numbers at x."""
    return torch.ldexp(torch.ones_like(x), x.abs().clamp_min(1e-30).log2().floor().int() - 7)


def assert_rounded_sums(found: Tensor, x: Tensor, w: Tensor) -> None:
    """`found` is x @ w.T in FP64 but for FP32 sums and one rounding to BF16."""
    exact, size = x.double() @ w.T, x.double().abs() @ w.abs().T
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 0.5 * ulp(exact) + size * 2.0**-19).all()


def share(found: Tensor, want: Tensor) -> float:
    """Of elements that differ, where only the order of FP32 sums and a last bit of exp may."""
    return float((found != want).double().mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "columns", "outputs"), [(1, 160, 80), (5, 512, 64), (37, 96, 33), (600, 256, 128)])
def test_a_product_sums_in_fp32_and_rounds_once(form: str, rows: int, columns: int, outputs: int) -> None:
    x, w = random(1, rows, columns).bfloat16(), weight(form, 2, outputs, columns)
    for quantised in (False, True):
        found = CPU.linear(x, w, FAITHFUL, quantise_input=quantised)
        assert_rounded_sums(found, fake_quant_fp8(x, 128) if quantised else x, wide(w))
        want = REFERENCE.linear(x, w, FAITHFUL, quantise_input=quantised)
        assert share(found, want) < 0.004  # 1e-5 of all elements here; one of 320 where the most differ


@given(seed=SEEDS, rows=st.integers(1, 20), groups=st.integers(1, 9), exponent=st.integers(-30, 30))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_inputs_are_rounded_to_fp8_to_the_bit(seed: int, rows: int, groups: int, exponent: int) -> None:
    """A product with the identity shows its input."""
    spread = torch.exp2((random(seed + 1, rows, 32 * groups) * 3).round())
    x = (random(seed, rows, 32 * groups) * spread * 2.0**exponent).bfloat16()
    x[:, :32] = (x[:, :32].float() * 4).round().bfloat16() / 4  # values half way between codes
    x[0] = 0
    identity = torch.eye(32 * groups, dtype=torch.bfloat16)
    assert torch.equal(CPU.linear(x, identity, FAITHFUL, quantise_input=True), fake_quant_fp8(x, 128))
    assert torch.equal(CPU.linear(x, identity, FAITHFUL, quantise_input=False), x)


@pytest.mark.parametrize("form", FORMS)
def test_output_groups_multiply_their_own_columns(form: str) -> None:
    x, w = random(3, 21, 3, 96).bfloat16(), weight(form, 4, 3 * 64, 96)
    found = CPU.linear_groups(x, w, FAITHFUL)
    for g in range(3):
        assert_rounded_sums(found[:, 64 * g : 64 * g + 64], x[:, g], wide(w)[64 * g : 64 * g + 64])
    assert share(found, REFERENCE.linear_groups(x, w, FAITHFUL)) < 0.001  # none measured


def test_an_fp32_product_of_bf16_numbers_keeps_fp32() -> None:
    x, w = random(5, 19, 160).bfloat16(), random(6, 70, 160).bfloat16().float()
    found = CPU.linear_f32(x, w)
    size = x.double().abs() @ w.double().abs().T
    assert found.dtype == torch.float32
    assert ((found.double() - x.double() @ w.double().T).abs() <= size * 2.0**-19).all()
    fine = w + 2.0**-12 * w  # no BF16 numbers: nothing may be rounded
    exact = x.double() @ fine.double().T
    assert ((CPU.linear_f32(x, fine).double() - exact).abs() <= size * 2.0**-19).all()
    assert torch.equal(CPU.linear_f32(x.float(), w), REFERENCE.linear_f32(x.float(), w))


def test_equal_rows_of_a_gate_tie_to_the_lower_expert() -> None:
    x, gate = random(7, 40, 96).bfloat16(), random(8, 3, 96).bfloat16().float().repeat(4, 1)
    scores = CPU.affinities(x, gate)
    torch.testing.assert_close(scores, REFERENCE.affinities(x, gate), atol=1e-5, rtol=1e-5)
    for copy in range(1, 4):
        assert torch.equal(scores[:, :3], scores[:, 3 * copy : 3 * copy + 3])
    chosen = CPU.choose_experts(scores, torch.zeros(12), 4)
    assert (chosen % 3 == chosen[:, :1]).all() and (chosen // 3 == torch.arange(4)).all()


@pytest.mark.parametrize("quantised", [False, True])
def test_the_activation_is_the_reference_s_to_one_step(quantised: bool) -> None:
    """Identities around it leave the clamped branches and what becomes of them."""
    x = (random(9, 64, 96) * 2).bfloat16()
    identity = torch.eye(96, dtype=torch.bfloat16)
    mixing = random(10, 64, 1).abs()
    arguments = dict(limit=LIMIT, quantise_input=quantised, weight=mixing)
    found = CPU.swiglu(x, identity, identity, identity, FAITHFUL, **arguments)
    want = REFERENCE.swiglu(x, identity, identity, identity, FAITHFUL, **arguments)
    step = ulp(want) * (16 if quantised else 1)
    assert ((found - want).abs() <= step).all() and share(found, want) < 0.001  # none measured


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixed", [False, True])
def test_an_expert_is_the_reference_s(form: str, mixed: bool) -> None:
    w1, w2, w3 = weight(form, 11, 64, 96), weight(form, 12, 96, 64), weight(form, 13, 64, 96)
    x = random(14, 45, 96).bfloat16() * 2
    arguments = dict(limit=LIMIT, quantise_input=form != "bf16", weight=random(15, 45, 1).abs() if mixed else None)
    found = CPU.swiglu(x, w1, w2, w3, FAITHFUL, **arguments)
    want = REFERENCE.swiglu(x, w1, w2, w3, FAITHFUL, **arguments)
    assert found.shape == want.shape and found.dtype == want.dtype
    assert rms(found - want) < 1e-5 * rms(want) and share(found, want) < 0.002  # 3e-5 measured, one of 4,320 at most


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def experts(form: str, count: int, hidden: int, width: int) -> list[list[Weight] | Tensor]:
    """w1, w2, w3 of all experts."""
    shapes = ((width, hidden), (hidden, width), (width, hidden))
    stacks = [[weight(form, 100 * i + e, *shape) for e in range(count)] for i, shape in enumerate(shapes)]
    return [torch.stack(s) if form == "bf16" else s for s in stacks]  # type: ignore[arg-type, misc]


@pytest.mark.parametrize("form", FORMS)
@given(seed=SEEDS, rows=st.sampled_from([1, 2, 7, 40]), active=st.integers(1, 4), few=st.booleans())
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_experts_are_summed_as_in_the_reference(form: str, seed: int, rows: int, active: int, few: bool) -> None:
    """Also with experts that nobody names, that all name, and that one token names twice."""
    w1, w2, w3 = experts(form, 6, 96, 64)
    num = PLAIN if form == "bf16" else FAITHFUL
    x, mixing = random(seed, rows, 96).bfloat16(), random(seed + 1, rows, active).abs()
    ids = torch.randint(0, 2 if few else 6, (rows, active), generator=torch.Generator().manual_seed(seed))
    found = CPU.routed_experts(x, ids, mixing, w1, w2, w3, num, LIMIT)
    want = REFERENCE.routed_experts(x, ids, mixing, w1, w2, w3, num, LIMIT)
    assert found.dtype == torch.float32 and rms(found - want) < 2e-3 * rms(
        want
    )  # a few BF16 ulps; FP8 left out costs 5e-2
    for t in range(rows):
        alone = CPU.routed_experts(x[t : t + 1], ids[t : t + 1], mixing[t : t + 1], w1, w2, w3, num, LIMIT)
        assert torch.equal(found[t : t + 1], alone)


@pytest.mark.parametrize("form", FORMS)
def test_experts_wider_than_the_model_find_room_to_expand(form: str) -> None:
    """The second product needs more scratch than the first, whose address is already taken."""
    w1, w2, w3 = experts(form, 2, 64, 8192)
    num = PLAIN if form == "bf16" else FAITHFUL
    x, ids, mixing = random(3, 4, 64).bfloat16(), torch.tensor([[0], [1], [0], [1]]), random(4, 4, 1).abs()
    found = CPU.routed_experts(x, ids, mixing, w1, w2, w3, num, LIMIT)
    want = REFERENCE.routed_experts(x, ids, mixing, w1, w2, w3, num, LIMIT)
    assert rms(found - want) < 2e-3 * rms(want)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_s_bits_depend_on_no_other_row_and_no_thread(form: str) -> None:
    x, w = random(20, 70, 160).bfloat16(), weight(form, 21, 80, 160)
    up, back = weight(form, 22, 80, 160), weight(form, 23, 160, 96)
    into = weight(form, 24, 96, 160), weight(form, 25, 96, 160)

    def operators(rows: Tensor) -> list[Tensor]:
        group = rows.unflatten(1, (5, 32))
        return [
            CPU.linear(rows, w, FAITHFUL, quantise_input=True),
            CPU.linear(rows, up, FAITHFUL, quantise_input=False),
            CPU.swiglu(rows, into[0], back, into[1], FAITHFUL, limit=LIMIT, quantise_input=True, weight=None),
            CPU.linear_groups(group, weight(form, 26, 5 * 32, 32), FAITHFUL),
            CPU.linear_f32(rows, wide(up).float()),
            CPU.linear_f32(rows, random(27, 35, 160)),
            CPU.linear_groups(group, weight("bf16", 28, 5 * 16, 32), FAITHFUL),
        ]

    together = operators(x)
    for begin, end in ((0, 1), (3, 5), (10, 27), (40, 70), (69, 70)):
        for whole, part in zip(together, operators(x[begin:end]), strict=True):
            assert torch.equal(whole[begin:end], part)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(together, operators(x), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_rows_may_lie_anywhere_and_have_more_dimensions() -> None:
    w = weight("fp8", 30, 64, 96)
    whole = random(31, 12, 2, 200).bfloat16()
    x = whole[:, :, 5:101]
    found = CPU.linear(x, w, FAITHFUL, quantise_input=True)
    assert found.shape == (12, 2, 64)
    assert torch.equal(found.flatten(0, 1), CPU.linear(x.reshape(24, 96).clone(), w, FAITHFUL, quantise_input=True))


def test_what_does_not_fit_is_the_reference_s_to_the_byte() -> None:
    odd = random(32, 40, 100).bfloat16()
    w = weight("bf16", 33, 64, 100)
    assert torch.equal(
        CPU.linear(odd, w, PLAIN, quantise_input=False), REFERENCE.linear(odd, w, PLAIN, quantise_input=False)
    )
    x, w8 = random(34, 4, 96), weight("fp8", 35, 64, 96)
    exact = Numerics()
    assert torch.equal(
        CPU.linear(x, w8, exact, quantise_input=False), REFERENCE.linear(x, w8, exact, quantise_input=False)
    )
    assert CPU.linear(x[:0].bfloat16(), w8, PLAIN, quantise_input=False).shape == (0, 64)


def test_gradients_flow_as_through_the_reference() -> None:
    gradients = []
    for table in (CPU, REFERENCE):
        x = random(36, 4, 96).bfloat16().requires_grad_()
        w = weight("bf16", 37, 64, 96).requires_grad_()  # type: ignore[union-attr]
        table.linear(x, w, PLAIN, quantise_input=False).sum().backward()
        gradients.append((x.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_panels_are_made_once_follow_writes_and_go_with_their_weight() -> None:
    x, w = random(38, 3, 96).bfloat16(), weight("bf16", 39, 64, 96)
    before = len(panels._kept)
    with patch.object(panels, "pack", wraps=panels.pack) as pack:
        first = CPU.linear(x, w, PLAIN, quantise_input=False)
        CPU.linear(x, w, PLAIN, quantise_input=False)
        assert pack.call_count == 1 and len(panels._kept) == before + 1
        w.mul_(2)  # type: ignore[union-attr]
        assert torch.equal(CPU.linear(x, w, PLAIN, quantise_input=False), first * 2)
        assert pack.call_count == 2 and len(panels._kept) == before + 1
        pack.reset_mock()  # it remembers the weight
    del w
    gc.collect()
    assert len(panels._kept) == before


def test_buffers_grow_no_further_than_the_largest_call() -> None:
    x, w = random(40, 64, 96).bfloat16(), weight("fp8", 41, 64, 96)
    CPU.linear(x, w, FAITHFUL, quantise_input=True)
    held = {name: space.address for name, space in call._spaces.items()}
    for rows in (64, 1, 17):
        CPU.linear(x[:rows], w, FAITHFUL, quantise_input=True)
    assert {name: space.address for name, space in call._spaces.items()} == held


def test_models_take_the_table_in_bfloat16_and_the_runner_by_themselves(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m", "fp4")

    def chosen(**options: object) -> tuple[str, bool, bool]:
        model = load_model(path, device="cpu", **options)  # type: ignore[arg-type]
        return model.ops.name, model.runner is not None, isinstance(model.blocks[0].attn.wq_a, PackedWeight)

    assert chosen() == chosen(backend="cpu") == ("fused", True, True)
    assert chosen(dtype="bfloat16") == chosen(dtype="bfloat16", backend="cpu") == ("cpu", False, True)
    assert chosen(dtype="bfloat16", weights="dense") == ("fused", False, False)
    assert chosen(dtype="bfloat16", weights="dense", backend="cpu") == ("cpu", False, False)
    assert chosen(dtype="bfloat16", backend="reference") == ("reference", False, False)
    assert chosen(dtype="float32") == ("fused", False, False)
    for options in (dict(dtype="float32"), dict(fake_quant=True), dict(weights="dense")):
        with pytest.raises(CheckpointError, match="the emitted CPU kernels cannot run this model"):
            chosen(backend="cpu", **options)


@pytest.mark.parametrize("kind", ["fp4", "fp8", "bf16"])
def test_a_model_continues_as_on_the_reference(tmp_path: Path, kind: str) -> None:
    path = write_tiny(tmp_path / kind, kind)
    # Torch rounds the root of the last few heads' norms twice, which random weights answer with other tokens.
    reference = replace(REFERENCE, head_norm=CPU.head_norm)
    found, want = (load_model(path, device="cpu", dtype="bfloat16", backend=b) for b in ("cpu", reference))
    ids = tokens(found, 50, 140)
    state, other = found.new_state(), want.new_state()
    for begin, end in ((0, 130), (130, 131), (131, 140)):
        a, b = found.logits(ids[begin:end], state), want.logits(ids[begin:end], other)
        assert a.isfinite().all() and (a - b).abs().median() < 0.2 * b.std()


def test_without_kernels_the_table_is_refused_and_models_run_in_plain_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "m", "fp4")
    try:
        monkeypatch.setenv("HADAL_CPU", "none")
        detect.cache_clear()
        kernel_table.__globals__["_cpu"].cache_clear()
        with pytest.raises(KernelError, match="HADAL_CPU=none"):
            kernel_table("cpu")
        assert load_model(path, device="cpu", dtype="bfloat16").ops.name == "fused"
        with pytest.raises(CheckpointError, match="HADAL_CPU=none"):
            load_model(path, device="cpu", dtype="bfloat16", backend="cpu")
    finally:
        monkeypatch.undo()
        detect.cache_clear()
