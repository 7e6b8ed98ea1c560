"""Owns the command `top`: a file as it lives, on a full screen, as one frame, or as JSON Lines."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from .options import db_option, json_option, required_db, scope_of
from .output import complain, console, print_line, safe, write_json

if TYPE_CHECKING:
    from concurrent.futures import Future

    from rich.console import Console

    from ..models import Scope, TaskRecord
    from .board import Board
    from .keyboard import Keyboard
    from .watching import Watch

__all__ = ["top"]


@click.command()
@click.option("--session", "scope", callback=scope_of, metavar="RUNTIME:SESSION", help="Only this session's tasks.")
@click.option("--all", "with_ended", is_flag=True, help="Ended tasks too, the newest 500; the key a does it, too.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1, max=3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait between two looks.",
)
@click.option("--once", is_flag=True, help="Print one frame, all of it, and end: for pipes, and for watch.")
@json_option("Print JSON Lines: one object a frame, until interrupted.")
@db_option
@click.pass_context
def top(ctx: click.Context, scope: Scope | None, with_ended: bool, interval: float, once: bool, as_json: bool) -> None:
    """Watch a file live: its owners, its pace, and each task with its state, its progress and what is the matter.

    Live tasks are shown, and those that ended within the last seconds. `for` is how long a task has been in its state, `age`
    how long it has been there. Looking never holds up who writes, and a file that nobody changes is not read again.

    \b
    Keys:
      up, down, j, k   choose a task; page up and down, home, end
      c                ask the task, and all below it, to stop: y for yes
      a                ended tasks too, or no more
      q, Ctrl-C        end

    \b
    Examples:
      lash-store top --db agent.db
      lash-store top --db agent.db --session desktop:s1 --interval 0.2
      lash-store top --db agent.db --once
      lash-store top --db agent.db --json | jq -c '[.at, .events_a_second]'
    """
    path = required_db(ctx)
    if not once and not as_json:
        _check_terminal(ctx)
    from .snapshot import check_session, looking
    from .watching import Watch

    with looking(path) as snapshot:
        if scope is not None:
            check_session(snapshot, scope)
        watch = Watch(snapshot, None if scope is None else str(scope), with_ended=with_ended)
        if as_json:
            _stream(watch, None if once else interval)
        elif once:
            _print(watch, path)
        else:
            _live(ctx, watch, path, interval)


def _check_terminal(ctx: click.Context) -> None:
    other = "print one frame with --once, or JSON Lines with --json"
    for name, stream in (("stdin", sys.stdin), ("stdout", sys.stdout)):
        if not stream.isatty():
            raise click.UsageError(f"top needs a terminal, and {name} is none: {other}", ctx)
    if console().is_dumb_terminal:
        raise click.UsageError(
            f"top needs a terminal that can move its cursor, and TERM says this one cannot: {other}", ctx
        )


# --- without a screen ------------------------------------------------------------------------------------------------


def _stream(watch: Watch, interval: float | None) -> None:
    while True:
        write_json(watch.frame().to_json(), indent=None)
        sys.stdout.flush()
        if interval is None:
            return
        time.sleep(interval)


def _print(watch: Watch, path: str) -> None:
    from .panel import whole

    out = console()
    for line in whole(watch.frame(), path, out.width, is_ascii=out.options.ascii_only):
        line.rstrip()
        print_line(out, line)


# --- on a screen -----------------------------------------------------------------------------------------------------


def _live(ctx: click.Context, watch: Watch, path: str, interval: float) -> None:
    """Show frames until a person, or a signal, ends it; the signal then does what it does."""
    from concurrent.futures import ThreadPoolExecutor

    from .board import Board
    from .keyboard import Keyboard

    out = console()
    keyboard = Keyboard()
    with ThreadPoolExecutor(1, "lash_store cancel") as beside:

        def ask(task_seq: int) -> Future[TaskRecord]:
            asked = beside.submit(_ask_to_stop, path, task_seq)
            asked.add_done_callback(lambda _: keyboard.wake())
            return asked

        board = Board(path, ask, with_ended=watch.with_ended, is_ascii=out.options.ascii_only)
        with keyboard, _warnings_go_to(board.warn):
            while _show(out, keyboard, watch, board, interval):
                keyboard.stop()
    # the screen is gone: what was asked for last is told below it
    for line in board.settle():
        complain(line)
    if keyboard.ended_by is not None:
        _end_by(keyboard.ended_by)


def _show(out: Console, keyboard: Keyboard, watch: Watch, board: Board, interval: float) -> bool:
    """Have the screen, and say whether to come back to it: after Ctrl-Z."""
    from rich.live import Live
    from rich.text import Text

    due = 0.0
    with Live(
        console=out, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False, transient=True
    ) as live:
        while True:
            if board.settle() or board.with_ended != watch.with_ended or time.monotonic() >= due:
                watch.with_ended = board.with_ended
                board.see(watch.frame())
                due = time.monotonic() + interval
            out.size = _size()
            lines = board.paint(out.width, out.height)
            live.update(Text("\n", no_wrap=True, overflow="crop").join(lines), refresh=True)
            for key in keyboard.read(due - time.monotonic()):
                if not board.press(key):
                    return False
            if keyboard.ended_by is not None:
                return False
            if keyboard.is_to_stop:
                return True


def _size() -> Any:
    """Return the size of the terminal as it is now; one that does not know its own is taken for a small one."""
    from rich.console import ConsoleDimensions

    found = os.get_terminal_size(sys.stdout.fileno())
    return ConsoleDimensions(found.columns or 80, found.lines or 24)


_REASON = "asked for in lash-store top"


def _ask_to_stop(path: str, task_seq: int) -> TaskRecord:
    import asyncio

    from .act import ask_to_stop

    # how the task takes it, the next frames show
    return asyncio.run(ask_to_stop(path, None, f"#{task_seq}", _REASON, 0.0))


@contextlib.contextmanager
def _warnings_go_to(show: Callable[[str], None]) -> Iterator[None]:
    """Show what the package logs where it does not tear the screen."""

    class Shown(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show(safe(record.getMessage()))

    handler, logger = Shown(logging.WARNING), logging.getLogger("lash_store")
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


def _end_by(number: int) -> None:
    """End as the signal would have had it, now that the terminal is as it was."""
    import signal

    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.kill(os.getpid(), number)
