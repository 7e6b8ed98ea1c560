"""Owns how a command runs: its event loop, and the shape in which what the package logs leaves it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from .output import complain

__all__ = ["run", "told_in_one_line"]


class _OneLine(logging.Handler):
    """Tells of what the package logs in the shape of an error, without a traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            error = record.exc_info[1] if record.exc_info else None
            complain(record.getMessage() if error is None else f"{record.getMessage()}: {error}")
        except Exception:
            # an exception whose message raises must not end who told of it
            self.handleError(record)


_COMPLAINTS = _OneLine(logging.WARNING)


def told_in_one_line() -> None:
    """Have what the package logs from here on told on stderr, a line each."""
    logging.getLogger("lash_store").addHandler(_COMPLAINTS)


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine to its end."""
    told_in_one_line()
    asyncio.run(work)
