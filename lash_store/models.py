"""Owns the public records and the words of the domain, as frozen pydantic models and `StrEnum`s; never touches the file."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar
from unicodedata import category

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PlainSerializer, field_validator, model_validator

from .errors import InvalidId, shown

__all__ = [
    "CancelPolicy",
    "CancelReport",
    "ClosePolicy",
    "CloseReport",
    "EventType",
    "Evidence",
    "Failure",
    "HandleRole",
    "Handoff",
    "Note",
    "OwnerEnd",
    "ProcessEvidence",
    "ProcessFate",
    "ProcessIdentity",
    "Recovery",
    "RecoveryReport",
    "SchemaChange",
    "Scope",
    "SessionRecord",
    "StepKind",
    "StepRecord",
    "StepState",
    "StopReason",
    "TaskEvent",
    "TaskFilter",
    "TaskKind",
    "TaskMode",
    "TaskRecord",
    "TaskState",
    "Transition",
    "Verdict",
    "check_fraction",
    "check_id",
    "check_progress",
    "check_seconds",
    "check_text",
    "check_timeout",
    "check_word",
]


class TaskState(StrEnum):
    """Where a task stands. The first terminal state wins, for ever."""

    PENDING = "pending"
    RUNNING = "running"
    WAITING = "waiting"
    CANCEL_REQUESTED = "cancel_requested"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"

    @property
    def is_terminal(self) -> bool:
        """True for the four states nothing leaves."""
        return self in _TERMINAL


_TERMINAL = frozenset({TaskState.COMPLETED, TaskState.FAILED, TaskState.CANCELLED, TaskState.ABANDONED})


class TaskKind(StrEnum):
    """What the work is to the agent."""

    MONITOR = "monitor"
    SUBAGENT = "subagent"
    OBSERVER = "observer"
    OTHER = "other"


class TaskMode(StrEnum):
    """Who does the work: the store (`managed`, `hidden`) or somebody else (`external`)."""

    MANAGED = "managed"
    EXTERNAL = "external"
    HIDDEN = "hidden"


class Recovery(StrEnum):
    """
    What becomes of a task whose owner is gone; declared when work is created.

    ``rerun``: the body may be run again, and is. ``owner_bound``: it may not, once started; the task is *abandoned*.
    ``external``: somebody else does the work, so nothing is done.
    """

    RERUN = "rerun"
    OWNER_BOUND = "owner_bound"
    EXTERNAL = "external"


class CancelPolicy(StrEnum):
    """How a body is stopped: asked, and cancelled after the grace (`cooperative`), or cancelled at once (`abort_local`)."""

    COOPERATIVE = "cooperative"
    ABORT_LOCAL = "abort_local"


class ClosePolicy(StrEnum):
    """What becomes of a live task when its session closes: it goes on there, is cancelled, or is transferred."""

    KEEP = "keep"
    CANCEL = "cancel"
    TRANSFER = "transfer"


class HandleRole(StrEnum):
    """What a handle allows: the one `owner` handle may cancel, an `observer` may look and wait."""

    OWNER = "owner"
    OBSERVER = "observer"


class StopReason(StrEnum):
    """Why a body is being stopped; what `TaskContext.stop_reason` says."""

    CANCEL = "cancel"
    DETACH = "detach"
    TIMEOUT = "timeout"
    STALE = "stale"


class StepKind(StrEnum):
    """What a body remembers: its checkpoint, a step outside, one in this file, or when a sleep is over."""

    CHECKPOINT = "checkpoint"
    STEP = "step"
    TRANSACT = "transact"
    SLEEP = "sleep"


class StepState(StrEnum):
    """Where a step stands: noted as begun, waiting for its next try, or remembered for good with its result or failure."""

    BEGUN = "begun"
    RETRYING = "retrying"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """True once later attempts are given what came of it, and do not run it."""
        return self in {StepState.DONE, StepState.FAILED}


class OwnerEnd(StrEnum):
    """How an owner ended: it closed its store, it was found dead, or a person gave it up."""

    CLOSED = "closed"
    DIED = "died"
    ABANDONED = "abandoned"


class Verdict(StrEnum):
    """What became of a request: done, already so, or another outcome stands. A lost race is not an error."""

    APPLIED = "applied"
    UNCHANGED = "unchanged"
    SUPERSEDED = "superseded"


class EventType(StrEnum):
    """What happened; the words of the `events` table."""

    REGISTERED = "registered"
    CLAIMED = "claimed"
    STARTED = "started"
    REATTACHED = "reattached"
    RELEASED = "released"
    RETRY_SCHEDULED = "retry_scheduled"
    STATE_CHANGED = "state_changed"
    PROGRESS = "progress"
    SAVED = "saved"
    SIGNALLED = "signalled"
    CANCEL_REQUESTED = "cancel_requested"
    CALLBACK_FAILED = "callback_failed"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    TRANSFERRED = "transferred"
    NOTED = "noted"
    PRUNED = "pruned"
    SESSION_OPENED = "session_opened"
    SESSION_CLOSED = "session_closed"
    HANDED_OFF = "handed_off"


_MAX_ID = 256


def check_id(what: str, value: str) -> str:
    """
    Return *value* if it can be stored as an id: 1 to 256 characters, none of them a control character.

    Raises:
        InvalidId: empty, too long, or with NUL, control characters or lone surrogates.
    """
    if not isinstance(value, str):
        raise InvalidId(f"{what} must be a string, not {type(value).__name__}")
    if not value or len(value) > _MAX_ID:
        raise InvalidId(f"{what} must have 1 to {_MAX_ID} characters, not {len(value)}")
    if not value.isprintable() and any(category(char) in {"Cc", "Cs"} for char in value):
        raise InvalidId(f"{what} {value!r} has control characters or lone surrogates: use printable text")
    return value


def check_text(what: str, value: str) -> str:
    """
    Return *value* if it is text that can be stored.

    Raises:
        ValueError: not a string, or with NUL or lone surrogates.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, not {type(value).__name__}")
    if "\0" in value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{what} has NUL or lone surrogates in it: it cannot be stored")
    return value


