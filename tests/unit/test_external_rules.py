"""Rules of external work, which somebody else does: every command in every state, by a table written by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lash_store import lifecycle, queries
from lash_store.commands import (
    Abandon,
    BeginCallback,
    CallbackFailed,
    Claim,
    Command,
    Complete,
    ConfirmCancel,
    Expire,
    Fail,
    Fence,
    Flip,
    GiveUp,
    GoOn,
    Launch,
    Move,
    Notify,
    Progress,
    Rebind,
    Release,
    RequestCancel,
    Retry,
    RetryStep,
    Save,
    Settle,
    Signal,
    Start,
    Wait,
)
from lash_store.lifecycle import Change, Refused, Task, decide, fold
from lash_store.models import EventType, TaskState, Verdict
from tests.unit.cases import for_each
from tests.unit.task_rows import BEFORE, EVIDENCE, FAILURE, LATER, NOTE, NOW, PROCESS, managed

MINE, ANOTHERS = Fence(attempt=0, owner_id=1), Fence(attempt=0, owner_id=2)

# external work starts running: there is nothing to wait for a slot
STATES = ("running", "waiting", "cancel_requested", "completed", "failed", "cancelled", "abandoned")
LIVE, TERMINAL = STATES[:3], STATES[3:]


def row(state: str, **changed: Any) -> Task:
    """External work whose books owner 1 keeps, with a cancel callback that has not begun."""
    external = {"id": "build", "mode": "external", "label": "build", "function": None, "recovery": "external"}
    books = {"arguments": None, "attempt": 0, "max_attempts": 1, "has_callback": 1}
    return managed(state, **{**external, **books, **changed})


COMMANDS: dict[str, Command] = {
    "rebind": Rebind(owner_id=2, from_owner=1, has_callback=True),
    "rebind from another owner": Rebind(owner_id=2, from_owner=3, has_callback=True),
    "release": Release("owner_died"),
    "request cancel": RequestCancel("enough", "a person"),
    "request cancel at birth": RequestCancel("enough", "a person", because_of=3, at_birth=True),
    "begin the callback": BeginCallback(MINE),
    "begin another's callback": BeginCallback(ANOTHERS),
    "the callback failed": CallbackFailed(FAILURE),
    "confirm cancel": ConfirmCancel(MINE),
    "confirm another's cancel": ConfirmCancel(ANOTHERS),
    "confirm cancel of nobody": ConfirmCancel(None),
    "flip to running": Flip(TaskState.RUNNING),
    "flip to waiting": Flip(TaskState.WAITING),
    "settle as completed": Settle(TaskState.COMPLETED, result="1"),
    "settle as completed otherwise": Settle(TaskState.COMPLETED, result="2"),
    "settle as failed": Settle(TaskState.FAILED, failure=FAILURE),
    "settle as failed otherwise": Settle(TaskState.FAILED, failure='{"type":"Signal","message":"9","traceback":null}'),
    "settle as cancelled": Settle(TaskState.CANCELLED, reason="unregistered"),
    "given up by a person": GiveUp("stuck", EVIDENCE),
    "abandon": Abandon(EVIDENCE),
    "progress": Progress(None, "half", 0.5),
    "notify": Notify(None, NOTE),
    "move": Move("desktop:s2"),
    "move to where it is": Move("desktop:s1"),
    # of bodies: the store has none on the row
    "start": Start(owner_id=1, from_owner=1),
    "claim": Claim(owner_id=2, crashed=False),
    "complete": Complete(MINE, "1"),
    "fail": Fail(MINE, FAILURE),
    "save": Save(MINE, {"bytes": 12}),
    "retry": Retry(MINE, FAILURE, LATER),
    "retry a step": RetryStep(MINE, {"step": "fetch"}),
    "expire": Expire(owner_id=1, failure=FAILURE),
    "wait": Wait(MINE, "signal 'go'"),
    "go on": GoOn(MINE),
    "signal": Signal({"signal": "go"}),
    "launch": Launch(MINE, PROCESS),
}

# What each command does to each state. A change is `event > state owner`; owner - is NULL. `stale`: refused because the writer
# does not keep the books. The attempt of external work is 0 and stays so.
TABLE = """
command                       | running                              | waiting                              | cancel_requested                     | completed               | failed               | cancelled               | abandoned
rebind                        | reattached > running 2               | reattached > waiting 2               | reattached > cancel_requested 2      | superseded              | superseded           | superseded              | superseded
rebind from another owner     | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
release                       | released > running -                 | released > waiting -                 | released > cancel_requested -        | superseded              | superseded           | superseded              | superseded
request cancel                | cancel_requested > cancel_requested 1 | cancel_requested > cancel_requested 1 | unchanged                           | superseded              | superseded           | unchanged               | superseded
request cancel at birth       | cancelled > cancelled 1              | cancelled > cancelled 1              | unchanged                            | superseded              | superseded           | unchanged               | superseded
begin the callback            | superseded                           | superseded                           | state_changed > cancel_requested 1   | superseded              | superseded           | superseded              | superseded
begin another's callback      | stale                                | stale                                | stale                                | stale                   | stale                | stale                   | stale
the callback failed           | superseded                           | superseded                           | callback_failed > cancel_requested 1 | superseded              | superseded           | superseded              | superseded
confirm cancel                | superseded                           | superseded                           | cancelled > cancelled 1              | superseded              | superseded           | unchanged               | superseded
confirm another's cancel      | stale                                | stale                                | stale                                | stale                   | stale                | stale                   | stale
confirm cancel of nobody      | superseded                           | superseded                           | cancelled > cancelled 1              | superseded              | superseded           | unchanged               | superseded
flip to running               | unchanged                            | state_changed > running 1            | superseded                           | superseded              | superseded           | superseded              | superseded
flip to waiting               | state_changed > waiting 1            | unchanged                            | superseded                           | superseded              | superseded           | superseded              | superseded
settle as completed           | completed > completed 1              | completed > completed 1              | completed > completed 1              | unchanged               | superseded           | superseded              | superseded
settle as completed otherwise | completed > completed 1              | completed > completed 1              | completed > completed 1              | superseded              | superseded           | superseded              | superseded
settle as failed              | failed > failed 1                    | failed > failed 1                    | failed > failed 1                    | superseded              | unchanged            | superseded              | superseded
settle as failed otherwise    | failed > failed 1                    | failed > failed 1                    | failed > failed 1                    | superseded              | superseded           | superseded              | superseded
settle as cancelled           | cancelled > cancelled 1              | cancelled > cancelled 1              | cancelled > cancelled 1              | superseded              | superseded           | unchanged               | superseded
given up by a person          | abandoned > abandoned 1              | abandoned > abandoned 1              | abandoned > abandoned 1              | superseded              | superseded           | superseded              | unchanged
abandon                       | abandoned > abandoned 1              | abandoned > abandoned 1              | abandoned > abandoned 1              | superseded              | superseded           | superseded              | unchanged
progress                      | progress > running 1                 | progress > waiting 1                 | progress > cancel_requested 1        | superseded              | superseded           | superseded              | superseded
notify                        | noted > running 1                    | noted > waiting 1                    | noted > cancel_requested 1           | superseded              | superseded           | superseded              | superseded
move                          | transferred > running 1              | transferred > waiting 1              | transferred > cancel_requested 1     | transferred > completed 1 | transferred > failed 1 | transferred > cancelled 1 | transferred > abandoned 1
move to where it is           | unchanged                            | unchanged                            | unchanged                            | unchanged               | unchanged            | unchanged               | unchanged
start                         | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
claim                         | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
complete                      | superseded                           | superseded                           | superseded                           | unchanged               | superseded           | superseded              | superseded
fail                          | superseded                           | superseded                           | superseded                           | superseded              | unchanged            | superseded              | superseded
save                          | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
retry                         | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
retry a step                  | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
expire                        | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
wait                          | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
go on                         | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
signal                        | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
launch                        | superseded                           | superseded                           | superseded                           | superseded              | superseded           | superseded              | superseded
"""  # noqa: E501  a table is read across


def _cells() -> list[tuple[str, str, str]]:
    head, *lines = ([cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines())
    assert tuple(head[1:]) == STATES
    assert [line[0] for line in lines] == list(COMMANDS)
    return [(line[0], state, cell) for line in lines for state, cell in zip(STATES, line[1:], strict=True)]


CELLS = _cells()
CHANGES = [cell for cell in CELLS if ">" in cell[2]]


def _shown(decision: Change | Refused, task: Task) -> str:
    if isinstance(decision, Refused):
        return "stale" if decision.stale else str(decision.verdict)
    after = task._replace(**decision.columns)
    return f"{decision.type} > {after.state} {'-' if after.owner_id is None else after.owner_id}"


def _changed(task: Task, command: Command) -> Change:
    decision = decide(task, command, NOW)
    assert isinstance(decision, Change)
    return decision


@for_each(("command", "state", "expected"), CELLS)
def test_every_command_does_in_every_state_what_the_table_says(command: str, state: str, expected: str) -> None:
    task = row(state)

    assert _shown(decide(task, COMMANDS[command], NOW), task) == expected


def test_the_table_has_every_command() -> None:
    assert {type(command) for command in COMMANDS.values()} == set(Command.__args__)


# --- rules across the table -----------------------------------------------------------------------------------------


@for_each("state", TERMINAL)
@for_each("command", [name for name in COMMANDS if name != "move"])
def test_nothing_but_a_move_changes_a_finished_row(command: str, state: str) -> None:
    assert isinstance(decide(row(state), COMMANDS[command], NOW), Refused)


@for_each("state", STATES)
def test_a_move_changes_the_scope_and_nothing_else(state: str) -> None:
    assert decide(row(state), Move("desktop:s2"), NOW) == Change(EventType.TRANSFERRED, {"scope": "desktop:s2"})


@for_each(("command", "state", "expected"), CHANGES)
def test_the_attempt_of_external_work_is_0_whatever_is_done_to_it(command: str, state: str, expected: str) -> None:
    after = row(state)._replace(**_changed(row(state), COMMANDS[command]).columns)

    assert (after.attempt, after.attempts_spent) == (0, 0)


@for_each(("command", "state", "expected"), CHANGES)
def test_a_change_but_a_move_is_dated_and_an_end_has_its_time(command: str, state: str, expected: str) -> None:
    columns = _changed(row(state), COMMANDS[command]).columns

    moved, ended = command == "move", expected.split(" > ")[1].split()[0] in TERMINAL
    assert columns.get("updated_at") == (None if moved else NOW)
    assert columns.get("completed_at") == (NOW if ended and not moved else None)


@for_each(("command", "state", "expected"), CHANGES)
def test_the_event_of_a_change_folds_to_the_row_it_made(command: str, state: str, expected: str) -> None:
    before = row(state)
    decision = _changed(before, COMMANDS[command])
    after = before._replace(**decision.columns)

    told = {"task_seq": 7, "task_id": "build", "attempt": 0}
    data = json.loads(queries.event_data(decision.type, decision.columns, decision.detail))
    history = [
        {**told, "type": "saved", "at": BEFORE, "scope": before.scope, "data": _plain(before)},
        {**told, "type": str(decision.type), "at": NOW, "scope": after.scope, "data": data},
    ]

    assert fold(history) == _plain(after)


def _plain(task: Task) -> dict[str, Any]:
    """A row with its JSON columns as values, as events tell them."""
    return {
        name: json.loads(value) if name in lifecycle.JSON_COLUMNS and value is not None else value
        for name, value in task._asdict().items()
    }


# --- cancel ---------------------------------------------------------------------------------------------------------


@for_each("state", ["running", "waiting"])
def test_a_cancel_request_says_who_asked_why_and_when(state: str) -> None:
    assert decide(row(state), RequestCancel("enough", "a person"), NOW) == Change(
        EventType.CANCEL_REQUESTED,
        {
            "state": "cancel_requested",
            "cancel_reason": "enough",
            "cancel_requested_by": "a person",
            "cancel_requested_at": NOW,
            "updated_at": NOW,
        },
    )


def test_a_cancel_that_comes_from_above_names_the_ancestor() -> None:
    assert _changed(row("running"), RequestCancel("enough", "a person", because_of=3)).detail == {"because_of": 3}


@for_each("state", ["running", "waiting"])
def test_a_live_state_flip_keeps_a_pending_cancel(state: str) -> None:
    assert decide(row("cancel_requested"), Flip(TaskState(state)), NOW) == Refused(Verdict.SUPERSEDED)


@for_each(
    "command",
    [
        Rebind(2, 1, has_callback=False),
        Rebind(2, 1, has_callback=True),
        Release("closed"),
        Progress(None, "half", None),
        Notify(None, NOTE),
        Move("desktop:s2"),
        BeginCallback(MINE),
        CallbackFailed(FAILURE),
    ],
)
def test_what_happens_to_the_books_never_erases_a_cancel_request(command: Command) -> None:
    asked = row("cancel_requested", cancel_reason="enough", cancel_requested_by="a person")

    after = asked._replace(**_changed(asked, command).columns)

    assert (after.state, after.cancel_reason, after.cancel_requested_by, after.cancel_requested_at) == (
        "cancel_requested",
        "enough",
        "a person",
        BEFORE,
    )


def test_a_callback_begins_once_and_its_time_is_kept() -> None:
    begun = _changed(row("cancel_requested"), BeginCallback(MINE))

    assert begun.columns == {"callback_begun_at": NOW, "updated_at": NOW}
    assert decide(row("cancel_requested")._replace(**begun.columns), BeginCallback(MINE), NOW) == Refused(
        Verdict.SUPERSEDED
    )


def test_a_callback_begins_once_across_owners_too() -> None:
    begun = row("cancel_requested", callback_begun_at=BEFORE)
    bound = begun._replace(**_changed(begun, Rebind(2, 1, has_callback=True)).columns)

    assert decide(bound, BeginCallback(ANOTHERS), NOW) == Refused(Verdict.SUPERSEDED)


def test_there_is_no_callback_to_begin_where_none_was_given() -> None:
    task = row("cancel_requested", has_callback=0)

    assert decide(task, BeginCallback(MINE), NOW) == Refused(Verdict.SUPERSEDED)


def test_what_a_callback_raised_is_stored_and_the_cancel_goes_on() -> None:
    failed = _changed(row("cancel_requested", callback_begun_at=BEFORE), CallbackFailed(FAILURE))

    assert failed.columns == {"callback_error": FAILURE, "updated_at": NOW}


@for_each("has_callback", [True, False])
def test_a_rebind_says_whether_there_is_a_callback_now_and_who_kept_the_books_before(has_callback: bool) -> None:
    bound = _changed(row("running", owner_id=None), Rebind(2, None, has_callback=has_callback))

    assert (bound.columns["owner_id"], bound.columns["has_callback"]) == (2, int(has_callback))
    assert bound.detail == {"previous_owner_id": None}
    assert not {"state", "attempt", "callback_begun_at", "completed_at"} & bound.columns.keys()


# --- ends -----------------------------------------------------------------------------------------------------------


@for_each(
    ("ended", "again"),
    [
        ("completed", Settle(TaskState.COMPLETED, result="1")),
        ("failed", Settle(TaskState.FAILED, failure=FAILURE)),
        ("cancelled", Settle(TaskState.CANCELLED)),
        ("cancelled", Settle(TaskState.CANCELLED, reason="another reason")),
    ],
)
def test_the_same_end_again_is_unchanged(ended: str, again: Settle) -> None:
    assert decide(row(ended), again, NOW) == Refused(Verdict.UNCHANGED)


@for_each(
    ("ended", "another"),
    [
        ("completed", Settle(TaskState.COMPLETED, result="2")),
        ("completed", Settle(TaskState.COMPLETED, result="null")),
        ("failed", Settle(TaskState.FAILED, failure='{"type":"Other","message":"1","traceback":null}')),
        ("abandoned", Settle(TaskState.COMPLETED, result="1")),
    ],
)
def test_another_end_is_superseded(ended: str, another: Settle) -> None:
    assert decide(row(ended), another, NOW) == Refused(Verdict.SUPERSEDED)


def test_an_end_said_again_in_other_words_of_the_same_json_is_unchanged() -> None:
    completed = row("completed")._replace(result='{"a":1,"b":[2]}')
    raised_there = json.dumps({"type": "ValueError", "message": "no", "traceback": "line 1"})
    raised_here = json.dumps({"message": "no", "type": "ValueError", "traceback": "line 2"})
    failed = row("failed")._replace(failure=raised_there)

    assert decide(completed, Settle(TaskState.COMPLETED, result='{"b": [2], "a": 1}'), "") == Refused(Verdict.UNCHANGED)
    assert decide(failed, Settle(TaskState.FAILED, failure=raised_here), "") == Refused(Verdict.UNCHANGED)


@for_each("state", ["running", "waiting"])
def test_a_cancelled_end_nobody_asked_for_keeps_the_reason_it_is_given(state: str) -> None:
    assert _changed(row(state), Settle(TaskState.CANCELLED, reason="unregistered")).columns == {
        "state": "cancelled",
        "cancel_reason": "unregistered",
        "updated_at": NOW,
        "completed_at": NOW,
    }


def test_a_cancelled_end_that_was_asked_for_keeps_the_reason_of_who_asked() -> None:
    asked = row("cancel_requested", cancel_reason="enough")

    assert "cancel_reason" not in _changed(asked, Settle(TaskState.CANCELLED, reason="unregistered")).columns


def test_work_that_finishes_wins_over_a_cancel_request() -> None:
    ended = _changed(row("cancel_requested"), Settle(TaskState.COMPLETED, result="1"))

    assert ended.columns == {"state": "completed", "result": "1", "updated_at": NOW, "completed_at": NOW}


@for_each("owner_id", [1, 2, None])
def test_an_end_is_taken_from_whoever_reports_it_for_the_work_is_nobodys_body(owner_id: int | None) -> None:
    assert isinstance(decide(row("running", owner_id=owner_id), Settle(TaskState.COMPLETED, result="1"), NOW), Change)


# --- recovery -------------------------------------------------------------------------------------------------------

RECOVERY: list[tuple[str, Task, Command, str]] = [
    ("running", row("running"), Release("owner_died"), "released > running -"),
    ("waiting", row("waiting"), Release("owner_died"), "released > waiting -"),
    ("running, of nobody", row("running", owner_id=None), Release("owner_died"), "unchanged"),
    ("without a callback", row("waiting", has_callback=0), Release("owner_died"), "released > waiting -"),
    (
        "cancel requested, callback not begun",
        row("cancel_requested"),
        Release("owner_died"),
        "released > cancel_requested -",
    ),
    (
        "cancel requested, callback not begun, of nobody",
        row("cancel_requested", owner_id=None),
        Release("owner_died"),
        "unchanged",
    ),
    (
        "cancel requested, callback cut off",
        row("cancel_requested", callback_begun_at=BEFORE),
        ConfirmCancel(None),
        "cancelled > cancelled 1",
    ),
    (
        "cancel requested, without a callback",
        row("cancel_requested", has_callback=0),
        ConfirmCancel(None),
        "cancelled > cancelled 1",
    ),
    (
        "cancel requested, without a callback, of nobody",
        row("cancel_requested", has_callback=0, owner_id=None),
        ConfirmCancel(None),
        "cancelled > cancelled -",
    ),
]


@for_each("slot", [True, False])
@for_each("known", [True, False])
@pytest.mark.parametrize(
    ("task", "expected", "shown"), [case[1:] for case in RECOVERY], ids=[case[0] for case in RECOVERY]
)
def test_recovery_follows_its_table(task: Task, expected: Command, shown: str, known: bool, slot: bool) -> None:
    command = lifecycle.recover(task, owner_id=2, known=known, slot=slot, evidence=EVIDENCE, now=NOW)

    assert command == expected
    assert _shown(decide(task, command, NOW), task) == shown


@pytest.mark.parametrize("task", [case[1] for case in RECOVERY], ids=[case[0] for case in RECOVERY])
def test_a_second_recovery_finds_nothing_to_write(task: Task) -> None:
    def recover(task: Task) -> Change | Refused:
        command = lifecycle.recover(task, owner_id=2, known=False, slot=True, evidence=EVIDENCE, now=NOW)
        return decide(task, command, NOW)

    first = recover(task)
    after = task._replace(**first.columns) if isinstance(first, Change) else task

    assert after.is_terminal or recover(after) == Refused(Verdict.UNCHANGED)


@for_each("state", LIVE)
def test_a_crash_of_its_owner_ends_no_execution_of_external_work(state: str) -> None:
    assert not row(state).is_executing


def test_work_that_is_born_cancelled_says_who_asked_and_when() -> None:
    change = _changed(row("running"), RequestCancel("enough", "a person", because_of=3, at_birth=True))

    asked = {"cancel_reason": "enough", "cancel_requested_by": "a person", "cancel_requested_at": NOW}
    assert change.columns.items() >= asked.items()
    assert change.detail == {"because_of": 3}


def test_work_that_is_bound_again_takes_what_is_said_anew_and_began_when_it_did() -> None:
    change = _changed(row("running"), Rebind(2, 1, has_callback=True, anew={"label": "again"}))

    assert (change.type, change.columns["label"], change.columns["owner_id"]) == (EventType.REATTACHED, "again", 2)
    assert "started_at" not in change.columns
