"""Owns what is pruned: the unit that takes finished tasks away, and the loop that does it without holding others up."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime

from . import families, processes, session_queries
from . import retention_queries as queries
from .models import Scope
from .queries import process_identity, readable
from .reader import Reader
from .retention_models import Progress, PruneReport, Retention
from .transaction import Transaction, utc_text
from .writer import Writer

__all__ = ["Pruner", "prune"]

log = logging.getLogger(__name__)

_TASKS, _EVENTS, _LOOKED_AT, _FAMILIES = 100, 2_000, 5_000, 100
"""
How much one transaction takes away at most, but for one task with more events than that; how many numbers it looks at, and at how
many families.
"""

_PAGES = 256
"""How many free pages one transaction gives back."""

_SHARE = 0.5
"""How long it pauses after a transaction, as a share of what that took: other processes wait for the same lock."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What one transaction did, and the ``task_seq`` up to which all is left for the next."""

    left: int
    tasks: int = 0
    events: int = 0
    seen: int = 0
    unread: int = 0
    needed: int = 0
    has_notes: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take away."""
        return not self.tasks and not self.has_notes


async def prune(
    writer: Writer | None, reader: Reader, wanted: Retention, progress: Progress | None = None, *, dry_run: bool = False
) -> PruneReport:
    """
    Take away what may go, in transactions of bounded size, then give the room back.

    The newest first: once a task is looked at, what descends from it has gone or stays. Cancelled in the middle, what was done
    is done. A *dry_run* counts, and writes nothing: it alone needs no *writer*.
    """
    before = None
    if wanted.older_than is not None:
        before = utc_text(max(0.0, datetime.now(UTC).timestamp() - wanted.older_than.total_seconds()))
    if writer is not None:
        # what this process has read is noted before anything is looked at
        await writer.run(lambda _tx: None)
    newest = int((await reader.rows(queries.NEWEST_TASK, {}))[0][0])
    kept = None
    if wanted.keep_last:
        kept = dict(await reader.rows(queries.LAST_KEPT, {"keep_last": wanted.keep_last}))

    gone: set[int] = set()

    def part(tx: Transaction, until: int, *, is_dry: bool) -> _Part:
        # what was taken away is in the file no more, but for a dry run
        return _prune(tx, until, wanted, before, kept, gone if dry_run else set(), is_dry=is_dry)

    report = PruneReport(newest_seq=newest)
    while report.task_seq < newest:
        began = time.monotonic()
        until = newest - report.task_seq
        # what needs no change needs no lock
        done = await reader.look(functools.partial(part, until=until, is_dry=True))
        if writer is not None and not dry_run and not done.is_empty:
            done = await writer.run(functools.partial(part, until=until, is_dry=False))
        report = PruneReport(
            tasks=report.tasks + done.tasks,
            events=report.events + done.events,
            seen=report.seen + done.seen,
            unread=report.unread + done.unread,
            needed=report.needed + done.needed,
            task_seq=newest - done.left,
            newest_seq=newest,
        )
        if progress is not None:
            progress(report)
        await asyncio.sleep((time.monotonic() - began) * _SHARE)
    if writer is not None and not dry_run:
        report = await _give_back(writer, reader, report, progress)
    return report


def _prune(
    tx: Transaction,
    until: int,
    wanted: Retention,
    before: str | None,
    kept: dict[str, int] | None,
    gone: set[int],
    *,
    is_dry: bool,
) -> _Part:
    """Take away some of what may go, from a ``task_seq`` down, and say how far that came; add it to what has *gone*."""
    until = queries.newest_up_to(tx, until)
    after = max(until - _LOOKED_AT, 0)
    found = queries.candidates(
        tx,
        after,
        until,
        before=before,
        states=None if wanted.states is None else [*wanted.states],
        scopes=None if wanted.sessions is None else [str(scope) for scope in wanted.sessions],
    )
    chosen: list[queries.Candidate] = []
    events = seen = unread = needed = families_seen = 0
    above: dict[tuple[str, int | None], families.Above] = {}
    with closing(found):
        for one in found:
            is_full = len(chosen) == _TASKS or (chosen and events + one.events > _EVENTS)
            if is_full or families_seen == _FAMILIES:
                # what has been looked at is done; the rest is for the next
                after = one.task_seq
                break
            if _stays(one, wanted, kept):
                continue
            seen += 1
            if not one.is_read and not wanted.unread:
                unread += 1
                continue
            families_seen += one.may_have_family
            if _is_needed(tx, one, above, gone):
                needed += 1
                continue
            chosen.append(one)
            events += one.events
            if one.parent_seq is not None:
                gone.add(one.task_seq)
    if not is_dry:
        if chosen:
            queries.bury(tx, chosen)
        queries.sweep_notes(tx, after, until)
    has_notes = is_dry and queries.has_notes_left(tx, after, until)
    return _Part(after, len(chosen), events, seen, unread, needed, has_notes)


def _stays(one: queries.Candidate, wanted: Retention, kept: dict[str, int] | None) -> bool:
    """Whether a limit keeps a task: it is among its session's last, or has an event the cursor has not seen."""
    if kept is not None and one.task_seq >= kept.get(one.scope, 0):
        return True
    return wanted.before_cursor is not None and one.last_event > wanted.before_cursor


