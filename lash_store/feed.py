"""Owns those who wait: for the end of a task, for events, for other processes' commits; never changes a row."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Self, TypeVar

from . import queries, retention_queries
from .errors import StoreClosed, StoreError, shown
from .lifecycle import TERMINAL_EVENTS, Task
from .models import EventType, Scope, TaskEvent, check_word
from .reader import Reader
from .retention_queries import Gap
from .statements import names
from .stirs import Stirs
from .transaction import LAST_SEQ, Committed, Transaction
from .translation import DRIVER_ERRORS

__all__ = ["Feed", "Subscription"]

T = TypeVar("T")
log = logging.getLogger(__name__)

_PAGE = 500
_NOWHERE = 2**63
_BUFFER = 1_000
"""Events a slow subscriber may be handed directly; beyond that it pages from the table."""


class Page(NamedTuple):
    """
    Events behind a cursor, oldest first, and what is missing among them.

    *cursor* is where it brings its reader to: the newest event of the file if nothing more fits before it.
    """

    events: list[Committed]
    cursor: int
    gap: Gap | None


class Feed:
    """
    Wakes waiters and subscribers when something is committed, by this process or another.

    *changed* says whether another connection committed since it was last asked. *on_end* is told of each end in what others
    wrote before any waiter is, *on_foreign* of all of it after. *stirs* says when to ask. *sleep* is how a subscriber waits for
    more. *at_once* answers a small statement without a wait.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        changed: Callable[[], Awaitable[bool]],
        stirs: Stirs,
        on_end: Callable[[int], None],
        on_foreign: Callable[[Sequence[Committed]], Awaitable[None]],
        sleep: Callable[[asyncio.Event], Awaitable[object]],
        at_once: Callable[[str], Any],
    ) -> None:
        self._reader = reader
        self._changed = changed
        self._stirs = stirs
        self._on_end = on_end
        self._on_foreign = on_foreign
        self.sleep = sleep
        self._at_once = at_once
        self._waiters: dict[int, set[asyncio.Future[Task | None]]] = {}
        self._receivers: dict[int, set[asyncio.Future[None]]] = {}
        self._subscriptions: weakref.WeakSet[Subscription] = weakref.WeakSet()
        self._seen = 0
        self._acting = 0
        self._again = _NOWHERE
        self._watch: asyncio.Task[None] | None = None
        self.head = 0
        self.is_closed = False
        self.error: StoreError | None = None

    async def open(self) -> None:
        """Begin at the newest event of the file."""
        self._seen = self.head = (await self._reader.rows(LAST_SEQ, {}))[0][0]

    def watch(self) -> None:
        """Begin to look for other processes' commits."""
        self._watch = asyncio.create_task(self._look(), name="lash_store feed")

    async def close(self) -> None:
        """Stop looking; waiters get `StoreClosed`, subscriptions end."""
        self.is_closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
            self._watch = None
        self._stirs.close()
        self.stop(StoreClosed("the store was closed: open it again to go on waiting"))

    def stop(self, error: StoreError) -> None:
        """Wake everybody for the last time."""
        self.is_closed = True
        self.error = error
        waiting: list[asyncio.Future[Any]] = [one for some in self._waiters.values() for one in some]
        waiting += [one for some in self._receivers.values() for one in some]
        for waiter in waiting:
            if not waiter.done():
                waiter.set_exception(error)
        self._waiters.clear()
        self._receivers.clear()
        for subscription in self._subscriptions:
            subscription.wake.set()

    # --- waiting for a task ---

    def wait_for_end(self, task_seq: int) -> asyncio.Future[Task | None]:
        """
        Return a future that resolves when the task has ended: with its row, or with None if the row must be read.

        Register first and read the row second: then no wake-up can be missed. Give it back with `forget`.
        """
        self._refuse_closed()
        waiter: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(task_seq, set()).add(waiter)
        return waiter

    def _refuse_closed(self) -> None:
        if self.is_closed:
            raise self.error or StoreClosed("the store is closed: open it again to wait")
        self._reader.check_life()

    def forget(self, task_seq: int, waiter: asyncio.Future[Task | None]) -> None:
        """Give a waiter back."""
        _give_back(self._waiters, task_seq, waiter)

    # --- waiting for a signal ---

    def wait_for_signal(self, task_seq: int) -> asyncio.Future[None]:
        """
        Return a future that resolves when a signal to the task was committed by any process.

        Register first and read the table second: then no wake-up can be missed. Give it back with `forget_signal`.
        """
        self._refuse_closed()
        receiver: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receivers.setdefault(task_seq, set()).add(receiver)
        return receiver

    def forget_signal(self, task_seq: int, receiver: asyncio.Future[None]) -> None:
        """Give one who waits for a signal back."""
        _give_back(self._receivers, task_seq, receiver)

    def wake_receivers(self, task_seq: int) -> None:
        """Have whoever waits for a signal to a task look again."""
        for receiver in self._receivers.get(task_seq, ()):
            if not receiver.done():
                receiver.set_result(None)

    # --- being told ---

    def publish(self, events: Sequence[Committed]) -> None:
        """Pass on events that this process committed, in ``seq`` order."""
        if events[0].seq <= max(self._seen, self._acting):
            # they were read from the table before their own commit was answered, and perhaps what others made of them: once more
            self._again = min(self._again, events[0].seq - 1)
        elif events[0].seq == self._seen + 1:
            self._seen = events[-1].seq
        self._pass_on(events)

    def _pass_on(self, events: Sequence[Committed]) -> None:
        """Wake who waits; a hint, which may come twice or out of turn."""
        self.head = max(self.head, events[-1].seq)
        if self._waiters:
            for event in events:
                if event.task_seq in self._waiters and event.type in TERMINAL_EVENTS:
                    self._wake_waiters(event.task_seq, event.task)
        if self._receivers:
            for event in events:
                if event.task_seq in self._receivers and event.type == EventType.SIGNALLED:
                    self.wake_receivers(event.task_seq)
        for subscription in self._subscriptions:
            subscription.offer(events)

    def fail_waiters(self, task_seq: int, error: StoreError) -> None:
        """Tell whoever waits for the end of a task that it cannot come into the file, and why."""
        for waiter in self._waiters.get(task_seq, ()):
            if not waiter.done():
                waiter.set_exception(error)

    def _wake_waiters(self, task_seq: int, task: Task | None) -> None:
        for waiter in self._waiters.get(task_seq, ()):
            if not waiter.done():
                waiter.set_result(task)

    async def _look(self) -> None:
        behind = False
        while True:
            if not behind:
                await self._stirs.next()
            try:
                # until all of it was acted on: what fails now is tried again. A commit of ours between others' leaves a hole, too
                behind = await self._changed() or behind or self._seen < self.head or self._again < self._seen
                if behind:
                    await self._catch_up()
                    behind = False
            except Exception:
                # a reader that cannot read now may do so later; waiting for it must not end here
                log.warning("feed_failed", exc_info=True)
                await asyncio.sleep(1.0)

    async def _catch_up(self) -> None:
        """Publish what is in the table beyond what was seen, a page at a time."""
        # of what was taken away before it was seen no event may be left to tell
        head = (await self._reader.rows(LAST_SEQ, {}))[0][0]
        while True:
            after = self._from()
            page = await self.page(after, {})
            # read behind the page: of what was taken away before that, the page has no end
            until = page[-1].seq if len(page) == _PAGE else _NOWHERE - 1
            for (task_seq,) in await self._reader.rows(retention_queries.ENDS_PRUNED, {"after": after, "until": until}):
                self._on_end(task_seq)
                self._wake_waiters(task_seq, None)
            if not page:
                break
            for event in page:
                if event.type in TERMINAL_EVENTS and event.task_seq is not None:
                    self._on_end(event.task_seq)
            self._pass_on(page)
            self._acting = page[-1].seq
            try:
                await self._on_foreign(page)
            finally:
                self._acting = 0
            self._seen = max(self._seen, page[-1].seq)
        if self._seen < head:
            self._seen = head
            self.head = max(self.head, head)
            for subscription in self._subscriptions:
                subscription.wake.set()
        # an owner's row has no event
        await self._on_foreign(())

    def _from(self) -> int:
        """Return where to read on: after what was seen, or again from before it."""
        self._seen, self._again = min(self._seen, self._again), _NOWHERE
        return self._seen

    # --- reading the table ---

    async def page(self, after: int, chosen: dict[str, Any]) -> list[Committed]:
        """Return the next events after a cursor that fit, oldest first, at most one page of them."""
        sql = queries.events_page(frozenset({"after", *chosen}))
        rows = await self._reader.rows(sql, {"after": after, "limit": _PAGE, **chosen})
        return [Committed._make((*row, None, None)) for row in rows]

    async def page_to_head(self, after: int, chosen: dict[str, Any], told: int) -> Page:
        """Return what follows a cursor in one state of the file; what is missing up to *told* is known."""
        sql = queries.events_page(frozenset({"after", "until", *chosen}))
        of = {"scope": chosen.get("scope"), "task_seq": chosen.get("task_seq")}

        def read(tx: Transaction) -> tuple[list[Any], int, Gap | None]:
            head = tx.all(LAST_SEQ, {})[0][0]
            gap = retention_queries.gap_after(tx, max(after, told), **of)
            return tx.all(sql, {"after": after, "until": head, "limit": _PAGE, **chosen}), head, gap

        rows, head, gap = await self._reader.look(read)
        self.head = max(self.head, head)
        cursor = rows[-1][0] if len(rows) == _PAGE else max(after, head)
        return Page([Committed._make((*row, None, None)) for row in rows], cursor, gap)

    def subscribe(
        self,
        after: int | None,
        *,
        scope: Scope | None = None,
        types: Iterable[EventType] | None = None,
        task_seq: int | None = None,
    ) -> Subscription:
        """
        Return what follows the events after a cursor, 0 from the beginning, None from now, as far as it fits.

        Raises:
            StoreClosed, StorageError: the store has closed, or what stopped it.
            ValueError: *after* is no cursor.
        """
        self._refuse_closed()
        if after is None:
            after = self._newest()
        elif not isinstance(after, int) or not 0 <= after < 2**63:
            raise ValueError(f"after is the seq of an event, 0 or None, not {shown(after)}")
        subscription = Subscription(self, after, scope, types, task_seq)
        self._subscriptions.add(subscription)
        return subscription

    def _newest(self) -> int:
        """Return the newest event of the file: what others committed may not have been noticed yet, and is past all the same."""
        try:
            return max(self.head, int(self._at_once(LAST_SEQ)))
        except (*DRIVER_ERRORS, StoreError):
            return self.head


