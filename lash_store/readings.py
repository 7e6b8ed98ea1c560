"""
Owns who waits to be handed an outcome, and the note with the handle that it was.

Where somebody waits in the process that ends the task, the end and the note are one commit; what nobody came to hear of is taken
back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import session_queries
from .transaction import Transaction

__all__ = ["Reading", "Readings"]


@dataclass(slots=True, eq=False)
class Reading:
    """
    Who is about to be handed one outcome through one handle, which the session *holder* had when it was asked for.

    It stays unread only if all of them were cancelled before. *is_asked_for*: a unit that makes the note was queued;
    *is_noted*: its commit is in the file.
    """

    task_seq: int
    handle_id: str
    holder: str
    waiting: int = 0
    was_unread: bool = False
    is_asked_for: bool = False
    is_noted: bool = False
    is_handed_out: bool = False

    def mark(self, tx: Transaction) -> bool:
        """Make the note, unless the task was given to another session since; say whether the handle has it now."""
        if session_queries.mark_read(tx, self.handle_id, self.holder):
            self.was_unread = True
            return True
        handle = session_queries.handle_by_id(tx, self.handle_id)
        return handle is not None and handle.scope == self.holder

    def take_back(self, tx: Transaction) -> None:
        """Take the note back, unless somebody was handed the outcome, or is still to be."""
        # it runs after the marks of all who were there: whoever is still to be told keeps the note
        if self.was_unread and not (self.waiting or self.is_handed_out):
            session_queries.mark_unread(tx, self.handle_id)


class Readings:
    """The readings of one open store, while somebody waits."""

    def __init__(self) -> None:
        self._of_task: dict[int, dict[str, Reading]] = {}

    def __iter__(self) -> Iterator[Reading]:
        return (reading for readings in self._of_task.values() for reading in readings.values())

    def begin(self, task_seq: int, handle_id: str, holder: str) -> Reading:
        """Have one more wait for an outcome."""
        readings = self._of_task.setdefault(task_seq, {})
        reading = readings.get(handle_id)
        if reading is None:
            reading = readings[handle_id] = Reading(task_seq, handle_id, holder)
        reading.waiting += 1
        return reading

    def end(self, reading: Reading) -> None:
        """Have one wait no more."""
        reading.waiting -= 1
        readings = self._of_task.get(reading.task_seq, {})
        if not reading.waiting and readings.get(reading.handle_id) is reading:
            del readings[reading.handle_id]
            if not readings:
                del self._of_task[reading.task_seq]

    def ask_for(self, task_seq: int) -> Sequence[Reading]:
        """Return who waits for the end of a task: the unit that stores it makes their notes, too."""
        readings = self._of_task.get(task_seq)
        if readings is None:
            return ()
        asked = list(readings.values())
        for reading in asked:
            reading.is_asked_for = True
        return asked
