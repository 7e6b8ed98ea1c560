"""Owns the command `timeline`: a picture of who did what when, and where it is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import db_option, json_option, required_db, since_of, span_in
from .output import counted, safe, write_json

if TYPE_CHECKING:
    from .chronicle import Chronicle
    from .snapshot import Snapshot

__all__ = ["timeline"]

_SPAN = "a span such as 90s, 2h or 1d12h"


def _last_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a span of time as milliseconds."""
    if value is None:
        return None
    span = span_in(value)
    if span is None:
        raise click.BadParameter(f"{value!r} is no span such as 90s, 2h or 1d12h", ctx, param)
    return round(span * 1000)


@click.command()
@click.argument("session", required=False, metavar="[SESSION]")
@click.option("--session", "as_option", metavar="SESSION", help="The same as the argument, as other commands have it.")
@click.option("--task", "task_name", metavar="ID", help="Only this task, '#12' or its id, and all below it.")
@click.option("--all", "with_all", is_flag=True, help="Every session of the file, a section each.")
@click.option(
    "--output", "-o", "target", type=click.Path(), metavar="FILE", help="Where to; - is stdout. [timeline.svg]"
)
@click.option(
    "--html", "as_html", is_flag=True, help="A web page with a table, instead of SVG; so does a name in .html."
)
@click.option("--force", is_flag=True, help="Write over a FILE that is there.")
@click.option("--since", callback=since_of, metavar="WHEN", help=f"From then on: {_SPAN} ago, or a time in UTC.")
@click.option("--until", callback=since_of, metavar="WHEN", help="Up to then.")
@click.option(
    "--last", callback=_last_of, metavar="SPAN", help="Only so much, counted back from the end of the picture."
)
@click.option(
    "--limit", "most", type=click.IntRange(min=1), default=200, show_default=True, metavar="N",
    help="At most N tasks: live ones first, then the newest.",
)  # fmt: skip
@json_option("Print what the picture would show as a JSON object, and write no file.")
@db_option
@click.pass_context
def timeline(
    ctx: click.Context,
    session: str | None,
    as_option: str | None,
    task_name: str | None,
    with_all: bool,
    target: str | None,
    as_html: bool,
    force: bool,
    since: str | None,
    until: str | None,
    last: int | None,
    most: int,
    as_json: bool,
) -> None:
    """Draw who did what when: a bar a task, with its tries, waits, kills and reattachments, under the owners' lives.

    What a bar shows is what the events say. Nobody can write down when a process dies: its work is hatched from when it was
    last heard of until it was found dead. A body that waits and does not say so, for a signal or a child, is shown as
    running. SESSION is runtime:session, or the session's part of it, and may be left out if
    the file has only one. The picture is one file that needs no other, light or dark as its reader is.

    \b
    Examples:
      lash-store timeline --db agent.db desktop:s1
      lash-store timeline --db agent.db --task '#12' -o task.html
      lash-store timeline --db agent.db --all --last 10m -o - > night.svg
      lash-store timeline --db agent.db s1 --json | jq '.sections[].tasks[].segments'
    """
    from .lifelines import ms_of

    if session is not None and as_option is not None:
        raise click.UsageError("give one SESSION", ctx)
    session = session or as_option
    if with_all and (session is not None or task_name is not None):
        raise click.UsageError("--all shows every session: leave out SESSION and --task", ctx)
    if since is not None and last is not None:
        raise click.UsageError("--since and --last both say where the picture begins: give one", ctx)
    if since is not None and until is not None and since > until:
        raise click.UsageError("--since is after --until: nothing is between them", ctx)
    if as_json and (target is not None or as_html):
        raise click.UsageError("--json prints, and draws nothing: leave out --output and --html", ctx)
    made = _kind(ctx, target, as_html)
    path = required_db(ctx)
    if target is None and not as_json:
        target = f"timeline.{made}"
    if target is not None and target != "-":
        _check(Path(target), path, force)

    from .chronicle import Window, read
    from .chronicle import as_json as data_of
    from .drawing import told
    from .snapshot import looking

    window = Window(ms_of(since), ms_of(until), last)
    with looking(path) as snapshot, snapshot.one_state():
        title, scopes, task = _asked(snapshot, session, task_name, with_all)
        chronicle = read(snapshot, scopes, task, window, most)
    if as_json:
        write_json(data_of(chronicle))
        return
    assert target is not None
    text = _made(chronicle, title, made)
    for words in told(chronicle):
        click.echo(words, err=True)
    if target == "-":
        sys.stdout.write(text)
        return
    _write(Path(target), text, force)
    count = sum(line.task is not None for section in chronicle.sections for line in section.lines)
    click.echo(f"{safe(target)}: {counted(count, 'task')}, {len(text.encode()):,} bytes")


