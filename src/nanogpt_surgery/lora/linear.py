"""A linear layer with a low-rank update beside it (LoRA, arXiv:2106.09685).

    y = W x + b  +  s · B A x        A (R, in), B (out, R), s = α / R; W (out, in) and b frozen

A is drawn at random and B is zero, so the layer is born changing nothing; training moves A and B
alone. `LoRAUpdate` is the last term, `LoRALinear` the whole line. Several updates on one layer, and
which of them take part, are in `lora_layer.py`; other kinds of update in `kinds.py`.

Legend: R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.lora.layer import DEFAULT, MatrixLayer
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.lora.update import Update


class LoRAUpdate(Update):
    """ΔW = s · B A: two thin matrices and a scale.

    Args:
        layer: the layer it belongs to, for its shape and device.
        rank: R.
        alpha: α; the scale is α / R.
        dropout: probability of zeroing an input of the update in training.
    """

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__(rank, alpha, dropout)
        out_features, in_features = layer.weight.shape
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=layer.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=layer.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """What is added to the layer's own output y (…, out) for its input x (…, in)."""
        a, b = self.factors()
        down = F.linear(self.dropout(x), a.to(x.dtype))  # (…, in) → (…, R)
        return self.scaling * F.linear(down, b.to(x.dtype))  # (…, R) → (…, out)


class LoRALinear(MatrixLayer):
    """Wraps an `nn.Linear`, which it freezes and leaves as it is.

    Args:
        original_layer: the layer to adapt; it keeps its own tensors.
        rank: R, the rank of the update.
        alpha: α; the update is scaled by α / R.
        dropout: probability of zeroing an input of the update (not of the layer) in training.

    Raises:
        SurgeryError: there are no `LoRASettings` with this rank, alpha or dropout, or the layer is
            not an `nn.Linear`. The layer is untouched then.
    """

    def __init__(
        self,
        original_layer: nn.Linear,
        rank: int = LoRASettings.rank,
        alpha: float = LoRASettings.alpha,
        dropout: float = LoRASettings.dropout,
    ):
        if not isinstance(original_layer, nn.Linear):
            raise SurgeryError(
                f"LoRALinear wraps an nn.Linear, not a {type(original_layer).__name__}"
            )
        LoRASettings(rank, alpha, dropout)  # which checks them
        update = LoRAUpdate(original_layer, rank, alpha, dropout)
        super().__init__(original_layer)
        self.updates[DEFAULT] = update

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y: Tensor = self.original_layer(x)
        return self.mixture(self, x, y) if self.enabled else y

    def down_by_row(self, x: Tensor, a: Tensor, index: Tensor) -> Tensor:
        """Row b of (B, …, in) times the matrix `index[b]` of (N, R, in) → (B, …, R)."""
        rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)  # (B, T, in)
        down = torch.bmm(rows, a.to(x.dtype)[index].transpose(1, 2))  # (B, T, R)
        return down.view(*x.shape[:-1], -1)

    def with_weight(self, weight: nn.Parameter) -> nn.Linear:
        """A plain layer like the original, with another weight and the same bias."""
        original = self.original_layer
        layer = nn.Linear(original.in_features, original.out_features, bias=False, device="meta")
        layer.weight, layer.bias = weight, original.bias
        return layer.train(original.training)
