"""Rules of ids, scopes and records, and of the names this package exports."""

from __future__ import annotations

import copy
import importlib.metadata
import pickle
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

import lash_store
from lash_store import errors, lifecycle
from lash_store.errors import InvalidId
from lash_store.models import (
    CancelPolicy,
    CancelReport,
    ClosePolicy,
    CloseReport,
    EventType,
    Evidence,
    Failure,
    HandleRole,
    Handoff,
    Note,
    OwnerEnd,
    Recovery,
    Scope,
    SessionRecord,
    StopReason,
    TaskFilter,
    TaskKind,
    TaskMode,
    TaskRecord,
    TaskState,
    Transition,
    Verdict,
    check_id,
    check_text,
)

AT = datetime(2024, 5, 1, 10, tzinfo=UTC)

# --- ids ------------------------------------------------------------------------------------------------------------

BAD_IDS = {
    "empty": "",
    "too long": "x" * 257,
    "NUL": "a\0b",
    "newline": "a\nb",
    "escape": "a\x1b[31m",
    "delete": "a\x7f",
    "C1 control": "a\x9b",
    "lone surrogate": "a\ud800",
    "not text": 7,
    "bytes": b"a",
    "nothing": None,
}


@pytest.mark.parametrize("value", BAD_IDS.values(), ids=BAD_IDS.keys())
def test_an_id_that_cannot_be_stored_is_refused_by_what_it_is(value: str) -> None:
    with pytest.raises(InvalidId, match="task id"):
        check_id("task id", value)


@pytest.mark.parametrize("value", ["a", "x" * 256, "monitor:build", "été", "日本", "a b", "\U0001f600", "a/b\\c'\"--"])
def test_an_id_is_any_printable_text(value: str) -> None:
    assert check_id("task id", value) == value


def test_an_id_that_cannot_be_stored_is_a_value_error_too() -> None:
    with pytest.raises(ValueError):
        check_id("task id", "")


@pytest.mark.parametrize("value", ["", "a\nb", "x" * 10_000, "\x1b[31m", "été"])
def test_text_is_whatever_can_be_stored(value: str) -> None:
    assert check_text("reason", value) == value


@pytest.mark.parametrize("value", ["a\0b", "a\ud800", "\udfff", 7, b"a", None], ids=repr)
def test_text_that_cannot_be_stored_is_refused_by_what_it_is(value: str) -> None:
    with pytest.raises(ValueError, match="reason"):
        check_text("reason", value)


# --- scopes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("session_id", ["s1", "a:b", ":", "été", "x" * 256])
def test_a_printed_scope_is_read_back(session_id: str) -> None:
    scope = Scope("desktop", session_id)

    assert str(scope) == f"desktop:{session_id}"
    assert Scope.parse(str(scope)) == scope


def test_a_runtime_has_no_colon() -> None:
    with pytest.raises(InvalidId, match=":"):
        Scope("desk:top", "s1")


@pytest.mark.parametrize("text", ["", "desktop", ":s1", "desktop:", "desk\0top:s1"])
def test_text_that_is_no_scope_is_refused(text: str) -> None:
    with pytest.raises(InvalidId):
        Scope.parse(text)


@pytest.mark.parametrize("value", [bad for bad in BAD_IDS.values() if isinstance(bad, str)])
def test_both_parts_of_a_scope_are_ids(value: str) -> None:
    with pytest.raises(InvalidId, match="runtime"):
        Scope(value, "s1")
    with pytest.raises(InvalidId, match="session id"):
        Scope("desktop", value)


def test_equal_scopes_are_one_key() -> None:
    assert len({Scope("desktop", "s1"), Scope("desktop", "s1"), Scope("desktop", "s2")}) == 2


def test_a_scope_within_a_record_survives_json() -> None:
    wanted = TaskFilter(scope=Scope("desktop", "a:b"), states=frozenset({TaskState.RUNNING}))

    assert TaskFilter.model_validate_json(wanted.model_dump_json()) == wanted


# --- records --------------------------------------------------------------------------------------------------------


def task(**changed: object) -> TaskRecord:
    """The record of a task in its first attempt."""
    columns = {
        **dict.fromkeys(TaskRecord.model_fields),
        "task_seq": 7,
        "scope": Scope("desktop", "s1"),
        "id": "index",
        "kind": "other",
        "mode": "managed",
        "state": "running",
        "label": "index_repo",
        "recovery": "rerun",
        "cancel_policy": "cooperative",
        "attempt": 1,
        "attempts_spent": 0,
        "max_attempts": 100,
        "created_at": AT,
        "updated_at": AT,
        "close_policy": "keep",
        "notify_on_end": False,
        "has_callback": False,
    }
    return TaskRecord.model_validate({**columns, **changed})


