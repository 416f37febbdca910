"""Attention over [window | compressed entries] with a sink, for one span of tokens of one sequence.

Two forms compute the same function. `attend` walks over query chunks and multiplies whole key ranges, so memory grows
with the span and never with span x context. `attend_listed` gathers each query's own key list and rounds exactly
where the official kernel does (online softmax over blocks of 64 list entries, P rounded to BF16 against the running
maximum).

Legend: T query tokens of the span, H heads, D head dim, K window rows (history then span), C compressed entries
visible to the span's last token, L list slots. Source: report 2.3.3, spec architecture 2.5-2.7.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hadal.kernels.keys import Attended, IndexerLoss, IndexQuery
from hadal.kernels.numerics import Numerics
from hadal.kernels.reference.compress import index_scores, order_topk, select_topk

CHUNK = 128  # queries per chunk
CHUNK_LOGITS = 1 << 24  # upper bound of logits held at once
GATHER_FACTOR = 4  # gather selected entries once there are this many times more than the indexer keeps
LISTED_VALUES = {"cpu": 1 << 21}  # gathered values held at once: few enough to stay in a processor's cache
LIST_BLOCK = 64  # list entries per step of the official online softmax


def attend(q_THD: Tensor, keys: Attended, sink_H: Tensor, num: Numerics, loss: IndexerLoss | None = None) -> Tensor:
    """Attention output [T, H, D] before the inverse rotation; `loss` collects the indexer objective when given."""
    total, heads, _ = q_THD.shape
    span = keys.window_KD.shape[0] if keys.full_block else CHUNK + keys.window
    n_entries = keys.entries_CD.shape[0] if keys.entries_CD is not None else 0
    chunk = max(1, min(CHUNK, total, CHUNK_LOGITS // (heads * (span + n_entries))))
    out = [_attend_chunk(q_THD, keys, sink_H, num, a, min(a + chunk, total), loss) for a in range(0, total, chunk)]
    return out[0] if len(out) == 1 else torch.cat(out)


def _attend_chunk(
    q_THD: Tensor, keys: Attended, sink_H: Tensor, num: Numerics, a: int, b: int, loss: IndexerLoss | None
) -> Tensor:
    _, heads, dim = q_THD.shape
    device = q_THD.device
    scale = dim**-0.5
    low, high = (0, keys.window_KD.shape[0]) if keys.full_block else _band(keys, a, b)
    window = keys.window_KD[low:high]
    parts = [window]
    position = torch.arange(keys.start + a, keys.start + b, device=device)
    row = torch.arange(keys.start - keys.history + low, keys.start - keys.history + high, device=device)
    age = position.unsqueeze(1) - row
    hidden = torch.zeros_like(age, dtype=torch.bool) if keys.full_block else (age < 0) | (age >= keys.window)

    visible = (keys.start + b) // keys.ratio if keys.ratio else 0
    gathered = scores = None
    if visible:
        assert keys.entries_CD is not None
        chosen = (position.unsqueeze(1) + 1) // keys.ratio > torch.arange(visible, device=device)
        if keys.index is not None and (visible > keys.index.topk or loss is not None):
            scores = _chunk_scores(keys.index, position, keys.ratio, visible, a, b)
            if visible > keys.index.topk:
                chosen = select_topk(scores, keys.index.topk)
                if visible > GATHER_FACTOR * keys.index.topk and loss is None:
                    # all True entries come first in any order; the rest is masked below
                    kept, where = torch.topk(chosen.to(torch.int8), keys.index.topk, dim=-1)
                    gathered, chosen = keys.entries_CD[where], kept.bool()
        if gathered is None:
            parts.append(keys.entries_CD[:visible])
        hidden = torch.cat((hidden, ~chosen), dim=1)

    q = q_THD[a:b]
    kv = parts[0] if len(parts) == 1 else torch.cat(parts)
    q_rows, kv = _matmul_type(q.reshape(-1, dim), num), _matmul_type(kv, num)
    logits = (q_rows @ kv.T).view(b - a, heads, -1).float()
    if gathered is not None:
        gathered = _matmul_type(gathered, num)
        far = torch.bmm(q_rows.view(b - a, heads, dim), gathered.transpose(1, 2))
        logits = torch.cat((logits, far.float()), dim=-1)
    bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
    sink = sink_H.float().view(1, heads, 1).expand(b - a, heads, 1)
    p = torch.softmax(torch.cat((logits * scale + bias.unsqueeze(1), sink), dim=-1), dim=-1)[..., :-1]
    if loss is not None and scores is not None:
        add_indexer_loss(loss, p[..., high - low :].detach(), scores, chosen)
    p = p.to(kv.dtype)
    near = kv.shape[0]
    out = (p[..., :near].reshape(-1, near) @ kv).view(b - a, heads, dim)
    if gathered is not None:
        out = out + torch.bmm(p[..., near:], gathered)
    return out.to(q_THD.dtype)


def _matmul_type(x: Tensor, num: Numerics) -> Tensor:
    return x if num.matmul is None else x.to(num.matmul)


def _band(keys: Attended, a: int, b: int) -> tuple[int, int]:
    """Window rows that any query of [a, b) may see."""
    return max(0, keys.history + a - keys.window + 1), keys.history + b


def _chunk_scores(index: IndexQuery, position: Tensor, ratio: int, visible: int, a: int, b: int) -> Tensor:
    return index_scores(index.q_THD[a:b], index.weight_TH[a:b], index.keys_CD[:visible], (position + 1) // ratio)


def add_indexer_loss(loss: IndexerLoss, p_THC: Tensor, scores_TC: Tensor, chosen_TC: Tensor) -> None:
    """KL(attention over the chosen entries || softmax of the index scores), summed over queries that see an entry.

    The attention probabilities keep window keys and sink in their denominators, so a head that looks elsewhere counts
    little. Rows are selected before log-softmax: a row of -inf alone would give NaN gradients.
    """
    rows = chosen_TC.any(-1)
    if not bool(rows.any()):
        return
    chosen = chosen_TC[rows]
    hidden = ~chosen
    mass = p_THC.sum(1)[rows].masked_fill(hidden, 0.0)
    teacher = mass / mass.sum(-1, keepdim=True).clamp(min=1e-20)
    log_student = torch.log_softmax(scores_TC[rows].float().masked_fill(hidden, float("-inf")), dim=-1)
    log_teacher = teacher.clamp(min=1e-20).log()
    gap = (log_teacher - log_student).masked_fill(hidden, 0.0)
    count = chosen.sum(-1, keepdim=True).float()
    loss.kl.append((teacher * gap).sum())
    loss.uniform.append((teacher * (log_teacher + count.log())).sum())
    loss.queries += int(rows.sum())


def attend_listed(q_THD: Tensor, keys: Attended, sink_H: Tensor) -> Tensor:
    """As `attend`, with the official kernel's rounding; each query's list is its window in order, then its entries."""
    total, heads, dim = q_THD.shape
    slots = keys.window_KD.shape[0] if keys.full_block else keys.window
    listed = keys.entries_CD.shape[0] if keys.entries_CD is not None else 0
    if keys.index is not None:
        listed = min(listed, keys.index.topk)
    room = LISTED_VALUES.get(q_THD.device.type, CHUNK_LOGITS)
    chunk = max(1, min(CHUNK, total, room // ((slots + listed) * max(dim, heads))))
    out = [_attend_listed_chunk(q_THD, keys, sink_H, a, min(a + chunk, total)) for a in range(0, total, chunk)]
    return torch.cat(out)


def _attend_listed_chunk(q_THD: Tensor, keys: Attended, sink_H: Tensor, a: int, b: int) -> Tensor:
    dim = q_THD.shape[-1]
    kv, valid = _listed_keys(keys, a, b, q_THD.device)
    q = q_THD[a:b].float()
    peak = torch.full(q.shape[:2], float("-inf"), device=q.device)
    total = torch.zeros_like(peak)
    acc = torch.zeros_like(q)
    for begin in range(0, kv.shape[1], LIST_BLOCK):
        kv_block, valid_block = kv[:, begin : begin + LIST_BLOCK], valid[:, begin : begin + LIST_BLOCK]
        logits = torch.bmm(q, kv_block.transpose(1, 2)) * dim**-0.5
        logits = logits.masked_fill(~valid_block.unsqueeze(1), float("-inf"))
        new_peak = torch.maximum(peak, logits.amax(-1))
        p = torch.exp(logits - new_peak.unsqueeze(-1))
        shrink = torch.exp(peak - new_peak)
        total = total * shrink + p.sum(-1)
        acc = acc * shrink.unsqueeze(-1) + torch.bmm(p.to(q_THD.dtype).float(), kv_block)
        peak = new_peak
    total = total + torch.exp(sink_H.float() - peak)
    return (acc / total.unsqueeze(-1)).to(q_THD.dtype)


def _listed_keys(keys: Attended, a: int, b: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query's own keys [b-a, L, D] in FP32 and which slots hold one; the first 64 slots always hold one."""
    rows = keys.window_KD.shape[0]
    if keys.full_block:
        where = torch.arange(rows, device=device).expand(b - a, rows)
        return keys.window_KD[where].float(), torch.ones_like(where, dtype=torch.bool)
    position = torch.arange(keys.start + a, keys.start + b, device=device).unsqueeze(1)
    slot = (position - keys.window + 1).clamp(min=0) + torch.arange(keys.window, device=device)
    row = slot - (keys.start - keys.history)
    valid = (slot <= position) & (row >= 0)
    kv = keys.window_KD[row.clamp(0, rows - 1)]
    visible = (keys.start + b) // keys.ratio if keys.ratio else 0
    if visible:
        assert keys.entries_CD is not None
        if keys.index is not None:
            scores = _chunk_scores(keys.index, position.squeeze(1), keys.ratio, visible, a, b)
            entry = order_topk(scores, keys.index.topk)
        else:
            entry = torch.arange(visible, device=device).expand(b - a, visible)
            entry = entry.masked_fill(entry >= (position + 1) // keys.ratio, -1)
        kv = torch.cat((kv, keys.entries_CD[entry.clamp(min=0)]), dim=1)
        valid = torch.cat((valid, entry >= 0), dim=1)
    return kv.float(), valid
