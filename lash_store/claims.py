"""Owns how something of a session is read by one reader at a time, who acknowledges it by leaving in order, or gets it again."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

from . import owners, session_queries, transitions
from .core import Core
from .errors import InboxBusy, StoreError
from .models import Scope
from .owners import Life, OwnerLock
from .queries import OwnerRow
from .transaction import Transaction

__all__ = ["Claim", "Shelf"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Shelf(Generic[T]):
    """
    What can be claimed of a session.

    *name* is what it is called; *claims* tells who reads which session's, *claim* notes it; *take* marks what is unread as a
    reader's and returns it, *acknowledge* notes that a reader has dealt with what *number* names.
    """

    name: str
    claims: Callable[[Transaction], list[tuple[str, str]]]
    claim: Callable[[Transaction, str, str | None], None]
    take: Callable[[Transaction, str, str], list[T]]
    acknowledge: Callable[[Transaction, Sequence[int], str], None]
    number: Callable[[T], int]


class Claim(Generic[T]):
    """
    One block in which a session's unread things on a shelf are this reader's.

    That a reader died, the kernel tells by a lock of the claim's own.
    """

    def __init__(self, core: Core, scope: Scope, shelf: Shelf[T]) -> None:
        self._core = core
        self._scope = scope
        self._shelf = shelf
        self._is_in_use = False
        self._lock: OwnerLock | None = None
        self._taken: list[T] = []

    def __await__(self) -> Generator[Any, None, list[T]]:
        """Claim and acknowledge at once: a crash before they were dealt with loses them."""
        return self._take_at_once().__await__()

    async def _take_at_once(self) -> list[T]:
        async with self as taken:
            return taken

    async def __aenter__(self) -> list[T]:
        if self._is_in_use:
            raise InboxBusy(
                f"this reader of {self._shelf.name} of {str(self._scope)!r} is in use: call it once a block"
            )
        self._is_in_use = True
        try:
            return await self._claim()
        except BaseException:
            self._is_in_use = False
            raise

    async def _claim(self) -> list[T]:
        writer = self._core.to_request()
        dead = await self._dead_readers()
        lock = self._lock = OwnerLock(self._core.path)
        lock.acquire()
        self._core.claims.add(lock)
        claim = json.dumps({"token": lock.token, "owner_id": self._core.owner_id, **owners.describe_process()})
        try:
            self._taken = await writer.run(lambda tx: self._take(tx, lock.token, claim, dead))
            owners.release_orphans(set(dead))
            owners.sweep(self._core.path, sorted(dead))
        except BaseException:
            # it may have been committed all the same, if it is the caller that was cancelled
            with contextlib.suppress(StoreError):
                let_go = writer.submit(lambda tx: self._let_go(tx, lock.token, []))
                let_go.add_done_callback(lambda future: _tidy(future, lock))
            self._release(lock)
            raise
        return list(self._taken)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock = self._lock
        assert lock is not None
        done = [self._shelf.number(one) for one in self._taken] if kind is None else []
        try:
            stored = self._core.to_request().submit(lambda tx: self._let_go(tx, lock.token, done))
            stored.add_done_callback(lambda future: _tidy(future, lock))
            await asyncio.shield(stored)
        except StoreError:
            # without the lock the claim is a dead reader's, and it is given again
            if kind is None:
                raise
        finally:
            self._release(lock)
            self._is_in_use = False

    def _release(self, lock: OwnerLock) -> None:
        lock.release()
        self._core.claims.discard(lock)

    async def _dead_readers(self) -> frozenset[str]:
        claims = await self._core.look(self._shelf.claims)
        readers = [_reader_of(claim) for _, claim in claims]
        return frozenset(one.token for one in readers if owners.life_of(self._core.path, one) is Life.DEAD)

    def _take(self, tx: Transaction, token: str, claim: str, dead: frozenset[str]) -> list[T]:
        if session_queries.session(tx, str(self._scope)) is None:
            raise transitions.unknown_session(self._scope)
        for scope, other in self._shelf.claims(tx):
            reader = _reader_of(other)
            if reader.token in dead:
                self._shelf.claim(tx, scope, None)
            elif scope == str(self._scope):
                raise InboxBusy(
                    f"process {reader.pid} on {reader.host} reads {self._shelf.name} of {scope!r}: "
                    "one reader a session, wait for it"
                )
        self._shelf.claim(tx, str(self._scope), claim)
        return self._shelf.take(tx, str(self._scope), token)

    def _let_go(self, tx: Transaction, token: str, done: Sequence[int]) -> None:
        self._shelf.acknowledge(tx, done, token)
        for scope, claim in self._shelf.claims(tx):
            if scope == str(self._scope) and _reader_of(claim).token == token:
                self._shelf.claim(tx, scope, None)


def _reader_of(claim: str) -> OwnerRow:
    """Return who claimed, as one whose lock can be asked; of what a hand wrote there, one that has none."""
    try:
        known = json.loads(claim)
    except (TypeError, ValueError, RecursionError):
        known = None
    fields = known if isinstance(known, dict) and isinstance(known.get("token"), str) else {"token": ""}
    return OwnerRow._make(fields.get(name) for name in OwnerRow._fields)


def _tidy(let_go: asyncio.Future[None], lock: OwnerLock) -> None:
    """Remove a reader's side file, once nobody asks for it; had the commit failed, its being free tells that it is gone."""
    if not let_go.cancelled() and let_go.exception() is None:
        lock.remove()
