"""Projections, norms, rotations: the operators applied to every token on its own, in plain torch.

Legend: T tokens, H heads, D head dim, R rotary dims, G output groups, I width of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.numerics import Numerics
from hadal.quant import PackedWeight, fake_quant_fp8

ACTIVATION_GROUP = 128  # FP8 scale group along K of a quantised projection's input

Weight = Tensor | PackedWeight


def linear(x: Tensor, weight: Weight, num: Numerics, *, quantise_input: bool) -> Tensor:
    """`x @ weight.T` in the carrier; `quantise_input` rounds x to FP8 first, as the official FP8/FP4 GEMM does.

    Scales are powers of two, so the dequantised product equals the scaled FP8 product up to the order of summation
    (spec: architecture 2.9).
    """
    if quantise_input:
        x = fake_quant_fp8(x, ACTIVATION_GROUP)
    if isinstance(weight, PackedWeight):
        weight = weight.dense(x.dtype)
    if num.matmul is not None:
        return F.linear(x.to(num.matmul), weight.to(num.matmul)).to(x.dtype)
    return F.linear(x, weight)


def linear_groups(x_TGI: Tensor, weight: Weight, num: Numerics) -> Tensor:
    """Each group of columns by its own share of the weight's rows [G * rank, I] -> [T, G * rank], in the carrier.

    The official code does not quantise this input.
    """
    groups, width = x_TGI.shape[1:]
    dense = weight.dense(x_TGI.dtype) if isinstance(weight, PackedWeight) else weight
    weight_GRI = dense.view(groups, -1, width)
    if num.matmul is None:
        return torch.bmm(x_TGI.transpose(0, 1), weight_GRI.transpose(1, 2)).transpose(0, 1).flatten(1)
    # Apart, because one strided product of all would copy x in a slow way.
    sides = zip(x_TGI.to(num.matmul).unbind(1), weight_GRI.to(num.matmul).unbind(0), strict=True)
    return torch.cat([part @ w.T for part, w in sides], dim=1).to(x_TGI.dtype)


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """FP32 product for the parts that keep FP32 in every mode: compressor, gate, head, mHC maps."""
    return F.linear(x.float(), weight.float())


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dim in FP32 with one cast back to x's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def head_norm(q_THD: Tensor, eps: float) -> Tensor:
    """Weight-free RMS norm of each query head; every step stays in the carrier, as in the official code."""
    return q_THD * torch.rsqrt(q_THD.square().mean(-1, keepdim=True) + eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last R dims of x [T, ..., D] in interleaved pairs by cos/sin [T, R/2]; FP32 inside, one cast back."""
    rotary = 2 * cos.shape[-1]
    head, tail = x[..., :-rotary], x[..., -rotary:].float()
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[1],)
    cos, sin = cos.view(shape), sin.view(shape)
    if inverse:
        sin = -sin
    even, odd = tail[..., 0::2], tail[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((head, turned.to(x.dtype)), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of the last dim (a power of two): FP32 butterfly, one rounding."""
    size = x.shape[-1]
    y = x.float()
    step = 1
    while step < size:
        pairs = y.unflatten(-1, (-1, 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        step *= 2
    out: Tensor = (y * size**-0.5).to(x.dtype)
    return out


def quantise_kv(kv: Tensor, rotary: int) -> Tensor:
    """FP8 fake-quantise the non-rotary dims of a KV entry in groups of 64; rotary dims stay in the carrier."""
    return torch.cat((fake_quant_fp8(kv[..., :-rotary], 64), kv[..., -rotary:]), dim=-1)
