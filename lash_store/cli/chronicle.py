"""Owns how the time of a file's sessions is read: which tasks, what their events say, and which owners lived when."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .kin import Family, Key, TaskNode
from .lifelines import Death, Happened, Lifeline, Mark, iso_of, lifeline, ms_of
from .lives import DEAD, OwnerLife, horizon_of, owners_of
from .output import cropped
from .snapshot import Snapshot, loaded

__all__ = ["Chronicle", "Line", "Section", "Window", "as_json", "read"]

_MOST_SAID = 400
"""Characters that are kept of what an event says."""


class Window(NamedTuple):
    """Which part of the time is wanted, in milliseconds since the epoch; *last* is counted back from the end of it."""

    since: int | None = None
    until: int | None = None
    last: int | None = None

    def of(self, begin: int, end: int) -> tuple[int, int]:
        """Return the part that is wanted of what there is."""
        end = end if self.until is None else self.until
        if self.last is not None:
            begin = end - self.last
        if self.since is not None:
            begin = self.since
        elif self.until is not None:
            begin = min(begin, end)
        return begin, max(begin, end)

    @property
    def is_whole(self) -> bool:
        return self == Window()


class Line(NamedTuple):
    """A line of a section: a task with its time, or, without one, the heading of a session that a sub-agent works in."""

    depth: int
    name: str
    task: TaskNode | None = None
    mode: str | None = None
    life: Lifeline | None = None


@dataclass(slots=True)
class Section:
    """
    What there is to see of one session, or of one task and all below it.

    *left_out* tasks are not shown for there are too many, *outside* ones for they are not of the time that is wanted; *pruned*
    ones are not in the file any more, *moved_away* ones are in other sessions now.
    """

    name: str
    opened_at: int | None
    closed_at: int | None
    lines: list[Line] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    left_out: int = 0
    outside: int = 0
    pruned: int = 0
    moved_away: int = 0


class Chronicle(NamedTuple):
    """All that a picture shows. *horizon* is up to when things are known: now, if *is_live*: an owner is at work."""

    sections: list[Section]
    owners: list[OwnerLife]
    begin: int
    end: int
    horizon: int
    is_live: bool
    set_back: int


def read(snapshot: Snapshot, scopes: Sequence[str], task: int | None, window: Window, most: int) -> Chronicle:
    """
    Read the time of some sessions, or of a task and all below it: at most *most* tasks, live ones first, then the newest.

    What is under a task, and in one session alone also what its sub-agents' sessions do, stands below it.
    """
    family = Family(snapshot)
    sections, places = _placed(snapshot, family, scopes, task)
    horizon, is_live, lives = horizon_of(snapshot)
    begin, end = window.of(*_span(family, places, horizon))
    kept = _within(family, places, begin, end, horizon) if not window.is_whole else None
    shown = _chosen(family, places, kept, most)
    events = _events(snapshot, shown)
    modes = dict(
        snapshot.rows(
            "SELECT task_seq, mode FROM tasks WHERE task_seq IN (SELECT value FROM json_each(:keys))",
            keys=json.dumps([*shown]),
        )
    )
    named = {event.owner for happened in events.values() for event in happened if event.owner is not None}
    owners = owners_of(snapshot, {one.name.partition(":")[0] for one in sections}, named, lives, horizon)
    deaths = {
        one.owner_id: Death(one.last_heard, one.end if one.how == "died" else None) for one in owners if one.how in DEAD
    }
    set_back = 0
    for section, rows in zip(sections, places, strict=True):
        for depth, key in rows:
            if isinstance(key, str):
                section.lines.append(Line(depth, key))
            elif key in shown:
                life = lifeline(events[key], deaths, horizon, is_external=modes.get(key) == "external")
                set_back += life.set_back
                section.lines.append(Line(depth, family.tasks[key].id, family.tasks[key], modes.get(key), life))
            elif kept is not None and key not in kept:
                section.outside += 1
            else:
                section.left_out += 1
    if window.is_whole:
        begin, end = _seen(sections, horizon, (begin, end))
    owners = [one for one in owners if one.owner_id in named or (one.begin <= end and one.end >= begin)]
    return Chronicle(sections, owners, begin, end, horizon, is_live, set_back)


# --- which tasks ----------------------------------------------------------------------------------------------------

_Rows = list[tuple[int, Key]]


def _placed(
    snapshot: Snapshot, family: Family, scopes: Sequence[str], task: int | None
) -> tuple[list[Section], list[_Rows]]:
    """Return the sections, empty, and what stands in each, in the order of the tree, with its depth."""
    if task is not None:
        family.load([task])
        node = family.tasks[task]
        sections = [Section(f"{node.scope}  #{task}", None, None)]
        rows = [[*_walk(family, task, 0)]]
        seqs = json.dumps([key for _, key in rows[0] if isinstance(key, int)])
        sections[0].pruned = snapshot.rows(_PRUNED_BELOW, seqs=seqs)[0][0]
        return sections, rows
    family.load(scopes)
    sections, rows = [], []
    pruned, moved_away = dict(snapshot.rows(_PRUNED)), dict(snapshot.rows(_MOVED_AWAY))
    marks = _session_marks(snapshot)
    for scope in scopes:
        session = family.sessions[scope]
        section = Section(scope, ms_of(session.opened_at), ms_of(session.closed_at))
        section.pruned, section.moved_away = pruned.get(scope, 0), moved_away.get(scope, 0)
        section.marks = marks[scope]
        sections.append(section)
        rows.append([*_walk(family, scope, -1)][1:])
    return sections, rows


_PRUNED_BELOW = "SELECT count(*) FROM tombstones WHERE parent_seq IN (SELECT value FROM json_each(:seqs))"
_PRUNED = "SELECT scope, count(*) FROM tombstones GROUP BY scope"
_MOVED_AWAY = """
SELECT e.from_scope, count(DISTINCT e.task_seq) FROM events AS e JOIN tasks AS t ON t.task_seq = e.task_seq
WHERE e.type = 'transferred' AND t.scope <> e.from_scope GROUP BY e.from_scope"""


def _walk(family: Family, root: Key, depth: int) -> Iterator[tuple[int, Key]]:
    """Yield what is under a member, itself first: tasks and sessions that are no section of their own."""
    left = [(depth, root)]
    while left:
        depth, key = left.pop()
        yield depth, key
        under = family.below.get(key, ())
        left += [(depth + 1, one) for one in reversed(under)]


_OF_SESSIONS = "SELECT seq, type, at, scope, from_scope, data FROM events WHERE task_seq IS NULL ORDER BY seq"


def _session_marks(snapshot: Snapshot) -> dict[str, list[Mark]]:
    """Return what happened to each session; a handoff to both."""
    found: dict[str, list[Mark]] = defaultdict(list)
    for seq, kind, at, where, source, data in snapshot.rows(_OF_SESSIONS):
        when = ms_of(at)
        if when is None:
            continue
        says = None
        if kind == "handed_off":
            told = loaded(data)
            moved = told.get("moved") if isinstance(told, dict) else None
            says = f"from {source} to {where}: {len(moved) if isinstance(moved, list) else '?'} tasks moved"
        for scope in {where, source} - {None}:
            found[scope].append(Mark(kind, when, 0, seq, says))
    return found


def _ends(node: TaskNode, horizon: int) -> tuple[int, int] | None:
    begin = ms_of(node.created_at)
    if begin is None:
        return None
    end = horizon if node.completed_at is None else ms_of(node.completed_at)
    return begin, max(begin, begin if end is None else end)


def _span(family: Family, places: Iterable[_Rows], horizon: int) -> tuple[int, int]:
    ends = [_ends(family.tasks[key], horizon) for rows in places for _, key in rows if isinstance(key, int)]
    known = [one for one in ends if one is not None]
    if not known:
        return horizon, horizon
    return min(begin for begin, _ in known), max(end for _, end in known)


def _within(family: Family, places: Iterable[_Rows], begin: int, end: int, horizon: int) -> set[int]:
    """Return the tasks that were there at some time of the window."""
    found = set()
    for rows in places:
        for _, key in rows:
            ends = _ends(family.tasks[key], horizon) if isinstance(key, int) else None
            if isinstance(key, int) and (ends is None or (ends[0] <= end and ends[1] >= begin)):
                found.add(key)
    return found


def _chosen(family: Family, places: Iterable[_Rows], kept: set[int] | None, most: int) -> set[int]:
    """Return at most so many tasks, live ones before the newest; one comes with what it is under, as long as there is room."""
    there = {key for rows in places for _, key in rows if isinstance(key, int) and (kept is None or key in kept)}
    if len(there) <= most:
        return there
    chosen: set[int] = set()
    for key in sorted(there, key=lambda seq: (family.tasks[seq].completed_at is not None, -seq)):
        path = []
        above: int | None = key
        while above in there and above not in chosen and above not in path:
            path.append(above)
            above = family.tasks[above].parent_seq
        if len(chosen) + len(path) <= most:
            chosen.update(path)
    return chosen


def _seen(sections: Iterable[Section], horizon: int, otherwise: tuple[int, int]) -> tuple[int, int]:
    """Return from when to when there is something to see."""
    moments = []
    for section in sections:
        for line in section.lines:
            if line.life is not None and line.life.segments:
                moments += [line.life.segments[0].begin, line.life.segments[-1].end]
    if moments:
        return min(moments), max(moments)
    opened = [one.opened_at for one in sections if one.opened_at is not None]
    return (min(opened), max(horizon, *opened)) if opened else otherwise


# --- what happened to them ------------------------------------------------------------------------------------------

_TOLD = (
    "state",
    "owner_id",
    "waiting_for",
    "not_before",
    "wake_at",
    "step",
    "step_kind",
    "progress",
    "reason",
    "signal",
    "note",
    "cancel_reason",
    "last_error.message",
    "error.message",
    "callback_error.message",
    "failure.message",
)
_EVENTS = f"""
SELECT task_seq, seq, type, at, attempt, scope, from_scope,
  iif(json_valid(data), json_extract(data, {", ".join(f"'$.{name}'" for name in _TOLD)}), NULL),
  iif(json_valid(data), json_type(data, '$.owner_id') IS NOT NULL, 0)
