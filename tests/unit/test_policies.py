"""Rules of what a program chooses once: how long between tries, what is worth one, and how much may be stored."""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import pytest
from pydantic import ValidationError

from lash_store.errors import LimitExceeded
from lash_store.policies import NO_RETRY, Backoff, Limits, RetryRule

# --- how long between tries -----------------------------------------------------------------------------------------


def without_jitter(**given: float) -> Backoff:
    return Backoff(jitter=0, **given)


def test_each_further_failure_waits_a_factor_longer() -> None:
    backoff = without_jitter(initial=2, factor=3, maximum=1000)

    assert [backoff.delay(failures) for failures in range(1, 6)] == [2, 6, 18, 54, 162]


def test_no_wait_is_longer_than_the_maximum() -> None:
    backoff = without_jitter(initial=2, factor=3, maximum=20)

    assert [backoff.delay(failures) for failures in range(1, 6)] == [2, 6, 18, 20, 20]


def test_a_maximum_below_the_first_wait_counts_from_the_first() -> None:
    assert without_jitter(initial=10, maximum=1).delay(1) == 1


@pytest.mark.parametrize("failures", [1_000, 10_000, 2**31])
@pytest.mark.parametrize("initial", [1e-300, 1.0, 1e9])
def test_a_wait_too_long_for_a_number_is_the_maximum(initial: float, failures: int) -> None:
    assert without_jitter(initial=initial, factor=1e6, maximum=300).delay(failures) == 300


def test_a_factor_of_one_waits_the_same_each_time() -> None:
    backoff = without_jitter(initial=5, factor=1, maximum=10)

    assert {backoff.delay(failures) for failures in (1, 2, 2**31)} == {5}


@pytest.mark.parametrize("failures", [1, 2, 50, 10_000])
def test_no_wait_at_all_may_be_asked_for(failures: int) -> None:
    assert Backoff(initial=0).delay(failures) == 0
    assert Backoff(maximum=0).delay(failures) == 0


@pytest.mark.parametrize("jitter", [0.25, 1.0])
@pytest.mark.parametrize("failures", [1, 4, 10_000])
def test_the_random_part_only_shortens_and_by_its_share_at_most(jitter: float, failures: int) -> None:
    whole = without_jitter(initial=4, maximum=100).delay(failures)
    backoff = Backoff(initial=4, maximum=100, jitter=jitter)

    waits = [backoff.delay(failures) for _ in range(500)]

    assert all(whole * (1 - jitter) < wait <= whole for wait in waits)
    assert len(set(waits)) > 400


@pytest.mark.parametrize(("drawn", "wait"), [(0.0, 8.0), (0.5, 6.0), (1.0, 4.0)])
def test_the_random_part_is_the_share_that_was_drawn(
    monkeypatch: pytest.MonkeyPatch, drawn: float, wait: float
) -> None:
    monkeypatch.setattr(random, "random", lambda: drawn)

    assert Backoff(initial=8, jitter=0.5).delay(1) == wait


@pytest.mark.parametrize(
    "given",
    [
        {"initial": -1},
        {"initial": math.nan},
        {"initial": math.inf},
        {"factor": 0.5},
        {"factor": math.nan},
        {"factor": math.inf},
        {"maximum": -1},
        {"maximum": math.nan},
        {"maximum": math.inf},
        {"jitter": -0.1},
        {"jitter": 1.1},
        {"jitter": math.nan},
        {"initial": "soon"},
        {"initial": None},
        {"first": 1},
    ],
    ids=repr,
)
def test_a_backoff_without_sense_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Backoff(**given)


def test_a_policy_is_not_changed_once_it_was_made() -> None:
    with pytest.raises(ValidationError):
        Backoff().initial = 2  # type: ignore[misc]


