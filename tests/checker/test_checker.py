"""The checker finds each promise that somebody breaks, keeps quiet of a sound file, and knows nothing of the package."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store.schema import APPLICATION_ID, HEAD
from tests.checker import PROMISES, Entry, check, folding, judging, log, promises
from tests.checker.scenario import live_through

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Entry]]:
    folder = tmp_path_factory.mktemp("sound")
    entries = asyncio.run(live_through(folder / "agent.db"))
    return folder / "agent.db.copy", json.loads(json.dumps(entries))


@pytest.fixture
def copy(sound: tuple[Path, list[Entry]], tmp_path: Path) -> Path:
    return Path(shutil.copyfile(sound[0], tmp_path / "copy.db"))


def edit(path: Path, script: str) -> None:
    """Change a file behind the back of what guards it."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA ignore_check_constraints = ON")
        for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {name}")
        for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE sql LIKE 'CREATE UNIQUE INDEX%'").fetchall():
            db.execute(f"DROP INDEX {name}")
        db.executescript(script)


def test_a_sound_file_and_its_log_break_nothing(sound: tuple[Path, list[Entry]]) -> None:
    path, entries = sound
    assert check(path, entries) == []
    assert check(path) == []
    answered = {entry[3] for entry in entries if entry[0] == "S"}
    assert {"spawn", "save", "transfer", "handoff", "inbox", "close", "cancel", "signal"} <= answered


def test_a_follower_that_is_told_of_what_was_pruned_is_told_nothing_twice(sound: tuple[Path, list[Entry]]) -> None:
    path, entries = sound
    last = max(entry[3] for entry in entries if entry[0] == "F")

    # its number is that of the last event that was told
    assert check(path, [*entries, ["F", "p1", 0, last, None, "pruned"]]) == []
    assert check(path, [*entries, ["F", "p1", 0, last - 1, None, "pruned"]]) != []


@pytest.mark.parametrize(("attempt", "is_its_own"), [(0, False), (1, True), (2, True)])
def test_only_a_body_of_an_attempt_before_that_which_ended_may_begin_after_its_end_was_seen(
    sound: tuple[Path, list[Entry]], attempt: int, is_its_own: bool
) -> None:
    path, entries = sound

    found = check(path, [*entries, ["B", "x", 4, attempt]])

    assert any(one.promise == "P12" and one.what.startswith("begun after") for one in found) == is_its_own


# --- what is broken, and which query must say so ----------------------------------------------------------------------

Break = str | Callable[[list[Entry]], list[Entry]]

FORGET_DONE = " ".join(
    f"DELETE FROM {table} WHERE task_seq = 2;"
    for table in ("events", "handles", "steps", "signals", "inbox", "campaign_effects", "tasks")
)


def adding(*entries: Entry) -> Callable[[list[Entry]], list[Entry]]:
    """Let a log say more."""
    return lambda log: [*log, *entries]


def before(*entries: Entry) -> Callable[[list[Entry]], list[Entry]]:
    return lambda log: [*entries, *log]


def asked_and_told(op: str, args: dict[str, Any], result: dict[str, Any]) -> Callable[[list[Entry]], list[Entry]]:
    return adding(["S", "x", 1, op, args], ["A", "x", 1, result])


def without(op: str) -> Callable[[list[Entry]], list[Entry]]:
    """Let a log not say that something was asked for."""
    return lambda log: [entry for entry in log if entry[0] != "S" or entry[3] != op]


def early(log: list[Entry]) -> list[Entry]:
    """Let a body leave after everybody saw it cancelled."""
    left = [entry for entry in log if entry[:1] == ["X"] and entry[2] == 4]
    return [entry for entry in log if entry not in left] + left


