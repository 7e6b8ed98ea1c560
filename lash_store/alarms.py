"""Owns what is to happen at a time of the wall clock: one timer for all of it, however many wait."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import time
from collections.abc import Callable

__all__ = ["Alarm", "Alarms"]

log = logging.getLogger(__name__)

_LOOK = 20.0
"""Seconds between looks at the wall clock while something is far off: it may be set, and a machine may sleep."""

_JUMP = 0.5
"""Seconds the wall clock must gain on the loop's to count as set forward."""


class Alarm:
    """One thing that is to happen at *at*, in seconds since the epoch; `cancel` undoes it."""

    __slots__ = ("_alarms", "at", "call", "due")

    def __init__(self, alarms: Alarms, at: float, due: float, call: Callable[[], None]) -> None:
        self._alarms = alarms
        self.at = at
        self.due = due
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Let it not happen."""
        if self.call is not None:
            self.call = None
            self._alarms.tidy_up()


class Alarms:
    """
    Calls functions on the loop when their time has come.

    The wall clock says when, and the loop's clock bounds the wait: one set back makes nothing later than it was to be when it was
    asked for; one set forward, or a machine that slept, is noticed within 20 seconds.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Alarm]] = []
        self._count = itertools.count()
        self._timer: asyncio.TimerHandle | None = None
        self._wakes = float("inf")
        self._ahead = 0.0
        self._cancelled = 0
        self._is_closed = False

    def at(self, when: float, call: Callable[[], None]) -> Alarm:
        """Have a function called at a time in seconds since the epoch; at once, on the loop, if that has passed."""
        now = asyncio.get_running_loop().time()
        ahead = time.time() - now
        if not self._heap:
            self._ahead = ahead
        if self._is_closed:
            return Alarm(self, when, float("inf"), call)
        alarm = Alarm(self, when, now + max(0.0, when - time.time()), call)
        heapq.heappush(self._heap, (alarm.due, next(self._count), alarm))
        self._set_timer(now)
        return alarm

    def tidy_up(self) -> None:
        """Learn that one was cancelled, and forget those that were once they are the most."""
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    def close(self) -> None:
        """Call nothing any more."""
        self._is_closed = True
        self._heap.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wakes = float("inf")

    def _set_timer(self, now: float) -> None:
        if not self._heap:
            return
        wakes = min(self._heap[0][0], now + _LOOK)
        if wakes >= self._wakes:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakes = wakes
        self._timer = asyncio.get_running_loop().call_at(wakes, self._ring)

    def _ring(self) -> None:
        self._timer, self._wakes = None, float("inf")
        now = asyncio.get_running_loop().time()
        self._follow_the_wall(now)
        while self._heap and (self._heap[0][0] <= now or self._heap[0][2].call is None):
            alarm = heapq.heappop(self._heap)[2]
            call, alarm.call = alarm.call, None
            if call is None:
                self._cancelled -= 1
                continue
            try:
                call()
            except Exception:
                log.exception("alarm_failed")
        self._set_timer(now)

    def _follow_the_wall(self, now: float) -> None:
        ahead = time.time() - now
        if ahead > self._ahead + _JUMP:
            wall = time.time()
            for _, _, alarm in self._heap:
                alarm.due = min(alarm.due, now + max(0.0, alarm.at - wall))
            self._heap = [(alarm.due, number, alarm) for _, number, alarm in self._heap]
            heapq.heapify(self._heap)
        self._ahead = ahead
