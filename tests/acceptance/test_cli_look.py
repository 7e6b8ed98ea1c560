"""What is in a file, as `sessions`, `list`, `show` and `notes` tell it; and that looking takes and changes nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lash_store import TaskState, TaskStore
from tests.acceptance import agent_file
from tests.acceptance.commands import HOSTILE, assert_harmless, run
from tests.runtime.support import everything

LOOKS = (
    ("sessions",),
    ("list", "--all"),
    ("show", "index"),
    ("show", "bad"),
    ("show", "listener"),
    ("show", "research"),
    ("show", "monitor:tests"),
    ("tree",),
    ("tree", "desktop:deep"),
    ("notes", "--all"),
    ("stats",),
)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped file."""
    path = tmp_path_factory.mktemp("look") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in which nothing ever happened."""
    path = tmp_path_factory.mktemp("empty") / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop"):
            pass

    asyncio.run(make())
    return path


def answer(*arguments: str, db: Path) -> Any:
    done = run(*arguments, "--json", db=db)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    return json.loads(done.stdout)


def ids(*arguments: str, db: Path) -> list[str]:
    return [task["id"] for task in answer("list", *arguments, db=db)]


# --- everywhere ------------------------------------------------------------------------------------------------------


def _steady(value: Any) -> Any:
    """Leave out what is another in every file, and with every moment."""
    passing = {"file", "newest", "median", "oldest", "tables", "rates"}
    if isinstance(value, dict):
        return {name: _steady(one) for name, one in value.items() if name not in passing}
    return [_steady(one) for one in value] if isinstance(value, list) else value


async def test_every_look_says_the_same_beside_a_live_owner_and_on_a_copy_and_changes_nothing(tmp_path: Path) -> None:
    live, copied = tmp_path / "agent.db", tmp_path / "copy" / "agent.db"
    copied.parent.mkdir()
    async with TaskStore(live, runtime="desktop") as store:
        await agent_file.fill(store)
        with sqlite3.connect(live) as source, sqlite3.connect(copied) as target:
            source.backup(target)
        source.close()
        target.close()
        before, bytes_before = everything(live), copied.read_bytes()
        for look in LOOKS:
            assert _steady(answer(*look, db=live)) == _steady(answer(*look, db=copied)), look
        assert everything(live) == before
        assert copied.read_bytes() == bytes_before
        # and the owner works on
        session = await store.session("s1")
        assert (await (await session.handle("listener")).cancel()).state == "cancelled"


@pytest.mark.parametrize("look", LOOKS)
def test_a_line_in_a_pipe_has_neither_control_characters_nor_spaces_at_its_end(db: Path, look: tuple[str, ...]) -> None:
    done = run(*look, db=db)
    assert (done.returncode, done.stderr) == (0, "")
    assert_harmless(done.stdout)
    assert [line for line in done.stdout.splitlines() if line != line.rstrip()] == []


@pytest.mark.parametrize("look", LOOKS)
def test_what_is_told_fits_into_narrow_columns(db: Path, look: tuple[str, ...]) -> None:
    done = run(*look, db=db, COLUMNS="60")
    assert_harmless(done.stdout)
    assert done.stdout.count("\n") >= run(*look, db=db).stdout.count("\n")


@pytest.mark.parametrize("columns", ["30", "60", "80", "90"])
def test_no_width_takes_a_name_or_a_number_away(db: Path, columns: str) -> None:
    wide = [line.split() for line in run("sessions", db=db).stdout.splitlines()]
    narrow = run("sessions", db=db, COLUMNS=columns).stdout
    # ages go on between the two looks
    words = [word for line in wide[1:] for word in line if not re.fullmatch(r"\d+[smhd]", word)]
    assert [word for word in words if word not in narrow.split()] == []
    listed = run("list", "--all", db=db, COLUMNS="30").stdout
    assert "monitor:tests" in listed


def test_a_file_with_nothing_in_it_is_said_to_be_empty_and_left_so(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    path.touch(mode=0o644)
    (tmp_path / "lost.db").symlink_to(tmp_path / "nowhere.db")
    commands = [
        *LOOKS,
        ("doctor", "--repair"),
        ("backup", tmp_path / "copy.db"),
        ("export",),
        ("current",),
        ("schema",),
    ]
    for command in commands:
        done = run(*command, db=path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), command
        assert "is empty" in done.stderr
        assert "lash-store upgrade" not in done.stderr
        lost = run(*command, db=tmp_path / "lost.db")
        assert (lost.returncode, lost.stdout, lost.stderr.count("\n")) == (1, "", 1), command
        assert "Errno" not in lost.stderr
    assert path.read_bytes() == b""
    assert sorted(one.name for one in tmp_path.iterdir()) == ["agent.db", "lost.db"]


def test_what_may_be_read_is_left_to_the_opening_however_the_file_was_named(db: Path) -> None:
    with mock.patch.object(os, "access", side_effect=lambda _path, mode: mode != os.R_OK):
        assert run("list", "--json", db=db) == run("list", "--json", LASH_STORE_DB=str(db))


@pytest.mark.parametrize("command", [("timeline", "desktop:s1"), ("export",)])
def test_an_output_that_cannot_be_made_is_named_with_what_hinders(
    db: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = run(*command, "-o", tmp_path / "no" / "out", db=db)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == f"lash-store: {tmp_path}/no/out: No such file or directory"


@pytest.mark.parametrize("command", ["sessions", "list", "show", "tree", "notes", "stats"])
def test_help_teaches_by_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"Examples:\n    lash-store {command}" in done.stdout
    assert "--json" in done.stdout
    assert f"  {command} " in run("--help").stdout


def test_help_imports_nothing_that_takes_long() -> None:
    program = (
        "import sys; from lash_store.cli import main\n"
        "for command in sys.argv[1:]: assert main([command, '--help']) == 0\n"
        "sys.exit(3 if {'sqlalchemy', 'alembic', 'pydantic', 'rich', 'sqlite3', 'asyncio'} & set(sys.modules) else 0)"
    )
    commands = ["sessions", "list", "show", "tree", "notes", "stats"]
    done = subprocess.run([sys.executable, "-c", program, *commands], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_not_there_is_said_in_one_line(db: Path, empty: Path) -> None:
    for arguments, part in (
        (["sessions"], "no sessions"),
        (["sessions", "--open"], "no open sessions"),
        (["list", "--all"], "no such tasks"),
        (["list"], "no live tasks; see --all"),
        (["tree"], "no sessions"),
        (["notes"], "nothing unread in any inbox; see --all"),
        (["notes", "--all"], "nothing in any inbox"),
    ):
        done = run(*arguments, db=empty)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", part + "\n")
        assert answer(*arguments, db=empty) == []
    assert run("notes", "desktop:s3", db=db).stderr == "nothing unread in the inbox of desktop:s3; see --all\n"
    assert "none yet" in run("stats", db=empty).stdout


@pytest.mark.parametrize("columns", ["", "8", "60", "200"])
def test_a_file_without_a_task_is_told_in_any_width(empty: Path, columns: str) -> None:
    for look in LOOKS:
        done = run(*look, db=empty, COLUMNS=columns)
        assert "Traceback" not in done.stderr, look
        if look[0] == "stats":
            assert (done.returncode, done.stderr) == (0, "")
            assert "--json" in look or "none yet" in done.stdout


def test_what_cannot_be_meant_is_one_line_and_exit_code_1(db: Path) -> None:
    for arguments, part in (
        (["notes", "desktop:s9"], "desktop:s9"),
        (["tree", "desktop:s9"], "desktop:s9"),
        (["tree", "desktop:s9", "index"], "desktop:s9"),
        (["tree", "#999"], "#999"),
        (["tree", "desktop:s1", "nothing"], "nothing"),
        (["tree", "\udcff"], "\\udcff"),
        (["show", "\udcff"], "\\udcff"),
        (["show", "desktop:s2", "index"], "index"),
        (["show", "desktop:s2", "#1"], "#1"),
        (["show", HOSTILE], "\\x1b"),
        (["notes", "a:\udcff"], "\\udcff"),
    ):
        done = run(*arguments, db=db)
        assert (done.returncode, done.stdout) in {(1, ""), (2, "")}, arguments
        assert part in done.stderr, arguments
        assert "Traceback" not in done.stderr
        assert_harmless(done.stderr)


def test_a_long_table_on_a_terminal_begins_before_all_of_it_is_laid_out(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lash_store.cli import output

    monkeypatch.setattr(output, "_BLOCK", 3)
    lines = run("list", "--all", db=db, COLUMNS="200").stdout.splitlines()
    assert [place for place, line in enumerate(lines) if line.startswith("#")] == [0, 4, 8]
    assert len(lines) == 8 + 3


def test_the_words_of_states_are_those_of_the_library() -> None:
    from lash_store.cli.phrases import STATES

    assert [*STATES] == [*TaskState]
    assert [state for state in TaskState if not state.is_terminal] == [*STATES[:4]]


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_says_of_a_task_what_its_record_says(db: Path) -> None:
    for task in answer("list", "--all", db=db):
        shown = answer("show", f"#{task['task_seq']}", db=db)
        assert task == {name: shown[name] for name in task}
        assert [*task] == [*shown][: len(task)]


def test_text_is_looked_for_in_id_label_progress_arguments_and_failure_message(db: Path) -> None:
    assert ids("--text", "RESEAR", db=db) == ["research"]  # id, in capitals
    assert ids("--text", "think", db=db) == ["research"]  # label
    assert ids("--text", "has its part", db=db) == ["research"]  # progress
    assert ids("--all", "--text", "größer \\ 7", db=db) == ["index"]  # arguments, in whatever way JSON writes them
    assert "bad" in ids("--all", "--text", "np.exe\u2066", db=db)  # failure message
    assert ids("--all", "--text", "Traceback", db=db) == []
    assert ids("--all", "--text", "observer", db=db) == []


def test_text_is_no_pattern(db: Path) -> None:
    assert ids("--all", "--text", "%", db=db) == ids("--all", "--text", "in_ex", db=db) == []


def test_what_has_no_such_text_says_what_was_searched(db: Path) -> None:
    assert run("list", "--text", "\x1bnone", db=db).stderr == (
        "no such live task with '\\x1bnone' in its id, label, progress, arguments or failure message; see --all\n"
    )
    assert "; see --all" not in run("list", "--all", "--text", "none", db=db).stderr


@pytest.fixture
def aged(db: Path, tmp_path: Path) -> Path:
    """A copy in which `index` changed three days ago, and `bad` three hours ago."""
    path = tmp_path / "aged.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("DROP TRIGGER tasks_terminal_is_final")
        for task_id, hours in (("index", 72), ("bad", 3)):
            at = (datetime.now(UTC) - timedelta(hours=hours)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            target.execute("UPDATE tasks SET updated_at = ? WHERE id = ?", (at, task_id))
    source.close()
    target.close()
    return path


def test_since_is_a_span_or_a_time_and_means_the_last_change(aged: Path) -> None:
    def missing(since: str) -> set[str]:
        return {"index", "bad"} - {*ids("--all", "--since", since, db=aged)}

    assert missing("2h") == missing("7200s") == {"index", "bad"}
    assert missing("2d") == missing("1d12h") == {"index"}
    assert missing("1w") == missing("2020-01-01") == missing("2020-01-01T00:00+02:00") == set()
    hours_ago = datetime.now(UTC) - timedelta(hours=4)
    assert missing(hours_ago.isoformat()) == missing(hours_ago.replace(tzinfo=None).isoformat()) == {"index"}


@pytest.mark.parametrize(
    "since", ["", "soon", "2", "h", "2y", "99999999999w", "-2h", "2026-13-01", "0001-01-01T00:00+14:00"]
)
def test_a_since_that_is_neither_is_wrong_usage(db: Path, since: str) -> None:
    done = run("list", "--since", since, db=db)
    assert done.returncode == 2
    assert "neither a span such as 90s" in done.stderr


def test_filters_narrow_together_and_limit_counts_what_is_left(db: Path) -> None:
    assert ids("--all", "--session", "desktop:deep", "--text", "fetch", db=db) == ["fetch"]
    assert ids("--all", "--state", "failed", "--text", "monitor", db=db) == ["monitor:tests"]
    assert ids("--all", "--text", "e", "--limit", "2", db=db) == ids("--all", "--text", "e", db=db)[:2]
    assert ids("--limit", "0", db=db) == []
    assert ids("--all", "--limit", str(10**30), db=db) == ids("--all", db=db)


def test_a_page_ends_where_the_next_begins(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lash_store.cli import listing

    everyone = ids("--all", db=db)
    monkeypatch.setattr(listing, "_PAGE", 2)
    assert ids("--all", db=db) == everyone
    assert ids("--all", "--limit", "3", db=db) == everyone[:3]
    assert ids("--all", "--limit", "4", db=db) == everyone[:4]


def test_a_row_that_a_hand_made_unreadable_takes_nothing_else_down(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("PRAGMA ignore_check_constraints = 1")
        target.execute("DROP TRIGGER tasks_terminal_is_final")
        target.execute("UPDATE tasks SET failure = 'not JSON', created_at = 'then' WHERE id = 'bad'")
        target.execute("UPDATE tasks SET progress = CAST(x'ff41' AS TEXT) WHERE id = 'index'")
        target.execute("UPDATE inbox SET posted_at = '', data = '[' WHERE note_seq = 1")
    source.close()
    target.close()
    listed = run("list", "--all", db=path)
    assert listed.returncode == 0
    assert "not JSON" in listed.stdout
    assert "\ufffdA" in listed.stdout
    assert len(answer("list", "--all", db=path)) == len(answer("list", "--all", db=db))
    for look in (("sessions",), ("tree",), ("notes", "--all"), ("stats",)):
        assert run(*look, db=path).returncode == 0, look
        assert answer(*look, db=path)
    for one in (("show", "bad"), ("cancel", "bad")):
        done = run(*one, db=path)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), one
        assert re.match(r"lash-store: the row of task #\d+ cannot be read \(.*\): .*lash-store doctor", done.stderr)


def test_an_event_that_a_hand_made_unreadable_is_named_and_no_traceback(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("PRAGMA ignore_check_constraints = 1")
        target.execute("DROP TRIGGER events_are_history")
        target.execute("UPDATE events SET data = '[' WHERE seq = 3")
    source.close()
    target.close()
    done = run("events", db=path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("lash-store: event 3 cannot be read (")
    for look in (("timeline", "--all", "--json"), ("top", "--once", "--all")):
        done = run(*look, db=path)
        assert (done.returncode, done.stderr) == (0, ""), look


def test_a_state_that_no_version_knows_is_shown_as_it_is(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("PRAGMA ignore_check_constraints = 1")
        target.execute("UPDATE tasks SET state = 'odd' WHERE completed_at IS NULL")
    source.close()
    target.close()
    for look in (("list",), ("top", "--once"), ("tree",), ("timeline", "--all", "-o", "-")):
        done = run(*look, db=path)
        assert (done.returncode, "odd" in done.stdout) == (0, True), look


@pytest.mark.parametrize("columns", ["", "60", "200"])
def test_a_state_that_a_terminal_would_obey_is_escaped_at_the_head_of_a_column_too(
    db: Path, tmp_path: Path, columns: str
) -> None:
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("PRAGMA ignore_check_constraints = 1")
        target.execute("UPDATE tasks SET state = ? WHERE completed_at IS NULL", ["odd\x1b[31m\0"])
    source.close()
    target.close()
    for look in LOOKS:
        assert_harmless(run(*look, db=path, COLUMNS=columns).stdout)
    assert r"odd\x1b" in run("stats", db=path, COLUMNS=columns).stdout


@pytest.mark.parametrize(("table", "other"), [("events", "handles"), ("tasks", "events")])
def test_a_table_whose_pages_are_anothers_is_said_to_be_damaged(
    db: Path, tmp_path: Path, table: str, other: str
) -> None:
    path = tmp_path / "mixed.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("PRAGMA writable_schema = 1")
        [(root,)] = target.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", [other])
        target.execute("UPDATE sqlite_schema SET rootpage = ? WHERE name = ?", [root, table])
    source.close()
    target.close()
    told = [run(*look, db=path) for look in (*LOOKS, ("events",), ("top", "--once"), ("query", "slow-kinds"))]
    for done in told:
        assert "Traceback" not in done.stderr
        assert done.returncode in {0, 1}
    assert any("damaged" in done.stderr for done in told)


def test_a_number_that_no_reader_of_json_knows_is_the_text_it_is(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        target.execute("DROP TRIGGER tasks_terminal_is_final")
        # which SQLite takes for JSON
        target.execute("UPDATE tasks SET arguments = '[1e999]' WHERE id = 'index'")
    source.close()
    target.close()
    done = run("list", "--all", "--json", db=path)
    assert "Infinity" not in done.stdout
    [task] = [task for task in json.loads(done.stdout) if task["id"] == "index"]
    assert task["arguments"] == "[1e999]"


# --- sessions --------------------------------------------------------------------------------------------------------


def test_sessions_count_what_lives_what_ended_and_what_nobody_has_read(db: Path) -> None:
    found = {session["scope"]: session for session in answer("sessions", db=db)}
    assert [*found] == ["desktop:s1", "desktop:s2", "desktop:deep", "desktop:s3"]
    one = found["desktop:s1"]
    assert {state: count for state, count in one["tasks"].items() if count} == {
        "pending": 2,
        "completed": 3,
        "failed": 2,
    }
    assert one["unread_updates"] == 2
    assert one["update_bytes"] > 0
    assert one["unread_notes"] == len(answer("notes", "desktop:s1", db=db))
    assert one["changed_at"] >= one["opened_at"]
    assert found["desktop:s3"]["closed_at"] is not None
    assert [session["scope"] for session in answer("sessions", "--open", db=db)] == [*found][:3]


def test_sessions_are_a_line_each(db: Path) -> None:
    lines = run("sessions", db=db).stdout.splitlines()
    assert len(lines) == 5
    assert re.match(r"session +is +live +completed +failed +notes +lines +kept +age +changed$", lines[0])
    assert re.match(r"desktop:s1 +open +2 +3 +2 +2 +2 +10 B ", lines[1])
    assert re.match(r"desktop:s3 +closed +0 ", lines[4])


# --- show ------------------------------------------------------------------------------------------------------------


def test_show_has_the_handles_of_a_task_and_whether_its_outcome_was_read(db: Path) -> None:
    handles = answer("show", "index", db=db)["handles"]
    assert [(handle["role"], handle["scope"]) for handle in handles] == [
        ("owner", "desktop:s1"),
        ("observer", "desktop:s2"),
    ]
    printed = run("show", "index", db=db).stdout
    assert re.search(rf"\n  owner +desktop:s1 +{handles[0]['handle_id']} +unread\n", printed)
    assert re.search(rf"\n  observer +desktop:s2 +{handles[1]['handle_id']} +unread\n", printed)


def test_show_has_the_children_of_a_task(db: Path) -> None:
    assert [child["id"] for child in answer("show", "research", db=db)["children"]] == ["part"]
    assert re.search(
        r"\nchildren\n  #\d+ +desktop:s1 +part +other +completed +try 1 ", run("show", "research", db=db).stdout
    )
    assert "\nchildren\n" not in run("show", "index", db=db).stdout


def test_show_has_the_signals_of_a_task_with_their_payloads(db: Path) -> None:
    signals = answer("show", "listener", db=db)["signals"]
    assert [(one["name"], one["key"], one["taken_attempt"]) for one in signals] == [
        ("go", "first", 1),
        ("later", None, None),
    ]
    assert [one["payload"] for one in signals] == [{"way": "left", "odd": HOSTILE}, [1, 2]]
    printed = run("show", "listener", db=db).stdout
    assert re.search(r'\n  .* go +\{"way": "left", "odd": "\\u001b.* taken in try 1 +from .* key first\n', printed)
    assert re.search(r"\n  .* later +\[1, 2\] +not taken +from ", printed)


def test_show_has_how_a_monitor_stands_and_where_it_wrote(db: Path) -> None:
    shown = answer("show", "monitor:tests", db=db)
    monitor = shown["monitor"]
    assert (monitor["monitor_id"], monitor["exit_status"], monitor["armed"]) == ("tests", 3, False)
    assert (monitor["lines"], monitor["kept_lines"], monitor["unread"], monitor["dropped"]) == (2, 2, 2, 0)
    assert answer("show", "index", db=db)["monitor"] is None
    printed = run("show", "monitor:tests", db=db).stdout
    for part in (
        r"exit status +3",
        r"wrote +2 lines, 10 B",
        r"kept +2 lines, .*; 2 unread",
        r"dropped +0 lines",
        r"armed +no",
    ):
        assert re.search(rf"\n  {part}\n", printed), part
    assert re.search(r"\n  \S+ \S+ +\d +out +fine\n", printed)
    assert re.search(r"\n  \S+ \S+ +\d +err +dire\n", printed)


# --- notes -----------------------------------------------------------------------------------------------------------


def test_notes_are_the_unread_ones_of_one_inbox_or_of_all(db: Path) -> None:
    unread = answer("notes", "desktop:s1", db=db)
    assert "bystander" in [note["task_id"] for note in unread]
    assert "index" not in [note["task_id"] for note in unread]
    assert {note["acknowledged_at"] for note in unread} == {None}
    everyone = answer("notes", "--all", db=db)
    assert everyone[0]["task_id"] == "index"
    assert everyone[0]["acknowledged_at"] is not None
    assert everyone[0]["data"]["state"] == "completed"
    assert answer("notes", "desktop:s2", "--all", db=db) == []
    assert answer("notes", "--all", "--limit", "1", db=db) == everyone[:1]


async def test_a_note_that_somebody_reads_now_says_so_and_looking_takes_it_from_nobody(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    async with TaskStore(path, runtime="desktop") as store:
        await agent_file.fill(store)
        session = await store.session("s1")
        async with session.inbox() as notes:
            seen = answer("notes", "desktop:s1", db=path)
            assert [note["note_seq"] for note in seen] == [note.note_seq for note in notes]
            assert {note["is_claimed"] for note in seen} == {True}
            assert re.search(r" reading +", run("notes", db=path).stdout)
        assert answer("notes", "desktop:s1", db=path) == []
