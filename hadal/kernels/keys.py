"""What an attention kernel is given besides the queries: the keys of one span and the indexer's view of them.

Legend: T query tokens of the span, H heads, D head dim, K window rows (history then span), C compressed entries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from hadal.kernels.stored import StoredRows


@dataclass(frozen=True)
class IndexQuery:
    """What the lightning indexer needs to choose entries for a span."""

    q_THD: Tensor
    weight_TH: Tensor
    keys: Tensor | StoredRows
    topk: int

    @cached_property
    def keys_CD(self) -> Tensor:
        """The keys in memory."""
        return self.keys.read() if isinstance(self.keys, StoredRows) else self.keys


@dataclass
class IndexerLoss:
    """Accumulates the indexer's KL against the attention it should predict (training.md 1.7)."""

    kl: list[Tensor] = field(default_factory=list)
    uniform: list[Tensor] = field(default_factory=list)
    queries: int = 0


@dataclass(frozen=True)
class Attended:
    """One span's view of its keys: which positions the window rows and entries stand for."""

    window_KD: Tensor
    entries: Tensor | StoredRows | None
    start: int  # position of the span's first token
    history: int  # window rows before the span's first token
    window: int  # window length in tokens, the token itself included
    ratio: int  # source tokens per entry, 0 without entries
    index: IndexQuery | None = None  # None: all complete entries are attended to
    full_block: bool = False  # every query sees all window rows (DSpark: no causal mask inside the block)

    @cached_property
    def entries_CD(self) -> Tensor | None:
        """The entries in memory."""
        return self.entries.read() if isinstance(self.entries, StoredRows) else self.entries
