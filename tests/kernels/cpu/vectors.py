"""Run emitted functions of vectors on arrays, for tests of numbers and of the builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hadal.kernels.cpu.ir import F32, Function, Value, size, vec
from hadal.kernels.cpu.program import KernelModule
from tests.kernels.cpu.harness import Kernels, address

LANES = 16
Rule = Callable[[Function, Value], Value]


class VectorFunctions:
    """Compiled functions of 16 lanes; calling one maps an array."""

    def __init__(self, isa: str, rules: Mapping[str, Rule], kind: str = F32) -> None:
        self._sizes: dict[str, int] = {}

        def emit(module: KernelModule) -> None:
            for name, rule in rules.items():
                with module.kernel(name, "source target count") as k:
                    f = k.f
                    for i in k.share(k.arg("count")):
                        result = rule(f, f.load(vec(LANES, kind), k.ptr("source"), i * (LANES * size(kind))))
                        self._sizes[name] = size(result.kind)
                        f.store(result, k.ptr("target"), i * size(result.kind))

        self._kernels = Kernels(isa, emit)

    def __call__(self, name: str, values: np.ndarray, kind: type[np.generic]) -> np.ndarray:
        """The function of every value; results are of the numpy type `kind`."""
        count = -(-values.size // LANES)
        padded = np.resize(values.reshape(-1), count * LANES)
        out = np.zeros(count * self._sizes[name], np.uint8).view(kind)
        step = np.zeros(1, np.int64)
        self._kernels.run(name, step, source=address(padded), target=address(out), count=count)
        return out if out.size != padded.size else out[: values.size]
