"""Owns what a session reads: the notes of its inbox, and what its monitors wrote."""

from __future__ import annotations

from . import monitor_queries, session_queries
from .claims import Claim, Shelf
from .core import Core
from .errors import shown
from .models import Note, Scope, check_id
from .monitor_models import MONITOR_PREFIX, MonitorUpdate

__all__ = ["Inbox", "Updates", "look_at_notes", "look_at_updates"]


async def look_at_notes(core: Core, scope: Scope, *, unread: bool) -> list[Note]:
    """Read a session's notes, the unread ones or all, oldest first; nothing is claimed."""
    await core.check_session(scope)
    statement = session_queries.UNREAD_NOTES if unread else session_queries.ALL_NOTES
    return [session_queries.note_record(row) for row in await core.reader.rows(statement, {"scope": str(scope)})]


class Inbox(Claim[Note]):
    """
    ``async with session.inbox() as notes:`` claims a session's unread notes, oldest first, at most *limit* of them.

    Leaving the block acknowledges them; leaving it by an exception gives them again, and so does the reader's death, which the
    kernel tells by a lock of the claim's own.
    """

    def __init__(self, core: Core, scope: Scope, limit: int | None) -> None:
        most = _check_limit(limit, "notes")
        shelf = Shelf(
            name="the inbox",
            claims=session_queries.inbox_claims,
            claim=session_queries.claim_inbox,
            take=lambda tx, session, token: session_queries.take_notes(tx, session, token, most),
            acknowledge=session_queries.acknowledge,
            number=lambda note: note.note_seq,
        )
        super().__init__(core, scope, shelf)


async def look_at_updates(
    core: Core, scope: Scope, *, monitor_id: str | None, unread: bool, limit: int | None
) -> list[MonitorUpdate]:
    """Read what a session's monitors wrote, or one of them, oldest first; nothing is claimed."""
    most = _check_limit(limit, "updates")
    await core.check_session(scope)
    statement = monitor_queries.UNREAD_UPDATES if unread else monitor_queries.ALL_UPDATES
    wanted = {"scope": str(scope), "monitor_id": _plain(monitor_id), "limit": -1 if most is None else most}
    return [monitor_queries.update_record(row) for row in await core.reader.rows(statement, wanted)]


class Updates(Claim[MonitorUpdate]):
    """
    ``async with session.take_updates() as updates:`` claims what a session's monitors wrote and nobody has read, oldest first.

    At most *limit* lines, of one monitor if *monitor_id* names it. Leaving the block acknowledges them; leaving it by an
    exception gives them again, and so does the reader's death.
    """

    def __init__(self, core: Core, scope: Scope, limit: int | None, monitor_id: str | None) -> None:
        most, named = _check_limit(limit, "updates"), _plain(monitor_id)
        shelf = Shelf(
            name="the updates",
            claims=monitor_queries.updates_claims,
            claim=monitor_queries.claim_updates,
            take=lambda tx, session, token: monitor_queries.take_updates(tx, session, token, most, named),
            acknowledge=monitor_queries.acknowledge,
            number=lambda update: update.update_seq,
        )
        super().__init__(core, scope, shelf)


def _plain(monitor_id: str | None) -> str | None:
    """Return a monitor's id, also of one who gave its task's."""
    return None if monitor_id is None else check_id("monitor id", monitor_id).removeprefix(MONITOR_PREFIX)


def _check_limit(limit: int | None, what: str) -> int | None:
    """
    Return how many of something are wanted; None: all.

    Raises:
        ValueError: not a number, or below 1.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit < 2**63):
        raise ValueError(f"limit must be a number of {what}, at least 1, not {shown(limit)}")
    return limit
