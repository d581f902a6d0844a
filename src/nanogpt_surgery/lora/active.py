"""Which adapters take part in what a layer computes: one, or a weighted sum of several.

A `LoRALayer` calls its `active` with its input x and its own output y, and gets the output with the
updates in it. A layer that an adapter does not touch leaves y as it is. Another adapter for each
row of a batch is in per_row.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nanogpt_surgery.lora.layer import LoRALayer


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

    def __str__(self) -> str:
        parts = [n if w == 1 else f"{w:g} · {n}" for n, w in self.weights.items()]
        return " + ".join(parts) or "none"
