"""Products of FP4 weights with int8 activations: records, exactness but for FP32 sums, the same bits in any company."""

from __future__ import annotations

import functools
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu.int8 import GROUP, RECORD, emit_products_int8, emit_quantise, record_bytes
from hadal.kernels.cpu.matmul import Epilogue
from hadal.kernels.cpu.pack import pack, pack_pair
from hadal.kernels.cpu.program import KernelModule
from hadal.quant import PackedWeight, quantise_fp4
from tests.kernels.cpu.harness import Kernels, address, buffer, instruction_sets

ISAS = pytest.mark.parametrize("isa", instruction_sets())
SEED = 14


@functools.cache
def compiled(isa: str) -> Kernels:
    def emit(module: KernelModule) -> None:
        emit_quantise(module)
        emit_products_int8(module, "f32")
        emit_products_int8(module, "swiglu")

    return Kernels(isa, emit)


def weight_of(rows: int, columns: int, seed: int = SEED) -> PackedWeight:
    g = torch.Generator().manual_seed(seed)
    return quantise_fp4(torch.randn(rows, columns, generator=g) * 2.0 ** torch.randint(-6, 6, (rows, 1), generator=g))


def rows_of(count: int, columns: int) -> Tensor:
    print(f"seed {SEED}")
    g = torch.Generator().manual_seed(SEED + 1)
    x = torch.randn(count, columns, generator=g) * 10.0 ** torch.randint(-2, 3, (count, 1), generator=g)
    x[count // 2] = 0
    return x.bfloat16()


def groups_of(groups: list[tuple[int, int, int]]) -> np.ndarray:
    return np.array([len(groups), *(word for group in groups for word in group)], np.int64)


def records(isa: str, x: Tensor, groups: list[tuple[int, int, int]], threads: int = 1) -> np.ndarray:
    """Rows of records [rows, bytes]."""
    wide = torch.full((len(x) + 1, x.shape[1] + 160), 3e38, dtype=torch.bfloat16)  # what lies behind a row is not read
    wide[: len(x), : x.shape[1]] = x
    out = buffer(len(x) * record_bytes(x.shape[1])).reshape(len(x), -1)
    words = groups_of(groups)
    compiled(isa).run(
        "quantise", np.zeros(1, np.int64), threads, rows=address(wide), row_stride=wide.stride(0) * 2,
        out=address(out), out_stride=out.shape[1], blocks=x.shape[1] // 32, groups=address(words),
    )  # fmt: skip
    return out


def multiply(
    isa: str, rows: np.ndarray, packed: Tensor, panels: int, blocks: int, groups: list[tuple[int, int, int]],
    epilogue: Epilogue = "f32", threads: int = 1, mixing: Tensor | None = None, limit: float = 0.0,
) -> np.ndarray:  # fmt: skip
    """Bytes of the results [rows, panels * 32 or 16 columns]."""
    width = panels * (128 if epilogue == "f32" else 32)
    out, words = buffer((len(rows) + 32) * (width + 64), 0xEE).reshape(-1, width + 64), groups_of(groups)
    compiled(isa).run(
        f"product_int8_{epilogue}", np.zeros(1, np.int64), threads, weight=address(packed),
        weight_step=packed.shape[-1], rows=address(rows), row_stride=rows.shape[1], row_step=0, out=address(out),
        out_stride=width + 64, out_step=0, panels=panels, blocks=blocks, groups=address(words), scratch=0,
        scratch_step=0, mixing=0 if mixing is None else address(mixing),
        limit=struct.unpack("<i", struct.pack("<f", limit))[0],
    )  # fmt: skip
    return out[: len(rows), :width]


def decoded(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Codes [rows, columns] of records, and the scale of each."""
    parts = rows.reshape(len(rows), -1, RECORD)
    codes = torch.from_numpy(parts[:, :, :GROUP].copy().view(np.int8)).reshape(len(rows), -1, 8)
    in_order = codes[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1)  # bytes come as columns 0 4 1 5 2 6 3 7
    scale = 2 * torch.from_numpy(parts[:, :, GROUP + 16 : GROUP + 20].copy().view(np.float32)).flatten(1)
    return in_order, scale.repeat_interleave(GROUP, dim=1)


@ISAS
@pytest.mark.parametrize("columns", [128, 160, 416])
def test_records_hold_codes_and_corrections(isa: str, columns: int) -> None:
    x = rows_of(9, columns)
    found = records(isa, x, [(0, 0, 9)], 2)
    codes, scale = decoded(found)
    values = codes.double() * scale.double()
    assert ((values[:, :columns] - x.double()).abs() <= 0.501 * scale[:, :columns]).all()
    assert codes.abs().amax() == 127
    assert not values[:, columns:].any()
    kept = found.reshape(9, -1, RECORD)[:, :, GROUP : GROUP + 16].copy()
    corrections = torch.from_numpy(kept.view(np.int32)).flatten(1)
    assert torch.equal(corrections, -12 * codes.view(9, -1, 32).int().sum(2, dtype=torch.int32))


@ISAS
@pytest.mark.parametrize(("n", "columns"), [(64, 128), (96, 416), (32, 32)])
def test_products_are_exact_but_for_fp32_sums(isa: str, n: int, columns: int) -> None:
    weight, x = weight_of(n, columns), rows_of(21, columns)
    rows = records(isa, x, [(0, 0, 21)])
    found = multiply(isa, rows, pack(weight)[None], n // 32, columns // 32, [(0, 0, 21)])
    codes, scale = decoded(rows)
    values, w = (codes.double() * scale.double())[:, :columns], weight.dense(torch.float32).double()
    error = (torch.from_numpy(found.copy()).view(torch.float32).double() - values @ w.T).abs()
    assert (error <= 3e-7 * (values.abs() @ w.abs().T)).all()


@ISAS
@pytest.mark.parametrize("epilogue", ["f32", "swiglu"])
def test_a_row_has_the_same_bits_in_any_company(isa: str, epilogue: Epilogue) -> None:
    x, mixing = rows_of(60, 160), torch.rand(100, generator=torch.Generator().manual_seed(SEED))
    weight, panels = weight_of(64, 160), 4 if epilogue == "swiglu" else 2
    packed = (pack_pair(weight, weight_of(64, 160, 3)) if epilogue == "swiglu" else pack(weight))[None]

    def run(first: int, count: int, threads: int) -> np.ndarray:
        rows = records(isa, x, [(0, first, count)], threads)
        found = multiply(isa, rows, packed, panels, 5, [(0, first, count)], epilogue, threads, mixing, 1.0)
        return found[first : first + count]

    whole = run(0, 60, 1)
    assert not (whole == 0xEE).all(axis=1).any()
    for count in (1, 2, 3, 4, 5, 7, 8, 33, 59):
        for first, threads in ((0, 2), (1, 1), (37, 3)):
            if first + count <= 60:
                assert np.array_equal(run(first, count, threads), whole[first : first + count]), (first, count)


@ISAS
def test_every_group_meets_its_own_expert(isa: str) -> None:
    experts, x = [weight_of(32, 128, 60 + e) for e in range(4)], rows_of(70, 128)
    groups = [(3, 0, 2), (0, 16, 20), (2, 48, 17)]
    packed = torch.stack([pack(w) for w in experts])
    found = multiply(isa, records(isa, x, groups, 2), packed, 1, 4, groups, threads=2)
    for matrix, first, count in groups:
        own = [(0, first, count)]
        alone = multiply(isa, records(isa, x, own), packed[matrix : matrix + 1], 1, 4, own)
        assert np.array_equal(found[first : first + count], alone[first : first + count])
    assert (found[2:16] == 0xEE).all() and (found[65:] == 0xEE).all()
