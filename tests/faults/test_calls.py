"""Every call that SQLite makes of a file fails, or is where the process is killed: a seeded sample of all operations."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.acceptance.processes import Worker, workers
from tests.faults import calls
from tests.faults.operations import OPERATIONS, newborn
from tests.power import vfs
from tests.seeds import seed_of

SECONDS = 1.2
KILLS = 3
SEED = seed_of("FAULTS_SEED")

NAMES = [one.name for one in OPERATIONS if not one.is_slow]


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Start workers that end with the test."""
    reason = vfs.available()
    if reason is not None:
        pytest.skip(reason)
    with workers() as start:
        yield start


def test_a_sample_of_failing_calls_is_answered_as_it_is_and_recovered_from(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    print(f"FAULTS_SEED={SEED}")
    born = newborn(tmp_path)
    plan = {"names": NAMES, "modes": calls.MODES, "seed": SEED, "seconds": SECONDS, "born": str(born)}
    worker = start(calls.sweep, str(tmp_path), json.dumps(plan))
    worker.wait_for("over")

    found = [words[1:] for words in worker.said if words[0] == "point"]

    assert [words for words in found if words[-1]] == [], f"FAULTS_SEED={SEED}"
    # how it is answered is another matter: an error that passes may be met by opening again
    assert Counter(words[3] for words in found), "nothing failed: this run shows nothing"


async def test_an_acknowledged_operation_that_is_not_there_is_found_out(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    """A control: killed before anything was written, and taken for acknowledged."""
    newborn(tmp_path)
    [one] = [one for one in OPERATIONS if one.name == "SessionTasks.spawn"]
    worker = start(calls.kill_at, str(tmp_path), one.name, 1)
    said = worker.join()
    assert ["answered", None] not in said, said

    wrong = await calls.judge_killed(one, tmp_path, is_answered=True)

    assert wrong == ["acknowledged and lost: (0, 0, 0)"]


async def test_a_process_killed_at_a_call_leaves_what_it_acknowledged(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    print(f"FAULTS_SEED={SEED}")
    born, chance, killed = newborn(tmp_path), random.Random(SEED), 0
    changing = [one for one in OPERATIONS if one.ask is not None and not one.alone and not one.is_slow]
    for number in itertools.count():
        if number >= KILLS and killed:
            break
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(born, folder / "newborn.db")
        one, at = chance.choice(changing), chance.randint(1, 12)
        worker = start(calls.kill_at, str(folder), one.name, at)
        said = worker.join()
        assert worker.exit_code == -signal.SIGKILL, said
        killed += ["answered", None] not in said

        wrong = await calls.judge_killed(one, folder, ["answered", None] in said)

        assert wrong == [], f"FAULTS_SEED={SEED} {one.name} at={at}"
