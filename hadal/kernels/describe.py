"""Which kernel computes what on this machine, and why, in words."""

from __future__ import annotations

from hadal.kernels.cpu import chosen_kernels
from hadal.kernels.cpu.target import detect
from hadal.kernels.table import KernelTable, kernel_table


def describe() -> dict[str, str]:
    """For each mode of a model on a CPU: its parts or operators, what computes them, and the reason."""
    rows = {f"fast: {part}": how for part, how in chosen_kernels().items()}
    isa, reason = detect()
    rows["faithful: operators"] = _by_home(kernel_table("auto" if isa is None else "cpu")) + f" ({reason})"
    rows["training: operators"] = _by_home(kernel_table("auto")) + " (own gradients where torch's are slow)"
    return rows


def _by_home(table: KernelTable) -> str:
    homes: dict[str, list[str]] = {}
    for operator, function in table.operators().items():
        homes.setdefault(function.split(".")[2], []).append(operator)
    words = {"cpu": "emitted", "fused": "torch with own gradient", "reference": "plain torch"}
    return "; ".join(f"{words[home]}: {', '.join(names)}" for home, names in homes.items())
