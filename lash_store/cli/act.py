"""Owns the commands that ask something of live owners, or decide for dead ones: cancel, signal and abandon."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, names_of_task, required_db, scope_of, storable
from .output import complain, console, counted, safe, state_style, task_json, text, write_json
from .running import run

if TYPE_CHECKING:
    from ..handles import TaskHandle
    from ..models import Scope, TaskRecord, Transition
    from ..store import TaskStore

__all__ = ["abandon", "ask_to_stop", "cancel", "signal"]

_ASKED = 3
"""The exit code of what was asked for, and had not come to an end in time."""


def _reason(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not storable(value):
        raise click.BadParameter("it has characters that no file holds", ctx, param)
    return value


def _find(path: str, scope: Scope | None, name: str) -> tuple[str, int]:
    """
    Return the runtime and the ``task_seq`` of the task that is meant, as the looking commands find it.

    Raises:
        TaskNotFound, UnknownSession: there is none; TaskPruned: there was.
        click.ClickException: several sessions have one.
    """
    from .snapshot import check_session, looking, one_task

    with looking(path) as snapshot, snapshot.one_state():
        if scope is not None:
            check_session(snapshot, scope)
        task_seq = one_task(snapshot, scope, name)
        [(found,)] = snapshot.rows("SELECT scope FROM tasks WHERE task_seq = :seq", seq=task_seq)
    return str(found).partition(":")[0], task_seq


async def _record(store: TaskStore, task_seq: int) -> TaskRecord:
    from ..errors import TaskPruned
    from ..models import TaskFilter

    found = await store.list(TaskFilter(after_seq=task_seq - 1, limit=1))
    if not found or found[0].task_seq != task_seq:
        raise TaskPruned(f"task #{task_seq} has been pruned meanwhile", task_id=f"#{task_seq}")
    return found[0]


@asynccontextmanager
async def _asking(path: str, scope: Scope | None, name: str) -> AsyncIterator[tuple[TaskStore, TaskRecord]]:
    """Give a store that makes requests, and the task as it stands."""
    from ..store import TaskStore

    runtime, task_seq = _find(path, scope, name)
    async with TaskStore.connect(path, runtime=runtime) as store:
        yield store, await _record(store, task_seq)


async def _handle(store: TaskStore, found: TaskRecord) -> TaskHandle | None:
    """Return the handle of an incarnation; None if another has its id by now, for which nothing was asked."""
    handle = await store.handle(found.scope, found.id)
    return handle if handle.task_seq == found.task_seq else None


def _tell(record: TaskRecord, as_json: bool) -> None:
    if as_json:
        write_json(task_json(record))
        return
    from rich.text import Text

    console().print(
        Text.assemble(
            f"#{record.task_seq} ",
            text(f"{record.scope} {record.id}", "bold"),
            " ",
            text(record.state, state_style(record.state)),
        )
    )


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[SCOPE] ID")
@click.option("--reason", callback=_reason, metavar="TEXT", help="Why; it stands in the row, and in the events.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the task to stop.",
)
@json_option("Print the row as a JSON object.")
@db_option
@click.pass_context
def cancel(ctx: click.Context, names: tuple[str, ...], reason: str | None, timeout: float, as_json: bool) -> None:
    """Ask a task, and all that descends from it, to stop; then wait for that.

    The request is in the file before anything stops, and stays there whoever dies. The row says cancelled only once the
    body has stopped; a body that finishes first has won. A task whose owner is dead is cancelled at once. One that has
    ended is printed as it is.

    Exit code 3: asked, and not stopped in time; it will stop, or see `lash-store doctor`.

    \b
    Examples:
      lash-store cancel --db agent.db desktop:s1 index --reason "wrong folder"
      lash-store cancel --db agent.db '#12' --timeout 0
    """
    scope, name = names_of_task(ctx, names)
    run(_cancel(ctx, required_db(ctx), scope, name, reason, timeout, as_json))


async def _cancel(
    ctx: click.Context, path: str, scope: Scope | None, name: str, reason: str | None, timeout: float, as_json: bool
) -> None:
    record = await ask_to_stop(path, scope, name, reason, timeout)
    _tell(record, as_json)
    if not record.state.is_terminal:
        complain(f"it was asked to stop, and has not within {timeout:g} s")
        ctx.exit(_ASKED)


async def ask_to_stop(path: str, scope: Scope | None, name: str, reason: str | None, timeout: float) -> TaskRecord:
    """Ask the task that a person means to stop, and return its row when it has, or as it stands after *timeout* seconds."""
    async with _asking(path, scope, name) as (store, record):
        if record.state.is_terminal:
            return record
        handle = await _handle(store, record)
        if handle is None:
            return await _record(store, record.task_seq)
        return await handle.cancel(reason, timeout=timeout)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[SCOPE] ID NAME")
@click.option("--data", "payload", metavar="JSON", help="What the body is handed: a JSON value. Nothing: null.")
@click.option("--key", metavar="KEY", help="Send it once, however often this is called with the key.")
@json_option("Print the row and the verdict as a JSON object.")
@db_option
@click.pass_context
def signal(ctx: click.Context, names: tuple[str, ...], payload: str | None, key: str | None, as_json: bool) -> None:
    """Send a signal to a task, for the body that waits for NAME or will: it is in the file when this returns.

    Exit code 1, too, if the task has ended: then nothing was sent.

    \b
    Examples:
      lash-store signal --db agent.db desktop:s1 deploy approved --data '{"by": "Ada"}'
      lash-store signal --db agent.db deploy approved --key once
    """
    if not 2 <= len(names) <= 3:
        raise click.UsageError("signal takes SCOPE, ID and NAME, or ID and NAME", ctx)
    scope = scope_of(ctx, None, names[0]) if len(names) == 3 else None
    try:
        value = None if payload is None else json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"not JSON: {error} (text needs quotes of its own: '\"yes\"')", ctx) from error
    run(_signal(ctx, required_db(ctx), scope, names[-2], names[-1], value, key, as_json))


async def _signal(
    ctx: click.Context,
    path: str,
    scope: Scope | None,
    name: str,
    what: str,
    value: Any,
    key: str | None,
    as_json: bool,
) -> None:
    from ..models import Transition, Verdict

    async with _asking(path, scope, name) as (store, found):
        handle = await _handle(store, found)
        if handle is None:
            sent = Transition(record=await _record(store, found.task_seq), verdict=Verdict.SUPERSEDED)
        else:
            sent = await handle.signal(what, value, key=key)
    _tell_sent(sent, what, as_json)
    if sent.verdict is Verdict.SUPERSEDED:
        ctx.exit(1)


def _tell_sent(sent: Transition, what: str, as_json: bool) -> None:
    from ..models import Verdict

    if as_json:
        write_json({**task_json(sent.record), "verdict": str(sent.verdict)})
        return
    told = {
        Verdict.APPLIED: f"signal {what!r} was sent",
        Verdict.UNCHANGED: f"signal {what!r} had been sent with that key before: nothing was changed",
        Verdict.SUPERSEDED: f"the task has ended: signal {what!r} was not sent",
    }
    click.echo(safe(told[sent.verdict]))
    _tell(sent.record, as_json)


@click.command()
@click.argument("names", nargs=-1, metavar="[SCOPE] ID")
@click.option("--owner", "owner_id", type=click.IntRange(min=1), metavar="N", help="All work of owner N instead.")
@click.option(
    "--reason", required=True, callback=_reason, metavar="TEXT", help="Why; it stands in the rows as evidence."
)
@json_option("Print the row, or the report, as a JSON object.")
@db_option
@click.pass_context
def abandon(ctx: click.Context, names: tuple[str, ...], owner_id: int | None, reason: str, as_json: bool) -> None:
    """Give up a task that is stuck, or all work of an owner that is: a person's decision, and the last resort.

    Its body, should it go on, cannot write any more. What may be run again is pending and free for the next recovery; the
    rest has ended as abandoned, its outcome unknown. Cancel first: `lash-store cancel`. Owners are named by `lash-store
    list` and `doctor`.

    \b
    Examples:
      lash-store abandon --db agent.db desktop:s1 index --reason "hangs in a driver"
      lash-store abandon --db agent.db --owner 7 --reason "stopped in a debugger"
    """
    if (owner_id is None) == (not names):
        raise click.UsageError("abandon takes SCOPE and ID, or ID alone, or --owner N", ctx)
    if owner_id is not None:
        run(_abandon_owner(required_db(ctx), owner_id, reason, as_json))
        return
    scope, name = names_of_task(ctx, names)
    run(_abandon(required_db(ctx), scope, name, reason, as_json))


async def _abandon(path: str, scope: Scope | None, name: str, reason: str, as_json: bool) -> None:
    async with _asking(path, scope, name) as (store, record):
        if not record.state.is_terminal:
            session = await store.session(record.scope.session_id)
            # by its handle: another task may have the id by now
            handle = await _handle(store, record)
            record = await (
                _record(store, record.task_seq) if handle is None else session.abandon(handle.handle_id, reason)
            )
    _tell(record, as_json)


async def _abandon_owner(path: str, owner_id: int, reason: str, as_json: bool) -> None:
    from ..store import TaskStore

    async with TaskStore.connect(path, runtime="lash-store") as store:
        report = await store.abandon_owner(owner_id, reason)
    if as_json:
        write_json(report.model_dump(mode="json"))
        return
    for record in (*report.abandoned, *report.released):
        _tell(record, as_json)
    click.echo(
        f"owner {owner_id} was given up: {counted(len(report.abandoned), 'task')} abandoned, {len(report.released)} free"
    )
