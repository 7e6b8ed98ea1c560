"""
Owns the figure for one life cycle: spawn → completed, a second, beside what a user would write instead.

Each way makes the same steps durable, in a file of its own on the same disk: a task row and its event, its start and the
event, its result and the event. Rounds are interleaved and the median is shown, because shared machines drift.

    python benchmarks/lifecycle.py                  # about a minute
    python benchmarks/lifecycle.py --quick --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lash_store import Recovery, TaskContext, TaskStore

CALLERS = (1, 10, 100, 1000)

# what a user's own table would be: a key to find the task by, its state, and a history
SCHEMA = """
CREATE TABLE tasks (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, session TEXT NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
  function TEXT NOT NULL, arguments TEXT NOT NULL, attempt INTEGER NOT NULL, result TEXT,
  created_at TEXT NOT NULL, updated_at TEXT NOT NULL, completed_at TEXT, UNIQUE (session, id));
CREATE TABLE events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, task INTEGER NOT NULL REFERENCES tasks (seq), type TEXT NOT NULL, at TEXT NOT NULL,
  data TEXT NOT NULL);
CREATE INDEX events_task ON events (task);
"""
SPAWN = (
    "INSERT INTO tasks (session, id, kind, state, function, arguments, attempt, created_at, updated_at)"
    " VALUES ('s1', :id, 'other', 'pending', 'job', :arguments, 0, :now, :now)"
)
START = "UPDATE tasks SET state = 'running', attempt = 1, updated_at = :now WHERE seq = :seq AND state = 'pending'"
COMPLETE = (
    "UPDATE tasks SET state = 'completed', result = :result, updated_at = :now, completed_at = :now"
    " WHERE seq = :seq AND state = 'running'"
)
EVENT = "INSERT INTO events (task, type, at, data) VALUES (:seq, :type, :now, :data)"


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def plain(folder: Path, cycles: int, callers: int, durability: str) -> float:
    """Plain `sqlite3`, one commit a step, one caller after the other: SQLite has one writer."""
    connection = sqlite3.connect(folder / "plain.db", isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL").fetchall()
    connection.execute(f"PRAGMA synchronous={durability}").fetchall()
    connection.executescript(SCHEMA)
    began = time.perf_counter()
    for number in range(cycles):
        arguments = json.dumps({"number": number})
        connection.execute("BEGIN IMMEDIATE")
        seq = connection.execute(SPAWN, {"id": f"job-{number}", "arguments": arguments, "now": now()}).lastrowid
        connection.execute(EVENT, {"seq": seq, "type": "registered", "now": now(), "data": arguments})
        connection.execute("COMMIT")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(START, {"seq": seq, "now": now()})
        connection.execute(EVENT, {"seq": seq, "type": "started", "now": now(), "data": "{}"})
        connection.execute("COMMIT")
        result = json.dumps(number)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(COMPLETE, {"seq": seq, "result": result, "now": now()})
        connection.execute(EVENT, {"seq": seq, "type": "completed", "now": now(), "data": result})
        connection.execute("COMMIT")
    took = time.perf_counter() - began
    connection.close()
    return cycles / took


def sqlalchemy_async(folder: Path, cycles: int, callers: int, durability: str) -> float:
    """SQLAlchemy's async engine over aiosqlite, one transaction a step, as its documentation has it."""
    from sqlalchemy import event, text
    from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

    async def one(engine: AsyncEngine, lock: asyncio.Lock, number: int) -> None:
        arguments = json.dumps({"number": number})
        async with lock, engine.begin() as connection:
            spawned = await connection.execute(
                text(SPAWN + " RETURNING seq"), {"id": f"job-{number}", "arguments": arguments, "now": now()}
            )
            seq = spawned.scalar_one()
            await connection.execute(text(EVENT), {"seq": seq, "type": "registered", "now": now(), "data": arguments})
        async with lock, engine.begin() as connection:
            await connection.execute(text(START), {"seq": seq, "now": now()})
            await connection.execute(text(EVENT), {"seq": seq, "type": "started", "now": now(), "data": "{}"})
        result = json.dumps(number)
        async with lock, engine.begin() as connection:
            await connection.execute(text(COMPLETE), {"seq": seq, "result": result, "now": now()})
            await connection.execute(text(EVENT), {"seq": seq, "type": "completed", "now": now(), "data": result})

    async def run() -> float:
        engine = create_async_engine(f"sqlite+aiosqlite:///{folder / 'async.db'}")

        @event.listens_for(engine.sync_engine, "connect")
        def configure(connection: Any, _: object) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA journal_mode=WAL")
            cursor.execute(f"PRAGMA synchronous={durability}")
            cursor.close()

        async with engine.begin() as connection:
            for statement in SCHEMA.split(";")[:-1]:
                await connection.execute(text(statement))
        lock = asyncio.Lock()  # one writer at a time, or "database is locked"
        numbers = iter(range(cycles))

        async def caller() -> None:
            for number in numbers:
                await one(engine, lock, number)

        began = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        took = time.perf_counter() - began
        await engine.dispose()
        return cycles / took

    return asyncio.run(run())


