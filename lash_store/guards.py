"""
Owns what keeps a live file safe from its surroundings: its identity, its permissions, and the lock that outlives stray closes.

POSIX record locks, which SQLite uses, belong to the process and vanish when *any* descriptor of the file is closed
(sqlite.org/howtocorrupt.html, 2.2). So nothing here, or anywhere in this package, opens the database file beside SQLite but
the one descriptor `hold` keeps.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .errors import NotAStore, StorageBusy, StorageError, StorageMoved

__all__ = [
    "FileIdentity",
    "alone",
    "check_not_inherited",
    "check_target",
    "hold",
    "identify",
    "let_go",
    "resolve",
    "side_files",
    "side_folder",
]

_SHARED_FIRST, _SHARED_SIZE = 0x40000002, 510
"""SQLite's shared lock range; a sibling must lock all of it before it may unlink the ``-wal``."""


class FileIdentity(NamedTuple):
    """What a path named when it was looked at."""

    device: int
    inode: int


def resolve(path: str | os.PathLike[str]) -> Path:
    """
    Return *path* as an absolute path of a real file.

    Raises:
        StorageError: empty, in memory, a URI, or with NUL or bytes that are not UTF-8 in it.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise StorageError("the path of a store must be text, not bytes")
    if not text or text == ":memory:" or text.startswith("file:") or "\0" in text:
        raise StorageError(f"{text!r} is not the path of a file: a store lives in a real file, given by its plain path")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise StorageError(f"{text!r} is not UTF-8, which SQLite's paths are: give the file or its folder another name")
    return Path(text).absolute()


def identify(path: Path | str) -> FileIdentity | None:
    """Return what *path* names now, or None if nothing; a `stat`, never an `open`."""
    try:
        found = os.stat(path)  # noqa: PTH116  # twice a commit: a text is looked up in half the time of a Path
    except FileNotFoundError:
        return None
    return FileIdentity(found.st_dev, found.st_ino)


def is_named(path: Path, descriptor: int) -> bool:
    """Say whether a path names the file that a descriptor is of."""
    held = os.fstat(descriptor)
    return identify(path) == (held.st_dev, held.st_ino)


def is_held(path: Path) -> bool:
    """
    Say whether somebody holds the lock of a side file.

    Raises:
        OSError: it is not there, or cannot be opened.
    """
    # shared: two askers with exclusive locks would call a dead owner alive
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def check_same(path: Path | str, identity: FileIdentity) -> None:
    """
    Make sure *path* still names the file that was opened: SQLite in WAL mode does not notice.

    Raises:
        StorageMoved: it was unlinked, renamed or replaced; what is written now would be lost.
    """
    if identify(path) != identity:
        raise StorageMoved(
            f"{path} no longer names the file this store opened (it was removed, renamed or replaced): "
            "the store has stopped; put the file back and open it again"
        )


def check_target(path: Path, *, writing: bool) -> bool:
    """
    Say whether *path* names a file, and refuse one that may not be opened.

    Raises:
        StorageError: the folder is missing, or the file may not be written.
        NotAStore: not a regular file.
    """
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise StorageError(f"the folder {path.parent} does not exist: create it, then open {path.name}") from None
        return False
    except OSError as error:
        raise StorageError(f"{path} cannot be looked at: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode) and not writing:
        try:
            found = path.stat()
        except OSError as error:
            raise StorageError(
                f"{path} is a symbolic link, and what it names cannot be opened: {error.strerror}"
            ) from error
    if stat.S_ISLNK(found.st_mode):
        raise StorageError(f"{path} is a symbolic link: open the file it names, {os.path.realpath(path)}")
    if not stat.S_ISREG(found.st_mode):
        raise NotAStore(f"{path} is not a regular file: give the path of a store, or of no file")
    if not writing:
        return True
    if found.st_nlink > 1:
        raise StorageError(f"{path} has {found.st_nlink} hard links: its side files would go astray; keep one")
    if found.st_uid != os.geteuid():
        raise StorageError(f"{path} belongs to another user (uid {found.st_uid}): open it as that user, or read-only")
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path} or its folder may not be written: change the permissions, or open it read-only")
    return True


def create_private(path: Path) -> None:
    """
    Make sure *path* is a file only its owner may read, created empty if there was none.

    Raises:
        StorageError: the folder may not be written.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        os.close(os.open(path, flags, 0o600))
    except FileExistsError:
        make_private(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be created: {error.strerror}") from error


def make_private(path: Path) -> None:
    """Take the group's and others' permissions from *path*, unless it is a link; its ``-wal`` and ``-shm`` inherit them."""
    found = path.lstat()
    if found.st_mode & 0o077 and not stat.S_ISLNK(found.st_mode):
        path.chmod(stat.S_IMODE(found.st_mode) & 0o700)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- side files -----------------------------------------------------------------------------------------------------


def side_files(path: Path) -> tuple[Path, ...]:
    """Return the files SQLite keeps beside *path*."""
    return tuple(Path(f"{path}{suffix}") for suffix in ("-wal", "-shm", "-journal"))


def side_folder(path: Path) -> Path:
    """Return where the side files of a database are."""
    return Path(f"{path}-owners")


def make_side_folder(path: Path) -> Path:
    """
    Make sure the folder of side files is there, and is this user's alone.

    Raises:
        StorageError: it cannot be made, or somebody else's thing is in its place.
    """
    folder = side_folder(path)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise StorageError(f"{folder} cannot be created: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageError(f"{folder} is not a folder of this user: move it away")
    return folder


@contextlib.contextmanager
def alone(path: Path, patience: float) -> Iterator[None]:
    """
    Be the only one who makes the file *path*, among processes; a dead one lets go at once.

    Raises:
        StorageBusy: another process was at it for *patience* seconds.
    """
    lock = make_side_folder(path) / "making.lock"
    deadline = time.monotonic() + patience
    while True:
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(
                f"{lock} cannot be opened ({error.strerror}): see what is there, and move it away"
            ) from error
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever had it before removes it
            if is_named(lock, descriptor):
                break
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise StorageBusy(f"another process has been making {path} for {patience:g} s: see who holds {lock}")
        time.sleep(0.002)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


# --- the lock against stray closes ----------------------------------------------------------------------------------


class _Held:
    __slots__ = ("descriptor", "users")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.users = 1


_held: dict[FileIdentity, _Held] = {}
_inherited: set[FileIdentity] = set()
"""Files that the process had open of which this one is a fork: SQLite's memory of its locks came along, its locks did not."""
_lock = threading.Lock()


def hold(path: Path) -> FileIdentity:
    """
    Keep siblings from unlinking the ``-wal`` of *path* whatever this process opens and closes; undo with `let_go`.

    One descriptor with an open-file-description read lock on SQLite's shared range, once a process and inode. The file must be
    in WAL mode already. Where the system has no such locks (macOS) only the identity is returned.

    Raises:
        StorageMoved, StorageError: it is gone, or cannot be opened.
    """
    with _lock:
        identity = identify(path)
        if identity is None:
            raise StorageMoved(f"{path} vanished while it was opened")
        held = _held.get(identity)
        if held is not None:
            held.users += 1
            return identity
        descriptor = -1
        if sys.platform == "linux":
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                wanted = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, _SHARED_FIRST, _SHARED_SIZE, 0)
                fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, wanted)
            except OSError as error:
                if descriptor >= 0:
                    os.close(descriptor)
                raise StorageError(f"{path} cannot be guarded against stray closes: {error.strerror}") from error
        _held[identity] = _Held(descriptor)
        return identity


def check_not_inherited(path: Path) -> None:
    """
    Refuse to open a file that is open in the process of which this one is a fork.

    SQLite would take the other's locks for its own: others remap the ``-shm`` under it, or it waits for itself for ever
    (sqlite.org/howtocorrupt.html, 2.6).

    Raises:
        StorageError: it is one.
    """
    if _inherited and identify(path) in _inherited:
        raise StorageError(
            f"{path} was open when this process was forked: fork before a store is opened, or start processes anew, by "
            'multiprocessing.get_context("spawn") or subprocess'
        )


def is_last(identity: FileIdentity) -> bool:
    """Say whether one `let_go` more will drop the lock."""
    with _lock:
        held = _held.get(identity)
        return held is None or held.users == 1


def let_go(identity: FileIdentity) -> None:
    """Undo one `hold`. The last one closes the descriptor, so no connection of this process may be open on the file."""
    with _lock:
        held = _held[identity]
        held.users -= 1
        if held.users == 0:
            del _held[identity]
            if held.descriptor >= 0:
                os.close(held.descriptor)


def _forget_in_child() -> None:
    for held in _held.values():
        if held.descriptor >= 0:
            os.close(held.descriptor)
    _inherited.update(_held)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
