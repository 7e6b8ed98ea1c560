"""Owns the commands about a file's revision: upgrade, downgrade, history and current; knows nothing of how it is changed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import ENV_DB, chosen_db, db_option, json_option, required_db
from .output import Cell, console, print_table, safe, write_json, write_json_array

if TYPE_CHECKING:
    from ..models import SchemaChange
    from ..rehearsal import Loss

__all__ = ["current", "downgrade", "history", "upgrade"]

_no_backup = click.option("--no-backup", is_flag=True, help="Keep no copy of the file from before.")
_sql = click.option("--sql", "as_sql", is_flag=True, help="Print the statements for the sqlite3 shell; change nothing.")


@click.command()
@click.option("--to", "revision", metavar="REV", help="Up to this revision only, not to the newest.")
@_no_backup
@_sql
@json_option("Print what was done as one JSON object.")
@db_option
@click.pass_context
def upgrade(ctx: click.Context, revision: str | None, no_backup: bool, as_sql: bool, as_json: bool) -> None:
    """Bring a file to this package's revision, in one transaction; what is killed in it leaves the file as it was.

    The file from before is kept beside it, as FILE-REV.backup. Opening a file with TaskStore does the same. Every program
    that has the file open must have ended: one that lives is named, and nothing is changed.

    \b
    Examples:
      lash-store upgrade --db agent.db
      lash-store upgrade --db agent.db --sql > up.sql && sqlite3 agent.db < up.sql
      lash-store upgrade --db agent.db --json | jq -r .backup
    """
    from .. import migrate, rehearsal
    from ..identity import HEAD

    path, target = _existing(required_db(ctx)), revision or HEAD
    before = migrate.current(path)
    migrate.check_direction(path, before, target, down=False)
    if as_sql:
        _print_sql(path, f"revision {before or 'none'} to {target}", rehearsal.script(path, target))
        return
    with _waiting(f"upgrading to revision {target}"):
        done = migrate.upgrade(path, target, backup=not no_backup)
    if as_json:
        write_json(_as_json(path, target, done))
    else:
        _print_done(path, target, done)


@click.command()
@click.argument("revision", metavar="REV")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_no_backup
@_sql
@json_option("Print what was done, and what was lost, as one JSON object.")
@db_option
@click.pass_context
def downgrade(ctx: click.Context, revision: str, yes: bool, no_backup: bool, as_sql: bool, as_json: bool) -> None:
    """Take a file back to an older revision, for an older package; say first what that loses, and ask.

    Lost is what the older revision has no place for; tasks, events and handles stay. The file from before is kept beside it,
    as FILE-REV.backup.

    \b
    Examples:
      lash-store downgrade 0003 --db agent.db
      lash-store downgrade 0001 --db agent.db --yes --json | jq .lost
      lash-store downgrade 0003 --db agent.db --sql | less
    """
    from .. import migrate, rehearsal
    from ..revisions import BASE

    path = _existing(required_db(ctx))
    if revision == BASE:
        raise click.UsageError("before the first revision there is nothing to keep: remove the file instead", ctx)
    before = migrate.current(path)
    migrate.check_direction(path, before, revision, down=True)
    lost = rehearsal.losses(path, revision)
    if as_sql:
        title = f"revision {before or 'none'} to {revision}; it loses {_told(lost)}"
        _print_sql(path, title, rehearsal.script(path, revision))
        return
    if before != revision:
        _warn(path, before, revision, lost)
        if not yes:
            _ask(ctx)
    with _waiting(f"going back to revision {revision}"):
        done = migrate.downgrade(path, revision, backup=not no_backup)
    if as_json:
        write_json({**_as_json(path, revision, done), "lost": [loss._asdict() for loss in lost]})
    else:
        _print_done(path, revision, done)


@click.command()
@json_option("Print a JSON array.")
@db_option
@click.pass_context
def history(ctx: click.Context, as_json: bool) -> None:
    """List every revision this package knows, the oldest first, and what each adds to a file; with --db, where that is.

    \b
    Examples:
      lash-store history
      lash-store history --db agent.db
      lash-store history --json | jq '.[-1].adds.tables'
    """
    from .. import migrate, revisions
    from ..identity import HEAD

    given = chosen_db(ctx) or os.environ.get(ENV_DB)
    here = migrate.current(_existing(given)) if given else None
    found, before = [], revisions.BASE
    for script in revisions.known():
        found.append(
            {
                "revision": script.revision,
                "title": script.title,
                "adds": _added(before, script.revision),
                "is_head": script.revision == HEAD,
                "is_current": script.revision == here if given else None,
            }
        )
        before = script.revision
    if as_json:
        write_json_array(found)
    else:
        _print_history(found)


@click.command()
@json_option("Print one JSON object.")
@db_option
@click.pass_context
def current(ctx: click.Context, as_json: bool) -> None:
    """Print the revision a file is at, and whether it is this package's; change nothing.

    \b
    Examples:
      lash-store current --db agent.db
      lash-store current --db agent.db --json | jq -e .is_head
    """
    from .. import database
    from ..identity import HEAD

    path = _existing(required_db(ctx))
    revision = database.probe(path)
    if as_json:
        write_json({"db": str(path), "revision": revision, "head": HEAD, "is_head": revision == HEAD})
    elif revision == HEAD:
        click.echo(f"{HEAD} (head)")
    else:
        click.echo(f"{safe(revision or 'none')} (head is {HEAD}: run lash-store upgrade)")


def _existing(given: str) -> Path:
    """Return the path of a file that is there: a name mistyped must not make a new one."""
    from .. import database, guards

    path = guards.resolve(given)
    if not guards.check_target(path, writing=False) or not database.has_content(path):
        raise click.ClickException(f"{path} does not exist, or is empty: check the path")
    return path


# --- what is printed -------------------------------------------------------------------------------------------------


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    """Show on a terminal that something goes on, and for how long it has."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(safe(what))
        yield


