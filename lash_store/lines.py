"""Owns how what a process writes becomes lines that may be stored: bounded in length, in number and in rate. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .monitor_models import Stream

__all__ = ["Batch", "Line", "Lines"]

_BURST = 5.0
"""Seconds' worth of lines that may be stored at once."""


_MUCH = 1024 * 1024
"""Bytes of a line without an end that are worth telling of."""


_CALM = 1.0
"""Seconds without any waiting after which who wrote too much does not any more."""


class Line(NamedTuple):
    """One line, numbered within its attempt from 1."""

    number: int
    stream: Stream
    text: str
    is_cut: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """
    What is to be stored at once: lines, and how much was written since the batch before, what was dropped of it included.

    *is_throttled*: lines wait for their turn, or did a moment ago; *is_turn*: it was not so before, or is so no more.
    """

    lines: Sequence[Line]
    written_lines: int
    written_bytes: int
    dropped: int
    is_throttled: bool
    is_turn: bool = False

    @property
    def says_something(self) -> bool:
        """Whether it tells more than that lines still wait."""
        return bool(self.lines) or self.written_bytes > 0 or self.written_lines > 0 or self.is_turn


class _Raw(NamedTuple):
    number: int
    stream: Stream
    text: bytes
    is_cut: bool


class Lines:
    """
    Cuts two streams into lines of at most *line_bytes*, keeps the newest *keep* of them, and lets *rate* lines a second through.

    Nothing is lost to the rate alone: lines wait, and the oldest give way once more than *keep* do.
    """

    def __init__(self, *, keep: int, line_bytes: int, rate: float, most_bytes: int, now: float) -> None:
        self._keep = keep
        self._line_bytes = line_bytes
        self._rate = rate
        self._most_bytes = most_bytes
        self._allowed = self._most_allowed = max(1.0, rate * _BURST)
        self._refilled = now
        self._rest: dict[Stream, bytes] = dict.fromkeys(Stream, b"")
        self._skips: dict[Stream, bool] = dict.fromkeys(Stream, False)
        self._waiting: deque[_Raw] = deque()
        self._waiting_bytes = 0
        self._lines = self._bytes = self._dropped = 0
        self._told_lines = self._told_bytes = self._told_dropped = 0
        self._told_throttled = False
        self._throttled_until = now

    @property
    def has_news(self) -> bool:
        """Whether a line waits to be stored, or what was dropped, or much of a line without an end, is to be told."""
        return (
            bool(self._waiting)
            or self._lines > self._told_lines
            or self._bytes - self._told_bytes >= _MUCH
            or self._told_throttled
        )

    def feed(self, stream: Stream, chunk: bytes) -> int:
        """Take what was read of a stream, and say how many lines that were."""
        self._bytes += len(chunk)
        if self._skips[stream]:
            end = chunk.find(b"\n")
            if end < 0:
                return 0
            chunk = chunk[end + 1 :]
            self._skips[stream] = False
        whole = (self._rest[stream] + chunk).split(b"\n")
        rest = whole.pop()
        first = self._lines + 1
        self._lines += len(whole)
        # of a flood only the end is looked at
        beyond = max(0, len(whole) - self._keep)
        self._dropped += beyond
        for number, line in enumerate(whole[beyond:], start=first + beyond):
            self._add(number, stream, line)
        count = len(whole)
        # a CR may be half of its end
        if len(rest.removesuffix(b"\r")) > self._line_bytes:
            count += 1
            self._lines += 1
            self._add(self._lines, stream, rest, goes_on=True)
            rest, self._skips[stream] = b"", True
        self._rest[stream] = rest
        return count

    def end(self, stream: Stream) -> None:
        """Take what a stream ended with, without an end of line."""
        rest, self._rest[stream] = self._rest[stream], b""
        if rest:
            self._lines += 1
            self._add(self._lines, stream, rest)

    def take(self, now: float, *, is_last: bool = False, was_held_up: bool = False) -> Batch:
        """
        Return what may be stored at *now* (seconds of any clock); all that waits, if it is the *last*.

        *was_held_up*: who writes it had to wait meanwhile.
        """
        self._allowed = min(self._most_allowed, self._allowed + (now - self._refilled) * self._rate)
        self._refilled = now
        count = len(self._waiting) if is_last else min(len(self._waiting), int(self._allowed))
        self._allowed = max(0.0, self._allowed - count)
        taken = [self._waiting.popleft() for _ in range(count)]
        self._waiting_bytes -= sum(len(raw.text) for raw in taken)
        if was_held_up or self._waiting or self._dropped > self._told_dropped:
            self._throttled_until = now + _CALM
        is_throttled = now < self._throttled_until and not is_last
        batch = Batch(
            [_decoded(raw) for raw in taken],
            self._lines - self._told_lines,
            self._bytes - self._told_bytes,
            self._dropped - self._told_dropped,
            is_throttled,
            is_throttled != self._told_throttled,
        )
        self._told_throttled = is_throttled
        self._told_lines, self._told_bytes, self._told_dropped = self._lines, self._bytes, self._dropped
        return batch

    def _add(self, number: int, stream: Stream, line: bytes, *, goes_on: bool = False) -> None:
        line = line.removesuffix(b"\r")
        is_cut = goes_on or len(line) > self._line_bytes
        text = _cut(line, self._line_bytes) if is_cut else line
        self._waiting.append(_Raw(number, stream, text, is_cut))
        self._waiting_bytes += len(text)
        while len(self._waiting) > self._keep or (self._waiting_bytes > self._most_bytes and len(self._waiting) > 1):
            self._waiting_bytes -= len(self._waiting.popleft().text)
            self._dropped += 1


def _cut(line: bytes, most: int) -> bytes:
    """Return the beginning of a line, without the half of a character at its end."""
    text = line[:most]
    for back in range(1, min(4, len(text)) + 1):
        lead = text[-back]
        if lead < 0x80:
            break
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return text[:-back] if back < length else text
    return text


def _decoded(raw: _Raw) -> Line:
    text = raw.text.decode("utf-8", "replace").replace("\0", "\ufffd")
    return Line(raw.number, raw.stream, text, raw.is_cut)
