"""A short soak with leaks planted, each of which is found; and the rule that says what is flat, on series that were made up."""

from __future__ import annotations

import math
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.seeds import seed_of
from tests.soak.__main__ import CAUGHT_BY
from tests.soak.flat import WINDOWS, Limit, Samples, back_to_base, judge, slope, windows, within
from tests.soak.lives import LEAKS
from tests.soak.measures import MEASURES, verdicts
from tests.soak.pictures import PICTURES, write
from tests.soak.running import Soak, in_use, kept

HOUR = 3600.0
SEED = str(seed_of("SOAK_SEED"))


def series(*, rise: float = 0.0, noise: float = 0.02, warm: float = 0.0, step: float = 0.0, seed: int = 1) -> Samples:
    """Make an hour's samples around 100: *rise* over the hour, *warm* before its first quarter, *step* in its last."""
    chance = random.Random(seed)
    found = []
    for second in range(int(HOUR)):
        value = 100 * (1 + chance.gauss(0, noise)) + rise * second / HOUR
        value -= warm if second < HOUR / 4 else 0
        value += step if second > HOUR * 3 / 4 else 0
        found.append((float(second), value))
    return found


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_flat(seed: int) -> None:
    assert judge(series(noise=0.1, seed=seed), HOUR, Limit(0.05, 0)).is_flat


def test_what_rises_more_than_is_allowed_is_not_flat() -> None:
    verdict = judge(series(rise=10), HOUR, Limit(0.05, 0))

    assert not verdict.is_flat
    assert verdict.rise == pytest.approx(7.5, abs=0.5)
    assert "slope" in verdict.why


def test_what_rises_less_is_flat() -> None:
    assert judge(series(rise=4), HOUR, Limit(0.05, 0)).is_flat
    assert judge(series(rise=10), HOUR, Limit(0.05, 9)).is_flat


def test_what_falls_is_flat() -> None:
    assert judge(series(rise=-50), HOUR, Limit(0.05, 0)).is_flat


def test_a_rise_in_the_warm_up_is_flat() -> None:
    assert judge(series(warm=60), HOUR, Limit(0.05, 0)).is_flat


def test_a_step_in_the_last_quarter_is_not_flat() -> None:
    verdict = judge(series(step=8), HOUR, Limit(0.05, 0))

    assert not verdict.is_flat
    assert verdict.ratio == pytest.approx(1.08, abs=0.01)


def test_a_few_wild_windows_are_flat() -> None:
    wild = [(at, value * 20 if 2000 < at < 2300 else value) for at, value in series()]

    assert judge(wild, HOUR, Limit(0.05, 0)).is_flat


def test_a_tail_that_grows_under_a_steady_middle_is_not_flat() -> None:
    samples = [(at, value + at / 20 if int(at) % 40 == 0 else value) for at, value in series()]

    assert judge(samples, HOUR, Limit(0.5, 0)).is_flat
    assert not judge(samples, HOUR, Limit(0.5, 0, "p99")).is_flat


def test_a_run_that_says_too_little_is_not_flat() -> None:
    assert "windows" in judge([], HOUR, Limit(0.05, 0)).why
    assert "windows" in judge([(at, value) for at, value in series() if at < 2700], HOUR, Limit(0.05, 0)).why


def test_the_slope_is_the_median_of_all_pairs() -> None:
    assert slope([(0, 0), (1, 2), (2, 4), (3, 600)]) == pytest.approx(100.0, abs=99)
    assert slope([(0, 0), (1, 2), (2, 4), (3, 6), (4, -90)]) == pytest.approx(2.0)


def test_a_window_without_a_value_is_left_out() -> None:
    assert windows([(0.0, 1.0), (10.0, 3.0)], 10.0) == [(10 / 64, 1.0), (10 * 63 / 64, 3.0)]
    assert len(windows(series(), HOUR)) == WINDOWS


def test_what_is_counted_at_rest_must_come_back_to_its_base() -> None:
    steady = [(at * 100.0, 20.0 + at % 2) for at in range(36)]
    leaked = [(at, value + (at > 3000)) for at, value in steady]

    assert back_to_base(steady, HOUR).is_flat
    assert not back_to_base(leaked, HOUR).is_flat
    assert back_to_base(leaked, HOUR, slack=1).is_flat
    assert not back_to_base(steady[:9], HOUR).is_flat


