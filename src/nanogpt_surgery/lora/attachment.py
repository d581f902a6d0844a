"""Extracting an adapter from a model as plain tensors, and attaching one to a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError, listed, nearest, quoted
from nanogpt_surgery.history.hashing import plain_name
from nanogpt_surgery.history.model_history import operation
from nanogpt_surgery.lora.inject import attach_updates
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.replaced import WholeUpdate
from nanogpt_surgery.lora.settings import LoRASettings, Tied
from nanogpt_surgery.lora.several import (
    WeightedAdapters,
    active_adapters,
    adapter_names,
    check_new_name,
    lora_layers,
    report_on,
)
from nanogpt_surgery.lora.stored_adapter import (
    LowRankUpdate,
    StoredAdapter,
    Updates,
    is_rslora,
    restore,
    store,
)
from nanogpt_surgery.lora.targets import adaptable_layers, output_layer, unsupported_reason
from nanogpt_surgery.lora.ties import UpdateFactory, find_tied, tied_to, with_tied_layers
from nanogpt_surgery.lora.variants import check_row_norms
from nanogpt_surgery.report import Report

_SHOWN = 12  # of what does not fit


def chosen_adapter(model: nn.Module, name: str | None = None) -> str:
    """The adapter that is meant: the named one, the only one, or the one that takes part alone.

    Raises:
        SurgeryError: it is not clear which, there is none, or it is unnamed and takes part at
            another weight than 1, of which the adapter itself knows nothing.
    """
    lora_layers(model)
    there, active = adapter_names(model), active_adapters(model)
    for candidates in ([name] if name else [], there, active.names()):
        if len(candidates) == 1 and candidates[0] in there:
            if name is None and isinstance(active, WeightedAdapters):
                _check_weight(candidates[0], active)
            return candidates[0]
    raise SurgeryError(
        f"which adapter? The model carries {', '.join(there)}", "give its name, or swap_lora first"
    )


def _check_weight(name: str, active: WeightedAdapters) -> None:
    weight = active.weights.get(name, 1)
    if weight != 1:
        raise SurgeryError(
            f"{name!r} takes part at {weight:g}, and an adapter's folder has no weight",
            f"swap_lora(model, {name!r}) to have all of it take part, or its name to save it as it "
            "is; merge_lora(model) puts the blend into the weights",
        )


def updates_of(model: nn.Module, name: str | None = None) -> Updates:
    """Copies of an adapter's updates, by the name of the layer, all with rsLoRA's scale or none.

    A file has room for one choice: it is rsLoRA's if any of the scales is.
    """
    name, layers = chosen_adapter(model, name), lora_layers(model)
    updates = {
        path: update
        for path, layer in layers.items()
        if isinstance(update := dict(layer.updates).get(name), LoRAUpdate)
    }
    rslora = any(is_rslora(update) for update in updates.values())
    return {
        path: store(update, layers[path].original_layer, rslora) for path, update in updates.items()
    }


def extract_adapter(model: nn.Module, name: str | None = None) -> StoredAdapter:
    """A copy of an adapter: updates, modules replaced whole, and the choice for tied weights."""
    name = chosen_adapter(model, name)
    whole = {
        f"{path}.{key}": tensor.detach().float().cpu().clone()
        for path, layer in lora_layers(model).items()
        if isinstance(copied := dict(layer.updates).get(name), WholeUpdate)
        for key, tensor in copied.module.state_dict().items()
    }
    return StoredAdapter(updates_of(model, name), whole, tied=_choice(model, name))


def _choice(model: nn.Module, name: str) -> Tied | None:
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.updates}
    if any(layer.unties for layer in layers.values()):
        return "untie"
    shared = [p for p, layer in layers.items() if not layer.replaces_whole]
    return "both" if any(tied_to(model, path) for path in shared) else None


def attach_adapter(
    model: nn.Module,
    adapter: StoredAdapter,
    name: str = LoRASettings.name,
    tied: Tied | None = None,
) -> Report:
    """Wraps the layers of a model and gives them the updates of an adapter, which then acts alone.

    Args:
        model: changed in place.
        adapter: with the model's own names.
        name: for the adapter.
        tied: as in `inject_lora`; what the adapter says by default, or else "refuse".

    Raises:
        SurgeryError: a layer is missing in the model, or its shape differs (all of them at once);
            a layer is tied; the name is taken; DoRA meets a row without a length. The model is
            untouched then.
    """
    check_new_name(model, name)
    check_fit(model, adapter)
    return attach_fitting(model, adapter, name, tied)


def attach_fitting(
    model: nn.Module, adapter: StoredAdapter, name: str, tied: Tied | None
) -> Report:
    """As `attach_adapter`, of an adapter and a name that were checked."""
    _check_dora(model, adapter.updates)
    choice: Any = tied or adapter.tied or "refuse"
    whole = _by_module(adapter.whole)
    find_tied(model, whole, "untie" if choice == "untie" else "refuse")
    tied_layers = _check_same_updates(adapter.updates, find_tied(model, adapter.updates, choice))
    others = {name for names in tied_layers.values() for name in names}
    factories: dict[str, UpdateFactory] = {
        path: partial(restore, update)
        for path, update in adapter.updates.items()
        if path not in others
    }
    factories |= {path: partial(WholeUpdate, tensors=tensors) for path, tensors in whole.items()}
    with operation(model, f"load {name}"):
        attach_updates(
            model, name, with_tied_layers(factories, tied_layers), unties=choice == "untie"
        )
    return report_on(model, "LoRA loaded")


def check_fit(
    model: nn.Module,
    adapter: StoredAdapter,
    hint: str = "open the base that it was made for",
    if_resized: str = "resize the vocabulary of the base as it was when the adapter was made",
) -> None:
    """Raises `SurgeryError`, with the first dozen of what does not fit, if an adapter does not.

    Of updates and of modules replaced whole the sizes are looked at, and no number is read.

    Args:
        model: the base, bare or with other adapters.
        adapter: with the model's own names.
        hint: what to do with an adapter for another model.
        if_resized: what to do where the vocabularies differ in size alone.
    """
    found = list(islice(_misfits(model, adapter), _SHOWN + 1))
    if found:
        shown = "; ".join(problem for problem, _ in found[:_SHOWN])
        more = "; …" if found[_SHOWN:] else ""
        resized = any(is_resized for _, is_resized in found)
        raise SurgeryError(
            f"this adapter is for another model: {shown}{more}",
            if_resized if resized else hint,
        )


def _misfits(model: nn.Module, adapter: StoredAdapter) -> Iterator[tuple[str, bool]]:
    """Each thing that does not fit, in words, and whether it would if merged in peft."""
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
    """The words for an embedding's or the output layer's weight that has rows for other ids."""
    layer: Any = adaptable_layers(model).get(name)
    is_vocabulary = isinstance(layer, nn.Embedding) or (layer and name == output_layer(model))
    if not is_vocabulary or layer.weight.shape[1:] != weight.shape[1:]:
        return None
    before, now = len(layer.weight), len(weight)
    return None if before == now else f"the vocabulary was resized from {before} to {now} ({name})"


def _instead(model: nn.Module, name: str) -> str:
    """The reason why no layer can be wrapped at a name, or else the nearest names that can."""
    if name not in dict(model.named_modules()):
        return f"nearest: {nearest(name[:200], adaptable_layers(model))}"
    reason = unsupported_reason(model, name) or "a layer of the other kind"
    if "Conv1D" in reason:
        reason += "; a GPT-2 opened with open_model has Linears"
    return f"it is {reason}"


def _base_state(model: nn.Module) -> dict[str, Any]:
    return {plain_name(name): tensor for name, tensor in model.state_dict().items()}


def _check_dora(model: nn.Module, updates: Updates) -> None:
    """Raises `SurgeryError` where DoRA meets a row of W + ΔW without a length."""
    layers: dict[str, Any] = adaptable_layers(model)
    for path, update in updates.items():
        if update.magnitude is not None:
            change = update.delta_weight.to(layers[path].weight.device)
            hint = "take another base, whose rows are not zero, or another adapter, without DoRA"
            check_row_norms(path, layers[path], change, hint)


def _by_module(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by the name of their module, then by their own."""
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        modules.setdefault(path, {})[key] = tensor
    return modules


def _check_same_updates(
    updates: Updates, tied_layers: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """The tied layers that get one update, if the adapter has the same ΔW for all of them."""
    found: dict[str, list[str]] = {}
    for name, others in tied_layers.items():
        if updates[name].embedding:
            continue
        wrong = [
            o for o in others if o not in updates or not _is_same_change(updates[name], updates[o])
        ]
        if wrong:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(wrong)}, and the adapter changes them "
                "differently",
                "tied='untie'",
            )
        found[name] = others
    return found


def _is_same_change(head: LowRankUpdate, other: LowRankUpdate) -> bool:
    if not other.embedding:
        return torch.equal(head.A, other.A) and torch.equal(head.B, other.B)
    return torch.equal(head.A, other.B.t()) and torch.equal(head.B, other.A.t())
