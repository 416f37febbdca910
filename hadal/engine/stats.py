"""EngineStats: what an engine has done since it began, as plain counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class EngineStats:
    """Counts since the start; `cache` has a count per reason of the prefix store ("hit" or why there was none)."""

    steps: int = 0
    rows: int = 0  # tokens that went through the model
    prefilled: int = 0  # of those, prompt tokens that did not end a prompt
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    preemptions: int = 0
    faults: int = 0
    cache: Counter[str] = field(default_factory=Counter)
    verified: int = 0  # rows of guesses
    drafted: int = 0
    accepted: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)  # drafts accepted per place in their row of guesses

    def count_step(self, rows: int, prefilled: int) -> None:
        """One forward."""
        self.steps += 1
        self.rows += rows
        self.prefilled += prefilled

    def count_admission(self, prompt: int, cached: int, reason: str) -> None:
        """A request that got a state for the first time."""
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.cache[reason] += 1

    def count_drafts(self, offered: int, accepted: int) -> None:
        """A verification."""
        self.verified += 1
        self.drafted += offered
        self.accepted += accepted
        self.accepted_at.update(range(accepted))

    @property
    def acceptance(self) -> float:
        """Share of the drafts that stood."""
        return self.accepted / self.drafted if self.drafted else 0.0
