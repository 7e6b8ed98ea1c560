"""Linearizability of what concurrent processes are told of tasks: the command."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from tests.histories.check import SOMETIMES, Outcome, run, shown
from tests.histories.faults import FAULTS
from tests.histories.recording import Recorder

_HELP = """\
Hammer tasks of one file from several processes at once, and check that what each caller was told is explained.

Two processes own a store of the same runtime and run bodies, the others make requests. Each task is registered, told, moved,
cancelled, given up, awaited and looked at by all of them in the same few milliseconds; every call is written down before and
after, with a clock that all processes share. Then an order of the calls is looked for that respects real time and that a small
specification of one task allows (tests/histories/specification.py), with what the system does by itself in between. Now and
then a process is killed, or closed, and replaced: what it had asked for may have happened, or not.

  python -m tests.histories --tasks 100000 --seed 1        the campaign, some 4,000 tasks a minute
  python -m tests.histories --tasks 2000 --seed 7 --json
  python -m tests.histories --tasks 2000 --seed 1 --fault loser      a control: it must fail

A task that cannot be explained is shown as the shortest timeline that still cannot, with its seed. The seed gives what is asked
for and when; how the processes meet is up to the machine, so the same seed meets a rare fault again only after some tries.
The exit code is 0 only if everything was explained, and everything in the table of what must be seen sometimes was seen.
"""


_EXAMPLES = 5


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.histories", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=2_000, help="how many tasks (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="what is asked for, and when (%(default)s)")
    parser.add_argument(
        "--processes", type=int, default=4, choices=range(3, 10), help="at once (%(default)s)", metavar="N"
    )
    parser.add_argument(
        "--kills", type=float, default=0.7, help="of so many batches a process ends in one (%(default)s)"
    )
    parser.add_argument(
        "--fault", choices=sorted(FAULTS), default="", help="put into every process: the check must fail"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    began = time.monotonic()
    last = began

    def tell(outcome: Outcome) -> bool:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            speed = outcome.tasks / (last - began)
            left = (given.tasks - outcome.tasks) / speed
            bad = f", {len(outcome.failed)} not explained" if outcome.failed else ""
            print(f"{outcome.tasks} tasks, {speed:.0f} a second{bad}, about {left:.0f} s left", file=sys.stderr)
        # of what is wrong a few examples are enough
        return len(outcome.failed) < _EXAMPLES

    recorder = Recorder(given.seed, processes=given.processes, kills=given.kills, fault=given.fault)
    outcome = run(recorder, given.tasks, progress=tell)
    seconds = time.monotonic() - began
    if given.json:
        print(json.dumps(_figures(given, outcome, seconds), indent=2))
    else:
        _show(given, outcome, seconds)
    return 0 if not (outcome.failed or outcome.undecided or outcome.broken or outcome.never) else 1


def _figures(given: argparse.Namespace, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "seed": given.seed,
        "processes": given.processes,
        "tasks": outcome.tasks,
        "calls": outcome.calls,
        "seconds": round(seconds, 1),
        "tasks a minute": round(outcome.tasks / seconds * 60),
        "killed": outcome.done["killed"],
        "closed": outcome.done["closed"],
        "not explained": [shown(history, given.seed) for history in outcome.failed[:_EXAMPLES]],
        "undecided": outcome.undecided,
        "configurations": outcome.configurations,
        "longest search": outcome.longest,
        "longest search, task": outcome.longest_task,
        "sometimes": {name: outcome.seen[name] for name in SOMETIMES},
        "never seen": outcome.never,
        "also": {name: count for name, count in outcome.seen.most_common() if name not in SOMETIMES},
        "broken": outcome.broken,
    }


def _show(given: argparse.Namespace, outcome: Outcome, seconds: float) -> None:
    figures = _figures(given, outcome, seconds)
    lists = {"not explained", "undecided", "sometimes", "also", "never seen", "broken"}
    for name, value in figures.items():
        if name not in lists:
            print(f"{name:24} {value}")
    print(f"{'not explained':24} {len(outcome.failed)}")
    print(f"{'undecided':24} {len(outcome.undecided)}")
    print("\nsometimes, in tasks:")
    for name in SOMETIMES:
        print(f"{outcome.seen[name]:9}  {name}{'' if outcome.seen[name] else '   <- never: this run is void'}")
    for story in figures["not explained"]:
        print(f"\ncannot be explained: {story}")
    if outcome.broken:
        print(f"\nbroken off:\n{outcome.broken}")


if __name__ == "__main__":
    sys.exit(main())
