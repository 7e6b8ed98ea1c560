"""The example of the README does what it says: killed after any step and run again, it comes to the same end."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent_session.py"

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


@pytest.mark.parametrize("die_after", [None, 7])
def test_killed_after_a_step_and_run_again_it_comes_to_the_same_end(tmp_path: Path, die_after: int | None) -> None:
    if die_after is not None:
        live(tmp_path, die_after=die_after)

    said = live(tmp_path)

    assert ends(tmp_path) == ENDS
    for session, task, state in ENDS:
        assert any(f"{session}/{task}" in line and state in line for line in said.splitlines()), said
    assert "the sub-agent says ['which tests are slow? yes'" in said


def test_killed_again_and_again_it_comes_to_the_same_end(tmp_path: Path) -> None:
    for die_after in (1, 3, 5, 2):
        live(tmp_path, die_after=die_after)

    live(tmp_path)

    assert ends(tmp_path) == ENDS
