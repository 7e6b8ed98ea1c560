"""Owns the judgement: opens a file beside a log, and asks every promise's queries about both."""

from __future__ import annotations

import json
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from .folding import Difference, differences
from .log import Entry, Log, outcome
from .promises import PROMISES

__all__ = ["HEAD", "Broken", "Checker", "check"]

APPLICATION_ID = 0x6C617368
HEAD = "0005"
"""The revision whose tables the promises are asked about; of an older file, only whether it is whole."""

_MOST = 20
"""Findings a query that are told."""

_OF_A_FILE = """
CREATE TEMP TABLE differs (rule TEXT, task_seq INTEGER, what TEXT);
CREATE TEMP TABLE holes (first INTEGER, last INTEGER);
CREATE TEMP TABLE wholeness (what TEXT);
CREATE TEMP TABLE known (task_seq INTEGER PRIMARY KEY, scope TEXT, id TEXT, state TEXT, key TEXT, key_of INTEGER);
CREATE TEMP TABLE effects (task_seq INTEGER, name TEXT, n INTEGER);
"""

_KNOWN = """
INSERT INTO known SELECT task_seq, scope, id, state, idempotency_key, parent_seq FROM f.tasks UNION ALL
SELECT task_seq, scope, id, state, idempotency_key, parent_seq FROM f.tombstones
WHERE task_seq NOT IN (SELECT task_seq FROM f.tasks);
"""

_REVISION_TABLES = {
    "0001": {"sessions", "owners", "tasks", "events", "handles", "steps"},
    "0002": {"inbox", "handoffs"},
    "0003": {"signals"},
    "0004": {"monitors", "updates"},
    "0005": {"tombstones"},
}


class Broken(NamedTuple):
    """A promise that is broken, and how."""

    promise: str
    what: str


