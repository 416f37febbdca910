"""Drafters: what a draft head proposes after a step, so that the next step may verify several tokens at once.

A drafter is called once after each `Model.advance`, also when no draft is wanted: its windows follow the tokens that
were kept. What it has missed only makes its drafts worse, never a token wrong.

Legend: T packed rows, N streams, d hidden, B sequences, V vocabulary. Source: spec architecture 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, cast
from weakref import ref

import torch
from torch import Tensor

from hadal.kernels.pages import REWIND
from hadal.model.spans import Batch
from hadal.model.state import SequenceState

if TYPE_CHECKING:
    from hadal.model.transformer import Model

LEAST_SURVIVAL = 0.5  # a DSpark draft ends where the chance that all of it is accepted falls below this

# (logits [B, V], span numbers, how many draft tokens precede) -> the tokens drafted
Choose = Callable[[Tensor, list[int], int], list[int]]


@dataclass(frozen=True)
class DraftSpan:
    """What became of span number `span` of the last advance: its first `rows` rows are kept, the state is rewound.

    `next_ids` are the tokens after the last rows kept, the newest token last, as many as the windows need; `depth`
    tokens are to be drafted.
    """

    span: int
    rows: int
    next_ids: list[int]
    depth: int


class Drafter(Protocol):
    """Proposes tokens after a step."""

    most: int  # longest draft

    def draft(self, spans: Sequence[DraftSpan], choose: Choose) -> list[list[int]]:
        """Remember the rows kept and draft up to `depth` tokens for each span."""


class Fed:
    """What the last advance left for the drafter."""

    def keep(
        self, states: Sequence[SequenceState], starts: list[int], lengths: Sequence[int], rows: Tensor | None
    ) -> None:
        """Per span its state, first position and length; `rows` are streams [T, N, d] or taps [T, taps*d].

        They are None where a runner keeps them itself.
        """
        self.states = [ref(state) for state in states]  # weak: the pages of a sequence that ends are free at once
        self.starts, self.firsts, self.rows = starts, list(accumulate(lengths, initial=0)), rows

    def kept(self, spans: Sequence[DraftSpan]) -> tuple[list[SequenceState], list[int]]:
        """The spans' states, and all rows that are to be remembered."""
        states: list[SequenceState] = []
        rows: list[int] = []
        for s in spans:
            state, end = self.states[s.span](), self.firsts[s.span] + s.rows
            assert state is not None and 0 < len(s.next_ids) <= s.rows
            states.append(state)
            rows += range(end - len(s.next_ids), end)
        return states, rows


class MtpDrafter:
    """Drafts with the MTP block, fed with its own streams and choices after the first token."""

    most = REWIND

    def __init__(self, model: Model) -> None:
        self._model = model

    def draft(self, spans: Sequence[DraftSpan], choose: Choose) -> list[list[int]]:
        """Draft `depth` tokens for each span; the first pass holds all rows kept, each further one a row per span."""
        fed = self._model.fed
        drafts: list[list[int]] = [[] for _ in spans]
        states, sources = fed.kept(spans)
        lengths = [len(s.next_ids) for s in spans]
        starts = [fed.starts[s.span] + s.rows - len(s.next_ids) for s in spans]
        ids = [token for s in spans for token in s.next_ids]
        going = list(range(len(spans)))
        for ahead in range(max(1, *(s.depth for s in spans))):
            last = [end - 1 for end in accumulate(lengths)]
            asked = [i for i, g in enumerate(going) if spans[g].depth > ahead]
            logits = self._follow(states, starts, lengths, sources, ids, [last[i] for i in asked])
            if asked:
                chosen = choose(logits, [spans[going[i]].span for i in asked], ahead)
                for i, token in zip(asked, chosen, strict=True):
                    drafts[going[i]].append(token)
            # Whoever wants more goes on from its last row, one position further.
            on = [i for i in asked if spans[going[i]].depth > ahead + 1]
            ids, sources = [drafts[going[i]][-1] for i in on], [last[i] for i in on]
            states, starts, lengths = [states[i] for i in on], [starts[i] + lengths[i] for i in on], [1] * len(on)
            going = [going[i] for i in on]
        return drafts

    def _follow(
        self, states: Sequence[SequenceState], starts: Sequence[int], lengths: Sequence[int], sources: list[int],
        ids: list[int], wanted: list[int],
    ) -> Tensor:  # fmt: skip
        """One pass of the block: logits [W, V] of the rows `wanted`.

        Span s holds `lengths[s]` rows from position `starts[s]` on; row i takes the streams of row `sources[i]` of the
        last pass, of the main layers or of this block, and the token `ids[i]` that follows it.
        """
        model = self._model
        if model.runner is not None:
            return model.runner.follow(cast(Any, states), starts, lengths, sources, ids, wanted)
        assert model.fed.rows is not None
        batch = Batch.at(starts, lengths, states, model.device)
        model.fed.rows = model.mtp_streams(model.fed.rows[sources], ids, batch)
        return model.mtp_head(model.fed.rows[wanted])


class DsparkDrafter:
    """Drafts with the DSpark stages: one block for each sequence, its tokens one after the other."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.most = min(model.config.dspark_block_size or 0, REWIND)

    @torch.no_grad()
    def draft(self, spans: Sequence[DraftSpan], choose: Choose) -> list[list[int]]:
        """Draft at most `depth` tokens for each span, fewer where the confidence head doubts that they survive."""
        model = self._model
        fed = model.fed
        states, rows = fed.kept(spans)
        for s, state in zip(spans, states, strict=True):
            assert state.position == fed.starts[s.span] + s.rows
            state.draft_position = state.position - len(s.next_ids)  # earlier gaps only make drafts worse
        assert fed.rows is not None
        model.dspark_remember(fed.rows[rows], [len(s.next_ids) for s in spans], states)
        drafts: list[list[int]] = [[] for _ in spans]
        pairs = zip(spans, states, strict=True)
        blocks = [model.dspark_block(s.next_ids[-1], state) if s.depth else None for s, state in pairs]
        tokens = [torch.tensor(s.next_ids[-1], device=model.device) for s in spans]
        survival, stage = [1.0] * len(spans), model.dspark_stages[-1]
        for ahead in range(max(s.depth for s in spans)):
            going, logits = [], []
            for i, (s, block) in enumerate(zip(spans, blocks, strict=True)):
                if block is not None and s.depth > ahead and survival[i] >= LEAST_SURVIVAL:
                    survival[i] *= float(stage.confidence_logit(block[0][ahead], tokens[i]).sigmoid())
                    if survival[i] >= LEAST_SURVIVAL:
                        going.append(i)
                        logits.append(block[1][ahead] + stage.markov_bias(tokens[i]))
            if not going:
                break
            chosen = choose(torch.stack(logits), [spans[i].span for i in going], ahead)
            for i, token in zip(going, chosen, strict=True):
                drafts[i].append(token)
                tokens[i] = torch.tensor(token, device=model.device)
        return drafts
