"""
Owns the keyboard of a full-screen command: keys one by one, and signals that must not leave a terminal behind in disorder.

While it is held, the terminal echoes nothing and gives keys at once; whatever happens, it is given back as it was found. A signal
that ends or stops the process is only noted, so that its end takes the way everything takes.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

__all__ = ["Keyboard"]

_NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP, signal.SIGWINCH)

_KEYS = {
    b"\x1b[A": "up",
    b"\x1bOA": "up",
    b"\x1b[B": "down",
    b"\x1bOB": "down",
    b"\x1b[5~": "page up",
    b"\x1b[6~": "page down",
    b"\x1b[H": "home",
    b"\x1bOH": "home",
    b"\x1b[1~": "home",
    b"\x1b[F": "end",
    b"\x1bOF": "end",
    b"\x1b[4~": "end",
}
_ESCAPE = b"\x1b"
_REST_OF_A_KEY = 0.05
"""Seconds in which what follows an escape belongs to the same key."""


class Keyboard:
    """The terminal on *descriptor*, for as long as the block takes."""

    def __init__(self, descriptor: int | None = None) -> None:
        self._descriptor = sys.stdin.fileno() if descriptor is None else descriptor
        self._noted: list[signal.Signals] = []
        self._is_gone = False

    def __enter__(self) -> Self:
        self._before: list[Any] = termios.tcgetattr(self._descriptor)
        self._bell, self._ring = os.pipe()
        for end in (self._bell, self._ring):
            os.set_blocking(end, False)
        self._bell_before = signal.set_wakeup_fd(self._ring, warn_on_full_buffer=False)
        # what was ignored, as by nohup, stays ignored
        self._handlers = {
            number: signal.signal(number, self._note)
            for number in _NOTED
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        self._take()
        return self

    def __exit__(self, *_: object) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._bell_before)
        os.close(self._bell)
        os.close(self._ring)

    @property
    def ended_by(self) -> signal.Signals | None:
        """The signal that wants the process to end, if one came; SIGHUP if the terminal went away."""
        ends = [number for number in self._noted if number != signal.SIGTSTP]
        return ends[0] if ends else signal.SIGHUP if self._is_gone else None

    @property
    def is_to_stop(self) -> bool:
        """Whether a person asked the process to stop for now: Ctrl-Z."""
        return signal.SIGTSTP in self._noted

    def stop(self) -> None:
        """Stop this process until somebody has it go on; meanwhile the terminal is as it was. The screen is the caller's."""
        self._give_back()
        self._noted = [number for number in self._noted if number != signal.SIGTSTP]
        os.kill(os.getpid(), signal.SIGSTOP)
        self._take()

    def wake(self) -> None:
        """End a `read` that waits; from any thread."""
        with contextlib.suppress(OSError):
            os.write(self._ring, b"\0")

    def read(self, patience: float) -> list[str]:
        """Return what was pressed, a letter or a word a key; nothing after *patience* seconds, or if a signal or `wake` came."""
        if self.ended_by is not None or self.is_to_stop:
            return []
        ready, _, _ = select.select([self._descriptor, self._bell], [], [], max(patience, 0.0))
        if self._bell in ready:
            self._silence()
        return [*_keys(self._pressed())] if self._descriptor in ready else []

    def _silence(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._bell, 4096):
                pass

    def _pressed(self) -> bytes:
        try:
            pressed = os.read(self._descriptor, 4096)
            last = pressed.rpartition(_ESCAPE)[1:]
            while last[0] and b"".join(last) not in _KEYS and len(last[1]) < 3:
                if not select.select([self._descriptor], [], [], _REST_OF_A_KEY)[0]:
                    break
                pressed += os.read(self._descriptor, 1)
                last = pressed.rpartition(_ESCAPE)[1:]
        except OSError:
            pressed = b""
        self._is_gone = not pressed
        return pressed

    def _note(self, number: int, _: FrameType | None) -> None:
        # a new size is news enough: `read` has ended
        if number != signal.SIGWINCH:
            self._noted.append(signal.Signals(number))

    def _take(self) -> None:
        tty.setcbreak(self._descriptor)

    def _give_back(self) -> None:
        # a terminal that is gone needs nothing back
        with contextlib.suppress(termios.error):
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)


def _keys(pressed: bytes) -> Iterator[str]:
    """Cut what a terminal sent into keys; a sequence that is none of ours is dropped whole."""
    while pressed:
        known = next((sequence for sequence in _KEYS if pressed.startswith(sequence)), None)
        if known is not None:
            yield _KEYS[known]
            pressed = pressed[len(known) :]
        elif pressed[:2] in (b"\x1b[", b"\x1bO"):
            end = next((at for at, byte in enumerate(pressed[2:], 2) if 0x40 <= byte <= 0x7E), len(pressed))
            pressed = pressed[end + 1 :]
        elif pressed[:1] == _ESCAPE:
            yield "escape"
            pressed = pressed[1:]
        else:
            letter = pressed[:1].decode("ascii", "replace")
            yield "enter" if letter in "\r\n" else letter
            pressed = pressed[1:]
