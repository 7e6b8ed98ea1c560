"""Owns how a command reads a file with `sqlite3` alone: no SQLAlchemy, no pydantic, no store; never writes."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from .. import guards
from ..errors import SchemaTooOld, StorageError

__all__ = ["Plain", "newest_revision", "reading"]

_APPLICATION_ID = int.from_bytes(b"lash")
_VERSION_TABLE = "lash_store_version"
_PATIENCE = 5_000


class Plain(NamedTuple):
    """A file that is read: its connection, and its revision."""

    connection: sqlite3.Connection
    revision: str


def newest_revision() -> str:
    """Return the revision that this package reads and writes: that of its newest migration."""
    names = (entry.name for entry in files("lash_store.migrations").joinpath("versions").iterdir())
    return max(name[:4] for name in names if name[:4].isdecimal() and name.endswith(".py"))


@contextmanager
def reading(path: str, *, at_head: bool) -> Iterator[Plain]:
    """
    Open a file to read it, beside live owners or on a copy, for as long as the block takes.

    With *at_head* an older one is refused, too: what is to be read may not be there.

    Raises:
        NotAStore, SchemaTooNew, SchemaTooOld, StorageCorrupt, StorageError: the file is refused, and as it was.
    """
    resolved = guards.resolve(path)
    if not guards.check_target(resolved, writing=False):
        raise StorageError(f"{resolved} does not exist: check the path")
    try:
        with closing(_open(resolved)) as connection:
            head = newest_revision()
            revision = _revision(connection)
            if revision is None or revision > head:
                # whatever it is, the package has a word for it
                from ..database import probe

                revision = probe(resolved)
            if revision is None or (at_head and revision != head):
                raise SchemaTooOld(
                    f"{resolved} is at revision {revision or 'none'}, this lash_store knows {head}: "
                    "open it once with TaskStore to upgrade it"
                )
            yield Plain(connection, revision)
    except sqlite3.Error as error:
        from ..database import translate

        raise translate(error, resolved) from error


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, isolation_level=None)
    try:
        # what somebody's hand put into a row, UTF-8 or not, is to be seen
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        for pragma in (f"busy_timeout={_PATIENCE}", "trusted_schema=OFF", "query_only=ON"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _revision(connection: sqlite3.Connection) -> str | None:
    """Return the revision of a file, or None if it has none, or is none of ours."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != _APPLICATION_ID:
        return None
    found = connection.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (_VERSION_TABLE,)).fetchall()
    rows = connection.execute(f"SELECT version_num FROM {_VERSION_TABLE}").fetchall() if found else []
    return str(rows[0][0]) if rows else None
