"""The adapter folder, in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT has no place for lies beside them in `surgery.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError, foreign_file, listed, quoted
from nanogpt_surgery.files.json_files import write_json
from nanogpt_surgery.files.manifest import check_undamaged
from nanogpt_surgery.files.writing import write_tensors
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.formats.huggingface.safetensors_file import read_header
from nanogpt_surgery.formats.peft.config import (
    CONFIG,
    MERGE_IN_PEFT,
    alphas_of,
    config_for,
    read_config,
)
from nanogpt_surgery.formats.peft.extras import EXTRAS, extras_of, fused_parts_of, read_extras
from nanogpt_surgery.history.hashing import tensor_hash
from nanogpt_surgery.lora.stored_adapter import (
    EMBEDDING_A,
    EMBEDDING_B,
    FACTOR_A,
    FACTOR_B,
    MAGNITUDE,
    PREFIX,
    LowRankUpdate,
    StoredAdapter,
    Updates,
    same,
    tensors_of,
)

TENSORS = "adapter_model.safetensors"
_BASE = ".base_layer.weight"
_LONGEST_NAME = 1_000  # characters
_MOST_COPIED = 64 << 20  # bytes that lie across their numbers' bounds, so that they are copied


def write_stored(
    adapter: StoredAdapter,
    folder: Path,
    base: str = "",
    fan_in_fan_out: bool = False,
    task: str | None = "CAUSAL_LM",
) -> None:
    """Writes the files of a PEFT adapter folder, reads them again and compares every bit.

    Args:
        adapter: with the names of the model that PEFT will load it on.
        folder: one that is being made.
        base: name or path of the base model, for information.
        fan_in_fan_out: the base stores its matrices transposed (GPT-2's Conv1D).
        task: PEFT's task_type, by which it chooses what it wraps the base in; None for any module.

    Raises:
        SurgeryError: a tensor is not finite, or what was read again differs from what was to be
            written.
    """
    _check_not_finite(adapter)
    modules = {name.rpartition(".")[0] for name in adapter.whole}
    write_json(folder / CONFIG, config_for(adapter.updates, modules, base, fan_in_fan_out, task))
    write_json(folder / EXTRAS, extras_of(adapter))
    write_tensors(tensors_of(adapter), folder / TENSORS)
    difference = differences(adapter, read_stored(folder))
    if difference:
        raise SurgeryError(
            f"what was written to {folder} reads differently: {', '.join(difference)}",
            "this is a fault of the program, not yours: please report it with what you typed",
        )


def _check_not_finite(adapter: StoredAdapter) -> None:
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


def differences(one: StoredAdapter, other: StoredAdapter) -> list[str]:
    """The names whose contents differ between two adapters."""
    names = one.updates.keys() | other.updates.keys() | one.whole.keys() | other.whole.keys()
    return [name for name in sorted(names) if not _alike(one, other, name)]


def _alike(one: StoredAdapter, other: StoredAdapter, name: str) -> bool:
    if name in one.whole and name in other.whole:
        return torch.equal(one.whole[name], other.whole[name])
    if name not in one.updates or name not in other.updates:
        return False
    return same(one.updates[name], other.updates[name])


def read_stored(folder: Path) -> StoredAdapter:
    """The contents of a PEFT adapter folder, in float32; see `map_stored`."""
    return map_stored(folder).in_float32()


def map_stored(folder: Path) -> StoredAdapter:
    """The contents of a PEFT adapter folder, by the names in the file, mapped and not yet read.

    Raises:
        SurgeryError: the folder is not a LoRA adapter's or is damaged, says something that would
            change the result and that is not understood, or holds a tensor without its partner.
    """
    check_undamaged(folder)
    config, extras = read_config(folder), read_extras(folder / EXTRAS)
    alpha_of = alphas_of(config, folder / CONFIG)
    path = folder / TENSORS
    tensors = _map_tensors(path)
    try:
        with foreign_file(path):
            updates = _take_updates(tensors, config, extras, alpha_of)
            copies = _take_copies(tensors, _BASE)
            whole = _take_whole(tensors, config)
            twins = _take_twins(tensors, whole) if config.get("ensure_weight_tying") else {}
            copies |= _take_copies(tensors, ".weight")
            if tensors or not (updates or whole):
                extra = listed(sorted(tensors)) or "no LoRA at all"
                raise SurgeryError(f"it holds what is not understood: {extra}", MERGE_IN_PEFT)
    except SurgeryError as error:
        raise SurgeryError(f"{path}: {error.what}", error.hint) from None
    tied = extras.get("tied")
    if tied is None and config.get("ensure_weight_tying"):
        tied = "untie" if twins else "both"  # copies of whole modules are kept apart, though equal
    return StoredAdapter(updates, whole | twins, copies, extras.get("fingerprint") or {}, tied)


def _take_updates(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    extras: dict[str, Any],
    alpha_of: Callable[[str], float],
) -> Updates:
    """Takes every layer's A, B and lengths out of the tensors of a file."""
    found: Updates = {}
    for keys in ((FACTOR_A, FACTOR_B), (EMBEDDING_A, EMBEDDING_B)):
        for key in [key for key in tensors if key.endswith(keys[0])]:
            name = key.removesuffix(keys[0])
            found[name] = _take(tensors, name, keys, config, extras, alpha_of(name))
    return found


def _take(
    tensors: dict[str, Tensor],
    name: str,
    keys: tuple[str, str],
    config: dict[str, Any],
    extras: dict[str, Any],
    alpha: float,
) -> LowRankUpdate:
    """Takes one layer's tensors out of those of a file."""
    a, b = tensors.pop(name + keys[0]), tensors.pop(name + keys[1], None)
    if a.dim() > 2:
        raise SurgeryError(
            f"lora_A of {name} is {tuple(a.shape)}: a convolution's LoRA, and here only Linears "
            "and Embeddings are adapted",
            MERGE_IN_PEFT,
        )
    if b is None or a.dim() != 2 or b.dim() != 2 or a.size(0) != b.size(1) or not a.numel():
        raise SurgeryError(
            f"lora_A of {name} has no lora_B of its rank", "restore the file from a copy"
        )
    dora = bool(config.get("use_dora"))
    magnitude = tensors.pop(name + MAGNITUDE, None) if dora else None
    if dora and (magnitude is None or magnitude.shape != b.shape[:1]):
        raise SurgeryError(
            f"{name} has no lora_magnitude_vector of length {b.size(0)}",
            "restore the file from a copy",
        )
    initial, fused_parts = fused_parts_of(extras, name, a.size(0))
    return LowRankUpdate(
        a,
        b,
        alpha,
        rslora=bool(config.get("use_rslora")),
        magnitude=magnitude,
        embedding=keys[0] == EMBEDDING_A,
        dropout=float(config.get("lora_dropout") or 0.0),
        initial=initial,
        fused_parts=fused_parts,
    )


def _take_copies(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Takes the base's own tensors, which PEFT writes beside an embedding's update, or unasked."""
    keys = [key for key in tensors if key.endswith(ending) and ".lora_" not in key]
    return {key.removesuffix(ending): tensors.pop(key) for key in keys}


def _take_whole(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Takes the tensors of the modules_to_save, each of which may hold others."""
    names = config.get("modules_to_save") or []
    endings = tuple(names)
    whole = {
        key: tensors.pop(key)
        for key in list(tensors)
        if any(path.endswith(endings) for path in _above(key))
    }
    twice = [f"{key} by {n}" for key in whole for n in names if len(_holders(key, n)) > 1]
    if twice:
        raise SurgeryError(
            f"PEFT has wrapped a module and one within it, {twice[0]}, and written only one of "
            "the two copies",
            "train it again with a name in modules_to_save that ends one of them alone",
        )
    absent = [name for name in names if not any(_holders(key, name) for key in whole)]
    if absent:
        raise SurgeryError(
            f"it lacks the modules_to_save {listed(absent)}", "restore the file from a copy"
        )
    return whole


def _holders(key: str, name: str) -> list[str]:
    """The modules of this name that a tensor lies in; PEFT matches the end of their paths."""
    return [path for path in _above(key) if path.endswith(name)]


def _above(key: str) -> list[str]:
    """The paths of the modules that a tensor lies in."""
    return [key[:place] for place, character in enumerate(key) if character == "."]


def _take_twins(tensors: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what a tied module's tensors are written as once more, under its partner's name."""
    shapes = {tensor.shape for tensor in whole.values()}
    alike = {key: tensor for key, tensor in tensors.items() if tensor.shape in shapes}
    hashes = {tensor_hash(tensor) for tensor in whole.values()} if alike else set()
    return {key: tensors.pop(key) for key, t in alike.items() if tensor_hash(t) in hashes}


def _map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped, by their names without PEFT's prefix."""
    if not path.is_file():
        raise SurgeryError(
            f"{path} is missing",
            "an adapter is a folder as PEFT writes it, by default with safe_serialization=True",
        )
    stored = read_header(path)
    for name, tensor in stored.items():
        if tensor.dtype is None or not tensor.dtype.is_floating_point:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise SurgeryError(
                f"{path}: {listed([name])} is stored as {kind}; an adapter's numbers are floats",
                "restore it from a copy",
            )
        if len(name) > _LONGEST_NAME:
            raise SurgeryError(
                f"{path}: the name {quoted(name)} has {len(name):,} characters; the limit is "
                f"{_LONGEST_NAME:,}"
            )
    copied = sum(t.n_bytes() for t in stored.values() if t.mapped() is None)
    if copied > _MOST_COPIED:
        raise SurgeryError(
            f"{path}: {copied:,} bytes do not lie at multiples of their numbers' size; the limit "
            f"is {_MOST_COPIED:,}",
            "save it again with safetensors 0.3 or newer, which pads the header",
        )
    named = with_current_modules(stored).items()
    tensors = {name.removeprefix(PREFIX): tensor.read() for name, tensor in named}
    if len(tensors) < len(stored):
        raise SurgeryError(f"{path}: a tensor is there with the prefix {PREFIX} and without")
    return tensors
