"""Attention with a gradient of its own: only queries, keys and the selection are kept, probabilities are made again.

Both passes walk over the same chunks of queries as large products; nothing of size T x T exists, and the indexer's
objective is differentiated in the forward pass, so its scores are not kept either.

Legend: T query tokens of the span, H heads, D head dim, t queries of a chunk, n keys of a chunk (window rows then
entries), K window rows, C compressed entries. Source: report 2.3.3, training.md 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hadal.kernels.fused.grad import wants_grad, wide
from hadal.kernels.keys import Attended, IndexerLoss
from hadal.kernels.numerics import Numerics
from hadal.kernels.reference import attention as reference
from hadal.kernels.reference.compress import index_scores, select_topk

CHUNK = 128  # queries per chunk; fewer waste less of a window's band, more fill the matrix units
CHUNK_LOGITS = 1 << 18  # logits of a chunk, so that they stay in cache between two products


def attend(q_THD: Tensor, keys: Attended, sink_H: Tensor, num: Numerics, loss: IndexerLoss | None = None) -> Tensor:
    """As the reference."""
    index = keys.index
    learned = (index.q_THD, index.weight_TH, index.keys_CD) if index is not None and loss is not None else ()
    if keys.full_block or not wants_grad(q_THD, keys.window_KD, keys.entries_CD, sink_H, *learned):
        return reference.attend(q_THD, keys, sink_H, num, loss)
    out: Tensor
    out, kl, uniform, queries = _Attention.apply(
        q_THD, keys.window_KD, keys.entries_CD, sink_H, *(learned or (None, None, None)), keys, num.matmul
    )
    if loss is not None and queries:
        loss.kl.append(kl)
        loss.uniform.append(uniform)
        loss.queries += queries
    return out


class _Chunk:
    """One chunk [a, b) of queries: its band of window rows [low, high), its entries [0, visible), which are hidden."""

    def __init__(self, keys: Attended, a: int, b: int, device: torch.device) -> None:
        self.a, self.b = a, b
        self.low, self.high = max(0, keys.history + a - keys.window + 1), keys.history + b
        self.visible = (keys.start + b) // keys.ratio if keys.ratio else 0
        self.position = torch.arange(keys.start + a, keys.start + b, device=device).unsqueeze(1)
        row = torch.arange(self.low, self.high, device=device) + (keys.start - keys.history)
        age = self.position - row
        self.outside = (age < 0) | (age >= keys.window)
        entry = torch.arange(self.visible, device=device)
        self.complete = (self.position + 1) // keys.ratio > entry if self.visible else None

    def rows(self, window_KD: Tensor, entries_CD: Tensor | None) -> Tensor:
        """[n, D], keys and values."""
        band = window_KD[self.low : self.high]
        return band if entries_CD is None else torch.cat((band, entries_CD[: self.visible]))

    def index_rows(self, q_THD: Tensor, weight_TH: Tensor, keys_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The indexer's queries, weights and keys that the chunk needs."""
        return q_THD[self.a : self.b], weight_TH[self.a : self.b], keys_CD[: self.visible]

    def hidden(self, chosen_tC: Tensor | None) -> Tensor:
        """[t, n], where a query may not look."""
        return self.outside if chosen_tC is None else torch.cat((self.outside, ~chosen_tC), dim=1)


