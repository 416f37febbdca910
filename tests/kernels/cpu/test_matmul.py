"""Products on packed weights against float64; a row's bits depend on neither its company, its place nor the threads."""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from hadal.kernels.cpu.matmul import BLOCK, EXPANDED, PANEL, ROW_PADDING, Epilogue, Format, emit_products
from hadal.kernels.cpu.pack import Weight, pack, pack_pair
from hadal.kernels.cpu.program import KernelModule
from hadal.quant import PackedWeight, quantise_fp4, quantise_fp8
from tests.kernels.cpu.harness import Kernels, address, buffer, instruction_sets

ISAS = pytest.mark.parametrize("isa", instruction_sets())
FORMS: list[Format] = ["bf16", "fp8", "fp4"]
EPILOGUES: list[Epilogue] = ["f32", "bf16", "swiglu"]
SEED = 9


@functools.cache
def compiled(isa: str, form: Format, epilogue: Epilogue) -> Kernels:
    def emit(module: KernelModule) -> None:
        emit_products(module, form, epilogue)

    return Kernels(isa, emit)


def weight_of(form: Format, rows: int, columns: int, seed: int = SEED) -> Weight:
    """A random weight whose scales differ from place to place."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g) * 2.0 ** torch.randint(-6, 6, (rows, 1), generator=g)
    if form == "bf16":
        return w.bfloat16()
    return quantise_fp8(w) if form == "fp8" else quantise_fp4(w)


def values_of(weight: Weight) -> Tensor:
    return weight.dense(torch.float32).double() if isinstance(weight, PackedWeight) else weight.double()


def rows_of(count: int, columns: int, seed: int = SEED) -> Tensor:
    g = torch.Generator().manual_seed(seed + 1)
    return (torch.randn(count, columns, generator=g) * 10.0 ** torch.randint(-2, 3, (count, 1), generator=g)).bfloat16()


@dataclass
class Product:
    """One job: its stack of packed weights, and where its rows and results lie."""

    isa: str
    form: Format
    epilogue: Epilogue
    weights: list[Weight]
    pairs: list[Weight] | None = None
    limit: float = 0.0
    row_step: int = 0
    out_step: int = 0

    def __post_init__(self) -> None:
        self.shape = tuple(self.weights[0].shape)
        if self.pairs is None:
            self.packed = torch.stack([pack(w) for w in self.weights])
        else:
            self.packed = torch.stack([pack_pair(w, u) for w, u in zip(self.weights, self.pairs, strict=True)])

    def run(
        self, x: Tensor, groups: list[tuple[int, int, int]], mixing: Tensor | None = None, threads: int = 1
    ) -> np.ndarray:
        """Bytes of the results [rows, width]; what is behind a row's own columns is left out."""
        n, columns = self.shape
        blocks, width = -(-columns // BLOCK), {"f32": 4, "bf16": 2, "swiglu": 2}[self.epilogue]
        panels = -(-n * (2 if self.pairs else 1) // PANEL)
        row_stride = x.shape[1] * 2 + 2 * BLOCK + 64
        source = buffer((len(x) + ROW_PADDING) * row_stride)
        for row, to in zip(x, source.reshape(-1, row_stride), strict=False):
            to[: 2 * x.shape[1]] = row.view(torch.uint8).numpy()
        out_stride = panels * PANEL * 4 * max(1, len(groups) if self.out_step else 1) + 64
        out = buffer((len(x) + ROW_PADDING) * out_stride, 0xEE)
        scratch = buffer(threads * (blocks * EXPANDED + 64))
        words = np.array([len(groups), *(word for group in groups for word in group)], np.int64)
        compiled(self.isa, self.form, self.epilogue).run(
            f"product_{self.form}_{self.epilogue}", np.zeros(1, np.int64), threads, weight=address(self.packed),
            weight_step=self.packed.shape[1], rows=address(source), row_stride=row_stride, row_step=self.row_step,
            out=address(out), out_stride=out_stride, out_step=self.out_step, panels=panels, blocks=blocks,
            groups=address(words), scratch=address(scratch), scratch_step=blocks * EXPANDED + 64,
            mixing=0 if mixing is None else address(mixing),
            limit=struct.unpack("<i", struct.pack("<f", self.limit))[0],
        )  # fmt: skip
        columns_out = n if not self.out_step else out_stride // width
        return out.reshape(-1, out_stride)[:, : columns_out * width]

    def values(self, found: np.ndarray) -> Tensor:
        data = torch.from_numpy(found.copy())
        return data.view(torch.float32 if self.epilogue == "f32" else torch.bfloat16).double()


def check(product: Product, found: Tensor, x: Tensor, weight: Weight) -> None:
    w, x = values_of(weight), x.double()
    size = x.abs() @ w.abs().T
    bound = 3e-7 * size + (2**-8 * (x @ w.T).abs() if product.epilogue == "bf16" else 0)
    assert ((found - x @ w.T).abs() <= bound).all(), f"seed {SEED}"


def swiglu(gate: Tensor, up: Tensor, limit: float, mixing: Tensor) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(gate) * up * mixing[:, None].double()


SHAPES = {"bf16": [(64, 256), (50, 75), (33, 31)], "fp8": [(160, 256), (130, 544), (50, 200)],
          "fp4": [(64, 256), (50, 96), (17, 32)]}  # fmt: skip


@ISAS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epilogue", EPILOGUES[:2])
def test_equals_the_exact_product(isa: str, form: Format, epilogue: Epilogue) -> None:
    for n, columns in SHAPES[form]:
        weight, x = weight_of(form, n, columns), rows_of(70, columns)
        product = Product(isa, form, epilogue, [weight])
        for count in (1, 2, 17, 32, 33, 70):
            found = product.run(x[:count], [(0, 0, count)])
            check(product, product.values(found[:count]), x[:count], weight)


@ISAS
def test_fp8_tiles_with_and_without_subnormals(isa: str) -> None:
    w, x = torch.empty(64, 512).uniform_(1, 2, generator=torch.Generator().manual_seed(SEED)), rows_of(40, 512)
    w[:, ::3] *= -1
    w[3, 130], w[20, 300:305], w[50, 511], w[40, 129] = 0, 2.0**-8 * 2 / 448, -0.0, 2.0**-7 * 2 / 448
    weight = quantise_fp8(w)
    product = Product(isa, "fp8", "f32", [weight])
    for count in (1, 40):
        found = product.run(x[:count], [(0, 0, count)])
        check(product, product.values(found[:count]), x[:count], weight)


@ISAS
@pytest.mark.parametrize("form", FORMS)
def test_rows_behind_the_last_one_stay_within_the_padding(isa: str, form: Format) -> None:
    weight, x = weight_of(form, 64, 64), rows_of(40, 64)
    product = Product(isa, form, "bf16", [weight])
    found = product.run(x, [(0, 3, 5)])
    assert (found[:3] == 0xEE).all() and (found[8:] == 0xEE).all()
    check(product, product.values(found[3:8]), x[3:8], weight)


@ISAS
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_a_row_has_the_same_bits_in_any_company(isa: str, form: Format, epilogue: Epilogue) -> None:
    n, columns = 64, 160
    weight, x, mixing = weight_of(form, n, columns), rows_of(550, columns), torch.rand(600)
    up = [weight_of(form, n, columns, 77)] if epilogue == "swiglu" else None
    product = Product(isa, form, epilogue, [weight], up, limit=2.0)
    alone = np.concatenate([product.run(x, [(0, r, 1)], mixing)[r : r + 1] for r in range(60)])
    whole = product.run(x, [(0, 0, 550)], mixing)
    assert np.array_equal(whole[:60], alone)
    assert not (whole[:550] == 0xEE).all(axis=1).any()
    for count in (*range(1, 10), 13, 64, 65, 511, 512):
        for first, threads in ((0, 1), (1, 2), (37, 1), (37, 2)) if count < 100 else ((37, 2), (1, 1)):
            found = product.run(x, [(0, first, count)], mixing, threads)
            assert np.array_equal(found[first : first + count], whole[first : first + count]), (count, first)


@ISAS
@pytest.mark.parametrize("form", FORMS)
def test_swiglu_is_clamped_and_mixed(isa: str, form: Format) -> None:
    print(f"seed {SEED}")
    for n, columns in ((64, 128), (48, 96)):
        gate, up = weight_of(form, n, columns), weight_of(form, n, columns, 55)
        x, mixing = rows_of(37, columns), torch.rand(80, generator=torch.Generator().manual_seed(SEED)) * 3
        for limit in (0.5, 10.0):
            product = Product(isa, form, "swiglu", [gate], [up], limit)
            found = product.values(product.run(x, [(0, 0, 37)], mixing))[:37]
            g, u = (x.double() @ values_of(w).T for w in (gate, up))
            exact = swiglu(g, u, limit, mixing[:37])
            assert (g > limit).any() and (u.abs() > limit).any()
            noise = 2e-6 * (x.double().abs() @ (values_of(gate).abs() + values_of(up).abs()).T) * (1 + limit) * 3
            assert ((found - exact).abs() <= 2**-8 * exact.abs() + noise).all()
            assert (found.abs() > 0.1 * limit**2 * mixing[:37, None]).any()


@ISAS
@pytest.mark.parametrize("form", FORMS)
def test_every_group_meets_its_own_expert(isa: str, form: Format) -> None:
    experts = [weight_of(form, 64, 96, 100 + e) for e in range(6)]
    x = rows_of(150, 96)
    product = Product(isa, form, "f32", experts)
    groups = [(5, 0, 1), (0, 16, 40), (2, 64, 16), (3, 96, 33)]  # experts 1 and 4 have no rows
    for threads in (1, 3):
        found = product.run(x, groups, threads=threads)
        for matrix, first, count in groups:
            part = slice(first, first + count)
            check(product, product.values(found[part]), x[part], experts[matrix])
    single = Product(isa, form, "f32", [experts[3]]).run(x, [(0, 96, 33)])
    assert np.array_equal(found[96:129], single[96:129])
    assert (product.run(x, []) == 0xEE).all()


@ISAS
@pytest.mark.parametrize("form", FORMS)
def test_output_groups_read_and_write_their_own_columns(isa: str, form: Format) -> None:
    groups, rank, width = 3, 32, 96
    stack = weight_of(form, groups * rank, width)
    x = rows_of(21, groups * width)
    parts = [values_of(stack)[g * rank : (g + 1) * rank] for g in range(groups)]
    product = Product(isa, form, "bf16", [stack], row_step=width * 2, out_step=rank * 2)
    one = Product(isa, form, "bf16", [stack])
    # The groups' matrices are the panels of one packed matrix, so a step from one to the next is a panel.
    product.packed = one.packed.view(groups, -1)
    product.shape = (rank, width)
    found = product.values(product.run(x, [(g, 0, 21) for g in range(groups)]))[:21]
    for g, part in enumerate(parts):
        own = x[:, g * width : (g + 1) * width].double()
        exact = own @ part.T
        bound = 2**-8 * exact.abs() + 3e-7 * (own.abs() @ part.abs().T)
        assert ((found[:, g * rank : (g + 1) * rank] - exact).abs() <= bound).all()


@pytest.mark.parametrize("form", FORMS)
def test_vector_instruction_sets_agree_to_rounding(form: Format) -> None:
    weight, x = weight_of(form, 64, 256), rows_of(20, 256)
    results = []
    for isa in instruction_sets():
        product = Product(isa, form, "f32", [weight])
        results.append(product.values(product.run(x, [(0, 0, 20)])[:20]))
    size = x.double().abs() @ values_of(weight).abs().T
    assert all(((r - results[0]).abs() <= 3e-7 * size).all() for r in results)
