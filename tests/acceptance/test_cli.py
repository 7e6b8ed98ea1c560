"""What the commands print, how they end, and what they never let through to a terminal."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lash_store import Recovery, TaskContext, TaskKind, TaskStore
from tests.acceptance.commands import HOSTILE, Done, assert_harmless, run


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a file with two sessions, tasks of several outcomes, hostile data, and one task that is still live."""
    path = tmp_path_factory.mktemp("store") / "agent.db"
    asyncio.run(_fill(path))
    return path


async def _fill(path: Path) -> None:
    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, text: str, fail: bool = False) -> str:
        await task.progress(text, 0.5)
        if fail:
            raise RuntimeError(text)
        return text

    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> None:
        await task.progress("half of it", 0.5)
        await task.cancelled()

    async with store:
        one, two = await store.session("s1"), await store.session("s\u202e2")
        await (await one.spawn(work, "plain", id="index", kind=TaskKind.OBSERVER)).wait()
        await (await one.spawn(work, HOSTILE, True, id="bad")).wait()
        await (await one.spawn(work, HOSTILE, id="twice")).wait()
        await (await two.spawn(work, HOSTILE, id="twice\u202e")).wait()
        await (await two.spawn(work, "again", id="twice")).wait()
        handle = await one.spawn(stay, id="on-and-on-" + "x" * 60)
        async for event in handle.events():
            if event.type == "progress":
                break


def run_process(*arguments: str | Path, **environment: str) -> Done:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "lash_store.cli", *map(str, arguments)]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=30, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def run_on_terminal(*arguments: str | Path, columns: int = 80, **environment: str) -> tuple[int, str]:
    """Run a command whose stdout and stderr are a terminal of *columns*, and return its exit code and what came out."""
    parent, child = pty.openpty()
    env = {**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "lash_store.cli", *map(str, arguments)], stdout=child, stderr=child, env=env
    )
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(parent, 65536)
        except OSError:  # the way Linux says that the other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(parent)
    return process.wait(), output.decode().replace("\r\n", "\n")


def ids(output: str) -> list[str]:
    return [task["id"] for task in json.loads(output)]


