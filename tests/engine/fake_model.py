"""A model without weights: its logits depend on nothing but the ids fed so far, so every token can be foretold."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hadal.config import ModelConfig, preset


@dataclass
class FakeState:
    """The ids seen so far."""

    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.ids)


class FakeModel:
    """Logits are normal noise seeded by a checksum of the sequence; `nan_after` ids make the next row NaN."""

    def __init__(self, vocab_size: int = 50, context: int = 64, nan_after: tuple[int, ...] | None = None) -> None:
        self.config: ModelConfig = preset("nano").replace(vocab_size=vocab_size, max_position_embeddings=context)
        self.nan_after = nan_after
        self.steps: list[list[int]] = []

    def new_state(self) -> Any:
        return FakeState()

    def row(self, ids: list[int]) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(repr(ids).encode()))
        row = torch.randn(self.config.vocab_size, generator=generator)
        if self.nan_after is not None and tuple(ids[: len(self.nan_after)]) == self.nan_after:
            row[3] = float("nan")
        return row

    def logits_ragged(self, ids_T: Tensor, lengths: list[int], states: list[Any], last_only: bool = True) -> Tensor:
        assert last_only and sum(lengths) == len(ids_T) and min(lengths) > 0
        self.steps.append(list(lengths))
        for ids, state in zip(ids_T.split(lengths), states, strict=True):
            state.ids += ids.tolist()
        return torch.stack([self.row(state.ids) for state in states])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The continuation that greedy decoding must give, found without the engine."""
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            row = self.row(ids).tolist()
            ids.append(row.index(max(row)))
            if ids[-1] == self.config.eos_token_id:
                break
        return ids[len(prompt) :]
