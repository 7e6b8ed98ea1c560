"""Cancel callbacks of external work: called at most once, bounded in time, and never in the way of the cancel."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    EventType,
    SessionTasks,
    TaskCancelled,
    TaskExists,
    TaskHandle,
    TaskKind,
    TaskRecord,
    TaskState,
    TaskStore,
    Transition,
    Verdict,
    transitions,
)
from lash_store.errors import StorageFull
from tests.runtime.support import RUNTIME, Stepped, cancel_at, event_count, event_types, next_event, rows

OTHER = TaskKind.OTHER
CALLED = ["registered", "cancel_requested", "state_changed", "cancelled"]
FAILED = ["registered", "cancel_requested", "state_changed", "callback_failed", "cancelled"]


class Stop:
    """A callback that stays until it may go on, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.called = asyncio.Event()
        self.release = asyncio.Event()

    async def __call__(self) -> None:
        self.calls += 1
        self.called.set()
        await self.release.wait()

    async def is_called(self) -> None:
        async with asyncio.timeout(20):
            await self.called.wait()


@pytest.fixture
def stop() -> Stop:
    """A callback that stays until it may go on."""
    return Stop()


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a plain function blocks on; opened when the test is over, so that its thread ends."""
    gate = threading.Event()
    yield gate
    gate.set()


@contextlib.asynccontextmanager
async def swallowing() -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Give a callback that swallows every cancellation until the block is left."""
    done = asyncio.Event()
    going_on: set[asyncio.Task[Any]] = set()

    async def swallow() -> None:
        task = asyncio.current_task()
        assert task is not None
        going_on.add(task)
        while not done.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await done.wait()

    try:
        yield swallow
    finally:
        done.set()
        if going_on:
            await asyncio.wait(going_on, timeout=20)


async def ended(handle: TaskHandle) -> TaskRecord:
    """Wait for the end of a task."""
    record = await handle.wait(20)
    assert record.is_terminal, record
    return record


# --- how it is called -----------------------------------------------------------------------------------------------


class Shapes:
    """Callbacks of every shape; what they were given is put into *got*."""

    def __init__(self) -> None:
        self.got: list[Any] = []

    async def coroutine(self) -> None:
        self.got.append(None)

    async def coroutine_with_record(self, record: TaskRecord) -> None:
        self.got.append(record)

    def plain(self) -> None:
        self.got.append(None)

    def plain_with_record(self, record: TaskRecord) -> None:
        self.got.append(record)

    def with_default(self, record: TaskRecord | None = None) -> None:
        self.got.append(record)

    def with_record_and_default(self, record: TaskRecord, more: int = 1) -> None:
        self.got.append(record)

    def with_anything(self, *args: Any, **kwargs: Any) -> None:
        self.got.append(*args, **kwargs) if args else self.got.append(None)

    async def after(self, record: TaskRecord, more: int) -> None:
        self.got.append(record if more == 1 else "wrong")

    @property
    def a_lambda(self) -> Any:
        return lambda: self.got.append(None)

    @property
    def lambda_with_defaults(self) -> Any:
        # the usual way to bind a loop's variable
        return lambda got=self.got, what=None: got.append(what)

    @property
    def lambda_with_record(self) -> Any:
        return lambda record, got=self.got: got.append(record)

    @property
    def lambda_that_awaits(self) -> Any:
        return lambda record: self.coroutine_with_record(record)

    @property
    def partial(self) -> Any:
        return functools.partial(self.after, more=1)

    @property
    def callable_object(self) -> Any:
        got = self.got

        class Callback:
            async def __call__(self, record: TaskRecord) -> None:
                got.append(record)

        return Callback()


WITHOUT_RECORD = ["coroutine", "plain", "with_default", "with_anything", "a_lambda", "lambda_with_defaults"]
WITH_RECORD = [
    "coroutine_with_record",
    "plain_with_record",
    "with_record_and_default",
    "lambda_with_record",
    "lambda_that_awaits",
    "partial",
    "callable_object",
]


