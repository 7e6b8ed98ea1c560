"""Rules of a task's life: every command in every state, by a table written by hand."""

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
from tests.unit.task_rows import BEFORE, EVIDENCE, FAILURE, LATER, NOTE, NOW, PROCESS
from tests.unit.task_rows import managed as row

MINE = Fence(attempt=1, owner_id=1)

STATES = ("pending", "running", "waiting", "cancel_requested", "completed", "failed", "cancelled", "abandoned")
LIVE, TERMINAL = STATES[:4], STATES[4:]


STEP = {"step": "fetch", "step_kind": "step", "step_state": "retrying", "wake_at": LATER}
SIGNAL = {"signal": "go", "signal_seq": 3, "bytes": 4, "by": "a person"}

COMMANDS: dict[str, Command] = {
    "start": Start(owner_id=1, from_owner=1),
    "start from another owner": Start(owner_id=2, from_owner=3),
    "reattach what was pending": Start(owner_id=2, from_owner=1, reattach=True),
    "reattach after a crash": Start(owner_id=2, from_owner=1, reattach=True, crashed=True),
    "claim what was pending": Claim(owner_id=2, crashed=False),
    "claim after a crash": Claim(owner_id=2, crashed=True),
    "release": Release("closed"),
    "release of what may live on": Release("closed", process_left=True),
    "release after a crash": Release("unknown_function", crashed=True),
    "request cancel": RequestCancel("enough", "a person"),
    "confirm cancel": ConfirmCancel(MINE),
    "confirm cancel of a dead owner": ConfirmCancel(None),
    "complete": Complete(MINE, '{"files":3}'),
    "fail": Fail(MINE, FAILURE),
    "give up": Fail(None, FAILURE),
    "give up after a crash": Fail(None, FAILURE, crashed=True),
    "abandon": Abandon(EVIDENCE),
    "abandon what may live on": Abandon(EVIDENCE, process_left=True),
    "given up by a person": GiveUp("stuck", EVIDENCE),
    "progress": Progress(MINE, "half", 0.5),
    "progress told from outside": Progress(None, "half", None),
    "save": Save(MINE, {"bytes": 12}),
    "retry": Retry(MINE, FAILURE, LATER),
    "expire": Expire(owner_id=1, failure=FAILURE),
    "expire under another owner": Expire(owner_id=2, failure=FAILURE),
    "retry a step": RetryStep(MINE, STEP),
    "wait": Wait(MINE, "signal 'go'"),
    "go on": GoOn(MINE),
    "launch": Launch(MINE, PROCESS),
    "signal": Signal(SIGNAL),
    "notify": Notify(MINE, NOTE),
    "notify of the store": Notify(None, NOTE),
    "move": Move("desktop:s2"),
    "move to where it is": Move("desktop:s1"),
    # of external work: nothing to do with a row whose body the store runs
    "rebind": Rebind(owner_id=2, from_owner=1, has_callback=True),
    "settle as completed": Settle(TaskState.COMPLETED, result='{"files":3}'),
    "settle as failed": Settle(TaskState.FAILED, failure='{"type":"E"}'),
    "flip": Flip(TaskState.WAITING),
    "begin the callback": BeginCallback(MINE),
    "the callback failed": CallbackFailed(FAILURE),
}

# What each command does to each state. A change is `event > state attempt/owner/spent`; the rows above begin at 1/1/0, and
# owner - is NULL. `stale`: refused because the writer is not the one whose body is on the row. `?`: cannot be asked, for a
# crash ends an execution and a pending row has none, and what runs is only taken from the dead.
TABLE = """
command                        | pending                     | running                                   | waiting                                   | cancel_requested                     | completed                     | failed                     | cancelled                     | abandoned
start                          | started > running 2/1/0     | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
start from another owner       | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
reattach what was pending      | reattached > running 2/2/0  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
reattach after a crash         | ?                           | reattached > running 2/2/1                | reattached > running 2/2/1                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
claim what was pending         | claimed > pending 1/2/0     | ?                                         | ?                                         | superseded                           | superseded                    | superseded                 | superseded                    | superseded
claim after a crash            | ?                           | claimed > pending 1/2/1                   | claimed > pending 1/2/1                   | superseded                           | superseded                    | superseded                 | superseded                    | superseded
release                        | released > pending 1/-/0    | released > pending 1/-/0                  | released > pending 1/-/0                  | superseded                           | superseded                    | superseded                 | superseded                    | superseded
release of what may live on    | released > pending 1/-/0    | released > pending 1/-/0                  | released > pending 1/-/0                  | superseded                           | superseded                    | superseded                 | superseded                    | superseded
release after a crash          | ?                           | released > pending 1/-/1                  | released > pending 1/-/1                  | superseded                           | superseded                    | superseded                 | superseded                    | superseded
request cancel                 | cancelled > cancelled 1/1/0 | cancel_requested > cancel_requested 1/1/0 | cancel_requested > cancel_requested 1/1/0 | unchanged                            | superseded                    | superseded                 | unchanged                     | superseded
confirm cancel                 | stale                       | superseded                                | superseded                                | cancelled > cancelled 1/1/0          | superseded                    | superseded                 | unchanged                     | superseded
confirm cancel of a dead owner | superseded                  | superseded                                | superseded                                | cancelled > cancelled 1/1/0          | superseded                    | superseded                 | unchanged                     | superseded
complete                       | stale                       | completed > completed 1/1/0               | completed > completed 1/1/0               | completed > completed 1/1/0          | unchanged                     | superseded                 | superseded                    | superseded
fail                           | stale                       | failed > failed 1/1/0                     | failed > failed 1/1/0                     | failed > failed 1/1/0                | superseded                    | unchanged                  | superseded                    | superseded
give up                        | failed > failed 1/1/0       | failed > failed 1/1/0                     | failed > failed 1/1/0                     | failed > failed 1/1/0                | superseded                    | unchanged                  | superseded                    | superseded
give up after a crash          | ?                           | failed > failed 1/1/1                     | failed > failed 1/1/1                     | failed > failed 1/1/1                | superseded                    | unchanged                  | superseded                    | superseded
abandon                        | abandoned > abandoned 1/1/0 | abandoned > abandoned 1/1/0               | abandoned > abandoned 1/1/0               | abandoned > abandoned 1/1/0          | superseded                    | superseded                 | superseded                    | unchanged
abandon what may live on       | abandoned > abandoned 1/1/0 | abandoned > abandoned 1/1/0               | abandoned > abandoned 1/1/0               | abandoned > abandoned 1/1/0          | superseded                    | superseded                 | superseded                    | unchanged
given up by a person           | released > pending 1/-/0    | released > pending 2/-/0                  | released > pending 2/-/0                  | abandoned > abandoned 2/1/0          | superseded                    | superseded                 | superseded                    | unchanged
progress                       | stale                       | progress > running 1/1/0                  | progress > waiting 1/1/0                  | progress > cancel_requested 1/1/0    | superseded                    | superseded                 | superseded                    | superseded
progress told from outside     | progress > pending 1/1/0    | progress > running 1/1/0                  | progress > waiting 1/1/0                  | progress > cancel_requested 1/1/0    | superseded                    | superseded                 | superseded                    | superseded
save                           | stale                       | saved > running 1/1/0                     | saved > waiting 1/1/0                     | saved > cancel_requested 1/1/0       | superseded                    | superseded                 | superseded                    | superseded
retry                          | stale                       | retry_scheduled > pending 1/1/1           | retry_scheduled > pending 1/1/1           | failed > failed 1/1/0                | superseded                    | superseded                 | superseded                    | superseded
expire                         | failed > failed 1/1/0       | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
expire under another owner     | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
retry a step                   | stale                       | retry_scheduled > running 1/1/0           | retry_scheduled > waiting 1/1/0           | retry_scheduled > cancel_requested 1/1/0 | superseded                    | superseded                 | superseded                    | superseded
wait                           | stale                       | state_changed > waiting 1/1/0             | state_changed > waiting 1/1/0             | superseded                           | superseded                    | superseded                 | superseded                    | superseded
go on                          | stale                       | unchanged                                 | state_changed > running 1/1/0             | superseded                           | superseded                    | superseded                 | superseded                    | superseded
launch                         | stale                       | state_changed > running 1/1/0             | state_changed > waiting 1/1/0             | superseded                           | superseded                    | superseded                 | superseded                    | superseded
signal                         | signalled > pending 1/1/0   | signalled > running 1/1/0                 | signalled > waiting 1/1/0                 | signalled > cancel_requested 1/1/0   | superseded                    | superseded                 | superseded                    | superseded
notify                         | stale                       | noted > running 1/1/0                     | noted > waiting 1/1/0                     | noted > cancel_requested 1/1/0       | superseded                    | superseded                 | superseded                    | superseded
notify of the store            | noted > pending 1/1/0       | noted > running 1/1/0                     | noted > waiting 1/1/0                     | noted > cancel_requested 1/1/0       | superseded                    | superseded                 | superseded                    | superseded
move                           | transferred > pending 1/1/0 | transferred > running 1/1/0               | transferred > waiting 1/1/0               | transferred > cancel_requested 1/1/0 | transferred > completed 1/1/0 | transferred > failed 1/1/0 | transferred > cancelled 1/1/0 | transferred > abandoned 1/1/0
move to where it is            | unchanged                   | unchanged                                 | unchanged                                 | unchanged                            | unchanged                     | unchanged                  | unchanged                     | unchanged
rebind                         | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
settle as completed            | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
settle as failed               | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
flip                           | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
begin the callback             | stale                       | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
the callback failed            | superseded                  | superseded                                | superseded                                | superseded                           | superseded                    | superseded                 | superseded                    | superseded
"""  # noqa: E501  a table is read across


