"""The runs below a folder, as they are on the disk: those of this server and those of others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.lock import LOCK
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.formats.folders.run_folder import METRICS, is_run
from nanogpt_surgery.history.folder_history import RUN, operations_on
from nanogpt_surgery.runs.summary import read_samples

MOST_SHOWN = 2_000  # steps of a run; of more, some are left out
RATE_OF = 20  # steps, the newest, whose rate is shown


def runs_below(folder: Path) -> list[Path]:
    """Returns the run folders right below a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def row_of(run: Path) -> dict[str, Any]:
    """Returns a run in a line: how far it is, and what it has come to."""
    described, rows = _described(run), metrics_of(run)
    evaluated = [row["validation_loss"] for row in rows if row.get("validation_loss") is not None]
    return {
        "name": run.name,
        "kind": described.get("kind"),
        "state": state_of_run(run),
        "step": rows[-1]["step"] if rows else 0,
        "max_steps": most_steps(run),
        "validation_loss": evaluated[-1] if evaluated else None,
    }


def contents_of(run: Path) -> dict[str, Any]:
    """Returns what there is to show of a run: settings, figures of its steps, samples."""
    rows, most = metrics_of(run), most_steps(run)
    every = -(-len(rows) // MOST_SHOWN)
    kept = [r for i, r in enumerate(rows) if i % max(1, every) == 0 or r is rows[-1]]
    shown = [figures_of([row], most) for row in kept]
    return row_of(run) | {
        "config": _described(run).get("settings", {}),
        "metrics": shown,
        "samples": samples_of(run),
    }


def _described(run: Path) -> dict[str, Any]:
    with suppress(SurgeryError, OSError):
        found = read_json(run / RUN)
        return found if isinstance(found, dict) else {}
    return {}


def typed_for(run: Path) -> dict[str, Any] | None:
    """Returns the command that began a run, its arguments and the folder, if it is known."""
    typed = _described(run).get("typed")
    return typed if isinstance(typed, dict) else None


def most_steps(run: Path) -> int | None:
    """Returns how many steps a run was asked for, if that is known."""
    settings = _described(run).get("settings")
    most = settings.get("max_steps") if isinstance(settings, dict) else None
    return most if type(most) is int else None


def state_of_run(run: Path) -> str:
    """Returns "ended", or whether the process that writes it is there: "running", "stopped"."""
    with suppress(SurgeryError, OSError):
        if operations_on(run):
            return "ended"
    return "running" if _is_written(run / LOCK) else "stopped"


def _is_written(lock: Path) -> bool:
    """Whether the process whose number stands in a lock is there.

    Taking the lock to see would refuse a run that begins in that moment.
    """
    with suppress(OSError, ValueError):
        process = int(lock.read_text("utf-8"))
        if os.name == "posix":  # elsewhere this call would end the process
            os.kill(process, 0)
            return True
    return False


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics, up to one that is still being written."""
    found = []
    with suppress(OSError, ValueError), (run / METRICS).open(encoding="utf-8") as file:
        for line in file:
            found.append(json.loads(line))
    return [row for row in found if isinstance(row, dict) and type(row.get("step")) is int]


def figures_of(rows: list[dict[str, Any]], most: int | None) -> dict[str, Any]:
    """Returns the figures of the last of some steps, its rate and the time left by all of them."""
    newest = rows[-1]
    seconds = sum(_number(row.get("seconds")) or 0.0 for row in rows)
    tokens = sum(_number(row.get("tokens")) or 0 for row in rows)
    steps = sum(row["step"] > 0 for row in rows)
    left = None if most is None or not steps else (most - newest["step"]) * seconds / steps
    wanted = ("loss", "validation_loss", "learning_rate")
    return {
        "step": newest["step"],
        **{name: _number(newest.get(name)) for name in wanted},
        "tokens_per_second": tokens / seconds if seconds else None,
        "seconds_left": left,
    }


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def samples_of(run: Path, after: Iterable[int] = ()) -> list[dict[str, Any]]:
    """Returns the answers that a run wrote down, beside that of its first; those of `after` not."""
    found, known = read_samples(run), set(after)
    base = next((line["answer"] for line in found if line["step"] == 0), None)
    return [
        {
            "step": line["step"],
            "prompt": line["prompt"],
            "text": line["answer"],
            "base_text": base,
        }
        for line in found
        if line["step"] > 0 and line["step"] not in known
    ]
