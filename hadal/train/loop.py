"""The training loop: schedules, phases, steps, held-out evaluation, metrics and exact resume; device-neutral.

Sits above hadal.train.{data,losses,optim}; the pre-training stage calls `train`. One step draws its micro-batches,
sums the losses, checks that everything is finite, and only then changes a weight.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hadal.model import Model, TrainingOutput
from hadal.quant import quantise_fp4
from hadal.train.data import Batch, Sampler
from hadal.train.losses import (
    balance_loss,
    count_targets,
    expert_load,
    head_loss_sum,
    shifted_targets,
    update_router_bias,
)
from hadal.train.optim import Optimizer, is_indexer

Phase = Literal["dense", "indexer", "sparse"]
_FREE = ("workers", "evaluations", "checkpoint_minutes", "log_every")  # they change no bit, so a resumed run may differ


class TrainingError(ValueError):
    """A run that cannot start, resume or go on; the message names the step or file and the remedy."""


@dataclass(frozen=True)
class LoopConfig:
    """Schedules as fractions of the run, weights of the losses, and sizes (spec/training.md 1.3, 1.5, 1.7).

    The run's length is `steps`, or `minutes` of wall clock; with minutes the schedules follow the clock, so a run ends
    with a finished decay on a machine of any speed. With steps a resumed run equals an uninterrupted one to the bit.
    Without either it is 55 minutes: nano's, as are the other defaults.
    """

    steps: int | None = None
    minutes: float | None = None
    packs_per_micro_batch: int = 1
    micro_batches: int = 2
    workers: int | None = None  # micro-batches computed at once, each in a thread; None leaves it to the stage, or is 1
    lr: float = 6e-3  # of Muon and AdamW alike
    warmup: float = 0.02
    decay_from: float = 0.5
    lr_floor: float = 0.1
    dense_until: float = 0.3
    indexer_until: float = 0.33  # between the two only the indexers learn
    fp4_from: float = 0.85  # from here on routed experts compute with their FP4 values (report 5.2.1)
    mtp_weight: float = 0.3
    mtp_weight_in_decay: float = 0.1
    balance_weight: float = 1e-4
    bias_speed: float = 1e-3
    head_product: torch.dtype | None = torch.bfloat16  # type of the head's gradient products; None is float32
    evaluations: int = 5
    checkpoint_minutes: float = 5.0
    log_every: int = 10

    def __post_init__(self) -> None:
        if self.steps is not None and self.minutes is not None:
            raise TrainingError("give the run's length either as `steps` or as `minutes`")
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "minutes", 55.0)

    def lr_at(self, progress: float) -> float:
        """Linear warm-up, constant, cosine to `lr_floor` of the peak."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 1e-3)
        if progress < self.decay_from:
            return self.lr
        fallen = min((progress - self.decay_from) / (1 - self.decay_from), 1.0)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * 0.5 * (1 + math.cos(math.pi * fallen)))

    def mtp_weight_at(self, progress: float) -> float:
        """0.3, and 0.1 once the learning rate decays."""
        return self.mtp_weight if progress < self.decay_from else self.mtp_weight_in_decay

    def phase_at(self, progress: float) -> Phase:
        """Dense attention, indexer warm-up with everything else frozen, sparse attention."""
        if progress < self.dense_until:
            return "dense"
        return "indexer" if progress < self.indexer_until else "sparse"


@dataclass(frozen=True)
class Report:
    """What a run did; losses in nats per token by source, `training_seconds` over all its sessions."""

    steps: int
    tokens: int
    training_seconds: float
    held_out: dict[str, float]
    epochs: dict[str, float]


@dataclass
class _Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def fraction(self, config: LoopConfig) -> float:
        if config.steps is not None:
            return self.step / config.steps
        assert config.minutes is not None
        return self.seconds / (config.minutes * 60)