def _cells() -> list[tuple[str, str, str]]:
    head, *lines = ([cell.strip() for cell in line.split("|")] for line in TABLE.strip().splitlines())
    assert tuple(head[1:]) == STATES
    assert [line[0] for line in lines] == list(COMMANDS)
    return [(line[0], state, cell) for line in lines for state, cell in zip(STATES, line[1:], strict=True)]


CELLS = [cell for cell in _cells() if cell[2] != "?"]
CHANGES = [cell for cell in CELLS if ">" in cell[2]]
MOVES = [cell for cell in CHANGES if cell[2].startswith("transferred")]
WRITES = [cell for cell in CHANGES if cell not in MOVES]


def _shown(decision: Change | Refused, task: Task) -> str:
    if isinstance(decision, Refused):
        return "stale" if decision.stale else str(decision.verdict)
    after = task._replace(**decision.columns)
    owner = "-" if after.owner_id is None else after.owner_id
    return f"{decision.type} > {after.state} {after.attempt}/{owner}/{after.attempts_spent}"


@for_each(("command", "state", "expected"), CELLS)
def test_every_command_does_in_every_state_what_the_table_says(command: str, state: str, expected: str) -> None:
    task = row(state)

    assert _shown(decide(task, COMMANDS[command], NOW), task) == expected


@for_each(("command", "state", "expected"), CELLS)
def test_hidden_work_lives_by_the_same_rules(command: str, state: str, expected: str) -> None:
    task = row(state, mode="hidden")

    assert _shown(decide(task, COMMANDS[command], NOW), task) == expected


def test_the_table_has_every_command() -> None:
    assert {type(command) for command in COMMANDS.values()} == set(Command.__args__)


@for_each(("command", "state", "expected"), WRITES)
def test_a_change_is_dated_and_a_terminal_one_has_its_end(command: str, state: str, expected: str) -> None:
    decision = decide(row(state), COMMANDS[command], NOW)

    assert isinstance(decision, Change)
    assert decision.columns["updated_at"] == NOW
    ends = expected.split(" > ")[1].split()[0] in TERMINAL
    assert decision.columns.get("completed_at") == (NOW if ends else None)


