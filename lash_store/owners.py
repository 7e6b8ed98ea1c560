"""
Owns the lock that says who is alive: one `flock`ed side file an opened store, held for its whole life.

The kernel drops it when the process dies, SIGKILL included, and keeps it while the process is merely stopped or slow. No
lease, no heartbeat, no time-out decides that an owner is dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import platform
import re
import secrets
import sqlite3
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path

from . import processes
from .errors import StorageError
from .guards import is_held, is_named, make_side_folder, side_folder
from .models import OwnerEnd
from .queries import ALL_OPEN_OWNERS, OwnerRow

__all__ = ["Life", "OwnerLock", "describe_process", "left_behind", "life_of", "open_owners", "pids_beside", "runs_on"]


class Life(StrEnum):
    """What the lock says of an owner. ``unreachable``: its file is gone, yet its process lives; not dead."""

    ALIVE = "alive"
    DEAD = "dead"
    UNREACHABLE = "unreachable"


_LOCK, _MAKING = ".lock", ".new"
"""How side files end: of one that is locked, and of one that is about to be."""

_PATIENCE = 1.0
"""Seconds that one who sweeps may hold what is about to be locked, which takes it microseconds."""

_TOKEN = re.compile(r"[\w-]+", re.ASCII)

_ours: dict[str, OwnerLock] = {}
"""The locks this process holds, by token."""

_outlived: dict[str, OwnerLock] = {}
"""Those it held, of stores that closed before all their bodies had ended."""


class OwnerLock:
    """The lock of one opened store. Take it before the owner's row is committed; drop it last."""

    def __init__(self, path: Path) -> None:
        self.token = f"o-{secrets.token_hex(10)}"
        self._database = path
        self.path = _side_file(path, self.token)
        self._descriptor = -1
        self._loop = asyncio.get_running_loop()
        self._runs: Callable[[int], bool] | None = None

    def acquire(self) -> None:
        """
        Make the side file and lock it.

        Raises:
            StorageError: the folder beside the database may not be written.
        """
        make_side_folder(self._database)
        try:
            self._descriptor = _create_locked(self.path)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be made and locked: {error.strerror}") from error
        _ours[self.token] = self

    def keep(self) -> None:
        """Make the side file again if somebody removed it: the descriptor's lock alone nobody can ask for."""
        if self._descriptor < 0 or self._is_named():
            return
        with contextlib.suppress(OSError, StorageError):
            make_side_folder(self._database)
            again = _create_locked(self.path)
            os.close(self._descriptor)
            self._descriptor = again

    def remove(self) -> None:
        """Unlink the side file; only inside a write transaction in which the owner's row is absent or ended."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def outlived(self, runs: Callable[[int], bool]) -> None:
        """Learn that the store closes, and bodies of it have not ended: *runs* says of a task whether it still has one."""
        for lock in [lock for lock in list(_outlived.values()) if lock.is_orphaned]:
            lock.ended()
        self._runs = runs
        _outlived[self.token] = self

    def ended(self) -> None:
        """Learn that the last body has ended which outlived the store."""
        _outlived.pop(self.token, None)

    def runs(self, task_seq: int) -> bool:
        """Whether a body of a task has outlived the store that took it."""
        return not self.is_orphaned and self._runs is not None and self._runs(task_seq)

    def release(self) -> None:
        """Drop the lock: from here on this owner is dead."""
        _ours.pop(self.token, None)
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def is_orphaned(self) -> bool:
        """Whether the event loop of the store that took it is closed: nothing of it can run any more."""
        return self._loop.is_closed()

    def _is_named(self) -> bool:
        try:
            named = self.path.lstat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._descriptor)
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def _forget_in_child(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _side_file(path: Path, token: str) -> Path:
    return side_folder(path) / f"{token}{_LOCK}"


def _is_token(token: object) -> bool:
    """Whether a row's token names a file in the folder of locks; what a hand wrote there could name anybody's."""
    return isinstance(token, str) and _TOKEN.fullmatch(token) is not None


def _create_locked(path: Path) -> int:
    # under another name first: whoever finds the file by its own name finds it locked
    made = path.with_suffix(_MAKING)
    deadline = time.monotonic() + _PATIENCE
    while True:
        descriptor = os.open(made, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # who sweeps may have come first
            if is_named(made, descriptor):
                made.rename(path)
                return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise
            time.sleep(0.001)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def life_of(path: Path, owner: OwnerRow) -> Life:
    """
    Say whether an owner of the database at *path* is alive; nothing is changed by asking.

    One whose token can name no file of ours never held a lock: somebody wrote it into the row.
    """
    if not _is_token(owner.token):
        return Life.DEAD
    ours = _ours.get(owner.token)
    if ours is not None:
        return Life.DEAD if ours.is_orphaned else Life.ALIVE
    try:
        return Life.ALIVE if is_held(_side_file(path, owner.token)) else Life.DEAD
    except OSError as error:
        # what cannot be looked at now has not died of that
        is_gone = error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
        return Life.UNREACHABLE if not is_gone or _process_lives(owner) else Life.DEAD


def runs_on(owner: OwnerRow, task_seq: int) -> bool:
    """
    Say whether the body of a task may still run whose owner closed without waiting for its end.

    Its own process knows; to any other it does for as long as that process lives.
    """
    ours = _outlived.get(owner.token)
    if ours is not None:
        return ours.runs(task_seq)
    return owner.end == OwnerEnd.CLOSED and owner.pid != os.getpid() and _process_lives(owner)


def open_owners(connection: sqlite3.Connection) -> list[OwnerRow]:
    """Return the owners that the database under *connection* names as open; none of one that is older than owners."""
    if not connection.execute(
        "SELECT 1 FROM sqlite_schema WHERE name = 'owners' AND type = 'table' AND rootpage > 0"
    ).fetchall():
        return []
    return [OwnerRow._make(row) for row in connection.execute(ALL_OPEN_OWNERS).fetchall()]


def pids_beside(connection: sqlite3.Connection, path: Path) -> list[int]:
    """Return the processes of those open owners that are not known to be dead."""
    return [owner.pid for owner in open_owners(connection) if life_of(path, owner) is not Life.DEAD]


def release_orphans(tokens: set[str]) -> None:
    """Drop the locks of this process whose event loop is closed, among owners found dead."""
    for lock in [lock for token, lock in list(_ours.items()) if token in tokens and lock.is_orphaned]:
        lock.release()


def left_behind(path: Path, known: Collection[str]) -> list[str]:
    """
    Return the tokens of side files that nobody holds, but for those that are *known*: in use, whoever holds them.

    A process that is killed after it made its file and before it committed its row leaves one, and so does a reader of notes.
    """
    found = set()
    # what cannot be looked at now is there the next time
    with contextlib.suppress(OSError):
        for side in side_folder(path).glob("o-*"):
            if side.suffix in {_LOCK, _MAKING} and side.stem not in known and not is_held(side):
                found.add(side.stem)
    return sorted(found)


def sweep(path: Path, tokens: list[str]) -> None:
    """
    Unlink the side files of owners that have ended; only inside a write transaction that sees them ended.

    A file whose lock somebody holds is left.
    """
    for token in filter(_is_token, tokens):
        side = _side_file(path, token)
        for one in (side, side.with_suffix(_MAKING)):
            with contextlib.suppress(OSError):
                descriptor = os.open(one, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    one.unlink()
                finally:
                    os.close(descriptor)


# --- processes ------------------------------------------------------------------------------------------------------


def describe_process() -> dict[str, str | int]:
    """
    Return what names this process beyond its pid, which repeats: host, boot and start time.

    Raises:
        StorageError: the system does not tell now.
    """
    pid = os.getpid()
    try:
        boot_id = processes.boot_id()
    except OSError as error:
        raise StorageError(f"this process cannot be told from others: {error}") from error
    return {
        "pid": pid,
        "process_start": processes.started(pid) or "",
        "boot_id": boot_id,
        "host": platform.node(),
    }


def _process_lives(owner: OwnerRow) -> bool:
    if owner.pid == os.getpid():
        # this process knows which owners it is: the row came with a copy
        return False
    if (owner.boot_id, owner.host) != (processes.boot_id(), platform.node()):
        return False
    if owner.pid <= 0:
        # those are groups, and everybody
        return False
    if owner.process_start:
        return processes.started(owner.pid) == owner.process_start
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        # no process has the number that a hand wrote there
        return False
    except PermissionError:
        return True
    return True


def _forget_in_child() -> None:
    # the lock belongs to the open file, which a child without exec shares: it must not keep a dead parent alive
    for lock in _ours.values():
        lock._forget_in_child()
    _ours.clear()
    _outlived.clear()


os.register_at_fork(after_in_child=_forget_in_child)
