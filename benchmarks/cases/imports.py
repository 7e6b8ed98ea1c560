"""Owns the figures for importing: what `import lash_store` adds to SQLAlchemy and pydantic, and how long ``--help`` takes."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.measuring import Case, Goal, Missing, Way, figure

PROCESSES = 5

IMPORTS = """
import json, sys, time
began = time.perf_counter()
import sqlalchemy, pydantic
between = time.perf_counter()
{statement}
print(json.dumps([between - began, time.perf_counter() - between]))
"""

HELP = """
import sys
from lash_store.cli import main
main(["--help"])
heavy = {"sqlalchemy", "alembic"} & set(sys.modules)
sys.exit(f"--help imports {sorted(heavy)}" if heavy else 0)
"""


def python(program: str, folder: Path) -> str:
    """Run a program in a fresh interpreter, with what it imports compiled once, as an installation has it."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def processes(scale: float) -> int:
    return max(3, round(PROCESSES * scale))


def importing(statement: str, module: str) -> Callable[[Path, float], Mapping[str, float]]:
    program = IMPORTS.format(statement=statement)

    def run(folder: Path, scale: float) -> Mapping[str, float]:
        try:
            # once for the compiled files
            python(program, folder)
        except subprocess.CalledProcessError as error:
            if f"No module named '{module}'" in error.stderr:
                raise Missing(f"{module} is not installed: pip install -e '.[bench]'") from None
            raise
        took = [json.loads(python(program, folder)) for _ in range(processes(scale))]
        base, added = (statistics.median(part) * 1e3 for part in zip(*took, strict=True))
        # of each process by itself, so that a slow moment of the machine is in both
        share = statistics.median(100 * added / base for base, added in took)
        return {"base_ms": base, "added_ms": added, "share": share}

    return run


def running(program: str) -> Callable[[Path, float], Mapping[str, float]]:
    def run(folder: Path, scale: float) -> Mapping[str, float]:
        python(program, folder)
        took = []
        for _ in range(processes(scale)):
            began = time.perf_counter()
            python(program, folder)
            took.append(time.perf_counter() - began)
        return {"process_ms": statistics.median(took) * 1e3}

    return run


NOTHING, BARE, STORE, NEEDED, DBOS, HELPED = (
    "python -c pass",
    "import lash_store",
    "from lash_store import TaskStore",
    "what TaskStore uses of others",
    "DBOS",
    "lash-store --help",
)
CASE = Case(
    name="imports",
    title="Importing: beside SQLAlchemy and pydantic, each time in a fresh process",
    metrics={
        "base_ms": "sqlalchemy, pydantic ms",
        "added_ms": "added ms",
        "share": "added %",
        "process_ms": "whole process ms",
    },
    ways=[
        Way(BARE, importing("import lash_store", "lash_store"), "names are loaded when they are first asked for"),
        Way(
            NEEDED,
            importing("import asyncio, aiosqlite, sqlalchemy.dialects.sqlite, pydantic.main", "aiosqlite"),
            "asyncio, aiosqlite, SQLAlchemy's dialect and pydantic's models, of which `import pydantic` itself loads nothing",
        ),
        Way(STORE, importing("from lash_store import TaskStore", "lash_store"), "those, and all of the store"),
        Way(DBOS, importing("from dbos import DBOS", "dbos")),
        Way(
            HELPED,
            running(HELP),
            "from the start of the process to its end; fails if SQLAlchemy or Alembic is imported",
        ),
        Way(NOTHING, running("pass"), "an interpreter that does nothing"),
    ],
    goals=[
        Goal("import lash_store adds", figure(BARE, "share"), at_most=20, unit="%"),
    ],
    notes=(
        "`import lash_store` alone loads none of its modules: a program pays for them where it first names one, so what it "
        "pays in all is the line of `TaskStore`, for which there is no goal; opening a new or an older file imports Alembic, too."
    ),
)
