"""
Owns what a user's own table would be: plain `sqlite3`, a task row and its events, one commit a step.

Each commit changes the row and notes what happened, as lash_store does: a key to find the task by, its state, and a history.
"""

from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

__all__ = ["COMPLETE", "EVENT", "SCHEMA", "SPAWN", "START", "life_cycle", "now", "open_plain"]

SCHEMA = """
CREATE TABLE tasks (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, session TEXT NOT NULL, id TEXT NOT NULL, kind TEXT NOT NULL, state TEXT NOT NULL,
  function TEXT NOT NULL, arguments TEXT NOT NULL, attempt INTEGER NOT NULL, result TEXT,
  created_at TEXT NOT NULL, updated_at TEXT NOT NULL, completed_at TEXT, UNIQUE (session, id));
CREATE TABLE events (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, task INTEGER NOT NULL REFERENCES tasks (seq), type TEXT NOT NULL, at TEXT NOT NULL,
  data TEXT NOT NULL);
CREATE INDEX events_task ON events (task);
"""
SPAWN = (
    "INSERT INTO tasks (session, id, kind, state, function, arguments, attempt, created_at, updated_at)"
    " VALUES ('s1', :id, 'other', 'pending', 'job', :arguments, 0, :now, :now)"
)
START = "UPDATE tasks SET state = 'running', attempt = attempt + 1, updated_at = :now WHERE seq = :seq AND state = 'pending'"
COMPLETE = (
    "UPDATE tasks SET state = 'completed', result = :result, updated_at = :now, completed_at = :now"
    " WHERE seq = :seq AND state = 'running'"
)
EVENT = "INSERT INTO events (task, type, at, data) VALUES (:seq, :type, :now, :data)"


def now() -> str:
    """Return the time as the tables hold it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def open_plain(path: Path, synchronous: str) -> sqlite3.Connection:
    """Make the table in a new file, in WAL mode."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL").fetchall()
    connection.execute(f"PRAGMA synchronous={synchronous}").fetchall()
    connection.executescript(SCHEMA)
    return connection


def life_cycle(connection: sqlite3.Connection, number: int) -> None:
    """Make one task, start it and complete it: three commits."""
    arguments = json.dumps({"number": number})
    connection.execute("BEGIN IMMEDIATE")
    seq = connection.execute(SPAWN, {"id": f"job-{number}", "arguments": arguments, "now": now()}).lastrowid
    connection.execute(EVENT, {"seq": seq, "type": "registered", "now": now(), "data": arguments})
    connection.execute("COMMIT")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(START, {"seq": seq, "now": now()})
    connection.execute(EVENT, {"seq": seq, "type": "started", "now": now(), "data": "{}"})
    connection.execute("COMMIT")
    result = json.dumps(number)
    connection.execute("BEGIN IMMEDIATE")
    connection.execute(COMPLETE, {"seq": seq, "result": result, "now": now()})
    connection.execute(EVENT, {"seq": seq, "type": "completed", "now": now(), "data": result})
    connection.execute("COMMIT")
