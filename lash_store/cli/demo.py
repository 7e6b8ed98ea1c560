"""Owns the command `lash-store demo`: what it is given, and how its figures become an exit code."""

from __future__ import annotations

import asyncio
import secrets
import tempfile
from pathlib import Path

import click

from .options import chosen_db, json_option
from .output import write_json

__all__ = ["demo"]


@click.command()
@click.option(
    "--tasks", type=click.IntRange(1, 1000), default=40, show_default=True, metavar="N", help="Texts to read."
)
@click.option(
    "--kills",
    type=click.IntRange(0, 20),
    default=1,
    show_default=True,
    metavar="N",
    help="SIGKILLs, spread over the run.",
)
@click.option(
    "--db",
    metavar="FILE",
    type=click.Path(),
    help="Work in this file, in a session of its own; else in a new temporary one. LASH_STORE_DB is not used.",
)
@json_option("Print only the closing figures, as one JSON object.")
@click.pass_context
def demo(ctx: click.Context, tasks: int, kills: int, db: str | None, as_json: bool) -> None:
    """Kill a working process, start it again, lose nothing.

    A worker process runs a session of background tasks, each of which fetches a text in pieces, counts its words,
    saves a checkpoint after every piece, and sums it up. In the middle the worker is killed with SIGKILL and started
    again; its tasks go on from their checkpoints. Ends with the figures, and leaves the file for you to look at.

    \b
    Examples:
      lash-store demo
      lash-store demo --tasks 100 --kills 3
      lash-store demo --db demo.db && lash-store list --db demo.db --all
      lash-store demo --json | jq .lost

    \b
    Exit code: 0 if every task completed and nothing acknowledged was lost, else 1.
    """
    from .demo_run import Plan, conduct
    from .demo_view import View

    folder = Path(tempfile.mkdtemp(prefix="lash-store-demo-"))
    path = db or chosen_db(ctx)
    plan = Plan(
        db=Path(path).absolute() if path else folder / "demo.db",
        folder=folder,
        session=f"run-{secrets.token_hex(3)}",
        tasks=tasks,
        kills=kills,
    )
    view = View(plan, is_silent=as_json)
    figures = asyncio.run(conduct(plan, view))
    if as_json:
        write_json(figures.to_json(plan))
    else:
        view.close(figures)
    if not figures.is_good(plan):
        ctx.exit(1)
