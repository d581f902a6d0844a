"""Writing a run folder: metrics a line a step, checkpoints whole or not at all, resumed to the bit.

A checkpoint holds the weights for others (written by the caller: a model folder or an adapter
folder), and what to go on from: the trained parameters, the optimizer's state of each, and a number
of steps. Nothing else has a state: batches, dropout and the schedule follow from (seed, step).
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, first_problems, warn
from nanogpt_surgery.files.atomic import MANIFEST, damage, file_hash, write_folder
from nanogpt_surgery.files.disk_errors import make_folder, tried_again, writing
from nanogpt_surgery.files.lock import LOCK, file_lock
from nanogpt_surgery.files.writing import (
    flush,
    is_temporary,
    link_or_copy,
    read_json,
    remove_temporaries,
    replace_text,
    temporary_beside,
    write_json,
)
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.formats.folders.run_folder import (
    BEST,
    LATEST,
    METRICS,
    SAMPLES,
    STATE,
    SUMMARY,
    best_checkpoint,
    checkpoints,
    free_place,
    holds_only_its_own,
    is_run,
    latest_checkpoint,
    step_of,
    summary_of_checkpoint,
    validation_loss_of,
)
from nanogpt_surgery.formats.huggingface.safetensors_file import write_tensors
from nanogpt_surgery.history.folder_history import (
    RUN,
    FolderOperation,
    operations_on,
    read_journal,
    record,
)
from nanogpt_surgery.history.journal import SETTLED
from nanogpt_surgery.runs.description import RunDiffersError, differences
from nanogpt_surgery.training.step import Step


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


KEPT = 2  # newest checkpoints, beside the best
_LEFT_EARLY = (RUN, METRICS, SAMPLES, LATEST, BEST, "loss.png")  # by a run without a checkpoint
_NOT_SHOWN = (STATE, SUMMARY, MANIFEST)


class RunFolder:
    """A run folder that is being written.

    Args:
        folder: the run folder.
        checkpoint: the checkpoint that the run goes on from, None at the beginning.
        best: the checkpoint with the lowest validation loss, None if none was measured.

    Attributes:
        environment: on what it computes (`environment_of`), as each checkpoint will say.
        changes: the description that it goes on with where that is another one, and in what.
    """

    def __init__(self, folder: Path, checkpoint: Path | None = None, best: Path | None = None):
        self.folder = folder
        self.checkpoint = checkpoint
        self.best = best
        loss = validation_loss_of(best) if best else None
        self.best_loss = float("inf") if loss is None else loss
        self.environment: dict[str, Any] = {}
        self.changes: tuple[dict[str, Any], list[str]] | None = None
        self._whole = {checkpoint, best}

    @property
    def first_step(self) -> int:
        """Steps done already."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def environment_before(self) -> dict[str, Any]:
        """On what the steps before the checkpoint to go on from were computed; {} if not known."""
        if self.checkpoint is None:
            return {}
        known = summary_of_checkpoint(self.checkpoint)
        return {**known.get("environment", {}), "processes": known.get("processes", 1)}

    def record_start(self, validation_loss: float) -> None:
        """Begins the metrics with the validation loss before the first step, as that of step 0.

        Raises:
            SurgeryError: the disk refuses.
        """
        loss = validation_loss if math.isfinite(validation_loss) else None
        start = {"step": 0, "loss": None, "tokens": 0, "seconds": 0.0, "validation_loss": loss}
        replace_text(self.folder / METRICS, json.dumps(start) + "\n")

    def record(self, step: Step) -> None:
        """Appends a step's metrics, a line whole or not at all.

        Raises:
            SurgeryError: the disk refuses. The checkpoints that are there can be gone on from.
        """
        path, line = self.folder / METRICS, json.dumps(step.to_dict()) + "\n"
        with writing(path):
            tried_again(lambda: _append(path, line))

    def save(
        self,
        step: Step,
        write_weights: Callable[[Path], None],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> Path:
        """Commits a checkpoint after a step; keeps the newest two and the best.

        Args:
            step: what it did; without a validation loss, the checkpoint cannot be the best.
            write_weights: writes the files that others read into an empty folder.
            model: with what is trained.
            optimizer: with the state of each trained parameter.

        Raises:
            SurgeryError: the disk refuses; the checkpoints that were there stay.
        """
        goal = free_place(self.folder, step.step)

        def write(new: Path) -> None:
            self._flush_metrics()
            write_weights(new)
            write_tensors(training_state(model, optimizer), new / STATE)
            write_json(new / SUMMARY, step.to_dict() | {"environment": self.environment})

        write_folder(goal, write)
        self.checkpoint = goal
        self._whole.add(goal)
        loss = validation_loss_of(goal)
        if loss is not None and loss < self.best_loss:
            self.best, self.best_loss = goal, loss
        self.show()
        self._prune()
        return goal

    def _flush_metrics(self) -> None:
        """Flushes the lines of the steps to the disk: no checkpoint without them."""
        path = self.folder / METRICS
        if not path.is_file():
            return
        try:
            flush(path)
        except OSError:
            # What could not be flushed is not flushed by a second attempt: it is written anew.
            with writing(path):
                replace_text(path, path.read_text(encoding="utf-8"))

    def show(self) -> None:
        """Brings LATEST, BEST and the top of the folder in line with the checkpoints.

        Raises:
            SurgeryError: the disk refuses.
        """
        with writing(self.folder):
            for hint, checkpoint in ((LATEST, self.checkpoint), (BEST, self.best)):
                path, wanted = self.folder / hint, f"{checkpoint.name}\n" if checkpoint else ""
                if checkpoint is None:
                    path.unlink(missing_ok=True)
                elif not path.is_file() or path.read_text("utf-8", "replace") != wanted:
                    replace_text(path, wanted)
            if shown := self.best or self.checkpoint:
                self._publish([f for f in shown.iterdir() if f.name not in _NOT_SHOWN])

    def _publish(self, files: list[Path]) -> None:
        """Shows files of a checkpoint at the top of the run folder, where other programs look.

        A journal that lists which files should be there records that they change from here on.
        """
        unlike = [file for file in files if not _same_bytes(file, self.folder / file.name)]
        if unlike and read_journal(self.folder).files:
            record(self.folder, FolderOperation("training went on", "", originals="none"))
        for file in unlike:
            link_or_copy(file, self.folder / file.name)

    def _prune(self) -> None:
        """Deletes checkpoints but the newest two that are whole and the best.

        Those after the newest were passed over; the training will come to their steps.
        """
        found = checkpoints(self.folder)
        found = found[: found.index(self.checkpoint) + 1] if self.checkpoint in found else []
        newest = (folder for folder in reversed(found) if self._is_whole(folder))
        kept = {*islice(newest, KEPT), self.best}
        for folder in found:
            if folder not in kept and holds_only_its_own(folder):
                with suppress(
                    OSError
                ):  # renamed first: nobody ever finds half of it under its name
                    shutil.rmtree(folder.rename(temporary_beside(folder)))

    def _is_whole(self, checkpoint: Path) -> bool:
        if checkpoint not in self._whole and damage(checkpoint) is None:
            self._whole.add(checkpoint)
        return checkpoint in self._whole

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Gives what is trained and its optimizer the state of the checkpoint to go on from.

        Raises:
            SurgeryError: it is the state of another model, or another version's optimizer kept it
                in another shape.
        """
        assert self.checkpoint is not None, "there is no checkpoint to go on from"
        restore_state(self.checkpoint / STATE, model, optimizer)
        if self.changes is not None:  # what does not fit has raised: it is this run from here on
            description, clauses = self.changes
            earlier = read_json(self.folder / RUN).get("changes", [])
            changes = [*earlier, {"after_step": self.first_step, "what": clauses}]
            write_json(self.folder / RUN, description | {"changes": changes})


@contextmanager
def open_run_folder(
    folder: Path,
    description: dict[str, Any],
    resume: bool,
    *,
    strict: bool = False,
    allow_changes: bool = False,
) -> Iterator[RunFolder]:
    """Begins a run, or goes on with one from its newest whole checkpoint; the folder is locked.

    The description is what determines the run; the rest is as in `Run.begin`. To resume where there
    is no run begins one.

    Raises:
        SurgeryError: a run is there and `resume` is off, its description differs (all differences),
            the folder holds something else, its newest checkpoint is damaged and `strict` is on,
            another process is writing it, or the disk refuses.
    """
    check_folder(folder, resume)
    make_folder(folder)
    with file_lock(folder / LOCK):
        with writing(folder):
            remove_temporaries(folder)
            remove_temporaries(folder / "checkpoints")
            changes: list[str] = []
            if is_run(folder) and not _ended_early(folder):
                changes = _changes(folder, description, allow_changes)
            else:
                for name in _LEFT_EARLY:
                    (folder / name).unlink(missing_ok=True)
                write_json(folder / RUN, description)
            run = RunFolder(folder, latest_checkpoint(folder, strict), best_checkpoint(folder))
            run.changes = (description, changes) if changes else None
            trim_metrics(folder / METRICS, run.first_step)
            run.show()
        yield run


def _ended_early(folder: Path) -> bool:
    """Whether a run left nothing but its own files, and no checkpoint among them."""
    others = [p for p in folder.iterdir() if p.name not in (*_LEFT_EARLY, LOCK, "checkpoints")]
    inside = folder / "checkpoints"
    others += inside.iterdir() if inside.is_dir() else []
    return all(is_temporary(path) for path in others) and "kind" in read_json(folder / RUN)


def _foreign(folder: Path) -> bool:
    """Whether a folder holds anything but what a run leaves that was killed at its start."""
    return any(path.name != LOCK and not is_temporary(path) for path in folder.iterdir())


def check_folder(folder: Path, resume: bool) -> None:
    """Raises if no run can begin, or go on, in a folder, whatever is to be trained.

    A run that ended before its first checkpoint has nothing to go on from, and is begun anew.

    Raises:
        SurgeryError: a run is there and `resume` is off, it was operated on, its metrics are lost,
            another process is writing it, or the folder holds something else.
    """
    with writing(folder):
        if not is_run(folder):
            if folder.exists() and (not folder.is_dir() or _foreign(folder)):
                raise SurgeryError(f"{folder} exists and is not a run", "choose a new folder")
            return
        if _ended_early(folder):
            with file_lock(folder / LOCK):
                return
        if not resume:
            raise SurgeryError(
                f"{folder} holds a run already",
                "resume=True goes on with it; or choose a new folder",
            )
        if standing := operations_on(folder):
            lasting = any(operation.state == SETTLED for operation in standing)
            way = "choose a new folder" if lasting else f"undo_folder({folder}) takes it back"
            raise SurgeryError(
                f"{folder} was operated on since, and going on would write over the result",
                f"folder_log({folder}) says what was done; {way}",
            )
        if checkpoints(folder) and not (folder / METRICS).is_file():
            raise SurgeryError(
                f"{folder / METRICS} is gone, where the losses of the run's steps stood",
                "put it back, or begin anew in another folder",
            )


def _changes(folder: Path, description: dict[str, Any], allowed: bool) -> list[str]:
    """Says in what a run's description differs now; warns of it if that is allowed.

    Raises:
        RunDiffersError: it is not allowed, or is of another kind, which never is.
    """
    before, now = read_json(folder / RUN), json.loads(json.dumps(description))
    found = differences(before, now)
    if not found:
        return []
    if not allowed or before.get("kind") != now.get("kind"):
        raise RunDiffersError(folder, found, before)
    warn(f"going on with {folder} although {'; '.join(found)}")
    return found


def _same_bytes(one: Path, other: Path) -> bool:
    if not other.is_file() or other.stat().st_size != one.stat().st_size:
        return False
    return one.samefile(other) or file_hash(one) == file_hash(other)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and their optimizer state: "name:value", "name:exp_avg" and so on."""
    return {
        f"{name}:{key}": tensor.detach().cpu().contiguous()
        for name, parameter in _trained(model, optimizer).items()
        for key, tensor in {"value": parameter, **optimizer.state[parameter]}.items()
    }


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in model.named_parameters() if id(p) in optimised}


