"""Injection: freeze a model, and put an update beside each of the layers that were named.

LoRA knows `nn.Linear` and `nn.Embedding`, and no model. What an injection does is written into the
model's journal, so that `undo_lora` takes it back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.journal import history_of, operation
from nanogpt_surgery.lora.linear import LoRALayer, has_lora, lora_layers
from nanogpt_surgery.lora.planning import plan_updates
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import ActiveAdapters, WeightedAdapters
from nanogpt_surgery.lora.targets import find_targets
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


def inject_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    **changes: Any,
) -> Report:
    """Freezes the whole model and puts an update beside every Linear and Embedding that matches.

    The new adapter takes part alone; others on the model stay, and wait.

    Args:
        model: any module; changed in place.
        targets: names of layers or their endings, regular expressions, or all-linear.
        settings: see `LoRASettings`; its defaults if None.
        **changes: fields of `LoRASettings` by name, over those of `settings`.

    Returns:
        A report with a row for each wrapped layer, and trainable and total parameters.

    Raises:
        SurgeryError: a pattern matches nothing, a target is tied, or the model carries an adapter
            of this name. The model is untouched then.
    """
    settings = chosen(LoRASettings, settings, changes)
    check_new_name(model, settings.name)
    # Which layers each pattern means; one that means none is an error with the real names.
    matches = find_targets(model, targets)
    # The rank, alpha and kind of each layer's update, and what becomes of shared weights.
    plan = plan_updates(model, matches, settings)
    # If anything fails in here, the model is as it was.
    with operation(model, f"inject {settings.name}"):
        attach_updates(model, settings.name, plan.factories(), settings.tied == "untie")
    return report_on(model, "LoRA injected")


def attach_updates(
    model: nn.Module,
    adapter: str,
    factories: Mapping[str, Callable[[nn.Module], Any]],
    unties: bool,
) -> None:
    """Freezes a model, puts an adapter on it, and lets the adapter take part alone.

    Args:
        model: changed in place.
        adapter: its name.
        factories: for each layer what makes its update from the bare layer.
        unties: a merge may break the layers' ties.
    """
    if not has_lora(model):  # what to let train again when the last adapter has left
        trainable = tuple(p for p in model.parameters() if p.requires_grad)
        history_of(model).trainable_before = trainable
    for name, make_update in factories.items():
        update = make_update(bare_layer(model, name)).train(model.training)
        layer = wrap_layer(model, name, update.wrapper())
        layer.updates[adapter] = update
        layer.unties |= unties
    # The whole model is frozen, not the wrapped layers alone; then the updates may train.
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.enabled = True
    set_active(model, WeightedAdapters({adapter: 1.0}))
    train_active(model)


def bare_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer at a name, without its wrapper."""
    layer = model.get_submodule(name)
    return layer.original_layer if isinstance(layer, LoRALayer) else layer


def wrap_layer(model: nn.Module, name: str, wrapper: type[LoRALayer]) -> LoRALayer:
    """The wrapper at a name, put there if the layer is bare; one for all names of one module.

    Raises:
        SurgeryError: one adapter replaces the module whole and another one updates it.
    """
    layer = model.get_submodule(name)
    if not isinstance(layer, LoRALayer):
        layer = wrapper.around(layer)
        replace_module(model, name, layer)
    elif layer.replaces_whole != wrapper.replaces_whole:
        raise SurgeryError(
            f"{name} would be updated by one adapter and replaced whole by another",
            "remove_lora(model) first",
        )
    return layer


def replace_module(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Puts a layer in the place of another, under every name that the other has."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is old and parent is not layer:
                parent._modules[child] = layer


def set_active(model: nn.Module, active: ActiveAdapters) -> None:
    """Chooses which adapters take part, on every layer."""
    for layer in lora_layers(model).values():
        layer.active = active


def train_active(model: nn.Module) -> None:
    """Lets the parameters of the adapters that take part be trained, and those of no other."""
    layers, active = lora_layers(model).values(), active_adapters(model).names()
    updates: list[tuple[str, Any]] = [pair for layer in layers for pair in layer.updates.items()]
    for trains in (False, True):  # an update that several layers share trains if any of them does
        for name, update in updates:
            if trains is (name in active):
                for parameter in update.trained():
                    parameter.requires_grad_(trains)


def active_adapters(model: nn.Module) -> ActiveAdapters:
    """Which adapters take part, the same on every layer; none without a LoRA."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return layers[0].active if layers else WeightedAdapters({})


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on a model, the oldest first."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.updates))


def check_name(model: nn.Module, name: str) -> str:
    """The name, if an adapter carries it.

    Raises:
        SurgeryError: none does; the names that are there.
    """
    there = adapter_names(model)
    if name not in there:
        raise SurgeryError(
            f"the model carries no adapter {name!r}",
            f"it carries {', '.join(there)}" if there else "inject_lora(model, targets=…) first",
        )
    return name


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises `SurgeryError` unless a new adapter can have this name."""
    text = isinstance(name, str)
    if not text or not _NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise SurgeryError(
            f"an adapter cannot be named {name!r}",
            "letters, digits, - and _, at most 64, and no attribute of an nn.ModuleDict",
        )
    if name in adapter_names(model):
        layers = lora_layers(model)
        raise SurgeryError(
            f"the model carries a LoRA already, named {name!r}, on {len(layers)} layers "
            f"({next(iter(layers))}, …)",
            "give the new one another name, or merge_lora(model) or remove_lora(model) first",
        )


def report_on(model: nn.Module, title: str) -> Report:
    """A row for each update on each layer, and the model's parameters."""
    rows = update_rows(model, adapter_names(model))
    return Report(title, rows, {"layers": len(lora_layers(model)), **state_of(model)})


def update_rows(model: nn.Module, adapters: list[str]) -> list[dict[str, Any]]:
    """A row for each update of some adapters on each layer."""
    active = active_adapters(model).names()
    return [
        _row(name, adapter, update, adapter in active)
        for name, layer in lora_layers(model).items()
        for adapter, update in layer.updates.items()
        if adapter in adapters
    ]


def _row(name: str, adapter: str, update: Any, active: bool) -> dict[str, Any]:
    a, b = update.factors() if hasattr(update, "factors") else (None, None)
    return {
        "layer": name,
        "adapter": adapter,
        "in": None if a is None else a.size(1),
        "out": None if b is None else b.size(0),
        "rank": getattr(update, "rank", None),
        "alpha": getattr(update, "alpha", None),
        "parameters": sum(parameter.numel() for parameter in update.trained()),
        "active": active,
    }


def state_of(model: nn.Module) -> dict[str, Any]:
    """What takes part, the model's parameters, and what to do where adapters only wait."""
    active, names = active_adapters(model), adapter_names(model)
    parameters = list(model.parameters())
    state: dict[str, Any] = {
        "active": str(active),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    if names and not active.names():
        state["next"] = f"no adapter takes part: swap_lora(model, {names[0]!r})"
    return state