@pytest.mark.parametrize("shape", [*WITHOUT_RECORD, *WITH_RECORD])
async def test_a_callback_of_any_shape_is_called_once_with_the_record_if_it_wants_it(
    session: SessionTasks, shape: str, path: Path
) -> None:
    shapes = Shapes()
    handle = await session.register("job", OTHER, getattr(shapes, shape))

    record = await handle.cancel("enough")

    assert (record.state, record.callback_error) == (TaskState.CANCELLED, None)
    assert event_types(path, handle.task_seq) == CALLED
    [got] = shapes.got
    if shape in WITHOUT_RECORD:
        assert got is None
    else:
        assert (got.task_seq, got.id, got.state) == (handle.task_seq, "job", TaskState.CANCEL_REQUESTED)
        assert (got.cancel_reason, got.callback_begun_at) == ("enough", record.callback_begun_at)


async def test_that_the_call_begins_is_in_the_file_before_it_does(session: SessionTasks, path: Path) -> None:
    seen: list[Any] = []

    def look() -> None:
        seen.extend(rows(path, "SELECT state, callback_begun_at FROM tasks"))

    handle = await session.register("job", OTHER, look)

    record = await handle.cancel()

    assert [row["state"] for row in seen] == ["cancel_requested"]
    assert seen[0]["callback_begun_at"] is not None
    assert record.callback_begun_at is not None
    assert record.cancel_requested_at is not None
    assert record.completed_at is not None
    assert record.cancel_requested_at <= record.callback_begun_at <= record.completed_at


async def test_a_plain_callback_may_take_its_time_without_holding_up_the_loop(
    session: SessionTasks, gate: threading.Event
) -> None:
    handle = await session.register("job", OTHER, gate.wait)
    cancelling = asyncio.create_task(handle.cancel())
    while (await handle.record()).callback_begun_at is None:
        await asyncio.sleep(0)

    gate.set()

    async with asyncio.timeout(20):
        assert (await cancelling).state is TaskState.CANCELLED


async def test_cancelled_is_never_reported_while_the_callback_runs(
    session: SessionTasks, stop: Stop, path: Path
) -> None:
    handle = await session.register("job", OTHER, stop)

    record = await handle.cancel("enough", timeout=0.05)

    await stop.is_called()
    assert (record.state, record.cancel_reason) == (TaskState.CANCEL_REQUESTED, "enough")
    assert (await handle.wait(0.05)).state is TaskState.CANCEL_REQUESTED
    assert event_types(path, handle.task_seq) == CALLED[:-1]
    stop.release.set()
    assert (await ended(handle)).state is TaskState.CANCELLED
    with pytest.raises(TaskCancelled, match="enough"):
        await handle


async def test_work_without_a_callback_is_cancelled_by_the_books(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER)

    record = await handle.cancel("enough")

    assert (record.state, record.cancel_reason, record.callback_begun_at) == (TaskState.CANCELLED, "enough", None)
    assert event_types(path, handle.task_seq) == ["registered", "cancel_requested", "cancelled"]


async def together(store: TaskStore, gate: threading.Event, *operations: Coroutine[Any, Any, Any]) -> list[Any]:
    """Run operations so that what they write goes into one commit, in their order; return what they gave."""
    assert store._core is not None
    writer = store._core.to_request()
    # what comes while the writer's thread is held goes into the next commit
    held = writer.submit(lambda tx: gate.wait(20))
    running = []
    async with asyncio.timeout(20):
        while writer._queue:
            await asyncio.sleep(0)
        for operation in operations:
            running.append(asyncio.create_task(operation))
            while len(writer._queue) < len(running):
                await asyncio.sleep(0)
        gate.set()
        await held
        return await asyncio.gather(*running)


async def test_a_register_and_a_cancel_in_one_commit_call_the_callback(
    store: TaskStore, session: SessionTasks, stop: Stop, gate: threading.Event, path: Path
) -> None:
    stop.release.set()

    handle, record = await together(store, gate, session.register("job", OTHER, stop), session.cancel("job"))

    assert (record.state, stop.calls) == (TaskState.CANCELLED, 1)
    assert event_types(path, handle.task_seq) == CALLED


@pytest.mark.parametrize("way", ["complete", "unregister", "abandon"])
async def test_a_cancel_that_is_overtaken_in_its_own_commit_calls_nothing(
    store: TaskStore, session: SessionTasks, stop: Stop, gate: threading.Event, way: str, path: Path
) -> None:
    stop.release.set()
    handle = await session.register("job", OTHER, stop)
    overtakes = {
        "complete": lambda: session.complete("job", TaskState.COMPLETED),
        "unregister": lambda: session.unregister("job"),
        "abandon": lambda: session.abandon("job", "gone"),
    }[way]

    record, _ = await together(store, gate, session.cancel("job"), overtakes())

    assert record.state == {"complete": "completed", "unregister": "cancelled", "abandon": "abandoned"}[way]
    # a callback that was begun would be called before this one is
    await session.register("next", OTHER, stop)
    await session.cancel("next")
    assert stop.calls == 1
    assert event_types(path, handle.task_seq) == ["registered", "cancel_requested", str(record.state)]


