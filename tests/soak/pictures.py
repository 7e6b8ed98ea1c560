"""Owns the pictures of a run: a curve a measure, over windows of it, drawn by the writer that the benchmarks have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.curves import draw
from benchmarks.measuring import Curve, Found, Picture
from tests.soak.flat import HOW, Samples

__all__ = ["PICTURES", "write"]

_POINTS = 20
"""Points of a curve."""

# file: title, unit, whether logarithmic, and the curves: name, samples, what stands for a window
PICTURES: Mapping[str, tuple[str, str, bool, tuple[tuple[str, str, str], ...]]] = {
    "memory": (
        "Memory of the long-lived process",
        "MiB",
        False,
        (
            ("resident", "memory", "p50"),
            ("allocated by C, at rest", "allocated at rest", "p50"),
            ("by SQLite, at rest", "SQLite at rest", "p50"),
            ("by Python since it began", "traced at rest", "p50"),
        ),
    ),
    "held": (
        "What the long-lived process holds",
        "how many, under load and at rest",
        False,
        (
            ("asyncio tasks", "tasks", "p50"),
            ("descriptors", "descriptors", "p50"),
            ("threads", "threads", "p50"),
            ("descriptors, at rest", "descriptors at rest", "p50"),
            ("of the file, at rest", "descriptors of the file at rest", "p50"),
            ("threads, at rest", "threads at rest", "p50"),
            ("tasks, at rest", "tasks at rest", "p50"),
        ),
    ),
    "objects": (
        "Python objects of the long-lived process, at rest",
        "objects",
        False,
        (("objects", "objects at rest", "p50"),),
    ),
    "file": (
        "The file and its -wal",
        "MiB",
        False,
        (
            ("-wal in use, the middle", "-wal in use", "p50"),
            ("size of the -wal, the most", "-wal", "most"),
            ("file", "file", "p50"),
            ("file, but for rows that stay", "file without what stays", "p50"),
        ),
    ),
    "rows": ("Rows in the file, at rest", "rows that retention governs", False, (("rows", "rows", "p50"),)),
    "side-files": (
        "Lock files of owners",
        "files",
        False,
        (("under load", "side files", "p50"), ("at rest", "side files at rest", "p50")),
    ),
    "latency": (
        "Latencies, the middle one (p50)",
        "ms",
        True,
        (
            ("spawn to completed", "completed", "p50"),
            ("a commit", "commit", "p50"),
            ("a cancel across processes", "cancel", "p50"),
        ),
    ),
    "latency-p99": (
        "Latencies, the slowest of a hundred (p99)",
        "ms",
        True,
        (
            ("spawn to completed", "completed", "p99"),
            ("a commit", "commit", "p99"),
            ("a cancel across processes", "cancel", "p99"),
        ),
    ),
}


def write(samples: Mapping[str, Samples], length: float, folder: Path) -> list[Path]:
    """Write the pictures of a run of so many seconds into a folder, and return what was written."""
    written = []
    for name, (title, unit, is_log, curves) in PICTURES.items():
        found: Found = {}
        drawn = [
            Curve(title, list(_points(samples.get(of, ()), length, how, f"{title} {of} {how}", found)))
            for title, of, how in curves
            if samples.get(of)
        ]
        text = draw(Picture(title, "minutes under load", unit, drawn, log_x=False, log_y=is_log), found)
        if text is not None:
            path = folder / f"{name}.svg"
            path.write_text(text)
            written.append(path)
    return written


def _points(samples: Samples, length: float, how: str, curve: str, found: Found) -> Iterator[tuple[float, str, str]]:
    """Yield a point a window, and put into *found* what stands for it."""
    values: dict[int, list[float]] = {}
    for at, value in samples:
        values.setdefault(min(_POINTS - 1, int(at / length * _POINTS)), []).append(value)
    for n, of_window in sorted(values.items()):
        way = f"{curve} {n}"
        found[way] = [{curve: HOW[how](of_window)}]
        yield round((n + 0.5) * length / _POINTS / 60, 2), way, curve
