"""Rules of what is to happen at a time of the wall clock, on clocks that a test moves by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from lash_store import alarms
from lash_store.alarms import Alarms

NOON = 1_700_000_000.0
LOOK = 20.0
"""Seconds within which a wall clock that was set is noticed."""


class Timer:
    """What `call_at` of a loop returns."""

    def __init__(self, at: float, call: Callable[[], None]) -> None:
        self.at = at
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Clocks:
    """A wall clock, and a loop with a clock of its own; both stand until they are moved."""

    def __init__(self) -> None:
        self.wall = NOON
        self.loop = 5_000.0
        self.timers: list[Timer] = []
        self.set_timers = 0

    def time(self) -> float:
        return self.loop

    def call_at(self, at: float, call: Callable[[], None]) -> Timer:
        timer = Timer(at, call)
        self.timers.append(timer)
        self.set_timers += 1
        return timer

    @property
    def waiting(self) -> list[Timer]:
        return [timer for timer in self.timers if not timer.is_cancelled]

    def pass_by(self, seconds: float) -> None:
        """Let time pass on both clocks, and run what falls due."""
        end, ahead = self.loop + seconds, self.wall - self.loop
        while due := [timer for timer in self.waiting if timer.at <= end]:
            first = min(due, key=lambda timer: timer.at)
            self.timers.remove(first)
            self.loop = max(self.loop, first.at)
            self.wall = self.loop + ahead
            first.call()
        self.loop, self.wall = end, end + ahead


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    made = Clocks()
    monkeypatch.setattr(alarms, "asyncio", SimpleNamespace(get_running_loop=lambda: made))
    monkeypatch.setattr(alarms, "time", SimpleNamespace(time=lambda: made.wall))
    return made


class Diary:
    """What rang, and when on the loop's clock since the beginning."""

    def __init__(self, clocks: Clocks) -> None:
        self.clocks = clocks
        self.begun = clocks.loop
        self.rang: list[tuple[str, float]] = []

    def note(self, name: str) -> Callable[[], None]:
        return lambda: self.rang.append((name, round(self.clocks.loop - self.begun, 3)))


@pytest.fixture
def diary(clocks: Clocks) -> Diary:
    return Diary(clocks)


# --- in time --------------------------------------------------------------------------------------------------------


