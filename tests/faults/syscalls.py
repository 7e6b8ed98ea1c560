"""
Owns the sweep over system calls: `strace` has the k-th call on a store's files fail, or kills the process there.

``python -m tests.faults.syscalls NAME FOLDER`` is the process it does that to: it runs one operation from the birth of a file to
its close, and says on its standard output how far it came.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path

from tests.checker import check
from tests.faults.calls import judge_killed
from tests.faults.operations import OPERATIONS, Operation, ask, newborn, staged
from tests.faults.statements import answered

__all__ = ["CALLS", "NAMES", "points", "unavailable"]

NAMES = (
    "TaskStore.open",
    "TaskStore.close",
    "TaskStore.backup",
    "TaskStore.prune",
    "SessionTasks.spawn",
    "SessionTasks.handoff",
    "SessionTasks.cancel",
    "SessionTasks.close",
    "TaskContext.save",
    "TaskContext.transact",
    "a body from its claim to its end",
)
"""Each takes a process a point, so not all of them."""

CALLS = {
    "pwrite64": ("error=EIO", "error=ENOSPC", "error=EINTR", "signal=SIGKILL"),
    "fdatasync": ("error=EIO", "error=ENOSPC", "error=EINTR", "signal=SIGKILL"),
    "fsync": ("error=EIO", "signal=SIGKILL"),
    "ftruncate": ("error=EIO", "error=EINTR", "signal=SIGKILL"),
    "openat": ("error=EIO", "error=ENOSPC", "error=EINTR", "error=EMFILE", "signal=SIGKILL"),
}

_STRACE = shutil.which("strace")


def unavailable() -> str | None:
    """Return why there is no sweep over system calls here, or None."""
    if _STRACE is None:
        return "there is no strace on this machine"
    tried = subprocess.run([_STRACE, "-f", "-o", "/dev/null", "/bin/true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"strace may trace nothing here: {tried.stderr[-200:]!r}"


def points(names: tuple[str, ...], seed: int, until: float | None) -> Iterator[tuple[str, list[str]]]:
    """Run them all, or in an order of the *seed* as many as there is time for; yield what each was and what is wrong with it."""
    plan = [(name, call, how) for name in names for call, hows in CALLS.items() for how in hows]
    with tempfile.TemporaryDirectory() as folder:
        born = newborn(Path(folder))
        run = partial(_point, born=born, folder=Path(folder) / "point")
        if until is None:
            for name, call, how in plan:
                for at in count(1):
                    was_there, wrong = run(name, call, how, at)
                    if not was_there:
                        break
                    yield f"{name} {call} {how} when={at}", wrong
            return
        chance = random.Random(seed)
        while time.monotonic() < until:
            name, call, how = chance.choice(plan)
            at = chance.randint(1, 15 if call in {"pwrite64", "openat"} else 5)
            was_there, wrong = run(name, call, how, at)
            if was_there:
                yield f"{name} {call} {how} when={at}", wrong


def _point(name: str, call: str, how: str, at: int, born: Path, folder: Path) -> tuple[bool, list[str]]:
    folder.mkdir()
    try:
        path, log = folder / "agent.db", folder / "strace.log"
        # not by the process itself: what fails there is the store's alone
        shutil.copy(born, path)
        watched = [f"{path}{suffix}" for suffix in ("", "-wal", "-shm", "-journal")]
        watched += [
            f"{path.with_name('copy.db')}{suffix}" for suffix in ("", "-making", "-making-journal", "-making-wal")
        ]
        command = [
            str(_STRACE),
            "-f",
            "-qq",
            "-o",
            str(log),
            "-e",
            f"trace={call}",
            "-e",
            f"inject={call}:{how}:when={at}",
        ]
        command += [part for one in watched for part in ("-P", one)]
        command += [sys.executable, "-m", "tests.faults.syscalls", name, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
        trace = log.read_text(errors="replace")
        if "INJECTED" not in trace and "+++ killed by SIGKILL" not in trace:
            return False, []
        said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        return True, _judge(name, folder, said, done.stderr)
    finally:
        shutil.rmtree(folder)


def _judge(name: str, folder: Path, said: list[list[str | None]], stderr: str) -> list[str]:
    [operation] = [one for one in OPERATIONS if one.name == name]
    path = folder / "agent.db"
    wrong = [f"it said: {words}" for words in said if words[0] == "untyped"]
    is_staged = ["staged"] in said
    is_answered = ["answered", None] in said
    if not wrong and not is_staged and ["refused"] not in said and "Killed" not in stderr and stderr.strip():
        wrong.append(f"died: {stderr[-500:]}")
    if not is_staged:
        return [*wrong, *(str(broken) for broken in check(path))]
    refused = [words for words in said if words[0] == "answered" and words[1] not in {None, "CommitInDoubt"}]
    if refused and operation.ask is not None and not operation.goes_on and ["struck before"] not in said:
        effect = ask(operation, path)
        if effect != operation.absent and name not in {"SessionTasks.cancel", "SessionTasks.close"}:
            wrong.append(f"{refused} and yet {effect!r}")
    return wrong + asyncio.run(judge_killed(operation, folder, is_answered))


def _say(*words: str | None) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


async def _main(operation: Operation, folder: Path) -> None:
    from lash_store import StoreError

    logging.getLogger("lash_store").setLevel(logging.CRITICAL)
    try:
        async with staged(operation, folder / "agent.db", folder) as stage:
            _say("staged")
            _, error = await answered(operation, stage)
            if error is not None and not isinstance(error, StoreError):
                _say("untyped", repr(error))
            _say("answered", None if error is None else type(error).__name__)
    except StoreError as error:
        _say("refused")
        _say("because", repr(error))
    except BaseException as error:
        _say("untyped", repr(error))
    _say("closed")


if __name__ == "__main__":
    [_wanted] = [one for one in OPERATIONS if one.name == sys.argv[1]]
    asyncio.run(_main(_wanted, Path(sys.argv[2])))