class Checker:
    """Judges files against a log that grows: `tell` it what happened, then `check` a file as it was then."""

    def __init__(self, log: Iterable[Entry] = ()) -> None:
        self._log = Log()
        self._log.add(log)
        self.connection = self._db = self._log.connection
        self._db.executescript(_OF_A_FILE)
        self._db.create_function("outcome", 4, _outcome_of_row, deterministic=True)

    def tell(self, entries: Iterable[Entry]) -> None:
        """Add what happened since."""
        self._log.add(entries)

    def close(self) -> None:
        """Let go of the log."""
        self._db.close()

    def check(self, path: Path) -> list[Broken]:
        """Return what is broken in a file, which is opened read-only and read as of one moment."""
        self._db.execute("ATTACH ? AS f", [f"file:{quote(str(path))}?mode=ro"])
        try:
            self._db.execute("BEGIN")
            try:
                return list(self._judge())
            except sqlite3.DatabaseError as error:
                # what cannot be read to its end is not whole
                return [Broken("P19", f"cannot be read: {error}")]
            finally:
                self._db.execute("ROLLBACK")
        finally:
            self._db.execute("DETACH f")

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Ask the log alone."""
        return self._db.execute(query).fetchall()

    def _judge(self) -> Iterator[Broken]:
        damaged = [what for (what,) in self._db.execute("PRAGMA f.integrity_check").fetchmany(_MOST) if what != "ok"]
        if damaged:
            # whatever else is asked would be answered by chance
            yield from (Broken("P19", f"integrity check: {what}") for what in damaged)
            return
        revision = self._look()
        yield from [Broken("P19", row[0]) for row in self._db.execute("SELECT what FROM wholeness")]
        if revision != HEAD:
            return
        for promise in PROMISES:
            for name, query in promise.queries.items():
                for row in self._db.execute(query).fetchmany(_MOST):
                    yield Broken(promise.number, f"{name}: {' '.join(map(str, row))}")

    def _look(self) -> str | None:
        """Fill what the queries ask beside the file's own tables; return its revision."""
        for row in self._db.execute("PRAGMA f.foreign_key_check").fetchmany(_MOST):
            self._note(f"foreign key check: {row}")
        if self._db.execute("PRAGMA f.application_id").fetchone() != (APPLICATION_ID,):
            self._note("the application id is not a store's")
        tables = {name for (name,) in self._db.execute("SELECT name FROM f.sqlite_schema WHERE type = 'table'")}
        revision = self._revision(tables)
        if revision != HEAD:
            return revision
        self._db.execute(_KNOWN)
        if "effects" in {name.rpartition("_")[2] for name in tables if name.startswith("campaign_")}:
            self._db.execute(
                "INSERT INTO effects SELECT task_seq, name, count(*) FROM f.campaign_effects GROUP BY 1, 2"
            )
        self._fold()
        self._find_holes()
        return revision

    def _revision(self, tables: set[str]) -> str | None:
        if "lash_store_version" not in tables:
            self._note("it has no revision")
            return None
        found = [row[0] for row in self._db.execute("SELECT version_num FROM f.lash_store_version")]
        if len(found) != 1 or found[0] not in _REVISION_TABLES:
            self._note(f"its revision is {found}")
            return None
        for revision, added in _REVISION_TABLES.items():
            there = added & tables
            if there != (added if revision <= found[0] else set()):
                self._note(f"at revision {found[0]}, it has {sorted(there)} of revision {revision}")
        return str(found[0])

    def _note(self, what: str) -> None:
        self._db.execute("INSERT INTO wholeness VALUES (?)", [what])

    def _fold(self) -> None:
        tasks = self._db.execute("SELECT * FROM f.tasks ORDER BY task_seq")
        names = [column[0] for column in tasks.description]
        told = self._db.execute(
            "SELECT task_seq, seq, scope, from_scope, task_id, attempt, type, at, data FROM f.events "
            "WHERE task_seq IS NOT NULL ORDER BY task_seq, seq"
        )
        columns = [column[0] for column in told.description]
        stories = {
            task_seq: [dict(zip(columns, event, strict=True)) for event in events]
            for task_seq, events in groupby(told, itemgetter(0))
        }
        found: list[Difference] = []
        for row in tasks:
            task = dict(zip(names, row, strict=True))
            found += differences(task, stories.get(task["task_seq"], []))
        self._db.executemany("INSERT INTO differs VALUES (?, ?, ?)", found)

    def _find_holes(self) -> None:
        """Find where numbers of events are missing that no tombstone tells of."""
        missing = self._db.execute(
            "SELECT before + 1, seq - 1 FROM (SELECT seq, lag(seq, 1, 0) OVER (ORDER BY seq) AS before FROM f.events) "
            "WHERE seq > before + 1 UNION ALL SELECT coalesce(max(e.seq), 0) + 1, s.seq FROM f.sqlite_sequence AS s "
            "LEFT JOIN f.events AS e WHERE s.name = 'events' GROUP BY s.seq HAVING s.seq > coalesce(max(e.seq), 0)"
        ).fetchall()
        if not missing:
            return
        told: list[list[int]] = []
        for begin, end in self._db.execute("SELECT first_event, last_event FROM f.tombstones ORDER BY 1"):
            # those of one task are among those of others
            if told and begin <= told[-1][1] + 1:
                told[-1][1] = max(told[-1][1], end)
            else:
                told.append([begin, end])
        begins = [begin for begin, _ in told]
        for first, last in missing:
            place = bisect_right(begins, first) - 1
            at = max(first, told[place][1] + 1) if place >= 0 else first
            if at <= last:
                self._db.execute("INSERT INTO holes VALUES (?, ?)", [at, last])


def _outcome_of_row(state: str, result: str | None, failure: str | None, completed_at: str) -> str:
    said = None if failure is None else json.loads(failure)["message"]
    return outcome(state, None if result is None else json.loads(result), said, completed_at)


def check(path: Path, log: Iterable[Entry] = ()) -> list[Broken]:
    """Return what is broken in a file, as far as the file itself and a log of what was asked and answered can tell."""
    checker = Checker(log)
    try:
        return checker.check(path)
    finally:
        checker.close()
