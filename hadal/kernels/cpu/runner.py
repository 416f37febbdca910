"""CpuRunner: the main layers and the head of a model as one list of jobs, run by one native call per step.

A step holds at most `max_rows` packed rows; longer calls are cut into steps, which changes no bit.

Legend: T packed rows, S sequences, V vocabulary, N streams, d hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from hadal.config import CSA_RATIO, ModelConfig
from hadal.kernels.cpu.joblist import JobList
from hadal.kernels.cpu.jobs import build_jobs
from hadal.kernels.cpu.layout import KEYS, SPAN, STEP, Shapes, place_layers
from hadal.kernels.cpu.memory import CpuState, Scratch, address, buffer, packed_weights
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.team import team
from hadal.kernels.cpu.weights import Lookup, plan_packing
from hadal.kernels.pages import Page, PagePool

MAX_ROWS = 256  # more would push intermediate values out of the second cache
ROWS_PER_EXPERT = 32  # but an expert's weights are read once per step, and so few rows should share that
MOST_ROWS = 2048
_SCORE_BYTES = 1 << 26  # index scores held at once: behind long contexts a step takes fewer rows


@dataclass(frozen=True)
class _Piece:
    """Part of a sequence's new tokens that one step computes."""

    state: CpuState
    first: int  # index of its first token among all of the call
    length: int
    ends: bool  # whether the sequence's last new token is in it


