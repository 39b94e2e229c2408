"""What is wrong with a workflow, and the InvalidWorkflow that says so.

Owns texts only: one line per problem, bounded in length and number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from legion_shm.errors import InvalidWorkflow

__all__ = ["Problem", "refuse"]

_LONGEST_LINE = 600
_MOST_PROBLEMS = 100
"""The bounds keep what a broken workflow makes us say far below a control message's limit."""


@dataclass(frozen=True)
class Problem:
    """One fault. ``kind`` is ComfyUI's short name of it where ComfyUI has one."""

    kind: str
    detail: str
    node_id: str | None = None
    class_type: str | None = None
    input_name: str | None = None

    def line(self) -> str:
        where = "" if self.node_id is None else f"node {self.node_id}"
        if where and self.class_type is not None:
            where += f" ({self.class_type})"
        if where and self.input_name is not None:
            where += f", input {self.input_name!r}"
        text = " ".join(f"{where}{': ' if where else ''}{self.kind}: {self.detail}".split())
        return text if len(text) <= _LONGEST_LINE else text[: _LONGEST_LINE - 3] + "..."


def refuse(problems: Sequence[Problem]) -> None:
    """Raise InvalidWorkflow with every problem, if there is any."""
    if not problems:
        return
    lines = tuple(dict.fromkeys(problem.line() for problem in problems))
    first, found = problems[0], len(lines)
    if found > _MOST_PROBLEMS:
        lines = (*lines[:_MOST_PROBLEMS], f"and {found - _MOST_PROBLEMS} more")
    message = lines[0] if found == 1 else f"the workflow has {found} problems:\n  " + "\n  ".join(lines)
    raise InvalidWorkflow(message, node_id=first.node_id, input_name=first.input_name, problems=lines)
