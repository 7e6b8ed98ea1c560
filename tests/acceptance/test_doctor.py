"""What `doctor` finds in a file that a hand, a crash or a disk was at, what it mends, and that its next steps help."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lash_store import (
    MonitorSpec,
    StoreCopied,
    TaskStore,
    checking,
    copies,
    database,
    guards,
    migrate,
    rehearsal,
    schema,
    vitality,
)
from tests.acceptance import agent_file, programs
from tests.acceptance.commands import HOSTILE, assert_harmless, run
from tests.acceptance.processes import Worker
from tests.runtime.support import rows

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped file in which an agent worked."""
    path = tmp_path_factory.mktemp("made") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


@pytest.fixture
def db(made: Path, tmp_path: Path) -> Path:
    """A copy of that, to be damaged."""
    return Path(shutil.copy(made, tmp_path / "agent.db"))


def by_hand(path: Path, *statements: str) -> None:
    """Change a file as a person would who means it: no check, no trigger, no foreign key holds them up."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON").fetchall()
        triggers = connection.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for _, sql in triggers:
            connection.execute(sql)


def look(path: Path, *options: str) -> dict[str, Any]:
    """Return what doctor says, and hold that its words to a person have it all, and its exit code."""
    done = run("doctor", "--json", *options, db=path)
    assert done.stderr == ""
    assert done.stdout.isascii()
    report: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if report["is_sound"] else 1)
    if not options:
        told = run("doctor", db=path)
        assert_harmless(told.stdout)
        assert (told.returncode, told.stderr) == (done.returncode, "")
        assert told.stdout.rstrip().endswith("sound" if report["is_sound"] else "to see to")
        for finding in report["findings"]:
            assert f"{finding['code']}: " in told.stdout
            assert "→ " in told.stdout
    return report


def codes(report: dict[str, Any]) -> list[str]:
    return sorted(finding["code"] for finding in report["findings"])


def only(path: Path, code: str) -> dict[str, Any]:
    report = look(path)
    assert codes(report) == [code], report["findings"]
    found: dict[str, Any] = report["findings"][0]
    return found


# --- nothing wrong ---------------------------------------------------------------------------------------------------


def test_a_sound_file_is_said_to_be(db: Path) -> None:
    before = db.read_bytes()

    report = look(db)

    assert (report["is_sound"], report["findings"], report["revision"]) == (True, [], schema.HEAD)
    [counted] = rows(db, "SELECT (SELECT count(*) FROM tasks) AS tasks, (SELECT count(*) FROM events) AS events")
    assert (report["tasks"], report["events"]) == (counted["tasks"], counted["events"])
    assert db.read_bytes() == before
    assert look(db, "--repair")["findings"] == []


async def test_a_backup_of_a_live_file_is_sound_and_says_what_it_is(made: Path, tmp_path: Path) -> None:
    live = tmp_path / "live.db"
    async with TaskStore(live, runtime="desktop") as store:
        await agent_file.fill(store)
        backup = (await store.backup(tmp_path / "backup.db")).path
        assert (await asyncio.to_thread(look, live))["findings"] == []

    finding = only(backup, "copy")

    assert (finding["severity"], look(backup)["is_sound"]) == ("info", True)
    # each of the steps it names works, and not opening it as it is
    with pytest.raises(StoreCopied):
        await TaskStore(backup, runtime="desktop").open()
    assert run("restore", str(backup), "--yes", db=live).returncode == 0
    async with TaskStore(backup, runtime="desktop", adopt=True):
        pass
    assert look(backup)["findings"] == []


def test_a_busy_file_with_owners_that_come_and_go_has_nothing_wrong_with_it(
    tmp_path: Path,
) -> None:
    path = tmp_path / "busy.db"
    stop, begun = threading.Event(), threading.Event()

    async def work(number: int) -> None:
        while not stop.is_set():
            async with TaskStore(path, runtime="desktop") as store:
                session = await store.session(f"s{number}")
                for _ in range(3):
                    tasks = [await session.spawn(_soon(), notify_on_end=True) for _ in range(4)]
                    await tasks[0].cancel("not this one")
                    await (await session.start_monitor(MonitorSpec(id="m", command="true", shell=True))).wait()
                    await asyncio.gather(*(task.wait() for task in tasks))
            begun.set()

    threads = [threading.Thread(target=asyncio.run, args=(work(number),)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert begun.wait(30)
        found = [checking.check(path).findings for _ in range(20)]
        found += [checking.check(path, repair=True).findings for _ in range(5)]
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert [finding for report in found for finding in report] == []


def test_what_is_looked_at_is_of_one_moment_its_revision_too(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # somebody upgraded the file after the first look at it
    monkeypatch.setattr(database, "probe", lambda path: "0004")

    report = checking.check(db)
    exported = run("export", "--only", "owner", db=db).stdout.splitlines()
    script = rehearsal.script(db, "0004")

    assert (report.revision, report.findings) == (schema.HEAD, ())
    assert json.loads(exported[0])["revision"] == schema.HEAD
    assert f"the_file_is_at_{schema.HEAD}" in script


async def _soon() -> str:
    await asyncio.sleep(random.random() / 100)
    return "done"


async def test_an_owner_that_closes_while_it_is_looked_at_is_not_called_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.db"
    store = TaskStore(path, runtime="desktop")
    await store.open()
    loop = asyncio.get_running_loop()
    ask = vitality.life_of

    def closes_first(*owner: Any) -> Any:
        asyncio.run_coroutine_threadsafe(store.close(), loop).result(20)
        return ask(*owner)

    monkeypatch.setattr(vitality, "life_of", closes_first)

    assert (await asyncio.to_thread(checking.check, path)).findings == ()


# --- rows that a hand was at -----------------------------------------------------------------------------------------

FIRST = "(SELECT min(task_seq) FROM tasks)"
LIVE = "(SELECT min(task_seq) FROM tasks WHERE completed_at IS NULL)"


@pytest.mark.parametrize(
    ("statement", "code", "part"),
    [
        (f"UPDATE tasks SET result = '5' WHERE task_seq = {FIRST}", "fold", "#1 (desktop:s1 index): result"),
        (f"UPDATE tasks SET attempt = 9 WHERE task_seq = {LIVE}", "fold", "attempt"),
        (f"UPDATE tasks SET result = 'no json' WHERE task_seq = {FIRST}", "fold", "all"),
        (f"UPDATE tasks SET state = 'sleeping' WHERE task_seq = {LIVE}", "fold", "all"),
        (f"UPDATE tasks SET state = 'sleeping' WHERE task_seq = {FIRST}", "fold", "all"),
        (f"UPDATE events SET data = '[' WHERE task_seq = {FIRST}", "fold", "all"),
        (f"UPDATE events SET data = '{'[' * 50_000}' WHERE task_seq = {FIRST}", "fold", "all"),
        (f"UPDATE events SET data = '3' WHERE task_seq = {FIRST}", "fold", "#1"),
        (f"UPDATE events SET type = 'happened' WHERE task_seq = {FIRST} AND type = 'started'", "fold", "#1"),
        (f"UPDATE tasks SET label = CAST(x'ff31' AS TEXT) WHERE task_seq = {FIRST}", "fold", "label"),
        (f"DELETE FROM events WHERE task_seq = {FIRST}", "no_events", "#1 (desktop:s1 index)"),
        ("DELETE FROM handles WHERE task_seq = 1 AND role = 'owner'", "no_owner_handle", "#1"),
        ("UPDATE handles SET scope = 'desktop:s2' WHERE task_seq = 1 AND role = 'owner'", "handle_astray", "h-"),
        ("DELETE FROM sessions WHERE session_id = 's3'", None, ""),
        ("DELETE FROM sessions WHERE session_id = 's2'", "orphans", "handles row"),
        (
            "INSERT INTO events VALUES (9999, 9999, 'a:b', NULL, 'x', 1, 'noted', '', '{}')",
            "orphans",
            "events row 9999",
        ),
        ("UPDATE sqlite_sequence SET seq = 1 WHERE name = 'tasks'", "number_used_twice", "tasks"),
        ("DELETE FROM sqlite_sequence WHERE name = 'events'", "number_used_twice", "events"),
        (
            "INSERT INTO tombstones SELECT task_seq, scope, id, kind, 'failed', NULL, NULL, NULL, '', '', 1, 2 "
            "FROM tasks WHERE task_seq = 1",
            "tombstone_and_row",
            "#1",
        ),
    ],
    ids=lambda value: str(value)[:50] if value else "-",
)
async def test_what_a_hand_did_to_a_row_is_found_and_a_backup_mends_it(
    db: Path, tmp_path: Path, statement: str, code: str | None, part: str
) -> None:
    backup = copies.back_up(db, tmp_path / "backup.db").path
    by_hand(db, statement)
    if code is None:
        # nothing hung on it
        assert look(db)["findings"] == []
        return

    finding = only(db, code)

    assert (finding["severity"], finding["can_repair"]) == ("error", False)
    assert part in finding["message"]
    assert "lash-store restore BACKUP" in finding["next_step"]
    before = db.read_bytes()
    assert codes(look(db, "--repair")) == [code]
    assert db.read_bytes() == before
    assert run("restore", str(backup), "--yes", db=db).returncode == 0
    assert codes(look(db)) == ["kept_files"]


def test_events_of_a_task_whose_number_is_text_are_nobodys(db: Path) -> None:
    # as a page in another's place leaves them: no statement writes text there
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        (as_it_was,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'events'").fetchone()
        connection.execute("PRAGMA writable_schema=ON").fetchall()
        define = "UPDATE sqlite_schema SET sql = ? WHERE name = 'events'"
        connection.execute(define, (as_it_was.replace("STRICT", ""),))
    by_hand(db, "UPDATE events SET task_seq = 'x' WHERE task_seq = (SELECT max(task_seq) FROM tasks)")
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema=ON").fetchall()
        connection.execute(define, (as_it_was,))

    assert {"orphans", "no_events"} <= {*codes(look(db))}


def test_an_end_that_stands_twice_or_not_last_is_found(db: Path) -> None:
    by_hand(
        db,
        "DROP INDEX events_one_end",
        f"INSERT INTO events SELECT 9999, task_seq, scope, from_scope, task_id, attempt, 'noted', at, '{{}}' "
        f"FROM events WHERE task_seq = {FIRST} AND type = 'completed'",
    )
    assert codes(look(db)) == ["ends", "schema_changed"]


def test_hostile_names_reach_no_terminal(db: Path) -> None:
    by_hand(db)
    with closing(sqlite3.connect(db)) as connection, connection:
        connection.execute("DROP TRIGGER tasks_terminal_is_final")
        connection.execute("UPDATE tasks SET id = ? WHERE task_seq = 1", (HOSTILE,))
    assert "fold" in codes(look(db))


# --- schema ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "statements",
    [
        ["DROP VIEW live_tasks"],
        ["DROP INDEX tasks_live"],
        ["DROP TRIGGER tasks_terminal_is_final", "DROP TRIGGER events_are_history"],
        ["DROP VIEW live_tasks", "CREATE VIEW live_tasks AS SELECT 1 AS id"],
        [
            "DROP TRIGGER tasks_live_is_kept",
            "CREATE TRIGGER tasks_live_is_kept BEFORE DELETE ON tasks BEGIN SELECT 1; END",
        ],
    ],
    ids=" ".join,
)
def test_indexes_triggers_and_views_are_made_again_beside_whoever_works(db: Path, statements: list[str]) -> None:
    fresh = rows(db, "SELECT type, name, sql FROM sqlite_schema ORDER BY name")
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)
    finding = only(db, "schema_changed")
    assert (finding["severity"], finding["can_repair"]) == ("warning", True)
    assert statements[0].split()[2] in finding["message"]

    async def work() -> None:
        async with TaskStore(db, runtime="desktop") as store:
            mended = await store.check(repair=True)
            assert [one.code for one in mended.findings if one.is_repaired] == ["schema_changed"]
            session = await store.session("s1")
            assert await (await session.spawn(_soon(), id="after")).result() == "done"

    asyncio.run(work())

    assert look(db)["findings"] == []
    assert rows(db, "SELECT type, name, sql FROM sqlite_schema ORDER BY name") == fresh


def test_an_index_that_the_rows_forbid_is_not_made_and_nothing_is_half_done(db: Path) -> None:
    by_hand(
        db,
        "DROP INDEX handles_observers",
        "DROP VIEW live_tasks",
        "INSERT INTO handles SELECT NULL, handle_id || 'x', scope, task_seq, role, name, namespace, created_at, read_at "
        "FROM handles WHERE role = 'observer'",
    )

    [finding] = look(db, "--repair")["findings"]

    assert (finding["code"], finding["is_repaired"]) == ("schema_changed", False)
    assert "not now: UNIQUE constraint failed" in finding["next_step"]
    assert rows(db, "SELECT 1 FROM sqlite_schema WHERE name = 'live_tasks'") == []


def test_a_table_that_is_missing_is_an_error(db: Path) -> None:
    by_hand(db, "DROP VIEW live_monitors", "DROP TABLE updates")
    assert "updates" in only(db, "tables_missing")["message"]


def test_somebody_elses_trigger_is_named_and_dropping_it_helps(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE my_log (task_seq INTEGER)")
        connection.execute(
            "CREATE TRIGGER mine AFTER INSERT ON tasks BEGIN INSERT INTO my_log VALUES (NEW.task_seq); END"
        )

    finding = only(db, "foreign_trigger")

    # it may be a program's own, which is none of our business
    assert ("mine" in finding["message"], finding["severity"], finding["can_repair"]) == (True, "info", False)
    assert "CREATE TRIGGER mine" in run("schema", db=db).stdout
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP TRIGGER mine")
    assert look(db)["findings"] == []


def test_a_trigger_that_changes_what_the_store_writes_is_an_error(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TRIGGER bad AFTER INSERT ON tasks BEGIN DELETE FROM events; END")

    finding = only(db, "meddling_trigger")

    assert ("bad" in finding["message"], finding["severity"], finding["can_repair"]) == (True, "error", False)
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("DROP TRIGGER bad")
    assert look(db)["findings"] == []


# --- pages -----------------------------------------------------------------------------------------------------------


def _page_of(path: Path, name: str) -> int:
    return int(rows(path, "SELECT rootpage FROM sqlite_schema WHERE name = ?", name)[0]["rootpage"])


@pytest.mark.long
@pytest.mark.parametrize("where", ["tasks", "events", "tasks_live", "owners", "sessions", "end", "schema"])
def test_damaged_pages_are_found_and_a_backup_mends_them(db: Path, tmp_path: Path, where: str) -> None:
    backup = copies.back_up(db, tmp_path / "backup.db").path
    with open(db, "r+b") as file:
        if where == "end":
            file.truncate(db.stat().st_size - 8192)
        elif where == "schema":
            file.seek(100)
            file.write(b"\xff" * 3996)
        else:
            file.seek((_page_of(db, where) - 1) * 4096)
            file.write(b"\xff" * 4096)
    before = db.read_bytes()

    report = look(db)

    assert "damaged" in codes(report)
    assert report["findings"][0]["severity"] == "error"
    look(db, "--repair")
    assert db.read_bytes() == before
    assert run("restore", str(backup), "--yes", db=db).returncode == 0
    assert codes(look(db)) == ["kept_files"]


@pytest.mark.parametrize("what", ["header", "text", "foreign", "newer", "missing", "folder"])
def test_what_cannot_be_looked_at_is_said_in_one_line(db: Path, what: str) -> None:
    match what:
        case "header":
            db.write_bytes(b"\xff" * 100 + db.read_bytes()[100:])
        case "text":
            db.write_text("dear diary")
        case "foreign":
            by_hand(db, "PRAGMA application_id = 1")
        case "newer":
            by_hand(db, f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
        case "missing":
            db.unlink()
        case _:
            db.unlink()
            db.mkdir()
    for options in ([], ["--json"], ["--repair"]):
        done = run("doctor", *options, db=db)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert done.stderr.startswith(f"lash-store: {db}")


def test_commits_without_their_file_are_damage_and_a_backup_mends_it(db: Path, tmp_path: Path) -> None:
    backup = copies.back_up(db, tmp_path / "backup.db").path
    db.rename(f"{db}-wal")

    assert "is missing or empty beside agent.db-wal" in only(db, "damaged")["message"]

    assert run("restore", str(backup), "--yes", db=db).returncode == 0
    assert codes(look(db)) == ["kept_files"]


@pytest.mark.long
def test_random_damage_never_ends_in_a_traceback(made: Path, tmp_path: Path) -> None:
    chance = random.Random(7)
    whole = made.read_bytes()
    for number in range(60):
        content = bytearray(whole)
        for _ in range(chance.randrange(1, 40)):
            at = chance.randrange(100, len(content) - 64)
            length = chance.randrange(1, 64)
            content[at : at + length] = chance.randbytes(length)
        path = tmp_path / f"{number}.db"
        path.write_bytes(content)
        path.chmod(0o600)
        done = run("doctor", db=path)
        assert_harmless(done.stdout + done.stderr)
        assert done.returncode in {0, 1}
        path.unlink()


@pytest.mark.parametrize("content", [b"", b"\0"], ids=["no byte", "one byte"])
def test_an_empty_file_beside_commits_is_looked_at_without_losing_them(db: Path, content: bytes) -> None:
    commits = Path(f"{db}-wal")
    # a -wal that says no more than that it has commits: SQLite removes any beside an empty file, even to read it
    commits.write_bytes(db.read_bytes())
    # SQLite takes one of a single byte for empty, too
    db.write_bytes(content)
    before = commits.read_bytes()

    for options in ([], ["--json"], ["--repair"]):
        assert "is missing or empty beside agent.db-wal" in run("doctor", *options, db=db).stdout
        assert commits.read_bytes() == before


# --- revision, mode, room --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", sorted(file.stem for file in DATA.glob("*.db")))
def test_an_older_file_is_to_be_upgraded_and_is_sound_then(tmp_path: Path, revision: str) -> None:
    path = Path(shutil.copy(DATA / f"{revision}.db", tmp_path / "agent.db"))
    path.chmod(0o600)

    finding = only(path, "old_revision")

    assert "lash-store upgrade" in finding["next_step"]
    assert run("upgrade", "--no-backup", db=path).returncode == 0
    # owners of then are dead, and what they left is somebody's to recover
    assert set(codes(look(path))) <= {"dead_owner", "left_behind", "stuck_cancel"}


def test_a_sound_file_in_a_folder_that_may_not_be_written_is_sound(db: Path) -> None:
    with mock.patch.object(os, "access", side_effect=lambda _path, mode: mode != os.W_OK):
        assert look(db)["findings"] == []


def test_a_file_out_of_wal_mode_is_put_back_into_it(db: Path) -> None:
    by_hand(db, "PRAGMA journal_mode = DELETE")
    finding = only(db, "not_wal")
    assert finding["can_repair"]

    mended = look(db, "--repair")

    assert (mended["is_sound"], mended["findings"][0]["is_repaired"]) == (True, True)
    assert look(db)["findings"] == []

    async def work() -> None:
        async with TaskStore(db, runtime="desktop") as store:
            await store.session("s1")

    asyncio.run(work())


def _with_room(path: Path) -> None:
    by_hand(
        path,
        "CREATE TABLE filler (a)",
        *["INSERT INTO filler VALUES (randomblob(1000000))"] * 6,
        "DROP TABLE filler",
    )


def test_room_that_holds_nothing_is_given_back(db: Path) -> None:
    _with_room(db)
    size = db.stat().st_size
    assert only(db, "free_pages")["severity"] == "info"

    assert look(db, "--repair")["findings"][0]["is_repaired"]

    assert db.stat().st_size < size / 4
    assert look(db)["findings"] == []


def test_a_file_that_cannot_shrink_by_itself_is_told_how(db: Path) -> None:
    by_hand(db, "PRAGMA journal_mode = DELETE", "PRAGMA auto_vacuum = NONE", "VACUUM", "PRAGMA journal_mode = WAL")
    _with_room(db)
    finding = only(db, "free_pages")
    assert not finding["can_repair"]
    found = shutil.which("sqlite3")
    if found is None:
        pytest.skip("no sqlite3 shell on this machine")

    subprocess.run(finding["next_step"].partition("then: ")[2], shell=True, check=True)

    assert look(db)["findings"] == []
    assert rows(db, "PRAGMA auto_vacuum") == [{"auto_vacuum": 2}]


def test_a_long_wal_is_emptied_beside_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "_MUCH_WAL", 1_000_000)
    path = tmp_path / "agent.db"

    async def work() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            session = await store.session("s1")
            await (await session.spawn(_large(), id="large")).wait()
            with closing(sqlite3.connect(path)) as reader:
                reader.execute("BEGIN")
                reader.execute("SELECT count(*) FROM tasks").fetchall()
                await (await session.spawn(_large(), id="larger")).wait()
                held = await store.check(repair=True)
                assert [(one.code, one.is_repaired) for one in held.findings] == [("long_wal", False)]
                assert "a reader or a writer is at it" in held.findings[0].next_step
            mended = await store.check(repair=True)
            assert [(one.code, one.is_repaired) for one in mended.findings] == [("long_wal", True)]
            assert Path(f"{path}-wal").stat().st_size < 100_000
            assert (await store.check()).findings == ()
            await (await session.spawn(_soon(), id="after")).result()

    asyncio.run(work())
    assert look(path)["findings"] == []


async def _large() -> str:
    return "x" * 800_000


# --- beside the file -------------------------------------------------------------------------------------------------


def test_permissions_are_taken_away(db: Path) -> None:
    db.chmod(0o644)
    Path(f"{db}-wal").touch(0o600)
    Path(f"{db}-wal").chmod(0o664)
    finding = only(db, "permissions")
    assert "agent.db (mode 0644), agent.db-wal (mode 0" in finding["message"]

    assert look(db, "--repair")["is_sound"]

    assert look(db)["findings"] == []
    assert {one.stat().st_mode & 0o077 for one in db.parent.iterdir() if one.is_file()} == {0}


def test_a_link_beside_the_file_is_named_and_what_it_names_stays_as_it_is(db: Path, tmp_path: Path) -> None:
    # a copy can be read without the file that the link hides
    by_hand(db, "PRAGMA journal_mode = delete")
    stranger = tmp_path / "stranger"
    stranger.touch()
    stranger.chmod(0o644)
    Path(f"{db}-shm").symlink_to(stranger)
    found = {one["code"]: one["message"] for one in look(db)["findings"]}
    assert [*found] == ["not_wal", "links"]
    assert found["links"] == "where SQLite has files of its own, there is a link: agent.db-shm"

    look(db, "--repair")

    for command in ("upgrade", "doctor", "list"):
        assert "see what it names, and remove agent.db-shm" in run(command, db=db).stderr
    assert (stranger.stat().st_mode & 0o777, stranger.read_bytes()) == (0o644, b"")
    Path(f"{db}-shm").unlink()
    assert look(db)["findings"] == []


def test_lock_files_that_nobody_holds_are_removed_and_others_are_not(db: Path) -> None:
    folder = guards.make_side_folder(db)
    stale, foreign = folder / "o-0123.lock", folder / "notes.txt"
    stale.touch()
    foreign.touch()
    assert "o-0123.lock" in only(db, "stale_locks")["message"]

    async def work() -> None:
        async with TaskStore(db, runtime="desktop") as store:
            [ours] = [one for one in folder.glob("o-*.lock") if one != stale]
            assert (await store.check(repair=True)).is_sound
            assert ours.exists()

    asyncio.run(work())

    assert not stale.exists()
    assert foreign.exists()
    assert look(db)["findings"] == []


def test_what_a_killed_backup_left_and_what_a_restore_kept_is_said(db: Path, tmp_path: Path) -> None:
    backup = copies.back_up(db, tmp_path / "backup.db").path
    Path(f"{db}-making").write_bytes(b"half")
    Path(f"{db}-0004.backup").touch()
    Path(f"{db}-notes").touch()

    report = look(db)
    assert (codes(report), report["is_sound"]) == (["half_made", "kept_files"], True)
    run("restore", str(backup), "--yes", db=db)

    [kept] = look(db)["findings"]
    assert "agent.db-0004.backup, agent.db-replaced" in kept["message"]
    assert "notes" not in kept["message"]
    for one in (f"{db}-0004.backup", f"{db}-replaced"):
        Path(one).unlink()
    assert look(db)["findings"] == []


# --- owners ----------------------------------------------------------------------------------------------------------


def test_a_dead_owners_work_is_named_and_opening_the_file_recovers_it(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "a", {}, []], ["once", "b", {}, []]], {})
    worker.wait_for("ready")
    assert look(path)["findings"] == []
    worker.kill()

    finding = only(path, "dead_owner")

    assert (
        f"process {worker.pid}, runtime 'desktop') is dead, and nobody has recovered its 2 live" in finding["message"]
    )
    assert look(path, "--repair")["is_sound"] is False
    after = start(programs.finish, str(path), {"cancel_grace": 0.01})
    after.wait_for("closed")
    after.join()
    assert look(path)["findings"] == []


@pytest.mark.parametrize("way", ["CONT", "abandon"])
def test_a_stopped_owner_is_named_and_either_step_helps(start: Callable[..., Worker], path: Path, way: str) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "a", {}, []], ["once", "b", {}, []]], {})
    worker.wait_for("ready")
    worker.stop()

    finding = only(path, "stopped_owner")

    step = finding["next_step"]
    assert f"kill -CONT {worker.pid}" in step
    if way == "CONT":
        worker.signal(signal.SIGCONT)
        _wait_until(lambda: look(path)["findings"] == [])
        return
    command = step.partition("lash-store ")[2].replace("TEXT", "stuck").split()
    assert run(*command, db=path).returncode == 0
    assert {row["state"] for row in rows(path, "SELECT state FROM tasks")} == {"pending", "abandoned"}
    assert look(path)["findings"] == []


def _wait_until(question: Callable[[], bool]) -> None:
    for _ in range(1000):
        if question():
            return
    raise AssertionError("it never came")


def test_a_plain_copy_of_a_live_file_says_that_it_may_be_one(start: Callable[..., Worker], path: Path) -> None:
    worker = start(programs.spawn_and_stay, str(path), [["forever", "a", {}, []]], {})
    worker.wait_for("ready")
    copied = path.with_name("copied.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copied)) as target:
        source.backup(target)
    copied.chmod(0o600)

    finding = only(copied, "unreachable_owner")

    assert "is this a copy of its file?" in finding["next_step"]
    command = finding["next_step"].partition("lash-store ")[2].replace("TEXT", "copy").split()
    assert run(*command, db=copied).returncode == 0
    assert look(copied)["findings"] == []
    assert look(path)["findings"] == []


def test_a_cancel_that_does_not_end_is_named_and_abandoning_helps(
    start: Callable[..., Worker], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vitality, "_LONG_CANCEL", 0.0)
    worker = start(
        programs.spawn_and_stay, str(path), [["stubborn", "a", {"cancel": True}, []]], {"cancel_grace": 0.01}
    )
    worker.wait_for("ready")
    worker.wait_for("swallowed", "a")

    finding = only(path, "stuck_cancel")

    assert "#1 (desktop:s1 a) for " in finding["message"]
    command = finding["next_step"].partition("lash-store ")[2].replace("'#N'", "#1").replace("TEXT", "stuck").split()
    assert run(*command, db=path).returncode == 0
    assert look(path)["findings"] == []


def test_a_cancel_whose_time_is_missing_does_not_hold_the_look_up(db: Path) -> None:
    by_hand(db, f"UPDATE tasks SET state = 'cancel_requested', cancel_requested_at = 'x' WHERE task_seq = {LIVE}")
    assert "fold" in codes(look(db))


def test_a_monitors_process_whose_owner_is_dead_is_named_and_opening_the_file_ends_it(
    path: Path, tmp_path: Path
) -> None:
    """The owner of here dies as one in another process would: its row says so, and its loop is closed."""
    copied = tmp_path / "copied.db"

    async def work() -> int:
        async with TaskStore(path, runtime="desktop") as store:
            session = await store.session("s1")
            handle = await session.start_monitor(MonitorSpec(id="m", command="exec sleep 600", shell=True))
            while (process := (await handle.record()).process) is None:
                await asyncio.sleep(0.01)
            assert (await store.check()).findings == ()
            # what a kill of the owner would leave, of which this process is no part any more
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copied)) as target:
                source.backup(target)
            copied.chmod(0o600)
            by_hand(copied, "UPDATE owners SET pid = 1, process_start = 'x', token = 'gone'")
            report = checking.check(copied)
            assert [one.code for one in report.findings] == ["dead_owner", "process_left"]
            assert f"{process.pid} (of #1)" in report.findings[1].message
            async with TaskStore(copied, runtime="desktop"):
                pass
            return process.pid

    pid = asyncio.run(work())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert look(copied)["findings"] == []


def test_live_work_under_an_owner_that_has_ended_is_named_and_recovered(db: Path) -> None:
    by_hand(db, "UPDATE tasks SET owner_id = 1 WHERE completed_at IS NULL")
    report = look(db)
    assert "left_behind" in codes(report)
    assert "fold" in codes(report)


# --- the command -----------------------------------------------------------------------------------------------------


def test_help_teaches_by_examples_and_says_what_the_exit_code_means() -> None:
    shown = run("doctor", "--help").stdout
    assert "Examples:\n    lash-store doctor --db agent.db" in shown
    assert "Exit code 1: something is wrong" in shown
    assert run("doctor").returncode == 2


async def test_a_store_checks_itself_and_a_reading_one_mends_nothing(db: Path) -> None:
    from lash_store import StoreReadOnly

    async with TaskStore.open_readonly(db) as store:
        assert (await store.check()).is_sound
        with pytest.raises(StoreReadOnly):
            await store.check(repair=True)


def test_a_read_error_that_passes_is_not_called_damage(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the disk's may come as SQLITE_CORRUPT, or as what ``integrity_check`` says."""
    looks: list[str] = []
    integrity = checking._integrity

    def fails_once(connection: sqlite3.Connection) -> Any:
        looks.append("look")
        if len(looks) == 1:
            error = sqlite3.DatabaseError("database disk image is malformed")
            error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
            raise error
        return integrity(connection)

    monkeypatch.setattr(checking, "_integrity", fails_once)

    assert checking.check(db).is_sound
    assert len(looks) == 2


def test_a_file_that_is_locked_is_not_called_damaged(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking.database, "_PATIENCE", 50)
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE").fetchall()
        connection.execute("BEGIN EXCLUSIVE")

        done = run("doctor", db=db)

        assert (done.returncode, done.stdout) == (1, "")
        assert "another process holds the write lock" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("revision", ["0002", "0003", "0004"])
def test_what_a_downgrade_lost_is_known_and_not_taken_for_damage(tmp_path: Path, revision: str) -> None:
    old = Path(shutil.copy(Path(__file__).parents[1] / "data" / f"{revision}.db", tmp_path / "agent.db"))
    for to in (schema.HEAD, "0001", schema.HEAD):
        (migrate.downgrade if to == "0001" else migrate.upgrade)(old, to)

    report = checking.check(old)

    assert [one for one in report.findings if one.severity == "error"] == []
    [lost] = [one for one in report.findings if one.code == "lost_columns"]
    assert ": parent_seq, " in lost.message
    # what a hand did to the same rows is not hidden by that
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("UPDATE tasks SET has_callback = 0, label = 'x' WHERE completed_at IS NULL")
    assert "fold" in {one.code for one in checking.check(old).findings}
