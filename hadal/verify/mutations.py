"""Deliberate mistakes, each of which the golden vectors must notice.

Every entry turns the right model into a wrong one, as ports of V4 have been wrong; a mutation that passes means that
the judge is blind to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hadal.config import RopeScaling
from hadal.kernels import Attended, KernelTable, kernel_table
from hadal.model import Model
from hadal.verify.golden import F32_CLOSE_SHARE, F32_MEDIAN, compare, load_golden, replay
from hadal.verify.report import Check

CASE = "u"

Mutation = Callable[[Model], None]


def check_mutations(directory: Path) -> list[Check]:
    """Run every mutation on case u, in the sharpest mode that can show it, on the logits it must move."""
    checks = []
    for name, mode, build in _mutations(directory):
        kind = "mtp_logits_prefill" if name.startswith("MTP") else "logits_prefill"
        golden = load_file(directory / f"golden_{mode}.safetensors")[f"{CASE}.{kind}"]
        row = compare(golden, replay(build(mode), directory, [CASE])[f"{CASE}.{kind}"])
        caught = not row["finite"] or row["median"] > F32_MEDIAN or row["close"] < F32_CLOSE_SHARE
        detail = f"must exceed {F32_MEDIAN:g} or leave fewer than {F32_CLOSE_SHARE:.0%} of positions within 1e-3"
        checks.append(Check(f"mutations {directory.name} {mode}", name, row["median"], None, caught, detail))
    return checks


def _mutations(directory: Path) -> Iterator[tuple[str, str, Callable[[str], Model]]]:
    ops = kernel_table("reference")

    def with_ops(**changes: Any) -> Callable[[str], Model]:
        return lambda mode: load_golden(directory, mode, dataclasses.replace(ops, **changes))

    def with_weights(change: Mutation) -> Callable[[str], Model]:
        def build(mode: str) -> Model:
            model = load_golden(directory, mode)
            with torch.no_grad():
                change(model)
            return model

        return build

    def with_config(**changes: Any) -> Callable[[str], Model]:
        return lambda mode: _rebuilt(load_golden(directory, mode), changes)

    yield (
        "comb transposed",
        "f32",
        with_ops(mix_out=lambda x, y, post, comb: ops.mix_out(x, y, post, comb.transpose(1, 2))),
    )
    yield (
        "post without its factor 2",
        "f32",
        with_ops(mix_out=lambda x, y, post, comb: ops.mix_out(x, y, post / 2, comb)),
    )
    yield "5 Sinkhorn steps for 20", "f32", with_config(hc_sinkhorn_iters=5)
    yield "one RMS per stream", "f32", with_ops(stream_maps=_maps_with_rms_per_stream(ops))
    yield "inverse RoPE missing", "f32", with_ops(rotate=_rotate_forward_only(ops))
    yield "RoPE in halves, not pairs", "f32", with_ops(rotate=_rotate_halves)
    yield "window RoPE base on compressed layers", "f32", with_config(compress_rope_theta=10000.0)
    yield "YaRN off", "f32", with_config(rope_scaling=RopeScaling(factor=1.0))
    yield "shared expert unclamped", "f32", with_ops(swiglu=_unclamped_shared(ops))
    yield "previous and current halves swapped", "f32", with_ops(pool_blocks=_swapped_halves(ops))
    yield "attention sink ignored", "f32", with_weights(_fill("attn_sink", float("-inf")))
    yield "compressor position bias ignored", "f32", with_weights(_fill("ape", 0.0))
    yield "query heads not normed", "f32", with_ops(head_norm=lambda q, eps: q)
    yield "routing weights from biased scores", "f32", with_ops(**_biased_routing(ops))
    yield "routed scale ignored", "f32", with_config(routed_scaling_factor=1.0)
    yield "nibbles of FP4 experts swapped", "f32", with_weights(_swap_columns)
    yield "MTP norms swapped", "f32", with_weights(_swap_mtp_norms)
    yield "newest compressed entry hidden", "f32", with_ops(attend=_newest_hidden(ops))
    yield "index queries and keys not rounded to FP4", "q32", with_ops(encode_index=lambda x, num: x)
    yield "KV not rounded to FP8", "q32", with_ops(quantise_kv=lambda kv, rotary: kv)
    yield "projection inputs not rounded to FP8", "q32", with_ops(linear=_unquantised_linear(ops))


def _rebuilt(model: Model, changes: dict[str, Any]) -> Model:
    """The same weights under a changed configuration."""
    with torch.device("meta"):
        changed = Model(model.config.replace(**changes), model.numerics)
    changed.load_state_dict(model.state_dict(), assign=True)
    return changed


def _fill(suffix: str, value: float) -> Mutation:
    def change(model: Model) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith(suffix):
                parameter.fill_(value)

    return change


def _swap_columns(model: Model) -> None:
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.copy_(parameter.unflatten(-1, (-1, 2)).flip(-1).flatten(-2).clone())


def _swap_mtp_norms(model: Model) -> None:
    block = model.mtp_block
    block.enorm, block.hnorm = block.hnorm, block.enorm


def _newest_hidden(ops: KernelTable) -> Callable[..., Tensor]:
    """A block becomes visible one token late: every query looks as if it stood one position earlier."""

    def attend(q: Tensor, keys: Attended, *args: Any) -> Tensor:
        late = dataclasses.replace(keys, start=keys.start - 1) if keys.ratio else keys
        out: Tensor = ops.attend(q, late, *args)
        return out

    return attend


def _maps_with_rms_per_stream(ops: KernelTable) -> Callable[..., Any]:
    def stream_maps(x_TND: Tensor, *args: Any, norm_eps: float, **kwargs: Any) -> Any:
        x = x_TND * torch.rsqrt(x_TND.square().mean(-1, keepdim=True) + norm_eps)
        return ops.stream_maps(x, *args, norm_eps=norm_eps, **kwargs)

    return stream_maps


def _rotate_forward_only(ops: KernelTable) -> Callable[..., Tensor]:
    return lambda x, cos, sin, inverse=False: x if inverse else ops.rotate(x, cos, sin)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    rotary = 2 * cos.shape[-1]
    shape = (cos.shape[0],) + (1,) * (x.dim() - 2) + (cos.shape[1],)
    cos, sin = cos.view(shape), sin.view(shape) * (-1 if inverse else 1)
    low, high = x[..., -rotary:].float().chunk(2, dim=-1)
    turned = torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)
    return torch.cat((x[..., :-rotary], turned.to(x.dtype)), dim=-1)


def _unclamped_shared(ops: KernelTable) -> Callable[..., Tensor]:
    def swiglu(*args: Any, limit: float, weight: Tensor | None, **kwargs: Any) -> Tensor:
        out: Tensor = ops.swiglu(*args, limit=float("inf") if weight is None else limit, weight=weight, **kwargs)
        return out

    return swiglu


def _swapped_halves(ops: KernelTable) -> Callable[..., Tensor]:
    def pool_blocks(
        kv: Tensor, score: Tensor, rows: Tensor, previous: Tensor | None, has_previous: Tensor | None
    ) -> Tensor:
        if previous is not None:
            kv, score = (torch.cat(t.chunk(2, dim=1)[::-1], dim=1) for t in (kv, score))
        out: Tensor = ops.pool_blocks(kv, score, rows, previous, has_previous)
        return out

    return pool_blocks


def _biased_routing(ops: KernelTable) -> dict[str, Callable[..., Tensor]]:
    """The selection bias also enters the mixing weights; hash layers, which never choose, stay right."""
    biases: list[Tensor] = []

    def choose_experts(scores: Tensor, bias: Tensor, k: int) -> Tensor:
        biases.append(bias)
        out: Tensor = ops.choose_experts(scores, bias, k)
        return out

    def routing_weights(scores: Tensor, ids: Tensor, scale: float) -> Tensor:
        out: Tensor = ops.routing_weights(scores + biases.pop() if biases else scores, ids, scale)
        return out

    return {"choose_experts": choose_experts, "routing_weights": routing_weights}


def _unquantised_linear(ops: KernelTable) -> Callable[..., Tensor]:
    return lambda x, weight, num, quantise_input: ops.linear(x, weight, num, quantise_input=False)
