"""What an injection would do, before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.kinds import Recipe
from nanogpt_surgery.lora.lora_layer import adapter_names, lora_layers
from nanogpt_surgery.lora.targets import adaptable_layers, by_pattern, find_targets
from nanogpt_surgery.lora.ties import Tied, choose

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class Plan:
    """An adapter's name, the recipe of each layer, and what follows from ties.

    Attributes:
        name: of the adapter.
        matches: the layers each pattern means.
        recipes: by the layer's name; the matches in the model's order.
        followers: tied layers that get the same A and B, by the target they follow.
        unties: a merge may break ties.
    """

    name: str
    matches: dict[str, list[str]]
    recipes: dict[str, Recipe]
    followers: dict[str, list[str]]
    unties: bool


def make_plan(
    model: nn.Module,
    targets: str | Iterable[str],
    rank: int,
    alpha: float,
    dropout: float,
    *,
    name: str,
    rslora: bool,
    dora: bool,
    pissa: bool,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    tied: Tied,
) -> Plan:
    """Check everything and say what goes where; the arguments are those of `inject_lora`.

    Raises:
        SurgeryError: as `inject_lora`.
    """
    check_new_name(model, name)
    matches = find_targets(model, targets)
    matched = {layer for found in matches.values() for layer in found}
    names = [layer for layer in adaptable_layers(model) if layer in matched]
    _check_patterns({**(rank_pattern or {}), **(alpha_pattern or {})}, names)
    recipes = {
        layer: Recipe(
            by_pattern(rank_pattern, layer, rank),
            by_pattern(alpha_pattern, layer, alpha),
            dropout,
            rslora,
            dora,
            pissa,
        )
        for layer in names
    }
    followers = choose(model, names, tied)
    return Plan(name, matches, _leaders(recipes, followers, model), followers, tied == "untie")


def _leaders(
    recipes: dict[str, Recipe], followers: dict[str, list[str]], model: nn.Module
) -> dict[str, Recipe]:
    """The recipes less those of layers that follow another one; a Linear leads an Embedding."""
    layers = adaptable_layers(model)
    left = dict(recipes)
    for name in list(recipes):
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
        recipe = left[name]
        for other in group:
            left.pop(other, None)
            followers.pop(other, None)
        left[leader] = recipe
        followers[leader] = [other for other in group if other != leader]
    return left


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise `SurgeryError` unless a new adapter can have this name."""
    if not _NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
        raise SurgeryError(
            f"an adapter cannot be named {name!r}",
            "letters, digits, - and _, at most 64, and no name of a method of nn.ModuleDict",
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
