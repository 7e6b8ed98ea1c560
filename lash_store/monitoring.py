"""
Owns what is stored of a running monitor: its process, its lines in a ring, and how it ended.

Units over an open transaction, as in `transitions`; a write of a supervisor names its attempt, and a stale one changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from . import monitor_queries, queries, session_queries, transitions, waking
from .commands import Fence, Launch, Notify, Progress
from .errors import LimitExceeded
from .lifecycle import Task
from .lines import Batch
from .models import EventType, TaskState, Verdict
from .monitor_models import MONITOR_PREFIX, ArmOn, MonitorSpec, WakePolicy
from .monitor_queries import UpdateRow
from .transaction import Transaction
from .transitions import Outcome

__all__ = ["bear", "check_room", "move", "note_not_started", "record_process", "store_lines"]


def check_room(tx: Transaction, scope: str, *, adding: int = 0) -> None:
    """
    Make sure a session may have so many monitors more.

    Raises:
        LimitExceeded: it may not.
    """
    most = None if tx.limits is None else tx.limits.monitors
    if most is not None and monitor_queries.count_live(tx, scope) + adding > most:
        raise LimitExceeded(
            f"session {scope!r} runs {most} monitors, which is its limit: stop one, or give the store other Limits"
        )


def note_not_started(tx: Transaction, scope: str, monitor_id: str, why: str) -> None:
    """Tell a session that its armed monitor could not be started with it."""
    task = queries.task_by_id(tx, scope, f"{MONITOR_PREFIX}{monitor_id}")
    if task is None:
        return
    key, said = f"monitor:{tx.next_seq}", f"monitor {monitor_id!r} was not started: {why}"
    session_queries.insert_note(tx, task, key, said, json.dumps({"monitor": monitor_id, "state": None, "lines": 0}))
    # of the session: the task has ended, and nothing is said of it any more
    data = queries.event_data(EventType.NOTED, {}, {"note_key": key, "note": said})
    queries.insert_event(tx, EventType.NOTED, scope=scope, data=data)


def bear(tx: Transaction, task: Task, spec: MonitorSpec) -> None:
    """Give a new monitor's task its row; what was read of those of its id before is kept no longer."""
    monitor_queries.insert_monitor(tx, task, spec, armed=spec.arm_on is ArmOn.SESSION_START)
    monitor_queries.disarm(tx, task.scope, spec.id, but=task.task_seq)
    _forget(tx, monitor_queries.read_of_monitor(tx, task.scope, spec.id))


def move(tx: Transaction, task: Task, destination: str) -> None:
    """Put a monitor into another session, with what it wrote; of those of its id there, it is the newest."""
    row = monitor_queries.monitor(tx, task.task_seq)
    if row is not None:
        monitor_queries.move_monitor(tx, task.task_seq, destination)
        monitor_queries.add_bytes(tx, row.scope, -row.kept_bytes)
        monitor_queries.add_bytes(tx, destination, row.kept_bytes)
        monitor_queries.disarm(tx, destination, row.monitor_id, but=task.task_seq)


def record_process(tx: Transaction, task: Task, fence: Fence, spec: MonitorSpec, process: str) -> tuple[Outcome, int]:
    """Record the process that is about to run, JSON text, and return how many lines the task has written before."""
    outcome = transitions.transition(tx, task, Launch(fence, process), fresh=False)
    row = monitor_queries.monitor(tx, task.task_seq)
    if outcome.verdict is not Verdict.APPLIED:
        return outcome, 0
    if row is None:
        # the file was taken back to a revision without monitors, and up again
        monitor_queries.insert_monitor(tx, outcome.task, spec, armed=False)
        return outcome, 0
    monitor_queries.set_exit(tx, task.task_seq, None)
    return outcome, row.lines


