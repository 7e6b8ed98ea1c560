"""Owns what a body may do: remember, do things once, wait, start children, speak to its session, learn that it should stop."""

from __future__ import annotations

import inspect
import json
import secrets
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from functools import cached_property
from typing import Any, Concatenate, Generic, ParamSpec, cast, overload

from pydantic import JsonValue, TypeAdapter
from typing_extensions import TypeVar

from . import births, queries, spawning, transitions
from .births import NewTask
from .bodies import Body
from .commands import Command, Notify, Progress
from .core import Core
from .counting import Counted, Numbers
from .errors import InvalidArguments, InvalidId, ResultNotSerializable, shown
from .fidelity import comes_back, is_json
from .guest import TransactConnection
from .handles import TaskHandle
from .models import (
    CancelPolicy,
    ClosePolicy,
    Scope,
    StopReason,
    TaskKind,
    TaskRecord,
    Verdict,
    check_fraction,
    check_id,
    check_seconds,
    check_text,
)
from .policies import NO_RETRY, Backoff, Errors, RetryRule
from .registry import to_json
from .stepping import Steps
from .transaction import Transaction
from .transitions import Outcome
from .waits import Waits

__all__ = ["TaskContext"]

P = ParamSpec("P")
T = TypeVar("T")
State = TypeVar("State", default=JsonValue)


