"""A file's contents as JSON Lines: all of it, from one state, fit for any reader, in bounded memory."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import TaskStore, copies, migrate, schema
from lash_store.cli import export
from tests.acceptance import agent_file
from tests.acceptance.commands import HOSTILE, Done, run
from tests.runtime.support import everything, rows

DATA = Path(__file__).parents[1] / "data"
S1 = "desktop:s1"
TABLE = {record: table for record, (table, _) in export._TABLES.items()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stopped file in which an agent worked; hostile text is in it, and a pruned task."""
    path = tmp_path_factory.mktemp("made") / "agent.db"
    asyncio.run(agent_file.make(path))

    async def more() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            one, two = await store.session("s1"), await store.session("s2")
            await one.spawn(asyncio.Event().wait(), id="moves")
            await one.handoff(two, ["moves"])
            await (await two.spawn(_soon(), id="short")).result()
            assert (await store.prune(sessions=[two.scope], states=["completed"])).tasks == 1

    asyncio.run(more())
    return path


async def _soon() -> str:
    return "done"


@pytest.fixture
def db(made: Path, tmp_path: Path) -> Path:
    """A copy of that, to be changed."""
    return Path(shutil.copy(made, tmp_path / "agent.db"))


def lines(done: Done) -> list[dict[str, Any]]:
    """Read what was printed as a strict reader does: no NaN, nothing that is not ASCII, one object a line."""
    assert (done.returncode, done.stderr) == (0, "")
    return parsed(done.stdout)


def parsed(output: str) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    assert output.endswith("\n")
    assert all(line.isascii() and line.isprintable() for line in output.split("\n"))
    found = [json.loads(line, parse_constant=refuse) for line in output.splitlines()]
    assert found[0]["record"] == "store"
    return found


def by_table(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in found[1:]:
        row = dict(row)
        tables.setdefault(TABLE[row.pop("record")], []).append(row)
    return tables


def decoded(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            name: json.loads(value) if name in export._JSON and value is not None else value
            for name, value in row.items()
        }
        for row in table
    ]


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_every_row_of_every_table_is_a_line_with_its_json_as_json(made: Path) -> None:
    found = lines(run("export", db=made))

    tables = everything(made)
    assert set(TABLE.values()) == schema.metadata.tables.keys()
    wanted = {name: decoded(tables[name]) for name in TABLE.values() if tables[name]}
    got = by_table(found)
    assert got.keys() == wanted.keys()
    for name, table in wanted.items():
        # the file's own order of rows is another where the key is not a number
        assert sorted(got[name], key=repr) == sorted(table, key=repr), name
    assert {"tasks", "events", "handles", "signals", "steps", "inbox", "monitors", "updates", "handoffs"} <= got.keys()
    assert (found[0]["revision"], found[0].keys()) == (schema.HEAD, {"record", "revision", "exported_at"})
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found[0]["exported_at"])
    assert [row["seq"] for row in got["events"]] == sorted(row["seq"] for row in got["events"])


def test_json_columns_are_those_that_the_schema_holds_to_be_json() -> None:
    sql = " ".join(schema.create_statements())
    assert set(re.findall(r"json_valid\((\w+)\)", sql)) == export._JSON


def test_hostile_text_is_escaped_and_comes_back_whole(made: Path) -> None:
    done = run("export", "--only", "task", db=made)

    assert "\x1b" not in done.stdout
    [bad] = [row for row in lines(done) if row.get("id") == "bad"]
    assert bad["failure"]["message"] == HOSTILE


def test_what_a_hand_made_unfit_for_json_is_the_text_it_is(db: Path) -> None:
    unfit = {
        "no json": "no json",
        "1e999": "1e999",
        "[NaN]": "[NaN]",
        "[" * 50_000 + "]" * 50_000: "[" * 50_000 + "]" * 50_000,
        "[" * 900 + "]" * 900: None,
        "9" * 5000: "9" * 5000,
        "[1e999, 1]": "[1e999, 1]",
        '"\\ud800"': "\ud800",
        "null": None,
    }
    with closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON").fetchall()
        connection.execute("DROP TRIGGER tasks_terminal_is_final")
        connection.execute("UPDATE tasks SET fraction = 9e999, label = CAST(x'ff00411b' AS TEXT) WHERE task_seq = 2")
        for text in unfit:
            connection.execute("UPDATE tasks SET result = ? WHERE task_seq = 1", (text,))
            [first, second, *_] = lines(run("export", "--only", "task", db=db))[1:]
            assert (first["task_seq"], second["fraction"], second["label"]) == (1, "inf", "\ufffd\0A\x1b")
            if len(text) != 1800:
                assert first["result"] == unfit[text]


