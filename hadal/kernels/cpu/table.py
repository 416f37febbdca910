"""Table `cpu`: operators of `faithful` mode on a processor, as emitted kernels; what does not fit goes to `fused`.

They take BF16 rows and FP4, FP8 or BF16-exact weights, sum products in FP32 and round where the reference rounds, so
that only the order of summation differs. A row's bits do not depend on the other rows or on the number of threads.

Legend: T tokens, G output groups, E experts, K experts per token, R = T*K rows sorted by expert, d hidden, I width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.kernels.cpu.call import Call, calling, real, row_chunks
from hadal.kernels.cpu.matmul import BLOCK, PANEL, panel_bytes
from hadal.kernels.cpu.panels import Panels, panels_of
from hadal.kernels.fused import moe as fused
from hadal.kernels.fused.grad import wants_grad
from hadal.kernels.numerics import Numerics
from hadal.kernels.reference import dense as reference
from hadal.kernels.reference import moe
from hadal.kernels.reference.dense import Weight
from hadal.quant import PackedWeight, fake_quant_fp8


def linear(x: Tensor, weight: Weight, num: Numerics, *, quantise_input: bool) -> Tensor:
    """As the reference."""
    if num.matmul is not None or not _fits(x, weight):
        return reference.linear(x, weight, num, quantise_input=quantise_input)
    return _product(x, weight, torch.bfloat16, quantised=quantise_input)


def linear_f32(x: Tensor, weight: Tensor) -> Tensor:
    """As the reference."""
    return _product(x, weight, torch.float32) if _fits(x, weight) else reference.linear_f32(x, weight)


def linear_groups(x_TGI: Tensor, weight: Weight, num: Numerics) -> Tensor:
    """As the reference."""
    count, groups, width = x_TGI.shape
    rank = weight.shape[0] // groups
    if num.matmul is not None or not _fits(x_TGI, weight):
        return reference.linear_groups(x_TGI, weight, num)
    panels = panels_of(weight) if rank % PANEL == 0 else None
    if panels is None:
        parts = zip(x_TGI.unbind(1), _wide(weight).split(rank), strict=True)
        return torch.cat([_dots(x, w) for x, w in parts], dim=1).bfloat16()
    out_TE = torch.empty(count, groups * rank, dtype=torch.bfloat16)
    each = rank // PANEL
    with calling() as call:
        call.product(
            panels.form, "bf16", [(g, *rows) for g in range(groups) for rows in row_chunks(count)],
            call.take(x_TGI.flatten(1), quantised=False), _place(out_TE), panels=each, blocks=panels.blocks,
            weight=panels.address, weight_step=each * panel_bytes(panels.form, panels.blocks), row_step=2 * width,
            out_step=2 * rank,
        )  # fmt: skip
    return out_TE


def affinities(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """As the reference."""
    if not _fits(x_TD, weight_ED):
        return moe.affinities(x_TD, weight_ED)
    logits = linear_f32(x_TD, weight_ED).contiguous()
    scores = F.pad(logits.flatten(), (0, -logits.numel() % 16))
    with calling() as call:
        call.job("affinity", values=scores.data_ptr(), chunks=len(scores) // 16)
    return scores[: logits.numel()].view_as(logits)


def swiglu(
    x: Tensor,
    w1: Weight,
    w2: Weight,
    w3: Weight,
    num: Numerics,
    *,
    limit: float,
    quantise_input: bool,
    weight: Tensor | None,
) -> Tensor:
    """As the reference."""
    fits = num.matmul is None and x.dim() == 2 and _fits(x, w1, w2, w3) and not wants_grad(weight)
    pair = (panels_of(w1, w3), panels_of(w2)) if fits else None
    if pair is None or pair[0] is None or pair[1] is None:
        return fused.swiglu(x, w1, w2, w3, num, limit=limit, quantise_input=quantise_input, weight=weight)
    out = torch.empty(len(x), PANEL * pair[1].count, dtype=torch.bfloat16)
    mixing = None if weight is None else weight.detach().float().contiguous().numpy()
    groups = [(pair[0], pair[1], *rows) for rows in row_chunks(len(x))]
    with calling() as call:
        _experts(call, x, None, mixing, groups, limit, _place(out), quantised=quantise_input)
    return _cut(out, w2.shape[0])


def routed_experts(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w1: Sequence[Weight] | Tensor,
    w2: Sequence[Weight] | Tensor,
    w3: Sequence[Weight] | Tensor,
    num: Numerics,
    limit: float,
) -> Tensor:
    """As the reference."""
    first = [w if isinstance(w, Tensor) else w[0] for w in (w1, w2, w3)]
    groups = None
    if num.matmul is None and _fits(x_TD, *first) and not wants_grad(weights_TK):
        flat_R = ids_TK.numpy().ravel()
        groups = _chosen(np.bincount(flat_R, minlength=len(w1)), w1, w2, w3)
    if groups is None:
        return fused.routed_experts(x_TD, ids_TK, weights_TK, w1, w2, w3, num, limit)
    count, k = ids_TK.shape
    order_R = np.argsort(flat_R, kind="stable")
    slots_R = np.empty_like(order_R)
    slots_R[order_R] = np.arange(len(order_R))
    slots_TK = np.sort(slots_R.reshape(count, k), axis=1)
    mixing_R = weights_TK.detach().float().numpy().ravel()[order_R]
    out_TD = torch.empty(x_TD.shape, dtype=torch.float32)
    with calling() as call:
        values = call.space("values", len(order_R), 2 * x_TD.shape[1])
        _experts(call, x_TD, order_R // k, mixing_R, groups, limit, values, quantised=num.expert_inputs)
        call.job(
            "sum", rows=values[0], row_stride=values[1], slots=call.hold(slots_TK), active=k, out=out_TD.data_ptr(),
            out_stride=4 * out_TD.shape[1], columns=out_TD.shape[1], count=count,
        )  # fmt: skip
    return out_TD


_Group = tuple[Panels, Panels, int, int]  # gate and linear branch, the way back, first row, rows


def _chosen(
    counts: np.ndarray, w1: Sequence[Weight] | Tensor, w2: Sequence[Weight] | Tensor, w3: Sequence[Weight] | Tensor
) -> list[_Group] | None:
    """The rows of every expert that has some; None when a weight has no panels."""
    groups, first = [], 0
    for e in np.flatnonzero(counts).tolist():
        into, back = (_expert(e, w1, w3), _expert(e, w2))
        if into is None or back is None:
            return None
        groups.append((into, back, first, int(counts[e])))
        first += int(counts[e])
    same = len({(into.form, back.form) for into, back, _, _ in groups}) == 1
    return groups if same else None


def _expert(e: int, *stacks: Sequence[Weight] | Tensor) -> Panels | None:
    if all(isinstance(stack, Tensor) for stack in stacks):
        return panels_of(*stacks, index=e)  # type: ignore[arg-type]
    return panels_of(*(stack[e] for stack in stacks))


def _experts(
    call: Call, x_TD: Tensor, index_R: np.ndarray | None, mixing_R: np.ndarray | None, groups: Sequence[_Group],
    limit: float, out: tuple[int, int], *, quantised: bool,
) -> None:  # fmt: skip
    """Append clamped SwiGLUs of the rows in `index_R`, or of all, that end in `out`."""
    into, back = groups[0][:2]
    width, count = back.blocks * BLOCK, sum(group[3] for group in groups)
    rows = call.take(x_TD, quantised=quantised, index=index_R)
    branches, hidden = call.space("branches", count, 4 * width), call.space("hidden", count, 2 * width)
    each = [(group[0].address, *group[2:]) for group in groups]
    call.product(into.form, "bf16", each, rows, branches, panels=into.count, blocks=into.blocks)
    call.job(
        "gate_fp8" if quantised else "gate", rows=branches[0], row_stride=branches[1], out=hidden[0],
        out_stride=hidden[1], columns=width, count=count, mixing=0 if mixing_R is None else call.hold(mixing_R),
        limit=real(limit),
    )  # fmt: skip
    each = [(group[1].address, *group[2:]) for group in groups]
    call.product(back.form, "bf16", each, hidden, out, panels=back.count, blocks=back.blocks)


def _product(x: Tensor, weight: Weight, dtype: torch.dtype, *, quantised: bool = False) -> Tensor:
    """Rows by one matrix, in BF16 or FP32; BF16 rows by a weight of BF16 numbers need no wider product."""
    rows, columns, panels = x.reshape(-1, x.shape[-1]), weight.shape[0], panels_of(weight)
    if panels is None:
        out = _dots(fake_quant_fp8(rows, reference.ACTIVATION_GROUP) if quantised else rows, _wide(weight))
        return out.to(dtype).view(*x.shape[:-1], columns)
    out = torch.empty(len(rows), PANEL * panels.count, dtype=dtype)
    groups = [(panels.address, *span) for span in row_chunks(len(rows))]
    with calling() as call:
        source = call.take(rows, quantised=quantised)
        call.product(
            panels.form, "bf16" if dtype == torch.bfloat16 else "f32", groups, source, _place(out), panels=panels.count,
            blocks=panels.blocks,
        )  # fmt: skip
    return _cut(out, columns).view(*x.shape[:-1], columns)


def _dots(x_RK: Tensor, weight_NK: Tensor) -> Tensor:
    """Rows by a weight in FP32 that has no panels, FP32 [R, N]."""
    x, out = x_RK.contiguous(), torch.empty(len(x_RK), len(weight_NK))
    with calling() as call:
        call.job(
            "dots", rows=x.data_ptr(), row_stride=2 * x.shape[1], weight=weight_NK.data_ptr(), columns=x.shape[1],
            outputs=len(weight_NK), squares=0, out=out.data_ptr(), out_row=4 * out.shape[1], out_column=4, count=len(x),
        )  # fmt: skip
    return out


def _wide(weight: Weight) -> Tensor:
    return (weight.dense() if isinstance(weight, PackedWeight) else weight).float().contiguous()


def _fits(x: Tensor, *weights: Weight) -> bool:
    """Whether the kernels take these rows; `panels_of` judges the weights."""
    usable = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.numel() > 0
    return usable and not x.shape[-1] % 16 and not wants_grad(x, *weights)


def _place(rows: Tensor) -> tuple[int, int]:
    return rows.data_ptr(), rows.stride(0) * rows.element_size()


def _cut(rows: Tensor, columns: int) -> Tensor:
    """The real columns of rows that fill whole panels."""
    return rows if rows.shape[1] == columns else rows[:, :columns].contiguous()
