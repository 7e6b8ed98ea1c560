"""Owns the command line: its commands, its exit codes, and how errors leave it; never imports a store to print help."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import click

from .. import __version__
from ..errors import StorageCorrupt, StoreError
from .options import db_option, given_db
from .output import complain, safe

__all__ = ["cli", "main"]

_SECTIONS = {
    "See for yourself": {
        "demo": ("demo:demo", "Kill a working process, start it again, lose nothing."),
    },
    "Look, beside whoever writes": {
        "sessions": ("listing:sessions", "List sessions: what lives in each, how the rest ended, what is unread."),
        "list": ("listing:list_tasks", "List tasks: the live ones, or all."),
        "show": ("showing:show", "Show one task: its row, outcome, events, and all that belongs to it."),
        "tree": ("tree:tree", "Show who belongs to whom: parents, children, sub-agents and their sessions."),
        "top": ("top:top", "All that is live, as it changes; a key asks a task to stop."),
        "events": ("events:events", "Print what happened, in order; --follow goes on."),
        "notes": ("notes:notes", "Look into inboxes: what waits to be read; takes nothing."),
        "stats": ("stats:stats", "Count: tasks, ages, rates, and where the bytes are."),
        "timeline": ("timeline:timeline", "Draw a session: a bar a task, its tries, waits, kills; SVG or HTML."),
        "query": ("ask:query", "Ask a question of the cook-book, or print its SQL."),
    },
    "Act on live work": {
        "cancel": ("act:cancel", "Ask a task, and all below it, to stop."),
        "signal": ("act:signal", "Send a signal to a task that waits, or will."),
        "abandon": ("act:abandon", "Give up what is stuck; a person's decision."),
    },
    "Keep the file": {
        "doctor": ("doctor:doctor", "Check the file, and name the next step for what is wrong."),
        "backup": ("keeping:backup", "Copy the file while it is in use; verified."),
        "restore": ("keeping:restore", "Put a backup back, once it is verified."),
        "prune": ("keeping:prune", "Take finished tasks out of the file, and shrink it."),
        "export": ("export:export", "Write the file's contents as JSON Lines."),
    },
    "Its schema": {
        "current": ("revising:current", "Print the revision a file is at."),
        "upgrade": ("revising:upgrade", "Bring a file to this package's revision; --sql only prints how."),
        "downgrade": ("revising:downgrade", "Take a file back to an older revision, and say what it loses."),
        "history": ("revising:history", "List the revisions, and what each adds."),
        "schema": ("ddl:schema", "Print a file's tables, indexes, triggers and views as SQL."),
    },
}

_COMMANDS = {name: command for section in _SECTIONS.values() for name, command in section.items()}

_INTERRUPTED = 130
_PIPE_CLOSED = 141


class _Commands(click.Group):
    """A group that imports the module of a command when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command = getattr(import_module(f".{module}", __name__), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _SECTIONS.items():
            with formatter.section(title):
                formatter.write_dl([(name, summary) for name, (_, summary) in commands.items()], col_max=10)


@click.group(cls=_Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@db_option
@click.version_option(__version__, "--version", prog_name="lash-store")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Look into a lash_store file, and keep it, beside the programs that use it.

    The file is given by --db, before or after the command, or by the environment variable LASH_STORE_DB. What looks
    writes nothing to it. What lists has --json; `lash-store COMMAND --help` has examples.

    \b
    Examples:
      lash-store demo                           the main job, a kill -9 included
      lash-store --db agent.db list             what is going on
      lash-store --db agent.db show '#12'       all about one task
      lash-store --db agent.db events --follow  what happens, as it happens

    \b
    Exit codes:
      0    done
      1    the file or the task is not usable, the doctor found something, or the demo lost something
      2    wrong usage
      3    asked for, and it has not happened yet
      130  interrupted; 141  the reader of the output went away
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def _invoke(ctx: click.Context) -> None:
    try:
        cli.invoke(ctx)
    except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
        # a row of a damaged file may be anything: then nothing else is at fault
        from .snapshot import damage_of

        path = given_db(ctx)
        wrong = None if path is None else damage_of(Path(path))
        if wrong is None:
            raise
        raise StorageCorrupt(f"{path} is damaged ({wrong}): see lash-store doctor") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; every expected error is one line on stderr."""
    if sys.stdout is None:
        # before anything is done: nobody would learn of it
        complain("stdout is closed: there is nowhere to print to")
        return 1
    for stream in (sys.stdout, sys.stderr):
        # what the terminal's encoding cannot say is shown as an escape, not raised
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        # not cli.main(): it has its own words for an interrupt and a closed pipe
        with cli.make_context("lash-store", [*(sys.argv[1:] if arguments is None else arguments)]) as ctx:
            _invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        complain(error.format_message())
        if error.ctx is not None:
            click.echo(f"Try '{safe(error.ctx.command_path)} --help'.", err=True)
        return error.exit_code
    except click.ClickException as error:
        complain(error.format_message())
        return error.exit_code
    except StoreError as error:
        complain(str(error))
        return 1
    except (KeyboardInterrupt, click.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        # the interpreter flushes stdout once more at exit, and would complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except OSError as error:
        complain(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
        return 1
    return 0
