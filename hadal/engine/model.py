"""What the engine asks of a model; `hadal.model.Model` gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from hadal.config import ModelConfig
from hadal.kernels.pages import Page, PagePool

# (logits [B, V], span numbers, how many drafts precede) -> the tokens drafted
Choose = Callable[[Tensor, list[int], int], list[int]]


class Drafter(Protocol):
    """A draft head that proposes tokens after a step; see `hadal.model.drafter`."""

    most: int

    def draft(self, spans: Sequence[Any], choose: Choose) -> list[list[int]]:
        """Remember what each `hadal.model.DraftSpan` kept and draft up to its depth."""


class LanguageModel(Protocol):
    """The model's side of the engine. States have `position`, `pages`, `rewindable`, `clone`, `rewind` and `dump`."""

    @property
    def config(self) -> ModelConfig:
        """Vocabulary size, context length, window and end-of-sequence id are read from it."""

    @property
    def pool(self) -> PagePool:
        """Where the states' pages come from."""

    @property
    def home_bytes(self) -> int:
        """Bytes of a state beside its pages."""

    @property
    def state_key(self) -> str:
        """Names all that a state's bytes depend on beside the tokens."""

    @property
    def drafter(self) -> Drafter | None:
        """The draft head, if there is one."""

    def new_state(self) -> Any:
        """The state of a sequence before its first token."""

    def restore_state(self, home: bytes, pages: list[Page]) -> Any:
        """The state that `dump` wrote, on pages with its pages' bytes."""

    def step_rows(self, longest: int) -> int:
        """Rows that one step takes when its longest sequence ends at position `longest`."""

    def advance(
        self, ids: Sequence[int], lengths: Sequence[int], states: Sequence[Any], wanted: Sequence[int]
    ) -> Tensor:
        """FP32 logits [sum(wanted), V] after the last `wanted` tokens of each span; states advance."""
