"""
Owns what the processes of the soak do: one that lives through all of it, and others that are killed or close every few seconds.

The mix of operations is the campaign's, without what would grow for ever by what it asks (new sessions, backups that stay), and
without the campaign's faults and points: the package runs as it is.
"""

from __future__ import annotations

import _sqlite3
import asyncio
import contextlib
import ctypes
import gc
import os
import re
import sqlite3
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lash_store import (
    CancelPolicy,
    Recovery,
    SessionTasks,
    StoreError,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskPruned,
    TaskState,
    TaskStore,
)
from tests.acceptance.processes import Report
from tests.campaign.victim import RUNTIME, SESSIONS, Life, Operations, Plan

__all__ = ["LEAKS", "LongPlan", "make_file", "pass_by", "stay"]

_PROBES = "probes"
"""The session whose work is timed; no operation of the mix touches it."""

_ALL_SESSIONS = (*SESSIONS, "next-0", "next-1", "next-2", "next-3")
"""All others: no new ones are made later, for sessions stay in a file for ever."""

_SLEEPERS = 3
"""Bodies that sleep until another process cancels them."""

_THREADS = 4
"""Threads of the loop's executor, all started at once: they are not to be taken for a leak."""

_ENDS = 20.0
"""Seconds in which what was cancelled must have ended."""

_FILE = "agent.db"

LEAKS = ("descriptor", "task", "thread", "memory", "file", "reader")


@dataclass(frozen=True, slots=True)
class LongPlan:
    """What the long life is to do: *commands* come on a pipe; *leak* is kept on purpose, every *leak_every* seconds."""

    plan: Plan
    commands: Any
    leak: tuple[str, ...] = ()
    leak_every: float = 1.0


async def make_file(report: Report, path: str) -> None:
    """Make the file, so that a program's own table can be made beside the store's."""
    async with TaskStore(path, runtime=RUNTIME):
        pass


async def pass_by(report: Report, path: str, plan: Plan) -> None:
    """Live a short life."""
    await _Short(report, path, plan).run()


async def stay(report: Report, path: str, plan: LongPlan) -> None:
    """Live through all of it."""
    await _Long(report, path, plan).run()


class _Mix(Operations):
    """The campaign's operations, bounded in what they leave behind."""

    def _choices(self) -> list[tuple[int, Callable[[], Awaitable[None]]]]:
        # order never depends on the clock, says the campaign; here a nap must not last an hour
        return [(weight, one) for weight, one in super()._choices() if one != self.clock]

    async def _destination(self, source: SessionTasks) -> tuple[str, bool, SessionTasks | None]:
        name = self._chance.choice([one for one in _ALL_SESSIONS if one != source.scope.session_id])
        return f"{RUNTIME}:{name}", False, await self._open(name)

    async def keep(self) -> None:
        if self._chance.random() < 0.5:
            return await super().keep()
        target = Path(f"{self._life._path}.backup-{self._life._name()}")
        try:
            await self._do("backup", {"to": target.name}, self._store.backup(target))
        finally:
            target.unlink(missing_ok=True)
        return None


class _Life(Life):
    def _prepare(self) -> None:
        """Change nothing in this process."""

    def _operations(self, store: TaskStore) -> Operations:
        return _Mix(self, store)


