"""Owns the commands that list what is in a file: `list` and `sessions`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, most_of, required_db, scope_of, since_of, text_of, words
from .output import Cell, age_of, cropped, print_table, safe, size, state_style, write_json_array
from .phrases import ENDED, LIVE, SAYS, STATES, said

if TYPE_CHECKING:
    from ..models import Scope, TaskKind, TaskState
    from .snapshot import Snapshot

__all__ = ["list_tasks", "sessions"]

_MOST_PROGRESS = 120
"""Characters of a progress message a table shows; `show` has all of it."""

_PAGE = 1000
"""Rows that are read at a time: what is printed slowly holds no state of the file back."""

_SEARCHED = "id, label, progress, arguments or failure message"


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
@click.option(
    "--since",
    callback=since_of,
    metavar="WHEN",
    help="Only tasks that changed since: a span such as 90s, 2h or 1d12h, or a time such as 2025-01-31T09:30, in UTC.",
)
@click.option(
    "--text",
    "wanted",
    callback=text_of,
    metavar="TEXT",
    help=f"Only tasks with TEXT in their {_SEARCHED}; A to Z are found as a to z, too.",
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
    since: str | None,
    wanted: str | None,
    with_finished: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    """List tasks, oldest first: the live ones, unless --all or --state says otherwise.

    \b
    Examples:
      lash-store list --db agent.db
      lash-store list --db agent.db --session desktop:s1 --all
      lash-store list --db agent.db --state failed --state abandoned --since 2h
      lash-store list --db agent.db --all --text invoice
      lash-store list --db agent.db --all --json | jq '.[].progress'
    """
    from .snapshot import check_session, looking

    conditions, parameters = _chosen(scope, kinds, states, since, wanted, with_finished)
    most = most_of(limit)
    with looking(required_db(ctx)) as snapshot:
        if scope is not None:
            check_session(snapshot, scope)
        if as_json:
            write_json_array(_rows_json(snapshot, conditions, parameters, most))
            return
        # live rows are few beside a long history: their own index first, then the order
        order = "+t.task_seq" if _IS_LIVE in conditions else "t.task_seq"
        found = snapshot.rows(f"{_LINES} WHERE {conditions} ORDER BY {order} LIMIT :most", **parameters, most=most)
    if found:
        print_table(_COLUMNS, [_line(row) for row in found])
    else:
        click.echo(_nothing(wanted, with_finished, bool(kinds or states or since)), err=True)


def _nothing(wanted: str | None, with_finished: bool, is_narrowed: bool) -> str:
    if wanted is not None:
        what = "task" if with_finished else "live task"
        more = "" if with_finished else "; see --all"
        return f"no such {what} with {safe(repr(wanted))} in its {_SEARCHED}{more}"
    return "no such tasks" if with_finished or is_narrowed else "no live tasks; see --all"


# --- which -----------------------------------------------------------------------------------------------------------


_IS_LIVE = "t.completed_at IS NULL"


def _has(column: str) -> str:
    return f"instr(lower({column}), lower(:text)) > 0"


_HAS_TEXT = f"""(
  {_has("t.id")} OR {_has("t.label")} OR {_has("t.progress")} OR {_has("t.arguments")}
  OR instr(lower(t.arguments), lower(:as_json)) > 0 OR instr(lower(t.arguments), lower(:as_ascii)) > 0
  OR t.failure IS NOT NULL AND {_has(said("failure", "message"))}
)"""


def _chosen(
    scope: Scope | None,
    kinds: tuple[TaskKind, ...],
    states: tuple[TaskState, ...],
    since: str | None,
    wanted: str | None,
    with_finished: bool,
) -> tuple[str, dict[str, Any]]:
    """Return the condition on `tasks AS t` and its parameters."""
    where, parameters = ["1"], dict[str, Any]()
    # naming a terminal state includes it
    if not with_finished and not any(state.is_terminal for state in states):
        where.append(_IS_LIVE)
    if scope is not None:
        where.append("t.scope = :scope")
        parameters["scope"] = str(scope)
    for column, chosen in (("kind", kinds), ("state", states)):
        if chosen:
            where.append(f"t.{column} IN (SELECT value FROM json_each(:{column}))")
            parameters[column] = json.dumps([*chosen])
    if since is not None:
        where.append("t.updated_at >= :since")
        parameters["since"] = since
    if wanted is not None:
        where.append(_HAS_TEXT)
        parameters["text"] = wanted
        # arguments stand in the file as JSON, which writes some characters in another way, and others in two
        parameters["as_json"] = json.dumps(wanted, ensure_ascii=False)[1:-1]
        parameters["as_ascii"] = json.dumps(wanted)[1:-1]
    return " AND ".join(where), parameters


def _rows_json(
    snapshot: Snapshot, conditions: str, parameters: Mapping[str, Any], most: int
) -> Iterator[dict[str, Any]]:
    """Yield rows a page at a time, so that a slow reader keeps no old state of the file alive."""
    from .snapshot import row_json

    after = 0
    sql = f"SELECT t.* FROM tasks AS t WHERE {conditions} AND t.task_seq > :after ORDER BY t.task_seq LIMIT :page"
    while most:
        page = _PAGE if most < 0 else min(most, _PAGE)
        found = snapshot.dicts(sql, **parameters, after=after, page=page)
        yield from map(row_json, found)
        if len(found) < page:
            return
        after, most = found[-1]["task_seq"], most - len(found) if most > 0 else most


# --- how -------------------------------------------------------------------------------------------------------------

_LINES = f"""
SELECT t.task_seq, t.scope, t.id, t.kind, t.state, t.attempt, t.fraction, t.created_at, substr({SAYS}, 1, {_MOST_PROGRESS * 4})
FROM tasks AS t"""

_COLUMNS = (
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


def _line(row: tuple[Any, ...]) -> tuple[Cell, ...]:
    task_seq, scope, task_id, kind, state, attempt, fraction, created_at, says = row
    return (
        str(task_seq),
        scope,
        (task_id, "bold"),
        kind,
        (state, state_style(state)),
        str(attempt),
        "" if fraction is None else f"{fraction:.0%}",
        age_of(created_at),
        cropped(safe(says), _MOST_PROGRESS) if says else "",
    )


# --- sessions --------------------------------------------------------------------------------------------------------

_COUNTS = ", ".join(f"COUNT(*) FILTER (WHERE state = '{state}') AS {state}" for state in STATES)
_SESSIONS = f"""
WITH work AS (SELECT scope, {_COUNTS}, MAX(updated_at) AS changed_at FROM tasks GROUP BY scope),
  notes AS (SELECT scope, COUNT(*) AS unread FROM inbox WHERE acknowledged_at IS NULL GROUP BY scope),
  lines AS (SELECT scope, COUNT(*) AS unread FROM updates WHERE acknowledged_at IS NULL GROUP BY scope)
