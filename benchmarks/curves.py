"""Owns the picture of curves: one SVG that needs nothing else, readable on light paper and on dark."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from .measuring import Curve, Found, Picture, median

__all__ = ["Scale", "apart", "draw", "written"]

WIDTH, HEIGHT = 720, 400
_TOP, _BOTTOM, _LEFT = 76, 346, 72
_CELL = 8.1
"""How wide a letter of a name is, in pixels, in a wide font."""
_BETWEEN_LABELS = 30
_SHAPES = ("circle", "square", "diamond", "triangle")

# no custom properties: renderers that make pictures of this know none
_INKS = (
    # light paper, dark paper: first of ours, then of what stands beside
    *(("#0072b2", "#4aa8e8"), ("#00805c", "#2ebd8b"), ("#8a3d6e", "#d78fb9"), ("#0f8f9c", "#4fc3cf")),
    *(("#d55e00", "#ff8a4c"), ("#59636e", "#9aa5b1"), ("#9a6b00", "#e0a01a"), ("#b02a4c", "#ff7b94")),
)
_OURS = 4
_STYLE = """
text { font: 12px ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: bold } .dim { fill: #59636e } .name { font-weight: bold }
.bg { fill: #ffffff } .edge { fill: none; stroke: #d1d9e0 } .grid { stroke: #e6eaef } .rule { stroke: #8c959f }
.line { fill: none; stroke-width: 2.5; stroke-linejoin: round; stroke-linecap: round }
.level { stroke-width: 2; stroke-dasharray: 7 5 }
.band { opacity: .14 } .dot { stroke: #ffffff; stroke-width: 1.5 } .lead { stroke-width: 1; opacity: .5 }
"""
_DARK_STYLE = """
text { fill: #e6edf3 } .dim { fill: #9aa5b1 }
.bg { fill: #0d1117 } .edge { stroke: #3d444d } .grid { stroke: #21262d } .rule { stroke: #6e7681 }
.band { opacity: .22 } .dot { stroke: #0d1117 }
"""


# --- scales ---------------------------------------------------------------------------------------------------------


class Scale:
    """Where on an axis a value stands; logarithmic only if all its values are more than 0."""

    def __init__(
        self, values: Sequence[float], begin: float, end: float, *, is_log: bool, is_tight: bool = False
    ) -> None:
        self.is_log = is_log and min(values) > 0
        low, high = min(values), max(values)
        if self.is_log:
            if not is_tight:
                low, high = _round_down(low), -_round_down(-high)
            if low == high:
                low, high = low / 2, high * 2
        else:
            if not is_tight:
                low = min(low, 0.0)
                high = max(high * 1.04, 0.0)
            if low == high:
                low, high = low - 1, high + 1
        self.low, self.high = low, high
        self._begin, self._end = begin, end

    def at(self, value: float) -> float:
        """Return the place of a value, in pixels; one outside stands at the edge."""
        value = min(max(value, self.low), self.high)
        low, high = self._told(self.low), self._told(self.high)
        return round(self._begin + (self._end - self._begin) * (self._told(value) - low) / (high - low), 1)

    def _told(self, value: float) -> float:
        return math.log10(value) if self.is_log else value

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values on the axis, few enough to be written down."""
        return self._log_ticks(most) if self.is_log else self._linear_ticks(most)

    def _log_ticks(self, most: int) -> list[float]:
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(found) <= most:
                break
        if len(found) < 2:
            return self._linear_ticks(most)
        return found[:: -(-len(found) // most)]

    def _linear_ticks(self, most: int) -> list[float]:
        rough = (self.high - self.low) / most
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(step * size for step in (1, 2, 5, 10) if step * size >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_down(value: float) -> float:
    """Return the next 1, 2 or 5 times a power of ten that is not more, further from 0 if the value is less than 0."""
    size = 10.0 ** math.floor(math.log10(abs(value)))
    if value > 0:
        return max(step * size for step in (1, 2, 5) if step * size <= value * 1.0001)
    return -min(step * size for step in (1, 2, 5, 10) if step * size >= -value * 0.9999)


def written(value: float) -> str:
    """Write a value of an axis: short, and with no digit that is not needed."""
    for size, letter in ((1e9, " G"), (1e6, " M")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def apart(places: Sequence[float], distance: float, low: float, high: float) -> list[float]:
    """Return places moved as little as needs be to stand a distance apart, between *low* and *high* if there is room."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    groups: list[tuple[list[int], float]] = []
    for number in order:
        members, middle = [number], places[number]
        while groups and middle - groups[-1][1] < distance * (len(groups[-1][0]) + len(members)) / 2:
            members = groups.pop()[0] + members
            middle = sum(places[one] for one in members) / len(members)
        half = distance * (len(members) - 1) / 2
        middle = max(min(middle, high - half), low + half)
        groups.append((members, middle))
        while (
            len(groups) > 1 and groups[-1][1] - groups[-2][1] < distance * (len(groups[-2][0]) + len(groups[-1][0])) / 2
        ):
            later, earlier = groups.pop(), groups.pop()
            members = earlier[0] + later[0]
            half = distance * (len(members) - 1) / 2
            middle = sum(places[one] for one in members) / len(members)
            groups.append((members, max(min(middle, high - half), low + half)))
    found = [0.0] * len(places)
    for members, middle in groups:
        for number, one in enumerate(members):
            found[one] = middle + distance * (number - (len(members) - 1) / 2)
    return found


# --- the picture ----------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    x: float
    y: float
    least: float
    most: float


class _Line(NamedTuple):
    curve: Curve
    points: list[_Point]
    ink: int
    shape: str

    @property
    def is_level(self) -> bool:
        """Say whether this is one figure drawn across, and not a curve."""
        return len(self.points) > 1 and len({(way, metric) for _, way, metric in self.curve.points}) == 1


def draw(picture: Picture, found: Found) -> str | None:
    """Return the picture as the text of an SVG file, None if no figure for it was found."""
    lines = list(_lines(picture.curves, found))
    return "\n".join(_whole(picture, lines)) if lines else None


def _lines(curves: Sequence[Curve], found: Found) -> Iterator[_Line]:
    ours = theirs = 0
    for curve in curves:
        points = []
        for x, way, metric in sorted(curve.points):
            value = median(found, way, metric)
            if value is not None:
                all_of_it = [one[metric] for one in found[way] if metric in one]
                points.append(_Point(x, value, min(all_of_it), max(all_of_it)))
        is_ours = "lash_store" in curve.name or all("lash_store" in way for _, way, _ in curve.points)
        number = ours % _OURS if is_ours else _OURS + theirs % (len(_INKS) - _OURS)
        shape = _SHAPES[(ours if is_ours else theirs + 1) % len(_SHAPES)]
        ours, theirs = ours + is_ours, theirs + (not is_ours)
        if points:
            yield _Line(curve, points, number, shape)


def _whole(picture: Picture, lines: Sequence[_Line]) -> Iterator[str]:
    points = [point for line in lines for point in line.points]
    room = min(250.0, max(len(text) for line in lines for text in _told(line)) * _CELL + 38)
    x = Scale([point.x for point in points], _LEFT + 12, WIDTH - room, is_log=picture.log_x, is_tight=True)
    values = [value for point in points for value in (point.least, point.most)]
    y = Scale(values, _BOTTOM, _TOP, is_log=picture.log_y)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{_safe(picture.title)}">'
    )
    yield f"<title>{_safe(picture.title)}</title>"
    yield f"<style>{_style()}</style>"
    yield f'<rect class="bg" width="{WIDTH}" height="{HEIGHT}" rx="6"/>'
    yield f'<rect class="edge" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="6"/>'
    yield _text(20, 32, picture.title, "title")
    yield _text(20, 54, picture.y + (", logarithmic" if y.is_log else ""), "dim")
    yield from _axes(picture, x, y)
    for line in reversed(lines):  # the first one named lies on top
        yield from _drawn(line, x, y)
    yield from _labels(lines, x, y)
    yield "</svg>"
    yield ""


def _style() -> str:
    light = "".join(f".s{n} {{ stroke: {a} }} .f{n} {{ fill: {a} }}\n" for n, (a, _) in enumerate(_INKS))
    dark = "".join(f".s{n} {{ stroke: {b} }} .f{n} {{ fill: {b} }}\n" for n, (_, b) in enumerate(_INKS))
    return f"{_STYLE}{light}@media (prefers-color-scheme: dark) {{{_DARK_STYLE}{dark}}}\n"


def _axes(picture: Picture, x: Scale, y: Scale) -> Iterator[str]:
    right = x.at(x.high) + 12
    for value in y.ticks():
        at = y.at(value)
        yield f'<line class="grid" x1="{_LEFT}" y1="{at}" x2="{right}" y2="{at}"/>'
        yield _text(_LEFT - 10, at + 4, written(value), "dim", "end")
    yield f'<line class="rule" x1="{_LEFT}" y1="{_BOTTOM}" x2="{right}" y2="{_BOTTOM}"/>'
    for value in x.ticks(8):
        at = x.at(value)
        yield f'<line class="rule" x1="{at}" y1="{_BOTTOM}" x2="{at}" y2="{_BOTTOM + 5}"/>'
        yield _text(at, _BOTTOM + 20, written(value), "dim", "middle")
    middle = (_LEFT + right) / 2
    yield _text(middle, HEIGHT - 14, picture.x + (", logarithmic" if x.is_log else ""), "dim", "middle")


def _drawn(line: _Line, x: Scale, y: Scale) -> Iterator[str]:
    places = [(x.at(point.x), y.at(point.y)) for point in line.points]
    if len(places) > 1:
        edge = [(x.at(point.x), y.at(point.most)) for point in line.points]
        edge += [(x.at(point.x), y.at(point.least)) for point in reversed(line.points)]
        yield f'<polygon class="band f{line.ink}" points="{_joined(edge)}"/>'
        style = "line level" if line.is_level else "line"
        yield f'<polyline class="{style} s{line.ink}" points="{_joined(places)}"/>'
    if line.is_level:
        return
    for point, (left, top) in zip(line.points, places, strict=True):
        said = f"{line.curve.name}, {written(point.x)}: {written(point.y)} ({written(point.least)} to {written(point.most)})"
        yield f'<g transform="translate({left} {top})"><title>{_safe(said)}</title>{_marker(line)}</g>'


def _marker(line: _Line) -> str:
    style = f'class="dot f{line.ink}"'
    return {
        "circle": f'<circle {style} r="4.5"/>',
        "square": f'<rect {style} x="-4.2" y="-4.2" width="8.4" height="8.4" rx="1"/>',
        "diamond": f'<path {style} d="M0 -5.8 L5.8 0 L0 5.8 L-5.8 0 Z"/>',
        "triangle": f'<path {style} d="M0 -5.6 L5.4 4.2 H-5.4 Z"/>',
    }[line.shape]


def _told(line: _Line) -> tuple[str, str]:
    last = line.points[-1]
    if line.is_level:
        return line.curve.name, written(_short(last.y))
    return line.curve.name, f"{written(_short(last.y))} at {written(last.x)}"


def _short(value: float) -> float:
    """Return a figure with three digits that count, or all before the point."""
    return float(f"{value:.3g}") if abs(value) < 1000 else round(value)


def _labels(lines: Sequence[_Line], x: Scale, y: Scale) -> Iterator[str]:
    left = x.at(x.high) + 26
    ends = [y.at(line.points[-1].y) for line in lines]
    for line, end, at in zip(lines, ends, apart(ends, _BETWEEN_LABELS, _TOP + 2, _BOTTOM - 6), strict=True):
        begin = x.at(line.points[-1].x) + (7 if not line.is_level else 2)
        if abs(at - end) > 4 or left - begin > 24:
            yield f'<line class="lead s{line.ink}" x1="{begin:.1f}" y1="{end:.1f}" x2="{left - 5:.1f}" y2="{at:.1f}"/>'
        name, figure = _told(line)
        most = int((WIDTH - 8 - left) / _CELL)
        name = name if len(name) <= most else f"{name[: most - 1]}…"
        yield _text(left, at, name, f"name f{line.ink}")
        yield _text(left, at + 14, figure, "dim")


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{left:.1f},{top:.1f}" for left, top in places)


def _text(left: float, top: float, said: str, style: str, anchor: str = "") -> str:
    where = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text class="{style}" x="{left:.1f}" y="{top:.1f}"{where}>{_safe(said)}</text>'


def _safe(said: str) -> str:
    return escape(said, {'"': "&quot;"})
