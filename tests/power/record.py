"""
Owns the record of a store's life: every write, sync and name a disk was given, and every answer a caller was, in their one order.

``python -m tests.power.record FOLDER OPERATIONS`` is a server of its own: it imports everything, opens nothing, and forks a
process for each life, so that no two lives share a connection or a lock. The record of all lives of a file is one sequence of
entries (`Record`), kept as a file of JSON beside the bytes that were written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from . import exchanges, vfs

__all__ = ["KINDS", "main"]

KINDS: Final = {
    "full": "the store as it is, with durability='full': loses nothing",
    "normal": "durability='normal': loses what was acknowledged, and breaks nothing",
    "off": "PRAGMA synchronous=OFF behind the store's back: loses, and breaks files",
    "early": "acknowledges before COMMIT: loses",
}

_LIFE = 1_000_000
"""Files of one life are numbered from a multiple of this."""


class Recorder:
    """
    Notes what happens, on whatever thread; the order of its list is the order of the record.

    What changes the disk is noted once it is done, and what makes that last once it is known: a disk is never said to have more
    than it has. A sync covers what had been noted when it began.
    """

    def __init__(self, folder: str, life: int) -> None:
        self.entries: list[list[Any]] = []
        self.blob = bytearray()
        self.save: Callable[[], None] = lambda: None
        self.die_in: int | None = None
        self._folder = folder
        self._first = life * _LIFE
        self._local = threading.local()
        self._lock = threading.Lock()

    # --- SQLite's calls ---

    def before(self, call: vfs.Call) -> None:
        """Note where the record stood when a call began; end the process in the write that is to be its last."""
        if call.kind == "sync":
            self._local.began = len(self.entries)
        elif call.kind == "delete":
            self._local.deleting = call.path
        elif call.kind == "sync_folder":
            self._unlinked()
            self._local.folder = call.path, len(self.entries)
        elif call.kind == "write" and call.role == "wal" and self.die_in is not None:
            self.die_in -= 1
            if self.die_in <= 0:
                self.save()
                os._exit(9)

    def after(self, call: vfs.Call) -> None:
        """Note what a call did."""
        if call.kind == "delete":
            if call.result == 0:
                self._unlinked()
                self._synced_folder()
            self._local.deleting = None
            return
        if call.result != 0 or call.path is None or not call.path.startswith(self._folder):
            return
        file = self._first + call.file
        if call.kind == "open":
            self.entries.append(["open", file, call.path])
        elif call.kind == "write":
            with self._lock:
                self.entries.append(["write", file, call.offset, len(self.blob), call.size])
                self.blob += call.data
        elif call.kind == "truncate":
            self.entries.append(["truncate", file, call.size])
        elif call.kind == "sync":
            self.entries.append(["sync", file, self._local.began])
            self._synced_folder()

    def _unlinked(self) -> None:
        path = getattr(self._local, "deleting", None)
        if path is not None:
            self.entries.append(["unlink", path])
            self._local.deleting = None

    def _synced_folder(self) -> None:
        """SQLite opens a folder to sync it, inside the sync or the removal of a file that it belongs to."""
        folder, self._local.folder = getattr(self._local, "folder", None), None
        if folder is not None:
            self.entries.append(["folder", *folder])

    # --- the store's own calls ---

    def watch_names(self) -> None:
        """Note what this process does to names and files beside SQLite: it makes, links, renames, removes and syncs some."""
        ours: dict[int, str] = {}
        real_open, real_fsync, real_ftruncate, real_close = os.open, os.fsync, os.ftruncate, os.close

        def inside(path: Any) -> str | None:
            text = os.fsdecode(os.fspath(path)) if isinstance(path, str | bytes | os.PathLike) else ""
            return text if text.startswith(self._folder) else None

        def opened(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            name = inside(path)
            is_new = name is not None and flags & os.O_CREAT and not os.path.lexists(name)
            descriptor = real_open(path, flags, *rest, **named)
            if name is not None:
                ours[descriptor] = name
                if is_new:
                    self.entries.append(["create", name])
            return descriptor

        def closed(descriptor: int) -> None:
            ours.pop(descriptor, None)
            real_close(descriptor)

        def synced(descriptor: int) -> None:
            began = len(self.entries)
            real_fsync(descriptor)
            name = ours.get(descriptor)
            if name is not None:
                self.entries.append(["folder" if Path(name).is_dir() else "fsync", name, began])

        def cut(descriptor: int, size: int) -> None:
            real_ftruncate(descriptor, size)
            if descriptor in ours:
                self.entries.append(["ftruncate", ours[descriptor], size])

        def named(real: Callable[..., Any], kind: str) -> Callable[..., Any]:
            def called(*arguments: Any, **named: Any) -> Any:
                result = real(*arguments, **named)
                paths = [inside(one) for one in arguments]
                if all(path is not None for path in paths):
                    self.entries.append([kind, *paths])
                return result

            return called

        os.open, os.close, os.fsync, os.ftruncate = opened, closed, synced, cut  # type: ignore[assignment]
        os.rename, os.replace = named(os.rename, "rename"), named(os.replace, "rename")
        os.link, os.unlink, os.remove = named(os.link, "link"), named(os.unlink, "unlink"), named(os.remove, "unlink")

    # --- what is said ---

    def log(self, entry: list[Any]) -> None:
        """Note what somebody asked, or was told."""
        self.entries.append(["log", entry])

    def mark(self, what: str) -> None:
        """Note what the store is about, for the table of what was met."""
        self.entries.append(["mark", what])


# --- what is done ---------------------------------------------------------------------------------------------------


def _watch_commits(recorder: Recorder) -> None:
    """Note when the writer's thread says that what was committed so far is in the file, and what it copies when."""
    from lash_store.commit import Batch, Committer

    commit, checkpoint = Committer.commit, Committer._checkpoint

    def committed(self: Committer, units: Any) -> Batch:
        batch = commit(self, units)
        recorder.entries.append(["committed"])
        return batch

    def checkpointed(self: Committer, patience: float) -> None:
        recorder.mark("checkpoint")
        checkpoint(self, patience)
        recorder.mark("checkpoint over")

    Committer.commit = committed  # type: ignore[method-assign]
    Committer._checkpoint = checkpointed  # type: ignore[method-assign]


