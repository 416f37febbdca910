"""CpuRunner: the main layers and the head of a model as one list of jobs, run by one native call per step.

A step holds at most `max_rows` packed rows; longer calls are cut into steps, which changes no bit.

Legend: T packed rows, S sequences, V vocabulary, N streams, d hidden.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import add
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor

from hadal.config import CSA_RATIO, ModelConfig
from hadal.kernels.cpu.emission import source_digest
from hadal.kernels.cpu.joblist import JobList, Part
from hadal.kernels.cpu.jobs import build_jobs
from hadal.kernels.cpu.layout import KEYS, SPAN, STEP, Shapes, place_layers
from hadal.kernels.cpu.memory import CpuState, Scratch, address, buffer
from hadal.kernels.cpu.program import JOB_WORDS, WORD
from hadal.kernels.cpu.residency import place_weights
from hadal.kernels.cpu.target import Isa
from hadal.kernels.cpu.team import team
from hadal.kernels.cpu.weights import Lookup, plan_packing
from hadal.kernels.pages import Page, PagePool

MAX_ROWS = 256  # more would push intermediate values out of the second cache
ROWS_PER_EXPERT = 32  # but an expert's weights are read once per step, and so few rows should share that
MOST_ROWS = 2048
_ROW_ARRAYS = 5
_SCORE_BYTES = 1 << 26  # index scores held at once: behind long contexts a step takes fewer rows


class _Piece(NamedTuple):
    """Part of a sequence's new tokens that one step computes."""

    state: CpuState
    start: int  # position of its first token
    length: int
    first: int  # index of its first token among all of the call
    wanted: int  # how many of its last rows give logits


