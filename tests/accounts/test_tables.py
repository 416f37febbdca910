"""Opening databases: several at once, older and newer ones, and addresses that cannot be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from hadal.accounts import Accounts, AccountsError, data_folder, tables


def test_many_servers_may_start_on_a_new_database_at_once(url: str) -> None:
    errors: list[Exception] = []

    def start() -> None:
        try:
            tables.open_database(url).dispose()
        except AccountsError as error:
            errors.append(error)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_an_older_database_is_brought_forward_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.open_database(url).dispose()

    def widen(connection: sa.Connection) -> None:
        connection.execute(sa.text("alter table ledger add column note varchar default 'none'"))

    monkeypatch.setattr(tables, "_STEPS", [*tables._STEPS, widen])
    for _ in range(2):
        engine = tables.open_database(url)
        assert "note" in {column["name"] for column in sa.inspect(engine).get_columns("ledger")}
        engine.dispose()


def test_a_step_that_fails_leaves_the_database_as_it_was(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.open_database(url).dispose()

    def half(connection: sa.Connection) -> None:
        connection.execute(sa.text("alter table ledger add column note varchar"))
        connection.execute(sa.text("alter table nowhere add column note varchar"))

    with monkeypatch.context() as patched:
        patched.setattr(tables, "_STEPS", [*tables._STEPS, half])
        with pytest.raises(AccountsError, match="nowhere"):
            tables.open_database(url)
    engine = tables.open_database(url)
    assert "note" not in {column["name"] for column in sa.inspect(engine).get_columns("ledger")}
    engine.dispose()


def test_a_newer_database_is_left_alone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tables, "_STEPS", [*tables._STEPS, lambda connection: None])
        tables.open_database(url).dispose()
    with pytest.raises(AccountsError, match="newer Hadal"):
        tables.open_database(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("hadal.db", "no database URL"),
        ("mysql://localhost/x", "use sqlite:// or postgresql://"),
        ("sqlite://", "need a file"),
        ("sqlite:///{folder}/plain/hadal.db", "cannot open"),
        ("sqlite:///{folder}/plain", "cannot open"),
    ],
)
def test_addresses_that_cannot_be_are_refused_in_one_sentence(tmp_path: Path, url: str, said: str) -> None:
    (tmp_path / "plain").write_text("no database, and long enough to be read as the head of one" * 4)
    with pytest.raises(AccountsError, match=said):
        Accounts(url.format(folder=tmp_path), folder=tmp_path)


def test_a_refusal_hides_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(AccountsError) as refused:
        Accounts("postgresql://me:hunter2@127.0.0.1:1/x", folder=tmp_path)
    assert "hunter2" not in str(refused.value)


def test_data_lives_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HADAL_DATA", raising=False)
    assert data_folder() == tmp_path / "home" / "hadal"
    monkeypatch.setenv("HADAL_DATA", str(tmp_path / "a folder?#%"))
    assert data_folder() == tmp_path / "a folder?#%"
    Accounts().close()
    assert (tmp_path / "a folder?#%" / "hadal.db").exists()
    assert (tmp_path / "a folder?#%").stat().st_mode & 0o077 == 0