def restore_state(file: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives what is trained and its optimizer the state that a file holds (`training_state`).

    Raises:
        SurgeryError: it is the state of another model or optimizer, or another version's optimizer
            kept it in another shape.
    """
    if not file.is_file():
        raise SurgeryError(
            f"{file.parent} holds no {file.name}, which a training goes on from",
            "it is a model: init_from=MODEL trains it further, as a new run",
        )
    tensors, trained = with_current_modules(load_file(file)), _trained(model, optimizer)
    _check_same_training(file, tensors, trained)
    for name, parameter in trained.items():
        prefix = f"{name}:"
        state = {k.removeprefix(prefix): tensors.pop(k) for k in [*tensors] if k.startswith(prefix)}
        with torch.no_grad():
            parameter.copy_(state.pop("value"))
        # Copies: the tensors lie in the file's memory, and the file may be deleted.
        optimizer.state[parameter] = {
            key: tensor.to(parameter.device, copy=True) for key, tensor in state.items()
        }


def _check_same_training(
    file: Path, tensors: dict[str, Tensor], trained: dict[str, nn.Parameter]
) -> None:
    """Raises if a state is of a model in which something else is trained, or in another shape."""
    wrong = []
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition(":")
        if name not in trained and kind == "value":
            wrong.append(f"{name} is trained there only")
        elif name in trained and (tensor.dim() or kind == "value"):  # else a number of steps
            there, here = tuple(tensor.shape), tuple(trained[name].shape)
            wrong += [f"{key} is {there} there and {here} here"] if there != here else []
    wrong += [f"{name} is trained here only" for name in trained if f"{name}:value" not in tensors]
    if wrong:
        raise SurgeryError(
            f"{file} is not the state of this training: {first_problems(sorted(wrong), 4)}",
            "go on with the settings, and the version, that it was begun with, or choose a new "
            "folder",
        )
