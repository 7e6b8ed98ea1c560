"""Owns everything printed: data is escaped here, and nowhere else does it meet a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from unicodedata import category

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

    from ..models import TaskEvent, TaskRecord

__all__ = [
    "Cell",
    "EventLines",
    "age",
    "age_of",
    "cell_text",
    "complain",
    "console",
    "counted",
    "cropped",
    "event_json",
    "moment",
    "one_line",
    "print_blocks",
    "print_line",
    "print_table",
    "put",
    "safe",
    "seconds",
    "size",
    "state_style",
    "stored",
    "task_json",
    "text",
    "write_json",
    "write_json_array",
]

_UNBOUNDED = 100_000
"""Columns of an output that is not a terminal: a row is one line there, however long."""

_STYLES = {
    "pending": "dim",
    "running": "green",
    "waiting": "yellow",
    "cancel_requested": "magenta",
    "completed": "cyan",
    "failed": "red",
    "cancelled": "magenta",
    "abandoned": "red",
}


# --- data ------------------------------------------------------------------------------------------------------------


def safe(value: object) -> str:
    r"""
    Return *value* as text that a terminal only shows: one line, no control, bidi, format or private character.

    Those are written as ``\n``, ``\x1b``, ``\u202e``. Spaces of every width and all that is printable stay.
    """
    raw = str(value)
    if raw.isprintable():
        return raw
    return "".join(char if char.isprintable() or category(char) == "Zs" else _escaped(char) for char in raw)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def text(value: object, style: str = "") -> Text:
    """Return *value* escaped, as rich text: never markup, never an emoji code."""
    from rich.text import Text

    return Text(safe(value), style)


def counted(count: int, noun: str) -> str:
    """Return how many of something there are: ``1 task``, ``2,000 tasks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def cropped(value: str, width: int) -> str:
    """Return *value* cut to *width* cells, the cut shown by an ellipsis."""
    if len(value) <= width and value.isascii():
        return value
    from rich.cells import cell_len, set_cell_size

    return value if cell_len(value) <= width else set_cell_size(value, max(width - 1, 0)).rstrip() + "…"


def one_line(value: Any) -> str:
    """Write a JSON value on one line as a person would like to read it."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": "))


# --- where it goes ---------------------------------------------------------------------------------------------------


def complain(message: str) -> None:
    """Print one clean line on stderr."""
    click.echo(f"lash-store: {safe(message)}", err=True)


def console(*, stderr: bool = False) -> Console:
    """Return a console that interprets nothing; not a terminal, and no ``COLUMNS``: as wide as its lines."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            raise  # called while the error is handled; rich would end the process from within

    made = Quiet(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not made.is_terminal and not os.environ.get("COLUMNS"):
        made.width = _UNBOUNDED
    return made


def _table(*columns: tuple[str, str]) -> Table:
    """Return an empty table without lines; see `print_table`."""
    from rich.table import Table

    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for header, behaviour in columns:
        made.add_column(
            header,
            overflow="fold",
            no_wrap=behaviour != "fold",
            justify="right" if behaviour == "right" else "left",
            min_width=_LEAST_FOLDED if behaviour == "fold" else None,
        )
    return made


_LEAST_FOLDED = 8
"""Cells of a column that folds: with fewer it cannot be read."""

Cell = str | tuple[str, str]
"""What stands in a table: data, or data and the style it is shown in."""


def cell_text(cell: Cell) -> Text:
    """Return what stands in a table, escaped and in its style."""
    return text(cell) if isinstance(cell, str) else text(*cell)


_BLOCK = 500
"""Rows of a table on a terminal that are laid out together: the first are there at once, however many there are."""


def print_table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]]) -> None:
    """
    Print rows of data in columns; a column is its header and how it behaves.

    ``fold`` folds long cells on a terminal, ``right`` and ``fixed`` never fold; a row that is too wide for it all the same is a
    block of lines. Elsewhere a row is a line, and nothing stands at the end of it.
    """
    columns = [(safe(header), behaviour) for header, behaviour in columns]
    if (room := console().width) < _UNBOUNDED:
        if _least_width(columns, rows) > room:
            # a library that lays it out would take the missing cells away from all columns, and the folding ones altogether
            print_blocks([header for header, _ in columns], [[cell or None for cell in row] for row in rows])
            return
        for first in range(0, len(rows) or 1, _BLOCK):
            made = _table(*columns)
            for row in rows[first : first + _BLOCK]:
                made.add_row(*map(cell_text, row))
            put(made)
        return
    # a hundred times as quick as a library that folds
    lines = [[safe(cell if isinstance(cell, str) else cell[0]) for cell in row] for row in rows]
    lines.insert(0, [header for header, _ in columns])
    widths = [_widest(column) for column in zip(*lines, strict=True)]
    sides = [str.rjust if behaviour == "right" else str.ljust for _, behaviour in columns]
    for line in lines:
        if not "".join(line).isascii():
            widths_here = [width - _wider(cell) for cell, width in zip(line, widths, strict=True)]
        else:
            widths_here = widths
        padded = [side(cell, width) for side, cell, width in zip(sides, line, widths_here, strict=True)]
        sys.stdout.write("  ".join(padded).rstrip(" ") + "\n")


