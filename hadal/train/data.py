"""Documents to packed micro-batches: tokenised pieces in a memory-mapped cache, best-fit packs, a resumable sampler.

Sits between hadal.train.corpus and the loop. A piece never crosses a document's border and a pack never cuts a piece;
only documents longer than the context are cut. Legend: T tokens of a micro-batch.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from hadal.text import Tokenizer, tokens
from hadal.train.corpus import Document

_SHORTEST = 16  # a shorter remainder of a cut document is dropped


@dataclass(frozen=True)
class Batch:
    """Whole documents end to end: ids [T], whether each token is a target [T], document borders 0 .. T."""

    ids_T: Tensor
    counted_T: Tensor
    cu_seqlens: list[int]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(self.ids_T.to(device), self.counted_T.to(device), self.cu_seqlens)


@dataclass(frozen=True)
class Store:
    """Tokenised pieces of one source: ids and target flags, memory-mapped, with the offset of every piece."""

    ids: Tensor
    counted: Tensor
    offsets: list[int]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> list[int]:
        """Tokens of every piece."""
        return [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]


def tokenise(
    document: Document, tokenizer: Tokenizer, render: Callable[[Document], list[int]], context: int, fim: Random | None
) -> list[tuple[list[int], list[bool]]]:
    """The document's pieces of at most `context` ids with their target flags.

    Chats come from `render`, prose gets BOS and EOS. With `fim` a piece of prose becomes prefix, suffix, middle behind
    the FIM tokens (report 4.1). In a chat whose prompts are not learned, targets run from after the assistant token and
    its think token to EOS.
    """
    if document.messages:
        ids = render(document)
        flags = [True] * len(ids) if document.learn_prompt else _assistant_flags(ids, tokenizer)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(document.text, control=False), tokenizer.eos_id]
        flags = [True] * len(ids)
    pieces = []
    for start in range(0, len(ids), context):
        piece, flag = ids[start : start + context], flags[start : start + context]
        if start and len(piece) < _SHORTEST:
            break
        if fim is not None and not document.messages and len(piece) >= _SHORTEST:
            piece = _fill_in_middle(piece, tokenizer, context, fim)
            flag = [True] * len(piece)
        if any(flag):
            pieces.append((piece, flag))
    return pieces


def _assistant_flags(ids: list[int], tokenizer: Tokenizer) -> list[bool]:
    assistant = tokenizer.token_id(tokens.ASSISTANT)
    flags, inside = [], -1  # position within the assistant's turn, -1 outside
    for token in ids:
        if token == assistant:
            inside = 0
            flags.append(False)
            continue
        inside += inside >= 0
        flags.append(inside > 1)  # position 1 is <think> or </think>, which the prompt supplies
        if token == tokenizer.eos_id:
            inside = -1
    return flags


def _fill_in_middle(piece: list[int], tokenizer: Tokenizer, context: int, random: Random) -> list[int]:
    body = [i for i in piece if i not in (tokenizer.bos_id, tokenizer.eos_id)][: context - 5]
    low, high = sorted(random.randint(0, len(body)) for _ in range(2))
    begin, hole, end = (tokenizer.token_id(t) for t in (tokens.FIM_BEGIN, tokens.FIM_HOLE, tokens.FIM_END))
    prefix, middle, suffix = body[:low], body[low:high], body[high:]
    return [tokenizer.bos_id, begin, *prefix, hole, *suffix, end, *middle, tokenizer.eos_id]


def build_store(
    path: Path,
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    render: Callable[[Document], list[int]],
    *,
    context: int,
    fim_rate: float = 0.0,
    seed: int = 0,
) -> Store:
    """The tokenised pieces of `documents`, from the files at `path`.* when they were built from the same input."""
    rendered = [render(document) for document in documents[:20] if document.messages]
    fingerprint = hashlib.sha256(repr((context, fim_rate, seed, tokenizer.source, rendered)).encode())
    for document in documents:
        fingerprint.update(repr(document).encode())
    meta_path = path.with_suffix(".json")
    if meta_path.exists():
        meta = json.loads(meta_path.read_text("utf-8"))
        if meta["fingerprint"] == fingerprint.hexdigest():
            return _map_store(path, meta["offsets"])
    random = Random(seed)
    dtype = torch.uint16 if tokenizer.vocab_size <= 2**16 else torch.int32
    offsets, ids, flags = [0], [], []
    for document in documents:
        fim = random if random.random() < fim_rate else None
        for piece, flag in tokenise(document, tokenizer, render, context, fim):
            ids += piece
            flags += flag
            offsets.append(len(ids))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path.with_suffix(".ids"), torch.tensor(ids, dtype=dtype))
    _write(path.with_suffix(".counted"), torch.tensor(flags, dtype=torch.uint8))
    meta = {"fingerprint": fingerprint.hexdigest(), "offsets": offsets}
    meta_path.write_text(json.dumps(meta), "utf-8")
    return _map_store(path, offsets)


def _write(path: Path, tensor: Tensor) -> None:
    path.write_bytes(bytes(tensor.untyped_storage()))


def _map_store(path: Path, offsets: list[int]) -> Store:
    total = offsets[-1]
    if not total:
        return Store(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.uint8), offsets)
    wide = path.with_suffix(".ids").stat().st_size // total == 4
    ids = torch.from_file(str(path.with_suffix(".ids")), size=total, dtype=torch.int32 if wide else torch.uint16)
    counted = torch.from_file(str(path.with_suffix(".counted")), size=total, dtype=torch.uint8)
    return Store(ids, counted, offsets)


def pack(lengths: Sequence[int], capacity: int, order: Iterable[int]) -> list[list[int]]:
    """Packs of at most `capacity` tokens: each piece goes, in `order`, where it leaves the least room (report 4.1)."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for piece in order:
        length = lengths[piece]
        assert length <= capacity
        at = bisect.bisect_left(room, (length, 0))
        if at < len(room):
            free, index = room.pop(at)
        else:
            free, index = capacity, len(packs)
            packs.append([])
        packs[index].append(piece)
        bisect.insort(room, (free - length, index))
    return packs


