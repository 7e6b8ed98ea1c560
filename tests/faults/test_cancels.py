"""Every suspension of every operation is where its caller is cancelled: a seeded sample; ``python -m tests.faults`` takes all."""

from __future__ import annotations

import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checker import check
from tests.faults.cancels import cancelled_at
from tests.faults.operations import OPERATIONS, newborn
from tests.seeds import seed_of

SECONDS = 1.2
SEED = seed_of("FAULTS_SEED")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder of this module's own."""
    made = Path(tempfile.mkdtemp())
    yield made
    shutil.rmtree(made)


async def test_a_caller_cancelled_anywhere_leaves_the_whole_or_nothing(folder: Path) -> None:
    print(f"FAULTS_SEED={SEED}")
    chance, answers, wrong = random.Random(SEED), Counter[str](), list[str]()
    born = newborn(folder)
    until = time.monotonic() + SECONDS
    # on a busy machine, for as long as it takes to see what it is for
    while time.monotonic() < until or not answers["cancelled"]:
        here = Path(tempfile.mkdtemp(dir=folder))
        one = chance.choice([one for one in OPERATIONS if not one.is_slow])
        found = await cancelled_at(one, born, here, chance.randint(1, 3), chance.random() < 0.5, check)
        answers[found.answer] += 1
        wrong += [str(found)] * bool(found.wrong)
        shutil.rmtree(here)

    assert wrong == [], f"FAULTS_SEED={SEED}"
    assert answers["cancelled"], answers


async def test_a_part_of_an_effect_is_found_out(folder: Path) -> None:
    """A control: what the file says is neither of the two."""
    here = Path(tempfile.mkdtemp(dir=folder))
    [one] = [one for one in OPERATIONS if one.name == "SessionTasks.spawn"]
    torn = replace(one, absent=(1, 0, 0), whole=(1, 1, 0))

    found = await cancelled_at(torn, newborn(here), here, 1, False, check)

    assert any(wrong.startswith("torn") for wrong in found.wrong), found
