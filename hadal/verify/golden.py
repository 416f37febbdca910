"""Golden vectors: replay the recorded cases of a configuration and judge the outputs by its measured noise.

A case feeds tokens[0:P] at once and the next N tokens one by one, teacher forced. Mode `f32` computes in FP32 without
quantisers, `q32` in FP32 with all of them, `ref` rounds as the official BF16 code.

Legend: P prefill, N decode steps, V vocabulary, Q draft block length.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hadal.checkpoint import load_model
from hadal.kernels import KernelTable
from hadal.model import Model
from hadal.verify.report import Check, within

MODES: dict[str, tuple[str, bool]] = {"f32": ("float32", False), "q32": ("float32", True), "ref": ("bfloat16", True)}
CLOSE = 1e-3  # a position counts as equal when no logit differs by more
F32_MEDIAN = 1e-4
F32_CLOSE_SHARE = 0.97
SHORT_CASES = ("t", "u")


def load_golden(directory: Path, mode: str, backend: str | KernelTable = "auto") -> Model:
    """The configuration's model in the numerics of a mode, on the CPU; BF16 with the kernels that a user gets."""
    dtype, fake_quant = MODES[mode]
    return load_model(
        directory / "checkpoint", device="cpu", dtype=dtype, fake_quant=fake_quant, backend=backend,
        weights="auto" if dtype == "bfloat16" else "dense",
    )  # fmt: skip


def case_names(directory: Path) -> list[str]:
    """Cases whose tokens are present."""
    return sorted(k.split(".")[0] for k in load_file(directory / "inputs.safetensors") if k.endswith(".tokens"))


def replay(model: Model, directory: Path, cases: Iterable[str]) -> dict[str, Tensor]:
    """Outputs of the given cases under the names of the golden file."""
    inputs = load_file(directory / "inputs.safetensors")
    plan = json.loads((directory / "noise.json").read_text("utf-8"))["cases"]
    out: dict[str, Tensor] = {}
    for case in cases:
        prefill, steps = plan[case]["prefill"], plan[case]["decode"]
        for name, value in _replay_case(model, inputs[f"{case}.tokens"], prefill, steps).items():
            out[f"{case}.{name}"] = value
    return out


def _replay_case(model: Model, ids_T: Tensor, prefill: int, steps: int) -> dict[str, Tensor]:
    state = model.new_state()
    parts: dict[str, list[Tensor]] = {}

    def feed(start: int, end: int, phase: str) -> None:
        x, taps = model.streams(ids_T[start:end], [end - start], [state])
        parts.setdefault(f"logits_{phase}", []).append(model.head_logits(x))
        if model.config.draft == "mtp":
            mtp = model.mtp_logits(x, ids_T[start + 1 : end + 1], [end - start], [state])
            parts.setdefault(f"mtp_logits_{phase}", []).append(mtp)
        if model.config.draft == "dspark":
            assert taps is not None
            model.dspark_remember(taps, [end - start], [state])

    feed(0, prefill, "prefill")
    for p in range(prefill, prefill + steps):
        feed(p, p + 1, "decode")
        if model.config.draft == "dspark":
            for name, value in _draft_greedily(model, int(ids_T[p + 1]), state).items():
                parts.setdefault(name, []).append(value.unsqueeze(0))
    return {name: torch.cat(values) for name, values in parts.items()}


@torch.no_grad()
def _draft_greedily(model: Model, anchor: int, state: Any) -> dict[str, Tensor]:
    hidden, base = model.dspark_block(anchor, state)
    last = model.dspark_stages[-1]
    ids = [torch.tensor(anchor)]
    confidence = []
    for i in range(len(base)):
        confidence.append(last.confidence_logit(hidden[i], ids[i]))
        ids.append((base[i] + last.markov_bias(ids[i])).argmax())
    return {
        "dspark_ids": torch.stack(ids),
        "dspark_base_logits": base,
        "dspark_confidence_logit": torch.stack(confidence),
    }


