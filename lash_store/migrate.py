"""Owns the file's revision: current, head, upgrade and downgrade through Alembic's API, each in one transaction."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from . import database, guards
from .errors import SchemaError
from .owners import Life, life_of
from .queries import ALL_OPEN_OWNERS, OwnerRow
from .schema import HEAD, VERSION_TABLE

if TYPE_CHECKING:
    from alembic.config import Config
    from sqlalchemy.engine import Connection

__all__ = ["current", "downgrade", "head", "prepare", "transaction", "upgrade"]

log = logging.getLogger(__name__)

_alembic = threading.Lock()
"""Alembic keeps global state: one run at a time in a process."""

_PATIENCE = 30.0


def current(path: str | os.PathLike[str]) -> str | None:
    """Return the revision of the file, or None before the first; changes nothing."""
    return database.probe(guards.resolve(path))


def head() -> str:
    """Return the newest revision in the migrations that came with this package."""
    from alembic.script import ScriptDirectory

    found = ScriptDirectory.from_config(_config()).get_current_head()
    if found is None:
        raise SchemaError("the migrations of this package are missing: install it again")
    return found


def prepare(path: Path) -> None:
    """
    Make sure the file exists and is at head: born now, as it was, or upgraded.

    Raises:
        NotAStore, SchemaTooNew, StorageCorrupt: refused, with the file as it was.
    """
    upgrade(path)
    guards.make_private(path)


def make(path: Path, fill: Callable[[Path], None]) -> None:
    """
    Make a new file: born and filled under another name, then named, so that nobody ever sees half of it.

    A kill leaves nothing but a file that the next one to try removes.
    """
    with guards.alone(path, _PATIENCE):
        if database.has_content(path):
            return
        made = Path(f"{path}-making")
        for left in (made, *database.side_files(made), *database.side_files(path)):
            left.unlink(missing_ok=True)
        database.bear(made)
        fill(made)
        made.rename(path)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def upgrade(path: str | os.PathLike[str], revision: str = "head") -> None:
    """
    Bring the file to *revision* in one transaction; a crash leaves the old one. A file that is not there is made.

    The file from before an upgrade is kept beside it, as ``<file>-<revision>.backup``.

    Raises:
        NotAStore, SchemaTooNew, StorageCorrupt: refused, with the file as it was.
        SchemaError: it is open elsewhere, in a process that an upgrade would break.
    """
    path = guards.resolve(path)
    guards.check_target(path, writing=True)
    target = HEAD if revision == "head" else revision
    if not database.has_content(path):
        make(path, lambda made: _run(made, lambda config: _command().upgrade(config, revision), target))
    elif database.probe(path) != target:
        _run(path, lambda config: _command().upgrade(config, revision), target)


def downgrade(path: str | os.PathLike[str], revision: str) -> None:
    """Take the file back to *revision* in one transaction; ``base`` leaves a store without tables."""
    _run(guards.resolve(path), lambda config: _command().downgrade(config, revision))


def _command() -> ModuleType:
    # most openings find a file at head, and need not wait for Alembic to be imported
    from alembic import command

    return command


def _run(path: Path, action: Callable[[Config], object], target: str | None = None) -> None:
    from alembic.util import CommandError

    config = _config()
    logger = logging.getLogger("alembic")
    with _alembic:
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            with transaction(path, target) as connection:
                config.attributes["connection"] = connection
                action(config)
        except CommandError as error:
            raise SchemaError(f"{path}: {error}: install the lash_store that made it; nothing was changed") from error
        finally:
            logger.setLevel(level)


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


@contextmanager
def transaction(path: Path, target: str | None = None) -> Iterator[Connection]:
    """
    Give an SQLAlchemy connection inside one ``BEGIN IMMEDIATE``, with Alembic's version table made; commit at the end.

    On the way up to *target*, a file that somebody else has brought there meanwhile is let be, and an older one is kept.

    Raises:
        SchemaError: the revisions left rows without their parents; nothing is committed.
        SchemaTooNew, NotAStore: the file is not one this package may change.
    """
    import sqlalchemy.exc
    from sqlalchemy.pool import StaticPool

    kept: list[Path] = []
    raw = _open(path)
    engine = sqlalchemy.create_engine("sqlite://", creator=lambda: raw, poolclass=StaticPool)
    try:
        # SQLAlchemy looks around at its first connect and rolls back: before our BEGIN, or it would end it
        with engine.connect() as connection:
            # with foreign keys on, a revision that rebuilds a table would take the children with it
            raw.execute("PRAGMA foreign_keys=OFF").fetchall()
            # SQLAlchemy's side of the same transaction: Alembic then leaves the commit to us
            with connection.begin():
                _begin(raw)
                revision = database.read_revision(raw, path)
                database.check_revision(revision, path)
                if target is None or revision != target:
                    _refuse_beside_owners(raw, path)
                    if target is not None and revision is not None:
                        kept.append(_keep(path, revision))
                # STRICT, which Alembic's own would not be
                raw.execute(
                    f"CREATE TABLE IF NOT EXISTS {VERSION_TABLE} (version_num TEXT NOT NULL PRIMARY KEY) STRICT"
                )
                yield connection
                orphans = raw.execute("PRAGMA foreign_key_check").fetchall()
                if orphans:
                    raise SchemaError(
                        f"{path}: the revision leaves rows without parents, {orphans[:3]}: nothing was changed"
                    )
    except BaseException as error:
        for backup in kept:
            backup.unlink(missing_ok=True)
        if isinstance(error, sqlite3.Error):
            database.raise_translated(error, path)
        if isinstance(error, sqlalchemy.exc.DBAPIError):
            raise database.translate(error.orig or error, path) from error
        raise
    else:
        for backup in kept:
            log.info("upgraded", extra={"path": str(path), "backup": str(backup)})
    finally:
        if raw.in_transaction:
            raw.execute("ROLLBACK")
        engine.dispose()
        raw.close()


def _keep(path: Path, revision: str) -> Path:
    """Copy the file as it is before an upgrade, through SQLite, under a name nothing has yet; whole or not at all."""
    backup = Path(f"{path}-{revision}.backup")
    number = 1
    while backup.exists():
        number += 1
        backup = Path(f"{path}-{revision}.backup-{number}")
    made = Path(f"{path}-backup-making")
    made.unlink(missing_ok=True)
    guards.create_private(made)
    with closing(database.open_sqlite(path, "read")) as source, closing(sqlite3.connect(made)) as copy:
        source.backup(copy)
    made.rename(backup)
    _sync_folder(path.parent)
    return backup


def _refuse_beside_owners(raw: sqlite3.Connection, path: Path) -> None:
    if not raw.execute("SELECT 1 FROM sqlite_schema WHERE name = 'owners'").fetchall():
        return
    found = map(OwnerRow._make, raw.execute(ALL_OPEN_OWNERS).fetchall())
    alive = [str(owner.pid) for owner in found if life_of(path, owner) is not Life.DEAD]
    if alive:
        raise SchemaError(f"{path} is open in process {', '.join(alive)}: close it there first; nothing was changed")


def _open(path: Path) -> sqlite3.Connection:
    try:
        return database.open_sqlite(path, "write")
    except sqlite3.Error as error:
        database.raise_translated(error, path)


def _begin(raw: sqlite3.Connection) -> None:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            raw.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if database.primary_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.002)
