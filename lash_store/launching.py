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
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .errors import InvalidArguments, StoreError
from .models import ProcessIdentity
from .processes import TOKEN, identify

__all__ = ["INHERITED", "Exit", "Launched", "Program", "environment", "launch", "reap", "resolve", "sweep"]

INHERITED = (
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "SHELL",
    "LANG",
    "LANGUAGE",
    "LC_ALL",
    "LC_CTYPE",
    "LC_MESSAGES",
    "TZ",
    "TMPDIR",
    "TERM",
)
"""What a monitor's process has of its owner's environment, beside what its spec says; keys and tokens are not among it."""

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

_children: dict[int, tuple[subprocess.Popen[bytes], Launched, asyncio.AbstractEventLoop | None]] = {}
"""The processes of this one that nobody has waited for yet, by pid; they may outlive the loop that started them."""


@dataclass(frozen=True, slots=True)
class Program:
    """What is to be run: the executable's path, its arguments (the first is its name), its folder and whole environment."""

    path: str
    arguments: tuple[str, ...]
    cwd: str
    environment: Mapping[str, str]


class Exit(int):
    """An exit status; negative: the signal that ended the process."""

    def __str__(self) -> str:
        if self >= 0:
            return f"exit status {int(self)}"
        return f"killed by signal {-self}{_SIGNALS.get(-self, '')}"


_SIGNALS = {int(one): f" ({one.name})" for one in signal.Signals}


def environment(env: Mapping[str, str], also: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what a process is given: what is `INHERITED`, the variables *also* named, and those of *env*."""
    inherited = {name: os.environ[name] for name in (*INHERITED, *also) if name in os.environ}
    return {**inherited, **env}


def resolve(command: tuple[str, ...], cwd: str, env: Mapping[str, str]) -> Program:
    """
    Find the program a command names, by the PATH of its own environment, and its folder.

    Raises:
        InvalidArguments: there is no such program, or no such folder, or it may not be used.
    """
    try:
        return _resolve(command, cwd, env)
    except OSError as error:
        raise InvalidArguments(
            f"{command[0]!r} in {cwd!r} cannot be run: {error.strerror}: give other paths"
        ) from error


def _resolve(command: tuple[str, ...], cwd: str, env: Mapping[str, str]) -> Program:
    if not Path(cwd).is_dir():
        what = "is not a folder" if Path(cwd).exists() else "does not exist"
        raise InvalidArguments(f"the folder {cwd!r} {what}: give cwd= another")
    if not os.access(cwd, os.X_OK):
        raise InvalidArguments(f"the folder {cwd!r} may not be entered: give cwd= one that may")
    name = command[0]
    if os.sep in name:
        found = str(Path(cwd) / name)
        if not Path(found).is_file():
            what = "is not a file" if Path(found).exists() else f"does not exist in {cwd!r}"
            raise InvalidArguments(f"the program {name!r} {what}: give its path")
        if not os.access(found, os.X_OK):
            raise InvalidArguments(
                f"the program {name!r} may not be executed: make it executable, or name its interpreter"
            )
    else:
        where = env.get("PATH", os.defpath)
        paths = os.pathsep.join(str(Path(cwd) / one) for one in where.split(os.pathsep))
        on_path = shutil.which(name, path=paths)
        if on_path is None:
            raise InvalidArguments(f"there is no program {name!r} in the PATH {where!r}: install it, or give its path")
        found = on_path
    return Program(found, command, cwd, env)


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
    try:
        # a fork in another thread would keep the ends that are the child's open, and so its gate
        with _forks:
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
            for descriptor in (gate_read, told_write, output_write, errors_write):
                os.close(descriptor)
                pipes.remove(descriptor)
    except BaseException:
        for descriptor in pipes:
            os.close(descriptor)
        raise
    try:
        identity = identify(child.pid, token)
    except OSError:
        # who cannot be named must not run; its gate ends with the pipe
        for descriptor in pipes:
            os.close(descriptor)
        child.wait()
        raise
    for descriptor in (gate, told, output, errors):
        os.set_blocking(descriptor, False)
    launched = Launched(identity, output, errors, program, gate, told)
    _children[child.pid] = child, launched, loop
    return launched


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
    if pid in _children:
        child, launched, _ = _children[pid]
        if child.poll() is not None:
            launched.close()
            _children.pop(pid, None)


def sweep() -> None:
    """Let go of what loops that are closed have left: nobody opens those gates any more, nor reads those pipes."""
    for pid, (_, launched, loop) in list(_children.items()):
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
    for _, launched, _ in _children.values():
        launched.forget_in_child()
    _children.clear()
    _forks.release()


_forks = threading.Lock()
os.register_at_fork(before=_forks.acquire, after_in_parent=_forks.release, after_in_child=_forget_in_child)
