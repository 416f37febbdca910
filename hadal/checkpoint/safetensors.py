"""The safetensors container: headers, zero-copy views and a writer that reproduces the reference library's bytes.

Written here because loading needs two things the library hides: where each tensor lies (one mapping, no copies) and a
message that says which file and tensor is broken. Layout: 8 bytes little-endian header length, a JSON header padded
with blanks to 8 bytes, then the payload without gaps.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hadal.checkpoint.names import DTYPE_BYTES

_MAX_HEADER = 100_000_000
_TORCH = {
    "BOOL": torch.bool, "I8": torch.int8, "U8": torch.uint8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_TAG = {dtype: tag for tag, dtype in _TORCH.items()}
# The library sorts a file's tensors by this rank, then by name, so that wide types stay aligned.
_RANK = [
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "BOOL",
]  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the tensor and the remedy in one sentence."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor inside a file; `offset` counts from the start of the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Payload bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A file's table of contents, in the file's own order."""

    file: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] | None


def dtype_tag(tensor: Tensor) -> str:
    """The container's name of a tensor's dtype."""
    return _TAG[tensor.dtype]


def read_header(file: Path) -> Header:
    """Read and check a file's header without touching its payload; CheckpointError when anything is inconsistent."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{file} has no complete safetensors header (it holds {size} bytes); fetch the file again"
            )
        text = stream.read(length)
    try:
        raw = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} has a damaged header ({error}); fetch the file again") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object; fetch the file again")
    metadata = raw.pop("__metadata__", None)
    if metadata is not None and not isinstance(metadata, dict):
        raise CheckpointError(f"{file} has `__metadata__` that is not a JSON object; fetch the file again")
    entries = {name: _entry(file, name, value, 8 + length) for name, value in raw.items()}
    _check_extent(file, entries, 8 + length, size)
    return Header(file, entries, metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return out


def _entry(file: Path, name: str, value: Any, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise CheckpointError(
                f"{file} describes tensor {name} without dtype, shape and offsets; fetch the file again"
            )
    if dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{file} stores tensor {name} as {dtype!r}, which no V4 checkpoint uses; fetch the official file"
        )
    if not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{file} gives tensor {name} the shape {shape}; fetch the file again")
    entry = Entry(file, name, dtype, tuple(shape), base + begin)
    if begin < 0 or end - begin != entry.nbytes:
        raise CheckpointError(
            f"{file} gives tensor {name} {end - begin} bytes, but {dtype} {list(shape)} needs {entry.nbytes}; "
            "fetch the file again"
        )
    return entry


def _check_extent(file: Path, entries: dict[str, Entry], base: int, size: int) -> None:
    position = base
    for entry in sorted(entries.values(), key=lambda e: (e.offset, e.nbytes)):
        if entry.offset != position:
            fault = "overlaps another tensor" if entry.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {entry.name} {fault}; fetch the file again")
        position += entry.nbytes
        if position > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {entry.name} ends at byte {position} of {size}; fetch the file again"
            )
    if position != size:
        raise CheckpointError(f"{file} has {size - position} bytes after its last tensor; fetch the file again")


class MappedFiles:
    """Zero-copy views of tensors; every file is mapped once, privately, and stays mapped while views of it live.

    Views that are not `writable` can be forgotten, and however large they are count as nobody's memory.
    """

    def __init__(self, writable: bool = True) -> None:
        self.writable = writable
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, entry: Entry) -> Tensor:
        """The tensor as stored; a copy only where its bytes lie unaligned."""
        if not math.prod(entry.shape):
            return torch.empty(entry.shape, dtype=_TORCH[entry.dtype])
        if entry.file not in self._maps:
            with entry.file.open("rb") as stream:
                access = mmap.ACCESS_COPY if self.writable else mmap.ACCESS_READ
                self._maps[entry.file] = mmap.mmap(stream.fileno(), 0, access=access)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            data = torch.frombuffer(self._maps[entry.file], dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        if data.data_ptr() % DTYPE_BYTES[entry.dtype]:
            data = data.clone()
        return data.view(_TORCH[entry.dtype]).view(entry.shape)

    def forget(self) -> None:
        """Give back the memory of what has been read; views read it again when they are used."""
        assert not self.writable
        for file, mapped in self._maps.items():
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
            if hasattr(os, "posix_fadvise"):
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class FileWriter:
    """Writes one file whose tensors are announced first and may then arrive in any order; a context manager.

    The file appears under its name only when complete. Tensors keep the announced order, or with `sort` the reference
    library's order.
    """

    def __init__(
        self,
        file: Path,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        *,
        metadata: dict[str, str] | None = None,
        sort: bool = True,
    ) -> None:
        announced = list(tensors)
        if sort:
            announced.sort(key=lambda t: (_RANK.index(t[1]), t[0]))
        header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
        self._entries: dict[str, Entry] = {}
        position = 0
        for name, dtype, shape in announced:
            entry = self._entries[name] = Entry(file, name, dtype, shape, position)
            end = position + entry.nbytes
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self.nbytes = position
        self._file, self._partial = file, file.with_name(file.name + ".partial")
        self._base = 8 + len(text)
        self._missing = {entry.name: entry.nbytes for entry in self._entries.values()}
        self._stream = self._partial.open("wb")
        self._stream.write(struct.pack("<Q", len(text)) + text)
        self._stream.truncate(self._base + position)

    def write(self, name: str, tensor: Tensor, element: int = 0) -> None:
        """Store a tensor, or the part of it that starts at flat `element`."""
        entry = self._entries[name]
        assert dtype_tag(tensor) == entry.dtype, (name, tensor.dtype, entry.dtype)
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        self._missing[name] -= data.nbytes
        assert self._missing[name] >= 0, f"{name} written twice"
        self._stream.seek(self._base + entry.offset + element * DTYPE_BYTES[entry.dtype])
        self._stream.write(data.data)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is not None:
            self._partial.unlink()
            return
        unwritten = [name for name, left in self._missing.items() if left]
        assert not unwritten, f"never written: {unwritten[:3]}"
        os.replace(self._partial, self._file)
