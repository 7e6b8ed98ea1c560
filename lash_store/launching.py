"""
Owns how a process is started so that none runs unknown: it waits at a gate until it is recorded, and goes if nobody comes.

What is started is a small program that reads what it shall become from a pipe. Its other end is with us alone: should we die
before it is written to, the pipe ends, and so does the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import marshal
import os
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from .errors import StoreError
from .models import ProcessIdentity
from .processes import TOKEN, identify
from .programs import Program

__all__ = ["Exit", "Launched", "launch", "reap", "sweep"]

_GATE = """
import marshal, os, sys, _signal
gate, told = int(sys.argv[1]), int(sys.argv[2])
def take(size):
    data = b""
    while len(data) < size:
        part = os.read(gate, size - len(data))
        if not part:
            os._exit(0)
        data += part
    return data
program, arguments, environment = marshal.loads(take(int.from_bytes(take(8), "big")))
os.close(gate)
os.set_inheritable(told, False)
for name in ("SIGPIPE", "SIGXFSZ", "SIGXFZ"):
    if hasattr(_signal, name):
        _signal.signal(getattr(_signal, name), _signal.SIG_DFL)
try:
    os.execve(program, arguments, environment)
except OSError as error:
    os.write(told, str(error.errno).encode())
os._exit(127)
"""
"""What waits at the gate. Python ignores signals that a program of any other language expects to have: they are given back."""

_children: dict[int, tuple[subprocess.Popen[bytes], Launched, Callable[[], asyncio.AbstractEventLoop | None]]] = {}
"""The processes of this one that nobody has waited for yet, by pid, and their loop, which they may outlive."""


class Exit(int):
    """An exit status; negative: the signal that ended the process."""

    def __str__(self) -> str:
        if self >= 0:
            return f"exit status {int(self)}"
        return f"killed by signal {-self}{_SIGNALS.get(-self, '')}"


_SIGNALS = {int(one): f" ({one.name})" for one in signal.Signals}


@dataclass(slots=True)
class Launched:
    """
    A process that waits at its gate, and then is the program.

    *output* and *errors* are the ends of its pipes that are read, without blocking.
    """

    identity: ProcessIdentity
    output: int
    errors: int
    _program: Program
    _gate: int
    _told: int
    _closed: list[int] = field(default_factory=list)
    _using: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pid(self) -> int:
        return self.identity.pid

    def open_gate(self, give_up: threading.Event | None = None) -> None:
        """
        Let it become the program, and wait for that, unless it is told to *give up*.

        Raises:
            OSError: it could not.
        """
        program, give_up = self._program, give_up or threading.Event()
        environment = {**program.environment, TOKEN: self.identity.token}
        what = marshal.dumps(
            (
                os.fsencode(program.path),
                [os.fsencode(one) for one in program.arguments],
                {os.fsencode(name): os.fsencode(value) for name, value in environment.items()},
            )
        )
        try:
            self._write(len(what).to_bytes(8, "big") + what, give_up)
            self._close(self._gate)
            said = self._read_told(give_up)
        finally:
            self.shut_gate()
        if said:
            number = int(said)
            raise OSError(number, _why(number, program.path), program.path)

    def _write(self, data: bytes, give_up: threading.Event) -> None:
        view = memoryview(data)
        with contextlib.suppress(BrokenPipeError):
            # it is gone: how, its exit tells
            while view and _ready(self._gate, select.POLLOUT, give_up):
                with self._using:
                    if self._gate in self._closed:
                        return
                    view = view[os.write(self._gate, view) :]

    def _read_told(self, give_up: threading.Event) -> bytes:
        if not _ready(self._told, select.POLLIN, give_up):
            return b""
        with self._using:
            return b"" if self._told in self._closed else os.read(self._told, 16)

    def kill(self) -> None:
        """Kill it, and its group, at once; only before it is reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.identity.group, signal.SIGKILL)

    def shut_gate(self) -> None:
        """Let it go away, if it has not become the program yet."""
        self._close(self._gate)
        self._close(self._told)

    def close(self) -> None:
        """Close everything of it that is open here."""
        self.shut_gate()
        self._close(self.output)
        self._close(self.errors)

    def _close(self, descriptor: int) -> None:
        # a thread may be waiting at the gate, and must not meet what has its number next
        with self._using:
            if descriptor not in self._closed:
                self._closed.append(descriptor)
                os.close(descriptor)

    def forget_in_child(self) -> None:
        """Close it in a child that a fork has made, whose parent may have been doing something with it."""
        self._using = threading.Lock()
        self.close()

    def exit(self) -> Exit | None:
        """
        Return how it ended, without reaping it: until then, its number and its group's are nobody else's. None: it has not.

        Raises:
            ChildProcessError: somebody else has waited for it.
        """
        if not hasattr(os, "waitid"):
            status = _children[self.pid][0].poll() if self.pid in _children else None
            return None if status is None else Exit(status)
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return None
        return Exit(ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status)