def check_fraction(what: str, value: float | None) -> float | None:
    """
    Return *value* as a float, if there is one.

    Raises:
        ValueError: not a number from 0 to 1.
    """
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"the fraction of {what} must be a number from 0 to 1, not {shown(value)}")
    return float(value)


def check_seconds(what: str, value: float, *, at_least: float = 0.0) -> float:
    """
    Return *value* as a float.

    Raises:
        ValueError: not a finite number of seconds from *at_least* to a thousand years.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value <= _THOUSAND_YEARS:
        raise ValueError(f"{what} must be a number of seconds, at least {at_least:g}, not {shown(value)}")
    return float(value)


W = TypeVar("W", bound=StrEnum)


def check_word(what: str, words: type[W], given: object) -> W:
    """
    Return the word that is meant, as one of its enum.

    Raises:
        ValueError: it is none of them.
    """
    if type(given) is words:
        return given
    try:
        return words(given if isinstance(given, str) else "")
    except ValueError:
        raise ValueError(f"{what} is one of {', '.join(words)}, not {shown(given)}") from None


def check_timeout(value: float | None) -> float | None:
    """
    Return how many seconds to wait, None for as long as it takes; less than none is none, and endless is a thousand years.

    Raises:
        ValueError: not a number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(f"timeout must be a number of seconds or None, not {shown(value)}")
    return float(min(max(value, 0), _THOUSAND_YEARS))


def check_progress(given: object) -> None:
    """
    Refuse what cannot be told of progress, before anything is done.

    Raises:
        TypeError: neither a plain function nor None.
    """
    if given is not None and (not callable(given) or inspect.iscoroutinefunction(given)):
        raise TypeError(f"progress must be a plain function or None, not {shown(given)}")


_THOUSAND_YEARS = 1000 * 366 * 86_400.0