FROM events WHERE task_seq IN (SELECT value FROM json_each(:keys)) ORDER BY task_seq, seq"""


def _events(snapshot: Snapshot, keys: Iterable[int]) -> dict[int, list[Happened]]:
    found: dict[int, list[Happened]] = defaultdict(list)
    for row in snapshot.rows(_EVENTS, keys=json.dumps([*keys])):
        found[row[0]].append(_happened(*row[1:]))
    return found


def _happened(
    seq: int, kind: str, at: str, attempt: Any, scope: str, source: str | None, told: str | None, has_owner: int
) -> Happened:
    data = dict(zip(_TOLD, json.loads(told), strict=True)) if told else {}
    words = [data.get(name) for name in _TOLD[7:]]
    says = next((str(word) for word in words if word is not None), None)
    owner = data.get("owner_id")
    return Happened(
        seq,
        kind,
        ms_of(at),
        attempt if isinstance(attempt, int) else 0,
        scope,
        source,
        _text(data.get("state")),
        bool(has_owner),
        owner if isinstance(owner, int) else None,
        _text(data.get("waiting_for")),
        ms_of(data.get("not_before")),
        ms_of(data.get("wake_at")),
        _text(data.get("step")),
        _text(data.get("step_kind")),
        None if says is None else cropped(says[:_MOST_SAID], _MOST_SAID),
    )


def _text(value: Any) -> str | None:
    return value[:_MOST_SAID] if isinstance(value, str) else None


# --- as data --------------------------------------------------------------------------------------------------------


def as_json(chronicle: Chronicle) -> dict[str, Any]:
    """Return all of it as plain JSON, times as the file writes them."""
    return {
        "from": iso_of(chronicle.begin),
        "to": iso_of(chronicle.end),
        "known_until": iso_of(chronicle.horizon),
        "is_live": chronicle.is_live,
        "events_set_back": chronicle.set_back,
        "owners": [
            {**one._asdict(), **{name: iso_of(getattr(one, name)) for name in ("begin", "last_heard", "end")}}
            for one in chronicle.owners
        ],
        "sections": [_section_json(section) for section in chronicle.sections],
    }


def _section_json(section: Section) -> dict[str, Any]:
    return {
        "name": section.name,
        "opened_at": None if section.opened_at is None else iso_of(section.opened_at),
        "closed_at": None if section.closed_at is None else iso_of(section.closed_at),
        "left_out": section.left_out,
        "outside": section.outside,
        "pruned": section.pruned,
        "moved_away": section.moved_away,
        "marks": [_mark_json(mark) for mark in section.marks],
        "tasks": [_line_json(line) for line in section.lines if line.task is not None],
    }


def _line_json(line: Line) -> dict[str, Any]:
    task, life = line.task, line.life
    assert task is not None
    assert life is not None
    return {
        "task_seq": task.task_seq,
        "scope": task.scope,
        "id": task.id,
        "depth": line.depth,
        "parent_seq": task.parent_seq,
        "kind": task.kind,
        "mode": line.mode,
        "state": task.state,
        "attempt": task.attempt,
        "ended_at": None if life.end is None else iso_of(life.end[1]),
        "segments": [
            {**one._asdict(), "begin": iso_of(one.begin), "end": iso_of(one.end), "ms": one.end - one.begin}
            for one in life.segments
        ],
        "marks": [_mark_json(mark) for mark in life.marks],
    }


def _mark_json(mark: Mark) -> dict[str, Any]:
    return {**mark._asdict(), "at": iso_of(mark.at)}
