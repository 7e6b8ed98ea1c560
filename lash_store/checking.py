"""Owns what is looked at to say that a file is sound, or what is wrong with it; mends only what cannot lose anything."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from . import database, guards, processes
from .copies import STAMP, stamp_of
from .errors import StorageError
from .identity import HEAD
from .lifecycle import JSON_COLUMNS, TERMINAL_EVENTS, fold
from .models import EventType, ProcessIdentity, TaskState
from .owners import Life, life_of, sweep
from .queries import ALL_OPEN_OWNERS, OwnerRow
from .schema import TRIGGERS, VIEWS, metadata

__all__ = ["CheckReport", "Finding", "Severity", "check"]

_FEW = 5
"""How many things of one kind a finding names."""

_LONG_CANCEL = 60.0
"""Seconds after which a cancel that has not come to an end is worth a word."""

_MUCH_WAL = 64 * 1024 * 1024
_MUCH_FREE = 0.25, 4 * 1024 * 1024


class Severity(StrEnum):
    """How bad a finding is: something is lost or wrong, somebody should do something, or only worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Finding(BaseModel):
    """
    One thing that was found: a stable *code*, what it is in a sentence, and the *next_step*.

    *can_repair*: it is mended without loss by asking for that; *is_repaired*: it was.
    """

    model_config = ConfigDict(frozen=True)

    severity: Severity
    code: str
    message: str
    next_step: str
    can_repair: bool = False
    is_repaired: bool = False


class CheckReport(BaseModel):
    """What a check of a file found, worst first; *tasks* and *events* were looked at."""

    model_config = ConfigDict(frozen=True)

    path: Path
    revision: str | None
    tasks: int
    events: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is lost or wrong, and nothing is left to be done."""
        return all(one.severity is Severity.INFO or one.is_repaired for one in self.findings)


Progress = Callable[[int, int], object]
"""Called with how many tasks were looked at, and how many there are."""


def check(path: Path, *, repair: bool = False, progress: Progress | None = None) -> CheckReport:
    """
    Look at a whole file, on one state of it, beside whoever writes; *repair* mends what is safe to mend.

    Blocks; for a thread.

    Raises:
        NotAStore, SchemaTooNew, StorageError: there is nothing to look at.
    """
    path = guards.resolve(path)
    if not guards.check_target(path, writing=False):
        raise StorageError(f"{path} does not exist: check the path")
    revision = database.probe(path)
    tasks = events = 0
    found: list[Finding] = []
    with closing(database.open_sqlite(path, "read")) as connection:
        connection.execute("BEGIN").fetchall()
        connection.row_factory = sqlite3.Row
        try:
            found += _integrity(connection)
            if revision != HEAD:
                found.append(_old(revision))
            else:
                tasks, events = (
                    connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("tasks", "events")
                )
                found += _schema(connection)
                found += _stories(connection, tasks, progress)
                found += _rows(connection)
                found += _owners(connection, path)
                found += _processes(connection, path)
            found += _copy(connection)
            found += _size(connection, path)
        except sqlite3.Error as error:
            found.append(_damaged(f"it cannot be read to its end: {error}"))
        finally:
            connection.row_factory = None
    found += _files(path)
    if repair:
        found = _repair(path, found)
    order = [*Severity]
    found.sort(key=lambda one: order.index(one.severity))
    return CheckReport(path=path, revision=revision, tasks=tasks, events=events, findings=tuple(found))


def _error(code: str, message: str, next_step: str) -> Finding:
    return Finding(severity=Severity.ERROR, code=code, message=message, next_step=next_step)


def _warning(code: str, message: str, next_step: str, *, can_repair: bool = False) -> Finding:
    return Finding(severity=Severity.WARNING, code=code, message=message, next_step=next_step, can_repair=can_repair)


def _info(code: str, message: str, next_step: str, *, can_repair: bool = False) -> Finding:
    return Finding(severity=Severity.INFO, code=code, message=message, next_step=next_step, can_repair=can_repair)


def _few(names: Iterable[object]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:_FEW]) + (f" and {len(shown) - _FEW} more" if len(shown) > _FEW else "")


# --- the file as SQLite sees it -------------------------------------------------------------------------------------

_RESTORE = "stop whoever uses it, and put a backup in its place: lash-store restore BACKUP"


def _damaged(message: str) -> Finding:
    return _error("damaged", message, _RESTORE)


def _integrity(connection: sqlite3.Connection) -> Iterator[Finding]:
    wrong = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({_FEW})").fetchall()]
    if wrong != ["ok"]:
        yield _damaged(f"SQLite's integrity check: {'; '.join(wrong)}")
    orphans = [tuple(row) for row in connection.execute("PRAGMA foreign_key_check").fetchall()]
    if orphans:
        named = _few(f"{table} row {row} without its {parent}" for table, row, parent, _ in orphans)
        yield _error("orphans", f"rows without the row they belong to: {named}", _RESTORE)


def _old(revision: str | None) -> Finding:
    return _warning(
        "old_revision",
        f"the file is at revision {revision or 'none'}, this lash_store knows {HEAD}: only the file itself was checked",
        "close its owners, then run lash-store upgrade",
    )


def _schema(connection: sqlite3.Connection) -> Iterator[Finding]:
    there = {row["name"]: row for row in connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_schema")}
    ours = {*metadata.tables, *TRIGGERS, *VIEWS}
    indexes = {str(index.name) for table in metadata.tables.values() for index in table.indexes}
    missing = sorted((ours | indexes) - there.keys())
    if missing:
        yield _error("schema_changed", f"missing from the schema: {_few(missing)}", _RESTORE)
    foreign = [
        row["name"]
        for name, row in there.items()
        if row["type"] == "trigger" and row["tbl_name"] in metadata.tables and name not in TRIGGERS
    ]
    if foreign:
        yield _warning(
            "foreign_trigger",
            f"triggers of somebody else's on the store's tables: {_few(foreign)}",
            "look at them with .schema in the sqlite3 shell; drop those you did not write",
        )


# --- rows and their events ------------------------------------------------------------------------------------------


def _stories(connection: sqlite3.Connection, count: int, progress: Progress | None) -> Iterator[Finding]:
    """Fold every task's events and hold them against its row."""
    differ: list[str] = []
    ends: list[str] = []
    silent: list[str] = []
    told = connection.execute("SELECT * FROM events WHERE task_seq IS NOT NULL ORDER BY task_seq, seq")
    stories = groupby(told, itemgetter("task_seq"))
    task_seq, story = next(stories, (None, iter(())))
    for looked_at, task in enumerate(connection.execute("SELECT * FROM tasks ORDER BY task_seq"), 1):
        name = f"#{task['task_seq']} ({task['scope']} {task['id']})"
        while task_seq is not None and task_seq < task["task_seq"]:
            task_seq, story = next(stories, (None, iter(())))
        if task_seq != task["task_seq"]:
            silent.append(name)
            continue
        events = [{**event, "data": json.loads(event["data"])} for event in map(dict, story)]
        columns = _differences(events, task)
        if columns:
            differ.append(f"{name}: {', '.join(columns)}")
        if not _ends_as_it_should(events, task["state"]):
            ends.append(name)
        if progress is not None and (looked_at % 500 == 0 or looked_at == count):
            progress(looked_at, count)
    if silent:
        yield _error("no_events", f"tasks without any event: {_few(silent)}", _RESTORE)
    if differ:
        yield _error(
            "fold",
            f"rows that are not what their events say, in the columns named: {_few(differ)}",
            "somebody edited the row by hand, or the file was damaged: lash-store show tells the events; " + _RESTORE,
        )
    if ends:
        yield _error("ends", f"tasks whose end does not stand once, as the last event: {_few(ends)}", _RESTORE)


def _differences(events: list[dict[str, Any]], task: sqlite3.Row) -> list[str]:
    try:
        folded = fold(events)
    except (KeyError, TypeError, ValueError):
        return ["all"]
    row = {name: task[name] for name in task.keys()}  # noqa: SIM118, a Row iterates over its values
    return sorted(name for name, value in row.items() if folded.get(name) != _plain(name, value))


def _plain(name: str, value: Any) -> Any:
    return json.loads(value) if name in JSON_COLUMNS and value is not None else value


def _ends_as_it_should(events: list[dict[str, Any]], state: str) -> bool:
    ends = [event["type"] for event in events if event["type"] in TERMINAL_EVENTS]
    told = [event["type"] for event in events if event["type"] != EventType.TRANSFERRED]
    return ends == ([state] if TaskState(state).is_terminal else []) and (not ends or told[-1] == ends[0])


