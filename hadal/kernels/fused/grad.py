"""What every operator with a gradient of its own asks first, and the shares in which it walks over its rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

SHARE = 1 << 18  # values of a share, so that all its FP32 intermediates stay in cache


def wants_grad(*values: Any) -> bool:
    """Whether a gradient will be asked of any of the tensors among `values`."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and elementwise work: FP32, or FP64 for values that already are."""
    return torch.promote_types(dtype, torch.float32)


def shares(x: Tensor) -> Iterator[slice]:
    """Slices of the first axis that cover x."""
    rows = max(1, SHARE * len(x) // max(1, x.numel()))
    return (slice(a, a + rows) for a in range(0, len(x), rows))
