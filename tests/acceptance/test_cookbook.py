"""The cook-book: each question is put to the real `sqlite3` shell, on a file of a real run, and the answer is what happened."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from lash_store import TaskStore
from lash_store.cli import main
from lash_store.cli.ask import script
from lash_store.cli.cookbook import COOKBOOK
from lash_store.schema import HEAD, metadata
from tests.acceptance import cookbook_page
from tests.acceptance.cookbook_programs import BIG, SLOW, run
from tests.runtime.support import check_file, rows

SHELL = shutil.which("sqlite3")
needs_shell = pytest.mark.skipif(SHELL is None, reason="there is no sqlite3 shell on this machine")
METADATA = Path(__file__).parents[2] / "examples" / "datasette" / "metadata.json"

NOW = {"seconds", "is_claimed"}
"""Columns whose values depend on when they are asked for."""

Row = dict[str, Any]


class Made(NamedTuple):
    """The file of the run, stopped by now, its two killed owners, and what the shell said while the last one lived."""

    path: Path
    killed: int
    owner: int
    alive: dict[str, list[Row]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Make the run."""
    path = tmp_path_factory.mktemp("cookbook") / "agent.db"
    with run(path) as (killed, owner):
        alive = {name: shell(path, name) for name in ("running", "waiting", "monitors", "unread-notes") if SHELL}
        pid = owner.pid
        owner.kill()
    yield Made(path, killed, pid, alive)
    check_file(path)


