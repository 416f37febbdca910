"""Residency: experts larger than memory, of which some are in slots of memory and the others on disk.

A step runs up to a layer's choice of experts, asks for those that are absent, and multiplies by those that are there
while the rest arrives. The next layer's likely experts follow: in hash layers the token ids tell them, elsewhere the
layer's router, given the input of the layer before, which is right about three of four. What the smallest share of
recent rows has used makes room. An expert's rows are computed by themselves: neither budget nor order changes a bit.

Legend: T rows, K experts per row, E experts, d hidden. An expert's key is its number among those of all layers.
"""

from __future__ import annotations

import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hadal.config import ModelConfig
from hadal.device import memory_available
from hadal.kernels.cpu.joblist import JobList
from hadal.kernels.cpu.packed import KEEP_FROM, Packed, Packing, packed_weights
from hadal.kernels.cpu.slots import Slots
from hadal.kernels.cpu.target import CpuError
from hadal.kernels.cpu.team import Team
from hadal.kernels.cpu.weights import Lookup

_LOOK_AHEAD = 8  # more rows than that ask for most experts of a layer anyway
_MEASURED = 0.25  # seconds of reading that tell the disk's rate


@dataclass(frozen=True)
class Estimate:
    """What decoding one sequence is expected to take: bytes, bytes per second, and bytes per token.

    It supposes that all experts are used alike; real models prefer some, and then fewer are missing.
    """

    expert_bytes: int
    resident_bytes: int
    disk_rate: float
    memory_rate: float
    missing: float
    active: float

    @property
    def tokens_per_second(self) -> float:
        """The rate that reads from disk and from memory allow, one after the other."""
        return 1 / (self.missing / self.disk_rate + self.active / self.memory_rate)

    def __str__(self) -> str:
        return (
            f"{self.resident_bytes / 2**30:.2f} of {self.expert_bytes / 2**30:.2f} GiB of experts fit into memory; "
            f"{self.missing / 1e6:.1f} MB per token are expected to miss and the disk reads {self.disk_rate / 1e9:.2f} "
            f"GB/s: about {self.tokens_per_second:.2g} tokens/s"
        )


@dataclass(frozen=True)
class Placed:
    """Addresses of packed weights, what keeps them alive, and bytes of them that the system still counts as free."""

    addresses: dict[str, int]
    held: np.ndarray
    pending: int
    residency: Residency | None


def place_weights(
    config: ModelConfig, items: Sequence[Packing], identity: str | None, lookup: Lookup, expert_memory: int | None,
    release: Callable[[], None] | None,
) -> Placed:  # fmt: skip
    """Pack the weights, with a manager of experts where they are not all to be in memory.

    `expert_memory` is in bytes; None leaves it to what is free. Raises CpuError for a budget without room to work.
    """
    assert identity is not None or expert_memory is None
    budget = None if identity is None else _budget(items, expert_memory)
    packed = packed_weights(items, identity, on_disk=budget is not None, release=release)
    mapped = 0 if packed.file is None else _nbytes(items)
    if budget is None:
        return Placed(packed.addresses, packed.held, mapped, None)
    residency = Residency(config, items, packed, lookup, budget)
    pending = mapped - residency.estimate.expert_bytes + residency.estimate.resident_bytes
    return Placed(packed.addresses | residency.addresses, packed.held, pending, residency)


def _budget(items: Sequence[Packing], expert_memory: int | None) -> int | None:
    """Bytes for experts where not all of them get room."""
    stacks = [item for item in items if item.count > 1]
    experts, total = _nbytes(stacks), _nbytes(items)
    least = 2 * max((item.nbytes for item in stacks), default=0)
    if expert_memory is None:
        room = memory_available(torch.device("cpu")) * 5 // 8  # sequences and everybody else need some, too
        if total <= max(room, KEEP_FROM):
            return None
        expert_memory = max(room - (total - experts), least)
    if expert_memory < least:
        raise CpuError(f"expert_memory is {expert_memory} bytes; two experts of this model take {least}, the least")
    return expert_memory if expert_memory < experts else None


def _nbytes(items: Sequence[Packing]) -> int:
    return sum(item.nbytes * item.count for item in items)


