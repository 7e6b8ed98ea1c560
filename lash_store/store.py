"""Owns the facade: what a program opens, in which order, and in which order it closes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import warnings
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from . import (
    __version__,
    checking,
    copies,
    database,
    guards,
    handover,
    hidden,
    launching,
    leftovers,
    migrate,
    monitor_queries,
    monitors,
    queries,
    restoring,
    retention,
    session_queries,
    transitions,
)
from .callbacks import Callbacks
from .context import TaskContext
from .copies import BackupReport
from .core import Core
from .database import Durability
from .errors import SessionError, StorageError, StoreClosed, StoreError, UnknownSession, shortened, shown
from .feed import Feed, Subscription
from .findings import CheckReport
from .handles import TaskHandle, owner_handle
from .lifecycle import MONITOR, Task
from .models import (
    EventType,
    OwnerEnd,
    ProcessFate,
    Recovery,
    RecoveryReport,
    SchemaChange,
    Scope,
    SessionRecord,
    StepRecord,
    TaskFilter,
    TaskRecord,
    TaskState,
    check_id,
    check_progress,
    check_text,
    check_timeout,
    check_word,
)
from .monitor_models import MonitorUpdate
from .owners import OwnerLock, describe_process
from .policies import Backoff, Errors, Limits
from .reader import Reader
from .recovery import Recoverer, evidence_of, give_up_owner, report_of
from .registry import Registry
from .restoring import RestoreReport
from .retention import Pruner
from .retention_models import PruneReport, Retention
from .runner import Runner
from .sessions import SessionTasks, as_scope
from .statements import names
from .stirs import Stirs
from .supervising import Supervisor, supervise
from .transaction import Committed, Transaction
from .writer import Writer

__all__ = ["TaskStore"]

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

_Access = Literal["own", "request", "read"]


class TaskStore:
    """
    A durable task manager on one SQLite file: ``async with TaskStore("agent.db", runtime="desktop") as store:``.

    Opening migrates the file to this package's revision, takes a lock that says this owner lives, recovers what dead owners of
    the same *runtime* left, and starts its bodies. Nothing is opened before. Several stores, on one file or on many, may live in
    one process.

    *runtime* names the host application and must stay the same from run to run. *durability* ``"full"`` keeps what was
    acknowledged through a power loss; ``"normal"`` is quicker with few callers, keeps it through the death of the process, and
    may lose the last acknowledged commits when the machine loses power. *max_running* bodies run at once. *cancel_grace* is how
    many seconds a cooperative body has before it is cancelled; *lock_timeout* how long a commit waits for other processes;
    *callback_timeout* how long the cancel callback of external work may take. *limits* bound what is put into the file,
    *retention* what stays in it: finished tasks are pruned in the background; without it, when `prune` is called. A file
    that is a copy is run only with *adopt*, which makes it a store of its own.

    *upgrade* says what is done with a file of an older revision: ``"auto"`` upgrades it, ``"refuse"`` leaves it to those who
    run ``lash-store upgrade`` by hand. `upgraded` tells what was done. Unless *upgrade_backup* is False, the file from before
    is kept beside it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        runtime: str,
        durability: Durability = "full",
        max_running: int = 64,
        cancel_grace: float = 5.0,
        lock_timeout: float = 30.0,
        callback_timeout: float = 10.0,
        limits: Limits | None = None,
        retention: Retention | None = None,
        adopt: bool = False,
        upgrade: migrate.Willingness = "auto",
        upgrade_backup: bool = True,
    ) -> None:
        if retention is not None and not isinstance(retention, Retention):
            raise ValueError(f"retention must be Retention(…), not {shown(retention)}")
        if limits is not None and not isinstance(limits, Limits):
            raise ValueError(f"limits must be Limits(…), not {shown(limits)}")
        if durability not in {"full", "normal"}:
            raise ValueError(f"durability must be 'full' or 'normal', not {shown(durability)}")
        if upgrade not in {"auto", "refuse"}:
            raise ValueError(f"upgrade must be 'auto' or 'refuse', not {shown(upgrade)}")
        if not isinstance(max_running, int) or max_running < 1:
            raise ValueError(f"max_running must be a number of bodies, at least 1, not {shown(max_running)}")
        waits = {"cancel_grace": cancel_grace, "lock_timeout": lock_timeout, "callback_timeout": callback_timeout}
        for name, wait in waits.items():
            if not isinstance(wait, int | float) or not wait >= 0:
                raise ValueError(f"{name} must be a number of seconds, at least 0, not {shown(wait)}")
        self._path = guards.resolve(path)
        self._runtime: str | None = Scope(runtime, "-").runtime
        self._access: _Access = "own"
        self._durability: Durability = durability
        self._max_running = max_running
        self._cancel_grace = cancel_grace
        self._lock_timeout = lock_timeout
        self._callback_timeout = callback_timeout
        self._limits = limits or Limits()
        self._retention = retention
        self._adopts = bool(adopt)
        self._upgrade: migrate.Willingness = upgrade
        self._upgrade_backup = upgrade_backup
        self._upgraded: SchemaChange | None = None
        self._registry = Registry()
        self._registry.add(supervise, recovery=Recovery.RERUN, name=MONITOR)
        self._core: Core | None = None
        self._recoverer: Recoverer | None = None
        self._lives = AsyncExitStack()
        self._is_opening = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = 0
        self._closing: asyncio.Task[None] | None = None
        self._close_timeout: float | None = 10.0

    @classmethod
    def open_readonly(cls, path: str | os.PathLike[str], *, runtime: str | None = None) -> Self:
        """
        Return a store that only reads, beside live owners or on a copy; whatever would write raises `StoreReadOnly`.

        *runtime* is needed only to `session` by an id that several runtimes have.
        """
        store = cls(path, runtime=runtime or "reader")
        store._runtime = runtime
        store._access = "read"
        return store

    @classmethod
    def connect(
        cls, path: str | os.PathLike[str], *, runtime: str, lock_timeout: float = 30.0, limits: Limits | None = None
    ) -> Self:
        """
        Return a store that makes requests of live owners (cancel, signal, complete).

        It neither owns, recovers nor runs anything. It never upgrades a file.
        """
        store = cls(path, runtime=runtime, lock_timeout=lock_timeout, limits=limits)
        store._access = "request"
        return store

    def __repr__(self) -> str:
        return f"<TaskStore {self._path} {self._access} {'open' if self._core else 'closed'}>"

    # --- functions ---

    def task(
        self,
        *,
        recovery: Recovery | Literal["rerun", "owner_bound"],
        name: str | None = None,
        max_attempts: int = 100,
        retry_on: Errors = (),
        no_retry_on: Errors = (),
        backoff: Backoff | None = None,
        timeout: float | None = None,
        version: str | None = None,
        accepts: Iterable[str | None] = (),
    ) -> Callable[[F], F]:
        """
        Register an ``async def`` whose first parameter is its `TaskContext`; returns it unchanged.

        *recovery* says what becomes of a task of it whose owner dies: ``rerun`` or ``owner_bound``. Rows keep the *name* (the
        function's own, if none is given), so it must stay.

        *max_attempts* bounds the executions that end by a crash, or by a failure that is retried: one that *retry_on* names and
        *no_retry_on* does not. Until the next attempt the task is ``pending``, ``not_before`` the time that *backoff* gives,
        across restarts too; without *retry_on* a failure is final. An attempt may take *timeout* seconds, unless the spawn says
        otherwise.

        *version* is that of the code: a task some other version began is not run by this one, unless *accepts* names that (None:
        code without a version). It is left, and recovery reports it.

        Raises:
            DuplicateFunction: another function has the name.
            FunctionError: it cannot be a task.
        """

        def register(fn: F) -> F:
            self._registry.add(
                fn,
                recovery=check_word("recovery", Recovery, recovery),
                name=name,
                max_attempts=max_attempts,
                retry_on=retry_on,
                no_retry_on=no_retry_on,
                backoff=backoff,
                timeout=timeout,
                version=version,
                accepts=accepts,
            )
            return fn

        return register

    # --- life ---

    async def __aenter__(self) -> Self:
        self._forget_dead_loop()
        if self._core is None or self._closing is not None or self._is_opening:
            await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    def __del__(self) -> None:
        if getattr(self, "_core", None) is not None and self._pid == os.getpid():
            warnings.warn(f"{self!r} was not closed: use 'async with'", ResourceWarning, stacklevel=1, source=self)

    async def open(self) -> None:
        """
        Open the file, recover, and start bodies; ``async with`` does it.

        Raises:
            NotAStore, SchemaTooNew, SchemaTooOld, StorageCorrupt: the file is refused, and as it was.
            StorageError: the folder or the file may not be used.
        """
        self._forget_dead_loop()
        launching.sweep()
        if self._closing is not None:
            await asyncio.wait({self._closing})
        if self._core is not None or self._is_opening:
            raise StoreError(f"{self!r} is open already: open it once, and share it")
        self._is_opening = True
        self._loop, self._pid = asyncio.get_running_loop(), os.getpid()
        try:
            await _whole(asyncio.create_task(self._open_all(), name="lash_store open"))
        except asyncio.CancelledError:
            await self.close()
            raise
        finally:
            self._is_opening = False

    async def close(self, timeout: float | None = 10.0) -> None:
        """
        Stop bodies, give their work back, and close the file; a second call waits for the first.

        Bodies see the stop reason ``detach`` and are cancelled. Work that may be run again is released, for the next owner; what
        is bound to this one is abandoned; a cancel in progress is finished. A body that has not ended after *timeout* seconds is
        fenced out and named in a `ResourceWarning`; None waits for as long as it takes. A cancel of such a body is in progress
        until it has ended, or its process has: whoever looks next finishes it then.
        """
        self._forget_dead_loop()
        if self._closing is None:
            if self._core is None:
                return
            self._close_timeout = check_timeout(timeout)
            self._closing = asyncio.create_task(self._close(), name="lash_store close")
        await _whole(self._closing)

    def _forget_dead_loop(self) -> None:
        # nothing of an earlier life can run or be closed any more; its rows are recovered like any dead owner's. Nor has a
        # forked child anything to close: it is all its parent's
        if self._loop is not None and (self._loop.is_closed() or self._pid != os.getpid()):
            self._core = self._recoverer = self._closing = self._loop = None
            self._is_opening = False
            self._lives = AsyncExitStack()

    async def _open_all(self) -> None:
        try:
            async with AsyncExitStack() as lives:
                self._core = await (self._open_to_own(lives) if self._access == "own" else self._open_beside(lives))
                self._lives = lives.pop_all()
        except BaseException:
            self._core = self._recoverer = None
            raise

    async def _close(self) -> None:
        core = self._open
        try:
            core.is_closing = True
            if core.runner is not None:
                # at once: a body that is refused something because of this must know why
                core.runner.close()
            hidden.acknowledge_all(core)
            if core.runner is None:
                await core.end_endings(self._close_timeout)
            if core.writer is not None and self._close_timeout is not None:
                core.writer.limit_patience(max(1.0, self._close_timeout))
            await self._lives.aclose()
        finally:
            for claim in core.claims:
                # who still reads notes cannot acknowledge them any more: they are for the next reader
                claim.release()
            self._core = self._recoverer = self._closing = None

    async def _open_to_own(self, lives: AsyncExitStack) -> Core:
        """File, lock, owner row, one recovery; what each pushes undoes it, so closing goes the same way back."""
        self._upgraded = await asyncio.to_thread(self._prepare)
        lock = OwnerLock(self._path)
        lives.callback(lock.release)
        core, writer = await self._open_core(lives)
        assert writer is not None
        lock.acquire()
        lives.push_async_callback(_remove_lock, writer, lock)
        owner_id = await writer.run(lambda tx: _insert_owner(tx, self._path, lock, self._runtime, adopts=self._adopts))
        runner = Runner(
            writer,
            self._registry,
            owner_id=owner_id,
            max_running=self._max_running,
            cancel_grace=self._cancel_grace,
            limits=self._limits,
            readings=core.readings,
            make_context=lambda body: Supervisor(body, core) if body.task.is_monitor else TaskContext(body, core),
            on_refused=core.tell_of_damage,
        )
        callbacks = Callbacks(writer, owner_id=owner_id, timeout=self._callback_timeout)
        core.owner_id, core.runner, core.callbacks = owner_id, runner, callbacks
        writer.guard(lambda tx: _given_up(tx, owner_id, self._path))
        recoverer = Recoverer(
            self._path,
            runtime=self._runtime or "",
            owner_id=owner_id,
            lock=lock,
            reader=core.reader,
            writer=writer,
            registry=self._registry,
            slots=runner.slots.reserved,
            grace=self._cancel_grace,
        )
        lives.push_async_callback(core.feed.close)
        lives.push_async_callback(self._give_back, core, writer, runner, callbacks, lock)
        # a body that recovery starts may use the store at once
        self._core, self._recoverer = core, recoverer
        lives.push_async_callback(recoverer.close)
        await recoverer.recover(wait=False)
        recoverer.watch()
        core.feed.watch()
        if self._retention is not None:
            lives.push_async_callback(Pruner(writer, core.reader, self._retention).close)
        # what monitors of dead owners left is ended by now, or soon; everything else goes on meanwhile
        await recoverer.settled()
        return core

    async def _open_beside(self, lives: AsyncExitStack) -> Core:
        """The same file without an owner: no migration, no lock, no recovery."""
        await asyncio.to_thread(self._check_existing)
        core, _ = await self._open_core(lives)
        core.feed.watch()
        lives.push_async_callback(core.feed.close)
        return core

    def _prepare(self) -> SchemaChange | None:
        if not self._adopts and guards.check_target(self._path, writing=True) and database.has_content(self._path):
            copies.refuse_copy(self._path)
        return migrate.prepare(self._path, self._upgrade, backup=self._upgrade_backup)

    async def _open_core(self, lives: AsyncExitStack) -> tuple[Core, Writer | None]:
        writer = None
        if self._access != "read":
            writer = Writer(
                self._path,
                durability=self._durability,
                patience=self._lock_timeout,
                limits=self._limits,
                on_commit=lambda events: self._committed(core, events),
                on_fatal=lambda error: self._failed(core, error),
            )
            await writer.open()
            lives.push_async_callback(writer.close)
        reader = Reader(self._path)
        await reader.open()
        lives.push_async_callback(reader.close)

        def at_once(sql: str) -> Any:
            answer = None if writer is None else writer.at_once(sql)
            return reader.at_once(sql) if answer is None else answer

        feed = Feed(
            reader,
            changed=reader.has_changed if writer is None else writer.foreign_commits,
            # every commit goes there first
            stirs=Stirs(Path(f"{self._path}-wal")),
            on_end=lambda task_seq: None if core.runner is None else core.runner.note_ended(task_seq),
            on_foreign=lambda events: self._others_committed(core, events),
            sleep=lambda wake: wake.wait() if core.runner is None else core.runner.sleep_without_slot(wake),
            at_once=at_once,
        )
        core = Core(self._path, self._runtime, self._registry, reader, feed, self._limits, writer, self._cancel_grace)
        await feed.open()
        return core, writer

    def _check_existing(self) -> None:
        """Refuse what cannot be used beside its owners: a file that is not there, or of another revision."""
        if not guards.check_target(self._path, writing=self._access != "read"):
            raise StorageError(f"{self._path} does not exist: check the path")
        _check_head(database.probe(self._path), self._path)

    async def _give_back(
        self, core: Core, writer: Writer, runner: Runner, callbacks: Callbacks, lock: OwnerLock
    ) -> None:
        """Stop the bodies and give back their rows, in the transaction that ends this owner."""
        alive, _, _ = await asyncio.gather(
            runner.detach(self._close_timeout),
            callbacks.detach(self._close_timeout),
            core.end_endings(self._close_timeout),
        )
        left, owner_id = {task.task_seq for task in alive}, core.owner_id
        assert owner_id is not None
        if alive:
            lock.outlived(runner.runs)
            runner.at_last_end(lock.ended)
        try:
            await writer.run(lambda tx: _end_owner(tx, owner_id, left))
        except (StorageError, StoreClosed):
            # out of reach, or locked for too long: the lock of this owner falls, and the next one recovers
            writer.limit_patience(0.0)
        if alive:
            names = ", ".join(f"{task.scope}/{task.id}" for task in alive)
            warnings.warn(
                f"{len(alive)} bodies did not end within {self._close_timeout} s and were fenced out: {names}",
                ResourceWarning,
                stacklevel=2,
            )

    # --- what commits bring about ---

    def _committed(self, core: Core, events: Sequence[Committed]) -> None:
        if core.runner is not None:
            core.runner.react(events)
        if core.callbacks is not None:
            core.callbacks.react(events)
        if self._recoverer is not None and any(event.type == EventType.RELEASED for event in events):
            self._recoverer.note_freed()
        core.feed.publish(events)

    def _failed(self, core: Core, error: StorageError) -> None:
        if core.runner is not None:
            core.runner.stop()
        if core.callbacks is not None:
            core.callbacks.stop()
        core.feed.stop(error)

    async def _others_committed(self, core: Core, events: Sequence[Committed]) -> None:
        """Compare what another process changed with what runs here, and take what it left."""
        if core.runner is None or core.callbacks is None or self._recoverer is None:
            return
        for event in events:
            if event.type == EventType.TRANSFERRED and event.task_seq is not None:
                core.runner.note_moved(event.task_seq, event.scope, event.seq)
        seqs = {event.task_seq for event in events if event.task_seq is not None}
        changed = {seq for seq in seqs if core.runner.holds(seq) or core.callbacks.holds(seq)}
        if changed:
            rows = await core.reader.rows(queries.TASKS_BY_SEQ, {"task_seqs": names(changed)})
            tasks = [Task._make(row) for row in rows]
            core.runner.compare(tasks)
            core.callbacks.compare(tasks)
        await self._recoverer.take_what_was_left()
        if any(event.type == EventType.RELEASED and event.scope.startswith(f"{self._runtime}:") for event in events):
            await self._recoverer.recover(wait=False)

    # --- sessions ---

    @property
    def _open(self) -> Core:
        if self._core is None:
            raise StoreClosed(f"the store on {self._path} is not open: use 'async with store:'")
        return self._core

    async def session(
        self, id: str, *, parent: SessionTasks | Scope | str | None = None, reopen: bool = False
    ) -> SessionTasks:
        """
        Open a session of this runtime, or resume it.

        *parent* is the session it belongs to: where its work goes that is to be transferred when it closes. A closed session is
        a view, in which nothing is created, unless *reopen* opens it again. A store that does not own creates none.

        Monitors that are armed (`ArmOn`) are started the first time that this store opens or resumes the session, and when it is
        opened again, unless they run.

        Raises:
            UnknownSession: the parent, or, for a reading or requesting store, the session is not in the file.
            SessionError: the session has another parent, or a store that was given no runtime finds the id in several.
            InvalidId: the id cannot be stored.
        """
        core = self._open
        scope = await self._scope_of(core, id) if self._runtime is None else Scope(self._runtime, id)
        above = (
            Scope(scope.runtime, parent) if isinstance(parent, str) else None if parent is None else as_scope(parent)
        )
        if above is not None and above.runtime != scope.runtime:
            raise SessionError(f"session {str(above)!r} is of another runtime: a parent is of {scope.runtime!r}")
        if self._access == "own":
            begins = await core.to_request().run(lambda tx: handover.open_session(tx, scope, above, reopen=reopen))
            if begins:
                core.begun.discard(scope)
            if scope not in core.begun:
                await monitors.start_armed(core, scope)
                # last: who is cancelled before leaves it to whoever asks next
                core.begun.add(scope)
        elif parent is not None or reopen:
            core.to_create()
        else:
            await core.check_session(scope)
        return SessionTasks(core, scope)

    @staticmethod
    async def _scope_of(core: Core, id: str) -> Scope:
        """Return the one session of an id, whatever its runtime."""
        check_id("session id", id)
        found = [row[0] for row in await core.reader.rows(session_queries.SCOPES_OF_ID, {"session_id": id})]
        if len(found) > 1:
            raise SessionError(
                f"session {id!r} is in several runtimes, {shortened(', '.join(found))}: give open_readonly() a runtime="
            )
        if not found:
            raise UnknownSession(f"session {id!r} is not in this file: sessions() lists those that are")
        return Scope.parse(found[0])

    async def sessions(self) -> Sequence[SessionRecord]:
        """Return every session of the file, oldest first."""
        return [
            session_queries.session_record(row) for row in await self._open.reader.rows(session_queries.SESSIONS, {})
        ]

    # --- the whole file ---

    async def get(self, scope: Scope | str | SessionTasks, id: str) -> TaskRecord:
        """
        Return the row of the live task of an id in any session, else of the newest.

        Raises:
            TaskNotFound, UnknownSession: not in this file.
        """
        return queries.task_record(await self._open.task_by_id(as_scope(scope), id))

    async def handle(self, scope: Scope | str | SessionTasks, id: str) -> TaskHandle:
        """
        Return a handle on the live task of an id in any session, else on the newest.

        Raises:
            TaskNotFound, UnknownSession: not in this file.
        """
        core = self._open
        return await owner_handle(core, await core.task_by_id(as_scope(scope), id))

    async def list(self, filter: TaskFilter | None = None) -> Sequence[TaskRecord]:
        """
        Return the tasks a filter wants, by ``task_seq``; the whole file, finished and hidden ones too, without one.

        Raises:
            UnknownSession: the session the filter names is not in this file.
        """
        return await self._open.list(_wanted(filter))

    async def count(self, filter: TaskFilter | None = None) -> int:
        """Return how many tasks a filter wants; its ``limit`` does not count. See `list`."""
        return await self._open.count(_wanted(filter))

    async def steps(self, task_seq: int) -> Sequence[StepRecord]:
        """
        Return what one incarnation remembers, in the order it was first noted; see `TaskHandle.steps`.

        Raises:
            TaskNotFound, TaskPruned: the file has no such incarnation, or not any more.
        """
        return await self._open.steps(task_seq)

    async def updates(self, task_seq: int) -> Sequence[MonitorUpdate]:
        """
        Return the lines that are kept of what one incarnation of a monitor wrote, oldest first; read ones, too.

        Raises:
            TaskNotFound, TaskPruned: the file has no such incarnation, or not any more.
        """

        def updates(tx: Transaction) -> list[Any]:
            transitions.by_seq(tx, task_seq)
            return tx.all(monitor_queries.UPDATES_OF_TASK, {"task_seq": task_seq})

        return [monitor_queries.update_record(row) for row in await self._open.look(updates)]

    def events(
        self,
        after: int | None = None,
        *,
        scope: Scope | str | SessionTasks | None = None,
        types: Iterable[EventType] | None = None,
    ) -> Subscription:
        """
        Return every event committed after a cursor by any process, in ``seq`` order, then those to come, as they come.

        ``after=0`` is from the beginning, None from now; go on later after the ``seq`` of the last one seen. No loss, no
        duplicate, bounded memory. The iteration ends when the store closes.
        """
        return self._open.feed.subscribe(after, scope=None if scope is None else as_scope(scope), types=types)

    @property
    def upgraded(self) -> SchemaChange | None:
        """What the latest opening did to an older file; None if it was new, or of this revision already."""
        return self._upgraded

    @property
    def recovered(self) -> RecoveryReport:
        """What the latest recovery that found something did: the one at open, a later one by itself, or one asked for."""
        self._open.to_create()
        assert self._recoverer is not None
        return self._recoverer.latest.report()

    async def recover(self) -> RecoveryReport:
        """
        Take over what dead owners of this runtime left, as opening does; also after registering functions late.

        One transaction, and another for what a monitor's process has to be ended for first, which is waited for. If there is
        nothing to take, nothing is written.

        Raises:
            StoreReadOnly: this store does not own.
        """
        self._open.to_create()
        assert self._recoverer is not None
        return (await self._recoverer.recover()).report()

    async def check(self, *, repair: bool = False, progress: Callable[[int, int], object] | None = None) -> CheckReport:
        """
        Look at the whole file: its integrity, every row against its events, owners, processes; on one state, beside writers.

        Each finding names its next step. With *repair*, what is safe to mend is mended, unless something is damaged: permissions,
        WAL mode, indexes, triggers and views, room that holds nothing, a long ``-wal``, lock files of the dead. *progress* is
        called with the tasks looked at and how many there are, on another thread.

        Raises:
            StoreReadOnly: this store only reads, and was asked to mend.
        """
        core = self._open
        check_progress(progress)
        if repair:
            core.to_request()
        return await asyncio.to_thread(checking.check, core.path, repair=repair, progress=progress)

    async def backup(
        self, path: str | os.PathLike[str], *, progress: Callable[[int, int], object] | None = None
    ) -> BackupReport:
        """
        Copy the file as it is at one moment, while everybody goes on, and verify the copy; it has its name once it is whole.

        *progress* is called with the pages copied and how many there are, on another thread. The copy is stamped: it is read
        like any file, put back with `restore`, and run as a store of its own only by ``TaskStore(…, adopt=True)``.

        Raises:
            StorageError: *path* exists, or cannot be written.
        """
        core = self._open
        check_progress(progress)
        return await asyncio.to_thread(copies.back_up, core.path, guards.resolve(path), progress)

    @staticmethod
    async def restore(
        backup: str | os.PathLike[str],
        path: str | os.PathLike[str],
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> RestoreReport:
        """
        Put a backup in a file's place, once it is verified; what was there is kept beside it.

        The file goes on where the backup was made: what was live then is recovered at the next opening.

        Raises:
            NotAStore, SchemaTooNew, StorageCorrupt: the backup cannot be used; nothing was changed.
            SchemaError: the file is open elsewhere; nothing was changed.
        """
        check_progress(progress)
        return await asyncio.to_thread(restoring.restore, Path(backup), Path(path), progress)

    async def prune(
        self,
        *,
        older_than: timedelta | float | None = None,
        keep_last: int | None = None,
        states: Iterable[TaskState | str] | None = None,
        sessions: Iterable[Scope | str | SessionTasks] | None = None,
        before_cursor: int | None = None,
        unread: bool = False,
        dry_run: bool = False,
        progress: Callable[[PruneReport], object] | None = None,
    ) -> PruneReport:
        """
        Take finished tasks out of the file, with their events, and give the room back; see `Retention` for what may go.

        In transactions of bounded size with pauses between, so that writers beside it go on; *progress* is called after each.
        What is left of a task is a tombstone: whoever asks for it is told `TaskPruned`, an idempotency key stays used, and a
        subscriber whose cursor is older is told of the gap. Notes nobody has read stay. Cancelled, or killed, what was done is
        done. A *dry_run* says what would go, and writes nothing: a store that only reads can be asked, too.

        Raises:
            ValueError: an argument without sense.
            UnknownSession: one of the sessions is not in this file.
            StoreReadOnly: this store only reads.
        """
        core = self._open
        check_progress(progress)
        writer = None if dry_run and core.writer is None else core.to_request()
        wanted = Retention.of(
            older_than=older_than,
            keep_last=keep_last,
            states=states,
            sessions=_named(sessions),
            before_cursor=before_cursor,
            unread=unread,
        )
        for scope in wanted.sessions or ():
            await core.check_session(scope)
        return await retention.prune(writer, core.reader, wanted, progress, dry_run=dry_run)

    async def abandon_owner(self, owner_id: int, reason: str) -> RecoveryReport:
        """
        Give up, by a person's decision, an owner that lives but is stuck: its work is ended or freed, and its writes refused.

        What may be run again is ``pending`` and free, external work waits to be registered again, the rest is ``abandoned``
        with the reason. The owner itself, should it ever go on, creates nothing more (`StoreClosed`). One that has ended is left
        as it is.

        Raises:
            StoreError: the file has no such owner, or it is this store itself.
            StoreReadOnly: this store only reads.
        """
        core = self._open
        writer, by = core.to_request(), core.requester
        check_text("reason", reason)
        if not isinstance(owner_id, int) or not 0 < owner_id < 2**63:
            raise StoreError(f"an owner's id is a number, not {shown(owner_id)}: its row in 'owners' has it")
        if owner_id == core.owner_id:
            raise StoreError(f"owner {owner_id} is this store itself: close it")
        changed = await writer.run(lambda tx: give_up_owner(tx, owner_id, reason, by))
        await core.end_given_up(event.task for event in changed if event.task is not None)
        return report_of(changed)


async def _whole(task: asyncio.Task[None]) -> None:
    """Wait for a task to its end, whatever happens to the caller meanwhile: half open or half closed would be neither."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        _ = task.cancelled() or task.exception()
        raise cancelled
    await task


def _wanted(filter: TaskFilter | None) -> TaskFilter:
    if filter is None:
        return TaskFilter()
    if not isinstance(filter, TaskFilter):
        raise TypeError(f"give a TaskFilter(…), not {shown(filter)}")
    return filter


def _named(sessions: object) -> object:
    """Put scopes in the place of sessions, if there are several."""
    if isinstance(sessions, str) or not isinstance(sessions, Iterable):
        return sessions
    return [one.scope if isinstance(one, SessionTasks) else one for one in sessions]


def _check_head(revision: str | None, path: Path) -> None:
    database.check_revision(revision, path)
    database.refuse_older(revision, path)


# --- the owner's own row --------------------------------------------------------------------------------------------


def _insert_owner(tx: Transaction, path: Path, lock: OwnerLock, runtime: str | None, *, adopts: bool) -> int:
    # the revision once more, in this transaction: another process may have upgraded the file since it was looked at
    _check_head(database.read_revision(tx.connection, path), path)
    if adopts:
        copies.adopt(tx)
    copies.check_not_copied(tx.connection, path)
    return queries.insert_owner(
        tx, {"token": lock.token, "runtime": runtime, "version": __version__, **describe_process()}
    )


def _given_up(tx: Transaction, owner_id: int, path: Path) -> StoreError | None:
    """Say why this owner may not write any more, if somebody gave it up while it was stuck."""
    owner = queries.owner_by_id(tx, owner_id)
    if owner is not None and owner.ended_at is None:
        return None
    return StoreClosed(f"owner {owner_id} of {path} was given up by a person: open the store again")


def _end_owner(tx: Transaction, owner_id: int, alive: Collection[int]) -> None:
    owner = queries.owner_by_id(tx, owner_id)

    def evidence(task: Task) -> str:
        fate = ProcessFate.LEFT if task.task_seq in alive else ProcessFate.ENDED
        return evidence_of(owner, OwnerEnd.CLOSED, tx.now, process=leftovers.evidence_of_process(task, fate))

    transitions.end_owner(tx, owner_id, evidence, alive)


async def _remove_lock(writer: Writer, lock: OwnerLock) -> None:
    def unit(tx: Transaction) -> None:
        if not queries.owner_is_open(tx, lock.token):
            lock.remove()

    with contextlib.suppress(StorageError, StoreClosed):
        await writer.run(unit)
