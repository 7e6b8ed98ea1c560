"""Rules of the file's schema: one in every way it is made, and strict against whoever writes."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.operations import Operations
from sqlalchemy import Float, Integer

from lash_store import (
    births,
    database,
    families,
    lifecycle,
    migrate,
    queries,
    retention,
    retention_queries,
    schema,
    session_queries,
    step_queries,
    transaction,
)
from lash_store.births import NewTask
from lash_store.errors import StorageError, StorageFull, StoreError
from lash_store.identity import TABLES
from lash_store.models import (
    CancelPolicy,
    ClosePolicy,
    EventType,
    HandleRole,
    OwnerEnd,
    Recovery,
    Scope,
    StepState,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskState,
)
from lash_store.retention_models import Retention
from lash_store.transaction import Transaction

REPOSITORY = Path(__file__).parents[2]
AT = "2024-05-01T10:00:00.000Z"
SESSION = {"scope": "desktop:s2", "runtime": "desktop", "session_id": "s2", "opened_at": AT}
NOTE = {"scope": "desktop:s1", "key": "k", "task_seq": 1, "task_id": "index", "text": "", "data": "{}", "posted_at": AT}

Insert = Callable[..., int]


def objects(path: Path) -> dict[tuple[str, str], str]:
    """Return every object of a file by kind and name, its SQL without regard to white space."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT type, name, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'").fetchall()
    return {(kind, name): re.sub(r"\s+", "", sql) for kind, name, sql in rows}


def alembic(*arguments: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        timeout=60,
    )


# --- one schema -----------------------------------------------------------------------------------------------------


@pytest.fixture
def expected(tmp_path: Path) -> dict[tuple[str, str], str]:
    """What `schema.py` says, and the version table."""
    made = tmp_path / "by-statements.db"
    with closing(sqlite3.connect(made)) as connection:
        for statement in schema.create_statements():
            connection.execute(statement)
        connection.execute(
            f"CREATE TABLE {schema.VERSION_TABLE} (version_num TEXT NOT NULL PRIMARY KEY) STRICT"
        ).fetchall()
    return objects(made)


def test_a_new_file_has_the_schema_the_code_names(path: Path, expected: dict[tuple[str, str], str]) -> None:
    assert objects(path) == expected


@pytest.mark.long
def test_alembic_from_the_repository_makes_the_same_schema(
    tmp_path: Path, expected: dict[tuple[str, str], str]
) -> None:
    made = tmp_path / "by-alembic.db"

    alembic("-x", f"db={made}", "upgrade", "head")

    assert objects(made) == expected
    assert migrate.current(made) == schema.HEAD


def test_alembic_finds_the_file_by_its_url(tmp_path: Path, expected: dict[tuple[str, str], str]) -> None:
    made = tmp_path / "by-url.db"
    config = Config(REPOSITORY / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{made}")

    command.upgrade(config, "head")

    assert objects(made) == expected


@pytest.mark.long
def test_a_file_alembic_made_is_born_like_any_other(tmp_path: Path) -> None:
    made = tmp_path / "by-alembic.db"

    alembic("upgrade", "head", LASH_STORE_DB=str(made))

    with closing(sqlite3.connect(made)) as connection:
        assert pragmas(connection) == (2, schema.APPLICATION_ID, "wal")
    assert stat.S_IMODE(made.stat().st_mode) == 0o600


def test_alembic_sees_no_difference_between_file_and_code(path: Path) -> None:
    config = Config(REPOSITORY / "alembic.ini")
    config.set_main_option("sqlalchemy.url", f"sqlite:///{path}")

    command.check(config)


def test_the_tables_a_file_is_known_by_are_those_of_the_schema() -> None:
    assert {*schema.metadata.tables, schema.VERSION_TABLE} == TABLES


def test_the_head_the_code_names_is_the_migrations_head() -> None:
    assert migrate.head() == schema.HEAD


def test_preparing_a_file_at_head_changes_nothing(path: Path) -> None:
    before = path.read_bytes()

    migrate.prepare(path)

    assert path.read_bytes() == before


def test_every_table_is_strict(raw: sqlite3.Connection) -> None:
    rows = raw.execute("SELECT name, strict FROM pragma_table_list WHERE schema = 'main' AND type = 'table'").fetchall()
    strict = {name: bool(is_strict) for name, is_strict in rows if not name.startswith("sqlite_")}

    assert strict == dict.fromkeys([*schema.metadata.tables, schema.VERSION_TABLE], True)


def test_a_task_has_the_columns_of_its_table_in_order(raw: sqlite3.Connection) -> None:
    columns = [name for (name,) in raw.execute("SELECT name FROM pragma_table_info('tasks') ORDER BY cid")]

    assert columns == list(lifecycle.Task._fields)


def test_an_event_has_the_columns_of_its_table_in_order(raw: sqlite3.Connection) -> None:
    columns = [name for (name,) in raw.execute("SELECT name FROM pragma_table_info('events') ORDER BY cid")]

    assert columns == list(transaction.Committed._fields[: len(columns)])


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("tasks", "state", TaskState),
        ("tasks", "kind", TaskKind),
        ("tasks", "mode", TaskMode),
        ("tasks", "recovery", Recovery),
        ("tasks", "cancel_policy", CancelPolicy),
        ("tasks", "close_policy", ClosePolicy),
        ("events", "type", EventType),
        ("handles", "role", HandleRole),
        ("steps", "state", StepState),
        ("owners", "end", OwnerEnd),
    ],
)
def test_a_check_in_the_file_names_the_words_python_has(
    path: Path, table: str, column: str, words: type[StrEnum]
) -> None:
    sql = objects(path)["table", table]
    check = re.search(rf"CONSTRAINT{table}_{column}CHECK\((.*?)\)", sql)

    assert check is not None
    assert set(re.findall(r"'(\w+)'", check[1])) == set(words)


def test_a_new_row_has_what_the_fold_of_its_events_takes_for_granted(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    names = ", ".join(lifecycle.DEFAULTS)

    task_seq = insert(filled, "tasks", task_row)

    found = filled.execute(f"SELECT {names} FROM tasks WHERE task_seq = ?", (task_seq,)).fetchone()
    assert found == tuple(lifecycle.DEFAULTS.values())


@pytest.mark.parametrize("table", ["sessions", "owners", "tasks", "events", "handles", "inbox", "handoffs", "signals"])
def test_a_number_that_is_a_cursor_is_never_used_again(path: Path, table: str) -> None:
    assert "AUTOINCREMENT" in objects(path)["table", table]


@pytest.mark.parametrize("view", ["live_tasks", "task_history", "recent_failures", "session_summary", "live_monitors"])
def test_a_view_for_the_shell_can_be_read(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], view: str
) -> None:
    insert(filled, "tasks", task_row)

    filled.execute(f"SELECT * FROM {view}").fetchall()


