"""What the benchmarks say of their figures: medians, ratios, goals, ways that are not there, and where a curve lies."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest

from benchmarks.curves import Scale, apart, draw, written
from benchmarks.judging import Verdict, beside_first, judge
from benchmarks.measuring import Case, Curve, Found, Goal, Missing, Picture, Way, figure, median, ratio
from benchmarks.report import Run, as_json, markdown, restored
from benchmarks.running import Outcome, Step, run_all

FOUND: Found = {
    "ours": [{"rate": 30.0, "ms": 1.0}, {"rate": 80.0, "ms": 2.0}, {"rate": 10.0, "ms": 9.0}],
    "plain": [{"rate": 10.0}, {"rate": 20.0}, {"rate": 10.0}],
}


def never(folder: object, scale: float) -> Mapping[str, float]:
    raise AssertionError("a way is run by the runner")


def case_of(*ways: str, goals: tuple[Goal, ...] = (), **rounds: int) -> Case:
    return Case(
        "case",
        "A case",
        [Way(way, never, f"how {way} works", rounds.get(way)) for way in ways],
        {"rate": "a second", "ms": "ms"},
        goals,
        [Picture("Rates", "callers", "a second", [Curve("lash_store", [(1, "ours", "rate"), (10, "plain", "rate")])])],
    )


def verdict_of(goal: Goal, outcome: Outcome | None = None) -> Verdict:
    outcome = outcome or Outcome(case_of("ours", "plain"), FOUND)
    made = case_of(*(way.name for way in outcome.case.ways), goals=(goal,))
    (verdict,) = judge(Outcome(made, outcome.found, outcome.missing, outcome.failed))
    return verdict


def run_of(outcome: Outcome) -> Run:
    machine = {
        "processor": "a processor",
        "architecture": "x",
        "cores": 2,
        "system": "s",
        "python": "p",
        "sqlite": "3",
        "packages": {},
    }
    return Run("2030-01-01", machine, 3, 1.0, [outcome], {})


# --- figures --------------------------------------------------------------------------------------------------------


def test_a_median_is_over_the_rounds_that_have_the_figure() -> None:
    assert median(FOUND, "ours", "rate") == 30
    assert median({"ours": [{"rate": 1.0}, {}]}, "ours", "rate") == 1
    assert median(FOUND, "plain", "ms") is None
    assert median(FOUND, "nobody", "rate") is None


def test_a_ratio_is_made_within_each_round() -> None:
    # 3, 4 and 1; that of the medians would be 3 by chance, so the last round decides
    assert ratio("ours", "rate", "plain")({**FOUND, "ours": [*FOUND["ours"][:2], {"rate": 50.0}]}) == 4


def test_a_ratio_of_ways_with_different_rounds_is_that_of_their_medians() -> None:
    assert ratio("ours", "rate", "plain")({**FOUND, "plain": [{"rate": 15.0}]}) == 2


@pytest.mark.parametrize("plain", [{}, {"plain": []}, {"plain": [{"ms": 1.0}]}, {"plain": [{"rate": 0.0}]}])
def test_there_is_no_ratio_to_what_was_not_measured_or_is_nothing(plain: Found) -> None:
    assert ratio("ours", "rate", "plain")({"ours": [{"rate": 1.0}], **plain}) is None


def test_multiples_of_the_first_way_need_it() -> None:
    case = case_of("plain", "ours", "other")
    assert beside_first(case, FOUND) == {"plain": 1, "ours": 3}
    assert beside_first(case, {"ours": FOUND["ours"]}) == {}


# --- goals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("goal", "is_met"),
    [
        (Goal("at least", figure("ours", "rate"), at_least=30), True),
        (Goal("at least", figure("ours", "rate"), at_least=30.1), False),
        (Goal("at most", figure("ours", "rate"), at_most=30), True),
        (Goal("at most", figure("ours", "rate"), at_most=29.9), False),
        (Goal("between", figure("ours", "rate"), at_least=31, at_most=40), False),
    ],
)
def test_a_goal_is_met_up_to_its_limit(goal: Goal, is_met: bool) -> None:
    verdict = verdict_of(goal)
    assert (verdict.figure, verdict.least, verdict.most, verdict.is_met) == (30, 10, 80, is_met)


BESIDE_DBOS = Goal("beside DBOS", ratio("ours", "rate", "DBOS"), at_least=3)


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (Outcome(case_of("ours", "DBOS"), FOUND, missing={"DBOS": "dbos is not installed"}), "dbos is not installed"),
        (Outcome(case_of("ours", "DBOS"), FOUND, failed={"DBOS": "Traceback\nboom"}), "DBOS failed"),
        (Outcome(case_of("ours", "DBOS"), FOUND), "DBOS was not run"),
        (Outcome(case_of("ours"), FOUND), "there is no way 'DBOS'"),
    ],
)
def test_a_goal_without_its_baseline_says_why(outcome: Outcome, why: str) -> None:
    verdict = verdict_of(BESIDE_DBOS, outcome)
    assert (verdict.figure, verdict.is_met, verdict.why, verdict.is_broken) == (None, None, why, False)


def test_a_goal_that_raises_is_broken_unless_a_way_of_it_is_not_there() -> None:
    assert verdict_of(Goal("asks amiss", lambda found: found["ours"][0]["weight"])).is_broken
    asks = Goal("asks for what is not there", lambda found: found["DBOS"][0]["rate"])
    missing = verdict_of(asks, Outcome(case_of("ours", "DBOS"), FOUND, missing={"DBOS": "not here"}))
    assert (missing.why, missing.is_broken) == ("not here", False)


# --- running --------------------------------------------------------------------------------------------------------


def run_with(
    case: Case, rounds: int, run: Callable[[str, int], dict[str, float]]
) -> tuple[Outcome, list[tuple[str, int]]]:
    outcome, told = Outcome(case), []

    def tell(step: Step, left: float | None) -> None:
        told.append((step.way.name, step.round))

    run_all([outcome], rounds, 1.0, tell, lambda case, way, scale, timeout: run(way, told[-1][1]))
    return outcome, told


def test_ways_run_in_turns_and_as_often_as_they_may() -> None:
    _, told = run_with(case_of("a", "b", b=1), 2, lambda way, number: {"rate": 1.0})
    assert told == [("a", 0), ("b", 0), ("a", 1)]


def test_a_way_that_fails_loses_its_own_figures_alone() -> None:
    def run(way: str, number: int) -> dict[str, float]:
        if way == "b" and number == 1:
            raise RuntimeError("boom")
        return {"rate": float(number)}

    outcome, told = run_with(case_of("a", "b"), 3, run)
    assert outcome.found == {"a": [{"rate": 0}, {"rate": 1}, {"rate": 2}]}
    assert outcome.failed == {"b": "boom"}
    assert ("b", 2) not in told
    assert run_of(outcome).has_failed


def test_a_way_that_is_not_here_is_asked_once_and_is_no_failure() -> None:
    def run(way: str, number: int) -> dict[str, float]:
        if way == "b":
            raise Missing("b is not installed")
        return {"rate": 1.0}

    outcome, told = run_with(case_of("a", "b"), 2, run)
    assert outcome.missing == {"b": "b is not installed"}
    assert told == [("a", 0), ("b", 0), ("a", 1)]
    assert not run_of(outcome).has_failed


def test_a_figure_that_is_no_number_is_a_failure() -> None:
    outcome, _ = run_with(case_of("a"), 1, lambda way, number: {"rate": math.nan})
    assert "a" in outcome.failed


def test_what_was_measured_before_a_stop_is_kept() -> None:
    outcome = Outcome(case_of("a", "b"))

    def run(case: str, way: str, scale: float, timeout: float) -> dict[str, float]:
        if way == "b":
            raise KeyboardInterrupt
        return {"rate": 1.0}

    with pytest.raises(KeyboardInterrupt):
        run_all([outcome], 2, 1.0, lambda step, left: None, run)
    assert outcome.found == {"a": [{"rate": 1.0}]}
    assert not outcome.is_whole


# --- what is shown --------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again_as_it_was() -> None:
    outcome = Outcome(case_of("ours", "plain", "DBOS", goals=(BESIDE_DBOS,)), FOUND, {"DBOS": "not here"})
    run = run_of(outcome)
    again = restored(json.loads(json.dumps(as_json(run))), {"case": outcome.case})
    assert as_json(again) == as_json(run)
    assert markdown(again) == markdown(run)


def test_the_page_says_what_is_missing_and_what_failed() -> None:
    goals = (BESIDE_DBOS, Goal("beside plain", ratio("ours", "rate", "plain"), at_least=3))
    outcome = Outcome(
        case_of("ours", "plain", "DBOS", "Huey", goals=goals), FOUND, {"DBOS": "no | dbos"}, {"Huey": "Trace\nboom"}
    )
    page = markdown(run_of(outcome))
    assert "1 of 1 goals met, 1 not measured." in page
    assert "- DBOS: not here: no \\| dbos" in page
    assert "- Huey: failed: boom" in page
    assert "| beside plain | ≥ 3 × | 3 × (1 to 4) | met ✓ |" in page
    assert "![Rates](pictures/case-1.svg)" in page


# --- curves ---------------------------------------------------------------------------------------------------------


def test_a_logarithmic_scale_puts_equal_factors_at_equal_distances() -> None:
    scale = Scale([1, 1000], 0, 300, is_log=True, is_tight=True)
    assert [scale.at(value) for value in (1, 10, 100, 1000)] == [0, 100, 200, 300]
    assert scale.ticks(8) == pytest.approx([1, 3, 10, 30, 100, 300, 1000])


def test_a_scale_with_nothing_on_it_cannot_be_logarithmic() -> None:
    scale = Scale([0, 100], 300, 0, is_log=True)
    assert not scale.is_log
    assert scale.at(0) == 300


def test_a_linear_scale_begins_at_nothing_and_has_round_ticks() -> None:
    scale = Scale([1234, 5900], 300, 0, is_log=False)
    assert (scale.low, scale.at(0)) == (0, 300)
    assert scale.ticks() == [0, 2000, 4000, 6000]


@pytest.mark.parametrize("is_log", [True, False])
@pytest.mark.parametrize("values", [[1], [7, 7], [0.002, 0.0021], [3, 4e7], [0], [0.05, 0.051], [99, 101]])
def test_every_value_is_on_its_scale_and_ticks_are_few(values: list[float], is_log: bool) -> None:
    for is_tight in (True, False):
        scale = Scale(values, 300, 0, is_log=is_log, is_tight=is_tight)
        assert scale.low <= min(values) <= max(values) <= scale.high
        assert all(0 <= scale.at(value) <= 300 for value in values)
        ticks = scale.ticks()
        assert 1 <= len(ticks) <= 7
        assert len({written(tick) for tick in ticks}) == len(ticks)


def test_labels_are_moved_apart_no_further_than_needed() -> None:
    assert apart([10, 100], 20, 0, 200) == [10, 100]
    assert apart([100, 100], 20, 0, 200) == [90, 110]
    assert apart([0, 5, 198, 199], 20, 0, 200) == [0, 20, 180, 200]
    placed = sorted(apart([50, 52, 71, 72, 90], 20, 0, 200))
    assert all(b - a >= 20 - 1e-9 for a, b in pairwise(placed))


def test_a_curve_without_figures_is_not_drawn_and_names_are_made_harmless() -> None:
    picture = Picture("A < B & C", "x", "y", [Curve('a "b" <c>', [(1, "ours", "rate"), (2, "nobody", "rate")])])
    assert draw(picture, {}) is None
    drawn = draw(picture, FOUND)
    assert drawn is not None
    root = ElementTree.fromstring(drawn)
    assert 'a "b" <c>' in {element.text for element in root.iter()}
