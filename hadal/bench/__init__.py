"""Benchmarks of a loaded model on this machine; `run` measures, the command line prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hadal.bench.phases import Figure
    from hadal.model import Model

PHASES = ("prefill", "decode", "batch", "train")

__all__ = ["PHASES", "BenchError", "run"]


class BenchError(ValueError):
    """A phase or size that cannot be measured."""


def run(
    model: Model, phases: Sequence[str], lengths: Sequence[int], progress: Callable[[str], None] = lambda name: None
) -> list[Figure]:
    """Measure each phase at each length (tokens of prompt, context or document), one after the other.

    Training needs parameters that take gradients, so a model with packed weights is refused. Raises BenchError.
    """
    from hadal.bench.phases import measure_decode, measure_prefill, measure_training

    unknown = [p for p in phases if p not in PHASES]
    if unknown:
        raise BenchError(f"no phase {unknown[0]!r}; choose from {', '.join(PHASES)}")
    longest = model.config.max_position_embeddings
    wrong = [n for n in lengths if not 2 <= n <= longest - 64]
    if wrong:
        raise BenchError(f"{wrong[0]} tokens cannot be measured; this model takes 2 to {longest - 64}")
    if "layers.0.attn.wq_a" not in dict(model.named_parameters()):
        raise BenchError("the weights are packed; load the model with weights='dense' to measure it")
    measure: dict[str, Callable[[Model, int], Figure]] = {
        "prefill": measure_prefill,
        "decode": measure_decode,
        "batch": lambda m, n: measure_decode(m, n, batch=8),
        "train": measure_training,
    }
    figures = []
    for length in lengths:
        for phase in phases:
            progress(f"{phase} at {length}")
            figures.append(measure[phase](model, length))
    return figures
