"""
Sessions against the reference model: Hypothesis makes up what callers do, crashes included, and every row is compared.

About 10 seconds by default. The campaign: ``python -m tests.model``. A failure prints the story, made as short as it gets.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import shutil
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition

from lash_store import (
    Backoff,
    CancelPolicy,
    ClosePolicy,
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
    guards,
)
from lash_store.lifecycle import JSON_COLUMNS, TERMINAL_EVENTS, fold
from tests.runtime.clocks import Wall
from tests.runtime.model import BEGUN, RETRY_AFTER, ByHandle, ById, Happened, Model, Ref, Refused, Task
from tests.runtime.support import RUNTIME, hold, put_out

T = TypeVar("T")

MAX_RUNNING = 2
SESSIONS = {"s1": None, "s2": None, "kid": "s1"}
"""Each with its parent."""

HOUR = 3600.0
FOREVER = 1000 * HOUR
PATIENCE = 60.0
"""Seconds after which a request has hung: only a wrong store ever waits so long."""

ROUNDS = 12
"""Round trips through the writer after which nothing moves any more: a body needs a fraction of one to react."""


# --- one life of a store --------------------------------------------------------------------------------------------


class Life:
    """One owner: a store in an event loop of its own, and what its bodies and callbacks wait for."""

    def __init__(self, path: Path, *, knows: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self.errors: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self.store = self.make(path)
        self.sessions: dict[str, SessionTasks] = {}
        self.desks: defaultdict[int, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self.hanging: dict[int, asyncio.Future[str]] = {}
        self.coroutines: dict[int, Coroutine[Any, Any, Any]] = {}
        if knows:
            self.learn()
        self.run(self.store.open())

    def make(self, path: Path) -> TaskStore:
        """Make the store."""
        return TaskStore(path, runtime=RUNTIME, durability="normal", max_running=MAX_RUNNING, cancel_grace=FOREVER)

    def run(self, work: Awaitable[T]) -> T:
        """Let the loop go on until something is done."""

        async def bounded() -> T:
            async with asyncio.timeout(PATIENCE):
                return await work

        return self.loop.run_until_complete(bounded())

    def learn(self) -> None:
        """Register the functions of the tasks."""
        self.store.task(recovery=Recovery.RERUN, name="again", max_attempts=2)(self.again)
        self.store.task(recovery=Recovery.OWNER_BOUND, name="once")(self.once)
        pause = Backoff(initial=RETRY_AFTER * HOUR, factor=1.0, maximum=RETRY_AFTER * HOUR, jitter=0.0)
        self.store.task(recovery=Recovery.RERUN, name="retried", max_attempts=3, retry_on=(ValueError,), backoff=pause)(
            self.retried
        )

    def close(self) -> None:
        """Close in order."""
        self.run(self.store.close())
        self.loop.close()

    def die(self) -> Callable[[], None]:
        """Let nothing of this owner ever run again, as a killed process would; return what sweeps up its remains."""
        core = self.store._core
        assert core is not None
        # a process takes its threads and descriptors with it
        parts = [part for part in (core.writer, core.reader) if part is not None]
        remains = [(part._connection, part._identity) for part in parts]
        self.loop.set_exception_handler(lambda _, context: None)
        self.loop.close()
        # whom the garbage collector still wakes, it wakes for nothing
        self.loop.call_soon = lambda *_, **__: None  # type: ignore[assignment, method-assign]
        asyncio.run(self.store.close())

        def sweep() -> None:
            for connection, _ in remains:
                if connection is not None:
                    put_out(connection)
            for _, identity in remains:
                if identity is not None:
                    guards.let_go(identity)

        return sweep

    # --- bodies ---

    async def again(self, task: TaskContext, key: int, how: str) -> Any:
        return await self.body(key, how, task)

    async def retried(self, task: TaskContext, key: int, how: str) -> Any:
        return await self.body(key, how, task)

    async def once(self, task: TaskContext, key: int, how: str) -> Any:
        return await self.body(key, how, task)

    async def body(self, key: int, how: str, task: TaskContext | None = None) -> Any:
        """Do as the desk says, and, when asked or made to stop, as *how* says."""
        word: Any = None
        while callable(word) or word is None:
            try:
                word = await self._next_word(self.desks[key], None if how == "ignore" else task)
            except asyncio.CancelledError:
                if how == "win":
                    return "won"
                raise
            if callable(word):
                await word()
        match how if word == "asked to stop" else word:
            case "win":
                return "won"
            case "return":
                return "done"
            case "fail":
                raise RuntimeError("could not tidy up")
            case "raise":
                raise ValueError("broken")
            case "die":
                raise SystemExit(3)
            case "stop" | "cancel":
                raise asyncio.CancelledError
        raise AssertionError(word)

    async def _next_word(self, desk: asyncio.Queue[Any], task: TaskContext | None) -> Any:
        if task is None:
            return await desk.get()
        word, asked = asyncio.ensure_future(desk.get()), asyncio.ensure_future(task.cancelled())
        try:
            await asyncio.wait({word, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
            if not word.done():
                word.cancel()
        return word.result() if word.done() and not word.cancelled() else "asked to stop"

    async def inside(self, key: int, work: Callable[[], Awaitable[T]]) -> T:
        """Do something in a body."""
        done: asyncio.Future[T] = self.loop.create_future()

        async def do() -> None:
            try:
                done.set_result(await work())
            except Exception as error:
                done.set_exception(error)

        self.desks[key].put_nowait(do)
        return await done

    def callback(self, called: str) -> tuple[Callable[[], Coroutine[Any, Any, None]], asyncio.Future[str]]:
        """A cancel callback, and what it waits for if it hangs."""
        gate: asyncio.Future[str] = self.loop.create_future()

        async def call() -> None:
            if (await gate if called == "hangs" else called) == "raises":
                raise RuntimeError("nobody answers")

        return call, gate


# --- what is compared -----------------------------------------------------------------------------------------------


class Eye:
    """Looks at one file again and again: what nobody has written to is not read twice, and of events only those that came."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self.close()

    def close(self) -> None:
        """Forget everything: the next look reads all there is."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._version = -1
        self._seen: dict[str, Any] = {}
        self._last_event = 0
        self._stories: defaultdict[int | None, list[sqlite3.Row]] = defaultdict(list)
        self._checked: dict[int, tuple[Any, int, dict[str, Any]]] = {}

    def look(self) -> dict[str, Any]:
        """Return what the model speaks of; each task's events give its row, or this fails."""
        if self._connection is None:
            self._connection = sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
        # a change of what others have written, and nothing else, changes this
        version = self._connection.execute("PRAGMA data_version").fetchone()[0]
        if version != self._version:
            self._connection.execute("BEGIN")
            try:
                self._seen = self._read(self._connection)
            finally:
                self._connection.execute("COMMIT")
            self._version = version
        return self._seen

    def _read(self, connection: sqlite3.Connection) -> dict[str, Any]:
        def read(sql: str, *parameters: Any) -> list[sqlite3.Row]:
            return connection.execute(sql, parameters).fetchall()

        seen: dict[str, Any] = {}
        for event in read("SELECT * FROM events WHERE seq > ? ORDER BY seq", self._last_event):
            self._stories[event["task_seq"]].append(event)
            self._last_event = event["seq"]
        for row in read("SELECT * FROM tasks ORDER BY task_seq"):
            seen |= self._task(row, self._stories[row["task_seq"]])
        seen["events of sessions"] = [
            (event["type"], _session(event["scope"]), _session(event["from_scope"] or ":") or None)
            for event in self._stories[None]
        ]
        for number, row in enumerate(read("SELECT * FROM handles ORDER BY handle_seq")):
            seen[f"handle {number}"] = (
                _session(row["scope"]),
                row["task_seq"],
                row["role"],
                "read" if row["read_at"] else "unread",
            )
        for row in read("SELECT * FROM sessions"):
            parent = None if row["parent"] is None else _session(row["parent"])
            open_or_closed = "open" if row["closed_at"] is None else "closed"
            seen[f"session {row['session_id']}"] = (parent, open_or_closed, bool(row["sync_needed"]))
        for row in read("SELECT * FROM inbox"):
            seen[f"note {row['key']}"] = (
                _session(row["scope"]),
                "acknowledged" if row["acknowledged_at"] else "unread",
            )
        seen["handoffs"] = [
            (_session(row["source"]), _session(row["destination"]), row["handoff_id"] if row["is_named"] else None)
            for row in read("SELECT * FROM handoffs ORDER BY handoff_seq")
        ]
        return seen

    def _task(self, row: sqlite3.Row, story: list[sqlite3.Row]) -> dict[str, Any]:
        seq, columns = row["task_seq"], tuple(row)
        before = self._checked.get(seq)
        if before is not None and before[:2] == (columns, len(story)):
            return before[2]
        _check_story(row, story)
        shown = {f"task {seq}: {name}": value for name, value in _task(row).items()}
        shown[f"task {seq}: events"] = [
            Happened(
                event["type"], _session(event["scope"]), event["attempt"], _session(event["from_scope"] or ":") or None
            )
            for event in story
        ]
        self._checked[seq] = (columns, len(story), shown)
        return shown


