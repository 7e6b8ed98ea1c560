"""
Owns the small disks: a file system of a few hundred KiB is filled by a store, gets room again, and the same process goes on.

It needs root and a mount namespace of its own, so it is no test of the quick cut. The store runs in a process of its own: a full
ext4 of small blocks ends one by SIGBUS, through the shared memory of the ``-wal``; what it had acknowledged must be there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.checker import check
from tests.faults.programs import echo, make, works

__all__ = ["KINDS", "points", "unavailable"]

KINDS = ("tmpfs", "ext4 -b 1024", "ext4 -b 4096")


def unavailable() -> str | None:
    """Return why there are no small disks here, or None."""
    if os.geteuid() != 0:
        return "only root may mount"
    missing = [name for name in ("unshare", "mount", "mkfs.ext4") if shutil.which(name) is None]
    if missing:
        return f"there is no {', '.join(missing)} on this machine"
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
    return None if tried.returncode == 0 else f"nothing may be mounted here: {tried.stderr.decode()[-200:]!r}"


def points(seed: int) -> Iterator[tuple[str, list[str]]]:
    """Fill a disk of each kind, with files of several sizes beside it; yield what each came to."""
    for kind in KINDS:
        for spare in (0, 8, 40, 120):
            with tempfile.TemporaryDirectory() as folder:
                base = Path(folder)
                (base / "disk").mkdir()
                mount = _mounting(kind, base)
                command = f"{mount} && exec {sys.executable} -m tests.faults.disks {base} {spare}"
                environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
                done = subprocess.run(
                    ["unshare", "-m", "sh", "-ec", command],
                    capture_output=True,
                    text=True,
                    timeout=120,
                    env=environment,
                    check=False,
                )
                said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
                wrong = [str(words[1:]) for words in said if words[0] == "wrong"]
                if ["over"] not in said:
                    wrong.append(f"it ended with {done.returncode}: {done.stderr[-800:]}")
                bus = ["bus"] in said
                yield f"{kind}, {spare} KiB spare{', ended by SIGBUS' if bus else ''}", wrong


def _mounting(kind: str, base: Path) -> str:
    if kind == "tmpfs":
        return f"mount -t tmpfs -o size=1500k tmpfs {base}/disk"
    image = base / "image"
    return (
        f"truncate -s 3M {image} && mkfs.ext4 -q -O ^has_journal {kind.removeprefix('ext4 ')} {image} && "
        f"mount -o loop {image} {base}/disk"
    )


def _say(*words: object) -> None:
    os.write(1, json.dumps(words).encode() + b"\n")


async def _fill(path: Path, spare: int) -> None:
    """What a store does as its disk fills up; acknowledged ids go to a file on another disk."""
    from lash_store import StoreError

    logging.disable(logging.CRITICAL)
    ballast = path.with_name("ballast")
    acknowledged = os.open(path.parent.parent / "acknowledged", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    async with make(path) as store:
        session = await store.session("s1")
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 4096)
            except OSError:
                pass
            file.truncate(max(0, file.tell() - spare * 1024))
        refused = ""
        for number in range(400):
            try:
                await session.spawn(echo, "x" * 500, id=f"t{number}")
            except StoreError as error:
                refused = type(error).__name__
                break
            os.write(acknowledged, f"t{number}\n".encode())
        if not refused:
            _say("wrong", "it was never full")
        ballast.unlink()
        await works(session, "after")
        _say("works after", refused)
    async with make(path) as store:
        await works(await store.session("s1"), "again")


def _look(path: Path) -> None:
    import sqlite3

    acknowledged = path.parent.parent / "acknowledged"
    names = set(acknowledged.read_text().split()) if acknowledged.exists() else set()
    path.with_name("ballast").unlink(missing_ok=True)
    for broken in check(path):
        _say("wrong", str(broken))
    connection = sqlite3.connect(path)
    stored = {name for (name,) in connection.execute("SELECT id FROM tasks")}
    connection.close()
    if names - stored:
        _say("wrong", f"acknowledged and lost: {sorted(names - stored)[:5]}")
    asyncio.run(_reopen(path))


async def _reopen(path: Path) -> None:
    logging.disable(logging.CRITICAL)
    async with make(path) as store:
        await works(await store.session("s1"), "at last")


if __name__ == "__main__":
    _path = Path(sys.argv[1]) / "disk" / "agent.db"
    _child = os.fork()
    if _child == 0:
        try:
            asyncio.run(_fill(_path, int(sys.argv[2])))
        except BaseException as _error:
            _say("wrong", repr(_error)[:500])
        os._exit(0)
    _, _status = os.waitpid(_child, 0)
    if os.WIFSIGNALED(_status):
        _say("bus") if os.WTERMSIG(_status) == signal.SIGBUS else _say("wrong", f"signal {os.WTERMSIG(_status)}")
    _look(_path)
    _say("over")
