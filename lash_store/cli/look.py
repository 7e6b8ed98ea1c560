"""Owns the commands that look into a file: list, show and events; never writes to it."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, required_db, scope_of, words
from .output import (
    EventLines,
    age,
    complain,
    console,
    cropped,
    event_json,
    moment,
    safe,
    state_style,
    table,
    task_json,
    text,
    write_json,
    write_json_array,
)

if TYPE_CHECKING:
    from ..models import EventType, Scope, TaskEvent, TaskKind, TaskRecord, TaskState

__all__ = ["events", "list_tasks", "show"]

_MOST_PROGRESS = 120
"""Characters of a progress message a table shows; `show` has all of it."""


@click.command("list")
@click.option("--session", "scope", callback=scope_of, metavar="RUNTIME:SESSION", help="Only this session's tasks.")
@click.option(
    "--kind",
    "kinds",
    callback=words("TaskKind"),
    multiple=True,
    metavar="KIND",
    help="monitor, subagent, observer or other; may be given again.",
)
@click.option(
    "--state",
    "states",
    callback=words("TaskState"),
    multiple=True,
    metavar="STATE",
    help="pending, running, waiting, cancel_requested, completed, failed, cancelled or abandoned; may be given again.",
)
@click.option("--all", "with_finished", is_flag=True, help="Finished tasks too.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N tasks, the oldest first.")
@json_option("Print a JSON array.")
@db_option
@click.pass_context
def list_tasks(
    ctx: click.Context,
    scope: Scope | None,
    kinds: tuple[TaskKind, ...],
    states: tuple[TaskState, ...],
    with_finished: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    """List tasks, oldest first: the live ones, unless --all or --state says otherwise.

    \b
    Examples:
      lash-store list --db agent.db
      lash-store list --db agent.db --session desktop:s1 --all
      lash-store list --db agent.db --state failed --state abandoned
      lash-store list --db agent.db --all --json | jq '.[].progress'
    """
    _run(_list(required_db(ctx), scope, kinds, states, with_finished, limit, as_json))


async def _list(
    path: str,
    scope: Scope | None,
    kinds: tuple[TaskKind, ...],
    states: tuple[TaskState, ...],
    with_finished: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    from ..models import TaskFilter
    from ..store import TaskStore
    from .reading import check_session

    wanted = TaskFilter(
        scope=scope,
        kinds=frozenset(kinds) or None,
        states=frozenset(states) or None,
        include_terminal=with_finished or bool(states),
        limit=limit,
    )
    async with TaskStore.open_readonly(path) as store:
        if scope is not None:
            await check_session(store, scope)
        records = await store.list(wanted)
    if as_json:
        write_json_array(map(task_json, records))
    elif records:
        _print_tasks(records)
    else:
        click.echo("no such tasks" if with_finished or kinds or states else "no live tasks; see --all", err=True)


def _print_tasks(records: Sequence[TaskRecord]) -> None:
    rows = table(
        ("#", "right"),
        ("session", "fold"),
        ("id", "fold"),
        ("kind", "fixed"),
        ("state", "fixed"),
        ("try", "right"),
        ("done", "right"),
        ("age", "right"),
        ("progress", "fold"),
    )
    for record in records:
        rows.add_row(
            str(record.task_seq),
            text(record.scope),
            text(record.id, "bold"),
            record.kind.value,
            text(record.state, state_style(record.state)),
            str(record.attempt),
            "" if record.fraction is None else f"{record.fraction:.0%}",
            age(record.created_at),
            text(cropped(safe(_says(record)), _MOST_PROGRESS)),
        )
    console().print(rows)


def _says(record: TaskRecord) -> str:
    """Return the one line that tells most of a task: how it ended badly, else how far it is."""
    if record.failure is not None:
        return f"{record.failure.type}: {record.failure.message}"
    if record.evidence is not None:
        return f"owner {record.evidence.owner_id} {record.evidence.end}; outcome unknown"
    if record.cancel_reason is not None:
        return record.cancel_reason
    if record.waiting_for is not None:
        return f"waits for {record.waiting_for}"
    if record.not_before is not None and record.last_error is not None:
        return f"tries again {moment(record.not_before)} after {record.last_error.type}: {record.last_error.message}"
    return record.progress or ""


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[SCOPE] ID")
@json_option("Print one JSON object: the row's columns, what it remembers, and its events.")
@db_option
@click.pass_context
def show(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Show one task: its row, its times, its outcome, what it remembers or wrote, and its events.

    SCOPE is runtime:session. Without it, ID must be in one session only. An id names the live task, else the newest of
    that id; '#12' names the incarnation of that number.

    \b
    Examples:
      lash-store show --db agent.db desktop:s1 index
      lash-store show --db agent.db index
      lash-store show --db agent.db '#12' --json | jq .result
    """
    if len(names) > 2:
        raise click.UsageError(f"show takes SCOPE and ID, or ID alone, not {len(names)} names", ctx)
    scope = scope_of(ctx, None, names[0]) if len(names) == 2 else None
    _run(_show(required_db(ctx), scope, names[-1], as_json))


async def _show(path: str, scope: Scope | None, name: str, as_json: bool) -> None:
    from ..store import TaskStore
    from .reading import find_task, task_events

    async with TaskStore.open_readonly(path) as store:
        record = await find_task(store, name) if scope is None else await store.get(scope, name)
        history = await task_events(store, record)
        steps = await store.steps(record.task_seq)
        lines = await store.updates(record.task_seq)
    if as_json:
        remembered = [step.model_dump(mode="json") for step in steps]
        written = [{**line.model_dump(mode="json"), "scope": str(line.scope)} for line in lines]
        told = [event_json(event) for event in history]
        write_json({**task_json(record), "steps": remembered, "updates": written, "events": told})
        return
    from .card import card, memory, output

    out = console()
    out.print(card(record))
    out.print()
    if steps:
        out.print(memory(steps))
        out.print()
    if lines:
        out.print(output(lines))
        out.print()
    events = EventLines(out, with_task=False)
    for event in history:
        events.print(event)


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
    _run(_events(required_db(ctx), after, scope, types, follow, limit, as_json))


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
    from .reading import check_session, events_so_far

    async with TaskStore.open_readonly(path) as store:
        if scope is not None:
            await check_session(store, scope)
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


# --- around every command -------------------------------------------------------------------------------------------


class _OneLine(logging.Handler):
    """Tells of what the package logs in the shape of an error, without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            error = record.exc_info[1] if record.exc_info else None
            complain(record.getMessage() if error is None else f"{record.getMessage()}: {error}")
        except Exception:
            # an exception whose message raises must not end who told of it
            self.handleError(record)


_COMPLAINTS = _OneLine(logging.WARNING)


def _run(work: Coroutine[Any, Any, None]) -> None:
    logging.getLogger("lash_store").addHandler(_COMPLAINTS)
    asyncio.run(work)
