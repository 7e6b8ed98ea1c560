"""Owns how what a step came to is told again: arguments told apart, results by their type, failures by their class."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from pathlib import PurePath
from types import FunctionType
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

from pydantic import BaseModel, TypeAdapter

from .errors import ResultNotSerializable, StepFailed, TaskAbandoned, TaskCancelled, TaskError, TaskFailed
from .models import Evidence, Failure
from .queries import readable
from .registry import from_json, result_adapter

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


def to_raise_again(error: BaseException) -> dict[str, Any]:
    """Return what is needed beside the failure itself: the class, and what errors of ours carry."""
    again: dict[str, Any] = {"class": f"{type(error).__module__}:{type(error).__qualname__}"}
    if isinstance(error, TaskError):
        again["task_id"] = error.task_id
    if isinstance(error, TaskCancelled):
        again["reason"] = error.reason
    if isinstance(error, TaskFailed | StepFailed):
        again["failure"] = error.failure.model_dump(mode="json")
    if isinstance(error, TaskAbandoned):
        again["evidence"] = error.evidence.model_dump(mode="json")
    return again


def as_before(failure: Failure, again: Mapping[str, Any]) -> Exception | None:
    """
    Make the exception of an earlier attempt anew, if its class is loaded; nothing is imported for it, and its code is not run.

    It says the same; what else it carried is gone, but for errors of this package.
    """
    module, _, names = str(again.get("class", "")).partition(":")
    found: Any = sys.modules.get(module)
    for name in names.split("."):
        # not getattr: a module's own may import
        found = getattr(found, "__dict__", {}).get(name)
    if not isinstance(found, type) or not issubclass(found, Exception) or isinstance(found.__new__, FunctionType):
        return None
    try:
        error = _saying(found, failure.message)
        if issubclass(found, TaskError):
            error.__dict__.update({name: again[name] for name in ("task_id", "reason") if name in again})
            if "failure" in again:
                error.__dict__["failure"] = Failure.model_validate(again["failure"])
            if "evidence" in again:
                error.__dict__["evidence"] = Evidence.model_validate(again["evidence"])
    except Exception:
        return None
    return error


def _saying(kind: type[Exception], message: str) -> Exception:
    """Make an exception that says *message*; of a class with words of its own, as one that has those."""
    error = kind.__new__(kind)
    error.args = (message,)
    if kind.__str__ in {BaseException.__str__, OSError.__str__} and str(error) == message:
        return error
    named = {"__str__": lambda _: message, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    quoting: type[Exception] = type(kind.__name__, (kind,), named)
    error = quoting.__new__(quoting)
    error.args = (message,)
    return error
