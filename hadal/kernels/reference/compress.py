"""Pooling of token blocks into compressed entries, and the lightning indexer's scores and exact top-k.

Legend: T tokens, R buffer rows (carried tail then new tokens), B completed blocks, r block length, C entries, D dim,
H indexer heads. Source: report 2.3, spec architecture 2.4-2.6.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.kernels.numerics import Numerics
from hadal.kernels.reference.dense import hadamard
from hadal.quant import fake_quant_fp4


def pool_blocks(
    kv_RE: Tensor, score_RE: Tensor, rows_Br: Tensor, previous_Br: Tensor | None, has_previous_B: Tensor | None
) -> Tensor:
    """Pool each block by a per-channel softmax over its slots, in FP32 -> [B, D].

    With `previous_Br` (overlap, E = 2D) entry i pools the first half of block i-1's channels and the second half of
    block i's; blocks without a predecessor see score -inf there.
    """
    if previous_Br is None:
        kv, score = kv_RE[rows_Br], score_RE[rows_Br]
    else:
        assert has_previous_B is not None
        dim = kv_RE.shape[1] // 2
        missing = ~has_previous_B[:, None, None]
        old_score = score_RE[:, :dim][previous_Br].masked_fill(missing, float("-inf"))
        old_kv = kv_RE[:, :dim][previous_Br].masked_fill(missing, 0.0)
        kv = torch.cat((old_kv, kv_RE[:, dim:][rows_Br]), dim=1)
        score = torch.cat((old_score, score_RE[:, dim:][rows_Br]), dim=1)
    return (torch.softmax(score, dim=1) * kv).sum(1)


def encode_index(x: Tensor, num: Numerics) -> Tensor:
    """Index queries or keys as they are compared: rotated by Hadamard and rounded to FP4, or as they are.

    The rotation is orthonormal, so without the rounding it changes nothing and is left out.
    """
    return fake_quant_fp4(hadamard(x)) if num.fake_quant else x


def index_scores(q_THD: Tensor, weight_TH: Tensor, keys_CD: Tensor, first_visible_T: Tensor) -> Tensor:
    """Indexer scores [T, C] with entries j >= first_visible (not yet complete at that token) set to -inf.

    sum_h w[t,h] relu(q[t,h] . k[j]); every product is rounded to the carrier, the head sum accumulates in FP32.
    """
    t, h, d = q_THD.shape
    dots = torch.relu(q_THD.reshape(t * h, d) @ keys_CD.T).view(t, h, -1)
    scores = (dots * weight_TH.unsqueeze(-1)).sum(1)
    hidden = torch.arange(keys_CD.shape[0], device=keys_CD.device) >= first_visible_T.unsqueeze(-1)
    return scores.masked_fill(hidden, float("-inf"))


def select_topk(scores_TC: Tensor, k: int) -> Tensor:
    """Boolean mask [T, C] of the k largest finite scores per row; equal scores go to the lower index."""
    if scores_TC.shape[1] <= k:
        return scores_TC > float("-inf")
    kth = torch.topk(scores_TC, k, dim=-1, sorted=True).values[:, -1:]
    above = scores_TC > kth
    equal = scores_TC == kth
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen & (scores_TC > float("-inf"))


def order_topk(scores_TC: Tensor, k: int) -> Tensor:
    """Entry indices [T, min(k, C)] by falling score, ties to the lower index, -1 where nothing is left."""
    values, order = torch.sort(scores_TC, dim=-1, descending=True, stable=True)
    return order[:, :k].masked_fill(values[:, :k] == float("-inf"), -1)
