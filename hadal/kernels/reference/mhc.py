"""Manifold-constrained hyper-connections: how a block reads from and writes to the N residual streams.

Legend: T tokens, N streams, d hidden. Source: report 2.2, spec architecture 4; the Sinkhorn order is the code's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.kernels.reference.dense import linear_f32


def sinkhorn(logits_TNN: Tensor, iterations: int, eps: float) -> Tensor:
    """Near doubly stochastic [T, N, N]: row softmax, column step, then (row, column) iterations-1 times."""
    # Tokens last: N is far too short to reduce over, T is what vectorises. A tensor for eps, because adding a Python
    # number costs twice as much and one token does this 39 times per site.
    floor = logits_TNN.new_full((), eps)
    c = torch.softmax(logits_TNN.permute(1, 2, 0).contiguous(), dim=1) + floor
    c = c / (c.sum(0, keepdim=True) + floor)
    for _ in range(iterations - 1):
        c = c / (c.sum(1, keepdim=True) + floor)
        c = c / (c.sum(0, keepdim=True) + floor)
    return c.permute(2, 0, 1).contiguous()


def stream_maps(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mixing maps of one site: pre [T, N], post [T, N], comb [T, N, N] (contract its first index)."""
    n = x_TND.shape[1]
    x = x_TND.flatten(1).float()
    m = linear_f32(x, fn) * _inverse_rms(x, norm_eps)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((m[:, 2 * n :] * scale[2] + base[2 * n :]).view(-1, n, n), iterations, eps)
    return pre, post, comb


def collapse_map(x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """Weights [T, N] with which a head collapses the streams; no Sinkhorn."""
    x = x_TND.flatten(1).float()
    m = linear_f32(x, fn) * _inverse_rms(x, norm_eps)
    return torch.sigmoid(m * scale + base) + eps


def mix_in(x_TND: Tensor, pre_TN: Tensor) -> Tensor:
    """Read the sublayer's input [T, d] from the streams; FP32 sum, one cast."""
    return torch.bmm(pre_TN.unsqueeze(1), x_TND.float()).squeeze(1).to(x_TND.dtype)


def mix_out(x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """Write the sublayer's output back: X'[k] = post[k] y + sum_j comb[j, k] X[j]; FP32, one cast."""
    mixed = torch.bmm(comb_TNN.transpose(1, 2), x_TND.float())
    return torch.baddbmm(mixed, post_TN.unsqueeze(2), y_TD.float().unsqueeze(1)).to(x_TND.dtype)


def _inverse_rms(x_TE: Tensor, eps: float) -> Tensor:
    # The norm is one pass over the widest tensor of the model; squaring it first would be three.
    norm = torch.linalg.vector_norm(x_TE, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square() / x_TE.shape[-1] + eps)
