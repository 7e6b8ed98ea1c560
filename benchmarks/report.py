"""Owns how what was measured is shown: JSON for programs, Markdown for the repository, tables for a terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import machine
from .curves import draw
from .judging import Verdict, beside_first, judge
from .measuring import Case, Goal
from .running import Outcome

__all__ = ["Run", "as_json", "in_terminal", "markdown", "number", "restored", "wanted", "write"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Run:
    """All that one run is: when, where and how it measured, and what came of it."""

    date: str
    machine: dict[str, Any]
    rounds: int
    scale: float
    outcomes: Sequence[Outcome]
    broken: Mapping[str, str]
    """Cases that could not be loaded, and why."""
    seconds: float = 0.0

    def verdicts(self) -> list[tuple[Outcome, Verdict]]:
        """Hold everything against its goals."""
        return [(outcome, verdict) for outcome in self.outcomes for verdict in judge(outcome)]

    @property
    def has_failed(self) -> bool:
        """Say whether anything failed, rather than was slow."""
        failed = bool(self.broken) or any(outcome.failed for outcome in self.outcomes)
        return failed or any(verdict.is_broken for _, verdict in self.verdicts())


def write(run: Run, folder: Path) -> list[Path]:
    """Write the figures, the page and the pictures into a folder, and return the files; the figures first, whatever may fail."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    files = [folder / "results.json", folder / "RESULTS.md"]
    files[0].write_text(json.dumps(as_json(run), indent=1) + "\n", encoding="utf-8")
    files[1].write_text(markdown(run), encoding="utf-8")
    for outcome in run.outcomes:
        drawn = {folder / place: text for place, text in _drawn(outcome).items()}
        for old in set(pictures.glob(f"{outcome.case.name}-[0-9]*.svg")) - set(drawn):
            old.unlink()  # of a run that drew more
        for file, text in drawn.items():
            file.write_text(text, encoding="utf-8")
        files += drawn
    return files


def _drawn(outcome: Outcome) -> dict[str, str]:
    made = ((n, draw(picture, outcome.found)) for n, picture in enumerate(outcome.case.pictures, 1))
    return {f"pictures/{outcome.case.name}-{n}.svg": drawn for n, drawn in made if drawn is not None}


# --- words ----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Write a figure with three digits that count, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if value else "0"


def _with(value: float, unit: str) -> str:
    return f"{number(value)} {unit}".strip()


def wanted(goal: Goal) -> str:
    """Write what a goal asks for."""
    asked = ((goal.at_least, "≥"), (goal.at_most, "≤"))
    return " and ".join(f"{sign} {_with(limit, goal.unit)}" for limit, sign in asked if limit is not None) or "shown"


def _reached(verdict: Verdict) -> str:
    if verdict.figure is None:
        return "–"
    said = _with(verdict.figure, verdict.goal.unit)
    if verdict.least is None or verdict.most is None or verdict.least == verdict.most:
        return said
    return f"{said} ({number(verdict.least)} to {number(verdict.most)})"


def _word(verdict: Verdict) -> str:
    if verdict.is_met is None:
        why = machine.harmless(verdict.why)
        return f"broken: {why}" if verdict.is_broken else f"not measured: {why}"
    if verdict.goal.at_least is None and verdict.goal.at_most is None:
        return "shown"
    return "met ✓" if verdict.is_met else "missed ✗"


def _counted(verdicts: Sequence[Verdict]) -> str:
    words = [_word(verdict) for verdict in verdicts]
    met, missed = words.count("met ✓"), words.count("missed ✗")
    rest = sum(verdict.is_met is None for verdict in verdicts)
    return (
        f"{met} of {met + missed} goals met"
        + (f", {missed} missed" if missed else "")
        + (f", {rest} not measured" if rest else "")
    )


def _values(outcome: Outcome, way: str, metric: str) -> list[float]:
    return [one[metric] for one in outcome.found.get(way, ()) if metric in one]


def _cell(values: Sequence[float]) -> tuple[str, str]:
    """Return the median, and how far apart the rounds are."""
    if not values:
        return "–", ""
    least, most = number(min(values)), number(max(values))
    return number(statistics.median(values)), "" if least == most else f"{least} to {most}"


def _absent(outcome: Outcome) -> Iterator[tuple[str, str]]:
    for way in outcome.case.ways:
        if way.name in outcome.missing:
            yield way.name, f"not here: {machine.harmless(outcome.missing[way.name])}"
        elif way.name in outcome.failed:
            last = outcome.failed[way.name].strip().rpartition("\n")[2]
            yield way.name, f"failed: {machine.harmless(last)}"
        elif way.name not in outcome.found and outcome.is_chosen(way):
            yield way.name, "not run"
    known = {way.name for way in outcome.case.ways}
    for name, why in outcome.missing.items():
        if name not in known:
            yield name, f"not here: {machine.harmless(why)}"


