"""Reads an adapter folder in PEFT's own format, and puts it on a model.

It may be a stranger's: no number of a tensor is read before its size is known to fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError, foreign_file, listed, quoted, warn
from nanogpt_surgery.files.atomic import check_undamaged
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.formats.folders.run_folder import chosen_checkpoint, is_run
from nanogpt_surgery.formats.huggingface.config import CONFIG as MODEL_CONFIG
from nanogpt_surgery.formats.huggingface.safetensors_file import read_header
from nanogpt_surgery.formats.peft.config import (
    CONFIG,
    EXTRAS,
    MERGE_IN_PEFT,
    alphas_of,
    fused_parts_of,
    read_config,
    read_extras,
)
from nanogpt_surgery.formats.peft.layout import OPEN_ITS_BASE, adapter_to_ours, base_fingerprint
from nanogpt_surgery.history.model_history import tensor_hash
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.several import check_new_name
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    Updates,
    attach_adapter,
    check_fit,
)
from nanogpt_surgery.lora.targets import COMPILED, uncompiled
from nanogpt_surgery.report import Report

TENSORS = "adapter_model.safetensors"
# The names of PEFT's file: the prefix, the layer's path, and what it is.
PREFIX = "base_model.model."
FACTOR_A, FACTOR_B = ".lora_A.weight", ".lora_B.weight"
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
MAGNITUDE = ".lora_magnitude_vector"
BIAS = ".lora_B.bias"
_BASE = ".base_layer.weight"
_LONGEST_NAME = 1_000  # characters
_MOST_COPIED = 64 << 20  # bytes that lie across their numbers' bounds, so that they are copied
_FROM_A_COPY = "restore the file from a copy"


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


@check_arguments
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
    return attach_read(
        model, read_adapter(adapter_folder(folder)), name=name, tied=tied, force=force
    )


def attach_read(
    model: nn.Module,
    stored: StoredAdapter,
    *,
    name: str = "default",
    tied: Tied | None = None,
    force: bool = False,
    hashes: Mapping[Tensor, str] | None = None,
) -> Report:
    """Puts what `read_adapter` has read on a model; see `load_adapter`.

    Args:
        model: as there.
        stored: what was read.
        name: as there.
        tied: as there.
        force: as there.
        hashes: of the model's tensors in float32, for a model whose history nobody will ask for:
            none is hashed again.
    """
    plain = uncompiled(model)
    adapter = adapter_to_ours(stored, plain)
    check_new_name(model, name)
    check_fit(plain, adapter, OPEN_ITS_BASE, MERGE_IN_PEFT)
    _check_base(stored, plain, force, hashes)
    adapter = adapter.in_float32()
    adapter = adapter if plain is model else adapter.inside(COMPILED)
    return attach_adapter(model, adapter, name, tied, hashed=hashes is None)


def _check_base(
    adapter: StoredAdapter, model: nn.Module, force: bool, hashes: Mapping[Tensor, str] | None
) -> None:
    """Raises `SurgeryError`, or warns if forced, if an adapter was made for another base."""
    names = [name for name in adapter.updates if name in adapter.fingerprint]
    actual = base_fingerprint(model, names, hashes)
    other = [name for name in names if actual[name] != adapter.fingerprint[name]]
    if not other:
        return
    what = (
        f"the adapter was made for another base: {len(other)} of {len(names)} of the weights it "
        f"sits on differ ({', '.join(other[:4])}{', …' if other[4:] else ''})"
    )
    if not force:
        raise SurgeryError(what, "open the base it was trained on, or force=True")
    warn(what)


def read_adapter(folder: Path) -> StoredAdapter:
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
            whole = _take_whole(tensors, config.get("modules_to_save") or [])
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


def _take_updates(
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    extras: dict[str, Any],
    alpha_of: Callable[[str], float],
) -> Updates:
    """Takes every layer's A, B and lengths out of the tensors of a file."""
    found: Updates = {}
    dora = bool(config.get("use_dora"))
    for a_key, b_key in ((FACTOR_A, FACTOR_B), (EMBEDDING_A, EMBEDDING_B)):
        for name in [key.removesuffix(a_key) for key in tensors if key.endswith(a_key)]:
            a, b = _take_factors(tensors, name, a_key, b_key)
            magnitude = tensors.pop(name + MAGNITUDE, None) if dora else None
            if dora and (magnitude is None or magnitude.shape != b.shape[:1]):
                raise SurgeryError(
                    f"{name} has no lora_magnitude_vector of length {b.size(0)}", _FROM_A_COPY
                )
            initial, fused_parts = fused_parts_of(extras, name, a.size(0))
            found[name] = LowRankUpdate(
                a,
                b,
                alpha_of(name),
                rslora=bool(config.get("use_rslora")),
                magnitude=magnitude,
                embedding=a_key == EMBEDDING_A,
                dropout=float(config.get("lora_dropout") or 0.0),
                initial=initial,
                fused_parts=fused_parts,
                bias=_take_bias(tensors, name, b) if config.get("lora_bias") else None,
            )
    return found


