"""Tries everything that opens a file on a damaged one, in a process of its own; says what came of each way, and what is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import io
import json
import os
import random
import resource
import shutil
import sqlite3
import stat
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lash_store import StoreError, TaskStore, guards
from lash_store.cli import main
from lash_store.cli.reading import events_so_far

from .files import BYSTANDER, Case, build
from .seeds import NAME, RUNTIME, register

__all__ = ["MEMORY", "WAYS", "Trial", "harmless", "run_case"]

MEMORY = 1_500_000_000
"""Bytes of address space that a trial may add to what the process has: what blows up ends in a `MemoryError`."""

CANARY = "nobody writes this\n"


class Wrong(Exception):
    """What a file did that no file may do."""


class Trial:
    """One way of opening one file: where it is, and what came of it."""

    def __init__(self, path: Path, seeds: Mapping[str, Path], chance: random.Random) -> None:
        self.path = path
        self.seeds = seeds
        self.chance = chance
        self.errors: list[str] = []
        self.seen: set[str] = set()
        self.is_refused = False

    async def ask(self, call: Awaitable[Any], *, timeout: float = 8.0) -> Any:
        """Await one call; an error of the store's own tree is an answer, which is noted, and anything else goes on up."""
        try:
            async with asyncio.timeout(timeout):
                return await call
        except StoreError as error:
            self._note(error)
            return None
        except TimeoutError as error:
            raise Wrong(f"{getattr(call, '__qualname__', call)} did not come back in {timeout:g} s") from error

    def _note(self, error: StoreError) -> None:
        said = str(error)
        if ":" not in said and "see " not in said:
            raise Wrong(f"an error that names no next step: {type(error).__name__}: {said}")
        if len(said) > 20_000:
            raise Wrong(f"an error of {len(said)} characters: {said[:200]}")
        self.errors.append(type(error).__name__)

    async def open(self, store: TaskStore) -> bool:
        """Open a store; False if it was refused."""
        await self.ask(store.open(), timeout=12.0)
        if self.errors:
            self.is_refused = True
            return False
        return True


Way = Callable[[Trial], None]
WAYS: dict[str, Way] = {}


def _way(way: Way) -> Way:
    WAYS[way.__name__.strip("_")] = way
    return way


# --- in the program -------------------------------------------------------------------------------------------------


@_way
def _read(trial: Trial) -> None:
    async def look() -> None:
        store = TaskStore.open_readonly(trial.path, runtime=RUNTIME)
        if not await trial.open(store):
            return
        try:
            await _look_around(trial, store)
            report = await trial.ask(store.check())
            if report is not None and report.findings:
                trial.seen.add("a check found something")
        finally:
            await store.close()

    asyncio.run(look())


async def _look_around(trial: Trial, store: TaskStore) -> None:
    sessions = await trial.ask(store.sessions()) or []
    await trial.ask(store.count())
    records = await trial.ask(store.list()) or []
    for record in records[:12]:
        await trial.ask(store.get(record.scope, record.id))
        handle = await trial.ask(store.handle(record.scope, record.id))
        if handle is not None:
            await trial.ask(handle.record())
        await trial.ask(store.steps(record.task_seq))
        await trial.ask(store.updates(record.task_seq))
    for session in sessions[:5]:
        if session.scope.runtime != RUNTIME:
            continue
        view = await trial.ask(store.session(session.scope.session_id))
        if view is not None:
            await trial.ask(view.list(include_terminal=True, include_hidden=True))
            await trial.ask(view.notes(unread=False))
            await trial.ask(view.monitors())
            await trial.ask(view.updates(unread=False))
            await trial.ask(view.sync_needed())

    async def all_events() -> None:
        count = 0
        async for _ in events_so_far(store):
            count += 1
            if count > 3000:
                return

    await trial.ask(all_events())


@_way
def _request(trial: Trial) -> None:
    async def ask() -> None:
        store = TaskStore.connect(trial.path, runtime=RUNTIME, lock_timeout=2.0)
        if not await trial.open(store):
            return
        try:
            session = await trial.ask(store.session("s1"))
            if session is not None:
                await trial.ask(session.update("browser", progress="on", fraction=0.5))
                await trial.ask(session.cancel("browser", "enough", timeout=0.05))
                await trial.ask(session.complete("live 0", "completed", result=1))
                await trial.ask(session.abandon("child", "given up"))
            other = await trial.ask(store.session("s2"))
            if other is not None:
                handle = await trial.ask(other.handle("moved"))
                if handle is not None:
                    await trial.ask(handle.signal("go", {"a": 1}, key="k"))
                await trial.ask(other.cancel_all("all", timeout=0.05))
        finally:
            await store.close(timeout=2.0)

    asyncio.run(ask())


