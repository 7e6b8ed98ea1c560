"""Owns what outlives an owner: the processes of monitors are ended before their rows change, bodies are waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from . import launching, owners, processes
from .errors import StorageError
from .lifecycle import MONITOR, Task
from .models import ProcessEvidence, ProcessFate, ProcessIdentity, TaskRecord, TaskState
from .queries import LEFT_PROCESSES, OwnerRow, process_identity
from .reader import Reader
from .statements import names
from .threads import in_thread

__all__ = ["NOBODY", "Fates", "end", "evidence_of_process", "fate_of", "is_settled", "left_by", "look", "runs_on"]

T = TypeVar("T")

Fates = Mapping[tuple[int, str], ProcessFate]
"""What became of recorded processes, by ``task_seq`` and what was recorded."""

NOBODY: Fates = {}
"""Nobody has looked."""


async def left_by(reader: Reader, dead: Collection[int], runtime: str | None) -> list[Task]:
    """Return the tasks with a recorded process whose owner is none, has ended, or is among the *dead*."""
    rows = await reader.rows(LEFT_PROCESSES, {"dead": names(dead), "runtime": runtime})
    return [Task._make(row) for row in rows]


async def look(tasks: Sequence[Task]) -> Fates:
    """
    Say of which recorded processes nothing lives any more, or is provably theirs; nothing is ended.

    Raises:
        StorageError: this process lacks descriptors or threads to look.
    """
    if not tasks:
        return NOBODY
    return await _in_thread(
        lambda: {_key(task): fate for task in tasks if (fate := _look(_identity(task))) is not None}
    )


async def end(tasks: Collection[Task], grace: float) -> Fates:
    """
    End recorded processes, all at once, and say what became of each.

    Raises:
        StorageError: this process lacks descriptors or threads to look.
    """
    hurry = threading.Event()
    try:
        ended = await asyncio.gather(*(_in_thread(_end, _identity(task), grace, hurry) for task in tasks))
    except asyncio.CancelledError:
        hurry.set()
        raise
    return {_key(task): fate for task, fate in zip(tasks, ended, strict=True)}


async def _in_thread(function: Callable[..., T], *arguments: Any) -> T:
    try:
        found: T = await in_thread(function, *arguments)
        return found
    except (OSError, RuntimeError) as error:
        raise StorageError(f"what is left of monitors' processes cannot be looked at: {error}") from error


def is_settled(task: Task, fates: Fates) -> bool:
    """Say whether nothing runs for a task any more that could be ended."""
    return task.process is None or fate_of(task, fates) is not ProcessFate.LEFT


def runs_on(task: Task | TaskRecord, owner: OwnerRow | None) -> bool:
    """Say whether the body of a cancelled task may still run, left by its *owner* that closed; a monitor's has its process."""
    if owner is None or task.state != TaskState.CANCEL_REQUESTED or task.function == MONITOR:
        return False
    return owners.runs_on(owner, task.task_seq)


def fate_of(task: Task, fates: Fates) -> ProcessFate:
    """Return what became of a task's recorded process; what nobody looked at is left."""
    return fates.get(_key(task), ProcessFate.LEFT)


def evidence_of_process(task: Task, became: ProcessFate) -> ProcessEvidence | None:
    """Write down what became of a task's process, if one was recorded."""
    if task.process is None:
        return None
    known = _identity(task)
    if known is None:
        return ProcessEvidence(pid=0, started="", became=ProcessFate.UNPROVEN)
    return ProcessEvidence(pid=known.pid, started=known.started, became=became)


def _key(task: Task) -> tuple[int, str]:
    return task.task_seq, task.process or ""


def _identity(task: Task) -> ProcessIdentity | None:
    return process_identity(task.process or "")


def _look(process: ProcessIdentity | None) -> ProcessFate | None:
    if process is None:
        return ProcessFate.UNPROVEN
    launching.reap(process.pid)
    left = processes.survivors(process)
    if left is None:
        return ProcessFate.UNPROVEN
    return None if left else ProcessFate.GONE


def _end(process: ProcessIdentity | None, grace: float, hurry: threading.Event) -> ProcessFate:
    if process is None:
        return ProcessFate.UNPROVEN
    fate = processes.end_group(process, grace, hurry)
    # of a loop that is closed it may be our own child still
    launching.reap(process.pid)
    return fate