DETAILS: list[tuple[str, str, dict[str, Any], dict[str, Any] | None]] = [
    (
        "start",
        "pending",
        {"state": "running", "attempt": 2, "owner_id": 1, "started_at": NOW, "updated_at": NOW},
        None,
    ),
    (
        "reattach after a crash",
        "running",
        {
            "state": "running",
            "attempt": 2,
            "owner_id": 2,
            "attempts_spent": 1,
            "started_at": NOW,
            "updated_at": NOW,
        },
        {"previous_owner_id": 1, "ended_by": "crash"},
    ),
    ("release", "running", {"state": "pending", "owner_id": None, "updated_at": NOW}, {"reason": "closed"}),
    (
        "request cancel",
        "running",
        {
            "state": "cancel_requested",
            "cancel_reason": "enough",
            "cancel_requested_by": "a person",
            "cancel_requested_at": NOW,
            "updated_at": NOW,
        },
        None,
    ),
    (
        "request cancel",
        "pending",
        {
            "state": "cancelled",
            "cancel_reason": "enough",
            "cancel_requested_by": "a person",
            "cancel_requested_at": NOW,
            "updated_at": NOW,
            "completed_at": NOW,
        },
        None,
    ),
    ("confirm cancel", "cancel_requested", {"state": "cancelled", "updated_at": NOW, "completed_at": NOW}, None),
    (
        "complete",
        "running",
        {"state": "completed", "result": '{"files":3}', "updated_at": NOW, "completed_at": NOW},
        None,
    ),
    ("fail", "running", {"state": "failed", "failure": FAILURE, "updated_at": NOW, "completed_at": NOW}, None),
    ("abandon", "running", {"state": "abandoned", "evidence": EVIDENCE, "updated_at": NOW, "completed_at": NOW}, None),
    (
        "given up by a person",
        "running",
        {"state": "pending", "owner_id": None, "attempt": 2, "updated_at": NOW},
        {"reason": "stuck", "previous_owner_id": 1},
    ),
    (
        "given up by a person",
        "cancel_requested",
        {"state": "abandoned", "evidence": EVIDENCE, "attempt": 2, "updated_at": NOW, "completed_at": NOW},
        None,
    ),
    ("progress", "running", {"progress": "half", "fraction": 0.5, "updated_at": NOW}, None),
    ("progress told from outside", "pending", {"progress": "half", "updated_at": NOW}, None),
    ("save", "running", {"updated_at": NOW}, {"bytes": 12}),
    (
        "retry",
        "running",
        {
            "state": "pending",
            "not_before": LATER,
            "last_error": FAILURE,
            "attempts_spent": 1,
            "updated_at": NOW,
        },
        {"ended_by": "failure"},
    ),
    (
        "retry",
        "cancel_requested",
        {"state": "failed", "failure": FAILURE, "updated_at": NOW, "completed_at": NOW},
        None,
    ),
    ("expire", "pending", {"state": "failed", "failure": FAILURE, "updated_at": NOW, "completed_at": NOW}, None),
    ("retry a step", "running", {"updated_at": NOW}, STEP),
    ("wait", "running", {"state": "waiting", "waiting_for": "signal 'go'", "updated_at": NOW}, None),
    ("go on", "waiting", {"state": "running", "updated_at": NOW}, None),
    ("launch", "running", {"process": PROCESS, "updated_at": NOW}, None),
    ("launch", "waiting", {"process": PROCESS, "updated_at": NOW}, None),
    (
        "release of what may live on",
        "running",
        {"state": "pending", "owner_id": None, "updated_at": NOW},
        {"reason": "closed", "previous_owner_id": 1},
    ),
    (
        "abandon what may live on",
        "running",
        {"state": "abandoned", "evidence": EVIDENCE, "updated_at": NOW, "completed_at": NOW},
        None,
    ),
    ("signal", "pending", {"updated_at": NOW}, SIGNAL),
    ("notify", "running", {"updated_at": NOW}, NOTE),
    ("move", "running", {"scope": "desktop:s2"}, None),
    ("move", "completed", {"scope": "desktop:s2"}, None),
]


@for_each(("command", "state", "columns", "detail"), DETAILS)
def test_a_change_names_its_columns_and_no_others(
    command: str, state: str, columns: dict[str, Any], detail: dict[str, Any] | None
) -> None:
    decision = decide(row(state), COMMANDS[command], NOW)

    assert isinstance(decision, Change)
    assert decision.columns == columns
    if detail is not None:
        assert decision.detail is not None
        assert detail.items() <= decision.detail.items()


# --- the fence ------------------------------------------------------------------------------------------------------


def fenced(attempt: int, owner_id: int) -> list[Command]:
    fence = Fence(attempt, owner_id)
    return [
        ConfirmCancel(fence),
        Complete(fence, "1"),
        Fail(fence, FAILURE),
        Progress(fence, "half", None),
        Save(fence, {"bytes": 1}),
        Notify(fence, NOTE),
        Retry(fence, FAILURE, LATER),
        RetryStep(fence, STEP),
        Wait(fence, "signal 'go'"),
        GoOn(fence),
        Launch(fence, PROCESS),
    ]


EXECUTING = ("running", "waiting", "cancel_requested")


@for_each("state", STATES)
@for_each("command", fenced(attempt=1, owner_id=1))
def test_a_stale_attempt_cannot_write_to_its_successor(command: Command, state: str) -> None:
    assert decide(row(state, attempt=2), command, NOW) == Refused(Verdict.SUPERSEDED, stale=True)


@for_each("state", STATES)
@for_each("command", fenced(attempt=1, owner_id=1))
def test_a_stale_owner_cannot_write_in_the_same_attempt(command: Command, state: str) -> None:
    assert decide(row(state, owner_id=2), command, NOW) == Refused(Verdict.SUPERSEDED, stale=True)


@for_each("command", fenced(attempt=1, owner_id=1))
def test_a_body_cannot_write_once_its_row_was_released(command: Command) -> None:
    decision = decide(row("pending", owner_id=None), command, NOW)

    assert decision == Refused(Verdict.SUPERSEDED, stale=True)


@for_each("command", fenced(attempt=1, owner_id=1))
def test_a_body_cannot_write_once_its_row_is_only_claimed(command: Command) -> None:
    assert decide(row("pending"), command, NOW) == Refused(Verdict.SUPERSEDED, stale=True)


@for_each("state", EXECUTING)
@for_each("command", fenced(attempt=1, owner_id=1)[1:-3])
def test_the_current_attempt_may_write(command: Command, state: str) -> None:
    assert isinstance(decide(row(state), command, NOW), Change)


@for_each("state", TERMINAL)
@for_each("command", fenced(attempt=1, owner_id=1))
def test_no_write_is_taken_after_the_end_even_from_the_attempt_that_ended_it(command: Command, state: str) -> None:
    assert isinstance(decide(row(state), command, NOW), Refused)


# --- rules across the table -----------------------------------------------------------------------------------------


@for_each("state", TERMINAL)
@for_each("command", [name for name in COMMANDS if name != "move"])
def test_the_first_terminal_state_wins(command: str, state: str) -> None:
    assert isinstance(decide(row(state), COMMANDS[command], NOW), Refused)


@for_each("state", STATES)
def test_a_transfer_changes_the_scope_and_nothing_else_whatever_the_state(state: str) -> None:
    assert decide(row(state), Move("desktop:s2"), NOW) == Change(EventType.TRANSFERRED, {"scope": "desktop:s2"})


@for_each(
    "command",
    [
        Start(1, 1),
        Start(2, 1, reattach=True, crashed=True),
        Claim(1, crashed=False),
        Claim(2, crashed=True),
        Release("closed"),
        Release("unknown_function", crashed=True),
        Wait(MINE, "signal 'go'"),
        GoOn(MINE),
        Launch(MINE, PROCESS),
        Expire(1, FAILURE),
    ],
)
def test_a_cancel_request_is_never_erased(command: Command) -> None:
    assert decide(row("cancel_requested"), command, NOW) == Refused(Verdict.SUPERSEDED)


def test_a_body_that_finishes_wins_over_a_cancel_request() -> None:
    decision = decide(row("cancel_requested"), Complete(MINE, "42"), NOW)

    assert isinstance(decision, Change)
    assert (decision.type, decision.columns["state"]) == (EventType.COMPLETED, TaskState.COMPLETED)
    assert not {"cancel_reason", "cancel_requested_at", "cancel_requested_by"} & decision.columns.keys()


