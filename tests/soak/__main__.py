"""
Works on one file for an hour, with processes killed and begun anew every few seconds, and says by numbers whether all stays flat.

  python -m tests.soak --hours 1 --seed 7             the whole hour of load
  python -m tests.soak --hours 0.05                   three minutes
  python -m tests.soak --hours 0.02 --leak            with leaks planted: each must be found
  python -m tests.soak --hours 0.1 --grown 64         on a file that has 64 MiB of something else in it
  python -m tests.soak --hours 1 --out FOLDER         and a picture of each measure there, with the figures

One process, which owns, lives through all of it; what it uses is measured from outside every second. Beside it two owners
and one who only asks are killed (SIGKILL, also while they open) or close in order after half a second to five: their deaths,
hand-overs and take-overs are what the long-lived process has to digest. Every so often all come to rest; then what it holds is
counted, and the file judged by tests.checker against what everybody was told.

A measure is flat if, after the first quarter, neither its robust slope (Theil-Sen over windows) nor the step from the second
quarter to the last is more than its limit, which is printed; what is counted at rest must never be more than in the warm-up.
"""

from __future__ import annotations

import argparse
import json
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.soak.flat import Verdict
from tests.soak.lives import LEAKS
from tests.soak.measures import Measure, verdicts
from tests.soak.pictures import write
from tests.soak.running import Run, Soak

__all__ = ["CAUGHT_BY", "SOMETIMES", "main", "missing"]

SOMETIMES = (
    "an owner was killed",
    "a requester was killed",
    "killed while it opened",
    "an owner closed in order",
    "a requester closed in order",
    "a subscriber left",
    "cancel beat finish",
    "finish beat cancel",
    "reattached",
    "abandoned by recovery",
    "retried",
    "callback cut off",
    "moved while it ran",
    "session closed with work in it",
    "in doubt, applied",
    "pruned",
    "an owner that died",
    "an owner that closed",
)
"""What a run must have met, to count."""

CAUGHT_BY = {
    "descriptor": ("descriptors", "descriptors at rest"),
    "task": ("tasks", "tasks at rest"),
    "thread": ("threads", "threads at rest"),
    "memory": ("memory", "objects at rest", "traced memory at rest"),
    "file": ("side files", "side files at rest"),
    "reader": ("-wal in use",),
}
"""The measures that must be red for each leak."""


def missing(found: Run) -> list[str]:
    """Return what a run has not met and should have."""
    return [name for name in SOMETIMES if not found.sometimes[name]]