def test_what_has_a_bound_is_never_more() -> None:
    assert within([(0, 1.0), (1, 64.0)], 64).is_flat
    assert not within([(0, 65.0), (1, 1.0)], 64).is_flat
    assert not within([], 64).is_flat


def test_nothing_measured_is_not_flat() -> None:
    assert not any(verdict.is_flat for _, verdict in verdicts({}, HOUR))


# --- a short run ----------------------------------------------------------------------------------------------------


def test_every_leak_is_found_and_nothing_is_lost(tmp_path: Path) -> None:
    print(f"seed {SEED}: python -m tests.soak --hours 0.01 --leak --seed {SEED}")
    (tmp_path / "run").mkdir()
    soak = Soak(
        tmp_path / "run", seed=SEED, seconds=2.0, rest=0.45, leak=LEAKS, leak_every=0.04, life=(0.3, 1.0), sample=0.03
    )
    found = soak.run()

    assert found.broken == []
    assert found.judged >= 4
    judged = {measure.name: verdict for measure, verdict in verdicts(found.samples, found.seconds)}
    # of so short a run, only what is counted at rest, and what is sampled often, says anything
    expected = {name for leak in LEAKS for name in CAUGHT_BY[leak]} - {
        "objects at rest",
        "traced memory at rest",
        "tasks",
        "-wal in use",
    }
    assert {name for name in expected if judged[name].is_flat} == set()
    assert judged["children at rest"].is_flat, judged["children at rest"].why
    assert judged["-wal, its size at any time"].is_flat
    # in what was not planted, it is not blind either
    assert {name for name in found.sometimes if "killed" in name}
    assert found.acknowledged.total() > 20
    pictures = write(found.samples, found.seconds, tmp_path)
    assert {path.stem for path in pictures} >= set(PICTURES) - {"latency", "latency-p99"}


def test_a_leak_is_named_by_measures_there_are() -> None:
    names = {measure.name for measure in MEASURES}

    assert set(CAUGHT_BY) == set(LEAKS)
    assert {name for caught in CAUGHT_BY.values() for name in caught} <= names
    assert math.isinf(judge([(at, at > 3000) for at, _ in series()], HOUR, Limit(0, 0)).ratio)


def test_events_of_sessions_are_not_taken_for_what_grows(tmp_path: Path) -> None:
    def grown(sessions: int) -> float:
        with closing(sqlite3.connect(tmp_path / f"{sessions}.db")) as db:
            for table in ("tasks", "steps", "handles", "signals", "inbox", "updates"):
                db.execute(f"CREATE TABLE {table} (x)")
            for table in ("tombstones", "owners", "sessions", "handoffs", "campaign_effects", "ballast"):
                db.execute(f"CREATE TABLE {table} (x)")
            db.execute(
                "CREATE TABLE events (seq INTEGER PRIMARY KEY, scope, task_seq, data, type, at, from_scope, task_id)"
            )
            db.execute("CREATE INDEX events_task ON events (task_seq)")
            for n in range(sessions * 3):
                # two of a task to each of a session, and all of tasks but the newest go
                row = (n, "desktop:s1", None if n % 3 == 0 else n, "{}", "session_closed", "2026-01-01T00:00:00.000Z")
                db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, 'desktop:s2', 'x')", row)
            db.execute("DELETE FROM events WHERE task_seq < ?", (sessions * 3 - 300,))
            if "file without what stays" not in (found := kept(db)):
                pytest.skip("this SQLite is built without dbstat")
            return found["file without what stays"]

    assert grown(40_000) < grown(2_000) + 0.3


def test_a_wal_that_began_anew_is_as_long_as_what_was_written_since(tmp_path: Path) -> None:
    path = tmp_path / "some.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL").fetchall()
        db.execute("PRAGMA wal_autocheckpoint=0").fetchall()
        db.execute("CREATE TABLE much (bytes)")
        db.execute("INSERT INTO much VALUES (zeroblob(3000000))")
        size = Path(f"{path}-wal").stat().st_size / 2**20
        before = in_use(Path(f"{path}-shm"))
        db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        db.execute("INSERT INTO much VALUES (1)")
        after = in_use(Path(f"{path}-shm"))

    assert before == pytest.approx(size, abs=0.001)
    assert after is not None
    assert 0 < after < 0.05
    assert in_use(Path(f"{path}-shm")) == 0