def _print_done(path: Path, target: str, done: SchemaChange | None) -> None:
    if done is None:
        click.echo(f"{safe(path)} is at revision {target} already")
        return
    kept = "no copy was kept" if done.backup is None else f"the file from before is {done.backup}"
    change = f"revision {done.from_revision or 'none'} to {done.to_revision or 'none'} in {done.seconds:.1f} s"
    click.echo(safe(f"{path}: {change}; {kept}"))


def _as_json(path: Path, target: str, done: SchemaChange | None) -> dict[str, Any]:
    if done is None:
        return {"db": str(path), "from_revision": target, "to_revision": target, "backup": None, "seconds": 0.0}
    return {"db": str(path), **done.model_dump(mode="json")}


def _print_sql(path: Path, title: str, script: str) -> None:
    lines = [
        f"-- {safe(path)}: {safe(title)}",
        "-- First end every program that has the file open, and keep a copy; then: sqlite3 FILE < this",
        *script.splitlines(),
    ]
    # what programs added to the file is in it word by word: a terminal is shown it escaped
    click.echo("\n".join(map(safe, lines) if sys.stdout.isatty() else lines))


def _warn(path: Path, before: str | None, target: str, lost: Sequence[Loss]) -> None:
    from .. import revisions

    first, last = revisions.position(target), revisions.position(before or revisions.BASE)
    click.echo(safe(f"{path}: down from revision {before} to {target}"), err=True)
    for script in reversed(revisions.known()[first:last]):
        click.echo(safe(f"  {script.revision}: {script.undoing}"), err=True)
    click.echo(f"lost of this file: {safe(_told(lost))}", err=True)


def _ask(ctx: click.Context) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("a downgrade loses data, and nobody can be asked here: give --yes", ctx)
    if not click.confirm("Go on?", err=True):
        raise click.ClickException("nothing was changed")


_NOTES = {"inbox": ("note", "notes")}


def _told(lost: Sequence[Loss]) -> str:
    """Write what is lost as a person would: ``12 signals, 3 steps, deadline of 1 task``."""
    if not lost:
        return "nothing"
    return ", ".join(
        _rows(loss.table, loss.rows) if loss.column is None else f"{loss.column} of {_rows(loss.table, loss.rows)}"
        for loss in lost
    )


def _rows(name: str, rows: int) -> str:
    one, many = _NOTES.get(name, (name.removesuffix("s"), name))
    return f"{rows} {one if rows == 1 else many}"


def _added(before: str, after: str) -> dict[str, list[str]]:
    """Return the names of what a revision has and the one before it has not, by kind."""
    from ..revisions import shapes

    old, new = shapes()[before], shapes()[after]
    added = {
        f"{kind if kind != 'index' else 'indexe'}s": sorted(
            name for found, name in new.objects - old.objects if found == kind
        )
        for kind in ("table", "index", "trigger", "view")
    }
    columns = [
        f"{name}.{column}"
        for name in sorted(old.columns.keys() & new.columns.keys())
        for column in new.columns[name]
        if column not in old.columns[name]
    ]
    return {"tables": added.pop("tables"), "columns": columns, **added}


def _print_history(found: Sequence[dict[str, Any]]) -> None:
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        marks = [mark for mark, holds in (("head", one["is_head"]), ("this file", one["is_current"])) if holds]
        adds = one["adds"]
        told = [f"{kind} {', '.join(adds[kind])}" for kind in ("tables", "columns") if adds[kind]]
        name = f"{one['revision']} ({', '.join(marks)})" if marks else one["revision"]
        rows.append(((name, "bold"), one["title"], "; ".join(told) or "-"))
    print_table((("revision", "fixed"), ("what it is", "fold"), ("adds", "fold")), rows)
