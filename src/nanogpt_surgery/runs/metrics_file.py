"""`metrics.jsonl`: a line for each step that was done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import disk_refuses, tried_again
from nanogpt_surgery.files.json_files import replace_text


def append_metrics(path: Path, step: dict[str, Any]) -> None:
    """Adds the line of a step.

    Raises:
        SurgeryError: the disk refuses. The checkpoints that are there can be gone on from.
    """
    try:
        tried_again(lambda: _append(path, json.dumps(step) + "\n"))
    except OSError as error:
        raise disk_refuses(path, error) from error


def _append(path: Path, line: str) -> None:
    """Adds a line, or nothing at all."""
    size = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line)
    except OSError:
        if path.is_file():
            os.truncate(path, size)
        raise


def trim_metrics(path: Path, steps: int) -> None:
    """Drops lines of steps that will be done again, and a line torn by a crash.

    A line before the first step, of step 0, may stand there.

    Raises:
        SurgeryError: the lines before them are not those of steps 1 to `steps`.
    """
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    start = lines[:1] if lines and _step(lines[0]) == 0 else []
    lines = lines[len(start) :]
    whole = next((i for i, line in enumerate(lines[:steps]) if _step(line) != i + 1), len(lines))
    if whole < steps:
        raise SurgeryError(
            f"{path} has the lines of {whole} steps, and the checkpoint to go on from is that of "
            f"step {steps}",
            "put the lines back from a copy, or begin anew in another folder",
        )
    replace_text(path, "".join(line + "\n" for line in start + lines[:steps]))


def _step(line: str) -> int | None:
    """The number of the step that a line of metrics is of; None if it is of none."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError:
        return None
    return values.get("step") if isinstance(values, dict) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that was trimmed; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
