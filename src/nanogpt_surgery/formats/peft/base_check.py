"""Whether a stored adapter is for a model: layers, shapes, and the weights it was made for."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, SurgeryWarning, listed, nearest, quoted
from nanogpt_surgery.formats.peft.config import CONFIG, MERGE_IN_PEFT
from nanogpt_surgery.history.hashing import plain_name
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, Updates
from nanogpt_surgery.lora.targets import adaptable_layers, output_layer, unsupported_reason
from nanogpt_surgery.lora.variants import check_row_norms

_SHOWN = 12  # of what does not fit


def check_rows(model: nn.Module, updates: Updates) -> None:
    """Raise `SurgeryError` where DoRA meets a row of W + ΔW without a length."""
    layers: dict[str, Any] = adaptable_layers(model)
    for path, update in updates.items():
        if update.magnitude is not None:
            change = update.delta_weight.to(layers[path].weight.device)
            hint = "take another base, whose rows are not zero, or another adapter, without DoRA"
            check_row_norms(path, layers[path], change, hint)


def check_fit(model: nn.Module, adapter: StoredAdapter) -> None:
    """Raise `SurgeryError`, with the first dozen of what does not fit, if an adapter does not.

    Of updates and of modules replaced whole the sizes are looked at, and no number is read.
    """
    found = list(islice(_misfits(model, adapter), _SHOWN + 1))
    if found:
        shown = "; ".join(problem for problem, _ in found[:_SHOWN])
        more = "; …" if found[_SHOWN:] else ""
        resized = any(is_resized for _, is_resized in found)
        raise SurgeryError(
            f"this adapter is for another model: {shown}{more}",
            MERGE_IN_PEFT
            if resized
            else f"open the base that its {CONFIG} names (base_model_name_or_path)",
        )


def _misfits(model: nn.Module, adapter: StoredAdapter) -> Iterator[tuple[str, bool]]:
    """What does not fit, in words, and whether it would if merged in peft."""
    layers = adaptable_layers(model)
    for name, update in adapter.updates.items():
        kind = nn.Embedding if update.embedding else nn.Linear
        layer: Any = layers.get(name)
        if not isinstance(layer, kind):
            yield f"there is no {kind.__name__} {quoted(name)} ({_instead(model, name)})", False
            continue
        wanted = (update.B.size(0), update.A.size(1))
        wanted = wanted[::-1] if update.embedding else wanted
        if tuple(layer.weight.shape) != wanted:
            actual = tuple(layer.weight.shape)
            yield f"{name} is {actual} in the model and {wanted} in the adapter", False
    state = _base_state(model)
    for name, tensor in adapter.whole.items():
        if name not in state or state[name].shape != tensor.shape:
            resized = _resized(model, name.rpartition(".")[0], tensor)
            shape = tuple(tensor.shape)
            yield resized or f"there is no tensor {listed([name])} of shape {shape}", bool(resized)
    for name, copy in adapter.base_copies.items():
        base = state.get(f"{name}.weight")
        alike = base if base is not None and base.shape == copy.shape else None
        if alike is None or not torch.equal(alike.float().cpu(), copy.float()):
            differs = f"the adapter brings its own {listed([name])}, which differs from the model's"
            yield _resized(model, name, copy) or differs, True


def _resized(model: nn.Module, name: str, weight: Tensor) -> str | None:
    """What to say of an embedding's or the output layer's weight that has rows for other ids."""
    layer: Any = adaptable_layers(model).get(name)
    is_vocabulary = isinstance(layer, nn.Embedding) or (layer and name == output_layer(model))
    if not is_vocabulary or layer.weight.shape[1:] != weight.shape[1:]:
        return None
    before, now = len(layer.weight), len(weight)
    return None if before == now else f"the vocabulary was resized from {before} to {now} ({name})"


def _instead(model: nn.Module, name: str) -> str:
    """What is at a name where no layer can be wrapped, or else the nearest names that can."""
    if name not in dict(model.named_modules()):
        return f"nearest: {nearest(name[:200], adaptable_layers(model))}"
    reason = unsupported_reason(model, name) or "a layer of the other kind"
    if "Conv1D" in reason:
        reason += "; a GPT-2 opened with open_model has Linears"
    return f"it is {reason}"


def _base_state(model: nn.Module) -> dict[str, Any]:
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def compare_fingerprint(stored: Mapping[str, str], actual: Mapping[str, str], force: bool) -> None:
    """Refuse an adapter on another base than it was made for.

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
        raise SurgeryError(what, "open the base it was trained on, or force=True (--force)")
    warnings.warn(what, SurgeryWarning, stacklevel=3)
