"""Choosing tokens from logits, one row at a time, so that a row's company in the batch cannot change its token.

Randomness comes from a counter: the number for output position p of a request is a hash of (seed, stream, p), so it
depends neither on the batch nor on what was drawn before. Legend: B requests, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.engine.request import Logprob, Request

_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Choice:
    """One sampled token with the log-probabilities that were asked for, or the reason why there is none."""

    token_id: int = -1
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    error: str | None = None


def sample(logits_BV: Tensor, requests: Sequence[Request]) -> list[Choice]:
    """The next token of each request from its row of float32 logits; a row with NaN or infinity fails alone."""
    finite = torch.isfinite(logits_BV).all(-1).tolist()
    greedy = logits_BV.argmax(-1).tolist()  # torch documents the first of equal maxima: the lowest index
    return [_choose(logits_BV[b], r, greedy[b], finite[b]) for b, r in enumerate(requests)]


def _choose(logits_V: Tensor, request: Request, greedy: int, finite: bool) -> Choice:
    position = len(request.output_ids)
    if not finite:
        return Choice(error=f"the model gave a logit that is not finite at output token {position}")
    params = request.params
    token = greedy
    if params.temperature > 0:
        u = uniform(request.seed, request.stream, position)
        token = _draw(logits_V, params.temperature, params.top_k, params.top_p, u)
    wanted = {} if params.logprobs is None else _logprobs(logits_V, token, params.logprobs)
    return Choice(token, wanted)


def uniform(seed: int, stream: int, position: int) -> float:
    """A number strictly between 0 and 1 that depends on its three arguments alone (splitmix64's finaliser, chained)."""
    x = _mix(seed & _MASK)
    x = _mix(x + stream * 0xD1B54A32D192ED03)
    x = _mix(x + position * 0x8CB92BA72F3D8DD7)
    return ((x >> 12) + 0.5) * 2.0**-52


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _draw(logits_V: Tensor, temperature: float, top_k: int, top_p: float, u: float) -> int:
    """Inverse transform of `u` in float64; filters keep the likeliest tokens, equal ones by lower index."""
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    scaled_V = (logits_V.double() - logits_V.max()) / temperature
    ids_V = None
    if 0 < top_k < len(scaled_V) or top_p < 1:
        scaled_V, ids_V = torch.sort(scaled_V, descending=True, stable=True)
        if top_k:
            scaled_V = scaled_V[:top_k]
    cumulative_V = torch.softmax(scaled_V, -1).cumsum(-1)
    if top_p < 1:
        kept = int(torch.searchsorted(cumulative_V, top_p)) + 1
        cumulative_V = cumulative_V[:kept]
    # `right` skips entries of zero probability, whose cumulative sum equals their predecessor's.
    index = int(torch.searchsorted(cumulative_V, u * float(cumulative_V[-1]), right=True))
    index = min(index, len(cumulative_V) - 1)
    return index if ids_V is None else int(ids_V[index])


def _logprobs(logits_V: Tensor, token: int, top: int) -> dict[int, Logprob]:
    """Token id -> Logprob for the chosen token first, then the `top` likeliest in order, equal ones by lower index."""
    logprobs_V = torch.log_softmax(logits_V, -1)
    ahead = (logits_V > logits_V[token]).sum() + (logits_V[:token] == logits_V[token]).sum()
    out = {token: Logprob(float(logprobs_V[token]), int(ahead) + 1)}
    if top:
        least = torch.topk(logits_V, min(top, len(logits_V))).values[-1]
        ids = (logits_V >= least).nonzero()[:, 0]  # all that may belong, in index order
        order = torch.sort(logits_V[ids], descending=True, stable=True).indices[:top]
        for rank, i in enumerate(ids[order].tolist(), 1):
            out.setdefault(i, Logprob(float(logprobs_V[i]), rank))
    return out