def test_alarms_ring_in_the_order_of_their_times_each_at_its_own(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    for name, after in (("c", 30.0), ("a", 1.0), ("d", 3600.0), ("b", 2.5)):
        ours.at(NOON + after, diary.note(name))

    clocks.pass_by(4_000)

    assert diary.rang == [("a", 1.0), ("b", 2.5), ("c", 30.0), ("d", 3600.0)]


def test_alarms_of_one_time_ring_in_the_order_they_were_asked_for(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    for name in "badc":
        ours.at(NOON + 1, diary.note(name))

    clocks.pass_by(1)

    assert [name for name, _ in diary.rang] == ["b", "a", "d", "c"]


def test_an_alarm_does_not_ring_before_its_time(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 30, diary.note("a"))

    clocks.pass_by(29.999)

    assert diary.rang == []


def test_an_alarm_of_the_past_rings_at_once_but_not_while_it_is_asked_for(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON - 3600, diary.note("a"))
    assert diary.rang == []

    clocks.pass_by(0)

    assert diary.rang == [("a", 0.0)]


def test_an_alarm_rings_once(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 1, diary.note("a"))

    clocks.pass_by(100)

    assert diary.rang == [("a", 1.0)]


def test_an_alarm_that_is_asked_for_later_and_is_due_sooner_rings_sooner(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 15, diary.note("late"))
    clocks.pass_by(2)

    ours.at(NOON + 3, diary.note("soon"))
    clocks.pass_by(20)

    assert diary.rang == [("soon", 3.0), ("late", 15.0)]


def test_an_alarm_may_ask_for_another(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()

    def asks() -> None:
        ours.at(NOON + 3, diary.note("b"))
        ours.at(NOON, diary.note("a"))

    ours.at(NOON + 1, asks)

    clocks.pass_by(5)

    assert diary.rang == [("a", 1.0), ("b", 3.0)]


# --- undone ---------------------------------------------------------------------------------------------------------


def test_an_alarm_that_was_cancelled_does_not_ring_and_the_others_do(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    made = {name: ours.at(NOON + after, diary.note(name)) for name, after in (("a", 1), ("b", 2), ("c", 3))}

    made["b"].cancel()
    made["b"].cancel()
    clocks.pass_by(5)

    assert diary.rang == [("a", 1.0), ("c", 3.0)]


def test_the_first_may_be_cancelled_without_delaying_the_next(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    first = ours.at(NOON + 1, diary.note("a"))
    ours.at(NOON + 2, diary.note("b"))

    first.cancel()
    clocks.pass_by(5)

    assert diary.rang == [("b", 2.0)]


def test_an_alarm_may_cancel_another_that_is_due_with_it(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 1, lambda: second.cancel())
    second = ours.at(NOON + 1, diary.note("b"))

    clocks.pass_by(5)

    assert diary.rang == []


def test_to_cancel_what_has_rung_changes_nothing(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    rung = ours.at(NOON + 1, diary.note("a"))
    ours.at(NOON + 2, diary.note("b"))
    clocks.pass_by(1)

    for _ in range(200):
        rung.cancel()
    clocks.pass_by(5)

    assert diary.rang == [("a", 1.0), ("b", 2.0)]


def test_many_that_were_cancelled_are_forgotten_long_before_their_time(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    kept = [ours.at(NOON + 3600 + number, diary.note(str(number))) for number in range(50)]

    for _ in range(10_000):
        ours.at(NOON + 86_400, diary.note("never")).cancel()

    assert len(ours._heap) < 200
    clocks.pass_by(4_000)
    assert [name for name, _ in diary.rang] == [str(number) for number in range(len(kept))]


def test_many_that_are_waited_for_together_and_cancelled_together_are_forgotten(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    made = [ours.at(NOON + 86_400 + number, diary.note("never")) for number in range(10_000)]

    for alarm in made:
        alarm.cancel()

    assert len(ours._heap) < 200


def test_nothing_rings_after_the_close_and_no_timer_is_left(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 1, diary.note("a"))

    ours.close()
    clocks.pass_by(5)

    assert (diary.rang, clocks.waiting) == ([], [])


def test_an_alarm_that_closes_keeps_the_others_from_ringing(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 1, ours.close)
    ours.at(NOON + 1, diary.note("b"))

    clocks.pass_by(50)

    assert (diary.rang, clocks.waiting) == ([], [])


# --- one timer ------------------------------------------------------------------------------------------------------


def test_however_many_wait_there_is_one_timer(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()

    for number in range(1_000):
        ours.at(NOON + 1_000 - number, diary.note("a"))

    assert len(clocks.waiting) == 1


def test_alarms_in_the_order_of_their_times_set_the_timer_once(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()

    for number in range(1_000):
        ours.at(NOON + 1 + number, diary.note("a"))

    assert clocks.set_timers == 1


def test_nothing_is_looked_at_once_nothing_is_waited_for(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 1, diary.note("a"))

    clocks.pass_by(1)

    assert clocks.waiting == []


def test_what_was_cancelled_is_not_looked_at_until_its_time(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 86_400, diary.note("a")).cancel()

    clocks.pass_by(LOOK)

    assert clocks.waiting == []


def test_what_is_far_off_is_looked_at_a_few_times_a_minute(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 600, diary.note("a"))

    clocks.pass_by(600)

    assert diary.rang == [("a", 600.0)]
    assert clocks.set_timers == 600 / LOOK


# --- a wall clock that is set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0.1, 5, 3600, 10 * 86_400])
def test_a_wall_clock_that_is_set_back_makes_nothing_later(clocks: Clocks, diary: Diary, back: float) -> None:
    Alarms().at(NOON + 90, diary.note("a"))
    clocks.pass_by(10)

    clocks.wall -= back
    clocks.pass_by(100)

    assert diary.rang == [("a", 90.0)]


def test_a_wall_clock_that_is_set_back_again_and_again_makes_nothing_later(clocks: Clocks, diary: Diary) -> None:
    Alarms().at(NOON + 90, diary.note("a"))

    for _ in range(30):
        clocks.wall -= 60
        clocks.pass_by(5)

    assert diary.rang == [("a", 90.0)]


def test_a_wall_clock_that_is_set_forward_makes_what_it_passed_ring_at_the_next_look(
    clocks: Clocks, diary: Diary
) -> None:
    Alarms().at(NOON + 3600, diary.note("a"))
    clocks.pass_by(1)

    clocks.wall += 7200
    clocks.pass_by(LOOK)

    assert diary.rang == [("a", LOOK)]


def test_a_wall_clock_that_is_set_forward_makes_the_rest_earlier_by_as_much(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 3700, diary.note("later"))
    ours.at(NOON + 3600, diary.note("passed"))
    clocks.pass_by(1)

    clocks.wall += 3650
    clocks.pass_by(100)

    assert diary.rang == [("passed", LOOK), ("later", 50.0)]


def test_a_wall_clock_that_is_set_back_and_then_right_again_makes_nothing_later_or_earlier(
    clocks: Clocks, diary: Diary
) -> None:
    Alarms().at(NOON + 90, diary.note("a"))
    clocks.wall -= 3600
    clocks.pass_by(30)

    clocks.wall += 3600
    clocks.pass_by(100)

    assert diary.rang == [("a", 90.0)]


def test_what_is_asked_for_while_the_wall_clock_is_behind_rings_when_it_was_set_right(
    clocks: Clocks, diary: Diary
) -> None:
    clocks.wall -= 3600
    Alarms().at(NOON + 90, diary.note("a"))

    clocks.wall += 3600
    clocks.pass_by(100)

    assert diary.rang == [("a", 90.0)]


def test_what_is_asked_for_after_the_wall_clock_was_set_is_measured_by_it(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 3600, diary.note("old"))
    clocks.wall += 600

    ours.at(clocks.wall + 5, diary.note("new"))
    clocks.pass_by(10)

    assert diary.rang == [("new", 5.0)]


def test_what_was_cancelled_stays_so_when_the_wall_clock_is_set_forward(clocks: Clocks, diary: Diary) -> None:
    ours = Alarms()
    ours.at(NOON + 3600, diary.note("a")).cancel()
    ours.at(NOON + 3601, diary.note("b"))

    clocks.wall += 7200
    clocks.pass_by(LOOK)

    assert diary.rang == [("b", LOOK)]


# --- one that fails -------------------------------------------------------------------------------------------------


def test_an_alarm_that_raises_is_logged_and_does_not_stop_the_others(
    clocks: Clocks, diary: Diary, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise LookupError("a bug in an alarm")

    ours = Alarms()
    for name, after in (("a", 1), ("b", 1), ("c", 2)):
        ours.at(NOON + after, fails if name == "a" else diary.note(name))

    with caplog.at_level(logging.ERROR):
        clocks.pass_by(5)

    assert diary.rang == [("b", 1.0), ("c", 2.0)]
    assert [record.message for record in caplog.records] == ["alarm_failed"]
