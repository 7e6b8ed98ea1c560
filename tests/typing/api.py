"""Uses the whole public interface; must pass ``mypy --strict``. It is read by the type checker and never run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

from pydantic import BaseModel, JsonValue

from lash_store import (
    ArmOn,
    Backoff,
    BackupReport,
    CancelPolicy,
    CancelReport,
    CheckReport,
    ClosePolicy,
    CloseReport,
    CommitInDoubt,
    DuplicateFunction,
    EventType,
    Evidence,
    Failure,
    Finding,
    FunctionError,
    HandleNotVisible,
    HandleRole,
    Handoff,
    IdempotencyConflict,
    Inbox,
    InboxBusy,
    InvalidArguments,
    InvalidId,
    LimitExceeded,
    Limits,
    MonitorRecord,
    MonitorSpec,
    MonitorUpdate,
    NotAStore,
    Note,
    OwnerEnd,
    ProcessEvidence,
    ProcessFate,
    ProcessIdentity,
    PruneReport,
    Recovery,
    RecoveryReport,
    RestoreReport,
    ResultNotSerializable,
    Retention,
    SchemaChange,
    SchemaError,
    SchemaTooNew,
    SchemaTooOld,
    Scope,
    SessionClosed,
    SessionError,
    SessionRecord,
    SessionTasks,
    Severity,
    StaleAttempt,
    StepFailed,
    StepInDoubt,
    StepKind,
    StepRecord,
    StepState,
    StopReason,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreClosed,
    StoreCopied,
    StoreError,
    StoreReadOnly,
    Stream,
    Subscription,
    TaskAbandoned,
    TaskCancelled,
    TaskContext,
    TaskError,
    TaskEvent,
    TaskExists,
    TaskFailed,
    TaskFilter,
    TaskHandle,
    TaskKind,
    TaskMode,
    TaskNotFound,
    TaskPruned,
    TaskRecord,
    TaskState,
    TaskStore,
    TransactConnection,
    TransferConflict,
    Transition,
    UnknownFunction,
    UnknownSession,
    Updates,
    Verdict,
    WakePolicy,
)

store = TaskStore(
    "agent.db",
    runtime="desktop",
    durability="normal",
    max_running=8,
    cancel_grace=1.0,
    lock_timeout=5.0,
    callback_timeout=2.0,
    limits=Limits(payload_bytes=1_000, live_tasks=10, total_tasks=None),
)
reader = TaskStore.open_readonly(Path("agent.db"))
viewer = TaskStore.open_readonly("agent.db", runtime="desktop")
requests = TaskStore.connect("agent.db", runtime="desktop", lock_timeout=1.0)


@store.task(recovery=Recovery.RERUN, max_attempts=3)
async def index_repo(task: TaskContext, path: str, *, depth: int = 1) -> dict[str, int]:
    """A body."""
    assert_type(task.id, str)
    assert_type(task.scope, Scope)
    assert_type(task.attempt, int)
    assert_type(task.record, TaskRecord)
    assert_type(task.checkpoint, JsonValue)
    assert_type(task.cancel_requested, bool)
    assert_type(task.stop_reason, StopReason | None)
    await task.save({"at": path, "depth": depth})
    await task.progress("half", 0.5)
    await task.progress("more")
    await task.notify("found three", {"files": 3})
    await task.notify("found three", key="three")
    await task.cancelled()
    return {"files": 3}


@store.task(recovery="owner_bound", name="other-name")
async def send_mail(task: TaskContext) -> None:
    """A body that may not be run again."""


class Place(BaseModel):
    """A checkpoint with a type."""

    page: int = 0


async def fetch(url: str, *, depth: int = 1) -> bytes:
    """A step."""
    return b""


def count(text: str) -> int:
    """A step that runs in a thread."""
    return len(text)


def book(db: TransactConnection, order: str, *, cents: int) -> float:
    """A step in the file itself."""
    rows = db.execute("SELECT sum(cents) FROM bookings WHERE name = :name", {"name": order})
    assert_type(rows.fetchall(), list[tuple[Any, ...]])
    db.executemany("INSERT INTO bookings VALUES (?)", [(cents,)])
    db.executescript("CREATE TABLE IF NOT EXISTS bookings (cents INTEGER);")
    return 1.0


@store.task(
    recovery=Recovery.RERUN,
    retry_on=(ConnectionError, TimeoutError),
    no_retry_on=BrokenPipeError,
    backoff=Backoff(initial=0.5, factor=2.0, maximum=60.0, jitter=0.5),
    timeout=60.0,
    version="2",
    accepts={"1", None},
)
async def crawl(task: TaskContext[Place], url: str) -> int:
    """A body that remembers."""
    assert_type(task.checkpoint, Place | None)
    await task.save(Place(page=1))
    assert_type(await task.step("fetch", fetch, url, depth=2, retry_on=OSError, max_attempts=3, timeout=5), bytes)
    assert_type(await task.step("count", count, url, backoff=Backoff(), no_retry_on=(ValueError,)), int)
    assert_type(await task.step("once", count, url, at_most_once=True), int)
    assert_type(await task.transact("book", book, url, cents=3), float)
    task.at_completion(lambda db: db.execute("DELETE FROM bookings"))
    await task.sleep(0.5)
    await task.sleep(3600, name="night")
    assert_type(await task.signal("answer"), JsonValue)
    assert_type(await task.signal("answer", timeout=1.0), JsonValue)
    async with task.waiting("approval"):
        pass
    child = await task.spawn(crawl, url, id="child", kind=TaskKind.SUBAGENT, timeout=5.0, deadline=60.0)
    assert_type(child, TaskHandle)
    try:
        assert_type(await child.signal("answer", {"yes": True}, key="k"), Transition)
    except (StepFailed, StepInDoubt) as error:
        assert_type(error.task_id, str)
    steps = await child.steps()
    assert_type(steps, Sequence[StepRecord])
    assert_type((steps[0].kind, steps[0].state, steps[0].wake_at), tuple[StepKind, StepState, datetime | None])
    return 1


async def bare() -> list[int]:
    """A coroutine without a context."""
    return [1]


async def main() -> None:
    """Everything a program does with a store."""
    # the decorator leaves a function as it was
    assert_type((await index_repo(_context(), "x", depth=2))["files"], int)
    async with store as opened:
        assert_type(opened, TaskStore)
        session = await opened.session("s1")
        assert_type(session, SessionTasks)
        assert_type(session.scope, Scope)
        handle = await session.spawn(
            index_repo,
            "/src",
            id="index",
            kind=TaskKind.OBSERVER,
            cancel_policy=CancelPolicy.COOPERATIVE,
            depth=3,
        )
        assert_type(handle, TaskHandle)
        await session.spawn(bare())
        await use_handle(handle)
        await use_session(opened, session, handle)
        assert_type(await session.get("index"), TaskRecord)
        assert_type(await session.handle("index"), TaskHandle)
        assert_type(await session.cancel("index", "enough", timeout=1.0), TaskRecord)
        found = await session.list(
            kinds=[TaskKind.OTHER], states=[TaskState.RUNNING], include_terminal=True, include_hidden=True, limit=5
        )
        assert_type(found, Sequence[TaskRecord])
        assert_type(session.events(0, types=[EventType.COMPLETED]), Subscription)

        assert_type(await opened.sessions(), Sequence[SessionRecord])
        wanted = TaskFilter(runtime="desktop", scope=session.scope, states=frozenset({TaskState.FAILED}), limit=10)
        assert_type(await opened.list(wanted), Sequence[TaskRecord])
        assert_type(await opened.count(), int)
        assert_type(await opened.get(Scope("desktop", "s1"), "index"), TaskRecord)
        assert_type(await opened.handle("desktop:s1", "index"), TaskHandle)
        assert_type(await opened.recover(), RecoveryReport)
        assert_type(await opened.abandon_owner(2, "it hangs"), RecoveryReport)
        assert_type(opened.upgraded, SchemaChange | None)
        async for event in opened.events(after=None, scope="desktop:s1", types=[EventType.FAILED]):
            use_event(event)
    await store.open()
    await store.close(timeout=1.0)
    assert_type(await store, TaskStore)
    async with reader, viewer, requests:
        await requests.handle("desktop:s1", "index")
        assert_type(await viewer.session("s1"), SessionTasks)


async def use_session(opened: TaskStore, session: SessionTasks, handle: TaskHandle) -> None:
    """Everything that work of all modes, families, handing over and the inbox give."""
    for above in (session, session.scope, "s1"):
        assert_type(await opened.session("s2", parent=above, reopen=True), SessionTasks)
    other = await opened.session("s2")
    child = await session.spawn(
        index_repo,
        "/src",
        parent=handle,
        child_session_id="s3",
        close_policy=ClosePolicy.TRANSFER,
        idempotency_key="once",
        notify_on_end=True,
    )
    assert_type(await session.spawn_hidden("indexing", bare()), TaskHandle)
    assert_type(await session.spawn_hidden("indexing", index_repo, "/src", depth=2), TaskHandle)
    await session.await_hidden()
    assert_type((await session.sync_needed(), await session.await_background_work()), tuple[bool, bool])

    # work of somebody else
    for callback in (None, call_plainly, call_with_record, call_and_wait):
        assert_type(await session.register("browser", TaskKind.MONITOR, callback, label="the browser"), TaskHandle)
    await session.register(
        "terminal",
        TaskKind.OTHER,
        cancel=call_and_wait,
        parent=child.to_json(),
        close_policy=ClosePolicy.CANCEL,
        idempotency_key="terminal 1",
    )
    assert_type(await session.set_live_state("browser", TaskState.WAITING), Transition)
    assert_type(await session.update("browser", progress="loading", fraction=0.5), Transition)
    assert_type(await session.complete("browser", TaskState.COMPLETED, result={"pages": 3}), Transition)
    await session.complete("terminal", TaskState.FAILED, failure=Failure(type="Exit", message="1"))
    await session.complete("terminal", TaskState.FAILED, failure=RuntimeError("gone"))
    transition = await session.complete("terminal", TaskState.FAILED, failure="gone")
    assert_type((transition.record, transition.verdict), tuple[TaskRecord, Verdict])
    await session.unregister("terminal")

    # every form of a reference
    for name in (handle, handle.handle_id, handle.to_json(), "index"):
        assert_type(await session.get(name), TaskRecord)
        assert_type(await session.handle(name), TaskHandle)
        assert_type(await session.cancel(name), TaskRecord)
        assert_type(await session.abandon(name, "lost"), TaskRecord)
        assert_type(await session.validate_handles([name, handle]), Sequence[TaskRecord])
        assert_type(await session.cancel_unreferenced([name, "index"]), Sequence[TaskRecord])
    for to in (other, other.scope, "s2"):
        assert_type(await session.transfer(to, (handle, "index")), Sequence[TaskRecord])
        assert_type(await session.handoff(to, {handle.handle_id}, id="plan 1"), Handoff)
    assert_type(await other.observe(session, "index"), TaskHandle)
    assert_type(await other.observe("desktop:s1", "index"), TaskHandle)
    for report in await session.cancel_all("enough", timeout=1.0):
        assert_type(report, CancelReport)
        assert_type((report.record, report.error), tuple[TaskRecord, Failure | None])

    # notes, and the end
    assert_type(session.inbox(limit=5), Inbox)
    async with session.inbox() as notes:
        assert_type(notes, list[Note])
    assert_type(await session.notes(unread=False), Sequence[Note])
    assert_type(await session.close(), CloseReport)
    assert_type(await session.close(successor=other, timeout=1.0), CloseReport)


def call_plainly() -> None:
    """A cancel callback that runs in a thread."""


def call_with_record(record: TaskRecord) -> None:
    """A cancel callback that wants to know of what."""


async def call_and_wait(record: TaskRecord) -> None:
    """A cancel callback that runs on the loop."""


async def use_handle(handle: TaskHandle) -> None:
    """Everything a handle gives."""
    assert_type(await handle, JsonValue)
    assert_type(await handle.result(timeout=1.0), JsonValue)
    assert_type(await handle.wait(), TaskRecord)
    assert_type(await handle.record(), TaskRecord)
    assert_type(await handle.cancel("why", timeout=None), TaskRecord)
    assert_type((handle.id, handle.task_seq, handle.handle_id, handle.scope), tuple[str, int, str, Scope])
    assert_type((handle.role, handle.to_json()), tuple[HandleRole, dict[str, str]])
    assert_type(await TaskHandle.from_json(await store.session("s1"), handle.to_json()), TaskHandle)
    async for event in handle.events():
        use_event(event)
    try:
        await handle
    except TaskFailed as error:
        assert_type(error.failure, Failure)
        assert_type((error.failure.type, error.failure.traceback), tuple[str, str | None])
    except TaskCancelled as error:
        assert_type(error.reason, str | None)
    except TaskAbandoned as error:
        assert_type(error.evidence, Evidence)
        assert_type((error.evidence.owner_id, error.evidence.found_at), tuple[int | None, datetime])
    except (TimeoutError, StoreClosed):
        pass
    except (TaskNotFound, TaskExists, StaleAttempt) as error:
        assert_type(error.task_id, str)


def use_event(event: TaskEvent) -> None:
    """Everything an event tells."""
    assert_type((event.seq, event.task_seq, event.attempt), tuple[int, int | None, int | None])
    assert_type((event.scope, event.from_scope), tuple[Scope, Scope | None])
    assert_type((event.task_id, event.type, event.at), tuple[str | None, EventType, datetime])
    assert_type(event.data, dict[str, Any])


def use_record(record: TaskRecord) -> None:
    """Everything a row tells."""
    assert_type((record.kind, record.mode, record.state), tuple[TaskKind, TaskMode, TaskState])
    assert_type((record.recovery, record.cancel_policy), tuple[Recovery, CancelPolicy])
    assert_type((record.failure, record.evidence), tuple[Failure | None, Evidence | None])
    assert_type((record.result, record.arguments), tuple[JsonValue, JsonValue])
    assert_type((record.progress, record.fraction), tuple[str | None, float | None])
    assert_type((record.created_at, record.completed_at), tuple[datetime, datetime | None])
    assert_type((record.is_terminal, record.state.is_terminal), tuple[bool, bool])
    assert_type((record.parent_seq, record.child_session_id), tuple[int | None, str | None])
    assert_type((record.close_policy, record.idempotency_key), tuple[ClosePolicy, str | None])
    assert_type((record.notify_on_end, record.has_callback), tuple[bool, bool])
    assert_type((record.callback_begun_at, record.callback_error), tuple[datetime | None, Failure | None])


def use_report(report: RecoveryReport) -> None:
    """Everything a recovery tells."""
    assert_type((report.dead_owners, report.unreachable), tuple[tuple[int, ...], tuple[int, ...]])
    assert_type(report.reattached, tuple[TaskRecord, ...])
    assert_type(report.unknown_functions, tuple[str, ...])


async def use_the_file(store: TaskStore) -> None:
    """What keeps a file small, copies it, and looks whether it is sound."""
    pruned = await store.prune(
        older_than=timedelta(days=30),
        keep_last=100,
        states=[TaskState.COMPLETED, "cancelled"],
        sessions=["desktop:s1", Scope("desktop", "s2")],
        before_cursor=7,
        unread=True,
        dry_run=True,
        progress=lambda done: print(done.task_seq, done.newest_seq),
    )
    assert_type(pruned, PruneReport)
    assert_type((pruned.tasks, pruned.events, pruned.seen, pruned.unread), tuple[int, int, int, int])
    assert_type((pruned.needed, pruned.freed), tuple[int, int])
    backup = await store.backup("copy.db", progress=lambda done, pages: print(done, pages))
    assert_type(backup, BackupReport)
    assert_type((backup.path, backup.revision, backup.bytes), tuple[Path, str, int])
    assert_type((backup.tasks, backup.events), tuple[int, int])
    restored = await TaskStore.restore("copy.db", "agent.db")
    assert_type(restored, RestoreReport)
    assert_type((restored.path, restored.backup, restored.kept), tuple[Path, Path, Path | None])
    assert_type((restored.revision, restored.tasks), tuple[str, int])
    checked = await store.check(repair=True, progress=lambda done, tasks: print(done, tasks))
    assert_type(checked, CheckReport)
    assert_type((checked.path, checked.revision, checked.is_sound), tuple[Path, str | None, bool])
    assert_type((checked.tasks, checked.events, checked.findings), tuple[int, int, tuple[Finding, ...]])
    for finding in checked.findings:
        assert_type((finding.code, finding.severity, finding.next_step), tuple[str, Severity, str])
        assert_type((finding.message, finding.can_repair, finding.is_repaired), tuple[str, bool, bool])
    TaskStore("copy.db", runtime="desktop", adopt=True, retention=Retention(older_than=timedelta(days=30), every=60.0))


def use_schema_change(change: SchemaChange) -> TaskStore:
    """Everything an upgrade tells, and how it is not wanted."""
    assert_type((change.from_revision, change.to_revision), tuple[str | None, str | None])
    assert_type((change.backup, change.seconds), tuple[Path | None, float])
    return TaskStore("agent.db", runtime="desktop", upgrade="refuse", upgrade_backup=False)


def use_session_record(record: SessionRecord) -> None:
    """Everything a session's row tells."""
    assert_type((record.scope, record.parent), tuple[Scope, Scope | None])
    assert_type((record.opened_at, record.closed_at), tuple[datetime, datetime | None])
    assert_type((record.live_tasks, record.sync_needed, record.unread_notes), tuple[int, bool, int])


