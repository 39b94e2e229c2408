"""Configurations: LegionPower's keys mean what they meant, and a mistake is an error that says where."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from legion_shm.errors import ConfigError
from legion_shm.nodes.legion_yaml import BUILTIN_YAML, Configuration, parse_configuration
from tests.nodes.support import config

# Every key of LegionPower's templates, as they are there: most of them empty.
AS_LEGION_POWERS_TEMPLATE = """\
comfyui:
  type: local_process
  port: auto
  paths:
    comfyui_path:
    python_executable:
    custom_nodes_template: "OnlyCPU"
execution:
  startup_timeout:
  dry_run: false
  asynch: false
  extra_args:
  env_vars:
  # CUDA_VISIBLE_DEVICES: "0"
workflow: some.json"""


def spec(configuration: Configuration) -> Any:
    return configuration.worker_spec(startup_timeout_s=300.0)


def test_legion_powers_template_is_read() -> None:
    made = parse_configuration(AS_LEGION_POWERS_TEMPLATE)
    assert made == Configuration(custom_nodes_template="OnlyCPU", workflow="some.json")
    assert spec(made).startup_timeout_s == 300.0
    assert spec(made).engine == "auto"


def test_an_empty_text_and_our_own_template_are_all_defaults() -> None:
    assert parse_configuration("") == parse_configuration(BUILTIN_YAML) == Configuration()


def test_every_key_reaches_the_worker() -> None:
    made = parse_configuration(
        """
comfyui:
  type: comfy
  port: 8200
  paths: {comfyui_path: /c, python_executable: /p, custom_nodes_template: T}
execution:
  startup_timeout: "12"
  dry_run: true
  asynch: "Yes"
  extra_args: --lowvram --preview-method "a b"
  env_vars: {CUDA_VISIBLE_DEVICES: "1", N: 5, FLAG: true, EMPTY: ""}
  max_workers: 2
  warm_spares: 1
  idle_timeout: 1.5
  deadline: 30
  retries: 1
  node_modules: [a.b]
  models: recipe
