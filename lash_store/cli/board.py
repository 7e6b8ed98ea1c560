"""Owns what a person does in `top`: which task is chosen, what is asked, and what came of it; knows neither terminal nor file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

from ..errors import StoreError
from .output import cropped, safe, state_style, text
from .panel import Panel, picture

if TYPE_CHECKING:
    from rich.text import Text

    from ..models import TaskRecord
    from .watching import Frame, Row

__all__ = ["Board"]

_STEPS = {"up": -1, "k": -1, "down": 1, "j": 1}
_LEAPS = {"page up": -1, "page down": 1}
_ENDS = {"home": 0, "g": 0, "end": -1, "G": -1}
_HELP = ("↑↓ select", "c cancel", "{all}", "q quit")
_PLAIN_HELP = ("j/k select", *_HELP[1:])


class Board:
    """
    A frame, and what a person makes of it.

    *ask* sends the request to stop a task off, and returns at once; *is_ascii* says that the terminal has no arrows.
    """

    def __init__(
        self, name: str, ask: Callable[[int], Future[TaskRecord]], *, with_ended: bool = False, is_ascii: bool = False
    ) -> None:
        self._name = name
        self._ask = ask
        self._is_ascii = is_ascii
        self._frame: Frame | None = None
        self._selected: int | None = None
        self._place = 0
        self._first = 0
        self._page = 1
        self._question: Row | None = None
        self._asked: dict[int, tuple[str, Future[TaskRecord]]] = {}
        self._followed: dict[int, str] = {}
        self._notice: Text | None = None
        self.with_ended = with_ended
        """Whether a person wants to see what has ended."""

    # --- what happens ---

    def see(self, frame: Frame) -> None:
        """Take the next frame: the selection stays with its task, or goes to what came to stand in its place."""
        self._frame = frame
        places = {row.task_seq: place for place, row in enumerate(frame.rows)}
        self._select(self._place if self._selected is None else places.get(self._selected, self._place))
        for task_seq, name in [*self._followed.items()]:
            row = frame.rows[places[task_seq]] if task_seq in places else None
            if row is not None and not row.is_live:
                self._notice = _outcome(name, row.state)
            if row is None or not row.is_live:
                del self._followed[task_seq]

    def press(self, key: str) -> bool:
        """Do what a key means, and say whether to go on; what was told before has been read."""
        self._notice = None
        if self._question is not None:
            self._answer(key)
        elif key == "q":
            return False
        elif key == "c":
            self._put_question()
        elif key == "a":
            self.with_ended = not self.with_ended
        elif key in _STEPS:
            self._select(self._place + _STEPS[key])
        elif key in _LEAPS:
            self._select(self._place + _LEAPS[key] * self._page)
        elif key in _ENDS:
            self._select(_ENDS[key] % max(len(self._rows), 1))
        return True

    def settle(self) -> list[str]:
        """Take in what came of requests, and return it, a line each."""
        told = []
        for task_seq, (name, asked) in [*self._asked.items()]:
            if asked.done():
                del self._asked[task_seq]
                self._notice = self._came_of(task_seq, name, asked)
                told.append(self._notice.plain)
        return told

    def warn(self, message: str) -> None:
        """Show what the package logs."""
        self._notice = text(message, "yellow")

    # --- how it looks ---

    def paint(self, width: int, height: int) -> list[Text]:
        """Return the lines of the screen."""
        assert self._frame is not None, "there was no frame yet"
        self._page = max(1, height - 6)
        panel = Panel(width, height, self._selected, self._first, self._is_ascii)
        lines, self._first = picture(self._frame, self._name, panel, self._footer(width))
        return lines

    def _footer(self, width: int) -> Text:
        if self._question is not None:
            return text(f"cancel {_named(self._question)}? y/n", "bold yellow")
        line = self._notice.copy() if self._notice is not None else self._help()
        rows = self._rows
        where = f"{min(self._place + 1, len(rows)):,} of {len(rows):,}"
        if rows and line.cell_len + len(where) + 2 <= width:
            line.append(f"{where:>{width - line.cell_len}}", "dim")
        return line

    def _help(self) -> Text:
        words = _PLAIN_HELP if self._is_ascii else _HELP
        return text("  ".join(words).format(all="a live ones" if self.with_ended else "a all"), "dim")

    # --- inside ---

    @property
    def _rows(self) -> tuple[Row, ...]:
        return () if self._frame is None else self._frame.rows

    def _select(self, place: int) -> None:
        self._place = max(0, min(place, len(self._rows) - 1))
        self._selected = self._rows[self._place].task_seq if self._rows else None

    def _put_question(self) -> None:
        row = self._rows[self._place] if self._rows else None
        if row is not None and row.is_live:
            self._question = row
        elif row is not None:
            self._notice = _outcome(_named(row), row.state)

    def _answer(self, key: str) -> None:
        row, self._question = self._question, None
        if row is None or key not in ("y", "Y"):
            return
        self._notice = text(f"{_named(row)}: asking it to stop …", "yellow")
        self._asked[row.task_seq] = _named(row), self._ask(row.task_seq)

    def _came_of(self, task_seq: int, name: str, asked: Future[TaskRecord]) -> Text:
        try:
            record = asked.result()
        except Exception as error:
            # whatever it was, it is told, and the rest goes on
            kind = "" if isinstance(error, StoreError) else f"{type(error).__name__}: "
            return text(f"{name}: {kind}{error}", "red")
        if record.state.is_terminal:
            return _outcome(name, record.state)
        self._followed[task_seq] = name
        return text(f"{name}: was asked to stop", "magenta")


_MOST_ID = 20
"""Cells of an id in the last line: what is said of it must not be cut off."""


def _named(row: Row) -> str:
    return f"#{row.task_seq} {cropped(safe(row.id), _MOST_ID)}"


def _outcome(name: str, state: str) -> Text:
    return text(f"{name}: {state}", state_style(state))