# --- errors ---------------------------------------------------------------------------------------------------------


class Unshowable(Exception):
    """What cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


ERRORS: list[BaseException] = [
    RuntimeError("no such pid"),
    Unshowable(),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    asyncio.CancelledError(),
    TimeoutError("its own"),
    BaseException("base"),
]


@pytest.mark.long
@pytest.mark.parametrize("plain", [False, True], ids=["async", "plain"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
async def test_what_a_callback_raises_is_kept_and_the_cancel_goes_on(
    session: SessionTasks, error: BaseException, plain: bool, path: Path
) -> None:
    async def raises() -> None:
        raise error

    def raises_too() -> None:
        raise error

    handle = await session.register("job", OTHER, raises_too if plain else raises)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert record.state is TaskState.CANCELLED
    assert record.callback_error is not None
    assert record.callback_error.type == type(error).__name__
    assert event_types(path, handle.task_seq) == FAILED
    assert await (await session.spawn(asyncio.sleep(0, "goes on"))) == "goes on"


async def test_the_event_of_a_failed_callback_says_what_it_raised(store: TaskStore, session: SessionTasks) -> None:
    def raises() -> None:
        raise ProcessLookupError("no such pid")

    await session.register("job", OTHER, raises)

    record = await session.cancel("job")

    event = await next_event(store, EventType.CALLBACK_FAILED)
    assert record.callback_error is not None
    assert (record.callback_error.type, record.callback_error.message) == ("ProcessLookupError", "no such pid")
    assert "raises" in (record.callback_error.traceback or "")
    assert event.data["callback_error"] == record.callback_error.model_dump()


async def test_a_plain_callback_that_raises_stop_iteration_is_no_exception(session: SessionTasks, path: Path) -> None:
    def raises() -> None:
        raise StopIteration("odd")

    handle = await session.register("job", OTHER, raises)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert record.state is TaskState.CANCELLED
    assert record.callback_error is not None
    assert "StopIteration" in f"{record.callback_error.type} {record.callback_error.message}"
    assert event_types(path, handle.task_seq) == FAILED


async def test_a_callback_that_cannot_be_called_does_not_hold_up_the_cancel(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER, lambda record, more: None)

    record = await handle.cancel()

    assert record.state is TaskState.CANCELLED
    assert record.callback_error is not None
    assert record.callback_error.type == "TypeError"
    assert event_types(path, handle.task_seq) == FAILED


# --- time -----------------------------------------------------------------------------------------------------------


async def test_an_async_callback_that_hangs_does_not_hang_cancel(
    opened: Callable[..., Any], stop: Stop, path: Path
) -> None:
    session = await (await opened(callback_timeout=0.05)).session("s1")
    handle = await session.register("job", OTHER, stop)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert (record.state, stop.calls) == (TaskState.CANCELLED, 1)
    assert record.callback_error is not None
    assert (record.callback_error.type, "0.05 s" in record.callback_error.message) == ("TimeoutError", True)
    assert event_types(path, handle.task_seq) == FAILED


async def test_a_callback_that_swallows_cancellation_does_not_hang_cancel(opened: Callable[..., Any]) -> None:
    session = await (await opened(callback_timeout=0.05)).session("s1")
    async with swallowing() as swallow:
        handle = await session.register("job", OTHER, swallow)

        async with asyncio.timeout(20):
            record = await handle.cancel()

        assert record.state is TaskState.CANCELLED
        assert record.callback_error is not None
        assert record.callback_error.type == "TimeoutError"


async def test_a_plain_callback_that_blocks_does_not_hang_cancel(
    opened: Callable[..., Any], gate: threading.Event
) -> None:
    session = await (await opened(callback_timeout=0.05)).session("s1")
    handle = await session.register("job", OTHER, gate.wait)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert record.state is TaskState.CANCELLED
    assert record.callback_error is not None
    assert record.callback_error.type == "TimeoutError"


async def test_many_callbacks_that_hang_hold_up_nobody_else(opened: Callable[..., Any], gate: threading.Event) -> None:
    session = await (await opened(callback_timeout=3600.0)).session("s1")
    for number in range(40):
        await session.register(f"hangs{number}", OTHER, gate.wait)
        await session.cancel(f"hangs{number}", timeout=0)
    handle = await session.register("job", OTHER, lambda: None)

    async with asyncio.timeout(20):
        assert (await handle.cancel()).state is TaskState.CANCELLED

    gate.set()
    assert {report.record.state for report in await session.cancel_all(timeout=20)} == {TaskState.CANCELLED}


# --- at most once ---------------------------------------------------------------------------------------------------


async def test_two_cancels_at_once_call_it_once(session: SessionTasks, stop: Stop, path: Path) -> None:
    handle = await session.register("job", OTHER, stop)
    cancels = [asyncio.create_task(handle.cancel(str(number))) for number in range(10)]
    await stop.is_called()
    cancels += [asyncio.create_task(session.cancel("job")), asyncio.create_task(session.cancel_all())]
    stop.release.set()

    async with asyncio.timeout(20):
        records = await asyncio.gather(*cancels[:-1])
        await cancels[-1]

    assert {record.state for record in records} == {TaskState.CANCELLED}
    assert stop.calls == 1
    assert event_types(path, handle.task_seq) == CALLED


async def test_two_stores_that_cancel_at_once_call_it_once(
    session: SessionTasks, opened: Callable[..., Any], stop: Stop, path: Path
) -> None:
    handle = await session.register("job", OTHER, stop)
    stop.release.set()
    other = await (await opened()).session("s1")
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        asker = await asking.session("s1")

        async with asyncio.timeout(20):
            records = await asyncio.gather(*(one.cancel("job") for one in (session, other, asker)))

    assert {record.state for record in records} == {TaskState.CANCELLED}
    assert stop.calls == 1
    assert event_types(path, handle.task_seq) == CALLED


async def test_cancel_of_a_finished_task_returns_it_unchanged_with_no_event_and_no_callback(
    session: SessionTasks, stop: Stop, path: Path
) -> None:
    stop.release.set()
    for state in (TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED):
        handle = await session.register("job", OTHER, stop)
        record = (await session.complete("job", state)).record
        count = event_count(path)

        assert await handle.cancel("late") == record
        assert await session.cancel("job", "late") == record
        assert event_count(path) == count

    handle = await session.register("job", OTHER, stop)
    record = await handle.cancel("once")
    count = event_count(path)
    assert await handle.cancel("again") == record
    assert event_count(path) == count
    assert stop.calls == 1


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
async def test_a_cancelled_canceller_loses_neither_event_nor_callback(
    store: TaskStore, session: SessionTasks, late: bool, path: Path
) -> None:
    called: list[str] = []

    async def stop(record: TaskRecord) -> None:
        # long enough that the canceller has to wait for it
        await store.session("behind it in the queue")
        called.append(record.id)

    async def step(at: int) -> tuple[Stepped, TaskHandle]:
        handle = await session.register(f"job{at}", OTHER, stop)
        return await cancel_at(session.cancel(f"job{at}", "stop"), at, late=late), handle

    reached = 0
    for at in itertools.count(1):
        stepped, handle = await step(at)
        assert stepped.error is None or stepped.was_cancelled, stepped.error
        await store.session("behind it, too")
        record = await handle.record()
        if record.cancel_requested_at is None:
            # the request did not reach the file, so nothing came of it
            assert stepped.was_cancelled
            assert (record.state, event_types(path, handle.task_seq)) == (TaskState.RUNNING, ["registered"])
            assert f"job{at}" not in called
        else:
            reached += 1
            assert (await ended(handle)).state is TaskState.CANCELLED
            assert called.count(f"job{at}") == 1
            assert event_types(path, handle.task_seq) == CALLED
        if not stepped.reached:
            assert at > 2, "the cancel was never suspended: nothing was tested"
            break
    assert reached > 1


async def test_a_cancelled_canceller_of_a_callback_that_hangs_leaves_the_request(
    session: SessionTasks, stop: Stop
) -> None:
    handle = await session.register("job", OTHER, stop)
    canceller = asyncio.create_task(handle.cancel("stop"))
    await stop.is_called()

    canceller.cancel()

    with pytest.raises(asyncio.CancelledError):
        await canceller
    assert (await handle.record()).state is TaskState.CANCEL_REQUESTED
    stop.release.set()
    record = await ended(handle)
    assert (record.state, record.cancel_reason, stop.calls) == (TaskState.CANCELLED, "stop", 1)


# --- what it may do -------------------------------------------------------------------------------------------------


async def test_a_callback_may_complete_its_own_task(session: SessionTasks, path: Path) -> None:
    said: asyncio.Future[Transition] = asyncio.get_running_loop().create_future()

    async def finish(record: TaskRecord) -> None:
        said.set_result(await session.complete(record.id, TaskState.COMPLETED, result="partly"))

    handle = await session.register("job", OTHER, finish)

    record = await handle.cancel("enough")

    assert (record.state, record.result, record.cancel_reason) == (TaskState.COMPLETED, "partly", "enough")
    async with asyncio.timeout(20):
        assert (await said).verdict is Verdict.APPLIED
    assert event_types(path, handle.task_seq) == [*CALLED[:-1], "completed"]


async def test_a_callback_may_unregister_its_own_task(session: SessionTasks, path: Path) -> None:
    handle = await session.register("job", OTHER, lambda: session.unregister("job"))

    record = await handle.cancel()

    assert (record.state, record.callback_error) == (TaskState.CANCELLED, None)
    assert event_types(path, handle.task_seq) == CALLED


async def test_a_callback_may_ask_again_for_the_cancel_of_its_own_task(session: SessionTasks, path: Path) -> None:
    async def again(record: TaskRecord) -> None:
        assert (await session.cancel(record.id, "again", timeout=0)).state is TaskState.CANCEL_REQUESTED

    handle = await session.register("job", OTHER, again)

    record = await handle.cancel("first")

    assert (record.state, record.cancel_reason, record.callback_error) == (TaskState.CANCELLED, "first", None)
    assert event_types(path, handle.task_seq) == CALLED


async def test_a_callback_that_waits_for_its_own_end_is_bounded(opened: Callable[..., Any], path: Path) -> None:
    session = await (await opened(callback_timeout=0.1)).session("s1")

    async def wait_for_myself(record: TaskRecord) -> None:
        await session.cancel(record.id)

    handle = await session.register("job", OTHER, wait_for_myself)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert record.state is TaskState.CANCELLED
    assert event_types(path, handle.task_seq)[:3] == CALLED[:3]


async def test_a_callback_may_spawn_and_cancel_other_work(session: SessionTasks) -> None:
    await session.register("second", OTHER, lambda: None)

    async def stop() -> None:
        await (await session.spawn(asyncio.sleep(0), id="clean up"))
        await session.cancel("second", "with the first")

    handle = await session.register("first", OTHER, stop)

    assert (await handle.cancel()).callback_error is None
    assert (await session.get("clean up")).state is TaskState.COMPLETED
    assert (await session.get("second")).cancel_reason == "with the first"


async def test_an_error_after_the_work_has_ended_is_not_recorded(session: SessionTasks, path: Path) -> None:
    async def finish_and_raise(record: TaskRecord) -> None:
        await session.complete(record.id, TaskState.FAILED, failure="mine")
        raise RuntimeError("too late")

    handle = await session.register("job", OTHER, finish_and_raise)

    record = await handle.cancel()
    await session.register("another", OTHER, lambda: None)
    await session.cancel("another")

    assert (record.state, record.callback_error) == (TaskState.FAILED, None)
    assert await handle.record() == record
    assert event_types(path, handle.task_seq) == [*CALLED[:-1], "failed"]


async def test_work_that_ends_while_its_callback_runs_has_that_end(
    session: SessionTasks, stop: Stop, path: Path
) -> None:
    handle = await session.register("job", OTHER, stop)
    canceller = asyncio.create_task(handle.cancel())
    await stop.is_called()

    await session.complete("job", TaskState.COMPLETED, result=1)

    async with asyncio.timeout(20):
        assert (await canceller).state is TaskState.COMPLETED
    second = await session.register("job", OTHER)
    stop.release.set()
    await session.register("another", OTHER, lambda: None)
    await session.cancel("another")
    # what the old callback leaves does not touch the next of its id
    assert (await second.record()).state is TaskState.RUNNING
    assert event_types(path, handle.task_seq) == [*CALLED[:-1], "completed"]


async def test_a_callback_goes_with_its_task_into_another_session(store: TaskStore, session: SessionTasks) -> None:
    got: list[TaskRecord] = []
    successor = await store.session("s2")
    handle = await session.register("job", OTHER, lambda record: got.append(record))
    await session.transfer(successor, ["job"])

    record = await successor.cancel("job", "from there")

    assert record.state is TaskState.CANCELLED
    assert [(one.task_seq, one.scope) for one in got] == [(handle.task_seq, successor.scope)]


# --- closing --------------------------------------------------------------------------------------------------------


async def test_a_callback_that_ends_in_the_time_of_a_close_is_heard_out(
    new: Callable[..., TaskStore], stop: Stop, path: Path
) -> None:
    store = new()
    async with store:
        session = await store.session("s1")
        handle = await session.register("job", OTHER, stop)
        await handle.cancel(timeout=0)
        await stop.is_called()
        closing = asyncio.create_task(store.close())
        while not store._core.is_closing:  # type: ignore[union-attr]
            await asyncio.sleep(0)
        stop.release.set()
        await closing

    assert event_types(path, handle.task_seq) == CALLED
    assert rows(path, "SELECT state, callback_error FROM tasks") == [{"state": "cancelled", "callback_error": None}]


@pytest.mark.parametrize("shape", ["waits", "swallows", "blocks"])
async def test_a_store_closed_while_a_callback_runs_closes_in_time_and_the_cancel_is_finished(
    new: Callable[..., TaskStore], stop: Stop, gate: threading.Event, shape: str, path: Path
) -> None:
    calls: list[int] = []
    store = new(callback_timeout=3600.0)
    async with swallowing() as swallow:

        async def stay() -> None:
            calls.append(1)
            await (swallow() if shape == "swallows" else stop())

        def block() -> None:
            calls.append(1)
            gate.wait()

        async with store:
            session = await store.session("s1")
            handle = await session.register("job", OTHER, block if shape == "blocks" else stay)
            waiting = asyncio.create_task(handle.cancel("stop"))
            async with asyncio.timeout(20):
                while not calls:
                    await asyncio.sleep(0)
                await store.close(timeout=0.1)
                record = await waiting

        [row] = rows(path, "SELECT * FROM tasks")
        assert (row["state"], row["cancel_reason"]) == ("cancelled", "stop")
        assert '"CallbackCutOff"' in row["callback_error"]
        assert event_types(path, handle.task_seq) == FAILED
        assert record.state is TaskState.CANCELLED
    async with new() as store:
        session = await store.session("s1")
        again = await session.register("job", OTHER, lambda: calls.append(2))
        assert again.task_seq != handle.task_seq
        await store.recover()
    assert calls == [1]
    assert event_types(path, handle.task_seq) == FAILED


async def test_a_callback_may_close_its_own_store(new: Callable[..., TaskStore], path: Path) -> None:
    store = new()
    async with store:
        session = await store.session("s1")
        handle = await session.register("job", OTHER, lambda: store.close(timeout=0.1))

        async with asyncio.timeout(20):
            await asyncio.gather(handle.cancel(), return_exceptions=True)
            while rows(path, "SELECT ended_at FROM owners") == [{"ended_at": None}]:
                await asyncio.sleep(0)
            await store.close()

    assert rows(path, "SELECT state FROM tasks") == [{"state": "cancelled"}]
    assert event_types(path, handle.task_seq) == FAILED


# --- nobody to call it ----------------------------------------------------------------------------------------------


async def cancel_without_a_keeper(new: Callable[..., TaskStore], path: Path) -> TaskHandle:
    """Register work with a callback, close its keeper, and request its cancel."""

    def uncalled() -> None:
        raise AssertionError("a closed store called back")

    async with new() as store:
        handle = await (await store.session("s1")).register("job", OTHER, uncalled)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking, asyncio.timeout(20):
        record = await (await asking.session("s1")).cancel("job", "meanwhile")
    assert (record.state, record.owner_id, record.callback_begun_at) == (TaskState.CANCEL_REQUESTED, None, None)
    return handle


async def test_the_cancel_of_work_nobody_keeps_stands_until_it_is_registered_again(
    new: Callable[..., TaskStore], stop: Stop, path: Path
) -> None:
    first = await cancel_without_a_keeper(new, path)
    async with new() as store:
        session = await store.session("s1")
        assert (await session.get("job")).state is TaskState.CANCEL_REQUESTED
        count = event_count(path)
        await store.recover()
        assert event_count(path) == count
        stop.release.set()

        second = await session.register("job", OTHER, stop)

        assert (second.task_seq, second.handle_id) == (first.task_seq, first.handle_id)
        record = await ended(second)
        assert (record.state, record.cancel_reason, stop.calls) == (TaskState.CANCELLED, "meanwhile", 1)
    told = ["registered", "released", "cancel_requested", "reattached", "state_changed", "cancelled"]
    assert event_types(path, first.task_seq) == told


async def test_registered_again_without_a_callback_cancelled_work_is_ended(
    new: Callable[..., TaskStore], path: Path
) -> None:
    first = await cancel_without_a_keeper(new, path)
    async with new() as store:
        session = await store.session("s1")

        second = await session.register("job", OTHER)

        record = await second.record()
        assert (second.task_seq, record.state, record.callback_begun_at) == (
            first.task_seq,
            TaskState.CANCELLED,
            None,
        )
    assert event_types(path, first.task_seq)[-2:] == ["reattached", "cancelled"]


async def test_cancelled_work_nobody_keeps_is_not_bound_to_another_kind(
    new: Callable[..., TaskStore], path: Path
) -> None:
    await cancel_without_a_keeper(new, path)
    async with new() as store:
        session = await store.session("s1")
        count = event_count(path)

        with pytest.raises(TaskExists):
            await session.register("job", TaskKind.MONITOR, lambda: None)

        assert event_count(path) == count
        assert (await session.get("job")).state is TaskState.CANCEL_REQUESTED


@pytest.mark.parametrize("way", ["complete", "unregister", "abandon"])
async def test_cancelled_work_nobody_keeps_can_be_ended_from_outside(
    new: Callable[..., TaskStore], way: str, path: Path
) -> None:
    await cancel_without_a_keeper(new, path)
    async with TaskStore.connect(path, runtime=RUNTIME) as asking:
        session = await asking.session("s1")
        if way == "complete":
            await session.complete("job", TaskState.COMPLETED)
        elif way == "unregister":
            await session.unregister("job")
        else:
            await session.abandon("job", "nobody will come")

        state = {"complete": "completed", "unregister": "cancelled", "abandon": "abandoned"}[way]
        assert (await session.get("job")).state == state


async def test_who_waits_hears_of_the_end_that_a_later_keeper_brings(
    new: Callable[..., TaskStore], opened: Callable[..., Any], path: Path
) -> None:
    await cancel_without_a_keeper(new, path)
    watching = await opened()
    waiting = asyncio.create_task((await watching.handle("desktop:s1", "job")).wait(20))
    session = await (await opened()).session("s1")

    await session.register("job", OTHER, lambda: None)

    assert (await waiting).state is TaskState.CANCELLED


# --- trouble with the file ------------------------------------------------------------------------------------------


async def test_what_came_of_a_callback_is_stored_once_the_disk_lets_it(
    session: SessionTasks, monkeypatch: pytest.MonkeyPatch, stop: Stop, path: Path
) -> None:
    end_called, refusals = transitions.end_called, [1]

    def refused_once(*args: Any) -> Any:
        if refusals:
            refusals.pop()
            raise StorageFull("no room")
        return end_called(*args)

    monkeypatch.setattr(transitions, "end_called", refused_once)
    stop.release.set()
    handle = await session.register("job", OTHER, stop)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert (record.state, stop.calls, refusals) == (TaskState.CANCELLED, 1, [])
    assert event_types(path, handle.task_seq) == CALLED


async def test_a_callback_whose_begin_could_not_be_stored_is_not_called_before_it_is(
    session: SessionTasks, monkeypatch: pytest.MonkeyPatch, stop: Stop, path: Path
) -> None:
    transition, refusals = transitions.transition, [1]

    def refused_once(tx: Any, task: Any, command: Any, **options: Any) -> Any:
        if type(command).__name__ == "BeginCallback" and refusals:
            refusals.pop()
            assert stop.calls == 0
            raise StorageFull("no room")
        return transition(tx, task, command, **options)

    monkeypatch.setattr(transitions, "transition", refused_once)
    stop.release.set()
    handle = await session.register("job", OTHER, stop)

    async with asyncio.timeout(20):
        record = await handle.cancel()

    assert (record.state, stop.calls, refusals) == (TaskState.CANCELLED, 1, [])
    assert event_types(path, handle.task_seq) == CALLED
