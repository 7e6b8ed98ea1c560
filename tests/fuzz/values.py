"""Odd values, and every public entry that takes one: what each call may come to, and that an error leaves the file as it was."""

from __future__ import annotations

import asyncio
import contextlib
import decimal
import enum
import inspect
import sqlite3
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError, model_serializer

from lash_store import (
    Backoff,
    CancelPolicy,
    Failure,
    Limits,
    MonitorSpec,
    Recovery,
    Retention,
    Scope,
    SessionTasks,
    StoreError,
    TaskContext,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskState,
    TaskStore,
)

__all__ = ["ENTRIES", "LEFT_OUT", "ODD", "Call", "Stage", "calls", "entry_names", "json_values", "odd"]

RUNTIME = "desktop"


# --- values ---------------------------------------------------------------------------------------------------------


class Boom(Exception):
    """Raised by objects of the caller's, and nobody else."""


class Hostile:
    """Raises whatever it is asked."""

    def __str__(self) -> str:
        raise Boom("str")

    def __repr__(self) -> str:
        raise Boom("repr")

    def __eq__(self, other: object) -> bool:
        raise Boom("eq")

    def __hash__(self) -> int:
        raise Boom("hash")

    def __bool__(self) -> bool:
        raise Boom("bool")

    def __iter__(self) -> Any:
        raise Boom("iter")


class BadModel(BaseModel):
    """A model that cannot be written."""

    value: int = 1

    @model_serializer
    def _write(self) -> Any:
        raise Boom("serializer")


class Colour(enum.Enum):
    """An enum of nobody's."""

    RED = object()


def _deep(make: Callable[[Any], Any], depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


def _cyclic_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def _cyclic_dict() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


ODD: Mapping[str, Callable[[], Any]] = {
    "empty": lambda: "",
    "space": lambda: " ",
    "NUL": lambda: "a\0b",
    "lone surrogate": lambda: "a\ud800b",
    "control": lambda: "\x1b[2J\x1b]0;x\x07\r\n\x7f\x9b31m",
    "bidi": lambda: "\u202egnp.exe\u2066\u2069",
    "line separators": lambda: "a\u2028b\u2029c\x85d",
    "SQL": lambda: "x'\";-- DROP TABLE tasks; %_",
    "LIKE": lambda: "%_\\%",
    "look-alike": lambda: "іndex",
    "combining": lambda: "e\u0301" * 100,
    "not a character": lambda: "\ufffe\uffff\U0010ffff",
    "long": lambda: "x" * 257,
    "very long": lambda: "é" * 300_000,
    "a handle's beginning": lambda: "h-x",
    "handle JSON": lambda: '{"__handle__": "task", "id": 5}',
    "deep handle JSON": lambda: '{"__handle__":' + "[" * 100_000,
    "digits in handle JSON": lambda: '{"__handle__":' + "9" * 5000 + "}",
    "scope": lambda: "desktop:s1",
    "colon": lambda: ":",
    "other runtime": lambda: "other:s1",
    "None": lambda: None,
    "True": lambda: True,
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "2**31": lambda: 2**31,
    "2**63 - 1": lambda: 2**63 - 1,
    "2**63": lambda: 2**63,
    "-(2**63) - 1": lambda: -(2**63) - 1,
    "5,000 digits": lambda: 10**5000,
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "minus infinity": lambda: float("-inf"),
    "1e308": lambda: 1e308,
    "minus nothing": lambda: -0.0,
    "denormal": lambda: 5e-324,
    "complex": lambda: 1j,
    "Decimal NaN": lambda: decimal.Decimal("sNaN"),
    "Decimal": lambda: decimal.Decimal("1e5000"),
    "bytes": lambda: b"\xff\0",
    "bytearray": lambda: bytearray(b"x"),
    "set": lambda: {1, "1"},
    "keys that are the same text": lambda: {1: "a", "1": "b"},
    "key of a number": lambda: {1.5: "a"},
    "key of a tuple": lambda: {(1, 2): "a"},
    "NaN inside": lambda: {"a": [float("nan")]},
    "surrogate inside": lambda: {"a": ["\udfff"], "\ud800": 1},
    "NUL inside": lambda: {"a\0": "\0"},
    "a number inside": lambda: {"a": 10**400},
    "list 100,000 deep": lambda: _deep(lambda value: [value], 100_000),
    "dict 100,000 deep": lambda: _deep(lambda value: {"a": value}, 100_000),
    "list 240 deep": lambda: _deep(lambda value: [value], 240),
    "a list in itself": _cyclic_list,
    "a dict in itself": _cyclic_dict,
    "empty list": list,
    "list of odd": lambda: ["", None, "\0", 5],
    "naive time": lambda: datetime(2025, 1, 1),
    "last time": lambda: datetime.max,
    "first time": lambda: datetime.min.replace(tzinfo=UTC),
    "time": lambda: datetime(2035, 1, 1, tzinfo=UTC),
    "span": lambda: timedelta(days=-999_999_999),
    "longest span": lambda: timedelta.max,
    "uuid": lambda: uuid.UUID(int=5),
    "path": lambda: Path("/nowhere/at/all"),
    "enum": lambda: Colour.RED,
    "class": lambda: int,
    "function": lambda: len,
    "object": object,
    "hostile": Hostile,
    "list of hostile": lambda: [Hostile()],
    "hostile inside": lambda: {"a": Hostile()},
    "hostile model": BadModel,
    "exception": lambda: Boom("an exception"),
    "generator": lambda: (one for one in "ab"),
}


odd = st.sampled_from([*ODD])

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), inner, max_size=4)
    ),
    max_leaves=12,
)
"""What must come back as it was given."""


