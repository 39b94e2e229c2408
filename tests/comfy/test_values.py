"""Every type of ComfyUI between two real ComfyUIs: to the bit, or refused by name, as docs/values.md says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.comfy import values_table
from tests.comfy.conftest import RealComfyUI

pytestmark = [pytest.mark.comfyui, pytest.mark.timeout(960)]


@pytest.fixture(scope="module")
def found(comfyui: RealComfyUI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("values")
    return values_table.observe(str(comfyui.python), comfyui.path, comfyui.arguments, folder)


def test_nothing_arrives_changed(found: dict[str, Any]) -> None:
    known = ("exact", "refused", *values_table.NOT_HERE)
    assert [row for row in found["rows"] if row["outcome"] not in known] == []
    assert sum(row["outcome"] == "exact" for row in found["rows"]) > 130


def test_no_type_of_this_comfyui_is_forgotten(found: dict[str, Any]) -> None:
    assert not values_table.missing(found)


def test_a_core_node_makes_a_value_of_each_type_that_one_gives_or_the_table_says_why_not(
    found: dict[str, Any],
) -> None:
    assert all(reason.startswith("its class; ") for reason in values_table.not_from_nodes(found).values())


def test_where_the_document_says_that_no_core_node_gives_a_type_none_does(found: dict[str, Any]) -> None:
    column = values_table.committed()[found["version"]]
    written = [
        kind
        for (kind, _, maker), cell in column.items()
        if maker.startswith("Python: no core node gives one") and cell not in values_table.NOT_HERE
    ]
    assert written
    assert [kind for kind in written if found["types"][kind]] == []


def test_the_table_in_the_document_says_what_happens(found: dict[str, Any]) -> None:
    committed = values_table.committed()
    assert found["version"] in committed, "docs/values.md has no column of this version; write it anew"
    column = committed[found["version"]]
    seen = values_table.cells(found)
    assert {row: cell for row, cell in column.items() if seen.get(row, "no such type") != cell} == {}
    assert set(seen) <= set(column)


def test_every_row_of_the_table_is_of_a_value_that_some_version_makes() -> None:
    columns = values_table.committed().values()
    cells = {row: [column[row] for column in columns] for row in next(iter(columns))}
    assert [row for row, said in cells.items() if set(said) <= set(values_table.NOT_HERE)] == []


def test_what_is_refused_says_what_to_do(found: dict[str, Any]) -> None:
    refused = [row for row in found["rows"] if row["outcome"] == "refused"]
    assert refused
    advice = ("register_codec", "send ", "can't be sent", "allow it on both sides")
    assert [row for row in refused if not any(text in row["reason"] for text in advice)] == []


def test_values_of_all_types_nested_at_random_arrive_as_they_were(found: dict[str, Any]) -> None:
    assert found["nested"]["wrong"] == []
    assert found["nested"]["cases"] >= 1000
    assert found["nested"]["of"] > 100
