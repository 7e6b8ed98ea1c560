"""What is given as a path, and what stands where the store makes files: nothing else is opened, and all it makes is private."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lash_store import StorageError, StoreError, TaskStore
from tests.acceptance.commands import assert_harmless, run
from tests.fuzz.seeds import NAME, RUNTIME, register

SMUGGLED = [
    "file:made.db?mode=memory&cache=shared",
    "file:///nowhere/made.db?vfs=unix-none",
    "file:made.db",
    ":memory:",
]

PLAIN = [
    "FILE:made.db",
    "made.db?mode=memory",
    "made.db?vfs=unix-none&nolock=1",
    "%2e%2e%2fmade.db",
    "made#1.db",
    "-db",
    "a b;c.db",
    "é.db",
]
"""Odd, and a name like any other: a file of just that name is made, and nothing else."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed store."""
    path = tmp_path_factory.mktemp("made") / NAME

    async def make() -> None:
        async with TaskStore(path, runtime=RUNTIME) as store:
            await store.session("s1")

    asyncio.run(make())
    return path


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of its own to work in, with a store in it, and one beside it that nobody may touch."""
    folder, outside = tmp_path / "in", tmp_path / "outside"
    folder.mkdir(mode=0o700)
    outside.mkdir(mode=0o700)
    (outside / "canary").write_text("nobody writes this\n")
    shutil.copy(made, folder / NAME)
    monkeypatch.chdir(folder)
    yield folder
    assert [one.name for one in outside.iterdir()] == ["canary"]
    assert (outside / "canary").read_text() == "nobody writes this\n"


@pytest.mark.parametrize("path", SMUGGLED)
async def test_a_uri_is_no_path_whoever_is_given_it(here: Path, path: str) -> None:
    before = sorted(here.rglob("*"))

    with pytest.raises(StorageError, match="not the path of a file"):
        TaskStore(path, runtime=RUNTIME)
    with pytest.raises(StorageError, match="not the path of a file"):
        TaskStore.open_readonly(path)
    with pytest.raises(StorageError, match="not the path of a file"):
        TaskStore.connect(path, runtime=RUNTIME)
    async with TaskStore.open_readonly(here / NAME) as store:
        with pytest.raises(StoreError, match="not the path of a file"):
            await store.backup(path)
    for one, other in ((path, here / "new.db"), (here / NAME, path)):
        with pytest.raises(StorageError, match="not the path of a file"):
            await TaskStore.restore(one, other)

    made = {one for one in sorted(here.rglob("*")) if one not in before}
    assert {one.name for one in made} <= {f"{NAME}-wal", f"{NAME}-shm"}


@pytest.mark.parametrize("path", SMUGGLED)
def test_a_uri_is_no_path_on_the_command_line(here: Path, path: str) -> None:
    for arguments in (["list"], ["doctor"], ["upgrade"], ["export"], ["prune"], ["restore", NAME, "--yes"]):
        done = run("--db", path, *arguments)
        assert (done.returncode, done.stdout) == (1, ""), arguments
        assert_harmless(done.stderr)
    for arguments in (["backup", path], ["restore", path, "--yes"]):
        assert run(*arguments, db=here / NAME).returncode == 1, arguments
    assert {one.name for one in here.iterdir()} <= {NAME, f"{NAME}-wal", f"{NAME}-shm", f"{NAME}-owners"}


@pytest.mark.parametrize("path", PLAIN)
async def test_an_odd_name_is_a_name(here: Path, path: str) -> None:
    async with TaskStore(path, runtime=RUNTIME) as store:
        await store.session("s1")

    assert (here / path).is_file()
    others = {one.name for one in here.iterdir()} - {NAME}
    assert all(name.startswith(path) for name in others), others


PLACES = ["-wal", "-shm", "-journal", "-owners", "-making", "-owners/making.lock"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("target", ["canary", "made", "."])
@pytest.mark.parametrize("is_there", [True, False])
async def test_a_link_planted_where_the_store_makes_a_file_is_not_written_through(
    here: Path, place: str, target: str, is_there: bool
) -> None:
    path = here / NAME
    if not is_there:
        path.unlink()
    link = Path(f"{path}{place}")
    link.parent.mkdir(exist_ok=True, mode=0o700)
    link.symlink_to(here.parent / "outside" / target)

    # it is opened, or refused in the package's words: what no other error may be raised for
    store = TaskStore(path, runtime=RUNTIME, lock_timeout=1.0)
    with contextlib.suppress(StoreError):
        async with store:
            await store.session("s1")


@pytest.mark.parametrize("command", [["export", "-o"], ["timeline", "-o"], ["backup"]])
def test_what_a_command_writes_goes_through_no_planted_link(here: Path, command: list[str]) -> None:
    Path("out.svg").symlink_to(here.parent / "outside" / "made")

    done = run(*command, "out.svg", db=here / NAME)

    assert done.returncode in {0, 1}
    assert_harmless(done.stderr)


async def test_everything_that_is_made_is_its_owners_alone_whatever_the_umask(here: Path) -> None:
    umask = os.umask(0)
    try:
        path = here / "mine.db"
        store = TaskStore(path, runtime=RUNTIME)
        work, _ = register(store)
        async with store:
            session = await store.session("s1")
            await (await session.spawn(work, "x")).result()  # type: ignore[arg-type]
            await store.backup(here / "backup.db")
            assert_private(here)
        await asyncio.to_thread(run, "export", "-o", str(here / "export.jsonl"), db=path)
        await asyncio.to_thread(run, "downgrade", "0003", "--yes", db=path)
        await asyncio.to_thread(run, "upgrade", db=path)
        await TaskStore.restore(here / "backup.db", path)
        assert_private(here)
    finally:
        os.umask(umask)
    names = {one.name for one in here.rglob("*")}
    assert {
        "mine.db",
        "mine.db-owners",
        "backup.db",
        "export.jsonl",
        "mine.db-0003.backup",
        "mine.db-replaced",
    } <= names


def assert_private(folder: Path) -> None:
    """Nothing of it but what the fixture put there may be read or written by anybody else."""
    for one in folder.rglob("*"):
        if one.name != NAME:
            mode = stat.S_IMODE(one.lstat().st_mode)
            assert mode & 0o077 == 0, f"{one.name} is {mode:04o}"
