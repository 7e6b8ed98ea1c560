"""Owns what a program chooses once: how long between tries, what is worth one, and how much a session may hold. Pure."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from .errors import LimitExceeded, shown

__all__ = ["NO_RETRY", "Backoff", "Errors", "Limits", "RetryRule"]

Errors: TypeAlias = type[BaseException] | Iterable[type[BaseException]]
"""An exception class, or several."""


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Backoff(_Policy):
    """
    How many seconds to wait before the next try: *initial* after the first failure, *factor* times as many after each further
    one, *maximum* at most, and a random part of up to *jitter* of that less, so that many do not come back at once.

    After "Exponential Backoff And Jitter" (aws.amazon.com/blogs/architecture, 2015).
    """

    initial: float = Field(default=1.0, ge=0, le=1e9)
    factor: float = Field(default=2.0, ge=1, le=1e6)
    maximum: float = Field(default=300.0, ge=0, le=1e9)
    jitter: float = Field(default=0.25, ge=0, le=1)

    def delay(self, failures: int) -> float:
        """Return the seconds to wait after so many *failures*, at least one."""
        try:
            longest = min(self.maximum, self.initial * self.factor ** (failures - 1))
        except OverflowError:
            longest = self.maximum if self.initial else 0.0
        return longest * (1 - self.jitter * random.random())


_MOST = 2**63 - 1


class Limits(_Policy):
    """
    What a store lets into its file, None for no limit; what would pass a limit is refused with `LimitExceeded`.

    *payload_bytes* bounds each value by itself: arguments, a result, a checkpoint, a step's result, a signal's payload, a note's
    data. *live_tasks* and *total_tasks* bound what one session holds, the second its finished tasks too.

    *monitors* bounds how many run in one session. Of what they write, *line_bytes* are kept of a line, *lines_per_second* are
    stored of each, and *update_bytes* are kept of all in a session: what is more is dropped, the oldest first, and counted.
    """

    payload_bytes: int | None = Field(default=16 * 1024 * 1024, ge=1, le=_MOST, strict=True)
    live_tasks: int | None = Field(default=None, ge=1, le=_MOST, strict=True)
    total_tasks: int | None = Field(default=None, ge=1, le=_MOST, strict=True)
    monitors: int | None = Field(default=32, ge=1, le=_MOST, strict=True)
    line_bytes: int = Field(default=4096, ge=16, le=1024 * 1024, strict=True)
    lines_per_second: float = Field(default=200.0, ge=0.1, le=1e6, allow_inf_nan=False, strict=True)
    update_bytes: int | None = Field(default=16 * 1024 * 1024, ge=1, le=_MOST, strict=True)

    def check_payload(self, text: str, what: str) -> str:
        """
        Return JSON text that may be stored.

        Raises:
            LimitExceeded: it has too many bytes.
        """
        most = self.payload_bytes
        if most is not None and len(text) * 4 > most and (size := len(text.encode())) > most:
            raise LimitExceeded(
                f"{what} has {size:,} bytes, and the limit is {most:,}: keep large things in files and store their names, "
                "or give the store other Limits"
            )
        return text


@dataclass(frozen=True)
class RetryRule:
    """Which exceptions are worth another try, how many executions there may be, and how long it is between them."""

    max_attempts: int
    on: tuple[type[BaseException], ...] = ()
    never_on: tuple[type[BaseException], ...] = ()
    backoff: Backoff = field(default_factory=Backoff)

    @classmethod
    def of(cls, max_attempts: int, on: Errors, never_on: Errors, backoff: Backoff | None) -> Self:
        """
        Check what a caller gave.

        Raises:
            ValueError: a number of attempts below 1, or something that is no exception class.
        """
        if isinstance(max_attempts, bool) or not isinstance(max_attempts, int) or not 1 <= max_attempts < 2**31:
            raise ValueError(f"max_attempts must be a number, at least 1, not {shown(max_attempts)}")
        if backoff is not None and not isinstance(backoff, Backoff):
            raise ValueError(f"backoff must be a Backoff, not {shown(backoff)}")
        return cls(max_attempts, _classes("retry_on", on), _classes("no_retry_on", never_on), backoff or Backoff())

    def wants(self, error: BaseException) -> bool:
        """Say whether an exception is worth another try, as far as its class tells."""
        return isinstance(error, self.on) and not isinstance(error, self.never_on)


def _classes(what: str, given: Errors) -> tuple[type[BaseException], ...]:
    classes = (given,) if isinstance(given, type) else tuple(given) if isinstance(given, Iterable) else (given,)
    for one in classes:
        if not isinstance(one, type) or not issubclass(one, Exception):
            raise ValueError(f"{what} names exception classes, not {shown(one)}")
    return classes


NO_RETRY = RetryRule(1)
"""For what is run once."""
