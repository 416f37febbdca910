"""Batches when things go wrong: killed and stopped servers, failing steps, full disks, and how much runs at once."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hadal.server import runner
from tests.fakes import ScriptedModel
from tests.server.conftest import Running
from tests.server.test_batches import begin, counted, ended, read, request, rows, serving
from tests.server.test_files import connect, kept, wait_until

ROOT = Path(__file__).parents[2]
# A server that lives until it is killed, and says where it is.
SERVER = """
import sys, threading
from pathlib import Path
from hadal.server import runner
from tests.server.test_batches import serving
runner._LOOK_SECONDS = 0.05
with serving(Path(sys.argv[1]), max_concurrent=2) as server:
    print(server.url, flush=True)
    threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(runner, "_PAUSE_SECONDS", 0.1)


def output_of(folder: Path) -> bytes:
    """What batches have written so far: whole lines of all files."""
    data = [path.read_bytes() for path in folder.glob("files-*/file-*") if b"batch_req_" in path.read_bytes()[:40]]
    return b"".join(part[: part.rfind(b"\n") + 1] for part in data)


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_server_goes_on_where_it_was(tmp_path: Path, kills: int) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    chance = random.Random(seed)
    before, made = b"", None
    for _ in range(kills):
        command = [sys.executable, "-c", SERVER, str(tmp_path)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            client = connect(Running(process.stdout.readline().strip(), None, None))  # type: ignore[arg-type]
            made = made or begin(client, *(request(f"{i}", "long") for i in range(20 * kills)))
            goal = before.count(b"\n") + chance.randrange(2, 8)
            wait_until(lambda goal=goal: output_of(tmp_path).count(b"\n") >= goal, 30)
        finally:
            process.kill()
            process.wait()
        after = output_of(tmp_path)
        assert after.startswith(before) and len(after) > len(before)
        before = after
    assert made is not None
    first = {row.id: row.recorded for row in rows(tmp_path)}
    # A crash between the row in the ledger and the line in the file, and one in the middle of a line.
    (path,) = [p for p in tmp_path.glob("files-*/file-*") if p.read_bytes().startswith(before[:60])]
    lines = before.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])
    with serving(tmp_path) as server:
        done = ended(connect(server), made.id)
        assert done.status == "completed" and done.request_counts and done.request_counts.completed == 20 * kills
        whole = connect(server).files.content(done.output_file_id or "").read()
        assert whole.startswith(b"".join(lines[:-1]))
        answers = read(connect(server), done.output_file_id)
    final = rows(tmp_path)
    assert {row.id for row in final} == {line["response"]["request_id"] for line in answers.values()}
    assert len(final) == len(answers) == 20 * kills and {row.status for row in final} == {200}
    assert all(row.recorded == first[row.id] for row in final if row.id in first)


