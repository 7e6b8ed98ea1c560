"""
Owns the rule that says whether a measure is flat: pure, over samples of ``(seconds, value)``, with its limits in the open.

The first quarter of a run is its warm-up, and counts for nothing but the base of what must come back to it. Of the rest, a robust
slope (Theil–Sen: the median of the slopes of all pairs, which a quarter of wild windows cannot turn) and the step from the second
quarter to the last must both stay within what is allowed. What falls is flat.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

__all__ = ["HOW", "WINDOWS", "Limit", "Samples", "Verdict", "back_to_base", "judge", "slope", "windows", "within"]

Samples = Sequence[tuple[float, float]]

WINDOWS = 32
"""Into how many windows a run is cut: eight a quarter."""

_FEWEST = 5 / 8
"""The share of the windows of the second quarter, and of the last, that must have a value for a run to say anything."""


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[max(0, math.ceil(len(values) * 0.99) - 1)]


HOW: dict[str, Callable[[Sequence[float]], float]] = {"p50": statistics.median, "p99": _p99, "most": max, "least": min}
"""What stands for a window."""


@dataclass(frozen=True, slots=True)
class Limit:
    """
    How much a measure may rise after the warm-up: a *share* of its level, and *floor* in any case, in its own unit.

    *how* says what stands for a window, one of `HOW`; *count* how many windows a run is cut into.
    """

    share: float
    floor: float
    how: str = "p50"
    count: int = WINDOWS

    def allowed(self, level: float) -> float:
        """Return how much a measure of this level may rise."""
        return max(self.floor, self.share * level)


@dataclass(frozen=True, slots=True)
class Verdict:
    """
    What came of a measure: *level* in the second quarter, *last* in the last, *rise* by the slope over what was judged.

    *allowed* is the most that *rise*, and the step from *level* to *last*, may be; *why* it is not flat, or empty.
    """

    level: float
    last: float
    rise: float
    allowed: float
    why: str = ""

    @property
    def ratio(self) -> float:
        """The last quarter as a multiple of the second."""
        if self.level == 0:
            return 1.0 if self.last == 0 else math.inf
        return self.last / self.level

    @property
    def is_flat(self) -> bool:
        """Whether it is flat."""
        return not self.why


def windows(samples: Samples, length: float, how: str = "p50", count: int = WINDOWS) -> list[tuple[float, float]]:
    """Return the middle of each window of a run of so many seconds that has a value, and what stands for it."""
    values: list[list[float]] = [[] for _ in range(count)]
    for at, value in samples:
        if 0 <= at <= length:
            values[min(count - 1, int(at / length * count))].append(value)
    return [((n + 0.5) * length / count, HOW[how](found)) for n, found in enumerate(values) if found]


def slope(points: Samples) -> float:
    """Return the median of the slopes of all pairs (Theil 1950, Sen 1968), by second."""
    return statistics.median((w - v) / (t - s) for (s, v), (t, w) in combinations(points, 2))


def judge(samples: Samples, length: float, limit: Limit) -> Verdict:
    """Say whether what was sampled over a run of so many seconds is flat after its first quarter; too little to tell is not."""
    found = [(at, value) for at, value in windows(samples, length, limit.how, limit.count) if at > length / 4]
    second = [value for at, value in found if at <= length / 2]
    last = [value for at, value in found if at > length * 3 / 4]
    if min(len(second), len(last)) < limit.count / 4 * _FEWEST:
        return Verdict(
            0, 0, 0, 0, f"only {len(second)} and {len(last)} windows of the second and the last quarter have a value"
        )
    level, end = statistics.median(second), statistics.median(last)
    rise = slope(found) * length * 3 / 4
    allowed = limit.allowed(level)
    why = []
    if rise > allowed:
        why.append(f"its slope is a rise of {rise:.4g}, {allowed:.4g} are allowed")
    if end - level > allowed:
        why.append(f"from the second quarter to the last it rose by {end - level:.4g}, {allowed:.4g} are allowed")
    return Verdict(level, end, rise, allowed, "; ".join(why))


def back_to_base(samples: Samples, length: float, slack: float = 0.0) -> Verdict:
    """
    Say whether what is counted when everything rests is never more, after the first quarter, than it was in it.

    *slack* is how much more it may be.
    """
    before = [value for at, value in samples if at <= length / 4]
    after = [(at, value) for at, value in samples if at > length / 4]
    if not before or len(after) < 3:
        return Verdict(0, 0, 0, slack, f"{len(before)} and {len(after)} counts at rest, before and after the warm-up")
    base, last = max(before), after[-1][1]
    above = [(at, value) for at, value in after if value > base + slack]
    why = ""
    if above:
        why = f"{len(above)} of {len(after)} times above its base {base:.4g}, first {above[0][1]:.4g} at {above[0][0]:.0f} s"
    return Verdict(base, last, max(value for _, value in after) - base, slack, why)


def within(samples: Samples, most: float) -> Verdict:
    """Say whether it was never more than so much."""
    if not samples:
        return Verdict(0, 0, 0, most, "nothing was measured")
    highest = max(value for _, value in samples)
    why = f"it was {highest:.4g}, {most:.4g} are allowed" if highest > most else ""
    return Verdict(highest, samples[-1][1], 0, most, why)
