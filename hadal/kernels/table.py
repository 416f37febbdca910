"""KernelTable: which function computes each operator; the model asks it and never imports a backend.

A backend is a table with the same names and signatures as `reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

Operator = Callable[..., Any]


class KernelError(ValueError):
    """A backend that does not exist or cannot run here."""


@dataclass(frozen=True)
class KernelTable:
    """Operators of one backend; the signatures are those of `hadal.kernels.reference`."""

    name: str
    linear: Operator
    linear_f32: Operator
    linear_groups: Operator
    rms_norm: Operator
    head_norm: Operator
    rotate: Operator
    quantise_kv: Operator
    stream_maps: Operator
    collapse_map: Operator
    mix_in: Operator
    mix_out: Operator
    pool_blocks: Operator
    encode_index: Operator
    attend: Operator
    attend_listed: Operator
    affinities: Operator
    choose_experts: Operator
    routing_weights: Operator
    swiglu: Operator
    routed_experts: Operator

    def operators(self) -> dict[str, str]:
        """Operator name -> the function that computes it."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {name: f"{f.__module__}.{f.__qualname__}" for name, f in chosen.items()}


BACKENDS = ("reference", "fused", "cpu")


def kernel_table(backend: str | KernelTable = "auto") -> KernelTable:
    """The operators of a backend, or the table given; "auto" is "fused", which runs everywhere.

    "cpu" is `fused` with emitted kernels for the products of BF16 rows. Raises KernelError where it cannot run.
    """
    if isinstance(backend, KernelTable):
        return backend
    if backend not in ("auto", *BACKENDS):
        raise KernelError(f"no kernel backend {backend!r}; choose 'auto' or one of {', '.join(BACKENDS)}")
    if backend == "cpu":
        return _cpu()
    return _reference() if backend == "reference" else _fused()


@cache
def _cpu() -> KernelTable:
    """The fused table with emitted kernels where they fit."""
    from hadal.kernels.cpu import table, table_rows
    from hadal.kernels.cpu.target import detect

    isa, reason = detect()
    if isa is None:
        raise KernelError(f"the kernel backend 'cpu' cannot run here: {reason}; choose 'auto'")
    modules = (table, table_rows)
    twins = {f.name: getattr(m, f.name) for f in fields(KernelTable) for m in modules if f.name in vars(m)}
    return replace(_fused(), name="cpu", **twins)


@cache
def _fused() -> KernelTable:
    """The reference with some operators replaced by twins that bring their own gradient."""
    from hadal.kernels.fused import attention, dense, mhc, moe

    modules = (attention, dense, mhc, moe)
    twins = {f.name: getattr(m, f.name) for f in fields(KernelTable) for m in modules if hasattr(m, f.name)}
    return replace(_reference(), name="fused", **twins)


@cache
def _reference() -> KernelTable:
    from hadal.kernels.reference import attention, compress, dense, mhc, moe

    modules = (attention, compress, dense, mhc, moe)
    named = {
        f.name: next(getattr(m, f.name) for m in modules if hasattr(m, f.name))
        for f in fields(KernelTable)
        if f.name != "name"
    }
    return KernelTable(name="reference", **named)
