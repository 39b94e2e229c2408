"""Every type of ComfyUI between two real ComfyUIs: to the bit, or refused by name, as docs/values.md says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.comfy import values_table
from tests.comfy.conftest import RealComfyUI

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def found(comfyui: RealComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("values")
    return values_table.observe(str(comfyui.python), comfyui.path, comfyui.arguments, folder)


def test_nothing_arrives_changed(found: dict[str, Any]) -> None:
    wrong = [row for row in found["rows"] if row["outcome"] not in ("exact", "refused", "absent")]
    assert not wrong
    assert sum(row["outcome"] == "exact" for row in found["rows"]) > 90


def test_no_type_of_this_comfyui_is_forgotten(found: dict[str, Any]) -> None:
    assert not values_table.missing(found)


def test_the_table_in_the_document_says_what_happens(found: dict[str, Any]) -> None:
    committed = values_table.committed()
    assert found["version"] in committed, "docs/values.md has no column of this version; write it anew"
    seen = {row: cell for row, cell in values_table.cells(found).items() if cell}
    assert committed[found["version"]] == seen


def test_what_is_refused_says_what_to_do(found: dict[str, Any]) -> None:
    refused = [row for row in found["rows"] if row["outcome"] == "refused"]
    assert refused
    assert all("register_codec" in row["reason"] or "send " in row["reason"] for row in refused)
