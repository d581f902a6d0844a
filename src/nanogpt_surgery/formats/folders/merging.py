"""A model and an adapter on disk become a merged model: in place, elsewhere, or as a GGUF file.

W + ΔW is added in float32 and rounded once, to the dtype that W is stored in; weights without a ΔW
keep their bits. A chat template beside the adapter becomes the model's. The merged model is
written, read again, compared bit by bit, and measured against the adapted one; only then does it
take its place.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import file_hash, write_file
from nanogpt_surgery.formats.comparison import check_tokenizer
from nanogpt_surgery.formats.folders.operating import (
    PASSES,
    fingerprint,
    goal_of,
    planned_sizes,
    probe_ids,
    put_in_place,
)
from nanogpt_surgery.formats.folders.run_folder import is_run
from nanogpt_surgery.formats.gguf.writing import GGUFType, read_again, rounding_of, write_gguf_file
from nanogpt_surgery.formats.huggingface.safetensors_file import weight_files
from nanogpt_surgery.formats.huggingface.tokenizer_files import (
    chat_template_in,
    with_chat_template,
    write_chat_template,
)
from nanogpt_surgery.formats.model_file import (
    open_model,
    write_model_files,
)
from nanogpt_surgery.formats.peft.layout import adapter_to_ours
from nanogpt_surgery.formats.peft.reading import TENSORS as ADAPTER
from nanogpt_surgery.formats.peft.reading import adapter_folder, attach_read, read_adapter
from nanogpt_surgery.history.folder_history import FolderOperation, read_journal
from nanogpt_surgery.history.model_history import UPDATES, plain_name, tensor_hash, tensor_hashes
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.merging import (
    Rounding,
    add_update,
    check_effect,
    check_undecided,
    check_weights,
    compare_logits,
    in_turn,
    logits_of,
    merge_survival,
    merged_bias,
    replace_layers,
    share_equal,
    with_delta,
)
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.model.finite import check_finite
from nanogpt_surgery.model.precision import computing_in_float32
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.surgery.operating import COMPARING, costs, hash_seconds, pass_seconds


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
    plan: bool = False,
) -> Report:
    """Merges an adapter folder into a model, in float32, rounded once; read again and measured.

    Without `out` the model's own folder changes in one step, and `undo_folder` brings it back.

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
        plan: write nothing, and say how much of ΔW survives each precision, and the sizes.

    Returns:
        A row for each layer; the largest and the mean error of the logits, KL and the share of
        unchanged top tokens; and what was measured on.

    Raises:
        SurgeryError: a part does not open or fit, `out` is the model, no weight would change, the
            merge does not compute what the adapted model does, or the folder was changed meanwhile.
    """
    _check_tolerance(tolerance)
    goal, in_place = goal_of(model, out)
    opened_at = read_journal(goal).lines if in_place else None
    merge = _prepare(model, adapter, dtype=dtype, probe=probe, force=force, tied=tied)
    if plan:
        return _planned(merge, planned_sizes(goal, in_place, keep_originals))
    planned = merge.planned() | {"adapter_sha256": file_hash(adapter_folder(adapter) / ADAPTER)}
    done = FolderOperation(merge.title, merge.base, planned=planned)
    merge.add_in(tolerance, force)
    write = partial(_write, merge, done, goal if in_place else None)
    gone = weight_files(goal) if in_place else ()
    done = put_in_place(goal, in_place, write, f" into {model}", gone, keep_originals, opened_at)
    return _report(merge, done, goal)


def _planned(merge: Merge, sizes: dict[str, Any]) -> Report:
    """Returns how much of ΔW survives, and what a merge takes."""
    start, model = time.perf_counter(), merge.model
    survival, planned = merge_survival(model), merge.planned()
    seconds = time.perf_counter() - start
    seconds += pass_seconds(model, merge.probe[:1], 2 * merge.probe.numel())
    seconds += (2 + PASSES) * hash_seconds(model)
    logits = COMPARING * merge.probe.numel() * model.config.vocab_size
    summary = survival.summary | planned | costs(model, logits, seconds) | sizes
    return Report("merge planned", survival.rows, summary)


def _check_tolerance(tolerance: float) -> None:
    if not 0 <= tolerance < math.inf:  # also NaN
        raise SurgeryError(f"tolerance is {tolerance}; it must be at least 0 and finite")


def _write(merge: Merge, done: FolderOperation, place: Path | None, new: Path) -> FolderOperation:
    """Writes the merged model and measures what was written; in place, without a tokenizer."""
    tokenizer = merge.tokenizer if place is None or is_run(place) else None
    write_model_files(
        merge.model, new, tokenizer, place or merge.source, merge.dtypes, merge.hashed_tensor
    )
    merge.check_rows()
    if merge.chat_template is not None:
        write_chat_template(merge.chat_template, new)
    again, tokenizer_again = open_model(new, "each")
    merge.check_written(again)
    check_tokenizer(tokenizer, tokenizer_again)
    return replace(done, measured=merge.measure(again))


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
    merge.stored = partial(rounding_of, kind=kind)
    merge.add_in(tolerance, force)

    def write(new: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        written = write_gguf_file(merge.model, new, merge.tokenizer, kind, merge.tensor)
        merge.check_rows()
        again, kinds = read_again(new, merge.tokenizer, *written)
        return kinds, merge.measure(again)

    kinds, effect = write_file(path, write)
    summary = {"file": str(path), "layers": len(merge.rows), "base": merge.base, **effect}
    stored = {f"stored_as_{row['stored as']}": row["tensors"] for row in kinds}
    return Report(f"merged: {merge.title} into {model}", merge.rows, summary | stored)


WIDER = "merge with dtype='float32', or export with format='F32'"


@dataclass
class Merge:
    """A merge, from the adapted model to the merged one and what its report says.

    Of neither is more in memory than a tensor or a few: what was opened is mapped, a module's
    weights are widened while it computes, and W + ΔW is made when it is written.

    Attributes:
        model: with the adapter until `add_in`; then what is to be written, but the weights that the
            adapter changes have shapes alone.
        tokenizer: of the model, if there is one, with the adapter's chat template.
        dtypes: what each of its tensors is to be written in.
        source: what was opened.
        base: the hash of its weights.
        adapter: the folder.
        probe: ids (B, T) to measure on.
        probed_on: what they are, in words.
        chat_template: the one beside the adapter, in Jinja.
        adapted: the adapted model's logits, after `add_in`.
        layers: those that the adapter changes, after `add_in`.
        stored: what a file will make of a layer's weight, by name and weight, under a name; None:
            it is rounded to its dtype.
        tolerance: the largest KL divergence that is let pass, after `add_in`; None: whatever is
            measured.
        hashes: the sha256 of each tensor that `hashed_tensor` made.
        made: for each layer that was made what became of its weight.
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
    adapted: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: dict[str, LoRALayer] = field(default_factory=dict)
    stored: Callable[[str, Tensor], tuple[str, Rounding]] | None = None
    tolerance: float | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

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

    @property
    def rows(self) -> list[dict[str, Any]]:
        """For each layer with a ΔW what became of its weight."""
        return [{"layer": name, **self.made[name]} for name in with_delta(self.layers)]

    def add_in(self, tolerance: float, force: bool) -> None:
        """Measures the adapted model, and puts plain layers in the place of the adapted ones.

        Args:
            tolerance: largest mean KL divergence that is let pass.
            force: let pass whatever is measured.

        Raises:
            SurgeryError: the adapted model's logits are not finite, or a tie would be broken.
        """
        self.tolerance = None if force else tolerance
        self.adapted = self._logits(self.model, f"the model with {self.adapter}")
        self.layers = lora_layers(self.model)
        check_undecided(self.model, self.layers)
        changed = with_delta(self.layers)
        weights = Counter(id(layer.original_layer.weight) for layer in changed.values())
        tied = [n for n, layer in changed.items() if weights[id(layer.original_layer.weight)] > 1]
        twins = dict(zip(tied, in_turn(self._add_update, tied), strict=True))
        share_equal(self.layers, twins)
        shapes: dict[int, Tensor] = {}
        for name, layer in changed.items():
            shape = torch.empty(layer.weight.shape, dtype=self._dtype(name), device="meta")
            shapes.setdefault(id(twins.get(name, layer)), shape)
        replace_layers(
            self.model, {n: shapes[id(twins.get(n, layer))] for n, layer in changed.items()}
        )  # the model is only here to be written: nothing is journaled

    def _dtype(self, layer: str) -> torch.dtype:
        return self.dtypes[f"{layer}.weight"]

    def _add_update(self, name: str) -> Tensor:
        layer = self.layers[name]
        stored = self.stored and self.stored(name, layer.weight)
        weight, self.made[name] = add_update(layer, self._dtype(name), stored)
        return weight

    def tensor(self, name: str) -> Tensor:
        """A tensor of the merged model in the dtype that it is to be written in."""
        layer = name.removesuffix(".weight")
        if layer in with_delta(self.layers) and layer != name:
            tensor = self._add_update(layer)
        else:
            tensor = self._unchanged(name).detach().to(self.dtypes[name])
        return tensor

    def hashed_tensor(self, name: str) -> Tensor:
        """As `tensor`; its sha256 is kept for `check_written`."""
        tensor = self.tensor(name)
        self.hashes[name] = tensor_hash(tensor)
        return tensor

    def _unchanged(self, name: str) -> Tensor:
        """A tensor without a ΔW; a bias, with what the adapter adds to it."""
        layer = with_delta(self.layers).get(name.removesuffix(".bias"))
        bias = layer and name.endswith(".bias") and merged_bias(layer, self.dtypes[name])
        return bias if isinstance(bias, Tensor) else self.model.get_parameter(name)

    def check_rows(self) -> None:
        """Checks what became of the weights, unless forced; see `check_weights`."""
        if self.tolerance is not None:
            check_weights(self.rows, self.layers, self.adapter, WIDER)

    def check_written(self, again: SimpleGPT) -> None:
        """Raises `SurgeryError` unless a model that was read again has the bits that were made."""
        read = tensor_hashes(again)
        wrong = [name for name, digest in self.hashes.items() if read.get(name) != digest]
        if wrong:
            raise SurgeryError(f"what was written does not read back: {', '.join(wrong[:8])}")

    def _logits(self, model: SimpleGPT, whose: str) -> Tensor:
        with computing_in_float32(model):
            logits = logits_of(model, self.probe)
            check_finite(logits, model, lambda: model(self.probe), whose)
        return logits

    def measure(self, again: SimpleGPT) -> dict[str, Any]:
        """The effect on the logits of a model that was read again.

        Raises:
            SurgeryError: it exceeds the tolerance, or the logits are not finite.
        """
        effect = compare_logits(self.adapted, self._logits(again, "the merged model"))
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
    hashes: dict[Tensor, str] = {}
    base, read = fingerprint(network, str(model), hashes), read_adapter(adapter_folder(adapter))
    for name in adapter_to_ours(read, network).whole:
        network.get_submodule(name.rpartition(".")[0]).float()  # its copy will be float32
    attach_read(network, read, tied=tied, force=force, hashes=hashes)
    ids, probed_on = probe_ids(network, tokenizer, probe)
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
