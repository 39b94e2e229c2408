from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from legion_shm.config import JobOptions, SupervisorSettings, WorkerSpec, load_yaml
from legion_shm.errors import ConfigError, LegionError


def refused(make: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make()
    assert isinstance(caught.value, (LegionError, ValueError))
    return caught.value


# --- defaults and bounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [WorkerSpec, SupervisorSettings, JobOptions])
def test_defaults_need_no_thought(model: type[Any]) -> None:
    assert model() == model()
    assert model(**model().model_dump()) == model(), "and are valid themselves"


@pytest.mark.parametrize(
    ("model", "key", "value", "expected"),
    [
        (WorkerSpec, "engine", "warp", "'auto', 'graph' or 'comfy'"),
        (WorkerSpec, "max_workers", 0, "greater than or equal to 1"),
        (WorkerSpec, "max_workers", 257, "less than or equal to 256"),
        (WorkerSpec, "max_workers", "many", "a valid integer"),
        (WorkerSpec, "max_workers", True, "a number"),
        (WorkerSpec, "idle_timeout_s", False, "a number"),
        (WorkerSpec, "max_jobs_per_life", True, "a number"),
        (WorkerSpec, "startup_timeout_s", True, "a number"),
        (WorkerSpec, "startup_timeout_s", 0, "greater than 0"),
        (WorkerSpec, "startup_timeout_s", float("inf"), "finite"),
        (WorkerSpec, "idle_timeout_s", -1, "greater than 0"),
        (WorkerSpec, "max_jobs_per_life", 0, "greater than or equal to 1"),
        (WorkerSpec, "comfyui_path", 5, "a valid string"),
        (WorkerSpec, "extra_args", "--a 'b", "No closing quotation"),
        (SupervisorSettings, "max_workers", None, "a valid integer"),
        (SupervisorSettings, "inline_max_bytes", 1 << 21, "less than or equal to 1048576"),
        (SupervisorSettings, "max_message_bytes", 10, "greater than or equal to 65536"),
        (SupervisorSettings, "heartbeat_timeout_s", float("nan"), "finite"),
        (SupervisorSettings, "cancel_grace_s", -0.1, "greater than or equal to 0"),
        (SupervisorSettings, "channel", "pigeon", "'auto', 'ipc' or 'tcp'"),
        (SupervisorSettings, "segments", "paper", "'auto', 'memfd' or 'portable'"),
        (JobOptions, "retries", -1, "greater than or equal to 0"),
        (JobOptions, "retries", 101, "less than or equal to 100"),
        (JobOptions, "deadline_s", 0, "greater than 0"),
        (JobOptions, "spec", 5, "instance of WorkerSpec"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_what_was_given_and_what_was_expected(
    model: type[Any], key: str, value: object, expected: str
) -> None:
    error = refused(lambda: model(**{key: value}))
    assert error.key == key
    assert str(error).startswith(f"{model.title}: {key}: ")
    assert expected in str(error)
    assert str(error).endswith(f"; got {value!r}")
    assert "Value error" not in str(error)


@pytest.mark.parametrize("model", [WorkerSpec, SupervisorSettings, JobOptions])
@pytest.mark.parametrize("key", ["max_wrokers", "self", "title", "model_config"])
def test_an_unknown_key_is_refused_and_the_known_ones_are_listed(model: type[Any], key: str) -> None:
    error = refused(lambda: model(**{key: 1}))
    assert error.key == key
    assert all(name in str(error) for name in model.model_fields)


def test_every_fault_is_told_at_once() -> None:
    error = refused(lambda: WorkerSpec(engine="warp", max_workers=0, nonsense=1))  # type: ignore[arg-type, call-arg]
    assert all(f"{key}: " in str(error) for key in ("engine", "max_workers", "nonsense"))
    assert error.key == "engine", "the first one"


def test_a_long_value_is_shortened() -> None:
    error = refused(lambda: WorkerSpec(comfyui_path=["x" * 1000]))  # type: ignore[arg-type]
    assert len(str(error)) < 200


@pytest.mark.parametrize(
    ("model", "name", "value"),
    [
        (WorkerSpec, "max_workers", 3),
        (SupervisorSettings, "max_queue", 3),
        (JobOptions, "retries", 3),
    ],
)
def test_settings_cannot_be_changed(model: type[Any], name: str, value: object) -> None:
    settings = model()
    with pytest.raises(ValueError, match="frozen"):
        setattr(settings, name, value)


def test_graces_may_be_nothing_at_all() -> None:
    settings = SupervisorSettings(cancel_grace_s=0, stop_grace_s=0, term_grace_s=0)
    assert settings.stop_grace_s == 0


# --- what a spec may be given as ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "given_as", ["my_nodes", ["my_nodes"], ("my_nodes",), Path("my_nodes"), [Path("my_nodes")]]
)
@pytest.mark.parametrize("key", ["node_modules", "python_path"])
def test_one_name_or_many_paths_or_text(key: str, given_as: object) -> None:
    assert getattr(WorkerSpec(**{key: given_as}), key) == ("my_nodes",)  # type: ignore[arg-type]


def test_arguments_are_split_as_a_shell_does() -> None:
    expected = ("--lowvram", "--output-directory", "my files")
    for given_as in ("--lowvram --output-directory 'my files'", list(expected), expected):
        assert WorkerSpec(extra_args=given_as).extra_args == expected
    assert WorkerSpec(extra_args=None).extra_args == ()


@pytest.mark.parametrize("key", ["python_executable", "comfyui_path", "working_dir"])
def test_a_path_may_be_a_path(key: str) -> None:
    spec = WorkerSpec(**{key: Path("/opt/x")})  # type: ignore[arg-type]
    assert getattr(spec, key) == os.fspath(Path("/opt/x"))


def test_the_runtime_folder_may_be_a_path(tmp_path: Path) -> None:
    assert SupervisorSettings(runtime_dir=tmp_path).runtime_dir == str(tmp_path)


def test_numbers_in_the_environment_become_text() -> None:
    spec = WorkerSpec(env={"OMP_NUM_THREADS": 1, "SCALE": 0.5, "NAME": "x"})
    assert dict(spec.env) == {"OMP_NUM_THREADS": "1", "SCALE": "0.5", "NAME": "x"}
    assert WorkerSpec(env=None).env == {}


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"": "x"}, "'' is not a name"),
        ({"A=B": "x"}, "'A=B' is not a name"),
        ({"A\0": "x"}, "is not a name"),
        ({1: "x"}, "1 is not a name"),
        ({"A": True}, "A must be text (or a number), got bool"),
        ({"A": None}, "A must be text (or a number), got NoneType"),
        ({"A": "a\0b"}, "A holds a NUL character"),
        ("A=x", "dictionary"),
    ],
)
def test_what_cannot_be_an_environment_is_refused(env: Any, text: str) -> None:
    error = refused(lambda: WorkerSpec(env=env))
    assert error.key == "env"
    assert text in str(error)


