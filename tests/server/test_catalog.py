from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from hadal.accounts import Accounts, Limits
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.chatting import chat, client_of, create
from tests.server.conftest import Running, running
from tests.test_llm import SCRIPT

NAMES = ["scripted", "deepseek-flash", "deepseek-v4-flash", "deepseek-v4-pro", "deepseek-chat", "deepseek-reasoner"]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as it:
        yield it


def test_models_are_listed_under_all_names_that_are_no_patterns(client: openai.OpenAI, server: Running) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == NAMES and {model.object for model in listed} == {"model"}
    assert {model.model_dump()["context_length"] for model in listed} == {4096}
    assert server.call("/models") == server.call("/v1/models")


def test_a_model_is_found_under_any_of_its_names(client: openai.OpenAI) -> None:
    for name in ("scripted", "deepseek-chat", "claude-opus-4-8", "deepseek-v4-flash[1m]"):
        assert client.models.retrieve(name).id == name
    with pytest.raises(openai.NotFoundError, match="'vendor/other'"):
        client.models.retrieve("vendor/other")


@pytest.mark.parametrize("prefix", ["", "/anthropic"])
def test_anthropic_clients_see_their_own_shape(server: Running, prefix: str) -> None:
    with anthropic.Anthropic(base_url=server.url + prefix, api_key="none", max_retries=0) as client:
        page = client.models.list()
        assert [model.id for model in page.data] == NAMES and page.has_more is False
        assert (page.first_id, page.last_id) == (NAMES[0], NAMES[-1])
        model = client.models.retrieve("scripted")
        assert (model.type, model.display_name, model.created_at.year >= 2024) == ("model", "scripted", True)


def test_balance(tmp_path: Path) -> None:
    with Accounts(folder=tmp_path) as accounts:
        secrets = [
            accounts.keys.create(name, limits)[1]
            for name, limits in (
                ("rich", Limits(budget=Decimal("12.5"))),
                ("free", Limits()),
                ("poor", Limits(budget=Decimal(0))),
            )
        ]
        with running(scripted_llm(SCRIPT), accounts=accounts) as server:
            rich, free, poor = (server.call("/user/balance", authorization=f"Bearer {s}")[1] for s in secrets)
            assert server.call("/user/balance")[0] == 401
    info = {"currency": "USD", "total_balance": "12.50", "granted_balance": "12.50", "topped_up_balance": "0.00"}
    assert rich == {"is_available": True, "balance_infos": [info]}
    assert free == {"is_available": True, "balance_infos": []}
    assert poor["is_available"] is False and poor["balance_infos"][0]["total_balance"] == "0.00"


def test_texts_become_tokens_and_back(server: Running) -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode("the cat 世界")
    status, made = server.call("/tokenize", {"prompt": "the cat 世界", "return_token_strs": True})
    assert status == 200 and made["tokens"] == [tokenizer.bos_id, *ids]
    assert made["count"] == len(ids) + 1 == len(made["token_strs"]) and made["max_model_len"] == 4096
    bare = server.call("/v1/tokenize", {"model": "scripted", "prompt": "the cat 世界", "add_special_tokens": False})[1]
    assert bare["tokens"] == ids and bare["token_strs"] is None
    assert server.call("/detokenize", {"tokens": ids}) == (200, {"prompt": "the cat 世界"})


def test_conversations_have_the_tokens_that_chat_counts(server: Running, client: openai.OpenAI) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for change in ({}, {"thinking": {"type": "disabled"}}, {"reasoning_effort": "max"}, {"tools": [tool]}):
        body: dict[str, Any] = {"messages": chat()["messages"]} | change
        made = server.call("/tokenize", body)[1]
        assert made["count"] == create(client, chat() | change)["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/tokenize", {}, 422, "either `prompt` or `messages`"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "x"}]}, 422, "either"),
        ("/tokenize", {"messages": []}, 422, "at least 1"),
        ("/tokenize", {"messages": [{"role": "user"}]}, 400, "no content"),
        ("/tokenize", {"messages": chat()["messages"], "think": True, "thinking": False}, 422, "send one"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 400, "does not exist"),
        ("/tokenize", {"prompt": "a", "mood": 1}, 422, "unknown field"),
        ("/tokenize", {"prompt": "\ud800"}, 400, "surrogate"),
        ("/detokenize", {"tokens": [10**6]}, 422, "beyond 299"),
        ("/detokenize", {"tokens": [-1]}, 422, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, 422, "list"),
    ],
)
def test_refusals(server: Running, path: str, body: Any, status: int, words: str) -> None:
    got, answer = server.call(path, body)
    assert got == status and words in answer["error"]["message"]


def test_without_a_model_the_catalog_says_that_it_is_being_loaded(server: Running) -> None:
    backend, server.service._backend = server.service._backend, None
    try:
        assert server.call("/models")[0] == server.call("/tokenize", {"prompt": "a"})[0] == 503
    finally:
        server.service._backend = backend


def test_a_count_may_come_without_the_tokens(server: Running) -> None:
    body = {"prompt": "the cat"}
    whole, counted = server.call("/tokenize", body)[1], server.call("/tokenize", body | {"return_tokens": False})[1]
    assert counted == {"count": whole["count"], "max_model_len": 4096}
    assert server.call("/tokenize", body | {"return_tokens": False, "return_token_strs": True})[0] == 422


def test_counting_is_a_request_to_the_limits_of_a_key(tmp_path: Path) -> None:
    with Accounts(folder=tmp_path) as accounts:
        _, secret = accounts.keys.create("a", Limits(requests_per_minute=3, budget=Decimal(0)))
        anthropic_body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
        with running(scripted_llm(SCRIPT), accounts=accounts) as server:
            statuses = [
                server.call(path, body, authorization=f"Bearer {secret}")[0]
                for path, body in (
                    ("/tokenize", {"prompt": "x"}),
                    ("/anthropic/v1/messages/count_tokens", anthropic_body),
                    ("/detokenize", {"tokens": [5]}),
                    ("/tokenize", {"prompt": "x"}),
                    ("/anthropic/v1/messages/count_tokens", anthropic_body),
                )
            ]
    assert statuses == [200, 200, 200, 429, 429]
