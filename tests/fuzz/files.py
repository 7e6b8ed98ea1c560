"""Damages files, each in a way that its seed gives again: bytes, pages, side files, schema, rows, and what is no file at all."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import stat
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from .seeds import NAME

__all__ = ["BYSTANDER", "KINDS", "Case", "build"]

BYSTANDER = "program_rows"
"""A table of the program's own, in files with hostile schemas: nothing of the store's may change it."""


class Case(NamedTuple):
    """One damaged file: which number of which run, from which seed file, and what was done to it."""

    seed: int
    number: int
    origin: str
    kind: str


Damage = Callable[[random.Random, Path, Mapping[str, Path]], str]
"""Damages the file, given the seeds' folders; says what it did."""

KINDS: dict[str, Damage] = {}


def _kind(damage: Damage) -> Damage:
    KINDS[damage.__name__.strip("_")] = damage
    return damage


def build(case: Case, folder: Path, seeds: Mapping[str, Path]) -> tuple[Path, str]:
    """Make a case's file in an empty folder and return it, with what was done; the same case gives the same file."""
    chance = random.Random(f"{case.seed} {case.number}")
    shutil.copytree(seeds[case.origin], folder, dirs_exist_ok=True)
    folder.chmod(0o700)
    path = folder / NAME
    return path, KINDS[case.kind](chance, path, seeds)


# --- bytes and pages ------------------------------------------------------------------------------------------------


def _page_size(content: bytes | bytearray) -> int:
    size = int.from_bytes(content[16:18], "big")
    return 65536 if size == 1 else size if size >= 512 else 4096


def _flip(chance: random.Random, content: bytearray, first: int, last: int) -> str:
    count = chance.choice([1, 1, 2, 8])
    places = [chance.randrange(first, max(first + 1, min(last, len(content)))) for _ in range(count)]
    for at in places:
        content[at] ^= 1 << chance.randrange(8)
    return f"bits of bytes {places}"


def _edit(path: Path, change: Callable[[bytearray], str]) -> str:
    content = bytearray(path.read_bytes())
    told = change(content)
    path.write_bytes(content)
    return told


