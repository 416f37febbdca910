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

from hadal.accounts.tables import ledger, lock, open_database
from hadal.server import store as tables
from hadal.server.errors import APIError
from hadal.server.files import sweep
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
    engine = open_database(url)
    store = Store(engine, tmp_path, Clock())
    store.folder.mkdir()
    yield store
    engine.dispose()


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


def test_files_go_when_their_time_has_come_but_not_under_a_batch(opened: Store) -> None:
    clock: Any = opened.clock
    ids = [add_file(opened, expires=expires) for expires in (None, 1_000_100, 1_000_100)]
    batch = add_batch(opened, ids[2])
    assert status_of(lambda: opened.remove_file("ann", ids[2])) == 409
    clock.now += 101
    assert [row["id"] for row in opened.page(tables.files, "ann", None, 9)["data"]] == [ids[0]]
    assert status_of(lambda: opened.get(tables.files, "ann", ids[1])) == 404
    sweep(opened)
    assert set(os.listdir(opened.folder)) == {ids[0], ids[2]}
    opened.end(batch, "cancelled", [])
    sweep(opened)
    assert os.listdir(opened.folder) == [ids[0]]


def test_what_a_crash_left_behind_is_swept_once_it_is_old(opened: Store) -> None:
    kept = add_file(opened)
    made = tables.made_id(add_batch(opened, kept), "output")
    for name, age in (("file-1.part", 7200), ("file-2", 7200), ("file-3.part", 10), (kept, 7200), (made, 7200)):
        path = opened.folder / name
        path.write_bytes(b"x")
        os.utime(path, (time.time() - age,) * 2)
    sweep(opened)
    assert set(os.listdir(opened.folder)) == {"file-3.part", kept, made}


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


def test_no_key_gets_more_however_many_ask_at_once(opened: Store) -> None:
    opened.open_batches()

    def attempt(_: int) -> bool:
        try:
            return bool(add_file(opened))
        except APIError as error:
            assert error.status == 429, error
            return False

    with ThreadPoolExecutor(8) as pool:
        assert [*pool.map(attempt, range(24))].count(True) == 10


@pytest.mark.parametrize("id", ["file-\0", "\ud800", "", "x" * 10**5])
def test_ids_that_no_database_can_look_up_are_unknown(opened: Store, id: str) -> None:
    assert status_of(lambda: opened.get(tables.files, "ann", id)) == 404
    assert status_of(lambda: opened.page(tables.files, "ann", id, 9)) == 404


def test_another_database_leaves_files_alone(opened: Store, url: str, tmp_path: Path) -> None:
    kept = opened.path(add_file(opened))
    os.utime(kept, (1, 1))
    engine = open_database(f"sqlite:///{tmp_path}/other.db")
    sweep(Store(engine, tmp_path))
    engine.dispose()
    assert kept.exists()


def test_files_are_found_again_where_the_data_folder_has_moved(tmp_path: Path) -> None:
    folders = []
    for name in ("here", "there"):
        engine = open_database(f"sqlite:///{tmp_path / name}/hadal.db")
        folders.append(Store(engine, tmp_path / name).folder.relative_to(tmp_path / name))
        engine.dispose()
    assert folders[0] == folders[1]


def test_a_batch_tells_what_its_requests_used(opened: Store) -> None:
    batch = add_batch(opened, add_file(opened))
    opened.open_batches()
    common = {"recorded": 0, "server": "", "user": "", "tenant": "", "api": "batch", "model": "", "priority": 0,
              "total_s": 0.0, "price_list": "", "cost": 0}  # fmt: skip
    rows = [(batch, 200, 5), (batch, 400, 1), (batch, 500, 100), ("batch_other", 200, 1000)]
    with opened._database.begin() as connection:
        for number, (of, status, count) in enumerate(rows):
            used = {"hit": count, "miss": 2 * count, "output": 3 * count, "reasoning": count}
            moment = {"id": str(number), "time": 1_000_000_500, "status": status, "batch": of}
            connection.execute(sa.insert(ledger).values(**common, **used, **moment))
    opened.end(batch, "completed", [])
    assert tables.show_batch(opened.get(tables.batches, "ann", batch))["usage"] == {
        "input_tokens": 18, "input_tokens_details": {"cached_tokens": 6}, "output_tokens": 18,
        "output_tokens_details": {"reasoning_tokens": 6}, "total_tokens": 36,
    }  # fmt: skip


def test_a_database_that_is_away_is_told(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/hadal.db")
    with engine.connect() as other:
        lock(other)
        assert status_of(lambda: Store(engine, tmp_path).get(tables.files, "", "file-x")) == 503
    engine.dispose()


def test_several_servers_open_one_database_at_once(url: str, tmp_path: Path) -> None:
    stores = [Store(open_database(url), tmp_path) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert [*pool.map(lambda store: store.open_batches(), stores)] == [[]] * 6
    names = set(sa.inspect(stores[0]._database).get_table_names())
    assert {"files", "batches", "ledger"} <= names
    for store in stores:
        store._database.dispose()
