"""Owns the commands that keep a file small and safe: prune, backup and restore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .dialogue import bar, confirm
from .options import db_option, json_option, required_db, scope_of, span_in, words
from .output import counted, safe, write_json
from .running import run, told_in_one_line

if TYPE_CHECKING:
    from ..models import Scope, TaskState
    from ..retention_models import PruneReport

__all__ = ["backup", "prune", "restore"]

_MOST = 2**62
"""A number that the file can be asked about."""

_EVER = 10_000 * 366 * 86_400


def _span(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    written = value.strip()
    # a number alone is of seconds
    seconds = span_in(f"{written}s" if written[-1:].isdigit() else written)
    if seconds is None:
        raise click.BadParameter(f"{value!r} is no time span: write 30d, 12h, 90m or 45s", ctx, param)
    if seconds > _EVER:
        raise click.BadParameter(f"{value!r} is longer than anything", ctx, param)
    return seconds


def _scopes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[Scope, ...]:
    found = (scope_of(ctx, param, value) for value in values)
    return tuple(scope for scope in found if scope is not None)


# --- prune ----------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--older-than", callback=_span, metavar="SPAN", help="Only what ended longer ago: 30d, 12h, 90m, 45s.")
@click.option(
    "--keep-last", type=click.IntRange(0, _MOST), metavar="N", help="Keep the newest N finished tasks of a session."
)
@click.option(
    "--state", "states", callback=words("TaskState"), multiple=True, metavar="STATE",
    help="Only completed, failed, cancelled or abandoned ones; may be given again.",
)  # fmt: skip
@click.option(
    "--session", "scopes", callback=_scopes, multiple=True, metavar="RUNTIME:SESSION",
    help="Only this session's; may be given again.",
)  # fmt: skip
@click.option(
    "--before-cursor", type=click.IntRange(0, _MOST), metavar="SEQ",
    help="Only tasks all of whose events a follower at event SEQ has seen.",
)  # fmt: skip
@click.option("--unread", is_flag=True, help="Also what has a result that nobody was handed yet.")
@click.option("--dry-run", is_flag=True, help="Say what would go; write nothing.")
@json_option("Print the report as a JSON object.")
@db_option
@click.pass_context
def prune(
    ctx: click.Context,
    older_than: float | None,
    keep_last: int | None,
    states: tuple[TaskState, ...],
    scopes: tuple[Scope, ...],
    before_cursor: int | None,
    unread: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take finished tasks out of the file, with their events, and give the room back to the file system.

    Live work is never touched, nor what it depends on, nor a result that nobody has read, unless --unread says so. Whoever
    asks for a pruned task later is told so. It works beside live owners, a little at a time; interrupted, what was done is
    done.

    \b
    Examples:
      lash-store prune --db agent.db --older-than 30d --dry-run
      lash-store prune --db agent.db --older-than 7d --keep-last 100
      lash-store prune --db agent.db --state cancelled --session desktop:s1
    """
    criteria = {
        "older_than": older_than,
        "keep_last": keep_last,
        "states": states or None,
        "sessions": scopes or None,
        "before_cursor": before_cursor,
        "unread": unread,
        "dry_run": dry_run,
    }
    path = required_db(ctx)
    if scopes:
        from .snapshot import check_session, looking

        with looking(path) as snapshot:
            for scope in scopes:
                check_session(snapshot, scope)
    run(_prune(ctx, path, criteria, as_json))


async def _prune(ctx: click.Context, path: str, criteria: dict[str, Any], as_json: bool) -> None:
    from pydantic import ValidationError

    from ..store import TaskStore

    # who closes a file that was opened to write to moves what is in its -wal
    opened = TaskStore.open_readonly(path) if criteria["dry_run"] else TaskStore.connect(path, runtime="lash-store")
    async with opened as store:
        with bar("pruning") as show:

            def told(report: PruneReport) -> None:
                show(report.task_seq, report.newest_seq)

            try:
                report = await store.prune(**criteria, progress=told)
            except ValidationError as error:
                raise click.UsageError(error.errors()[0]["msg"], ctx) from error
    if as_json:
        write_json({**report.model_dump(mode="json"), "dry_run": criteria["dry_run"]})
        return
    did = "would be pruned" if criteria["dry_run"] else "pruned"
    freed = "" if criteria["dry_run"] else f"; {report.freed:,} bytes given back"
    click.echo(f"{counted(report.tasks, 'task')} with {counted(report.events, 'event')} {did}{freed}")
    if report.unread:
        click.echo(f"kept: {report.unread:,} whose result nobody was handed (--unread prunes those too)")
    if report.needed:
        click.echo(f"kept: {report.needed:,} that live work depends on")


# --- backup and restore ---------------------------------------------------------------------------------------------


@click.command()
@click.argument("target", metavar="TARGET", type=click.Path())
@json_option("Print the report as a JSON object.")
@db_option
@click.pass_context
def backup(ctx: click.Context, target: str, as_json: bool) -> None:
    """Copy the file, as it is at one moment, to TARGET while everybody goes on, and verify the copy.

    The copy is stamped: it can be read like any file, but it is not run by mistake, for its original may be doing its work.

    \b
    Examples:
      lash-store backup --db agent.db agent-2026-11-26.db
      lash-store doctor --db agent-2026-11-26.db
    """
    from ..copies import back_up
    from ..guards import resolve
    from .snapshot import existing

    told_in_one_line()
    path = existing(required_db(ctx))
    with bar("copying") as show:
        report = back_up(path, resolve(target), show)
    if as_json:
        write_json(report.model_dump(mode="json"))
        return
    click.echo(
        f"{safe(str(report.path))}: {report.bytes:,} bytes, {counted(report.tasks, 'task')}, "
        f"{counted(report.events, 'event')}, verified"
    )


@click.command()
@click.argument("source", metavar="BACKUP", type=click.Path())
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option("Print the report as a JSON object.")
@db_option
@click.pass_context
def restore(ctx: click.Context, source: str, yes: bool, as_json: bool) -> None:
    """Put BACKUP in the place of the file, once it is verified; what is there now is kept beside it.

    Refused while anybody has the file open. The work goes on where the backup was made: what was live then is recovered when
    the file is next opened, and what was done since is forgotten.

    \b
    Example:
      lash-store restore --db agent.db agent-2026-11-26.db
    """
    from pathlib import Path

    from ..restoring import restore as put_back

    told_in_one_line()
    path = Path(required_db(ctx))
    if path.exists() and not yes:
        confirm(
            ctx,
            f"Put {safe(source)} in the place of {safe(str(path))}, and keep that beside it?",
            "what was done since the backup is forgotten",
        )
    with bar("copying") as show:
        report = put_back(Path(source), path, show)
    if as_json:
        write_json(report.model_dump(mode="json"))
        return
    click.echo(f"{safe(str(report.path))}: revision {safe(report.revision)}, {counted(report.tasks, 'task')}")
    if report.kept is not None:
        click.echo(f"what was there is now {safe(str(report.kept))}")
