"""Every public entry, given odd values: it does what it should or raises what it may, and the file is as it was."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from lash_store import InvalidArguments, InvalidId, SessionError, TaskNotFound, TaskStore, UnknownSession
from tests.fuzz.values import ENTRIES, LEFT_OUT, Call, Stage, calls, entry_names
from tests.seeds import seed_of

SEED = seed_of("FUZZ_SEED")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 50)


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[asyncio.Runner, Stage]]:
    # odd paths are names in the folder they are given in
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.long
@pytest.mark.timeout(120 + EXAMPLES)
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


@pytest.mark.parametrize(
    "entry",
    [
        ("context.transact", ("name", "hostile"), ("fn", "zero")),
        ("context.step", ("name", "hostile"), ("fn", "zero")),
        ("context.step", ("name", "hostile"), ("at_most_once", "True"), ("max_attempts", "2**31")),
        ("session.register", ("id", "hostile"), ("cancel", "zero")),
    ],
    ids=lambda entry: f"{entry[0]} {entry[-1][0]}",
)
def test_a_refusal_shows_a_name_that_cannot_be_shown(
    stage: tuple[asyncio.Runner, Stage], entry: tuple[Any, ...]
) -> None:
    runner, made = stage
    outcome = runner.run(made.try_call(Call(entry[0], entry[1:])))
    assert outcome in {"InvalidArguments", "InvalidId", "ValueError"}


ODD: tuple[Any, ...] = ("x", float("nan"), object(), b"1", [], True)


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
async def test_a_close_with_an_odd_time_out_closes_nothing(tmp_path: Path, odd: Any) -> None:
    store = TaskStore(tmp_path / "agent.db", runtime="desktop")
    async with store:
        session = await store.session("s1")
        with pytest.raises(ValueError, match="timeout must be"):
            await session.close(timeout=odd)
        with pytest.raises(ValueError, match="timeout must be"):
            await store.close(odd)
        assert [one.closed_at for one in await store.sessions()] == [None]


@pytest.mark.long
@pytest.mark.parametrize(
    "odd",
    [7, b"x", object(), [], "", "nobody", "a:b", "s1"],
    ids=lambda odd: type(odd).__name__ if type(odd) is object else repr(odd),
)
async def test_a_close_with_an_odd_successor_closes_nothing(tmp_path: Path, odd: Any) -> None:
    async with TaskStore(tmp_path / "agent.db", runtime="desktop") as store:
        session = await store.session("s1")
        with pytest.raises((InvalidId, UnknownSession, SessionError)):
            await session.close(successor=odd)
        assert [one.closed_at for one in await store.sessions()] == [None]


@pytest.mark.parametrize(
    "odd",
    [None, "true", {"id": "x", "command": ["true"]}, object(), 7],
    ids=lambda odd: type(odd).__name__ if type(odd) is object else repr(odd),
)
async def test_what_is_no_spec_starts_no_monitor(tmp_path: Path, odd: Any) -> None:
    async with TaskStore(tmp_path / "agent.db", runtime="desktop") as store:
        session = await store.session("s1")
        with pytest.raises(InvalidArguments, match="MonitorSpec"):
            await session.start_monitor(odd)
        assert await store.list() == []


async def _told_later(*_: object) -> None:
    raise AssertionError("nobody waits for this")


@pytest.mark.parametrize("odd", [0, "x", [], _told_later], ids=["int", "str", "list", "coroutine function"])
async def test_what_cannot_be_told_of_progress_is_refused_before_anything_is_done(tmp_path: Path, odd: Any) -> None:
    path, copy = tmp_path / "agent.db", tmp_path / "copy.db"
    async with TaskStore(path, runtime="desktop") as store:
        session = await store.session("s1")
        handle = await session.spawn(_soon(), id="done")
        await handle
        await store.backup(tmp_path / "good.db")
        for call in (
            store.prune(progress=odd, older_than=0, unread=True),
            store.check(progress=odd, repair=True),
            store.backup(copy, progress=odd),
            TaskStore.restore(tmp_path / "good.db", tmp_path / "new.db", progress=odd),
        ):
            with pytest.raises(TypeError, match="progress must be a plain function"):
                await call
        assert [one.id for one in await store.list()] == ["done"]
        assert sorted(one.name for one in tmp_path.glob("*.db")) == ["agent.db", "good.db"]


async def _soon() -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize(
    "odd", [-(2**63) - 1, 2**63, 10**400, 0, -1, "\ud800", None, "1", [], 1.5, 1.0], ids=lambda odd: ascii(odd)[:24]
)
async def test_what_is_no_number_of_a_task_is_a_task_that_is_not_there(tmp_path: Path, odd: Any) -> None:
    async with TaskStore(tmp_path / "agent.db", runtime="desktop") as store:
        await (await store.session("s1")).spawn(_soon(), id="one")
        with pytest.raises(TaskNotFound, match="is not in this file"):
            await store.steps(odd)
        with pytest.raises(TaskNotFound, match="is not in this file"):
            await store.updates(odd)