def print_blocks(headers: Sequence[str], rows: Iterable[Sequence[Cell | None]]) -> None:
    """Print each row as a block of lines, a line a cell, without those that are None: for what no table has room for."""
    from rich.text import Text

    out = console()
    width = max(map(len, headers))
    for number, row in enumerate(rows):
        if number:
            out.print()
        for header, cell in zip(headers, row, strict=True):
            if cell is not None:
                line = Text.assemble((f"{header:>{width}}", "bold"), "  ", cell_text(cell))
                line.rstrip()
                out.print(line, soft_wrap=True)


def _least_width(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[Cell]]) -> int:
    """Return how many cells a table needs in which what does not fold stays whole."""
    least = 2 * (len(columns) - 1)
    for place, (header, behaviour) in enumerate(columns):
        cells = (row[place] for row in rows)
        widest = _widest([header, *(safe(cell if isinstance(cell, str) else cell[0]) for cell in cells)])
        least += min(widest, _LEAST_FOLDED) if behaviour == "fold" else widest
    return least


def _widest(column: Sequence[str]) -> int:
    """Return the cells that the widest of some texts takes."""
    return max(map(len, column)) if "".join(column).isascii() else max(len(cell) + _wider(cell) for cell in column)


def _wider(value: str) -> int:
    """Return how many more cells a text takes than it has characters."""
    from rich.cells import cell_len

    return 0 if value.isascii() else cell_len(value) - len(value)


def put(renderable: RenderableType) -> None:
    """Print what a library laid out; where it is not a terminal, without the spaces it fills lines with."""
    out = console()
    if out.is_terminal:
        out.print(renderable)
        return
    with out.capture() as kept:
        out.print(renderable)
    sys.stdout.write("\n".join(line.rstrip(" ") for line in kept.get().split("\n")))


def print_line(out: Console, line: Text) -> None:
    """Print a line as it is, however long; where it is not a terminal, a hundred times as quick as a library that folds."""
    if out.is_terminal:
        out.print(line, soft_wrap=True)
    else:
        sys.stdout.write(line.plain + "\n")


def write_json(value: Any, *, indent: int | None = 2) -> None:
    """Print a JSON value in ASCII."""
    sys.stdout.write(json.dumps(value, ensure_ascii=True, indent=indent) + "\n")


def write_json_array(values: Iterable[Any]) -> None:
    """Print a JSON array in ASCII, one element a line, each as it comes."""
    before = "[\n"
    for value in values:
        sys.stdout.write(before + json.dumps(value, ensure_ascii=True))
        before = ",\n"
    sys.stdout.write("[]\n" if before == "[\n" else "\n]\n")


# --- records ---------------------------------------------------------------------------------------------------------


def task_json(record: TaskRecord) -> dict[str, Any]:
    """Return a record as plain JSON, its scope as it is printed."""
    return {**record.model_dump(mode="json"), "scope": str(record.scope)}


def event_json(event: TaskEvent) -> dict[str, Any]:
    """Return an event as plain JSON, its scopes as they are printed."""
    from_scope = None if event.from_scope is None else str(event.from_scope)
    return {**event.model_dump(mode="json"), "scope": str(event.scope), "from_scope": from_scope}