def _take_bias(tensors: dict[str, Tensor], name: str, b: Tensor) -> Tensor:
    """Takes what is added to B A x."""
    bias = tensors.pop(name + BIAS, None)
    if bias is None or bias.shape != b.shape[:1]:
        raise SurgeryError(f"{name} has no lora_B.bias of length {b.size(0)}", _FROM_A_COPY)
    return bias


def _take_factors(
    tensors: dict[str, Tensor], name: str, a_key: str, b_key: str
) -> tuple[Tensor, Tensor]:
    a, b = tensors.pop(name + a_key), tensors.pop(name + b_key, None)
    if a.dim() > 2:
        raise SurgeryError(
            f"lora_A of {name} is {tuple(a.shape)}: a convolution's LoRA, and here only Linears "
            "and Embeddings are adapted",
            MERGE_IN_PEFT,
        )
    if b is None or a.dim() != 2 or b.dim() != 2 or a.size(0) != b.size(1) or not a.numel():
        raise SurgeryError(f"lora_A of {name} has no lora_B of its rank", _FROM_A_COPY)
    return a, b


def _take_copies(tensors: dict[str, Tensor], ending: str) -> dict[str, Tensor]:
    """Takes the base's own tensors, which PEFT writes beside an embedding's update, or unasked."""
    keys = [key for key in tensors if key.endswith(ending) and ".lora_" not in key]
    return {key.removesuffix(ending): tensors.pop(key) for key in keys}


def _take_whole(tensors: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Takes the tensors of the modules_to_save, each of which may hold others."""
    endings = tuple(names)
    whole = {
        key: tensors.pop(key)
        for key in list(tensors)
        if any(path.endswith(endings) for path in _above(key))
    }
    absent = []
    for name in names:  # PEFT matches the end of a module's path
        held = {key: sum(path.endswith(name) for path in _above(key)) for key in whole}
        twice = next((key for key, count in held.items() if count > 1), None)
        if twice is not None:
            raise SurgeryError(
                f"PEFT has wrapped a module and one within it, {twice} by {name}, and written only "
                "one of the two copies",
                "train it again with a name in modules_to_save that ends one of them alone",
            )
        if not any(held.values()):
            absent.append(name)
    if absent:
        raise SurgeryError(f"it lacks the modules_to_save {listed(absent)}", _FROM_A_COPY)
    return whole


def _above(key: str) -> list[str]:
    """The paths of the modules that a tensor lies in."""
    return [key[:place] for place, character in enumerate(key) if character == "."]


def _take_twins(tensors: dict[str, Tensor], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes what a tied module's tensors are written as once more, under its partner's name."""
    shapes = {tensor.shape for tensor in whole.values()}
    alike = {key: tensor for key, tensor in tensors.items() if tensor.shape in shapes}
    hashes = {tensor_hash(tensor) for tensor in whole.values()} if alike else set()
    return {key: tensors.pop(key) for key, t in alike.items() if tensor_hash(t) in hashes}
