from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from hadal.server.chat import ChatBody
from hadal.server.errors import APIError
from hadal.server.settings import Settings, read_settings
from hadal.text import own_prompt_texts
from tests.fakes import scripted_llm
from tests.server.chatting import Chat, chat, client_of, create, stream, told
from tests.server.conftest import Running, running
from tests.test_llm import SCRIPT

OFF = (False, "high")
HIGH = (True, "high")


def setting(body: Chat, settings: Settings | None = None) -> tuple[bool, str]:
    ask = ChatBody.model_validate(chat() | body).ask(settings or Settings(model="scripted"))
    return ask.thinking, ask.effort


SPELLINGS: list[tuple[Chat, tuple[bool, str]]] = [
    ({}, HIGH),
    ({"thinking": {"type": "enabled"}}, HIGH),
    ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, HIGH),
    ({"thinking": {"type": "disabled"}}, OFF),
    ({"thinking": {"type": "adaptive"}}, HIGH),
    ({"thinking": {"type": "auto"}, "reasoning_effort": "none"}, OFF),
    ({"thinking": True}, HIGH),
    ({"thinking": False}, OFF),
    ({"enable_thinking": True}, HIGH),
    ({"enable_thinking": False}, OFF),
    ({"chat_template_kwargs": {"thinking": True}}, HIGH),
    ({"chat_template_kwargs": {"thinking": False}}, OFF),
    ({"chat_template_kwargs": {"enable_thinking": False}}, OFF),
    ({"chat_template_kwargs": {"thinking_mode": "thinking"}}, HIGH),
    ({"chat_template_kwargs": {"thinking_mode": "chat"}}, OFF),
    ({"chat_template_kwargs": {"thinking": True, "reasoning_effort": "max"}}, (True, "max")),
    ({"reasoning_effort": "none"}, OFF),
    ({"reasoning_effort": "minimal"}, (True, "low")),
    ({"reasoning_effort": "low"}, (True, "low")),
    ({"reasoning_effort": "medium"}, HIGH),
    ({"reasoning_effort": "high"}, HIGH),
    ({"reasoning_effort": "xhigh"}, HIGH),
    ({"reasoning_effort": "max"}, (True, "max")),
    ({"reasoning_effort": "ultra"}, (True, "max")),
    ({"reasoning": {"effort": "low"}}, (True, "low")),
    ({"reasoning": {"effort": "none"}}, OFF),
    ({"reasoning": {"enabled": False}}, OFF),
    ({"reasoning": {"enabled": True, "max_tokens": 900}}, HIGH),
    ({"reasoning": {"exclude": True, "summary": "auto"}}, HIGH),
    ({"think": True}, HIGH),
    ({"think": False}, OFF),
    ({"think": "low"}, (True, "low")),
    ({"think": "none"}, OFF),
    ({"include_reasoning": False}, HIGH),
    ({"thinking": {"type": "enabled"}, "reasoning_effort": "max", "reasoning": {"effort": "ultra"}}, (True, "max")),
    ({"thinking": {"type": "disabled"}, "reasoning_effort": "max"}, (False, "max")),
    ({"model": "deepseek-chat"}, OFF),
    ({"model": "deepseek-reasoner"}, HIGH),
    ({"model": "deepseek-v4-flash[1m]"}, HIGH),
    ({"model": "deepseek-chat", "thinking": {"type": "enabled"}}, HIGH),
    ({"model": "deepseek-reasoner", "thinking": False}, OFF),
    ({"thinking": None, "reasoning_effort": None}, HIGH),
]


@pytest.mark.parametrize(("body", "expected"), SPELLINGS)
def test_spellings(body: Chat, expected: tuple[bool, str]) -> None:
    assert setting(body) == expected


CONTRADICTIONS: list[tuple[Chat, str, str]] = [
    ({"thinking": {"type": "disabled"}, "enable_thinking": True}, "thinking.type", "enable_thinking"),
    ({"enable_thinking": True, "reasoning_effort": "none"}, "enable_thinking", "reasoning_effort"),
    ({"think": "high", "thinking": False}, "thinking.type", "think"),
    ({"think": False, "reasoning": {"enabled": True}}, "reasoning.enabled", "think"),
    ({"chat_template_kwargs": {"thinking": True, "thinking_mode": "chat"}}, ".thinking", ".thinking_mode"),
    ({"reasoning_effort": "low", "reasoning": {"effort": "max"}}, "reasoning_effort", "reasoning.effort"),
]