# --- start-up --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"], ["demo", "--help"], ["--version"], []])
def test_help_and_usage_errors_import_neither_sqlalchemy_nor_alembic_nor_pydantic(arguments: list[str]) -> None:
    program = (
        "import sys; from lash_store.cli import main; main(sys.argv[1:]);"
        "sys.exit(3 if {'sqlalchemy', 'alembic', 'pydantic', 'rich'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["list", "show", "events", "demo"])
def test_every_command_teaches_with_examples(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"Examples:\n    lash-store {command}" in done.stdout


@pytest.mark.long
def test_the_console_script_is_the_same_program(db: Path) -> None:
    script = Path(sys.executable).with_name("lash-store")
    done = subprocess.run([script, "--db", db, "list", "--json"], capture_output=True, text=True, check=True)
    assert done.stdout == run_process("--db", db, "list", "--json").stdout == run("list", "--json", db=db).stdout


# --- which file ------------------------------------------------------------------------------------------------------


def test_the_file_comes_from_either_place_of_the_option_or_from_the_environment(db: Path) -> None:
    wanted = run("list", "--json", "--all", db=db).stdout
    assert len(json.loads(wanted)) == 6
    assert run("list", "--db", db, "--json", "--all").stdout == wanted
    assert run("list", "--json", "--all", LASH_STORE_DB=str(db)).stdout == wanted


def test_the_commands_own_option_wins_over_the_groups_and_that_over_the_environment(db: Path) -> None:
    assert run("list", "--db", db, db=Path("/nowhere/x.db")).returncode == 0
    assert run("list", db=db, LASH_STORE_DB="/nowhere/x.db").returncode == 0


def test_looking_changes_no_byte_of_the_file(db: Path) -> None:
    before = db.read_bytes()
    for command in (["list"], ["show", "index"], ["events"]):
        assert run(*command, db=db).returncode == 0
    assert db.read_bytes() == before


# --- list ------------------------------------------------------------------------------------------------------------


def test_list_shows_live_tasks_unless_it_is_told_otherwise(db: Path) -> None:
    live = ids(run("list", "--json", db=db).stdout)
    assert len(live) == 1
    assert live[0].startswith("on-and-on-")
    assert ids(run("list", "--all", "--json", db=db).stdout)[:2] == ["index", "bad"]
    assert ids(run("list", "--state", "failed", "--json", db=db).stdout) == ["bad"]


def test_filters_of_list_narrow_together(db: Path) -> None:
    def found(*options: str) -> list[str]:
        return ids(run("list", "--all", "--json", *options, db=db).stdout)

    assert found("--kind", "observer") == ["index"]
    assert found("--session", "desktop:s1", "--limit", "2") == ["index", "bad"]
    assert found("--session", "desktop:s1", "--state", "failed", "--state", "completed") == ["index", "bad", "twice"]
    assert found("--kind", "observer", "--state", "failed") == []


def test_nothing_found_is_an_empty_array_and_a_hint_in_a_table(db: Path) -> None:
    assert run("list", "--kind", "monitor", "--json", db=db).stdout == "[]\n"
    done = run("list", "--kind", "monitor", db=db)
    assert (done.returncode, done.stdout) == (0, "")
    assert "no such tasks" in done.stderr


def test_a_table_keeps_every_character_of_an_id_at_80_columns(db: Path) -> None:
    status, output = run_on_terminal("list", "--db", db, NO_COLOR="1")
    assert status == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", output).splitlines()
    assert max(map(len, lines)) <= 80
    assert output.count("x") >= 60


def test_a_table_that_is_not_on_a_terminal_has_one_line_a_task(db: Path) -> None:
    lines = run("list", "--all", db=db).stdout.splitlines()
    assert len(lines) == 7
    assert "on-and-on-" + "x" * 60 in lines[-1]


# --- show ------------------------------------------------------------------------------------------------------------


def shown(db: Path, *names: str) -> dict[str, Any]:
    task: dict[str, Any] = json.loads(run("show", *names, "--json", db=db).stdout)
    return task


def test_show_finds_a_task_by_scope_and_id_by_id_alone_and_by_number(db: Path) -> None:
    task = shown(db, "desktop:s1", "index")
    assert (task["scope"], task["id"], task["result"]) == ("desktop:s1", "index", "plain")
    assert task == shown(db, "index") == shown(db, f"#{task['task_seq']}") == shown(db, str(task["task_seq"]))


def test_show_has_the_tasks_events_and_no_others(db: Path) -> None:
    events = shown(db, "index")["events"]
    assert [event["type"] for event in events] == ["registered", "started", "progress", "completed"]
    assert len({event["task_seq"] for event in events}) == 1


def test_an_id_of_two_sessions_is_not_guessed_at(db: Path) -> None:
    done = run("show", "twice", db=db)
    assert done.returncode == 1
    assert (
        done.stderr == "lash-store: task id 'twice' is in 2 sessions: name one first: desktop:s1, desktop:s\\u202e2\n"
    )


def test_show_prints_row_outcome_and_events(db: Path) -> None:
    output = run("show", "bad", db=db).stdout
    for part in ("desktop:s1 bad", "failed", "RuntimeError: ", "Traceback (most recent call last)", "registered"):
        assert part in output


# --- events ----------------------------------------------------------------------------------------------------------


def lines_of(done: Done) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_events_are_all_that_is_in_the_file_in_order(db: Path) -> None:
    with sqlite3.connect(db) as connection:
        wanted = [seq for (seq,) in connection.execute("SELECT seq FROM events ORDER BY seq")]
    connection.close()
    assert [event["seq"] for event in lines_of(run("events", "--json", db=db))] == wanted
    assert len(run("events", db=db).stdout.splitlines()) == len(wanted) + 1


def test_filters_of_events_narrow_together(db: Path) -> None:
    failed = lines_of(run("events", "--json", "--type", "failed", db=db))
    assert [event["task_id"] for event in failed] == ["bad"]
    after = lines_of(run("events", "--json", "--after", failed[0]["seq"], "--type", "started", "--limit", "1", db=db))
    assert [event["task_id"] for event in after] == ["twice"]
    assert lines_of(run("events", "--json", "--after", "999999", db=db)) == []
    assert {event["scope"] for event in lines_of(run("events", "--json", "--session", "desktop:s1", db=db))} == {
        "desktop:s1"
    }


@pytest.mark.long
async def test_following_events_go_on_with_what_another_process_commits(tmp_path: Path) -> None:
    store = TaskStore(tmp_path / "agent.db", runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None: ...

    async with store:
        session = await store.session("s1")
        command = [sys.executable, "-m", "lash_store.cli", "events", "--db", str(tmp_path / "agent.db")]
        follower = await asyncio.create_subprocess_exec(
            *command, "--follow", "--json", "--limit", "4", stdout=asyncio.subprocess.PIPE
        )
        assert follower.stdout is not None
        assert json.loads(await follower.stdout.readline())["type"] == "session_opened"
        await (await session.spawn(work)).wait()
        rest, _ = await asyncio.wait_for(follower.communicate(), 10)
    assert [json.loads(line)["type"] for line in rest.splitlines()] == ["registered", "started", "completed"]
    assert follower.returncode == 0


@pytest.mark.long
def test_an_interrupt_ends_following_without_a_word(db: Path) -> None:
    command = [sys.executable, "-m", "lash_store.cli", "events", "--db", str(db), "--follow"]
    follower = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert follower.stdout is not None
    follower.stdout.readline()
    follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=10)
    assert (follower.returncode, errors) == (130, "")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_expected_errors_are_one_line_and_exit_code_1(db: Path, tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, but long enough to have a header of its own" * 20)
    other, newer = tmp_path / "other.db", tmp_path / "newer.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE notes (text)")
    connection.close()
    with sqlite3.connect(db) as connection, sqlite3.connect(newer) as copy:
        connection.backup(copy)
        copy.execute("UPDATE lash_store_version SET version_num = '9999'")
    connection.close()
    copy.close()
    for arguments, part in (
        (["--db", tmp_path / "none.db", "list"], "does not exist"),
        (["--db", tmp_path / "no" / "folder.db", "events"], "does not exist"),
        (["--db", tmp_path, "list"], "is not a regular file"),
        (["--db", tmp_path / "text.db", "list"], "not an SQLite database"),
        (["--db", other, "list"], "another application"),
        (["--db", newer, "list"], "upgrade the package"),
        (["--db", db, "show", "desktop:s1", "nothing"], "nothing"),
        (["--db", db, "show", "nothing"], "nothing"),
        (["--db", db, "show", "#999"], "#999"),
        (["--db", db, "show", "desktop:s9", "index"], "desktop:s9"),
        (["--db", db, "list", "--session", "desktop:s9"], "desktop:s9"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert done.stderr.startswith("lash-store: "), arguments
        assert len(done.stderr.splitlines()) == 1, arguments
        assert part in done.stderr, arguments


def test_wrong_usage_is_exit_code_2(db: Path) -> None:
    for arguments in (
        ["list"],
        ["--db", db, "lits"],
        ["--db", db, "list", "--state", "sleeping"],
        ["--db", db, "list", "--session", "no-colon"],
        ["--db", db, "events", "--after", "-1"],
        ["--db", db, "show"],
        ["--db", db, "show", "a:b", "c", "d"],
        ["demo", "--tasks", "0"],
        [],
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert "Traceback" not in done.stderr


@pytest.mark.long
def test_a_reader_that_goes_away_is_met_in_silence(db: Path) -> None:
    for option in ([], ["--json"]):
        command = [sys.executable, "-m", "lash_store.cli", "events", "--db", str(db), *option]
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=30)
        os.close(writing)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("arguments", [["list"], ["backup", "copy.db"]])
def test_without_a_stdout_nothing_is_done_and_one_line_says_so(db: Path, tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "lash_store.cli", "--db", str(db), *arguments]
    closed = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        closed, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, check=False, timeout=30
    )

    assert (done.returncode, done.stderr) == (1, "lash-store: stdout is closed: there is nowhere to print to\n")
    assert not (tmp_path / "copy.db").exists()


# --- what reaches a terminal -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["list", "--all"],
        ["list", "--all", "--json"],
        ["show", "bad"],
        ["show", "bad", "--json"],
        ["show", "twice\u202e"],
        ["events"],
        ["events", "--json"],
        ["show", HOSTILE],
        ["list", "--session", HOSTILE],
        ["list", "--state", HOSTILE],
        ["list", "--db", "/tmp/" + HOSTILE],
        [HOSTILE],
    ],
)
def test_escape_sequences_in_data_never_reach_the_terminal_raw(db: Path, arguments: list[str]) -> None:
    done = run(*arguments, db=db)
    assert_harmless(done.stdout + done.stderr)
    assert "\\x1b" in done.stdout + done.stderr or "\\u001b" in done.stdout or "\\u202e" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    ("columns", "arguments"),
    [(40, ["list", "--all"]), (80, ["list", "--all"]), (80, ["show", "bad"]), (120, ["events"]), (80, ["events"])],
)
def test_a_terminal_gets_no_control_character_but_colours(db: Path, arguments: list[str], columns: int) -> None:
    status, output = run_on_terminal("--db", db, *arguments, columns=columns)
    assert status == 0
    assert_harmless(re.sub(r"\x1b\[[0-9;]*m", "", output))


def test_data_is_neither_markup_nor_emoji(db: Path) -> None:
    output = run("show", "bad", db=db).stdout
    assert "[red]" in output
    assert ":bomb:" in output


def test_output_that_is_not_a_terminal_and_no_color_have_no_colours(db: Path) -> None:
    assert "\x1b" not in run("list", "--all", db=db).stdout
    _, output = run_on_terminal("--db", db, "list", "--all", NO_COLOR="1")
    assert "\x1b[3" not in output


def test_json_is_ascii_and_says_the_data_as_it_is(db: Path) -> None:
    output = run("show", "bad", "--json", db=db).stdout
    assert output.isascii()
    assert json.loads(output)["progress"] == HOSTILE


@pytest.mark.long
def test_text_the_outputs_encoding_cannot_say_is_escaped(db: Path) -> None:
    done = run_process("--db", db, "events", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


# --- work that belongs to a session ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a file with external work whose callback failed, and a child that was moved to another session."""
    path = tmp_path_factory.mktemp("sessions") / "agent.db"
    asyncio.run(_hand_over(path))
    return path


async def _hand_over(path: Path) -> None:
    async with TaskStore(path, runtime="desktop") as store:
        one, two = await store.session("s1"), await store.session("s2")
        await one.register("ci", TaskKind.OTHER, cancel=_refuse, idempotency_key="run-17", close_policy="transfer")
        await one.register("lint", TaskKind.OTHER, parent="ci")
        await one.transfer(two, ["lint"])
        await two.abandon("lint", "nobody runs it")
        await one.cancel("ci", "superseded")


def _refuse() -> None:
    raise RuntimeError(HOSTILE)


def test_show_tells_of_external_work_whose_callback_failed(handed_over: Path) -> None:
    shown = run("show", "desktop:s1", "ci", db=handed_over).stdout

    assert re.search(r"callback +called \d{4}-", shown)
    assert re.search(r"callback +RuntimeError: \\x1b\[2J", shown)
    assert re.search(r"key +run-17 *\n", shown)
    assert re.search(r"on close +transfer *\n", shown)
    assert "attempt" not in shown.partition("seq")[0]
    assert "\x1b" not in shown


def test_show_tells_whose_child_it_is_where_it_came_from_and_who_gave_it_up(handed_over: Path) -> None:
    shown = run("show", "desktop:s2", "lint", db=handed_over).stdout

    assert re.search(r"parent +#1 *\n", shown)
    assert re.search(r"callback +none: cancelled by the books *\n", shown)
    assert re.search(r"given up +nobody runs it, by desktop pid \d+ on ", shown)
    assert re.search(r'transferred .* from="desktop:s1", to="desktop:s2"', shown)
