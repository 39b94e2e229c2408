"""ComfyUI's own words for what went wrong, as Legion's errors.

Owns the translation of validation errors and of execution errors. It decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from legion_shm.errors import InvalidWorkflow, JobFailed, LegionError
from legion_shm.supervisor.graph_problems import Problem, refuse
from legion_shm.workflow import is_link

__all__ = ["bad_slots", "execution_failure", "refuse_invalid"]

_TEXT_CHARS = 4_000
_TRACEBACK_CHARS = 20_000
_LINE_CHARS = 320
_INPUTS_SHOWN = 40
_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
"""The user's login among a job's extra data, which hidden inputs of a node hold."""
_OUR_REFUSAL = f"{InvalidWorkflow.__module__}.{InvalidWorkflow.__qualname__}"


def bad_slots(prompt: Mapping[str, Mapping[str, Any]], classes: Mapping[str, Any]) -> list[Problem]:
    """Links to an output that the node does not have; ComfyUI says "tuple index out of range" of them."""
    problems: list[Problem] = []
    for node_id, node in prompt.items():
        for name, value in node["inputs"].items():
            if not is_link(value) or value[0] not in prompt:
                continue
            source, slot = cast("list[Any]", value)
            class_type = str(prompt[source]["class_type"])
            types = cast("Sequence[object]", getattr(classes.get(class_type), "RETURN_TYPES", None) or ())
            if types and isinstance(slot, int) and not 0 <= slot < len(types):
                detail = f"node {source} ({class_type}) has no output {slot}; it has {len(types)}, from 0 on"
                problems.append(Problem("bad_linked_input", detail, node_id, str(node["class_type"]), name))
    return problems


def refuse_invalid(
    error: Mapping[str, Any] | None,
    node_errors: Mapping[str, Any],
    prompt: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Any],
    not_loaded: Sequence[str] = (),
) -> None:
    """Raise InvalidWorkflow for what ComfyUI's validation answered, if it found any fault.

    ``not_loaded``: custom nodes without which a class may be missing.

    Also where some outputs could still run: ComfyUI would leave the others out.
    """
    problems = [
        _node_problem(node_id, str(found.get("class_type", "")), reason)
        for node_id, found in sorted(node_errors.items(), key=lambda item: list(prompt).index(item[0]))
        for reason in found["errors"]
    ]
    if not problems and error is not None:
        problems = [_prompt_problem(error, prompt, classes, not_loaded)]
    refuse(problems)


def _node_problem(node_id: str, class_type: str, reason: Mapping[str, Any]) -> Problem:
    name = reason.get("extra_info", {}).get("input_name")
    detail, message = str(reason.get("details", "")), str(reason["message"])
    text = message if not detail or detail == name else f"{message}: {detail}"
    return Problem(str(reason["type"]), text, node_id, class_type, None if name is None else str(name))


def _prompt_problem(
    error: Mapping[str, Any],
    prompt: Mapping[str, Mapping[str, Any]],
    classes: Mapping[str, Any],
    not_loaded: Sequence[str],
) -> Problem:
    kind, text, detail = str(error["type"]), str(error["message"]), str(error.get("details", ""))
    if kind == "prompt_no_outputs":
        return Problem(kind, f"{text}; add a LegionExporter, a LegionOutput or another output node")
    node_id = next((key for key, node in prompt.items() if node.get("class_type") not in classes), None)
    if node_id is None:
        return Problem(kind, f"{text}: {detail}" if detail else text)
    if not_loaded:
        text += f" (these custom nodes did not load in the worker: {'; '.join(not_loaded)})"
    return Problem(kind, text, node_id, str(prompt[node_id].get("class_type")))


def execution_failure(job_id: str, data: Mapping[str, Any], extra_data: Mapping[str, object]) -> LegionError:
    """The error for ComfyUI's ``execution_error`` message, without the login in the job's ``extra_data``."""
    node_id, class_type = str(data.get("node_id")), str(data.get("node_type"))
    kind = str(data.get("exception_type", ""))
    message = str(data.get("exception_message", "")).strip()[:_TEXT_CHARS]
    if kind == _OUR_REFUSAL:  # what only a running Legion node could tell of the workflow
        text = f"node {node_id} ({class_type}): {message}"
        return InvalidWorkflow(text, node_id=node_id, problems=(text,))
    return JobFailed(
        f"node {node_id} ({class_type}) of job {job_id} failed: {kind}{': ' if message else ''}{message}",
        job_id=job_id,
        node_id=node_id,
        class_type=class_type,
        exception_type=kind,
        exception_message=message,
        traceback=_traceback(data.get("traceback"), kind, message),
        inputs_summary=_inputs(data.get("current_inputs"), [extra_data.get(key) for key in _SECRETS]),
    )


def _traceback(frames: object, kind: str, message: str) -> str:
    if not isinstance(frames, (list, tuple)) or not frames:
        return ""
    text = "Traceback (most recent call last):\n" + "".join(map(str, cast("list[object]", frames)))
    text += f"{kind}: {message}\n" if message else f"{kind}\n"
    if len(text) <= _TRACEBACK_CHARS:
        return text
    half = _TRACEBACK_CHARS // 2
    return f"{text[:half]}\n... {len(text) - 2 * half} characters left out ...\n{text[-half:]}"


def _inputs(values: object, secrets: Sequence[object]) -> str:
    if not isinstance(values, Mapping):
        return ""
    lines: list[str] = []
    named = cast("Mapping[object, object]", values)
    for name, items in list(named.items())[:_INPUTS_SHOWN]:
        listed = cast("list[object]", items) if isinstance(items, list) else [items]
        count = "" if len(listed) == 1 else f"{len(listed)} items: "
        shown = "(not shown)" if _told(listed, secrets) else ", ".join(map(str, listed))
        text = f"{name}: {count}{shown}"
        lines.append(text if len(text) <= _LINE_CHARS else text[: _LINE_CHARS - 3] + "...")
    if len(named) > _INPUTS_SHOWN:
        lines.append(f"... and {len(named) - _INPUTS_SHOWN} more inputs")
    return "\n".join(lines)


def _told(listed: Sequence[object], secrets: Sequence[object]) -> bool:
    return any(secret and str(secret) in str(item) for item in listed for secret in secrets)
