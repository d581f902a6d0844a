"""Adapters of our models under the names of the family's checkpoints, and back.

Most names are simply translated. GPT-2 keeps q, k and v in one fused matrix, `c_attn`: there
updates of the parts are joined and split, as `fused_update.py` says.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, SurgeryWarning, listed
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.formats.folders.run_folder import chosen_checkpoint, is_run
from nanogpt_surgery.formats.huggingface.model_folder import OWN, family_of
from nanogpt_surgery.formats.huggingface.name_map import rows, to_ours, to_theirs
from nanogpt_surgery.formats.peft.adapter_file import map_stored, write_stored
from nanogpt_surgery.formats.peft.config import CONFIG, MERGE_IN_PEFT
from nanogpt_surgery.formats.peft.fused_update import fuse, split
from nanogpt_surgery.history.hashing import tensor_hash
from nanogpt_surgery.lora.inject import bare_layer
from nanogpt_surgery.lora.planning import UpdatePlan, plan_updates
from nanogpt_surgery.lora.settings import LoRASettings, Tied
from nanogpt_surgery.lora.several import check_new_name, report_on
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    Updates,
    attach_adapter,
    check_fit,
    extract_adapter,
    tensors_of,
)
from nanogpt_surgery.lora.targets import COMPILED, adaptable_layers, uncompiled
from nanogpt_surgery.lora.variants import as_matrix
from nanogpt_surgery.model.simple_gpt import SimpleGPT
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

MODEL_CONFIG = "config.json"
FLOAT32 = 4  # bytes
OPEN_ITS_BASE = f"open the base that its {CONFIG} names (base_model_name_or_path)"


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
    model: nn.Module, folder: Path, base: str = "", *, name: str | None = None
) -> None:
    """Writes the files of an adapter folder into a folder that is being made."""
    model = uncompiled(model)
    adapter, family = extract_adapter(model, name), _family(model)
    if family is not None:
        assert isinstance(model, SimpleGPT)
        adapter = replace(
            adapter,
            updates=_to_theirs(adapter.updates, family, model),
            whole=to_theirs(adapter.whole, family, model.config.n_layer),
        )
    adapter = replace(adapter, fingerprint=base_fingerprint(model, adapter.updates))
    # PEFT's class for language models asks this of what it wraps.
    speaks = isinstance(model, SimpleGPT) or hasattr(model, "prepare_inputs_for_generation")
    task = "CAUSAL_LM" if speaks else None
    write_stored(adapter, folder, base, fan_in_fan_out=family == "gpt2", task=task)


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
    rows = [_planned_row(plan, path, layers[path]) for path in plan.settings]
    trainable = sum(row["parameters"] for row in rows)
    updates = {
        path: _sized(plan.settings[first], layers[path])
        for first in plan.settings
        for path in [first, *plan.tied_layers.get(first, [])]
    }
    if (family := _family(model)) is not None:
        assert isinstance(model, SimpleGPT)
        updates = _to_theirs(updates, family, model)
    summary: dict[str, Any] = {
        "layers": len(rows),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()) + trainable,
        "adapter_bytes": _file_bytes(updates),
    }
    return Report("LoRA planned", rows, summary)


def _planned_row(plan: UpdatePlan, path: str, layer: Any) -> dict[str, Any]:
    settings = plan.settings[path]
    shape = layer.weight.shape
    out_features, in_features = shape[::-1] if isinstance(layer, nn.Embedding) else shape
    lengths = out_features if settings.dora else 0
    parameters = settings.rank * (in_features + out_features) + lengths
    stored = (2 if settings.pissa else 1) * (parameters - lengths) + lengths
    copies = 1 + len(plan.tied_layers.get(path, []))
    return {
        "layer": path,
        "pattern": ", ".join(p for p, found in plan.matches.items() if path in found),
        "shape": f"{shape[0]}×{shape[1]}",
        "rank": settings.rank,
        "parameters": parameters,
        "bytes": copies * FLOAT32 * stored,
        "tied to": ", ".join(plan.tied_layers.get(path, [])) or None,
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


def _file_bytes(updates: Updates) -> int:
    """The size of a safetensors file: 8 bytes, a header in JSON up to a multiple of 8, numbers."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in sorted(tensors_of(StoredAdapter(updates)).items()):
        start, end = end, end + FLOAT32 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    written = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-written // 8) * 8 + end