def check_start(
    folder: Path, config: LoopConfig, resume: bool, further: dict[str, Any] | None = None
) -> dict[str, str]:
    """The settings, with `further` ones, that decide a run's result, once a run in `folder` may start or go on.

    Raises TrainingError when a new run would overwrite another, and when there is nothing to resume or it was started
    with other settings. Reads only.
    """
    path = folder / "state.pt"
    settings = {k: repr(v) for k, v in (asdict(config) | (further or {})).items() if k not in _FREE}
    if path.exists() and not resume:
        raise TrainingError(f"{path} exists; continue it with --resume or give an empty folder")
    if resume and not path.exists():
        raise TrainingError(f"{path} does not exist, so there is nothing to resume; start without --resume")
    if resume:
        kept = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("settings", {})
        changed = [name for name in settings.keys() | kept.keys() if settings.get(name) != kept.get(name)]
        if changed:
            raise TrainingError(
                f"{path} was written with another `{min(changed)}`; resume with the settings it was started with"
            )
    return settings


def train(
    model: Model,
    optimizer: Optimizer,
    sampler: Sampler,
    held_out: dict[str, list[Batch]],
    config: LoopConfig,
    folder: Path,
    *,
    resume: bool = False,
    further: dict[str, Any] | None = None,
    stop_after: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Train to the end of the schedule, or for `stop_after` steps of this session, leaving `state.pt` in `folder`.

    Appends one JSON line per `log_every` steps and per evaluation to `metrics.jsonl`. Raises TrainingError when a loss
    or gradient is not finite, before the step changes a weight, and as `check_start` does, to which `further` goes.
    """
    settings = check_start(folder, config, resume, further)
    folder.mkdir(parents=True, exist_ok=True)
    state_path, metrics_path = folder / "state.pt", folder / "metrics.jsonl"
    progress = _load(state_path, model, optimizer, sampler) if resume else _Progress()
    first_step, saved_at, clock = progress.step, progress.seconds, time.monotonic()
    losses: dict[str, float] = {}
    while (fraction := progress.fraction(config)) < 1:
        losses = {}
        if stop_after is not None and progress.step - first_step >= stop_after:
            break
        row = _step(model, optimizer, sampler, config, fraction, progress.step)
        now = time.monotonic()
        seconds, clock = now - clock, now
        progress.step += 1
        progress.tokens += row["tokens"]
        progress.seconds += seconds
        if progress.step % config.log_every == 0:
            row |= {
                "step": progress.step,
                "progress": round(fraction, 5),
                "tokens_per_s": round(row["tokens"] / seconds),
            }
            _append(metrics_path, row)
            say(_line(row))
        after = progress.fraction(config)
        if int(after * config.evaluations) > int(fraction * config.evaluations):
            losses = evaluate(model, held_out, dense=config.phase_at(after) == "dense")
            _append(metrics_path, {"step": progress.step, "held_out": losses, "epochs": sampler.epochs()})
            say(f"step {progress.step} held-out " + " ".join(f"{k} {v:.3f}" for k, v in losses.items()))
        if progress.seconds - saved_at > 60 * config.checkpoint_minutes:
            saved_at = progress.seconds
            _save(state_path, model, optimizer, sampler, settings, progress)
        progress.seconds += time.monotonic() - clock  # evaluation and saving count against the budget as well
        clock = time.monotonic()
    _save(state_path, model, optimizer, sampler, settings, progress)
    losses = losses or evaluate(model, held_out, dense=config.phase_at(progress.fraction(config)) == "dense")
    return Report(progress.step, progress.tokens, progress.seconds, losses, sampler.epochs())


@torch.no_grad()
def evaluate(model: Model, held_out: dict[str, list[Batch]], *, dense: bool) -> dict[str, float]:
    """Mean next-token loss in nats over the counted tokens of each source."""
    out = {}
    for source, batches in held_out.items():
        total, count = 0.0, 0
        for batch in batches:
            batch = batch.to(model.device)
            targets = shifted_targets(batch.ids_T, batch.counted_T, batch.cu_seqlens, 1)
            result = model.training_forward(batch.ids_T, batch.cu_seqlens, dense=dense, indexer_loss=False)
            total += float(head_loss_sum(result.hidden_TD, result.head_VD, targets))
            count += count_targets(targets)
        out[source] = total / max(count, 1)
    return out


def _step(
    model: Model, optimizer: Optimizer, sampler: Sampler, config: LoopConfig, fraction: float, step: int
) -> dict[str, Any]:
    """One optimiser step; returns the metrics row without its place in the run."""
    phase = config.phase_at(fraction)
    batches = [
        sampler.draw(fraction, config.packs_per_micro_batch).to(model.device) for _ in range(config.micro_batches)
    ]
    targets = [shifted_targets(b.ids_T, b.counted_T, b.cu_seqlens, 1) for b in batches]
    mtp_targets = [shifted_targets(b.ids_T, b.counted_T, b.cu_seqlens, 2) for b in batches]
    counts = max(sum(map(count_targets, targets)), 1), max(sum(map(count_targets, mtp_targets)), 1)
    row: dict[str, Any] = {"phase": phase, "lr": config.lr_at(fraction), "tokens": sum(len(b.ids_T) for b in batches)}
    parameters = [p for n, p in model.named_parameters() if phase != "indexer" or is_indexer(n)]

    def run(batch: Batch, target_T: Tensor, mtp_target_T: Tensor) -> _MicroBatch:
        dense, kl = phase != "sparse", phase != "dense"
        out = model.training_forward(batch.ids_T, batch.cu_seqlens, dense=dense, indexer_loss=kl)
        parts = _losses(out, target_T, mtp_target_T, counts, batch.cu_seqlens, config)
        total = _total(parts, phase, config.mtp_weight_at(fraction), config.balance_weight)
        grads = torch.autograd.grad(total, parameters, allow_unused=True) if total.requires_grad else ()
        return _MicroBatch({n: float(v.detach()) for n, v in parts.items()}, grads, _loads(out), out.indexer_captured)

    with _only_indexers(model, phase == "indexer"), _fp4_experts(model, fraction >= config.fp4_from):
        results = _map(run, zip(batches, targets, mtp_targets, strict=True), config.workers or 1)
    optimizer.zero_grad()
    loads: dict[int, Tensor] = {}
    for result in results:  # in the order of the draws, so that sums do not depend on who finished first
        for parameter, grad in zip(parameters, result.grads, strict=False):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        for name, value in result.losses.items():
            row[name] = row.get(name, 0.0) + value
        for block, load in result.loads.items():
            loads[block] = loads[block] + load if block in loads else load
        if result.captured is not None:
            row["captured"] = result.captured
    norm, indexer_norm = optimizer.clip()
    row |= {"grad_norm": norm, "indexer_grad_norm": indexer_norm}
    _check_finite(row, step)
    optimizer.step(row["lr"])
    if phase != "indexer":
        _update_biases(model, loads, config.bias_speed)
    row["load_max"] = max((float(load.max() / load.mean()) for load in loads.values()), default=1.0)
    return row


@dataclass(frozen=True)
class _MicroBatch:
    """What one micro-batch adds to its step: losses by name, gradients, expert load by block, captured fraction."""

    losses: dict[str, float]
    grads: tuple[Tensor | None, ...]
    loads: dict[int, Tensor]
    captured: float | None


def _map(run: Callable[..., _MicroBatch], arguments: Iterable[tuple[Any, ...]], workers: int) -> list[_MicroBatch]:
    if workers == 1:
        return [run(*a) for a in arguments]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda a: run(*a), arguments))


def _loads(out: TrainingOutput) -> dict[int, Tensor]:
    """Expert load of every block with learned routing, by its place in the model."""
    routed = enumerate(out.routing)
    return {i: expert_load(r.ids_TK, r.scores_TE.shape[1]) for i, r in routed if not r.is_hash}


def _losses(
    out: TrainingOutput, targets_T: Tensor, mtp_targets_T: Tensor, counts: tuple[int, int], cu: list[int], c: LoopConfig
) -> dict[str, Tensor]:
    """This micro-batch's share of the step's losses, each a mean over the whole step."""
    parts = {"loss": head_loss_sum(out.hidden_TD, out.head_VD, targets_T, product=c.head_product) / counts[0]}
    if out.mtp_hidden_TD is not None:
        mtp_sum = head_loss_sum(out.mtp_hidden_TD, out.head_VD, mtp_targets_T, product=c.head_product)
        parts["mtp_loss"] = mtp_sum / counts[1]
    learned = [r for r in out.routing if not r.is_hash]
    if learned:
        parts["balance"] = (
            torch.stack([balance_loss(r.scores_TE, r.ids_TK, cu) for r in learned]).sum() / c.micro_batches
        )
    if out.indexer_kl is not None:
        parts["indexer_kl"] = out.indexer_kl / c.micro_batches
    return parts


def _total(parts: dict[str, Tensor], phase: Phase, mtp_weight: float, balance_weight: float) -> Tensor:
    # The indexers see no other gradient and both optimisers ignore its scale, so the KL needs no coefficient.
    zero = parts["loss"].new_zeros(())
    if phase == "indexer":
        return parts.get("indexer_kl", zero)
    weights = {"loss": 1.0, "mtp_loss": mtp_weight, "balance": balance_weight, "indexer_kl": 1.0}
    return sum((weights[name] * value for name, value in parts.items()), zero)


def _check_finite(row: dict[str, Any], step: int) -> None:
    for name, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise TrainingError(
                f"{name} is {value} at step {step}, which therefore changed no weight; start a new run with a lower "
                "learning rate"
            )


def _update_biases(model: Model, loads: dict[int, Tensor], speed: float) -> None:
    blocks = [*model.layers, *model.draft]
    for block, load in loads.items():
        bias: Tensor = blocks[block].ffn.gate.bias
        update_router_bias(bias, load, speed)


@contextlib.contextmanager
def _only_indexers(model: Model, active: bool) -> Iterator[None]:
    """While active, parameters outside the indexers take no gradient."""
    frozen = [p for n, p in model.named_parameters() if active and not is_indexer(n)]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _fp4_experts(model: Model, active: bool) -> Iterator[None]:
    """While active, routed experts hold their FP4 values; gradients taken then apply to the full-precision weights."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if active and ".ffn.experts." in name:
                kept.append((parameter, parameter.detach().clone()))
                packed = quantise_fp4(parameter.flatten(0, 1))
                parameter.copy_(packed.dense(torch.float32).view_as(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for held, original in kept:
                held.copy_(original)


def _save(
    path: Path, model: Model, optimizer: Optimizer, sampler: Sampler, settings: dict[str, str], progress: _Progress
) -> None:
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sampler": sampler.state_dict(),
        "settings": settings,
        "progress": {"step": progress.step, "tokens": progress.tokens, "seconds": progress.seconds},
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)  # a run killed here leaves the previous state whole


def _load(path: Path, model: Model, optimizer: Optimizer, sampler: Sampler) -> _Progress:
    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sampler.load_state_dict(state["sampler"])
    return _Progress(**state["progress"])


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _line(row: dict[str, Any]) -> str:
    keys = ("loss", "mtp_loss", "indexer_kl", "captured", "grad_norm", "load_max")
    shown = " ".join(f"{k} {row[k]:.3f}" for k in keys if k in row)
    head = f"step {row['step']} {row['progress']:.1%} {row['phase']} lr {row['lr']:.2e}"
    return f"{head} {shown} {row['tokens_per_s']} tok/s"
