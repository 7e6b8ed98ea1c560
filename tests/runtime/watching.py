"""What tests of monitors share: specs of real processes that can be found again, and a look at what is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import MonitorRecord, MonitorSpec, SessionTasks, TaskHandle

_MARK = "LASH_TEST_MARK"

STAY = "while :; do sleep 100; done"
"""A line for the shell that goes on until it is ended."""

STUBBORN = (
    "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(1000)"
)
"""A Python program that does not heed SIGTERM, and says when it is there."""


class Watch:
    """Makes specs whose processes, and all those that they start, can be found in ``/proc``."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex

    def sh(self, id: str, line: str, **options: Any) -> MonitorSpec:
        """Have a line run by the shell."""
        options["env"] = {**options.get("env", {}), _MARK: self.mark}
        return MonitorSpec(id=id, command=line, shell=True, **options)

    def python(self, id: str, code: str, **options: Any) -> MonitorSpec:
        """Have a program run by Python."""
        options["env"] = {**options.get("env", {}), _MARK: self.mark}
        return MonitorSpec(id=id, command=[sys.executable, "-I", "-S", "-c", code], **options)

    def running(self) -> list[int]:
        """Return the processes that live, those that still wait at their gate included."""
        found = []
        for one in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if one.name.isdecimal() and f"{_MARK}={self.mark}".encode() in (one / "environ").read_bytes():
                    found.append(int(one.name))
        return found

    def kill(self) -> None:
        """End what is left, so that one test does not fail another."""
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def zombies() -> list[int]:
    """Return the children of this process that nobody has waited for."""
    found = []
    for one in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if one.name.isdecimal():
                fields = (one / "stat").read_text(errors="replace").rpartition(")")[2].split()
                if fields[0] == "Z" and int(fields[1]) == os.getpid():
                    found.append(int(one.name))
    return found


def pipes() -> set[str]:
    """Return the pipes and process descriptors that this process has open."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(link)  # noqa: PTH115, it is a word, not a path
            if target.startswith(("pipe:", "anon_inode:[pidfd")):
                found.add(f"{link.name} {target}")
    return found


def calls() -> list[str]:
    """Return the threads in which something blocks for a store."""
    return [one.name for one in threading.enumerate() if one.name == "lash_store call"]


@contextlib.contextmanager
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Hold that no process, zombie, pipe or thread is left of the monitors of a block."""
    watch = Watch()
    # who waits at a gate has all of this process's environment
    monkeypatch.setenv(_MARK, watch.mark)
    before = pipes()
    yield watch
    left: list[Any] = []
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        left = [*watch.running(), *zombies(), *(pipes() - before), *calls()]
        if not left:
            return
        time.sleep(0.01)
    watch.kill()
    raise AssertionError(f"left: {left}")


async def until(condition: Callable[[], Any]) -> Any:
    """Wait until something holds, and return it."""
    async with asyncio.timeout(20):
        while not (found := condition()):
            await asyncio.sleep(0.005)
    return found


async def until_so(condition: Callable[[], Awaitable[Any]]) -> Any:
    """Wait until something that is awaited holds, and return it."""
    async with asyncio.timeout(20):
        while not (found := await condition()):
            await asyncio.sleep(0.01)
    return found


async def said(session: SessionTasks, text: str, *, monitor: str | None = None) -> None:
    """Wait until a monitor has written a line."""

    async def is_there() -> bool:
        return any(one.text == text for one in await session.updates(unread=False, monitor=monitor))

    await until_so(is_there)


async def begun(task: TaskHandle) -> int:
    """Wait until the process of a monitor is recorded, and return its pid."""

    async def process() -> Any:
        record = await task.record()
        assert not record.state.is_terminal, record
        return record.process

    return int((await until_so(process)).pid)


async def monitor(session: SessionTasks, id: str) -> MonitorRecord:
    """Return one monitor of a session."""
    [found] = [one for one in await session.monitors() if one.id == id]
    return found


async def taken(session: SessionTasks, limit: int | None = None, **options: Any) -> list[str]:
    """Claim what a session's monitors wrote, deal with it, and return the lines."""
    async with asyncio.timeout(20):
        async with session.take_updates(limit, **options) as updates:
            return [one.text for one in updates]


def check_counts(record: MonitorRecord, kept: int, *, gone: int = 0) -> None:
    """Hold that every line that was written is kept, was dropped, or was acknowledged and is *gone*."""
    assert record.lines == kept + record.dropped + gone, record