def _sync_nothing() -> None:
    """Break durability altogether: the control that must be seen to damage files."""
    from lash_store import database

    pragma = database._pragma

    def set_off(connection: Any, name: str, value: object, expect: object = None) -> None:
        pragma(connection, name, 0 if name == "synchronous" else value, expect)

    database._pragma = set_off


def _acknowledge_early() -> None:
    """Break the order of acknowledgement and COMMIT: callers are answered, and a moment later it is committed."""
    from lash_store.commit import Committer
    from lash_store.database import Connection

    end, begin, run = Committer._end, Committer._begin, Connection.run

    def not_yet(self: Committer, tx: Any, *, wrote: bool) -> None:
        if not wrote:
            end(self, tx, wrote=wrote)

    def settle(raw: Any) -> None:
        if raw.in_transaction:
            raw.execute("COMMIT").fetchall()

    def settle_first(self: Committer, patience: float) -> None:
        settle(self._raw)
        begin(self, patience)

    async def run_and_settle(self: Connection, function: Any) -> Any:
        result = await run(self, function)

        def late(raw: Any) -> None:
            time.sleep(0.003)
            settle(raw)

        if self._running:
            soon = asyncio.ensure_future(run(self, late))
            soon.add_done_callback(lambda done: done.cancelled() or done.exception())
        return result

    Committer._end = not_yet  # type: ignore[method-assign]
    Committer._begin = settle_first  # type: ignore[method-assign]
    Connection.run = run_and_settle  # type: ignore[method-assign]


