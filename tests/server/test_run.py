"""The server's process: where it may listen, loading beside answering, signals and exit codes."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import uvicorn
from starlette.responses import JSONResponse, Response
from uvicorn.lifespan.off import LifespanOff

import hadal.server.run as room
from hadal.accounts import Accounts
from hadal.server.run import ServeError, is_local, run
from hadal.server.service import Service
from hadal.server.settings import Settings, read_settings

ROOT = Path(__file__).parent.parent.parent
# Answers with an "a" each 20 ms for ever, and not at all to whoever asks to hang. Loads once the file `go` is there,
# and fails if that says so.
SERVER = """
import sys, time
from pathlib import Path
import hadal.server.run as room
from hadal.server.backend import LocalBackend
from hadal.server.settings import Settings
from tests.fakes import ScriptedModel, scripted_llm

folder = Path(sys.argv[1])

class Slow(ScriptedModel):
    def advance(self, *args):
        time.sleep(0.02)
        return super().advance(*args)

def load(progress):
    progress("waiting for a file")
    while not (folder / "go").exists():
        time.sleep(0.02)
    if (folder / "go").read_text():
        raise OSError(28, (folder / "go").read_text())
    return Hanging(scripted_llm({}, model=Slow, speculation=0))

class Hanging(LocalBackend):
    def prepare(self, ask, tenant):
        if "hang" in str(ask.messages):
            (folder / "hangs").touch()
            time.sleep(60)
        return super().prepare(ask, tenant)

room._CLOSE_SECONDS = 0.7
room.run(load, Settings(model="scripted", data=folder, drain_seconds=float(sys.argv[2])), port=0)
"""


@dataclass
class Served:
    process: subprocess.Popen[str]
    port: int
    folder: Path

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def load(self, text: str = "") -> None:
        (self.folder / "go.new").write_text(text)
        (self.folder / "go.new").rename(self.folder / "go")

    def ask_in_vain(self) -> None:
        """Keep a worker thread busy."""
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hang"}]}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        self.wait_until((self.folder / "hangs").exists)

    def ask(self, tokens: int) -> http.client.HTTPResponse:
        """An answer under way."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        body = {
            "model": "scripted",
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": tokens,
            "stream": True,
        }
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        for line in response:
            if b"reasoning_content" in line:
                return response
        raise AssertionError("no token came")

    def wait_until(self, right: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not right():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> int:
        return self.process.wait(timeout=20)


@contextmanager
def served(folder: Path, drain_seconds: float) -> Iterator[Served]:
    command = [sys.executable, "-c", SERVER, str(folder), str(drain_seconds)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, **pipes)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Hadal serves scripted at http://127.0.0.1:"), line
        yield Served(process, int(line.rsplit(":", 1)[1].removesuffix("/v1\n")), folder)
    finally:
        process.kill()
        process.wait()


def test_it_answers_while_loading_then_drains_and_ends_well(tmp_path: Path) -> None:
    with served(tmp_path, 20) as server:
        server.wait_until(lambda: server.get("/startupz")[1].get("stages", []) != [])
        status, told = server.get("/startupz")
        assert status == 503 and told["stages"][0]["line"] == "waiting for a file"
        assert server.get("/livez")[0] == 200 and server.get("/readyz")[0] == 503
        with pytest.raises(AssertionError, match="loading"):
            server.ask(3)
        server.load()
        server.wait_until(lambda: server.get("/readyz")[0] == 200)
        answer = server.ask(40)
        server.process.terminate()
        server.wait_until(lambda: server.get("/readyz")[1]["status"] == "draining")
        with pytest.raises(AssertionError, match="shutting_down"):
            server.ask(3)
        rest = answer.read().decode()
        assert '"completion_tokens":40' in rest and rest.endswith("data: [DONE]\n\n")
        assert server.end() == 0
    with Accounts(folder=tmp_path) as accounts:
        (used,) = accounts.usage()
        assert used.output == 40 and used.requests == 1


def test_answers_that_take_too_long_to_drain_are_ended_with_an_error(tmp_path: Path) -> None:
    with served(tmp_path, 0.3) as server:
        server.load()
        server.wait_until(lambda: server.get("/readyz")[0] == 200)
        answer = server.ask(3000)
        server.process.terminate()
        rest = answer.read().decode()
        assert "shutting_down" in rest and rest.endswith("data: [DONE]\n\n")
        assert server.end() == 0


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    with served(tmp_path, 60) as server:
        server.load()
        server.wait_until(lambda: server.get("/readyz")[0] == 200)
        server.ask(3000)
        server.process.terminate()
        server.wait_until(lambda: server.get("/readyz")[1]["status"] == "draining")
        start = time.monotonic()
        server.process.terminate()
        assert server.end() == 0 and time.monotonic() - start < 5


@pytest.mark.parametrize(("drain_seconds", "signals"), [(0.3, 1), (60, 2)])
def test_signals_end_it_though_threads_are_busy(drain_seconds: float, signals: int, tmp_path: Path) -> None:
    with served(tmp_path, drain_seconds) as server:
        server.load()
        server.wait_until(lambda: server.get("/readyz")[0] == 200)
        server.ask(3000)
        server.ask_in_vain()
        server.process.terminate()
        start = time.monotonic()
        if signals == 2:
            server.wait_until(lambda: server.get("/readyz")[1]["status"] == "draining")
            server.process.terminate()
        assert server.end() == 0 and time.monotonic() - start < 8


def test_a_signal_while_loading_ends_at_once(tmp_path: Path) -> None:
    with served(tmp_path, 60) as server:
        server.wait_until(lambda: server.get("/livez")[0] == 200)
        server.process.terminate()
        assert server.end() == 0


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path: Path) -> None:
    with served(tmp_path, 60) as server:
        server.wait_until(lambda: server.get("/livez")[0] == 200)
        server.load("no space left")
        assert server.end() == 1
        assert server.process.stderr is not None and "OSError: [Errno 28] no space left" in server.process.stderr.read()


