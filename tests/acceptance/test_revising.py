"""What the commands about a file's revision do, say and refuse."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from lash_store import SchemaTooOld, TaskStore, guards, migrate, rehearsal, revisions, schema
from lash_store.cli import main

DATA = Path(__file__).parents[1] / "data"
OLD = sorted(file.stem for file in DATA.glob("*.db"))
KNOWN = [script.revision for script in revisions.known()]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


class Terminal(io.StringIO):
    """What is typed at, or shown by, a terminal."""

    def isatty(self) -> bool:
        return True


def run(*arguments: str | Path, typed: str | None = None, out: io.StringIO | None = None, **environment: str) -> Done:
    """Run a command here; with *typed*, a person sits there and types that."""
    clean = {name: value for name, value in os.environ.items() if name not in {"LASH_STORE_DB", "COLUMNS"}}
    out, err = out or io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, {**clean, **environment}, clear=True),
        mock.patch.object(sys, "stdin", io.StringIO() if typed is None else Terminal(typed)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main([*map(str, arguments)])
    return Done(status, out.getvalue(), err.getvalue())


def copy_of(revision: str, folder: Path) -> Path:
    return Path(shutil.copy(DATA / f"{revision}.db", folder / "agent.db"))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of the first revision."""
    return copy_of(OLD[0], tmp_path)


@pytest.fixture(scope="module")
def at_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = copy_of("0003", tmp_path_factory.mktemp("head"))
    migrate.upgrade(path, backup=False)
    return path


@pytest.fixture
def newest(at_head: Path, tmp_path: Path) -> Path:
    """A file at head with what bodies remember in it."""
    return Path(shutil.copy(at_head, tmp_path / "agent.db"))


def bytes_of(path: Path) -> dict[str, bytes]:
    files = (path, Path(f"{path}-wal"))
    return {file.name: file.read_bytes() for file in files if file.exists() and file.stat().st_size}


