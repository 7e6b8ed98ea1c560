"""Owns what passes between a command at work and a person at a terminal: how far it is, and whether to go on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from .output import console, safe

__all__ = ["bar", "confirm", "spinner"]


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows how far something is: on a terminal, on stderr; elsewhere nothing is shown."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True) as progress:
        shown = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(shown, completed=done, total=max(total, 1))


@contextmanager
def spinner(title: str) -> Iterator[None]:
    """Show on a terminal that something goes on, and for how long it has."""
    out = console(stderr=True)
    if not out.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=out, transient=True) as progress:
        progress.add_task(safe(title))
        yield


def confirm(ctx: click.Context, question: str, why: str) -> None:
    """
    Ask a person whether to go on; *why* it has to be asked is told where nobody can be.

    Raises:
        click.UsageError: there is no terminal to ask at.
        click.ClickException: the answer was no.
    """
    if not sys.stdin.isatty():
        raise click.UsageError(f"{why}, and nobody can be asked here: give --yes", ctx)
    if not click.confirm(question, err=True):
        raise click.ClickException("nothing was changed")
