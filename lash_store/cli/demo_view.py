"""Owns how the demo looks: live bars on a terminal, plain lines elsewhere, and the closing table; decides nothing."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..models import TaskRecord, TaskState
from .demo_texts import text_id
from .output import console, text

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

    from .demo_run import Figures, Plan

__all__ = ["View"]

_NAMED = 4
"""Reattached tasks that get a line each; the rest are counted."""


class View:
    """Shows a run on stdout; a silent one shows nothing."""

    def __init__(self, plan: Plan, *, is_silent: bool) -> None:
        self._plan = plan
        self._is_silent = is_silent
        self._out = console()
        self._live: Live | None = None
        self._tenths = -1
        self._example = text_id(1)
        self._say(f"{plan.tasks} tasks, {plan.max_running} at a time, in {plan.db}")

    # --- what happens ---

    def started(self, pid: int, *, again: bool) -> None:
        """Say that a worker works."""
        self._say(f"worker {pid} started again" if again else f"worker {pid} started", "green")
        if self._live is None and self._out.is_terminal and not self._is_silent:
            from rich.live import Live

            self._live = Live(console=self._out, transient=True, auto_refresh=False)
            self._live.start()

    def killed(self, pid: int, records: Sequence[TaskRecord]) -> None:
        """Say what the kill met."""
        running = sum(record.state is TaskState.RUNNING for record in records)
        completed = sum(record.state is TaskState.COMPLETED for record in records)
        rest = len(records) - running - completed
        self._say(
            f"worker {pid} killed with SIGKILL: {completed} completed, {running} running, {rest} pending", "bold red"
        )

    def reattached(self, records: Sequence[TaskRecord], seconds: float | None, process_start: float | None) -> None:
        """Say what goes on, from where."""
        if seconds is not None:
            self._say(f"{len(records)} tasks reattached after {_span(seconds, process_start)}", "bold green")
        self._example = records[0].id
        for record in records[:_NAMED]:
            self._say(f"  {record.id}: attempt {record.attempt}, from its checkpoint at {record.fraction or 0.0:.0%}")
        if len(records) > _NAMED:
            self._say(f"  and {len(records) - _NAMED} more")

    def update(self, records: Sequence[TaskRecord]) -> None:
        """Show how far everything is."""
        if self._is_silent:
            return
        if self._live is not None:
            self._live.update(self._bars(records), refresh=True)
            return
        completed = sum(record.is_terminal for record in records)
        if completed * 10 // self._plan.tasks > self._tenths:
            self._tenths = completed * 10 // self._plan.tasks
            self._say(f"{completed:>5} of {self._plan.tasks} tasks completed")

    def stop(self) -> None:
        """Take the bars away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    # --- the bars ---

    def _bars(self, records: Sequence[TaskRecord]) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        rows = Table.grid(padding=(0, 1, 0, 0))
        rows.add_column(no_wrap=True, width=8)
        rows.add_column(width=24)
        rows.add_column(justify="right", no_wrap=True, width=4)
        rows.add_column(no_wrap=True, overflow="ellipsis")
        completed = sum(record.is_terminal for record in records)
        total = self._plan.tasks
        share = f"{completed / total:.0%}"
        rows.add_row("all", ProgressBar(total, completed), share, text(f"{completed} of {total} tasks completed"))
        running = [record for record in records if record.state is TaskState.RUNNING]
        for record in running[: max(1, self._out.height - _NAMED - 6)]:
            done = record.fraction or 0.0
            again = f"attempt {record.attempt}, " if record.attempt > 1 else ""
            rows.add_row(
                text(record.id, "yellow" if again else ""),
                ProgressBar(1.0, done),
                f"{done:.0%}",
                text(f"{again}{record.progress or 'begun'}", "dim"),
            )
        return rows

    def _say(self, line: str, style: str = "") -> None:
        if not self._is_silent:
            self._out.print(text(line, style), soft_wrap=True)

    # --- the end ---

    def close(self, figures: Figures) -> None:
        """Print the closing table, and how to look at the file."""
        from rich.table import Table

        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(no_wrap=True)
        rows.add_column(overflow="fold")
        for name, value, is_good in self._closing(figures):
            rows.add_row(f"  {name}", _judged(value, is_good))
        self._out.print()
        self._out.print(rows)
        self._out.print()
        for line in self._how_to_look():
            self._say(line)

    def _closing(self, figures: Figures) -> list[tuple[str, str, bool | None]]:
        plan, again = self._plan, figures.pieces_repeated
        late = " (all was done before the next)" if figures.kills < plan.kills else ""
        rows: list[tuple[str, str, bool | None]] = [
            ("tasks", str(plan.tasks), None),
            ("completed", str(figures.completed), figures.completed == plan.tasks),
            ("lost", str(figures.lost), figures.lost == 0),
            ("words counted right", f"{figures.correct} of {plan.tasks}", figures.correct == plan.tasks),
            ("kills", f"{figures.kills}{late}", None),
            ("tasks reattached", f"{figures.reattached}, at most {figures.most_attempts} attempts", None),
            ("work repeated", f"{again} of {figures.pieces} pieces ({again / max(figures.pieces, 1):.1%})", None),
        ]
        for first, start in zip(figures.reattach, figures.process_start, strict=True):
            rows.append(("time to reattach", "nothing was running" if first is None else _span(first, start), None))
        rows.append(("the whole run", f"{figures.seconds:.1f} s", None))
        return rows

    def _how_to_look(self) -> list[str]:
        db = shlex.quote(str(self._plan.db))
        scope = self._plan.scope
        again = f"SELECT at, id, attempt FROM task_history WHERE scope = '{scope}' AND type = 'reattached'"
        one = f"SELECT at, attempt, type, data FROM task_history WHERE scope = '{scope}' AND id = '{self._example}'"
        return [
            "Look at the file:",
            f"  sqlite3 -readonly -box {db} 'SELECT * FROM session_summary'",
            f'  sqlite3 -readonly -box {db} "{again}"',
            f'  sqlite3 -readonly -box {db} "{one}"',
            f"  lash-store list --db {db} --session {scope} --all",
            f"  lash-store show --db {db} {scope} {self._example}",
        ]


def _judged(value: str, is_good: bool | None) -> Text:
    return text(value, "" if is_good is None else "bold green" if is_good else "bold red")


def _span(seconds: float, process_start: float | None) -> str:
    part = "" if process_start is None else f", {process_start:.2f} s of it the start of the process"
    return f"{seconds:.2f} s{part}"
