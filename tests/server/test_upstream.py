"""Answers through an upstream: equal to direct ones, whatever the server tells or breaks; no work goes on unread."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hadal.llm import LLM
from hadal.server import upstream as module
from hadal.server.remote import RemoteBackend
from hadal.server.upstream import Upstream, UpstreamError
from tests.fakes import scripted_llm, small_tokenizer
from tests.server.conftest import Running, running

CALL = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n'
    '<｜DSML｜parameter name="at" string="true">sky</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
SCRIPT: dict[str, str | None] = {
    "plain": "one. two. three.",
    "ponder": "hm</think>so be it",
    "use it": "Let me see.\n\n" + CALL,
    "broken": None,
}
AT = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": AT}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without weights."""
    path = tmp_path_factory.mktemp("small")
    small_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Running, Running]]:
    """A server, and one that answers through it."""
    with (
        running(scripted_llm(SCRIPT, context=100_000, max_concurrent=8)) as direct,
        running(RemoteBackend(Upstream(direct.url), folder), model="scripted") as front,
    ):
        yield direct, front


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {
        "model": "scripted", "messages": [{"role": "user", "content": text}], "thinking": {"type": "disabled"},
        "temperature": 0, "max_tokens": 400,
    } | more  # fmt: skip


def send(server: Running, body: dict[str, Any]) -> http.client.HTTPResponse:
    host, port = server.url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    return connection.getresponse()


def stream(server: Running, body: dict[str, Any]) -> http.client.HTTPResponse:
    return send(server, body | {"stream": True})


def events(response: http.client.HTTPResponse) -> list[Any]:
    lines = [line[6:] for line in response.read().decode().split("\n") if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def same(answer: dict[str, Any]) -> Any:
    """What must not differ between two answers: all but names and moments."""
    text = json.dumps({k: v for k, v in answer.items() if k not in ("id", "created")})
    for call in [c for choice in answer["choices"] for c in choice.get("message", {}).get("tool_calls", [])]:
        text = text.replace(call["id"], "call")
    return json.loads(text)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", chat("plain")),
        ("/v1/chat/completions", chat("plain", max_tokens=3)),
        ("/v1/chat/completions", chat("ponder", thinking={"type": "enabled"}, logprobs=True, top_logprobs=2)),
        ("/v1/chat/completions", chat("use it", tools=[TOOL])),
        ("/v1/chat/completions", chat("<dice>", temperature=1, seed=5, n=3, max_tokens=9, logprobs=True)),
        ("/v1/chat/completions", chat("plain", stop=["two"])),
        ("/v1/completions", {"model": "scripted", "prompt": ["plain ", "<dice>"], "seed": 2, "max_tokens": 6}),
        ("/v1/completions", {"model": "scripted", "prompt": "plain", "logprobs": 3, "echo": True, "temperature": 0}),
        ("/v1/completions", {"model": "scripted", "prompt": "plain", "prompt_logprobs": 2, "n": 2, "temperature": 0}),
        ("/v1/completions", {"model": "scripted", "prompt": [9, 8, 7], "stop_token_ids": [5], "max_tokens": 4}),
    ],
)
def test_answers_are_those_of_the_server_itself(pair: Any, path: str, body: dict[str, Any]) -> None:
    direct, front = pair
    status, wanted = direct.call(path, body | {"user_id": "somebody"})
    assert status == 200
    status, found = front.call(path, body)
    assert status == 200
    for answer in (wanted, found):
        for name in ("prompt_cache_hit_tokens", "prompt_cache_miss_tokens", "prompt_tokens_details"):
            answer["usage"].pop(name, None)
    assert same(found) == same(wanted)


def test_a_stream_tells_the_same(pair: Any) -> None:
    direct, front = pair
    told = []
    for server in (direct, front):
        chunks = events(stream(server, chat("ponder", thinking={"type": "enabled"})))
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        told.append(["".join(d.get(name) or "" for d in deltas) for name in ("reasoning_content", "content")])
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[-1]["usage"]["completion_tokens"] > 5
    assert told[0] == told[1] == ["hm", "so be it"]


