"""Rules of the lock that says who is alive."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lash_store import guards, owners, processes
from lash_store.errors import StorageError
from lash_store.owners import Life, OwnerLock, describe_process, life_of
from lash_store.queries import OwnerRow

Spawn = Callable[..., "subprocess.Popen[str]"]


def owner(token: str, **known: Any) -> OwnerRow:
    """The row of an owner that has not ended; by default of a process that is not there."""
    gone = {"pid": 2**22 + 1, "process_start": "1", "boot_id": "", "host": "elsewhere"}
    return OwnerRow(owner_id=1, token=token, runtime="desktop", ended_at=None, end=None, **{**gone, **known})


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "agent.db"


@pytest.fixture
async def lock(db: Path) -> Any:
    """A lock this process holds."""
    held = OwnerLock(db)
    held.acquire()
    yield held
    held.release()


HOLDS = """
    import asyncio, os, sys
    from pathlib import Path
    from lash_store.owners import OwnerLock, describe_process

    async def hold():
        lock = OwnerLock(Path(sys.argv[1]))
        lock.acquire()
        return lock

    loop = asyncio.new_event_loop()
    lock = loop.run_until_complete(hold())
    known = describe_process()
    forked = 0
    if len(sys.argv) > 2:
        ready, child = os.pipe()
        forked = os.fork()
        if forked == 0:
            os.write(child, b"1")
            sys.stdin.readline()
            os._exit(0)
        os.read(ready, 1)
    print(lock.token, known["process_start"], known["boot_id"], known["host"], forked, flush=True)
    sys.stdin.readline()
    loop.close()
"""


class Holder:
    """A process that holds a lock on the database, and the row it would have."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        token, start, boot, host, forked = process.stdout.readline().split()
        self.forked = int(forked)
        self.row = owner(token, pid=process.pid, process_start=start, boot_id=boot, host=host)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)


@pytest.fixture
def holder(db: Path, spawn: Spawn) -> Holder:
    return Holder(spawn(HOLDS, db))


def test_an_owner_in_another_process_is_alive(db: Path, holder: Holder) -> None:
    assert life_of(db, holder.row) is Life.ALIVE


def test_a_killed_owner_is_dead_at_once(db: Path, holder: Holder) -> None:
    holder.kill()

    assert life_of(db, holder.row) is Life.DEAD


def test_a_stopped_owner_is_not_dead(db: Path, holder: Holder) -> None:
    os.kill(holder.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, holder.process.pid, os.WSTOPPED)

    assert life_of(db, holder.row) is Life.ALIVE


@pytest.fixture
def forking(db: Path, spawn: Spawn) -> Iterator[Holder]:
    holder = Holder(spawn(HOLDS, db, "fork"))
    yield holder
    os.kill(holder.forked, signal.SIGKILL)


def test_a_forked_child_does_not_keep_its_parent_alive(db: Path, forking: Holder) -> None:
    forking.kill()
    os.kill(forking.forked, 0)

    assert life_of(db, forking.row) is Life.DEAD


