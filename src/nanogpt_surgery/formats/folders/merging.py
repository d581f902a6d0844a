"""A model on disk and an adapter on disk become a merged model on disk, in place or elsewhere.

W + ΔW is added in float32 and rounded once, to the dtype that W is stored in; weights without a ΔW
keep their bits. The merged model is written, read again, compared bit by bit, and measured against
the adapted one; only then does it take its place.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import whole_folder
from nanogpt_surgery.files.manifest import file_hash
from nanogpt_surgery.formats.comparison import check_equal
from nanogpt_surgery.formats.folders.in_place import leave_away
from nanogpt_surgery.formats.folders.measured_merge import Merged, add_in
from nanogpt_surgery.formats.folders.merge_preparation import Merge, dtype_name, prepare
from nanogpt_surgery.formats.folders.run_folder import is_run
from nanogpt_surgery.formats.huggingface.hub import is_hub_name
from nanogpt_surgery.formats.huggingface.safetensors_file import weight_files
from nanogpt_surgery.formats.model_file import model_folder, open_model, write_model_files
from nanogpt_surgery.formats.peft.adapter_file import TENSORS as ADAPTER_TENSORS
from nanogpt_surgery.formats.peft.adapter_layout import adapter_folder
from nanogpt_surgery.history.folder_journal import Entry, hashes_of, record
from nanogpt_surgery.history.folder_operation import operate
from nanogpt_surgery.lora.merge_metrics import Rounding, merge_survival, round_to
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.report import Report


def plan_merge(
    model: str | Path, adapter: str | Path, out: str | Path | None = None, **options: Any
) -> Report:
    """What `merge_adapter` would do, while nothing is written.

    How much of ΔW survives each precision in each layer, and the sizes to expect; the arguments are
    those of `merge_adapter`.
    """
    check_own_folder(model, out)
    keep = options.pop("keep_originals", True)
    options.pop("tolerance", None)
    merge = prepare(model, adapter, **options)
    survival = merge_survival(merge.model)
    goal = _in_place(model) if out is None else Path(out)
    there = next(place for place in [goal, *goal.absolute().parents] if place.is_dir())
    old = sum((goal / name).stat().st_size for name in weight_files(goal)) if out is None else 0
    sizes = {
        "written_to": f"{goal}{', in place' if out is None else ''}",
        "kept_originals_bytes": old if keep else 0,
        "free_bytes": shutil.disk_usage(there).free,
    }
    return Report("merge planned", survival.rows, survival.summary | merge.planned() | sizes)


def merge_adapter(
    model: str | Path,
    adapter: str | Path,
    out: str | Path | None = None,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tolerance: float = 1e-3,
    force: bool = False,
    keep_originals: bool = True,
    probe: str | None = None,
    tied: Tied | None = None,
) -> Report:
    """Merge an adapter folder into a model, in float32, rounded once; read again and measured.

    Without `out` the model's own folder is operated on: it changes in one step, what was there is
    kept in it, and `undo_folder` brings every byte back.

    Args:
        model: a run or a model folder; with `out` whatever `open_model` opens.
        adapter: an adapter folder, as finetune or peft writes it.
        out: the model folder to make; one of ours that lies there is replaced.
        dtype: of all weights to write; by default each keeps the one that it is stored in.
        tolerance: largest mean KL divergence, adapted model to merged one, in nats a token.
        force: merge whatever was measured, and although the adapter was made for another base.
        keep_originals: keep what was there, so that an operation in place can be undone.
        probe: a text to measure on; random tokens if None.
        tied: what to do with weights that layers share; by default what the adapter was made with.

    Returns:
        A row for each layer; the largest and the mean error of the logits, KL and the share of
        unchanged top tokens; and what was measured on.

    Raises:
        SurgeryError: one of the parts cannot be opened, they do not fit, `out` is the model
            itself, the adapter would change no weight, the merged model is not the adapted one, or
            the disk refuses. What was there is untouched then.
    """
    _check_tolerance(tolerance)
    check_own_folder(model, out)
    goal = _in_place(model) if out is None else Path(out)
    merge = prepare(model, adapter, dtype=dtype, probe=probe, force=force, tied=tied)
    entry = Entry(merge.title, merge.base, {}, {}, planned=merge.planned() | _facts(adapter))
    merged = add_in(merge, partial(_rounding, merge), tolerance, force)
    merge.round()
    writing = _Writing(merge, merged)
    if out is None:
        entry = writing.in_place(goal, entry, keep_originals)
    else:
        entry = writing.elsewhere(goal, replace(entry, operation=f"{merge.title} into {model}"))
    return _report(merged, merge, entry, goal)


def _rounding(merge: Merge, layer: str, _weight: Tensor) -> tuple[str, Rounding]:
    """The dtype that a layer's weight is written in."""
    dtype = merge.dtypes[f"{layer}.weight"]
    return dtype_name(dtype), partial(round_to, dtype=dtype)


