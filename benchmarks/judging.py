"""Owns what is said of a goal: its figure, how far the rounds are apart, and whether it is met or why nobody can say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .measuring import Case, Found, Goal, ratio
from .running import Outcome

__all__ = ["Verdict", "beside_first", "judge", "spread"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a goal; *figure* is None where it could not be made, and *why* says so."""

    goal: Goal
    figure: float | None
    least: float | None = None
    most: float | None = None
    why: str = ""
    is_broken: bool = False
    """The goal itself raised an error."""

    @property
    def is_met(self) -> bool | None:
        """Say whether the goal is met; None: not measured."""
        return None if self.figure is None else self.goal.is_met(self.figure)


class _Watched(dict[str, list[dict[str, float]]]):
    """What was found, which remembers for which ways it was asked."""

    def __init__(self, found: Found) -> None:
        super().__init__(found)
        self.asked: dict[str, None] = {}

    def get(self, way: str, default: Any = None) -> Any:
        self.asked[way] = None
        return super().get(way, default)

    def __getitem__(self, way: str) -> list[dict[str, float]]:
        self.asked[way] = None
        return super().__getitem__(way)

    def __contains__(self, way: object) -> bool:
        self.asked[str(way)] = None
        return super().__contains__(way)


def judge(outcome: Outcome) -> Iterator[Verdict]:
    """Hold what was found against the goals of the case."""
    for goal in outcome.case.goals:
        watched = _Watched(outcome.found)
        try:
            figure = goal.figure(watched)
        except Exception as error:
            why = _why_not(outcome, watched) or f"{type(error).__name__}: {error}"
            yield Verdict(goal, None, why=why, is_broken=not _why_not(outcome, watched))
            continue
        if figure is None:
            yield Verdict(goal, None, why=_why_not(outcome, watched) or "the rounds gave no such figure")
        else:
            yield Verdict(goal, figure, *spread(goal.figure, outcome.found))


def _why_not(outcome: Outcome, watched: _Watched) -> str:
    absent = [way for way in watched.asked if way not in outcome.found]
    reasons = list(dict.fromkeys(_why_absent(outcome, way) for way in absent))
    return "; ".join(reasons[:2]) + (f"; and {len(reasons) - 2} more" if len(reasons) > 2 else "")


def _why_absent(outcome: Outcome, way: str) -> str:
    if way in outcome.missing:
        return outcome.missing[way]
    if way in outcome.failed:
        return f"{way} failed"
    if any(one.name == way for one in outcome.case.ways):
        return f"{way} was not run"
    return f"there is no way {way!r}"


def spread(figure: Callable[[Found], float | None], found: Found) -> tuple[float | None, float | None]:
    """Return the least and the most that a figure is when it is made of one round alone; a way of fewer rounds lends its last."""
    values = []
    for number in range(max(map(len, found.values()), default=0)):
        try:
            value = figure({way: [rounds[min(number, len(rounds) - 1)]] for way, rounds in found.items()})
        except Exception:
            continue
        if value is not None:
            values.append(value)
    return (min(values), max(values)) if values else (None, None)


def beside_first(case: Case, found: Found) -> Mapping[str, float]:
    """Return, by way, its first metric as a multiple of that of the case's first way; nothing where that did not run."""
    first, metric = case.ways[0].name, next(iter(case.metrics))
    made = {way.name: ratio(way.name, metric, first)(found) for way in case.ways}
    return {} if made.get(first) is None else {way: value for way, value in made.items() if value is not None}
