"""
Owns the order in which all is measured, and what came of it: figures, ways that are not here, ways that failed.

Rounds are the outer loop: the ways of a case stand side by side in each round, and its rounds are spread over the whole run.
What else the machine does for some minutes is so not in all figures of one case.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from .apart import run_apart
from .measuring import Case, Found, Missing, Way

__all__ = ["Outcome", "Runner", "Step", "Teller", "run_all", "time_left"]

TIMEOUT = 900.0

Runner: TypeAlias = Callable[[str, str, float, float], dict[str, float]]
"""Runs a case's way at a scale, for so many seconds at most: `apart.run_apart`."""


class Step(NamedTuple):
    """One way in one round."""

    outcome: Outcome
    way: Way
    round: int


Teller: TypeAlias = Callable[[Step, "float | None"], None]
"""Is told what runs now, and how many seconds are left, None as long as that cannot be said."""


@dataclass(slots=True)
class Outcome:
    """What came of a case; a way is in *found*, in *missing*, in *failed*, or was not reached."""

    case: Case
    found: Found = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Why a way cannot run here."""
    failed: dict[str, str] = field(default_factory=dict)
    """With which error a way failed; it is not tried again, and its figures of rounds before count for nothing."""
    is_whole: bool = True
    """Nothing was left out: not by the choice of ways, not by an end before the end."""
    is_chosen: Callable[[Way], bool] = lambda way: True
    """Says which ways to run."""


def run_all(outcomes: Sequence[Outcome], rounds: int, scale: float, tell: Teller, run: Runner = run_apart) -> None:
    """
    Run all ways of all cases, and fill their outcomes in.

    Raises:
        KeyboardInterrupt: the outcomes hold what was measured until then.
    """
    steps = list(_steps(outcomes, rounds))
    took: dict[tuple[str, str], float] = {}
    for number, step in enumerate(steps):
        case, way = step.outcome.case, step.way
        if _is_out(step):
            continue
        tell(step, time_left([one for one in steps[number:] if not _is_out(one)], took))
        began = time.monotonic()
        try:
            figures = run(case.name, way.name, scale, TIMEOUT)
            if not all(map(math.isfinite, figures.values())):
                raise RuntimeError(f"no figures: {figures}")
        except Missing as missing:
            step.outcome.missing[way.name] = str(missing)
            step.outcome.found.pop(way.name, None)
        except Exception as error:
            step.outcome.failed[way.name] = str(error) or type(error).__name__
            step.outcome.found.pop(way.name, None)
        except KeyboardInterrupt:
            for one in steps[number:]:
                one.outcome.is_whole = one.outcome.is_whole and _is_out(one)
            raise
        else:
            step.outcome.found.setdefault(way.name, []).append(figures)
            took[case.name, way.name] = time.monotonic() - began


def _steps(outcomes: Sequence[Outcome], rounds: int) -> Iterator[Step]:
    for number in range(rounds):
        for outcome in outcomes:
            case = outcome.case
            outcome.missing.update(case.missing)
            for way in filter(outcome.is_chosen, case.ways):
                if number < min(rounds, case.rounds or rounds, way.rounds or rounds):
                    yield Step(outcome, way, number)


def _is_out(step: Step) -> bool:
    return step.way.name in step.outcome.missing or step.way.name in step.outcome.failed


def time_left(steps: Sequence[Step], took: dict[tuple[str, str], float]) -> float | None:
    """Return how long steps will take: as long as they took, and those that never ran as long as others on average."""
    if not took:
        return None
    usual = sum(took.values()) / len(took)
    return sum(took.get((one.outcome.case.name, one.way.name), usual) for one in steps)
