"""Owns what the commands share of their options: the file, and words of the domain; imports the domain when it is needed."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ..models import Scope

__all__ = ["ScopeType", "Words", "chosen_db", "db_option", "json_option", "required_db"]

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


class Words(click.ParamType):
    """One word of an enum of `lash_store.models`, named so that building a command does not import it."""

    def __init__(self, enum: str) -> None:
        self.name = enum

    def _enum(self) -> type[StrEnum]:
        from .. import models

        found: type[StrEnum] = getattr(models, self.name)
        return found

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> StrEnum:
        """Return the member of that word, or say which words there are."""
        words = self._enum()
        try:
            return words(value)
        except ValueError:
            self.fail(f"{value!r} is not one of {', '.join(words)}", param, ctx)


class ScopeType(click.ParamType):
    """A session, written ``runtime:session``."""

    name = "scope"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Scope:
        """Return the scope, or say how one is written."""
        from ..errors import InvalidId
        from ..models import Scope

        if isinstance(value, Scope):
            return value
        try:
            return Scope.parse(value)
        except InvalidId as error:
            self.fail(str(error), param, ctx)
