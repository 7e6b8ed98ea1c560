"""Owns what a recorded store is made to do: a seeded mix of its public operations by two agents, all told to the log."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lash_store import (
    ClosePolicy,
    CommitInDoubt,
    Failure,
    Recovery,
    SessionTasks,
    StoreError,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
)
from tests.checker import outcome

if TYPE_CHECKING:
    from .record import Recorder

RUNTIME = "desktop"
SESSIONS = ("s1", "s2")


def _text_of(at: datetime | None) -> str | None:
    """Write a time as the file does."""
    return None if at is None else at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def told(record: TaskRecord) -> dict[str, Any]:
    """Return what an answer says of a task."""
    said: dict[str, Any] = {"task_seq": record.task_seq, "state": str(record.state), "attempt": record.attempt}
    if record.is_terminal:
        message = None if record.failure is None else record.failure.message
        said["digest"] = outcome(str(record.state), record.result, message, _text_of(record.completed_at))
    return said


class Workload:
    """One life's operations; *who* is its name in the log."""

    def __init__(self, recorder: Recorder, rng: random.Random, who: str, durability: Any) -> None:
        self._recorder = recorder
        self._rng = rng
        self._who = who
        self._durability = durability
        self._calls = itertools.count(1)
        self._numbers = itertools.count(1)
        self._handles: list[TaskHandle] = []
        self._external: list[tuple[str, str]] = []
        self._sessions: dict[str, SessionTasks] = {}
        self._extra = 0

    # --- asking ---

    async def _ask(
        self,
        op: str,
        args: dict[str, Any],
        asked: Callable[[], Awaitable[Any]],
        answer: Callable[[Any], dict[str, Any]] = lambda _: {},
    ) -> Any:
        """Do one operation and tell the log of it, before and after; None if it was refused."""
        call = next(self._calls)
        self._recorder.log(["S", self._who, call, op, args])
        try:
            result = await asked()
        except StoreError as error:
            self._recorder.log(["E", self._who, call, type(error).__name__, isinstance(error, CommitInDoubt)])
            return None
        self._recorder.log(["A", self._who, call, answer(result)])
        return result

    def _name(self, what: str) -> str:
        return f"{what}-{self._who}-{next(self._numbers)}"

    # --- bodies ---

    def _register(self, store: TaskStore) -> None:
        @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, max_attempts=4)
        async def worker(task: TaskContext, plan: list[str]) -> dict[str, Any]:
            return await self._body(task, plan)

        @store.task(recovery=Recovery.OWNER_BOUND)
        async def once(task: TaskContext, plan: list[str]) -> dict[str, Any]:
            return await self._body(task, plan)

        self._worker, self._once = worker, once

    async def _body(self, task: TaskContext, plan: list[str]) -> dict[str, Any]:
        seq, attempt = task.record.task_seq, task.attempt
        self._recorder.log(["B", self._who, seq, attempt])
        how = "raised"
        try:
            for number, act in enumerate(plan, 1):
                await self._act(task, seq, attempt, number, act)
            how = "returned"
            return {"attempt": attempt, "acts": len(plan)}
        except asyncio.CancelledError:
            how = "cancelled"
            raise
        finally:
            self._recorder.log(["X", self._who, seq, attempt, how])

    async def _act(self, task: TaskContext, seq: int, attempt: int, number: int, act: str) -> None:
        of = {"task_seq": seq, "scope": str(task.scope)}

        def same(_: Any) -> dict[str, Any]:
            return {"task_seq": seq}

        if act == "save":
            # a later attempt begins again, and its saves are the newer ones all the same
            at = 100 * attempt + number
            value = {"n": at, "attempt": attempt, "text": "x" * 300}
            await self._ask("save", {**of, "n": at}, lambda: task.save(value), same)
        elif act == "progress":
            text = f"attempt {attempt} act {number}"
            await self._ask("progress", {**of, "text": text}, lambda: task.progress(text, 0.5), same)
        elif act == "step":
            name = f"step{number}"
            await self._ask("step", {**of, "name": name}, lambda: task.step(name, _stepped, number), same)
        elif act == "transact":
            name = f"book{number}"
            await self._ask("transact", {**of, "name": name}, lambda: task.transact(name, _booked, number), same)
        elif act == "note":
            key = f"note-{seq}-{attempt}-{number}"
            await self._ask("notify", {**of, "key": key}, lambda: task.notify("found", {"n": number}, key=key), same)
        elif act == "child":
            name = self._name("child")
            args = {"scope": str(task.scope), "id": name}
            asked = task.spawn
            await self._ask("spawn_child", args, lambda: asked(self._worker, ["save"], id=name), _of_handle)
        elif act == "signal":
            await task.signal("go")
        elif act == "sleep":
            await task.sleep(0.01)
        elif act == "fail":
            raise RuntimeError(f"act {number} of attempt {attempt} fails")
        elif act == "retry" and attempt == 1:
            raise ConnectionError("once more")
        elif act == "hold":
            await asyncio.Event().wait()

    # --- operations ---

    async def run(self, path: Path, operations: int, dies: int | None) -> None:
        """Live: open the store, do so many operations, and die in a write of the last of them, or close."""
        store = TaskStore(path, runtime=RUNTIME, durability=self._durability, cancel_grace=0.05, max_running=6)
        self._store = store
        self._register(store)
        async with store:
            self._recorder.mark("open")
            for name in SESSIONS:
                await self._open(name)
            for record in await store.list():
                self._handles.append(await store.handle(record.scope, record.id))
            half = operations // 2
            await asyncio.gather(self._agent(half), self._agent(operations - half))
            if dies is not None:
                self._recorder.die_in = dies
                await asyncio.gather(self._agent(100), self._agent(100))
                raise AssertionError("it outlived its death")
            self._recorder.mark("closing")

    async def _open(self, name: str) -> None:
        opened = await self._ask(
            "session", {"scope": f"{RUNTIME}:{name}"}, lambda: self._store.session(name, reopen=True)
        )
        self._sessions[name] = opened

    async def _agent(self, operations: int) -> None:
        for _ in range(operations):
            names = [name.removeprefix("_do_") for name in dir(self) if name.startswith("_do_")]
            weights = [_WEIGHTS.get(name, 2) for name in names]
            [chosen] = self._rng.choices(names, weights)
            await getattr(self, f"_do_{chosen}")()

    def _session(self) -> SessionTasks:
        return self._sessions[self._rng.choice(sorted(self._sessions))]

    def _handle(self) -> TaskHandle | None:
        return self._rng.choice(self._handles) if self._handles else None

    def _plan(self, *last: str) -> list[str]:
        acts = ["save", "progress", "step", "transact", "note", "child", "sleep"]
        return [*self._rng.choices(acts, k=self._rng.randint(1, 3)), *last]

    async def _do_spawn(self) -> None:
        await self._spawn(self._worker, self._plan())

    async def _do_spawn_many(self) -> None:
        plans = [self._plan() for _ in range(self._rng.randint(3, 6))]
        await asyncio.gather(*(self._spawn(self._worker, plan) for plan in plans))

    async def _do_spawn_waiting(self) -> None:
        await self._spawn(self._worker, self._plan(self._rng.choice(["signal", "hold"])))

    async def _do_spawn_once(self) -> None:
        await self._spawn(self._once, self._plan(self._rng.choice(["signal", "hold", "save"])))

    async def _do_spawn_failing(self) -> None:
        await self._spawn(self._worker, self._plan(self._rng.choice(["fail", "retry"])))

    async def _spawn(self, function: Any, plan: list[str]) -> None:
        session, name = self._session(), self._name("task")
        policy = self._rng.choice(list(ClosePolicy)[:2])
        notify = self._rng.random() < 0.5
        handle = await self._ask(
            "spawn",
            {"scope": str(session.scope), "id": name, "key": f"key {name}"},
            lambda: session.spawn(
                function,
                plan,
                id=name,
                idempotency_key=f"key {name}",
                kind=TaskKind.SUBAGENT,
                close_policy=policy,
                notify_on_end=notify,
            ),
            _of_handle,
        )
        if handle is not None:
            self._handles.append(handle)

    async def _do_hidden(self) -> None:
        session, name = self._session(), self._name("hidden")
        args = {"scope": str(session.scope), "id": name}
        await self._ask("spawn_hidden", args, lambda: session.spawn_hidden(name, self._worker, ["save"]), _of_handle)
        await self._ask("await_hidden", args, session.await_hidden)

    async def _do_result(self) -> None:
        handle = self._handle()
        if handle is None:
            return

        async def result() -> TaskRecord | None:
            try:
                await handle.result(timeout=0.05)
            except TimeoutError:
                return None
            except (TaskFailed, TaskCancelled, TaskAbandoned):
                pass
            return await handle.record()

        args = {"scope": str(handle.scope), "task_seq": handle.task_seq}
        call = next(self._calls)
        self._recorder.log(["S", self._who, call, "result", args])
        try:
            record = await result()
        except StoreError as error:
            self._recorder.log(["E", self._who, call, type(error).__name__, False])
            return
        if record is not None and record.scope != handle.scope:
            # of a task that was given to another session no handle but the new one keeps that it was read: another question
            call = next(self._calls)
            self._recorder.log(["S", self._who, call, "outcome", args])
        if record is not None:
            self._recorder.log(["A", self._who, call, told(record)])

    async def _do_cancel(self) -> None:
        handle = self._handle()
        if handle is not None:
            args = {"scope": str(handle.scope), "task_seq": handle.task_seq}
            await self._ask("cancel", args, lambda: handle.cancel("enough", timeout=0.2), told)

    async def _do_signal(self) -> None:
        handle = self._handle()
        if handle is None:
            return
        key = self._name("signal")
        args = {"scope": str(handle.scope), "task_seq": handle.task_seq, "name": "go", "key": key}
        await self._ask(
            "signal",
            args,
            lambda: handle.signal("go", {"yes": True}, key=key),
            lambda done: {"verdict": str(done.verdict), **told(done.record)},
        )

    async def _do_external(self) -> None:
        session, name = self._session(), self._name("external")
        scope = str(session.scope)
        args = {"scope": scope, "id": name, "key": f"key {name}"}
        handle = await self._ask(
            "register",
            args,
            lambda: session.register(name, TaskKind.MONITOR, idempotency_key=f"key {name}", notify_on_end=True),
            _of_handle,
        )
        if handle is not None:
            self._external.append((scope.partition(":")[2], name))

    async def _do_update(self) -> None:
        if not self._external:
            return
        scope, name = self._rng.choice(self._external)
        session, text = self._sessions[scope], self._name("loading")
        await self._ask(
            "update",
            {"scope": str(session.scope), "id_of": name, "text": text},
            lambda: session.update(name, progress=text, fraction=0.5),
            lambda done: {"verdict": str(done.verdict), **told(done.record)},
        )

    async def _do_complete(self) -> None:
        if not self._external:
            return
        scope, name = self._external.pop(self._rng.randrange(len(self._external)))
        session = self._sessions[scope]
        state = self._rng.choice([TaskState.COMPLETED, TaskState.FAILED])
        ends: dict[str, Any] = {"result": {"pages": 3}}
        if state is TaskState.FAILED:
            ends = {"failure": Failure(type="Exit", message="1")}
        await self._ask(
            "complete",
            {"scope": str(session.scope), "id_of": name, "state": str(state)},
            lambda: session.complete(name, state, **ends),
            lambda done: {"verdict": str(done.verdict), **told(done.record)},
        )

    async def _do_transfer(self) -> None:
        source, to = self._two()
        live = [record for record in await source.list() if record.parent_seq is None][:2]
        if live:
            args = {"scope": str(source.scope), "to": str(to.scope), "seqs": [record.task_seq for record in live]}
            await self._ask("transfer", args, lambda: source.transfer(to, [record.id for record in live]), _moved)

    async def _do_handoff(self) -> None:
        source, to = self._two()
        keep = [record.id for record in await source.list() if record.parent_seq is None][:1]
        name = self._name("plan")
        args = {"scope": str(source.scope), "to": str(to.scope), "id": name}
        await self._ask(
            "handoff",
            args,
            lambda: source.handoff(to, keep, id=name),
            lambda done: {
                "handoff_id": done.id,
                "moved": [record.task_seq for record in done.moved],
                "tasks": [told(record) for record in done.cancelled],
            },
        )

    def _two(self) -> tuple[SessionTasks, SessionTasks]:
        first, second = self._rng.sample(sorted(self._sessions), 2)
        return self._sessions[first], self._sessions[second]

    async def _do_inbox(self) -> None:
        session = self._session()

        async def read() -> list[int]:
            async with session.inbox(limit=4) as notes:
                return [note.note_seq for note in notes]

        await self._ask("inbox", {"scope": str(session.scope)}, read, lambda notes: {"notes": notes})

    async def _do_observe(self) -> None:
        handle = self._handle()
        if handle is not None:
            session = self._session()
            args = {"scope": str(session.scope), "task_seq": handle.task_seq}
            await self._ask(
                "observe",
                args,
                lambda: session.observe(handle.scope, handle.id),
                lambda got: {"task_seq": got.task_seq, "handle": got.handle_id},
            )

    async def _do_cancel_all(self) -> None:
        session = self._session()
        await self._ask(
            "cancel_all",
            {"scope": str(session.scope)},
            lambda: session.cancel_all("all of it", timeout=0.2),
            lambda reports: {"tasks": [told(report.record) for report in reports]},
        )

    async def _do_close_session(self) -> None:
        """Close a session of its own, with work in it."""
        self._extra += 1
        name = f"extra-{self._who}-{self._extra}"
        scope = f"{RUNTIME}:{name}"
        extra = await self._ask("session", {"scope": scope}, lambda: self._store.session(name))
        if extra is None:
            return
        task = self._name("left")
        await self._ask(
            "spawn",
            {"scope": scope, "id": task, "key": f"key {task}"},
            lambda: extra.spawn(
                self._worker,
                ["save", "hold"],
                id=task,
                idempotency_key=f"key {task}",
                close_policy=ClosePolicy.CANCEL,
            ),
            _of_handle,
        )
        await self._ask("close", {"scope": scope}, lambda: extra.close(timeout=0.5))

    async def _do_prune(self) -> None:
        await self._ask("prune", {}, lambda: self._store.prune(keep_last=6, unread=True))

    async def _do_backup(self) -> None:
        to = Path(self._store._path).parent / f"{self._name('copy')}.db"
        await self._ask(
            "backup", {"to": str(to)}, lambda: self._store.backup(to), lambda done: {"path": str(done.path)}
        )


_WEIGHTS = {
    "spawn": 8,
    "spawn_many": 3,
    "result": 6,
    "cancel": 4,
    "signal": 4,
    "cancel_all": 1,
    "prune": 1,
    "backup": 1,
    "close_session": 1,
}


def _stepped(number: int) -> dict[str, int]:
    return {"number": number}


def _booked(db: Any, number: int) -> int:
    db.execute("CREATE TABLE IF NOT EXISTS bookings (number INTEGER)")
    db.execute("INSERT INTO bookings VALUES (?)", [number])
    return number


def _of_handle(handle: TaskHandle) -> dict[str, Any]:
    return {"task_seq": handle.task_seq}


def _moved(records: Any) -> dict[str, Any]:
    return {"moved": [record.task_seq for record in records]}
