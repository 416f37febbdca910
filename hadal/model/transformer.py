"""Model: DeepSeek-V4 on ragged tokens, from token ids to logits.

Many sequences lie end to end without padding; per-token work runs on all of them at once, per-sequence work follows the
spans. A forward pass continues the sequences' states, so prefill in chunks of any size and single steps compute the
one-shot function.

Legend: T packed tokens, S sequences, N streams, d hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hadal.config import ModelConfig
from hadal.kernels import IndexerLoss, KernelTable, Numerics, kernel_table
from hadal.kernels.pages import Page, PagePool
from hadal.model.attention import TrainingTrace
from hadal.model.block import Block
from hadal.model.draft import DsparkStage, MtpBlock
from hadal.model.drafter import Drafter, DsparkDrafter, Fed, MtpDrafter
from hadal.model.initial import init_weights
from hadal.model.mhc import StreamCollapse
from hadal.model.moe import Routing
from hadal.model.spans import Batch
from hadal.model.state import SequenceState, StatePlan, fresh_draft, fresh_state, plan_state, restore_state, state_key

if TYPE_CHECKING:
    from hadal.kernels.cpu.runner import CpuRunner

Ids = Tensor | Sequence[int]
_STEP_ROWS = 2048  # of plain torch


class InputError(ValueError):
    """Token ids or lengths that the model cannot take."""


@dataclass(frozen=True)
class TrainingOutput:
    """What a training pass gives to the losses.

    The hidden states are those after the final norm, so that a loss may fuse the head's product: row i of `hidden_TD`
    predicts token i+1, row i of `mtp_hidden_TD` token i+2. `routing` lists every MoE layer in order, MTP last.
    `indexer_kl` is the mean over queries and CSA layers, `indexer_captured` is 1 - KL/KL(uniform).
    """

    hidden_TD: Tensor
    mtp_hidden_TD: Tensor | None
    head_VD: Tensor
    routing: list[Routing]
    indexer_kl: Tensor | None
    indexer_captured: float | None

    @property
    def logits_TV(self) -> Tensor:
        """The main head's logits, FP32; built anew at each access."""
        return F.linear(self.hidden_TD.float(), self.head_VD.float())

    @property
    def mtp_logits_TV(self) -> Tensor | None:
        """The MTP head's logits, FP32; built anew at each access."""
        return None if self.mtp_hidden_TD is None else F.linear(self.mtp_hidden_TD.float(), self.head_VD.float())


