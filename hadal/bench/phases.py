"""The phases of a model's work, each as tokens per second and as a fraction of what the machine allows.

Decode must read every active weight once per step, so its limit is the read rate over those bytes; prefill and
training multiply, so theirs is the matrix rate over the operations. Attention, caches and the embedding are not
counted: the fraction says how far the whole is from a machine that does nothing but weights.

Legend: T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.bench.machine import gemm_rate, read_rate, seconds_of
from hadal.model import Model, SequenceState
from hadal.plan import count

DECODE_STEPS = 16
CHUNK = 2048


@dataclass(frozen=True)
class Figure:
    """One measurement: `limit` is what the machine allows in tokens per second, measured in the same minute."""

    phase: str
    tokens: int
    tokens_per_second: float
    limit: float
    bound: str

    @property
    def fraction(self) -> float:
        """Share of the limit that was reached."""
        return self.tokens_per_second / self.limit

    def row(self) -> list[str]:
        """Phase, tokens, rate, limit and the share reached, as text."""
        share = f"{self.fraction:.0%} of {self.bound}"
        return [self.phase, str(self.tokens), f"{self.tokens_per_second:,.1f}", f"{self.limit:,.0f}", share]


def measure_prefill(model: Model, length: int) -> Figure:
    """A prompt of `length` tokens from a fresh state, in chunks of 2,048, logits of the last token only."""
    ids = _random_ids(model, length)
    return _compute_bound("prefill", model, length, 1, lambda: _feed(model, ids))


def measure_decode(model: Model, context: int, batch: int = 1) -> Figure:
    """Single-token steps of `batch` sequences behind a context of `context` tokens each."""
    first = _feed(model, _random_ids(model, context))
    states = [first.clone() for _ in range(batch)]
    ids, lengths = _random_ids(model, batch), [1] * batch

    def steps() -> None:
        for _ in range(DECODE_STEPS):
            model.logits_ragged(ids, lengths, states)

    rate = batch * DECODE_STEPS / seconds_of(steps)
    nbytes = active_bytes(model)
    name = "decode" if batch == 1 else f"decode, {batch} at once"
    return Figure(name, context, rate, batch * read_rate() / nbytes, "memory reads")


def measure_training(model: Model, length: int) -> Figure:
    """Forward and backward over one document; three times the products of a forward pass."""
    ids = _random_ids(model, length)

    def step() -> None:
        model.zero_grad()
        out = model.training_forward(ids, [0, length])
        F.cross_entropy(out.logits_TV[:-1], ids[1:]).backward()

    figure = _compute_bound("training step", model, length, 3, step)
    model.zero_grad()
    return figure


def active_bytes(model: Model) -> int:
    """Bytes of the weights that one token reads, as they are held in memory."""
    held = sum(p.nbytes for n, p in model.named_parameters() if not n.startswith("draft") and n != "embed")
    experts = sum(p.nbytes for n, p in model.named_parameters() if ".ffn.experts." in n and not n.startswith("draft"))
    config = model.config
    return held - experts + experts * config.num_experts_per_tok // config.n_routed_experts


def _compute_bound(phase: str, model: Model, length: int, passes: int, work: Callable[[], object]) -> Figure:
    rate = length / seconds_of(work, repeats=1 if length > CHUNK else 3)
    weights = count(model.config).active_parameters - (model.head.numel() if phase == "prefill" else 0)
    dtype = model.numerics.matmul or model.numerics.dtype
    return Figure(phase, length, rate, gemm_rate(dtype) / (2 * passes * weights), f"{str(dtype)[6:]} products")


def _feed(model: Model, ids_T: Tensor) -> SequenceState:
    state = model.new_state()
    for part in ids_T.split(CHUNK):
        model.logits_ragged(part, [len(part)], [state])
    return state


def _random_ids(model: Model, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
