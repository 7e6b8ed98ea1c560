"""Text that is read: a handle's JSON, a scope, and whatever a shell passes to a command; taken, or one clear line."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import click
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from lash_store import InvalidId, Scope, TaskKind, TaskStore
from lash_store.cli import _COMMANDS, cli
from lash_store.cli.options import span_in
from lash_store.handles import new_handle_id, reference
from tests.acceptance.commands import assert_harmless, run
from tests.fuzz.values import ODD, json_values
from tests.seeds import seed_of

SEED = seed_of("FUZZ_SEED")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 60)
RULES = settings(
    max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]
)

ODD_TEXTS = [text for make in ODD.values() if isinstance(text := make(), str) and "\0" not in text and len(text) < 5000]
WORDS = [
    "#1",
    "#0",
    "#-1",
    "#9223372036854775808",
    "#" + "9" * 400,
    "desktop:s1",
    "index",
    "1h",
    "0s",
    "-5",
    "1e9",
    "nan",
    "99999999999w",
    "2025-01-31",
    "9999-12-31T23:59:59+14:00",
    "0001-01-01T00:00:00+14:00",
    "{",
    "[]",
    '{"a":NaN}',
    "[" * 2000,
    "completed",
    "=",
    "a=b",
    "\udcff\udcfe",
    "/nowhere/x",
    "--",
    "-",
    "*",
    "%",
    "'; DROP TABLE tasks; --",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "agent.db"

    async def make() -> None:
        async with TaskStore(path, runtime="desktop") as store:
            session = await store.session("s1")
            await session.register("index", TaskKind.OTHER)

    asyncio.run(make())
    return path


@seed(SEED)
@RULES
@given(
    st.one_of(
        st.text(max_size=40).map(lambda rest: '{"__handle__":' + rest),
        st.dictionaries(st.sampled_from(["__handle__", "id", "tool", "x"]), json_values, max_size=4),
        st.sampled_from(ODD_TEXTS),
    )
)
def test_what_is_no_handle_is_told_so(value: object) -> None:
    told = ""
    try:
        told = reference(value)  # type: ignore[arg-type]
    except InvalidId as error:
        told = str(error)
    assert 0 < len(told) < 1000


def test_a_handle_comes_back_from_its_json() -> None:
    for _ in range(50):
        name = new_handle_id()
        assert reference({"__handle__": "task", "id": name, "tool": "x"}) == name


@seed(SEED)
@RULES
@given(st.text(max_size=20), st.text(max_size=20))
def test_a_scope_comes_back_from_its_text(runtime: str, session_id: str) -> None:
    try:
        scope = Scope(runtime, session_id)
    except InvalidId:
        return
    assert Scope.parse(str(scope)) == scope


@seed(SEED)
@RULES
@given(
    st.lists(st.tuples(st.integers(0, 10**9 - 1), st.sampled_from("smhdw")), min_size=1, max_size=3),
    st.text(max_size=8),
)
def test_a_span_is_the_sum_of_its_parts_and_nothing_else_is_one(parts: list[tuple[int, str]], other: str) -> None:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    assert span_in("".join(f"{count}{unit}" for count, unit in parts)) == sum(n * units[unit] for n, unit in parts)
    found = span_in(other)
    assert found is None or found >= 0


TRIED = sorted(_COMMANDS.keys() - {"demo"})
"""A demo makes a store of its own and runs for seconds; its options are click's choices."""


def _lines() -> list[list[str]]:
    """Return, for every parameter of every command, a line that leaves a place for a text."""
    lines = []
    context = click.Context(cli)
    for name in TRIED:
        command = cli.get_command(context, name)
        assert command is not None
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                if not parameter.is_flag and not parameter.is_eager and parameter.opts != ["--db"]:
                    lines.append([name, parameter.opts[-1], "?"])
            else:
                lines.append([name, "?"])
    return lines


LINES = _lines()


@seed(SEED)
@RULES
@given(st.sampled_from(LINES), st.sampled_from(WORDS + ODD_TEXTS), st.sampled_from([[], ["#1"], ["desktop:s1"]]))
def test_whatever_a_shell_passes_on_is_taken_or_one_clear_line(
    made: Path, tmp_path_factory: pytest.TempPathFactory, line: list[str], word: str, rest: list[str]
) -> None:
    if line[0] == "top" or (line[0] == "events" and "--follow" in rest):
        rest = ["--once"]
    folder = tmp_path_factory.mktemp("here")
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = run(*[word if part == "?" else part for part in line], *rest, db=made)
    finally:
        os.chdir(before)
    assert done.returncode in {0, 1, 2, 3}, (line, word, done)
    assert "Traceback" not in done.stderr
    assert_harmless(done.stdout)
    assert_harmless(done.stderr)


def test_every_command_has_its_texts_tried() -> None:
    # these have flags alone
    flags = {"current", "doctor", "history", "schema", "sessions", "stats", "tree", "upgrade"}
    assert {line[0] for line in LINES} >= {*TRIED} - flags
    assert len(LINES) > 40
