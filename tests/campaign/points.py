"""
Owns the named points at which a process of the campaign kills itself; put in place by the process, never by the package.

A point is passed many times; a plan says at which passing the process dies, with SIGKILL, as the kernel would do it.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

from alembic.operations import Operations

from lash_store import callbacks, claims, commit, recovery, retention_queries, runner, writer
from lash_store.store import TaskStore

__all__ = ["POINTS", "Points"]

POINTS = {
    "after BEGIN": 40,
    "before COMMIT": 40,
    "after COMMIT, nobody told": 40,
    "committed, before the effect": 40,
    "before a body begins": 12,
    "between a handoff and a start": 3,
    "inside recovery": 1,
    "recovered, before the effect": 1,
    "before a checkpoint": 3,
    "inside a checkpoint": 3,
    "before a callback": 3,
    "notes handed out, not acknowledged": 4,
    "inside a prune": 3,
    "inside a close": 1,
    "inside a migration": 60,
}
"""Each point, and at which of its first so many passings a process may die there."""


class Points:
    """Counts the passings of each point, and dies at one of them: *last_words* are said before."""

    def __init__(self, point: str | None, passing: int, last_words: Callable[[str], None]) -> None:
        self._point = point
        self._passing = passing
        self._last_words = last_words
        self._handed_off = False
        self.passed: Counter[str] = Counter()

    def hit(self, point: str) -> None:
        """Pass a point."""
        self.passed[point] += 1
        if point == self._point and self.passed[point] == self._passing:
            self._last_words(point)
            os.kill(os.getpid(), signal.SIGKILL)

    def put_in_place(self) -> None:
        """Let this process pass them; before it opens a store."""
        hit = self.hit

        def around(owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
            original = getattr(owner, name)

            def passing(*args: Any, **kwargs: Any) -> Any:
                if before is not None:
                    hit(before)
                result = original(*args, **kwargs)
                if after is not None:
                    hit(after)
                return result

            setattr(owner, name, passing)

        around(commit.Committer, "_begin", after="after BEGIN")
        around(commit.Committer, "_end", before="before COMMIT", after="after COMMIT, nobody told")
        around(commit.Committer, "_checkpoint", before="before a checkpoint")
        around(commit, "open_sqlite", after="inside a checkpoint")
        around(recovery.Recoverer, "_recover", after="inside recovery")
        around(runner.Runner, "_launch", before="before a body begins")
        around(callbacks.Callbacks, "_bounded", before="before a callback")
        around(claims.Claim, "__aexit__", before="notes handed out, not acknowledged")
        around(TaskStore, "_give_back", before="inside a close")
        around(Operations, "execute", after="inside a migration")
        around(retention_queries, "bury", after="inside a prune")
        act_on = writer.Writer._act_on

        async def acting(self: Any, events: Any) -> None:
            hit("committed, before the effect")
            types = {event.type for event in events}
            if "handed_off" in types:
                hit("between a handoff and a start")
            if types & {"reattached", "claimed", "abandoned"}:
                hit("recovered, before the effect")
            await act_on(self, events)

        writer.Writer._act_on = acting  # type: ignore[method-assign]
