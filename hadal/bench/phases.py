"""The phases of a model's work, each as tokens per second and as a fraction of what the machine allows.

Decode must read every active weight once per step, in the format the checkpoint announces, so its limit is a read of as
many bytes; prefill and training multiply, so theirs is a BF16 product of as many operations. The limit is timed right
before each repetition, and the fraction is the median of these pairs. Attention, caches and the embedding are not
counted: it says how far the whole is from a machine that does nothing but weights.

Legend: T tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.bench.machine import multiplier, reader, seconds_of
from hadal.engine import Engine, SamplingParams
from hadal.model import Model, SequenceState
from hadal.plan import active_bytes, count

DECODE_STEPS = 16
REPEATS = 5
GROWTH = DECODE_STEPS * (REPEATS + 2)  # tokens that a measurement appends to its context
SHORT = 512  # the context that long ones are compared with
CHUNK = 2048
BATCH = 8


@dataclass(frozen=True)
class Figure:
    """One measurement. `limit` is what the machine allows in tokens per second, `fraction` the share of it reached.

    `over_short` is the rate over that behind 512 tokens, where it was measured.
    """

    phase: str
    tokens: int
    tokens_per_second: float
    limit: float
    fraction: float
    bound: str
    over_short: float | None = None

    def row(self) -> list[str]:
        """The figure as text, in the order of `COLUMNS`."""
        over = "" if self.over_short is None else f"{self.over_short:.2f}"
        share = f"{self.fraction:.0%} of {self.bound}"
        return [self.phase, f"{self.tokens:,}", f"{self.tokens_per_second:,.1f}", f"{self.limit:,.0f}", share, over]

    def to_dict(self) -> dict[str, Any]:
        """The figure as JSON holds it."""
        return asdict(self)


def measure_prefill(model: Model, length: int) -> Figure:
    """A prompt of `length` tokens from a fresh state, in chunks of 2,048, logits of the last token only."""
    ids = _random_ids(model, length)
    weights = count(model.config).active_parameters - model.config.vocab_size * model.config.hidden_size
    return _compute_bound("prefill", length, 2 * weights, lambda: _feed(model, ids))


def measure_training(model: Model, length: int) -> Figure:
    """Forward and backward over one document; three times the products of a forward pass."""
    ids = _random_ids(model, length)

    def step() -> None:
        model.zero_grad()
        out = model.training_forward(ids, [0, length])
        F.cross_entropy(out.logits_TV[:-1], ids[1:]).backward()

    figure = _compute_bound("training step", length, 6 * count(model.config).active_parameters, step)
    model.zero_grad()
    return figure


def measure_decode(model: Model, context: int, batch: int = 1) -> Figure:
    """Single-token steps of `batch` sequences behind a context of `context` tokens each."""
    steps = _decoder(model, context, batch)
    read = reader(active_bytes(model.config, batch))
    steps()
    pairs = [(batch / read(), batch * DECODE_STEPS / seconds_of(steps)) for _ in range(REPEATS)]
    return _figure("decode" if batch == 1 else f"decode, {batch} at once", context, pairs, "reads")


def measure_long(model: Model, context: int) -> Figure:
    """Single-token steps behind a long context, in turn with steps behind 512 tokens."""
    near, far = _decoder(model, SHORT, 1), _decoder(model, context, 1)
    read = reader(active_bytes(model.config))
    near(), far()
    pairs, over = [], []
    for _ in range(REPEATS):
        most, short, long = read(), seconds_of(near), seconds_of(far)
        pairs.append((1 / most, DECODE_STEPS / long))
        over.append(short / long)
    return _figure("decode, long", context, pairs, "reads", statistics.median(over))


MEASURES: dict[str, Callable[[Model, int], Figure]] = {
    "prefill": measure_prefill,
    "decode": measure_decode,
    "batch": lambda model, length: measure_decode(model, length, BATCH),
    "long": measure_long,
    "train": measure_training,
}


def _compute_bound(phase: str, length: int, operations: float, work: Callable[[], object]) -> Figure:
    rate = multiplier()
    if length <= CHUNK:
        work()
    repeats = REPEATS if length <= CHUNK else 1
    pairs = [(rate() / operations, length / seconds_of(work)) for _ in range(repeats)]
    return _figure(phase, length, pairs, "products")


def _figure(
    phase: str, tokens: int, pairs: list[tuple[float, float]], bound: str, over_short: float | None = None
) -> Figure:
    """Medians over pairs of what the machine allowed and what the model did, in tokens per second."""
    limits, rates = zip(*pairs, strict=True)
    shares = [rate / limit for limit, rate in pairs]
    middle = statistics.median
    return Figure(phase, tokens, middle(rates), middle(limits), middle(shares), bound, over_short)


def _decoder(model: Model, context: int, batch: int) -> Callable[[], None]:
    """A function that lets the engine continue `batch` requests behind `context` tokens by a few steps."""
    engine = Engine(model, device=model.device, max_concurrent=batch, token_budget=CHUNK, speculation=0)
    params = SamplingParams(max_tokens=GROWTH, temperature=0.0, ignore_eos=True)
    ids = _random_ids(model, context).tolist()
    first = engine.prepare(ids, params)
    requests = [first, *(engine.prepare(ids, params, stream=i, leader=first) for i in range(1, batch))]
    for request in requests:
        engine.submit(request)
    while not all(request.output_ids for request in requests):
        engine.step()

    def steps() -> None:
        for _ in range(DECODE_STEPS):
            engine.step()

    return steps


def _feed(model: Model, ids_T: Tensor) -> SequenceState:
    state = model.new_state()
    for part in ids_T.split(CHUNK):
        model.logits_ragged(part, [len(part)], [state])
    return state


def _random_ids(model: Model, length: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
