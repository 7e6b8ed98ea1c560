"""Owns recovery: one transaction over the live rows whose owner is gone, its report, and the watch for owners that die."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from . import leftovers, lifecycle, monitor_queries, owners, queries, session_queries, step_queries, transitions
from .collector import Pause
from .commands import ConfirmCancel, Release, Start
from .errors import StorageError, StoreError
from .leftovers import Fates
from .lifecycle import Task
from .models import (
    EventType,
    Evidence,
    OwnerEnd,
    ProcessEvidence,
    ProcessFate,
    RecoveryReport,
    TaskRecord,
    TaskState,
)
from .owners import Life, OwnerLock
from .queries import OwnerRow
from .reader import Reader
from .registry import Registry
from .step_queries import StepRow
from .transaction import Committed, Transaction, utc_text
from .writer import Writer

__all__ = ["Recoverer", "evidence_of", "evidence_of_given_up", "give_up_owner", "report_of"]

log = logging.getLogger(__name__)

_LOOK = 0.1
"""Seconds between looks at the locks of live peers; asking one costs about 15 microseconds."""

_ALONE = 0.5
"""Seconds between looks when there is no peer: at this owner's own lock, and at what has a time."""

_AGAIN = (0.5, 30.0)
"""Seconds before what may not have ended, a process or a body, is looked at again: first, and at most."""

_LISTS = {
    EventType.REATTACHED: "reattached",
    EventType.CLAIMED: "claimed",
    EventType.RELEASED: "released",
    EventType.CANCELLED: "cancelled",
    EventType.FAILED: "failed",
    EventType.ABANDONED: "abandoned",
}


def evidence_of(
    owner: OwnerRow | None,
    end: OwnerEnd,
    now: str,
    reason: str | None = None,
    by: str | None = None,
    process: ProcessEvidence | None = None,
) -> str:
    """Write what is known of an owner that left work without an outcome, of who gave it up, and of what ran for it."""
    return Evidence(
        owner_id=None if owner is None else owner.owner_id,
        pid=None if owner is None else owner.pid,
        host=None if owner is None else owner.host,
        end=end,
        found_at=now,  # type: ignore[arg-type]
        reason=reason,
        by=by,
        process=process,
    ).model_dump_json()


def evidence_of_given_up(tx: Transaction, task: Task, owner: OwnerRow | None, reason: str, by: str) -> str:
    """Write what is known of a task that a person gives up, and of what runs for it."""
    process = leftovers.evidence_of_process(task, ProcessFate.GIVEN_UP)
    return evidence_of(owner, OwnerEnd.ABANDONED, tx.now, reason, by, process)


def report_of(events: Sequence[Committed]) -> RecoveryReport:
    """Sort what was changed by what became of it."""
    return Recovered(changed_in(events)).report()


def changed_in(events: Sequence[Committed]) -> list[tuple[str, Task]]:
    """Return what became of which row."""
    return [(event.type, event.task) for event in events if event.task is not None and event.type in _LISTS]


class Recovered(NamedTuple):
    """What one recovery did, as rows: of thousands, records are made only for who asks."""

    changed: Sequence[tuple[str, Task]] = ()
    dead_owners: tuple[int, ...] = ()
    unreachable: tuple[int, ...] = ()
    unknown_functions: tuple[str, ...] = ()
    unknown_versions: tuple[str, ...] = ()
    in_flight: tuple[StepRow, ...] = ()

    def and_then(self, later: Recovered) -> Recovered:
        """Return both as one."""
        return Recovered(
            [*self.changed, *later.changed],
            self.dead_owners + later.dead_owners,
            self.unreachable + later.unreachable,
            tuple(sorted({*self.unknown_functions, *later.unknown_functions})),
            tuple(sorted({*self.unknown_versions, *later.unknown_versions})),
            self.in_flight + later.in_flight,
        )

    def report(self) -> RecoveryReport:
        """Build the public report."""
        changed: dict[str, list[TaskRecord]] = {name: [] for name in _LISTS.values()}
        for became, task in self.changed:
            changed[_LISTS[EventType(became)]].append(queries.task_record(task))
        return RecoveryReport.model_validate(
            {
                **changed,
                "dead_owners": self.dead_owners,
                "unreachable": self.unreachable,
                "unknown_functions": self.unknown_functions,
                "unknown_versions": self.unknown_versions,
                "in_flight": tuple(map(step_queries.step_record, self.in_flight)),
            }
        )


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
            if task.process is not None:
                transitions.give_up(tx, task, reason, evidence_of_given_up(tx, task, owner, reason, by))
            elif not task.is_external:
                transitions.give_up(tx, task, reason, evidence)
            elif task.state == TaskState.CANCEL_REQUESTED:
                transitions.end_cancelled(tx, task, "owner_abandoned")
            else:
                transitions.transition(tx, task, Release("owner_abandoned"))
        queries.end_owner(tx, owner_id, OwnerEnd.ABANDONED)
        session_queries.release_claims(tx, owner_id)
        monitor_queries.release_claims(tx, owner_id)
    return tx.events[before:]


