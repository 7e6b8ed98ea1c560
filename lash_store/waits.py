"""Owns how a body waits for what outlives it: a time, a signal, somebody else; its slot is given back meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from bisect import insort
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from pydantic import JsonValue

from . import memory, queries, step_queries, transitions
from .bodies import Body
from .commands import GoOn, Wait
from .core import Core
from .errors import InvalidId
from .memory import StepNote
from .models import StepKind, StepState, StopReason, check_id, check_seconds, check_text
from .step_queries import SignalRow, StepRow
from .transaction import Transaction, utc_text
from .transitions import Outcome

__all__ = ["Waits"]


class _Queue:
    """The signals of one name in this attempt: up to which one they were handed out, and which were given back since."""

    __slots__ = ("given_back", "handed", "lock")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.handed = 0
        self.given_back: list[SignalRow] = []


class Waits:
    """
    The waits of one attempt.

    What has no name is counted since the last `save`, in each step by itself: an attempt that begins again behind it meets the
    same waits in their order.
    """

    def __init__(self, body: Body, core: Core) -> None:
        self._body = body
        self._core = core
        self._may_have_slept = body.fence.attempt > 1
        self._queues: dict[str, _Queue] = {}
        self._reasons: dict[object, str] = {}

    # --- checkpoints ---

    async def save(self, text: str) -> None:
        """Save a checkpoint, behind which lie the signals received and the unnamed sleeps begun so far."""
        body = self._body
        slept, taken, before = self._may_have_slept, body.received or [], body.saves
        # at once: what other branches of the body begin from here on is committed after it
        self._may_have_slept, body.received = False, None
        body.last_save += 1
        number = body.saves = body.last_save
        try:
            await self._write(lambda tx: memory.save(tx, body.task, body.fence, text, number, taken, slept=slept))
        except Exception:
            # its number is not given again: others may have counted from there
            if body.saves == number:
                body.saves = before
            self._may_have_slept, body.received = True, [*taken, *(body.received or ())]
            raise

    # --- sleeping ---

    async def sleep(self, seconds: float, name: str | None) -> None:
        """Sleep what is left of a sleep that an earlier attempt began, or begin it."""
        seconds = check_seconds("the time to sleep", seconds)
        await self._body.check_going()
        wake_at = await self._wake_at(seconds, self._sleep_name(name), is_named=name is not None)
        # a clock that was set back must not make it longer than it was to be
        await self.until(min(wake_at, time.time() + seconds))

    def _sleep_name(self, name: str | None) -> str:
        if name is None:
            counted, saves = self._body.counted, self._body.saves
            return counted.name(counted.numbers("sleep", saves).take(), saves)
        if check_id("the name of a sleep", name).startswith("#"):
            raise InvalidId(
                f"the name of a sleep {name!r} begins with '#', as those of unnamed ones do: choose another"
            )
        return name

    async def _wake_at(self, seconds: float, name: str, *, is_named: bool) -> float:
        # a step may begin the same try again within its attempt
        may_be_there = is_named or self._body.fence.attempt > 1 or self._body.trying is not None
        row = await self._sleep_before(name) if may_be_there else None
        if row is not None and row.wake_at is not None:
            with queries.readable(f"the sleep {row.name!r} of task #{row.task_seq}"):
                if is_named or json.loads(row.value) == seconds:
                    return datetime.fromisoformat(row.wake_at).timestamp()
        wake_at = time.time() + seconds
        note = StepNote(
            StepKind.SLEEP,
            name,
            StepState.DONE,
            value=json.dumps(seconds),
            begun_at=utc_text(time.time()),
            wake_at=utc_text(wake_at),
        )
        self._may_have_slept = True
        await self._write(lambda tx: memory.note_step(tx, self._body.task, self._body.fence, note))
        return wake_at

    async def _sleep_before(self, name: str) -> StepRow | None:
        key = {"task_seq": self._body.task_seq, "kind": StepKind.SLEEP, "name": name}
        rows = await self._core.reader.rows(step_queries.STEP, key)
        return StepRow._make(rows[0]) if rows else None

    async def until(self, when: float) -> None:
        """Wait until a time in seconds since the epoch, without the slot; it ends at once when the body is to stop."""
        if when <= time.time():
            await self._body.check_going()
            await asyncio.sleep(0)
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        assert self._core.runner is not None
        alarm = self._core.runner.alarms.at(when, lambda: None if woken.done() else woken.set_result(None))
        try:
            await self._body.wait(woken)
        finally:
            alarm.cancel()

    # --- signals ---

    async def signal(self, name: str, timeout: float | None) -> JsonValue:
        """Return the oldest signal of a name that this attempt was not handed yet, waiting for one if need be."""
        check_id("signal name", name)
        if timeout is not None:
            check_seconds("timeout", timeout)
        queue = self._queues.setdefault(name, _Queue())
        async with asyncio.timeout(timeout) as limit, queue.lock:
            # what is there is returned at any time-out
            until = limit.when()
            limit.reschedule(None)
            row = await self._look(name, queue)
            if row is None:
                limit.reschedule(until)
                row = await self._next(name, queue)
        within = self._body.trying
        if within is None:
            if self._body.received is None:
                self._body.received = []
            self._body.received.append(row.signal_seq)
        else:
            within.received.append(row)
        with queries.readable(f"signal #{row.signal_seq}"):
            payload: JsonValue = json.loads(row.payload)
        return payload

    async def _next(self, name: str, queue: _Queue) -> SignalRow:
        while True:
            receiver = self._core.feed.wait_for_signal(self._body.task_seq)
            try:
                row = await self._look(name, queue)
                if row is not None:
                    return row
                await self._body.wait(receiver)
            finally:
                self._core.feed.forget_signal(self._body.task_seq, receiver)

    async def _look(self, name: str, queue: _Queue) -> SignalRow | None:
        if queue.given_back and queue.given_back[0].signal_seq <= queue.handed:
            return queue.given_back.pop(0)
        wanted = {"task_seq": self._body.task_seq, "name": name, "after": queue.handed}
        rows = await self._core.reader.rows(step_queries.NEXT_SIGNAL, wanted)
        if not rows:
            return None
        row = SignalRow._make(rows[0])
        queue.handed = row.signal_seq
        if queue.given_back and queue.given_back[0] == row:
            del queue.given_back[0]
        return row

    def give_back(self, received: Sequence[SignalRow]) -> None:
        """
        Take signals back from who came to nothing: they are for who asks next.

        Those of an earlier attempt may be ahead of what was handed out in this one: they are found in the file in their turn.
        """
        for row in received:
            if row.name in self._queues:
                insort(self._queues[row.name].given_back, row)
        if received:
            self._core.feed.wake_receivers(self._body.task_seq)

    # --- somebody else ---

    @asynccontextmanager
    async def waiting(self, reason: str) -> AsyncIterator[None]:
        """Show the task as waiting, without its slot, for as long as the block takes."""
        check_text(f"what task {self._body.task.id!r} waits for", reason)
        waiter = asyncio.current_task()
        assert waiter is not None
        await self._body.check_going()
        with self._body.interruptible(waiter.cancel):
            this = object()
            self._reasons[this] = reason
            try:
                await self._show()
                async with self._body.slot.away():
                    yield
            finally:
                del self._reasons[this]
                if self._body.stop_reason in {None, StopReason.TIMEOUT}:
                    await self._show()

    async def _show(self) -> None:
        body = self._body
        latest = next(reversed(self._reasons.values()), None)
        command = GoOn(body.fence) if latest is None else Wait(body.fence, latest)
        outcome = await self._core.writing.run(lambda tx: transitions.transition(tx, body.task, command, fresh=False))
        # a cancel that was requested meanwhile stands, and will be told: that is no stale attempt
        if outcome.stale or outcome.task.is_terminal:
            raise transitions.stale(outcome.task, body.fence.attempt)

    async def _write(self, unit: Callable[[Transaction], Outcome]) -> None:
        await self._core.write_for(self._body, unit)
