"""
Plants faults in copies of the package, one at a time, and runs the quick cut of every harness against each.

  python -m tests.planted                 all faults: the command fails if one is not found
  python -m tests.planted --only 3        one of them
  python -m tests.planted --list          their names

The package as it is must pass first; each fault must turn at least one harness red.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.planted.faults import FAULTS, Fault

ROOT = Path(__file__).parent.parent.parent

HARNESSES = {
    "checker": "tests/checker",
    "campaign": "tests/campaign",
    "power": "tests/power",
    "faults": "tests/faults",
    "histories": "tests/histories",
    "model": "tests/runtime/test_model.py tests/runtime/test_model_of_two.py",
    "fuzz": "tests/fuzz",
    # what no harness has found, the other tests may
    "tests": "tests/storage/test_writer.py tests/runtime/test_transfer.py tests/storage tests/runtime",
}

_COPIED = ("lash_store", "migrations", "tests", "docs", "pyproject.toml", "alembic.ini", "README.md", "SECURITY.md")


def copy(folder: Path, fault: Fault | None) -> Path:
    """Copy the package and its tests, with a fault in it; refuse one whose text is not there once."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copyfile(source, folder / name)
    inside = folder / "lash_store" / "migrations"
    if not inside.exists():
        inside.symlink_to("../migrations")
    for edit in () if fault is None else fault.edits:
        path = folder / edit.path
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise SystemExit(
                f"{fault and fault.name}: {edit.path} has its text {text.count(edit.old)} times: mend the fault"
            )
        path.write_text(text.replace(edit.old, edit.new))
    return folder


def judge(folder: Path, harnesses: dict[str, str], *, until_red: bool) -> Iterator[tuple[str, bool, str]]:
    """Run harnesses against a copy; yield each with whether it passed, and the last it said."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, where in harnesses.items():
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *where.split(),
        ]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200, check=False
            )
            passed, said = done.returncode == 0, done.stdout
        except subprocess.TimeoutExpired:
            passed, said = False, "it did not come to an end"
        told = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        yield name, passed, (told or said.splitlines()[-1:] or [""])[0]
        if until_red and not passed:
            return


def main() -> int:
    """Plant each fault; exit with 1 if one is not found, or if the package without any does not pass."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.planted", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", type=int, metavar="N", action="append", help="plant the N-th fault (from 1); may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="list the faults and end")
    parser.add_argument("--all-harnesses", action="store_true", help="go on after the first harness that is red")
    parser.add_argument("--no-control", action="store_true", help="leave out the run without a fault")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    chosen = [(n, fault) for n, fault in enumerate(FAULTS, 1) if not options.only or n in options.only]
    if options.list:
        for number, fault in chosen:
            print(f"{number:3} {fault.name}")
        return 0
    found: dict[str, list[str]] = {}
    blind = []
    runs: list[tuple[int, Fault | None]] = [*chosen] if options.no_control else [(0, None), *chosen]
    for number, planted in runs:
        began = time.monotonic()
        name = "the package as it is" if planted is None else planted.name
        print(f"{number:3} {name}", file=sys.stderr, flush=True)
        red = []
        with tempfile.TemporaryDirectory(prefix="planted-") as made:
            until_red = planted is not None and not options.all_harnesses
            for harness, passed, said in judge(copy(Path(made), planted), HARNESSES, until_red=until_red):
                print(f"      {harness:10} {'passes' if passed else 'RED'}  {said[:150]}", file=sys.stderr, flush=True)
                if not passed:
                    red.append(harness)
        print(f"      {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        found[name] = red
        if bool(red) == (planted is None):
            blind.append(name)
    if options.json:
        print(json.dumps({"found": found, "wrong": blind}))
    else:
        for name, red in found.items():
            print(f"{name:70} {', '.join(red) or 'passes'}")
    for name in blind:
        print(f"WRONG: {name}")
    return 1 if blind else 0


if __name__ == "__main__":
    sys.exit(main())
