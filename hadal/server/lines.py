"""Lines of batches: those that clients wrote, and the files that gain a line for each of them as it is done."""

from __future__ import annotations

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hadal.server.errors import APIError, validation_error
from hadal.server.wire import dump

MOST_LINES = 50_000
_MOST_ERRORS = 100  # reported of one file
_NAMESPACE = uuid.UUID("d3c1f1a4-7a0a-4a53-8d61-0f8f5f6a2b57")


class Line(BaseModel):
    """One request of a batch."""

    model_config = ConfigDict(extra="forbid", strict=True)

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: str
    body: dict[str, Any]


def read_line(raw: bytes, endpoint: str, limit: int) -> Line:
    """The request of a line of at most `limit` bytes; APIError says what is wrong with it."""
    if len(raw) > limit:
        raise APIError(413, f"the line is longer than {limit:,} bytes; make the request smaller", code="line_too_long")
    try:
        line = Line.model_validate_json(raw)
    except ValidationError as error:
        wrong = validation_error([{**e, "loc": ("body", *e["loc"])} for e in error.errors(include_url=False)])
        if wrong.status == 400:
            message = wrong.message.replace("the body", "the line", 1)
            raise APIError(400, message, code="invalid_json_line") from None
        raise wrong from None
    if line.url != endpoint:
        raise APIError(
            422, f"`url` is {line.url[:80]!r} and the batch is for {endpoint!r}; use one of them", param="url",
            code="url_mismatch",
        )  # fmt: skip
    return line


def numbered(file: BinaryIO, limit: int) -> Iterator[tuple[int, bytes]]:
    """Every line that is not blank with its number, from 1; of one beyond `limit` bytes only a bit more than that."""
    number = 0
    while raw := file.readline(limit + 1):
        number += 1
        rest = raw
        while len(rest) > limit and not rest.endswith(b"\n"):
            rest = file.readline(limit + 1)
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")  # some editors mark UTF-8
        if raw.strip():
            yield number, raw


def check(path: Path, endpoint: str, limit: int) -> tuple[int, list[dict[str, Any]]]:
    """How many requests a file holds, and what is wrong with its lines in OpenAI's shape; nothing may be."""
    seen: set[str] = set()
    errors: list[dict[str, Any]] = []
    with path.open("rb") as file:
        for number, raw in numbered(file, limit):
            try:
                name = read_line(raw, endpoint, limit).custom_id
                if name in seen:
                    raise APIError(
                        422, f"custom_id {name[:80]!r} is there twice", param="custom_id", code="duplicate_custom_id"
                    )
                seen.add(name)
                if len(seen) > MOST_LINES:
                    raise APIError(422, f"a batch has at most {MOST_LINES:,} requests; split it", code="too_many_lines")
            except APIError as error:
                errors.append(problem(error, number))
                if len(errors) == _MOST_ERRORS or error.code == "too_many_lines":
                    break
    if not seen and not errors:
        errors.append(problem(APIError(422, "the file has no requests; write one on each line", code="empty_file")))
    return len(seen), errors


def problem(error: APIError, line: int | None = None) -> dict[str, Any]:
    """One of a batch's `errors`."""
    return {"code": error.code, "line": line, "message": error.message, "param": error.param}


def line_id(batch_id: str, number: int) -> str:
    """The 32 hex digits that one line's answer and its row in the ledger have, however often it is run."""
    return uuid.uuid5(_NAMESPACE, f"{batch_id} {number}").hex


class Made:
    """The files that a batch writes, one line per request that is done; a line counts once it is on the disk.

    `done` holds the ids of the requests, `counts` the lines of each kind of file.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.done: set[str] = set()
        self.counts: dict[str, int] = {}
        self._paths = paths
        self._files: dict[str, io.FileIO] = {}
        for kind, path in paths.items():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(0o600)
            self._files[kind] = path.open("r+b", buffering=0)
            self.counts[kind] = self._recall(kind)

    def _recall(self, kind: str) -> int:
        """Take up what a run before has written; a crash can have left a broken end."""
        count = good = 0
        with self._paths[kind].open("rb") as file:
            for raw in file:
                try:
                    id = json.loads(raw)["id"].removeprefix("batch_req_")
                except (ValueError, KeyError, TypeError, AttributeError):
                    break
                if not raw.endswith(b"\n"):
                    break
                self.done.add(id)
                count, good = count + 1, good + len(raw)
        self._files[kind].truncate(good)
        self._files[kind].seek(good)
        return count

    def append(self, kind: str, id: str, line: Mapping[str, Any], *, sync: bool = True) -> None:
        """Add the line of a request, once; OSError when the disk does not take it, and then nothing of it is left."""
        if id in self.done:
            return
        file, rest = self._files[kind], memoryview(dump({"id": f"batch_req_{id}", **line}).encode() + b"\n")
        end = file.tell()
        try:
            while rest:  # a raw write may take a part
                rest = rest[file.write(rest) :]
            if sync:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            file.seek(end)
            raise
        self.done.add(id)
        self.counts[kind] += 1

    def close(self) -> dict[str, int]:
        """The size of each file that has lines, all on the disk; others are deleted. The second time does nothing."""
        sizes, files, self._files = {}, self._files, {}
        for kind, file in files.items():
            os.fsync(file.fileno())
            size = file.tell()
            file.close()
            if size:
                sizes[kind] = size
            else:
                self._paths[kind].unlink()
        return sizes
