"""Where files are looked for, and that no name leads out of there."""

from __future__ import annotations

from pathlib import Path

import pytest

from legion_shm.errors import ConfigError
from legion_shm.nodes.folders import Folders, default_yaml, find_workflow, global_settings, workflow_names
from legion_shm.nodes.legion_yaml import BUILTIN_YAML
from tests import needs
from tests.nodes.support import put_workflow

# LegionPower's config.yaml, key for key.
LEGION_POWERS_CONFIG = """\
ports:
  start_port: 8200
  max_workers: 7
worker:
  startup_timeout: 120
paths:
  worker_templates_dir: "{legion_runtime}/ComfyUIs"
  workflows_roots:
    - "{legion_runtime}/workflows"
    - "{comfyui_root}/user/default/workflows"
  data_exchange_root: "{legion_runtime}/data_exchange"
  temp_root_dir: "{legion_runtime}/temp"
logging:
  level: INFO"""


def folders(home: Path) -> Folders:
    return Folders(home / "user" / "default", home)


def write(path: Path, content: str = "{}") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_legion_powers_folder_is_used_where_it_is_and_ours_elsewhere(home: Path) -> None:
    places = folders(home)
    assert places.runtime == places.user / "Legion-SHM"
    (places.user / "ComfyUI-LegionPower").mkdir(parents=True)
    assert places.runtime == places.user / "ComfyUI-LegionPower"


def test_without_comfyui_the_environment_says_where(home: Path) -> None:
    assert Folders.current() == Folders(home)


def test_legion_powers_global_settings_are_read_and_their_placeholders_filled_in(home: Path) -> None:
    places = folders(home)
    write(places.user / "ComfyUI-LegionPower" / "config.yaml", LEGION_POWERS_CONFIG)
    settings = global_settings(places)
    assert settings.workflow_roots == (
        places.user / "ComfyUI-LegionPower" / "workflows",
        home / "user" / "default" / "workflows",
    )
    assert (settings.max_workers, settings.startup_timeout_s, settings.log_level) == (7, 120.0, "INFO")
    nested = write(places.user / "workflows" / "deep" / "w.json")
    assert find_workflow("deep/w.json", places) == nested


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ports: {max_workers: none}", "ports.max_workers"),
        ("path: {}", "path: unknown"),
        ("logging.level: LOUD", "logging.level"),
        ("a: [", "line 1"),
    ],
)
def test_a_mistake_in_the_global_settings_names_the_file_and_the_key(
    home: Path, text: str, says: str
) -> None:
    path = write(folders(home).runtime / "config.yaml", text)
    with pytest.raises(ConfigError, match=says) as caught:
        global_settings(folders(home))
    assert str(path) in str(caught.value)


def test_the_users_template_is_what_a_new_configuration_shows(home: Path) -> None:
    assert default_yaml(folders(home)) == BUILTIN_YAML
    write(folders(home).runtime / "default_legion_config.yaml", "workflow: mine.json")
    assert default_yaml(folders(home)) == "workflow: mine.json\n"


def test_workflows_are_listed_by_the_names_that_find_them(home: Path) -> None:
    places = Folders(home)
    one = put_workflow(home, "one.json", {})
    two = put_workflow(home, "sub/two.json", {})
    put_workflow(home, ".hidden.json", {})
    put_workflow(home, "notes.txt", "")
    saved = write(home / "workflows" / "saved.json")
    assert workflow_names(places) == ["one.json", "saved.json", "sub/two.json"]
    assert [find_workflow(name, places) for name in workflow_names(places)] == [one, saved, two]


def test_a_name_may_leave_out_its_ending_use_backslashes_or_be_an_absolute_path_inside(home: Path) -> None:
    path = put_workflow(home, "sub/two.json", {})
    for name in ("sub/two", "sub\\two.json", str(path), " sub/two.json "):
        assert find_workflow(name, Folders(home)) == path


@pytest.mark.parametrize(
    "name",
    [
        "../secret.json",
        "sub/../../secret.json",
        "..",
        "..\\..\\secret.json",
        "/etc/passwd",
        "C:\\secret.json",
        "c:secret.json",
        "\\\\server\\share\\w.json",
        "//server/w.json",
        "~/secret.json",
        "a\0b",
        "",
        "   ",
    ],
)
def test_a_name_that_leads_out_is_refused(home: Path, name: str) -> None:
    put_workflow(home, "w.json", {})
    for outside in (home / "secret.json", home / "Legion-SHM" / "secret.json"):
        write(outside)
    with pytest.raises(ConfigError, match=r"workflow: .* (leads out|Windows|NUL|no name)") as caught:
        find_workflow(name, Folders(home))
    assert caught.value.key == "workflow"


def test_an_absolute_path_outside_is_refused_whether_or_not_it_exists(home: Path) -> None:
    for path in (write(home / "secret.json"), home / "not there.json"):
        with pytest.raises(ConfigError, match="leads out"):
            find_workflow(str(path), Folders(home))


@needs.symlinks
def test_a_link_to_the_outside_is_refused_and_one_to_the_inside_is_not(home: Path) -> None:
    secret = write(home / "secret.json")
    inside = put_workflow(home, "w.json", {})
    (inside.parent / "out.json").symlink_to(secret)
    (inside.parent / "out").symlink_to(home)
    (inside.parent / "in.json").symlink_to(inside)
    for name in ("out.json", "out/secret.json"):
        with pytest.raises(ConfigError, match="leads out"):
            find_workflow(name, Folders(home))
    assert find_workflow("in.json", Folders(home)) == inside
    assert "out/secret.json" not in workflow_names(Folders(home))


@needs.symlinks
def test_the_folder_itself_may_be_a_link(home: Path, tmp_path: Path) -> None:
    elsewhere = write(tmp_path / "elsewhere" / "w.json")
    (home / "Legion-SHM").mkdir()
    (home / "Legion-SHM" / "workflows").symlink_to(elsewhere.parent)
    assert find_workflow("w.json", Folders(home)) == elsewhere


def test_a_name_that_is_not_there_says_what_is(home: Path) -> None:
    with pytest.raises(ConfigError, match="they are empty"):
        find_workflow("w.json", Folders(home))
    put_workflow(home, "other.json", {})
    with pytest.raises(ConfigError, match=r"there are other\.json"):
        find_workflow("w.json", Folders(home))
    with pytest.raises(ConfigError, match="there is no"):
        find_workflow("x" * 5000, Folders(home))
