"""Programs of worker processes whose store runs over an observed SQLite."""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Any

from lash_store import Recovery, StoreError, TaskContext, TaskStore

from . import vfs


class Counting:
    """Counts calls, and fails the next that it is told to."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.fail: tuple[str, str, int] | None = None

    def before(self, call: vfs.Call) -> int | None:
        """Fail a call of the kind and file that is to fail, once."""
        if self.fail is not None and self.fail[:2] == (call.kind, call.role):
            code, self.fail = self.fail[2], None
            return code
        return None

    def after(self, call: vfs.Call) -> None:
        """Count what was done."""
        self.counts[f"{call.kind} {call.role}"] += 1


async def count_and_fail(report: Any, path: str) -> None:
    """Run a task, tell what SQLite did; then let the next sync of the ``-wal`` fail, and tell what a caller hears."""
    observer = Counting()
    vfs.install(observer, vfs.KINDS)
    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def double(task: TaskContext, number: int) -> int:
        await task.save(number)
        return 2 * number

    async with store:
        session = await store.session("s1")
        report("result", await (await session.spawn(double, 4, id="before")))
        report("counts", dict(observer.counts))
        observer.fail = ("sync", "wal", sqlite3.SQLITE_IOERR_FSYNC)
        try:
            await session.spawn(double, 5, id="failing")
        except StoreError as error:
            report("failed", type(error).__name__, observer.fail is None)
        else:
            report("failed", None, observer.fail is None)
    report("end")