# --- entries --------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A public callable: what it is a method of, its name, and whether it may go on waiting for what does not come."""

    owner: str
    name: str
    waits: bool = False


OWNERS: Mapping[str, type] = {
    "store": TaskStore,
    "session": SessionTasks,
    "handle": TaskHandle,
    "context": TaskContext,
}
MODELS: Mapping[str, Any] = {
    model.__name__: model for model in (MonitorSpec, Retention, TaskFilter, Limits, Backoff, Failure, Scope, TaskStore)
}

LEFT_OUT: Mapping[str, str] = {
    "store.open": "takes no value",
    "store.close": "ends the store of the stage; `test_values.py` gives it odd time-outs",
    "store.connect": "is tried as `TaskStore`, whose path and options these are",
    "store.open_readonly": "is tried as `TaskStore`",
    "store.restore": "puts files in the place of others; tests/fuzz/test_paths.py gives it paths",
    "session.close": "ends the session of the stage; `test_values.py` gives it odd time-outs and successors",
    "session.start_monitor": "takes a `MonitorSpec` alone, which is tried; `test_values.py` gives it what is none",
}

_WAITS = {
    "session.await_hidden", "session.await_background_work", "session.cancel", "session.cancel_all", "session.stop_monitor",
    "handle.wait", "handle.result", "handle.cancel", "context.sleep", "context.signal", "context.cancelled", "context.step",
    "store.recover",
}  # fmt: skip


def entry_names() -> list[str]:
    """Return every public method of the classes a program is given, whether it is tried or not."""
    return [
        f"{owner}.{name}"
        for owner, of in OWNERS.items()
        for name, member in inspect.getmembers(of)
        if not name.startswith("_") and callable(member)
    ]


ENTRIES: list[str] = [name for name in entry_names() if name not in LEFT_OUT] + [f"new.{name}" for name in MODELS]


async def work(task: TaskContext, value: Any = None) -> Any:
    """A function that returns what it is given."""
    return value


def plain(*_: Any, **__: Any) -> int:
    """A step."""
    return 1


_AS_MODELS = {"session.list", "store.prune"}
"""What these are given are the fields of `TaskFilter` and of `Retention`, whose errors, of `ValueError`, name the field."""

GOOD: Mapping[str, Callable[[], Any]] = {
    "id": lambda: "browser", "fn": lambda: work, "fn_or_coroutine": lambda: work, "label": lambda: "a label",
    "kind": lambda: TaskKind.OTHER, "state": lambda: TaskState.COMPLETED, "keep": lambda: ["browser"], "ids": lambda: ["browser"],
    "to": lambda: "s2", "scope": lambda: "desktop:s1", "reason": lambda: "why", "monitor": lambda: "m", "task_seq": lambda: 1,
    "owner_id": lambda: 424242, "name": lambda: "step", "text": lambda: "text", "message": lambda: "text", "value": lambda: 1,
    "seconds": lambda: 0.001, "recovery": lambda: Recovery.RERUN, "session": lambda: None, "runtime": lambda: RUNTIME,
    "session_id": lambda: "s1", "command": lambda: ("true",), "type": lambda: "E", "path": lambda: "/nowhere/agent.db",
    "timeout": lambda: 0.01, "filter": lambda: None,
}  # fmt: skip


