"""Owns the words of a check: what was found, how bad it is, and what to do about it; looks at nothing."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["FEW", "CheckReport", "Finding", "Severity", "fault", "few", "info", "warning"]

FEW = 5
"""How many things of one kind a finding names."""


class Severity(StrEnum):
    """How bad a finding is: something is lost or wrong, somebody should do something, or only worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class Finding(BaseModel):
    """
    One thing that was found: a stable *code*, what it is in a sentence, and the *next_step*.

    *can_repair*: it is mended without loss by asking for that; *is_repaired*: it was.
    """

    model_config = ConfigDict(frozen=True)

    severity: Severity
    code: str
    message: str
    next_step: str
    can_repair: bool = False
    is_repaired: bool = False


class CheckReport(BaseModel):
    """What a check of a file found, worst first; *tasks* and *events* were looked at."""

    model_config = ConfigDict(frozen=True)

    path: Path
    revision: str | None
    tasks: int
    events: int
    findings: tuple[Finding, ...]

    @property
    def is_sound(self) -> bool:
        """Whether nothing is lost or wrong, and nothing is left to be done."""
        return all(one.severity is Severity.INFO or one.is_repaired for one in self.findings)


def fault(code: str, message: str, next_step: str) -> Finding:
    """Return a finding of something that is lost or wrong."""
    return Finding(severity=Severity.ERROR, code=code, message=message, next_step=next_step)


def warning(code: str, message: str, next_step: str, *, can_repair: bool = False) -> Finding:
    """Return a finding of something that somebody should do."""
    return Finding(severity=Severity.WARNING, code=code, message=message, next_step=next_step, can_repair=can_repair)


def info(code: str, message: str, next_step: str, *, can_repair: bool = False) -> Finding:
    """Return a finding that is only worth knowing."""
    return Finding(severity=Severity.INFO, code=code, message=message, next_step=next_step, can_repair=can_repair)


def few(names: Iterable[object]) -> str:
    """Name the first of many."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:FEW]) + (f" and {len(shown) - FEW} more" if len(shown) > FEW else "")
