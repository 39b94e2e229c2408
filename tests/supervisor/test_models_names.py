"""What modules that models are made of are called between processes."""

from __future__ import annotations

import sys
import types

import pytest

from legion_shm.supervisor.comfy_models_names import Names


def loaded(monkeypatch: pytest.MonkeyPatch, name: str, file: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__file__ = file
    module.Made = type("Made", (), {"__module__": name})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.fixture(autouse=True)
def comfyui(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "comfy", types.ModuleType("comfy"))
    loaded(monkeypatch, "comfy.model_management", "/of/comfyui/comfy/model_management.py")


def test_a_file_of_comfyui_that_was_imported_by_its_bare_name_is_found_by_it_on_the_other_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = loaded(monkeypatch, "model_patcher", "/of/comfyui/comfy/model_patcher.py")
    made = module.Made
    names = Names()
    assert names.named(made) == ["@comfy/model_patcher", "Made"]
    assert names.find("@comfy/model_patcher", "Made") is made


def test_a_module_of_that_name_from_elsewhere_is_not_comfyuis(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded(monkeypatch, "model_patcher", "/of/someone/model_patcher.py")
    names = Names()
    assert not names.allows(names.module_name("model_patcher"))
    with pytest.raises(LookupError):
        names.find("@comfy/model_patcher", "Made")


def test_a_bare_name_that_this_process_has_not_loaded_is_not_imported() -> None:
    with pytest.raises(LookupError):
        Names().find("@comfy/sample", "Made")


def test_of_torchvision_the_optical_flow_models_alone_are_allowed() -> None:
    names = Names()
    assert names.allows("torchvision.models.optical_flow.raft")
    assert not names.allows("torchvision.models.resnet")