def judge(directory: Path, mode: str, out: dict[str, Tensor], cases: Iterable[str]) -> list[Check]:
    """Compare outputs with the golden ones; limits follow the spread measured between harmless variants."""
    golden = load_file(directory / f"golden_{mode}.safetensors")
    measured = json.loads((directory / "noise.json").read_text("utf-8"))["measured"]
    positions = load_file(directory / "inputs.safetensors").get("l.positions")
    group = f"golden {directory.name} {mode}"
    checks, short = [], []
    for name in sorted(golden):
        case, _, kind = name.partition(".")
        if case not in cases or not ("logit" in kind or kind == "dspark_ids"):
            continue
        found = out.get(name)
        if found is None and name.endswith("_at_positions"):
            found = out[name.removesuffix("_at_positions")][positions]
        assert found is not None, f"no output for golden tensor {name}"
        if kind in ("dspark_ids", "dspark_confidence_logit"):
            if mode == "f32":  # elsewhere a greedy chain follows the first token that rounds the other way
                checks.append(_judge_draft(group, name, golden[name], found))
            continue
        row = compare(golden[name], found)
        if case in SHORT_CASES and kind.startswith("logits") and row["rows"] >= 16:
            short.append(row["close"])
        checks.append(_judge_one(group, name, kind, mode, row, measured))
    if mode == "q32" and short:
        worst = 1 - max(short)
        detail = "share of positions off by more than 1e-3 in the better short case"
        checks.append(Check(group, "quantisers exact", worst, 0.5, worst <= 0.5, detail))
    return checks


def _judge_draft(group: str, name: str, golden: Tensor, found: Tensor) -> Check:
    if golden.is_floating_point():
        return within(group, name, float((golden - found).abs().max()), F32_MEDIAN)
    return within(group, name, float((golden != found).double().mean()), 0.0, "share of drafted ids that differ")


def compare(golden: Tensor, found: Tensor) -> dict[str, float]:
    """Per-position differences of two logit tensors [..., V]: median, share within 1e-3, mean KL, top-1 agreement."""
    g, f = golden.double().flatten(0, -2), found.double().flatten(0, -2)
    gap = (g - f).abs().amax(-1)
    log_g, log_f = g.log_softmax(-1), f.log_softmax(-1)
    return {
        "rows": float(len(gap)),
        "median": float(gap.quantile(0.5)),
        "close": float((gap <= CLOSE).double().mean()),
        "kl": float((log_g.exp() * (log_g - log_f)).sum(-1).mean()),
        "top1": float((g.argmax(-1) == f.argmax(-1)).double().mean()),
        "finite": float(bool(torch.isfinite(f).all())),
    }


def _judge_one(group: str, name: str, kind: str, mode: str, row: dict[str, float], measured: dict[str, Any]) -> Check:
    detail = f"KL {row['kl']:.1e}, top-1 {row['top1']:.3f}, within 1e-3 {row['close']:.3f}"
    if mode == "f32":
        ok = row["median"] <= F32_MEDIAN and row["close"] >= F32_CLOSE_SHARE and bool(row["finite"])
        return Check(group, name, row["median"], F32_MEDIAN, ok, detail)
    if row["rows"] < 16:
        ok = bool(row["finite"])
        return Check(group, name, row["median"], None, None if ok else False, "too few rows for a statistical verdict")
    floor = [v for k, v in measured.items() if k.endswith("/ref-vs-q32" if mode == "ref" else "/q32-vs-f32")]
    kl_limit = None
    if kind.startswith("mtp"):
        median, kl_limit = max(m["mtp"][0] for m in floor), max(m["mtp_kl"] for m in floor)
    elif kind.startswith("dspark"):
        median = max(m["dspark_base"][0] for m in floor)
    else:
        median, kl_limit = max(m["maxabs"][0] for m in floor), max(m["kl_mean"] for m in floor)
    limit = 1.6 * median + 0.02
    ok = row["median"] <= limit and bool(row["finite"])
    if kl_limit is not None:
        ok = ok and row["kl"] <= 2.5 * kl_limit + 2e-3
    if kind.startswith("logits") and row["rows"] >= 40:
        ok = ok and row["top1"] >= min(m["top1"] for m in floor) - 0.08
    return Check(group, name, row["median"], limit, ok, detail)