def use_handoff(handoff: Handoff) -> None:
    """Everything a handoff tells."""
    assert_type((handoff.id, handoff.source, handoff.destination), tuple[str, Scope, Scope])
    assert_type((handoff.moved, handoff.cancelled), tuple[tuple[TaskRecord, ...], tuple[TaskRecord, ...]])
    assert_type(handoff.at, datetime)


def use_close(report: CloseReport) -> None:
    """Everything the close of a session tells."""
    assert_type((report.scope, report.closed_at, report.successor), tuple[Scope, datetime, Scope | None])
    assert_type(report.kept, tuple[TaskRecord, ...])
    assert_type((report.cancelled, report.transferred), tuple[tuple[TaskRecord, ...], tuple[TaskRecord, ...]])


def use_note(note: Note) -> None:
    """Everything a note tells."""
    assert_type((note.note_seq, note.scope, note.key), tuple[int, Scope, str])
    assert_type((note.task_seq, note.task_id), tuple[int | None, str | None])
    assert_type((note.text, note.data), tuple[str, JsonValue])
    assert_type((note.posted_at, note.acknowledged_at), tuple[datetime, datetime | None])


def use_words() -> None:
    """The words that are not met elsewhere."""
    assert_type((Verdict.APPLIED.value, OwnerEnd.DIED.value, HandleRole.OBSERVER.value), tuple[str, str, str])


