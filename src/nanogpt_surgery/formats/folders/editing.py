"""A fact of a model on disk edited: an adapter folder, whose journal says what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.formats.folders.merging import fingerprint
from nanogpt_surgery.formats.folders.model_surgery import plain_values
from nanogpt_surgery.formats.model_file import open_model
from nanogpt_surgery.formats.peft.writing import write_adapter_files
from nanogpt_surgery.history.folder_history import FolderOperation, hashes_of, record
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.editing import edit, plan_edit


@check_arguments
def edit_model(
    model: str | Path,
    prompt: str,
    subject: str,
    target: str,
    out: str | Path,
    *,
    layer: int | None = None,
    text: str | None = None,
    neighbours: Sequence[str] | None = None,
    seed: int = 0,
) -> Report:
    """Edits a fact of a model into an adapter folder, which peft opens; the model stays as it is.

    Args:
        model: whatever `open_model` opens.
        prompt: see `edit`, as those below.
        subject: see there.
        target: see there.
        out: the adapter folder to make; one of ours that lies there is replaced.
        layer: see there.
        text: see there.
        neighbours: see there.
        seed: see there.

    Raises:
        SurgeryError: the model does not open, `edit` refuses, or the folder cannot be written.
    """
    network, tokenizer = _opened(model)
    base = fingerprint(network, str(model))
    options: dict[str, Any] = {"layer": layer, "text": text, "seed": seed}
    report = edit(network, tokenizer, prompt, subject, target, neighbours=neighbours, **options)
    done = FolderOperation(report.title, base, measured=plain_values(report.summary))

    def write(new: Path) -> FolderOperation:
        write_adapter_files(network, new, str(model))
        made = replace(done, after=hashes_of(new), originals="none")
        record(new, made)
        return made

    made = write_folder(out, write)
    kept = {"folder": str(out), "base": base, "sha256": made.changes()}
    return Report(report.title, report.rows, report.summary | kept)


@check_arguments
def plan_edit_model(
    model: str | Path, prompt: str, subject: str, target: str, *, layer: int | None = None
) -> Report:
    """Says what `edit_model` with the same arguments would do; nothing is written."""
    network, tokenizer = _opened(model)
    return plan_edit(network, tokenizer, prompt, subject, target, layer=layer)


def _opened(model: str | Path) -> tuple[SimpleGPT, Tokenizer]:
    network, tokenizer = open_model(model, torch.float32)
    return network, required_tokenizer(tokenizer, str(model))
