"""Owns the commands: what somebody asks of a row, as values; `lifecycle.decide` says what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .models import TaskState

__all__ = [
    "Abandon",
    "BeginCallback",
    "CallbackFailed",
    "Claim",
    "Command",
    "Complete",
    "ConfirmCancel",
    "Expire",
    "Fail",
    "Fence",
    "Flip",
    "GiveUp",
    "GoOn",
    "Launch",
    "Move",
    "Notify",
    "Progress",
    "Rebind",
    "Release",
    "RequestCancel",
    "Retry",
    "RetryStep",
    "Save",
    "Settle",
    "Signal",
    "Start",
    "Wait",
]


class Fence(NamedTuple):
    """What a write from a body names, so that a zombie's is refused: its attempt, and the owner that ran it."""

    attempt: int
    owner_id: int


@dataclass(frozen=True, slots=True)
class Start:
    """
    Start a body of a row that *from_owner* holds; *crashed* when that owner died while it executed the row.

    *version* is that of the function here.
    """

    owner_id: int
    from_owner: int | None
    reattach: bool = False
    crashed: bool = False
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """Take a row over without starting it: no slot is free."""

    owner_id: int
    crashed: bool


@dataclass(frozen=True, slots=True)
class Release:
    """Give a row back to whoever may run it next; *process_left*: what ran for it may live on."""

    reason: str
    crashed: bool = False
    process_left: bool = False


@dataclass(frozen=True, slots=True)
class RequestCancel:
    """
    Ask for the end of a task, durably; *because_of* is the ancestor whose cancel this is part of.

    *at_birth*: nothing of it has begun, whoever does the work.
    """

    reason: str | None
    by: str
    because_of: int | None = None
    at_birth: bool = False


@dataclass(frozen=True, slots=True)
class ConfirmCancel:
    """Say that the body of a cancelled task has stopped; no fence when its owner is dead."""

    fence: Fence | None


@dataclass(frozen=True, slots=True)
class Complete:
    """Store a body's result, as JSON text."""

    fence: Fence
    result: str


@dataclass(frozen=True, slots=True)
class Fail:
    """Store a failure, as JSON text; no fence when recovery gives a task up."""

    fence: Fence | None
    failure: str
    crashed: bool = False


@dataclass(frozen=True, slots=True)
class Retry:
    """Store a failure, as JSON text, that another attempt may make good, at *not_before*, unless none is left."""

    fence: Fence
    failure: str
    not_before: str


@dataclass(frozen=True, slots=True)
class Expire:
    """End a task that waits for its start under *owner_id*, for a reason that is JSON text of a failure: its time is up."""

    owner_id: int
    failure: str


@dataclass(frozen=True, slots=True)
class Abandon:
    """Say that nobody will ever know the outcome; *evidence* is JSON text, *process_left* as in `Release`."""

    evidence: str
    process_left: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End or free a task by a person's decision, and fence its body out; *evidence* is JSON text."""

    reason: str
    evidence: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Show how far work has come: what is None stays as it is. No fence when it is not the body who says so."""

    fence: Fence | None
    message: str | None
    fraction: float | None
    detail: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Save:
    """Note that something was remembered; *what* says what: a checkpoint's size, a step's name and what became of it."""

    fence: Fence
    what: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RetryStep:
    """Note that a step is to be tried again; *what* says which, when and why."""

    fence: Fence
    what: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Launch:
    """Record the process that is about to run for a monitor, JSON text: it begins only after this."""

    fence: Fence
    process: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Say that a body waits, and what for."""

    fence: Fence
    reason: str


@dataclass(frozen=True, slots=True)
class GoOn:
    """Say that a body that waited runs again."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class Signal:
    """Note that a signal was sent to a task; *what* says its name, key and number."""

    what: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Notify:
    """Note that something was put into the inbox of the task's session; no fence at the end of a task."""

    fence: Fence | None
    note: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Move:
    """Put a task into another session of its runtime; the one change a finished task allows."""

    scope: str


# of external work: nobody's body is on the row, so most of them need no fence


@dataclass(frozen=True, slots=True)
class Rebind:
    """
    Let *owner_id* keep the books of external work that *from_owner* kept before, with a cancel callback or without.

    *anew* holds the columns that are said anew; the others stay.
    """

    owner_id: int
    from_owner: int | None
    has_callback: bool
    anew: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Settle:
    """Store how external work ended: a state, and JSON text of a result or a failure."""

    state: TaskState
    result: str | None = None
    failure: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Flip:
    """Say that external work runs, or waits."""

    state: TaskState


@dataclass(frozen=True, slots=True)
class BeginCallback:
    """Note that the cancel callback is about to be called: never again after this."""

    fence: Fence


@dataclass(frozen=True, slots=True)
class CallbackFailed:
    """Store what the cancel callback raised, as JSON text; the cancel goes on."""

    error: str


Command = (
    Start
    | Claim
    | Release
    | RequestCancel
    | ConfirmCancel
    | Complete
    | Fail
    | Retry
    | Expire
    | Abandon
    | GiveUp
    | Progress
    | Save
    | RetryStep
    | Launch
    | Wait
    | GoOn
    | Signal
    | Notify
    | Move
    | Rebind
    | Settle
    | Flip
    | BeginCallback
    | CallbackFailed
)
