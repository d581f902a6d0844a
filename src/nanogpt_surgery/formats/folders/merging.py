"""A model and an adapter on disk become a merged model: in place, elsewhere, or as a GGUF file.

W + ΔW is added in float32 and rounded once, to the dtype that W is stored in; weights without a ΔW
keep their bits. A chat template beside the adapter becomes the model's. The merged model is
written, read again, compared bit by bit, and measured against the adapted one; only then does it
take its place.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import file_hash, write_file, write_folder
from nanogpt_surgery.files.disk_errors import free_bytes
from nanogpt_surgery.files.json_files import read_json
from nanogpt_surgery.formats.comparison import check_equal
from nanogpt_surgery.formats.folders.run_folder import is_run
from nanogpt_surgery.formats.gguf.writing import GGUFType, rounding_of, write_gguf_file
from nanogpt_surgery.formats.huggingface.config import CONFIG
from nanogpt_surgery.formats.huggingface.safetensors_file import weight_files
from nanogpt_surgery.formats.huggingface.tokenizer_files import (
    CHAT_TEMPLATE,
    chat_template_in,
    with_chat_template,
    write_chat_template,
)
from nanogpt_surgery.formats.model_file import (
    TENSORS,
    is_hub_name,
    model_folder,
    open_model,
    write_model_files,
)
from nanogpt_surgery.formats.peft.reading import TENSORS as ADAPTER
from nanogpt_surgery.formats.peft.reading import adapter_folder, load_adapter
from nanogpt_surgery.history.folder_history import FolderOperation, hashes_of, operate, record
from nanogpt_surgery.history.model_history import UPDATES, combined, plain_name, tensor_hashes
from nanogpt_surgery.lora.linear import LoRALayer
from nanogpt_surgery.lora.merging import (
    Rounding,
    add_update,
    check_effect,
    check_undecided,
    check_weights,
    compare_logits,
    for_each_layer,
    logits_of,
    merge_survival,
    replace_layers,
)
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.model.finite import check_finite, check_finite_weights
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report


def plan_merge(
    model: str | Path, adapter: str | Path, out: str | Path | None = None, **options: Any
) -> Report:
    """Reports what `merge_adapter` would do, while nothing is written.

    How much of ΔW survives each precision in each layer, and the sizes to expect; the arguments are
    those of `merge_adapter`.
    """
    check_not_itself(model, out)
    keep = options.pop("keep_originals", True)
    options.pop("tolerance", None)
    merge = _prepare(model, adapter, **options)
    survival = merge_survival(merge.model)
    goal = _in_place(model) if out is None else Path(out)
    old = sum((goal / name).stat().st_size for name in weight_files(goal)) if out is None else 0
    sizes = {
        "written_to": f"{goal}{', in place' if out is None else ''}",
        "kept_originals_bytes": old if keep else 0,
        "free_bytes": free_bytes(goal),
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
    """Merges an adapter folder into a model, in float32, rounded once; read again and measured.

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
    check_not_itself(model, out)
    goal = _in_place(model) if out is None else Path(out)
    merge = _prepare(model, adapter, dtype=dtype, probe=probe, force=force, tied=tied)
    planned = merge.planned() | {"adapter_sha256": file_hash(adapter_folder(adapter) / ADAPTER)}
    merge.add_in(tolerance, force)
    done = FolderOperation(merge.title, merge.base, planned=planned)
    if out is None:
        gone = weight_files(goal)
        done = operate(goal, lambda new: _write(merge, new, done, goal), keep_originals, gone)
    else:
        done = write_folder(goal, lambda new: _make(merge, new, done))
    return _report(merge, done, goal)


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:  # also NaN
        raise SurgeryError(f"tolerance is {tolerance}; it must be at least 0 and finite")


def _write(
    merge: Merge, new: Path, done: FolderOperation, place: Path | None = None
) -> FolderOperation:
    """Writes the merged model and measures what was written; in place, without what is there."""
    tokenizer = merge.tokenizer if place is None or is_run(place) else None
    write_model_files(merge.model, new, tokenizer, place or merge.source)
    if merge.chat_template is not None:
        write_chat_template(merge.chat_template, new)
    again, tokenizer_again = open_model(new, "each")
    check_equal(merge.model, again, tokenizer, tokenizer_again)
    if place is not None:
        _leave_away(new, place)
    return replace(done, measured=merge.measure(again))


def _make(merge: Merge, new: Path, done: FolderOperation) -> FolderOperation:
    """Writes a new folder, whose journal begins with the merge."""
    made = replace(_write(merge, new, done), operation=f"{merge.title} into {merge.source}")
    made = replace(made, after=hashes_of(new), originals="none")
    record(new, made)
    return made


def _report(merge: Merge, done: FolderOperation, goal: Path) -> Report:
    summary = {
        "folder": str(goal),
        "layers": len(merge.rows),
        "base": merge.base,
        "dtype": done.planned["dtype"],
        **done.measured,
        "originals": done.originals,
        "sha256": done.changes(),
    }
    return Report(f"merged: {merge.title}", merge.rows, summary)


