"""The graph engine's built-in nodes: ComfyUI's names, inputs, defaults and ranges, on plain torch.

Owns the table of them. A workflow made in ComfyUI of these nodes runs here as it is; what a node does to a
pixel is what ComfyUI's node of that name does. Importing this package loads torch.
"""

from __future__ import annotations

from legion_shm.supervisor.graph_nodes import files, filters, generate, latents, transforms

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_MODULES = (files, generate, transforms, filters, latents)

NODE_CLASS_MAPPINGS: dict[str, type] = {
    name: node_class for module in _MODULES for name, node_class in module.NODE_CLASS_MAPPINGS.items()
}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {
    name: text for module in _MODULES for name, text in module.NODE_DISPLAY_NAME_MAPPINGS.items()
}
