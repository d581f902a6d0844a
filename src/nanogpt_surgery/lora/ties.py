"""Weights that several layers share: a head tied to the embedding, mostly.

A LoRA on one of them is well defined as long as it is beside the weight. Merged, W + ΔW belongs to
one of them alone: the tie is broken, and a reader that trusts the old `tie_word_embeddings` builds
another model. So whoever touches a tied weight says what is meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.replaced import WholeUpdate
from nanogpt_surgery.lora.settings import Tied
from nanogpt_surgery.lora.several import LoRALayer
from nanogpt_surgery.lora.variants import tied_view

UpdateFactory: TypeAlias = Callable[[nn.Module], LoRAUpdate | WholeUpdate]
_INNER = ".original_layer"


def tied_to(model: nn.Module, name: str) -> list[str]:
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


def with_tied_layers(
    factories: Mapping[str, UpdateFactory], tied_layers: Mapping[str, list[str]]
) -> dict[str, UpdateFactory]:
    """The factories, and behind each those of the layers that share its layer's weight."""
    all_of_them: dict[str, UpdateFactory] = {}
    for name, factory in factories.items():
        shared = _SharedUpdate(factory)
        all_of_them[name] = shared.make
        all_of_them |= dict.fromkeys(tied_layers.get(name, []), shared.view)
    return all_of_them


class _SharedUpdate:
    """One update for several layers that share a weight."""

    def __init__(self, factory: UpdateFactory):
        self.factory = factory

    def make(self, layer: nn.Module) -> LoRAUpdate | WholeUpdate:
        """Makes the update, for the first of the layers."""
        self.update = self.factory(layer)
        return self.update

    def view(self, layer: nn.Module) -> LoRAUpdate:
        """Returns the same update for another of the layers."""
        assert isinstance(self.update, LoRAUpdate), "only updates are shared"
        return tied_view(self.update, layer)


def check_undecided(model: nn.Module, layers: dict[str, LoRALayer]) -> None:
    """Raises `SurgeryError` if merging would break a tie that nobody decided to break."""
    undecided = {}
    for name, layer in layers.items():
        others = [] if layer.unties else tied_to(model, name)
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
    return partner.unties or _has_same_updates(partner, layer)


def _has_same_updates(partner: LoRALayer, layer: LoRALayer) -> bool:
    """Whether the partner has the layer's A and B in every adapter that takes part."""
    names = [n for n in layer.active.names() if n in layer.updates or n in partner.updates]
    return all(
        n in layer.updates
        and n in partner.updates
        and layer.updates[n].lora_A is partner.updates[n].lora_A
        for n in names
    )
