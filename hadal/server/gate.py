"""The gate: who calls, found before a body is read; pure ASGI, so that streams and disconnects pass untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from hadal.accounts import Accounts
from hadal.server.errors import APIError
from hadal.server.visit import Caller

# What answers without a key: the page, which holds no secret, and whether the process lives.
_OPEN = ("/livez", "/readyz", "/startupz", "/health", "/openapi.json", "/favicon.ico")


class Gate:
    """Middleware that finds the caller by `Authorization: Bearer` or `x-api-key` and leaves it in the scope's state.

    Without any key in the accounts everybody may call; as soon as there is one, calls need a valid one. Who asks for an
    answer that `refusal` has no room for is told so at once: reading bodies in vain would slow those who are served.
    """

    def __init__(
        self, app: ASGIApp, accounts: Accounts, refusal: Callable[[str, Caller], APIError | None] = lambda *_: None
    ) -> None:
        self._app = app
        self._accounts = accounts
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                found = Caller() if _is_open(scope) else self._caller(_secret(Headers(scope=scope)))
                if scope["method"] == "POST" and (refused := self._refusal(scope["path"], found)):
                    raise refused
            except APIError as error:
                return await error_response(scope["path"], error)(scope, receive, send)
            scope.setdefault("state", {})["caller"] = found
        await self._app(scope, receive, send)

    def _caller(self, secret: str | None) -> Caller:
        key = self._accounts.find(secret) if secret else None
        if key is None and self._accounts.has_keys:
            cause = "this key is not valid" if secret else "no key was sent"
            raise APIError(
                401,
                f"authentication failed, {cause}; send a key of this server as `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )
        return Caller(key)


def caller(request: Request) -> Caller:
    """Who sent the request."""
    found = request.state.caller
    assert isinstance(found, Caller)
    return found


def error_response(path: str, error: APIError, headers: Mapping[str, str] | None = None) -> Response:
    """The error in the shape of the API that `path` belongs to."""
    body = error.anthropic_body if path.startswith(("/anthropic", "/v1/messages")) else error.body
    sent = dict(headers or {})
    if error.retry_after is not None:
        sent["retry-after"] = str(max(1, round(error.retry_after)))
    if error.status == 401:
        sent["www-authenticate"] = "Bearer"
    return JSONResponse(body, status_code=error.status, headers=sent)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path == "/" or path in _OPEN or path.startswith("/page/") or scope["method"] == "OPTIONS"


def _secret(headers: Headers) -> str | None:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else headers.get("x-api-key")