def test_a_second_cancel_request_keeps_the_first_ones_reason() -> None:
    assert decide(row("cancel_requested"), RequestCancel("later", "b"), NOW) == Refused(Verdict.UNCHANGED)


def test_nothing_is_cancelled_that_nobody_asked_to_cancel() -> None:
    assert decide(row("running"), ConfirmCancel(MINE), NOW) == Refused(Verdict.SUPERSEDED)


def test_releasing_what_is_free_writes_nothing() -> None:
    assert decide(row("pending", owner_id=None), Release("closed"), NOW) == Refused(Verdict.UNCHANGED)


def test_claiming_what_one_holds_already_writes_nothing() -> None:
    assert decide(row("pending", owner_id=1), Claim(1, crashed=False), NOW) == Refused(Verdict.UNCHANGED)


def test_a_free_row_is_started_by_who_takes_it_from_nobody() -> None:
    decision = decide(row("pending", owner_id=None, attempt=0), Start(2, None, reattach=True), NOW)

    assert isinstance(decision, Change)
    assert (decision.columns["owner_id"], decision.columns["attempt"]) == (2, 1)


def test_only_a_start_and_a_person_raise_the_attempt() -> None:
    raised = {(name, state) for name, state, cell in CHANGES if " 2/" in cell}

    assert {name for name, _ in raised} == {
        "start",
        "reattach what was pending",
        "reattach after a crash",
        "given up by a person",
    }
    for name, state, _ in CHANGES:
        decision = decide(row(state), COMMANDS[name], NOW)
        assert isinstance(decision, Change)
        assert decision.columns.get("attempt", 1) == (2 if (name, state) in raised else 1)


# --- given up by a person -------------------------------------------------------------------------------------------


def given_up(task: Task) -> Task:
    decision = decide(task, GiveUp("stuck", EVIDENCE), NOW)
    assert isinstance(decision, Change)
    return task._replace(**decision.columns)


@for_each("state", EXECUTING)
@for_each("recovery", ["rerun", "owner_bound"])
@for_each("command", fenced(attempt=1, owner_id=1))
def test_a_body_that_was_given_up_cannot_write_any_more(command: Command, recovery: str, state: str) -> None:
    task = given_up(row(state, recovery=recovery))

    assert decide(task, command, NOW) == Refused(Verdict.SUPERSEDED, stale=True)


@for_each("state", LIVE)
@for_each("function", ["index_repo", None])
def test_work_that_may_not_be_run_again_is_abandoned_when_it_is_given_up(function: str | None, state: str) -> None:
    task = given_up(row(state, recovery="owner_bound", function=function))

    assert (task.state, task.evidence, task.completed_at) == ("abandoned", EVIDENCE, NOW)


def test_giving_up_what_is_free_writes_nothing() -> None:
    assert decide(row("pending", owner_id=None), GiveUp("stuck", EVIDENCE), NOW) == Refused(Verdict.UNCHANGED)


def test_giving_a_task_up_spends_no_attempt() -> None:
    assert given_up(row("running", attempt=3, attempts_spent=2)).attempts_spent == 2


# --- progress and notes ---------------------------------------------------------------------------------------------


@for_each(
    ("told", "columns"),
    [
        (Progress(None, "half", 0.5), {"progress": "half", "fraction": 0.5}),
        (Progress(None, "half", None), {"progress": "half"}),
        (Progress(None, None, 0.5), {"fraction": 0.5}),
    ],
)
def test_progress_told_from_outside_keeps_what_it_does_not_name(told: Progress, columns: dict[str, Any]) -> None:
    decision = decide(row("running", progress="begun", fraction=0.1), told, NOW)

    assert decision == Change(EventType.PROGRESS, {**columns, "updated_at": NOW})


def test_progress_that_tells_nothing_writes_nothing() -> None:
    assert decide(row("running"), Progress(None, None, None), NOW) == Refused(Verdict.UNCHANGED)


@for_each(("command", "state", "expected"), CHANGES)
def test_only_a_crash_and_a_failure_that_is_tried_again_spend_an_attempt(
    command: str, state: str, expected: str
) -> None:
    decision = decide(row(state), COMMANDS[command], NOW)

    assert isinstance(decision, Change)
    spends = "after a crash" in command or expected.startswith("retry_scheduled > pending")
    assert decision.columns.get("attempts_spent", 0) == (1 if spends else 0)


# --- tried again after a failure ------------------------------------------------------------------------------------


def decided(task: Task, command: Command) -> Change:
    decision = decide(task, command, NOW)
    assert isinstance(decision, Change)
    return decision


@pytest.mark.parametrize(
    "task",
    [
        row("running", attempt=3, attempts_spent=2),
        row("running", max_attempts=1),
        row("running", deadline=LATER),
        row("running", deadline=NOW),
        row("cancel_requested"),
    ],
    ids=["the last attempt", "one attempt", "due at the deadline", "due after the deadline", "to be cancelled"],
)
def test_a_failure_is_for_good_where_no_other_attempt_may_follow(task: Task) -> None:
    change = decided(task, Retry(Fence(task.attempt, 1), FAILURE, LATER))

    assert change == Change(
        EventType.FAILED, {"state": "failed", "failure": FAILURE, "updated_at": NOW, "completed_at": NOW}
    )


def test_a_failure_is_tried_again_while_attempts_and_time_are_left() -> None:
    task = row("running", attempt=2, attempts_spent=1, deadline="2024-05-01T10:00:09.001Z")

    change = decided(task, Retry(Fence(2, 1), FAILURE, LATER))

    assert (change.type, change.columns["attempts_spent"]) == (EventType.RETRY_SCHEDULED, 2)


def test_a_task_waits_for_its_retry_under_the_owner_that_runs_it() -> None:
    after = row("running")._replace(**decided(row("running"), Retry(MINE, FAILURE, LATER)).columns)

    assert (after.state, after.owner_id, after.attempt, after.failure) == ("pending", 1, 1, None)


@pytest.mark.parametrize(
    ("state", "command"),
    [
        ("pending", Start(1, 1)),
        ("running", Complete(MINE, "1")),
        ("running", Save(MINE, {"bytes": 1})),
        ("running", Retry(MINE, '{"type":"Another"}', LATER)),
    ],
    ids=["started", "completed", "saved", "failed again"],
)
def test_the_last_error_stays_until_there_is_another(state: str, command: Command) -> None:
    task = row(state, last_error=FAILURE)

    after = task._replace(**decided(task, command).columns)

    assert after.last_error == ('{"type":"Another"}' if isinstance(command, Retry) else FAILURE)


def test_a_retry_that_comes_after_the_end_changes_nothing() -> None:
    assert decide(row("completed"), Retry(MINE, FAILURE, LATER), NOW) == Refused(Verdict.SUPERSEDED)


