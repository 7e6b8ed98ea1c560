"""What `top` shows and does: frames as data, the layout at every size, the keys, and a real terminal that is given back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from docs.terminal import Terminal
from lash_store import Recovery, SchemaTooNew, StorageMoved, TaskContext, TaskNotFound, TaskState, TaskStore
from lash_store.cli import keyboard, watching
from lash_store.cli.board import Board
from lash_store.cli.panel import Panel, header, picture, whole
from lash_store.cli.snapshot import Snapshot, looking
from lash_store.cli.watching import Frame, Row, Watch
from tests.acceptance import agent_file, programs
from tests.acceptance.commands import HOSTILE, assert_harmless, run
from tests.runtime.support import everything, rows

NOW = datetime(2025, 1, 31, 9, 30, tzinfo=UTC)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped file."""
    path = tmp_path_factory.mktemp("top") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


@contextmanager
def watched(path: Path, scope: str | None = None, *, with_ended: bool = False) -> Iterator[Watch]:
    with looking(str(path)) as snapshot:
        yield Watch(snapshot, scope, with_ended=with_ended)


def by_id(frame: Frame) -> dict[str, Row]:
    return {row.id: row for row in frame.rows}


def counted(path: Path, where: str = "1") -> dict[str, int]:
    found = {
        row["state"]: row["n"]
        for row in rows(path, f"SELECT state, count(*) AS n FROM tasks WHERE {where} GROUP BY state")
    }
    return {state: found.get(state, 0) for state in TaskState}


# --- frames ----------------------------------------------------------------------------------------------------------


async def test_a_frame_has_the_live_tasks_and_what_is_said_of_them(path: Path) -> None:
    async with TaskStore(path, runtime="desktop") as store:
        await agent_file.fill(store)
        before = everything(path)
        with watched(path) as watch:
            frame = watch.frame(datetime.now(UTC) + timedelta(seconds=60))
        assert everything(path) == before
    assert {row.id: row.state for row in frame.rows} == {"listener": "running", "research": "running"}
    assert frame.owners == {"alive": 1, "dead": 0, "unreachable": 0}
    assert by_id(frame)["listener"].says == "went"
    # the store is closed by now, and has let go of them
    assert (frame.states, frame.live_left_out) == (counted(path) | {"pending": 0, "running": 2}, 0)


async def test_since_is_when_a_task_came_into_its_state_and_no_later_event_moves_it(path: Path) -> None:
    store = TaskStore(path, runtime="desktop")
    go = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async with task.waiting("a word"):
            await go.wait()
        await task.progress("on with it", 0.5)
        await task.save(1)
        await task.notify("nearly done")
        await task.cancelled()

    flips = "SELECT max(at) AS at FROM events WHERE task_seq = 1 AND type IN ('started', 'state_changed', 'cancel_requested')"
    async with store:
        session = await store.session("s1")
        handle = await session.spawn(work, id="work")
        async for event in handle.events():
            if event.type == "state_changed":
                break
        with watched(path) as watch, watched(path, "desktop:s1") as one:
            waiting = by_id(watch.frame())["work"]
            assert (waiting.state, waiting.since) == ("waiting", rows(path, flips)[0]["at"])
            go.set()
            async for event in handle.events():
                if event.type == "noted":
                    break
            # the one watch saw the change as news, the other finds it in the history
            for frame in (watch.frame(), one.frame()):
                running = by_id(frame)["work"]
                assert (running.state, running.since) == ("running", rows(path, flips)[0]["at"])
                assert (running.says, running.note, running.fraction) == ("on with it", "nearly done", 0.5)


