"""The picture of a session: as data exactly what the events say; as SVG and HTML whole, harmless, and in need of nothing."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import sqlite3
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lash_store import Recovery, TaskContext, TaskKind, TaskState, TaskStore
from tests.acceptance import agent_file, timeline_programs
from tests.acceptance.commands import HOSTILE, Done, assert_harmless, run
from tests.acceptance.processes import workers

Sections = dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A file two of whose owners were killed, the second unnoticed, and what was told while that lived."""
    path = tmp_path_factory.mktemp("timeline") / "agent.db"
    with workers() as start:
        first = start(timeline_programs.first_life, str(path))
        first.wait_for("ready")
        first.kill()
        second = start(timeline_programs.second_life, str(path))
        second.wait_for("ready")
        live = run("timeline", "--all", "--json", db=path)
        second.kill()
    return path, live


@pytest.fixture
def db(killed: tuple[Path, Done]) -> Path:
    return killed[0]


@pytest.fixture
def edited(db: Path, tmp_path: Path) -> Path:
    """A copy that a test changes by hand."""
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
    source.close()
    target.close()
    return path


def change(path: Path, *statements: str, **parameters: Any) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER IF EXISTS tasks_terminal_is_final")
        connection.execute("DROP TRIGGER IF EXISTS events_are_history")
        for sql in statements:
            connection.execute(sql, parameters)
    connection.close()


def rows(path: Path, sql: str, *parameters: Any) -> list[Any]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(sql, parameters).fetchall()
    finally:
        connection.close()


