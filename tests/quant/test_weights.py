from __future__ import annotations

import numpy as np
import pytest
import torch

from hadal import quant
from hadal.quant import PackedWeight, QuantError
from tests.quant import oracle


def e8m0(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def as_float32(values: np.ndarray) -> torch.Tensor:
    with np.errstate(over="ignore"):
        return torch.from_numpy(values.astype(np.float32))


def representable(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    exact = torch.from_numpy(values)
    return exact.to(dtype).double() == exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fp4_byte_under_every_scale_has_its_value(dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    scales = e8m0(list(range(255))).view(torch.uint8)[:, None].repeat(1, 16).view(torch.float8_e8m0fnu)
    dense = PackedWeight("fp4", codes, scales, (255, 512)).dense(dtype)
    nibbles = [oracle.E2M1[n] for byte in range(256) for n in (byte % 16, byte // 16)]
    expected = np.ldexp(np.array(nibbles)[None, :], np.arange(255)[:, None] - 127)
    fits = representable(expected, dtype)
    assert torch.equal(dense[fits], torch.from_numpy(expected).to(dtype)[fits])
    assert torch.equal(torch.signbit(dense), torch.from_numpy(np.signbit(expected)))
    assert fits[:253].all()  # beyond, 6 * 2^126 and more overflow


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_fp8_code_under_every_scale_has_its_value(dtype: torch.dtype) -> None:
    values = np.array([v for v in oracle.E4M3 if v == v])
    codes = torch.tensor([c for c in range(256) if oracle.E4M3[c] == oracle.E4M3[c]], dtype=torch.uint8)
    for byte in range(255):
        packed = PackedWeight(
            "fp8", codes.view(torch.float8_e4m3fn).view(1, -1), e8m0([byte, byte]).view(1, 2), (1, 254)
        )
        expected = np.ldexp(values, byte - 127)
        fits = representable(expected, dtype)
        dense = packed.dense(dtype)[0]
        assert torch.equal(dense[fits], torch.from_numpy(expected).to(dtype)[fits])
        assert bool(fits.all()) or not 9 < byte < 246, byte


def test_fp8_nan_codes_stay_nan() -> None:
    codes = torch.tensor([[0x7F, 0xFF]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert PackedWeight("fp8", codes, e8m0([127]).view(1, 1), (1, 2)).dense().isnan().all()


def random_weight(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.exp2(
        torch.randint(-8, 3, (rows, columns // 32), generator=generator).float()
    ).repeat_interleave(32, 1)


def test_fp4_weights_equal_the_definition() -> None:
    weight = random_weight(7, 96)
    weight[2, 32:64] = 0
    packed = quant.quantise_fp4(weight)
    expected = oracle.fake_quant(weight.numpy(), 32, oracle.E2M1, 6 * 2.0**-126, 6)
    assert torch.equal(packed.dense(), as_float32(expected))
    assert (packed.codes.shape, packed.scales.shape, packed.nbytes) == ((7, 48), (7, 3), 7 * 48 + 21)


@pytest.mark.parametrize(("rows", "columns"), [(128, 128), (130, 288), (1, 32), (256, 96)])
def test_fp8_weights_equal_the_definition_block_by_block(rows: int, columns: int) -> None:
    weight = random_weight(rows, columns)
    packed = quant.quantise_fp8(weight)
    assert packed.scales.shape == (-(-rows // 128), -(-columns // 128))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            block = weight[i : i + 128, j : j + 128]
            flat = block.reshape(1, -1).numpy()
            expected = oracle.fake_quant(flat, flat.size, oracle.E4M3, 1e-30, 448).reshape(block.shape)
            assert torch.equal(packed.dense()[i : i + 128, j : j + 128], as_float32(expected))


@pytest.mark.parametrize("quantise", [quant.quantise_fp4, quant.quantise_fp8])
def test_values_of_a_packed_weight_survive_packing_again(quantise) -> None:  # type: ignore[no-untyped-def]
    packed = quantise(random_weight(130, 160))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(quantise(packed.dense(dtype)).dense(dtype), packed.dense(dtype))


@pytest.mark.parametrize("quantise", [quant.quantise_fp4, quant.quantise_fp8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(quantise, bad: float) -> None:  # type: ignore[no-untyped-def]
    weight = torch.ones(2, 32)
    weight[1, 5] = bad
    with pytest.raises(QuantError, match="NaN or infinity"):
        quantise(weight)


def test_fp4_needs_whole_groups() -> None:
    with pytest.raises(QuantError, match="48 columns"):
        quant.quantise_fp4(torch.ones(2, 48))


def test_fp4_becomes_fp8_without_loss() -> None:
    for rows, columns in [(128, 256), (130, 96), (3, 32)]:
        packed = quant.quantise_fp4(random_weight(rows, columns, seed=rows))
        converted = quant.fp4_to_fp8(packed)
        assert converted.format == "fp8" and torch.equal(converted.dense(), packed.dense())


def test_fp4_with_too_wide_a_spread_of_scales_is_not_converted() -> None:
    weight = torch.full((4, 64), 0.5)
    weight[0, :32] = 6 * 2.0**20
    with pytest.raises(QuantError, match="row 0, column 32"):
        quant.fp4_to_fp8(quant.quantise_fp4(weight))


def test_the_exactness_limit_of_fp4_to_fp8_is_a_ratio_of_two_to_the_14() -> None:
    # E4M3's finest step is 2^-9 and the largest FP4 scale maps to 2^6, so one half survives down to 2^-14 of it.
    for ratio, exact in [(14, True), (15, False)]:
        codes = torch.full((1, 32), 0x11, dtype=torch.uint8)
        packed = PackedWeight("fp4", codes, e8m0([127, 127 - ratio]).view(1, 2), (1, 64))
        if exact:
            assert torch.equal(quant.fp4_to_fp8(packed).dense(), packed.dense())
        else:
            with pytest.raises(QuantError):
                quant.fp4_to_fp8(packed)


def test_the_smallest_fp4_scale_still_converts_without_loss() -> None:
    codes = torch.full((1, 16), 0x71, dtype=torch.uint8)
    packed = PackedWeight("fp4", codes, e8m0([0]).view(1, 1), (1, 32))
    assert torch.equal(quant.fp4_to_fp8(packed).dense(), packed.dense())
