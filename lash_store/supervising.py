"""
Owns one run of a monitor: starts its process once that is recorded, stores what it writes, and leaves nothing of it behind.

It is the body of a monitor's task: the task has ended only when the whole group has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

from . import launching, monitoring, processes, programs, transitions
from .bodies import PAUSES, Body, FailedWith
from .core import Core
from .errors import StoreError
from .launching import Exit, Launched
from .lines import Batch, Lines
from .models import Failure, ProcessFate, StopReason, Verdict
from .monitor_models import MonitorSpec
from .pipes import Output
from .programs import Program
from .threads import in_thread
from .translation import may_pass
from .writer import Unit

__all__ = ["Supervisor", "program_of", "supervise"]

T = TypeVar("T")
log = logging.getLogger(__name__)

_EVERY = 0.1
"""Seconds between two commits of what one monitor writes."""

_MOST_WAITING = 1024 * 1024
"""Bytes of one monitor's lines that wait to be stored."""

_LOOK_AGAIN = 0.5
"""Seconds between tries to end a group that hangs in the kernel, or to see how it stands."""


async def supervise(supervisor: Supervisor, spec: MonitorSpec) -> dict[str, int]:
    """Run a monitor; the function of every monitor's task."""
    return await supervisor.run(spec)


def program_of(spec: MonitorSpec) -> Program:
    """
    Find what a spec wants to be run.

    Raises:
        InvalidArguments: there is no such program or folder.
    """
    return programs.resolve(
        spec.arguments, spec.cwd or str(os.curdir), programs.environment(spec.env, spec.inherit_env)
    )


