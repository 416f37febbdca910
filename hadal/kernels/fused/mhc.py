"""Hyper-connections with gradients of their own: each pass over the streams is one product into its result.

Legend: T tokens, N streams, d hidden, M rows of `fn`. Source: report 2.2, spec architecture 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hadal.kernels.fused.grad import shares, wants_grad
from hadal.kernels.reference import mhc as reference


def stream_maps(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    if not wants_grad(x_TND, fn, base, scale):
        return reference.stream_maps(x_TND, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    n = x_TND.shape[1]
    m = _Project.apply(x_TND, fn, norm_eps)
    m = torch.addcmul(base, m, scale.repeat_interleave(torch.tensor([n, n, n * n], device=scale.device)))
    gates, logits = m[:, : 2 * n].sigmoid().view(-1, 2, n), m[:, 2 * n :]
    comb = _Sinkhorn.apply(logits.reshape(-1, n, n), iterations, eps)
    return gates[:, 0] + eps, 2 * gates[:, 1], comb


def mix_in(x_TND: Tensor, pre_TN: Tensor) -> Tensor:
    """As the reference."""
    if not wants_grad(x_TND, pre_TN):
        return reference.mix_in(x_TND, pre_TN)
    out: Tensor = _MixIn.apply(x_TND, pre_TN)
    return out


def mix_out(x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """As the reference."""
    if not wants_grad(x_TND, y_TD, post_TN, comb_TNN):
        return reference.mix_out(x_TND, y_TD, post_TN, comb_TNN)
    out: Tensor = _MixOut.apply(x_TND, y_TD, post_TN, comb_TNN)
    return out


class _Project(torch.autograd.Function):
    """(x fn^T) r with r the inverse RMS of a token's streams, [T, M]."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, fn: Tensor, eps: float) -> Tensor:
        r = torch.empty(len(x_TND), 1, dtype=fn.dtype, device=fn.device)
        out = torch.empty(len(x_TND), len(fn), dtype=fn.dtype, device=fn.device)
        for c in shares(x_TND):
            x = x_TND[c].flatten(1).to(fn.dtype)
            r[c] = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_() / x.shape[-1] + eps)
            out[c] = (x @ fn.T).mul_(r[c])
        ctx.save_for_backward(x_TND, fn, r, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TM: Tensor) -> tuple[Tensor, Tensor, None]:
        x_TND, fn, r, out = ctx.saved_tensors
        slope = (grad_TM * out).sum(-1, keepdim=True).mul_(r.square()).div_(-fn.shape[1])
        grad = grad_TM * r
        dx, dfn = torch.empty_like(x_TND), torch.zeros_like(fn)
        for c in shares(x_TND):
            x = x_TND[c].flatten(1).to(fn.dtype)
            dfn.addmm_(grad[c].T, x)
            dx[c] = torch.mul(x, slope[c]).addmm_(grad[c], fn).view_as(dx[c])
        return dx, dfn, None


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


class _MixIn(torch.autograd.Function):
    """sum_j pre[j] X[j]."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, pre_TN: Tensor) -> Tensor:
        ctx.save_for_backward(x_TND, pre_TN)
        out = x_TND.new_empty(len(x_TND), x_TND.shape[2])
        for c in shares(x_TND):
            out[c] = torch.bmm(pre_TN[c].unsqueeze(1), x_TND[c].to(pre_TN.dtype)).squeeze(1)
        return out

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TND, pre_TN = ctx.saved_tensors
        dx, dpre = torch.empty_like(x_TND), torch.empty_like(pre_TN)
        for c in shares(x_TND):
            grad = grad_TD[c].to(pre_TN.dtype).unsqueeze(1)
            dx[c] = pre_TN[c].unsqueeze(2) * grad
            dpre[c] = torch.bmm(grad, x_TND[c].to(pre_TN.dtype).transpose(1, 2)).squeeze(1)
        return dx, dpre


class _MixOut(torch.autograd.Function):
    """X'[k] = post[k] y + sum_j comb[j, k] X[j]."""

    @staticmethod
    def forward(ctx: Any, x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
        ctx.save_for_backward(x_TND, y_TD, post_TN, comb_TNN)
        out, sums = torch.empty_like(x_TND), post_TN.dtype
        for c in shares(x_TND):
            mixed = torch.bmm(comb_TNN[c].transpose(1, 2), x_TND[c].to(sums))
            out[c] = mixed.addcmul_(post_TN[c].unsqueeze(2), y_TD[c].to(sums).unsqueeze(1))
        return out

    @staticmethod
    def backward(ctx: Any, grad_TND: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x_TND, y_TD, post_TN, comb_TNN = ctx.saved_tensors
        dx, dy, dpost, dcomb = (torch.empty_like(v) for v in ctx.saved_tensors)
        for c in shares(x_TND):
            x, y, grad = (v[c].to(post_TN.dtype) for v in (x_TND, y_TD, grad_TND))
            dx[c] = torch.bmm(comb_TNN[c], grad)
            dy[c] = torch.bmm(post_TN[c].unsqueeze(1), grad).squeeze(1)
            dpost[c] = torch.bmm(y.unsqueeze(1), grad.transpose(1, 2)).squeeze(1)
            dcomb[c] = torch.bmm(x, grad.transpose(1, 2))
        return dx, dy, dpost, dcomb
