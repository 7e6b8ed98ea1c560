"""Uses the whole public interface; must pass ``mypy --strict``. It is read by the type checker and never run."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, assert_type

from pydantic import JsonValue

from lash_store import (
    CancelPolicy,
    CommitInDoubt,
    DuplicateFunction,
    EventType,
    Evidence,
    Failure,
    FunctionError,
    InvalidArguments,
    InvalidId,
    NotAStore,
    Recovery,
    RecoveryReport,
    ResultNotSerializable,
    SchemaError,
    SchemaTooNew,
    SchemaTooOld,
    Scope,
    SessionError,
    SessionRecord,
    SessionTasks,
    StaleAttempt,
    StopReason,
    StorageBusy,
    StorageCorrupt,
    StorageError,
    StorageFull,
    StorageMoved,
    StoreClosed,
    StoreError,
    StoreReadOnly,
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
    TaskRecord,
    TaskState,
    TaskStore,
    UnknownFunction,
    UnknownSession,
)

store = TaskStore("agent.db", runtime="desktop", durability="normal", max_running=8, cancel_grace=1.0, lock_timeout=5.0)
reader = TaskStore.open_readonly(Path("agent.db"))
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
    await task.cancelled()
    return {"files": 3}


@store.task(recovery="owner_bound", name="other-name")
async def send_mail(task: TaskContext) -> None:
    """A body that may not be run again."""


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
        async for event in opened.events(after=None, scope="desktop:s1", types=[EventType.FAILED]):
            use_event(event)
    await store.open()
    await store.close(timeout=1.0)
    assert_type(await store, TaskStore)
    async with reader, requests:
        await requests.handle("desktop:s1", "index")


async def use_handle(handle: TaskHandle) -> None:
    """Everything a handle gives."""
    assert_type(await handle, JsonValue)
    assert_type(await handle.result(timeout=1.0), JsonValue)
    assert_type(await handle.wait(), TaskRecord)
    assert_type(await handle.record(), TaskRecord)
    assert_type(await handle.cancel("why", timeout=None), TaskRecord)
    assert_type((handle.id, handle.task_seq, handle.handle_id, handle.scope), tuple[str, int, str, Scope])
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


def use_report(report: RecoveryReport) -> None:
    """Everything a recovery tells."""
    assert_type((report.dead_owners, report.unreachable), tuple[tuple[int, ...], tuple[int, ...]])
    assert_type(report.reattached, tuple[TaskRecord, ...])
    assert_type(report.unknown_functions, tuple[str, ...])


def tree() -> list[type[StoreError]]:
    """The errors, each where it belongs."""
    tasks: list[type[TaskError]] = [
        TaskNotFound,
        TaskExists,
        StaleAttempt,
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
    sessions: list[type[SessionError]] = [UnknownSession]
    schema: list[type[SchemaError]] = [SchemaTooOld, SchemaTooNew]
    storage: list[type[StorageError]] = [
        StorageBusy,
        StorageFull,
        StorageCorrupt,
        StorageMoved,
        NotAStore,
        CommitInDoubt,
    ]
    lookups: list[type[LookupError]] = [TaskNotFound, UnknownSession, UnknownFunction]
    values: list[type[ValueError]] = [InvalidId]
    assert lookups
    assert values
    return [*tasks, *functions, *sessions, *schema, *storage, StoreReadOnly, StoreClosed, InvalidId]


def _context() -> TaskContext:
    raise NotImplementedError


if __name__ == "__main__":
    asyncio.run(main())
