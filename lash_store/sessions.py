"""Owns the background-task capability of one session: every verb a session has; builds units, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from . import (
    books,
    cancelling,
    handover,
    hidden,
    monitors,
    queries,
    retention_queries,
    session_queries,
    spawning,
    transitions,
)
from .births import NewTask
from .callbacks import Callback
from .commands import Flip, Progress, Settle
from .core import Core
from .errors import InvalidArguments, InvalidId, shown
from .feed import Subscription
from .handles import Reference, TaskHandle, new_handle_id, new_id, reference, references, refuse_observer
from .inbox import Inbox, Updates, look_at_notes, look_at_updates
from .lifecycle import Task
from .models import (
    CancelPolicy,
    CancelReport,
    ClosePolicy,
    CloseReport,
    EventType,
    Failure,
    HandleRole,
    Handoff,
    Note,
    Recovery,
    Scope,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskRecord,
    TaskState,
    Transition,
    check_fraction,
    check_id,
    check_text,
    check_timeout,
    check_word,
)
from .monitor_models import MonitorRecord, MonitorSpec, MonitorUpdate
from .recovery import evidence_of_given_up
from .transaction import Transaction
from .transitions import Outcome

__all__ = ["SessionTasks", "as_scope"]

T = TypeVar("T")


class SessionTasks:
    """
    The background-task capability of one session: every method works on the tasks of its scope alone.

    Where a method takes a task, it takes a handle, a handle's id or JSON, or the task's id in this session.
    """

    def __init__(self, core: Core, scope: Scope) -> None:
        self._core = core
        self._scope = scope

    def __repr__(self) -> str:
        return f"<SessionTasks {self._scope}>"

    @property
    def scope(self) -> Scope:
        """The key every row of the session carries."""
        return self._scope

    # --- work of this store ---

    async def spawn(
        self,
        fn: Callable[..., Any] | Coroutine[Any, Any, Any],
        *args: Any,
        id: str | None = None,
        kind: TaskKind = TaskKind.OTHER,
        parent: Reference | None = None,
        child_session_id: str | None = None,
        cancel_policy: CancelPolicy | None = None,
        close_policy: ClosePolicy = ClosePolicy.KEEP,
        timeout: float | None = None,
        deadline: datetime | float | None = None,
        idempotency_key: str | None = None,
        notify_on_end: bool = False,
        **kwargs: Any,
    ) -> TaskHandle:
        """
        Start a task: a registered function with its arguments, or a coroutine object.

        The task, its first event and its handle are durable when this returns; the body starts when a slot is free. Without an
        *id* one is made. A finished task of the id is succeeded by a new incarnation. A coroutine object cannot be run again: if
        its owner goes away the task is abandoned; one that is refused is closed. Registered functions are cancelled
        cooperatively by default, coroutine objects at once.

        A cancel of the *parent* covers this task; a cancel of this one covers all in the session *child_session_id*. Under an
        ancestor whose cancel was requested it is stored and born ``cancelled``. *close_policy* says what becomes of it when the
        session closes. With an *idempotency_key* under which a task that is in this session was created, with the same function
        and arguments, that one comes back. *notify_on_end* posts a note to the session's inbox in the transaction that ends it.

        An attempt may take *timeout* seconds (its function's, if none is given), and the task must have ended by its *deadline*,
        a time with its zone or seconds from now: then its body is stopped, and it is ``failed``, type ``Timeout``. An attempt
        that took too long is retried if its function's ``retry_on`` names `TimeoutError`.

        Raises:
            TaskExists: a live task has the id.
            UnknownFunction, InvalidArguments: not registered here, or the arguments do not fit.
            IdempotencyConflict: the key was used for other work.
            InvalidId, TaskNotFound, UnknownSession: an id that cannot be stored, or a parent or session that is not there.
            SessionClosed: the session is closed, and the parent is no live task of it.
            LimitExceeded: the arguments are too large, or the session holds as much as the store's limits allow.
        """
        try:
            named = _parent_named(parent)
        except BaseException:
            spawning.close_refused(fn)
            raise
        return await spawning.spawn(
            self._core,
            self._scope,
            fn,
            args,
            kwargs,
            {
                "id": id,
                "kind": kind,
                "child_session_id": child_session_id,
                "close_policy": close_policy,
                "idempotency_key": idempotency_key,
                "notify_on_end": bool(notify_on_end),
            },
            cancel_policy=cancel_policy,
            timeout=timeout,
            deadline=deadline,
            prepare=lambda tx, new: self._with_parent(tx, new, named),
        )

    async def spawn_hidden(
        self, label: str, fn_or_coroutine: Callable[..., Any] | Coroutine[Any, Any, Any], *args: Any, **kwargs: Any
    ) -> TaskHandle:
        """
        Start work that the session awaits before it persists itself, and that no list shows unless asked; see `spawn`.

        In the same transaction the session is flagged: it must take its state up again. Spawned inside a body, it is that
        body's child.
        """
        body = None if self._core.runner is None else self._core.runner.body_here()
        parent = None if body is None else body.task_seq
        try:
            check_id("label", label)
        except BaseException:
            spawning.close_refused(fn_or_coroutine)
            raise
        return await spawning.spawn(
            self._core,
            self._scope,
            fn_or_coroutine,
            args,
            kwargs,
            {"label": label, "mode": TaskMode.HIDDEN},
            prepare=lambda tx, new: self._with_parent(tx, new, parent),
        )

    async def await_hidden(self) -> None:
        """
        Wait until no hidden task of the session is live, those included that are spawned meanwhile.

        Called from a body, that body and its ancestors are left out, and so are other bodies of this store that wait here, and
        theirs. Who waits at the same time is told the same failures; they are acknowledged after the last was, and never told
        again. Work that no program runs, because none has its function registered, keeps it waiting.

        Raises:
            ExceptionGroup: every hidden task that failed or was abandoned and that nobody was told of yet.
        """
        await hidden.settle(self._core, self._scope, clear=False)

    async def await_background_work(self) -> bool:
        """
        Wait for hidden work as `await_hidden` does; return whether the session must take its state up again.

        The flag is cleared in the transaction that sees no live hidden task; failures leave it.

        Raises:
            ExceptionGroup: see `await_hidden`.
        """
        return await hidden.settle(self._core, self._scope, clear=True)

    async def sync_needed(self) -> bool:
        """Return whether hidden work was spawned since the session last took its state up."""
        row = await self._core.look_back(lambda tx: session_queries.session(tx, str(self._scope)))
        if row is None:
            raise transitions.unknown_session(self._scope)
        return bool(row.sync_needed)

    # --- work of somebody else ---

    async def register(
        self,
        id: str,
        kind: TaskKind,
        cancel: Callback | None = None,
        *,
        label: str | None = None,
        parent: Reference | None = None,
        child_session_id: str | None = None,
        close_policy: ClosePolicy = ClosePolicy.KEEP,
        idempotency_key: str | None = None,
        notify_on_end: bool = False,
    ) -> TaskHandle:
        """
        Keep the books of work that somebody else does; it is ``running`` when this returns.

        *cancel* is called when its cancel was requested: at most once, crashes included, and for no longer than the store's
        ``callback_timeout``; then the task is ``cancelled``, and its row keeps what the callback raised. An ``async def`` runs
        on the loop, a plain function in a thread of its own; it gets the task's record if it has a parameter for it. Without a
        callback the task is cancelled by the books.

        Registered again after a restart, a live task gets its new callback, also one whose cancel was requested meanwhile; label,
        key, sub-agent's session, policy and wish for a note are replaced where they are given anew, the parent stays.

        Raises:
            TaskExists: the id is live and somebody keeps it, unless it is the same idempotency key: then that task comes back.
            IdempotencyConflict, InvalidId, TaskNotFound, UnknownSession, SessionClosed: see `spawn`.
        """
        _, owner_id = self._core.to_create()
        if cancel is not None and not callable(cancel):
            spawning.close_refused(cancel)
            raise InvalidArguments(f"task {shown(id)}: cancel must be a function, not {type(cancel).__name__}")
        check_id("task id", id)
        new = spawning.new_task(
            self._scope,
            owner_id,
            {
                "id": id,
                "kind": kind,
                "mode": TaskMode.EXTERNAL,
                "label": id if label is None else label,
                "recovery": Recovery.EXTERNAL,
                "child_session_id": child_session_id,
                "close_policy": close_policy,
                "idempotency_key": idempotency_key,
                "notify_on_end": bool(notify_on_end),
            },
        )
        new = new._replace(local=cancel)
        named = _parent_named(parent)
        # its owner may have died without anybody having noticed yet
        gone = await self._gone_keeper(id)
        born = await self._run(lambda tx: books.register(tx, self._with_parent(tx, new, named), gone))
        return TaskHandle(self._core, born.task, born.handle_id)

    async def unregister(self, id: Reference) -> None:
        """
        End external work that is live as ``cancelled``, reason ``unregistered``; its callback is not called.

        Raises:
            TaskError: the store does this work itself.
        """
        name = reference(id)
        command = Settle(TaskState.CANCELLED, reason="unregistered")

        def unit(tx: Transaction) -> None:
            seen = handover.look_up(tx, self._scope, name)
            if seen is not None and not seen.task.is_terminal:
                books.change(tx, self._owned(seen), command, "unregister()")

        await self._run(unit)

    async def complete(
        self,
        id: Reference,
        state: TaskState,
        *,
        result: Any = None,
        failure: Failure | BaseException | Mapping[str, Any] | str | None = None,
    ) -> Transition:
        """
        End external work: ``completed`` with a *result*, ``failed`` with a *failure*, or ``cancelled``.

        The first end stands: a later one is ``unchanged`` if it says the same, else ``superseded``.

        Raises:
            ValueError: a state in which work does not end, or a result or failure that does not belong to it.
            TaskError: the store does this work itself.
            ResultNotSerializable: the result is not JSON.
        """
        command = spawning.ending(
            self._core.limits, reference(id), check_word("state", TaskState, state), result, failure
        )
        return await self._change(id, command, "complete()")

    async def set_live_state(self, id: Reference, state: TaskState) -> Transition:
        """
        Say that external work is ``running`` or ``waiting``; a cancel request stands whatever is said.

        Raises:
            ValueError: any other state.
            TaskError: the store does this work itself.
        """
        state = check_word("state", TaskState, state)
        if state not in {TaskState.RUNNING, TaskState.WAITING}:
            raise ValueError(
                f"task {reference(id)!r} may be 'running' or 'waiting', not {shown(state)}: complete() ends it"
            )
        return await self._change(id, Flip(state), "set_live_state()")

    async def update(self, id: Reference, *, progress: str | None = None, fraction: float | None = None) -> Transition:
        """
        Show how far a task has come: a line, a *fraction* from 0 to 1, or both; what is not given stays. Durable on return.

        A finished task stays as it is (``superseded``).

        Raises:
            ValueError: *fraction* is outside 0 to 1, or the text cannot be stored.
        """
        name = reference(id)
        if progress is not None:
            check_text(f"the progress of task {name!r}", progress)
        command = Progress(None, progress, check_fraction(f"task {name!r}", fraction))
        outcome = await self._run(lambda tx: transitions.transition(tx, self._find(tx, name), command))
        return _transition(outcome)

    # --- monitors ---

    async def start_monitor(self, spec: MonitorSpec) -> TaskHandle:
        """
        Start a process that the store supervises, as task ``monitor:<id>`` of kind ``monitor``.

        The task is durable when this returns; its process begins right after, once it is recorded. It takes no slot. Status 0
        is ``completed``, with ``{"exit_status": 0}`` as its result; any other status, a signal, or a time-out (``Timeout``)
        is ``failed``. A cancel sends SIGTERM to the whole group, SIGKILL after the store's ``cancel_grace``, and the task is
        ``cancelled`` once nothing of it lives; so it is ended when the session or the store closes. What a process leaves in its
        group when it ends is ended, too. One that leaves for a session of its own is not followed.

        Each line it writes becomes an update, see `take_updates`. What it inherits, what becomes of it in a crash, and when it is
        started by itself, its `MonitorSpec` says.

        Raises:
            TaskExists: a monitor of the id runs.
            InvalidArguments: there is no such program or folder.
            LimitExceeded: the session runs as many monitors as the store's limits allow.
            SessionClosed: the session is closed.
        """
        return await monitors.start(self._core, self._scope, spec)

    async def stop_monitor(
        self, monitor: Reference, reason: str | None = None, *, timeout: float | None = None
    ) -> TaskRecord:
        """
        Stop a monitor, named by its id or its task's handle, and return its task's row once nothing of its process lives.

        It does not start with its session any more. One that has ended comes back unchanged. See `cancel`.

        Raises:
            TaskNotFound: the session never had such a monitor, or gave it away.
            HandleNotVisible: an observer's handle.
        """
        return await monitors.stop(self._core, self._scope, monitor, reason, timeout)

    async def monitors(self) -> Sequence[MonitorRecord]:
        """Return the session's monitors, those that have ended too: of each id the live one, else the newest."""
        return await monitors.look(self._core, self._scope)

    def take_updates(self, limit: int | None = None, *, monitor: str | None = None) -> Updates:
        """
        Claim what the session's monitors wrote and nobody has read: ``async with session.take_updates() as updates:``.

        Leaving the block acknowledges them, an exception or a crash gives them again; see `Updates`. ``await
        session.take_updates()`` acknowledges them at once. Acknowledged lines are kept until newer ones take their place.

        Raises, on entering:
            InboxBusy: another live reader has them.
        """
        return Updates(self._core, self._scope, limit, monitor)

    async def updates(
        self, *, monitor: str | None = None, unread: bool = True, limit: int | None = None
    ) -> Sequence[MonitorUpdate]:
        """Return what the session's monitors wrote, oldest first, without claiming it; not only what is *unread* if so wished."""
        return await look_at_updates(self._core, self._scope, monitor_id=monitor, unread=unread, limit=limit)

    # --- seeing ---

    async def get(self, id: Reference) -> TaskRecord:
        """
        Return the row of the live task of an id, else of the newest.

        Raises:
            TaskNotFound: no such task in this session.
        """
        name = reference(id)
        return queries.task_record(await self._core.look(lambda tx: self._find(tx, name, owned=False)))

    async def handle(self, id: Reference) -> TaskHandle:
        """
        Return a handle on the live task of an id, else on the newest; it stays on that incarnation.

        Raises:
            TaskNotFound: no such task in this session.
        """
        name = reference(id)
        seen = await self._core.look(lambda tx: self._see(tx, name))
        observer = self._scope if seen.handle.role == HandleRole.OBSERVER else None
        return TaskHandle(self._core, seen.task, seen.handle.handle_id, observer=observer)

    async def list(
        self,
        *,
        kinds: Iterable[TaskKind] | None = None,
        states: Iterable[TaskState] | None = None,
        include_terminal: bool = False,
        include_hidden: bool = False,
        after_seq: int = 0,
        limit: int | None = None,
    ) -> Sequence[TaskRecord]:
        """Return the session's live tasks by ``task_seq``; naming a terminal state includes it."""
        wanted = TaskFilter(
            scope=self._scope,
            kinds=None if kinds is None else frozenset(check_word("a kind", TaskKind, kind) for kind in kinds),
            states=None if states is None else frozenset(check_word("a state", TaskState, state) for state in states),
            include_terminal=include_terminal,
            include_hidden=include_hidden,
            after_seq=after_seq,
            limit=limit,
        )
        return await self._core.list(wanted)

    def events(self, after: int | None = None, *, types: Iterable[EventType] | None = None) -> Subscription:
        """Return the session's events after a cursor, those of work that came or went included; see `TaskStore.events`."""
        return self._core.feed.subscribe(after, scope=self._scope, types=types)

    async def observe(self, scope: Scope | str | SessionTasks, id: str) -> TaskHandle:
        """
        Return a handle through which this session may look at a task of any session and await it, but not cancel it.

        Durable on return, and the same one when asked again.

        Raises:
            TaskNotFound, UnknownSession: nothing to look at.
            SessionClosed: this session is closed.
        """
        self._core.to_create()
        of, made = (
            self._sibling(scope) if isinstance(scope, str) and ":" not in scope else as_scope(scope),
            new_handle_id(),
        )
        name = reference(id)
        task, handle_id = await self._run(lambda tx: handover.observe(tx, self._scope, of, name, made))
        return TaskHandle(self._core, task, handle_id, observer=self._scope)

    # --- stopping ---

    async def cancel(self, id: Reference, reason: str | None = None, *, timeout: float | None = None) -> TaskRecord:
        """
        Ask a task to stop and return its row.

        The request is durable when this returns, and covers every live descendant: children by parent, and all in the session a
        sub-agent works in. The row says ``cancelled`` only once the body has stopped; after *timeout* seconds the row comes back
        as it stands. A body that finishes first wins. A finished task comes back unchanged. External work whose callback nobody
        can call before it is registered again comes back as it stands.

        Raises:
            TaskNotFound: no such task in this session.
            HandleNotVisible: an observer's handle.
        """
        name = reference(id)
        return await self._core.cancel(lambda tx: self._find(tx, name), reason, timeout)

    async def cancel_all(self, reason: str | None = None, *, timeout: float | None = None) -> Sequence[CancelReport]:
        """
        Cancel every live task of the session, hidden ones too, and those spawned while it goes on; report on each.

        It returns when all have stopped, or after *timeout* seconds with the rows as they stand. What goes wrong with one stands
        in its report, and does not stop the rest.
        """
        if reason is not None:
            check_text("reason", reason)
        return await cancelling.cancel_all(self._core, self._scope, reason, timeout)

    async def abandon(self, id: Reference, reason: str) -> TaskRecord:
        """
        Give a task up by a person's decision: whoever runs it is fenced out, and its writes are refused from now on.

        What may be run again is ``pending`` and free, for the next `TaskStore.recover` or a peer; the rest, external work
        included, is ``abandoned`` with the reason. A finished task comes back unchanged.

        Raises:
            TaskNotFound: no such task in this session.
        """
        check_text("reason", reason)
        name, by = reference(id), self._core.requester

        def unit(tx: Transaction) -> Outcome:
            task = self._find(tx, name)
            owner = None if task.owner_id is None else queries.owner_by_id(tx, task.owner_id)
            return transitions.give_up(tx, task, reason, evidence_of_given_up(tx, task, owner, reason, by))

        given_up = (await self._run(unit)).task
        await self._core.end_given_up([given_up])
        return queries.task_record(given_up)

    # --- handing over ---

    async def validate_handles(self, ids: Iterable[Reference]) -> Sequence[TaskRecord]:
        """
        Return the rows of tasks this session sees: live, or finished and unread.

        Raises:
            HandleNotVisible: some are not; ``missing`` names them all.
        """
        names = references(ids)
        seen = await self._core.look_back(lambda tx: handover.visible(tx, self._scope, names))
        return [queries.task_record(one.task) for one in seen]

    async def transfer(self, to: SessionTasks | Scope | str, ids: Iterable[Reference]) -> Sequence[TaskRecord]:
        """
        Put tasks into another session of this runtime, all or none, and return their rows, the named ones first.

        Their handles, live descendants in this session and unread notes go with them. Bodies run on undisturbed, and what comes
        of them lands in the new session. Into the same session there is nothing to do.

        Raises:
            HandleNotVisible: an id is unknown, another session's, or finished and read.
            UnknownSession, SessionClosed: the destination.
            TransferConflict: an id is live there.
        """
        names, destination = references(ids), self._sibling(to)
        moved = await self._run(lambda tx: handover.transfer(tx, self._scope, destination, names))
        return [queries.task_record(task) for task in moved]

    async def cancel_unreferenced(self, keep: Iterable[Reference]) -> Sequence[TaskRecord]:
        """
        Ask for the end of every listed live task that *keep*, and what descends from it, does not cover; return those.

        It does not wait for bodies. Hidden work is not touched.

        Raises:
            HandleNotVisible: an id in *keep* is unknown or another session's; nothing was cancelled.
        """
        names, by = references(keep), self._core.requester
        reached = await self._run(lambda tx: handover.cancel_unreferenced(tx, self._scope, names, by))
        await self._core.tidy_up_for_the_dead(reached)
        return [queries.task_record(task) for task in reached]

    async def handoff(
        self, to: SessionTasks | Scope | str, keep: Iterable[Reference], *, id: str | None = None
    ) -> Handoff:
        """
        Hand what is to be kept to a successor session, and ask for the end of the rest, in one transaction.

        It does not wait for bodies, and this session stays open. Repeated with the same *keep*, under the same *id* or, without
        one, between the same sessions, it changes nothing and returns what was done: repeat it after a crash. A second handoff
        between the same two sessions needs an *id* of its own.

        Raises:
            IdempotencyConflict: it was done with another *keep*; or, without an *id*, some of these are in this session again.
            HandleNotVisible, UnknownSession, SessionClosed, TransferConflict: see `transfer`; nothing was changed.
        """
        names, destination, by = references(keep), self._sibling(to), self._core.requester
        if id is not None:
            check_id("handoff id", id)
        made = new_id("handoff")
        row = await self._run(lambda tx: handover.handoff(tx, self._scope, destination, names, id, made, by))
        done = session_queries.handoff_record(row)
        await self._core.tidy_up_for_the_dead(done.cancelled)
        return done

    # --- the inbox ---

    def inbox(self, limit: int | None = None) -> Inbox:
        """
        Claim the session's unread notes: ``async with session.inbox() as notes:``; see `Inbox`.

        Raises, on entering:
            InboxBusy: another live reader has them.
        """
        return Inbox(self._core, self._scope, limit)

    async def notes(self, unread: bool = True) -> Sequence[Note]:
        """Return the session's notes, oldest first, without claiming them; not only the *unread* ones if so wished."""
        return await look_at_notes(self._core, self._scope, unread=unread)

    # --- the end ---

    async def close(
        self, *, successor: SessionTasks | Scope | str | None = None, timeout: float | None = None
    ) -> CloseReport:
        """
        Close the session: one transaction applies each live task's close policy, then the cancelled ones are waited for.

        What is to be transferred goes to the *successor*, else to the session's parent, with its live descendants. Hidden work is
        cancelled. A cancel covers the tree below it, but for what was transferred. What is kept goes on, and may still spawn
        children; nobody else creates here. Closing again changes nothing, and waits for what has not stopped yet.

        Raises:
            SessionError, UnknownSession, SessionClosed, TransferConflict: no usable destination; nothing was changed.
        """
        timeout = check_timeout(timeout)
        to, by = None if successor is None else self._sibling(successor), self._core.requester
        closed = await self._run(lambda tx: handover.close_session(tx, self._scope, to, by))
        cancelled = await cancelling.stopped(self._core, closed.cancelled, timeout)
        with queries.readable(f"the row of session {str(self._scope)!r}"):
            return CloseReport(
                scope=self._scope,
                closed_at=closed.closed_at,  # type: ignore[arg-type]
                successor=None if closed.successor is None else Scope.parse(closed.successor),
                kept=tuple(map(queries.task_record, closed.kept)),
                cancelled=tuple(cancelled),
                transferred=tuple(map(queries.task_record, closed.moved)),
            )

    # --- building units ---

    def _with_parent(self, tx: Transaction, new: NewTask, parent: TaskHandle | str | int | None) -> NewTask:
        if parent is None:
            return new
        if isinstance(parent, TaskHandle):
            row = session_queries.handle_by_id(tx, parent.handle_id)
            if row is None:
                transitions.refuse_pruned(retention_queries.tombstone_by_seq(tx, parent.task_seq))
                raise transitions.task_not_found(self._scope, parent.handle_id)
            parent = row.task_seq
        return new._replace(parent_seq=parent if isinstance(parent, int) else self._see(tx, parent).task.task_seq)

    def _see(self, tx: Transaction, name: str) -> handover.Visible:
        """
        Return what a handle id or a task id names in this session.

        Raises:
            TaskNotFound, UnknownSession: nothing.
        """
        seen = handover.look_up(tx, self._scope, name)
        if seen is not None:
            return seen
        if session_queries.session(tx, str(self._scope)) is None:
            raise transitions.unknown_session(self._scope)
        transitions.refuse_pruned(
            retention_queries.tombstone_by_handle(tx, name)
            or retention_queries.tombstone_by_id(tx, str(self._scope), name)
        )
        raise transitions.task_not_found(self._scope, name)

    def _find(self, tx: Transaction, name: str, *, owned: bool = True) -> Task:
        seen = self._see(tx, name)
        return self._owned(seen) if owned else seen.task

    @staticmethod
    def _owned(seen: handover.Visible) -> Task:
        refuse_observer(seen.handle.handle_id, seen.handle.role)
        return seen.task

    async def _change(self, id: Reference, command: Settle | Flip, what: str) -> Transition:
        name = reference(id)
        return _transition(await self._run(lambda tx: books.change(tx, self._find(tx, name), command, what)))

    async def _gone_keeper(self, task_id: str) -> frozenset[int]:
        task = await self._core.look(lambda tx: queries.live_task_by_id(tx, str(self._scope), task_id))
        if task is None or task.owner_id is None or task.owner_id == self._core.owner_id:
            return frozenset()
        return frozenset({task.owner_id} if await self._core.is_gone(task.owner_id) else ())

    def _sibling(self, to: SessionTasks | Scope | str) -> Scope:
        """Return the session that is meant: a name is one of this runtime."""
        return Scope(self._scope.runtime, to) if isinstance(to, str) else as_scope(to)

    async def _run(self, unit: Callable[[Transaction], T]) -> T:
        return await self._core.to_request().run(unit)


def _parent_named(parent: Reference | None) -> TaskHandle | str | None:
    """Return a handle, which may be of any session, or what names a parent in this one."""
    return parent if parent is None or isinstance(parent, TaskHandle) else reference(parent)


def as_scope(of: Scope | str | SessionTasks) -> Scope:
    """Return the scope that a session, a scope, or its text ``runtime:session`` names."""
    if isinstance(of, SessionTasks):
        return of.scope
    if not isinstance(of, Scope | str):
        raise InvalidId(f"give a session, a scope or its text, not {type(of).__name__}")
    return of if isinstance(of, Scope) else Scope.parse(of)


def _transition(outcome: Outcome) -> Transition:
    return Transition(record=queries.task_record(outcome.task), verdict=outcome.verdict)
