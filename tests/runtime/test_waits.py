"""How a body waits: for a time, for a signal, for somebody else; across attempts, without its slot, and no longer than it may."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import (
    Backoff,
    EventType,
    HandleNotVisible,
    IdempotencyConflict,
    InvalidId,
    LimitExceeded,
    Limits,
    Recovery,
    ResultNotSerializable,
    SessionTasks,
    StepKind,
    StorageFull,
    StoreClosed,
    TaskContext,
    TaskError,
    TaskFailed,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
    Verdict,
    alarms,
    memory,
)
from lash_store.bodies import trying
from tests.runtime.support import RUNTIME, cancel_at, event_types, hold, next_event, rows, take
from tests.runtime.test_slots import assert_slots

HOUR = 3600.0
SOON = 2.0
"""Seconds within which something happens "at once", on a machine that does other things, too."""


class Clock:
    """The wall clock, which a test may set."""

    def __init__(self, real: Callable[[], float]) -> None:
        self._real = real
        self.ahead = 0.0

    def __call__(self) -> float:
        return self._real() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Let a test set the wall clock."""
    clock = Clock(time.time)
    monkeypatch.setattr(time, "time", clock)
    return clock


def untaken(path: Path) -> list[str]:
    """Return the payloads of the signals that a later attempt would be handed."""
    found = rows(path, "SELECT payload FROM signals WHERE taken_at IS NULL ORDER BY signal_seq")
    return [row["payload"] for row in found]


def alarms_of(store: TaskStore) -> int:
    """Return how many things are to happen at a time."""
    runner = store._core.runner  # type: ignore[union-attr]
    return sum(entry[2].call is not None for entry in runner.alarms._heap)  # type: ignore[union-attr]


async def settled(store: TaskStore) -> None:
    """Wait until every unit before this is through, and what it started."""
    await store.session("behind it in the queue")
    await store.session("and once more")


async def begun_sleeps(task: TaskHandle, count: int) -> None:
    """Wait until a task has begun so many sleeps."""
    async with asyncio.timeout(SOON):
        while sum(step.kind is StepKind.SLEEP for step in await task.steps()) < count:
            await asyncio.sleep(0.01)


async def again(store: TaskStore, session: SessionTasks, task: TaskHandle) -> None:
    """Take the task from its body, and have it reattached."""
    await session.abandon(task.id, "to begin again")
    await store.recover()


# --- sleeping -------------------------------------------------------------------------------------------------------


async def test_a_sleep_stores_its_wake_time(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.sleep(HOUR)

    task = await session.spawn(work)
    await next_event(store, EventType.SAVED)
    [step] = await task.steps()

    assert (step.kind, step.value) == (StepKind.SLEEP, HOUR)
    assert step.begun_at is not None
    assert step.wake_at is not None
    assert (step.wake_at - step.begun_at).total_seconds() == pytest.approx(HOUR, abs=0.1)
    assert (await task.record()).state is TaskState.RUNNING


@pytest.mark.parametrize(
    ("name", "passed"), [(None, HOUR - 0.1), (None, 10 * HOUR), ("nap", HOUR - 0.1), ("nap", HOUR)]
)
async def test_a_later_attempt_sleeps_only_what_is_left(
    new: Callable[..., TaskStore], clock: Clock, name: str | None, passed: float
) -> None:
    store = new()
    slept: list[float] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        began = time.monotonic()
        await task.sleep(HOUR, name=name)
        slept.append(time.monotonic() - began)

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await next_event(store, EventType.SAVED)
    clock.ahead = passed
    async with store:
        task = await store.handle("desktop:s1", "t")
        await task.result(timeout=SOON + 1)

    left = max(0.0, HOUR - passed)
    assert left - 0.1 < slept[0] < left + SOON
    assert len(slept) == 1


async def test_unnamed_sleeps_are_counted_since_the_last_save(new: Callable[..., TaskStore], clock: Clock) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        if task.checkpoint is None:
            await task.sleep(0.001)
            await task.sleep(0.002)
            await task.save("slept twice")
        await task.sleep(HOUR)
        return task.attempt

    async with store:
        task = await (await store.session("s1")).spawn(work, id="t")
        await take(store.events(0, types=[EventType.SAVED]), 4)
        assert {step.kind for step in await task.steps()} == {StepKind.CHECKPOINT, StepKind.SLEEP}
    clock.ahead = HOUR
    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=SOON) == 2


