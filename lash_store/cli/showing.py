"""Owns the command `show`: all that a file knows of one task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, names_of_task, required_db
from .output import EventLines, console, event_json, put, task_json, write_json

if TYPE_CHECKING:
    from ..models import StepRecord, TaskEvent, TaskRecord
    from ..monitor_models import MonitorUpdate
    from .snapshot import Snapshot

__all__ = ["show"]


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="[SCOPE] ID")
@json_option("Print one JSON object: the row's columns, and all that belongs to the task.")
@db_option
@click.pass_context
def show(ctx: click.Context, names: tuple[str, ...], as_json: bool) -> None:
    """Show one task: its row, its times, its outcome, and all that belongs to it.

    That is who has a handle on it, its children, what it remembers, what it was sent, what it wrote as a monitor, and its
    events. SCOPE is runtime:session. Without it, ID must be in one session only. An id names the live task, else the newest
    of that id; '#12' names the incarnation of that number.

    \b
    Examples:
      lash-store show --db agent.db desktop:s1 index
      lash-store show --db agent.db index
      lash-store show --db agent.db '#12' --json | jq .result
      lash-store show --db agent.db monitor:tests --json | jq -r '.updates[].text'
    """
    scope, name = names_of_task(ctx, names)
    from .snapshot import check_session, looking, one_task

    with looking(required_db(ctx)) as snapshot, snapshot.one_state():
        if scope is not None:
            check_session(snapshot, scope)
        task_seq = one_task(snapshot, scope, name)
        record, steps, lines, history = _records(snapshot, task_seq)
        about = _about(snapshot, task_seq)
    if as_json:
        remembered = [step.model_dump(mode="json") for step in steps]
        written = [{**line.model_dump(mode="json"), "scope": str(line.scope)} for line in lines]
        told = [event_json(event) for event in history]
        write_json({**task_json(record), **about, "steps": remembered, "updates": written, "events": told})
        return
    _print(record, about, steps, lines, history)


def _print(
    record: TaskRecord,
    about: dict[str, Any],
    steps: list[StepRecord],
    lines: list[MonitorUpdate],
    history: list[TaskEvent],
) -> None:
    from . import belongings
    from .card import card, memory, output

    put(card(record))
    monitor = about["monitor"]
    sections = (
        ("monitor", belongings.monitor(monitor) if monitor else None),
        ("handles", belongings.handles(about["handles"])),
        ("children", belongings.children(about["children"])),
        ("signals", belongings.signals(about["signals"])),
        ("remembers", memory(steps) if steps else None),
        ("wrote", output(lines) if lines else None),
    )
    out = console()
    for heading, rows in sections:
        if rows is not None:
            put("")
            put(belongings.heading(heading))
            put(rows)
    put("")
    events = EventLines(out, with_task=False)
    for event in history:
        events.print(event)


def _records(
    snapshot: Snapshot, task_seq: int
) -> tuple[TaskRecord, list[StepRecord], list[MonitorUpdate], list[TaskEvent]]:
    from .. import monitor_queries, queries, step_queries
    from ..lifecycle import Task
    from ..transaction import Committed
    from .snapshot import no_task

    row = snapshot.row(queries.TASK_BY_SEQ, task_seq=task_seq)
    if row is None:
        raise no_task(None, f"#{task_seq}")
    steps = snapshot.rows(step_queries.STEPS, task_seq=task_seq)
    lines = snapshot.rows(monitor_queries.UPDATES_OF_TASK, task_seq=task_seq)
    events = snapshot.rows(queries.events_page(frozenset({"task_seq"})), task_seq=task_seq, limit=-1)
    return (
        queries.task_record(Task._make(row)),
        [step_queries.step_record(step_queries.StepRow._make(step)) for step in steps],
        [monitor_queries.update_record(line) for line in lines],
        [queries.event_record(Committed._make((*event, None, None))) for event in events],
    )


# --- what belongs to a task ------------------------------------------------------------------------------------------

_HANDLES = """
SELECT handle_id, scope, role, name, namespace, created_at, read_at
FROM handles WHERE task_seq = :task_seq ORDER BY handle_seq
"""

_CHILDREN = """
SELECT task_seq, scope, id, kind, state, attempt, created_at, completed_at, child_session_id
FROM tasks WHERE parent_seq = :task_seq ORDER BY task_seq
"""

_SIGNALS = """
SELECT signal_seq, name, key, payload, sent_at, sent_by, taken_at, taken_attempt
FROM signals WHERE task_seq = :task_seq ORDER BY signal_seq
"""

_MONITOR = """
SELECT m.monitor_id, m.wake_policy, m.armed, m.lines, m.bytes, m.dropped, m.kept_lines, m.kept_bytes,
  (SELECT COUNT(*) FROM updates AS u WHERE u.task_seq = m.task_seq AND u.acknowledged_at IS NULL) AS unread,
  m.throttled_at, m.exit_status
FROM monitors AS m WHERE m.task_seq = :task_seq
"""


def _about(snapshot: Snapshot, task_seq: int) -> dict[str, Any]:
    """Return what other tables have on a task, as plain JSON."""
    from .snapshot import loaded

    monitors = snapshot.dicts(_MONITOR, task_seq=task_seq)
    sent = snapshot.dicts(_SIGNALS, task_seq=task_seq)
    return {
        "handles": snapshot.dicts(_HANDLES, task_seq=task_seq),
        "children": snapshot.dicts(_CHILDREN, task_seq=task_seq),
        "signals": [{**signal, "payload": loaded(signal["payload"])} for signal in sent],
        "monitor": {**monitors[0], "armed": bool(monitors[0]["armed"])} if monitors else None,
    }
