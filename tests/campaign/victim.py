"""
Owns what a process of the campaign does until it is killed: a seeded mix of every public operation, each told on the pipe.

What a body writes names its attempt, so that the file itself shows whose write it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from lash_store import (
    CheckReport,
    CommitInDoubt,
    MonitorSpec,
    Recovery,
    SessionTasks,
    StaleAttempt,
    StorageMoved,
    StoreClosed,
    StoreError,
    TaskContext,
    TaskHandle,
    TaskKind,
    TaskNotFound,
    TaskPruned,
    TaskRecord,
    TaskState,
    TaskStore,
    commit,
)
from lash_store.policies import Backoff
from tests.acceptance.processes import Report
from tests.campaign.points import Points
from tests.checker import outcome

__all__ = ["RUNTIME", "SESSIONS", "Life", "Operations", "Plan", "live"]

RUNTIME = "desktop"
SESSIONS = ("s1", "s2", "s3", "s4")
_CROWD = 14
"""Live tasks of a session beyond which a life ends some before it begins others."""

_real_time = time.time


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What one life is to do.

    *role*: ``owner`` runs bodies, ``requester`` only asks, ``last`` recovers, ends what is live, and says so. *point*, *passing*:
    where it kills itself; *closes* after so many seconds in order, if it lives so long; *gives_up* is an owner that is stuck. A
    *steady* one has bodies that are still at it when it is stopped and goes on.
    """

    who: str
    seed: int
    role: str = "owner"
    point: str | None = None
    passing: int = 0
    closes: float | None = None
    gives_up: int | None = None
    is_steady: bool = False
    has_effects: bool = False
    fault: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def as_words(self) -> dict[str, Any]:
        """Return it as what a replay prints."""
        return {name: value for name, value in asdict(self).items() if value not in (None, {}, 0, False)}


class Flaky(Exception):
    """What a body raises that is worth another attempt."""


async def live(report: Report, path: str, plan: Plan) -> None:
    """Live one life."""
    # what it warns of is said in rows and answers as well
    logging.getLogger("lash_store").addHandler(logging.NullHandler())
    await Life(report, path, plan).run()


