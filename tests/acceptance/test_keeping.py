"""What keeps a file small and safe, from the command line: prune, backup and restore, kills included."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import random
import secrets
import shutil
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lash_store import Recovery, TaskContext, TaskStore, copies, migrate
from lash_store.cli import main
from tests.acceptance import keeping_programs
from tests.acceptance.commands import Done, assert_harmless, run
from tests.acceptance.processes import Worker
from tests.runtime.support import check_file, everything, rows

S1, S2 = "desktop:s1", "desktop:s2"


class Terminal(io.StringIO):
    """What is typed at, or shown by, a terminal."""

    def isatty(self) -> bool:
        return True


def at_terminal(*arguments: str | Path, db: Path, typed: str = "") -> Done:
    """Run a command with a person before it, who types that."""
    out, err = Terminal(), Terminal()
    with (
        mock.patch.dict(os.environ, {"TERM": "xterm-256color", "NO_COLOR": "1"}),
        mock.patch.object(sys, "stdin", Terminal(typed)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main(["--db", str(db), *map(str, arguments)])
    return Done(status, out.getvalue(), err.getvalue())


async def fill(path: Path) -> None:
    """
    Make a file: in s1 ``a`` to ``d`` were read, ``unread`` was not, ``bad`` failed; in s2 ``e`` was read.

    One of each ended long ago: ``a`` and ``unread``.
    """
    async with TaskStore(path, runtime="desktop") as store:
        one, two = await store.session("s1"), await store.session("s2")
        for session, task_id in ((one, "a"), (one, "b"), (one, "c"), (one, "d"), (two, "e")):
            await (await session.spawn(echo("x" * 500), id=task_id)).result()
        await (await one.spawn(echo("never read"), id="unread")).wait()
        with contextlib.suppress(Exception):
            await (await one.spawn(fail(), id="bad")).result()


async def echo(text: str) -> str:
    return text


async def fail() -> None:
    raise RuntimeError("no")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("filled") / "agent.db"
    asyncio.run(fill(made))
    return made


@pytest.fixture
def db(filled: Path, path: Path) -> Path:
    """A stopped file, see `fill`."""
    return Path(shutil.copy(filled, path))


@pytest.fixture
def backed_up(db: Path) -> Path:
    """Its backup; in the file itself ``later`` was done since."""
    target = copies.back_up(db, db.with_name("backup.db")).path

    async def work() -> None:
        async with TaskStore(db, runtime="desktop") as store:
            await (await (await store.session("s1")).spawn(echo("new"), id="later")).result()

    asyncio.run(work())
    return target


def ids(path: Path) -> list[str]:
    return [row["id"] for row in rows(path, "SELECT id FROM tasks ORDER BY task_seq")]


def report_of(done: Done) -> dict[str, Any]:
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    report: dict[str, Any] = json.loads(done.stdout)
    return report


# --- prune -----------------------------------------------------------------------------------------------------------

SEQ_OF_C = "SELECT max(seq) FROM events WHERE task_id = 'c'"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], "unread"),
        (["--unread"], ""),
        (["--keep-last", "3"], "d e unread bad"),
        (["--state", "failed"], "a b c d e unread"),
        (["--state", "failed", "--state", "abandoned"], "a b c d e unread"),
        (["--session", S2], "a b c d unread bad"),
        (["--session", S2, "--session", S1, "--state", "completed"], "unread bad"),
        (["--before-cursor", "CURSOR"], "d e unread bad"),
        (["--before-cursor", "0"], "a b c d e unread bad"),
        (["--older-than", "1h"], "a b c d e unread bad"),
        (["--older-than", "0s", "--session", S2], "a b c d unread bad"),
        (["--older-than", "0", "--keep-last", "0"], "unread"),
        (["--keep-last", str(2**31 - 1)], "a b c d e unread bad"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_prune_takes_what_each_option_lets_it(db: Path, options: list[str], left: str) -> None:
    cursor = str(rows(db, SEQ_OF_C)[0]["max(seq)"])
    options = [cursor if option == "CURSOR" else option for option in options]
    before = everything(db)

    would = report_of(run("prune", *options, "--dry-run", "--json", db=db))
    assert everything(db) == before
    did = report_of(run("prune", *options, "--json", db=db))

    assert ids(db) == left.split()
    assert (did["tasks"], did["dry_run"], would["dry_run"]) == (7 - len(left.split()), False, True)
    for told in (would, did):
        del told["dry_run"], told["freed"]
    assert would == did


def test_prune_says_what_it_did_and_why_something_stays(db: Path) -> None:
    dry = run("prune", "--dry-run", db=db)
    done = run("prune", db=db)
    again = run("prune", db=db)

    assert (dry.returncode, dry.stderr, done.returncode, done.stderr) == (0, "", 0, "")
    assert dry.stdout.startswith("6 tasks with 18 events would be pruned\n")
    assert done.stdout.startswith("6 tasks with 18 events pruned; ")
    assert done.stdout.endswith("\nkept: 1 whose result nobody was handed (--unread prunes those too)\n")
    assert again.stdout.startswith("0 tasks with 0 events pruned")


def test_a_dry_prune_leaves_the_file_of_a_dead_owner_as_it_is(db: Path, tmp_path: Path) -> None:
    dead = tmp_path / "dead.db"
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        connection.execute("UPDATE sessions SET sync_needed = 1")
        for end in ("", "-wal"):
            Path(f"{dead}{end}").write_bytes(Path(f"{db}{end}").read_bytes())
    before = [Path(f"{dead}{end}").read_bytes() for end in ("", "-wal")]
    assert before[1]

    assert run("prune", "--dry-run", db=dead).returncode == 0

    assert [Path(f"{dead}{end}").read_bytes() for end in ("", "-wal")] == before


def test_prune_shows_how_far_it_is_on_a_terminal_only(db: Path) -> None:
    assert run("prune", "--dry-run", db=db).stderr == ""
    shown = at_terminal("prune", "--dry-run", db=db)
    assert "pruning" in shown.stderr
    assert "pruning" not in shown.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("options", "status", "part"),
    [
        (["--older-than", "soon"], 2, "'soon' is no time span: write 30d, 12h, 90m or 45s"),
        (["--older-than", "-1d"], 2, "no time span"),
        (["--older-than", "9" * 400], 2, "no time span"),
        (["--older-than", "999999999w"], 2, "longer than anything"),
        (["--older-than", "٣d"], 2, "no time span"),
        (["--keep-last", "-1"], 2, "-1"),
        (["--keep-last", str(2**40)], 2, "2147483648"),
        (["--keep-last", str(2**63)], 2, str(2**63)),
        (["--before-cursor", str(2**63)], 2, str(2**63)),
        (["--state", "running"], 2, "is live, and never pruned"),
        (["--state", "done"], 2, "'done' is not one of"),
        (["--session", "nowhere"], 2, "nowhere"),
        (["--session", "desktop:nowhere"], 1, "no session 'desktop:nowhere' in this file: it has desktop:s1"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else None,
)
def test_a_prune_that_has_no_sense_takes_nothing(db: Path, options: list[str], status: int, part: str) -> None:
    before = everything(db)

    done = run("prune", *options, db=db)

    assert (done.returncode, done.stdout) == (status, "")
    assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(db) == before


async def test_prune_works_beside_a_live_owner_and_leaves_live_work(db: Path) -> None:
    async with TaskStore(db, runtime="desktop") as store:
        started = asyncio.Event()

        @store.task(recovery=Recovery.RERUN)
        async def stay(task: TaskContext) -> None:
            started.set()
            await asyncio.Event().wait()

        session = await store.session("s1")
        await session.spawn(stay, id="live")
        await started.wait()

        report = report_of(await asyncio.to_thread(run, "prune", "--unread", "--json", db=db))

        assert (report["tasks"], ids(db)) == (7, ["live"])
        assert (await session.spawn(echo("goes on"), id="next")).id == "next"


@pytest.mark.parametrize("kind", ["stamped", "plain"])
def test_prune_and_backup_work_on_a_copy(db: Path, kind: str) -> None:
    copy = db.with_name("copy.db")
    if kind == "stamped":
        copies.back_up(db, copy)
    else:
        shutil.copy(db, copy)
    before = everything(db)

    assert report_of(run("prune", "--json", db=copy))["tasks"] == 6
    assert report_of(run("backup", db.with_name("second.db"), "--json", db=copy))["tasks"] == 1

    assert everything(db) == before
    check_file(copy)


# --- backup ----------------------------------------------------------------------------------------------------------


def test_backup_tells_what_is_in_the_copy_and_refuses_to_write_over_anything(db: Path) -> None:
    target = db.with_name("backup.db")

    done = run("backup", target, db=db)
    again = run("backup", target, db=db)

    events = rows(db, "SELECT count(*) AS n FROM events")[0]["n"]
    size = target.stat().st_size
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{target}: {size:,} bytes, 7 tasks, {events} events, verified\n"
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (1, "", 1)
    assert f"{target} exists" in again.stderr
    told = report_of(run("backup", "--json", target.with_name("two.db"), db=db))
    assert (told["tasks"], told["events"], told["path"]) == (7, events, str(target.with_name("two.db")))
    assert everything(target) == everything(db)


def test_backup_shows_how_far_it_is_on_a_terminal_only(db: Path) -> None:
    shown = at_terminal("backup", db.with_name("one.db"), db=db)
    assert (shown.returncode, "copying" in shown.stderr, "copying" in shown.stdout) == (0, True, False)
    assert run("backup", db.with_name("two.db"), db=db).stderr == ""


def test_backup_copies_one_moment_of_a_file_that_is_written_all_the_time(db: Path) -> None:
    """A thread adds pairs of tasks, each in one transaction; a moment has both or none."""
    stop = threading.Event()
    added = threading.Event()

    async def write() -> None:
        async with TaskStore(db, runtime="desktop") as store:
            session = await store.session("s1")
            number = 0
            while not stop.is_set():
                parent = await session.spawn(echo("x"), id=f"t{number}")
                await parent.wait()
                number += 1
                added.set()

    writer = threading.Thread(target=asyncio.run, args=(write(),))
    writer.start()
    try:
        assert added.wait(20)
        reports = []
        for number in range(5):
            added.clear()
            reports.append(report_of(run("backup", "--json", db.with_name(f"b{number}.db"), db=db)))
            assert added.wait(20)
    finally:
        stop.set()
        writer.join(20)
    counts = [report["tasks"] for report in reports]
    assert counts == sorted(counts)
    assert len(set(counts)) > 1
    for report in reports:
        check_file(Path(report["path"]))
        assert len(ids(Path(report["path"]))) == report["tasks"]


def test_a_backup_that_is_killed_leaves_nothing_of_the_name_and_the_next_one_works(
    start: Callable[..., Worker], db: Path
) -> None:
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("CREATE TABLE filler AS SELECT randomblob(8000000) AS a")
    target = db.with_name("backup.db")
    worker = start(keeping_programs.back_up, str(db), str(target))
    worker.wait_for("copied")
    busy = run("backup", target, db=db)
    worker.kill()

    assert (busy.returncode, "another process is filling" in busy.stderr) == (1, True)
    assert not target.exists()
    assert Path(f"{target}-making").exists()
    assert run("backup", target, db=db).returncode == 0
    assert [one.name for one in target.parent.iterdir() if "making" in one.name] == []
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("DROP TABLE filler")
    assert ids(target) == ids(db)


@pytest.mark.parametrize("command", [["prune"], ["backup", "TARGET"], ["restore", "TARGET", "--yes"]], ids=" ".join)
def test_a_path_that_names_nothing_makes_nothing(tmp_path: Path, command: list[str]) -> None:
    arguments = [str(tmp_path / "target.db") if word == "TARGET" else word for word in command]

    done = run(*arguments, db=tmp_path / "typo.db")

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "does not exist" in done.stderr
    assert not list(tmp_path.iterdir())
    assert f"Examples:\n    lash-store {command[0]} --db" in run(command[0], "--help").stdout.replace(
        "Example:", "Examples:"
    )


# --- restore ---------------------------------------------------------------------------------------------------------


def test_restore_puts_the_backup_there_and_names_what_it_kept(db: Path, backed_up: Path) -> None:
    forgotten = everything(db)

    done = run("restore", backed_up, "--yes", db=db)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{db}: revision {migrate.head()}, 7 tasks\nwhat was there is now {db}-replaced\n"
    assert "later" not in ids(db)
    assert everything(Path(f"{db}-replaced")) == forgotten
    told = report_of(run("restore", backed_up, "--yes", "--json", db=db))
    assert (told["kept"], told["tasks"], told["backup"]) == (f"{db}-replaced-2", 7, str(backed_up))


def test_restore_asks_who_sits_there_and_does_not_guess_where_nobody_does(db: Path, backed_up: Path) -> None:
    before = everything(db)

    with mock.patch.object(sys, "stdin", io.StringIO("y\n")):
        alone = run("restore", backed_up, db=db)
    no = at_terminal("restore", backed_up, db=db, typed="n\n")
    silent = at_terminal("restore", backed_up, db=db, typed="")

    assert (alone.returncode, "give --yes" in alone.stderr) == (2, True)
    assert (no.returncode, no.stderr.endswith("[y/N]: lash-store: nothing was changed\n")) == (1, True)
    assert silent.returncode == 130
    assert everything(db) == before
    assert at_terminal("restore", backed_up, db=db, typed="y\n").returncode == 0
    assert "later" not in ids(db)


def test_restore_where_there_is_nothing_asks_nobody(db: Path, backed_up: Path) -> None:
    elsewhere = db.with_name("elsewhere.db")

    done = run("restore", backed_up, db=elsewhere)

    assert (done.returncode, done.stdout) == (0, f"{elsewhere}: revision {migrate.head()}, 7 tasks\n")


async def test_restore_is_refused_while_the_file_is_open_and_names_the_process(db: Path, backed_up: Path) -> None:
    async with TaskStore(db, runtime="desktop") as store:
        session = await store.session("s1")
        before = everything(db)

        done = await asyncio.to_thread(run, "restore", backed_up, "--yes", db=db)

        assert (done.returncode, done.stdout) == (1, "")
        told = f"{db} is open in process {os.getpid()}: close it there first; nothing was changed"
        assert done.stderr == f"lash-store: {told}\n"
        assert everything(db) == before
        await (await session.spawn(echo("goes on"), id="next")).result()
    assert not Path(f"{db}-replaced").exists()


def test_restore_says_which_file_is_at_fault(db: Path, backed_up: Path) -> None:
    before = everything(db)
    backed_up.write_bytes(backed_up.read_bytes()[: 4096 * 3])

    done = run("restore", backed_up, "--yes", db=db)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(backed_up) in done.stderr
    assert_harmless(done.stderr)
    assert everything(db) == before


# --- killed in the middle --------------------------------------------------------------------------------------------


def _large(path: Path, megabytes: int) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE filler (a)")
        for _ in range(megabytes):
            connection.execute("INSERT INTO filler VALUES (randomblob(1000000))")


@pytest.mark.long
@pytest.mark.parametrize("kills", [10, pytest.param(150, marks=pytest.mark.slow)])
def test_a_restore_that_is_killed_at_any_time_leaves_the_one_file_or_the_other(
    start: Callable[..., Worker], db: Path, tmp_path: Path, kills: int
) -> None:
    """And whichever it is opens, works, and can be replaced by the next restore."""
    _large(db, 2)
    backup = copies.back_up(db, db.with_name("backup.db")).path
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("DROP TABLE filler")
    asyncio.run(_add_later(db))
    old, new = contents(db), contents(backup)
    chance = random.Random(seed := secrets.randbits(32))
    print(f"seed {seed}")
    whole = start(keeping_programs.restore, str(backup), str(Path(shutil.copy(db, tmp_path / "measured.db"))))
    whole.wait_for("begins")
    began = time.monotonic()
    whole.wait_for("restored")
    takes = time.monotonic() - began
    whole.join()
    met = set()

    for number in range(kills):
        file = Path(shutil.copy(db, tmp_path / f"{number}.db"))
        worker = start(keeping_programs.restore, str(backup), str(file))
        worker.wait_for("begins")
        time.sleep(takes * chance.uniform(0.0, 1.2))
        said = worker.kill()

        met.add(_one_or_the_other(file, old, new))
        if ["restored"] in said:
            assert contents(file) == new
        asyncio.run(_add_later(file, "after the kill"))
        assert run("restore", backup, "--yes", db=file).returncode == 0
        assert contents(file) == new
        _clean(file)
    print(f"found {met}")
    assert kills < 100 or met == {"old", "new"}


async def _add_later(path: Path, task_id: str = "later") -> None:
    async with TaskStore(path, runtime="desktop") as store:
        await (await (await store.session("s1")).spawn(echo("new"), id=task_id)).result()


def contents(path: Path) -> dict[str, Any]:
    """Read the whole file but for its counters: what is put back goes on counting where what it replaces had come to."""
    found = everything(path)
    found.pop("sqlite_sequence")
    return found


def _one_or_the_other(file: Path, old: dict[str, Any], new: dict[str, Any]) -> str:
    for left in file.parent.glob(f"{file.name}-replaced*"):
        if left.name.endswith(("-wal", "-shm", "-journal", "-making")):
            continue
        assert contents(left) == old
    found = contents(file)
    check_file(file)
    assert found in (old, new)
    return "old" if found == old else "new"


def _clean(file: Path) -> None:
    for one in file.parent.glob(f"{file.name}*"):
        if one.is_dir():
            shutil.rmtree(one)
        else:
            one.unlink()


@pytest.mark.long
@pytest.mark.parametrize("state", ["whole", "damaged"])
def test_a_restore_that_dies_before_any_touch_of_a_file_is_done_by_the_next_one(
    start: Callable[..., Worker], db: Path, tmp_path: Path, state: str
) -> None:
    """Each link, rename, removal and sync in turn; beside a damaged file there is a ``-wal`` with commits."""
    backup = copies.back_up(db, db.with_name("backup.db")).path
    asyncio.run(_add_later(db))
    old, new = contents(db), contents(backup)
    wal = _wal_of(db, tmp_path)
    touched = 0
    while True:
        touched += 1
        file = Path(shutil.copy(db, tmp_path / f"{touched}.db"))
        if state == "damaged":
            Path(f"{file}-wal").write_bytes(wal)
            file.write_bytes(b"\xff" * 20_000)
        worker = start(keeping_programs.restore_until, str(backup), str(file), touched)
        is_done = ["restored"] in worker.join()

        # never nothing, for then the next program would begin anew
        assert file.exists()
        content = file.read_bytes()
        if state == "whole":
            _one_or_the_other(file, old, new)
        elif content[:4] != b"\xff" * 4:
            assert contents(file) == new
            assert Path(f"{file}-replaced-wal").read_bytes() == wal
        assert run("restore", backup, "--yes", db=file).returncode == 0
        assert contents(file) == new
        if is_done:
            break
        _clean(file)
    asyncio.run(_add_later(file, "after"))
    check_file(file)
    assert touched > 5


def _wal_of(db: Path, folder: Path) -> bytes:
    """Return what a dead owner of the file would leave beside it."""
    file = Path(shutil.copy(db, folder / "with-wal.db"))
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        connection.execute("UPDATE sessions SET closed_at = opened_at")
        connection.commit()
        return Path(f"{file}-wal").read_bytes()
