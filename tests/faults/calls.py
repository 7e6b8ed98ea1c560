"""
Owns the fault at the k-th call that SQLite makes of a file: an error instead of it, an error although it was done, or SIGKILL.

It runs in a worker process, in which a layer under SQLite (`tests.power.vfs`) is put before any database is opened. What is held
after each point is what `statements` holds, and that a new store on the file recovers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from lash_store import CommitInDoubt, TaskStore
from tests.acceptance.processes import Report
from tests.checker import check
from tests.faults.operations import OPERATIONS, RUNTIME, Operation, ask, staged
from tests.faults.statements import LASTING, answered, closed, judge, lets_go, looked, settled, still_works, word
from tests.power import vfs
from tests.runtime.support import threads

__all__ = ["ERRORS", "MODES", "kill_at", "recovers", "sweep"]

MODES = ("once", "although done", "lasting")

_LOCK = sqlite3.SQLITE_IOERR_LOCK
ERRORS: dict[str, tuple[int, ...]] = {
    "write": (sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_FULL),
    "sync": (sqlite3.SQLITE_IOERR_FSYNC,),
    "truncate": (sqlite3.SQLITE_IOERR_TRUNCATE,),
    "read": (sqlite3.SQLITE_IOERR_READ,),
    "open": (sqlite3.SQLITE_CANTOPEN,),
    "delete": (sqlite3.SQLITE_IOERR_DELETE,),
    "size": (sqlite3.SQLITE_IOERR_FSTAT,),
    "lock": (_LOCK,),
    "sync_folder": (sqlite3.SQLITE_CANTOPEN,),
}
"""What the default VFS itself says when the system call under it fails."""

BEFORE_ONLY = {"open", "lock", "size", "delete", "sync_folder", "truncate"}
"""Calls of which SQLite could not know that they were done: a file that is open, or locked, is never told to have failed."""


class Fault:
    """An observer that lets a call fail; see `statements.Fault`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = threading.local()
        self.look: Callable[[], Any] = lambda: None
        self.forget()

    def forget(self) -> None:
        """Let every call through."""
        self.at, self.mode, self.code, self.chance = 0, "once", 0, random.Random(0)
        self.is_armed, self.seen, self.began = False, 0, None
        self.hits: list[str] = []
        self.was_there: Any = None

    began: float | None

    def _strikes(self, call: vfs.Call, *, done: bool) -> int | None:
        if not self.is_armed or getattr(self._asking, "on", False) or (done != (self._is_late(call))):
            return None
        with self._lock:
            self.seen += 1
            if self.began is None:
                if self.seen != self.at:
                    return None
            elif self.mode != "lasting" or time.monotonic() > self.began + LASTING:
                return None
            if self.began is None:
                self.began = time.monotonic()
                if self.mode == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                self._asking.on = True
                self.was_there = self.look()
                self._asking.on = False
            self.hits.append(f"{call.kind} {call.role}")
            code = self.code = self.chance.choice(ERRORS[call.kind])
            return code

    def _is_late(self, call: vfs.Call) -> bool:
        return self.mode == "although done" and call.kind not in BEFORE_ONLY

    def before(self, call: vfs.Call) -> int | None:
        """Fail instead of the call."""
        return self._strikes(call, done=False)

    def after(self, call: vfs.Call) -> int | None:
        """Fail although it was done, if it was."""
        return self._strikes(call, done=True) if call.result == 0 else None


async def _point(fault: Fault, operation: Operation, born: Path, folder: Path, at: int, mode: str) -> list[Any]:
    before, path, wrong = threads(), folder / "agent.db", list[str]()
    fault.forget()
    async with staged(operation, born, folder) as stage:
        fault.look = lambda: looked(operation, path)
        fault.at, fault.mode, fault.seen, fault.is_armed = at, mode, 0, True
        fault.chance = random.Random(at)
        result, error = await answered(operation, stage)
        fault.is_armed = False
        effect = await settled(operation, stage, error)
        wrong += judge(operation, fault, result, error, effect)
        wrong += await still_works(operation, stage, error)
        wrong += await lets_go((), path)
    wrong += closed(path, before)
    wrong += [str(broken) for broken in check(path)]
    wrong += await recovers(path)
    answer = "success" if error is None else type(error).__name__
    hit = fault.hits[0] if fault.hits else ""
    in_doubt = isinstance(error, CommitInDoubt)
    return [operation.name, at, mode, hit, answer, word(operation, effect), in_doubt, wrong]


