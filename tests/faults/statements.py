"""
Owns the fault at the k-th statement of an operation: it fails before it runs, after it ran, or with its whole transaction.

The fault sits in the connections that `sqlite3.connect` gives while one is watched, on whatever thread; nothing of it is in the
product. What is held after each point is said once, in `judge`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lash_store import CommitInDoubt, SchemaError, StorageError
from tests.faults.operations import Operation, ReportedError, Stage, ask, staged
from tests.runtime.support import check_file, descriptors, threads

__all__ = [
    "CODES",
    "MODES",
    "Fault",
    "Outcome",
    "Point",
    "by_harness",
    "closed",
    "faulty",
    "lets_go",
    "point",
    "settled",
    "statements_of",
    "still_works",
    "word",
]

CODES = {
    "IOERR": sqlite3.SQLITE_IOERR_WRITE,
    "FULL": sqlite3.SQLITE_FULL,
    "BUSY": sqlite3.SQLITE_BUSY,
    "INTERRUPT": sqlite3.SQLITE_INTERRUPT,
    "NOMEM": sqlite3.SQLITE_NOMEM,
}

MODES = ("before", "after", "lost", "lasting")
"""
The statement does not run; it runs and its reply is lost; SQLite rolls the transaction back with it, as it may with every code
but BUSY; it and all that come after do not run, until the fault is mended.
"""

_IMPOSSIBLE = ("after", sqlite3.SQLITE_FULL)
"""
SQLite says that there is no room only for a COMMIT that is not there: what commits is written last, and a failing sync has a code
of its own. The writer relies on it for what has no events, so this one combination proves nothing.
"""

LASTING = 0.3
"""Seconds a lasting fault lasts: some answers are waited for until it is over, and come then."""

PATIENCE = 5.0


def driver_error(code: int) -> BaseException:
    """Make what the driver raises for a code; for want of memory that is no error of its own."""
    if code == sqlite3.SQLITE_NOMEM:
        return MemoryError()
    error = sqlite3.OperationalError(f"planted: {code}")
    error.sqlite_errorcode = code
    error.sqlite_errorname = {value: name for name, value in CODES.items()}.get(code, "SQLITE_IOERR")
    return error


@dataclass
class Fault:
    """What is to fail, and what did."""

    at: int | str = 0
    mode: str = "before"
    code: int = sqlite3.SQLITE_IOERR_WRITE
    is_armed: bool = False
    seen: int = 0
    hits: list[str] = field(default_factory=list)
    was_there: Any = None
    began: float | None = None
    look: Callable[[], Any] = lambda: None
    statements: list[str] = field(default_factory=list)
    connections: list[Faulty] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def arm(self) -> None:
        """Count statements from now on."""
        self.seen, self.is_armed = 0, True

    def disarm(self) -> None:
        """Let everything run again."""
        self.is_armed = False

    def strikes(self, sql: str) -> bool:
        """Count a statement; say whether it is to fail."""
        if not self.is_armed:
            return False
        with self._lock:
            self.seen += 1
            self.statements.append(sql)
            is_it = self._is_it(sql)
            if is_it:
                if not self.hits:
                    self.began = time.monotonic()
                    self.was_there = self.look()
                self.hits.append(sql)
        return is_it

    def _is_it(self, sql: str) -> bool:
        """Whether it is the first that is meant; or a later one, while a fault lasts."""
        if self.began is None:
            return sql == self.at if isinstance(self.at, str) else self.seen == self.at
        return self.mode == "lasting" and time.monotonic() < self.began + LASTING

    def run(self, connection: Faulty, sql: str, run: Callable[[], Any], fetch: Callable[[Any], Any]) -> Any:
        """Run a statement, or have it fail."""
        if not self.strikes(sql):
            return run()
        error = driver_error(self.code)
        if self.mode == "after":
            # one that fails by itself says so
            fetch(run())
        elif self.mode == "lost" and connection.in_transaction and self.code != sqlite3.SQLITE_BUSY:
            sqlite3.Connection.execute(connection, "ROLLBACK")
        raise error


class Struck(Protocol):
    """What is known of a fault once it is over."""

    mode: str
    code: int
    hits: list[str]
    was_there: Any


class _Cursor(sqlite3.Cursor):
    def execute(self, sql: str, *parameters: Any) -> Any:
        connection = self.connection
        assert isinstance(connection, Faulty)
        plain = super().execute
        found = connection.fault.run(connection, sql, lambda: plain(sql, *parameters), lambda cursor: cursor.fetchall())
        assert isinstance(found, sqlite3.Cursor)
        return found


class Faulty(sqlite3.Connection):
    """A connection whose statements may fail."""

    fault: Fault

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        plain = super().execute
        found = self.fault.run(self, sql, lambda: plain(sql, *parameters), lambda cursor: cursor.fetchall())
        assert isinstance(found, sqlite3.Cursor)
        return found

    def executemany(self, sql: str, parameters: Iterable[Any]) -> sqlite3.Cursor:
        plain = super().executemany
        found = self.fault.run(self, sql, lambda: plain(sql, parameters), lambda cursor: cursor)
        assert isinstance(found, sqlite3.Cursor)
        return found

    def executescript(self, sql: str) -> sqlite3.Cursor:
        plain = super().executescript
        found = self.fault.run(self, sql, lambda: plain(sql), lambda cursor: cursor)
        assert isinstance(found, sqlite3.Cursor)
        return found

    def cursor(self, factory: Any = None) -> Any:
        return super().cursor(factory or _Cursor)


@contextmanager
def faulty(fault: Fault) -> Iterator[None]:
    """Have every connection opened from now on ask the fault; those of the harness are counted as little as they are armed."""
    plain = sqlite3.connect

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        if options.get("factory") is None and threading.current_thread() not in _harness:
            connection = plain(*arguments, **{**options, "factory": Faulty})
            assert isinstance(connection, Faulty)
            connection.fault = fault
            fault.connections.append(connection)
            return connection
        made: sqlite3.Connection = plain(*arguments, **options)
        return made

    sqlite3.connect = connect  # type: ignore[assignment]
    try:
        yield
    finally:
        sqlite3.connect = plain


_harness: set[threading.Thread] = set()


@contextmanager
def by_harness() -> Iterator[None]:
    """Open connections without a fault on this thread."""
    thread = threading.current_thread()
    is_outer = thread not in _harness
    _harness.add(thread)
    try:
        yield
    finally:
        if is_outer:
            _harness.discard(thread)


@dataclass
class Outcome:
    """What one point came to: whether it was *reached*, the *answer* in one word, and what is *wrong* with it."""

    operation: str
    at: int | str
    mode: str
    code: str
    reached: bool
    answer: str
    hit: str
    effect: str
    wrong: list[str]

    def __str__(self) -> str:
        return (
            f"{self.operation} k={self.at} {self.mode} {self.code} [{self.hit[:70]!r}] -> {self.answer}, {self.effect}: "
            f"{'; '.join(self.wrong) or 'fine'}"
        )


Asked = Callable[[Path], list[Any]]
Point = tuple[Operation, int, str, str]


async def statements_of(operation: Operation, born: Path, folder: Path) -> list[str]:
    """Run an operation without a fault, hold what its row says by hand, and return the statements it ran."""
    fault = Fault()
    path = folder / "agent.db"
    with faulty(fault):
        async with staged(operation, born, folder) as stage:
            assert operation.ask is None or _asked(operation, path) == operation.absent, operation.name
            fault.arm()
            result, error = await answered(operation, stage)
            fault.disarm()
            assert error is None, (operation.name, error)
            assert operation.answer is ... or result == operation.answer, (operation.name, result)
            if operation.ask is not None:
                effect = await settled(operation, stage, None)
                assert effect == operation.whole, (operation.name, effect)
    return fault.statements


async def point(
    operation: Operation, born: Path, folder: Path, at: int | str, mode: str, code: str, check: Asked
) -> Outcome:
    """Have the *at*-th statement of an operation fail, and hold what must be true of it then."""
    fault = Fault(at=at, mode=mode, code=CODES[code])
    before = threads()
    wrong: list[str] = []
    path = folder / "agent.db"
    quiet = logging.getLogger("lash_store")
    level, quiet.level = quiet.level, logging.CRITICAL
    try:
        with faulty(fault):
            async with staged(operation, born, folder) as stage:
                fault.look = lambda: looked(operation, path)
                fault.arm()
                result, error = await answered(operation, stage)
                fault.disarm()
                effect = await settled(operation, stage, error)
                wrong += judge(operation, fault, result, error, effect)
                wrong += await still_works(operation, stage, error)
                wrong += await lets_go(fault.connections, path)
            wrong += closed(path, before)
        with by_harness():
            wrong += [str(broken) for broken in check(path)]
    finally:
        quiet.setLevel(level)
    answer = "success" if error is None else type(error).__name__
    hit = fault.hits[0] if fault.hits else ""
    return Outcome(operation.name, at, mode, code, bool(fault.hits), answer, hit, word(operation, effect), wrong)


async def answered(operation: Operation, stage: Stage) -> tuple[Any, BaseException | None]:
    try:
        async with asyncio.timeout(20):
            return await operation.run(stage), None
    except asyncio.CancelledError as error:
        # a store that stops stops its bodies: what was asked for in one is in doubt
        core = stage.store._core
        if operation.body and core is not None and core.writer is not None and core.writer._fatal is not None:
            return None, CommitInDoubt(f"the body was stopped ({error!r}) by {core.writer._fatal!r}")
        raise
    except Exception as error:
        return None, error


def _asked(operation: Operation, path: Path) -> Any:
    with by_harness():
        return ask(operation, path)


def looked(operation: Operation, path: Path) -> Any:
    """Ask in the middle of a statement: under a lock that shuts others out nothing is committed yet."""
    try:
        with by_harness():
            return ask(operation, path, patience=0)
    except sqlite3.OperationalError:
        return operation.absent


async def settled(operation: Operation, stage: Stage, error: BaseException | None) -> Any:
    """Ask the file for the effect, once the fault is over and what was queued behind the operation is through."""
    if error is not None and not operation.alone:
        for _ in range(2):
            with contextlib.suppress(Exception):
                await stage.store.session("here")
    effect = _asked(operation, stage.path)
    if operation.ask is not None and error is None and effect != operation.whole:
        # what is posted behind an answer, nobody waits for
        await asyncio.sleep(0.05)
        effect = _asked(operation, stage.path)
    return effect


def word(operation: Operation, effect: Any) -> str:
    if operation.ask is None:
        return "no effect to look for"
    return "whole" if effect == operation.whole else "absent" if effect == operation.absent else f"torn {effect!r}"


def judge(operation: Operation, fault: Struck, result: Any, error: BaseException | None, effect: Any) -> list[str]:
    """
    Say what is wrong with an answer, held against the file.

    Success: it is there. An error that is not CommitInDoubt changes nothing from the fault on: it is as it was when the fault
    struck, and absent if the fault struck before or in its commit. CommitInDoubt: it is there or it is not. Never a part of it.
    """
    wrong = []
    if isinstance(error, TimeoutError):
        return ["no answer within 20 s"]
    is_typed = isinstance(error, StorageError | ReportedError)
    if operation.name == "TaskStore.restore" and fault.code == sqlite3.SQLITE_BUSY:
        # somebody has the file open, is what it says of any lock
        is_typed |= isinstance(error, SchemaError)
    if error is not None and not is_typed:
        wrong.append(f"an error that is not a StorageError: {error!r}")
    if error is None and operation.answer is not ... and result != operation.answer:
        wrong.append(f"answered {result!r}, not {operation.answer!r}")
    if operation.ask is None:
        return wrong
    if operation.failed is not None and fault.hits[:1] and fault.hits[0].startswith("/* guest */"):
        # any error of its statement may be the function's own: then it has failed, and that stands in the file
        return [] if effect in (operation.whole, operation.absent, operation.failed) else [f"torn: {effect!r}"]
    if effect not in (operation.whole, operation.absent, *operation.parts):
        wrong.append(f"torn: {effect!r} is neither {operation.absent!r} nor {operation.whole!r}")
    elif effect in operation.parts or (fault.hits[:1] == ["COMMIT"] and (fault.mode, fault.code) == _IMPOSSIBLE):
        return wrong
    elif error is None and effect != operation.whole and operation.lax is None:
        wrong.append(f"success, and the file says {effect!r}")
    elif error is None or isinstance(error, CommitInDoubt) or operation.goes_on or not fault.hits:
        return wrong
    elif effect != fault.was_there:
        wrong.append(f"{error!r}, and yet the file went from {fault.was_there!r} to {effect!r}")
    return wrong


async def still_works(operation: Operation, stage: Stage, error: BaseException | None) -> list[str]:
    """Hold that the store goes on, unless it said that it has stopped; and that one whose opening failed opens."""
    if operation.alone and stage.store._core is None:
        if operation.name == "TaskStore.restore":
            return []
        try:
            async with asyncio.timeout(10):
                await stage.open()
        except Exception as second:
            return [f"does not open afterwards: {second!r}"]
    if operation.name == "TaskStore.close":
        stage.store = stage.make()
        await stage.open()
    elif operation.name == "TaskStore.open" and error is None:
        stage.here, stage.there = await stage.store.session("here"), await stage.store.session("there")
    try:
        async with asyncio.timeout(10):
            found = await (await stage.there.spawn(stage.echo, "next", id="next")).result()
    except CommitInDoubt as second:
        # said by the operation itself, or by a commit behind it, and then by everything
        core = stage.store._core
        has_stopped = core is not None and core.writer is not None and core.writer._fatal is not None
        return [] if has_stopped else [f"in doubt, but goes on: {second!r}"]
    except Exception as second:
        return [f"the next operation: {second!r}"]
    if isinstance(error, CommitInDoubt) and operation.name not in {"TaskStore.open", "TaskStore.close"}:
        return ["in doubt, and yet it goes on"]
    return [] if found == "next" else [f"the next operation: {found!r}"]


async def lets_go(connections: Iterable[Faulty], path: Path) -> list[str]:
    """Hold that the write lock is free, and no connection in a transaction; what bodies still write has a moment for it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        wrong = []
        with by_harness(), closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            try:
                other.execute("BEGIN IMMEDIATE")
                other.execute("ROLLBACK")
            except sqlite3.OperationalError as error:
                wrong.append(f"the write lock is held: {error}")
        for connection in connections:
            with contextlib.suppress(sqlite3.ProgrammingError):
                if connection.in_transaction:
                    wrong.append("a connection is in a transaction")
        if not wrong or time.monotonic() > deadline:
            return wrong
        await asyncio.sleep(0.01)


def closed(path: Path, before: set[str]) -> list[str]:
    """Hold that nothing of a store is left once it is closed, and that its file is whole."""
    deadline = time.monotonic() + PATIENCE
    while (left := [*(threads() - before), *descriptors(path)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    wrong = [f"left behind: {left}"] if left else []
    with by_harness():
        try:
            check_file(path)
        except AssertionError as broken:
            wrong.append(f"the file: {broken}")
    return wrong
