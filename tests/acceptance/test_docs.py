"""The documents: every command in them is one that the command line has, and every file they point to is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from lash_store.cli import _COMMANDS, cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_LINKS = re.compile(r"!?\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


def commands(page: Path) -> list[str]:
    """Return the lines of a page's blocks that are commands of ours."""
    blocks = page.read_text().split("```")[1::2]
    return [line.strip() for block in blocks for line in block.splitlines() if line.startswith("lash-store ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_page_is_one_that_is_there(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)[1:]
        if "|" in words:
            words = words[: words.index("|")]
        place = next((number for number, word in enumerate(words) if word in _COMMANDS), None)
        if place is None:
            assert words == ["--help"], line
            continue
        with click.Context(cli, info_name="lash-store") as outer:
            command = cli.get_command(outer, words[place])
            assert command is not None
            try:
                # --db may stand before the command, too
                command.make_context(words[place], [*words[:place], *words[place + 1 :]], parent=outer).close()
            except click.exceptions.Exit:
                assert "--help" in words, line


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_points_to_is_there(page: Path) -> None:
    for target in _LINKS.findall(page.read_text()):
        assert (page.parent / target).exists(), target
