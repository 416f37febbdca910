"""What the store keeps of files and batches, in both kinds of database."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from hadal.server import store as tables
from hadal.server.errors import APIError
from hadal.server.files import sweep
from hadal.server.settings import Settings
from hadal.server.store import Store
from tests.accounts.conftest import postgresql, url

__all__ = ["postgresql", "url"]  # fixtures


class Clock:
    """A time that only tests move."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def opened(tmp_path: Path, url: str) -> Any:
    (tmp_path / "files").mkdir()
    store = Store(Settings(data=tmp_path, database=url), Clock())
    yield store
    store.close()


def add_file(store: Store, key: str = "ann", **values: Any) -> str:
    row = store.stamp("file-") | {"key": key, "purpose": "batch", "filename": "a", "bytes": 1, "expires": None} | values
    store.add(tables.files, row, 10, "files")
    store.path(row["id"]).write_bytes(b"x")
    return str(row["id"])


def add_batch(store: Store, input_file: str, key: str = "ann", **values: Any) -> str:
    row = store.stamp("batch_") | {"key": key, "status": "validating", "input_file_id": input_file} | values
    store.add(tables.batches, row | {"total": 0, "succeeded": 0, "erred": 0}, 10, "batches")
    return str(row["id"])


def status_of(wrong: Callable[[], object]) -> int:
    with pytest.raises(APIError) as caught:
        wrong()
    return caught.value.status


def test_files_go_when_their_time_has_come_but_not_under_a_batch(opened: Store, tmp_path: Path) -> None:
    clock: Any = opened.clock
    ids = [add_file(opened, expires=expires) for expires in (None, 1_000_100, 1_000_100)]
    batch = add_batch(opened, ids[2])
    assert status_of(lambda: opened.remove_file("ann", ids[2])) == 409
    clock.now += 101
    assert [row["id"] for row in opened.page(tables.files, "ann", None, 9)["data"]] == [ids[0]]
    assert status_of(lambda: opened.get(tables.files, "ann", ids[1])) == 404
    sweep(opened)
    assert set(os.listdir(tmp_path / "files")) == {ids[0], ids[2]}
    opened.end(batch, "cancelled", [])
    sweep(opened)
    assert os.listdir(tmp_path / "files") == [ids[0]]


def test_what_a_crash_left_behind_is_swept_once_it_is_old(opened: Store, tmp_path: Path) -> None:
    kept = add_file(opened)
    made = tables.made_id(add_batch(opened, kept), "output")
    for name, age in (("file-1.part", 7200), ("file-2", 7200), ("file-3.part", 10), (kept, 7200), (made, 7200)):
        path = tmp_path / "files" / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    sweep(opened)
    assert set(os.listdir(tmp_path / "files")) == {"file-3.part", kept, made}


def test_a_batch_changes_from_the_statuses_named_only(opened: Store) -> None:
    batch = add_batch(opened, add_file(opened), metadata={"a": "b"}, errors=None)
    assert opened.change(batch, ("validating",), "in_progress", total=3)
    assert not opened.change(batch, ("validating",), "cancelling")
    with ThreadPoolExecutor(8) as pool:
        won = [*pool.map(lambda _: opened.change(batch, ("validating", "in_progress"), "cancelling"), range(8))]
    assert won.count(True) == 1
    opened.count(batch, 1, 1)
    made = opened.stamp("") | {
        "id": tables.made_id(batch, "output"),
        "key": "ann",
        "purpose": "batch_output",
        "bytes": 5,
    }
    for _ in range(2):  # a crash can make it happen twice
        opened.end(batch, "cancelled", [made], output_file_id=made["id"], succeeded=2)
    opened.count(batch, 0, 0)  # too late
    shown = tables.show_batch(opened.get(tables.batches, "ann", batch))
    assert shown["status"] == "cancelled" and shown["cancelled_at"] == shown["in_progress_at"] == 1_000_000
    assert shown["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert shown["metadata"] == {"a": "b"} and shown["errors"] is None and shown["output_file_id"] == made["id"]
    assert opened.open_batches() == [] and opened.get(tables.files, "ann", made["id"]).bytes == 5


def test_pages_meet_without_gaps_though_all_is_of_one_moment(opened: Store) -> None:
    mine = {add_file(opened) for _ in range(7)}
    foreign = add_file(opened, "bob")
    for down in (True, False):
        seen: list[str] = []
        more, last = True, None
        while more:
            page = opened.page(tables.files, "ann", last, 3, descending=down)
            seen += [row["id"] for row in page["data"]]
            more, last = page["has_more"], page["last_id"]
        assert len(seen) == 7 and set(seen) == mine
    for key, id in (("ann", foreign), ("bob", seen[0]), ("", seen[0])):
        assert status_of(lambda key=key, id=id: opened.get(tables.files, key, id)) == 404
        assert status_of(lambda key=key, id=id: opened.remove_file(key, id)) == 404


def test_a_key_has_so_many_of_each(opened: Store) -> None:
    files = [add_file(opened) for _ in range(10)]
    assert status_of(lambda: add_file(opened)) == 429
    add_file(opened, "bob")
    batches = [add_batch(opened, files[0]) for _ in range(10)]
    assert status_of(lambda: add_batch(opened, files[0])) == 429
    opened.end(batches[0], "failed", [])
    add_batch(opened, files[0])


def test_a_database_that_is_away_is_told(tmp_path: Path) -> None:
    (tmp_path / "hadal.db").write_bytes(b"no database" * 100)
    store = Store(Settings(data=tmp_path))
    assert status_of(lambda: store.get(tables.files, "", "file-x")) == 503


def test_several_servers_open_one_database_at_once(url: str, tmp_path: Path) -> None:
    stores = [Store(Settings(data=tmp_path, database=url)) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(lambda store: store.open_batches(), stores)] == [[]] * 6
    names = set(sa.inspect(stores[0]._engine).get_table_names())
    assert {"files", "batches", "ledger"} <= names
    for store in stores:
        store.close()
