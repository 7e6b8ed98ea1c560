"""Owns the command: ``python -m benchmarks`` measures, shows and writes."""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from . import cases as cases_package
from . import machine, report
from .apart import stop_on_signals
from .measuring import Case, Way, find_case
from .running import Outcome, Step, run_all

FOLDER = Path(__file__).parent
ORDER = (
    "lifecycle", "steps", "recovery", "cancel", "across", "history", "live", "events", "writers", "idle", "imports", "size",
)  # fmt: skip
QUICK_SCALE = 0.1
HELP = """
Measures what lash_store costs beside what a user would take instead, all on this machine and in this run, and says of
each goal whether it is met. Each way to do the work runs in a process and a folder of its own, the ways in turns; a
figure is the median of the rounds, and a ratio is one of figures of the same round.

  python -m benchmarks                       everything, some 25 minutes; writes RESULTS.md, results.json and pictures
  python -m benchmarks --list                what there is
  python -m benchmarks lifecycle --quick     one case, a tenth of the work, once: is it as I think?
  python -m benchmarks recovery --ways lash_store --rounds 3 --out before
                                             only our ways, kept to look at beside those of a change
"""
EPILOG = """
Files: a run of all there is, at full scale, writes benchmarks/RESULTS.md, benchmarks/results.json and
benchmarks/pictures/; any other run only prints, unless --out names a folder.
DBOS, Huey and uvloop run if they are installed (pip install -e '.[bench]'), and are told to be missing if not.
The work is done below the temporary folder: set TMPDIR to measure another disk.
^C ends the run, and what was measured until then is shown and written.

Exit codes: 0 all ran, 1 something failed, 2 it was called wrongly, 3 a goal was missed and --strict given,
130 stopped before its end.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    names = _names()
    if unknown := [name for name in chosen.cases if name not in names]:
        parser.error(f"there is no case {', '.join(unknown)}: one of {', '.join(names)}")
    cases, broken = _load(list(dict.fromkeys(chosen.cases)) or names)
    if chosen.list:
        return _list(cases, broken)
    if chosen.again is not None:
        try:
            run = report.restored(json.loads(chosen.again.read_text()), cases)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{chosen.again} cannot be read as a results.json: {error!r}")
        return _show(run, chosen, chosen.out)
    outcomes = _outcomes(list(cases.values()), chosen.ways)
    if not any(outcome.is_chosen(way) for outcome in outcomes for way in outcome.case.ways) and not broken:
        parser.error(f"no way is called like {' or '.join(chosen.ways)}")
    rounds = chosen.rounds or (1 if chosen.quick else 5)
    scale = chosen.scale or (QUICK_SCALE if chosen.quick else 1.0)
    is_all = not chosen.cases and not chosen.ways and scale == 1
    run, is_stopped = _measure(outcomes, broken, rounds, scale)
    code = _show(run, chosen, chosen.out or (FOLDER if is_all else None))
    return 130 if is_stopped else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=HELP, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help="which to run; all if none is named")
    add("--list", action="store_true", help="list the cases with their ways and goals, and run nothing")
    add(
        "--ways", action="append", default=[], metavar="TEXT", help="only ways with this in their name; may be repeated"
    )
    add("--rounds", type=_count, metavar="N", help="how often each way is run (5)")
    add("--scale", type=_share, metavar="X", help="how much of the work is done; the goals are meant for 1 (1)")
    add("--quick", action="store_true", help=f"one round at a scale of {QUICK_SCALE:g}")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--out", type=Path, metavar="FOLDER", help="write RESULTS.md, results.json and pictures/*.svg there")
    add("--again", type=Path, metavar="FILE", help="run nothing: show, and with --out write, what a results.json holds")
    add("--strict", action="store_true", help="exit with 3 if a goal is missed")
    return parser


def _count(said: str) -> int:
    if int(said) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(said)


def _share(said: str) -> float:
    if not 0 < float(said) <= 1000:
        raise argparse.ArgumentTypeError("more than 0")
    return float(said)


def _names() -> list[str]:
    found = {module.name for module in pkgutil.iter_modules(cases_package.__path__) if not module.name.startswith("_")}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def _load(names: Sequence[str]) -> tuple[dict[str, Case], dict[str, str]]:
    cases, broken = {}, {}
    for name in names:
        try:
            cases[name] = find_case(name)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}"
    return cases, broken


def _list(cases: dict[str, Case], broken: dict[str, str]) -> int:
    for case in cases.values():
        print(f"{case.name}\n    {case.title}")
        print(f"    ways: {'; '.join(way.name for way in case.ways)}")
        for goal in case.goals:
            print(f"    goal: {goal.text} {report.wanted(goal)}")
    for name, why in broken.items():
        print(f"{name}\n    cannot be loaded: {machine.harmless(why)}")
    return 1 if broken else 0


def _outcomes(cases: Sequence[Case], words: Sequence[str]) -> list[Outcome]:
    def is_chosen(way: Way) -> bool:
        return not words or any(word.lower() in way.name.lower() for word in words)

    return [Outcome(case, is_chosen=is_chosen, is_whole=all(map(is_chosen, case.ways))) for case in cases]


def _measure(outcomes: Sequence[Outcome], broken: dict[str, str], rounds: int, scale: float) -> tuple[report.Run, bool]:
    """Run all; say whether it was stopped before its end."""
    date, described, began = datetime.now(UTC).date().isoformat(), machine.describe(), time.monotonic()
    progress, is_stopped = _Progress(rounds), False
    try:
        run_all(outcomes, rounds, scale, progress)
    except KeyboardInterrupt:
        is_stopped = True
    progress.end("stopped" if is_stopped else "done")
    return report.Run(date, described, rounds, scale, outcomes, broken, time.monotonic() - began), is_stopped


class _Progress:
    """Says on standard error what runs: in a terminal in one line, else in a line each."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._is_live = sys.stderr.isatty()

    def __call__(self, step: Step, left: float | None) -> None:
        said = f"round {step.round + 1} of {self._rounds} · {step.outcome.case.name}: {step.way.name}"
        self._say(said if left is None else f"{said} · about {_span(left)} left")

    def end(self, said: str) -> None:
        self._say(said)
        if self._is_live:
            sys.stderr.write("\n")

    def _say(self, said: str) -> None:
        sys.stderr.write(f"\r\x1b[K{said[:118]}" if self._is_live else f"{said}\n")
        sys.stderr.flush()


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(seconds, 1):.0f} s"


def _show(run: report.Run, chosen: argparse.Namespace, folder: Path | None) -> int:
    if folder is not None:
        files = report.write(run, folder)
        print(f"written: {files[0]}, {files[1]} and {len(files) - 2} pictures", file=sys.stderr)
    if chosen.json:
        print(json.dumps(report.as_json(run), indent=1))
    else:
        console = Console()
        if not console.is_terminal:
            console = Console(width=140)
        report.in_terminal(run, console)
    if run.has_failed:
        return 1
    return 3 if chosen.strict and any(verdict.is_met is False for _, verdict in run.verdicts()) else 0


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
