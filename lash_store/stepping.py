"""Owns how a body does things once: what came of a step is remembered, and given to later attempts instead of running it."""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any

from . import guest, memory, queries, recall, step_queries, transitions, translation
from .bodies import PAUSES, Body, Escaped, Try, trying
from .core import Core
from .errors import (
    CommitInDoubt,
    IdempotencyConflict,
    InvalidArguments,
    LimitExceeded,
    ResultNotSerializable,
    StaleAttempt,
    StepFailed,
    StepInDoubt,
    StorageError,
    StorageMoved,
    StoreClosed,
    StoreError,
    shown,
)
from .failures import failure_of
from .guest import GuestError
from .memory import PutOff, StepNote
from .models import StepKind, StepState, StopReason, Verdict, check_id
from .policies import RetryRule
from .registry import to_json
from .step_queries import SignalRow, StepRow
from .threads import in_thread
from .transaction import Transaction, utc_text
from .transitions import Outcome

__all__ = ["Steps"]

_SHOW = 0.25
"""Seconds after which a step that still runs is noted as begun, for whoever looks into the file."""

_NOT_ITS_OWN = (StaleAttempt, StoreClosed, CommitInDoubt, StorageMoved, Escaped)
"""What ends the body, and says nothing about the step."""


class _Used:
    """
    What a name stands for in this attempt.

    *note* is what it came to, until that is stored; *storing* is its way there.
    """

    __slots__ = ("digest", "is_over", "kind", "lock", "note", "storing")

    def __init__(self, kind: StepKind, digest: bytes | None) -> None:
        self.kind = kind
        self.digest = digest
        self.lock = asyncio.Lock()
        self.is_over = False
        self.note: StepNote | None = None
        self.storing: _Storing | None = None


class _Storing:
    """
    The way of a note into the file: it goes on whoever is cancelled. Who has the lock of the step waits for it, one at a time.

    What `asyncio.shield` does, without a second future and another turn of the loop.
    """

    __slots__ = ("_answer", "_waiter")

    def __init__(self) -> None:
        self._answer: tuple[Outcome | None, BaseException | None] | None = None
        self._waiter: asyncio.Future[None] | None = None

    def tell(self, outcome: Outcome | None, error: BaseException | None) -> None:
        """Learn what became of it."""
        self._answer = outcome, error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def outcome(self) -> Outcome:
        """Wait for what became of it, and return or raise that."""
        if self._answer is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        assert self._answer is not None
        outcome, error = self._answer
        if error is not None:
            raise error
        assert outcome is not None
        return outcome


