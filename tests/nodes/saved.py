"""Building saved workflows, and the node classes in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from legion_shm.nodes.saved_format import convert_saved_workflow

CLASSES: dict[str, dict[str, Any]] = {
    "Source": {"required": {}},
    "Sink": {"required": {"image": ("IMAGE",)}},
    "Sampler": {
        "required": {
            "model": ("MODEL",),
            "seed": ("INT", {"default": 0}),
            "steps": ("INT", {"default": 20}),
            "sampler": (["euler", "ddim"],),
        },
        "optional": {"denoise": ("FLOAT", {"default": 1.0}), "image": ("IMAGE",)},
    },
    "Text": {
        "required": {"text": ("STRING", {"multiline": True, "dynamicPrompts": True}), "clip": ("CLIP",)}
    },
    "Loader": {
        "required": {"image": (["a.png", "b.png"], {"image_upload": True})},
        "optional": {"channel": ("STRING", {"default": "red"})},
    },
    "Two": {
        "required": {"one": ("IMAGE",), "two": ("MASK",), "forced": ("INT", {"forceInput": True})},
        "optional": {"three": ("FLOAT", {})},
    },
    "Combo": {
        "required": {
            "format": (
                "COMFY_DYNAMICCOMBO_V3",
                {
                    "options": [
                        {"key": "flac", "inputs": {"required": {}}},
                        {
                            "key": "mp3",
                            "inputs": {"required": {"quality": ("COMBO", {"options": ["V0", "128k"]})}},
                        },
                    ]
                },
            ),
            "name": ("STRING", {"default": "x"}),
        }
    },
    "Picky": {
        "required": {
            "choice": ("COMBO", {"options": ["a", "b"], "control_after_generate": True}),
            "n": ("INT",),
        }
    },
    "Custom": {"required": {"curve": ("CURVE_EDITOR", {}), "n": ("INT", {"default": 1})}},
    "Points": {"required": {"points": ("STRING", {}), "image": ("IMAGE",)}},
}


def lookup(name: str) -> Mapping[str, Any] | None:
    return {"input": CLASSES[name]} if name in CLASSES else None


class Saved:
    """Builds a saved workflow: nodes with slots by name, links between them."""

    def __init__(self, *, link_objects: bool = False) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[Any] = []
        self._objects = link_objects

    def node(self, node_id: Any, kind: str, *, outputs: int = 1, types: str = "IMAGE", **more: Any) -> None:
        """``more``: fields of the node; ``inputs`` as ``{name: (type, link, is widget)}``."""
        slots = [
            {"name": name, "type": slot[0], "link": slot[1]}
            | ({"widget": {"name": name}} if len(slot) > 2 else {})
            for name, slot in more.pop("inputs", {}).items()
        ]
        made = {
            "id": node_id,
            "type": kind,
            "mode": 0,
            "inputs": slots,
            "outputs": [{"name": "out", "type": types}] * outputs,
            "widgets_values": [],
        }
        self.nodes.append(made | more)

    def link(
        self, number: int, origin: Any, slot: int, target: Any, target_slot: int, kind: str = "IMAGE"
    ) -> None:
        fields = [number, origin, slot, target, target_slot, kind]
        names = ["id", "origin_id", "origin_slot", "target_id", "target_slot", "type"]
        self.links.append(dict(zip(names, fields, strict=True)) if self._objects else fields)

    def document(self, **more: Any) -> dict[str, Any]:
        return {"nodes": self.nodes, "links": self.links, "version": 0.4, **more}


def convert(saved: Saved, **more: Any) -> dict[str, dict[str, Any]]:
    made = convert_saved_workflow(saved.document(**more), lookup)
    for node in made.values():
        node.pop("_meta")
    return made


def inputs(class_type: str, values: Any, **fields: Any) -> dict[str, Any]:
    """The inputs of a single node with these widget values."""
    saved = Saved()
    saved.node(1, class_type, widgets_values=values, **fields)
    return dict(convert(saved)["1"]["inputs"])
