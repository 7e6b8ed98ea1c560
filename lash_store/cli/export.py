"""Owns the command that writes a file's contents as JSON Lines, from one state of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, required_db, scope_of
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
    "--output", "-o", type=click.File("w", lazy=False), default="-", metavar="FILE", help="Where to; else stdout."
)
@db_option
@click.pass_context
def export(ctx: click.Context, scope: Scope | None, only: tuple[str, ...], output: Any) -> None:
    """Write the file's contents as JSON Lines: one object a row, JSON columns as JSON, from one state of the file.

    The first line tells of the file; every line has its kind in "record". Live owners go on meanwhile.

    \b
    Examples:
      lash-store export --db agent.db -o agent.jsonl
      lash-store export --db agent.db --session desktop:s1 --only task --only event
      lash-store export --db agent.db --only task | jq -r 'select(.state == "failed") | .id'
    """
    from .. import database, guards

    told_in_one_line()
    path = guards.resolve(required_db(ctx))
    if not guards.check_target(path, writing=False):
        raise click.ClickException(f"{path} does not exist: check the path")
    revision = database.probe(path)
    try:
        with closing(database.open_sqlite(path, "read")) as connection:
            connection.text_factory = database.replacing
            connection.execute("BEGIN").fetchall()
            first = {
                "record": "store",
                "revision": revision,
                "exported_at": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            }
            _write(output, first)
            if (
                scope is not None
                and not connection.execute("SELECT 1 FROM sessions WHERE scope = ?", (str(scope),)).fetchone()
            ):
                raise click.ClickException(f"no session {str(scope)!r} in this file: see lash-store sessions")
            for record in only or _TABLES:
                for row in _rows(connection, record, scope):
                    _write(output, row)
    except sqlite3.Error as error:
        database.raise_translated(error, path)
    output.flush()


def _write(output: Any, row: dict[str, Any]) -> None:
    output.write(json.dumps(row, ensure_ascii=True, separators=(",", ":")) + "\n")


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
    for row in found:
        yield {"record": record, **{name: _plain(name, value) for name, value in zip(columns, row, strict=True)}}


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
    if isinstance(value, bytes):
        return value.hex()
    if name in _JSON and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