@pytest.mark.parametrize(("body", "first", "second"), CONTRADICTIONS)
def test_contradictions_name_both(body: Chat, first: str, second: str) -> None:
    with pytest.raises(APIError, match="send one of them") as caught:
        setting(body)
    assert caught.value.status == 422
    assert f"{first}`" in caught.value.message and f"{second}`" in caught.value.message
    assert str(caught.value.param).endswith(second)


@pytest.mark.parametrize(
    "body",
    [
        {"thinking": {"type": "maybe"}},
        {"thinking": 1},
        {"thinking": {}},
        {"enable_thinking": "yes"},
        {"reasoning_effort": "furious"},
        {"reasoning": {"effort": "furious"}},
        {"think": "furious"},
        {"think": 1},
        {"chat_template_kwargs": {"mood": "low"}},
        {"chat_template_kwargs": {"thinking_mode": "deep"}},
    ],
)
def test_what_is_no_spelling_is_refused(server: Running, body: Chat) -> None:
    status, answer = server.call("/chat/completions", chat() | body)
    assert status == 422 and str(answer["error"]["param"]).startswith(next(iter(body)))


def test_effort_words_are_folded_as_the_settings_say() -> None:
    spring = read_settings(model="scripted", efforts="2026-04")
    assert [setting({"reasoning_effort": word}, spring)[1] for word in ("low", "medium", "xhigh")] == [
        "high",
        "high",
        "max",
    ]
    own = Settings(model="scripted", efforts={"turbo": "low"})
    assert setting({"reasoning_effort": "turbo"}, own) == (True, "low")


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as it:
        yield it


ECHOES: list[tuple[Chat, str, Any]] = [
    ({}, "high", {"type": "enabled", "effort": "high"}),
    ({"think": "max"}, "max", {"type": "enabled", "effort": "max"}),
    ({"reasoning_effort": "none"}, "disabled", {"type": "disabled", "effort": None}),
]


@pytest.mark.parametrize(("change", "header", "echo"), ECHOES)
def test_the_setting_in_effect_is_echoed(client: openai.OpenAI, change: Chat, header: str, echo: Any) -> None:
    raw = client.chat.completions.with_raw_response.create(**chat("plain"), extra_body=change)
    assert raw.headers["x-hadal-thinking"] == header and raw.http_response.json()["thinking"] == echo
    assert stream(client, chat("plain") | change)[0]["thinking"] == echo


@pytest.mark.parametrize("change", [{"include_reasoning": False}, {"reasoning": {"exclude": True}}])
def test_reasoning_can_be_left_out_of_the_answer(client: openai.OpenAI, change: Chat) -> None:
    made = create(client, chat(logprobs=True) | change)
    choice = made["choices"][0]
    assert "reasoning_content" not in choice["message"] and choice["message"]["content"] == "Grüße, 世界 👋!"
    assert choice["logprobs"]["reasoning_content"] is None
    assert made["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    chunks = stream(client, chat(logprobs=True) | change)
    assert told(chunks, "content") == "Grüße, 世界 👋!"
    assert "because" not in str(chunks)


def test_what_changes_nothing_is_told(client: openai.OpenAI) -> None:
    change = {"thinking": {"type": "disabled", "budget_tokens": 5}, "thinking_budget": 9, "reasoning_effort": "low"}
    raw = client.chat.completions.with_raw_response.create(**chat("plain"), extra_body=change)
    assert raw.headers["x-hadal-ignored"] == "thinking.budget_tokens, thinking_budget, reasoning_effort"


def test_efforts_reach_the_prompt() -> None:
    texts = dataclasses.replace(own_prompt_texts(), efforts={"low": "", "high": "!", "max": "!!"}, default_effort="low")
    with running(scripted_llm(SCRIPT, texts=texts)) as server, client_of(server) as client:
        words = ("low", "high", "max")
        low, high, most = (create(client, chat(reasoning_effort=w))["usage"]["prompt_tokens"] for w in words)
    assert low + 2 == high + 1 == most
