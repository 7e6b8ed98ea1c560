"""
Two owners of one runtime, and one who only asks, on one file at the same time, against the reference model.

It is the machine of `test_model`, with all it can do, and turns: whoever has the turn is asked, the others hear of it. Either
owner may die or close while the other goes on, which takes over what it left, and come back. Each store has an event loop of its
own, which stands still while others have the turn, so that a story always goes the same way: what several could take, the first
takes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from lash_store import TaskStore
from tests.runtime.model import Model, State, Task
from tests.runtime.support import RUNTIME
from tests.runtime.test_model import (
    COMMON,
    MAX_RUNNING,
    ROUNDS,
    SESSIONS,
    WORKS,
    Life,
    Sessions,
    differences,
    in_file,
    in_model,
    rule,
)

OWNERS = ("first", "second")
GUEST = "guest"
"""Who only asks."""


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass
class Seat:
    """What is known of one owner, as `State` has it of the one whose turn it is; *owner* is 0 while there is none."""

    owner: int = 0
    bodies: set[int] = field(default_factory=set)
    queue: deque[int] = field(default_factory=deque)
    claimed: set[int] = field(default_factory=set)
    early: list[int] = field(default_factory=list)
    knows: bool = True


_COLUMNS = tuple(Seat.__dataclass_fields__)


@dataclass
class StateOfTwo(State):
    """*hand* has the turn; its seat is in the columns of `State`, those of the others are in *seats*."""

    hand: str = OWNERS[0]
    seats: dict[str, Seat] = field(default_factory=lambda: {name: Seat() for name in (*OWNERS, GUEST)})
    last_owner: int = 1
    was_released: bool = False


class ModelOfTwo(Model):
    """What the contract says of a file that up to two owners have open."""

    state: StateOfTwo

    def __init__(self, *, max_running: int) -> None:
        super().__init__(owner=0, max_running=max_running)
        self.state = StateOfTwo(owner=0)

    def sit(self, hand: str) -> None:
        """Give somebody the turn."""
        state = self.state
        state.seats[state.hand] = Seat(**{name: getattr(state, name) for name in _COLUMNS})
        for name in _COLUMNS:
            setattr(state, name, getattr(state.seats[hand], name))
        state.hand = hand

    @contextlib.contextmanager
    def seated(self, hand: str) -> Iterator[None]:
        """Let somebody have the turn for as long as the block takes."""
        before = self.state.hand
        self.sit(hand)
        try:
            yield
        finally:
            self.sit(before)

    def owners(self) -> dict[int, str]:
        """Return who is there, in the order in which they hear of things."""
        state = self.state
        seats = {name: state.owner if name == state.hand else state.seats[name].owner for name in OWNERS}
        return {owner: name for name, owner in seats.items() if owner}

    def open_owner(self, *, knows: bool) -> None:
        self.state.last_owner += 1
        # what `Model` counts on from
        self.state.owner = self.state.last_owner - 1
        super().open_owner(knows=knows)

    def kill_owner(self) -> None:
        super().kill_owner()
        self.state.owner = 0

    def close_owner(self) -> None:
        super().close_owner()
        self.state.owner, self.state.was_released = 0, False

    def _is_kept(self, task: Task) -> bool:
        return task.owner in self.owners()

    def _react(self) -> None:
        for task in self.live():
            if task.state == "cancel_requested" and task.owner in self.owners():
                with self.seated(self.owners()[task.owner]):
                    self._stop(task)
        self._start_what_waits_anywhere()
        if self.state.was_released:
            self.state.was_released = False
            for name in self.owners().values():
                if name != self.state.hand:
                    # who hears of it takes what there is
                    with self.seated(name):
                        self._recover()
            self.state.was_released = False
            self._start_what_waits_anywhere()

    def _start_what_waits_anywhere(self) -> None:
        for name in self.owners().values():
            with self.seated(name):
                self._start_what_waits()

    def _drop(self, task: Task) -> None:
        hand = self.state.hand
        for name in OWNERS:
            with self.seated(name):
                if task.live and name != hand:
                    # taken up again, it keeps its place
                    self.state.bodies.discard(task.seq)
                else:
                    super()._drop(task)

    def _happened(self, task: Task, type: str, from_scope: str | None = None) -> None:
        super()._happened(task, type, from_scope)
        self.state.was_released = self.state.was_released or type == "released"


# --- the stores -----------------------------------------------------------------------------------------------------


class OneOfThem(Life):
    """One store beside others, which looks for what they commit when it is told to: *looks* counts how often it has."""

    def __init__(self, path: Path, *, knows: bool) -> None:
        self.looks = 0
        self.enough = 0
        self.stirred, self.has_looked = asyncio.Event(), asyncio.Event()
        super().__init__(path, knows=knows)
        assert self.store._core is not None
        self.store._core.feed._stirs.next = self._wait_to_be_told  # type: ignore[method-assign]

    async def _wait_to_be_told(self) -> None:
        # one look is over where the next would be waited for
        self.looks += 1
        if self.looks >= self.enough:
            self.has_looked.set()
            await self.stirred.wait()
            self.stirred.clear()

    async def _look_around(self) -> None:
        # the first may have begun before
        self.enough = self.looks + 2
        self.has_looked.clear()
        self.stirred.set()
        await self.has_looked.wait()
        await self.store.session("s1")

    def look_around(self) -> None:
        """Hear of all that the others have committed, and act on it."""
        self.run(self._look_around())


class Guest(OneOfThem):
    """A store that only makes requests."""

    def make(self, path: Path) -> TaskStore:
        return TaskStore.connect(path, runtime=RUNTIME)


# --- the machine ----------------------------------------------------------------------------------------------------


class SessionsOfTwo(Sessions):
    """As `Sessions`, with turns."""

    model: ModelOfTwo
    life: OneOfThem | None

    def __init__(self) -> None:
        super().__init__()
        self.lives: dict[str, OneOfThem] = {}

    @initialize(works=st.lists(WORKS, min_size=3, max_size=9))
    def begin(self, works: list[dict[str, Any]]) -> None:
        for name in OWNERS:
            self._give_turn(name)
        for number, work in enumerate(works):
            self._give_turn(OWNERS[number % 2])
            verb = {"spawn": self.spawn, "spawn_hidden": self.spawn_hidden, "register": self.register}[work["verb"]]
            verb(**{name: value for name, value in work.items() if name != "verb"})

    def teardown(self) -> None:
        try:
            if self.is_whole:
                for name in list(self.lives):
                    self._give_turn(name)
                    self._stop_in_order()
        finally:
            for life in self.lives.values():
                if not life.loop.is_closed():
                    for coroutine in life.coroutines.values():
                        coroutine.close()
                    self.graves.append(life.die())
            self.life = None
            super().teardown()

    @rule()
    def let_the_first_act(self) -> None:
        self._give_turn(OWNERS[0])

    @rule()
    def let_the_second_act(self) -> None:
        self._give_turn(OWNERS[1])

    @rule()
    def let_the_guest_act(self) -> None:
        self._give_turn(GUEST)

    @rule()
    def restart(self) -> None:
        self._stop_in_order()
        self._go_on_without()

    @rule()
    def crash(self) -> None:
        self._die()
        self._go_on_without()

    @rule()
    def recover(self) -> None:
        self._to_create()
        self._do(self.model.recover, self._life.store.recover)

    learn = None  # type: ignore[assignment]

    # --- how it is done ---

    def _make_model(self) -> Model:
        return ModelOfTwo(max_running=MAX_RUNNING)

    def _make_life(self, *, knows: bool) -> Life:
        life = self.lives[self.model.state.hand] = OneOfThem(self.path, knows=knows)
        return life

    def _to_create(self) -> None:
        if self.model.state.hand == GUEST:
            self._give_turn(next(name for name in OWNERS if name in self.lives))

    def _give_turn(self, hand: str) -> None:
        """Let somebody act from now on, who comes in if need be."""
        self.model.sit(hand)
        self.life = self.lives.get(hand)
        if self.life is not None:
            return
        if hand != GUEST:
            self._open(knows=True)
            return
        self.life = guest = self.lives[GUEST] = Guest(self.path, knows=False)
        for scope in SESSIONS:
            guest.sessions[scope] = guest.run(guest.store.session(scope))

    def _die(self) -> None:
        hand = self.model.state.hand
        super()._die()
        del self.lives[hand]
        self._take_over()

    def _stop_in_order(self) -> None:
        for seq in self._begun():
            self._end_callback(seq, "returns")
        hand = self.model.state.hand
        self.model.close_owner()
        self.eye.close()
        self._life.close()
        assert self._life.errors == []
        del self.lives[hand]
        self.life = None
        if hand != GUEST:
            self._take_over()
        if not self.lives:
            assert differences(in_file(self.path), in_model(self.model)) == []

    def _take_over(self) -> None:
        """Let the other owner, if there is one, take what was left."""
        for name in OWNERS:
            if name in self.lives:
                self._give_turn(name)
                self._do(self.model.recover, self._life.store.recover)

    def _go_on_without(self) -> None:
        """Give the turn to an owner who is there, or comes."""
        self._give_turn(next((name for name in OWNERS if name in self.lives), OWNERS[0]))

    def _look_at_the_clock(self, hours: float) -> None:
        before = self.model.state.hand
        for name in OWNERS:
            if name in self.lives:
                self._give_turn(name)
                super()._look_at_the_clock(hours)
                hours = 0.0
        self._give_turn(before)

    def _goes_on(self, task: Task) -> bool:
        # what another owner does, it does once it has the turn
        return super()._goes_on(task) or not self._is_seen_to(task)

    def _is_seen_to(self, task: Task) -> bool:
        return task.owner == self.model.state.owner

    def _settle(self) -> None:
        self.is_whole = False
        expected = in_model(self.model)
        found: dict[str, Any] = {}
        wrong: list[str] = []
        quiet = 0
        while quiet < ROUNDS:
            for name in sorted(self.lives):
                self.lives[name].look_around()
            now = self.eye.look()
            quiet = quiet + 1 if now == found else 0
            found = now
            wrong = differences(found, expected)
            if quiet >= 1 and not wrong:
                break
        assert not wrong, "\n".join(wrong)
        assert [life.errors for life in self.lives.values() if life.errors] == []
        self.is_whole = True


@pytest.mark.timeout(900)  # a failure is made small before it is shown
class TestSessionsOfTwo(SessionsOfTwo.TestCase):  # type: ignore[misc, valid-type]
    """A look in passing, at the same stories each time: new ones are for the campaign."""

    settings = settings(max_examples=3, stateful_step_count=30, derandomize=True, **COMMON)
