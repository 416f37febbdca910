"""The end of a step: what rows of logits say of prompts, and which tokens requests take.

The engine gives it each request's share of a step (Work) with the logits that were asked for; the sampler chooses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hadal.engine.constraint import ConstraintError, forbid
from hadal.engine.request import Request
from hadal.engine.sampler import Choice, Draw, Sampler
from hadal.engine.stats import EngineStats


@dataclass(slots=True)
class Work:
    """One request's share of a step: `count` known tokens, then `drafts`; the last of them give logits.

    The last `rows` choose tokens, `scored` before them tell the log-probabilities of the prompt's next tokens.
    """

    request: Request
    ids: list[int]
    count: int
    rows: int
    scored: int = 0
    kept: int = 0  # tokens of it that turned out to be the request's


class Choosing:
    """Gives requests their tokens."""

    def __init__(self, sampler: Sampler, eos_id: int | None, stats: EngineStats) -> None:
        self._sampler, self._eos_id, self._stats = sampler, eos_id, stats

    def choose(self, work: Sequence[Work], logits_RV: Tensor) -> list[Request]:
        """The requests that gained tokens or failed; a draft counts if the row before it chose the same.

        The log-probabilities of a request with a constraint are those among the tokens that it allows.
        """
        ready = []
        if any(w.scored for w in work):
            logits_RV = self._score(work, logits_RV)
            ready = [w.request for w in work if w.request.finished and not w.rows]
        chosen = [w for w in work if w.rows]
        if not chosen:
            return ready
        failed = self._forbid(chosen, logits_RV)
        draws = [draw(w.request, j) for w in chosen for j in range(w.rows)]
        choices = iter(self._sampler.choose(logits_RV, draws))
        for w in chosen:
            own = list(itertools.islice(choices, w.rows))
            w.request.stuck = w.request in failed
            self._give(w, [Choice(error=failed[w.request])] if w.request.stuck else own)
        return ready + [w.request for w in chosen]

    def _give(self, w: Work, choices: Sequence[Choice]) -> None:
        request, taken = w.request, 0
        while taken < w.rows and not request.finished:
            choice = choices[taken]
            if choice.error is None:
                request.append(choice.token_id, choice.logprobs, self._eos_id)
                self._stats.generated += 1
            else:
                request.error, request.finish_reason = choice.error, "error"
            taken += 1
            if taken < w.rows and choice.token_id != w.ids[w.count + taken - 1]:
                break
        offered = w.rows - 1
        if offered:
            # What a request that ends leaves unverified tells nothing.
            request.depth.observe(min(offered, taken) if request.finished else offered, taken - 1)
            self._stats.count_drafts(offered, taken - 1)
        request.drafts.clear()
        w.kept = w.count + taken - 1
        request.state.rewind(len(w.ids) - w.kept)

    def _forbid(self, work: Sequence[Work], logits_RV: Tensor) -> dict[Request, str]:
        """Mask the rows of requests with a constraint; why some of them cannot go on."""
        failed, masks, row = {}, [], 0
        for w in work:
            request, drafts = w.request, w.ids[w.count :]
            if request.constraint is not None:
                try:
                    found = request.constraint.masks(request.output_ids, drafts)
                    masks += [(row + j, mask) for j, mask in enumerate(found) if mask is not None]
                except ConstraintError as error:
                    failed[request] = str(error)
            row += w.rows
        if masks:
            forbid(logits_RV, masks)
        return failed

    def _score(self, work: Sequence[Work], logits_RV: Tensor) -> Tensor:
        """Note log-probabilities of prompts; the other rows of logits."""
        rest, row = [], 0
        for w in work:
            request, end = w.request, row + w.scored
            if w.scored:
                assert request.prompt_logprobs is not None
                begin = len(request.prompt_logprobs)
                ids = request.prompt_ids[begin : begin + w.scored]
                scores = self._sampler.score(logits_RV[row:end], ids, request.params.prompt_logprobs or 0)
                if scores is None:
                    request.error, request.finish_reason = "the logits of the prompt are not finite", "error"
                else:
                    request.prompt_logprobs += scores
            rest.append(logits_RV[end : end + w.rows])
            row = end + w.rows
        return torch.cat(rest)


def draw(request: Request, ahead: int) -> Draw:
    """What decides about the token that is `ahead` of the next one."""
    position = len(request.output_ids) + ahead
    return Draw(request.params, request.seed, request.stream, position, request.params.logprobs is not None)
