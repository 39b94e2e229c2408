"""The documents say what is there: exports, messages, settings, examples, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import legion_shm
from legion_shm.transport.frames import MESSAGES

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md")])


def text(name: str) -> str:
    return (REPO / name).read_text(encoding="utf-8")


def test_every_export_is_in_the_list_of_exports_and_nothing_else_is() -> None:
    rows = [line for line in text("docs/api.md").splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == set(legion_shm.__all__)


def test_every_message_is_in_the_protocol_with_its_code() -> None:
    messages = text("docs/protocol.md").partition("## Handles")[0]
    rows = re.findall(r"^\| (\d+) \| (\w+) \|", messages, re.MULTILINE)
    assert {int(code): name for code, name in rows} == {
        code: form.message.__name__ for code, form in MESSAGES.items()
    }


@pytest.mark.parametrize("folder", ["legion_shm", "transport", "supervisor"])
def test_every_module_is_in_the_map(folder: str) -> None:
    where = text("docs/architecture.md").partition("## Where things are")[2].partition("\n## ")[0]
    part = where.partition(f"**`{folder}/`**")[2].partition("\n**`")[0]
    named = re.findall(r"`([\w*/]+\.py)`", part)
    modules = {path.relative_to(REPO / folder) for path in (REPO / folder).glob("*.py")} - {
        Path("__init__.py")
    }
    missing = {str(path) for path in modules if not any(path.match(name) for name in named)}
    assert not missing
    assert all(list((REPO / folder).glob(name)) for name in named)


def test_the_examples_are_those_that_are_tested() -> None:
    examples = {path.stem for path in (REPO / "examples").glob("*.py")}
    assert examples == {
        "plain_script",
        "several_workers",
        "web_service",
        "own_nodes",
        "my_nodes",
        "own_codec",
        "my_curves",
        "notebook_session",
    }
    assert "examples/" in text("README.md")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target
