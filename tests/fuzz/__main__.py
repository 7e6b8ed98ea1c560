"""The command: ``python -m tests.fuzz --files 10000 --seed 1``."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from .campaign import SOMETIMES, Tally, cases, run, tell
from .files import KINDS, Case, build
from .seeds import make_all
from .trial import WAYS

_HELP = """\
Damage store files in every way known here, and try on each everything that opens a file: it must work or be refused in
the package's own words, without a crash, a hang, a traceback, a byte changed by who only reads, or anything touched
outside of the folder.

Examples:
  python -m tests.fuzz --files 300 --seed 7        five minutes
  python -m tests.fuzz --files 10000 --seed 1      a full run
  python -m tests.fuzz --seed 7 --only 41          one case again
  python -m tests.fuzz --again kept/7-41           the very file that was kept
  python -m tests.fuzz --seed 7 --only 41 --ways run --make /tmp/there   only make the file

Exit code: 0 nothing found; 1 a file did what none may, or the run is void (it never came to what it should have).
"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--files", type=int, default=300, help="how many (300)")
    parser.add_argument("--seed", type=int, help="a number; the same gives the same damage (random, and printed)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (0)")
    parser.add_argument("--only", type=int, help="run this one case")
    parser.add_argument("--kind", choices=[*KINDS], help="only this kind of damage")
    parser.add_argument("--ways", help=f"of {', '.join(WAYS)} (all)")
    parser.add_argument("--again", type=Path, help="run a folder with an agent.db in it instead")
    parser.add_argument("--make", type=Path, help="only make the file of --only in this folder")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-kept"), help="where files are kept (fuzz-kept)")
    parser.add_argument("--json", action="store_true", help="print JSON in the place of tables")
    return parser.parse_args()


def main() -> int:
    """Run the command and return its exit code."""
    given = _arguments()
    seed = random.randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", file=sys.stderr)
    ways = given.ways.split(",") if given.ways else []
    work: list[Case | None]
    if given.again is not None:
        # each way stands in a folder of its own
        given.again = given.again.resolve()
        if not given.again.is_dir():
            sys.exit(f"python -m tests.fuzz: {given.again} is no folder")
        work = [None]
    elif given.only is not None:
        work = [*cases(seed, given.only, 1)]
    else:
        named = cases(seed, given.first, given.files)
        work = [case for case in named if given.kind in (None, case.kind)]
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    begun = time.monotonic()
    try:
        seeds = make_all(folder)
        if given.make is not None:
            given.make.mkdir(parents=True, exist_ok=True)
            print(build(work[0], given.make, seeds))  # type: ignore[arg-type]
            return 0
        shown = _Progress(len(work), begun, given.keep)
        tally = run(work, folder, seeds, ways=ways, keep=given.keep, source=given.again, progress=shown)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    partial = bool(given.only is not None or given.again or given.kind or ways)
    missing = [] if partial else tally.missing()
    seconds = time.monotonic() - begun
    if given.json:
        told = {
            "seed": seed,
            "files": tally.files,
            "seconds": round(seconds, 1),
            "outcomes": {kind: dict(counts) for kind, counts in tally.outcomes.items()},
            "sometimes": {what: tally.seen[what] for what in SOMETIMES},
            "missing": missing,
            "found": [{"case": one.case, "way": one.way, "what": one.what} for one in tally.found],
        }
        print(json.dumps(told, indent=2))
    else:
        tell(tally)
        print(f"\n{tally.files} files in {seconds:.0f} s, seed {seed}: {len(tally.found)} did what no file may")
    if missing:
        print(f"void: this run never came to: {', '.join(missing)}", file=sys.stderr)
    return 1 if tally.found or missing else 0


class _Progress:
    """Says at once what was found, and every few seconds how far a long run is."""

    def __init__(self, total: int, begun: float, keep: Path) -> None:
        self._total = total
        self._begun = self._last = begun
        self._keep = keep
        self._told = 0

    def __call__(self, tally: Tally) -> None:
        for one in tally.found[self._told :]:
            kept = "" if one.case is None else f"{self._keep}/{one.case.seed}-{one.case.number}"
            again = f"python -m tests.fuzz --again {kept} --ways {one.way}" if kept else ""
            print(f"\nFOUND {one.case} by {one.way}: {again}\n{one.what}", file=sys.stderr, flush=True)
        self._told = len(tally.found)
        now = time.monotonic()
        if now - self._last > 5.0:
            self._last = now
            left = (now - self._begun) / tally.files * (self._total - tally.files)
            print(f"{tally.files} of {self._total} files, {len(tally.found)} found, {left:.0f} s left", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
