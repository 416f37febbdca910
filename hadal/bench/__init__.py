"""Benchmarks of a model on this machine; `run` measures, `write_chart` draws, the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from hadal.bench.chart import write_chart

if TYPE_CHECKING:
    from hadal.bench.phases import Figure
    from hadal.config import ModelConfig
    from hadal.model import Model

PHASES = ("prefill", "decode", "batch", "long", "train")
COLUMNS = ["phase", "tokens", "tokens/s", "limit", "reached", "over 512"]
LONG = 8192

__all__ = ["COLUMNS", "PHASES", "BenchError", "run", "write_chart"]


class BenchError(ValueError):
    """A phase or size that cannot be measured."""


def run(
    load: Callable[..., Model],
    phases: Sequence[str] | None = None,
    lengths: Sequence[int] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[Figure]:
    """Measure each phase at each length (tokens of prompt, context or document), one after the other.

    All phases if none is named; 512 tokens if no length is, and 8,192 for `long`, which compares with 512 and so takes
    longer ones only. `load()` gives the model as it answers, `load(weights="dense")` one that can be trained; each is
    loaded when a phase needs it. Raises BenchError.
    """
    from hadal.bench.phases import MEASURES, SHORT

    unknown = [p for p in phases or () if p not in PHASES]
    if unknown:
        raise BenchError(f"no phase {unknown[0]!r}; choose from {', '.join(PHASES)}")
    chosen = list(phases or PHASES)
    if lengths and max(lengths) <= SHORT and "long" in chosen:
        if phases:
            raise BenchError(f"`long` compares with {SHORT} tokens; give a length above that")
        progress(f"long is left out: it compares with {SHORT} tokens and no length is above that")
    figures = []
    for training in (False, True):
        if group := [p for p in chosen if (p == "train") == training]:
            model = load(weights="dense") if training else load()
            for phase, length in _plan(model.config, group, lengths):
                progress(f"{phase} at {length}")
                figures.append(MEASURES[phase](model, length))
            del model
    return figures


def _plan(config: ModelConfig, phases: Sequence[str], lengths: Sequence[int] | None) -> list[tuple[str, int]]:
    """Phase and length of every measurement."""
    from hadal.bench.phases import GROWTH, SHORT

    most = config.max_position_embeddings - GROWTH
    wrong = [n for n in lengths or () if not 2 <= n <= most]
    if wrong:
        raise BenchError(f"{wrong[0]} tokens cannot be measured; this model takes 2 to {most}")
    plan: list[tuple[str, int]] = []
    for phase in phases:
        usual = LONG if phase == "long" else SHORT
        plan += [(phase, n) for n in lengths or [min(usual, most)] if phase != "long" or n > SHORT]
    return plan
