"""A program in a pseudo-terminal: keys go in, and a terminal emulator says what a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyte


class _Screen(pyte.Screen):
    """A screen that knows faint text, and says so where the emulator has blinking text, of which there is none."""

    def select_graphic_rendition(self, *attrs: int, **kwargs: Any) -> None:
        super().select_graphic_rendition(*(5 if attr == 2 else attr for attr in attrs), **kwargs)


def screen_of(output: bytes, columns: int, lines: int) -> pyte.Screen:
    """Return the screen on which *output* stands."""
    screen = _Screen(columns, lines)
    pyte.ByteStream(screen).feed(output)
    return screen


class Terminal:
    """Runs *command* in a terminal of its own, which is its controlling one: the keys for signals work, too."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 110,
        lines: int = 30,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.screen = _Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.output = b""
        self._parent, self.descriptor = pty.openpty()
        self._set_size(columns, lines)
        # the first terminal that the leader of a new session opens becomes its controlling one
        shell = ["sh", "-c", 'exec "$@" <>"$0" >&0 2>&0', os.ttyname(self.descriptor), *command]
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            shell, cwd=cwd, env={**plain, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8", **(env or {})},
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._parent)
        os.close(self.descriptor)

    @property
    def attributes(self) -> list[Any]:
        """How the terminal is set: echo, lines or keys, signals."""
        return termios.tcgetattr(self.descriptor)

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(line.rstrip() for line in self.screen.display)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._parent, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Make the terminal another size, of which the program is told by a signal."""
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def signal(self, number: signal.Signals) -> None:
        """Send the program a signal."""
        self.process.send_signal(number)

    def wait_for(self, is_there: str | Callable[[str], bool], seconds: float = 30.0) -> str:
        """Return what stands on the screen once it has a text, or is as it should be."""
        good = (lambda text: is_there in text) if isinstance(is_there, str) else is_there
        deadline = time.monotonic() + seconds
        while not good(self.text):
            assert time.monotonic() < deadline, f"{is_there} did not come to pass in {seconds} s:\n{self.text}"
            if not self._take_in(0.1) and self.process.poll() is not None and not self._take_in(0.0):
                assert good(self.text), f"{is_there} did not come to pass, and the program has ended:\n{self.text}"
        return self.text

    def rest(self) -> str:
        """Return what stands on the screen once the program has written all it was writing."""
        while self._take_in(0.2):
            pass
        return self.text

    def wait(self, seconds: float = 30.0) -> int:
        """Wait for the program's end and return its exit code, negative for a signal."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"the program does not end:\n{self.text}"
            self._take_in(0.05)
        while self._take_in(0.0):
            pass
        return self.process.returncode

    def _take_in(self, seconds: float) -> bool:
        if not select.select([self._parent], [], [], seconds)[0]:
            return False
        found = os.read(self._parent, 65536)
        self.output += found
        self._stream.feed(found)
        return True

    def _set_size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._parent, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
