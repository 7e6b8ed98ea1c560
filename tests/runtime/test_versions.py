"""Versions of code: whose work goes on with which, and what is left and reported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from lash_store import Backoff, EventType, FunctionError, Recovery, TaskContext, TaskState, TaskStore
from tests.runtime.support import event_types, hold, next_event, rows
from tests.runtime.test_waits import HOUR, SOON, settled

Open = Callable[..., TaskStore]


def code(
    store: TaskStore, version: str | None, accepts: Iterable[str | None] = (), started: asyncio.Event | None = None
) -> Any:
    """Register one version of a function: it stays, and says so, or tells which it is."""

    async def work(task: TaskContext) -> list[Any]:
        if started is not None:
            await hold(started, asyncio.Event())
        return [version, task.attempt, task.record.version]

    return store.task(recovery=Recovery.RERUN, name="work", version=version, accepts=accepts)(work)


async def begun(new: Open, version: str | None, started: asyncio.Event) -> None:
    """Leave a task in the file that code of a version began."""
    async with new() as store:
        await (await store.session("s1")).spawn(code(store, version, started=started), id="t")
        await started.wait()


def row(path: Path) -> tuple[Any, ...]:
    """Return the state, version and owner of the task."""
    [found] = rows(path, "SELECT state, version, owner_id, attempt FROM tasks WHERE id = 't'")
    return tuple(found.values())


@pytest.mark.parametrize("version", [None, "1", "2026-07-28 \N{SNOWMAN}"])
async def test_the_row_says_which_version_began_it(
    new: Open, started: asyncio.Event, path: Path, version: str | None
) -> None:
    await begun(new, version, started)

    assert row(path) == ("pending", version, None, 1)
    async with TaskStore.open_readonly(path) as reader:
        assert (await reader.get("desktop:s1", "t")).version == version


@pytest.mark.parametrize(
    ("began", "version", "accepts"),
    [
        (None, None, ()),
        ("1", "2", {"1"}),
        (None, "2", {None}),
        ("1", None, ["1", "0"]),
    ],
)
async def test_work_goes_on_with_its_version_or_one_that_accepts_it(
    new: Open, started: asyncio.Event, path: Path, began: str | None, version: str | None, accepts: Any
) -> None:
    await begun(new, began, started)
    store = new()
    code(store, version, accepts)

    async with store:
        task = await store.handle("desktop:s1", "t")
        # the row follows the code that started it
        assert await task.result(timeout=SOON) == [version, 2, version]

    assert row(path)[:2] == ("completed", version)
    assert event_types(path, 1) == ["registered", "started", "released", "reattached", "completed"]


@pytest.mark.parametrize(
    ("began", "version", "accepts"),
    [("1", None, ()), (None, "2", ()), ("1", "3", {"2", None})],
)
async def test_work_of_another_version_is_left_and_reported(
    new: Open, started: asyncio.Event, path: Path, began: str | None, version: str | None, accepts: Any
) -> None:
    await begun(new, began, started)
    store = new()
    code(store, version, accepts)

    async with store:
        report = await store.recover()
        await settled(store)

    # nothing was changed by looking
    assert event_types(path, 1) == ["registered", "started", "released"]

    assert report.unknown_versions == (f"work@{began or ''}",)
    assert report.unknown_functions == ("work",)
    assert (report.reattached, report.claimed, report.released) == ((), (), ())
    assert row(path) == ("pending", began, None, 1)
    # it was not lost: its own version goes on with it
    store = new()
    code(store, began)
    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=SOON) == [began, 2, began]


async def test_a_function_that_is_not_there_at_all_has_no_unknown_version(new: Open, started: asyncio.Event) -> None:
    await begun(new, "1", started)

    async with new() as store:
        report = await store.recover()

    assert (report.unknown_functions, report.unknown_versions) == (("work",), ())


async def test_work_that_an_owner_of_another_version_took_to_its_grave_is_released(
    new: Open, started: asyncio.Event, path: Path
) -> None:
    first, second = new(), new()
    fn = code(first, "1", started=started)
    code(second, "2")
    async with second:
        async with first:
            await (await first.session("s1")).spawn(fn, id="t")
            await started.wait()
            [owner] = rows(path, "SELECT owner_id FROM tasks")
            await second.abandon_owner(owner["owner_id"], "stuck")
        report = await second.recover()
        await settled(second)

    assert report.unknown_versions == ("work@1",)
    assert row(path) == ("pending", "1", None, 2)
    assert event_types(path, 1) == ["registered", "started", "released"]


async def test_work_that_never_began_is_any_versions(
    new: Open, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    first = new(max_running=1)
    fn = code(first, "1")
    async with first:
        session = await first.session("s1")
        await session.spawn(hold(started, release))
        await started.wait()
        await session.spawn(fn, id="t")
    assert row(path) == ("pending", "1", None, 0)
    second = new()
    code(second, "2")

    async with second:
        assert await (await second.handle("desktop:s1", "t")).result(timeout=SOON) == ["2", 1, "2"]
    assert row(path)[:2] == ("completed", "2")


async def test_a_peer_of_the_right_version_takes_what_another_version_leaves(
    new: Open, started: asyncio.Event, path: Path
) -> None:
    first, wrong, right = new(), new(), new()
    fn = code(first, "1", started=started)
    code(wrong, "2")
    code(right, "3", {"1"})
    async with wrong, right:
        async with first:
            await (await first.session("s1")).spawn(fn, id="t")
            await started.wait()
        task = await right.handle("desktop:s1", "t")
        assert await task.result(timeout=SOON) == ["3", 2, "3"]
    assert event_types(path, 1).count("released") == 1


async def test_what_was_left_can_be_cancelled(new: Open, started: asyncio.Event) -> None:
    await begun(new, "1", started)
    store = new()
    code(store, "2")

    async with store:
        record = await (await store.session("s1")).cancel("t", "not wanted", timeout=SOON)

    assert (record.state, record.version) == (TaskState.CANCELLED, "1")


async def test_a_retry_of_work_is_its_versions(new: Open, path: Path) -> None:
    first = new()

    async def work(task: TaskContext) -> None:
        raise ValueError("at first")

    backoff = Backoff(initial=HOUR, maximum=HOUR)
    rule = {"recovery": Recovery.RERUN, "name": "work", "retry_on": ValueError, "backoff": backoff}
    first.task(version="1", **rule)(work)  # type: ignore[arg-type]
    async with first:
        await (await first.session("s1")).spawn(work, id="t")
        await next_event(first, EventType.RETRY_SCHEDULED)
    second, third = new(), new()
    code(second, "2")
    code(third, "2", {"1"})

    async with second:
        assert (await second.recover()).unknown_versions == ("work@1",)
        assert row(path) == ("pending", "1", None, 1)
    async with third:
        # claimed, and not begun: still the work of the first
        assert row(path)[:2] == ("pending", "1")
        assert (await third.get("desktop:s1", "t")).owner_id is not None
        await (await third.session("s1")).cancel("t")


async def test_a_coroutine_object_has_no_version(new: Open) -> None:
    async with new() as store:
        task = await (await store.session("s1")).spawn(asyncio.sleep(0))
        await task
        assert (await task.record()).version is None


async def test_versions_without_sense_are_refused(new: Open) -> None:
    store = new()

    async def work(task: TaskContext) -> None: ...

    refused: list[dict[str, Any]] = [
        {"version": ""},
        {"version": 1},
        {"version": "a\nb"},
        {"accepts": "1"},
        {"accepts": [1]},
        {"accepts": [""]},
    ]
    for options in refused:
        with pytest.raises(FunctionError, match="'work'"):
            store.task(recovery=Recovery.RERUN, **options)(work)
