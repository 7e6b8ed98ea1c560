"""Owns what the end of a body means: the command that stores it, and what is stored with it in the same transaction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from . import guest, memory, step_queries, transitions
from .bodies import Body, Escaped, FailedWith
from .commands import Command, Complete, ConfirmCancel, Fail, Retry
from .errors import LimitExceeded, ResultNotSerializable, StepFailed, StoreClosed, TaskCancelled
from .failures import failure_of
from .models import StopReason, Verdict
from .policies import Limits
from .readings import Reading
from .registry import to_json
from .transaction import Transaction, utc_text
from .transitions import Outcome

__all__ = ["end", "failed", "outcome_of"]


def outcome_of(body: Body, limits: Limits) -> Command | None:
    """Say what to store for a body whose coroutine is done; None if it may store nothing."""
    coroutine = body.coroutine
    assert coroutine is not None
    if body.stop_reason is StopReason.STALE:
        _ = coroutine.cancelled() or coroutine.exception()
        return None
    if coroutine.cancelled():
        return _cancelled(body)
    error = coroutine.exception()
    if isinstance(error, Escaped):
        error = error.error
    if error is not None:
        return _raised(body, error)
    what = f"the result of task {body.task.id!r}"
    try:
        return Complete(body.fence, limits.check_payload(to_json(coroutine.result(), what), what))
    except (ResultNotSerializable, LimitExceeded) as not_storable:
        return Fail(body.fence, failure_of(not_storable))


def failed(body: Body, error: BaseException) -> Command:
    """Say what to store of what a body raised: that it is tried again, if its function says so, or how it failed."""
    failure = error.failure.model_dump_json() if isinstance(error, StepFailed | FailedWith) else failure_of(error)
    return _try_again_or_fail(body, error, failure)


def _cancelled(body: Body) -> Command | None:
    match body.stop_reason:
        case StopReason.CANCEL:
            return ConfirmCancel(body.fence)
        case StopReason.TIMEOUT | StopReason.DETACH if body.timed_out is not None:
            return _timed_out(body, body.timed_out)
        case StopReason.DETACH:
            return None
    return Fail(body.fence, failure_of(asyncio.CancelledError("nobody asked for it")))


def _raised(body: Body, error: BaseException) -> Command | None:
    match body.stop_reason:
        case StopReason.CANCEL if _is_cancel(error):
            return ConfirmCancel(body.fence)
        case StopReason.TIMEOUT | StopReason.DETACH if body.timed_out is not None:
            return _timed_out(body, body.timed_out)
        case StopReason.DETACH if _came_of_closing(body, error):
            return None
    return failed(body, error)


def _timed_out(body: Body, failure: str) -> Command:
    # also if the store closed before it had ended: its time was up all the same
    return _try_again_or_fail(body, TimeoutError(), failure)


def _is_cancel(error: BaseException) -> bool:
    """Whether a body was told by those it waited for what it was told itself: that they are cancelled."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_is_cancel, error.exceptions))
    return isinstance(error, TaskCancelled | asyncio.CancelledError)


def _came_of_closing(body: Body, error: BaseException) -> bool:
    """
    Whether what a body raised is what a closing store does to it, however it was put: that is no failure of its own.

    Work that may be run again is given back then; a failure that was its own will come again.
    """
    if isinstance(error, StoreClosed):
        return True
    return body.task.may_rerun and any(isinstance(one, StoreClosed | asyncio.CancelledError) for one in _chain(error))


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception with all it groups, came from, or came amid."""
    found: list[BaseException] = []
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is None or any(one is seen for seen in found):
            continue
        found.append(one)
        left += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            left += one.exceptions
    return found


def _try_again_or_fail(body: Body, error: BaseException, failure: str) -> Command:
    rule = None if body.function is None else body.function.retry
    if rule is None or not rule.wants(error) or not body.may_be_retried:
        return Fail(body.fence, failure)
    pause = rule.backoff.delay(body.task.attempts_spent + 1)
    return Retry(body.fence, failure, utc_text(time.time() + pause))


def end(tx: Transaction, body: Body, command: Command, readings: Sequence[Reading]) -> Sequence[Reading]:
    """
    Store how a body ended; with its result, what its program stores in the same transaction.

    If that is the task's end, the notes of the *readings* that wait for it are made, too: return those that have theirs.
    """
    outcome = _end(tx, body, command)
    if not readings or outcome.verdict is not Verdict.APPLIED or not outcome.task.is_terminal:
        return ()
    return [reading for reading in readings if reading.mark(tx)]


def _end(tx: Transaction, body: Body, command: Command) -> Outcome:
    if isinstance(command, Retry):
        return memory.retry(tx, body.task, command)
    outcome = transitions.transition(tx, body.task, command, fresh=False)
    if isinstance(command, Complete) and outcome.verdict is Verdict.APPLIED:
        for ending in body.endings:
            guest.run_guest(tx, ending)
        if body.received:
            step_queries.take_signals(tx, body.received, body.fence.attempt)
    return outcome
