"""Writes a model's adapter as a folder in PEFT's own format, read again before it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.files.writing import write_json
from nanogpt_surgery.formats.huggingface.safetensors_file import file_size, write_tensors
from nanogpt_surgery.formats.huggingface.tokenizer_files import CHAT_TEMPLATE
from nanogpt_surgery.formats.peft.config import CONFIG, EXTRAS, config_for, extras_of
from nanogpt_surgery.formats.peft.layout import adapter_to_theirs, base_fingerprint, rows_of
from nanogpt_surgery.formats.peft.reading import (
    BIAS,
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    PREFIX,
    TENSORS,
    read_adapter,
)
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import check_new_name, report_on
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    extract_adapter,
    same,
)
from nanogpt_surgery.lora.targets import UpdatePlan, adaptable_layers, plan_updates, uncompiled
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

FLOAT32 = 4  # bytes


@check_arguments
def save_adapter(
    model: nn.Module, folder: str | Path, base: str = "", *, name: str | None = None
) -> Report:
    """Writes an adapter of a model as a PEFT adapter folder, whole or not at all.

    For a `SimpleGPT` on a family's axes the names are those of transformers' model, on which `peft`
    loads the folder; any other module keeps its own names. What is written is read again and
    compared before it counts.

    Args:
        model: carries a LoRA.
        folder: made, or replaced if it is one of ours.
        base: name or path of the base model, for information.
        name: of the adapter; by default the only one, or the one that takes part.

    Raises:
        SurgeryError: there is no LoRA, it is not clear which, or the folder holds something else.
    """
    write_folder(folder, lambda new: write_adapter_files(model, new, base, name=name))
    return report_on(model, f"LoRA saved to {folder}")


def write_adapter_files(
    model: nn.Module,
    folder: Path,
    base: str = "",
    *,
    name: str | None = None,
    chat_template: str | None = None,
) -> None:
    """Writes the files of an adapter folder into a folder that is being made.

    `chat_template` is the one that it was trained with, in Jinja; transformers reads it there.

    Raises:
        SurgeryError: a tensor is not finite, or what was read again differs from what was to be
            written.
    """
    model = uncompiled(model)
    adapter = adapter_to_theirs(extract_adapter(model, name), model)
    adapter = replace(adapter, fingerprint=base_fingerprint(model, adapter.updates))
    _check_finite(adapter)
    _check_biases(adapter)
    # PEFT's class for language models asks this of what it wraps.
    generates = isinstance(model, SimpleGPT) or hasattr(model, "prepare_inputs_for_generation")
    task = "CAUSAL_LM" if generates else None
    conv1d = any(row.conv1d for row in rows_of(model))
    write_json(folder / CONFIG, config_for(adapter, base, fan_in_fan_out=conv1d, task=task))
    write_json(folder / EXTRAS, extras_of(adapter))
    write_tensors(tensors_of(adapter), folder / TENSORS)
    if chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
    if wrong := _differences(adapter, read_adapter(folder)):
        raise SurgeryError(
            f"what was written to {folder} reads differently: {', '.join(wrong)}",
            "this is a fault of the program, not yours: please report it with what you typed",
        )


def _check_finite(adapter: StoredAdapter) -> None:
    """Raises `SurgeryError`, with their names, if layers have learned what is no finite number.

    A module replaced whole may hold infinities, as a mask does.
    """
    names = [name for name, u in adapter.updates.items() if not u.finite()]
    names += [name for name, tensor in adapter.whole.items() if bool(tensor.isnan().any())]
    count = len(adapter.updates) + len(adapter.whole)
    if names:
        raise SurgeryError(
            f"the adapter is not finite in {len(names)} of {count} layers: {', '.join(names[:8])}"
            f"{', …' if names[8:] else ''}",
            "go back to a checkpoint before it broke, and train on with a lower learning rate",
        )


def _check_biases(adapter: StoredAdapter) -> None:
    """Raises `SurgeryError` for biases that PEFT has no place for."""
    updates = adapter.updates.items()
    if any(update.bias is not None for _, update in updates):
        others = [name for name, u in updates if u.embedding or u.magnitude is not None]
        if others:
            raise SurgeryError(
                f"an adapter that changes biases (lora_bias) has no place for {others[0]}, an "
                "embedding's or a DoRA's update",
                "merge_lora(model), or make them two adapters",
            )


def _differences(one: StoredAdapter, other: StoredAdapter) -> list[str]:
    """The names whose contents differ between two adapters."""
    updates = other.updates
    found = [n for n, u in one.updates.items() if n not in updates or not same(u, updates[n])]
    whole = other.whole
    found += [n for n, t in one.whole.items() if n not in whole or not torch.equal(t, whole[n])]
    return [*found, *(updates.keys() - one.updates.keys()), *(whole.keys() - one.whole.keys())]


@check_arguments
def plan_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    **changes: Any,
) -> Report:
    """Says what `inject_lora` with the same arguments would do; nothing is touched.

    Args:
        model: any module.
        targets: as in `inject_lora`.
        settings: as there.
        **changes: as there.

    Returns:
        A row for each layer and the patterns that mean it, with shapes and parameters; trainable
        parameters, and the bytes of the adapter_model.safetensors that `save_adapter` writes.

    Raises:
        SurgeryError: as `inject_lora`.
    """
    settings = chosen(LoRASettings, settings, changes)
    check_new_name(model, settings.name)
    plan = plan_updates(model, targets, settings)
    layers: dict[str, Any] = adaptable_layers(model)
    updates = {
        path: _sized(plan.settings[first], layers[path])
        for first in plan.settings
        for path in [first, *plan.tied_layers.get(first, [])]
    }
    rows = [_planned_row(plan, path, layers[path], updates[path]) for path in plan.settings]
    trainable = sum(row["parameters"] for row in rows)
    updates = adapter_to_theirs(StoredAdapter(updates), model).updates
    summary: dict[str, Any] = {
        "layers": len(rows),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()) + trainable,
        "adapter_bytes": file_size(tensors_of(StoredAdapter(updates))),
    }
    return Report("LoRA planned", rows, summary)


def _planned_row(plan: UpdatePlan, path: str, layer: Any, update: LowRankUpdate) -> dict[str, Any]:
    rank, shape = plan.settings[path].rank, layer.weight.shape
    lengths = 0 if update.magnitude is None else update.magnitude.numel()
    tied = plan.tied_layers.get(path, [])
    return {
        "layer": path,
        "pattern": ", ".join(p for p, found in plan.matches.items() if path in found),
        "shape": f"{shape[0]}×{shape[1]}",
        "rank": rank,
        "parameters": rank * sum(shape) + lengths,
        "bytes": (1 + len(tied)) * FLOAT32 * (update.rank * sum(shape) + lengths),
        "tied to": ", ".join(tied) or None,
    }


def _sized(settings: LoRASettings, layer: Any) -> LowRankUpdate:
    """An update of the size that will be saved, without memory of its own."""
    nothing, embedding = torch.zeros(()), isinstance(layer, nn.Embedding)
    out_features, in_features = layer.weight.shape[::-1] if embedding else layer.weight.shape
    rank = settings.rank * (2 if settings.pissa else 1)  # PiSSA keeps its initial factors
    return LowRankUpdate(
        nothing.expand(rank, in_features),
        nothing.expand(out_features, rank),
        settings.alpha,
        magnitude=nothing.expand(out_features) if settings.dora else None,
        embedding=embedding,
    )


def check_unsavable(model: nn.Module) -> None:
    """Writes a model's adapter into a temporary folder, as a training will, and removes it.

    Raises:
        SurgeryError: it cannot be saved, so that training it would be in vain.
    """
    with TemporaryDirectory() as place:
        write_folder(Path(place) / "adapter", lambda new: write_adapter_files(model, new))


def tensors_of(adapter: StoredAdapter) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that they have in PEFT's file."""
    tensors = {}
    biased = any(update.bias is not None for update in adapter.updates.values())
    for name, update in adapter.updates.items():
        keys = (EMBEDDING_A, EMBEDDING_B) if update.embedding else (FACTOR_A, FACTOR_B)
        tensors[f"{PREFIX}{name}{keys[0]}"] = update.A.contiguous()
        tensors[f"{PREFIX}{name}{keys[1]}"] = update.B.contiguous()
        if update.magnitude is not None:
            tensors[f"{PREFIX}{name}{MAGNITUDE}"] = update.magnitude.contiguous()
        if biased:  # PEFT has one for each layer
            zeros = torch.zeros(update.B.size(0))
            tensors[f"{PREFIX}{name}{BIAS}"] = zeros if update.bias is None else update.bias
    whole = {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.whole.items()}
    return tensors | whole
