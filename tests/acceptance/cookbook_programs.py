"""The run that the cook-book is asked about: a closed owner, a killed one, and one that stays until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lash_store import Backoff, EventType, MonitorSpec, Recovery, TaskContext, TaskKind, TaskState, TaskStore
from tests.acceptance.processes import Report, Worker, workers
from tests.runtime.support import rows

RUNTIME = "desktop"
SLOW = 0.3
"""Seconds, at least, that the slowest observer takes."""
BIG = 20_000
"""Bytes of the text that is handed to a task of ``s6``, and that comes back as its result."""


def store_of(path: str, say: Callable[..., None], *, everything: bool) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store with the functions of this run, or with all but one, as after a change of the program."""
    store = TaskStore(path, runtime=RUNTIME, cancel_grace=0.05)
    at_once = Backoff(initial=0.0, jitter=0.0)

    @store.task(recovery=Recovery.RERUN)
    async def index_repo(task: TaskContext, folder: str) -> dict[str, int]:
        """Go on from a checkpoint; the first attempt stays until it is killed."""
        files: Any = await task.step("list files", lambda: ["a.py", "b.py", "c.py"])
        if task.checkpoint is None:
            await task.progress("1 of 3", 1 / 3)
            await task.save({"done": 1})
            say("halfway", task.id)
            await asyncio.Event().wait()
        await task.sleep(0.01)
        return {"files": len(files)}

    @store.task(recovery=Recovery.RERUN)
    async def stay(task: TaskContext) -> None:
        say("runs", task.id)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def run_crew(task: TaskContext) -> None:
        await task.spawn(stay, id=f"{task.id}-1")
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN, max_attempts=1)
    async def try_once(task: TaskContext) -> None:
        say("runs", task.id)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def deploy(task: TaskContext) -> None:
        say("runs", task.id)
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)
    async def stubborn(task: TaskContext) -> None:
        say("runs", task.id)
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN, retry_on=(ConnectionError, TimeoutError), max_attempts=3, backoff=at_once)
    async def fetch(task: TaskContext, fail: list[str]) -> int:
        """Fail with the n-th error in the n-th attempt, then succeed."""
        errors = {"ConnectionError": ConnectionError, "TimeoutError": TimeoutError}
        if task.attempt <= len(fail):
            raise errors[fail[task.attempt - 1]](f"attempt {task.attempt}")
        return task.attempt

    @store.task(recovery=Recovery.RERUN, retry_on=OSError, backoff=Backoff(initial=3600.0, jitter=0.0))
    async def sync_later(task: TaskContext) -> None:
        raise OSError("the server is away")

    @store.task(recovery=Recovery.RERUN)
    async def explode(task: TaskContext, message: str) -> None:
        raise ValueError(message)

    @store.task(recovery=Recovery.RERUN)
    async def ask(task: TaskContext, after: str | None = None) -> Any:
        """Receive a signal that is remembered, if there is to be one, then an answer."""

        async def hear() -> Any:
            return await task.signal(str(after))

        if after is not None:
            await task.step("hear", hear)
        async with task.waiting("an answer"):
            return await task.signal("answer")

    @store.task(recovery=Recovery.RERUN)
    async def sleep(task: TaskContext) -> None:
        await task.sleep(3600.0, name="an hour")

    @store.task(recovery=Recovery.RERUN)
    async def talk(task: TaskContext, words: list[str]) -> None:
        for word in words:
            await task.notify(word)

    @store.task(recovery=Recovery.RERUN)
    async def look(task: TaskContext, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @store.task(recovery=Recovery.RERUN)
    async def echo(task: TaskContext, text: str) -> str:
        return text

    found = (
        index_repo,
        stay,
        run_crew,
        try_once,
        deploy,
        stubborn,
        fetch,
        sync_later,
        explode,
        ask,
        sleep,
        talk,
        look,
        echo,
    )
    functions = {fn.__name__: fn for fn in found}
    if everything:

        @store.task(recovery=Recovery.RERUN)
        async def retired(task: TaskContext) -> None:
            say("runs", task.id)
            await asyncio.Event().wait()

        functions["retired"] = retired
    return store, functions


async def close_cleanly(path: str) -> None:
    """Open the file first, do a little, and close it with a task that goes on later."""
    store, do = store_of(path, lambda *words: None, everything=True)
    async with store:
        session = await store.session("s1")
        await (await session.spawn(do["echo"], "hello", id="hello"))
        await session.spawn(do["stay"], id="overnight")
        await _until(store, EventType.STARTED, "overnight")


async def be_killed(report: Report, path: str) -> None:
    """Have work of every kind under way, say so, and stay until killed."""
    store, do = store_of(path, report, everything=True)
    async with store:
        session = await store.session("s1")
        await session.register("ci-run", TaskKind.OTHER, label="the build")
        await session.start_monitor(MonitorSpec(id="tail", command=["sleep", "1000"], timeout=None))
        for function, task_id in (
            ("deploy", "deploy"),
            ("try_once", "tired"),
            ("stubborn", "doomed"),
            ("retired", "old-code"),
        ):
            await session.spawn(do[function], id=task_id)
            await _until(store, EventType.STARTED, task_id)
        await session.spawn(do["index_repo"], "/src", id="index", kind=TaskKind.OBSERVER)
        await _until(store, EventType.SAVED, "index", times=2)
        await _until(store, EventType.STATE_CHANGED, "monitor:tail")
        await session.cancel("doomed", "the user pressed stop", timeout=0)
        report("ready")
        await asyncio.Event().wait()


async def stay_on(report: Report, path: str) -> None:
    """Recover what the killed owner left, do work of every kind, say so, and stay with what is under way until told to end."""
    store, do = store_of(path, report, everything=False)
    async with store:
        one = await store.session("s1")
        await (await one.handle("index"))
        await _attempts(store, one, do)
        await _cancels(store, one, do)
        await _waits(store, one, do)
        await _monitors(store, one)
        await _agents(store, one, do)
        await _notes(store, do)
        await _handover(store, do)
        await (await (await store.session("s6")).spawn(do["echo"], "x" * BIG, id="big"))
        report("ready")
        await asyncio.Event().wait()


async def _attempts(store: TaskStore, one: Any, do: dict[str, Any]) -> None:
    await (await one.spawn(do["fetch"], ["ConnectionError", "TimeoutError"], id="flaky")).wait()
    await (await one.spawn(do["fetch"], ["ConnectionError"] * 3, id="hopeless")).wait()
    await (await one.spawn(do["explode"], "no such page", id="broken")).wait()
    await (await (await store.session("s3")).spawn(do["explode"], "no such book", id="broken-too")).wait()
    await one.spawn(do["sync_later"], id="later")
    await _until(store, EventType.RETRY_SCHEDULED, "later")
    await (await one.spawn(do["look"], SLOW, id="slow-look", kind=TaskKind.OBSERVER)).wait()
    await (await one.spawn(do["look"], 0.0, id="quick-look", kind=TaskKind.OBSERVER)).wait()
    await (await one.spawn_hidden("load memory", do["echo"], "loaded")).wait()
    await (await one.spawn_hidden("save memory", do["explode"], "the disk is full")).wait()


async def _cancels(store: TaskStore, one: Any, do: dict[str, Any]) -> None:
    await (await one.spawn(do["stay"], id="unneeded")).cancel("not needed any more")
    await one.spawn(do["run_crew"], id="crew", kind=TaskKind.SUBAGENT)
    await _until(store, EventType.STARTED, "crew-1")
    await one.cancel("crew", "the plan was wrong")
    await one.spawn(do["stubborn"], id="stuck")
    await _until(store, EventType.STARTED, "stuck")
    await one.cancel("stuck", "it takes too long", timeout=0)


async def _waits(store: TaskStore, one: Any, do: dict[str, Any]) -> None:
    told = await one.spawn(do["ask"], id="told")
    await told.signal("answer", {"yes": True})
    await told
    asking = await one.spawn(do["ask"], "greeting", id="asking")
    await asking.signal("greeting", "hello")
    await _until(store, EventType.STATE_CHANGED, "asking")
    await asking.signal("hint", {"try": "again"})
    await one.spawn(do["sleep"], id="asleep")
    await _until(store, EventType.SAVED, "asleep")
    await one.register("review", TaskKind.OTHER)
    await one.set_live_state("review", TaskState.WAITING)


async def _monitors(store: TaskStore, one: Any) -> None:
    for monitor_id, script in (("short", "echo one; echo two"), ("lint", "echo bad >&2; exit 3")):
        await (await one.start_monitor(MonitorSpec(id=monitor_id, command=["sh", "-c", script]))).wait()
    await one.start_monitor(MonitorSpec(id="watch", command=["sleep", "1000"], timeout=None))
    await _until(store, EventType.STATE_CHANGED, "monitor:watch")


async def _agents(store: TaskStore, one: Any, do: dict[str, Any]) -> None:
    two = await store.session("s2", parent=one)
    await one.spawn(do["stay"], id="helper", kind=TaskKind.SUBAGENT, child_session_id="s2")
    part = await two.spawn(do["stay"], id="part")
    await two.spawn(do["stay"], id="part-of-part", parent=part)
    for task_id in ("helper", "part", "part-of-part"):
        await _until(store, EventType.STARTED, task_id)


async def _notes(store: TaskStore, do: dict[str, Any]) -> None:
    three = await store.session("s3")
    await (await three.spawn(do["talk"], ["old news"], id="gossip")).wait()
    async with three.inbox() as notes:
        assert [note.text for note in notes] == ["old news"]
    await (await three.spawn(do["talk"], ["half is done", "all is done"], id="talker")).wait()
    await (await three.spawn(do["explode"], "no more", id="loud", notify_on_end=True)).wait()


async def _handover(store: TaskStore, do: dict[str, Any]) -> None:
    four, five = await store.session("s4"), await store.session("s5")
    for task_id in ("kept", "let-go"):
        await four.spawn(do["stay"], id=task_id)
        await _until(store, EventType.STARTED, task_id)
    await four.handoff(five, ["kept"], id="to-five")
    await (await four.handle("let-go")).wait()
    await four.spawn(do["stay"], id="followed")
    await _until(store, EventType.STARTED, "followed")
    await four.transfer(five, ["followed"])
    await (await five.spawn(do["echo"], "read", id="was-read"))
    await (await five.spawn(do["echo"], "unread", id="not-read")).wait()
    await five.observe("desktop:s1", "asking")


async def _until(store: TaskStore, type: EventType, task_id: str, times: int = 1) -> None:
    """Wait for the n-th event of a type that a task has."""
    async with asyncio.timeout(30):
        async for event in store.events(0, types=[type]):
            times -= event.task_id == task_id
            if times == 0:
                return


# --- the run --------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """The owner that was killed, and the one that still works on the file."""

    killed: int
    owner: Worker


@contextlib.contextmanager
def run(path: Path) -> Iterator[Run]:
    """Write the file, and let its last owner work on it until it is killed or the block is over."""
    asyncio.run(close_cleanly(str(path)))
    try:
        with workers() as start:
            killed = start(be_killed, str(path))
            killed.wait_for("ready")
            killed.kill()
            owner = start(stay_on, str(path))
            owner.wait_for("ready")
            yield Run(killed.pid, owner)
    finally:
        # a killed owner leaves the processes of its monitors to the next one, and there is none
        for row in rows(path, "SELECT json_extract(process, '$.pid') AS pid FROM tasks WHERE process IS NOT NULL"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(row["pid"], signal.SIGKILL)
