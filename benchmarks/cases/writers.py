"""Owns the figure for several processes that write one file: their life cycles a second together, and who waits how long."""

from __future__ import annotations

import asyncio
import multiprocessing
import sqlite3
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple, TypeAlias

from benchmarks import plain
from benchmarks.measuring import Case, Goal, Way, figure, ratio

PROCESSES = 4
CALLERS = 25
SECONDS = 4.0
PATIENCE = 30.0
"""Seconds that a commit waits for the other processes' lock, for all ways the same."""


class Done(NamedTuple):
    """What one process did: life cycles that ended in its time, seconds of each that it began, the longest spawn, failures."""

    cycles: int
    waited: list[float]
    longest_spawn: float
    errors: int


Write: TypeAlias = Callable[[Path, int, float, Connection], None]


def by(write: Write, processes: int) -> Callable[[Path, float], Mapping[str, float]]:
    """Have processes write for some time at once, the file made before, and add up what they did."""

    def run(folder: Path, scale: float) -> Mapping[str, float]:
        seconds = max(0.2, SECONDS * scale)
        context = multiprocessing.get_context("spawn")
        ours = []
        started = []
        for number in range(processes):
            here, there = context.Pipe()
            process = context.Process(target=write, args=(folder / "bench.db", number, seconds, there))
            process.start()
            there.close()
            # one by one: the first makes the file
            assert here.recv() == "ready"
            ours.append(here)
            started.append(process)
        for here in ours:
            here.send("go")
        done: list[Done] = [here.recv() for here in ours]
        for here in ours:
            here.send("close")
        for process in started:
            process.join()
        cycles = sum(some.cycles for some in done)
        waited = sorted(one for some in done for one in some.waited)
        return {
            "per_second": cycles / seconds,
            "least_share": 100 * processes * min(some.cycles for some in done) / cycles,
            "p50_ms": waited[len(waited) // 2] * 1e3,
            "p99_ms": waited[int(len(waited) * 0.99)] * 1e3,
            "longest_ms": waited[-1] * 1e3,
            "longest_spawn_ms": max(some.longest_spawn for some in done) * 1e3,
            "errors": sum(some.errors for some in done),
        }

    return run


def write_lash_store(path: Path, process: int, seconds: float, told: Connection) -> None:
    from lash_store import Recovery, StoreError, TaskContext, TaskStore

    async def main() -> None:
        store = TaskStore(path, runtime="bench", lock_timeout=PATIENCE)

        @store.task(recovery=Recovery.RERUN)
        async def job(task: TaskContext, number: int) -> int:
            return number

        async with store:
            session = await store.session(f"s{process}")
            told.send("ready")
            await asyncio.to_thread(told.recv)
            waited: list[float] = []
            spawns: list[float] = []
            cycles = errors = 0
            until = time.perf_counter() + seconds

            async def caller() -> None:
                nonlocal cycles, errors
                while (began := time.perf_counter()) < until:
                    try:
                        handle = await session.spawn(job, 1)
                        spawns.append(time.perf_counter() - began)
                        assert await handle == 1
                    except StoreError:
                        errors += 1
                    else:
                        ended = time.perf_counter()
                        waited.append(ended - began)
                        cycles += ended <= until

            await asyncio.gather(*(caller() for _ in range(CALLERS)))
            told.send(Done(cycles, waited, max(spawns, default=0.0), errors))
            # none closes while another still writes
            await asyncio.to_thread(told.recv)

    asyncio.run(main())


def write_plain(path: Path, process: int, seconds: float, told: Connection) -> None:
    if process == 0:
        plain.open_plain(path, "FULL").close()
    connection = sqlite3.connect(path, isolation_level=None, timeout=PATIENCE)
    connection.execute("PRAGMA synchronous=FULL").fetchall()
    told.send("ready")
    told.recv()
    waited = []
    cycles = number = errors = 0
    until = time.perf_counter() + seconds
    while (began := time.perf_counter()) < until:
        number += 1
        try:
            plain.life_cycle(connection, number * PROCESSES + process)
        except sqlite3.OperationalError:
            errors += 1
        else:
            ended = time.perf_counter()
            waited.append(ended - began)
            cycles += ended <= until
    told.send(Done(cycles, waited, 0.0, errors))
    told.recv()
    connection.close()


ONE, FOUR = f"lash_store, 1 process, {CALLERS} callers", f"lash_store, {PROCESSES} processes, {CALLERS} callers each"
PLAIN_ONE, PLAIN_FOUR = "plain sqlite3, 1 process", f"plain sqlite3, {PROCESSES} processes"
CASE = Case(
    name="writers",
    title="Several processes write one file: life cycles, all of them durable",
    metrics={
        "per_second": "life cycles/s",
        "least_share": "share of the slowest process, %",
        "p50_ms": "p50 ms",
        "p99_ms": "p99 ms",
        "longest_ms": "longest ms",
        "longest_spawn_ms": "longest spawn ms",
        "errors": "errors",
    },
    ways=[
        Way(PLAIN_ONE, by(write_plain, 1), "three commits a life cycle, one caller a process, busy_timeout of 30 s"),
        Way(PLAIN_FOUR, by(write_plain, PROCESSES), "the same, each with its connection: one caller a process"),
        Way(ONE, by(write_lash_store, 1), "lock_timeout of 30 s, as it comes"),
        Way(
            FOUR,
            by(write_lash_store, PROCESSES),
            "each with a TaskStore of its own and a session of its own, one runtime",
        ),
    ],
    goals=[
        Goal(f"{PROCESSES} processes beside one", ratio(FOUR, "per_second", ONE), at_least=0.7),
        Goal("errors", figure(FOUR, "errors"), at_most=0, unit=""),
        Goal("longest life cycle", figure(FOUR, "longest_ms"), unit="ms"),
    ],
    notes=(
        "100 % as the share of the slowest process would be its fair part. What ends when the time is over is in the waits,"
        " but not in the rate."
    ),
)
