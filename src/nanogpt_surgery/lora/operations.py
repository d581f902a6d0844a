"""The verbs for adapters on a model: swap, blend, merge, remove; the others are in inject.py.

Nothing here happens because of `.train()` or `.eval()`. Each verb changes the model in place,
returns a report, is written into the model's journal (`undo_lora` takes it back), and leaves the
model as it was if it fails.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.model_history import history_of, operation
from nanogpt_surgery.lora.inject import replace_module, train_active
from nanogpt_surgery.lora.merge_metrics import Probe, check_weights, effect_of, merge_rows
from nanogpt_surgery.lora.merging import merge_layers, restore_requires_grad
from nanogpt_surgery.lora.several import (
    LoRALayer,
    WeightedAdapters,
    active_adapters,
    adapter_names,
    check_name,
    has_lora,
    lora_layers,
    report_on,
    set_active,
    state_of,
    update_rows,
)
from nanogpt_surgery.lora.ties import check_undecided
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import WEIGHT, raise_all, wrong_values


def swap_lora(model: nn.Module, name: str) -> Report:
    """Lets one adapter take part alone; it, and no other, can be trained.

    Raises:
        SurgeryError: the model carries no adapter of this name.
    """
    return _activate(model, f"swap to {name}", WeightedAdapters({check_name(model, name): 1.0}))


def blend_lora(model: nn.Module, weights: Mapping[str, float]) -> Report:
    """Lets several adapters take part, as Σ wᵢ ΔWᵢ.

    Raises:
        SurgeryError: the model carries no adapter of one of the names, or a weight is no number
            (all of them at once).
    """
    if not isinstance(weights, Mapping):
        raise SurgeryError(
            f"{weights!r} stands where the weights of a blend belong",
            "a table by the adapters' names: blend_lora(model, {'poet': 0.7, 'clerk': 0.3})",
        )
    named = {f"the weight of {name!r}": weight for name, weight in weights.items()}
    raise_all("there is no such blend", wrong_values(WEIGHT, named))
    active = WeightedAdapters({check_name(model, n): float(w) for n, w in weights.items()})
    return _activate(model, f"blend {active}", active)


def _activate(model: nn.Module, title: str, active: WeightedAdapters) -> Report:
    lora_layers(model)
    with operation(model, title, hashed=False):
        set_active(model, active)
        train_active(model)
    return report_on(model, f"LoRA: {title}")


def merge_lora(
    model: nn.Module,
    *,
    probe: Probe | None = None,
    tolerance: float = 1e-3,
    force: bool = False,
    keep_originals: bool = True,
) -> Report:
    """Puts W + ΔW, added in float32 (float64 if W is), in the place of every wrapped layer.

    The original tensors are not written to. What takes part is merged; the other adapters leave
    with the wrappers, and come back with `undo_lora`.

    Args:
        model: carries a LoRA, enabled.
        probe: ids (B, T) to call the model on, or a function that gives logits; the effect on
            the logits is measured with it.
        tolerance: largest mean KL divergence from the adapted model's distribution to the merged
            one's, in nats a token, that is let pass.
        force: merge whatever the probe says and the weights become.
        keep_originals: keep the original layers and the updates in memory, for `undo_lora`.

    Raises:
        SurgeryError: the probe shows more than the tolerance, the LoRA is disabled, no adapter
            takes part, no weight would change, one would be NaN or infinite, or a tie would be
            broken that nobody decided to break. The model is untouched then.
    """
    layers = lora_layers(model)
    _check_mergeable(model, layers)
    kept = "kept" if keep_originals else "dropped"
    rows = [{**row, "original": kept} for row in merge_rows(layers)]
    if not force:
        check_weights(rows, layers)
    with operation(model, "merge"):
        effect = effect_of(model, probe, merge_layers, tolerance, force)
    if not keep_originals:
        history_of(model).settle()
    return Report("LoRA merged", rows, {"layers": len(rows), "originals": kept} | effect)


def _check_mergeable(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    if not all(layer.enabled for layer in layers.values()):
        raise SurgeryError(
            "the LoRA is disabled, so a merge would change what the model computes",
            "enable_lora(model) first",
        )
    names = adapter_names(model)
    if not active_adapters(model).names():
        raise SurgeryError(
            f"no adapter takes part, so a merge would only take {', '.join(names)} off",
            f"swap_lora(model, {names[0]!r}) first, or remove_lora(model)",
        )
    check_undecided(model, layers)


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
            set_active(model, active.without(names))
        else:
            restore_requires_grad(model)
    touched = {"layers": len({row["layer"] for row in rows})}
    return Report("LoRA removed", rows, touched | state_of(model))
