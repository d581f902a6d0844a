"""Operations that make an adapter, done to folders: into a new one, or in place, with undo.

The base is opened with the adapters on it, the operation acts in memory with all its checks, and
the adapter that it has made is written, read again and compared to the bit before it counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.formats.folders.merging import fingerprint, probe_ids
from nanogpt_surgery.formats.folders.model_surgery import plain_values
from nanogpt_surgery.formats.folders.run_folder import is_run
from nanogpt_surgery.formats.huggingface.tokenizer_files import chat_template_in
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
from nanogpt_surgery.formats.peft.writing import write_adapter_files
from nanogpt_surgery.history.folder_history import FolderOperation, operate, record_made
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report

ActOnAdapters: TypeAlias = Callable[[SimpleGPT, Tensor | None], Report]
"""Operates on a model that carries adapters, and measures on ids (B, T)."""


@check_arguments
def plan_on_adapters(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    plan: Callable[[SimpleGPT], Report],
    out: str | Path,
    *,
    force: bool = False,
) -> Report:
    """Returns the plan of an operation on adapters, and where it would write; nothing is written.

    Args:
        base: as in `operate_on_adapters`, and so the others.
        adapters: as there.
        plan: plans the operation on the opened base.
        out: as there.
        force: as there.
    """
    report = plan(_opened(base, adapters, force))
    sizes = {"written_to": str(out), "free_bytes": free_bytes(Path(out))}
    return Report(report.title, report.rows, report.summary | sizes)


@check_arguments
def operate_on_adapters(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    act: ActOnAdapters,
    made: str,
    out: str | Path,
    *,
    force: bool = False,
    probe: str | None = None,
) -> Report:
    """Does an operation that makes an adapter of a base, and of adapters on it.

    Args:
        base: whatever `open_model` opens.
        adapters: the folder of each by its name on the model.
        act: the operation.
        made: the name of the adapter that it makes.
        out: the adapter folder to make. Where it is the folder of one of the adapters, that folder
            changes in one step, and `undo_folder` brings every byte back.
        force: take adapters that were made for another base, with a warning.
        probe: a text to measure on; without one, on random tokens.

    Returns:
        The operation's report, and what became of the files.

    Raises:
        SurgeryError: a part does not open, the operation refuses, or what was written does not read
            back. What was there is untouched then.
    """
    _check_goal(Path(out), base)
    model = _opened(base, adapters, force)
    hashed = fingerprint(model, str(base))
    ids, measured_on = probe_ids(model, open_model(base, "each")[1] if probe else None, probe)
    report = act(model, ids)
    done = FolderOperation(report.title, hashed, measured=plain_values(report.summary))
    goal, places = Path(out), {adapter_folder(path).resolve() for path in adapters.values()}
    templates = (chat_template_in(adapter_folder(path)) for path in adapters.values())
    template = next(filter(None, templates), None)

    def write(new: Path) -> FolderOperation:
        write_adapter_files(model, new, str(base), name=made, chat_template=template)
        return done

    if goal.resolve() in places:
        done = operate(goal, write)
    else:
        done = write_folder(goal, lambda new: record_made(new, write(new)))
    kept = {"folder": str(goal), "base": hashed, "originals": done.originals}
    measured = {"measured_on": measured_on} | report.summary
    return Report(report.title, report.rows, measured | kept | {"sha256": done.changes()})


def _check_goal(goal: Path, base: str | Path) -> None:
    """Raises `SurgeryError` if what would be written over belongs to a run, or is the base."""
    if is_run(goal) or is_run(goal.resolve().parent.parent):
        raise SurgeryError(
            f"{goal} belongs to a run, whose training goes on from its adapter as it is",
            "out=FOLDER writes a new adapter",
        )
    if goal.exists() and goal.resolve() == Path(base).resolve():
        raise SurgeryError(f"{goal} is the base itself", "name another folder")


def _opened(base: str | Path, adapters: Mapping[str, str | Path], force: bool) -> SimpleGPT:
    model, _ = open_model(base, "each")
    for name, path in adapters.items():
        load_adapter(model, path, name=name, force=force)
    return model