# --- some of it ------------------------------------------------------------------------------------------------------


def test_a_column_that_somebody_had_generated_is_written_too(db: Path) -> None:
    with closing(sqlite3.connect(db)) as hand, hand:
        hand.execute("ALTER TABLE tasks ADD COLUMN short TEXT AS (substr(id, 1, 1))")

    tasks = [line for line in lines(run("export", db=db)) if line["record"] == "task"]

    assert tasks
    assert [task["short"] for task in tasks] == [task["id"][0] for task in tasks]


def test_only_some_records_are_written_each_once(made: Path) -> None:
    found = lines(run("export", "--only", "task", "--only", "session", "--only", "task", db=made))

    assert [row["record"] for row in found if row["record"] == "session"] == ["session"] * 4
    tasks = [row["task_seq"] for row in found if row["record"] == "task"]
    assert tasks == sorted(set(tasks))
    assert {row["record"] for row in found} == {"store", "session", "task"}
    refused = run("export", "--only", "tasks", db=made)
    assert (refused.returncode, "'tasks' is not one of" in refused.stderr) == (2, True)


def test_a_session_is_all_that_belongs_to_it_and_nothing_else(made: Path) -> None:
    got = by_table(lines(run("export", "--session", S1, db=made)))

    ours = {row["task_seq"] for row in rows(made, "SELECT task_seq FROM tasks WHERE scope = ?", S1)}
    assert {row["task_seq"] for row in got["tasks"]} == ours
    assert [row["scope"] for row in got["sessions"]] == [S1]
    for table in ("steps", "signals", "monitors", "updates"):
        assert {row["task_seq"] for row in got[table]} <= ours
    assert {row["task_seq"] for row in got["signals"]} == {3}
    for table in ("handles", "inbox", "monitors", "updates"):
        assert {row["scope"] for row in got[table]} == {S1}
    moved = [row for row in got["events"] if row["scope"] != S1]
    assert [(row["type"], row["from_scope"]) for row in moved] == [("transferred", S1), ("handed_off", S1)]
    assert len(got["handoffs"]) == 1
    assert {row["owner_id"] for row in got["owners"]} <= {1, 2}
    elsewhere = by_table(lines(run("export", "--session", "desktop:s3", db=made)))
    assert elsewhere.keys() == {"sessions", "events"}


def test_a_wrong_session_prints_nothing(made: Path) -> None:
    for name, status in (("desktop:nowhere", 1), ("s1", 2), ("desktop:\udcff", 2), ("desktop:\x1b[2J", 2)):
        done = run("export", "--session", name, db=made)
        assert (done.returncode, done.stdout) == (status, ""), name
        assert "\x1b" not in done.stderr


# --- where to --------------------------------------------------------------------------------------------------------


