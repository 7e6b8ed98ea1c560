"""Owns the figures of a file, counted by SQLite: tasks, ages, rates, and where its bytes are; lays nothing out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ..errors import StorageError
from .output import stored
from .phrases import LIVE, STATES
from .snapshot import Snapshot, first_event

__all__ = ["figures"]


def figures(snapshot: Snapshot) -> dict[str, Any]:
    """
    Return every figure as plain JSON; bytes are bytes, ages seconds, times as the file has them.

    What sessions and monitors hold is counted by what was stored, what tables take by their pages.
    """
    now = datetime.now(UTC)
    with snapshot.one_state():
        counted = snapshot.rows(_TASKS)
        by_session = _by_session(snapshot, counted)
        return {
            "file": _file(snapshot),
            "tasks": _by_kind(counted),
            "live": _ages(snapshot, now),
            "rates": {name: _rate(snapshot, now - span) for name, span in _SPANS.items()},
            "tables": _tables(snapshot),
            "sessions": by_session,
            "monitors": [{**row, "armed": bool(row["armed"])} for row in snapshot.dicts(_MONITORS)],
        }


def _bytes(*columns: str) -> str:
    return " + ".join(f"COALESCE(length(CAST({column} AS BLOB)), 0)" for column in columns)


# --- tasks -----------------------------------------------------------------------------------------------------------

_TASKS = f"""
SELECT scope, state, kind, COUNT(*),
  SUM({_bytes("arguments", "progress", "result", "failure", "last_error", "evidence")})
FROM tasks GROUP BY scope, state, kind
"""
"""One look at every row serves the counts and the bytes."""


def _by_kind(counted: Iterable[Any]) -> dict[str, dict[str, int]]:
    """Return how many tasks of each kind stand in each state."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(STATES, 0))
    for _, state, kind, count, _ in counted:
        found[kind][state] = found[kind].get(state, 0) + count
    return dict(sorted(found.items()))


_AGES = """
SELECT state, created_at, scope, id, task_seq FROM tasks WHERE completed_at IS NULL ORDER BY state, created_at DESC
"""


def _ages(snapshot: Snapshot, now: datetime) -> dict[str, dict[str, Any]]:
    """Return how old live work is, by its state, since its creation; and which is the oldest."""
    by_state: dict[str, list[Any]] = defaultdict(list)
    for state, *rest in snapshot.rows(_AGES):
        by_state[state].append(rest)
    return {state: _spread(by_state[state], now) for state in LIVE if state in by_state}