def test_a_forked_child_does_not_end_its_parents_life(db: Path, forking: Holder) -> None:
    os.kill(forking.forked, signal.SIGKILL)
    while Path(f"/proc/{forking.forked}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] != "Z":
        os.sched_yield()

    assert life_of(db, forking.row) is Life.ALIVE


def test_a_subprocess_does_not_keep_its_parent_alive(db: Path, spawn: Spawn) -> None:
    script = HOLDS.replace(
        "forked = 0\n", "import subprocess; forked = subprocess.Popen(['cat'], close_fds=False).pid\n"
    )
    holder = Holder(spawn(script, db))
    try:
        holder.kill()
        os.kill(holder.forked, 0)

        assert life_of(db, holder.row) is Life.DEAD
    finally:
        os.kill(holder.forked, signal.SIGKILL)


def test_asking_does_not_hide_a_death_from_others_who_ask(db: Path, holder: Holder) -> None:
    holder.kill()

    assert [life_of(db, holder.row) for _ in range(3)] == [Life.DEAD] * 3


def test_askers_do_not_take_each_other_for_the_owner(db: Path, holder: Holder) -> None:
    side = guards.side_folder(db) / f"{holder.row.token}.lock"
    holder.kill()
    asker = os.open(side, os.O_RDONLY)
    try:
        fcntl.flock(asker, fcntl.LOCK_SH | fcntl.LOCK_NB)

        assert life_of(db, holder.row) is Life.DEAD
    finally:
        os.close(asker)


# --- the side file --------------------------------------------------------------------------------------------------


async def test_an_owner_of_this_process_is_alive(db: Path, lock: OwnerLock) -> None:
    assert life_of(db, owner(lock.token)) is Life.ALIVE


async def test_a_released_lock_is_dead(db: Path, lock: OwnerLock) -> None:
    lock.release()

    assert life_of(db, owner(lock.token)) is Life.DEAD


def test_a_body_that_a_closed_owner_left_may_run_on_while_its_process_lives() -> None:
    parent = {"pid": os.getppid(), "process_start": processes.started(os.getppid())}
    here = {**describe_process(), **parent}
    closed = {"ended_at": "2025-01-01T00:00:00.000Z", "end": "closed"}

    assert owners.runs_on(owner("o-1", **here)._replace(**closed), 1)
    assert not owners.runs_on(owner("o-1", **{**here, "process_start": "another"})._replace(**closed), 1)
    assert not owners.runs_on(owner("o-1", **here)._replace(**{**closed, "end": "died"}), 1)
    # of its own bodies this process knows
    assert not owners.runs_on(owner("o-1", **describe_process())._replace(**closed), 1)


async def test_a_body_that_outlived_its_store_runs_on_until_it_has_ended(lock: OwnerLock) -> None:
    left = {7}
    lock.outlived(left.__contains__)
    closed = owner(lock.token, **describe_process())

    assert owners.runs_on(closed, 7)
    assert not owners.runs_on(closed, 8)
    left.clear()
    assert not owners.runs_on(closed, 7)


async def test_what_outlived_a_store_whose_loop_is_closed_is_forgotten(
    db: Path, lock: OwnerLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "_outlived", {})

    async def leave() -> None:
        OwnerLock(db).outlived(lambda _: True)

    await asyncio.to_thread(asyncio.run, leave())
    assert len(owners._outlived) == 1
    lock.outlived(lambda _: True)
    assert list(owners._outlived.values()) == [lock]


def test_an_owner_whose_event_loop_is_closed_is_dead(db: Path) -> None:
    async def take() -> OwnerLock:
        lock = OwnerLock(db)
        lock.acquire()
        return lock

    lock = asyncio.run(take())
    try:
        assert life_of(db, owner(lock.token)) is Life.DEAD
        owners.release_orphans({lock.token})
        assert life_of(db, owner(lock.token)) is Life.DEAD
    finally:
        lock.release()


async def test_a_living_loops_lock_is_no_orphan(db: Path, lock: OwnerLock) -> None:
    owners.release_orphans({lock.token})

    assert life_of(db, owner(lock.token)) is Life.ALIVE


async def test_only_its_user_can_look_at_a_side_file(lock: OwnerLock) -> None:
    assert stat.S_IMODE(lock.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(lock.path.parent.stat().st_mode) == 0o700


async def test_two_owners_of_one_process_have_a_life_each(db: Path, lock: OwnerLock) -> None:
    other = OwnerLock(db)
    other.acquire()
    other.release()

    assert life_of(db, owner(lock.token)) is Life.ALIVE
    assert life_of(db, owner(other.token)) is Life.DEAD


MAKES_AGAIN = """
    import asyncio, sys
    from pathlib import Path
    from lash_store.owners import OwnerLock

    async def main():
        lock = OwnerLock(Path(sys.argv[1]))
        lock.acquire()
        print(lock.token, flush=True)
        sys.stdin.readline()
        lock.keep()
        print("kept", flush=True)
        sys.stdin.readline()

    asyncio.run(main())
"""


@pytest.mark.parametrize("removed", ["the file", "the folder", "the file, for another"])
def test_a_removed_side_file_is_made_again(db: Path, spawn: Spawn, removed: str) -> None:
    process = spawn(MAKES_AGAIN, db)
    token = process.stdout.readline().strip()
    side = guards.side_folder(db) / f"{token}.lock"
    side.unlink()
    if removed == "the folder":
        side.parent.rmdir()
    if removed == "the file, for another":
        side.touch()

    process.stdin.write("keep\n")
    process.stdin.flush()
    assert process.stdout.readline() == "kept\n"

    assert life_of(db, owner(token)) is Life.ALIVE
    process.kill()
    process.wait(timeout=10)
    assert life_of(db, owner(token)) is Life.DEAD


async def test_keeping_what_is_there_changes_nothing(lock: OwnerLock) -> None:
    before = lock.path.stat()

    lock.keep()

    assert lock.path.stat().st_ino == before.st_ino
    assert [found.name for found in lock.path.parent.iterdir()] == [lock.path.name]


def another_process() -> dict[str, str | int]:
    """Describe one that lives, and is not this."""
    parent = os.getppid()
    return {**describe_process(), "pid": parent, "process_start": processes.started(parent) or ""}


def test_an_owner_without_its_file_whose_process_lives_is_not_dead(db: Path) -> None:
    assert life_of(db, owner("o-gone", **another_process())) is Life.UNREACHABLE


def test_an_owner_that_this_process_should_be_and_does_not_know_came_with_a_copy_and_is_dead(db: Path) -> None:
    assert life_of(db, owner("o-gone", **describe_process())) is Life.DEAD


def _folder_is_a_file(db: Path) -> None:
    guards.side_folder(db).rmdir()
    guards.side_folder(db).write_text("not ours")


def _folder_is_a_link_to_a_file(db: Path) -> None:
    guards.side_folder(db).rmdir()
    guards.side_folder(db).symlink_to(db)


def _file_is_a_link(db: Path) -> None:
    (guards.side_folder(db) / "o-gone.lock").symlink_to(db)


@pytest.mark.parametrize("put", [_folder_is_a_file, _folder_is_a_link_to_a_file, _file_is_a_link])
def test_with_something_else_in_the_place_of_its_file_an_owner_lives_as_long_as_its_process(
    db: Path, put: Callable[[Path], None]
) -> None:
    guards.make_side_folder(db)
    put(db)
    assert life_of(db, owner("o-gone", **another_process())) is Life.UNREACHABLE
    assert life_of(db, owner("o-gone", **{**another_process(), "process_start": "12345"})) is Life.DEAD


def test_an_owner_whose_file_cannot_be_looked_at_is_not_dead(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bool:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("lash_store.owners.is_held", refuse)
    # it may be a process that cannot be seen from here
    assert life_of(db, owner("o-gone", **{**another_process(), "host": "another host"})) is Life.UNREACHABLE


def test_a_pipe_in_the_place_of_a_lock_makes_nobody_wait(db: Path) -> None:
    os.mkfifo(guards.make_side_folder(db) / "o-gone.lock", 0o600)
    assert life_of(db, owner("o-gone", **another_process())) is Life.DEAD


def test_a_pid_that_was_given_again_is_not_the_owner(db: Path) -> None:
    known = {**another_process(), "process_start": "12345"}

    assert life_of(db, owner("o-gone", **known)) is Life.DEAD


@pytest.mark.parametrize("changed", [{"boot_id": "another boot"}, {"host": "another host"}], ids=repr)
def test_a_process_before_a_reboot_or_on_another_host_is_not_this_one(db: Path, changed: dict[str, str]) -> None:
    assert life_of(db, owner("o-gone", **{**another_process(), **changed})) is Life.DEAD


def test_a_zombie_without_its_file_is_dead(db: Path, holder: Holder) -> None:
    (guards.side_folder(db) / f"{holder.row.token}.lock").unlink()
    assert life_of(db, holder.row) is Life.UNREACHABLE
    holder.process.kill()
    os.waitid(os.P_PID, holder.process.pid, os.WEXITED | os.WNOWAIT)

    assert life_of(db, holder.row) is Life.DEAD


def test_a_folder_that_is_a_file_is_refused(db: Path) -> None:
    guards.side_folder(db).touch()

    async def take() -> None:
        OwnerLock(db).acquire()

    with pytest.raises(StorageError, match=r"agent\.db-owners"):
        asyncio.run(take())


def test_a_folder_that_is_a_link_is_refused(db: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    guards.side_folder(db).symlink_to(tmp_path / "elsewhere")

    async def take() -> None:
        OwnerLock(db).acquire()

    with pytest.raises(StorageError):
        asyncio.run(take())
    assert not list((tmp_path / "elsewhere").iterdir())


# --- sweeping -------------------------------------------------------------------------------------------------------


def test_a_sweep_removes_the_files_of_the_dead_and_no_others(db: Path, spawn: Spawn) -> None:
    dead, living = Holder(spawn(HOLDS, db)), Holder(spawn(HOLDS, db))
    dead.kill()

    owners.sweep(db, [dead.row.token, living.row.token, "o-never"])

    assert [found.stem for found in guards.side_folder(db).iterdir()] == [living.row.token]
    assert life_of(db, living.row) is Life.ALIVE


async def test_a_sweep_leaves_what_it_was_not_told_of(db: Path, lock: OwnerLock) -> None:
    lock.release()

    owners.sweep(db, [])

    assert lock.path.exists()


async def test_what_nobody_holds_and_nobody_knows_is_left_behind(db: Path, lock: OwnerLock, spawn: Spawn) -> None:
    dead, living = Holder(spawn(HOLDS, db)), Holder(spawn(HOLDS, db))
    dead.kill()
    folder = guards.side_folder(db)
    for name in ("o-half.new", "o-known.lock", "making.lock", "o-notes.txt"):
        (folder / name).touch()

    assert owners.left_behind(db, {"o-known"}) == sorted([dead.row.token, "o-half"])

    owners.sweep(db, owners.left_behind(db, {"o-known"}))
    expected = {"o-known.lock", "making.lock", "o-notes.txt", f"{lock.token}.lock", f"{living.row.token}.lock"}
    assert {found.name for found in folder.iterdir()} == expected


async def test_who_is_swept_before_it_had_its_lock_makes_its_file_again(
    db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, real = OwnerLock(db), fcntl.flock
    sweeps = [lambda: owners.sweep(db, [lock.token])] * 2

    def flock(descriptor: int, how: int) -> None:
        if sweeps and how == fcntl.LOCK_EX | fcntl.LOCK_NB:
            sweeps.pop()()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock.acquire()
    monkeypatch.undo()

    assert [found.name for found in guards.side_folder(db).iterdir()] == [f"{lock.token}.lock"]
    assert owners.left_behind(db, set()) == []
    lock.release()
    assert owners.left_behind(db, set()) == [lock.token]


async def test_an_owner_removes_its_own_file(lock: OwnerLock) -> None:
    lock.remove()
    lock.remove()

    assert not lock.path.exists()


@pytest.mark.parametrize("token", ["{elsewhere}", "../poetry", "a/../../poetry", ".", "", "a\0b"])
def test_a_token_that_leads_out_of_the_folder_is_a_dead_owners_and_unlinks_nothing(
    path: Path, tmp_path: Path, token: str
) -> None:
    victim = tmp_path / "poetry.lock"
    victim.write_text("somebody's")
    token = token.format(elsewhere=tmp_path / "poetry")

    assert owners.life_of(path, owner(token, **another_process())) is Life.DEAD
    owners.sweep(path, [token])

    assert victim.read_text() == "somebody's"