class Supervisor:
    """Runs the process of one attempt of a monitor."""

    def __init__(self, body: Body, core: Core) -> None:
        self._body = body
        self._core = core
        self._asked = threading.Event()
        self._hurry = threading.Event()
        self._exited = asyncio.Event()
        self._news = asyncio.Event()
        self._before = 0
        self._unstored: Batch | None = None

    async def run(self, spec: MonitorSpec) -> dict[str, int]:
        """
        Run a monitor's process to its end and return its exit status.

        Raises:
            FailedWith: it ended otherwise than with status 0.
            InvalidArguments, OSError: it could not be started.
        """
        program = await in_thread(program_of, spec)
        loop = asyncio.get_running_loop()
        launched = await self._whole(in_thread(launching.launch, program, secrets.token_hex(16), loop))
        output = Output(launched, self._lines(spec), self._news)
        storing: asyncio.Task[None] | None = None
        error: BaseException | None = None
        try:
            if self._asked.is_set():
                raise asyncio.CancelledError("the monitor was stopped while it was being started")
            await self._record(launched, spec)
            await self._whole(in_thread(launched.open_gate, self._asked))
            storing = asyncio.create_task(self._store(output, spec), name=f"lash_store lines {spec.id}")
            output.open()
            if not self._asked.is_set():
                await self._until_exit(launched, storing)
        except GeneratorExit:
            # the loop has gone, and nothing can be waited for
            launched.kill()
            output.close()
            raise
        except asyncio.CancelledError as raised:
            # who asks for the end of what has ended by itself, unnoticed yet, comes too late
            if storing is None or self._must_hurry() or _status(launched) is None:
                error = raised
                self._asked.set()
        except BaseException as raised:
            error = raised
        was_asked = self._asked.is_set()
        status = await self._whole(self._finish(launched, output, storing, spec))
        if error is not None:
            raise error
        if was_asked:
            raise asyncio.CancelledError("the monitor was stopped")
        if status is None or status != 0:
            said = (
                "its exit status was lost: another part of this process waited for it"
                if status is None
                else str(status)
            )
            raise FailedWith(Failure(type="ProcessFailed", message=said))
        return {"exit_status": int(status)}

    def _lines(self, spec: MonitorSpec) -> Lines:
        limits = self._core.limits
        return Lines(
            keep=spec.keep_lines,
            line_bytes=limits.line_bytes,
            rate=limits.lines_per_second,
            most_bytes=_MOST_WAITING,
            now=asyncio.get_running_loop().time(),
        )

    async def _record(self, launched: Launched, spec: MonitorSpec) -> None:
        """Commit which process it is; only then does it begin."""
        text = launched.identity.model_dump_json()
        task, fence = self._body.task, self._body.fence
        outcome, self._before = await self._stored(lambda tx: monitoring.record_process(tx, task, fence, spec, text))
        if outcome.stale:
            raise transitions.stale(outcome.task, fence.attempt)
        if outcome.verdict is not Verdict.APPLIED:
            # its cancel was requested, which this body is about to be told
            await self._body.stopping.wait()
            raise asyncio.CancelledError("the monitor was cancelled before it began")

    async def _until_exit(self, launched: Launched, storing: asyncio.Task[None]) -> None:
        """Wait until the process has ended, or what it writes cannot be stored any more."""
        with _exit_watched(launched, self._exited):
            exited = asyncio.create_task(self._exited.wait(), name="lash_store exit")
            try:
                await asyncio.wait({exited, storing}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                if not exited.get_loop().is_closed():
                    exited.cancel()
        if storing.done():
            storing.result()

    async def _finish(
        self,
        launched: Launched,
        output: Output,
        storing: asyncio.Task[None] | None,
        spec: MonitorSpec,
    ) -> Exit | None:
        """End what is left of the group, store what it wrote last, and leave nothing open; return how it ended."""
        try:
            if self._body.stop_reason is StopReason.STALE or (self._asked.is_set() and self._body.stop_reason is None):
                self._hurry.set()
            launched.shut_gate()
            await self._end_group(launched, self._core.cancel_grace if storing is not None else 0.0)
            status = _status(launched)
            if storing is not None:
                storing.cancel()
                await asyncio.wait({storing})
                if not storing.cancelled() and storing.exception() is not None:
                    log.warning("lines_lost", extra={"task_seq": self._body.task_seq}, exc_info=storing.exception())
                output.drain()
                if not self._hurry.is_set():
                    await self._store_rest(output, spec, status)
            return status
        finally:
            output.close()
            launching.reap(launched.pid)

    async def _end_group(self, launched: Launched, grace: float) -> None:
        """End the whole group, however long that takes, unless it is somebody else's to wait for it."""
        while True:
            try:
                fate = await in_thread(processes.end_group, launched.identity, grace, self._hurry, is_ours=True)
                if fate is not ProcessFate.LEFT or self._hurry.is_set():
                    return
            except asyncio.CancelledError:
                # the loop itself goes away, without a word
                self._hurry.set()
                launched.kill()
                raise
            except (OSError, RuntimeError):
                # no descriptor or no thread to be had: as long as it is not waited for, its number is its own
                log.warning("process_unseen", extra={"pid": launched.pid}, exc_info=True)
                if self._asked.is_set() or self._hurry.is_set():
                    launched.kill()
            log.warning("process_left", extra={"pid": launched.pid, "task_seq": self._body.task_seq})
            await asyncio.sleep(_LOOK_AGAIN)

    # --- storing what it writes ---

    async def _store(self, output: Output, spec: MonitorSpec) -> None:
        """Store lines as they come, several a commit."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._unstored = output.take()
            if self._unstored.says_something:
                await self._commit(spec, None)
            await asyncio.sleep(_EVERY)
            if output.has_news:
                self._news.set()

    async def _store_rest(self, output: Output, spec: MonitorSpec, status: Exit | None) -> None:
        try:
            await self._commit(spec, None)
            self._unstored = output.take(is_last=True)
            await self._commit(spec, status)
        except StoreError:
            # fenced out, or the file is out of reach: whose task it is now tells the rest
            log.warning("lines_lost", extra={"task_seq": self._body.task_seq}, exc_info=True)

    async def _commit(self, spec: MonitorSpec, status: Exit | None) -> None:
        """
        Store the batch that is not yet, if there is one.

        Raises:
            StaleAttempt: the task is another attempt's.
        """
        batch, task, fence, before = self._unstored, self._body.task, self._body.fence, self._before
        if batch is None:
            return
        ended = None if status is None else int(status)
        outcome = await self._stored(lambda tx: monitoring.store_lines(tx, task, fence, spec, batch, before, ended))
        self._unstored = None
        if outcome.stale:
            raise transitions.stale(outcome.task, fence.attempt)

    async def _stored(self, unit: Unit[T]) -> T:
        """Commit, trying again for as long as the store is open: a full disk must not end what is watched."""
        pause = PAUSES[0]
        while True:
            try:
                return await self._shielded(self._core.writing.submit(unit))
            except StoreError as error:
                if self._hurry.is_set() or not may_pass(error):
                    raise
                log.warning("monitor_not_stored", extra={"task_seq": self._body.task_seq}, exc_info=True)
                self._core.tell_of_damage(self._body.task_seq, error)
                await asyncio.sleep(pause)
                pause = min(PAUSES[1], pause * 2)

    async def _shielded(self, stored: asyncio.Future[T]) -> T:
        """Wait for a commit that goes on without who waits: what is in the file is not stored again."""
        cancelled: asyncio.CancelledError | None = None
        while not stored.done():
            try:
                await asyncio.wait({stored})
            except asyncio.CancelledError as error:
                cancelled = error
                if self._hurry.is_set():
                    break
        if cancelled is None:
            return stored.result()
        if stored.done() and not stored.cancelled() and stored.exception() is None:
            self._unstored = None
        raise cancelled

    async def _whole(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """
        Do something to its end, whoever wants to stop this body meanwhile, and remember that somebody did.

        Once the task is another's, or the loop goes away without a word, nothing is waited for that can be hurried.
        """
        doing = asyncio.create_task(coroutine, name=f"lash_store monitor {self._body.task.id}")
        while not doing.done():
            try:
                await asyncio.wait({doing})
            except asyncio.CancelledError:
                self._asked.set()
                if self._must_hurry():
                    self._hurry.set()
        return doing.result()

    def _must_hurry(self) -> bool:
        """Whether this body was cancelled because the task is another's, or without a word as the loop goes away."""
        return self._body.stop_reason in {None, StopReason.STALE}


def _status(launched: Launched) -> Exit | None:
    try:
        return launched.exit()
    except ChildProcessError:
        return None


@contextlib.contextmanager
def _exit_watched(launched: Launched, exited: asyncio.Event) -> Iterator[None]:
    """Set an event once a child has ended, without reaping it."""
    loop = asyncio.get_running_loop()
    try:
        descriptor = os.pidfd_open(launched.pid)
    except (AttributeError, OSError):
        # no such thing on this system, or none to be had
        looking = asyncio.create_task(_look_for_exit(launched, exited), name="lash_store exit")
        try:
            yield
        finally:
            looking.cancel()
        return
    loop.add_reader(descriptor, exited.set)
    try:
        yield
    finally:
        if not loop.is_closed():
            loop.remove_reader(descriptor)
        os.close(descriptor)


async def _look_for_exit(launched: Launched, exited: asyncio.Event) -> None:
    with contextlib.suppress(ChildProcessError):
        while launched.exit() is None:
            await asyncio.sleep(0.05)
    exited.set()
