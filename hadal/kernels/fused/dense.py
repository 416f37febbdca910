"""Norms and rotations with gradients in closed form: a norm keeps one number per row, a rotation turns back.

Legend: T tokens, H heads, D head dim, R rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.fused.grad import shares, wants_grad, wide
from hadal.kernels.reference import dense as reference


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference, but a carrier narrower than FP32 also is the type of the products."""
    if x.dtype == wide(x.dtype) or not wants_grad(x, weight):
        return reference.linear_f32(x, weight)
    return F.linear(x, weight.to(x.dtype)).to(wide(x.dtype))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    if not wants_grad(x, weight):
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _Norm.apply(x, weight, eps)
    return out


def head_norm(q_THD: Tensor, eps: float) -> Tensor:
    """As the reference, in FP32 whatever the carrier."""
    if not wants_grad(q_THD):
        return reference.head_norm(q_THD, eps)
    out: Tensor = _Norm.apply(q_THD, None, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """As the reference."""
    if not wants_grad(x):
        return reference.rotate(x, cos, sin, inverse=inverse)
    turn = torch.complex(cos, -sin if inverse else sin).to(wide(x.dtype).to_complex())
    out: Tensor = _Turn.apply(x, turn.view(len(x), *(1,) * (x.dim() - 2), -1))
    return out


class _Norm(torch.autograd.Function):
    """x * r * weight with r = rsqrt(mean(x^2) + eps); dx = r (g - x r^2 mean(g x)), g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        r = torch.empty((*x.shape[:-1], 1), dtype=wide(x.dtype), device=x.device)
        for c in shares(x):
            x32 = x[c].to(r.dtype)
            square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_()
            torch.rsqrt(square.div_(x.shape[-1]).add_(eps), out=r[c])
            y = x32 * r[c]
            out[c] = y if weight is None else y.mul_(weight)
        ctx.save_for_backward(x, weight, r)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dweight = None if weight is None else torch.zeros_like(weight)
        for c in shares(x):
            x32, g = x[c].to(r.dtype), grad[c].to(r.dtype)
            gx = g * x32
            if dweight is not None:
                dweight += (gx * r[c]).flatten(0, -2).sum(0)
                gx.mul_(weight)
            slope = gx.sum(-1, keepdim=True).mul_(r[c].pow(3)).div_(-x.shape[-1])
            g = torch.mul(g, r[c], out=gx)
            dx[c] = (g if weight is None else g.mul_(weight)).addcmul_(x32, slope)
        return dx, dweight, None


class _Turn(torch.autograd.Function):
    """The rotary dims as complex numbers times `turn`; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(x, turn)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turned(grad, turn.conj()), None


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    tail = out[..., -2 * turn.shape[-1] :]
    pairs = tail.to(wide(x.dtype), copy=True, memory_format=torch.contiguous_format).unflatten(-1, (-1, 2))
    torch.view_as_complex(pairs).mul_(turn)
    tail.copy_(pairs.flatten(-2))
    return out
