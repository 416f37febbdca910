"""Emitted functions against float64 and torch, with the error of each in units of the last place (ulp) of FP32."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from hadal.kernels.cpu import numbers
from hadal.kernels.cpu.ir import F32, I16, Function, Value, vec
from hadal.quant import fake_quant_fp8
from tests.kernels.cpu.harness import instruction_sets
from tests.kernels.cpu.vectors import VectorFunctions

ISAS = pytest.mark.parametrize("isa", instruction_sets())
SEED = 5


def _quantised(f: Function, x: Value) -> Value:
    """One group of 16 values."""
    (value,), _ = numbers.fake_quant_e4m3(f, [x])
    return value


@functools.cache
def compiled(isa: str) -> VectorFunctions:
    return VectorFunctions(
        isa,
        {
            "exp": numbers.exp,
            "log1p_unit": numbers.log1p_unit,
            "log": numbers.log,
            "softplus": numbers.softplus,
            "sigmoid": numbers.sigmoid,
            "silu": numbers.silu,
            "cosine": lambda f, x: numbers.cosine_sine(f, x)[0],
            "sine": lambda f, x: numbers.cosine_sine(f, x)[1],
            "round_bf16": numbers.round_bf16,
            "join_bf16": lambda f, x: numbers.join_bf16(f, x, -x),
            "widen_bf16": lambda f, x: numbers.widen_bf16(f, numbers.round_bf16(f, x)),
            "scale": lambda f, x: numbers.fake_quant_e4m3(f, [x])[1].spread(16),
            "fake_quant": _quantised,
            "polynomial": lambda f, x: numbers.polynomial(f, x, [3.0, -2.0, 0.5]),
        },
    )


def run(isa: str, name: str, x: np.ndarray) -> np.ndarray:
    return compiled(isa)(name, x.astype(np.float32), np.float32)


def ulps(found: np.ndarray, exact: np.ndarray) -> float:
    """The largest error in units of the last place of the exact value."""
    unit = np.spacing(np.maximum(np.abs(exact), 2.0**-126).astype(np.float32)).astype(np.float64)
    return float((np.abs(found.astype(np.float64) - exact) / unit).max())


def samples(low: float, high: float, *also: float) -> np.ndarray:
    """Uniform and geometric numbers between two borders, and some given ones."""
    rng = np.random.default_rng(SEED)
    print(f"seed {SEED}")
    small = rng.choice([-1, 1], 20000) * 10.0 ** rng.uniform(-30, 2, 20000)
    small = small[(small >= low) & (small <= high)]
    return np.concatenate((rng.uniform(low, high, 40000), small, also)).astype(np.float32)


@ISAS
def test_exp(isa: str) -> None:
    x = samples(-87.3, 88.0, 0.0, -0.0, 1.0, -87.3, 88.0)
    assert ulps(run(isa, "exp", x), np.exp(x.astype(np.float64))) < 1.5
    assert run(isa, "exp", np.array([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert not run(isa, "exp", np.array([-87.4, -100, -104, -1e30, -np.inf])).any()
    top = run(isa, "exp", np.array([88.0, 90, 1e30, np.inf]))
    assert np.isfinite(top).all() and (top == top[0]).all()


@ISAS
def test_log1p_from_minus_a_half_to_one(isa: str) -> None:
    x = samples(-0.5, 1.0, -0.5, 0.0, 1.0)
    assert ulps(run(isa, "log1p_unit", x), np.log1p(x.astype(np.float64))) < 3


@ISAS
def test_log(isa: str) -> None:
    beside = 1 + np.arange(-2000, 2000) * 2.0**-23
    x = np.concatenate((samples(1e-30, 100.0), beside, [2.0**-126, 3.4e38, 0.5, 2**-0.5])).astype(np.float32)
    assert ulps(run(isa, "log", x), np.log(x.astype(np.float64))) < 3
    assert run(isa, "log", np.ones(1)).tolist() == [0.0]


@ISAS
def test_softplus(isa: str) -> None:
    x = samples(-80.0, 80.0, 0.0, 1e4, -87.0)
    exact = np.logaddexp(0, x.astype(np.float64))
    assert ulps(run(isa, "softplus", x), exact) < 4
    far = run(isa, "softplus", np.array([-1e30, -200, 200, 1e30, np.inf]))
    assert far.tolist() == [0, 0, 200, np.float32(1e30), np.inf]


@ISAS
def test_sigmoid_and_silu(isa: str) -> None:
    x = samples(-85.0, 85.0, 0.0, -0.0)
    wide = x.astype(np.float64)
    assert ulps(run(isa, "sigmoid", x), 1 / (1 + np.exp(-wide))) < 3
    assert ulps(run(isa, "silu", x), wide / (1 + np.exp(-wide))) < 3
    far = run(isa, "silu", np.array([-1e4, -200, 200, 1e30]))
    assert (np.abs(far[:2]) < 1e-33).all() and far[2:].tolist() == [200, np.float32(1e30)]


@ISAS
def test_cosine_and_sine_of_a_million_radians(isa: str) -> None:
    rng = np.random.default_rng(SEED)
    near = np.arange(-40, 640000, 977) * (np.pi / 2)
    frequency = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)
    positions = np.concatenate((np.arange(300), rng.integers(0, 1 << 20, 700), [(1 << 20) - 1])).astype(np.float32)
    angles = positions[:, None] * frequency  # FP32, as the model rounds them
    x = np.concatenate((samples(-1e6, 1e6, 0.0, 1e6), near.astype(np.float32), angles.reshape(-1)))
    assert ulps(run(isa, "cosine", x), np.cos(x.astype(np.float64))) < 0.501
    assert ulps(run(isa, "sine", x), np.sin(x.astype(np.float64))) < 0.501
    assert run(isa, "cosine", np.zeros(1)).tolist() == [1.0] and run(isa, "sine", np.zeros(1)).tolist() == [0.0]


@ISAS
def test_bf16_rounding_is_torchs(isa: str) -> None:
    halfway = (np.arange(1, 4000, dtype=np.uint32) << 16 | 0x3F808000).view(np.float32)
    x = np.concatenate((samples(-3e38, 3e38, 0.0, -0.0, np.inf, -np.inf, 3.4e38, -3.4e38), halfway, -halfway))
    x = x[np.isfinite(x) | np.isinf(x)].astype(np.float32)
    x = x[(np.abs(x) >= 2.0**-126) | (x == 0)]
    wanted = torch.from_numpy(x).bfloat16()
    words = compiled(isa)("round_bf16", x, np.int16)
    assert np.array_equal(words, wanted.view(torch.int16).numpy())
    assert np.array_equal(run(isa, "widen_bf16", x), wanted.float().numpy())
    whole = x[: len(x) // 16 * 16]
    joined = compiled(isa)("join_bf16", whole, np.int16).reshape(-1, 2, 16)
    both = torch.from_numpy(np.stack((whole.reshape(-1, 16), -whole.reshape(-1, 16)), 1)).bfloat16()
    assert np.array_equal(joined, both.view(torch.int16).numpy())


@ISAS
def test_subnormals_become_bf16_or_zero(isa: str) -> None:
    x = np.array([1e-39, -1e-39, 1e-45, 1.1e-38], np.float32)
    words = torch.from_numpy(compiled(isa)("round_bf16", x, np.int16).copy()).view(torch.bfloat16).float().numpy()
    rounded = torch.from_numpy(x).bfloat16().float().numpy()
    assert all(found in (0.0, exact) for found, exact in zip(words, rounded, strict=True))


@ISAS
def test_fake_quantised_values_are_those_of_the_official_rounding(isa: str) -> None:
    g = torch.Generator().manual_seed(SEED)
    rows = torch.randn(3000, 16, generator=g) * 10.0 ** torch.randint(-8, 5, (3000, 1), generator=g)
    rows[:500] *= 10.0 ** -torch.rand(500, 16, generator=g).mul(9)
    exact_codes = torch.randn(500, 16, generator=g).mul(60).to(torch.float8_e4m3fn).float()
    rows[500:1000] = exact_codes * (1 + torch.tensor([2**-4, -(2**-5)]).repeat(8))  # halfway between codes
    rows[1000] = 0
    rows[1001] = 448
    rows[1002, ::3] = -0.0
    rows[1003] = torch.tensor([448 * 2.0**-20] * 15 + [1e-4])
    wanted = fake_quant_fp8(rows, 16).numpy().reshape(-1)
    found = run(isa, "fake_quant", rows.numpy())
    assert np.array_equal(found.view(np.int32), wanted.view(np.int32))
    scale = run(isa, "scale", rows.numpy()).reshape(-1, 16)[:, 0]
    assert (np.frexp(scale)[0] == 0.5).all()
    amax = rows.abs().amax(1).clamp(min=1e-4).numpy().astype(np.float64)
    assert (amax <= scale * 448.0).all() and (amax > scale * 223.9).all()


@ISAS
def test_polynomial(isa: str) -> None:
    x = samples(-3, 3)
    assert np.allclose(run(isa, "polynomial", x), 3 - 2 * x + 0.5 * x * x, atol=1e-5)


def test_every_instruction_set_computes_the_same_bits() -> None:
    x = samples(-30, 30)
    for name in ("exp", "softplus", "silu", "cosine", "sine", "fake_quant"):
        first, *others = (run(isa, name, x) for isa in instruction_sets())
        assert all(np.array_equal(first.view(np.int32), o.view(np.int32)) for o in others), name


def test_kinds_of_other_widths_are_taken() -> None:
    rules = {"narrow": lambda f, x: numbers.exp(f, x.pick(range(8))).pick([*range(8), *range(8)])}
    (isa, *_) = instruction_sets()
    found = VectorFunctions(isa, rules)("narrow", np.arange(16, dtype=np.float32), np.float32)
    assert ulps(found[:8], np.exp(np.arange(8.0))) < 1.5 and np.array_equal(found[:8], found[8:])
    assert vec(16, F32) != vec(16, I16)
