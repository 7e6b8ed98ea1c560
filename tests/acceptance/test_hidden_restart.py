"""Hidden work and its failures across SIGKILL and between processes: told at least once, and to each who waited."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lash_store import TaskKind, TaskState, TaskStore
from tests.acceptance import hidden_programs
from tests.acceptance.processes import Worker
from tests.runtime.support import RUNTIME, rows


@pytest.fixture
def settled(start: Callable[..., Worker], path: Path) -> Callable[[], list[list[Any]]]:
    """Wait for hidden work in a process of its own, and return all it was told."""

    def settle() -> list[list[Any]]:
        worker = start(hidden_programs.settle, str(path))
        worker.wait_for("closed")
        said = worker.join()
        return [words for words in said if words[0] not in {"body", "closed"}]

    return settle


def unread(path: Path) -> int:
    """Return how many outcomes nobody was handed."""
    return int(rows(path, "SELECT count(*) AS n FROM handles WHERE read_at IS NULL")[0]["n"])


CALM = [["await_hidden", None], ["await_background_work", True], ["await_background_work", False], ["live", 0]]
"""What is said once there is nothing to be told: the session takes its state up, once."""


def test_failures_are_told_again_to_the_next_if_who_was_told_died_of_it(
    start: Callable[..., Worker], path: Path, settled: Callable[[], Any]
) -> None:
    first = start(hidden_programs.die_when_told, str(path))
    first.wait_for("told", ["one", "two"])
    first.join()
    assert first.exit_code == -9
    assert unread(path) == 2

    assert settled() == [["sync_needed", True], ["await_hidden", ["one", "two"]], *CALM]

    assert unread(path) == 0
    assert settled()[:2] == [["sync_needed", False], ["await_hidden", None]]


def test_a_failure_is_told_again_if_one_of_two_who_waited_died_untold(
    start: Callable[..., Worker], path: Path, settled: Callable[[], Any]
) -> None:
    first = start(hidden_programs.die_when_the_first_was_told, str(path))
    first.wait_for("told", ["one"], False)
    first.join()
    assert unread(path) == 2

    # the body that died with its process is a failure as well
    assert settled() == [["sync_needed", True], ["await_hidden", ["abandoned: died", "one"]], *CALM]


def test_a_hidden_coroutine_of_a_killed_process_is_abandoned_and_told_once(
    start: Callable[..., Worker], path: Path, settled: Callable[[], Any]
) -> None:
    first = start(hidden_programs.hide_and_stay, str(path), "bare")
    first.wait_for("body")
    first.kill()

    assert settled() == [["sync_needed", True], ["await_hidden", ["abandoned: died"]], *CALM]

    assert settled()[:2] == [["sync_needed", False], ["await_hidden", None]]


def test_hidden_work_of_a_killed_process_runs_again_and_is_waited_for(
    start: Callable[..., Worker], path: Path, settled: Callable[[], Any]
) -> None:
    first = start(hidden_programs.hide_and_stay, str(path), "stay")
    first.wait_for("body")
    first.kill()

    assert settled() == [["sync_needed", True], ["await_hidden", None], *CALM]

    assert rows(path, "SELECT state, attempt, result, mode FROM tasks") == [
        {"state": "completed", "attempt": 2, "result": "2", "mode": "hidden"}
    ]


async def test_of_two_processes_that_wait_each_is_told_everything_and_nothing_later(
    start: Callable[..., Worker], path: Path
) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        session = await store.session("s1")
        for gate in ("go", "all here", "all told"):
            await session.register(gate, TaskKind.OTHER)
        both = [start(hidden_programs.wait_beside, str(path)) for _ in range(2)]
        for worker in both:
            await worker.says("hidden")
        await session.complete("all here", TaskState.COMPLETED)
        for worker in both:
            await worker.says("waiting")

        await session.complete("go", TaskState.COMPLETED)

        everything = sorted(f"process {worker.pid}" for worker in both)
        for worker in both:
            await worker.says("told", everything)
        await session.complete("all told", TaskState.COMPLETED)
        for worker in both:
            await worker.says("told later", [])
            worker.join()
        await session.await_hidden()