# --- what is true of a state alone ----------------------------------------------------------------------------------

LEAVES_PENDING = [
    "start",
    "reattach what was pending",
    "request cancel",
    "give up",
    "abandon",
    "abandon what may live on",
    "expire",
]
STAYS_PENDING = [
    "claim what was pending",
    "release",
    "release of what may live on",
    "given up by a person",
    "progress told from outside",
    "signal",
]


@for_each("command", LEAVES_PENDING)
def test_when_a_retry_is_due_is_forgotten_once_the_task_waits_for_it_no_more(command: str) -> None:
    task = row("pending", not_before=LATER)

    after = task._replace(**decided(task, COMMANDS[command]).columns)

    assert (after.state == "pending", after.not_before) == (False, None)


@for_each("command", [*STAYS_PENDING, "notify of the store", "move"])
def test_a_task_that_stays_pending_keeps_when_its_retry_is_due(command: str) -> None:
    task = row("pending", not_before=LATER)

    after = task._replace(**decided(task, COMMANDS[command]).columns)

    assert (after.state, after.not_before) == ("pending", LATER)


def test_every_change_of_what_is_pending_says_whether_it_waits_on() -> None:
    changing = {name for name, state, _ in CHANGES if state == "pending"}

    assert changing == {*LEAVES_PENDING, *STAYS_PENDING, "notify of the store", "move"}


STAYS_WAITING = [
    "progress",
    "progress told from outside",
    "save",
    "retry a step",
    "notify",
    "notify of the store",
    "signal",
    "launch",
    "move",
]


@for_each(
    "command", [name for name, state, _ in CHANGES if state == "waiting" and name not in {*STAYS_WAITING, "wait"}]
)
def test_what_is_waited_for_is_forgotten_with_the_waiting(command: str) -> None:
    task = row("waiting", waiting_for="signal 'stop'")

    after = task._replace(**decided(task, COMMANDS[command]).columns)

    assert (after.state == "waiting", after.waiting_for) == (False, None)


@for_each("command", STAYS_WAITING)
def test_a_task_that_waits_on_says_what_for(command: str) -> None:
    task = row("waiting", waiting_for="signal 'stop'")

    after = task._replace(**decided(task, COMMANDS[command]).columns)

    assert (after.state, after.waiting_for) == ("waiting", "signal 'stop'")


def test_a_task_that_waits_for_something_else_says_so() -> None:
    change = decided(row("waiting", waiting_for="signal 'stop'"), Wait(MINE, "signal 'go'"))

    assert change.columns["waiting_for"] == "signal 'go'"


def test_waiting_for_the_same_again_writes_nothing() -> None:
    task = row("waiting", waiting_for="signal 'go'")

    assert decide(task, Wait(MINE, "signal 'go'"), NOW) == Refused(Verdict.UNCHANGED)


@for_each(("command", "state", "expected"), WRITES)
def test_no_change_makes_a_row_the_file_would_refuse(command: str, state: str, expected: str) -> None:
    task = row(
        state,
        not_before=LATER if state == "pending" else None,
        waiting_for="signal 'stop'" if state == "waiting" else None,
    )

    after = task._replace(**decided(task, COMMANDS[command]).columns)

    assert after.not_before is None or after.state == "pending"
    assert after.waiting_for is None or after.state == "waiting"


# --- which process runs ---------------------------------------------------------------------------------------------

OVER = [
    "start",
    "reattach what was pending",
    "reattach after a crash",
    "claim what was pending",
    "claim after a crash",
    "release",
    "release after a crash",
    "confirm cancel",
    "confirm cancel of a dead owner",
    "complete",
    "fail",
    "give up",
    "give up after a crash",
    "abandon",
    "expire",
]
GOES_ON = [
    "release of what may live on",
    "abandon what may live on",
    "given up by a person",
    "request cancel",
    "progress",
    "progress told from outside",
    "save",
    "retry a step",
    "wait",
    "go on",
    "signal",
    "notify",
    "notify of the store",
    "move",
]
CLEARED = [(name, state) for name, state, _ in CHANGES if name in OVER]
KEPT = [
    (name, state) for name, state, _ in WRITES if name in GOES_ON and (name, state) != ("request cancel", "pending")
]


def launched(state: str, **changed: Any) -> Task:
    return row(state, process=PROCESS, **changed)


@for_each(("command", "state"), CLEARED)
def test_nobody_ends_frees_or_takes_a_task_before_its_process_is_gone(command: str, state: str) -> None:
    change = decided(launched(state), COMMANDS[command])

    assert ("process", None) in change.columns.items()


@for_each(("command", "state"), CLEARED)
def test_a_task_without_a_process_forgets_none(command: str, state: str) -> None:
    assert "process" not in decided(row(state), COMMANDS[command]).columns


@for_each(("command", "state"), KEPT)
def test_a_process_that_may_live_on_stays_recorded(command: str, state: str) -> None:
    assert "process" not in decided(launched(state), COMMANDS[command]).columns


@for_each("state", STATES)
def test_a_process_goes_with_its_task_into_another_session(state: str) -> None:
    assert decide(launched(state), Move("desktop:s2"), NOW) == Change(EventType.TRANSFERRED, {"scope": "desktop:s2"})


def test_every_change_says_whether_the_process_is_gone() -> None:
    # a monitor is not tried again after a failure
    assert {name for name, *_ in CHANGES} == {*OVER, *GOES_ON, "retry", "launch"}


@for_each("recovery", ["rerun", "owner_bound"])
@for_each("state", LIVE)
def test_a_task_that_was_given_up_still_names_the_process_that_nobody_ended(state: str, recovery: str) -> None:
    assert given_up(launched(state, recovery=recovery)).process == PROCESS


@for_each("state", ["running", "waiting"])
def test_a_cancel_that_was_only_asked_for_keeps_the_process_until_it_is_confirmed(state: str) -> None:
    asked = launched(state)._replace(**decided(launched(state), RequestCancel("enough", "a person")).columns)
    confirmed = asked._replace(**decided(asked, ConfirmCancel(MINE)).columns)

    assert (asked.state, asked.process) == ("cancel_requested", PROCESS)
    assert (confirmed.state, confirmed.process) == ("cancelled", None)


@pytest.mark.parametrize(
    "freed",
    [Release("closed", process_left=True), GiveUp("stuck", EVIDENCE)],
    ids=["by its owner's close", "by a person"],
)
def test_what_was_freed_while_its_process_lives_is_not_cancelled_before_that_is_gone(freed: Command) -> None:
    task = launched("running")._replace(**decided(launched("running"), freed).columns)
    assert (task.state, task.owner_id, task.process) == ("pending", None, PROCESS)

    after = task._replace(**decided(task, RequestCancel("enough", "a person")).columns)

    assert after.process == PROCESS