class Residency:
    """Runs steps whose experts are not all in memory; `addresses` stand for those of their packed weights.

    Filling the slots begins at once and tells the disk's rate, for the `estimate`.
    """

    def __init__(
        self, config: ModelConfig, items: Sequence[Packing], packed: Packed, lookup: Lookup, budget: int
    ) -> None:
        stacks = [item for item in items if item.count > 1]
        nbytes, experts, active = stacks[0].nbytes, stacks[0].count, config.num_experts_per_tok
        assert packed.file is not None and all(s.nbytes == nbytes and s.count == experts for s in stacks)
        begins = [packed.offset(item.name) for item in stacks]
        self._experts, self._active, self._hidden = experts, active, config.hidden_size
        self.slots = Slots(
            packed.file, [b + e * nbytes for b in begins for e in range(experts)], nbytes, budget // nbytes
        )
        weakref.finalize(self, self.slots.close)
        self.addresses = {item.name: self.slots.address for item in stacks}
        self._tables: dict[int, np.ndarray] = {}
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}
        for i, layer in enumerate(config.layers):
            gate = f"layers.{i}.ffn.gate"
            if layer.routing == "hash":
                self._tables[i] = lookup(f"{gate}.tid2eid").numpy()
            else:
                self._gates[i] = lookup(f"{gate}.weight"), lookup(f"{gate}.bias").float()
        total, layers = _nbytes(stacks), len(config.layers)
        spread = [layer * experts + e for e in range(experts) for layer in range(layers)]
        disk = self.slots.fill(spread[: self.slots.count], _MEASURED)
        read = layers * active * nbytes
        self.estimate = Estimate(
            expert_bytes=total,
            resident_bytes=self.slots.count * nbytes,
            disk_rate=disk,
            memory_rate=self.slots.memory_rate(),
            missing=read * (1 - min(self.slots.count / (layers * experts), 1)),
            active=read + _nbytes(items) - total,
        )

    @property
    def hit_rate(self) -> float:
        """Of the experts that steps asked for, the share that was in memory when they did."""
        return self.slots.hits / max(self.slots.asked, 1)

    def run(self, team: Team, jobs: JobList, begin: int, end: int, step: np.ndarray, ids: np.ndarray) -> None:
        """Run the jobs from `begin` to `end` for a step on the tokens `ids` [T]."""
        layers = [i for i, part in enumerate(jobs.experts) if begin <= part.grouped and part.end <= end]
        with _uninterrupted():
            self.slots.expect(self._foresee(layers, ids, None))
            for n, layer in enumerate(layers, 1):
                part = jobs.experts[layer]
                team.run(jobs.table[begin : part.grouped], part.grouped - begin, step)
                self._multiply(team, jobs, layer, layers[n:], step, ids)
                begin = part.end
            if begin < end:
                team.run(jobs.table[begin:end], end - begin, step)

    def _multiply(
        self, team: Team, jobs: JobList, layer: int, later: Sequence[int], step: np.ndarray, ids: np.ndarray
    ) -> None:
        """The rest of a layer's expert jobs, group by group as experts arrive."""
        part, table = jobs.experts[layer], jobs.expert_groups
        groups = table[1 : 1 + 3 * table[0]].reshape(-1, 3).copy()  # (expert, first slot, rows)
        first = layer * self._experts
        whole = slice(first, first + self._experts)
        keys = first + groups[:, 0]
        self.slots.age(whole, keys, groups[:, 2] / len(ids), len(ids))
        self.slots.want(keys)
        team.run(jobs.table[part.grouped : part.begin], part.begin - part.grouped, step)
        self.slots.expect(self._foresee(later, ids, jobs))
        while len(keys):
            slots = self.slots.arrived(keys)
            here = slots >= 0
            ready = groups[here]
            ready[:, 0] = slots[here]
            table[0] = len(ready)
            table[1 : 1 + ready.size] = ready.ravel()
            team.run(jobs.table[part.begin : part.end], part.end - part.begin, step)
            self.slots.release(keys[here])
            keys, groups = keys[~here], groups[~here]

    def _foresee(self, layers: Sequence[int], ids: np.ndarray, jobs: JobList | None) -> list[int]:
        """Keys that the coming `layers` are likely to use; with `jobs` the layer before the first one has its input."""
        keys: list[int] = []
        for layer in layers:
            if layer in self._tables:
                chosen = np.unique(self._tables[layer][ids])
            elif layer == layers[0] and jobs is not None and layer in self._gates and len(ids) <= _LOOK_AHEAD:
                weight, bias = self._gates[layer]
                x = jobs.space["input"].rows(len(ids), self._hidden // 2).view(torch.bfloat16)
                scores = F.softplus(F.linear(x, weight.to(torch.bfloat16)).float()).sqrt() + bias
                chosen = scores.topk(self._active).indices.T.unique_consecutive().numpy()
            else:
                continue
            keys += (layer * self._experts + chosen).tolist()
        return keys


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait for the end of a step: half of one would leave its states useless."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[Any] = []
    signal.signal(signal.SIGINT, lambda *facts: came.append(facts))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if came:
        handler(*came[-1])
