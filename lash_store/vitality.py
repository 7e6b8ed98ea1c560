"""Owns what is looked at to say whether whoever works on a file lives, and whether what should have ended has; mends nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from . import database, processes
from .findings import Finding, few, warning
from .models import ProcessIdentity
from .owners import Life, life_of, open_owners
from .queries import OwnerRow

__all__ = ["at_work"]

_LONG_CANCEL = 60.0
"""Seconds after which a cancel that has not come to an end is worth a word."""

_LIVE_OF = "SELECT count(*) FROM tasks WHERE owner_id = ? AND completed_at IS NULL"


def at_work(connection: sqlite3.Connection, path: Path) -> Iterator[Finding]:
    """Look at what should be alive, and what should have ended."""
    yield from _cancels(connection)
    lives = [(owner, life_of(path, owner)) for owner in open_owners(connection)]
    yield from _owners(connection, path, lives)
    yield from _processes(connection, path, {owner.owner_id for owner, life in lives if life is not Life.DEAD})


def _cancels(connection: sqlite3.Connection) -> Iterator[Finding]:
    stuck = [
        f"#{task_seq} ({scope} {task_id}) for {seconds:.0f} s"
        for task_seq, scope, task_id, seconds in connection.execute(
            "SELECT task_seq, scope, id, (julianday('now') - julianday(cancel_requested_at)) * 86400 AS seconds "
            "FROM tasks WHERE completed_at IS NULL AND state = 'cancel_requested' AND seconds > ?",
            (_LONG_CANCEL,),
        )
    ]
    if stuck:
        yield warning(
            "stuck_cancel",
            f"cancels that have not come to an end: {few(stuck)}",
            "the body swallows its cancellation, or its owner is stuck: lash-store abandon '#N' --reason TEXT",
        )


def _owners(connection: sqlite3.Connection, path: Path, lives: Sequence[tuple[OwnerRow, Life]]) -> Iterator[Finding]:
    for owner, life in lives:
        if life is Life.ALIVE and not _is_stopped(owner.pid):
            continue
        [(count,)] = connection.execute(_LIVE_OF, (owner.owner_id,)).fetchall()
        # the state that is looked at is of a moment ago: who has ended since is not dead
        if not _still(path, "SELECT 1 FROM owners WHERE owner_id = ? AND ended_at IS NULL", owner.owner_id):
            continue
        name = f"owner {owner.owner_id} (process {owner.pid}, runtime {owner.runtime!r})"
        has = f"{count} live tasks"
        abandon = f"lash-store abandon --owner {owner.owner_id} --reason TEXT"
        match life:
            case Life.DEAD:
                yield warning(
                    "dead_owner",
                    f"{name} is dead, and nobody has recovered its {has}",
                    f"open the file with TaskStore(…, runtime={owner.runtime!r}): its work is recovered then",
                )
            case Life.UNREACHABLE:
                yield warning(
                    "unreachable_owner",
                    f"{name} has no lock file here, yet its process lives, with {has}: it is not robbed",
                    f"is this a copy of its file? Else stop the process, or give its work up: {abandon}",
                )
            case Life.ALIVE:
                yield warning(
                    "stopped_owner",
                    f"{name} is stopped (SIGSTOP, or a debugger), with {has}",
                    f"let it go on: kill -CONT {owner.pid}; or give its work up: {abandon}",
                )
    [(left,)] = connection.execute(
        "SELECT count(*) FROM tasks AS t JOIN owners AS o ON o.owner_id = t.owner_id "
        "WHERE t.completed_at IS NULL AND o.ended_at IS NOT NULL"
    ).fetchall()
    if left:
        yield warning(
            "left_behind",
            f"{left} live tasks stand under owners that have ended",
            "open the file with its runtime: they are recovered then; a cancel, once its body or its process has ended",
        )


def _still(path: Path, question: str, *parameters: Any) -> bool:
    """Ask the file as it is now."""
    with closing(database.open_sqlite(path, "read")) as connection:
        return bool(connection.execute(question, parameters).fetchall())


def _is_stopped(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in {"T", "t"}
    return False


def _processes(connection: sqlite3.Connection, path: Path, alive: Collection[int]) -> Iterator[Finding]:
    """Name processes of monitors whose owner is gone."""
    left = []
    for task_seq, owner_id, process in connection.execute(
        "SELECT task_seq, owner_id, process FROM tasks WHERE process IS NOT NULL AND completed_at IS NULL"
    ).fetchall():
        if owner_id in alive:
            continue
        with suppress(ValueError):
            known = ProcessIdentity.model_validate_json(process)
            same = "SELECT 1 FROM tasks WHERE task_seq = ? AND owner_id IS ? AND process = ?"
            if processes.survivors(known) and _still(path, same, task_seq, owner_id, process):
                left.append(f"{known.pid} (of #{task_seq})")
    if left:
        yield warning(
            "process_left",
            f"processes of monitors whose owner is dead run on: {few(left)}",
            "open the file with its runtime: they are ended then",
        )
