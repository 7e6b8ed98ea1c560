"""
Kills processes that work on one file, at random and at named points, and holds the file against what they were told.

  python -m tests.campaign --kills 10000 --seed 7     a full run
  python -m tests.campaign --hours 1                  as many kills as fit
  python -m tests.campaign --control                  with a planted fault: must be found
  python -m tests.campaign --seed 7 --only 12         one file of a run again
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.campaign.nemesis import Generation, Verdict
from tests.campaign.points import POINTS

_A_FILE = 200
"""Kills after which a file is put away for a new one: what is judged grows with it."""

_OLD = sorted(Path(__file__).parent.parent.joinpath("data").glob("*.db"))

SOMETIMES = (
    *(f"killed {point}" for point in POINTS),
    "killed while it opened",
    "killed at a random moment",
    "a -wal with commits was left",
    "the live file was judged",
    "several openers found nobody alive",
    "an owner was stopped",
    "a zombie woke after its work was taken over",
    "stale write refused",
    "a requester was killed",
    "an owner closed in order",
    "a clock was stepped",
    "an older file was upgraded",
    "a killed upgrade left the older file",
    "in doubt, applied",
    "in doubt, absent",
    "cancel beat finish",
    "finish beat cancel",
    "loser told the winner",
    "cancelled before it began",
    "work refused by a closed session",
    "a move refused",
    "reattached",
    "abandoned by recovery",
    "attempts exhausted",
    "retried",
    "callback cut off",
    "moved while it ran",
    "session closed with work in it",
    "pruned",
    "an owner given up",
)
"""What a run must have met, to count."""


def run(
    *,
    seed: str,
    kills: int,
    folder: Path,
    hours: float | None = None,
    only: int | None = None,
    fault: str | None = None,
    a_file: int = _A_FILE,
    say: Any = None,
) -> Verdict:
    """Run so many kills over as many files as they take; stop at the first that breaks a promise."""
    total = Verdict()
    began = time.monotonic()
    number = 0 if only is None else only
    while not total.broken:
        killed = sum(total.kills.values())
        if hours is None and killed >= kills:
            break
        if hours is not None and time.monotonic() - began > hours * 3600:
            break
        place = folder / f"file-{number}"
        place.mkdir(parents=True)
        here = a_file if hours is not None else min(a_file, kills - killed)
        # one file in four begins at an older revision
        old = _OLD[number // 4 % len(_OLD)] if number % 4 == 1 else None
        try:
            total.add(Generation(place, seed=f"{seed}/{number}", kills=here, old=old, fault=fault).run())
        except KeyboardInterrupt:
            # what was seen until then is told
            break
        if say is not None:
            say(total, time.monotonic() - began)
        if only is not None:
            break
        number += 1
    for point, times in total.kills.items():
        total.sometimes[f"killed {point}"] += times
    total.sometimes += total.counts
    return total


def missing(verdict: Verdict) -> list[str]:
    """Return what a run has not met and should have."""
    return [name for name in SOMETIMES if not verdict.sometimes[name]]


def main() -> int:
    """Run a campaign; exit with 1 if a promise was broken or the run is void, and with 0 if a control was found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaign", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=1000, help="how many kills (default: %(default)s)")
    parser.add_argument("--hours", type=float, help="instead: for how long")
    parser.add_argument("--seed", default=None, help="what decides all but the moments; printed")
    parser.add_argument("--only", type=int, metavar="N", help="run the N-th file of a seed alone, to see it again")
    parser.add_argument("--folder", type=Path, help="where the files are made; one that broke a promise stays there")
    parser.add_argument(
        "--control", action="store_true", help="let processes acknowledge before they commit: must be found"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    options = parser.parse_args()
    seed = options.seed or str(secrets.randbits(32))
    folder = options.folder or Path(tempfile.mkdtemp(prefix="campaign-"))
    print(f"seed {seed}, in {folder}", file=sys.stderr)

    def say(total: Verdict, seconds: float) -> None:
        killed = sum(total.kills.values())
        print(
            f"{seconds:7.0f} s  {killed} kills  {total.acknowledged.total()} acknowledged  {total.judged} judged  "
            f"{len(total.broken)} broken",
            file=sys.stderr,
            flush=True,
        )

    began = time.monotonic()
    verdict = run(
        seed=seed,
        kills=options.kills,
        folder=folder,
        hours=options.hours,
        only=options.only,
        fault="acknowledges early" if options.control else None,
        say=say,
    )
    left_out = missing(verdict)
    is_whole = options.hours is not None or options.kills >= 1000
    if options.json:
        print(json.dumps(_as_json(verdict, seed, time.monotonic() - began, left_out)))
    else:
        _print(verdict, seed, time.monotonic() - began, left_out)
    if options.control:
        print("the control was found" if verdict.broken else "the control was NOT found: the campaign is blind")
        return 0 if verdict.broken else 1
    if verdict.broken:
        print(
            f"kept: {verdict.kept}; again: python -m tests.campaign --seed {seed} --only {str(verdict.kept).rpartition('-')[2]}"
        )
        return 1
    if left_out and is_whole and options.only is None:
        print(f"void: this run never met: {', '.join(left_out)}")
        return 1
    return 0


def _as_json(verdict: Verdict, seed: str, seconds: float, left_out: list[str]) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(seconds),
        "kills": sum(verdict.kills.values()),
        "by place": verdict.kills,
        "acknowledged": verdict.acknowledged.total(),
        "by operation": verdict.acknowledged,
        "bodies": verdict.bodies,
        "lost": sum(name == "P1" for name, _ in verdict.broken),
        "double": sum(name in {"P2", "P7", "P9"} for name, _ in verdict.broken),
        "broken": verdict.broken,
        "in doubt": verdict.counts["in doubt"],
        "judged": verdict.judged,
        "sometimes": {name: verdict.sometimes[name] for name in SOMETIMES},
        "never": left_out,
    }


def _print(verdict: Verdict, seed: str, seconds: float, left_out: list[str]) -> None:
    found = _as_json(verdict, seed, seconds, left_out)
    for name in ("kills", "acknowledged", "bodies", "lost", "double", "in doubt", "judged"):
        print(f"{name:14} {found[name]:>9,}")
    print(f"{'seconds':14} {found['seconds']:>9,}   seed {seed}")
    print("\nacknowledged")
    for op, count in verdict.acknowledged.most_common():
        print(f"  {op:28} {count:>9,}")
    print("\nsometimes")
    for name in SOMETIMES:
        print(f"  {name:45} {verdict.sometimes[name]:>9,}")
    for promise, what in verdict.broken:
        print(f"\nBROKEN {promise}: {what}")


if __name__ == "__main__":
    sys.exit(main())
