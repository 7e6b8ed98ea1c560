"""Owns the numbers by which a later attempt knows again what a body begins without a name: its sleeps and children."""

from __future__ import annotations

import heapq
import json

__all__ = ["Counted", "CountedInTry", "Numbers"]


class Numbers:
    """Those that were taken, from 1."""

    __slots__ = ("_given_back", "_last")

    def __init__(self) -> None:
        self._last = 0
        self._given_back: list[int] = []

    def take(self) -> int:
        """Return the smallest that nothing has."""
        if self._given_back:
            return heapq.heappop(self._given_back)
        self._last += 1
        return self._last

    def give_back(self, number: int) -> None:
        """Let something else have it."""
        heapq.heappush(self._given_back, number)


class Counted:
    """What was begun without a name beside all steps, since the last save."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: dict[int, dict[str, Numbers]] = {}

    def numbers(self, of: str, saves: int) -> Numbers:
        """Return those of one sort of thing, after so many saves."""
        if saves not in self._numbers:
            # a save that fails is none: what came before it goes on
            self._numbers = dict([*self._numbers.items()][-1:])
        return self._numbers.setdefault(saves, {}).setdefault(of, Numbers())

    def name(self, number: int, saves: int) -> str:
        """Return the name of what has a *number*, which no name somebody gave looks like."""
        return f"#{saves}.{number}"


class CountedInTry(Counted):
    """
    What was begun without a name in one try of a step.

    A later attempt that is given the step's result does not come to it, so it is no part of what is counted outside; and one that
    begins the same try does, whatever was saved meanwhile, and from wherever it asks for the step.
    """

    __slots__ = ("_where",)

    def __init__(self, step: str, number: int, again: int) -> None:
        """Begin to count in the *number*-th try of a *step* that what it is in has tried *again* so often."""
        super().__init__()
        # quoted, a name ends where it ends
        quoted = json.dumps(step, ensure_ascii=False)
        self._where = f"{number} of {quoted}{f' again {again}' if again else ''}"

    def numbers(self, of: str, saves: int) -> Numbers:
        """Return those of one sort of thing."""
        return super().numbers(of, 0)

    def name(self, number: int, saves: int) -> str:
        """Return the name of what has a *number*, which no name outside looks like."""
        return f"#try {self._where}: {number}"
