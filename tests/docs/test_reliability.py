"""The fault sheet and the list of attacks name tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("document", ["reliability.md", "security.md"])
def test_each_test_that_is_named_is_there(document: str) -> None:
    named = set(re.findall(r"`(test_\w+|Test\w+)`", (REPO / "docs" / document).read_text(encoding="utf-8")))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py"))
    there = set(re.findall(r"^\s*(?:async )?def (test_\w+)\(", tests, re.MULTILINE))
    there |= set(re.findall(r"^(Test\w+)[ :=(]", tests, re.MULTILINE))
    assert len(named) > 20
    assert not named - there


def test_each_row_of_the_sheet_has_a_test() -> None:
    text = (REPO / "docs" / "reliability.md").read_text(encoding="utf-8")
    sheet = text.partition("## The sheet")[2].partition("\n## ")[0]
    rows = [line for line in sheet.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert len(rows) >= 23
    for row in rows:
        assert re.search(r"`test_\w+`", row.rsplit("|", 2)[1]), row
