"""What the events of a task say of its time, event by event; no file is read."""

from __future__ import annotations

from typing import Any

import pytest

from lash_store.cli.lifelines import Death, Happened, Lifeline, Phase, iso_of, lifeline, ms_of

HORIZON = 1000


def event(kind: str, at: int | None, state: str | None = None, attempt: int = 1, **more: Any) -> Happened:
    return Happened(more.pop("seq", 0), kind, at, attempt, "r:s", None, state, "owner" in more, **more)


def born(at: int, owner: int | None = 1) -> Happened:
    return event("registered", at, "pending", 0, owner=owner)


def started(at: int, attempt: int = 1, owner: int = 1, kind: str = "started") -> Happened:
    return event(kind, at, "running", attempt, owner=owner)


def told(*events: Happened, deaths: dict[int, Death] | None = None, is_external: bool = False) -> Lifeline:
    return lifeline(events, deaths or {}, HORIZON, is_external=is_external)


def phases(life: Lifeline) -> list[tuple[str, int, int]]:
    return [(str(one.phase), one.begin, one.end) for one in life.segments]


def test_nothing_happened_to_a_task_without_events() -> None:
    assert told() == Lifeline((), (), None, 0)


def test_a_task_is_queued_until_it_starts_and_runs_until_it_ends() -> None:
    life = told(born(0), started(10), event("progress", 20), event("completed", 30, "completed"))
    assert phases(life) == [("queued", 0, 10), ("running", 10, 30)]
    assert life.end == ("completed", 30)


def test_what_is_not_over_goes_on_to_the_horizon() -> None:
    life = told(born(0), started(10))
    assert phases(life) == [("queued", 0, 10), ("running", 10, HORIZON)]
    assert [one.is_open for one in life.segments] == [False, True]


def test_a_task_that_nobody_has_is_not_queued() -> None:
    assert phases(told(born(0, owner=None), started(10)))[0] == ("unowned", 0, 10)


def test_a_try_that_took_no_time_is_told() -> None:
    life = told(born(5), started(5), event("failed", 5, "failed"))
    assert phases(life) == [("running", 5, 5)]


def test_one_that_was_born_cancelled_has_its_moment() -> None:
    life = told(born(5), event("cancelled", 5, "cancelled", 0))
    assert phases(life) == [("queued", 5, 5)]


def test_a_sleep_lasts_until_it_is_due() -> None:
    life = told(
        started(0), event("saved", 10, step="#0.1", step_kind="sleep", wake_at=50), event("completed", 80, "completed")
    )
    assert phases(life) == [("running", 0, 10), ("waiting", 10, 50), ("running", 50, 80)]


def test_a_body_that_is_heard_of_does_not_sleep() -> None:
    life = told(
        started(0),
        event("saved", 10, step="#0.1", step_kind="sleep", wake_at=900),
        event("signalled", 20),
        event("progress", 30),
        event("completed", 80, "completed"),
    )
    assert phases(life) == [("running", 0, 10), ("waiting", 10, 30), ("running", 30, 80)]


def test_a_sleep_goes_on_in_the_next_try_unless_something_was_done_since() -> None:
    sleep = event("saved", 10, step="long", step_kind="sleep", wake_at=900)
    again = started(100, attempt=2, kind="reattached")
    assert phases(told(started(0), sleep, again))[1:] == [
        ("waiting", 10, 100),
        ("waiting", 100, 900),
        ("running", 900, HORIZON),
    ]
    assert phases(told(started(0), sleep, event("saved", 20), again))[-1] == ("running", 100, HORIZON)


def test_a_step_that_is_to_be_tried_again_is_waited_for() -> None:
    life = told(started(0), event("retry_scheduled", 10, step="fetch", step_kind="step", wake_at=40, says="down"))
    assert phases(life) == [("running", 0, 10), ("waiting", 10, 40), ("running", 40, HORIZON)]
    assert life.segments[1].why == "step fetch is to be tried again"
    assert [(mark.what, mark.says) for mark in life.marks] == [("step_retry", "step fetch: down")]


