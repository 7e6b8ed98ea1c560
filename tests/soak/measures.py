"""Owns what is measured, what flat means for each, and the judgement over a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tests.soak.flat import WINDOWS, Limit, Samples, Verdict, back_to_base, judge, within

__all__ = ["MEASURES", "Measure", "verdicts"]


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that must be flat: which samples, in what unit, how it is judged, and what that is in words."""

    name: str
    of: str
    unit: str
    rule: str
    verdict: Callable[[Samples, float], Verdict]


def _trend(
    name: str, of: str, unit: str, share: float, floor: float, how: str = "p50", *, count: int = WINDOWS
) -> Measure:
    limit = Limit(share, floor, how, count)
    rule = f"{how} of a window rises by at most {share:.0%} or {floor:g} {unit}".rstrip()
    return Measure(name, of, unit, rule, lambda samples, length: judge(samples, length, limit))


def _rest_trend(name: str, of: str, unit: str, share: float, floor: float) -> Measure:
    # there are fewer rests than seconds
    return _trend(name, of, unit, share, floor, count=WINDOWS // 2)


def _base(name: str, of: str, slack: float = 0.0) -> Measure:
    rule = "never more than in the warm-up" + (f", and {slack:g}" if slack else "")
    return Measure(name, of, "", rule, lambda samples, length: back_to_base(samples, length, slack))


def _bound(name: str, of: str, unit: str, most: float) -> Measure:
    return Measure(name, of, unit, f"never more than {most:g} {unit}", lambda samples, _: within(samples, most))


MEASURES: tuple[Measure, ...] = (
    # from outside, of the long-lived process
    # what C was once given it seldom gives back, and it comes in steps
    _trend("memory", "memory", "MiB", 0.05, 12),
    _trend("descriptors", "descriptors", "", 0.1, 6),
    _trend("threads", "threads", "", 0.1, 4),
    # from inside
    _trend("tasks", "tasks", "", 0.1, 6),
    _base("descriptors at rest", "descriptors at rest"),
    _base("descriptors of the file at rest", "descriptors of the file at rest", 6),
    _base("threads at rest", "threads at rest"),
    _base("tasks at rest", "tasks at rest"),
    _base("children at rest", "children at rest"),
    _rest_trend("objects at rest", "objects at rest", "", 0.03, 2_000),
    _rest_trend("traced memory at rest", "traced at rest", "MiB", 0.03, 1),
    # of all that C has given out, without what it keeps for later; and SQLite's part: its caches fill up to 2 MiB a connection
    _rest_trend("allocated memory at rest", "allocated at rest", "MiB", 0.05, 6),
    _rest_trend("memory of SQLite at rest", "SQLite at rest", "MiB", 0.1, 4),
    # the file and its folder
    # the middle, which rises if it seldom begins anew; the most is that of the longest reads, which are of the whole file, and so
    # grows with what stays: it has a bound
    _trend("-wal in use", "-wal in use", "MiB", 0.25, 2),
    _bound("-wal, its size at any time", "-wal", "MiB", 64),
    _rest_trend("rows", "rows", "", 0.1, 300),
    _rest_trend("file without what stays", "file without what stays", "MiB", 0.1, 1),
    _trend("side files", "side files", "", 0.2, 2),
    _base("side files at rest", "side files at rest"),
    _base("files in the folder at rest", "files at rest"),
    # latencies
    _trend("spawn to completed, p50", "completed", "ms", 0.5, 10),
    _trend("spawn to completed, p99", "completed", "ms", 1.0, 50, "p99"),
    _trend("a commit, p50", "commit", "ms", 0.5, 10),
    _trend("a commit, p99", "commit", "ms", 1.0, 50, "p99"),
    _trend("a cancel across processes, p50", "cancel", "ms", 0.5, 20),
    _trend("a cancel across processes, p99", "cancel", "ms", 1.0, 100, "p99"),
)

_WHERE_TOLD = ("allocated at rest", "SQLite at rest")


def verdicts(samples: Mapping[str, Samples], length: float) -> list[tuple[Measure, Verdict]]:
    """Judge every measure of a run of so many seconds, but those that its C library does not tell."""
    asked = [one for one in MEASURES if one.of in samples or one.of not in _WHERE_TOLD]
    return [(one, one.verdict(samples.get(one.of, ()), length)) for one in asked]
