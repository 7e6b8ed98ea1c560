"""
Owns what programs added to a store's file: their views, triggers and indexes, set aside while revisions run, then put back.

SQLite refuses to drop a column while anything in the schema would not fit afterwards, lets a dropped table take its triggers
along, and fires triggers on what a revision does to rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from .errors import SchemaError
from .revisions import Shape

__all__ = ["set_aside"]


class _Addition(NamedTuple):
    kind: str
    name: str
    table: str
    sql: str


_ORDER = ("view", "index", "trigger")
"""In this order they are made; a trigger may stand on a view."""


@contextmanager
def set_aside(raw: sqlite3.Connection, ours: Shape) -> Iterator[None]:
    """
    Take what is not *ours* out of the schema, inside the open transaction, and put it back at the end, word by word.

    Raises:
        SchemaError: one that worked would not work any more; it is named.
    """
    found = _find(raw, ours)
    worked = {(one, trial): _why_not(raw, one, trial) is None for one in found for trial in _TRIALS[one.kind]}
    for one in reversed(found):
        raw.execute(f"DROP {one.kind.upper()} {_quoted(one.name)}").fetchall()
    yield
    for one in found:
        why = _made(raw, one)
        for trial in _TRIALS[one.kind]:
            if why is None and worked[one, trial]:
                why = _why_not(raw, one, trial)
        if why is not None:
            raise SchemaError(
                f"the {one.kind} {one.name!r}, which a program added, would not work any more ({why}): "
                "drop it first, and make it again after; nothing was changed"
            )


def _find(raw: sqlite3.Connection, ours: Shape) -> list[_Addition]:
    rows = raw.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")
    found = [
        _Addition(*row)
        for row in rows.fetchall()
        if row[0] in _ORDER and (row[0], row[1]) not in ours.objects and (row[0] != "index" or row[2] in ours.columns)
    ]
    return sorted(found, key=lambda one: _ORDER.index(one.kind))


def _made(raw: sqlite3.Connection, one: _Addition) -> str | None:
    try:
        raw.execute(one.sql).fetchall()
    except sqlite3.Error as error:
        return str(error)
    return None


_TRIALS = {"view": ("read",), "index": (), "trigger": ("delete", "insert", "update")}
"""What SQLite has to compile each for: a CREATE alone looks at little."""


def _why_not(raw: sqlite3.Connection, one: _Addition, trial: str) -> str | None:
    """Return why SQLite would not compile what meets an addition, by asking it of no row."""
    on = _quoted(one.table)
    try:
        if trial == "update":
            columns = [_quoted(name) for (name,) in raw.execute("SELECT name FROM pragma_table_info(?)", (one.table,))]
            sql = f"UPDATE {on} SET {', '.join(f'{column} = {column}' for column in columns)} WHERE FALSE"
        elif trial == "insert":
            sql = f"INSERT INTO {on} SELECT * FROM {on} WHERE FALSE"
        else:
            sql = f"{'SELECT *' if trial == 'read' else 'DELETE'} FROM {on} WHERE FALSE"
        # not EXPLAIN: one compiled before the schema changed is run as it was, and crashes
        raw.execute(sql).fetchall()
    except sqlite3.Error as error:
        return str(error)
    return None


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
