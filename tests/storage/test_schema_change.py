"""Rules of changing a file's revision: who may, what is checked before it counts, what is reported, kept and said to be lost."""

from __future__ import annotations

import logging
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.operations import Operations

from lash_store import (
    SchemaChange,
    SchemaError,
    SchemaTooNew,
    SchemaTooOld,
    StorageCorrupt,
    TaskStore,
    migrate,
    rehearsal,
    revisions,
    schema,
)
from tests.runtime.support import check_file
from tests.storage.test_schema import objects
from tests.storage.test_upgrade import (
    DATA,
    DIES_IN_THE_MIDDLE,
    bring_to_life,
    bytes_of,
    contents,
    objects_of_ours,
)

OLD = sorted(file.stem for file in DATA.glob("*.db"))
"""The revisions of which there is a file from before the next."""

KNOWN = [script.revision for script in revisions.known()]


@pytest.fixture(params=OLD)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A file of each older revision."""
    return Path(shutil.copy(DATA / f"{request.param}.db", tmp_path / "agent.db"))


@pytest.fixture
def oldest(tmp_path: Path) -> Path:
    """A file of the first revision."""
    return Path(shutil.copy(DATA / f"{OLD[0]}.db", tmp_path / "agent.db"))


@pytest.fixture
def newest(tmp_path: Path) -> Path:
    """A file at head, with everything in it that the last of the old ones has."""
    path = Path(shutil.copy(DATA / f"{OLD[-1]}.db", tmp_path / "agent.db"))
    migrate.upgrade(path, backup=False)
    return path


def change(path: Path, *statements: str) -> None:
    """Change a file by hand, as the shell would: no rule of ours but the schema's own holds."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).fetchall()


def backups(path: Path) -> list[str]:
    """Return the copies beside a file, without what a reader of one leaves beside that."""
    found = {file.name for file in path.parent.glob(f"{path.name}*backup*")}
    return sorted(name for name in found if not name.endswith(("-wal", "-shm")))


# --- refused --------------------------------------------------------------------------------------------------------


async def test_a_store_told_to_refuse_says_the_command_to_run_and_changes_no_byte(old: Path) -> None:
    before, revision = bytes_of(old), migrate.current(old)
    told = f"at revision {revision}, this lash_store knows {schema.HEAD}: run: lash-store upgrade --db {old}"

    with pytest.raises(SchemaTooOld, match=told):
        await TaskStore(old, runtime="desktop", upgrade="refuse").open()

    assert bytes_of(old) == before
    assert not backups(old)


async def test_a_store_told_to_refuse_opens_a_new_file_and_one_at_head(tmp_path: Path) -> None:
    for _ in range(2):
        async with TaskStore(tmp_path / "agent.db", runtime="desktop", upgrade="refuse") as store:
            assert store.upgraded is None


def test_a_word_that_is_no_way_to_upgrade_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="upgrade must be 'auto' or 'refuse'"):
        TaskStore(tmp_path / "agent.db", runtime="desktop", upgrade="never")  # type: ignore[arg-type]


def newer(path: Path) -> Path:
    """Make the file one of a newer package, which stands in its log alone."""
    left = path.with_name("newer.db")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
        connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")
        shutil.copy(path, left)
        shutil.copy(f"{path}-wal", f"{left}-wal")
    return left


@pytest.mark.parametrize(
    "make",
    [
        lambda path: TaskStore(path, runtime="desktop"),
        lambda path: TaskStore(path, runtime="desktop", upgrade="refuse"),
        lambda path: TaskStore.connect(path, runtime="desktop"),
        TaskStore.open_readonly,
    ],
    ids=["own", "refuse", "connect", "open_readonly"],
)
async def test_a_file_of_a_newer_package_is_refused_and_no_byte_of_it_or_its_log_changed(
    newest: Path, make: Callable[[Path], TaskStore]
) -> None:
    path = newer(newest)
    before = bytes_of(path)
    assert len(before) == 2

    with pytest.raises(
        SchemaTooNew, match=f"at revision 9999, this lash_store knows {schema.HEAD}: upgrade the package"
    ):
        await make(path).open()

    assert bytes_of(path) == before


def test_a_downgrade_is_refused_beside_a_live_owner_and_changes_nothing(newest: Path, spawn: Any) -> None:
    bring_to_life(newest, 2, spawn)
    before = contents(newest)
    pid = before["owners"][1]["pid"]

    with pytest.raises(SchemaError, match=f"open in process {pid}: close it there first; nothing was changed"):
        migrate.downgrade(newest, KNOWN[0])

    assert (contents(newest), migrate.current(newest), backups(newest)) == (before, schema.HEAD, [])