@dataclass
class _Writing:
    """Writing a merged model, and measuring what was written against the adapted one."""

    merge: Merge
    merged: Merged

    def in_place(self, goal: Path, entry: Entry, keep_originals: bool) -> Entry:
        """Operate on the model's own folder."""
        gone = weight_files(goal)
        return operate(goal, lambda new: self._files(new, entry, goal), keep_originals, gone)

    def elsewhere(self, goal: Path, entry: Entry) -> Entry:
        """Make a folder, whose journal begins with the merge."""
        with whole_folder(goal) as new:
            entry = self._files(new, entry)
            entry = replace(entry, after=hashes_of(new), originals="none")
            record(new, entry)
        return entry

    def _files(self, new: Path, entry: Entry, place: Path | None = None) -> Entry:
        """Write the files, read them again; in place, without those there already."""
        tokenizer = self.merge.tokenizer if place is None or is_run(place) else None
        write_model_files(self.merge.model, new, tokenizer, place or self.merge.source)
        again, tokenizer_again = open_model(new, "each")
        check_equal(self.merge.model, again, tokenizer, tokenizer_again)
        if place is not None:
            leave_away(new, place)
        return replace(entry, measured=self.merged.measure(again))


def _facts(adapter: str | Path) -> dict[str, str]:
    return {"adapter_sha256": file_hash(adapter_folder(adapter) / ADAPTER_TENSORS)}


def _check_tolerance(tolerance: float) -> None:
    if not tolerance >= 0:  # also NaN
        raise SurgeryError(f"tolerance is {tolerance}; it must be a number of at least 0")


def check_own_folder(model: str | Path, out: str | Path | None) -> None:
    """Raise `SurgeryError` if `out` is the model itself, which could not be brought back then."""
    if out is None or not Path(model).is_dir():
        return
    if Path(out).resolve() in (Path(model).resolve(), model_folder(model).resolve()):
        raise SurgeryError(
            f"{out} is the model itself, and writing over it has no undo",
            "leave out --out to merge in place, with undo",
        )


def _in_place(model: str | Path) -> Path:
    """The folder that an operation without `out` changes.

    Raises:
        SurgeryError: it is a file, or a model on the hub, whose copies others read too.
    """
    folder = Path(model)
    if folder.is_dir():
        return folder
    if not folder.exists() and not is_hub_name(str(model)):
        raise SurgeryError(f"there is no folder {model}", "name a run or a model folder")
    kind = "no folder" if folder.exists() else "a model on the hub"
    raise SurgeryError(f"{model} is {kind}, so it cannot be merged into in place",
                       "add --out FOLDER")  # fmt: skip


def _report(merged: Merged, merge: Merge, entry: Entry, goal: Path) -> Report:
    summary = {
        "folder": str(goal),
        "layers": len(merged.rows),
        "base": merge.base,
        "dtype": entry.planned["dtype"],
        **entry.measured,
        "originals": entry.originals,
        "sha256": entry.changes(),
    }
    return Report(f"merged: {merge.title}", merged.rows, summary)
