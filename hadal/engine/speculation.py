"""DraftDepth: how many tokens it pays to guess for one request, from how its guesses have fared."""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.9  # share of the old estimate that a new trial leaves
_FIRST = 0.6  # acceptance that a request is taken to have before its first trial
_ROW_COST = 0.12  # time of verifying one more row, as a share of a step of one request
_CROWD_COST = 0.06  # and how much that share grows with each further request of the step
_PAUSES = (32, 256)  # the first pause without guesses in tokens, and the longest: each failed attempt doubles it
_WARM = 16  # tokens before an attempt that the draft head has to see


@dataclass(slots=True)
class DraftDepth:
    """The running acceptance of one request; every draft that is verified counts up to the first that fails.

    `follows` says whether the draft head should see the request's tokens although none is to be drafted.
    """

    acceptance: float = _FIRST
    follows: bool = True
    _idle: int = 0
    _pause: int = _PAUSES[0]

    def next(self, most: int, decoding: int, cost: float) -> int:
        """Tokens to draft when `decoding` requests share the step: as long as another one is likely enough.

        `cost` is the time of drafting one token, as a share of a step.
        """
        least = cost + _ROW_COST + _CROWD_COST * (decoding - 1)
        depth, chance = 0, self.acceptance
        while depth < most and chance >= least:
            depth, chance = depth + 1, chance * self.acceptance
        if depth or not most:
            self._idle, self._pause, self.follows = 0, _PAUSES[0], bool(depth)
            return depth
        self._idle += 1
        self.follows = self._idle >= self._pause - _WARM
        if self._idle < self._pause:
            return 0
        self.acceptance = max(self.acceptance, least)  # an attempt: it ends when the guesses fail again
        self._idle, self._pause = 0, min(2 * self._pause, _PAUSES[1])
        return 1

    def observe(self, offered: int, accepted: int) -> None:
        """Learn from a verification in which `accepted` of `offered` drafts stood."""
        for i in range(min(accepted + 1, offered)):
            self.acceptance = _MEMORY * self.acceptance + (1 - _MEMORY) * (i < accepted)
