"""What a body does by `step` is done once and remembered: results by their type, failures by their class, tries, and doubt."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import json
import math
import sqlite3
import subprocess
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from lash_store import (
    Backoff,
    IdempotencyConflict,
    InvalidArguments,
    InvalidId,
    Limits,
    Recovery,
    ResultNotSerializable,
    SessionTasks,
    StaleAttempt,
    StepFailed,
    StepInDoubt,
    StepKind,
    StorageFull,
    TaskCancelled,
    TaskContext,
    TaskFailed,
    TaskState,
    TaskStore,
    memory,
    recall,
    step_queries,
    stepping,
)
from tests.runtime.support import Stepped, cancel_at, event_types, rows
from tests.runtime.test_context import move_on

AT_ONCE = Backoff(initial=0, maximum=0)
LATER = Backoff(initial=3600, maximum=3600, jitter=0)

pytestmark = pytest.mark.timeout(20)


async def told(waiting: Awaitable[Any]) -> Any:
    """Return what comes of it, also an exception."""
    try:
        return await waiting
    except Exception as error:
        return error


async def in_attempts(
    store: TaskStore, session: SessionTasks, do: Callable[[TaskContext], Awaitable[Any]], attempts: int = 2
) -> list[Any]:
    """Do the same in several attempts of one task, each but the last of which dies after it; return what each was told."""
    got: list[Any] = []
    done = asyncio.Event()

    async def work(task: TaskContext) -> None:
        got.append(await told(do(task)))
        done.set()
        if task.attempt < 2 * attempts - 1:
            await asyncio.Event().wait()

    name = f"work {len(await session.list(include_terminal=True))}"
    store.task(recovery=Recovery.RERUN, name=name)(work)
    task = await session.spawn(work, id=name)
    for _ in range(attempts - 1):
        await done.wait()
        done.clear()
        await die(store, session, name)
    await task
    return got


async def die(store: TaskStore, session: SessionTasks, id: str) -> None:
    """Have an attempt of a task die, and the next one start."""
    await session.abandon(id, "its process is gone")
    await store.recover()


async def run(
    store: TaskStore, session: SessionTasks, do: Callable[[TaskContext], Awaitable[Any]], **options: Any
) -> Any:
    """Return what a body comes to."""

    async def work(task: TaskContext) -> Any:
        return await do(task)

    store.task(recovery=Recovery.RERUN, **options)(work)
    return await (await session.spawn(work, id="t"))


def kept(path: Path, name: str) -> dict[str, Any]:
    """Read the row of a step."""
    [row] = rows(path, "SELECT * FROM steps WHERE name = ?", name)
    return row


# --- results --------------------------------------------------------------------------------------------------------


async def test_a_result_is_given_to_the_next_life_of_the_store_without_a_call(
    new: Callable[..., TaskStore], started: asyncio.Event
) -> None:
    store, calls = new(), []

    def charge(amount: int, *, currency: str) -> dict[str, Any]:
        calls.append(amount)
        return {"paid": amount, "in": currency}

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        paid = await task.step("charge", charge, 5, currency="EUR")
        if task.attempt == 1:
            started.set()
            await asyncio.Event().wait()
        return paid

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
    async with store:
        assert await (await store.handle("desktop:s1", "t")) == {"paid": 5, "in": "EUR"}
    assert calls == [5]


class Point(BaseModel):
    x: int
    when: datetime


@dataclass
class Pair:
    left: set[int]
    right: Point | None = None


class Opaque:
    pass


def model() -> Point:
    return Point(x=1, when=datetime(2020, 1, 1, tzinfo=UTC))


async def pair() -> Pair:
    return Pair({1, 2}, model())


def a_set() -> set[str]:
    return {"a", "b"}


def a_tuple() -> tuple[int, ...]:
    return (1, 2)


def nothing() -> None:
    return None


def by_number() -> dict[int, bytes]:
    return {1: b"one"}


def unreadable() -> Opaque | list[int]:
    return [1, 2]


def unannotated():  # type: ignore[no-untyped-def]
    return (1, 2)


def unknown_name() -> NotThere:  # type: ignore[name-defined]  # noqa: F821
    return {"a": 1}


async def test_a_result_has_its_type_the_first_time_and_ever_after(store: TaskStore, session: SessionTasks) -> None:
    wanted: list[tuple[Callable[..., Any], Any]] = [
        (model, model()),
        (pair, Pair({1, 2}, model())),
        (a_set, {"a", "b"}),
        (a_tuple, (1, 2)),
        (nothing, None),
        (by_number, {1: b"one"}),
        (functools.partial(functools.partial(model)), model()),
        (unreadable, [1, 2]),
        (unknown_name, {"a": 1}),
        (unannotated, [1, 2]),
    ]

    async def do(task: TaskContext) -> list[Any]:
        return [await task.step(f"s{number}", fn) for number, (fn, _) in enumerate(wanted)]

    for got in await in_attempts(store, session, do):
        assert got == [value for _, value in wanted]
        assert [type(one) for one in got] == [type(value) for _, value in wanted]


class Reader:
    """Callable in several ways."""

    async def method(self) -> set[int]:
        return {1}

    @classmethod
    def of_class(cls) -> set[int]:
        return {2}

    @staticmethod
    def static() -> set[int]:
        return {3}


class Called:
    def __call__(self) -> set[int]:
        return {4}


class CalledAsync:
    async def __call__(self) -> set[int]:
        return {5}


async def coroutine(*items: int) -> set[int]:
    return set(items)


async def test_whatever_can_be_called_may_be_a_step(store: TaskStore, session: SessionTasks) -> None:
    wanted: dict[str, tuple[Callable[..., Any], Any]] = {
        "method": (Reader().method, {1}),
        "classmethod": (Reader.of_class, {2}),
        "staticmethod": (Reader.static, {3}),
        "partial": (functools.partial(coroutine, 6, 7), {6, 7}),
        "lambda": (lambda: coroutine(8), [8]),
        "lambda of a future": (lambda: asyncio.sleep(0, "slept"), "slept"),
        "builtin": ("abc".upper, "ABC"),
        "class": (dict, {}),
    }

    async def do(task: TaskContext) -> dict[str, Any]:
        return {name: await task.step(name, fn) for name, (fn, _) in wanted.items()}

    assert await in_attempts(store, session, do) == [{name: value for name, (_, value) in wanted.items()}] * 2


async def test_an_object_that_can_be_called_has_the_type_of_its_call(store: TaskStore, session: SessionTasks) -> None:
    async def do(task: TaskContext) -> list[Any]:
        return [await task.step("plain", Called()), await task.step("async", CalledAsync())]

    assert await in_attempts(store, session, do) == [[{4}, {5}]] * 2


async def test_an_annotation_with_a_field_gives_the_type(store: TaskStore, session: SessionTasks) -> None:
    def fn():  # type: ignore[no-untyped-def]
        return {1}

    # as a module without `from __future__ import annotations` has it: metadata need have no hash
    fn.__annotations__["return"] = Annotated[set[int], ["no hash"], Field(max_length=3)]

    assert await run(store, session, lambda task: same(task, fn, {1}))


async def same(task: TaskContext, fn: Callable[..., Any], value: Any) -> bool:
    return bool(await task.step("s", fn) == value)


async def test_a_result_that_does_not_fit_is_a_final_failure_whatever_is_retried(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    values: list[Any] = ["text", {"x": "no number"}, object(), float("nan"), "\ud800"]
    calls: list[int] = []

    def fn(number: int) -> Point:
        calls.append(number)
        return values[number]  # type: ignore[no-any-return]

    async def do(task: TaskContext) -> list[Any]:
        steps = [task.step(f"s{number}", fn, number, max_attempts=3, backoff=AT_ONCE) for number in range(5)]
        return [await told(step) for step in steps]

    first, again = await in_attempts(store, session, do)

    assert [type(one) for one in (*first, *again)] == [ResultNotSerializable] * 10
    assert [str(one) for one in first] == [str(one) for one in again]
    assert calls == [0, 1, 2, 3, 4]
    assert rows(path, "SELECT DISTINCT state, tries FROM steps") == [{"state": "failed", "tries": 1}]


# --- where it runs --------------------------------------------------------------------------------------------------

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")


async def test_a_plain_function_runs_in_a_thread_with_context_variables_and_leaves_none(
    store: TaskStore, session: SessionTasks
) -> None:
    def fn() -> tuple[int, str]:
        return threading.get_ident(), variable.get()

    async def async_fn() -> tuple[int, str]:
        return threading.get_ident(), variable.get()

    async def do(task: TaskContext) -> list[Any]:
        variable.set("here")
        return [await task.step("plain", fn), await task.step("async", async_fn)]

    [plain, on_loop] = await run(store, session, do)

    assert plain[0] != threading.get_ident()
    assert on_loop[0] == threading.get_ident()
    assert plain[1] == on_loop[1] == "here"
    left = [thread for thread in threading.enumerate() if thread.name == "lash_store call"]
    for thread in left:
        thread.join(5)
    assert not any(thread.is_alive() for thread in left)


async def test_200_steps_at_once(store: TaskStore, session: SessionTasks, path: Path) -> None:
    at_once = most = 0
    lock = threading.Lock()

    def plain(number: int) -> int:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        with lock:
            at_once -= 1
        return number

    async def on_loop(number: int) -> int:
        await asyncio.sleep(0)
        return number

    async def do(task: TaskContext) -> Any:
        kinds = itertools.cycle([plain, on_loop])
        return await asyncio.gather(*[task.step(f"s{n}", next(kinds), n) for n in range(200)])

    assert await in_attempts(store, session, do) == [list(range(200))] * 2
    assert most <= 64
    assert rows(path, "SELECT count(*) AS n, sum(tries) AS tries FROM steps") == [{"n": 200, "tries": 200}]
    assert store._core is not None
    assert store._core.threads._value == 64


async def test_what_is_remembered_is_looked_up_once_for_all_steps_at_once(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store._core is not None
    reader, looks = store._core.reader, []
    read = reader.rows

    async def spy(sql: str, parameters: Any) -> Any:
        if sql == step_queries.STEP_NAMES:
            looks.append(parameters)
        return await read(sql, parameters)

    monkeypatch.setattr(reader, "rows", spy)

    async def do(task: TaskContext) -> Any:
        return await asyncio.gather(*[task.step(f"s{n}", lambda: 1) for n in range(20)])

    assert await in_attempts(store, session, do) == [[1] * 20] * 2
    assert len(looks) == 1


async def test_a_step_within_a_step(store: TaskStore, session: SessionTasks) -> None:
    calls: list[str] = []

    async def outer(task: TaskContext) -> str:
        calls.append("outer")
        inner = await task.step("inner", calls.append, "inner")
        return f"outer {inner}"

    got = await in_attempts(store, session, lambda task: task.step("outer", lambda: outer(task)))

    assert got == ["outer None"] * 2
    assert calls == ["outer", "inner"]


@pytest.mark.parametrize("by", ["step", "transact"])
async def test_another_try_of_a_step_tries_failed_steps_in_it_again_and_keeps_what_was_done(
    store: TaskStore, session: SessionTasks, path: Path, by: str
) -> None:
    calls: list[str] = []

    def fn(*args: Any) -> int:
        calls.append("inner")
        if calls.count("inner") < 3:
            raise Refused("not yet")
        return calls.count("inner")

    async def do(task: TaskContext) -> list[Any]:
        async def between() -> Any:
            # what it is given may be another time
            number = calls.count("inner")
            return await (task.step("inner", fn, number) if by == "step" else task.transact("inner", fn, number))

        async def outer() -> Any:
            calls.append("outer")
            await task.step("done", calls.append, "done")
            return await task.step("between", between)

        with pytest.raises(Refused):
            await task.step("aside", raising(Refused("for good")))
        got = await task.step("outer", outer, max_attempts=4, backoff=AT_ONCE)
        with pytest.raises(Refused):
            await task.step("aside", Flaky(0))
        return [got]

    assert await run(store, session, do) == [3]
    assert calls == ["outer", "done", "inner", "outer", "inner", "outer", "inner"]
    assert [kept(path, name)["state"] for name in ("inner", "between", "outer", "aside")] == ["done"] * 3 + ["failed"]


async def test_another_try_of_a_step_does_not_call_again_what_runs_at_most_once_in_it(
    store: TaskStore, session: SessionTasks
) -> None:
    inner = Flaky(1)

    async def do(task: TaskContext) -> str:
        async def outer() -> Any:
            return await task.step("inner", inner, at_most_once=True)

        return str(await told(task.step("outer", outer, max_attempts=3, backoff=AT_ONCE)))

    assert await run(store, session, do) == "not yet"
    assert inner.calls == 1


@pytest.mark.parametrize("dies", ["before the next try is noted", "after"])
async def test_a_death_between_two_tries_of_a_step_lets_failed_steps_in_it_be_tried_again(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, dies: str
) -> None:
    inner, tries = Flaky(1), []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        async def outer() -> Any:
            tries.append(task.attempt)
            try:
                return [await task.signal("s"), await task.step("inner", receive)]
            except Refused:
                if task.attempt == 1 and dies != "after":
                    started.set()
                    await asyncio.Event().wait()
                raise

        async def receive() -> Any:
            return [await task.signal("s"), inner()]

        backoff = LATER if task.attempt == 1 else AT_ONCE
        return [await task.step("outer", outer, max_attempts=2, backoff=backoff), await task.signal("s")]

    task = await session.spawn(work, id="t")
    for number in range(3):
        await task.signal("s", number)
    await (scheduled(store) if dies == "after" else started.wait())
    assert [row["name"] for row in rows(path, "SELECT name FROM steps WHERE state = 'failed'")] == (
        [] if dies == "after" else ["inner"]
    )
    await die(store, session, "t")

    assert await task == [[0, [1, 2]], 2]
    assert inner.calls == 2
    # what was given up counts as an attempt
    assert tries == ([1, 3] if dies == "after" else [1, 3, 3])


async def test_another_try_of_a_step_is_handed_again_what_failed_steps_in_it_received(
    store: TaskStore, session: SessionTasks
) -> None:
    got: list[Any] = []

    async def do(task: TaskContext) -> list[Any]:
        async def inner() -> Any:
            got.append([await task.signal("a"), await task.signal("b")])
            if len(got) == 1:
                raise Refused("not yet")
            return got[-1]

        async def outer() -> list[Any]:
            return [await task.signal("a"), await task.step("inner", inner), await task.signal("a")]

        return [await task.step("outer", outer, max_attempts=2, backoff=AT_ONCE), await task.signal("a")]

    async def work(task: TaskContext) -> Any:
        return await do(task)

    store.task(recovery=Recovery.RERUN)(work)
    task = await session.spawn(work)
    for number, name in enumerate(["a", "a", "b", "a", "a"]):
        await task.signal(name, number)

    assert await task == [[0, [1, 2], 3], 4]
    assert got == [[1, 2]] * 2


async def test_a_step_within_itself_does_not_hang(store: TaskStore, session: SessionTasks) -> None:
    async def outer(task: TaskContext) -> Any:
        return await task.step("same", lambda: asyncio.sleep(0))

    async def do(task: TaskContext) -> str:
        async with asyncio.timeout(0.5):
            await told(task.step("same", lambda: outer(task)))
        return "did not hang"

    assert await run(store, session, do) == "did not hang"


# --- arguments ------------------------------------------------------------------------------------------------------


async def test_the_same_name_with_the_same_arguments_runs_once(store: TaskStore, session: SessionTasks) -> None:
    calls: list[Any] = []

    def fn(*args: Any, **kwargs: Any) -> int:
        calls.append((args, kwargs))
        return len(calls)

    async def do(task: TaskContext) -> list[Any]:
        one_by_one = [await task.step("s", fn, {"a": [1]}, b=2) for _ in range(3)]
        at_once = await asyncio.gather(*[task.step("c", fn, 1) for _ in range(10)])
        return [one_by_one, at_once]

    assert await run(store, session, do) == [[1] * 3, [2] * 10]
    assert len(calls) == 2


async def test_the_same_name_with_other_arguments_is_refused(store: TaskStore, session: SessionTasks) -> None:
    def count(*args: Any) -> int:
        return len(args)

    async def do(task: TaskContext) -> str:
        for number, (one, other) in enumerate([((1,), (2,)), ((1,), ()), ((1,), (True,)), (("1",), (1,))]):
            assert await task.step(f"s{number}", count, *one) == 1
            with pytest.raises(IdempotencyConflict, match=f"'s{number}'"):
                await task.step(f"s{number}", count, *other)
        return "goes on"

    assert await run(store, session, do) == "goes on"


async def test_arguments_that_are_equal_are_the_same(store: TaskStore, session: SessionTasks) -> None:
    def fn(*args: Any, **kwargs: Any) -> int:
        return 1

    async def do(task: TaskContext) -> str:
        await task.step("named", fn, a=1, b=2)
        await task.step("named", fn, b=2, a=1)
        await task.step("mapping", fn, {"a": 1, "b": 2})
        await task.step("mapping", fn, {"b": 2, "a": 1})
        await task.step("set", fn, {0, 8})
        await task.step("set", fn, {8, 0})
        return "the same"

    assert await run(store, session, do) == "the same"


async def test_arguments_that_cannot_be_written_down_are_not_compared(store: TaskStore, session: SessionTasks) -> None:
    async def do(task: TaskContext) -> list[Any]:
        circle: list[Any] = []
        circle.append(circle)
        return [await task.step("s", len, circle) for _ in range(2)]

    assert await run(store, session, do) == [1, 1]


async def test_an_argument_that_can_be_read_once_reaches_the_function_whole(
    store: TaskStore, session: SessionTasks
) -> None:
    assert await run(store, session, lambda task: task.step("s", sum, (n for n in (1, 2, 3)))) == 6


async def test_any_keyword_reaches_the_function(store: TaskStore, session: SessionTasks) -> None:
    def echo(**kwargs: str) -> dict[str, str]:
        return kwargs

    async def echoed(task: TaskContext, name: str) -> Any:
        return await task.step(f"s {name}", echo, **{name: "x"})

    async def do(task: TaskContext) -> list[str]:
        return [repr(await told(echoed(task, name))) for name in names]

    names = ["x", "function", "name", "fn"]
    assert await run(store, session, do) == [repr({name: "x"}) for name in names]


async def test_a_name_that_cannot_be_stored_is_refused_and_nothing_runs(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    calls: list[int] = []
    names: list[Any] = ["", "a\0b", "x" * 257, "\ud800", 5, None]

    async def do(task: TaskContext) -> Any:
        for name in names:
            with pytest.raises(InvalidId):
                await task.step(name, calls.append, 1)
        return "goes on"

    assert await run(store, session, do) == "goes on"
    assert calls == []
    assert rows(path, "SELECT * FROM steps") == []


async def test_names_are_any_printable_text(store: TaskStore, session: SessionTasks) -> None:
    names = ["#1", "Übung 🎉", "x" * 256, "a b"]

    async def do(task: TaskContext) -> list[str]:
        return [await task.step(name, str, name) for name in names]

    assert await in_attempts(store, session, do) == [names] * 2


async def test_options_without_sense_are_refused_and_nothing_runs(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    calls: list[int] = []
    wrong: list[dict[str, Any]] = [
        {"max_attempts": 0},
        {"max_attempts": True},
        {"max_attempts": 1.5},
        {"max_attempts": 2**31},
        {"timeout": -1},
        {"timeout": float("nan")},
        {"timeout": True},
        {"retry_on": BaseException},
        {"retry_on": "ValueError"},
        {"no_retry_on": [ValueError, 5]},
        {"backoff": 5},
    ]

    async def do(task: TaskContext) -> Any:
        for options in wrong:
            with pytest.raises(ValueError):
                await task.step("s", calls.append, 1, **options)
        return await task.step("s", calls.append, 2)

    await run(store, session, do)
    assert calls == [2]


async def test_what_cannot_be_called_is_refused(store: TaskStore, session: SessionTasks) -> None:
    async def do(task: TaskContext) -> str:
        with pytest.raises(InvalidArguments, match="'s'"):
            await task.step("s", 5)  # type: ignore[call-overload]
        return "goes on"

    assert await run(store, session, do) == "goes on"


async def test_a_coroutine_object_that_is_refused_is_closed(store: TaskStore, session: SessionTasks) -> None:
    given = coroutine(1)

    async def do(task: TaskContext) -> str:
        with pytest.raises(InvalidArguments, match="'s'"):
            await task.step("s", given)  # type: ignore[call-overload]
        return "goes on"

    try:
        assert await run(store, session, do) == "goes on"
        assert given.cr_frame is None
    finally:
        given.close()


# --- failures -------------------------------------------------------------------------------------------------------


class Refused(Exception):
    pass


class Coded(Exception):
    """Cannot be made without its code, and tells it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Telling(Exception):
    """Tells what only its __init__ knows."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class Made(Exception):
    """Is made in a way of its own."""

    def __new__(cls, code: int, *more: Any) -> Made:
        return super().__new__(cls, code, *more)


class Both(ExceptionGroup[Exception]):
    """A group that is made in a way of its own, and says more."""

    def __new__(cls, where: str, errors: list[Exception]) -> Both:
        return super().__new__(cls, f"both at {where}", errors)

    def __str__(self) -> str:
        return f"{super().__str__()}!"


class Answer(BaseModel):
    number: int
    share: float = Field(default=0, gt=5)
    name: str = ""
    word: str = ""

    @field_validator("name")
    @classmethod
    def refuse_name(cls, name: str) -> str:
        raise ValueError(f"no {{name}} like {name}")

    @field_validator("word")
    @classmethod
    def refuse_word(cls, word: str) -> str:
        raise PydanticCustomError("rude", "{word} is rude", {"word": word})


class Outer:
    class Nested(ValueError):
        pass


def raising(error: BaseException) -> Callable[[], None]:
    def fn() -> None:
        raise error

    return fn


async def again(store: TaskStore, session: SessionTasks, errors: Sequence[Exception]) -> list[Exception]:
    """Return what the second attempt is told of steps that failed for good in the first."""

    async def do(task: TaskContext) -> list[Any]:
        return [await told(task.step(f"s{number}", raising(error))) for number, error in enumerate(errors)]

    first, second = await in_attempts(store, session, do)
    assert first == list(errors)
    for error, told_again in zip(errors, second, strict=True):
        assert isinstance(told_again, type(error))
        assert isinstance(told_again.__cause__, StepFailed)
        assert told_again.__cause__.failure.type == type(error).__name__
    return second  # type: ignore[no-any-return]


async def test_a_final_failure_is_raised_again_with_its_class_and_its_message(
    store: TaskStore, session: SessionTasks
) -> None:
    errors = [
        ValueError("no"),
        Refused("no"),
        Refused(),
        Coded(5),
        Outer.Nested("no"),
        FileNotFoundError(2, "No such file", "name"),
        asyncio.IncompleteReadError(b"ab", 5),
        RecursionError("deep"),
        Made(5),
    ]

    assert [str(error) for error in await again(store, session, errors)] == [str(error) for error in errors]


async def test_a_message_that_its_class_makes_up_is_told_again_as_well(store: TaskStore, session: SessionTasks) -> None:
    errors = [
        KeyError("key"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        Telling(5),
        subprocess.CalledProcessError(1, ["false"]),
    ]

    assert [said(error) for error in await again(store, session, errors)] == [str(error) for error in errors]


def said(error: Exception) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"str() raised {broken!r}"


def gone() -> None:
    class Gone(Exception):
        pass

    raise Gone("bye")


def invalid(*values: dict[str, Any]) -> list[ValidationError]:
    found = []
    for value in values:
        with pytest.raises(ValidationError) as refused:
            Answer.model_validate(value)
        found.append(refused.value)
    return found


async def test_what_pydantic_refused_is_told_again_value_by_value(store: TaskStore, session: SessionTasks) -> None:
    errors = invalid(
        {"number": "no", "share": 3.5}, {"number": 1, "name": "x"}, {"number": {"a": [1]}, "word": "x"}, {}
    )

    before = await again(store, session, errors)

    assert [str(error) for error in before] == [str(error) for error in errors]
    for one, error in zip(before, errors, strict=True):
        assert isinstance(one, ValidationError)
        told = ("type", "loc", "msg", "input", "url")
        assert [[detail.get(name) for name in told] for detail in one.errors()] == [
            [detail.get(name) for name in told] for detail in error.errors()
        ]


async def test_what_pydantic_refused_is_told_as_far_as_json_has_it(store: TaskStore, session: SessionTasks) -> None:
    values = [b"\xff", math.nan, object(), "x" * 5_000, "\ud800", [[]] * 1_000, Refused]
    errors = invalid(*({"number": value} for value in values))

    before = await again(store, session, errors)

    for one, error in zip(before, errors, strict=True):
        assert isinstance(one, ValidationError)
        (told,), (first,) = one.errors(), error.errors()
        assert (told["type"], told["loc"], told["msg"]) == (first["type"], first["loc"], first["msg"])
        assert len(str(told["input"])) <= 500


async def test_the_members_of_a_group_are_made_again(store: TaskStore, session: SessionTasks) -> None:
    deep = ExceptionGroup("deep", [KeyError("k"), Both("home", [Coded(5), Made(6)])])
    errors = [deep, Both("work", [Refused("no"), *invalid({})])]

    before = await again(store, session, errors)

    assert [str(error) for error in before] == [str(error) for error in errors]
    for one, error in zip(before, errors, strict=True):
        assert leaves(one) == leaves(error)
        assert type(one).__name__ == type(error).__name__
    assert isinstance(before[0], ExceptionGroup)
    matched, left = before[0].split(KeyError)
    assert matched is not None
    assert left is not None
    assert (leaves(matched), leaves(left)) == ([("KeyError", "'k'")], [("Coded", "code 5"), ("Made", "6")])


def leaves(error: BaseException) -> list[tuple[str, str]]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in leaves(one)]
    return [(type(error).__name__, str(error))]


async def test_a_member_of_a_group_whose_class_cannot_be_made_again_is_a_step_failed(
    store: TaskStore, session: SessionTasks
) -> None:
    class Local(Exception):
        pass

    [before] = await again(store, session, [ExceptionGroup("two", [Local("bye"), ValueError("a")])])

    assert isinstance(before, ExceptionGroup)
    lost, kept = before.exceptions
    assert isinstance(lost, StepFailed)
    assert (lost.failure.type, lost.failure.message, str(kept)) == ("Local", "bye", "a")


async def test_of_a_group_of_very_many_as_many_are_kept_as_have_room(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    group = ExceptionGroup("many", [ValueError(f"{number} {'x' * 300}") for number in range(5_000)])

    [before] = await again(store, session, [group])

    assert isinstance(before, ExceptionGroup)
    assert str(before) == str(group)
    assert 10 < len(before.exceptions) < 100
    assert rows(path, "SELECT max(length(failure)) < 20000 AS fits FROM steps") == [{"fits": 1}]


async def test_a_failure_of_before_that_keeps_no_parts_is_a_step_failed(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = recall.to_raise_again
    monkeypatch.setattr(recall, "to_raise_again", lambda error: {"class": kept(error)["class"]})
    fns = [raising(ExceptionGroup("one", [ValueError("a")])), raising(invalid({})[0])]

    for number, fn in enumerate(fns):
        _, before = await in_attempts(store, session, lambda task, n=number, fn=fn: task.step(f"s{n}", fn))  # type: ignore[misc]
        assert isinstance(before, StepFailed)


async def test_a_failure_whose_class_cannot_be_made_again_is_a_step_failed(
    store: TaskStore, session: SessionTasks
) -> None:
    first, again = await in_attempts(store, session, lambda task: task.step("s", gone))

    assert isinstance(again, StepFailed)
    assert (again.failure.type, again.failure.message) == (type(first).__name__, str(first))
    assert again.failure.traceback is not None
    assert "step 's' failed in attempt 1" in str(again)


async def test_a_task_that_fails_with_a_steps_failure_says_the_same_in_any_attempt(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await task.step("s", gone)
        except Exception:
            if task.attempt == 1:
                started.set()
                await asyncio.Event().wait()
            raise

    task = await session.spawn(work, id="t")
    await started.wait()
    await die(store, session, "t")

    with pytest.raises(TaskFailed) as failed:
        await task
    assert (failed.value.failure.type, failed.value.failure.message) == ("Gone", "bye")


async def test_an_exit_in_a_step_ends_the_body_and_not_the_program(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    async def on_loop(error: BaseException) -> None:
        raise error

    def in_thread(error: BaseException) -> None:
        raise error

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext, number: int) -> None:
        error, fn = ways[number]
        await task.step("s", fn, error)

    ways = list(itertools.product((SystemExit(3), KeyboardInterrupt()), (on_loop, in_thread)))
    records = [await (await session.spawn(work, number)).wait() for number in range(4)]

    assert [one.failure and one.failure.type for one in records] == ["SystemExit"] * 2 + ["KeyboardInterrupt"] * 2
    assert rows(path, "SELECT * FROM steps") == []


async def test_stop_iteration_in_a_step_does_not_hang(store: TaskStore, session: SessionTasks) -> None:
    got = await in_attempts(store, session, lambda task: task.step("s", raising(StopIteration(5))))

    assert [type(one) for one in got] == [RuntimeError] * 2


async def test_a_failure_is_final_in_its_own_attempt_as_well(store: TaskStore, session: SessionTasks) -> None:
    calls: list[int] = []

    def fn() -> str:
        calls.append(1)
        if len(calls) == 1:
            raise Refused("no")
        return "done after all"

    async def do(task: TaskContext) -> list[str]:
        return [str(await told(task.step("s", fn))) for _ in range(2)]

    first, second = await in_attempts(store, session, do)

    assert first == second == ["no", "no"]
    assert len(calls) == 1


async def test_who_asks_at_once_for_a_step_that_fails_is_told_so_too(store: TaskStore, session: SessionTasks) -> None:
    calls: list[int] = []

    def fn() -> None:
        calls.append(1)
        raise Refused("no")

    async def do(task: TaskContext) -> list[str]:
        return [
            repr(one) for one in await asyncio.gather(*[task.step("s", fn) for _ in range(3)], return_exceptions=True)
        ]

    assert await run(store, session, do) == ["Refused('no')"] * 3
    assert len(calls) == 1


async def test_a_retry_of_the_task_tries_failed_steps_again_and_keeps_what_was_done(
    store: TaskStore, session: SessionTasks, path: Path
) -> None:
    calls: list[str] = []

    def fn(name: str, fails: bool) -> str:
        calls.append(name)
        if fails:
            raise Refused("not yet")
        return name

    async def do(task: TaskContext) -> list[Any]:
        done = await task.step("done", fn, "done", fails=False)
        caught = await told(task.step("caught", fn, "caught", fails=task.attempt == 1))
        return [task.attempt, done, str(caught), await task.step("last", fn, "last", fails=task.attempt == 1)]

    assert await run(store, session, do, retry_on=Refused, backoff=AT_ONCE) == [2, "done", "caught", "last"]
    assert calls == ["done", "caught", "last", "caught", "last"]


# --- tries ----------------------------------------------------------------------------------------------------------


class Flaky:
    """Fails so many times."""

    def __init__(self, failures: int, error: Exception | None = None) -> None:
        self.failures = failures
        self.error = error or Refused("not yet")
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return self.calls


async def test_how_often_a_step_is_tried(store: TaskStore, session: SessionTasks, path: Path) -> None:
    # options, how often it fails, how often it is called, whether it is done
    cases: list[tuple[dict[str, Any], int, int, bool]] = [
        ({}, 1, 1, False),
        ({"max_attempts": 3}, 2, 3, True),
        ({"max_attempts": 3}, 9, 3, False),
        ({"max_attempts": 1}, 9, 1, False),
        ({"backoff": AT_ONCE}, 9, 5, False),
        ({"retry_on": Refused}, 4, 5, True),
        ({"retry_on": Refused}, 9, 5, False),
        ({"retry_on": [ValueError, Refused], "max_attempts": 2}, 9, 2, False),
        ({"retry_on": ValueError}, 9, 1, False),
        ({"retry_on": (), "max_attempts": 3}, 9, 1, False),
        ({"no_retry_on": Refused, "max_attempts": 3}, 9, 1, False),
        ({"no_retry_on": [ValueError]}, 4, 5, True),
        ({"retry_on": Exception, "no_retry_on": (Refused,)}, 9, 1, False),
    ]
    functions = [Flaky(failures) for _, failures, _, _ in cases]

    async def do(task: TaskContext) -> list[str]:
        got = []
        for number, ((options, *_), fn) in enumerate(zip(cases, functions, strict=True)):
            options = {**options, "backoff": AT_ONCE} if options else options
            got.append(str(await told(task.step(f"s{number}", fn, **options))))
        return got

    got = await in_attempts(store, session, do)

    assert [fn.calls for fn in functions] == [calls for _, _, calls, _ in cases]
    assert got == [[str(calls) if is_done else "not yet" for _, _, calls, is_done in cases]] * 2
    for number, (_, _, calls, is_done) in enumerate(cases):
        row = kept(path, f"s{number}")
        assert (row["state"], row["tries"]) == ("done" if is_done else "failed", calls)
    [task] = await session.list(include_terminal=True)
    assert event_types(path, task.task_seq).count("retry_scheduled") == sum(calls - 1 for _, _, calls, _ in cases)


async def test_tries_are_counted_over_attempts_and_the_backoff_goes_on(
    new: Callable[..., TaskStore], path: Path
) -> None:
    store, fn = new(), Flaky(9)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        pause = LATER if task.attempt == 1 else AT_ONCE
        return await task.step("s", fn, max_attempts=3, backoff=pause)

    async with store:
        session = await store.session("s1")
        task = await session.spawn(work, id="t")
        await scheduled(store)
        [step] = await task.steps()
        assert (step.state, step.tries, step.failure and step.failure.message) == ("retrying", 1, "not yet")
        assert step.wake_at is not None
        assert 3590 < (step.wake_at - step.saved_at).total_seconds() <= 3601
    assert kept(path, "s")["state"] == "retrying"
    # its backoff of 0 bounds what is left of the wait
    async with store:
        with pytest.raises(TaskFailed, match="not yet"):
            await (await store.handle("desktop:s1", "t"))
    assert fn.calls == 3
    assert kept(path, "s")["tries"] == 3


async def scheduled(store: TaskStore) -> None:
    """Wait until a try of a step was put off."""
    async for _ in store.events(0, types=["retry_scheduled"]):  # type: ignore[list-item]
        return


async def test_a_backoff_goes_on_in_the_next_attempt(store: TaskStore, session: SessionTasks) -> None:
    fn = Flaky(9)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn, max_attempts=3, backoff=LATER)

    task = await session.spawn(work, id="t")
    await scheduled(store)
    before = (await task.steps())[0].wake_at
    await die(store, session, "t")
    # it waits without its slot: a later unit is behind the start
    while (await task.record()).attempt < 3:
        await store.session("behind it in the queue")
    await store.session("behind it in the queue")

    assert fn.calls == 1
    assert (await task.steps())[0].wake_at == before
    await task.cancel()
    assert (await task.record()).state is TaskState.CANCELLED


async def test_a_long_backoff_keeps_what_is_known_of_the_tries(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_SHOW", 0.05)
    fn = Flaky(9)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn, max_attempts=3, backoff=LATER)

    task = await session.spawn(work, id="t")
    await scheduled(store)
    # longer than it takes for a step that runs to be shown as begun
    woken = asyncio.Event()
    asyncio.get_running_loop().call_later(0.1, woken.set)
    await woken.wait()
    await store.session("behind it in the queue")
    [step] = await task.steps()
    await task.cancel()

    assert (step.state, step.tries) == ("retrying", 1)
    assert step.wake_at is not None


async def test_a_failure_that_takes_long_to_store_stays_a_failure(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_SHOW", 0.02)
    monkeypatch.setattr(stepping, "PAUSES", (0.1, 0.1))
    refuse_once(monkeypatch)

    async def do(task: TaskContext) -> str:
        with pytest.raises(Refused):
            await task.step("s", Flaky(9))
        return "goes on"

    assert await run(store, session, do) == "goes on"
    # the note that it has begun came between; the failure is the last word
    assert kept(path, "s")["state"] == "failed"


async def test_a_failure_that_waits_for_a_lock_stays_a_failure(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stepping, "_SHOW", 0.05)
    shell = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    shown, show = asyncio.Event(), stepping.Steps._show

    def spy(self: Any, begun: Any) -> None:
        show(self, begun)
        shown.set()

    monkeypatch.setattr(stepping.Steps, "_show", spy)

    def fn() -> None:
        shell.execute("BEGIN IMMEDIATE")
        raise Refused("no")

    async def do(task: TaskContext) -> str:
        step = asyncio.create_task(told(task.step("s", fn)))
        await asyncio.wait({asyncio.create_task(shown.wait())}, timeout=0.3)
        shell.execute("ROLLBACK")
        return repr(await step)

    try:
        assert await run(store, session, do) == "Refused('no')"
    finally:
        shell.close()
    assert kept(path, "s")["state"] == "failed"


def refuse_once(monkeypatch: pytest.MonkeyPatch, *, begins: bool = False) -> list[str]:
    """Have a full disk refuse the first note of a step that is over, or that *begins*."""
    note_step, refused = memory.note_step, []

    def full(tx: Any, task: Any, fence: Any, note: Any) -> Any:
        if not refused and (note.state == "begun") is begins:
            refused.append(note.name)
            raise StorageFull("no room")
        return note_step(tx, task, fence, note)

    monkeypatch.setattr(memory, "note_step", full)
    return refused


async def test_a_timeout_bounds_each_try(store: TaskStore, session: SessionTasks) -> None:
    stopped: list[str] = []

    async def fn() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append("stopped")

    async def do(task: TaskContext) -> Any:
        return await task.step("s", fn, timeout=0.01, max_attempts=3, backoff=AT_ONCE)

    got = await in_attempts(store, session, do)

    assert [type(one) for one in got] == [TimeoutError] * 2
    assert stopped == ["stopped"] * 3


async def test_a_thread_that_takes_too_long_is_left_behind(store: TaskStore, session: SessionTasks) -> None:
    go_on, over = threading.Event(), threading.Event()

    def fn() -> None:
        go_on.wait(10)
        over.set()

    async def do(task: TaskContext) -> str:
        with pytest.raises(TimeoutError):
            await task.step("s", fn, timeout=0.01)
        return "goes on"

    assert await run(store, session, do) == "goes on"
    assert not over.is_set()
    go_on.set()
    assert await asyncio.to_thread(over.wait, 10)
    assert store._core is not None
    assert store._core.threads._value == 64


async def test_a_try_does_not_use_its_time_up_in_the_queue_for_a_thread(
    store: TaskStore, session: SessionTasks
) -> None:
    assert store._core is not None
    store._core.threads = asyncio.Semaphore(1)
    go_on = threading.Event()

    async def do(task: TaskContext) -> Any:
        async with asyncio.TaskGroup() as group:
            group.create_task(task.step("first", go_on.wait, 10))
            second = group.create_task(told(task.step("second", int, "5", timeout=0.05)))
            await asyncio.wait({second}, timeout=0.2)
            go_on.set()
        return str(second.result())

    assert await run(store, session, do) == "5"


async def test_a_step_that_no_more_than_waits_keeps_no_other_from_a_thread(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store._core is not None
    monkeypatch.setattr(store._core, "threads", asyncio.Semaphore(1))
    waiting, worked = asyncio.Event(), asyncio.Event()

    async def wait() -> bool:
        waiting.set()
        return await worked.wait()

    async def do(task: TaskContext) -> list[Any]:
        waits = asyncio.ensure_future(task.step("waits", lambda: wait(), timeout=10))
        await waiting.wait()
        works = await task.step("works", str, 1)
        worked.set()
        late = await told(task.step("waits for ever", lambda: asyncio.Event().wait(), timeout=0.01))
        return [works, await waits, type(late).__name__]

    assert await asyncio.wait_for(run(store, session, do), 5) == ["1", True, "TimeoutError"]
    assert store._core.threads._value == 1


async def test_a_failure_of_ours_may_be_retried_when_it_is_the_functions(
    store: TaskStore, session: SessionTasks
) -> None:
    fn = Flaky(1, ResultNotSerializable("of something else"))

    assert await run(store, session, lambda task: task.step("s", fn, max_attempts=2, backoff=AT_ONCE)) == 2


# --- at most once ---------------------------------------------------------------------------------------------------


async def test_at_most_once_is_begun_durably_and_in_doubt_after_a_death(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event
) -> None:
    calls: list[Any] = []

    async def fn() -> None:
        calls.append(kept(path, "s")["state"])
        started.set()
        await asyncio.Event().wait()

    doubts: list[StepInDoubt] = []

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        for _ in range(2):
            try:
                await task.step("s", fn, at_most_once=True)
            except StepInDoubt as error:
                doubts.append(error)
        return await task.step("another name", lambda: "goes on")

    task = await session.spawn(work, id="t")
    await started.wait()
    await die(store, session, "t")

    assert await task == "goes on"
    assert calls == ["begun"]
    assert len(doubts) == 2
    assert doubts[0].task_id == "t"
    assert "attempt 1" in str(doubts[0])


async def test_at_most_once_that_was_done_or_failed_is_in_no_doubt(store: TaskStore, session: SessionTasks) -> None:
    good, bad = Flaky(0), Flaky(9)

    async def do(task: TaskContext) -> list[str]:
        return [str(await told(task.step(name, fn, at_most_once=True))) for name, fn in (("good", good), ("bad", bad))]

    assert await in_attempts(store, session, do) == [["1", "not yet"]] * 2
    assert (good.calls, bad.calls) == (1, 1)


async def test_at_most_once_that_was_given_up_is_in_doubt_in_its_own_attempt(
    store: TaskStore, session: SessionTasks
) -> None:
    async def do(task: TaskContext) -> str:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await task.step("s", asyncio.Event().wait, at_most_once=True)
        with pytest.raises(StepInDoubt):
            await task.step("s", asyncio.Event().wait, at_most_once=True)
        return "goes on"

    assert await run(store, session, do) == "goes on"


async def test_at_most_once_that_took_too_long_is_not_called_again(store: TaskStore, session: SessionTasks) -> None:
    go_on = threading.Event()
    calls: list[int] = []

    def fn() -> None:
        calls.append(1)
        go_on.wait(10)

    async def do(task: TaskContext) -> list[str]:
        options: dict[str, Any] = {"at_most_once": True, "timeout": 0.01}
        return [type(await told(task.step("s", fn, **options))).__name__ for _ in range(2)]

    said = await run(store, session, do)
    go_on.set()

    assert said == ["TimeoutError", "TimeoutError"]
    assert calls == [1]


@pytest.mark.parametrize("how", ["raised", "took too long", "cannot be stored"])
async def test_at_most_once_that_failed_is_not_called_again_by_a_retry_of_the_task(
    store: TaskStore, session: SessionTasks, path: Path, how: str
) -> None:
    calls: list[int] = []

    async def fn() -> Any:
        calls.append(1)
        if how == "raised":
            raise Refused("the answer was lost")
        if how == "took too long":
            await asyncio.Event().wait()
        return object()

    async def do(task: TaskContext) -> Any:
        error = await told(task.step("s", fn, at_most_once=True, timeout=0.01 if how == "took too long" else None))
        if task.attempt < 3:
            raise error
        return [type(error).__name__, str(error)]

    expected = {"raised": Refused, "took too long": TimeoutError, "cannot be stored": ResultNotSerializable}[how]
    said = await run(store, session, do, retry_on=expected, backoff=AT_ONCE)

    assert said == [expected.__name__, json.loads(kept(path, "s")["failure"])["message"]]
    assert calls == [1]


async def test_at_most_once_whose_begin_cannot_be_noted_has_not_failed(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = refuse_once(monkeypatch, begins=True)
    calls: list[int] = []

    async def do(task: TaskContext) -> Any:
        return await task.step("s", lambda: calls.append(task.attempt), at_most_once=True)

    await run(store, session, do, retry_on=StorageFull, backoff=AT_ONCE)

    assert refused == ["s"]
    assert calls == [2]


@pytest.mark.parametrize("words", [{"max_attempts": 3}, {"retry_on": OSError}, {"backoff": AT_ONCE}])
async def test_what_runs_at_most_once_is_not_tried_again(
    store: TaskStore, session: SessionTasks, words: dict[str, Any]
) -> None:
    calls: list[int] = []

    async def do(task: TaskContext) -> str:
        return str(await told(task.step("s", lambda: calls.append(1), at_most_once=True, **words)))

    assert "at most once" in await run(store, session, do)
    assert calls == []


# --- being stopped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cooperative", "abort_local"])
async def test_a_cancel_in_the_middle_of_a_step(
    opened: Callable[..., Any], path: Path, started: asyncio.Event, policy: str
) -> None:
    store = await opened(cancel_grace=0.05)
    session = await store.session("s1")

    async def fn() -> None:
        started.set()
        await asyncio.Event().wait()

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def work(task: TaskContext) -> None:
        await task.step("s", fn)

    task = await session.spawn(work, id="t", cancel_policy=policy)
    await started.wait()
    record = await task.cancel("enough")

    assert record.state is TaskState.CANCELLED
    assert rows(path, "SELECT * FROM steps") == []


async def test_a_step_that_ends_within_the_grace_is_remembered(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def fn() -> str:
        started.set()
        await release.wait()
        return "done"

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> str:
        return await task.step("s", fn)

    task = await session.spawn(work, id="t")
    await started.wait()
    await task.cancel(timeout=0)
    release.set()

    assert await task == "done"
    assert kept(path, "s")["value"] == '"done"'


async def test_a_cancel_in_a_backoff_ends_the_body_at_once(store: TaskStore, session: SessionTasks, path: Path) -> None:
    fn = Flaky(9)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn, max_attempts=3, backoff=LATER)

    task = await session.spawn(work, id="t")
    await scheduled(store)

    assert (await task.cancel("enough")).state is TaskState.CANCELLED
    assert fn.calls == 1
    assert (kept(path, "s")["state"], kept(path, "s")["tries"]) == ("retrying", 1)


async def test_a_cancel_while_a_try_fails_has_no_other_try(
    store: TaskStore, session: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    calls: list[int] = []

    async def fn() -> None:
        calls.append(1)
        started.set()
        await release.wait()
        raise Refused("not yet")

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.step("s", fn, max_attempts=3, backoff=AT_ONCE)

    task = await session.spawn(work, id="t")
    await started.wait()
    await task.cancel(timeout=0)
    release.set()

    assert (await task.wait()).state is TaskState.CANCELLED
    assert calls == [1]


@pytest.mark.parametrize("kind", ["async", "thread"])
async def test_a_close_in_the_middle_leaves_the_step_to_the_next_life(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event, kind: str
) -> None:
    store, calls = new(), []
    go_on, loop = threading.Event(), asyncio.get_running_loop()

    async def fn() -> int:
        calls.append(1)
        started.set()
        if len(calls) == 1:
            await asyncio.Event().wait()
        return len(calls)

    def in_thread() -> int:
        calls.append(1)
        loop.call_soon_threadsafe(started.set)
        if len(calls) == 1:
            go_on.wait(10)
        return len(calls)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn if kind == "async" else in_thread)

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
    go_on.set()
    assert rows(path, "SELECT * FROM steps") == []
    async with store:
        assert await (await store.handle("desktop:s1", "t")) == 2


async def test_what_a_step_raises_because_the_store_closes_is_not_its_failure(
    new: Callable[..., TaskStore], path: Path, started: asyncio.Event
) -> None:
    store = new()

    async def fn() -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise Refused("interrupted") from None
        return "never"

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn)

    async with store:
        await (await store.session("s1")).spawn(work, id="t")
        await started.wait()
    assert rows(path, "SELECT * FROM steps") == []


async def test_a_step_of_a_stale_attempt_is_refused_and_the_next_one_keeps_its_own(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    refused: list[BaseException] = []

    async def fn() -> str:
        started.set()
        await release.wait()
        return "late"

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        try:
            await task.step("s", fn)
        except StaleAttempt as error:
            refused.append(error)
            raise

    task = await session.spawn(work, id="t")
    await started.wait()
    await move_on(store, task.task_seq)
    body = next(one for one in asyncio.all_tasks() if one.get_name() == "lash_store body t")
    release.set()
    await asyncio.wait({body})

    assert len(refused) == 1
    assert rows(path, "SELECT * FROM steps") == []


async def test_the_next_caller_runs_a_step_whose_first_caller_gave_up(store: TaskStore, session: SessionTasks) -> None:
    begun = [asyncio.Event(), asyncio.Event()]
    calls: list[int] = []

    async def fn() -> int:
        calls.append(1)
        begun[len(calls) - 1].set()
        if len(calls) == 1:
            await asyncio.Event().wait()
        return len(calls)

    async def do(task: TaskContext) -> int:
        first = asyncio.create_task(task.step("s", fn))
        second = asyncio.create_task(task.step("s", fn))
        await begun[0].wait()
        first.cancel()
        return await second

    assert await run(store, session, do) == 2


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
@pytest.mark.parametrize("kind", ["async", "thread", "at most once", "failing", "retried"])
async def test_a_caller_cancelled_at_any_point_leaves_the_step_whole(
    store: TaskStore, session: SessionTasks, path: Path, kind: str, late: bool
) -> None:
    points: list[Stepped] = []
    calls: dict[int, int] = {}
    noisy: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: noisy.append(context))

    def plain(at: int) -> int:
        calls[at] = calls.get(at, 0) + 1
        if kind == "failing" or (kind == "retried" and calls[at] == 1):
            raise Refused(str(at))
        return at

    async def on_loop(at: int) -> int:
        await asyncio.sleep(0)
        return plain(at)

    fn = plain if kind == "thread" else on_loop
    options: dict[str, Any] = {"at_most_once": kind == "at most once"}
    if kind == "retried":
        options |= {"max_attempts": 2, "backoff": AT_ONCE}

    async def do(task: TaskContext) -> int:
        for at in itertools.count(1):
            stepped = await cancel_at(task.step(f"s{at}", fn, at, **options), at, late=late)
            points.append(stepped)
            await store.session("behind it in the queue")
            found = rows(path, "SELECT state FROM steps WHERE name = ?", f"s{at}")
            over = bool(found) and found[0]["state"] in {"done", "failed"}
            before = calls.get(at, 0)
            again = await told(task.step(f"s{at}", fn, at, **options))
            if over:
                assert calls[at] == before, f"called again though it was {found[0]['state']}, cancelled at {at}"
            assert again == at or isinstance(again, Refused | StepInDoubt)
            if not stepped.reached:
                return at
        raise AssertionError

    assert await run(store, session, do) > 1
    assert noisy == []
    assert store._core is not None
    assert store._core.threads._value == 64


@pytest.mark.parametrize("late", [False, True], ids=["waiting", "late"])
@pytest.mark.parametrize("once", [False, True], ids=["at least once", "at most once"])
async def test_who_asks_again_while_a_result_is_being_stored_is_given_it(
    store: TaskStore, session: SessionTasks, path: Path, once: bool, late: bool
) -> None:
    ended: list[int] = []
    shell = sqlite3.connect(path, isolation_level=None)

    async def fn(at: int) -> int:
        await asyncio.sleep(0)
        ended.append(at)
        # nothing is stored for a while
        shell.execute("BEGIN IMMEDIATE")
        asyncio.get_running_loop().call_later(0.05, shell.rollback)
        return at

    async def do(task: TaskContext) -> str:
        for at in itertools.count(1):
            stepped = await cancel_at(task.step(f"s{at}", fn, at, at_most_once=once), at, late=late)
            if at in ended:
                if not stepped.was_cancelled:
                    break
                again = await told(task.step(f"s{at}", fn, at, at_most_once=once))
                assert repr(again) == str(at), f"cancelled at {at}"
                assert ended.count(at) == 1, f"called again, cancelled at {at}"
        return "whole"

    try:
        assert await run(store, session, do) == "whole"
    finally:
        shell.close()


# --- what is shown --------------------------------------------------------------------------------------------------


async def test_a_step_that_takes_long_is_shown_as_begun(
    store: TaskStore, session: SessionTasks, monkeypatch: pytest.MonkeyPatch, release: asyncio.Event
) -> None:
    monkeypatch.setattr(stepping, "_SHOW", 0.01)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", release.wait)

    task = await session.spawn(work, id="t")
    async for event in task.events():
        if event.type == "saved":
            break
    [begun] = await task.steps()
    release.set()
    await task
    [done] = await task.steps()

    assert (begun.kind, begun.name, begun.state, begun.tries, begun.value) == (StepKind.STEP, "s", "begun", 0, None)
    assert (done.state, done.tries, done.value) == ("done", 1, True)
    assert begun.begun_at == done.begun_at
    assert done.begun_at is not None
    assert done.begun_at <= begun.saved_at <= done.saved_at


async def test_steps_of_every_kind_are_shown(store: TaskStore, session: SessionTasks) -> None:
    async def do(task: TaskContext) -> None:
        await task.save({"at": 1})
        await task.step("good", lambda: [1])
        await told(task.step("bad", raising(Refused("no"))))
        await task.transact("mine", lambda connection: "in the file")
        await told(task.transact("not mine", lambda connection: connection.execute("DROP TABLE tasks")))
        await task.sleep(0, name="nap")
        await task.sleep(0.001)

    await run(store, session, do)

    task = await session.handle("t")
    steps = {(step.kind, step.name): step for step in await task.steps()}
    assert {key: (step.state, step.value) for key, step in steps.items()} == {
        ("checkpoint", ""): ("done", {"at": 1}),
        ("step", "good"): ("done", [1]),
        ("step", "bad"): ("failed", None),
        ("transact", "mine"): ("done", "in the file"),
        ("transact", "not mine"): ("failed", None),
        ("sleep", "nap"): ("done", 0.0),
        ("sleep", "#1.1"): ("done", 0.001),
    }
    bad = steps["step", "bad"]  # type: ignore[index]
    assert bad.failure is not None
    assert (bad.failure.type, bad.failure.message, bad.attempt, bad.task_seq) == ("Refused", "no", 1, task.task_seq)
    assert bad.failure.traceback is not None
    assert "raise error" in bad.failure.traceback


async def test_steps_are_in_the_order_they_were_written(store: TaskStore, session: SessionTasks) -> None:
    names = [f"{n % 7}.{n}" for n in range(30)]

    async def do(task: TaskContext) -> None:
        # one commit, one time
        await asyncio.gather(*[task.transact(name, lambda connection: None) for name in names])

    await run(store, session, do)

    assert [step.name for step in await (await session.handle("t")).steps()] == names


async def test_other_processes_see_the_steps(
    store: TaskStore, session: SessionTasks, path: Path, started: asyncio.Event, release: asyncio.Event
) -> None:
    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> None:
        await task.step("s", lambda: 1)
        started.set()
        await release.wait()

    await session.spawn(work, id="t")
    await started.wait()
    async with TaskStore.open_readonly(path) as reading, TaskStore.connect(path, runtime="desktop") as requesting:
        for other in (reading, requesting):
            [step] = await (await other.handle("desktop:s1", "t")).steps()
            assert (step.name, step.state, step.value) == ("s", "done", 1)
    release.set()


# --- beside the rest ------------------------------------------------------------------------------------------------


async def test_a_signal_received_in_a_step_that_failed_for_good_is_behind_as_well(
    store: TaskStore, session: SessionTasks, started: asyncio.Event
) -> None:
    async def receive(task: TaskContext) -> None:
        raise Refused(str(await task.signal("s")))

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[str]:
        got = [str(await told(task.step("receives", lambda: receive(task))))]
        if task.checkpoint is None:
            await task.save("all of it is behind")
            started.set()
            await asyncio.Event().wait()
        return [*got, str(await task.signal("s"))]

    task = await session.spawn(work, id="t")
    await task.signal("s", "first")
    await started.wait()
    await die(store, session, "t")
    await task.signal("s", "second")

    assert await task == ["first", "second"]


async def test_an_outcome_awaited_in_a_step_is_raised_again_with_what_it_is_about(
    store: TaskStore, session: SessionTasks
) -> None:
    async def child() -> None:
        await asyncio.Event().wait()

    other = await session.spawn(child(), id="other")
    await other.cancel("enough")

    async def do(task: TaskContext) -> list[Any]:
        error = await told(task.step("s", other.result))
        assert isinstance(error, TaskCancelled)
        return [error.task_id, error.reason]

    first, again = await in_attempts(store, session, do)

    assert first == ["other", "enough"]
    assert again == first


async def test_a_step_goes_on_while_its_task_is_handed_over(
    store: TaskStore, session: SessionTasks, there: SessionTasks, started: asyncio.Event, release: asyncio.Event
) -> None:
    async def fn() -> str:
        started.set()
        await release.wait()
        return "done"

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> list[Any]:
        return [await task.step("s", fn), await task.transact("t", lambda connection: 1), str(task.scope)]

    await session.spawn(work, id="t")
    await started.wait()
    await session.transfer(there, ["t"])
    release.set()

    assert await (await there.handle("t")) == ["done", 1, "desktop:s2"]


async def test_a_backoff_lets_another_body_run(opened: Callable[..., Any]) -> None:
    store = await opened(max_running=1)
    session = await store.session("s1")

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def waits(task: TaskContext) -> Any:
        return await task.step("s", Flaky(9), max_attempts=3, backoff=LATER)

    @store.task(recovery=Recovery.RERUN)  # type: ignore[misc]
    async def runs(task: TaskContext) -> str:
        return "ran"

    waiting = await session.spawn(waits)
    assert await (await session.spawn(runs)) == "ran"
    assert (await waiting.record()).state is TaskState.RUNNING
    await waiting.cancel()
    assert await (await session.spawn(runs)) == "ran"
    assert store._core.runner.slots._free == 1


async def test_another_incarnation_of_an_id_remembers_nothing(store: TaskStore, session: SessionTasks) -> None:
    fn = Flaky(0)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> Any:
        return await task.step("s", fn)

    assert [await (await session.spawn(work, id="t")) for _ in range(2)] == [1, 2]


# --- the disk -------------------------------------------------------------------------------------------------------


async def test_a_result_that_a_full_disk_refused_is_stored_later_without_a_second_call(
    store: TaskStore, session: SessionTasks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = store._core
    assert core is not None
    assert core.writer is not None
    writer, connection = core.writer, core.writer._connection
    assert connection is not None
    refused = asyncio.Event()
    calls: list[int] = []
    monkeypatch.setattr(stepping, "PAUSES", (0.01, 0.01))
    tell = writer.tell

    def spy(unit: Any, then: Any) -> None:
        def told(outcome: Any, error: BaseException | None) -> None:
            if isinstance(error, StorageFull):
                refused.set()
            then(outcome, error)

        tell(unit, told)

    def fn() -> str:
        calls.append(1)
        return "x" * 200_000

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> int:
        return len(await task.step("s", fn))

    monkeypatch.setattr(writer, "tell", spy)
    pages = await connection.run(lambda raw: raw.execute("PRAGMA page_count").fetchone()[0])
    await connection.run(lambda raw: raw.execute(f"PRAGMA max_page_count={pages + 10}").fetchall())
    task = await session.spawn(work)
    await refused.wait()
    await connection.run(lambda raw: raw.execute("PRAGMA max_page_count=1000000").fetchall())

    assert await task == 200_000
    assert calls == [1]


async def test_a_result_that_is_too_large_is_a_final_failure(opened: Callable[..., Any], path: Path) -> None:
    store = await opened(limits=Limits(payload_bytes=100))
    session = await store.session("s1")

    got = await in_attempts(store, session, lambda task: task.step("s", lambda: "x" * 100, max_attempts=3))

    assert [type(one).__name__ for one in got] == ["LimitExceeded"] * 2
    assert "the result of step 's'" in str(got[1])
    assert kept(path, "s")["tries"] == 1


async def test_a_result_that_the_file_can_never_take_does_not_hang(
    opened: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = await opened(limits=Limits(payload_bytes=None))
    session = await store.session("s1")
    monkeypatch.setattr(stepping, "PAUSES", (0.01, 0.01))
    connection = store._core.writer._connection
    # SQLite's own limit is 1 GB
    await connection.run(lambda raw: raw.setlimit(0, 100_000))  # SQLITE_LIMIT_LENGTH

    async def do(task: TaskContext) -> str:
        async with asyncio.timeout(0.5):
            await told(task.step("s", lambda: "x" * 200_000))
        return "goes on"

    assert await run(store, session, do) == "goes on"
