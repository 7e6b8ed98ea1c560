"""Owns the figures for following events: one subscriber of 100,000, and 100 subscribers of 1,000 each, none of them lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Case, Goal, Way, ratio

WRITERS = 256
"""Callers that make events at once, so that it is not their commits that are measured."""


def following(subscribers: int, events: int) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import TaskKind, TaskStore

        wanted = max(10, round(events * scale))

        async def main() -> Mapping[str, float]:
            async with TaskStore(folder / "lash.db", runtime="bench") as store:
                session = await store.session("s1")
                await session.register("work", TaskKind.OTHER)
                cursor = [event.seq async for event in up_to(store.events(after=0), 2)][-1]
                expected = range(cursor + 1, cursor + 1 + wanted)
                numbers = iter(range(wanted))

                async def write() -> None:
                    for number in numbers:
                        await session.update("work", progress=f"line {number}")

                async def write_all() -> None:
                    await asyncio.gather(*(write() for _ in range(WRITERS)))

                began, used = time.perf_counter(), time.process_time()
                live = [asyncio.create_task(follow(store, cursor, expected)) for _ in range(subscribers)]
                await write_all()
                written = time.perf_counter()
                await asyncio.gather(*live)
                told, used = time.perf_counter(), time.process_time() - used

                async def read_again(some: range) -> float:
                    began = time.perf_counter()
                    await asyncio.gather(*(follow(store, cursor, some) for _ in range(subscribers)))
                    return time.perf_counter() - began

                # the machine's speed drifts: the whole in the middle of as many events in tenths
                tenth = expected[: max(1, wanted // 10)]
                tenths = [await read_again(tenth) for _ in range(5)]
                read = await read_again(expected)
                tenths += [await read_again(tenth) for _ in range(5)]
                handed = wanted * subscribers / 1e6
                return {
                    "live_us": (told - began) / handed,
                    "cpu_us": used / handed,
                    "behind_ms": (told - written) * 1e3,
                    "read_us": read / handed,
                    "tenth_us": sum(tenths) / len(tenths) / (len(tenth) * subscribers / 1e6),
                }

        return asyncio.run(main())

    return run


async def follow(store: Any, cursor: int, expected: range) -> None:
    """Take as many events as are expected, and make sure that they are those, in their order."""
    seqs = [event.seq async for event in up_to(store.events(after=cursor), len(expected))]
    assert seqs == [*expected], f"{len(seqs)} events, not those expected"


async def up_to(events: AsyncIterator[Any], most: int) -> AsyncIterator[Any]:
    while most > 0:
        yield await anext(events)
        most -= 1


ONE, TENTH, MANY, FEW, SHORT = (
    "1 subscriber, 100,000 events",
    "1 subscriber, 10,000 events",
    "100 subscribers, 1,000 events",
    "10 subscribers, 1,000 events",
    "100 subscribers, 100 events",
)
CASE = Case(
    name="events",
    title="Following events: each of them is handed to each subscriber, in order, once",
    metrics={
        "live_us": "live: µs/event handed over",
        "cpu_us": "of it CPU µs",
        "behind_ms": "last one ms late",
        "read_us": "read again: µs/event",
        "tenth_us": "a tenth of them",
    },
    ways=[
        Way(
            ONE,
            following(1, 100_000),
            f"durable progress by {WRITERS} callers; live includes writing, read again is behind it",
            rounds=3,
        ),
        Way(TENTH, following(1, 10_000)),
        Way(MANY, following(100, 1_000)),
        Way(FEW, following(10, 1_000)),
        Way(SHORT, following(100, 100)),
    ],
    goals=[
        Goal(
            "1 subscriber, live: CPU of an event of 100,000 beside one of 10,000",
            ratio(ONE, "cpu_us", TENTH),
            at_most=1.5,
        ),
        Goal(
            "1 subscriber, read again: an event of 100,000 beside one of 10,000 of them",
            ratio(ONE, "read_us", ONE, of="tenth_us"),
            at_most=1.5,
        ),
        Goal("100 subscribers, live: CPU of an event, of 1,000 beside 100", ratio(MANY, "cpu_us", SHORT), at_most=1.5),
        Goal("100 subscribers beside 10, live: CPU of an event", ratio(MANY, "cpu_us", FEW), at_most=1.5),
        Goal("100 subscribers beside 10, read again: the same", ratio(MANY, "read_us", FEW), at_most=1.5),
    ],
    notes=(
        "Every subscriber looks at every `seq`: a run in which one is missing, twice there or out of order fails. "
        "Writing waits for the disk, so what is compared while it goes on is the processor's time."
    ),
)
