"""Owns what is said about keeping and pruning: which finished tasks may go, how far a prune is, and what it did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .models import Scope, TaskState

__all__ = ["PruneReport", "Retention"]

_MOST_SECONDS = 1e10

Progress = Callable[["PruneReport"], object]
"""Called after every transaction of a prune with what was done so far."""


class Retention(BaseModel):
    """
    Which finished tasks may be pruned; each given limit narrows it, and without any it is all of them.

    *older_than*: ended longer ago than this (a `timedelta`, or seconds). *keep_last*: of each session, the newest so many of them
    (those that began last, whenever they ended) stay. *states*, *sessions*: only these. *before_cursor*: only those whose every
    event a subscriber at that ``seq`` has seen. *unread*: also those whose result nobody was handed yet.

    As a store's ``retention=`` it is applied in the background *every* so many seconds.

    Never pruned, whatever is said here: what is live, what anything live descends from (a cancel must reach it) or may yet (what
    has something live above it, and below it a task that stays or a sub-agent's session), what was cancelled or has that above it
    in place of something live, if the session is open (what is begun below is born cancelled), the children of a live parent
    (which may ask for them again), and a monitor that is armed, or was given up and whose process lives still.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    older_than: timedelta | None = None
    keep_last: int | None = Field(default=None, ge=0, le=2**31, strict=True)
    states: frozenset[TaskState] | None = None
    sessions: frozenset[Scope] | None = None
    before_cursor: int | None = Field(default=None, ge=0, lt=2**63, strict=True)
    unread: bool = False
    every: float = Field(default=3600.0, ge=1.0, le=_MOST_SECONDS)

    @field_validator("older_than", mode="after")
    @classmethod
    def _is_a_time_ago(cls, given: timedelta | None) -> timedelta | None:
        if given is not None and not 0 <= given.total_seconds() <= _MOST_SECONDS:
            raise ValueError(f"older_than is at least 0 and at most 300 years, not {given}")
        return given

    @field_validator("states", mode="after")
    @classmethod
    def _are_terminal(cls, given: frozenset[TaskState] | None) -> frozenset[TaskState] | None:
        live = sorted(state for state in given or () if not state.is_terminal)
        if live:
            raise ValueError(f"what is {', '.join(live)} is live, and never pruned")
        return given

    @field_validator("states", "sessions", mode="before")
    @classmethod
    def _are_several(cls, given: object) -> object:
        """Take any collection; what is in it is validated after. One text is none."""
        if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
            return given
        return [*given]

    @field_validator("sessions", mode="before")
    @classmethod
    def _are_scopes(cls, given: object) -> object:
        if not isinstance(given, list):
            return given
        return [Scope.parse(one) if isinstance(one, str) else one for one in given]

    @classmethod
    def of(cls, **given: object) -> Self:
        """
        Read the arguments of a prune.

        Raises:
            ValueError: one of them has no sense.
        """
        return cls.model_validate(given)


class PruneReport(BaseModel):
    """
    What a prune did, or has done so far.

    *tasks* and *events* were taken away, of *seen* finished tasks that matched; *unread* stayed because nobody was handed their
    result or lines, *needed* because something live depends on them, or what is yet to begin. *task_seq* of *newest_seq* is how
    far it has come, *freed* how many bytes the file gave back.
    """

    model_config = ConfigDict(frozen=True)

    tasks: int = 0
    events: int = 0
    seen: int = 0
    unread: int = 0
    needed: int = 0
    freed: int = 0
    task_seq: int = 0
    newest_seq: int = 0
