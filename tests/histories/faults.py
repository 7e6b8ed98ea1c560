"""Faults that a worker process puts into its own copy of the package, each of which the check must find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lash_store import SessionTasks, TaskRecord, TaskState, Verdict, books, transitions
from lash_store.commands import Flip, Progress, Settle
from lash_store.lifecycle import Change, Task, decide, with_columns
from lash_store.models import EventType
from lash_store.transitions import Outcome

__all__ = ["FAULTS"]


def _write_unfenced() -> None:
    """A flip looks at nothing before it writes: a cancel request is lost."""

    def unfenced(task: Task, command: Any, now: str) -> Any:
        if isinstance(command, Flip) and task.state == TaskState.CANCEL_REQUESTED:
            return Change(EventType.STATE_CHANGED, {"state": command.state, "updated_at": now})
        return decide(task, command, now)

    transitions.decide = unfenced  # type: ignore[attr-defined]


def _answer_without_writing() -> None:
    """An update is acknowledged, and was never written."""
    transition = transitions.transition

    def unwritten(tx: Any, task: Task, command: Any, **how: Any) -> Outcome:
        if isinstance(command, Progress) and not task.is_terminal:
            return Outcome(with_columns(task, {"progress": command.message}), Verdict.APPLIED)
        return transition(tx, task, command, **how)

    transitions.transition = unwritten


def _tell_the_loser_it_won() -> None:
    """Who completes what has ended is told that its own end stands."""
    change = books.change

    def flattering(tx: Any, task: Task, command: Any, what: str) -> Outcome:
        outcome = change(tx, task, command, what)
        if isinstance(command, Settle) and outcome.verdict is Verdict.SUPERSEDED:
            columns = {"state": command.state, "result": command.result, "failure": command.failure}
            return Outcome(with_columns(outcome.task, columns), Verdict.APPLIED)
        return outcome

    books.change = flattering


def _show_what_was_seen_before() -> None:
    """A look is answered from memory, if the task was looked at before."""
    get, seen = SessionTasks.get, dict[Any, TaskRecord]()

    async def remembered(self: SessionTasks, id: Any) -> TaskRecord:
        key = (str(self.scope), id)
        if key not in seen:
            seen[key] = await get(self, id)
        return seen[key]

    SessionTasks.get = remembered  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[], None]] = {
    "unfenced": _write_unfenced,
    "unwritten": _answer_without_writing,
    "loser": _tell_the_loser_it_won,
    "stale": _show_what_was_seen_before,
}
