"""Owns the paper a timeline is drawn on: where a time stands on it, and its elements, every text in them made harmless."""

from __future__ import annotations

from xml.sax.saxutils import escape

from .lifelines import iso_of
from .output import cropped, safe

__all__ = [
    "LEFT", "RIGHT", "WIDTH", "Axis", "bar", "clock", "cut", "harmless", "label", "moved", "name", "span_of", "tooltip",
]  # fmt: skip

WIDTH = 1200
LEFT, RIGHT = 270, 1165
"""Where the time begins and ends, in pixels."""


def harmless(value: object) -> str:
    """Return *value* as the text of an element or an attribute: one line, no control, bidi or private character, no markup."""
    return escape(safe(value), {'"': "&quot;", "'": "&#39;"})


def span_of(ms: int) -> str:
    """Write a span of time as a person says it, with at most two units."""
    if ms < 1000:
        return f"{ms} ms"
    if ms < 59_950:
        return f"{ms / 1000:.1f} s" if ms < 10_000 else f"{ms / 1000:.0f} s"
    seconds = round(ms / 1000)
    for size, unit, less, lesser in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            rest = seconds % size // less
            return f"{seconds // size} {unit}" + (f" {rest} {lesser}" if rest else "")
    return f"{seconds} s"


# --- time on paper --------------------------------------------------------------------------------------------------

_SECOND, _MINUTE, _HOUR, _DAY = 1000, 60_000, 3_600_000, 86_400_000
_STEPS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500),
    *(_SECOND * n for n in (1, 2, 5, 10, 15, 30)),
    *(_MINUTE * n for n in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * n for n in (1, 2, 3, 6, 12)),
    *(_DAY * n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 100_000)),
)
_BETWEEN_TICKS = 95


class Axis:
    """Where on the paper a time stands."""

    def __init__(self, begin: int, end: int) -> None:
        self.begin = begin
        self.end = max(end, begin + 10)
        self._scale = (RIGHT - LEFT) / (self.end - self.begin)

    def x(self, at: int) -> float:
        """Return where a time stands; one outside stands at the edge."""
        return round(LEFT + (min(max(at, self.begin), self.end) - self.begin) * self._scale, 1)

    def holds(self, at: int) -> bool:
        """Say whether a time is on the paper."""
        return self.begin <= at <= self.end

    def ticks(self) -> list[tuple[int, str]]:
        """Return times to write down, and what to write: the day where it is new."""
        least = (self.end - self.begin) * _BETWEEN_TICKS / (RIGHT - LEFT)
        step = next((step for step in _STEPS if step >= least), int(least) + 1)
        found, day = [], ""
        for at in range(-(-self.begin // step) * step, self.end + 1, step):
            said = iso_of(at)
            date, _, clock = said.partition("T")
            if step >= _DAY or not clock:
                found.append((at, date))
                continue
            clock = clock[: 12 if step < _SECOND else 8 if step < _MINUTE else 5]
            found.append((at, clock if date == day else f"{date[5:]} {clock}" if len(clock) < 6 else clock))
            day = date
        return found


# --- elements -------------------------------------------------------------------------------------------------------


def clock(ms: int) -> str:
    """Write a time as a person reads it."""
    return iso_of(ms).replace("T", " ").removesuffix("Z")


def tooltip(said: str) -> str:
    """Return what an element says when it is pointed at; its lines stay lines."""
    return f"<title>{chr(10).join(harmless(line) for line in said.split(chr(10)))}</title>"


def label(x: float, y: float, said: str, style: str, *, anchor: str = "", whole: str | None = None) -> str:
    """Return a line of text; where it was cut, *whole* is its tooltip."""
    where = f' text-anchor="{anchor}"' if anchor else ""
    title = "" if whole is None or safe(whole) == said else tooltip(safe(whole))
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}"{where}>{title}{harmless(said)}</text>'


def name(x: float, y: float, said: str, style: str, cells: float) -> str:
    """Return a name in the column of names, cut to so many cells."""
    return f'<g clip-path="url(#names)">{label(x, y, cut(said, int(cells)), style, whole=said)}</g>'


def cut(said: str, cells: int) -> str:
    """Return text cut to so many cells."""
    # what takes no room of its own may come a thousand times
    return cropped(safe(said)[: 4 * cells], max(cells, 3))


def bar(style: str, begin: float, end: float, y: float, high: float, *, fill: str | None = None) -> str:
    """Return a bar about a height, of a style or filled with a pattern; however short, it can be seen."""
    how = f'class="{style}"' if fill is None else f'fill="url(#{fill})"'
    wide = max(end - begin, 1.5)
    return f'<rect {how} x="{begin:.1f}" y="{y - high / 2:.1f}" width="{wide:.1f}" height="{high}"/>'


def moved(x: float, y: float, shape: str) -> str:
    """Return a shape with its origin put somewhere."""
    return f'<g transform="translate({x:.1f} {y:.1f})">{shape}</g>'
