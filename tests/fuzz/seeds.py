"""Makes the files that are damaged: by a real store, with a bit of everything, closed in order or left by a killed process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from lash_store import (
    Failure,
    MonitorSpec,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskKind,
    TaskState,
    TaskStore,
)

__all__ = ["NAME", "RUNTIME", "make_all", "register"]

RUNTIME = "desktop"
NAME = "agent.db"
OLD = Path(__file__).parents[1] / "data"


def register(store: TaskStore) -> tuple[object, object]:
    """Give a store the functions that the files' tasks are of: one that ends, and one that waits for a signal."""

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, text: str, fail: bool = False) -> str:
        await task.progress(text, 0.5)
        await task.save({"at": text})
        await task.step("look", str.upper, text)
        await task.notify(text, {"said": text})
        if fail:
            raise RuntimeError(text)
        return text

    @store.task(recovery=Recovery.RERUN)
    async def wait(task: TaskContext) -> None:
        await task.sleep(0.001, name="nap")
        await task.signal("go")
        await task.progress("went")
        await task.signal("stop")

    return work, wait


async def _fill(store: TaskStore) -> SessionTasks:
    """Leave tasks in every state, and rows in every table."""
    work, wait = register(store)

    @store.task(recovery=Recovery.OWNER_BOUND)
    async def once(task: TaskContext) -> None:
        await task.signal("never")

    one, two = await store.session("s1"), await store.session("s2", parent="s1")
    await store.session("deep")
    first = await one.spawn(work, "fine", id="index", kind=TaskKind.OBSERVER, notify_on_end=True)  # type: ignore[arg-type]
    await first.wait()
    await two.observe("desktop:s1", "index")
    await (await one.spawn(work, "bad", True, id="bad")).wait()  # type: ignore[arg-type]
    pruned = await one.spawn(work, "old", id="old")  # type: ignore[arg-type]
    await pruned.result()
    await store.prune(older_than=0.0, states=[TaskState.COMPLETED])
    await (await one.spawn(work, "kept", id="kept")).wait()  # type: ignore[arg-type]
    agent = await one.spawn(wait, id="agent", kind=TaskKind.SUBAGENT, child_session_id="deep")  # type: ignore[arg-type]
    await agent.signal("go", {"way": [1, "left"]}, key="first")
    async for event in agent.events():
        if event.type == "progress":
            break
    await agent.signal("later", [1, 2])
    await one.spawn(wait, id="child", parent=agent, idempotency_key="k")  # type: ignore[arg-type]
    given_up = await one.spawn(once, id="given up")
    while (await given_up.record()).attempt == 0:
        await asyncio.sleep(0.002)
    await one.abandon(given_up, "stuck")
    away = await one.spawn(wait, id="away")  # type: ignore[arg-type]
    await one.cancel(away, "no more", timeout=5)
    await one.register("browser", TaskKind.MONITOR, label="the browser")
    await one.register("terminal", TaskKind.OTHER, label="the terminal")
    await one.complete("terminal", TaskState.FAILED, failure=Failure(type="Exit", message="1"))
    await one.update("browser", progress="loading", fraction=0.25)
    hidden = await one.spawn_hidden("quiet", work, "hidden", True)  # type: ignore[arg-type]
    await hidden.wait()
    await (await one.start_monitor(MonitorSpec(id="echo", command=("echo", "fine")))).wait()
    moved = await one.spawn(wait, id="moved")  # type: ignore[arg-type]
    await one.handoff("s2", [moved, agent, "child"], id="plan")
    await (await store.session("s3")).close()
    return one


async def _closed(path: Path) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        await _fill(store)


async def _killed(path: Path) -> None:
    store = TaskStore(path, runtime=RUNTIME)
    await store.open()
    one = await _fill(store)
    for number in range(3):
        await one.register(f"live {number}", TaskKind.OTHER)
    await one.cancel_all("enough", timeout=0.0)
    await one.register("last", TaskKind.OTHER)
    os.kill(os.getpid(), signal.SIGKILL)


async def _small(path: Path) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        await store.session("s1")


def _in_a_process(make: object, path: Path) -> None:
    """Have a process of its own make a file: this one opens none."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.run(make(path))  # type: ignore[operator]
            status = 0
        finally:
            os._exit(status)
    _, ended = os.waitpid(child, 0)
    if ended not in (0, signal.SIGKILL):
        raise RuntimeError(f"the file {path.parent.name!r} could not be made: {ended}")


def make_all(folder: Path) -> Mapping[str, Path]:
    """Make the files, each in a folder of its own, and return those folders by name; forks, so no thread may run."""
    made: dict[str, Path] = {}
    for name, make in {"closed": _closed, "killed": _killed, "small": _small}.items():
        made[name] = folder / name
        made[name].mkdir(mode=0o700)
        _in_a_process(make, made[name] / NAME)
    for old in sorted(OLD.glob("*.db")):
        made[old.stem] = folder / old.stem
        made[old.stem].mkdir(mode=0o700)
        shutil.copyfile(old, made[old.stem] / NAME)
        (made[old.stem] / NAME).chmod(0o600)
    _in_a_process(_copied(made["closed"] / NAME), _named(folder, made, "copy"))
    return made


def _named(folder: Path, made: dict[str, Path], name: str) -> Path:
    made[name] = folder / name
    made[name].mkdir(mode=0o700)
    return made[name] / NAME


def _copied(source: Path) -> object:
    async def copy(path: Path) -> None:
        with closing(sqlite3.connect(source)) as connection:
            connection.execute("VACUUM INTO ?", (str(path),))
        path.chmod(0o600)

    return copy