def main() -> int:
    """Run it; exit with 1 if anything is not flat or broken, or the run is void; with leaks, if one was not found."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hours", type=float, default=1.0, help="of load, without the rests (default: %(default)s)")
    parser.add_argument("--seed", default=None, help="what decides all but the moments; printed")
    parser.add_argument(
        "--rest", type=float, metavar="SECONDS", help="load between two rests (default: 60, or a fortieth of the run)"
    )
    parser.add_argument("--grown", type=int, default=0, metavar="MIB", help="so much of a program's own is in the file")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where pictures and soak.json are written")
    parser.add_argument(
        "--leak",
        nargs="?",
        const=",".join(LEAKS),
        metavar="WHAT",
        help=f"a control: the long-lived process keeps a {', a '.join(LEAKS)} (or those named, with commas) every second",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, instead of tables")
    options = parser.parse_args()
    leak = tuple(options.leak.split(",")) if options.leak else ()
    if not set(leak) <= set(LEAKS):
        parser.error(f"--leak takes {', '.join(LEAKS)}")
    seed = options.seed or str(secrets.randbits(32))
    seconds = options.hours * 3600
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    print(f"seed {seed}, in {folder}", file=sys.stderr)
    found = Soak(
        folder,
        seed=seed,
        seconds=seconds,
        rest=options.rest or min(60.0, seconds / 40),
        leak=leak,
        leak_every=min(1.0, seconds / 60),
        sample=min(1.0, seconds / 200),
        grown=options.grown,
        say=_say,
    ).run()
    judged = verdicts(found.samples, found.seconds)
    if options.json:
        print(json.dumps(_as_json(found, judged, seed)))
    else:
        _print(found, judged, seed)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps(_as_json(found, judged, seed), indent=1) + "\n")
        for path in write(found.samples, found.seconds, options.out):
            print(f"wrote {path}", file=sys.stderr)
    code = _code(found, judged, leak)
    if found.broken:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(folder)
    return code


def _code(found: Run, judged: list[tuple[Measure, Verdict]], leak: tuple[str, ...]) -> int:
    red = {measure.name for measure, verdict in judged if not verdict.is_flat}
    if leak:
        blind = {one: name for one in leak for name in CAUGHT_BY[one] if name not in red}
        print(f"blind: {blind}" if blind else f"the leaks were found: {', '.join(sorted(red))}")
        return 1 if blind or found.broken else 0
    if found.broken or red:
        return 1
    left_out = missing(found)
    if left_out and found.seconds >= 300:
        print(f"void: this run never met: {', '.join(left_out)}")
        return 1
    return 0


def _say(found: Run, seconds: float) -> None:
    def last(name: str) -> float:
        of = found.samples.get(name)
        return of[-1][1] if of else float("nan")

    killed = sum(count for name, count in found.sometimes.items() if "killed" in name)
    print(
        f"{seconds:7.0f} s  {killed} killed  {found.acknowledged.total()} acknowledged  {last('memory'):.0f} MiB  "
        f"{last('descriptors at rest'):g} descriptors  {last('threads at rest'):g} threads  {last('tasks at rest'):g} tasks  "
        f"{last('objects at rest'):g} objects  -wal {last('-wal in use'):.1f} of {last('-wal'):.1f} MiB  "
        f"file {last('file'):.1f} MiB  {last('side files at rest'):g} side files  {len(found.broken)} broken",
        file=sys.stderr,
        flush=True,
    )


def _as_json(found: Run, judged: list[tuple[Measure, Verdict]], seed: str) -> dict[str, Any]:
    return {
        "seed": seed,
        "seconds": round(found.seconds),
        "measures": {
            measure.name: {
                "unit": measure.unit,
                "level": _short(verdict.level),
                "last": _short(verdict.last),
                "ratio": _short(verdict.ratio),
                "rise": _short(verdict.rise),
                "allowed": _short(verdict.allowed),
                "rule": measure.rule,
                "flat": verdict.is_flat,
                **({} if verdict.is_flat else {"why": verdict.why}),
            }
            for measure, verdict in judged
        },
        "killed": sum(count for name, count in found.sometimes.items() if "killed" in name),
        "acknowledged": found.acknowledged.total(),
        "by operation": dict(found.acknowledged.most_common()),
        "bodies": found.bodies,
        "judged": found.judged,
        "broken": found.broken,
        "rows that stay": max((value for _, value in found.samples.get("rows that stay", ())), default=0),
        "sometimes": {name: found.sometimes[name] for name in SOMETIMES},
        "never": missing(found),
        "grown": found.grown,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _print(found: Run, judged: list[tuple[Measure, Verdict]], seed: str) -> None:
    print(f"{found.seconds:,.0f} seconds of load, seed {seed}\n")
    print(f"{'measure':36} {'2nd quarter':>12} {'last':>10} {'ratio':>6} {'rise':>9} {'allowed':>9}  flat")
    for measure, verdict in judged:
        print(
            f"{measure.name:36} {verdict.level:>12,.4g} {verdict.last:>10,.4g} {verdict.ratio:>6.2f} {verdict.rise:>9.3g} "
            f"{verdict.allowed:>9.3g}  {'yes' if verdict.is_flat else 'NO'}  {measure.rule}"
        )
    for measure, verdict in judged:
        if not verdict.is_flat:
            print(f"\nNOT FLAT {measure.name}: {verdict.why}")
    if found.grown:
        print("\ngrown most since the third rest, in the long-lived process")
        for place, kib, count in found.grown.get("lines", ()):
            print(f"  {place:45} {kib:>9,} KiB {count:>9,} blocks")
        for kind, name, count in found.grown.get("held", ()):
            print(f"  {kind}: {name:40} {count:>9,}")
        for name, count in found.grown.get("types", ()):
            print(f"  {name:45} {count:>9,} objects")
    print(f"\nacknowledged {found.acknowledged.total():,}, bodies {found.bodies:,}, judged {found.judged} times")
    print("\nsometimes")
    for name in SOMETIMES:
        print(f"  {name:45} {found.sometimes[name]:>9,}")
    for promise, what in found.broken:
        print(f"\nBROKEN {promise}: {what}")


if __name__ == "__main__":
    sys.exit(main())
