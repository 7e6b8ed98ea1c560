"""
Owns how Huey is configured where it is measured: `SqliteHuey` with ``fsync=True``, its consumer's threads in the same process.

Huey is a queue, not a record: a task is taken out of the file when its body begins, so a kill loses it, and there is no history.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .callers import figures
from .measuring import Missing

__all__ = ["HOW", "call_at_once", "consume"]

HOW = (
    "SqliteHuey(fsync=True), which is WAL and synchronous=FULL, four worker threads in the same process, each caller a thread in"
    " get(blocking=True), which looks every 50 ms and ever more rarely; a task is out of the file when its body begins"
)


@contextmanager
def consume(path: Path, function: Callable[[int], int]) -> Iterator[Callable[[int], Any]]:
    """
    Run a consumer of a function, and give what enqueues it.

    Raises:
        Missing: Huey is not installed.
        RuntimeError: its connection is not as durable as asked for.
    """
    try:
        module: Any = importlib.import_module("huey")
    except ImportError:
        raise Missing("Huey is not installed: pip install -e '.[bench]'") from None
    huey = module.SqliteHuey("bench", filename=str(path), fsync=True)
    found = [huey.storage.sql(f"PRAGMA {name}", results=True)[0][0] for name in ("journal_mode", "synchronous")]
    if found != ["wal", 2]:
        raise RuntimeError(f"Huey runs with journal_mode and synchronous {found}, not {['wal', 2]}")
    job = huey.task()(function)
    consumer = huey.create_consumer(workers=4, periodic=False)
    consumer.start()
    try:
        yield job
    finally:
        consumer.stop(graceful=True)
        huey.storage.close()


def call_at_once(job: Callable[[int], Any], callers: int, turns: int, *, preserve: bool = False) -> Mapping[str, float]:
    """Have so many threads enqueue the job and wait for its result; *preserve* leaves the result in the file."""
    waited = []

    def call(number: int) -> None:
        one = time.perf_counter()
        assert job(number).get(blocking=True, preserve=preserve) == number
        waited.append(time.perf_counter() - one)

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as threads:
        for _ in threads.map(call, range(turns)):
            pass
    return figures(turns, time.perf_counter() - began, waited)
