"""What worker processes run that keep a file safe, and are killed at it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lash_store import copies, restoring
from tests.acceptance.processes import Report

_TOUCHING = ("link", "unlink", "rename", "replace", "fsync", "ftruncate", "fchmod")
"""How a restore touches files beside SQLite; `pathlib` calls these, too."""


async def back_up(report: Report, path: str, target: str) -> None:
    """Copy a file, say how far that is, and stay in the middle."""

    def progress(done: int, pages: int) -> None:
        report("copied", done, pages)
        if done < pages:
            signal.pause()

    await asyncio.to_thread(copies.back_up, Path(path), Path(target), progress)
    report("made")


async def restore(report: Report, backup: str, path: str) -> None:
    """Put a backup back."""
    report("begins")
    restoring.restore(Path(backup), Path(path))
    report("restored")


async def restore_until(report: Report, backup: str, path: str, at: int) -> None:
    """Put a backup back, and die of SIGKILL before the *at*-th time that files are touched."""
    touched = 0

    def counting(touch: Callable[..., Any]) -> Callable[..., Any]:
        def count(*arguments: Any, **options: Any) -> Any:
            nonlocal touched
            touched += 1
            if touched == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return touch(*arguments, **options)

        return count

    for name in _TOUCHING:
        setattr(os, name, counting(getattr(os, name)))
    restoring.restore(Path(backup), Path(path))
    report("restored")
