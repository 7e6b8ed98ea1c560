"""Owns the opening of what a power cut left, by a real store: ``python -m tests.power.reopen`` opens the files it is told of."""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from lash_store import Recovery, TaskContext, TaskStore

__all__ = ["main"]


async def reopen(path: Path) -> None:
    """Open a file as the application would after the restart, let recovery and what it starts run, and close."""
    store = TaskStore(path, runtime="desktop", max_running=4)

    @store.task(recovery=Recovery.RERUN, max_attempts=4)
    async def worker(task: TaskContext, plan: list[str]) -> dict[str, Any]:
        return {"attempt": task.attempt, "acts": len(plan)}

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext, plan: list[str]) -> dict[str, Any]:
        return {"attempt": task.attempt, "acts": len(plan)}

    async with store:
        again = await store.recover()
        assert not again.dead_owners, f"a second recovery found {again.dead_owners}"
        report = await store.check()
        assert report.is_sound, report.findings


def main() -> int:
    """Open the files named on standard input, and say what went wrong, or null, a line each."""
    warnings.simplefilter("error")
    for line in sys.stdin:
        said = None
        try:
            asyncio.run(reopen(Path(line.rstrip("\n"))))
        except Exception as error:
            said = f"a store said {error!r}"
        print(json.dumps(said), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