def state_style(state: str) -> str:
    """Return the colour of a state."""
    return _STYLES.get(state, "")


class EventLines:
    """
    Prints events as lines in columns, one by one, as they come: ids in full, and as much data as the width holds.

    Under 100 columns the day has a line of its own.
    """

    def __init__(self, out: Console, *, with_task: bool = True) -> None:
        self._out = out
        self._with_task = with_task
        self._is_narrow = out.width < 100
        self._day = ""
        at = f"{'at (UTC)':<{12 if self._is_narrow else 23}}"
        head = f"{'seq':>6}  {at}  {'type':<14}  try  {'task, ' if with_task else ''}data"
        self._head: str | None = head

    def print(self, event: TaskEvent) -> None:
        """Print one event; before the first, the names of the columns."""
        if self._head is not None:
            print_line(self._out, text(self._head, "bold"))
            self._head = None
        day = f"{event.at:%Y-%m-%d}"
        if self._is_narrow and day != self._day:
            print_line(self._out, text(f"        {day}", "dim"))
            self._day = day
        print_line(self._out, self._row(event, day))

    def _row(self, event: TaskEvent, day: str) -> Text:
        from rich.cells import cell_len
        from rich.text import Text

        at = f"{event.at:%H:%M:%S}.{event.at.microsecond // 1000:03d}"
        attempt = "-" if event.attempt is None else event.attempt
        line = Text.assemble(
            (f"{event.seq:>6}  {at if self._is_narrow else f'{day} {at}'}  ", "dim"),
            (f"{event.type.value:<14}", state_style(event.type)),
            f"  {attempt:>3}  ",
        )
        if self._with_task:
            line.append_text(text(event.scope if event.task_id is None else f"{event.scope} {event.task_id}", "bold"))
            line.append("  ")
        room = min(max(self._out.width - cell_len(line.plain), _LEAST_DATA), _MOST_DATA)
        line.append(cropped(_digest(_told(event)), room), "dim")
        line.rstrip()
        return line


_LEAST_DATA, _MOST_DATA = 12, 300
_TELLING = (
    "from",
    "to",
    "reason",
    "note",
    "progress",
    "callback_error",
    "failure",
    "result",
    "evidence",
    "arguments",
)


def _told(event: TaskEvent) -> dict[str, Any]:
    """Return what an event tells beside its columns: for work that was moved, from where to where."""
    if event.from_scope is None:
        return event.data
    return {"from": str(event.from_scope), "to": str(event.scope), **event.data}


def _digest(data: dict[str, Any]) -> str:
    """Write an event's data on one escaped line, what tells most first."""
    names = sorted(data, key=lambda name: (name not in _TELLING, name == "state"))
    return ", ".join(f"{safe(name)}={safe(one_line(data[name]))}" for name in names)


def stored(at: datetime) -> str:
    """Write a time, which is in UTC, as the file does."""
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(at: datetime | None) -> str:
    """Write a time as a person reads it, to the millisecond."""
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}.{at.microsecond // 1000:03d}Z"


def age(since: datetime, now: datetime | None = None) -> str:
    """Write how long before *now* something was, in at most four cells."""
    return seconds(max(0.0, ((now or datetime.now(UTC)) - since).total_seconds()))


def seconds(span: float) -> str:
    """Write a span of time roughly: ``7s``, ``12m``, ``3h``, ``20d``."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if span >= size:
            return f"{int(span // size)}{unit}"
    return f"{int(span)}s"


def age_of(since: str | None, now: datetime | None = None) -> str:
    """Write how long before *now* a time of the file was; a question mark for one that somebody's hand made unreadable."""
    if since is None:
        return ""
    try:
        return age(datetime.fromisoformat(since), now)
    except (ValueError, TypeError):
        return "?"


def size(count: int) -> str:
    """Write a number of bytes roughly: ``812 B``, ``3.4 kB``, ``128 MB``."""
    if count < 1000:
        return f"{count} B"
    scaled, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while scaled >= 999.5 and len(units) > 1:
        scaled /= 1000
        units.pop(0)
    return f"{scaled:.1f} {units[0]}" if scaled < 9.95 else f"{scaled:.0f} {units[0]}"
