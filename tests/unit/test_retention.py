"""Rules of what may be said about keeping and pruning."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from pydantic import ValidationError

from lash_store import PruneReport, Retention, Scope, TaskState
from tests.unit.cases import for_each

FULL: dict[str, Any] = {
    "older_than": timedelta(days=1),
    "keep_last": 3,
    "states": {"completed", TaskState.FAILED},
    "sessions": ["desktop:s1", Scope("desktop", "s2")],
    "before_cursor": 7,
    "unread": True,
    "every": 60.0,
}


def test_without_a_limit_everything_finished_and_read_may_go_once_an_hour() -> None:
    plain = Retention()

    assert plain.model_dump(exclude={"every", "unread"}) == dict.fromkeys(
        ("older_than", "keep_last", "states", "sessions", "before_cursor")
    )
    assert (plain.unread, plain.every) == (False, 3600.0)


def test_sessions_and_states_are_read_from_their_text() -> None:
    full = Retention.of(**FULL)

    assert full.sessions == {Scope("desktop", "s1"), Scope("desktop", "s2")}
    assert full.states == {TaskState.COMPLETED, TaskState.FAILED}


def test_an_age_may_be_said_in_seconds() -> None:
    assert Retention.of(older_than=1.5) == Retention(older_than=timedelta(seconds=1.5))


def test_what_is_kept_is_read_back_from_its_own_json() -> None:
    full = Retention.of(**FULL)

    assert Retention.model_validate_json(full.model_dump_json()) == full


def test_it_is_not_changed_once_it_was_said() -> None:
    with pytest.raises(ValidationError):
        Retention().keep_last = 3  # type: ignore[misc]


@for_each(
    ("name", "value"),
    [
        ("older_than", 0),
        ("older_than", timedelta(0)),
        ("older_than", 1e10),
        ("keep_last", 0),
        ("keep_last", 2**31),
        ("states", []),
        ("states", [state for state in TaskState if state.is_terminal]),
        ("sessions", ()),
        ("before_cursor", 0),
        ("before_cursor", 2**63 - 1),
        ("every", 1),
        ("every", 1e10),
    ],
)
def test_the_edges_are_taken(name: str, value: Any) -> None:
    Retention.of(**{name: value})


@for_each(
    ("name", "value"),
    [
        ("older_than", -1),
        ("older_than", timedelta(microseconds=-1)),
        ("older_than", timedelta.max),
        ("older_than", 1.1e10),
        ("older_than", float("nan")),
        ("older_than", float("inf")),
        ("older_than", "soon"),
        ("older_than", []),
        ("keep_last", -1),
        ("keep_last", 2**31 + 1),
        ("keep_last", 1.5),
        ("keep_last", "3"),
        ("keep_last", True),
        ("states", "completed"),
        ("states", ["running"]),
        ("states", {TaskState.COMPLETED, TaskState.PENDING}),
        ("states", ["gone"]),
        ("states", 7),
        ("sessions", "desktop:s1"),
        ("sessions", ["no scope"]),
        ("sessions", [7]),
        ("sessions", [["desktop:s1"]]),
        ("sessions", 7),
        ("before_cursor", -1),
        ("before_cursor", 2**63),
        ("before_cursor", 1.0),
        ("before_cursor", True),
        ("unread", "perhaps"),
        ("every", 0.9),
        ("every", -1),
        ("every", float("nan")),
        ("every", float("inf")),
        ("every", None),
        ("keep_first", 3),
    ],
)
def test_what_has_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Retention.of(**{name: value})


def test_a_live_state_is_named_in_the_refusal() -> None:
    with pytest.raises(ValueError, match=r"pending, running is live, and never pruned"):
        Retention(states=frozenset({TaskState.RUNNING, TaskState.FAILED, TaskState.PENDING}))


def test_a_report_begins_with_nothing() -> None:
    assert set(PruneReport().model_dump().values()) == {0}
