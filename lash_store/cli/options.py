"""Owns what the commands share of their options: the file, and words of the domain, imported when they are needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..models import Scope

__all__ = ["chosen_db", "db_option", "json_option", "required_db", "scope_of", "words"]

C = TypeVar("C", bound=Callable[..., Any])

ENV_DB = "LASH_STORE_DB"
_KEY = "lash_store.cli.db"


def _remember(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    # the group and its commands share `meta`; the command's own option is read last, and wins
    if value is not None:
        ctx.meta[_KEY] = value


def db_option(command: C) -> C:
    """Give a command ``--db FILE``; read it with `required_db` or `chosen_db`."""
    text = f"The store's file. [env var: {ENV_DB}]"
    option = click.option("--db", metavar="FILE", help=text, expose_value=False, callback=_remember, type=click.Path())
    return option(command)


def json_option(text: str) -> Callable[[C], C]:
    """Give a command ``--json``, passed on as ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def chosen_db(ctx: click.Context) -> str | None:
    """Return what ``--db`` said, or None; the environment is not asked."""
    value = ctx.meta.get(_KEY)
    return None if value is None else str(value)


def required_db(ctx: click.Context) -> str:
    """Return the file to look at, from ``--db`` or else the environment."""
    path = chosen_db(ctx) or os.environ.get(ENV_DB)
    if not path:
        raise click.UsageError(f"no file given: use --db FILE, or set {ENV_DB}", ctx)
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
