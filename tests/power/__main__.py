"""``python -m tests.power``: cut the power at every point of recorded lives, and look at what is left."""

from __future__ import annotations

import argparse
import json
import signal
import sqlite3
import sys
import time
from pathlib import Path

from . import vfs
from .exchanges import EXCHANGES
from .record import KINDS
from .running import CONTROLS, Job, Run, plan
from .states import SOMETIMES, Report, scratch

_ABOUT = """\
Records every write, sync and name that stores give a disk over two lives each, the first killed in a commit, together with what
callers were answered; then makes the states that a power cut may leave at any point of that: of what was not synced nothing, all,
a part, in another order, torn between sectors, cut short, or garbage; names not durable before their folder was. Each state is
opened with plain sqlite3 and must be what the file was after one of its commits, not older than the last acknowledged one, and
keep every promise of the checker; some are opened by a store, which must recover. So are the states in the middle of an upgrade
and of a restore, which must leave the old file or the new one, and what is kept of the old one.

Controls run with it, and must be seen to fail: durability='normal' must lose (and break nothing), synchronous=OFF must damage
files, an acknowledgement before COMMIT must lose. A run that never met what it is for is void. Exit code 1: a promise broken, a
control green, or void.
"""

_MORE = """\
examples:
  python -m tests.power --states 20000                  a minute or so
  python -m tests.power --states 1000000 --seed 8       the campaign
  python -m tests.power --record power-kept/full-8000 --states 25000 --seed 8
                                                        the same states of a record that was kept, again
"""


def main(arguments: list[str] | None = None) -> int:
    """Run as asked for on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.power",
        description=_ABOUT,
        epilog=_MORE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--states", type=int, default=20_000, help="states of durability='full' (default 20000)")
    parser.add_argument("--seed", type=int, help="repeats the choice of operations and states (default: the time)")
    parser.add_argument("--each", type=int, default=25_000, help="states of a record (default 25000)")
    parser.add_argument("--operations", type=int, default=40, help="operations a life (default 40)")
    parser.add_argument("--processes", type=int, default=2, help="processes that judge (default 2)")
    parser.add_argument(
        "--every", type=int, default=400, help="each so manieth is opened by a store (default 400; 0: none)"
    )
    parser.add_argument("--record", type=Path, help="judge this kept record alone, without controls")
    parser.add_argument("--keep", type=Path, default=Path("power-kept"), help="where records with findings are kept")
    parser.add_argument("--json", action="store_true", help="print JSON, and no table")
    asked = parser.parse_args(arguments)
    reason = vfs.available()
    if reason is not None:
        print(f"power loss cannot be recorded here: {reason}", file=sys.stderr)
        return 2
    seed = int(time.time()) % 100_000 if asked.seed is None else asked.seed
    print(f"seed {seed}, SQLite {sqlite3.sqlite_version}", file=sys.stderr)
    needed = tuple(SOMETIMES) if asked.every else tuple(name for name in SOMETIMES if name != "reopened")
    jobs = plan(asked.states, seed, each=asked.each)
    if asked.record is not None:
        kind = json.loads((asked.record / "record.json").read_text())["kind"]
        jobs, needed = [Job(kind, seed, asked.states, asked.record)], ()
    # what is written into memory goes with whoever ends this, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with scratch() as folder:
        run = Run(
            jobs,
            seed,
            folder,
            operations=asked.operations,
            processes=asked.processes,
            every=asked.every,
            keep=asked.keep,
            needed=needed,
        )
        run.run(_Progress(sum(job.states for job in jobs)))
    print(json.dumps(run.as_json(), indent=2) if asked.json else _table(run))
    return 1 if run.wrong else 0


class _Progress:
    """Tells how far it is, every few seconds."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = self._told = time.monotonic()

    def __call__(self, states: int) -> None:
        now = time.monotonic()
        if now - self._told >= 5:
            self._told = now
            rate = states / (now - self._began)
            print(f"{states:>9,} of {self._total:,} states, {rate:,.0f} a second", file=sys.stderr, flush=True)


_FIELDS = {"answers": "acknowledged"}
_COLUMNS = ("records", "states", "distinct", "commits", "answers", "lost", "most", "corrupt", "mixed", "broken")


def _table(run: Run) -> str:
    lines = ["", f"{'kind':<16}" + "".join(f"{name:>11}" for name in (*_COLUMNS, "reopened", "refused"))]
    for kind in (*KINDS, *EXCHANGES):
        if kind in run.reports:
            report = run.reports[kind]
            values = [getattr(report, _FIELDS.get(name, name)) for name in (*_COLUMNS, "reopened", "refused")]
            lines.append(f"{kind:<16}" + "".join(f"{value:>11,}" for value in values))
    lines += [
        "",
        "lost: states without an acknowledged commit or operation (most: commits in one); corrupt: SQLite says so; mixed: whole,",
        "but what no commit left; broken: the checker says so of what a commit left; refused: a store that opened it did",
        "",
    ]
    full = run.reports.get("full", Report())
    lines += [f"{full.sometimes.get(name, 0):>9,}  {says}" for name, says in SOMETIMES.items()]
    lines.append("")
    for kind, report in run.reports.items():
        shown = report.failures[:1] if kind in CONTROLS else report.failures
        lines += [f"{'as it must: ' if kind in CONTROLS else ''}{one}" for one in shown]
    lines += [f"kept: {one}" for one in run.kept]
    rate = sum(report.states for report in run.reports.values()) / max(run.seconds, 0.001)
    red = ", every control was red" if set(CONTROLS) <= run.reports.keys() else ""
    verdict = "; ".join(run.wrong) or f"passed: nothing acknowledged was lost{red}"
    lines += ["", f"{verdict} (seed {run.seed}, {run.seconds:.0f} s, {rate:,.0f} states a second)"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