@_kind
def _truncated(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    size = path.stat().st_size
    length = chance.choice([chance.randrange(size), chance.randrange(0, 200), chance.randrange(size) // 4096 * 4096])
    os.truncate(path, length)
    return f"to {length} bytes"


@_kind
def _header_bits(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _edit(path, lambda content: _flip(chance, content, 0, 100))


@_kind
def _schema_page_bits(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _edit(path, lambda content: _flip(chance, content, 100, _page_size(content)))


@_kind
def _page_header_bits(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    def change(content: bytearray) -> str:
        size = _page_size(content)
        at = chance.randrange(1, max(2, len(content) // size)) * size
        return _flip(chance, content, at, at + 12)

    return _edit(path, change)


@_kind
def _cell_bits(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _edit(path, lambda content: _flip(chance, content, 100, len(content)))


@_kind
def _page_zeroed(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _pages(chance, path, lambda content, one, _, size: bytes(size))


@_kind
def _page_random(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _pages(chance, path, lambda content, one, _, size: chance.randbytes(size))


@_kind
def _page_doubled(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    return _pages(chance, path, lambda content, one, other, size: bytes(content[other : other + size]))


def _pages(chance: random.Random, path: Path, new: Callable[[bytearray, int, int, int], bytes]) -> str:
    def change(content: bytearray) -> str:
        size = _page_size(content)
        count = max(1, len(content) // size)
        one, other = chance.randrange(count), chance.randrange(count)
        content[one * size : (one + 1) * size] = new(content, one * size, other * size, size)
        return f"page {one + 1} (of {other + 1})"

    return _edit(path, change)


@_kind
def _pages_swapped(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    def change(content: bytearray) -> str:
        size = _page_size(content)
        count = max(1, len(content) // size)
        one, other = (chance.randrange(count) * size for _ in "12")
        content[one : one + size], content[other : other + size] = (
            content[other : other + size],
            content[one : one + size],
        )
        return f"pages {one // size + 1} and {other // size + 1}"

    return _edit(path, change)


@_kind
def _text_bits(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Flip bits in words the rows have: of a state, of JSON, of a time."""

    def change(content: bytearray) -> str:
        word = chance.choice([b"completed", b"running", b"desktop:", b'{"', b"20", b"rerun", b"managed", b"o-", b"h-"])
        places: list[int] = []
        at = content.find(word)
        while at >= 0 and len(places) < 5000:
            places.append(at)
            at = content.find(word, at + 1)
        at = chance.choice(places or [len(content) // 2])
        return _flip(chance, content, at, at + len(word) + 8)

    return _edit(path, change)


# --- the -wal -------------------------------------------------------------------------------------------------------


def _with_wal(path: Path, seeds: Mapping[str, Path]) -> Path:
    """Return the -wal, taken from the file of a killed process if there is none."""
    wal = Path(f"{path}-wal")
    if not wal.exists() or not wal.stat().st_size:
        for suffix in ("", "-wal"):
            shutil.copyfile(f"{seeds['killed'] / NAME}{suffix}", f"{path}{suffix}")
            Path(f"{path}{suffix}").chmod(0o600)
    return wal


@_kind
def _wal_bits(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    return _edit(_with_wal(path, seeds), lambda content: _flip(chance, content, 0, chance.choice([32, len(content)])))


@_kind
def _wal_truncated(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    wal = _with_wal(path, seeds)
    length = chance.randrange(wal.stat().st_size)
    os.truncate(wal, length)
    return f"to {length} bytes"


@_kind
def _wal_random(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    wal = _with_wal(path, seeds)
    wal.write_bytes(chance.randbytes(chance.choice([0, 1, 32, 5000, 100_000])))
    return f"{wal.stat().st_size} random bytes"


@_kind
def _wal_frame_swapped(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    def change(content: bytearray) -> str:
        count = max(1, (len(content) - 32) // 4120)
        one, other = (32 + chance.randrange(count) * 4120 for _ in "12")
        content[one : one + 4120], content[other : other + 4120] = (
            content[other : other + 4120],
            content[one : one + 4120],
        )
        return f"frames at {one} and {other}"

    return _edit(_with_wal(path, seeds), change)


@_kind
def _wal_of_another(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    shutil.copyfile(f"{seeds['killed'] / NAME}-wal", f"{path}-wal")
    for folder in path.parent.glob("*-shm"):
        folder.unlink()
    if chance.random() < 0.3:
        path.write_bytes(b"")
        return "beside an empty file"
    if chance.random() < 0.3:
        path.unlink()
        return "beside no file"
    return "beside this file"


@_kind
def _shm_random(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    _with_wal(path, seeds)
    Path(f"{path}-shm").write_bytes(chance.randbytes(chance.choice([1, 136, 32768, 40000])))
    return "random -shm"


@_kind
def _journal_beside(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    head = bytes.fromhex("d9d505f920a163d7") + chance.randbytes(20)
    Path(f"{path}-journal").write_bytes(chance.choice([head + bytes(600), chance.randbytes(700), b"x"]))
    return "a journal nobody wrote"


# --- through SQLite -------------------------------------------------------------------------------------------------


def _with_sqlite(path: Path, change: Callable[[sqlite3.Connection], str], *, hot: bool = False) -> str:
    """Edit the file with plain SQLite, nothing of it enforced; *hot*: what was written stays in the -wal."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous=OFF").fetchall()
        connection.execute("PRAGMA ignore_check_constraints=ON").fetchall()
        connection.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        connection.execute("PRAGMA busy_timeout=2000").fetchall()
        connection.text_factory = bytes
        try:
            told = change(connection)
        except sqlite3.Error as error:
            told = f"SQLite refused: {error}"
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        if hot:
            for suffix in ("", "-wal"):
                if Path(f"{path}{suffix}").exists():
                    shutil.copyfile(f"{path}{suffix}", f"{path}{suffix}.hot")
    if hot:
        for suffix in ("", "-wal"):
            kept = Path(f"{path}{suffix}.hot")
            if kept.exists():
                kept.chmod(0o600)
                kept.replace(f"{path}{suffix}")
        Path(f"{path}-shm").unlink(missing_ok=True)
    return told


@_kind
def _other_header(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    pragma = chance.choice(
        [
            "application_id=0",
            "application_id=252006673",
            "user_version=1",
            "user_version=99",
            "user_version=-1",
            "journal_mode=DELETE",
            "journal_mode=TRUNCATE",
            "journal_mode=PERSIST",
            "auto_vacuum=0; VACUUM",
            "page_size=512; PRAGMA journal_mode=DELETE; VACUUM",
            "page_size=65536; PRAGMA journal_mode=DELETE; VACUUM",
        ]
    )

    def change(connection: sqlite3.Connection) -> str:
        connection.executescript(f"PRAGMA {pragma};")
        return pragma

    return _with_sqlite(path, change)


@_kind
def _other_revision(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    revision = chance.choice(["", "0000", "0001", "0003", "0006", "9999", "x' OR 1", "é" * 1000, None, b"\xff\xfe"])

    def change(connection: sqlite3.Connection) -> str:
        if revision is None:
            connection.execute("DELETE FROM lash_store_version")
        else:
            connection.execute("UPDATE lash_store_version SET version_num = ?", (revision,))
        return f"revision {revision!r}"

    return _with_sqlite(path, change)


@_kind
def _foreign(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    for one in path.parent.iterdir():
        shutil.rmtree(one) if one.is_dir() else one.unlink()
    encoding = chance.choice(["UTF-8", "UTF-16le", "UTF-16be"])
    ours = chance.random() < 0.5
    mode = chance.choice(["DELETE", "WAL"])
    table = chance.choice(["tasks (a)", "lash_store_version (version_num)", "lash_store_version (x)", "other (a)"])
    rows = chance.choice(["0005", "0004", "x"])

    def change(connection: sqlite3.Connection) -> str:
        connection.executescript(
            f"PRAGMA encoding='{encoding}'; PRAGMA page_size={chance.choice([512, 4096, 65536])};"
            f"PRAGMA application_id={0x6C617368 if ours else 0}; PRAGMA journal_mode={mode};"
            f"CREATE TABLE {table}; INSERT INTO {table.split()[0]} VALUES ('{rows}');"
        )
        return f"{encoding}, {'our' if ours else 'no'} mark, {mode}, {table} {rows}"

    return _with_sqlite(path, change)


HOSTILE_SQL = (
    # triggers on our tables, that write ours and the program's
    "CREATE TRIGGER evil AFTER UPDATE ON tasks BEGIN DELETE FROM program_rows; END",
    "CREATE TRIGGER evil AFTER INSERT ON owners BEGIN UPDATE program_rows SET said = 'owned'; END",
    "CREATE TRIGGER evil AFTER INSERT ON events BEGIN UPDATE sessions SET sync_needed = 1; END",
    "CREATE TRIGGER evil AFTER INSERT ON events BEGIN DELETE FROM inbox; DELETE FROM handles; END",
    "CREATE TRIGGER evil BEFORE INSERT ON events BEGIN SELECT RAISE(ROLLBACK, 'no'); END",
    "CREATE TRIGGER evil BEFORE UPDATE ON owners BEGIN SELECT RAISE(ABORT, 'no'); END",
    "CREATE TRIGGER evil BEFORE INSERT ON owners BEGIN SELECT RAISE(IGNORE); END",
    "CREATE TRIGGER evil AFTER INSERT ON tasks BEGIN UPDATE tasks SET state = 'completed', result = '1' "
    "WHERE task_seq = new.task_seq; END",
    "CREATE TRIGGER evil AFTER INSERT ON events BEGIN SELECT load_extension('/tmp/evil.so'); END",
    "CREATE TRIGGER evil AFTER INSERT ON events BEGIN SELECT writefile('evil', 'x'); END",
    "CREATE TRIGGER evil AFTER INSERT ON events BEGIN SELECT (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 "
    "FROM n) SELECT count(*) FROM n); END",
    "CREATE TRIGGER evil AFTER INSERT ON owners BEGIN SELECT zeroblob(900000000); END",
    # views and tables in the place of ours
    "ALTER TABLE tasks RENAME TO was; CREATE VIEW tasks AS SELECT * FROM was",
    "ALTER TABLE sessions RENAME TO was; CREATE VIEW sessions AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 "
    "FROM n) SELECT n.x AS session_seq, 'a:b' AS scope, 'a' AS runtime, 'b' AS session_id, '' AS opened_at, "
    "NULL AS closed_at, NULL AS parent, 0 AS sync_needed, NULL AS inbox_claim, 0 AS reopened_after, NULL AS "
    "reopened_amid, NULL AS updates_claim, 0 AS update_bytes, 0 AS pruned_event, NULL AS pruned_at FROM n",
    "ALTER TABLE owners RENAME TO was; CREATE VIEW owners AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 "
    "FROM n) SELECT was.* FROM n, was",
    "DROP TABLE lash_store_version; CREATE VIEW lash_store_version AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL "
    "SELECT x + 1 FROM n) SELECT max(x) AS version_num FROM n",
    "DROP VIEW live_tasks; CREATE VIEW live_tasks AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
    "SELECT count(*) FROM n",
    "DROP TABLE steps",
    "DROP TABLE events",
    "DROP TABLE tombstones",
    "DROP TABLE owners",
    "DROP TABLE lash_store_version",
    "DROP INDEX tasks_live",
    "DROP TRIGGER IF EXISTS tasks_terminal",
    # columns and indexes that compute
    "ALTER TABLE tasks ADD COLUMN evil TEXT GENERATED ALWAYS AS (hex(zeroblob(1000000))) VIRTUAL",
    "ALTER TABLE tasks ADD COLUMN evil TEXT",
    "ALTER TABLE events ADD COLUMN evil TEXT NOT NULL DEFAULT 'x' CHECK (length(evil) < 2)",
    "CREATE INDEX evil ON tasks (hex(id) || printf('%.100000c', 'x'))",
    "CREATE INDEX evil ON events (json_extract(data, '$.a'))",
    "CREATE UNIQUE INDEX evil ON events (type)",
    "CREATE UNIQUE INDEX evil ON owners (runtime)",
    "CREATE VIRTUAL TABLE evil USING fts5 (x)",
    "CREATE TABLE evil (task_seq INTEGER REFERENCES tasks (task_seq)); INSERT INTO evil SELECT task_seq FROM tasks",
    "ALTER TABLE tasks DROP COLUMN label",
    "ALTER TABLE events RENAME COLUMN data TO told",
)


@_kind
def _hostile_schema(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    sql = chance.choice(HOSTILE_SQL)

    def change(connection: sqlite3.Connection) -> str:
        connection.execute(f"CREATE TABLE {BYSTANDER} (said TEXT)")
        connection.execute(f"INSERT INTO {BYSTANDER} VALUES ('mine'), ('too')")
        # an old name stays in what refers to it: the views and triggers too
        connection.execute("PRAGMA legacy_alter_table=ON").fetchall()
        connection.executescript(sql)
        return sql

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


@_kind
def _schema_rows(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    edits = (
        "UPDATE sqlite_schema SET rootpage = 3 WHERE name = 'tasks'",
        "UPDATE sqlite_schema SET rootpage = 999999 WHERE name = 'events'",
        "UPDATE sqlite_schema SET rootpage = 1 WHERE name = 'owners'",
        "UPDATE sqlite_schema SET sql = 'CREATE TABLE tasks (x)' WHERE name = 'tasks'",
        "UPDATE sqlite_schema SET sql = 'CREATE nonsense' WHERE name = 'sessions'",
        "UPDATE sqlite_schema SET sql = replace(sql, 'STRICT', '') WHERE name = 'tasks'",
        "UPDATE sqlite_schema SET sql = replace(sql, 'TEXT NOT NULL', 'BLOB') WHERE name = 'events'",
        "UPDATE sqlite_schema SET name = x'fffe41' WHERE name = 'live_tasks'",
        "UPDATE sqlite_schema SET sql = CAST(x'fffe' AS TEXT) WHERE type = 'view'",
        "UPDATE sqlite_schema SET type = 'view' WHERE name = 'tasks'",
        "DELETE FROM sqlite_schema WHERE name = 'events'",
        "DELETE FROM sqlite_schema WHERE type = 'index'",
        "INSERT INTO sqlite_schema VALUES ('table', 'a' || char(27) || '[2J', 'b', 2, 'CREATE TABLE b (x)')",
        "UPDATE sqlite_schema SET tbl_name = 'owners' WHERE name = 'tasks_live'",
    )
    edit = chance.choice(edits)

    def change(connection: sqlite3.Connection) -> str:
        connection.execute("PRAGMA writable_schema=ON").fetchall()
        connection.execute(edit)
        return edit

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


_DEEP = "[" * 100_000 + "]" * 100_000
_ODD: tuple[object, ...] = (
    "", " ", "x", "é", "\x1b[2J\x1b]0;owned\x07\u202e\n\u2028\x9b31m\x7f", b"\xff\xfe not utf-8", b"a\0b", "0", "-1", "NaN",
    0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 0.5, float("inf"), None, "null", "{", "{}", "[]", "[[[", '{"a":NaN}', "1e999",
    '{"type":5}', '{"token":"../../evil","pid":1}', '{"spec":5}', '"\\ud800"', "9" * 5000, _DEEP, '{"a":' * 3000, "x" * 300_000,
    "completed", "running", "pending", "cancel_requested", "monitor", "external", "hidden", "h-x", "desktop:s1", ":", "nowhere:x",
    "2025-01-01T00:00:00.000Z", "9999-12-31T23:59:59.999Z", "0000-00-00T00:00:00.000Z", "2025-01-01", "-",
)  # fmt: skip


@_kind
def _rows_edited(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Write odd values into random columns, with every rule of the file off."""

    def change(connection: sqlite3.Connection) -> str:
        told = []
        _without_triggers(connection)
        tables = _tables(connection)
        for _ in range(chance.choice([1, 1, 1, 2, 6])):
            table = chance.choice(tables)
            column = chance.choice(_columns(connection, table))
            value = chance.choice(_ODD)
            many = chance.random() < 0.3
            where = "" if many else f"WHERE rowid = (SELECT rowid FROM {table} ORDER BY random() LIMIT 1)"
            if not many:
                rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table} ORDER BY rowid")]
                if not rows:
                    continue
                where = f"WHERE rowid = {chance.choice(rows)}"
            shown = repr(value)
            told.append(f"{table}.{column} = {shown[:40]} {where}")
            # text that is not UTF-8 can be stored as text only so
            as_text = isinstance(value, bytes)
            try:
                new = "CAST(? AS TEXT)" if as_text else "?"
                connection.execute(f'UPDATE {table} SET "{column}" = {new} {where}', (value,))
            except sqlite3.Error as error:
                told.append(f"({error})")
        return "; ".join(told)

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


@_kind
def _column_spoilt(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Write one odd value into a column of every row that lets it be, with every rule of the file off."""

    def change(connection: sqlite3.Connection) -> str:
        _without_triggers(connection)
        table = chance.choice([table for table in _tables(connection) if _columns(connection, table)])
        column, value = chance.choice(_columns(connection, table)), chance.choice(_ODD)
        new = "CAST(? AS TEXT)" if isinstance(value, bytes) else "?"
        told = f"{table}.{column} = {repr(value)[:40]}"
        try:
            connection.execute(f'UPDATE OR IGNORE {table} SET "{column}" = {new}', (value,))
        except sqlite3.Error as error:
            told += f" ({error})"
        return told

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


def _tables(connection: sqlite3.Connection) -> list[str]:
    named = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0 ORDER BY name")
    return [name.decode() for (name,) in named if not name.startswith(b"sqlite_")]


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1].decode() for row in connection.execute(f"PRAGMA table_info({table})").fetchall()]


def _without_triggers(connection: sqlite3.Connection) -> None:
    """Take the triggers that guard rows away, and put none back: somebody's hand did so."""
    connection.execute("PRAGMA foreign_keys=OFF").fetchall()
    for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f'DROP TRIGGER "{name.decode()}"')


_ROW_EDITS = (
    "UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'events'",
    "UPDATE sqlite_sequence SET seq = 9223372036854775807",
    "UPDATE sqlite_sequence SET seq = 9223372036854775800",
    "UPDATE sqlite_sequence SET seq = -5",
    "UPDATE sqlite_sequence SET seq = 'x'",
    "UPDATE sqlite_sequence SET seq = NULL",
    "DELETE FROM sqlite_sequence",
    "UPDATE tasks SET attempt = 9223372036854775807",
    "UPDATE tasks SET attempt = 9223372036854775807, attempts_spent = 1 WHERE completed_at IS NULL",
    "UPDATE tasks SET attempts_spent = 9223372036854775807, max_attempts = 9223372036854775807",
    "UPDATE tasks SET attempt = -3, attempts_spent = -2",
    "UPDATE tasks SET max_attempts = 0",
    "UPDATE tasks SET owner_id = 999999",
    "UPDATE tasks SET parent_seq = task_seq",
    "UPDATE tasks SET parent_seq = 987654321",
    "UPDATE tasks SET parent_seq = (SELECT max(task_seq) FROM tasks) + 1 - task_seq",
    "UPDATE tasks SET child_session_id = 's1', kind = 'subagent'",
    "UPDATE tasks SET child_session_id = 's2', kind = 'subagent', scope = 'desktop:s1'",
    "UPDATE sessions SET parent = scope",
    "UPDATE sessions SET parent = 'desktop:s2' WHERE session_id = 's1'",
    "UPDATE sessions SET parent = 'nobody:knows'",
    "DELETE FROM sessions", "DELETE FROM owners", "DELETE FROM events", "DELETE FROM handles",
    "DELETE FROM tasks WHERE task_seq % 2", "DELETE FROM events WHERE seq % 3 = 0",
    "UPDATE handles SET role = 'owner'", "UPDATE handles SET task_seq = 424242", "UPDATE handles SET handle_id = 'x'",
    "UPDATE owners SET token = '../../../outside/canary', ended_at = NULL, \"end\" = NULL",
    "UPDATE owners SET token = char(27) || '[2J', ended_at = NULL, \"end\" = NULL",
    "UPDATE owners SET pid = 1, ended_at = NULL, \"end\" = NULL, process_start = ''",
    "UPDATE owners SET pid = -1, ended_at = NULL, \"end\" = NULL, process_start = ''",
    "UPDATE owners SET pid = 9223372036854775807, ended_at = NULL, \"end\" = NULL, process_start = ''",
    "UPDATE owners SET ended_at = NULL, \"end\" = NULL",
    "UPDATE sessions SET inbox_claim = '{\"token\": \"../../../outside/canary\", \"pid\": 1}'",
    "UPDATE sessions SET inbox_claim = '[1]', updates_claim = '5', reopened_amid = '{}'",
    "UPDATE sessions SET reopened_amid = '[9223372036854775808]', reopened_after = 9223372036854775807",
    "UPDATE tasks SET state = 'running', owner_id = 1, completed_at = NULL, attempt = 5",
    "UPDATE tasks SET state = 'pending', owner_id = NULL, completed_at = NULL",
    "UPDATE tasks SET state = 'cancel_requested', completed_at = NULL, cancel_requested_at = NULL",
    "UPDATE tasks SET function = 'work', recovery = 'rerun', mode = 'managed', completed_at = NULL, state = 'pending'",
    "UPDATE tasks SET not_before = 'whenever', state = 'pending', completed_at = NULL",
    "UPDATE tasks SET deadline = 'yesterday', timeout = -1.0",
    "UPDATE tasks SET timeout = 1e308", "UPDATE tasks SET fraction = 9e99",
    "UPDATE tasks SET process = '{\"pid\": 1, \"group\": 1}', state = 'running', completed_at = NULL",
    "UPDATE tasks SET created_at = '', updated_at = 'x'",
    "UPDATE tasks SET result = '{', state = 'completed', completed_at = created_at",
    "UPDATE events SET data = 'x'", "UPDATE events SET data = '[]'", "UPDATE events SET data = '5'",
    "UPDATE events SET seq = seq + 9223372036854770000",
    "UPDATE events SET seq = -seq", "UPDATE events SET at = 'x'", "UPDATE events SET type = 'exploded'",
    "UPDATE events SET scope = 'none'", "UPDATE events SET task_seq = 5",
    "UPDATE steps SET value = 'x', state = 'begun'", "UPDATE steps SET wake_at = 'never', state = 'retrying'",
    "UPDATE steps SET tries = 9223372036854775807", "UPDATE signals SET payload = 'x'",
    "UPDATE inbox SET acknowledged_at = NULL, data = 'x'", "UPDATE inbox SET task_seq = 9223372036854775807",
    "UPDATE handoffs SET kept = 'x', moved = '{}', cancelled = '5'", "UPDATE handoffs SET kept = '[[1,2]]'",
    "UPDATE monitors SET armed = 1, lines = -5", "UPDATE monitors SET exit_status = 9223372036854775807, armed = 1",
    "UPDATE monitors SET monitor_id = char(27)", "UPDATE updates SET line = -1, stream = 'x'",
    "INSERT INTO lash_store_version VALUES ('0001')",
)  # fmt: skip


@_kind
def _rows_wrong(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Edit rows into what no store makes: counters at their end, cycles, strangers' owners, text in the place of JSON."""
    edits = chance.sample(_ROW_EDITS, chance.choice([1, 1, 2, 3]))
    guarded = chance.random() < 0.2

    def change(connection: sqlite3.Connection) -> str:
        if not guarded:
            _without_triggers(connection)
        told = []
        for edit in edits:
            try:
                connection.execute(edit)
                told.append(edit)
            except sqlite3.Error as error:
                told.append(f"{edit} ({error})")
        return "; ".join(told)

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


@_kind
def _text_everywhere(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Put what a terminal would obey, or nobody can decode, behind every text of one table."""
    added: str | bytes = chance.choice(  # type: ignore[assignment]
        ["\x1b[2J\x1b]52;c;eA==\x07", "\u202e\u2028\n\r", "\x9b31m\x7f\x85", b"\xff\xc3", b"\0"]
    )

    def change(connection: sqlite3.Connection) -> str:
        _without_triggers(connection)
        table = chance.choice(_tables(connection))
        for column in _columns(connection, table):
            try:
                connection.execute(
                    f'UPDATE {table} SET "{column}" = CAST("{column}" || ? AS TEXT) WHERE typeof("{column}") = \'text\'',
                    (added,),
                )
            except sqlite3.Error:
                continue
        return f"{table} {added!r}"

    return _with_sqlite(path, change, hot=chance.random() < 0.3)


# --- no file of this kind -------------------------------------------------------------------------------------------


def _clear(path: Path) -> None:
    for one in path.parent.iterdir():
        shutil.rmtree(one) if one.is_dir() else one.unlink()


@_kind
def _no_database(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    content = chance.choice(
        [
            b"",
            b"\0",
            b"hello\n",
            b"SQLite format 3\0",
            b"SQLite format 3\0" + bytes(84),
            chance.randbytes(9000),
            bytes(8192),
            b"PK\x03\x04" + bytes(100),
            b"-- SQL\nCREATE TABLE x;\n" * 50,
        ]
    )
    if chance.random() < 0.5:
        _clear(path)
    path.write_bytes(content)
    return f"{content[:20]!r}, {len(content)} bytes"


@_kind
def _special(chance: random.Random, path: Path, seeds: Mapping[str, Path]) -> str:
    what = chance.choice(
        ["folder", "fifo", "device", "socket", "link", "dangling", "loop", "hard link", "stranger", "no permission"]
    )
    if what not in {"link", "hard link", "stranger", "no permission"}:
        _clear(path)
    real = path.with_name("real.db")
    match what:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path, 0o600)
        case "device":
            if os.geteuid() == 0:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            else:
                path.symlink_to("/dev/zero")
        case "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        case "link":
            path.rename(real)
            path.symlink_to(real)
        case "dangling":
            path.symlink_to(path.parent.parent / "outside" / "made.db")
        case "loop":
            path.symlink_to(path)
        case "hard link":
            os.link(path, real)
        case "stranger" if os.geteuid() == 0:
            os.chown(path, 12345, 12345)
        case _:
            path.chmod(0)
    return what


@_kind
def _planted(chance: random.Random, path: Path, _: Mapping[str, Path]) -> str:
    """Put links where the store makes files of its own: what they name must not be written."""
    outside = path.parent.parent / "outside" / "canary"
    where = chance.choice(
        ["-wal", "-shm", "-journal", "-owners", "-making", "-owners/making.lock", "-backup", "-replaced"]
    )
    what = Path(f"{path}{where}")
    if what.is_dir():
        shutil.rmtree(what)
    what.unlink(missing_ok=True)
    what.parent.mkdir(exist_ok=True, mode=0o700)
    target = chance.choice([outside, outside.with_name("made"), outside.parent])
    what.symlink_to(target)
    if chance.random() < 0.3 and path.exists():
        path.unlink()
    return f"{where} -> {target.name}"