def lash_store(folder: Path, cycles: int, callers: int, durability: str) -> float:
    """The public API: spawn a registered function, await its handle."""

    async def run() -> float:
        store = TaskStore(
            folder / "lash.db",
            runtime="bench",
            durability="full" if durability == "FULL" else "normal",
            max_running=max(64, callers),
        )

        @store.task(recovery=Recovery.RERUN)
        async def job(task: TaskContext, number: int) -> int:
            return number

        async with store:
            session = await store.session("s1")
            numbers = iter(range(cycles))

            async def caller() -> None:
                for number in numbers:
                    assert await (await session.spawn(job, number)) == number

            began = time.perf_counter()
            await asyncio.gather(*(caller() for _ in range(callers)))
            return cycles / (time.perf_counter() - began)

    return asyncio.run(run())


Way = Callable[[Path, int, int, str], float]
BASELINE = "plain sqlite3, a commit a step"


def measure(rounds: int, scale: float, durability: str, progress: bool) -> dict[tuple[str, int], list[float]]:
    """Return life cycles a second by way and callers, one figure a round."""
    plan: list[tuple[str, Way, int, int]] = [
        (BASELINE, plain, 1, 600),
        ("SQLAlchemy async engine", sqlalchemy_async, 1, 60),
        ("SQLAlchemy async engine", sqlalchemy_async, 100, 100),
    ]
    plan += [("lash_store", lash_store, callers, 400 if callers == 1 else 3000) for callers in CALLERS]
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds):
        for name, way, callers, cycles in plan:
            if progress:
                print(f"\rround {number + 1} of {rounds}: {name}, {callers} callers".ljust(78), end="", file=sys.stderr)
            with tempfile.TemporaryDirectory(prefix="lash_store-bench-") as folder:
                rate = way(Path(folder), max(1, int(cycles * scale)), callers, durability)
            found.setdefault((name, callers), []).append(rate)
    if progress:
        print("\r".ljust(79), end="\r", file=sys.stderr)
    return found


def report(found: dict[tuple[str, int], list[float]], durability: str) -> list[dict[str, Any]]:
    """Return one row a way: its median, its spread, and its ratio to the baseline, round by round."""
    base = found[BASELINE, 1]
    return [
        {
            "way": name,
            "callers": callers,
            "synchronous": durability,
            "per_second": round(statistics.median(rates)),
            "min": round(min(rates)),
            "max": round(max(rates)),
            "ratio": round(statistics.median(rate / plain for rate, plain in zip(rates, base, strict=True)), 2),
        }
        for (name, callers), rates in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Life cycles (spawn → completed) a second, beside plain sqlite3 and SQLAlchemy's async engine."
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--durability", choices=["full", "normal"], default="full", help="PRAGMA synchronous of all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    durability = options.durability.upper()
    rounds, scale = (1, 0.2) if options.quick else (options.rounds, 1.0)
    rows = report(measure(rounds, scale, durability, sys.stderr.isatty()), durability)
    machine = f"{platform.machine()}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    if options.json:
        print(json.dumps({"machine": machine, "rounds": rounds, "rows": rows}, indent=2))
        return
    print(f"life cycles a second, synchronous={durability}, median of {rounds} ({machine})")
    print(f"{'way':32} {'callers':>7} {'a second':>9} {'min':>7} {'max':>7} {'× plain':>8}")
    for row in rows:
        print(
            f"{row['way']:32} {row['callers']:7} {row['per_second']:9,} {row['min']:7,} {row['max']:7,} {row['ratio']:8.2f}"
        )


if __name__ == "__main__":
    main()