def test_a_retry_that_is_due_is_queued() -> None:
    life = told(started(0), event("retry_scheduled", 10, "pending", not_before=40), started(60, attempt=2))
    assert phases(life)[1:3] == [("backoff", 10, 40), ("queued", 40, 60)]


def test_a_cancel_is_asked_for_until_it_is_confirmed() -> None:
    life = told(started(0), event("cancel_requested", 10, "cancel_requested"), event("cancelled", 30, "cancelled"))
    assert phases(life) == [("running", 0, 10), ("cancelling", 10, 30)]


@pytest.mark.parametrize("heard", [0, 20])
def test_a_dead_owner_leaves_a_gap_from_when_it_was_last_heard_of(heard: int) -> None:
    life = told(started(0), started(90, 2, 2, "reattached"), deaths={1: Death(heard, 90)})
    before = [("running", 0, heard)] if heard else []
    assert phases(life) == [*before, ("lost", heard, 90), ("running", 90, HORIZON)]
    assert [(mark.what, mark.at) for mark in life.marks] == [("died", heard), ("reattached", 90)]


def test_what_others_do_to_a_task_of_a_dead_owner_does_not_raise_it() -> None:
    life = told(
        started(0),
        event("cancel_requested", 50, "cancel_requested"),
        event("cancelled", 90, "cancelled"),
        deaths={1: Death(20, 90)},
    )
    assert [(str(one.phase), one.was, one.begin, one.end) for one in life.segments] == [
        ("running", None, 0, 20),
        ("lost", Phase.RUNNING, 20, 50),
        ("lost", Phase.CANCELLING, 50, 90),
    ]
    assert [mark.what for mark in life.marks].count("died") == 1


def test_an_owner_that_was_heard_of_at_the_very_end_is_dead_all_the_same() -> None:
    life = told(started(0), deaths={1: Death(HORIZON, None)})
    assert phases(life) == [("running", 0, HORIZON), ("lost", HORIZON, HORIZON)]
    assert life.segments[-1].is_open


def test_external_work_goes_on_without_its_owner() -> None:
    life = told(
        event("registered", 0, "running", 0, owner=1),
        event("released", 50, None, 0, owner=None),
        event("state_changed", 60, "waiting", 0),
        deaths={1: Death(10, 50)},
        is_external=True,
    )
    assert [(str(one.phase), one.begin, one.end) for one in life.segments if one.end > 0] == [
        ("running", 0, 50),
        ("running", 50, 60),
        ("waiting", 60, HORIZON),
    ]


def test_only_a_transfer_is_told_after_the_end() -> None:
    life = told(started(0), event("completed", 10, "completed"), event("transferred", 500))
    assert phases(life) == [("running", 0, 10)]
    assert life.end == ("completed", 10)
    assert [(mark.what, mark.at) for mark in life.marks] == [("transferred", 500)]


def test_events_are_taken_in_their_order_whatever_their_clock_said() -> None:
    life = told(born(100), started(50), event("progress", None), event("completed", 120, "completed"))
    assert phases(life) == [("running", 100, 120)]
    assert life.set_back == 1


@pytest.mark.parametrize("text", ["", "never", None, 7, "0001-01-01T00:00:00+23:00x", "9999-99-99"])
def test_a_time_that_no_hand_should_have_written_is_none(text: object) -> None:
    assert ms_of(text) is None


def test_times_come_back_as_the_file_writes_them() -> None:
    for text in ("2026-11-26T06:33:26.311Z", "1970-01-01T00:00:00.001Z", "9999-12-31T23:59:59.999Z"):
        at = ms_of(text)
        assert at is not None
        assert iso_of(at) == text
    assert iso_of(10**18).endswith(" ms")
