"""Every public entry, given odd values: it does what it should or raises what it may, and the file is as it was."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.values import ENTRIES, LEFT_OUT, Call, Stage, calls, entry_names

SEED = int(os.environ.get("FUZZ_SEED") or random.randrange(10**6))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 50)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[tuple[asyncio.Runner, Stage]]:
    with asyncio.Runner() as runner:
        made = Stage(tmp_path)
        runner.run(made.__aenter__())
        yield runner, made
        runner.run(made.__aexit__())


def test_every_public_method_is_tried_or_left_out_for_a_reason() -> None:
    names = entry_names()
    assert {*names} >= LEFT_OUT.keys()
    assert {*names} - LEFT_OUT.keys() == {name for name in ENTRIES if not name.startswith("new.")}
    assert len(names) > 60
    assert all(reason for reason in LEFT_OUT.values())


def test_odd_values_leave_the_file_as_it_was_or_come_back(stage: tuple[asyncio.Runner, Stage]) -> None:
    runner, made = stage
    outcomes: Counter[str] = Counter()
    print(f"FUZZ_SEED={SEED} FUZZ_EXAMPLES={EXAMPLES}")

    @seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(calls())
    def attempt(call: Call) -> None:
        outcomes[runner.run(made.try_call(call))] += 1

    attempt()

    # a run in which nothing was taken, or nothing refused, tells nothing
    assert outcomes["done"], outcomes
    assert outcomes["InvalidId"] + outcomes["ValueError"] + outcomes["TypeError"], outcomes
