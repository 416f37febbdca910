"""/v1/files: what clients keep here for batches and later requests, under ids of the server's own."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from hadal.server.errors import APIError, validation_error
from hadal.server.gate import caller
from hadal.server.service import Service
from hadal.server.store import Store, files, on_disk, show_file

_CHUNK = 1 << 20  # bytes that are written at once
_LONGEST_FIELD = 1024
_ORPHAN_SECONDS = 3600.0  # how old bytes without a row are when nobody can still be writing them
_BODY = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch", "user_data"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2592000},
    },
}


class ExpiresAfter(BaseModel):
    """How many seconds after its making a file goes."""

    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2592000)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")

    purpose: Literal["batch", "user_data"]
    expires_after: ExpiresAfter | None = None


class Page(BaseModel):
    """Which part of a list is asked for."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: int = Field(20, ge=1, le=100)


class _FilePage(Page):
    limit: int = Field(10000, ge=1, le=10000)
    order: Literal["asc", "desc"] = "desc"
    purpose: Literal["batch", "batch_output", "user_data"] | None = None


def router(service: Service) -> APIRouter:
    """The endpoints."""
    routes, settings = APIRouter(), service.settings
    store = Store(service.accounts.database, settings.data)

    @routes.post(
        "/files",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _BODY}}}},
    )
    async def create(request: Request) -> dict[str, Any]:
        """Keep a file of the form field `file` for the purpose `batch` or `user_data`."""
        row = store.stamp("file-")
        part, path = store.path(row["id"]).with_suffix(".part"), store.path(row["id"])
        form = _Upload(settings.file_limit)
        try:
            await form.read(request, part)
            fields = _form(form.fields)
            row |= {"key": owner(request), "purpose": fields.purpose, "filename": form.filename, "bytes": form.size}
            row["expires"] = fields.expires_after and row["created"] // 10**6 + fields.expires_after.seconds
            with on_disk():
                await asyncio.to_thread(publish, part, path)
            try:
                await asyncio.to_thread(store.add, files, row, settings.max_files, "files")
            except BaseException:
                path.unlink(missing_ok=True)
                raise
        finally:
            part.unlink(missing_ok=True)
        return show_file(await asyncio.to_thread(store.get, files, row["key"], row["id"]))

    @routes.get("/files")
    def listing(request: Request, query: Annotated[_FilePage, Query()]) -> dict[str, Any]:
        """The key's files."""
        equal = {} if query.purpose is None else {"purpose": query.purpose}
        down = query.order == "desc"
        return store.page(files, owner(request), query.after, query.limit, descending=down, **equal)

    @routes.get("/files/{file_id}")
    def retrieve(request: Request, file_id: str) -> dict[str, Any]:
        """One file's description."""
        return show_file(store.get(files, owner(request), file_id))

    @routes.delete("/files/{file_id}")
    def delete(request: Request, file_id: str) -> dict[str, Any]:
        """Delete a file; 409 while a batch reads it."""
        with on_disk():
            store.remove_file(owner(request), file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    @routes.get("/files/{file_id}/content")
    def content(request: Request, file_id: str) -> Response:
        """A file's bytes."""
        row = store.get(files, owner(request), file_id)
        path = store.path(row.id)
        with on_disk():
            stat = path.stat()
        return FileResponse(path, media_type="application/octet-stream", filename=row.filename, stat_result=stat)

    return twice(routes)


def twice(routes: APIRouter) -> APIRouter:
    """The same endpoints below /v1, and without it."""
    both = APIRouter()
    both.include_router(routes, prefix="/v1")
    both.include_router(routes, include_in_schema=False)
    return both


def owner(request: Request) -> str:
    """Whose files and batches a request sees: its key's id, or nothing where no key is needed."""
    key = caller(request).key
    return key.id if key else ""


def publish(part: Path, path: Path) -> None:
    """Give written and synced bytes their name, so that it survives a crash."""
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sweep(store: Store) -> None:
    """Delete files whose time has come, and what a crash left behind."""
    store.remove_expired()
    old = time.time() - _ORPHAN_SECONDS
    stray = {path.name for path in store.folder.glob("file-*") if path.stat().st_mtime < old}
    for name in stray - store.all_files() if stray else ():
        store.path(name).unlink(missing_ok=True)


class _Upload:
    """One multipart form: its file goes to the disk as it comes, its fields are kept."""

    def __init__(self, limit: int) -> None:
        self.filename = ""
        self.size = 0
        self.fields: dict[str, str] = {}
        self._limit = limit
        self._name = ""  # of the part that is being read
        self._header, self._value, self._headers = b"", b"", dict[bytes, bytes]()
        self._text, self._waiting = bytearray(), bytearray()
        self._ended = False

    async def read(self, request: Request, path: Path) -> None:
        """Read the whole form, its file to `path`; APIError when it is none, or too large for its limit or the disk."""
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise APIError(400, "a file is uploaded as multipart/form-data with a boundary; send it so")
        with on_disk():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.touch(0o600, exist_ok=False)
            with path.open("wb") as file:
                try:
                    parser = MultipartParser(options[b"boundary"], self._callbacks())  # type: ignore[arg-type]
                    async for chunk in request.stream():
                        parser.write(chunk)
                        if len(self._waiting) >= _CHUNK:
                            waiting, self._waiting = self._waiting, bytearray()
                            await asyncio.to_thread(file.write, waiting)
                except FormParserError as error:
                    raise APIError(400, f"the body is no valid multipart form: {error}") from None
                await asyncio.to_thread(self._finish, file)
        if not self._ended:
            raise APIError(400, "the multipart form breaks off before its last boundary; send it whole")
        if not self.filename:
            raise APIError(422, "field `file` is missing, or has no filename", param="file")

    def _finish(self, file: BinaryIO) -> None:
        file.write(self._waiting)
        file.flush()
        os.fsync(file.fileno())

    def _callbacks(self) -> Mapping[str, Any]:
        names = "part_begin header_field header_value header_end headers_finished part_data part_end end"
        return {f"on_{name}": getattr(self, f"_on_{name}") for name in names.split()}

    def _on_part_begin(self) -> None:
        self._headers, self._text = {}, bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = name = options.get(b"name", b"").decode("utf-8", "replace")
        shown = name[:80]
        if name in self.fields or (name == "file" and self.filename):
            raise APIError(422, f"field `{shown}` is there twice; send it once", param=shown)
        if (name == "file") != (b"filename" in options):
            raise APIError(422, f"field `{shown}` is no field for a file here; send the file as `file`", param=shown)
        if len(name) > _LONGEST_FIELD or len(self.fields) > 8:
            raise APIError(422, "the form has more fields, or longer ones, than a file needs")
        if name == "file":
            self.filename = _plain(options[b"filename"].decode("utf-8", "replace"))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self.size += end - start
            if self.size > self._limit:
                raise APIError(413, f"the file is larger than {self._limit:,} bytes, which is this server's limit")
            self._waiting += memoryview(data)[start:end]
        else:
            self._text += memoryview(data)[start:end]
            if len(self._text) > _LONGEST_FIELD:
                raise APIError(422, f"field `{self._name[:80]}` is longer than a file needs", param=self._name[:80])

    def _on_part_end(self) -> None:
        if self._name != "file":
            self.fields[self._name] = self._text.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self._ended = True


def _form(fields: Mapping[str, str]) -> _Form:
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if inner := re.fullmatch(r"expires_after\[(\w+)\]", name):
            given.setdefault("expires_after", {})[inner[1]] = value
        else:
            given[name] = value
    try:
        return _Form.model_validate(given)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _plain(filename: str) -> str:
    """What a client that saves the file under its name may be told: no folders, nothing invisible."""
    name = re.split(r"[/\\]", filename)[-1]
    return "".join(c for c in name if c.isprintable())[-255:].strip(". ") or "file"
