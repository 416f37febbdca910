"""Hadal: the DeepSeek-V4 system in one package; public names load on first use, so importing it costs nothing."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hadal import quant as quant
    from hadal.checkpoint import load_model as load_model
    from hadal.checkpoint import save_model as save_model
    from hadal.engine import SamplingParams as SamplingParams
    from hadal.llm import LLM as LLM

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "load_model", "quant", "save_model"]

_HOMES = {
    "LLM": "hadal.llm",
    "SamplingParams": "hadal.engine",
    "load_model": "hadal.checkpoint",
    "save_model": "hadal.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name == "quant":
        return importlib.import_module("hadal.quant")
    if name not in _HOMES:
        raise AttributeError(f"module 'hadal' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
