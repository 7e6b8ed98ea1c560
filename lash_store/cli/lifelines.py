"""
Owns what the events of a task say of its time: segments that follow each other, marks, and its end. Pure: reads no file.

All times here are whole milliseconds since the epoch. Events are taken in ``seq`` order: one that a clock set back dates
earlier than those before it counts as at the same time as they, so nothing has a negative length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple

from .output import stored
from .phrases import ENDED

__all__ = ["Death", "Happened", "Lifeline", "Mark", "Phase", "Segment", "iso_of", "lifeline", "ms_of"]


class Phase(StrEnum):
    """
    What a task did for a while.

    ``queued``: an owner has it, and no body runs. ``backoff``: put off until a retry is due. ``waiting``: its body waits, or
    sleeps. ``lost``: its owner died in here, nobody knows when; ``was`` says what it did until then. ``unowned``: free, nobody
    has it.
    """

    QUEUED = "queued"
    BACKOFF = "backoff"
    RUNNING = "running"
    WAITING = "waiting"
    CANCELLING = "cancelling"
    LOST = "lost"
    UNOWNED = "unowned"


class Happened(NamedTuple):
    """One event of a task: its columns, and of its data what tells of time; *owner* is None unless *has_owner*."""

    seq: int
    type: str
    at: int | None
    attempt: int
    scope: str
    from_scope: str | None
    state: str | None = None
    has_owner: bool = False
    owner: int | None = None
    waiting_for: str | None = None
    not_before: int | None = None
    wake_at: int | None = None
    step: str | None = None
    step_kind: str | None = None
    says: str | None = None


class Death(NamedTuple):
    """An owner that died: when it was last heard of, and when it was found dead, if it was."""

    last_heard: int
    found: int | None


class Segment(NamedTuple):
    """What a task did from when to when; *is_open*: it goes on. *was* is what a lost one did until its owner died."""

    phase: Phase
    begin: int
    end: int
    attempt: int
    owner_id: int | None
    why: str | None
    was: Phase | None
    is_open: bool = False


class Mark(NamedTuple):
    """What happened at one moment; *seq* is its event, None for a death, which nobody could write down."""

    what: str
    at: int
    attempt: int
    seq: int | None
    says: str | None


class Lifeline(NamedTuple):
    """The whole of a task's time; *end* is its terminal state and when, *set_back* the events that a clock dated too early."""

    segments: tuple[Segment, ...]
    marks: tuple[Mark, ...]
    end: tuple[str, int] | None
    set_back: int


_HEARD = frozenset({"progress", "saved", "state_changed", "noted", "retry_scheduled"})
"""Events that a body writes, or that say it stopped: it does not sleep in them."""

_MARKS = frozenset(
    {
        "reattached",
        "claimed",
        "released",
        "progress",
        "saved",
        "signalled",
        "noted",
        "transferred",
        "cancel_requested",
        "callback_failed",
    }
)


def lifeline(events: Iterable[Happened], deaths: Mapping[int, Death], horizon: int, *, is_external: bool) -> Lifeline:
    """Return what the events of one task say, up to *horizon*: what is not over by then is open."""
    teller = _Teller(deaths, is_external)
    for event in events:
        teller.take(event)
    return teller.told(horizon)


