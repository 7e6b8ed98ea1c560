"""Owns what is looked at to say that a file is sound, or what is wrong with it; see `mending` for what is mended."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import closing, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from . import database, guards, reader, revisions, translation
from .copies import has_bytes, is_copy, is_locked
from .errors import StorageCorrupt, StorageError
from .findings import FEW, CheckReport, Finding, Severity, fault, few, info, warning
from .identity import HEAD
from .lifecycle import JSON_COLUMNS, TERMINAL_EVENTS, fold
from .mending import MENDERS, own_files, stale_locks, wrong_definitions
from .models import EventType, TaskState
from .schema import TRIGGERS, VIEWS, metadata
from .strangers import meddlers
from .vitality import at_work

__all__ = ["CheckReport", "Finding", "Severity", "check"]

_MUCH_WAL = 64 * 1024 * 1024
_MUCH_FREE = 0.25, 4 * 1024 * 1024

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
    seen = _look(path, progress)
    if any(one.code == "damaged" for one in seen.found):
        # a passing read error can look like damage: it is believed once it is seen again
        seen = _look(path, progress)
    found = [*seen.found, *_files(path)]
    if repair:
        found = _repair(path, found)
    order = [*Severity]
    found.sort(key=lambda one: order.index(one.severity))
    return CheckReport(path=path, revision=seen.revision, tasks=seen.tasks, events=seen.events, findings=tuple(found))


class _Seen(NamedTuple):
    """What one look at a file's contents found."""

    found: list[Finding]
    revision: str | None
    tasks: int
    events: int


def _look(path: Path, progress: Progress | None) -> _Seen:
    tasks = events = 0
    revision: str | None = None
    found: list[Finding] = []
    try:
        is_there = guards.check_target(path, writing=False)
        if not database.has_content(path):
            raise StorageError(f"{path} {'is empty' if is_there else 'does not exist'}: check the path")
        revision = database.probe(path)
        with closing(database.open_sqlite(path, "read")) as connection:
            # what a hand wrote need not be UTF-8
            connection.text_factory = reader.replacing
            connection.execute("BEGIN").fetchall()
            connection.row_factory = sqlite3.Row
            try:
                found += _integrity(connection)
                # once more, of the state that is looked at: somebody may have upgraded it since
                revision = database.read_revision(connection, path)
                database.check_revision(revision, path)
                if revision != HEAD:
                    found.append(_old(revision))
                elif not (missing := _missing_tables(connection)):
                    tasks, events = (
                        connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("tasks", "events")
                    )
                    found += _contents(connection, path, tasks, progress)
                else:
                    found.append(fault("tables_missing", f"missing from the schema: {few(missing)}", _RESTORE))
                found += _copy(connection)
                found += _size(connection, path)
            except translation.DRIVER_ERRORS as error:
                if translation.primary_code(error) not in _OF_THE_FILE:
                    raise
                found.append(_damaged(f"it cannot be read to its end: {error}"))
    except (StorageCorrupt, UnicodeDecodeError) as error:
        found.append(_damaged(str(error)))
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, path)
    return _Seen(found, revision, tasks, events)


def _contents(connection: sqlite3.Connection, path: Path, tasks: int, progress: Progress | None) -> Iterator[Finding]:
    yield from _schema(connection)
    # what a broken page calls a number need not be one
    told = connection.execute("SELECT * FROM events WHERE typeof(task_seq) = 'integer' ORDER BY task_seq, seq")
    # an error that somebody keeps would keep a statement in the middle of a read, and with it the file open
    with closing(told), closing(connection.execute("SELECT * FROM tasks ORDER BY task_seq")) as rows:
        yield from _stories(told, rows, tasks, progress)
    yield from _rows(connection)
    if not is_copy(connection):
        # what a copy names is its original's
        yield from at_work(connection, path)