def test_the_process_of_another_start_takes_the_place_of_the_first() -> None:
    change = decided(launched("running"), Launch(MINE, '{"pid":42}'))

    assert change.columns["process"] == '{"pid":42}'


def test_a_task_whose_cancel_was_requested_starts_no_process() -> None:
    assert decide(row("cancel_requested"), Launch(MINE, PROCESS), NOW) == Refused(Verdict.SUPERSEDED)


@for_each(("command", "state"), [*CLEARED, *KEPT, ("launch", "running"), ("launch", "waiting"), ("move", "completed")])
def test_the_event_of_a_change_folds_to_the_row_with_its_process_or_without(command: str, state: str) -> None:
    before = launched(state)
    change = decided(before, COMMANDS[command])
    after = before._replace(**change.columns)

    data = json.loads(queries.event_data(change.type, change.columns, change.detail))
    first = {**_event(1, "saved", before.attempt, _plain(before)), "at": BEFORE}
    told = {**_event(2, str(change.type), after.attempt, data, after.scope), "at": NOW}

    assert fold([first, told]) == _plain(after)


def _plain(task: Task) -> dict[str, Any]:
    """A row with its JSON columns as values, as events tell them."""
    return {
        name: json.loads(value) if name in lifecycle.JSON_COLUMNS and value is not None else value
        for name, value in task._asdict().items()
    }


@for_each("state", EXECUTING)
def test_recovery_chooses_the_same_whether_a_process_is_recorded_or_not(state: str) -> None:
    for recovery in ("rerun", "owner_bound"):
        bare, left = row(state, recovery=recovery), launched(state, recovery=recovery)

        assert recovered(left) == recovered(bare)
        assert decided(left, recovered(left)).columns["process"] is None


# --- what an event tells of an end ----------------------------------------------------------------------------------


@for_each(("command", "state", "expected"), CHANGES)
def test_an_event_tells_a_crash_from_a_failure_and_both_from_everything_else(
    command: str, state: str, expected: str
) -> None:
    told = decided(row(state), COMMANDS[command]).detail or {}

    if "after a crash" in command:
        assert told["ended_by"] == "crash"
    elif expected.startswith("retry_scheduled > pending"):
        assert told["ended_by"] == "failure"
    else:
        assert "ended_by" not in told


# --- the version of the code ----------------------------------------------------------------------------------------


@for_each(
    ("before", "here", "columns"),
    [
        (None, "2", {"version": "2"}),
        ("1", "2", {"version": "2"}),
        ("2", None, {"version": None}),
        ("2", "2", {}),
        (None, None, {}),
    ],
)
@for_each("reattach", [True, False])
def test_a_start_notes_the_version_of_the_code_if_it_is_another(
    before: str | None, here: str | None, columns: dict[str, str | None], reattach: bool
) -> None:
    change = decided(row("pending", version=before), Start(1, 1, reattach=reattach, version=here))

    assert {name: value for name, value in change.columns.items() if name == "version"} == columns


# --- recovery: the managed rows of the table, first match wins ------------------------------------------------------


def recovered(task: Task, *, known: bool = True, slot: bool = True, version: str | None = None) -> Command:
    return lifecycle.recover(task, owner_id=2, known=known, slot=slot, evidence=EVIDENCE, now=NOW, version=version)


COROUTINE = {"function": None, "recovery": "owner_bound", "arguments": None, "max_attempts": 1}
BOUND = {"recovery": "owner_bound"}
LAST = {"attempts_spent": 2, "attempt": 3}
NEVER = {"attempt": 0, "started_at": None}
LATE = {"deadline": BEFORE}
TOO_LATE = lifecycle.deadline_passed(BEFORE)

RECOVERY: list[tuple[str, Task, dict[str, Any], Command | type[Command]]] = [
    ("cancel requested", row("cancel_requested"), {}, ConfirmCancel(None)),
    ("cancel requested, known to nobody", row("cancel_requested"), {"known": False}, ConfirmCancel(None)),
    ("cancel requested, attempts spent", row("cancel_requested", **LAST), {}, ConfirmCancel(None)),
    ("cancel requested, owner bound", row("cancel_requested", **BOUND), {}, ConfirmCancel(None)),
    ("cancel requested, a coroutine", row("cancel_requested", **COROUTINE), {}, ConfirmCancel(None)),
    ("rerun, spent by this crash", row("running", **LAST), {}, Fail),
    ("rerun, spent by this crash while waiting", row("waiting", **LAST), {}, Fail),
    ("rerun, spent before", row("pending", attempt=3, attempts_spent=3), {}, Fail),
    ("rerun, spent, function unknown", row("running", **LAST), {"known": False}, Fail),
    ("rerun, running, slot", row("running"), {}, Start(2, 1, reattach=True, crashed=True)),
    ("rerun, waiting, slot", row("waiting"), {}, Start(2, 1, reattach=True, crashed=True)),
    ("rerun, pending, slot", row("pending", **NEVER), {}, Start(2, 1, reattach=True, crashed=False)),
    ("rerun, free, slot", row("pending", owner_id=None), {}, Start(2, None, reattach=True, crashed=False)),
    ("rerun, running, no slot", row("running"), {"slot": False}, Claim(2, crashed=True)),
    ("rerun, pending, no slot", row("pending"), {"slot": False}, Claim(2, crashed=False)),
    ("rerun, running, unknown", row("running"), {"known": False}, Release("unknown_function", crashed=True)),
    ("rerun, pending, unknown", row("pending"), {"known": False}, Release("unknown_function", crashed=False)),
    ("rerun, unknown, no slot", row("running"), {"known": False, "slot": False}, Release("unknown_function", True)),
    ("bound, never started, slot", row("pending", **BOUND, **NEVER), {}, Start(2, 1, reattach=True)),
    ("bound, never started, no slot", row("pending", **BOUND, **NEVER), {"slot": False}, Claim(2, crashed=False)),
    ("bound, never started, unknown", row("pending", **BOUND, **NEVER), {"known": False}, Release("unknown_function")),
    ("bound, running", row("running", **BOUND), {}, Abandon(EVIDENCE)),
    ("bound, waiting", row("waiting", **BOUND), {}, Abandon(EVIDENCE)),
    ("bound, started once, pending again", row("pending", **BOUND), {}, Abandon(EVIDENCE)),
    ("bound, running, unknown", row("running", **BOUND), {"known": False}, Abandon(EVIDENCE)),
    ("a coroutine, running", row("running", **COROUTINE), {}, Abandon(EVIDENCE)),
    ("a coroutine, never started", row("pending", **COROUTINE, **NEVER), {}, Abandon(EVIDENCE)),
    # a deadline
    ("cancel requested, too late", row("cancel_requested", **LATE), {}, ConfirmCancel(None)),
    ("rerun, running, too late", row("running", **LATE), {}, Fail(None, TOO_LATE, crashed=True)),
    ("rerun, waiting, too late", row("waiting", **LATE), {}, Fail(None, TOO_LATE, crashed=True)),
    ("rerun, pending, too late", row("pending", **LATE), {}, Fail(None, TOO_LATE)),
    ("rerun, free, too late", row("pending", owner_id=None, **LATE), {}, Fail(None, TOO_LATE)),
    ("rerun, too late, no slot", row("pending", **LATE), {"slot": False}, Fail(None, TOO_LATE)),
    ("rerun, too late, unknown", row("running", **LATE), {"known": False}, Fail(None, TOO_LATE, crashed=True)),
    ("rerun, at the deadline", row("pending", deadline=NOW), {}, Fail),
    ("rerun, before the deadline", row("running", deadline=LATER), {}, Start(2, 1, reattach=True, crashed=True)),
    ("bound, running, too late", row("running", **BOUND, **LATE), {}, Abandon(EVIDENCE)),
    ("bound, never started, too late", row("pending", **BOUND, **NEVER, **LATE), {}, Fail(None, TOO_LATE)),
    # a retry that is due at a time
    ("retry, not due", row("pending", not_before=LATER), {}, Claim(2, crashed=False)),
    ("retry, not due, free", row("pending", not_before=LATER, owner_id=None), {}, Claim(2, crashed=False)),
    ("retry, not due, no slot", row("pending", not_before=LATER), {"slot": False}, Claim(2, crashed=False)),
    ("retry, due now", row("pending", not_before=NOW), {}, Start(2, 1, reattach=True)),
    ("retry, overdue", row("pending", not_before=BEFORE), {}, Start(2, 1, reattach=True)),
    ("retry, due, no slot", row("pending", not_before=BEFORE), {"slot": False}, Claim(2, crashed=False)),
    ("retry, unknown", row("pending", not_before=LATER), {"known": False}, Release("unknown_function")),
    ("retry, not due, too late", row("pending", not_before=LATER, **LATE), {}, Fail(None, TOO_LATE)),
    # the version of the code
    ("version, running", row("running"), {"version": "2"}, Start(2, 1, reattach=True, crashed=True, version="2")),
    ("version, pending, no slot", row("pending"), {"version": "2", "slot": False}, Claim(2, crashed=False)),
]


