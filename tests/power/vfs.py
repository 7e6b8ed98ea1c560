"""
Owns a layer between SQLite and its files: tells an observer of every call, and lets it fail; changes nothing by itself.

It lies under the very library that the standard `sqlite3` module uses: a VFS of the default's own functions, registered as the
default, whose files are the real ones with another table of methods. So locks and the shared memory of a ``-wal`` go on as
ever. Folder syncs, which no VFS method shows, are seen through the system calls that the default VFS lets others replace.

Install it in a process of its own, before that opens a database; it stays for the life of the process.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sqlite3
import sys
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = ["KINDS", "WRITING", "Call", "Observer", "available", "install"]

WRITING: Final = frozenset({"open", "write", "truncate", "sync", "close", "delete", "sync_folder"})
"""The calls that change what a disk has, or say what of it must stay."""

KINDS: Final = WRITING | {"read", "lock", "size"}
"""Every call that can be observed."""

_OK, _IOERR = 0, sqlite3.SQLITE_IOERR
_ROLES: Final = {0x100: "main", 0x80000: "wal", 0x800: "journal"}


@dataclass(slots=True)
class Call:
    """
    One call of SQLite's: *kind* is one of `KINDS`; *path* None is a file without a name, gone once it is closed.

    ``role`` is "main", "wal", "journal" or "other"; ``file`` numbers the open file; ``data`` is what is written; ``size`` how
    many bytes that, or a read, has, or what a file is cut to; ``flags`` are those of open, of sync, or the level of a lock;
    ``result`` is SQLite's code, once it has returned.
    """

    kind: str
    path: str | None
    role: str = "other"
    file: int = 0
    offset: int = 0
    data: bytes = b""
    size: int = 0
    flags: int = 0
    result: int = _OK


class Observer(Protocol):
    """Is told of every call, on the thread of its connection."""

    def before(self, call: Call) -> int | None:
        """Return an SQLite error code to give instead of calling, or None; it may also end the process."""

    def after(self, call: Call) -> int | None:
        """Learn that the call returned; return an error code to give although it was done, or None."""


# --- the C interface (sqlite3.h) ------------------------------------------------------------------------------------

_pointer, _int, _int64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_Open = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _pointer, _int, _pointer)
_Delete = ctypes.CFUNCTYPE(_int, _pointer, ctypes.c_char_p, _int)
_SetCall = ctypes.CFUNCTYPE(_int, _pointer, ctypes.c_char_p, _pointer)
_GetCall = ctypes.CFUNCTYPE(_pointer, _pointer, ctypes.c_char_p)
_OpenFolder = ctypes.CFUNCTYPE(_int, ctypes.c_char_p, _pointer)

_Close = ctypes.CFUNCTYPE(_int, _pointer)
_Transfer = ctypes.CFUNCTYPE(_int, _pointer, _pointer, _int, _int64)
_Truncate = ctypes.CFUNCTYPE(_int, _pointer, _int64)
_WithFlags = ctypes.CFUNCTYPE(_int, _pointer, _int)
_Size = ctypes.CFUNCTYPE(_int, _pointer, _pointer)


class _Vfs(ctypes.Structure):
    _fields_ = (
        ("iVersion", _int),
        ("szOsFile", _int),
        ("mxPathname", _int),
        ("pNext", _pointer),
        ("zName", ctypes.c_char_p),
        ("pAppData", _pointer),
        ("xOpen", _pointer),
        ("xDelete", _pointer),
        *((name, _pointer) for name in ("xAccess", "xFullPathname", "xDlOpen", "xDlError", "xDlSym", "xDlClose")),
        *((name, _pointer) for name in ("xRandomness", "xSleep", "xCurrentTime", "xGetLastError")),
        # since version 2, and 3
        ("xCurrentTimeInt64", _pointer),
        *((name, _pointer) for name in ("xSetSystemCall", "xGetSystemCall", "xNextSystemCall")),
    )


class _Methods(ctypes.Structure):
    _fields_ = (
        ("iVersion", _int),
        *((name, _pointer) for name in ("xClose", "xRead", "xWrite", "xTruncate", "xSync", "xFileSize")),
        *((name, _pointer) for name in ("xLock", "xUnlock", "xCheckReservedLock", "xFileControl", "xSectorSize")),
        ("xDeviceCharacteristics", _pointer),
        # since version 2, and 3
        *((name, _pointer) for name in ("xShmMap", "xShmLock", "xShmBarrier", "xShmUnmap", "xFetch", "xUnfetch")),
    )


class _File(ctypes.Structure):
    _fields_ = (("pMethods", _pointer),)


def _copy_of(kind: type[Any], address: int, versions: dict[int, str]) -> Any:
    """Copy a versioned structure: an older one has not the fields after its last, nor memory for them."""
    version = _int.from_address(address).value
    last = versions.get(version)
    size = ctypes.sizeof(kind) if last is None else getattr(kind, last).offset + ctypes.sizeof(_pointer)
    copy = kind()
    ctypes.memmove(ctypes.addressof(copy), address, size)
    return copy


def _library() -> ctypes.CDLL:
    import _sqlite3

    # symbols are looked for in what the module links, too
    return ctypes.CDLL(getattr(_sqlite3, "__file__", None))


def available() -> str | None:
    """Return why there can be no such layer in this Python, or None if there can."""
    try:
        library = _library()
        for name in ("sqlite3_vfs_find", "sqlite3_vfs_register", "sqlite3_libversion"):
            getattr(library, name)
    except (ImportError, OSError, AttributeError) as error:
        return f"the SQLite of this Python's sqlite3 module does not show its functions ({error})"
    library.sqlite3_libversion.restype = ctypes.c_char_p
    found = library.sqlite3_libversion().decode()
    if found != sqlite3.sqlite_version:
        return f"the library found is SQLite {found}, the sqlite3 module uses {sqlite3.sqlite_version}"
    return None


# --- the layer ------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Opened:
    number: int
    path: str | None
    role: str
    methods: _Methods
    """The real ones."""


class _Layer:
    """The shim VFS and everything that C points to; lives as long as the process."""

    def __init__(self, observer: Observer, kinds: Collection[str]) -> None:
        self._observer = observer
        self._kinds = frozenset(kinds)
        self._opened: dict[int, _Opened] = {}
        self._count = 0
        self._tables: dict[int, tuple[_Methods, _Methods]] = {}
        self._callbacks: list[Any] = []
        self._folders: tuple[Callable[..., int], int] | None = None
        library = _library()
        library.sqlite3_vfs_find.restype = _pointer
        library.sqlite3_vfs_find.argtypes = (ctypes.c_char_p,)
        library.sqlite3_vfs_register.argtypes = (_pointer, _int)
        self._real_address = library.sqlite3_vfs_find(None)
        self._real: _Vfs = _copy_of(_Vfs, self._real_address, {1: "xGetLastError", 2: "xCurrentTimeInt64"})
        self._real_open = _Open(self._real.xOpen)
        self._real_delete = _Delete(self._real.xDelete)
        self._shim = _Vfs.from_buffer_copy(self._real)
        self._shim.zName = b"observed"
        self._shim.pNext = None
        self._shim.xOpen = self._pointer_to(_Open, self._open)
        self._shim.xDelete = self._pointer_to(_Delete, self._delete)
        if "sync_folder" in self._kinds:
            self._see_folders()
        result = library.sqlite3_vfs_register(ctypes.addressof(self._shim), 1)
        if result != _OK:
            raise OSError(f"SQLite did not take the layer: {result}")

    def _pointer_to(self, prototype: Any, function: Callable[..., int]) -> int:
        """Make a C function that never raises: what ctypes does with an exception is to print it and go on."""

        def guarded(*arguments: Any) -> int:
            try:
                return function(*arguments)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)

        callback = prototype(guarded)
        self._callbacks.append(callback)
        address = ctypes.cast(callback, _pointer).value
        assert address is not None
        return address

    def _observed(self, call: Call, real: Callable[[], int]) -> int:
        if call.kind not in self._kinds:
            return real()
        instead = self._observer.before(call)
        if instead is not None:
            return instead
        call.result = real()
        instead = self._observer.after(call)
        return call.result if instead is None else instead

    # --- of the VFS ---

    def _open(self, _: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        path = None if name is None else os.fsdecode(ctypes.string_at(name))
        role = next((role for bit, role in _ROLES.items() if flags & bit), "other")
        self._count += 1
        number = self._count
        # SQLite closes a file that has methods, whatever open said
        opened = _File.from_address(file)
        opened.pMethods = None

        def real() -> int:
            return int(self._real_open(self._real_address, name, file, flags, out))

        result = self._observed(Call("open", path, role, number, flags=flags), real)
        if opened.pMethods:
            methods, observed = self._table(opened.pMethods)
            self._opened[file] = _Opened(number, path, role, methods)
            opened.pMethods = ctypes.addressof(observed)
        return result

    def _delete(self, _: int, name: bytes, sync_folder: int) -> int:
        call = Call("delete", os.fsdecode(name), flags=sync_folder)
        return self._observed(call, lambda: self._real_delete(self._real_address, name, sync_folder))

    def _see_folders(self) -> None:
        """Put ourselves where the default VFS opens a folder, which it does in order to sync it, and for nothing else."""
        if self._real.iVersion < 3 or not self._real.xSetSystemCall or not self._real.xGetSystemCall:
            raise OSError("the default VFS has no system calls to replace: folder syncs cannot be seen")
        address = _GetCall(self._real.xGetSystemCall)(self._real_address, b"openDirectory")
        if not address:
            raise OSError("the default VFS does not sync folders")
        real = _OpenFolder(address)

        def opened(path: bytes, descriptor: int) -> int:
            call = Call("sync_folder", os.path.dirname(os.fsdecode(path)))  # noqa: PTH120  # text, as SQLite gives it
            return self._observed(call, lambda: real(path, descriptor))

        ours = self._pointer_to(_OpenFolder, opened)
        replace = _SetCall(self._real.xSetSystemCall)
        if replace(self._real_address, b"openDirectory", ours) != _OK:
            raise OSError("the default VFS did not take the replaced system call")
        self._folders = (replace, address)

    # --- of a file ---

    def _table(self, address: int) -> tuple[_Methods, _Methods]:
        """Return the real methods of a file, and ours over them."""
        found = self._tables.get(address)
        if found is not None:
            return found
        real: _Methods = _copy_of(_Methods, address, {1: "xDeviceCharacteristics", 2: "xShmUnmap"})
        ours = _Methods.from_buffer_copy(real)
        close = _Close(real.xClose)

        def closed(file: int) -> int:
            opened = self._opened.pop(file)
            call = Call("close", opened.path, opened.role, opened.number)
            # a file must be closed, whatever is told of it
            result: list[int] = []

            def really() -> int:
                result.append(close(file))
                return result[0]

            told = self._observed(call, really)
            if not result:
                close(file)
            return told

        ours.xClose = self._pointer_to(_Close, closed)
        if "write" in self._kinds:
            write = _Transfer(real.xWrite)

            def written(file: int, data: int, size: int, offset: int) -> int:
                opened = self._opened[file]
                call = Call(
                    "write", opened.path, opened.role, opened.number, offset, ctypes.string_at(data, size), size
                )
                return self._observed(call, lambda: write(file, data, size, offset))

            ours.xWrite = self._pointer_to(_Transfer, written)
        if "read" in self._kinds:
            read = _Transfer(real.xRead)

            def was_read(file: int, data: int, size: int, offset: int) -> int:
                opened = self._opened[file]
                call = Call("read", opened.path, opened.role, opened.number, offset, size=size)
                return self._observed(call, lambda: read(file, data, size, offset))

            ours.xRead = self._pointer_to(_Transfer, was_read)
        if "truncate" in self._kinds:
            truncate = _Truncate(real.xTruncate)

            def truncated(file: int, size: int) -> int:
                opened = self._opened[file]
                call = Call("truncate", opened.path, opened.role, opened.number, size=size)
                return self._observed(call, lambda: truncate(file, size))

            ours.xTruncate = self._pointer_to(_Truncate, truncated)
        for kind, name in (("sync", "xSync"), ("lock", "xLock")):
            if kind in self._kinds:
                setattr(ours, name, self._with_flags(kind, _WithFlags(getattr(real, name))))
        if "size" in self._kinds:
            size_of = _Size(real.xFileSize)

            def sized(file: int, out: int) -> int:
                opened = self._opened[file]
                call = Call("size", opened.path, opened.role, opened.number)
                return self._observed(call, lambda: size_of(file, out))

            ours.xFileSize = self._pointer_to(_Size, sized)
        self._tables[address] = (real, ours)
        return real, ours

    def step_aside(self) -> None:
        """Let every file, also those open, be called without us: the interpreter is about to go, and our functions with it."""
        self._shim.xOpen, self._shim.xDelete = self._real.xOpen, self._real.xDelete
        for real, ours in self._tables.values():
            ctypes.memmove(ctypes.addressof(ours), ctypes.addressof(real), ctypes.sizeof(_Methods))
            _keep_for_ever(ours)
        if self._folders is not None:
            self._folders[0](self._real_address, b"openDirectory", self._folders[1])
        _keep_for_ever(self._shim)

    def _with_flags(self, kind: str, real: Callable[[int, int], int]) -> int:
        def called(file: int, flags: int) -> int:
            opened = self._opened[file]
            call = Call(kind, opened.path, opened.role, opened.number, flags=flags)
            return self._observed(call, lambda: real(file, flags))

        return self._pointer_to(_WithFlags, called)


_layers: list[_Layer] = []


def install(observer: Observer, kinds: Collection[str] = WRITING) -> None:
    """
    Put *observer* between SQLite and the files of every database that this process opens from now on, for good.

    Of *kinds* alone it is told; opening and closing a file is always seen through, told or not.

    Raises:
        OSError: this SQLite does not let itself be observed; see `available`.
    """
    reason = available()
    if reason is not None:
        raise OSError(reason)
    if _layers:
        raise OSError("this process has an observer already")
    unknown = set(kinds) - KINDS
    if unknown:
        raise ValueError(f"no such calls: {sorted(unknown)}; there are {sorted(KINDS)}")
    _layers.append(_Layer(observer, kinds))
    atexit.register(_layers[0].step_aside)


def _keep_for_ever(memory: Any) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