def check_unsavable(model: nn.Module) -> None:
    """Writes a model's adapter into a temporary folder, as a training will, and removes it.

    Raises:
        SurgeryError: it cannot be saved, so that training it would be in vain.
    """
    with TemporaryDirectory() as place:
        write_folder(Path(place) / "adapter", lambda new: write_adapter_files(model, new))


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = "default",
    tied: Tied | None = None,
    force: bool = False,
) -> Report:
    """Puts the LoRA of a PEFT adapter folder on a model, strictly; it then takes part alone.

    Args:
        model: changed in place.
        folder: as `save_adapter` or PEFT writes it.
        name: for the adapter on this model.
        tied: what to do with layers that share a weight: "refuse", "untie" or "both"; by default
            what the adapter was made with.
        force: warn, instead of refusing, when the adapter was made for another base.

    Raises:
        SurgeryError: the folder is no LoRA adapter or is damaged, does not fit the model, or was
            made for another one. The model is untouched then.
    """
    plain = uncompiled(model)
    adapter, family = map_stored(adapter_folder(folder)), _family(plain)
    theirs = adapter.updates
    if family is not None:
        assert isinstance(plain, SimpleGPT)
        adapter = _adapter_to_ours(adapter, family, plain)
    check_new_name(model, name)
    check_fit(plain, adapter, OPEN_ITS_BASE, MERGE_IN_PEFT)
    adapter = adapter.in_float32()
    known = [path for path in theirs if path in adapter.fingerprint and _there(plain, path)]
    actual = base_fingerprint(plain, known)
    _check_fingerprint({path: adapter.fingerprint[path] for path in known}, actual, force)
    return attach_adapter(
        model, adapter if plain is model else adapter.inside(COMPILED), name, tied
    )


def _check_fingerprint(stored: Mapping[str, str], actual: Mapping[str, str], force: bool) -> None:
    """Raises if an adapter was made for another base.

    Args:
        stored: the hash of each adapted weight, from the adapter; empty if unknown.
        actual: the same from the model.
        force: warn instead.

    Raises:
        SurgeryError: they differ and `force` is off.
    """
    other = [name for name, digest in stored.items() if actual.get(name) != digest]
    if not other:
        return
    what = (
        f"the adapter was made for another base: {len(other)} of {len(stored)} of the weights it "
        f"sits on differ ({', '.join(other[:4])}{', …' if other[4:] else ''})"
    )
    if not force:
        raise SurgeryError(what, "open the base it was trained on, or force=True")
    warnings.warn(what, SurgeryWarning, stacklevel=3)


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder that a path means: itself, or the checkpoint chosen in a run folder.

    Raises:
        SurgeryError: it is not there, or is a model's.
    """
    folder = chosen_checkpoint(Path(path)) if is_run(path) else Path(path)
    if not folder.exists():
        raise SurgeryError(f"there is no folder {path}", "name an adapter, as finetune makes it")
    if not (folder / CONFIG).is_file() and (folder / MODEL_CONFIG).is_file():
        kind = "a model's run" if is_run(path) else "a model"
        raise SurgeryError(f"{path} is {kind}, not an adapter", "a fine-tuning makes one")
    return folder


def base_fingerprint(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The sha256 of the weights at these names, in float32 as (out, in), so in any dtype alike.

    The names are those of the family's checkpoints; a fused matrix is hashed as one.
    """
    return {name: tensor_hash(_matrix(model, name)) for name in names}


def _matrix(model: nn.Module, name: str) -> Tensor:
    return torch.cat(_matrices(model, _ours(model, name)))


