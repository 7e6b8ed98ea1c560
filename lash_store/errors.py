"""Owns every exception a caller may catch, one tree under `StoreError`; never decides when one is raised."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models import Evidence, Failure


class StoreError(Exception):
    """Everything this package raises on purpose; it may be copied, and sent to another process."""

    def __reduce__(self) -> tuple[object, ...]:
        # of the arguments `Exception` would make it from again, those by name are missing
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[StoreError], args: tuple[object, ...]) -> StoreError:
    error = kind.__new__(kind)
    error.args = args
    return error


def shown(value: object) -> str:
    """Return a caller's value as a message can have it: short, whatever it is, and whatever it raises when it is asked."""
    try:
        text = repr(value)
    except Exception:
        return f"a {type(value).__name__}"
    return shortened(text)


def shortened(text: str) -> str:
    """Return as much of a text as a message can have."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 200


# --- one task -------------------------------------------------------------------------------------------------------


class TaskError(StoreError):
    """Something about one task; ``task_id`` names it."""

    def __init__(self, message: str, *, task_id: str) -> None:
        super().__init__(message)
        self.task_id = task_id


class TaskNotFound(TaskError, LookupError):
    """No task of that id in that session."""


class TaskExists(TaskError):
    """A live task already has that id in that session."""


class TaskPruned(TaskError):
    """The task was finished, and has been pruned."""


class StaleAttempt(TaskError):
    """A write came from an attempt that is no longer the task's current one; raised inside the body, which it ends."""


class IdempotencyConflict(TaskError):
    """The key was used before, for something else."""


class TaskFailed(TaskError):
    """The awaited task failed; ``failure`` says how."""

    def __init__(self, message: str, *, task_id: str, failure: Failure) -> None:
        super().__init__(message, task_id=task_id)
        self.failure = failure


class TaskCancelled(TaskError):
    """The awaited task was cancelled; ``reason`` is what the requester gave, or None."""

    def __init__(self, message: str, *, task_id: str, reason: str | None) -> None:
        super().__init__(message, task_id=task_id)
        self.reason = reason


class TaskAbandoned(TaskError):
    """The awaited task's owner went away without recording an outcome; ``evidence`` says what is known."""

    def __init__(self, message: str, *, task_id: str, evidence: Evidence) -> None:
        super().__init__(message, task_id=task_id)
        self.evidence = evidence


class StepFailed(TaskError):
    """A step failed in an earlier attempt, with an exception whose class this program does not have; ``failure`` says how."""

    def __init__(self, message: str, *, task_id: str, failure: Failure) -> None:
        super().__init__(message, task_id=task_id)
        self.failure = failure


class StepInDoubt(TaskError):
    """A step that may run at most once was begun by an earlier attempt, which died in it: nobody knows whether it took effect."""


# --- one session ----------------------------------------------------------------------------------------------------


class SessionError(StoreError):
    """Something about one session."""


class UnknownSession(SessionError, LookupError):
    """The file has no such session."""


class SessionClosed(SessionError):
    """The session is closed: it may be looked at, but nothing is created in it."""


class HandleNotVisible(SessionError):
    """Some handles are not visible in the session; ``missing`` names them all."""

    def __init__(self, message: str, *, missing: tuple[str, ...]) -> None:
        super().__init__(message)
        self.missing = missing


class TransferConflict(SessionError):
    """A live task at the destination has the id."""


class InboxBusy(SessionError):
    """Another reader has claimed the session's notes."""


# --- functions and values -------------------------------------------------------------------------------------------


class FunctionError(StoreError):
    """Something about a registered function, its arguments or its result."""


class UnknownFunction(FunctionError, LookupError):
    """The function was not registered with this store."""


class DuplicateFunction(FunctionError):
    """Another function is registered under that name."""


class InvalidArguments(FunctionError):
    """The arguments do not fit the function, or are not JSON."""


class ResultNotSerializable(FunctionError):
    """The value is not JSON and cannot be made so."""


class InvalidId(StoreError, ValueError):
    """An id, runtime or session name that cannot be stored."""


class LimitExceeded(StoreError):
    """A configured limit would be passed; nothing was written."""


# --- the file -------------------------------------------------------------------------------------------------------


class StorageError(StoreError):
    """The file or the disk under it."""


class StorageBusy(StorageError):
    """Another process kept the write lock for too long; nothing was written."""


class StorageFull(StorageError):
    """The disk, a quota or a page limit is full; nothing was written."""


class StorageCorrupt(StorageError):
    """SQLite finds the file damaged, also after opening it again."""


class StorageMoved(StorageError):
    """The path no longer names the file that was opened; the store has stopped."""


class StoreCopied(StorageError):
    """The file is a copy: opened for running, it would do its work twice."""


class NotAStore(StorageError):
    """The file is not a lash_store database."""


class CommitInDoubt(StorageError):
    """A COMMIT failed and the file cannot be asked whether it took; the store has stopped."""


class SchemaError(StoreError):
    """The file's revision and this package do not fit."""


class SchemaTooOld(SchemaError):
    """The file is of an older revision and may not be upgraded here."""


class SchemaTooNew(SchemaError):
    """The file was written by a newer lash_store."""


# --- the store object -----------------------------------------------------------------------------------------------


class StoreReadOnly(StoreError):
    """This store may not do that: it was opened to read, or only to make requests."""


class StoreClosed(StoreError):
    """The store is not open: not yet, or no more."""