class CpuRunner:
    """Runs one model on one instruction set; not thread-safe, like the engine above it.

    `frequencies` are the rotary frequencies [R/2] of plain and of compressed layers. With an `identity` of the
    checkpoint the packed weights are kept on disk.
    """

    def __init__(
        self, config: ModelConfig, isa: Isa, lookup: Lookup, frequencies: Sequence[Tensor], identity: str | None
    ) -> None:
        self.config, self.isa = config, isa
        self.shapes = Shapes.of(config)
        self.places = place_layers(config, self.shapes)
        self.pool = PagePool(self.places.page_bytes)
        wanted = ROWS_PER_EXPERT * config.n_routed_experts // config.num_experts_per_tok
        self.max_rows = min(max(wanted, MAX_ROWS), MOST_ROWS)
        plan = plan_packing(config, lookup)
        packed, self._held = packed_weights(plan.items, identity)
        self._team = team(isa)
        self._jobs: JobList = build_jobs(
            config, isa, self.shapes, self.places, plan, packed, lookup, frequencies, self.max_rows
        )
        self._arrays = {name: np.zeros(self.max_rows, np.int64) for name in ("ids", "positions", "span_of", "wanted")}
        self._spans = np.zeros((self.max_rows, len(SPAN)), np.int64)
        self._step = np.zeros(len(STEP), np.int64)
        for name, array in self._arrays.items():
            self._set(name, address(array))
        self._set("span_table", address(self._spans))
        self._set("angles", self._jobs.space["angles"].address)
        self._indexed = any(layer.attention == "csa" for layer in config.layers)
        self._windows, self._entries, self._scores, self._threads = Scratch(), Scratch(), Scratch(), Scratch()

    def new_state(self) -> CpuState:
        """The state of a sequence before its first token."""
        return CpuState(self.places, self.pool, buffer(self.places.home_bytes))

    def restore_state(self, home: bytes, pages: Sequence[Page]) -> CpuState:
        """The state that `CpuState.dump` wrote; it reads full pages and takes the open one for its own."""
        state = self.new_state()
        state.position, state.peak = map(int, np.frombuffer(home, np.int64, 2))
        state.home[:] = np.frombuffer(home, np.uint8, offset=16)
        state.adopt(pages)
        return state

    def logits(self, ids_T: Tensor, lengths: Sequence[int], states: Sequence[CpuState], last_only: bool) -> Tensor:
        """FP32 logits after each sequence's last token [S, V], or after every token [T, V]; states advance."""
        width = self._jobs.logits_width
        logits = torch.empty(len(lengths) if last_only else len(ids_T), width)
        filled = 0
        for pieces in self._steps(lengths, states):
            self._prepare(pieces, ids_T.numpy())
            rows = _wanted_rows(pieces, last_only)
            self._arrays["wanted"][: len(rows)] = rows
            self._set("wanted_rows", len(rows))
            self._jobs.head_group[3] = len(rows)
            self._jobs.set("logits", address(logits) + filled * width * 4)
            _advance(pieces)  # first: a step that an interrupt waits for is finished all the same
            self._team.run(self._jobs.table, self._jobs.count if rows else self._jobs.before_head, self._step)
            filled += len(rows)
        return logits[:, : self.config.vocab_size]

    def streams(
        self, ids_T: Tensor, lengths: Sequence[int], states: Sequence[CpuState], taps: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """The residual streams [T, N, d] after the last layer, and their means after the layers `taps` [T, taps*d]."""
        n, d = self.shapes.streams, self.shapes.hidden
        out, means = torch.empty(len(ids_T), n, d), torch.empty(len(ids_T), len(taps), d)
        done = 0
        for pieces in self._steps(lengths, states):
            rows = self._prepare(pieces, ids_T.numpy())
            _advance(pieces)
            begun = 0
            for i, layer in enumerate((*taps, len(self.config.layers) - 1)):
                stop = self._jobs.after_layer[layer]
                self._team.run(self._jobs.table[begun:stop], stop - begun, self._step)
                begun = stop
                here = self._jobs.space["streams"].rows(rows, n * d).view(rows, n, d)
                if i < len(taps):
                    means[done : done + rows, i] = here.mean(1)
                else:
                    out[done : done + rows] = here
            done += rows
        return out, means.flatten(1) if taps else None

    def site(self, layer: int, name: str, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """One layer's "attention" or "experts" alone on given BF16 inputs of a fresh sequence, FP32 [T, d]."""
        begin, end = self._jobs.sites[layer, name]
        assert len(ids_T) <= self.max_rows
        pieces = [_Piece(self.new_state(), 0, len(ids_T), True)]  # held: the jobs write into its memory
        rows = self._prepare(pieces, ids_T.numpy())
        self._team.run(self._jobs.table[:2], 2, self._step)  # angles and embedding
        space, d = self._jobs.space, self.shapes.hidden
        space["input"].rows(rows, d // 2)[:] = x_TD.to(torch.bfloat16).contiguous().view(torch.float32)
        self._team.run(self._jobs.table[begin:end], end - begin, self._step)
        if name == "attention":
            return space["site_value"].rows(rows, d).clone()
        maps = space["maps"].rows(rows, 32)  # nothing of the streams, all of the output
        maps.zero_()
        maps[:, 4:8] = 1.0
        self._team.run(self._jobs.table[self._jobs.before_head - 1 :], 1, self._step)
        return space["streams"].rows(rows, d).clone()

    def _steps(self, lengths: Sequence[int], states: Sequence[CpuState]) -> list[list[_Piece]]:
        room = self.max_rows
        if self._indexed:
            longest = max(state.position + length for state, length in zip(states, lengths, strict=True))
            room = max(1, min(room, _SCORE_BYTES // (4 * max(longest // CSA_RATIO, 1))))
        steps: list[list[_Piece]] = [[]]
        left, first = room, 0
        for state, length in zip(states, lengths, strict=True):
            begun = 0
            while begun < length:
                if not left:
                    steps.append([])
                    left = room
                part = min(left, length - begun)
                steps[-1].append(_Piece(state, first + begun, part, begun + part == length))
                begun += part
                left -= part
            first += length
        return steps

    def _prepare(self, pieces: Sequence[_Piece], ids: np.ndarray) -> int:
        """Fill the step's words and arrays; returns its rows."""
        ends = [p.state.position + p.length for p in pieces]
        window = [self._window_blocks(p.length) for p in pieces]
        entries = [self._jobs.entry_bytes(end) for end in ends]
        windows = self._windows.reserve(sum(window) * self.shapes.block_bytes)
        unpacked = self._entries.reserve(sum(entries))
        row = 0
        for s, piece in enumerate(pieces):
            start = piece.state.position
            assert piece.state.places is self.places, "a state of another model"
            piece.state.extend(ends[s])
            here = slice(row, row + piece.length)
            self._arrays["ids"][here] = ids[piece.first : piece.first + piece.length]
            self._arrays["positions"][here] = np.arange(start, ends[s]) if piece.length > 1 else start
            self._arrays["span_of"][here] = s
            self._spans[s] = (
                start, piece.length, row, piece.state.home_address, piece.state.table_address,
                windows if window[s] else 0, window[s], unpacked,
            )  # fmt: skip
            windows += window[s] * self.shapes.block_bytes
            unpacked += entries[s]
            row += piece.length
        self._set("rows", row)
        self._set("spans", len(pieces))
        self._jobs.plain_group[3] = row
        self._jobs.output_groups[3::3] = row
        threads = torch.get_num_threads()
        each = self._jobs.thread_bytes(max(ends))
        self._jobs.set("scratch", self._threads.reserve(threads * each))
        self._jobs.set("scratch_step", each)
        self._jobs.set_scores(self._scores, row, max(ends))
        return row

    def _window_blocks(self, length: int) -> int:
        """Key blocks for the window of a span too long for the ring."""
        return 0 if length <= KEYS else (self.shapes.window + length) // KEYS + 2

    def _set(self, name: str, value: int) -> None:
        self._step[STEP.index(name)] = value


def _advance(pieces: Sequence[_Piece]) -> None:
    for piece in pieces:
        piece.state.position += piece.length


def _wanted_rows(pieces: Sequence[_Piece], last_only: bool) -> list[int]:
    """Rows of a step whose logits are asked for."""
    ends = list(accumulate(p.length for p in pieces))
    return [end - 1 for end, p in zip(ends, pieces, strict=True) if p.ends] if last_only else list(range(ends[-1]))