async def use_monitors(session: SessionTasks) -> None:
    """Everything a session does with monitors."""
    spec = MonitorSpec(
        id="tests",
        command=("pytest", "-x"),
        label="the tests",
        cwd="project",
        env={"CI": "1"},
        inherit_env=("TOKEN",),
        timeout=600.0,
        persistent=False,
        arm_on=ArmOn.SESSION_START,
        wake_policy=WakePolicy.NOTIFY,
        restart_on_restore=True,
        keep_lines=100,
    )
    assert_type(MonitorSpec(id="log", command="tail -f log | grep error", shell=True).arguments, tuple[str, ...])
    assert_type(await session.start_monitor(spec), TaskHandle)
    for monitor in await session.monitors():
        assert_type(monitor, MonitorRecord)
        assert_type(monitor.spec, MonitorSpec)
        assert_type(monitor.state, TaskState)
        assert_type(monitor.task, TaskRecord)
        assert_type((monitor.exit_status, monitor.throttled_at), tuple[int | None, datetime | None])
        assert_type((monitor.lines, monitor.bytes, monitor.dropped, monitor.unread), tuple[int, int, int, int])
        if monitor.task.process is not None:
            assert_type(monitor.task.process, ProcessIdentity)
        if monitor.task.evidence is not None and monitor.task.evidence.process is not None:
            assert_type(monitor.task.evidence.process, ProcessEvidence)
            assert_type(monitor.task.evidence.process.became, ProcessFate)
    assert_type(session.take_updates(10, monitor="tests"), Updates)
    async with session.take_updates() as updates:
        assert_type(updates, list[MonitorUpdate])
        assert_type((updates[0].stream, updates[0].text), tuple[Stream, str])
    assert_type(await session.take_updates(), list[MonitorUpdate])
    assert_type(await session.updates(monitor="tests", unread=False, limit=5), Sequence[MonitorUpdate])
    assert_type(await session.stop_monitor("tests", "seen enough", timeout=5.0), TaskRecord)
    assert_type(Limits(monitors=4, line_bytes=100, lines_per_second=10.0, update_bytes=None), Limits)


