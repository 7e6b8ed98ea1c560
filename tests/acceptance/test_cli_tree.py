"""The family of a session or a task: what is under what, at any depth, and what a damaged file cannot do to it."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import agent_file
from tests.acceptance.commands import assert_harmless, run


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tree") / "agent.db"
    asyncio.run(agent_file.make(path))
    return path


@pytest.fixture
def edited(db: Path, tmp_path: Path) -> Path:
    """A copy that a test changes by hand."""
    path = tmp_path / "edited.db"
    with sqlite3.connect(db) as source, sqlite3.connect(path) as target:
        source.backup(target)
    source.close()
    target.close()
    return path


def change(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER IF EXISTS tasks_terminal_is_final")
        for sql in statements:
            connection.execute(sql)
    connection.close()


def nodes(*arguments: str, db: Path) -> list[dict[str, Any]]:
    done = run("tree", *arguments, "--json", db=db)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def outline(*arguments: str, db: Path) -> list[str]:
    """Return ids and scopes, indented by their depth."""
    return ["  " * node["depth"] + node.get("id", node["scope"]) for node in nodes(*arguments, db=db)]


RESEARCH = ["  research", "    part", "    desktop:deep", "      fetch"]


def test_a_session_has_its_tasks_under_it_and_a_sub_agent_the_session_it_works_in(db: Path) -> None:
    assert outline("desktop:s1", db=db) == [
        "desktop:s1",
        "  index",
        "  bad",
        "  listener",
        *RESEARCH,
        "  monitor:tests",
        "  bystander",
    ]


def test_a_task_comes_with_what_it_is_under_and_all_under_it(db: Path) -> None:
    assert outline("research", db=db) == ["desktop:s1", *RESEARCH]
    assert outline("desktop:s1", "part", db=db) == ["desktop:s1", "  research", "    part"]
    assert outline("fetch", db=db) == ["desktop:s1", "  research", "    desktop:deep", "      fetch"]
    assert [node["is_asked"] for node in nodes("fetch", db=db)] == [False, False, False, True]


def test_a_session_that_an_agent_works_in_comes_with_that_agent(db: Path) -> None:
    above = ["desktop:s1", "  research", "    desktop:deep", "      fetch"]
    assert outline("desktop:deep", db=db) == outline("deep", db=db) == above


def test_without_a_name_the_whole_file_is_there_and_everything_once(db: Path) -> None:
    found = outline(db=db)
    assert found[-2:] == ["desktop:s2", "desktop:s3"]
    assert len(found) == len({line.strip() for line in found}) == 12


def test_only_live_work_leaves_what_it_is_under(db: Path) -> None:
    assert outline("desktop:s1", "--live", db=db) == ["desktop:s1", "  listener", "  research"]
    assert outline("fetch", "--live", db=db) == ["desktop:s1", "  research"]


def test_what_is_left_out_is_counted_and_live_work_is_not(db: Path) -> None:
    found = nodes("desktop:s1", "--limit", "3", db=db)
    assert [node["id"] for node in found if node["depth"] == 1] == ["listener", "research", "bystander"]
    assert found[0]["left_out"] == 3
    lines = run("tree", "desktop:s1", "--limit", "3", db=db).stdout.splitlines()
    assert lines[-1] == "└─ … 3 more: see --limit"
    assert lines[-2].startswith("├─ bystander ")
    assert run("tree", "desktop:s1", "--limit", "1", db=db).stdout.splitlines()[1:] != []


def test_what_is_left_out_is_told_where_it_would_stand(edited: Path) -> None:
    change(edited, "UPDATE tasks SET parent_seq = 4 WHERE id IN ('index', 'bystander')")
    lines = run("tree", "desktop:s1", "--limit", "3", db=edited).stdout.splitlines()
    assert [line.partition(" #")[0].partition("  open")[0] for line in lines] == [
        "desktop:s1",
        "├─ listener",
        "├─ research",
        "│  ├─ part",
        "│  ├─ bystander",
        "│  ├─ desktop:deep",
        "│  │  └─ fetch",
        "│  └─ … 1 more: see --limit",
        "├─ monitor:tests",
        "└─ … 1 more: see --limit",
    ]


def test_a_line_says_state_attempt_and_age_and_guides_show_what_is_under_what(db: Path) -> None:
    lines = run("tree", "desktop:s1", db=db).stdout.splitlines()
    assert lines[0].startswith("desktop:s1  open  ")
    starts = [line.partition("#")[0].rstrip() for line in lines[4:8]]
    assert starts[0] == "├─ research"
    assert starts[1] == "│  ├─ part"
    assert starts[2].startswith("│  └─ desktop:deep  open  ")
    assert starts[3] == "│     └─ fetch"
    assert "subagent  pending  try 1  " in lines[4]
    assert lines[-1].startswith("└─ bystander")


def test_an_output_that_has_no_lines_to_draw_with_gets_plain_ones(db: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import ConsoleOptions

    monkeypatch.setattr(ConsoleOptions, "ascii_only", property(lambda _: True))
    assert "|     `- fetch" in run("tree", "desktop:s1", db=db).stdout


def test_work_that_was_moved_is_under_its_parent_and_says_where_it_is(edited: Path) -> None:
    change(edited, "UPDATE tasks SET scope = 'desktop:s2' WHERE id = 'part'")
    assert outline("part", db=edited) == ["desktop:s1", "  research", "    part"]
    assert "in desktop:s2" in run("tree", "part", db=edited).stdout
    assert outline("desktop:s2", db=edited) == ["desktop:s2"]


def test_of_two_agents_in_a_session_the_live_one_has_it_and_the_other_says_so(edited: Path) -> None:
    change(edited, "UPDATE tasks SET child_session_id = 'deep' WHERE id = 'bystander'")
    assert outline("deep", db=edited)[1] == "  research"
    assert "works in desktop:deep" in run("tree", "bystander", db=edited).stdout


def test_a_session_without_an_agent_is_under_the_session_it_belongs_to(edited: Path) -> None:
    change(edited, "UPDATE sessions SET parent = 'desktop:s2' WHERE scope = 'desktop:s3'")
    assert outline("desktop:s3", db=edited) == outline("desktop:s2", db=edited) == ["desktop:s2", "  desktop:s3"]


def test_a_parent_that_is_gone_leaves_its_children_to_their_session(edited: Path) -> None:
    change(edited, "UPDATE tasks SET parent_seq = 999 WHERE id = 'part'")
    assert outline("part", db=edited) == ["desktop:s1", "  part"]
    assert "  part" in outline("desktop:s1", db=edited)


def test_circles_that_no_store_makes_are_walked_once(edited: Path) -> None:
    change(
        edited,
        "UPDATE tasks SET child_session_id = 's1' WHERE id = 'fetch'",
        "UPDATE tasks SET parent_seq = task_seq WHERE id = 'index'",
        "UPDATE sessions SET parent = 'desktop:s3' WHERE scope = 'desktop:s2'",
        "UPDATE sessions SET parent = 'desktop:s2' WHERE scope = 'desktop:s3'",
    )
    for arguments in ([], ["desktop:s1"], ["fetch"], ["index"], ["desktop:s2"], ["desktop:s3"]):
        found = [line.strip() for line in outline(*arguments, db=edited)]
        assert len(found) == len({*found}), arguments
        assert run("tree", *arguments, db=edited).returncode == 0
    assert {"desktop:s1", "desktop:s2", "desktop:s3", "desktop:deep"} <= {line.strip() for line in outline(db=edited)}


def test_a_family_of_a_thousand_generations_is_told(edited: Path) -> None:
    change(
        edited,
        "CREATE TEMP TABLE pattern AS SELECT * FROM tasks WHERE id = 'part'",
        """WITH RECURSIVE n(i) AS (SELECT 10001 UNION ALL SELECT i + 1 FROM n WHERE i < 11000)
        INSERT INTO tasks (task_seq, parent_seq, scope, id, kind, mode, state, label, recovery, cancel_policy, attempt,
          attempts_spent, max_attempts, result, created_at, updated_at, completed_at)
        SELECT i, iif(i = 10001, NULL, i - 1), scope, 'gen-' || i, kind, mode, state, label, recovery, cancel_policy, attempt,
          attempts_spent, max_attempts, result, created_at, updated_at, completed_at FROM n, pattern""",
    )
    assert nodes("gen-11000", db=edited)[-1]["depth"] == 1000
    assert run("tree", "gen-10001", db=edited).stdout.count("gen-") == 1000


def test_a_name_of_a_session_and_a_task_is_not_guessed_at(edited: Path) -> None:
    change(edited, "UPDATE tasks SET id = 's1' WHERE id = 'fetch'")
    done = run("tree", "s1", db=edited)
    assert done.returncode == 1
    assert "write desktop:s1 for the one, desktop:deep s1 for the other" in done.stderr
    assert outline("desktop:deep", "s1", db=edited)[-1] == "      s1"


def test_a_hostile_name_is_only_shown(edited: Path) -> None:
    change(edited, "UPDATE tasks SET id = 'x' || char(27, 10, 8238) || '[red]' WHERE id = 'fetch'")
    printed = run("tree", db=edited).stdout
    assert_harmless(printed)
    assert "x\\x1b\\n\\u202e[red] #" in printed