_OF_THE_FILE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""What SQLite says of a file that is wrong, and not of a disk or a moment that is."""


# --- the file as SQLite sees it -------------------------------------------------------------------------------------

_RESTORE = "stop whoever uses it, and put a backup in its place: lash-store restore BACKUP"


def _damaged(message: str) -> Finding:
    return fault("damaged", message, _RESTORE)


def _integrity(connection: sqlite3.Connection) -> Iterator[Finding]:
    wrong = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({FEW})").fetchall()]
    if wrong != ["ok"]:
        yield _damaged(f"SQLite's integrity check: {'; '.join(wrong)}")
    orphans = [tuple(row) for row in connection.execute("PRAGMA foreign_key_check").fetchall()]
    if orphans:
        named = few(f"{table} row {row} without its {parent}" for table, row, parent, _ in orphans)
        yield fault("orphans", f"rows without the row they belong to: {named}", _RESTORE)


def _old(revision: str | None) -> Finding:
    return warning(
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
        told = [f"{kind}: {few(names)}" for kind, names in (("missing", missing), ("changed", changed)) if names]
        yield warning(
            "schema_changed",
            f"indexes, triggers or views are not what they should be: {'; '.join(told)}",
            "lash-store doctor --repair makes them again",
            can_repair=True,
        )
    triggers = connection.execute("SELECT name, tbl_name FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    meddling = meddlers(connection)
    if meddling:
        yield fault(
            "meddling_trigger",
            f"triggers that change what the store writes, and are not the store's: {few(meddling)}",
            "see what they do, with lash-store schema, and drop them: DROP TRIGGER name; no store opens the file before",
        )
    foreign = [
        name
        for name, table in triggers
        if table in {*metadata.tables, *VIEWS} and name not in TRIGGERS and name not in meddling
    ]
    if foreign:
        # a program may have its own
        yield info(
            "foreign_trigger",
            f"triggers on the store's tables that are not the store's: {few(foreign)}",
            "see what they do, with lash-store schema; drop those that you did not write: DROP TRIGGER name",
        )


# --- rows and their events ------------------------------------------------------------------------------------------


def _stories(told: sqlite3.Cursor, rows: sqlite3.Cursor, count: int, progress: Progress | None) -> Iterator[Finding]:
    """Fold every task's events and hold them against its row."""
    differ: list[str] = []
    lost: list[str] = []
    ends: list[str] = []
    silent: list[str] = []
    stories = groupby(told, itemgetter("task_seq"))
    task_seq, story = next(stories, (None, iter(())))
    for looked_at, task in enumerate(rows, 1):
        name = f"#{task['task_seq']} ({task['scope']} {task['id']})"
        while task_seq is not None and task_seq < task["task_seq"]:
            task_seq, story = next(stories, (None, iter(())))
        if task_seq != task["task_seq"]:
            silent.append(name)
            continue
        columns, is_ended = _told_by(list(map(dict, story)), task)
        if columns:
            (lost if _may_have_been_taken_down(columns, task) else differ).append(f"{name}: {', '.join(columns)}")
        if not is_ended:
            ends.append(name)
        if progress is not None and (looked_at % 500 == 0 or looked_at == count):
            progress(looked_at, count)
    if silent:
        yield fault("no_events", f"tasks without any event: {few(silent)}", _RESTORE)
    if differ:
        yield fault(
            "fold",
            f"rows that are not what their events say, in the columns named: {few(differ)}",
            "somebody edited the row by hand, or the file was damaged: lash-store show tells the events; " + _RESTORE,
        )
    if lost:
        yield info(
            "lost_columns",
            f"rows without what their events say, in columns that no file of the first revision has: {few(lost)}",
            "nothing, if the file was taken back to an older revision and up again: the downgrade said what it loses. Else "
            "somebody edited the rows by hand",
        )
    if ends:
        yield fault("ends", f"tasks whose end does not stand once, as the last event: {few(ends)}", _RESTORE)


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


