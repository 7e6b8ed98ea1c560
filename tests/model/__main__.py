"""Sessions against the reference model, at length: the command."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

from tests.model.stories import Told, tell
from tests.model.watched import SOMETIMES

_HELP = """\
Let Hypothesis make up what callers do to the sessions of a file, crashes included, and compare every row with a model after each.

With one process, owners come one after the other: they die, close, and come back, with or without the functions of their tasks,
and the wall clock is set by hours. With two, two owners and a guest that only makes requests have the file open at the same time.
The machines are those of tests/runtime/test_model.py and test_model_of_two.py; the model is tests/runtime/model.py.

  python -m tests.model --steps 1000000 --seed 1 --jobs 2
  python -m tests.model --steps 50000 --seed 1 --processes 2 --json

A step is a rule that was followed. Each portion of some 2,000 steps has a seed of its own, made of --seed and its number. A
failure prints the shortest story Hypothesis finds, and the portion: --portion tells that one again.
The exit code is 0 only if all went as the model says, and everything in the table of what must be seen sometimes was seen.
"""


def _portions(given: argparse.Namespace) -> Iterator[Told]:
    """Tell portions until there were enough steps, several at a time if so wished."""
    if given.portion is not None:
        yield tell(given.seed, given.portion, given.processes)
        return
    if given.jobs == 1:
        portion = 0
        while True:
            yield tell(given.seed, portion, given.processes)
            portion += 1
    with concurrent.futures.ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
        going = [pool.submit(tell, given.seed, portion, given.processes) for portion in range(given.jobs)]
        portion = given.jobs
        try:
            while True:
                done, _ = concurrent.futures.wait(going, return_when=concurrent.futures.FIRST_COMPLETED)
                for one in done:
                    going.remove(one)
                    going.append(pool.submit(tell, given.seed, portion, given.processes))
                    portion += 1
                    yield one.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def main() -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.model", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="how many, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the stories (%(default)s)")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1, help="owners at a time (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="portions told at the same time (%(default)s)")
    parser.add_argument("--portion", type=int, help="tell this one alone")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    given = parser.parse_args()
    began, last = time.monotonic(), time.monotonic()
    whole = Told()
    portions = _portions(given)
    with contextlib.closing(portions):
        for told in portions:
            whole.steps += told.steps
            whole.seen += told.seen
            whole.stories += told.stories
            whole.failure = told.failure
            steps, now = whole.steps.total(), time.monotonic()
            if now - last > 5:
                last = now
                speed = steps / (now - began)
                left = max(0.0, (given.steps - steps) / speed)
                print(f"{steps} steps, {speed:.0f} a second, about {left:.0f} s left", file=sys.stderr)
            if told.failure or steps >= given.steps:
                break
    return _show(given, whole, time.monotonic() - began)


def _show(given: argparse.Namespace, whole: Told, seconds: float) -> int:
    steps = whole.steps.total()
    sometimes = {name: whole.seen[name] for name in SOMETIMES[given.processes]}
    never = [name for name, count in sometimes.items() if not count]
    figures: dict[str, Any] = {
        "seed": given.seed,
        "processes": given.processes,
        "steps": steps,
        "stories": whole.stories,
        "seconds": round(seconds, 1),
        "steps a second": round(steps / seconds, 1),
        "rules": dict(whole.steps.most_common()),
        "sometimes": sometimes,
        "also": {name: count for name, count in whole.seen.most_common() if name not in sometimes},
        "never seen": never,
        "failure": whole.failure,
    }
    if given.json:
        print(json.dumps(figures, indent=2))
    else:
        for name in ("seed", "processes", "steps", "stories", "seconds", "steps a second"):
            print(f"{name:16} {figures[name]}")
        print("\nsteps by rule:")
        for name, count in figures["rules"].items():
            print(f"{count:9}  {name}")
        print("\nsometimes, in stories:")
        for name, count in sometimes.items():
            print(f"{count:9}  {name}{'' if count else '   <- never: this run is void'}")
        if whole.failure:
            print(f"\nnot as the model says: {whole.failure}")
    return 1 if whole.failure or never else 0


if __name__ == "__main__":
    sys.exit(main())
