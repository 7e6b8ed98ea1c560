"""What SECURITY.md claims, it names tests for; and they are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "SECURITY.md").read_text()


def test_every_claim_names_a_test_that_is_there() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 10
    for row in rows:
        shown = row.rsplit("|", 2)[1]
        named = re.findall(r"`(tests/[\w/.]+)`", shown)
        assert named or "`python -m tests.fuzz`" in shown, row
        for name in named:
            assert (ROOT / name).exists(), name


def test_it_is_among_the_documents_of_the_readme() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
