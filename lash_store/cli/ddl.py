"""Owns the command that prints the statements of a schema: a file's, or this package's; never writes."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import click

from .options import db_option, given_db, json_option
from .output import safe, write_json_array

if TYPE_CHECKING:
    from .snapshot import Snapshot

__all__ = ["schema"]

_OBJECTS = """
SELECT s.type, s.name, s.tbl_name, s.sql
FROM sqlite_schema AS s
WHERE s.sql IS NOT NULL AND s.name NOT LIKE 'sqlite\\_%' ESCAPE '\\'
ORDER BY CASE s.type WHEN 'table' THEN 1 WHEN 'index' THEN 2 WHEN 'trigger' THEN 3 ELSE 4 END, s.rowid
"""


class _Object(NamedTuple):
    """A table, index, trigger or view, as `sqlite_schema` has it."""

    type: str
    name: str
    table: str
    sql: str


@click.command()
@json_option("Print a JSON array: type, name, table and SQL of each.")
@db_option
@click.pass_context
def schema(ctx: click.Context, as_json: bool) -> None:
    """Print the tables, indexes, triggers and views of the file as SQL. Without a file: those that this version makes.

    A file of an older revision is read as it is.

    \b
    Examples:
      lash-store schema --db agent.db
      lash-store schema | grep -A40 'CREATE TABLE events'
      lash-store schema --db agent.db --json | jq -r '.[] | select(.type == "view") | .name'
    """
    path = given_db(ctx)
    if path:
        from .snapshot import looking

        with looking(path, at_head=False) as file:
            revision, found = file.revision, _objects(file)
    else:
        revision, found = _of_this_version()
    if as_json:
        write_json_array(one._asdict() for one in found)
        return
    click.echo(f"-- lash_store schema, revision {safe(revision)}")
    for one in found:
        # line by line: what is in the file reaches no terminal as it is
        click.echo("\n".join(safe(line) for line in f"{one.sql.strip()};".split("\n")))


def _objects(file: Snapshot) -> list[_Object]:
    return [_Object._make(row) for row in file.rows(_OBJECTS)]


def _of_this_version() -> tuple[str, list[_Object]]:
    """Return what is in a new file, read from one: the migrations are what makes it."""
    from ..migrate import upgrade
    from .snapshot import looking

    with TemporaryDirectory(prefix="lash-store-") as folder:
        path = str(Path(folder, "new.db"))
        upgrade(path)
        with looking(path) as file:
            return file.revision, _objects(file)
