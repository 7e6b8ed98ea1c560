"""Owns the figure for one life cycle: spawn → body → completed, a second, by 1 to 1,000 callers at once."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plain
from benchmarks.measuring import Case, Curve, Found, Goal, Picture, Way, median, ratio

CALLERS = (1, 3, 10, 30, 100, 300, 1000)


def by_plain(synchronous: str) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        cycles = max(1, int(1500 * scale))
        connection = plain.open_plain(folder / "plain.db", synchronous)
        waited = []
        began = time.perf_counter()
        for number in range(cycles):
            one = time.perf_counter()
            plain.life_cycle(connection, number)
            waited.append(time.perf_counter() - one)
        took = time.perf_counter() - began
        connection.close()
        return figures(cycles, took, waited)

    return run


def figures(cycles: int, took: float, waited: list[float]) -> Mapping[str, float]:
    waited.sort()
    return {
        "per_second": cycles / took,
        "p50_ms": waited[len(waited) // 2] * 1e3,
        "p99_ms": waited[int(len(waited) * 0.99)] * 1e3,
    }


def by_lash_store(callers: int, durability: str, loop: str = "asyncio") -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import Recovery, TaskContext, TaskStore

        cycles = max(callers, int((1500 if callers == 1 else 6000) * scale))

        async def main() -> Mapping[str, float]:
            store = TaskStore(
                folder / "lash.db",
                runtime="bench",
                durability=durability,  # type: ignore[arg-type]
                max_running=max(64, callers),
            )

            @store.task(recovery=Recovery.RERUN)
            async def job(task: TaskContext, number: int) -> int:
                return number

            async with store:
                session = await store.session("s1")
                numbers, waited = iter(range(cycles)), []

                async def caller() -> None:
                    for number in numbers:
                        one = time.perf_counter()
                        assert await (await session.spawn(job, number)) == number
                        waited.append(time.perf_counter() - one)

                began = time.perf_counter()
                await asyncio.gather(*(caller() for _ in range(callers)))
                return figures(cycles, time.perf_counter() - began, waited)

        return run_on(loop, main)

    return run


def run_on(loop: str, main: Callable[[], Any]) -> Any:
    """Run on asyncio's own loop, or on uvloop's."""
    if loop == "asyncio":
        return asyncio.run(main())
    from benchmarks.measuring import Missing

    try:
        import uvloop
    except ImportError:
        raise Missing("uvloop is not installed: pip install -e '.[bench]'") from None
    return uvloop.run(main())