workflow: w.json
"""
    )
    assert (made.dry_run, made.asynch, made.deadline_s, made.retries, made.workflow) == (
        True,
        True,
        30.0,
        1,
        "w.json",
    )
    worker = spec(made)
    assert (worker.engine, worker.comfyui_path, worker.python_executable) == ("comfy", "/c", "/p")
    assert worker.extra_args == ("--lowvram", "--preview-method", "a b")
    assert {"CUDA_VISIBLE_DEVICES": "1", "N": "5", "FLAG": "True", "EMPTY": ""}.items() <= worker.env.items()
    assert (worker.startup_timeout_s, worker.max_workers, worker.idle_timeout_s) == (12.0, 2, 1.5)
    assert worker.node_modules == ("a.b",)
    assert worker.models == "recipe"
    assert worker.warm_spares == 1


def test_an_unknown_way_for_models_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"line 1: execution\.models: expected one of auto, ref"):
        parse_configuration("execution.models: copy")


@pytest.mark.parametrize(
    "text",
    [
        "execution.asynch: true\nexecution.env_vars.A: '1'\ncomfyui.paths.comfyui_path: /c",
        "execution: {asynch: true, env_vars: {A: '1'}}\ncomfyui: {paths.comfyui_path: /c}",
        "execution: {asynch: true, env_vars.A: '1'}\ncomfyui.paths: {comfyui_path: /c}",
    ],
)
def test_keys_may_be_dotted_or_nested(text: str) -> None:
    assert parse_configuration(text) == Configuration(asynch=True, env={"A": "1"}, comfyui_path="/c")


def test_extra_args_may_be_a_list() -> None:
    made = parse_configuration("execution: {extra_args: [--gpu-only, --port, 1]}")
    assert made.extra_args == ("--gpu-only", "--port", "1")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("comfyui:\n  type: [", "line 2"),
        ("a: 1\n\tb: 2", "line 2"),
        ("execution:\n  asynch: true\n dry_run: 1", "line 3"),
        ("x: !!python/object:os.system {}", "line 1"),
        ("- just\n- a list", "line 1"),
    ],
)
def test_invalid_yaml_is_an_error_that_names_the_line(text: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        parse_configuration(text)


@pytest.mark.parametrize("text", ["a: \0", "[" * 5000, "a: &a [*a]", "? [1]\n: 2", "'", "{}: {}"])
def test_garbage_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_configuration(text)


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("execution:\n  asynk: true", "execution.asynk", "line 2"),
        ("asynch: true", "asynch", "did you mean execution.asynch"),
        ("comfyui:\n\n  paths:\n    comfy: x", "comfyui.paths.comfy", "line 4"),
        ("execution: {dry_run: maybe}", "execution.dry_run", "true or false"),
        ("execution: {startup_timeout: 0}", "execution.startup_timeout", "above 0"),
        ("execution: {startup_timeout: soon}", "execution.startup_timeout", "seconds"),
        ("execution: {max_workers: 1.5}", "execution.max_workers", "whole number"),
        ("execution: {warm_spares: -1}", "execution.warm_spares", "whole number"),
        ("execution: {extra_args: {a: 1}}", "execution.extra_args", "list of texts"),
        ("execution: {extra_args: '--a \"b'}", "execution.extra_args", "command line"),
        ("execution: {env_vars: [1]}", "execution.env_vars", "a mapping"),
        ("execution: {env_vars: {A: }}", "execution.env_vars.A", "for an empty one"),
        ("execution: 5", "execution", "a mapping"),
        ("comfyui: {type: docker}", "comfyui.type", "local_process"),
        ("comfyui: {port: 99999}", "comfyui.port", "65535"),
        ("comfyui: {port: true}", "comfyui.port", "whole number"),
        ("execution.asynch: true\nexecution: {asynch: false}", "execution.asynch", "line 1 already"),
        ("workflow: [a]", "workflow", "text"),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_names_it(text: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        parse_configuration(text)
    assert caught.value.key == key
    assert key in str(caught.value)


def test_keys_without_meaning_are_explained_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "legion_shm"):
        parse_configuration("comfyui: {port: auto, paths: {custom_nodes_template: }}")
        assert caplog.records == []
        for _ in range(3):
            parse_configuration("comfyui: {port: 8200, paths: {custom_nodes_template: T}}")
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert "comfyui.port" in said[0]
    assert "custom_nodes_template" in said[1]


def test_ports_and_templates_keep_workers_apart_and_equal_texts_do_not() -> None:
    keys = [
        spec(parse_configuration(text)).key
        for text in (
            "comfyui: {port: 8200}",
            "comfyui.port: 8200",
            "comfyui: {port: 8201}",
            "comfyui: {paths: {custom_nodes_template: T}}",
            "",
            "comfyui: {port: auto}\nworkflow: other.json\nexecution: {asynch: true}",
        )
    ]
    assert keys[0] == keys[1]
    assert keys[4] == keys[5]
    assert len(set(keys)) == 4


def test_widgets_count_before_the_yaml_and_only_when_used() -> None:
    yaml = "execution: {asynch: true, extra_args: --a, startup_timeout: 5}\nworkflow: y.json"
    unused = config(
        yaml,
        workflow="as in YAML",
        mode="as in YAML",
        engine="as in YAML",
        gpu="",
        extra_args="",
        startup_timeout=0,
        idle_timeout=0,
        max_workers=0,
    )
    assert unused == config(yaml) == parse_configuration(yaml)
    used = config(
        yaml,
        workflow="w.json",
        mode="wait",
        engine="graph",
        gpu="1",
        extra_args="--b",
        startup_timeout=9,
        idle_timeout=3,
        max_workers=2,
    )
    assert used == Configuration(
        engine="graph",
        workflow="w.json",
        asynch=False,
        env={"CUDA_VISIBLE_DEVICES": "1"},
        extra_args=("--a", "--b"),
        startup_timeout_s=9.0,
        idle_timeout_s=3.0,
        max_workers=2,
    )
    assert config(yaml, mode="dry run").dry_run
    assert config(yaml, mode="background").asynch
    assert config(yaml, gpu="none").env == {"CUDA_VISIBLE_DEVICES": ""}