def data(*arguments: str, db: Path) -> dict[str, Any]:
    done = run("timeline", *arguments, "--json", db=db)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tasks(told: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {task["id"]: task for section in told["sections"] for task in section["tasks"]}


def phases(task: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(one["phase"], one["attempt"], one["begin"], one["end"]) for one in task["segments"]]


def at(path: Path, task_id: str, kind: str, attempt: int | None = None) -> str:
    sql = "SELECT at FROM events WHERE task_id = ? AND type = ? AND (? IS NULL OR attempt = ?) ORDER BY seq LIMIT 1"
    return str(rows(path, sql, task_id, kind, attempt, attempt)[0][0])


def last_heard(path: Path) -> str:
    """Return when the first owner last wrote what none but it could write: only it lived then."""
    first = "SELECT min(seq) FROM events WHERE type IN ('reattached', 'abandoned')"
    written = "('registered', 'started', 'progress', 'saved', 'state_changed', 'retry_scheduled', 'completed')"
    return str(rows(path, f"SELECT max(at) FROM events WHERE seq < ({first}) AND type IN {written}")[0][0])


def drawn(*arguments: str, db: Path) -> str:
    done = run("timeline", *arguments, "-o", "-", db=db)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- what the events say --------------------------------------------------------------------------------------------


def test_tries_and_the_gap_of_a_kill_stand_where_the_events_have_them(db: Path) -> None:
    found, heard = tasks(data("--all", db=db)), last_heard(db)
    for name in ("steady", "child", "parent"):
        found_dead = at(db, name, "reattached")
        assert phases(found[name]) == [
            ("running", 1, at(db, name, "started"), heard),
            ("lost", 1, heard, found_dead),
            ("running", 2, found_dead, at(db, name, "completed")),
        ]
        assert [one["owner_id"] for one in found[name]["segments"]] == [1, 1, 2]
        assert found[name]["segments"][1]["was"] == "running"
        assert found[name]["ended_at"] == at(db, name, "completed")


def test_a_death_has_its_mark_where_the_owner_was_last_heard_of_and_a_reattachment_where_it_was_found(db: Path) -> None:
    marks = [(one["what"], one["at"]) for one in tasks(data("--all", db=db))["steady"]["marks"]]
    assert [mark for mark in marks if mark[0] in {"died", "reattached"}] == [
        ("died", last_heard(db)),
        ("reattached", at(db, "steady", "reattached")),
    ]
    assert ("progress", at(db, "steady", "progress", 1)) in marks
    assert ("signalled", at(db, "steady", "signalled")) in marks


def test_waits_are_told_from_work(db: Path) -> None:
    found, heard = tasks(data("--all", db=db)), last_heard(db)
    asker = found["asker"]
    begun = at(db, "asker", "state_changed", 1)
    first = [one for one in asker["segments"] if one["attempt"] == 1 and one["phase"] != "running"]
    assert [(one["phase"], one["begin"], one["end"], one["why"], one["was"]) for one in first] == [
        ("waiting", begun, heard, "a person's answer", None),
        ("lost", heard, at(db, "asker", "reattached"), None, "waiting"),
    ]
    # the sleep that the first try began goes on in the second, which writes nothing down of it
    sleeper = found["sleeper"]
    assert [one["phase"] for one in sleeper["segments"] if one["attempt"] == 2] == ["waiting", "lost"]
    assert {one["why"] for one in sleeper["segments"] if one["phase"] == "waiting"} == {"sleeps"}


def test_a_failed_try_is_put_off_until_it_is_due(db: Path) -> None:
    flaky = tasks(data("--all", db=db))["flaky"]
    event = rows(db, "SELECT data FROM events WHERE task_id = 'flaky' AND type = 'retry_scheduled'")[0]
    due = json.loads(event[0])["not_before"]
    failed = at(db, "flaky", "retry_scheduled")
    backoff = next(one for one in flaky["segments"] if one["phase"] == "backoff")
    assert (backoff["attempt"], backoff["begin"], backoff["end"]) == (1, failed, due)
    assert [one["attempt"] for one in flaky["segments"] if one["phase"] == "running"] == [1, 2]
    assert "lost" not in {one["phase"] for one in flaky["segments"]}
    assert [(one["what"], one["says"]) for one in flaky["marks"]] == [("retry", "the network is down")]


def test_work_that_ended_with_its_owner_ends_where_that_was_found_dead(db: Path) -> None:
    found = tasks(data("--all", db=db))
    once, stubborn = found["once"], found["stubborn"]
    assert (once["state"], once["ended_at"]) == ("abandoned", at(db, "once", "abandoned"))
    assert phases(once)[-1] == ("lost", 1, last_heard(db), at(db, "once", "abandoned"))
    asked, ended = at(db, "stubborn", "cancel_requested"), at(db, "stubborn", "cancelled")
    assert (stubborn["state"], stubborn["ended_at"]) == ("cancelled", ended)
    last = stubborn["segments"][-1]
    assert (last["phase"], last["was"], last["end"]) == ("lost", "cancelling", ended)
    assert last["begin"] >= asked or stubborn["segments"][-2]["phase"] == "cancelling"


def test_an_owner_that_nobody_has_found_dead_yet_leaves_its_work_open_and_lost(
    db: Path, killed: tuple[Path, Done]
) -> None:
    told = data("--all", db=db)
    assert [(one["owner_id"], one["how"]) for one in told["owners"]] == [(1, "died"), (2, "dead")]
    assert told["is_live"] is False
    asker = tasks(told)["asker"]["segments"][-1]
    assert (asker["phase"], asker["was"], asker["is_open"]) == ("lost", "waiting", True)
    # while it lived, its work went on
    live = json.loads(killed[1].stdout)
    assert [one["how"] for one in live["owners"]] == ["died", "alive"]
    last = tasks(live)["asker"]["segments"][-1]
    assert (last["phase"], last["is_open"], last["end"]) == ("waiting", True, live["known_until"])


def test_work_that_was_moved_stands_where_it_is_and_is_marked_and_counted(db: Path) -> None:
    told = data("--all", db=db)
    one, two = told["sections"]
    assert [(task["id"], task["depth"]) for task in two["tasks"]] == [
        ("steady", 0),
        ("sleeper", 0),
        ("asker", 0),
        ("parent", 0),
        ("child", 1),
    ]
    assert (one["moved_away"], two["moved_away"]) == (5, 0)
    moved = [mark for mark in two["tasks"][0]["marks"] if mark["what"] == "transferred"]
    assert [mark["says"] for mark in moved] == ["from desktop:s1 to desktop:s2"]
    assert "handed_off" in {mark["what"] for mark in one["marks"]} & {mark["what"] for mark in two["marks"]}


def test_external_work_is_not_interrupted_by_its_owners_death(db: Path) -> None:
    elsewhere = tasks(data("--all", db=db))["elsewhere"]
    assert [(one["phase"], one["is_open"]) for one in elsewhere["segments"]] == [("running", True)]


def test_what_a_closed_owner_released_is_nobodys_until_it_is_reattached(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"

    async def life(*, is_first: bool) -> None:
        store = TaskStore(path, runtime="desktop")

        @store.task(recovery=Recovery.RERUN)
        async def work(task: TaskContext) -> None:
            if is_first:
                await asyncio.Event().wait()

        async with store:
            session = await store.session("s1")
            if is_first:
                await session.spawn(work, id="work")
                async for event in session.events(0):
                    if event.type == "started":
                        break
            else:
                await (await session.handle("work")).wait()

    asyncio.run(life(is_first=True))
    time.sleep(0.01)
    asyncio.run(life(is_first=False))
    task = tasks(data(db=path))["work"]
    again = at(path, "work", "reattached")
    assert [one for one in phases(task) if one[0] == "unowned"] == [("unowned", 1, at(path, "work", "released"), again)]
    assert {one["phase"] for one in task["segments"]} <= {"queued", "running", "unowned"}
    assert [mark["what"] for mark in task["marks"]] == ["released", "reattached"]


def test_a_clock_that_was_set_back_gives_no_negative_length(edited: Path) -> None:
    change(
        edited, "UPDATE events SET at = '2001-01-01T00:00:00.000Z' WHERE type IN ('progress', 'completed', 'signalled')"
    )
    told = data("--all", db=edited)
    assert told["events_set_back"] > 3
    for task in tasks(told).values():
        ends = [(one["begin"], one["end"]) for one in task["segments"]]
        assert all(begin <= end for begin, end in ends)
        assert [end for _, end in ends[:-1]] == [begin for begin, _ in ends[1:]]
    svg = drawn("--all", db=edited)
    assert 'width="-' not in svg
    assert "a clock was set back" in svg


def test_pruned_tasks_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            session = await store.session("s1")
            for number in range(3):
                await session.register(f"t{number}", TaskKind.OTHER)
                await session.complete(f"t{number}", TaskState.CANCELLED)
            await store.prune(keep_last=1)

    asyncio.run(make())
    section = data(db=path)["sections"][0]
    assert (section["pruned"], [task["id"] for task in section["tasks"]]) == (2, ["t2"])
    assert "2 tasks were pruned" in drawn(db=path)


# --- which tasks, which time ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("agent") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


def test_a_session_has_its_tree_and_what_its_sub_agents_do(agent: Path) -> None:
    told = data("s1", db=agent)
    assert [(task["id"], task["depth"]) for task in told["sections"][0]["tasks"]] == [
        ("index", 0),
        ("bad", 0),
        ("listener", 0),
        ("research", 0),
        ("part", 1),
        ("fetch", 2),
        ("monitor:tests", 0),
        ("bystander", 0),
    ]
    assert ">desktop:deep</text>" in drawn("s1", db=agent)


def test_a_task_has_all_below_it(agent: Path) -> None:
    for name in ("research", "#4"):
        assert [*tasks(data("--task", name, db=agent))] == ["research", "part", "fetch"]
    assert [*tasks(data("deep", "--task", "fetch", db=agent))] == ["fetch"]


def test_all_sessions_have_a_section_each_and_every_task_once(agent: Path) -> None:
    sections = data("--all", db=agent)["sections"]
    assert [one["name"] for one in sections] == ["desktop:s1", "desktop:s2", "desktop:deep", "desktop:s3"]
    names = [task["id"] for one in sections for task in one["tasks"]]
    assert sorted(names) == sorted(row[0] for row in rows(agent, "SELECT id FROM tasks"))


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["desktop:nope"], 1, "no session 'desktop:nope' in this file: it has desktop:s1"),
        (["--task", "nope"], 1, "no task 'nope' in this file"),
        ([], 1, "which session? the file has desktop:s1"),
        (["s1", "--all"], 2, "--all shows every session"),
        (["s1", "--since", "1h", "--last", "1h"], 2, "both say where the picture begins"),
        (["s1", "--since", "2026-01-02", "--until", "2026-01-01"], 2, "nothing is between them"),
        (["s1", "--last", "soon"], 2, "no span"),
        (["s1", "--json", "-o", "x.svg"], 2, "--json prints"),
        (["s1", "--html", "-o", "x.svg"], 2, "name it .html"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("timeline", *arguments, db=agent)
    assert (done.returncode, done.stdout) == (status, "")
    assert complaint in done.stderr
    assert [*tmp_path.iterdir()] == []


def test_an_empty_session_is_drawn_and_says_so(agent: Path) -> None:
    assert data("s3", db=agent)["sections"][0]["tasks"] == []
    assert "no tasks" in drawn("s3", db=agent)


def test_only_the_chosen_time_is_shown_and_what_is_outside_is_counted(agent: Path) -> None:
    told = data("s1", "--until", "2001-01-01", "--since", "2000-01-01", db=agent)
    assert (told["from"], told["to"]) == ("2000-01-01T00:00:00.000Z", "2001-01-01T00:00:00.000Z")
    assert (told["sections"][0]["tasks"], told["sections"][0]["outside"]) == ([], 8)
    assert "8 tasks are outside of the chosen time" in drawn("s1", "--until", "2001-01-01", db=agent)
    whole = data("s1", db=agent)
    last = data("s1", "--last", "1s", db=agent)
    assert last["to"] == whole["to"]
    assert "bystander" in tasks(last)


def test_of_too_many_tasks_live_ones_and_the_newest_are_shown_and_the_rest_counted(agent: Path) -> None:
    told = data("s1", "--limit", "4", db=agent)
    assert [*tasks(told)] == ["listener", "research", "monitor:tests", "bystander"]
    assert told["sections"][0]["left_out"] == 4
    done = run("timeline", "s1", "--limit", "4", "-o", "-", db=agent)
    assert "4 more tasks are not shown: see --limit" in done.stdout
    assert "4 more tasks are not shown: see --limit" in done.stderr


# --- the picture ----------------------------------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_is_well_formed_and_every_task_has_its_bar(db: Path) -> None:
    root = ET.fromstring(drawn("--all", db=db))
    assert root.tag == f"{SVG}svg"
    bars = {group.get("id"): group for group in root.iter(f"{SVG}g") if group.get("class") == "task"}
    assert bars.keys() == {f"task-{seq}" for (seq,) in rows(db, "SELECT task_seq FROM tasks")}
    for bar in bars.values():
        assert list(bar.iter(f"{SVG}rect"))
    titles = [title.text or "" for title in root.iter(f"{SVG}title")]
    assert any(title.startswith("its owner died in here · try 1") for title in titles)
    assert any(title.startswith("waiting or asleep · try 2") and "a person's answer" in title for title in titles)
    assert any("last heard of at" in title and "pid" in title for title in titles)


def test_it_is_readable_in_the_dark_and_needs_nothing(db: Path) -> None:
    for text in (drawn("--all", db=db), drawn("--all", "--html", db=db)):
        assert "prefers-color-scheme: dark" in text
        assert_asks_for_nothing(text)


def assert_asks_for_nothing(text: str) -> None:
    text = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert (
        re.findall(r"https?:|//[a-z]|@import|<script|<link|<iframe|<image|<img|\bhref|\bsrc\s*=|\bon\w+\s*=", text)
        == []
    )
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {"#lost", "#waits", "#cancels", "#names"}


class _Page(HTMLParser):
    VOID = frozenset({"meta", "rect", "path", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_a_page_has_the_picture_and_a_table(db: Path, tmp_path: Path) -> None:
    target = tmp_path / "night.html"
    assert run("timeline", "--all", "-o", str(target), db=db).returncode == 0
    page = _Page()
    page.feed(target.read_text())
    assert page.open == []
    assert page.tags.count("svg") == page.tags.count("table") == 1
    assert page.tags.count("tr") == 1 + len(rows(db, "SELECT 1 FROM tasks"))
    assert "steady #2" in page.cells


NAMES = [
    "<script>alert(1)</script>",
    "]]>&amp;\"'",
    "a\0b\x1b[2J\ufffe\uffff\ud7ff",
    "x" * 10_000,
    "\u0645\u0631\u062d\u0628\u0627\u202egnp",
    "e" + "\u0301" * 5000,
    HOSTILE,
]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_name_is_only_shown(edited: Path, name: str, tmp_path: Path) -> None:
    change(
        edited,
        "UPDATE tasks SET id = :name, progress = :name WHERE id = 'steady'",
        "UPDATE events SET data = json_object('state', 'waiting', 'waiting_for', :name) WHERE type = 'state_changed'",
        "UPDATE owners SET host = :name",
        name=name,
    )
    for arguments in (["--all"], ["--all", "--html"], ["--task", "#2"]):
        text = drawn(*arguments, db=edited)
        assert_harmless(text)
        assert_asks_for_nothing(text)
    root = ET.fromstring(drawn("--all", db=edited))
    labels = ["".join(one.itertext()) for one in root.iter(f"{SVG}text") if one.find(f"{SVG}title") is None]
    labels += [one.tail or "" for one in root.iter(f"{SVG}title")]
    assert max(map(len, labels)) < 400
    assert any(one.get("id") == "task-2" for one in root.iter(f"{SVG}g"))
    done = run("timeline", "--task", "#2", "-o", str(tmp_path / "x.svg"), db=edited)
    assert_harmless(done.stdout + done.stderr)


def test_the_whole_of_a_long_name_is_in_its_tooltip(edited: Path) -> None:
    change(edited, "UPDATE tasks SET id = :name WHERE id = 'steady'", name="x" * 10_000)
    titles = [title.text or "" for title in ET.fromstring(drawn("--all", db=edited)).iter(f"{SVG}title")]
    assert any("x" * 10_000 in title for title in titles)


def test_values_that_somebodys_hand_made_unreadable_do_not_stop_the_picture(edited: Path) -> None:
    change(
        edited,
        "UPDATE events SET at = 'yesterday' WHERE type = 'progress'",
        "UPDATE events SET at = '9999-12-31T23:59:59.999Z' WHERE type = 'signalled'",
        "UPDATE events SET data = json_object('state', json('[1]'), 'owner_id', 'x', 'wake_at', 7) WHERE type = 'saved'",
        "UPDATE tasks SET created_at = 'never' WHERE id = 'once'",
        "UPDATE owners SET opened_at = '' WHERE owner_id = 1",
        "UPDATE sessions SET opened_at = 'x'",
        "DELETE FROM events WHERE task_id = 'flaky'",
    )
    ET.fromstring(drawn("--all", db=edited))
    assert "no events of it are in the file" in drawn("--all", db=edited)


@pytest.mark.long
def test_five_thousand_tasks_are_drawn_at_once(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            await store.session("s1")

    asyncio.run(make())
    numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
    change(
        path,
        f"""{numbers} INSERT INTO tasks (task_seq, parent_seq, scope, id, kind, mode, state, label, recovery, cancel_policy,
          attempt, attempts_spent, max_attempts, result, created_at, updated_at, completed_at)
        SELECT i, nullif(i / 10, 0), 'desktop:s1', 'task-' || i, 'other', 'managed', 'completed', 'task', 'rerun',
          'cooperative', 1, 0, 100, '1', printf('2026-01-01T00:%02d:%02d.000Z', i / 100, i % 60), '2026', '2026' FROM n""",
        *(
            f"""INSERT INTO events (task_seq, scope, task_id, attempt, type, at, data)
            SELECT task_seq, scope, id, 1, '{kind}', substr(created_at, 1, 20) || '{ms}Z',
              json_object('state', '{state}', 'owner_id', 1) FROM tasks"""
            for kind, ms, state in (
                ("registered", "000", "pending"),
                ("started", "100", "running"),
                ("completed", "900", "completed"),
            )
        ),
    )
    before = time.process_time()
    done = run("timeline", "s1", "-o", "-", db=path)
    assert time.process_time() - before < 5.0
    assert done.stdout.count('class="task"') == 200
    assert "4,800 more tasks are not shown" in done.stderr
    assert drawn("s1", "--limit", "5000", db=path).count('class="task"') == 5000


# --- the file it is written to --------------------------------------------------------------------------------------


def test_a_picture_is_written_where_it_is_said_and_told(
    agent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        run("timeline", "s1", db=agent).stdout
        == f"timeline.svg: 8 tasks, {Path('timeline.svg').stat().st_size:,} bytes\n"
    )
    assert run("timeline", "s1", "--html", db=agent).returncode == 0
    assert Path("timeline.html").read_text().startswith("<!DOCTYPE html>")
    ET.parse("timeline.svg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timeline.html", "timeline.svg"]


def test_a_file_that_is_there_is_written_over_only_by_force(agent: Path, tmp_path: Path) -> None:
    target = tmp_path / "x.svg"
    target.write_text("mine")
    done = run("timeline", "s1", "-o", str(target), db=agent)
    assert done.returncode == 1
    assert "--force writes over it" in done.stderr
    assert target.read_text() == "mine"
    assert run("timeline", "s1", "-o", str(target), "--force", db=agent).returncode == 0
    ET.parse(target)
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("end", ["", "-wal", "-shm"])
def test_the_store_itself_is_never_written_over(agent: Path, tmp_path: Path, end: str) -> None:
    path = tmp_path / "copy.db"
    shutil.copy(agent, path)
    link = tmp_path / "link.svg"
    link.symlink_to(f"{path}{end}")
    before = path.read_bytes()
    for target in (f"{path}{end}", str(link)):
        done = run("timeline", "s1", "-o", target, "--force", db=path)
        assert (done.returncode, "is the store itself" in done.stderr) == (1, True)
    assert path.read_bytes() == before


def test_a_copy_of_a_stopped_file_is_drawn_as_the_file_is(db: Path, tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    shutil.copy(db, path)
    for end in ("-wal", "-shm"):
        if Path(f"{db}{end}").exists():
            shutil.copy(f"{db}{end}", f"{path}{end}")
    assert data("--all", db=path) == data("--all", db=db)


def test_an_older_file_is_refused_as_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    shutil.copy(Path(__file__).parent.parent / "data" / "0003.db", path)
    done = run("timeline", "--all", "-o", "-", db=path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "open it once with TaskStore to upgrade it" in done.stderr
