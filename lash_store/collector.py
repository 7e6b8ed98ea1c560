"""
Owns a pause of Python's collector of cycles, for while very much is made at once that is to be kept.

The collector looks through all there is each time it has grown by so much, and finds nothing: for ten thousand tasks that are
taken over from a dead process, that is up to a quarter of the work. Mercurial does so, too (``mercurial.util.nogc``).
"""

from __future__ import annotations

import gc
import os
import threading

__all__ = ["Pause"]

_lock = threading.Lock()
_pauses = 0


class Pause:
    """A pause that `begin` makes, from any thread, and the end of the ``with`` block ends; what the program has off stays off."""

    def __init__(self) -> None:
        self._is_on = False
        self._is_over = False

    def __enter__(self) -> Pause:
        return self

    def begin(self) -> None:
        """Pause the collector, unless the block has ended or the program has it off anyway."""
        global _pauses
        with _lock:
            if self._is_on or self._is_over or not (_pauses or gc.isenabled()):
                return
            self._is_on = True
            _pauses += 1
            gc.disable()

    def __exit__(self, *_: object) -> None:
        global _pauses
        with _lock:
            self._is_over = True
            if self._is_on:
                self._is_on = False
                # a child that was forked meanwhile has none to end
                _pauses = max(0, _pauses - 1)
                if not _pauses:
                    gc.enable()


def _end_in_child() -> None:
    global _pauses
    try:
        if _pauses:
            _pauses = 0
            gc.enable()
    finally:
        _lock.release()


os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_end_in_child)
