"""A small file in which everything has happened once, and the log of it; the checker's own tests break one thing at a time."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable
from contextlib import closing
from pathlib import Path
from typing import Any

from lash_store import Recovery, TaskContext, TaskRecord, TaskStore
from tests.checker import Entry, outcome


def told(record: TaskRecord) -> dict[str, Any]:
    """Return what an answer says of a task."""
    said: dict[str, Any] = {"task_seq": record.task_seq, "state": str(record.state), "attempt": record.attempt}
    if record.completed_at is not None:
        at = f"{record.completed_at:%Y-%m-%dT%H:%M:%S}.{record.completed_at.microsecond // 1000:03d}Z"
        failure = None if record.failure is None else record.failure.message
        said["digest"] = outcome(str(record.state), record.result, failure, at)
    return said


async def live_through(path: Path) -> list[Entry]:
    """Make the file, and return the log."""
    log: list[Entry] = []

    async def do(op: str, args: dict[str, Any], call: Awaitable[Any], result: Any = None) -> Any:
        number = len(log)
        log.append(["S", "p1", number, op, args])
        got = await call
        log.append(["A", "p1", number, result(got) if callable(result) else (result or {})])
        return got

    store = TaskStore(path, runtime="desktop", cancel_grace=0.0)

    @store.task(recovery=Recovery.RERUN)
    async def work(task: TaskContext) -> dict[str, int]:
        seq = task.record.task_seq
        log.append(["B", "p1", seq, task.attempt])
        at = {"task_seq": seq}
        await do("save", {**at, "n": 1}, task.save({"attempt": task.attempt, "n": 1}), at)
        await do("step", {**at, "name": "look"}, task.step("look", lambda: {"attempt": 1}), at)
        await do("transact", {**at, "name": "book"}, task.transact("book", _book, seq), at)
        await do("progress", {**at, "text": "attempt 1 half"}, task.progress("attempt 1 half"), at)
        await do("notify", {**at, "key": "k"}, task.notify("hello", key="k"), at)
        log.append(["X", "p1", seq, task.attempt, "returned, None"])
        return {"attempt": task.attempt}

    @store.task(recovery=Recovery.RERUN)
    async def wait(task: TaskContext) -> None:
        log.append(["B", "p1", task.record.task_seq, task.attempt])
        begun.set()
        try:
            await task.signal("go")
        finally:
            log.append(["X", "p1", task.record.task_seq, task.attempt, "CancelledError, cancel"])

    begun = asyncio.Event()
    async with store:
        log.append(["O", "p1", 1])
        sessions = {}
        for name in ("s1", "s2", "s3"):
            scope = f"desktop:{name}"
            sessions[name] = await do("session", {"scope": scope}, store.session(name))
        s1, s2, s3 = sessions.values()
        with closing(sqlite3.connect(path)) as shell:
            shell.execute("CREATE TABLE campaign_effects (task_seq INTEGER, name TEXT)")
            shell.commit()

        def held(handle: Any) -> dict[str, Any]:
            return {"task_seq": handle.task_seq, "handle": handle.to_json()["id"]}

        def asked(id: str, scope: str = "desktop:s1") -> dict[str, Any]:
            return {"scope": scope, "id": id, "key": f"key {id}"}

        async def spawn(id: str, fn: Any) -> Any:
            call = s1.spawn(fn, id=id, idempotency_key=f"key {id}", notify_on_end=True)
            return await do("spawn", asked(id), call, held)

        gone = await spawn("gone", work)
        await do("wait", asked("gone"), gone.wait(), told)
        await do("prune", {}, store.prune(keep_last=0, unread=True), lambda report: {"pruned": report.tasks})
        done = await spawn("done", work)
        await do("wait", asked("done"), done.wait(), told)
        await do("result", asked("done"), done.result(), lambda _: {"task_seq": done.task_seq})
        await do("observe", {"scope": "desktop:s2"}, s2.observe(s1, "done"), held)

        external = await do("register", asked("out"), s1.register("out", "other", idempotency_key="key out"), held)
        move = {"scope": "desktop:s1", "to": "desktop:s2", "seqs": [external.task_seq], "only": True}
        await do("transfer", move, s1.transfer(s2, ["out"]), lambda moved: {"moved": [one.task_seq for one in moved]})
        back = {"scope": "desktop:s2", "to": "desktop:s1"}
        await do(
            "handoff",
            back,
            s2.handoff(s1, ["out"]),
            lambda done: {"handoff_id": done.id, "moved": [one.task_seq for one in done.moved]},
        )
        await do(
            "update",
            {"text": "by hand"},
            s1.update("out", progress="by hand"),
            lambda d: {**told(d.record), "verdict": d.verdict},
        )
        await do("complete", asked("out"), s1.complete("out", "completed", result=1), lambda d: told(d.record))

        stopped = await spawn("stopped", wait)
        await begun.wait()
        go = {"task_seq": stopped.task_seq, "key": "g"}
        await do(
            "signal",
            go,
            stopped.signal("no", 1, key="g"),
            lambda d: {"task_seq": stopped.task_seq, "verdict": d.verdict},
        )
        await do("cancel", asked("stopped"), s1.cancel("stopped"), told)

        begun.clear()
        await spawn("waiting", wait)
        await begun.wait()
        begun.clear()
        await spawn("given", wait)
        await do(
            "abandon",
            asked("given"),
            s1.abandon("given", "it is stuck"),
            told,
        )
        await do(
            "cancel_all",
            {"scope": "desktop:s3"},
            s3.cancel_all(),
            lambda found: {"tasks": [told(one.record) for one in found]},
        )
        hidden = {"scope": "desktop:s1", "label": "quiet"}
        await do("hidden", hidden, s1.spawn_hidden("quiet", asyncio.sleep(0)), lambda h: {"task_seq": h.task_seq})
        await s1.await_hidden()

        async def read() -> list[int]:
            async with s1.inbox() as notes:
                return [note.note_seq for note in notes]

        await do("inbox", {"scope": "desktop:s1"}, read(), lambda numbers: {"notes": numbers})
        await s3.register("kept", "other", close_policy="transfer")
        log.insert(0, ["S", "p0", 0, "spawn", {"id": "kept"}])
        await do("close", {"scope": "desktop:s3"}, s3.close(successor=s2))
        async for event in store.events(after=0):
            log.append(["F", "p1", 0, event.seq, event.task_seq, str(event.type)])
            if event.type == "session_closed":
                break
        await do("list", {}, store.list(), lambda found: {"tasks": [told(one) for one in found]})
        log.append(["Q", "p1"])
        # as a kill leaves it: with work in it, and an owner
        with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(f"{path}.copy")) as copy:
            live.backup(copy)
    return log


def _book(db: Any, task_seq: int) -> None:
    db.execute("INSERT INTO campaign_effects VALUES (?, 'book')", [task_seq])