def launch(program: Program, token: str, loop: asyncio.AbstractEventLoop | None = None) -> Launched:
    """
    Start what will become a program once its gate is opened: in a session and a group of its own, without standard input.

    *loop* is where it is supervised, if one is.

    Raises:
        StoreError: this process has no Python interpreter to wait at the gate.
        OSError: no process could be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        raise StoreError("monitors are started by a Python interpreter, and sys.executable names none")
    sweep()
    pipes: list[int] = []
    # a fork in another thread would keep the ends of the pipes open, and so the gate
    with _forks:
        try:
            for _ in range(4):
                pipes += _pipe()
            gate_read, gate, told, told_write, output, output_write, errors, errors_write = pipes
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GATE, str(gate_read), str(told_write)],
                stdin=subprocess.DEVNULL,
                stdout=output_write,
                stderr=errors_write,
                pass_fds=(gate_read, told_write),
                cwd=program.cwd,
                start_new_session=True,
            )
        except BaseException:
            _close_all(pipes)
            raise
        _close_all((gate_read, told_write, output_write, errors_write))
        ours = (gate, told, output, errors)
        try:
            identity = identify(child.pid, token)
            for descriptor in ours:
                os.set_blocking(descriptor, False)
        except BaseException:
            # who cannot be named must not run; its gate ends with the pipe
            _close_all(ours)
            child.wait()
            raise
        launched = Launched(identity, output, errors, program, gate, told)
        _children[child.pid] = child, launched, (lambda: None) if loop is None else weakref.ref(loop)
    return launched


def _close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _why(number: int, path: str) -> str:
    """Say why a program could not be executed that is there."""
    if number == errno.ENOENT and Path(path).exists():
        return f"{os.strerror(number)}: the interpreter that its first line names"
    if number == errno.ENOEXEC:
        return f"{os.strerror(number)}: begin it with #! and an interpreter, or use shell=True"
    return os.strerror(number)


def _pipe() -> tuple[int, int]:
    """Make a pipe whose ends are no standard stream, even if this process has closed its own."""
    made = os.pipe()
    if min(made) > 2:
        return made
    read, write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in made)
    for end in made:
        os.close(end)
    return read, write


def reap(pid: int) -> None:
    """Wait for a process of ours that has ended, so that nothing is left of it, nor open here; another's is let be."""
    found = _children.get(pid)
    if found is not None and found[0].poll() is not None:
        found[1].close()
        _children.pop(pid, None)


def sweep() -> None:
    """Let go of what loops that are closed have left: nobody opens those gates any more, nor reads those pipes."""
    for pid, (_, launched, its_loop) in list(_children.items()):
        loop = its_loop()
        if loop is not None and loop.is_closed():
            launched.close()
            reap(pid)


def _ready(descriptor: int, event: int, give_up: threading.Event) -> bool:
    """Wait until a pipe can be written or read, and say so; not once it is given up."""
    poll = select.poll()
    poll.register(descriptor, event)
    while not give_up.is_set():
        if poll.poll(50):
            return True
    return False


def _forget_in_child() -> None:
    # a copy of a gate's end would keep it from falling when its owner dies
    try:
        for _, launched, _ in _children.values():
            launched.forget_in_child()
        _children.clear()
    finally:
        _forks.release()


_forks = threading.Lock()
os.register_at_fork(before=_forks.acquire, after_in_parent=_forks.release, after_in_child=_forget_in_child)