def shell(path: Path, name: str, **given: object) -> list[Row]:
    """Put a question to the shell, in the words of ``--sql``."""
    query = COOKBOOK[name]
    values = {**dict.fromkeys(one.name for one in query.parameters), **given}
    done = subprocess.run(
        [str(SHELL), "-readonly", "-bail", "-json", str(path)],
        input=script(query, values),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found: list[Row] = json.loads(done.stdout or "[]")
    return found


def command(*arguments: str | Path) -> tuple[int, str, str]:
    """Run a command of ours in this process."""
    out, err = io.StringIO(), io.StringIO()
    clean = {name: value for name, value in os.environ.items() if name not in {"LASH_STORE_DB", "COLUMNS"}}
    with (
        mock.patch.dict(os.environ, clean, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        status = main([str(one) for one in arguments])
    return status, out.getvalue(), err.getvalue()


def of(found: list[Row], *columns: str) -> list[Any]:
    """Return some columns of an answer, as tuples, or the values of one."""
    return [row[columns[0]] if len(columns) == 1 else tuple(row[column] for column in columns) for row in found]


def by(found: list[Row], column: str) -> dict[Any, Row]:
    """Return an answer by the values of a column, each of which it has once."""
    assert len({row[column] for row in found}) == len(found)
    return {row[column]: row for row in found}


LIVE = [
    ("desktop:s1", "overnight", "running", 3),
    ("desktop:s1", "ci-run", "running", 0),
    ("desktop:s1", "stuck", "cancel_requested", 1),
    ("desktop:s1", "asking", "waiting", 1),
    ("desktop:s1", "asleep", "running", 1),
    ("desktop:s1", "review", "waiting", 0),
    ("desktop:s1", "monitor:watch", "running", 1),
    ("desktop:s1", "helper", "running", 1),
    ("desktop:s2", "part", "running", 1),
    ("desktop:s2", "part-of-part", "running", 1),
    ("desktop:s5", "kept", "running", 1),
    ("desktop:s5", "followed", "running", 1),
]


# --- the twenty ------------------------------------------------------------------------------------------------------


def test_there_are_twenty() -> None:
    assert len(COOKBOOK) == 20


@needs_shell
def test_what_is_running_is_under_way_with_its_owner_and_since_its_attempt_began(made: Made) -> None:
    found = shell(made.path, "running")
    assert sorted(of(found, "session", "id", "state", "attempt")) == sorted(LIVE)
    owners = {row["id"]: row["pid"] for row in found}
    assert owners.pop("ci-run") is None
    assert set(owners.values()) == {made.owner}
    # external work began before the rest, and goes on as if its registrar had not died
    assert (found[0]["id"], found[1]["id"]) == ("ci-run", "overnight")
    assert sorted(of(shell(made.path, "running", session="desktop:s2"), "id")) == ["part", "part-of-part"]


@needs_shell
def test_what_died_with_an_owner_is_told_with_what_became_of_it(made: Made) -> None:
    found = shell(made.path, "died")
    assert sorted(of(found, "id", "became", "now")) == [
        ("ci-run", "released", "running"),
        ("deploy", "abandoned", "abandoned"),
        ("doomed", "cancelled", "cancelled"),
        ("index", "reattached", "completed"),
        ("monitor:tail", "abandoned", "abandoned"),
        ("old-code", "released", "pending"),
        ("overnight", "reattached", "running"),
        ("tired", "failed", "failed"),
    ]
    assert {*of(found, "owner", "pid", "end")} == {(2, made.killed, "died")}
    assert shell(made.path, "died", owner=2) == found
    # the first one closed, the third was not found dead by anybody yet
    assert shell(made.path, "died", owner=1) == shell(made.path, "died", owner=3) == []


@needs_shell
def test_what_nobody_works_on_is_told_with_why(made: Made) -> None:
    assert of(shell(made.path, "unowned"), "id", "mode", "state", "function", "why") == [
        ("ci-run", "external", "running", None, "owner_died"),
        ("old-code", "managed", "pending", "retired", "unknown_function"),
    ]
    assert shell(made.path, "unowned", session="desktop:s5") == []


@needs_shell
def test_what_was_handed_over_is_told_by_giver_and_receiver(made: Made) -> None:
    found = shell(made.path, "handed-over", source="desktop:s4", destination="desktop:s5")
    assert of(found, "id", "what", "handoff", "now") == [
        ("kept", "moved", "to-five", "running"),
        ("let-go", "cancelled", "to-five", "cancelled"),
        ("followed", "moved", None, "running"),
    ]
    assert shell(made.path, "handed-over") == found
    assert shell(made.path, "handed-over", source="desktop:s5") == []


@needs_shell
def test_the_slowest_kind_is_named_with_its_slowest_task(made: Made) -> None:
    found = by(shell(made.path, "slow-kinds"), "work")
    look = found["look"]
    assert (look["kind"], look["tasks"], look["longest_id"]) == ("observer", 2, "slow-look")
    assert look["longest_seconds"] >= SLOW > look["mean_seconds"] > 0
    assert look["mean_seconds"] >= SLOW / 2
    ended = rows(made.path, "SELECT count(*) AS n FROM tasks WHERE completed_at IS NOT NULL")[0]["n"]
    assert sum(row["tasks"] for row in found.values()) == ended
    longest = [row["longest_seconds"] for row in found.values()]
    assert longest == sorted(longest, reverse=True)


@needs_shell
def test_who_cancelled_what_and_why_is_told_with_when_it_stopped(made: Made) -> None:
    found = shell(made.path, "cancels")
    assert of(found, "id", "reason", "because_of", "state") == [
        ("doomed", "the user pressed stop", None, "cancelled"),
        ("unneeded", "not needed any more", None, "cancelled"),
        ("crew", "the plan was wrong", None, "cancelled"),
        ("crew-1", "the plan was wrong", "crew", "cancelled"),
        ("stuck", "it takes too long", None, "cancel_requested"),
        ("let-go", "unreferenced", None, "cancelled"),
    ]
    assert f"pid {made.killed} " in found[0]["requested_by"]
    assert f"pid {made.owner} " in found[1]["requested_by"]
    assert [row["id"] for row in found if row["stopped_after"] is None] == ["stuck"]


@needs_shell
def test_a_cancel_that_comes_to_no_end_is_stuck_once_it_is_old_enough(made: Made) -> None:
    [stuck] = shell(made.path, "stuck-cancels", seconds=0)
    assert (stuck["id"], stuck["reason"], stuck["pid"]) == ("stuck", "it takes too long", made.owner)
    assert shell(made.path, "stuck-cancels", seconds=3600.5) == []


@needs_shell
def test_retries_are_counted_by_their_error(made: Made) -> None:
    found = shell(made.path, "retries")
    assert sorted(of(found, "error", "retries", "tasks", "recovered")) == [
        ("ConnectionError", 3, 2, 1),
        ("OSError", 1, 1, 0),
        ("TimeoutError", 1, 1, 1),
        ("death of the owner", 3, 3, 1),
    ]
    assert by(found, "error")["ConnectionError"]["last_id"] == "hopeless"
    assert shell(made.path, "retries", since="9999") == []


@needs_shell
def test_failures_are_counted_by_their_type_with_the_newest_of_each(made: Made) -> None:
    found = shell(made.path, "failures")
    assert of(found, "error", "tasks", "sessions") == [
        ("ValueError", 4, 2),
        ("owner died", 2, 1),
        ("AttemptsExhausted", 1, 1),
        ("ConnectionError", 1, 1),
        ("ProcessFailed", 1, 1),
    ]
    assert of(found[:1], "last_session", "last_id", "last_message") == [("desktop:s3", "loud", "no more")]
    assert of(shell(made.path, "failures", session="desktop:s3"), "error", "tasks") == [("ValueError", 2)]


@needs_shell
def test_attempts_are_counted_by_function(made: Made) -> None:
    found = by(shell(made.path, "attempts"), "function")
    counted = ("tasks", "attempts", "most", "spent", "completed", "failed", "live")
    assert of([found["fetch"]], *counted) == [(2, 6, 3, 4, 1, 1, 0)]
    assert of([found["index_repo"]], *counted) == [(1, 2, 2, 1, 1, 0, 0)]
    # overnight: once for each owner, and the one that closed is not counted against it
    assert of([found["stay"]], *counted) == [(9, 11, 3, 1, 0, 0, 6)]


@needs_shell
def test_bytes_are_counted_by_session_and_by_what_they_are(made: Made) -> None:
    found = by(shell(made.path, "bytes"), "session")
    # the text as an argument and as a result, each in the row and in an event
    assert next(iter(found)) == "desktop:s6"
    assert 2 * BIG <= found["desktop:s6"]["tasks"] < 2 * BIG + 100
    assert 2 * BIG <= found["desktop:s6"]["events"] < 2 * BIG + 1000
    assert found["desktop:s1"]["updates"] == len("one" + "two" + "bad")
    assert found["desktop:s1"]["signals"] == len('{"yes":true}' + '"hello"' + '{"try":"again"}')
    assert [session for session, row in found.items() if row["handoffs"]] == ["desktop:s4"]
    parts = ("tasks", "events", "steps", "signals", "notes", "updates", "handoffs")
    assert all(row["bytes"] == sum(row[part] for part in parts) for row in found.values())
    assert of(shell(made.path, "bytes", limit=1), "session") == ["desktop:s6"]


@needs_shell
def test_events_are_counted_by_the_hour(made: Made) -> None:
    found = shell(made.path, "events-per-hour")
    counted = {
        "events": "1",
        "registered": "type = 'registered'",
        "started": "type IN ('started', 'reattached')",
        "completed": "type = 'completed'",
        "went_wrong": "type IN ('failed', 'abandoned')",
        "cancelled": "type = 'cancelled'",
    }
    for column, rule in counted.items():
        wanted = rows(made.path, f"SELECT count(*) AS n FROM events WHERE {rule}")[0]["n"]
        assert sum(row[column] for row in found) == wanted > 0
    assert {row["hour"][13:] for row in found} == {":00Z"}
    [first] = rows(made.path, "SELECT min(at) AS at FROM events")
    assert found[0]["hour"][:13] == first["at"][:13]


@needs_shell
def test_notes_that_nobody_read_are_told_and_those_that_were_read_are_not(made: Made) -> None:
    found = shell(made.path, "unread-notes", session="desktop:s3")
    assert of(found, "id", "text") == [
        ("talker", "half is done"),
        ("talker", "all is done"),
        ("loud", "task 'loud' failed: ValueError: no more"),
    ]
    assert {*of(shell(made.path, "unread-notes", session="desktop:s1"), "id")} == {
        "monitor:tail",
        "monitor:short",
        "monitor:lint",
    }


WAITING = [
    ("old-code", "an owner", None),
    ("later", "its next attempt, after OSError", None),
    ("asking", "an answer", "hint"),
    ("asleep", "the end of sleep an hour", None),
    ("review", "who does the work", None),
]


@needs_shell
def test_what_waits_is_told_with_what_for_and_with_signals_that_nobody_took(made: Made) -> None:
    found = shell(made.path, "waiting")
    assert of(found, "id", "waits_for", "unread_signals") == WAITING
    assert [row["id"] for row in found if row["until"]] == ["later", "asleep"]
    assert shell(made.path, "waiting", session="desktop:s2") == []


@needs_shell
def test_the_longest_waits_are_told_with_what_for(made: Made) -> None:
    found = shell(made.path, "longest-waits", limit=1000)
    # they wait since the second owner was found dead, one after another
    going_on = [row for row in found if row["until"] is None]
    assert of(going_on, "id", "state", "waited_for") == [
        ("old-code", "pending", "unknown_function"),
        ("later", "pending", "retry after OSError"),
        ("asking", "waiting", "an answer"),
        ("review", "waiting", None),
    ]
    seconds = of(found, "seconds")
    assert seconds == sorted(seconds, reverse=True)
    over = of(found, "id", "attempt", "waited_for")
    assert ("overnight", 1, "closed") in over
    assert ("flaky", 2, "retry after TimeoutError") in over
    assert len(shell(made.path, "longest-waits", limit=2)) == 2


@needs_shell
def test_a_family_reaches_through_sub_agents_and_children_at_any_depth(made: Made) -> None:
    assert of(shell(made.path, "family", task="helper"), "session", "id", "below", "link") == [
        ("desktop:s1", "helper", None, None),
        ("desktop:s2", "part", "helper", "in its session"),
        ("desktop:s2", "part-of-part", "part", "child"),
    ]
    assert of(shell(made.path, "family", task="crew"), "id", "below", "link") == [
        ("crew", None, None),
        ("crew-1", "crew", "child"),
    ]
    assert of(shell(made.path, "family", task="part-of-part", session="desktop:s2"), "id") == ["part-of-part"]
    assert shell(made.path, "family", task="part", session="desktop:s1") == shell(made.path, "family") == []


@needs_shell
def test_what_a_task_remembers_is_told_with_the_attempt_that_wrote_it(made: Made) -> None:
    assert of(shell(made.path, "steps", task="index"), "kind", "name", "state", "attempt", "value") == [
        ("step", "list files", "done", 1, '["a.py","b.py","c.py"]'),
        ("checkpoint", "", "done", 1, '{"done":1}'),
        ("sleep", "#1.1", "done", 2, "0.01"),
    ]
    assert shell(made.path, "steps", task="index", session="desktop:s2") == []


@needs_shell
def test_what_became_of_monitors_and_their_processes_is_told(made: Made) -> None:
    found = shell(made.path, "monitors")
    assert of(found, "monitor", "state", "process", "lines", "unread", "last_line") == [
        ("tail", "abandoned", "ended", 0, 0, None),
        ("short", "completed", "exited with 0", 2, 2, "two"),
        ("lint", "failed", "exited with 3", 1, 1, "bad"),
        ("watch", "running", "runs", 0, 0, None),
    ]
    told = rows(
        made.path,
        "SELECT json_extract(data, '$.process.pid') AS pid FROM events WHERE type = 'state_changed' ORDER BY seq",
    )
    assert of(found, "pid") == [row["pid"] for row in told if row["pid"] is not None]


@needs_shell
def test_handles_of_a_session_are_told_with_what_they_allow(made: Made) -> None:
    found = shell(made.path, "handles", session="desktop:s5")
    assert of(found, "id", "role", "task_session", "is_visible") == [
        ("kept", "owner", "desktop:s5", 1),
        ("followed", "owner", "desktop:s5", 1),
        ("was-read", "owner", "desktop:s5", 0),
        ("not-read", "owner", "desktop:s5", 1),
        ("asking", "observer", "desktop:s1", 1),
    ]


@needs_shell
def test_a_window_has_what_was_created_before_its_end_and_had_not_ended_before_its_beginning(made: Made) -> None:
    everything = by(rows(made.path, "SELECT id, created_at, completed_at FROM tasks"), "id")
    since = everything["flaky"]["created_at"]
    before = of(shell(made.path, "window", since="2000", until=since), "id")
    assert {"hello", "overnight", "deploy", "index"} <= {*before}
    assert "broken" not in before
    after = of(shell(made.path, "window", since=since), "id")
    assert {"overnight", "ci-run", "old-code", "flaky", "big"} <= {*after}
    assert not {"hello", "deploy", "tired"} & {*after}
    # begun before it, and ended in it
    ended = of(shell(made.path, "window", since=everything["index"]["completed_at"]), "id")
    assert "index" in ended
    assert "deploy" not in ended
    # the last hour, unless it is told otherwise
    assert {*of(shell(made.path, "window"), "id")} == {*everything}


# --- while the owner lives ------------------------------------------------------------------------------------------


@needs_shell
def test_the_shell_says_the_same_while_the_owner_lives(made: Made) -> None:
    assert sorted(of(made.alive["running"], "session", "id", "state", "attempt")) == sorted(LIVE)
    assert of(made.alive["waiting"], "id", "waits_for", "unread_signals") == WAITING
    assert made.alive["monitors"] == shell(made.path, "monitors")
    assert len(made.alive["unread-notes"]) == 6


# --- the command -----------------------------------------------------------------------------------------------------

_GIVEN: dict[str, dict[str, object]] = {
    "family": {"task": "helper", "session": "desktop:s1"},
    "steps": {"task": "index"},
    "stuck-cancels": {"seconds": 0},
    "longest-waits": {"limit": 7},
    "died": {"owner": 2},
    "handed-over": {"source": "desktop:s4"},
    "failures": {"since": "2000"},
}


@needs_shell
@pytest.mark.parametrize("name", [*COOKBOOK])
def test_the_command_gives_the_rows_of_the_shell(made: Made, name: str) -> None:
    given = _GIVEN.get(name, {})
    options = [f"--set={parameter}={value}" for parameter, value in given.items()]
    status, output, _ = command("query", "--db", made.path, name, *options, "--json")
    wanted = shell(made.path, name, **given)
    assert status == 0
    assert wanted
    found = json.loads(output)
    assert [[*row] for row in found] == [[*row] for row in wanted]
    if name == "longest-waits":
        # what waits still overtakes what has waited, between one look and the other
        found, wanted = ([*sorted(rows, key=lambda row: (row["since"], row["id"]))] for rows in (found, wanted))
    for row, other in zip(found, wanted, strict=True):
        same = {*row} - NOW
        assert {column: row[column] for column in same} == pytest.approx(
            {column: other[column] for column in same}, abs=1e-6
        )


@needs_shell
def test_the_statement_that_the_command_prints_runs_in_the_shell_whatever_the_values(made: Made) -> None:
    hostile = 'it\'s "quoted" \\ \x1b[2J\n\u202e;.quit'
    status, text, _ = command("query", "family", "--sql", f"--set=task={hostile}")
    assert status == 0
    assert text.isascii()
    assert "\x1b" not in text
    # the shell is asked for the parameter itself
    asked = text[: text.index("WITH")] + "SELECT :task AS task, :session AS session;"
    done = subprocess.run(
        [str(SHELL), "-readonly", "-json", str(made.path)], input=asked, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [{"task": hostile, "session": None}]


def test_the_command_without_a_name_lists_the_questions() -> None:
    status, output, _ = command("query")
    assert status == 0
    lines = output.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [*COOKBOOK]
    listed = json.loads(command("query", "--json")[1])
    assert [(one["name"], one["sql"]) for one in listed] == [(one.name, one.sql) for one in COOKBOOK.values()]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["runing"], "no query 'runing': did you mean running?"),
        (["cancel"], "did you mean cancels"),
        (["qqq"], "no query 'qqq'; lash-store query lists them"),
        (["running", "--set", "sesion=x"], "no parameter 'sesion': did you mean session?; it has session"),
        (["attempts", "--set", "session=x"], "no parameter 'session'; it has none"),
        (["running", "--set", "desktop:s1"], "--set takes PARAMETER=VALUE"),
        (["bytes", "--set", "limit=many"], "'many' is not a whole number"),
        (["bytes", "--set", f"limit={2**63}"], "is not a whole number"),
        (["stuck-cancels", "--set", "seconds=nan"], "'nan' is not a number"),
        (["running", "--set", "session=\udcff"], "no UTF-8"),
        (["family", "--db", "x.db"], "query family needs --set task=…"),
        (["--sql"], "name one"),
        (["running"], "no file given"),
    ],
)
def test_a_wrong_question_is_refused_with_the_next_step(arguments: list[str], wanted: str) -> None:
    status, output, errors = command("query", *arguments)
    assert (status, output) == (2, "")
    assert wanted in errors


def test_a_table_shows_rows_and_a_narrow_terminal_blocks_of_lines(made: Made) -> None:
    _, output, _ = command("query", "--db", made.path, "unowned")
    assert output.splitlines()[1].split()[:4] == ["desktop:s1", "ci-run", "external", "running"]
    with mock.patch.dict(os.environ, {"COLUMNS": "40"}), contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["query", "--db", str(made.path), "unowned"]) == 0
    assert ["id", "ci-run"] in [line.split() for line in out.getvalue().splitlines()]
    assert command("query", "--db", made.path, "unowned", "--set=session=desktop:s5") == (0, "", "no such rows\n")


