"""Files through OpenAI's own client, and through raw requests that it would never send."""

from __future__ import annotations

import errno
import http.client
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hadal.accounts import Accounts
from hadal.server.files import _plain
from tests.fakes import scripted_llm
from tests.server.conftest import Running, running

HOUR = {"anchor": "created_at", "seconds": 3600}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running(scripted_llm({}), data=folder, file_limit=100_000, max_files=20) as it:
        yield it


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return connect(server)


def connect(server: Running, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("files-*/*")}


def send_form(
    server: Running, parts: list[bytes], boundary: bytes = b"b0", end: bytes = b"--b0--\r\n", path: str = "/v1/files"
) -> tuple[int, bytes]:
    body = b"".join(b"--b0\r\n" + part + b"\r\n" for part in parts) + end
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.request("POST", path, body, {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    as_file = "" if filename is None else f'; filename="{filename}"'
    return f'Content-Disposition: form-data; name="{name}"{as_file}\r\n\r\n'.encode() + data


def test_a_file_comes_back_as_it_was_sent(client: openai.OpenAI, folder: Path) -> None:
    data = os.urandom(70_000) + b"\r\n--b0\r\n"
    made = client.files.create(file=("täble.bin", data), purpose="user_data", expires_after=HOUR)
    assert made.id.startswith("file-") and made.bytes == len(data) and made.filename == "täble.bin"
    assert made.expires_at == made.created_at + 3600 and abs(made.created_at - time.time()) < 10
    assert client.files.retrieve(made.id) == made
    got = client.files.content(made.id)
    assert got.read() == data
    assert got.response.headers["content-disposition"] == "attachment; filename*=utf-8''t%C3%A4ble.bin"
    assert got.response.headers["content-type"] == "application/octet-stream"
    (path,) = folder.glob(f"files-*/{made.id}")
    assert path.read_bytes() == data and path.stat().st_mode & 0o077 == 0
    assert client.files.delete(made.id).deleted
    assert made.id not in kept(folder)
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)


def test_lists_have_pages_orders_and_purposes(client: openai.OpenAI) -> None:
    ids = [client.files.create(file=(f"{i}", b"x"), purpose="batch").id for i in range(5)]
    other = client.files.create(file=("other", b""), purpose="user_data").id
    assert [f.id for f in client.files.list(purpose="batch")] == ids[::-1]
    page = client.files.list(order="asc", limit=2)
    assert [f.id for f in page.data] == ids[:2] and page.has_more
    assert [f.id for f in page] == [*ids, other]
    assert client.files.list(after=other, order="asc").data == []
    for wrong in ({"limit": 0}, {"limit": "many"}, {"order": "up"}, {"color": "red"}):
        with pytest.raises(openai.UnprocessableEntityError):
            client.files.list(extra_query=wrong)
    for id in (*ids, other):
        client.files.delete(id)


@pytest.mark.parametrize("name", ["../../etc/passwd", "..\\..\\boot.ini", "/abs/olute", "..", "a\x00b", "x" * 600, ""])
def test_a_clients_name_never_becomes_a_path(server: Running, folder: Path, name: str) -> None:
    connect(server).files.list()
    before = {path for path in folder.rglob("*")}
    status, body = send_form(server, [part("purpose", b"batch"), part("file", b"{}", name)])
    if status == 200:
        made = connect(server).files.list().data[0]
        assert "/" not in made.filename and "\\" not in made.filename and ".." not in made.filename
        assert {p for p in folder.rglob("*")} - before == {*folder.glob(f"files-*/{made.id}")}
        connect(server).files.delete(made.id)
    else:
        assert status in (400, 422), body
        assert {p for p in folder.rglob("*")} == before


@pytest.mark.parametrize("id", ["../hadal.db", "..%2Fhadal.db", "%2e%2e%2fhadal.db", "x/../../hadal.db", "*", "%00"])
def test_an_id_is_looked_up_and_never_opened(server: Running, id: str) -> None:
    for path in (f"/v1/files/{id}", f"/v1/files/{id}/content", f"/files/{id}/content"):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 404, (path, answer.read())


@given(st.text())
@settings(deadline=None, max_examples=200)
def test_any_name_becomes_a_plain_one(name: str) -> None:
    plain = _plain(name)
    assert 0 < len(plain) <= 255 and plain.isprintable() and not set("/\\") & set(plain) and plain not in (".", "..")


FILE = part("file", b"abc", "a.jsonl")
PURPOSE = part("purpose", b"batch")
ANCHOR = part("expires_after[anchor]", b"created_at")


@pytest.mark.parametrize(
    ("parts", "status", "said"),
    [
        ([FILE], 422, b"purpose"),
        ([PURPOSE], 422, b"`file` is missing"),
        ([FILE, part("purpose", b"assistants")], 422, b"purpose"),
        ([FILE, part("purpose", b"batch_output")], 422, b"purpose"),
        ([PURPOSE, FILE, FILE], 422, b"twice"),
        ([PURPOSE, FILE, part("color", b"red")], 422, b"color"),
        ([PURPOSE, FILE, part("color", b"r" * 5000)], 422, b"color"),
        ([PURPOSE, part("file", b"abc")], 422, b"`file`"),
        ([PURPOSE, part("purpose", b"x", "x")], 422, b"purpose"),
        ([part("n" * 900, b""), part("n" * 900, b"")], 422, b"`" + b"n" * 80 + b"`"),
        ([part("n" * 2000, b"")], 422, b"longer"),
        ([part(f"n{i}", b"") for i in range(99)], 422, b"more fields"),
        ([PURPOSE, FILE, ANCHOR], 422, b"expires_after.seconds"),
        (
            [PURPOSE, FILE, ANCHOR, part("expires_after[seconds]", b"9")],
            422,
            b"3600",
        ),
        ([PURPOSE, part("file", b"x" * 100_001, "a")], 413, b"100,000"),
        ([b"no header at all"], 400, b"multipart"),
    ],
)
def test_wrong_forms_are_refused_and_leave_nothing(
    server: Running, folder: Path, parts: list[bytes], status: int, said: bytes
) -> None:
    got = send_form(server, parts)
    assert got[0] == status and said in got[1], got
    assert kept(folder) == set()


def test_a_form_that_breaks_off_is_refused(server: Running, folder: Path) -> None:
    assert send_form(server, [PURPOSE, FILE], end=b"")[0] == 400
    assert send_form(server, [PURPOSE, FILE], boundary=b"another")[0] == 400
    assert server.call("/v1/files", {"purpose": "batch"})[0] == 400
    assert kept(folder) == set()


def test_a_client_that_leaves_leaves_nothing(server: Running, folder: Path) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/v1/files")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b0")
    connection.putheader("Content-Length", "90000")
    connection.endheaders(b"--b0\r\n" + part("file", b"x" * 1000, "a"))
    wait_until(lambda: kept(folder))
    connection.close()
    wait_until(lambda: not kept(folder))


