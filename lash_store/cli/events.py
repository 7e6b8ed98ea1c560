"""Owns the command `events`: what happened in a file, and what happens; never writes to it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from .options import db_option, json_option, required_db, scope_of, words
from .output import EventLines, console, event_json, write_json
from .running import run

if TYPE_CHECKING:
    from ..models import EventType, Scope, TaskEvent

__all__ = ["events"]


@click.command()
@click.option("--after", type=click.IntRange(min=0), default=0, metavar="SEQ", help="Only what follows event SEQ.")
@click.option("--session", "scope", callback=scope_of, metavar="RUNTIME:SESSION", help="Only this session's events.")
@click.option(
    "--type",
    "types",
    callback=words("EventType"),
    multiple=True,
    metavar="TYPE",
    help="started, reattached, progress, completed, failed, …; may be given again.",
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens from now, until interrupted.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="End after N events.")
@json_option("Print JSON Lines: one object a line.")
@db_option
@click.pass_context
def events(
    ctx: click.Context,
    after: int,
    scope: Scope | None,
    types: tuple[EventType, ...],
    follow: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    """Print what happened, in the order in which it was committed, whichever process did it.

    The number of the last event seen is the cursor to go on from with --after. Times are UTC.

    \b
    Examples:
      lash-store events --db agent.db --type failed --type abandoned
      lash-store events --db agent.db --session desktop:s1 --follow
      lash-store events --db agent.db --after 1200 --json | jq -c '[.seq, .type]'
    """
    path = required_db(ctx)
    if scope is not None:
        from .snapshot import check_session, looking

        with looking(path) as snapshot:
            check_session(snapshot, scope)
    run(_events(path, after, scope, types, follow, limit, as_json))


async def _events(
    path: str,
    after: int,
    scope: Scope | None,
    types: tuple[EventType, ...],
    follow: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    from ..store import TaskStore
    from .reading import events_so_far

    async with TaskStore.open_readonly(path) as store:
        if limit == 0:
            return
        chosen = types or None
        if not follow:
            async with aclosing(events_so_far(store, after, scope=scope, types=chosen)) as found:
                await _write(found, limit, as_json, at_once=False)
            return
        await _write(store.events(after, scope=scope, types=chosen), limit, as_json, at_once=True)


async def _write(found: AsyncIterator[TaskEvent], limit: int | None, as_json: bool, *, at_once: bool) -> None:
    lines = EventLines(console())
    left = limit
    async for event in found:
        if as_json:
            write_json(event_json(event), indent=None)
        else:
            lines.print(event)
        if at_once:
            sys.stdout.flush()
        if left is not None:
            left -= 1
            if left == 0:
                return
