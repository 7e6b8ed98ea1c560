"""Owns how many bodies may run at once, and how one that waits lets another run meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeVar

__all__ = ["Slot", "Slots"]

T = TypeVar("T")


class Slots:
    """*most* slots; *on_free* is called when one has become free."""

    def __init__(self, most: int, on_free: Callable[[], None]) -> None:
        self._free = most
        self._on_free = on_free
        self._returning: OrderedDict[Slot, None] = OrderedDict()

    @property
    def is_free(self) -> bool:
        """Whether a body may start now: one slot is free, and no body that waited wants it back."""
        while self._free > 0 and self._returning:
            self._returning.popitem(last=False)[0].grant()
        return self._free > 0

    def take(self) -> None:
        """Take a slot, beyond the limit if there is none: for a body, or for one that a commit may start until it is answered."""
        self._free -= 1

    def give_back(self) -> None:
        """Give one back."""
        self._free += 1
        self._on_free()

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

    def queue(self, slot: Slot) -> None:
        """Let a slot come back before any body that has not started."""
        self._returning[slot] = None
        if self.is_free:
            self._on_free()

    def withdraw(self, slot: Slot) -> None:
        """Forget that a slot was to come back."""
        self._returning.pop(slot, None)


class _Away:
    """A wait without the slot: as many stand as bodies wait, so it is a small one."""

    __slots__ = ("_slot",)

    def __init__(self, slot: Slot) -> None:
        self._slot = slot

    async def __aenter__(self) -> None:
        self._slot.leave()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        await self._slot.come_back(at_once=kind is not None)


class Slot:
    """
    One body's slot, from its start to its end, if it needs one.

    Every step but the waiting itself is taken at once, so none can cross.
    """

    def __init__(self, slots: Slots, *, is_needed: bool = True) -> None:
        self._slots = slots
        self._is_held = is_needed
        self._is_over = not is_needed
        self._is_hurried = False
        self._waits = 0
        self._back: asyncio.Future[None] | None = None
        if is_needed:
            slots.take()

    def away(self) -> _Away:
        """Do without the slot for a while; it comes back when the last of the body's waits is over."""
        return _Away(self)

    def leave(self) -> None:
        """Begin to wait without it."""
        self._waits += 1
        self._let_go()

    async def come_back(self, *, at_once: bool) -> None:
        """End a wait; what was given up is to go on *at once*."""
        self._waits -= 1
        if at_once or self._is_hurried:
            self._go_on()
        elif self._waits == 0 and not self._is_held and not self._is_over:
            await self._queue()

    async def wait(self, waiter: asyncio.Future[T]) -> T:
        """Wait for a future without the slot."""
        async with self.away():
            return await waiter

    def hurry(self) -> None:
        """End a wait for the slot, if the body is in one: it is to stop, and queues no more."""
        self._is_hurried = True
        if self._back is not None:
            self._back.cancel()

    async def _queue(self) -> None:
        self._back = back = asyncio.get_running_loop().create_future()
        self._slots.queue(self)
        try:
            await back
        except asyncio.CancelledError:
            if self._back is back:
                self._slots.withdraw(self)
                self._back = None
            self._go_on()
            raise

    def grant(self) -> None:
        """Take the slot again: it is this one's turn."""
        self._slots.take()
        self._is_held = True
        self._release()

    def end(self) -> None:
        """Give the slot back for good: the body has ended. A task it left behind may outlive it, without one."""
        self._is_over = True
        self._let_go()

    def _let_go(self) -> None:
        if self._back is not None:
            # it was to come back for an earlier wait, which now goes on without
            self._slots.withdraw(self)
            self._release()
        if self._is_held:
            self._is_held = False
            self._slots.give_back()

    def _go_on(self) -> None:
        # a wait given up: the body goes on at once, beyond the limit if need be, for who has the slot may wait for it
        if self._waits == 0 and not self._is_held and not self._is_over:
            self._slots.take()
            self._is_held = True

    def _release(self) -> None:
        back, self._back = self._back, None
        if back is not None and not back.done():
            back.set_result(None)
