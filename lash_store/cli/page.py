"""Owns the web page of a timeline: the picture and a table of its tasks, in one file that asks for nothing and runs nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from .chronicle import Chronicle, Line
from .drawing import draw
from .lifelines import Phase, iso_of
from .paper import harmless, span_of

__all__ = ["page"]

_STYLE = """
:root { color-scheme: light dark }
body { margin: 0; padding: 12px; background: #ffffff; color: #1f2328;
  font: 13px ui-sans-serif, system-ui, "Segoe UI", sans-serif }
svg { display: block; max-width: 100%; height: auto }
table { border-collapse: collapse; margin: 16px 0; max-width: 1200px }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #dfe3e8 }
td:first-child, th:first-child { padding-left: 16px } .n { text-align: right; white-space: nowrap }
td.id { font-family: ui-monospace, monospace; overflow-wrap: anywhere; max-width: 420px; unicode-bidi: isolate }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3 } th, td { border-color: #262d36 }
}
"""

_COLUMNS = (Phase.RUNNING, Phase.WAITING, Phase.QUEUED, Phase.LOST)


def page(chronicle: Chronicle, title: str) -> str:
    """Return the page as the text of an HTML file. What a picture says in a tooltip is said by the browser's own."""
    return "\n".join(_lines(chronicle, title))


def _lines(chronicle: Chronicle, title: str) -> Iterator[str]:
    yield '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    # whatever the data is: nothing is fetched, and nothing runs
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width">'
    yield f"<title>{harmless(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>"
    yield draw(chronicle, title)
    yield "<table>\n<thead><tr>"
    for name in ("task", "session", "state", "tries"):
        yield f"<th{_number(name)}>{name}</th>"
    for name in ("ran", "waited", "queued", "lost", "in all"):
        yield f'<th class="n">{name}</th>'
    yield "<th>ended (UTC)</th></tr></thead>\n<tbody>"
    for section in chronicle.sections:
        for line in section.lines:
            if line.task is not None:
                yield _row(line)
    yield "</tbody>\n</table>\n</body>\n</html>\n"


def _number(name: str) -> str:
    return ' class="n"' if name == "tries" else ""


def _row(line: Line) -> str:
    task, life = line.task, line.life
    assert task is not None
    assert life is not None
    took: Counter[Phase] = Counter()
    for one in life.segments:
        took[one.phase] += one.end - one.begin
    cells = [
        f'<td class="id">{harmless(task.id)} #{task.task_seq}</td>',
        f"<td>{harmless(task.scope)}</td><td>{harmless(task.state)}</td>",
        f'<td class="n">{task.attempt}</td>',
        *(f'<td class="n">{span_of(took[phase]) if took[phase] else ""}</td>' for phase in _COLUMNS),
        f'<td class="n">{span_of(sum(took.values()))}</td>',
        f"<td>{'' if life.end is None else iso_of(life.end[1]).replace('T', ' ').removesuffix('Z')}</td>",
    ]
    return f"<tr>{''.join(cells)}</tr>"
