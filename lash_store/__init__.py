"""A durable task manager for asyncio agent sessions, in one SQLite file. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .context import TaskContext
    from .errors import (
        CommitInDoubt,
        DuplicateFunction,
        FunctionError,
        InvalidArguments,
        InvalidId,
        NotAStore,
        ResultNotSerializable,
        SchemaError,
        SchemaTooNew,
        SchemaTooOld,
        SessionError,
        StaleAttempt,
        StorageBusy,
        StorageCorrupt,
        StorageError,
        StorageFull,
        StorageMoved,
        StoreClosed,
        StoreError,
        StoreReadOnly,
        TaskAbandoned,
        TaskCancelled,
        TaskError,
        TaskExists,
        TaskFailed,
        TaskNotFound,
        UnknownFunction,
        UnknownSession,
    )
    from .feed import Subscription
    from .models import (
        CancelPolicy,
        EventType,
        Evidence,
        Failure,
        Recovery,
        RecoveryReport,
        Scope,
        SessionRecord,
        StopReason,
        TaskEvent,
        TaskFilter,
        TaskKind,
        TaskMode,
        TaskRecord,
        TaskState,
    )
    from .sessions import SessionTasks, TaskHandle
    from .store import TaskStore

__all__ = [
    "CancelPolicy",
    "CommitInDoubt",
    "DuplicateFunction",
    "EventType",
    "Evidence",
    "Failure",
    "FunctionError",
    "InvalidArguments",
    "InvalidId",
    "NotAStore",
    "Recovery",
    "RecoveryReport",
    "ResultNotSerializable",
    "SchemaError",
    "SchemaTooNew",
    "SchemaTooOld",
    "Scope",
    "SessionError",
    "SessionRecord",
    "SessionTasks",
    "StaleAttempt",
    "StopReason",
    "StorageBusy",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "StorageMoved",
    "StoreClosed",
    "StoreError",
    "StoreReadOnly",
    "Subscription",
    "TaskAbandoned",
    "TaskCancelled",
    "TaskContext",
    "TaskError",
    "TaskEvent",
    "TaskExists",
    "TaskFailed",
    "TaskFilter",
    "TaskHandle",
    "TaskKind",
    "TaskMode",
    "TaskNotFound",
    "TaskRecord",
    "TaskState",
    "TaskStore",
    "UnknownFunction",
    "UnknownSession",
]

_HOMES = ("errors", "models", "store", "sessions", "context", "feed")


def __getattr__(name: str) -> Any:
    # so that `lash-store --help` need not import SQLAlchemy
    if name in __all__:
        for home in _HOMES:
            module = import_module(f".{home}", __name__)
            if hasattr(module, name):
                globals()[name] = value = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
