"""How a model hands its main layers and head to the emitted CPU kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hadal.kernels.cpu.runner import CpuRunner
from hadal.kernels.cpu.target import CpuError, detect
from hadal.model.rope import frequencies

if TYPE_CHECKING:
    from hadal.model.transformer import Model


def build_runner(
    model: Model,
    identity: str | None = None,
    expert_memory: int | None = None,
    release: Callable[[], None] | None = None,
) -> CpuRunner:
    """Pack a model's weights and compile its kernels; `identity` names its files, to keep the packed weights on disk.

    `expert_memory` (bytes) bounds the experts in memory; `release` gives back the memory of weights that were read.
    Raises CpuError where this machine has no kernels and PackError for weights without a packed form.
    """
    isa, reason = detect()
    if isa is None:
        raise CpuError(f"no CPU kernels here: {reason}")
    layers = (*model.config.layers, *model.config.draft_layers)
    plain = next((layer for layer in layers if not layer.ratio), layers[0])
    compressed = next((layer for layer in layers if layer.ratio), plain)
    regimes = [frequencies(model.config, plain), frequencies(model.config, compressed)]

    def lookup(path: str) -> Any:
        owner, _, name = path.rpartition(".")
        return getattr(model.get_submodule(owner), name)

    return CpuRunner(model.config, isa, lookup, regimes, identity, expert_memory, release)
