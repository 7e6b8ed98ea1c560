"""
Writes docs/cookbook.md: the questions and statements of the package, and what the shell answered on the file of a real run.

It puts the questions into Datasette's metadata, too, beside the descriptions that stand there.

Run it from the repository: ``python -m tests.acceptance.cookbook_page``.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lash_store.cli.ask import parameter_line, script
from lash_store.cli.cookbook import COOKBOOK, Query
from tests.acceptance.cookbook_programs import run

PAGE = Path(__file__).parents[2] / "docs" / "cookbook.md"
METADATA = Path(__file__).parents[2] / "examples" / "datasette" / "metadata.json"

ASKED: Mapping[str, Mapping[str, object]] = {
    "family": {"task": "helper"},
    "steps": {"task": "index"},
    "stuck-cancels": {"seconds": 0},
    "handles": {"session": "desktop:s5"},
    "window": {"session": "desktop:s2"},
    "longest-waits": {"limit": 6},
}
"""The parameters that the page shows set."""

INTRO = """\
# Twenty questions about a file

A store is one SQLite file, and the stock `sqlite3` shell (3.38 or newer) reads it: beside the owner that writes it, or a copy
of a stopped one.

```
sqlite3 -readonly -box agent.db
```

Say `-readonly`: the last shell to close a file that it may write tidies up after a dead owner. A parameter is given by a line of
its own, a text in both kinds of quotes; one that is not given is NULL, and means all. `.parameter clear` forgets them.

```
.parameter set :session "'desktop:s1'"
.parameter set :limit 5
```

`lash-store query` lists these questions, and `lash-store query NAME --set session=desktop:s1` asks one. `--json` gives the
rows to programs, and `--sql` prints the statement with its parameter lines, to be pasted or piped into the shell. The shell
prints control characters in data as they are; `lash-store` does not. Times are UTC.
[Metadata for Datasette](../examples/datasette/metadata.json) has the same questions.

A file says what was written last. Of a stopped store, what was running still reads `running`: the next one to open it finds its
owner dead.

What is shown below was asked of one file, in which an owner had been killed, and the next one was at work.
"""


def section(query: Query, output: str) -> str:
    """Write what the page has of one query."""
    lines = [f"## {query.name}", "", f"**{query.question}** {query.notes}", ""]
    for one in query.parameters:
        lines.append(f"- `:{one.name}`: {one.meaning}; " + (f"without it: {one.default}" if one.default else "needed"))
    lines += [""] if query.parameters else []
    known = {one.name: one for one in query.parameters}
    shown = [parameter_line(known[name], value) for name, value in ASKED.get(query.name, {}).items()]
    return "\n".join([*lines, "```sql", *shown, f"{query.sql};", "```", "", "```", *output.splitlines(), "```", ""])


def page(outputs: Mapping[str, str]) -> str:
    """Write the page."""
    return "\n".join([INTRO, *(section(query, outputs[query.name]) for query in COOKBOOK.values())])


def outputs(text: str) -> dict[str, str]:
    """Read back what a page shows as answers."""
    found = {}
    for part in text.split("\n## ")[1:]:
        found[part.partition("\n")[0]] = part.rpartition("\n```\n")[0].rpartition("\n```\n")[2]
    return found


def answer(path: Path, query: Query) -> str:
    """Ask the shell, for people."""
    values = {**dict.fromkeys(one.name for one in query.parameters), **ASKED.get(query.name, {})}
    command = ["sqlite3", "-readonly", "-header", "-column", str(path)]
    done = subprocess.run(command, input=script(query, values), capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def canned() -> dict[str, dict[str, Any]]:
    """Return the questions as Datasette's canned queries."""
    return {
        query.name: {
            "title": query.question,
            "description": " ".join(
                [
                    query.notes,
                    *(f":{one.name} is {one.meaning} ({one.default or 'needed'})." for one in query.parameters),
                ]
            ),
            "sql": query.sql,
            "params": [one.name for one in query.parameters],
        }
        for query in COOKBOOK.values()
    }


def main() -> None:
    """Make the run, ask, and write the page and the metadata."""
    described = json.loads(METADATA.read_text())
    described["databases"]["agent"]["queries"] = canned()
    METADATA.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "agent.db")
        with run(path):
            PAGE.write_text(page({name: answer(path, query) for name, query in COOKBOOK.items()}))


if __name__ == "__main__":
    main()
