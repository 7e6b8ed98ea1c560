"""Owns the figures for many live tasks: what 50,000 of them that wait take of memory, and how long they ever hold up the loop."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Case, Found, Goal, Way, median

TASKS = 50_000
CALLERS = 200
SETTLED = 1.0
"""Seconds in which nothing more is asked of them."""


class Ticker:
    """Wakes every few milliseconds and notes how much too late it was, and how much of that the collector of cycles took."""

    PERIOD = 0.005

    def __init__(self) -> None:
        self._phase = ""
        self._collecting: float | None = None
        self._collected = 0.0
        self.figures: dict[str, float] = {"collector": 0.0}
        gc.callbacks.append(self._note_collection)
        self._task = asyncio.create_task(self._tick())

    async def enter(self, phase: str) -> None:
        """Begin a phase, once what the measuring itself held up is over."""
        await self.leave()
        self._phase = phase
        self.figures |= {f"{phase}_stall": 0.0, f"{phase}_stall_itself": 0.0}

    async def leave(self) -> None:
        """Let one more tick tell of what the last phase ended with."""
        await asyncio.sleep(2 * self.PERIOD)
        self._phase = ""

    async def close(self) -> None:
        gc.callbacks.remove(self._note_collection)
        self._task.cancel()
        await asyncio.wait({self._task})

    def _note_collection(self, phase: str, _: object) -> None:
        if phase == "start":
            self._collecting = time.perf_counter()
            return
        if self._collecting is None:
            return
        took, self._collecting = time.perf_counter() - self._collecting, None
        self._collected += took
        if self._phase:
            self._raise("collector", took)

    def _raise(self, name: str, seconds: float) -> None:
        self.figures[name] = max(self.figures[name], seconds * 1e3)

    async def _tick(self) -> None:
        while True:
            self._collected = 0.0
            due = time.perf_counter() + self.PERIOD
            await asyncio.sleep(self.PERIOD)
            now = time.perf_counter()
            late, collected, begun = now - due, self._collected, self._collecting
            if begun is not None:
                # in another thread, which has not come to tell of its end
                collected += now - begun
            if self._phase:
                self._raise(f"{self._phase}_stall", late)
                self._raise(f"{self._phase}_stall_itself", late - collected)


def in_memory() -> int:
    """Return how many bytes of this process are in memory that no other has."""
    gc.collect()
    counts = Path("/proc/self/smaps_rollup")
    if counts.exists():
        return sum(
            int(line.split()[1]) * 1024
            for line in counts.read_text().splitlines()
            if line.startswith(("Private_Clean", "Private_Dirty"))
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def number(scale: float) -> int:
    return max(100, round(TASKS * scale))


def by_asyncio(folder: Path, scale: float) -> Mapping[str, float]:
    async def main() -> Mapping[str, float]:
        wanted = number(scale)
        before, ticker = in_memory(), Ticker()
        await ticker.enter("spawn")

        async def waits() -> None:
            await asyncio.get_running_loop().create_future()

        tasks = set()
        for count in range(wanted):
            tasks.add(asyncio.create_task(waits()))
            if count % CALLERS == 0:
                await asyncio.sleep(0)
        await asyncio.sleep(SETTLED)
        await ticker.enter("wait")
        await asyncio.sleep(SETTLED)
        await ticker.leave()
        after = in_memory()
        await ticker.enter("end")
        for count, task in enumerate(tasks):
            task.cancel()
            if count % CALLERS == 0:
                await asyncio.sleep(0)
        await asyncio.wait(tasks)
        await ticker.leave()
        await ticker.close()
        return {"kilobytes": (after - before) / wanted / 1000, **ticker.figures}

    return asyncio.run(main())


async def by_future(task: Any) -> None:
    await asyncio.get_running_loop().create_future()


async def by_signal(task: Any) -> None:
    await task.signal("go")


async def by_sleep(task: Any) -> None:
    await task.sleep(3600)


async def cancel_all(store: Any, session: Any) -> None:
    await session.cancel_all("enough")


async def wake_all(store: Any, session: Any) -> None:
    from lash_store import TaskFilter

    handles = iter([await session.handle(record.id) for record in await session.list()])

    async def wake() -> None:
        for handle in handles:
            await handle.signal("go")

    await asyncio.gather(*(wake() for _ in range(CALLERS)))
    while await store.count(TaskFilter(include_terminal=False)):
        await asyncio.sleep(0.05)


async def close(store: Any, session: Any) -> None:
    await store.close(timeout=None)


def by_lash_store(
    body: Callable[[Any], Awaitable[None]], end: Callable[[Any, Any], Awaitable[None]]
) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import CancelPolicy, Recovery, TaskStore

        wanted = number(scale)

        async def main() -> Mapping[str, float]:
            store = TaskStore(folder / "lash.db", runtime="bench", max_running=wanted)
            begun = 0

            @store.task(recovery=Recovery.RERUN)
            async def waits(task: Any) -> None:
                nonlocal begun
                begun += 1
                await body(task)

            async with store:
                session = await store.session("s1")
                abort = CancelPolicy.ABORT_LOCAL
                for handle in [await session.spawn(waits, cancel_policy=abort) for _ in range(10)]:
                    await handle.cancel()
                begun, before = 0, in_memory()
                ticker = Ticker()
                await ticker.enter("spawn")
                numbers = iter(range(wanted))

                async def spawn() -> None:
                    for _ in numbers:
                        await session.spawn(waits, cancel_policy=abort)

                began = time.perf_counter()
                await asyncio.gather(*(spawn() for _ in range(CALLERS)))
                while begun < wanted:
                    await asyncio.sleep(0.01)
                spawned = time.perf_counter() - began
                await asyncio.sleep(SETTLED)
                await ticker.enter("wait")
                await asyncio.sleep(SETTLED)
                await ticker.leave()
                after = in_memory()
                await ticker.enter("end")
                began = time.perf_counter()
                await end(store, session)
                ended = time.perf_counter() - began
                await ticker.leave()
                await ticker.close()
            return {
                "kilobytes": (after - before) / wanted / 1000,
                **ticker.figures,
                "spawned": wanted / spawned,
                "ended": wanted / ended,
            }

        return asyncio.run(main())

    return run


def over_bare(way: str) -> Callable[[Found], float | None]:
    """Return how to take what a task needs more than a bare one."""

    def more(found: Found) -> float | None:
        ours, bare = median(found, way, "kilobytes"), median(found, BARE, "kilobytes")
        return None if ours is None or bare is None else ours - bare

    return more


def longest(suffix: str) -> Callable[[Found], float | None]:
    """Return how to take the longest stall of any way and any phase: of each, the median over the rounds."""

    def most(found: Found) -> float | None:
        stalls = [median(found, way, f"{phase}_{suffix}") for way in ENDS for phase in ("spawn", "wait", "end")]
        return None if any(one is None for one in stalls) else max(one for one in stalls if one is not None)

    return most


BARE = "bare asyncio tasks"
ENDS = {
    "in a future, then cancelled": by_lash_store(by_future, cancel_all),
    "in a signal, then sent it": by_lash_store(by_signal, wake_all),
    "in a sleep, then closed": by_lash_store(by_sleep, close),
}
CASE = Case(
    name="live",
    title="50,000 live tasks that wait",
    metrics={
        "kilobytes": "kB a task",
        "spawn_stall": "longest stall of the loop, ms: while spawned",
        "spawn_stall_itself": "without the collector",
        "wait_stall": "while they wait",
        "wait_stall_itself": "without the collector ",
        "end_stall": "while they end",
        "end_stall_itself": "without the collector  ",
        "collector": "longest collection ms",
        "spawned": "spawned/s",
        "ended": "ended/s",
    },
    ways=[
        Way(BARE, by_asyncio, "as many tasks that wait for a future each"),
        *(Way(name, run) for name, run in ENDS.items()),
    ],
    goals=[
        *(Goal(f"{name}: memory over a bare task", over_bare(name), at_most=8, unit="kB") for name in ENDS),
        Goal("longest stall of the loop", longest("stall"), at_most=50, unit="ms"),
        Goal("without Python's collector of cycles", longest("stall_itself"), at_most=50, unit="ms"),
    ],
    notes=(
        "Memory is what the process has in memory of its own after a full collection. A coroutine that sleeps for 5 ms at a "
        "time tells how much too late it is woken. Python's collector of cycles stops everything while it looks through all "
        "objects there are, bare tasks as well as others: a program with so many does well to call gc.freeze() or to raise "
        "its threshold, which is for the program to decide."
    ),
    rounds=1,
)
