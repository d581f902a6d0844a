"""The adapters that a model carries, and which take part: one, or a weighted sum of several.

A `LoRALayer` has an update for each adapter that changes it, and `active` says which take part in
what it computes. It is called by the layer with its input x and its own output y, and gives the
output with the updates in it. A layer that an adapter does not touch leaves y as it is. Another
adapter for each row of a batch is in per_row.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.report import Report

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}")


class ActiveAdapters(Protocol):
    """How a layer's updates are put together."""

    def __call__(self, layer: LoRALayer, x: Any, y: Tensor) -> Tensor:
        """Returns the layer's output with the updates in it."""

    def names(self) -> list[str]:
        """The names of the adapters that take part."""

    def delta_weight(self, layer: LoRALayer) -> Tensor:
        """The sum that they add to the layer's weight."""


@dataclass(frozen=True)
class WeightedAdapters:
    """Σ wᵢ ΔWᵢ over named adapters; one adapter alone is a sum of one."""

    weights: Mapping[str, float]

    def __call__(self, layer: LoRALayer, x: Any, y: Tensor) -> Tensor:
        """Returns y plus the weighted changes."""
        out = y
        for name, weight in self.weights.items():
            if name in layer.updates:
                change = layer.updates[name](x, y, layer.original_layer)
                out = out + (change if weight == 1 else weight * change)
        return out

    def names(self) -> list[str]:
        """The names in the sum."""
        return list(self.weights)

    def delta_weight(self, layer: LoRALayer) -> Tensor:
        """Σ wᵢ ΔWᵢ in the layout of the weight, float32."""
        total = torch.zeros_like(layer.original_layer.weight, dtype=torch.float32)
        for name, weight in self.weights.items():
            if name in layer.updates:
                update: Any = layer.updates[name]
                total += weight * update.delta_weight(layer.original_layer)
        return total

    def without(self, names: list[str]) -> WeightedAdapters:
        """The sum less some adapters."""
        return WeightedAdapters({n: w for n, w in self.weights.items() if n not in names})

    def __str__(self) -> str:
        parts = [n if w == 1 else f"{w:g} · {n}" for n, w in self.weights.items()]
        return " + ".join(parts) or "none"


class LoRALayer(nn.Module):
    """A frozen layer, and beside it an update for each adapter that changes it.

    Models that read a layer's weight, bias or sizes find the original's. Where a model multiplies
    by that weight itself, instead of calling the layer, the updates take no part; no gradient
    reaches them then, and `fit` says so after the first step.

    Attributes:
        original_layer: frozen, and never written to.
        updates: by the name of the adapter that each belongs to.
        active: which adapters take part, and how.
        enabled: off, the layer computes as if it had no update.
        unties: the choice was made that this layer may part from the one it shares a weight with.
    """

    journaled = ("active", "enabled", "unties")  # what an operation changes, and undo takes back
    replaces_whole = False  # the module, instead of adding to its weight

    def __init__(self, original_layer: nn.Module):
        super().__init__()
        self.original_layer: Any = original_layer.requires_grad_(False)
        self.updates = nn.ModuleDict()
        self.active: ActiveAdapters = WeightedAdapters({LoRASettings.name: 1.0})
        self.enabled = True
        self.unties = False

    @classmethod
    def around(cls, original_layer: nn.Module) -> Self:
        """The layer wrapped, without an update yet."""
        layer = cls.__new__(cls)
        LoRALayer.__init__(layer, original_layer)
        return layer.train(original_layer.training)

    @property
    def shown(self) -> nn.Module:
        """The layer that others see."""
        return self.original_layer

    weight = property(attrgetter("shown.weight"))
    bias = property(attrgetter("shown.bias"))
    in_features = property(attrgetter("shown.in_features"))
    out_features = property(attrgetter("shown.out_features"))
    num_embeddings = property(attrgetter("shown.num_embeddings"))
    embedding_dim = property(attrgetter("shown.embedding_dim"))
    padding_idx = property(attrgetter("shown.padding_idx"))

    @property
    def update(self) -> Any:
        """The one update that takes part.

        Raises:
            SurgeryError: none does, or several do.
        """
        names = [name for name in self.active.names() if name in self.updates]
        if len(names) != 1:
            raise SurgeryError(
                f"{len(names)} updates take part in this layer ({', '.join(names) or 'none'})",
                "layer.updates[NAME] is one of them",
            )
        return self.updates[names[0]]

    lora_A = property(attrgetter("update.lora_A"))  # noqa: N815
    lora_B = property(attrgetter("update.lora_B"))  # noqa: N815
    scaling = property(attrgetter("update.scaling"))
    rank = property(attrgetter("update.rank"))
    alpha = property(attrgetter("update.alpha"))
    dropout = property(attrgetter("update.dropout"))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            raise SurgeryError(
                f"{name} of a {type(self).__name__} is only shown there: what is inside has it",
                "set it before inject_lora, or after remove_lora(model) or merge_lora(model)",
            )
        super().__setattr__(name, value)

    def delta_weight(self) -> Tensor:
        """ΔW of the updates that take part, in the weight's layout, float32."""
        return self.active.delta_weight(self)

    def extra_repr(self) -> str:
        """The text that `print(model)` shows."""
        return f"{self.active}" + ("" if self.enabled else ", disabled")


def lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The wrapped layers by name.

    Raises:
        SurgeryError: there are none.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}
    if not layers:
        raise SurgeryError("the model carries no LoRA", "inject_lora(model, targets=…) first")
    return layers


def has_lora(model: nn.Module) -> bool:
    """Whether any layer is wrapped."""
    return any(isinstance(module, LoRALayer) for module in model.modules())


def active_adapters(model: nn.Module) -> ActiveAdapters:
    """Which adapters take part, the same on every layer; none without a LoRA."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return layers[0].active if layers else WeightedAdapters({})


def adapter_names(model: nn.Module) -> list[str]:
    """The names of the adapters on a model, the oldest first."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoRALayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.updates))


def set_active(model: nn.Module, active: ActiveAdapters) -> None:
    """Chooses which adapters take part, on every layer."""
    for layer in lora_layers(model).values():
        layer.active = active


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


def check_new_name(model: nn.Module, name: str) -> None:
    """Raises `SurgeryError` unless a new adapter can have this name."""
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


def report_on(model: nn.Module, title: str) -> Report:
    """A row for each update on each layer, and the model's parameters."""
    rows = update_rows(model, adapter_names(model))
    return Report(title, rows, {"layers": len(lora_layers(model)), **state_of(model)})


def update_rows(model: nn.Module, adapters: list[str]) -> list[dict[str, Any]]:
    """A row for each update of some adapters on each layer."""
    active = active_adapters(model).names()
    return [
        _row(name, adapter, update, adapter in active)
        for name, layer in lora_layers(model).items()
        for adapter, update in layer.updates.items()
        if adapter in adapters
    ]


def _row(name: str, adapter: str, update: Any, active: bool) -> dict[str, Any]:
    a, b = update.factors() if hasattr(update, "factors") else (None, None)
    return {
        "layer": name,
        "adapter": adapter,
        "in": None if a is None else a.size(1),
        "out": None if b is None else b.size(0),
        "rank": getattr(update, "rank", None),
        "alpha": getattr(update, "alpha", None),
        "parameters": sum(parameter.numel() for parameter in update.trained()),
        "active": active,
    }


def state_of(model: nn.Module) -> dict[str, Any]:
    """The adapters that take part, the parameters, and what to do where adapters only wait."""
    active, names = active_adapters(model), adapter_names(model)
    parameters = list(model.parameters())
    state: dict[str, Any] = {
        "active": str(active),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "total_parameters": sum(p.numel() for p in parameters),
    }
    if names and not active.names():
        state["next"] = f"no adapter takes part: swap_lora(model, {names[0]!r})"
    return state
