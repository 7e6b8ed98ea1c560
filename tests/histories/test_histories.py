"""What concurrent processes are told of tasks is explained by one order; and the check sees it when it is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.histories.check import Outcome, run, shown, timeline
from tests.histories.faults import FAULTS
from tests.histories.recording import SLOTS, Recorder
from tests.histories.search import History, minimal, search
from tests.histories.specification import Call

EXTERNAL = (True, True, "", False)
QUICK = (False, True, "quick", False)

BORN = {"seq": 1}
ROW = {
    "seq": 1, "session": "a", "state": "running", "attempt": 0, "owner": "A1", "progress": None, "reason": None, "outcome": None
}  # fmt: skip


def call(
    op: str, asked: int, told: int | None, answer: Any = None, value: Any = None, who: str = "A1", **more: Any
) -> Call:
    """Write down one call in session a."""
    return Call(who, op, asked, told, more.pop("session", "a"), more.pop("to", "b"), value, answer)


def register(asked: int = 0, told: int = 1, callback: bool = False) -> Call:
    return call("register", asked, told, BORN, (True, True, "", callback))


def is_explained(*calls: Call) -> bool:
    return search(history(*calls)).order is not None


def history(*calls: Call) -> History:
    return History(0, tuple(sorted(calls, key=lambda one: one.asked)), ("A1", "B1"))


def completed(result: str, verdict: str = "applied") -> dict[str, Any]:
    return {**ROW, "state": "completed", "outcome": result, "verdict": verdict}


# --- what must be red -----------------------------------------------------------------------------------------------


def test_a_lost_update_is_not_explained() -> None:
    said = call("update", 10, 20, {**ROW, "progress": "half", "verdict": "applied"}, "half")

    assert is_explained(register(), said, call("get", 30, 40, {**ROW, "progress": "half"}, who="R1"))
    assert not is_explained(register(), said, call("get", 30, 40, ROW, who="R1"))


def test_a_doubled_terminal_is_not_explained() -> None:
    first = call("complete", 10, 30, completed("1"), ("completed", "1"))

    assert is_explained(
        register(), first, call("complete", 20, 40, completed("1", "superseded"), ("completed", "2"), "R1")
    )
    assert not is_explained(register(), first, call("complete", 20, 40, completed("2"), ("completed", "2"), "R1"))


def test_a_stale_look_after_a_newer_one_is_not_explained() -> None:
    waiting = {**ROW, "state": "waiting"}
    flip = call("set_live_state", 10, 60, {**waiting, "verdict": "applied"}, "waiting")

    assert is_explained(register(), flip, call("get", 20, 30, ROW, who="R1"), call("get", 40, 50, waiting, who="B1"))
    assert not is_explained(
        register(), flip, call("get", 20, 30, waiting, who="R1"), call("get", 40, 50, ROW, who="B1")
    )


def test_a_loser_that_is_told_the_wrong_winner_is_not_explained() -> None:
    cancelled = {**ROW, "state": "cancelled", "reason": "enough"}
    cancel = call("cancel", 10, 20, cancelled, ("enough", 1.0), "R1")
    loser = completed("1", "superseded")

    assert is_explained(
        register(), cancel, call("complete", 30, 40, {**cancelled, "verdict": "superseded"}, ("completed", "1"))
    )
    assert not is_explained(register(), cancel, call("complete", 30, 40, loser, ("completed", "1")))


def test_a_task_that_is_seen_in_two_sessions_is_not_explained() -> None:
    moved = {**ROW, "session": "b"}
    move = call("transfer", 10, 20, moved)
    there = call("get", 30, 40, moved, session="b")

    assert is_explained(register(), move, there, call("get", 50, 60, {"error": "TaskNotFound"}, who="R1"))
    assert not is_explained(register(), move, there, call("get", 50, 60, ROW, who="R1"))


def test_a_handle_is_in_one_session_at_every_instant() -> None:
    move = call("transfer", 10, 100, {**ROW, "session": "b"})
    gone = call("get", 20, 30, {"error": "TaskNotFound"}, who="R1")
    nowhere = call("get", 40, 50, {"error": "TaskNotFound"}, who="B1", session="b")

    assert is_explained(register(), move, gone)
    assert not is_explained(register(), move, gone, nowhere)


def test_a_request_that_a_flip_has_erased_is_not_explained() -> None:
    requested = {**ROW, "state": "cancel_requested", "reason": "enough"}
    cancel = call("cancel", 10, 20, requested, ("enough", 0.0), "R1")
    flipped = {**requested, "state": "waiting", "verdict": "applied"}

    assert is_explained(register(callback=True), cancel)
    assert not is_explained(register(callback=True), cancel, call("set_live_state", 30, 40, flipped, "waiting"))


def test_an_attempt_that_two_owners_have_is_not_explained() -> None:
    spawn = call("spawn", 0, 1, BORN, QUICK)
    running = {**ROW, "attempt": 1}
    other = {**running, "owner": "B1"}
    death = Call("", "die", 15, 16, value="A1", answer={})

    seen, taken = call("get", 10, 12, running, who="R1"), {**other, "attempt": 2}
    assert is_explained(spawn, seen, death, call("get", 20, 30, taken, who="R1"))
    assert not is_explained(spawn, seen, death, call("get", 20, 30, other, who="R1"))
    # nobody takes anything from who lives
    assert not is_explained(spawn, seen, call("get", 20, 30, taken, who="R1"))


def test_a_body_may_end_only_once_it_has_begun() -> None:
    spawn = call("spawn", 0, 1, BORN, QUICK)
    done = {**ROW, "state": "completed", "attempt": 1, "outcome": "[1]"}

    assert is_explained(spawn, call("wait", 10, 20, done, 1.0))
    assert not is_explained(spawn, call("wait", 10, 20, {**done, "attempt": 0, "outcome": "[0]"}, 1.0))


# --- calls without an answer ----------------------------------------------------------------------------------------

DEATH = Call("", "die", 30, 31, value="R1", answer={})


@pytest.mark.parametrize("happened", [True, False])
def test_a_call_without_an_answer_may_have_happened_or_not(happened: bool) -> None:
    asked = call("update", 20, None, None, "half", "R1")
    seen = {**ROW, "progress": "half" if happened else None}

    assert is_explained(register(), asked, DEATH, call("get", 40, 50, seen))


def test_a_call_without_an_answer_does_not_happen_and_then_not() -> None:
    asked = call("update", 20, None, None, "half", "R1")
    looks = [call("get", 40, 50, {**ROW, "progress": "half"}), call("get", 60, 70, ROW)]

    assert not is_explained(register(), asked, DEATH, *looks)


def test_a_call_does_not_happen_after_the_death_of_who_made_it() -> None:
    asked = call("update", 20, None, None, "half", "R1")
    looks = [call("get", 40, 50, ROW), call("get", 60, 70, {**ROW, "progress": "half"})]

    assert is_explained(register(), asked, *looks)
    assert not is_explained(register(), asked, DEATH, *looks)


# --- what is shown of it --------------------------------------------------------------------------------------------


def test_what_cannot_be_explained_is_shown_without_what_does_not_matter() -> None:
    looks = [call("get", 2 + at, 3 + at, ROW, who="R1") for at in range(0, 6, 2)]
    said = call("update", 10, 20, {**ROW, "progress": "half", "verdict": "applied"}, "half")
    whole = history(register(), *looks, said, call("get", 30, 40, ROW, who="B1"))

    shortest = minimal(whole, lambda one: search(one).order is not None)

    told = [one.op for one in shortest.calls if one.told is not None]
    assert told == ["update", "get"]
    assert "update a -> b half: seq=1" in timeline(shortest)


# --- real processes -------------------------------------------------------------------------------------------------


def recorded(seed: int, batches: int, **how: Any) -> Outcome:
    outcome = run(Recorder(seed, **how), batches * SLOTS, progress=lambda so_far: not so_far.failed)
    assert outcome.broken is None, outcome.broken
    assert not outcome.undecided
    return outcome


@pytest.mark.timeout(120)
def test_what_four_processes_are_told_is_explained() -> None:
    outcome = recorded(1, 2, kills=1.0)

    assert not outcome.failed, shown(outcome.failed[0], 1)
    assert outcome.done["killed"] + outcome.done["closed"] == 2
    met = ("superseded", "transferred", "finish beat cancel", "a callback ended", "looked up")
    assert [name for name in met if not outcome.seen[name]] == []


@pytest.mark.timeout(120)
def test_processes_that_answer_from_an_unfenced_write_are_found_out() -> None:
    assert recorded(2, 20, processes=3, kills=0.0, fault="unfenced").failed


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_each_fault_of_a_process_is_found_out(fault: str) -> None:
    assert recorded(1, 40, kills=0.0, fault=fault).failed
