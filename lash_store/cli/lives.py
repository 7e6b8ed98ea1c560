"""Owns how the lives of owners are read: who opened the file when, how each ended, and when the dead were last heard of."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .lifelines import ms_of
from .snapshot import Snapshot

__all__ = ["DEAD", "OwnerLife", "horizon_of", "owners_of"]

DEAD = frozenset({"died", "dead"})
"""How owners end of whose last moments nobody knows."""


class OwnerLife(NamedTuple):
    """
    One owner's life.

    *how*: ``closed``, ``abandoned``, ``died``, or of one that the file has as open: ``alive``, ``dead`` (nobody has found it
    yet), ``unreachable`` (its lock file is not here, as in a copy). *last_heard* and *end* are when it died: between them.
    """

    owner_id: int
    runtime: str
    pid: int
    host: str
    begin: int
    last_heard: int
    end: int
    how: str


_LAST_WRITTEN = """
SELECT max(at) FROM (
  SELECT at FROM (SELECT at FROM events ORDER BY seq DESC LIMIT 1)
  UNION ALL SELECT max(ended_at) FROM owners UNION ALL SELECT max(opened_at) FROM owners)"""


def horizon_of(snapshot: Snapshot) -> tuple[int, bool, dict[int, str]]:
    """Return up to when things are known, whether that is now, and how each owner stands that the file has as open."""
    from ..owners import life_of
    from ..queries import ALL_OPEN_OWNERS, OwnerRow

    owners = map(OwnerRow._make, snapshot.rows(ALL_OPEN_OWNERS))
    lives = {owner.owner_id: str(life_of(snapshot.path, owner)) for owner in owners}
    written = ms_of(snapshot.rows(_LAST_WRITTEN)[0][0])
    is_live = "alive" in lives.values()
    now = int(time.time() * 1000)
    if written is None:
        return now, is_live, lives
    return (max(now, written) if is_live else written), is_live, lives


_OWNERS = """
SELECT owner_id, runtime, pid, host, opened_at, ended_at, "end" FROM owners
WHERE runtime IN (SELECT value FROM json_each(:runtimes)) OR owner_id IN (SELECT value FROM json_each(:named))
ORDER BY owner_id"""


def owners_of(
    snapshot: Snapshot, runtimes: Iterable[str], named: Iterable[int], lives: Mapping[int, str], horizon: int
) -> list[OwnerLife]:
    """Return the owners of some runtimes, and those that are named; *lives* is how those stand that are not ended."""
    rows = snapshot.rows(_OWNERS, runtimes=json.dumps(sorted(runtimes)), named=json.dumps(sorted(named)))
    ends = {row[0]: str(row[6] or lives.get(row[0], "unreachable")) for row in rows}
    heard = _last_heard(snapshot, [owner_id for owner_id, how in ends.items() if how in DEAD])
    found = []
    for owner_id, runtime, pid, host, opened_at, ended_at, _ in rows:
        begin = ms_of(opened_at)
        if begin is None:
            continue
        how = ends[owner_id]
        end = max(begin, horizon if ended_at is None else ms_of(ended_at) or begin)
        last = min(end, max(begin, heard.get(owner_id, begin))) if how in DEAD else end
        found.append(OwnerLife(owner_id, runtime, pid, host, begin, last, end, how))
    return found


_HEARD = """
WITH begun AS (
  SELECT task_seq, attempt, type, at, iif(json_valid(data), json_extract(data, '$.owner_id'), NULL) AS owner_id
  FROM events WHERE type IN ('registered', 'claimed', 'started', 'reattached')
    AND owner_id IN (SELECT value FROM json_each(:owners)))
SELECT owner_id, max(at) FROM (
  SELECT owner_id, at FROM begun
  UNION ALL
  SELECT b.owner_id, e.at FROM begun AS b JOIN events AS e ON e.task_seq = b.task_seq AND e.attempt = b.attempt
  WHERE b.type IN ('started', 'reattached') AND b.attempt > 0
    AND e.type IN ('progress', 'saved', 'state_changed', 'retry_scheduled', 'completed'))
GROUP BY owner_id"""
"""When each owner last wrote something that none but it could write."""


def _last_heard(snapshot: Snapshot, owner_ids: Sequence[int]) -> dict[int, int]:
    if not owner_ids:
        return {}
    found = snapshot.rows(_HEARD, owners=json.dumps(owner_ids))
    return {owner_id: at for owner_id, at in ((row[0], ms_of(row[1])) for row in found) if at is not None}
