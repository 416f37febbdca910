"""Operators of the model, each with one plain reference and twins for other backends."""

from hadal.kernels.numerics import Numerics
from hadal.kernels.table import BACKENDS, KernelError, KernelTable, kernel_table

__all__ = ["BACKENDS", "KernelError", "KernelTable", "Numerics", "kernel_table"]
