"""A durable task manager for asyncio agent sessions, in one SQLite file. Names are loaded when they are first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .context import TaskContext
    from .copies import BackupReport
    from .errors import (
        CommitInDoubt,
        DuplicateFunction,
        FunctionError,
        HandleNotVisible,
        IdempotencyConflict,
        InboxBusy,
        InvalidArguments,
        InvalidId,
        LimitExceeded,
        NotAStore,
        ResultNotSerializable,
        SchemaError,
        SchemaTooNew,
        SchemaTooOld,
        SessionClosed,
        SessionError,
        StaleAttempt,
        StepFailed,
        StepInDoubt,
        StorageBusy,
        StorageCorrupt,
        StorageError,
        StorageFull,
        StorageMoved,
        StoreClosed,
        StoreCopied,
        StoreError,
        StoreReadOnly,
        TaskAbandoned,
        TaskCancelled,
        TaskError,
        TaskExists,
        TaskFailed,
        TaskNotFound,
        TaskPruned,
        TransferConflict,
        UnknownFunction,
        UnknownSession,
    )
    from .feed import Subscription
    from .findings import CheckReport, Finding, Severity
    from .guest import TransactConnection
    from .handles import TaskHandle
    from .inbox import Inbox, Updates
    from .models import (
        CancelPolicy,
        CancelReport,
        ClosePolicy,
        CloseReport,
        EventType,
        Evidence,
        Failure,
        HandleRole,
        Handoff,
        Note,
        OwnerEnd,
        ProcessEvidence,
        ProcessFate,
        ProcessIdentity,
        Recovery,
        RecoveryReport,
        SchemaChange,
        Scope,
        SessionRecord,
        StepKind,
        StepRecord,
        StepState,
        StopReason,
        TaskEvent,
        TaskFilter,
        TaskKind,
        TaskMode,
        TaskRecord,
        TaskState,
        Transition,
        Verdict,
    )
    from .monitor_models import ArmOn, MonitorRecord, MonitorSpec, MonitorUpdate, Stream, WakePolicy
    from .policies import Backoff, Limits
    from .restoring import RestoreReport
    from .retention_models import PruneReport, Retention
    from .sessions import SessionTasks
    from .store import TaskStore

__all__ = [
    "ArmOn",
    "Backoff",
    "BackupReport",
    "CancelPolicy",
    "CancelReport",
    "CheckReport",
    "ClosePolicy",
    "CloseReport",
    "CommitInDoubt",
    "DuplicateFunction",
    "EventType",
    "Evidence",
    "Failure",
    "Finding",
    "FunctionError",
    "HandleNotVisible",
    "HandleRole",
    "Handoff",
    "IdempotencyConflict",
    "Inbox",
    "InboxBusy",
    "InvalidArguments",
    "InvalidId",
    "LimitExceeded",
    "Limits",
    "MonitorRecord",
    "MonitorSpec",
    "MonitorUpdate",
    "NotAStore",
    "Note",
    "OwnerEnd",
    "ProcessEvidence",
    "ProcessFate",
    "ProcessIdentity",
    "PruneReport",
    "Recovery",
    "RecoveryReport",
    "RestoreReport",
    "ResultNotSerializable",
    "Retention",
    "SchemaChange",
    "SchemaError",
    "SchemaTooNew",
    "SchemaTooOld",
    "Scope",
    "SessionClosed",
    "SessionError",
    "SessionRecord",
    "SessionTasks",
    "Severity",
    "StaleAttempt",
    "StepFailed",
    "StepInDoubt",
    "StepKind",
    "StepRecord",
    "StepState",
    "StopReason",
    "StorageBusy",
    "StorageCorrupt",
    "StorageError",
    "StorageFull",
    "StorageMoved",
    "StoreClosed",
    "StoreCopied",
    "StoreError",
    "StoreReadOnly",
    "Stream",
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
    "TaskPruned",
    "TaskRecord",
    "TaskState",
    "TaskStore",
    "TransactConnection",
    "TransferConflict",
    "Transition",
    "UnknownFunction",
    "UnknownSession",
    "Updates",
    "Verdict",
    "WakePolicy",
]

_HOMES = (
    "errors",
    "models",
    "monitor_models",
    "retention_models",
    "policies",
    "store",
    "sessions",
    "handles",
    "inbox",
    "context",
    "feed",
    "guest",
    "copies",
    "restoring",
    "findings",
)


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
