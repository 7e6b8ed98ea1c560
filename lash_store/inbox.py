"""Owns the inbox of a session: one reader at a time claims its notes, and acknowledges them by leaving in order."""

from __future__ import annotations

import asyncio
import contextlib
import json
from types import TracebackType

from . import owners, session_queries, transitions
from .core import Core
from .database import Transaction
from .errors import InboxBusy, StoreError
from .models import Note, Scope
from .owners import Life, OwnerLock
from .queries import OwnerRow

__all__ = ["Inbox", "look_at_notes"]


async def look_at_notes(core: Core, scope: Scope, *, unread: bool) -> list[Note]:
    """Read a session's notes, the unread ones or all, oldest first; nothing is claimed."""
    await core.check_session(scope)
    statement = session_queries.UNREAD_NOTES if unread else session_queries.ALL_NOTES
    return [session_queries.note_record(row) for row in await core.reader.rows(statement, {"scope": str(scope)})]


class Inbox:
    """
    ``async with session.inbox() as notes:`` claims a session's unread notes, oldest first, at most *limit* of them.

    Leaving the block acknowledges them; leaving it by an exception gives them again, and so does the reader's death, which the
    kernel tells by a lock of the claim's own.
    """

    def __init__(self, core: Core, scope: Scope, limit: int | None) -> None:
        if limit is not None and (not isinstance(limit, int) or not 1 <= limit < 2**63):
            raise ValueError(f"limit must be a number of notes, at least 1, not {limit!r}")
        self._core = core
        self._scope = scope
        self._limit = limit
        self._is_in_use = False
        self._lock: OwnerLock | None = None
        self._notes: list[Note] = []

    async def __aenter__(self) -> list[Note]:
        if self._is_in_use:
            raise InboxBusy(f"this reader of the inbox of {str(self._scope)!r} is in use: call inbox() once a block")
        self._is_in_use = True
        try:
            return await self._claim()
        except BaseException:
            self._is_in_use = False
            raise

    async def _claim(self) -> list[Note]:
        writer = self._core.to_request()
        dead = await self._dead_readers()
        lock = self._lock = OwnerLock(self._core.path)
        lock.acquire()
        self._core.claims.add(lock)
        claim = json.dumps({"token": lock.token, "owner_id": self._core.owner_id, **owners.describe_process()})
        try:
            self._notes = await writer.run(lambda tx: self._take(tx, lock.token, claim, dead))
            owners.release_orphans(set(dead))
            owners.sweep(self._core.path, sorted(dead))
        except BaseException:
            # it may have been committed all the same, if it is the caller that was cancelled
            with contextlib.suppress(StoreError):
                let_go = writer.submit(lambda tx: self._let_go(tx, lock.token, []))
                let_go.add_done_callback(lambda future: _tidy(future, lock))
            self._release(lock)
            raise
        return list(self._notes)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lock = self._lock
        assert lock is not None
        done = [note.note_seq for note in self._notes] if kind is None else []
        try:
            stored = self._core.to_request().submit(lambda tx: self._let_go(tx, lock.token, done))
            stored.add_done_callback(lambda future: _tidy(future, lock))
            await asyncio.shield(stored)
        except StoreError:
            # without the lock the claim is a dead reader's, and the notes are given again
            if kind is None:
                raise
        finally:
            self._release(lock)
            self._is_in_use = False

    def _release(self, lock: OwnerLock) -> None:
        lock.release()
        self._core.claims.discard(lock)

    async def _dead_readers(self) -> frozenset[str]:
        claims = await self._core.look(session_queries.inbox_claims)
        readers = [_reader_of(claim) for _, claim in claims]
        return frozenset(one.token for one in readers if owners.life_of(self._core.path, one) is Life.DEAD)

    def _take(self, tx: Transaction, token: str, claim: str, dead: frozenset[str]) -> list[Note]:
        if session_queries.session(tx, str(self._scope)) is None:
            raise transitions.unknown_session(self._scope)
        for scope, other in session_queries.inbox_claims(tx):
            reader = _reader_of(other)
            if reader.token in dead:
                session_queries.claim_inbox(tx, scope, None)
            elif scope == str(self._scope):
                raise InboxBusy(
                    f"process {reader.pid} on {reader.host} reads the inbox of {scope!r}: one reader a session, wait for it"
                )
        session_queries.claim_inbox(tx, str(self._scope), claim)
        return session_queries.take_notes(tx, str(self._scope), token, self._limit)

    def _let_go(self, tx: Transaction, token: str, done: list[int]) -> None:
        session_queries.acknowledge(tx, done, token)
        row = session_queries.session(tx, str(self._scope))
        if row is not None and row.inbox_claim is not None and _reader_of(row.inbox_claim).token == token:
            session_queries.claim_inbox(tx, str(self._scope), None)


def _reader_of(claim: str) -> OwnerRow:
    """Return who claimed an inbox, as one whose lock can be asked; of what a hand wrote there, one that has none."""
    known = json.loads(claim)
    fields = known if isinstance(known, dict) and isinstance(known.get("token"), str) else {"token": ""}
    return OwnerRow._make(fields.get(name) for name in OwnerRow._fields)


def _tidy(let_go: asyncio.Future[None], lock: OwnerLock) -> None:
    """Remove a reader's side file, once nobody asks for it; had the commit failed, its being free tells that it is gone."""
    if not let_go.cancelled() and let_go.exception() is None:
        lock.remove()