def _leave_away(new: Path, place: Path) -> None:
    """Drops the new files that `place` has already; config and template if they say the same.

    A run may lack any of them: a kill came before its checkpoint was shown at the top.
    """
    for path in [path for path in new.iterdir() if path.name != TENSORS]:
        there = place / path.name
        if path.is_dir() and there.is_dir():
            shutil.rmtree(path)
        elif there.is_file() and _says_the_same(there, path):
            path.unlink()


def _says_the_same(there: Path, new: Path) -> bool:
    if new.name == CONFIG:
        return bool(read_json(there) == read_json(new))
    return new.name != CHAT_TEMPLATE or there.read_bytes() == new.read_bytes()


def check_not_itself(model: str | Path, out: str | Path | None) -> None:
    """Raises `SurgeryError` if `out` is the model itself, which could not be brought back then."""
    if out is None or not Path(model).is_dir():
        return
    if Path(out).resolve() in (Path(model).resolve(), model_folder(model).resolve()):
        raise SurgeryError(
            f"{out} is the model itself, and writing over it has no undo",
            "leave out the new folder to merge in place, with undo",
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
                       "out=FOLDER writes a new one")  # fmt: skip


def merge_into_gguf(
    model: str | Path,
    adapter: str | Path,
    path: str | Path,
    kind: GGUFType = "F16",
    *,
    tolerance: float | None = None,
    force: bool = False,
    probe: str | None = None,
    tied: Tied | None = None,
) -> Report:
    """Merges an adapter folder into a model in float32, rounded once to a GGUF file's types.

    Args:
        model: whatever `open_model` opens; it stays as it is.
        adapter: an adapter folder, as finetune or peft writes it.
        path: made, or replaced if it is a GGUF file.
        kind: of the matrices.
        tolerance: largest mean KL divergence, adapted model to written one, in nats a token; by
            default 0.001, and 0.01 for Q8_0, which rounds all of the model.
        force: write whatever was measured, and although the adapter was made for another base.
        probe: a text to measure on; random tokens if None.
        tied: what to do where the adapter changes a weight that layers share: "refuse", "untie" or
            "both"; by default what it was made with.

    Returns:
        A row for each layer: how much of ΔW the file's rounding leaves; and the written model's
        logits against the adapted one's.

    Raises:
        SurgeryError: as `merge_adapter` and `save_gguf`. There is no new file then.
    """
    merge = _prepare(model, adapter, dtype="float32", probe=probe, force=force, tied=tied)
    if tolerance is None:
        tolerance = 1e-2 if kind == "Q8_0" else 1e-3
    merge.add_in(tolerance, force, partial(rounding_of, kind=kind))

    def write(new: Path) -> tuple[Report, dict[str, Any]]:
        again, written = write_gguf_file(merge.model, new, merge.tokenizer, kind, "")
        return written, merge.measure(again)

    written, effect = write_file(path, write)
    summary = {"file": str(path), "layers": len(merge.rows), "base": merge.base, **effect}
    stored = {f"stored_as_{row['stored as']}": row["tensors"] for row in written.rows}
    return Report(f"merged: {merge.title} into {model}", merge.rows, summary | stored)


PROBE_ROWS, PROBE_TOKENS = 4, 64
WIDER = "merge with dtype='float32', or export with format='F32'"


