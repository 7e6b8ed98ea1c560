"""Owns how what belongs to a task is laid out for a person: handles, children, signals, and how its monitor stands."""

from __future__ import annotations

import signal as signals_of_the_system
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .output import Cell, age_of, cell_text, cropped, one_line, size, state_style, text

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["children", "handles", "heading", "monitor", "signals"]

_MOST = 20
"""Children and signals that are shown; ``--json`` has all."""

_MOST_PAYLOAD = 200
"""Characters of a signal's payload that are shown; ``--json`` has all of it."""


def heading(title: str) -> Text:
    """Return the heading of a section."""
    return text(title, "bold")


def _grid(rows: Iterable[Sequence[Cell]]) -> Table:
    from rich.table import Table

    made = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
    for row in rows:
        while len(made.columns) < len(row):
            made.add_column(overflow="fold", no_wrap=not made.columns)
        made.add_row(*map(cell_text, row))
    return made


def handles(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return who has a handle on the task, and whether the outcome was handed out through it."""
    lines: list[Sequence[Cell]] = []
    for row in rows:
        name = row["name"] if row["namespace"] is None else f"{row['namespace']}/{row['name'] or ''}"
        read = f"read {moment_of(row['read_at'])}" if row["read_at"] else "unread"
        lines.append((f"  {row['role']}", (row["scope"], "bold"), (row["handle_id"], "dim"), read, name or ""))
    return _grid(lines) if lines else None


def children(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return the tasks whose parent it is, the live ones and the newest, when there are many."""
    if not rows:
        return None
    chosen = sorted(rows, key=lambda row: (row["completed_at"] is not None, -row["task_seq"]))[:_MOST]
    lines: list[Sequence[Cell]] = []
    for row in sorted(chosen, key=lambda row: int(row["task_seq"])):
        works_in = "" if row["child_session_id"] is None else f"works in {row['child_session_id']}"
        lines.append(
            (
                (f"  #{row['task_seq']}", "dim"),
                row["scope"],
                (row["id"], "bold"),
                row["kind"],
                (row["state"], state_style(row["state"])),
                f"try {row['attempt']}",
                age_of(row["created_at"]),
                works_in,
            )
        )
    return _grid([*lines, *_left(len(rows) - len(chosen), "more; see lash-store tree")])


def signals(rows: Sequence[dict[str, Any]]) -> Table | None:
    """Return what the task was sent, the newest when there is much."""
    lines: list[Sequence[Cell]] = []
    for row in rows[-_MOST:]:
        taken = f"taken in try {row['taken_attempt']}" if row["taken_at"] else "not taken"
        key = "" if row["key"] is None else f"key {row['key']}"
        payload = cropped(one_line(row["payload"]), _MOST_PAYLOAD)
        when = (f"  {moment_of(row['sent_at'])}", "dim")
        lines.append((when, (row["name"], "bold"), payload, taken, f"from {row['sent_by']}", key))
    return _grid([*_left(len(rows) - len(lines), "earlier"), *lines]) if lines else None


def _left(count: int, what: str) -> list[Sequence[Cell]]:
    return [((f"  … {count}", "dim"), (what, "dim"))] if count > 0 else []


def monitor(row: dict[str, Any]) -> Table:
    """Return how a monitor stands: its process, what it wrote, and what became of that."""
    armed = "yes: starts again with its session" if row["armed"] else "no"
    lines: list[Sequence[Cell]] = [
        (("  id", "dim"), row["monitor_id"]),
        (("  exit status", "dim"), _exit(row["exit_status"])),
        (("  wrote", "dim"), f"{row['lines']} lines, {size(row['bytes'])}"),
        (("  kept", "dim"), f"{row['kept_lines']} lines, {size(row['kept_bytes'])}; {row['unread']} unread"),
        (("  dropped", "dim"), (f"{row['dropped']} lines", "yellow" if row["dropped"] else "")),
        (("  armed", "dim"), armed),
        (("  wakes", "dim"), "its session, with a note" if row["wake_policy"] == "queue_turn" else "nobody"),
    ]
    if row["throttled_at"]:
        lines.append((("  throttled", "dim"), (f"since {moment_of(row['throttled_at'])}", "yellow")))
    return _grid(lines)


def _exit(status: int | None) -> Cell:
    if status is None:
        return "none yet"
    if status >= 0:
        return (str(status), "red" if status else "green")
    try:
        return (f"{status}: {signals_of_the_system.Signals(-status).name}", "red")
    except ValueError:
        return (str(status), "red")


def moment_of(at: str) -> str:
    """Write a time of the file as a person reads it."""
    return at.replace("T", " ")
