"""The research agent does what it says: killed anywhere and run again, it reads and writes everything once."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "research_agent.py"


def run(folder: Path, *options: str, killed: bool = False) -> str:
    """Run the example once more in its folder, and return what it says."""
    command = [sys.executable, "-W", "error", str(EXAMPLE), "--dir", str(folder), "--rest", "0.2", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    return done.stdout


def read(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"file:{folder / 'agent.db'}?mode=ro", uri=True)) as connection:
        return connection.execute(sql).fetchall()


def check(folder: Path, said: str) -> None:
    """Hold the end every run comes to."""
    assert "result: report.md" in said
    assert (folder / "report.md").read_text().startswith("# why do lighthouses flash?")
    assert read(folder, "SELECT name FROM sources ORDER BY name") == [("fog.txt",), ("lenses.txt",), ("lights.txt",)]
    assert read(folder, "SELECT name FROM reports") == [("report.md",)]
    assert read(folder, "SELECT DISTINCT state FROM tasks") == [("completed",)]
    assert read(folder, "SELECT count(*) FROM tasks") == [(4,)]
    assert read(folder, "SELECT count(*) FROM inbox") == [(2,)]


@pytest.mark.long
@pytest.mark.parametrize("die_after", [6, *(pytest.param(line, marks=pytest.mark.slow) for line in (3, 10))])
def test_killed_after_a_line_and_run_again_it_comes_to_the_same_end(tmp_path: Path, die_after: int) -> None:
    run(tmp_path, "--yes", "--die-after", str(die_after), killed=True)

    check(tmp_path, run(tmp_path, "--yes"))


@pytest.mark.long
def test_a_human_may_answer_from_another_process_while_nothing_runs(tmp_path: Path) -> None:
    run(tmp_path, "--die-after", "7", killed=True)
    answered = [run(tmp_path, "--answer", "yes") for _ in range(2)]

    assert [line.split(":")[0] for line in answered] == ["applied", "unchanged"]
    check(tmp_path, run(tmp_path))


@pytest.mark.long
def test_the_web_is_busy_and_no_page_is_fetched_again_once_it_came(tmp_path: Path) -> None:
    run(tmp_path, "--yes", "--die-after", "9", killed=True)
    before = (tmp_path / "web.log").read_text()
    run(tmp_path, "--yes")

    assert (tmp_path / "web.log").read_text() == before
    # three pages came, and the server refused every third request
    assert len(before.splitlines()) > 3