def _chunks(keys: Attended, total: int, heads: int, device: torch.device) -> Iterator[_Chunk]:
    width = CHUNK + keys.window + (len(keys.entries_CD) if keys.entries_CD is not None else 0)
    size = max(1, min(CHUNK, CHUNK_LOGITS // (heads * width)))
    return (_Chunk(keys, a, min(a + size, total), device) for a in range(0, total, size))


def _probabilities(q_MD: Tensor, kv_nD: Tensor, hidden_tn: Tensor, sink_H: Tensor) -> Tensor:
    """Softmax over [keys | sink], [t, H, n + 1]; M = t * H rows."""
    scale = q_MD.shape[1] ** -0.5
    t, n = hidden_tn.shape
    logits = sink_H.new_empty(t, len(sink_H), n + 1)
    # Added, not filled: a mask that is broadcast over heads takes ten times as long.
    barred = torch.zeros(t, 1, n, dtype=logits.dtype, device=logits.device)
    barred.masked_fill_(hidden_tn.unsqueeze(1), float("-inf"))
    torch.add(barred, (q_MD @ kv_nD.T).view(t, -1, n).to(logits.dtype), alpha=scale, out=logits[..., :n])
    logits[..., n] = sink_H
    return torch.softmax(logits, dim=-1)


class _Attention(torch.autograd.Function):
    """Returns the output, the indexer's summed KL, that of a uniform choice, and the number of queries with a choice.

    Products run in `matmul` or the carrier, softmax and sums over chunks in FP32.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THD: Tensor, window_KD: Tensor, entries_CD: Tensor | None, sink_H: Tensor, index_q: Tensor | None,
        index_weight: Tensor | None, index_keys: Tensor | None, keys: Attended, matmul: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:  # fmt: skip
        total, heads, dim = q_THD.shape
        product, sums = matmul or q_THD.dtype, wide(q_THD.dtype)
        queries = q_THD.to(product)
        window = window_KD.to(product)
        entries = None if entries_CD is None else entries_CD.to(product)
        sink = sink_H.to(sums)
        out = torch.empty(q_THD.shape, dtype=product, device=q_THD.device)
        selections: list[Tensor | None] = []
        learned = [x for x in (index_q, index_weight, index_keys) if x is not None]
        index_grads, kept = [torch.zeros_like(x) for x in learned], IndexerLoss()
        for c in _chunks(keys, total, heads, q_THD.device):
            chosen, scores, leaves = c.complete, None, []
            if keys.index is not None and chosen is not None and (learned or c.visible > keys.index.topk):
                # Differentiated here and now, so that no scores are kept; the objective's gradient is only a factor.
                leaves = [
                    x.detach().requires_grad_(bool(learned))
                    for x in c.index_rows(keys.index.q_THD, keys.index.weight_TH, keys.index.keys_CD)
                ]
                with torch.enable_grad():
                    scores = index_scores(leaves[0], leaves[1], leaves[2], (c.position[:, 0] + 1) // keys.ratio)
                if c.visible > keys.index.topk:
                    chosen = select_topk(scores.detach(), keys.index.topk)
            selections.append(chosen)
            kv = c.rows(window, entries)
            p = _probabilities(queries[c.a : c.b].reshape(-1, dim), kv, c.hidden(chosen), sink)[..., :-1]
            torch.mm(p.to(product).view(-1, len(kv)), kv, out=out[c.a : c.b].view(-1, dim))
            if learned and scores is not None and chosen is not None and bool(chosen.any()):
                with torch.enable_grad():
                    reference.add_indexer_loss(kept, p[..., c.high - c.low :], scores, chosen)
                grads = torch.autograd.grad(kept.kl[-1], leaves)
                kept.kl[-1] = kept.kl[-1].detach()
                for summed, grad in zip(c.index_rows(*index_grads), grads, strict=True):
                    summed += grad
        ctx.save_for_backward(queries, window, entries, sink, *index_grads)
        ctx.keys, ctx.selections = keys, selections
        ctx.types = (q_THD.dtype, window_KD.dtype, entries_CD.dtype if entries_CD is not None else None, sink_H.dtype)
        ctx.set_materialize_grads(False)
        kl, uniform = (torch.stack(x).sum() if x else sink.new_zeros(()) for x in (kept.kl, kept.uniform))
        ctx.mark_non_differentiable(uniform)
        return out.to(q_THD.dtype), kl, uniform, kept.queries

    @staticmethod
    def backward(
        ctx: Any, dout: Tensor | None, dkl: Tensor | None, _uniform: None, _queries: None
    ) -> tuple[Tensor | None, ...]:
        queries, window, entries, sink, *index_grads = ctx.saved_tensors
        learned = tuple(g * dkl for g in index_grads) if index_grads and dkl is not None else (None, None, None)
        if dout is None or not any(ctx.needs_input_grad[:4]):
            return None, None, None, None, *learned, None, None
        total, heads, dim = queries.shape
        product, sums = queries.dtype, sink.dtype
        dq = torch.empty(queries.shape, dtype=product, device=queries.device)
        dwindow = torch.zeros(window.shape, dtype=sums, device=queries.device)
        seen = ctx.keys.ratio and ctx.keys.start + total >= ctx.keys.ratio  # else no gradient, not one of zeros
        dentries = torch.zeros(entries.shape, dtype=sums, device=queries.device) if seen else None
        dsink = torch.zeros_like(sink)
        for c, chosen in zip(_chunks(ctx.keys, total, heads, queries.device), ctx.selections, strict=True):
            kv = c.rows(window, entries)
            q, do = queries[c.a : c.b].reshape(-1, dim), dout[c.a : c.b].to(product).reshape(-1, dim)
            p = _probabilities(q, kv, c.hidden(chosen), sink)
            dp = torch.zeros_like(p)
            dp[..., :-1] = (do @ kv.T).view(-1, heads, len(kv))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
            dsink += ds[..., -1].sum(0)
            narrow_p, narrow_ds = (v[..., :-1].to(product).view(-1, len(kv)) for v in (p, ds.mul_(dim**-0.5)))
            torch.mm(narrow_ds, kv, out=dq[c.a : c.b].view(-1, dim))
            dkv = (narrow_p.T @ do).addmm_(narrow_ds.T, q)  # a key is its own value
            dwindow[c.low : c.high] += dkv[: c.high - c.low]
            if dentries is not None:
                dentries[: c.visible] += dkv[c.high - c.low :]
        narrow = None if dentries is None else dentries.to(ctx.types[2])
        return dq.to(ctx.types[0]), dwindow.to(ctx.types[1]), narrow, dsink.to(ctx.types[3]), *learned, None, None
