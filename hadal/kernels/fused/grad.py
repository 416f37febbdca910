"""What every operator with a gradient of its own asks first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wants_grad(*values: Any) -> bool:
    """Whether a gradient will be asked of any of the tensors among `values`."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums and elementwise work: FP32, or FP64 for values that already are."""
    return torch.promote_types(dtype, torch.float32)
