"""Which layers get an update, and which: rank, alpha, kind, and what follows from shared weights.

All is checked here, before anything is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.targets import adaptable_layers, by_pattern, find_targets
from nanogpt_surgery.lora.ties import UpdateFactory, find_tied, with_tied_layers
from nanogpt_surgery.lora.variants import check_settings, new_update


@dataclass(frozen=True)
class UpdatePlan:
    """The layers that get an update, and its settings.

    Attributes:
        matches: the layers that each target means.
        settings: by the layer's name, in the model's order.
        tied_layers: layers that share a layer's weight and get the same A and B, by its name.
    """

    matches: dict[str, list[str]]
    settings: dict[str, LoRASettings]
    tied_layers: dict[str, list[str]]

    def factories(self) -> dict[str, UpdateFactory]:
        """For each layer what makes its update from the bare layer."""
        factories: dict[str, UpdateFactory] = {
            path: partial(new_update, settings=s) for path, s in self.settings.items()
        }
        return with_tied_layers(factories, self.tied_layers)


def plan_updates(
    model: nn.Module, targets: str | Iterable[str], settings: LoRASettings
) -> UpdatePlan:
    """Finds the layers that the targets mean, and checks what each of them is to get.

    Raises:
        SurgeryError: a target means no layer, a pattern of the settings matches no target, a target
            is tied, or a layer cannot have such an update.
    """
    matches, layers = find_targets(model, targets), adaptable_layers(model)
    matched = {layer for found in matches.values() for layer in found}
    names = [layer for layer in layers if layer in matched]
    _check_patterns({**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}, names)
    by_layer = {layer: _settings_of(layer, settings) for layer in names}
    plan = _with_one_update_a_weight(
        UpdatePlan(matches, by_layer, find_tied(model, names, settings.tied)), layers
    )
    for path, chosen in plan.settings.items():
        tied = [layers[other] for other in plan.tied_layers.get(path, [])]
        check_settings(path, layers[path], tied, chosen)
    return plan


def _settings_of(layer: str, settings: LoRASettings) -> LoRASettings:
    return replace(
        settings,
        rank=by_pattern(settings.rank_pattern, layer, settings.rank),
        alpha=by_pattern(settings.alpha_pattern, layer, settings.alpha),
    )


def _with_one_update_a_weight(plan: UpdatePlan, layers: Mapping[str, nn.Module]) -> UpdatePlan:
    """The plan with one layer of each tied group in it, a Linear where there is one."""
    settings, tied_layers = dict(plan.settings), dict(plan.tied_layers)
    for name in plan.settings:
        if name not in settings or name not in tied_layers:
            continue
        group = [name, *tied_layers.pop(name)]
        unfit = [other for other in group if other not in layers]
        if unfit:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(unfit)}, which cannot be wrapped",
                "tied='untie'",
            )
        first = min(group, key=lambda other: isinstance(layers[other], nn.Embedding))
        chosen = settings[name]
        for other in group:
            settings.pop(other, None)
            tied_layers.pop(other, None)
        settings[first] = chosen
        tied_layers[first] = [other for other in group if other != first]
    return UpdatePlan(plan.matches, settings, tied_layers)


def _check_patterns(patterns: dict[str, Any], names: list[str]) -> None:
    unused = [p for p in patterns if not any(by_pattern({p: True}, n, False) for n in names)]
    if unused:
        raise SurgeryError(
            f"no target matches {', '.join(map(repr, unused))} of rank_pattern or alpha_pattern",
            f"the targets are {', '.join(names[:12])}{', …' if names[12:] else ''}",
        )