def test_up_and_down_are_not_mistaken_for_each_other(newest: Path) -> None:
    with pytest.raises(SchemaError, match="that is a downgrade; nothing was changed"):
        migrate.upgrade(newest, KNOWN[0])
    migrate.downgrade(newest, KNOWN[0])
    with pytest.raises(SchemaError, match="that is an upgrade; nothing was changed"):
        migrate.downgrade(newest, KNOWN[1])
    with pytest.raises(SchemaError, match="no revision 'nonesuch': this lash_store has 0001, "):
        migrate.upgrade(newest, "nonesuch")


# --- reported and kept ----------------------------------------------------------------------------------------------


async def test_an_upgrade_is_reported_with_the_copy_it_kept(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    revision = migrate.current(old)
    caplog.set_level(logging.INFO, "lash_store.migrate")

    async with TaskStore(old, runtime="another") as store:
        done = store.upgraded

    backup = Path(f"{old}-{revision}.backup")
    assert isinstance(done, SchemaChange)
    assert (done.from_revision, done.to_revision, done.backup) == (revision, schema.HEAD, backup)
    assert done.seconds > 0
    assert migrate.current(backup) == revision
    [told] = [record for record in caplog.records if record.message == "upgraded"]
    assert (told.__dict__["path"], told.__dict__["backup"]) == (str(old), str(backup))

    async with TaskStore(old, runtime="another") as again:
        assert again.upgraded is None
    assert backups(old) == [backup.name]


async def test_no_copy_is_kept_when_none_is_wanted(old: Path) -> None:
    async with TaskStore(old, runtime="another", upgrade_backup=False) as store:
        assert store.upgraded is not None
        assert store.upgraded.backup is None

    assert migrate.current(old) == schema.HEAD
    assert not backups(old)


def test_a_downgrade_keeps_the_file_from_before_as_well_under_a_name_nothing_has(newest: Path) -> None:
    before = contents(newest)
    Path(f"{newest}-{schema.HEAD}.backup").write_text("somebody's")

    done = migrate.downgrade(newest, KNOWN[0])

    assert done is not None
    assert done.backup == Path(f"{newest}-{schema.HEAD}.backup-2")
    assert (contents(done.backup), migrate.current(done.backup)) == (before, schema.HEAD)
    assert Path(f"{newest}-{schema.HEAD}.backup").read_text() == "somebody's"


# --- checked before it counts ---------------------------------------------------------------------------------------

UNSOUND = (
    "PRAGMA ignore_check_constraints = ON",
    "UPDATE handles SET role = 'x'",
    "PRAGMA ignore_check_constraints = OFF",
)
ORPHAN = "INSERT INTO steps (task_seq, kind, name, attempt, value, saved_at) VALUES (999, 'checkpoint', '', 1, '1', '')"


def with_statements(monkeypatch: pytest.MonkeyPatch, *statements: str) -> None:
    """Let the newest revision run statements of its own before the others."""
    revisions.shapes()
    execute = Operations.execute
    left = list(statements)

    def with_more(self: Operations, sql: Any, **options: Any) -> None:
        while left:
            execute(self, left.pop(0), **options)
        execute(self, sql, **options)

    monkeypatch.setattr(Operations, "execute", with_more)


@pytest.mark.parametrize(
    ("statements", "told"),
    [
        ((ORPHAN,), r"rows without parents \(steps .*without its tasks\)"),
        (UNSOUND, "CHECK constraint failed in handles"),
    ],
    ids=["foreign_key_check", "integrity_check"],
)
def test_a_revision_that_would_leave_the_file_damaged_changes_nothing(
    oldest: Path, monkeypatch: pytest.MonkeyPatch, statements: tuple[str, ...], told: str
) -> None:
    with_statements(monkeypatch, *statements)
    before, was = contents(oldest), objects(oldest)

    with pytest.raises(SchemaError, match=f"the revision would leave it damaged: .*{told}"):
        migrate.upgrade(oldest)

    assert (contents(oldest), objects(oldest), migrate.current(oldest)) == (before, was, OLD[0])
    assert not backups(oldest)


@pytest.mark.parametrize(
    "statements",
    [(ORPHAN,), UNSOUND],
    ids=["foreign_key_check", "integrity_check"],
)
def test_a_file_damaged_before_is_not_upgraded_and_says_so(oldest: Path, statements: tuple[str, ...]) -> None:
    change(oldest, *statements)
    before = bytes_of(oldest)

    with pytest.raises(StorageCorrupt, match=r"was damaged before: .*nothing was changed"):
        migrate.upgrade(oldest)

    assert bytes_of(oldest) == before
    assert not backups(oldest)


@pytest.mark.long
def test_what_is_killed_in_an_upgrade_leaves_no_copy_that_the_next_one_keeps(oldest: Path, spawn: Any) -> None:
    before = contents(oldest)
    for beginning in ("ALTER TABLE", "CREATE VIEW"):
        killed = spawn(DIES_IN_THE_MIDDLE, oldest, "up", beginning, "after")
        assert killed.wait(timeout=30) == -signal.SIGKILL
        assert (contents(oldest), migrate.current(oldest)) == (before, OLD[0])
        assert backups(oldest) == [f"{oldest.name}-backup-making"]

    migrate.upgrade(oldest)

    assert contents(oldest, before) == before
    assert backups(oldest) == [f"{oldest.name}-{OLD[0]}.backup"]
    check_file(oldest)


# --- what programs added --------------------------------------------------------------------------------------------

ADDED = (
    "CREATE TABLE mine (n INTEGER, task_seq INTEGER)",
    "CREATE VIEW my_live AS SELECT id, state, done FROM live_tasks",
    "CREATE VIEW my_all AS SELECT * FROM tasks",
    "CREATE VIEW my_broken AS SELECT nonesuch FROM nowhere",
    "CREATE INDEX my_states ON tasks (state, id)",
    "CREATE TRIGGER my_steps AFTER INSERT ON steps BEGIN INSERT INTO mine VALUES (1, NEW.task_seq); END",
    "CREATE TRIGGER my_tasks AFTER UPDATE OF state ON tasks BEGIN INSERT INTO mine SELECT 2, task_seq FROM live_tasks; END",
    "CREATE TRIGGER my_view INSTEAD OF INSERT ON my_live BEGIN INSERT INTO mine VALUES (3, NEW.id); END",
)


def added(path: Path) -> dict[tuple[str, str], str]:
    return {key: sql for key, sql in objects(path).items() if key[1].startswith("my")}


@pytest.mark.long
def test_what_programs_added_to_a_file_goes_up_and_down_with_it(old: Path) -> None:
    revision = str(migrate.current(old))
    change(old, *ADDED)
    before, rows = added(old), contents(old)

    migrate.upgrade(old)
    assert (added(old), contents(old, rows)) == (before, {table: kept for table, kept in rows.items() if kept})
    migrate.downgrade(old, revision)

    assert (added(old), contents(old)) == (before, rows)
    # what fires on rows of ours did not fire on what revisions did to them
    assert rows["mine"] == []


NEEDS_WHAT_GOES = {
    "my_view": "CREATE VIEW my_view AS SELECT deadline FROM tasks",
    "my_index": "CREATE INDEX my_index ON tasks (deadline)",
    "my_trigger": "CREATE TRIGGER my_trigger AFTER UPDATE ON tasks BEGIN SELECT NEW.deadline; END",
    "my_signals": "CREATE TRIGGER my_signals AFTER INSERT ON signals BEGIN SELECT 1; END",
}


@pytest.mark.long
@pytest.mark.parametrize("name", NEEDS_WHAT_GOES)
def test_a_downgrade_that_would_break_what_a_program_added_names_it_and_changes_nothing(
    newest: Path, name: str
) -> None:
    change(newest, NEEDS_WHAT_GOES[name])
    before, was = contents(newest), objects(newest)

    with pytest.raises(SchemaError, match=f"'{name}', which a program added, would not work any more .*drop it first"):
        migrate.downgrade(newest, "0002")

    assert (contents(newest), objects(newest), migrate.current(newest)) == (before, was, schema.HEAD)
    assert not backups(newest)
    migrate.downgrade(newest, "0003")
    assert name in {key[1] for key in objects(newest)}


def test_a_table_of_a_program_in_the_way_of_a_revision_is_named(oldest: Path) -> None:
    change(oldest, "CREATE TABLE signals (mine TEXT)")
    before, was = contents(oldest), objects(oldest)

    with pytest.raises(SchemaError, match=r"table signals already exists.*nothing was changed"):
        migrate.upgrade(oldest)

    assert (contents(oldest), objects(oldest), migrate.current(oldest)) == (before, was, OLD[0])


# --- down, with data, and what it loses -----------------------------------------------------------------------------


def gone(before: dict[str, Any], after: dict[str, Any], shape: revisions.Shape) -> set[rehearsal.Loss]:
    """Return what is lost between the contents of a file and those after, found row by row."""
    with closing(sqlite3.connect(":memory:")) as memory:
        empty = {
            (table, column): memory.execute(f"SELECT {default}").fetchone()[0]
            for table, columns in shape.columns.items()
            for column, default in columns.items()
        }
    found = {rehearsal.Loss(table, None, len(rows) - len(after.get(table, ()))) for table, rows in before.items()}
    for table, rows in before.items():
        left = [dict(row) for row in after.get(table, ())]
        for column in rows[0] if rows and left else ():
            if column not in left[0]:
                # a row that stays is found by all it has left
                stays = [row for row in rows if {name: row[name] for name in left[0]} in left]
                found.add(rehearsal.Loss(table, column, sum(row[column] != empty[table, column] for row in stays)))
    return {loss for loss in found if loss.rows}


@pytest.mark.long
@pytest.mark.parametrize("target", KNOWN[:-1])
def test_a_downgrade_from_head_loses_what_was_said_and_nothing_else(newest: Path, newborn: Path, target: str) -> None:
    before, said = contents(newest), rehearsal.losses(newest, target)
    fresh = Path(shutil.copy(newborn, newest.with_name("fresh.db")))

    migrate.downgrade(newest, target)
    migrate.downgrade(fresh, target)

    after = contents(newest)
    assert set(said) == gone(before, after, revisions.shape(schema.HEAD))
    assert objects_of_ours(newest) == objects(fresh)
    assert len(after["tasks"]) == len(before["tasks"])
    migrate.upgrade(newest)
    assert contents(newest, after) == after
    assert objects_of_ours(newest) == objects(newborn)


def test_a_downgrade_of_a_file_without_rows_loses_nothing(path: Path) -> None:
    assert rehearsal.losses(path, KNOWN[0]) == []


def test_every_downgrade_but_the_first_says_what_it_takes_away() -> None:
    assert [script.revision for script in revisions.known() if not script.undoing] == KNOWN[:1]


# --- the statements -------------------------------------------------------------------------------------------------


def through_the_shell(path: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Give the script to the real shell, as a person would."""
    found = shutil.which("sqlite3")
    if found is None:
        pytest.skip("no sqlite3 shell on this machine")
    return subprocess.run([found, str(path)], input=script, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.long
def test_the_printed_statements_do_in_the_shell_what_an_upgrade_does(old: Path) -> None:
    change(old, *ADDED)
    by_hand = Path(shutil.copy(old, old.with_name("by-hand.db")))
    before = bytes_of(old)
    script = rehearsal.script(old, schema.HEAD)
    assert bytes_of(old) == before

    done = through_the_shell(by_hand, script)
    migrate.upgrade(old)

    assert (done.returncode, done.stderr) == (0, "")
    assert (objects(by_hand), contents(by_hand)) == (objects(old), contents(old))
    assert migrate.current(by_hand) == schema.HEAD


@pytest.mark.long
@pytest.mark.parametrize("target", [revisions.BASE, *KNOWN[:-1]])
def test_the_printed_statements_do_in_the_shell_what_a_downgrade_does(newest: Path, target: str) -> None:
    by_hand = Path(shutil.copy(newest, newest.with_name("by-hand.db")))

    done = through_the_shell(by_hand, rehearsal.script(newest, target))
    migrate.downgrade(newest, target)

    assert (done.returncode, done.stderr) == (0, "")
    assert (objects(by_hand), contents(by_hand)) == (objects(newest), contents(newest))
    assert migrate.current(by_hand) == migrate.current(newest)


def test_the_printed_statements_make_a_store_of_one_without_tables(path: Path) -> None:
    head = objects(path)
    migrate.downgrade(path, revisions.BASE)

    done = through_the_shell(path, rehearsal.script(path, schema.HEAD))

    assert (done.returncode, done.stderr, objects(path)) == (0, "", head)


@pytest.mark.parametrize(
    ("statements", "why"),
    [
        ((f"UPDATE {schema.VERSION_TABLE} SET version_num = '0000'",), "the_file_is_at_0001"),
        ((ORPHAN,), "rows_have_their_parents"),
        (UNSOUND, "the_file_is_sound"),
    ],
)
def test_the_printed_statements_refuse_a_file_that_is_not_as_it_should_be(
    oldest: Path, statements: tuple[str, ...], why: str
) -> None:
    script = rehearsal.script(oldest, schema.HEAD)
    change(oldest, *statements)
    before, was = contents(oldest), objects(oldest)

    done = through_the_shell(oldest, script)

    assert done.returncode != 0
    assert f"CHECK constraint failed: {why}" in done.stderr
    assert (contents(oldest), objects(oldest)) == (before, was)


def test_statements_of_a_file_that_is_there_already_are_none(path: Path) -> None:
    assert rehearsal.statements(path, schema.HEAD) == []
    assert rehearsal.script(path, schema.HEAD) == f"-- already at revision {schema.HEAD}\n"
