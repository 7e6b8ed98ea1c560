"""Owns the figure for one cancel: the request → body stopped and row terminal, in one process, one at a time."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks import plain
from benchmarks.measuring import Case, Goal, Way, ratio

TASKS = 500
Durability: TypeAlias = Literal["full", "normal"]
REQUEST = "UPDATE tasks SET state = 'cancel_requested', updated_at = :now WHERE seq = :seq AND state = 'running'"
CONFIRM = (
    "UPDATE tasks SET state = 'cancelled', updated_at = :now, completed_at = :now"
    " WHERE seq = :seq AND state = 'cancel_requested'"
)


def figures(waited: list[float]) -> Mapping[str, float]:
    waited.sort()
    return {"p50_ms": waited[len(waited) // 2] * 1e3, "p99_ms": waited[int(len(waited) * 0.99)] * 1e3}


def by_the_disk(folder: Path, scale: float) -> Mapping[str, float]:
    file = os.open(folder / "pages", os.O_CREAT | os.O_WRONLY, 0o600)
    waited = []
    for _ in range(max(1, int(TASKS * scale))):
        began = time.perf_counter()
        for _ in range(2):
            os.write(file, bytes(4096))
            getattr(os, "fdatasync", os.fsync)(file)
        waited.append(time.perf_counter() - began)
    os.close(file)
    return figures(waited)


def by_plain(synchronous: str) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        connection = plain.open_plain(folder / "plain.db", synchronous)
        seqs = []
        connection.execute("BEGIN IMMEDIATE")
        for number in range(max(1, int(TASKS * scale))):
            arguments = json.dumps({"number": number})
            named = {"id": f"job-{number}", "arguments": arguments, "now": plain.now()}
            seq = connection.execute(plain.SPAWN, named).lastrowid
            connection.execute(plain.START, {"seq": seq, "now": plain.now()})
            seqs.append(seq)
        connection.execute("COMMIT")
        waited = []
        for seq in seqs:
            began = time.perf_counter()
            for change, event in ((REQUEST, "cancel_requested"), (CONFIRM, "cancelled")):
                connection.execute("BEGIN IMMEDIATE")
                assert connection.execute(change, {"seq": seq, "now": plain.now()}).rowcount == 1
                connection.execute(plain.EVENT, {"seq": seq, "type": event, "now": plain.now(), "data": "{}"})
                connection.execute("COMMIT")
            waited.append(time.perf_counter() - began)
        connection.close()
        return figures(waited)

    return run


def by_lash_store(durability: Durability) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        from lash_store import CancelPolicy, Recovery, TaskContext, TaskState, TaskStore

        tasks = max(1, int(TASKS * scale))

        async def main() -> Mapping[str, float]:
            store = TaskStore(folder / "lash.db", runtime="bench", durability=durability, max_running=tasks)
            running, all_run = 0, asyncio.Event()
            stopped: set[int] = set()

            @store.task(recovery=Recovery.RERUN)
            async def job(task: TaskContext, number: int) -> None:
                nonlocal running
                running += 1
                if running == tasks:
                    all_run.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    stopped.add(number)

            async with store:
                session = await store.session("s1")
                handles = [
                    await session.spawn(job, number, cancel_policy=CancelPolicy.ABORT_LOCAL) for number in range(tasks)
                ]
                await all_run.wait()
                waited = []
                for number, handle in enumerate(handles):
                    began = time.perf_counter()
                    row = await handle.cancel()
                    waited.append(time.perf_counter() - began)
                    assert row.state is TaskState.CANCELLED
                    assert number in stopped
            return figures(waited)

        return asyncio.run(main())

    return run


PLAIN, LASH_STORE = "plain sqlite3", "lash_store"
PLAIN_NORMAL, LASH_STORE_NORMAL = "plain sqlite3, NORMAL", "lash_store, NORMAL"
CASE = Case(
    name="cancel",
    title="Cancel (abort_local): request → body stopped and row terminal, same process",
    metrics={"p50_ms": "p50 ms", "p99_ms": "p99 ms"},
    ways=[
        Way(
            PLAIN,
            by_plain("FULL"),
            "a commit pair, synchronous=FULL: cancel_requested and an event, then cancelled and an event; no body",
        ),
        Way(
            LASH_STORE,
            by_lash_store("full"),
            "handle.cancel() of one running task after the other, until it has returned",
        ),
        Way(PLAIN_NORMAL, by_plain("NORMAL"), "the same with synchronous=NORMAL, where no commit waits for the disk"),
        Way(LASH_STORE_NORMAL, by_lash_store("normal"), 'durability="normal"'),
        Way(
            "the disk alone",
            by_the_disk,
            "a page is written and fdatasync called, twice: what no commit pair is quicker than",
        ),
    ],
    goals=[Goal("p50 beside one plain commit pair", ratio(LASH_STORE, "p50_ms", PLAIN), at_most=3)],
    notes=(
        "Where the disk is slow, both ways wait for it most of the time, and the ratio comes near to 1: the ways with NORMAL show"
        " what is worked beside that."
    ),
)
