"""Owns how a statement of SQLAlchemy Core becomes text, once, and the few idioms the statements share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Integer, Text, bindparam, func, literal_column, or_, select, text
from sqlalchemy.dialects.sqlite import dialect as sqlite_dialect
from sqlalchemy.sql.elements import ClauseElement

__all__ = ["ONE", "ZERO", "Hot", "hot", "names", "sql", "unclaimed", "values", "word"]

_DIALECT = sqlite_dialect(paramstyle="named")
_BY_POSITION = sqlite_dialect(paramstyle="qmark")


def sql(statement: ClauseElement) -> str:
    """Write a statement with its parameters by name."""
    compiled = statement.compile(dialect=_DIALECT)
    hidden = [name for name, value in compiled.params.items() if value is not None]
    assert not hidden, f"a value stands in the statement where a name should: {hidden}"
    return str(compiled)


class Hot(NamedTuple):
    """
    A statement run for every task, with its parameters by position: binding them by name costs half as much as SQLite itself.

    ``arrange`` takes them out of a mapping, in order.
    """

    sql: str
    arrange: Callable[[Mapping[str, Any]], tuple[Any, ...]]


def hot(statement: ClauseElement, prefix: str = "") -> Hot:
    """Write a statement with its parameters by position; their names may have a *prefix*."""
    compiled = statement.compile(dialect=_BY_POSITION)
    found = [name.removeprefix(prefix) for name in compiled.positiontup or ()]  # type: ignore[attr-defined]
    return Hot(str(compiled), itemgetter(*found))


def word(text: str) -> ColumnElement[str]:
    """Write a word of ours into a statement; a partial index is used only with a literal."""
    return literal_column(f"'{text}'", Text)


def values(column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
    """Match *column* against a JSON array bound as *name*: one statement for any number of values."""
    return column.in_(select(text("value")).select_from(func.json_each(bindparam(name))))


def names(values: Iterable[str | int]) -> str:
    """Write values for a parameter that is matched with a JSON array."""
    return json.dumps(sorted(values))


def unclaimed(claim: ColumnElement[Any], reader: ColumnElement[Any]) -> ColumnElement[bool]:
    """Match what no reader has now: its *claim* names none, or none whose own claim, JSON in the column *reader*, stands."""
    tokens = select(func.json_extract(reader, word("$.token"))).where(reader.is_not(None))
    return or_(claim.is_(None), claim.not_in(tokens))


ZERO: ColumnElement[int] = literal_column("0", Integer)
ONE: ColumnElement[int] = literal_column("1", Integer)
"""Numbers of ours in a statement; also the offset beside a limit, for which SQLAlchemy would bind a 0 of its own."""
