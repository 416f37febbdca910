"""Drafting: the draft head's part of a step, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from hadal.engine.choosing import Work, draw
from hadal.engine.model import Drafter
from hadal.engine.sampler import Sampler
from hadal.model.drafter import DraftSpan


class Drafting:
    """Lets a draft head follow the requests and guess at most `most` tokens ahead; `window` tokens are all it sees."""

    def __init__(self, drafter: Drafter, sampler: Sampler, most: int, window: int) -> None:
        self._drafter, self._sampler, self._most, self._window = drafter, sampler, most, window
        self._cost = 0.1  # what drafting a token takes, as a share of a step

    def draft(self, work: Sequence[Work], began: float) -> None:
        """Show the draft head what the step computed, and guess on for requests that choose tokens.

        The step began at `began` on the performance counter. Guesses that a constraint forbids are cut off.
        """
        decoding = sum(1 for w in work if w.rows)
        spans = []
        for i, w in enumerate(work):
            request = w.request
            if request.error is not None:
                continue
            end = request.computed
            following = request.token_ids[max(end - min(w.kept, self._window), 0) + 1 : end + 1]
            room = request.limit - len(request.output_ids) - 1
            most = min(self._most, room) if w.rows and not request.finished else 0
            depth = request.depth.next(most, decoding, self._cost) if most else 0
            if following and (depth or request.depth.follows or not w.rows):
                spans.append(DraftSpan(i, w.kept, following, depth))

        def choose(logits_BV: Tensor, which: list[int], ahead: int) -> list[int]:
            return self._sampler.guess(logits_BV, [draw(work[i].request, ahead) for i in which])

        if not spans:
            return
        begun = time.perf_counter()
        for span, drafts in zip(spans, self._drafter.draft(spans, choose), strict=True):
            request = work[span.span].request
            if request.constraint is not None and drafts:
                drafts = drafts[: request.constraint.allowed(request.output_ids, drafts)]
            request.drafts = drafts
        deepest = max(span.depth for span in spans)
        if deepest and decoding == len(work):
            share = (time.perf_counter() - begun) / deepest / (begun - began)
            self._cost = 0.9 * self._cost + 0.1 * share