@pytest.mark.parametrize(
    "make",
    [
        lambda: WorkerSpec(env={"TOKEN": b"sekret"}),  # type: ignore[dict-item]
        lambda: WorkerSpec(env="TOKEN=sekret"),  # type: ignore[arg-type]
        lambda: WorkerSpec(env={"TOKEN": "sekret", "X": ["sekret"]}),  # type: ignore[dict-item]
        lambda: JobOptions(spec={"env": {"TOKEN": "sekret"}, "bogus": 1}),  # type: ignore[arg-type]
        lambda: JobOptions(spec={"env": {"TOKEN": "sekret"}, "engine": "warp"}),  # type: ignore[arg-type]
        lambda: JobOptions(spec={"env": {"TOKEN": b"sekret"}}),  # type: ignore[arg-type]
    ],
)
def test_no_error_shows_a_value_of_the_environment(make: Callable[[], object]) -> None:
    assert "sekret" not in str(refused(make))


def test_a_fault_inside_a_spec_is_told_with_the_specs_own_words() -> None:
    error = refused(lambda: JobOptions(spec={"bogus": 1}))  # type: ignore[arg-type]
    assert error.key == "spec.bogus"
    assert "WorkerSpec: bogus: unknown; WorkerSpec has born_in_arena, codec_modules" in str(error)
    assert "deadline_s" not in str(error)


