"""Putting wrappers in and out of a model, and saying what it carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.journal import (
    get_tie_word_embeddings,
    history_of,
    set_tie_word_embeddings,
)
from nanogpt_surgery.lora.embedding import LoRAEmbedding
from nanogpt_surgery.lora.layer import (
    LoRALayer,
    active_mixture,
    adapter_names,
    lora_layers,
)
from nanogpt_surgery.lora.linear import LoRALinear
from nanogpt_surgery.lora.mixture import Blend, Mixture
from nanogpt_surgery.lora.replaced import ReplacedLayer, WholeUpdate
from nanogpt_surgery.lora.update import Update
from nanogpt_surgery.lora.variants import seen_from
from nanogpt_surgery.report import Report

Maker: TypeAlias = Callable[[nn.Module], Update | WholeUpdate]


def attach(
    model: nn.Module,
    adapter: str,
    makers: Mapping[str, Maker],
    followers: Mapping[str, list[str]],
    unties: bool,
) -> None:
    """Put an adapter on a model, freeze the rest, and let the adapter take part alone.

    Args:
        model: changed in place.
        adapter: its name.
        makers: for each layer what makes its update from the bare layer.
        followers: tied layers that get the update of the layer they follow.
        unties: a merge may break the layers' ties.
    """
    if not _wrappers(model):
        history_of(model).trainable_before = tuple(p for p in model.parameters() if p.requires_grad)
    for name, make in makers.items():
        update = make(bare(model, name)).train(model.training)
        layer = wrapped(model, name, whole=isinstance(update, WholeUpdate))
        layer.updates[adapter] = update
        layer.unties |= unties
        for other in followers.get(name, []):
            assert isinstance(update, Update), "only updates are shared"
            partner = wrapped(model, other)
            partner.updates[adapter] = seen_from(update, partner.original_layer)
    model.requires_grad_(False)
    set_mixture(model, Blend({adapter: 1.0}))
    for layer in _wrappers(model):
        layer.enabled = True
    let_train(model)


def bare(model: nn.Module, name: str) -> nn.Module:
    """The layer at a name, without its wrapper."""
    layer = model.get_submodule(name)
    return layer.original_layer if isinstance(layer, LoRALayer) else layer


def wrapped(model: nn.Module, name: str, whole: bool = False) -> LoRALayer:
    """The wrapper at a name, put there if the layer is bare; one for all names of one module.

    Raises:
        SurgeryError: one adapter replaces the module whole and another one updates it.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, LoRALayer):
        if isinstance(layer, ReplacedLayer) != whole:
            raise SurgeryError(
                f"{name} would be updated by one adapter and replaced whole by another",
                "remove_lora(model) first",
            )
        return layer
    kind = LoRAEmbedding if isinstance(layer, nn.Embedding) else LoRALinear
    wrapper = (ReplacedLayer if whole else kind).around(layer)
    replace(model, name, wrapper)
    return wrapper


def _wrappers(model: nn.Module) -> list[LoRALayer]:
    return [module for module in model.modules() if isinstance(module, LoRALayer)]


def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer in the place of another, under every name that the other has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old and parent is not layer:
                parent._modules[child] = layer


def set_mixture(model: nn.Module, mixture: Mixture) -> None:
    """Choose what takes part, on every layer."""
    for layer in _wrappers(model):
        layer.mixture = mixture


def let_train(model: nn.Module) -> None:
    """Let the parameters of the adapters that take part be trained, and those of no other."""
    active = active_mixture(model).adapters()
    for layer in _wrappers(model):
        for update in layer.updates.values():
            for parameter in _trained(update):
                parameter.requires_grad_(False)
    for layer in _wrappers(model):
        for name in active:
            if name in layer.updates:
                for parameter in _trained(layer.updates[name]):
                    parameter.requires_grad_(True)


def _trained(update: nn.Module) -> list[nn.Parameter]:
    assert isinstance(update, Update | WholeUpdate)
    return update.trained()


def merge_layers(model: nn.Module) -> None:
    """Put W + ΔW in the place of every wrapped layer.

    Layers that shared a weight and have the same W + ΔW share one again; where a tie is broken, a
    config that says `tie_word_embeddings` says no.
    """
    before = history_of(model).trainable_before
    trainable = None if before is None else {id(parameter) for parameter in before}
    made: dict[int, list[Any]] = {}
    for name, layer in lora_layers(model).items():
        original: Any = layer.original_layer
        merged: Any = layer.merged_layer()
        if isinstance(layer, ReplacedLayer):
            replace(model, name, merged)
            continue
        merged.weight.requires_grad_(trainable is None or id(original.weight) in trainable)
        twins = made.setdefault(id(original.weight), [])
        for twin in twins:
            if torch.equal(twin.weight, merged.weight):
                merged.weight = twin.weight
        twins.append(merged)
        replace(model, name, merged)
    restore_requires_grad(model)
    _say_untied(model)


def restore_requires_grad(model: nn.Module) -> None:
    """Let those parameters train again that could before the first injection."""
    for parameter in history_of(model).trainable_before or ():
        parameter.requires_grad_(True)
    history_of(model).trainable_before = None


def _say_untied(model: nn.Module) -> None:
    if not get_tie_word_embeddings(model):
        return
    ends = [getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output")]
    weights = [getattr(end(), "weight", None) for end in ends if end is not None]
    if len(weights) == 2 and weights[0] is not weights[1]:
        set_tie_word_embeddings(model, False)


def report_on(model: nn.Module, title: str) -> Report:
    """A row for each update on each layer, and the model's parameters."""
    rows = update_rows(model, adapter_names(model))
    return Report(title, rows, {"layers": len(lora_layers(model)), **state_of(model)})


def update_rows(model: nn.Module, adapters: list[str]) -> list[dict[str, Any]]:
    """A row for each update of some adapters on each layer."""
    active = active_mixture(model).adapters()
    return [
        _row(name, adapter, update, adapter in active)
        for name, layer in lora_layers(model).items()
        for adapter, update in layer.updates.items()
        if adapter in adapters
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    """What takes part, the model's parameters, and what to do where adapters only wait."""
    mixture, waiting = active_mixture(model), adapter_names(model)
    parameters = list(model.parameters())
    state: dict[str, Any] = {
        "active": str(mixture),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    if waiting and not mixture.adapters():
        state["next"] = f"no adapter takes part: swap_lora(model, {waiting[0]!r})"
    return state


def _row(name: str, adapter: str, update: Any, active: bool) -> dict[str, Any]:
    whole = isinstance(update, WholeUpdate)
    a, b = (None, None) if whole else update.factors()
    return {
        "layer": name,
        "adapter": adapter,
        "in": None if a is None else a.size(1),
        "out": None if b is None else b.size(0),
        "rank": None if whole else update.rank,
        "alpha": None if whole else update.alpha,
        "parameters": sum(parameter.numel() for parameter in update.trained()),
        "active": active,
    }
