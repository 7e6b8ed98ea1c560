"""What tests of running stores share: a file check, plain reads, waiting on the feed, and cancelling at a chosen suspension."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lash_store import EventType, TaskEvent, TaskState, TaskStore
from lash_store.lifecycle import JSON_COLUMNS, TERMINAL_EVENTS, fold

RUNTIME = "desktop"


def rows(path: Path, sql: str, *parameters: Any) -> list[dict[str, Any]]:
    """Read with plain `sqlite3`, through a connection that cannot write."""
    return _read(path, (sql, parameters))[0]


def _read(path: Path, *queries: tuple[str, Sequence[Any]]) -> list[list[dict[str, Any]]]:
    """Read several answers from one state of the file, which may be changing."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        connection.execute("BEGIN")
        return [[dict(row) for row in connection.execute(sql, parameters)] for sql, parameters in queries]
    finally:
        connection.close()


def everything(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the whole file."""
    tables = rows(path, "SELECT name FROM sqlite_schema WHERE type = 'table'")
    return {table["name"]: rows(path, f'SELECT * FROM "{table["name"]}"') for table in tables}


def check_file(path: Path) -> None:
    """Hold what is true of every store file: it is whole, events give each row, and each end stands once and last."""
    [whole, tasks, story_lines] = _read(
        path,
        ("PRAGMA integrity_check", ()),
        ("SELECT * FROM tasks ORDER BY task_seq", ()),
        ("SELECT * FROM events WHERE task_seq IS NOT NULL ORDER BY seq", ()),
    )
    assert [row["integrity_check"] for row in whole] == ["ok"]
    events: dict[int, list[dict[str, Any]]] = {}
    for event in story_lines:
        event["data"] = json.loads(event["data"])
        events.setdefault(event["task_seq"], []).append(event)
    assert events.keys() <= {task["task_seq"] for task in tasks}
    for task in tasks:
        story = events[task["task_seq"]]
        row = {name: _plain(name, value) for name, value in task.items()}
        assert fold(story) == row, f"the events of {task['id']!r} do not give its row"
        ends = [event["type"] for event in story if event["type"] in TERMINAL_EVENTS]
        assert ends == ([task["state"]] if TaskState(task["state"]).is_terminal else [])
        # only a move may follow the end
        told = [event["type"] for event in story if event["type"] != EventType.TRANSFERRED]
        assert not ends or told[-1] == ends[0]


def _plain(name: str, value: Any) -> Any:
    return json.loads(value) if name in JSON_COLUMNS and value is not None else value


def event_types(path: Path, task_seq: int) -> list[str]:
    """Return what happened to one incarnation, in order."""
    found = rows(path, "SELECT type FROM events WHERE task_seq = ? ORDER BY seq", task_seq)
    return [event["type"] for event in found]


def event_count(path: Path) -> int:
    """Return how many events the file has."""
    return int(rows(path, "SELECT count(*) AS n FROM events")[0]["n"])


def descriptors(path: Path) -> set[str]:
    """Return what this process has open of a store's files."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith(str(path)):
            found.add(target)
    return found


def threads() -> set[str]:
    """Return the threads that go on: not the main one nor the loop's executor, nor one that is about to end."""
    others = [one for one in threading.enumerate() if not one.name.startswith(("MainThread", "asyncio_"))]
    for thread in others:
        thread.join(0.2)
    return {thread.name for thread in others if thread.is_alive()}


async def left_over(path: Path, before: set[str]) -> list[Any]:
    """Return what a store leaves in this process beside the threads of *before*, once those that were about to end have."""
    for _ in range(100):
        left = [*descriptors(path), *(threads() - before), *(asyncio.all_tasks() - {asyncio.current_task()})]
        if not left:
            break
        await asyncio.sleep(0.02)
    return left


def sweep_up(core: Any) -> None:
    """Close what a store whose loop died left open: else the collector tells of it in whatever test it happens to run in."""
    for part in (core.writer, core.reader):
        if part is not None and part._connection is not None:
            put_out(part._connection)


def put_out(connection: Any) -> None:
    """Close a connection whose loop died; its thread may have ended, too, when it had nobody to answer any more."""
    connection.stop()
    connection._thread.join(10)
    if connection._connection is not None:
        connection._connection.close()
        connection._connection = None


async def next_event(store: TaskStore, type: EventType, *, task_id: str | None = None, after: int = 0) -> TaskEvent:
    """Wait for the first event of a type after a cursor."""
    async with asyncio.timeout(20):
        async for event in store.events(after, types=[type]):
            if task_id is None or event.task_id == task_id:
                return event
    raise AssertionError("the feed ended")


async def take(events: AsyncIterator[TaskEvent], count: int) -> list[TaskEvent]:
    """Return the next *count* events."""
    async with asyncio.timeout(20):
        return [await anext(events) for _ in range(count)]


async def hold(started: asyncio.Event, release: asyncio.Event) -> None:
    """Say that a body runs, and stay until it may go on."""
    started.set()
    await release.wait()


# --- cancelling at a chosen suspension ------------------------------------------------------------------------------


@dataclass
class Stepped:
    """How an operation ended that was cancelled at one of its suspensions, if it has so many."""

    reached: bool
    result: Any = None
    error: BaseException | None = None

    @property
    def was_cancelled(self) -> bool:
        return isinstance(self.error, asyncio.CancelledError)


class _Stepper:
    """Passes a coroutine's suspensions on and cancels at one: while it waits, or (*late*) once what it waits for is done."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int, *, late: bool) -> None:
        self._coroutine = coroutine
        self._at = at
        self._late = late
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[Any], Any] = self._coroutine.send
        value: Any = None
        while True:
            try:
                waited_for = step(value)
            except StopIteration as stop:
                return stop.value
            self.suspensions += 1
            here = self.suspensions == self._at
            if here and not self._late:
                task = asyncio.current_task()
                assert task is not None
                asyncio.get_running_loop().call_soon(task.cancel)
            try:
                value = yield waited_for
                step = self._coroutine.send
            except BaseException as error:
                value, step = error, self._coroutine.throw
            else:
                if here and self._late:
                    value, step = asyncio.CancelledError(), self._coroutine.throw


async def cancel_at(coroutine: Coroutine[Any, Any, Any], at: int, *, late: bool) -> Stepped:
    """Run an operation in a task of its own and cancel it at its *at*-th suspension."""
    stepper = _Stepper(coroutine, at, late=late)

    async def run() -> Any:
        return await stepper

    task = asyncio.create_task(run())
    await asyncio.wait({task}, timeout=20)
    assert task.done(), f"stuck after {stepper.suspensions} suspensions"
    reached = stepper.suspensions >= at
    if task.cancelled():
        return Stepped(reached, error=asyncio.CancelledError())
    error = task.exception()
    return Stepped(reached, error=error) if error is not None else Stepped(reached, task.result())


def states(records: Sequence[Any]) -> list[str]:
    """Return the states of records, in their order."""
    return [str(record.state) for record in records]