def test_an_export_to_a_file_is_its_owners_alone(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "agent.jsonl"

    done = run("export", "-o", target, db=made)

    written = target.read_text()
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{target}: {len(written.splitlines())} lines\n"
    assert by_table(parsed(written)) == by_table(lines(run("export", db=made)))
    assert target.stat().st_mode & 0o777 == 0o600
    # again: a file of yesterday is written over, and what it said of others no longer holds
    target.chmod(0o644)
    assert run("export", "-o", target, "--only", "session", db=made).returncode == 0
    assert len(target.read_text().splitlines()) == 5
    assert target.stat().st_mode & 0o777 == 0o600


def test_an_export_never_writes_over_the_store_itself(db: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(db)
    (tmp_path / "x").mkdir()
    before = db.read_bytes()

    for target in (db, f"{db}-wal", f"{db}-shm", link, tmp_path / "." / db.name, tmp_path / "x" / ".." / db.name):
        done = run("export", "-o", target, db=db)
        assert (done.returncode, done.stdout) == (2, ""), target
        assert "is the store's own file" in done.stderr

    assert db.read_bytes() == before


@pytest.mark.parametrize("what", ["missing", "text", "header", "newer"])
def test_a_file_that_cannot_be_read_writes_nothing_over(db: Path, tmp_path: Path, what: str) -> None:
    target = tmp_path / "yesterday.jsonl"
    target.write_text("precious")
    match what:
        case "missing":
            db.unlink()
        case "text":
            db.write_text("dear diary")
        case "header":
            db.write_bytes(b"\xff" * 100 + db.read_bytes()[100:])
        case _:
            with closing(sqlite3.connect(db)) as connection, connection:
                connection.execute(f"UPDATE {schema.VERSION_TABLE} SET version_num = '9999'")

    done = run("export", "-o", target, db=db)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert target.read_text() == "precious"


def test_a_folder_that_is_not_there_or_a_full_disk_is_said_in_one_line(made: Path, tmp_path: Path) -> None:
    for target in (tmp_path / "nowhere" / "x.jsonl", Path("/dev/full")):
        done = run("export", "-o", target, db=made)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)


# --- which file ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", sorted(file.stem for file in DATA.glob("*.db")))
def test_a_file_of_an_older_revision_is_exported_as_it_is(tmp_path: Path, revision: str) -> None:
    path = Path(shutil.copy(DATA / f"{revision}.db", tmp_path / "agent.db"))

    found = lines(run("export", db=path))

    tables = everything(path)
    assert found[0]["revision"] == revision
    assert {name: len(table) for name, table in by_table(found).items()} == {
        name: len(table) for name, table in tables.items() if table and name in TABLE.values()
    }


def test_a_file_without_tables_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "agent.db"
    migrate.upgrade(path)
    migrate.downgrade(path, "base")
    assert [row["revision"] for row in lines(run("export", db=path))] == [None]
    assert run("export", "--session", S1, db=path).returncode == 1


async def test_a_live_file_and_its_copies_say_the_same(tmp_path: Path) -> None:
    live, plain = tmp_path / "live.db", tmp_path / "plain.db"
    async with TaskStore(live, runtime="desktop") as store:
        await agent_file.fill(store)
        stamped = copies.back_up(live, tmp_path / "stamped.db").path
        with closing(sqlite3.connect(live)) as source, closing(sqlite3.connect(plain)) as target:
            source.backup(target)
        wanted = lines(await asyncio.to_thread(run, "export", db=live))[1:]
        for copy in (stamped, plain):
            assert lines(run("export", db=copy))[1:] == wanted


def test_what_is_written_meanwhile_is_wholly_in_or_wholly_not(tmp_path: Path) -> None:
    """Each task is written with its handle and its first events in one transaction, session after session."""
    path = tmp_path / "agent.db"
    stop, begun = threading.Event(), threading.Event()

    async def write() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            session = await store.session("s1")
            while not stop.is_set():
                await (await session.spawn(_soon())).wait()
                begun.set()

    writer = threading.Thread(target=asyncio.run, args=(write(),))
    writer.start()
    try:
        assert begun.wait(20)
        counts = []
        for _ in range(8):
            begun.clear()
            got = by_table(lines(run("export", db=path)))
            tasks = {row["task_seq"]: row for row in got["tasks"]}
            assert {row["task_seq"] for row in got["handles"]} == tasks.keys()
            assert {row["task_seq"] for row in got["events"] if row["type"] == "registered"} == tasks.keys()
            ended = {row["task_seq"] for row in got["events"] if row["type"] == "completed"}
            assert ended == {seq for seq, row in tasks.items() if row["state"] == "completed"}
            counts.append(len(tasks))
            assert begun.wait(20)
    finally:
        stop.set()
        writer.join(20)
    assert counts[0] < counts[-1]


# --- much of it ------------------------------------------------------------------------------------------------------


def _with_many(path: Path, count: int, size: int = 50) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.execute(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?) "
            "INSERT INTO events SELECT NULL, NULL, 'desktop:s1', NULL, NULL, NULL, 'noted', "
            "'2026-01-01T00:00:00.000Z', json_object('text', hex(randomblob(?))) FROM n",
            (count, size),
        )
        connection.execute("COMMIT")


PROGRAM = "import sys; from lash_store.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.long
@pytest.mark.parametrize(("number", "each"), [(20_000, 1_000), pytest.param(100_000, 200, marks=pytest.mark.slow)])
def test_many_rows_stream_in_bounded_memory(db: Path, number: int, each: int) -> None:
    _with_many(db, number, each)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({64 << 20}, {64 << 20})); {PROGRAM}"

    command = [sys.executable, "-c", limited, "export", "--db", str(db)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=1 << 16) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        count = size = 0
        for line in process.stdout:
            count, size = count + 1, size + len(line)
        errors = process.stderr.read()

    assert (process.returncode, errors) == (0, b"")
    assert count > number
    assert size > 2 * number * each


def test_a_reader_that_goes_away_ends_it_quietly(db: Path) -> None:
    _with_many(db, 20_000)
    command = [sys.executable, "-c", PROGRAM, "export", "--db", str(db)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["record"] == "store"
        process.stdout.close()
        errors = process.stderr.read()

    assert (process.returncode, errors) == (141, b"")


def test_help_teaches_by_examples() -> None:
    shown = run("export", "--help").stdout
    assert "Examples:\n    lash-store export --db agent.db -o agent.jsonl" in shown
    assert all(record in shown for record in TABLE)
    assert run("export").returncode == 2
    assert os.environ.get("LASH_STORE_DB") is None
