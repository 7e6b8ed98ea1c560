"""What a body sees of itself and may write, and that a stale attempt may write nothing."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field, SecretStr

from lash_store import (
    Recovery,
    ResultNotSerializable,
    Scope,
    SessionTasks,
    StaleAttempt,
    TaskContext,
    TaskState,
    TaskStore,
    transitions,
)
from lash_store.commands import Start
from tests.runtime.support import event_types, rows


def checkpoint(path: Path) -> str | None:
    """Read the only checkpoint in the file."""
    found = rows(path, "SELECT value FROM steps")
    return found[0]["value"] if found else None


async def move_on(store: TaskStore, task_seq: int) -> None:
    """Give the row a new attempt, as another owner's recovery would."""
    core = store._core
    assert core is not None
    assert core.writer is not None
    owner = core.owner_id

    def unit(tx: Any) -> Any:
        return transitions.start(tx, transitions.by_seq(tx, task_seq), Start(owner or 0, owner, True, True))

    runner, core.runner = core.runner, None
    try:
        await core.writer.run(unit)
    finally:
        core.runner = runner


async def test_a_body_knows_its_task(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> list[Any]:
        assert task.scope == Scope("desktop", "s1")
        return [task.id, task.attempt, task.record.state, task.record.arguments, task.checkpoint, task.stop_reason]

    task = await session.spawn(work, 5, id="me")

    assert await task == ["me", 1, "running", {"number": 5}, None, None]


async def test_what_is_saved_is_durable_and_replaces_the_last(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        for number in range(3):
            await task.save({"done": number})
            seen.append((checkpoint(path), task.checkpoint))

    task = await session.spawn(work)
    await task

    assert seen == [(f'{{"done":{number}}}', {"done": number}) for number in range(3)]
    assert event_types(path, task.task_seq) == ["registered", "started", "saved", "saved", "saved", "completed"]


async def test_the_next_attempt_begins_with_what_was_saved(new: Callable[..., TaskStore]) -> None:
    store = new()
    saved = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        if task.attempt == 1:
            await task.save([1, {"a": None}])
            saved.set()
            await asyncio.Event().wait()
        return [task.attempt, task.checkpoint]

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await saved.wait()
    async with store:
        assert await (await store.handle("desktop:s1", "t")) == [2, [1, {"a": None}]]


async def test_progress_shows_in_the_row_at_once(store: TaskStore, session: SessionTasks) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        for message, fraction in (("half", 0.5), ("all", 1), ("unknown", None)):
            await task.progress(message, fraction)
            record = await session.get(task.id)
            seen.append((record.progress, record.fraction, task.record.progress))

    await (await session.spawn(work))

    assert seen == [("half", 0.5, "half"), ("all", 1.0, "all"), ("unknown", None, "unknown")]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan, math.inf])
async def test_a_fraction_outside_0_to_1_is_refused_and_nothing_written(
    store: TaskStore, session: SessionTasks, path: Path, fraction: float
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        with pytest.raises(ValueError, match="0 to 1"):
            await task.progress("x", fraction)
        return "goes on"

    task = await session.spawn(work)

    assert await task == "goes on"
    assert "progress" not in event_types(path, task.task_seq)


@pytest.mark.parametrize("value", [object(), math.nan, {"a": {1, 2}, 1: math.inf}, "\ud800", {1: 1, "1": 2}])
async def test_a_checkpoint_that_is_not_json_is_refused_and_the_last_one_stands(
    store: TaskStore, session: SessionTasks, path: Path, value: Any
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        await task.save("good")
        with pytest.raises(ResultNotSerializable, match="'t'"):
            await task.save(value)
        return task.checkpoint

    assert await (await session.spawn(work, id="t")) == "good"
    assert checkpoint(path) == '"good"'


class Login(BaseModel):
    """A checkpoint of which not all is written."""

    user: str
    token: SecretStr = SecretStr("")
    tries: int = Field(default=0, exclude=True)


@pytest.mark.parametrize(
    "value", [Login(user="me", token=SecretStr("sesame")), Login(user="me", tries=1)], ids=["masked", "left out"]
)
async def test_a_checkpoint_that_does_not_come_back_is_refused_and_the_last_one_stands(
    store: TaskStore, session: SessionTasks, value: Login
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext[Login]) -> Any:
        await task.save(Login(user="you"))
        with pytest.raises(ResultNotSerializable, match="'t'"):
            await task.save(value)
        return task.checkpoint

    assert await (await session.spawn(work, id="t")) == {"user": "you", "token": ""}


async def test_a_checkpoint_nested_for_ever_is_refused(store: TaskStore, session: SessionTasks) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        for value in (circle, deep):
            with pytest.raises(ResultNotSerializable):
                await task.save(value)
        return "goes on"

    assert await (await session.spawn(work)) == "goes on"


async def test_a_progress_text_that_cannot_be_stored_is_refused(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        with pytest.raises(ValueError):
            await task.progress("\ud800")
        return "goes on"

    assert await (await session.spawn(work)) == "goes on"


@pytest.mark.parametrize("write", ["save", "progress"])
async def test_a_write_of_a_stale_attempt_is_refused_and_ends_the_body(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, release: asyncio.Event, write: str
) -> None:
    refused: list[StaleAttempt] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        await task.save("by attempt 1")
        started.set()
        await release.wait()
        try:
            await (task.save("late") if write == "save" else task.progress("late"))
        except StaleAttempt as error:
            refused.append(error)
            raise
        return "never"

    task = await session.spawn(work, id="t")
    await started.wait()
    await move_on(store, task.task_seq)
    body = next(one for one in asyncio.all_tasks() if one.get_name() == "lash_store body t")

    release.set()
    await asyncio.wait({body})

    assert len(refused) == 1
    assert refused[0].task_id == "t"
    assert "attempt 1 of task 't'" in str(refused[0])
    record = await task.record()
    assert (record.state, record.attempt, record.progress) == (TaskState.RUNNING, 2, None)
    assert checkpoint(path) == '"by attempt 1"'


async def test_a_stale_attempt_cannot_finish_its_successor(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        started.set()
        await release.wait()
        return "by a zombie"

    task = await session.spawn(work, id="t")
    await started.wait()
    await move_on(store, task.task_seq)
    body = next(one for one in asyncio.all_tasks() if one.get_name() == "lash_store body t")

    release.set()
    await asyncio.wait({body})
    await store.session("behind it in the queue")

    record = await task.record()
    assert (record.state, record.attempt, record.result) == (TaskState.RUNNING, 2, None)
    assert event_types(path, task.task_seq) == ["registered", "started", "reattached"]


async def test_waiting_for_cancelled_returns_at_detach_with_its_reason(new: Callable[..., TaskStore]) -> None:
    store = new()
    seen: list[Any] = []
    started = asyncio.Event()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        try:
            await task.cancelled()
        finally:
            seen.append((task.stop_reason, task.cancel_requested))

    async with store:
        await (await store.session("s1")).spawn(work)
        await started.wait()

    assert seen == [("detach", False)]
