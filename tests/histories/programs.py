"""
What worker processes do: their parts of the scripts of tasks, which all make of the same seed, with each call written down.

A part is a client: it asks one thing after the other, each after a moment. Before and after each call a line is written, with the
time of CLOCK_MONOTONIC, which is one clock for all processes of a machine.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from lash_store import (
    Recovery,
    SessionTasks,
    StoreClosed,
    StoreError,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
    Transition,
)
from tests.acceptance.processes import Report
from tests.histories.faults import FAULTS

RUNTIME = "desktop"
OWNERS = 2
"""How many of the processes own a store that runs bodies; the others only make requests."""

_BODIES = ("quick", "quick", "broken", "signalled", "held", "winning", "untidy")


class Ask(NamedTuple):
    """One call of a client, *after* so many seconds."""

    after: float
    op: str
    session: str
    to: str
    value: Any


class Script(NamedTuple):
    """What is done to one task: by each process (its place), what each of its clients asks for."""

    external: bool
    clients: dict[int, list[list[Ask]]]


def script(seed: int, number: int, processes: int) -> Script:
    """Make up what is done to a task."""
    chance = random.Random(f"{seed}/{number}")
    external = chance.random() < 0.5
    # some are lively, some hardly touched: short histories find other things than long ones
    calls = chance.randrange(6, 17)
    body = chance.choice(_BODIES)
    birth = (external, chance.random() < 0.6, "" if external else body, external and chance.random() < 0.6)
    pace = chance.choice((0.0005, 0.002, 0.006))
    # mostly it is there when the others come
    late = chance.choice((0.0, 0.05, 0.07, 0.1))
    spread = 2 if chance.random() < 0.3 else 1
    clients: dict[int, list[list[Ask]]] = {place: [[] for _ in range(spread)] for place in range(processes)}
    bear = "register" if external else "spawn"
    clients[chance.randrange(OWNERS)][0].append(Ask(0.0, bear, "a", "", birth))
    counts = iter(range(1, 1000))

    def ask() -> tuple[int, Ask]:
        place = chance.randrange(processes)
        ops = _EXTERNAL if external else _MANAGED
        op = chance.choices(list(ops), list(ops.values()))[0]
        if op == bear:
            place = chance.randrange(OWNERS)
        session = "a" if chance.random() < 0.7 else "b"
        to = "b" if session == "a" else "a"
        value: Any = None
        mark = f"{next(counts)}"
        match op:
            case "update":
                value = f"p{mark}"
            case "cancel" | "cancel_by_handle":
                value = [f"r{mark}", chance.choice((0.0, 0.004, 0.03))]
            case "wait":
                value = chance.choice((None, 0.0, 0.005, 0.03))
            case "result":
                value = chance.choice((0.0, 0.005, 0.03))
            case "set_live_state":
                value = chance.choice(("running", "waiting"))
            case "complete":
                state = chance.choice(("completed", "completed", "failed", "cancelled"))
                # sometimes two say the same
                said = chance.choice((mark, "same"))
                value = [state, {"completed": json.dumps(said), "failed": f"Failed: {said}"}.get(state)]
            case "signal":
                value = [chance.choice((None, "k1", "k2")), json.dumps(chance.choice((mark, "same")))]
            case "handoff":
                value = [chance.random() < 0.7, f"{number}-{chance.randrange(2)}"]
            case "register" | "spawn":
                value = (*birth[:3], external and chance.random() < 0.6)
        return place, Ask(chance.expovariate(1 / pace), op, session, to, value)

    for _ in range(calls - 1):
        place, one = ask()
        chance.choice(clients[place]).append(one)
    for place, parts in clients.items():
        for number, asks in enumerate(parts):
            if asks and asks[0].after:
                clients[place][number] = [asks[0]._replace(after=asks[0].after + late), *asks[1:]]
    return Script(external, clients)


_EXTERNAL = {
    "get": 4,
    "wait": 1,
    "result": 1,
    "register": 2,
    "update": 4,
    "set_live_state": 4,
    "complete": 3,
    "unregister": 1,
    "cancel": 2,
    "cancel_by_handle": 1,
    "abandon": 0.5,
    "transfer": 2,
    "handoff": 1,
}
_MANAGED = {
    "get": 4,
    "wait": 3,
    "result": 2,
    "spawn": 1,
    "update": 2,
    "signal": 3,
    "cancel": 2,
    "cancel_by_handle": 1,
    "abandon": 1,
    "transfer": 2,
    "handoff": 1,
}


# --- a process ------------------------------------------------------------------------------------------------------


async def work(
    report: Report,
    path: str,
    who: str,
    place: int,
    processes: int,
    seed: int,
    slots: int,
    commands: Connection,
    fault: str,
) -> None:
    """Open a store, and do what the harness says: ``go`` and ``sweep`` with a number of tasks, ``close``."""
    if fault:
        FAULTS[fault]()
    store, bodies = _owner(path) if place < OWNERS else (TaskStore.connect(path, runtime=RUNTIME), {})
    await store.open()
    assert store._core is not None
    report("owner", who, store._core.owner_id)
    names = [f"{slot}{letter}" for slot in range(slots) for letter in "ab"]
    sessions = dict(zip(names, await asyncio.gather(*map(store.session, names)), strict=True))
    client = _Client(report, sessions, bodies, patience=1.0 if fault else 10.0)
    report("ready", who)
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[list[Any]] = asyncio.Queue()
    loop.add_reader(commands.fileno(), lambda: orders.put_nowait(commands.recv()))
    while True:
        match await orders.get():
            case ["go", first, count]:
                scripts = [(slot, first + slot, script(seed, first + slot, processes)) for slot in range(count)]
                begun = [
                    loop.create_task(client.follow(slot, number, asks))
                    for slot, number, one in scripts
                    for asks in one.clients[place]
                ]
                # one that closes is told so in the middle
                closing = loop.create_task(orders.get())
                done = asyncio.gather(*begun)
                await asyncio.wait({closing, done}, return_when=asyncio.FIRST_COMPLETED)
                if closing.done():
                    assert closing.result() == ["close"], closing.result()
                    await store.close()
                    await done
                    report("closed", who, time.monotonic_ns())
                    return
                closing.cancel()
                await done
                report("done", who, first)
            case ["sweep", first, count]:
                await store.recover()
                await asyncio.gather(*(client.sweep(slot, first + slot) for slot in range(count)))
                report("swept", who, first)
            case ["close"]:
                await store.close()
                report("closed", who, time.monotonic_ns())
                return


def _owner(path: str) -> tuple[TaskStore, dict[bool, Any]]:
    """Make a store, and give the body of what may run again, and of what may not."""
    store = TaskStore(
        path, runtime=RUNTIME, durability="normal", max_running=10, cancel_grace=0.004, callback_timeout=5.0
    )

    async def body(task: TaskContext, how: str, pause: float) -> Any:
        match how:
            case "quick":
                await asyncio.sleep(pause)
                return [task.attempt]
            case "broken":
                await asyncio.sleep(pause)
                raise ValueError(str(task.attempt))
            case "signalled":
                return await task.signal("go")
            case "held":
                await asyncio.Event().wait()
        try:
            await task.cancelled()
        except asyncio.CancelledError:
            if task.stop_reason != "cancel":
                raise
        if task.stop_reason != "cancel":
            raise asyncio.CancelledError
        if how == "untidy":
            raise RuntimeError("untidy")
        return "won"

    async def once(task: TaskContext, how: str, pause: float) -> Any:
        return await body(task, how, pause)

    store.task(recovery=Recovery.RERUN, name="again")(body)
    store.task(recovery=Recovery.OWNER_BOUND)(once)
    return store, {True: body, False: once}


class _Client:
    """Makes calls of one process, and writes each down."""

    def __init__(
        self, report: Report, sessions: dict[str, SessionTasks], bodies: dict[bool, Any], *, patience: float
    ) -> None:
        self._report = report
        self._patience = patience
        self._sessions = sessions
        self._bodies = bodies
        self._calls = 0

    async def follow(self, slot: int, number: int, asks: list[Ask]) -> None:
        """Do the part of a script."""
        for one in asks:
            await asyncio.sleep(one.after)
            if await self._call(slot, number, one) == "StoreClosed":
                return

    async def sweep(self, slot: int, number: int) -> None:
        """End what is left of a task, and look at it for the last time."""
        for session in "ab":
            if await self._call(slot, number, Ask(0.0, "get", session, "", None)) in _OVER:
                continue
            words = [f"swept {session}", self._patience]
            if await self._call(slot, number, Ask(0.0, "cancel", session, "", words)) not in _OVER:
                # nobody is there to be called back
                await self._call(slot, number, Ask(0.0, "unregister", session, "", None))
            await self._call(slot, number, Ask(0.0, "get", session, "", None))

    async def _call(self, slot: int, number: int, one: Ask) -> str:
        """Make a call between two lines; return the state or the error that it gave."""
        self._calls += 1
        call = self._calls
        self._report("S", call, time.monotonic_ns(), number, one.op, one.session, one.to, one.value)
        try:
            answer = await self._ask(slot, number, one)
        except StoreError as error:
            answer = {"error": type(error).__name__}
        except TimeoutError:
            answer = {"error": "TimeoutError"}
        told = time.monotonic_ns()
        if answer.get("error") != StoreClosed.__name__ and (one.op, answer) != ("wait", {"error": "TimeoutError"}):
            self._report("A", call, told, answer)
        return str(answer.get("error") or answer.get("state"))

    async def _ask(self, slot: int, number: int, one: Ask) -> dict[str, Any]:
        here, there = self._sessions[f"{slot}{one.session}"], self._sessions.get(f"{slot}{one.to}")
        task_id, value = f"t{number}", one.value
        match one.op:
            case "get":
                return _shown(await here.get(task_id))
            case "wait":
                waiting = (await here.handle(task_id)).wait(value)
                # without a time-out of its own it goes another way; who gives it up is told nothing
                return _shown(await (asyncio.wait_for(waiting, 0.03) if value is None else waiting))
            case "result":
                return await self._result(here, task_id, value)
            case "register":
                callback = _callback(number) if value[3] else None
                handle = await here.register(task_id, TaskKind.OTHER, callback)
                return {"seq": handle.task_seq}
            case "spawn":
                _, again, how, _ = value
                pause = random.Random(number).choice((0.0, 0.002, 0.008))
                handle = await here.spawn(self._bodies[again], how, pause, id=task_id)
                return {"seq": handle.task_seq}
            case "update":
                return _told(await here.update(task_id, progress=value))
            case "set_live_state":
                return _told(await here.set_live_state(task_id, TaskState(value)))
            case "complete":
                return _told(await here.complete(task_id, TaskState(value[0]), **_outcome(*value)))
            case "unregister":
                await here.unregister(task_id)
                return {}
            case "signal":
                key, payload = value
                handle = await here.handle(task_id)
                return _told(await handle.signal("go", json.loads(payload), key=key))
            case "cancel":
                return _shown(await here.cancel(task_id, value[0], timeout=value[1]))
            case "cancel_by_handle":
                handle = await here.handle(task_id)
                return _shown(await handle.cancel(value[0], timeout=value[1]))
            case "abandon":
                return _shown(await here.abandon(task_id, "given up"))
            case "transfer":
                assert there is not None
                [record] = await here.transfer(there, [task_id])
                return _shown(record)
            case "handoff":
                assert there is not None
                keep, handoff_id = value
                done = await here.handoff(there, [task_id] if keep else [], id=handoff_id)
                moved, cancelled = ([one.task_seq for one in records] for records in (done.moved, done.cancelled))
                return {"moved": moved, "cancelled": cancelled}
        raise AssertionError(one.op)

    @staticmethod
    async def _result(here: SessionTasks, task_id: str, timeout: float) -> dict[str, Any]:
        try:
            result = await (await here.handle(task_id)).result(timeout)
        except TaskFailed as error:
            return {"state": "failed", "outcome": f"{error.failure.type}: {error.failure.message}"}
        except (TaskCancelled, TaskAbandoned) as error:
            return {"state": type(error).__name__.removeprefix("Task").lower(), "outcome": None}
        return {"state": "completed", "outcome": json.dumps(result)}


_OVER = frozenset({"completed", "failed", "cancelled", "abandoned", "TaskNotFound"})


def _outcome(state: str, said: str | None) -> dict[str, Any]:
    if said is None:
        return {}
    if state == "completed":
        return {"result": json.loads(said)}
    return {"failure": {"type": "Failed", "message": said.removeprefix("Failed: ")}}


def _callback(number: int) -> Callable[[], Any]:
    async def call() -> None:
        await asyncio.sleep(random.Random(number).choice((0.0, 0.001, 0.006)))

    return call


def _told(transition: Transition) -> dict[str, Any]:
    return {**_shown(transition.record), "verdict": str(transition.verdict)}


def _shown(record: TaskRecord) -> dict[str, Any]:
    outcome = None
    if record.state == "completed":
        outcome = json.dumps(record.result)
    elif record.failure is not None:
        outcome = f"{record.failure.type}: {record.failure.message}"
    return {
        "seq": record.task_seq,
        "session": record.scope.session_id[-1],
        "state": str(record.state),
        "attempt": record.attempt,
        "owner": record.owner_id,
        "progress": record.progress,
        "reason": record.cancel_reason,
        "outcome": outcome,
    }
