"""Check and Report: what a verification found, for people and for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """One comparison: its measured error against its tolerance. A skipped check has no verdict and says why."""

    group: str
    name: str
    error: float | None
    tolerance: float | None
    passed: bool | None
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All checks of one run, in order."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether something was judged and nothing failed."""
        verdicts = [c.passed for c in self.checks if c.passed is not None]
        return bool(verdicts) and all(verdicts)

    def rows(self) -> list[list[str]]:
        """Check, error, tolerance and verdict of every check, as text."""
        verdict = {True: "ok", False: "FAIL", None: "-"}
        return [
            [f"{c.group}: {c.name}", _number(c.error), _number(c.tolerance), f"{verdict[c.passed]}  {c.detail}".strip()]
            for c in self.checks
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"ok": self.ok, "checks": [asdict(c) for c in self.checks]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def worst(gaps: Iterable[float]) -> float:
    """The largest of some errors; NaN if any is NaN, where `max` would lose it."""
    values = list(gaps)
    return float("nan") if any(math.isnan(v) for v in values) else max(values, default=0.0)


def within(group: str, name: str, error: float, tolerance: float, detail: str = "") -> Check:
    """A check that passes when the error does not exceed the tolerance (NaN fails)."""
    return Check(group, name, error, tolerance, error <= tolerance, detail)


def skipped(group: str, name: str, why: str) -> Check:
    """A check that could not be made here."""
    return Check(group, name, None, None, None, why)