class Call(NamedTuple):
    """One call: an entry, and which of its parameters is which odd value; the others are good, or left out."""

    entry: str
    odd: tuple[tuple[str, str], ...]


def _parameters(entry: str) -> list[inspect.Parameter]:
    owner, _, name = entry.partition(".")
    target = MODELS[name] if owner == "new" else getattr(OWNERS[owner], name)
    return [one for one in inspect.signature(target).parameters.values() if one.name not in {"self", "cls"}]


@st.composite
def calls(draw: st.DrawFn, entries: list[str] = ENTRIES) -> Call:
    """Draw a call with one odd value, or more."""
    entry = draw(st.sampled_from(entries))
    names = [one.name for one in _parameters(entry)]
    if not names:
        return Call(entry, ())
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    return Call(entry, tuple((name, draw(odd)) for name in chosen))


class Wrong(AssertionError):
    """A call came to what none may come to."""


# --- the stage ------------------------------------------------------------------------------------------------------


def dump(path: Path) -> dict[str, list[Any]]:
    """Read every table, with plain SQLite."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return {name: connection.execute(f'SELECT * FROM "{name}"').fetchall() for name in names}


class Stage:
    """A store with a session, work of somebody else, and a body that does what it is told; and another store that reads it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "agent.db"
        self.kept = 0

    async def __aenter__(self) -> Stage:
        self.store = TaskStore(self.path, runtime=RUNTIME, cancel_grace=0.05, lock_timeout=2.0)
        self.store.task(recovery=Recovery.RERUN)(work)
        self._orders: asyncio.Queue[tuple[Callable[[TaskContext], Any], asyncio.Future[Any]]] = asyncio.Queue()

        @self.store.task(recovery=Recovery.RERUN)
        async def puppet(task: TaskContext) -> None:
            while True:
                order, answer = await self._orders.get()
                try:
                    result = order(task)
                    answer.set_result(await result if inspect.isawaitable(result) else result)
                except (Exception, asyncio.CancelledError) as error:
                    if not answer.done():
                        answer.set_exception(error if isinstance(error, Exception) else StoreError("stopped: look"))
                    if isinstance(error, asyncio.CancelledError):
                        raise

        self._puppet = puppet
        await self.store.open()
        self.reader = TaskStore.open_readonly(self.path)
        await self.reader.open()
        await self.store.session("s2")
        self.session = await self.store.session("s1")
        await self.set_up()
        return self

    async def set_up(self) -> None:
        """Have the work that calls are about there again, whatever was done to it."""
        for name in ("browser",):
            with contextlib.suppress(StoreError):
                await self.session.register(name, TaskKind.OTHER)
        self.handle = await self.session.handle("browser")
        with contextlib.suppress(StoreError):
            await self.session.spawn(self._puppet, id="puppet", cancel_policy=CancelPolicy.ABORT_LOCAL)

    async def __aexit__(self, *_: object) -> None:
        await self.reader.close()
        await self.store.close(timeout=1.0)

    async def _as_body(self, order: Callable[[TaskContext], Any]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._orders.put((order, answer))
        return await answer

    def _made(self, call: Call) -> tuple[list[Any], dict[str, Any]]:
        given = {name: ODD[value]() for name, value in call.odd}
        positional: list[Any] = []
        named: dict[str, Any] = {}
        for one in _parameters(call.entry):
            if one.kind is inspect.Parameter.VAR_POSITIONAL:
                positional += [given[one.name]] if one.name in given else []
            elif one.kind is inspect.Parameter.VAR_KEYWORD:
                named |= {"value": given[one.name]} if one.name in given else {}
            elif one.name in given or one.default is inspect.Parameter.empty:
                value = given[one.name] if one.name in given else self._good(call.entry, one.name)
                if one.kind is inspect.Parameter.KEYWORD_ONLY:
                    named[one.name] = value
                else:
                    positional.append(value)
            elif one.kind is not inspect.Parameter.KEYWORD_ONLY:
                # what comes before a positional one must be there
                positional.append(one.default)
            elif one.name == "timeout" and call.entry in _WAITS:
                named[one.name] = 0.01
        return positional, named

    def _good(self, entry: str, name: str) -> Any:
        if entry == "context.step" and name == "fn":
            return plain
        if entry == "handle.from_json":
            return self.session if name == "session" else self.handle.to_json()
        return GOOD[name]() if name in GOOD else 1

    async def _result_of(self, call: Call) -> Any:
        owner, _, name = call.entry.partition(".")
        positional, named = self._made(call)
        try:
            if owner == "new":
                return MODELS[name](*positional, **named)
            if owner == "context":
                return await self._as_body(lambda task: getattr(task, name)(*positional, **named))
            result = getattr(getattr(self, owner), name)(*positional, **named)
            return await result if inspect.isawaitable(result) else result
        finally:
            for one in [*positional, *named.values()]:
                if inspect.iscoroutine(one):
                    one.close()

    async def try_call(self, call: Call) -> str:
        """
        Make a call, and say what it came to: ``done``, ``waits``, or the name of an error that it may come to.

        Raises:
            Wrong: it came to another.
        """
        before = dump(self.path)
        try:
            # a body that is told to wait for ever must be free again
            await asyncio.wait_for(self._result_of(call), 5.0 if call.entry not in _WAITS else 0.25)
            outcome = "done"
        except TimeoutError as error:
            if call.entry not in _WAITS:
                raise Wrong(f"{call} did not come back") from error
            outcome = "waits"
        except (StoreError, ValueError, TypeError) as error:
            self._check(call, error)
            outcome = type(error).__name__
        except RecursionError as error:
            # an enum that a model asks says what it was given, however deep that is
            if not call.entry.startswith("new.") or not any(value.endswith("0,000 deep") for _, value in call.odd):
                raise Wrong(f"{call} raised {_shown(error)}") from error
            outcome = type(error).__name__
        except Boom as error:
            if str(error) not in {"iter", "bool"} and not (call.entry.startswith("new.") and str(error) == "repr"):
                raise Wrong(f"{call} raised what an object raised that was only to be told of: {error}") from error
            # what a caller's own iterator raises, or the truth of it, is the caller's
            outcome = "Boom"
        except Exception as error:
            raise Wrong(f"{call} raised {type(error).__name__}: {_shown(error)}") from error
        if outcome == "done":
            await self._look_from_elsewhere(call)
        elif outcome != "waits" and (after := dump(self.path)) != before:
            changed = {name: (before.get(name), rows) for name, rows in after.items() if before.get(name) != rows}
            raise Wrong(f"{call} raised {outcome} and changed the file: {str(changed)[:1500]}")
        await self._goes_on(call)
        return outcome

    def _check(self, call: Call, error: Exception) -> None:
        if isinstance(error, ValidationError) and not call.entry.startswith("new.") and call.entry not in _AS_MODELS:
            raise Wrong(f"{call} raised pydantic's own error: {error}") from error
        if isinstance(error, UnicodeError):
            raise Wrong(f"{call} raised {type(error).__name__}: {error}") from error
        if len(_shown(error)) > 1_000_000:
            raise Wrong(f"{call} raised an error of {len(_shown(error))} characters")

    async def _look_from_elsewhere(self, call: Call) -> None:
        """Read all there is through another store: what was taken can be read back."""
        try:
            await self.reader.list()
            await self.reader.sessions()
            view = await self.reader.session("s1")
            await view.notes(unread=False)
            puppet = await view.handle("puppet")
            await puppet.steps()
        except Exception as error:
            raise Wrong(f"after {call}, the file cannot be read: {type(error).__name__}: {error}") from error

    async def _goes_on(self, call: Call) -> None:
        """Make sure that the store works on."""
        try:
            async with asyncio.timeout(5.0):
                await self.session.update("browser", progress=call.entry)
                if not (await self._is_puppet_there()):
                    await self.set_up()
        except StoreError:
            await self.set_up()
            await self.session.update("browser", progress=call.entry)
        if (await self.session.get("browser")).is_terminal:
            await self.set_up()

    async def _is_puppet_there(self) -> bool:
        if (await self.session.get("puppet")).is_terminal:
            return False
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await self._orders.put((lambda task: 1, answer))
        try:
            await asyncio.wait_for(answer, 1.0)
        except (TimeoutError, StoreError):
            # it waits for what does not come: another takes its place
            await self.session.cancel("puppet", timeout=2.0)
            return False
        return True


def _shown(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:
        return f"<{type(second).__name__}>"


Run = Callable[[Awaitable[Any]], Any]