def assemble(parts: Iterable[tuple[Store, Sequence[int]]]) -> Batch:
    """One batch of the named pieces of each store, in the order given."""
    ids, counted, borders = [], [], [0]
    for store, pieces in parts:
        for piece in pieces:
            start, end = store.offsets[piece], store.offsets[piece + 1]
            ids.append(store.ids[start:end].to(torch.int64))
            counted.append(store.counted[start:end].bool())
            borders.append(borders[-1] + end - start)
    return Batch(torch.cat(ids), torch.cat(counted), borders)


@dataclass(frozen=True)
class Mix:
    """From `start` (fraction of the run) on, packs are drawn in these proportions by source."""

    start: float
    weights: dict[str, float]


@dataclass
class Sampler:
    """Draws packs of several sources in changing proportions; its whole future follows from `state_dict`."""

    stores: dict[str, Store]
    mixes: Sequence[Mix]
    context: int
    seed: int = 0
    _packs: dict[str, list[list[int]]] = field(init=False, default_factory=dict)
    _orders: dict[str, list[int]] = field(init=False, default_factory=dict)
    _state: dict[str, list[float]] = field(init=False, default_factory=dict)  # source: epoch, cursor, credit

    def __post_init__(self) -> None:
        for name, store in self.stores.items():
            order = list(range(len(store)))
            Random(f"{self.seed} {name}").shuffle(order)
            self._packs[name] = pack(store.lengths(), self.context, order)
        for mix in self.mixes:
            empty = [name for name in mix.weights if not self._packs.get(name)]
            assert not empty, f"no pieces for {empty}"

    def draw(self, progress: float, packs: int) -> Batch:
        """A micro-batch of `packs` packs for a run that has come to `progress` in [0, 1]."""
        weights = [m.weights for m in self.mixes if m.start <= progress][-1]
        parts = []
        for _ in range(packs):
            name = self._pick(weights)
            parts.append((self.stores[name], self._next(name)))
        return assemble(parts)

    def _pick(self, weights: dict[str, float]) -> str:
        """Smooth weighted round robin: every draw pays each source its share and charges the richest one."""
        total = sum(weights.values())
        for name, weight in weights.items():
            self._entry(name)[2] += weight / total
        best = max(weights, key=lambda name: self._entry(name)[2])
        self._entry(best)[2] -= 1
        return best

    def _next(self, name: str) -> list[int]:
        entry = self._entry(name)
        epoch, cursor = int(entry[0]), int(entry[1])
        if cursor == 0 or name not in self._orders:
            self._orders[name] = list(range(len(self._packs[name])))
            Random(f"{self.seed} {name} {epoch}").shuffle(self._orders[name])
        chosen = self._packs[name][self._orders[name][cursor]]
        cursor += 1
        entry[0], entry[1] = (epoch + 1, 0) if cursor == len(self._packs[name]) else (epoch, cursor)
        return chosen

    def _entry(self, name: str) -> list[float]:
        return self._state.setdefault(name, [0, 0, 0.0])

    def epochs(self) -> dict[str, float]:
        """How often each source has been read, of those that have been drawn."""
        return {n: round(s[0] + s[1] / len(self._packs[n]), 2) for n, s in self._state.items() if s[0] or s[1]}

    def state_dict(self) -> dict[str, Any]:
        """Epoch, cursor and credit of every source."""
        return {name: list(entry) for name, entry in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._orders.clear()
        self._state = {name: list(entry) for name, entry in state.items()}
