"""The machines with somebody who notes what was seen in their stories; they do and compare what they always do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from tests.runtime.model import Model, Task
from tests.runtime.test_model import Sessions
from tests.runtime.test_model_of_two import GUEST, OWNERS, SessionsOfTwo

__all__ = ["MACHINES", "SEEN", "SOMETIMES"]

T = TypeVar("T")

SEEN: Counter[str] = Counter()
"""In how many stories each was seen, by all machines of this process; *stories* counts them."""

_OF_ONE = (
    "finish beat cancel",
    "a failure beat cancel",
    "a running body was cancelled",
    "cancelled before its start",
    "abandoned",
    "taken over while it ran",
    "claimed, to wait for a slot",
    "released by an owner that closed",
    "attempts were exhausted",
    "a deadline passed",
    "a retry waited for its time",
    "a retry began",
    "external work was bound again",
    "a callback raised",
    "transferred",
    "handed off",
    "a session was closed",
    "a session was opened again",
    "a note was acknowledged",
    "a hidden failure was told",
    "something was refused",
)

SOMETIMES = {
    1: _OF_ONE,
    2: (
        *_OF_ONE,
        "both owners had bodies",
        "the other owner took over",
        "an owner came back beside the other",
        "somebody steered what another owner has",
        "the guest steered something",
    ),
}
"""What the stories of a run must have shown; else it says nothing."""


def _of_task(task: Task) -> set[str]:
    types = [event.type for event in task.events]
    found = {
        "finish beat cancel": task.asked and task.state == "completed" and not task.external,
        "a failure beat cancel": task.asked and task.state == "failed",
        "a running body was cancelled": task.state == "cancelled" and task.attempt > 0 and "cancel_requested" in types,
        "cancelled before its start": types[1:] == ["cancelled"] and not task.external,
        "abandoned": task.state == "abandoned",
        "taken over while it ran": "reattached" in types and not task.external and task.spent > 0,
        "claimed, to wait for a slot": "claimed" in types,
        "released by an owner that closed": "released" in types and not task.external,
        "attempts were exhausted": task.failure == "AttemptsExhausted",
        "a deadline passed": task.failure == "Timeout",
        "a retry waited for its time": "retry_scheduled" in types,
        "a retry began": "retry_scheduled" in types and task.attempt > 1 and task.state != "pending",
        "external work was bound again": "reattached" in types and task.external,
        "a callback raised": task.callback_failed,
        "transferred": "transferred" in types,
    }
    return {name for name, is_so in found.items() if is_so}


def _of_story(model: Model) -> set[str]:
    state = model.state
    opened = [scope for type, scope, _ in state.session_events if type == "session_opened"]
    hidden = [task for task in state.tasks if task.mode == "hidden" and task.state in ("failed", "abandoned")]
    found = {
        "handed off": bool(state.handoffs),
        "a session was closed": any(type == "session_closed" for type, _, _ in state.session_events),
        "a session was opened again": len(opened) > len(set(opened)),
        "a note was acknowledged": any(note.acknowledged for note in state.notes),
        "a hidden failure was told": any(state.handles[model.owner_handle(task.seq)].read for task in hidden),
    }
    return {name for name, is_so in found.items() if is_so}.union(*map(_of_task, state.tasks))


class _Watched(Sessions):
    """Notes what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def teardown(self) -> None:
        SEEN.update({"stories", *self.seen, *_of_story(self.model)})
        super().teardown()

    def _do(self, expected: Callable[[], T], real: Callable[[], Awaitable[Any]]) -> tuple[T, Any] | None:
        done = super()._do(expected, real)
        if done is None:
            self.seen.add("something was refused")
        return done


class WatchedSessions(_Watched):
    """One owner after the other."""


class WatchedSessionsOfTwo(SessionsOfTwo, _Watched):
    """Two owners at the same time, and a guest."""

    def _do(self, expected: Callable[[], T], real: Callable[[], Awaitable[Any]]) -> tuple[T, Any] | None:
        state = self.model.state
        before = {task.seq: (task.owner, len(task.events)) for task in self.model.live()}
        done = super()._do(expected, real)
        for seq, (owner, events) in before.items():
            if len(self.model.task(seq).events) > events and owner in self.model.owners():
                if state.hand == GUEST:
                    self.seen.add("the guest steered something")
                elif owner != self.model.state.owner:
                    self.seen.add("somebody steered what another owner has")
        if all((self.model.state.bodies if name == state.hand else state.seats[name].bodies) for name in OWNERS):
            self.seen.add("both owners had bodies")
        return done

    def _take_over(self) -> None:
        owners = {task.seq: task.owner for task in self.model.live()}
        super()._take_over()
        if any(task.owner != owners[task.seq] and task.owner for task in self.model.live()):
            self.seen.add("the other owner took over")

    def _open(self, *, knows: bool) -> None:
        if self.model.state.last_owner > 2 and self.lives:
            self.seen.add("an owner came back beside the other")
        super()._open(knows=knows)


MACHINES: dict[int, type[RuleBasedStateMachine]] = {1: WatchedSessions, 2: WatchedSessionsOfTwo}
