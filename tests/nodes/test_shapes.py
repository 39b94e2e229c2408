"""LegionPower's saved workflows find its nodes, slots and widgets where they were."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from legion_shm.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

REPO = Path(__file__).resolve().parents[2]
CONFIG, CAMPAIGN, ANY = "LEGION_CONFIG", "LEGION_CAMPAIGN", "*"


def channels(kind: str, count: int) -> list[str]:
    return [f"{kind}_{number}" for number in range(1, count + 1)]


def master(count: int) -> tuple[list[str], list[str], str, str]:
    display = f"Legion: Master ({count} channels)"
    inputs = ["legion_config", "legion_campaign", *channels("input", count)]
    return inputs, ["legion_campaign", *channels("output", count)], display, "Legion"


# Per class key: the first inputs in order, the first outputs in order, display name, category.
LEGION_POWER: dict[str, tuple[list[str], list[str], str, str]] = {
    "LegionConfig": (["config_yaml"], ["legion_config"], "Legion: Configuration", "Legion"),
    "LegionWarmup": (["legion_config"], ["legion_campaign"], "Legion: Warmupper", "Legion"),
    "LegionMaster3": master(3),
    "LegionMaster6": master(6),
    "LegionMaster": master(12),
    "LegionJoin": (["legion_campaign"], channels("output", 5), "Legion: Join Campaign", "Legion"),
    "LegionJoinAll": (
        channels("campaign", 4),
        channels("campaign", 4),
        "Legion: Join All Campaigns",
        "Legion",
    ),
    "LegionExporter": (
        ["data_exchange_root", *channels("input", 5)],
        [],
        "Legion: Exporter",
        "Legion/IO",
    ),
    "LegionImporter": (["data_exchange_root"], channels("output", 5), "Legion: Importer", "Legion/IO"),
}


def declared(class_type: str) -> dict[str, Any]:
    inputs = NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()  # type: ignore[attr-defined]
    return {**inputs.get("required", {}), **inputs.get("optional", {})}


@pytest.mark.parametrize("class_type", LEGION_POWER)
def test_a_node_keeps_its_name_its_slots_and_their_order(class_type: str) -> None:
    inputs, outputs, display, category = LEGION_POWER[class_type]
    node: Any = NODE_CLASS_MAPPINGS[class_type]
    assert list(declared(class_type))[: len(inputs)] == inputs
    names = list(getattr(node, "RETURN_NAMES", ()))
    assert names[: len(outputs)] == outputs
    assert len(names) == len(node.RETURN_TYPES)
    assert NODE_DISPLAY_NAME_MAPPINGS[class_type] == display
    assert category == node.CATEGORY


def test_links_carry_their_types() -> None:
    assert declared("LegionMaster")["legion_config"][0] == CONFIG
    assert declared("LegionMaster")["legion_campaign"][0] == CAMPAIGN
    assert declared("LegionMaster")["input_12"][0] == ANY
    assert NODE_CLASS_MAPPINGS["LegionConfig"].RETURN_TYPES == (CONFIG,)  # type: ignore[attr-defined]
    assert NODE_CLASS_MAPPINGS["LegionMaster3"].RETURN_TYPES == (CAMPAIGN, ANY, ANY, ANY)  # type: ignore[attr-defined]


@pytest.mark.parametrize("class_type", ["LegionMaster", "LegionMaster3", "LegionMaster6"])
def test_a_master_requires_nothing_that_legion_powers_did_not_have(class_type: str) -> None:
    assert "required" not in NODE_CLASS_MAPPINGS[class_type].INPUT_TYPES()  # type: ignore[attr-defined]


def test_all_twelve_channels_are_everywhere() -> None:
    twelve = channels("output", 12)
    for class_type in ("LegionMaster", "LegionJoin", "LegionImporter"):
        assert set(twelve) <= set(NODE_CLASS_MAPPINGS[class_type].RETURN_NAMES)  # type: ignore[attr-defined]
    assert set(channels("input", 12)) <= set(declared("LegionExporter"))


def test_the_yaml_is_the_first_widget_and_new_widgets_are_optional() -> None:
    inputs = NODE_CLASS_MAPPINGS["LegionConfig"].INPUT_TYPES()  # type: ignore[attr-defined]
    assert list(inputs["required"]) == ["config_yaml"]
    assert all("default" in spec[1] for spec in inputs["optional"].values())


def test_every_node_has_a_name_a_file_and_a_help_page_of_its_own() -> None:
    assert set(NODE_CLASS_MAPPINGS) == set(NODE_DISPLAY_NAME_MAPPINGS)
    modules = [node.__module__ for node in NODE_CLASS_MAPPINGS.values()]
    assert len(set(modules)) == len(modules)
    pages = {path.stem for path in (REPO / "web" / "docs").glob("*.md")}
    assert pages == set(NODE_CLASS_MAPPINGS)


def test_the_nodes_import_without_torch_without_comfyui_and_without_the_supervisor() -> None:
    program = (
        "import sys, legion_shm.nodes as n\n"
        "for c in n.NODE_CLASS_MAPPINGS.values(): c.INPUT_TYPES()\n"
        "late = ('torch', 'zmq', 'comfy', 'folder_paths', 'legion_shm.supervisor.api')\n"
        "print([m for m in late if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr
