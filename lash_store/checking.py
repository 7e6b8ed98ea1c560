"""Owns what is looked at to say that a file is sound, or what is wrong with it; see `mending` for what is mended."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import sqlite3
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from enum import StrEnum
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from . import copies, database, guards, processes
from .copies import STAMP, is_locked, stamp_of
from .errors import StorageCorrupt, StorageError
from .identity import HEAD
from .lifecycle import JSON_COLUMNS, TERMINAL_EVENTS, fold
from .mending import MENDERS, own_files, stale_locks, wrong_definitions
from .models import EventType, ProcessIdentity, TaskState
from .owners import Life, life_of
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
    tasks = events = 0
    revision: str | None = None
    found: list[Finding] = []
    try:
        if not guards.check_target(path, writing=False) and not database.has_content(path):
            raise StorageError(f"{path} does not exist: check the path")
        revision = copies.revision_of(path)
        with closing(database.open_sqlite(path, "read")) as connection:
            # what a hand wrote need not be UTF-8
            connection.text_factory = database.replacing
            connection.execute("BEGIN").fetchall()
            connection.row_factory = sqlite3.Row
            try:
                found += _integrity(connection)
                if revision != HEAD:
                    found.append(_old(revision))
                elif not (missing := _missing_tables(connection)):
                    tasks, events = (
                        connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("tasks", "events")
                    )
                    found += _schema(connection)
                    found += _stories(connection, tasks, progress)
                    found += _rows(connection)
                    if stamp_of(connection) != STAMP:
                        # what a copy names is its original's
                        found += _at_work(connection, path)
                else:
                    found.append(_error("tables_missing", f"missing from the schema: {_few(missing)}", _RESTORE))
                found += _copy(connection)
                found += _size(connection, path)
            except sqlite3.Error as error:
                if database.primary_code(error) not in _OF_THE_FILE:
                    raise
                found.append(_damaged(f"it cannot be read to its end: {error}"))
    except (StorageCorrupt, UnicodeDecodeError) as error:
        found.append(_damaged(str(error)))
    except sqlite3.Error as error:
        database.raise_translated(error, path)
    found += _files(path)
    if repair:
        found = _repair(path, found)
    order = [*Severity]
    found.sort(key=lambda one: order.index(one.severity))
    return CheckReport(path=path, revision=revision, tasks=tasks, events=events, findings=tuple(found))


_OF_THE_FILE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""What SQLite says of a file that is wrong, and not of a disk or a moment that is."""


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