def store_lines(
    tx: Transaction, task: Task, fence: Fence, spec: MonitorSpec, batch: Batch, before: int, status: int | None
) -> Outcome:
    """
    Store what a monitor wrote, wake its session, and let the oldest lines go that are beyond what is kept.

    *before* is the number of lines of earlier attempts; *status* is that of its process, once that has ended.
    """
    current = transitions.as_it_is(tx, task)
    row = monitor_queries.monitor(tx, task.task_seq)
    if row is None or not current.has_body(fence):
        return Outcome(current, Verdict.SUPERSEDED, stale=True)
    is_news = bool(batch.lines) and not monitor_queries.has_unread(tx, task.task_seq)
    # its end counts, too: else empty lines would be for nothing
    sizes = [len(line.text.encode()) + 1 for line in batch.lines]
    for line, size in zip(batch.lines, sizes, strict=True):
        monitor_queries.insert_line(tx, current, spec.id, line, before + line.number, size)
    monitor_queries.count_up(
        tx,
        task.task_seq,
        lines=batch.written_lines,
        size=batch.written_bytes,
        dropped=batch.dropped,
        kept=len(sizes),
        kept_bytes=sum(sizes),
    )
    if sizes:
        monitor_queries.add_bytes(tx, current.scope, sum(sizes))
    beyond = monitor_queries.kept_lines(tx, current.scope, spec.id) - spec.keep_lines
    if beyond > 0:
        _forget(tx, monitor_queries.oldest_of_monitor(tx, current.scope, spec.id, beyond))
    _keep_within(tx, current.scope)
    is_throttled = batch.is_throttled and status is None
    current = _tell_of_throttling(tx, current, fence, is_throttled, row.throttled_at)
    if status is not None:
        monitor_queries.set_exit(tx, task.task_seq, status)
    if current.state == TaskState.CANCEL_REQUESTED:
        # whoever asked for its end is awake
        return Outcome(current, Verdict.APPLIED)
    if batch.lines and spec.wake_policy is WakePolicy.QUEUE_TURN:
        note = waking.wake(tx, current, row, batch.written_lines)
        if note is not None:
            current = transitions.transition(tx, current, Notify(fence, note)).task
    elif is_news:
        # who follows the feed learns that there is something to take
        told = Progress(fence, current.progress, current.fraction, {"updates": len(batch.lines)})
        current = transitions.transition(tx, current, told).task
    return Outcome(current, Verdict.APPLIED)


def _tell_of_throttling(tx: Transaction, task: Task, fence: Fence, is_throttled: bool, since: str | None) -> Task:
    """Say in the row that a monitor writes more than is stored, once, and once that it does not any more."""
    if is_throttled == (since is not None):
        return task
    monitor_queries.set_throttled(tx, task.task_seq, tx.now if is_throttled else None)
    said = "throttled: it writes more than is stored" if is_throttled else None
    return transitions.transition(tx, task, Progress(fence, said, None)).task


def _keep_within(tx: Transaction, scope: str) -> None:
    """Let the oldest lines of a session's monitors go, as far as they are more than it may keep."""
    most = None if tx.limits is None else tx.limits.update_bytes
    if most is None:
        return
    beyond = monitor_queries.kept_bytes(tx, scope) - most
    while beyond > 0:
        oldest = monitor_queries.oldest_of_session(tx, scope, _AT_A_TIME)
        going: list[UpdateRow] = []
        for row in oldest:
            if beyond <= 0:
                break
            going.append(row)
            beyond -= row.bytes
        if not going:
            return
        _forget(tx, going)


_AT_A_TIME = 256


def _forget(tx: Transaction, going: Sequence[UpdateRow]) -> None:
    if not going:
        return
    monitor_queries.delete_updates(tx, (row.update_seq for row in going))
    for scope in {row.scope for row in going}:
        monitor_queries.add_bytes(tx, scope, -sum(row.bytes for row in going if row.scope == scope))
    for task_seq, rows in _by_task(going):
        monitor_queries.count_up(
            tx,
            task_seq,
            lines=0,
            size=0,
            dropped=sum(row.claim is None for row in rows),
            kept=-len(rows),
            kept_bytes=-sum(row.bytes for row in rows),
        )


def _by_task(rows: Iterable[UpdateRow]) -> Iterable[tuple[int, list[UpdateRow]]]:
    found: dict[int, list[UpdateRow]] = {}
    for row in rows:
        found.setdefault(row.task_seq, []).append(row)
    return found.items()