class _Short(_Life):
    """A life that passes by; one that only asks also times how long a cancel takes across processes."""

    def _begin(self, store: TaskStore) -> list[asyncio.Task[None]]:
        workers = [asyncio.create_task(self._work(store), name=f"worker {n}") for n in range(2)]
        if self._plan.role == "requester":
            workers.append(asyncio.create_task(self._cancel_sleepers(store), name="canceller"))
        else:
            workers.append(asyncio.create_task(self._follow(store), name="follower"))
        return workers

    async def _cancel_sleepers(self, store: TaskStore) -> None:
        try:
            session = await store.session(_PROBES)
        except StoreError:
            # the long life has not opened it yet
            return
        while True:
            running = [one for one in await session.list(states=[TaskState.RUNNING]) if one.label == "sleeper"]
            if running:
                task = self._chance.choice(running)
                args = {"scope": str(session.scope), "id": task.id}
                began = time.monotonic()
                call = session.cancel(task.id, "to see how long it takes", timeout=10)
                record = await self._do(
                    "cancel", args, call, lambda found: {"task_seq": found.task_seq, "state": str(found.state)}
                )
                if record is not None and record.state is TaskState.CANCELLED:
                    self._say("L", self._plan.who, "cancel", time.monotonic() - began)
            await asyncio.sleep(self._chance.uniform(0.0, 0.3))