class Recoverer:
    """
    Finds owners of one runtime that are dead, and gives their work to *owner_id*, as far as its functions are known here.

    *slots* reserves what bodies may be started at once. A process that a dead owner left is ended before its row changes, with
    *grace* seconds between SIGTERM and SIGKILL.
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
        grace: float,
    ) -> None:
        self._path = path
        self._runtime = runtime
        self._owner_id = owner_id
        self._lock = lock
        self._reader = reader
        self._writer = writer
        self._registry = registry
        self._slots = slots
        self._grace = grace
        self._peers: list[OwnerRow] = []
        self._someone_left = False
        self._one_at_a_time = asyncio.Lock()
        self._watch: asyncio.Task[None] | None = None
        self._closed = False
        self._deadline: str | None = None
        self._may_have_freed = True
        self._ending: asyncio.Task[Recovered] | None = None
        self._over: set[tuple[int, str | None]] = set()
        self._try_again_at: float | None = None
        self._someone_runs_on = False
        self._pause = _AGAIN[0]
        self.latest = Recovered()

    async def recover(self, *, wait: bool = True) -> Recovered:
        """
        Take over what dead owners left, in one transaction; see `TaskStore.recover`.

        What a process must be ended for first follows in another, which is *waited* for, or comes by itself.
        """
        async with self._one_at_a_time:
            if self._closed:
                return Recovered()
            await self.look_for_peers()
            lives = {peer: owners.life_of(self._path, peer) for peer in self._peers}
            dead = [peer for peer, life in lives.items() if life is Life.DEAD]
            left = await leftovers.left_by(self._reader, [owner.owner_id for owner in dead], self._runtime)
            # of what is pruned nothing need be remembered
            self._over &= {(task.task_seq, task.process) for task in left}
            left = [task for task in left if (task.task_seq, task.process) not in self._over]
            fates = await leftovers.look(left)
            self._over |= {
                (task.task_seq, task.process) for task in left if task.is_terminal and leftovers.is_settled(task, fates)
            }
            found = await self._in_one(dead, fates)
            self._may_have_freed = True
            self._someone_left = False
            owners.release_orphans({owner.token for owner in dead})
            await self._sweep()
            # that they are gone is no news: nothing of theirs is left
            self._peers = [peer for peer in self._peers if peer not in dead]
            unreachable = tuple(peer.owner_id for peer, life in lives.items() if life is Life.UNREACHABLE)
            found = found._replace(unreachable=unreachable)
            if any(found):
                self.latest = found
            self._end_processes([task for task in left if not leftovers.is_settled(task, fates)], found)
            if self._someone_runs_on:
                self._look_again()
            elif self._ending is None:
                self._pause = _AGAIN[0]
            ending = self._ending
        return await asyncio.shield(ending) if wait and ending is not None else found

    async def settled(self) -> None:
        """Wait until what was left when recovery looked last is ended, and recovered."""
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def _end_processes(self, living: list[Task], first: Recovered) -> None:
        """Begin to end what runs for tasks that are to be recovered; one such ending goes on at a time."""
        self._try_again_at = None
        if living and self._ending is None:
            self._ending = asyncio.create_task(self._recover_ended(living, first), name="lash_store leftovers")
        elif living:
            self._try_again_at = time.monotonic() + _AGAIN[0]

    async def _recover_ended(self, living: list[Task], found: Recovered) -> Recovered:
        """End what runs for tasks, then recover them; return this and what was *found* first."""
        is_done = False
        try:
            fates = await leftovers.end(living, self._grace)
            async with self._one_at_a_time:
                if not self._closed:
                    found = found.and_then(await self._in_one([], fates))
                    self.latest = found
            is_done = all(leftovers.is_settled(task, fates) for task in living)
        except asyncio.CancelledError:
            # the store closes
            return found
        except (StoreError, OSError):
            log.warning("recovery_failed", exc_info=True)
        finally:
            self._ending = None
        if is_done:
            self._pause = _AGAIN[0]
        else:
            log.warning("processes_left", extra={"task_seqs": [task.task_seq for task in living]})
            self._look_again()
        return found

    def _look_again(self) -> None:
        """Have what is left looked at after a while, which gets longer each time."""
        self._try_again_at = time.monotonic() + self._pause
        self._pause = min(_AGAIN[1], self._pause * 2)

    async def _in_one(self, dead: list[OwnerRow], fates: Fates) -> Recovered:
        # until those that start have begun
        with self._slots() as slots, Pause() as pause:

            def unit(tx: Transaction) -> Recovered:
                pause.begin()
                return self._recover(tx, dead, slots, fates)

            return await self._writer.run(unit)

    def _recover(self, tx: Transaction, dead: list[OwnerRow], slots: int, fates: Fates) -> Recovered:
        if tx.forbidden is not None:
            # what a given-up owner took would be taken from it at once
            return Recovered()
        for gone in dead:
            queries.end_owner(tx, gone.owner_id, OwnerEnd.DIED)
        before = len(tx.events)
        unknown: set[str] = set()
        versions: set[str] = set()
        cut_off: dict[int, int] = {}
        owners_by_id: dict[int, OwnerRow | None] = {}
        self._someone_runs_on = False
        starts: list[tuple[Task, Start]] = []
        for task in queries.live_tasks_left(tx, self._runtime):
            if not leftovers.is_settled(task, fates):
                continue
            if task.owner_id is not None and task.owner_id not in owners_by_id:
                owners_by_id[task.owner_id] = queries.owner_by_id(tx, task.owner_id)
            owner = None if task.owner_id is None else owners_by_id[task.owner_id]
            if leftovers.runs_on(task, owner):
                self._someone_runs_on = True
                continue
            if task.may_rerun and self._registry.for_task(task) is None:
                name = task.function or ""
                unknown.add(name)
                if self._registry.by_name(name) is not None:
                    versions.add(f"{name}@{task.version or ''}")
            if task.is_executing:
                cut_off[task.task_seq] = task.attempt
            process = leftovers.evidence_of_process(task, leftovers.fate_of(task, fates))
            with queries.readable(f"the row of task #{task.task_seq}"):
                start = self._recover_task(tx, task, owner, slots > 0 or task.is_monitor, process)
            if start is not None:
                starts.append((task, start))
                slots -= not task.is_monitor
        transitions.start_all(tx, starts)
        begun = step_queries.steps_in_flight(tx, cut_off) if cut_off else []
        in_flight = [step for step in begun if step.attempt == cut_off[step.task_seq]]
        return Recovered(
            changed_in(tx.events[before:]),
            dead_owners=tuple(owner.owner_id for owner in dead),
            unknown_functions=tuple(sorted(unknown)),
            unknown_versions=tuple(sorted(versions)),
            in_flight=tuple(in_flight),
        )

    def _recover_task(
        self, tx: Transaction, task: Task, owner: OwnerRow | None, slot: bool, process: ProcessEvidence | None
    ) -> Start | None:
        """Recover one row, or return the command that starts it."""
        end = OwnerEnd.DIED if owner is None or owner.end is None else OwnerEnd(owner.end)
        function = self._registry.for_task(task)
        command = lifecycle.recover(
            task,
            owner_id=self._owner_id,
            known=function is not None,
            slot=slot,
            evidence="" if task.may_rerun else evidence_of(owner, end, tx.now, process=process),
            now=tx.now,
            version=None if function is None else function.version,
        )
        if isinstance(command, Start):
            return command
        if isinstance(command, ConfirmCancel):
            transitions.end_cancelled(tx, task)
        else:
            transitions.transition(tx, task, command)
        return None

    async def _sweep(self) -> None:
        """
        Remove the side files of the dead: of owners that have ended, and of who never had a row, or has none any more.

        A file that is damaged where that is written has all the same been recovered, and may be worked on.
        """

        def left_behind(tx: Transaction) -> list[str]:
            known = {token for (token,) in tx.all(session_queries.TOKENS_IN_USE, {})}
            return owners.left_behind(self._path, known)

        try:
            # what needs no change needs no lock
            if await self._reader.look(left_behind):
                await self._writer.run(lambda tx: owners.sweep(self._path, left_behind(tx)))
        except StorageError:
            log.warning("side_files_not_swept", exc_info=True)

    # --- deadlines of what nobody has ---

    def note_freed(self) -> None:
        """Learn that a row may have become nobody's: its deadline is watched from here on."""
        self._may_have_freed = True

    async def _look_at_deadlines(self) -> None:
        """End what nobody has taken up by its deadline; the table is read only if something was freed."""
        if self._may_have_freed:
            self._deadline = await self._next_deadline()
        passed = self._deadline
        if passed is not None and passed <= utc_text(time.time()):
            await self.recover(wait=False)
            self._deadline = await self._next_deadline()
            if self._deadline == passed:
                # not ours to end: once is enough
                self._deadline = None

    async def _next_deadline(self) -> str | None:
        self._may_have_freed = False
        rows = await self._reader.rows(queries.NEXT_FREE_DEADLINE, {"runtime": self._runtime})
        deadline: str | None = rows[0][0]
        return deadline

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
            await self.recover(wait=False)

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
        if self._ending is not None:
            # what it ends is killed at once; whose it is, the next owner tells
            self._ending.cancel()
            await asyncio.wait({self._ending})

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(_LOOK if self._peers else max(_LOOK, _ALONE))
            try:
                self._lock.keep()
                await self._look_at_deadlines()
                is_due = self._try_again_at is not None and time.monotonic() >= self._try_again_at
                if is_due or any(owners.life_of(self._path, peer) is Life.DEAD for peer in self._peers):
                    await self.recover(wait=False)
            except (StoreError, OSError):
                log.warning("recovery_failed", exc_info=True)
                await asyncio.sleep(1.0)
