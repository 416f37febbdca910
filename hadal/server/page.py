"""The page at `/`: static files of the package, held in memory, under a policy that lets no foreign code run."""

from __future__ import annotations

import hashlib
from functools import partial
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Everything from this origin alone; text of a model can become neither markup nor script; no other site may frame it.
_POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, and answered by 304 while it is the same
}


def page_router() -> APIRouter:
    """Routes for `/` and for each file of the page under `/page/`; there is no other way to name a file."""
    router = APIRouter(include_in_schema=False)
    for file in files("hadal").joinpath("assets/page").iterdir():
        suffix = file.name[file.name.rfind(".") :]
        if suffix in _TYPES:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            send = partial(_send, file.read_bytes(), _TYPES[suffix])
            router.add_route(path, send, methods=["GET", "HEAD"])
    return router


async def _send(body: bytes, kind: str, request: Request) -> Response:
    headers = _HEADERS | {"ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type=kind, headers=headers)