class Model(nn.Module):
    """A V4 model with its draft head.

    Parameters are created in FP32 and uninitialised; `hadal.load_model` places loaded ones in the carrier's type,
    `init_weights` fills them for training. `backend` names a kernel table or is one.
    """

    def __init__(
        self, config: ModelConfig, numerics: Numerics | None = None, backend: str | KernelTable = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.numerics = num = numerics or Numerics()
        self.ops = ops = kernel_table(backend)
        self.runner: CpuRunner | None = None  # computes main layers, head and MTP block in place of the modules
        self.fed = Fed()
        self.identity = uuid4().hex  # of the weights; a loader names those of a checkpoint
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Block(config, layer, num, ops) for layer in config.layers)
        self.hc_head = StreamCollapse(config, ops)
        self.norm = nn.Parameter(torch.empty(config.hidden_size))
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        if config.draft == "dspark":
            stages = enumerate(config.draft_layers)
            self.draft = nn.ModuleList(DsparkStage(config, d, num, ops, i) for i, d in stages)
        else:
            self.draft = nn.ModuleList(MtpBlock(config, d, num, ops) for d in config.draft_layers)

    @property
    def blocks(self) -> list[Block]:
        """The main layers."""
        return cast(list[Block], list(self.layers))

    @property
    def mtp_block(self) -> MtpBlock:
        """The MTP block of a model whose draft head is one."""
        return cast(MtpBlock, self.draft[0])

    @property
    def dspark_stages(self) -> list[DsparkStage]:
        """The stages of a model whose draft head is DSpark."""
        return cast(list[DsparkStage], list(self.draft))

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.norm.device

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Random weights for training from scratch."""
        init_weights(self, generator)

    def new_state(self) -> SequenceState:
        """The state of a sequence before its first token."""
        if self.runner is None:
            return fresh_state(self._state_plan, self.pool, self.device)
        return self._with_draft(self.runner.new_state())

    def restore_state(self, home: bytes, pages: Sequence[Page]) -> SequenceState:
        """The state of which `dump` gave `home`, on its full pages and an open one that is nobody else's."""
        if self.runner is None:
            return restore_state(self._state_plan, self.pool, self.device, home, pages)
        return self._with_draft(self.runner.restore_state(home, pages))

    @property
    def pool(self) -> PagePool:
        """Where the pages of its states come from."""
        return self._pool if self.runner is None else self.runner.pool

    @property
    def home_bytes(self) -> int:
        """Bytes of a state besides its pages."""
        return self._state_plan.home_bytes if self.runner is None else self.runner.places.home_bytes

    @cached_property
    def state_key(self) -> str:
        """Names everything that a state's bytes depend on besides its tokens."""
        facts = (self.config, self.numerics, self.ops.operators(), self.device.type, self.identity)
        return state_key(*facts) if self.runner is None else self.runner.state_key

    @cached_property
    def _state_plan(self) -> StatePlan:
        return plan_state(self.config, self.numerics)

    @cached_property
    def _pool(self) -> PagePool:
        return PagePool(self._state_plan.page_bytes, self.device)

    def _with_draft(self, state: Any) -> SequenceState:
        """A runner's state with that of the draft blocks which it does not run."""
        if self.config.draft == "dspark":
            state.draft = fresh_draft(self.config, self.numerics, self.device)
        return cast(SequenceState, state)

    @property
    def drafter(self) -> Drafter | None:
        """What proposes tokens after each `advance`, if the model has a draft head."""
        kind = {"none": None, "mtp": MtpDrafter, "dspark": DsparkDrafter}[self.config.draft]
        return kind and kind(self)

    def step_rows(self, longest: int) -> int:
        """Rows that one `advance` should take for a draft to follow, if its longest sequence ends at `longest`."""
        return self.runner.step_rows(longest) if self.runner is not None else _STEP_ROWS

    @torch.no_grad()
    def logits(self, token_ids: Ids, state: SequenceState | None = None) -> Tensor:
        """Logits [T, V] in FP32 after each of the given tokens, which continue `state` (a fresh one by default)."""
        ids = self._ids(token_ids)
        return self.logits_ragged(ids, [len(ids)], [state or self.new_state()], last_only=False)

    def logits_ragged(
        self, token_ids_T: Ids, lengths: Sequence[int], states: Sequence[SequenceState], last_only: bool = True
    ) -> Tensor:
        """Continue S sequences by `lengths` tokens each, packed end to end; states advance.

        Returns FP32 logits [S, V] after each sequence's last token, or [T, V] after every token.
        """
        return self._advance(token_ids_T, lengths, states, [1] * len(lengths) if last_only else lengths)[0]

    def advance(
        self, token_ids_T: Ids, lengths: Sequence[int], states: Sequence[SequenceState], wanted: Sequence[int]
    ) -> Tensor:
        """As `logits_ragged`, but with FP32 logits [sum(wanted), V] after the last `wanted[s]` tokens of each sequence.

        Keeps what the drafter needs until the next call; `step_rows` says of how many rows.
        """
        starts = [state.position for state in states]
        logits, rows = self._advance(token_ids_T, lengths, states, wanted)
        if self.config.draft != "none":
            self.fed.keep(states, starts, lengths, rows)
        return logits

    def _advance(
        self, token_ids_T: Ids, lengths: Sequence[int], states: Sequence[SequenceState], wanted: Sequence[int]
    ) -> tuple[Tensor, Tensor | None]:
        """The wanted logits, and the rows that a drafter reads: taps or, without a runner, streams."""
        if self.runner is not None:
            ids = self._ids(token_ids_T)
            _check_lengths(ids, lengths, states)
            return self.runner.advance(ids, lengths, cast(Any, states), wanted)
        x, means = self.streams(token_ids_T, lengths, states)
        ends = accumulate(lengths)
        rows = [row for end, count in zip(ends, wanted, strict=True) for row in range(end - count, end)]
        return self.head_logits(x[rows]), x if means is None else means

    @torch.no_grad()
    def streams(
        self, token_ids_T: Ids, lengths: Sequence[int], states: Sequence[SequenceState]
    ) -> tuple[Tensor, Tensor | None]:
        """As `logits_ragged`, but returns the streams [T, N, d] before the head and any DSpark taps [T, taps*d]."""
        ids = self._ids(token_ids_T)
        _check_lengths(ids, lengths, states)
        if self.runner is not None:
            return self.runner.streams(ids, lengths, cast(Any, states))
        batch = Batch.from_states(lengths, states, self.device)
        x, _, taps = self._run(self._tensor(ids), batch, list(states), None)
        for state, length in zip(states, lengths, strict=True):
            state.position += length
        return x, taps

    @torch.no_grad()
    def head_logits(self, x_TND: Tensor) -> Tensor:
        """FP32 logits [T, V] of the main head."""
        return self._head(self._hidden(x_TND, self.hc_head, self.norm))

    @torch.no_grad()
    def mtp_logits(
        self, x_TND: Tensor, next_ids_T: Tensor, lengths: Sequence[int], states: Sequence[SequenceState]
    ) -> Tensor:
        """MTP logits [T, V]: row i takes the streams at i and token i+1 and predicts token i+2.

        `states` are those the streams came from, already past the given tokens; their draft part advances here.
        """
        ids = self._ids(next_ids_T)
        if self.runner is not None:
            return self.mtp_head(self.runner.mtp_streams(x_TND, ids, lengths, cast(Any, states)))
        return self.mtp_head(self.mtp_streams(x_TND, ids, self._follow(lengths, states)))

    @torch.no_grad()
    def mtp_streams(self, x_TND: Tensor, next_ids: list[int], batch: Batch) -> Tensor:
        """The streams [T, N, d] behind the MTP block, from which it may draft on."""
        return self._mtp(x_TND, self._tensor(next_ids), batch, None)[0]

    @torch.no_grad()
    def mtp_head(self, x_TND: Tensor) -> Tensor:
        """FP32 logits [T, V] of the MTP head."""
        return self._head(self._hidden(x_TND, self.mtp_block.hc_head, self.mtp_block.norm))

    @torch.no_grad()
    def dspark_remember(self, taps_TD: Tensor, lengths: Sequence[int], states: Sequence[SequenceState]) -> Tensor:
        """Fill the DSpark windows with committed positions (see `mtp_logits` for `states`); returns main_x [T, d]."""
        main = self.dspark_stages[0].main_hidden(taps_TD)
        batch = self._follow(lengths, states)
        for i, stage in enumerate(self.dspark_stages):
            stage.remember(main, batch, [state.draft[i] for state in states])
        return main

    @torch.no_grad()
    def dspark_block(self, anchor: int, state: SequenceState) -> tuple[Tensor, Tensor]:
        """Run one draft block for the token `anchor` sampled after the last committed position.

        Returns the collapsed hidden states [Q, d] before the norm and the base logits [Q, V] before the Markov bias.
        """
        length = self.config.dspark_block_size or 0
        ids = torch.full((length,), self.config.dspark_noise_token_id or 0, device=self.device)
        ids[0] = anchor
        x = self._embed(ids)
        for i, stage in enumerate(self.dspark_stages):
            x = stage.draft(x, ids, state.position, state.draft[i])
        last = self.dspark_stages[-1]
        hidden = last.hc_head(x)
        return hidden, self._head(self.ops.rms_norm(hidden, last.norm, self.config.rms_norm_eps))

    def training_forward(
        self, token_ids_T: Tensor, cu_seqlens: Sequence[int], *, dense: bool = False, indexer_loss: bool = True
    ) -> TrainingOutput:
        """One differentiable pass over whole documents packed end to end; documents do not see each other.

        `cu_seqlens` are the documents' borders (0 first, T last). `dense` lets CSA layers attend to every entry.
        """
        ids = self._tensor(self._ids(token_ids_T))
        if list(cu_seqlens[:1]) != [0] or cu_seqlens[-1] != len(ids) or sorted(set(cu_seqlens)) != list(cu_seqlens):
            raise InputError(f"cu_seqlens must rise from 0 to {len(ids)}; got {list(cu_seqlens)[:8]}")
        batch = Batch.from_documents(cu_seqlens, self.device)
        trace = TrainingTrace(dense, IndexerLoss() if indexer_loss else None)
        x, routing, _ = self._run(ids, batch, [None] * len(batch.spans), trace)
        mtp = None
        if self.config.draft == "mtp":
            x_mtp, mtp_routing = self._mtp(x, torch.roll(ids, -1), batch, trace)
            mtp = self._hidden(x_mtp, self.mtp_block.hc_head, self.mtp_block.norm)
            routing.append(mtp_routing)
        kl, captured = _indexer_result(trace.indexer_loss)
        return TrainingOutput(self._hidden(x, self.hc_head, self.norm), mtp, self.head, routing, kl, captured)

    def _follow(self, lengths: Sequence[int], states: Sequence[SequenceState]) -> Batch:
        """The batch the main layers saw last, for the draft head; its windows must not have missed a token."""
        for state, length in zip(states, lengths, strict=True):
            if state.draft_position != state.position - length:
                raise InputError(
                    f"the draft head has seen {state.draft_position} of {state.position - length} earlier tokens; "
                    "feed it after every pass of the main layers"
                )
            state.draft_position = state.position
        starts = [state.position - length for state, length in zip(states, lengths, strict=True)]
        return Batch.at(starts, lengths, states, self.device)

    def _run(
        self, ids_T: Tensor, batch: Batch, states: Sequence[SequenceState | None], trace: TrainingTrace | None
    ) -> tuple[Tensor, list[Routing], Tensor | None]:
        x = self._embed(ids_T)
        routing, taps = [], []
        for i, block in enumerate(self.blocks):
            x, routed = block(x, ids_T, batch, [s.layers[i] if s else None for s in states], trace)
            routing.append(routed)
            if i in self.config.dspark_target_layer_ids:
                taps.append((sum(x.float().unbind(1)) / x.shape[1]).to(x.dtype))
        return x, routing, torch.cat(taps, dim=-1) if taps else None

    def _mtp(
        self, x_TND: Tensor, next_ids_T: Tensor, batch: Batch, trace: TrainingTrace | None
    ) -> tuple[Tensor, Routing]:
        block = self.mtp_block
        x = block.join(x_TND, F.embedding(next_ids_T, self.embed).to(self.numerics.dtype))
        states = [s.state.draft[0] if s.state else None for s in batch.spans]
        out: tuple[Tensor, Routing] = block(x, next_ids_T, batch, states, trace)
        return out

    def _embed(self, ids_T: Tensor) -> Tensor:
        e = F.embedding(ids_T, self.embed).to(self.numerics.dtype)
        return e.unsqueeze(1).repeat(1, self.config.hc_mult, 1)

    def _hidden(self, x_TND: Tensor, collapse: nn.Module, norm: Tensor) -> Tensor:
        out: Tensor = self.ops.rms_norm(collapse(x_TND), norm, self.config.rms_norm_eps)
        return out

    def _head(self, hidden_TD: Tensor) -> Tensor:
        out: Tensor = self.ops.linear_f32(hidden_TD, self.head)
        return out

    def _ids(self, token_ids: Ids) -> list[int]:
        """Checked token ids; as a list, because a few tensor operations cost a small model a tenth of its step."""
        ids = token_ids
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            given = torch.as_tensor(ids)
            if given.dim() != 1 or not len(given) or given.is_floating_point():
                raise InputError(
                    f"token ids must be a non-empty list of integers, not {given.dtype} of shape {list(given.shape)}"
                )
            ids = given.tolist()
        low, high = min(ids), max(ids)
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(
                f"token id {low if low < 0 else high} lies outside the vocabulary of {self.config.vocab_size}"
            )
        return ids

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor(ids, device=self.device)


def _check_lengths(ids: list[int], lengths: Sequence[int], states: Sequence[object]) -> None:
    if len(lengths) != len(states) or sum(lengths) != len(ids) or min(lengths, default=0) < 1:
        raise InputError(f"lengths {list(lengths)} do not divide {len(ids)} tokens among {len(states)} sequences")
    if len({id(state) for state in states}) < len(states):
        raise InputError("one state stands for two sequences of the call; clone it for the second")


def _indexer_result(loss: IndexerLoss | None) -> tuple[Tensor | None, float | None]:
    if loss is None or not loss.queries:
        return None, None
    kl, uniform = torch.stack(loss.kl).sum(), torch.stack(loss.uniform).sum()
    captured = 1 - float(kl.detach()) / float(uniform) if float(uniform) > 0 else 1.0
    return kl / loss.queries, captured
