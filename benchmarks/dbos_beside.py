"""
Owns DBOS as it is measured here: on a SQLite file in WAL mode, with ``synchronous=FULL``, as durable as the other ways.

It comes up with a rollback journal; WAL is quicker, and stays with the file, so a user who looks for speed would set it.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .measuring import Missing

__all__ = ["DBOS_HOW", "launch", "load"]

DBOS_HOW = "DBOS on a SQLite file, journal_mode=WAL (it keeps that of the file), synchronous=FULL (its default)"


def load() -> Any:
    """
    Import DBOS.

    Raises:
        Missing: it is not installed.
    """
    try:
        return importlib.import_module("dbos")
    except ImportError:
        raise Missing("DBOS is not installed: pip install -e '.[bench]'") from None


def launch(path: Path, define: Callable[[Any], Any]) -> tuple[Any, Any]:
    """
    Launch DBOS on a file, new or not, with the workflows that *define* makes of it; return it and what *define* gave.

    It recovers, beside what follows, what a process left that was launched like this.
    """
    dbos = load().DBOS
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL").fetchall()
    connection.close()
    # the same version in each process, as it is of one and the same program: what is left is recovered by that alone
    dbos(
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
    return dbos, defined
