"""Owns the figure for one life cycle: spawn → body → completed, a second, by 1 to 1,000 callers at once."""

from __future__ import annotations

import asyncio
import importlib
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plain, with_huey
from benchmarks.callers import call_at_once, figures
from benchmarks.measuring import Case, Curve, Found, Goal, Missing, Picture, Way, median, ratio
from benchmarks.with_dbos import AS_IT_COMES, WAL, find_dbos, launch

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

                async def turn(number: int) -> None:
                    assert await (await session.spawn(job, number)) == number

                return await call_at_once(callers, cycles, turn)

        return run_on(loop, main)

    return run


def run_on(loop: str, main: Callable[[], Coroutine[Any, Any, Mapping[str, float]]]) -> Mapping[str, float]:
    """Run on asyncio's own loop, or on uvloop's."""
    if loop == "asyncio":
        return asyncio.run(main())
    try:
        uvloop: Any = importlib.import_module("uvloop")
    except ImportError:
        raise Missing("uvloop is not installed: pip install -e '.[bench]'") from None
    found: Mapping[str, float] = uvloop.run(main())
    return found


def by_dbos(callers: int, turns: int, journal_mode: str = "wal") -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        dbos, cycles = find_dbos(), max(callers, int(turns * scale))

        async def job(number: int) -> int:
            return number

        workflow = dbos.workflow(name="job")(job)

        async def turn(number: int) -> None:
            handle = await dbos.start_workflow_async(workflow, number)
            assert await handle.get_result() == number

        async def main() -> Mapping[str, float]:
            with launch(folder / "dbos.sqlite", journal_mode):
                return await call_at_once(callers, cycles, turn)

        return asyncio.run(main())

    return run


def by_huey(callers: int) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        def job(number: int) -> int:
            return number

        with with_huey.consume(folder / "huey.db", job) as enqueue:
            return with_huey.call_at_once(enqueue, callers, max(callers, int(600 * scale)))

    return run


PLAIN, PLAIN_NORMAL, DBOS, DBOS_WAL, HUEY = "plain sqlite3", "plain sqlite3, NORMAL", "DBOS", "DBOS, WAL", "Huey"


def ours(callers: int) -> str:
    return f"lash_store, {callers} caller{'' if callers == 1 else 's'}"


def shape(found: Found) -> float | None:
    """Return how much the curve ever falls below what it had reached, as a share: rates at growing numbers of callers."""
    rates = [median(found, ours(callers), "per_second") for callers in CALLERS]
    if any(rate is None for rate in rates):
        return None
    reached, fall = 0.0, 0.0
    for rate in rates:
        assert rate is not None
        reached = max(reached, rate)
        fall = max(fall, 1 - rate / reached)
    return fall


CASE = Case(
    name="lifecycle",
    title="One life cycle: spawn → body → completed → result, all of it durable",
    metrics={"per_second": "life cycles/s", "p50_ms": "p50 ms", "p99_ms": "p99 ms"},
    ways=[
        Way(
            PLAIN,
            by_plain("FULL"),
            "a task table and an event table, three commits a life cycle, one caller: SQLite has one writer",
        ),
        *(Way(ours(callers), by_lash_store(callers, "full")) for callers in CALLERS),
        Way(PLAIN_NORMAL, by_plain("NORMAL"), "the same with synchronous=NORMAL"),
        Way("lash_store, NORMAL, 100 callers", by_lash_store(100, "normal"), 'durability="normal"'),
        Way(DBOS, by_dbos(100, 300, "delete"), f"an async @DBOS.workflow, 100 callers; {AS_IT_COMES}"),
        Way(DBOS_WAL, by_dbos(100, 500), f"100 callers; {WAL}"),
        Way("DBOS, WAL, 1 caller", by_dbos(1, 300), "the same with one caller"),
        Way(HUEY, by_huey(100), f"100 callers; {with_huey.HOW}"),
        Way("lash_store on uvloop, 1 caller", by_lash_store(1, "full", "uvloop")),
        Way("lash_store on uvloop, 100 callers", by_lash_store(100, "full", "uvloop")),
    ],
    goals=[
        Goal("100 callers beside plain sqlite3", ratio(ours(100), "per_second", PLAIN), at_least=3),
        Goal("100 callers beside DBOS as it comes", ratio(ours(100), "per_second", DBOS), at_least=30),
        Goal("100 callers beside DBOS put into WAL mode", ratio(ours(100), "per_second", DBOS_WAL), at_least=30),
        Goal("1 caller beside plain sqlite3", ratio(ours(1), "per_second", PLAIN), at_least=0.5),
        Goal(
            "100 callers beside plain sqlite3, both NORMAL",
            ratio("lash_store, NORMAL, 100 callers", "per_second", PLAIN_NORMAL),
            at_least=0.8,
        ),
        Goal(
            "most that the curve falls below its peak",
            lambda found: None if (fall := shape(found)) is None else 100 * fall,
            at_most=15,
            unit="%",
        ),
    ],
    pictures=[
        Picture(
            "Life cycles a second by callers at once",
            "callers",
            "life cycles/s",
            [
                Curve("lash_store", [(callers, ours(callers), "per_second") for callers in CALLERS]),
                Curve(PLAIN, [(callers, PLAIN, "per_second") for callers in (CALLERS[0], CALLERS[-1])]),
            ],
        ),
        Picture(
            "How long one life cycle takes by callers at once",
            "callers",
            "p99 ms",
            [Curve("lash_store, p99", [(callers, ours(callers), "p99_ms") for callers in CALLERS])],
            log_y=True,
        ),
    ],
    notes=(
        "A life cycle is three commits in plain sqlite3; two in DBOS, which does not note that a body starts, nor any history;"
        " four in Huey: the task goes in and out of the file, then its result does."
    ),
)
