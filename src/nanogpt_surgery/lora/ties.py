"""Weights that several layers share: a head tied to the embedding, mostly.

A LoRA on one of them is well defined as long as it is beside the weight. Merged, W + ΔW belongs to
one of them alone: the tie is broken, and a reader that trusts the old `tie_word_embeddings` builds
another model. So whoever touches a tied weight says what is meant.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.layer import LoRALayer
from nanogpt_surgery.lora.settings import Tied

_INNER = ".original_layer"


def partners(model: nn.Module, name: str) -> list[str]:
    """The names of the other layers that hold the very weight of the layer `name`.

    One module under two names is no tie: it is wrapped, and merged, under both.
    """
    layer = model.get_submodule(name)
    weight = _weight(layer)
    found = [
        other.removesuffix(_INNER)
        for other, module in model.named_modules(remove_duplicate=False)
        if weight is not None and module._parameters.get("weight") is weight
    ]
    return [o for o in dict.fromkeys(found) if model.get_submodule(o) is not layer]


def _weight(layer: nn.Module) -> nn.Parameter | None:
    bare = layer.original_layer if isinstance(layer, LoRALayer) else layer
    weight: nn.Parameter | None = bare._parameters.get("weight")
    return weight


def choose(model: nn.Module, names: Iterable[str], tied: Tied) -> dict[str, list[str]]:
    """For each target the tied layers that are to follow it: none unless `tied` is "both".

    Raises:
        SurgeryError: a target is tied and `tied` is "refuse".
    """
    names = list(names)
    ties = {name: others for name in names if (others := partners(model, name))}
    if ties and tied == "refuse":
        shown = "; ".join(f"{name} with {', '.join(others)}" for name, others in ties.items())
        raise SurgeryError(
            f"these layers share one weight: {shown}. Merged, an update of one of them breaks the "
            "tie",
            "tied='untie' (--tied untie) lets it: the adapted layer gets a weight of its own when "
            "merged; tied='both' (--tied both) adapts both by the same ΔW, so that they stay tied",
        )
    return ties if tied == "both" else {}


def check_undecided(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Raise `SurgeryError` if merging would break a tie that nobody decided to break."""
    undecided = {}
    for name, layer in layers.items():
        others = [] if layer.unties else partners(model, name)
        alone = [other for other in others if not _decided(model, other, layer)]
        if alone:
            undecided[name] = alone
    if undecided:
        shown = "; ".join(f"{name} with {', '.join(rest)}" for name, rest in undecided.items())
        raise SurgeryError(
            f"a merge would break the tie of {shown}",
            "remove_lora, and inject_lora again with tied='untie' or tied='both'",
        )


def _decided(model: nn.Module, other: str, layer: LoRALayer) -> bool:
    """Whether the other layer may part from this one, or is adapted by the very same A and B."""
    partner = model.get_submodule(other)
    if not isinstance(partner, LoRALayer):
        return False
    return partner.unties or _follows(partner, layer)


def _follows(partner: LoRALayer, layer: LoRALayer) -> bool:
    """Whether the partner has the layer's A and B in every adapter that takes part."""
    names = [n for n in layer.mixture.adapters() if n in layer.updates or n in partner.updates]
    return all(
        n in layer.updates
        and n in partner.updates
        and layer.updates[n].lora_A is partner.updates[n].lora_A
        for n in names
    )
