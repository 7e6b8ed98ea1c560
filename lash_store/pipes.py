"""Owns the pipes of a process: reads them into lines, no quicker than the loop can bear."""

from __future__ import annotations

import asyncio
import os

from .launching import Launched
from .lines import Batch, Lines
from .monitor_models import Stream

__all__ = ["Output"]

_CHUNK = 64 * 1024
_WINDOW = 0.1
_BYTES_A_WINDOW = 512 * 1024
_LINES_A_WINDOW = 10_000
"""A process that writes more than so much in so many seconds waits on its pipe: reading it would cost the loop too much."""

_MOST_DRAINED = 32
"""Chunks that are read of a pipe whose writers should all be gone."""


class Output:
    """
    Reads the two pipes of a process into lines, and sets *news* when there is something to store.

    A process that writes more than the loop can bear to read waits meanwhile.
    """

    def __init__(self, launched: Launched, lines: Lines, news: asyncio.Event) -> None:
        self._launched = launched
        self._lines = lines
        self._news = news
        self._loop = asyncio.get_running_loop()
        self._read: dict[Stream, int] = {}
        self._spent = self._spent_lines = 0
        self._window: asyncio.TimerHandle | None = None
        self._is_paused = self._was_held_up = False

    @property
    def has_news(self) -> bool:
        return self._lines.has_news

    def take(self, *, is_last: bool = False) -> Batch:
        held_up, self._was_held_up = self._was_held_up, self._is_paused
        return self._lines.take(self._loop.time(), is_last=is_last, was_held_up=held_up and not is_last)

    def open(self) -> None:
        """Begin to read."""
        self._read = {Stream.STDOUT: self._launched.output, Stream.STDERR: self._launched.errors}
        self._go_on()

    def drain(self) -> None:
        """Take what is in the pipes still; who has left the group may hold them open."""
        self._stop()
        for stream in list(self._read):
            for _ in range(_MOST_DRAINED):
                if not self._take_chunk(stream):
                    break
            self._lines.end(stream)

    def close(self) -> None:
        """Read no more."""
        self._stop()
        self._read.clear()
        self._launched.close()

    def _stop(self) -> None:
        self._pause()
        if self._window is not None:
            self._window.cancel()

    def _go_on(self) -> None:
        self._is_paused = False
        for stream, descriptor in self._read.items():
            self._loop.add_reader(descriptor, self._readable, stream)

    def _pause(self) -> None:
        self._is_paused = True
        for descriptor in self._read.values():
            self._loop.remove_reader(descriptor)

    def _readable(self, stream: Stream) -> None:
        self._take_chunk(stream)
        if self._lines.has_news:
            self._news.set()
        if self._window is None:
            self._window = self._loop.call_later(_WINDOW, self._next_window)
        if self._spent > _BYTES_A_WINDOW or self._spent_lines > _LINES_A_WINDOW:
            self._pause()
            self._was_held_up = True

    def _next_window(self) -> None:
        self._window = None
        self._spent = self._spent_lines = 0
        if self._is_paused:
            self._go_on()

    def _take_chunk(self, stream: Stream) -> bool:
        """Read once; say whether there may be more."""
        descriptor = self._read[stream]
        try:
            chunk = os.read(descriptor, _CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if chunk:
            self._spent += len(chunk)
            self._spent_lines += self._lines.feed(stream, chunk)
            return True
        self._loop.remove_reader(descriptor)
        del self._read[stream]
        self._lines.end(stream)
        return False
