"""Instruction sets, the cache of compiled kernels, and what the machine code of every instruction set looks like."""

from __future__ import annotations

import ctypes
import functools
import platform
import re
import struct
import sys
from collections.abc import Callable, Set
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from hadal.kernels.cpu import target
from hadal.kernels.cpu.emission import compiled_kernels, emit_kernels
from hadal.kernels.cpu.ir import I64, PTR, Module
from hadal.kernels.cpu.layout import STEP, Shapes
from hadal.kernels.cpu.matmul import Format, emit_products
from hadal.kernels.cpu.program import KernelModule, emit_runner
from hadal.kernels.cpu.target import CpuError, Isa, Library, assembly
from hadal.kernels.cpu.weights import Plan, plan_packing
from tests.checkpoint.tiny import tiny_config
from tests.kernels.cpu.harness import address, instruction_sets
from tests.kernels.cpu.models import SIZES, lookup_of, model_on

X86 = platform.machine().lower() in ("x86_64", "amd64")
EVERY = {name: True for features in target._FEATURES.values() for name in features}
CALL = re.compile(r"^\s+(?:bl|b|callq?|jmp)\s+([A-Za-z_]\w*)", re.M)


def detect(
    patch: pytest.MonkeyPatch, cap: str = "", machine: str = "x86_64", missing: Set[str] = frozenset()
) -> tuple[str | None, str]:
    """What is chosen on a processor that has everything but the missing features."""
    patch.setenv("HADAL_CPU", cap)
    patch.setattr(platform, "machine", lambda: machine)
    patch.setattr(llvm, "get_host_cpu_features", lambda: EVERY | dict.fromkeys(missing, False))
    patch.setattr(target, "_allow_amx", lambda: True)
    isa, reason = target.detect.__wrapped__()
    return isa.name if isa else None, reason


def test_the_best_instruction_set_is_chosen_and_a_cap_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert detect(monkeypatch) == ("amx", "AMX")
    assert detect(monkeypatch, "avx512") == ("avx512", "AVX512, capped by HADAL_CPU=avx512")
    assert detect(monkeypatch, "avx2") == ("avx2", "AVX2, capped by HADAL_CPU=avx2")
    assert detect(monkeypatch, "none") == (None, "switched off by HADAL_CPU=none")
    assert detect(monkeypatch, missing={"amx-int8"}) == ("avx512", "AVX512")
    assert detect(monkeypatch, "amx", missing={"avx512bf16"}) == ("avx2", "AVX2, capped by HADAL_CPU=amx")
    assert detect(monkeypatch, missing={"fma", "avx512f"}) == (None, "the processor has no AVX2 with FMA")
    assert detect(monkeypatch, "neon") == (None, "HADAL_CPU=neon asks for another processor")
    assert detect(monkeypatch, machine="aarch64") == ("neon", "NEON")
    assert detect(monkeypatch, "avx2", machine="arm64") == (None, "HADAL_CPU=avx2 asks for another processor")
    assert detect(monkeypatch, machine="riscv64") == (None, "no kernels for a riscv64 processor")


def test_tiles_that_the_system_refuses_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    detect(monkeypatch)
    monkeypatch.setattr(target, "_allow_amx", lambda: False)
    assert target.detect.__wrapped__()[0] == Isa("avx512")


def test_an_unknown_cap_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CpuError, match="HADAL_CPU is 'sse'; choose none, amx, avx512, avx2, neon or leave it unset"):
        detect(monkeypatch, "sse")


def test_without_llvmlite_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    monkeypatch.delenv("HADAL_CPU", raising=False)
    assert target.detect.__wrapped__() == (None, "llvmlite is not installed")


def small_module(value: int) -> str:
    module = Module()
    with module.function("give", {"to": PTR}) as f:
        f.store(f.const(I64, value), f["to"])
    return module.text()


def given(library: Library) -> int:
    to = np.zeros(1, np.int64)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(library.address("give"))(address(to))
    return int(to[0])


def test_a_compiled_object_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    isa = Isa(instruction_sets()[0])
    first = Library(small_module(5), isa)
    second, other = Library(small_module(5), isa), Library(small_module(6), isa)
    assert (first.cached, second.cached, other.cached) == (False, True, False)
    assert (given(first), given(second), given(other)) == (5, 5, 6)
    assert len(list((tmp_path / "kernels").iterdir())) == 2  # no partial files
    named = Library(small_module(7), isa, "name")
    assert Library.kept("name") and not Library.kept("other")
    assert given(named) == given(Library(None, isa, "name")) == 7


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: bytes(len(b))])
def test_a_damaged_object_is_compiled_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    isa = Isa(instruction_sets()[0])
    Library(small_module(9), isa, "name")
    (file,) = (tmp_path / "kernels").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert not Library.kept("name")
    again = Library(small_module(9), isa, "name")
    assert not again.cached and given(again) == 9 and Library.kept("name")


