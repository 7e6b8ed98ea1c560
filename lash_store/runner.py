"""
Owns the live bodies and how each ended, started and stopped by committed events alone.

It compares rows and bodies, so order and repetition of what it is told do not matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from . import guest, outcomes, transitions
from .alarms import Alarm, Alarms
from .births import Born
from .bodies import PAUSES, Body, Escaped, current_body, trying
from .commands import Command, Complete, Expire, Fail, Start
from .errors import (
    CommitInDoubt,
    InvalidArguments,
    StorageMoved,
    StoreClosed,
    StoreError,
)
from .failures import failure_of, told
from .lifecycle import Task, deadline_passed, is_early
from .models import CancelPolicy, EventType, StopReason, TaskState
from .policies import Limits
from .readings import Reading, Readings
from .registry import Registry
from .slots import Slot, Slots
from .step_queries import Checkpoint
from .transaction import Committed, utc_text
from .transitions import Outcome
from .translation import may_pass
from .writer import Answer, Unit, Writer

__all__ = ["Runner"]

T = TypeVar("T")
log = logging.getLogger(__name__)

_LAST = 1.0
"""Seconds that a killed process may take to go, once its store closes."""

_AT_ONCE = 100
"""Bodies that a closing store stops in one turn of the loop."""

_STOPPED = (CommitInDoubt, StorageMoved, StoreClosed)
"""What has ended the writer: nothing is stored any more."""


class Runner:
    """
    Runs up to *max_running* bodies of the tasks that *owner_id* holds.

    *readings* are those of the same store; *make_context* gives a body its first argument.
    """

    def __init__(
        self,
        writer: Writer,
        registry: Registry,
        *,
        owner_id: int,
        max_running: int,
        cancel_grace: float,
        limits: Limits,
        readings: Readings,
        make_context: Callable[[Body], Any],
        on_refused: Callable[[int, StoreError], None],
    ) -> None:
        self._writer = writer
        self._readings = readings
        self._registry = registry
        self._grace = cancel_grace
        self._limits = limits
        self._owner_id = owner_id
        self._make_context = make_context
        self._on_refused = on_refused
        self.slots = Slots(max_running, self._schedule)
        self.alarms = Alarms()
        self._queued: OrderedDict[int, tuple[Task, bool]] = OrderedDict()
        self._early: dict[int, Alarm] = {}
        self._deadlines: dict[int, Alarm] = {}
        self._starting: set[int] = set()
        self._tried: set[int] = set()
        self._bodies: dict[int, Body] = {}
        self._replaced: set[Body] = set()
        self._leaving: dict[Body, Command | None] = {}
        self._coroutines: dict[int, Coroutine[Any, Any, Any]] = {}
        self._on_end = self._ended
        self._context = contextvars.copy_context()
        self._idle = asyncio.Event()
        self._at_last_end: Callable[[], None] | None = None
        self._closing = False

    # --- reacting ---

    def react(self, events: Sequence[Committed]) -> None:
        """Act on events this process committed, each with the row after it."""
        for event in events:
            task = event.task
            if task is not None and task.is_external:
                continue
            if event.type == EventType.REGISTERED and event.local is not None and event.task_seq is not None:
                self._coroutines[event.task_seq] = event.local
            if task is None:
                continue
            self._remember(task)
            if event.type == EventType.TRANSFERRED:
                self.note_moved(task.task_seq, task.scope, event.seq)
            if task.owner_id == self._owner_id and not task.is_terminal:
                self._react_to_own(event, task)
            else:
                self._react_to_lost(task)
        self._schedule()

    def _remember(self, task: Task) -> None:
        body = self._bodies.get(task.task_seq)
        if body is not None and task.attempt == body.fence.attempt:
            body.task = task

    def note_moved(self, task_seq: int, scope: str, seq: int) -> None:
        """Learn that a task is in another session since event *seq*, told in whatever order."""
        body = self._bodies.get(task_seq)
        if body is not None and seq > body.moved_at:
            body.moved_at = seq
            body.task = body.task._replace(scope=scope)

    def compare(self, tasks: Iterable[Task]) -> None:
        """Act on rows read from the file, which may be older than what is known here: they only ever stop something."""
        for task in tasks:
            lost = task.is_terminal or task.owner_id != self._owner_id
            body = self._bodies.get(task.task_seq)
            if body is None:
                # a row that somebody else has may be ours again by now: its start would tell
                if task.is_terminal:
                    self._forget(task.task_seq)
            elif task.attempt < body.fence.attempt:
                continue
            elif lost or task.attempt > body.fence.attempt:
                body.stop(StopReason.STALE)
            elif task.state == TaskState.CANCEL_REQUESTED:
                # a request stands until the end, so even an old row tells of it truly
                body.task = body.task._replace(
                    state=task.state,
                    cancel_reason=task.cancel_reason,
                    cancel_requested_by=task.cancel_requested_by,
                    cancel_requested_at=task.cancel_requested_at,
                )
                self._cancel(body)

    def holds(self, task_seq: int) -> bool:
        """Whether this process has a body of a task, or its row waits here for a slot or for the time of its retry."""
        return task_seq in self._bodies or task_seq in self._queued or task_seq in self._early

    def runs(self, task_seq: int) -> bool:
        """Whether a body of a task has not ended, be it fenced out."""
        return task_seq in self._bodies or any(body.task_seq == task_seq for body in tuple(self._replaced))

    def is_live(self, task_seq: int) -> bool:
        """
        Whether a task is held here and its end is still to be told: its row is live, then, and nobody need read it.

        Not so once its start was asked for: the end that supersedes the start may have been told already. Nor once its body has
        ended: that may be in the file by now, and what others have made of it since, who are not heard of in the same order.
        """
        body = self._bodies.get(task_seq)
        if body is not None:
            return body.is_live and not body.has_ended
        return task_seq in self._early or (task_seq in self._queued and task_seq not in self._tried)

    def note_ended(self, task_seq: int) -> None:
        """Learn that a task's terminal event is in the file; told before anybody who waits for it is."""
        body = self._bodies.get(task_seq)
        if body is None:
            self._forget(task_seq)
        else:
            body.is_live = False

    def _react_to_own(self, event: Committed, task: Task) -> None:
        if task.deadline is not None and task.task_seq not in self._deadlines:
            self._watch_deadline(task, task.deadline)
        if task.state == TaskState.PENDING:
            # what else happens to a row that waits for its start changes nothing about that
            if event.type in {EventType.REGISTERED, EventType.CLAIMED, EventType.RETRY_SCHEDULED}:
                self._enqueue(task, reattach=event.type == EventType.CLAIMED and task.attempt > 0)
        elif task.state == TaskState.CANCEL_REQUESTED:
            body = self._bodies.get(task.task_seq)
            if body is not None:
                self._cancel(body)
        elif event.type in {EventType.STARTED, EventType.REATTACHED}:
            self._launch(task, event.local)

    def _react_to_lost(self, task: Task) -> None:
        self._forget(task.task_seq)
        body = self._bodies.get(task.task_seq)
        if body is None:
            return
        if task.is_terminal and task.attempt == body.fence.attempt:
            body.is_live = False
            if body.has_ended:
                # before its waiters are told, who may want the slot for the next task
                body.slot.end()
        else:
            body.is_live = not task.is_terminal
            body.stop(StopReason.STALE)

    def _forget(self, task_seq: int) -> None:
        """Start a task no more."""
        self._queued.pop(task_seq, None)
        self._forget_alarm(self._early, task_seq)
        if task_seq not in self._bodies:
            self._forget_alarm(self._deadlines, task_seq)
        self._close_coroutine(task_seq)

    @staticmethod
    def _forget_alarm(alarms: dict[int, Alarm], task_seq: int) -> None:
        alarm = alarms.pop(task_seq, None)
        if alarm is not None:
            alarm.cancel()

    def _close_coroutine(self, task_seq: int) -> None:
        coroutine = self._coroutines.pop(task_seq, None)
        if coroutine is not None:
            coroutine.close()

    def _cancel(self, body: Body) -> None:
        cooperative = body.task.cancel_policy == CancelPolicy.COOPERATIVE
        body.stop(StopReason.CANCEL, grace=self._grace if cooperative else 0.0)

    # --- starting ---

    def create(
        self, create: Callable[[bool], Unit[Born]], then: Answer[Born] | None = None, *, takes_slot: bool = True
    ) -> asyncio.Future[Born]:
        """
        Submit the unit that creates a task, with its start in the same commit if it may start now; *create* is told whether.

        *then* is told what became of it, whoever waits for the future.
        """
        start = (not takes_slot or (self.slots.is_free and not self._queued)) and not self._closing
        if not (start and takes_slot):
            return self._writer.submit(create(start), then)

        def created(born: Born | None, error: BaseException | None) -> None:
            # the body has taken its own by now
            self.slots.give_back()
            if then is not None:
                then(born, error)

        submitted = self._writer.submit(create(start), created)
        self.slots.take()
        return submitted

    def _enqueue(self, task: Task, *, reattach: bool) -> None:
        if task.not_before is not None and is_early(task, utc_text(time.time())):
            self._forget_alarm(self._early, task.task_seq)
            self._early[task.task_seq] = self.alarms.at(
                _seconds(task.not_before, otherwise=0.0), lambda: self._no_longer_early(task, reattach)
            )
        elif task.is_monitor and not self._closing:
            self._start(task, reattach)
        else:
            self._queued.setdefault(task.task_seq, (task, reattach))

    def _no_longer_early(self, task: Task, reattach: bool) -> None:
        self._early.pop(task.task_seq, None)
        self._queued.setdefault(task.task_seq, (task, reattach))
        self._schedule()

    def _watch_deadline(self, task: Task, deadline: str) -> None:
        self._deadlines[task.task_seq] = self.alarms.at(
            _seconds(deadline, otherwise=float("inf")), lambda: self._expire(task.task_seq, deadline_passed(deadline))
        )

    def _expire(self, task_seq: int, failure: str) -> None:
        """End a task whose deadline has passed; its body, if it has one, is stopped first."""
        self._deadlines.pop(task_seq, None)
        body = self._bodies.get(task_seq)
        if body is not None and body.is_live and not body.has_ended:
            body.time_out(failure, for_good=True)
            return
        command = Expire(self._owner_id, failure)
        self._writer.post(lambda tx: transitions.transition(tx, transitions.by_seq(tx, task_seq), command))

    def _schedule(self) -> None:
        while self.slots.is_free and self._queued and not self._closing:
            _, (task, reattach) = self._queued.popitem(last=False)
            self._start(task, reattach)

    def _start(self, task: Task, reattach: bool) -> None:
        """Ask for a start, with a slot kept for it; the body begins when the event is committed."""
        function = None if task.function is None else self._registry.by_name(task.function)
        version = task.version if function is None else function.version
        command = Start(self._owner_id, self._owner_id, reattach=reattach, version=version)

        def started(_: Outcome | None, error: BaseException | None) -> None:
            self._started(task, reattach, error)
            if not task.is_monitor:
                self.slots.give_back()

        try:
            self._writer.tell(lambda tx: transitions.start(tx, task, command, fresh=False), started)
        except StoreError:
            return
        self._starting.add(task.task_seq)
        if not task.is_monitor:
            self.slots.take()

    def _started(self, task: Task, reattach: bool, error: BaseException | None) -> None:
        self._starting.discard(task.task_seq)
        if error is not None:
            log.warning("start_failed", extra={"task_seq": task.task_seq}, exc_info=error)
            if not self._closing and not isinstance(error, _STOPPED):
                self._tried.add(task.task_seq)
                asyncio.get_running_loop().call_later(PAUSES[1], self._try_again, task, reattach)
        else:
            self._tried.discard(task.task_seq)
            if task.task_seq not in self._bodies and not self._awaits_start(task.task_seq):
                # somebody else changed the row first, and did not give it back
                self._forget(task.task_seq)
        self._look_whether_idle()

    def _try_again(self, task: Task, reattach: bool) -> None:
        self._enqueue(task, reattach=reattach)
        self._schedule()

    def body_here(self) -> Body | None:
        """Return the body of this store that the caller runs in, if it does."""
        body = current_body.get()
        return None if body is None or self._bodies.get(body.task_seq) is not body else body

    async def wait_without_slot(self, waiter: asyncio.Future[T]) -> T:
        """Wait for a future; if a body waits here, another may run meanwhile, and the wait ends when the body is to stop."""
        body = self.body_here()
        if body is None:
            return await waiter
        with body.interruptible(waiter.cancel):
            return await body.slot.wait(waiter)

    async def sleep_without_slot(self, wake: asyncio.Event) -> None:
        """Wait for an event; if a body waits here, another may run meanwhile."""
        body = self.body_here()
        if body is None:
            await wake.wait()
            return
        waiting = asyncio.create_task(wake.wait(), name="lash_store wait")
        try:
            await self.wait_without_slot(waiting)
        finally:
            waiting.cancel()

    # --- supervising ---

    def _launch(self, task: Task, checkpoint: Checkpoint | None) -> None:
        replaced = self._bodies.get(task.task_seq)
        if replaced is not None:
            # fenced out, and not ended yet
            replaced.stop(StopReason.STALE)
            self._replaced.add(replaced)
        function = None if task.function is None else self._registry.by_name(task.function)
        slot = Slot(self.slots, is_needed=not task.is_monitor)
        body = self._bodies[task.task_seq] = Body(task, function, checkpoint, slot, self._on_end)
        body.begin(self._run(body), self._context)
        if task.timeout is not None:
            body.time_out_after(
                task.timeout, told("Timeout", f"attempt {task.attempt} took longer than {task.timeout:g} s")
            )
        if self._closing:
            body.stop(StopReason.DETACH)

    def _ended(self, body: Body) -> None:
        """Learn how a body ended; that is stored once the branches it left in steps have ended, too."""
        body.forget_timers()
        try:
            command = outcomes.outcome_of(body, self._limits)
        except Exception as error:
            log.exception("outcome_unreadable", extra={"task_seq": body.task_seq})
            command = Fail(body.fence, failure_of(RuntimeError(f"the outcome cannot be told: {type(error).__name__}")))
        self._leaving[body] = command
        if body.end_branches(self._left):
            asyncio.get_running_loop().call_later(self._grace, self._late, body)
        else:
            self._left(body)

    def _late(self, body: Body) -> None:
        """
        Wait no longer for the branches of a body, if what it came to is its own, and final.

        Not so a cancel, which is told once nothing of the body runs, nor what another attempt follows: it would run beside them.
        """
        if body in self._leaving:
            log.warning("steps_left", extra={"task_seq": body.task_seq})
            if isinstance(self._leaving[body], Complete | Fail):
                self._left(body)

    def _left(self, body: Body) -> None:
        """Store how a body ended, if that was still to be; the one place that does."""
        if body not in self._leaving:
            return
        command = self._leaving.pop(body)
        if command is None:
            self._forget_body(body)
        else:
            self._store(body, command, PAUSES[0])

    def _store(self, body: Body, command: Command, pause: float) -> None:
        readings = self._readings.ask_for(body.task_seq)

        def stored(noted: Sequence[Reading] | None, error: BaseException | None) -> None:
            for reading in noted or ():
                reading.is_noted = True
            self._stored(body, command, pause, error)

        try:
            self._writer.tell(lambda tx: outcomes.end(tx, body, command, readings), stored)
        except StoreError:
            self._forget_body(body)

    def _stored(self, body: Body, command: Command, pause: float, error: BaseException | None) -> None:
        """Forget the body, or try again for as long as the store is open: a full disk must not lose an outcome."""
        refused = guest.guests_error(error) if body.endings else None
        if refused is not None:
            # what was to be stored with the result could not be: the body has failed
            body.endings = ()
            self._store(body, outcomes.failed(body, refused), pause)
        elif error is None or not isinstance(error, StoreError) or isinstance(error, _STOPPED):
            if error is not None:
                log.error("outcome_lost", extra={"task_seq": body.task_seq}, exc_info=error)
            self._forget_body(body)
        elif isinstance(command, Complete) and not may_pass(error):
            # nor would it another time: that is how the body ends
            self._store(body, Fail(body.fence, failure_of(error)), pause)
        else:
            log.warning("outcome_not_stored", extra={"task_seq": body.task_seq}, exc_info=error)
            self._on_refused(body.task_seq, error)
            longer = min(PAUSES[1], pause * 2)
            asyncio.get_running_loop().call_later(pause, self._store, body, command, longer)

    def _forget_body(self, body: Body) -> None:
        self._replaced.discard(body)
        if self._bodies.get(body.task_seq) is body:
            del self._bodies[body.task_seq]
            is_ours = body.task.owner_id == self._owner_id and body.stop_reason is not StopReason.STALE
            if body.task.is_terminal or not (is_ours or self._awaits_start(body.task_seq)):
                self._forget_alarm(self._deadlines, body.task_seq)
            # not from the queue: the row may have been given to this owner again
            self._close_coroutine(body.task_seq)
        body.slot.end()
        self._look_whether_idle()

    def _awaits_start(self, task_seq: int) -> bool:
        return task_seq in self._queued or task_seq in self._early or task_seq in self._starting

    @property
    def _is_idle(self) -> bool:
        return not self._bodies and not self._replaced and not self._starting

    def at_last_end(self, call: Callable[[], None]) -> None:
        """Have *call* called once no body runs any more that `detach` did not wait for."""
        self._at_last_end = call
        self._look_whether_idle()

    def _look_whether_idle(self) -> None:
        if self._closing and self._is_idle:
            self._idle.set()
            if self._at_last_end is not None:
                self._at_last_end()

    async def _run(self, body: Body) -> Any:
        current_body.set(body)
        # whoever started it, or opened the store, may be in a step
        trying.set(None)
        # what the loop would otherwise take for its own: SystemExit and KeyboardInterrupt of a body are the body's
        try:
            return await self._call(body)
        except (asyncio.CancelledError, GeneratorExit, Exception):
            raise
        except BaseException as error:
            raise Escaped(error) from error

    def _call(self, body: Body) -> Awaitable[Any]:
        coroutine = self._coroutines.pop(body.task_seq, None)
        if coroutine is not None:
            return coroutine
        task, function = body.task, body.function
        if function is None:
            raise InvalidArguments(f"task {task.id!r} has no function this program knows: register {task.function!r}")
        return function.call(self._make_context(body), task.arguments or "{}")

    # --- closing ---

    def close(self) -> None:
        """Stop every body with reason *detach*, and start none any more."""
        if self._closing:
            return
        self._closing = True
        self.alarms.close()
        bodies = list(self._bodies.values())
        for body in bodies:
            if body.stop_reason is not StopReason.CANCEL:
                body.stop(StopReason.DETACH, later=True)
        self._interrupt_some(deque(bodies))

    def _interrupt_some(self, bodies: deque[Body]) -> None:
        """Stop bodies that know why, a part in a turn of the loop: thousands that end in one would hold up all others."""
        for _ in range(min(len(bodies), _AT_ONCE)):
            body = bodies.popleft()
            if body.stop_reason is StopReason.CANCEL:
                body.abort()
            elif body.stop_reason is StopReason.DETACH:
                body.interrupt()
        if bodies:
            asyncio.get_running_loop().call_soon(self._interrupt_some, bodies)

    async def detach(self, timeout: float | None) -> list[Task]:
        """
        Wait up to *timeout* seconds for the bodies to end that `close` has stopped; return those that did not.

        What ended meanwhile is stored; the rest of the rows is for `transitions.end_owner`.
        """
        self.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                # a commit that was under way may bring another body after the last one has ended
                while not self._is_idle:
                    self._idle.clear()
                    await self._idle.wait()
        for body in list(self._leaving):
            self._late(body)
        for body in [*self._bodies.values(), *self._replaced]:
            body.stop(StopReason.STALE)
        await self._wait_for_killed()
        alive = [*self._bodies.values(), *self._replaced]
        for coroutine in self._coroutines.values():
            coroutine.close()
        self._coroutines.clear()
        return [body.task for body in alive]

    async def _wait_for_killed(self) -> None:
        """Wait a moment for monitors that were out of time: what they supervise is killed by now, and soon gone."""
        going = [body for body in (*self._bodies.values(), *self._replaced) if body.task.is_monitor]
        killed = [body.coroutine for body in going if body.coroutine is not None and not body.coroutine.done()]
        if killed:
            await asyncio.wait(killed, timeout=_LAST)
            # what their end brings about comes right after it
            await asyncio.sleep(0)

    def stop(self) -> None:
        """End every body at once, storing nothing: the file is out of reach."""
        self._closing = True
        self.alarms.close()
        for body in list(self._bodies.values()):
            body.stop(StopReason.STALE)


def _seconds(at: str, *, otherwise: float) -> float:
    """Return a time of the file in seconds since the epoch, *otherwise* if somebody's hand made it unreadable."""
    try:
        return datetime.fromisoformat(at).timestamp()
    except ValueError:
        return otherwise