NOTE = Note(
    note_seq=1,
    scope=Scope("desktop", "s1"),
    key="end:7",
    task_seq=7,
    task_id="index",
    text="task 'index' completed",
    data={"state": "completed"},
    posted_at=AT,
)
HANDOFF = Handoff(
    id="ho-1",
    source=Scope("desktop", "s1"),
    destination=Scope("desktop", "s2"),
    moved=(task(scope=Scope("desktop", "s2"), arguments={"path": "/src"}),),
    cancelled=(task(state="cancel_requested", cancel_requested_at=AT),),
    at=AT,
)
CLOSED = CloseReport(scope=Scope("desktop", "s1"), closed_at=AT, kept=(task(),))


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (Scope("desktop", "s1"), "runtime"),
        (Failure(type="E", message="m"), "message"),
        (TaskFilter(), "limit"),
        (task(), "state"),
        (Transition(record=task(), verdict=Verdict.APPLIED), "verdict"),
        (CancelReport(record=task()), "error"),
        (NOTE, "acknowledged_at"),
        (HANDOFF, "moved"),
        (CLOSED, "kept"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_record_is_frozen(record: Scope | TaskRecord | Note, field: str) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, field, "other")


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (Transition, "record verdict"),
        (CancelReport, "record error"),
        (Handoff, "id source destination moved cancelled at"),
        (CloseReport, "scope closed_at successor kept cancelled transferred"),
        (Note, "note_seq scope key task_seq task_id text data posted_at acknowledged_at"),
        (TaskRecord, " ".join(lifecycle.Task._fields)),
    ],
)
def test_a_record_has_the_fields_it_promises_in_order(record: type[TaskRecord], fields: str) -> None:
    assert list(record.model_fields) == fields.split()


@pytest.mark.parametrize("record", [HANDOFF, NOTE, CLOSED], ids=lambda record: type(record).__name__)
def test_a_record_survives_json(record: Handoff) -> None:
    assert type(record).model_validate_json(record.model_dump_json()) == record


def test_a_cancel_that_went_well_has_no_error() -> None:
    assert CancelReport(record=task()).error is None


@pytest.mark.parametrize(("ended", "is_terminal"), [(None, False), (AT, True)])
def test_a_task_is_terminal_once_it_has_its_end(ended: datetime | None, is_terminal: bool) -> None:
    assert task(completed_at=ended).is_terminal is is_terminal


def test_a_record_has_no_field_the_design_does_not_name() -> None:
    with pytest.raises(ValidationError, match="extra"):
        SessionRecord.model_validate(
            {
                "scope": Scope("desktop", "s1"),
                "opened_at": "2024-05-01T10:00:00.000Z",
                "closed_at": None,
                "live_tasks": 0,
                "surprise": 1,
            }
        )


def test_a_limit_is_not_negative() -> None:
    with pytest.raises(ValidationError):
        TaskFilter(limit=-1)


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "abandoned"])
def test_four_states_are_terminal(state: str) -> None:
    assert TaskState(state).is_terminal


@pytest.mark.parametrize("state", ["pending", "running", "waiting", "cancel_requested"])
def test_four_states_are_live(state: str) -> None:
    assert not TaskState(state).is_terminal


# --- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (TaskState, "pending running waiting cancel_requested completed failed cancelled abandoned"),
        (TaskKind, "monitor subagent observer other"),
        (TaskMode, "managed external hidden"),
        (Recovery, "rerun owner_bound external"),
        (Verdict, "applied unchanged superseded"),
        (StopReason, "cancel detach timeout stale"),
        (CancelPolicy, "cooperative abort_local"),
        (ClosePolicy, "keep cancel transfer"),
        (HandleRole, "owner observer"),
        (OwnerEnd, "closed died abandoned"),
        (
            EventType,
            "registered claimed started reattached released retry_scheduled state_changed progress saved signalled "
            "cancel_requested callback_failed completed failed cancelled abandoned transferred noted pruned "
            "session_opened session_closed handed_off",
        ),
    ],
)
def test_the_words_are_those_of_the_contract(words: type[TaskState], expected: str) -> None:
    assert [str(word) for word in words] == expected.split()


# --- the package ----------------------------------------------------------------------------------------------------


def test_all_names_are_sorted_and_given_once() -> None:
    assert lash_store.__all__ == sorted(set(lash_store.__all__))


@pytest.mark.parametrize("name", lash_store.__all__)
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(lash_store, name).__name__ == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Nonesuch"):
        _ = lash_store.Nonesuch  # type: ignore[attr-defined]


def test_every_error_is_public() -> None:
    errors = {
        name
        for name, value in vars(lash_store.errors).items()
        if isinstance(value, type) and issubclass(value, lash_store.StoreError)
    }

    assert errors <= set(lash_store.__all__)


def test_the_version_is_the_distributions() -> None:
    assert lash_store.__version__ == importlib.metadata.version("lash-store")


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "sqlalchemy", "alembic", "pydantic", "aiosqlite"
    script = f"import sys, lash_store; print([name for name in {heavy!r} if name in sys.modules])"

    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert shown.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "error",
    [
        errors.TaskNotFound("no", task_id="t"),
        errors.TaskFailed("no", task_id="t", failure=Failure(type="E", message="m")),
        errors.TaskCancelled("no", task_id="t", reason="why"),
        errors.HandleNotVisible("no", missing=("a", "b")),
        errors.StorageBusy("no"),
        errors.InvalidId("no"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_can_be_copied_and_sent_to_another_process(error: errors.StoreError, way: Any) -> None:
    again = way(error)

    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_time_is_written_as_the_file_writes_it() -> None:
    at = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)

    written = Evidence(owner_id=1, end="died", found_at=at).model_dump(mode="json")

    assert written["found_at"] == "2026-01-02T03:04:05.678Z"
    assert Evidence.model_validate(written).found_at == at.replace(microsecond=678_000)
