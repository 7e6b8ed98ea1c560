"""Owns how many bodies may run at once, and how one that waits lets another run meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

__all__ = ["Slot", "Slots"]

T = TypeVar("T")


class Slots:
    """*most* slots; *on_free* is called when one has become free."""

    def __init__(self, most: int, on_free: Callable[[], None]) -> None:
        self._free = most
        self._on_free = on_free
        self._returning: deque[asyncio.Future[None]] = deque()

    @property
    def is_free(self) -> bool:
        """Whether a body may start now: one slot is free, and no body that waited wants it back."""
        while self._free > 0 and self._returning:
            waiter = self._returning.popleft()
            if not waiter.done():
                self._free -= 1
                waiter.set_result(None)
        return self._free > 0

    def take(self) -> None:
        """Take a slot, beyond the limit if there is none."""
        self._free -= 1

    def give_back(self) -> None:
        """Give one back."""
        self._free += 1
        self._on_free()

    def keep_until(self, done: asyncio.Future[Any]) -> None:
        """Keep one for the body that a commit may start, which takes its own, until that commit is answered."""
        self.take()
        done.add_done_callback(lambda _: self.give_back())

    @contextlib.contextmanager
    def reserved(self) -> Iterator[int]:
        """Keep every free slot for the bodies that one unit will start, and say how many there are."""
        reserved = max(0, self._free)
        self._free -= reserved
        try:
            yield reserved
        finally:
            self._free += reserved
            self._on_free()

    async def take_again(self) -> None:
        """Wait for a slot, before any body that has not started."""
        if self._free > 0:
            self._free -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._returning.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.give_back()
            raise


class Slot:
    """One body's slot, from its start to its end."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._is_held = True
        self._waits = 0
        self._is_over = False
        slots.take()

    async def wait(self, waiter: asyncio.Future[T]) -> T:
        """Wait for a future without the slot; it comes back when the last of the body's waits is over."""
        self._waits += 1
        if self._is_held:
            self._is_held = False
            self._slots.give_back()
        try:
            result = await waiter
        except BaseException:
            # a wait given up: its body goes on at once, beyond the limit if need be, for who has the slot may wait for it
            self._waits -= 1
            if self._waits == 0 and not self._is_over:
                self._slots.take()
                self._is_held = True
            raise
        self._waits -= 1
        # a task that the body left behind may outlive it
        if self._waits == 0 and not self._is_over:
            await self._slots.take_again()
            if self._is_over:
                self._slots.give_back()
            else:
                self._is_held = True
        return result

    def end(self) -> None:
        """Give the slot back for good: the body has ended."""
        self._is_over = True
        if self._is_held:
            self._is_held = False
            self._slots.give_back()
