"""Operators of the model, each with one plain reference and twins for other backends."""

from hadal.kernels.keys import Attended, IndexerLoss, IndexQuery
from hadal.kernels.numerics import Numerics
from hadal.kernels.table import BACKENDS, KernelError, KernelTable, kernel_table

__all__ = [
    "BACKENDS",
    "Attended",
    "IndexQuery",
    "IndexerLoss",
    "KernelError",
    "KernelTable",
    "Numerics",
    "kernel_table",
]
