"""What chat offers beyond DeepSeek's, and how it holds together under many clients and failures."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from hadal.llm import LLM
from tests.fakes import ScriptedModel, scripted_llm
from tests.server.chatting import TOOL, Chat, chat, client_of, create, stream, told
from tests.server.conftest import Running, running
from tests.test_llm import SCRIPT
from tests.test_nano import FOLDER


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with client_of(server) as it:
        yield it


def text_of(made: Chat) -> str:
    return str(made["choices"][0]["message"]["content"])


def test_several_answers_stream_side_by_side(client: openai.OpenAI) -> None:
    chunks = stream(client, chat(n=3))
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    for index in range(3):
        assert told(chunks, "content", index) == "Grüße, 世界 👋!"
    assert sum(chunk["choices"][0]["finish_reason"] == "stop" for chunk in chunks) == 3
    assert [bool(chunk["usage"]) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    made = create(client, chat(n=3))
    assert [choice["index"] for choice in made["choices"]] == [0, 1, 2]
    assert made["usage"]["completion_tokens"] == chunks[-1]["usage"]["completion_tokens"]


def test_seeds_repeat_an_answer(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        made = create(client, chat("<dice>", seed=seed, max_tokens=20, temperature=1, n=2))
        return [choice["message"]["reasoning_content"] for choice in made["choices"]]

    assert texts(1) == texts(1) != texts(2) and len(set(texts(1))) == 2


def test_prompts_are_scored_and_ids_told_as_vllm_does(client: openai.OpenAI) -> None:
    made = create(client, chat(prompt_logprobs=1, return_token_ids=True))
    assert len(made["prompt_logprobs"]) == len(made["prompt_token_ids"]) == made["usage"]["prompt_tokens"]
    assert made["prompt_logprobs"][0] is None
    scored = zip(made["prompt_token_ids"][1:], made["prompt_logprobs"][1:], strict=True)
    assert all({"logprob", "rank", "decoded_token"} == set(entry[str(i)]) for i, entry in scored)
    chunks = stream(client, chat(return_token_ids=True))
    assert chunks[0]["prompt_token_ids"] == made["prompt_token_ids"]
    ids = [i for chunk in chunks for i in chunk["choices"][0].get("token_ids", [])]
    assert ids == made["choices"][0]["token_ids"] and len(ids) == made["usage"]["completion_tokens"]


SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
OBJECT = r"\{\s*\"a\"\s*:\s*[12]\s*\}"
OPENAI = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
SHAPES: list[tuple[Chat, str]] = [
    ({"response_format": OPENAI}, OBJECT),
    ({"regex": "[0-9]{3}x"}, "[0-9]{3}x"),
    ({"grammar": 'start: "yes" | "no"'}, "yes|no"),
    ({"guided_json": SCHEMA}, OBJECT),
    ({"guided_json": json.dumps(SCHEMA)}, OBJECT),
    ({"guided_regex": "b{4}"}, "bbbb"),
    ({"guided_choice": ["red", "blue"]}, "red|blue"),
    ({"guided_grammar": 'start: "maybe"'}, "maybe"),
    ({"structured_outputs": {"json": SCHEMA}}, OBJECT),
    ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
]


@pytest.mark.parametrize(("change", "pattern"), SHAPES)
def test_answers_keep_to_a_form_after_thinking_freely(client: openai.OpenAI, change: Chat, pattern: str) -> None:
    made = create(client, chat(max_tokens=200) | change)
    assert made["choices"][0]["message"]["reasoning_content"] == "because they met"
    assert re.fullmatch(pattern, text_of(made)), text_of(made)


def test_a_form_that_cannot_be_is_refused_with_its_reason(client: openai.OpenAI) -> None:
    for change, word in (
        ({"regex": "("}, "regex"),
        ({"grammar": "start: x"}, "grammar"),
        ({"guided_json": {"type": 5}}, "json"),
    ):
        with pytest.raises(openai.BadRequestError, match=word):
            create(client, chat() | change)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_can_be_forced_while_thinking(client: openai.OpenAI, choice: Any) -> None:
    made = create(client, chat(tools=[TOOL], tool_choice=choice, max_tokens=400))["choices"][0]
    assert made["finish_reason"] in ("tool_calls", "length")
    assert made["message"]["reasoning_content"] == "because they met"
    if made["finish_reason"] == "tool_calls":
        assert {call["function"]["name"] for call in made["message"]["tool_calls"]} == {"weather"}


def test_calls_can_be_forbidden(client: openai.OpenAI) -> None:
    made = create(client, chat("greet", tools=[TOOL], tool_choice="none"))
    assert text_of(made) == "Grüße, 世界 👋!"


def test_a_call_comes_back_with_its_result(client: openai.OpenAI) -> None:
    ask, options = client.chat.completions.create, {"tools": [TOOL], "temperature": 0}
    messages: Any = chat("call")["messages"]
    message: Any = ask(model="scripted", messages=messages, extra_body=options).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "greet"}
    again = ask(model="scripted", messages=[*messages, message, result], extra_body=options)
    assert again.choices[0].message.content == "Grüße, 世界 👋!"


def test_null_fields_count_as_absent(server: Running) -> None:
    nothing = dict.fromkeys(("tool_calls", "refusal", "audio", "function_call", "reasoning_content"))
    body = chat(messages=[{"role": "user", "content": "plain"} | nothing], thinking=None, functions=None, stop=None)
    status, made = server.call("/v1/chat/completions", body)
    assert status == 200 and made["choices"][0]["finish_reason"] == "stop"


def test_many_clients_at_once_get_their_own_answers(client: openai.OpenAI) -> None:
    def right(i: int) -> bool:
        word, expected = (("greet", "Grüße, 世界 👋!"), ("call", "Let me see."))[i % 2]
        return told(stream(client, chat("x " * i + word)), "content") == expected

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(right, range(24))) == [True] * 24


def test_a_failing_request_is_an_error_and_not_an_empty_answer(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.InternalServerError, match="not finite"):
        create(client, chat("broken"))
    with pytest.raises(openai.APIError, match="not finite"):
        stream(client, chat("broken"))
    with pytest.raises(openai.InternalServerError, match="server's log"):
        create(client, chat("<crash>"))
    assert create(client, chat())["choices"][0]["finish_reason"] == "stop"
    assert server.active() == 0


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come true within five seconds")


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_ends_its_request(server: Running, streamed: bool) -> None:
    body = json.dumps(chat("endless", stream=streamed, max_tokens=100_000)).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if streamed:
            assert b"200 OK" in connection.recv(4096)
        wait_until(lambda: server.active() == 1)
    wait_until(lambda: server.active() == 0)


class SlowModel(ScriptedModel):
    def advance(self, *args: Any) -> Any:
        time.sleep(0.004)
        return super().advance(*args)


def test_a_call_being_written_keeps_the_stream_alive() -> None:
    llm = scripted_llm(SCRIPT, model=SlowModel)
    with running(llm, keep_alive_seconds=0.05) as server, client_of(server) as client:
        raw = client.chat.completions.with_raw_response.create(**chat("call", tools=[TOOL]), stream=True)
        lines = list(raw.http_response.iter_lines())
    called = next(i for i, line in enumerate(lines) if '"tool_calls"' in line)
    said = max(i for i, line in enumerate(lines[:called]) if '"content":"' in line)
    assert ": keep-alive" in lines[said:called]


def test_an_unforeseen_error_keeps_the_shape_of_errors() -> None:
    llm = scripted_llm(SCRIPT)
    with running(llm) as server:
        llm.default_params = None  # type: ignore[method-assign,assignment]
        status, body = server.call("/chat/completions", chat())
        assert status == 500 and body["error"]["type"] == "server_error"
        assert set(body["error"]) == {"message", "type", "param", "code"}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="this installation has no embedded model")
def test_a_model_that_samples_keeps_to_schema_seed_and_count() -> None:
    with running(LLM("nano", device="cpu", max_context=2048)) as server, client_of(server) as client:
        body = {"model": "nano", "messages": chat("Name a colour.")["messages"], "response_format": OPENAI, "n": 2}
        body |= {"max_tokens": 400, "seed": 7, "temperature": 1.0, "thinking": False}
        first, again = (create(client, body)["choices"] for _ in range(2))
    assert [choice["message"] for choice in first] == [choice["message"] for choice in again]
    assert all(re.fullmatch(OBJECT, choice["message"]["content"]) for choice in first)


@pytest.mark.parametrize(
    "roles", ["system", "user assistant system", "system user developer user", "developer developer"]
)
def test_a_system_message_behind_others_is_read_as_the_users_words(server: Running, roles: str) -> None:
    messages = [{"role": role, "content": f"the end is greet {i}"} for i, role in enumerate(roles.split())]
    _, told = server.call("/v1/tokenize", {"messages": messages, "thinking": {"type": "disabled"}})
    text = server.llm.tokenizer.decode(told["tokens"])
    # Whoever speaks last, it is the assistant's turn; an assistant never follows what no turn contains.
    assert text.endswith(f"greet {len(messages) - 1}<｜Assistant｜></think>")
    assert text.count("<｜Assistant｜>") == 1 + roles.split().count("assistant")


def test_what_cannot_be_parsed_is_refused_with_a_remedy(server: Running) -> None:
    status, told = server.call("/v1/chat/completions", "[" * 100_000)
    assert status == 400 and "JSON" in told["error"]["message"]


def test_requests_are_numbered_for_clients_of_both_vendors(server: Running) -> None:
    with httpx2.Client(base_url=server.url) as client:
        response = client.get("/v1/models")
        assert response.headers["x-request-id"] == response.headers["request-id"]
        assert [client.head(path).status_code for path in ("/livez", "/readyz", "/health", "/startupz")] == [200] * 4
        wrong = client.post("/v1/models", json={})
        assert wrong.status_code == 405 and "GET" in wrong.headers["allow"]
