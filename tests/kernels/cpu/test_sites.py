"""Norms, hyper-connections, pooling and affinities of the table `cpu`: the reference's values, in any company."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.kernels import kernel_table
from tests.kernels.cpu.harness import instruction_sets, random

REFERENCE = kernel_table("reference")
EPS = 1e-6
EXAMPLES = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SEEDS, COUNTS = st.integers(0, 10**6), st.sampled_from([1, 2, 5, 16, 17, 64])

if not instruction_sets():
    pytest.skip("no emitted kernels for this processor", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("isa")
CPU = kernel_table("cpu")
CANCELLED = 2e-6  # of sums of a few numbers near 1


def assert_rounded(found: Tensor, exact: Tensor, slack: float = 0.0) -> None:
    """BF16 numbers that are the exact ones but for one rounding and FP32 sums, off by `slack` where terms cancel."""
    ulp = torch.ldexp(torch.ones_like(exact), exact.abs().clamp_min(1e-30).log2().floor().int() - 7)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    assert ((found.double() - exact).abs() <= 0.51 * ulp + slack).all()


def assert_alone(operator: Callable[[slice], Tensor], count: int) -> None:
    """Rows have the same bits together, alone and on two threads."""
    whole = operator(slice(None))
    for t in range(0, count, 3):
        assert torch.equal(operator(slice(t, t + 1)), whole[t : t + 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(operator(slice(None)), whole)
    finally:
        torch.set_num_threads(threads)


@EXAMPLES
@given(SEEDS, COUNTS, st.sampled_from([16, 48, 160, 512]), st.floats(-8, 8))
def test_a_norm_is_rounded_once(seed: int, count: int, columns: int, size: float) -> None:
    x, weight = (random(seed, count, columns) * 2**size).bfloat16(), random(seed + 1, columns)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()
    assert_rounded(CPU.rms_norm(x, weight, EPS), exact)
    assert_alone(lambda rows: CPU.rms_norm(x[rows], weight, EPS), count)


@EXAMPLES
@given(SEEDS, COUNTS, st.sampled_from([16, 48, 512]), st.floats(-14, 8))
def test_heads_are_normed_with_every_step_in_bf16(seed: int, count: int, columns: int, size: float) -> None:
    """Each step in FP64 and rounded to BF16; eps is a BF16 number too."""
    q = (random(seed, count, 3, columns) * 2**size).bfloat16()
    mean = q.double().square().bfloat16().double().mean(-1, keepdim=True).bfloat16()
    root = (mean.double() + torch.tensor(EPS).bfloat16().double()).bfloat16().double().rsqrt().bfloat16()
    assert torch.equal(CPU.head_norm(q, EPS), (q.double() * root.double()).bfloat16())
    assert_alone(lambda rows: CPU.head_norm(q[rows], EPS), count)


@EXAMPLES
@given(SEEDS, COUNTS, st.sampled_from([2, 4, 5]), st.sampled_from([16, 96]))
def test_maps_and_mixtures_are_the_reference_s(seed: int, count: int, n: int, d: int) -> None:
    x, y = random(seed, count, n, d).bfloat16(), random(seed + 1, count, d).bfloat16()
    fn, base, scale = random(seed + 2, n * (n + 2), n * d) * 0.1, random(seed + 3, n * (n + 2)), random(seed + 4, 3)
    options = dict(iterations=20, eps=EPS, norm_eps=EPS)
    found = CPU.stream_maps(x, fn, base, scale, **options)
    want = REFERENCE.stream_maps(x, fn, base, scale, **options)
    for a, b in zip(found, want, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-5)
    pre, post, comb = found
    assert_rounded(CPU.mix_in(x, pre), (x.double() * pre.double().unsqueeze(2)).sum(1), CANCELLED)
    mixed = torch.einsum("tjk,tjd->tkd", comb.double(), x.double()) + post.double().unsqueeze(2) * y.double()[:, None]
    assert_rounded(CPU.mix_out(x, y, post, comb), mixed, CANCELLED)
    assert_rounded(CPU.mix_out(x, y, post.contiguous(), comb.contiguous()), mixed, CANCELLED)
    collapse = CPU.collapse_map(x, fn[:n], base[:n], scale[:1], eps=EPS, norm_eps=EPS)
    torch.testing.assert_close(
        collapse, REFERENCE.collapse_map(x, fn[:n], base[:n], scale[:1], eps=EPS, norm_eps=EPS), atol=2e-6, rtol=2e-5
    )

    def site(rows: slice) -> Tensor:
        pre, post, comb = CPU.stream_maps(x[rows], fn, base, scale, **options)
        weights = CPU.collapse_map(x[rows], fn[:n], base[:n], scale[:1], eps=EPS, norm_eps=EPS)
        parts = (CPU.mix_in(x[rows], pre), CPU.mix_in(x[rows], weights), CPU.mix_out(x[rows], y[rows], post, comb))
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    assert_alone(site, count)


@EXAMPLES
@given(SEEDS, st.integers(1, 9), st.sampled_from([(4, True), (16, False), (128, False)]), st.sampled_from([16, 96]))
def test_blocks_are_pooled_as_in_the_reference(seed: int, count: int, kind: tuple[int, bool], dim: int) -> None:
    """With and without overlap, also the first block, and rows that are columns of something wider."""
    ratio, overlap = kind
    both = random(seed, ratio * count, (4 if overlap else 2) * dim) * 3
    kv, score = both.chunk(2, dim=1)
    rows = torch.arange(ratio * count).view(count, ratio)
    there = torch.arange(count) > 0
    previous = (rows - ratio).clamp(min=0) if overlap else None

    def pool(blocks: slice) -> Tensor:
        before = None if previous is None else previous[blocks]
        return CPU.pool_blocks(kv, score, rows[blocks], before, there[blocks] if overlap else None)

    want = REFERENCE.pool_blocks(kv.double(), score.double(), rows, previous, there if overlap else None)
    torch.testing.assert_close(pool(slice(None)).double(), want, atol=1e-5, rtol=1e-5)
    assert_alone(pool, count)


@EXAMPLES
@given(SEEDS, COUNTS, st.sampled_from([3, 6, 17]))
def test_affinities_and_routing_weights_are_the_reference_s(seed: int, count: int, experts: int) -> None:
    x, gate = random(seed, count, 96).bfloat16() * 3, random(seed + 1, experts, 96).bfloat16().float()
    scores = CPU.affinities(x, gate)
    torch.testing.assert_close(scores, REFERENCE.affinities(x, gate), atol=1e-6, rtol=1e-4)
    ids = CPU.choose_experts(scores, torch.zeros(experts), 3)
    weights = CPU.routing_weights(scores, ids, 1.5)
    torch.testing.assert_close(weights, REFERENCE.routing_weights(scores, ids, 1.5))
    assert_alone(lambda rows: CPU.affinities(x[rows], gate), count)
    assert_alone(lambda rows: CPU.routing_weights(scores[rows], ids[rows], 1.5), count)


def test_gradients_and_odd_widths_go_to_the_reference() -> None:
    x, weight = random(1, 5, 96).bfloat16().requires_grad_(), torch.ones(96, requires_grad=True)
    CPU.rms_norm(x, weight, EPS).sum().backward()
    assert x.grad is not None and weight.grad is not None
    odd = random(2, 5, 30).bfloat16()
    assert torch.equal(CPU.rms_norm(odd, torch.ones(30), EPS), REFERENCE.rms_norm(odd, torch.ones(30), EPS))