def test_a_seeded_answer_of_the_embedded_model_is_the_same_through_an_upstream() -> None:
    body = chat("Tell me a story about a cat.", model="nano", temperature=1, seed=7, logprobs=True, max_tokens=30)
    with (
        running(LLM("nano", max_concurrent=2, speculation=0)) as direct,
        running(RemoteBackend(Upstream(direct.url + "/v1/"), "nano")) as front,
    ):
        assert same(direct.call("/v1/chat/completions", body)[1]) == same(front.call("/v1/chat/completions", body)[1])


def test_what_the_server_found_in_its_cache_is_counted_as_hit_and_only_for_the_same_user(pair: Any) -> None:
    _, front = pair
    first = front.call("/v1/chat/completions", chat("plain " * 40, user_id="a"))[1]
    message = first["choices"][0]["message"]
    turn = [{"role": "user", "content": "plain " * 40}, message, {"role": "user", "content": "plain again"}]
    for user, hits in (("b", False), ("a", True)):
        usage = front.call("/v1/chat/completions", chat("", messages=turn, user_id=user))[1]["usage"]
        assert (usage["prompt_cache_hit_tokens"] > first["usage"]["prompt_tokens"] / 2) is hits


def test_a_client_that_leaves_ends_the_work_upstream(pair: Any) -> None:
    direct, front = pair
    response = stream(front, chat("endless", max_tokens=90_000))
    response.read(500)
    assert direct.active() == 1 and front.service.backend.load.running == 1
    response.close()
    until(lambda: direct.active() == 0 and front.active() == 0)
    assert front.service.backend.load.running == 0


def test_a_stop_string_ends_the_work_upstream(pair: Any) -> None:
    direct, front = pair
    status, answer = front.call("/v1/chat/completions", chat("endless", max_tokens=90_000, stop=["aaaa"]))
    assert status == 200 and answer["choices"][0]["finish_reason"] == "stop"
    until(lambda: direct.active() == 0)


def test_an_engine_that_fails_upstream_is_an_error_here(pair: Any) -> None:
    status, answer = pair[1].call("/v1/chat/completions", chat("broken"))
    assert (status, answer["error"]["code"]) == (500, "upstream_failed")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "look"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": "none"}, "tool_choice"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"tools": [TOOL | {"function": TOOL["function"] | {"strict": True}}]}, "tools"),
        ({"response_format": {"type": "json_object"}, "thinking": {"type": "enabled"}}, "response_format"),
    ],
)
def test_what_cannot_be_promised_through_an_upstream_is_refused(pair: Any, more: dict[str, Any], param: str) -> None:
    status, answer = pair[1].call("/v1/chat/completions", chat("plain", **more))
    assert status == 400 and answer["error"]["param"] == param and "elsewhere" in answer["error"]["message"]


def test_structured_output_without_thinking_is_held_to_upstream(pair: Any) -> None:
    body = chat("<dice>", temperature=1, seed=1, structured_outputs={"choice": ["yes", "no"]})
    status, answer = pair[1].call("/v1/chat/completions", body)
    assert status == 200 and answer["choices"][0]["message"]["content"] in ("yes", "no")


def test_an_upstream_that_went_away_is_503_with_a_time(folder: Path) -> None:
    with running(scripted_llm(SCRIPT)) as direct:
        backend = RemoteBackend(Upstream(direct.url), folder)
    with running(backend, model="scripted") as front:
        for _ in range(2):  # the second time it is not even asked
            began = time.monotonic()
            status, answer = front.call("/v1/chat/completions", chat("plain"))
            assert (status, answer["error"]["code"]) == (503, "upstream_unavailable")
        assert time.monotonic() - began < 1
        assert send(front, chat("plain")).headers["retry-after"] == "2"
        time.sleep(2)
        assert events(stream(front, chat("plain")))[-1]["error"]["code"] == "upstream_unavailable"


