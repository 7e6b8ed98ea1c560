"""Owns one execution of a task in this process: its fence, its slot, its timers, and how it is being stopped."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

from .commands import Fence
from .counting import Counted, CountedInTry
from .failures import words_of
from .lifecycle import Task
from .models import Failure, StopReason
from .registry import Function
from .slots import Slot
from .step_queries import Checkpoint, SignalRow

__all__ = ["PAUSES", "Body", "Escaped", "FailedWith", "Try", "aside", "current_body", "trying"]

T = TypeVar("T")

current_body: contextvars.ContextVar[Body | None] = contextvars.ContextVar("lash_store_body", default=None)


PAUSES = (0.05, 2.0)
"""Seconds between tries to store what a body came to on a full or busy disk: first, and at most."""

_NOTHING = contextlib.nullcontext()


class Try:
    """One try of a step: the signals *received* in it, what is *counted* there, and the try it is made in, if any."""

    __slots__ = ("body", "counted", "outer", "received", "step")

    def __init__(self, body: Body, step: str, number: int, again: int) -> None:
        self.body = body
        self.step = step
        self.outer = trying.get()
        self.received: list[SignalRow] = []
        self.counted = CountedInTry(step, number, again)


trying: contextvars.ContextVar[Try | None] = contextvars.ContextVar("lash_store_trying", default=None)
"""The try that the caller runs in, if it runs in a step: what is begun and received there is the step's."""


class Escaped(Exception):
    """Carries an exception of a body that asyncio would let through to the loop."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"{type(error).__name__}: {words_of(error)}")
        self.error = error


class FailedWith(Exception):
    """Carries a failure that a body of this package's own has made up itself."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def aside(wait: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin one of several waits of a caller: none of them touches the slot of its body, which `Core.wait_aside` gives back."""
    context = contextvars.copy_context()
    context.run(current_body.set, None)
    return asyncio.create_task(wait, name=name, context=context)


class _Known(Generic[T]):
    """Something that a body knows of while a block runs: as many stand as bodies wait, so it is a small one."""

    __slots__ = ("_among", "_what")

    def __init__(self, among: dict[_Known[T], T], what: T) -> None:
        self._among = among
        self._what = what

    def __enter__(self) -> None:
        # one may stand within another of the same caller
        self._among[self] = self._what

    def __exit__(self, *_: object) -> None:
        del self._among[self]


