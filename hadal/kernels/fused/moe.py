"""Experts with a gradient of their own: tokens sorted once, one product per expert into shared buffers.

Legend: T tokens, K experts per token, R = T*K rows sorted by expert, E experts, d hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.fused.grad import wants_grad, wide
from hadal.kernels.numerics import Numerics
from hadal.kernels.reference import moe as reference
from hadal.kernels.reference.dense import Weight

ROWS = 512  # rows of one product, so that what lies between two products stays in cache


def swiglu(
    x: Tensor, w1: Weight, w2: Weight, w3: Weight, num: Numerics, *, limit: float, quantise_input: bool,
    weight: Tensor | None,
) -> Tensor:  # fmt: skip
    """As the reference."""
    if quantise_input or not (_plain(w1, w2, w3) and wants_grad(x, weight, w1, w2, w3)):
        return reference.swiglu(x, w1, w2, w3, num, limit=limit, quantise_input=quantise_input, weight=weight)
    stacks = [w.unsqueeze(0) for w in (w1, w2, w3) if isinstance(w, Tensor)]
    rows = torch.arange(len(x), device=x.device)
    out: Tensor = _Swiglu.apply(x, rows, weight, *stacks, [len(x)], limit, num.matmul or x.dtype)
    return out.to(x.dtype)


def routed_experts(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, w1: Sequence[Weight] | Tensor, w2: Sequence[Weight] | Tensor,
    w3: Sequence[Weight] | Tensor, num: Numerics, limit: float,
) -> Tensor:  # fmt: skip
    """As the reference."""
    if num.expert_inputs or not (_plain(w1, w2, w3) and wants_grad(x_TD, weights_TK, w1, w2, w3)):
        return reference.routed_experts(x_TD, ids_TK, weights_TK, w1, w2, w3, num, limit)
    flat = ids_TK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=len(w1)).tolist()
    tokens_R = order // ids_TK.shape[1]
    mixing = weights_TK.reshape(-1)[order].unsqueeze(-1)
    out: Tensor = _Swiglu.apply(x_TD, tokens_R, mixing, w1, w2, w3, counts, limit, num.matmul or x_TD.dtype)
    return out


def _plain(*weights: Any) -> bool:
    return all(isinstance(w, Tensor) for w in weights)


class _Swiglu(torch.autograd.Function):
    """Clamped SwiGLU of the named tokens' rows grouped by expert, summed per token.

    Keeps both branches before the clamp and recomputes the rest. Products run in `product`, all else in FP32.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, tokens_R: Tensor, mixing_R1: Tensor | None, w1: Tensor, w2: Tensor, w3: Tensor,
        counts: list[int], limit: float, product: torch.dtype,
    ) -> Tensor:  # fmt: skip
        x, w2p, width = x_TD.to(product), w2.to(product), w1.shape[1]
        w13 = x.new_empty(len(w1), 2 * width, w1.shape[2])
        w13[:, :width], w13[:, width:] = w1, w3
        branches = x.new_empty(sum(counts), w13.shape[1])
        out = torch.zeros_like(x_TD, dtype=wide(x_TD.dtype))
        clipped = []
        for expert, a, b in _groups(counts):
            both = torch.mm(x[tokens_R[a:b]], w13[expert].T, out=branches[a:b])
            clipped.append(a < b and not max(map(abs, map(float, both.aminmax()))) <= limit)
            gate, up = _clamped(both, limit if clipped[-1] else None)
            h = F.silu(gate).mul_(up)
            if mixing_R1 is not None:
                h.mul_(mixing_R1[a:b])
            out.index_add_(0, tokens_R[a:b], (h.to(product) @ w2p[expert].T).to(out.dtype))
        ctx.save_for_backward(x, tokens_R, mixing_R1, w13, w2p, branches)
        ctx.counts, ctx.limit, ctx.clipped = counts, limit, clipped
        ctx.types = x_TD.dtype, w1.dtype, w2.dtype, w3.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x, tokens, mixing, w13, w2, branches = ctx.saved_tensors
        product, width = x.dtype, w2.shape[2]
        grad = grad_TD.to(product)
        dx = torch.zeros_like(x, dtype=wide(x.dtype))
        dmixing = None if mixing is None else torch.empty_like(mixing)
        shapes = w13[:, :width].shape, w2.shape, w13[:, width:].shape
        dw1, dw2, dw3 = (x.new_empty(s, dtype=t) for s, t in zip(shapes, ctx.types[1:], strict=True))
        done = -1
        for (expert, a, b), clipped in zip(_groups(ctx.counts), ctx.clipped, strict=True):
            both, xe, dy = branches[a:b], x[tokens[a:b]], grad[tokens[a:b]]
            gate, up = _clamped(both, ctx.limit if clipped else None)
            h = F.silu(gate)
            dh = (dy @ w2[expert]).to(gate.dtype)
            dboth = torch.empty(both.shape, dtype=gate.dtype, device=x.device)
            dgate, dup = dboth[:, :width], dboth[:, width:]
            torch.mul(dh, h, out=dup)
            if dmixing is not None:
                dmixing[a:b] = (dup * up).sum(-1, keepdim=True)
                dh.mul_(mixing[a:b])
                dup.mul_(mixing[a:b])
            dgate.copy_(torch.ops.aten.silu_backward(dh.mul_(up), gate))
            if clipped:
                dup.masked_fill_(both[:, width:].abs() > ctx.limit, 0.0)
                dgate.masked_fill_(both[:, :width] > ctx.limit, 0.0)
            h.mul_(up)
            if mixing is not None:
                h.mul_(mixing[a:b])
            narrow = dboth.to(product)
            dx.index_add_(0, tokens[a:b], (narrow @ w13[expert]).to(dx.dtype))
            keep = Tensor.add_ if expert == done else Tensor.copy_
            keep(dw2[expert], dy.T @ h.to(product))
            keep(dw1[expert], narrow[:, :width].T @ xe)
            keep(dw3[expert], narrow[:, width:].T @ xe)
            done = expert
        return dx.to(ctx.types[0]), None, dmixing, dw1, dw2, dw3, None, None, None


def _groups(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every product; at least one for each expert."""
    begin = 0
    for expert, count in enumerate(counts):
        for a in range(begin, begin + max(1, count), ROWS):
            yield expert, a, min(a + ROWS, begin + count)
        begin += count


def _clamped(both_R2I: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = both_R2I.to(wide(both_R2I.dtype)).chunk(2, dim=1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))
