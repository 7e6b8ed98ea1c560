"""Owns how commands look at a file through plain SQLite, once it is known to be one of ours; neither prints nor writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import database, guards, reader, translation
from ..errors import StorageError, TaskNotFound, UnknownSession
from ..lifecycle import JSON_COLUMNS
from .options import storable

__all__ = [
    "Snapshot",
    "belongs_to",
    "check_session",
    "damage_of",
    "existing",
    "first_event",
    "known_sessions",
    "loaded",
    "looking",
    "many",
    "many_runtimes",
    "no_task",
    "one_task",
    "refuse_pruned",
    "row_json",
    "sessions_named",
    "some",
    "tasks_named",
]


class Snapshot:
    """A file that is being looked at."""

    def __init__(self, path: Path, revision: str) -> None:
        self.path = path
        self.revision = revision
        self._raw = database.open_sqlite(path, "read")

    def close(self) -> None:
        """Close the file."""
        self._raw.close()

    @contextlib.contextmanager
    def one_state(self) -> Iterator[None]:
        """Let all that is read meanwhile be of one moment. It keeps the ``-wal`` from being emptied: no printing in between."""
        self._raw.execute("BEGIN")
        try:
            yield
        finally:
            if self._raw.in_transaction:
                self._raw.execute("ROLLBACK")

    def rows(self, sql: str, **parameters: Any) -> list[Any]:
        """
        Return every row of a statement.

        Text that is not UTF-8, in a row edited by hand, is read with replacement characters. What looks like a damaged file, but
        may be the disk's passing trouble, is believed once the file was opened again.

        Raises:
            StorageError: the file cannot be read.
        """
        return self.answer(sql, parameters)[1]

    def row(self, sql: str, **parameters: Any) -> Any | None:
        """Return the first row of a statement, or None; see `rows`."""
        found = self.rows(sql, **parameters)
        return found[0] if found else None

    def dicts(self, sql: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return every row of a statement with the names of its columns; see `rows`."""
        columns, found = self.answer(sql, parameters)
        return [dict(zip(columns, row, strict=True)) for row in found]

    def answer(self, sql: str, parameters: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        """Return the names of a statement's columns, and every row; see `rows`."""
        try:
            try:
                return self._ask(sql, parameters)
            except sqlite3.Error as error:
                if translation.is_not_utf8(error):
                    self._raw.text_factory = reader.replacing
                elif translation.primary_code(error) in translation.PASSING:
                    opened = database.open_sqlite(self.path, "read")
                    self._raw.close()
                    self._raw = opened
                else:
                    raise
            return self._ask(sql, parameters)
        except sqlite3.Error as error:
            raise translation.translate(error, self.path) from error

    def _ask(self, sql: str, parameters: Mapping[str, Any]) -> tuple[list[str], list[Any]]:
        cursor = self._raw.execute(sql, parameters)
        return [column[0] for column in cursor.description], cursor.fetchall()


def existing(given: str) -> Path:
    """
    Return the path of a file that is there, with something in it.

    Raises:
        StorageError: it is not: a name that was mistyped must not make a new one.
    """
    path = guards.resolve(given)
    if not guards.check_target(path, writing=False):
        raise StorageError(f"{path} does not exist: check the path")
    if not database.has_content(path):
        raise StorageError(f"{path} is empty: check the path")
    return path


def belongs_to(target: Path, path: Path) -> bool:
    """Say whether *target* is a store's file, by whatever name, or one that SQLite keeps beside it."""
    own = (path, *guards.side_files(path))
    if Path(os.path.realpath(target)) in {Path(os.path.realpath(one)) for one in own}:
        return True
    return target.exists() and any(one.exists() and one.samefile(target) for one in own)


def damage_of(path: Path) -> str | None:
    """Read all of a file and say what is wrong with it, the first thing; None if nothing is."""
    try:
        with contextlib.closing(database.open_sqlite(path, "read")) as connection:
            return database.amiss(connection)
    except (*translation.DRIVER_ERRORS, UnicodeDecodeError) as error:
        return str(error)


@contextlib.contextmanager
def looking(path: str, *, at_head: bool = True) -> Iterator[Snapshot]:
    """
    Open a file to look at it, beside its owners, stopped, or a copy.

    Unless *at_head* is False, an older one is refused: what is to be read may not be there.

    Raises:
        StorageError, NotAStore, SchemaTooNew, SchemaTooOld: refused, with the file as it was.
    """
    file = existing(path)
    revision = database.probe(file)
    if at_head or revision is None:
        database.refuse_older(revision, file)
    try:
        snapshot = Snapshot(file, revision or "none")
    except sqlite3.Error as error:
        raise translation.translate(error, file) from error
    try:
        yield snapshot
    finally:
        snapshot.close()


def known_sessions(snapshot: Snapshot) -> str:
    """Return the names of some sessions of the file, for a message."""
    known = [scope for (scope,) in snapshot.rows("SELECT scope FROM sessions ORDER BY session_seq LIMIT 6")]
    return some(known) if known else "none"


def some(names: list[str]) -> str:
    """Name the first of many."""
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def check_session(snapshot: Snapshot, scope: object) -> None:
    """
    Make sure the file has a session: an empty answer would hide a wrong name.

    Raises:
        UnknownSession: it has not.
    """
    if not storable(str(scope)) or not snapshot.rows("SELECT 1 FROM sessions WHERE scope = :scope", scope=str(scope)):
        raise UnknownSession(f"no session {str(scope)!r} in this file: it has {known_sessions(snapshot)}")


_OF_ID = """
SELECT scope, COALESCE(MAX(task_seq) FILTER (WHERE completed_at IS NULL), MAX(task_seq))
FROM tasks WHERE id = :id AND scope IN (SELECT scope FROM sessions) GROUP BY scope ORDER BY scope
"""
"""Of every session that has a task of an id, the live one, else the newest; the index begins with the scope."""


def tasks_named(snapshot: Snapshot, scope: object | None, name: str) -> list[tuple[str, int]]:
    """
    Return what ``#12``, an id, or a bare number may mean, each as its session and its ``task_seq``; in one session, if given.

    An id means the live task of it, else the newest; a number that is no task's id, the incarnation.
    """
    return _named(snapshot, scope, name, _OF_ID, "SELECT scope, task_seq FROM tasks WHERE task_seq = :seq")


def _named(snapshot: Snapshot, scope: object | None, name: str, of_id: str, of_seq: str) -> list[tuple[str, int]]:
    if not storable(name):
        return []
    digits = name.removeprefix("#")
    is_number = digits.isascii() and digits.isdigit() and len(digits) < 19
    found = [] if name.startswith("#") and is_number else snapshot.rows(of_id, id=name)
    if not found and is_number:
        found = snapshot.rows(of_seq, seq=int(digits))
    return [(str(where), int(seq)) for where, seq in found if scope is None or where == str(scope)]


_PRUNED_OF_ID = """
SELECT scope, MAX(task_seq) FROM tombstones WHERE id = :id AND scope IN (SELECT scope FROM sessions) GROUP BY scope
"""


def refuse_pruned(snapshot: Snapshot, scope: object | None, name: str) -> None:
    """
    Refuse a name, which is no task's, if it was that of one that was pruned; see `tasks_named`.

    Raises:
        TaskPruned: with the newest that had it.
    """
    found = _named(snapshot, scope, name, _PRUNED_OF_ID, "SELECT scope, task_seq FROM tombstones WHERE task_seq = :seq")
    if found:
        from .. import transitions
        from ..retention_queries import Tombstone

        columns = ", ".join(Tombstone._fields)
        newest = max(task_seq for _, task_seq in found)
        [left] = snapshot.rows(f"SELECT {columns} FROM tombstones WHERE task_seq = :seq", seq=newest)
        transitions.refuse_pruned(Tombstone._make(left))


def one_task(snapshot: Snapshot, scope: object | None, name: str) -> int:
    """
    Return the ``task_seq`` of the task a person means; see `tasks_named`.

    Raises:
        TaskNotFound: nothing of that name; TaskPruned: there was.
        click.ClickException: several sessions have it.
    """
    found = tasks_named(snapshot, scope, name)
    if len(found) > 1:
        raise many(name, [where for where, _ in found])
    if not found:
        refuse_pruned(snapshot, scope, name)
        raise no_task(scope, name)
    return found[0][1]


def sessions_named(snapshot: Snapshot, name: str) -> list[str]:
    """Return the sessions that ``runtime:session``, or the session's part of it alone, may mean; the whole name first."""
    sql = "SELECT scope FROM sessions WHERE scope = :name OR session_id = :name ORDER BY scope <> :name, session_seq"
    return [str(scope) for (scope,) in snapshot.rows(sql, name=name)] if storable(name) else []


def many_runtimes(name: str, scopes: list[str]) -> click.ClickException:
    """Say that several runtimes have a session of the name."""
    return click.ClickException(f"session {name!r} is in {len(scopes)} runtimes: {some(scopes)}")


def many(name: str, scopes: list[str]) -> click.ClickException:
    """Say that several sessions have a task of the id."""
    return click.ClickException(f"task id {name!r} is in {len(scopes)} sessions: name one first: {some(scopes)}")


def no_task(scope: object | None, name: str) -> TaskNotFound:
    """Say that nothing has the name."""
    where = "this file" if scope is None else f"session {str(scope)!r}"
    return TaskNotFound(f"no task {name!r} in {where}: see lash-store list --all", task_id=name)


def first_event(snapshot: Snapshot, since: str) -> int:
    """
    Return about where the events after a time begin: they are in the order of their commits, and no index has their times.

    A clock that was set back may have left some before it.
    """
    low, high = snapshot.rows("SELECT COALESCE(MIN(seq), 1), COALESCE(MAX(seq), 0) + 1 FROM events")[0]
    while low < high:
        middle = (low + high) // 2
        found = snapshot.row("SELECT seq, at FROM events WHERE seq >= :seq ORDER BY seq LIMIT 1", seq=middle)
        if found is None or found[1] >= since:
            high = middle
        else:
            low = int(found[0]) + 1
    return int(low)


def loaded(text: str | None) -> Any:
    """Read JSON of a row; what somebody's hand made of it that is none, or cannot be written again, is the text it is."""
    if text is None:
        return None
    try:
        found = _DECODER.decode(text)
        if text.count("[") + text.count("{") > _DEEP:
            json.dumps(found)
    except (ValueError, RecursionError):
        return text
    return found


_DEEP = 400
"""Brackets below which a value that could be read can be written again."""


def _finite(digits: str) -> float:
    # 1e999 is JSON, and more than a float
    found = float(digits)
    return found if math.isfinite(found) else _refuse(digits)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite)

_FAILURE = dict.fromkeys(("type", "message", "traceback"))
_SHAPES: Mapping[str, Mapping[str, Any]] = {
    "failure": _FAILURE,
    "callback_error": _FAILURE,
    "last_error": _FAILURE,
    "evidence": dict.fromkeys(("owner_id", "pid", "host", "end", "found_at", "reason", "by", "process")),
}
_FLAGS = ("notify_on_end", "has_callback")


def row_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of `tasks` as plain JSON, as `output.task_json` gives its record, without building one."""
    made = dict(row)
    for name in JSON_COLUMNS:
        if made[name] is not None:
            value = loaded(made[name])
            made[name] = {**_SHAPES[name], **value} if name in _SHAPES and isinstance(value, dict) else value
    for name in _FLAGS:
        made[name] = bool(made[name])
    return made