def _kind(ctx: click.Context, target: str | None, as_html: bool) -> str:
    suffix = Path(target).suffix.lower() if target is not None else ""
    if as_html and suffix == ".svg":
        raise click.UsageError(f"--html makes a web page, and {target!r} is named as a picture: name it .html", ctx)
    return "html" if as_html or suffix in {".html", ".htm"} else "svg"


def _made(chronicle: Chronicle, title: str, kind: str) -> str:
    if kind == "svg":
        from .drawing import draw

        return draw(chronicle, title)
    from .page import page

    return page(chronicle, title)


# --- which -----------------------------------------------------------------------------------------------------------


def _asked(
    snapshot: Snapshot, session: str | None, task_name: str | None, with_all: bool
) -> tuple[str, list[str], int | None]:
    """Return a title, and the sessions or the task that a person means."""
    from .snapshot import one_task

    name = snapshot.path.name
    if with_all:
        scopes = [str(scope) for (scope,) in snapshot.rows("SELECT scope FROM sessions ORDER BY session_seq")]
        return f"{name}: all sessions", scopes, None
    scope = None if session is None and task_name is not None else _session(snapshot, session)
    if task_name is None:
        assert scope is not None
        return f"{name}: session {scope}", [scope], None
    task = one_task(snapshot, scope, task_name)
    where, task_id = snapshot.rows("SELECT scope, id FROM tasks WHERE task_seq = :seq", seq=task)[0]
    return f"{name}: task {task_id} of {where}", [], task


def _session(snapshot: Snapshot, name: str | None) -> str:
    """
    Return the session of a name, or the only one.

    Raises:
        UnknownSession: the file has none of that name.
        click.ClickException: it is not clear which is meant.
    """
    from ..errors import UnknownSession
    from .snapshot import known_sessions, many_runtimes, sessions_named, some

    if name is None:
        found = [str(scope) for (scope,) in snapshot.rows("SELECT scope FROM sessions ORDER BY session_seq LIMIT 6")]
        if not found:
            raise click.ClickException("the file has no sessions: there is nothing to draw")
        if len(found) > 1:
            raise click.ClickException(f"which session? the file has {some(found)}; or --all")
        return found[0]
    found = sessions_named(snapshot, name)
    if not found:
        raise UnknownSession(f"no session {name!r} in this file: it has {known_sessions(snapshot)}")
    if len(found) > 1 and found[0] != name:
        raise many_runtimes(name, found)
    return found[0]


# --- where to --------------------------------------------------------------------------------------------------------


def _check(target: Path, database: str, force: bool) -> None:
    """Refuse what must not be written over: with *force* only the store itself, and what belongs to it."""
    from .snapshot import belongs_to

    if belongs_to(target, Path(database)):
        raise click.ClickException(f"{target} is the store itself, or belongs to it: name another file")
    if target.exists() and not force:
        raise click.ClickException(f"{target} is there: --force writes over it, -o FILE names another")


def _write(target: Path, text: str, force: bool) -> None:
    """Write a file; over one that is there only with *force*, and then whole or not at all."""
    if not force:
        with open(target, "x", encoding="utf-8") as file:
            file.write(text)
        return
    if target.exists() and not target.is_file():
        # a pipe or a device: nothing can be put in its place
        target.write_text(text, encoding="utf-8")
        return
    goal = Path(os.path.realpath(target))
    made = goal.with_name(f".{goal.name[:100]}.{os.getpid()}.new")
    try:
        with open(made, "x", encoding="utf-8") as file:
            file.write(text)
        made.replace(goal)
    finally:
        made.unlink(missing_ok=True)