@pytest.mark.parametrize("given", [None, 3])
def test_the_model_leaves_a_core_to_http_unless_told(
    given: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Judged at an address that cannot be bound, so that nothing is served."""
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="cannot listen"):
            run(cast(Any, None), Settings(data=tmp_path), port=taken.getsockname()[1], threads=given)
    assert chosen == [given or 7]


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("", False)],
)
def test_addresses_that_other_machines_reach_are_known(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_a_public_address_needs_a_key(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="hadal keys create NAME"):
        run(cast(Any, None), Settings(data=tmp_path), host="0.0.0.0", port=0)
    with Accounts(folder=tmp_path) as accounts:
        accounts.keys.create("someone")
    broken = tmp_path / "no.pem"
    with pytest.raises(ServeError, match="cannot use the certificate"):  # so far it comes with a key
        run(cast(Any, None), Settings(data=tmp_path, tls_cert=broken, tls_key=broken), host="0.0.0.0", port=0)


def test_a_certificate_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    settings = Settings(data=tmp_path, tls_cert=tmp_path / "x.pem", tls_key=tmp_path / "x.pem")
    with pytest.raises(ServeError, match="cannot use the certificate"):
        run(cast(Any, None), settings, port=0)


async def plain(scope: Any, receive: Any, send: Any) -> None:
    await JSONResponse({"scheme": scope["scheme"]})(scope, receive, send)


@contextmanager
def thread_of(settings: Settings, app: Any = plain) -> Iterator[int]:
    config = room._configure(app, settings)
    config.lifespan_class = LifespanOff
    server = uvicorn.Server(config)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join(timeout=20)


def test_a_connection_that_says_nothing_is_closed_and_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_HEAD_SECONDS", 0.3)
    with thread_of(Settings(data=tmp_path)) as port:
        polite = http.client.HTTPConnection("127.0.0.1", port)
        polite.request("GET", "/")
        polite.getresponse().read()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as silent:
            silent.sendall(b"GET / HTTP/1.1\r\nX-Slow: ")
            assert silent.recv(100) == b""
        polite.request("GET", "/")
        assert polite.getresponse().status == 200
        polite.close()


def test_headers_have_a_limit(tmp_path: Path) -> None:
    with thread_of(Settings(data=tmp_path)) as port:
        client = socket.create_connection(("127.0.0.1", port), timeout=10)
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 200_000)
        assert client.recv(100).startswith(b"HTTP/1.1 400")
        client.close()


def test_a_connection_that_takes_nothing_is_closed_and_a_slow_one_is_not(tmp_path: Path) -> None:
    size = 16 << 20
    with thread_of(Settings(data=tmp_path, body_seconds=0.4), Response(b"a" * size)) as port:
        for seconds in (0, 1.5):
            with socket.socket() as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
                client.settimeout(10)
                client.connect(("127.0.0.1", port))
                client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                time.sleep(seconds)
                got = 0
                with suppress(ConnectionResetError):
                    while piece := client.recv(1 << 16):
                        got += len(piece)
                        time.sleep(0 if seconds else 0.004)
                assert (got > size) is (seconds == 0)


def test_https_is_served_with_a_certificate(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to make a certificate")
    subprocess.run(command.split(), check=True, capture_output=True)
    with thread_of(Settings(data=tmp_path, tls_cert=cert, tls_key=key)) as port:
        trust = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("127.0.0.1", port, context=trust, timeout=10)
        connection.request("GET", "/")
        assert json.loads(connection.getresponse().read()) == {"scheme": "https"}
        connection.close()


def test_the_price_list_follows_the_settings_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "hadal.toml"
    file.write_text("")
    with Accounts(folder=tmp_path) as accounts:
        settings = read_settings(file, data=tmp_path)
        server = room._Server(uvicorn.Config(plain), Service(settings, accounts))
        for named, counted in (("pro-launch", "pro-launch"), ("no-such-list", "pro-launch"), ("flash-launch",) * 2):
            file.write_text(f'price_list = "{named}"  # {time.time_ns()}')
            os.utime(file, ns=(time.time_ns(), file.stat().st_mtime_ns + 10**9))
            server._follow_price_list()
            server._follow_price_list()
            assert accounts.price_list == counted
    assert caplog.text.count("no-such-list") == 1
