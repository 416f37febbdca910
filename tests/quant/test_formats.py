from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hadal import quant
from hadal.quant.formats import E2M1_RECIPROCAL, E4M3_RECIPROCAL
from tests.quant import oracle

ALL_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
FINITE = ALL_BFLOAT16[torch.isfinite(ALL_BFLOAT16)]


def same_bits(a: torch.Tensor, b: np.ndarray) -> bool:
    return bool(np.array_equal(a.float().numpy().view(np.int32), b.astype(np.float32).view(np.int32)))


def test_every_e2m1_code_has_its_value() -> None:
    assert same_bits(quant.decode_e2m1(torch.arange(16, dtype=torch.uint8)), np.array(oracle.E2M1))


def test_every_e2m1_value_encodes_to_its_code() -> None:
    values = torch.tensor(oracle.E2M1)
    assert quant.encode_e2m1(values).tolist() == list(range(16))


def test_e2m1_rounds_every_bfloat16_to_nearest_even() -> None:
    assert same_bits(quant.round_e2m1(FINITE), oracle.nearest(FINITE.numpy(), oracle.E2M1))


def test_e4m3_rounds_every_bfloat16_to_nearest_even() -> None:
    assert same_bits(quant.round_e4m3(FINITE), oracle.nearest(FINITE.numpy(), oracle.E4M3))


def test_e4m3_agrees_with_torch_on_float32_values_around_every_tie() -> None:
    positive = torch.tensor([v for v in oracle.E4M3[:127]])
    ties = (positive[1:] + positive[:-1]) / 2
    around = torch.cat((ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)))
    assert torch.equal(quant.round_e4m3(around), around.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("tie", "even"), [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5.0, 4)])
def test_e2m1_ties_go_to_the_even_code(tie: float, even: float) -> None:
    assert quant.round_e2m1(torch.tensor([tie, -tie])).tolist() == [even, -even]


def test_nan_stays_nan_when_rounding() -> None:
    nan = torch.tensor([math.nan])
    assert quant.round_e2m1(nan).isnan().all() and quant.round_e4m3(nan).isnan().all()


def test_packing_puts_even_columns_into_low_nibbles() -> None:
    codes = torch.tensor([[0x1, 0xF, 0x0, 0x8]], dtype=torch.uint8)
    assert quant.pack_fp4(codes).tolist() == [[0xF1, 0x80]]


def test_every_byte_survives_unpacking_and_packing_signed_or_not() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    codes = quant.unpack_fp4(every)
    assert codes.tolist() == [nibble for byte in range(256) for nibble in (byte % 16, byte // 16)]
    assert torch.equal(quant.pack_fp4(codes), every)
    assert torch.equal(quant.unpack_fp4(every.view(torch.int8)), codes)


def test_odd_columns_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="3 columns"):
        quant.pack_fp4(torch.zeros(2, 3, dtype=torch.uint8))


def test_every_e8m0_byte_is_its_power_of_two() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = quant.e8m0_to_float(every)
    assert values[:255].tolist() == [math.ldexp(1.0, byte - 127) for byte in range(255)]
    assert values[255].isnan()
    assert torch.equal(quant.float_to_e8m0(values).view(torch.uint8), every)


@pytest.mark.parametrize("value", [3.0, 0.0, -1.0, math.inf, 2.0**-130])
def test_e8m0_refuses_what_it_cannot_hold(value: float) -> None:
    with pytest.raises(ValueError, match="powers of two"):
        quant.float_to_e8m0(torch.tensor([1.0, value]))


@pytest.mark.parametrize("divisor", [6, 448])
def test_scales_round_up_by_the_bits(divisor: int) -> None:
    reciprocal = E2M1_RECIPROCAL if divisor == 6 else E4M3_RECIPROCAL
    exact = divisor * torch.exp2(torch.arange(-20.0, 20.0))
    random = torch.rand(2000, generator=torch.Generator().manual_seed(5)) * torch.exp2(torch.arange(2000) % 60 - 30.0)
    amax = torch.cat((exact, torch.nextafter(exact, exact * 2), torch.nextafter(exact, exact / 2), random))
    expected = [oracle.scale(float(a), np.float32(1 / divisor)) for a in amax]
    assert quant.ceil_pow2_scale(amax, reciprocal).tolist() == expected


def spread_values(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-24, 12, (rows, 1), generator=generator).float())
    x[0] = 0
    x[1, ::3] = 0
    return x


@pytest.mark.parametrize(("columns", "group"), [(448, 64), (256, 128), (200, 128), (80, 128), (70, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_fp8_equals_the_definition(columns: int, group: int, dtype: torch.dtype) -> None:
    x = spread_values(40, columns, seed=columns).to(dtype)
    got = quant.fake_quant_fp8(x, group)
    expected = oracle.fake_quant(x.float().numpy(), group, oracle.E4M3, 1e-4, 448)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(expected).to(torch.float32).to(dtype))


@pytest.mark.parametrize("columns", [128, 64, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_fp4_equals_the_definition(columns: int, dtype: torch.dtype) -> None:
    x = spread_values(40, columns, seed=columns).to(dtype)
    got = quant.fake_quant_fp4(x)
    expected = oracle.fake_quant(x.float().numpy(), 32, oracle.E2M1, 6 * 2.0**-126, 6)
    assert got.dtype == dtype
    assert torch.equal(got, torch.from_numpy(expected).to(torch.float32).to(dtype))


def test_fake_quantisers_keep_any_shape_and_no_rows_at_all() -> None:
    for shape in [(3, 2, 64), (64,), (0, 64), (2, 0)]:
        x = torch.ones(shape)
        assert torch.equal(quant.fake_quant_fp8(x, 64), x) and torch.equal(quant.fake_quant_fp4(x), x)


def test_a_row_is_quantised_the_same_alone_and_among_others() -> None:
    x = spread_values(16, 256, seed=1)
    together = quant.fake_quant_fp8(x, 128)
    assert all(torch.equal(quant.fake_quant_fp8(x[i], 128), together[i]) for i in range(16))


def test_fake_quantising_a_trained_tensor_is_refused_rather_than_cut_off() -> None:
    with pytest.raises(AssertionError, match="gradient"):
        quant.fake_quant_fp8(torch.ones(1, 64, requires_grad=True), 64)
