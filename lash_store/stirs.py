"""Owns when to look whether a file was written to: often while it is, hardly ever while the kernel says that nobody does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from pathlib import Path
from typing import Any

__all__ = ["Stirs"]

_TICK = 0.015
"""Seconds between looks while there is writing."""

_FIRST = (0.002, 0.004, 0.008)
"""The same right after the first write in a while: what was written is not committed before it is on the disk."""

_CALM = 1.0
"""Seconds without a write after which the kernel is left to tell of the next."""

_AT_MOST = 1.0
"""Seconds between looks in any case: a disk may take longer than *_CALM* to take what makes a commit of what was written."""

_WRITTEN, _GONE = 0x2, 0x400 | 0x800 | 0x2000
_HEADER = struct.Struct("iIII")


class Stirs:
    """
    Waits, between two looks at a file that others write to, for as long as makes sense.

    An idle loop is not woken then: to be woken every 15 ms costs more than one per cent of a slow core, whatever is done. Where
    the kernel has no inotify, or no more of it to give, and while there is no file, each wait is a short one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._looks = 0
        self._calm_at = self._try_at = 0.0

    async def next(self) -> None:
        """Wait until it is time to look."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        if self._descriptor < 0 and now >= self._try_at:
            self._try_at = now + _AT_MOST
            self._begin()
            self._calm_at = now + _CALM
        if self._descriptor >= 0 and self._was_written():
            self._calm_at = now + _CALM
        if self._descriptor >= 0 and now >= self._calm_at:
            await self._until_written(loop)
            return
        await asyncio.sleep(_FIRST[self._looks] if self._looks < len(_FIRST) else _TICK)
        self._looks += 1

    async def _until_written(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wait for the next write, or until it is time to look in any case."""
        stirred = asyncio.Event()
        try:
            loop.add_reader(self._descriptor, stirred.set)
        except NotImplementedError:
            self.close()
            self._try_at = float("inf")
            return
        with contextlib.suppress(TimeoutError):
            try:
                async with asyncio.timeout(_AT_MOST):
                    await stirred.wait()
                self._looks = 0
            finally:
                if not loop.is_closed():
                    loop.remove_reader(self._descriptor)

    def close(self) -> None:
        """Let the kernel's notices go."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        # a loop may die with everything on it
        self.close()

    def _begin(self) -> None:
        kernel = _inotify()
        if kernel is None:
            self._try_at = float("inf")
            return
        descriptor = kernel.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if descriptor < 0:
            return
        if kernel.inotify_add_watch(descriptor, os.fsencode(self._path), _WRITTEN | _GONE) < 0:
            os.close(descriptor)
            return
        self._descriptor = descriptor

    def _was_written(self) -> bool:
        """Take the notices that have come; once the file is not there any more, none will."""
        found = False
        with contextlib.suppress(BlockingIOError):
            while told := os.read(self._descriptor, 4096):
                found = True
                if any(mask & ~_WRITTEN for _, mask, _, _ in _HEADER.iter_unpack(told[: len(told) // 16 * 16])):
                    self.close()
                    break
        return found


def _inotify() -> Any:
    """Return the C library if it has the calls, which Python has no words for."""
    import ctypes

    try:
        library = ctypes.CDLL(None, use_errno=True)
        _ = library.inotify_init1, library.inotify_add_watch
    except (OSError, AttributeError):
        return None
    return library
