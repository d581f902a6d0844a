"""Which adapters take part: a weighted sum of them, or another one for each row of a batch.

A mixture is called by a layer with its input x and its own output y, and gives the output with the
updates in it. A layer that an adapter does not touch leaves y as it is.

Legend: B rows of a batch, T all dimensions between rows and features, N adapters, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.lora.layer import MatrixLayer


class Mixture(Protocol):
    """How a layer's updates are put together."""

    def __call__(self, layer: MatrixLayer, x: Any, y: Tensor) -> Tensor:
        """The layer's output with the updates in it."""

    def adapters(self) -> list[str]:
        """The names of the adapters that take part."""

    def delta_weight(self, layer: MatrixLayer) -> Tensor:
        """What they add to the layer's weight."""


@dataclass(frozen=True)
class Blend:
    """Σ wᵢ ΔWᵢ over named adapters; one adapter alone is a blend of one."""

    weights: Mapping[str, float]

    def __call__(self, layer: MatrixLayer, x: Any, y: Tensor) -> Tensor:
        """Y plus the weighted changes."""
        out = y
        for name, weight in self.weights.items():
            if name in layer.updates:
                change = layer.updates[name](x, y, layer.original_layer)
                out = out + (change if weight == 1 else weight * change)
        return out

    def adapters(self) -> list[str]:
        """The names in the blend."""
        return list(self.weights)

    def delta_weight(self, layer: MatrixLayer) -> Tensor:
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


@dataclass(frozen=True)
class Rows:
    """Row b of a batch is adapted by `names[b]`, or by nothing where that is None.

    The matrices are gathered by row and multiplied in one batched product. That a layer's input has
    the rows of the batch is seen to in `rows.py`.
    """

    names: tuple[str | None, ...]

    def __call__(self, layer: MatrixLayer, x: Tensor, y: Tensor) -> Tensor:
        """Y plus each row's change."""
        present = [name for name in self.adapters() if name in layer.updates]
        if not present:
            return y
        self._check(layer, present)
        places = [present.index(n) if n in present else len(present) for n in self.names]
        index = torch.tensor(places, device=y.device)  # (B)
        a, b, gain = _stack(layer, present)  # (N + 1, R, in), (N + 1, out, R), (N + 1, out)
        down = layer.down_by_row(x, a, index)  # (B, …, R)
        up = b.to(y.dtype)[index].transpose(1, 2)  # (B, R, out)
        change = torch.bmm(down.to(y.dtype).reshape(len(index), -1, up.size(1)), up)
        return _scaled(layer, y, change.view_as(y), gain, index)

    def adapters(self) -> list[str]:
        """The names in use, each once."""
        return list(dict.fromkeys(name for name in self.names if name is not None))

    def delta_weight(self, layer: MatrixLayer) -> Tensor:
        """There is no single ΔW."""
        raise SurgeryError(
            "each row of the batch has its own adapter, so there is no one ΔW",
            "leave the block of lora_rows(model, …) first",
        )

    def _check(self, layer: MatrixLayer, present: list[str]) -> None:
        updates: list[Any] = [layer.updates[name] for name in present]
        if layer.training and any(update.dropout.p for update in updates):
            raise SurgeryError(
                "rows with adapters of their own cannot be trained with dropout", "model.eval()"
            )

    def __str__(self) -> str:
        return "by row: " + ", ".join(name or "none" for name in self.names)


def _stack(layer: MatrixLayer, names: list[str]) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, s · B and the gains of some adapters, padded to one rank, and a last one of zeros."""
    updates: list[Any] = [layer.updates[name] for name in names]
    pairs = [update.factors() for update in updates]
    rank = max(a.size(0) for a, _ in pairs)
    a = [F.pad(a, (0, 0, 0, rank - a.size(0))) for a, _ in pairs]
    b = [
        F.pad(update.scaling * b, (0, rank - b.size(1)))
        for update, (_, b) in zip(updates, pairs, strict=True)
    ]
    gains = [update.gain(layer.original_layer) for update in updates]
    gain = None
    if any(one is not None for one in gains):
        ones = torch.ones_like(b[0][:, 0])
        gain = torch.stack([*(ones if one is None else one for one in gains), ones])
    zero_a, zero_b = torch.zeros_like(a[0]), torch.zeros_like(b[0])
    return torch.stack([*a, zero_a]), torch.stack([*b, zero_b]), gain


def _scaled(
    layer: MatrixLayer, y: Tensor, change: Tensor, gain: Tensor | None, index: Tensor
) -> Tensor:
    if gain is None:
        return y + change
    by_row = gain.to(y.dtype)[index]  # (B, out)
    by_row = by_row.view(len(index), *[1] * (y.dim() - 2), -1)  # (B, 1, …, out)
    bias = getattr(layer.original_layer, "bias", None)
    without_bias = y if bias is None else y - bias
    return y + (by_row - 1) * without_bias + by_row * change
