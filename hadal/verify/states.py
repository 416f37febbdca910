"""A model against itself: chunked against one-shot, ragged batches against single requests, saved against loaded."""

from __future__ import annotations

import random
import tempfile
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from hadal.checkpoint import load_model, save_model
from hadal.model import Model
from hadal.verify.golden import load_golden
from hadal.verify.report import Check, within

LIMIT = 1e-4
# Router and indexer choices between nearly equal scores may fall otherwise when sums are ordered otherwise; such a flip
# moves a few positions by much, a wrong cache moves most of them.
FLIPPED = 0.02


def check_states(directory: Path, seed: int = 0) -> list[Check]:
    """Cache equals full, batch equals alone, packed equals separate, byte-equal save; on one golden configuration."""
    model = load_golden(directory, "f32")
    group = f"states {directory.name} f32"
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (600,), generator=generator)
    return [
        _check(group, "chunked equals one-shot", _chunked(model, ids, random.Random(seed)), model.logits(ids)),
        _check(group, "ragged batch equals each alone", *_ragged(model, ids)),
        _check(group, "packed documents equal separate", *_packed(model, ids)),
        _rewound(model, ids, group),
        _saved(directory),
    ]


def _check(group: str, name: str, found: Tensor, wanted: Tensor) -> Check:
    gap = (found - wanted).abs().amax(-1)
    off = float((gap > LIMIT).double().mean())
    passed = float(gap.median()) <= LIMIT and off <= FLIPPED
    return Check(
        group, name, float(gap.median()), LIMIT, passed, f"max {float(gap.max()):.1e}, {off:.1%} of positions beyond"
    )


def _chunked(model: Model, ids_T: Tensor, order: random.Random) -> Tensor:
    state, parts, start = model.new_state(), [], 0
    while start < len(ids_T):
        step = min(order.choice((1, 2, 3, 4, 7, 31, 64, 130)), len(ids_T) - start)
        parts.append(model.logits(ids_T[start : start + step], state))
        start += step
    return torch.cat(parts)


def _ragged(model: Model, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    """Three prompts of 200, 137 and 61 tokens prefilled together, then 8 joint decode steps."""
    prompts = [ids_T[:200], ids_T[200:337], ids_T[337:398]]
    states = [model.new_state() for _ in prompts]
    lengths = [len(p) for p in prompts]
    rows = [
        list(part) for part in model.logits_ragged(torch.cat(prompts), lengths, states, last_only=False).split(lengths)
    ]
    for step in range(8):
        logits = model.logits_ragged(ids_T[400 + 3 * step : 403 + 3 * step], [1, 1, 1], states)
        for row, logit in zip(rows, logits, strict=True):
            row.append(logit)
    alone = [
        model.logits(torch.cat((p, ids_T[400 + i : 424 : 3]))) for i, p in enumerate(prompts)
    ]  # fmt: skip
    return torch.cat([torch.stack(row) for row in rows]), torch.cat(alone)


@torch.no_grad()
def _packed(model: Model, ids_T: Tensor) -> tuple[Tensor, Tensor]:
    borders = [0, 1, 6, 150, 151, 400, 600]
    packed = model.training_forward(ids_T, borders, indexer_loss=False).logits_TV
    parts = [model.logits(ids_T[a:b]) for a, b in pairwise(borders)]
    return packed, torch.cat(parts)


def _rewound(model: Model, ids_T: Tensor, group: str) -> Check:
    """Continuing a copy of a state leaves the original as it was."""
    state = model.new_state()
    model.logits(ids_T[:301], state)
    before = model.logits(ids_T[301:340], state.clone())
    model.logits(ids_T[400:500], state.clone())
    after = model.logits(ids_T[301:340], state)
    return within(group, "a copied state rewinds", float((before - after).abs().max()), 0.0)


def _saved(directory: Path) -> Check:
    """Loading and saving gives back every shard to the byte."""
    source = directory / "checkpoint"
    with tempfile.TemporaryDirectory() as scratch:
        save_model(load_model(source, device="cpu", dtype="bfloat16"), scratch)
        shards = sorted(source.glob("*.safetensors"))
        wrong = [f.name for f in shards if (Path(scratch) / f.name).read_bytes() != f.read_bytes()]
    return within(f"states {directory.name}", "saved shards equal to the byte", len(wrong), 0, ", ".join(wrong))
