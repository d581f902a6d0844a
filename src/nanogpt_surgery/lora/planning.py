"""What an injection would do, before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.layer import adapter_names, lora_layers
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.targets import adaptable_layers, by_pattern, find_targets
from nanogpt_surgery.lora.ties import choose
from nanogpt_surgery.lora.variants import check_kind, new_update
from nanogpt_surgery.lora.wrapping import Maker

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Plan:
    """An adapter's name, the settings of each layer, and what follows from ties.

    Attributes:
        name: of the adapter.
        matches: the layers each pattern means.
        settings: by the layer's name; the matches in the model's order.
        followers: tied layers that get the same A and B, by the target they follow.
        unties: a merge may break ties.
    """

    name: str
    matches: dict[str, list[str]]
    settings: dict[str, LoRASettings]
    followers: dict[str, list[str]]
    unties: bool

    def makers(self) -> dict[str, Maker]:
        """For each layer what makes its update from the bare layer."""
        return {path: partial(new_update, settings=s) for path, s in self.settings.items()}


def make_plan(model: nn.Module, targets: str | Iterable[str], settings: LoRASettings) -> Plan:
    """Check everything and say what goes where.

    Raises:
        SurgeryError: as `inject_lora`.
    """
    check_new_name(model, settings.name)
    matches = find_targets(model, targets)
    matched = {layer for found in matches.values() for layer in found}
    names = [layer for layer in adaptable_layers(model) if layer in matched]
    _check_patterns({**(settings.rank_pattern or {}), **(settings.alpha_pattern or {})}, names)
    by_layer = {layer: _settings_of(layer, settings) for layer in names}
    followers = choose(model, names, settings.tied)
    leaders = _leaders(by_layer, followers, model)
    layers = adaptable_layers(model)
    for path, chosen in leaders.items():
        partners = [layers[other] for other in followers.get(path, [])]
        check_kind(path, layers[path], partners, chosen)
    return Plan(settings.name, matches, leaders, followers, settings.tied == "untie")


def _settings_of(layer: str, settings: LoRASettings) -> LoRASettings:
    return replace(
        settings,
        rank=by_pattern(settings.rank_pattern, layer, settings.rank),
        alpha=by_pattern(settings.alpha_pattern, layer, settings.alpha),
    )


def _leaders(
    by_layer: dict[str, LoRASettings], followers: dict[str, list[str]], model: nn.Module
) -> dict[str, LoRASettings]:
    """The settings less those of layers that follow another one; a Linear leads an Embedding."""
    layers = adaptable_layers(model)
    left = dict(by_layer)
    for name in list(by_layer):
        if name not in left or name not in followers:
            continue
        group = [name, *followers.pop(name)]
        unfit = [other for other in group if other not in layers]
        if unfit:
            raise SurgeryError(
                f"{name} shares its weight with {', '.join(unfit)}, which cannot be wrapped",
                "tied='untie'",
            )
        leader = min(group, key=lambda other: isinstance(layers[other], nn.Embedding))
        settings = left[name]
        for other in group:
            left.pop(other, None)
            followers.pop(other, None)
        left[leader] = settings
        followers[leader] = [other for other in group if other != leader]
    return left


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise `SurgeryError` unless a new adapter can have this name."""
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


def _check_patterns(patterns: dict[str, Any], names: list[str]) -> None:
    unused = [p for p in patterns if not any(by_pattern({p: True}, n, False) for n in names)]
    if unused:
        raise SurgeryError(
            f"no target matches {', '.join(map(repr, unused))} of rank_pattern or alpha_pattern",
            f"the targets are {', '.join(names[:12])}{', …' if names[12:] else ''}",
        )
