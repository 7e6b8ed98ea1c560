"""
Owns what `top` sees of a file: frames, each what stands in it at one moment; neither lays out nor writes.

A file that nobody changed is not read again. One that was is read in one short transaction, by its indexes: the live rows, and
the events since the last look, however much history there is; only the ended rows are counted once at the beginning, and when
some were pruned or moved.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from .. import guards, queries
from ..errors import SchemaTooNew, SchemaTooOld, StorageMoved
from ..identity import HEAD, VERSION_TABLE
from ..owners import Life, life_of
from .output import stored
from .phrases import ENDED, LIVE, SAYS, STATES
from .snapshot import Snapshot, first_event

__all__ = ["MOST_ENDED", "MOST_LIVE", "Frame", "Row", "Watch"]

MOST_LIVE = 2000
"""Live tasks that a frame has at most: those at work before those that wait for a slot, then the oldest."""

MOST_ENDED = 500
"""Ended tasks that a frame has at most: the newest."""

_RECENTLY = timedelta(seconds=5)
"""How long a task that has ended is shown."""

_RATED = timedelta(seconds=10)
"""The span of which events a second are the average."""


class Row(NamedTuple):
    """A task in a frame: *since* is when it came into its state, *owner* what the lock of its owner says."""

    task_seq: int
    scope: str
    id: str
    label: str
    kind: str
    state: str
    attempt: int
    fraction: float | None
    created_at: str
    completed_at: str | None
    owner_id: int | None
    says: str | None
    note: str | None
    since: str | None = None
    owner: str | None = None

    @property
    def is_live(self) -> bool:
        """Whether it has not ended."""
        return self.completed_at is None


class Frame(NamedTuple):
    """
    A file at one moment.

    *rows* are in the order of their sessions, then of their birth. *states* counts every task of the file, or of the session that
    is looked at; *events_a_second* is of the whole file.
    """

    at: datetime
    scope: str | None
    owners: dict[str, int]
    states: dict[str, int]
    events_a_second: float
    rows: tuple[Row, ...]
    live_left_out: int
    with_ended: bool

    @property
    def ended_left_out(self) -> int:
        """How many ended tasks are not among the rows."""
        return sum(self.states[state] for state in ENDED) - sum(not row.is_live for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        """Return the frame as plain JSON."""
        made = self._asdict()
        return {
            "at": stored(self.at),
            **{name: made[name] for name in ("scope", "owners", "states")},
            "events_a_second": round(self.events_a_second, 3),
            "live_left_out": self.live_left_out,
            "ended_left_out": self.ended_left_out,
            "tasks": [row._asdict() for row in self.rows],
        }


# --- statements ------------------------------------------------------------------------------------------------------

_OF_SCOPE = " AND t.scope = :scope"
_LIVE_TASKS = "SELECT t.task_seq, t.state FROM tasks AS t WHERE t.completed_at IS NULL"
_COUNT = "SELECT t.state, COUNT(*) FROM tasks AS t WHERE 1{of_scope} GROUP BY t.state"
_NEWEST_ENDED = """
SELECT t.task_seq FROM tasks AS t WHERE t.completed_at IS NOT NULL{of_scope} ORDER BY t.task_seq DESC LIMIT :most
"""
_ROWS = f"""
SELECT t.task_seq, t.scope, t.id, t.label, t.kind, t.state, t.attempt, t.fraction, t.created_at, t.completed_at, t.owner_id,
  substr({SAYS}, 1, 400),
  (SELECT substr(n.text, 1, 400) FROM inbox AS n
   WHERE n.task_seq = t.task_seq AND substr(n.key, 1, 4) <> 'end:' ORDER BY n.note_seq DESC LIMIT 1)
