"""What is asked of live owners from outside, and decided for dead ones: cancel, signal and abandon, and how they end."""

from __future__ import annotations

import asyncio
import json
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import EventType, Recovery, StaleAttempt, TaskContext, TaskHandle, TaskState, TaskStore, copies, migrate
from tests.acceptance import programs
from tests.acceptance.commands import HOSTILE, Done, assert_harmless, run
from tests.acceptance.processes import Worker
from tests.runtime.support import check_file, next_event, rows

S1 = "desktop:s1"


@pytest.fixture(scope="session")
def newborn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with nothing in it."""
    made = tmp_path_factory.mktemp("newborn") / "agent.db"
    migrate.prepare(made)
    return made


class Bodies:
    """What the owner's tasks do."""

    def __init__(self, store: TaskStore) -> None:
        self.store = store
        self.refused: list[str] = []
        for body in (self.stay, self.stubborn, self.listen, self.winning):
            setattr(self, body.__name__, store.task(recovery=Recovery.RERUN, name=body.__name__)(_bound(body)))

    async def stay(self, task: TaskContext) -> None:
        await task.progress("has begun")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if task.stop_reason == "stale":
                try:
                    await task.save("too late")
                except StaleAttempt as error:
                    self.refused.append(type(error).__name__)
            raise

    async def stubborn(self, task: TaskContext) -> str:
        await task.progress("has begun")
        while not self.let_go.is_set():
            try:
                await self.let_go.wait()
            except asyncio.CancelledError:
                continue
        return "at last"

    async def listen(self, task: TaskContext) -> Any:
        await task.progress("has begun")
        return [await task.signal("go"), await task.signal("go")]

    async def winning(self, task: TaskContext) -> str:
        await task.progress("has begun")
        await task.cancelled()
        return "was quicker"

    async def spawn(self, body: str, task_id: str, **options: Any) -> TaskHandle:
        """Start a task and return it once it is at work."""
        session = await self.store.session("s1")
        handle = await session.spawn(getattr(self, body), id=task_id, **options)
        await next_event(self.store, EventType.PROGRESS, task_id=task_id)
        return handle

    let_go: asyncio.Event


def _bound(method: Callable[..., Any]) -> Callable[..., Any]:
    async def body(task: TaskContext) -> Any:
        return await method(task)

    return body


@pytest.fixture
async def owner(path: Path, newborn: Path) -> AsyncIterator[Bodies]:
    """A live owner of the file, in this process."""
    shutil.copy(newborn, path)
    store = TaskStore(path, runtime="desktop", cancel_grace=0.01)
    bodies = Bodies(store)
    bodies.let_go = asyncio.Event()
    async with store:
        yield bodies
        bodies.let_go.set()


async def ask(*arguments: str, db: Path) -> Done:
    """Run a command on a thread of its own, with the owner's loop going on; what it prints is fit for a terminal."""
    done = await asyncio.to_thread(run, *arguments, db=db)
    assert_harmless(done.stdout + done.stderr)
    return done


async def told(*arguments: str, db: Path) -> tuple[int, dict[str, Any]]:
    done = await ask(*arguments, "--json", db=db)
    assert done.stdout.isascii()
    return done.returncode, json.loads(done.stdout)


# --- cancel ----------------------------------------------------------------------------------------------------------