def test_a_cache_that_cannot_be_written_does_not_hurt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path / "file" / "cache"))
    isa = Isa(instruction_sets()[0])
    for _ in range(2):
        library = Library(small_module(8), isa)
        assert not library.cached and given(library) == 8
    assert not Library.kept("name") and target.kept(tmp_path) is None


def test_engines_outlive_each_other() -> None:
    isa = Isa(instruction_sets()[0])
    lasting = Library(small_module(1), isa)
    for value in range(2, 5):
        assert given(Library(small_module(value), isa)) == value  # each is dropped at once
    assert given(lasting) == 1


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HADAL_CACHE", "~/kept")
    assert target.cache_folder() == Path.home() / "kept"
    monkeypatch.delenv("HADAL_CACHE")
    assert target.cache_folder() == Path("/x/hadal")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert target.cache_folder() == Path.home() / ".cache" / "hadal"


@functools.cache
def nano() -> tuple[Shapes, Plan]:
    model = model_on(instruction_sets()[0], "nano")
    return Shapes.of(model.config), plan_packing(model.config, lookup_of(model))


def test_a_models_kernels_are_found_without_emitting_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    shapes, plan = Shapes.of(tiny_config(**SIZES)), Plan({}, [])
    isa = Isa(instruction_sets()[0])
    monkeypatch.setattr("hadal.kernels.cpu.emission.emit_kernels", lambda *_: emit_few(isa))
    words, first = compiled_kernels(isa, shapes, plan)
    monkeypatch.setattr("hadal.kernels.cpu.emission.emit_kernels", lambda *_: pytest.fail("emitted twice"))
    again, second = compiled_kernels(isa, shapes, plan)
    assert again == words and (first.cached, second.cached) == (False, True)
    assert second.address("product_bf16_f32")


def emit_few(isa: Isa) -> KernelModule:
    module = KernelModule(isa, STEP)
    emit_products(module, "bf16", "f32")
    return module


def test_neon_code_is_emitted_on_any_processor() -> None:
    neon = Isa("neon")
    code = assembly(emit_kernels(neon, *nano()).text(), neon)
    assert code.count("fmla") > 1000 and not re.search(r"[xyz]mm\d|x86", code)
    assert {name for name in CALL.findall(code) if not name.startswith((".L", "L"))} == set()
    runner = Module()
    emit_runner(runner, neon)
    code = assembly(runner.text(), neon)
    assert set(CALL.findall(code)) <= {"sched_yield", "run"} and "sched_yield" in code


@pytest.mark.skipif(not X86, reason="relocations of x86 objects are read")
def test_objects_reach_their_constants_wherever_these_are_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HADAL_CACHE", str(tmp_path))
    isa = Isa(instruction_sets()[0])
    Library(emit_few(isa).text(), isa, "few")
    (kept,) = (tmp_path / "kernels").iterdir()
    kinds = relocations(target.kept(kept) or b"")
    # 32-bit distances of the ELF ABI: PC32, PLT32, GOTPCREL, 32, 32S and the relaxable forms of GOTPCREL.
    assert kinds and not kinds & {2, 4, 9, 10, 11, 41, 42}


def relocations(elf: bytes) -> set[int]:
    """The kinds of relocation in an ELF64 object."""
    start, (size, count) = struct.unpack_from("<Q", elf, 40)[0], struct.unpack_from("<HH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + size * i) for i in range(count)]
    tables = [(offset, length) for _, kind, _, _, offset, length in headers if kind == 4]
    return {struct.unpack_from("<I", elf, o + i + 8)[0] for o, n in tables for i in range(0, n, 24)}


def loops(code: str) -> list[list[str]]:
    """Bodies of the innermost loops: from a label to the last jump back to it, without another such jump."""
    lines = code.splitlines()
    where = {line.split(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.?L\w+:", line)}
    found = []
    for i, line in enumerate(lines):
        jump = re.match(r"\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,|tbn?z\s+\w+,.*)\s+(\.?L\w+)", line)
        if jump and where.get(jump[1], i) < i:
            found.append((where[jump[1]], i))
    inner = [(a, b) for a, b in found if not any((c, d) != (a, b) and a <= c and d <= b for c, d in found)]
    return [lines[a : b + 1] for a, b in inner]


@pytest.mark.skipif(not X86, reason="the loops of x86 code are read")
@pytest.mark.parametrize("form", ["bf16", "fp8", "fp4"])
@pytest.mark.parametrize(("isa", "dot"), [("amx", "tdpbf16ps"), ("avx512", "vdpbf16ps")])
def test_inner_loops_of_products_keep_their_sums_in_registers(isa: str, dot: str, form: Format) -> None:
    module = KernelModule(Isa(isa), STEP)
    emit_products(module, form, "f32")
    inner = [body for body in loops(assembly(module.text(), Isa(isa))) if any(dot in line for line in body)]
    assert len(inner) >= 2, len(inner)
    spilled = [line for body in inner for line in body if re.search(r"\(%rsp.*[xyzt]mm|[xyzt]mm.*\(%rsp", line)]
    assert not spilled, spilled[:4]
