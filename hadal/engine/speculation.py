"""DraftDepth: how many tokens it pays to guess for one request, from how its guesses have fared."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.9  # share of the old estimate that a new trial leaves
_FIRST = 0.6  # acceptance that a request is taken to have before its first trial
_ROW_COST = 0.12  # time of verifying one more row, as a share of a step of one request
_CROWD_COST = 0.06  # and how much that share grows with each further request of the step
_PROBE = 24  # tokens without a guess after which one is tried again


@dataclass(slots=True)
class DraftDepth:
    """The running acceptance of one request; every draft that is verified counts up to the first that fails."""

    acceptance: float = _FIRST
    _idle: int = 0

    def next(self, most: int, decoding: int, cost: float) -> int:
        """Tokens to draft when `decoding` requests share the step: as long as another one is likely enough.

        `cost` is the time of drafting one token, as a share of a step.
        """
        least = cost + _ROW_COST + _CROWD_COST * (decoding - 1)
        depth, chance = 0, self.acceptance
        while depth < most and chance >= least:
            depth, chance = depth + 1, chance * self.acceptance
        self._idle = 0 if depth else self._idle + 1
        if self._idle >= _PROBE and most:
            self._idle = 0
            return 1
        return depth

    def observe(self, offered: int, accepted: int) -> None:
        """Learn from a verification in which `accepted` of `offered` drafts stood."""
        for i in range(min(accepted + 1, offered)):
            self.acceptance = _MEMORY * self.acceptance + (1 - _MEMORY) * (i < accepted)