FROM tasks AS t WHERE t.task_seq IN (SELECT value FROM json_each(:keys))
"""

# `progress`, `saved` and their like are most events, and no change of state: their data is never looked into
_TURNS = """
e.type NOT IN ('progress', 'saved', 'signalled', 'noted', 'claimed', 'callback_failed', 'transferred')
AND (e.type = 'started' OR iif(json_valid(e.data), json_extract(e.data, '$.state'), NULL) IS NOT NULL)
"""
_SINCE = f"""
SELECT k.value, (SELECT e.at FROM events AS e WHERE e.task_seq = k.value AND {_TURNS} ORDER BY e.seq DESC LIMIT 1)
FROM json_each(:keys) AS k
"""
_NEWS = f"""
SELECT e.task_seq, e.type, e.at, e.scope FROM events AS e
WHERE e.seq > :after AND (e.type = 'transferred' OR e.task_seq IS NOT NULL AND {_TURNS}) ORDER BY e.seq
"""
_PRUNED = "SELECT COUNT(*) FROM tombstones"


class Watch:
    """Looks at a file again and again."""

    def __init__(self, snapshot: Snapshot, scope: str | None = None, *, with_ended: bool = False) -> None:
        self._snapshot = snapshot
        self._scope = scope
        self._with_ended = with_ended
        self._identity = guards.identify(snapshot.path)
        self._version: int | None = None
        self._is_reloaded = True
        self._cursor: int | None = None
        self._pruned = 0
        self._counts = dict.fromkeys(STATES, 0)
        self._live: list[Row] = []
        self._live_left_out = 0
        self._ended: dict[int, Row] = {}
        self._since: dict[int, str | None] = {}
        self._owners: list[queries.OwnerRow] = []
        self._samples: deque[tuple[datetime, int]] = deque()

    @property
    def with_ended(self) -> bool:
        """Whether tasks stay in the frames when they have ended."""
        return self._with_ended

    @with_ended.setter
    def with_ended(self, wanted: bool) -> None:
        self._with_ended = wanted
        # nobody changed the file, yet more of it is to be read
        self._is_reloaded, self._version = True, None

    def frame(self, now: datetime | None = None) -> Frame:
        """
        Return what is in the file now.

        Raises:
            StorageMoved: its path names another file by now, or none.
            SchemaTooNew, SchemaTooOld: another version of the package changed it meanwhile.
            StorageError: it cannot be read.
        """
        now = now or datetime.now(UTC)
        if self._identity is None or guards.identify(self._snapshot.path) != self._identity:
            raise StorageMoved(
                f"{self._snapshot.path} no longer names the file that was looked at (it was removed, renamed or replaced): "
                "put it back, or look at the new one"
            )
        version = int(self._snapshot.rows("PRAGMA data_version")[0][0])
        if version != self._version:
            with self._snapshot.one_state():
                self._read(now)
            self._version = version
        return self._compose(now)

    # --- a file that changed ---

    def _read(self, now: datetime) -> None:
        self._check_revision()
        first = self._cursor is None
        if self._cursor is None:
            self._cursor = first_event(self._snapshot, stored(now - _RATED)) - 1
            self._samples.append((now - _RATED, self._cursor))
        news = self._rows(_NEWS, after=self._cursor)
        self._cursor = max(self._cursor, int(self._rows("SELECT COALESCE(MAX(seq), 0) FROM events")[0][0]))
        pruned = int(self._rows(_PRUNED)[0][0])
        moved = pruned != self._pruned or any(kind == "transferred" for _, kind, _, _ in news)
        self._pruned = pruned
        self._since.update((task_seq, at) for task_seq, kind, at, _ in news if kind != "transferred")
        ended = [
            (task_seq, kind) for task_seq, kind, _, scope in news if kind in ENDED and self._scope in (None, scope)
        ]
        self._read_live()
        if first or moved:
            found = dict(self._rows(_COUNT.format(of_scope=self._of_scope), scope=self._scope))
            self._counts.update((state, int(found.get(state, 0))) for state in ENDED)
        else:
            for _, kind in ended:
                self._counts[kind] += 1
        self._read_ended([task_seq for task_seq, _ in ended], again=moved, now=now)
        self._read_since()
        self._owners = [queries.OwnerRow._make(row) for row in self._rows(queries.ALL_OPEN_OWNERS)]

    def _read_live(self) -> None:
        live = self._rows(_LIVE_TASKS + self._of_scope, scope=self._scope)
        counted = Counter(state for _, state in live)
        self._counts.update((state, counted[state]) for state in LIVE)
        if len(live) > MOST_LIVE:
            live.sort(key=lambda row: (row[1] == "pending", row[0]))
        self._live_left_out = max(0, len(live) - MOST_LIVE)
        self._live = self._rows_of(task_seq for task_seq, _ in live[:MOST_LIVE])

    def _read_ended(self, new: list[int], *, again: bool, now: datetime) -> None:
        wanted = {*self._ended, *new[-MOST_ENDED:]}
        if self._with_ended and (again or self._is_reloaded):
            found = self._rows(_NEWEST_ENDED.format(of_scope=self._of_scope), scope=self._scope, most=MOST_ENDED)
            wanted = {int(task_seq) for (task_seq,) in found}
        wanted = {*sorted(wanted)[-MOST_ENDED:]}
        # what has ended does not change, except that it may be moved
        kept = {} if again else {seq: row for seq, row in self._ended.items() if seq in wanted}
        kept.update((row.task_seq, row) for row in self._rows_of(wanted - kept.keys()))
        self._is_reloaded = False
        self._ended = {seq: row for seq, row in kept.items() if not row.is_live and self._scope in (None, row.scope)}
        if not self._with_ended:
            self._ended = {seq: row for seq, row in self._ended.items() if _is_recent(row, now)}

    def _read_since(self) -> None:
        """Learn since when the rows are in their states, and forget of all others."""
        shown = [*(row.task_seq for row in self._live), *self._ended]
        unknown = [seq for seq in shown if seq not in self._since]
        if unknown:
            self._since.update(self._rows(_SINCE, keys=json.dumps(unknown)))
        self._since = {seq: self._since[seq] for seq in shown}

    def _rows_of(self, task_seqs: Iterable[int]) -> list[Row]:
        keys = [*task_seqs]
        return [Row._make((*row, None, None)) for row in self._rows(_ROWS, keys=json.dumps(keys))] if keys else []

    def _check_revision(self) -> None:
        revision = str(self._rows(f"SELECT version_num FROM {VERSION_TABLE}")[0][0])
        if revision != HEAD:
            error = SchemaTooNew if revision > HEAD else SchemaTooOld
            raise error(
                f"{self._snapshot.path} was taken to revision {revision} meanwhile, this lash_store knows {HEAD}: "
                "look at it with the version that did it"
            )

    @property
    def _of_scope(self) -> str:
        return "" if self._scope is None else _OF_SCOPE

    def _rows(self, sql: str, **parameters: Any) -> list[Any]:
        return self._snapshot.rows(sql, **parameters)

    # --- a frame ---

    def _compose(self, now: datetime) -> Frame:
        # an owner that is killed changes nothing in the file: its lock is asked at every look
        lives = {owner.owner_id: life_of(self._snapshot.path, owner) for owner in self._owners}
        ended = [row for row in self._ended.values() if self._with_ended or _is_recent(row, now)]
        rows = sorted((*self._live, *ended), key=lambda row: (row.scope, row.task_seq))
        return Frame(
            at=now,
            scope=self._scope,
            owners={str(life): [*lives.values()].count(life) for life in Life},
            states=dict(self._counts),
            events_a_second=self._rate(now),
            rows=tuple(row._replace(since=self._since.get(row.task_seq), owner=_life(lives, row)) for row in rows),
            live_left_out=self._live_left_out,
            with_ended=self._with_ended,
        )

    def _rate(self, now: datetime) -> float:
        """Return the events a second of the last seconds: a rise of the newest event's number."""
        assert self._cursor is not None
        self._samples.append((now, self._cursor))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _RATED:
            self._samples.popleft()
        (since, before), (_, newest) = self._samples[0], self._samples[-1]
        span = max((now - since).total_seconds(), 0.001)
        return (newest - before) / span


def _life(lives: dict[int, Life], row: Row) -> str | None:
    if row.owner_id is None or not row.is_live:
        return None
    # an owner whose row says that it ended has no lock to ask
    return str(lives.get(row.owner_id, Life.DEAD))


def _is_recent(row: Row, now: datetime) -> bool:
    return row.completed_at is None or row.completed_at >= stored(now - _RECENTLY)
