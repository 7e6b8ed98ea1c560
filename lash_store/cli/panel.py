"""Owns how `top` looks: a frame laid out in lines that fit a width, the chosen task in sight; reads nothing, decides nothing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from .output import Cell, age_of, cropped, safe, state_style, text
from .phrases import STATES

if TYPE_CHECKING:
    from rich.text import Text

    from .watching import Frame, Row

__all__ = ["Panel", "header", "picture", "whole"]

_BAR, _ASCII_BAR = ("━", "─"), ("=", "-")
_BAR_WIDTH = 10
_MOST_ID, _MOST_NAME = 28, 16


class Panel(NamedTuple):
    """Where and how a frame is to be shown: *first* is the first line of the table that is in sight."""

    width: int
    height: int
    selected: int | None = None
    first: int = 0
    is_ascii: bool = False


def picture(frame: Frame, name: str, panel: Panel, footer: Text) -> tuple[list[Text], int]:
    """
    Return the lines of a screen, from its top to the *footer*, and which line of the table came to be the first in sight.

    None is wider than the panel, and no more are returned than it is high. The selected task is in sight, below the name of its
    session.
    """
    from rich.text import Text

    above = header(frame, name, panel.width)
    table = _Table(frame, panel)
    if panel.height >= _AIRY:
        above.append(Text(""))
    above.append(table.heading())
    room = panel.height - len(above) - 1
    if room < 1:
        # so small a terminal has room for the chosen task at most
        above, room = [], max(panel.height - 1, 0)
    lines, first = table.in_sight(room)
    lines = [*above, *lines]
    lines += [Text("")] * (panel.height - 1 - len(lines))
    return [_fitting(line, panel) for line in (*lines, footer)][: panel.height], first


_AIRY = 14
"""Lines from which on a terminal has one to spare."""


def whole(frame: Frame, name: str, width: int, *, is_ascii: bool = False) -> list[Text]:
    """Return every line of a frame, however many, for who cannot scroll."""
    from rich.text import Text

    panel = Panel(width, 0, is_ascii=is_ascii)
    table = _Table(frame, panel)
    lines = [*header(frame, name, width), Text(""), table.heading(), *table.lines()]
    return [_fitting(line, panel) for line in lines]


def _fitting(line: Text, panel: Panel) -> Text:
    line.truncate(panel.width, overflow="ellipsis")
    if panel.is_ascii and not line.plain.isascii():
        # one for one: what an encoding cannot say would come out longer, and tear the screen
        line.plain = "".join(char if char.isascii() else _PLAIN.get(char, "?") for char in line.plain)
    return line


_PLAIN = {"…": "~", "·": "-", "↑": "^", "↓": "v"}


# --- above the table -------------------------------------------------------------------------------------------------


def header(frame: Frame, name: str, width: int) -> list[Text]:
    """Return two lines: the file, its owners, its pace and the time; and how many tasks are in which state."""
    from rich.text import Text

    at = f"{frame.at:%Y-%m-%d %H:%M:%S} UTC" if width >= 80 else f"{frame.at:%H:%M:%S}"
    facts = Text.assemble("  ", _owners(frame.owners), f"  {frame.events_a_second:.1f} events/s")
    first = Text.assemble(text(cropped(safe(name), max(width - facts.cell_len, 8)), "bold"), facts)
    gap = min(width, _WIDEST) - first.cell_len - len(at)
    if gap >= 2 or width > _WIDEST:
        first.append(f"{' ' * max(gap, 2)}{at}", "dim")
    return [first, _counts(frame)]


_WIDEST = 160
"""Cells over which the header stretches at most: on an output without an end, the time is not at its end."""


def _owners(owners: dict[str, int]) -> Text:
    from rich.text import Text

    alive, dead, unreachable = (owners.get(life, 0) for life in ("alive", "dead", "unreachable"))
    told = Text(f"{alive or 'no'} owner{'' if alive < 2 else 's'} alive", "green" if alive else "yellow")
    if dead:
        told.append(f", {dead} dead", "red")
    if unreachable:
        told.append(f", {unreachable} out of reach", "red")
    return told


def _counts(frame: Frame) -> Text:
    from rich.text import Text

    told = Text()
    if frame.scope is not None:
        told.append_text(text(frame.scope, "bold"))
        told.append("  ")
    counted = [(state, frame.states[state]) for state in STATES if frame.states[state]]
    for state, count in counted:
        told.append(f"{count:,} {state}", state_style(state))
        told.append("  ")
    if not counted:
        told.append("no tasks", "dim")
    told.rstrip()
    return told


# --- the table -------------------------------------------------------------------------------------------------------

_COLUMNS = ("#", "id", "name", "kind", "state", "for", "age", "try", "done", "progress")
_RIGHT = {"#", "for", "age", "try"}
_SQUEEZES: tuple[tuple[str, int], ...] = (
    ("name", 0),
    ("age", 0),
    ("kind", 0),
    ("done", 4),
    ("id", 18),
    ("try", 0),
    ("state", 8),
    ("id", 10),
    ("for", 0),
    ("#", 0),
)
"""What is done for the last column, one after the other, until it has room to say something; 0: the column goes."""

_LEAST_SAID, _MOST_LEAST = 10, 30


class _Table:
    """The rows of a frame in columns that are as wide as what stands in them."""

    def __init__(self, frame: Frame, panel: Panel) -> None:
        self._frame = frame
        self._panel = panel
        self._bar = _ASCII_BAR if panel.is_ascii else _BAR
        self._gap = "  " if panel.width >= 80 else " "
        self._cells = [self._cells_of(row) for row in frame.rows]
        self._widths = self._squeezed()
        self._live = Counter(row.scope for row in frame.rows if row.is_live)

    def heading(self) -> Text:
        """Return the names of the columns."""
        return self._line({column: column for column in _COLUMNS}, "bold")

    def lines(self) -> list[Text]:
        """Return every line: sessions, under each its tasks, and what is not shown."""
        lines = [self._one(place) for place in self._places()]
        return [*lines, *self._rest()]

    def in_sight(self, room: int) -> tuple[list[Text], int]:
        """Return as many lines as there is room for, and the number of the first; the name of a session never scrolls away."""
        places = self._places()
        rest = self._rest()
        count = len(places) + len(rest)
        if room < 2:
            chosen = [place for place in places if self._seq(place) == self._panel.selected]
            return ([self._one(place) for place in chosen] or rest)[:room], 0
        first = min(self._panel.first, max(count - room, 0))
        at = next((at for at, place in enumerate(places) if self._seq(place) == self._panel.selected), None)
        if at is not None:
            # one line less than there is room for: the first is a session's name
            first = max(min(first, at - 1), at - room + 1, 0)
        lines = [self._one(place) for place in places[first : first + room]]
        if first < len(places) and isinstance(places[first], int):
            lines[0] = self._session(self._frame.rows[int(places[first])].scope)
        return [*lines, *rest[max(first - len(places), 0) :]][:room], first

    def _places(self) -> list[int | str]:
        """Return what stands in the lines: a session, or the number of a row."""
        places: list[int | str] = []
        scope: str | None = None
        for number, row in enumerate(self._frame.rows):
            if row.scope != scope:
                scope = row.scope
                places.append(scope)
            places.append(number)
        return places

    def _seq(self, place: int | str) -> int | None:
        return self._frame.rows[place].task_seq if isinstance(place, int) else None

    def _one(self, place: int | str) -> Text:
        if isinstance(place, str):
            return self._session(place)
        row = self._frame.rows[place]
        line = self._line(self._cells[place], "" if row.is_live else "dim")
        if row.task_seq != self._panel.selected:
            return line
        chosen = text(line.plain, "reverse")
        chosen.pad_right(max(self._panel.width - line.cell_len, 0))
        return chosen

    def _session(self, scope: str) -> Text:
        line = text(scope, "bold")
        line.append(f"  {self._live[scope]} live", "dim")
        return line

    def _rest(self) -> list[Text]:
        frame, told = self._frame, []
        if not frame.rows:
            told.append("no tasks" if frame.with_ended else "no live tasks")
        if frame.live_left_out:
            told.append(f"… {frame.live_left_out:,} more live tasks: see lash-store list")
        if frame.with_ended and frame.ended_left_out > 0:
            told.append(f"… {frame.ended_left_out:,} older ones that ended: see lash-store list --all")
        return [text(line, "dim") for line in told]

    # --- cells ---

    def _cells_of(self, row: Row) -> dict[str, Cell]:
        at = self._frame.at
        cells: dict[str, Cell] = {
            "#": str(row.task_seq),
            "id": (safe(row.id), "bold"),
            "name": "" if row.label == row.id else safe(row.label),
            "kind": safe(row.kind),
            "state": (safe(row.state), "red" if row.owner == "dead" else state_style(row.state)),
            "for": age_of(row.since, at),
            "age": age_of(row.created_at, at),
            "try": str(row.attempt),
            "done": "" if row.fraction is None else f"{min(max(row.fraction, 0.0), 1.0):.0%}",
            "progress": _said(row),
        }
        if not self._panel.is_ascii:
            return cells
        return {
            name: _ascii(cell) if isinstance(cell, str) else (_ascii(cell[0]), cell[1]) for name, cell in cells.items()
        }

    def _squeezed(self) -> dict[str, int]:
        """Return the widths of the columns that are shown; the last has what is left."""
        from rich.cells import cell_len

        widths = {}
        for column in _COLUMNS[:-1]:
            cells = [_value(cells[column]) for cells in self._cells]
            widest = max(map(cell_len, cells), default=0)
            widths[column] = max(widest, len(column)) if widest or column in ("#", "id", "state") else 0
        # most words fit: columns do not jump when a task ends
        widths["state"] = max(widths["state"], len("completed"))
        if widths["done"]:
            widths["done"] = _BAR_WIDTH + 5
        if self._panel.width < _UNBOUNDED:
            widths["id"] = min(widths["id"], _MOST_ID)
            widths["name"] = min(widths["name"], _MOST_NAME)
        wanted = min(max(_LEAST_SAID, self._panel.width // 4), _MOST_LEAST)
        for column, width in _SQUEEZES:
            if self._left(widths) >= wanted:
                break
            widths[column] = min(widths[column], width)
        return {**{column: width for column, width in widths.items() if width}, "progress": max(self._left(widths), 0)}

    def _left(self, widths: dict[str, int]) -> int:
        return self._panel.width - sum(width + len(self._gap) for width in widths.values() if width)

    def _line(self, cells: dict[str, Cell], style: str) -> Text:
        from rich.text import Text

        line = Text(style=style)
        for column, width in self._widths.items():
            cell = cells[column]
            value, own = (cell, "") if isinstance(cell, str) else cell
            part = Text(cropped(value, width), own)
            if column == "done" and width > 4 and value.endswith("%"):
                part = self._bar_of(value)
            if column in _RIGHT:
                part.pad_left(max(width - part.cell_len, 0))
            elif column != "progress":
                part.pad_right(max(width - part.cell_len, 0))
            line.append_text(part)
            if column != "progress":
                line.append(self._gap)
        line.rstrip()
        return line

    def _bar_of(self, percent: str) -> Text:
        from rich.text import Text

        done = int(percent[:-1]) * _BAR_WIDTH // 100
        full, empty = self._bar
        return Text.assemble((full * done, "green"), (empty * (_BAR_WIDTH - done), "dim"), f" {percent:>4}")


_UNBOUNDED = 10_000
"""Cells from which on a width is none: nothing is cut."""


def _ascii(value: str) -> str:
    return value.encode("ascii", "backslashreplace").decode("ascii")


def _value(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _said(row: Row) -> Cell:
    """Return the last cell: what is the matter, else how far it is, and what it told its session last."""
    parts = [safe(row.says)] if row.says else []
    if row.owner == "dead":
        parts.insert(0, "its owner is dead")
    if row.note:
        parts.append(f"note: {safe(row.note)}")
    bad = row.owner == "dead" or row.state in ("failed", "abandoned")
    return " · ".join(parts), "red" if bad else ""
