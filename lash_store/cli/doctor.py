"""Owns the command that says whether a file is sound, and what to do where it is not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .dialogue import bar
from .options import db_option, json_option, required_db
from .output import console, counted, safe, text, write_json
from .running import told_in_one_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..findings import CheckReport

__all__ = ["doctor"]

_LEAST = 20
"""Cells a text has beside its mark, however narrow the terminal is."""

_STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@click.command()
@click.option(
    "--repair",
    is_flag=True,
    help="Mend what cannot lose anything, unless something is damaged: permissions, WAL mode, definitions, empty room, "
    "a long wal, lock files of the dead.",
)
@json_option("Print the report as a JSON object.")
@db_option
@click.pass_context
def doctor(ctx: click.Context, repair: bool, as_json: bool) -> None:
    """Look at the whole file, and name the next step for whatever is wrong with it.

    SQLite's own checks; every task's row against what its events say; orphans; owners that are dead, stopped or out of
    reach; cancels that do not come to an end; processes of monitors that nobody watches; room that holds nothing. It works
    beside live owners, on one state of the file.

    Exit code 1: something is wrong or left to be done.

    \b
    Examples:
      lash-store doctor --db agent.db
      lash-store doctor --db agent.db --repair
      lash-store doctor --db agent.db --json | jq '.findings[].code'
    """
    from pathlib import Path

    from ..checking import check

    told_in_one_line()
    with bar("looking") as show:
        report = check(Path(required_db(ctx)), repair=repair, progress=show)
    if as_json:
        write_json({**report.model_dump(mode="json"), "is_sound": report.is_sound})
    else:
        _print(report)
    ctx.exit(0 if report.is_sound else 1)


def _print(report: CheckReport) -> None:
    from rich.text import Text

    out = console()
    revision = report.revision or "none"
    held = f"{counted(report.tasks, 'task')}, {counted(report.events, 'event')}"
    out.print(text(f"{report.path}: revision {revision}, {held}", "bold"))
    for one in report.findings:
        mark = "mended" if one.is_repaired else str(one.severity)
        style = "green" if one.is_repaired else _STYLES[one.severity]
        out.print()
        _print_beside(out, Text(f"{mark:<8}", style), text(f"{one.code}: {one.message}"))
        if not one.is_repaired:
            _print_beside(out, Text("        → "), text(one.next_step, "dim"))
    out.print()
    wrong = sum(one.severity != "info" and not one.is_repaired for one in report.findings)
    verdict = "sound" if report.is_sound else f"{wrong} to see to"
    out.print(text(safe(verdict), "bold green" if report.is_sound else "bold"))


def _print_beside(out: Console, mark: Text, said: Text) -> None:
    """Print a text beside a mark, and under itself where it is too long for a line."""
    from rich.text import Text

    for line in said.wrap(out, max(out.width - mark.cell_len, _LEAST)):
        line.rstrip()
        out.print(Text.assemble(mark, line), soft_wrap=True)
        mark = Text(" " * mark.cell_len)