def _remarks(run: Run) -> Iterator[str]:
    if run.scale != 1:
        yield f"At a scale of {run.scale:g}: the goals are meant for 1, and what is said of them here has no weight."
    if run.rounds < 5:
        yield f"{'One round' if run.rounds == 1 else f'{run.rounds} rounds'} only: figures drift too much for that to say much."
    if part := [outcome.case.name for outcome in run.outcomes if not outcome.is_whole]:
        yield f"Not all of it was run: {', '.join(part)}."
    for name, why in run.broken.items():
        yield f"The case {name} could not be loaded: {machine.harmless(why)}"


# --- Markdown -------------------------------------------------------------------------------------------------------


def markdown(run: Run) -> str:
    """Return the page: all goals first, then what each case found, then the machine."""
    return "\n".join(_page(run)) + "\n"


def _page(run: Run) -> Iterator[str]:
    verdicts = run.verdicts()
    yield "# Last results\n"
    yield (
        "Written by `python -m benchmarks`. Single figures drift with the machine; what counts are ratios of figures of the "
        f"same round. Rounds: {run.rounds}. A figure is the median of them, beside it the least and the most.\n"
    )
    took = run.machine.get("fsync_ms")
    fsync = f", {took:.2f} ms for a 4 KiB write with fsync" if took is not None else ""
    yield f"{run.date}, {run.machine['processor']}, {run.machine['cores']} cores{fsync}. [All of the machine](#the-machine).\n"
    for remark in _remarks(run):
        yield f"> **{_md(remark)}**\n"
    yield "## Goals\n"
    yield f"{_counted([verdict for _, verdict in verdicts])}.\n"
    rows = [
        (
            f"[{outcome.case.name}](#{outcome.case.name})",
            verdict.goal.text,
            wanted(verdict.goal),
            _reached(verdict),
            _word(verdict),
        )
        for outcome, verdict in verdicts
    ]
    yield from _md_table(
        ("case", "what", "goal", "figure", ""), [(one[0], *map(_md, one[1:])) for one in rows], "lllrl"
    )
    for outcome in run.outcomes:
        yield from _md_case(outcome)
    yield "## The machine\n"
    yield from _md_table(("", ""), [(name, _md(value)) for name, value in machine.rows(run.machine)], "ll")
    took = f"{run.seconds / 60:.0f} minutes" if run.seconds >= 90 else f"{run.seconds:.0f} seconds"
    yield f"The whole run took {took}, at scale {run.scale:g}."


def _md_case(outcome: Outcome) -> Iterator[str]:
    case = outcome.case
    yield f'<a id="{case.name}"></a>\n'
    yield f"## {_md(case.title)}\n"
    if case.notes:
        yield f"{case.notes.strip()}\n"
    header, rows = _table(outcome)
    cells = [(f"**{_md(name)}**" if is_ours else _md(name), *figures) for (name, is_ours), *figures in rows]
    made = [(name, *(f"{a} <sub>{b}</sub>" if b else a for a, b in figures)) for name, *figures in cells]
    yield from _md_table(header, made, "l" + "r" * (len(header) - 1))
    for verdict in judge(outcome):
        yield f"- {_md(verdict.goal.text)}: **{_md(_reached(verdict))}**, goal {_md(wanted(verdict.goal))}: {_md(_word(verdict))}"
    yield ""
    explained = [way for way in case.ways if way.how and way.name in outcome.found]
    absent = list(_absent(outcome))
    if explained or absent:
        yield "How:\n"
        yield from (f"- {_md(way.name)}: {_md(way.how)}" for way in explained)
        yield from (f"- {_md(name)}: {_md(why)}" for name, why in absent)
        yield ""
    places = _drawn(outcome)
    for number_of_it, picture in enumerate(case.pictures, 1):
        place = f"pictures/{case.name}-{number_of_it}.svg"
        if place in places:
            yield f"![{_md(picture.title)}]({place})\n"


