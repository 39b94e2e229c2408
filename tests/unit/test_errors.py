from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest

from legion_shm import errors
from legion_shm.errors import (
    ConfigError,
    DeadlineExceeded,
    InvalidWorkflow,
    JobCancelled,
    JobFailed,
    LegionError,
    StartupError,
    StartupTimeout,
    UnsupportedValue,
    WorkerLost,
)

CLASSES: list[type[LegionError]] = [getattr(errors, name) for name in errors.__all__]
TAIL = ("one", "two")
FULL: dict[type[LegionError], dict[str, Any]] = {
    ConfigError: {"key": "spec.engine"},
    InvalidWorkflow: {"node_id": "5", "input_name": "image", "problems": ("one", "two")},
    UnsupportedValue: {"path": "input_1[0]"},
    errors.JobError: {"job_id": "j"},
    JobFailed: {
        "job_id": "j",
        "node_id": "5",
        "class_type": "Blur",
        "exception_type": "builtins.ValueError",
        "exception_message": "why",
        "traceback": "Traceback ...",
        "inputs_summary": "image: Tensor",
    },
    JobCancelled: {"job_id": "j"},
    DeadlineExceeded: {"job_id": "j"},
    WorkerLost: {"job_id": "j", "worker_id": "w1", "exit_code": -9, "log_tail": TAIL},
    StartupError: {"worker_id": "w1", "exit_code": 1, "traceback": "Traceback ...", "log_tail": TAIL},
    StartupTimeout: {"worker_id": "w1", "exit_code": None, "traceback": "t", "log_tail": TAIL},
}
COPIERS: list[Callable[[Any], Any]] = [
    copy.copy,
    copy.deepcopy,
    *(lambda error, n=n: pickle.loads(pickle.dumps(error, n)) for n in range(2, pickle.HIGHEST_PROTOCOL + 1)),
]


def public(cls: type[Any]) -> dict[str, Any]:
    return FULL.get(cls, {})


@pytest.mark.parametrize("copier", COPIERS, ids=["copy", "deepcopy", *(f"pickle {n}" for n in range(2, 6))])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_copied_with_all_that_it_carries(cls: Any, copier: Callable[[Any], Any]) -> None:
    for attributes in ({}, public(cls)):
        error = cls("what happened", **attributes)
        other = copier(error)
        assert type(other) is cls
        assert other is not error
        assert str(other) == str(error) == "what happened"
        assert other.args == error.args
        assert vars(other) == vars(error)
        assert {name: vars(other)[name] for name in attributes} == attributes


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_can_be_made_of_its_text_alone_and_has_a_docstring(cls: type[LegionError]) -> None:
    assert str(cls("text")) == "text"
    assert cls.__doc__
    assert cls.__module__ == "legion_shm.errors"


def test_every_attribute_of_every_error_is_tried_here() -> None:
    for cls in CLASSES:
        assert set(vars(cls("x"))) == set(public(cls)), cls.__name__


def test_every_class_of_the_module_is_public_and_below_the_one_base() -> None:
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert defined == set(errors.__all__)
    assert all(issubclass(cls, LegionError) for cls in CLASSES)


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    told: dict[str, str | None] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"([│├└─ ]*)([A-Z]\w+)(\s{2,}|$)", line)
        if match and (match.group(1) or match.group(2) == "LegionError"):
            depth = len(match.group(1)) // 4
            del path[depth:]
            told[match.group(2)] = path[-1] if path else None
            path.append(match.group(2))
    is_so: dict[str, str | None] = {}
    for cls in CLASSES:
        parents = [base.__name__ for base in cls.__bases__ if issubclass(base, LegionError)]
        assert len(parents) <= 1
        is_so[cls.__name__] = parents[0] if parents else None
    assert told == is_so


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (ConfigError, ValueError),
        (InvalidWorkflow, ValueError),
        (UnsupportedValue, TypeError),
        (DeadlineExceeded, TimeoutError),
        (StartupTimeout, TimeoutError),
        (errors.ArenaFull, MemoryError),
        (errors.MessageTooLarge, ValueError),
        (errors.ForkedError, RuntimeError),
        (errors.SupervisorClosed, RuntimeError),
    ],
)
def test_errors_that_have_a_cousin_in_python_can_be_caught_as_it(cls: Any, builtin: type[Exception]) -> None:
    with pytest.raises(builtin, match="text"):
        raise cls("text")


def test_the_problems_of_a_workflow_are_its_text_where_no_others_are_given() -> None:
    assert InvalidWorkflow("one fault").problems == ("one fault",)


@pytest.mark.parametrize(
    ("code", "name"),
    [(-9, "SIGKILL"), (-11, "SIGSEGV"), (-250, "signal 250"), (0, None), (3, None), (None, None)],
)
def test_a_lost_worker_names_its_signal(code: int | None, name: str | None) -> None:
    assert WorkerLost("x", exit_code=code).signal_name == name
