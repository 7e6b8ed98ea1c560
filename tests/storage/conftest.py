"""What the storage tests share: a file at head, the shell, and a process of its own for what must die."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import migrate

Shell = Callable[..., str]
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def newborn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new store at head, made once and only copied."""
    made = tmp_path_factory.mktemp("newborn") / "agent.db"
    migrate.prepare(made)
    return made


@pytest.fixture
def path(tmp_path: Path, newborn: Path) -> Path:
    """A new store at head that nobody has open."""
    return Path(shutil.copy(newborn, tmp_path / "agent.db"))


@pytest.fixture
def raw(path: Path) -> Iterator[sqlite3.Connection]:
    """A plain connection on the file, without any PRAGMA of ours: what the shell would be."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        yield connection


@pytest.fixture
def shell() -> Shell:
    """Run the real `sqlite3` shell on a file and return what it prints."""
    found = shutil.which("sqlite3")
    if found is None:
        pytest.skip("no sqlite3 shell on this machine")

    def run(path: Path, *commands: str) -> str:
        ended = subprocess.run([found, str(path), *commands], capture_output=True, text=True, timeout=20, check=True)
        return ended.stdout.strip()

    return run


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start Python scripts in processes of their own, which are gone at the end of the test."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
        environment = {**os.environ, "PYTHONWARNINGS": "error"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


TaskRow = dict[str, Any]


@pytest.fixture
def task_row() -> TaskRow:
    """The columns of a task that is valid as it is: running, under owner 1."""
    return {
        "scope": "desktop:s1",
        "id": "index",
        "kind": "other",
        "mode": "managed",
        "state": "running",
        "label": "index_repo",
        "function": "index_repo",
        "recovery": "rerun",
        "cancel_policy": "cooperative",
        "arguments": "{}",
        "attempt": 1,
        "attempts_spent": 0,
        "max_attempts": 3,
        "owner_id": 1,
        "created_at": "2024-05-01T10:00:00.000Z",
        "started_at": "2024-05-01T10:00:00.000Z",
        "updated_at": "2024-05-01T10:00:00.000Z",
        "completed_at": None,
    }


@pytest.fixture
def filled(raw: sqlite3.Connection) -> sqlite3.Connection:
    """A file with one session and one owner in it."""
    raw.execute(
        "INSERT INTO sessions (scope, runtime, session_id, opened_at) "
        "VALUES ('desktop:s1', 'desktop', 's1', '2024-05-01T10:00:00.000Z')"
    )
    raw.execute(
        "INSERT INTO owners (token, runtime, pid, process_start, boot_id, host, version, opened_at) "
        "VALUES ('o-1', 'desktop', 1, '', '', 'host', '0', '2024-05-01T10:00:00.000Z')"
    )
    return raw


@pytest.fixture
def insert() -> Callable[..., int]:
    """Insert a row by its columns into a table and return its rowid."""

    def run(connection: sqlite3.Connection, table: str, columns: dict[str, Any], verb: str = "INSERT") -> int:
        names, places = ", ".join(f'"{name}"' for name in columns), ", ".join(f":{name}" for name in columns)
        row = connection.execute(f"{verb} INTO {table} ({names}) VALUES ({places})", columns)
        assert row.lastrowid is not None
        return row.lastrowid

    return run
