"""Owns one measurement in a process of its own: ``python -m benchmarks.one CASE WAY FOLDER SCALE`` prints its figures as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .measuring import Missing, run_here


def main() -> None:
    case, way, folder, scale = sys.argv[1:]
    try:
        answer = {"figures": dict(run_here(case, way, Path(folder), float(scale)))}
    except Missing as missing:
        answer = {"missing": str(missing)}  # type: ignore[dict-item]
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