async def use_errors(session: SessionTasks) -> None:
    """What errors of handing over name."""
    try:
        await session.handoff("s2", ["index"])
    except HandleNotVisible as error:
        assert_type(error.missing, tuple[str, ...])
    except IdempotencyConflict as error:
        assert_type(error.task_id, str)
    except (SessionClosed, UnknownSession, TransferConflict, InboxBusy) as error:
        assert_type(str(error), str)


def tree() -> list[type[StoreError]]:
    """The errors, each where it belongs."""
    tasks: list[type[TaskError]] = [
        TaskNotFound,
        TaskExists,
        TaskPruned,
        StaleAttempt,
        IdempotencyConflict,
        TaskFailed,
        TaskCancelled,
        TaskAbandoned,
    ]
    functions: list[type[FunctionError]] = [
        UnknownFunction,
        DuplicateFunction,
        InvalidArguments,
        ResultNotSerializable,
    ]
    sessions: list[type[SessionError]] = [UnknownSession, SessionClosed, HandleNotVisible, TransferConflict, InboxBusy]
    schema: list[type[SchemaError]] = [SchemaTooOld, SchemaTooNew]
    storage: list[type[StorageError]] = [
        StorageBusy,
        StorageFull,
        StorageCorrupt,
        StorageMoved,
        StoreCopied,
        NotAStore,
        CommitInDoubt,
    ]
    lookups: list[type[LookupError]] = [TaskNotFound, UnknownSession, UnknownFunction]
    values: list[type[ValueError]] = [InvalidId]
    assert lookups
    assert values
    return [*tasks, *functions, *sessions, *schema, *storage, StoreReadOnly, StoreClosed, InvalidId, LimitExceeded]


def _context() -> TaskContext:
    raise NotImplementedError


if __name__ == "__main__":
    asyncio.run(main())
