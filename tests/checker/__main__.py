"""Checks a copy of a store's file against the promises: ``python -m tests.checker FILE [LOG]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from . import PROMISES, check


def main() -> int:
    """Say what is broken; exit with 1 if anything is."""
    parser = argparse.ArgumentParser(prog="python -m tests.checker", description=__doc__)
    parser.add_argument("file", type=Path, help="a store's file, or a copy with its -wal beside it; opened read-only")
    parser.add_argument("log", type=Path, nargs="?", help="what observers were told: a line of JSON each")
    parser.add_argument("--json", action="store_true", help="print a JSON array of [promise, what]")
    parser.add_argument("--list", action="store_true", help="print the promises and the names of their queries first")
    options = parser.parse_args()
    if options.list:
        for promise in PROMISES:
            print(f"{promise.number:4} {promise.says}\n     {', '.join(promise.queries)}")
    entries = [json.loads(line) for line in options.log.read_text().splitlines()] if options.log else []
    broken = check(options.file, entries)
    if options.json:
        print(json.dumps(broken))
    else:
        for one in broken:
            print(f"{one.promise:4} {one.what}")
        print(f"{options.file}: {f'{len(broken)} broken' if broken else 'every promise is kept'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
