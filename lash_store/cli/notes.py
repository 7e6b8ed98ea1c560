"""Owns the command `notes`: what background work says to its sessions; looks only, claims and acknowledges nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, most_of, required_db, scope_of
from .output import Cell, age_of, cropped, print_table, safe, write_json_array

if TYPE_CHECKING:
    from ..models import Scope

__all__ = ["notes"]

_MOST_TEXT = 300
"""Characters of a note a table shows; ``--json`` has all of it, and its data."""

_NOTES = """
SELECT n.note_seq, n.scope, n.key, n.task_seq, n.task_id, n.text, n.data, n.posted_at, n.acknowledged_at,
  n.acknowledged_at IS NULL AND n.claim IS NOT NULL
    AND n.claim IS json_extract(iif(json_valid(s.inbox_claim), s.inbox_claim, '{}'), '$.token') AS is_claimed
FROM inbox AS n JOIN sessions AS s USING (scope)
WHERE (:scope IS NULL OR n.scope = :scope) AND (:with_read OR n.acknowledged_at IS NULL)
ORDER BY n.note_seq LIMIT :most
"""


@click.command()
@click.argument("scope", required=False, callback=scope_of, metavar="[SCOPE]")
@click.option("--all", "with_read", is_flag=True, help="Notes that were read, too.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N notes, the oldest first.")
@json_option("Print a JSON array.")
@db_option
@click.pass_context
def notes(ctx: click.Context, scope: Scope | None, with_read: bool, limit: int | None, as_json: bool) -> None:
    """Show what waits in a session's inbox, oldest first; without a session, in all of them.

    It looks only: nothing is claimed or acknowledged, so what is unread stays so for the session. SCOPE is runtime:session.
    A note that is `reading` was claimed by a reader, and not acknowledged yet.

    \b
    Examples:
      lash-store notes --db agent.db desktop:s1
      lash-store notes --db agent.db --all --limit 20
      lash-store notes --db agent.db --json | jq -r '.[].text'
    """
    from .snapshot import check_session, loaded, looking

    where = None if scope is None else str(scope)
    most = most_of(limit)
    with looking(required_db(ctx)) as snapshot:
        if scope is not None:
            check_session(snapshot, scope)
        found = snapshot.dicts(_NOTES, scope=where, with_read=with_read, most=most)
    if as_json:
        write_json_array({**row, "data": loaded(row["data"]), "is_claimed": bool(row["is_claimed"])} for row in found)
    elif found:
        print_table(_COLUMNS, [_line(row) for row in found])
    else:
        inboxes = "any inbox" if where is None else f"the inbox of {safe(where)}"
        click.echo(f"nothing in {inboxes}" if with_read else f"nothing unread in {inboxes}; see --all", err=True)


_COLUMNS = (
    ("#", "right"),
    ("session", "fold"),
    ("task", "fold"),
    ("is", "fixed"),
    ("age", "right"),
    ("note", "fold"),
)


def _line(row: dict[str, Any]) -> tuple[Cell, ...]:
    task = "" if row["task_id"] is None else row["task_id"]
    if row["acknowledged_at"] is not None:
        stands = ("read", "dim")
    else:
        stands = ("reading", "yellow") if row["is_claimed"] else ("unread", "green")
    said = cropped(safe(row["text"]), _MOST_TEXT)
    return (str(row["note_seq"]), row["scope"], (task, "bold"), stands, age_of(row["posted_at"]), said)