class CpuRunner:
    """Runs one model on one instruction set; not thread-safe, like the engine above it.

    `frequencies` are the rotary frequencies [R/2] of plain and of compressed layers. With an `identity` of the
    checkpoint the packed weights are kept on disk, and of the experts no more than `expert_memory` bytes in memory;
    `release` gives back memory of weights that have been read. `pending_bytes` are those that weights still take of the
    memory that counts as free.
    """

    def __init__(
        self,
        config: ModelConfig,
        isa: Isa,
        lookup: Lookup,
        frequencies: Sequence[Tensor],
        identity: str | None,
        expert_memory: int | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.config, self.isa = config, isa
        self.shapes = Shapes.of(config)
        self.places = place_layers(config, self.shapes)
        self.pool = PagePool(self.places.page_bytes)
        facts = f"{identity or uuid4()};{isa};{self.places};{source_digest()}"
        self.state_key = hashlib.sha256(facts.encode()).hexdigest()  # all that a state's bytes depend on but the tokens
        wanted = ROWS_PER_EXPERT * config.n_routed_experts // config.num_experts_per_tok
        self.max_rows = min(max(wanted, MAX_ROWS), MOST_ROWS)
        plan = plan_packing(config, lookup)
        self._placed = placed = place_weights(config, plan.items, identity, lookup, expert_memory, release)
        self.residency, self.pending_bytes = placed.residency, placed.pending
        self._team = team(isa)
        self._jobs: JobList = build_jobs(
            config, isa, self.shapes, self.places, plan, placed.addresses, lookup, frequencies, self.max_rows
        )
        self._words = np.zeros(self.max_rows * (_ROW_ARRAYS + len(SPAN)), np.int64)
        self._words_address = address(self._words)
        self._step = np.zeros(len(STEP), np.int64)
        self._step_address, self._table = address(self._step), address(self._jobs.table)
        self._rows = 0  # of the last pass
        self._angles = self._jobs.space["angles"].address
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

    def advance(
        self, ids: Sequence[int], lengths: Sequence[int], states: Sequence[CpuState], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """FP32 logits [sum(wanted), V] after each sequence's last `wanted` tokens; states advance.

        Also the means of the streams after the layers that a DSpark head taps [T, taps*d].
        """
        logits, filled = self._logits(sum(wanted)), 0
        taps: list[Tensor] = []
        for pieces in self._steps(lengths, states, [state.position for state in states], wanted):
            rows, asked = self._begin(pieces, ids)
            self._run_head(self._jobs.main, asked, logits[filled:] if filled else logits)
            filled += len(asked)
            taps += self._taps(rows)
        return self._cut(logits), torch.cat(taps) if taps else None

    def streams(
        self, ids: Sequence[int], lengths: Sequence[int], states: Sequence[CpuState]
    ) -> tuple[Tensor, Tensor | None]:
        """The residual streams [T, N, d] after the last layer, and the taps as from `advance`."""
        streams: list[Tensor] = []
        taps: list[Tensor] = []
        for pieces in self._steps(lengths, states, [state.position for state in states], [0] * len(states)):
            rows, _ = self._begin(pieces, ids)
            self._run(0, self._jobs.main.streams)
            streams.append(self._streams(rows).clone())
            taps += self._taps(rows)
        return torch.cat(streams), torch.cat(taps) if taps else None

    def follow(
        self, states: Sequence[CpuState], starts: Sequence[int], lengths: Sequence[int], sources: Sequence[int],
        ids: Sequence[int], wanted: Sequence[int],
    ) -> Tensor:  # fmt: skip
        """FP32 logits [W, V] of the rows `wanted` of a pass of the MTP block, whose streams replace the last pass's.

        Span s holds `lengths[s]` rows from position `starts[s]` on; row i takes the streams of row `sources[i]` of the
        last pass and the token `ids[i]`.
        """
        pieces = [_Piece(*piece, 0, 0) for piece in zip(states, starts, lengths, strict=True)]
        return self._follow(pieces, sources, ids, wanted)

    def _follow(
        self, pieces: Sequence[_Piece], sources: Sequence[int], ids: Sequence[int], wanted: Sequence[int]
    ) -> Tensor:
        assert max(sources) < self._rows, "rows of an earlier step; `step_rows` says how many one step takes"
        self._write(pieces, ids, wanted, [0] * len(pieces), sources)
        self._jobs.stream_group[3] = len(sources) * self.shapes.streams
        logits = self._logits(len(wanted))
        self._run_head(self._jobs.draft, wanted, logits)
        return self._cut(logits)

    def mtp_streams(
        self, x_TND: Tensor, ids: Sequence[int], lengths: Sequence[int], states: Sequence[CpuState]
    ) -> Tensor:
        """The MTP block's streams [T, N, d] from the main ones and the next tokens of the last `lengths` positions."""
        starts = [state.position - length for state, length in zip(states, lengths, strict=True)]
        parts = []
        for pieces in self._steps(lengths, states, starts, lengths):
            rows = range(sum(piece.length for piece in pieces))
            here = slice(pieces[0].first, pieces[0].first + len(rows))
            self._streams(len(rows))[:] = x_TND[here]
            self._rows = len(rows)
            self._follow(pieces, rows, ids[here], ())
            parts.append(self._streams(len(rows)).clone())
        return torch.cat(parts)

    def site(self, layer: int, name: str, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        """One layer's "attention" or "experts" alone on given BF16 inputs of a fresh sequence, FP32 [T, d]."""
        begin, end = self._jobs.sites[layer, name]
        assert len(ids_T) <= self.max_rows
        pieces = [_Piece(self.new_state(), 0, len(ids_T), 0, 0)]  # held: the jobs write into its memory
        rows, _ = self._begin(pieces, ids_T.tolist())
        self._run(0, 2)  # angles and embedding
        space, d = self._jobs.space, self.shapes.hidden
        space["input"].rows(rows, d // 2)[:] = x_TD.to(torch.bfloat16).contiguous().view(torch.float32)
        self._run(begin, end)
        if name == "attention":
            return space["site_value"].rows(rows, d).clone()
        maps = space["maps"].rows(rows, 32)  # nothing of the streams, all of the output
        maps.zero_()
        maps[:, 4:8] = 1.0
        self._run(*self._jobs.sites[len(self.config.layers), "sum"])
        return space["streams"].rows(rows, d).clone()

    def step_rows(self, longest: int) -> int:
        """Rows that one step takes when its longest sequence ends at position `longest`."""
        if not self._indexed:
            return self.max_rows
        return max(1, min(self.max_rows, _SCORE_BYTES // (4 * max(longest // CSA_RATIO, 1))))

    def _steps(
        self, lengths: Sequence[int], states: Sequence[CpuState], starts: Sequence[int], wanted: Sequence[int]
    ) -> list[list[_Piece]]:
        room = self.step_rows(max(map(add, starts, lengths)))
        steps: list[list[_Piece]] = [[]]
        left, first = room, 0
        for state, start, length, last in zip(states, starts, lengths, wanted, strict=True):
            begun = 0
            while begun < length:
                if not left:
                    steps.append([])
                    left = room
                part = min(left, length - begun)
                asked = max(0, min(part, begun + part - (length - last)))
                steps[-1].append(_Piece(state, start + begun, part, first + begun, asked))
                begun += part
                left -= part
            first += length
        return steps

    def _begin(self, pieces: Sequence[_Piece], ids: Sequence[int]) -> tuple[int, list[int]]:
        """Prepare a step of the main layers; returns its rows and those that give logits."""
        asked: list[int] = []
        sizes = []
        row = longest = 0
        for piece in pieces:
            end = piece.start + piece.length
            piece.state.extend(end)
            row += piece.length
            asked += range(row - piece.wanted, row)
            sizes.append(self._jobs.entry_bytes(end))
            longest = max(longest, end)
        first, unpacked = pieces[0].first, self._entries.reserve(sum(sizes))
        self._jobs.set_scores(self._scores, row, longest)
        self._write(pieces, ids[first : first + row], asked, list(accumulate(sizes, initial=unpacked)))
        for piece in pieces:  # first: a step that an interrupt waits for is finished all the same
            piece.state.position += piece.length
        return row, asked

    def _write(
        self, pieces: Sequence[_Piece], ids: Sequence[int], wanted: Sequence[int], entries: Sequence[int],
        sources: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Fill the step's words, all at once: each touch of an array costs a small model a hundredth of its step."""
        positions: list[int] = []
        span_of: list[int] = []
        spans: list[int] = []
        blocks = [self._window_blocks(piece.length) for piece in pieces]
        window, longest = self._windows.reserve(sum(blocks) * self.shapes.block_bytes), 0
        for s, (state, start, length, _, _) in enumerate(pieces):
            assert state.places is self.places, "a state of another model"
            spans += (
                start, length, len(positions), state.home_address, state.table_address, window if blocks[s] else 0,
                blocks[s], entries[s],
            )  # fmt: skip
            positions += range(start, start + length)
            span_of += [s] * length
            if blocks[s]:
                # What lies behind the last key has no weight, but a NaN that another sequence left there would show.
                last = (start + length - 1) // KEYS % blocks[s]
                ctypes.memset(window + last * self.shapes.block_bytes, 0, self.shapes.block_bytes)
            window += blocks[s] * self.shapes.block_bytes
            longest = max(longest, start + length)
        rows = self._rows = len(positions)
        words = [*ids, *positions, *span_of, *wanted, *sources, *spans]
        self._words[: len(words)] = words
        row_words, at = WORD * rows, self._words_address
        asked, source = at + 3 * row_words, at + 3 * row_words + WORD * len(wanted)
        span = source + WORD * len(sources)
        # In the order of STEP.
        self._step[:] = (
            rows, len(pieces), at, at + row_words, at + 2 * row_words, span, self._angles, asked, len(wanted), source
        )  # fmt: skip
        self._jobs.plain_group[3] = rows
        self._jobs.output_groups[3::3] = rows
        self._jobs.head_group[3] = len(wanted)
        each = self._jobs.thread_bytes(longest)
        self._jobs.set("scratch", self._threads.reserve(torch.get_num_threads() * each))
        self._jobs.set("scratch_step", each)

    def _logits(self, rows: int) -> Tensor:
        return torch.empty(rows, self._jobs.logits_width)

    def _cut(self, logits: Tensor) -> Tensor:
        """Without the columns that fill the last panel."""
        vocabulary = self.config.vocab_size
        return logits if logits.shape[1] == vocabulary else logits[:, :vocabulary]

    def _streams(self, rows: int) -> Tensor:
        """The first rows' streams [rows, N, d], where they lie."""
        n, d = self.shapes.streams, self.shapes.hidden
        return self._jobs.space["streams"].rows(rows, n * d).view(rows, n, d)

    def _run(self, begin: int, end: int) -> None:
        if self.residency is None:
            self._team.run_at(self._table + begin * (JOB_WORDS * WORD), end - begin, self._step_address)
        else:
            ids = self._words[: self._jobs.plain_group[3]]
            self.residency.run(self._team, self._jobs, begin, end, self._step, ids)

    def _taps(self, rows: int) -> list[Tensor]:
        width = len(self.config.dspark_target_layer_ids) * self.shapes.hidden
        return [self._jobs.space["taps"].rows(rows, width).clone()] if width else []

    def _run_head(self, part: Part, wanted: Sequence[int], logits: Tensor) -> None:
        """Run the jobs of a part; `logits` receives those of the rows `wanted`."""
        self._jobs.set("logits", address(logits))
        self._run(part.begin, part.end if wanted else part.streams)

    def _window_blocks(self, length: int) -> int:
        """Key blocks for the window of a span too long for the ring."""
        return 0 if length <= KEYS else (self.shapes.window + length) // KEYS + 2
