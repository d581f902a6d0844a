"""Which layers get an update, and which: rank, alpha, kind, and what follows from shared weights.

All is checked here, before anything is touched.

Several layers may share one weight: mostly a head is tied to the embedding. A LoRA on one of them
is well defined as long as it is beside the weight. Merged, W + ΔW belongs to one of them alone: the
tie is broken, and a reader that trusts the old `tie_word_embeddings` builds another model. So
whoever touches a tied weight says what is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.embedding import TiedEmbeddingUpdate
from nanogpt_surgery.lora.linear import LoRALayer, LoRAUpdate
from nanogpt_surgery.lora.settings import LoRASettings, Tied
from nanogpt_surgery.lora.targets import adaptable_layers, by_pattern, find_targets
from nanogpt_surgery.lora.variants import check_row_norms, new_update


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

    def factories(self) -> dict[str, Callable[[nn.Module], LoRAUpdate]]:
        """For each layer what makes its update from the bare layer."""
        return {path: partial(new_update, settings=s) for path, s in self.settings.items()}


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
    by_layer = {
        layer: replace(
            settings,
            rank=by_pattern(settings.rank_pattern, layer, settings.rank),
            alpha=by_pattern(settings.alpha_pattern, layer, settings.alpha),
        )
        for layer in names
    }
    plan = _with_one_update_a_weight(
        UpdatePlan(matches, by_layer, find_tied(model, names, settings.tied)), layers
    )
    for path, its_settings in plan.settings.items():
        tied = [layers[other] for other in plan.tied_layers.get(path, [])]
        check_settings(path, layers[path], tied, its_settings)
    return plan


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
        its_settings = settings[name]
        for other in group:
            settings.pop(other, None)
            tied_layers.pop(other, None)
        settings[first] = its_settings
        tied_layers[first] = [other for other in group if other != first]
    return UpdatePlan(plan.matches, settings, tied_layers)


def _check_patterns(patterns: dict[str, Any], names: list[str]) -> None:
    unused = [p for p in patterns if not any(by_pattern({p: True}, n, False) for n in names)]
    if unused:
        raise SurgeryError(
            f"no target matches {', '.join(map(repr, unused))} of rank_pattern or alpha_pattern",
            f"the targets are {', '.join(names[:12])}{', …' if names[12:] else ''}",
        )


def check_settings(
    path: str, layer: Any, tied_layers: Iterable[nn.Module], settings: LoRASettings
) -> None:
    """Raises `SurgeryError` unless there is such an update for a layer and those tied to it."""
    directions = min(layer.weight.shape)
    if settings.rank > directions:
        kind = "PiSSA" if settings.pissa else "an update"
        raise SurgeryError(
            f"{kind} with rank {settings.rank} on {path}, a matrix of "
            f"{tuple(layer.weight.shape)}: there are only {directions} directions",
            f"rank={directions} or less, or rank_pattern={{{path!r}: {directions}}}",
        )
    if settings.dora:
        check_row_norms(path, layer)
    plain = isinstance(layer, nn.Linear) and not (settings.dora or settings.pissa)
    for tied in tied_layers:
        _check_tied(tied, plain)


def _check_tied(tied: nn.Module, plain: bool) -> None:
    if isinstance(tied, nn.Embedding) and not plain:
        raise SurgeryError(
            "tied='both' is for plain LoRA and rsLoRA: DoRA's lengths are those of the head's rows "
            "and of the embedding's columns, and PiSSA's initial factors are kept by one layer",
            "tied='untie', or leave dora and pissa out",
        )


def tied_view(update: LoRAUpdate, layer: nn.Module) -> LoRAUpdate:
    """An update of a Linear for the layer that shares its weight: the same A and B, once more.

    Raises:
        SurgeryError: the kind has no such view.
    """
    _check_tied(layer, type(update) is LoRAUpdate)
    return TiedEmbeddingUpdate(update) if isinstance(layer, nn.Embedding) else update


def tied_to(model: nn.Module, name: str) -> list[str]:
    """The names of the other layers that hold the very weight of the layer `name`.

    One module under two names is no tie: it is wrapped, and merged, under both.
    """
    layer = model.get_submodule(name)
    bare = layer.original_layer if isinstance(layer, LoRALayer) else layer
    weight = bare._parameters.get("weight")
    found = [
        other.removesuffix(".original_layer")
        for other, module in model.named_modules(remove_duplicate=False)
        if weight is not None and module._parameters.get("weight") is weight
    ]
    return [o for o in dict.fromkeys(found) if model.get_submodule(o) is not layer]


def find_tied(model: nn.Module, names: Iterable[str], tied: Tied) -> dict[str, list[str]]:
    """For each target the tied layers that get its update too: none unless `tied` is "both".

    Raises:
        SurgeryError: a target is tied and `tied` is "refuse".
    """
    names = list(names)
    ties = {name: others for name in names if (others := tied_to(model, name))}
    if ties and tied == "refuse":
        shown = "; ".join(f"{name} with {', '.join(others)}" for name, others in ties.items())
        raise SurgeryError(
            f"these layers share one weight: {shown}. Merged, an update of one of them breaks the "
            "tie",
            "tied='untie' lets it: the adapted layer gets a weight of its own when "
            "merged; tied='both' adapts both by the same ΔW, so that they stay tied",
        )
    return ties if tied == "both" else {}
