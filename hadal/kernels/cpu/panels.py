"""Panels of single weights, packed on first use and kept as long as the weight lives; for the table `cpu`."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from hadal.kernels.cpu.matmul import BLOCK, Format
from hadal.kernels.cpu.memory import address, buffer
from hadal.kernels.cpu.pack import PackError, Weight, form_of, pack, pack_pair, packed_bytes
from hadal.quant import PackedWeight


@dataclass(frozen=True)
class Panels:
    """A packed matrix: its form, its address, how many panels it has and how many blocks of 32 k each."""

    form: Format
    address: int
    count: int
    blocks: int
    held: np.ndarray


@dataclass(frozen=True)
class _Kept:
    """Panels, or None for weights without a packed form, and the state of the weights they were made from."""

    panels: Panels | None
    sources: tuple[Any, ...]
    versions: tuple[int, ...]


# Weight -> its panels by index in a stack; a pair is kept under its first weight.
_kept: MutableMapping[Any, dict[tuple[int | None, int], _Kept]] = WeakIdKeyDictionary()


def panels_of(*weights: Weight, index: int | None = None) -> Panels | None:
    """Panels of a weight [N, K], or of a gate and its linear branch side by side; with `index`, of that one of stacks.

    None where the kernels cannot take it: K or a pair's N is no multiple of 32, values that are no BF16 numbers or
    lie too far from 1, another device. A weight that was written to since is packed again.
    """
    if any(w.device.type != "cpu" or (isinstance(w, Tensor) and w.is_inference()) for w in weights):
        return None
    versions = tuple(_version(w) for w in weights)
    of_owner = _kept.setdefault(weights[0], {})
    kept = of_owner.get((index, len(weights)))
    if (
        kept is None
        or kept.versions != versions
        or any(s() is not w for s, w in zip(kept.sources, weights, strict=True))
    ):
        parts = [w if index is None else w[index] for w in weights]  # type: ignore[index]
        kept = _Kept(_packed(parts), tuple(weakref.ref(w) for w in weights), versions)
        of_owner[index, len(weights)] = kept
    return kept.panels


def _version(weight: Weight) -> int:
    return weight.codes._version + weight.scales._version if isinstance(weight, PackedWeight) else weight._version


def _packed(parts: list[Weight]) -> Panels | None:
    rows, columns = parts[0].shape
    form = form_of(parts[0])
    if columns % BLOCK or any(form_of(p) != form or p.shape != parts[0].shape or not _exact(p) for p in parts):
        return None
    if len(parts) == 2 and rows % BLOCK:
        return None
    rows *= len(parts)
    held = buffer(packed_bytes(form, rows, columns))
    out = torch.from_numpy(held)
    try:
        pack(parts[0], out) if len(parts) == 1 else pack_pair(parts[0], parts[1], out)
    except PackError:
        return None
    return Panels(form, address(held), -(-rows // BLOCK), columns // BLOCK, held)


def _exact(weight: Weight) -> bool:
    return isinstance(weight, PackedWeight) or torch.equal(weight.to(torch.bfloat16).to(weight.dtype), weight)
