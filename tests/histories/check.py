"""Checks histories one by one, tells what was seen in them, and shows one that cannot be explained as a short timeline."""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.histories.recording import Recorder
from tests.histories.search import History, Search, Undecided, minimal, search
from tests.histories.specification import Call

__all__ = ["SOMETIMES", "Outcome", "run", "shown", "timeline"]

SOMETIMES = (
    "finish beat cancel",
    "cancel beat finish",
    "cancelled before its start",
    "superseded",
    "unchanged",
    "a flip met a cancel request",
    "transferred",
    "transfer raced complete",
    "conflict",
    "handed over once",
    "registered anew",
    "bound again",
    "fenced out",
    "a callback ended",
    "taken over while it ran",
    "a take-over in the middle of calls",
    "work was abandoned by recovery",
    "a call without an answer had happened",
    "a call without an answer had not happened",
)
"""What a run must have seen at least once to say anything; of a control that is to fail, nothing is asked."""

_MOVES, _ENDS = frozenset({"transfer", "handoff"}), frozenset({"complete", "unregister"})


@dataclass
class Outcome:
    """What a run came to: *failed* are histories that cannot be explained, *undecided* tasks."""

    tasks: int = 0
    calls: int = 0
    configurations: int = 0
    longest: int = 0
    longest_task: int | None = None
    seen: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    failed: list[History] = field(default_factory=list)
    undecided: list[int] = field(default_factory=list)
    broken: str | None = None

    @property
    def never(self) -> list[str]:
        return [name for name in SOMETIMES if not self.seen[name]]


def run(recorder: Recorder, tasks: int, *, progress: Callable[[Outcome], bool] = lambda _: True) -> Outcome:
    """Record and check the histories of so many tasks, or until *progress*, told after each batch, says to stop."""
    outcome = Outcome(done=recorder.counts)
    batches = recorder.record(0, tasks)
    try:
        for batch in batches:
            for history in batch:
                _check(history, outcome)
            if not progress(outcome):
                break
    except (AssertionError, OSError):
        # a worker that died, or hangs: what was seen until then is still told
        outcome.broken = traceback.format_exc()
    finally:
        batches.close()
    return outcome


def _check(history: History, outcome: Outcome) -> None:
    outcome.tasks += 1
    outcome.calls += len(history.calls)
    try:
        found = search(history)
    except Undecided as error:
        print(error, file=sys.stderr)
        outcome.undecided.append(history.task)
        return
    outcome.configurations += found.met
    if found.met > outcome.longest:
        outcome.longest, outcome.longest_task = found.met, history.task
    if found.order is None:
        outcome.failed.append(history)
    else:
        outcome.seen.update(_seen(history, found))


def _is_explained(history: History) -> bool:
    try:
        return search(history).order is not None
    except Undecided:
        return True


def _seen(history: History, found: Search) -> set[str]:
    """Name what the order that was found shows, and what met in time."""
    assert found.order is not None
    labels = {taken.label for taken in found.order}
    taken = {one.call for one in found.order}
    # what a process that ended had asked for; in the order only if something else needs it there
    for place, call in enumerate(history.calls):
        if call.told is None and call.op != "flicker":
            labels.add(f"a call without an answer had {'' if place in taken else 'not '}happened")
    done = [call for call in history.calls if call.told is not None and "error" not in call.answer]
    for one in done:
        for other in done:
            if one.op in _MOVES and other.op in _ENDS and _overlap(one, other):
                labels.add("transfer raced complete")
    places = [number for number, one in enumerate(found.order) if one.label == "taken over while it ran"]
    if any(one.call is not None and one.label not in {"died", "closed"} for at in places for one in found.order[at:]):
        labels.add("a take-over in the middle of calls")
    return labels


def _overlap(one: Call, other: Call) -> bool:
    assert one.told is not None
    assert other.told is not None
    return one.asked < other.told and other.asked < one.told


def shown(history: History, seed: int) -> str:
    """Write a history that cannot be explained as its shortest timeline."""
    return f"seed {seed}, task {history.task}:\n{timeline(minimal(history, _is_explained))}"


def timeline(history: History) -> str:
    """Write a history as lines, one a call, with milliseconds since the first; and what else was asked, whatever came of it."""
    begin = min((call.asked for call in history.calls), default=0)
    lines, others = [], []
    for call in history.calls:
        what = " ".join(str(word) for word in (call.op, call.session, call.to and f"-> {call.to}", call.value) if word)
        if call.told is None:
            others.append(f"  {(call.asked - begin) / 1e6:9.3f} …           {call.who:3} {what}")
        else:
            told = {name: value for name, value in (call.answer or {}).items() if value is not None}
            said = " ".join(f"{name}={value}" for name, value in told.items()) or "done"
            times = f"{(call.asked - begin) / 1e6:9.3f} … {(call.told - begin) / 1e6:9.3f}"
            lines.append(f"  {times} {call.who:3} {what}: {said}")
    if others:
        lines += ["  whatever became of:", *others]
    return "\n".join(lines)
