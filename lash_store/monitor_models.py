"""Owns the public records of monitors: what to run, how it stands, and what it wrote."""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import InvalidId
from .models import Scope, TaskRecord, TaskState, Time, check_id, check_text

__all__ = ["ArmOn", "MonitorRecord", "MonitorSpec", "MonitorUpdate", "Stream", "WakePolicy"]

LONGEST_TIMEOUT = 86_400.0
"""Seconds a monitor may be given: a day. What takes longer is *persistent*."""

MONITOR_PREFIX = "monitor:"
"""What the task ids of monitors begin with."""


class ArmOn(StrEnum):
    """When a monitor is started: when somebody does (`manual`), or again whenever its session starts (`session_start`)."""

    MANUAL = "manual"
    SESSION_START = "session_start"


class WakePolicy(StrEnum):
    """What a monitor does when it has something to say: store an update (`notify`), or post a note, too (`queue_turn`)."""

    NOTIFY = "notify"
    QUEUE_TURN = "queue_turn"


class Stream(StrEnum):
    """Where a process wrote a line."""

    STDOUT = "stdout"
    STDERR = "stderr"


class _Record(BaseModel):
    # what was given may hold keys and tokens: errors do not repeat it
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class MonitorSpec(_Record):
    """
    A process to be supervised: ``MonitorSpec(id="tests", command=["pytest", "-x"])``.

    *command* is a list of arguments, its first the program, found by the PATH of the process's own environment. With
    ``shell=True`` it is a line for ``/bin/sh``. It runs in *cwd* (the folder of this process, if none is given), in a session and
    process group of its own, without standard input.

    Its environment is what `programs.INHERITED` names (PATH, HOME, the locale and such) of the owner's, the variables that
    *inherit_env* names, and *env*. What *env* says is stored in the file, as text: let keys and tokens be inherited by name.

    It may run *timeout* seconds, a day at most; a *persistent* one, or ``timeout=None``, for as long as its session. *arm_on*
    says when it is started, *wake_policy* what it does when it writes something or ends. After a crash of its owner what is left
    of it is ended; with *restart_on_restore* it is started again then, and so it is when its store closed; without, its task is
    ``abandoned``. *keep_lines* is how many of its lines are kept, the newest.
    """

    id: str
    command: tuple[str, ...] | str
    shell: bool = False
    label: str | None = None
    cwd: str | None = None
    env: Mapping[str, str] = Field(default_factory=dict)
    inherit_env: tuple[str, ...] = ()
    timeout: float | None = Field(default=300.0, ge=0.001, le=LONGEST_TIMEOUT, allow_inf_nan=False, strict=True)
    persistent: bool = False
    arm_on: ArmOn = ArmOn.MANUAL
    wake_policy: WakePolicy = WakePolicy.QUEUE_TURN
    restart_on_restore: bool = False
    keep_lines: int = Field(default=1000, ge=1, le=100_000, strict=True)

    @field_validator("id")
    @classmethod
    def _check_id(cls, value: str) -> str:
        check_id("monitor id", value)
        if value.startswith(MONITOR_PREFIX):
            raise InvalidId(f"monitor id {value!r} begins with 'monitor:', which its task's id will: leave that out")
        check_id("the task id of a monitor", f"{MONITOR_PREFIX}{value}")
        return value

    @field_validator("command", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list | tuple):
            raise ValueError(f"it is a list of arguments, not {type(value).__name__}")
        return tuple(os.fspath(one) if isinstance(one, os.PathLike) else one for one in value)

    @field_validator("cwd", mode="before")
    @classmethod
    def _as_path(cls, value: Any) -> Any:
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @field_validator("cwd", "label")
    @classmethod
    def _check_text(cls, value: str | None) -> str | None:
        if value == "":
            raise ValueError("it is empty: leave it out, or say something")
        return None if value is None else check_text("it", value)

    @field_validator("env")
    @classmethod
    def _check_env(cls, value: Mapping[str, str]) -> dict[str, str]:
        for name, said in value.items():
            _check_name(name)
            check_text(f"the variable {name!r}", said)
        return dict(value)

    @field_validator("inherit_env", mode="before")
    @classmethod
    def _as_names(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"it is a list of names, not one: write [{value!r}]")
        return value

    @field_validator("inherit_env")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _check_name(name)
        return value

    @model_validator(mode="after")
    def _check_command(self) -> MonitorSpec:
        command = self.command
        if self.shell:
            if not isinstance(command, str) or not command.strip():
                raise ValueError("with shell=True the command is one line for the shell, which says something")
            check_text("the command", command)
            return self
        if isinstance(command, str):
            raise ValueError(
                f"the command is a list of arguments, like {command.split() or ['program']!r}; for a shell's line say shell=True"
            )
        if not command or not command[0]:
            raise ValueError("the command is empty: its first argument names a program")
        for one in command:
            check_text("an argument of the command", one)
        return self

    @property
    def task_id(self) -> str:
        """The id of its task in its session."""
        return f"{MONITOR_PREFIX}{self.id}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """The arguments the process gets, the program first."""
        return ("/bin/sh", "-c", self.command) if isinstance(self.command, str) else self.command

    @property
    def seconds(self) -> float | None:
        """How long it may run; None: for as long as its session."""
        return None if self.persistent else self.timeout


def _check_name(name: str) -> None:
    check_text("the name of a variable", name)
    if not name or "=" in name:
        raise ValueError(f"{name!r} cannot be the name of a variable: it is empty, or has a '=' in it")


class MonitorRecord(_Record):
    """
    One monitor, as it stood when it was read: of its id in its session the live one, else the newest.

    *lines* and *bytes* are what it has written, in all attempts; *dropped* the lines of that which were not kept and that nobody
    was handed; *unread* the updates that were not acknowledged. *throttled_at* is since when it writes more than is stored.
    *exit_status* is how its process ended, negative for a signal. An *armed* one is started again when its session starts.
    """

    id: str
    scope: Scope
    spec: MonitorSpec
    task: TaskRecord
    armed: bool
    lines: int
    bytes: int
    dropped: int
    unread: int
    throttled_at: Time | None
    exit_status: int | None

    @property
    def state(self) -> TaskState:
        """The state of its task."""
        return self.task.state


class MonitorUpdate(_Record):
    """
    A line that a monitor wrote, without its end.

    *line* counts the lines of its task, from 1; where numbers are missing, lines were dropped. Bytes that are no UTF-8, and NUL,
    are replaced by U+FFFD; one that *is_cut* went on beyond what is kept of a line.
    """

    update_seq: int
    scope: Scope
    monitor_id: str
    task_seq: int
    line: int
    stream: Stream
    text: str
    is_cut: bool
    at: Time
    acknowledged_at: Time | None = None
