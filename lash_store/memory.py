"""
Owns what a body remembers from one attempt to the next: units that save a checkpoint, end a step, and queue a signal.

Units over an open transaction, as in `transitions`; each write of a body names its attempt, and a stale one changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from . import step_queries, transitions
from .commands import Command, Fence, Retry, RetryStep, Save, Signal
from .errors import IdempotencyConflict, TaskError
from .lifecycle import Task
from .models import StepKind, StepState, TaskState, Verdict
from .step_queries import SignalRow, StepRow
from .transaction import Transaction
from .transitions import Outcome

__all__ = ["PutOff", "StepNote", "note_step", "put_off", "retry", "run_step", "save", "send_signal"]


class StepNote(NamedTuple):
    """
    What is to be remembered of a step, in the transaction that ends it, begins it, or puts its next try off.

    *taken* are the signals that were received in it.
    """

    kind: StepKind
    name: str
    state: StepState
    value: str = "null"
    tries: int = 1
    failure: str | None = None
    begun_at: str | None = None
    wake_at: str | None = None
    taken: Sequence[int] = ()

    def row(self, tx: Transaction, task: Task) -> StepRow:
        """Return the row of `steps` that says so."""
        return StepRow(
            task.task_seq,
            self.kind,
            self.name,
            task.attempt,
            self.value,
            tx.now,
            self.state,
            self.tries,
            self.failure,
            self.begun_at,
            self.wake_at,
        )

    def what(self) -> Mapping[str, Any]:
        """Return what the event tells of it."""
        told: dict[str, Any] = {"step": self.name, "step_kind": self.kind, "step_state": self.state}
        if self.state is StepState.DONE:
            told["bytes"] = len(self.value.encode())
        if self.wake_at is not None:
            told["wake_at"] = self.wake_at
        if self.failure is not None:
            failure, _ = step_queries.failure_of_step(self.failure)
            told["error"] = {"type": failure.type, "message": failure.message}
        if self.tries > 1:
            told["tries"] = self.tries
        return told


def save(
    tx: Transaction,
    task: Task,
    fence: Fence,
    value: str,
    number: int,
    taken: Sequence[int] = (),
    *,
    slept: bool = False,
) -> Outcome:
    """
    Replace a task's checkpoint by one with a higher *number*, if the attempt that saves it is the current one.

    What came before is behind it: the signals *taken*, and, if it *slept*, its unnamed sleeps.
    """
    outcome = transitions.transition(tx, task, Save(fence, {"bytes": len(value.encode())}), fresh=False)
    if outcome.verdict is Verdict.APPLIED:
        step_queries.save_checkpoint(tx, task.task_seq, fence.attempt, value, number)
        if taken:
            step_queries.take_signals(tx, taken, fence.attempt)
        if slept:
            step_queries.forget_unnamed_sleeps(tx, task.task_seq)
    return outcome


def note_step(tx: Transaction, task: Task, fence: Fence, note: StepNote) -> Outcome:
    """Remember a step as it stands, if the attempt that says so is the current one."""
    command: Command = (RetryStep if note.state is StepState.RETRYING else Save)(fence, note.what())
    outcome = transitions.transition(tx, task, command, fresh=False)
    if outcome.verdict is Verdict.APPLIED:
        step_queries.put_step(tx, note.row(tx, outcome.task))
        if note.taken:
            step_queries.take_signals(tx, note.taken, fence.attempt)
    return outcome


class PutOff(NamedTuple):
    """What came of a note that a step is tried again later: which failed steps in it are, too, and what they had received."""

    outcome: Outcome
    forgotten: Sequence[str] = ()
    untaken: Sequence[SignalRow] = ()


def put_off(tx: Transaction, task: Task, fence: Fence, note: StepNote, inside: Collection[str]) -> PutOff:
    """Remember when a step is tried next; those *inside* that were begun in it, and failed for good, are tried again with it."""
    outcome = note_step(tx, task, fence, note)
    if outcome.verdict is not Verdict.APPLIED or not inside:
        return PutOff(outcome)
    return PutOff(outcome, *step_queries.forget_failed_inside(tx, task.task_seq, note.name, inside))


def run_step(
    tx: Transaction, task: Task, fence: Fence, name: str, begun_at: str, run: Callable[[Transaction], str]
) -> tuple[Outcome, StepRow | None]:
    """
    Run a step that works on this very file, and remember its result (JSON text) with what it did; once, whoever asks again.

    Return what was remembered before, if it was, or else now; None from a stale attempt, whose step does not run.
    """
    before = step_queries.step(tx, task.task_seq, StepKind.TRANSACT, name)
    current = transitions.as_it_is(tx, task)
    if before is not None and StepState(before.state).is_over:
        return Outcome(current, Verdict.UNCHANGED), before
    if not current.has_body(fence):
        return Outcome(current, Verdict.SUPERSEDED, stale=True), None
    note = StepNote(StepKind.TRANSACT, name, StepState.DONE, value=run(tx), begun_at=begun_at)
    outcome = note_step(tx, current, fence, note)
    return outcome, note.row(tx, outcome.task)


def retry(tx: Transaction, task: Task, command: Retry) -> Outcome:
    """
    Store a failure that the next attempt may make good: it tries again what failed, and is given what was done.

    What runs at most once is not tried again: that it failed is given, too.
    """
    outcome = transitions.transition(tx, task, command, fresh=False)
    if outcome.verdict is Verdict.APPLIED and outcome.task.state == TaskState.PENDING:
        step_queries.forget_failed_steps(tx, task.task_seq)
    return outcome


def send_signal(tx: Transaction, task: Task, name: str, key: str | None, payload: str, by: str) -> Outcome:
    """
    Put a signal into a task's queue; one of its *key* only once.

    Raises:
        IdempotencyConflict: the key was used for another signal.
        TaskError: the work has no body here.
    """
    if task.is_external:
        raise TaskError(
            f"task {task.id!r} of session {task.scope!r} is external: nobody here would receive signal {name!r}",
            task_id=task.id,
        )
    before = None if key is None else step_queries.signal_by_key(tx, task.task_seq, key)
    if before is not None:
        if (before.name, transitions.plain(before.payload)) != (name, transitions.plain(payload)):
            raise IdempotencyConflict(
                f"key {key!r} was used for another signal to task {task.id!r}, named {before.name!r}: use another key",
                task_id=task.id,
            )
        return Outcome(task, Verdict.UNCHANGED)
    if task.is_terminal:
        return Outcome(task, Verdict.SUPERSEDED)
    signal_seq = step_queries.insert_signal(tx, task.task_seq, name, key, payload, by)
    what: dict[str, Any] = {"signal": name, "signal_seq": signal_seq, "bytes": len(payload.encode()), "by": by}
    return transitions.transition(tx, task, Signal(what if key is None else {**what, "key": key}))