@pytest.mark.parametrize(
    ("task", "asked", "expected"), [case[1:] for case in RECOVERY], ids=[case[0] for case in RECOVERY]
)
def test_recovery_follows_its_table(task: Task, asked: dict[str, Any], expected: Command | type[Command]) -> None:
    command = recovered(task, **asked)

    if isinstance(expected, type):
        assert isinstance(command, expected)
    else:
        assert command == expected


@pytest.mark.parametrize("task", [case[1] for case in RECOVERY], ids=[case[0] for case in RECOVERY])
def test_what_recovery_chooses_is_never_refused_but_for_a_row_that_is_free_already(task: Task) -> None:
    for known in (True, False):
        for slot in (True, False):
            command = recovered(task, known=known, slot=slot)
            decision = decide(task, command, NOW)

            free = task.owner_id is None and isinstance(command, Release)
            assert decision == Refused(Verdict.UNCHANGED) if free else isinstance(decision, Change)


def test_a_task_out_of_attempts_fails_by_the_name_of_it() -> None:
    command = recovered(row("running", attempt=5, attempts_spent=2))

    assert isinstance(command, Fail)
    assert (command.fence, command.crashed) == (None, True)
    assert json.loads(command.failure)["type"] == "AttemptsExhausted"


def test_a_task_out_of_attempts_says_so_also_when_it_is_too_late() -> None:
    command = recovered(row("running", attempt=3, attempts_spent=2, deadline=BEFORE))

    assert isinstance(command, Fail)
    assert json.loads(command.failure)["type"] == "AttemptsExhausted"


def test_a_task_that_is_too_late_fails_by_a_timeout_that_names_its_deadline() -> None:
    failure = json.loads(lifecycle.deadline_passed(BEFORE))

    assert (failure["type"], failure["traceback"]) == ("Timeout", None)
    assert BEFORE in failure["message"]


@for_each(("not_before", "early"), [(None, False), (BEFORE, False), (NOW, False), (LATER, True)])
def test_a_retry_is_early_until_it_is_due(not_before: str | None, early: bool) -> None:
    assert lifecycle.is_early(row("pending", not_before=not_before), NOW) is early


def test_attempts_ended_by_a_clean_close_do_not_count_against_the_maximum() -> None:
    command = recovered(row("running", attempt=50, attempts_spent=1))

    assert command == Start(2, 1, reattach=True, crashed=True)


def test_a_recovery_repeated_on_its_own_claim_finds_nothing_to_write() -> None:
    claimed = row("pending", owner_id=2)

    assert decide(claimed, recovered(claimed, slot=False), NOW) == Refused(Verdict.UNCHANGED)


# --- fold -----------------------------------------------------------------------------------------------------------


def _event(seq: int, kind: str, attempt: int, data: dict[str, Any], scope: str = "desktop:s1") -> dict[str, Any]:
    return {
        "seq": seq,
        "task_seq": 7,
        "scope": scope,
        "from_scope": None,
        "task_id": "index",
        "attempt": attempt,
        "type": kind,
        "at": f"2024-05-01T10:00:{seq:02}.000Z",
        "data": data,
    }


CRASHED = {"previous_owner_id": 1, "ended_by": "crash"}

HISTORY = [
    _event(
        1,
        "registered",
        0,
        {
            "kind": "observer",
            "mode": "managed",
            "state": "pending",
            "label": "index_repo",
            "function": "index_repo",
            "recovery": "rerun",
            "cancel_policy": "cooperative",
            "arguments": {"path": "/src"},
            "attempts_spent": 0,
            "max_attempts": 100,
            "owner_id": 1,
            "parent_seq": 3,
            "child_session_id": "s9",
            "close_policy": "transfer",
            "idempotency_key": "once",
            "notify_on_end": 1,
            "version": "1",
            "timeout": 30.0,
            "deadline": "2024-05-02T00:00:00.000Z",
            "handle_id": "h-1",
        },
    ),
    _event(2, "started", 1, {"state": "running", "owner_id": 1}),
    _event(3, "progress", 1, {"progress": "half", "fraction": 0.5}),
    _event(4, "saved", 1, {"bytes": 12}),
    _event(5, "reattached", 2, {"state": "running", "owner_id": 2, "attempts_spent": 1, **CRASHED, "version": "2"}),
    _event(
        6,
        "cancel_requested",
        2,
        {"state": "cancel_requested", "cancel_reason": "enough", "cancel_requested_by": "a person"},
    ),
    _event(7, "noted", 2, {"note_key": "end:7", "note": "task 'index' completed"}),
    _event(8, "completed", 2, {"state": "completed", "result": {"files": 3}}),
    _event(9, "transferred", 2, {}, scope="desktop:s2"),
]