# --- what is worth another try --------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", [OSError, (OSError,), [OSError], {OSError}, iter([OSError])])
def test_one_exception_class_or_several_may_be_named(on: Any) -> None:
    rule = RetryRule.of(3, on, (), None)

    assert (rule.on, rule.never_on, rule.backoff) == ((OSError,), (), Backoff())


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (OSError(), True),
        (ConnectionResetError(), True),
        (ValueError(), True),
        (FileNotFoundError(), False),
        (KeyError(), False),
        (asyncio.CancelledError(), False),
        (SystemExit(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_exception_is_worth_a_try_by_its_class_unless_that_is_named_as_not(error: Any, wanted: bool) -> None:
    rule = RetryRule.of(3, [OSError, ValueError], FileNotFoundError, None)

    assert rule.wants(error) is wanted


def test_what_is_never_tried_again_is_so_also_below_a_class_that_is() -> None:
    rule = RetryRule.of(3, Exception, OSError, None)

    assert (rule.wants(ValueError()), rule.wants(ConnectionResetError())) == (True, False)


def test_nothing_is_tried_again_if_nothing_was_named() -> None:
    assert not RetryRule.of(3, (), (), None).wants(Exception())
    assert (NO_RETRY.max_attempts, NO_RETRY.wants(Exception())) == (1, False)


def test_a_rule_keeps_the_backoff_it_was_given() -> None:
    assert RetryRule.of(3, (), (), Backoff(initial=7)).backoff == Backoff(initial=7)


@pytest.mark.parametrize("max_attempts", [0, -1, 2**31, True, 1.0, "3", None], ids=repr)
def test_a_number_of_attempts_without_sense_is_refused(max_attempts: Any) -> None:
    with pytest.raises(ValueError, match="max_attempts"):
        RetryRule.of(max_attempts, (), (), None)


@pytest.mark.parametrize(
    "named",
    [
        "OSError",
        ["OSError"],
        OSError(),
        [OSError, OSError()],
        int,
        [object],
        None,
        3,
        BaseException,
        KeyboardInterrupt,
        asyncio.CancelledError,
        [OSError, SystemExit],
        [[OSError]],
    ],
    ids=repr,
)
@pytest.mark.parametrize("word", ["retry_on", "no_retry_on"])
def test_what_is_no_exception_class_is_refused_by_the_word_it_was_given_as(word: str, named: Any) -> None:
    given = {"on": (), "never_on": (), ("on" if word == "retry_on" else "never_on"): named}

    with pytest.raises(ValueError, match=f"^{word} names exception classes"):
        RetryRule.of(3, **given, backoff=None)


@pytest.mark.parametrize("backoff", [3, 1.5, "1", {"initial": 1}, Backoff], ids=repr)
def test_what_is_no_backoff_is_refused(backoff: Any) -> None:
    with pytest.raises(ValueError, match="backoff"):
        RetryRule.of(3, (), (), backoff)


# --- how much may be stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("x" * 12, 12), ("é" * 6, 12), ("\u2028" * 4, 12), ("\U0001f600" * 3, 12), (json.dumps("é" * 5), 32), ("", 0)],
    ids=["ascii", "two bytes each", "three", "four", "escaped", "nothing"],
)
def test_a_value_is_measured_in_bytes_and_not_in_characters(text: str, size: int) -> None:
    assert len(text.encode()) == size

    assert Limits(payload_bytes=max(1, size)).check_payload(text, "the result") is text
    if size > 1:
        with pytest.raises(LimitExceeded):
            Limits(payload_bytes=size - 1).check_payload(text, "the result")


def test_what_is_refused_is_named_with_its_size_and_the_limit() -> None:
    with pytest.raises(LimitExceeded, match=r"^the checkpoint has 1,235 bytes, and the limit is 1,234: "):
        Limits(payload_bytes=1_234).check_payload("x" * 1_235, "the checkpoint")


def test_a_limit_of_none_lets_everything_in() -> None:
    text = "x" * (20 * 1024 * 1024)

    assert Limits(payload_bytes=None).check_payload(text, "the result") is text


def test_a_store_that_says_nothing_takes_values_of_16_mib_and_any_number_of_tasks() -> None:
    limits = Limits()

    assert (limits.live_tasks, limits.total_tasks) == (None, None)
    most = "x" * (16 * 1024 * 1024)
    assert limits.check_payload(most, "the result") is most
    with pytest.raises(LimitExceeded):
        limits.check_payload(most + "x", "the result")


@pytest.mark.parametrize(
    "given",
    [
        {"payload_bytes": 0},
        {"payload_bytes": -1},
        {"payload_bytes": 1.5},
        {"live_tasks": 0},
        {"total_tasks": 0},
        {"live_tasks": "many"},
        {"tasks": 3},
    ],
    ids=repr,
)
def test_limits_without_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Limits(**given)
