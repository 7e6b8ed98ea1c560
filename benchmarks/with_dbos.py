"""
Owns how DBOS is configured where it is measured: on one SQLite file, as its documentation says, and as durable as lash_store.

DBOS leaves both PRAGMAs of durability to SQLite: ``synchronous`` is FULL, and ``journal_mode`` what the file says, DELETE if it
is new. A file that was put into WAL mode before stays in it, which is as durable as lash_store, and faster than as it comes.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .measuring import Missing

__all__ = ["AS_IT_COMES", "WAL", "find_dbos", "launch", "launch_again"]

WAL = "its file put into WAL mode first, synchronous=FULL; the rest as it comes"
AS_IT_COMES = "as it comes: SQLite's defaults, journal_mode=DELETE and synchronous=FULL"


def find_dbos() -> Any:
    """
    Return the class `DBOS`.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module("dbos").DBOS
    except ImportError:
        raise Missing("DBOS is not installed: pip install -e '.[bench]'") from None


@contextmanager
def launch(path: Path, journal_mode: str = "wal") -> Iterator[Any]:
    """
    Launch DBOS on a file, made if need be; what it is to run is registered before.

    Raises:
        RuntimeError: its connections are not as durable as asked for.
    """
    set_journal_mode(path, journal_mode)
    dbos = find_dbos()
    instance = dbos(config={"name": "bench", "system_database_url": f"sqlite:///{path}", "log_level": "WARNING"})
    try:
        dbos.launch()
        check(instance, journal_mode)
        yield dbos
    finally:
        dbos.destroy()


def set_journal_mode(path: Path, journal_mode: str) -> None:
    """Give a file, new or not, its journal mode; DBOS leaves it as it is."""
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA journal_mode={journal_mode}").fetchall()
    connection.close()


def launch_again(path: Path, define: Callable[[Any], Any], journal_mode: str = "wal") -> tuple[Any, Any]:
    """
    Launch DBOS on a file, new or not, with the workflows that *define* makes of it; return it and what *define* gave.

    It recovers, beside what follows, what a process left that was launched like this: with one version, as one program has.
    """
    set_journal_mode(path, journal_mode)
    dbos = find_dbos()
    instance = dbos(
        config={
            "name": "bench",
            "system_database_url": f"sqlite:///{path}",
            "application_version": "1",
            "executor_id": "local",
            "log_level": "ERROR",
        }
    )
    defined = define(dbos)
    dbos.launch()
    check(instance, journal_mode)
    return dbos, defined


def check(instance: Any, journal_mode: str) -> None:
    """Hold DBOS's own connections against what is said about them."""
    with instance._sys_db.engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    if found != [journal_mode, 2]:
        raise RuntimeError(f"DBOS runs with journal_mode and synchronous {found}, not {[journal_mode, 2]}")
