"""Owns recovery: one transaction over the live rows whose owner is gone, its report, and the watch for owners that die."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from . import lifecycle, owners, queries, session_queries, step_queries, transitions
from .commands import ConfirmCancel, Release, Start
from .database import Committed, Reader, Transaction
from .errors import StoreError
from .lifecycle import Task
from .models import EventType, Evidence, OwnerEnd, RecoveryReport, TaskRecord, TaskState, Verdict
from .owners import Life, OwnerLock
from .queries import OwnerRow
from .registry import Registry
from .writer import Writer

__all__ = ["Recoverer", "evidence_of", "give_up_owner", "report_of"]

log = logging.getLogger(__name__)

_LOOK = 0.1
"""Seconds between looks at the locks of live peers; asking one costs about 15 microseconds."""

_LISTS = {
    EventType.REATTACHED: "reattached",
    EventType.CLAIMED: "claimed",
    EventType.RELEASED: "released",
    EventType.CANCELLED: "cancelled",
    EventType.FAILED: "failed",
    EventType.ABANDONED: "abandoned",
}


def evidence_of(
    owner: OwnerRow | None, end: OwnerEnd, now: str, reason: str | None = None, by: str | None = None
) -> str:
    """Write what is known of an owner that left work without an outcome, and of who gave it up."""
    return Evidence(
        owner_id=None if owner is None else owner.owner_id,
        pid=None if owner is None else owner.pid,
        host=None if owner is None else owner.host,
        end=end,
        found_at=now,  # type: ignore[arg-type]
        reason=reason,
        by=by,
    ).model_dump_json()


def report_of(events: Sequence[Committed]) -> RecoveryReport:
    """Sort what was changed by what became of it."""
    changed: dict[str, list[TaskRecord]] = {name: [] for name in _LISTS.values()}
    for event in events:
        if event.task is not None and event.type in _LISTS:
            changed[_LISTS[EventType(event.type)]].append(queries.task_record(event.task))
    return RecoveryReport.model_validate(changed)


def give_up_owner(tx: Transaction, owner_id: int, reason: str, by: str) -> list[Committed]:
    """
    End an owner by a person's decision, with all that it holds; return what that changed.

    Raises:
        StoreError: the file has no such owner.
    """
    owner = queries.owner_by_id(tx, owner_id)
    if owner is None:
        raise StoreError(f"owner {owner_id} is not in this file: its row in 'owners' would name it")
    before = len(tx.events)
    evidence = evidence_of(owner, OwnerEnd.ABANDONED, tx.now, reason, by)
    if owner.ended_at is None:
        for task in queries.live_tasks_of_owner(tx, owner_id):
            if not task.is_external:
                transitions.give_up(tx, task, reason, evidence)
            elif task.state == TaskState.CANCEL_REQUESTED:
                transitions.end_cancelled(tx, task, "owner_abandoned")
            else:
                transitions.transition(tx, task, Release("owner_abandoned"))
        queries.end_owner(tx, owner_id, OwnerEnd.ABANDONED)
        session_queries.release_claims(tx, owner_id)
    return tx.events[before:]


class Recoverer:
    """
    Finds owners of one runtime that are dead, and gives their work to *owner_id*, as far as its functions are known here.

    *slots* reserves what bodies may be started at once.
    """

    def __init__(
        self,
        path: Path,
        *,
        runtime: str,
        owner_id: int,
        lock: OwnerLock,
        reader: Reader,
        writer: Writer,
        registry: Registry,
        slots: Callable[[], AbstractContextManager[int]],
    ) -> None:
        self._path = path
        self._runtime = runtime
        self._owner_id = owner_id
        self._lock = lock
        self._reader = reader
        self._writer = writer
        self._registry = registry
        self._slots = slots
        self._peers: list[OwnerRow] = []
        self._someone_left = False
        self._one_at_a_time = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self.latest = RecoveryReport()

    async def recover(self) -> RecoveryReport:
        """Take over what dead owners left, in one transaction; see `TaskStore.recover`."""
        async with self._one_at_a_time:
            if self._closed:
                return RecoveryReport()
            await self.look_for_peers()
            lives = {peer: owners.life_of(self._path, peer) for peer in self._peers}
            dead = [peer for peer, life in lives.items() if life is Life.DEAD]
            with self._slots() as slots:
                report = await self._writer.run(lambda tx: self._recover(tx, dead, slots))
            self._someone_left = False
            if dead:
                await self._bury(dead)
                await self.look_for_peers()
            unreachable = tuple(peer.owner_id for peer, life in lives.items() if life is Life.UNREACHABLE)
            report = report.model_copy(update={"unreachable": unreachable})
            if report != RecoveryReport():
                self.latest = report
            return report

    def _recover(self, tx: Transaction, dead: list[OwnerRow], slots: int) -> RecoveryReport:
        if tx.forbidden is not None:
            # what a given-up owner took would be taken from it at once
            return RecoveryReport()
        for owner in dead:
            queries.end_owner(tx, owner.owner_id, OwnerEnd.DIED)
        before = len(tx.events)
        unknown: set[str] = set()
        versions: set[str] = set()
        cut_off: dict[int, int] = {}
        for task in queries.live_tasks_left(tx, self._runtime):
            if task.may_rerun and self._registry.for_task(task) is None:
                name = task.function or ""
                unknown.add(name)
                if self._registry.by_name(name) is not None:
                    versions.add(f"{name}@{task.version or ''}")
            if task.is_executing:
                cut_off[task.task_seq] = task.attempt
            slots -= self._recover_task(tx, task, slots > 0)
        begun = step_queries.steps_in_flight(tx, cut_off) if cut_off else []
        in_flight = [step for step in begun if step.attempt == cut_off[step.task_seq]]
        return report_of(tx.events[before:]).model_copy(
            update={
                "dead_owners": tuple(owner.owner_id for owner in dead),
                "unknown_functions": tuple(sorted(unknown)),
                "unknown_versions": tuple(sorted(versions)),
                "in_flight": tuple(map(step_queries.step_record, in_flight)),
            }
        )

    def _recover_task(self, tx: Transaction, task: Task, slot: bool) -> bool:
        """Recover one row, and say whether that took a slot."""
        owner = None if task.owner_id is None else queries.owner_by_id(tx, task.owner_id)
        end = OwnerEnd.DIED if owner is None or owner.end is None else OwnerEnd(owner.end)
        function = self._registry.for_task(task)
        command = lifecycle.recover(
            task,
            owner_id=self._owner_id,
            known=function is not None,
            slot=slot,
            evidence=evidence_of(owner, end, tx.now),
            now=tx.now,
            version=None if function is None else function.version,
        )
        if isinstance(command, Start):
            return transitions.start(tx, task, command).verdict is Verdict.APPLIED
        if isinstance(command, ConfirmCancel):
            transitions.end_cancelled(tx, task)
        else:
            transitions.transition(tx, task, command)
        return False

    async def _bury(self, dead: list[OwnerRow]) -> None:
        tokens = [owner.token for owner in dead]
        owners.release_orphans(set(tokens))

        def unit(tx: Transaction) -> None:
            owners.sweep(self._path, [token for token in tokens if not queries.owner_is_open(tx, token)])

        await self._writer.run(unit)

    # --- watching ---

    async def look_for_peers(self) -> None:
        """Read which other owners of this runtime have not ended; told when somebody else committed."""
        rows = await self._reader.rows(queries.OPEN_OWNERS, {"runtime": self._runtime})
        peers = [owner for owner in map(OwnerRow._make, rows) if owner.owner_id != self._owner_id]
        if {owner.owner_id for owner in self._peers} - {owner.owner_id for owner in peers}:
            self._someone_left = True
        self._peers = peers

    async def take_what_was_left(self) -> None:
        """Recover if an owner has closed since the last time: it released work, or could not finish a cancel."""
        await self.look_for_peers()
        if self._someone_left:
            await self.recover()

    def watch(self) -> None:
        """Begin to look at the peers' locks; no table is read while none is free."""
        self._watch = asyncio.create_task(self._look(), name="lash_store recovery")

    async def close(self) -> None:
        """Stop looking, and taking anything over."""
        async with self._one_at_a_time:
            self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
            self._watch = None

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK)
            try:
                self._lock.keep()
                if any(owners.life_of(self._path, peer) is Life.DEAD for peer in self._peers):
                    await self.recover()
            except (StoreError, OSError):
                log.warning("recovery_failed", exc_info=True)
                await asyncio.sleep(1.0)
