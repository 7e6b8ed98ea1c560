"""Owns callers at once: coroutines that share a count of turns, and how long each turn took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping

__all__ = ["call_at_once", "figures"]


async def call_at_once(callers: int, turns: int, turn: Callable[[int], Awaitable[None]]) -> Mapping[str, float]:
    """Have so many callers take the turns 0, 1, 2, … between them, each the next one when its last is over."""
    numbers, waited = iter(range(turns)), []

    async def caller() -> None:
        for number in numbers:
            one = time.perf_counter()
            await turn(number)
            waited.append(time.perf_counter() - one)

    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    return figures(turns, time.perf_counter() - began, waited)


def figures(turns: int, took: float, waited: list[float]) -> Mapping[str, float]:
    """Return the rate and how long a turn took, of seconds."""
    waited.sort()
    return {
        "per_second": turns / took,
        "p50_ms": waited[len(waited) // 2] * 1e3,
        "p99_ms": waited[int(len(waited) * 0.99)] * 1e3,
    }
