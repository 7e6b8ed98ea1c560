"""The pictures of the commands in docs: they are there, show what they are to show, and nothing of the machine that made them."""

from __future__ import annotations

import getpass
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from docs.picture import picture
from docs.terminal import screen_of

FOLDER = Path(__file__).parents[2] / "docs" / "screenshots"
SVG = "{http://www.w3.org/2000/svg}"
SHOWN = {
    "list": [
        "session",
        "try",
        "done",
        "completed",
        "failed",
        "abandoned",
        "cancelled",
        "waits for a person's approval",
    ],
    "show": ["attempt", "2 of at most 100", "handles", "children", "remembers", "plan", "reattached"],
    "tree": ["desktop:review", "desktop:research", "├─", "subagent", "rfc-9110"],
    "top": ["1 owner alive", "events/s", "━", "62%", "q quit", "approve", "completed"],
    "doctor": ["dead_owner", "nobody has recovered its", "→", "to see to"],
}
"""What each picture shows, in the words of its command."""


@pytest.mark.parametrize("name", SHOWN)
def test_a_picture_shows_its_command(name: str) -> None:
    root = ElementTree.parse(FOLDER / f"{name}.svg").getroot()
    assert root.tag == f"{SVG}svg"
    title = root.find(f"{SVG}title")
    assert title is not None
    assert (title.text or "").startswith(f"lash-store {name} --db agent.db")
    words = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    assert [word for word in SHOWN[name] if word not in words] == []
    width = float(root.get("width", "0"))
    ends = [float(text.get("x", "0")) + float(text.get("textLength", "0")) for text in root.iter(f"{SVG}text")]
    assert max(ends) < width, "nothing is cut off"


def test_the_picture_of_a_session_shows_its_kill_and_what_came_of_it() -> None:
    root = ElementTree.parse(FOLDER / "timeline.svg").getroot()
    words = " ".join("".join(element.itertext()) for element in root.iter())
    shown = ("agent.db: session desktop:review", "index", "reattached", "owner last heard of, then dead", "abandoned")
    assert [word for word in shown if word not in words] == []


def test_no_picture_tells_of_a_machine_or_reads_anything_from_elsewhere() -> None:
    pictures = sorted(FOLDER.glob("*.svg"))
    assert {*SHOWN, "timeline"} == {path.stem for path in pictures}
    for path in pictures:
        made = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|tmp|Users|var|dev|private)\b", made), path.name
        assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", made), path.name
        assert not re.search(r"(href|src)=|url\((?!#)|<script|<image|@import", made), path.name


def test_a_picture_keeps_columns_looks_and_characters() -> None:
    output = b"a\x1b[1mb\x1b[0m  \x1b[2;31m<&>\x1b[0m\r\n   \x1b[7mchosen   one\x1b[0m\r\n\r\n"
    made = picture(screen_of(output, 20, 5), "x < y", is_whole=False)
    root = ElementTree.fromstring(made)
    title, *found = root.iter(f"{SVG}text")
    assert title.text == "x < y"
    assert [text.text for text in found] == ["a", "b", "<&>", "chosen", "one"]
    a, b, angles, _, one = found
    assert (b.get("font-weight"), a.get("font-weight"), angles.get("opacity")) == ("bold", None, "0.62")
    places = [float(text.get("x", "0")) for text in found]
    assert [round((place - places[0]) / 8.4, 3) for place in places] == [0, 1, 4, 3, 12]
    assert one.get("fill") == "#16181d"
    heights = {picture(screen_of(output, 20, 5), "t", is_whole=whole).splitlines()[0] for whole in (True, False)}
    assert len(heights) == 2, "the empty lines at the end are left out, unless all is to be seen"