def _live(path: Path, kind: str, seed: int, life: int, lives: int, operations: int, saved: Path) -> None:
    """Live one life on *path*, in this process, and leave the record of it in *saved*."""
    from lash_store import commit, spawning

    from .workload import Workload

    rng = random.Random(f"{seed} {life}")
    recorder = Recorder(str(path.parent), life)
    is_last = life == lives - 1
    begun = ["log", ["K", f"life{life - 1}"]] if life else None

    def save() -> None:
        entries = ([begun] if begun else []) + recorder.entries[:]
        (saved / f"{life}.bin").write_bytes(bytes(recorder.blob))
        (saved / f"{life}.json").write_text(json.dumps(entries))

    recorder.save = save
    vfs.install(recorder)
    recorder.watch_names()
    _watch_commits(recorder)
    # a checkpoint every few commits, where a store has one every few hundred
    commit._CHECKPOINT_PAGES = rng.choice([60, 120, 240])
    # what has no id of its own is known by its label, so that it can be asked for before it is made
    setattr(spawning, "new_id", lambda what: what)  # noqa: B010
    if kind == "off":
        _sync_nothing()
    elif kind == "early":
        _acknowledge_early()
    # what is killed is killed in the middle of a commit
    dies = None if is_last or seed % 4 == 3 else rng.randint(1, 24)
    work = Workload(recorder, rng, f"life{life}", "normal" if kind == "normal" else "full")
    asyncio.run(work.run(path, operations, dies))
    save()


def _fork(function: Callable[[], None]) -> int:
    """Run *function* in a forked process, and return how that ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # what the server made ready is the server's to clear up
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def record(folder: Path, kind: str, seed: int, *, lives: int = 2, operations: int = 40) -> Path:
    """Record the lives of one file, and return where the record is: ``record.json`` and ``record.bin`` in it."""
    saved = folder / f"{kind}-{seed}"
    place = saved / "file"
    place.mkdir(parents=True)
    path = place / "agent.db"
    entries: list[list[Any]] = []
    with (saved / "record.bin").open("wb") as blob:
        for life in range(lives):
            ended = _fork(lambda life=life: _live(path, kind, seed, life, lives, operations, saved))  # type: ignore[misc]
            if ended not in (0, 9):
                raise RuntimeError(f"life {life} of {kind} {seed} ended with {ended}")
            part = json.loads((saved / f"{life}.json").read_text())
            moved, before = blob.tell(), len(entries)
            for entry in part:
                if entry[0] == "write":
                    entry[3] += moved
                elif entry[0] in ("sync", "folder", "fsync"):
                    entry[2] += before + (part[0][0] == "log")
            entries += part
            blob.write((saved / f"{life}.bin").read_bytes())
            for name in (f"{life}.json", f"{life}.bin"):
                (saved / name).unlink()
    about = {"kind": kind, "seed": seed, "path": str(path), "folder": str(place), "entries": entries}
    (saved / "record.json").write_text(json.dumps(about))
    return saved


def _begin(folder: Path) -> Recorder:
    """Begin to record what this process does in a folder."""
    recorder = Recorder(str(folder), 0)
    vfs.install(recorder)
    recorder.watch_names()
    return recorder


def _warm() -> None:
    """Import all that a life needs, so that a fork has it."""

    from . import workload  # noqa: F401


def main(folder: str, operations: str) -> int:
    """Record what standard input asks for, a line of KIND:SEED each, and say where each record is."""
    reason = vfs.available()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    _warm()
    for line in sys.stdin:
        kind, _, seed = line.strip().partition(":")
        if kind in exchanges.EXCHANGES:
            saved = Path(folder) / kind.replace(" ", "-")
            exchanges.record(saved, kind, _fork, _begin)
            print(saved, flush=True)
            continue
        print(record(Path(folder), kind, int(seed), operations=int(operations)), flush=True)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(*sys.argv[1:]))
