"""Snapshots of sequences in a folder, where they outlive the process; `hadal.engine.prefix` looks them up.

A file holds what earlier files lack: one line (a checksum, and JSON with the size and checksum of every part), the
pages from `begin` on, and the state's home. The pages before are its parent's, and so on back to the first token.
A thread writes each file under a temporary name first, so one with its final name is whole.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hadal.kernels.pages import PAGE_TOKENS, Page

_VERSION = 1  # of the files' layout
_SUFFIX, _PARTIAL = ".prefix", ".prefix.part"
_log = logging.getLogger(__name__)


class DiskError(ValueError):
    """A folder that cannot be used; the message names it and the remedy."""


class _Damaged(Exception):
    """A file does not hold what was written."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The tokens behind a state: `start` of them in whole blocks with the digest `key`, then the int32 ids of `tail`.

    Bytes are in hexadecimal. `root` begins every chain of digests of the tenant; the state can forget `back` tokens.
    """

    root: str
    key: str
    start: int
    tail: str
    back: int
    kind: str

    @property
    def position(self) -> int:
        """Tokens in all."""
        return self.start + len(self.tail) // 8

    def usable(self, ids_T: np.ndarray, limit: int) -> int:
        """How many of `ids_T`, at most `limit`, the state can serve, 0 if none; their first blocks have this `key`."""
        tail_T = np.frombuffer(bytes.fromhex(self.tail), "<i4")[: max(limit - self.start, 0)]
        ids_T = ids_T[self.start : self.start + len(tail_T)]
        differ = np.flatnonzero(ids_T != tail_T[: len(ids_T)])
        length = self.start + int(differ[0] if len(differ) else len(ids_T))
        return length if length >= self.position - self.back else 0


@dataclass(eq=False, slots=True)
class File:
    """One file of the folder; those of another model or version have no snapshot and only take up room."""

    name: str
    nbytes: int
    used: int  # nanoseconds; no file that builds on this one has a later time
    snapshot: Snapshot | None = None
    begin: int = 0  # pages that the parent has
    blocks: list[str] = field(default_factory=list)  # digests of the full pages that this file has
    parent: str = ""


_Job = tuple[Snapshot, list[str], Any]


class DiskStore:
    """Files of one folder within `max_bytes`, the least recently used go first; one process at a time owns the folder.

    `model_key` names all that a state's bytes depend on besides the tokens; `queue` snapshots may wait to be written.
    `torn` names what an interrupted process left unfinished. One thread calls the methods. DiskError if the folder is
    in use; one that cannot be written to is reported once and keeps nothing.
    """

    def __init__(self, folder: str | Path, model_key: str, max_bytes: int, *, queue: int = 32) -> None:
        self.folder, self.model_key, self._max_bytes, self._queue = Path(folder), model_key, max_bytes, queue
        self.files: dict[str, File] = {}
        self.by_key: dict[str, tuple[File, ...]] = {}
        self.by_block: dict[str, File] = {}
        self.nbytes = 0
        self.torn: list[str] = []
        self.counters = Counter(dict.fromkeys(("written", "evicted", "torn", "corrupt", "skipped", "failed"), 0))
        self._own_names = blake2b(f"{_VERSION};{model_key}".encode(), digest_size=8).hexdigest() + "-"
        self._clock, self._owned = 0, -1
        self._waiting: deque[_Job] = deque()
        self._writing: _Job | None = None
        self._done: list[_Job] = []
        self._lock = threading.Condition(threading.RLock())
        self._closing = self._warned = False
        try:
            self._own()
            self._scan()
        except OSError as error:
            self._fail(error)
        self._writer = threading.Thread(target=self._run, name="prefixes", daemon=True)
        self._writer.start()

    def submit(self, snapshot: Snapshot, chain: list[str], state: Any) -> None:
        """Have a snapshot written; `chain` is its root and the digests of all its full blocks. Does not wait for it."""
        with self._lock:
            self._waiting.append((snapshot, chain, state))
            self.release(self._queue)
            self._lock.notify_all()

    def release(self, waiting: int) -> None:
        """Let go of states that are written, and of the oldest of those that wait if more than `waiting` do."""
        with self._lock:  # pages go back to their pool here and not in the writer, as a pool belongs to one thread
            self._done.clear()
            while len(self._waiting) > waiting:
                self._waiting.popleft()
                self.counters["skipped"] += 1

    def states(self) -> list[Any]:
        """States that it refers to."""
        with self._lock:
            return [job[2] for job in (*self._done, *([self._writing] if self._writing else []), *self._waiting)]

    def touch(self, snapshot: Snapshot) -> None:
        """Note that a snapshot was of use, wherever it was read."""
        with self._lock:
            file = self.files.get(self._name(snapshot))
            if file is not None:
                self._touch(self._lineage(file))

    def load(self, file: File, held: Mapping[str, Page], take: Callable[[], Page]) -> tuple[bytes, list[Page]] | None:
        """Home and pages of a snapshot; pages of blocks in `held` are shared.

        None if it is gone, or was damaged: then it goes, and so do the files that build on the damaged one.
        """
        with self._lock:
            if self.files.get(file.name) is not file or file.snapshot is None:
                return None
            home, pages, end = bytearray(), list[Page](), -(-file.snapshot.position // PAGE_TOKENS)
            lineage = self._lineage(file)
            self._touch(lineage)
            for member in lineage:
                try:
                    with (self.folder / member.name).open("rb") as stream:
                        parts = _read_header(stream, member.name)["parts"]
                        more = []
                        for i, part in enumerate(parts[: end - member.begin]):
                            page = held.get(member.blocks[i]) if i < len(member.blocks) else None
                            if page is None:
                                page = take()
                                page.bytes.copy_(torch.frombuffer(_read_part(stream, *part), dtype=torch.uint8))
                            else:
                                stream.seek(part[0], os.SEEK_CUR)
                            more.append(page)
                        if member is file:
                            home = _read_part(stream, *parts[-1])
                except (FileNotFoundError, _Damaged) as error:
                    self._discard(member, error)
                    return None
                except OSError as error:  # it may be sound: it is forgotten until the folder is opened again
                    self._fail(error)
                    self._remove(member, delete=False)
                    return None
                pages, end = more + pages, member.begin
            return bytes(home), pages

    def flush(self) -> None:
        """Wait until everything is written."""
        with self._lock:
            self._lock.wait_for(lambda: not self._waiting and self._writing is None)
            self.release(0)

    def close(self) -> None:
        """Write what waits and give up the folder."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._writer.join()
        self.release(0)
        if self._owned >= 0:
            os.close(self._owned)
            self._owned = -1

    def _own(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            remedy = "stop that process or name another folder"
            raise DiskError(f"the prefixes in {self.folder} are in use by another process; {remedy}") from None
        self._owned = folder

    def _scan(self) -> None:
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(_PARTIAL):
                _delete(path)
                self.torn.append(path.name)
            elif path.name.endswith(_SUFFIX):
                file = File(path.name, path.stat().st_size, path.stat().st_mtime_ns)
                try:
                    if file.name.startswith(self._own_names):
                        _describe(file, path)
                    self._add(file)
                except (OSError, _Damaged) as error:
                    self._add(file)
                    self._discard(file, error)
        for file in sorted(self.files.values(), key=lambda f: f.begin):
            if file.begin and file.parent not in self.files:
                self._remove(file)
                self.torn.append(file.name)
        for file in sorted(self.files.values(), key=lambda f: -f.begin):
            self._clock = max(self._clock, file.used)
            if file.begin:
                self.files[file.parent].used = max(self.files[file.parent].used, file.used)
        self._make_room(0)
        self.counters["torn"] = len(self.torn)
        if self.torn:
            _log.warning("unfinished prefixes in %s are removed: %s", self.folder, ", ".join(self.torn))

    def _name(self, snapshot: Snapshot) -> str:
        return self._own_names + blake2b((snapshot.key + snapshot.tail).encode(), digest_size=16).hexdigest() + _SUFFIX

    def _lineage(self, file: File | None) -> list[File]:
        """A file, its parent, and so on to the first token."""
        files = []
        while file is not None:
            files.append(file)
            file = self.files.get(file.parent)
        return files

    def _add(self, file: File) -> None:
        self.files[file.name] = file
        self.nbytes += file.nbytes
        self.by_block.update(dict.fromkeys(file.blocks, file))
        if file.snapshot is not None:
            key = file.snapshot.key
            self.by_key[key] = (*self.by_key.get(key, ()), file)

    def _remove(self, file: File, delete: bool = True) -> None:
        if self.files.pop(file.name, None) is None:
            return
        for child in [f for f in self.files.values() if f.parent == file.name]:
            self._remove(child, delete)
        if delete:
            _delete(self.folder / file.name)
        self.nbytes -= file.nbytes
        for block in file.blocks:
            self.by_block.pop(block, None)
        if file.snapshot is not None:
            others = tuple(f for f in self.by_key.pop(file.snapshot.key) if f is not file)
            if others:
                self.by_key[file.snapshot.key] = others

    def _discard(self, file: File, error: Exception) -> None:
        self.counters["corrupt"] += 1
        _log.warning("%s is damaged (%s) and removed", self.folder / file.name, str(error))
        self._remove(file)

    def _make_room(self, nbytes: int) -> None:
        while self.files and self.nbytes + nbytes > self._max_bytes:
            # Of equally old files the one with the most pages before it builds on the others.
            self._remove(min(self.files.values(), key=lambda f: (f.used, -f.begin)))
            self.counters["evicted"] += 1

    def _touch(self, files: list[File]) -> None:
        self._clock = max(time.time_ns(), self._clock + 1)
        for file in files:
            file.used = self._clock
            with suppress(OSError):
                os.utime(self.folder / file.name, ns=(self._clock, self._clock))

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                self._writing = self._waiting.popleft()
            try:
                self._write(*self._writing)
            except Exception as error:  # whatever it is, serving goes on
                self._fail(error)
            with self._lock:
                self._done.append(self._writing)
                self._writing = None
                self._lock.notify_all()

    def _write(self, snapshot: Snapshot, chain: list[str], state: Any) -> None:
        if self._owned < 0:
            raise OSError("it could not be opened")
        name = self._name(snapshot)
        with self._lock:
            if name in self.files:
                return self.touch(snapshot)
            begin = next((i for i in range(len(chain) - 1, 0, -1) if chain[i] in self.by_block), 0)
            lineage = self._lineage(self.by_block[chain[begin]] if begin else None)
        parts = [*(page.bytes.cpu().numpy().data for page in state.pages[begin:]), state.dump()]
        parent = lineage[0].name if begin else ""
        header = {
            "name": name,
            "model": self.model_key,
            "snapshot": asdict(snapshot),
            "begin": begin,
            "parent": parent,
            "blocks": chain[begin + 1 :],
            "parts": [(len(part), zlib.crc32(part)) for part in parts],
        }
        line = json.dumps(header).encode() + b"\n"
        parts[:0] = [b"%08x" % zlib.crc32(line), line]
        file = File(name, sum(map(len, parts)), 0, snapshot, begin, chain[begin + 1 :], parent)
        with self._lock:
            if file.nbytes + sum(f.nbytes for f in lineage) > self._max_bytes:
                self.counters["skipped"] += 1
                return
            self._touch(lineage)  # so that they are the last to go
            self._make_room(file.nbytes)
        partial = self.folder / name.replace(_SUFFIX, _PARTIAL)
        try:
            with partial.open("wb") as stream:
                stream.writelines(parts)
                stream.flush()
                os.fsync(stream.fileno())
            with self._lock:
                if begin and parent not in self.files:  # it was found damaged in the meantime
                    self.counters["skipped"] += 1
                    return
                partial.rename(self.folder / name)
                self._add(file)
                self._touch([file, *lineage])
                self.counters["written"] += 1
            os.fsync(self._owned)
        finally:
            _delete(partial)

    def _fail(self, error: Exception) -> None:
        self.counters["failed"] += 1
        if not self._warned:
            self._warned = True
            _log.warning("prefixes cannot be kept in %s: %s", self.folder, str(error))


def _delete(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _describe(file: File, path: Path) -> None:
    """Fill in what the file's first line says."""
    with path.open("rb") as stream:
        header = _read_header(stream, file.name)
        if stream.tell() + sum(size for size, _ in header["parts"]) != file.nbytes:
            raise _Damaged("its size is wrong")
    file.snapshot = Snapshot(**header["snapshot"])
    file.begin, file.blocks, file.parent = header["begin"], header["blocks"], header["parent"]


def _read_header(stream: BinaryIO, name: str) -> dict[str, Any]:
    line = stream.readline()
    if line[:8] != b"%08x" % zlib.crc32(line[8:]):
        raise _Damaged("its first line is wrong")
    header: dict[str, Any] = json.loads(line[8:])
    if header["name"] != name:
        raise _Damaged("it has another file's name")
    return header


def _read_part(stream: BinaryIO, size: int, checksum: int) -> bytearray:
    data = bytearray(stream.read(size))
    if len(data) != size or zlib.crc32(data) != checksum:
        raise _Damaged("its content is wrong")
    return data
