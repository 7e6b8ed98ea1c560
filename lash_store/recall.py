"""Owns how what a step came to is told again: arguments told apart, results by their type, failures by their class."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from itertools import takewhile
from pathlib import PurePath
from types import BuiltinFunctionType
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, PydanticKnownError

from .errors import ResultNotSerializable, StepFailed, TaskAbandoned, TaskCancelled, TaskError, TaskFailed
from .failures import words_of
from .models import Evidence, Failure
from .queries import readable
from .registry import from_json, result_adapter, to_json

__all__ = ["as_before", "digest", "to_raise_again", "typed"]


def digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes | None:
    """Return what tells arguments from others; None if they cannot be written down. Nothing is taken out of an iterator."""
    try:
        text = _in_order([args, kwargs])
    except Exception:
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _stand_in(value: Any) -> Any:
    """Return what stands for a value that JSON does not have."""
    if isinstance(value, set | frozenset):
        return sorted(json.dumps(item, sort_keys=True, default=_stand_in) for item in value)
    if isinstance(value, BaseModel):
        return value.model_dump()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, bytes | bytearray | PurePath | UUID | Decimal | date | time_of_day | timedelta | complex):
        return repr(value)
    return f"<{type(value).__qualname__}>"


_in_order = json.JSONEncoder(sort_keys=True, default=_stand_in).encode


# --- results by their type ------------------------------------------------------------------------------------------


def typed(fn: Callable[..., Any], text: str, name: str) -> Any:
    """
    Read a result back as the function's annotation says, so that the first time gives what every later one will.

    Raises:
        ResultNotSerializable: it does not fit.
    """
    adapter = _adapter(fn)
    if adapter is None:
        with readable(f"step {name!r}"):
            return from_json(text)
    try:
        return adapter.validate_json(text)
    except Exception as error:
        # whatever a validator raises
        raise ResultNotSerializable(
            f"the result of step {name!r} does not fit the type its function gives: {error}"
        ) from error


_adapters: WeakKeyDictionary[Any, TypeAdapter[Any] | None] = WeakKeyDictionary()


def _adapter(fn: Callable[..., Any]) -> TypeAdapter[Any] | None:
    while isinstance(fn, functools.partial):
        fn = fn.func
    key = getattr(fn, "__func__", fn)
    try:
        if key not in _adapters:
            _adapters[key] = result_adapter(key)
        return _adapters[key]
    except TypeError:
        # no weak reference to it, or no hash
        return result_adapter(key)


# --- failures, again ------------------------------------------------------------------------------------------------


_PARTS, _WORDS = 8_000, 500
"""Characters that are kept of what an exception is made of, and of one part of it."""

_PLAIN = {BaseException.__str__, OSError.__str__, BaseExceptionGroup.__str__}
"""What says no more than what an exception was given."""


class _Room:
    """How many characters of JSON text may still be kept of what an exception is made of."""

    def __init__(self, left: int) -> None:
        self.left = left

    def takes(self, part: Mapping[str, Any]) -> bool:
        """Say whether a part fits, and count it."""
        self.left -= len(json.dumps(part))
        return self.left >= 0


def to_raise_again(error: BaseException) -> dict[str, Any]:
    """Return what is needed beside the failure itself: the class, what errors of ours carry, and what some are made of."""
    return _to_raise_again(error, _Room(_PARTS))


def _to_raise_again(error: BaseException, room: _Room) -> dict[str, Any]:
    again: dict[str, Any] = {"class": f"{type(error).__module__}:{type(error).__qualname__}"}
    if isinstance(error, TaskError):
        again["task_id"] = error.task_id
    if isinstance(error, TaskCancelled):
        again["reason"] = error.reason
    if isinstance(error, TaskFailed | StepFailed):
        again["failure"] = error.failure.model_dump(mode="json")
    if isinstance(error, TaskAbandoned):
        again["evidence"] = error.evidence.model_dump(mode="json")
    with contextlib.suppress(Exception):
        # what cannot be written down is left out, and then so is the class when it is raised again
        if isinstance(error, ValidationError):
            again["title"] = words_of(error.title, _WORDS)
            again["errors"] = list(takewhile(room.takes, map(_written, error.errors(include_url=False))))
        if isinstance(error, ExceptionGroup):
            again["message"] = words_of(error.message, _WORDS)
            again["members"] = [_member(one, room) for one in error.exceptions if room.left > 0]
    return again


def _written(detail: ErrorDetails) -> dict[str, Any]:
    """Write down what pydantic says of one value, which may be anything."""
    about = {name: _short(value) for name, value in detail.get("ctx", {}).items()}
    loc = [part if isinstance(part, int) else words_of(part, _WORDS) for part in detail["loc"]]
    return {
        "type": detail["type"],
        "loc": loc,
        "msg": words_of(detail["msg"], _WORDS),
        "input": _short(detail["input"]),
        "ctx": about,
    }


def _short(value: Any) -> Any:
    """Return a value that JSON has and that is short, else what it says of itself."""
    try:
        text = to_json(value, "a value")
        if len(text) <= _WORDS:
            return from_json(text)
    except Exception:
        # whatever a value raises
        text = words_of(value, _WORDS)
    return text[:_WORDS]


def _member(error: BaseException, room: _Room) -> dict[str, Any]:
    said = {"type": type(error).__name__, "message": words_of(error, _WORDS)}
    room.takes(said)
    return {**said, "again": _to_raise_again(error, room)}


def as_before(failure: Failure, again: Mapping[str, Any], task_id: str) -> Exception | None:
    """
    Make the exception of an earlier attempt anew, if its class is loaded; nothing is imported for it, and its code is not run.

    It says the same; what else it carried is gone, but for errors of this package, the errors of a `ValidationError`, and the
    members of an `ExceptionGroup`, as many as are kept: *task_id* is for those that cannot be made.
    """
    module, _, names = str(again.get("class", "")).partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        # not getattr: a module's own may import
        found = getattr(found, "__dict__", {}).get(name)
    if not isinstance(found, type) or not issubclass(found, Exception):
        return None
    try:
        if issubclass(found, ValidationError):
            return found.from_exception_data(again["title"], list(map(_detail, again["errors"])))
        if issubclass(found, ExceptionGroup):
            members = [_member_before(one, task_id) for one in again["members"]]
            new: Any = BaseExceptionGroup.__new__
            return _saying(found, failure.message, lambda kind: new(kind, again["message"], members))
        error = _saying(found, failure.message, lambda kind: _bare(kind, failure.message))
        if issubclass(found, TaskError):
            error.__dict__.update({name: again[name] for name in ("task_id", "reason") if name in again})
            if "failure" in again:
                error.__dict__["failure"] = Failure.model_validate(again["failure"])
            if "evidence" in again:
                error.__dict__["evidence"] = Evidence.model_validate(again["evidence"])
    except Exception:
        return None
    return error


def _detail(written: Mapping[str, Any]) -> InitErrorDetails:
    """Return what pydantic makes one error of: of a type it does not know, or that says something else now, the words alone."""
    kind, about, said = written["type"], written["ctx"], written["msg"]
    place: InitErrorDetails = {"type": kind, "loc": tuple(written["loc"]), "input": written["input"]}
    with contextlib.suppress(Exception):
        if PydanticKnownError(kind, about or None).message() == said:
            return {**place, "ctx": about}
    custom = PydanticCustomError(kind, said, about or None)
    return {**place, "type": custom if custom.message() == said else PydanticCustomError(kind, said)}


def _member_before(member: Mapping[str, Any], task_id: str) -> Exception:
    failure = Failure(type=member["type"], message=member["message"])
    made = as_before(failure, member["again"], task_id)
    return made or StepFailed(f"{failure.type}: {failure.message}", task_id=task_id, failure=failure)


def _bare(kind: type[Exception], message: str) -> Exception:
    """Make an exception without what its class does when one is made: by the nearest that is not written in Python."""
    makers = (vars(base).get("__new__") for base in kind.__mro__)
    error: Exception = next(made for made in makers if isinstance(made, BuiltinFunctionType))(kind)
    error.args = (message,)
    return error


def _saying(kind: type[Exception], message: str, make: Callable[[type[Exception]], Exception]) -> Exception:
    """Make an exception that says *message*; of a class with words of its own, as one that has those."""
    error = make(kind)
    if kind.__str__ in _PLAIN and str(error) == message:
        return error
    named = {"__str__": lambda _: message, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return make(type(kind.__name__, (kind,), named))
