"""Owns what a body may do: see itself, save, show progress, and learn that it should stop."""

from __future__ import annotations

import json
import secrets
from typing import Any

from pydantic import JsonValue

from . import queries, transitions
from .commands import Command, Notify, Progress, Save
from .database import Transaction
from .errors import InvalidId
from .models import Scope, StopReason, TaskRecord, Verdict, check_fraction, check_id, check_text
from .registry import to_json
from .runner import Body
from .transitions import Outcome
from .writer import Unit, Writer

__all__ = ["TaskContext"]


class TaskContext:
    """
    The first argument of a registered function: its own task, as seen from inside one attempt.

    Every write names the attempt; once the row has moved on, it is refused with `StaleAttempt`, which should end the body.
    """

    def __init__(self, body: Body, writer: Writer) -> None:
        self._body = body
        self._writer = writer
        self._checkpoint = None if body.checkpoint is None else json.loads(body.checkpoint)

    @property
    def id(self) -> str:
        """The task's id in its session."""
        return self._body.task.id

    @property
    def scope(self) -> Scope:
        """The session the task is in."""
        return Scope.parse(self._body.task.scope)

    @property
    def attempt(self) -> int:
        """Which execution this is, from 1."""
        return self._body.fence.attempt

    @property
    def record(self) -> TaskRecord:
        """The row as this body last saw it change."""
        return queries.task_record(self._body.task)

    @property
    def checkpoint(self) -> JsonValue:
        """What was saved last, by this attempt or an earlier one; None if nothing was."""
        return self._checkpoint

    async def save(self, value: Any) -> None:
        """
        Store *value* as the task's checkpoint, in place of the last one.

        Durable on return: the next attempt begins with it.

        Raises:
            ResultNotSerializable: not JSON; the last checkpoint stands.
            StaleAttempt: the task is another attempt's.
        """
        text = to_json(value, f"the checkpoint of task {self.id!r}")
        command = Save(self._body.fence, len(text.encode()))
        await self._write(lambda tx: transitions.save(tx, self._body.task, command, text))
        self._checkpoint = json.loads(text)

    async def progress(self, message: str, fraction: float | None = None) -> None:
        """
        Show how far the work has come: a line, and a *fraction* from 0 to 1 if it is known. Durable on return.

        Raises:
            ValueError: *fraction* is outside 0 to 1.
            StaleAttempt: the task is another attempt's.
        """
        check_text(f"the progress of task {self.id!r}", message)
        command = Progress(self._body.fence, message, check_fraction(f"task {self.id!r}", fraction))
        await self._write(lambda tx: self._transition(tx, command))

    async def notify(self, text: str, data: Any = None, *, key: str | None = None) -> None:
        """
        Post a note to the inbox of the task's session: a line, and *data* that is JSON. Durable on return.

        With a *key* one note is posted however often this is called, by later attempts too.

        Raises:
            ResultNotSerializable: *data* is not JSON.
            StaleAttempt: the task is another attempt's.
        """
        check_text(f"a note of task {self.id!r}", text)
        if key is None:
            key = f"note:{secrets.token_hex(8)}"
        elif check_id("note key", key).startswith("end:"):
            raise InvalidId(f"note key {key!r} begins with 'end:', as those of ends do: choose another")
        value = to_json(data, f"a note of task {self.id!r}")
        command = Notify(self._body.fence, {"note_key": key, "note": text})
        outcome = await self._writer.run(lambda tx: transitions.notify(tx, self._body.task, command, value))
        if outcome.verdict is Verdict.SUPERSEDED:
            raise transitions.stale(outcome.task, self.attempt)

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the end of this task; a cooperative body looks here, and returns or raises."""
        return self._body.stop_reason is StopReason.CANCEL

    @property
    def stop_reason(self) -> StopReason | None:
        """Why this body is being stopped: ``cancel``, ``detach`` (the store closes), ``stale``; None if it is not."""
        return self._body.stop_reason

    async def cancelled(self) -> None:
        """Wait until this body should stop, for whatever `stop_reason`."""
        await self._body.stopping.wait()

    def _transition(self, tx: Transaction, command: Command) -> Outcome:
        return transitions.transition(tx, self._body.task, command, fresh=False)

    async def _write(self, unit: Unit[Outcome]) -> None:
        outcome = await self._writer.run(unit)
        if outcome.verdict is not Verdict.APPLIED:
            raise transitions.stale(outcome.task, self.attempt)
