"""Choosing tokens from logits, one row at a time, so that a row's company in the batch cannot change its token.

A sampled token is the argmax of logit / T + g over the tokens that the filters keep, g Gumbel noise that is a hash of
(seed, stream, position, token id). So a draft and its verification meet the same noise and mostly agree. Rows on a CPU
with kernels go through `hadal.kernels.cpu.sample`, others through torch. Legend: R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hadal.engine.request import MAX_TOP_LOGPROBS, Logprob, SamplingParams
from hadal.kernels.cpu.sample import Asked, Chooser, Found
from hadal.kernels.cpu.target import detect

_MASK = 2**64 - 1
_LOW = 2**32 - 1
_UNIT = 2.0**40  # weights are added as integers: their sum does not depend on the order, so neither on the batch
_LIKELIEST = Asked(0, 0.0, 1, 1.0, -1)
_FASTEST, _SLOWEST = 1e30, 1e-30  # of 1 / T in FP32; temperatures beyond choose as these do


@dataclass(frozen=True, slots=True)
class Choice:
    """One sampled token with the log-probabilities that were asked for, or the reason why there is none."""

    token_id: int = -1
    logprobs: dict[int, Logprob] = field(default_factory=dict)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """What decides about one row beside its logits; `position` counts output tokens."""

    params: SamplingParams
    seed: int
    stream: int
    position: int
    want_logprobs: bool


class Sampler:
    """Chooses among the first `vocabulary` tokens of rows of logits that lie on a device."""

    def __init__(self, vocabulary: int, device: torch.device | str = "cpu") -> None:
        self._vocabulary = vocabulary
        isa = detect()[0] if torch.device(device).type == "cpu" else None
        self._find: Callable[[Tensor, list[Asked]], list[Found]] = self._find_plainly
        if isa is not None:
            self._find = Chooser(isa, vocabulary, MAX_TOP_LOGPROBS).find

    def choose(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[Choice]:
        """The next token of each row of float32 logits.

        A row with NaN or +inf, or without any finite logit, fails alone; -inf masks a token. Log-probabilities are
        natural, of the raw logits: the chosen token's first, then the likeliest in order, masked tokens left out.
        """
        asked = [self._asked(d, (d.params.logprobs or 0) if d.want_logprobs else -1) for d in draws]
        return [_choice(d, found) for d, found in zip(draws, self._find(logits_RV, asked), strict=True)]

    def guess(self, logits_RV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """Draft tokens, with the noise of `choose`; 0 for a row that has none."""
        found = self._find(logits_RV, [self._asked(d, -1) for d in draws])
        return [max(row.token, 0) for row in found]

    def score(self, logits_RV: Tensor, ids: Sequence[int], top: int) -> list[dict[int, Logprob]] | None:
        """Log-probabilities of given tokens, one for each row, with the `top` likeliest; None if a row is not sound."""
        results = []
        rows_RV = logits_RV[:, : self._vocabulary]
        all_found = self._find(logits_RV, [_LIKELIEST._replace(top=top)] * len(ids))
        for row_V, token, found in zip(rows_RV, ids, all_found, strict=True):
            if found.token < 0:
                return None
            ahead = int((row_V > row_V[token]).sum() + (row_V[:token] == row_V[token]).sum())
            results.append(_logprobs(found._replace(token=token, logit=float(row_V[token]), ahead=ahead)))
        return results

    def _asked(self, draw: Draw, top: int) -> Asked:
        params = draw.params
        if params.temperature == 0:
            return _LIKELIEST._replace(top=top)
        rate = max(min(1 / params.temperature, _FASTEST), _SLOWEST)
        return Asked(
            noise_key(draw.seed, draw.stream, draw.position), rate, params.top_k or self._vocabulary, params.top_p, top
        )

    def _find_plainly(self, logits_RV: Tensor, asked: list[Asked]) -> list[Found]:
        rows_RV = logits_RV[:, : self._vocabulary]
        if rows_RV.device.type != "cpu":
            return find(rows_RV, asked)
        # On a CPU torch's functions round by a number's place in the tensor, so each row is a tensor of its own.
        return [found for r, row in enumerate(asked) for found in find(rows_RV[r : r + 1], [row])]


def _choice(draw: Draw, found: Found) -> Choice:
    if found.token < 0:
        return Choice(error=f"the logits at output token {draw.position} are not finite (NaN, +inf or only -inf)")
    if not draw.want_logprobs:
        return Choice(found.token)
    return Choice(found.token, _logprobs(found))


def _logprobs(found: Found) -> dict[int, Logprob]:
    base = found.highest + math.log(found.mass)
    logprobs = {found.token: Logprob(found.logit - base, found.ahead + 1)}
    for rank, (token, logit) in enumerate(found.likeliest, 1):
        logprobs.setdefault(token, Logprob(logit - base, rank))
    return logprobs


def noise_key(seed: int, stream: int, position: int) -> int:
    """64 bits that depend on the three arguments alone (splitmix64's finaliser, chained)."""
    x = _mix(seed & _MASK)
    x = _mix(x + stream * 0xD1B54A32D192ED03)
    return _mix(x + position * 0x8CB92BA72F3D8DD7)


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def find(logits_RV: Tensor, asked: Sequence[Asked]) -> list[Found]:
    """What the kernel computes, in plain torch on any device, by sorting; K counts places in order."""
    x_RV, device = logits_RV.float(), logits_RV.device
    sound_R1 = (x_RV < math.inf).all(1, keepdim=True) & (x_RV > -math.inf).any(1, keepdim=True)
    if not any(row.rate or row.top >= 0 for row in asked):
        best_R1 = x_RV.argmax(1, keepdim=True)  # torch documents the first of equal maxima: the lowest index
        return [Found(token, 0, 0.0, 0.0, 1.0, ()) for (token,) in torch.where(sound_R1, best_R1, -1).tolist()]
    x_RK, id_RK = torch.where(sound_R1, x_RV, 0.0).sort(descending=True, stable=True)
    below_RK = x_RK - x_RK[:, :1]
    rate_R1, top_p_R1 = (torch.tensor([[getattr(row, n)] for row in asked], device=device) for n in ("rate", "top_p"))
    top_k_R1 = torch.tensor([[row.top_k] for row in asked], device=device)
    weights_RK = _weights(below_RK * rate_R1)
    inside_RK = torch.arange(x_RK.shape[1], device=device) < top_k_R1
    limit_R1 = top_p_R1 * (weights_RK * inside_RK).sum(1, keepdim=True)
    inside_RK &= (weights_RK.cumsum(1) - weights_RK < limit_R1) | (top_p_R1 == 1)
    scores_RK = below_RK * rate_R1 - _exponential(asked, id_RK).log()
    place_R1 = scores_RK.masked_fill(~inside_RK, -math.inf).argmax(1, keepdim=True)
    most = max(row.top for row in asked)
    mass_R1 = _weights(below_RK).sum(1, keepdim=True)
    token_R1 = torch.where(sound_R1, id_RK.gather(1, place_R1), -1)
    whole = torch.cat((token_R1, place_R1, mass_R1, id_RK[:, : max(most, 0)]), 1).tolist()
    real = torch.cat((x_RK.gather(1, place_R1), x_RK[:, : max(most, 1)]), 1).tolist()
    results = []
    for row, (token, place, mass, *ids), (logit, *logits) in zip(asked, whole, real, strict=True):
        pairs = [(i, its) for i, its in zip(ids, logits, strict=False) if its > -math.inf]
        results.append(Found(token, place, logit, logits[0], mass / _UNIT, tuple(pairs[: max(row.top, 0)])))
    return results


def _exponential(asked: Sequence[Asked], id_RK: Tensor) -> Tensor:
    """Exponential noise -log(1 - v), v = (bits + 1/2) / 2^32 of a hash of key and token id, precise at both ends."""
    low_R1, high_R1 = (
        torch.tensor([[row.key >> shift & _LOW] for row in asked], device=id_RK.device) for shift in (0, 32)
    )
    bits_RK = _mix_half(_mix_half((id_RK + low_R1) & _LOW) ^ high_R1)
    early_RK = bits_RK < 2**31
    smaller_RK = (torch.where(early_RK, bits_RK, _LOW - bits_RK).float() + 0.5) * 2.0**-32  # of v and 1 - v
    return -torch.where(early_RK, torch.log1p(-smaller_RK), smaller_RK.log())


def _mix_half(x: Tensor) -> Tensor:
    """MurmurHash3's finaliser of 32-bit numbers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _LOW
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def _weights(scaled_RK: Tensor) -> Tensor:
    return (scaled_RK.exp() * _UNIT).long()
