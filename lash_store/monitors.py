"""Owns what a session does with monitors: starts them, when it starts itself too, stops them, and looks at them."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from . import handover, monitor_queries, monitoring, session_queries, spawning, transitions
from .births import NewTask
from .core import Core
from .errors import InvalidArguments, LimitExceeded, SessionClosed, TaskExists, TaskNotFound
from .handles import Reference, TaskHandle, reference, refuse_observer
from .lifecycle import Task
from .models import CancelPolicy, ClosePolicy, Recovery, Scope, TaskKind, TaskRecord, check_id
from .monitor_models import MONITOR_PREFIX, MonitorRecord, MonitorSpec
from .supervising import program_of, supervise
from .threads import in_thread
from .transaction import Transaction
from .writer import Unit

__all__ = ["look", "start", "start_armed", "stop"]

log = logging.getLogger(__name__)


async def start(core: Core, scope: Scope, spec: MonitorSpec, *, is_armed: bool = False) -> TaskHandle:
    """
    Start a monitor, and return its task's handle once that is durable; see `SessionTasks.start_monitor`.

    One that *is armed* was checked before, and is not started if it is armed no more.
    """
    core.to_create()
    if not isinstance(spec, MonitorSpec):
        raise InvalidArguments(f"start_monitor() is given a MonitorSpec, not {type(spec).__name__}")
    if not is_armed:
        spec = spec.model_copy(update={"cwd": str(Path(_here(), spec.cwd or ""))})
        await in_thread(program_of, spec)
    columns = {
        "id": spec.task_id,
        "kind": TaskKind.MONITOR,
        "label": spec.label or spec.id,
        "recovery": Recovery.RERUN if spec.restart_on_restore else Recovery.OWNER_BOUND,
        "close_policy": ClosePolicy.CANCEL,
        "monitor": spec,
    }
    return await spawning.spawn(
        core,
        scope,
        supervise,
        (spec,),
        {},
        columns,
        cancel_policy=CancelPolicy.ABORT_LOCAL,
        timeout=spec.seconds,
        takes_slot=False,
        prepare=_still_armed if is_armed else lambda tx, new: new,
    )


def _still_armed(tx: Transaction, new: NewTask) -> NewTask:
    if new.monitor is None or not monitor_queries.is_armed(tx, str(new.scope), new.monitor.id):
        raise TaskNotFound(f"{new.id!r} was stopped meanwhile", task_id=new.id)
    return new


def _here() -> str:
    try:
        return os.getcwd()  # noqa: PTH109, a word to be stored
    except OSError as error:
        raise InvalidArguments(f"the folder of this process is gone ({error.strerror}): give cwd=") from error


async def start_armed(core: Core, scope: Scope) -> None:
    """Start what is to be started with a session and does not run; what cannot be is told to the log, and by its row."""
    for monitor_id, spec in await core.look(lambda tx: _to_start(tx, scope)):
        try:
            if spec is None:
                raise InvalidArguments(f"the spec of monitor {monitor_id!r} cannot be read")
            await start(core, scope, spec, is_armed=True)
        except (TaskExists, TaskNotFound):
            # somebody else was first
            continue
        except (InvalidArguments, LimitExceeded, SessionClosed) as error:
            log.warning("monitor_not_started", extra={"scope": str(scope), "monitor": monitor_id}, exc_info=True)
            await core.to_request().run(_not_started(scope, monitor_id, str(error)))


def _not_started(scope: Scope, monitor_id: str, why: str) -> Unit[None]:
    return lambda tx: monitoring.note_not_started(tx, str(scope), monitor_id, why)


def _to_start(tx: Transaction, scope: Scope) -> list[tuple[str, MonitorSpec | None]]:
    row = session_queries.session(tx, str(scope))
    return [] if row is None or row.closed_at is not None else monitor_queries.to_start(tx, str(scope))


async def stop(core: Core, scope: Scope, monitor: Reference, reason: str | None, timeout: float | None) -> TaskRecord:
    """Stop a monitor, and let it not start with its session any more; see `SessionTasks.stop_monitor`."""
    named = check_id("monitor id", reference(monitor)).removeprefix(MONITOR_PREFIX)
    task_id = f"{MONITOR_PREFIX}{named}"

    def find(tx: Transaction) -> Task:
        seen = handover.look_up(tx, scope, named) if named.startswith("h-") else None
        seen = seen or handover.look_up(tx, scope, task_id)
        if seen is None or not seen.task.is_monitor:
            if session_queries.session(tx, str(scope)) is None:
                raise transitions.unknown_session(scope)
            raise TaskNotFound(
                f"monitor {named!r} is not in session {str(scope)!r}: monitors() shows what is",
                task_id=task_id,
            )
        refuse_observer(seen.handle.handle_id, seen.handle.role)
        # also one that has ended, which no cancel would disarm
        monitor_queries.disarm_one(tx, seen.task.task_seq)
        return seen.task

    return await core.cancel(find, reason, timeout)


async def look(core: Core, scope: Scope) -> list[MonitorRecord]:
    """Read a session's monitors, of each id the live one, else the newest."""
    await core.check_session(scope)
    rows = await core.reader.rows(monitor_queries.MONITORS, {"scope": str(scope)})
    return [monitor_queries.monitor_record(row) for row in rows]
