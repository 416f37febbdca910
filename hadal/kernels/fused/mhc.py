"""Hyper-connections with gradients of their own: each pass over the streams is one product into its result.

Legend: T tokens, N streams, d hidden, M rows of `fn`. Source: report 2.2, spec architecture 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hadal.kernels.fused.grad import wants_grad, wide
from hadal.kernels.reference import mhc as reference


def stream_maps(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    if not (_fits(x_TND) and wants_grad(x_TND, fn, base, scale)):
        return reference.stream_maps(
            x_TND, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps
        )  # fmt: skip
    n = x_TND.shape[1]
    m = _Project.apply(x_TND, fn, norm_eps)
    m = torch.addcmul(base, m, scale.repeat_interleave(torch.tensor([n, n, n * n], device=scale.device)))
    gates, logits = m[:, : 2 * n].sigmoid().view(-1, 2, n), m[:, 2 * n :]
    comb = _Sinkhorn.apply(logits.reshape(-1, n, n), iterations, eps)
    return gates[:, 0] + eps, 2 * gates[:, 1], comb


def mix_out(x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """As the reference."""
    if not (_fits(x_TND) and wants_grad(x_TND, y_TD, post_TN, comb_TNN)):
        return reference.mix_out(x_TND, y_TD, post_TN, comb_TNN)
    out: Tensor = _MixOut.apply(x_TND, y_TD, post_TN, comb_TNN)
    return out


def _fits(x_TND: Tensor) -> bool:
    return x_TND.dtype == wide(x_TND.dtype)


class _Project(torch.autograd.Function):
    """(x fn^T) r with r the inverse RMS of a token's streams, [T, M]."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, fn: Tensor, eps: float) -> Tensor:
        x = x_TND.flatten(1)
        r = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps)
        out = (x @ fn.T).mul_(r)
        ctx.save_for_backward(x_TND, fn, r, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TND, fn, r, out = ctx.saved_tensors
        x = x_TND.flatten(1)
        slope = (grad_TM * out).sum(-1, keepdim=True).mul_(r.square()).div_(-x.shape[-1])
        grad = grad_TM * r
        dx = torch.mul(x, slope).addmm_(grad, fn)
        return dx.view_as(x_TND), grad.T @ x, None


class _Sinkhorn(torch.autograd.Function):
    """Sinkhorn's iteration with tokens last; the backward pass makes the steps again and walks them in reverse.

    A step divides c by s = sum(c) + eps along one axis; with c' its result, dc = (dc' - sum(dc' c')) / s.
    """

    @staticmethod
    def forward(ctx: Any, logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits_TNN)
        ctx.iterations, ctx.eps = iterations, eps
        return reference.sinkhorn(logits_TNN, iterations, eps)

    @staticmethod
    def backward(ctx: Any, grad_TNN: Tensor) -> tuple[Tensor, None, None]:
        (logits_TNN,) = ctx.saved_tensors
        floor = logits_TNN.new_full((), ctx.eps)
        soft = torch.softmax(logits_TNN.permute(1, 2, 0).contiguous(), dim=1)
        axes = [0] + [1, 0] * (ctx.iterations - 1)
        steps = soft.new_empty(len(axes), *soft.shape)
        sums = []
        c = soft + floor
        for axis, step in zip(axes, steps, strict=True):
            sums.append(c.sum(axis, keepdim=True).add_(floor))
            c = torch.div(c, sums[-1], out=step)
        grad = grad_TNN.permute(1, 2, 0).contiguous()
        product = torch.empty_like(grad)
        for axis, step, s in zip(reversed(axes), reversed(steps.unbind()), reversed(sums), strict=True):
            torch.mul(grad, step, out=product)
            grad.sub_(product.sum(axis, keepdim=True)).div_(s)
        dlogits = torch.ops.aten._softmax_backward_data(grad, soft, 1, soft.dtype)
        return dlogits.permute(2, 0, 1), None, None


class _MixOut(torch.autograd.Function):
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
        ctx.save_for_backward(x_TND, y_TD, post_TN, comb_TNN)
        out = torch.bmm(comb_TNN.transpose(1, 2), x_TND)
        return out.addcmul_(post_TN.unsqueeze(2), y_TD.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_TND, y_TD, post_TN, comb_TNN = ctx.saved_tensors
        dx = torch.bmm(comb_TNN, grad_TND)
        dy = torch.bmm(post_TN.unsqueeze(1), grad_TND).squeeze(1)
        dpost = torch.bmm(y_TD.unsqueeze(1), grad_TND.transpose(1, 2)).squeeze(1)
        return dx, dy, dpost, torch.bmm(x_TND, grad_TND.transpose(1, 2))
