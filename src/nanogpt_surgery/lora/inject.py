"""Injection: freeze a model, and put an update beside each layer that was named.

It knows `nn.Linear` and `nn.Embedding`, and no kind of model. `operation` writes what is done in a
journal, by which `undo_lora` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import history_of, operation
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.several import (
    check_new_name,
    has_lora,
    lora_layers,
    report_on,
    set_active,
    train_active,
)
from nanogpt_surgery.lora.targets import plan_updates, tied_view, unwrapped
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen


@check_arguments
def inject_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    **changes: Any,
) -> Report:
    """Freezes the whole model and puts an update beside every Linear and Embedding that matches.

    The updates together are one adapter. It takes part alone; others on the model stay, unused.

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
    # Which layers the targets mean, the rank, alpha and kind of each layer's update, and what
    # becomes of weights that several layers share; all is checked before anything is touched.
    plan = plan_updates(model, targets, settings)
    # If anything fails in here, the model is as it was.
    with operation(model, f"inject {settings.name}"):
        attach_updates(
            model, settings.name, plan.factories(), plan.tied_layers, settings.tied == "untie"
        )
    return report_on(model, "LoRA injected")


def attach_updates(
    model: nn.Module,
    adapter: str,
    factories: Mapping[str, Callable[[nn.Module], Any]],
    tied_layers: Mapping[str, list[str]],
    unties: bool,
) -> None:
    """Freezes a model, puts an adapter on it, and lets the adapter take part alone.

    Args:
        model: changed in place.
        adapter: its name.
        factories: for each layer's name, the function that makes its update from the bare layer.
        tied_layers: for such a name, those of the layers that share the weight and the update.
        unties: a merge may give layers that share a weight one each.
    """
    if not has_lora(model):  # remembered for the day when the last adapter is removed
        trainable = tuple(p for p in model.parameters() if p.requires_grad)
        history_of(model).trainable_before = trainable
    for first, make_update in factories.items():
        made = make_update(bare_layer(model, first))
        # Layers that share a weight, such as a head tied to the embedding, share its update too.
        for name in (first, *tied_layers.get(first, ())):
            update = made if name == first else tied_view(made, bare_layer(model, name))
            layer = wrap_layer(model, name, update.wrapper())
            layer.updates[adapter] = update.train(model.training)
            layer.unties |= unties
    # The whole model is frozen, not the wrapped layers alone; then the updates may train.
    model.requires_grad_(False)
    for layer in lora_layers(model).values():
        layer.enabled = True  # those of another adapter may be disabled
    set_active(model, WeightedAdapters({adapter: 1.0}))
    train_active(model)


def bare_layer(model: nn.Module, name: str) -> nn.Module:
    """Returns the layer at a name, without its wrapper."""
    return unwrapped(model.get_submodule(name))


def wrap_layer(model: nn.Module, name: str, wrapper: type[LoRALayer]) -> LoRALayer:
    """Returns the wrapper at a name; a bare layer is wrapped first, under all of its names.

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
            if module is old and parent is not layer:  # a wrapper keeps the old one inside
                parent._modules[child] = layer