def hold(path: Path, sql: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(sql, parameters)


# --- upgrade ---------------------------------------------------------------------------------------------------------


def test_upgrade_brings_a_file_to_head_and_names_the_copy(old: Path) -> None:
    done = run("upgrade", "--db", old)

    backup = f"{old}-{OLD[0]}.backup"
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{old}: revision {OLD[0]} to {schema.HEAD} in ")
    assert done.stdout.endswith(f"; the file from before is {backup}\n")
    assert (migrate.current(old), migrate.current(Path(backup))) == (schema.HEAD, OLD[0])
    assert run("upgrade", "--db", old).stdout == f"{old} is at revision {schema.HEAD} already\n"


def test_upgrade_goes_only_as_far_as_it_is_told_and_tells_programs(old: Path) -> None:
    done = run("upgrade", "--to", KNOWN[1], "--no-backup", "--json", "--db", old)

    told = json.loads(done.stdout)
    assert told.pop("seconds") > 0
    assert told == {"db": str(old), "from_revision": KNOWN[0], "to_revision": KNOWN[1], "backup": None}
    assert migrate.current(old) == KNOWN[1]
    again = json.loads(run("upgrade", "--to", KNOWN[1], "--json", "--db", old).stdout)
    assert (again["from_revision"], again["to_revision"]) == (KNOWN[1], KNOWN[1])
    assert not list(old.parent.glob("*backup*"))


@pytest.mark.long
async def test_the_command_a_refusal_names_is_the_one_to_run(tmp_path: Path) -> None:
    folder = tmp_path / "o'hara & co"
    folder.mkdir()
    old = copy_of(OLD[0], folder)
    with pytest.raises(SchemaTooOld) as caught:
        await TaskStore(old, runtime="another", upgrade="refuse").open()
    command = str(caught.value).partition("run: ")[2]
    assert command.startswith("lash-store upgrade --db ")

    as_module = f"{sys.executable} -m lash_store.cli {command.removeprefix('lash-store ')}"
    subprocess.run(as_module, shell=True, check=True, capture_output=True, timeout=60)

    async with TaskStore(old, runtime="another", upgrade="refuse") as store:
        assert store.upgraded is None


@pytest.mark.parametrize("command", [["upgrade"], ["downgrade", KNOWN[0], "--yes"], ["current"], ["upgrade", "--sql"]])
def test_a_file_that_is_not_there_is_not_made(tmp_path: Path, command: list[str]) -> None:
    done = run(*command, "--db", tmp_path / "typo.db")

    assert (done.returncode, done.stdout) == (1, "")
    assert "does not exist, or is empty: check the path" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [["upgrade"], ["upgrade", "--sql"], ["downgrade", KNOWN[0], "--yes"], ["current"], ["history"], ["list"]],
    ids=" ".join,
)
def test_a_file_of_a_newer_package_is_refused_and_no_byte_changed(
    newest: Path, tmp_path: Path, command: list[str]
) -> None:
    path = tmp_path / "newer.db"
    with closing(sqlite3.connect(newest, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
        shutil.copy(newest, path)
        shutil.copy(f"{newest}-wal", f"{path}-wal")
    before = bytes_of(path)
    assert len(before) == 2

    done = run(*command, "--db", path)

    assert (done.returncode, done.stdout) == (1, "")
    told = f"{path} is at revision 9999, this lash_store knows {schema.HEAD}: upgrade the package; nothing was changed"
    assert done.stderr == f"lash-store: {told}\n"
    assert bytes_of(path) == before


LIVES = """
import fcntl, sys
with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.read()
"""


def test_programs_that_have_the_file_open_are_named(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        [(token, pid)] = connection.execute("SELECT token, pid FROM owners WHERE owner_id = 2").fetchall()
    lock = guards.make_side_folder(old) / f"{token}.lock"
    before = bytes_of(old)
    with subprocess.Popen(
        [sys.executable, "-c", LIVES, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"

        done = run("upgrade", "--db", old)

        process.kill()
    told = f"{old} is open in process {pid}: close it there first; nothing was changed"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"lash-store: {told}\n")
    assert bytes_of(old) == before


# --- downgrade -------------------------------------------------------------------------------------------------------


def test_downgrade_says_what_is_lost_of_this_file_before_it_asks(newest: Path) -> None:
    before = bytes_of(newest)

    done = run("downgrade", KNOWN[0], "--db", newest, typed="n\n")

    assert (done.returncode, bytes_of(newest)) == (1, before)
    assert f"down from revision {schema.HEAD} to {KNOWN[0]}" in done.stderr
    assert all(f"  {script.revision}: {script.undoing}" in done.stderr for script in revisions.known()[1:])
    assert "lost of this file: " in done.stderr
    assert "2 handoffs, 8 notes, " in done.stderr
    assert "11 signals, 32 steps, " in done.stderr
    assert "inbox_claim of 1 session, " in done.stderr
    assert done.stderr.endswith("Go on? [y/N]: lash-store: nothing was changed\n")


def test_downgrade_does_it_for_who_says_yes_and_keeps_a_copy(newest: Path) -> None:
    done = run("downgrade", KNOWN[0], "--db", newest, typed="y\n")

    assert done.returncode == 0
    assert done.stdout.endswith(f"; the file from before is {newest}-{schema.HEAD}.backup\n")
    assert (migrate.current(newest), migrate.current(f"{newest}-{schema.HEAD}.backup")) == (KNOWN[0], schema.HEAD)


def test_downgrade_does_not_guess_where_nobody_can_be_asked(newest: Path) -> None:
    before = bytes_of(newest)

    done = run("downgrade", KNOWN[0], "--db", newest)

    assert (done.returncode, bytes_of(newest)) == (2, before)
    assert "nobody can be asked here: give --yes" in done.stderr


def test_downgrade_tells_programs_what_was_lost(newest: Path) -> None:
    lost = [loss._asdict() for loss in rehearsal.losses(newest, KNOWN[0])]

    done = run("downgrade", KNOWN[0], "--yes", "--no-backup", "--json", "--db", newest)

    told = json.loads(done.stdout)
    assert told["lost"] == lost
    assert {"table": "signals", "column": None, "rows": 11} in lost
    assert (told["from_revision"], told["to_revision"], told["backup"]) == (schema.HEAD, KNOWN[0], None)
    assert migrate.current(newest) == KNOWN[0]


@pytest.mark.parametrize(
    ("command", "status", "told"),
    [
        (["downgrade", "base"], 2, "remove the file instead"),
        (["downgrade", "0000"], 1, "no revision '0000': this lash_store has 0001, "),
        (["upgrade", "--to", KNOWN[0]], 1, "that is a downgrade; nothing was changed"),
    ],
)
def test_where_a_file_cannot_go_is_said(newest: Path, command: list[str], status: int, told: str) -> None:
    before = bytes_of(newest)

    done = run(*command, "--db", newest)

    assert (done.returncode, done.stdout, bytes_of(newest)) == (status, "", before)
    assert told in done.stderr


# --- the statements --------------------------------------------------------------------------------------------------


def through_the_shell(path: Path, script: str) -> None:
    found = shutil.which("sqlite3")
    if found is None:
        pytest.skip("no sqlite3 shell on this machine")
    subprocess.run([found, path], input=script, capture_output=True, text=True, timeout=60, check=True)


def test_what_is_printed_may_be_given_to_the_shell_up_and_down(old: Path) -> None:
    before = bytes_of(old)
    up = run("upgrade", "--sql", "--db", old)
    assert (up.returncode, up.stderr, bytes_of(old)) == (0, "", before)

    through_the_shell(old, up.stdout)
    assert migrate.current(old) == schema.HEAD
    down = run("downgrade", OLD[0], "--sql", "--db", old)
    through_the_shell(old, down.stdout)

    assert migrate.current(old) == OLD[0]
    assert down.stdout.startswith(f"-- {old}: revision {schema.HEAD} to {OLD[0]}; it loses nothing\n")
    assert run("upgrade", "--to", OLD[0], "--sql", "--db", old).stdout.endswith(f"-- already at revision {OLD[0]}\n")


def test_what_programs_put_into_the_schema_does_not_reach_a_terminal_raw(old: Path) -> None:
    hold(old, "CREATE VIEW mine AS SELECT '\x1b[2J' AS a FROM live_tasks")

    shown = run("upgrade", "--sql", "--db", old, out=Terminal()).stdout
    piped = run("upgrade", "--sql", "--db", old).stdout

    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
    through_the_shell(old, piped)
    assert migrate.current(old) == schema.HEAD


# --- history and current ---------------------------------------------------------------------------------------------


def test_history_has_every_revision_with_what_it_adds_and_where_the_file_is(old: Path) -> None:
    found = json.loads(run("history", "--json", "--db", old).stdout)

    assert [one["revision"] for one in found] == KNOWN
    assert [one["revision"] for one in found if one["is_head"]] == [schema.HEAD]
    assert [one["revision"] for one in found if one["is_current"]] == [OLD[0]]
    adds = {one["revision"]: one["adds"] for one in found}
    assert adds["0003"]["tables"] == ["signals"]
    assert "tasks.deadline" in adds["0003"]["columns"]
    assert sorted(name for one in found for name in one["adds"]["tables"]) == sorted(schema.metadata.tables)
    assert all(one["title"] for one in found)


def test_history_needs_no_file_and_fits_a_terminal() -> None:
    done = run("history", COLUMNS="80")

    assert (done.returncode, done.stderr) == (0, "")
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert f"{schema.HEAD} (head)" in done.stdout
    assert json.loads(run("history", "--json").stdout)[0]["is_current"] is None


def test_current_says_where_a_file_is_and_what_to_do(old: Path) -> None:
    assert run("current", "--db", old).stdout == f"{OLD[0]} (head is {schema.HEAD}: run lash-store upgrade)\n"
    told = json.loads(run("current", "--json", "--db", old).stdout)
    assert told == {"db": str(old), "revision": OLD[0], "head": schema.HEAD, "is_head": False}

    migrate.upgrade(old, backup=False)

    assert run("current", LASH_STORE_DB=str(old)).stdout == f"{schema.HEAD} (head)\n"
    assert json.loads(run("current", "--json", "--db", old).stdout)["is_head"]


# --- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_on_a_terminal_something_moves_while_it_is_done(old: Path) -> None:
    parent, child = pty.openpty()
    command = [sys.executable, "-m", "lash_store.cli", "upgrade", "--db", str(old)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "NO_COLOR": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, env=environment)
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):
        # the way Linux says that the other end is closed
        while chunk := os.read(parent, 65536):
            shown += chunk
    os.close(parent)

    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert f"upgrading to revision {schema.HEAD} 0:00:0".encode() in shown
    assert out.startswith(f"{old}: revision {OLD[0]} to {schema.HEAD}".encode())


@pytest.mark.parametrize("command", ["upgrade", "downgrade", "history", "current"])
def test_help_imports_neither_sqlalchemy_nor_alembic(command: str) -> None:
    looks = (
        "import sys; from lash_store.cli import main; main(sys.argv[1:]); "
        "sys.exit(bool({'sqlalchemy', 'alembic', 'pydantic'} & sys.modules.keys()))"
    )

    done = subprocess.run([sys.executable, "-c", looks, command, "--help"], capture_output=True, text=True, timeout=30)

    assert done.returncode == 0
    assert "Examples:" in done.stdout
