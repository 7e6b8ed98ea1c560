"""Owns a run: has lives recorded, their states judged by several processes, and says whether all went as it must."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from .exchanges import EXCHANGES
from .states import SOMETIMES, Report

__all__ = ["CONTROLS", "Job", "Run", "control_is_red", "plan"]

CONTROLS: Final = ("normal", "off", "early")

_ROOT: Final = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Job:
    """So many states of a record of a kind and seed, which is made, unless *saved* says where it is."""

    kind: str
    seed: int
    states: int
    saved: Path | None = None


def plan(states: int, seed: int, *, each: int = 25_000, controls: float = 0.02) -> list[Job]:
    """Share states among records; each control gets a part of as many, on records of its own."""
    count = max(1, round(states / each))
    share, left = divmod(states, count)
    jobs = [Job("full", seed * 1000 + number, share + (number < left)) for number in range(count)]
    some = max(300, min(20_000, int(states * controls)))
    # what breaks files has SQLite read all of each
    red = [Job(kind, seed * 1000, some // 10 if kind == "off" else some) for kind in CONTROLS]
    few = max(300, min(10_000, int(states * controls / 4)))
    return [*red, *(Job(kind, seed, few) for kind in EXCHANGES), *jobs]


def control_is_red(kind: str, report: Report) -> str | None:
    """Return why a control did not show what it must, or None: then the harness sees what it is made to see."""
    if kind == "off":
        return None if report.corrupt + report.mixed and report.lost + report.corrupt else "nothing was damaged"
    if not report.lost:
        return "nothing was lost"
    if kind == "normal" and report.corrupt + report.mixed:
        return "files were damaged, or what survived was no prefix: durability='normal' promises that they are not"
    return None


class _Recorder:
    """The server that records, asked by one at a time."""

    def __init__(self, folder: Path, operations: int) -> None:
        self._lock = threading.Lock()
        self._process = _start("tests.power.record", str(folder), str(operations))

    def record(self, job: Job) -> Path:
        with self._lock:
            return Path(_ask(self._process, f"{job.kind}:{job.seed}"))

    def close(self) -> None:
        _end(self._process)


def _start(module: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])},
    )


def _ask(process: subprocess.Popen[str], line: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()
    return _hear(process)


def _hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        raise RuntimeError(f"{process.args!r} ended, see what it wrote: exit code {process.wait(30)}")
    return line


def _end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


@dataclass(slots=True)
class Run:
    """
    A run over jobs, in *processes* that judge.

    Every *every*-th state is opened by a store as well; 0: none. Records in which something was found that should not be are kept
    in *keep*.
    """

    jobs: list[Job]
    seed: int
    folder: Path
    operations: int = 40
    processes: int = 2
    every: int = 400
    keep: Path | None = None
    needed: tuple[str, ...] = tuple(SOMETIMES)
    spared: dict[str, Path | None] = field(default_factory=dict)
    """Where a record of a kind stays until the folder goes, of kinds that are asked for."""
    reports: dict[str, Report] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def run(self, progress: Callable[[int], object] = lambda _: None) -> None:
        """
        Do all jobs; *progress* is told how many states were judged so far.

        Raises:
            RuntimeError: a process of the harness failed.
        """
        began = time.monotonic()
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in self.jobs:
            todo.put(job)
        done: list[tuple[Job, Report]] = []
        errors: list[BaseException] = []
        counts = [0] * self.processes
        recorder = _Recorder(self.folder, self.operations)

        def judge(which: int) -> None:
            judging: subprocess.Popen[str] | None = None
            try:
                judging = _start("tests.power.states")
                while not errors:
                    try:
                        job = todo.get_nowait()
                    except queue.Empty:
                        break
                    before = counts[which]

                    def told(states: int, before: int = before) -> None:
                        counts[which] = before + states

                    done.append((job, self._judge(job, judging, recorder, told)))
                    counts[which] = before + done[-1][1].states
            except BaseException as error:
                errors.append(error)
            finally:
                if judging is not None:
                    _end(judging)

        threads = [threading.Thread(target=judge, args=(which,), daemon=True) for which in range(self.processes)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.2) if threads[0].is_alive() else threads[-1].join(0.2)
            progress(sum(counts))
        recorder.close()
        if errors:
            raise errors[0]
        for job, report in done:
            self.reports.setdefault(job.kind, Report()).add(report)
        self.seconds = time.monotonic() - began

    def _judge(
        self, job: Job, judging: subprocess.Popen[str], recorder: _Recorder, told: Callable[[int], None]
    ) -> Report:
        saved = job.saved or recorder.record(job)
        asked = {
            "kind": job.kind,
            "saved": str(saved),
            "states": job.states,
            "seed": self.seed,
            "every": self._every(job),
        }
        said: dict[str, Any] = json.loads(_ask(judging, json.dumps(asked)))
        while "report" not in said:
            told(said["progress"])
            said = json.loads(_hear(judging))
        report = Report(**said["report"])
        if job.saved is None:
            if report.wrong and job.kind not in CONTROLS and self.keep is not None:
                self.keep.mkdir(parents=True, exist_ok=True)
                self.kept.append(str(shutil.copytree(saved, self.keep / saved.name, dirs_exist_ok=True)))
            if job.kind in self.spared:
                self.spared[job.kind] = saved
            else:
                shutil.rmtree(saved)
        return report

    def _every(self, job: Job) -> int:
        # a store may refuse what a control left: that it does is no finding
        return self.every if job.kind == "full" else 0

    # --- how it went ---

    @property
    def missed(self) -> list[str]:
        """What the run should have met and did not."""
        met = self.reports.get("full", Report()).sometimes
        return [name for name in self.needed if not met.get(name)]

    @property
    def wrong(self) -> list[str]:
        """Why the run failed: nothing, if all is well."""
        found = []
        full = self.reports.get("full", Report())
        if full.wrong:
            found.append(f"{full.wrong} of {full.states} states broke a promise")
        for kind in EXCHANGES:
            report = self.reports.get(kind, Report())
            if report.wrong:
                found.append(f"{kind}: {report.wrong} of {report.states} states broke a promise")
        for kind in sorted(set(CONTROLS) & self.reports.keys()):
            green = control_is_red(kind, self.reports[kind])
            if green is not None:
                found.append(f"control {kind!r} is green: {green}: the harness is blind")
        if self.missed:
            found.append(f"void: the run never met {', '.join(self.missed)}")
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it for a program."""
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "passed": not self.wrong,
            "wrong": self.wrong,
            "kept": self.kept,
            "kinds": {kind: {**asdict(report), "wrong": report.wrong} for kind, report in self.reports.items()},
        }