def in_file(path: Path) -> dict[str, Any]:
    """Read what the model speaks of, all of it."""
    eye = Eye(path)
    try:
        return eye.look()
    finally:
        eye.close()


def in_model(model: Model) -> dict[str, Any]:
    """Say what the file should hold, in the same words."""
    state = model.state
    seen: dict[str, Any] = {}
    for task in state.tasks:
        seen |= {f"task {task.seq}: {name}": value for name, value in _expected(task).items()}
        seen[f"task {task.seq}: events"] = task.events
    seen["events of sessions"] = state.session_events
    for number, handle in enumerate(state.handles):
        seen[f"handle {number}"] = (handle.scope, handle.seq, handle.role, "read" if handle.read else "unread")
    for name, session in state.sessions.items():
        seen[f"session {name}"] = (session.parent, "closed" if session.closed else "open", session.sync)
    for note in state.notes:
        seen[f"note {note.key}"] = (note.scope, "acknowledged" if note.acknowledged else "unread")
    seen["handoffs"] = [(one.source, one.destination, one.id) for one in state.handoffs]
    return seen


def _task(row: sqlite3.Row) -> dict[str, Any]:
    plain = (
        "id", "mode", "kind", "recovery", "state", "cancel_policy", "attempt", "attempts_spent", "owner_id", "parent_seq",
        "child_session_id", "close_policy", "idempotency_key", "cancel_reason", "progress", "fraction",
    )  # fmt: skip
    return {name: row[name] for name in plain} | {
        "scope": _session(row["scope"]),
        "function": row["function"] is not None,
        "notify_on_end": bool(row["notify_on_end"]),
        "has_callback": bool(row["has_callback"]),
        "callback begun": row["callback_begun_at"] is not None,
        "callback failed": row["callback_error"] is not None,
        "result": None if row["result"] is None else json.loads(row["result"]),
        "failure": None if row["failure"] is None else json.loads(row["failure"])["type"],
        "evidence": row["evidence"] is not None,
        "has a deadline": row["deadline"] is not None,
        "waits for its time": row["not_before"] is not None,
        "cancel was requested": row["cancel_requested_at"] is not None,
    }


def _expected(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "mode": task.mode,
        "kind": task.kind,
        "recovery": task.recovery,
        "state": task.state,
        "cancel_policy": task.policy,
        "attempt": task.attempt,
        "attempts_spent": task.spent,
        "owner_id": task.owner,
        "parent_seq": task.parent,
        "child_session_id": task.child,
        "close_policy": task.close_policy,
        "idempotency_key": task.key,
        "cancel_reason": task.reason,
        "progress": task.progress,
        "fraction": task.fraction,
        "scope": task.scope,
        "function": task.function and not task.external,
        "notify_on_end": task.notify,
        "has_callback": task.has_callback,
        "callback begun": task.begun,
        "callback failed": task.callback_failed,
        "result": task.result,
        "failure": task.failure,
        "evidence": task.state == "abandoned",
        "has a deadline": task.deadline is not None,
        "waits for its time": task.not_before is not None,
        "cancel was requested": task.asked,
    }


