"""The workflow that a Master sends to its worker: from text or a file, in either format, checked.

Owns where it comes from and that it can take the Master's inputs and give outputs. Converting the saved
format is `saved_format`'s; what node classes there are is told by the ComfyUI around us, or by the graph
engine's modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

from legion_shm.channels import read_channels
from legion_shm.config import WorkerSpec
from legion_shm.errors import ConfigError, InvalidWorkflow
from legion_shm.nodes.bridge import master_node_classes
from legion_shm.nodes.folders import Folders, find_workflow, global_settings, workflow_names
from legion_shm.nodes.saved_format import convert_saved_workflow, is_saved_format
from legion_shm.nodes.worker_changes import answers_of
from legion_shm.workflow import Workflow, load_workflow

__all__ = [
    "FROM_CONFIGURATION",
    "check_channels",
    "fingerprint",
    "fingerprint_of_all",
    "load_worker_workflow",
]

FROM_CONFIGURATION = "as in the configuration"
"""The first entry of Master's list of workflow files."""

_MAX_BYTES = 64 << 20

NodeInfo = Mapping[str, Any]


def load_worker_workflow(*, text: str, name: str | None, spec: WorkerSpec) -> Workflow:
    """The workflow in ``text``, or else in the file ``name``, in the API format.

    ``spec``, resolved, says whose node classes convert the saved format. Raises ConfigError where there is
    no such file, InvalidWorkflow for what is in it.
    """
    if text.strip():
        where, content = "the workflow text", text
    elif name:
        path = find_workflow(name, Folders.current())
        where, content = f"the workflow file {path}", _content(path)
    else:
        raise ConfigError(
            "no workflow was given: write `workflow:` into the configuration, choose one on the Master node, "
            "or paste one into its workflow_text",
            key="workflow",
        )
    return _prompt_of(content, where, lambda: _node_lookup(spec))


def _prompt_of(
    content: str,
    where: str,
    lookup: Callable[[], Callable[[str], NodeInfo | None]],
    pick: random.Random | None = None,
) -> Workflow:
    raw = _parsed(content, where)
    if not isinstance(raw, dict):
        raise InvalidWorkflow(f"{where}: expected an object, got {type(raw).__name__}")
    document = cast("dict[str, Any]", raw)
    if is_saved_format(document):
        try:
            return load_workflow(convert_saved_workflow(document, lookup(), pick=pick))
        except InvalidWorkflow as error:
            raise _located(error, where) from None
    # A text beside the nodes ("_comment") is no node: LegionPower's own example has one.
    nodes = {key: value for key, value in document.items() if not (key.startswith("_") and _is_plain(value))}
    try:
        return load_workflow(nodes)
    except InvalidWorkflow as error:
        raise _located(error, where) from None


def check_channels(prompt: Workflow, given: Collection[str]) -> None:
    """Raise InvalidWorkflow where the inputs would go nowhere, or no output could come back."""
    classes = {node["class_type"] for node in prompt.values()}
    read_channels(prompt)
    if given and not classes & {"LegionImporter", "LegionInput"}:
        raise InvalidWorkflow(
            f"the worker's workflow has no LegionImporter, so {', '.join(sorted(given))} would go nowhere; "
            "add a Legion: Importer node to it"
        )
    if not classes & {"LegionExporter", "LegionOutput"}:
        raise InvalidWorkflow(
            "the worker's workflow has no LegionExporter, so no output would come back; add a "
            "Legion: Exporter node to it"
        )


def fingerprint_of_all() -> str:
    """Differs when any workflow file does: for a name that comes over a link, which IS_CHANGED is not told.

    Never raises.
    """
    folders = Folders.current()
    seen = hashlib.sha256()
    try:
        roots = global_settings(folders).workflow_roots
    except ConfigError as error:
        return f"none: {error}"
    for name in workflow_names(folders):
        for root in roots:
            with contextlib.suppress(OSError, ValueError):
                status = (root / name).stat()
                seen.update(repr((str(root / name), status.st_mtime_ns, status.st_size)).encode())
    return seen.hexdigest()


def fingerprint(*, text: str, name: str | None) -> str | float:
    """Differs when the workflow does, or one of its nodes says so: for IS_CHANGED. NaN: changed each time.

    Never raises; the run tells what is wrong.
    """
    if text.strip():
        content, digest = text, "given"
    elif name:
        try:
            raw = find_workflow(name, Folders.current()).read_bytes()
        except (ConfigError, OSError) as error:
            return f"none: {error}"
        content, digest = raw.decode("utf-8-sig", "replace"), hashlib.sha256(raw).hexdigest()
    else:
        return "given"
    classes = master_node_classes()
    if classes is None:
        return digest
    from legion_shm.nodes import NODE_CLASS_MAPPINGS

    try:
        prompt = _prompt_of(content, "", lambda: _lookup_in(classes), random.Random(0))
    except Exception:  # whatever is wrong with it
        return digest
    answers = answers_of(prompt, classes, NODE_CLASS_MAPPINGS)
    return answers if isinstance(answers, float) else f"{digest}{answers}"


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise InvalidWorkflow(f"the workflow file {path} is larger than {_MAX_BYTES >> 20} MiB")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidWorkflow(f"cannot read the workflow file {path}: {error}") from None


def _parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidWorkflow(
            f"{where} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from None
    except RecursionError:
        raise InvalidWorkflow(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise InvalidWorkflow(f"{where} is not valid JSON: {error}") from None


def _located(error: InvalidWorkflow, where: str) -> InvalidWorkflow:
    return InvalidWorkflow(
        f"{where}: {error}", node_id=error.node_id, input_name=error.input_name, problems=error.problems
    )


def _is_plain(value: object) -> bool:
    return not isinstance(value, (dict, list))


def _node_lookup(spec: WorkerSpec) -> Callable[[str], NodeInfo | None]:
    """What each node class declares, as the worker will have it."""
    if spec.engine == "graph":
        from legion_shm.supervisor.graph import BUILTIN_MODULES
        from legion_shm.supervisor.graph_modules import load_node_classes

        classes: Mapping[str, Any] = load_node_classes(spec.node_modules, BUILTIN_MODULES)
    else:
        found = master_node_classes()
        if found is None:
            raise InvalidWorkflow(
                "it is in ComfyUI's saved format, which is converted with the node classes of the ComfyUI "
                "that Legion's nodes run in, and they run in none; export it in the API format (menu "
                "Workflow, Export (API))"
            )
        classes = found
    return _lookup_in(classes)


def _lookup_in(classes: Mapping[str, Any]) -> Callable[[str], NodeInfo | None]:
    def lookup(name: str) -> NodeInfo | None:
        node_class = classes.get(name)
        return None if node_class is None else {"input": node_class.INPUT_TYPES()}

    return lookup
