"""Table `cpu`, what lies between products: norms, hyper-connections, pooling, routing and attention of `faithful` mode.

They take BF16 rows of a multiple of 16 columns and round where the reference rounds; a row's bits do not depend on the
other rows, on how a sequence is cut into calls or on the number of threads. What does not fit goes to `fused`.

Legend: T tokens, N streams, d hidden, H heads, D head dim, K experts per token, B blocks, C entries.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.cpu import listed
from hadal.kernels.cpu.call import Call, calling, real
from hadal.kernels.fused import dense, mhc
from hadal.kernels.fused.grad import wants_grad
from hadal.kernels.keys import Attended
from hadal.kernels.pages import PAGE_TOKENS
from hadal.kernels.reference import attention, compress, moe
from hadal.kernels.reference import mhc as reference_mhc
from hadal.kernels.reference.compress import order_topk
from hadal.kernels.stored import StoredRows

_SCORES = 1 << 22  # index scores held at once


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference."""
    return _normed("norm", x, weight.float().contiguous(), eps) if _fits(x, weight) else dense.rms_norm(x, weight, eps)


def head_norm(q_THD: Tensor, eps: float) -> Tensor:
    """As the reference."""
    return _normed("head_norm", q_THD, None, eps) if _fits(q_THD) else dense.head_norm(q_THD, eps)