def _session(scope: str) -> str:
    return scope.partition(":")[2]


def _check_story(row: sqlite3.Row, events: Sequence[sqlite3.Row]) -> None:
    """Events give their row, and after the end of a task only a transfer follows."""
    story = [{**dict(event), "data": json.loads(event["data"])} for event in events]
    plain = {
        name: json.loads(value) if name in JSON_COLUMNS and value is not None else value
        for name, value in dict(row).items()
    }
    assert fold(story) == plain, f"the events of task {row['task_seq']} do not give its row"
    types = [event["type"] for event in events]
    ends = [place for place, type in enumerate(types) if type in TERMINAL_EVENTS]
    assert [types[place] for place in ends] == ([row["state"]] if row["completed_at"] is not None else [])
    assert not ends or set(types[ends[0] + 1 :]) <= {"transferred"}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Say where the file is not as the model has it."""
    lines = []
    # mostly all is the same, and this runs more often than anything else here
    unlike = [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]
    for name in sorted(unlike):
        here, there = found.get(name), expected.get(name)
        if name.endswith(": events") and here is not None and there is not None:
            here, there = _same_words(here, there)
        if here != there:
            lines.append(f"{name}: the file has {here!r}, the model {there!r}")
    return lines


def _same_words(found: list[Happened], expected: list[Happened]) -> tuple[list[Happened], list[Happened]]:
    if len(found) != len(expected):
        return found, expected
    open_words = [
        one if wanted.type != BEGUN or one.type not in {"started", "reattached"} else one._replace(type=BEGUN)
        for one, wanted in zip(found, expected, strict=True)
    ]
    return open_words, expected


# --- what callers do ------------------------------------------------------------------------------------------------

_sessions = st.sampled_from(list(SESSIONS))
_ids = st.sampled_from(["a", "b", "c", "d"])
_which = st.integers(0, 11)
_forms = st.sampled_from(["id", "handle", "json", "object", "observer"])
_refs = st.tuples(_which, _forms)
_kept = st.lists(_refs, max_size=3)
_maybe_refs = st.none() | st.none() | _refs
_hows = st.sampled_from(["stop", "win", "fail", "ignore", "ignore"])
_close_policies = st.sampled_from(["keep", "cancel", "transfer"])
_words = st.sampled_from(["return", "raise", "die", "cancel"])
_reasons = st.sampled_from([None, "enough", "too slow"])


_spawns = {
    "scope": _sessions,
    "task_id": _ids,
    "kind": st.sampled_from(["rerun", "rerun", "owner_bound", "bare", "retried"]),
    "how": _hows,
    "deadline": st.sampled_from([None, 0.5, 1.5]),
    "policy": st.sampled_from(["cooperative", "cooperative", "abort_local"]),
    "parent": _maybe_refs,
    "child": st.none() | _sessions,
    "close_policy": _close_policies,
    "notify": st.booleans(),
}
_hidden_spawns = {
    "scope": _sessions,
    "kind": st.sampled_from(["rerun", "owner_bound", "bare", "retried"]),
    "how": _hows,
    "inside": st.none() | _which,
}
_registers = {
    "scope": _sessions,
    "task_id": _ids,
    "kind": st.sampled_from(["other", "other", "subagent"]),
    "called": st.sampled_from([None, "returns", "raises", "hangs"]),
    "parent": _maybe_refs,
    "child": st.none() | _sessions,
    "close_policy": _close_policies,
    "key": st.sampled_from([None, None, "k1", "k2"]),
    "notify": st.booleans(),
}
WORKS = st.one_of(
    st.fixed_dictionaries({"verb": st.just("spawn"), **_spawns}),
    st.fixed_dictionaries({"verb": st.just("spawn_hidden"), **_hidden_spawns}),
    st.fixed_dictionaries({"verb": st.just("register"), **_registers}),
)


STEPS: Counter[str] = Counter()
"""How often each rule was followed, by all machines of this process."""


def rule(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a rule, and count its steps."""

    def counted(method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def step(self: Any, *args: Any, **kwargs: Any) -> None:
            STEPS[method.__name__] += 1
            method(self, *args, **kwargs)

        return stateful.rule(**strategies)(step)

    return counted


def there_is(what: Callable[[Sessions], object]) -> Callable[[T], T]:
    """Say what a rule needs; without it, the step would be lost."""
    return precondition(lambda self: self.life is not None and bool(what(self)))


class Sessions(RuleBasedStateMachine):
    """Some sessions of one file, driven through the API and compared with the model after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="lash-store-model-"))
        self.path = self.folder / "agent.db"
        shutil.copy(_empty_file(), self.path)
        self.model = self._make_model()
        self.keys: dict[int, int] = {}
        self.last_key = 0
        self.eye = Eye(self.path)
        self.graves: list[Callable[[], None]] = []
        self.life: Life | None = None
        self.is_whole = True
        self.wall = Wall()
        self.wall.hang()

    @initialize(works=st.lists(WORKS, min_size=3, max_size=9))
    def begin(self, works: list[dict[str, Any]]) -> None:
        self._open(knows=True)
        for work in works:
            verb = {"spawn": self.spawn, "spawn_hidden": self.spawn_hidden, "register": self.register}[work["verb"]]
            verb(**{name: value for name, value in work.items() if name != "verb"})

    def teardown(self) -> None:
        try:
            if self.life is None or self.life.loop.is_closed():
                return
            if self.is_whole:
                self._stop_in_order()
            else:
                for coroutine in self.life.coroutines.values():
                    coroutine.close()
                self.graves.append(self.life.die())
        finally:
            self.wall.take_down()
            self.eye.close()
            for sweep in self.graves:
                sweep()
            shutil.rmtree(self.folder)

    # --- work ---

    @rule(**_spawns)
    def spawn(
        self,
        scope: str,
        task_id: str,
        kind: str,
        how: str,
        deadline: float | None,
        policy: str,
        parent: tuple[int, str] | None,
        child: str | None,
        close_policy: str,
        notify: bool,
    ) -> None:
        self._to_create()
        key, columns = self._body_columns(kind, how, policy)
        parent_ref = None if parent is None else self._ref(scope, parent)
        above = None if parent_ref is None else self._given(parent_ref)
        child = None if child == scope else child

        async def real() -> TaskHandle:
            return await self._session(scope).spawn(
                *self._call(kind, key, how),
                id=task_id,
                parent=above,
                child_session_id=child,
                cancel_policy=CancelPolicy(columns["policy"]),
                close_policy=ClosePolicy(close_policy),
                deadline=None if deadline is None else deadline * HOUR,
                notify_on_end=notify,
            )

        done = self._do(
            lambda: self.model.spawn(
                scope,
                task_id,
                parent_ref,
                deadline=None if deadline is None else self.model.state.now + deadline,
                child=child,
                close_policy=close_policy,
                notify=notify,
                mode="managed",
                **columns,
            ),
            real,
        )
        if done is not None:
            self._born(*done, key)

    @rule(**_hidden_spawns)
    def spawn_hidden(self, scope: str, kind: str, how: str, inside: int | None) -> None:
        self._to_create()
        key, columns = self._body_columns(kind, how, "cooperative")
        bodies = sorted(self.model.state.bodies)
        body = bodies[inside % len(bodies)] if bodies and inside is not None else None
        placeholder = f"hidden {key}"

        async def spawn() -> TaskHandle:
            return await self._session(scope).spawn_hidden("warm up", *self._call(kind, key, how))

        async def real() -> TaskHandle:
            handle = await (spawn() if body is None else self._life.inside(self.keys[body], spawn))
            # nobody else can name it
            self.model.task(handle.task_seq).id = handle.id
            return handle

        done = self._do(lambda: self.model.spawn(scope, placeholder, None, inside=body, mode="hidden", **columns), real)
        if done is not None:
            self._born(*done, key)

    @rule(**_registers)
    def register(
        self,
        scope: str,
        task_id: str,
        kind: str,
        called: str | None,
        parent: tuple[int, str] | None,
        child: str | None,
        close_policy: str,
        key: str | None,
        notify: bool,
    ) -> None:
        self._to_create()
        parent_ref = None if parent is None else self._ref(scope, parent)
        above = None if parent_ref is None else self._given(parent_ref)
        child = None if child == scope else child
        callback, gate = (None, None) if called is None else self._life.callback(called)

        async def real() -> TaskHandle:
            return await self._session(scope).register(
                task_id,
                TaskKind(kind),
                callback,
                parent=above,
                child_session_id=child,
                close_policy=ClosePolicy(close_policy),
                idempotency_key=key,
                notify_on_end=notify,
            )

        done = self._do(
            lambda: self.model.register(
                scope,
                task_id,
                parent_ref,
                kind=kind,
                has_callback=called is not None,
                called=called,
                child=child,
                close_policy=close_policy,
                key=key,
                notify=notify,
            ),
            real,
        )
        if done is not None:
            (task, is_bound), handle = done
            assert (handle.task_seq, handle.id) == (task.seq, task_id)
            if is_bound and gate is not None and called == "hangs":
                self._life.hanging[task.seq] = gate

    @there_is(lambda self: self.model.state.bodies)
    @rule(which=_which, word=_words)
    def let_a_body_end(self, which: int, word: str) -> None:
        self._let_end(which, word)

    @there_is(lambda self: self.model.state.bodies)
    @rule(which=_which)
    def let_a_body_fail(self, which: int) -> None:
        self._let_end(which, "raise")

    def _let_end(self, which: int, word: str) -> None:
        bodies = sorted(self.model.state.bodies)
        seq = bodies[which % len(bodies)]

        async def real() -> None:
            self._life.desks[self.keys[seq]].put_nowait(word)

        self._do(lambda: self.model.finish(seq, word), real)

    @there_is(lambda self: self._begun())
    @rule(which=_which, word=st.sampled_from(["returns", "raises"]))
    def let_a_callback_end(self, which: int, word: str) -> None:
        begun = self._begun()
        self._end_callback(begun[which % len(begun)], word)

    @there_is(lambda self: any(task.external for task in self.model))
    @rule(which=_refs, astray=st.none() | _sessions, state=st.sampled_from(["completed", "failed", "cancelled"]))
    def complete(self, which: tuple[int, str], astray: str | None, state: str) -> None:
        scope, ref = self._target(which, astray, external=True)
        outcome: dict[str, Any] = {"completed": {"result": "done"}, "failed": {"failure": "broken"}}.get(state, {})
        given = self._given(ref)
        self._change(
            lambda: self.model.complete(scope, ref, state),
            lambda: self._session(scope).complete(given, TaskState(state), **outcome),
        )

    @there_is(lambda self: any(task.external and task.live for task in self.model))
    @rule(which=_refs, astray=st.none() | _sessions)
    def unregister(self, which: tuple[int, str], astray: str | None) -> None:
        scope, ref = self._target(which, astray, external=True)
        given = self._given(ref)
        self._do(lambda: self.model.unregister(scope, ref), lambda: self._session(scope).unregister(given))

    @there_is(lambda self: any(task.external for task in self.model))
    @rule(which=_refs, astray=st.none() | _sessions, state=st.sampled_from(["running", "waiting"]))
    def flip(self, which: tuple[int, str], astray: str | None, state: str) -> None:
        scope, ref = self._target(which, astray, external=True)
        given = self._given(ref)
        self._change(
            lambda: self.model.flip(scope, ref, state),
            lambda: self._session(scope).set_live_state(given, TaskState(state)),
        )

    @there_is(lambda self: self.model.live())
    @rule(
        which=_refs,
        astray=st.none() | _sessions,
        progress=st.sampled_from([None, "half", "most"]),
        fraction=st.sampled_from([None, 0.5, 1.0]),
    )
    def update(self, which: tuple[int, str], astray: str | None, progress: str | None, fraction: float | None) -> None:
        scope, ref = self._target(which, astray)

        given = self._given(ref)
        self._change(
            lambda: self.model.update(scope, ref, progress, fraction),
            lambda: self._session(scope).update(given, progress=progress, fraction=fraction),
        )

    # --- stopping ---

    @there_is(lambda self: self.model.live())
    @rule(which=_refs, astray=st.none() | st.none() | _sessions, reason=_reasons)
    def cancel(self, which: tuple[int, str], astray: str | None, reason: str | None) -> None:
        scope, ref = self._target(which, astray)
        given = self._given(ref)
        self._cancel(scope, ref, reason, lambda timeout: self._session(scope).cancel(given, reason, timeout=timeout))

    @there_is(lambda self: self.model.live())
    @rule(which=_refs, reason=_reasons)
    def cancel_by_handle(self, which: tuple[int, str], reason: str | None) -> None:
        scope, ref = self._target(which, None)
        if self.model.look_up(scope, ref) is None:
            return
        handle = self._life.run(self._session(scope).handle(self._given(ref)))
        self._cancel(scope, ref, reason, lambda timeout: handle.cancel(reason, timeout=timeout))

    @there_is(lambda self: self.model.live())
    @rule(scope=_sessions, reason=_reasons)
    def cancel_all(self, scope: str, reason: str | None) -> None:
        asked = [task.seq for task in self.model.live(scope)]

        async def real() -> Any:
            goes_on = any(self._goes_on(self.model.task(seq)) for seq in asked)
            return await self._session(scope).cancel_all(reason, timeout=0.0 if goes_on else None)

        done = self._do(lambda: self.model.cancel_all(scope, reason), real)
        assert done is not None
        seqs, reports = done
        assert [report.record.task_seq for report in reports] == seqs

    @there_is(lambda self: self.model.live())
    @rule(which=_refs, astray=st.none() | st.none() | _sessions)
    def abandon(self, which: tuple[int, str], astray: str | None) -> None:
        scope, ref = self._target(which, astray)

        given = self._given(ref)
        done = self._do(lambda: self.model.abandon(scope, ref), lambda: self._session(scope).abandon(given, "stuck"))
        if done is not None:
            task, record = done
            assert record.task_seq == task.seq

    # --- handing over ---

    @there_is(lambda self: self.model.state.tasks)
    @rule(source=_sessions, destination=_sessions, kept=_kept)
    def transfer(self, source: str, destination: str, kept: list[tuple[int, str]]) -> None:
        refs = [self._ref(source, one) for one in kept]

        given = self._all_given(refs)
        done = self._do(
            lambda: self.model.transfer(source, destination, refs),
            lambda: self._session(source).transfer(self._session(destination), given),
        )
        if done is not None:
            seqs, records = done
            assert sorted(record.task_seq for record in records) == sorted(seqs)
            assert {record.scope.session_id for record in records} <= {destination}

    @there_is(lambda self: self.model.live())
    @rule(
        source=_sessions,
        destination=_sessions,
        kept=_kept,
        given=st.sampled_from([None, "h1", "h2"]),
        twice=st.booleans(),
    )
    def handoff(
        self, source: str, destination: str, kept: list[tuple[int, str]], given: str | None, twice: bool
    ) -> None:
        if source == destination:
            return
        refs = [self._ref(source, one) for one in kept]

        names = self._all_given(refs)
        for _ in range(2 if twice else 1):
            done = self._do(
                lambda: self.model.handoff(source, destination, refs, given),
                lambda: self._session(source).handoff(self._session(destination), names, id=given),
            )
            if done is not None:
                expected, handed = done
                assert sorted(record.task_seq for record in handed.moved) == sorted(expected.moved)
                assert expected.cancelled <= {record.task_seq for record in handed.cancelled}

    @there_is(lambda self: self.model.live())
    @rule(scope=_sessions, kept=_kept)
    def cancel_unreferenced(self, scope: str, kept: list[tuple[int, str]]) -> None:
        refs = [self._ref(scope, one) for one in kept]

        given = self._all_given(refs)
        done = self._do(
            lambda: self.model.cancel_unreferenced(scope, refs),
            lambda: self._session(scope).cancel_unreferenced(given),
        )
        if done is not None:
            seqs, records = done
            assert seqs <= {record.task_seq for record in records}

    @there_is(lambda self: self.model.state.tasks)
    @rule(scope=_sessions, which=_which, astray=st.none() | _sessions)
    def observe(self, scope: str, which: int, astray: str | None) -> None:
        self._to_create()
        pool = self._pool()
        task = pool[which % len(pool)]
        of, task_id = astray or task.scope, task.id
        done = self._do(
            lambda: self.model.observe(scope, of, task_id),
            lambda: self._session(scope).observe(self._session(of), task_id),
        )
        if done is not None:
            number, handle = done
            assert handle.handle_id == self._handle_ids()[number]

    # --- sessions ---

    @there_is(lambda self: not all(one.closed for one in self.model.state.sessions.values()))
    @rule(scope=_sessions, successor=st.none() | _sessions)
    def close(self, scope: str, successor: str | None) -> None:
        to = None if successor is None else self._session(successor)
        done = self._do(
            lambda: self.model.close(scope, successor),
            lambda: self._session(scope).close(successor=to, timeout=0),
        )
        if done is not None:
            (moved, cancelled), report = done
            assert sorted(record.task_seq for record in report.transferred) == sorted(moved)
            assert cancelled <= {record.task_seq for record in report.cancelled}

    @there_is(lambda self: any(one.closed for one in self.model.state.sessions.values()))
    @rule(scope=_sessions)
    def reopen(self, scope: str) -> None:
        self._to_create()
        self._do(
            lambda: self.model.open_session(scope, reopen=True), lambda: self._life.store.session(scope, reopen=True)
        )

    # --- being told ---

    @there_is(lambda self: self._untold())
    @rule(which=_refs)
    def await_a_result(self, which: tuple[int, str]) -> None:
        untold = self._untold()
        number = untold[which[0] % len(untold)]
        handle = self.model.state.handles[number]
        scope, task = handle.scope, self.model.task(handle.seq)
        by_id = which[1] == "id" and handle.role == "owner" and self.model.named(scope, task.id) is task
        ref = ById(task.id) if by_id else ByHandle(number, which[1])
        given = self._given(ref)

        async def real() -> str:
            handle = await self._session(scope).handle(given)
            try:
                assert await handle == task.result
            except (TaskFailed, TaskCancelled, TaskAbandoned) as outcome:
                return type(outcome).__name__.removeprefix("Task").lower()
            return "completed"

        done = self._do(lambda: self.model.read(scope, ref), real)
        assert done is not None
        assert done[0] == done[1]

    @there_is(lambda self: any(not note.acknowledged for note in self.model.state.notes))
    @rule(scope=_sessions, limit=st.sampled_from([None, 1]), fails=st.booleans())
    def read_the_inbox(self, scope: str, limit: int | None, fails: bool) -> None:
        unread = {note.key for note in self.model.unread(scope)}

        async def look() -> list[str]:
            taken: list[str] = []
            with contextlib.suppress(ZeroDivisionError):
                async with self._session(scope).inbox(limit) as notes:
                    taken = [note.key for note in notes]
                    if fails:
                        raise ZeroDivisionError
            return taken

        taken = self._life.run(look())
        assert set(taken) <= unread
        assert len(set(taken)) == len(taken) == min(len(unread), limit or len(unread))
        self.model.acknowledge(() if fails else taken)
        self._settle()

    @there_is(lambda self: any(one.sync for one in self.model.state.sessions.values()))
    @rule(scope=_sessions)
    def await_background_work(self, scope: str) -> None:
        if any(task.mode == "hidden" for task in self.model.live(scope)):
            return
        needed, failures = self.model.await_background_work(scope)

        async def real() -> Any:
            try:
                return await self._session(scope).await_background_work()
            except ExceptionGroup as group:
                return {error.task_id for error in group.exceptions if isinstance(error, TaskFailed | TaskAbandoned)}

        answer = self._life.run(real())
        assert answer == ({self.model.task(seq).id for seq in failures} or needed)
        self._settle()

    @there_is(lambda self: self.model.state.tasks)
    @rule(scope=_sessions, kept=_kept)
    def look(self, scope: str, kept: list[tuple[int, str]]) -> None:
        refs = [self._ref(scope, one) for one in kept]
        given = self._all_given(refs)

        async def real() -> Any:
            session = self._session(scope)
            listed = await session.list(include_hidden=True)
            assert [record.task_seq for record in listed] == [task.seq for task in self.model.live(scope)]
            assert {record.scope for record in listed} <= {session.scope}
            unread = sorted(note.key for note in self.model.unread(scope))
            assert sorted(note.key for note in await session.notes()) == unread
            for ref, name in zip(refs, given, strict=True):
                seen = self.model.look_up(scope, ref)
                if seen is not None:
                    assert (await session.get(name)).task_seq == seen[0].seq
            return await session.validate_handles(given)

        done = self._do(lambda: self.model.validate(scope, refs), real)
        if done is not None:
            assert {record.task_seq for record in done[1]} == set(done[0])

    # --- owners ---

    @rule(knows=st.sampled_from([True, True, True, True, False]))
    def restart(self, knows: bool) -> None:
        self._stop_in_order()
        self._open(knows=knows)

    @rule(knows=st.sampled_from([True, True, True, True, False]))
    def crash(self, knows: bool) -> None:
        self._die()
        self._open(knows=knows)

    @there_is(lambda self: any(task.owner is None and not task.external for task in self.model.live()))
    @rule()
    def recover(self) -> None:
        self._do(self.model.recover, self._life.store.recover)

    @there_is(lambda self: not self.model.state.knows)
    @rule()
    def learn(self) -> None:
        async def real() -> None:
            self._life.learn()
            await self._life.store.recover()

        self._do(self.model.learn, real)

    # --- the clock ---

    @rule(hours=st.sampled_from([1.0, 1.0, -1.0]))
    def set_the_clock(self, hours: float) -> None:
        """Set the wall clock, and have it looked at, as would be within 20 seconds."""
        self.wall.hours += hours
        self._look_at_the_clock(hours)

    def _look_at_the_clock(self, hours: float) -> None:
        core, recoverer = self._life.store._core, self._life.store._recoverer
        assert core is not None
        assert core.runner is not None
        assert recoverer is not None
        alarms = core.runner.alarms

        async def ring() -> None:
            alarms._ring()

        self._do(lambda: self.model.set_the_clock(hours), ring)
        self._do(self.model.look_at_deadlines, recoverer._look_at_deadlines)

    # --- how it is done ---

    @property
    def _life(self) -> Life:
        assert self.life is not None
        return self.life

    def _make_model(self) -> Model:
        return Model(owner=1, max_running=MAX_RUNNING)

    def _make_life(self, *, knows: bool) -> Life:
        return Life(self.path, knows=knows)

    def _to_create(self) -> None:
        """Be somebody who may create something."""

    def _session(self, scope: str) -> SessionTasks:
        return self._life.sessions[scope]

    def _open(self, *, knows: bool) -> None:
        self.model.open_owner(knows=knows)
        self.life = life = self._make_life(knows=knows)
        for scope, parent in SESSIONS.items():
            self.model.open_session(scope, parent)
            life.sessions[scope] = life.run(life.store.session(scope, parent=parent))
        self._settle()

    def _die(self) -> None:
        for task in self.model.live():
            if task.state == "pending" and not task.function and task.owner == self.model.state.owner:
                # it waited for a slot, and dies with its process
                self._life.coroutines[self.keys[task.seq]].close()
        self.eye.close()
        self.graves.append(self._life.die())
        self.life = None
        self.model.kill_owner()

    def _stop_in_order(self) -> None:
        # a close waits for callbacks that have begun
        for seq in self._begun():
            self._end_callback(seq, "returns")
        self.model.close_owner()
        self.eye.close()
        self._life.close()
        assert self._life.errors == []
        assert differences(in_file(self.path), in_model(self.model)) == []

    def _do(self, expected: Callable[[], T], real: Callable[[], Awaitable[Any]]) -> tuple[T, Any] | None:
        """Do the same to the model and to the store; None if both refused. Then compare all there is."""
        refused: Refused | None = None
        self.is_whole = False
        try:
            wanted = expected()
        except Refused as refusal:
            refused = refusal
        try:
            answer = self._life.run(real())
        except StoreError as error:
            if refused is None or type(error).__name__ not in refused.errors:
                raise
        else:
            assert refused is None, f"nothing was refused: {refused.errors}"
        self._settle()
        return None if refused is not None else (wanted, answer)

    def _change(self, expected: Callable[[], str], real: Callable[[], Awaitable[Any]]) -> None:
        done = self._do(expected, real)
        if done is not None:
            assert done[1].verdict == done[0]

    def _settle(self) -> None:
        """Compare once nothing moves any more."""
        self.is_whole = False
        expected = in_model(self.model)
        found = self._life.run(self._at_rest(expected))
        wrong = differences(found, expected)
        assert not wrong, "\n".join(wrong)
        assert self._life.errors == []
        self.is_whole = True

    async def _at_rest(self, expected: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        quiet = 0
        while quiet < ROUNDS:
            await self._life.store.session("s1")
            now = self.eye.look()
            quiet = quiet + 1 if now == found else 0
            found = now
            if quiet >= 2 and not differences(found, expected):
                break
        return found

    # --- naming ---

    def _handle_ids(self) -> list[str]:
        with contextlib.closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            return [row[0] for row in connection.execute("SELECT handle_id FROM handles ORDER BY handle_seq")]

    def _pool(self) -> list[Task]:
        """Tasks, those first that are of most interest."""
        newest = list(reversed(self.model.state.tasks))
        return sorted(newest, key=lambda task: (not task.live, task.state != "cancel_requested"))[:12]

    def _target(self, given: tuple[int, str], astray: str | None, *, external: bool = False) -> tuple[str, Ref]:
        pool = [task for task in self._pool() if task.external or not external or given[0] == 11]
        if given[1] == "observer":
            scopes = [one.scope for one in self.model.state.handles if one.role == "observer"]
            if scopes:
                scope = scopes[given[0] % len(scopes)]
                return astray or scope, self._ref(scope, given)
        if not pool:
            return "s1", ById("a")
        task = pool[given[0] % len(pool)]
        return astray or task.scope, self._named_as(task, given[1])

    def _ref(self, scope: str, given: tuple[int, str]) -> Ref:
        which, form = given
        if form == "observer":
            observers = [n for n, one in enumerate(self.model.state.handles) if (one.scope, one.role) == (scope, form)]
            if observers:
                return ByHandle(observers[which % len(observers)])
        pool = [task for task in self._pool() if task.scope == scope]
        if which == 11 or not pool:
            # mostly somebody else's, or nobody's
            others = self._pool()
            return self._named_as(others[which % len(others)], form) if others else ById("nobody")
        return self._named_as(pool[which % len(pool)], form)

    def _named_as(self, task: Task, form: str) -> Ref:
        if form in {"handle", "json", "object"}:
            return ByHandle(self.model.owner_handle(task.seq), form)
        return ById(task.id)

    def _given(self, ref: Ref) -> Any:
        """Write a reference as a caller would."""
        if isinstance(ref, ById):
            return ref.id
        handle_id = self._handle_ids()[ref.handle]
        if ref.form == "json":
            return {"__handle__": "task", "id": handle_id, "tool": "whatever"}
        if ref.form == "object":
            return self._life.run(self._session(self.model.state.handles[ref.handle].scope).handle(handle_id))
        return handle_id

    def _all_given(self, refs: Iterable[Ref]) -> list[Any]:
        return [self._given(ref) for ref in refs]

    # --- small things ---

    def _cancel(
        self, scope: str, ref: Ref, reason: str | None, cancel: Callable[[float | None], Awaitable[TaskRecord]]
    ) -> None:
        seen = self.model.look_up(scope, ref)
        seq = None if seen is None else seen[0].seq

        async def real() -> TaskRecord:
            # the model is ahead: what it has live is not waited for
            goes_on = seq is not None and self._goes_on(self.model.task(seq))
            return await cancel(0.0 if goes_on else None)

        done = self._do(lambda: self.model.cancel(scope, ref, reason), real)
        if done is not None:
            task, record = done
            assert record.task_seq == task.seq
            assert record.state == task.state or not self._is_seen_to(task)

    def _is_seen_to(self, task: Task) -> bool:
        """Whether what was asked of a task is done by the store that was asked."""
        return True

    def _untold(self) -> list[int]:
        """The handles through which an outcome could be handed out that was not yet."""
        handles = enumerate(self.model.state.handles)
        return [number for number, one in handles if not one.read and not self.model.task(one.seq).live]

    def _body_columns(self, kind: str, how: str, policy: str) -> tuple[int, dict[str, Any]]:
        self.last_key += 1
        is_bare = kind == "bare"
        return self.last_key, {
            "recovery": {"bare": "owner_bound", "retried": "rerun"}.get(kind, kind),
            "retries": kind == "retried",
            "function": not is_bare,
            "how": how,
            # nobody can ask a bare coroutine
            "policy": "abort_local" if is_bare else policy,
            "max_attempts": {"rerun": 2, "retried": 3}.get(kind, 100),
        }

    def _call(self, kind: str, key: int, how: str) -> tuple[Any, ...]:
        if kind == "bare":
            coroutine = self._life.coroutines[key] = self._life.body(key, how)
            return (coroutine,)
        functions = {"rerun": self._life.again, "retried": self._life.retried}
        return (functions.get(kind, self._life.once), key, how)

    def _born(self, task: Task, handle: TaskHandle, key: int) -> None:
        assert (handle.task_seq, handle.id) == (task.seq, task.id)
        self.keys[task.seq] = key

    def _begun(self) -> list[int]:
        """The tasks whose callbacks hang."""
        if self.life is None:
            return []
        return [seq for seq in self._life.hanging if self.model.task(seq).begun]

    def _end_callback(self, seq: int, word: str) -> None:
        gate = self._life.hanging.pop(seq)

        async def real() -> None:
            gate.set_result(word)

        self._do(lambda: self.model.let_callback_end(seq, word), real)

    def _goes_on(self, task: Task) -> bool:
        """Whether a cancel of the task would be waited for."""
        return task.live and not (task.external and task.owner is None)


@functools.cache
def _empty_file() -> Path:
    """A store without anything in it, made once: a new file costs more than all the rest of an example."""
    folder = tempfile.TemporaryDirectory(prefix="lash-store-model-")
    _folders.append(folder)
    path = Path(folder.name) / "empty.db"

    async def make() -> None:
        async with TaskStore(path, runtime=RUNTIME):
            pass

    asyncio.run(make())
    return path


_folders: list[Any] = []

COMMON: dict[str, Any] = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.timeout(900)  # a failure is made small before it is shown
class TestSessions(Sessions.TestCase):  # type: ignore[misc, valid-type]
    """A look in passing, at the same stories each time: new ones are for the campaign."""

    settings = settings(max_examples=6, stateful_step_count=35, derandomize=True, **COMMON)


# --- what it found --------------------------------------------------------------------------------------------------


async def test_what_finished_work_of_a_sub_agent_left_in_another_session_is_cancelled_with_the_sub_agent(
    store: TaskStore, session: SessionTasks
) -> None:
    inner, elsewhere = await store.session("inner"), await store.session("elsewhere")

    async def leave_something_behind() -> None:
        await elsewhere.spawn_hidden("left behind", asyncio.Event().wait())

    agent = await session.register("agent", TaskKind.SUBAGENT, child_session_id="inner")
    await (await inner.spawn(leave_something_behind())).wait()
    [left] = await elsewhere.list(include_hidden=True)

    await agent.cancel("enough")

    # its parent is of the sub-agent's session, finished or not
    assert (await elsewhere.get(left.id)).cancel_reason == "enough"


@pytest.fixture
async def left_behind(store: TaskStore, session: SessionTasks) -> tuple[TaskHandle, TaskHandle]:
    """A sub-agent, and what goes on below it by a child of a child, both finished, that came to be elsewhere each."""
    inner, elsewhere, farther = [await store.session(name) for name in ("inner", "elsewhere", "farther")]
    agent = await session.register("agent", TaskKind.SUBAGENT, child_session_id="inner")
    first = await inner.register("first", TaskKind.OTHER)
    second = await elsewhere.register("second", TaskKind.OTHER, parent=first)
    last = await farther.register("last", TaskKind.OTHER, parent=second)
    await inner.complete("first", TaskState.COMPLETED, result=1)
    await elsewhere.complete("second", TaskState.COMPLETED, result=2)
    return agent, last


async def test_what_generations_of_finished_work_left_in_other_sessions_is_cancelled_with_the_sub_agent(
    left_behind: tuple[TaskHandle, TaskHandle],
) -> None:
    agent, last = left_behind

    await agent.cancel("enough")

    assert (await last.record()).cancel_reason == "enough"


async def test_what_a_finished_sub_agent_left_elsewhere_works_for_is_cancelled_with_the_sub_agent_above(
    store: TaskStore, session: SessionTasks
) -> None:
    inner, elsewhere, deep, deeper = [await store.session(name) for name in ("inner", "elsewhere", "deep", "deeper")]
    agent = await session.register("agent", TaskKind.SUBAGENT, child_session_id="inner")
    first = await inner.register("first", TaskKind.OTHER)
    await elsewhere.register("lower", TaskKind.SUBAGENT, parent=first, child_session_id="deep")
    await deep.register("lowest", TaskKind.SUBAGENT, child_session_id="deeper")
    last = await deeper.register("last", TaskKind.OTHER)
    await inner.complete("first", TaskState.COMPLETED, result=1)
    await elsewhere.complete("lower", TaskState.COMPLETED, result=2)
    await deep.complete("lowest", TaskState.COMPLETED, result=3)

    await agent.cancel("enough")

    # by session, then by parent through what is over, then by session twice
    assert (await last.record()).cancel_reason == "enough"


async def test_what_finished_work_of_another_session_left_is_not_cancelled_with_the_sub_agent(
    store: TaskStore, session: SessionTasks, left_behind: tuple[TaskHandle, TaskHandle]
) -> None:
    _, last = left_behind
    await store.session("quiet")
    stranger = await session.register("stranger", TaskKind.SUBAGENT, child_session_id="quiet")

    await stranger.cancel("enough")

    assert not (await last.record()).is_terminal


async def test_freed_work_that_is_taken_over_again_waits_behind_the_others(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    order: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        order.append(task.id)

    await session.spawn(hold(started, release), id="first")
    waiting = [await session.spawn(work, id=task_id) for task_id in ("second", "third")]
    await session.abandon("second", "looked stuck")
    await store.recover()
    release.set()
    async with asyncio.timeout(20):
        await asyncio.gather(*waiting)

    assert order == ["third", "second"]
