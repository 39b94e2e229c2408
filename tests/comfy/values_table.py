"""The table of types in docs/values.md: a real value of each, sent from one ComfyUI to another and back.

    COMFYUI_PYTHON=... python -m tests.comfy.values_table COMFYUI_PATH [COMFYUI_PATH ...]

writes it anew from these versions of ComfyUI, the newest first. test_values.py holds it to what it finds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["DOCUMENT", "NOT_HERE", "cells", "committed", "missing", "not_from_nodes", "observe", "table"]

_WAIT_S = 900.0
"""Two minutes alone; other tests may run beside it."""

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENT = REPOSITORY / "docs" / "values.md"
BEGIN, END = "<!-- table: python -m tests.comfy.values_table -->", "<!-- end of the table -->"

NOT_HERE = ("no such type", "no such node", "from a node", "otherwise")
"""Why a version has no such value; docs/values.md says what each means."""


def observe(python: str, comfyui: Path, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """What `values_driver.py` found with this ComfyUI."""
    results = folder / "results.json"
    driver = Path(__file__).with_name("values_driver.py")
    done = subprocess.run(
        [python, str(driver), str(results), str(comfyui), *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-6000:])
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def cells(found: Mapping[str, Any]) -> dict[tuple[str, str, str], str]:
    """What one version's column says of each row: (type, value, maker)."""
    column = {
        (row["type"], row["what"], row["maker"]): _refusal(row)
        if row["outcome"] == "refused"
        else row["outcome"]
        for row in found["rows"]
    }
    made = {row["type"] for row in found["rows"] if row["outcome"] not in NOT_HERE}
    for kind, reason in found["no_values"].items():
        column[kind, reason, ""] = "from a node" if kind in made else "no values"
    return column


def _refusal(row: Mapping[str, Any]) -> str:
    inside = row["path"].removeprefix("input_1")
    reason = re.split(r";|, or register", row["reason"])[0]
    return f"refused: {f'`{inside}` ' if inside else ''}{reason}".replace("|", "/")


def missing(found: Mapping[str, Any]) -> set[str]:
    """Types of this ComfyUI that no sample is of."""
    present = {row["type"] for row in found["rows"] if row["outcome"] not in NOT_HERE}
    return set(found["types"]) - present - set(found["no_values"])


def not_from_nodes(found: Mapping[str, Any]) -> dict[str, str]:
    """Types that core nodes of this ComfyUI give, and no row has from one; with the reason that it says."""
    made = {row["type"] for row in found["rows"] if row["by_node"] and row["outcome"] not in NOT_HERE}
    reasons = {
        row["type"]: row["why"] for row in found["rows"] if row["why"] and row["outcome"] not in NOT_HERE
    }
    return {
        kind: reasons.get(kind, "") for kind, nodes in found["types"].items() if nodes and kind not in made
    }


def table(columns: Mapping[str, Mapping[tuple[str, str, str], str]]) -> str:
    lines = [
        f"| type | value | made by | {' | '.join(columns)} |",
        f"|---|---|---|{'---|' * len(columns)}",
    ]
    for row in sorted({row for column in columns.values() for row in column}):
        said = [column.get(row, "no such type") for column in columns.values()]
        lines.append(f"| `{row[0]}` | {row[1]} | {row[2]} | {' | '.join(said)} |")
    return "\n".join(lines)


def committed() -> dict[str, dict[tuple[str, str, str], str]]:
    """The columns of the table in the document, by version."""
    text = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    versions = [cell.strip() for cell in head.split("|")[4:-1]]
    columns: dict[str, dict[tuple[str, str, str], str]] = {version: {} for version in versions}
    for line in lines:
        kind, what, maker, *said = (cell.strip() for cell in line.split("|")[1:-1])
        for version, cell in zip(versions, said, strict=True):
            columns[version][kind.strip("`"), what, maker] = cell
    return columns


def main(paths: Sequence[str]) -> None:
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    columns: dict[str, dict[tuple[str, str, str], str]] = {}
    for path in paths:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [
                "--cpu",
                "--disable-all-custom-nodes",
                "--disable-api-nodes",
                f"--base-directory={folder}",
            ]
            found = observe(python, Path(path), arguments, Path(folder))
        columns[found["version"]] = cells(found)
        print(found["version"], "without a sample:", sorted(missing(found)) or "none")
        nested = found["nested"]
        print(nested["cases"], "nested of", nested["of"], "wrong:", nested["wrong"] or "none")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(columns)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
