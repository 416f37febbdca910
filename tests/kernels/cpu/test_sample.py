"""The noise of the sampler's kernel at its ends, and its machine code; tests/engine/test_sampler.py has its choices."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hadal.kernels.cpu import sample
from hadal.kernels.cpu.ir import F32, I32, vec
from hadal.kernels.cpu.program import KernelModule
from hadal.kernels.cpu.target import Isa, assembly
from tests.kernels.cpu.harness import Kernels, address, buffer, instruction_sets
from tests.kernels.cpu.vectors import VectorFunctions

ISAS = pytest.mark.parametrize("isa", instruction_sets())


@ISAS
def test_exponential_noise_is_precise_at_both_ends(isa: str) -> None:
    print("seed 7")
    ends = np.array([0, 1, 2, 100, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1], np.uint32)
    bits = np.concatenate((ends, np.random.default_rng(7).integers(0, 2**32, 50000).astype(np.uint32)))
    rules = {"exponential": lambda f, x: sample._exponential(f, x.bits(vec(16, I32)))}
    found = VectorFunctions(isa, rules)("exponential", bits.view(np.float32), np.float32)
    exact = -np.log1p(-(bits.astype(np.float64) + 0.5) / 2**32)
    far = bits >= 2**31  # where 1 - v in FP64 would lose what the integers hold
    exact[far] = -np.log((2.0**32 - bits[far].astype(np.float64) - 0.5) / 2**32)
    assert np.abs(found / exact - 1).max() < 1e-6
    assert found.min() > 0 and 22 < found.max() < 23


@ISAS
def test_noise_is_the_hash_of_id_and_key(isa: str) -> None:
    ids = np.arange(4096, dtype=np.int32)
    low, high = 0x9ABCDEF0, 0x12345678

    def noise(f, x):  # type: ignore[no-untyped-def]
        words = [f.const(vec(16, I32), word - (word >> 31 << 32)) for word in (low, high)]
        return sample._noise(x.bits(vec(16, I32)), *words).bits(vec(16, F32))

    found = VectorFunctions(isa, {"noise": noise})("noise", ids.view(np.float32), np.uint32)

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
        return x ^ (x >> 16)

    assert found.tolist() == [mixed(mixed((i + low) % 2**32) ^ high) for i in range(4096)]
    bits = (found[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / 64


@ISAS
def test_threads_share_the_rows_and_each_has_its_own_scratch(isa: str) -> None:
    rows, step = np.arange(5 * 20, dtype=np.float32).reshape(5, 20), 4 * 32 * 2 + 64
    records, scratch = buffer(5 * 88), buffer(2 * step, 0x7F)
    Kernels(isa, sample.emit_choose).run(
        "choose", np.zeros(1, np.int64), 2, logits=address(rows), stride=80, vocabulary=20, records=address(records),
        record_bytes=88, scratch=address(scratch), scratch_step=step, count=5,
    )  # fmt: skip
    assert records.view(np.int64).reshape(5, 11)[:, 5].tolist() == [19] * 5
    lasting = scratch.view(np.float32).reshape(2, -1)
    assert np.array_equal(lasting[:, :20], rows[[1, 4]]) and np.isneginf(lasting[:, 20:32]).all()
    assert (lasting[:, 64:].view(np.int32) == 0x7F7F7F7F).all()


def test_neon_code_is_emitted_on_any_processor() -> None:
    module = KernelModule(Isa("neon"), ["none"])
    sample.emit_choose(module)
    code = assembly(module.text(), Isa("neon"))
    assert "fmla" in code and not re.search(r"[xyz]mm\d|x86", code)
    assert set(re.findall(r"^\s+bl\s+(\w+)", code, re.M)) <= {"memcpy"}