def _spread(rows: list[Any], now: datetime) -> dict[str, Any]:
    _, scope, task_id, task_seq = rows[-1]
    return {
        "count": len(rows),
        "newest": _seconds(rows[0][0], now),
        "median": _seconds(rows[len(rows) // 2][0], now),
        "oldest": _seconds(rows[-1][0], now),
        "oldest_task": {"task_seq": task_seq, "scope": scope, "id": task_id},
    }


def _seconds(at: str, now: datetime) -> float | None:
    try:
        return round(max(0.0, (now - datetime.fromisoformat(at)).total_seconds()), 3)
    except (ValueError, TypeError):
        # a hand was at the row
        return None


# --- rates -----------------------------------------------------------------------------------------------------------

_SPANS = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
_RATED = {
    "created": ("registered",),
    "started": ("started", "reattached"),
    "retried": ("retry_scheduled",),
    "completed": ("completed",),
    "failed": ("failed",),
    "cancelled": ("cancelled",),
    "abandoned": ("abandoned",),
}
_COUNT_EVENTS = "SELECT type, COUNT(*) FROM events WHERE seq >= :seq AND at >= :since GROUP BY type"


def _rate(snapshot: Snapshot, since: datetime) -> dict[str, int]:
    """Return how often things happened since a time."""
    text = stored(since)
    found = dict(snapshot.rows(_COUNT_EVENTS, seq=first_event(snapshot, text), since=text))
    return {name: sum(found.get(word, 0) for word in events) for name, events in _RATED.items()}


# --- bytes -----------------------------------------------------------------------------------------------------------

_HOLDINGS = {
    "events": f"SELECT scope, COUNT(*), SUM({_bytes('data')}) FROM events GROUP BY scope",
    "steps": f"SELECT t.scope, COUNT(*), SUM({_bytes('s.value', 's.failure')}) "
    "FROM steps AS s JOIN tasks AS t USING (task_seq) GROUP BY t.scope",
    "signals": f"SELECT t.scope, COUNT(*), SUM({_bytes('s.payload')}) "
    "FROM signals AS s JOIN tasks AS t USING (task_seq) GROUP BY t.scope",
    "notes": f"SELECT scope, COUNT(*), SUM({_bytes('text', 'data')}) FROM inbox GROUP BY scope",
    "updates": "SELECT scope, COUNT(*), SUM(bytes) FROM updates GROUP BY scope",
}


def _by_session(snapshot: Snapshot, counted: Iterable[Any]) -> list[dict[str, Any]]:
    """Return what each session holds, and how many bytes that is, the biggest first."""
    names = ("tasks", "live", *_HOLDINGS, "bytes")
    held: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(names, 0))
    for (scope,) in snapshot.rows("SELECT scope FROM sessions ORDER BY session_seq"):
        held[scope]["tasks"] = 0
    for scope, state, _, count, size in counted:
        held[scope]["tasks"] += count
        held[scope]["live"] += count if state in LIVE else 0
        held[scope]["bytes"] += size
    for name, sql in _HOLDINGS.items():
        for scope, count, size in snapshot.rows(sql):
            held[scope][name] += count
            held[scope]["bytes"] += size
    rows = [{"scope": scope, **row} for scope, row in held.items()]
    return sorted(rows, key=lambda row: -int(row["bytes"]))


_MONITORS = """
SELECT m.scope, m.monitor_id, m.task_seq, t.state, m.armed, m.lines, m.bytes, m.kept_lines, m.kept_bytes, m.dropped,
  (SELECT COUNT(*) FROM updates AS u WHERE u.task_seq = m.task_seq AND u.acknowledged_at IS NULL) AS unread
FROM monitors AS m JOIN tasks AS t USING (task_seq)
ORDER BY m.bytes DESC, m.task_seq
"""

_HAS_DBSTAT = "SELECT 1 FROM pragma_module_list WHERE name = 'dbstat'"
_COUNT_PAGES = """
SELECT COALESCE(s.tbl_name, d.name) AS name, SUM(d.pgsize) AS bytes,
  COALESCE(SUM(d.pgsize) FILTER (WHERE s.type = 'index'), 0) AS index_bytes, SUM(d.unused) AS unused
FROM dbstat('main', 1) AS d LEFT JOIN sqlite_schema AS s ON s.name = d.name
GROUP BY 1 ORDER BY bytes DESC, 1
"""


def _tables(snapshot: Snapshot) -> list[dict[str, Any]] | None:
    """Return the bytes of each table with its indexes, the biggest first; None if this SQLite was built without `dbstat`."""
    if not snapshot.rows(_HAS_DBSTAT):
        return None
    return snapshot.dicts(_COUNT_PAGES)


def _file(snapshot: Snapshot) -> dict[str, Any]:
    """Return the sizes of the files, and of their content, some of which may stand in the ``-wal`` still."""

    def pragma(name: str) -> int:
        row = snapshot.row(f"PRAGMA {name}")
        return 0 if row is None else int(row[0])

    page_size = pragma("page_size")
    return {
        "path": str(snapshot.path),
        "revision": snapshot.revision,
        "bytes": _size_of(snapshot.path),
        "wal_bytes": _size_of(Path(f"{snapshot.path}-wal")),
        "shm_bytes": _size_of(Path(f"{snapshot.path}-shm")),
        "page_bytes": page_size,
        "content_bytes": pragma("page_count") * page_size,
        "free_bytes": pragma("freelist_count") * page_size,
    }


def _size_of(path: Path) -> int:
    try:
        # never opened: closing it again would drop SQLite's locks
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"{path} cannot be looked at: {error.strerror}") from error
