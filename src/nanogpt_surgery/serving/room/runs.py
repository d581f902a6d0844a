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
from nanogpt_surgery.history.folder_history import RUN, read_journal
from nanogpt_surgery.runs.summary import read_samples

MOST_SHOWN = 2_000  # steps of a run; of more, some are left out
MOST_READ = 256 << 10  # bytes of the end of a run's metrics, for its line in a list
RATE_OF = 20  # steps, the newest, whose rate is shown


def runs_below(folder: Path) -> list[Path]:
    """Returns the run folders right below a folder, by name."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and is_run(path))


def row_of(run: Path) -> dict[str, Any]:
    """Returns a run in a line: how far it is, and what it has come to."""
    described, rows = _described(run), metrics_of(run, MOST_READ)
    evaluated = [row["validation_loss"] for row in rows if _number(row.get("validation_loss"))]
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
    every = max(1, -(-len(rows) // MOST_SHOWN))
    kept = [
        row
        for i, row in enumerate(rows)
        if i % every == 0 or row is rows[-1] or _number(row.get("validation_loss")) is not None
    ]
    return row_of(run) | {
        "config": _described(run).get("settings", {}),
        "metrics": [figures_of([row], most) for row in kept],
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
        if read_journal(run).operations:  # the last of a training is its own signature
            return "ended"
    if _is_written(run / LOCK):
        return "running"
    rows = metrics_of(run)
    return "ended" if rows and rows[-1]["step"] == most_steps(run) else "stopped"


def _is_written(lock: Path) -> bool:
    """Whether the process whose number stands in a lock is there.

    Taking the lock to see would refuse a run that begins in that moment.
    """
    with suppress(OSError, ValueError, OverflowError):
        process = int(lock.read_text("utf-8"))
        if os.name == "posix" and process > 0:  # elsewhere this call would end the process
            with suppress(PermissionError):  # it is somebody else's, so it is there
                os.kill(process, 0)
            return True
    return False


def metrics_of(run: Path, most_bytes: int | None = None) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics, or the last of them, but one that is being written."""
    with suppress(OSError), (run / METRICS).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0 if most_bytes is None else max(0, size - most_bytes))
        return _rows(file.read())
    return []


def _rows(lines: bytes) -> list[dict[str, Any]]:
    """Returns the whole lines that hold the values of a step."""
    found = []
    for line in lines[: lines.rfind(b"\n") + 1].splitlines():
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                found.append(row)
    return found


class NewSteps:
    """The lines that a run's metrics gain, each read once.

    Args:
        run: the run folder; steps that are there already are not new.
    """

    def __init__(self, run: Path):
        self._path, self._place, self._file, self._last = run / METRICS, 0, -1, -1
        self.read()

    def read(self) -> list[dict[str, Any]]:
        """Returns the lines since the last call; a run that goes on writes its file anew."""
        with suppress(OSError), self._path.open("rb") as file:
            about = os.fstat(file.fileno())
            if about.st_ino != self._file or about.st_size < self._place:
                self._file, self._place = about.st_ino, 0
            file.seek(self._place)
            lines = file.read()
            self._place += lines.rfind(b"\n") + 1
            rows = [row for row in _rows(lines) if row["step"] > self._last]
            self._last = rows[-1]["step"] if rows else self._last
            return rows
        return []


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