async def recovers(path: Path) -> list[str]:
    """Hold that a new store opens the file, works, and leaves it sound."""
    store = TaskStore(path, runtime=RUNTIME)
    try:
        async with asyncio.timeout(20), store:
            session = await store.session("after")
            await session.spawn(asyncio.sleep(0), id="after")
            report = await store.check()
        bad = [str(one) for one in report.findings if one.severity not in {"info", "warning"}]
        wrong = [f"not sound: {bad}"] if bad else []
    except Exception as error:
        wrong = [f"does not open again: {error!r}"]
    return [*wrong, *(str(broken) for broken in check(path))]


async def sweep(report: Report, folder: str, plan: str) -> None:
    """
    Run points in this process, and report each; *plan* is JSON: names, modes, a seed, a new file, and seconds if it is a sample.

    A line is cut to what a pipe takes whole.
    """
    wanted = json.loads(plan)
    logging.getLogger("lash_store").setLevel(logging.CRITICAL)
    fault = Fault()
    vfs.install(fault, frozenset(ERRORS))
    base = Path(folder)
    born = Path(wanted["born"])
    operations = [one for one in OPERATIONS if one.name in wanted["names"]]
    chance = random.Random(wanted["seed"])
    until = None if wanted["seconds"] is None else time.monotonic() + wanted["seconds"]

    async def one(operation: Operation, at: int, mode: str) -> bool:
        here = base / "point"
        here.mkdir()
        try:
            found = await _point(fault, operation, born, here, at, mode)
        except BaseException as error:
            found = [operation.name, at, mode, fault.hits[:1], "?", "?", False, [f"the harness: {error!r}"]]
        finally:
            shutil.rmtree(here)
        if found[3]:
            report(
                "point",
                *json.loads(json.dumps(found)[:3000])
                if len(json.dumps(found)) < 3000
                else [*found[:7], [str(found[7])[:2000]]],
            )
        return bool(found[3])

    if until is None:
        for operation in operations:
            for mode in wanted["modes"]:
                at = 1
                while await one(operation, at, mode):
                    at += 1
    else:
        counts: dict[str, int] = {}
        is_met = False
        # on a busy machine, for as long as it takes to see what it is for
        while time.monotonic() < until or not is_met:
            operation = chance.choice(operations)
            if operation.name not in counts:
                await one(operation, 1 << 30, "once")
                counts[operation.name] = fault.seen
            at = chance.randint(1, max(1, counts[operation.name]))
            is_met |= await one(operation, at, chance.choice(wanted["modes"]))
    report("over")


async def kill_at(report: Report, folder: str, name: str, at: int) -> None:
    """Run one operation, and be killed at one of its calls; say before that it is asked for, and after that it was answered."""
    logging.getLogger("lash_store").setLevel(logging.CRITICAL)
    fault = Fault()
    vfs.install(fault, frozenset(ERRORS))
    base = Path(folder)
    [operation] = [one for one in OPERATIONS if one.name == name]
    async with staged(operation, base / "newborn.db", base) as stage:
        fault.at, fault.mode, fault.is_armed = at, "kill", True
        report("asked")
        _, error = await answered(operation, stage)
        fault.is_armed = False
        report("answered", None if error is None else repr(error)[:500])
        os.kill(os.getpid(), signal.SIGKILL)


async def judge_killed(operation: Operation, folder: Path, is_answered: bool) -> list[str]:
    """Hold what must be true of a file whose process was killed: what was answered is there, anything is whole or absent."""
    path = folder / "agent.db"
    wrong = [str(broken) for broken in check(path)]
    if operation.ask is not None:
        effect = ask(operation, path)
        if effect not in (operation.absent, operation.whole, *operation.parts):
            wrong.append(f"torn: {effect!r}")
        elif is_answered and effect != operation.whole and operation.lax is None:
            wrong.append(f"acknowledged and lost: {effect!r}")
    with closing(sqlite3.connect(path)) as connection:
        if connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]:
            wrong.append("not whole")
    return wrong + await recovers(path)