async def test_control_characters_in_the_file_reach_no_terminal(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    store = TaskStore(path, runtime="desktop")

    async def explode() -> None:
        raise ValueError("\x1b[2J\x07\u202e[red]")

    async with store:
        await (await (await store.session("s\u202e1")).spawn(explode(), id="bad")).wait()
    status, output, _ = command("query", "--db", path, "failures")
    assert status == 0
    assert "\\x1b[2J\\x07\\u202e[red]" in output
    assert "desktop:s\\u202e1" in output
    assert not {"\x1b", "\x07", "\u202e"} & {*output}
    assert command("query", "--db", path, "failures", "--json")[1].isascii()


def test_asking_changes_no_byte_of_the_file(made: Made) -> None:
    before = made.path.read_bytes()
    wal = Path(f"{made.path}-wal").stat().st_size
    assert command("query", "--db", made.path, "running")[0] == 0
    assert command("schema", "--db", made.path)[0] == 0
    assert made.path.read_bytes() == before
    assert Path(f"{made.path}-wal").stat().st_size == wal


def test_a_file_that_cannot_be_asked_is_refused_with_the_next_step(tmp_path: Path) -> None:
    def refused(path: Path, name: str = "running") -> str:
        status, output, errors = command("query", "--db", path, name)
        assert (status, output) == (1, "")
        return errors

    assert "does not exist" in refused(tmp_path / "nothing.db")
    (tmp_path / "text.db").write_text("no database at all, but long enough to have a header of its own " * 20)
    assert "not an SQLite database" in refused(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE t (x)").connection.close()
    assert "another application's database" in refused(tmp_path / "other.db")
    old = shutil.copy(Path(__file__).parents[1] / "data" / "0003.db", tmp_path)
    assert f"is at revision 0003, this lash_store knows {HEAD}" in refused(old)
    with contextlib.closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("UPDATE lash_store_version SET version_num = '9999'")
    assert "revision 9999" in refused(old)
    assert "upgrade the package" in refused(old)


# --- schema ----------------------------------------------------------------------------------------------------------


def test_the_schema_of_a_new_file_is_that_of_this_version_and_makes_the_same_again(made: Made) -> None:
    status, output, _ = command("schema", "--db", made.path)
    assert status == 0
    assert output == command("schema")[1]
    assert output.startswith(f"-- lash_store schema, revision {HEAD}\n")
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(output)
        again = {*connection.execute("SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite@_%' ESCAPE '@'")}
    listed = json.loads(command("schema", "--db", made.path, "--json")[1])
    assert again == {(one["type"], one["name"]) for one in listed}
    assert {"tasks", "live_tasks", "events_are_history", "tasks_live"} <= {one["name"] for one in listed}


def test_the_schema_of_an_older_file_is_printed_as_it_is() -> None:
    _, output, _ = command("schema", "--db", Path(__file__).parents[1] / "data" / "0003.db")
    assert output.startswith("-- lash_store schema, revision 0003\n")
    assert "CREATE TABLE tasks" in output
    assert "CREATE TABLE monitors" not in output


def test_what_a_hostile_schema_says_reaches_no_terminal(tmp_path: Path) -> None:
    path = Path(shutil.copy(Path(__file__).parents[1] / "data" / "0003.db", tmp_path))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute('CREATE TABLE "evil\x1b[2J\u202e" (x)')
    _, output, _ = command("schema", "--db", path)
    assert "evil\\x1b[2J\\u202e" in output
    assert not {"\x1b", "\u202e"} & {*output}


def test_neither_command_imports_sqlalchemy_for_a_file(made: Made) -> None:
    program = (
        "import sys; from lash_store.cli import main\n"
        "for command in (['query', 'died', '--db', sys.argv[1]], ['schema', '--db', sys.argv[1]]): assert main(command) == 0\n"
        "assert not {'sqlalchemy', 'alembic'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, made.path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- documents -------------------------------------------------------------------------------------------------------


@needs_shell
def test_the_page_has_the_questions_and_statements_of_the_package_and_answers_of_their_shape(made: Made) -> None:
    text = cookbook_page.PAGE.read_text()
    shown = cookbook_page.outputs(text)
    assert text == cookbook_page.page(shown), "write it again: python -m tests.acceptance.cookbook_page"
    for name, query in COOKBOOK.items():
        head = cookbook_page.answer(made.path, query).splitlines()[0]
        assert shown[name].splitlines()[0].split() == head.split()
        assert len(shown[name].splitlines()) > 2


def test_the_metadata_for_datasette_names_what_is_in_the_schema(made: Made) -> None:
    [described] = json.loads(METADATA.read_text())["databases"].values()
    with contextlib.closing(sqlite3.connect(made.path)) as connection:
        found = (
            "SELECT name FROM sqlite_schema WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite@_%' ESCAPE '@'"
        )
        there = {name: {*_columns(connection, name)} for (name,) in connection.execute(found).fetchall()}
    assert {*metadata.tables, "live_tasks", "recent_failures"} <= {*described["tables"]} <= {*there}
    for name, table in described["tables"].items():
        named = {*table.get("columns", {}), *table.get("sortable_columns", []), *table.get("facets", [])}
        named |= {table[key] for key in ("sort", "sort_desc", "label_column") if key in table}
        assert named <= there[name], name
        if name in metadata.tables:
            assert {*table["columns"]} == there[name], name
        assert table["description"]


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]


def test_the_metadata_for_datasette_has_the_cook_books_queries() -> None:
    [described] = json.loads(METADATA.read_text())["databases"].values()
    assert described["queries"] == cookbook_page.canned()


def test_a_parameter_that_is_an_empty_text_counts_as_not_set(made: Made) -> None:
    # so a form sends what was left empty
    with contextlib.closing(sqlite3.connect(f"file:{made.path}?mode=ro", uri=True)) as connection:
        for query in COOKBOOK.values():
            names = [one.name for one in query.parameters]
            unset, empty = dict.fromkeys(names), dict.fromkeys(names, "")
            columns = [column[0] for column in connection.execute(query.sql, unset).description]
            same = [number for number, column in enumerate(columns) if column not in NOW]
            one, other = (
                [[row[number] for number in same] for row in connection.execute(query.sql, values)]
                for values in (unset, empty)
            )
            assert one == other, query.name