BREAKS: dict[tuple[str, str], Break] = {
    ("P1", "session"): asked_and_told("session", {"scope": "desktop:s9"}, {}),
    ("P1", "session closed"): "DELETE FROM events WHERE type = 'session_closed'",
    ("P1", "created"): FORGET_DONE,
    ("P1", "cancel requested"): "UPDATE tasks SET completed_at = NULL, cancel_requested_at = NULL WHERE id = 'stopped'",
    ("P1", "all cancels requested"): asked_and_told(
        "cancel_all", {}, {"tasks": [{"task_seq": 5, "state": "cancel_requested"}]}
    ),
    ("P1", "settled"): "UPDATE tasks SET completed_at = NULL WHERE id = 'out'",
    ("P1", "progress"): "DELETE FROM events WHERE type = 'progress'",
    ("P1", "abandoned"): "UPDATE tasks SET attempt = 1 WHERE id = 'given'",
    ("P1", "signal"): "DELETE FROM signals",
    ("P1", "note"): "DELETE FROM inbox WHERE key = 'k'",
    ("P1", "checkpoint"): "DELETE FROM steps WHERE kind = 'checkpoint'",
    ("P1", "step"): "UPDATE steps SET state = 'begun' WHERE kind = 'step'",
    ("P1", "moved"): "DELETE FROM events WHERE type = 'transferred'",
    ("P1", "handoff"): "DELETE FROM handoffs",
    ("P1", "observer"): "DELETE FROM handles WHERE role = 'observer'",
    ("P1", "read mark"): "UPDATE handles SET read_at = NULL",
    ("P1", "acknowledged notes"): "UPDATE inbox SET acknowledged_at = NULL",
    ("P1", "seen ends"): "UPDATE tasks SET state = 'failed' WHERE id = 'done'",
    ("P1", "seen events"): "UPDATE events SET type = 'progress' WHERE type = 'saved'",
    ("P2", "task"): without("spawn"),
    ("P2", "task twice"): "UPDATE tasks SET idempotency_key = 'one'",
    ("P2", "session"): without("session"),
    ("P2", "signal"): without("signal"),
    ("P2", "handoff"): without("handoff"),
    ("P2", "refused, and there"): before(
        ["S", "x", 1, "spawn", {"key": "key done"}], ["E", "x", 1, "TaskExists", False]
    ),
    ("P2", "effect twice"): "INSERT INTO campaign_effects VALUES (2, 'book')",
    ("P2", "effect without its step"): "INSERT INTO campaign_effects VALUES (2, 'other')",
    ("P3", "first event"): "DELETE FROM events WHERE type = 'registered'",
    ("P3", "owner's handle"): "UPDATE handles SET role = 'owner'",
    ("P3", "orphans"): "PRAGMA foreign_keys = OFF; DELETE FROM tasks WHERE id = 'done'",
    ("P3", "row and tombstone"): "UPDATE tombstones SET task_seq = 2",
    ("P4", "hole"): FORGET_DONE,
    ("P4", "events are told without a hole"): "DELETE FROM events WHERE type = 'progress'",
    ("P5", "fold"): "UPDATE tasks SET label = 'another' WHERE id = 'done'",
    ("P6", "path"): "UPDATE events SET data = json_set(data, '$.state', 'waiting') WHERE type = 'completed'",
    ("P6", "attempt"): "UPDATE events SET attempt = 3 WHERE type = 'started'",
    ("P7", "ends"): "DELETE FROM events WHERE type = 'completed'",
    ("P7", "live"): "UPDATE tasks SET completed_at = NULL WHERE id = 'done'",
    ("P7", "two live of one id"): "UPDATE tasks SET id = 'one', scope = 'desktop:s1'",
    ("P8", "winner"): asked_and_told("cancel", {}, {"task_seq": 2, "state": "cancelled"}),
    ("P8", "live after its end"): asked_and_told("get", {}, {"task_seq": 2, "state": "running"}),
    ("P9", "claims"): "UPDATE events SET type = 'started' WHERE type = 'saved'",
    ("P9", "bodies"): adding(["B", "x", 2, 1]),
    (
        "P9",
        "stale progress",
    ): "UPDATE events SET data = json_set(data, '$.progress', 'attempt 7 half') WHERE type = 'progress'",
    ("P9", "stale step"): "UPDATE steps SET attempt = 2",
    ("P9", "stale save"): "UPDATE events SET attempt = 2 WHERE type = 'saved'",
    ("P9", "stale result"): "UPDATE tasks SET result = '{\"attempt\":2}' WHERE id = 'done'",
    ("P10", "claimed"): "UPDATE events SET data = json_set(data, '$.owner_id', 9) WHERE type = 'started'",
    ("P11", "left"): "UPDATE tasks SET owner_id = 9 WHERE id = 'waiting'",
    ("P11", "owners"): (
        "INSERT INTO owners SELECT 9, 'other', runtime, pid, process_start, boot_id, host, version, opened_at, NULL, NULL "
        "FROM owners"
    ),
    ("P12", "forgotten"): "UPDATE tasks SET state = 'running' WHERE id = 'stopped'",
    ("P12", "early"): early,
    ("P12", "begun after"): adding(["B", "x", 4, 1]),
    ("P13", "answers"): asked_and_told("wait", {}, {"task_seq": 2, "state": "completed", "digest": "another"}),
    ("P13", "row"): "UPDATE tasks SET result = '7' WHERE id = 'out'",
    ("P14", "astray"): "UPDATE handles SET scope = 'desktop:s2' WHERE task_seq = 2 AND role = 'owner'",
    ("P14", "unread note astray"): (
        "INSERT INTO inbox (scope, key, task_seq, text, data, posted_at) VALUES ('desktop:s2', 'n', 5, '', '0', '')"
    ),
    ("P15", "handoff without its event"): "DELETE FROM events WHERE type = 'handed_off'",
    ("P15", "event without its handoff"): "DELETE FROM handoffs",
    ("P15", "moved by a handoff"): "DELETE FROM events WHERE type = 'transferred' AND from_scope = 'desktop:s2'",
    ("P15", "cancelled by a handoff or a close"): (
        "UPDATE events SET data = json_set(data, '$.cancelled', json_array(5)) WHERE type = 'handed_off'"
    ),
    ("P15", "moved by a close"): "DELETE FROM events WHERE type = 'transferred' AND from_scope = 'desktop:s3'",
    ("P15", "half of a transfer"): adding(
        ["S", "x", 1, "transfer", {"scope": "desktop:s1", "to": "desktop:s2", "seqs": [3, 2], "only": 1}]
    ),
    ("P16", "born"): (
        "DELETE FROM events WHERE seq = 3; UPDATE events SET seq = 3, scope = 'desktop:s1' WHERE type = 'session_closed'"
    ),
    ("P16", "moved"): (
        "DELETE FROM events WHERE seq = 3; UPDATE events SET seq = 3, scope = 'desktop:s2' WHERE type = 'session_closed'"
    ),
    ("P16", "hidden"): "UPDATE sessions SET closed_at = ''; UPDATE tasks SET completed_at = NULL WHERE mode = 'hidden'",
    ("P17", "notes of an end"): "DELETE FROM inbox WHERE key LIKE 'end:%'",
    ("P17", "in the transaction of the end"): "UPDATE inbox SET posted_at = ''",
    ("P17", "handed out again"): asked_and_told("inbox", {}, {"notes": [2, 3]}),
    ("P18", "twice or out of order"): adding(["F", "p1", 0, 1, None, "session_opened"]),
    ("P18", "left out"): adding(["F", "x", 0, 20, None, "saved"], ["F", "x", 0, 27, None, "saved"]),
    ("P19", "numbers"): "UPDATE sqlite_sequence SET seq = 2",
    ("P19", "number given again"): "UPDATE tasks SET id = 'out' WHERE id = 'done'",
}

