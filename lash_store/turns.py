"""Owns how work over very many things is done in parts, so that others have their turn on the loop in between."""

from __future__ import annotations

import asyncio

__all__ = ["next_turn"]

_PART = 100
"""Things of which some tens of microseconds' work each is done before others have their turn."""


async def next_turn(number: int) -> None:
    """Let others have their turn, if the *number* of the thing that is done next says that it is time; not before the 100th."""
    if number and number % _PART == 0:
        await asyncio.sleep(0)
