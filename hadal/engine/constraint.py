"""Constraint: which tokens a request may take next; the engine asks without knowing why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ConstraintError(Exception):
    """No token may follow; the message says why."""


class Constraint(Protocol):
    """Limits the tokens of one request.

    It learns them from the request's output ids, which from call to call only grow, whatever becomes of its state.
    """

    def copy(self) -> Constraint:
        """The same limits for another sample, before its first token."""

    def allowed(self, output_ids: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow `output_ids`; one that ends the answer is not counted."""

    def masks(self, output_ids: Sequence[int], drafts: Sequence[int]) -> list[np.ndarray | None]:
        """Which ids may follow `output_ids` and each of the `drafts`, which are allowed.

        Bit i % 8 of byte i // 8 stands for id i; None allows all. Raises ConstraintError.
        """


def forbid(logits_RV: Tensor, masks: Sequence[tuple[int, np.ndarray]]) -> None:
    """Make rows of logits -inf wherever the mask of that row has no bit; ids behind its end stay as they are."""
    packed_MB = torch.from_numpy(np.stack([mask for _, mask in masks])).to(logits_RV.device)
    # Looking up eight addends for each byte takes a tenth of the time of filling where a mask says so.
    addends_MV = _addends(logits_RV.device).index_select(0, packed_MB.flatten().int()).view(len(masks), -1)
    width = min(logits_RV.shape[1], addends_MV.shape[1])
    for (row, _), addends_V in zip(masks, addends_MV, strict=True):
        logits_RV[row, :width] += addends_V[:width]


@cache
def _addends(device: torch.device) -> Tensor:
    return torch.tensor([[0.0 if byte >> i & 1 else -math.inf for i in range(8)] for byte in range(256)], device=device)
