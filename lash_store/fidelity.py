"""Owns whether a value comes back from the JSON it is written as: what was read back is held against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence, Set
from datetime import datetime, time
from typing import Any

from pydantic import BaseModel, Secret, SecretBytes, SecretStr

__all__ = ["comes_back", "is_json"]

_LEAVES = frozenset({str, int, float, bool, type(None)})
_JSON = _LEAVES | {list, dict}


def is_json(value: Any) -> bool:
    """Say whether a value is made of nothing but JSON's own types: it is read back as it is."""
    kind = type(value)
    if kind is not list and kind is not dict:
        return kind in _LEAVES
    inner = value if kind is list else value.values()
    # leaves at once: this is asked of every part of a large value
    return _LEAVES.issuperset(map(type, inner)) or all(map(is_json, inner))


def comes_back(given: Any, read: Any) -> bool:
    """
    Say whether what was read back from JSON may stand for what was given.

    A type that does not say what makes two of it equal is believed. So is what has no type of its own to be read by: a moment in
    a ``dict[str, Any]`` is text ever after, a tuple in a ``Sequence`` a list. What it masks or leaves out does not come back.
    """
    if _is_equal(given, read):
        return True
    if isinstance(given, Secret | SecretStr | SecretBytes):
        return False
    if isinstance(given, BaseModel) and isinstance(read, BaseModel):
        more = zip((given.model_extra or {}).values(), (read.model_extra or {}).values(), strict=False)
        return _is_alike(given, read, type(read).model_fields) and all(comes_back(*pair) for pair in more)
    if dataclasses.is_dataclass(given) and dataclasses.is_dataclass(read):
        return _is_alike(given, read, [field.name for field in dataclasses.fields(read) if field.compare])
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        return len(given) == len(read) and all(map(comes_back, given.values(), read.values()))
    if _is_row(given) and _is_row(read):
        return len(given) == len(read) and all(map(comes_back, given, read))
    if type(given) is not type(read):
        return type(read) in _JSON or type(given) in _JSON
    # two moments of different zones may not be equal in the hour that a zone has twice; a set may be of what cannot be compared
    return isinstance(given, datetime | time | Set) or not _says_what_is_equal(type(given))


def _says_what_is_equal(kind: type) -> bool:
    return any("__eq__" in one.__dict__ for one in kind.__mro__ if one is not object)


def _is_equal(given: Any, read: Any) -> bool:
    try:
        return bool(given == read)
    except Exception:
        # an array, say, which compares its items: what it says when it is asked for one answer is its own
        return type(given) is type(read)


def _is_alike(given: Any, read: Any, fields: Collection[str]) -> bool:
    """Whether it was read back as its own class, or as one above it, whose fields alone were asked for."""
    return isinstance(given, type(read)) and all(
        comes_back(getattr(given, field, None), getattr(read, field, None)) for field in fields
    )


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