class TaskContext(Generic[State]):
    """
    The first argument of a registered function: its own task, as seen from inside one attempt.

    A body runs from its top in every attempt. What it did by `step` and `transact`, waited for by `sleep` and `signal`, or
    started by `spawn` is remembered, and given to the next attempt instead of being done again; a body that skips what lies
    behind its `checkpoint` works as well: `save` says that what came before it is over.

    Every write names the attempt; once the row has moved on, it is refused with `StaleAttempt`, which should end the body. When
    the task is to be cancelled, waits of the context end at once with `asyncio.CancelledError`; one that stands in a task of an
    `asyncio.TaskGroup` ends that task alone, so look at `cancel_requested` after the group.

    ``TaskContext[State]`` says what the checkpoint is: anything pydantic reads back from JSON.
    """

    def __init__(self, body: Body, core: Core) -> None:
        self._body = body
        self._core = core
        self._adapter: TypeAdapter[Any] | None = None if body.function is None else body.function.checkpoint_adapter
        self._checkpoint = None if body.checkpoint is None else self._state(body.checkpoint.value)

    # most bodies need neither

    @cached_property
    def _waits(self) -> Waits:
        return Waits(self._body, self._core)

    @cached_property
    def _steps(self) -> Steps:
        return Steps(self._body, self._core, pause_until=self._waits.until, give_back=self._waits.give_back)

    def _state(self, text: str) -> Any:
        try:
            return json.loads(text) if self._adapter is None else self._adapter.validate_json(text)
        except (ValueError, RecursionError) as error:
            raise InvalidArguments(
                f"the checkpoint of task {self.id!r} cannot be read, or does not fit the type its function gives it: {error}"
            ) from error

    @property
    def id(self) -> str:
        """The task's id in its session."""
        return self._body.task.id

    @property
    def scope(self) -> Scope:
        """The session the task is in."""
        return Scope.parse(self._body.task.scope)

    @property
    def attempt(self) -> int:
        """Which execution this is, from 1."""
        return self._body.fence.attempt

    @property
    def record(self) -> TaskRecord:
        """The row as this body last saw it change."""
        return queries.task_record(self._body.task)

    @property
    def checkpoint(self) -> State | None:
        """What was saved last, by this attempt or an earlier one; None if nothing was."""
        return cast("State | None", self._checkpoint)

    # --- remembering ---

    @overload
    async def save(self: TaskContext[JsonValue], value: Any) -> None: ...
    @overload
    async def save(self, value: State) -> None: ...
    async def save(self, value: Any) -> None:
        """
        Store *value* as the task's checkpoint, in place of the last one.

        Durable on return: the next attempt begins with it. It puts behind it the signals received and the unnamed sleeps and
        children before it: the next attempt is expected not to ask for them again.

        Raises:
            ResultNotSerializable: not JSON, or not what comes back from it; the last checkpoint stands.
            InvalidArguments: not what the function says its checkpoint is.
            LimitExceeded: larger than a payload may be.
            StaleAttempt: the task is another attempt's.
        """
        what = f"the checkpoint of task {self.id!r}"
        text = self._core.limits.check_payload(to_json(value, what), what)
        state = self._state(text)
        if not is_json(value) and not comes_back(value, state):
            raise ResultNotSerializable(
                f"{what} does not come back from its JSON as it was given: something of it, a secret or a field that is left "
                "out, say, is not written"
            )
        await self._waits.save(text)
        self._checkpoint = state

    # --- doing things once ---

    @overload
    async def step(
        self,
        name: str,
        fn: Callable[P, Coroutine[Any, Any, T]],
        /,
        *args: Any,
        max_attempts: int | None = ...,
        retry_on: Errors | None = ...,
        no_retry_on: Errors = ...,
        backoff: Backoff | None = ...,
        timeout: float | None = ...,
        at_most_once: bool = ...,
        **kwargs: Any,
    ) -> T: ...
    @overload
    async def step(
        self,
        name: str,
        fn: Callable[P, T],
        /,
        *args: Any,
        max_attempts: int | None = ...,
        retry_on: Errors | None = ...,
        no_retry_on: Errors = ...,
        backoff: Backoff | None = ...,
        timeout: float | None = ...,
        at_most_once: bool = ...,
        **kwargs: Any,
    ) -> T: ...
    async def step(
        self,
        name: str,
        fn: Callable[..., Any],
        /,
        *args: Any,
        max_attempts: int | None = None,
        retry_on: Errors | None = None,
        no_retry_on: Errors = (),
        backoff: Backoff | None = None,
        timeout: float | None = None,
        at_most_once: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Do something outside this file and remember what came of it: the result, or the failure if that is final.

        *fn* is an ``async def`` or a plain function, which runs in a thread. Its result is stored as JSON in the transaction that
        ends the step, durable on return, and read back by the type *fn* is annotated with: the same the first time and ever
        after. A later attempt is given it without calling *fn*; a final failure is raised again, with its class if that is
        loaded and can be made, and its message. Steps may run at the same time; what the body leaves in one when it ends is
        cancelled first.

        *fn* runs **at least once**: an attempt that dies between its effect and the commit after it leaves no trace, and the next
        one calls it again. *at_most_once* commits first that it begins, and raises `StepInDoubt` instead of calling it again; it
        is not tried again either.

        The *name* is the step's own in its task, so the code around it may change between attempts. The same name again in one
        attempt, with the same arguments, is the same step; in a loop, give each turn a name.

        With *max_attempts* (5 if only *retry_on* is given) a failure that *retry_on* names (any, if only *max_attempts* is given)
        and *no_retry_on* does not is tried again after *backoff*; how often it was tried is durable, too. *timeout* bounds each
        try, in seconds, with a `TimeoutError`; a thread cannot be stopped, and is left behind.

        A retry of the whole task tries failed steps again, and keeps those that were done, and the failures of those that run at
        most once. So does the next try of a step with those that were begun in it.

        Raises:
            IdempotencyConflict: the name was used in this attempt with other arguments.
            StepFailed: it failed for good in an earlier attempt, with a class this program does not have loaded, or cannot make.
            StepInDoubt: it may have taken effect, and was to be run at most once.
            ResultNotSerializable, LimitExceeded: the result cannot be stored; that is a final failure.
            StaleAttempt: the task is another attempt's.
        """
        rule = _step_rule(max_attempts, retry_on, no_retry_on, backoff)
        if at_most_once and rule.max_attempts > 1:
            raise ValueError(f"step {shown(name)} runs at most once: it is not tried again, so give no retry words")
        if timeout is not None:
            check_seconds("timeout", timeout)
        with self._body.in_step():
            return await self._steps.run(name, fn, args, kwargs, rule=rule, timeout=timeout, at_most_once=at_most_once)

    async def transact(
        self, name: str, fn: Callable[Concatenate[TransactConnection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """
        Do something in this very file, on tables of your own, **exactly once**: effect and memory are one transaction.

        ``fn(connection, …)`` is a plain function. It runs on the writer's thread, inside the transaction that stores its result
        as the step's, so both are in the file on return, or neither. If it raises, nothing of what it did is stored, and the
        failure is final as that of a `step`. While it runs nothing else is committed, and closing waits for it: keep it short.
        It may be called twice (the first time is then undone), so it must have no other effect.

        The connection refuses whatever would change the store's own tables or end the transaction; see `TransactConnection`.

        Raises:
            StoreError: a statement that is refused.
            IdempotencyConflict, StepFailed, ResultNotSerializable, LimitExceeded, StaleAttempt: see `step`.
        """
        return cast(T, await self._steps.transact(name, fn, args, kwargs))

    def at_completion(self, fn: Callable[[TransactConnection], object]) -> None:
        """
        Have ``fn(connection)`` run in the transaction that stores this body's result: both are in the file, or neither.

        See `transact` for what it may do. It does not run if the task ends in any other way. If it raises, the task has failed
        with that, and nothing of it is stored. Several run in the order they were given; the next attempt must say so again.
        """
        runs_later = (
            inspect.iscoroutinefunction(fn) or inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)
        )
        if not callable(fn) or runs_later:
            raise InvalidArguments(f"task {self.id!r}: at_completion() is given a plain function of a connection")
        self._body.endings = (*self._body.endings, fn)

    # --- waiting ---

    async def sleep(self, seconds: float, *, name: str | None = None) -> None:
        """
        Sleep, across restarts: the wake time is stored, and a later attempt sleeps only what is left. The slot is free meanwhile.

        The wake time is one of the wall clock, in UTC. A clock that is set back never makes a sleep longer than *seconds* within
        one attempt; one that is set forward, or a machine that slept, ends it when the wake time has come, noticed within 20 s.
        A sleep with a *name* is one for the whole task; without, it is the n-th since the last `save`, in a `step` since this try
        of it began.

        Raises:
            ValueError: *seconds* is no number, or negative.
            CancelledError: the task is to be cancelled.
        """
        await self._waits.sleep(seconds, name)

    async def signal(self, name: str, *, timeout: float | None = None) -> JsonValue:
        """
        Return the payload of the oldest signal of a name that this attempt has not received, waiting for it if need be.

        Signals come in the order they were sent, from any process, each once in an attempt. What was received is put behind by
        the next `save`, or by the end of the step it was received in; an attempt that dies before leaves it to the next one,
        which receives the same signals in the same order, and so does a step that failed and is tried again. The slot is free
        meanwhile.

        Raises:
            TimeoutError: *timeout* seconds passed; no signal is lost by that.
            CancelledError: the task is to be cancelled.
        """
        return await self._waits.signal(name, timeout)

    def waiting(self, reason: str) -> AbstractAsyncContextManager[None]:
        """
        Show the task as ``waiting`` for a *reason*, without its slot, while a block runs.

        ``async with task.waiting("approval"): …``. Durable on entering; it is ``running`` again, and has its slot back, once the
        block is left. The block is cancelled at once when the task is to be.
        """
        return self._waits.waiting(reason)

    # --- children ---

    async def spawn(
        self,
        fn: Callable[..., Any] | Coroutine[Any, Any, Any],
        *args: Any,
        id: str | None = None,
        kind: TaskKind = TaskKind.OTHER,
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
        Start a child of this task, in its session; see `SessionTasks.spawn`. A cancel of this task covers it.

        A later attempt that spawns the same child is given that one: the same *id* (or *idempotency_key*), or, without, the n-th
        of the same function and arguments since the last `save`, in a `step` since this try of it began: give an *id* to what is
        spawned before a save. One that came to nothing is spawned anew by a retry of this task.
        A parent that awaits its child gives its slot back.

        Raises:
            IdempotencyConflict: the *id* was used in this task for other work.
            StaleAttempt: the task is another attempt's.
            TaskExists, UnknownFunction, InvalidArguments, LimitExceeded: see `SessionTasks.spawn`.
        """
        columns: dict[str, Any] = {
            "id": id,
            "kind": kind,
            "child_session_id": child_session_id,
            "close_policy": close_policy,
            "idempotency_key": idempotency_key,
            "notify_on_end": bool(notify_on_end),
            "parent_seq": self._body.task_seq,
        }
        key = _ChildKey(id, self._body.saves, self._body.counted)
        return await spawning.spawn(
            self._core,
            self.scope,
            fn,
            args,
            kwargs,
            columns,
            cancel_policy=cancel_policy,
            timeout=timeout,
            deadline=deadline,
            key=None if idempotency_key is not None else key.of,
            refused=key.give_back,
            prepare=self._below,
        )

    def _below(self, tx: Transaction, new: NewTask) -> NewTask:
        current = transitions.as_it_is(tx, self._body.task)
        if not current.has_body(self._body.fence):
            raise transitions.stale(current, self.attempt)
        # wherever it is by now
        return births.moved(new._replace(by_its_parent=True), Scope.parse(current.scope))

    # --- speaking to the session ---

    async def progress(self, message: str, fraction: float | None = None) -> None:
        """
        Show how far the work has come: a line, and a *fraction* from 0 to 1 if it is known. Durable on return.

        Raises:
            ValueError: *fraction* is outside 0 to 1.
            StaleAttempt: the task is another attempt's.
        """
        check_text(f"the progress of task {self.id!r}", message)
        command = Progress(self._body.fence, message, check_fraction(f"task {self.id!r}", fraction))
        await self._core.write_for(self._body, lambda tx: self._transition(tx, command))

    async def notify(self, text: str, data: Any = None, *, key: str | None = None) -> None:
        """
        Post a note to the inbox of the task's session: a line, and *data* that is JSON. Durable on return.

        With a *key* one note is posted however often this is called, by later attempts too.

        Raises:
            ResultNotSerializable: *data* is not JSON.
            LimitExceeded: *data* is larger than a payload may be.
            StaleAttempt: the task is another attempt's.
        """
        check_text(f"a note of task {self.id!r}", text)
        if key is None:
            key = f"note:{secrets.token_hex(8)}"
        elif check_id("note key", key).startswith("end:"):
            raise InvalidId(f"note key {key!r} begins with 'end:', as those of ends do: choose another")
        what = f"a note of task {self.id!r}"
        value = self._core.limits.check_payload(to_json(data, what), what)
        command = Notify(self._body.fence, {"note_key": key, "note": text})
        outcome = await self._core.writing.run(lambda tx: transitions.notify(tx, self._body.task, command, value))
        if outcome.verdict is Verdict.SUPERSEDED:
            raise transitions.stale(outcome.task, self.attempt)

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody asked for the end of this task; a cooperative body looks here, and returns or raises."""
        return self._body.stop_reason is StopReason.CANCEL

    @property
    def stop_reason(self) -> StopReason | None:
        """Why this body is being stopped: ``cancel``, ``detach`` (the store closes), ``timeout``, ``stale``; None: it is not."""
        return self._body.stop_reason

    async def cancelled(self) -> None:
        """Wait until this body should stop, for whatever `stop_reason`; unlike other waits, with its slot."""
        await self._body.stopping.wait()

    def _transition(self, tx: Transaction, command: Command) -> Outcome:
        return transitions.transition(tx, self._body.task, command, fresh=False)


class _ChildKey:
    """The key by which a parent knows a child: by its id, or by its number among those of the same work."""

    __slots__ = ("_counted", "_id", "_saves", "_taken")

    def __init__(self, id: str | None, saves: int, counted: Counted) -> None:
        self._id = id
        self._saves = saves
        self._counted = counted
        self._taken: tuple[Numbers, int] | None = None

    def of(self, work: str) -> str:
        """Return it; *work* says what the child is to do."""
        if self._id is not None:
            return f"child:={self._id}"
        numbers = self._counted.numbers(f"child:{work}", self._saves)
        number = numbers.take()
        self._taken = numbers, number
        return f"child:{self._counted.name(number, self._saves)}:{work}"

    def give_back(self) -> None:
        """Leave its number to the next one: it was not born."""
        if self._taken is not None:
            (numbers, number), self._taken = self._taken, None
            numbers.give_back(number)


def _step_rule(
    max_attempts: int | None, retry_on: Errors | None, no_retry_on: Errors, backoff: Backoff | None
) -> RetryRule:
    if max_attempts is None and retry_on is None and backoff is None and not no_retry_on:
        return NO_RETRY
    return RetryRule.of(
        _STEP_ATTEMPTS if max_attempts is None else max_attempts,
        Exception if retry_on is None else retry_on,
        no_retry_on,
        backoff,
    )


_STEP_ATTEMPTS = 5
