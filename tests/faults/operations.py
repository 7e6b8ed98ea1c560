"""
Owns the list of every public operation that touches the file: how it is prepared and asked for, and how a file tells what became.

What a file says before and after is written by hand, in SQL: nothing here is computed by the code under test.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lash_store import (
    ArmOn,
    MonitorSpec,
    Recovery,
    SessionTasks,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    migrate,
)

__all__ = ["EXCEPT", "OPERATIONS", "Operation", "Stage", "ask", "newborn", "put_right", "staged"]

RUNTIME = "desktop"
HERE, THERE = f"{RUNTIME}:here", f"{RUNTIME}:there"

Job = Callable[[TaskContext], Awaitable[Any]]


class Stage:
    """An open store with two sessions, and what was prepared in it."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.copy = path.with_name("copy.db")
        self.options = {
            "runtime": RUNTIME,
            "lock_timeout": 0.05,
            "cancel_grace": 0.2,
            "callback_timeout": 1.0,
            **options,
        }
        self.store = self.make()
        self.here: SessionTasks
        self.there: SessionTasks
        self.task: TaskHandle
        self.inside: TaskContext
        self.kept: Any = None
        self.entered: dict[str, asyncio.Event] = {}
        self.jobs: asyncio.Queue[tuple[Job, asyncio.Future[Any]]] = asyncio.Queue()
        self.others: list[TaskStore] = []

    def make(self) -> TaskStore:
        """Make a store on the file, with the functions that tasks are made of."""
        store = TaskStore(self.path, **self.options)
        store.task(recovery=Recovery.RERUN)(self.stay)
        store.task(recovery=Recovery.RERUN)(self.echo)
        store.task(recovery=Recovery.RERUN)(self.obey)
        return store

    async def open(self) -> None:
        """Open the store and its sessions."""
        await self.store.open()
        self.here, self.there = await self.store.session("here"), await self.store.session("there")

    async def stay(self, task: TaskContext) -> str:
        """A body that stays until it should stop."""
        self.entered.setdefault(task.id, asyncio.Event()).set()
        await task.cancelled()
        await asyncio.sleep(0)
        return "stayed"

    async def echo(self, task: TaskContext, value: Any) -> Any:
        """A body that ends at once."""
        return value

    async def obey(self, task: TaskContext) -> None:
        """A body that does what it is told, so that what a body alone can ask for is asked for in one."""
        self.inside = task
        self.entered.setdefault(task.id, asyncio.Event()).set()
        while True:
            job, answer = await self.jobs.get()
            try:
                result = await job(task)
            except asyncio.CancelledError:
                answer.cancel()
                raise
            except Exception as error:
                answer.set_exception(error)
            else:
                answer.set_result(result)

    async def running(self, id: str = "t", **how: Any) -> TaskHandle:
        """Spawn a task here that stays, and wait until it runs."""
        handle = await self.here.spawn(self.stay, id=id, **how)
        await self._has_begun(id)
        return handle

    async def obeying(self) -> None:
        """Spawn the body in which jobs are done."""
        self.task = await self.here.spawn(self.obey, id="t")
        await self._has_begun("t")

    async def _has_begun(self, id: str) -> None:
        async with asyncio.timeout(10):
            await self.entered.setdefault(id, asyncio.Event()).wait()

    async def do(self, job: Job) -> Any:
        """Have the body that obeys do something, and return what came of it."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.jobs.put_nowait((job, answer))
        return await answer

    async def ended(self, id: str = "t", **how: Any) -> TaskHandle:
        """Spawn a task here and wait for its end, without reading its outcome."""
        handle = await self.here.spawn(self.echo, "value", id=id, **how)
        await handle.wait(timeout=10)
        return handle

    async def close(self) -> None:
        """Close every store."""
        for store in (*self.others, self.store):
            await store.close(timeout=5.0)


Asked = str | Callable[[Path], Any] | None


@dataclass(frozen=True)
class Operation:
    """
    One public operation.

    *ask* is put to the file with plain `sqlite3` (or is a function of its path): *absent* before, *whole* once it took effect.
    One that only reads has none, and gives *answer*. *parts* are what it says in between, of one that is several; *failed* if a
    function of the program's own has failed in it. *lax* says why a success may come without its effect in the file.
    *is_slow* are left out of the quick samples. *goes_on*: what was begun comes to its end, whatever who waits for it is told. In
    a *body*, ``act`` is given the task's context. *alone*: the store is not opened beforehand.
    """

    name: str
    act: Callable[..., Awaitable[Any]]
    arrange: Callable[[Stage], Awaitable[Any]] | None = None
    ask: Asked = None
    absent: Any = None
    whole: Any = None
    parts: tuple[Any, ...] = ()
    failed: Any = None
    answer: Any = ...
    body: bool = False
    alone: bool = False
    lax: str | None = None
    goes_on: bool = False
    is_slow: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    async def run(self, stage: Stage) -> Any:
        """Ask for it once."""
        return await (stage.do(self.act_inside(stage)) if self.body else self.act(stage))

    def act_inside(self, stage: Stage) -> Job:
        """Return what the body is to do."""
        return lambda task: self.act(stage, task)


def ask(operation: Operation, path: Path, patience: float = 10) -> Any:
    """Ask the file what became of an operation."""
    if operation.ask is None:
        return None
    if callable(operation.ask):
        return operation.ask(path)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=patience)) as connection:
        found = connection.execute(operation.ask).fetchall()
    assert len(found) == 1, found
    return found[0]


def newborn(folder: Path) -> Path:
    """Make a file with nothing in it, only to be copied."""
    made = folder / "newborn.db"
    migrate.prepare(made)
    return made


@asynccontextmanager
async def staged(operation: Operation, born: Path, folder: Path) -> AsyncIterator[Stage]:
    """Prepare an operation on a new file, unless there is one already; all is closed at the end."""
    path = folder / "agent.db"
    if not path.exists():
        shutil.copy(born, path)
    stage = Stage(path, **operation.options)
    try:
        if not operation.alone:
            await stage.open()
        if operation.arrange is not None:
            await operation.arrange(stage)
        yield stage
    finally:
        await stage.close()


def put_right(path: Path) -> None:
    """Remove what a stage made beside its file, by name, and the file."""
    for name in (path.name, "copy.db"):
        for suffix in ("", "-wal", "-shm", "-journal"):
            path.with_name(name + suffix).unlink(missing_ok=True)
        shutil.rmtree(path.with_name(f"{name}-owners"), ignore_errors=True)


# --- what is prepared -----------------------------------------------------------------------------------------------


async def _running(stage: Stage) -> None:
    stage.task = await stage.running()


async def _two_running(stage: Stage) -> None:
    stage.task = await stage.running()
    await stage.running("u")


async def _ended(stage: Stage) -> None:
    stage.task = await stage.ended()


async def _external(stage: Stage) -> None:
    stage.task = await stage.here.register("t", TaskKind.OTHER)


async def _obeying(stage: Stage) -> None:
    await stage.obeying()


async def _signalled(stage: Stage) -> None:
    await stage.obeying()
    await stage.task.signal("word", "hello", key="k")


async def _hidden_done(stage: Stage) -> None:
    stage.task = await stage.here.spawn_hidden("indexing", stage.echo, 1)
    await stage.task.wait(timeout=10)


async def _hidden_failed(stage: Stage) -> None:
    async def fail() -> None:
        raise ValueError("no such page")

    stage.task = await stage.here.spawn_hidden("indexing", fail())
    await stage.task.wait(timeout=10)


async def _noted(stage: Stage) -> None:
    stage.task = await stage.ended(notify_on_end=True)


def _spec(line: str, **how: Any) -> MonitorSpec:
    return MonitorSpec(id="m", command=(sys.executable, "-I", "-S", "-c", line), **how)


async def _monitored(stage: Stage) -> None:
    stage.task = await stage.here.start_monitor(_spec("print('line one')"))
    await stage.task.wait(timeout=20)


async def _monitoring(stage: Stage) -> None:
    stage.task = await stage.here.start_monitor(_spec("import time; time.sleep(1000)"))
    async for event in stage.task.events():
        if event.type == "state_changed":
            return


async def _late(task: TaskContext) -> None:
    await task.cancelled()


async def _left_by_a_function_unknown(stage: Stage) -> None:
    """A task that an earlier store gave back, whose function this one learns of only now."""
    before = TaskStore(stage.path, runtime=RUNTIME)
    before.task(recovery=Recovery.RERUN, name="late")(_late)
    async with before:
        await (await before.session("here")).spawn(_late, id="left")
    await stage.open()
    stage.store.task(recovery=Recovery.RERUN, name="late")(_late)


async def _other_owner(stage: Stage) -> None:
    """A second owner that has work."""
    other = TaskStore(stage.path, runtime="elsewhere", cancel_grace=0.2)
    other.task(recovery=Recovery.RERUN, name="late")(_late)
    stage.others.append(other)
    await other.open()
    handle = await (await other.session("away")).spawn(_late, id="theirs")
    async for event in handle.events():
        if event.type == "started":
            break
    stage.kept = (await handle.record()).owner_id


async def _backed_up(stage: Stage) -> None:
    """A backup that has a task, and a stopped file that has it no more."""
    await stage.open()
    await stage.ended()
    await stage.store.backup(stage.copy)
    await stage.store.prune(keep_last=0, unread=True)
    await stage.store.close()


async def _index_lost(stage: Stage) -> None:
    with closing(sqlite3.connect(stage.path)) as connection:
        connection.execute("DROP INDEX tasks_owned")


# --- what is asked for ----------------------------------------------------------------------------------------------


async def _first_events(stage: Stage, events: Any) -> list[str]:
    found = []
    async for event in events:
        found.append(str(event.type))
        if event.type in {"completed", "cancelled"}:
            break
    return found


async def _read_inbox(stage: Stage) -> list[str]:
    async with stage.here.inbox() as notes:
        return [note.text for note in notes]


async def _take_updates(stage: Stage) -> list[str]:
    async with stage.here.take_updates() as updates:
        return [update.text for update in updates]


async def _await_hidden_failure(stage: Stage) -> list[str]:
    try:
        await stage.here.await_hidden()
    except ExceptionGroup as group:
        return [type(error).__name__ for error in group.exceptions]
    return []


async def _transact(stage: Stage, task: TaskContext) -> int:
    def book(db: Any) -> int:
        db.execute("CREATE TABLE bookings (cents INTEGER)")
        db.execute("INSERT INTO bookings VALUES (3)")
        return 3

    return await task.transact("book", book)


async def _at_completion(stage: Stage) -> Any:
    handle = await stage.here.spawn(_with_ending, id="t")
    return (await handle.wait(timeout=10)).state


async def _with_ending(task: TaskContext) -> str:
    task.at_completion(lambda db: db.execute("CREATE TABLE booked AS SELECT 3 AS cents"))
    return "done"


async def _know_ending(stage: Stage) -> None:
    stage.store.task(recovery=Recovery.RERUN)(_with_ending)


async def _wait_inside(stage: Stage, task: TaskContext) -> None:
    async with task.waiting("approval"):
        stage.kept = "inside"


def _two() -> int:
    return 2


def _state(*, of: str = "t") -> str:
    return f"SELECT state, cancel_requested_at IS NOT NULL FROM tasks WHERE id = '{of}'"


def _requested(of: str = "t") -> str:
    return (
        f"SELECT cancel_requested_at IS NOT NULL, (SELECT count(*) FROM events WHERE task_id = '{of}' "
        f"AND type = 'cancel_requested') FROM tasks WHERE id = '{of}'"
    )


_BORN = (
    "SELECT (SELECT count(*) FROM tasks WHERE id = 'new'), (SELECT count(*) FROM events WHERE task_id = 'new' AND "
    "type = 'registered'), (SELECT count(*) FROM handles JOIN tasks USING (task_seq) WHERE id = 'new' AND role = 'owner')"
)
_HIDDEN = (
    "SELECT (SELECT count(*) FROM tasks WHERE mode = 'hidden'), "
    "(SELECT count(*) FROM events WHERE type = 'registered' AND scope = 'desktop:here'), "
    f"(SELECT sync_needed FROM sessions WHERE scope = '{HERE}')"
)
_READ = "SELECT read_at IS NOT NULL FROM handles WHERE role = 'owner'"
_MOVED = (
    "SELECT tasks.scope, handles.scope, (SELECT count(*) FROM events WHERE type = 'transferred') FROM tasks JOIN handles "
    "USING (task_seq) WHERE tasks.id = 't'"
)
_MAY_BE_UNREAD = "an outcome is handed out though that it was read cannot be noted: it may be handed out again"


def _copy_is_there(path: Path) -> Any:
    copy = path.with_name("copy.db")
    if not copy.exists():
        return "none"
    with closing(sqlite3.connect(f"file:{copy}?mode=ro&immutable=1", uri=True)) as connection:
        return connection.execute("SELECT count(*) FROM tasks").fetchone()[0]


def _all(names: Sequence[Any]) -> list[str]:
    return [one.id for one in names]


async def _ids(names: Awaitable[Sequence[Any]]) -> list[str]:
    return _all(await names)


async def _then(value: Any, asked: Awaitable[Any]) -> Any:
    """Return a value once something was asked for: the answer itself is another for each store."""
    await asked
    return value


async def _state_of(asked: Awaitable[Any]) -> str:
    return str((await asked).state)


OPERATIONS: tuple[Operation, ...] = (
    # --- the store
    Operation("TaskStore.open", lambda on: on.store.open(), alone=True),
    Operation("TaskStore.close", lambda on: on.store.close(), _running),
    Operation(
        "TaskStore.session",
        lambda on: on.store.session("new"),
        ask="SELECT (SELECT count(*) FROM sessions WHERE session_id = 'new'), (SELECT count(*) FROM events WHERE "
        "type = 'session_opened' AND scope = 'desktop:new')",
        absent=(0, 0),
        whole=(1, 1),
    ),
    Operation("TaskStore.sessions", lambda on: _length(on.store.sessions()), answer=2),
    Operation("TaskStore.get", lambda on: _state_of(on.store.get(HERE, "t")), _ended, answer="completed"),
    Operation("TaskStore.handle", lambda on: _then(1, on.store.handle(HERE, "t")), _ended, answer=1),
    Operation("TaskStore.list", lambda on: _ids(on.store.list()), _ended, answer=["t"]),
    Operation("TaskStore.count", lambda on: on.store.count(), _ended, answer=1),
    Operation("TaskStore.steps", lambda on: _length(on.store.steps(on.task.task_seq)), _ended, answer=0),
    Operation("TaskStore.updates", lambda on: _length(on.store.updates(on.task.task_seq)), _ended, answer=0),
    Operation(
        "TaskStore.events",
        lambda on: _first_events(on, on.store.events(0, scope=HERE)),
        _ended,
        answer=["session_opened", "registered", "started", "completed"],
    ),
    Operation(
        "TaskStore.recover",
        lambda on: on.store.recover(),
        _left_by_a_function_unknown,
        ask="SELECT owner_id IS NOT NULL FROM tasks WHERE id = 'left'",
        absent=(0,),
        whole=(1,),
        alone=True,
    ),
    Operation("TaskStore.check", lambda on: _sound(on.store.check()), _ended, answer=True),
    Operation(
        "TaskStore.check(repair=True)",
        lambda on: _mended(on.store.check(repair=True)),
        _index_lost,
        ask="SELECT count(*) FROM sqlite_schema WHERE name = 'tasks_owned'",
        absent=(0,),
        whole=(1,),
    ),
    Operation(
        "TaskStore.backup",
        lambda on: on.store.backup(on.copy),
        _ended,
        ask=_copy_is_there,
        absent="none",
        whole=1,
    ),
    Operation(
        "TaskStore.restore",
        lambda on: TaskStore.restore(on.copy, on.path),
        _backed_up,
        ask="SELECT count(*) FROM tasks WHERE id = 't'",
        absent=(0,),
        whole=(1,),
        alone=True,
        is_slow=True,
    ),
    Operation(
        "TaskStore.prune",
        lambda on: on.store.prune(keep_last=0, unread=True),
        _ended,
        ask="SELECT (SELECT count(*) FROM tasks), (SELECT count(*) > 0 FROM events WHERE task_id = 't'), "
        "(SELECT count(*) FROM tombstones)",
        absent=(1, 1, 0),
        whole=(0, 0, 1),
    ),
    Operation(
        "TaskStore.abandon_owner",
        lambda on: on.store.abandon_owner(on.kept, "it hangs"),
        _other_owner,
        ask="SELECT \"end\", (SELECT state FROM tasks WHERE id = 'theirs') FROM owners WHERE runtime = 'elsewhere'",
        absent=(None, "running"),
        whole=("abandoned", "pending"),
    ),
    # --- a session
    Operation(
        "SessionTasks.spawn",
        lambda on: on.here.spawn(on.stay, id="new"),
        ask=_BORN,
        absent=(0, 0, 0),
        whole=(1, 1, 1),
    ),
    Operation(
        "SessionTasks.spawn_hidden",
        lambda on: on.here.spawn_hidden("indexing", on.stay),
        ask=_HIDDEN,
        absent=(0, 0, 0),
        whole=(1, 1, 1),
    ),
    Operation(
        "SessionTasks.await_hidden",
        _await_hidden_failure,
        _hidden_failed,
        ask=_READ,
        absent=(0,),
        whole=(1,),
        answer=["TaskFailed"],
        lax="what was told is acknowledged behind it: if that fails, it is told again",
    ),
    Operation(
        "SessionTasks.await_background_work",
        lambda on: on.here.await_background_work(),
        _hidden_done,
        ask=f"SELECT sync_needed FROM sessions WHERE scope = '{HERE}'",
        absent=(1,),
        whole=(0,),
        answer=True,
    ),
    Operation("SessionTasks.sync_needed", lambda on: on.here.sync_needed(), _hidden_done, answer=True),
    Operation(
        "SessionTasks.register",
        lambda on: on.here.register("new", TaskKind.OTHER),
        ask=_BORN,
        absent=(0, 0, 0),
        whole=(1, 1, 1),
    ),
    Operation(
        "SessionTasks.unregister",
        lambda on: on.here.unregister("t"),
        _external,
        ask=_state(),
        absent=("running", 0),
        whole=("cancelled", 0),
    ),
    Operation(
        "SessionTasks.complete",
        lambda on: on.here.complete("t", TaskState.COMPLETED, result=1),
        _external,
        ask="SELECT state, result, (SELECT count(*) FROM events WHERE type = 'completed') FROM tasks",
        absent=("running", None, 0),
        whole=("completed", "1", 1),
    ),
    Operation(
        "SessionTasks.set_live_state",
        lambda on: on.here.set_live_state("t", TaskState.WAITING),
        _external,
        ask=_state(),
        absent=("running", 0),
        whole=("waiting", 0),
    ),
    Operation(
        "SessionTasks.update",
        lambda on: on.here.update("t", progress="half", fraction=0.5),
        _external,
        ask="SELECT progress, fraction, (SELECT count(*) FROM events WHERE type = 'progress') FROM tasks",
        absent=(None, None, 0),
        whole=("half", 0.5, 1),
    ),
    Operation(
        "SessionTasks.start_monitor",
        lambda on: on.here.start_monitor(_spec("pass", arm_on=ArmOn.MANUAL)),
        ask="SELECT (SELECT count(*) FROM tasks WHERE id = 'monitor:m'), (SELECT count(*) FROM monitors)",
        absent=(0, 0),
        whole=(1, 1),
        is_slow=True,
    ),
    Operation(
        "SessionTasks.stop_monitor",
        lambda on: on.here.stop_monitor("m"),
        _monitoring,
        ask="SELECT cancel_requested_at IS NOT NULL FROM tasks",
        absent=(0,),
        whole=(1,),
        is_slow=True,
    ),
    Operation("SessionTasks.monitors", lambda on: _length(on.here.monitors()), answer=0),
    Operation(
        "SessionTasks.take_updates",
        _take_updates,
        _monitored,
        ask="SELECT acknowledged_at IS NOT NULL FROM updates",
        absent=(0,),
        whole=(1,),
        answer=["line one"],
        is_slow=True,
    ),
    Operation("SessionTasks.updates", lambda on: _length(on.here.updates()), answer=0),
    Operation("SessionTasks.get", lambda on: _state_of(on.here.get("t")), _ended, answer="completed"),
    Operation("SessionTasks.handle", lambda on: _then(1, on.here.handle("t")), _ended, answer=1),
    Operation("SessionTasks.list", lambda on: _ids(on.here.list(include_terminal=True)), _ended, answer=["t"]),
    Operation(
        "SessionTasks.events",
        lambda on: _first_events(on, on.here.events(0)),
        _ended,
        answer=["session_opened", "registered", "started", "completed"],
    ),
    Operation(
        "SessionTasks.observe",
        lambda on: on.there.observe(on.here, "t"),
        _running,
        ask="SELECT count(*) FROM handles WHERE role = 'observer'",
        absent=(0,),
        whole=(1,),
    ),
    Operation(
        "SessionTasks.cancel",
        lambda on: on.here.cancel("t", "stop"),
        _running,
        ask=_requested(),
        absent=(0, 0),
        whole=(1, 1),
    ),
    Operation(
        "SessionTasks.cancel_all",
        lambda on: _without_errors(on.here.cancel_all("stop")),
        _two_running,
        ask="SELECT sum(cancel_requested_at IS NOT NULL) FROM tasks",
        absent=(0,),
        whole=(2,),
        parts=((1,),),
    ),
    Operation(
        "SessionTasks.abandon",
        lambda on: on.here.abandon("t", "lost"),
        _external,
        ask="SELECT state, (SELECT count(*) FROM events WHERE type = 'abandoned') FROM tasks",
        absent=("running", 0),
        whole=("abandoned", 1),
    ),
    Operation(
        "SessionTasks.validate_handles", lambda on: _ids(on.here.validate_handles(["t"])), _running, answer=["t"]
    ),
    Operation(
        "SessionTasks.transfer",
        lambda on: on.here.transfer(on.there, ["t"]),
        _running,
        ask=_MOVED,
        absent=(HERE, HERE, 0),
        whole=(THERE, THERE, 1),
    ),
    Operation(
        "SessionTasks.cancel_unreferenced",
        lambda on: on.here.cancel_unreferenced(["u"]),
        _two_running,
        ask=_requested(),
        absent=(0, 0),
        whole=(1, 1),
    ),
    Operation(
        "SessionTasks.handoff",
        lambda on: on.here.handoff(on.there, ["t"]),
        _two_running,
        ask="SELECT (SELECT count(*) FROM handoffs), (SELECT scope FROM tasks WHERE id = 't'), (SELECT cancel_requested_at "
        "IS NOT NULL FROM tasks WHERE id = 'u'), (SELECT count(*) FROM events WHERE type = 'handed_off')",
        absent=(0, HERE, 0, 0),
        whole=(1, THERE, 1, 1),
    ),
    Operation(
        "SessionTasks.inbox",
        _read_inbox,
        _noted,
        ask="SELECT acknowledged_at IS NOT NULL FROM inbox",
        absent=(0,),
        whole=(1,),
    ),
    Operation("SessionTasks.notes", lambda on: _length(on.here.notes()), _noted, answer=1),
    Operation(
        "SessionTasks.close",
        lambda on: on.here.close(),
        _external,
        ask=f"SELECT closed_at IS NOT NULL, (SELECT count(*) FROM events WHERE type = 'session_closed') FROM sessions "
        f"WHERE scope = '{HERE}'",
        absent=(0, 0),
        whole=(1, 1),
    ),
    # --- a handle
    Operation(
        "TaskHandle.from_json",
        lambda on: _then(1, TaskHandle.from_json(on.here, on.task.to_json())),
        _ended,
        answer=1,
    ),
    Operation(
        "TaskHandle.result",
        lambda on: on.task.result(),
        _ended,
        ask=_READ,
        absent=(0,),
        whole=(1,),
        answer="value",
        lax=_MAY_BE_UNREAD,
    ),
    Operation("TaskHandle.wait", lambda on: _state_of(on.task.wait()), _ended, answer="completed"),
    Operation("TaskHandle.record", lambda on: _state_of(on.task.record()), _ended, answer="completed"),
    Operation(
        "TaskHandle.cancel", lambda on: on.task.cancel("stop"), _running, ask=_requested(), absent=(0, 0), whole=(1, 1)
    ),
    Operation(
        "TaskHandle.signal",
        lambda on: on.task.signal("word", "hello", key="k"),
        _running,
        ask="SELECT (SELECT count(*) FROM signals), (SELECT count(*) FROM events WHERE type = 'signalled')",
        absent=(0, 0),
        whole=(1, 1),
    ),
    Operation("TaskHandle.steps", lambda on: _length(on.task.steps()), _ended, answer=0),
    Operation(
        "TaskHandle.events",
        lambda on: _first_events(on, on.task.events()),
        _ended,
        answer=["registered", "started", "completed"],
    ),
    # --- a body
    Operation(
        "TaskContext.save",
        lambda on, task: task.save(1),
        _obeying,
        ask="SELECT (SELECT value FROM steps WHERE kind = 'checkpoint'), (SELECT count(*) FROM events WHERE type = 'saved')",
        absent=(None, 0),
        whole=("1", 1),
        body=True,
    ),
    Operation(
        "TaskContext.step",
        lambda on, task: task.step("count", _two),
        _obeying,
        ask="SELECT (SELECT value FROM steps WHERE name = 'count'), (SELECT state FROM steps WHERE name = 'count')",
        absent=(None, None),
        whole=("2", "done"),
        answer=2,
        body=True,
    ),
    Operation(
        "TaskContext.transact",
        _transact,
        _obeying,
        ask="SELECT (SELECT value FROM steps WHERE name = 'book'), (SELECT count(*) FROM sqlite_schema WHERE "
        "name = 'bookings')",
        absent=(None, 0),
        whole=("3", 1),
        failed=("null", 0),
        answer=3,
        body=True,
    ),
    Operation(
        "TaskContext.at_completion",
        _at_completion,
        _know_ending,
        ask="SELECT (SELECT count(*) FROM events WHERE type = 'completed'), (SELECT count(*) FROM sqlite_schema WHERE "
        "name = 'booked')",
        absent=(0, 0),
        whole=(1, 1),
        failed=(0, 0),
        goes_on=True,
    ),
    Operation(
        "TaskContext.sleep",
        lambda on, task: task.sleep(0.001, name="nap"),
        _obeying,
        ask="SELECT count(*) FROM steps WHERE name = 'nap'",
        absent=(0,),
        whole=(1,),
        body=True,
    ),
    Operation(
        "TaskContext.signal",
        lambda on, task: task.signal("word"),
        _signalled,
        answer="hello",
        body=True,
    ),
    Operation(
        "TaskContext.waiting",
        _wait_inside,
        _obeying,
        ask="SELECT count(*) > 0 FROM events WHERE type = 'state_changed'",
        absent=(0,),
        whole=(1,),
        body=True,
    ),
    Operation(
        "TaskContext.spawn",
        lambda on, task: task.spawn(on.stay, id="new"),
        _obeying,
        ask=_BORN,
        absent=(0, 0, 0),
        whole=(1, 1, 1),
        body=True,
    ),
    Operation(
        "TaskContext.progress",
        lambda on, task: task.progress("half", 0.5),
        _obeying,
        ask="SELECT progress, fraction, (SELECT count(*) FROM events WHERE type = 'progress') FROM tasks",
        absent=(None, None, 0),
        whole=("half", 0.5, 1),
        body=True,
    ),
    Operation(
        "TaskContext.notify",
        lambda on, task: task.notify("found three", {"files": 3}, key="three"),
        _obeying,
        ask="SELECT count(*), (SELECT count(*) FROM events WHERE type = 'noted') FROM inbox",
        absent=(0, 0),
        whole=(1, 1),
        body=True,
    ),
    # --- what a store does by itself: a claim, and an end
    Operation(
        "a body from its claim to its end",
        lambda on: _run_one(on),
        ask="SELECT (SELECT count(*) FROM events WHERE type = 'completed'), (SELECT count(*) FROM tasks WHERE "
        "state = 'completed' AND result = '\"value\"')",
        absent=(0, 0),
        whole=(1, 1),
        answer="completed",
        goes_on=True,
    ),
)


async def _run_one(stage: Stage) -> str:
    handle = await stage.here.spawn(stage.echo, "value", id="t")
    return str((await handle.wait(timeout=30)).state)


async def _length(asked: Awaitable[Sequence[Any]]) -> int:
    return len(await asked)


async def _sound(asked: Awaitable[Any]) -> bool:
    return bool((await asked).is_sound)


async def _mended(asked: Awaitable[Any]) -> Any:
    """What could not be mended stands in the report: here it is an error like any other."""
    report = await asked
    for finding in report.findings:
        if not finding.is_repaired:
            raise ReportedError(finding.next_step)
    return report


async def _without_errors(asked: Awaitable[Any]) -> Any:
    """What went wrong with one task stands in its report: here it is an error like any other."""
    reports = await asked
    for report in reports:
        if report.error is not None:
            raise ReportedError(report.error)
    return reports


class ReportedError(Exception):
    """What a report says of one task or finding, instead of raising it."""


EXCEPT: dict[str, str] = {
    "TaskStore.open_readonly": "makes an object, opens nothing",
    "TaskStore.connect": "makes an object, opens nothing",
    "TaskStore.task": "registers in memory",
    "TaskStore.upgraded": "remembers what `open` did",
    "TaskStore.recovered": "remembers what the latest recovery did",
    "SessionTasks.scope": "is in memory",
    "TaskHandle.id": "is in memory",
    "TaskHandle.task_seq": "is in memory",
    "TaskHandle.scope": "is in memory",
    "TaskHandle.to_json": "is in memory",
    "TaskContext.id": "is in memory",
    "TaskContext.scope": "is in memory",
    "TaskContext.attempt": "is in memory",
    "TaskContext.record": "the row as the body last saw it, in memory",
    "TaskContext.checkpoint": "read at the claim, in memory",
    "TaskContext.cancel_requested": "is in memory",
    "TaskContext.stop_reason": "is in memory",
    "TaskContext.cancelled": "waits on an event in memory",
}
"""Public names that are no operation on the file, and why."""
