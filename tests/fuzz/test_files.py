"""A few damaged files of the campaign, of another seed each time; and that the campaign sees what it looks for."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lash_store import migrate
from tests.fuzz import campaign, trial
from tests.fuzz.files import KINDS, Case
from tests.fuzz.seeds import NAME
from tests.fuzz.trial import Trial
from tests.seeds import seed_of

ROOT = Path(__file__).parents[2]
SEED = seed_of("FUZZ_SEED")
FILES = int(os.environ.get("FUZZ_FILES") or 4)


def test_a_few_damaged_files_are_opened_or_refused(tmp_path: Path) -> None:
    first = random.Random(SEED).randrange(10**6)
    print(f"FUZZ_SEED={SEED} FUZZ_FILES={FILES}")
    command = [sys.executable, "-m", "tests.fuzz", "--seed", str(SEED), "--first", str(first), "--files", str(FILES)]

    done = subprocess.run(
        [*command, "--json", "--keep", str(tmp_path / "kept")],
        capture_output=True, text=True, timeout=100, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["files"] == FILES
    assert told["sometimes"]["worked"] + told["sometimes"]["refused"] > FILES


def test_a_file_that_was_kept_is_opened_again_where_one_stands(tmp_path: Path) -> None:
    kept = tmp_path / "kept" / "1-2"
    kept.mkdir(parents=True, mode=0o700)
    migrate.prepare(kept / NAME)
    command = [sys.executable, "-m", "tests.fuzz", "--ways", "look", "--again"]
    given: Any = {
        "capture_output": True, "text": True, "timeout": 100, "cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(ROOT)},
    }  # fmt: skip

    done = subprocess.run([*command, "kept/1-2"], **given, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 files" in done.stdout
    missing = subprocess.run([*command, "1-2"], **given, check=False)
    assert missing.returncode == 1
    assert missing.stderr.endswith("1-2 is no folder\n")


def test_every_kind_of_damage_has_its_turn() -> None:
    named = [*campaign.cases(1, 0, len(KINDS))]
    assert [case.kind for case in named] == [*KINDS]
    assert {case.origin for case in campaign.cases(1, 0, 300)} == {*campaign.ORIGINS}


def test_a_run_that_never_came_to_what_it_should_have_is_void() -> None:
    tally = campaign.Tally()
    tally.files = 1000
    tally.seen.update(campaign.SOMETIMES)
    assert tally.missing() == []
    del tally.seen["StorageCorrupt"]
    assert tally.missing() == ["StorageCorrupt"]


# --- what the trial must see ----------------------------------------------------------------------------------------


def _scribble(trial: Trial) -> None:
    trial.path.write_bytes(trial.path.read_bytes() + b"x")


def _reach_out(trial: Trial) -> None:
    (trial.path.parent.parent / "outside" / "canary").write_text("was here")


def _leave_a_file(trial: Trial) -> None:
    trial.path.with_name("left").touch()


def _leave_it_open(trial: Trial) -> None:
    os.dup(os.open(trial.path, os.O_RDONLY))


def _raise_plainly(trial: Trial) -> None:
    with closing(sqlite3.connect(trial.path)) as connection:
        connection.execute("SELECT * FROM nowhere")


def _crash(trial: Trial) -> None:
    os.abort()


def _blow_up(trial: Trial) -> None:
    bytearray(trial_memory())


def trial_memory() -> int:
    """Return more than a trial may have."""
    return trial.MEMORY * 2


SINS = {
    "changed": _scribble,
    "outside of the folder changed": _reach_out,
    "made ['left']": _leave_a_file,
    "left open": _leave_it_open,
    "OperationalError": _raise_plainly,
    "crashed: signal 6": _crash,
    "memory blew up": _blow_up,
}


@pytest.mark.long
@pytest.mark.parametrize(("seen", "sin"), SINS.items(), ids=SINS.keys())
def test_a_way_that_sins_is_seen(seen: str, sin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, here = tmp_path / "source", tmp_path / "here"
    source.mkdir()
    here.mkdir()
    with closing(sqlite3.connect(source / "agent.db")) as connection:
        connection.execute("CREATE TABLE t (a)")
    monkeypatch.setitem(trial.WAYS, "read", sin)

    answers = campaign._in_a_process(None, here, {}, ["read"], source)

    assert any(seen in wrong for answer in answers for wrong in answer["wrong"]), answers


def test_a_hang_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, here = tmp_path / "source", tmp_path / "here"
    source.mkdir()
    here.mkdir()
    (source / "agent.db").touch()
    monkeypatch.setattr(campaign, "SECONDS", 0.3)
    monkeypatch.setitem(trial.WAYS, "read", lambda _: [0 for _ in iter(int, 1)])

    answers = campaign._in_a_process(None, here, {}, ["read"], source)

    assert "hangs" in answers[-1]["wrong"][0]


def test_the_same_case_is_the_same_damage(tmp_path: Path) -> None:
    from tests.fuzz.files import build

    seed = tmp_path / "seed"
    seed.mkdir()
    with closing(sqlite3.connect(seed / "agent.db")) as connection:
        connection.execute("CREATE TABLE t (a)")
    made = []
    for name in "ab":
        folder = tmp_path / name
        folder.mkdir()
        path, _ = build(Case(3, 5, "closed", "cell_bits"), folder, {"closed": seed})
        made.append(path.read_bytes())
    assert made[0] == made[1] != (seed / "agent.db").read_bytes()
