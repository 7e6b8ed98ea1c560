"""
Owns the question whether somebody else's triggers would have the store's statements do what it did not ask for; changes nothing.

A program may have triggers of its own on the store's tables, a log of its own for instance. What writes the store's rows behind
its back, leaves out what it writes, or never ends, is refused before anything is written.
"""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

from .errors import StorageError
from .schema import TRIGGERS, metadata

__all__ = ["meddlers", "refuse_meddlers"]

_ON_OURS = "SELECT name, tbl_name, sql FROM sqlite_schema WHERE type = 'trigger'"
_COLUMNS = """SELECT '"' || replace(name, '"', '""') || '"' FROM pragma_table_info(?)"""
_WRITES = frozenset({sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE})
_LEAVES_OUT = re.compile(r"\bRAISE\b[^;]*\bIGNORE\b", re.IGNORECASE)


def refuse_meddlers(connection: sqlite3.Connection, path: Path) -> None:
    """
    Look at the triggers that the store's statements would set off.

    Raises:
        StorageError: one that is not the store's own writes its tables, keeps rows out of them, or may never end.
    """
    found = meddlers(connection)
    if found:
        raise StorageError(
            f"{path} has triggers that change what the store writes ({', '.join(found)}), which are not its own: "
            "see what they do, with lash-store schema, then DROP TRIGGER; nothing was changed"
        )


def meddlers(connection: sqlite3.Connection) -> list[str]:
    """Return the triggers of others that write the store's tables, keep rows out of them, or may never end."""
    there = connection.execute(_ON_OURS).fetchall()
    strangers = {name: sql for name, table, sql in there if not _is_ours(name, sql)}
    if not any(table.lower() in metadata.tables for name, table, _ in there if name in strangers):
        return []
    found = {name for name, sql in strangers.items() if _LEAVES_OUT.search(sql)}

    def look(action: int, one: str | None, two: str | None, database: str | None, source: str | None) -> int:
        if action == sqlite3.SQLITE_RECURSIVE:
            # the source is then what goes in circles, inside one of them: ours do not, nor do the statements below
            found.update(strangers)
        elif source in strangers and action in _WRITES and (one or "").lower() in metadata.tables:
            # the innermost trigger: one on a program's table, set off by one on ours, counts too
            found.add(source)
        return sqlite3.SQLITE_OK

    connection.set_authorizer(look)
    try:
        for name in metadata.tables:
            # as they are in this file, which may be of an older revision
            columns = [column for (column,) in connection.execute(_COLUMNS, [name]).fetchall()]
            for sql in (
                f"INSERT INTO {name} DEFAULT VALUES",
                f"UPDATE {name} SET {', '.join(f'{column} = {column}' for column in columns)}",
                f"DELETE FROM {name}",
            ):
                if not columns:
                    continue
                # compiled, with all it would set off, and not run
                connection.execute(f"EXPLAIN {sql}").fetchall()
    finally:
        connection.set_authorizer(None)
    return sorted(found)


def _is_ours(name: str, sql: str) -> bool:
    return name in TRIGGERS and sql.split() == TRIGGERS[name].split()