def test_a_spec_may_be_a_mapping_or_left_out() -> None:
    assert JobOptions(spec={"engine": "graph"}).spec == WorkerSpec(engine="graph")  # type: ignore[arg-type]
    assert JobOptions(spec=None).spec == WorkerSpec()  # type: ignore[arg-type]


# --- equal specs --------------------------------------------------------------------------------------


def test_equal_specs_have_equal_keys_however_they_were_written() -> None:
    written: dict[str, Any] = {"node_modules": ["a"], "env": {"B": "2", "A": "1"}, "startup_timeout_s": 30}
    one = WorkerSpec(**written, comfyui_path=str(Path("/c")))
    written = {"node_modules": "a", "env": {"A": 1, "B": 2}, "startup_timeout_s": 30.0}
    other = WorkerSpec(**written, comfyui_path=Path("/c"))
    assert one == other
    assert one.key == other.key
    assert {one: 1}[other] == 1


CHANGES: list[dict[str, Any]] = [
    {"engine": "graph"},
    {"node_modules": ["b"]},
    {"node_modules": ["a", "b"]},
    {"codec_modules": ["a.b"]},
    {"pickle_classes": ["a.B"]},
    {"env": {"A": "2"}},
    {"python_path": ["/x"]},
    {"python_executable": "/x"},
    {"working_dir": "/x"},
    {"comfyui_path": "/x"},
    {"extra_args": ["--x"]},
    {"max_workers": 2},
    {"warm_spares": 1},
    {"startup_timeout_s": 1},
    {"idle_timeout_s": 1},
    {"max_jobs_per_life": 1},
    {"zygote": "off"},
    {"born_in_arena": "off"},
    {"gpu_arena": "off"},
    {"models": "recipe"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_specs_that_differ_have_other_keys(change: dict[str, Any]) -> None:
    spec = WorkerSpec(node_modules=["a"], env={"A": "1"})
    assert WorkerSpec(**{**spec.model_dump(), **change}).key != spec.key
    assert spec.model_copy(update=change).key != spec.key


def test_every_field_of_a_spec_is_in_its_key() -> None:
    assert {name for change in CHANGES for name in change} == set(WorkerSpec.model_fields)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="=\0"), min_size=1, max_size=5),
        st.text(st.characters(exclude_characters="\0"), max_size=5),
        max_size=4,
    )
)
def test_a_key_can_be_made_of_any_environment(env: dict[str, str]) -> None:
    spec = WorkerSpec(env=env, python_path=["/caf\udce9"])
    assert spec.key == WorkerSpec(env=dict(reversed(env.items())), python_path=["/caf\udce9"]).key
    assert len(spec.key) == 32


# --- yaml ---------------------------------------------------------------------------------------------


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_settings_can_be_read_from_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "max_workers: 2\ncancel_grace_s: 0.5\nchannel: tcp\n")
    expected = SupervisorSettings(max_workers=2, cancel_grace_s=0.5, channel="tcp")
    assert SupervisorSettings.from_yaml(path) == SupervisorSettings.from_yaml(str(path)) == expected


def test_a_spec_can_be_read_from_a_file(tmp_path: Path) -> None:
    path = written(tmp_path, "engine: graph\nnode_modules: [a, b]\nenv: {OMP_NUM_THREADS: 1}\n")
    assert WorkerSpec.from_yaml(path) == WorkerSpec(
        engine="graph", node_modules=["a", "b"], env={"OMP_NUM_THREADS": "1"}
    )