@_way
def _run(trial: Trial) -> None:
    async def work() -> None:
        store = TaskStore(
            trial.path, runtime=RUNTIME, lock_timeout=2.0, cancel_grace=0.1, callback_timeout=0.2,
            adopt=trial.chance.random() < 0.2,
        )  # fmt: skip
        body, _ = register(store)
        if not await trial.open(store):
            return
        try:
            if store.upgraded is not None:
                trial.seen.add("an older file was upgraded")
            await trial.ask(_recovered(trial, store))
            session = await trial.ask(store.session("s1"))
            if session is None:
                return
            handle = await trial.ask(session.spawn(body, "new", id="new"))
            if handle is not None:
                await trial.ask(handle.wait(timeout=4.0))
                await trial.ask(_result(handle))
            await trial.ask(session.register("yet another", "other"))
            await trial.ask(session.cancel_all("enough", timeout=0.3))
            await trial.ask(_notes(session))
            await trial.ask(session.close(timeout=0.3))
            await trial.ask(store.recover())
            await trial.ask(store.prune(older_than=0.0))
            await _look_around(trial, store)
        finally:
            if trial.errors:
                # an end that damage kept from the file is given up at the close, which says so
                warnings.filterwarnings("ignore", r"\d+ bodies did not end within", ResourceWarning)
            await trial.ask(store.close(timeout=1.0), timeout=10.0)

    asyncio.run(work())


async def _recovered(trial: Trial, store: TaskStore) -> None:
    if store.recovered is not None and store.recovered.dead_owners:
        trial.seen.add("a dead owner's work was recovered")


async def _result(handle: Any) -> None:
    await handle.result(timeout=4.0)


async def _notes(session: Any) -> None:
    async with session.inbox() as notes:
        len(notes)


# --- on the command line --------------------------------------------------------------------------------------------

LOOKS: tuple[tuple[str, ...], ...] = (
    ("sessions",), ("sessions", "--json"), ("list", "--all"), ("list", "--all", "--json"), ("show", "#1"),
    ("show", "#3", "--json"), ("show", "desktop:s1", "index"), ("tree",), ("tree", "--json"), ("top", "--once"), ("events",),
    ("events", "--json"), ("notes", "--all"), ("stats",), ("stats", "--json"), ("timeline",), ("export",), ("current",),
    ("schema",), ("doctor",), ("doctor", "--json"), ("backup", "--help"),
)  # fmt: skip


def harmless(text: str) -> bool:
    """Say whether a terminal only shows it: nothing but printable characters and newlines."""
    return all(char == "\n" or char.isprintable() for char in text)


