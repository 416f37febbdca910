"""Which instructions this processor offers, and how a module of kernels becomes machine code.

`HADAL_CPU` caps the choice ("avx512", "avx2", "neon", "none"). Compiled objects are kept under the cache directory
(`HADAL_CACHE`, else the user's cache folder), keyed by their text and the processor, so only a first start compiles.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_AMX_PERMISSION = (158, 0x1023, 18)  # arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA) on x86-64 Linux
_FEATURES = {
    "amx": (
        "amx-tile", "amx-bf16", "amx-int8", "avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512bf16", "avx512vnni",
    ),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi", "avx512bf16", "avx512vnni"),
    "avx2": ("avx2", "fma"),
    "neon": ("neon",),
}  # fmt: skip
_CPU = {"amx": "sapphirerapids", "avx512": "znver4", "avx2": "haswell", "neon": "neoverse-n1"}
_TRIPLE = {"neon": "aarch64-unknown-linux-gnu"}


class CpuError(ValueError):
    """A processor or setting for which no kernels can be emitted."""


@dataclass(frozen=True)
class Isa:
    """An instruction set: its name and what the kernels ask about it."""

    name: str

    @property
    def amx(self) -> bool:
        """Tile registers with BF16 and int8 products."""
        return self.name == "amx"

    @property
    def avx512(self) -> bool:
        """512-bit vectors with BF16 and VNNI dot products."""
        return self.name in ("amx", "avx512")

    @property
    def rows(self) -> int:
        """Rows that a block of a matrix product keeps in registers beside 32 columns."""
        return {"amx": 32, "avx512": 8, "avx2": 2, "neon": 4}[self.name]


def cache_folder() -> Path:
    """Where compiled kernels and repacked weights are kept."""
    chosen = os.environ.get("HADAL_CACHE")
    if chosen:
        return _home(Path(chosen))
    parent = os.environ.get("XDG_CACHE_HOME")
    return (Path(parent) if parent else _home(Path("~/.cache"))) / "hadal"


def _home(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise CpuError(f"no folder for compiled kernels ({error}); set HADAL_CACHE to one") from None


@cache
def detect() -> tuple[Isa | None, str]:
    """The best instruction set here, or None, and the reason in words."""
    cap = os.environ.get("HADAL_CPU", "")
    if cap == "none":
        return None, "switched off by HADAL_CPU=none"
    if cap and cap not in _FEATURES:
        raise CpuError(f"HADAL_CPU is {cap!r}; choose none, {', '.join(_FEATURES)} or leave it unset")
    try:
        import llvmlite.binding as llvm
    except ImportError:
        return None, "llvmlite is not installed"
    if platform.system() not in ("Linux", "Darwin"):
        return None, f"no kernels on {platform.system()}"
    names = list(_FEATURES)
    machine = platform.machine().lower()
    if machine in ("aarch64", "arm64"):
        return (Isa("neon"), "NEON") if cap in ("", "neon") else (None, f"HADAL_CPU={cap} asks for another processor")
    if machine not in ("x86_64", "amd64"):
        return None, f"no kernels for a {machine} processor"
    if cap == "neon":
        return None, f"HADAL_CPU={cap} asks for another processor"
    features = llvm.get_host_cpu_features()
    for name in names[names.index(cap) if cap else 0 : 3]:
        missing = [f for f in _FEATURES[name] if not features.get(f)]
        if not missing and (name != "amx" or _allow_amx()):
            return Isa(name), f"{name.upper()}{f', capped by HADAL_CPU={cap}' if cap else ''}"
    return None, "the processor has no AVX2 with FMA"


@cache
def _allow_amx() -> bool:
    """Ask the kernel for the tile registers; it must be done once per process."""
    if platform.system() != "Linux":
        return False
    return bool(ctypes.CDLL(None).syscall(*_AMX_PERMISSION) == 0)


def _machine(isa: Isa) -> Any:
    """A new target machine: an engine owns the one it is given."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    native = platform.machine().lower() in (("aarch64", "arm64") if isa.name == "neon" else ("x86_64", "amd64"))
    triple = llvm.get_default_triple() if native else _TRIPLE.get(isa.name, "x86_64-unknown-linux-gnu")
    features = ",".join(f"+{f}" for f in _FEATURES[isa.name])
    target = llvm.Target.from_triple(triple)
    # Code and constants are mapped apart; with gigabytes of weights between them 32-bit distances would not reach.
    model = "small" if isa.name == "neon" else "large"
    return target.create_target_machine(cpu=_CPU[isa.name], features=features, opt=3, reloc="pic", codemodel=model)


def _optimised(text: str, machine: Any) -> Any:
    import llvmlite.binding as llvm

    module = llvm.parse_assembly(text)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = options.loop_interleaving = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return module


def assembly(text: str, isa: Isa) -> str:
    """The machine code of a module in words, for any instruction set, this processor's or not."""
    machine = _machine(isa)
    return str(machine.emit_assembly(_optimised(text, machine)))


class Library:
    """Compiled functions by name; the object is kept under `key`, or under a digest of the text."""

    def __init__(self, text: str | None, isa: Isa, key: str = "") -> None:
        import llvmlite.binding as llvm

        key = key or hashlib.sha256(f"{isa}{text}".encode()).hexdigest()[:32]
        place = _object(key)
        code = kept(place)
        self.cached = code is not None
        machine = _machine(isa)
        self._engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
        if code is None:
            assert text is not None, key
            code = machine.emit_object(_optimised(text, machine))
            keep(place, code)
        self._engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()

    @staticmethod
    def kept(key: str) -> bool:
        """Whether an object is kept under a key."""
        return kept(_object(key)) is not None

    def address(self, name: str) -> int:
        """The address of a function."""
        address: int = self._engine.get_function_address(name)
        assert address, name
        return address


def _object(key: str) -> Path:
    import llvmlite.binding as llvm

    return cache_folder() / "kernels" / f"{key}-{'.'.join(map(str, llvm.llvm_version_info))}-large.o"


def keep(path: Path, data: bytes) -> None:
    """Write a cache file with a digest of its content; a cache that cannot be written is done without."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(hashlib.sha256(data).digest() + data)
        partial.replace(path)
    except OSError:
        with suppress(OSError):
            partial.unlink()


def kept(path: Path) -> bytes | None:
    """A file of the cache; None where it is missing, cannot be read or is not what was written."""
    try:
        whole = path.read_bytes()
    except OSError:
        return None
    return whole[32:] if hashlib.sha256(whole[32:]).digest() == whole[:32] else None