def _give_back(waiting: dict[int, set[asyncio.Future[T]]], task_seq: int, future: asyncio.Future[T]) -> None:
    if future.done() and not future.cancelled():
        future.exception()
    of_task = waiting.get(task_seq)
    if of_task is not None:
        of_task.discard(future)
        if not of_task:
            del waiting[task_seq]


class Subscription(AsyncIterator[TaskEvent]):
    """
    Every committed event after a cursor, in ``seq`` order, without loss or duplicate, for ever.

    Where events behind the cursor were pruned, one of type ``pruned`` comes first, whatever the types: its ``seq`` is the cursor,
    its data the range (``first_seq``, ``last_seq``) in which some are missing, or may be when it is read; its scope that of the
    filter or of the newest.

    Memory is bounded: events are handed over directly only while they follow the cursor without a hole, else paged from the
    table. It ends when the store closes, and raises what stopped it otherwise.
    """

    def __init__(
        self,
        feed: Feed,
        cursor: int,
        scope: Scope | None,
        types: Iterable[EventType] | None,
        task_seq: int | None,
    ) -> None:
        self._feed = feed
        self._cursor = cursor
        self._scope = None if scope is None else str(scope)
        self._types = None if types is None else frozenset(check_word("a type", EventType, kind) for kind in types)
        self._task_seq = task_seq
        self._chosen: dict[str, Any] = {}
        if task_seq is not None:
            self._chosen["task_seq"] = task_seq
        if self._scope is not None:
            self._chosen["scope"] = self._scope
        if self._types is not None:
            self._chosen["types"] = names(self._types)
        self._told = 0
        self._offered: deque[Committed] = deque()
        self._paged: deque[Committed] = deque()
        self.wake = asyncio.Event()

    @property
    def cursor(self) -> int:
        """The ``seq`` up to which everything that fits was yielded, but for events already read and not yet yielded."""
        return self._paged[0].seq - 1 if self._paged else self._cursor

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskEvent:
        while True:
            event = self._next_at_hand()
            if event is not None:
                return queries.event_record(event)
            if self._feed.is_closed:
                if self._feed.error is None or isinstance(self._feed.error, StoreClosed):
                    raise StopAsyncIteration
                raise self._feed.error
            if self._cursor < self._feed.head:
                page = await self._feed.page_to_head(self._cursor, self._chosen, self._told)
                missing = None if page.gap is None else self._pruned(page.gap)
                self._paged.extend(page.events)
                self._cursor = page.cursor
                if missing is not None:
                    return missing
                continue
            self.wake.clear()
            await self._feed.sleep(self.wake)

    def _pruned(self, gap: Gap) -> TaskEvent:
        """
        Say, before what is left, that events behind the cursor were pruned.

        The range begins at the cursor: what is pruned of it later was told, too.
        """
        self._told = gap.last_event
        with queries.readable(f"the tombstone behind event {self._cursor}"):
            return TaskEvent(
                seq=self._cursor,
                task_seq=None,
                scope=Scope.parse(gap.scope),
                from_scope=None,
                task_id=None,
                attempt=None,
                type=EventType.PRUNED,
                at=datetime.fromisoformat(gap.pruned_at),
                data={"first_seq": self._cursor + 1, "last_seq": gap.last_event},
            )

    async def one(self) -> None:
        """Wait for one event, or for the end of the iteration."""
        async for _ in self:
            return

    def offer(self, events: Sequence[Committed]) -> None:
        """Take events of a commit, as far as there is room; what is not taken is read from the table."""
        if len(self._offered) + len(events) > _BUFFER:
            self._offered.clear()
        else:
            self._offered.extend(events)
        self.wake.set()

    def _next_at_hand(self) -> Committed | None:
        if self._paged:
            return self._paged.popleft()
        while self._offered:
            event = self._offered.popleft()
            if event.seq <= self._cursor:
                continue
            if event.seq != self._cursor + 1:
                self._offered.clear()
                return None
            self._cursor = event.seq
            if self._fits(event):
                return event
        return None

    def _fits(self, event: Committed) -> bool:
        if self._task_seq is not None and event.task_seq != self._task_seq:
            return False
        if self._scope is not None and self._scope not in {event.scope, event.from_scope}:
            return False
        return self._types is None or event.type in self._types
