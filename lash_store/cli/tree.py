"""Owns the command `tree`: who belongs to whom, drawn or as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, names_of_task, required_db
from .output import age_of, console, cropped, print_line, safe, state_style, text, write_json_array

if TYPE_CHECKING:
    from rich.text import Text

    from ..models import Scope
    from .kin import Family, Key, Place
    from .snapshot import Snapshot

__all__ = ["tree"]


@click.command()
@click.argument("names", nargs=-1, metavar="[SESSION | [SCOPE] ID]")
@click.option("--live", "only_live", is_flag=True, help="Only live tasks, and what they are under.")
@click.option(
    "--limit",
    "most",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    metavar="N",
    help="At most N under each: those with live work first, then the newest.",
)
@json_option("Print a JSON array: one flat object a line of the tree, with its depth.")
@db_option
@click.pass_context
def tree(ctx: click.Context, names: tuple[str, ...], only_live: bool, most: int, as_json: bool) -> None:
    """Show the family of a session or a task: what it is under, and all under it; without a name, the whole file.

    A task is under its parent, else under its session; a session under the sub-agent that works in it. SESSION is
    runtime:session, or the session's part of it; '#12' names the task of that number. Ages are since creation.

    \b
    Examples:
      lash-store tree --db agent.db
      lash-store tree --db agent.db desktop:s1 --live
      lash-store tree --db agent.db research
      lash-store tree --db agent.db '#12' --json | jq -r '.[] | select(.state == "failed") | .id'
    """
    scope, name = names_of_task(ctx, names) if names else (None, "")
    from .kin import Family, descend
    from .snapshot import looking

    asked: Key | None = None
    with looking(required_db(ctx)) as snapshot, snapshot.one_state():
        if names:
            asked = _asked(snapshot, scope, name)
        family = Family(snapshot)
        roots = family.load_all() if asked is None else [family.load_around(asked)]
    places = descend(family, roots, most=most, only_live=only_live)
    if as_json:
        write_json_array(_json(family, place, asked) for place in places)
    elif roots:
        _draw(family, places, asked)
    else:
        click.echo("no sessions", err=True)


def _asked(snapshot: Snapshot, scope: Scope | None, name: str) -> Key:
    """Return the member that a person means."""
    from .snapshot import (
        check_session,
        known_sessions,
        many,
        many_runtimes,
        one_task,
        refuse_pruned,
        sessions_named,
        tasks_named,
    )

    if scope is not None:
        check_session(snapshot, scope)
        return one_task(snapshot, scope, name)
    sessions = sessions_named(snapshot, name)
    if name in sessions:
        return name
    tasks = tasks_named(snapshot, None, name)
    if sessions and tasks:
        raise click.ClickException(
            f"{name!r} is a session and a task: write {sessions[0]} for the one, {tasks[0][0]} {name} for the other"
        )
    if len(sessions) > 1:
        raise many_runtimes(name, sessions)
    if len(tasks) > 1:
        raise many(name, [where for where, _ in tasks])
    if not sessions and not tasks:
        refuse_pruned(snapshot, None, name)
        raise click.ClickException(
            f"no session or task {name!r} in this file: its sessions are {known_sessions(snapshot)}; "
            "see lash-store list --all"
        )
    return sessions[0] if sessions else tasks[0][1]


# --- JSON ------------------------------------------------------------------------------------------------------------


def _json(family: Family, place: Place, asked: Key | None) -> dict[str, Any]:
    where = {"depth": len(place.is_last), "is_asked": place.key == asked, "left_out": place.left_out}
    if isinstance(place.key, str):
        session = family.sessions[place.key]._asdict()
        works_for = session.pop("agent")
        return {"type": "session", **where, **session, "works_for": works_for}
    return {"type": "task", **where, **family.tasks[place.key]._asdict()}


# --- drawn -----------------------------------------------------------------------------------------------------------

_LEAST_SAID, _MOST_SAID = 20, 120
_GUIDES = ("│  ", "   ", "├─ ", "└─ ")
_PLAIN_GUIDES = ("|  ", "   ", "+- ", "`- ")


def _draw(family: Family, places: Iterable[Place], asked: Key | None) -> None:
    out = console()
    guides = _PLAIN_GUIDES if out.options.ascii_only else _GUIDES
    for line in _lines(family, places, asked, guides, out.width):
        line.rstrip()
        print_line(out, line)


def _lines(
    family: Family, places: Iterable[Place], asked: Key | None, guides: tuple[str, ...], width: int
) -> Iterator[Text]:
    # what was left out is told below all that is under a member, so after lines that are not known yet
    untold: list[Place] = []
    for place in places:
        while untold and len(place.is_last) <= len(untold[-1].is_last):
            yield _left_out(untold.pop(), guides)
        yield _line(family, place, asked, guides, width)
        if place.left_out:
            untold.append(place)
    while untold:
        yield _left_out(untold.pop(), guides)


def _left_out(place: Place, guides: tuple[str, ...]) -> Text:
    return text(f"{_stem((*place.is_last, True), guides)}… {place.left_out} more: see --limit", "dim")


def _stem(is_last: tuple[bool, ...], guides: tuple[str, ...]) -> str:
    if not is_last:
        return ""
    return "".join(guides[int(last)] for last in is_last[:-1]) + guides[2 + int(is_last[-1])]


def _line(family: Family, place: Place, asked: Key | None, guides: tuple[str, ...], width: int) -> Text:
    line = text("")
    line.append(_stem(place.is_last, guides), "dim")
    style = "bold underline" if place.key == asked else "bold"
    if isinstance(place.key, str):
        session = family.sessions[place.key]
        line.append_text(text(session.scope, style))
        line.append("  closed" if session.closed_at else "  open", "dim" if session.closed_at else "green")
        line.append(f"  {age_of(session.opened_at)}")
        return line
    task = family.tasks[place.key]
    line.append_text(text(task.id, style))
    line.append(f" #{task.task_seq}", "dim")
    line.append(f"  {safe(task.kind)}  ")
    line.append_text(text(task.state, state_style(task.state)))
    line.append(f"  try {task.attempt}  {age_of(task.created_at)}")
    if task.fraction is not None:
        line.append(f"  {task.fraction:.0%}")
    if task.parent_seq in family.tasks and family.tasks[task.parent_seq].scope != task.scope:
        line.append_text(text(f"  in {task.scope}", "yellow"))
    if task.child_scope is not None and task.child_scope not in family.below[place.key]:
        line.append_text(text(f"  works in {task.child_scope}", "yellow"))
    if task.says:
        room = min(max(width - line.cell_len - 2, _LEAST_SAID), _MOST_SAID)
        line.append(f"  {cropped(safe(task.says), room)}", "dim")
    return line
