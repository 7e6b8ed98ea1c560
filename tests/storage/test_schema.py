"""Rules of the file's schema: one in every way it is made, and strict against whoever writes."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.operations import Operations

from lash_store import database, lifecycle, migrate, queries, schema, session_queries
from lash_store.errors import StorageFull, StoreError
from lash_store.models import (
    CancelPolicy,
    EventType,
    HandleRole,
    OwnerEnd,
    Recovery,
    Scope,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskState,
)

REPOSITORY = Path(__file__).parents[2]
AT = "2024-05-01T10:00:00.000Z"

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

    assert columns == list(database.Committed._fields[: len(columns)])


@pytest.mark.parametrize(
    ("table", "column", "words"),
    [
        ("tasks", "state", TaskState),
        ("tasks", "kind", TaskKind),
        ("tasks", "mode", TaskMode),
        ("tasks", "recovery", Recovery),
        ("tasks", "cancel_policy", CancelPolicy),
        ("events", "type", EventType),
        ("handles", "role", HandleRole),
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


@pytest.mark.parametrize("table", ["sessions", "owners", "tasks", "events", "handles"])
def test_a_number_that_is_a_cursor_is_never_used_again(path: Path, table: str) -> None:
    assert "AUTOINCREMENT" in objects(path)["table", table]


@pytest.mark.parametrize("view", ["live_tasks", "task_history", "recent_failures", "session_summary"])
def test_a_view_for_the_shell_can_be_read(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], view: str
) -> None:
    insert(filled, "tasks", task_row)

    filled.execute(f"SELECT * FROM {view}").fetchall()


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


def test_a_finished_task_may_change_its_session(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any]
) -> None:
    insert(filled, "sessions", {"scope": "desktop:s2", "runtime": "desktop", "session_id": "s2", "opened_at": AT})
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
    ],
    ids=repr,
)
def test_the_file_refuses_a_row_that_cannot_be(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], change: dict[str, Any]
) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "tasks", {**task_row, **change})
    insert(filled, "tasks", task_row)


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
    ],
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


def test_a_checkpoint_is_json(filled: sqlite3.Connection, insert: Insert, task_seq: int) -> None:
    step = {"task_seq": task_seq, "kind": "checkpoint", "name": "", "attempt": 1, "saved_at": AT}

    with pytest.raises(sqlite3.IntegrityError):
        insert(filled, "steps", {**step, "value": "NaN"})


# --- look-ups beside a long history ---------------------------------------------------------------------------------

HISTORY = 5_000


@pytest.fixture
def long(filled: sqlite3.Connection, task_row: dict[str, Any], insert: Insert) -> sqlite3.Connection:
    """A file with 5,000 finished tasks, each with an event, and one live one."""
    task = {**task_row, **ENDINGS["completed"], "completed_at": AT, "id": None}
    filled.execute("BEGIN")
    for number in range(HISTORY):
        task_seq = insert(filled, "tasks", {**task, "id": f"t{number % 500}"})
        insert(filled, "events", event(task_seq, "completed", task_id=f"t{number % 500}"))
    insert(filled, "tasks", task_row)
    filled.execute("COMMIT")
    return filled


def _listed(**wanted: Any) -> str:
    return queries.list_tasks(TaskFilter(**wanted))[0]


SESSION_LIST = {"scope": Scope("desktop", "s1"), "include_terminal": False, "include_hidden": False}

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
    "a task's handle": session_queries.OWNER_HANDLE,
    "open owners": queries.OPEN_OWNERS,
    "sessions": session_queries.SESSIONS,
}

LIVE_LOOK_UPS = {
    **{name: sql for name, sql in LOOK_UPS.items() if "live" in name},
    "live tasks of the file": _listed(include_terminal=False),
    "the count of live tasks of the file": queries.count_tasks(TaskFilter(include_terminal=False))[0],
    "the view live_tasks": "SELECT * FROM live_tasks",
}


def plan(connection: sqlite3.Connection, sql: str) -> list[str]:
    parameters = dict.fromkeys(re.findall(r":(\w+)", sql))
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", parameters)]


@pytest.mark.parametrize("sql", LOOK_UPS.values(), ids=LOOK_UPS.keys())
def test_a_look_up_uses_an_index_and_never_scans_a_history(long: sqlite3.Connection, sql: str) -> None:
    steps = plan(long, sql)

    assert not [step for step in steps if re.match(r"SCAN (tasks|events|handles|owners)\b", step)]
    # a range of the primary key from a cursor is the whole history too
    assert not [step for step in steps if "PRIMARY KEY (rowid>" in step]


@pytest.mark.parametrize("sql", LIVE_LOOK_UPS.values(), ids=LIVE_LOOK_UPS.keys())
def test_a_look_up_of_live_tasks_stays_flat_beside_a_long_history(long: sqlite3.Connection, sql: str) -> None:
    given = {"after_seq": 0, "limit": -1, "scope": "desktop:s1", "id": "index", "owner_id": 1, "runtime": "desktop"}
    parameters = {name: given.get(name, '["running","other"]') for name in re.findall(r":(\w+)", sql)}

    assert steps_of(long, sql, parameters) < HISTORY


@pytest.mark.parametrize("incarnations", [HISTORY])
def test_a_look_up_by_id_stays_flat_beside_many_incarnations_of_the_id(
    filled: sqlite3.Connection, insert: Insert, task_row: dict[str, Any], incarnations: int
) -> None:
    filled.execute("BEGIN")
    for _ in range(incarnations):
        insert(filled, "tasks", {**task_row, **ENDINGS["completed"], "completed_at": AT})
    filled.execute("COMMIT")

    assert steps_of(filled, queries.TASK_BY_ID, {"scope": "desktop:s1", "id": "index"}) < incarnations


def steps_of(connection: sqlite3.Connection, sql: str, parameters: dict[str, Any]) -> int:
    """Count the instructions of SQLite's machine a statement takes, to the nearest hundred."""
    counted = 0

    def count() -> int:
        nonlocal counted
        counted += 100
        return 0

    connection.set_progress_handler(count, 100)
    try:
        connection.execute(sql, parameters).fetchall()
    finally:
        connection.set_progress_handler(None, 0)
    return counted
