"""Owns how one task is laid out for a person: every column of its row that says something, its outcome last."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from .output import age, cropped, moment, one_line, safe, state_style, text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..models import StepRecord, TaskRecord
    from ..monitor_models import MonitorUpdate

__all__ = ["card", "memory", "output"]


def memory(steps: Sequence[StepRecord]) -> Table:
    """Return what a task remembers, a line a step."""
    from rich.table import Table

    rows = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for style in ("dim", "dim", "bold", "", "dim"):
        rows.add_column(style=style, overflow="fold")
    for step in steps:
        rows.add_row(f"  {moment(step.saved_at)}", step.kind, text(step.name), text(step.state), text(_came_to(step)))
    return rows


def output(lines: Sequence[MonitorUpdate]) -> Table:
    """Return the last of what a monitor wrote, and where to."""
    from rich.table import Table

    rows = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for style in ("dim", "dim", "dim", ""):
        rows.add_column(style=style, overflow="fold")
    rows.columns[1].justify = "right"
    for line in lines[-_MOST_LINES:]:
        said = text(line.text, "red" if line.stream == "stderr" else "")
        if line.is_cut:
            said.append(" … cut", "dim")
        rows.add_row(f"  {moment(line.at)}", str(line.line), "err" if line.stream == "stderr" else "out", said)
    return rows


_MOST_LINES = 20
"""Lines of a monitor's output that are shown; ``--json`` has all that are kept."""


def _came_to(step: StepRecord) -> str:
    tries = f"try {step.tries}: " if step.tries > 1 and step.kind == "step" else ""
    if step.state == "retrying" and step.failure is not None:
        return f"after try {step.tries} again {moment(step.wake_at)}: {step.failure.type}: {step.failure.message}"
    if step.failure is not None:
        return f"{tries}{step.failure.type}: {step.failure.message}"
    if step.wake_at is not None:
        return f"until {moment(step.wake_at)}"
    return tries + cropped(one_line(step.value), _MOST_VALUE) if step.state == "done" else tries


_MOST_VALUE = 120
"""Characters of a step's value that are shown; ``--json`` has all of it."""


def card(record: TaskRecord) -> RenderableType:
    """Return the row as a heading and a list of names and values."""
    from rich.console import Group

    heading = text(f"{record.scope} {record.id}", "bold")
    heading.append(f"  #{record.task_seq}", "dim")
    heading.overflow = "fold"
    return Group(heading, _rows(record))


def _rows(record: TaskRecord) -> Table:
    from rich.table import Table

    rows = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    for name, value in (*_what(record), *_when(record), *_outcome(record)):
        if value is not None:
            rows.add_row(f"  {name}", value)
    return rows


def _what(record: TaskRecord) -> list[tuple[str, Text | None]]:
    external = record.mode == "external"
    spent = f", {record.attempts_spent} ended by a crash or a retried failure" if record.attempts_spent else ""
    far = " · ".join(
        part for part in (None if record.fraction is None else f"{record.fraction:.0%}", record.progress) if part
    )
    return [
        ("state", text(record.state, state_style(record.state))),
        ("kind", text(f"{record.kind}, {record.mode}")),
        ("waits for", _if(record.waiting_for)),
        (
            "function",
            _if(record.function if record.version is None else f"{record.function}, version {record.version}"),
        ),
        ("label", None if record.label == record.function else text(record.label)),
        ("arguments", None if record.arguments is None else text(one_line(record.arguments))),
        ("attempt", None if external else text(f"{record.attempt} of at most {record.max_attempts}{spent}")),
        ("time-out", None if record.timeout is None else text(f"{record.timeout:g} s an attempt")),
        ("recovery", None if external else text(f"{record.recovery}; cancel {record.cancel_policy}")),
        ("callback", _if(_callback(record) if external else None)),
        ("owner", _if(record.owner_id)),
        ("process", None if record.process is None else text(f"pid {record.process.pid}, and its group")),
        ("parent", None if record.parent_seq is None else text(f"#{record.parent_seq}")),
        ("works in", _if(record.child_session_id)),
        ("on close", None if record.close_policy == "keep" else text(record.close_policy)),
        ("key", _if(record.idempotency_key)),
        ("progress", _if(far or None)),
    ]


def _callback(record: TaskRecord) -> str:
    if not record.has_callback:
        return "none: cancelled by the books"
    return "not called" if record.callback_begun_at is None else f"called {moment(record.callback_begun_at)}"


def _when(record: TaskRecord) -> list[tuple[str, Text | None]]:
    return [
        ("created", text(f"{moment(record.created_at)}, {age(record.created_at)} ago")),
        ("started", _time(record.started_at)),
        ("updated", _time(record.updated_at)),
        ("next try", _time(record.not_before)),
        ("deadline", _time(record.deadline)),
        ("ended", _time(record.completed_at)),
        ("took", None if record.completed_at is None else text(_span(record.created_at, record.completed_at))),
    ]


def _outcome(record: TaskRecord) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if record.cancel_requested_at is not None:
        by = record.cancel_requested_by or "unknown"
        rows.append(("cancel asked", text(f"{moment(record.cancel_requested_at)} by {by}")))
    if record.cancel_reason is not None:
        rows.append(("reason", text(record.cancel_reason)))
    if record.last_error is not None:
        rows.append(("last error", text(f"{record.last_error.type}: {record.last_error.message}", "yellow")))
    if record.callback_error is not None:
        rows.append(("callback", text(f"{record.callback_error.type}: {record.callback_error.message}", "red")))
    if record.state == "completed":
        rows.append(("result", text(one_line(record.result))))
    if record.failure is not None:
        rows.append(("failure", text(f"{record.failure.type}: {record.failure.message}", "red")))
        if record.failure.traceback:
            rows.append(("traceback", _block(record.failure.traceback)))
    if record.evidence is not None:
        seen = record.evidence
        process = "" if seen.pid is None else f", pid {seen.pid} on {seen.host}"
        rows.append(
            ("evidence", text(f"owner {seen.owner_id}{process}: {seen.end}, found {moment(seen.found_at)}", "red"))
        )
        if seen.process is not None:
            rows.append(("its process", text(f"pid {seen.process.pid}: {seen.process.became}", "red")))
        if seen.reason is not None:
            rows.append(("given up", text(f"{seen.reason}, by {seen.by}", "red")))
    return rows


def _block(value: str) -> Text:
    """Keep the line breaks of a traceback, which stay in the column of values, and escape all else."""
    from rich.text import Text

    return Text("\n".join(safe(line) for line in value.rstrip("\n").split("\n")), "dim")


def _if(value: object) -> Text | None:
    return None if value is None else text(value)


def _time(at: datetime | None) -> Text | None:
    return None if at is None else text(moment(at))


def _span(since: datetime, until: datetime) -> str:
    return f"{(until - since).total_seconds():.3f} s, from its creation"
