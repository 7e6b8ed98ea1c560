"""Owns the command that writes a file's contents as JSON Lines, from one state of it."""

from __future__ import annotations

import json
import math
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from .options import db_option, required_db, scope_of
from .output import counted, safe, stored
from .running import told_in_one_line

if TYPE_CHECKING:
    from ..models import Scope

__all__ = ["export"]

_TABLES = {
    "session": ("sessions", "session_seq"),
    "owner": ("owners", "owner_id"),
    "task": ("tasks", "task_seq"),
    "handle": ("handles", "handle_seq"),
    "event": ("events", "seq"),
    "step": ("steps", "task_seq, kind, name"),
    "signal": ("signals", "signal_seq"),
    "note": ("inbox", "note_seq"),
    "handoff": ("handoffs", "handoff_seq"),
    "monitor": ("monitors", "task_seq"),
    "update": ("updates", "update_seq"),
    "tombstone": ("tombstones", "task_seq"),
}
"""What a line may be a record of, the table it is from, and the order."""

_JSON = frozenset(
    {
        "arguments", "result", "failure", "evidence", "callback_error", "last_error", "process",
        "data", "value", "payload", "kept", "moved", "cancelled", "inbox_claim", "updates_claim", "reopened_amid",
    }
)  # fmt: skip


@click.command()
@click.option("--session", "scope", callback=scope_of, metavar="RUNTIME:SESSION", help="Only what is this session's.")
@click.option(
    "--only", "only", multiple=True, type=click.Choice([*_TABLES]), metavar="RECORD",
    help=f"{', '.join(_TABLES)}; may be given again.",
)  # fmt: skip
@click.option(
    "--output", "-o", type=click.Path(dir_okay=False), default="-", metavar="FILE",
    help="Where to, for its owner's eyes only; else stdout.",
)  # fmt: skip
@db_option
@click.pass_context
def export(ctx: click.Context, scope: Scope | None, only: tuple[str, ...], output: str) -> None:
    """Write the file's contents as JSON Lines: one object a row, JSON columns as JSON, from one state of the file.

    The first line tells of the file; every line has its kind in "record". What is no JSON in a JSON column, after somebody's
    hand was at it, is the text it is. Live owners go on meanwhile.

    \b
    Examples:
      lash-store export --db agent.db -o agent.jsonl
      lash-store export --db agent.db --session desktop:s1 --only task --only event
      lash-store export --db agent.db --only task | jq -r 'select(.state == "failed") | .id'
    """
    from .. import database, reader, translation
    from .snapshot import belongs_to, existing

    told_in_one_line()
    path = existing(required_db(ctx))
    database.probe(path)
    if output != "-" and belongs_to(Path(output), path):
        raise click.UsageError(f"{output} is the store's own file: give the export a name of its own", ctx)
    try:
        with closing(database.open_sqlite(path, "read")) as connection:
            # what a hand wrote need not be UTF-8
            connection.text_factory = reader.replacing
            connection.execute("BEGIN").fetchall()
            revision = database.read_revision(connection, path)
            if scope is not None and (revision is None or not _has_session(connection, scope)):
                raise click.ClickException(f"no session {str(scope)!r} in this file: see lash-store sessions")
            first = {
                "record": "store",
                "revision": revision,
                "exported_at": stored(datetime.now(UTC)),
            }
            lines = 1
            with click.open_file(output, "w") if output == "-" else _private(output) as out:
                _write(out, first)
                # in the tables' order, and once, however they were asked for
                for record in [name for name in _TABLES if name in (only or _TABLES)]:
                    for row in _rows(connection, record, scope):
                        _write(out, row)
                        lines += 1
                out.flush()
    except sqlite3.Error as error:
        translation.raise_translated(error, path)
    if output != "-":
        click.echo(f"{safe(output)}: {counted(lines, 'line')}", err=True)


def _private(output: str) -> IO[str]:
    return open(output, "w", encoding="ascii", opener=_opened)


def _opened(name: str, flags: int) -> int:
    path = Path(name)
    is_link = path.is_symlink()
    if is_link and (path.is_file() or not path.exists()):
        raise click.ClickException(
            f"{name} is a symbolic link, which somebody may have put there: name the file it names"
        )
    descriptor = os.open(name, flags if is_link else flags | os.O_NOFOLLOW, 0o600)
    found = os.fstat(descriptor)
    # one of yesterday may be open to others; a pipe or a device is not ours to close
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)
    return descriptor


def _has_session(connection: sqlite3.Connection, scope: Scope) -> bool:
    return bool(connection.execute("SELECT 1 FROM sessions WHERE scope = ?", (str(scope),)).fetchall())


def _write(output: IO[str], row: dict[str, Any]) -> None:
    output.write(_ENCODER.encode(row) + "\n")


def _rows(connection: sqlite3.Connection, record: str, scope: Scope | None) -> Iterator[dict[str, Any]]:
    table, order = _TABLES[record]
    columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
    if not columns:
        # of an older revision
        return
    where = _where(table, columns) if scope is not None else ""
    found = connection.execute(
        f"SELECT * FROM {table} {where} ORDER BY {order}", {} if scope is None else {"scope": str(scope)}
    )
    # with those that somebody had generated
    names = [column[0] for column in found.description]
    for row in found:
        yield {"record": record, **{name: _plain(name, value) for name, value in zip(names, row, strict=True)}}


def _where(table: str, columns: list[str]) -> str:
    if table == "events":
        return "WHERE scope = :scope OR from_scope = :scope"
    if table == "handoffs":
        return "WHERE source = :scope OR destination = :scope"
    if "scope" in columns:
        return "WHERE scope = :scope"
    if "task_seq" in columns:
        return "WHERE task_seq IN (SELECT task_seq FROM tasks WHERE scope = :scope)"
    return "WHERE owner_id IN (SELECT owner_id FROM tasks WHERE scope = :scope)"


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if name in _JSON and isinstance(value, str):
        from .snapshot import loaded

        return loaded(value)
    return value


_ENCODER = json.JSONEncoder(ensure_ascii=True, allow_nan=False, separators=(",", ":"))