async def test_cancel_asks_the_live_owner_and_comes_back_when_the_body_has_stopped(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("stay", "index")

    done = await ask("cancel", S1, "index", "--reason", f"wrong folder {HOSTILE}", db=path)

    assert (done.returncode, done.stdout, done.stderr) == (0, f"#{task.task_seq} {S1} index cancelled\n", "")
    record = await task.record()
    assert (record.state, record.cancel_reason) == (TaskState.CANCELLED, f"wrong folder {HOSTILE}")


async def test_cancel_says_with_its_exit_code_that_a_body_has_not_stopped_in_time(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("stubborn", "index")

    done = await ask("cancel", "index", "--timeout", "0.05", db=path)

    assert (done.returncode, done.stdout) == (3, f"#{task.task_seq} {S1} index cancel_requested\n")
    assert done.stderr == "lash-store: it was asked to stop, and has not within 0.05 s\n"
    # asked again, it only waits, here for nothing
    status, again = await told("cancel", f"#{task.task_seq}", "--timeout", "0", db=path)
    assert (status, again["state"], again["task_seq"]) == (3, "cancel_requested", task.task_seq)
    requested = [event for event in rows(path, "SELECT type FROM events") if event["type"] == "cancel_requested"]
    assert len(requested) == 1
    owner.let_go.set()
    assert (await task.wait(10)).state is TaskState.COMPLETED


async def test_a_body_that_ends_first_has_won_and_a_cancel_after_the_end_changes_nothing(
    owner: Bodies, path: Path
) -> None:
    task = await owner.spawn("winning", "index")

    assert (await told("cancel", "index", db=path))[1]["state"] == "completed"
    before = rows(path, "SELECT * FROM events")
    status, again = await told("cancel", "index", "--reason", "again", db=path)

    assert (status, again["state"], again["result"]) == (0, "completed", "was quicker")
    assert rows(path, "SELECT * FROM events") == before
    assert (await task.record()).cancel_reason is None


async def test_cancel_takes_what_descends_with_it(owner: Bodies, path: Path) -> None:
    await owner.spawn("stay", "parent")
    child = await owner.spawn("stay", "child", parent="parent")

    assert (await ask("cancel", "parent", db=path)).returncode == 0

    assert (await child.wait(10)).state is TaskState.CANCELLED


async def test_a_number_means_that_incarnation_and_not_who_has_its_id_now(owner: Bodies, path: Path) -> None:
    first = await owner.spawn("winning", "index")
    await first.cancel()
    session = await owner.store.session("s1")
    second = await session.spawn(owner.listen, id="index")

    for scope in ([], [S1]):
        assert (await told("cancel", *scope, f"#{first.task_seq}", db=path))[1]["state"] == "completed"
        status, sent = await told("signal", *scope, f"#{first.task_seq}", "go", db=path)
        assert (status, sent["task_seq"], sent["verdict"]) == (1, first.task_seq, "superseded")
        given_up = (await told("abandon", *scope, f"#{first.task_seq}", "--reason", "old", db=path))[1]
        assert (given_up["state"], given_up["task_seq"]) == ("completed", first.task_seq)

    assert rows(path, "SELECT * FROM signals") == []
    assert (await second.record()).attempt == 1
    assert (await ask("cancel", "index", db=path)).stdout == f"#{second.task_seq} {S1} index cancelled\n"


@pytest.mark.parametrize(
    "command", [["cancel"], ["signal", "go"], ["abandon", "--reason", "none"]], ids=["cancel", "signal", "abandon"]
)
async def test_what_is_not_there_or_not_one_is_said_in_one_line(owner: Bodies, path: Path, command: list[str]) -> None:
    await owner.spawn("stay", "twice")
    await (await owner.store.session("s2")).spawn(owner.stay, id="twice")
    verb, *rest = command

    for names, status, part in (
        (["nobody"], 1, "no task 'nobody' in this file: see lash-store list --all"),
        (["#99"], 1, "no task '#99' in this file"),
        (["\x1b[2J"], 1, r"no task '\x1b[2J' in this file"),
        (["\udcff"], 1, r"no task '\udcff' in this file"),
        (["twice"], 1, "task id 'twice' is in 2 sessions: name one first: desktop:s1, desktop:s2"),
        (["desktop:s9", "twice"], 1, "no session 'desktop:s9' in this file: it has desktop:s1, desktop:s2"),
        ([S1, "nobody"], 1, f"no task 'nobody' in session '{S1}'"),
        (["s1", "twice"], 2, "'s1'"),
        ([S1, "twice", "more", "and more"], 2, "takes"),
    ):
        done = await ask(verb, *names, *rest, db=path)
        assert (done.returncode, done.stdout) == (status, ""), names
        assert part.replace("'", "").lower() in done.stderr.replace("'", "").replace("\\\\", "\\").lower(), names
        assert "Traceback" not in done.stderr

    assert (await (await owner.store.session("s1")).get("twice")).state is TaskState.RUNNING


async def test_what_was_pruned_is_said_to_be(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("winning", "index")
    await task.cancel()
    assert await task.result() == "was quicker"
    assert (await owner.store.prune()).tasks == 1

    number = f"#{task.task_seq}"
    for verb in ("cancel", "show", "tree"):
        for names in ([S1, "index"], [S1, number], ["index"], [number]):
            done = await ask(verb, *names, db=path)

            assert (done.returncode, done.stdout) == (1, ""), (verb, names)
            assert f"task 'index' of session '{S1}' completed" in done.stderr
            assert "was pruned at" in done.stderr
        done = await ask(verb, "#99", db=path)
        assert "#99" in done.stderr
        assert "pruned" not in done.stderr


async def test_a_reason_that_cannot_be_stored_asks_for_nothing(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("stay", "index")

    for command in (["cancel", "index"], ["abandon", "index"]):
        done = await ask(*command, "--reason", "not UTF-8: \udcff", db=path)
        assert (done.returncode, done.stdout) == (2, "")
        assert "characters that no file holds" in done.stderr

    assert (await task.record()).state is TaskState.RUNNING


# --- signal ----------------------------------------------------------------------------------------------------------


async def test_signals_reach_a_body_that_waits_and_one_that_will(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("listen", "deploy")

    first = await ask("signal", S1, "deploy", "go", "--data", json.dumps({"by": HOSTILE}), db=path)
    second = await ask("signal", f"#{task.task_seq}", "go", db=path)

    assert first.stdout.splitlines()[0] == "signal 'go' was sent"
    assert (first.returncode, second.returncode) == (0, 0)
    assert await task.result(10) == [{"by": HOSTILE}, None]


async def test_a_signal_of_another_name_waits_for_whoever_asks_for_it(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("listen", "deploy")

    status, sent = await told("signal", "deploy", "come", db=path)

    assert (status, sent["verdict"], sent["id"]) == (0, "applied", "deploy")
    assert rows(path, "SELECT name, payload, taken_at FROM signals") == [
        {"name": "come", "payload": "null", "taken_at": None}
    ]
    assert not (await task.record()).state.is_terminal


async def test_a_key_sends_once_and_not_something_else(owner: Bodies, path: Path) -> None:
    await owner.spawn("stay", "deploy")

    sent = [await ask("signal", "deploy", "go", "--key", "k", "--data", "1", db=path) for _ in range(2)]
    other = await ask("signal", "deploy", "go", "--key", "k", "--data", "2", db=path)

    assert [one.returncode for one in sent] == [0, 0]
    assert "had been sent with that key before: nothing was changed" in sent[1].stdout
    assert (other.returncode, other.stdout, other.stderr.count("\n")) == (1, "", 1)
    assert [row["payload"] for row in rows(path, "SELECT payload FROM signals")] == ["1"]


@pytest.mark.parametrize(
    ("data", "status", "part"),
    [
        ("yes", 2, """text needs quotes of its own: '"yes"'"""),
        ("", 2, "not JSON"),
        ("{'a': 1}", 2, "not JSON"),
        ("[" * 100_000, 2, "not JSON"),
        ("NaN", 1, "signal 'go'"),
        ('"\\ud800"', 1, "signal 'go'"),
    ],
    ids=["word", "nothing", "python", "deep", "nan", "surrogate"],
)
async def test_data_that_is_no_json_or_cannot_be_stored_is_refused(
    owner: Bodies, path: Path, data: str, status: int, part: str
) -> None:
    await owner.spawn("stay", "deploy")

    done = await ask("signal", "deploy", "go", "--data", data, db=path)

    assert (done.returncode, done.stdout) == (status, "")
    assert part in done.stderr
    assert rows(path, "SELECT * FROM signals") == []


async def test_a_signal_to_what_has_ended_is_not_sent_and_the_exit_code_says_so(owner: Bodies, path: Path) -> None:
    await (await owner.spawn("stay", "deploy")).cancel()

    done = await ask("signal", "deploy", "go", db=path)

    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "the task has ended: signal 'go' was not sent")
    assert rows(path, "SELECT * FROM signals") == []


# --- abandon ---------------------------------------------------------------------------------------------------------


async def test_abandon_fences_a_body_out_and_frees_what_may_be_run_again(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("stay", "index")

    status, given_up = await told("abandon", S1, "index", "--reason", "hangs in a driver", db=path)

    assert (status, given_up["state"], given_up["task_seq"]) == (0, "pending", task.task_seq)
    # and somebody takes it: here the owner itself
    started = await next_event(owner.store, EventType.REATTACHED, task_id="index")
    assert (started.attempt or 0) > 1
    assert await asyncio.wait_for(_until(lambda: owner.refused), 10) == ["StaleAttempt"]
    assert (await ask("cancel", "index", db=path)).returncode == 0
    before = rows(path, "SELECT * FROM events")
    assert (await told("abandon", "index", "--reason", "again", db=path))[1]["state"] == "cancelled"
    assert rows(path, "SELECT * FROM events") == before


async def _until(question: Callable[[], Any]) -> Any:
    while not (answer := question()):
        await asyncio.sleep(0.005)
    return answer


async def test_what_may_not_be_run_again_is_abandoned_with_the_reason(owner: Bodies, path: Path) -> None:
    session = await owner.store.session("s1")
    task = await session.spawn(asyncio.Event().wait(), id="once")
    await next_event(owner.store, EventType.STARTED, task_id="once")

    done = await ask("abandon", "once", "--reason", HOSTILE, db=path)

    assert (done.returncode, done.stdout) == (0, f"#{task.task_seq} {S1} once abandoned\n")
    evidence = (await task.record()).evidence
    assert evidence is not None
    assert evidence.reason == HOSTILE


@pytest.mark.long
def test_all_work_of_an_owner_that_is_stopped_is_given_up_and_it_writes_nothing_any_more(
    start: Callable[..., Worker], path: Path
) -> None:
    tasks = [["count", "again", {}, [10**9]], ["once", "once", {}, []]]
    worker = start(programs.spawn_and_stay, str(path), tasks, {})
    worker.wait_for("saved", "again")
    worker.wait_for("body", "once")
    worker.stop()
    [owner] = rows(path, "SELECT owner_id FROM owners WHERE ended_at IS NULL")
    command = ["abandon", "--owner", str(owner["owner_id"]), "--reason", "stopped in a debugger"]

    done = run(*command, db=path)
    again = run(*command, "--json", db=path)

    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == f"owner {owner['owner_id']} was given up: 1 task abandoned, 1 free"
    assert sorted(line.split()[-2:] for line in lines[:-1]) == [["again", "pending"], ["once", "abandoned"]]
    assert json.loads(again.stdout)["abandoned"] == []
    state = rows(path, "SELECT * FROM tasks")
    worker.signal(18)
    worker.wait_for("refused", "again")
    worker.kill()
    assert rows(path, "SELECT * FROM tasks") == state


def test_work_of_a_dead_owner_is_ended_or_freed_without_anyone_to_ask(start: Callable[..., Worker], path: Path) -> None:
    tasks = [[name, task_id, {}, []] for name, task_id in (("forever", "a"), ("forever", "b"), ("once", "c"))]
    worker = start(programs.spawn_and_stay, str(path), tasks, {})
    worker.wait_for("ready")
    worker.kill()
    [owner] = rows(path, "SELECT owner_id FROM owners")

    assert run("cancel", "a", db=path).stdout.endswith("a cancelled\n")
    signalled = run("signal", "b", "go", db=path)
    assert (signalled.returncode, rows(path, "SELECT count(*) AS n FROM signals")[0]["n"]) == (0, 1)
    assert run("abandon", "c", "--reason", "it is gone", db=path).stdout.endswith("c abandoned\n")
    assert run("abandon", "--owner", str(owner["owner_id"]), "--reason", "gone", db=path).returncode == 0
    assert {row["id"]: row["state"] for row in rows(path, "SELECT id, state FROM tasks")} == {
        "a": "cancelled",
        "b": "pending",
        "c": "abandoned",
    }


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["--owner", "99", "--reason", "r"], 1, "99"),
        (["--owner", str(10**30), "--reason", "r"], 1, "an owner's id is a number"),
        (["--owner", "0", "--reason", "r"], 2, "0"),
        (["--owner", "1", "index", "--reason", "r"], 2, "or --owner N"),
        (["--reason", "r"], 2, "or --owner N"),
        (["index"], 2, "--reason"),
    ],
)
async def test_abandon_wants_one_thing_and_a_reason(
    owner: Bodies, path: Path, arguments: list[str], status: int, part: str
) -> None:
    before = rows(path, "SELECT * FROM owners")

    done = await ask("abandon", *arguments, db=path)

    assert (done.returncode, done.stdout) == (status, "")
    assert part in done.stderr
    assert rows(path, "SELECT * FROM owners") == before


# --- copies ----------------------------------------------------------------------------------------------------------


async def test_what_is_asked_of_a_copy_does_not_reach_the_original(owner: Bodies, path: Path) -> None:
    task = await owner.spawn("stay", "index")
    stamped = copies.back_up(path, path.with_name("backup.db")).path
    plain = path.with_name("plain.db")
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(plain)) as target:
        source.backup(target)
    before = rows(path, "SELECT * FROM events")

    for copy in (stamped, plain):
        # nobody may say that its owner is dead, and nobody is there to stop it
        assert (await ask("cancel", "index", "--timeout", "0", db=copy)).returncode == 3
        assert (await ask("signal", "index", "go", db=copy)).returncode == 0
        assert (await ask("abandon", "index", "--reason", "of a copy", db=copy)).returncode == 0
        check_file(copy)

    assert rows(path, "SELECT * FROM events") == before
    assert (await task.record()).state is TaskState.RUNNING


def test_a_stopped_file_is_asked_like_any_other_and_needs_no_owner(path: Path, newborn: Path) -> None:
    shutil.copy(newborn, path)

    async def work() -> None:
        async with _opened(path) as bodies:
            await bodies.spawn("listen", "index")

    asyncio.run(work())
    copied = Path(shutil.copy(path, path.with_name("copied.db")))

    for file in (path, copied):
        assert run("signal", "index", "go", "--data", "1", db=file).returncode == 0
        done = run("cancel", "index", "--reason", "nobody runs it", db=file)
        assert (done.returncode, done.stdout.split()[-1]) == (0, "cancelled")
        check_file(file)


@asynccontextmanager
async def _opened(path: Path) -> AsyncIterator[Bodies]:
    store = TaskStore(path, runtime="desktop", cancel_grace=0.01)
    bodies = Bodies(store)
    bodies.let_go = asyncio.Event()
    async with store:
        yield bodies


@pytest.mark.parametrize("command", ["cancel", "signal", "abandon"])
def test_help_teaches_by_examples_and_a_file_that_is_not_there_is_not_made(tmp_path: Path, command: str) -> None:
    shown = run(command, "--help").stdout
    assert f"Examples:\n    lash-store {command} --db agent.db" in shown
    rest = {"cancel": ["x"], "signal": ["x", "go"], "abandon": ["x", "--reason", "r"]}[command]

    done = run(command, *rest, db=tmp_path / "typo.db")

    assert (done.returncode, done.stderr) == (1, f"lash-store: {tmp_path}/typo.db does not exist: check the path\n")
    assert run(command, *rest).returncode == 2
    assert not list(tmp_path.iterdir())
