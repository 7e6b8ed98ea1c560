"""Programs of worker processes in bad surroundings: without descriptors, room, or a parent; they report what they met."""

from __future__ import annotations

import asyncio
import os
import resource
import sqlite3
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lash_store import Recovery, SessionTasks, StoreError, TaskContext, TaskStore
from tests.acceptance.processes import Report
from tests.runtime.support import left_over, threads


async def echo(task: TaskContext, value: str) -> str:
    """A body that ends at once."""
    return value


def make(path: str | Path, **options: Any) -> TaskStore:
    """Make a store that knows `echo`."""
    store = TaskStore(path, runtime="desktop", **options)
    store.task(recovery=Recovery.RERUN)(echo)
    return store


async def works(session: SessionTasks, word: str) -> None:
    """Hold that a session creates, runs and answers."""
    async with asyncio.timeout(20):
        assert await (await session.spawn(echo, word)).result() == word


@contextmanager
def limited(what: int, soft: int) -> Iterator[None]:
    """Have less of something."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Have only so many descriptors to be opened: holes below the limit are filled."""
    with limited(resource.RLIMIT_NOFILE, max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 1 + count):
        held = []
        try:
            while True:
                try:
                    held.append(os.open("/dev/null", os.O_RDONLY))
                except OSError:
                    break
            for descriptor in held[len(held) - count :] if count else ():
                os.close(descriptor)
            held = held[: len(held) - count]
            yield
        finally:
            for descriptor in held:
                os.close(descriptor)


async def want_descriptors_at_open(report: Report, path: str, is_new: bool) -> None:
    """Open a store with none, one, two … descriptors left, until it opens; report each answer and what was left behind."""
    # everything is imported by the first, and a file that is there may be any
    async with make(f"{path}.first" if is_new else path) as store:
        await store.session("s1")
    before = threads()
    for count in range(64):
        store = make(path)
        answer = "opened"
        # an exception that is kept would keep what it has open
        with descriptors_left(count):
            try:
                async with store:
                    pass
            except StoreError as error:
                answer = type(error).__name__
            except BaseException as error:
                answer = repr(error)
        report("open", count, answer, [repr(one) for one in await left_over(Path(path), before)])
        if answer == "opened":
            break
    async with make(path) as store:
        await works(await store.session("s1"), "after")
    report("over")


async def want_descriptors_at_work(report: Report, path: str) -> None:
    """Ask an open store for this and that with no descriptor left; report each answer, and go on."""
    copy = Path(f"{path}.copy")
    async with make(path, lock_timeout=1.0) as store:
        session = await store.session("s1")
        task = await session.spawn(echo, "note", id="noted", notify_on_end=True)
        await task.result()

        async def read_inbox() -> None:
            async with session.inbox():
                pass

        asked: dict[str, Callable[[], Awaitable[Any]]] = {
            "spawn": lambda: session.spawn(echo, "x", id="x"),
            "result": lambda: task.result(),
            "list": lambda: session.list(),
            "inbox": read_inbox,
            "backup": lambda: store.backup(copy),
            "check": lambda: store.check(),
            "recover": lambda: store.recover(),
            "prune": lambda: store.prune(keep_last=0),
            "session": lambda: store.session("s2"),
        }
        for name, ask in asked.items():
            answer = "success"
            with descriptors_left(0):
                try:
                    async with asyncio.timeout(20):
                        await ask()
                except StoreError as error:
                    answer = type(error).__name__
                except BaseException as error:
                    answer = repr(error)
            report("asked", name, answer)
            await works(session, name)
        report("copy", copy.exists())
    report("over")


async def want_file_size(report: Report, path: str) -> None:
    """Spawn until files may not grow any more; then they may again, and the same store goes on."""
    async with make(path) as store:
        session = await store.session("s1")
        await works(session, "before")
        size = Path(f"{path}-wal").stat().st_size
        stored = 0
        with limited(resource.RLIMIT_FSIZE, size + 400_000):
            for number in range(200):
                try:
                    await session.spawn(echo, "x" * 1000, id=f"t{number}")
                except StoreError as error:
                    report("refused", type(error).__name__, str(error)[:200])
                    break
                except BaseException as error:
                    report("refused", repr(error)[:200], "")
                    break
                stored += 1
                report("stored", f"t{number}")
            assert len(await session.list(include_terminal=True)) >= stored
        await works(session, "after")
        await store.check()
    report("over", stored)


async def fork_beside(report: Report, path: str, uses: bool) -> None:
    """Fork while a store is open; the child touches nothing, or uses what it has inherited; the parent goes on."""
    warnings.simplefilter("ignore", DeprecationWarning)
    async with make(path) as store:
        session = await store.session("s1")
        task = await session.spawn(echo, "first", id="first")
        await task.result()
        child = os.fork()
        if child == 0:
            try:
                if uses:
                    _use(report, path, store, session, task)
            except BaseException as error:
                report("child", "died", repr(error)[:500])
            finally:
                os._exit(0)
        _, status = await asyncio.to_thread(os.waitpid, child, 0)
        await works(session, "after the fork")
        await asyncio.sleep(0.02)
        assert await (await session.handle("first")).result() == "first"
        report("status", status)
    async with make(path) as store:
        await works(await store.session("s1"), "again")
    report("over")


def _use(report: Report, path: str, store: TaskStore, session: SessionTasks, task: Any) -> None:
    asked = {
        "session": lambda: store.session("s9"),
        "spawn": lambda: session.spawn(echo, "child", id="of the child"),
        "get": lambda: session.get("first"),
        "list": lambda: store.list(),
        "result": lambda: task.result(),
        "check": lambda: store.sessions(),
        "a store of its own": lambda: make(path).open(),
        "a reader of its own": lambda: TaskStore.open_readonly(path).open(),
    }

    async def answer(ask: Any) -> str:
        try:
            async with asyncio.timeout(3):
                await ask()
        except Exception as error:
            return type(error).__name__
        return "success"

    for name, ask in asked.items():
        report("child", name, asyncio.run(answer(ask)))
    asyncio.run(store.close())
    report("child", "close", "success")


async def hold_write_lock(report: Report, path: str, seconds: float) -> None:
    """Take the write lock as any program may, and keep it for a while."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    report("holds")
    await asyncio.sleep(seconds)
    connection.execute("ROLLBACK")
    connection.close()
    report("over")