SELECT s.scope, s.parent, s.opened_at, s.closed_at, s.sync_needed,
  {", ".join(f"COALESCE(work.{state}, 0) AS {state}" for state in STATES)},
  COALESCE(notes.unread, 0) AS unread_notes, COALESCE(lines.unread, 0) AS unread_updates, s.update_bytes,
  MAX(s.opened_at, COALESCE(s.closed_at, ''), COALESCE(work.changed_at, '')) AS changed_at
FROM sessions AS s LEFT JOIN work USING (scope) LEFT JOIN notes USING (scope) LEFT JOIN lines USING (scope)
WHERE s.closed_at IS NULL OR NOT :only_open
ORDER BY s.session_seq
"""


@click.command()
@click.option("--open", "only_open", is_flag=True, help="Only sessions that are open.")
@json_option("Print a JSON array.")
@db_option
@click.pass_context
def sessions(ctx: click.Context, only_open: bool, as_json: bool) -> None:
    """List sessions, oldest first: how many tasks of each live, how the others ended, and what nobody has read yet.

    Notes are what waits in a session's inbox, lines what its monitors wrote; see `lash-store notes`.

    \b
    Examples:
      lash-store sessions --db agent.db
      lash-store sessions --db agent.db --open
      lash-store sessions --db agent.db --json | jq '.[] | select(.unread_notes > 0) | .scope'
    """
    from .snapshot import looking

    with looking(required_db(ctx)) as snapshot:
        found = snapshot.dicts(_SESSIONS, only_open=only_open)
    if as_json:
        write_json_array(map(_session_json, found))
    elif found:
        _print_sessions(found)
    else:
        click.echo("no open sessions" if only_open else "no sessions", err=True)


def _session_json(row: dict[str, Any]) -> dict[str, Any]:
    made = {name: value for name, value in row.items() if name not in STATES}
    return {**made, "sync_needed": bool(row["sync_needed"]), "tasks": {state: row[state] for state in STATES}}


_SESSION_COLUMNS = (
    ("session", "fold"),
    ("is", "fixed"),
    ("live", "right"),
    ("completed", "right"),
    ("failed", "right"),
    ("cancelled", "right"),
    ("abandoned", "right"),
    ("notes", "right"),
    ("lines", "right"),
    ("kept", "right"),
    ("age", "right"),
    ("changed", "right"),
    ("parent", "fold"),
)


def _print_sessions(found: Sequence[dict[str, Any]]) -> None:
    """Print a row a session; a column in which nothing stands would only take room."""
    lines = [_session_line(row) for row in found]
    shown = [place for place, column in enumerate(zip(*lines, strict=True)) if place < 4 or any(map(_says, column))]
    print_table([_SESSION_COLUMNS[place] for place in shown], [[line[place] for place in shown] for line in lines])


def _says(cell: Cell) -> bool:
    return cell not in {"", _NONE}


_NONE: Cell = ("0", "dim")


def _session_line(row: dict[str, Any]) -> tuple[Cell, ...]:
    live = sum(row[state] for state in LIVE)
    ended = ((row[state], state) for state in ENDED)
    return (
        (row["scope"], "bold"),
        ("closed", "dim") if row["closed_at"] else ("open", "green"),
        (str(live), "green") if live else _NONE,
        *((str(count), state_style(state)) if count else _NONE for count, state in ended),
        *(str(row[name] or "") for name in ("unread_notes", "unread_updates")),
        size(row["update_bytes"]) if row["update_bytes"] else "",
        age_of(row["opened_at"]),
        age_of(row["changed_at"]),
        row["parent"] or "",
    )
