"""The catalog: models under all their names, what a key may still spend, and the model's tokens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, SkipValidation, model_validator

from hadal.server.ask import Ask
from hadal.server.body import MOST_IDS, Body, FirstFault, List, Many, ModelName, read
from hadal.server.chat import ChatBody, Message, Tool
from hadal.server.errors import APIError
from hadal.server.gate import caller
from hadal.server.service import Service
from hadal.server.settings import Settings
from hadal.server.thinking import Switch, decide
from hadal.server.wire import dump
from hadal.text import Tokenizer, TokenizerError


class TokenizeBody(Switch):
    """vLLM's request: a text, or a conversation as chat would render it."""

    model: ModelName | None = None
    prompt: str | None = None
    messages: Annotated[Many[Message], Field(min_length=1)] | None = None
    tools: List[Tool] = Field([])
    add_special_tokens: bool = True
    return_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        if self.return_token_strs and not self.return_tokens:
            raise ValueError("`return_token_strs` needs `return_tokens` to be true")
        return self

    def ask(self, settings: Settings) -> Ask:
        """The text or the conversation in the neutral form."""
        if self.prompt is not None:
            return _continue(settings, self.model, self.prompt)
        given = self.model_dump(include={*ChatBody.model_fields}, exclude_unset=True, by_alias=True)
        return ChatBody.model_validate({"model": settings.model} | given).ask(settings)


class DetokenizeBody(Body):
    """vLLM's request."""

    model: ModelName | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], FirstFault(), Field(max_length=MOST_IDS)]

    def ask(self, settings: Settings) -> Ask:
        """The ids in the neutral form."""
        return _continue(settings, self.model, tuple(self.tokens))


def _continue(settings: Settings, model: str | None, prompt: str | tuple[int, ...]) -> Ask:
    decide(settings, model or settings.model, [])
    return Ask(model or settings.model, prompts=(prompt,))


def router(service: Service) -> APIRouter:
    """The routes of the catalog."""
    routes = APIRouter(tags=["catalog"])
    began = int(time.time())

    @routes.get("/v1/models")
    @routes.get("/models", include_in_schema=False)
    @routes.get("/anthropic/v1/models", include_in_schema=False)
    async def models(request: Request) -> dict[str, Any]:
        """All names of the model that are no patterns, in OpenAI's shape, or in Anthropic's for its clients."""
        cards = [_card(service, name, began, request) for name in service.settings.names.listed()]
        if _is_anthropic(request):
            return {"data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
        return {"object": "list", "data": cards}

    @routes.get("/v1/models/{name:path}")
    @routes.get("/models/{name:path}", include_in_schema=False)
    @routes.get("/anthropic/v1/models/{name:path}", include_in_schema=False)
    async def model(name: str, request: Request) -> dict[str, Any]:
        """The model under one of its names."""
        if service.settings.names.resolve(name) is None:
            raise APIError(404, f"there is no model {name!r}; GET /v1/models lists the names", code="model_not_found")
        return _card(service, name, began, request)

    @routes.get("/user/balance")
    async def balance(request: Request) -> dict[str, Any]:
        """What the key may still spend; a key without a budget has no balance to tell, and is available."""
        found = service.accounts.balance(caller(request).key)
        left = f"{found.left:.2f}" if found.left is not None else None
        info = {"currency": "USD", "total_balance": left, "granted_balance": left, "topped_up_balance": "0.00"}
        return {"is_available": found.is_available, "balance_infos": [] if left is None else [info]}

    @routes.post("/v1/tokenize")
    @routes.post("/tokenize", include_in_schema=False)
    async def tokenize(body: SkipValidation[TokenizeBody], request: Request) -> Response:
        """Token ids of a text or a conversation, or only their count."""
        body, ask = await read(service, request, TokenizeBody, body)
        backend = service.backend

        def tell() -> bytes:
            if body.prompt is None:
                ids: Sequence[int] = service.render(request, "chat", ask)
            else:
                ids = _encode(backend.tokenizer, body.prompt, body.add_special_tokens)
            told: dict[str, Any] = {"count": len(ids), "max_model_len": backend.max_context}
            if body.return_tokens:
                strings = [backend.tokenizer.decode([i]) for i in ids] if body.return_token_strs else None
                told |= {"tokens": ids, "token_strs": strings}
            return dump(told).encode()

        return Response(await service.count(request, tell), media_type="application/json")

    @routes.post("/v1/detokenize")
    @routes.post("/detokenize", include_in_schema=False)
    async def detokenize(body: SkipValidation[DetokenizeBody], request: Request) -> dict[str, str]:
        """The text of token ids."""
        body, _ = await read(service, request, DetokenizeBody, body)
        tokenizer = service.backend.tokenizer
        try:
            return {"prompt": await service.count(request, partial(tokenizer.decode, body.tokens))}
        except TokenizerError:
            most = tokenizer.vocab_size - 1
            raise APIError(422, f"`tokens` has an id beyond {most}, the last of this model", param="tokens") from None

    return routes


def _encode(tokenizer: Tokenizer, text: str, begin: bool) -> list[int]:
    try:
        ids = tokenizer.encode(text)
    except TokenizerError as error:
        raise APIError(400, f"`prompt`: {error}", param="prompt") from None
    return ids if not begin or ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id, *ids]


def _is_anthropic(request: Request) -> bool:
    return "anthropic-version" in request.headers or request.url.path.startswith("/anthropic")


def _card(service: Service, name: str, began: int, request: Request) -> dict[str, Any]:
    context = service.backend.max_context
    if _is_anthropic(request):
        created = datetime.fromtimestamp(began, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return {"type": "model", "id": name, "display_name": name, "created_at": created, "context_length": context}
    return {"id": name, "object": "model", "created": began, "owned_by": "hadal", "context_length": context}
