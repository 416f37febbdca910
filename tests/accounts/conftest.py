"""Databases to keep accounts in: an SQLite file, and a PostgreSQL server where its programs are installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from hadal.accounts import Accounts
from hadal.accounts.tables import open_database


class Server:
    """A PostgreSQL server in a folder, run as somebody who is not root."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self._programs, self._data = programs, folder / "data"
        self._who = {"user": "nobody", "cwd": folder} if os.geteuid() == 0 else {"cwd": folder}
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._run("initdb", "-D", self._data, "-U", "hadal", "-A", "trust", "-N")
        self._settings = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        self.start()

    def start(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-t", 30, "-l", self._data / "log", "-o", self._settings, "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-D", self._data, "-w", "-t", 30, "-m", "immediate", "stop")

    def create(self, name: str) -> str:
        """A new database's URL."""
        engine = sa.create_engine(self._url("postgres", "postgresql+psycopg"), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.execute(sa.text(f"create database {name}"))
        engine.dispose()
        return self._url(name, "postgresql")

    def _url(self, name: str, scheme: str) -> str:
        return f"{scheme}://hadal@127.0.0.1:{self.port}/{name}"

    def _run(self, program: str, *arguments: object) -> None:
        command = [str(self._programs / program), *map(str, arguments)]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        assert subprocess.run(command, **self._who, **quiet, timeout=60).returncode == 0, command


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Server]:
    pytest.importorskip("psycopg")
    found = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found and not installed:
        pytest.skip("PostgreSQL's programs are not installed")
    folder = Path(tempfile.mkdtemp())
    server = Server((Path(found) if found else installed[-1]).resolve().parent, folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hadal.db'}"
    return request.getfixturevalue("postgresql").create(f"test_{os.urandom(6).hex()}")


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Accounts]]:
    """Opens accounts and closes them at the end."""
    accounts: list[Accounts] = []

    def run(url: str | None = None, **options: object) -> Accounts:
        accounts.append(Accounts(url, folder=tmp_path, **options))
        return accounts[-1]

    yield run
    for one in accounts:
        one.close()


@pytest.fixture
def rows_of() -> Callable[[str], list[str]]:
    """The ids in the ledger of a database."""

    def run(url: str) -> list[str]:
        engine = open_database(url)
        with engine.connect() as connection:
            ids = list(connection.execute(sa.text("select id from ledger order by id")).scalars())
        engine.dispose()
        return ids

    return run