QUERIES = [(promise.number, name) for promise in PROMISES for name in promise.queries]


def test_every_query_has_something_that_must_turn_it_red() -> None:
    assert set(BREAKS) == set(QUERIES)


@pytest.mark.parametrize(("promise", "query"), QUERIES)
def test_what_breaks_a_promise_is_found(sound: tuple[Path, list[Entry]], copy: Path, promise: str, query: str) -> None:
    entries = sound[1]
    broken = BREAKS[promise, query]
    if isinstance(broken, str):
        edit(copy, broken)
    else:
        entries = broken(entries)

    found = check(copy, entries)

    assert any(one.promise == promise and one.what.startswith(f"{query}: ") for one in found), found


def test_a_damaged_file_is_not_whole(copy: Path) -> None:
    data = bytearray(copy.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    copy.write_bytes(data)
    assert {one.promise for one in check(copy)} == {"P19"}


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("PRAGMA application_id = 7", "the application id is not a store's"),
        ("UPDATE lash_store_version SET version_num = '9999'", "its revision is ['9999']"),
        (
            "UPDATE lash_store_version SET version_num = '0003'",
            "at revision 0003, it has ['monitors', 'updates'] of revision 0004",
        ),
        ("DELETE FROM lash_store_version", "its revision is []"),
        ("DROP TABLE lash_store_version", "it has no revision"),
        ("UPDATE tasks SET owner_id = 9 WHERE id = 'waiting'", "foreign key check: ('tasks', 5, 'owners', 0)"),
    ],
)
def test_a_file_of_no_one_revision_is_not_whole(copy: Path, script: str, says: str) -> None:
    edit(copy, script)
    assert says in [one.what for one in check(copy) if one.promise == "P19"]


# --- the checker itself -----------------------------------------------------------------------------------------------


def test_the_checker_imports_nothing_of_the_package() -> None:
    for module in (folding, judging, log, promises):
        assert module.__file__ is not None
        tree = ast.parse(Path(module.__file__).read_text())
        imported = [
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        ]
        assert [name for name in imported if "lash" in name or "sqlalchemy" in name] == []


def test_the_checker_knows_the_head_and_the_name_of_a_store() -> None:
    assert (judging.HEAD, judging.APPLICATION_ID) == (HEAD, APPLICATION_ID)


def test_the_page_of_promises_says_what_the_checker_asks() -> None:
    page = (DOCS / "promises.md").read_text()
    told = dict(re.findall(r"^### (P\d+) (.+)$", page, re.MULTILINE))
    for promise in PROMISES:
        assert told[promise.number].rstrip(".").lower() == promise.says.lower(), promise.number


def test_the_command_tells_what_is_broken_and_changes_nothing(sound: tuple[Path, list[Entry]], copy: Path) -> None:
    log_file = copy.with_name("log.jsonl")
    log_file.write_text("".join(f"{json.dumps(entry)}\n" for entry in sound[1]))

    def run() -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "tests.checker", copy, log_file], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    was = copy.read_bytes()
    assert run()[0] == 0
    assert copy.read_bytes() == was
    edit(copy, BREAKS["P5", "fold"])  # type: ignore[arg-type]
    code, said = run()
    assert code == 1
    assert "P5   fold: 2 label: the events say 'work', the row 'another'" in said