class Steps:
    """
    The steps of one attempt.

    *pause_until* waits for a time as a body does; *give_back* takes the signals of a try that came to nothing.
    """

    def __init__(
        self,
        body: Body,
        core: Core,
        *,
        pause_until: Callable[[float], Awaitable[None]],
        give_back: Callable[[Sequence[SignalRow]], None],
    ) -> None:
        self._body = body
        self._core = core
        self._pause_until = pause_until
        self._give_back = give_back
        self._used: dict[str, _Used] = {}
        self._failed_inside: dict[str, set[str]] = {}
        self._again_inside = Counter[str]()
        self._earlier: set[tuple[str, str]] | None = set() if body.fence.attempt == 1 else None
        self._loading = asyncio.Lock()

    async def run(
        self,
        name: str,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        rule: RetryRule,
        timeout: float | None,
        at_most_once: bool,
    ) -> Any:
        """Return what a step came to, running it unless that is remembered; see `TaskContext.step`."""
        if not callable(fn):
            if inspect.iscoroutine(fn):
                fn.close()
            raise InvalidArguments(f"step {shown(name)} is given a function to call, not {type(fn).__name__}")
        used = self._use(StepKind.STEP, name, recall.digest(args, kwargs))
        async with used.lock:
            await self._settle(used)
            before = await self._before(StepKind.STEP, name, used)
            if before is not None and StepState(before.state).is_over:
                return self._again(before, fn)
            if before is not None and before.state == StepState.BEGUN and at_most_once:
                raise StepInDoubt(
                    f"step {name!r} of task {self._body.task.id!r} was begun by attempt {before.attempt}, which did not see "
                    "its end: look outside whether it took effect, and go on by another name",
                    task_id=self._body.task.id,
                )
            return await self._try(
                used, name, before, lambda: self._call(fn, args, kwargs, timeout), fn, rule, at_most_once
            )

    async def transact(self, name: str, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a step on this file came to, running it unless that is remembered; see `TaskContext.transact`."""
        if not callable(fn) or inspect.iscoroutinefunction(fn):
            raise InvalidArguments(
                f"step {shown(name)}: transact() is given a plain function, which runs in a transaction"
            )
        body, begun_at = self._body, utc_text(time.time())
        used = self._use(StepKind.TRANSACT, name, recall.digest(args, kwargs))
        what = f"the result of step {name!r} of task {body.task.id!r}"

        def work(tx: Transaction) -> str:
            try:
                text = to_json(guest.run_guest(tx, fn, *args, **kwargs), what)
                recall.typed(fn, text, name)
                return self._core.limits.check_payload(text, what)
            except (ResultNotSerializable, LimitExceeded) as error:
                raise GuestError(error) from error

        async with used.lock:
            await self._settle(used)
            before = await self._before(StepKind.TRANSACT, name, used)
            if before is not None and StepState(before.state).is_over:
                return self._again(before, fn)
            try:
                outcome, row = await self._core.writing.run(
                    lambda tx: memory.run_step(tx, body.task, body.fence, name, begun_at, work)
                )
            except (GuestError, StorageError) as error:
                refused = guest.guests_error(error)
                if refused is None:
                    raise
                if not isinstance(refused, Exception):
                    raise Escaped(refused) from refused
                await self._end(used, self._failed(StepKind.TRANSACT, name, refused, 1, begun_at))
                raise refused from None
            if row is None:
                raise transitions.stale(outcome.task, body.fence.attempt)
            used.is_over = True
            return self._again(row, fn)

    # --- what is known of a name ---

    def _use(self, kind: StepKind, name: str, digest: bytes | None) -> _Used:
        """
        Take a name for this attempt.

        Raises:
            IdempotencyConflict: it was used in it, for something else.
        """
        check_id("step name", name)
        if name in self._outer():
            raise IdempotencyConflict(
                f"step {name!r} of task {self._body.task.id!r} asks for itself: give the inner one a name of its own",
                task_id=self._body.task.id,
            )
        used = self._used.setdefault(name, _Used(kind, digest))
        if used.kind is not kind:
            raise IdempotencyConflict(
                f"step {name!r} of task {self._body.task.id!r} is one by {used.kind}(): give that by {kind}() another name",
                task_id=self._body.task.id,
            )
        if None not in {used.digest, digest} and used.digest != digest:
            raise IdempotencyConflict(
                f"step {name!r} was used in this attempt of task {self._body.task.id!r} with other arguments: "
                "a name is one step; in a loop, give each turn its own",
                task_id=self._body.task.id,
            )
        return used

    async def _before(self, kind: StepKind, name: str, used: _Used) -> StepRow | None:
        """Return what is remembered of a step; the file is asked only if there may be something."""
        if self._earlier is None:
            async with self._loading:
                if self._earlier is None:
                    names = await self._core.reader.rows(step_queries.STEP_NAMES, {"task_seq": self._body.task_seq})
                    self._earlier = {(row[0], row[1]) for row in names}
        if not used.is_over and (kind, name) not in self._earlier:
            return None
        key = {"task_seq": self._body.task_seq, "kind": kind, "name": name}
        rows = await self._core.reader.rows(step_queries.STEP, key)
        return StepRow._make(rows[0]) if rows else None

    def _outer(self) -> list[str]:
        """Return the names of the steps that the caller runs in."""
        return sorted({one.step for one in self._body.tries()})

    def _tell_outer(self, name: str) -> None:
        """Have the steps that the caller runs in know of one in them that failed for good: their next try may try it again."""
        for outer in self._outer():
            self._failed_inside.setdefault(outer, set()).add(name)

    def _again(self, row: StepRow, fn: Callable[..., Any]) -> Any:
        if row.state == StepState.DONE:
            return recall.typed(fn, row.value, row.name)
        with queries.readable(f"step {row.name!r} of task #{row.task_seq}"):
            failure, again = step_queries.failure_of_step(row.failure or "{}")
        self._tell_outer(row.name)
        message = f"step {row.name!r} failed in attempt {row.attempt}: {failure.type}: {failure.message}"
        told = StepFailed(message, task_id=self._body.task.id, failure=failure)
        raised = recall.as_before(failure, again, self._body.task.id)
        if raised is None:
            raise told
        raise raised from told

    # --- running ---

    async def _try(
        self,
        used: _Used,
        name: str,
        before: StepRow | None,
        call: Callable[[], Awaitable[Any]],
        fn: Callable[..., Any],
        rule: RetryRule,
        at_most_once: bool,
    ) -> Any:
        """Run a step until it succeeds or fails for good, and return its result as later attempts read it, once remembered."""
        body, what = self._body, f"the result of step {name!r} of task {self._body.task.id!r}"
        tries = 0 if before is None else before.tries
        if before is not None and before.state == StepState.RETRYING and before.wake_at is not None:
            with queries.readable(f"step {name!r} of task #{body.task_seq}"):
                due = datetime.fromisoformat(before.wake_at).timestamp()
            await self._pause_until(min(due, time.time() + rule.backoff.maximum))
        while True:
            begun_at, this = utc_text(time.time()), Try(body, name, tries + 1, self._again_inside[name])
            begun = StepNote(StepKind.STEP, name, StepState.BEGUN, tries=tries, begun_at=begun_at)
            has_result = False
            if at_most_once:
                await self._note(begun)
                # asked for again in this attempt, it is in doubt as well
                assert self._earlier is not None
                self._earlier.add((begun.kind, begun.name))
            try:
                result = await self._once(begun, call, this, is_noted=at_most_once)
                has_result = True
                text = self._core.limits.check_payload(to_json(result, what), what)
                value = recall.typed(fn, text, name)
            except Exception as error:
                if body.stop_reason not in {None, StopReason.CANCEL} or isinstance(error, _NOT_ITS_OWN):
                    self._give_back(this.received)
                    raise
                tries += 1
                failed = self._failed(
                    StepKind.STEP, name, error, tries, begun_at, this.received, at_most_once=at_most_once
                )
                # a result that cannot be stored would not be another time
                if tries >= rule.max_attempts or has_result or not rule.wants(error):
                    await self._end(used, failed)
                    raise
            except BaseException:
                self._give_back(this.received)
                raise
            else:
                taken = tuple(row.signal_seq for row in this.received)
                done = StepNote(
                    StepKind.STEP, name, StepState.DONE, value=text, tries=tries + 1, begun_at=begun_at, taken=taken
                )
                await self._end(used, done)
                return value
            self._give_back(this.received)
            wake_at = time.time() + rule.backoff.delay(tries)
            await self._put_off(failed, wake_at)
            await self._pause_until(wake_at)

    async def _once(
        self,
        begun: StepNote,
        call: Callable[[], Awaitable[Any]],
        this: Try,
        *,
        is_noted: bool,
    ) -> Any:
        """Run a step's function once, noting that it begins once it takes long, unless that *is_noted* already."""
        if is_noted:
            return await self._within(this, call)
        noting = asyncio.get_running_loop().call_later(_SHOW, self._show, begun)
        try:
            return await self._within(this, call)
        finally:
            noting.cancel()

    @staticmethod
    async def _within(this: Try, call: Callable[[], Awaitable[Any]]) -> Any:
        before = trying.set(this)
        try:
            return await call()
        except (SystemExit, KeyboardInterrupt) as error:
            # it is the body's, not the loop's, in whatever task of the body it is raised
            raise Escaped(error) from error
        finally:
            trying.reset(before)

    async def _call(
        self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float | None
    ) -> Any:
        if inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(getattr(fn, "__call__", None)):  # noqa: B004
            if timeout is None:
                return await fn(*args, **kwargs)
            async with asyncio.timeout(timeout):
                return await fn(*args, **kwargs)
        async with asyncio.timeout(None) as limit:
            async with self._core.threads:
                if timeout is not None:
                    limit.reschedule(asyncio.get_running_loop().time() + timeout)
                result = await in_thread(fn, *args, **kwargs)
            # what it waits for may need a thread itself
            return await result if inspect.isawaitable(result) else result

    def _failed(
        self,
        kind: StepKind,
        name: str,
        error: BaseException,
        tries: int,
        begun_at: str,
        received: Sequence[SignalRow] = (),
        *,
        at_most_once: bool = False,
    ) -> StepNote:
        said = json.loads(failure_of(error))
        said["again"] = recall.to_raise_again(error)
        taken = tuple(row.signal_seq for row in received)
        within = self._outer()
        if within:
            said["again"]["within"] = within
        if taken:
            said["again"]["taken"] = taken
        if at_most_once:
            # no retry of the task may forget it
            said["again"]["at_most_once"] = True
        return StepNote(
            kind,
            name,
            StepState.FAILED,
            tries=tries,
            failure=json.dumps(said),
            begun_at=begun_at,
            taken=taken,
        )

    def _show(self, begun: StepNote) -> None:
        self._core.writing.post(lambda tx: memory.note_step(tx, self._body.task, self._body.fence, begun))

    async def _end(self, used: _Used, note: StepNote) -> None:
        """Remember what a step came to; asked for again in this attempt, the file tells."""
        if note.state is StepState.FAILED:
            self._tell_outer(note.name)
        used.note = note
        await self._settle(used)

    async def _settle(self, used: _Used) -> None:
        """
        See what a step came to into the file: what was done must not be done again.

        A full or busy disk is tried again, and so is a file that somebody may repair. A caller who is cancelled meanwhile stops
        nothing, and the next one waits for it.
        """
        pause = PAUSES[0]
        while used.note is not None:
            note = used.note
            try:
                if used.storing is None:
                    storing = _Storing()
                    self._core.writing.tell(
                        lambda tx, note=note: memory.note_step(tx, self._body.task, self._body.fence, note),  # type: ignore[misc]
                        storing.tell,
                    )
                    used.storing = storing
                outcome = await used.storing.outcome()
            except StoreError as error:
                used.storing = None
                is_stopping = self._body.stop_reason not in {None, StopReason.CANCEL}
                if is_stopping or not isinstance(error, StorageError) or not translation.may_pass(error):
                    used.note = None
                    # it may have been refused at once: a body that tries again and again must not keep the loop to itself
                    await asyncio.sleep(0)
                    raise
                self._core.tell_of_damage(self._body.task_seq, error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, PAUSES[1])
            else:
                used.note = used.storing = None
                if outcome.verdict is not Verdict.APPLIED:
                    raise transitions.stale(outcome.task, self._body.fence.attempt)
                used.is_over = True

    async def _put_off(self, failed: StepNote, wake_at: float) -> None:
        """Note when a step is tried next. What failed for good in it is then tried again, too, and handed its signals again."""
        # what was received in it goes to the next try
        note = failed._replace(state=StepState.RETRYING, wake_at=utc_text(wake_at), taken=())
        body, inside = self._body, tuple(self._failed_inside.get(note.name, ()))

        def noted(answer: PutOff | None, _: BaseException | None) -> None:
            # whether or not the caller is still there to hear of it
            if answer is not None and answer.outcome.verdict is Verdict.APPLIED:
                self._failed_inside.pop(note.name, None)
                self._again_inside.update(answer.forgotten)
                for name in answer.forgotten:
                    if name in self._used and not self._used[name].lock.locked():
                        del self._used[name]
                self._give_back(answer.untaken)

        answer = await self._core.writing.run(lambda tx: memory.put_off(tx, body.task, body.fence, note, inside), noted)
        if answer.outcome.verdict is not Verdict.APPLIED:
            raise transitions.stale(answer.outcome.task, body.fence.attempt)

    async def _note(self, note: StepNote) -> None:
        """Note that a step begins."""
        await self._core.write_for(self._body, lambda tx: memory.note_step(tx, self._body.task, self._body.fence, note))
