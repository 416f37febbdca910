"""Chat requests and OpenAI's client for them, with answers and chunks as plain dicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai

from tests.server.conftest import Running

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
Chat = dict[str, Any]


def chat(text: str = "greet", **change: Any) -> Chat:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], "temperature": 0} | change


@contextmanager
def client_of(server: Running, prefix: str = "", key: str = "none") -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + prefix, api_key=key, max_retries=0, timeout=30) as it:
        yield it


def create(client: openai.OpenAI, body: Chat) -> Chat:
    made = client.chat.completions.create(model=body["model"], messages=body["messages"], extra_body=body)
    return made.model_dump(exclude_unset=True)


def stream(client: openai.OpenAI, body: Chat) -> list[Chat]:
    made: Any = client.chat.completions.create(
        model=body["model"], messages=body["messages"], stream=True, extra_body=body
    )
    return [chunk.model_dump(exclude_unset=True) for chunk in made]


def told(chunks: list[Chat], field: str, index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in choices)