def _may_have_been_taken_down(columns: Collection[str], task: sqlite3.Row) -> bool:
    """Whether a downgrade and an upgrade after it leave a row so: what a later revision added has its default again."""
    _, first, *_ = revisions.shapes().values()
    newest = revisions.shape(HEAD).columns["tasks"]
    return all(
        name in newest and name not in first.columns["tasks"] and _literal(task[name]) == newest[name]
        for name in columns
    )


def _literal(value: Any) -> str:
    return "NULL" if value is None else repr(value)


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
            yield fault(code, f"{message}: {few(found)}", next_step)


# --- the file beside others -----------------------------------------------------------------------------------------


def _copy(connection: sqlite3.Connection) -> Iterator[Finding]:
    if is_copy(connection):
        yield info(
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
        yield info(
            "free_pages",
            f"{free * page_size:,} of {pages * page_size:,} bytes hold nothing",
            "lash-store doctor --repair gives them back" if shrinks else vacuum,
            can_repair=shrinks,
        )
    mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    # of a file that it may only read as unchanging, SQLite does not say how it is written
    if mode != "wal" and not database.is_alone(path):
        yield warning(
            "not_wal",
            f"the file is in journal mode {mode!r}, in which no store can work on it",
            "lash-store doctor --repair puts it into WAL mode again",
            can_repair=True,
        )
    wal = Path(f"{path}-wal")
    with suppress(FileNotFoundError):
        if wal.stat().st_size > _MUCH_WAL:
            yield info(
                "long_wal",
                f"{wal.name} has {wal.stat().st_size:,} bytes: a reader that stays in its transaction keeps it from shrinking",
                "end that reader; lash-store doctor --repair empties it",
                can_repair=True,
            )


def _files(path: Path) -> Iterator[Finding]:
    links, open_to_others = [], []
    for one in own_files(path):
        with suppress(FileNotFoundError):
            found = one.lstat()
            if stat.S_ISLNK(found.st_mode):
                links.append(one.name)
            elif found.st_mode & 0o077:
                open_to_others.append((one.name, found))
    if links:
        yield warning(
            "links",
            f"where SQLite has files of its own, there is a link: {few(links)}",
            "close the file, see what the link names, and remove it: a store may not be able to open the file",
        )
    if open_to_others:
        told = few(f"{name} (mode {stat.S_IMODE(found.st_mode):04o})" for name, found in open_to_others)
        yield warning(
            "permissions",
            f"others may read or write {told}",
            "lash-store doctor --repair takes that away",
            can_repair=all(found.st_uid == os.geteuid() for _, found in open_to_others),
        )
    if locks := stale_locks(path):
        yield info(
            "stale_locks",
            f"lock files that nobody holds: {few(lock.name for lock in locks)}",
            "lash-store doctor --repair removes them",
            can_repair=True,
        )
    beside = sorted(path.parent.glob(f"{glob.escape(path.name)}-*"))
    left = [one.name for one in beside if one.name.endswith("-making") and not is_locked(one)]
    if left:
        yield info(
            "half_made",
            f"what a killed backup or restore left: {few(left)}",
            "the next one removes it",
        )
    kept = [one.name for one in beside if _is_kept(one)]
    if kept:
        yield info(
            "kept_files",
            f"files that upgrades and restores have kept: {few(kept)}",
            "remove them once you are sure that you need them no more",
        )


_KEPT = re.compile(r"(\.backup|-replaced)(-\d+)?(-wal|-journal)?$")


def _is_kept(path: Path) -> bool:
    found = _KEPT.search(path.name)
    # a reader leaves an empty one beside what it looked at
    return found is not None and (found[3] is None or has_bytes(path))


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
            except (*translation.DRIVER_ERRORS, OSError) as error:
                note = f"{one.next_step} (not now: {error})"
                one = one.model_copy(update={"next_step": note})
        mended.append(one)
    return mended
