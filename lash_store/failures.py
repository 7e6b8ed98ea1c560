"""Owns how an exception becomes what a row keeps of it: a type, a bounded message and the end of its traceback."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from typing import Any

from .models import Failure

__all__ = ["failure_of", "failure_text", "told", "words_of"]

_TRACEBACK = 8_000
_MESSAGE = 2_000
"""Characters that are kept: the end of the traceback, the beginning of the message."""


def told(kind: str, message: str) -> str:
    """Write a failure that no exception brought about, as JSON text."""
    return Failure(type=kind, message=message).model_dump_json()


def failure_of(error: BaseException, *, caught_here: bool = True) -> str:
    """Write what is kept of an exception, as JSON text; *caught_here*: its first frame is this package's own, and left out."""
    trace = error.__traceback__
    if caught_here and trace is not None:
        trace = trace.tb_next
    try:
        lines = None if trace is None else "".join(traceback.format_exception(type(error), error, trace, limit=-20))
    except BaseException:
        # an exception may carry what no traceback can show
        lines = None
    failure = Failure(
        type=type(error).__name__,
        message=words_of(error),
        traceback=None if lines is None else _storable(lines[-_TRACEBACK:]),
    )
    return failure.model_dump_json()


def failure_text(failure: Failure | BaseException | Mapping[str, Any] | str | None) -> str:
    """
    Write a failure that somebody reports, in whatever form, as JSON text.

    Raises:
        ValueError: a mapping that is no `Failure`.
    """
    if isinstance(failure, BaseException):
        return failure_of(failure, caught_here=False)
    if isinstance(failure, Mapping):
        failure = Failure.model_validate(dict(failure))
    if not isinstance(failure, Failure):
        failure = Failure(type="Failed", message="" if failure is None else _said(failure))
    return Failure(
        type=_storable(failure.type[:_MESSAGE]),
        message=_storable(failure.message[:_MESSAGE]),
        traceback=None if failure.traceback is None else _storable(failure.traceback[-_TRACEBACK:]),
    ).model_dump_json()


def words_of(value: object, most: int = _MESSAGE) -> str:
    """Return what a value says of itself, as far as that can be had and stored."""
    return _storable(_said(value)[:most])


def _said(value: object) -> str:
    try:
        return str(value)
    except BaseException as broken:
        # one that asks for its words to end the program is no more than one without words
        return f"(its message raised {type(broken).__name__})"


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
