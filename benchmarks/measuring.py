"""
Owns what a measurement is: ways of doing the same work, each in a process and a folder of its own, and the goals that their
figures are held against.

Single figures drift with the machine; what counts are ratios of figures of the same round.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

__all__ = [
    "Case",
    "Curve",
    "Found",
    "Goal",
    "Missing",
    "Picture",
    "Way",
    "figure",
    "find_case",
    "median",
    "ratio",
    "run_here",
]

Run: TypeAlias = Callable[[Path, float], Mapping[str, float]]
"""Does the work once in an empty folder, at a scale (1.0: as it is meant), and returns figures by metric."""

Found: TypeAlias = dict[str, list[dict[str, float]]]
"""By way, what each round gave; the lists are of one length, but for ways that could not run, which are not there."""


class Missing(Exception):
    """A way cannot run here, and the message says why."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to do the work; *how* says what it is and how it is configured, in one sentence."""

    name: str
    run: Run
    how: str = ""
    rounds: int | None = None
    """How often at most, for one that takes minutes; None: as often as the others."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure made of what was found, and what it should be; *figure* gives None where a baseline did not run."""

    text: str
    figure: Callable[[Found], float | None]
    at_least: float | None = None
    at_most: float | None = None
    unit: str = "×"

    def is_met(self, figure: float) -> bool:
        """Say whether the figure is as good as it should be."""
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a picture: *points* are ``(x, way, metric)``."""

    name: str
    points: Sequence[tuple[float, str, str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """Curves over one axis; both axes may be logarithmic."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = True
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Case:
    """
    One row of what is promised.

    *metrics* are the columns of its table: name to unit. *notes* tell what the reader must know to read the figures.
    """

    name: str
    title: str
    ways: Sequence[Way]
    metrics: Mapping[str, str]
    goals: Sequence[Goal] = ()
    pictures: Sequence[Picture] = ()
    notes: str = ""
    rounds: int | None = None
    """How often at most, if one round takes minutes."""
    missing: dict[str, str] = field(default_factory=dict)


def find_case(name: str) -> Case:
    """Return the case of a module of `benchmarks.cases`."""
    case: Case = importlib.import_module(f"benchmarks.cases.{name}").CASE
    return case


def median(found: Found, way: str, metric: str) -> float | None:
    """Return the median over the rounds, None if the way did not run or has no such figure."""
    values = [one[metric] for one in found.get(way, ()) if metric in one]
    return statistics.median(values) if values else None


def ratio(way: str, metric: str, baseline: str, of: str | None = None) -> Callable[[Found], float | None]:
    """
    Return how to make the median over the rounds of one way's metric divided by another's (*of* it, or the same).

    Figures are divided within their round; where the ways ran in different numbers of rounds, their medians are.
    """

    def figure(found: Found) -> float | None:
        ours = [one[metric] for one in found.get(way, ()) if metric in one]
        theirs = [one[of or metric] for one in found.get(baseline, ()) if (of or metric) in one]
        if not ours or not theirs:
            return None
        if len(ours) != len(theirs):
            ours, theirs = [statistics.median(ours)], [statistics.median(theirs)]
        ratios = [a / b for a, b in zip(ours, theirs, strict=True) if b]
        return statistics.median(ratios) if ratios else None

    return figure


def figure(way: str, metric: str) -> Callable[[Found], float | None]:
    """Return how to take a way's own median."""
    return lambda found: median(found, way, metric)


def run_here(case: str, way: str, folder: Path, scale: float) -> Mapping[str, float]:
    """Run one way in this process."""
    return next(one for one in find_case(case).ways if one.name == way).run(folder, scale)
