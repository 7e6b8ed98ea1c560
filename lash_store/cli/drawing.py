"""Owns the picture of a timeline: one SVG that needs nothing else, in which every text is made harmless."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from .chronicle import Chronicle, Line, Section
from .glyphs import DEFINITIONS, ENDS, MARKS, PHASES, STYLE, end_cap, mark
from .lifelines import Lifeline, Mark, Phase, Segment
from .lives import DEAD, OwnerLife
from .output import cropped, safe
from .paper import LEFT, RIGHT, WIDTH, Axis, bar, clock, cut, harmless, label, moved, name, span_of, tooltip

__all__ = ["draw", "told"]

_ROW, _LANE, _HEAD = 22, 18, 26
_CELL = 6.65
_LANES = 6
"""Lines for owners: those of a store that was killed a hundred times stand on two, but many may live at once."""


# --- the picture ----------------------------------------------------------------------------------------------------


def draw(chronicle: Chronicle, title: str) -> str:
    """Return the picture as the text of an SVG file."""
    return "\n".join(_Picture(chronicle, title).whole())


def told(chronicle: Chronicle) -> list[str]:
    """Return what must be known of a picture: what is not in it, and what is not what it seems."""
    sections = chronicle.sections
    said = []
    for count, words in (
        (sum(one.left_out for one in sections), "more tasks are not shown: see --limit"),
        (sum(one.outside for one in sections), "tasks are outside of the chosen time"),
        (sum(one.pruned for one in sections), "tasks were pruned, and are not in the file"),
        (sum(one.moved_away for one in sections), "tasks were moved to other sessions, and stand there"),
        (
            chronicle.set_back,
            "events are dated before what came first: a clock was set back; they stand at no distance",
        ),
    ):
        if count:
            said.append(f"{count:,} {words}")
    if not chronicle.is_live and any(_is_open(line) for one in sections for line in one.lines):
        said.append(f"no owner is at work: known up to {clock(chronicle.horizon)}")
    return said


def _is_open(line: Line) -> bool:
    return line.life is not None and any(segment.is_open for segment in line.life.segments)


class _Owner(NamedTuple):
    life: OwnerLife
    lane: int


class _Picture:
    """Lays the picture out from the top down."""

    def __init__(self, chronicle: Chronicle, title: str) -> None:
        self._all = chronicle
        self._title = title
        self._axis = Axis(chronicle.begin, chronicle.end)
        self._pids = {one.owner_id: one for one in chronicle.owners}
        self._y = 0.0
        self._used: set[str] = set()

    def whole(self) -> list[str]:
        body = [*self._heading(), *self._notices()]
        top = self._y
        lower = [*self._owners()]
        axis_at = self._y + 16
        self._y += 24
        for section in self._all.sections:
            lower += self._section(section)
        bottom = self._y
        lower += self._legend()
        height = round(self._y + 14)
        return [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
            f'role="img" aria-label="{harmless(self._title)}">',
            f"<style>{STYLE}</style>",
            f'<defs>{DEFINITIONS}<clipPath id="names"><rect width="{LEFT - 6}" height="{height}"/></clipPath></defs>',
            f'<rect class="bg" width="{WIDTH}" height="{height}"/>',
            *body,
            *self._grid(top, axis_at, bottom),
            *lower,
            "</svg>",
            "",
        ]

    def _heading(self) -> Iterator[str]:
        whole = self._all
        yield label(16, 26, cropped(safe(self._title), 120), "title", whole=self._title)
        count = sum(line.task is not None for section in whole.sections for line in section.lines)
        ends = " (now)" if whole.is_live and whole.end >= whole.horizon else ""
        yield label(
            16,
            45,
            f"{count:,} {'task' if count == 1 else 'tasks'} · {span_of(whole.end - whole.begin)}, "
            f"{clock(whole.begin)} to {clock(whole.end)}{ends} · all times UTC",
            "dim",
        )
        self._y = 56

    def _notices(self) -> Iterator[str]:
        for said in told(self._all):
            self._y += 12
            yield label(16, self._y, said, "warn" if "not shown" in said else "dim")
            self._y += 4
        self._y += 4

    def _grid(self, top: float, axis_at: float, bottom: float) -> Iterator[str]:
        for at, said in self._axis.ticks():
            x = self._axis.x(at)
            yield f'<line class="grid" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>'
            if x < WIDTH - 40:
                yield label(x, axis_at, said, "dim small", anchor="middle")
        yield f'<line class="rule" x1="{LEFT}" y1="{axis_at + 5}" x2="{RIGHT}" y2="{axis_at + 5}"/>'
        if self._all.is_live and self._axis.holds(self._all.horizon):
            x = self._axis.x(self._all.horizon)
            yield f'<line class="now" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}"/>'
            yield label(x + 3, bottom - 2, "now", "dim small")

    # --- owners ---

    def _owners(self) -> Iterator[str]:
        placed, left_out = _in_lanes(self._all.owners)
        if not placed:
            return
        yield label(16, self._y + 13, "owners (processes)", "name")
        if left_out:
            yield label(LEFT - 12, self._y + 13, f"{left_out} more", "warn small", anchor="end")
        several = len({one.life.runtime for one in placed}) > 1
        for one in placed:
            yield from self._owner(one.life, self._y + one.lane * _LANE + 9, several)
        self._y += (1 + max(one.lane for one in placed)) * _LANE + 6

    def _owner(self, life: OwnerLife, y: float, several: bool) -> Iterator[str]:
        begin, heard, end = self._axis.x(life.begin), self._axis.x(life.last_heard), self._axis.x(life.end)
        said = f"#{life.owner_id} pid {life.pid}" + (f" {life.runtime}" if several else "")
        how = {
            "alive": "alive",
            "dead": "dead, not found by another owner yet",
            "died": f"found dead at {clock(life.end)}",
            "closed": f"closed at {clock(life.end)}",
            "abandoned": f"given up at {clock(life.end)}",
            "unreachable": "not closed, as far as this file knows",
        }.get(life.how, life.how)
        if life.how in DEAD:
            how = f"last heard of at {clock(life.last_heard)}, {how}"
        title = f"owner {said} on {life.host}\nfrom {clock(life.begin)}\n{how}"
        yield f"<g>{tooltip(title)}"
        yield bar("life", begin, heard, y, 10)
        if life.how in DEAD:
            self._used |= {"died", "lost"}
            yield f"{bar('life faint', heard, end, y, 10)}{bar('', heard, end, y, 10, fill='lost')}"
            if self._axis.holds(life.last_heard):
                yield moved(heard, y, mark("died"))
        elif life.how == "alive":
            yield f'<path class="life" d="M{end} {y - 5} l6 5 l-6 5 Z"/>'
        elif life.how == "closed" and self._axis.holds(life.end):
            yield f'<path class="ink" d="M{end} {y - 6} V{y + 6}"/>'
        elif life.how == "abandoned" and self._axis.holds(life.end):
            yield moved(end, y, mark("released"))
        wide = heard - begin - (10 if life.how in DEAD else 0)
        if wide > len(said) * 5.4 + 8:
            yield f'<text class="onbar" x="{begin + 4}" y="{y + 3.3}">{harmless(said)}</text>'
        elif wide > 20:
            yield f'<text class="onbar" x="{begin + 3}" y="{y + 3.3}">#{life.owner_id}</text>'
        yield "</g>"

    # --- tasks ---

    def _section(self, section: Section) -> Iterator[str]:
        self._y += 4
        y = self._y + _HEAD / 2
        yield f'<rect class="band" x="8" y="{self._y}" width="{WIDTH - 16}" height="{_HEAD - 2}"/>'
        yield name(16, y + 4, section.name, "name", (LEFT - 26) / 7.6)
        if section.opened_at is not None:
            closed = max(self._axis.end if section.closed_at is None else section.closed_at, section.opened_at)
            begin, end = self._axis.x(section.opened_at), self._axis.x(closed)
            until = "still open" if section.closed_at is None else f"closed {clock(section.closed_at)}"
            yield f"<g>{tooltip(f'session {section.name}, opened {clock(section.opened_at)}, {until}')}"
            yield f"{bar('session', begin, end, y, 3)}</g>"
            if section.closed_at is not None and self._axis.holds(section.closed_at):
                yield f'<path class="ink" d="M{end} {y - 5} V{y + 5}"/>'
        yield from self._marks([one for one in section.marks if one.what in MARKS], y)
        self._y += _HEAD
        if not section.lines:
            nothing = "no tasks" if not section.left_out + section.outside else "no tasks of this time"
            yield label(28, self._y + 14, nothing, "dim")
            self._y += _ROW
        for number, line in enumerate(section.lines):
            yield from self._line(line, striped=number % 2 == 1)
            self._y += _ROW

    def _line(self, line: Line, *, striped: bool) -> Iterator[str]:
        y = self._y + _ROW / 2
        indent = 20 + min(line.depth, 10) * 12
        if line.task is None or line.life is None:
            yield name(indent, y + 4, line.name, "name", (LEFT - 10 - indent) / 7.6)
            return
        if striped:
            yield f'<rect class="band" x="8" y="{self._y}" width="{WIDTH - 16}" height="{_ROW}" opacity=".6"/>'
        yield f'<g class="task" id="task-{line.task.task_seq}">'
        number = f"#{line.task.task_seq}"
        room = (LEFT - 12 - indent) / _CELL - len(number) - 1
        yield _label(indent, y + 4, line, number, int(room))
        yield from self._bar(line.life, y)
        yield "</g>"

    def _bar(self, life: Lifeline, y: float) -> Iterator[str]:
        axis = self._axis
        seen = [one for one in life.segments if one.end >= axis.begin and one.begin <= axis.end]
        for one in seen:
            yield from self._segment(one, y)
        yield from self._marks(life.marks, y)
        if len({one.attempt for one in life.segments if one.attempt}) > 1:
            yield from self._numbers(seen, y)
        if seen and life.segments[0].begin < axis.begin:
            self._used.add("outside")
            yield f'<path class="ink" d="M{LEFT - 3} {y - 5} l-4 5 l4 5"/>'
        if seen and (life.end[1] if life.end else life.segments[-1].end) > axis.end:
            self._used.add("outside")
            yield f'<path class="ink" d="M{RIGHT + 3} {y - 5} l4 5 l-4 5"/>'
        yield from self._end(life, y)

    def _numbers(self, segments: Iterable[Segment], y: float) -> Iterator[str]:
        """Number the tries of a task that has several, where there is room."""
        numbered: set[int] = set()
        for one in segments:
            begin, end = self._axis.x(one.begin), self._axis.x(one.end)
            if one.phase is Phase.RUNNING and one.attempt not in numbered and end - begin > 26:
                numbered.add(one.attempt)
                yield f'<text class="onbar" x="{begin + 13}" y="{y + 3.3}">{one.attempt}</text>'

    def _segment(self, one: Segment, y: float) -> Iterator[str]:
        begin, end = self._axis.x(one.begin), self._axis.x(one.end)
        called, high = PHASES[one.phase]
        self._used.add(one.phase)
        yield f"<g>{tooltip(self._said(one, called))}"
        if one.phase is Phase.LOST:
            was = one.was or Phase.RUNNING
            yield self._filled(was, begin, end, y, PHASES[was][1], "faint")
            yield bar("", begin, end, y, high, fill="lost")
        else:
            yield self._filled(one.phase, begin, end, y, high)
        if one.is_open and self._axis.holds(one.end):
            self._used.add("open")
            style = one.was or one.phase
            shape = "solid" if style in {Phase.BACKOFF, Phase.UNOWNED} else style
            faint = " faint" if one.phase is Phase.LOST else ""
            yield f'<path class="{shape}{faint}" d="M{end} {y - 6} l7 6 l-7 6 Z"/>'
        yield "</g>"

    @staticmethod
    def _filled(phase: Phase, begin: float, end: float, y: float, high: float, how: str = "") -> str:
        wide = max(end - begin, 1.5)
        if phase is Phase.UNOWNED:
            return f'<path class="unowned {how}" d="M{begin} {y} h{wide:.1f}"/>'
        made = bar(f"{phase} {how}".strip(), begin, end, y, high)
        pattern = {Phase.WAITING: "waits", Phase.CANCELLING: "cancels"}.get(phase)
        return made if pattern is None or how else made + bar("", begin, end, y, high, fill=pattern)

    def _said(self, one: Segment, called: str) -> str:
        words = [f"{called} · try {one.attempt} · {span_of(one.end - one.begin)}{' so far' if one.is_open else ''}"]
        if one.why is not None:
            words.append(one.why)
        if one.was is not None:
            words.append(f"before: {PHASES[one.was][0]}")
        words.append(f"{clock(one.begin)} to {clock(one.end)}")
        if one.owner_id is not None:
            owner = self._pids.get(one.owner_id)
            words.append(f"owner #{one.owner_id}" + (f", pid {owner.pid} on {owner.host}" if owner else ""))
        return "\n".join(words)

    def _marks(self, marks: Iterable[Mark], y: float) -> Iterator[str]:
        """Draw marks; of many of a kind on one pixel, one that tells how many."""
        here: dict[tuple[str, int], list[Mark]] = {}
        for one in marks:
            if self._axis.holds(one.at):
                here.setdefault((one.what, round(self._axis.x(one.at))), []).append(one)
        for what, some in sorted(here.items(), key=lambda item: _ORDER[item[0][0]]):
            self._used.add(what[0])
            first = some[0]
            said = f"{MARKS[what[0]]}: {first.says}" if first.says else MARKS[what[0]]
            more = f"\nand {len(some) - 1} more here" if len(some) > 1 else ""
            x = self._axis.x(first.at)
            yield moved(x, y, tooltip(f"{said}\n{clock(first.at)}{more}") + mark(what[0]))

    def _end(self, life: Lifeline, y: float) -> Iterator[str]:
        if not life.segments:
            yield label(LEFT + 4, y + 4, "no events of it are in the file", "dim small")
            return
        begin, last = life.segments[0].begin, life.segments[-1].end
        if last < self._axis.begin or begin > self._axis.end:
            return
        took, gap = span_of(last - begin), 12.0
        x = self._axis.x(last)
        if life.end is not None and self._axis.holds(life.end[1]) and life.end[0] in ENDS:
            state, at = life.end
            self._used.add(state)
            x = max(self._axis.x(at), self._axis.x(begin) + 1.5)
            yield moved(x + 8, y, tooltip(f"{state} at {clock(at)}, after {took}") + end_cap(state))
            gap = 19
        room = len(took) * 5 + 4
        if x + gap + room < WIDTH - 6:
            yield label(x + gap, y + 3.3, took, "dim small")
        elif self._axis.x(begin) - room > LEFT:
            yield label(self._axis.x(begin) - 5, y + 3.3, took, "dim small", anchor="end")

    # --- the legend ---

    def _legend(self) -> Iterator[str]:
        self._y += 14
        x, y = 16.0, self._y + 8
        for key, called in (
            *((phase, called) for phase, (called, _) in PHASES.items()),
            *ENDS.items(),
            ("open", "not over"),
            ("outside", "goes on outside"),
            *MARKS.items(),
        ):
            if key not in self._used:
                continue
            room = 34 + len(called) * 5.9 + 12
            if x + room > WIDTH - 10:
                x, y = 16.0, y + 22
            yield self._key(key, x, y)
            yield label(x + 32, y + 4, called, "dim")
            x += room
        self._y = y + 8

    def _key(self, key: str, x: float, y: float) -> str:
        if key == "lost":
            return bar("running faint", x, x + 24, y, 12) + bar("", x, x + 24, y, 12, fill="lost")
        if key in PHASES:
            return self._filled(Phase(key), x, x + 24, y, PHASES[key][1])
        if key in ENDS:
            return moved(x + 14, y, end_cap(key))
        if key == "open":
            return bar("running", x, x + 16, y, 12) + f'<path class="running" d="M{x + 16} {y - 6} l7 6 l-7 6 Z"/>'
        if key == "outside":
            return bar("running", x, x + 16, y, 12) + f'<path class="ink" d="M{x + 19} {y - 5} l4 5 l-4 5"/>'
        on_bar = bar("running", x, x + 24, y, 12) if key in {"progress", "saved"} else ""
        return on_bar + moved(x + 14, y, mark(key))


_ORDER = {what: place for place, what in enumerate(reversed(MARKS))}
"""What matters most is drawn last, over the rest."""


def _in_lanes(owners: Sequence[OwnerLife]) -> tuple[list[_Owner], int]:
    """Put owners that did not live at once on one line, and say how many have no room."""
    ends: list[int] = []
    placed, left_out = [], 0
    for life in sorted(owners, key=lambda one: (one.begin, one.owner_id)):
        lane = next((number for number, end in enumerate(ends) if end <= life.begin), len(ends))
        if lane >= _LANES:
            left_out += 1
            continue
        ends[lane : lane + 1] = [life.end]
        placed.append(_Owner(life, lane))
    return placed, left_out


def _label(x: float, y: float, line: Line, number: str, cells: int) -> str:
    assert line.task is not None
    task = line.task
    said = [f"{safe(task.id)} {number}", f"in {safe(task.scope)}", f"{safe(task.kind)}, {safe(task.state)}"]
    if task.says:
        said.append(safe(task.says))
    return (
        f'<g clip-path="url(#names)"><text class="id" x="{x:.1f}" y="{y:.1f}">{tooltip(chr(10).join(said))}'
        f'{harmless(cut(task.id, cells))}<tspan class="dim" dx="5">{number}</tspan></text></g>'
    )
