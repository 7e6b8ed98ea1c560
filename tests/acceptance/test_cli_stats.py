"""The figures of a file, held against plain counts of its rows."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import agent_file
from tests.acceptance.commands import run
from tests.runtime.support import rows


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stats") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


def stats(db: Path) -> dict[str, Any]:
    done = run("stats", "--json", db=db)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_tasks_are_counted_by_kind_and_state(db: Path) -> None:
    counted = {
        (row["kind"], row["state"]): row["n"]
        for row in rows(db, "SELECT kind, state, count(*) AS n FROM tasks GROUP BY 1, 2")
    }
    by_kind = stats(db)["tasks"]
    assert {(kind, state): n for kind, states in by_kind.items() for state, n in states.items() if n} == counted
    printed = run("stats", db=db).stdout
    assert re.search(r"\nkind +pending +completed +failed +all\n", printed)
    assert re.search(r"\nall +2 +4 +2 +8\n", printed)


def test_ages_of_live_work_name_the_oldest(db: Path) -> None:
    live = stats(db)["live"]
    assert [*live] == ["pending"]
    assert live["pending"]["count"] == 2
    assert live["pending"]["oldest_task"]["id"] == "listener"
    assert 0 <= live["pending"]["newest"] <= live["pending"]["median"] <= live["pending"]["oldest"] < 600


def test_rates_count_what_happened_in_the_last_hour_and_day(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "aged.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("DROP TRIGGER events_are_history")
        # the first third happened two days ago, the second two hours
        (last,) = target.execute("SELECT max(seq) FROM events").fetchone()
        for until, hours in ((last * 2 // 3, 2), (last // 3, 48)):
            at = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            target.execute("UPDATE events SET at = ? WHERE seq <= ?", (at, until))
        target.execute("DELETE FROM events WHERE seq = ?", (last // 2,))
        # the clock was set back for a moment
        target.execute("UPDATE events SET at = '2020-01-01T00:00:00.000Z' WHERE seq = ? OR type = 'failed'", (last,))
    source.close()
    target.close()
    names = {"created": "registered", "completed": "completed", "failed": "failed"}
    for span, hours in (("hour", 1), ("day", 24)):
        since = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        rate = stats(path)["rates"][span]
        for name, event in names.items():
            wanted = rows(path, "SELECT count(*) AS n FROM events WHERE type = ? AND at >= ?", event, since)[0]["n"]
            assert rate[name] == wanted, (span, name)
    assert (
        stats(path)["rates"]["hour"]["created"]
        < stats(path)["rates"]["day"]["created"]
        < stats(db)["rates"]["hour"]["created"]
    )


def test_bytes_are_those_of_the_files_and_of_the_pages_in_them(db: Path) -> None:
    found = stats(db)
    assert found["file"]["bytes"] == db.stat().st_size
    assert found["file"]["wal_bytes"] == 0
    tables = {table["name"]: table for table in found["tables"]}
    assert {"tasks", "events", "handles", "updates"} <= {*tables}
    whole = sum(table["bytes"] for table in tables.values())
    assert whole <= found["file"]["content_bytes"] == found["file"]["bytes"]
    assert all(table["index_bytes"] < table["bytes"] for table in tables.values() if table["name"] != "sqlite_schema")


def test_a_build_without_dbstat_says_so(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lash_store.cli import figures

    monkeypatch.setattr(figures, "_HAS_DBSTAT", "SELECT 1 WHERE 0")
    assert stats(db)["tables"] is None
    assert "built without dbstat" in run("stats", db=db).stdout


def test_sessions_are_sorted_by_the_bytes_that_were_stored(db: Path) -> None:
    sessions = stats(db)["sessions"]
    assert sessions[0]["scope"] == "desktop:s1"
    assert [session["bytes"] for session in sessions] == sorted(
        (session["bytes"] for session in sessions), reverse=True
    )
    one = {name: count for name, count in sessions[0].items() if name not in {"scope", "bytes"}}
    counted = {
        name: rows(db, f"SELECT count(*) AS n FROM {sql}")[0]["n"]
        for name, sql in {
            "tasks": "tasks WHERE scope = 'desktop:s1'",
            "live": "tasks WHERE scope = 'desktop:s1' AND completed_at IS NULL",
            "events": "events WHERE scope = 'desktop:s1'",
            "steps": "steps JOIN tasks USING (task_seq) WHERE scope = 'desktop:s1'",
            "signals": "signals JOIN tasks USING (task_seq) WHERE scope = 'desktop:s1'",
            "notes": "inbox WHERE scope = 'desktop:s1'",
            "updates": "updates WHERE scope = 'desktop:s1'",
        }.items()
    }
    assert one == counted


def test_bytes_of_a_session_are_bytes_and_not_characters(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("UPDATE tasks SET progress = progress || 'ßß' WHERE id = 'listener'")
    source.close()
    target.close()
    assert stats(path)["sessions"][0]["bytes"] == stats(db)["sessions"][0]["bytes"] + 4


def test_monitors_are_told_by_what_they_wrote(db: Path) -> None:
    (monitor,) = stats(db)["monitors"]
    assert (monitor["monitor_id"], monitor["lines"], monitor["bytes"], monitor["unread"]) == ("tests", 2, 10, 2)
    assert re.search(r"\ndesktop:s1 tests #\d+ +failed +10 B ", run("stats", db=db).stdout)