class Life:
    """What one process does: opens a store, lets workers do one operation after another, and tells of all of it."""

    def __init__(self, report: Report, path: str, plan: Plan) -> None:
        self._say = report
        self._path = path
        self._plan = plan
        self._chance = random.Random(plan.seed)
        self._calls = itertools.count(1)
        self._ids = itertools.count(1)
        self._clock = 0.0
        self._owner: int | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Change in this process what is to be changed: its clock, where it dies, and a fault."""
        plan, say = self._plan, self._say
        time.time = lambda: _real_time() + self._clock
        commit._CHECKPOINT_PAGES = 60
        points = Points(plan.point, plan.passing, lambda point: say("K", plan.who, point))
        points.put_in_place()
        if plan.fault is not None:
            _FAULTS[plan.fault]()

    async def run(self) -> None:
        plan = self._plan
        self._say("N", plan.who, plan.role)
        store = self._store()
        async with contextlib.AsyncExitStack() as until:
            # a life that is still there when the campaign ends closes in order
            await until.enter_async_context(store)
            if plan.role != "requester":
                owner = store._core.owner_id  # type: ignore[union-attr]
                self._say("O", plan.who, owner)
                if store.upgraded is not None:
                    self._say("N", plan.who, "upgraded")
            if plan.role == "last":
                await self._settle(store)
                return
            if plan.gives_up is not None:
                await self._do(
                    "abandon_owner", {"owner": plan.gives_up}, store.abandon_owner(plan.gives_up, "it is stuck")
                )
                await self._do("recover", {}, store.recover())
            if plan.is_steady:
                await self._begin_long_work(store)
            workers = self._begin(store)
            try:
                done, _ = await asyncio.wait(workers, timeout=plan.closes, return_when=asyncio.FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            self._say("N", plan.who, "closing")
        self._say("N", plan.who, "closed")

    def _begin(self, store: TaskStore) -> list[asyncio.Task[None]]:
        """Begin what is done until the end."""
        workers = [asyncio.create_task(self._work(store), name=f"worker {n}") for n in range(3)]
        return [*workers, asyncio.create_task(self._follow(store), name="follower")]

    async def _begin_long_work(self, store: TaskStore) -> None:
        """Have some bodies that write again and again for a while."""
        session = await self._do("session", {"scope": f"{RUNTIME}:s1"}, store.session("s1", reopen=True))
        for _ in range(3):
            name = self._name()
            args = {"scope": f"{RUNTIME}:s1", "id": name, "key": None}
            call = session.spawn(self.functions["work"], 200, 0.01, id=name)
            await self._do("spawn", args, call, _held)

    async def _settle(self, store: TaskStore) -> None:
        """Recover what all others left, and say so; then end what is live, and say so."""
        await store.recover()
        self._say("Q", self._plan.who)
        sessions = {}
        for task in await store.list():
            session = sessions[task.scope] = await store.session(task.scope.session_id)
            with contextlib.suppress(StoreError):
                await session.cancel(task.id, "the campaign ends", timeout=10)
        for session in sessions.values():
            # a monitor that had ended by then would start again with its session
            for monitor in await session.monitors():
                if monitor.armed:
                    await session.stop_monitor(monitor.id)
        self._say("N", self._plan.who, "settled")
        await asyncio.Event().wait()

    def _operations(self, store: TaskStore) -> Operations:
        return Operations(self, store)

    async def _work(self, store: TaskStore) -> None:
        operations = self._operations(store)
        while True:
            await operations.one()
            await asyncio.sleep(self._chance.choice((0, 0, 0, 0.002, 0.01)))

    async def _follow(self, store: TaskStore, feed: int = 0) -> None:
        async for event in store.events(after=None):
            self._say("F", self._plan.who, feed, event.seq, event.task_seq, str(event.type))

    # --- saying what is asked and answered ---

    async def _do(
        self, op: str, args: dict[str, Any], call: Awaitable[Any], answer: Callable[[Any], dict[str, Any]] | None = None
    ) -> Any:
        """Make a call and tell of it; None if it was refused."""
        who, number = self._plan.who, next(self._calls)
        self._say("S", who, number, op, args)
        try:
            got = await call
        except asyncio.CancelledError:
            self._say("E", who, number, "CancelledError", True)
            raise
        except (StoreError, TimeoutError, ExceptionGroup) as error:
            in_doubt = isinstance(error, (CommitInDoubt, StorageMoved, StoreClosed, TimeoutError, ExceptionGroup))
            self._say("E", who, number, type(error).__name__, in_doubt)
            if isinstance(error, StaleAttempt):
                raise
            return None
        self._say("A", who, number, {} if answer is None else answer(got))
        return got

    def _name(self) -> str:
        return f"{self._plan.who}-{next(self._ids)}"

    # --- what the store knows ---

    def _store(self) -> TaskStore:
        plan = self._plan
        if plan.role == "requester":
            return TaskStore.connect(self._path, runtime=RUNTIME)
        options = {
            "max_running": 6,
            "cancel_grace": 0.03,
            "callback_timeout": 0.2,
            "upgrade_backup": False,
            **plan.options,
        }
        store = TaskStore(self._path, runtime=RUNTIME, **options)
        self.functions: dict[str, Callable[..., Any]] = {}
        for function, how in _bodies(self):
            self.functions[function.__name__] = store.task(**how)(function)
        return store

    @contextlib.contextmanager
    def inside(self, task: TaskContext) -> Iterator[None]:
        """Tell that a body is entered and left."""
        who, seq, attempt = self._plan.who, task.record.task_seq, task.attempt
        self._say("B", who, seq, attempt)
        how = "returned"
        try:
            yield
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            self._say("X", who, seq, attempt, f"{how}, {task.stop_reason}")


def _bodies(life: Life) -> list[tuple[Callable[..., Any], dict[str, Any]]]:
    """Return the functions of every owner, and how each is registered."""

    async def work(task: TaskContext, until: int, pause: float) -> dict[str, int]:
        seq, attempt = task.record.task_seq, task.attempt
        with life.inside(task):
            saved: Any = task.checkpoint or {"n": 0}
            for n in range(saved["n"] + 1, until + 1):
                await asyncio.sleep(pause)
                at = {"task_seq": seq, "n": n}
                match n % 4:
                    case 0:
                        text = f"attempt {attempt} at {n}"
                        await life._do("progress", {**at, "text": text}, task.progress(text, n / until), _always(at))
                    case 1:
                        named = {**at, "name": f"step {n}"}
                        value = {"attempt": attempt, "n": n}
                        await life._do("step", named, task.step(f"step {n}", lambda v=value: v), _always(at))
                    case 2 if life._plan.has_effects:
                        named = {**at, "name": f"effect {n}"}
                        call = task.transact(f"effect {n}", _effect, seq, f"effect {n}")
                        await life._do("transact", named, call, _always(at))
                    case 3:
                        key = f"note {n}"
                        await life._do("notify", {**at, "key": key}, task.notify("so far", key=key), _always(at))
                await life._do("save", at, task.save({"attempt": attempt, "n": n}), _always(at))
            return {"attempt": attempt, "n": until}

    async def bound(task: TaskContext, pause: float) -> dict[str, int]:
        with life.inside(task):
            await asyncio.sleep(pause)
            return {"attempt": task.attempt}

    async def waits(task: TaskContext, pause: float) -> dict[str, Any]:
        with life.inside(task):
            try:
                said = await task.signal("go", timeout=pause)
            except TimeoutError:
                said = None
            await task.sleep(pause / 4, name="nap")
            return {"attempt": task.attempt, "said": said}

    async def flaky(task: TaskContext, failures: int) -> dict[str, int]:
        with life.inside(task):
            if task.attempt <= failures:
                raise Flaky(f"attempt {task.attempt}")
            return {"attempt": task.attempt}

    async def fails(task: TaskContext, pause: float) -> None:
        with life.inside(task):
            await asyncio.sleep(pause)
            raise ValueError("so it is")

    async def reluctant(task: TaskContext, pause: float) -> dict[str, int]:
        """End well though asked to end, if the grace is long enough."""
        with life.inside(task):
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):
                async with asyncio.timeout(pause):
                    await task.cancelled()
            return {"attempt": task.attempt}

    async def parent(task: TaskContext, pause: float) -> dict[str, Any]:
        with life.inside(task):
            name = f"{task.id}-child"
            args = {"id": name, "task_seq": task.record.task_seq}
            child = await life._do(
                "spawn_child",
                args,
                task.spawn(life.functions["work"], 2, pause, id=name),
                lambda h: {"task_seq": h.task_seq},
            )
            record = None if child is None else await child.wait(timeout=2)
            return {"attempt": task.attempt, "child": None if record is None else str(record.state)}

    again = {"recovery": Recovery.RERUN}
    return [
        (work, again),
        (bound, {"recovery": Recovery.OWNER_BOUND}),
        (waits, again),
        (flaky, {**again, "retry_on": Flaky, "max_attempts": 4, "backoff": Backoff(initial=0.005)}),
        (fails, again),
        (reluctant, again),
        (parent, again),
    ]


async def _within(seconds: float, call: Awaitable[Any]) -> Any:
    # `asyncio.wait_for` swallows a cancellation that comes together with the answer
    async with asyncio.timeout(seconds):
        return await call


def _always(answer: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda _: answer


def _effect(db: Any, task_seq: int, name: str) -> None:
    db.execute("INSERT INTO campaign_effects VALUES (?, ?)", [task_seq, name])


def _told(record: TaskRecord) -> dict[str, Any]:
    """Return what an answer says of a task."""
    told: dict[str, Any] = {"task_seq": record.task_seq, "state": str(record.state), "attempt": record.attempt}
    if record.completed_at is not None:
        failure = None if record.failure is None else record.failure.message
        told["digest"] = outcome(str(record.state), record.result, failure, _text(record.completed_at))
    return told


def _held(handle: TaskHandle) -> dict[str, Any]:
    return {"task_seq": handle.task_seq, "handle": handle.to_json()["id"]}


def _errors(report: CheckReport) -> dict[str, Any]:
    return {"errors": [one.message for one in report.findings if one.severity == "error"]}


def _text(at: datetime) -> str:
    return f"{at:%Y-%m-%dT%H:%M:%S}.{at.microsecond // 1000:03d}Z"


class Operations:
    """The operations of one worker, chosen by weight."""

    def __init__(self, life: Life, store: TaskStore) -> None:
        self._life = life
        self._store = store
        self._chance = life._chance
        self._is_owner = life._plan.role != "requester"
        menu = self._choices()
        if not self._is_owner:
            not_ours = {self.spawn, self.external, self.hidden, self.monitor}
            menu = [(weight, op) for weight, op in menu if op not in not_ours]
        self._menu = [op for _, op in menu]
        self._weights = [weight for weight, _ in menu]

    def _choices(self) -> list[tuple[int, Callable[[], Awaitable[None]]]]:
        """Return what may be done, and how often beside the others."""
        return [
            (12, self.spawn),
            (5, self.external),
            (5, self.end_external),
            (8, self.cancel),
            (6, self.wait),
            (5, self.look),
            (4, self.signal),
            (4, self.transfer),
            (3, self.handoff),
            (3, self.inbox),
            (2, self.observe),
            (2, self.close),
            (2, self.hidden),
            (1, self.cancel_many),
            (1, self.abandon),
            (1, self.monitor),
            (1, self.prune),
            (1, self.keep),
            (1, self.clock),
        ]

    async def one(self) -> None:
        """Do one operation."""
        [operation] = self._chance.choices(self._menu, self._weights)
        await operation()

    async def _do(
        self, op: str, args: dict[str, Any], call: Awaitable[Any], answer: Callable[[Any], dict[str, Any]] | None = None
    ) -> Any:
        return await self._life._do(op, args, call, answer)

    async def _session(self) -> SessionTasks | None:
        return await self._open(self._chance.choice(SESSIONS), reopen=self._chance.random() < 0.3)

    async def _open(self, name: str, **how: Any) -> SessionTasks | None:
        session: SessionTasks | None = await self._do(
            "session", {"scope": f"{RUNTIME}:{name}"}, self._store.session(name, **how)
        )
        return session

    async def _one_of(self, session: SessionTasks, *, live: bool = True, **wanted: Any) -> TaskRecord | None:
        tasks = await session.list(include_terminal=not live, include_hidden=True, **wanted)
        return self._chance.choice(tasks) if tasks else None

    # --- creating ---

    async def spawn(self) -> None:
        session = await self._session()
        if session is None:
            return
        if len(await session.list(include_hidden=True)) > _CROWD:
            await self._end_some(session)
            return
        chance = self._chance
        name = self._life._name()
        pause = chance.choice((0.0, 0.0, 0.001, 0.01, 0.05))
        what, *words = chance.choice(
            (
                ("work", chance.randrange(1, 9), pause),
                ("work", chance.randrange(1, 9), pause),
                ("bound", pause),
                ("waits", chance.choice((0.01, 0.1, 0.4))),
                ("flaky", chance.randrange(0, 5)),
                ("fails", pause),
                ("reluctant", chance.choice((0.0, 0.02, 0.2))),
                ("parent", pause),
                ("coroutine",),
            )
        )
        how: dict[str, Any] = {
            "id": name,
            "kind": chance.choice((TaskKind.OTHER, TaskKind.OBSERVER, TaskKind.SUBAGENT)),
            "close_policy": chance.choice(("keep", "cancel", "transfer")),
            "notify_on_end": chance.random() < 0.4,
        }
        if how["kind"] is TaskKind.SUBAGENT:
            how["child_session_id"] = chance.choice(SESSIONS)
        if chance.random() < 0.2:
            how["cancel_policy"] = "abort_local"
        if chance.random() < 0.05:
            how["timeout"] = 0.2
        fn: Any
        if what == "coroutine":
            fn = asyncio.sleep(pause, {"n": 1})
        else:
            fn = self._life.functions[what]
            how["idempotency_key"] = f"key {name}"
        args = {"scope": str(session.scope), "id": name, "key": how.get("idempotency_key"), "what": what}
        await self._do("spawn", args, session.spawn(fn, *words, **how), _held)

    async def _end_some(self, session: SessionTasks) -> None:
        for task in (await session.list())[:5]:
            args = {"scope": str(session.scope), "id": task.id}
            await self._do("cancel", args, session.cancel(task.id, "too many", timeout=1), _told)

    async def hidden(self) -> None:
        session = await self._session()
        if session is None:
            return
        scope = str(session.scope)
        before = {one.task_seq for one in await session.list(include_hidden=True)}
        if len(before) <= _CROWD:
            name = self._life._name()
            handle: TaskHandle | None = None
            # its id is made by the store: what came of it is known by the answer alone
            args = {"scope": scope, "label": name}
            handle = await self._do(
                "hidden",
                args,
                session.spawn_hidden(name, self._life.functions["work"], 2, 0.0),
                lambda h: {"task_seq": h.task_seq},
            )
            if handle is not None and self._chance.random() < 0.3:
                return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await self._do("await_background_work", {"scope": scope}, session.await_background_work())

    async def monitor(self) -> None:
        session = await self._session()
        if session is None:
            return
        name = self._life._name()
        spec = MonitorSpec(
            id=name,
            command="for i in 1 2 3; do echo line $i; sleep 0.05; done",
            shell=True,
            restart_on_restore=self._chance.random() < 0.5,
        )
        args = {"scope": str(session.scope), "id": f"monitor:{name}"}
        handle = await self._do("start_monitor", args, session.start_monitor(spec), _held)
        if handle is not None and self._chance.random() < 0.5:
            await asyncio.sleep(self._chance.choice((0.0, 0.05)))
            await self._do("stop_monitor", args, session.stop_monitor(name, timeout=1), _told)
        with contextlib.suppress(StoreError):
            await session.take_updates(5)

    async def external(self) -> None:
        session = await self._session()
        if session is None or len(await session.list()) > _CROWD:
            return
        name = self._life._name()
        patience = self._chance.choice((0.0, 0.0, 1.0))

        async def stop() -> None:
            await asyncio.sleep(patience)

        callback = stop if self._chance.random() < 0.6 else None
        key = f"key {name}"
        args = {"scope": str(session.scope), "id": name, "key": key}
        call = session.register(
            name,
            TaskKind.OTHER,
            callback,
            idempotency_key=key,
            notify_on_end=self._chance.random() < 0.5,
            close_policy=self._chance.choice(("keep", "cancel", "transfer")),  # type: ignore[arg-type]
        )
        await self._do("register", args, call, _held)

    # --- steering ---

    async def end_external(self) -> None:
        session = await self._session()
        if session is None:
            return
        found = [one for one in await session.list() if one.mode == "external"]
        if not found:
            return
        task, scope = self._chance.choice(found), str(session.scope)
        args = {"scope": scope, "id": task.id}

        def settled(done: Any) -> dict[str, Any]:
            return {**_told(done.record), "verdict": str(done.verdict)}

        match self._chance.randrange(4):
            case 0:
                text = f"seen by {self._life._name()}"
                await self._do("update", {**args, "text": text}, session.update(task.id, progress=text), settled)
            case 1:
                state = self._chance.choice((TaskState.RUNNING, TaskState.WAITING))
                await self._do("set_live_state", args, session.set_live_state(task.id, state), settled)
            case 2:
                await self._do("unregister", args, session.unregister(task.id))
            case 3:
                call = session.complete(task.id, TaskState.COMPLETED, result={"n": self._chance.randrange(100)})
                if self._chance.random() < 0.3:
                    call.close()
                    call = session.complete(task.id, TaskState.FAILED, failure="no luck")
                await self._do("complete", args, call, settled)

    async def cancel(self) -> None:
        session = await self._session()
        task = None if session is None else await self._one_of(session, live=self._chance.random() < 0.8)
        if session is None or task is None:
            return
        timeout = self._chance.choice((0, 0.05, 1.0))
        args = {"scope": str(session.scope), "id": task.id}
        await self._do("cancel", args, session.cancel(task.id, "no longer wanted", timeout=timeout), _told)

    async def cancel_many(self) -> None:
        session = await self._session()
        if session is None:
            return
        args = {"scope": str(session.scope)}
        if self._chance.random() < 0.5:
            await self._do(
                "cancel_all",
                args,
                session.cancel_all("all of it", timeout=0.2),
                lambda reports: {"tasks": [_told(one.record) for one in reports][:8]},
            )
        else:
            keep = [one.id for one in await session.list()][:3]
            await self._do("validate_handles", args, session.validate_handles(keep))
            call = session.cancel_unreferenced(keep)
            await self._do(
                "cancel_unreferenced", args, call, lambda found: {"tasks": [_told(one) for one in found][:8]}
            )

    async def abandon(self) -> None:
        session = await self._session()
        task = None if session is None else await self._one_of(session)
        if session is None or task is None:
            return
        args = {"scope": str(session.scope), "id": task.id}
        await self._do("abandon", args, session.abandon(task.id, "it is stuck"), _told)
        if self._is_owner:
            await self._do("recover", {}, self._store.recover())

    async def signal(self) -> None:
        session = await self._session()
        task = None if session is None else await self._one_of(session)
        if session is None or task is None or task.mode == "external":
            return
        key = f"signal {self._life._name()}"
        with contextlib.suppress(StoreError):
            handle = await session.handle(task.id)
            args = {"scope": str(session.scope), "task_seq": handle.task_seq, "key": key}
            await self._do(
                "signal",
                args,
                handle.signal("go", {"by": self._life._plan.who}, key=key),
                lambda done: {"task_seq": handle.task_seq, "verdict": str(done.verdict)},
            )

    # --- waiting and looking ---

    async def wait(self) -> None:
        session = await self._session()
        task = None if session is None else await self._one_of(session, live=self._chance.random() < 0.6)
        if session is None or task is None:
            return
        timeout = self._chance.choice((0.0, 0.05, 0.3))
        args = {"scope": str(session.scope), "id": task.id}
        with contextlib.suppress(StoreError):
            handle = await session.handle(task.id)
            if self._chance.random() < 0.6:
                await self._do("wait", args, handle.wait(timeout), _told)
            else:
                seq = handle.task_seq
                if self._chance.random() < 0.5:
                    # at its time-out an outcome is handed out even if the note of that is still to be stored
                    await self._do("result_within", args, handle.result(timeout), lambda _: {"task_seq": seq})
                else:
                    call = _within(timeout + 0.2, handle.result())
                    await self._do("result", args, call, lambda _: {"task_seq": seq})

    async def look(self) -> None:
        if self._chance.random() < 0.7:
            session = await self._session()
            task = None if session is None else await self._one_of(session, live=self._chance.random() < 0.5)
            if session is not None and task is not None:
                args = {"scope": str(session.scope), "id": task.id}
                await self._do("get", args, session.get(task.id), _told)
            return
        async with TaskStore.open_readonly(self._life._path) as reader:
            found = await reader.list()
            await self._do("list", {}, reader.list(), lambda found: {"tasks": [_told(one) for one in found][:8]})
            await reader.count()
            for task in found[:1]:
                # another process may have pruned it meanwhile
                with contextlib.suppress(TaskNotFound, TaskPruned):
                    await reader.get(task.scope, task.id) if task.mode != "hidden" else None

    async def observe(self) -> None:
        session, other = await self._session(), await self._session()
        task = None if other is None else await self._one_of(other)
        if session is None or task is None:
            return
        args = {"scope": str(session.scope), "id": None, "of": task.task_seq}
        await self._do("observe", args, session.observe(task.scope, task.id), _held)

    async def inbox(self) -> None:
        session = await self._session()
        if session is None:
            return
        try:
            claim = session.inbox(limit=5)
            taken: list[int] = []

            async def read() -> list[int]:
                async with claim as notes:
                    taken.extend(note.note_seq for note in notes)
                    await asyncio.sleep(self._chance.choice((0, 0, 0.005)))
                return taken

            await self._do("inbox", {"scope": str(session.scope)}, read(), lambda numbers: {"notes": numbers})
        except StoreError:
            return

    # --- handing over, closing ---

    async def _destination(self, source: SessionTasks) -> tuple[str, bool, SessionTasks | None]:
        """Return another session: sometimes one that nobody else will ever use."""
        if self._chance.random() < 0.4:
            name, is_new = f"next-{self._life._name()}", True
        else:
            name, is_new = self._chance.choice([one for one in SESSIONS if one != source.scope.session_id]), False
        return f"{RUNTIME}:{name}", is_new, await self._open(name)

    async def transfer(self) -> None:
        session = await self._session()
        if session is None:
            return
        to, is_new, there = await self._destination(session)
        tasks = (await session.list())[: self._chance.randrange(1, 4)]
        if there is None or not tasks:
            return
        args = {"scope": str(session.scope), "to": to, "seqs": [one.task_seq for one in tasks], "only": is_new}
        await self._do(
            "transfer",
            args,
            session.transfer(there, [one.id for one in tasks]),
            lambda moved: {"moved": [one.task_seq for one in moved][:20]},
        )

    async def handoff(self) -> None:
        session = await self._session()
        if session is None:
            return
        to, _, there = await self._destination(session)
        keep = [one.id for one in await session.list()][: self._chance.randrange(0, 3)]
        if there is None:
            return
        args = {"scope": str(session.scope), "to": to}
        name = f"handoff {self._life._name()}" if self._chance.random() < 0.7 else None
        await self._do(
            "handoff",
            args,
            session.handoff(there, keep, id=name),
            lambda done: {"handoff_id": done.id, "moved": [one.task_seq for one in done.moved][:20]},
        )

    async def close(self) -> None:
        session = await self._session()
        if session is None:
            return
        successor = None
        if self._chance.random() < 0.7:
            _, _, successor = await self._destination(session)
        args = {"scope": str(session.scope)}
        await self._do("close", args, session.close(successor=successor, timeout=0.1))
        # long enough for others to meet it closed
        await asyncio.sleep(0.002)
        await self._open(session.scope.session_id, reopen=True)

    # --- keeping ---

    async def prune(self) -> None:
        call = self._store.prune(keep_last=12, unread=self._chance.random() < 0.5)
        await self._do("prune", {}, call, lambda done: {"pruned": done.tasks})

    async def keep(self) -> None:
        if self._chance.random() < 0.5:
            await self._do("check", {}, self._store.check(), _errors)
        else:
            target = Path(f"{self._life._path}.backup-{self._life._name()}")
            await self._do("backup", {"to": target.name}, self._store.backup(target))

    async def clock(self) -> None:
        """Step this process' clock; order must not depend on it."""
        self._life._clock = self._chance.choice((-3600.0, 0.0, 3600.0))
        self._life._say("N", self._life._plan.who, "clock")


# --- faults that a control plants, to see that the campaign finds them ------------------------------------------------


def _acknowledge_early() -> None:
    """Answer every other unit before its commit, which then may never come."""
    original = commit.Committer._end
    chance = random.Random(1)

    def end(self: Any, tx: Any, *, wrote: bool) -> Any:
        if wrote and chance.random() < 0.2:
            tx.connection.execute("ROLLBACK")
            return None
        return original(self, tx, wrote=wrote)

    commit.Committer._end = end  # type: ignore[method-assign]


_FAULTS: dict[str, Callable[[], None]] = {"acknowledges early": _acknowledge_early}
