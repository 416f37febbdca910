"""What agents really send, recorded and cut down, is answered: each turn to its end, the next one from the cache."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import scripted_llm
from tests.server.conftest import Running, running

ANSWERS: dict[str, str | None] = {
    "You help": "seen</think>All right.",
    "as JSON": 'so</think>{"title": "All right."}',
}
AGENTS = sorted(path.stem for path in (Path(__file__).parent / "transcripts").glob("*.json"))
STREAMS = [name for name in AGENTS if name != "claude_code_aside"]


def requests_of(agent: str) -> list[dict[str, Any]]:
    text = (Path(__file__).parent / "transcripts" / f"{agent}.json").read_text(encoding="utf-8")
    requests: list[dict[str, Any]] = json.loads(text)["requests"]
    return requests


@pytest.fixture
def server() -> Iterator[Running]:
    with running(scripted_llm(ANSWERS, context=8192)) as it:
        yield it


def send(server: Running, request: dict[str, Any]) -> tuple[str, str]:
    """The header of what was ignored, and the answer."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer any", **request["headers"]}
    call = urllib.request.Request(server.url + request["path"], json.dumps(request["body"]).encode(), headers)
    with urllib.request.urlopen(call, timeout=30) as response:
        return response.headers["x-hadal-ignored"] or "", response.read().decode()


def events(answer: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text(told: list[Any]) -> str:
    """What the events of any of the three APIs tell as text."""
    pieces = []
    for event in told[: -1 if told[-1] == "[DONE]" else None]:
        if "choices" in event:
            pieces += [choice["delta"].get("content") or "" for choice in event["choices"]]
        elif event["type"] == "content_block_delta":
            pieces.append(event["delta"].get("text", ""))
        elif event["type"] == "response.output_text.delta":
            pieces.append(event["delta"])
    return "".join(pieces)


def cached(told: list[Any]) -> tuple[int, int]:
    """Tokens of the prompt, and those found in the cache, as the API's last event with usage tells them."""
    if told[-1] == "[DONE]":
        usage = told[-2]["usage"]
        return usage["prompt_tokens"], usage["prompt_cache_hit_tokens"]
    if told[-1]["type"] == "message_stop":
        usage = told[-2]["usage"]
        return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["cache_read_input_tokens"]
    usage = told[-1]["response"]["usage"]
    return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("agent", AGENTS)
def test_every_request_is_answered_and_what_has_no_effect_is_named(server: Running, agent: str) -> None:
    for request in requests_of(agent):
        ignored, answer = send(server, request)
        assert ignored == request["ignored"]
        if not request["body"].get("stream"):
            assert json.loads(answer)["input_tokens"] > 0
            continue
        told = events(answer)
        assert told[-1] == "[DONE]" or told[-1]["type"] in ("message_stop", "response.completed")
        assert "All right." in text(told)


@pytest.mark.parametrize("agent", STREAMS)
def test_the_turn_after_a_tool_finds_the_turn_before_it(server: Running, agent: str) -> None:
    first, second = (events(send(server, request)[1]) for request in requests_of(agent)[-2:])
    prompt, _ = cached(first)
    longer, hit = cached(second)
    assert prompt - 3 <= hit < longer
