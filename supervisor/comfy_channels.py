"""Reading each numbered input on its own, so that a new input 2 leaves what is made of input 1 cached.

Owns a change to the prompt that ComfyUI executes; the one it validates is the user's.

ComfyUI's cache keys know a node as a whole: with one importer of an image and a seed, a new seed would
encode the same image again. So links to an importer's outputs become links to LegionInput nodes, one
for each input of the job, which are changed when that input is. Values and order stay what they were.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from legion_shm.workflow import CHANNELS, Workflow, is_link

__all__ = ["split_importers"]

_IMPORTER = "LegionImporter"
_INPUT = "LegionInput"


def split_importers(prompt: Workflow, given: Collection[str]) -> dict[str, str]:
    """Rewrite ``prompt`` in place; returns the importer that each added node stands for.

    ``given`` names the job's inputs. What an importer gives for those that are absent stays its own to give.
    """
    stands_for: dict[str, str] = {}
    for importer, links in _links_to_importers(prompt).items():
        if len({slot for _, _, slot in links}) < 2:
            continue
        for inputs, name, slot in links:
            channel = f"input_{slot + 1}"
            if slot < CHANNELS and channel in given:
                node_id = f"{importer}.{channel}"
                if node_id not in stands_for and node_id in prompt:
                    continue  # the user's own node has that id
                prompt[node_id] = {"class_type": _INPUT, "inputs": {"name": channel}}
                stands_for[node_id] = importer
                inputs[name] = [node_id, 0]
    return stands_for


def _links_to_importers(prompt: Workflow) -> dict[str, list[tuple[dict[str, Any], str, int]]]:
    found: dict[str, list[tuple[dict[str, Any], str, int]]] = {}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if is_link(value) and prompt[value[0]]["class_type"] == _IMPORTER:
                found.setdefault(value[0], []).append((node["inputs"], name, int(value[1])))
    return found