async def test_what_has_ended_stays_in_sight_for_some_seconds_and_is_counted_without_counting_all_again(
    path: Path,
) -> None:
    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, fail: bool = False) -> None:
        if fail:
            raise ValueError("no")

    async with store:
        one, two = await store.session("s1"), await store.session("s2")
        with watched(path) as watch, watched(path, "desktop:s2") as other, watched(path, with_ended=True) as all_of_it:
            assert watch.frame().rows == other.frame().rows == all_of_it.frame().rows == ()
            await (await one.spawn(work, id="good")).wait()
            await (await one.spawn(work, True, id="bad")).wait()
            await (await two.spawn(work, id="other")).wait()
            frame = watch.frame()
            assert {row.id: row.state for row in frame.rows} == {
                "good": "completed",
                "bad": "failed",
                "other": "completed",
            }
            assert by_id(frame)["bad"].says == "ValueError: no"
            assert by_id(frame)["bad"].since == by_id(frame)["bad"].completed_at
            assert frame.states == counted(path)
            assert {row.id for row in other.frame().rows} == {"other"}
            assert other.frame().states == counted(path, "scope = 'desktop:s2'")
            # nothing has changed in the file: time alone takes them away
            later = datetime.now(UTC) + timedelta(seconds=6)
            assert watch.frame(later).rows == ()
            assert {*by_id(all_of_it.frame(later))} == {"good", "bad", "other"}
            await store.prune(keep_last=0, sessions=[one.scope], unread=True)
            assert watch.frame().states == all_of_it.frame().states == counted(path)
            assert {*by_id(all_of_it.frame())} == {"other"}
            await store.session("s1")
        with watched(path) as new:
            assert new.frame().states == counted(path)


async def test_moved_work_is_seen_where_it_went(path: Path) -> None:
    store = TaskStore(path, runtime="desktop")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.cancelled()

    async with store:
        one, two = await store.session("s1"), await store.session("s2")
        await one.spawn(work, id="work")
        with watched(path) as watch, watched(path, "desktop:s1") as source, watched(path, "desktop:s2") as destination:
            assert [len(one.frame().rows) for one in (watch, source, destination)] == [1, 1, 0]
            await one.transfer(two.scope, ["work"])
            assert [len(one.frame().rows) for one in (watch, source, destination)] == [1, 0, 1]
            assert watch.frame().rows[0].scope == "desktop:s2"


NARROW = r"SCAN (owners|lash_store_version|.* VIRTUAL|t USING INDEX tasks_owned|tombstones USING COVERING INDEX)"
"""What may be read from end to end: small tables, lists of ours, the live tasks, and an index of numbers."""


