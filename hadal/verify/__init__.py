"""Verification: does this installation compute the official DeepSeek-V4?

`run` compares formulas, golden vectors of the official code, single modules, the model with itself, Hugging Face
transformers, the chat encoding, and makes sure that deliberate mistakes are noticed. Above checkpoint, model and text.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable
from pathlib import Path

from hadal.verify.report import Check, Report

__all__ = ["Check", "Report", "VerifyError", "embedded_golden", "run"]


class VerifyError(ValueError):
    """A golden directory that holds nothing to verify against."""


def embedded_golden() -> Path:
    """The compact golden configurations that ship with the package."""
    return Path(str(importlib.resources.files("hadal").joinpath("assets", "golden")))


def run(
    golden: Path | None = None, write: Path | None = None, progress: Callable[[str], None] = lambda stage: None
) -> Report:
    """All checks; `golden` is a directory of golden configurations (the embedded one by default).

    `write` keeps every replayed output as `<write>/<configuration>/out_<mode>.safetensors`. Raises VerifyError.
    """
    from hadal.verify.chat import check_chat
    from hadal.verify.formulas import check_formulas
    from hadal.verify.golden import MODES, load_golden
    from hadal.verify.modules import check_modules
    from hadal.verify.mutations import check_mutations
    from hadal.verify.peers import check_transformers
    from hadal.verify.states import check_states

    root = golden or embedded_golden()
    configurations = [d for d in sorted(root.iterdir()) if (d / "noise.json").is_file()] if root.is_dir() else []
    if not configurations:
        raise VerifyError(f"{root} holds no golden configuration (folders with noise.json); check the path")
    progress("formulas")
    checks = check_formulas()
    progress("chat vectors")
    checks += check_chat(root.parent / "data" / "v4-format" / "tests")
    for directory in configurations:
        for mode in MODES:
            progress(f"golden vectors: {directory.name} {mode}")
            checks += _check_golden(directory, mode, write)
    recorded = next((d for d in configurations if (d / "debug_d_ref.safetensors").is_file()), None)
    if recorded is not None:
        progress("single modules")
        checks += check_modules(load_golden(recorded, "ref"), recorded)
        progress("states")
        checks += check_states(recorded)
        progress("mutations")
        checks += check_mutations(recorded)
    progress("transformers")
    return Report((*checks, *check_transformers()))


def _check_golden(directory: Path, mode: str, write: Path | None) -> list[Check]:
    from safetensors.torch import save_file

    from hadal.verify.golden import case_names, judge, load_golden, replay

    cases = [name for name in case_names(directory) if name != "d"]
    out = replay(load_golden(directory, mode), directory, cases)
    if write is not None:
        target = write / directory.name
        target.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in out.items()}, target / f"out_{mode}.safetensors")
    return judge(directory, mode, out, cases)
