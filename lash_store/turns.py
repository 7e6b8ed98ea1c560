"""Owns how work over very many things is done in parts, so that others have their turn on the loop in between."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["all_over", "next_turn"]

_PART = 100
"""Things of which some tens of microseconds' work each is done before others have their turn."""


async def next_turn(number: int) -> None:
    """Let others have their turn, if the *number* of the thing that is done next says that it is time; not before the 100th."""
    if number and number % _PART == 0:
        await asyncio.sleep(0)


async def all_over(waits: Iterable[asyncio.Future[Any]]) -> None:
    """Wait until all are over, however, as `asyncio.wait` does: that looks at each of thousands in one turn of the loop."""
    waits = list(waits)
    for first in range(0, len(waits), _PART):
        await asyncio.wait(waits[first : first + _PART])
