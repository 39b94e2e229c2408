"""LegionConfig: describes a worker and how its workflow is run.

Owns the node's shape; the keys of its YAML are legion_yaml.py's.
"""

from __future__ import annotations

from typing import Any

from legion_shm.nodes.link_types import LEGION_CONFIG

__all__ = ["LegionConfig"]

_AS_IN_YAML = "as in YAML"
_MODES: dict[str, dict[str, object]] = {
    _AS_IN_YAML: {},
    "wait": {"execution.asynch": False, "execution.dry_run": False},
    "background": {"execution.asynch": True, "execution.dry_run": False},
    "dry run": {"execution.dry_run": True},
}
_ENGINES = (_AS_IN_YAML, "comfy", "graph")
_MODELS = (_AS_IN_YAML, "auto", "reference", "recipe")
_DAY_S = 86_400


class LegionConfig:
    """Makes a LEGION_CONFIG of YAML and of widgets; a widget that was left alone leaves it to the YAML."""

    RETURN_TYPES = (LEGION_CONFIG,)
    RETURN_NAMES = ("legion_config",)
    FUNCTION = "create_config"
    WRITES_SHARED = False
    CATEGORY = "Legion"
    DESCRIPTION = (
        "Describes a worker, and how a Legion: Master runs its workflow there. Equal ones share a worker."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        from legion_shm.nodes.folders import Folders, default_yaml, workflow_names

        folders = Folders.current()
        files = [_AS_IN_YAML, *workflow_names(folders)]
        return {
            "required": {
                "config_yaml": (
                    "STRING",
                    {"default": default_yaml(folders), "multiline": True, "dynamicPrompts": False},
                ),
            },
            "optional": {
                "workflow": (files, {"default": _AS_IN_YAML, "tooltip": "The worker's workflow."}),
                "mode": (
                    list(_MODES),
                    {
                        "default": _AS_IN_YAML,
                        "tooltip": "wait: the Master waits for its outputs. background: it goes on, and "
                        "Join waits. dry run: nothing is run, the inputs come back.",
                    },
                ),
                "engine": (
                    list(_ENGINES),
                    {"default": _AS_IN_YAML, "tooltip": "comfy: a real ComfyUI. graph: the built-in engine."},
                ),
                "gpu": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "CUDA_VISIBLE_DEVICES of the worker: 1; 0,1; none. Empty: as in YAML.",
                    },
                ),
                "extra_args": (
                    "STRING",
                    {
                        "default": "",
                        "tooltip": "Command line arguments of the worker's ComfyUI, after those in YAML.",
                    },
                ),
                "startup_timeout": (
                    "INT",
                    {"default": 0, "min": 0, "max": _DAY_S, "tooltip": "Seconds; 0: as in YAML."},
                ),
                "idle_timeout": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": _DAY_S,
                        "tooltip": "An idle worker ends after so many seconds; 0: as in YAML.",
                    },
                ),
                "max_workers": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 256,
                        "tooltip": "How many such workers may run at a time; 0: as in YAML.",
                    },
                ),
                "models": (
                    list(_MODELS),
                    {
                        "default": _AS_IN_YAML,
                        "tooltip": "How the weights of models reach the worker. reference: through shared "
                        "memory. recipe: the worker reads the file. auto: the cheaper.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, workflow: object = None) -> bool:  # noqa: N802 - the protocol's name
        """A file that is gone is told of, with its folders, by the Master that needs it."""
        return True

    @classmethod
    def IS_CHANGED(  # noqa: N802 - the protocol's name
        cls, config_yaml: str | None = None, workflow: str | None = "", **widgets: Any
    ) -> str | float:
        """The content of the workflow's file, so that Masters run again when it was edited."""
        from legion_shm.errors import ConfigError
        from legion_shm.nodes.worker_workflow import fingerprint, fingerprint_of_all

        if config_yaml is None:
            return float("nan")  # the text comes over a link, and is not told here
        if workflow is None:
            return fingerprint_of_all()  # so does the name
        try:
            configuration = _configuration(config_yaml, workflow, **widgets)
        except ConfigError as error:
            return str(error)
        return fingerprint(text="", name=configuration.workflow)

    def create_config(self, config_yaml: str, **widgets: Any) -> tuple[object]:
        return (_configuration(config_yaml, **widgets),)


def _configuration(
    config_yaml: str,
    workflow: str | None = None,
    mode: str | None = None,
    engine: str | None = None,
    gpu: str | None = None,
    extra_args: str | None = None,
    startup_timeout: int | None = None,
    idle_timeout: int | None = None,
    max_workers: int | None = None,
    models: str | None = None,
) -> Any:
    from dataclasses import replace

    from legion_shm.nodes.legion_yaml import parse_configuration
    from legion_shm.nodes.yaml_settings import Setting

    overrides: dict[str, object] = dict(_MODES[mode or _AS_IN_YAML])
    if workflow not in (None, "", _AS_IN_YAML):
        overrides["workflow"] = workflow
    if engine not in (None, _AS_IN_YAML):
        overrides["comfyui.type"] = engine
    if models not in (None, _AS_IN_YAML):
        overrides["execution.models"] = models
    if gpu and gpu.strip():
        overrides["execution.env_vars.CUDA_VISIBLE_DEVICES"] = (
            "" if gpu.strip().lower() == "none" else gpu.strip()
        )
    numbers = {
        "execution.startup_timeout": startup_timeout,
        "execution.idle_timeout": idle_timeout,
        "execution.max_workers": max_workers,
    }
    overrides |= {key: value for key, value in numbers.items() if value}
    configuration = parse_configuration(config_yaml, overrides)
    if extra_args and extra_args.strip():
        words = Setting("execution.extra_args", extra_args, "legion_config, widget").words()
        configuration = replace(configuration, extra_args=(*configuration.extra_args, *words))
    return configuration
