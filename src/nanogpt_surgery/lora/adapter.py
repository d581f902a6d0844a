"""The adapter folder, in PEFT's own format: `adapter_config.json` and `adapter_model.safetensors`.

What PEFT has no place for lies beside them in `surgery.json`, where its readers do not look: the
fingerprint of the base, what was chosen for tied weights, and what fused matrices and PiSSA's
updates were put together from. A folder without it is an adapter all the same. (As metadata in the
safetensors file it would not do: its order, and with it the hash, changes from writing to writing.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files import read_json, refuse_damage, write_json, write_tensors
from nanogpt_surgery.lora.peft_config import CONFIG, config_for, refuse_unknown
from nanogpt_surgery.lora.stored import LowRankUpdate, StoredAdapter, Updates, same
from nanogpt_surgery.lora.targets import by_pattern

TENSORS, EXTRAS = "adapter_model.safetensors", "surgery.json"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_EMBEDDING_A, _EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
_MAGNITUDE, _BASE = ".lora_magnitude_vector", ".base_layer.weight"


def write_stored(
    adapter: StoredAdapter, folder: Path, base: str = "", fan_in_fan_out: bool = False
) -> None:
    """Write the files of a PEFT adapter folder, read them again and compare every bit.

    Args:
        adapter: with the names of the model that PEFT will load it on.
        folder: one that is being made.
        base: name or path of the base model, for information.
        fan_in_fan_out: the base stores its matrices transposed (GPT-2's Conv1D).

    Raises:
        SurgeryError: what was read again differs from what was to be written.
    """
    modules = {name.rpartition(".")[0] for name in adapter.whole}
    write_json(folder / CONFIG, config_for(adapter.updates, modules, base, fan_in_fan_out))
    write_json(folder / EXTRAS, _extras(adapter))
    write_tensors(_tensors(adapter), folder / TENSORS)
    difference = differences(adapter, read_stored(folder))
    if difference:
        raise SurgeryError(
            f"what was written to {folder} reads differently: {', '.join(difference)}",
            "this is a fault of the program, not yours: please report it with what you typed",
        )


def _tensors(adapter: StoredAdapter) -> dict[str, Tensor]:
    tensors = {}
    for name, update in adapter.updates.items():
        keys = (_EMBEDDING_A, _EMBEDDING_B) if update.embedding else (_A, _B)
        tensors[f"{_PREFIX}{name}{keys[0]}"] = update.A.contiguous()
        tensors[f"{_PREFIX}{name}{keys[1]}"] = update.B.contiguous()
        if update.magnitude is not None:
            tensors[f"{_PREFIX}{name}{_MAGNITUDE}"] = update.magnitude.contiguous()
    whole = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in adapter.whole.items()}
    return tensors | whole


def _extras(adapter: StoredAdapter) -> dict[str, Any]:
    updates = adapter.updates
    return {
        "fingerprint": adapter.fingerprint,
        "tied": adapter.tied,
        "births": {name: u.birth for name, u in updates.items() if u.birth},
        "pieces": {name: u.pieces for name, u in updates.items() if u.pieces},
    }


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


def read_adapter(folder: str | Path) -> Updates:
    """The updates in a PEFT adapter folder, by the names in the file; see `read_stored`."""
    return read_stored(Path(folder)).updates


def read_stored(folder: Path) -> StoredAdapter:
    """What a PEFT adapter folder holds, by the names in the file.

    Raises:
        SurgeryError: the folder is not a LoRA adapter's or is damaged, says something that would
            change the result and that is not understood, or holds a tensor without its partner.
    """
    refuse_damage(folder)
    config = read_json(folder / CONFIG)
    refuse_unknown(config, folder)
    extras = _read_extras(folder / EXTRAS)
    tensors = _read_tensors(folder / TENSORS)
    tensors = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
    updates = {}
    for keys in ((_A, _B), (_EMBEDDING_A, _EMBEDDING_B)):
        for key in [key for key in tensors if key.endswith(keys[0])]:
            name = key.removesuffix(keys[0])
            try:
                updates[name] = _take(tensors, name, keys, config, extras)
            except SurgeryError as error:
                raise SurgeryError(f"{folder / TENSORS}: {error.what}") from None
    copies = {
        key.removesuffix(_BASE): tensors.pop(key) for key in list(tensors) if key.endswith(_BASE)
    }
    whole = {key: tensors.pop(key) for key in list(tensors) if _is_whole(key, config)}
    absent = [
        name
        for name in config.get("modules_to_save") or []
        if not any(_is_whole(key, {"modules_to_save": [name]}) for key in whole)
    ]
    if absent:
        raise SurgeryError(f"{folder / TENSORS} lacks the modules_to_save {', '.join(absent)}")
    if tensors or not (updates or whole):
        extra = ", ".join(sorted(tensors)) or "no LoRA at all"
        raise SurgeryError(f"{folder / TENSORS} holds what is not understood: {extra}")
    return StoredAdapter(
        updates, whole, copies, extras.get("fingerprint", {}), extras.get("tied")
    )  # fmt: skip


def _take(
    tensors: dict[str, Tensor],
    name: str,
    keys: tuple[str, str],
    config: dict[str, Any],
    extras: dict[str, Any],
) -> LowRankUpdate:
    """Take one layer's tensors out of those of a file."""
    a, b = tensors.pop(name + keys[0]), tensors.pop(name + keys[1], None)
    if b is None or a.dim() != 2 or b.dim() != 2 or a.size(0) != b.size(1):
        raise SurgeryError(f"lora_A of {name} has no lora_B of its rank")
    dora = bool(config.get("use_dora"))
    magnitude = tensors.pop(name + _MAGNITUDE, None) if dora else None
    if dora and (magnitude is None or magnitude.shape != b.shape[:1]):
        raise SurgeryError(f"{name} has no lora_magnitude_vector of length {b.size(0)}")
    birth = extras.get("births", {}).get(name)
    pieces = extras.get("pieces", {}).get(name)
    _check_parts(name, a.size(0), birth, pieces)
    return LowRankUpdate(
        a,
        b,
        by_pattern(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)),
        rslora=bool(config.get("use_rslora")),
        magnitude=magnitude,
        embedding=keys[0] == _EMBEDDING_A,
        dropout=float(config.get("lora_dropout") or 0.0),
        birth=_birth(birth),
        pieces=tuple(p and (p[0], p[1], _birth(p[2])) for p in pieces) if pieces else None,
    )


