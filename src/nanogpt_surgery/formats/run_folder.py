"""A run folder: checkpoints, each a whole model folder, with the training's state beside the model.

RUN/
  run.json                    what was asked for: settings, model, data
  metrics.jsonl               a line for each step
  LATEST, BEST                names of checkpoints: hints; the manifests decide
  checkpoints/step-00000250/  a model folder, training.safetensors and .json
  loss.png
  LOCK                        held by the process that writes
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError, SurgeryWarning
from nanogpt_surgery.files import MANIFEST, damage

RUN, METRICS, LATEST, BEST, LOCK = "run.json", "metrics.jsonl", "LATEST", "BEST", "LOCK"
_STEP = re.compile(r"step-(\d{8})")


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run folder."""
    return (Path(path) / RUN).is_file()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match, f"{checkpoint.name} is not a checkpoint's name"
    return int(match[1])


def checkpoints(run: Path) -> list[Path]:
    """The folders that carry a checkpoint's name and a manifest, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    named = [folder for folder in folders if _STEP.fullmatch(folder.name) and folder.is_dir()]
    return sorted(folder for folder in named if (folder / MANIFEST).is_file())


def latest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning."""
    for folder in reversed(checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            return folder
        warnings.warn(f"passing over {folder}: {problem}", SurgeryWarning, stacklevel=2)
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, if one was measured and is whole."""
    hint = run / BEST
    name = hint.read_text(encoding="utf-8").strip() if hint.is_file() else ""
    folder = run / "checkpoints" / name
    return folder if _STEP.fullmatch(name) and damage(folder) is None else None


def chosen_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run, or else the newest.

    Raises:
        SurgeryError: the run has no whole checkpoint.
    """
    folder = best_checkpoint(run) or latest_checkpoint(run)
    if folder is None:
        raise SurgeryError(f"{run} has no whole checkpoint yet", "surgery train --resume goes on")
    return folder


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file, or a folder, against other processes; a process that dies lets go.

    Raises:
        SurgeryError: another process holds it.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_held(path) from None
        if path.is_file():
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        os.close(descriptor)


def _is_held(path: Path) -> SurgeryError:
    owner = f" (PID {path.read_text('utf-8').strip()})" if path.is_file() else ""
    folder = path.parent if path.is_file() else path
    return SurgeryError(
        f"{folder} is being written by another process{owner}",
        "wait for it, or choose a new --out",
    )