def _is_needed(
    tx: Transaction, one: queries.Candidate, above: dict[tuple[str, int | None], families.Above], gone: set[int]
) -> bool:
    if one.is_armed or one.parent_lives or (one.process is not None and _runs(one.process)):
        return True
    if not one.may_have_family:
        return False
    if families.live_descendants(tx, one.task_seq):
        return True
    # a cancel of what lives above may have to come through it, and one that was requested, to what is begun below it later
    place = one.scope, one.parent_seq
    if place not in above:
        above[place] = families.above(tx, one.task_seq)
    lives, is_cancelled = above[place]
    if not (lives or is_cancelled or one.was_cancelled):
        return False
    if any(child not in gone for child in queries.children(tx, one.task_seq)):
        return True
    if one.child_session_id is None:
        return False
    # a closed session may be opened again: then those that had ended do not answer for it, but are found from above
    if lives:
        return True
    with readable(f"the row of task #{one.task_seq}"):
        scope = Scope(Scope.parse(one.scope).runtime, one.child_session_id)
    return _answers(tx, one.task_seq, scope)


def _answers(tx: Transaction, task_seq: int, scope: Scope) -> bool:
    """Whether a sub-agent is asked when a task is born in the session it worked in, or will be once an older one has ended."""
    place = session_queries.birthplace(tx, str(scope))
    return place is not None and place.closed_at is None and place.agent is not None and place.agent <= task_seq


def _runs(process: str) -> bool:
    """Whether what ran for a task that was given up lives still: by its row whoever recovers it finds and ends it."""
    known = process_identity(process)
    return known is not None and bool(processes.survivors(known))


async def _give_back(writer: Writer, reader: Reader, report: PruneReport, progress: Progress | None) -> PruneReport:
    """Give free pages back to the file system, some a transaction; without any, nothing is written."""
    [(free,)] = await reader.rows("PRAGMA freelist_count", {})
    [(size,)] = await reader.rows("PRAGMA page_size", {})
    freed = 0
    while free:
        began = time.monotonic()
        left = await writer.run(lambda tx: queries.free_pages(tx, _PAGES))
        if left >= free:
            # a file that was not made to shrink
            break
        freed += free - left
        free = left
        if progress is not None:
            progress(report.model_copy(update={"freed": freed * size}))
        await asyncio.sleep((time.monotonic() - began) * _SHARE)
    return report.model_copy(update={"freed": freed * size})


class Pruner:
    """Applies a store's retention in the background, from its opening to its close."""

    def __init__(self, writer: Writer, reader: Reader, wanted: Retention) -> None:
        self._writer = writer
        self._reader = reader
        self._wanted = wanted
        self._task = asyncio.create_task(self._work(), name="lash_store retention")

    async def close(self) -> None:
        """End it, after the transaction it is in."""
        self._task.cancel()
        # not awaited itself: who is cancelled here must hear of it
        await asyncio.wait({self._task})

    async def _work(self) -> None:
        while True:
            try:
                report = await prune(self._writer, self._reader, self._wanted)
                if report.tasks:
                    log.info("pruned", extra=report.model_dump())
            except Exception:
                # the file is busy or full, or the store stops: the next time will do
                log.warning("prune_failed", exc_info=True)
            await asyncio.sleep(self._wanted.every)