@dataclass
class Merge:
    """A merge, from the adapted model to the merged one and what its report says.

    Attributes:
        model: float32, with the adapter until `add_in`.
        tokenizer: of the model, if there is one, with the adapter's chat template.
        dtypes: what each of its tensors is to be written in.
        source: what was opened.
        base: the hash of its weights.
        adapter: the folder.
        probe: ids (B, T) to measure on.
        probed_on: what they are, in words.
        chat_template: the one beside the adapter, in Jinja.
        rows: for each layer what became of its weight, after `add_in`.
        adapted: the adapted model's logits, after `add_in`.
        tolerance: the largest KL divergence that `measure` lets pass, after `add_in`; None: any.
    """

    model: SimpleGPT
    tokenizer: Tokenizer | None
    dtypes: dict[str, torch.dtype]
    source: str
    base: str
    adapter: str
    probe: Tensor
    probed_on: str
    chat_template: str | None
    rows: list[dict[str, Any]] = field(default_factory=list)
    adapted: Tensor = field(default_factory=lambda: torch.empty(0))
    tolerance: float | None = None

    @property
    def title(self) -> str:
        """The operation in words."""
        return f"merge {self.adapter}"

    def planned(self) -> dict[str, Any]:
        """The sizes to expect."""
        own = [(plain_name(n), p) for n, p in self.model.named_parameters() if UPDATES not in n]
        size = sum(p.numel() * self.dtypes[name].itemsize for name, p in own)
        names = sorted({_name(self.dtypes[name]) for name, _ in own})
        return {"dtype": " and ".join(names), "model_bytes": size}

    def add_in(
        self,
        tolerance: float,
        force: bool,
        stored: Callable[[str, Tensor], tuple[str, Rounding]] | None = None,
    ) -> None:
        """Merges the adapter in float32; then each weight gets the dtype it is to be written in.

        Args:
            tolerance: largest mean KL divergence that `measure` lets pass.
            force: let pass whatever is measured.
            stored: what a file will make of a layer's weight, by name and weight, under a name; by
                default it is rounded to its dtype.

        Raises:
            SurgeryError: every weight would be the number that it is without the adapter, or one
                would be NaN or infinite.
        """
        self.tolerance = None if force else tolerance
        logits = partial(logits_of, self.model, self.probe)
        self.adapted, layers = logits(), lora_layers(self.model)
        check_finite(self.adapted, self.model, logits, f"the model with {self.adapter}")
        check_undecided(self.model, layers)

        def add(name: str, layer: LoRALayer) -> tuple[Tensor, dict[str, Any]]:
            kind = stored and stored(name, layer.weight)
            return add_update(layer, self.dtypes[f"{name}.weight"], kind)

        done = for_each_layer(layers, add)
        self.rows = [{"layer": name, **row} for name, (_, row) in done.items()]
        if not force:
            check_weights(self.rows, layers, self.adapter, WIDER)
        # The model is only here to be written: nothing is journaled.
        replace_layers(self.model, {name: weight for name, (weight, _) in done.items()})
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(self.dtypes[name])

    def measure(self, again: SimpleGPT) -> dict[str, Any]:
        """The effect on the logits of a model that was read again; it becomes float32.

        Raises:
            SurgeryError: it exceeds the tolerance, or the logits are not finite.
        """
        logits = partial(logits_of, again.float(), self.probe)
        merged = logits()
        check_finite(merged, again, logits, "the merged model")
        effect = compare_logits(self.adapted, merged)
        if self.tolerance is not None:
            check_effect(effect, self.tolerance)
        largest = {"largest_logit": float(self.adapted.abs().max())}
        return {**effect, **largest, "measured_on": self.probed_on}


def _name(dtype: torch.dtype) -> str:
    """As files write it: "float32"."""
    return str(dtype).removeprefix("torch.")


def _prepare(
    model: str | Path,
    adapter: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    probe: str | None = None,
    force: bool = False,
    tied: Tied | None = None,
) -> Merge:
    """Opens a model with an adapter on it, in float32; arguments as in `merge_adapter`."""
    network, tokenizer = open_model(model, "each")
    stored = {name: tensor.dtype for name, tensor in network.state_dict().items()}
    if dtype is None:
        _check_wider(stored, str(model))
    dtypes = stored if dtype is None else dict.fromkeys(stored, getattr(torch, dtype))
    check_finite_weights(network, str(model))
    network.float()
    base = combined(tensor_hashes(network).values())
    load_adapter(network, adapter, tied=tied, force=force)
    ids, probed_on = _probe(network, tokenizer, probe)
    template = chat_template_in(adapter_folder(adapter))
    if tokenizer is not None and template is not None:
        tokenizer = with_chat_template(tokenizer, template)
    return Merge(
        network, tokenizer, dtypes, str(model), base, str(adapter), ids, probed_on, template
    )


def _check_wider(stored: dict[str, torch.dtype], where: str) -> None:
    """Raises `SurgeryError` for tensors that float32 would round, merged or not."""
    wide = [name for name, dtype in stored.items() if dtype == torch.float64]
    if wide:
        raise SurgeryError(
            f"{where} holds {len(wide)} tensors in float64 ({', '.join(wide[:4])}), and a merge "
            "computes in float32",
            "dtype='float32' writes them so",
        )


def _probe(model: SimpleGPT, tokenizer: Tokenizer | None, text: str | None) -> tuple[Tensor, str]:
    """Ids (B, T) to measure on, and what they are in words."""
    length = min(PROBE_TOKENS, model.config.block_size)
    if text is None:
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(model.config.vocab_size, (PROBE_ROWS, length), generator=draw)
        return ids, f"{ids.numel()} random tokens"
    hint = "without a probe it is measured on random tokens"
    tokenizer = required_tokenizer(tokenizer, "the model", hint)
    encoded = list(tokenizer.encode(text[: 64 * PROBE_ROWS * PROBE_TOKENS]))
    rows = min(PROBE_ROWS, len(encoded) // length)
    if not rows:
        raise SurgeryError(f"the probe text has {len(encoded)} tokens, fewer than {length}",
                           "give a longer one, or none: then it is random tokens")  # fmt: skip
    ids = torch.tensor(encoded[: rows * length]).view(rows, length)
    return ids, f"{ids.numel()} tokens of the text given"
