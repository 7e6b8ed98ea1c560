"""
Judges a copy of the file of a campaign in a process of its own: ``python -m tests.campaign.judge COPY LOG``; without a log, a
live file.

Prints one JSON object: what is broken, and how often what should sometimes happen has left a trace in file or log.
"""

from __future__ import annotations

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from tests.checker import Checker

__all__ = ["IN_FILE", "IN_LOG", "judge"]

IN_FILE = {
    "cancel beat finish": (
        "SELECT count(DISTINCT c.task_seq) FROM events AS c JOIN events AS e USING (task_seq) "
        "WHERE c.type = 'cancel_requested' AND e.type = 'cancelled' AND c.attempt > 0"
    ),
    "finish beat cancel": (
        "SELECT count(DISTINCT c.task_seq) FROM events AS c JOIN events AS e USING (task_seq) "
        "WHERE c.type = 'cancel_requested' AND e.type IN ('completed', 'failed')"
    ),
    "cancelled before it began": "SELECT count(*) FROM tasks WHERE state = 'cancelled' AND mode <> 'external' AND attempt = 0",
    "reattached": "SELECT count(*) FROM events WHERE type = 'reattached'",
    "abandoned by recovery": (
        "SELECT count(*) FROM tasks WHERE state = 'abandoned' AND json_extract(evidence, '$.end') = 'died'"
    ),
    "attempts exhausted": (
        "SELECT count(*) FROM tasks WHERE state = 'failed' AND json_extract(failure, '$.type') IN ('AttemptsExhausted', 'Flaky')"
    ),
    "retried": "SELECT count(*) FROM events WHERE type = 'retry_scheduled'",
    "callback cut off": "SELECT count(*) FROM events WHERE type = 'callback_failed'",
    "moved while it ran": "SELECT count(*) FROM events WHERE type = 'transferred' AND attempt > 0",
    "session closed with work in it": (
        "SELECT count(*) FROM events WHERE type = 'session_closed' AND json_array_length(data, '$.transferred') > 0"
    ),
    "pruned": "SELECT count(*) FROM tombstones",
    "an owner given up": "SELECT count(*) FROM owners WHERE \"end\" = 'abandoned'",
    "an owner that died": "SELECT count(*) FROM owners WHERE \"end\" = 'died'",
    "an owner that closed": "SELECT count(*) FROM owners WHERE \"end\" = 'closed'",
}
"""Questions to the file: what should sometimes happen, and how often it did."""

IN_LOG = {
    "in doubt": "SELECT count(*) FROM in_doubt",
    "in doubt, applied": (
        "SELECT count(*) FROM in_doubt AS d WHERE d.op IN ('spawn', 'register') "
        "AND json_extract(d.args, '$.id') IN (SELECT id FROM f.tasks)"
    ),
    "in doubt, absent": (
        "SELECT count(*) FROM in_doubt AS d WHERE d.op IN ('spawn', 'register') "
        "AND json_extract(d.args, '$.id') NOT IN (SELECT id FROM f.tasks UNION ALL SELECT id FROM f.tombstones)"
    ),
    "loser told the winner": "SELECT count(*) FROM answered WHERE json_extract(result, '$.verdict') = 'superseded'",
    "work refused by a closed session": (
        "SELECT count(*) FROM refused AS r JOIN asked AS s ON s.who = r.who AND s.call = r.call "
        "WHERE r.error = 'SessionClosed'"
    ),
    "a move refused": (
        "SELECT count(*) FROM refused AS r JOIN asked AS s ON s.who = r.who AND s.call = r.call "
        "WHERE s.op IN ('transfer', 'handoff')"
    ),
    "stale write refused": "SELECT count(*) FROM refused WHERE error = 'StaleAttempt'",
    "a body that was left as stale": "SELECT count(*) FROM departed WHERE how LIKE '%stale%'",
}


def judge(copy: Path, log: Path | None) -> dict[str, object]:
    """Return what is broken in a file, and the counts."""
    checker = Checker(() if log is None else map(json.loads, log.read_text().splitlines()))
    broken = checker.check(copy)
    counts: dict[str, int] = {}
    with closing(checker):
        db = checker.connection
        db.execute("ATTACH ? AS f", [f"file:{copy}?mode=ro"])
        try:
            at_head = db.execute("SELECT count(*) FROM f.sqlite_schema WHERE name = 'tombstones'").fetchone()[0]
            for name, question in {**IN_LOG, **IN_FILE}.items() if at_head else ():
                counts[name] = db.execute(question).fetchone()[0]
        except sqlite3.DatabaseError as error:
            broken.append(("P19", str(error)))  # type: ignore[arg-type]
    return {"broken": [list(one) for one in broken], "counts": counts, "at head": bool(at_head)}


if __name__ == "__main__":
    file, *logs = map(Path, sys.argv[1:])
    print(json.dumps(judge(file, logs[0] if logs else None)))
