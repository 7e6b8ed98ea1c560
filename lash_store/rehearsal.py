"""Owns what a change of revision would do to a file: its statements for the shell, and what it would lose; changes nothing."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from . import additions, database, revisions, translation
from .identity import VERSION_TABLE
from .revisions import BASE, Shape

__all__ = ["Loss", "losses", "script", "statements"]


class Loss(NamedTuple):
    """What is lost of a table: *rows* of it, or with a *column* what that says in so many rows that stay."""

    table: str
    column: str | None
    rows: int


# --- the statements -------------------------------------------------------------------------------------------------


def statements(path: Path, target: str) -> list[str]:
    """
    Return the statements that take the file to *target*, as a trial on a copy without rows ran them.

    The copy is in memory and has the file's own schema, so what programs added to it is in them too.

    Raises:
        SchemaError: the revisions do not fit the file.
    """
    return _rehearsed(path, target)[1]


def _rehearsed(path: Path, target: str) -> tuple[str | None, list[str]]:
    """Return the revision of a file, and its `statements`, both of one state of it."""
    revision, made = _schema_of(path)
    ran: list[str] = []
    with revisions.memory() as (raw, connection):
        for sql in made:
            # a module that only its program has: nothing of ours is in such a table
            with contextlib.suppress(sqlite3.OperationalError):
                raw.execute(sql)
        if revision is not None:
            raw.execute(f"INSERT INTO {VERSION_TABLE} VALUES (?)", (revision,))
        raw.execute(revisions.MAKE_VERSION_TABLE).fetchall()
        raw.set_trace_callback(ran.append)
        with additions.set_aside(raw, revisions.shape(revision)):
            if (revision or BASE) != target:
                down = revisions.position(target) < revisions.position(revision or BASE)
                revisions.bring(connection, target, down=down)
        raw.set_trace_callback(None)
    return revision, [sql.strip() for sql in ran if _CHANGES.match(sql.strip())]


_CHANGES = re.compile(r"(?!SELECT\b|PRAGMA\b|EXPLAIN\b|BEGIN\b|COMMIT\b|ROLLBACK\b|--)", re.IGNORECASE)
"""Not what only looks, not the transaction, and not what a trigger did, which is traced as a comment."""


def _schema_of(path: Path) -> tuple[str | None, list[str]]:
    """Return the revision of a file and the statements that make its schema, tables first."""
    with _reading(path) as source:
        revision = database.read_revision(source, path)
        rows = source.execute(
            "SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite\\_%' ESCAPE '\\' "
            "AND name NOT IN (SELECT name FROM pragma_table_list WHERE type = 'shadow') ORDER BY type <> 'table', rowid"
        )
        return revision, [str(sql) for (sql,) in rows]


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        with closing(database.open_sqlite(path, "read")) as source:
            yield source
    except translation.DRIVER_ERRORS as error:
        translation.raise_translated(error, path)


def script(path: Path, target: str) -> str:
    """
    Return the `statements` as a script for the ``sqlite3`` shell: one transaction, which holds itself to the same checks.

    What fails ends the shell, and with it the transaction; the file is then as it was.
    """
    revision, ran = _rehearsed(path, target)
    if (revision or BASE) == target:
        return f"-- already at revision {target}\n"
    at = f"the_file_is_at_{revision or BASE}"
    holds = (at, "rows_have_their_parents", "the_file_is_sound")
    checks = ", ".join(f"{name} INTEGER CONSTRAINT {name} CHECK ({name})" for name in holds)
    lines = [
        ".bail on",
        "PRAGMA foreign_keys = OFF;",
        f"CREATE TEMP TABLE lash_store_holds ({checks});",
        "BEGIN IMMEDIATE;",
        f"{revisions.MAKE_VERSION_TABLE};",
        f"INSERT INTO lash_store_holds ({at}) SELECT coalesce(max(version_num), '{BASE}') = '{revision or BASE}' "
        f"FROM {VERSION_TABLE};",
        *(f"{sql};" for sql in ran),
        f"INSERT INTO lash_store_holds ({holds[1]}) SELECT count(*) = 0 FROM pragma_foreign_key_check;",
        f"INSERT INTO lash_store_holds ({holds[2]}) SELECT group_concat(integrity_check) = 'ok' FROM pragma_integrity_check;",
        "COMMIT;",
    ]
    return "\n".join(lines) + "\n"


# --- what is lost ---------------------------------------------------------------------------------------------------


def losses(path: Path, target: str) -> list[Loss]:
    """
    Return what the file has that *target* has no place for: rows of tables, then of columns, only where there are any.

    It is what the scripts themselves take away: the tables and columns that are gone after them, and the rows they delete.

    Raises:
        SchemaError: the revisions do not fit the file.
    """
    revision, ran = _rehearsed(path, target)
    deleted = _deleted(ran)
    with _reading(path) as source:
        before, after = revisions.shape(revision), revisions.shapes()[target]
        return [loss for loss in _counted(source, before, after, deleted) if loss.rows]


_DELETE = re.compile(r'DELETE\s+FROM\s+"?(\w+)"?(?:\s+WHERE\s+(.*))?', re.IGNORECASE | re.DOTALL)


def _deleted(ran: Sequence[str]) -> dict[str, str]:
    """Return by table which rows statements delete."""
    found: dict[str, list[str]] = {}
    for match in filter(None, map(_DELETE.fullmatch, ran)):
        found.setdefault(match[1], []).append(f"({match[2] or 'TRUE'})")
    return {table: " OR ".join(conditions) for table, conditions in found.items()}


def _counted(source: sqlite3.Connection, before: Shape, after: Shape, deleted: dict[str, str]) -> Iterator[Loss]:
    tables = sorted(before.columns)
    for table in tables:
        if table not in after.columns:
            yield Loss(table, None, _count(source, table, "TRUE"))
        elif table in deleted:
            yield Loss(table, None, _count(source, table, deleted[table]))
    for table in tables:
        for column, default in before.columns[table].items() if table in after.columns else ():
            if column not in after.columns[table]:
                stays = f"({deleted.get(table, 'FALSE')}) IS NOT TRUE"
                yield Loss(table, column, _count(source, table, f'{stays} AND "{column}" IS NOT ({default})'))


def _count(source: sqlite3.Connection, table: str, condition: str) -> int:
    return int(source.execute(f'SELECT count(*) FROM "{table}" WHERE {condition}').fetchone()[0])