def _as_the_file_does(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


Time = Annotated[datetime, PlainSerializer(_as_the_file_does, return_type=str, when_used="json")]
"""A time in UTC; in JSON as everywhere in the file: ISO 8601, fixed width, milliseconds."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Scope(_Record):
    """The key every row of a session carries: ``Scope("desktop", "s1")``, printed ``desktop:s1``."""

    runtime: str
    session_id: str

    def __init__(self, runtime: str, session_id: str) -> None:
        check_id("runtime", runtime)
        check_id("session id", session_id)
        if ":" in runtime:
            raise InvalidId(f"runtime {runtime!r} has a ':': the first ':' of a scope ends the runtime's name")
        BaseModel.__init__(self, runtime=runtime, session_id=session_id)

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Read ``runtime:session`` back into a scope.

        Raises:
            InvalidId: no ``:`` in it, or a part that cannot be stored.
        """
        if not isinstance(text, str):
            raise InvalidId(f"a scope is text, not {type(text).__name__}: write runtime:session")
        runtime, colon, session_id = text.partition(":")
        if not colon:
            raise InvalidId(f"scope {shown(text)} has no ':': write runtime:session")
        return cls(runtime, session_id)

    def __str__(self) -> str:
        return f"{self.runtime}:{self.session_id}"


class Failure(_Record):
    """How a task failed: the exception's type name, its message, and the end of its traceback."""

    type: str
    message: str
    traceback: str | None = None


class ProcessFate(StrEnum):
    """
    What became of a process whose supervisor went away: it was `ended` now, it was `gone` by then, it could not be ended and
    is `left`, or is `unproven` to be the same one, and was let be. `given_up`: it ran when a person gave its task up, and is
    ended after that.
    """

    ENDED = "ended"
    GONE = "gone"
    LEFT = "left"
    UNPROVEN = "unproven"
    GIVEN_UP = "given_up"


class ProcessIdentity(_Record):
    """
    What is recorded of a monitor's process, so that it can be told from any other: a pid alone repeats.

    It leads the process *group* of its own pid, and a session. *started* is its start time in clock ticks since boot;
    *namespace* the space its pid counts in; *token* the value of ``LASH_STORE_MONITOR`` in the environment of all it starts.
    """

    pid: int
    group: int
    started: str
    boot_id: str
    host: str
    namespace: str
    token: str

    @model_validator(mode="after")
    def _check_group(self) -> Self:
        if self.pid != self.group or not 1 < self.pid < 2**31:
            raise ValueError("a monitor's process leads its group")
        return self


class ProcessEvidence(_Record):
    """What became of the process of a monitor whose owner went away."""

    pid: int
    started: str
    became: ProcessFate


class Evidence(_Record):
    """
    What is known of a task nobody finished: the owner that had it, how that ended, and who gave it up, and why, if one did.

    Of a monitor, also what became of its process; None if none had been started.
    """

    owner_id: int | None
    pid: int | None = None
    host: str | None = None
    end: str
    found_at: Time
    reason: str | None = None
    by: str | None = None
    process: ProcessEvidence | None = None


class TaskRecord(_Record):
    """
    One incarnation of a task as its row stood when it was read.

    ``arguments`` and ``result`` are JSON values; ``fraction`` is 0 to 1; times are aware UTC datetimes. ``attempt`` counts
    executions from 1 (0: never started, and external work), ``attempts_spent`` those that a crash ended. ``parent_seq`` is the
    ``task_seq`` of the parent; ``child_session_id`` the session a sub-agent works in. ``has_callback``, ``callback_begun_at`` and
    ``callback_error`` tell of the cancel callback of external work.

    ``version`` is that of the code the task was last started by; ``timeout`` the seconds an attempt may take, ``deadline`` when
    the task must have ended, ``not_before`` when a retry is due. ``last_error`` is what the last retried attempt raised;
    ``waiting_for`` what a body in state ``waiting`` gave as its reason. ``process`` is what runs for a monitor, until it is
    known to be gone; a row that was given up keeps it.
    """

    task_seq: int
    scope: Scope
    id: str
    kind: TaskKind
    mode: TaskMode
    state: TaskState
    label: str
    function: str | None
    recovery: Recovery
    cancel_policy: CancelPolicy
    arguments: JsonValue
    attempt: int
    attempts_spent: int
    max_attempts: int
    owner_id: int | None
    progress: str | None
    fraction: float | None
    result: JsonValue
    failure: Failure | None
    evidence: Evidence | None
    cancel_reason: str | None
    cancel_requested_by: str | None
    cancel_requested_at: Time | None
    created_at: Time
    started_at: Time | None
    updated_at: Time
    completed_at: Time | None
    parent_seq: int | None
    child_session_id: str | None
    close_policy: ClosePolicy
    idempotency_key: str | None
    notify_on_end: bool
    has_callback: bool
    callback_begun_at: Time | None
    callback_error: Failure | None
    version: str | None = None
    timeout: float | None = None
    deadline: Time | None = None
    not_before: Time | None = None
    last_error: Failure | None = None
    waiting_for: str | None = None
    process: ProcessIdentity | None = None

    @property
    def is_terminal(self) -> bool:
        """True once the task has its outcome."""
        return self.completed_at is not None


class TaskEvent(_Record):
    """What happened, written in the transaction that did it. ``seq`` is the cursor of the change feed."""

    seq: int
    task_seq: int | None
    scope: Scope
    from_scope: Scope | None
    task_id: str | None
    attempt: int | None
    type: EventType
    at: Time
    data: dict[str, Any]


class SessionRecord(_Record):
    """
    One agent conversation inside a runtime.

    ``sync_needed``: hidden work was started since the session last took its state up; see `SessionTasks.await_background_work`.
    ``unread_notes`` is how much waits in its inbox.
    """

    scope: Scope
    parent: Scope | None = None
    opened_at: Time
    closed_at: Time | None
    live_tasks: int
    sync_needed: bool = False
    unread_notes: int = 0


class Transition(_Record):
    """What became of a request: the row as it stands, and whether the request changed it."""

    record: TaskRecord
    verdict: Verdict


class CancelReport(_Record):
    """How one cancel of many went: the row as it stands, and what went wrong, in the asking or in the task's own callback."""

    record: TaskRecord
    error: Failure | None = None


class Handoff(_Record):
    """
    Work handed from one session to another, as it stood when it was done; asked for again, the same comes back.

    *moved* went to the destination; the cancel of *cancelled* was requested.
    """

    id: str
    source: Scope
    destination: Scope
    moved: tuple[TaskRecord, ...]
    cancelled: tuple[TaskRecord, ...]
    at: Time


class CloseReport(_Record):
    """
    What became of a session's live tasks when it closed, by their policies.

    *cancelled* holds the rows as they stood when the wait for them was over.
    """

    scope: Scope
    closed_at: Time
    successor: Scope | None = None
    kept: tuple[TaskRecord, ...] = ()
    cancelled: tuple[TaskRecord, ...] = ()
    transferred: tuple[TaskRecord, ...] = ()


class StepRecord(_Record):
    """
    What a task remembers of one step.

    *value* is the JSON of its result, of a checkpoint, or the seconds of a sleep; *tries* how often it was run to an end, or how
    often a checkpoint was saved; *wake_at* when a sleep is over or a retry is due.
    """

    task_seq: int
    kind: StepKind
    name: str
    state: StepState
    attempt: int
    tries: int
    value: JsonValue
    failure: Failure | None
    begun_at: Time | None
    wake_at: Time | None
    saved_at: Time


class Note(_Record):
    """
    What background work says to its session. The *key* makes it one: ``end:<task_seq>`` for the end of a task.

    *data* is a JSON value; for an end: the state, and what came of it.
    """

    note_seq: int
    scope: Scope
    key: str
    task_seq: int | None
    task_id: str | None
    text: str
    data: JsonValue
    posted_at: Time
    acknowledged_at: Time | None = None


class TaskFilter(_Record):
    """
    Which tasks to list or count; an empty filter is the whole file.

    Tasks come by ``task_seq``, never by wall clock; page with ``after_seq`` and ``limit``.
    """

    runtime: str | None = None
    scope: Scope | None = None
    kinds: frozenset[TaskKind] | None = None
    states: frozenset[TaskState] | None = None
    include_terminal: bool = True
    include_hidden: bool = True
    after_seq: int = Field(default=0, ge=0, lt=2**63)
    limit: int | None = Field(default=None, ge=0, lt=2**63)

    @field_validator("scope", mode="before")
    @classmethod
    def _read_scope(cls, value: object) -> object:
        return Scope.parse(value) if isinstance(value, str) else value

    @field_validator("kinds", "states", mode="before")
    @classmethod
    def _are_words(cls, value: object) -> object:
        # what is no text is refused before an enum asks it to tell of itself
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            value = [*value]
            odd = [one for one in value if not isinstance(one, str)]
            if odd:
                raise ValueError(f"it has words, not {shown(odd[0])}")
        return value


class RecoveryReport(_Record):
    """
    What one recovery did. Each list holds the records as they stood right after it.

    ``unreachable`` names owners whose lock file is gone although their process lives: they are not dead, and nothing of
    theirs was touched. ``unknown_functions`` names what this program has not registered, or not in a version that accepts the
    row's, which ``unknown_versions`` has as ``name@version``. ``in_flight`` are the steps noted as begun whose attempt died in
    them: they may have taken effect, and run again.
    """

    dead_owners: tuple[int, ...] = ()
    unreachable: tuple[int, ...] = ()
    reattached: tuple[TaskRecord, ...] = ()
    claimed: tuple[TaskRecord, ...] = ()
    released: tuple[TaskRecord, ...] = ()
    cancelled: tuple[TaskRecord, ...] = ()
    failed: tuple[TaskRecord, ...] = ()
    abandoned: tuple[TaskRecord, ...] = ()
    unknown_functions: tuple[str, ...] = ()
    unknown_versions: tuple[str, ...] = ()
    in_flight: tuple[StepRecord, ...] = ()


class SchemaChange(_Record):
    """
    What an upgrade or a downgrade did to a file; a revision of None is a store without tables.

    ``backup`` is the copy from before it, or None if none was kept; ``seconds`` is how long it took, the waiting included.
    """

    from_revision: str | None
    to_revision: str | None
    backup: Path | None
    seconds: float
