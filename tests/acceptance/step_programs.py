"""What worker processes of the step tests run: bodies that act in the world and in the file, and die at chosen places."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import secrets
import signal
from collections.abc import Callable
from typing import Any

from lash_store import (
    Recovery,
    StepInDoubt,
    TaskContext,
    TaskFilter,
    TaskStore,
    TransactConnection,
    commit,
)
from tests.acceptance.processes import Report

RUNTIME = "desktop"
Say = Callable[..., None]
STEPS = [f"s{number}" for number in range(10)]


class Death:
    """
    Ends this process as the kernel would, at its n-th pass of a place; *armed* or not, it says what commits hold.

    The places: ``before commit`` and ``after commit`` (on the writer's thread), and those that programs name.
    """

    def __init__(self, report: Say, place: str = "nowhere", number: int = 0, *, armed: bool = True) -> None:
        self.armed = armed
        self._report = report
        self._place = place
        self._number = number
        self._passed = 0

    def at(self, place: str, what: Callable[[], Any]) -> None:
        """Pass a place, and die there if it is the one."""
        if not self.armed or place != self._place:
            return
        self._passed += 1
        if self._passed == self._number:
            self._report("dies", place, self._number, what())
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_commits(self) -> None:
        """Pass a place before and after each COMMIT of this process."""
        end = commit.Committer._end

        def watched(committer: Any, tx: Any, *, wrote: bool) -> Any:
            self.at("before commit", lambda: _told(tx))
            refused = end(committer, tx, wrote=wrote)
            self.at("after commit", lambda: _told(tx))
            return refused

        commit.Committer._end = watched  # type: ignore[method-assign]


def _told(tx: Any) -> list[Any]:
    """Say what a transaction holds: each event's type, and the step it tells of."""
    said = [(event.type, json.loads(event.data)) for event in tx.events]
    return [[type, data.get("step"), data.get("step_state")] for type, data in said][:20]


def append(path: str, *words: Any) -> None:
    """Write a line to a file of the world, which no transaction undoes."""
    descriptor = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
    try:
        os.write(descriptor, json.dumps(words).encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- steps that act in the world ------------------------------------------------------------------------------------


def acting(path: str, report: Say, effects: str, death: Death) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store whose bodies write lines to the file *effects*, one a step."""
    store = TaskStore(path, runtime=RUNTIME)

    def act(task: TaskContext, name: str) -> str:
        death.at("before effect", lambda: [task.id, name])
        value = f"{name} of attempt {task.attempt}: {secrets.token_hex(4)}"
        append(effects, task.id, name, task.attempt, value)
        death.at("after effect", lambda: [task.id, name])
        return value

    async def act_on_the_loop(task: TaskContext, name: str) -> str:
        await asyncio.sleep(0)
        return act(task, name)

    @store.task(recovery=Recovery.RERUN)
    async def ten(task: TaskContext) -> list[str]:
        """Take ten steps, half of them in a thread."""
        report("body", task.id, task.attempt)
        values = []
        for number, name in enumerate(STEPS):
            death.at("between", lambda name=name: [task.id, name])  # type: ignore[misc]
            report("asks", task.id, task.attempt, name)
            value = await task.step(name, act_on_the_loop if number % 2 else act, task, name)
            report("sees", task.id, task.attempt, name, value)
            values.append(value)
        death.at("between", lambda: [task.id, None])
        return values

    @store.task(recovery=Recovery.RERUN)
    async def at_most_once(task: TaskContext) -> str:
        """Take one step that must not be taken twice."""
        report("body", task.id, task.attempt)
        try:
            value = await task.step("pay", act, task, "pay", at_most_once=True)
        except StepInDoubt:
            report("in doubt", task.id, task.attempt)
            return "in doubt"
        report("sees", task.id, task.attempt, "pay", value)
        return value

    @store.task(recovery=Recovery.RERUN)
    async def lingers(task: TaskContext, at_most_once: bool) -> list[Any]:
        """Take a short step, and one in which the first attempt stays."""

        async def linger() -> str:
            value = act(task, "long")
            report("stays", task.id)
            if task.attempt == 1:
                await asyncio.Event().wait()
            return value

        report("body", task.id, task.attempt)
        first = await task.step("short", act, task, "short")
        try:
            return [first, await task.step("long", linger, at_most_once=at_most_once)]
        except StepInDoubt:
            again = None
            try:
                await task.step("long", linger, at_most_once=True)
            except StepInDoubt as told:
                again = type(told).__name__
            report("in doubt", task.id, task.attempt, again)
            return [first, await task.step("look outside", lambda: "it was done")]

    return store, {fn.__name__: fn for fn in (ten, at_most_once, lingers)}


async def finish(store: TaskStore, report: Say) -> None:
    """Wait for the end of all that earlier lives left."""
    for record in await store.list(TaskFilter(include_terminal=False)):
        ended = await (await store.handle(record.scope, record.id)).wait()
        report("ended", ended.id, str(ended.state), ended.attempt)


async def finish_and_die(
    report: Report, path: str, effects: str, function: str, task_id: str, place: str, number: int
) -> None:
    """Finish what the last life left, then begin a task and die at the n-th pass of a place, if it has so many."""
    death = Death(report, place, number, armed=False)
    death.watch_commits()
    store, functions = acting(path, report, effects, death)
    async with store:
        session = await store.session("s1")
        await finish(store, report)
        death.armed = True
        record = await (await session.spawn(functions[function], id=task_id)).wait()
        death.armed = False
        report("lived", task_id, str(record.state))
    report("closed")


async def open_and_die(
    report: Report, path: str, effects: str, function: str, task_id: str, place: str, number: int
) -> None:
    """Go on with a task, or begin it, and die at the n-th pass of a place since the file was opened."""
    death = Death(report, place, number)
    death.watch_commits()
    store, functions = acting(path, report, effects, death)
    async with store:
        session = await store.session("s1")
        known = [record for record in await store.list() if record.id == task_id]
        handle = await (session.handle(task_id) if known else session.spawn(functions[function], id=task_id))
        record = await handle.wait()
        report("lived", task_id, str(record.state))
    report("closed")


async def begin_and_stay(report: Report, path: str, effects: str, tasks: list[list[Any]]) -> None:
    """Begin tasks (``[function, id, arguments]``), and stay until killed."""
    store, functions = acting(path, report, effects, Death(report))
    async with store:
        session = await store.session("s1")
        for function, task_id, arguments in tasks:
            await session.spawn(functions[function], *arguments, id=task_id)
        report("ready")
        await asyncio.Event().wait()


# --- steps that act in this very file -------------------------------------------------------------------------------

_TABLES = """
CREATE TABLE ledger (task_seq INTEGER, step TEXT, part INTEGER, attempt INTEGER, number INTEGER);
CREATE TABLE counter (number INTEGER NOT NULL);
CREATE TABLE endings (task_seq INTEGER, ending TEXT, attempt INTEGER);
CREATE TABLE orphans (id INTEGER PRIMARY KEY, parent INTEGER REFERENCES orphans (id) DEFERRABLE INITIALLY DEFERRED);
INSERT INTO counter VALUES (0);
"""
"""Without a key in the first three: what is there twice can be seen."""

PARTS = 3
"""Rows of the ledger a step writes, so that half a step can be seen."""

ENDINGS = ["first", "second"]

_WAYS = {"completes": 12, "fails": 2, "is refused": 2, "raises": 1, "cannot end": 1, "stays": 1}
"""How often a task is of which kind."""


class Refused(Exception):
    """What a function raises after it has written."""


def booking(path: str, report: Say, death: Death) -> tuple[TaskStore, dict[str, Any]]:
    """Make a store whose bodies write into tables of their own, in the file of the store."""
    store = TaskStore(path, runtime=RUNTIME, max_running=8, cancel_grace=0.0)

    def enter(connection: TransactConnection, task: TaskContext, name: str) -> int:
        report("in", task.record.task_seq, name)
        [(number,)] = connection.execute("UPDATE counter SET number = number + 1 RETURNING number")
        for part in range(PARTS):
            row = (task.record.task_seq, name, part, task.attempt, number)
            connection.execute("INSERT INTO ledger VALUES (?, ?, ?, ?, ?)", row)
            death.at("in a transact", lambda: [task.record.task_seq, name])
        return int(number)

    def enter_and_fail(connection: TransactConnection, task: TaskContext, name: str) -> None:
        enter(connection, task, name)
        raise Refused(name)

    def enter_and_be_refused(connection: TransactConnection, task: TaskContext, name: str) -> None:
        enter(connection, task, name)
        # found at COMMIT, which then fails for all that is in it
        connection.execute("INSERT INTO orphans VALUES (?, -1)", (task.record.task_seq,))

    def end(task: TaskContext, ending: str, connection: TransactConnection) -> None:
        row = (task.record.task_seq, ending, task.attempt)
        connection.execute("INSERT INTO endings VALUES (?, ?, ?)", row)
        death.at("in an ending", lambda: row)

    def refuse(connection: TransactConnection) -> None:
        raise Refused("the end")

    @store.task(recovery=Recovery.RERUN)
    async def tables(task: TaskContext) -> None:
        await task.transact("tables", lambda connection: connection.executescript(_TABLES))

    @store.task(recovery=Recovery.RERUN, max_attempts=1_000_000)
    async def book(task: TaskContext, steps: int, way: str) -> int:
        """Enter into the books, step by step, and end in a *way*."""
        seq = task.record.task_seq
        for ending in ENDINGS:
            task.at_completion(functools.partial(end, task, ending))
        if way == "cannot end":
            task.at_completion(refuse)
        for name in (f"t{number}" for number in range(steps)):
            report("sees", seq, name, await task.transact(name, enter, task, name))
        for name, fn in (("fails", enter_and_fail), ("is refused", enter_and_be_refused)):
            if way == name:
                try:
                    await task.transact(name, fn, task, name)
                    report("odd", seq, name)
                except Exception as error:
                    report("refused", seq, name, type(error).__name__)
        if way == "raises":
            raise Refused("on purpose")
        if way == "stays":
            await asyncio.Event().wait()
        return steps

    return store, {fn.__name__: fn for fn in (tables, book)}


async def keep_books(report: Report, path: str, life: int, seed: int) -> None:
    """Go on with what is there, begin more, and cancel some, until killed."""
    chance = random.Random(seed)
    report("born")
    store, functions = booking(path, report, Death(report))
    async with store:
        session = await store.session("s1")
        await session.spawn(functions["tables"], id="tables", idempotency_key="tables")
        report("ready")
        await (await session.handle("tables")).wait()
        for record in await session.list():
            arguments: Any = record.arguments
            if arguments.get("way") == "stays":
                # nobody came to cancel it, and it would keep its slot for ever
                await session.cancel(record.id, "left over", timeout=0)
        number = 0
        while True:
            number += 1
            [way] = chance.choices(list(_WAYS), list(_WAYS.values()))
            task = await session.spawn(functions["book"], chance.randrange(1, 7), way, id=f"{life}-{number}")
            if way == "stays":
                await task.cancel("no")
            live = await session.list()
            while len(live) > 10:
                await (await session.handle(live[0].id)).wait()
                live = await session.list()


async def book_and_die(report: Report, path: str, ways: list[str], place: str, number: int) -> None:
    """End what the last life left, then begin a task of each way, one after the other, and die at the n-th pass of a place."""
    death = Death(report, place, number, armed=False)
    death.watch_commits()
    store, functions = booking(path, report, death)
    async with store:
        session = await store.session("s1")
        await (await session.spawn(functions["tables"], id="tables", idempotency_key="tables")).wait()
        for record in await store.list(TaskFilter(include_terminal=False)):
            await (await store.handle(record.scope, record.id)).wait()
        death.armed = True
        for way in ways:
            await (await session.spawn(functions["book"], 1, way, id=f"{number} {way}")).wait()
        death.armed = False
    report("closed")


async def close_books(report: Report, path: str) -> None:
    """End what earlier lives left."""
    store, _ = booking(path, report, Death(report))
    async with store:
        for record in await store.list(TaskFilter(include_terminal=False)):
            handle = await store.handle(record.scope, record.id)
            arguments: Any = record.arguments
            await (handle.cancel("the end") if arguments.get("way") == "stays" else handle.wait())
    report("closed")
