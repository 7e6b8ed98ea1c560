"""Owns what the end of a body means: the command that stores it, and what is stored with it in the same transaction."""

from __future__ import annotations

import asyncio
import time

from . import guest, memory, step_queries, transitions
from .bodies import Body, Escaped
from .commands import Command, Complete, ConfirmCancel, Fail, Retry
from .database import Transaction, utc_text
from .errors import LimitExceeded, ResultNotSerializable, StepFailed, StoreClosed
from .failures import failure_of
from .models import StopReason, Verdict
from .policies import Limits
from .registry import to_json
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
    if isinstance(error, StoreClosed) and body.stop_reason is StopReason.DETACH:
        return None
    if error is not None:
        return _timed_out(body) or failed(body, error)
    what = f"the result of task {body.task.id!r}"
    try:
        return Complete(body.fence, limits.check_payload(to_json(coroutine.result(), what), what))
    except (ResultNotSerializable, LimitExceeded) as not_storable:
        return Fail(body.fence, failure_of(not_storable))


def failed(body: Body, error: BaseException) -> Command:
    """Say what to store of what a body raised: that it is tried again, if its function says so, or how it failed."""
    failure = error.failure.model_dump_json() if isinstance(error, StepFailed) else failure_of(error)
    return _try_again_or_fail(body, error, failure)


def _cancelled(body: Body) -> Command | None:
    if body.stop_reason is StopReason.CANCEL:
        return ConfirmCancel(body.fence)
    if body.stop_reason is StopReason.DETACH:
        return None
    return _timed_out(body) or Fail(body.fence, failure_of(asyncio.CancelledError("nobody asked for it")))


def _timed_out(body: Body) -> Command | None:
    if body.timed_out is None or body.stop_reason is not StopReason.TIMEOUT:
        return None
    return _try_again_or_fail(body, TimeoutError(), body.timed_out)


def _try_again_or_fail(body: Body, error: BaseException, failure: str) -> Command:
    rule = None if body.function is None else body.function.retry
    if rule is None or not rule.wants(error) or not body.may_be_retried:
        return Fail(body.fence, failure)
    pause = rule.backoff.delay(body.task.attempts_spent + 1)
    return Retry(body.fence, failure, utc_text(time.time() + pause))


def end(tx: Transaction, body: Body, command: Command) -> Outcome:
    """Store how a body ended; with its result, what its program stores in the same transaction."""
    if isinstance(command, Retry):
        return memory.retry(tx, body.task, command)
    outcome = transitions.transition(tx, body.task, command, fresh=False)
    if isinstance(command, Complete) and outcome.verdict is Verdict.APPLIED:
        for ending in body.endings:
            guest.run_guest(tx, ending)
        if body.received:
            step_queries.take_signals(tx, body.received, body.fence.attempt)
    return outcome