class Body:
    """
    One execution of a task in this process.

    *endings* are functions of the program that run in the transaction that stores its result. *received* are signals of which
    nothing is remembered yet. *saves* is the number of the task's checkpoint, *last_save* the last that one was to have.
    *timed_out* is the failure, JSON text, of one whose time was up, and *may_be_retried* whether another attempt has more.
    *ended* is told when its coroutine has. What it has begun beside that, and left in a step, is a branch of it.

    Many may wait at once, and what they are made of is looked through by the collector of cycles: what most of them do not need
    is made when it is.
    """

    def __init__(
        self,
        task: Task,
        function: Function | None,
        checkpoint: Checkpoint | None,
        slot: Slot,
        ended: Callable[[Body], None],
    ) -> None:
        self._ended = ended
        self.task = task
        self.function = function
        self.slot = slot
        self.checkpoint = checkpoint
        self.fence = Fence(task.attempt, task.owner_id or 0)
        self.stop_reason: StopReason | None = None
        self._stopping: asyncio.Event | None = None
        self.coroutine: asyncio.Task[Any] | None = None
        self.endings: Sequence[Callable[..., Any]] = ()
        self.received: list[int] | None = None
        self.saves = 0 if checkpoint is None else checkpoint.saves
        self.last_save = self.saves
        self._counted: Counted | None = None
        self.timed_out: str | None = None
        self.may_be_retried = True
        self.is_live = True
        self.moved_at = 0
        self._interrupts: dict[_Known[Callable[[], object]], Callable[[], object]] = {}
        self._in_steps: dict[_Known[asyncio.Task[Any]], asyncio.Task[Any]] = {}
        self._branches: set[asyncio.Task[Any]] = set()
        self._grace: asyncio.TimerHandle | None = None
        self._timeout: asyncio.TimerHandle | None = None

    @property
    def task_seq(self) -> int:
        return self.task.task_seq

    def begin(self, coroutine: Coroutine[Any, Any, Any], context: contextvars.Context) -> None:
        """Run a coroutine as this body; *context* is where its end is told."""
        self.coroutine = asyncio.get_running_loop().create_task(coroutine, name=f"lash_store body {self.task.id}")
        self.coroutine.add_done_callback(self._tell_end, context=context)

    def _tell_end(self, _: object) -> None:
        self._ended(self)

    def tries(self) -> Iterator[Try]:
        """Give the tries that the caller runs in, if it runs in steps of this body, the innermost first."""
        one = trying.get()
        while one is not None:
            if one.body is self:
                yield one
            one = one.outer

    @property
    def trying(self) -> Try | None:
        """The innermost of them."""
        return next(self.tries(), None)

    @property
    def counted(self) -> Counted:
        """What was begun without a name where the caller is: in the step it runs in, or beside all steps."""
        within = self.trying
        if within is not None:
            return within.counted
        if self._counted is None:
            self._counted = Counted()
        return self._counted

    @property
    def stopping(self) -> asyncio.Event:
        """Set once the body is to stop; made when somebody asks, for most bodies nobody does."""
        if self._stopping is None:
            self._stopping = asyncio.Event()
            if self.stop_reason is not None:
                self._stopping.set()
        return self._stopping

    def stop(self, reason: StopReason, *, grace: float = 0.0, later: bool = False) -> None:
        """
        Say why, and cancel the coroutine after *grace* seconds; a harder reason replaces a softer.

        *later*: no more than say why; `interrupt` is to follow soon.
        """
        if self.stop_reason in {reason, StopReason.STALE}:
            return
        self.stop_reason = reason
        if reason is StopReason.STALE:
            # nothing of it counts any more, however long it takes to end
            self.slot.end()
        if not later:
            self.interrupt(grace)

    def interrupt(self, grace: float = 0.0) -> None:
        """Wake who waits for the stop, end the body's waits, and cancel the coroutine after *grace* seconds."""
        if self._stopping is not None:
            self._stopping.set()
        for interrupt in list(self._interrupts.values()):
            interrupt()
        self.slot.hurry()
        if self._grace is not None:
            self._grace.cancel()
        if grace > 0:
            self._grace = asyncio.get_running_loop().call_later(grace, self.abort)
        else:
            self.abort()

    def interruptible(self, interrupt: Callable[[], object]) -> _Known[Callable[[], object]]:
        """Have a wait ended at once when the body is to stop, by what cancels it."""
        return _Known(self._interrupts, interrupt)

    async def check_going(self) -> None:
        """
        Refuse a wait that is not for a body's clean-up; others have their turn before, for it may ask again and again.

        Raises:
            CancelledError: the body is to stop.
        """
        if self.stop_reason is not None:
            await asyncio.sleep(0)
            raise asyncio.CancelledError(f"the body is being stopped: {self.stop_reason}")

    async def wait(self, waiter: asyncio.Future[T]) -> T:
        """Wait for a future without the slot, until the body is to stop at most."""
        await self.check_going()
        with self.interruptible(waiter.cancel):
            return await self.slot.wait(waiter)

    def time_out_after(self, seconds: float, failure: str) -> None:
        """Let the attempt take so long, and no longer."""
        self._timeout = asyncio.get_running_loop().call_later(seconds, self.time_out, failure)

    def time_out(self, failure: str, *, for_good: bool = False) -> None:
        """Stop it because its time is up, unless it is being stopped already; *for_good*: so is that of any other attempt."""
        if self.stop_reason is None:
            self.timed_out, self.may_be_retried = failure, not for_good
            self.stop(StopReason.TIMEOUT)

    def abort(self) -> None:
        """Cancel the coroutine, or the branches that it left."""
        for one in (self.coroutine, *self._branches):
            if one is not None:
                one.cancel()

    # --- branches ---

    @property
    def has_ended(self) -> bool:
        """Whether its coroutine has; branches may still be on their way out."""
        return self.coroutine is not None and self.coroutine.done()

    def in_step(self) -> AbstractContextManager[None]:
        """
        Know of the caller while it is in a step: if that is a task the body has begun, it is not to outlive the body.

        Raises:
            CancelledError: the body has ended, and the caller is none that is on its way out.
        """
        caller = asyncio.current_task()
        if caller is None or caller is self.coroutine or current_body.get() is not self:
            return _NOTHING
        if self.has_ended and caller not in self._branches:
            raise asyncio.CancelledError("the body has ended")
        return _Known(self._in_steps, caller)

    def end_branches(self, left: Callable[[Body], None]) -> bool:
        """Cancel what the body left in steps, and have *left* told once that has ended; False: there is nothing."""
        self._branches.update(self._in_steps.values())

        def gone(branch: asyncio.Task[Any]) -> None:
            self._branches.discard(branch)
            if not self._branches:
                left(self)

        for branch in self._branches:
            branch.cancel("the body has ended")
            branch.add_done_callback(gone)
        return bool(self._branches)

    def forget_timers(self) -> None:
        """Cancel the coroutine no more: it has ended."""
        for timer in (self._grace, self._timeout):
            if timer is not None:
                timer.cancel()
