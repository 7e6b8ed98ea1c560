"""Owns what the commands share of their options: the file, and words of the domain, imported when they are needed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import stored

if TYPE_CHECKING:
    from ..models import Scope

__all__ = [
    "chosen_db",
    "db_option",
    "given_db",
    "json_option",
    "most_of",
    "names_of_task",
    "required_db",
    "scope_of",
    "since_of",
    "span_in",
    "storable",
    "text_of",
    "words",
]

C = TypeVar("C", bound=Callable[..., Any])

_ENV_DB = "LASH_STORE_DB"
_KEY = "lash_store.cli.db"


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    # the group and its commands share `meta`; the command's own option is read last, and wins
    if value is not None:
        ctx.meta[_KEY] = value


def db_option(command: C) -> C:
    """Give a command ``--db FILE``; read it with `required_db`, `given_db` or `chosen_db`."""
    text = f"The store's file. [env var: {_ENV_DB}]"
    # a file that may not be read is no wrong usage: it is met when it is opened, however it was named
    path = click.Path(readable=False)
    option = click.option("--db", metavar="FILE", help=text, expose_value=False, callback=_remember, type=path)
    return option(command)


def json_option(text: str) -> Callable[[C], C]:
    """Give a command ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def chosen_db(ctx: click.Context) -> str | None:
    """Return what ``--db`` said, or None; the environment is not asked."""
    value = ctx.meta.get(_KEY)
    return None if value is None else str(value)


def given_db(ctx: click.Context) -> str | None:
    """Return the file to look at, from ``--db`` or else the environment, or None."""
    return chosen_db(ctx) or os.environ.get(_ENV_DB) or None


def required_db(ctx: click.Context) -> str:
    """Return the file to look at; without one, the usage is wrong."""
    path = given_db(ctx)
    if path is None:
        raise click.UsageError(f"no file given: use --db FILE, or set {_ENV_DB}", ctx)
    return path


def words(enum: str) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], tuple[StrEnum, ...]]:
    """Return an option's callback that reads words of an enum of `lash_store.models`, which is imported only then."""

    def read(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[StrEnum, ...]:
        if not values:
            return ()
        from .. import models

        known: type[StrEnum] = getattr(models, enum)
        for value in values:
            if value not in [*known]:
                raise click.BadParameter(f"{value!r} is not one of {', '.join(known)}", ctx, param)
        return tuple(known(value) for value in values)

    return read


def scope_of(ctx: click.Context, param: click.Parameter | None, value: str | None) -> Scope | None:
    """Read a session, written ``runtime:session``; an option's callback."""
    if value is None:
        return None
    from ..errors import InvalidId
    from ..models import Scope

    try:
        return Scope.parse(value)
    except InvalidId as error:
        raise click.BadParameter(str(error), ctx, param) from error


def names_of_task(ctx: click.Context, names: tuple[str, ...]) -> tuple[Scope | None, str]:
    """Read the arguments ``[SCOPE] ID``."""
    if len(names) > 2:
        raise click.UsageError(f"{ctx.info_name} takes SCOPE and ID, or ID alone, not {len(names)} names", ctx)
    return (scope_of(ctx, None, names[0]) if len(names) == 2 else None), names[-1]


def most_of(limit: int | None) -> int:
    """Return what ``--limit`` means to SQLite, where no limit is -1, and a number has 64 bits."""
    return -1 if limit is None else min(limit, 2**62)


def storable(value: str) -> bool:
    """Say whether text could be in a file at all; what a shell passes on need not be UTF-8."""
    return "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)


def text_of(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Read text to look for, which must be some that a file can hold; an option's callback."""
    if value is None:
        return None
    if not value or not storable(value):
        raise click.BadParameter("it is empty, or has characters that no file holds", ctx, param)
    return value


_SPAN = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([smhdw])", re.ASCII)
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def span_in(value: str) -> float | None:
    """Return the seconds in a span of time such as ``90s``, ``2h`` or ``1d12h``; None for what is none."""
    if not value or _SPAN.sub("", value):
        return None
    return sum(float(count) * _UNITS[unit] for count, unit in _SPAN.findall(value))


def since_of(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """
    Read how long ago (``90s``, ``2h``, ``1d12h``), or a time in ISO 8601, UTC if it names no zone; an option's callback.

    Returns the time as the file writes it.
    """
    if value is None:
        return None
    try:
        span = span_in(value)
        at = datetime.fromisoformat(value) if span is None else datetime.now(UTC) - timedelta(seconds=span)
        at = (at if at.tzinfo else at.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(
            f"{value!r} is neither a span such as 90s, 2h or 1d12h nor a time such as 2025-01-31T09:30", ctx, param
        ) from error
    return stored(at)