async def test_the_nth_sleep_is_given_to_the_nth_sleep_of_the_next_attempt(
    store: TaskStore, session: SessionTasks, clock: Clock
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        for seconds in (0.001, 0.002, HOUR):
            await task.sleep(seconds)
        return task.attempt

    task = await session.spawn(work)
    await take(store.events(0, types=[EventType.SAVED]), 3)
    clock.ahead = HOUR
    await again(store, session, task)

    assert await task.result(timeout=SOON) == 3
    assert len(await task.steps()) == 3


async def test_an_unnamed_sleep_of_a_step_is_the_steps_own(
    store: TaskStore, session: SessionTasks, clock: Clock
) -> None:
    slept = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        async def nap() -> None:
            await task.sleep(HOUR)
            slept.append(task.attempt)

        await task.step("nap", nap)
        await task.sleep(HOUR)
        return task.attempt

    task = await session.spawn(work)
    await begun_sleeps(task, 1)
    clock.ahead = HOUR
    await again(store, session, task)
    # the body's own, which is not over for an attempt that is given the step
    await begun_sleeps(task, 2)
    await again(store, session, task)
    await settled(store)
    assert slept == [3]
    assert (await task.record()).state is TaskState.RUNNING

    clock.ahead = 2 * HOUR
    await again(store, session, task)
    assert await task.result(timeout=SOON) == 7
    names = {step.name for step in await task.steps() if step.kind is StepKind.SLEEP}
    assert names == {'#try 1 of "nap": 1', "#0.1"}


async def test_each_try_of_a_step_sleeps_anew_and_a_later_attempt_goes_on_with_the_sleeps_of_its_try(
    store: TaskStore, session: SessionTasks, clock: Clock
) -> None:
    polled: list[tuple[int, str]] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async def look() -> None:
            polled.append((task.attempt, "begins"))
            await task.sleep(HOUR)
            polled.append((task.attempt, "ends"))
            if len(polled) < 5:
                raise ConnectionError

        async def poll() -> None:
            # one in another is counted by itself, as well
            await task.step("look", look)

        await task.step("poll", poll, max_attempts=3, backoff=Backoff(initial=0))

    task = await session.spawn(work)
    await begun_sleeps(task, 1)
    clock.ahead = HOUR
    await again(store, session, task)
    # the second try begins its own, which is not over
    await begun_sleeps(task, 2)
    clock.ahead = 2 * HOUR
    await again(store, session, task)

    await task.result(timeout=SOON)
    assert polled == [(1, "begins"), (3, "begins"), (3, "ends"), (3, "begins"), (5, "begins"), (5, "ends")]


async def test_the_sleep_of_a_step_that_runs_goes_on_whatever_is_saved_meanwhile(
    store: TaskStore, session: SessionTasks, clock: Clock
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async def nap() -> None:
            await task.sleep(HOUR)

        running = asyncio.create_task(task.step("nap", nap))
        if task.checkpoint is None:
            await task.sleep(0.001)
            await napping.wait()
            await task.save("there")
        await running

    napping = asyncio.Event()
    task = await session.spawn(work)
    await begun_sleeps(task, 2)
    napping.set()
    async with asyncio.timeout(SOON):
        while StepKind.CHECKPOINT not in {step.kind for step in await task.steps()}:
            await asyncio.sleep(0.01)
    # the body's own is behind the checkpoint
    assert [step.name for step in await task.steps() if step.kind is StepKind.SLEEP] == ['#try 1 of "nap": 1']
    clock.ahead = HOUR
    await again(store, session, task)

    await task.result(timeout=SOON)


async def test_a_store_that_is_opened_in_a_step_runs_its_bodies_in_none(
    store: TaskStore, session: SessionTasks, tmp_path: Path
) -> None:
    received: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async def use() -> str:
            async with TaskStore(tmp_path / "other.db", runtime=RUNTIME) as other:

                @other.task(recovery=Recovery.RERUN)
                async def inner(task: TaskContext) -> str:
                    assert trying.get() is None

                    async def same_name() -> str:
                        await task.sleep(0.001)
                        return str(await task.signal("go"))

                    return await task.step("use", same_name)

                begun = await (await other.session("s1")).spawn(inner, id="t")
                await begun.signal("go", "to the other")
                result = str(await begun.result(timeout=SOON))
                assert untaken(tmp_path / "other.db") == []
                return result

        received.append(await task.step("use", use))
        received.append(await task.signal("go"))

    task = await session.spawn(work, id="t")
    await task.signal("go", "to this one")
    await task.result(timeout=SOON)
    assert received == ["to the other", "to this one"]


async def test_a_save_that_fails_gives_its_number_to_no_other(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[int] = []
    save = memory.save

    def refuse(*_: Any, **__: Any) -> None:
        raise StorageFull("no room")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        if task.checkpoint is None:
            monkeypatch.setattr(memory, "save", refuse)
            failing = asyncio.create_task(task.save(1))
            await asyncio.sleep(0)
            napping = asyncio.create_task(task.sleep(0.001))
            with pytest.raises(StorageFull):
                await failing
            monkeypatch.setattr(memory, "save", save)
            await napping
            await task.save(2)
        await task.sleep(HOUR)
        woken.append(task.attempt)

    task = await session.spawn(work)
    async with asyncio.timeout(SOON):
        while "#2.1" not in {step.name for step in await task.steps()}:
            await asyncio.sleep(0.01)
    [checkpoint] = [step for step in await task.steps() if step.kind is StepKind.CHECKPOINT]
    assert (checkpoint.value, checkpoint.tries) == (2, 2)
    await again(store, session, task)
    await settled(store)
    assert [step.name for step in await task.steps() if step.kind is StepKind.SLEEP] == ["#2.1"]


async def test_a_sleep_with_a_name_is_one_for_the_whole_task(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.sleep(0.01, name="nap")
        await task.save("behind it")
        # its time has come for good
        await task.sleep(HOUR, name="nap")

    task = await session.spawn(work)
    await task.result(timeout=SOON)

    assert [step.name for step in await task.steps() if step.kind is StepKind.SLEEP] == ["nap"]


async def test_a_clock_set_back_makes_no_sleep_longer(
    store: TaskStore, session: SessionTasks, clock: Clock, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        await task.sleep(0.3)

    task = await session.spawn(work)
    await next_event(store, EventType.SAVED)
    clock.ahead = -HOUR

    await task.result(timeout=SOON)


async def test_a_clock_set_back_between_attempts_makes_a_sleep_no_longer_than_it_was_to_be(
    store: TaskStore, session: SessionTasks, clock: Clock
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        await task.sleep(0.3, name="nap")
        return task.attempt

    task = await session.spawn(work)
    await next_event(store, EventType.SAVED)
    clock.ahead = -HOUR
    await again(store, session, task)

    assert await task.result(timeout=SOON) == 3


async def test_a_clock_set_forward_ends_a_sleep_whose_time_has_come(
    store: TaskStore, session: SessionTasks, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alarms, "_LOOK", 0.02)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, seconds: float) -> None:
        await task.sleep(seconds)

    short, long = await session.spawn(work, HOUR), await session.spawn(work, 3 * HOUR)
    await next_event(store, EventType.SAVED, task_id=long.id)
    clock.ahead = HOUR

    await short.result(timeout=SOON)
    assert (await long.record()).state is TaskState.RUNNING


async def test_a_sleep_of_nothing_returns(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        for seconds in (0, -0.0, 1e-9):
            await task.sleep(seconds)
            await task.sleep(seconds, name="nap")

    await (await session.spawn(work)).result(timeout=SOON)


async def test_what_is_no_time_to_sleep_is_refused_and_nothing_stored(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    refused: list[Any] = [-1, -1e-9, math.nan, math.inf, 10**400, 1e12, True, None, "1"]

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        for seconds in refused:
            with pytest.raises(ValueError, match="seconds"):
                await task.sleep(seconds)
        return "goes on"

    task = await session.spawn(work)

    assert await task == "goes on"
    assert rows(path, "SELECT * FROM steps") == []


async def test_waits_have_names_that_can_be_stored(store: TaskStore, session: SessionTasks) -> None:
    names: list[Any] = ["", "a\nb", "x" * 257, 1]

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        for name in [*names, "#1"]:
            with pytest.raises(InvalidId):
                await task.sleep(0, name=name)
        for name in [*names, None]:
            with pytest.raises(InvalidId):
                await task.signal(name)

    await (await session.spawn(work)).result(timeout=SOON)


async def test_sleeps_of_one_body_run_at_the_same_time(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> float:
        began = time.monotonic()
        await asyncio.gather(*[task.sleep(0.2) for _ in range(20)])
        return time.monotonic() - began

    assert await (await session.spawn(work)).result(timeout=10) < SOON
    assert alarms_of(store) == 0


async def test_a_sleeping_body_has_no_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.sleep(HOUR)

    sleepers = [await session.spawn(work, id=f"t{number}") for number in range(3)]
    for sleeper in sleepers:
        await next_event(store, EventType.SAVED, task_id=sleeper.id)
    await (await session.spawn(asyncio.sleep(0))).result(timeout=SOON)

    for sleeper in sleepers:
        await sleeper.cancel()
    assert alarms_of(store) == 0
    await assert_slots(store, 1)


async def test_a_body_that_slept_comes_back_into_its_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=2)
    session = await store.session("s1")
    running, most = 0, 0

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        nonlocal running, most
        for _ in range(3):
            await task.sleep(0.01)
            running += 1
            most = max(most, running)
            await task.progress("here")
            await asyncio.sleep(0)
            running -= 1

    tasks = [await session.spawn(work) for _ in range(12)]
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)

    assert most == 2
    await assert_slots(store, 2)


# --- being stopped while waiting ------------------------------------------------------------------------------------


async def wait_as(how: str, task: TaskContext, waits: asyncio.Event) -> None:
    """Wait in one of the ways there are, for ever."""
    match how:
        case "sleep":
            waits.set()
            await task.sleep(1000 * 365 * 86_400)
        case "named sleep":
            waits.set()
            await task.sleep(HOUR, name="nap")
        case "signal":
            waits.set()
            await task.signal("never")
        case "signals":
            waits.set()
            await asyncio.gather(*[task.signal("never") for _ in range(3)])
        case "signal in a step":
            waits.set()
            await task.step("asks", task.signal, "never")
        case "waiting":
            async with task.waiting("nothing"):
                waits.set()
                await asyncio.Event().wait()
        case "waiting again":
            async with task.waiting("nothing"):
                async with task.waiting("something"):
                    pass
                waits.set()
                await asyncio.Event().wait()
        case "waiting beside":
            async with asyncio.timeout(HOUR), task.waiting("nothing"):
                waits.set()
                await asyncio.gather(task.sleep(HOUR), asyncio.Event().wait())


WAYS = [
    "sleep",
    "named sleep",
    "signal",
    "signals",
    "signal in a step",
    "waiting",
    "waiting beside",
    "waiting again",
]


@pytest.mark.parametrize(("how", "policy"), [*[(way, "cooperative") for way in WAYS], ("waiting", "abort_local")])
async def test_a_wait_ends_at_once_when_the_task_is_cancelled(
    opened: Callable[..., Any], started: asyncio.Event, how: str, policy: str
) -> None:
    store = await opened(max_running=1, cancel_grace=HOUR)
    session = await store.session("s1")
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await wait_as(how, task, started)
        except asyncio.CancelledError:
            seen.append((task.stop_reason, task.cancel_requested))
            raise

    task = await session.spawn(work, cancel_policy=policy)
    await started.wait()
    await settled(store)
    record = await task.cancel("enough", timeout=SOON)

    assert (record.state, record.cancel_reason, record.waiting_for) == (TaskState.CANCELLED, "enough", None)
    assert seen == [("cancel", True)]
    assert alarms_of(store) == 0
    await assert_slots(store, 1)


async def test_a_wait_that_is_over_is_not_ended_again_by_the_stop_of_its_body(
    opened: Callable[..., Any], started: asyncio.Event
) -> None:
    store = await opened(cancel_grace=HOUR)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        async with task.waiting("somebody"):
            await task.sleep(0)
        started.set()
        await task.cancelled()
        await asyncio.sleep(0)
        return "tidied up"

    task = await (await store.session("s1")).spawn(work)
    await started.wait()

    record = await task.cancel()

    assert (record.state, record.result) == (TaskState.COMPLETED, "tidied up")


@pytest.mark.parametrize("how", ["named sleep", "signals", "signal in a step", "waiting beside"])
async def test_a_wait_ends_when_the_store_closes_and_the_row_is_free(
    new: Callable[..., TaskStore], started: asyncio.Event, how: str, path: Path
) -> None:
    store = new(max_running=1)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await wait_as(how, task, started)

    async with store:
        await (await store.session("s1")).spawn(work)
        await started.wait()
        await settled(store)
        async with asyncio.timeout(SOON):
            await store.close()

    [row] = rows(path, "SELECT state, owner_id, waiting_for, attempts_spent FROM tasks")
    assert tuple(row.values()) == ("pending", None, None, 0)


@pytest.mark.parametrize("how", ["sleep", "signals", "signal in a step", "waiting", "waiting beside"])
async def test_a_wait_ends_when_the_attempt_takes_too_long(
    opened: Callable[..., Any], started: asyncio.Event, how: str
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await wait_as(how, task, started)

    record = await (await session.spawn(work, timeout=0.1)).wait(timeout=SOON)

    assert record.failure is not None
    assert (record.state, record.failure.type, record.waiting_for) == (TaskState.FAILED, "Timeout", None)
    assert alarms_of(store) == 0
    await assert_slots(store, 1)


@pytest.mark.parametrize("how", ["sleep", "no sleep", "signal", "waiting"])
async def test_a_body_that_is_to_stop_waits_no_more(
    opened: Callable[..., Any], started: asyncio.Event, how: str
) -> None:
    store = await opened(cancel_grace=HOUR)
    session = await store.session("s1")
    refused: list[str] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        started.set()
        await task.cancelled()
        try:
            match how:
                case "sleep":
                    await task.sleep(HOUR)
                case "no sleep":
                    await task.sleep(0)
                case "signal":
                    await task.signal("never")
                case "waiting":
                    async with task.waiting("nothing"):
                        await asyncio.Event().wait()
        except asyncio.CancelledError:
            refused.append(how)
        # nobody has cancelled the coroutine yet: it may end as it likes
        await task.progress("cleaned up")
        return "won"

    task = await session.spawn(work)
    await started.wait()
    record = await task.cancel(timeout=SOON)

    assert (record.state, record.result, refused) == (TaskState.COMPLETED, "won", [how])


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
@pytest.mark.parametrize("how", ["sleep", "signal", "waiting", "nested"])
async def test_a_wait_may_be_cancelled_at_any_suspension(opened: Callable[..., Any], how: str, late: bool) -> None:
    store = await opened(max_running=1, durability="normal")
    session = await store.session("s1")
    done = asyncio.Event()

    async def wait(task: TaskContext, at: int) -> Any:
        match how:
            case "sleep":
                return await task.sleep(0.002, name=f"nap {at}")
            case "signal":
                return await task.signal("a")
            case "waiting":
                async with task.waiting(f"{at}"):
                    await asyncio.sleep(0)
            case "nested":
                async with task.waiting(f"outer {at}"), task.waiting(f"inner {at}"):
                    await task.sleep(0.001)
        return at

    @store.task(recovery=Recovery.RERUN)
    async def rival(task: TaskContext) -> None:
        while not done.is_set():
            await task.sleep(0.005)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        got: list[Any] = []
        try:
            for at in range(1, 100):
                stepped = await cancel_at(wait(task, at), at, late=late)
                assert stepped.error is None or stepped.was_cancelled, stepped.error
                if not stepped.was_cancelled:
                    got.append(stepped.result)
                # behind what was asked for and is not waited for any more
                await task.progress(f"{at}")
                assert (await session.get(task.id)).state is TaskState.RUNNING
                if not stepped.reached:
                    assert at > 1
                    return got
            raise AssertionError("it never ends")
        finally:
            done.set()

    task = await session.spawn(work)
    if how == "signal":
        await task.signal("a", "the first")
        await task.signal("a", "the second")
    other = await session.spawn(rival)
    got: Any = await task.result(timeout=60)
    await other.result(timeout=20)

    assert got[0] == "the first" if how == "signal" else got
    assert alarms_of(store) == 0
    await assert_slots(store, 1)


# --- signals --------------------------------------------------------------------------------------------------------


async def test_signals_of_a_name_come_in_the_order_they_were_sent(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        return [await task.signal(name) for name in ("b", "a", "a", "b", "b")]

    task = await session.spawn(work)
    payloads = [None, {"a": [1, 2.5, None]}, "text \N{SNOWMAN}", False, 0]
    for name, payload in zip(("a", "b", "a", "b", "b"), payloads, strict=True):
        sent = await task.signal(name, payload)
        assert sent.verdict is Verdict.APPLIED

    assert await task.result(timeout=SOON) == [payloads[1], payloads[0], payloads[2], payloads[3], payloads[4]]


async def test_a_signal_of_a_key_is_sent_once(store: TaskStore, session: SessionTasks, path: Path) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return [await task.signal("a"), await task.signal("a")]

    task = await session.spawn(work)
    sent = [await task.signal("a", {"x": 1, "y": 2}, key="k"), await task.signal("a", {"y": 2, "x": 1}, key="k")]
    with pytest.raises(IdempotencyConflict, match="'k'"):
        await task.signal("a", {"x": True, "y": 2}, key="k")
    with pytest.raises(IdempotencyConflict, match="'k'"):
        await task.signal("b", {"x": 1, "y": 2}, key="k")
    await task.signal("a", "last", key="l")

    assert [one.verdict for one in sent] == [Verdict.APPLIED, Verdict.UNCHANGED]
    assert await task.result(timeout=SOON) == [{"x": 1, "y": 2}, "last"]
    assert event_types(path, task.task_seq).count("signalled") == 2
    assert (await task.signal("a", {"x": 1, "y": 2}, key="k")).verdict is Verdict.UNCHANGED


async def test_a_finished_task_takes_no_signal(store: TaskStore, session: SessionTasks, path: Path) -> None:
    task = await session.spawn(asyncio.sleep(0))
    await task

    sent = await task.signal("a", 1)

    assert (sent.verdict, sent.record.state) == (Verdict.SUPERSEDED, TaskState.COMPLETED)
    assert rows(path, "SELECT * FROM signals") == []


@pytest.mark.parametrize("who", ["connect", "a second store"])
async def test_signals_come_from_any_store(
    store: TaskStore, session: SessionTasks, new: Callable[..., TaskStore], path: Path, who: str
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        return [await task.signal("a") for _ in range(3)]

    task = await session.spawn(work, id="t")
    async with TaskStore.connect(path, runtime="desktop") if who == "connect" else new() as other:
        handle = await other.handle("desktop:s1", "t")
        for number in range(3):
            await handle.signal("a", number)
            await settled(store)

    assert await task.result(timeout=SOON) == [0, 1, 2]
    assert len({row["sent_by"] for row in rows(path, "SELECT sent_by FROM signals")}) == 1


async def test_a_signal_waits_for_a_body_that_does_not_run_yet(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event
) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.signal("a")

    first = await session.spawn(hold(started, release))
    await started.wait()
    task = await session.spawn(work)
    assert (await task.signal("a", 1)).record.state is TaskState.PENDING
    release.set()

    assert await task.result(timeout=SOON) == 1
    await first
    await assert_slots(store, 1)


async def test_a_signal_reaches_a_task_that_waits_for_its_retry(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0.2, jitter=0))
    async def work(task: TaskContext) -> Any:
        if task.attempt == 1:
            raise ValueError("at first")
        return await task.signal("a")

    task = await session.spawn(work)
    await next_event(store, EventType.RETRY_SCHEDULED)
    sent = await task.signal("a", 1)

    assert (sent.verdict, sent.record.state) == (Verdict.APPLIED, TaskState.PENDING)
    assert sent.record.not_before is not None
    assert await task.result(timeout=SOON) == 1


async def test_a_signal_to_a_task_that_is_to_be_cancelled_is_stored(
    opened: Callable[..., Any], started: asyncio.Event, release: asyncio.Event, path: Path
) -> None:
    store = await opened(cancel_grace=HOUR)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        await hold(started, release)
        return "won"

    task = await session.spawn(work)
    await started.wait()
    await task.cancel(timeout=0)
    sent = await task.signal("a", 1)
    release.set()

    assert (sent.verdict, sent.record.state) == (Verdict.APPLIED, TaskState.CANCEL_REQUESTED)
    assert await task.result(timeout=SOON) == "won"


async def test_a_signal_that_comes_too_late_for_a_timeout_is_not_lost(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        timed_out = 0
        while timed_out < 3:
            with contextlib.suppress(TimeoutError):
                await task.signal("a", timeout=0.01)
            timed_out += 1
        await task.progress("timed out")
        return [await task.signal("a", timeout=10), await task.signal("a")]

    task = await session.spawn(work)
    await next_event(store, EventType.PROGRESS)
    await task.signal("a", 1)
    await task.signal("a", 2)

    assert await task.result(timeout=SOON) == [1, 2]


async def test_signals_that_race_with_timeouts_come_once_each(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        got: list[Any] = []
        while len(got) < 40:
            with contextlib.suppress(TimeoutError):
                got.append(await task.signal("a", timeout=0.0015))
        return got

    task = await session.spawn(work)
    for number in range(40):
        await task.signal("a", number)

    assert await task.result(timeout=10) == list(range(40))


async def test_a_signal_that_is_there_is_returned_at_any_timeout(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        await task.signal("go")
        got = [await task.signal("a", timeout=0)]
        with pytest.raises(TimeoutError):
            await task.signal("a", timeout=0)
        return got

    task = await session.spawn(work)
    await task.signal("a", 1)
    await task.signal("go")

    assert await task.result(timeout=SOON) == [1]


async def test_a_timeout_that_is_none_is_refused(store: TaskStore, session: SessionTasks) -> None:
    refused: list[Any] = [-1, math.nan, math.inf, True, "1"]

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        for timeout in refused:
            with pytest.raises(ValueError, match="timeout"):
                await task.signal("a", timeout=timeout)
        return await task.signal("a")

    task = await session.spawn(work)
    await task.signal("a", 1)

    assert await task.result(timeout=SOON) == 1


async def test_several_waiters_of_a_name_are_given_different_signals(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        return list(await asyncio.gather(*[task.signal("a") for _ in range(10)]))

    task = await session.spawn(work)
    for number in range(10):
        await task.signal("a", number)

    assert await task.result(timeout=SOON) == list(range(10))


async def test_a_waiter_that_is_cancelled_leaves_its_turn_to_the_next(
    store: TaskStore, session: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        waiters = [asyncio.create_task(task.signal("a")) for _ in range(3)]
        await task.progress("they wait")
        await release.wait()
        waiters[0].cancel()
        waiters[1].cancel()
        await task.progress("one is left")
        return [await waiters[2], await task.signal("a")]

    task = await session.spawn(work)
    await next_event(store, EventType.PROGRESS)
    release.set()
    await task.signal("a", 1)
    await task.signal("a", 2)

    assert await task.result(timeout=SOON) == [1, 2]


async def test_a_body_that_waits_for_a_signal_has_no_slot(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await asyncio.gather(task.signal("a"), task.signal("a"), task.signal("b"))

    tasks = [await session.spawn(work) for _ in range(3)]
    for task in tasks:
        for name in ("b", "a", "a"):
            await (await session.spawn(asyncio.sleep(0))).result(timeout=SOON)
            await task.signal(name, name)

    for task in tasks:
        assert await task.result(timeout=SOON) == ["a", "a", "b"]
    await assert_slots(store, 1)


async def test_a_later_attempt_is_handed_again_what_nothing_is_remembered_of(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    received: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        if task.checkpoint is None:
            received.append((task.attempt, await task.signal("a"), await task.signal("a")))
            await task.save("two")
        received.append((task.attempt, await task.signal("a")))
        if task.attempt == 1:
            await task.progress("received")
            await asyncio.Event().wait()

    task = await session.spawn(work)
    for number in range(4):
        await task.signal("a", number)
    await next_event(store, EventType.PROGRESS)
    assert untaken(path) == ["2", "3"]
    await again(store, session, task)
    await task.result(timeout=SOON)

    assert received == [(1, 0, 1), (1, 2), (3, 2)]
    assert untaken(path) == ["3"]


async def test_what_a_step_received_is_behind_its_end(store: TaskStore, session: SessionTasks, path: Path) -> None:
    received: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        before = await task.signal("a")

        async def ask() -> list[Any]:
            return [await task.signal("a"), *await asyncio.gather(task.signal("a"), task.signal("a"))]

        inside: Any = await task.step("ask", ask)
        received.append((before, inside, await task.signal("a")))
        if task.attempt == 1:
            await task.progress("received")
            await asyncio.Event().wait()

    task = await session.spawn(work)
    for number in range(5):
        await task.signal("a", number)
    await next_event(store, EventType.PROGRESS)
    assert untaken(path) == ["0", "4"]
    await again(store, session, task)
    await task.result(timeout=SOON)

    assert received == [(0, [1, 2, 3], 4)] * 2
    assert untaken(path) == []


async def test_what_a_failed_step_received_is_behind_its_end(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    received: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async def refuse() -> None:
            raise ValueError(await task.signal("a"))

        with pytest.raises(ValueError, match="refused"):
            await task.step("ask", refuse)
        received.append(await task.signal("a"))
        if task.attempt == 1:
            await task.progress("received")
            await asyncio.Event().wait()

    task = await session.spawn(work)
    await task.signal("a", "refused")
    await task.signal("a", "second")
    await next_event(store, EventType.PROGRESS)
    await again(store, session, task)
    await task.result(timeout=SOON)

    assert received == ["second", "second"]
    assert untaken(path) == []


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_what_a_failed_step_received_comes_again_when_a_retry_of_the_task_tries_it_again(
    store: TaskStore, session: SessionTasks, path: Path, at_most_once: bool
) -> None:
    @store.task(recovery=Recovery.RERUN, retry_on=ConnectionError, backoff=Backoff(initial=0))
    async def work(task: TaskContext) -> list[Any]:
        async def ask() -> Any:
            got = [await task.signal("a"), await task.signal("b")]
            if task.attempt == 1:
                raise ConnectionError(f"not yet {got}")
            return got

        first = await task.step("before", task.signal, "a")
        try:
            asked = await task.step("ask", ask, at_most_once=at_most_once)
        except ConnectionError as error:
            asked = str(error)
            if task.attempt == 1:
                raise
        return [first, asked, await task.signal("a")]

    task = await session.spawn(work)
    for number, name in enumerate(["a", "a", "b", "a"]):
        await task.signal(name, number)

    assert await task.result(timeout=SOON) == [0, "not yet [1, 2]" if at_most_once else [1, 2], 3]
    assert untaken(path) == []
    taken = rows(path, "SELECT taken_attempt FROM signals ORDER BY signal_seq")
    again = 1 if at_most_once else 2
    assert [row["taken_attempt"] for row in taken] == [1, again, again, 2]


async def test_what_a_step_received_that_did_not_end_comes_again(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        async def ask() -> Any:
            got = await task.signal("a")
            if task.attempt == 1:
                await task.progress("received")
                await asyncio.Event().wait()
            return got

        return await task.step("ask", ask)

    task = await session.spawn(work)
    await task.signal("a", 1)
    await next_event(store, EventType.PROGRESS)
    assert untaken(path) == ["1"]
    await again(store, session, task)

    assert await task.result(timeout=SOON) == 1


@pytest.mark.parametrize("how", ["completed", "failed"])
async def test_signals_are_taken_with_the_result(store: TaskStore, session: SessionTasks, path: Path, how: str) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.signal("a")
        if how == "failed":
            raise ValueError("x")

    task = await session.spawn(work)
    await task.signal("b", 1)
    await task.signal("a", 2)
    record = await task.wait(timeout=SOON)

    assert record.state == how
    assert untaken(path) == (["1"] if how == "completed" else ["1", "2"])


async def test_a_retried_attempt_is_handed_the_same_signals(store: TaskStore, session: SessionTasks) -> None:
    received: list[Any] = []

    @store.task(recovery=Recovery.RERUN, retry_on=ValueError, backoff=Backoff(initial=0))
    async def work(task: TaskContext) -> None:
        received.append([await task.signal("a"), await task.signal("a")])
        if task.attempt < 3:
            raise ValueError("once more")

    task = await session.spawn(work)
    await task.signal("a", 1)
    await task.signal("a", 2)
    await task.result(timeout=SOON)

    assert received == [[1, 2]] * 3


async def test_signals_sent_while_no_store_is_open_to_run_are_received(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event
) -> None:
    store = new()

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        started.set()
        return await task.signal("a")

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
    async with TaskStore.connect(path, runtime="desktop") as caller:
        sent = await (await caller.handle("desktop:s1", "t")).signal("a", 1)
        assert (sent.verdict, sent.record.owner_id) == (Verdict.APPLIED, None)
    async with store:
        assert await (await store.handle("desktop:s1", "t")).result(timeout=SOON) == 1


async def test_an_observer_may_not_signal(store: TaskStore, session: SessionTasks, there: SessionTasks) -> None:
    task = await session.spawn(asyncio.Event().wait(), id="t")
    observer = await there.observe("desktop:s1", "t")

    with pytest.raises(HandleNotVisible):
        await observer.signal("a", 1)
    await task.cancel()


async def test_external_work_takes_no_signal(store: TaskStore, session: SessionTasks, path: Path) -> None:
    task = await session.register("job", TaskKind.OTHER)

    with pytest.raises(TaskError, match="external"):
        await task.signal("a", 1)
    assert rows(path, "SELECT * FROM signals") == []


async def test_a_signal_finds_work_that_was_given_to_another_session(
    store: TaskStore, session: SessionTasks, there: SessionTasks
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        return [await task.signal("a"), await task.signal("a"), str(task.scope)]

    task = await session.spawn(work, id="t")
    await task.signal("a", "before")
    await session.transfer(there, [task])
    await (await there.handle("t")).signal("a", "after")

    assert await task.result(timeout=SOON) == ["before", "after", "desktop:s2"]


async def test_what_cannot_be_sent_is_refused(opened: Callable[..., Any], path: Path, release: asyncio.Event) -> None:
    store = await opened(limits=Limits(payload_bytes=100))
    session = await store.session("s1")
    task = await session.spawn(release.wait())

    with pytest.raises(LimitExceeded, match="'a'"):
        await task.signal("a", "x" * 99)
    await task.signal("a", "x" * 98)
    for payload in (math.nan, object(), "\ud800", {1: 1, "1": 2}):
        with pytest.raises(ResultNotSerializable):
            await task.signal("a", payload)
    for name in ("", "a\nb", "x" * 257, None, 1):
        with pytest.raises(InvalidId):
            await task.signal(name, 1)  # type: ignore[arg-type]
        if name is not None:
            with pytest.raises(InvalidId):
                await task.signal("a", 1, key=name)  # type: ignore[arg-type]

    assert len(rows(path, "SELECT * FROM signals")) == 1
    release.set()


async def others_had_a_turn(ask: Callable[[], Any], refusal: type[BaseException]) -> bool:
    """Ask for what is refused, and say whether the loop went on before it was."""
    turned = asyncio.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    with pytest.raises(refusal):
        await ask()
    return turned.is_set()


async def test_a_body_that_goes_on_asking_for_waits_though_it_is_to_stop_does_not_keep_the_loop_to_itself(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[bool]:
        async def wait() -> None:
            async with task.waiting("somebody"):
                pass

        await task.cancelled()
        asked = [wait, lambda: task.sleep(HOUR), lambda: task.sleep(0), lambda: task.signal("none")]
        return [await others_had_a_turn(ask, asyncio.CancelledError) for ask in asked]

    task = await session.spawn(work)
    await task.cancel(timeout=SOON)

    assert (await task.wait(timeout=SOON)).result == [True] * 4
    # what was refused is not stored
    assert await task.steps() == []


async def test_a_body_that_goes_on_asking_a_closed_store_does_not_keep_the_loop_to_itself(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    store, closed = new(), asyncio.Event()
    turns: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()

    async def at_once() -> int:
        return 1

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        started.set()
        while not closed.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await closed.wait()
        asked = [
            lambda: task.progress("on"),
            lambda: task.save(1),
            lambda: task.notify("note"),
            lambda: task.step("s", at_once),
            lambda: task.step("once", at_once, at_most_once=True),
            lambda: task.transact("t", lambda _: None),
            lambda: task.signal("none"),
            lambda: task.spawn(work),
        ]
        turns.set_result([await others_had_a_turn(ask, StoreClosed) for ask in asked])

    try:
        async with store:
            await (await store.session("s1")).spawn(work)
            await started.wait()
            with pytest.warns(ResourceWarning, match="did not end"):
                await store.close(0)
    finally:
        closed.set()

    assert await asyncio.wait_for(turns, SOON) == [True] * 8


# --- waiting for somebody else --------------------------------------------------------------------------------------


async def test_a_body_that_waits_shows_it(store: TaskStore, session: SessionTasks, path: Path) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async def look() -> None:
            record = await session.get(task.id)
            seen.append((record.state, record.waiting_for))
            assert (task.record.state, task.record.waiting_for) == seen[-1]

        await look()
        async with task.waiting("approval"):
            await look()
            async with task.waiting("a second one"):
                await look()
            await look()
        await look()

    task = await session.spawn(work)
    await task.result(timeout=SOON)

    assert seen == [
        ("running", None),
        ("waiting", "approval"),
        ("waiting", "a second one"),
        ("waiting", "approval"),
        ("running", None),
    ]
    assert event_types(path, task.task_seq) == ["registered", "started", *["state_changed"] * 4, "completed"]


async def test_branches_that_wait_at_the_same_time_show_one_of_their_reasons(
    store: TaskStore, session: SessionTasks
) -> None:
    seen: list[Any] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        inside, first_may_go = asyncio.Barrier(2), asyncio.Event()

        async def first() -> None:
            async with task.waiting("one"):
                await inside.wait()
                await first_may_go.wait()

        async def second() -> None:
            async with task.waiting("two"):
                await inside.wait()
                first_may_go.set()
                await one
                record = await session.get(task.id)
                seen.append((record.state, record.waiting_for))

        one = asyncio.create_task(first())
        await second()
        record = await session.get(task.id)
        seen.append((record.state, record.waiting_for))

    await (await session.spawn(work)).result(timeout=SOON)

    assert seen == [("waiting", "two"), ("running", None)]


async def test_a_waiting_body_has_no_slot_and_comes_back_into_it(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")
    running, most = 0, 0

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> None:
        nonlocal running, most
        async with task.waiting("nothing"):
            async with task.waiting("nothing"):
                await (await session.spawn(asyncio.sleep(0), id=f"beside {number}")).result(timeout=5)
            # still without it
            await (await session.spawn(asyncio.sleep(0), id=f"again {number}")).result(timeout=5)
        running += 1
        most = max(most, running)
        await task.progress("has its slot")
        running -= 1

    tasks = [await session.spawn(work, number) for number in range(5)]
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks)

    assert most == 1
    await assert_slots(store, 1)


@pytest.mark.parametrize("how", ["exception", "timeout", "return", "break"])
async def test_however_a_block_is_left_the_body_runs_again(opened: Callable[..., Any], how: str) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    async def block(task: TaskContext) -> None:
        while True:
            async with asyncio.timeout(0.02 if how == "timeout" else None), task.waiting("nothing"):
                match how:
                    case "exception":
                        raise ValueError("inside")
                    case "timeout":
                        await asyncio.Event().wait()
                    case "return":
                        return
                    case "break":
                        break

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        error = "none"
        try:
            await block(task)
        except (ValueError, TimeoutError) as raised:
            error = type(raised).__name__
        record = await session.get(task.id)
        return [error, record.state, record.waiting_for]

    expected = {"exception": "ValueError", "timeout": "TimeoutError"}.get(how, "none")
    assert await (await session.spawn(work)).result(timeout=SOON) == [expected, "running", None]
    await assert_slots(store, 1)


async def test_an_exception_that_leaves_a_waiting_body_is_its_failure(store: TaskStore, session: SessionTasks) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        async with task.waiting("nothing"):
            raise ValueError("inside")

    task = await session.spawn(work)
    with pytest.raises(TaskFailed, match="inside"):
        await task.result(timeout=SOON)

    record = await task.record()
    assert (record.state, record.waiting_for) == (TaskState.FAILED, None)


async def test_a_reason_that_is_no_text_is_refused(store: TaskStore, session: SessionTasks, path: Path) -> None:
    refused: list[Any] = [None, 1, "a\0b", "\ud800"]

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        for reason in refused:
            with pytest.raises(ValueError, match="waits for"):
                async with task.waiting(reason):
                    raise AssertionError("inside")

    task = await session.spawn(work)
    await task.result(timeout=SOON)

    assert event_types(path, task.task_seq) == ["registered", "started", "completed"]


async def test_a_waiting_row_is_taken_over_as_a_running_one_is(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        if task.attempt == 1:
            async with task.waiting("nothing"):
                await asyncio.Event().wait()
        return task.attempt

    task = await session.spawn(work)
    await next_event(store, EventType.STATE_CHANGED)
    await session.abandon(task.id, "stuck")
    freed = await task.record()
    await store.recover()

    assert (freed.state, freed.attempt, freed.waiting_for) == (TaskState.PENDING, 2, None)
    assert await task.result(timeout=SOON) == 3
    assert event_types(path, task.task_seq).count("state_changed") == 1


async def test_a_body_that_goes_on_though_its_time_is_up_waits_no_more(
    store: TaskStore, session: SessionTasks, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        with contextlib.suppress(asyncio.CancelledError):
            async with task.waiting("nothing"):
                await asyncio.Event().wait()
        await task.progress("goes on")
        await release.wait()
        return "done"

    task = await session.spawn(work, timeout=0.05)
    await next_event(store, EventType.PROGRESS)
    record = await task.record()
    release.set()

    assert (record.state, record.waiting_for) == (TaskState.RUNNING, None)
    assert await task.result(timeout=SOON) == "done"


async def test_a_timeout_while_the_state_is_being_stored_leaves_it_right(
    store: TaskStore, session: SessionTasks
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        for tenths in range(30):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tenths / 10_000), task.waiting("nothing"):
                    await asyncio.Event().wait()
            await task.progress("behind it")
            assert (await session.get(task.id)).state is TaskState.RUNNING
        record = await session.get(task.id)
        return [record.state, record.waiting_for]

    assert await (await session.spawn(work)).result(timeout=10) == ["running", None]
