"""
Owns what the operating system tells of processes: which one is which, for good, and what is left of a group; ends groups.

A pid repeats, so a process is known by boot, pid and start time (proc(5), field 22). A group, and the session it is in, keep
their number for as long as one process of theirs lives. Everything here blocks: run it in a thread.
"""

from __future__ import annotations

import errno
import functools
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from .models import ProcessFate, ProcessIdentity

__all__ = ["boot_id", "end_group", "identify", "started", "survivors"]

TOKEN = "LASH_STORE_MONITOR"
"""The variable in whose value a monitor's processes carry what proves that they are its."""

_PATIENCE = 3.0
"""Seconds a killed group may take to go: one that hangs in the kernel takes as long as it likes."""

_PAUSES = (0.004, 0.05)
"""Seconds between looks at a group that is to end: first, and at most."""

_PROC = Path("/proc")


class Stat(NamedTuple):
    """One process, as the kernel has it. Its *state* is ``Z`` or ``X`` once its first thread has ended; others may go on."""

    pid: int
    state: str
    group: int
    session: int
    threads: int
    started: str

    @property
    def is_alive(self) -> bool:
        return self.state not in {"Z", "X"} or self.threads > 1


class _Look(NamedTuple):
    """What lives of a group at one look (None: it is not proven to be the same); whether its leader is there, if only dead."""

    alive: list[int] | None
    has_leader: bool


@functools.cache
def boot_id() -> str:
    """Return what names this boot of the machine; empty where nothing does."""
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:
        return ""


def started(pid: int) -> str | None:
    """Return the start time of a live process in clock ticks since boot; None for a zombie, and where nobody tells."""
    try:
        stat = _stat(pid)
    except OSError:
        return None
    return stat.started if stat is not None and stat.is_alive else None


def identify(pid: int, token: str) -> ProcessIdentity:
    """Return what names a process that leads a session of its own, as long as it has not been waited for."""
    stat = _stat(pid)
    return ProcessIdentity(
        pid=pid,
        group=pid,
        started="" if stat is None else stat.started,
        boot_id=boot_id(),
        host=platform.node(),
        namespace=_namespace(),
        token=token,
    )


def survivors(process: ProcessIdentity) -> list[int] | None:
    """
    Return what lives of a recorded process and its group, or its session, if it provably is the same; None if nothing proves it.

    The leader proves it by its start time, dead or alive; once somebody has waited for it, a member does by its environment.
    """
    return _look(process).alive


def _look(process: ProcessIdentity, *, is_proven: bool = False) -> _Look:
    """Look at a group; one that *is proven* to be the same stays so while anything of it lives."""
    here = boot_id()
    if process.boot_id != here or (not here and process.host != platform.node()):
        return _Look([], has_leader=False)
    if process.group <= 1:
        # nothing that was ever started here; somebody's hand may have written it
        return _Look([], has_leader=False)
    if process.namespace != _namespace():
        # its pid says nothing here: it may live where we cannot see it
        return _Look(None, has_leader=False)
    if not _PROC.joinpath("self").exists():
        alive = [process.group] if _answers(process.group) else []
        return _Look(alive if is_proven or not alive else None, has_leader=False)
    look = _look_once(process, _scan.all(), is_proven=is_proven)
    # who is started while one looks, by a member that has ended when it is looked at, is seen by the next
    return look if look.alive != [] else _look_once(process, _scan.all(), is_proven=is_proven)


def _look_once(process: ProcessIdentity, stats: Iterable[Stat], *, is_proven: bool) -> _Look:
    members = [stat for stat in stats if process.group in {stat.group, stat.session}]
    try:
        leader = next((stat for stat in members if stat.pid == process.pid), None) or _stat(process.pid)
    except PermissionError:
        # another user's, where they are hidden: it may be ours that has become somebody else
        return _Look(None, has_leader=False)
    if leader is not None and leader.started != process.started:
        # the number is another's by now, so nothing of ours has it any more
        return _Look([], has_leader=False)
    alive = [stat.pid for stat in members if stat.is_alive]
    if leader is None and alive and not is_proven and not any(_carries(pid, process.token) for pid in alive):
        return _Look(None, has_leader=False)
    return _Look(alive, has_leader=leader is not None)


