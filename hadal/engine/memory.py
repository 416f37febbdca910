"""MemoryPlan: how many bytes states may take, what they take each, and so which requests fit."""

from __future__ import annotations

from dataclasses import dataclass

from hadal.engine.options import EngineOptions
from hadal.engine.request import RequestError
from hadal.kernels.pages import PAGE_TOKENS

_SHARE = 0.5  # of the free memory that states take if nothing is said


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: `weights` of the model, `home` of each sequence whatever its length, `page` per 128 tokens of it."""

    free: int
    weights: int
    cache: int
    home: int
    page: int
    max_concurrent: int

    @property
    def pages(self) -> int:
        """Pages that sequences may hold beside the homes of all that run."""
        return (self.cache - self.max_concurrent * self.home) // max(self.page, 1)

    @property
    def tokens(self) -> int:
        """Tokens of context that fit, over all requests."""
        return self.pages * PAGE_TOKENS

    def check(self, prompt: int) -> None:
        """Raise RequestError for a prompt of so many tokens that can never fit."""
        if prompt >= self.tokens:
            raise RequestError(
                f"the prompt has {prompt:,} tokens and memory holds {self.tokens:,} including the answer "
                f"({self}); shorten the prompt or raise `cache_memory`",
                "prompt",
            )

    def __str__(self) -> str:
        return (
            f"memory: {_size(self.free)} free, weights {_size(self.weights)}, states {_size(self.cache)}: "
            f"{self.max_concurrent} at once of {_size(self.home)} each and {self.page / PAGE_TOKENS:,.0f} bytes per "
            f"token, {self.tokens:,} tokens of context in all"
        )


def plan_memory(options: EngineOptions, *, free: int, weights: int, home: int, page: int) -> MemoryPlan:
    """Divide `free` bytes; `weights` are those still to be loaded. RequestError where not even one page fits."""
    cache = int((free - weights) * _SHARE) if options.cache_memory is None else options.cache_memory
    plan = MemoryPlan(free, weights, cache, home, page, options.max_concurrent)
    if plan.pages < 1:
        least = options.max_concurrent * home + page
        remedy = "lower `max_concurrent`" if options.cache_memory is None else "raise `cache_memory`"
        raise RequestError(
            f"{_size(max(cache, 0))} for the states of sequences is too little: {options.max_concurrent} at once take "
            f"{_size(least)}; {remedy}",
            "cache_memory",
        )
    return plan


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 1 << 29 else f"{nbytes / 2**20:,.1f} MiB"