class _Teller:
    """Folds events into what they say of time."""

    def __init__(self, deaths: Mapping[int, Death], is_external: bool) -> None:
        self._deaths = deaths
        self._is_external = is_external
        self._segments: list[Segment] = []
        self._marks: list[Mark] = []
        self._end: tuple[str, int] | None = None
        self._set_back = 0
        self._clock: int | None = None
        self._state: str | None = None
        self._attempt = 0
        self._owner: int | None = None
        self._waiting_for: str | None = None
        self._not_before: int | None = None
        self._asleep: tuple[int, str] | None = None
        self._buried: set[tuple[int, int]] = set()

    def take(self, event: Happened) -> None:
        """Let one event happen."""
        at = self._moved_on(event.at)
        if at is None:
            return
        if self._state is not None and self._end is None:
            self._tell(at)
        self._clock = at
        if self._end is None:
            self._apply(event, at)
        self._mark(event, at)

    def told(self, horizon: int) -> Lifeline:
        """Return all that was said."""
        if self._clock is not None and self._end is None and self._state is not None:
            self._go_on(max(horizon, self._clock))
        lasting = {segment.attempt for segment in self._segments if segment.end > segment.begin}
        # of what took no time, only a try that has nothing else is worth a word
        lasting.add(0)
        segments = [one for one in self._segments if one.end > one.begin or one.is_open or one.attempt not in lasting]
        segments = segments or self._segments[-1:]
        return Lifeline(tuple(segments), tuple(self._marks), self._end, self._set_back)

    def _moved_on(self, at: int | None) -> int | None:
        if at is None:
            return self._clock
        if self._clock is None or at >= self._clock:
            return at
        self._set_back += 1
        return self._clock

    def _apply(self, event: Happened, at: int) -> None:
        self._attempt = event.attempt
        if event.has_owner:
            self._owner = event.owner
        if event.state is not None:
            self._state = event.state
            self._waiting_for = event.waiting_for if event.state == "waiting" else None
            self._not_before = event.not_before if event.state == "pending" else None
        elif event.type == "state_changed" and event.waiting_for is not None:
            self._waiting_for = event.waiting_for
        if event.type in _HEARD and event.state != "pending":
            # it did something: what slept is awake, as far as anybody knows
            self._asleep = None
        if event.wake_at is not None and event.wake_at > at:
            what = "sleeps" if event.step_kind == "sleep" else f"step {event.step} is to be tried again"
            self._asleep = event.wake_at, what
        if event.state in ENDED:
            self._end = str(event.state), at

    # --- segments ---

    def _tell(self, until: int) -> None:
        """Add what the task did since the event before."""
        assert self._clock is not None
        for phase, begin, end, why in self._phases(self._clock, until):
            self._split(phase, begin, end, why)

    def _go_on(self, horizon: int) -> None:
        """Add what the task does still; of a dead owner nobody knows, however lately it was heard of."""
        self._tell(horizon)
        last = self._segments[-1]
        if last.phase is not Phase.LOST and self._death() is not None:
            self._lose(last.phase, horizon, horizon)
        self._segments[-1] = self._segments[-1]._replace(is_open=True)

    def _death(self) -> Death | None:
        return None if self._is_external or self._owner is None else self._deaths.get(self._owner)

    def _phases(self, begin: int, end: int) -> list[tuple[Phase, int, int, str | None]]:
        match self._state:
            case "pending" if self._owner is None and not self._is_external:
                return [(Phase.UNOWNED, begin, end, None)]
            case "pending":
                return self._until(self._not_before, Phase.BACKOFF, "for its next try", Phase.QUEUED, begin, end)
            case "waiting":
                return [(Phase.WAITING, begin, end, self._waiting_for)]
            case "cancel_requested":
                return [(Phase.CANCELLING, begin, end, None)]
        until, why = self._asleep or (None, None)
        return self._until(until, Phase.WAITING, why, Phase.RUNNING, begin, end)

    @staticmethod
    def _until(
        when: int | None, first: Phase, why: str | None, then: Phase, begin: int, end: int
    ) -> list[tuple[Phase, int, int, str | None]]:
        if when is None or when <= begin:
            return [(then, begin, end, None)]
        if when >= end:
            return [(first, begin, end, why)]
        return [(first, begin, when, why), (then, when, end, None)]

    def _split(self, phase: Phase, begin: int, end: int, why: str | None) -> None:
        """Add a stretch, the part of it that a dead owner left lost."""
        death = self._death()
        if death is None or death.last_heard >= end:
            self._add(Segment(phase, begin, end, self._attempt, self._owner, why, None))
            return
        alone = max(begin, death.last_heard)
        if alone > begin:
            self._add(Segment(phase, begin, alone, self._attempt, self._owner, why, None))
        self._lose(phase, alone, end)

    def _lose(self, was: Phase, begin: int, end: int) -> None:
        assert self._owner is not None
        if (self._owner, self._attempt) not in self._buried:
            self._buried.add((self._owner, self._attempt))
            self._marks.append(Mark("died", begin, self._attempt, None, f"owner {self._owner} died"))
        self._add(Segment(Phase.LOST, begin, end, self._attempt, self._owner, None, was))

    def _add(self, new: Segment) -> None:
        if self._segments:
            last = self._segments[-1]
            if last._replace(begin=0, end=0) == new._replace(begin=0, end=0):
                self._segments[-1] = last._replace(end=new.end)
                return
        self._segments.append(new)

    # --- marks ---

    def _mark(self, event: Happened, at: int) -> None:
        what = event.type
        if event.type == "retry_scheduled":
            what = "retry" if event.state == "pending" else "step_retry"
        elif event.type not in _MARKS:
            return
        says = event.says
        if event.type == "transferred":
            says = f"from {event.from_scope} to {event.scope}"
        elif event.step is not None:
            says = f"{event.step_kind} {event.step}" if says is None else f"{event.step_kind} {event.step}: {says}"
        self._marks.append(Mark(what, at, event.attempt, event.seq, says))


# --- times ----------------------------------------------------------------------------------------------------------


def ms_of(text: Any) -> int | None:
    """Read a time of the file; None for one that somebody's hand made unreadable."""
    if not isinstance(text, str):
        return None
    try:
        at = datetime.fromisoformat(text)
        return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
    except (ValueError, OverflowError):
        return None


def iso_of(ms: int) -> str:
    """Write a time as the file does; one that no calendar has as the number it is."""
    try:
        at = datetime.fromtimestamp(ms // 1000, UTC).replace(microsecond=ms % 1000 * 1000)
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms"
    return stored(at)