def _normed(kernel: str, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    out, columns = torch.empty_like(x), x.shape[-1]
    with calling() as call:
        call.job(
            kernel, rows=x.data_ptr(), row_stride=2 * columns, weight=0 if weight is None else weight.data_ptr(),
            out=out.data_ptr(), out_stride=2 * columns, columns=columns, count=x.numel() // columns, eps=real(eps),
        )  # fmt: skip
    return out


def stream_maps(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iterations: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference."""
    if not _fits(x_TND, fn, base, scale):
        return mhc.stream_maps(x_TND, fn, base, scale, iterations=iterations, eps=eps, norm_eps=norm_eps)
    n = x_TND.shape[1]
    maps_MT = _maps(x_TND, fn, base, scale, iterations, eps, norm_eps)
    pre, post, comb = maps_MT.split((n, n, n * n))
    return pre.T, post.T, comb.unflatten(0, (n, n)).permute(2, 0, 1)


def collapse_map(x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """As the reference."""
    if not _fits(x_TND, fn, base, scale):
        return reference_mhc.collapse_map(x_TND, fn, base, scale, eps=eps, norm_eps=norm_eps)
    return _maps(x_TND, fn, base, scale, 0, eps, norm_eps).T


def _maps(
    x_TND: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iterations: int, eps: float, norm_eps: float
) -> Tensor:
    """The maps [M, T]; without iterations only those of a collapse."""
    count, n, d = x_TND.shape
    x, outputs, lines = x_TND.contiguous(), len(fn), -(-count // 16)
    held = [v.float().contiguous() for v in (fn, base, scale)]
    maps = torch.zeros(outputs + 1, 16 * lines)
    with calling() as call:
        call.job(
            "dots", rows=x.data_ptr(), row_stride=2 * n * d, weight=held[0].data_ptr(), columns=n * d, outputs=outputs,
            squares=1, out=maps.data_ptr(), out_row=4, out_column=64 * lines, count=count,
        )  # fmt: skip
        call.job(
            "maps", products=maps.data_ptr(), stride=64 * lines, base=held[1].data_ptr(), scale=held[2].data_ptr(),
            streams=n, whole=int(iterations > 0), iterations=iterations, width=n * d, lines=lines, eps=real(eps),
            norm_eps=real(norm_eps),
        )  # fmt: skip
    return maps[:outputs, :count]


def mix_in(x_TND: Tensor, pre_TN: Tensor) -> Tensor:
    """As the reference."""
    if not _fits(x_TND, pre_TN):
        return mhc.mix_in(x_TND, pre_TN)
    return _mix(x_TND, pre_TN.unsqueeze(2), None, None).squeeze(1)


def mix_out(x_TND: Tensor, y_TD: Tensor, post_TN: Tensor, comb_TNN: Tensor) -> Tensor:
    """As the reference."""
    if not _fits(x_TND, y_TD, post_TN, comb_TNN):
        return mhc.mix_out(x_TND, y_TD, post_TN, comb_TNN)
    return _mix(x_TND, comb_TNN, y_TD.contiguous(), post_TN)


def _mix(x_TND: Tensor, weights_TNK: Tensor, extra_TD: Tensor | None, extra_weights_TK: Tensor | None) -> Tensor:
    """out[t, k] = sum_n weights[t, n, k] x[t, n] + extra_weights[t, k] extra[t]."""
    x, (count, n, d), targets = x_TND.contiguous(), x_TND.shape, weights_TNK.shape[2]
    out = torch.empty(count, targets, d, dtype=torch.bfloat16)
    row, source, target = (4 * s for s in weights_TNK.stride())
    own = [0, 0, 0, 0]
    if extra_TD is not None and extra_weights_TK is not None:
        own = [extra_TD.data_ptr(), extra_weights_TK.data_ptr(), *(4 * s for s in extra_weights_TK.stride())]
    with calling() as call:
        call.job(
            "mix", streams=x.data_ptr(), stream_stride=2 * n * d, sources=n, weights=weights_TNK.data_ptr(),
            weight_row=row, weight_source=source, weight_target=target, extra=own[0], extra_stride=2 * d,
            extra_weights=own[1], extra_row=own[2], extra_target=own[3], targets=targets, out=out.data_ptr(),
            out_stride=2 * targets * d, columns=d, count=count,
        )  # fmt: skip
    return out


def pool_blocks(
    kv_RE: Tensor, score_RE: Tensor, rows_Br: Tensor, previous_Br: Tensor | None, has_previous_B: Tensor | None
) -> Tensor:
    """As the reference."""
    dim = kv_RE.shape[1] // (1 if previous_Br is None else 2)
    usable = kv_RE.device.type == "cpu" and dim % 16 == 0 and kv_RE.stride() == score_RE.stride()
    if not usable or kv_RE.stride(1) != 1 or not len(rows_Br) or wants_grad(kv_RE, score_RE):
        return compress.pool_blocks(kv_RE, score_RE, rows_Br, previous_Br, has_previous_B)
    slots = rows_Br
    if previous_Br is not None and has_previous_B is not None:
        slots = torch.cat((previous_Br.masked_fill(~has_previous_B.unsqueeze(1), -1), rows_Br), dim=1)
    slots, out = slots.contiguous(), torch.empty(len(slots), dim)
    with calling() as call:
        call.job(
            "pool", kv=kv_RE.data_ptr(), score=score_RE.data_ptr(), stride=4 * kv_RE.stride(0), slots=slots.data_ptr(),
            count=slots.shape[1], split=slots.shape[1] - rows_Br.shape[1], shift=4 * (kv_RE.shape[1] - dim),
            columns=dim, out=out.data_ptr(), out_stride=4 * dim, blocks=len(slots),
        )  # fmt: skip
    return out


def routing_weights(scores_TE: Tensor, ids_TK: Tensor, scale: float) -> Tensor:
    """As the reference, added in the order of the choice."""
    if wants_grad(scores_TE):
        return moe.routing_weights(scores_TE, ids_TK, scale)
    chosen = scores_TE.gather(1, ids_TK)
    total = chosen[:, 0]
    for value in chosen.unbind(1)[1:]:
        total = total + value
    return chosen / total.unsqueeze(1) * scale


def attend_listed(q_THD: Tensor, keys: Attended, sink_H: Tensor) -> Tensor:
    """As the reference."""
    entries, index = keys.entries, keys.index
    if not (_fits(q_THD, keys.window_KD) and _stored(entries) and _stored(index.keys if index else None)):
        return attention.attend_listed(q_THD, keys, sink_H)
    total, heads, dim = q_THD.shape
    q, window = ((F.pad(x, (0, -dim % 32)) if dim % 32 else x).contiguous() for x in (q_THD, keys.window_KD))
    sink = F.pad(sink_H.float(), (0, -heads % listed.HEADS))
    out = torch.empty_like(q)
    chunk = total if index is None else max(1, _SCORES * keys.ratio // (keys.start + total))
    for begin in range(0, total, chunk):
        count = min(chunk, total - begin)
        chosen = _select(keys, begin, count)
        table = _lists(keys, window, begin, count, chosen)
        with calling() as call:
            _attend(call, q[begin : begin + count], table, keys, window, sink, dim**-0.5, out[begin : begin + count])
    return out[..., :dim]


def _attend(
    call: Call, q: Tensor, table: np.ndarray, keys: Attended, window: Tensor, sink: Tensor, scale: float, out: Tensor
) -> None:
    count, heads, dim = q.shape
    panels = -(-heads // listed.HEADS)
    few = count < torch.get_num_threads()
    entries = keys.entries if isinstance(keys.entries, StoredRows) else None
    form = entries.shelf.form if entries else None
    scratch, step = call.space("listed", torch.get_num_threads(), listed.attend_scratch(heads, dim))
    call.job(
        "attend_listed", q=q.data_ptr(), q_stride=2 * heads * dim, table=call.hold(table), count=count,
        split=panels if few else 1, slots=len(window) if keys.full_block else keys.window, key_stride=2 * dim, dim=dim,
        codes=form.dim - form.rotary if form else 0, rotary=form.rotary if form else 0, **_shelf(call, entries),
        sink=sink.data_ptr(), heads=heads, out=out.data_ptr(), out_stride=2 * heads * dim, scale=real(scale),
        scratch=scratch, scratch_step=step,
    )  # fmt: skip


def _lists(keys: Attended, window: Tensor, begin: int, count: int, chosen: Tensor | None) -> np.ndarray:
    """Per query the address of its first window key, how many it has, its list of entries, and their number."""
    position = np.arange(keys.start + begin, keys.start + begin + count)
    table = np.zeros((count, len(listed.ROW)), np.int64)
    if keys.full_block:
        table[:, 0], table[:, 1] = window.data_ptr(), len(window)
        return table
    first = np.maximum(position - keys.window + 1, 0)
    table[:, 0] = window.data_ptr() + (first - (keys.start - keys.history)) * (2 * window.shape[1])
    table[:, 1] = position - first + 1
    if keys.ratio:
        table[:, 3] = (position + 1) // keys.ratio
    if chosen is not None:
        table[:, 2] = chosen.data_ptr() + np.arange(count) * (4 * chosen.shape[1])
        table[:, 3] = np.minimum(table[:, 3], chosen.shape[1])
    return table


def _select(keys: Attended, begin: int, count: int) -> Tensor | None:
    """The entries [count, topk] of each query by falling score, int32; -1 behind the last one."""
    index = keys.index
    if index is None or not isinstance(index.keys, StoredRows) or not index.keys.count:
        return None
    total, (heads, dim) = index.keys.count, index.q_THD.shape[1:]
    q = index.q_THD[begin : begin + count].flatten(0, 1)
    weights = index.weight_TH[begin : begin + count].contiguous()
    scores = torch.empty(count, -(-total // listed.KEYS) * listed.KEYS)
    with calling() as call:
        rows, stride = call.take(q, quantised=False)
        scratch, step = call.space("listed", torch.get_num_threads(), listed.score_scratch(heads, dim))
        call.job(
            "index_scores", q=rows, q_stride=stride, weights=weights.data_ptr(), weight_stride=2 * heads, heads=heads,
            dim=dim, start=keys.start + begin, count=count, ratio=keys.ratio, total=total,
            **_shelf(call, index.keys), scores=scores.data_ptr(), score_stride=4 * scores.shape[1], scratch=scratch,
            scratch_step=step,
        )  # fmt: skip
    return order_topk(scores[:, :total], index.topk).int()


def _shelf(call: Call, stored: StoredRows | None) -> dict[str, int]:
    """Where stored rows lie, as words."""
    if stored is None or not stored.count:
        return {"pages": 0, "offset": 0, "shift": 0, "row_bytes": 0}
    pages = np.array([page.address for page in stored.pages], np.int64)
    shelf = stored.shelf
    shift = (PAGE_TOKENS // shelf.ratio).bit_length() - 1
    return {"pages": call.hold(pages), "offset": shelf.offset, "shift": shift, "row_bytes": shelf.form.nbytes}


def _stored(rows: Tensor | StoredRows | None) -> bool:
    """Whether the kernels read such rows, if there are any."""
    if not isinstance(rows, StoredRows):
        return rows is None
    form, columns = rows.shelf.form, 32 if rows.shelf.form.kind == "fp4" else 16
    whole = form.dim % columns == 0 and form.rotary % columns == 0
    return form.kind != "plain" and form.dtype == torch.bfloat16 and whole and PAGE_TOKENS % rows.shelf.ratio == 0


def _fits(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these rows."""
    usable = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0
    return usable and not x.shape[-1] % 16 and not wants_grad(x, *others)
