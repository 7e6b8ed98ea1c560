"""Owns the description of the machine that figures come from; no name of a host, a user or a folder is in it."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import lash_store

__all__ = ["describe", "harmless", "rows"]

_PACKAGES = ("sqlalchemy", "aiosqlite", "pydantic", "dbos", "huey", "uvloop")


def describe() -> dict[str, Any]:
    """Look at the machine, and measure what one write to its disk takes now."""
    folder = Path(tempfile.gettempdir())
    file_system, remark = _disk_of(folder)
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_for_us": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "system": f"{platform.system()} {platform.release()}",
        "file_system": file_system,
        "disk": remark,
        "fsync_ms": fsync_ms(folder),
        "load_average": _load(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "packages": {"lash-store": lash_store.__version__, **_versions()},
    }


def rows(machine: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a description as lines that a person reads."""
    cores, ours, memory, fsync = (machine.get(key) for key in ("cores", "cores_for_us", "memory_bytes", "fsync_ms"))
    disk = ", ".join(filter(None, (machine.get("file_system"), machine.get("disk"))))
    load = machine.get("load_average")
    said = [
        ("processor", f"{machine['processor']}, {machine['architecture']}"),
        ("cores", f"{cores}" + (f", {ours} of them for us" if ours != cores else "")),
        ("memory", f"{memory / 2**30:.1f} GiB" if memory else ""),
        ("system", machine["system"]),
        ("temporary folder", disk),
        ("one 4 KiB write with fsync", f"{fsync:.2f} ms, the median of 50" if fsync is not None else ""),
        ("load average before", ", ".join(f"{one:.2f}" for one in load) if load else ""),
        ("Python", f"{machine['python']}, SQLite {machine['sqlite']}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine["packages"].items())),
    ]
    return [(name, value) for name, value in said if value]


def fsync_ms(folder: Path, times: int = 50) -> float:
    """Return the median time of one more 4 KiB at the end of a file, made durable."""
    block, took = os.urandom(4096), []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(times):
            began = time.perf_counter()
            file.write(block)
            os.fsync(file.fileno())
            took.append(time.perf_counter() - began)
    return round(statistics.median(took) * 1e3, 4)


def harmless(said: str) -> str:
    """Return what an error says without the folders it names."""
    folders = [
        (str(Path(__file__).parents[1]), "."),
        (tempfile.gettempdir(), "TMP"),
        *((one, "PYTHON") for one in {sys.prefix, sys.base_prefix, sys.exec_prefix}),
        (str(Path.home()), "~"),
    ]
    for folder, name in sorted(folders, key=lambda one: -len(one[0])):
        if len(folder) > 1:
            said = said.replace(folder, name)
    return said.replace(platform.node() or "\0", "HOST")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model", "Hardware")))
    return next((name for name in named if name), platform.processor() or "unknown")


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None


def _load() -> list[float] | None:
    try:
        return [round(one, 2) for one in os.getloadavg()]
    except OSError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _disk_of(folder: Path) -> tuple[str, str]:
    """Return the file system of a folder, and what must be known of it, as Linux tells it."""
    try:
        table = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return "", ""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    named = [line.partition(" - ")[2].split()[0] for line in table if line.split()[2] == wanted]
    kind = named[-1] if named else ""
    if kind in ("tmpfs", "ramfs"):
        return (
            kind,
            "in memory: nothing written here is durable, and FULL costs nothing; set TMPDIR to a folder on a disk",
        )
    return kind, ""