def test_a_bare_off_which_yaml_reads_as_false_is_off(tmp_path: Path) -> None:
    path = written(tmp_path, "born_in_arena: off\nzygote: off\n")
    assert WorkerSpec.from_yaml(path) == WorkerSpec(born_in_arena="off", zygote="off")
    path = written(tmp_path, "zygote: on\n")
    assert "'auto' or 'off'" in str(refused(lambda: SupervisorSettings.from_yaml(path)))


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("max_workers: 1\nmax_queue: 2\nmax_workers: 3\n", "max_workers", 3),
        ("engine: graph\nenv:\n  A: 1\n  B: 2\n  A: 3\n", "A", 5),
    ],
)
def test_a_key_that_is_there_twice_is_refused_with_its_line(
    tmp_path: Path, text: str, key: str, line: int
) -> None:
    error = refused(lambda: load_yaml(written(tmp_path, text)))
    assert f", line {line}, column" in str(error)
    assert f"the key {key!r} is there twice" in str(error)


def test_merged_mappings_may_have_keys_of_their_own(tmp_path: Path) -> None:
    text = "env: &base {A: 1, B: 2}\nother:\n  <<: *base\n  A: 3\n"
    assert load_yaml(written(tmp_path, text))["other"] == {"A": 3, "B": 2}


@pytest.mark.parametrize("text", ["", "\n", "# nothing but this\n", "---\n"])
def test_an_empty_file_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_yaml(written(tmp_path, text)) == {}
    assert SupervisorSettings.from_yaml(written(tmp_path, text)) == SupervisorSettings()


@pytest.mark.parametrize(
    ("text", "expected", "key"),
    [
        (
            "max_workers: 2\nmax_queue: -1\n",
            "max_queue: Input should be greater than or equal to 1",
            "max_queue",
        ),
        ("1: 2\n", "1: unknown", "1"),
        ("self: 2\n", "self: unknown", "self"),
        ("a: [1,\nb: 2\n", "line 3, column 1", None),
        ("- 1\n", "expected a mapping of settings, got list", None),
        ("just text\n", "expected a mapping of settings, got str", None),
        ("a: !!python/object/apply:os.getcwd []\n", "line 1, column 4", None),
        ("a: b: c\n", "not valid YAML", None),
        ("a: \x01\n", "not valid YAML", None),
        (b"a: \xff\n", "cannot read the settings file", None),
    ],
)
def test_a_fault_in_a_file_is_told_with_the_file_and_the_place(
    tmp_path: Path, text: str | bytes, expected: str, key: str | None
) -> None:
    path = written(tmp_path, text)
    error = refused(lambda: SupervisorSettings.from_yaml(path))
    assert str(path) in str(error)
    assert expected in str(error)
    assert error.key == key


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    error = refused(lambda: WorkerSpec.from_yaml(tmp_path / "none.yaml"))
    assert "cannot read the settings file" in str(error)
    assert "none.yaml" in str(error)


def test_a_heartbeat_time_out_leaves_time_for_two_beats() -> None:
    with pytest.raises(ConfigError, match="at least twice heartbeat_interval_s = 5") as caught:
        SupervisorSettings(heartbeat_interval_s=5.0, heartbeat_timeout_s=9.0)
    assert caught.value.key == "heartbeat_timeout_s"


def test_values_of_the_environment_do_not_show_in_a_spec() -> None:
    assert "secret" not in repr(WorkerSpec(env={"TOKEN": "secret"}))


def test_a_wrong_value_in_the_environment_is_told_with_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEGION_ZYGOTE", "no")
    assert "LEGION_ZYGOTE" in str(refused(SupervisorSettings))
    assert SupervisorSettings(zygote="off").zygote == "off"
    monkeypatch.setenv("LEGION_ZYGOTE", "")
    assert SupervisorSettings().zygote == "auto"
