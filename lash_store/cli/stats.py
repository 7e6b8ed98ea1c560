"""Owns the command `stats`: how the figures of a file are laid out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from .options import db_option, json_option, required_db
from .output import Cell, print_table, put, seconds, size, state_style, text, write_json

__all__ = ["stats"]

_MOST = 10
"""Sessions and monitors that are shown, the biggest; ``--json`` has all."""


@click.command()
@json_option("Print one JSON object; bytes are bytes, ages seconds.")
@db_option
@click.pass_context
def stats(ctx: click.Context, as_json: bool) -> None:
    """Count what is in a file: tasks by state and kind, ages of live work, what happened lately, and where the bytes are.

    Tables are measured by the pages they take, with their indexes; sessions by what they stored: arguments, results, events,
    steps, signals, notes and what monitors wrote. Rates count events of the last hour and day.

    \b
    Examples:
      lash-store stats --db agent.db
      lash-store stats --db agent.db --json | jq .rates.hour
      lash-store stats --db agent.db --json | jq '.sessions[:3]'
    """
    from .figures import figures
    from .snapshot import looking

    with looking(required_db(ctx)) as snapshot:
        found = figures(snapshot)
    if as_json:
        write_json(found)
        return
    _file(found["file"])
    _tasks(found["tasks"])
    _live(found["live"])
    _rates(found["rates"])
    _tables(found["tables"], found["file"]["content_bytes"])
    _sessions(found["sessions"])
    _monitors(found["monitors"])


def _title(title: str) -> None:
    put("")
    put(text(title, "bold"))


def _section(title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]], left: int = 0) -> None:
    _title(title)
    print_table(columns, rows)
    if left > 0:
        put(text(f"… {left} more: --json has all", "dim"))


def _number(count: int, style: str = "") -> Cell:
    return (str(count), style) if count else ("0", "dim")


def _file(file: Mapping[str, Any]) -> None:
    line = text(file["path"], "bold")
    line.append_text(
        text(
            f"  revision {file['revision']}  {size(file['bytes'])} and {size(file['wal_bytes'])} of wal; "
            f"{size(file['free_bytes'])} free inside"
        )
    )
    line.overflow = "fold"
    put(line)


def _tasks(by_kind: Mapping[str, Mapping[str, int]]) -> None:
    states = list(dict.fromkeys(state for counts in by_kind.values() for state in counts))
    if not states:
        _title("tasks")
        put(text("none yet", "dim"))
        return
    totals = {state: sum(counts.get(state, 0) for counts in by_kind.values()) for state in states}
    # columns of states that no task is in would only take room
    shown = [state for state in states if totals[state]]
    rows: list[Sequence[Cell]] = []
    for kind, counts in [*by_kind.items(), ("all", totals)] if len(by_kind) > 1 else by_kind.items():
        cells = [_number(counts.get(state, 0), state_style(state)) for state in shown]
        rows.append(((kind, "bold"), *cells, (str(sum(counts.values())), "bold")))
    heads = [(state, "right") for state in shown]
    _section("tasks", (("kind", "fixed"), *heads, ("all", "right")), rows)


def _live(by_state: Mapping[str, Mapping[str, Any]]) -> None:
    rows: list[Sequence[Cell]] = []
    for state, spread in by_state.items():
        oldest = spread["oldest_task"]
        ages = [_age(spread[name]) for name in ("newest", "median", "oldest")]
        which = f"{oldest['scope']} {oldest['id']} #{oldest['task_seq']}"
        rows.append(((state, state_style(state)), str(spread["count"]), *ages, which))
    if rows:
        heads = (("live", "fixed"), ("tasks", "right"), ("newest", "right"), ("median", "right"), ("oldest", "right"))
        _section("ages", (*heads, ("which is", "fold")), rows)


def _age(span: float | None) -> str:
    return "?" if span is None else seconds(span)


def _rates(rates: Mapping[str, Mapping[str, int]]) -> None:
    names = list(rates["hour"])
    rows = [
        [f"last {span}", *(_number(counts[name], state_style(name)) for name in names)]
        for span, counts in rates.items()
    ]
    _section("rates", (("", "fixed"), *((name, "right") for name in names)), rows)


def _tables(tables: Sequence[Mapping[str, Any]] | None, whole: int) -> None:
    if tables is None:
        put("")
        put(text("bytes by table: this SQLite was built without dbstat", "dim"))
        return
    rows: list[Sequence[Cell]] = []
    for table in tables:
        share = f"{table['bytes'] / whole:.0%}" if whole else ""
        rows.append(
            ((table["name"], "bold"), size(table["bytes"]), size(table["index_bytes"]), size(table["unused"]), share)
        )
    heads = (("bytes", "right"), ("of it indexes", "right"), ("unused", "right"), ("of all", "right"))
    _section("bytes by table", (("table", "fold"), *heads), rows)


def _sessions(sessions: Sequence[Mapping[str, Any]]) -> None:
    names = ("tasks", "live", "events", "steps", "signals", "notes", "updates")
    rows: list[Sequence[Cell]] = [
        ((row["scope"], "bold"), size(row["bytes"]), *(_number(row[name]) for name in names))
        for row in sessions[:_MOST]
    ]
    if rows:
        heads = (("bytes", "right"), *((name, "right") for name in names))
        _section("bytes by session", (("session", "fold"), *heads), rows, len(sessions) - len(rows))


def _monitors(monitors: Sequence[Mapping[str, Any]]) -> None:
    rows: list[Sequence[Cell]] = []
    for row in monitors[:_MOST]:
        lines = [_number(row[name]) for name in ("lines", "kept_lines", "dropped", "unread")]
        state = (row["state"], state_style(row["state"]))
        name = f"{row['scope']} {row['monitor_id']} #{row['task_seq']}"
        rows.append(((name, "bold"), state, size(row["bytes"]), size(row["kept_bytes"]), *lines))
    if rows:
        sizes = (("bytes", "right"), ("kept", "right"))
        counts = (("lines", "right"), ("kept", "right"), ("dropped", "right"), ("unread", "right"))
        heads = (("monitor", "fold"), ("state", "fixed"), *sizes, *counts)
        _section("monitors, by what they wrote", heads, rows, len(monitors) - len(rows))