class _Long(_Life):
    """The life that is measured: it works, keeps others' books, and comes to rest whenever it is told to."""

    def __init__(self, report: Report, path: str, long: LongPlan) -> None:
        self._long = long
        self._turn = 0
        self._is_resting = True
        self._kept: list[Any] = []
        self._orders: asyncio.Queue[str] = asyncio.Queue()
        self._first: dict[str, tuple[int, int]] | None = None
        self._types: Counter[str] = Counter()
        self._first_held: dict[str, Counter[str]] = {}
        super().__init__(report, path, long.plan)

    async def run(self) -> None:
        tracemalloc.start(1)
        loop = asyncio.get_running_loop()
        await _fill_executor(loop)
        _fill_names()
        loop.add_reader(self._long.commands.fileno(), self._hear)
        store = self._store()
        async with store:
            assert store._core is not None
            self._say("O", self._plan.who, store._core.owner_id)
            leaking = asyncio.create_task(self._leak(), name="leak")
            async with _ended(leaking):
                while await self._orders.get() == "go":
                    self._turn += 1
                    self._is_resting = False
                    await self._work_until_told(store)
                    self._is_resting = True
                    self._say("M", self._plan.who, "rest", await self._rest(store))
        loop.remove_reader(self._long.commands.fileno())
        self._say("N", self._plan.who, "closed")

    def _hear(self) -> None:
        for word in os.read(self._long.commands.fileno(), 4096).decode().split():
            self._orders.put_nowait(word)

    def _store(self) -> TaskStore:
        store = super()._store()
        life = self

        async def probe(task: TaskContext) -> dict[str, int]:
            with life.inside(task):
                return {"attempt": task.attempt}

        async def sleeper(task: TaskContext) -> None:
            with life.inside(task):
                await asyncio.Event().wait()

        for function in (probe, sleeper):
            self.functions[function.__name__] = store.task(recovery=Recovery.RERUN)(function)
        return store

    # --- the load ---

    async def _work_until_told(self, store: TaskStore) -> None:
        """Work until the next order, which must be to rest."""
        probes = await self._do("session", {"scope": f"{RUNTIME}:{_PROBES}"}, store.session(_PROBES))
        works: dict[str, Any] = {
            "worker": self._work(store),
            "follower": self._follow(store, self._turn),
            "prober": self._probe(probes),
            "committer": self._commit(probes),
            "reader": self._read(),
            "subscriber": self._subscribe(store),
            "waiter": self._wait(store),
            "pruner": self._prune(store),
            "teller": self._tell(),
        }
        works |= {f"sleeper {n}": self._keep_asleep(probes) for n in range(_SLEEPERS)}
        workers = [asyncio.create_task(one, name=name) for name, one in works.items()]
        order = asyncio.create_task(self._orders.get(), name="order")
        async with _ended(order, *workers):
            done, _ = await asyncio.wait([order, *workers], return_when=asyncio.FIRST_COMPLETED)
            for one in done - {order}:
                one.result()
                raise AssertionError(f"{one.get_name()} has come to an end")
            assert order.result() == "rest"

    async def _probe(self, session: SessionTasks) -> None:
        """Time tasks from before they are asked for until their result is here."""
        while True:
            name = self._name()
            args = {"scope": str(session.scope), "id": name, "key": None}
            began = time.monotonic()
            call = session.spawn(self.functions["probe"], id=name)
            handle: TaskHandle | None = await self._do("spawn", args, call, lambda h: {"task_seq": h.task_seq})
            assert handle is not None
            await handle.result()
            self._say("L", self._plan.who, "completed", time.monotonic() - began)
            await asyncio.sleep(0.02)

    async def _commit(self, session: SessionTasks) -> None:
        """Time one commit: a line of progress."""
        name = self._name()
        scope = str(session.scope)
        call = session.register(name, TaskKind.OTHER)
        await self._do("register", {"scope": scope, "id": name, "key": None}, call, lambda h: {"task_seq": h.task_seq})
        for n in range(1_000_000):
            args = {"scope": scope, "id": name, "text": f"{name} {n}"}
            began = time.monotonic()
            done = await self._do(
                "update",
                args,
                session.update(name, progress=args["text"]),
                lambda one: {"task_seq": one.record.task_seq, "verdict": str(one.verdict)},
            )
            assert done is not None
            self._say("L", self._plan.who, "commit", time.monotonic() - began)
            await asyncio.sleep(0.02)

    async def _keep_asleep(self, session: SessionTasks) -> None:
        """Have a body sleep, and another once somebody has ended it."""
        while True:
            name = self._name()
            args = {"scope": str(session.scope), "id": name, "key": None}
            call = session.spawn(self.functions["sleeper"], id=name, cancel_policy=CancelPolicy.ABORT_LOCAL)
            handle: TaskHandle | None = await self._do("spawn", args, call, lambda h: {"task_seq": h.task_seq})
            assert handle is not None
            # the last twelve to begin are kept, and it began before them: it may be pruned before its end is read
            with contextlib.suppress(TaskPruned):
                await handle.wait()

    async def _read(self) -> None:
        """Open and close stores of other kinds on the file."""
        while True:
            async with TaskStore.open_readonly(self._path) as reader:
                await reader.count()
                await reader.sessions()
            async with TaskStore.connect(self._path, runtime=RUNTIME) as requester:
                await requester.list()
            await asyncio.sleep(0.05)

    async def _subscribe(self, store: TaskStore) -> None:
        """Follow for a while, then leave: after an event, in the middle of a wait, or without a word."""
        while True:
            how = self._chance.randrange(3)
            feed = store.events(after=None)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._chance.choice((0.0, 0.02, 0.1))):
                    async for _ in feed:
                        if how == 0:
                            break
            if how == 1:
                self._say("N", self._plan.who, "a subscriber left")
            await asyncio.sleep(0.01)

    async def _wait(self, store: TaskStore) -> None:
        """Wait for tasks of any session, with many others, and go before the end."""
        while True:
            waits = []
            for task in (await store.list())[-8:]:
                with contextlib.suppress(StoreError):
                    handle = await store.handle(task.scope, task.id)
                    waits += [asyncio.create_task(handle.wait(), name=f"wait {n}") for n in range(3)]
            async with _ended(*waits):
                if waits:
                    await asyncio.wait(waits, timeout=self._chance.choice((0.0, 0.01, 0.1)))
            await asyncio.sleep(0.02)

    async def _prune(self, store: TaskStore) -> None:
        """Keep the file bounded: what is finished goes, but the last few of each session."""
        while True:
            await asyncio.sleep(0.25)
            call = store.prune(keep_last=12, unread=True)
            await self._do("prune", {}, call, lambda done: {"pruned": done.tasks})

    async def _tell(self) -> None:
        while True:
            self._say("M", self._plan.who, "load", {"tasks": len(asyncio.all_tasks())})
            await asyncio.sleep(0.25)

    # --- at rest ---

    async def _rest(self, store: TaskStore) -> dict[str, Any]:
        """End all that goes on, and say what is left in this process."""
        deadline = time.monotonic() + 30
        while True:
            await self._do("recover", {}, store.recover())
            live = [task for task in await store.list() if not task.state.is_terminal]
            if not live:
                break
            assert time.monotonic() < deadline, f"still live: {live[:3]}"
            await asyncio.gather(*(self._end(store, task) for task in live))
        await asyncio.gather(*(self._empty(store, name) for name in _ALL_SESSIONS))
        call = store.prune(keep_last=12, unread=True)
        await self._do("prune", {}, call, lambda done: {"pruned": done.tasks})
        # what was just ended leaves its threads, and its descriptors, a moment later
        found = self._count()
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            await asyncio.sleep(0.05)
            again = self._count()
            if again == found:
                break
            found = again
        gc.collect()
        traced, _ = tracemalloc.get_traced_memory()
        objects = gc.get_objects()
        count = len(objects)
        grown = self._grown(objects)
        return {**found, "objects": count, "traced": traced, "children": _children(), **_allocated(), **grown}

    async def _empty(self, store: TaskStore, name: str) -> None:
        """Read what is to be read in a session: what nobody has read is not pruned."""
        session = await self._do("session", {"scope": f"{RUNTIME}:{name}"}, store.session(name, reopen=True))
        if session is None:
            return
        while await session.inbox(limit=500):
            pass
        with contextlib.suppress(ExceptionGroup):
            await session.await_background_work()
        while await session.take_updates(500):
            pass

    async def _end(self, store: TaskStore, task: Any) -> None:
        session = await store.session(task.scope.session_id)
        args = {"scope": str(task.scope), "id": task.id}

        def told(found: Any) -> dict[str, Any]:
            return {"task_seq": found.task_seq, "state": str(found.state)}

        await self._do("cancel", args, session.cancel(task.id, "a rest", timeout=0.5), told)
        if task.mode == "external":
            # whose owner died waits for the next to register it, with its callback
            done = session.complete(task.id, TaskState.CANCELLED)
            await self._do("complete", args, done, lambda found: {**told(found.record), "verdict": str(found.verdict)})

    @staticmethod
    def _count() -> dict[str, int]:
        held = _descriptors()
        # SQLite must not close a descriptor of a file whose locks this process holds (see the package's guards): it keeps it for
        # the next connection that opens the file, so there are as many as there once were connections at the same time
        of_file = held.pop(_FILE, 0)
        return {
            "descriptors": held.total(),
            "descriptors of the file": of_file,
            "threads": threading.active_count(),
            "tasks": len(asyncio.all_tasks()),
        }

    def _held(self) -> dict[str, Counter[str]]:
        """Name what is counted."""
        held: dict[str, Counter[str]] = {"descriptors": _descriptors(), "threads": Counter(), "tasks": Counter()}
        held["threads"].update(_kind(one.name) for one in threading.enumerate())
        held["tasks"].update(_kind(one.get_name()) for one in asyncio.all_tasks())
        return held

    def _grown(self, objects: list[Any]) -> dict[str, Any]:
        """Say which types, and which lines, have grown most since the third rest, and what is held more than after it."""
        if self._turn < 3 or self._turn % 3:
            # to look at all takes a while
            return {}
        held = self._held()
        types = Counter(type(one).__name__ for one in objects)
        lines = {_place(one): (one.size, one.count) for one in tracemalloc.take_snapshot().statistics("lineno")}
        if self._first is None:
            self._first, self._types, self._first_held = lines, types, held
            return {}
        most = (types - self._types).most_common(6)
        grown = [(size - self._first.get(place, (0, 0))[0], count, place) for place, (size, count) in lines.items()]
        told = [[place, size // 1024, count] for size, count, place in sorted(grown, reverse=True)[:6] if size > 2048]
        more = [[kind, name, n] for kind, of in held.items() for name, n in (of - self._first_held[kind]).items()]
        return {"types": most, "lines": told, "held": more[:12]}

    # --- what a control plants ---

    async def _leak(self) -> None:
        while True:
            await asyncio.sleep(self._long.leak_every)
            # at rest, what is counted is waited for until it does not change
            for leak in () if self._is_resting else self._long.leak:
                match leak:
                    case "descriptor":
                        self._kept.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
                    case "task":
                        self._kept.append(asyncio.create_task(asyncio.Event().wait(), name="leaked"))
                    case "thread":
                        threading.Thread(target=threading.Event().wait, name="leaked", daemon=True).start()
                    case "memory":
                        self._kept.append((bytearray(b"x") * (1 << 19), [[n] for n in range(1_000)]))
                    case "file":
                        Path(f"{self._path}-owners", f"leaked-{len(self._kept)}").touch()
                        self._kept.append(None)
                    case "reader" if not any(isinstance(one, sqlite3.Connection) for one in self._kept):
                        # one is enough to keep the -wal from ever beginning anew
                        reader = sqlite3.connect(self._path, isolation_level=None)
                        reader.execute("BEGIN").fetchall()
                        reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
                        self._kept.append(reader)


def _place(line: tracemalloc.Statistic) -> str:
    frame = line.traceback[0]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def _kind(name: str) -> str:
    """Return a name without what numbers it."""
    return re.sub(r"\d+|o-\w+", "#", name)[:40]


def _descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for one in Path("/proc/self/fd").iterdir():
        # the listing itself holds one
        with contextlib.suppress(FileNotFoundError):
            found[_kind(one.readlink().name)] += 1
    return found


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple((f"field{n}", ctypes.c_size_t) for n in range(10))


def _allocated() -> dict[str, int]:
    """Return how many bytes the C library has given out, all told, and to SQLite; where these can be asked."""
    found = {}
    with contextlib.suppress(AttributeError):
        ask = ctypes.CDLL(_sqlite3.__file__).sqlite3_memory_used
        ask.restype = ctypes.c_int64
        found["SQLite"] = int(ask())
    with contextlib.suppress(AttributeError):
        ask = ctypes.CDLL(None).mallinfo2
        ask.restype = _Mallinfo
        told = ask()
        # in its own areas, and in those that were mapped for one block each
        found["allocated"] = int(told.field7 + told.field4)
    return found


def _children() -> int:
    """Return how many processes this one has begun and not let go of, the dead among them."""
    me = os.getpid()
    return sum(len((thread / "children").read_text().split()) for thread in Path(f"/proc/{me}/task").iterdir())


def _fill_names() -> None:
    """Have the interpreter's table of names grow now: the parts of paths go there, and one day it takes 2 MiB more at once."""
    names = [sys.intern(f"name {n}") for n in range(200_000)]
    del names


async def _fill_executor(loop: asyncio.AbstractEventLoop) -> None:
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="executor")
    loop.set_default_executor(executor)
    everybody = threading.Barrier(_THREADS)
    await asyncio.gather(*(loop.run_in_executor(executor, everybody.wait) for _ in range(_THREADS)))


@contextlib.asynccontextmanager
async def _ended(*tasks: asyncio.Task[Any]) -> AsyncIterator[None]:
    """End tasks with the block, and wait for them; one that does not end when it is cancelled is a bug, and is named."""
    try:
        yield
    finally:
        for one in tasks:
            one.cancel()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=_ENDS)
            assert not left, f"were cancelled, and did not end in {_ENDS} s: {[*map(_where, left)]}"
        for one in tasks:
            error = None if one.cancelled() else one.exception()
            if error is not None and not isinstance(error, StoreError | AssertionError):
                raise error


def _where(task: asyncio.Task[Any]) -> str:
    frames = [f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" for frame in task.get_stack()]
    return f"{task.get_name()} at {', '.join(frames)}"
