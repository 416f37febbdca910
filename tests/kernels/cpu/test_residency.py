"""Experts larger than memory: the bits of a model held whole, memory within the budget, reads as foreseen."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hadal.checkpoint import CheckpointError, load_model
from hadal.kernels.cpu import packed, residency
from hadal.kernels.cpu.residency import Estimate, Residency
from hadal.kernels.cpu.target import CpuError
from hadal.model import Model
from hadal.model.drafter import DraftSpan
from tests.checkpoint.tiny import random_tensors, tiny_config, write_checkpoint
from tests.kernels.cpu.models import SIZES, same_bits, tokens

# Two hash layers, four whose router looks at its input, and an MTP block: 44 MB of experts.
EXPERTS, LAYERS, ACTIVE = 60, 6, 3
CHANGES = dict(
    hidden_size=256, moe_intermediate_size=256, n_routed_experts=EXPERTS, num_hidden_layers=LAYERS, num_hash_layers=2,
    compress_ratios=(0, 4, 8, 0, 4, 0, 0), num_experts_per_tok=ACTIVE,
)  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(**(SIZES | CHANGES))
    return write_checkpoint(tmp_path_factory.mktemp("model"), config, random_tensors(config), shards=3)


@pytest.fixture(scope="module")
def whole(path: Path) -> Model:
    model = load_model(path, "cpu")
    assert model.runner is not None and model.runner.residency is None
    return model


@pytest.fixture(scope="module")
def nbytes(path: Path) -> int:
    """Bytes of one expert."""
    return managed(load_model(path, "cpu", expert_memory=1 << 20)).slots.nbytes


def managed(model: Model) -> Residency:
    assert model.runner is not None and model.runner.residency is not None
    return model.runner.residency


def mapped(place: int | Path) -> int:
    """Resident bytes of this process's mapping around an address, or of those of files below a folder."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(word, 16) for word in found.groups())
            counts = begin <= place < end if isinstance(place, int) else f" {place}/" in line
        elif counts and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots=st.sampled_from([2, 3, 20, 120, 300]), seed=st.integers(0, 99), lengths=st.lists(
    st.lists(st.sampled_from([1, 1, 1, 2, 9, 40]), min_size=1, max_size=4), min_size=1, max_size=4))  # fmt: skip
def test_every_budget_gives_the_bits_of_the_whole(
    path: Path, whole: Model, nbytes: int, slots: int, seed: int, lengths: list[list[int]]
) -> None:
    model = load_model(path, "cpu", expert_memory=slots * nbytes)
    assert managed(model).slots.count == slots
    count = max(map(len, lengths))
    states = [[m.new_state() for _ in range(count)] for m in (model, whole)]
    for step in lengths:
        ids = tokens(whole, seed, sum(step))
        a, b = (m.logits_ragged(ids, step, s[: len(step)], last_only=False)
                for m, s in zip((model, whole), states, strict=True))  # fmt: skip
        assert same_bits(a, b)


def test_an_mtp_block_has_its_experts_managed_too(path: Path, whole: Model, nbytes: int) -> None:
    model, ids = load_model(path, "cpu", expert_memory=30 * nbytes), tokens(whole, 1, 50).tolist()
    found: list[Tensor] = []

    def choose(logits: Tensor, spans: list[int], ahead: int) -> list[int]:
        found.append(logits.clone())
        return logits.argmax(-1).tolist()

    for m in (model, whole):
        state = m.new_state()
        m.advance(ids, [len(ids)], [state], [1])
        assert m.drafter is not None
        m.drafter.draft([DraftSpan(0, len(ids), [*ids[1:], 9], 3)], choose)
    assert len(found) == 6 and same_bits(torch.cat(found[:3]), torch.cat(found[3:]))


