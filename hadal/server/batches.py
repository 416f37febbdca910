"""/v1/batches: files of requests that are answered when nobody else asks."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from hadal.server import store as tables
from hadal.server.body import Body
from hadal.server.errors import APIError
from hadal.server.files import ExpiresAfter, Page, owner, twice
from hadal.server.runner import BODIES, Batches
from hadal.server.store import show_batch

WINDOW_SECONDS = 24 * 3600
_MOST_OPEN = 100  # batches of one key that have not ended
__all__ = ["Batches", "router"]


class BatchBody(Body):
    """What to run, and what to do with what comes of it."""

    input_file_id: str
    endpoint: str
    completion_window: Literal["24h"]
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )
    output_expires_after: ExpiresAfter | None = None


def router(work: Batches) -> APIRouter:
    """The endpoints."""
    routes, store = APIRouter(), work.store

    @routes.post("/batches")
    async def create(request: Request, body: BatchBody) -> dict[str, Any]:
        """Run the requests of a file within 24 hours."""
        if body.endpoint not in BODIES:
            raise APIError(422, f"no batches for {body.endpoint!r}; take {', '.join(BODIES)}", param="endpoint")
        key = owner(request)
        file = await asyncio.to_thread(store.get, tables.files, key, body.input_file_id)
        if file.purpose != "batch":
            raise APIError(400, f"file {file.id} is for {file.purpose!r}; upload it for 'batch'", param="input_file_id")
        row = store.stamp("batch_")
        row |= {
            "key": key, "status": "validating", "endpoint": body.endpoint, "input_file_id": file.id,
            "expires_at": row["created"] // 10**6 + WINDOW_SECONDS, "total": 0, "succeeded": 0, "erred": 0,
            "output_seconds": body.output_expires_after and body.output_expires_after.seconds,
            "metadata": body.metadata,
        }  # fmt: skip
        await asyncio.to_thread(store.add, tables.batches, row, _MOST_OPEN, "batches under way")
        work.wake()
        return show_batch(await asyncio.to_thread(store.get, tables.batches, key, row["id"]))

    @routes.get("/batches")
    def listing(request: Request, query: Annotated[Page, Query()]) -> dict[str, Any]:
        """The key's batches, the newest first."""
        return store.page(tables.batches, owner(request), query.after, query.limit)

    @routes.get("/batches/{batch_id}")
    def retrieve(request: Request, batch_id: str) -> dict[str, Any]:
        """How far a batch has come."""
        return show_batch(store.get(tables.batches, owner(request), batch_id))

    @routes.post("/batches/{batch_id}/cancel")
    async def cancel(request: Request, batch_id: str) -> dict[str, Any]:
        """End a batch; what it has done so far can be read."""
        key = owner(request)
        await asyncio.to_thread(store.get, tables.batches, key, batch_id)
        done = await asyncio.to_thread(store.change, batch_id, ("validating", "in_progress"), "cancelling")
        row = await asyncio.to_thread(store.get, tables.batches, key, batch_id)
        if not done and row.status != "cancelling":
            raise APIError(409, f"batch {batch_id} is {row.status} and cannot be cancelled any more")
        work.wake()
        return show_batch(row)

    return twice(routes)
