"""The example of the README does what it says: killed after any step and run again, it comes to the same end."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
EXAMPLE = EXAMPLES / "agent_session.py"

ENDS = [
    ("build", "ci-17", "completed"),
    ("build", "index", "completed"),
    ("build", "research", "completed"),
    ("plan", "typing", "cancelled"),
    ("research", "look_up", "completed"),
    ("research", "look_up", "completed"),
    ("research", "look_up", "completed"),
]


def live(folder: Path, *, die_after: int | None = None) -> str:
    """Run the example once more in its folder, and return what it says."""
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--dir", str(folder), "--pace", "0.01"]
    if die_after is not None:
        command += ["--die-after", str(die_after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if die_after is None else -signal.SIGKILL), done.stderr
    return done.stdout


def ends(folder: Path) -> list[tuple[str, str, str]]:
    """Read how the listed work has ended, with plain `sqlite3`."""
    with closing(sqlite3.connect(f"file:{folder / 'agent.db'}?mode=ro", uri=True)) as connection:
        rows = connection.execute(
            "SELECT s.session_id, iif(t.id LIKE 'look_up-%', 'look_up', t.id), t.state FROM tasks AS t "
            "JOIN sessions AS s ON s.scope = t.scope WHERE t.mode <> 'hidden' ORDER BY 1, 2"
        ).fetchall()
    return [(session, task, state) for session, task, state in rows]


@pytest.mark.long
@pytest.mark.parametrize("die_after", [None, 7])
def test_killed_after_a_step_and_run_again_it_comes_to_the_same_end(tmp_path: Path, die_after: int | None) -> None:
    if die_after is not None:
        live(tmp_path, die_after=die_after)

    said = live(tmp_path)

    assert ends(tmp_path) == ENDS
    for session, task, state in ENDS:
        assert any(f"{session}/{task}" in line and state in line for line in said.splitlines()), said
    assert "the sub-agent says ['which tests are slow? yes'" in said


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_the_same_end(tmp_path: Path) -> None:
    for die_after in (1, 3, 5, 2):
        live(tmp_path, die_after=die_after)

    live(tmp_path)

    assert ends(tmp_path) == ENDS


@pytest.mark.long
def test_the_session_that_watches_a_test_run_is_woken_by_the_failure_and_leaves_no_process(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / "watch_tests.py"), "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_that_two_and_two_are_four PASSED" in done.stdout
    assert (
        "stopped: monitor:tests is cancelled, reason 'seen: test_sample.py::test_that_the_answer_is_known'"
        in done.stdout
    )
    with closing(sqlite3.connect(f"file:{tmp_path / 'agent.db'}?mode=ro", uri=True)) as connection:
        [(state,)] = connection.execute("SELECT state FROM tasks").fetchall()
        [(process,)] = connection.execute(
            "SELECT json_extract(data, '$.process') FROM events WHERE json_extract(data, '$.process') IS NOT NULL"
        ).fetchall()
    assert state == "cancelled"
    word = json.loads(process)["token"].encode()
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if word in environment(pid)]


def environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""
