"""The verbs for adapters on a model: enable, disable, swap, blend, remove.

Injection is in inject.py, merging in merging.py.

Nothing here happens because of `.train()` or `.eval()`. Each verb changes the model in place,
returns a report, is written into the model's journal (`undo_lora` takes it back), and leaves the
model as it was if it fails.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.history.model_history import operation
from nanogpt_surgery.lora.active import WeightedAdapters
from nanogpt_surgery.lora.inject import replace_module
from nanogpt_surgery.lora.merging import restore_requires_grad
from nanogpt_surgery.lora.several import (
    active_adapters,
    adapter_names,
    check_name,
    has_lora,
    lora_layers,
    report_on,
    set_active,
    state_of,
    train_active,
    update_rows,
)
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import WEIGHT, raise_all, wrong_values


@check_arguments
def enable_lora(model: nn.Module) -> Report:
    """Lets the updates take part again."""
    return _switch(model, True)


@check_arguments
def disable_lora(model: nn.Module) -> Report:
    """Computes as if no update were there; the updates stay."""
    return _switch(model, False)


def _switch(model: nn.Module, enabled: bool) -> Report:
    layers = lora_layers(model)
    # Not hashed: no tensor is replaced.
    with operation(model, "enable" if enabled else "disable", hashed=False):
        for layer in layers.values():
            layer.enabled = enabled
    return report_on(model, "LoRA enabled" if enabled else "LoRA disabled")


@check_arguments
def swap_lora(model: nn.Module, name: str) -> Report:
    """Lets one adapter take part alone; it, and no other, can be trained.

    Raises:
        SurgeryError: the model carries no adapter of this name.
    """
    return _activate(model, f"swap to {name}", WeightedAdapters({check_name(model, name): 1.0}))


@check_arguments
def blend_lora(model: nn.Module, weights: Mapping[str, float]) -> Report:
    """Lets several adapters take part, as Σ wᵢ ΔWᵢ.

    Raises:
        SurgeryError: the model carries no adapter of one of the names, or a weight is no number
            (all of them at once).
    """
    named = {f"the weight of {name!r}": weight for name, weight in weights.items()}
    raise_all(wrong_values(WEIGHT, named))
    active = WeightedAdapters({check_name(model, n): float(w) for n, w in weights.items()})
    return _activate(model, f"blend {active}", active)


def _activate(model: nn.Module, title: str, active: WeightedAdapters) -> Report:
    lora_layers(model)
    with operation(model, title, hashed=False):
        set_active(model, active)
        train_active(model)
    return report_on(model, f"LoRA: {title}")


@check_arguments
def remove_lora(model: nn.Module, name: str | None = None) -> Report:
    """Takes one adapter off, or all: a layer without updates is the original again, bit for bit.

    Returns:
        A row for each update that was there, and what takes part and can be trained from now on.

    Raises:
        SurgeryError: there is no LoRA, or none of this name.
    """
    lora_layers(model)
    names = adapter_names(model) if name is None else [check_name(model, name)]
    active, rows = active_adapters(model), update_rows(model, names)
    with operation(model, f"remove {', '.join(names)}"):
        assert isinstance(active, WeightedAdapters), "rows leave with their block"
        for path, layer in lora_layers(model).items():
            for one in names:
                if one in layer.updates:
                    del layer.updates[one]
            if not layer.updates:
                replace_module(model, path, layer.original_layer)
        if has_lora(model):
            left = {n: w for n, w in active.weights.items() if n not in names}
            set_active(model, WeightedAdapters(left))
        else:
            restore_requires_grad(model)
    touched = {"layers": len({row["layer"] for row in rows})}
    return Report("LoRA removed", rows, touched | state_of(model))
