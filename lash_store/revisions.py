"""Owns what the revisions are: their scripts, what a file of each has in it, how they are run on a connection; opens no file."""

from __future__ import annotations

import functools
import logging
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import SchemaError
from .identity import VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy.engine import Connection

__all__ = [
    "BASE",
    "MAKE_VERSION_TABLE",
    "Revision",
    "Shape",
    "bring",
    "head",
    "known",
    "memory",
    "position",
    "shape",
    "shapes",
]

BASE = "base"
"""Where a store has no tables yet: before the first revision."""

_alembic = threading.RLock()
"""Alembic keeps global state: one run at a time in a process."""


class Revision(NamedTuple):
    """A script: what it is about, and what its downgrade says of itself."""

    revision: str
    title: str
    undoing: str


class Shape(NamedTuple):
    """What a file of a revision has in it: its objects as kind and name, and the default of each column of its tables."""

    objects: frozenset[tuple[str, str]]
    columns: Mapping[str, Mapping[str, str]]


# --- the scripts ----------------------------------------------------------------------------------------------------


def head() -> str:
    """Return the newest revision in the migrations that came with this package."""
    found = _directory().get_current_head()
    if found is None:
        raise SchemaError("the migrations of this package are missing: install it again")
    return found


def known() -> tuple[Revision, ...]:
    """Return every revision, the oldest first."""
    found = [
        Revision(script.revision, script.doc, (script.module.downgrade.__doc__ or "").strip().partition("\n")[0])
        for script in _directory().walk_revisions()
    ]
    return tuple(reversed(found))


def position(revision: str) -> int:
    """
    Return how many revisions *revision* is from the base, for comparing.

    Raises:
        SchemaError: there is no such revision.
    """
    names = [BASE, *(script.revision for script in known())]
    if revision not in names:
        raise SchemaError(f"there is no revision {revision!r}: this lash_store has {', '.join(names[1:])}")
    return names.index(revision)


def _directory() -> ScriptDirectory:
    from alembic.script import ScriptDirectory

    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    return config


def _scripts() -> Path:
    try:
        return Path(str(files("lash_store.migrations")))
    except ModuleNotFoundError:
        # a checkout whose package is imported where it lies, before any that is installed
        return Path(__file__).parent.parent / "migrations"


# --- running them ---------------------------------------------------------------------------------------------------


def bring(connection: Connection, revision: str, *, down: bool = False) -> None:
    """
    Run the scripts up or down to *revision* on a connection whose transaction is open; commit nothing.

    Raises:
        SchemaError: they do not fit what is there.
    """
    import sqlalchemy.exc
    from alembic import command
    from alembic.util import CommandError

    config = _config()
    config.attributes["connection"] = connection
    logger = logging.getLogger("alembic")
    with _alembic:
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            (command.downgrade if down else command.upgrade)(config, revision)
        except CommandError as error:
            raise SchemaError(f"{error}: install the lash_store that made the file; nothing was changed") from error
        except sqlalchemy.exc.DBAPIError as error:
            if getattr(error.orig, "sqlite_errorcode", None) != sqlite3.SQLITE_ERROR:
                raise
            raise SchemaError(
                f"the file's own schema is in the way of revision {revision} ({error.orig}): "
                "somebody changed it by hand; nothing was changed"
            ) from error
        finally:
            logger.setLevel(level)


MAKE_VERSION_TABLE = f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} (version_num TEXT NOT NULL PRIMARY KEY) STRICT"
"""Alembic's version table, which its own statement would not make STRICT."""


@contextmanager
def through_sqlalchemy(raw: sqlite3.Connection) -> Iterator[Connection]:
    """Give an SQLAlchemy connection on *raw*, which its caller closes."""
    import sqlalchemy
    from sqlalchemy.pool import StaticPool

    engine = sqlalchemy.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    # SQLAlchemy looks around at its first connect and rolls back: before any BEGIN of ours, or it would end it
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        if raw.in_transaction:
            raw.execute("ROLLBACK")
        engine.dispose()


@contextmanager
def memory() -> Iterator[tuple[sqlite3.Connection, Connection]]:
    """Give a database in memory, for a trial of scripts, and SQLAlchemy's side of it, in a transaction."""
    with (
        closing(sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)) as raw,
        through_sqlalchemy(raw) as connection,
        connection.begin(),
    ):
        raw.execute("BEGIN")
        yield raw, connection


# --- what is in a file of each --------------------------------------------------------------------------------------


def shape(revision: str | None) -> Shape:
    """Return what a file of *revision* has in it; of None, or a revision this package does not have, nothing."""
    return _EMPTY if revision is None else shapes().get(revision, _EMPTY)


_EMPTY = Shape(frozenset(), {})


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """Return the shape of every revision, as a trial of the scripts in memory made it."""
    from alembic.migration import MigrationContext
    from alembic.operations import Operations

    found = {BASE: _EMPTY}
    # not through an environment: Alembic's own command may have one open, and there is only one at a time
    with _alembic, memory() as (raw, connection), Operations.context(MigrationContext.configure(connection)):
        for script in reversed([*_directory().walk_revisions()]):
            script.module.upgrade()
            found[script.revision] = read_shape(raw)
    return found


def read_shape(raw: sqlite3.Connection) -> Shape:
    """Return the shape of the database under *raw*, whatever it has in it."""
    objects = frozenset(
        (str(kind), str(name))
        for kind, name in raw.execute(
            "SELECT type, name FROM sqlite_schema WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
        )
        if name != VERSION_TABLE
    )
    columns = {
        name: {
            str(column): "NULL" if default is None else str(default)
            for column, default in raw.execute("SELECT name, dflt_value FROM pragma_table_info(?)", (name,))
        }
        for kind, name in sorted(objects)
        if kind == "table"
    }
    return Shape(objects, columns)