def _missing_tables(connection: sqlite3.Connection) -> list[str]:
    there = {row["name"] for row in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    return sorted(metadata.tables.keys() - there)


def _schema(connection: sqlite3.Connection) -> Iterator[Finding]:
    missing, changed = wrong_definitions(connection)
    if missing or changed:
        told = [f"{kind}: {_few(names)}" for kind, names in (("missing", missing), ("changed", changed)) if names]
        yield _warning(
            "schema_changed",
            f"indexes, triggers or views are not what they should be: {'; '.join(told)}",
            "lash-store doctor --repair makes them again",
            can_repair=True,
        )
    triggers = connection.execute("SELECT name, tbl_name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    foreign = [name for name, table in triggers if table in {*metadata.tables, *VIEWS} and name not in TRIGGERS]
    if foreign:
        # a program may have its own
        yield _info(
            "foreign_trigger",
            f"triggers on the store's tables that are not the store's: {_few(foreign)}",
            "see what they do, with lash-store schema; drop those that you did not write: DROP TRIGGER name",
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
        columns, is_ended = _told_by(list(map(dict, story)), task)
        if columns:
            differ.append(f"{name}: {', '.join(columns)}")
        if not is_ended:
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


def _told_by(story: list[dict[str, Any]], task: sqlite3.Row) -> tuple[list[str], bool]:
    """Return the columns of a row that are not what its events say, and whether its end stands where it should."""
    row = {name: task[name] for name in task.keys()}  # noqa: SIM118, a Row iterates over its values
    try:
        events = [{**event, "data": json.loads(event["data"])} for event in story]
        folded = fold(events)
        columns = [name for name, value in row.items() if folded.get(name) != _plain(name, value)]
        return sorted(columns), _ends_as_it_should(events, row["state"])
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        # whatever a hand or a broken page made of it
        return ["all"], True


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
        "SELECT 'tasks' WHERE (SELECT max(task_seq) FROM tasks) > "
        "coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'tasks'), 0) UNION ALL "
        "SELECT 'events' WHERE (SELECT max(seq) FROM events) > "
        "coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'events'), 0)",
        _RESTORE,
    ),
)


def _rows(connection: sqlite3.Connection) -> Iterator[Finding]:
    for code, message, question, next_step in _QUESTIONS:
        found = [row[0] for row in connection.execute(question)]
        if found:
            yield _error(code, f"{message}: {_few(found)}", next_step)


# --- owners and processes -------------------------------------------------------------------------------------------

_LIVE_OF = "SELECT count(*) FROM tasks WHERE owner_id = ? AND completed_at IS NULL"


def _at_work(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    yield from _cancels(connection)
    yield from _owners(connection, path)
    yield from _processes(connection, path)


def _cancels(connection: sqlite3.Connection) -> Iterator[Finding]:
    stuck = [
        f"#{task_seq} ({scope} {task_id}) for {seconds:.0f} s"
        for task_seq, scope, task_id, seconds in connection.execute(
            "SELECT task_seq, scope, id, (julianday('now') - julianday(cancel_requested_at)) * 86400 AS seconds "
            "FROM tasks WHERE completed_at IS NULL AND state = 'cancel_requested' AND seconds > ?",
            (_LONG_CANCEL,),
        )
    ]
    if stuck:
        yield _warning(
            "stuck_cancel",
            f"cancels that have not come to an end: {_few(stuck)}",
            "the body swallows its cancellation, or its owner is stuck: lash-store abandon '#N' --reason TEXT",
        )


def _open_owners(connection: sqlite3.Connection) -> list[OwnerRow]:
    return [OwnerRow._make(row) for row in connection.execute(ALL_OPEN_OWNERS)]


def _owners(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    for owner in _open_owners(connection):
        life = life_of(path, owner)
        if life is Life.ALIVE and not _is_stopped(owner.pid):
            continue
        [(count,)] = connection.execute(_LIVE_OF, (owner.owner_id,)).fetchall()
        # the state that is looked at is of a moment ago: who has ended since is not dead
        if not _still(path, "SELECT 1 FROM owners WHERE owner_id = ? AND ended_at IS NULL", owner.owner_id):
            continue
        name = f"owner {owner.owner_id} (process {owner.pid}, runtime {owner.runtime!r})"
        has = f"{count} live tasks"
        abandon = f"lash-store abandon --owner {owner.owner_id} --reason TEXT"
        match life:
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
                    f"is this a copy of its file? Else stop the process, or give its work up: {abandon}",
                )
            case Life.ALIVE:
                yield _warning(
                    "stopped_owner",
                    f"{name} is stopped (SIGSTOP, or a debugger), with {has}",
                    f"let it go on: kill -CONT {owner.pid}; or give its work up: {abandon}",
                )
    [(left,)] = connection.execute(
        "SELECT count(*) FROM tasks AS t JOIN owners AS o ON o.owner_id = t.owner_id "
        "WHERE t.completed_at IS NULL AND o.ended_at IS NOT NULL"
    ).fetchall()
    if left:
        yield _warning(
            "left_behind",
            f"{left} live tasks stand under owners that have ended",
            "open the file with its runtime: they are recovered then",
        )


def _still(path: Path, question: str, *parameters: Any) -> bool:
    """Ask the file as it is now."""
    with closing(database.open_sqlite(path, "read")) as connection:
        return bool(connection.execute(question, parameters).fetchall())


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in {"T", "t"}
    return False


def _processes(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    """Name processes of monitors whose owner is gone."""
    alive = {owner.owner_id for owner in _open_owners(connection) if life_of(path, owner) is not Life.DEAD}
    left = []
    for task_seq, owner_id, process in connection.execute(
        "SELECT task_seq, owner_id, process FROM tasks WHERE process IS NOT NULL AND completed_at IS NULL"
    ).fetchall():
        if owner_id in alive:
            continue
        with suppress(ValueError):
            known = ProcessIdentity.model_validate_json(process)
            same = "SELECT 1 FROM tasks WHERE task_seq = ? AND owner_id IS ? AND process = ?"
            if processes.survivors(known) and _still(path, same, task_seq, owner_id, process):
                left.append(f"{known.pid} (of #{task_seq})")
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
    shrinks = connection.execute("PRAGMA auto_vacuum").fetchone()[0] != 0
    if free * page_size > least and free > pages * share:
        vacuum = f"stop its owners, then: sqlite3 {shlex.quote(str(path))} 'PRAGMA auto_vacuum = INCREMENTAL; VACUUM'"
        yield _info(
            "free_pages",
            f"{free * page_size:,} of {pages * page_size:,} bytes hold nothing",
            "lash-store doctor --repair gives them back" if shrinks else vacuum,
            can_repair=shrinks,
        )
    mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    if mode != "wal":
        yield _warning(
            "not_wal",
            f"the file is in journal mode {mode!r}, in which no store can work on it",
            "lash-store doctor --repair puts it into WAL mode again",
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
    open_to_others = []
    for one in own_files(path):
        with suppress(FileNotFoundError):
            found = one.stat()
            if found.st_mode & 0o077:
                open_to_others.append((one.name, found))
    if open_to_others:
        told = _few(f"{name} (mode {stat.S_IMODE(found.st_mode):04o})" for name, found in open_to_others)
        yield _warning(
            "permissions",
            f"others may read or write {told}",
            "lash-store doctor --repair takes that away",
            can_repair=all(found.st_uid == os.geteuid() for _, found in open_to_others),
        )
    if locks := stale_locks(path):
        yield _info(
            "stale_locks",
            f"lock files that nobody holds: {_few(lock.name for lock in locks)}",
            "lash-store doctor --repair removes them",
            can_repair=True,
        )
    beside = sorted(path.parent.glob(f"{glob.escape(path.name)}-*"))
    left = [one.name for one in beside if one.name.endswith("-making") and not is_locked(one)]
    if left:
        yield _info(
            "half_made",
            f"what a killed backup or restore left: {_few(left)}",
            "the next one removes it",
        )
    kept = [one.name for one in beside if _is_kept(one)]
    if kept:
        yield _info(
            "kept_files",
            f"files that upgrades and restores have kept: {_few(kept)}",
            "remove them once you are sure that you need them no more",
        )


_KEPT = re.compile(r"(\.backup|-replaced)(-\d+)?(-wal|-journal)?$")


def _is_kept(path: Path) -> bool:
    found = _KEPT.search(path.name)
    # a reader leaves an empty one beside what it looked at
    return found is not None and (found[3] is None or path.stat().st_size > 0)


def _repair(path: Path, found: list[Finding]) -> list[Finding]:
    """Mend what can be mended without loss; what is damaged is left as it is, for nothing may be written to it."""
    if any(one.severity is Severity.ERROR for one in found):
        return found
    guards.check_target(path, writing=True)
    mended = []
    for one in found:
        if one.can_repair:
            try:
                MENDERS[one.code](path)
                one = one.model_copy(update={"is_repaired": True})
            except (sqlite3.Error, OSError) as error:
                note = f"{one.next_step} (not now: {error})"
                one = one.model_copy(update={"next_step": note})
        mended.append(one)
    return mended