def test_a_full_disk_is_told_and_leaves_nothing(server: Running, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hadal.server.files.os.fsync", full)
    status, body = send_form(server, [PURPOSE, FILE])
    assert status == 507 and b"disk is full" in body
    assert kept(folder) == set()


def test_a_key_has_so_many_files(server: Running, client: openai.OpenAI) -> None:
    ids = [client.files.create(file=("a", b"x"), purpose="batch").id for _ in range(20)]
    with pytest.raises(openai.RateLimitError, match="20 files already"):
        client.files.create(file=("a", b"x"), purpose="batch")
    for id in ids:
        client.files.delete(id)


def test_keys_see_their_own_files_only(tmp_path: Path) -> None:
    with Accounts(folder=tmp_path) as accounts:
        secrets = [accounts.keys.create(name)[1] for name in ("ann", "bob")]
        with running(scripted_llm({}), accounts=accounts, data=tmp_path) as server:
            ann, bob = (connect(server, secret) for secret in secrets)
            made = ann.files.create(file=("a", b"ann's"), purpose="user_data")
            assert ann.files.content(made.id).read() == b"ann's"
            for attempt in (bob.files.content, bob.files.retrieve, bob.files.delete):
                with pytest.raises(openai.NotFoundError):
                    attempt(made.id)
            with pytest.raises(openai.NotFoundError):
                bob.files.list(after=made.id)
            with pytest.raises(openai.NotFoundError):
                bob.batches.create(input_file_id=made.id, endpoint="/v1/chat/completions", completion_window="24h")
            assert bob.files.list().data == [] and [f.id for f in ann.files.list()] == [made.id]


def test_many_uploads_at_once_keep_apart(client: openai.OpenAI) -> None:
    def work(i: int) -> None:
        data = bytes([i]) * 50_000
        made = client.files.create(file=(f"{i}", data), purpose="user_data")
        results[i] = client.files.content(made.id).read() == data
        client.files.delete(made.id)

    results: dict[int, bool] = {}
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == dict.fromkeys(range(8), True)


def wait_until(what: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)