def test_folding_a_history_gives_the_row() -> None:
    assert fold(HISTORY) == {
        "task_seq": 7,
        "scope": "desktop:s2",
        "id": "index",
        "kind": "observer",
        "mode": "managed",
        "state": "completed",
        "label": "index_repo",
        "function": "index_repo",
        "recovery": "rerun",
        "cancel_policy": "cooperative",
        "arguments": {"path": "/src"},
        "attempt": 2,
        "attempts_spent": 1,
        "max_attempts": 100,
        "owner_id": 2,
        "progress": "half",
        "fraction": 0.5,
        "result": {"files": 3},
        "failure": None,
        "evidence": None,
        "cancel_reason": "enough",
        "cancel_requested_by": "a person",
        "cancel_requested_at": "2024-05-01T10:00:06.000Z",
        "created_at": "2024-05-01T10:00:01.000Z",
        "started_at": "2024-05-01T10:00:05.000Z",
        "updated_at": "2024-05-01T10:00:08.000Z",
        "completed_at": "2024-05-01T10:00:08.000Z",
        "parent_seq": 3,
        "child_session_id": "s9",
        "close_policy": "transfer",
        "idempotency_key": "once",
        "notify_on_end": 1,
        "has_callback": 0,
        "callback_begun_at": None,
        "callback_error": None,
        "version": "2",
        "timeout": 30.0,
        "deadline": "2024-05-02T00:00:00.000Z",
        "not_before": None,
        "last_error": None,
        "waiting_for": None,
        "process": None,
    }


def test_folding_gives_every_column_of_the_row() -> None:
    assert tuple(fold(HISTORY)) == Task._fields


def test_folding_the_beginning_of_a_history_gives_the_row_of_that_moment() -> None:
    task = fold(HISTORY[:1])

    assert (task["state"], task["attempt"], task["started_at"], task["owner_id"]) == ("pending", 0, None, 1)


def test_folding_a_release_frees_the_row() -> None:
    released = _event(3, "released", 1, {"state": "pending", "owner_id": None, "reason": "closed"})

    task = fold([*HISTORY[:2], released])

    assert (task["state"], task["attempt"], task["owner_id"]) == ("pending", 1, None)


def test_what_the_first_event_does_not_name_is_folded_to_what_the_table_has_by_itself() -> None:
    first = {**HISTORY[0], "data": {"kind": "other", "state": "pending"}}

    task = fold([first])

    assert {name: task[name] for name in lifecycle.DEFAULTS} == {
        "close_policy": "keep",
        "notify_on_end": 0,
        "has_callback": 0,
    }


def test_folding_a_transfer_changes_the_scope_and_no_time() -> None:
    before, after = fold(HISTORY[:2]), fold([*HISTORY[:2], _event(3, "transferred", 1, {}, scope="desktop:s2")])

    assert after == {**before, "scope": "desktop:s2"}


def test_folding_a_retry_gives_what_it_waits_for_and_its_start_takes_that_away() -> None:
    error = {"type": "ValueError", "message": "no", "traceback": None}
    put_off = {"state": "pending", "not_before": LATER, "last_error": error, "attempts_spent": 1, "ended_by": "failure"}
    scheduled = [*HISTORY[:2], _event(3, "retry_scheduled", 1, put_off)]

    waits = fold(scheduled)
    runs = fold([*scheduled, _event(4, "started", 2, {"state": "running", "not_before": None})])

    assert (waits["state"], waits["not_before"], waits["last_error"]) == ("pending", LATER, error)
    assert (runs["state"], runs["not_before"], runs["last_error"], runs["attempts_spent"]) == (
        "running",
        None,
        error,
        1,
    )


def test_folding_a_launch_gives_the_process_as_a_value_and_its_end_takes_that_away() -> None:
    process = json.loads(PROCESS)
    begun = [*HISTORY[:2], _event(3, "state_changed", 1, {"process": process})]
    moved = [*begun, _event(4, "progress", 1, {"progress": "half"}), _event(5, "transferred", 1, {}, "desktop:s2")]
    ended = [*moved, _event(6, "failed", 1, {"state": "failed", "failure": {}, "process": None})]

    assert [fold(history)["process"] for history in (HISTORY[:2], begun, moved, ended)] == [
        None,
        process,
        process,
        None,
    ]
    assert fold(begun) == {**fold(HISTORY[:2]), "process": process, "updated_at": begun[-1]["at"]}


def test_folding_a_step_or_a_signal_changes_the_time_and_nothing_else() -> None:
    told = [_event(3, "saved", 1, STEP), _event(4, "signalled", 1, SIGNAL), _event(5, "retry_scheduled", 1, STEP)]

    assert fold([*HISTORY[:2], *told]) == {**fold(HISTORY[:2]), "updated_at": told[-1]["at"]}


def test_folding_a_note_changes_the_time_and_nothing_else() -> None:
    noted = _event(3, "noted", 1, NOTE)

    assert fold([*HISTORY[:2], noted]) == {**fold(HISTORY[:2]), "updated_at": noted["at"]}


def test_folding_what_a_person_gave_up_raises_the_attempt_and_frees_the_row() -> None:
    released = _event(3, "released", 2, {"state": "pending", "owner_id": None, "reason": "stuck"})

    task = fold([*HISTORY[:2], released])

    assert (task["state"], task["attempt"], task["owner_id"]) == ("pending", 2, None)
    assert task["started_at"] == HISTORY[1]["at"]


def _plain(task: Task) -> dict[str, Any]:
    """A row with its JSON columns as values, as events tell them."""
    row = task._asdict()
    return {
        name: json.loads(value) if name in lifecycle.JSON_COLUMNS and value is not None else value
        for name, value in row.items()
    }


@for_each(("command", "state", "expected"), CHANGES)
def test_the_event_of_a_change_folds_to_the_row_it_made(command: str, state: str, expected: str) -> None:
    before = row(state)
    decision = decide(before, COMMANDS[command], NOW)
    assert isinstance(decision, Change)
    after = before._replace(**decision.columns)

    told = {"task_seq": 7, "task_id": "index"}
    history = [
        {
            **told,
            "type": "saved",
            "at": BEFORE,
            "scope": before.scope,
            "attempt": before.attempt,
            "data": _plain(before),
        },
        {
            **told,
            "type": str(decision.type),
            "at": NOW,
            "scope": after.scope,
            "attempt": after.attempt,
            "data": json.loads(queries.event_data(decision.type, decision.columns, decision.detail)),
        },
    ]

    assert fold(history) == _plain(after)
