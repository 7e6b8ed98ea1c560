"""The benchmarks as a command: what there is, a run in small, and an end before the end."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.measuring import find_case

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "benchmarks")
SMALL = ("lifecycle", "--quick", "--scale", "0.01", "--ways", "plain sqlite3", "--ways", "lash_store, 1 caller")


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TMPDIR": str(folder)}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
    )


def test_every_case_can_be_loaded_and_is_listed_with_its_goals(tmp_path: Path) -> None:
    done = run("--list", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert names[0] == "lifecycle"
    for name in names:
        case = find_case(name)
        assert case.name == name
        assert len({way.name for way in case.ways}) == len(case.ways)
        for goal in case.goals:
            assert goal.figure({}) is None
            assert f"goal: {goal.text} " in done.stdout


@pytest.mark.long
def test_a_run_in_small_writes_figures_a_page_and_pictures(tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    done = run(*SMALL, "--json", "--out", str(out), folder=work)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(work.iterdir()) == []

    written = json.loads((out / "results.json").read_text())
    assert json.loads(done.stdout) == written
    (case,) = written["cases"]
    assert case["ways"]["lash_store, 1 caller"]["rounds"][0]["per_second"] > 0
    assert {"text", "figure", "is_met"} <= case["goals"][0].keys()

    page = (out / "RESULTS.md").read_text()
    pictures = sorted(file.relative_to(out).as_posix() for file in (out / "pictures").iterdir())
    assert pictures == ["pictures/lifecycle-1.svg", "pictures/lifecycle-2.svg"]
    for picture in pictures:
        assert ElementTree.parse(out / picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f"]({picture})" in page
    assert "## Goals" in page
    assert "## The machine" in page
    for private in (str(ROOT), str(tmp_path), os.uname().nodename, getpass.getuser()):
        assert private not in page or len(private) < 5


def test_a_word_that_is_no_case_is_refused(tmp_path: Path) -> None:
    done = run("livecycle", folder=tmp_path)
    assert done.returncode == 2
    assert "there is no case livecycle: one of lifecycle" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_keeps_what_was_measured_and_leaves_nothing_running(
    tmp_path: Path, sign: signal.Signals
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    work.mkdir()
    arguments = ("lifecycle", "--scale", "0.01", "--rounds", "1000", "--ways", "plain sqlite3", "--out", str(out))
    environment = {**os.environ, "TMPDIR": str(work)}
    with subprocess.Popen(
        [*COMMAND, *arguments], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("round 2 of 1000"):
                break
        process.send_signal(sign)
        process.stderr.read()
    assert process.returncode == 130
    written = json.loads((out / "results.json").read_text())
    assert written["cases"][0]["ways"]["plain sqlite3"]["rounds"]
    assert any("Not all of it was run" in remark for remark in written["remarks"])
    assert list(work.iterdir()) == []