def _table(outcome: Outcome) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return the head, and a row for each way that has figures: its name and whether it is ours, then figures and spreads."""
    case = outcome.case
    beside = beside_first(case, outcome.found) if len(case.ways) > 1 else {}
    header = ["", *case.metrics.values(), *([f"× {case.ways[0].name}"] if beside else [])]
    rows = []
    for way in case.ways:
        if way.name in outcome.found:
            cells = [_cell(_values(outcome, way.name, metric)) for metric in case.metrics]
            if beside:
                cells.append((number(beside[way.name]) if way.name in beside else "–", ""))
            rows.append(((way.name, "lash_store" in way.name), *cells))
    return header, rows


def _md_table(header: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    if rows:
        yield f"| {' | '.join(header)} |"
        yield f"|{'|'.join('--:' if side == 'r' else '---' for side in sides)}|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def _md(said: str) -> str:
    """Return text that a table cell shows as it is, but for code in backquotes."""
    return " ".join(said.split()).replace("|", "\\|").replace("<", "&lt;").replace("__", "\\_\\_")


# --- terminal -------------------------------------------------------------------------------------------------------


def in_terminal(run: Run, console: Console) -> None:
    """Print all tables, that of the goals last."""
    for outcome in run.outcomes:
        header, rows = _table(outcome)
        table = _rich_table(outcome.case.title, header)
        for (name, is_ours), *cells in rows:
            figures = (f"{a}  [dim]{b}[/dim]" if b else a for a, b in cells)
            table.add_row(f"[bold]{escape(name)}[/bold]" if is_ours else escape(name), *figures)
        console.print(table)
        for name, why in _absent(outcome):
            console.print(f"  {escape(name)}: {escape(why)}", highlight=False)
            if name in outcome.failed:
                console.print(f"[dim]{escape(machine.harmless(outcome.failed[name]))}[/dim]", highlight=False)
        console.print()
    verdicts = run.verdicts()
    if verdicts:
        table = _rich_table("Goals", ["", "what", "goal", "figure", ""])
        table.columns[1].justify = table.columns[4].justify = "left"
        for outcome, verdict in verdicts:
            colour = {True: "green", False: "red", None: "yellow"}[verdict.is_met]
            said = (wanted(verdict.goal), _reached(verdict))
            word = f"[{colour}]{escape(_word(verdict))}[/{colour}]"
            table.add_row(outcome.case.name, escape(verdict.goal.text), *said, word)
        console.print(table)
        console.print(f"{_counted([verdict for _, verdict in verdicts])}.", highlight=False)
    for remark in _remarks(run):
        console.print(f"[yellow]{escape(remark)}[/yellow]", highlight=False)


def _rich_table(title: str, header: Sequence[str]) -> Table:
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(header):
        table.add_column(escape(name), justify="right" if place else "left")
    return table


# --- JSON -----------------------------------------------------------------------------------------------------------


def as_json(run: Run) -> dict[str, Any]:
    """Return all figures of every round, and what is said of the goals."""
    return {
        "format": FORMAT,
        "date": run.date,
        "seconds": round(run.seconds, 1),
        "rounds": run.rounds,
        "scale": run.scale,
        "machine": run.machine,
        "remarks": list(_remarks(run)),
        "cases": [_case_json(outcome) for outcome in run.outcomes],
        "broken": {name: machine.harmless(why) for name, why in run.broken.items()},
    }


def _case_json(outcome: Outcome) -> dict[str, Any]:
    case = outcome.case
    return {
        "name": case.name,
        "title": case.title,
        "is_whole": outcome.is_whole,
        "metrics": dict(case.metrics),
        "ways": {
            way.name: {"how": way.how, "rounds": outcome.found[way.name]}
            for way in case.ways
            if way.name in outcome.found
        },
        "missing": {name: machine.harmless(why) for name, why in outcome.missing.items()},
        "failed": {name: machine.harmless(why) for name, why in outcome.failed.items()},
        "goals": [
            {
                "text": verdict.goal.text,
                "unit": verdict.goal.unit,
                "at_least": verdict.goal.at_least,
                "at_most": verdict.goal.at_most,
                "figure": verdict.figure,
                "least": verdict.least,
                "most": verdict.most,
                "is_met": verdict.is_met,
                "why_not": machine.harmless(verdict.why),
            }
            for verdict in judge(outcome)
        ],
    }


def restored(written: Mapping[str, Any], cases: Mapping[str, Case]) -> Run:
    """Return the run that was written as JSON, with its cases as they are now; those that are no more are left out."""
    outcomes = [
        Outcome(
            cases[one["name"]],
            {way: said["rounds"] for way, said in one["ways"].items()},
            dict(one["missing"]),
            dict(one["failed"]),
            one["is_whole"],
        )
        for one in written["cases"]
        if one["name"] in cases
    ]
    return Run(
        written["date"],
        written["machine"],
        written["rounds"],
        written["scale"],
        outcomes,
        written["broken"],
        written["seconds"],
    )