def test_memory_stays_within_the_budget(path: Path, whole: Model, nbytes: int) -> None:
    experts = (LAYERS + 1) * EXPERTS * nbytes
    model = load_model(path, "cpu", expert_memory=experts // 3)
    slots = managed(model).slots
    state, ids = model.new_state(), tokens(whole, 2, 300)
    for part in (ids[:200], *ids[200:].split(1)):
        model.logits(part, state)
    assert slots.count * nbytes <= experts // 3 < slots.bytes_read and len(slots.resident()) == slots.count
    assert mapped(slots.address) <= experts // 3 + (1 << 16)


def test_nothing_of_the_checkpoint_stays_after_packing(
    path: Path, nbytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(packed, "_PIECE", 1 << 22)
    experts = (LAYERS + 1) * EXPERTS * nbytes
    before = mapped(path) + mapped(tmp_path)
    model = load_model(path, "cpu", expert_memory=experts // 3)
    state = model.new_state()
    for token in range(20):
        model.logits([token], state)
    assert mapped(path) + mapped(tmp_path) - before < experts // 3


def test_hash_layers_are_foreseen_exactly_and_the_next_router_is_asked_ahead(
    path: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(path, "cpu", expert_memory=80 * nbytes)
    slots = managed(model).slots
    calls: list[tuple[str, list[int]]] = []

    def spy(name: str, call: Callable[..., Any], keys: Sequence[int]) -> None:
        calls.append((name, [int(key) for key in keys]))
        call(keys)

    for name in ("expect", "want"):
        monkeypatch.setattr(slots, name, partial(spy, name, getattr(slots, name)))
    state, right, guessed = model.new_state(), 0, 0
    ids = tokens(model, 3, 40)
    for step in (ids[:20], *ids[20:].split(1)):
        calls.clear()
        model.logits(step, state)
        assert [name for name, _ in calls] == ["expect"] + ["want", "expect"] * LAYERS
        wanted = [keys for name, keys in calls if name == "want"]
        expected = [keys for name, keys in calls if name == "expect"]
        hashed = [sorted({i * EXPERTS + int(e) for e in model.blocks[i].ffn.gate.tid2eid[step].flatten()})
                  for i in range(2)]  # fmt: skip
        assert wanted[:2] == hashed and expected[0] == hashed[0] + hashed[1] and expected[1] == hashed[1]
        for layer in range(2, LAYERS):
            if len(step) == 1:
                assert len(expected[layer]) == ACTIVE
                right += len(set(expected[layer]) & set(wanted[layer]))
                guessed += ACTIVE
            else:
                assert not expected[layer]
        assert not expected[LAYERS]
    assert right / guessed > 2 * ACTIVE / EXPERTS, (right, guessed)


def test_what_is_used_often_is_kept(path: Path, nbytes: int) -> None:
    model = load_model(path, "cpu", expert_memory=LAYERS * (ACTIVE + 3) * nbytes)
    state = model.new_state()
    model.logits([7] * 30, state)
    slots = managed(model).slots
    slots.asked = slots.hits = 0
    for _ in range(10):
        model.logits([7], state)
    assert slots.asked == 10 * LAYERS * ACTIVE and managed(model).hit_rate > 0.5


def test_the_estimate_follows_from_bytes_and_rates(path: Path, nbytes: int) -> None:
    estimate = managed(load_model(path, "cpu", expert_memory=90 * nbytes)).estimate
    assert estimate.resident_bytes == 90 * nbytes and estimate.expert_bytes == (LAYERS + 1) * EXPERTS * nbytes
    assert estimate.missing == pytest.approx(LAYERS * ACTIVE * nbytes * 0.75)
    assert estimate.disk_rate > 0 and estimate.active > LAYERS * ACTIVE * nbytes
    given_rates = Estimate(60 << 30, 15 << 30, disk_rate=2e9, memory_rate=20e9, missing=1e9, active=5e9)
    assert str(given_rates) == (
        "15.00 of 60.00 GiB of experts fit into memory; 1000.0 MB per token are expected to miss and the disk reads "
        "2.00 GB/s: about 1.3 tokens/s"
    )


def test_what_weights_will_take_of_free_memory_is_told(path: Path, whole: Model, nbytes: int) -> None:
    runners = [whole.runner, load_model(path, "cpu", expert_memory=90 * nbytes).runner]
    assert runners[0] is not None and runners[1] is not None
    experts = (LAYERS + 1) * EXPERTS * nbytes
    assert runners[0].pending_bytes - experts == runners[1].pending_bytes - 90 * nbytes > 0
    nano = load_model("nano", "cpu").runner
    assert nano is not None and nano.pending_bytes == 0  # packed in memory


def test_budgets_without_room_or_use(path: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CpuError, match=f"expert_memory is {nbytes} bytes; two experts of this model take {2 * nbytes}"):
        load_model(path, "cpu", expert_memory=nbytes)
    with pytest.raises(CheckpointError, match="expert_memory is for models that emitted CPU kernels run as a whole"):
        load_model(path, "cpu", backend="reference", expert_memory=1 << 30)
    model = load_model(path, "cpu", expert_memory=1 << 30)
    assert model.runner is not None and model.runner.residency is None
    monkeypatch.setattr(residency, "KEEP_FROM", 0)
    monkeypatch.setattr(residency, "memory_available", lambda _: 40 << 20)
    slots = managed(load_model(path, "cpu")).slots
    assert 2 < slots.count < (LAYERS + 1) * EXPERTS and slots.count * nbytes < 35 << 20
    monkeypatch.setattr(residency, "memory_available", lambda _: 0)
    assert managed(load_model(path, "cpu")).slots.count == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where whoever started the tests has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_waits_for_the_end_of_a_step(path: Path, whole: Model, nbytes: int) -> None:
    model, ids = load_model(path, "cpu", expert_memory=2 * nbytes), tokens(whole, 4, 60)
    state = model.new_state()
    model.logits(ids[:10], state)
    slots = managed(model).slots
    before, arrived = slots.asked, slots.arrived

    def interrupted(keys: np.ndarray) -> np.ndarray:
        if slots.asked > before + 5:
            os.kill(os.getpid(), signal.SIGINT)
        return arrived(keys)

    slots.arrived = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.logits(ids[10:40], state)
    slots.arrived = arrived  # type: ignore[method-assign]
    assert state.position == 40 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same_bits(model.logits(ids[40:], state), whole.logits(ids)[40:])


def test_readers_end_with_their_model(path: Path, nbytes: int) -> None:
    gc.collect()
    model = load_model(path, "cpu", expert_memory=9 * nbytes)
    mine = [t for t in threading.enumerate() if t.name == "hadal-reader"]
    assert mine
    del model
    end = time.monotonic() + 10
    while any(thread.is_alive() for thread in mine):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_two_threads_compute_the_same(path: Path, whole: Model, nbytes: int) -> None:
    model, ids = load_model(path, "cpu", expert_memory=40 * nbytes), tokens(whole, 5, 80)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = model.logits(ids)
    finally:
        torch.set_num_threads(before)
    assert same_bits(found, whole.logits(ids))