def test_a_file_that_nobody_changed_is_not_read_again_and_one_that_was_is_read_by_its_indexes(
    db: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "agent.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
    source.close()
    asked: list[tuple[str, dict[str, Any]]] = []
    ask = Snapshot.rows

    def noting(snapshot: Snapshot, sql: str, **parameters: Any) -> list[Any]:
        asked.append((sql, parameters))
        return ask(snapshot, sql, **parameters)

    monkeypatch.setattr(Snapshot, "rows", noting)
    with watched(path, with_ended=True) as watch:
        first = watch.frame(NOW)
        asked.clear()
        second = watch.frame(NOW + timedelta(seconds=1))
        assert [sql for sql, _ in asked] == ["PRAGMA data_version"]
        assert (second.rows, second.at) == (first.rows, NOW + timedelta(seconds=1))
        target.execute("UPDATE tasks SET progress = 'changed' WHERE id = 'listener'")
        target.commit()
        asked.clear()
        assert by_id(watch.frame(NOW))["listener"].says == "changed"
    statements = [(sql, parameters) for sql, parameters in asked if not sql.startswith("PRAGMA")]
    assert len(statements) >= 5
    for sql, parameters in statements:
        for *_, step in target.execute(f"EXPLAIN QUERY PLAN {sql}", parameters):
            assert not step.startswith("SCAN ") or re.match(NARROW, step), (step, sql)
    target.close()


def test_so_many_rows_are_read_and_the_rest_is_counted(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "MOST_LIVE", 1)
    monkeypatch.setattr(watching, "MOST_ENDED", 2)
    with watched(db, with_ended=True) as watch:
        frame = watch.frame()
    assert (len(frame.rows), frame.live_left_out, frame.ended_left_out) == (3, 1, 4)
    assert frame.states == counted(db)
    told = "\n".join(line.plain for line in whole(frame, "agent.db", 80))
    assert "… 1 more live tasks: see lash-store list\n… 4 older ones that ended: see lash-store list --all" in told
    with watched(db) as watch:
        assert watch.frame().rows[0].id == "listener", "the oldest"


def test_the_pace_is_the_mean_of_ten_seconds_from_the_first_frame_on(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            await store.session("s1")

    asyncio.run(make())
    with sqlite3.connect(path) as connection:

        def happen(seconds_ago: float, count: int) -> None:
            at = (NOW - timedelta(seconds=seconds_ago)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            sql = "INSERT INTO events (scope, type, at, data) VALUES ('desktop:s1', 'session_opened', ?, '{}')"
            connection.executemany(sql, [(at,)] * count)
            connection.commit()

        connection.execute("DROP TRIGGER events_are_history")
        connection.execute("UPDATE events SET at = '2024-01-01T00:00:00.000Z'")
        happen(60, 500)
        happen(5, 20)
        with watched(path) as watch:
            assert watch.frame(NOW).events_a_second == 2.0
            happen(-5, 30)
            assert 2.0 < watch.frame(NOW + timedelta(seconds=5)).events_a_second < 4.0
            assert watch.frame(NOW + timedelta(seconds=60)).events_a_second == 0.0
    connection.close()


def test_an_owner_that_is_killed_shows_at_once_though_the_file_says_nothing_of_it(
    path: Path, start: Callable[..., Any]
) -> None:
    owner = start(programs.spawn_and_stay, str(path), [["forever", "on-and-on", {}, []]], {})
    owner.wait_for("ready")
    owner.wait_for("body", "on-and-on")
    with watched(path) as watch:
        frame = watch.frame()
        assert (frame.owners["alive"], frame.owners["dead"], by_id(frame)["on-and-on"].owner) == (1, 0, "alive")
        owner.kill()
        frame = watch.frame()
        assert (frame.owners["alive"], frame.owners["dead"], by_id(frame)["on-and-on"].owner) == (0, 1, "dead")
    told = run("top", "--once", db=path).stdout
    assert "no owner alive, 1 dead" in told
    assert re.search(r"on-and-on +forever .* its owner is dead\n", told)


def test_a_file_that_goes_away_or_is_upgraded_meanwhile_is_said_to_be(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
        with watched(path) as watch:
            watch.frame()
            target.execute("UPDATE lash_store_version SET version_num = '9999'")
            target.commit()
            with pytest.raises(SchemaTooNew, match="was taken to revision 9999 meanwhile"):
                watch.frame()
            target.execute("UPDATE lash_store_version SET version_num = (?)", (watching.HEAD,))
            target.commit()
            watch.frame()
            path.rename(tmp_path / "elsewhere.db")
            with pytest.raises(StorageMoved, match="no longer names the file"):
                watch.frame()
    source.close()
    target.close()


# --- without a screen ------------------------------------------------------------------------------------------------


def test_one_frame_is_printed_whole_and_harmless_however_wide(db: Path) -> None:
    for columns in ("", "200", "110", "80", "60", "40", "20", "3"):
        done = run("top", "--once", "--all", db=db, COLUMNS=columns)
        assert (done.returncode, done.stderr) == (0, "")
        assert_harmless(done.stdout)
        lines = done.stdout.splitlines()
        assert [line for line in lines if line != line.rstrip() or len(line) > int(columns or 1000)] == []
        assert len(lines) == 4 + 2 + 8
    everything_said = run("top", "--once", "--all", db=db).stdout
    assert "agent.db  no owner alive  " in everything_said
    assert "\ndesktop:s1  2 live\n" in everything_said
    assert "exit status 3 · note: monitor 'tests' wrote 2 lines, and failed: exit status 3\n" in everything_said


def test_json_is_one_line_a_frame(db: Path) -> None:
    done = run("top", "--once", "--json", "--session", "desktop:s1", db=db)
    (line,) = done.stdout.splitlines()
    frame = json.loads(line)
    assert line.isascii()
    assert {*frame} == {
        *("at", "scope", "owners", "states", "events_a_second", "live_left_out", "ended_left_out", "tasks"),
    }
    assert [(task["id"], task["state"], task["attempt"]) for task in frame["tasks"] if not task["completed_at"]] == [
        ("listener", "pending", 1),
        ("research", "pending", 1),
    ]
    assert frame["states"] == counted(db, "scope = 'desktop:s1'")


@pytest.mark.long
def test_json_lines_go_on_until_the_reader_goes_away(db: Path) -> None:
    command = [sys.executable, "-m", "lash_store.cli", "top", "--json", "--interval", "0.1", "--db", db]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first, second = (json.loads(process.stdout.readline()) for _ in range(2))
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (141, "")
    assert first["at"] < second["at"]


def test_wrong_usage_is_one_clear_error(db: Path) -> None:
    for arguments, part in (
        (["top"], "top needs a terminal, and std"),
        (["top", "--once", "--interval", "0"], "0.0 is not in the range"),
        (["top", "--once", "--session", "s1"], "session"),
    ):
        done = run(*arguments, db=db)
        assert (done.returncode, done.stdout) == (2, "")
        assert part in done.stderr
    done = run("top", "--once", "--session", "desktop:s9", db=db)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no session 'desktop:s9' in this file" in done.stderr


def test_help_teaches_and_imports_nothing_that_takes_long() -> None:
    done = run("top", "--help")
    assert done.returncode == 0
    assert "Examples:\n    lash-store top" in done.stdout
    assert "  top " in run("--help").stdout
    program = (
        "import sys; from lash_store.cli import main; assert main(['top', '--help']) == 0\n"
        "sys.exit(3 if {'sqlalchemy', 'alembic', 'pydantic', 'rich', 'sqlite3', 'asyncio'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


# --- the layout ------------------------------------------------------------------------------------------------------


def row(seq: int, **told: Any) -> Row:
    given: dict[str, Any] = {
        "task_seq": seq, "scope": "desktop:s1", "id": f"task-{seq}", "label": "work", "kind": "other", "state": "running",
        "attempt": 1, "fraction": None, "created_at": "2025-01-31T09:00:00.000Z", "completed_at": None, "owner_id": 1,
        "says": None, "note": None, "since": "2025-01-31T09:29:00.000Z", "owner": "alive", **told,
    }  # fmt: skip
    return Row(**given)


def frame_of(*found: Row, with_ended: bool = False) -> Frame:
    states = {state: sum(one.state == state for one in found) for state in TaskState}
    return Frame(NOW, None, {"alive": 1, "dead": 0, "unreachable": 0}, {**states}, 1.5, found, 0, with_ended=with_ended)


MANY = frame_of(
    *(
        row(seq, scope=f"desktop:{'ab'[seq > 120]}", id=f"{HOSTILE}{seq}", fraction=seq / 200, says="word " * 30)
        for seq in range(1, 201)
    )
)


@pytest.mark.long
@pytest.mark.parametrize(("width", "height"), [(40, 10), (110, 30), (20, 5), (200, 60), (1, 1), (10, 2)])
def test_the_selected_task_is_in_sight_below_its_session_and_nothing_is_too_wide(width: int, height: int) -> None:
    first = 0
    for seq in [*range(1, 201, 7), *range(200, 0, -7), 1, 200, 100]:
        footer = header(MANY, "agent.db", width)[0]
        lines, first = picture(MANY, "agent.db", Panel(width, height, seq, first), footer)
        assert len(lines) == height
        assert all(line.cell_len <= width for line in lines)
        assert_harmless("\n".join(line.plain for line in lines))
        chosen = [line for line in lines if line.style == "reverse"]
        assert len(chosen) == (height > 1)
        if width >= 40:
            assert chosen[0].plain.lstrip().startswith(f"{seq} ")
            names = [line.plain.split()[0] for line in lines if line.plain.startswith("desktop:")]
            assert f"desktop:{'ab'[seq > 120]}" in names
    assert [line for line in lines if "word" in line.plain] or width < 40


def test_the_window_moves_only_when_it_must() -> None:
    footer = header(MANY, "agent.db", 80)[0]
    _, first = picture(MANY, "agent.db", Panel(80, 30, 100, 0), footer)
    for seq in range(100, 80, -1):
        assert picture(MANY, "agent.db", Panel(80, 30, seq, first), footer)[1] == first


def test_a_line_tells_state_spans_attempt_bar_and_words() -> None:
    frame = frame_of(row(7, attempt=3, fraction=0.42, says="part 42", note="half way"))
    lines = [line.plain for line in whole(frame, "agent.db", 110)]
    assert lines[0].startswith("agent.db  1 owner alive  1.5 events/s ")
    assert lines[0].endswith(" 2025-01-31 09:30:00 UTC")
    assert lines[1] == "1 running"
    assert lines[3:] == [
        "#  id      name  kind   state      for  age  try  done             progress",
        "desktop:s1  1 live",
        "7  task-7  work  other  running     1m  30m    3  ━━━━──────  42%  part 42 · note: half way",
    ]


def test_on_a_terminal_without_other_characters_every_line_is_ascii_and_as_wide() -> None:
    frame = frame_of(row(7, id="größer " * 9, fraction=0.42, says="日本語 · …" * 20))
    for width in (60, 110, 100_000):
        lines = [line.plain for line in whole(frame, "größer.db", width, is_ascii=True)]
        assert all(line.isascii() and len(line) <= width for line in lines)
    assert "  ====------  42%  " in lines[-1]
    assert "gr\\xf6\\xdfer" in lines[-1]
    footer = header(frame, "agent.db", 80)[0].append("…")
    screen, _ = picture(frame, "größer.db", Panel(60, 20, 7, is_ascii=True), footer)
    assert all(line.plain.isascii() and line.cell_len <= 60 for line in screen)


@pytest.mark.parametrize("of_row", [{"since": "tomorrow"}, {"created_at": HOSTILE}, {"state": HOSTILE}, {"kind": ""}])
def test_what_a_hand_wrote_into_a_row_does_not_end_the_view(of_row: dict[str, Any]) -> None:
    assert_harmless("\n".join(line.plain for line in whole(frame_of(row(1, **of_row)), HOSTILE, 80)))


# --- the keys --------------------------------------------------------------------------------------------------------


class Asked:
    """Notes what was asked for, and answers when the test says so."""

    def __init__(self) -> None:
        self.futures: dict[int, Future[Any]] = {}

    def __call__(self, task_seq: int) -> Future[Any]:
        return self.futures.setdefault(task_seq, Future())


def board_of(*found: Row, **how: Any) -> tuple[Board, Asked]:
    asked = Asked()
    board = Board("agent.db", asked, **how)
    board.see(frame_of(*found))
    return board, asked


def chosen(board: Board) -> str:
    return next(line.plain.split()[0] for line in board.paint(80, 24) if line.style == "reverse")


def footer(board: Board) -> str:
    return board.paint(80, 24)[-1].plain.rstrip()


def test_keys_choose_a_task_and_the_choice_stays_with_it() -> None:
    board, _ = board_of(*map(row, range(1, 60)))
    for key, wanted in (
        ("up", "1"),
        ("down", "2"),
        ("j", "3"),
        ("k", "2"),
        ("page down", "20"),
        ("end", "59"),
        ("down", "59"),
        ("g", "1"),
        ("G", "59"),
        ("page up", "41"),
    ):
        assert board.press(key)
        assert chosen(board) == wanted
    board.see(frame_of(*map(row, range(30, 60))))
    assert chosen(board) == "41"
    board.see(frame_of(*map(row, range(50, 60))))
    assert chosen(board) == "59", "where it stood, or as near as there is"
    board.see(frame_of())
    assert board.press("down")
    assert board.press("c")
    assert "no live tasks" in "\n".join(line.plain for line in board.paint(80, 24))
    assert not board.press("q")


def test_a_cancel_is_asked_for_once_it_was_confirmed_and_its_outcome_is_told() -> None:
    board, asked = board_of(row(1), row(2, id=HOSTILE))
    board.press("c")
    assert footer(board) == "cancel #1 task-1? y/n"
    board.press("q")
    assert footer(board).startswith("↑↓ select"), "any other key is no"
    board.press("j")
    board.press("c")
    assert_harmless(footer(board))
    # while a person thinks, the rows go on; the question stays about the one it named
    board.see(frame_of(row(1)))
    board.press("y")
    assert [*asked.futures] == [2]
    assert "asking it to stop" in footer(board)
    assert board.settle() == []
    asked.futures[2].set_exception(TaskNotFound("no task '#2'", task_id="#2"))
    assert len(board.settle()) == 1
    assert "no task '#2'" in footer(board)
    board.press("k")
    board.press("c")
    board.press("y")
    asked.futures[1].set_result(type("Record", (), {"state": TaskState.CANCEL_REQUESTED}))
    assert board.settle() == ["#1 task-1: was asked to stop"]
    board.see(frame_of(row(1, state="cancel_requested")))
    assert "#1 task-1: was asked to stop" in footer(board)
    board.see(frame_of(row(1, state="cancelled", completed_at="2025-01-31T09:29:59.000Z")))
    assert "#1 task-1: cancelled" in footer(board)
    board.press("c")
    assert "#1 task-1: cancelled" in footer(board), "it has ended: there is nothing to ask"


def test_a_shows_what_has_ended_too() -> None:
    board, _ = board_of(row(1))
    assert "a all" in footer(board)
    board.press("a")
    assert board.with_ended
    assert "a live ones" in footer(board)
    plain, _ = board_of(row(1), is_ascii=True)
    assert footer(plain).isascii()


def test_what_a_terminal_sends_is_cut_into_keys() -> None:
    sent = b"j\x1b[A\x1bOB\x1b[5~\x1b[1;5Aq\x1b[200~\r\xc3\xa9\x1b"
    assert [*keyboard._keys(sent)] == ["j", "up", "down", "page up", "q", "enter", "\ufffd", "\ufffd", "escape"]


# --- a real terminal -------------------------------------------------------------------------------------------------


def on_terminal(path: Path, *options: str, **how: Any) -> Terminal:
    command = [sys.executable, "-m", "lash_store.cli", "top", "--db", path.name, "--interval", "0.2", *options]
    return Terminal(command, cwd=path.parent, env={"PYTHONPATH": os.pathsep.join(sys.path)}, **how)


LEFT = b"\x1b[?1049l"


@pytest.mark.long
def test_a_key_cancels_a_task_of_a_live_owner_and_the_terminal_is_given_back(
    path: Path, start: Callable[..., Any]
) -> None:
    tasks = [["forever", name, {}, []] for name in ("first", "second", "third")]
    owner = start(programs.spawn_and_stay, str(path), tasks, {"cancel_grace": 0.1})
    for name in ("first", "second", "third"):
        owner.wait_for("body", name)
    with on_terminal(path, columns=100, lines=24) as terminal:
        before = terminal.attributes
        shown = terminal.wait_for("1 of 3")
        assert "agent.db  1 owner alive" in shown
        assert re.search(r"\n2  second  forever  other  running +\d+s +\d+s +1\n", shown)
        assert terminal.attributes != before
        terminal.press("\x1b[Bc")
        terminal.wait_for("cancel #2 second? y/n")
        terminal.press("y")
        terminal.wait_for("#2 second: cancelled")
        assert rows(path, "SELECT id, cancel_reason FROM tasks WHERE state = 'cancelled'") == [
            {"id": "second", "cancel_reason": "asked for in lash-store top"}
        ]
        # smaller, and still in order
        terminal.resize(40, 10)
        terminal.press("g")
        terminal.wait_for(lambda text: "c cancel  a all" in text and "desktop:s1" in text and "#  id" not in text)
        assert all(len(line) <= 40 for line in terminal.rest().splitlines())
        terminal.press("q")
        assert terminal.wait() == 0
        assert terminal.attributes == before
        assert terminal.output.rstrip().endswith((LEFT + b"\x1b[?25h", LEFT))


@pytest.mark.long
def test_ctrl_z_and_sigterm_and_ctrl_c_give_the_terminal_back(db: Path) -> None:
    with on_terminal(db) as terminal:
        before = terminal.attributes
        terminal.wait_for("q quit")
        terminal.press("\x1a")
        os.waitid(os.P_PID, terminal.process.pid, os.WSTOPPED | os.WNOWAIT)
        assert terminal.attributes == before
        terminal.signal(signal.SIGCONT)
        terminal.wait_for(lambda _: terminal.attributes != before)
        terminal.press("a")
        terminal.wait_for("a live ones")
        terminal.signal(signal.SIGTERM)
        assert terminal.wait() == -signal.SIGTERM
        assert terminal.attributes == before
        assert LEFT in terminal.output[-40:]
    with on_terminal(db) as terminal:
        before = terminal.attributes
        terminal.wait_for("q quit")
        terminal.press("\x03")
        assert terminal.wait() == 130
        assert terminal.attributes == before


def test_a_file_that_vanishes_is_one_line_on_a_terminal_that_was_given_back(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
    source.close()
    target.close()
    with on_terminal(path, "--all") as terminal:
        before = terminal.attributes
        terminal.wait_for("listener")
        path.unlink()
        assert terminal.wait() == 1
        assert terminal.attributes == before
        told = terminal.output.rpartition(LEFT)[2].decode()
    assert told.count("lash-store: ") == told.count("\n") == 1
    assert "no longer names the file" in told
    assert "Traceback" not in told
