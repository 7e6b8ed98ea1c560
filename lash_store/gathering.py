"""Owns the books of who waits for a session's hidden work in this process, and which failures each is still owed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Gathering", "Waiter"]


@dataclass(eq=False, slots=True)
class Waiter:
    """
    One who waits: *body* is the ``task_seq`` it waits in, *told* what others had been handed before it came.

    *sync_needed*: while it waited, the session's flag was taken down for another, who must take its state up as it must.
    """

    body: int | None
    told: frozenset[int]
    sync_needed: bool = False


@dataclass(slots=True)
class Gathering:
    """
    The waiters of one session.

    A failure is owed to all who waited when it was first handed out; it is acknowledged once none of them is left.
    """

    _waiting: set[Waiter] = field(default_factory=set)
    _owed: dict[int, set[Waiter]] = field(default_factory=dict)

    def enter(self, body: int | None) -> Waiter:
        """Begin to wait."""
        waiter = Waiter(body, frozenset(self._owed))
        self._waiting.add(waiter)
        return waiter

    @property
    def bodies(self) -> set[int]:
        """The tasks whose bodies wait here: they cannot end before they are answered."""
        return {waiter.body for waiter in self._waiting if waiter.body is not None}

    def hand_out(self, failures: Iterable[int]) -> None:
        """Note that a waiter is about to be handed failures, by ``task_seq``."""
        for failure in failures:
            self._owed.setdefault(failure, set(self._waiting))

    def take_flag(self) -> None:
        """Note that the session's flag was taken down: it counts for all who wait."""
        for waiter in self._waiting:
            waiter.sync_needed = True

    def leave(self, waiter: Waiter) -> list[int]:
        """Wait no more; return the failures that nobody is owed any longer."""
        self._waiting.discard(waiter)
        for waiters in self._owed.values():
            waiters.discard(waiter)
        settled = [failure for failure, waiters in self._owed.items() if not waiters]
        for failure in settled:
            del self._owed[failure]
        return settled

    def settle(self) -> list[int]:
        """Owe nobody anything any longer; return what was owed."""
        owed = list(self._owed)
        self._owed.clear()
        return owed

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits."""
        return not self._waiting
