"""The demo as a stranger runs it: a real worker, a real SIGKILL, nothing lost, nobody left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store.cli.demo_texts import count_words, make_text, summary, whole_words

DEMO = [sys.executable, "-m", "lash_store.cli", "demo"]


def demo(tmp_path: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*DEMO, *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=60,
        check=False,
    )


def rows(db: str | Path, sql: str, *values: Any) -> list[Any]:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        return connection.execute(sql, values).fetchall()


def test_a_worker_killed_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    done = demo(tmp_path, "--tasks", "8", "--kills", "1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    figures = json.loads(done.stdout)
    assert (figures["tasks"], figures["completed"], figures["correct"], figures["lost"]) == (8, 8, 8, 0)
    assert figures["kills"] == 1
    assert figures["most_attempts"] == 2
    # a piece that was under way when the worker died is fetched again; what was saved before is not
    assert figures["pieces_repeated"] <= 8
    assert len(figures["reattach_seconds"]) == 1
    assert figures["process_start_seconds"][0] <= figures["reattach_seconds"][0] < 10.0
    again = rows(figures["db"], "SELECT task_id FROM events WHERE type = 'reattached' AND attempt = 2")
    assert len(again) == figures["reattached"] > 0
    registered = rows(figures["db"], "SELECT COUNT(*) FROM events WHERE type = 'registered'")
    assert registered == [(8,)]


@pytest.mark.long
def test_a_second_run_on_the_file_has_a_session_of_its_own(tmp_path: Path) -> None:
    db = tmp_path / "it's a demo.db"
    first, second = (demo(tmp_path, "--tasks", "1", "--kills", "0", "--json", "--db", db) for _ in range(2))
    assert (first.returncode, second.returncode) == (0, 0)
    assert len({json.loads(done.stdout)["session"] for done in (first, second)}) == 2
    assert rows(db, "SELECT completed, live FROM session_summary") == [(1, 0), (1, 0)]


def test_without_a_terminal_it_tells_the_run_in_plain_lines(tmp_path: Path) -> None:
    done = demo(tmp_path, "--tasks", "3", "--kills", "2")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    for part in ("killed with SIGKILL", "started again", "reattached after", "attempt 2, from its checkpoint at"):
        assert part in done.stdout
    closing = dict(line.strip().split("  ", 1) for line in done.stdout.splitlines() if line.startswith("  lost  "))
    assert closing["lost"].strip() == "0"
    shell = next(line for line in done.stdout.splitlines() if "session_summary" in line)
    shown = subprocess.run(shell.replace("-box ", "-readonly "), shell=True, capture_output=True, text=True, check=True)
    assert "demo:run-" in shown.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "db", [*(pytest.param(db, marks=pytest.mark.slow) for db in ("missing/demo.db", "folder")), "text.db"]
)
def test_a_file_that_cannot_be_used_is_one_clean_error(tmp_path: Path, db: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text("this is a letter, and no database at all" * 40)
    done = demo(tmp_path, "--db", tmp_path / db, "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("lash-store: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_the_worker_ends_with_its_parent(tmp_path: Path, end: signal.Signals) -> None:
    parent = subprocess.Popen(
        [*DEMO, "--tasks", "40"], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert parent.stdout is not None
    with parent.stdout:
        worker = next(int(line.split()[1]) for line in parent.stdout if line.startswith("worker "))
        with pidfd(worker) as ended:
            parent.send_signal(end)
            parent.wait(timeout=10)
            assert ended(10.0)
    assert parent.returncode == (130 if end is signal.SIGINT else -end)


@contextlib.contextmanager
def pidfd(pid: int) -> Iterator[Any]:
    """Give a function that waits for the end of a process that is not ours, at most so many seconds."""
    import select

    if not hasattr(os, "pidfd_open"):
        pytest.skip("this system cannot wait for another's child")
    descriptor = os.pidfd_open(pid)
    try:
        yield lambda timeout: bool(select.select([descriptor], [], [], timeout)[0])
    finally:
        os.close(descriptor)


def test_pieces_cut_at_white_space_count_the_same_as_the_whole() -> None:
    text = make_text(7)
    data, offset, pieces = text.encode(), 0, count_words("")
    while offset < len(data):
        fetched = data[offset : offset + 100]
        words = whole_words(fetched, is_last=offset + len(fetched) >= len(data))
        pieces += count_words(words.decode())
        offset += len(words)
    assert pieces == count_words(text)
    assert 3_000 < len(data) < 8_000
    assert summary(text, pieces)["words"] == pieces.total()
    assert make_text(7) == text != make_text(8)
