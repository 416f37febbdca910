from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from hadal.text.tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.chatting import client_of
from tests.server.conftest import Running, running

SCRIPT: dict[str, str | None] = {
    "plain": "one. two. three.",
    "world": "Grüße, 世界 👋!",
    f"def f({FIM_HOLE})": "x, y",
}
Body = dict[str, Any]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(scripted_llm(SCRIPT, max_concurrent=4)) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server, "/beta") as it:
        yield it


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Body:
    body = {"temperature": 0} | options
    return client.completions.create(model="scripted", prompt=prompt, extra_body=body).model_dump(exclude_unset=True)


def stream(client: openai.OpenAI, prompt: Any, **options: Any) -> list[Body]:
    body = {"temperature": 0} | options
    made = client.completions.create(model="scripted", prompt=prompt, stream=True, extra_body=body)
    return [chunk.model_dump(exclude_unset=True) for chunk in made]


def joined(chunks: list[Body], field: str, index: int = 0) -> Any:
    parts = [choice[field] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(parts) if field == "text" else parts


@pytest.mark.parametrize("prefix", ["", "/v1", "/beta", "/beta/v1"])
def test_base_urls(server: Running, prefix: str) -> None:
    with client_of(server, prefix) as client:
        made = complete(client, "plain")
    (choice,) = made["choices"]
    assert choice == {"index": 0, "text": "one. two. three.", "logprobs": None, "finish_reason": "stop"}
    assert made["object"] == "text_completion" and made["id"].startswith("cmpl-")
    assert made["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_prompts_are_texts_or_ids_one_or_several(client: openai.OpenAI) -> None:
    ids = small_tokenizer().encode("plain")
    for prompt in ("plain", ["plain"], ids, [ids]):
        assert [choice["text"] for choice in complete(client, prompt)["choices"]] == ["one. two. three."]
    for both in (["plain", "world"], [ids, small_tokenizer().encode("world")]):
        made = complete(client, both, n=2)
        texts = [choice["text"] for choice in made["choices"]]
        assert texts == ["one. two. three."] * 2 + ["Grüße, 世界 👋!"] * 2
        assert [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]


def test_a_stream_brings_the_same_with_the_usage_at_the_end(client: openai.OpenAI) -> None:
    chunks = stream(client, ["plain", "world"])
    assert (joined(chunks, "text", 0), joined(chunks, "text", 1)) == ("one. two. three.", "Grüße, 世界 👋!")
    for index in (0, 1):
        assert [reason for reason in joined(chunks, "finish_reason", index) if reason] == ["stop"]
    assert [i for i, chunk in enumerate(chunks) if chunk["usage"]] == [len(chunks) - 1]
    assert chunks[-1]["usage"] == complete(client, ["plain", "world"])["usage"] | {
        name: chunks[-1]["usage"][name]
        for name in ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "prompt_tokens_details")
    }


def test_a_middle_is_filled_in(client: openai.OpenAI) -> None:
    made = complete(client, "def f(", suffix=")", return_token_ids=True)
    assert made["choices"][0]["text"] == "x, y"
    prompt = small_tokenizer().decode(made["choices"][0]["prompt_token_ids"])
    assert prompt.endswith(f"{FIM_BEGIN}def f({FIM_HOLE}){FIM_END}")
    texts = [choice["text"] for choice in complete(client, ["def f(", "plain"], suffix=")")["choices"]]
    assert texts == ["x, y", "one. two. three."]
    control = complete(client, "plain", suffix=FIM_END, return_token_ids=True, max_tokens=1)
    ids = control["choices"][0]["prompt_token_ids"]
    assert ids.count(small_tokenizer().token_id(FIM_END)) == 1  # what the client spells stays text


def test_the_prompt_is_echoed(client: openai.OpenAI) -> None:
    assert complete(client, "plain", echo=True)["choices"][0]["text"] == "plainone. two. three."
    assert joined(stream(client, "plain", echo=True, n=2), "text", 1) == "plainone. two. three."
    nothing = complete(client, "plain", echo=True, max_tokens=0)["choices"][0]
    assert (nothing["text"], nothing["finish_reason"]) == ("plain", "length")


def test_logprobs_align_with_the_text(client: openai.OpenAI) -> None:
    for prompt, echo in (("the world", False), ("the world", True), ("plain", True)):
        choice = complete(client, prompt, logprobs=2, echo=echo)["choices"][0]
        lists = choice["logprobs"]
        assert {len(values) for values in lists.values()} == {len(lists["tokens"])}
        assert lists["text_offset"][0] == 0 and lists["text_offset"] == sorted(lists["text_offset"])
        for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
            if "\ufffd" not in token:
                assert choice["text"].startswith(token, offset) or offset == len(choice["text"])
        chosen = zip(lists["tokens"], lists["token_logprobs"], lists["top_logprobs"], strict=True)
        assert all(len(top) <= 2 and (token not in top or top[token] == own) for token, own, top in chosen)
        streamed = [part for part in joined(stream(client, prompt, logprobs=2, echo=echo), "logprobs") if part]
        assert {name: [v for part in streamed for v in part[name]] for name in lists} == lists


def test_prompts_are_scored_without_an_answer(client: openai.OpenAI) -> None:
    ids = small_tokenizer().encode("plain")
    scored = complete(client, [ids], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert len(scored["tokens"]) == len(ids) and scored["token_logprobs"][0] is None
    assert scored["top_logprobs"][0] is None and all(p < 0 for p in scored["token_logprobs"][1:])
    texts = complete(client, "plain", echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert texts["tokens"] == scored["tokens"] and None not in texts["token_logprobs"]
    made = complete(client, ["plain", "world"], prompt_logprobs=0, max_tokens=1, n=2)["choices"]
    lengths = [len(choice["prompt_logprobs"]) for choice in made]
    assert lengths == [len(small_tokenizer().encode(text)) + 1 for text in ("plain", "plain", "world", "world")]


def test_token_ids_are_told_as_vllm_does(client: openai.OpenAI) -> None:
    whole = complete(client, "plain", return_token_ids=True)["choices"][0]
    chunks = stream(client, "plain", return_token_ids=True)
    assert chunks[0]["choices"][0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [i for part in joined(chunks, "token_ids") for i in part] == whole["token_ids"]


def test_the_default_limit_stops_and_forms(client: openai.OpenAI) -> None:
    from hadal.server.completions import CompletionBody
    from hadal.server.settings import Settings

    ask = CompletionBody.model_validate({"model": "nano", "prompt": "a"}).ask(Settings())
    assert ask.sampling["max_tokens"] == 4096 and not ask.thinking
    assert complete(client, "plain", stop=" two")["choices"][0]["text"] == "one."
    assert complete(client, "plain", regex="[0-9]{4}")["choices"][0]["text"].isdecimal()


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"prompt": 5}, 422, "prompt", "token ids"),
        ({"prompt": []}, 422, "prompt", "128"),
        ({"prompt": ["a"] * 129}, 422, "prompt", "128"),
        ({"prompt": [1, "a"]}, 422, "prompt", "each prompt"),
        ({"prompt": [[]]}, 422, "prompt", "each prompt"),
        ({"prompt": [True]}, 422, "prompt", "each prompt"),
        ({"prompt": [10**6]}, 400, "prompt", "outside the vocabulary"),
        ({"prompt": [-1]}, 400, "prompt", "outside the vocabulary"),
        ({"prompt": None}, 422, "prompt", "missing"),
        ({"prompt": "\ud800"}, 400, None, "surrogate"),
        ({"suffix": "\udc00"}, 400, None, "surrogate"),
        ({"model": "other"}, 400, "model", "does not exist"),
        ({"max_tokens": 0}, 422, None, "`echo`"),
        ({"max_tokens": 393217}, 422, "max_tokens", "393216"),
        ({"best_of": 2}, 422, None, "`best_of`"),
        ({"logprobs": 21}, 422, "logprobs", "20"),
        ({"logprobs": True}, 422, "logprobs", "integer"),
        ({"suffix": "b", "echo": True}, 422, None, "`suffix`"),
        ({"prompt": [5], "suffix": "b"}, 422, None, "`suffix`"),
        ({"stream": True, "prompt_logprobs": 1}, 422, None, "`prompt_logprobs`"),
        ({"stream_options": {}}, 400, "stream_options", "`stream`"),
        ({"messages": []}, 422, "messages", "unknown field"),
        ({"thinking": {"type": "enabled"}}, 422, "thinking", "unknown field"),
    ],
)
def test_refusals(server: Running, change: Body, status: int, param: str | None, words: str) -> None:
    got, body = server.call("/v1/completions", {"model": "scripted", "prompt": "plain"} | change)
    assert got == status and body["error"]["param"] == param and words in body["error"]["message"], body


def test_best_of_may_equal_n(client: openai.OpenAI) -> None:
    assert len(complete(client, "plain", n=2, best_of=2, max_tokens=1)["choices"]) == 2