def test_the_view_of_live_tasks_shows_families(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    parent = insert(filled, "tasks", {**task_row, "child_session_id": "s9"})
    insert(filled, "tasks", {**task_row, "id": "child", "parent_seq": parent})

    shown = filled.execute("SELECT id, parent_seq, child_session_id FROM live_tasks").fetchall()

    assert shown == [("index", None, "s9"), ("child", parent, None)]


def test_the_view_of_live_tasks_shows_what_each_waits_for(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    insert(filled, "tasks", {**task_row, "state": "waiting", "waiting_for": "signal 'go'", "deadline": AT})
    insert(filled, "tasks", {**task_row, "id": "again", "state": "pending", "not_before": AT})
    insert(filled, "tasks", {**task_row, "id": "over", **ENDINGS["cancelled"], "completed_at": AT})

    shown = filled.execute("SELECT id, state, waiting_for, not_before, deadline FROM live_tasks").fetchall()

    assert shown == [("index", "waiting", "signal 'go'", None, AT), ("again", "pending", None, AT, None)]


def test_the_view_of_sessions_shows_their_parent_and_what_is_unread(
    filled: sqlite3.Connection, insert: Insert, task_seq: int
) -> None:
    insert(filled, "sessions", {**SESSION, "parent": "desktop:s1"})
    note = {**NOTE, "task_seq": task_seq}
    insert(filled, "inbox", note)
    insert(filled, "inbox", {**note, "key": "read", "acknowledged_at": AT})
    insert(filled, "inbox", {**note, "key": "elsewhere", "scope": "desktop:s2"})
    insert(filled, "inbox", {**note, "key": "elsewhere too", "scope": "desktop:s2"})

    shown = filled.execute("SELECT scope, parent, live, unread_notes FROM session_summary").fetchall()

    assert shown == [("desktop:s1", None, 1, 1), ("desktop:s2", "desktop:s1", 0, 2)]


# --- the file's birth -----------------------------------------------------------------------------------------------


def pragmas(connection: sqlite3.Connection) -> tuple[Any, ...]:
    names = "auto_vacuum", "application_id", "journal_mode"
    return tuple(connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names)


def test_a_file_is_born_with_incremental_vacuum_our_id_and_wal(raw: sqlite3.Connection) -> None:
    assert pragmas(raw) == (2, 0x6C617368, "wal")


def test_nobody_else_may_read_the_file_or_what_stands_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    before = os.umask(0)
    try:
        migrate.prepare(path)
        with closing(database.open_sqlite(path, "write")) as connection:
            connection.execute("INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES ('a:b','a','b','')")
            found = {name: stat.S_IMODE(Path(f"{path}{name}").stat().st_mode) for name in ("", "-wal", "-shm")}
    finally:
        os.umask(before)

    assert found == {"": 0o600, "-wal": 0o600, "-shm": 0o600}


def test_a_file_others_may_read_is_made_private(path: Path) -> None:
    path.chmod(0o644)

    migrate.prepare(path)

    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_a_reader_left_beside_a_file_others_could_read_is_made_private_too(path: Path) -> None:
    path.chmod(0o644)
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as reader:
        reader.execute("SELECT count(*) FROM tasks").fetchall()
    sides = [Path(f"{path}-wal"), Path(f"{path}-shm")]
    assert [stat.S_IMODE(side.stat().st_mode) for side in sides] == [0o644, 0o644]

    migrate.prepare(path)

    assert [stat.S_IMODE(side.stat().st_mode) for side in sides if side.exists()] in ([], [0o600], [0o600, 0o600])


# --- up and down ----------------------------------------------------------------------------------------------------


def test_a_file_goes_down_to_nothing_and_up_again(path: Path) -> None:
    head = objects(path)

    migrate.downgrade(path, "base")
    assert set(objects(path)) == {("table", schema.VERSION_TABLE)}
    assert migrate.current(path) is None

    migrate.upgrade(path)
    assert objects(path) == head
    assert migrate.current(path) == schema.HEAD


def test_a_file_at_base_is_prepared_to_head(path: Path) -> None:
    head = objects(path)
    migrate.downgrade(path, "base")

    migrate.prepare(path)

    assert objects(path) == head


def test_a_revision_that_fails_in_the_middle_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.downgrade(path, "base")
    before = objects(path)
    run_before(monkeypatch, "CREATE TABLE handles", "SELECT nonesuch FROM nowhere")

    with pytest.raises(StoreError):
        migrate.upgrade(path)

    assert objects(path) == before
    assert migrate.current(path) is None
    monkeypatch.undo()
    migrate.upgrade(path)
    assert migrate.current(path) == schema.HEAD


def run_before(monkeypatch: pytest.MonkeyPatch, beginning: str, statement: str) -> None:
    """Run a statement before the one of the migrations that begins so."""
    execute = Operations.execute

    def with_another(self: Operations, sql: Any, **options: Any) -> None:
        if str(sql).startswith(beginning):
            execute(self, statement, **options)
        execute(self, sql, **options)

    monkeypatch.setattr(Operations, "execute", with_another)


def test_a_disk_that_is_full_in_an_upgrade_is_named_and_leaves_the_file_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.downgrade(path, "base")
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("VACUUM")
    before = objects(path)
    run_before(monkeypatch, "CREATE TABLE owners", "PRAGMA max_page_count=8")

    with pytest.raises(StorageFull):
        migrate.upgrade(path)

    assert objects(path) == before


def test_a_revision_that_leaves_rows_without_parents_is_not_committed(
    filled: sqlite3.Connection, path: Path, insert: Insert, task_row: dict[str, Any]
) -> None:
    insert(filled, "tasks", task_row)

    with pytest.raises(StoreError, match="parents"), migrate.transaction(path) as connection:
        connection.exec_driver_sql("DELETE FROM owners")

    assert filled.execute("SELECT count(*) FROM owners").fetchone() == (1,)


DIES_IN_THE_MIDDLE = """
    import os, signal, sys
    from pathlib import Path
    from alembic.operations import Operations
    from lash_store import migrate

    execute = Operations.execute

    def replaced(self, sql, **options):
        if str(sql).startswith("CREATE TABLE handles"):
            os.kill(os.getpid(), signal.SIGKILL)
        execute(self, sql, **options)

    Operations.execute = replaced
    migrate.prepare(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("begun", ["nothing", "a file at base"])
def test_a_process_killed_in_an_upgrade_leaves_the_old_revision(tmp_path: Path, spawn: Any, begun: str) -> None:
    path = tmp_path / "agent.db"
    if begun == "a file at base":
        migrate.prepare(path)
        migrate.downgrade(path, "base")
    before = objects(path) if path.exists() else {}

    killed = spawn(DIES_IN_THE_MIDDLE, path)
    assert killed.wait(timeout=30) == -signal.SIGKILL

    assert objects(path) == before
    migrate.prepare(path)
    assert migrate.current(path) == schema.HEAD


PREPARES = """
    import sys
    from pathlib import Path
    from lash_store import migrate
    import alembic.command, sqlalchemy

    print("ready", flush=True)
    sys.stdin.readline()
    migrate.prepare(Path(sys.argv[1]))
    print(migrate.current(Path(sys.argv[1])))
"""


def test_several_processes_may_make_the_same_file_at_once(tmp_path: Path, spawn: Any) -> None:
    path = tmp_path / "agent.db"
    processes = [spawn(PREPARES, path) for _ in range(5)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"

    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60) for process in processes]

    assert ended == [(f"{schema.HEAD}\n", "")] * 5


# --- what the file refuses, whoever writes --------------------------------------------------------------------------

ENDINGS: dict[str, dict[str, Any]] = {
    "completed": {"state": "completed", "result": "1"},
    "failed": {"state": "failed", "failure": '{"type":"E","message":"m","traceback":null}'},
    "cancelled": {"state": "cancelled", "cancel_reason": "enough", "cancel_requested_at": AT},
    "abandoned": {"state": "abandoned", "evidence": '{"owner_id":1}'},
}


@pytest.mark.parametrize("change", sorted(ENDINGS))
@pytest.mark.parametrize("state", sorted(ENDINGS))
def test_a_finished_task_keeps_its_outcome_whoever_writes(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], state: str, change: str
) -> None:
    insert(filled, "tasks", {**task_row, **ENDINGS[state], "completed_at": AT})
    outcome = {"result": None, "failure": None, "evidence": None, **ENDINGS[change]}
    if state == change:
        outcome["state"] = "running"
        outcome["completed_at"] = None

    with pytest.raises(sqlite3.IntegrityError):
        filled.execute(f"UPDATE tasks SET {', '.join(f'{name} = :{name}' for name in outcome)}", outcome)


@pytest.mark.parametrize(
    ("state", "edit"),
    [
        ("completed", "result = '2'"),
        ("failed", "failure = '{}'"),
        ("abandoned", "evidence = '{}'"),
        ("cancelled", "cancel_reason = 'another'"),
        ("cancelled", "completed_at = '2030-01-01T00:00:00.000Z'"),
        ("cancelled", "attempt = attempt + 1"),
        ("completed", "state = 'running', completed_at = NULL, result = NULL"),
    ],
)
def test_no_part_of_an_outcome_is_edited(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], state: str, edit: str
) -> None:
    insert(filled, "tasks", {**task_row, **ENDINGS[state], "completed_at": AT})

    with pytest.raises(sqlite3.IntegrityError, match="keeps its outcome"):
        filled.execute(f"UPDATE tasks SET {edit}")


@pytest.mark.parametrize("column", [column.name for column in schema.tasks.c if column.name != "scope"])
def test_no_column_of_a_finished_task_is_edited_but_its_session(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], column: str
) -> None:
    insert(filled, "tasks", {**task_row, **ENDINGS["cancelled"], "completed_at": AT})
    kind = {item.name: item.type for item in schema.tasks.c}[column]

    with pytest.raises(sqlite3.IntegrityError):
        filled.execute(f"UPDATE tasks SET {column} = ?", [77 if isinstance(kind, Integer | Float) else '"another"'])


def test_a_finished_task_may_change_its_session(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    insert(filled, "sessions", SESSION)
    insert(filled, "tasks", {**task_row, **ENDINGS["completed"], "completed_at": AT})

    filled.execute("UPDATE tasks SET scope = 'desktop:s2'")

    assert filled.execute("SELECT scope FROM tasks").fetchone() == ("desktop:s2",)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "sleeping"},
        {"kind": "chore"},
        {"mode": "magic"},
        {"recovery": "maybe"},
        {"cancel_policy": "never"},
        {"arguments": "{"},
        {"arguments": "NaN"},
        {"owner_id": None},
        {"attempt": 0},
        {"attempt": -1},
        {"attempts_spent": 2},
        {"attempts_spent": -1},
        {"max_attempts": 0},
        {"attempt": "one"},
        {"close_policy": "maybe"},
        {"close_policy": None},
        {"notify_on_end": 2},
        {"notify_on_end": None},
        {"has_callback": -1},
        {"callback_error": "{"},
        {"fraction": 1.5},
        {"fraction": -0.5},
        {"state": "waiting", "owner_id": None},
        {"state": "cancel_requested"},
        {"state": "completed", "result": "1"},
        {"completed_at": AT},
        {"state": "completed", "completed_at": AT},
        {"state": "failed", "completed_at": AT},
        {"state": "abandoned", "completed_at": AT},
        {"result": "1"},
        {"failure": "{}"},
        {"evidence": "{}"},
        {"state": "cancelled", "completed_at": AT, "result": "1"},
        {"state": "completed", "completed_at": AT, "result": "not json"},
        {"mode": "external"},
        {"recovery": "external"},
        {"label": None},
        {"timeout": 0.0},
        {"timeout": -1.0},
        {"timeout": "soon"},
        {"not_before": AT},
        {"state": "waiting", "not_before": AT},
        {"state": "cancelled", "completed_at": AT, "not_before": AT},
        {"waiting_for": "signal 'go'"},
        {"state": "pending", "waiting_for": "signal 'go'"},
        {"state": "cancelled", "completed_at": AT, "waiting_for": "signal 'go'"},
        {"last_error": "{"},
        {"last_error": "NaN"},
        {"deadline": b"soon"},
        {"version": b"2"},
    ],
    ids=repr,
)
def test_the_file_refuses_a_row_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "tasks", {**task_row, **change})
    insert(filled, "tasks", task_row)


@pytest.mark.parametrize(
    "change",
    [
        {"state": "pending", "not_before": AT, "last_error": "{}"},
        {"state": "waiting", "waiting_for": "signal 'go'"},
        {"timeout": 0.001, "deadline": AT, "version": "2"},
        {"state": "completed", "result": "1", "completed_at": AT, "last_error": "{}", "deadline": AT, "timeout": 1.0},
    ],
    ids=repr,
)
def test_the_file_takes_a_row_that_waits_or_was_tried_again(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], change: dict[str, Any]
) -> None:
    insert(filled, "tasks", {**task_row, **change})


@pytest.mark.parametrize("column", ["version", "timeout", "deadline", "not_before", "last_error", "waiting_for"])
@pytest.mark.parametrize("state", sorted(ENDINGS))
def test_what_a_finished_task_waited_for_and_was_given_is_kept_whoever_writes(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], state: str, column: str
) -> None:
    given = {"version": "1", "timeout": 2.5, "deadline": AT, "last_error": "{}"}
    insert(filled, "tasks", {**task_row, **given, **ENDINGS[state], "completed_at": AT})

    for value in (7.5 if column == "timeout" else "[]", None if column in given else "x"):
        with pytest.raises(sqlite3.IntegrityError, match="keeps its outcome"):
            filled.execute(f"UPDATE tasks SET {column} = ?", [value])


def test_one_id_has_one_live_task_in_a_session(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    insert(filled, "tasks", {**task_row, **ENDINGS["completed"], "completed_at": AT})
    insert(filled, "tasks", task_row)

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "tasks", task_row)


@pytest.mark.parametrize(
    "session",
    [
        {"scope": "a:b", "runtime": "a", "session_id": "c"},
        {"scope": "a:b:c", "runtime": "a:b", "session_id": "c"},
        {"scope": "desktop:s1", "runtime": "desktop", "session_id": "s1"},
        {"scope": "desktop:s2", "runtime": "desktop", "session_id": "s2", "sync_needed": 2},
        {"scope": "desktop:s2", "runtime": "desktop", "session_id": "s2", "inbox_claim": "o-1"},
    ],
    ids=repr,
)
def test_a_sessions_scope_is_its_two_parts_and_stands_once(
    filled: sqlite3.Connection, insert: Insert, session: dict[str, str]
) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "sessions", {**session, "opened_at": AT})


@pytest.mark.parametrize(
    "edit",
    ["ended_at = '2024-05-01'", "\"end\" = 'died'", "\"end\" = 'vanished', ended_at = '2024-05-01'"],
)
def test_an_owner_has_ended_at_a_time_and_in_a_known_way(filled: sqlite3.Connection, edit: str) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        filled.execute(f"UPDATE owners SET {edit}")


def event(task_seq: int | None, kind: str, **changed: Any) -> dict[str, Any]:
    task_id = None if task_seq is None else "index"
    told = {"task_seq": task_seq, "task_id": task_id, "scope": "desktop:s1", "attempt": 1}
    return {**told, "type": kind, "at": AT, "data": "{}", **changed}


@pytest.fixture
def task_seq(filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]) -> int:
    return insert(filled, "tasks", task_row)


@pytest.mark.parametrize(
    "edit", ["data = '{\"a\":1}'", "type = 'failed'", "at = '2030-01-01'", "seq = 99", "scope = 'a:b'"]
)
def test_events_are_never_changed(filled: sqlite3.Connection, insert: Insert, task_seq: int, edit: str) -> None:
    insert(filled, "events", event(task_seq, "started"))

    with pytest.raises(sqlite3.IntegrityError, match="never changed"):
        filled.execute(f"UPDATE events SET {edit}")


@pytest.mark.parametrize("second", ["completed", "failed", "cancelled", "abandoned"])
def test_a_task_has_at_most_one_terminal_event(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, second: str
) -> None:
    insert(filled, "events", event(task_seq, "completed"))
    insert(filled, "events", event(task_seq, "transferred"))

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "events", event(task_seq, second))


@pytest.mark.parametrize(
    "change", [{"type": "exploded"}, {"data": "{"}, {"data": None}, {"task_id": None}, {"task_seq": None}], ids=repr
)
def test_the_file_refuses_an_event_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, change: dict[str, Any]
) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "events", {**event(task_seq, "started"), **change})


def test_a_live_task_cannot_be_deleted(filled: sqlite3.Connection, task_seq: int) -> None:
    with pytest.raises(sqlite3.IntegrityError, match="live task"):
        filled.execute("DELETE FROM tasks WHERE task_seq = ?", (task_seq,))


def test_a_finished_task_can_be_deleted(filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]) -> None:
    insert(filled, "tasks", {**task_row, **ENDINGS["failed"], "completed_at": AT})

    filled.execute("DELETE FROM tasks")

    assert filled.execute("SELECT count(*) FROM tasks").fetchone() == (0,)


def test_a_task_has_one_owning_handle(filled: sqlite3.Connection, insert: Insert, task_seq: int) -> None:
    handle = {"scope": "desktop:s1", "task_seq": task_seq, "created_at": AT}
    insert(filled, "handles", {**handle, "handle_id": "h-1", "role": "owner"})
    insert(filled, "handles", {**handle, "handle_id": "h-2", "role": "observer"})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "handles", {**handle, "handle_id": "h-3", "role": "owner"})


def test_a_session_observes_a_task_through_one_handle(
    filled: sqlite3.Connection, insert: Insert, task_seq: int
) -> None:
    handle = {"scope": "desktop:s2", "task_seq": task_seq, "created_at": AT, "role": "observer"}
    insert(filled, "sessions", SESSION)
    insert(filled, "handles", {**handle, "handle_id": "h-1"})
    insert(filled, "handles", {**handle, "handle_id": "h-2", "scope": "desktop:s1"})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "handles", {**handle, "handle_id": "h-3"})


def test_a_task_says_one_thing_once(filled: sqlite3.Connection, insert: Insert, task_seq: int) -> None:
    note = {**NOTE, "task_seq": task_seq, "key": f"end:{task_seq}"}
    insert(filled, "inbox", note)

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "inbox", {**note, "scope": "desktop:s2", "acknowledged_at": AT})


@pytest.mark.parametrize("change", [{"data": "{"}, {"data": None}, {"text": None}, {"key": None}], ids=repr)
def test_the_file_refuses_a_note_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, change: dict[str, Any]
) -> None:
    note = {**NOTE, "task_seq": task_seq}

    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "inbox", {**note, **change})
    insert(filled, "inbox", note)


HANDOFF = {
    "handoff_id": "ho-1",
    "is_named": 1,
    "source": "desktop:s1",
    "destination": "desktop:s2",
    "kept": "[]",
    "moved": "[]",
    "cancelled": "[]",
    "at": AT,
}


@pytest.mark.parametrize(
    "change", [{"is_named": 2}, {"kept": "["}, {"moved": "["}, {"cancelled": "["}, {"handoff_id": None}], ids=repr
)
def test_the_file_refuses_a_handoff_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, change: dict[str, Any]
) -> None:
    insert(filled, "sessions", SESSION)

    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "handoffs", {**HANDOFF, **change})
    insert(filled, "handoffs", HANDOFF)


def test_an_id_of_a_session_names_one_handoff(filled: sqlite3.Connection, insert: Insert) -> None:
    insert(filled, "sessions", SESSION)
    insert(filled, "sessions", {**SESSION, "scope": "desktop:s3", "session_id": "s3"})
    insert(filled, "handoffs", HANDOFF)
    insert(filled, "handoffs", {**HANDOFF, "source": "desktop:s2", "destination": "desktop:s1"})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "handoffs", {**HANDOFF, "destination": "desktop:s3"})


def test_two_sessions_have_one_handoff_without_a_name_and_any_number_with(
    filled: sqlite3.Connection, insert: Insert
) -> None:
    insert(filled, "sessions", SESSION)
    for number in range(2):
        insert(filled, "handoffs", {**HANDOFF, "handoff_id": f"named-{number}"})
    insert(filled, "handoffs", {**HANDOFF, "handoff_id": "generated", "is_named": 0})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "handoffs", {**HANDOFF, "handoff_id": "generated too", "is_named": 0})


STEP = {"kind": "step", "name": "fetch", "attempt": 1, "value": "1", "saved_at": AT}


@pytest.mark.parametrize(
    "change",
    [
        {"value": "NaN"},
        {"value": None},
        {"state": "over"},
        {"state": None},
        {"tries": -1},
        {"tries": None},
        {"tries": "many"},
        {"failure": "{"},
        {"kind": None},
        {"name": None},
        {"attempt": None},
        {"saved_at": None},
        {"begun_at": b"now"},
    ],
    ids=repr,
)
def test_the_file_refuses_a_step_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, change: dict[str, Any]
) -> None:
    step = {**STEP, "task_seq": task_seq}

    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "steps", {**step, **change})
    insert(filled, "steps", step)


def test_a_step_that_says_no_more_is_done_at_the_first_try(
    filled: sqlite3.Connection, insert: Insert, task_seq: int
) -> None:
    insert(filled, "steps", {**STEP, "task_seq": task_seq})

    found = filled.execute("SELECT state, tries, failure, begun_at, wake_at FROM steps").fetchone()
    assert found == ("done", 1, None, None, None)


def test_a_task_remembers_a_name_once_of_each_kind(filled: sqlite3.Connection, insert: Insert, task_seq: int) -> None:
    step = {**STEP, "task_seq": task_seq}
    insert(filled, "steps", step)
    insert(filled, "steps", {**step, "kind": "sleep"})
    insert(filled, "steps", {**step, "name": "store"})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "steps", {**step, "attempt": 2, "value": "2"})


SIGNAL = {"name": "go", "payload": "1", "sent_at": AT, "sent_by": "me"}


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "{"},
        {"payload": "NaN"},
        {"payload": None},
        {"name": None},
        {"sent_at": None},
        {"sent_by": None},
        {"task_seq": None},
        {"taken_attempt": "one"},
    ],
    ids=repr,
)
def test_the_file_refuses_a_signal_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, change: dict[str, Any]
) -> None:
    signal = {**SIGNAL, "task_seq": task_seq}

    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "signals", {**signal, **change})
    insert(filled, "signals", signal)


def test_a_key_sends_a_task_one_signal_whatever_its_name_and_also_once_it_was_taken(
    filled: sqlite3.Connection, insert: Insert, task_seq: int, task_row: dict[str, Any]
) -> None:
    signal = {**SIGNAL, "task_seq": task_seq, "key": "k"}
    insert(filled, "signals", {**signal, "taken_at": AT, "taken_attempt": 1})
    insert(filled, "signals", {**signal, "task_seq": insert(filled, "tasks", {**task_row, "id": "another"})})

    with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
        insert(filled, "signals", {**signal, "name": "stop"})


def test_any_number_of_signals_are_sent_without_a_key(
    filled: sqlite3.Connection, insert: Insert, task_seq: int
) -> None:
    for _ in range(3):
        insert(filled, "signals", {**SIGNAL, "task_seq": task_seq})

    assert filled.execute("SELECT count(*) FROM signals").fetchone() == (3,)


@pytest.mark.parametrize(("table", "columns"), [("steps", STEP), ("signals", SIGNAL)])
def test_what_a_body_remembers_belongs_to_a_task_that_is_there(
    path: Path, filled: sqlite3.Connection, insert: Insert, table: str, columns: dict[str, Any]
) -> None:
    with closing(database.open_sqlite(path, "write")) as connection, pytest.raises(sqlite3.IntegrityError, match="FOR"):
        insert(connection, table, {**columns, "task_seq": 99})


# --- look-ups beside a long history ---------------------------------------------------------------------------------

HISTORY = 100_000
FLAT = 5_000
"""More instructions of SQLite's machine than any look-up takes that does not walk through the history."""

# Every tenth task was hidden and failed, every third had an idempotency key, every fourth left a note; all was read. One id
# had half of the incarnations. Each has a checkpoint, a step that failed and a signal that was taken.
MANY_TASKS = """
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
INSERT INTO tasks (scope, id, kind, mode, state, label, function, recovery, cancel_policy, arguments, attempt,
  attempts_spent, max_attempts, owner_id, result, failure, created_at, started_at, updated_at, completed_at, idempotency_key)
SELECT 'desktop:s1', iif(i % 2, 'again', 't' || i), 'other', iif(i % 10, 'managed', 'hidden'),
  iif(i % 10, 'completed', 'failed'), 'f', 'f', 'rerun', 'cooperative', '{}', 1, 0, 3, 1, iif(i % 10, '1', NULL),
  iif(i % 10, NULL, '{}'), :at, :at, :at, :at, iif(i % 3, NULL, 'key-' || i)
FROM n
"""
MANY_HANDLES = """
INSERT INTO handles (handle_id, scope, task_seq, role, created_at, read_at)
SELECT 'h-' || task_seq, scope, task_seq, 'owner', :at, :at FROM tasks
"""
MANY_EVENTS = """
INSERT INTO events (task_seq, scope, task_id, attempt, type, at, data)
SELECT task_seq, scope, id, 1, {type}, :at, '{{}}' FROM tasks
"""
MANY_STEPS = """
INSERT INTO steps (task_seq, kind, name, attempt, value, saved_at, state)
SELECT task_seq, {kind}, {name}, 1, '1', :at, {state} FROM tasks
"""
MANY_SIGNALS = """
INSERT INTO signals (task_seq, name, key, payload, sent_at, sent_by, taken_at, taken_attempt)
SELECT task_seq, 'go', 'k', '1', :at, 'me', :at, 1 FROM tasks
"""
MANY_NOTES = """
INSERT INTO inbox (scope, key, task_seq, task_id, text, data, posted_at, acknowledged_at)
SELECT scope, 'end:' || task_seq, task_seq, id, '', '{}', :at, :at FROM tasks WHERE task_seq % 4 = 0
"""


MANY_TOMBSTONES = """
INSERT INTO tombstones (task_seq, scope, id, kind, state, handle_id, idempotency_key, completed_at, pruned_at,
  first_event, last_event)
SELECT -task_seq, scope, iif(task_seq % 2, 'again', 'p' || task_seq), kind, state, 'h-p-' || task_seq, 'old-' || task_seq,
  :at, :at, -2 * task_seq, -2 * task_seq + 1
FROM tasks
"""


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with 100,000 finished tasks in one session, and as many that were pruned; only read, or changed and rolled back."""
    path = tmp_path_factory.mktemp("crowded") / "agent.db"
    migrate.prepare(path)
    at = {"at": AT}
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # nobody mourns this file
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("BEGIN")
        for session in ("s1", "s2"):
            connection.execute(
                "INSERT INTO sessions (scope, runtime, session_id, opened_at) VALUES (?, 'desktop', ?, ?)",
                (f"desktop:{session}", session, AT),
            )
        connection.execute(
            "INSERT INTO owners (token, runtime, pid, process_start, boot_id, host, version, opened_at) "
            "VALUES ('o-1', 'desktop', 1, '', '', 'host', '0', :at)",
            at,
        )
        connection.execute(MANY_TASKS, {**at, "count": HISTORY})
        connection.execute(MANY_HANDLES, at)
        connection.execute(MANY_EVENTS.format(type="'registered'"), at)
        connection.execute(MANY_EVENTS.format(type="state"), at)
        connection.execute(MANY_STEPS.format(kind="'checkpoint'", name="''", state="'done'"), at)
        connection.execute(MANY_STEPS.format(kind="'step'", name="'fetch'", state="'failed'"), at)
        connection.execute(MANY_SIGNALS, at)
        connection.execute(MANY_NOTES, at)
        connection.execute(MANY_TOMBSTONES, at)
        connection.execute("COMMIT")
    return path


@pytest.fixture
def long(crowded: Path, task_row: dict[str, Any], insert: Insert) -> Iterator[sqlite3.Connection]:
    """A connection of ours to that file, in a transaction with one live task, which is rolled back."""
    with closing(database.open_sqlite(crowded, "write")) as connection:
        connection.execute("BEGIN IMMEDIATE")
        insert(connection, "tasks", task_row)
        yield connection
        connection.execute("ROLLBACK")


def _listed(**wanted: Any) -> str:
    return queries.list_tasks(TaskFilter(**wanted))[0]


SESSION_LIST = {"scope": Scope("desktop", "s1"), "include_terminal": False, "include_hidden": False}

SESSION_LOOK_UPS = {
    "a session": session_queries.SESSION,
    "sessions": session_queries.SESSIONS,
    "whom a task is born to": session_queries._BIRTHPLACE,
    "a task's handle": session_queries.OWNER_HANDLE,
    "a handle by its id": session_queries.HANDLE_BY_ID,
    "an observer's handle": session_queries._OBSERVERS_HANDLE,
    "live tasks of a session, hidden ones too": session_queries._LIVE_OF_SESSION,
    "live hidden tasks": session_queries._LIVE_HIDDEN,
    "hidden failures": session_queries._HIDDEN_FAILURES,
    "a task by its idempotency key": session_queries._BY_KEY,
    "a child by its idempotency key": session_queries._CHILD_BY_KEY,
    "whether a parent was retried since": session_queries._RETRIED_AFTER,
    "whether a session has room for a live task": session_queries._COUNT_LIVE,
    "whether a session has room for a task": session_queries._COUNT_ALL,
    "a family by parent": families._BY_PARENT,
    "a family through sessions": families._WHOLE,
    "what is above": families._ABOVE,
    "unread notes": session_queries.UNREAD_NOTES,
    "notes to take": session_queries._TAKE_NOTES,
    "a handoff by its id": session_queries._HANDOFF_BY_ID,
    "a handoff between two sessions": session_queries._HANDOFF_BETWEEN,
}

SESSION_CHANGES = {
    "a session's parent": session_queries._ADOPT_SESSION,
    "a session's end": session_queries._CLOSE_SESSION,
    "a session's flag": session_queries._FLAG_SYNC,
    "a session's reader": session_queries._CLAIM_INBOX,
    "a session is opened again": session_queries._REOPEN_SESSION,
    "a handle is read": session_queries._MARK_READ,
    "a handle is unread": session_queries._MARK_UNREAD,
    "handles are read": session_queries._MARK_READ_BY_SEQ,
    "a handle is moved": session_queries._MOVE_HANDLE,
    "notes are taken": session_queries._MARK_TAKEN,
    "notes are acknowledged": session_queries._ACKNOWLEDGE,
    "notes are moved": session_queries._MOVE_NOTES,
}

STEP_LOOK_UPS = {
    "a checkpoint": step_queries._CHECKPOINT,
    "checkpoints of many tasks": step_queries._CHECKPOINTS,
    "steps of a task": step_queries.STEPS,
    "a step": step_queries.STEP,
    "names of steps": step_queries.STEP_NAMES,
    "steps that were begun": step_queries._BEGUN,
    "the next signal": step_queries.NEXT_SIGNAL,
    "a signal by its key": step_queries._BY_KEY,
}

STEP_CHANGES = {
    "failed steps are forgotten": step_queries._FORGET_FAILED,
    "failed steps inside another are forgotten": step_queries._FORGET_FAILED_INSIDE,
    "what failed steps had received is given back": step_queries._UNTAKE,
    "what failed steps inside another had received is given back": step_queries._UNTAKE_INSIDE,
    "unnamed sleeps are forgotten": step_queries._FORGET_UNNAMED,
    "signals are taken": step_queries._TAKE_SIGNALS,
}

RETENTION_LOOK_UPS = {
    "the newest task": retention_queries.NEWEST_TASK,
    "the newest task up to a number": retention_queries._NEWEST_UP_TO,
    "the children of a task": retention_queries._CHILDREN,
    "what is left of a task by its number": retention_queries._BY_SEQ,
    "what is left of a task by its id": retention_queries._BY_ID,
    "what is left of a task by its key": retention_queries._BY_KEY,
    "what is left of a task by its handle": retention_queries._BY_HANDLE,
    "what is missing of everything": retention_queries._PRUNED_AFTER,
    "what is missing of a task": retention_queries._PRUNED_OF_TASK,
    "what is missing of a session": retention_queries._PRUNED_OF_SESSION,
    "whose end is missing": retention_queries.ENDS_PRUNED,
}

RETENTION_CHANGES = {
    "how much lines take of a session": retention_queries._KEPT_BYTES,
    "lines take less of a session": retention_queries._FREE_BYTES,
    "what goes of each session": retention_queries._NEWEST_PRUNED,
    "a session is told what went": retention_queries._MARK_PRUNED,
    **{sql.split()[2] + " go": sql for sql in retention_queries._DELETIONS},
}

# what is asked for is all there is: every note of a session, every session whose notes are being read or that has an id
WHOLE_LISTS = {"ALL_NOTES", "TOKENS_IN_USE", "_CLAIMS", "_RELEASE_CLAIMS", "SCOPES_OF_ID"}

# a range of numbers; once a prune, what each session keeps
RANGES = {"_CANDIDATES", "LAST_KEPT", "_NOTES_LEFT", "_HAS_NOTES_LEFT"}

LOOK_UPS = {
    "a live task by its id": queries.LIVE_TASK_BY_ID,
    "a task by its id": queries.TASK_BY_ID,
    "a task by its number": queries.TASK_BY_SEQ,
    "tasks by their numbers": queries.TASKS_BY_SEQ,
    "live tasks of an owner": queries.LIVE_TASKS_OF_OWNER,
    "live tasks nobody has": queries._LIVE_TASKS_LEFT,
    "live tasks of a session": _listed(**SESSION_LIST),
    "live tasks of a session, by kind": _listed(**SESSION_LIST, kinds=frozenset({TaskKind.OTHER})),
    "live tasks of a session, by state": _listed(**SESSION_LIST, states=frozenset({TaskState.RUNNING})),
    "live tasks of a runtime": _listed(runtime="desktop", include_terminal=False),
    "events of a task after a cursor": queries.events_page(frozenset({"after", "task_seq"})),
    "open owners": queries.OPEN_OWNERS,
    **SESSION_LOOK_UPS,
    **SESSION_CHANGES,
    **STEP_LOOK_UPS,
    **STEP_CHANGES,
    **RETENTION_LOOK_UPS,
    **RETENTION_CHANGES,
}

# hidden work that failed and was told of is read again with every look: it is few
FLAT_LOOK_UPS = {
    **{name: sql for name, sql in LOOK_UPS.items() if "live" in name},
    **{name: sql for name, sql in SESSION_LOOK_UPS.items() if name != "hidden failures"},
    **STEP_LOOK_UPS,
    **STEP_CHANGES,
    **RETENTION_LOOK_UPS,
    "a task by its id": queries.TASK_BY_ID,
    "live tasks of the file": _listed(include_terminal=False),
    "the count of live tasks of the file": queries.count_tasks(TaskFilter(include_terminal=False))[0],
    "the view live_tasks": "SELECT * FROM live_tasks",
}

GIVEN = {
    "after_seq": 0,
    "limit": -1,
    "scope": "desktop:s1",
    "id": "index",
    "owner_id": 1,
    "runtime": "desktop",
    "task_seq": HISTORY + 1,
    "since": 2 * HISTORY,
    "key": "key-3",
    "handle_id": "h-3",
    "source": "desktop:s1",
    "destination": "desktop:s2",
    "handoff_id": "ho-1",
    "parent_seq": HISTORY + 1,
    "child_seq": HISTORY,
    "most": 100,
    "kind": "step",
    "step": "fetch",
    "names": '["fetch"]',
    "name": "fetch",
    "after": 0,
    "attempt": 1,
    "task_seqs": f"[{HISTORY + 1}, 1]",
    "signal_seqs": "[1]",
}

SCANS_A_HISTORY = re.compile(
    # a range of the primary key from a cursor is the whole history too
    r"SCAN (tasks|events|handles|owners|inbox|handoffs|steps|signals|tombstones|monitors|updates)\b|PRIMARY KEY \(rowid>"
)


def parameters_of(sql: str) -> Any:
    """Return something for every parameter of a statement."""
    if "?" in sql:
        return ["desktop:s1"] * sql.count("?")
    return {name: GIVEN.get(name, '["running","other"]') for name in re.findall(r":(\w+)", sql)}


def plan(connection: sqlite3.Connection, sql: str) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters_of(sql))]


def statements_of(*modules: ModuleType) -> dict[str, str]:
    """Return the statements of modules that look for something, by name."""
    found = {}
    for name, value in (item for module in modules for item in vars(module).items()):
        sql = getattr(value, "sql", value)
        if isinstance(sql, str) and re.match(r"(SELECT|UPDATE|WITH|DELETE)\b", sql):
            found[name] = sql
    return found


def test_every_statement_about_sessions_is_looked_at_here() -> None:
    found = statements_of(session_queries, families)

    assert len(found) >= 20
    looked_at = {*SESSION_LOOK_UPS.values(), *SESSION_CHANGES.values()}
    assert {name for name, sql in found.items() if sql not in looked_at} == WHOLE_LISTS


def test_every_statement_about_what_bodies_remember_is_looked_at_here() -> None:
    found = statements_of(step_queries)

    assert sorted(found.values()) == sorted([*STEP_LOOK_UPS.values(), *STEP_CHANGES.values()])


def test_every_statement_about_what_is_pruned_is_looked_at_here() -> None:
    found = statements_of(retention_queries)

    looked_at = {*RETENTION_LOOK_UPS.values(), *RETENTION_CHANGES.values()}
    assert {name for name, sql in found.items() if sql not in looked_at} == RANGES


NO_LIMIT = {"before": None, "states": None, "scopes": None}


def test_what_may_be_pruned_is_found_by_a_bounded_range_of_numbers_and_by_indexes(long: sqlite3.Connection) -> None:
    sql = retention_queries._CANDIDATES

    steps = plan(long, sql)
    assert "SEARCH tasks USING INTEGER PRIMARY KEY (rowid>? AND rowid<?)" in steps
    assert not [step for step in steps if step.startswith("SCAN") and "json_each" not in step]
    tx = Transaction(long, AT)

    def looked_at(count: int, **limits: Any) -> int:
        chosen: dict[str, Any] = {**NO_LIMIT, **limits}
        return steps_of(long, lambda: [*retention_queries.candidates(tx, 70_000, 70_000 + count, **chosen)])

    assert looked_at(1_000) < 12 * looked_at(100)
    assert looked_at(100, before=AT, states=["completed"], scopes=["desktop:s1"]) < 12 * looked_at(10) + FLAT


def test_tasks_are_taken_away_in_time_in_proportion_to_them(long: sqlite3.Connection) -> None:
    tx = Transaction(long, AT)

    def take(count: int, after: int) -> int:
        chosen = [*retention_queries.candidates(tx, after, after + count, before=None, states=None, scopes=None)]
        assert len(chosen) == count
        return steps_of(long, lambda: retention_queries.bury(tx, chosen))

    few = take(10, 50_000)
    many = take(100, 60_000)

    assert few < FLAT
    assert many < 12 * few


def test_a_part_of_a_prune_looks_at_little_more_than_it_takes(
    long: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tx, wanted = Transaction(long, AT), Retention(unread=True)

    def part(looked_at: int) -> int:
        monkeypatch.setattr(retention, "_LOOKED_AT", looked_at)
        return steps_of(long, lambda: retention._prune(tx, 70_000, wanted, None, None, set(), is_dry=True))

    few, many = part(150), part(70_000)

    assert many < 2 * few


def test_whether_more_may_begin_below_a_task_is_found_without_the_history_of_its_children(
    long: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    tx, ended = Transaction(long, AT), {**ENDINGS["completed"], "completed_at": AT}
    parent = insert(long, "tasks", {**task_row, **ended, "id": "parent", "parent_seq": HISTORY + 1})
    for number in range(1_000):
        insert(long, "tasks", {**task_row, **ended, "id": f"child {number}", "parent_seq": parent})

    assert next(retention_queries.children(tx, parent)) == parent + 1
    assert steps_of(long, lambda: any(retention_queries.children(tx, parent))) < 500


def test_a_cursor_behind_which_nothing_was_pruned_learns_that_from_an_index(long: sqlite3.Connection) -> None:
    tx = Transaction(long, AT)

    for of in ({"scope": None, "task_seq": None}, {"scope": "desktop:s1", "task_seq": None}):
        assert retention_queries.gap_after(tx, 0, **of) is None
        assert steps_of(long, lambda of=of: retention_queries.gap_after(tx, 0, **of)) < 500  # type: ignore[misc]
    [step] = plan(long, retention_queries.ENDS_PRUNED)
    assert "tombstones_events (last_event>? AND last_event<?)" in step


def test_who_follows_one_task_does_not_walk_through_what_is_left_of_others(long: sqlite3.Connection) -> None:
    tx = Transaction(long, AT)

    for of in ({"scope": None, "task_seq": HISTORY}, {"scope": None, "task_seq": None}):
        assert steps_of(long, lambda of=of: retention_queries.gap_after(tx, -(10**9), **of)) < 500  # type: ignore[misc]


def test_whether_an_agent_is_needed_is_found_without_the_history_of_its_session(
    long: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    ended = {**ENDINGS["completed"], "completed_at": AT}
    agent = insert(long, "tasks", {**task_row, **ended, "scope": "desktop:s2", "id": "agent", "child_session_id": "s1"})
    tx = Transaction(long, AT)

    assert families.live_descendants(tx, agent)
    assert steps_of(long, lambda: families.live_descendants(tx, agent)) < FLAT
    assert families.above(tx, agent) == (False, False)
    assert steps_of(long, lambda: families.above(tx, agent)) < FLAT


@pytest.mark.parametrize(
    ("sql", "index"),
    [(step_queries._BEGUN, "steps_begun"), (step_queries.NEXT_SIGNAL, "signals_untaken")],
    ids=["steps that were begun", "the next signal"],
)
def test_what_is_in_flight_is_found_by_an_index_that_has_nothing_else(
    long: sqlite3.Connection, sql: str, index: str
) -> None:
    assert [step for step in plan(long, sql) if re.search(rf"USING (COVERING )?INDEX {index}\b", step)]


def test_a_signal_is_found_as_quickly_behind_many_that_were_taken(long: sqlite3.Connection, insert: Insert) -> None:
    for number in range(1_000):
        insert(long, "signals", {**SIGNAL, "task_seq": HISTORY + 1, "taken_at": AT, "key": f"k-{number}"})
    insert(long, "signals", {**SIGNAL, "task_seq": HISTORY + 1})
    wanted = {"task_seq": HISTORY + 1, "name": "go", "after": 0}

    assert steps_of(long, lambda: long.execute(step_queries.NEXT_SIGNAL, wanted).fetchall()) < 500


@pytest.mark.parametrize("sql", LOOK_UPS.values(), ids=LOOK_UPS.keys())
def test_a_look_up_uses_an_index_and_never_scans_a_history(long: sqlite3.Connection, sql: str) -> None:
    assert not [step for step in plan(long, sql) if SCANS_A_HISTORY.match(step)]


@pytest.mark.parametrize("sql", FLAT_LOOK_UPS.values(), ids=FLAT_LOOK_UPS.keys())
def test_a_look_up_stays_flat_beside_a_long_history(long: sqlite3.Connection, sql: str) -> None:
    assert steps_of(long, lambda: long.execute(sql, parameters_of(sql)).fetchall()) < FLAT


def test_a_look_up_by_id_stays_flat_beside_many_incarnations_of_the_id(long: sqlite3.Connection) -> None:
    wanted = {"scope": "desktop:s1", "id": "again"}

    assert steps_of(long, lambda: long.execute(queries.TASK_BY_ID, wanted).fetchall()) < FLAT


def new_task(**changed: Any) -> NewTask:
    given: dict[str, Any] = {
        "scope": Scope("desktop", "s1"),
        "id": "born",
        "kind": TaskKind.OTHER,
        "mode": TaskMode.MANAGED,
        "label": "f",
        "function": "f",
        "recovery": Recovery.RERUN,
        "cancel_policy": CancelPolicy.COOPERATIVE,
        "arguments": "{}",
        "max_attempts": 3,
        "owner_id": 1,
        "handle_id": "h-born",
        "parent_seq": HISTORY + 1,
        "idempotency_key": "new",
    }
    return NewTask(**{**given, **changed})


NEW_TASKS = {
    "a child with a key": new_task(),
    "a hidden one": new_task(mode=TaskMode.HIDDEN, parent_seq=None),
    "a sub-agent": new_task(kind=TaskKind.SUBAGENT, child_session_id="s2"),
    "the next incarnation of an old id": new_task(id="again"),
    "a repetition": new_task(idempotency_key="key-3"),
}


@pytest.mark.parametrize("new", NEW_TASKS.values(), ids=NEW_TASKS.keys())
def test_a_task_is_born_by_look_ups_alone_beside_a_long_history(long: sqlite3.Connection, new: NewTask) -> None:
    tx = Transaction(long, AT)
    ran: list[str] = []

    def bear() -> None:
        births.create(tx, new, start=True)
        queries.write_events(tx)

    long.set_trace_callback(ran.append)
    steps = steps_of(long, bear)
    long.set_trace_callback(None)

    assert ran
    plans = {sql: [row[3] for row in long.execute(f"EXPLAIN QUERY PLAN {sql}")] for sql in ran}
    assert not {sql: plan for sql, plan in plans.items() if any(map(SCANS_A_HISTORY.match, plan))}
    assert steps < FLAT


@pytest.fixture
def worked_through(long: sqlite3.Connection) -> sqlite3.Connection:
    """The same, all of whose finished tasks worked in session s2 as sub-agents."""
    long.execute("DROP TRIGGER tasks_terminal_is_final")
    long.execute("UPDATE tasks SET child_session_id = 's2' WHERE completed_at IS NOT NULL")
    return long


def test_a_task_is_born_as_quickly_in_a_session_many_sub_agents_worked_in(worked_through: sqlite3.Connection) -> None:
    tx = Transaction(worked_through, AT)
    new = new_task(scope=Scope("desktop", "s2"), parent_seq=None)

    assert steps_of(worked_through, lambda: births.create(tx, new)) < FLAT


def test_the_descendants_of_a_leaf_are_found_without_the_history(long: sqlite3.Connection) -> None:
    tx = Transaction(long, AT)

    assert steps_of(long, lambda: families.live_descendants(tx, HISTORY + 1)) < FLAT


def test_the_descendants_of_a_sub_agent_are_found_without_the_history_of_its_session(
    long: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    agent = insert(long, "tasks", {**task_row, "scope": "desktop:s2", "id": "agent", "child_session_id": "s1"})
    tx = Transaction(long, AT)

    assert [task.id for task in families.live_descendants(tx, agent)] == ["index"]
    assert steps_of(long, lambda: families.live_descendants(tx, agent)) < FLAT


def test_a_large_family_is_found_in_time_in_proportion_to_it(
    long: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    agent = insert(long, "tasks", {**task_row, "scope": "desktop:s2", "id": "agent", "child_session_id": "s1"})
    tx = Transaction(long, AT)

    def children(count: int, of: str) -> int:
        for number in range(count):
            insert(long, "tasks", {**task_row, "scope": "desktop:s2", "id": f"{of} {number}", "parent_seq": agent})
        return steps_of(long, lambda: families.live_descendants(tx, agent))

    few = children(100, "first")
    many = children(900, "more")

    assert len(families.live_descendants(tx, agent)) == 1001
    assert many < 12 * few


def steps_of(connection: sqlite3.Connection, action: Callable[[], object]) -> int:
    """Count the instructions of SQLite's machine an action takes, to the nearest hundred."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 100
        return 0

    connection.set_progress_handler(count, 100)
    try:
        action()
    finally:
        connection.set_progress_handler(None, 0)
    return counted


# --- files that somebody changed ------------------------------------------------------------------------------------


def test_a_file_that_was_taken_out_of_wal_mode_is_put_back_into_it_when_it_is_opened(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA journal_mode=DELETE").fetchall() == [("delete",)]

    assert migrate.prepare(path) is None

    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA journal_mode").fetchall() == [("wal",)]


def test_a_path_that_is_not_utf_8_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"is not UTF-8"):
        migrate.upgrade(tmp_path / "a\udcff.db")
    assert [*tmp_path.iterdir()] == []
