"""Faithful mode on a processor: a token's logits have the same bits however its sequence was computed."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.checkpoint import load_model
from hadal.kernels.cpu.target import detect
from hadal.model import Model, SequenceState
from tests.checkpoint.tiny import dspark_config, random_tensors, tiny_config, write_checkpoint

if detect()[0] is None:
    pytest.skip("no emitted kernels for this processor", allow_module_level=True)

LENGTHS = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 8, 31, 64, 100, 150])
FORGOTTEN = st.sampled_from([0, 0, 0, 1, 5, 8])
STEP = st.tuples(
    st.tuples(LENGTHS, LENGTHS, LENGTHS), st.tuples(FORGOTTEN, FORGOTTEN, FORGOTTEN), st.sampled_from([1, 2]),
    st.sampled_from(["", "", "copy", "sleep"]),
)  # fmt: skip


@pytest.fixture(scope="module", params=["mixed", "ties", "bf16", "odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Quantised with all kinds of layers; with an indexer whose scores all tie; unquantised; of awkward widths."""
    sizes = dict(num_attention_heads=6, o_groups=3, head_dim=96, qk_rope_head_dim=32, compress_ratios=(4, 0, 8, 128, 0))
    config = tiny_config(**({} if request.param == "odd" else sizes))
    form = "bf16" if request.param == "bf16" else None
    if form:
        config = config.replace(quantization=False, expert_dtype=None)
    tensors = random_tensors(config, "bf16", "bf16") if form else random_tensors(config)
    if request.param == "ties":
        for name in tensors:
            if name.endswith("indexer.weights_proj.weight"):
                tensors[name].zero_()
    path = write_checkpoint(tmp_path_factory.mktemp("m") / request.param, config, tensors)
    made = load_model(path, device="cpu", dtype="bfloat16")
    assert made.ops.name == "cpu" and made.numerics.faithful
    return made


def ids_of(model: Model, seed: int, count: int) -> Tensor:
    return torch.randint(0, model.config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))


class Sequence:
    """A sequence with the logits that each of its tokens was seen to give."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.state, self.source = model, model.new_state(), random.Random(seed)
        self.ids: list[int] = []
        self.rows: list[Tensor] = []

    def take(self, count: int) -> list[int]:
        self.ids += [self.source.randrange(self.model.config.vocab_size) for _ in range(count)]
        return self.ids[len(self.ids) - count :]

    def forget(self, count: int) -> None:
        count = min(count, self.state.rewindable)
        self.state.rewind(count)
        self.ids, self.rows = self.ids[: len(self.ids) - count], self.rows[: len(self.rows) - count]

    def become_copy_of(self, other: Sequence) -> None:
        self.state, self.ids, self.rows = other.state.clone(), list(other.ids), list(other.rows)

    def sleep(self) -> None:
        pages = [self.model.pool.copy(page) for page in self.state.pages]
        self.state = self.model.restore_state(self.state.dump(), pages)


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6), st.lists(STEP, min_size=2, max_size=6))
def test_any_interleaving_gives_the_bits_of_each_sequence_alone(model: Model, seed: int, steps: list) -> None:  # type: ignore[type-arg]
    """Chunks, company, threads, forgotten tokens, copies and states that went through bytes."""
    sequences = [Sequence(model, seed + i) for i in range(3)]
    threads = torch.get_num_threads()
    try:
        for lengths, forgotten, count, event in steps:
            torch.set_num_threads(count)
            taking = [(s, n) for s, n in zip(sequences, lengths, strict=True) if n]
            if taking:
                ids = [i for s, n in taking for i in s.take(n)]
                spans = [n for _, n in taking]
                logits = model.logits_ragged(ids, spans, [s.state for s, _ in taking], last_only=False)
                for (s, _), rows in zip(taking, logits.split(spans), strict=True):
                    s.rows += rows.unbind()
            for s, tokens in zip(sequences, forgotten, strict=True):
                s.forget(tokens)
            if event == "copy":
                sequences[1].become_copy_of(sequences[0])
            elif event == "sleep":
                sequences[2].sleep()
    finally:
        torch.set_num_threads(threads)
    for s in sequences:
        if s.ids:
            assert torch.equal(torch.stack(s.rows), model.logits(s.ids))


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 10**6), st.lists(st.integers(1, 70), min_size=2, max_size=6))
def test_the_mtp_block_gives_the_same_bits_in_any_chunks(model: Model, seed: int, sizes: list[int]) -> None:
    ids = ids_of(model, seed, sum(sizes) + 1)

    def follow(cuts: list[int]) -> Tensor:
        state, parts = model.new_state(), []
        for a, b in pairwise(cuts):
            x, _ = model.streams(ids[a:b], [b - a], [state])
            parts.append(model.mtp_logits(x, ids[a + 1 : b + 1], [b - a], [state]))
        return torch.cat(parts)

    assert torch.equal(follow([0, *accumulate(sizes)]), follow([0, sum(sizes)]))


def test_dspark_drafts_the_same_bits_after_any_chunks(tmp_path: Path) -> None:
    config = dspark_config()
    path = write_checkpoint(tmp_path / "m", config, random_tensors(config))
    model = load_model(path, device="cpu", dtype="bfloat16")
    ids = ids_of(model, 1, 60)

    def draft(cuts: list[int]) -> Tensor:
        state: SequenceState = model.new_state()
        for a, b in pairwise(cuts):
            _, taps = model.streams(ids[a:b], [b - a], [state])
            assert taps is not None
            model.dspark_remember(taps, [b - a], [state])
        return torch.cat(model.dspark_block(5, state), dim=1)

    whole = draft([0, 60])
    assert all(torch.equal(draft(cuts), whole) for cuts in ([0, 59, 60], [0, 1, 2, 3, 40, 60], [*range(61)]))
