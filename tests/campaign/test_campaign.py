"""A short campaign: every process is killed, nothing acknowledged is lost, and a planted fault is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaign.__main__ import run
from tests.campaign.nemesis import Generation, Verdict
from tests.campaign.points import POINTS
from tests.seeds import seed_of

DATA = Path(__file__).parent.parent / "data"
SEED = str(seed_of("CAMPAIGN_SEED"))


def test_no_kill_loses_or_doubles_anything(tmp_path: Path) -> None:
    print(f"seed {SEED}: python -m tests.campaign --kills 40 --seed {SEED}")
    verdict = run(seed=SEED, kills=40, folder=tmp_path, a_file=40)
    print(dict(verdict.sometimes))
    assert verdict.broken == []
    assert sum(verdict.kills.values()) >= 40
    assert verdict.acknowledged.total() > 100
    assert verdict.judged >= 2
    # some from outside, some at named points
    assert set(verdict.kills) - set(POINTS)
    assert set(verdict.kills) & set(POINTS)


@pytest.mark.long
def test_a_file_that_is_killed_while_it_is_upgraded_is_of_one_revision(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    place = tmp_path / "old"
    place.mkdir()
    verdict = Generation(place, seed=SEED, kills=12, old=DATA / "0003.db").run()
    assert verdict.broken == []
    assert verdict.judged >= 2


def test_what_a_zombie_writes_changes_nothing(tmp_path: Path) -> None:
    print(f"seed {SEED}")
    verdict = Verdict()
    for number in range(8):
        place = tmp_path / f"zombies-{number}"
        place.mkdir()
        verdict.add(Generation(place, seed=f"{SEED}/{number}", kills=8, zombies=0.7).run())
        assert verdict.broken == []
        if verdict.sometimes["a zombie woke after its work was taken over"] and verdict.counts["stale write refused"]:
            break
    else:
        pytest.fail(f"no zombie wrote anything: {verdict.sometimes}")


@pytest.mark.long
def test_the_campaign_finds_processes_that_acknowledge_before_they_commit(tmp_path: Path) -> None:
    verdict = run(seed="4", kills=60, folder=tmp_path, fault="acknowledges early")
    assert {promise for promise, _ in verdict.broken} & {"P1", "P4"}, verdict.broken
