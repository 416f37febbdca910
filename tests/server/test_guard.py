"""The guard in front of a plain app on a real port: limits on bodies, headers, failures, and other sites."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient

from hadal.server.guard import SameSite, protect
from hadal.server.settings import Settings

LIMIT = 1000


def make_app(**settings: Any) -> FastAPI:
    app = FastAPI()

    @app.post("/echo")
    @app.post("/v1/files")
    @app.post("/anthropic/v1/messages")
    async def echo(request: Request) -> dict[str, Any]:
        return {"size": len(await request.body()), "id": request.state.request_id}

    @app.post("/swallow")
    async def swallow(request: Request) -> dict[str, Any]:
        try:
            await request.body()
        except Exception:
            return {"size": -1}
        return {"size": 0}

    @app.post("/refuse")
    async def refuse() -> JSONResponse:
        return JSONResponse({}, 401)

    @app.get("/fail")
    async def fail() -> None:
        raise RuntimeError("on purpose")

    @app.get("/break")
    async def break_off() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            raise RuntimeError("on purpose")

        return StreamingResponse(pieces())

    protect(app, Settings(**({"body_limit": LIMIT, "body_seconds": 0.3} | settings)))
    return app


@contextmanager
def served(app: Any) -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with served(make_app()) as it:
        yield it


def talk(port: int, *pieces: bytes) -> tuple[int, dict[str, str], Any]:
    """Send raw bytes and read until the server closes: status, headers, JSON."""
    with closing(socket.create_connection(("127.0.0.1", port), timeout=10)) as connection:
        for piece in pieces:
            connection.sendall(piece)
        raw = b""
        while more := connection.recv(65536):
            raw += more
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    if headers.get("transfer-encoding") == "chunked":
        body = body.split(b"\r\n", 2)[1]
    return int(first.split()[1]), headers, json.loads(body)


def post(path: str, *headers: str) -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()


def test_a_body_within_the_limit_passes_and_is_numbered(port: int) -> None:
    status, headers, body = talk(port, post("/echo", f"Content-Length: {LIMIT}"), b"x" * LIMIT)
    assert (status, body["size"]) == (200, LIMIT) and headers["x-request-id"] == body["id"]


@pytest.mark.parametrize("path", ["/echo", "/swallow", "/no/such/place"])
def test_a_body_that_says_it_is_too_large_is_not_read(port: int, path: str) -> None:
    status, headers, body = talk(port, post(path, f"Content-Length: {LIMIT + 1}"), b"x" * (LIMIT + 1))
    assert status == 413 and body["error"]["code"] == "request_too_large" and "1,000 bytes" in body["error"]["message"]
    assert headers["connection"] == "close" and len(headers["x-request-id"]) == 32


@pytest.mark.parametrize("path", ["/echo", "/swallow"])
def test_a_body_in_chunks_is_refused_once_it_is_too_large(port: int, path: str) -> None:
    chunk = b"190\r\n" + b"x" * 400 + b"\r\n"
    assert talk(port, post("/echo", "Transfer-Encoding: chunked"), chunk, chunk, b"0\r\n\r\n")[2]["size"] == 800
    status, _, body = talk(port, post(path, "Transfer-Encoding: chunked"), chunk * 3, b"0\r\n\r\n")
    assert status == 413 and body["error"]["type"] == "request_too_large"


def test_uploads_have_a_limit_of_their_own(port: int) -> None:
    assert talk(port, post("/v1/files", "Content-Length: 3000"), b"x" * 3000)[0] == 200
    assert talk(port, post("/v1/files", "Content-Length: 999999999"), b"x" * 3000)[0] == 413


def test_a_client_that_goes_on_sending_still_reads_the_refusal(port: int) -> None:
    pieces = [b"x" * 100] * 15
    assert talk(port, post("/echo", "Content-Length: 1500"), *pieces)[0] == 413


@pytest.mark.parametrize("how", ["Content-Length: 32000000", "Transfer-Encoding: chunked"])
def test_who_is_refused_before_the_body_is_read_still_reads_why(how: str) -> None:
    with served(make_app(body_limit=40_000_000, body_seconds=20)) as at:
        piece = b"x" * 1_000_000
        sent = [piece] if "Length" in how else [b"%x\r\n" % len(piece), piece, b"\r\n"]
        end = [] if "Length" in how else [b"0\r\n\r\n"]
        for path, status in (("/nowhere", 404), ("/refuse", 401)):
            got, headers, _ = talk(at, post(path, how).replace(b"Connection: close\r\n", b""), *sent * 32, *end)
            assert got == status and headers["connection"] == "close"


def test_a_body_that_does_not_arrive_is_given_up(port: int) -> None:
    start = time.monotonic()
    status, _, body = talk(port, post("/echo", "Content-Length: 10"), b"x")
    assert status == 408 and body["error"]["code"] == "body_timeout" and 0.2 < time.monotonic() - start < 5


def test_refusals_have_the_shape_of_their_api(port: int) -> None:
    _, _, body = talk(port, post("/anthropic/v1/messages", "Content-Length: 2000"), b"x" * 2000)
    assert body["type"] == "error" and body["error"]["type"] == "request_too_large"


def test_every_response_has_headers_that_keep_browsers_from_running_it() -> None:
    client = TestClient(make_app())
    for response in (client.post("/echo"), client.get("/nowhere"), client.get("/fail")):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
    assert client.post("/echo").headers["x-request-id"] != client.post("/echo").headers["x-request-id"]


def test_an_app_that_fails_is_answered_for(caplog: pytest.LogCaptureFixture) -> None:
    response = TestClient(make_app(), raise_server_exceptions=False).get("/fail")
    number = response.headers["x-request-id"]
    assert response.status_code == 500 and number in response.json()["error"]["message"]
    assert number in caplog.text and "on purpose" in caplog.text and "on purpose" not in response.text


def test_a_stream_that_fails_breaks_off() -> None:
    with pytest.raises(RuntimeError, match="on purpose"):
        TestClient(make_app()).get("/break")


def test_other_origins_are_told_only_if_they_are_named() -> None:
    foreign = {"Origin": "https://a.example"}
    assert "access-control-allow-origin" not in TestClient(make_app()).post("/echo", headers=foreign).headers
    client = TestClient(make_app(cors=("https://a.example",)))
    assert client.post("/echo", headers=foreign).headers["access-control-allow-origin"] == "https://a.example"
    other = client.post("/echo", headers={"Origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", None, 200),
        ("[::1]:8000", None, 200),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost", "https://named.example", 200),
        ("localhost", "vscode-webview://abc", 200),
        ("localhost:8000", "http://localhost:3000", 403),
        ("LOCALHOST:8000", "http://localhost:8000", 200),
        ("localhost", "https://evil.example", 403),
        ("localhost", "HTTP://evil.example", 403),
        ("localhost", "http://[", 403),
        ("localhost", "null", 403),
        ("evil.example", "http://evil.example", 403),
        ("localhost.evil.example", None, 403),
        ("", None, 403),
    ],
)
def test_a_server_without_keys_answers_no_other_site(host: str, origin: str | None, status: int) -> None:
    keyless = True
    app = SameSite(make_app(), lambda: keyless, ("https://named.example",))
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    assert TestClient(app).post("/echo", headers=headers).status_code == status
    keyless = False
    assert TestClient(app).post("/echo", headers=headers).status_code == 200
