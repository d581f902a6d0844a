"""The verbs: inject, enable, disable, merge, remove. Each changes the model in place.

Nothing here happens because of `.train()` or `.eval()`. Each verb returns a report, is written into
the model's journal (`undo_lora` takes it back), and leaves the model as it was if it fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.history.journal import history_of, operation
from nanogpt_surgery.lora.layer import (
    LoRALayer,
    active_mixture,
    adapter_names,
    has_lora,
    lora_layers,
)
from nanogpt_surgery.lora.merge_metrics import Probe, check_weights, effect_of, merge_rows
from nanogpt_surgery.lora.mixture import Blend, Mixture
from nanogpt_surgery.lora.planning import make_plan
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.ties import check_undecided
from nanogpt_surgery.lora.wrapping import (
    attach,
    merge_layers,
    replace,
    report_on,
    restore_requires_grad,
    set_mixture,
    state_of,
    update_rows,
)
from nanogpt_surgery.report import Report
from nanogpt_surgery.values import chosen

__all__ = [
    "disable_lora",
    "enable_lora",
    "has_lora",
    "inject_lora",
    "lora_layers",
    "merge_lora",
    "remove_lora",
]


def inject_lora(
    model: nn.Module,
    targets: str | Iterable[str] = ("q_proj", "v_proj"),
    settings: LoRASettings | None = None,
    **changes: Any,
) -> Report:
    """Freeze the whole model and put an update beside every Linear and Embedding that matches.

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
    plan = make_plan(model, targets, chosen(LoRASettings, settings, changes))
    with operation(model, f"inject {plan.name}"):
        attach(model, plan.name, plan.makers(), plan.followers, plan.unties)
    return report_on(model, "LoRA injected")


def merge_lora(
    model: nn.Module,
    *,
    probe: Probe | None = None,
    tolerance: float = 1e-3,
    force: bool = False,
    keep_originals: bool = True,
) -> Report:
    """Put W + ΔW, added in float32 (float64 if W is), in the place of every wrapped layer.

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
        history_of(model).drop_originals()
    summary = {"layers": len(rows), "originals": kept}
    return Report("LoRA merged", rows, summary | effect)


def _check_mergeable(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    if not all(layer.enabled for layer in layers.values()):
        raise SurgeryError("the LoRA is disabled, so a merge would change what the model computes",
                           "enable_lora(model) first")  # fmt: skip
    mixture, names = active_mixture(model), adapter_names(model)
    if not mixture.adapters():
        raise SurgeryError(
            f"no adapter takes part, so a merge would only take {', '.join(names)} off",
            f"swap_lora(model, {names[0]!r}) first, or remove_lora(model)",
        )
    check_undecided(model, layers)


def remove_lora(model: nn.Module, name: str | None = None) -> Report:
    """Take one adapter off, or all: a layer without updates is the original again, bit for bit.

    Returns:
        A row for each update that was there, and what takes part and can be trained from now on.

    Raises:
        SurgeryError: there is no LoRA, or none of this name.
    """
    lora_layers(model)
    names = adapter_names(model) if name is None else [check_name(model, name)]
    mixture, rows = active_mixture(model), update_rows(model, names)
    with operation(model, f"remove {', '.join(names)}"):
        for path, layer in lora_layers(model).items():
            for one in names:
                if one in layer.updates:
                    del layer.updates[one]
            if not layer.updates:
                replace(model, path, layer.original_layer)
        if has_lora(model):
            set_mixture(model, without(mixture, names))
        else:
            restore_requires_grad(model)
    touched = {"layers": len({row["layer"] for row in rows})}
    return Report("LoRA removed", rows, touched | state_of(model))


def without(mixture: Mixture, names: list[str]) -> Mixture:
    """A blend less some adapters."""
    assert isinstance(mixture, Blend), "rows leave with their block"
    return Blend({name: weight for name, weight in mixture.weights.items() if name not in names})


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


def enable_lora(model: nn.Module) -> Report:
    """Let the updates take part again."""
    return _switch(model, True)


def disable_lora(model: nn.Module) -> Report:
    """Compute as if no update were there; the updates stay."""
    return _switch(model, False)


def _switch(model: nn.Module, enabled: bool) -> Report:
    layers = lora_layers(model)
    with operation(model, "enable" if enabled else "disable", hashed=False):
        for layer in layers.values():
            layer.enabled = enabled
    return report_on(model, "LoRA enabled" if enabled else "LoRA disabled")
