"""Handles: what names a task, who may only look, when an outcome counts as read, and what can still be handed over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    HandleNotVisible,
    HandleRole,
    InvalidId,
    Recovery,
    Scope,
    SessionClosed,
    SessionTasks,
    StoreReadOnly,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskNotFound,
    TaskState,
    TaskStore,
    UnknownSession,
)
from tests.runtime.support import RUNTIME, event_count, event_types, everything, hold, rows, states

OTHER = TaskKind.OTHER

FORMS: dict[str, Callable[[TaskHandle], Any]] = {
    "handle": lambda handle: handle,
    "handle id": lambda handle: handle.handle_id,
    "json": lambda handle: json.loads(json.dumps(handle.to_json())),
    "task id": lambda handle: handle.id,
}

OUTCOMES: dict[str, type[Exception] | None] = {
    "completed": None,
    "failed": TaskFailed,
    "cancelled": TaskCancelled,
    "abandoned": TaskAbandoned,
}


@pytest.fixture
async def other(store: TaskStore) -> SessionTasks:
    """Another session of the open store."""
    return await store.session("s2")


def read_at(path: Path, handle: TaskHandle) -> str | None:
    """Read when an outcome was handed out through a handle."""
    [row] = rows(path, "SELECT read_at FROM handles WHERE handle_id = ?", handle.handle_id)
    found: str | None = row["read_at"]
    return found


async def end(session: SessionTasks, state: str, task_id: str = "t") -> None:
    """End external work one way or another."""
    if state == "abandoned":
        await session.abandon(task_id, "nobody knows")
    elif state == "failed":
        await session.complete(task_id, TaskState.FAILED, failure="broken")
    elif state == "cancelled":
        await session.cancel(task_id, "enough")
    else:
        await session.complete(task_id, TaskState.COMPLETED, result=[7])


def expected(state: str) -> AbstractContextManager[Any]:
    """Expect what awaiting a task raises that ended so."""
    error = OUTCOMES[state]
    return contextlib.nullcontext() if error is None else pytest.raises(error)


# --- ids and JSON ---------------------------------------------------------------------------------------------------


async def test_every_handle_has_an_id_of_its_own(store: TaskStore, session: SessionTasks, other: SessionTasks) -> None:
    owned = [await session.register(f"t{number}", OTHER) for number in range(20)]
    owned += [await other.register(f"t{number}", OTHER) for number in range(20)]
    observed = [await other.observe(session, f"t{number}") for number in range(20)]

    ids = [handle.handle_id for handle in (*owned, *observed)]

    assert len(set(ids)) == 60
    assert all(re.fullmatch(r"h-[0-9a-z]{26}", handle_id) for handle_id in ids)


async def test_a_task_id_may_not_look_like_a_handle_id(session: SessionTasks, path: Path) -> None:
    before = everything(path)

    with pytest.raises(InvalidId, match="'h-t'"):
        await session.register("h-t", OTHER)
    with pytest.raises(InvalidId, match="'h-t'"):
        await session.spawn(asyncio.Event().wait(), id="h-t")

    assert everything(path) == before


async def test_a_handle_survives_the_journey_through_a_model(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def search(task: TaskContext) -> list[int]:
        return [1, 2]

    sent = await session.spawn(search, id="t")
    value = json.loads(json.dumps(sent.to_json()))
    assert value == {"__handle__": "task", "id": sent.handle_id, "tool": "search"}

    got = await TaskHandle.from_json(session, value)

    assert (got.handle_id, got.task_seq, got.id, got.role) == (sent.handle_id, sent.task_seq, "t", HandleRole.OWNER)
    assert got.to_json() == value
    assert await got == [1, 2]


async def test_the_json_names_the_same_task_after_a_restart(new: Callable[..., TaskStore]) -> None:
    async with new() as store:
        value = (await (await store.session("s1")).register("t", OTHER, label="browser")).to_json()
    assert value["tool"] == "browser"

    async with new() as store:
        session = await store.session("s1")
        got = await TaskHandle.from_json(session, value)
        await session.complete("t", TaskState.COMPLETED, result="found")
        assert await got == "found"
        assert got.to_json() == value


async def test_the_json_of_an_observer_stays_an_observers(session: SessionTasks, other: SessionTasks) -> None:
    await session.register("t", OTHER)
    value = (await other.observe(session, "t")).to_json()

    got = await TaskHandle.from_json(other, value)

    assert got.role is HandleRole.OBSERVER
    with pytest.raises(HandleNotVisible):
        await got.cancel()


async def test_json_is_read_only_by_the_session_that_has_the_handle(session: SessionTasks, other: SessionTasks) -> None:
    value = (await session.register("t", OTHER)).to_json()

    with pytest.raises(HandleNotVisible) as caught:
        await TaskHandle.from_json(other, value)
    assert caught.value.missing == (value["id"],)
    with pytest.raises(HandleNotVisible, match="h-nobody"):
        await TaskHandle.from_json(session, {**value, "id": "h-nobody"})


# --- what names a task ----------------------------------------------------------------------------------------------


async def test_a_task_is_looked_at_by_any_of_its_names(session: SessionTasks) -> None:
    handle = await session.register("t", OTHER)

    for form in FORMS.values():
        record = await session.get(form(handle))
        found = await session.handle(form(handle))
        [seen] = await session.validate_handles([form(handle)])
        assert record == seen == await handle.record()
        assert (found.handle_id, found.task_seq, found.role) == (handle.handle_id, handle.task_seq, HandleRole.OWNER)


async def test_a_task_is_steered_by_any_of_its_names(session: SessionTasks) -> None:
    for form in FORMS.values():
        one, two = [await session.register(name, OTHER) for name in ("one", "two")]

        assert (await session.update(form(one), progress="half")).record.progress == "half"
        assert (await session.cancel(form(one))).state is TaskState.CANCELLED
        assert (await session.abandon(form(two), "lost")).state is TaskState.ABANDONED


async def test_a_task_is_handed_over_by_any_of_its_names(session: SessionTasks, other: SessionTasks) -> None:
    for name, form in FORMS.items():
        one, two, three = [await session.register(f"{name} {number}", OTHER) for number in (1, 2, 3)]

        assert [record.id for record in await session.transfer(other, [form(one)])] == [one.id]
        assert [record.id for record in await session.cancel_unreferenced([form(two)])] == [three.id]
        assert [record.id for record in (await session.handoff(other, [form(two)], id=name)).moved] == [two.id]

        assert await session.list() == []
        assert (await three.record()).state is TaskState.CANCELLED


async def test_a_parent_is_given_by_any_of_its_names(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await asyncio.Event().wait()

    parent = await session.register("parent", OTHER)

    for form in FORMS.values():
        spawned = await session.spawn(work, parent=form(parent))
        registered = await session.register(f"beside {spawned.id}", OTHER, parent=form(parent))
        assert (await spawned.record()).parent_seq == parent.task_seq
        assert (await registered.record()).parent_seq == parent.task_seq


async def test_a_task_is_observed_by_any_of_its_names(session: SessionTasks, other: SessionTasks) -> None:
    handle = await session.register("t", OTHER)

    for form in FORMS.values():
        assert (await other.observe(session, form(handle))).task_seq == handle.task_seq


async def test_a_handle_stays_on_its_incarnation_where_an_id_names_the_live_one(session: SessionTasks) -> None:
    old = await session.register("t", OTHER)
    await session.complete("t", TaskState.COMPLETED, result="old")
    new = await session.register("t", OTHER)

    assert (await session.get("t")).task_seq == new.task_seq
    assert (await session.get(old)).task_seq == old.task_seq
    assert (await session.get(old.to_json())).result == "old"
    assert (await session.cancel(old)).state is TaskState.COMPLETED
    assert (await new.record()).state is TaskState.RUNNING


async def test_several_are_named_by_whatever_can_be_iterated(session: SessionTasks) -> None:
    for name in ("one", "two"):
        await session.register(name, OTHER)

    for several in (list, tuple, set, frozenset, iter):
        records = await session.validate_handles(several(["one", "two"]))
        assert {record.id for record in records} == {"one", "two"}


async def test_a_handle_of_another_session_names_nothing_here(
    session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    handle = await session.register("t", OTHER)
    await other.register("o", OTHER)
    before = everything(path)

    for name in (handle, handle.handle_id, handle.to_json(), "t"):
        for operation in (other.get, other.handle, other.cancel):
            with pytest.raises(TaskNotFound):
                await operation(name)
        for operation in (other.validate_handles, other.cancel_unreferenced):
            with pytest.raises(HandleNotVisible):
                await operation([name])
        for operation in (other.transfer, other.handoff):
            with pytest.raises(HandleNotVisible):
                await operation(session, [name])

    assert everything(path) == before


@pytest.fixture
async def foreign(tmp_path: Path) -> AsyncIterator[TaskHandle]:
    """A handle of the first task of another file."""
    async with TaskStore(tmp_path / "other.db", runtime=RUNTIME) as elsewhere:
        yield await (await elsewhere.session("s1")).register("foreign", OTHER)


async def test_a_handle_of_another_file_names_nothing_here(
    session: SessionTasks, other: SessionTasks, path: Path, foreign: TaskHandle
) -> None:
    here = await session.register("t", OTHER)
    assert foreign.task_seq == here.task_seq
    before = everything(path)

    for operation in (session.get, session.handle, session.cancel):
        with pytest.raises(TaskNotFound):
            await operation(foreign)
    with pytest.raises(HandleNotVisible):
        await session.validate_handles([foreign])
    with pytest.raises(HandleNotVisible):
        await session.transfer(other, [foreign])

    assert everything(path) == before


async def test_a_parent_of_another_file_is_none_here(session: SessionTasks, path: Path, foreign: TaskHandle) -> None:
    here = await session.register("t", OTHER)
    assert foreign.task_seq == here.task_seq
    before = everything(path)

    with pytest.raises(TaskNotFound):
        await session.register("child", OTHER, parent=foreign)

    assert everything(path) == before


# --- what names nothing ---------------------------------------------------------------------------------------------


def wrong_names(handle: TaskHandle) -> list[Any]:
    """Give what is no reference, however close it comes."""
    h = handle.handle_id
    return [
        5,
        1.5,
        True,
        None,
        b"t",
        h.encode(),
        "",
        "\0",
        "x" * 257,
        object(),
        [handle],
        {},
        {"id": h},
        {"__handle__": "task"},
        {"__handle__": "file", "id": h},
        {"__handle__": "task", "id": "t"},
        {"__handle__": "task", "id": 5},
        {"__handle__": "task", "id": None},
        {"__handle__": ["task"], "id": h},
    ]


async def test_what_is_no_name_is_refused_and_nothing_is_changed(session: SessionTasks, path: Path) -> None:
    handle = await session.register("t", OTHER)
    before = everything(path)

    for wrong in wrong_names(handle):
        for operation in (
            session.get(wrong),
            session.handle(wrong),
            session.cancel(wrong),
            session.abandon(wrong, "x"),
            session.update(wrong, progress="x"),
        ):
            with pytest.raises(InvalidId):
                await operation

    assert everything(path) == before


def of_many(session: SessionTasks, to: SessionTasks) -> list[Callable[[Any], Coroutine[Any, Any, Any]]]:
    """Give every operation that takes several tasks."""
    return [
        session.validate_handles,
        partial(session.transfer, to),
        partial(session.handoff, to),
        session.cancel_unreferenced,
    ]


async def test_a_list_with_what_is_no_name_is_refused_and_nothing_is_changed(
    session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    handle = await session.register("t", OTHER)
    await session.register("o", OTHER)
    before = everything(path)

    for wrong in wrong_names(handle):
        for operation in of_many(session, other):
            with pytest.raises(InvalidId):
                await operation(["t", wrong])

    assert everything(path) == before


async def test_one_name_where_a_list_belongs_is_refused_and_nothing_is_changed(
    session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    handle = await session.register("t", OTHER)
    before = everything(path)

    for wrong in (handle, "t", "", handle.handle_id, handle.to_json(), {}, {"t": "t"}, None, 5, b"t", handle.record):
        for operation in of_many(session, other):
            with pytest.raises(InvalidId):
                await operation(wrong)

    assert everything(path) == before


async def test_empty_bytes_are_no_empty_list(session: SessionTasks, other: SessionTasks, path: Path) -> None:
    await session.register("t", OTHER)
    before = everything(path)

    for operation in of_many(session, other):
        with pytest.raises(InvalidId):
            await operation(b"")

    assert everything(path) == before


async def test_a_parent_that_is_no_name_is_refused_and_nothing_is_born(session: SessionTasks, path: Path) -> None:
    handle = await session.register("t", OTHER)
    before = everything(path)

    for wrong in wrong_names(handle):
        if wrong is None:
            continue
        with pytest.raises(InvalidId):
            await session.register("child", OTHER, parent=wrong)
        with pytest.raises(InvalidId):
            await session.spawn(asyncio.Event().wait(), parent=wrong)
    for unknown in ("nobody", "h-nobody", {"__handle__": "task", "id": "h-nobody"}):
        with pytest.raises(TaskNotFound):
            await session.register("child", OTHER, parent=unknown)
        with pytest.raises(TaskNotFound):
            await session.spawn(asyncio.Event().wait(), parent=unknown)

    assert everything(path) == before


async def test_json_of_another_form_is_refused(session: SessionTasks) -> None:
    handle = await session.register("t", OTHER)

    for wrong in (*wrong_names(handle), "t", handle.handle_id, handle):
        with pytest.raises(InvalidId):
            await TaskHandle.from_json(session, wrong)


async def test_a_destination_of_the_wrong_form_is_refused_and_nothing_is_changed(
    session: SessionTasks, path: Path
) -> None:
    handle = await session.register("t", OTHER)
    before = everything(path)

    for wrong in (None, 5, b"s2", {}, [], handle, "", "\0"):
        for operation in (session.transfer, session.handoff):
            with pytest.raises(InvalidId):
                await operation(wrong, ["t"])  # type: ignore[arg-type]

    assert everything(path) == before


# --- observers ------------------------------------------------------------------------------------------------------


async def test_an_observer_looks_and_waits_across_sessions(session: SessionTasks, other: SessionTasks) -> None:
    own = await session.register("t", OTHER)

    [seen, *same] = [await other.observe(of, "t") for of in (session, session.scope, str(session.scope))]

    assert [handle.handle_id for handle in same] == [seen.handle_id] * 2
    assert (seen.role, seen.task_seq) == (HandleRole.OBSERVER, own.task_seq)
    assert await seen.record() == await other.get(seen) == await own.record()
    assert [record.id for record in await other.validate_handles([seen, seen.to_json()])] == ["t"]
    assert await other.list() == []
    waiting = asyncio.gather(seen.wait(), seen.result())
    await session.complete("t", TaskState.COMPLETED, result="done")
    record, result = await waiting
    assert (record.state, result) == (TaskState.COMPLETED, "done")
    assert [str(event.type) async for event in seen.events()] == ["registered", "completed"]


async def test_an_observer_changes_nothing(
    session: SessionTasks, other: SessionTasks, started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    own = await session.spawn(hold(started, release), id="t")
    seen = await other.observe(session, "t")
    await started.wait()
    before = everything(path)

    refused = [lambda: seen.cancel("no")]
    for name in (seen, seen.handle_id, seen.to_json()):
        refused += [
            lambda name=name: other.cancel(name),
            lambda name=name: other.abandon(name, "no"),
            lambda name=name: other.update(name, progress="no"),
            lambda name=name: other.transfer(session, [name]),
            lambda name=name: other.handoff(session, [name]),
        ]
    for operation in refused:
        with pytest.raises(HandleNotVisible) as caught:
            await operation()
        assert caught.value.missing == (seen.handle_id,)

    assert everything(path) == before
    release.set()
    assert (await own.wait()).state is TaskState.COMPLETED


async def test_observing_again_gives_the_same_handle(session: SessionTasks, other: SessionTasks, path: Path) -> None:
    await session.register("t", OTHER)

    seen = await asyncio.gather(*(other.observe(session, "t") for _ in range(10)))

    assert len({handle.handle_id for handle in seen}) == 1
    assert rows(path, "SELECT scope, role FROM handles WHERE role = 'observer'") == [
        {"scope": "desktop:s2", "role": "observer"}
    ]
    assert (await other.observe(session, "t")).handle_id == seen[0].handle_id


async def test_an_observer_is_bound_to_its_incarnation(session: SessionTasks, other: SessionTasks) -> None:
    await session.register("t", OTHER)
    old = await other.observe(session, "t")
    await session.complete("t", TaskState.COMPLETED, result="old")
    again = await session.register("t", OTHER)

    new = await other.observe(session, "t")

    assert (old.task_seq, new.task_seq) == (again.task_seq - 1, again.task_seq)
    assert old.handle_id != new.handle_id
    assert await old == "old"
    assert (await new.record()).state is TaskState.RUNNING


async def test_a_task_id_stays_that_of_the_own_session_for_an_observer(
    session: SessionTasks, other: SessionTasks
) -> None:
    await session.register("t", OTHER)
    seen = await other.observe(session, "t")
    with pytest.raises(TaskNotFound):
        await other.get("t")

    own = await other.register("t", OTHER)

    assert (await other.get("t")).task_seq == own.task_seq
    assert (await other.get(seen)).task_seq == seen.task_seq


async def test_observers_stay_where_they_are_when_the_task_moves(
    store: TaskStore, session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    third = await store.session("s3")
    own = await session.register("t", OTHER)
    seen = await third.observe(session, "t")
    waiting = asyncio.gather(seen.result())

    await session.transfer(other, [own])

    assert rows(path, "SELECT scope, role FROM handles ORDER BY handle_seq") == [
        {"scope": "desktop:s2", "role": "owner"},
        {"scope": "desktop:s3", "role": "observer"},
    ]
    assert str((await third.get(seen)).scope) == "desktop:s2"
    assert [str(record.scope) for record in await third.validate_handles([seen])] == ["desktop:s2"]
    assert (await third.observe(other, "t")).handle_id == seen.handle_id
    await other.complete("t", TaskState.COMPLETED, result="there")
    assert await waiting == ["there"]


async def test_work_that_comes_to_who_observed_it_can_be_steered_there(
    session: SessionTasks, other: SessionTasks
) -> None:
    own = await session.register("t", OTHER)
    seen = await other.observe(session, "t")

    await session.transfer(other, [own])

    with pytest.raises(HandleNotVisible):
        await other.cancel(seen)
    assert (await other.cancel(own.to_json())).state is TaskState.CANCELLED
    assert (await other.get(seen)).state is TaskState.CANCELLED


async def test_what_is_not_there_cannot_be_observed(
    store: TaskStore, session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    await session.register("t", OTHER)
    closed = await store.session("s9")
    await closed.close()
    before = everything(path)

    with pytest.raises(TaskNotFound, match="'nobody'"):
        await other.observe(session, "nobody")
    with pytest.raises(UnknownSession, match="s404"):
        await other.observe(Scope(RUNTIME, "s404"), "t")
    with pytest.raises(SessionClosed, match="s9"):
        await closed.observe(session, "t")

    assert everything(path) == before


# --- what counts as read --------------------------------------------------------------------------------------------


async def test_an_outcome_is_read_in_the_file_before_who_awaited_it_has_it(session: SessionTasks, path: Path) -> None:
    async def read(task: TaskHandle, state: str, by_result: bool) -> str | None:
        with expected(state):
            assert await (task.result(timeout=20) if by_result else task) == [7]
        return read_at(path, task)

    for state in OUTCOMES:
        for by_result in (True, False):
            task = await session.register(state, OTHER)
            waiting = asyncio.create_task(read(task, state, by_result))
            assert read_at(path, task) is None
            await end(session, state, state)

            assert await waiting is not None


async def test_looking_is_not_reading(store: TaskStore, session: SessionTasks, other: SessionTasks, path: Path) -> None:
    reader = await TaskStore.open_readonly(path)
    for state in OUTCOMES:
        task = await session.register(state, OTHER)
        observer = await other.observe(session, state)
        await end(session, state, state)

        await task.wait()
        await task.wait(timeout=0)
        await task.record()
        await session.get(state)
        await (await session.handle(state)).record()
        await session.list(include_terminal=True)
        await session.validate_handles([task])
        await store.get(session, state)
        await store.list()
        assert [event.type async for event in task.events()][-1] == state
        with expected(state):
            await (await reader.handle(session, state))
        with expected(state):
            await observer

        assert read_at(path, task) is None
        assert read_at(path, observer) is not None
    await reader.close()


async def test_the_owners_await_is_not_the_observers(session: SessionTasks, other: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)
    observer = await other.observe(session, "t")
    await end(session, "completed")

    await task

    assert (read_at(path, task) is not None, read_at(path, observer)) == (True, None)
    assert [record.id for record in await other.validate_handles([observer])] == ["t"]


async def test_a_wait_that_timed_out_or_was_cancelled_has_not_read(session: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)

    for timeout in (0, 0.01):
        with pytest.raises(TimeoutError):
            await task.result(timeout=timeout)
    waiting = asyncio.create_task(task.result())
    await asyncio.wait({waiting}, timeout=0.01)
    waiting.cancel()
    await asyncio.wait({waiting})
    await end(session, "completed")

    assert waiting.cancelled()
    assert read_at(path, task) is None
    assert states(await session.validate_handles([task])) == ["completed"]


async def test_what_was_read_first_stays_the_time_of_reading(session: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)
    await end(session, "completed")
    await task
    first = read_at(path, task)
    written = time.time()
    while int(time.time() * 1000) <= int(written * 1000) + 1:
        await asyncio.sleep(0)

    again = await TaskHandle.from_json(session, task.to_json())

    assert await again == await (await session.handle("t")) == [7]
    assert read_at(path, task) == first


async def test_an_outcome_that_was_handed_out_is_handed_out_again_without_a_commit(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await session.register("t", OTHER)
    await end(session, "completed")
    assert await task == [7]
    assert store._core is not None

    monkeypatch.setattr(store._core.writer, "submit", None)

    assert await task == [7]


async def test_a_thousand_waiters_read_once_and_all_get_the_result(session: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)
    waiting = [asyncio.create_task(task.result()) for _ in range(1000)]
    count = event_count(path)
    await end(session, "completed")

    assert await asyncio.gather(*waiting) == [[7]] * 1000

    assert event_count(path) == count + 1


async def test_a_store_that_only_makes_requests_reads_what_it_awaits(session: SessionTasks, path: Path) -> None:
    task = await session.register("t", OTHER)
    await end(session, "completed")

    async with TaskStore.connect(path, runtime=RUNTIME) as outside:
        assert await (await (await outside.session("s1")).handle("t")) == [7]

    assert read_at(path, task) is not None


# --- what can be handed over ----------------------------------------------------------------------------------------


async def test_live_work_and_what_is_finished_and_unread_is_valid(session: SessionTasks) -> None:
    tasks = [await session.register(name, OTHER) for name in ("live", *OUTCOMES)]
    for state in OUTCOMES:
        await end(session, state, state)

    records = await session.validate_handles([*tasks, "live", tasks[1].handle_id])

    assert states(records) == ["running", *OUTCOMES]
    assert records == [await task.record() for task in tasks]
    assert await session.validate_handles([]) == []


async def test_all_that_is_not_visible_is_named(session: SessionTasks, other: SessionTasks, path: Path) -> None:
    live = await session.register("live", OTHER)
    unread = await session.register("unread", OTHER)
    read = await session.register("read", OTHER)
    foreign = await other.register("foreign", OTHER)
    for task in (unread, read):
        await end(session, "completed", task.id)
    await read
    before = everything(path)

    with pytest.raises(HandleNotVisible) as caught:
        await session.validate_handles([live, "nobody", unread, read, "read", "h-nobody", foreign.to_json(), "foreign"])

    assert caught.value.missing == ("nobody", read.handle_id, "read", "h-nobody", foreign.handle_id, "foreign")
    for name in caught.value.missing:
        assert repr(name) in str(caught.value)
    assert live.handle_id not in str(caught.value)
    assert everything(path) == before


async def test_what_was_read_is_no_longer_valid_whatever_the_outcome(session: SessionTasks) -> None:
    for state in OUTCOMES:
        task = await session.register(state, OTHER)
        await end(session, state, state)
        assert states(await session.validate_handles([task])) == [state]

        with expected(state):
            await task

        with pytest.raises(HandleNotVisible) as caught:
            await session.validate_handles([task])
        assert caught.value.missing == (task.handle_id,)


async def test_handles_are_validated_by_stores_that_only_read_or_request_and_in_closed_sessions(
    session: SessionTasks, path: Path
) -> None:
    task = await session.register("t", OTHER)
    await session.close()
    openings = (TaskStore.open_readonly(path, runtime=RUNTIME), TaskStore.connect(path, runtime=RUNTIME))

    for opening in openings:
        async with opening as outside:
            elsewhere = await outside.session("s1")
            assert states(await elsewhere.validate_handles([task.to_json(), "t"])) == ["running"]
            with pytest.raises(HandleNotVisible):
                await elsewhere.validate_handles(["nobody"])

    assert states(await session.validate_handles([task])) == ["running"]


async def test_a_store_that_only_reads_hands_nothing_over(
    session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    await session.register("t", OTHER)
    before = everything(path)

    async with TaskStore.open_readonly(path, runtime=RUNTIME) as reader:
        seen = await reader.session("s1")
        for refused in (
            seen.transfer("s2", ["t"]),
            seen.handoff("s2", ["t"]),
            seen.cancel_unreferenced([]),
            seen.observe(other, "t"),
            (await seen.handle("t")).cancel(),
        ):
            with pytest.raises(StoreReadOnly):
                await refused

    assert everything(path) == before


async def test_a_task_that_finishes_between_planning_and_handing_over_is_handed_over_with_its_unread_result(
    session: SessionTasks, other: SessionTasks, path: Path
) -> None:
    for state in OUTCOMES:
        task = await session.register(state, OTHER)
        assert states(await session.validate_handles([task])) == ["running"]
        await end(session, state, state)

        await session.transfer(other, [task])

        assert states(await other.validate_handles([task])) == [state]
        with expected(state):
            assert await (await TaskHandle.from_json(other, task.to_json())) == [7]
        assert read_at(path, task) is not None
        assert event_types(path, task.task_seq)[-2:] == [state, "transferred"]


# --- who was handed an outcome, and who was not ----------------------------------------------------------------------


async def ends() -> None:
    """A body that ends at once."""


async def cancelled_while_it_is_noted(store: TaskStore, wait: Coroutine[Any, Any, Any]) -> None:
    """Cancel who awaits a finished task, with the note that it was handed out on its way and nothing handed out."""
    waiting = asyncio.create_task(wait)
    assert store._core is not None
    while not any(reading.is_asked_for for reading in store._core.readings):
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("verb", ["transfer", "handoff", "validate_handles"])
async def test_work_whose_waiter_was_cancelled_as_it_ended_is_handed_over_at_once(
    store: TaskStore, session: SessionTasks, other: SessionTasks, verb: str
) -> None:
    handle = await session.spawn(ends(), id="t")
    await handle.wait()
    await cancelled_while_it_is_noted(store, handle.result())

    if verb == "validate_handles":
        assert states(await session.validate_handles(["t"])) == ["completed"]
    else:
        await getattr(session, verb)(other, ["t"])
        assert await other.handle("t")


@pytest.mark.parametrize(("cancelled", "is_read"), [({0}, True), ({1}, True), ({0, 1}, False)])
async def test_an_outcome_counts_as_read_if_one_of_its_waiters_was_handed_it(
    store: TaskStore, session: SessionTasks, cancelled: set[int], is_read: bool
) -> None:
    handles = [await session.spawn(ends(), id="t"), await session.handle("t")]
    await handles[0].wait()
    waits = [asyncio.create_task(handle.result()) for handle in handles]
    assert store._core is not None
    while not any(reading.waiting == 2 and reading.is_asked_for for reading in store._core.readings):
        await asyncio.sleep(0)
    for number in cancelled:
        waits[number].cancel()
    await asyncio.gather(*waits, return_exceptions=True)

    assert [wait.cancelled() for wait in waits] == [number in cancelled for number in range(2)]
    with pytest.raises(HandleNotVisible) if is_read else contextlib.nullcontext():
        assert states(await session.validate_handles(["t"])) == ["completed"]


class Held:
    """A writer held in the middle of a batch: what is asked for meanwhile stands in its queue."""

    def __init__(self, store: TaskStore) -> None:
        assert store._core is not None
        assert store._core.writer is not None
        self.readings, self._writer, self._gate = store._core.readings, store._core.writer, threading.Event()

    async def __aenter__(self) -> Held:
        self._holding = self._writer.submit(lambda tx: self._gate.wait(10))
        while not self._writer._is_busy:
            await asyncio.sleep(0)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._gate.set()
        await self._holding

    async def until_the_end_is_queued(self, waiting: int) -> None:
        while not any(reading.waiting == waiting and reading.is_asked_for for reading in self.readings):
            await asyncio.sleep(0)


async def test_that_a_waiter_was_handed_an_outcome_is_noted_with_the_end_itself(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = asyncio.Event()
    handle = await session.spawn(may_end.wait(), id="t")
    waiting = asyncio.create_task(handle.result())
    assert store._core is not None
    assert store._core.writer is not None
    while not list(store._core.readings):
        await asyncio.sleep(0)
    committer = store._core.writer._committer
    assert committer is not None
    commit, batches = committer.commit, []
    monkeypatch.setattr(committer, "commit", lambda units: batches.append(len(units)) or commit(units))
    may_end.set()
    assert await waiting is True

    # what one transaction writes has one time
    [task] = rows(path, "SELECT completed_at FROM tasks")
    assert read_at(path, handle) == task["completed_at"]
    assert batches == [1]
    assert not list(store._core.readings)


@pytest.mark.parametrize("verb", ["transfer", "handoff", "validate_handles"])
@pytest.mark.parametrize("how", ["cancelled", "timed out"])
async def test_work_whose_waiter_left_as_its_end_was_stored_is_handed_over_at_once(
    store: TaskStore, session: SessionTasks, other: SessionTasks, verb: str, how: str
) -> None:
    may_end = asyncio.Event()
    handle = await session.spawn(may_end.wait(), id="t")
    waiting = asyncio.create_task(handle.result(timeout=None if how == "cancelled" else 0.2))
    while not list(store._core.readings):
        await asyncio.sleep(0)
    async with Held(store) as held:
        may_end.set()
        await held.until_the_end_is_queued(waiting=1)
        if how == "cancelled":
            waiting.cancel()
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else TimeoutError):
            await waiting
        asked = (
            asyncio.create_task(session.validate_handles(["t"]))
            if verb == "validate_handles"
            else asyncio.create_task(getattr(session, verb)(other, ["t"]))
        )
        await asyncio.sleep(0)
    await asked
    if verb != "validate_handles":
        assert await other.handle("t")


@pytest.mark.parametrize(("cancelled", "is_read"), [({0}, True), ({1}, True), ({0, 1}, False)])
async def test_an_outcome_noted_with_the_end_counts_as_read_if_one_of_its_waiters_was_handed_it(
    store: TaskStore, session: SessionTasks, cancelled: set[int], is_read: bool
) -> None:
    may_end = asyncio.Event()
    handles = [await session.spawn(may_end.wait(), id="t"), await session.handle("t")]
    waits = [asyncio.create_task(handle.result()) for handle in handles]
    async with Held(store) as held:
        may_end.set()
        await held.until_the_end_is_queued(waiting=2)
        for number in cancelled:
            waits[number].cancel()
    await asyncio.gather(*waits, return_exceptions=True)

    assert [wait.cancelled() for wait in waits] == [number in cancelled for number in range(2)]
    with pytest.raises(HandleNotVisible) if is_read else contextlib.nullcontext():
        assert states(await session.validate_handles(["t"])) == ["completed"]


async def test_an_end_that_comes_to_another_session_is_not_read_by_who_waits_with_the_old_handle(
    store: TaskStore, session: SessionTasks, other: SessionTasks
) -> None:
    may_end = asyncio.Event()
    handle = await session.spawn(may_end.wait(), id="t")
    waiting = asyncio.create_task(handle.result())
    while not list(store._core.readings):
        await asyncio.sleep(0)
    await session.transfer(other, ["t"])
    may_end.set()

    assert await waiting is True
    assert states(await other.validate_handles(["t"])) == ["completed"]


async def test_an_end_lands_where_another_process_put_the_task_a_moment_before(
    store: TaskStore, session: SessionTasks, other: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store._core is not None
    assert store._core.runner is not None
    may_end = asyncio.Event()
    handle = await session.spawn(may_end.wait(), id="t")
    # this process has not been told of it yet
    monkeypatch.setattr(store._core.runner, "note_moved", lambda *told: None)
    async with TaskStore.connect(path, runtime=RUNTIME) as beside:
        await (await beside.session("s1")).transfer(other.scope, ["t"])
        may_end.set()
        assert await handle.result() is True

    assert rows(path, "SELECT scope FROM events WHERE type = 'completed'") == [{"scope": str(other.scope)}]
    assert rows(path, "SELECT scope FROM tasks WHERE id = 't'") == [{"scope": str(other.scope)}]


async def test_work_that_was_away_is_read_when_it_is_back(session: SessionTasks, other: SessionTasks) -> None:
    handle = await session.spawn(ends(), id="t")
    await handle.wait()
    await session.transfer(other, ["t"])
    await handle
    assert states(await other.validate_handles(["t"])) == ["completed"]
    await other.transfer(session, ["t"])

    await handle

    with pytest.raises(HandleNotVisible):
        await session.validate_handles(["t"])


async def test_a_time_out_is_kept_though_somebody_holds_the_write_lock(session: SessionTasks, path: Path) -> None:
    handle = await session.spawn(ends(), id="t")
    await handle.wait()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(10):
            await handle.result(timeout=0.1)
        shell.execute("ROLLBACK")

    # noted once the lock is free
    await session.unregister("nobody")
    with pytest.raises(HandleNotVisible):
        await session.validate_handles(["t"])


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["h", "h-", "h-h", "h-index", "h-h-"])
async def test_a_generated_id_names_its_task_whatever_the_function_is_called(session: SessionTasks, label: str) -> None:
    handle = await session.spawn_hidden(label, ends())

    assert (await session.get(handle.id)).label == label


async def test_the_text_of_a_handles_json_names_its_task(session: SessionTasks) -> None:
    handle = await session.spawn(ends(), id="t")
    text = json.dumps(handle.to_json())

    assert (await session.get(text)).id == "t"
    assert (await TaskHandle.from_json(session, text)).task_seq == handle.task_seq
    for wrong in (
        '{"__handle__": "task", "id": ',
        '{"__handle__": "task", "id": 7}',
        '{"__handle__": "file", "id": "h-1"}',
    ):
        with pytest.raises(InvalidId):
            await session.get(wrong)


async def test_a_session_observes_anothers_work_by_the_others_id_or_scope(
    session: SessionTasks, other: SessionTasks
) -> None:
    await session.spawn(ends(), id="t")

    seen = [await other.observe(form, "t") for form in ("s1", "desktop:s1", Scope("desktop", "s1"), session)]

    assert len({handle.handle_id for handle in seen}) == 1


async def test_a_note_that_cannot_be_stored_holds_no_look_up(session: SessionTasks, path: Path) -> None:
    handle = await session.spawn(ends(), id="t")
    await handle.wait()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(handle.result(), 0.1)
        async with asyncio.timeout(10):
            assert (await session.get("t")).state is TaskState.COMPLETED
            assert states(await session.validate_handles(["t"])) == ["completed"]
        shell.execute("ROLLBACK")
