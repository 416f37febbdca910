"""Single modules against recorded BF16 intermediates: feed the stored input, compare the stored output.

End-to-end logits in BF16 cannot show a missing quantiser, because rounding noise grows as much; one module can.
Legend: P positions, N streams, d hidden, K experts per token.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hadal.kernels.reference.compress import order_topk
from hadal.model import Model
from hadal.model.spans import Batch
from hadal.verify.report import Check, within, worst

ATTENTION_LIMIT = 0.02  # relative RMS; leaving P unrounded alone costs 1.1 %, no quantisers 5-8 %
MOE_LIMIT = 0.005  # relative RMS given equal routing; no quantisers 5 %
KV_LIMIT = 0.01
MAP_LIMIT = 1e-4


@torch.no_grad()
def check_modules(model: Model, directory: Path) -> list[Check]:
    """Attention, MoE, mHC, entries and selection of the layers recorded in debug_d_ref."""
    stored = load_file(directory / "debug_d_ref.safetensors")
    group = f"modules {directory.name} ref"
    checks: list[Check] = []
    layers = sorted({int(k.split(".")[1]) for k in stored if k.startswith("layers.") and k.endswith("attn_in")})
    for i in layers:
        checks += _check_attention(model, i, stored, group)
        if f"layers.{i}.ffn_in" in stored:
            checks += _check_moe(model, i, stored, group)
        if f"layers.{i}.block_in" in stored:
            checks += _check_maps(model, i, stored, group)
    return checks


def _check_attention(model: Model, i: int, stored: dict[str, Tensor], group: str) -> list[Check]:
    def want(name: str) -> Tensor:
        return stored[f"layers.{i}.{name}"]

    x = want("attn_in")
    state = model.new_state()
    layer = state.layers[i]
    batch = Batch.from_states([len(x)], [state], x.device)
    attention = model.blocks[i].attn
    rows = [
        within(
            group,
            f"layers.{i} attention",
            _relative_rms(attention(x, batch, [layer]), want("attn_out")),
            ATTENTION_LIMIT,
        )
    ]
    kept = model.config.sliding_window
    found = torch.cat(layer.window.read(len(x), kept))
    rows.append(within(group, f"layers.{i} window KV", _relative_rms(found, want("window_kv")[-kept:]), KV_LIMIT))
    if f"layers.{i}.compressed_kv" in stored:
        found = layer.entries(len(x)).read()
        rows.append(within(group, f"layers.{i} compressed KV", _relative_rms(found, want("compressed_kv")), KV_LIMIT))
    if f"layers.{i}.indexer_k" in stored:
        found = layer.index_keys(len(x)).read()
        rows.append(within(group, f"layers.{i} index keys", _relative_rms(found, want("indexer_k")), KV_LIMIT))
        rows.append(_check_selection(model, i, want("indexer_scores"), want("indexer_topk"), group))
    return rows


def _check_selection(model: Model, i: int, scores_PC: Tensor, topk_PK: Tensor, group: str) -> Check:
    """The recorded scores must give the recorded choice in the recorded order, ties to the lower index."""
    wrong = (order_topk(scores_PC, model.config.index_topk) != topk_PK).sum()
    return within(group, f"layers.{i} top-k", float(wrong), 0.0, "entries chosen differently")


def _check_moe(model: Model, i: int, stored: dict[str, Tensor], group: str) -> list[Check]:
    x, ids = stored[f"layers.{i}.ffn_in"], stored["tokens"][: len(stored[f"layers.{i}.ffn_in"])]
    found, routing = model.blocks[i].ffn(x, ids)
    wanted_ids = stored[f"layers.{i}.moe_ids"].long().sort(-1).values
    same = (routing.ids_TK.sort(-1).values == wanted_ids).all(-1)
    wanted = stored[f"layers.{i}.ffn_out"]
    other = float((~same).double().mean())
    weights, _ = model.blocks[i].ffn.gate(x, ids)
    gap = float((weights - stored[f"layers.{i}.moe_weights"])[same].abs().max())
    error = _relative_rms(found[same], wanted[same])
    return [
        within(group, f"layers.{i} routing", other, 0.01, "share of tokens with other experts"),
        within(group, f"layers.{i} routing weights", gap, MAP_LIMIT),
        within(group, f"layers.{i} MoE", error, MOE_LIMIT, "tokens with equal routing"),
    ]


def _check_maps(model: Model, i: int, stored: dict[str, Tensor], group: str) -> list[Check]:
    found = model.blocks[i].hc_attn.maps(stored[f"layers.{i}.block_in"])
    wanted = [stored[f"layers.{i}.hc_attn_{name}"] for name in ("pre", "post", "comb")]
    gaps = [float((f - w).abs().max()) for f, w in zip(found, wanted, strict=True)]
    return [within(group, f"layers.{i} mHC maps", worst(gaps), MAP_LIMIT)]


def _relative_rms(found: Tensor, wanted: Tensor) -> float:
    gap = (found.double() - wanted.double()).square().mean().sqrt()
    return float(gap / wanted.double().square().mean().sqrt())
