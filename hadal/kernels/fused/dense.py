"""Norms and rotations with gradients in closed form: a norm keeps one number per row, a rotation turns back.

Legend: T tokens, H heads, D head dim, R rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hadal.kernels.fused.grad import wants_grad, wide
from hadal.kernels.reference import dense as reference


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    if not wants_grad(x, weight):
        return reference.rms_norm(x, weight, eps)
    out: Tensor = _Norm.apply(x, weight, eps)
    return out


def head_norm(q_THD: Tensor, eps: float) -> Tensor:
    """As the reference."""
    if not wants_grad(q_THD) or q_THD.dtype != wide(q_THD.dtype):
        return reference.head_norm(q_THD, eps)
    out: Tensor = _Norm.apply(q_THD, None, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """As the reference."""
    if not wants_grad(x) or x.dtype != wide(x.dtype) or x.shape[-1] % 2:
        return reference.rotate(x, cos, sin, inverse=inverse)
    turn = torch.complex(cos, -sin if inverse else sin).to(x.dtype.to_complex())
    out: Tensor = _Turn.apply(x, turn.view(len(x), *(1,) * (x.dim() - 2), -1))
    return out


class _Norm(torch.autograd.Function):
    """x * r * weight with r = rsqrt(mean(x^2) + eps); dx = r (g - x r^2 mean(g x)), g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        x32 = x.to(wide(x.dtype))
        square = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_()
        r = torch.rsqrt(square / x.shape[-1] + eps)
        ctx.save_for_backward(x, weight, r)
        out = x32 * r
        return (out if weight is None else out.mul_(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, r = ctx.saved_tensors
        x32, grad32 = x.to(r.dtype), grad.to(r.dtype)
        dweight = None
        gx = grad32 * x32
        if weight is not None:
            dweight = (gx * r).flatten(0, -2).sum(0).to(weight.dtype)
            gx.mul_(weight)
        slope = gx.sum(-1, keepdim=True).mul_(r.pow(3)).div_(-x.shape[-1])
        dx = torch.mul(grad32, weight, out=gx).mul_(r) if weight is not None else torch.mul(grad32, r, out=gx)
        return dx.addcmul_(x32, slope).to(x.dtype), dweight, None


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
    torch.view_as_complex(out[..., -2 * turn.shape[-1] :].unflatten(-1, (-1, 2))).mul_(turn)
    return out