def _check_parts(name: str, rank: int, birth: Any, pieces: Any) -> None:
    """Raise `SurgeryError` if what an update is said to be made of does not add up to its rank."""
    found = [piece for piece in pieces or [] if piece is not None]
    births = [(rank, birth), *((piece[0], piece[2]) for piece in found)]
    adds_up = not pieces or sum(piece[0] for piece in found) == rank
    if not adds_up or any(b is not None and not 0 < b[0] < whole for whole, b in births):
        raise SurgeryError(f"{EXTRAS} and the rank {rank} of {name} do not agree", "delete it")


def _birth(value: list[Any] | None) -> tuple[int, float] | None:
    return None if value is None else (int(value[0]), float(value[1]))


def _read_extras(path: Path) -> dict[str, Any]:
    """Our own file, or nothing where there is none."""
    extras = read_json(path) if path.is_file() else {}
    kinds = {"fingerprint": dict, "births": dict, "pieces": dict, "tied": str | None}
    wrong = [
        key
        for key, kind in kinds.items()
        if not isinstance(extras, dict) or (key in extras and not isinstance(extras[key], kind))
    ]
    if wrong:
        raise SurgeryError(f"{path} is damaged: {', '.join(wrong)} cannot be read", "delete it")
    return extras


def _is_whole(key: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to one of the modules_to_save; PEFT matches the end of the name."""
    module = key.rpartition(".")[0]
    return any(module.endswith(name) for name in config.get("modules_to_save") or [])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in float32."""
    if not path.is_file():
        raise SurgeryError(f"{path} is missing", "an adapter is a folder as PEFT writes it")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key).to(torch.float32) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SurgeryError(f"{path} is not a safetensors file: {error}") from None
