"""
Owns how a monitor wakes its session: one note while that is unread, whatever happens meanwhile.

Units over an open transaction, as in `transitions`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import monitor_queries, queries, session_queries
from .lifecycle import Task
from .models import EventType, TaskState
from .monitor_models import WakePolicy
from .monitor_queries import MonitorRow
from .transaction import Transaction

__all__ = ["wake", "wake_at_end"]


def wake(tx: Transaction, task: Task, monitor: MonitorRow, lines: int) -> Mapping[str, str] | None:
    """
    Put into a session's inbox that its monitor wrote so many *lines* more, or has ended.

    Return what the event of a note tells that was posted for it; None if one that is unread says so now.
    """
    before = monitor_queries.note_to_add_to(tx, task.task_seq)
    if before is not None:
        lines += _lines_told(before[1])
    what: dict[str, Any] = {"monitor": monitor.monitor_id, "state": task.state, "lines": lines}
    said = f"monitor {monitor.monitor_id!r}"
    if lines:
        said += f" wrote {lines} {'line' if lines == 1 else 'lines'}"
    if task.is_terminal:
        said += f"{', and' if lines else ''} {_ended(task, what)}"
        if monitor.exit_status is not None:
            what["exit_status"] = monitor.exit_status
    if before is not None:
        monitor_queries.rewrite_note(tx, before[0], said, json.dumps(what))
        return None
    # a key that no earlier note of the task has: the number of the event that will tell of it
    key = f"monitor:{tx.next_seq}"
    session_queries.insert_note(tx, task, key, said, json.dumps(what))
    return {"note_key": key, "note": said}


def wake_at_end(tx: Transaction, task: Task) -> None:
    """Tell a monitor's session that it has ended, unless that was asked for; before the event that says so itself."""
    monitor = monitor_queries.monitor(tx, task.task_seq)
    if monitor is None or monitor.wake_policy != WakePolicy.QUEUE_TURN or task.cancel_requested_at is not None:
        return
    note = wake(tx, task, monitor, 0)
    if note is not None:
        data = queries.event_data(EventType.NOTED, {}, note)
        queries.insert_event(tx, EventType.NOTED, scope=task.scope, task=task, data=data, is_last=False)


def _lines_told(data: str) -> int:
    """Return how many lines a note tells of; none, if somebody's hand has written it."""
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        return 0
    lines = told.get("lines") if isinstance(told, dict) else None
    return lines if isinstance(lines, int) else 0


def _ended(task: Task, what: dict[str, Any]) -> str:
    if task.failure is None:
        return "was abandoned" if task.state == TaskState.ABANDONED else str(task.state)
    failure = json.loads(task.failure)
    what |= {"type": failure["type"], "message": failure["message"]}
    return f"{task.state}: {failure['message']}"