def test_a_full_disk_makes_a_batch_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = iter(range(3))

    def full(fd: int) -> None:
        if next(fails, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.fsync(fd)

    with serving(tmp_path) as server:
        client = connect(server)
        monkeypatch.setattr("hadal.server.lines.os", SimpleNamespace(fsync=full))
        done = ended(client, begin(client, *(request(f"{i}", "cat") for i in range(8))).id)
        assert next(fails, None) is None
        assert done.status == "completed" and len(read(client, done.output_file_id)) == 8
    assert len([row for row in rows(tmp_path) if row.status == 200]) == 8


def test_one_process_alone_runs_the_batches_of_a_folder(tmp_path: Path) -> None:
    with serving(tmp_path) as first, serving(tmp_path) as second:
        for server in (first, second):
            done = ended(connect(server), begin(connect(server), *(request(f"{i}", "cat") for i in range(5))).id)
            assert len(read(connect(server), done.output_file_id)) == 5
    assert len(rows(tmp_path)) == 10


class _Flaky(ScriptedModel):
    """Fails at one step, whoever runs then."""

    failed = False

    def advance(self, *args: Any) -> Any:
        if self.steps == 20 and not self.failed:
            self.failed = True
            raise RuntimeError("once")
        return super().advance(*args)


def test_a_failed_step_is_not_the_fault_of_every_line_that_ran(tmp_path: Path) -> None:
    with serving(tmp_path, model=_Flaky) as server:
        client = connect(server)
        done = ended(client, begin(client, *(request(f"{i}", "dog") for i in range(12))).id)
        assert done.request_counts and (done.request_counts.completed, done.request_counts.failed) == (12, 0)
        assert len([row for row in rows(tmp_path) if row.status == 200]) == 12


def test_only_so_many_lines_are_in_memory(tmp_path: Path) -> None:
    seen = 0
    with serving(tmp_path, max_concurrent=2) as server:
        client = connect(server)
        made = begin(client, *(request(f"{i}", "cat") for i in range(400)))
        while client.batches.retrieve(made.id).status not in ("completed", "failed"):
            seen = max(seen, server.active())
        assert 0 < seen <= 6
        assert counted(client, made.id) == 400
    assert len(kept(tmp_path)) == 2


def test_long_lines_are_read_beside_the_loop_and_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, read_line, here = runner.Batches._line, runner.read_line, set[int]()
    in_hand = most = 0

    async def watch(self: runner.Batches, run: Any, id: str, raw: bytes) -> None:
        nonlocal in_hand, most
        here.add(threading.get_ident())
        in_hand += 1
        most = max(most, in_hand)
        await work(self, run, id, raw)
        in_hand -= 1

    def read_elsewhere(*given: Any) -> Any:
        assert threading.get_ident() not in here
        return read_line(*given)

    with serving(tmp_path, body_limit=100_000) as server:
        client = connect(server)
        for size, wanted in ((60_000, 1), (20_000, 4), (0, 12)):
            most = 0
            monkeypatch.setattr(runner.Batches, "_line", watch)
            monkeypatch.setattr(runner, "read_line", read_elsewhere)
            lines = [json.dumps(request(f"{i}", "cat")).encode() + b" " * size for i in range(12)]
            done = ended(client, begin(client, *lines).id)
            assert done.request_counts and done.request_counts.completed == 12 and 1 <= most <= wanted


def test_a_batch_that_cannot_be_read_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, broken = runner.check, True

    def broken_for_messages(path: Path, endpoint: str, limit: int) -> Any:
        if broken and endpoint == "/v1/messages":
            raise OSError(errno.EIO, "the disk is old")
        return check(path, endpoint, limit)

    monkeypatch.setattr(runner, "check", broken_for_messages)
    with serving(tmp_path) as server:
        client = connect(server)
        first = begin(client, request("a", "cat", "/v1/messages"), endpoint="/v1/messages")
        assert ended(client, begin(client, request("a", "cat")).id).status == "completed"
        assert client.batches.retrieve(first.id).status == "validating"
        broken = False
        assert ended(client, first.id).status == "completed"


def test_a_server_that_drains_finishes_what_runs_and_goes_on_later(tmp_path: Path) -> None:
    with serving(tmp_path, max_concurrent=2) as server:
        client = connect(server)
        made = begin(client, *(request(f"{i}", "long") for i in range(60)))
        wait_until(lambda: counted(client, made.id) >= 2)
        on_loop(server, lambda: setattr(server.service, "draining", True))
        wait_until(lambda: server.active() == 0)
        time.sleep(0.2)
        assert server.active() == 0 and client.batches.retrieve(made.id).status == "in_progress"
    before = rows(tmp_path)
    assert all(row.status == 200 for row in before)
    with serving(tmp_path) as server:
        done = ended(connect(server), made.id)
        assert done.status == "completed" and set(read(connect(server), done.output_file_id)) == set(
            map(str, range(60))
        )
    after = rows(tmp_path)
    assert len(after) == 60 and {row.id for row in before} < {row.id for row in after}


def on_loop(server: Running, what: Callable[[], None]) -> None:
    backend: Any = server.service.backend
    done = threading.Event()
    backend._loop.call_soon_threadsafe(lambda: (what(), done.set()))
    assert done.wait(5)


def test_a_server_that_stops_at_once_runs_the_rest_later(tmp_path: Path) -> None:
    with serving(tmp_path, max_concurrent=2) as server:
        made = begin(connect(server), *(request(f"{i}", "long") for i in range(10)))
        wait_until(lambda: counted(connect(server), made.id) >= 2)
    with serving(tmp_path) as server:
        done = ended(connect(server), made.id)
        assert done.status == "completed" and len(read(connect(server), done.output_file_id)) == 10
    good = [row for row in rows(tmp_path) if row.status == 200]
    assert len(good) == len({row.id for row in good}) == 10
