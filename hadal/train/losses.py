"""Training losses and the router's balance rule as pure functions of logits, targets and routing records.

Legend: T tokens of a packed micro-batch, V vocabulary, E experts, K experts per token, S documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IGNORED = -100
_ROWS = 32  # rows of logits between two products


def shifted_targets(ids_T: Tensor, counted_T: Tensor, cu_seqlens: Sequence[int], shift: int) -> Tensor:
    """Targets [T]: the id `shift` positions later in the same document where that token is counted, else IGNORED."""
    targets_T = torch.full_like(ids_T, IGNORED)
    for start, end in itertools.pairwise(cu_seqlens):
        if end - start > shift:
            later = ids_T[start + shift : end]
            keep = counted_T[start + shift : end]
            targets_T[start : end - shift] = torch.where(keep, later, torch.full_like(later, IGNORED))
    return targets_T


def head_loss_sum(
    hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, chunk: int = 512, product: torch.dtype | None = None
) -> Tensor:
    """Summed negative log-likelihood in nats of `softmax(hidden @ head.T)` over the targets that are not IGNORED.

    The head is the widest product there is, so logits exist for `chunk` rows at a time and never for ignored rows, and
    gradients are taken in the same pass. Logits are float32; `product` may give the gradients' products a faster type,
    and the logits' product too where `hidden_TD` is of that type.
    """
    rows = (targets_T != IGNORED).nonzero().squeeze(1)
    out: Tensor = _HeadLoss.apply(hidden_TD[rows], head_VD, targets_T[rows], chunk, product or torch.float32)
    return out


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, chunk: int, product: torch.dtype
    ) -> Tensor:
        learn = hidden_TD.requires_grad or head_VD.requires_grad
        head = head_VD.detach().float()
        narrow = head.to(product)
        same = hidden_TD.dtype == product
        hidden = hidden_TD.detach() if same else hidden_TD.detach().float()
        hidden_grad = torch.empty_like(hidden) if learn else None
        head_grad = (torch.empty_like if len(hidden) else torch.zeros_like)(head) if learn else None
        total = head.new_zeros(())
        for start in range(0, len(hidden), chunk):
            h, target = hidden[start : start + chunk], targets_T[start : start + chunk, None]
            logits = h @ (narrow if same else head).T
            gradient = logits if same else torch.empty(logits.shape, dtype=product, device=logits.device)
            for a in range(0, len(h), _ROWS):  # few enough that their passes stay in cache
                few, ids = logits[a : a + _ROWS].float(), target[a : a + _ROWS]
                peak = few.amax(-1, keepdim=True)
                total -= (few.gather(1, ids) - peak).sum()
                mass = few.sub_(peak).exp_().sum(-1, keepdim=True)
                total += mass.log().sum()
                gradient[a : a + _ROWS] = few.div_(mass).scatter_add_(1, ids, -torch.ones_like(mass))
            if hidden_grad is not None and head_grad is not None:
                hidden_grad[start : start + chunk] = gradient @ narrow
                (head_grad.add_ if start else head_grad.copy_)(gradient.T @ h.to(product))
        ctx.save_for_backward(hidden_grad, head_grad)
        ctx.dtypes = hidden_TD.dtype, head_VD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_grad, head_grad = ctx.saved_tensors
        return (hidden_grad * grad).to(ctx.dtypes[0]), (head_grad * grad).to(ctx.dtypes[1]), None, None, None


def count_targets(targets_T: Tensor) -> int:
    """Number of targets that are not IGNORED."""
    return int((targets_T != IGNORED).sum())


def balance_loss(scores_TE: Tensor, ids_TK: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
    """Sequence-wise balance loss of one layer, averaged over documents by their length; 1 when perfectly even.

    Per document: sum over experts of f_i P_i, f_i = E / (K T) * tokens routed to i, P_i = mean share of the score
    (V3 report formula, spec/architecture.md 3). Gradients flow through the scores only.
    """
    tokens, experts = scores_TE.shape
    lengths_S = torch.tensor(cu_seqlens, device=scores_TE.device).diff()
    document_T = torch.repeat_interleave(torch.arange(len(lengths_S), device=scores_TE.device), lengths_S)
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    share_SE = share_TE.new_zeros(len(lengths_S), experts).index_add(0, document_T, share_TE)
    hits_TE = torch.zeros_like(scores_TE).scatter_add_(1, ids_TK, torch.ones_like(ids_TK, dtype=scores_TE.dtype))
    hits_SE = share_TE.new_zeros(len(lengths_S), experts).index_add(0, document_T, hits_TE)
    f_SE = hits_SE * (experts / ids_TK.shape[1]) / lengths_S[:, None]
    per_document_S = (f_SE * share_SE / lengths_S[:, None]).sum(-1)
    return (per_document_S * lengths_S).sum() / tokens


def expert_load(ids_TK: Tensor, experts: int) -> Tensor:
    """Tokens routed to each expert [E], float32."""
    return torch.bincount(ids_TK.reshape(-1), minlength=experts).float()


def update_router_bias(bias_E: Tensor, load_E: Tensor, speed: float) -> None:
    """Move the selection bias in place towards even load: up where below the mean, down where above (report 2.1)."""
    bias_E.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