def test_no_more_answers_wait_than_may(folder: Path) -> None:
    with (
        fake(lambda body: (200, [b""], 0.5)) as url,
        running(RemoteBackend(Upstream(url), folder, max_waiting=2), model="scripted") as front,
    ):
        held = [stream(front, chat("plain")) for _ in range(2)]
        assert front.call("/v1/chat/completions", chat("plain"))[0] == 429
        for response in held:
            assert "upstream_unavailable" in response.read().decode()


def test_a_server_that_is_no_upstream_is_told_in_one_sentence() -> None:
    with pytest.raises(UpstreamError, match="cannot be read"):
        Upstream("http://127.0.0.1:1")
    with fake(lambda body: (200, [], 0)) as url, pytest.raises(UpstreamError, match="has no model 'other'"):
        Upstream(url, model="other")


Reply = tuple[int, list[bytes], float]  # status, parts of the body, seconds before it ends


@contextmanager
def fake(reply: Callable[[dict[str, Any]], Reply], owner: str = "vllm", **headers: str) -> Iterator[str]:
    """A server with one model whose completions are what `reply` says."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            card = {"id": "v4", "owned_by": owner, "max_model_len": 4096}
            self._send(200, [json.dumps({"data": [card]}).encode()])

        def do_POST(self) -> None:
            status, parts, seconds = reply(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self._send(status, parts)
            time.sleep(seconds)

        def _send(self, status: int, parts: list[bytes]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)
                self.wfile.flush()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def event(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": reason} | more
    return b"data: " + json.dumps({"choices": [choice], "usage": None}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}}\n\n'
DONE = b"data: [DONE]\n\n"


@contextmanager
def behind(folder: Path, reply: Callable[[dict[str, Any]], Reply], owner: str = "vllm", **headers: str) -> Any:
    with (
        fake(reply, owner, **headers) as url,
        running(RemoteBackend(Upstream(url), folder), model="scripted") as front,
    ):
        yield front


def test_text_without_token_ids_is_read_with_our_tokenizer(folder: Path) -> None:
    parts = ["h", "m", "</think>", "Let me see.\u2028\n\n<", *CALL[1:]]
    sent = [event(part) for part in parts]
    sent += [event("", "stop", stop_reason=None), b": ping\n\n", USAGE, DONE]
    with behind(folder, lambda body: (200, sent, 0)) as front:
        status, answer = front.call("/v1/chat/completions", chat("x", thinking={"type": "enabled"}, tools=[TOOL]))
    (choice,), usage = answer["choices"], answer["usage"]
    assert status == 200 and choice["finish_reason"] == "tool_calls" and usage["prompt_cache_hit_tokens"] == 4
    message = choice["message"]
    assert message["reasoning_content"] == "hm" and message["content"] == "Let me see.\u2028"
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": '{"at": "sky"}'}
    # Text is encoded piece by piece; the end of the sentence is a token, too.
    assert usage["completion_tokens"] == sum(len(small_tokenizer().encode(part)) for part in parts) + 1


def test_logprobs_are_read_by_token_or_by_id(folder: Path) -> None:
    ids = small_tokenizer().encode("ab")
    lists = {
        "tokens": ["a", f"token_id:{ids[1]}"],
        "token_logprobs": [-0.5, -2.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"c": -0.25, "d": -1.25, f"token_id:{ids[1]}": -2.5}],
    }
    sent = [event("ab", "length", logprobs=lists), USAGE, DONE]
    with behind(folder, lambda body: (200, sent, 0)) as front:
        _, answer = front.call("/v1/chat/completions", chat("x", logprobs=True, top_logprobs=2, max_tokens=2))
    first, second = answer["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"], second["token"], second["logprob"]) == ("a", -0.5, "b", -2.5)
    assert [p["token"] for p in second["top_logprobs"]] == ["c", "d"]


def test_what_is_asked_of_vllm(folder: Path) -> None:
    asked: list[dict[str, Any]] = []
    sent = [event("yes", "stop"), USAGE, DONE]
    more = {
        "stop": ["x"],
        "top_k": 5,
        "seed": 3,
        "priority": 2,
        "user_id": "u",
        "response_format": {"type": "json_object"},
    }
    for owner in ("vllm", "sglang"):
        with behind(folder, lambda body: (asked.append(body) or 200, sent, 0), owner) as front:  # type: ignore[func-returns-value]
            assert front.call("/v1/chat/completions", chat("x", **more))[0] == 200
            assert front.call("/v1/chat/completions", chat("x", tools=[TOOL], tool_choice="none"))[0] == 200
    vllm, free, sglang, _ = asked
    assert vllm["structured_outputs"] == {"json_object": True} and sglang["json_schema"] == '{"type": "object"}'
    assert vllm["cache_salt"] and sglang["extra_key"] and "cache_salt" not in free and "seed" not in free
    assert (vllm["top_k"], vllm["seed"], free["top_k"]) == (5, 3, -1)
    assert "stop" not in vllm and "priority" not in vllm and list(free["logit_bias"].values()) == [-100]
    assert all(isinstance(i, int) for i in vllm["prompt"]) and vllm["return_token_ids"] is True


@pytest.mark.parametrize(
    ("reply", "status", "code"),
    [
        ((200, [event("one"), event(" two")], 0), 503, "upstream_unavailable"),
        ((200, [b""], 0), 503, "upstream_unavailable"),
        ((200, [b"<html>hello</html>\n"], 0), 503, "upstream_unavailable"),
        ((200, [b"data: {not json}\n\n"], 0), 500, "upstream_failed"),
        ((200, [b"data: [1]\n\n"], 0), 500, "upstream_failed"),
        ((200, [b'data: {"error": {"message": "boom", "type": "server_error"}}\n\n'], 0), 500, "upstream_failed"),
        ((200, [b'data: {"error": {"message": "x", "type": "overloaded_error"}}\n\n'], 0), 503, "upstream_unavailable"),
        ((200, [event("x", index=7)], 0), 500, "upstream_failed"),
        ((200, [event("x", token_ids=[10**9])], 0), 500, "upstream_failed"),
        ((200, [event("x", token_ids="abc")], 0), 500, "upstream_failed"),
        ((200, [event("x", "cosmic_ray")], 0), 500, "upstream_failed"),
        ((200, [event("x", "stop")[:-30]], 0), 503, "upstream_unavailable"),
        ((200, [b'data: {"error": {"message": "x", "code": "grammar_failed"}}\n\n'], 0), 400, "grammar_failed"),
        ((400, [b'{"error": {"message": "too long"}}'], 0), 400, "upstream_refused"),
        ((401, [b"no"], 0), 500, "upstream_failed"),
        ((429, [b'{"detail": "full"}'], 0), 429, "queue_full"),
        ((503, [b"[]"], 0), 503, "upstream_unavailable"),
        ((502, [b""], 0), 500, "upstream_failed"),
    ],
)  # fmt: skip
def test_what_an_upstream_does_wrong_becomes_one_clear_error(
    folder: Path, reply: Reply, status: int, code: str
) -> None:
    with behind(folder, lambda body: reply, retry_after="7") as front:
        response = send(front, chat("x"))
        assert (response.status, json.loads(response.read())["error"]["code"]) == (status, code)
        if reply[0] in (429, 503):
            assert response.headers["retry-after"] == "7"
        told = events(stream(front, chat("x")))[-1]["error"]
        assert told["code"] == code and "token_id" not in told["message"]


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=6), st.lists(st.integers(0, 400), max_size=8)
)
def test_events_are_the_same_however_the_stream_is_cut(texts: list[str], cuts: list[int]) -> None:
    raw = b"".join(event(text) for text in texts) + b": comment\n\n" + DONE + b"data: behind the end\n\n"
    marks = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})

    class Response:
        async def aiter_bytes(self) -> Any:
            for begin, end in itertools.pairwise(marks):
                yield raw[begin:end]

    async def read() -> list[Any]:
        return [json.loads(data) async for data in module._events(Response())]  # type: ignore[arg-type]

    assert [chunk["choices"][0]["text"] for chunk in asyncio.run(read())] == texts
