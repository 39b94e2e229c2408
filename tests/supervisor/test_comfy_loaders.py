"""The watch over ComfyUI's loaders, against a ComfyUI of three lines; test_comfy_models.py has a real one."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from legion_shm.supervisor import comfy_loaders
from legion_shm.supervisor.comfy_loaders import call_loader, loaded_by, watch_loaders
from tests import needs

_KEY = "comfy.sd.load_diffusion_model"


class _Patcher:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model folder of a ComfyUI whose loader makes a layer as wide as its file is long."""
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"12")
    paths: Any = types.ModuleType("folder_paths")
    paths.folder_names_and_paths = {
        "diffusion_models": ([str(folder)], set()),
        "custom_nodes": (["/"], set()),
    }
    sd: Any = types.ModuleType("comfy.sd")

    def load_diffusion_model(unet_path: str, model_options: dict[str, Any] = {}) -> _Patcher:  # noqa: B006
        model_options["seen"] = True
        width = os.path.getsize(unet_path)
        return _Patcher(torch.nn.Linear(width, width))

    load_diffusion_model.__module__ = "comfy.sd"
    sd.load_diffusion_model = load_diffusion_model
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    monkeypatch.setitem(sys.modules, "comfy.sd", sd)
    watch_loaders()
    return folder


def load(path: Path, **options: Any) -> Any:
    return sys.modules["comfy.sd"].load_diffusion_model(str(path), **options)


def recipe(model: Any) -> tuple[str, int, Any, Any]:
    found = loaded_by(model)
    assert found is not None
    return found.loader, found.part, found.arguments, found.files


def test_what_a_loader_made_is_made_again_by_the_same_call(models: Path) -> None:
    made = load(models / "a.safetensors", model_options={"dtype": torch.float16})
    module, patcher = call_loader(*recipe(made.model))
    assert module.in_features == 2
    assert patcher.model is module


def test_arguments_are_those_of_the_call_whatever_the_loader_does_to_them(models: Path) -> None:
    made = load(models / "a.safetensors", model_options={"dtype": torch.float16})
    assert recipe(made.model)[2]["model_options"] == {"dtype": torch.float16}


def test_a_class_method_of_a_node_is_watched_and_called_again(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class UpscaleModelLoader:
        SCALE = 2

        @classmethod
        def execute(cls, model_name: str) -> Any:
            width = cls.SCALE * len(model_name)
            return types.SimpleNamespace(args=(_Patcher(torch.nn.Linear(width, width)),))

    class Clone(UpscaleModelLoader):
        """As ComfyUI's executor makes one of each node's class."""

    paths, nodes = sys.modules["folder_paths"], types.ModuleType("nodes")
    monkeypatch.setattr(
        paths, "get_full_path", lambda _folder, name: str(models / f"{name}.safetensors"), raising=False
    )
    nodes.__dict__["NODE_CLASS_MAPPINGS"] = {"UpscaleModelLoader": UpscaleModelLoader}
    monkeypatch.setitem(sys.modules, "nodes", nodes)
    for _ in range(2):
        watch_loaders()
    made = Clone.execute("a").args[0].model
    assert made.in_features == 2
    assert recipe(made)[:3] == ("nodes.UpscaleModelLoader.execute", 0, {"model_name": "a"})
    module, patcher = call_loader(*recipe(made))
    assert module.in_features == 2
    assert patcher is None


def test_watching_twice_wraps_once(models: Path) -> None:
    first = sys.modules["comfy.sd"].load_diffusion_model
    watch_loaders()
    assert sys.modules["comfy.sd"].load_diffusion_model is first


def test_a_call_with_more_than_plain_data_is_made_and_not_noted(models: Path) -> None:
    made = load(models / "a.safetensors", model_options={"custom_operations": object()})
    assert made.model.in_features == 2
    assert loaded_by(made.model) is None


def test_an_error_of_the_loader_is_its_own(models: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors"):
        load(models / "b.safetensors")


def test_a_file_that_was_written_since_is_refused(models: Path) -> None:
    made = load(models / "a.safetensors")
    (models / "a.safetensors").write_bytes(b"123")
    with pytest.raises(LookupError, match="has changed since the model was loaded from it"):
        call_loader(*recipe(made.model))


def test_a_file_outside_of_the_model_folders_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "c.safetensors").write_bytes(b"12")
    made = load(tmp_path / "c.safetensors")
    with pytest.raises(LookupError, match="in none of the model folders"):
        call_loader(*recipe(made.model))


def test_a_path_that_leads_out_of_the_model_folders_is_refused(models: Path, tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").write_bytes(b"12")
    made = load(models / ".." / "d.safetensors")
    with pytest.raises(LookupError, match="in none of the model folders"):
        call_loader(*recipe(made.model))


@needs.symlinks
def test_a_link_in_a_model_folder_is_as_good_as_a_file(models: Path, tmp_path: Path) -> None:
    (tmp_path / "e.safetensors").write_bytes(b"1234")
    (models / "e.safetensors").symlink_to(tmp_path / "e.safetensors")
    module, _ = call_loader(*recipe(load(models / "e.safetensors").model))
    assert module.in_features == 4


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loader": "os.system"}, "no loader 'os.system'"),
        ({"arguments": {"unet_path": "/etc/passwd"}}, "would read"),
        ({"arguments": {}}, "its files are not found here"),
        ({"arguments": {"unet_path": ""}}, "would read"),
        ({"more": {"extra": 1}}, "takes other arguments here"),
        ({"part": 1}, "gave no such model here"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(models: Path, change: dict[str, Any], text: str) -> None:
    loader, part, arguments, files = recipe(load(models / "a.safetensors").model)
    arguments = {**change.get("arguments", arguments), **change.get("more", {})}
    with pytest.raises(LookupError, match=text):
        call_loader(change.get("loader", loader), change.get("part", part), arguments, files)


def test_what_fails_in_the_loader_is_told_with_the_file(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = recipe(load(models / "a.safetensors").model)

    def fails(unet_path: str, model_options: object = None) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(sys.modules["comfy.sd"], "load_diffusion_model", fails)
    with pytest.raises(LookupError, match=rf"{_KEY} failed here with .*a\.safetensors.*no memory"):
        call_loader(*found)


def test_a_model_that_is_gone_is_forgotten(models: Path) -> None:
    made = load(models / "a.safetensors")
    before = len(comfy_loaders._loaded)
    del made
    assert len(comfy_loaders._loaded) == before - 1