def _matrices(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    return [as_matrix(bare_layer(model, name)).cpu() for name in names]


def _ours(model: nn.Module, name: str) -> tuple[str, ...]:
    """Our layers that are one of theirs."""
    family = _family(model)
    if family is None:
        return (name,)
    assert isinstance(model, SimpleGPT)
    return next((r.ours for r in rows(family, model.config.n_layer) if r.theirs == name), ())


def _there(model: nn.Module, name: str) -> bool:
    modules = dict(model.named_modules())
    ours = _ours(model, name)
    return bool(ours) and all(path in modules for path in ours)


def _family(model: nn.Module) -> str | None:
    """The family whose names a model's adapters are written in; None for its own names."""
    family = family_of(model.config) if isinstance(model, SimpleGPT) else OWN
    return None if family == OWN else family


def _to_theirs(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    converted = {}
    for row in rows(family, model.config.n_layer):
        if any(name in updates for name in row.ours):
            parts = [updates.get(name) for name in row.ours]
            one = parts[0]
            converted[row.theirs] = (
                one
                if len(parts) == 1 and one is not None
                else fuse(parts, _matrices(model, row.ours))
            )
    return converted


def _adapter_to_ours(adapter: StoredAdapter, family: str, model: SimpleGPT) -> StoredAdapter:
    layers = model.config.n_layer
    _check_sizes(adapter, family, model)
    copies = {f"{name}.weight": tensor for name, tensor in adapter.base_copies.items()}
    copies, strange = to_ours(copies, family, layers)
    whole, stranger = to_ours(adapter.whole, family, layers)
    if strange or stranger:
        raise SurgeryError(
            f"this adapter is for another model: a {family} has no {listed(strange + stranger)}",
            MERGE_IN_PEFT,
        )
    return replace(
        adapter,
        updates=_to_ours(adapter.updates, family, model),
        whole=whole,
        base_copies={name.removesuffix(".weight"): tensor for name, tensor in copies.items()},
    )


def _check_sizes(adapter: StoredAdapter, family: str, model: SimpleGPT) -> None:
    """Raises `SurgeryError` if what is to be split or turned has not the size of the model's."""
    for row in rows(family, model.config.n_layer):
        if len(row.ours) == 1 and not row.conv1d:
            continue
        ours: list[Any] = [bare_layer(model, name) for name in row.ours]
        update = adapter.updates.get(row.theirs)
        if update is not None:
            wanted = sum(layer.weight.size(0) for layer in ours)
            _check_size(f"the outputs of {row.theirs}", update.B.size(0), wanted)
        copy = adapter.base_copies.get(row.theirs)
        if copy is not None:
            wanted = sum(layer.weight.numel() for layer in ours)
            _check_size(f"the numbers of the base's {row.theirs}", copy.numel(), wanted)
        for kind in ("weight", "bias"):
            tensor = adapter.whole.get(f"{row.theirs}.{kind}")
            wanted = sum(p.numel() for layer in ours if (p := getattr(layer, kind)) is not None)
            if tensor is not None:
                _check_size(f"the numbers of {row.theirs}.{kind}", tensor.numel(), wanted)


def _check_size(what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise SurgeryError(
            f"this adapter is for another model: {what} are {wanted:,} in the model and {found:,} "
            "in the adapter",
            OPEN_ITS_BASE,
        )


def _to_ours(updates: Updates, family: str, model: SimpleGPT) -> Updates:
    left = dict(updates)
    converted: Updates = {}
    for row in rows(family, model.config.n_layer):
        update = left.pop(row.theirs, None)
        if update is not None:
            converted |= {row.ours[0]: update} if len(row.ours) == 1 else split(update, row.ours)
    if left:
        raise SurgeryError(
            f"this adapter is for another model: a {family} of {model.config.n_layer} layers has "
            f"no {listed(sorted(left))}",
            OPEN_ITS_BASE,
        )
    return converted
