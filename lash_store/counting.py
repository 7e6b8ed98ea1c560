"""Owns the numbers by which a later attempt knows again what a body begins without a name: its sleeps and children."""

from __future__ import annotations

import heapq
import json

__all__ = ["Counted", "Numbers"]


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
    """
    What was begun without a name since the last save: beside all steps, or in one try of a step.

    A later attempt that is given a step's result does not come to what is in it, so that is no part of what is counted outside.
    """

    __slots__ = ("_numbers", "_where")

    def __init__(self, step: str | None = None, number: int = 0, outer: Counted | None = None) -> None:
        """Begin to count; *outer* is what the *number*-th try of a *step* is itself counted in."""
        self._numbers: dict[int, dict[str, Numbers]] = {}
        beyond = "" if outer is None else outer._where
        # quoted, a name ends where it ends
        self._where: str = "" if step is None else f" in try {number} of {json.dumps(step, ensure_ascii=False)}{beyond}"

    def numbers(self, of: str, saves: int) -> Numbers:
        """Return those of one sort of thing, after so many saves."""
        if saves not in self._numbers:
            # a save that fails is none: what came before it goes on
            self._numbers = {after: numbers for after, numbers in self._numbers.items() if after >= saves - 1}
        return self._numbers.setdefault(saves, {}).setdefault(of, Numbers())

    def name(self, number: int, saves: int) -> str:
        """Return the name of what has a *number*, which no name somebody gave looks like."""
        return f"#{saves}.{number}{self._where}"

    @property
    def is_in_step(self) -> bool:
        """Whether it is in a try of a step, which may begin again within its attempt."""
        return bool(self._where)
