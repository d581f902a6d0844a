"""A run folder: checkpoints, each a whole model folder, with the training's state beside the model.

RUN/
  run.json                    what was asked for: settings, model, data
  metrics.jsonl               a line for each step, and before it one of step 0
  samples.jsonl               sample answers, the first from before the first step
  LATEST, BEST                names of checkpoints: hints; the checkpoints themselves decide
  checkpoints/step-00000250/  a model folder, training.safetensors and .json
  loss.png
  LOCK                        held by the process that writes
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError, warn
from nanogpt_surgery.files.atomic import MANIFEST, damage
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.history.folder_history import RUN

SAMPLES = "samples.jsonl"
METRICS, LATEST, BEST = "metrics.jsonl", "LATEST", "BEST"
STATE, SUMMARY = "training.safetensors", "training.json"
# The number behind the steps is there where something else stood in a checkpoint's place.
_STEP = re.compile(r"step-(\d{8})(?:-(\d{1,4}))?")


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run folder."""
    return (Path(path) / RUN).is_file()


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The number of steps behind a checkpoint."""
    return _order(checkpoint)[0]


def checkpoints(run: Path) -> list[Path]:
    """The folders that carry a checkpoint's name and its manifest, oldest first.

    A model folder under such a name is one only where no other is there: it has no training's
    state to go on from.
    """
    sealed = [folder for folder in _named(run) if (folder / MANIFEST).is_file()]
    return [folder for folder in sealed if _is_ours(folder)] or sealed


def checkpoint_at(run: Path, step: int) -> Path | None:
    """The checkpoint after `step` steps, None if there is none."""
    return next((f for f in reversed(checkpoints(run)) if step_of(f) == step), None)


def _named(run: Path) -> list[Path]:
    folders = (run / "checkpoints").glob("step-*")
    return sorted((f for f in folders if _STEP.fullmatch(f.name) and f.is_dir()), key=_order)


def _written(run: Path) -> list[Path]:
    """Checkpoints, oldest first, with those that have lost their manifest."""
    sealed = checkpoints(run)
    return [f for f in _named(run) if f in sealed or (f / STATE).is_file()]


def _order(checkpoint: Path) -> tuple[int, int]:
    match = _STEP.fullmatch(checkpoint.name)
    assert match, f"{checkpoint.name} is not a checkpoint's name"
    return int(match[1]), int(match[2] or 0)


def _is_ours(folder: Path) -> bool:
    """Whether a sealed folder is a checkpoint."""
    try:
        return STATE in read_json(folder / MANIFEST)["files"]
    except (SurgeryError, OSError, KeyError, TypeError):
        return True  # it was one, and is damaged


def free_place(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps can be written: nothing that is not ours goes.

    Its usual folder, unless something stands there that no manifest of ours lists.
    """
    goal = usual = checkpoint_folder(run, step)
    number = 1
    while os.path.lexists(goal) and not holds_only_its_own(goal):
        number += 1
        goal = usual.with_name(f"{usual.name}-{number}")
    if goal != usual:
        warn(
            f"{usual} is there already, and not all of it is a checkpoint of this run: it is left "
            f"as it is, and the checkpoint of step {step} is {goal.name}"
        )
    return goal


def holds_only_its_own(folder: Path) -> bool:
    """Whether a folder is empty, or holds nothing but what its manifest lists."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    there = {path.name for path in folder.iterdir()}
    try:
        return not there or there <= {*read_json(folder / MANIFEST)["files"], MANIFEST}
    except (SurgeryError, OSError, KeyError, TypeError):
        return False


def summary_of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The contents of a checkpoint's training.json.

    Raises:
        SurgeryError: it is missing, or holds something else.
    """
    summary = read_json(checkpoint / SUMMARY)
    if not isinstance(summary, dict):
        raise SurgeryError(f"{checkpoint / SUMMARY} holds no values of a step")
    return summary


def validation_loss_of(checkpoint: Path) -> float | None:
    """The validation loss that a checkpoint says it has; None if none was measured."""
    loss = summary_of_checkpoint(checkpoint).get("validation_loss")
    return float(loss) if isinstance(loss, int | float) and math.isfinite(loss) else None


def latest_checkpoint(run: Path, strict: bool = False) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning.

    Raises:
        SurgeryError: with `strict`, the newest one is damaged.
    """
    for folder in reversed(_written(run)):
        problem = damage(folder)
        if problem is None:
            return folder
        if strict:
            raise SurgeryError(
                f"the newest checkpoint is damaged: {folder}: {problem}",
                "restore it from a copy, or strict=False goes on from the one before",
            )
        _pass_over(folder, problem)
    return None


def best_checkpoint(run: Path) -> Path | None:
    """The whole checkpoint with the lowest validation loss, if one was measured.

    Each checkpoint's own loss decides, not what BEST says; a damaged one that may be it is passed
    over with a warning.
    """
    losses = []
    for folder in _written(run):
        try:
            loss = validation_loss_of(folder)
        except SurgeryError:
            if problem := damage(folder):  # else it was sealed without one
                _pass_over(folder, problem)
            continue
        if loss is not None:
            losses.append((loss, folder))
    for _, folder in sorted(losses, key=lambda pair: pair[0]):  # of equal ones the earliest
        problem = damage(folder)
        if problem is None:
            return folder
        _pass_over(folder, problem)
    return None


def _pass_over(checkpoint: Path, problem: str) -> None:
    warn(f"passing over {checkpoint}: {problem}")


def chosen_checkpoint(run: Path) -> Path:
    """The best checkpoint of a run, or else the newest.

    Raises:
        SurgeryError: the run has no whole checkpoint.
    """
    folder = best_checkpoint(run) or latest_checkpoint(run)
    if folder is None:
        raise SurgeryError(f"{run} has no whole checkpoint yet", "resume=True goes on with it")
    return folder
