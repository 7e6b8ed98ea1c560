"""
Owns the observers' log: what was asked, what was answered, and which bodies ran, in the order in which it happened.

An entry is a list, and a line of JSON in a file; one ``write(2)`` a line on one pipe for all who write, so that none is torn by a
kill and all have one order.

``["S", who, call, op, args]``
    Somebody asks; *call* numbers the calls of *who*.
``["A", who, call, result]``
    The call has returned: its effect is acknowledged.
``["E", who, call, error, in_doubt]``
    It raised, by the name of the error; unless *in_doubt*, that says that nothing was changed.
``["B", who, task_seq, attempt]``, ``["X", who, task_seq, attempt, how]``
    A body was entered, and was left.
``["O", who, owner_id]``
    A store was opened, as this owner.
``["F", who, feed, seq, task_seq, type]``
    A subscriber of number *feed* was handed an event.
``["P", who]``, ``["C", who]``, ``["K", who]``
    A process is about to be stopped, to go on, to be killed.
``["Q", who]``
    The store of *who*, opened last, is the only one that is open, and its recovery is done.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable
from typing import Any

__all__ = ["Entry", "Log", "outcome"]

Entry = list[Any]

_TABLES = """
CREATE TABLE asked (n INTEGER PRIMARY KEY, who, call, op TEXT, args TEXT);
CREATE TABLE answered (n INTEGER PRIMARY KEY, who, call, result TEXT);
CREATE TABLE refused (n INTEGER PRIMARY KEY, who, call, error TEXT, in_doubt INTEGER);
CREATE TABLE entered (n INTEGER PRIMARY KEY, who, task_seq INTEGER, attempt INTEGER);
CREATE TABLE departed (n INTEGER PRIMARY KEY, who, task_seq INTEGER, attempt INTEGER, how TEXT);
CREATE TABLE opened (n INTEGER PRIMARY KEY, who, owner_id INTEGER);
CREATE TABLE fed (n INTEGER PRIMARY KEY, who, feed, seq INTEGER, task_seq INTEGER, type TEXT);
CREATE TABLE killed (n INTEGER PRIMARY KEY, who);
CREATE TABLE quiet (n INTEGER PRIMARY KEY, who);
CREATE TABLE heard (who PRIMARY KEY, n INTEGER);
CREATE TABLE told (n INTEGER, asked_at INTEGER, op TEXT, task_seq INTEGER, state TEXT, attempt INTEGER, digest TEXT);
CREATE INDEX asked_by ON asked (who, call);
CREATE INDEX answered_by ON answered (who, call);
CREATE INDEX refused_by ON refused (who, call);
CREATE INDEX entered_task ON entered (task_seq, attempt);
CREATE INDEX departed_task ON departed (task_seq, attempt);
CREATE INDEX told_task ON told (task_seq);
CREATE INDEX killed_who ON killed (who);
CREATE INDEX fed_task ON fed (task_seq);
CREATE INDEX fed_seq ON fed (seq);

-- what was acknowledged: asked, and answered
CREATE VIEW acknowledged AS
SELECT a.n, s.n AS asked_at, s.who, s.call, s.op, s.args, a.result
FROM answered AS a JOIN asked AS s ON s.who = a.who AND s.call = a.call;

-- what may have happened or not: asked, and neither answered nor refused with a promise
CREATE VIEW in_doubt AS
SELECT s.n, s.who, s.call, s.op, s.args
FROM asked AS s
WHERE NOT EXISTS (SELECT 1 FROM answered AS a WHERE a.who = s.who AND a.call = s.call)
  AND NOT EXISTS (SELECT 1 FROM refused AS e WHERE e.who = s.who AND e.call = s.call AND NOT e.in_doubt);
"""

_INTO = {
    "S": ("asked", 4),
    "A": ("answered", 3),
    "E": ("refused", 4),
    "B": ("entered", 3),
    "X": ("departed", 4),
    "O": ("opened", 2),
    "F": ("fed", 5),
    "K": ("killed", 1),
    "Q": ("quiet", 1),
}


class Log:
    """A log as tables of a database in memory, to which entries can be added."""

    def __init__(self) -> None:
        self.connection = sqlite3.connect(":memory:", isolation_level=None, uri=True)
        self.connection.executescript(_TABLES)
        self._length = 0
        self._asked: dict[tuple[Any, Any], tuple[int, str]] = {}

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries, which happened after those that are there."""
        heard: dict[Any, int] = {}
        self.connection.execute("BEGIN")
        for kind, *words in entries:
            self._length += 1
            if kind != "K" and words:
                heard[str(words[0])] = self._length
            into = _INTO.get(kind)
            if into is None:
                continue
            table, width = into
            row = [json.dumps(word) if isinstance(word, dict) else word for word in words[:width]]
            marks = ",".join("?" * (width + 1))
            self.connection.execute(f"INSERT INTO {table} VALUES ({marks})", [self._length, *row])
            if kind == "S":
                self._asked[words[0], words[1]] = self._length, words[2]
            elif kind == "A":
                self._add_told(words[0], words[1], words[2])
        self.connection.executemany("INSERT OR REPLACE INTO heard VALUES (?, ?)", heard.items())
        self.connection.execute("COMMIT")

    def _add_told(self, who: Any, call: Any, result: dict[str, Any]) -> None:
        """Note what an answer says of tasks: one, or many."""
        asked_at, op = self._asked.get((who, call), (0, ""))
        for one in [result, *result.get("tasks", ())]:
            if "task_seq" in one and "state" in one:
                told = (
                    self._length,
                    asked_at,
                    op,
                    one["task_seq"],
                    one["state"],
                    one.get("attempt"),
                    one.get("digest"),
                )
                self.connection.execute("INSERT INTO told VALUES (?, ?, ?, ?, ?, ?, ?)", told)


def outcome(state: str, result: Any, failure: str | None, completed_at: str | None) -> str:
    """Return what names an outcome: *result* is a JSON value, *failure* its message, *completed_at* as the file has it."""
    said = json.dumps([state, result, failure, completed_at], sort_keys=True)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()[:16]
