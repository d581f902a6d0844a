"""An operation on a model, done to a folder: in place, with undo, or into a new one.

The model is opened, the operation acts on it in memory with all its checks, and the result is
written, read again and compared to the bit before it counts. Whatever the folder holds beside the
weights (config, tokenizer, generation_config.json) keeps step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.formats.comparison import check_equal
from nanogpt_surgery.formats.folders.merging import (
    check_not_itself,
    fingerprint,
    folder_in_place,
    probe_ids,
)
from nanogpt_surgery.formats.huggingface.safetensors_file import weight_files
from nanogpt_surgery.formats.huggingface.tokenizer_files import VOCABULARY_FILES
from nanogpt_surgery.formats.model_file import open_model, write_model_files
from nanogpt_surgery.history.folder_history import FolderOperation, operate, record_made
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report

Act: TypeAlias = Callable[
    [SimpleGPT, Tokenizer | None, Tensor | None], tuple[Tokenizer | None, Report]
]
"""Operates on a model with its tokenizer, and measures on ids (B, T); returns the tokenizer that
the model has then, and a report."""
Plan: TypeAlias = Callable[[SimpleGPT, Tokenizer | None], Report]


@check_arguments
def plan_on_model(
    model: str | Path, plan: Plan, out: str | Path | None = None, keep_originals: bool = True
) -> Report:
    """Returns the plan of an operation on a model, and what it would write; nothing is written.

    Args:
        model: as in `operate_on_model`.
        plan: plans the operation on the opened model.
        out: as in `operate_on_model`.
        keep_originals: as in `operate_on_model`.
    """
    check_not_itself(model, out)
    goal = folder_in_place(model) if out is None else Path(out)
    report = plan(*open_model(model, "each"))
    old = sum((goal / name).stat().st_size for name in weight_files(goal)) if out is None else 0
    sizes = {
        "written_to": f"{goal}{', in place' if out is None else ''}",
        "kept_originals_bytes": old if keep_originals else 0,
        "free_bytes": free_bytes(goal),
    }
    title = f"planned: {report.title.removeprefix('planned: ')}"
    return Report(title, report.rows, report.summary | sizes)


@check_arguments
def operate_on_model(
    model: str | Path,
    act: Act,
    out: str | Path | None = None,
    *,
    keep_originals: bool = True,
    probe: str | None = None,
) -> Report:
    """Does an operation to a model on disk.

    Args:
        model: a run or a model folder; with `out` whatever `open_model` opens.
        act: the operation.
        out: the model folder to make; one of ours that lies there is replaced. Without, the
            model's own folder changes, in one step, and `undo_folder` brings every byte back.
        keep_originals: keep what was there, so that an operation in place can be undone.
        probe: a text to measure on; None lets the operation choose.

    Returns:
        The operation's report, and what became of the files.

    Raises:
        SurgeryError: the model does not open, `out` is the model itself, the operation refuses, or
            what was written does not read back. What was there is untouched then.
    """
    check_not_itself(model, out)
    goal = folder_in_place(model) if out is None else Path(out)
    network, tokenizer = open_model(model, "each")
    base = fingerprint(network, str(model))
    ids, measured_on = None, "random tokens"
    if probe is not None:
        ids, measured_on = probe_ids(network, tokenizer, probe)
    after, report = act(network, tokenizer, ids)
    done = FolderOperation(report.title, base, measured=plain_values(report.summary))

    def write(new: Path) -> None:
        write_model_files(network, new, after, model)
        again, tokenizer_again = open_model(new, "each")
        check_equal(network, again, after, tokenizer_again)

    if out is None:
        done = _in_place(goal, write, done, after is not tokenizer, keep_originals)
    else:
        done = write_folder(goal, lambda new: _elsewhere(new, write, done, str(model)))
    kept = {"folder": str(goal), "base": base, "originals": done.originals}
    measured = {"measured_on": measured_on} | report.summary
    return Report(report.title, report.rows, measured | kept | {"sha256": done.changes()})


def _in_place(
    goal: Path,
    write: Callable[[Path], None],
    done: FolderOperation,
    other_vocabulary: bool,
    keep_originals: bool,
) -> FolderOperation:
    """Changes a folder in one step; the files that the new ones stand for go."""
    gone = weight_files(goal) | ({*VOCABULARY_FILES} if other_vocabulary else set())

    def change(new: Path) -> FolderOperation:
        write(new)
        _leave_away_equal(new, goal, gone)
        return done

    return operate(goal, change, keep_originals, gone)


def _elsewhere(
    new: Path, write: Callable[[Path], None], done: FolderOperation, source: str
) -> FolderOperation:
    """Writes a new folder, whose journal begins with the operation that made it."""
    write(new)
    return record_made(new, replace(done, operation=f"{done.operation} of {source}"))


def plain_values(summary: dict[str, Any]) -> dict[str, Any]:
    """Returns what of a summary stands in a journal."""
    return {key: value for key, value in summary.items() if isinstance(value, int | float | str)}


def _leave_away_equal(new: Path, place: Path, gone: Collection[str]) -> None:
    """Drops the new files that stay in `place` as they are, byte for byte."""
    for path in sorted(new.rglob("*"), reverse=True):
        name = path.relative_to(new)
        stays = path.is_file() and (place / name).is_file() and str(name) not in gone
        if stays and (place / name).read_bytes() == path.read_bytes():
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
