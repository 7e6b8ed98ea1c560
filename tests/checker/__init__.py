"""
Checks a store's file, and what observers were told of it, against the promises of ``docs/promises.md``.

Plain `sqlite3` and a fold of its own: nothing of the package is imported, so that what is wrong there cannot be wrong here in
the same way. The file is opened read-only, and read in one transaction: a copy, or a live file from a process of its own.
"""

from __future__ import annotations

from .judging import Broken, Checker, check
from .log import Entry, outcome
from .promises import PROMISES, Promise

__all__ = ["PROMISES", "Broken", "Checker", "Entry", "Promise", "check", "outcome"]