def command(trial: Trial, *arguments: str) -> int:
    """Run a command in this process; its output must be harmless, and an error one clear line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["--db", str(trial.path), *arguments])
    for text in (out.getvalue(), err.getvalue()):
        if not harmless(text):
            raise Wrong(f"{arguments} printed what a terminal obeys: {[c for c in text if not harmless(c)][:5]}")
    if "Traceback" in err.getvalue():
        # rows have tracebacks, too, and those are told on stdout
        raise Wrong(f"{arguments} printed a traceback: {err.getvalue()[-900:]}")
    if status not in {0, 1, 3}:
        raise Wrong(f"{arguments} ended with {status}: {err.getvalue()[:500]}")
    if status == 1 and not err.getvalue() and arguments[0] != "doctor":
        raise Wrong(f"{arguments} ended with 1 and said nothing")
    if status:
        trial.errors.append(f"exit {status}")
    return status


@_way
def _look(trial: Trial) -> None:
    for arguments in trial.chance.sample(LOOKS, 4):
        command(trial, *arguments)
    target = trial.path.parent.parent / "drawn.svg"
    if trial.chance.random() < 0.3:
        command(trial, "timeline", "desktop:s1", "-o", str(target))
        target.unlink(missing_ok=True)
    trial.is_refused = bool(trial.errors)


@_way
def _repair(trial: Trial) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command(trial, "doctor", "--repair")
    if not trial.errors:
        trial.seen.add("the doctor ended content")


@_way
def _backup(trial: Trial) -> None:
    target = trial.path.parent.parent / "backup.db"
    status = command(trial, "backup", str(target))
    try:
        if status and target.exists():
            raise Wrong("a backup that failed left a file")
        if not status:
            trial.seen.add("a backup was made")
            _is_whole(target)
    finally:
        for one in target.parent.glob("backup.db*"):
            shutil.rmtree(one) if one.is_dir() else one.unlink()
    trial.is_refused = bool(status)


@_way
def _restore_it(trial: Trial) -> None:
    """Use the damaged file as the backup of a sound one."""
    target = trial.path.parent.parent / "restored" / NAME
    shutil.copytree(trial.seeds["closed"], target.parent)
    before = _bytes(target)
    victim = Trial(target, trial.seeds, trial.chance)
    try:
        status = command(victim, "restore", str(trial.path), "--yes")
        if status and _bytes(target) != before:
            raise Wrong("a restore that was refused changed the file")
        if not status:
            trial.seen.add("a backup was put back")
            _is_whole(target)
    finally:
        shutil.rmtree(target.parent)
    trial.errors += victim.errors
    trial.is_refused = bool(status)


@_way
def _restore_over(trial: Trial) -> None:
    """Put a sound backup in the place of the damaged file."""
    backup = trial.path.parent.parent / "sound.db"
    shutil.copyfile(trial.seeds["copy"] / NAME, backup)
    try:
        status = command(trial, "restore", str(backup), "--yes")
        if not status:
            trial.seen.add("what was damaged was put right")
            _is_whole(trial.path)
    finally:
        for one in backup.parent.glob("sound.db*"):
            one.unlink()
    trial.is_refused = bool(status)


def _is_whole(path: Path) -> None:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        found = connection.execute("PRAGMA integrity_check(1)").fetchall()
    if found != [("ok",)]:
        raise Wrong(f"what was made is not whole: {found}")


@_way
def _prune(trial: Trial) -> None:
    command(trial, "prune", "--older-than", "0s")


@_way
def _upgrade(trial: Trial) -> None:
    trial.is_refused = bool(command(trial, "upgrade"))


READERS = frozenset({"read", "look", "backup", "restore_it"})
"""These change no byte of the file or its -wal, whatever comes of them."""

OPENERS = frozenset({"request", "run", "upgrade", "restore_over"})
"""These change no row if they are refused; what a dead process left in a -wal may have come into the file."""

UNTOUCHED = frozenset({"NotAStore", "SchemaTooNew", "SchemaTooOld", "StoreCopied"})
"""What is refused for these reasons is as it was to the byte."""


# --- what may not be ------------------------------------------------------------------------------------------------


def _bytes(path: Path) -> dict[str, str]:
    """Return a digest of a file and of its -wal; one that is empty is as good as none."""
    found = {}
    for one in (path, Path(f"{path}-wal")):
        with contextlib.suppress(OSError):
            if stat.S_ISREG(one.stat().st_mode) and (content := one.read_bytes()):
                found[one.name] = hashlib.sha256(content).hexdigest()
    return found


def _outside(folder: Path) -> dict[str, Any]:
    return {
        str(one.relative_to(folder)): (one.lstat().st_mode, one.read_bytes() if one.is_file() else None)
        for one in [folder, *folder.rglob("*")]
    }


def _names(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


def _content(path: Path) -> dict[str, Any]:
    """Return a digest of the rows of each table, read from a copy; of what cannot be read, nothing."""
    found: dict[str, Any] = {}
    copy = path.parent.parent / "copy"
    copy.mkdir(mode=0o700)
    try:
        for suffix in ("", "-wal"):
            side = Path(f"{path}{suffix}")
            if side.is_file() and os.access(side, os.R_OK):
                shutil.copyfile(side, copy / f"{NAME}{suffix}")
        with closing(sqlite3.connect(copy / NAME)) as connection:
            connection.text_factory = bytes
            # a view in the place of a table may never end
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'table' AND rootpage > 0"
            ).fetchall():
                with contextlib.suppress(sqlite3.Error):
                    rows = connection.execute(f'SELECT * FROM "{name.decode()}"').fetchall()
                    found[name.decode()] = (len(rows), hashlib.sha256(repr(rows).encode()).hexdigest()[:12])
    except (sqlite3.Error, UnicodeDecodeError, OSError):
        pass
    finally:
        shutil.rmtree(copy)
    return found


def _differ(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    if before.get("lash_store_version") != after.get("lash_store_version"):
        # it was upgraded, and refused only then
        return {}
    # who opened the file and then found it damaged stands in it as an owner that has ended
    names = before.keys() & after.keys() - {"owners", "sqlite_sequence"}
    return {name: (before[name], after[name]) for name in sorted(names) if after[name] != before[name]}


def _left_open(folder: Path) -> list[str]:
    gc.collect()
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(str(folder)):
                found.append(str(link.readlink()))
    for thread in threading.enumerate():
        if thread.name.startswith("lash_store"):
            thread.join(1.0)
            if thread.is_alive():
                found.append(thread.name)
    return found + [str(identity) for identity in guards._held]


def _try(name: str, case: Case | None, folder: Path, seeds: Mapping[str, Path], source: Path | None) -> dict[str, Any]:
    """Make the file once more, go one way, and look what became of it."""
    begun = time.monotonic()
    inside, outside = folder / "in", folder / "outside"
    for one in (inside, outside):
        one.mkdir(mode=0o700)
    (outside / "canary").write_text(CANARY)
    # a picture is drawn where one stands
    os.chdir(folder)
    if case is not None:
        path, _ = build(case, inside, seeds)
    else:
        assert source is not None
        shutil.copytree(source, inside, dirs_exist_ok=True, symlinks=True)
        path = inside / NAME
    chance = random.Random(f"{case} {name}")
    trial = Trial(path, seeds, chance)
    before, around, shape, content = _bytes(path), _outside(outside), _names(inside), _content(path)
    wrong: list[str] = []
    try:
        WAYS[name](trial)
    except Wrong as error:
        wrong.append(str(error))
    except MemoryError:
        wrong.append(f"memory blew up: {traceback.format_exc()[-1500:]}")
    except BaseException:
        wrong.append(traceback.format_exc()[-2500:])
    after = _bytes(path)
    is_quiet = name in READERS or (trial.is_refused and trial.errors[0] in UNTOUCHED)
    if is_quiet and after != before:
        wrong.append(f"the file or its -wal changed, by {name} ({trial.errors[:3]}): {before} {after}")
    if trial.is_refused and name in OPENERS and after != before and (differ := _differ(content, _content(path))):
        wrong.append(f"what {name} refused ({trial.errors[:3]}) has other rows now: {differ}")
    made = {one for one in _names(inside) - shape if not one.endswith(("-wal", "-shm"))}
    if name in READERS and made:
        wrong.append(f"{name} made {sorted(made)}")
    if _outside(outside) != around:
        wrong.append(f"something outside of the folder changed: {sorted(_outside(outside))}")
    if name in {"request", "run"} and BYSTANDER in content:
        now = _content(path).get(BYSTANDER)
        if now is not None and now != content[BYSTANDER]:
            trial.seen.add("a trigger changed the program's rows")
    if left := _left_open(folder):
        wrong.append(f"left open: {left}")
    return {
        "way": name,
        "seconds": round(time.monotonic() - begun, 3),
        "outcome": trial.errors[0] if trial.errors else "worked",
        "refused": trial.is_refused,
        "seen": sorted(trial.seen),
        "wrong": wrong,
    }


def _remove(folder: Path) -> None:
    for one in folder.rglob("*"):
        if not one.is_symlink() and one.is_dir():
            one.chmod(0o700)
    shutil.rmtree(folder)


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run_case(
    case: Case | None, folder: Path, seeds: Mapping[str, Path], ways: Iterator[str] | list[str], source: Path | None
) -> Iterator[dict[str, Any]]:
    """Go all ways with one file, in this process, which is nobody else's; yield what each comes to, and before it its name."""
    _limit_memory()
    os.environ.pop("LASH_STORE_DB", None)
    warnings.simplefilter("error", ResourceWarning)
    for name in ways:
        yield {"begin": name}
        here = folder / name
        here.mkdir(mode=0o700)
        try:
            yield _try(name, case, here, seeds, source)
        finally:
            _remove(here)


def say(descriptor: int, words: Mapping[str, Any]) -> None:
    """Write one line to whoever watches."""
    data = json.dumps(words).encode() + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]