def end_group(
    process: ProcessIdentity, grace: float, hurry: threading.Event | None = None, *, is_ours: bool = False
) -> ProcessFate:
    """
    End what is left of a recorded process: SIGTERM to the whole group, SIGKILL after *grace* seconds, or once told to *hurry*.

    Nothing is signalled that is not provably the same; a child that *is ours*, and not waited for, is. It returns when nothing of
    it lives, or some seconds after SIGKILL.
    """
    hurry = hurry or threading.Event()
    look = _look(process, is_proven=is_ours)
    if look.alive is None:
        return ProcessFate.UNPROVEN
    if look.alive and process.group in {os.getpgrp(), os.getsid(0)}:
        # who asks is one of them
        return ProcessFate.LEFT
    fate = ProcessFate.ENDED if look.alive else ProcessFate.GONE
    if look.alive and grace > 0 and not hurry.is_set():
        _signal(process, look.alive, signal.SIGTERM)
        _signal(process, look.alive, signal.SIGCONT)
        _wait_until_gone(process, grace, hurry)
    deadline = time.monotonic() + _PATIENCE
    for pause in _pauses():
        look = _look(process, is_proven=True)
        if not look.alive:
            if look.has_leader:
                # its number is nobody else's yet: whoever was started since the look goes as well
                _signal(process, [], signal.SIGKILL)
                look = _look(process, is_proven=True)
            if not look.alive:
                return fate
            fate = ProcessFate.ENDED
        if time.monotonic() >= deadline or not _signal(process, look.alive, signal.SIGKILL):
            return ProcessFate.LEFT
        time.sleep(pause)
    raise AssertionError("unreachable")


def _wait_until_gone(process: ProcessIdentity, grace: float, hurry: threading.Event) -> None:
    deadline = time.monotonic() + grace
    for pause in _pauses():
        left = deadline - time.monotonic()
        if left <= 0 or hurry.wait(min(pause, left)):
            return
        leader = _stat(process.pid)
        if leader is not None and leader.is_alive and leader.started == process.started:
            # as long as it lives, nobody need look at every process of the machine
            continue
        if not _look(process, is_proven=True).alive:
            return


def _pauses() -> Iterator[float]:
    pause, most = _PAUSES
    while True:
        yield pause
        pause = min(most, pause * 1.5)


def _signal(process: ProcessIdentity, members: list[int], what: signal.Signals) -> bool:
    """Signal a group at once, and who left it for another of the session; say whether that may be done."""
    allowed = _may(os.killpg, process.group, what)
    for pid in members:
        stat = _stat(pid)
        if stat is not None and stat.group != process.group and stat.session == process.group:
            allowed = _may(os.kill, pid, what) or allowed
    return allowed


def _may(kill: Callable[[int, int], None], whom: int, what: signal.Signals) -> bool:
    try:
        kill(whom, what)
    except ProcessLookupError:
        # it has gone by itself
        return True
    except PermissionError:
        return False
    return True


def _answers(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        # where there is no /proc, a group of zombies answers with the second
        return False
    return True


class _Scan:
    """Looks at every process of the machine, once for all threads that ask at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = 0.0
        self._found: list[Stat] = []

    def all(self) -> list[Stat]:
        """Return every process, as it was at some time after this was called."""
        asked = time.monotonic()
        with self._lock:
            if self._began <= asked:
                began = time.monotonic()
                self._found = _all()
                self._began = began
            return self._found

    def forget_in_child(self) -> None:
        """Learn that another thread, which a fork has left behind, may have been looking."""
        self._lock = threading.Lock()


_scan = _Scan()
os.register_at_fork(after_in_child=_scan.forget_in_child)


def _all() -> list[Stat]:
    stats = (_stat_if_shown(int(name)) for name in os.listdir(_PROC) if name.isdecimal())  # noqa: PTH208, a path a process costs too much
    return [stat for stat in stats if stat is not None]


def _stat_if_shown(pid: int) -> Stat | None:
    try:
        return _stat(pid)
    except PermissionError:
        # the system hides other users' processes
        return None


def _stat(pid: int) -> Stat | None:
    """Read one process; None if there is none. That it cannot be read is no answer, and is raised."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(descriptor, 4096).decode(errors="replace")
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}:
            return None
        raise
    # the name of the program stands in brackets, and may have brackets and spaces of its own
    fields = text.rpartition(")")[2].split()
    return Stat(pid, fields[0], int(fields[2]), int(fields[3]), int(fields[17]), fields[19])


def _carries(pid: int, token: str) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return False
    return f"{TOKEN}={token}".encode() in environment.split(b"\0")


@functools.cache
def _namespace() -> str:
    """Return what names the space our pids count in: another container has another."""
    try:
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115, it is a word, not a path
    except OSError:
        return ""
