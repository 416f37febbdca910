"""create_app: the HTTP application, put together from the routers of all APIs around one Service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import hadal
from hadal.accounts import Accounts
from hadal.plan.price import PriceBook
from hadal.server import anthropic, batches, catalog, chat, completions, files, health, metrics, page, responses
from hadal.server.backend import Backend
from hadal.server.errors import APIError, validation_error
from hadal.server.gate import Gate, error_response
from hadal.server.guard import protect
from hadal.server.service import Service
from hadal.server.settings import Settings

_TEXT = {"type": "string"}
_MAYBE = {"type": ["string", "null"]}
_ERROR = {
    "type": "object", "required": ["error"],
    "properties": {
        "error": {"type": "object", "properties": {"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE}}
    },
}  # fmt: skip


def create_app(
    backend: Backend | None = None, settings: Settings | None = None, accounts: Accounts | None = None
) -> FastAPI:
    """The application; `app.state.service` is its Service, to which a backend can be attached later, once it is loaded.

    Its lifespan starts the backend and the batches, and ends both. Without `accounts` they are those of the settings.
    """
    settings = settings or Settings()
    service = Service(settings, accounts or open_accounts(settings))
    work = batches.Batches(service)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if backend is not None:
            service.attach(backend)
        work.start()
        yield
        await work.stop()
        await service.close()
        service.accounts.close()

    # No pages of FastAPI's own: they load their scripts from elsewhere.
    app = FastAPI(
        title="Hadal", version=hadal.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={422: {"description": "a parameter is wrong", "content": {"application/json": {"schema": _ERROR}}}},
    )  # fmt: skip
    app.state.service = service
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)
    for room in (chat, completions, responses, anthropic, catalog, files, health, metrics):
        app.include_router(room.router(service))
    app.include_router(batches.router(work))
    app.include_router(page.page_router())
    app.add_middleware(Gate, accounts=service.accounts, refusal=service.refusal)
    protect(app, settings)
    return app


def open_accounts(settings: Settings) -> Accounts:
    """Keys, limits and ledger as the settings say."""
    book = PriceBook.load(settings.prices)
    return Accounts(settings.database, book, settings.price_list, folder=settings.data)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(request.url.path, error)


async def _invalid_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return await _api_error(request, validation_error(error.errors()))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    unknown = error.status_code in (404, 405)
    message = f"there is no {request.method} {request.url.path} here" if unknown else str(error.detail)
    if error.status_code == 400:  # FastAPI could not even begin to parse it, and does not say why
        message = "the body cannot be read; send JSON in UTF-8, unpacked (no Content-Encoding), not nested without end"
    return error_response(request.url.path, APIError(error.status_code, message), error.headers)