_QUESTIONS: tuple[tuple[str, str, str, str], ...] = (
    (
        "no_owner_handle",
        "tasks without an owner's handle, which nobody can await",
        "SELECT '#' || t.task_seq FROM tasks AS t WHERE NOT EXISTS "
        "(SELECT 1 FROM handles AS h WHERE h.task_seq = t.task_seq AND h.role = 'owner')",
        _RESTORE,
    ),
    (
        "handle_astray",
        "owner's handles in another session than their task",
        "SELECT h.handle_id FROM handles AS h JOIN tasks AS t ON t.task_seq = h.task_seq "
        "WHERE h.role = 'owner' AND h.scope <> t.scope",
        _RESTORE,
    ),
    (
        "tombstone_and_row",
        "tasks that are there and said to be pruned",
        "SELECT '#' || t.task_seq FROM tombstones AS t JOIN tasks AS k ON k.task_seq = t.task_seq",
        _RESTORE,
    ),
    (
        "number_used_twice",
        "tables whose next number is one they have",
        "SELECT 'tasks' WHERE (SELECT max(task_seq) FROM tasks) > (SELECT seq FROM sqlite_sequence WHERE name = 'tasks') "
        "UNION ALL "
        "SELECT 'events' WHERE (SELECT max(seq) FROM events) > (SELECT seq FROM sqlite_sequence WHERE name = 'events')",
        _RESTORE,
    ),
)


def _rows(connection: sqlite3.Connection) -> Iterator[Finding]:
    for code, message, question, next_step in _QUESTIONS:
        found = [row[0] for row in connection.execute(question)]
        if found:
            yield _error(code, f"{message}: {_few(found)}", next_step)
    stuck = [
        f"#{row['task_seq']} ({row['scope']} {row['id']}) for {row['seconds']:.0f} s"
        for row in connection.execute(
            "SELECT task_seq, scope, id, (julianday('now') - julianday(cancel_requested_at)) * 86400 AS seconds "
            "FROM tasks WHERE state = 'cancel_requested' AND completed_at IS NULL"
        )
        if row["seconds"] > _LONG_CANCEL
    ]
    if stuck:
        yield _warning(
            "stuck_cancel",
            f"cancels that have not come to an end: {_few(stuck)}",
            "the body swallows its cancellation, or its owner is stuck: lash-store abandon SCOPE ID --reason …",
        )


# --- owners and processes -------------------------------------------------------------------------------------------


def _open_owners(connection: sqlite3.Connection) -> list[OwnerRow]:
    return [OwnerRow._make(row) for row in connection.execute(ALL_OPEN_OWNERS)]


