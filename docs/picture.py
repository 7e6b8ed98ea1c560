"""What stands on an emulated terminal, as an SVG picture of a window: text stays text, and fonts are the reader's."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

import pyte

_CELL_WIDTH, _CELL_HEIGHT, _FONT = 8.4, 18, 14
_MARGIN, _BAR = 14, 34
_GROUND, _PAPER, _INK, _EDGE, _TITLE = "#0f1115", "#16181d", "#d7dae0", "#2b2f38", "#9aa1ad"
_COLOURS = {
    "black": "#3b4048", "red": "#f0716f", "green": "#7ec983", "brown": "#e2b65f", "yellow": "#e2b65f", "blue": "#6ea8f0",
    "magenta": "#cc8fe0", "cyan": "#5fc4cf", "white": "#d7dae0",
}  # fmt: skip


class _Look(NamedTuple):
    ink: str
    paper: str | None
    is_bold: bool
    is_dim: bool
    is_underlined: bool


def picture(screen: pyte.Screen, title: str, *, is_whole: bool) -> str:
    """Return a window with what stands on a screen; not *is_whole*, without the empty lines at its end."""
    lines = [_runs(screen, number) for number in range(screen.lines)]
    while not is_whole and lines and not lines[-1]:
        lines.pop()
    width = 2 * _MARGIN + screen.columns * _CELL_WIDTH
    height = _BAR + len(lines) * _CELL_HEIGHT + 2 * _MARGIN
    body = [part for number, line in enumerate(lines) for run in line for part in _drawn(number, *run)]
    dots = "".join(
        f'<circle cx="{20 + 18 * place}" cy="{_BAR / 2:g}" r="5.5" fill="{colour}"/>'
        for place, colour in enumerate(("#f0716f", "#e2b65f", "#7ec983"))
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}"'
            f' font-family="monospace" font-size="{_FONT}" role="img" aria-label={quoteattr(title)}>',
            f"<title>{escape(title)}</title>",
            f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="9" fill="{_PAPER}" stroke="{_EDGE}"/>',
            f'<path d="M0.5 {_BAR} V9.5 a9 9 0 0 1 9 -9 H{width - 9.5:g} a9 9 0 0 1 9 9 V{_BAR} Z"'
            f' fill="{_GROUND}" stroke="{_EDGE}"/>',
            dots,
            f'<text x="{width / 2:g}" y="{_BAR / 2 + 5:g}" fill="{_TITLE}" text-anchor="middle">{escape(title)}</text>',
            f'<g fill="{_INK}">',
            *body,
            "</g>",
            "</svg>",
            "",
        ]
    )


def _runs(screen: pyte.Screen, number: int) -> list[tuple[int, str, _Look]]:
    """Return what stands in a line: where, what, and how; nothing where there are only spaces."""
    line = screen.buffer[number]
    cells = [(column, line[column]) for column in range(screen.columns)]
    runs = [(look, [*run]) for look, run in groupby(cells, key=lambda cell: _look_of(cell[1]))]
    found = [(run[0][0], "".join(cell.data for _, cell in run), look) for look, run in runs]
    return [(column, text, look) for column, text, look in found if text.strip() or look.paper is not None]


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Cut a run where it has two spaces or more: what is next to them stands in columns of its own."""
    at = 0
    for part in text.split("  "):
        if part.strip():
            yield at + len(part) - len(part.lstrip()), part.strip()
        at += len(part) + 2


def _look_of(cell: pyte.screens.Char) -> _Look:
    ink, paper = _colour(cell.fg) or _INK, _colour(cell.bg)
    if cell.reverse:
        ink, paper = _PAPER, ink
    # the emulator has no faint text, and `terminal` says so in this way
    return _Look(ink, paper, cell.bold, cell.blink, cell.underscore)


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    return _COLOURS.get(name.removeprefix("bright"), f"#{name}")


def _drawn(number: int, column: int, text: str, look: _Look) -> Iterator[str]:
    x, y = _MARGIN + column * _CELL_WIDTH, _BAR + _MARGIN + number * _CELL_HEIGHT
    width = len(text) * _CELL_WIDTH
    if look.paper is not None:
        yield f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_CELL_HEIGHT}" fill="{look.paper}"/>'
    how = [f'fill="{look.ink}"'] if look.ink != _INK else []
    how += ['font-weight="bold"'] if look.is_bold else []
    how += ['opacity="0.62"'] if look.is_dim else []
    how += ['text-decoration="underline"'] if look.is_underlined else []
    for at, part in _parts(text):
        # a font that is wider or narrower is made to fit: columns stay columns
        where = f'x="{x + at * _CELL_WIDTH:g}" y="{y + _FONT:g}" textLength="{len(part) * _CELL_WIDTH:g}"'
        yield f'<text {" ".join([where, *how])} lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(part)}</text>'
