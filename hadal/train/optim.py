"""Muon with the hybrid Newton-Schulz iteration for matrices, AdamW for the rest; used by the training loop.

Legend: B matrices of one shape, S the short side, L the long side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Coefficients = tuple[float, float, float]
QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)  # drives every singular value into about 0.6 .. 1.2
FINISH: Coefficients = (2.0, -1.5, 0.5)  # converges from there to 1
HYBRID: tuple[Coefficients, ...] = (QUINTIC,) * 8 + (FINISH,) * 2

Rule = Literal["muon", "adamw"]
_ADAMW_TAILS = {"embed", "head", "base", "scale", "markov_w1", "markov_w2", "confidence"}


@dataclass(frozen=True)
class OptimConfig:
    """Constants of both optimisers (report 2.4, 4.2.2); `ns_dtype` is the precision of Newton-Schulz products."""

    momentum: float = 0.95
    update_rms: float = 0.18
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-20
    weight_decay: float = 0.1
    clip: float = 1.0
    ns_dtype: torch.dtype = torch.bfloat16


def orthogonalise(
    m_BSL: Tensor, steps: tuple[Coefficients, ...] = HYBRID, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The orthogonal factor of each matrix by Newton-Schulz, in the input's dtype; the short side must come second.

    Source: report section 2.4 and algorithm 1; eight quintic steps, then two that end at singular values of 1.
    """
    assert m_BSL.ndim == 3 and m_BSL.shape[1] <= m_BSL.shape[2]
    norm_B11 = m_BSL.square().sum((1, 2), keepdim=True).sqrt()
    x_BSL = (m_BSL / norm_B11.clamp_min(1e-30)).to(dtype)
    for a, b, c in steps:
        gram_BSS = x_BSL @ x_BSL.mT
        poly_BSS = torch.baddbmm(gram_BSS, gram_BSS, gram_BSS, beta=b, alpha=c)
        x_BSL = torch.baddbmm(x_BSL, poly_BSS, x_BSL, beta=a)
    return x_BSL.to(m_BSL.dtype)


def rule_for(name: str, parameter: Tensor) -> Rule:
    """Which optimiser owns a parameter (report 2.4).

    AdamW takes embedding, head, norms, mHC statics and gates, sinks and lookup tables; Muon takes every other matrix,
    positional biases of the compressors and mHC maps included.
    """
    if parameter.ndim < 2 or name.rsplit(".", 1)[-1] in _ADAMW_TAILS:
        return "adamw"
    return "muon"


def is_indexer(name: str) -> bool:
    """Whether a parameter belongs to a lightning indexer, which is trained by its own loss alone."""
    return ".indexer." in name


def clip_gradients(groups: Iterable[list[nn.Parameter]], limit: float) -> list[float]:
    """Scale each group's gradients to at most `limit` in global norm; returns the norms before scaling."""
    norms = []
    for group in groups:
        grads = [p.grad for p in group if p.grad is not None]
        if not grads:
            norms.append(0.0)
            continue
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g.float()) for g in grads]))
        scale = limit / norm.clamp_min(limit)
        for grad in grads:
            grad.mul_(scale.to(grad.dtype))
        norms.append(float(norm))
    return norms


class Optimizer:
    """Steps every parameter that has a gradient; one without is left alone, weight decay included.

    `blocks` maps the end of a parameter name to a number of logically independent matrices stacked along its rows
    (`wo_a` holds one per output group); expert stacks are split by their first axis without being named.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: OptimConfig,
        blocks: dict[str, int] | None = None,
    ) -> None:
        self.config = config
        self._named = dict(named)
        self._blocks = blocks or {}
        self._first: dict[str, Tensor] = {}  # momentum of Muon, first moment of AdamW
        self._second: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for parameter in self._named.values():
            parameter.grad = None

    def clip(self) -> tuple[float, float]:
        """Clip the backbone and the indexers apart, so that neither scales the other; returns both norms."""
        backbone = [p for n, p in self._named.items() if not is_indexer(n)]
        indexer = [p for n, p in self._named.items() if is_indexer(n)]
        norms = clip_gradients((backbone, indexer), self.config.clip)
        return norms[0], norms[1]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update of all parameters with gradients at learning rate `lr`."""
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for name, parameter in self._named.items():
            if parameter.grad is None:
                continue
            if rule_for(name, parameter) == "adamw":
                self._step_adamw(name, parameter, parameter.grad, lr)
                continue
            look_ahead = self._look_ahead(name, parameter.grad)
            for part_BNM, update_BNM in zip(self._split(name, parameter), self._split(name, look_ahead), strict=True):
                short_first = update_BNM if update_BNM.shape[1] <= update_BNM.shape[2] else update_BNM.mT
                shape = (short_first.shape[1], short_first.shape[2])
                by_shape.setdefault(shape, []).append((part_BNM, update_BNM))  # type: ignore[arg-type]
        for shape, entries in by_shape.items():
            self._step_muon(shape, entries, lr)

    def _look_ahead(self, name: str, grad: Tensor) -> Tensor:
        momentum = self._first.setdefault(name, torch.zeros_like(grad))
        momentum.mul_(self.config.momentum).add_(grad)
        return momentum * self.config.momentum + grad

    def _split(self, name: str, tensor: Tensor) -> list[Tensor]:
        """The parameter as stacks [B, N, M] of independent matrices, views of the same storage."""
        if tensor.ndim == 3:
            return [tensor]
        blocks = self._blocks.get(name.rsplit(".", 1)[-1], 1)
        return [tensor.view(blocks, tensor.shape[0] // blocks, tensor.shape[1])]

    def _step_muon(self, shape: tuple[int, int], entries: list[tuple[nn.Parameter, Tensor]], lr: float) -> None:
        config = self.config
        stacked_BSL = torch.cat([u if u.shape[1:] == shape else u.mT for _, u in entries])
        factor_BSL = orthogonalise(stacked_BSL, dtype=config.ns_dtype)
        gain = shape[1] ** 0.5 * config.update_rms  # an orthogonal factor has RMS 1 / sqrt(long side)
        start = 0
        for weight_BNM, update_BNM in entries:
            o_BSL = factor_BSL[start : start + weight_BNM.shape[0]]
            start += weight_BNM.shape[0]
            o_BNM = o_BSL if update_BNM.shape[1:] == shape else o_BSL.mT
            weight_BNM.mul_(1 - lr * config.weight_decay).add_(o_BNM, alpha=-lr * gain)

    def _step_adamw(self, name: str, parameter: nn.Parameter, grad: Tensor, lr: float) -> None:
        config = self.config
        beta1, beta2 = config.betas
        first = self._first.setdefault(name, torch.zeros_like(grad))
        second = self._second.setdefault(name, torch.zeros_like(grad))
        count = self._steps[name] = self._steps.get(name, 0) + 1
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (second / (1 - beta2**count)).sqrt_().add_(config.eps)
        parameter.mul_(1 - lr * config.weight_decay)
        parameter.addcdiv_(first, denominator, value=-lr / (1 - beta1**count))

    def state_dict(self) -> dict[str, Any]:
        """All moments and step counts, for an exact resume."""
        return {"first": dict(self._first), "second": dict(self._second), "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over moments and counts; names must be parameters of this model."""
        assert state["first"].keys() <= self._named.keys()
        for kind, target in (("first", self._first), ("second", self._second)):
            target.clear()
            for name, tensor in state[kind].items():
                target[name] = tensor.to(self._named[name].device).clone()
        self._steps = dict(state["steps"])