def _owners(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    live: Mapping[int | None, int] = dict(
        connection.execute(
            "SELECT owner_id, count(*) FROM tasks WHERE completed_at IS NULL GROUP BY owner_id"
        ).fetchall()
    )
    for owner in _open_owners(connection):
        name = f"owner {owner.owner_id} (process {owner.pid}, runtime {owner.runtime!r})"
        has = f"{live.get(owner.owner_id, 0)} live tasks"
        match life_of(path, owner):
            case Life.DEAD:
                yield _warning(
                    "dead_owner",
                    f"{name} is dead, and nobody has recovered its {has}",
                    f"open the file with TaskStore(…, runtime={owner.runtime!r}): its work is recovered then",
                )
            case Life.UNREACHABLE:
                yield _warning(
                    "unreachable_owner",
                    f"{name} has no lock file here, yet its process lives, with {has}: it is not robbed",
                    "is this a copy of its file? Else stop the process; lash-store abandon --owner gives its work up",
                )
            case Life.ALIVE if _is_stopped(owner.pid):
                yield _warning(
                    "stopped_owner",
                    f"{name} is stopped (SIGSTOP, or a debugger), with {has}",
                    f"let it go on: kill -CONT {owner.pid}; or give its work up: lash-store abandon --owner {owner.owner_id}",
                )
    left = sum(
        count
        for owner_id, count in live.items()
        if owner_id is not None
        and connection.execute(
            "SELECT 1 FROM owners WHERE owner_id = ? AND ended_at IS NOT NULL", (owner_id,)
        ).fetchone()
    )
    if left:
        yield _warning(
            "left_behind",
            f"{left} live tasks stand under owners that have ended",
            "open the file with its runtime: they are recovered then",
        )


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in {"T", "t"}
    return False


def _processes(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    """Name processes of monitors whose owner is gone."""
    alive = {owner.owner_id for owner in _open_owners(connection) if life_of(path, owner) is not Life.DEAD}
    left = []
    for row in connection.execute("SELECT task_seq, owner_id, process FROM tasks WHERE process IS NOT NULL"):
        if row["owner_id"] in alive:
            continue
        with suppress(ValueError):
            process = ProcessIdentity.model_validate_json(row["process"])
            if processes.survivors(process):
                left.append(f"{process.pid} (of #{row['task_seq']})")
    if left:
        yield _warning(
            "process_left",
            f"processes of monitors whose owner is dead run on: {_few(left)}",
            "open the file with its runtime: they are ended then",
        )


# --- the file beside others -----------------------------------------------------------------------------------------


def _copy(connection: sqlite3.Connection) -> Iterator[Finding]:
    if stamp_of(connection) == STAMP:
        yield _info(
            "copy",
            "the file is a copy, made by a backup: it is not run as it is",
            "lash-store restore puts it in its original's place; TaskStore(…, adopt=True) makes it a store of its own",
        )


def _size(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    page_size, pages, free = (
        connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_size", "page_count", "freelist_count")
    )
    share, least = _MUCH_FREE
    if free * page_size > least and free > pages * share:
        yield _info(
            "free_pages",
            f"{free * page_size:,} of {pages * page_size:,} bytes hold nothing",
            "lash-store doctor --repair gives them back",
            can_repair=True,
        )
    wal = Path(f"{path}-wal")
    with suppress(FileNotFoundError):
        if wal.stat().st_size > _MUCH_WAL:
            yield _info(
                "long_wal",
                f"{wal.name} has {wal.stat().st_size:,} bytes: a reader that stays in its transaction keeps it from shrinking",
                "end that reader; lash-store doctor --repair empties it",
                can_repair=True,
            )


def _files(path: Path) -> Iterator[Finding]:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        yield _warning(
            "permissions",
            f"others may read or write the file (mode {mode:04o})",
            "lash-store doctor --repair takes that away",
            can_repair=path.stat().st_uid == os.geteuid(),
        )
    left = [one for one in (Path(f"{path}-making"), Path(f"{path}-backup-making")) if one.exists()]
    if left:
        yield _info(
            "half_made",
            f"what a killed backup or restore left: {_few(one.name for one in left)}",
            "the next one removes it",
        )
    kept = sorted(
        one.name
        for one in path.parent.glob(f"{_escaped(path.name)}-*")
        if (".backup" in one.name or "-replaced" in one.name) and not one.name.endswith(("-wal", "-shm", "-owners"))
    )
    if kept:
        yield _info(
            "kept_files",
            f"files that upgrades and restores have kept: {_few(kept)}",
            "remove them once you are sure that you need them no more",
        )


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "[]*?" else char for char in name)


# --- mending --------------------------------------------------------------------------------------------------------


def _repair(path: Path, found: list[Finding]) -> list[Finding]:
    """Mend what can be mended without loss; what is damaged is left as it is, for nothing may be written to it."""
    if any(one.severity is Severity.ERROR for one in found):
        return found
    guards.check_target(path, writing=True)
    mended = []
    for one in found:
        if one.can_repair:
            try:
                _MENDERS[one.code](path)
                one = one.model_copy(update={"is_repaired": True})
            except sqlite3.Error as error:
                note = f"{one.next_step} (not now: {error})"
                one = one.model_copy(update={"next_step": note})
        mended.append(one)
    _sweep(path)
    return mended


def _give_back(path: Path) -> None:
    with closing(database.open_sqlite(path, "write")) as connection:
        connection.execute("PRAGMA busy_timeout=5000").fetchall()
        left = -1
        while (free := connection.execute("PRAGMA freelist_count").fetchone()[0]) not in {0, left}:
            left = free
            connection.execute("BEGIN IMMEDIATE").fetchall()
            for _ in range(256):
                connection.execute("PRAGMA incremental_vacuum(1)").fetchall()
            connection.execute("COMMIT").fetchall()


def _empty_wal(path: Path) -> None:
    with closing(database.open_sqlite(path, "write")) as connection:
        connection.execute("PRAGMA busy_timeout=5000").fetchall()
        [(is_busy, _, _)] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if is_busy:
            raise sqlite3.OperationalError("a reader or a writer is at it")


_MENDERS: Mapping[str, Callable[[Path], None]] = {
    "permissions": guards.make_private,
    "free_pages": _give_back,
    "long_wal": _empty_wal,
}


def _sweep(path: Path) -> None:
    """Remove the lock files of owners that have ended."""
    with suppress(sqlite3.Error), closing(database.open_sqlite(path, "write")) as connection:
        connection.execute("PRAGMA busy_timeout=5000").fetchall()
        connection.execute("BEGIN IMMEDIATE").fetchall()
        ended = connection.execute("SELECT token FROM owners WHERE ended_at IS NOT NULL").fetchall()
        sweep(path, [token for (token,) in ended])
        connection.execute("ROLLBACK").fetchall()
